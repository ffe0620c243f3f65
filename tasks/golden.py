"""What a trained model itself says of raw clinical values, along the way that training took."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedward.tasks.task import Fitted, Table, Task

if TYPE_CHECKING:
    from torch import nn


def raw_probabilities(
    task: Task, model: "nn.Module", inputs: NDArray[np.float32], fitted: Fitted | None
) -> NDArray[np.float32]:
    """A model's probabilities for raw inputs, prepared as in training.

    Args:
        task: The model's task.
        model: In evaluation mode.
        inputs: Shape `(n, number of features of the schema)`, in its order and coding; NaN is
            missing.
        fitted: What preparation was fitted to; None for the schema's public ranges.

    Returns:
        Shape `(n, outputs)`.

    Raises:
        ValueError: The inputs do not have a column for each feature.
    """
    import torch

    features = task.schema.features
    if inputs.ndim != 2 or inputs.shape[1] != len(features):  # noqa: PLR2004 (a matrix)
        raise ValueError(f"inputs of shape {inputs.shape} for {len(features)} features")
    columns = {field.name: inputs[:, i].astype(np.float64) for i, field in enumerate(features)}
    columns[task.schema.label.name] = np.zeros(len(inputs))
    table = Table(
        source="golden inputs",
        patient_ids=tuple(f"golden-{i}" for i in range(len(inputs))),
        columns=columns,
    )
    with torch.no_grad():
        outputs = model(torch.from_numpy(task.prepare(table, fitted).features))
        expected = task.probabilities(outputs).numpy().astype(np.float32)
    return expected.reshape(len(inputs), -1)
