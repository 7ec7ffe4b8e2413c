"""fusedopt: write an optimizer as a list of small callbacks; it runs as one fused multi-tensor kernel.

`Optimizer` is the class that takes callbacks. `SGD`, `RMSProp`, `Adam`, `RAdam`, `QHAdam`, `Larc`, `Lamb`, `Lookahead`
and `ranger` mirror ``fastai.optimizer``. `fuse` takes any optimizer of torch's kind as it is, `unfuse` undoes that.

Modules:
    optim: mirrors ``torch.optim``.
    rules: published update rules, with their callbacks.
    callbacks: the parts that optimizers are made of. These are here too: `sgd_step`, `momentum_step`, `rms_prop_step`,
        `adam_step`, `radam_step`, `qhadam_step`, `lamb_step`, `larc_step`, `larc_layer_lr`, `weight_decay`, `l2_reg`,
        `average_grad`, `average_sqr_grad`, `step_stat`, `debias`, `lookahead_slow`, `lookahead`.
    storage: policies of how state and parameters are stored.
    learner: a training loop; to be imported by itself.

For callbacks of one's own: `total`, a sum over all parameters; `uniform` and `normal`, random numbers.

All other modules are internal.
"""

import sys as _sys
from pathlib import Path as _Path

# A source tree has kernels/ beside this folder, an install inside: so a tree runs without being installed.
__path__ = [
    *__path__,
    *([] if _Path(__file__).with_name("kernels").is_dir() else [str(_Path(__file__).parents[1])]),
]

from typing import TYPE_CHECKING as _TYPE_CHECKING

from . import callbacks, optim, rules, storage
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
from .trace.draws import normal, uniform
from .trace.totals import total

# Where earlier pickles have them.
_sys.modules.update({f"{__name__}.named": named, f"{__name__}.state": state})

__version__ = "0.1.0"

if not _TYPE_CHECKING:  # else every name would be there, and be anything

    def __getattr__(name: str) -> None:
        """What is elsewhere is said to be there: AdamW in `optim`, Lion in `rules`, the `learner` once imported."""
        places = (place for place in (optim, rules) if isinstance(vars(place).get(name), type))
        where = next((f"; it is {place.__name__}.{name}" for place in places), "")
        where = f"; import {__name__}.learner first" if name == "learner" else where
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}{where}", name=name, obj=_sys.modules[__name__]
        )


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
    "normal",
    "optim",
    "qhadam_step",
    "radam_step",
    "ranger",
    "rms_prop_step",
    "rules",
    "sgd_step",
    "step_stat",
    "storage",
    "total",
    "unfuse",
    "uniform",
    "weight_decay",
]
