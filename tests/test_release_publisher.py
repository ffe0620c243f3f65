"""The publisher: what a trained heart-disease model becomes."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedward.core.canonical import digest
from fedward.core.identity import Identity
from fedward.core.release import read_release
from fedward.core.study import Study, parse_study
from fedward.server.publisher import golden_inputs, publish
from fedward.server.registry import Registry
from fedward.server.statement import privacy_statement
from fedward.serving.engine import start_engine
from fedward.tasks.parameters import from_vector, to_vector
from fedward.tasks.registry import get_task
from fedward.tasks.task import Table

_STUDY = """
[study]
name = "heart-disease"
task = "heart-disease"
rounds = 3
[model]
name = "logistic"
[training]
local_steps = 1
sample_rate = 0.3
learning_rate = 0.5
[privacy]
mode = "local"
epsilon = 4.0
[aggregation]
min_sites = 3
"""
_PRIVACY: dict[str, Any] = {
    "mode": "local",
    "unit": "patient",
    "delta": 1e-5,
    "neighboring_relation": "add-or-remove-one",
    "accountant": "pld",
    "simulated": False,
    "sites": {"cleveland": {"epsilon": 3.98}, "va": {"epsilon": 3.5}},
}
_METRICS = {
    "pooled": {"auroc": 0.89, "num_examples": 103},
    "worst": {"site": "va", "auroc": 0.73},
    "sites": {
        "cleveland": {"auroc": 0.9, "num_examples": 91},
        "va": {"auroc": 0.7312, "num_examples": 12},
    },
}
_IDENTITY = Identity.generate_publisher()


@pytest.fixture(scope="module")
def study() -> Study:
    return parse_study(_STUDY)


@pytest.fixture(scope="module")
def parameters() -> NDArray[np.float32]:
    size = len(to_vector(get_task("heart-disease").model("logistic")))
    return np.random.default_rng(1).normal(size=size).astype(np.float32)


def _publish(registry: Path, study: Study, parameters: NDArray[np.float32], **changed: Any) -> Path:
    arguments: dict[str, Any] = {
        "registry": registry,
        "study": study,
        "task": get_task("heart-disease"),
        "parameters": parameters,
        "fitted": None,
        "privacy": _PRIVACY,
        "metrics": _METRICS,
        "training": {"rounds": 3, "sites": ["cleveland", "va"], "versions": {"torch": "2.13.0"}},
        "identity": _IDENTITY,
    }
    return publish(**{**arguments, **changed})


def test_the_released_graph_gives_what_torch_gives(
    tmp_path: Path, study: Study, parameters: NDArray[np.float32]
) -> None:
    import torch

    task = get_task("heart-disease")
    model = task.model("logistic")
    from_vector(model, parameters)
    inputs = np.concatenate([golden_inputs(task.schema.features, seed=str(i)) for i in range(4)])
    columns = {f.name: inputs[:, i].astype(float) for i, f in enumerate(task.schema.features)}
    columns[task.schema.label.name] = np.zeros(len(inputs))
    table = Table("oracle", tuple(map(str, range(len(inputs)))), columns)
    with torch.no_grad():
        wanted = task.probabilities(model(torch.from_numpy(task.prepare(table, None).features)))

    folder = _publish(tmp_path, study, parameters)
    engine = start_engine(read_release(folder, _IDENTITY.public))

    np.testing.assert_allclose(engine.predict(inputs)[:, 0], wanted.numpy(), atol=1e-5)


def test_versions_rise_by_one_and_equal_arguments_give_equal_files(
    tmp_path: Path, study: Study, parameters: NDArray[np.float32]
) -> None:
    first, second = (_publish(tmp_path, study, parameters) for _ in range(2))

    assert (first.name, second.name) == ("1", "2")
    assert Registry(tmp_path).versions("heart-disease") == (1, 2)
    stamped = {"signature.json", "card.json", "card.html", "bom.cdx.json", "model.sig"}
    for path in first.iterdir():
        assert path.name in stamped or path.read_bytes() == (second / path.name).read_bytes()


def test_the_interface_names_units_ranges_and_codes(
    tmp_path: Path, study: Study, parameters: NDArray[np.float32]
) -> None:
    release = read_release(_publish(tmp_path, study, parameters), _IDENTITY.public)
    fields = {field.name: field for field in release.signature.fields}

    assert fields["cholesterol"].unit == "mg/dl"
    assert fields["cholesterol"].units["mmol/L"][0] == pytest.approx(38.67, abs=0.01)
    assert fields["sex"].codes == {"female": 0.0, "male": 1.0}
    assert fields["exercise_angina"].codes == {"no": 0.0, "yes": 1.0}
    assert (fields["age"].low, fields["age"].high, fields["age"].loinc) == (18, 120, "30525-0")


def test_the_privacy_statement_carries_all_that_an_epsilon_needs(
    tmp_path: Path, study: Study, parameters: NDArray[np.float32]
) -> None:
    privacy = read_release(_publish(tmp_path, study, parameters), _IDENTITY.public).privacy

    assert privacy["private"] is True
    assert privacy["epsilon"] == 3.98
    for word in ("3.98", "1e-05", "patient", "add-or-remove-one", "pld", "local"):
        assert word in privacy["statement"]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"simulated": True}, "simulation"),
        ({"sites": {"cleveland": {}}}, "not known"),
        ({"sites": {}}, "not known"),
        ({"mode": "none"}, "without differential privacy"),
    ],
)
def test_what_does_not_protect_never_says_that_it_does(changed: dict[str, Any], why: str) -> None:
    statement = privacy_statement({**_PRIVACY, **changed})

    assert statement["private"] is False
    assert why in statement["reason"]
    assert statement["statement"].startswith("No privacy promise")


@pytest.mark.parametrize("key", [*_PRIVACY])
def test_a_statement_with_a_part_missing_is_an_error(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        privacy_statement({name: value for name, value in _PRIVACY.items() if name != key})


def test_a_site_of_few_patients_is_suppressed_on_the_card(
    tmp_path: Path, study: Study, parameters: NDArray[np.float32]
) -> None:
    folder = _publish(tmp_path, study, parameters)
    evaluation = json.loads((folder / "card.json").read_text())["evaluation"]

    assert list(evaluation["sites"]) == ["cleveland"]
    assert evaluation["worst"] == {}
    assert evaluation["suppressed"]["sites"] == ["va"]
    assert "0.731" not in (folder / "card.html").read_text()


def test_the_page_escapes_text_and_asks_nothing_of_a_network(
    tmp_path: Path, study: Study, parameters: NDArray[np.float32]
) -> None:
    metrics = {"sites": {"<script>alert(1)</script>": {"auroc": 0.9, "num_examples": 91}}}

    page = (_publish(tmp_path, study, parameters, metrics=metrics) / "card.html").read_text()

    assert "<script" not in page
    for word in ("http:", "https:", "src=", "@import", "url("):
        assert word not in page


def test_a_failed_publication_leaves_nothing(
    tmp_path: Path, study: Study, parameters: NDArray[np.float32]
) -> None:
    with pytest.raises(ValueError, match="P-256"):
        _publish(tmp_path, study, parameters, identity=Identity.generate_site())

    assert Registry(tmp_path).versions("heart-disease") == ()
    assert list((tmp_path / "heart-disease").iterdir()) == []


def test_golden_inputs_are_within_the_schema_and_repeatable() -> None:
    features = get_task("heart-disease").schema.features
    inputs = golden_inputs(features, seed="a")

    for column, field in zip(inputs.T.astype(float), features, strict=True):
        for value in column[~np.isnan(column)]:
            field.check(float(value))
    np.testing.assert_array_equal(inputs, golden_inputs(features, seed="a"))
    assert np.isnan(inputs).any()


def test_the_bill_of_materials_lists_every_other_file_with_its_digest(
    tmp_path: Path, study: Study, parameters: NDArray[np.float32]
) -> None:
    folder = _publish(tmp_path, study, parameters)
    bill = json.loads((folder / "bom.cdx.json").read_text())

    listed = {
        part["name"]: part["hashes"][0]["content"]
        for part in bill["metadata"]["component"]["components"]
    }
    others = [p for p in folder.iterdir() if p.name not in ("bom.cdx.json", "model.sig")]
    assert listed == {path.name: digest(path.read_bytes()) for path in others}
    assert "pkg:pypi/torch@2.13.0" in {part["purl"] for part in bill["components"]}


@pytest.mark.e2e
def test_the_bill_of_materials_is_valid_by_its_schema(
    tmp_path: Path, study: Study, parameters: NDArray[np.float32]
) -> None:
    python = os.environ.get("FEDWARD_CYCLONEDX_PYTHON")
    if python is None:
        pytest.skip("FEDWARD_CYCLONEDX_PYTHON names a Python with cyclonedx-python-lib")
    folder = _publish(tmp_path, study, parameters)
    script = (
        "import sys\n"
        "from cyclonedx.schema import SchemaVersion\n"
        "from cyclonedx.validation.json import JsonStrictValidator\n"
        "text = open(sys.argv[1]).read()\n"
        "sys.exit(str(JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) or '') or 0)"
    )

    done = subprocess.run(
        [python, "-c", script, str(folder / "bom.cdx.json")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
