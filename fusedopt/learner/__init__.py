"""A small training loop with the course's callback system, under fastai's names and without fastai."""

from .callback import Callback
from .callbacks.activation_stats import ActivationStats
from .callbacks.csv_logger import CSVLogger
from .callbacks.lr_finder import LRFinder, SuggestionMethod, minimum, slide, steep, valley
from .callbacks.progress import Progress
from .callbacks.recorder import Recorder
from .callbacks.schedule import (
    ParamScheduler,
    SchedCos,
    SchedExp,
    SchedLin,
    SchedNo,
    SchedPoly,
    combine_scheds,
    combined_cos,
    sched_cos,
    sched_exp,
    sched_lin,
    sched_no,
    sched_poly,
)
from .callbacks.train_eval import TrainEval
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
from .metrics import AvgLoss, AvgMetric, AvgSmoothLoss, Metric, ValueMetric, accuracy

__all__ = [
    "ActivationStats",
    "AvgLoss",
    "AvgMetric",
    "AvgSmoothLoss",
    "CSVLogger",
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
    "LRFinder",
    "Learner",
    "Metric",
    "ParamScheduler",
    "Progress",
    "Recorder",
    "RunningBatchNorm",
    "SchedCos",
    "SchedExp",
    "SchedLin",
    "SchedNo",
    "SchedPoly",
    "SuggestionMethod",
    "TrainEval",
    "ValueMetric",
    "accuracy",
    "combine_scheds",
    "combined_cos",
    "event",
    "hook_output",
    "hook_outputs",
    "minimum",
    "sched_cos",
    "sched_exp",
    "sched_lin",
    "sched_no",
    "sched_poly",
    "slide",
    "steep",
    "valley",
]
