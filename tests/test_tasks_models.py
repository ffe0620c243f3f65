"""Models start the same everywhere, and their parameters travel as one vector."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedward.core.errors import ConfigError
from fedward.tasks.heart_disease import HEART_DISEASE as TASK
from fedward.tasks.parameters import from_vector, to_named, to_vector
from fedward.tasks.registry import descriptions, get_task


def test_logistic_starts_at_zero_and_says_even_odds() -> None:
    model = TASK.model("logistic")
    features = torch.ones(3, TASK.preparation(None).num_features)

    assert not to_vector(model).any()
    assert TASK.probabilities(model(features)).tolist() == [0.5] * 3


def test_initial_parameters_neither_read_nor_move_torch_s_generator() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = to_vector(TASK.model("mlp"))
    drawn = torch.rand(1)
    second = to_vector(TASK.model("mlp"))

    assert torch.equal(drawn, expected)
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, to_vector(TASK.model("mlp", seed=1)))


def test_mlp_has_the_hidden_units_asked_for() -> None:
    num_features = TASK.preparation(None).num_features

    for hidden in (1, 16, 50):
        assert len(to_vector(TASK.model("mlp", hidden=hidden))) == hidden * (num_features + 2) + 1
    assert len(to_vector(TASK.model("mlp"))) == 16 * (num_features + 2) + 1


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("tree", {}, "logistic, mlp"),
        ("logistic", {"hidden": 3}, "allowed: none"),
        ("mlp", {"width": 3}, "hidden, seed"),
        ("mlp", {"hidden": 0}, "1 to 4096"),
        ("mlp", {"hidden": 2.5}, "1 to 4096"),
        ("mlp", {"hidden": True}, "1 to 4096"),
    ],
)
def test_a_model_that_there_is_not_is_a_config_error(
    name: str, args: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        TASK.model(name, **args)


def test_a_vector_goes_into_a_model_and_comes_back() -> None:
    model = TASK.model("mlp")
    vector = np.random.default_rng(1).normal(size=len(to_vector(model))).astype(np.float32)

    from_vector(model, vector)
    back = to_vector(model)
    vector_before = vector.copy()
    vector[:] = 0

    np.testing.assert_array_equal(back, vector_before)
    np.testing.assert_array_equal(to_vector(model), vector_before)
    expected = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    np.testing.assert_array_equal(back, expected)


def test_named_parameters_are_copies_in_the_model_s_order() -> None:
    model = TASK.model("mlp")
    named = to_named(model)

    np.testing.assert_array_equal(
        np.concatenate([values.reshape(-1) for values in named.values()]), to_vector(model)
    )
    named["0.weight"][:] = 7
    assert not (to_vector(model) == 7).any()


@pytest.mark.parametrize("vector", [np.zeros(3, np.float32), np.zeros(28), np.zeros((1, 28))])
def test_a_vector_of_another_model_is_refused(vector: np.ndarray) -> None:
    with pytest.raises(ValueError, match="28 float32 parameters"):
        from_vector(TASK.model("logistic"), vector)


def test_the_loss_is_one_value_an_example() -> None:
    outputs, labels = torch.tensor([[0.0], [3.0]]), torch.tensor([1.0, 0.0])

    loss = TASK.loss(outputs, labels)

    np.testing.assert_allclose(loss.numpy(), [np.log(2), np.log1p(np.exp(3))], rtol=1e-6)


def test_tasks_are_found_by_name_and_by_import_path() -> None:
    assert set(descriptions()) == {"heart-disease"}
    assert get_task("heart-disease") is TASK
    assert get_task("fedward.tasks.heart_disease:HEART_DISEASE") is TASK


def test_a_task_of_another_package_may_be_a_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clinic_of_ours.py").write_text(
        "from fedward.tasks.heart_disease import SCHEMA\n"
        "from fedward.tasks.tabular import BinaryTabularTask\n"
        "class Ours(BinaryTabularTask):\n"
        "    def __init__(self): super().__init__(name='ours', schema=SCHEMA)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    assert get_task("clinic_of_ours:Ours").name == "ours"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("heart-diseas", 'did you mean "heart-disease"'),
        ("no.such.package:Task", "install its package"),
        ("fedward.tasks.heart_disease:Nothing", "cannot be loaded"),
        ("fedward.tasks.heart_disease:SCHEMA", "lacks"),
        (":", "cannot be loaded"),
    ],
)
def test_a_task_that_there_is_not_is_a_config_error(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        get_task(name, file="my-study.toml")

    assert "my-study.toml" in str(caught.value)
