"""fusedopt: write an optimizer as a list of small callbacks; it runs as one fused multi-tensor kernel.

The names here mirror ``fastai.optimizer``; ``fusedopt.optim`` mirrors ``torch.optim``.
"""

import sys as _sys
from pathlib import Path as _Path

# A source tree has kernels/ beside this folder, an install inside: so a tree runs without being installed.
__path__ = [
    *__path__,
    *([] if _Path(__file__).with_name("kernels").is_dir() else [str(_Path(__file__).parents[1])]),
]

from . import callbacks, optim, rules
from .callbacks import (
    adam_step,
    average_grad,
    average_sqr_grad,
    debias,
    l2_reg,
    lamb_step,
    larc_layer_lr,
    larc_step,
    lookahead,
    lookahead_slow,
    momentum_step,
    qhadam_step,
    radam_step,
    rms_prop_step,
    sgd_step,
    step_stat,
    weight_decay,
)
from .classes import fuse, unfuse
from .optimizer import Optimizer, named, state
from .optimizer.named import SGD, Adam, Lamb, Larc, Lookahead, QHAdam, RAdam, RMSProp, ranger
from .trace.totals import total

# Where earlier pickles have them.
_sys.modules.update({f"{__name__}.named": named, f"{__name__}.state": state})

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "Lamb",
    "Larc",
    "Lookahead",
    "Optimizer",
    "QHAdam",
    "RAdam",
    "RMSProp",
    "adam_step",
    "average_grad",
    "average_sqr_grad",
    "callbacks",
    "debias",
    "fuse",
    "l2_reg",
    "lamb_step",
    "larc_layer_lr",
    "larc_step",
    "lookahead",
    "lookahead_slow",
    "momentum_step",
    "optim",
    "qhadam_step",
    "radam_step",
    "ranger",
    "rms_prop_step",
    "rules",
    "sgd_step",
    "step_stat",
    "total",
    "unfuse",
    "weight_decay",
]
