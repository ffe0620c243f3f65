"""What a task knows of its fields before it sees a patient: units, ranges, codes.

All of it is public. Ranges come from clinical references and never from a site's patients, so
that checking and scaling by them costs no privacy budget.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedward.core.errors import DataError

Kind = Literal["number", "category", "flag"]
Role = Literal["feature", "label"]

# How files write "not measured", whatever the field; compared in lower case.
MISSING_TEXTS = frozenset({"", "?", ".", "na", "n/a", "nan", "null", "none"})
_FLAGS = {
    "0": 0.0, "no": 0.0, "n": 0.0, "false": 0.0, "f": 0.0,
    "1": 1.0, "yes": 1.0, "y": 1.0, "true": 1.0, "t": 1.0,
}  # fmt: skip
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_WHOLE_FLAG = re.compile(r"([01])\.0+", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One clinical field.

    Attributes:
        name: As studies, site files and the serving adapter write it.
        kind: A number in `unit`; one of `categories`; or a flag, yes or no.
        description: For a clinician, with the data set's own name where there is one.
        unit: Of a number, as a clinician writes it; "1" is a plain count or ratio.
        allowed: Of a number: outside it a value is an error of recording, not a patient.
        scaling: Of a number: the public clinical range that preparation maps to [-1, 1]; what is
            beyond is set to its end.
        categories: Of a category: the allowed ones, in the order of their codes 0, 1, ...
        missing: Further texts or numbers, before unit conversion, that mean "not measured".
        missing_indicator: Whether preparation keeps an indicator of being missing.
        role: A feature, or the label.
        loinc: LOINC code, where one means exactly this.
    """

    name: str
    kind: Kind
    description: str
    unit: str = "1"
    allowed: tuple[float, float] | None = None
    scaling: tuple[float, float] | None = None
    categories: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    missing_indicator: bool = True
    role: Role = "feature"
    loinc: str | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit the kind. Raises `ValueError`."""
        ranges = (self.allowed, self.scaling)
        if self.kind == "number":
            if any(r is None or not r[0] < r[1] for r in ranges):
                raise ValueError(f"{self.name}: a number needs allowed and scaling ranges")
        elif any(r is not None for r in ranges):
            raise ValueError(f"{self.name}: only a number has ranges")
        folded = {c.casefold() for c in self.categories}
        if (self.kind == "category") != (len(folded) > 1) or len(folded) != len(self.categories):
            raise ValueError(f"{self.name}: a category needs two or more distinct categories")

    @property
    def allows(self) -> str:
        """What a value may be, in words, for errors and documentation."""
        match self.kind:
            case "number":
                low, high = self.allowed or (-np.inf, np.inf)
                return f"{low:g} to {high:g}" + ("" if self.unit == "1" else f" {self.unit}")
            case "category":
                return ", ".join(f'"{c}"' for c in self.categories)
            case "flag":
                return "yes or no (true or false, 1 or 0)"

    def parse(self, text: str, *, factor: float = 1.0) -> float:
        """A cell's value: NaN if missing, a code for a category, 0 or 1 for a flag.

        Args:
            text: As the file has it.
            factor: Multiplies a number, to turn the file's unit into the field's.

        Raises:
            ValueError: Why the text is not allowed, without the text.
        """
        cell = text.strip()
        if cell.casefold() in MISSING_TEXTS or cell in self.missing:
            return np.nan
        match self.kind:
            case "number":
                return self._number(cell, factor)
            case "category":
                return self._category(cell)
            case "flag":
                whole = _WHOLE_FLAG.fullmatch(cell)
                value = _FLAGS.get(whole[1] if whole else cell.casefold())
                if value is None:
                    raise ValueError(f"is not a flag; allowed: {self.allows}, or empty")
                return value

    def check(self, value: float) -> None:
        """Check a coded value, NaN allowed. Raises `ValueError` as `parse` does."""
        if np.isnan(value):
            return
        match self.kind:
            case "number":
                low, high = self.allowed or (-np.inf, np.inf)
                if not low <= value <= high:
                    raise ValueError(
                        f"is outside {self.allows}; correct it, leave it empty if it was not "
                        "measured, or convert the unit with `factor` in [data.columns]"
                    )
            case "category":
                if value not in range(len(self.categories)):
                    raise ValueError(f"is not a category; allowed: {self.allows}, or empty")
            case "flag":
                if value not in (0, 1):
                    raise ValueError(f"is not a flag; allowed: {self.allows}, or empty")

    def _number(self, cell: str, factor: float) -> float:
        if _NUMBER.fullmatch(cell) is None:
            raise ValueError(
                f"has text in a number column; allowed: {self.allows}, written with a point "
                "such as 5.2, or empty"
            )
        value = float(cell)
        if any(_NUMBER.fullmatch(code) and float(code) == value for code in self.missing):
            return np.nan
        value *= factor
        self.check(value)
        return value

    def _category(self, cell: str) -> float:
        folded = cell.casefold()
        for code, category in enumerate(self.categories):
            if category.casefold() == folded:
                return float(code)
        raise ValueError(
            f"has an unknown category; allowed: {self.allows}, or empty; "
            "translate local codes with `values` in [data.columns]"
        )

    def to_json(self) -> dict[str, Any]:
        """JSON values: what a release says of its inputs."""
        return {
            "name": self.name,
            "kind": self.kind,
            "description": self.description,
            "unit": self.unit,
            "allowed": list(self.allowed) if self.allowed else None,
            "scaling": list(self.scaling) if self.scaling else None,
            "categories": list(self.categories),
            "role": self.role,
            "loinc": self.loinc,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RawColumn:
    """A column as a source has it, before it is understood.

    Attributes:
        name: The column's name in the source, for errors.
        texts: One cell a row.
        factor: Multiplies numbers, to turn the source's unit into the field's.
        values: Translates local codes, such as `{"M": "male"}`, before anything else.
    """

    name: str
    texts: Sequence[str]
    factor: float = 1.0
    values: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """A task's fields, in order.

    Attributes:
        fields: Features and one label.
        one_row_a_patient: Whether a patient's second row is an error.
    """

    fields: tuple[Field, ...]
    one_row_a_patient: bool = True

    def __post_init__(self) -> None:
        """Check the fields together. Raises `ValueError`."""
        names = [f.name for f in self.fields]
        if len(set(names)) != len(names):
            raise ValueError("two fields have the same name")
        if sum(f.role == "label" for f in self.fields) != 1 or not self.features:
            raise ValueError("a schema needs features and exactly one label")

    @property
    def features(self) -> tuple[Field, ...]:
        """The fields that a prediction starts from, in order: the columns of a raw input."""
        return tuple(f for f in self.fields if f.role == "feature")

    @property
    def label(self) -> Field:
        """The field that is predicted."""
        return next(f for f in self.fields if f.role == "label")

    def field(self, name: str) -> Field:
        """The field of this name. Raises `KeyError`."""
        for candidate in self.fields:
            if candidate.name == name:
                return candidate
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """JSON values: what a release says of its inputs."""
        return {
            "one_row_a_patient": self.one_row_a_patient,
            "fields": [f.to_json() for f in self.fields],
        }

    def parse(
        self,
        columns: Mapping[str, RawColumn],
        *,
        source: str,
        rows: Sequence[int],
    ) -> dict[str, NDArray[np.float64]]:
        """Understand and check text columns.

        Args:
            columns: By field name.
            source: What errors call the source.
            rows: The number of each row as the user counts it.

        Returns:
            One array a field, coded as in `Table`. Unchecked for patients.

        Raises:
            DataError: A field has no column, a cell is not allowed or a label is missing; names
                the first by column, then row. Never holds a patient's value.
        """
        parsed: dict[str, NDArray[np.float64]] = {}
        for f in self.fields:
            if f.name not in columns:
                raise DataError(
                    f"has no column for {f.name} ({f.description}); add it, empty where it was "
                    "not measured, or name it in [data.columns]",
                    source=source,
                )
            raw = columns[f.name]
            if len(raw.texts) != len(rows):
                raise ValueError(f"{f.name}: {len(raw.texts)} cells and {len(rows)} rows")
            values = np.empty(len(rows))
            for index, text in enumerate(raw.texts):
                try:
                    values[index] = f.parse(raw.values.get(text.strip(), text), factor=raw.factor)
                except ValueError as error:
                    raise DataError(
                        str(error), source=source, row=rows[index], column=raw.name
                    ) from None
                if f.role == "label" and np.isnan(values[index]):
                    raise DataError(
                        f"the label is missing; allowed: {f.allows}; complete the row or remove it",
                        source=source,
                        row=rows[index],
                        column=raw.name,
                    )
            parsed[f.name] = values
        return parsed
