"""A model on a site's examples."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from fedward.tasks.subgroups import Grouping, with_groups
from fedward.tasks.task import Examples, Sums, Table, Task


def evaluate_model(task: Task, model: nn.Module, examples: Examples) -> Sums:
    """A model's metrics on examples, as the task's sums."""
    model.eval()
    with torch.no_grad():
        outputs = model(torch.from_numpy(np.asarray(examples.features)))
    return task.metrics(outputs, torch.from_numpy(np.asarray(examples.labels)))


def evaluate_groups(
    task: Task,
    model: nn.Module,
    table: Table,
    groups: Sequence[Grouping],
    *,
    private: bool,
) -> Sums:
    """A model's metrics on everybody and on each subgroup; see `subgroups.with_groups`.

    With `private`, the part that noise is for: a patient is in everybody's and in at most one
    group of each field, so that it moves all of them by the square root of one more than fields.
    """
    examples = task.prepare(table, None)

    def sums_of(rows: Examples) -> Sums:
        exact = evaluate_model(task, model, rows)
        return task.private_metrics(exact) if private else exact

    return with_groups(
        sums_of(examples),
        {
            (group.field, number): sums_of(examples.take(np.flatnonzero(members)))
            for group in groups
            for number, members in enumerate(group.members(table.columns[group.field]))
        },
    )
