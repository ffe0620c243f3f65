"""Per-patient gradients of embeddings, which have one row for each different token."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedward.client.training.parts import (
    Call,
    Into,
    Memory,
    Part,
    Sums,
    by_patient,
    impure,
    squared_norms,
)
from fedward.privacy.mechanisms.compiled import compiled

Rows = NDArray[np.float32]
Tokens = NDArray[np.int64]


def embedding(
    layer: nn.Embedding, calls: Sequence[Call], records: int, memory: Memory | None
) -> Part:
    """As `part_of`."""
    inputs = [by_patient(a.reshape(len(a), -1), records) for a, *_ in calls]
    outputs = [by_patient(d.reshape(len(d), -1, layer.embedding_dim), records) for _, d, _ in calls]
    tokens = inputs[0] if len(calls) == 1 else torch.cat(inputs, 1)
    d = outputs[0] if len(calls) == 1 else torch.cat(outputs, 1)
    if impure(d, memory) and layer.weight.is_cpu and layer.weight.dtype == torch.float32:
        return _on_processor(layer, tokens, d)
    squared = _fixed_shapes(tokens, d, layer.padding_idx)

    def weighted(factors: Tensor, into: Into) -> Sums:
        total = torch.zeros_like(layer.weight, requires_grad=False)
        scaled = torch.mul(d, factors[:, None, None]).flatten(0, 1)
        total = total.index_add(0, tokens.flatten(), scaled)
        if layer.padding_idx is not None:
            total[layer.padding_idx] = 0
        return {"weight": total if into is None else into["weight"].copy_(total)}

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


def _on_processor(layer: nn.Embedding, tokens: Tensor, d: Tensor) -> Part:
    """The same by compiled loops, which read each gradient twice and write no other memory."""
    words, rows = np.ascontiguousarray(tokens.numpy(), np.int64), np.ascontiguousarray(d.numpy())
    padding = -1 if layer.padding_idx is None else layer.padding_idx
    squared = np.zeros(len(words), np.float32)
    uses = np.zeros(layer.num_embeddings, np.int32)
    repeated = np.empty((words.shape[1] // 2, layer.embedding_dim), np.float32)
    _add_squares(words, rows, padding, uses, repeated, squared)

    def weighted(factors: Tensor, into: Into) -> Sums:
        total = torch.empty_like(layer.weight) if into is None else into["weight"]
        _add_up(words, rows, factors.numpy(), padding, total.detach().numpy())
        return {"weight": total}

    return Part(torch.from_numpy(squared), weighted)


@compiled(
    "void(int64[:, ::1], float32[:, :, ::1], int64, int32[::1], float32[:, ::1], float32[::1])",
    any_order=True,
)
def _add_squares(  # noqa: C901, PLR0917 (compiled code calls nothing, and knows no keywords)
    tokens: Tokens,
    d: Rows,
    padding: int,
    uses: NDArray[np.int32],
    repeated: Rows,
    squared: Rows,
) -> None:
    """Add to squared norms those of patients' gradients, one row for each different token.

    Args:
        tokens: Shape `(patients, positions)`.
        d: Shape `(patients, positions, columns)`.
        padding: A token that is not trained, or -1.
        uses: Zeros, one for each token; zeros again afterwards.
        repeated: Memory for rows of tokens that a patient has repeatedly, half the positions.
        squared: Shape `(patients,)`.
    """
    patients, positions = tokens.shape
    columns = d.shape[2]
    for patient in range(patients):
        for position in range(positions):
            uses[tokens[patient, position]] += 1
        places = 0
        for position in range(positions):
            token = tokens[patient, position]
            if token == padding:
                continue
            if uses[token] == 1:
                alone = np.float32(0)
                for column in range(columns):
                    alone += d[patient, position, column] * d[patient, position, column]
                squared[patient] += alone
                continue
            if uses[token] > 0:  # the first time: from here on it names a place
                places += 1
                uses[token] = -places
                repeated[places - 1] = 0
            place = -uses[token] - 1
            for column in range(columns):
                repeated[place, column] += d[patient, position, column]
        for place in range(places):
            together = np.float32(0)
            for column in range(columns):
                together += repeated[place, column] * repeated[place, column]
            squared[patient] += together
        for position in range(positions):
            uses[tokens[patient, position]] = 0


@compiled(
    "void(int64[:, ::1], float32[:, :, ::1], float32[::1], int64, float32[:, ::1])",
    any_order=True,
)
def _add_up(tokens: Tokens, d: Rows, factors: Rows, padding: int, total: Rows) -> None:
    """Overwrite `total`, a row for each token, with the sum of gradients times `factors`."""
    total[:] = 0
    for patient in range(tokens.shape[0]):
        factor = factors[patient]
        for position in range(tokens.shape[1]):
            token = tokens[patient, position]
            if token != padding:
                for column in range(d.shape[2]):
                    total[token, column] += factor * d[patient, position, column]
