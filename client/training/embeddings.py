"""Per-patient gradients of embeddings, which have one row for each different token."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedward.client.training.parts import (
    Call,
    Into,
    Memory,
    Part,
    Sums,
    by_patient,
    room,
    squared_norms,
)


def embedding(
    layer: nn.Embedding, calls: Sequence[Call], records: int, memory: Memory | None
) -> Part:
    """As `part_of`."""
    inputs = [by_patient(a.reshape(len(a), -1), records) for a, _ in calls]
    outputs = [by_patient(d.reshape(len(d), -1, layer.embedding_dim), records) for _, d in calls]
    tokens = inputs[0] if len(calls) == 1 else torch.cat(inputs, 1)
    d = outputs[0] if len(calls) == 1 else torch.cat(outputs, 1)
    pure = memory is None or not d.is_cpu or d.dtype != torch.float32
    squared = (_fixed_shapes if pure else _repeats_apart)(tokens, d, layer.padding_idx)

    def weighted(factors: Tensor, into: Into) -> Sums:
        total = (
            torch.zeros_like(layer.weight, requires_grad=False)
            if into is None
            else into["weight"].zero_()
        )
        out = room(memory, (layer, "scaled"), d.shape, d)
        scaled = torch.mul(d, factors[:, None, None], out=out).flatten(0, 1)
        if into is None:
            total = total.index_add(0, tokens.flatten(), scaled)
        else:
            total.index_add_(0, tokens.flatten(), scaled)
        if layer.padding_idx is not None:
            total[layer.padding_idx] = 0
        return {"weight": total}

    return Part(squared, weighted)


def _fixed_shapes(tokens: Tensor, d: Tensor, padding: int | None) -> Tensor:
    """Squared norms of gradients that have one row for each different token of a patient.

    Rows of equal tokens are added up, all at once: no shape depends on the tokens.
    """
    if padding is not None:
        d = d * (tokens != padding)[..., None]
    ordered, order = tokens.sort(dim=1)
    fresh = torch.cat(
        [torch.zeros_like(ordered[:, :1]), (ordered[:, 1:] != ordered[:, :-1]).long()], 1
    )
    group = torch.zeros_like(order).scatter(1, order, fresh.cumsum(1))
    rows = torch.zeros_like(d).scatter_add(1, group[..., None].expand_as(d), d)
    return squared_norms(rows)


def _repeats_apart(tokens: Tensor, d: Tensor, padding: int | None) -> Tensor:
    """The same on a CPU: rows are added up for those tokens alone that a patient has repeatedly."""
    lengths = torch.linalg.vector_norm(d, dim=2).square_().numpy()
    patients, positions = lengths.shape
    if padding is not None:
        lengths[tokens.numpy() == padding] = 0
    # Token and position in one number: sorting that alone gives both.
    key = tokens.numpy().astype(np.int64) * positions
    key += np.arange(positions)
    key.sort(axis=1)
    ordered = key // positions
    equal = np.zeros((patients, positions), dtype=np.bool_)  # to the one before
    np.equal(ordered[:, 1:], ordered[:, :-1], out=equal[:, 1:])
    if padding is not None:
        equal &= ordered != padding
    if equal.any():
        member = equal.copy()
        member[:, :-1] |= equal[:, 1:]
        at = np.flatnonzero(member)
        first = np.flatnonzero(~equal.reshape(-1)[at])  # runs of equal tokens stand together
        patient = at // positions
        row = patient * positions + key.reshape(-1)[at] % positions
        sums = np.add.reduceat(d.numpy().reshape(-1, d.shape[2])[row], first, axis=0)
        lengths.reshape(-1)[row] = 0
        with np.errstate(all="ignore"):  # what is not finite shows in the norm
            np.add.at(lengths[:, 0], patient[first], np.vecdot(sums, sums))
    return torch.from_numpy(lengths.sum(1))
