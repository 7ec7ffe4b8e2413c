"""A small training loop with the course's callback system, under fastai's names and without fastai."""

from .callback import Callback
from .callbacks.activation_stats import ActivationStats
from .callbacks.batch_transform import BatchTransform
from .callbacks.csv_logger import CSVLogger
from .callbacks.device import DeviceCallback
from .callbacks.early_stopping import EarlyStopping
from .callbacks.ema import EMA
from .callbacks.gradient_accumulation import GradientAccumulation
from .callbacks.gradient_clip import GradientClip
from .callbacks.lr_finder import LRFinder, SuggestionMethod, minimum, slide, steep, valley
from .callbacks.mixed_precision import AMPMode, MixedPrecision
from .callbacks.mixup import Mixup
from .callbacks.model_resetter import ModelResetter
from .callbacks.progress import Progress
from .callbacks.recorder import Recorder
from .callbacks.reduce_lr_on_plateau import ReduceLROnPlateau
from .callbacks.rnn import RNNCallback, RNNRegularizer, rnn_cbs
from .callbacks.save_model import SaveModel
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
from .callbacks.terminate_on_nan import TerminateOnNaN
from .callbacks.tracker import Tracker
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
from .loaders import DataLoaders
from .metrics import AvgLoss, AvgMetric, AvgSmoothLoss, Metric, ValueMetric, accuracy, error_rate
from .saving import load_learner

__all__ = [
    "EMA",
    "AMPMode",
    "ActivationStats",
    "AvgLoss",
    "AvgMetric",
    "AvgSmoothLoss",
    "BatchTransform",
    "CSVLogger",
    "Callback",
    "CancelBackwardException",
    "CancelBatchException",
    "CancelEpochException",
    "CancelFitException",
    "CancelStepException",
    "CancelTrainException",
    "CancelValidException",
    "DataLoaders",
    "DeviceCallback",
    "EarlyStopping",
    "GeneralRelu",
    "GradientAccumulation",
    "GradientClip",
    "Hook",
    "Hooks",
    "Interpretation",
    "LRFinder",
    "Learner",
    "Metric",
    "MixedPrecision",
    "Mixup",
    "ModelResetter",
    "ParamScheduler",
    "Progress",
    "RNNCallback",
    "RNNRegularizer",
    "Recorder",
    "ReduceLROnPlateau",
    "RunningBatchNorm",
    "SaveModel",
    "SchedCos",
    "SchedExp",
    "SchedLin",
    "SchedNo",
    "SchedPoly",
    "SuggestionMethod",
    "TerminateOnNaN",
    "Tracker",
    "TrainEval",
    "ValueMetric",
    "accuracy",
    "combine_scheds",
    "combined_cos",
    "error_rate",
    "event",
    "hook_output",
    "hook_outputs",
    "load_learner",
    "minimum",
    "rnn_cbs",
    "sched_cos",
    "sched_exp",
    "sched_lin",
    "sched_no",
    "sched_poly",
    "slide",
    "steep",
    "valley",
]
