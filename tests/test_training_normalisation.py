import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedward.client.training.clippers import BookKeeping
from fedward.client.training.convolutions import Turning, likes_turning
from fedward.client.training.normalisation import normalised
from fedward.client.training.parts import Memory
from fedward.client.training.sampler import Batch
from fedward.tasks.losses import cross_entropy


@given(
    rows=st.integers(2, 4),  # torch refuses one pixel of one row
    groups=st.integers(1, 4),
    in_group=st.integers(1, 5),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    last=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_normalising_with_channels_last_is_what_torch_does(
    rows: int, groups: int, in_group: int, shape: tuple[int, int], last: bool
) -> None:
    torch.manual_seed(rows)
    layer = nn.GroupNorm(groups, groups * in_group)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = 3 * torch.randn(rows, groups * in_group, *shape) + 5
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    x.requires_grad_()
    d = torch.randn(x.shape)
    normal = nn.GroupNorm(groups, groups * in_group, affine=False)
    exactly = copy.deepcopy(layer).double(), x.detach().double().requires_grad_(), d.double()
    results = []
    for of, given_to, gradient in (exactly, (layer, x, d)):
        out = of(given_to)
        back = torch.autograd.grad(out, (given_to, of.weight, of.bias), gradient)
        product = (normal(given_to.detach()) * gradient).flatten(2).sum(2)
        results.append((out.detach(), *back, product, gradient.flatten(2).sum(2)))

    got, sums = normalised(layer, x, torch.empty(x.shape))
    back = torch.autograd.grad(got, (x, layer.weight, layer.bias), d)

    for value, exact, torchs in zip((got.detach(), *back, *sums.of(d)), *results, strict=True):
        error = float((value - exact).abs().max())
        assert error <= 1e-5 + 16 * float((torchs - exact).abs().max())


class Shared(nn.Module):
    """Goes through the same convolution and normalisation three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = torch.relu_(self.norm(self.again(x)))
        outputs: Tensor = self.head(x.mean((2, 3)))
        return outputs


class AtFirst(nn.Module):
    """Normalises what nobody asks a gradient of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(1, 2), nn.Conv2d(2, 4, 3)
        self.head = nn.Linear(4 * 5 * 7, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.conv(self.norm(x.expand(-1, 2, -1, -1))).flatten(1))
        return outputs


@pytest.mark.parametrize("records", [1, 3])
@pytest.mark.parametrize("frozen", ["", "norm.weight", "norm.bias"])
@pytest.mark.parametrize("build", [Shared, AtFirst])
def test_a_normalisation_is_clipped_wherever_and_however_often_it_stands(
    build: type[nn.Module], frozen: str, records: int
) -> None:
    torch.manual_seed(0)
    model = build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name != frozen)
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = Batch(torch.randn(6, 1, 7, 9), torch.arange(6) % 3, None, records)
    gradients = []
    for row in range(0, 6, records):
        part = slice(row, row + records)
        loss = cross_entropy(model(batch.features[part]), batch.labels[part]).sum()
        own = torch.autograd.grad(loss, trained)
        gradients.append(torch.cat([g.reshape(-1) for g in own]))
    norms = torch.stack([g.norm() for g in gradients])

    clipped = BookKeeping(model, cross_entropy, trained)(batch, clip_norm=0.3)

    torch.testing.assert_close(clipped.squared_norms.sqrt(), norms, atol=1e-5, rtol=1e-5)
    expected = sum(g * min(1.0, 0.3 / float(g.norm())) for g in gradients)
    torch.testing.assert_close(clipped.total, expected, atol=1e-5, rtol=0)
    assert likes_turning(model, list(model.children()), batch.features)


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    torch.manual_seed(0)
    layer = nn.GroupNorm(2, 8)
    x = torch.randn(3, 8, 4, 4)
    spoilt = x.clone()
    spoilt[1, 3, 2, 2] = torch.nan

    got, want = normalised(layer, spoilt, torch.empty_like(x))[0], layer(x)

    torch.testing.assert_close(got[[0, 2]], want[[0, 2]])
    assert not torch.isfinite(got[1, :4]).any()


def test_a_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = Shared()
    x = torch.randn(2, 1, 5, 5)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    expected = model(x)

    turning = Turning(list(model.children()), Memory())
    inside = model(x)
    turning.close()

    assert inside.grad_fn.name() != model.norm(torch.randn(1, 8, 2, 2)).grad_fn.name()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(model(x), expected, atol=0, rtol=0)
