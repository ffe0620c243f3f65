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
    squared = (_fixed_shapes if memory is None else _repeats_apart)(tokens, d, layer.padding_idx)

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
    """The same, where rows are added up for those tokens alone that a patient has repeatedly."""
    lengths: Tensor = torch.linalg.vector_norm(d, dim=2).square_()
    if padding is not None:
        lengths.masked_fill_(tokens == padding, 0)
    order = _order(tokens)
    ordered = tokens.gather(1, order)
    equal = ordered[:, 1:] == ordered[:, :-1]
    if padding is not None:
        equal &= ordered[:, 1:] != padding
    repeated = torch.zeros_like(tokens, dtype=torch.bool)
    repeated[:, 1:] = equal
    repeated[:, :-1] |= equal
    patient, rank = repeated.nonzero(as_tuple=True)
    if not len(patient):
        return lengths.sum(1)
    place = order[patient, rank]
    lengths[patient, place] = 0
    # A run of equal tokens starts where the one before differs.
    starts = torch.ones_like(rank, dtype=torch.bool)
    starts[rank > 0] = ~equal[patient[rank > 0], rank[rank > 0] - 1]
    run = starts.cumsum(0) - 1
    first = patient[starts]
    sums = d.new_zeros((len(first), d.shape[2])).index_add_(0, run, d[patient, place])
    squared: Tensor = lengths.sum(1).index_add_(0, first, squared_norms(sums))
    return squared


def _order(tokens: Tensor) -> Tensor:
    if tokens.device.type == "cpu":  # NumPy sorts short rows three times as fast
        return torch.from_numpy(np.argsort(tokens.numpy(), axis=1))
    return tokens.argsort(dim=1)
