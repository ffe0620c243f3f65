"""Opacus' clipping modes behind our sampler and our noise: available, and the tests' oracle.

The only module that uses Opacus' own names. Traps of Opacus 1.6 that are closed here: an empty
batch never reaches it, a record that is not finite is taken out before it is summed, the ghost
mode's bound is the one that the noise is calibrated to, and no generator of torch is drawn from.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from fedward.client.training.bookkeeping import clipping_factors
from fedward.client.training.clippers import Clipped, sanitised
from fedward.client.training.parts import Loss
from fedward.client.training.sampler import Batch
from fedward.privacy.mechanisms.noise import NoiseSource, add_noise


class SourcedOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus publishes no types
    """Opacus' optimizer, whose noise comes from a `NoiseSource`.

    All noise of a step is one draw over all parameters in their order, as in our own modes,
    so that the same source gives the same step in every mode.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_source: NoiseSource,
        noise_multiplier: float,
        clip_norm: float,
        expected_batch_size: float,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction="mean",
        )
        self._noise_source = noise_source

    def add_noise(self) -> None:
        """Noise every summed gradient, from the one source."""
        parameters: list[nn.Parameter] = self.params
        total = torch.cat([_summed(p).reshape(-1) for p in parameters])
        released = torch.from_numpy(
            add_noise(
                total.cpu().numpy(),
                std=self.noise_multiplier * self.max_grad_norm,
                sensitivity=self.max_grad_norm,
                source=self._noise_source,
            )
        ).to(total.device)
        sizes = [p.numel() for p in parameters]
        for p, gradient in zip(parameters, torch.split(released, sizes), strict=True):
            p.grad = gradient.view_as(p).clone()


class PerSample:
    """Opacus' `hooks` and `functorch` modes: every record's gradient in memory.

    Args:
        model: In training mode; wrapped until `close`.
        loss: One value an example.
        trained: Parameters in the order of the flat vector.
        kind: Which of the two.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        trained: Sequence[nn.Parameter],
        *,
        kind: Literal["hooks", "functorch"],
    ) -> None:
        self._loss = loss
        self._wrapped = GradSampleModule(
            model, loss_reduction="sum", force_functorch=kind == "functorch"
        )
        self._trained = list(trained)
        self._size = sum(p.numel() for p in self._trained)
        self._optimizer = DPOptimizer(
            torch.optim.SGD(self._trained, lr=0.0),
            noise_multiplier=0.0,  # it only clips here; the noise is added to its sum
            max_grad_norm=1.0,
            expected_batch_size=None,
            loss_reduction="sum",
        )

    def __call__(self, batch: Batch, *, clip_norm: float) -> Clipped:
        """As `Clipper`."""
        self._optimizer.max_grad_norm = clip_norm

        def run(given: Batch) -> tuple[Tensor, Tensor]:
            self._optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad(), _quiet():
                losses = self._loss(self._wrapped(given.features), given.labels)
                total = losses.sum() if given.mask is None else (losses * given.mask).sum()
                torch.autograd.backward([total])
            with torch.no_grad():
                squared = self._patients(given)
                self._optimizer.clip_and_accumulate()
                flat = torch.cat([_summed(p).reshape(-1) for p in self._trained])
            self._optimizer.zero_grad(set_to_none=True)
            return flat, squared

        return sanitised(batch, run, size=self._size)

    def _patients(self, batch: Batch) -> Tensor:
        """Add up the records of a patient in place, and give the patients' squared norms."""
        squared = torch.zeros(batch.patients, device=batch.features.device)
        for p in self._trained:
            sample = getattr(p, "grad_sample", None)
            if sample is None:  # not used by the forward pass
                sample = p.new_zeros((batch.patients * batch.records, *p.shape))
            if batch.records > 1:
                sample = sample.view(batch.patients, batch.records, *p.shape).sum(1)
            p.grad_sample = sample  # type: ignore[attr-defined]  # Opacus' own attribute
            squared += sample.flatten(1).square().sum(1)
        return squared

    def close(self) -> None:
        """Take Opacus' hooks and attributes off the model."""
        self._wrapped.to_standard_module()


class Ghost:
    """Opacus' `ghost` mode: norms without gradients, then a second backward pass.

    Li, Tramèr, Liang and Hashimoto, ICLR 2022. It knows the norm of a record only, so it
    serves plans with one record a patient.
    """

    def __init__(self, model: nn.Module, loss: Loss, trained: Sequence[nn.Parameter]) -> None:
        self._loss = loss
        self._wrapped = GradSampleModuleFastGradientClipping(
            model, loss_reduction="sum", use_ghost_clipping=True, max_grad_norm=1.0
        )
        self._trained = list(trained)
        self._size = sum(p.numel() for p in self._trained)

    def __call__(self, batch: Batch, *, clip_norm: float) -> Clipped:
        """As `Clipper`."""
        if batch.records > 1:
            raise ValueError("ghost clipping knows no patients with several records; use hooks")

        def run(given: Batch) -> tuple[Tensor, Tensor]:
            with torch.enable_grad(), _quiet():
                losses = self._loss(self._wrapped(given.features), given.labels)
                torch.autograd.backward([losses.sum()], retain_graph=True)
                squared = self._wrapped.get_norm_sample().square().detach()
                self._clear()
                # Our factors, not the module's: its bound does not follow a changed clip norm.
                factors = clipping_factors(squared, clip_norm)
                self._wrapped.disable_hooks()
                torch.autograd.backward([(losses * factors).sum()])
                self._wrapped.enable_hooks()
            flat = torch.cat(
                [
                    (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1)
                    for p in self._trained
                ]
            )
            self._clear()
            return flat, squared

        return sanitised(batch, run, size=self._size)

    def _clear(self) -> None:
        for p in self._trained:
            p.grad = None

    def close(self) -> None:
        """Take Opacus' hooks and attributes off the model."""
        self._wrapped.to_standard_module()


def _summed(p: nn.Parameter) -> Tensor:
    summed: Tensor = p.summed_grad  # type: ignore[attr-defined]  # Opacus' own attribute
    return summed


@contextmanager
def _quiet() -> Iterator[None]:
    """Opacus' hooks on first layers, and its embeddings on a CPU, make torch warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        warnings.filterwarnings("ignore", message="In CPU autocast")
        yield
