"""Preparation is bounded, needs no patient's statistics, and standardises from sums alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward.core.canonical import canonical_json
from fedward.tasks import datasets
from fedward.tasks.heart_disease import HEART_DISEASE as TASK
from fedward.tasks.schema import Field, Schema
from fedward.tasks.task import Table, add_sums

HOSPITALS = tuple(datasets.partitions("heart-disease"))
SCHEMA = TASK.schema


@pytest.fixture(scope="module")
def tables() -> list[Table]:
    return [datasets.load("heart-disease", partition=hospital) for hospital in HOSPITALS]


def patient(**known: float) -> Table:
    columns = {f.name: np.array([known.get(f.name, np.nan)]) for f in SCHEMA.fields}
    return Table(source="", patient_ids=("p",), columns=columns | {"heart_disease": np.zeros(1)})


def features_of(**known: float) -> dict[str, float]:
    values = TASK.prepare(patient(**known), None).features[0] / TASK.gain
    return dict(zip(TASK.feature_names, map(float, values), strict=True))


def test_a_scaling_range_becomes_minus_one_to_one_and_is_an_end() -> None:
    for f in SCHEMA.features:
        if f.kind == "number" and f.scaling and f.allowed:
            low, high = f.scaling
            found = [features_of(**{f.name: v})[f.name] for v in (low, high, (low + high) / 2)]
            beyond = [features_of(**{f.name: v})[f.name] for v in f.allowed]

            np.testing.assert_allclose(found, [-1, 1, 0], atol=1e-6)
            assert min(beyond) >= -1.000001
            assert max(beyond) <= 1.000001


def test_a_category_is_one_of_its_indicators_and_a_flag_a_sign() -> None:
    found = features_of(chest_pain=2, exercise_angina=0, sex=1)

    assert [v for name, v in found.items() if name.startswith("chest_pain = ")] == [0, 0, 1, 0]
    assert (found["exercise_angina"], found["sex"]) == (-1, 1)


def test_what_was_not_measured_is_in_the_middle_with_an_indicator() -> None:
    nothing, something = features_of(), features_of(cholesterol=250)

    assert {v for name, v in nothing.items() if not name.endswith(" missing")} == {0}
    assert {v for name, v in nothing.items() if name.endswith(" missing")} == {1}
    assert something["cholesterol missing"] == 0
    assert nothing["cholesterol missing"] == 1


@settings(max_examples=100)
@given(
    st.tuples(
        *(
            st.just(np.nan)
            | (
                st.floats(*f.allowed)
                if f.allowed
                else st.integers(0, max(len(f.categories), 2) - 1).map(float)
            )
            for f in SCHEMA.features
        )
    )
)
def test_no_patient_has_features_longer_than_their_bound(values: tuple[float, ...]) -> None:
    names = (f.name for f in SCHEMA.features)
    features = TASK.prepare(patient(**dict(zip(names, values, strict=True))), None).features

    # At most one indicator of a field with several categories, and all else within 1.
    single = sum(" = " not in name for name in TASK.feature_names)
    several = sum(len(f.categories) > 2 for f in SCHEMA.features)
    assert np.linalg.norm(features) <= TASK.gain * np.sqrt(single + several) + 1e-5


def test_standardising_from_sums_of_hospitals_is_standardising_the_pool(
    tables: list[Table],
) -> None:
    fitted = TASK.fit(add_sums(TASK.statistics(table) for table in tables))

    for f in SCHEMA.features:
        if f.kind == "number":
            pooled = np.concatenate([t.columns[f.name] for t in tables])
            _, _, center, scale = fitted["numbers"][f.name]
            assert center == pytest.approx(np.nanmean(pooled))
            assert scale == pytest.approx(0.5 / np.nanstd(pooled))
    canonical_json(fitted)


def test_statistics_are_sums_of_known_values_and_count_the_missing(tables: list[Table]) -> None:
    sums = add_sums(TASK.statistics(table) for table in tables)
    numbers = [f.name for f in SCHEMA.features if f.kind == "number"]
    cholesterol = numbers.index("cholesterol")

    # 30 unwritten and 172 written as 0 (123 in Switzerland, 49 in VA).
    assert sums["missing"][cholesterol] == 202
    assert sums["count"][cholesterol] == 920 - 202
    assert {values.shape for values in sums.values()} == {(len(numbers),)}


def test_a_number_that_nobody_measured_keeps_its_public_range() -> None:
    fitted = TASK.fit(TASK.statistics(patient()))

    assert fitted["numbers"]["age"] == [30, 80, 55, 2 / 50]


def test_one_patient_s_rows_are_one_unit() -> None:
    table = patient().take([0, 0, 0])

    examples = TASK.prepare(table, None)

    assert examples.units.tolist() == [0, 0, 0]
    assert examples.num_units == 1


def test_taking_examples_numbers_units_anew(tables: list[Table]) -> None:
    examples = TASK.prepare(tables[0], None)

    taken = examples.take([5, 3, 9])

    np.testing.assert_array_equal(taken.features, examples.features[[5, 3, 9]])
    assert sorted(taken.units.tolist()) == [0, 1, 2]


def test_a_preparation_of_another_schema_is_refused() -> None:
    fitted = dict(TASK.fit(TASK.statistics(patient())))

    for wrong in (
        fitted | {"format": 2},
        fitted | {"numbers": {"age": [0, 1, 0, 1]}},
        fitted | {"numbers": {name: [1, 0, 0, 1] for name in fitted["numbers"]}},
        fitted | {"numbers": {name: [1] for name in fitted["numbers"]}},
    ):
        with pytest.raises(ValueError, match="fitted preparation"):
            TASK.prepare(patient(), wrong)


def test_sums_that_no_patients_have_are_refused() -> None:
    sums = dict(TASK.statistics(patient(age=50)))
    shape = sums["count"].shape

    for wrong in (
        {"count": sums["count"]},
        sums | {"sum": np.zeros(2)},
        sums | {"sum": np.full(shape, np.nan)},
        sums | {"count": np.ones(shape), "sum": np.ones(shape), "sum_of_squares": np.zeros(shape)},
    ):
        with pytest.raises(ValueError, match="sums"):
            TASK.fit(wrong)


def number(**changes: object) -> Field:
    parts = {"name": "x", "kind": "number", "description": "", "allowed": (0, 1),
             "scaling": (0, 1)} | changes  # fmt: skip
    return Field(**parts)  # type: ignore[arg-type] # wrong on purpose


LABEL = Field(name="y", kind="flag", description="", role="label")


@pytest.mark.parametrize(
    "changes",
    [{"allowed": None}, {"scaling": (1, 0)}, {"kind": "flag"}, {"categories": ("a", "b")}],
)
def test_a_field_whose_parts_do_not_fit_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="x: "):
        number(**changes)


@pytest.mark.parametrize("fields", [(), (LABEL,), (number(),), (number(), number(), LABEL)])
def test_a_schema_without_features_or_one_label_is_refused(fields: tuple[Field, ...]) -> None:
    with pytest.raises(ValueError, match=r"same name|exactly one label"):
        Schema(fields=fields)
