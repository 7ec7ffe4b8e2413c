"""fastai's optimizers by name: the signatures, defaults and meaning of ``fastai.optimizer``.

Each is a short list of callbacks handed to `Optimizer`. What differs from fastai is said in the docstring of the
function (here) or of the callback (`fusedopt.callbacks`) that differs. In ``opt.state`` and in checkpoints, averages
have torch's names (``exp_avg``, ``exp_avg_sq``, ``square_avg``, ``momentum_buffer``); callbacks get fastai's.
``options`` are `Optimizer`'s own: see `fusedopt.optimizer.AllOptions`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..callback import GROUPS_OWN
from ..callbacks import (
    adam_step,
    average_grad,
    average_sqr_grad,
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
from .accepted import list_of
from .core import AllOptions, Optimizer
from .described import described
from .names import MOMENTS, MOMENTUM

if TYPE_CHECKING:
    from typing_extensions import Unpack

_dampened = partial(average_grad, dampening=True)
_SQUARES = {"sqr_avg": "square_avg"}
_RMS_HYPERS = {"mom": "momentum", "sqr_mom": "alpha"}

__all__ = ["SGD", "Adam", "Lamb", "Larc", "Lookahead", "QHAdam", "RAdam", "RMSProp", "ranger"]


def _decay(decouple_wd: bool) -> Callable[..., Any]:
    return weight_decay if decouple_wd else l2_reg


def _moments(decouple_wd: bool, step: Callable[..., Any]) -> list[Callable[..., Any]]:
    """What every Adam-like optimizer is made of: decay, two dampened moments, a step count, and `step`."""
    return [_decay(decouple_wd), _dampened, average_sqr_grad, step_stat, step]


@described(weight_decay, average_grad, momentum_step)
def SGD(
    params: Any,
    lr: Any,
    mom: float = 0.0,
    wd: float = 0.0,
    decouple_wd: bool = True,
    **options: Unpack[AllOptions],
) -> Optimizer:
    """SGD, with undampened momentum if `mom` is not 0 here.

    Args: `mom` decides at construction whether there is momentum at all, as in fastai: with 0, it is plain descent (m
    is g), and a schedule of ``mom`` (`fit_one_cycle`) changes nothing. `wd` is true weight decay, or L2 with
    ``decouple_wd=False``.
    """
    momentum = [average_grad, momentum_step] if mom != 0 else [sgd_step]
    cbs = [_decay(decouple_wd), *momentum]
    # torch.optim.SGD cannot load a checkpoint without dampening.
    return Optimizer(
        params, cbs, title="SGD", state_names=MOMENTUM, lr=lr, mom=mom, wd=wd, dampening=0, **options
    )


@described(weight_decay, average_grad, average_sqr_grad, rms_prop_step)
def RMSProp(
    params: Any,
    lr: Any,
    mom: float = 0.0,
    sqr_mom: float = 0.99,
    eps: float = 1e-8,
    wd: float = 0.0,
    decouple_wd: bool = True,
    **options: Unpack[AllOptions],
) -> Optimizer:
    """RMSProp, with momentum over the raw gradients if `mom` is not 0 here.

    Args: `mom`: with 0, m is g. `eps`: in gradient units.
    Deviations: `eps` counts (fastai takes it and drops it, so its value is always 1e-8 there). Steps are counted, which
    torch's checkpoints need. The average of raw gradients keeps its name ``grad_avg``: torch.optim.RMSprop's
    ``momentum_buffer`` is an average of steps, and neither can be made from the other.
    """
    momentum = [average_grad] if mom != 0 else []
    cbs = [_decay(decouple_wd), *momentum, average_sqr_grad, step_stat, rms_prop_step]
    names: dict[str, Any] = dict(state_names=_SQUARES, hyper_names=_RMS_HYPERS)
    return Optimizer(
        params, cbs, title="RMSProp", **names, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd, **options
    )


@described(weight_decay, _dampened, average_sqr_grad, adam_step)
def Adam(
    params: Any,
    lr: Any,
    mom: float = 0.9,
    sqr_mom: float = 0.99,
    eps: float = 1e-5,
    wd: float = 0.01,
    decouple_wd: bool = True,
    **options: Unpack[AllOptions],
) -> Optimizer:
    """Adam with true weight decay (AdamW), or with L2 regularization for ``decouple_wd=False``."""
    cbs = _moments(decouple_wd, adam_step)
    return Optimizer(
        params,
        cbs,
        title="Adam",
        state_names=MOMENTS,
        lr=lr,
        mom=mom,
        sqr_mom=sqr_mom,
        eps=eps,
        wd=wd,
        **options,
    )


@described(weight_decay, _dampened, average_sqr_grad, radam_step)
def RAdam(
    params: Any,
    lr: Any,
    mom: float = 0.9,
    sqr_mom: float = 0.99,
    eps: float = 1e-5,
    wd: float = 0.0,
    beta: float = 0.0,
    decouple_wd: bool = True,
    **options: Unpack[AllOptions],
) -> Optimizer:
    """Rectified Adam.

    Args: `beta`: other than 0, it softens the denominator (SAdam), the more the smaller it is.
    """
    cbs = _moments(decouple_wd, radam_step)
    return Optimizer(
        params,
        cbs,
        title="RAdam",
        state_names=MOMENTS,
        lr=lr,
        mom=mom,
        sqr_mom=sqr_mom,
        eps=eps,
        wd=wd,
        beta=beta,
        **options,
    )


@described(weight_decay, _dampened, average_sqr_grad, qhadam_step)
def QHAdam(
    params: Any,
    lr: Any,
    mom: float = 0.999,
    sqr_mom: float = 0.999,
    nu_1: float = 0.7,
    nu_2: float = 1.0,
    eps: float = 1e-8,
    wd: float = 0.0,
    decouple_wd: bool = True,
    **options: Unpack[AllOptions],
) -> Optimizer:
    """Quasi-hyperbolic Adam.

    Args: `nu_1` and `nu_2` weigh the averages against this step's own gradient, and its square; 1: Adam.
    """
    cbs = _moments(decouple_wd, qhadam_step)
    return Optimizer(
        params,
        cbs,
        title="QHAdam",
        state_names=MOMENTS,
        lr=lr,
        nu_1=nu_1,
        nu_2=nu_2,
        mom=mom,
        sqr_mom=sqr_mom,
        eps=eps,
        wd=wd,
        **options,
    )


@described(weight_decay, average_grad, larc_layer_lr, larc_step)
def Larc(
    params: Any,
    lr: Any,
    mom: float = 0.9,
    clip: bool = True,
    trust_coeff: float = 0.02,
    eps: float = 1e-8,
    wd: float = 0.0,
    decouple_wd: bool = True,
    **options: Unpack[AllOptions],
) -> Optimizer:
    """LARC, or LARS for ``clip=False``: one learning rate per tensor; momentum if `mom` is not 0 here.

    Args: `clip`: let no tensor's learning rate exceed `lr`; `trust_coeff`: the part of a tensor's norm that a step may
    have. `mom` and `lr` as of `SGD`.
    """
    momentum = [average_grad] if mom != 0 else []
    cbs = [_decay(decouple_wd), *momentum, partial(larc_layer_lr, clip=clip), larc_step]
    return Optimizer(
        params,
        cbs,
        title="Larc",
        state_names=MOMENTUM,
        lr=lr,
        mom=mom,
        trust_coeff=trust_coeff,
        eps=eps,
        wd=wd,
        **options,
    )


@described(weight_decay, _dampened, average_sqr_grad, lamb_step)
def Lamb(
    params: Any,
    lr: Any,
    mom: float = 0.9,
    sqr_mom: float = 0.99,
    eps: float = 1e-5,
    wd: float = 0.0,
    decouple_wd: bool = True,
    **options: Unpack[AllOptions],
) -> Optimizer:
    """LAMB: Adam's step scaled, tensor by tensor, to the size of the parameter."""
    cbs = _moments(decouple_wd, lamb_step)
    return Optimizer(
        params,
        cbs,
        title="Lamb",
        state_names=MOMENTS,
        lr=lr,
        mom=mom,
        sqr_mom=sqr_mom,
        eps=eps,
        wd=wd,
        **options,
    )


@described(lookahead_slow, lookahead)
def Lookahead(opt: Optimizer, k: int = 6, alpha: float = 0.5) -> Optimizer:
    """Add lookahead to `opt` and return it: every `k`-th step the weights go back to the slow ones.

    Args: `opt`, any optimizer of fusedopt that has not stepped yet or is to start looking ahead from here;
    `k` steps between two synchronisations (per parameter); `alpha` how far the slow weights move towards the
    fast ones.
    Raises: TypeError for an optimizer of another library, ValueError for a `k` below 1, an `alpha` outside
    [0, 1], or an optimizer that looks ahead already.
    Deviations: fastai's is a wrapper around `opt`; here `opt` itself is changed, so schedulers, checkpoints
    and param groups keep working on one object. ``k`` and ``alpha`` are the hyperparameters ``lookahead_k``
    and ``lookahead_alpha``.
    """
    if not isinstance(opt, Optimizer):
        raise TypeError(
            "Lookahead changes an Optimizer of fusedopt, and this is a "
            f"{type(opt).__module__}.{type(opt).__name__}; "
            "for an optimizer of fastai use fastai.optimizer.Lookahead"
        )
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"Lookahead needs a whole number of steps k >= 1, got {k!r}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"Lookahead needs an alpha between 0 and 1, got {alpha!r}")
    if lookahead in opt.cbs:
        raise ValueError("this optimizer looks ahead already")
    opt.cbs = [lookahead_slow, *opt.cbs, lookahead]
    for group in opt.param_groups:
        if (cbs := list_of(group, [])) != []:
            group[GROUPS_OWN] = [lookahead_slow, *cbs, lookahead]
    opt.title = f"Lookahead_{opt.title or type(opt).__name__}"
    for name, value in dict(lookahead_k=k, lookahead_alpha=alpha).items():
        opt.defaults[name] = value
        opt.set_hyper(name, value)
    return opt


@described(weight_decay, _dampened, average_sqr_grad, radam_step, lookahead_slow, lookahead)
def ranger(
    params: Any,
    lr: Any,
    mom: float = 0.95,
    wd: float = 0.01,
    eps: float = 1e-6,
    k: int = 6,
    alpha: float = 0.5,
    *,
    sqr_mom: float = 0.99,
    beta: float = 0.0,
    decouple_wd: bool = True,
    **options: Unpack[AllOptions],
) -> Optimizer:
    """RAdam with Lookahead, under the defaults of the ranger experiments.

    Args: `k` and `alpha` as of `Lookahead`, `beta` as of `RAdam`; `sqr_mom`, `beta` and `decouple_wd` are additions.
    """
    adaptive = RAdam(
        params, lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd, beta=beta, decouple_wd=decouple_wd, **options
    )
    opt = Lookahead(adaptive, k=k, alpha=alpha)
    opt.title = "ranger"
    return opt
