"""How many patients fit below a memory limit at once, and memory that is kept between steps."""

import functools
import math
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from fedward.client.training.plan import Mode
from fedward.client.training.sampler import Batch

_FLOAT = 4
_SEEN: "WeakKeyDictionary[nn.Module, dict[tuple[int, ...], int]]" = WeakKeyDictionary()
# Activations are held once for the backward pass, once as gradients, and once in passing.
_COPIES = 3
# Unfolded inputs of convolutions are large: in parts, a step of a batch of 512 takes four fifths
# of the time that it takes in one piece.
_CACHE_MB = 96.0
_KEPT = 31 * 2**20  # bytes; glibc follows blocks of up to 32 MiB


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep what steps free, which the next ones will take again.

    glibc maps large blocks one by one, and gives the end of its heap back to the system, where
    every page has to be faulted in again: a third of a step of a convolutional network of 64
    records. From which size on it does so follows the largest mapped block that was ever freed
    (`mallopt(3)`, M_MMAP_THRESHOLD). Elsewhere this is nothing.
    """
    np.empty(_KEPT, np.uint8)


def patients_at_once(model: nn.Module, one: Batch, *, mode: Mode | None, limit_mb: float) -> int:
    """Number of patients whose records are worked through together; at least one.

    An estimate from the shapes of one patient's activations, of which the limit leaves out
    parameters and data.

    Args:
        model: In training mode.
        one: One patient's records.
        mode: How gradients are clipped; None for plain training.
        limit_mb: In units of 2**20 bytes.
    """
    if mode == "book-keeping" and any(
        isinstance(m, nn.Conv1d | nn.Conv2d) for m in model.modules()
    ):
        limit_mb = min(limit_mb, _CACHE_MB)
    held = one.features.numel()
    if mode == "closed-form":
        held *= _COPIES
    else:
        patches = mode == "book-keeping"
        held += _COPIES * _activations_once(model, one.features, patches=patches)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if mode in ("hooks", "functorch"):
        # Every record's gradient, and that of its patient.
        held += trained * (one.records + 1)
    return max(1, math.floor(limit_mb * 2**20 / (held * _FLOAT)))


def _activations_once(model: nn.Module, features: Tensor, *, patches: bool) -> int:
    """As `_activations`, remembered for as long as the model lives: a look costs a forward pass."""
    known = _SEEN.setdefault(model, {})
    key = (*features.shape, patches)
    if key not in known:
        training = model.training
        model.eval()  # a look at shapes draws no dropout
        try:
            known[key] = _activations(model, features, patches=patches)
        finally:
            model.train(training)
    return known[key]


def _activations(model: nn.Module, features: Tensor, *, patches: bool) -> int:
    """Numbers that come out of all layers without children, and what book-keeping stores."""
    count = 0

    def hook(layer: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal count
        first = output[0] if isinstance(output, tuple) else output
        count += first.numel()
        weight = getattr(layer, "weight", None)
        if not patches or not isinstance(weight, Tensor):
            return
        if isinstance(layer, nn.Conv1d | nn.Conv2d):  # unfolded inputs, and the kernel's gradient
            count += first[:, 0].numel() * weight[0].numel() * layer.groups
            count += weight.numel() * len(features)
        elif isinstance(layer, nn.Linear) and first.dim() > 2:  # noqa: PLR2004 (rows, columns)
            count += weight.numel()

    leaves = [m for m in model.modules() if not list(m.children())]
    handles = [layer.register_forward_hook(hook) for layer in leaves]
    try:
        with torch.no_grad():
            model(features)
    finally:
        for handle in handles:
            handle.remove()
    return count
