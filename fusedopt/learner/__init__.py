"""A small training loop with the course's callback system, under fastai's names and without fastai."""

from .callback import Callback
from .callbacks.activation_stats import ActivationStats
from .events import (
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
    event,
)
from .hooks import Hook, Hooks, hook_output, hook_outputs
from .interpret import Interpretation
from .layers import GeneralRelu, RunningBatchNorm
from .learner import Learner

__all__ = [
    "ActivationStats",
    "Callback",
    "CancelBackwardException",
    "CancelBatchException",
    "CancelEpochException",
    "CancelFitException",
    "CancelStepException",
    "CancelTrainException",
    "CancelValidException",
    "GeneralRelu",
    "Hook",
    "Hooks",
    "Interpretation",
    "Learner",
    "RunningBatchNorm",
    "event",
    "hook_output",
    "hook_outputs",
]
