import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedward.client.training.bookkeeping import leaves_of, make_clipped_sum
from fedward.client.training.clippers import BookKeeping, Clipper
from fedward.client.training.closed_form import ClosedForm
from fedward.client.training.convolutions import likes_turning
from fedward.client.training.modes import choose_mode
from fedward.client.training.opacus_modes import Ghost, PerSample
from fedward.client.training.plan import Mode
from fedward.client.training.recurrent import Unrolled, unroll
from fedward.client.training.sampler import Batch
from fedward.client.training.stack import stacked


class Attention(nn.Module):
    def __init__(self, size: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(size)
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Any:
        rows, steps, size = x.shape
        parts = self.qkv(self.norm(x)).reshape(rows, steps, 3, self.heads, size // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(size // self.heads), -1)
        return x + self.out((weights @ v).transpose(1, 2).reshape(rows, steps, size))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8, padding_idx=0)
        self.positions = nn.Embedding(12, 8)
        self.block = Attention()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        places = torch.arange(12, device=x.device).repeat(len(x), 1)
        return self.head(self.block(self.words(x) + self.positions(places)).mean(1))


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.words(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase] = nn.GRU, **args: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.cell = kind(8, 6, batch_first=True, **args)
        self.head = nn.Linear(12 if args.get("bidirectional") else 6, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.cell(self.words(x))[0][:, -1])


def logistic() -> nn.Module:
    return nn.Linear(10, 3)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 3))


def stack() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(10, 12),
        nn.ReLU(),
        nn.Linear(12, 9, bias=False),
        nn.Linear(9, 8),
        nn.Tanh(),
        nn.Identity(),
        nn.Linear(8, 7),
        nn.Sigmoid(),
        nn.Linear(7, 3),
    )


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def signal() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, dilation=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "logistic": logistic,
    "perceptron": perceptron,
    "stack": stack,
    "convolutional": convolutional,
    "signal": signal,
    "text": Text,
    "transformer": Transformer,
    "recurrent": Recurrent,
}


def model_of(family: str) -> nn.Module:
    torch.manual_seed(3)
    return FAMILIES[family]()


def batch_of(family: str, *, rows: int = 8, records: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(7)
    shapes = {"convolutional": (1, 10, 10), "signal": (2, 10)}
    if family in ("text", "transformer", "recurrent"):
        x = torch.randint(0, 20, (rows, 12), generator=generator)
    else:
        x = torch.randn((rows, *shapes.get(family, (10,))), generator=generator)
    mask = None
    if records > 1:
        mask = torch.ones(rows)
        mask[records - 1 :: 2 * records] = 0  # every other patient lacks the last record
    return Batch(x, torch.randint(0, 3, (rows,), generator=generator), mask, records)


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, labels, reduction="none")


def by_hand(model: nn.Module, batch: Batch, clip_norm: float) -> tuple[Tensor, Tensor]:
    """One backward pass for every patient, clipped as the definition says; float64."""
    model = model.double()
    trained = [p for p in model.parameters() if p.requires_grad]
    total, norms = torch.zeros(sum(p.numel() for p in trained), dtype=torch.float64), []
    for patient in range(batch.patients):
        part = batch.part(patient, patient + 1)
        x = part.features.double() if part.features.is_floating_point() else part.features
        losses = cross_entropy(model(x), part.labels)
        if part.mask is not None:
            losses = losses * part.mask
        gradients = torch.autograd.grad(losses.sum(), trained, materialize_grads=True)
        flat = torch.cat([g.flatten() for g in gradients])
        norms.append(flat.norm())
        total += flat * min(1.0, clip_norm / float(flat.norm() + 1e-6))
    return total, torch.stack(norms)


@pytest.mark.parametrize("records", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_clipped_sums_are_those_of_the_definition(family: str, records: int) -> None:
    batch = batch_of(family, records=records)
    clip_norm = float(by_hand(model_of(family), batch, 1.0)[1].median())  # some are clipped
    expected = by_hand(model_of(family), batch, clip_norm)[0]

    model = model_of(family).train()
    clipper = made(BookKeeping, model)
    got = clipper(batch, clip_norm=clip_norm)

    torch.testing.assert_close(got.total.double(), expected, atol=1e-6, rtol=1e-6)
    assert got.sanitised == 0
    within = got.squared_norms.sqrt() < clip_norm * (1 - 1e-6)
    assert int(within.sum()) == (batch.patients - 1) // 2  # those below the median


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_model_adds_up_the_same_in_large_batches_as_in_small_ones(bias: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((4400, 10), generator=generator)  # more than NumPy is given
    batch = Batch(x, torch.arange(4400) % 3, None, 1)
    model = nn.Linear(10, 3, bias=bias)
    clipper = ClosedForm(model, cross_entropy, list(model.parameters()))

    small = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for at in range(0, 4400, 400):
        small += clipper(batch.part(at, at + 400), clip_norm=0.8).total
    large = clipper(batch, clip_norm=0.8).total.double()

    torch.testing.assert_close(small, large, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("kind", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("family", FAMILIES)
def test_clipped_sums_are_those_of_opacus(family: str, kind: Mode) -> None:
    if kind == "ghost" and family == "recurrent":
        pytest.skip("Opacus' ghost mode refuses layers that are used more than once")
    batch = batch_of(family)
    model, reference = model_of(family).train(), model_of(family).train()
    for part in (*model.modules(), *reference.modules()):
        if isinstance(part, nn.Embedding):
            part.padding_idx = None  # whose gradient is zero, which Opacus does not know
    ours = made(BookKeeping, model)(batch, clip_norm=0.3)
    oracle = made(KINDS[kind], reference)

    theirs = oracle(batch, clip_norm=0.3)

    torch.testing.assert_close(ours.total, theirs.total, atol=1e-6, rtol=0)


KINDS: dict[str, Callable[..., Clipper]] = {
    "hooks": partial(PerSample, kind="hooks"),
    "functorch": partial(PerSample, kind="functorch"),
    "ghost": Ghost,
}


def made(kind: Callable[..., Clipper], model: nn.Module) -> Clipper:
    trained = list(model.parameters())  # the order before the model is written out
    unroll(model)
    return kind(model, cross_entropy, trained)


def _unrolled(model: nn.Module) -> nn.Module:
    unroll(model)
    return model


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "recurrent"])
@pytest.mark.parametrize("records", [1, 4])
def test_the_pure_function_agrees_alone_and_over_stacked_models(family: str, records: int) -> None:
    batch = batch_of(family, records=records)
    model = model_of(family)
    clipped_sum = make_clipped_sum(model, cross_entropy, batch.features, records=records)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    stacked = {name: torch.stack([p, 0.5 * p, 2 * p]) for name, p in parameters.items()}
    mask = torch.ones(len(batch.features)) if batch.mask is None else batch.mask

    alone = [
        clipped_sum(
            {name: p[k] for name, p in stacked.items()}, batch.features, batch.labels, mask, 0.3
        )
        for k in range(3)
    ]
    together, norms = torch.vmap(clipped_sum, in_dims=(0, None, None, None, None))(
        stacked, batch.features, batch.labels, mask, 0.3
    )

    eager = made(BookKeeping, model.train())(batch, clip_norm=0.3).total
    flat = torch.cat([alone[0][0][name].flatten() for name, _ in model.named_parameters()])
    torch.testing.assert_close(flat, eager, atol=1e-6, rtol=0)
    for k, (sums, squared) in enumerate(alone):
        torch.testing.assert_close(norms[k], squared)
        for name, value in sums.items():
            torch.testing.assert_close(together[name][k], value, atol=1e-6, rtol=1e-5)


def test_the_pure_function_leaves_out_what_is_not_finite() -> None:
    batch = batch_of("perceptron")
    model = model_of("perceptron")
    clipped_sum = make_clipped_sum(model, cross_entropy, batch.features)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    mask = torch.ones(8)
    mask[5] = 0
    broken = batch.features.clone()
    broken[2] = torch.nan
    broken[5] = torch.inf  # is not there at all

    sums, squared = clipped_sum(parameters, broken, batch.labels, mask, 0.3)

    mask[2] = 0
    expected, _ = clipped_sum(parameters, batch.features, batch.labels, mask, 0.3)
    for name, value in sums.items():
        torch.testing.assert_close(value, expected[name])
    assert torch.isfinite(squared).tolist() == [True, True, False, *[True] * 5]


class Residual(nn.Module):
    def __init__(self, *, onto_input: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
        self.head = nn.Linear(10, 3)
        self.onto_input = onto_input

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        inner = self.second(h)
        h = h.add_(inner) if self.onto_input else inner.add_(h)
        return self.head(torch.relu_(h))


def test_activations_in_place_do_not_fool_it() -> None:
    torch.manual_seed(0)
    model, batch = Residual(onto_input=False), batch_of("logistic")

    clipped = made(BookKeeping, model)(batch, clip_norm=0.5).total

    expected = by_hand(model, batch, 0.5)[0]
    torch.testing.assert_close(clipped.double(), expected, atol=1e-6, rtol=0)


def test_an_input_changed_in_place_is_refused_as_by_autograd() -> None:
    model, batch = Residual(onto_input=True), batch_of("logistic")

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made(BookKeeping, model)(batch, clip_norm=0.5)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Recurrent(nn.GRU, num_layers=2),
        lambda: Recurrent(nn.GRU, bidirectional=True, bias=False),
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
        lambda: Recurrent(nn.RNN),
    ],
)
def test_recurrent_layers_written_out_compute_the_same(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, batch = build(), batch_of("recurrent")
    expected = model(batch.features)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))

    restore = unroll(model)
    got = model(batch.features)
    again = torch.autograd.grad(got.square().sum(), list(model.parameters()))

    torch.testing.assert_close(got, expected)
    by_name = dict(zip([id(p) for p in model.parameters()], again, strict=True))
    restore()
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(by_name[id(p)], gradient, atol=1e-5, rtol=1e-4)
    assert isinstance(model.cell, nn.RNNBase)


def test_states_are_passed_through_recurrent_layers() -> None:
    torch.manual_seed(0)
    cell = nn.LSTM(4, 3, batch_first=True)
    x, state = torch.randn(2, 5, 4), (torch.randn(1, 2, 3), torch.randn(1, 2, 3))

    outputs, (h, c) = Unrolled(cell)(x, state)

    expected, (expected_h, expected_c) = cell(x, state)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(h, expected_h)
    torch.testing.assert_close(c, expected_c)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Any:
        return self.out(self.words(x).mean(1))


class Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(10))
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(x * self.scale)


@pytest.mark.parametrize(
    ("build", "mode"),
    [
        (logistic, "closed-form"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(10, 1)), "closed-form"),
        (perceptron, "book-keeping"),
        (convolutional, "book-keeping"),
        (Text, "book-keeping"),
        (Transformer, "book-keeping"),
        (lambda: _unrolled(Recurrent()), "book-keeping"),
        (Tied, "hooks"),
        (Loose, "functorch"),
        (lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(16, 2)), "hooks"),
        (lambda: nn.Sequential(nn.Conv3d(1, 99, 3), nn.Flatten(), nn.Linear(9999, 99)), "ghost"),
    ],
)
def test_the_rule_chooses_the_mode(build: Callable[[], nn.Module], mode: Mode) -> None:
    assert choose_mode(build(), batch_size=64) == mode


@pytest.mark.parametrize("build", [Tied, Loose])
def test_book_keeping_refuses_what_it_would_get_wrong(build: Callable[[], nn.Module]) -> None:
    assert leaves_of(build()) is None
    with pytest.raises(ValueError, match="does not fit"):
        made(BookKeeping, build())
    with pytest.raises(ValueError, match=r"one nn\.Linear"):
        made(ClosedForm, build())


def test_a_record_whose_terms_cancel_does_not_pass_for_shorter() -> None:
    """Gram sums in float32 lose small differences of large terms; direct sums do not."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    trained = list(layer.parameters())
    steps = 4
    x = torch.randn(1, steps, 64) * 1e3
    x[:, 1::2] = x[:, ::2] * (1 + 1e-4)
    weight = torch.randn(1, steps, 64)
    weight[:, 1::2] = -weight[:, ::2]

    def loss(outputs: Tensor, _labels: Tensor) -> Tensor:
        return (outputs * weight).sum((1, 2))

    batch = Batch(x, torch.zeros(1), None, 1)
    total = BookKeeping(nn.Sequential(layer), loss, trained)(batch, clip_norm=1.0).total

    assert float(total.norm()) <= 1 + 1e-4


@pytest.mark.parametrize("kind", ["hooks", "functorch", "ghost"])
def test_a_changed_clip_norm_bounds_the_very_next_sum(kind: str) -> None:
    """Opacus 1.6: the ghost module keeps its own bound when a scheduler changes the optimizer's."""
    batch = batch_of("perceptron", rows=1)
    clipper = made(KINDS[kind], model_of("perceptron").train())

    for clip_norm in (1.0, 0.01, 0.3):
        norm = float(clipper(batch, clip_norm=clip_norm).total.norm())
        assert norm == pytest.approx(clip_norm, rel=1e-4)


@pytest.mark.parametrize("kind", ["hooks", "functorch", "ghost"])
def test_modes_of_opacus_are_taken_off_the_model_again(kind: str) -> None:
    model = model_of("perceptron").train()
    clipper = made(KINDS[kind], model)
    clipper(batch_of("perceptron"), clip_norm=1.0)

    clipper.close()

    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())
    made(KINDS[kind], model).close()  # and can be put on once more


@pytest.mark.parametrize("records", [1, 4])
def test_a_loss_may_bring_its_derivative(records: int) -> None:
    def with_derivative(outputs: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(outputs, labels)

    calls = []

    def output_gradient(outputs: NDArray[Any], labels: NDArray[Any]) -> NDArray[Any]:
        calls.append(len(outputs))
        exponential = np.exp(outputs)
        gradient: NDArray[Any] = exponential / exponential.sum(1, keepdims=True) - np.eye(3)[labels]
        return gradient

    with_derivative.output_gradient = output_gradient  # type: ignore[attr-defined]  # optional
    model, batch = model_of("logistic"), batch_of("logistic", records=records)
    trained = list(model.parameters())

    plain = ClosedForm(model, cross_entropy, trained)(batch, clip_norm=0.3).total.clone()
    quick = ClosedForm(model, with_derivative, trained)(batch, clip_norm=0.3).total

    torch.testing.assert_close(quick, plain, atol=1e-6, rtol=0)
    assert calls == [8]


@pytest.mark.parametrize("family", ["stack", "convolutional", "transformer", "text"])
def test_memory_that_is_used_again_holds_nothing_of_the_batch_before(family: str) -> None:
    model, batch = model_of(family), batch_of(family)
    clipper = BookKeeping(model, cross_entropy, list(model.parameters()))
    parts = [batch, batch.part(0, 3), batch.part(2, 8), batch]

    used_again = [clipper(part, clip_norm=0.3).total.clone() for part in parts]

    for part, total in zip(parts, used_again, strict=True):
        fresh = model_of(family)
        expected = BookKeeping(fresh, cross_entropy, list(fresh.parameters()))(part, clip_norm=0.3)
        torch.testing.assert_close(total, expected.total, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        (lambda model: model, True),
        (lambda model: model[1].requires_grad_(False) and model, True),
        (lambda model: model[2].register_forward_hook(lambda *_: None) and model, False),
        (lambda model: nn.Sequential(*model, nn.Sigmoid()), False),
        (lambda model: nn.Sequential(*model[:3], nn.Tanh(), *model[3:]), False),
        (lambda model: nn.Sequential(*model[:3], nn.Dropout(0.5), *model[3:]), False),
        (lambda model: nn.Sequential(nn.Flatten(0), *model[1:]), False),
        (lambda model: nn.Sequential(*model, model[2]), False),
    ],
)
def test_only_plain_stacks_are_computed_without_autograd(
    change: Callable[[nn.Module], nn.Module], fits: bool
) -> None:
    model = change(model_of("stack"))

    leaves = leaves_of(model)

    assert leaves is not None
    assert stacked(model, leaves) is fits


def test_a_stack_with_frozen_layers_gives_the_sums_of_the_others() -> None:
    model, batch = model_of("stack"), batch_of("stack")
    assert isinstance(model, nn.Sequential)
    for frozen in (model[1], model[4]):
        frozen.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]

    clipped = BookKeeping(model, cross_entropy, trained)(batch, clip_norm=0.3)

    expected, norms = by_hand(model, batch, 0.3)
    torch.testing.assert_close(clipped.total.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(clipped.squared_norms.double().sqrt(), norms, atol=1e-5, rtol=0)


def test_a_stack_on_sequences_takes_the_way_through_autograd() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3))
    batch = Batch(torch.randn(8, 4, 10), torch.randint(0, 3, (8,)), None, 1)

    def of_the_mean(outputs: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(outputs.mean(1), labels)

    one = BookKeeping(model, of_the_mean, list(model.parameters()))(batch, clip_norm=0.3)
    other = PerSample(model, of_the_mean, list(model.parameters()), kind="hooks")

    torch.testing.assert_close(one.total, other(batch, clip_norm=0.3).total, atol=1e-6, rtol=0)


def test_a_loss_that_is_averaged_is_refused_by_every_way() -> None:
    for family in ("logistic", "stack", "convolutional"):
        model, batch = model_of(family), batch_of(family)
        kind = ClosedForm if family == "logistic" else BookKeeping

        clipper = kind(model, functional.cross_entropy, list(model.parameters()))

        with pytest.raises(ValueError, match="one value an example"):
            clipper(batch, clip_norm=1.0)


class Viewer(nn.Module):
    """Looks at memory, as `view` does, so that nothing may be turned in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 9, 3, padding=1), nn.GroupNorm(3, 9)
        self.second, self.head = nn.Conv2d(9, 4, 3, stride=2, dilation=2), nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu_(self.norm(self.conv(x)))
        return self.head(self.second(h).view(len(x), -1))


class Turned(Viewer):
    def forward(self, x: Tensor) -> Any:
        h = torch.relu_(self.norm(self.conv(x)))
        return self.head(self.second(h).flatten(1))


@pytest.mark.parametrize("records", [1, 4])
@pytest.mark.parametrize("build", [Viewer, Turned])
def test_images_of_several_channels_are_clipped_whatever_their_order_in_memory(
    build: type[Viewer], records: int
) -> None:
    torch.manual_seed(3)
    model = build()
    x = torch.randn((8, 3, 10, 10), generator=torch.Generator().manual_seed(7))
    batch = Batch(x, torch.arange(8) % 3, None, records)
    clipper = made(BookKeeping, model)

    parts = [clipper(part, clip_norm=0.5).total.clone() for part in (batch, batch.part(0, 2))]

    expected = [by_hand(model, part, 0.5)[0] for part in (batch, batch.part(0, 2))]
    torch.testing.assert_close([p.double() for p in parts], expected, atol=1e-6, rtol=1e-6)
    assert likes_turning(model.float(), list(model.children()), x) is (build is Turned)


class SummedPixels(nn.Module):
    """Its normalisation gets one gradient a channel back, expanded to all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(1, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.norm(self.conv(x)).sum(2))
        return outputs


def test_a_gradient_that_is_expanded_over_pixels_is_clipped() -> None:
    torch.manual_seed(0)
    model = SummedPixels()
    batch = Batch(torch.randn(6, 1, 9), torch.arange(6) % 3, None, 1)

    clipped = BookKeeping(model, cross_entropy, list(model.parameters()))(batch, clip_norm=0.3)

    expected, _ = by_hand(model, batch, 0.3)
    torch.testing.assert_close(clipped.total.double(), expected, atol=1e-5, rtol=0)
