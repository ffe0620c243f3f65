"""Where a site's patients come from: a CSV file of its own, or an embedded public data set."""

import csv
import hashlib
import hmac
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fedward.core.errors import ConfigError, DataError
from fedward.core.site import Column, Site
from fedward.tasks import datasets
from fedward.tasks.schema import RawColumn, Schema
from fedward.tasks.task import Table, Task

_HASH_BITS = 64
_MIN_KEY_BYTES = 16


def read_source(site: Site, site_file: Path, task: Task) -> Table:
    """A site's patients, validated against the task's schema.

    Args:
        site: What `[data]` says.
        site_file: The file it was read from; paths are relative to it.
        task: What is to be learned.

    Raises:
        DataError: The source is not usable as it is: what, where, and what to do.
        ConfigError: `[data]` names a field, a data set or a partition that there is not.
    """
    if site.data.source == "embedded":
        return _read_embedded(site, site_file, task)
    return _read_csv(site, site_file, task.schema)


def split(table: Table, *, held_out: float, key: bytes) -> tuple[Table, Table]:
    """Training and held-out rows, by a keyed hash of the patient's id.

    Each patient falls on one side independently of all others and of the order of rows, and
    stays there for good. Without the key nobody can tell from an id which side it is on.

    Args:
        table: All rows of a site.
        held_out: Expected share of patients held out, in [0, 1).
        key: Secret of the site, at least 16 bytes (in a simulation: from the study's seed).

    Raises:
        ValueError: `held_out` or `key` is out of bounds.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is {held_out}; it must be in [0, 1)")
    if len(key) < _MIN_KEY_BYTES:
        raise ValueError(f"the key has {len(key)} bytes; it needs at least {_MIN_KEY_BYTES}")
    threshold = int(held_out * 2**_HASH_BITS)
    out = np.array(
        [_hash(key, patient_id) < threshold for patient_id in table.patient_ids], dtype=np.bool_
    )
    return table.take(np.flatnonzero(~out)), table.take(np.flatnonzero(out))


def _hash(key: bytes, patient_id: str) -> int:
    mac = hmac.digest(key, patient_id.encode("utf-8", "surrogatepass"), hashlib.sha256)
    return int.from_bytes(mac[: _HASH_BITS // 8])


def _read_embedded(site: Site, site_file: Path, task: Task) -> Table:
    dataset, partition = site.data.dataset, site.data.partition
    if dataset is None or partition is None:
        raise ValueError("an embedded source names its data set and partition")
    try:
        if site.data.path is None:
            table = datasets.load(dataset, partition=partition)
        else:
            table = datasets.pooled(dataset).take(_read_rows(site_file, site.data.path, partition))
    except ConfigError as error:
        raise ConfigError(error.problem, file=str(site_file), key=error.key) from error
    lacks = [f.name for f in task.schema.fields if f.name not in table.columns]
    if lacks:
        raise DataError(
            f"has no {', '.join(lacks)}, which task {task.name} needs; "
            "choose the task's own data set in [data] dataset",
            source=table.source,
        )
    return table


def _read_rows(site_file: Path, path: str, partition: str) -> NDArray[np.intp]:
    """Which rows of the pooled data set a simulated partition has."""
    file = site_file.parent / path
    try:
        with safe_open(file, framework="numpy") as stream:
            rows: NDArray[np.intp] = stream.get_tensor(partition)
    except (OSError, SafetensorError) as error:
        raise DataError(f"has no rows of {partition}: {error}", source=str(file)) from error
    return rows


def _read_csv(site: Site, site_file: Path, schema: Schema) -> Table:
    if site.data.path is None or site.data.patient_id is None:
        raise ValueError("a CSV source has a path and a column of patient ids")
    columns = _mapping(site, site_file, schema)
    path = site_file.parent / site.data.path
    source = str(path)
    wanted = {site.data.patient_id: "the patient's id"} | {
        column.column: field for field, column in columns.items()
    }
    header, rows, records = _records(path, wanted)
    ids = [record[header.index(site.data.patient_id)].strip() for record in records]
    _check_ids(ids, rows, source=source, column=site.data.patient_id, once=schema.one_row_a_patient)
    raw = {}
    for name, column in columns.items():
        index = header.index(column.column)
        raw[name] = RawColumn(
            name=column.column,
            texts=[record[index] for record in records],
            factor=column.factor,
            values=column.values,
        )
    return Table(
        source=source,
        patient_ids=tuple(ids),
        columns=schema.parse(raw, source=source, rows=rows),
    )


def _mapping(site: Site, site_file: Path, schema: Schema) -> dict[str, Column]:
    """Every field's column: as mapped in [data.columns], else of the field's own name."""
    names = [f.name for f in schema.fields]
    mapped: dict[str, Column] = {name: Column(column=name) for name in names}
    for name, column in site.data.columns.items():
        key = f"[data.columns] {name}"
        if name not in mapped:
            raise ConfigError(
                f"is not a field of this task; allowed: {', '.join(names)}",
                file=str(site_file),
                key=key,
            )
        full = Column(column=column) if isinstance(column, str) else column
        if full.factor != 1 and schema.field(name).kind != "number":
            raise ConfigError(
                "has a factor, but is not a number; remove the factor", file=str(site_file), key=key
            )
        mapped[name] = full
    return mapped


def _records(path: Path, wanted: Mapping[str, str]) -> tuple[list[str], list[int], list[list[str]]]:
    """Header, row numbers (the header is row 1, as a spreadsheet counts) and records.

    `wanted` are the columns that must be there once, each with its use.
    """
    source = str(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror}; correct [data] path in the site's file",
            source=source,
        ) from error
    except ValueError as error:
        raise DataError(
            "is not a path; correct [data] path in the site's file", source=source
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            "is not UTF-8 text; save it as CSV UTF-8", source=source, row=_row_at(data, error.start)
        ) from None
    lines = _lines(text, source=source)
    header = next(lines, (0, []))[1]
    if not header:
        raise DataError("is empty; it needs a header and one row a patient", source=source)
    header = [name.strip() for name in header]
    for name, use in wanted.items():
        _require_once(name, header, use=use, source=source)
    rows: list[int] = []
    records: list[list[str]] = []
    for row, record in lines:
        if len(record) != len(header):
            raise DataError(
                f"has {len(record)} cells and the header has {len(header)}; "
                "quote cells that hold commas",
                source=source,
                row=row,
            )
        rows.append(row)
        records.append(record)
    if not records:
        raise DataError("has a header and no patients; add one row a patient", source=source)
    return header, rows, records


def _lines(text: str, *, source: str) -> Iterator[tuple[int, list[str]]]:
    """Records with their row numbers; empty lines count and are skipped."""
    row = 0
    try:
        for row, record in enumerate(csv.reader(io.StringIO(text, newline=""), strict=True), 1):
            if record:
                yield row, record
    except csv.Error as error:
        raise DataError(
            f"is not CSV: {error}; see whether a quote is left open", source=source, row=row + 1
        ) from None


def _row_at(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def _require_once(name: str, header: list[str], *, use: str, source: str) -> None:
    found = header.count(name)
    if found == 1:
        return
    if found > 1:
        raise DataError(
            "is in the header more than once; rename one", source=source, row=1, column=name
        )
    if len(header) == 1 and ";" in header[0]:
        hint = "separate columns with commas, not with semicolons"
    else:
        hint = "add it, or name another column in the site's file ([data] patient_id, or "
        hint += "[data.columns]); leave cells empty where it was not measured"
    raise DataError(f"the column is missing ({use}); {hint}", source=source, row=1, column=name)


def _check_ids(ids: list[str], rows: list[int], *, source: str, column: str, once: bool) -> None:
    """No id is empty, and none is there twice where a patient has one row. Names no id."""
    first: dict[str, int] = {}
    for patient_id, row in zip(ids, rows, strict=True):
        if not patient_id:
            raise DataError(
                "the patient's id is missing; complete the row or remove it",
                source=source,
                row=row,
                column=column,
            )
        if once and patient_id in first:
            raise DataError(
                f"the same patient is in row {first[patient_id]}; keep one row a patient",
                source=source,
                row=row,
                column=column,
            )
        first.setdefault(patient_id, row)
