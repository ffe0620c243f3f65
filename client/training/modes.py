"""Which way of clipping a model gets, by a rule that `benchmarks/dp_training.py` backs."""

from collections.abc import Sequence

from torch import nn

from fedward.client.training.bookkeeping import leaves_of
from fedward.client.training.clippers import BookKeeping, Clipper
from fedward.client.training.closed_form import ClosedForm, linear_of
from fedward.client.training.parts import Loss
from fedward.client.training.plan import Mode
from fedward.client.training.stack import stacked

# Above this, per-record gradients of a batch cost more than a second backward pass.
_GHOST_BYTES = 16 * 2**20


def choose_mode(model: nn.Module, *, batch_size: float, records: int = 1) -> Mode:
    """The cheapest mode that fits.

    Args:
        model: As it will be trained (frozen parameters do not count).
        batch_size: Expected number of patients in a step.
        records: Rows of one patient.
    """
    linear = linear_of(model)
    if linear is not None and linear.weight.requires_grad:
        return "closed-form"
    if leaves_of(model) is not None:
        return "book-keeping"
    trained = [
        module
        for module in model.modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    from opacus.grad_sample import GradSampleModule  # Opacus takes seconds to import

    known = all(type(module) in GradSampleModule.GRAD_SAMPLERS for module in trained)
    if not known:
        return "functorch"
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tied = len({id(p) for m in trained for p in m.parameters(recurse=False)}) < sum(
        1 for m in trained for _ in m.parameters(recurse=False)
    )
    large = batch_size * size * 4 > _GHOST_BYTES
    embeds = any(isinstance(module, nn.Embedding) for module in trained)
    if records == 1 and not tied and (large or embeds):
        return "ghost"
    return "hooks"


def make_clipper(
    model: nn.Module, loss: Loss, trained: Sequence[nn.Parameter], *, mode: Mode
) -> Clipper:
    """The clipper of a mode that is not `auto`.

    Raises:
        ValueError: The mode does not fit the model, or the model mixes records.
    """
    if mode == "closed-form":
        return ClosedForm(model, loss, trained)  # one linear layer mixes no records
    validate(model)
    match mode:
        case "book-keeping":
            return BookKeeping(model, loss, trained)
        case "ghost":
            from fedward.client.training.opacus_modes import Ghost

            return Ghost(model, loss, trained)
        case "hooks" | "functorch":
            from fedward.client.training.opacus_modes import PerSample

            return PerSample(model, loss, trained, kind=mode)
        case _:
            raise ValueError("choose a mode first; see choose_mode")


def validate(model: nn.Module) -> None:
    """Refuse a model in which one record's gradient depends on another record.

    Raises:
        ValueError: What Opacus' validator finds, such as batch normalisation.
    """
    leaves = leaves_of(model)
    if leaves is not None and stacked(model, leaves):
        return  # linear layers, and what looks at one number at a time
    from opacus.validators import ModuleValidator  # which takes seconds to import

    errors = ModuleValidator.validate(model, strict=False)
    if errors:
        raise ValueError(
            f"this model cannot be trained with privacy: {'; '.join(str(e) for e in errors)}"
        )
