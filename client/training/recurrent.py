"""Recurrent layers written out step by step, on the same parameters.

A fused `nn.GRU` hides the inputs and gates of its steps, so no per-record gradient can be had
of it. Written out it is linear layers that are used many times, which every mode knows.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]


class Unrolled(nn.Module):
    """Does what `source` does, with its very parameters.

    Args:
        source: An `nn.GRU`, `nn.LSTM` or `nn.RNN`, `batch_first`, without projection.

    Raises:
        ValueError: It is configured in a way that is not known here.
    """

    def __init__(self, source: nn.RNNBase) -> None:
        super().__init__()
        if not source.batch_first or source.proj_size:
            raise ValueError(
                f"training with privacy needs {type(source).__name__}(batch_first=True) "
                "without proj_size"
            )
        self._hidden, self._dropout = source.hidden_size, source.dropout
        self._stateful_pair = source.mode == "LSTM"
        self._cell = _CELLS[source.mode]
        self._directions = 2 if source.bidirectional else 1
        self.inputs = nn.ModuleList()
        self.states = nn.ModuleList()
        for layer in range(source.num_layers):
            for direction in range(self._directions):
                suffix = f"_l{layer}{'_reverse' if direction else ''}"
                self.inputs.append(_linear(source, "ih", suffix))
                self.states.append(_linear(source, "hh", suffix))

    def forward(
        self, sequence: Tensor, state: Tensor | State | None = None
    ) -> tuple[Tensor, Tensor | State]:
        """As `source`: of `(rows, steps, size)`, outputs of every step and last states."""
        if sequence.dim() != 3:  # noqa: PLR2004 (rows, steps, size)
            raise ValueError("a recurrent layer takes a tensor of (rows, steps, size) here")
        given = (state,) if isinstance(state, Tensor) else state
        last: list[State] = []
        for layer in range(len(self.inputs) // self._directions):
            if layer and self._dropout:
                sequence = nn.functional.dropout(sequence, self._dropout, self.training)
            outputs = []
            for direction in range(self._directions):
                index = layer * self._directions + direction
                start = (
                    tuple(part[index] for part in given)
                    if given is not None
                    else (sequence.new_zeros(len(sequence), self._hidden),)
                    * (2 if self._stateful_pair else 1)
                )
                output, end = self._run(index, sequence, start, backwards=bool(direction))
                outputs.append(output)
                last.append(end)
            sequence = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
        final = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        return sequence, final if self._stateful_pair else final[0]

    def _run(
        self, index: int, sequence: Tensor, state: State, *, backwards: bool
    ) -> tuple[Tensor, State]:
        gates = self.inputs[index](sequence).unbind(1)
        inner = self.states[index]
        outputs = []
        for gate in reversed(gates) if backwards else gates:
            state = self._cell(gate, inner(state[0]), state)
            outputs.append(state[0])
        if backwards:
            outputs.reverse()
        return torch.stack(outputs, 1), state


def unroll(model: nn.Module) -> Callable[[], None]:
    """Put `Unrolled` in the place of every recurrent layer of `model`.

    Returns:
        What puts the layers back. Parameters are the same objects throughout.

    Raises:
        ValueError: A layer is configured in a way that is not known.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.GRU | nn.LSTM | nn.RNN)
    ]
    replaced = [(parent, name, child, Unrolled(child)) for parent, name, child in found]
    for parent, name, child, unrolled in replaced:
        unrolled.train(child.training)
        setattr(parent, name, unrolled)

    def restore() -> None:
        for parent, name, child, _ in replaced:
            setattr(parent, name, child)

    return restore


def _linear(source: nn.RNNBase, kind: str, suffix: str) -> nn.Linear:
    weight: nn.Parameter = getattr(source, f"weight_{kind}{suffix}")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=source.bias, device="meta")
    layer.weight = weight
    if source.bias:
        layer.bias = getattr(source, f"bias_{kind}{suffix}")
    return layer


def _gru(given: Tensor, inner: Tensor, state: State) -> State:
    # Cho et al. 2014, in the variant of cuDNN: the reset gate acts on the inner product.
    reset_in, update_in, new_in = given.chunk(3, 1)
    reset_h, update_h, new_h = inner.chunk(3, 1)
    update = torch.sigmoid(update_in + update_h)
    new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_h) * new_h)
    return (torch.lerp(new, state[0], update),)


def _lstm(given: Tensor, inner: Tensor, state: State) -> State:
    enter, forget, new, leave = (given + inner).chunk(4, 1)
    memory = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(memory), memory


_CELLS: dict[str, Cell] = {
    "GRU": _gru,
    "LSTM": _lstm,
    "RNN_TANH": lambda given, inner, _: (torch.tanh(given + inner),),
    "RNN_RELU": lambda given, inner, _: (torch.relu(given + inner),),
}
