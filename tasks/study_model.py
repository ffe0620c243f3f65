"""The model of a study: the task's, with what the study freezes and adds."""

from typing import TYPE_CHECKING

from fedward.core.errors import ConfigError
from fedward.core.study import Study
from fedward.tasks.task import Task

if TYPE_CHECKING:
    from torch import nn


def study_model(study: Study, task: Task) -> "nn.Module":
    """The model that a study trains, with initial parameters that every site agrees on.

    What is frozen, by the task or by the study, stays as the task gives it: it neither travels nor
    is clipped, noised or changed. See `tasks.parameters.to_vector`.

    Raises:
        ConfigError: The task has no such model, or the study freezes or adapts what there is not.
    """
    model = task.model(study.model.name, **study.model.args)
    training = study.training
    modules = dict(model.named_modules())
    for name in training.freeze:
        if name not in modules or not list(modules[name].parameters()):
            named = [n for n, m in modules.items() if n and list(m.parameters())]
            raise _wrong("freeze", f'has "{name}", and the model\'s layers are: {", ".join(named)}')
        modules[name].requires_grad_(False)
    if training.adapters is not None:
        _adapt(model, study)
    if not any(p.requires_grad for p in model.parameters()):
        raise _wrong("freeze", "leaves nothing of the model to train; remove a name")
    return model


def published_model(model: "nn.Module") -> None:
    """Make a trained model, in place, the task's own again: corrections go into their layers."""
    from fedward.tasks.adapters import merge_adapters

    merge_adapters(model)


def _adapt(model: "nn.Module", study: Study) -> None:
    from torch import nn

    from fedward.tasks.adapters import add_adapters

    adapters = study.training.adapters
    if adapters is None:
        return
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name}
    for name in adapters.layers:
        if name not in linear:
            raise _wrong(
                "adapters", f'layers has "{name}", and the linear layers are: {", ".join(linear)}'
            )
        layer = linear[name]
        size, ends = layer.weight.numel(), layer.in_features + layer.out_features
        if adapters.rank * ends >= size:
            raise _wrong(
                "adapters",
                f'rank = {adapters.rank} gives layer "{name}" {adapters.rank * ends} parameters to '
                f"train, and it has {size} itself; lower the rank, or leave the layer out",
            )
    add_adapters(
        model, adapters.layers, rank=adapters.rank, scale=adapters.scale, freeze_rest=False
    )


def _wrong(key: str, problem: str) -> ConfigError:
    return ConfigError(problem, file="study", key=f"[training] {key}")
