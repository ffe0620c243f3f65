"""Local training: DP-SGD over patients, through Opacus or at almost no cost."""

from fedward.client.training.loop import LocalResult, sampled_clipped_sum, train
from fedward.client.training.modes import choose_mode
from fedward.client.training.plan import Adaptive, NotPrivate, Private, TrainingPlan
from fedward.client.training.session import TrainingState
from fedward.client.training.weights import weighted

__all__ = [
    "Adaptive",
    "LocalResult",
    "NotPrivate",
    "Private",
    "TrainingPlan",
    "TrainingState",
    "choose_mode",
    "sampled_clipped_sum",
    "train",
    "weighted",
]
