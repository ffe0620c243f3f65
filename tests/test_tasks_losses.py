import numpy as np
import pytest
import torch
from torch import Tensor

from fedward.tasks.losses import DifferentiatedLoss, binary_cross_entropy, cross_entropy


def by_autograd(loss: DifferentiatedLoss, outputs: Tensor, labels: Tensor) -> Tensor:
    outputs = outputs.clone().requires_grad_()
    return torch.autograd.grad(loss(outputs, labels).sum(), outputs)[0]


def given_arrays(loss: DifferentiatedLoss, outputs: Tensor, labels: Tensor) -> Tensor:
    with np.errstate(all="ignore"):  # as it says
        return torch.from_numpy(loss.output_gradient(outputs.numpy(), labels.numpy()))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_the_gradient_of_cross_entropy_is_that_of_autograd(classes: int, scale: float) -> None:
    outputs = torch.randn(50, classes, generator=torch.Generator().manual_seed(1)) * scale
    labels = torch.arange(50) % classes

    gradient = given_arrays(cross_entropy, outputs, labels)

    expected = by_autograd(cross_entropy, outputs, labels)
    torch.testing.assert_close(gradient, expected, atol=2e-7, rtol=0)


@pytest.mark.parametrize("shape", [(50,), (50, 1)])
def test_the_gradient_of_binary_cross_entropy_is_that_of_autograd(shape: tuple[int, ...]) -> None:
    outputs = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 20
    labels = (torch.arange(50) % 2).float()

    gradient = given_arrays(binary_cross_entropy, outputs, labels)

    expected = by_autograd(binary_cross_entropy, outputs, labels)
    torch.testing.assert_close(gradient, expected, atol=2e-7, rtol=0)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_a_class_that_does_not_exist_is_refused(classes: int, beyond: int) -> None:
    label = -1 if beyond < 0 else classes + beyond
    with pytest.raises(IndexError, match="a class number is"):
        given_arrays(cross_entropy, torch.zeros(2, classes), torch.tensor([0, label]))


def test_an_output_that_is_not_a_number_stays_one() -> None:
    outputs = torch.tensor([[float("nan"), 0.0], [float("inf"), float("inf")], [0.0, 1.0]])

    gradient = given_arrays(cross_entropy, outputs, torch.zeros(3, dtype=torch.long))

    assert gradient.isnan().all(1).tolist() == [True, True, False]
