"""From training to the ward: the adapter gives the probabilities that torch gives."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from studies import EPSILON_4, write_study

from fedward.core.study import load_study
from fedward.simulations.adapter import LocalAdapter
from fedward.simulations.simulate import prepare_run, released_parameters, simulate
from fedward.tasks import datasets
from fedward.tasks.parameters import from_vector
from fedward.tasks.registry import get_task


def _post(url: str, value: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps(value).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        reply: dict[str, Any] = json.load(answer)
        return reply


@pytest.mark.parametrize("model", ["logistic", "mlp"])
def test_the_adapters_probabilities_are_torchs_on_200_patients(tmp_path: Path, model: str) -> None:
    file = write_study(tmp_path, privacy=EPSILON_4, rounds=3)
    file.write_text(file.read_text().replace('name = "logistic"', f'name = "{model}"'))
    run = prepare_run(file, tmp_path / "run")
    simulate(file, run)
    study, task = load_study(file), get_task("heart-disease")
    table = datasets.load("heart-disease", partition="va")
    raw = np.stack([table.columns[field.name] for field in task.schema.features], axis=1)
    network = task.model(model)
    from_vector(network, released_parameters(run, study))
    with torch.no_grad():
        outputs = network(torch.from_numpy(task.prepare(table, None).features))
    expected = task.probabilities(outputs).numpy()

    with LocalAdapter(run.path / "stores" / "va") as adapter:
        values = [None if np.isnan(value) else value for value in raw.ravel().tolist()]
        tensor = {"name": "input", "datatype": "FP32", "shape": list(raw.shape), "data": values}
        served = _post(f"{adapter.url}/v2/models/heart/infer", {"inputs": [tensor]})
        first = {
            field.name: field.categories[int(value)] if field.categories else value
            for field, value in zip(task.schema.features, raw[0].tolist(), strict=True)
            if not np.isnan(value)
        }
        asked = _post(f"{adapter.url}/predict", first)

    assert len(table) == 200
    np.testing.assert_allclose(served["outputs"][0]["data"], expected, atol=1e-5, rtol=0)
    assert asked["probability"] == pytest.approx(float(expected[0]), abs=1e-5)
    assert asked["model"] == {"name": "heart", "version": 1}
    assert "simulation" in asked["privacy"]
