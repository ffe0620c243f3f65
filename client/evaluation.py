"""A model on a site's examples."""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedward.core.study import Study
from fedward.tasks.reference import first_rows
from fedward.tasks.subgroups import Grouping, with_groups
from fedward.tasks.task import Examples, Sums, Table, Task
from fedward.transport.monitor import monitor_records


def evaluate_model(task: Task, model: nn.Module, examples: Examples) -> Sums:
    """A model's metrics on examples, as the task's sums."""
    model.eval()
    with torch.no_grad():
        outputs = model(torch.from_numpy(np.asarray(examples.features)))
    return task.metrics(outputs, torch.from_numpy(np.asarray(examples.labels)))


def counted_rows(patients: Sequence[Hashable], study: Study) -> NDArray[np.intp]:
    """Which held-out rows are counted: no more of a patient's than noise is added for.

    Args:
        patients: Of each row, which patient it is of.
        study: Without privacy, and where each record counts by itself, every row is.
    """
    if study.privacy.mode == "none" or study.privacy.unit == "record":
        return np.arange(len(patients))
    return np.array(first_rows(patients, most=monitor_records(study)), dtype=np.intp)


def evaluate_groups(
    task: Task,
    model: nn.Module,
    table: Table,
    groups: Sequence[Grouping],
    *,
    private: bool,
) -> Sums:
    """A model's metrics on everybody and on each subgroup; see `subgroups.with_groups`.

    With `private`, the part that noise is for: a row is in everybody's and in at most one group
    of each field, see `transport.monitor.metrics_sensitivity`.
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
