"""A site's CSV is read as it should be, or refused in a line that says what to do."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedward.client.sources import read_source, split
from fedward.core.errors import ConfigError, DataError
from fedward.core.site import Site, load_site
from fedward.core.toml import parse_toml
from fedward.tasks import datasets
from fedward.tasks.heart_disease import HEART_DISEASE as TASK
from fedward.tasks.task import Table

NAMES = tuple(f.name for f in TASK.schema.fields)
GOOD = {
    "age": "54",
    "sex": "male",
    "chest_pain": "asymptomatic",
    "resting_blood_pressure": "130",
    "cholesterol": "250",
    "high_fasting_glucose": "no",
    "resting_ecg": "normal",
    "max_heart_rate": "150",
    "exercise_angina": "yes",
    "st_depression": "1.5",
    "st_slope": "flat",
    "vessels_fluoroscopy": "",
    "thallium_scan": "",
    "heart_disease": "1",
}
SITE = """
[site]
name = "here"
[data]
source = "csv"
path = "patients.csv"
patient_id = "pid"
public_size = 10
{columns}
[policy]
tasks = ["heart-disease"]
max_epsilon = 8.0
"""


def csv_text(*patients: dict[str, str], header: tuple[str, ...] = ("pid", *NAMES)) -> str:
    lines = [",".join(header)]
    for number, patient in enumerate(patients):
        row = {"pid": f"p{number}"} | GOOD | patient
        lines.append(",".join(row.get(name, "") for name in header))
    return "\n".join(lines) + "\n"


def site(columns: str = "") -> Site:
    return parse_toml(SITE.format(columns=columns), Site, file="site.toml")


def read(folder: Path, content: str | bytes, columns: str = "") -> Table:
    data = content.encode() if isinstance(content, str) else content
    (folder / "patients.csv").write_bytes(data)
    return read_source(site(columns), folder / "site.toml", TASK)


def refusal(folder: Path, content: str | bytes, columns: str = "") -> str:
    with pytest.raises(DataError) as caught:
        read(folder, content, columns)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    assert str(folder / "patients.csv") in message
    return message


def test_a_csv_is_read_into_the_schema_s_units_and_codes(tmp_path: Path) -> None:
    table = read(tmp_path, csv_text({}, {"sex": "Female", "cholesterol": "0", "age": " 61 "}))

    assert table.patient_ids == ("p0", "p1")
    assert table.columns["age"].tolist() == [54, 61]
    assert table.columns["sex"].tolist() == [1, 0]
    assert table.columns["chest_pain"].tolist() == [3, 3]
    assert table.columns["cholesterol"][0] == 250
    assert np.isnan(table.columns["cholesterol"][1])
    assert np.isnan(table.columns["thallium_scan"]).all()
    assert table.columns["heart_disease"].tolist() == [1, 1]


def test_mapped_columns_are_renamed_converted_and_translated(tmp_path: Path) -> None:
    header = ("note", *(("AGE_YRS" if n == "age" else n) for n in NAMES), "pid")
    mapping = """
    [data.columns]
    age = "AGE_YRS"
    cholesterol = { column = "cholesterol", factor = 38.67 }
    sex = { column = "sex", values = { "M" = "male", "W" = "female" } }
    """
    text = csv_text({"AGE_YRS": "40", "cholesterol": "5.2", "sex": "W"}, header=header)

    table = read(tmp_path, text, mapping)

    assert table.columns["age"][0] == 40
    assert table.columns["cholesterol"][0] == pytest.approx(5.2 * 38.67)
    assert table.columns["sex"][0] == 0


def test_excel_s_mark_line_ends_quotes_and_empty_lines_are_understood(tmp_path: Path) -> None:
    text = csv_text({}, {"thallium_scan": '"normal"'}).replace("\n", "\r\n\r\n")

    table = read(tmp_path, b"\xef\xbb\xbf" + text.encode())

    assert len(table) == 2
    assert table.columns["thallium_scan"][1] == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (csv_text(header=("pid", *NAMES[1:])) + "x", ['column "age"', "missing", "[data.columns]"]),
        (csv_text({}, header=NAMES), ['column "pid"', "missing", "patient_id"]),
        (csv_text({}, {"age": "999"}), ["row 3", 'column "age"', "outside 18 to 120 years"]),
        (csv_text({"cholesterol": "5.2"}), ["row 2", "outside 50 to 1000 mg/dl", "factor"]),
        (csv_text({"age": "fifty"}), ["row 2", 'column "age"', "text in a number column"]),
        (csv_text({"age": "inf"}), ["row 2", 'column "age"', "text in a number column"]),
        (csv_text({"age": "5_4"}), ["row 2", 'column "age"', "text in a number column"]),
        (csv_text({"st_depression": '"1,5"'}), ["row 2", "with a point"]),
        (csv_text({"sex": "X"}), ["row 2", "unknown category", '"female", "male"', "values"]),
        (csv_text({"exercise_angina": "maybe"}), ["row 2", "flag", "yes or no"]),
        (csv_text({}, {"heart_disease": ""}), ["row 3", "label is missing", "remove"]),
        (csv_text({}, {}, {"pid": "p0"}), ["row 4", 'column "pid"', "row 2", "one row a patient"]),
        (csv_text({"pid": "  "}), ["row 2", 'column "pid"', "id is missing"]),
        (csv_text({}) + "p9,50\n", ["row 3", "2 cells", "15"]),
        (csv_text({}).replace(",", ";"), ["missing", "semicolons"]),
        (csv_text({}, header=("pid", *NAMES, "age")), ['column "age"', "more than once"]),
        (csv_text(), ["header and no patients"]),
        ("", ["is empty"]),
        ("\n\n", ["is empty"]),
        (csv_text({}).encode() + b"p9,\xff\n", ["row 3", "not UTF-8"]),
        (csv_text({}) + 'p9,"50', ["row 3", "not CSV"]),
    ],
)
def test_a_bad_file_is_refused_with_what_where_and_what_to_do(
    tmp_path: Path, content: str | bytes, says: list[str]
) -> None:
    message = refusal(tmp_path, content)

    for part in says:
        assert part in message


@pytest.mark.parametrize("column", NAMES)
def test_a_refusal_never_repeats_what_the_cell_holds(tmp_path: Path, column: str) -> None:
    secret = "4711777"

    assert secret not in refusal(tmp_path, csv_text({column: secret}))


def test_a_refusal_never_repeats_a_patient_s_id(tmp_path: Path) -> None:
    assert "MRN4711" not in refusal(tmp_path, csv_text({"pid": "MRN4711"}, {"pid": "MRN4711"}))


@pytest.mark.parametrize("path", ["absent.csv", ".", "a\\u0000b"])
def test_a_path_that_is_no_file_is_a_data_error(tmp_path: Path, path: str) -> None:
    text = SITE.format(columns="").replace("patients.csv", path)

    with pytest.raises(DataError, match=r"\[data\] path"):
        read_source(parse_toml(text, Site, file="site.toml"), tmp_path / "site.toml", TASK)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ('[data.columns]\nchool = "x"', ["[data.columns] chool", "not a field", "cholesterol"]),
        ('[data.columns]\nsex = { column = "sex", factor = 2.0 }', ["factor", "not a number"]),
    ],
)
def test_a_mapping_that_cannot_be_meant_is_a_config_error(
    tmp_path: Path, columns: str, says: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, csv_text({}), columns)

    for part in [*says, str(tmp_path / "site.toml")]:
        assert part in str(caught.value)


@pytest.mark.parametrize("factor", ["0.0", "-1.0", "inf", '"two"'])
def test_a_factor_must_be_a_positive_number(factor: str) -> None:
    with pytest.raises(ConfigError, match="factor"):
        site(f'[data.columns]\nage = {{ column = "a", factor = {factor} }}')


def test_an_embedded_hospital_is_read_by_name(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text(
        '[site]\nname = "va"\n[data]\nsource = "embedded"\ndataset = "heart-disease"\n'
        'partition = "va"\npublic_size = 200\n'
        '[policy]\ntasks = ["heart-disease"]\nmax_epsilon = 8.0\n'
    )

    assert len(read_source(load_site(file), file, TASK)) == 200

    file.write_text(file.read_text().replace('"va"\npublic', '"vaa"\npublic'))
    with pytest.raises(ConfigError, match=r"site\.toml.*partition.*cleveland"):
        read_source(load_site(file), file, TASK)


cells = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(
    ["", "1", "0", "nan", "-9", "1e999", '"', ",", "\n", "\x00", "male", "yes", "50"]
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=200)
    | st.lists(st.lists(cells, min_size=1, max_size=16).map(",".join), max_size=4).map(
        lambda lines: "\n".join([",".join(("pid", *NAMES)), *lines]).encode()
    )
)
@example(b"\x00")
@example(b"a" * 200_000)
@example(("pid," + ",".join(NAMES) + "\n" + "x" * 200_000).encode())
def test_any_bytes_are_a_table_or_a_data_error(tmp_path: Path, content: bytes) -> None:
    try:
        table = read(tmp_path, content)
    except DataError:
        return
    assert set(table.columns) == set(NAMES)
    for f in TASK.schema.fields:
        for value in table.columns[f.name]:
            f.check(float(value))


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(age=st.floats(18, 120), cholesterol=st.none() | st.floats(50, 1000), flag=st.booleans())
def test_what_is_written_is_read_back(
    tmp_path: Path, age: float, cholesterol: float | None, flag: bool
) -> None:
    text = csv_text(
        {
            "age": repr(age),
            "cholesterol": "" if cholesterol is None else repr(cholesterol),
            "exercise_angina": str(flag),
        }
    )

    columns = read(tmp_path, text).columns

    assert columns["age"][0] == age
    assert columns["exercise_angina"][0] == flag
    if cholesterol is None:
        assert np.isnan(columns["cholesterol"][0])
    else:
        assert columns["cholesterol"][0] == cholesterol


def test_a_split_depends_on_key_and_id_alone() -> None:
    table = datasets.load("heart-disease", partition="cleveland")
    key = bytes(range(32))
    backwards = table.take(range(len(table) - 1, -1, -1))

    train, held_out = split(table, held_out=0.3, key=key)
    _, again = split(backwards, held_out=0.3, key=key)
    _, fewer = split(table.take(range(100)), held_out=0.3, key=key)
    _, other = split(table, held_out=0.3, key=bytes(32))

    assert set(again.patient_ids) == set(held_out.patient_ids)
    assert set(fewer.patient_ids) == set(held_out.patient_ids) & set(table.patient_ids[:100])
    assert set(other.patient_ids) != set(held_out.patient_ids)
    assert sorted([*train.patient_ids, *held_out.patient_ids]) == sorted(table.patient_ids)


def test_the_share_held_out_is_the_one_asked_for() -> None:
    # 20,000 independent patients: six standard deviations is a false alarm in 5e8 runs.
    ids = tuple(str(number) for number in range(20_000))
    table = Table(source="", patient_ids=ids, columns={})

    _, held_out = split(table, held_out=0.3, key=b"k" * 16)

    assert abs(len(held_out) - 6000) < 6.2 * np.sqrt(20_000 * 0.3 * 0.7)


def test_nobody_is_held_out_of_a_share_of_zero() -> None:
    table = datasets.load("heart-disease", partition="switzerland")

    train, held_out = split(table, held_out=0.0, key=b"k" * 16)

    assert (len(train), len(held_out)) == (123, 0)


@pytest.mark.parametrize(("held_out", "key"), [(1.0, b"k" * 16), (-0.1, b"k" * 16), (0.3, b"")])
def test_a_split_refuses_a_share_of_all_and_a_short_key(held_out: float, key: bytes) -> None:
    table = datasets.load("heart-disease", partition="switzerland")

    with pytest.raises(ValueError, match=r"must be|needs"):
        split(table, held_out=held_out, key=key)
