"""A model on a site's examples."""

import numpy as np
import torch
from torch import nn

from fedward.tasks.task import Examples, Sums, Task


def evaluate_model(task: Task, model: nn.Module, examples: Examples) -> Sums:
    """A model's metrics on examples, as the task's sums."""
    model.eval()
    with torch.no_grad():
        outputs = model(torch.from_numpy(np.asarray(examples.features)))
    return task.metrics(outputs, torch.from_numpy(np.asarray(examples.labels)))
