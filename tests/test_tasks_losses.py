import pytest
import torch
from torch import Tensor

from fedward.tasks.losses import DifferentiatedLoss, binary_cross_entropy, cross_entropy


def by_autograd(loss: DifferentiatedLoss, outputs: Tensor, labels: Tensor) -> Tensor:
    outputs = outputs.clone().requires_grad_()
    return torch.autograd.grad(loss(outputs, labels).sum(), outputs)[0]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_the_gradient_of_cross_entropy_is_that_of_autograd(classes: int, scale: float) -> None:
    outputs = torch.randn(50, classes, generator=torch.Generator().manual_seed(1)) * scale
    labels = torch.arange(50) % classes

    gradient = cross_entropy.output_gradient(outputs, labels)

    expected = by_autograd(cross_entropy, outputs, labels)
    torch.testing.assert_close(gradient, expected, atol=2e-7, rtol=0)


@pytest.mark.parametrize("shape", [(50,), (50, 1)])
def test_the_gradient_of_binary_cross_entropy_is_that_of_autograd(shape: tuple[int, ...]) -> None:
    outputs = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 20
    labels = (torch.arange(50) % 2).float()

    gradient = binary_cross_entropy.output_gradient(outputs, labels)

    expected = by_autograd(binary_cross_entropy, outputs, labels)
    torch.testing.assert_close(gradient, expected, atol=2e-7, rtol=0)


@pytest.mark.parametrize("label", [-1, 2])
def test_a_class_that_does_not_exist_is_refused(label: int) -> None:
    with pytest.raises(IndexError):
        cross_entropy.output_gradient(torch.zeros(2, 2), torch.tensor([0, label]))


def test_an_output_that_is_not_a_number_stays_one() -> None:
    outputs = torch.tensor([[float("nan"), 0.0], [float("inf"), float("inf")], [0.0, 1.0]])

    gradient = cross_entropy.output_gradient(outputs, torch.zeros(3, dtype=torch.long))

    assert gradient.isnan().all(1).tolist() == [True, True, False]
