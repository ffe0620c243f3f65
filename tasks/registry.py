"""Tasks by name: those that come with Fedward, and "package.module:Attribute" for others."""

import difflib
import importlib
from typing import cast

from fedward.core.errors import ConfigError
from fedward.tasks.task import Task

_TASKS = {
    "heart-disease": (
        "fedward.tasks.heart_disease:HEART_DISEASE",
        "coronary heart disease on angiography, from what is known before it (UCI, 4 hospitals)",
    ),
}
_MEMBERS = (
    "name", "schema", "models", "statistics", "fit", "prepare", "model", "loss", "probabilities",
    "metrics", "summarise", "private_metrics", "summarise_private",
    "calibration", "export_onnx",
)  # fmt: skip


def descriptions() -> dict[str, str]:
    """The registered tasks: name and one line."""
    return {name: line for name, (_, line) in _TASKS.items()}


def get_task(name: str, *, file: str = "study") -> Task:
    """The task that a study names.

    Importing runs code, so at a site call it only with a name that the site's policy permits.

    Args:
        name: A registered name, or "package.module:Attribute" of an installed package.
        file: What an error calls the file that named it.

    Raises:
        ConfigError: There is no such task; the message lists those that there are.
    """
    if name in _TASKS:
        return _load(_TASKS[name][0], file=file)
    if ":" in name:
        return _load(name, file=file)
    near = difflib.get_close_matches(name, _TASKS, n=1)
    hint = f'did you mean "{near[0]}"? ' if near else ""
    raise ConfigError(
        f'= "{name}" is not a known task; {hint}known: {", ".join(sorted(_TASKS))}, '
        'or "package.module:Attribute"',
        file=file,
        key="[study] task",
    )


def _load(name: str, *, file: str) -> Task:
    module_name, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f'= "{name}" cannot be loaded: {error}; install its package at this site, '
            "or correct the name",
            file=file,
            key="[study] task",
        ) from error
    task = found() if isinstance(found, type) else found
    lacks = [member for member in _MEMBERS if not hasattr(task, member)]
    if lacks:
        raise ConfigError(
            f'= "{name}" is not a task: it lacks {", ".join(lacks)} (see fedward.tasks.task.Task)',
            file=file,
            key="[study] task",
        )
    return cast("Task", task)
