"""What a study has a site minimise."""

from fedward.client.training import weighted
from fedward.client.training.parts import Loss
from fedward.core.study import Study
from fedward.tasks.task import Task
from fedward.tasks.weights import LARGEST, class_weights


def study_loss(study: Study, task: Task) -> Loss:
    """The task's loss, its examples weighted by class where the study says so.

    Raises:
        ConfigError: The study's weights do not fit the task's label.
    """
    weights = class_weights(study, task.schema)
    return task.loss if weights is None else weighted(task.loss, weights, largest=LARGEST)
