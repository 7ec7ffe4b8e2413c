"""The update rules: each optimizer in fusedopt is a short list of these callbacks.

A callback is called as ``cb(p, **{**state, **hypers})`` once per parameter. ``p.data`` and ``p.grad`` have
the parameter's shape; hyperparameters are numbers or flags; a returned dict is kept in the parameter's state
and comes back as arguments on the next step. ``cb.defaults`` holds the numbers that a callback brings along
as hyperparameters; flags have their default in the signature only, so that they make no hyperparameter unless
set.

Everything here is written so that it can be traced once and run as one kernel: elementwise tensor operations,
whole-tensor reductions, numbers by arithmetic that is recorded, and no reads of anything but the arguments
(constants may be read, but are looked at before each step). State starts as zeros wherever the rule allows it, so
that the first step and all later ones are the same kernel.

Each docstring gives the formula (g: gradient, m, v: first and second moment, t: step, starting at 1), the
arguments (tensors have the parameter's shape unless a shape is named; ``lr`` is in parameter units per unit
of update, ``wd`` in 1/lr, the rest are dimensionless unless said otherwise), the state kept, the source, and
every deviation from the peer of the same name in ``fastai.optimizer``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import softplus

__all__ = [
    "adadelta_step",
    "adagrad_step",
    "adam_step",
    "adamax_step",
    "average_grad",
    "average_sqr_grad",
    "debias",
    "flagged_weight_decay",
    "l2_reg",
    "lamb_step",
    "larc_layer_lr",
    "larc_step",
    "lookahead",
    "lookahead_slow",
    "maximize_grad",
    "momentum_step",
    "nadam_step",
    "qhadam_step",
    "radam_step",
    "rms_momentum_step",
    "rms_prop_step",
    "sgd_momentum_step",
    "sgd_step",
    "step_stat",
    "weight_decay",
]


# ------------------------------------------------------------------------------------------------------------
# What happens to the parameter or the gradient before the update


def maximize_grad(p: Any, maximize: bool = False, **kwargs: Any) -> None:
    """Ascend instead of descend.

    Formula: ``g ← -g`` if `maximize`.
    Args: `maximize` flag.
    State: none.
    Source: the ``maximize`` flag of ``torch.optim``; first in the list, so that weight decay keeps its sign.
    Deviations: no fastai peer.
    """
    if maximize:
        p.grad.data.neg_()


def weight_decay(p: Any, lr: Any, wd: Any, do_wd: bool = True, **kwargs: Any) -> None:
    """Shrink the parameter itself, apart from its gradient.

    Formula: ``p ← p · (1 - lr·wd)`` if `do_wd`.
    Args: `lr`, `wd` numbers; `do_wd` per-parameter flag (False: this parameter never decays).
    State: none; reads the flag ``do_wd``.
    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
    Deviations: none.
    """
    if do_wd and wd != 0:
        p.data.mul_(1 - lr * wd)


weight_decay.defaults = dict(wd=0.0)


def l2_reg(p: Any, lr: Any, wd: Any, do_wd: bool = True, **kwargs: Any) -> None:
    """Add the gradient of an L2 penalty to the gradient.

    Formula: ``g ← g + wd·p`` if `do_wd`.
    Args: `wd` number (gradient units per parameter unit); `lr` is not used; `do_wd` per-parameter flag.
    State: none; reads the flag ``do_wd``.
    Source: ``weight_decay`` of torch.optim's SGD and Adam.
    Deviations: the later callbacks see the changed gradient, but an Optimizer of ours leaves the user's
    ``p.grad`` as it was; fastai's changes it for good.
    """
    if do_wd and wd != 0:
        p.grad.data.add_(p.data, alpha=wd)


l2_reg.defaults = dict(wd=0.0)


def flagged_weight_decay(
    p: Any, lr: Any, wd: Any, decoupled_weight_decay: bool = False, do_wd: bool = True, **kwargs: Any
) -> None:
    """Weight decay of either kind, chosen per param group by a flag.

    Formula: ``p ← p · (1 - lr·wd)`` if `decoupled_weight_decay`, else ``g ← g + wd·p``; neither if
    not `do_wd`.
    Args: `lr`, `wd` numbers; `decoupled_weight_decay`, `do_wd` flags.
    State: none; reads the flag ``do_wd``.
    Source: torch.optim's Adam, NAdam and RAdam.
    Deviations: no fastai peer; torch has no ``do_wd``.
    """
    if do_wd and wd != 0:
        if decoupled_weight_decay:
            p.data.mul_(1 - lr * wd)
        else:
            p.grad.data.add_(p.data, alpha=wd)


flagged_weight_decay.defaults = dict(wd=0.0)


# ------------------------------------------------------------------------------------------------------------
# Running statistics


def average_grad(
    p: Any, mom: Any, dampening: bool = False, grad_avg: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """Running average (`dampening`) or running sum of the gradients.

    Formula: ``m ← mom·m + d·g`` with ``d = 1 - mom`` if `dampening` else ``1``; m starts at zero.
    Args: `mom` number in [0, 1]; `dampening` flag; `grad_avg` tensor.
    State: ``grad_avg``.
    Source: Polyak 1964 (sum); Kingma & Ba, arXiv:1412.6980 (average).
    Deviations: none.
    """
    if grad_avg is None:
        grad_avg = torch.zeros_like(p.grad.data)
    grad_avg.mul_(mom).add_(p.grad.data, alpha=1 - mom if dampening else 1)
    return {"grad_avg": grad_avg}


average_grad.defaults = dict(mom=0.9)


def average_sqr_grad(
    p: Any, sqr_mom: Any, dampening: bool = True, sqr_avg: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """Running average (`dampening`) or running sum of the squared gradients.

    Formula: ``v ← sqr_mom·v + d·g²`` with ``d = 1 - sqr_mom`` if `dampening` else ``1``; v starts at zero.
    Args: `sqr_mom` number in [0, 1]; `dampening` flag; `sqr_avg` tensor, in gradient units squared.
    State: ``sqr_avg``.
    Source: Tieleman & Hinton 2012 (RMSProp, lecture 6.5 of "Neural Networks for Machine Learning").
    Deviations: none.
    """
    if sqr_avg is None:
        sqr_avg = torch.zeros_like(p.grad.data)
    sqr_avg.mul_(sqr_mom).addcmul_(p.grad.data, p.grad.data, value=1 - sqr_mom if dampening else 1)
    return {"sqr_avg": sqr_avg}


average_sqr_grad.defaults = dict(sqr_mom=0.99)


def step_stat(p: Any, step: Any = 0, **kwargs: Any) -> dict[str, Any]:
    """Count this parameter's steps.

    Formula: ``t ← t + 1``, from 0, so that the first update sees 1.
    Args: `step` int.
    State: ``step``, a Python number per parameter (a frozen parameter keeps its own count).
    Source: the t of every bias correction.
    Deviations: none.
    """
    return {"step": step + 1}


def debias(mom: Any, damp: Any, step: Any) -> Any:
    """Sum of the weights in a running average after `step` steps, by which to divide its bias away.

    Formula: ``damp · (1 - mom^t) / (1 - mom)``.
    Args: `mom` number in [0, 1]; `damp` weight of each new value (``1 - mom`` for an average, 1 for a sum);
    `step` int, at least 1. Returns a number.
    Source: Kingma & Ba, "Adam", arXiv:1412.6980, section 3.
    Deviations: `mom` = 1, where the formula is 0/0 and fastai raises ZeroDivisionError. A sum (`damp` not 0)
    gets the limit, ``damp · t``. An average with ``damp = 1 - mom = 0`` takes nothing in any more: the result
    is 1, so a frozen average is used as it stands, and one that never took anything in stays zero.
    """
    if mom == 1:
        return damp * step if damp != 0 else 1.0
    return damp * (1 - mom**step) / (1 - mom)


# ------------------------------------------------------------------------------------------------------------
# Steps without per-tensor reductions


def sgd_step(p: Any, lr: Any, **kwargs: Any) -> None:
    """Plain gradient descent.

    Formula: ``p ← p - lr·g``.
    Args: `lr` number.
    State: none.
    Source: Robbins & Monro 1951.
    Deviations: none.
    """
    p.data.add_(p.grad.data, alpha=-lr)


def momentum_step(p: Any, lr: Any, grad_avg: Any, **kwargs: Any) -> None:
    """Descend along the running average of the gradients.

    Formula: ``p ← p - lr·m``.
    Args: `lr` number; `grad_avg` tensor (from `average_grad`).
    State: none; reads ``grad_avg``.
    Source: Polyak 1964.
    Deviations: none.
    """
    p.data.add_(grad_avg, alpha=-lr)


def sgd_momentum_step(
    p: Any, lr: Any, mom: Any, dampening: Any = 0.0, nesterov: bool = False, grad_avg: Any = None,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """torch.optim's SGD: momentum that can be switched on, dampened and looked ahead.

    Formula: ``m ← mom·m + (1 - dampening)·g`` (``m ← g`` the first time); ``u = g + mom·m`` if `nesterov`
    else ``m``; ``p ← p - lr·u``. With `mom` = 0: ``p ← p - lr·g`` and m is left alone.
    Args: `lr`, `mom`, `dampening` numbers; `nesterov` flag; `grad_avg` tensor.
    State: ``grad_avg`` (torch's ``momentum_buffer``), only while `mom` is not 0.
    Source: torch.optim.SGD; Sutskever et al. 2013 for `nesterov`.
    Deviations: no fastai peer. `dampening` is a number here and a flag in `average_grad`.
    """
    grad = p.grad.data
    if mom == 0:
        p.data.add_(grad, alpha=-lr)
        return None
    if grad_avg is None and dampening != 0:
        grad_avg = grad.clone()  # torch does not dampen the first gradient; zeros would
    else:
        if grad_avg is None:
            grad_avg = torch.zeros_like(grad)
        grad_avg.mul_(mom).add_(grad, alpha=1 - dampening)
    p.data.add_(grad.add(grad_avg, alpha=mom) if nesterov else grad_avg, alpha=-lr)
    return {"grad_avg": grad_avg}


sgd_momentum_step.defaults = dict(mom=0.0, dampening=0.0)


def rms_prop_step(p: Any, lr: Any, sqr_avg: Any, eps: Any, grad_avg: Any = None, **kwargs: Any) -> None:
    """Divide the step by the root of the mean squared gradient.

    Formula: ``p ← p - lr · a / (√v + eps)`` with ``a = m`` where `average_grad` ran, else ``g``.
    Args: `lr`, `eps` numbers (`eps` in gradient units); `sqr_avg`, `grad_avg` tensors.
    State: none; reads ``sqr_avg``, ``grad_avg``.
    Source: Tieleman & Hinton 2012.
    Deviations: none. torch averages ``g / (√v + eps)`` instead: see `rms_momentum_step`.
    """
    grad = p.grad.data if grad_avg is None else grad_avg
    p.data.addcdiv_(grad, sqr_avg.sqrt().add_(eps), value=-lr)


rms_prop_step.defaults = dict(eps=1e-8)


def rms_momentum_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, sqr_avg: Any, eps: Any, centered: bool = False,
    grad_avg: Any = None, momentum_buffer: Any = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """torch.optim's RMSprop: momentum over the divided gradients, variance in place of the second moment.

    Formula: ``d = √v + eps``, or ``√(v - a²) + eps`` with ``a ← sqr_mom·a + (1 - sqr_mom)·g`` if `centered`;
    ``b ← mom·b + g/d; p ← p - lr·b``, or ``p ← p - lr·g/d`` with `mom` = 0.
    Args: `lr`, `mom`, `sqr_mom`, `eps` numbers; `centered` flag; `sqr_avg`, `grad_avg`, `momentum_buffer`
    tensors.
    State: ``momentum_buffer`` (b) while `mom` is not 0, ``grad_avg`` (a) if `centered`; reads ``sqr_avg``.
    Source: torch.optim.RMSprop; Graves, arXiv:1308.0850, for `centered`.
    Deviations: no fastai peer. Momentum or `centered` may be switched on later (torch raises KeyError).
    """
    grad, var, new = p.grad.data, sqr_avg, {}
    if centered:
        if grad_avg is None:
            grad_avg = torch.zeros_like(grad)
        grad_avg.mul_(sqr_mom).add_(grad, alpha=1 - sqr_mom)
        var = sqr_avg.addcmul(grad_avg, grad_avg, value=-1)
        new["grad_avg"] = grad_avg
    denom = var.sqrt().add_(eps)
    if mom == 0:
        p.data.addcdiv_(grad, denom, value=-lr)
        return new
    if momentum_buffer is None:
        momentum_buffer = torch.zeros_like(grad)
    momentum_buffer.mul_(mom).addcdiv_(grad, denom)
    p.data.add_(momentum_buffer, alpha=-lr)
    return {**new, "momentum_buffer": momentum_buffer}


rms_momentum_step.defaults = dict(mom=0.0, eps=1e-8)


def adam_step(
    p: Any, lr: Any, mom: Any, step: Any, sqr_mom: Any, grad_avg: Any, sqr_avg: Any, eps: Any,
    amsgrad: bool = False, max_sqr_avg: Any = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """Adam: bias-corrected momentum over the root of the bias-corrected second moment.

    Formula: ``p ← p - lr · m̂ / (√v̂ + eps)``, ``m̂ = m / (1 - mom^t)``, ``v̂ = v / (1 - sqr_mom^t)``; with
    `amsgrad`, v is replaced by the largest v seen so far.
    Args: `lr`, `mom`, `sqr_mom`, `eps` numbers (`eps` in gradient units); `step` int; `amsgrad` flag;
    `grad_avg` (dampened), `sqr_avg`, `max_sqr_avg` tensors.
    State: ``max_sqr_avg`` if `amsgrad`; reads ``grad_avg``, ``sqr_avg``, ``step``.
    Source: Kingma & Ba, arXiv:1412.6980; Reddi et al., "On the Convergence of Adam and Beyond", 2018
    (`amsgrad`).
    Deviations: `amsgrad` is an addition; `mom` = 1 is finite (see `debias`).
    """
    new = None
    if amsgrad:
        if max_sqr_avg is None:
            max_sqr_avg = torch.zeros_like(sqr_avg)
        sqr_avg = max_sqr_avg = torch.maximum(max_sqr_avg, sqr_avg)
        new = {"max_sqr_avg": max_sqr_avg}
    debias1 = debias(mom, 1 - mom, step)
    debias2 = debias(sqr_mom, 1 - sqr_mom, step)
    p.data.addcdiv_(grad_avg, (sqr_avg / debias2).sqrt().add_(eps), value=-lr / debias1)
    return new


adam_step.defaults = dict(eps=1e-5)


def radam_step(
    p: Any, lr: Any, mom: Any, step: Any, sqr_mom: Any, grad_avg: Any, sqr_avg: Any, eps: Any,
    beta: Any = 0.0, eps_before_debias: bool = False, **kwargs: Any,
) -> None:  # fmt: skip
    """RAdam: Adam whose adaptive part waits until its variance is known well enough, and is rectified for it.

    Formula: ``r∞ = 2/(1 - sqr_mom) - 1``, ``r = r∞ - 2·t·sqr_mom^t / (1 - sqr_mom^t)``. If ``r > 5``:
    ``p ← p - lr·c · m̂ / (√v̂ + eps)``, ``c² = (r-4)(r-2)r∞ / ((r∞-4)(r∞-2)r)``; else ``p ← p - lr·m̂``.
    With `beta`, the denominator goes through ``softplus(·, beta)`` (SAdam). With `eps_before_debias` it is
    ``(√v + eps) / √(1 - sqr_mom^t)``.
    Args: `lr`, `mom`, `sqr_mom`, `eps`, `beta` numbers; `step` int; `eps_before_debias` flag; `grad_avg`
    (dampened) and `sqr_avg` tensors.
    State: none; reads ``grad_avg``, ``sqr_avg``, ``step``.
    Source: Liu et al., arXiv:1908.03265; Tong et al., arXiv:1908.00700 (`beta`).
    Deviations: `eps_before_debias` is torch.optim's place for eps, off by default. `mom` = 1 and `sqr_mom` =
    1 are finite: with `sqr_mom` = 1 the second moment learns nothing, so the step is never adaptive.
    """
    debias1 = debias(mom, 1 - mom, step)
    debias2 = debias(sqr_mom, 1 - sqr_mom, step)
    r_inf = r = 0.0
    if sqr_mom != 1:
        r_inf = 2 / (1 - sqr_mom) - 1
        r = r_inf - 2 * step * sqr_mom**step / (1 - sqr_mom**step)
    if r <= 5:
        p.data.add_(grad_avg, alpha=-lr / debias1)
        return
    rect = ((r - 4) * (r - 2) * r_inf / ((r_inf - 4) * (r_inf - 2) * r)) ** 0.5
    denom = (sqr_avg if eps_before_debias else sqr_avg / debias2).sqrt().add_(eps)
    if eps_before_debias:
        denom = denom / debias2**0.5
    if beta:
        denom = softplus(denom, beta)
    p.data.addcdiv_(grad_avg, denom, value=-lr * rect / debias1)


radam_step.defaults = dict(eps=1e-5)


def qhadam_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, sqr_avg: Any, nu_1: Any, nu_2: Any, step: Any, grad_avg: Any,
    eps: Any, **kwargs: Any,
) -> None:  # fmt: skip
    """QHAdam: each moment is a blend of its running average and of what this step alone says.

    Formula: ``p ← p - lr · ((1-nu_1)·g + nu_1·m̂) / (√((1-nu_2)·g² + nu_2·v̂) + eps)``.
    Args: `lr`, `mom`, `sqr_mom`, `nu_1`, `nu_2`, `eps` numbers; `step` int; `grad_avg` (dampened), `sqr_avg`
    tensors.
    State: none; reads ``grad_avg``, ``sqr_avg``, ``step``.
    Source: Ma & Yarats, "Quasi-hyperbolic momentum and Adam for deep learning", arXiv:1810.06801.
    Deviations: `nu_1` and `nu_2` have defaults here too (fastai's are in `QHAdam` only).
    """
    debias1 = debias(mom, 1 - mom, step)
    debias2 = debias(sqr_mom, 1 - sqr_mom, step)
    grad = p.grad.data
    first = (1 - nu_1) * grad + nu_1 * (grad_avg / debias1)
    second = (1 - nu_2) * grad**2 + nu_2 * (sqr_avg / debias2)
    p.data.addcdiv_(first, second.sqrt().add_(eps), value=-lr)


qhadam_step.defaults = dict(eps=1e-8, nu_1=0.7, nu_2=1.0)


def adagrad_step(
    p: Any, lr: Any, step: Any, eps: Any, lr_decay: Any = 0.0, initial_accumulator_value: Any = 0.0,
    sqr_sum: Any = None, **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """Adagrad: divide by the root of the sum of all squared gradients.

    Formula: ``s ← s + g²; p ← p - lr / (1 + (t-1)·lr_decay) · g / (√s + eps)``; s starts at
    `initial_accumulator_value`.
    Args: `lr`, `eps`, `lr_decay`, `initial_accumulator_value` numbers; `step` int; `sqr_sum` tensor.
    State: ``sqr_sum`` (torch's ``sum``); reads ``step``.
    Source: Duchi et al. 2011, jmlr.org/papers/v12/duchi11a.html; torch.optim.Adagrad.
    Deviations: no fastai peer. The sum appears with the first step, where torch makes it in the constructor,
    and each group's own `initial_accumulator_value` counts, where torch takes the constructor's for all
    groups.
    """
    grad = p.grad.data
    if sqr_sum is None:
        sqr_sum = torch.zeros_like(grad)
        if initial_accumulator_value != 0:
            sqr_sum = sqr_sum + initial_accumulator_value
    sqr_sum.addcmul_(grad, grad)
    p.data.addcdiv_(grad, sqr_sum.sqrt().add_(eps), value=-lr / (1 + (step - 1) * lr_decay))
    return {"sqr_sum": sqr_sum}


adagrad_step.defaults = dict(eps=1e-10, lr_decay=0.0, initial_accumulator_value=0.0)


def adamax_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, step: Any, grad_avg: Any, eps: Any, inf_avg: Any = None,
    **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """Adamax: Adam under the infinity norm.

    Formula: ``u ← max(sqr_mom·u, |g| + eps); p ← p - lr · m / ((1 - mom^t)·u)``; u starts at zero.
    Args: `lr`, `mom`, `sqr_mom`, `eps` numbers; `step` int; `grad_avg` (dampened), `inf_avg` tensors.
    State: ``inf_avg`` (torch's ``exp_inf``); reads ``grad_avg``, ``step``.
    Source: Kingma & Ba, arXiv:1412.6980, section 7.1; torch.optim.Adamax.
    Deviations: no fastai peer; `mom` = 1 is finite (see `debias`).
    """
    if inf_avg is None:
        inf_avg = torch.zeros_like(p.grad.data)
    inf_avg = torch.maximum(inf_avg * sqr_mom, p.grad.data.abs().add_(eps))
    p.data.addcdiv_(grad_avg, inf_avg, value=-lr / debias(mom, 1 - mom, step))
    return {"inf_avg": inf_avg}


adamax_step.defaults = dict(eps=1e-8)


def nadam_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, step: Any, grad_avg: Any, sqr_avg: Any, eps: Any,
    momentum_decay: Any = 4e-3, mu_product: Any = 1.0, **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """NAdam: Adam with Nesterov momentum and a momentum that warms up.

    Formula: ``μ_t = mom · (1 - 0.96^(t·momentum_decay) / 2)``, ``Π ← Π·μ_t``, ``d = √v̂ + eps``;
    ``p ← p - lr · (1-μ_t)/(1-Π) · g/d - lr · μ_(t+1)/(1 - Π·μ_(t+1)) · m/d``.
    Args: `lr`, `mom`, `sqr_mom`, `eps`, `momentum_decay`, `mu_product` numbers; `step` int; `grad_avg`
    (dampened), `sqr_avg` tensors.
    State: ``mu_product`` (Π), a number; reads ``grad_avg``, ``sqr_avg``, ``step``.
    Source: Dozat, "Incorporating Nesterov Momentum into Adam", ICLR workshop 2016; torch.optim.NAdam.
    Deviations: no fastai peer. Π is a double; torch rounds it to float32 on every step.
    """
    mu = mom * (1 - 0.5 * 0.96 ** (step * momentum_decay))
    mu_next = mom * (1 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
    mu_product = mu_product * mu
    denom = (sqr_avg / debias(sqr_mom, 1 - sqr_mom, step)).sqrt().add_(eps)
    p.data.addcdiv_(p.grad.data, denom, value=-lr * (1 - mu) / (1 - mu_product))
    p.data.addcdiv_(grad_avg, denom, value=-lr * mu_next / (1 - mu_product * mu_next))
    return {"mu_product": mu_product}


nadam_step.defaults = dict(eps=1e-8, momentum_decay=4e-3)


def adadelta_step(
    p: Any, lr: Any, sqr_mom: Any, sqr_avg: Any, eps: Any, sqr_delta: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """Adadelta: a step whose size follows that of the steps before it, in the parameter's own units.

    Formula: ``δ = g · √(u + eps) / √(v + eps); u ← sqr_mom·u + (1 - sqr_mom)·δ²; p ← p - lr·δ``; u starts at
    zero.
    Args: `lr`, `sqr_mom` (torch's ``rho``), `eps` numbers; `sqr_avg`, `sqr_delta` tensors.
    State: ``sqr_delta`` (torch's ``acc_delta``); reads ``sqr_avg``.
    Source: Zeiler, arXiv:1212.5701; torch.optim.Adadelta.
    Deviations: no fastai peer.
    """
    if sqr_delta is None:
        sqr_delta = torch.zeros_like(p.grad.data)
    delta = sqr_delta.add(eps).sqrt_().div_(sqr_avg.add(eps).sqrt_()).mul_(p.grad.data)
    sqr_delta.mul_(sqr_mom).addcmul_(delta, delta, value=1 - sqr_mom)
    p.data.add_(delta, alpha=-lr)
    return {"sqr_delta": sqr_delta}


adadelta_step.defaults = dict(eps=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Steps scaled by a norm of the whole tensor


def larc_layer_lr(
    p: Any, lr: Any, trust_coeff: Any, wd: Any, eps: Any, clip: bool = True, **kwargs: Any
) -> dict[str, Any]:
    """One learning rate per tensor, from the ratio of its norm to its gradient's.

    Formula: ``η = lr · trust_coeff · ‖p‖ / (‖g‖ + wd·‖p‖ + eps)``; ``η ← min(lr, η)`` if `clip`.
    Args: `lr`, `trust_coeff`, `wd`, `eps` numbers (`eps` in gradient units); `clip` flag (False: LARS).
    State: ``local_lr``, one number per tensor (0-d tensor).
    Source: You et al., "Large Batch Training of Convolutional Networks", arXiv:1708.03888.
    Deviations: ``local_lr`` is always a 0-d tensor (fastai's turns into a Python number where the clip
    bites), and a NaN norm stays NaN when clipped.
    """
    p_norm, g_norm = torch.norm(p.data), torch.norm(p.grad.data)
    local_lr = lr * trust_coeff * p_norm / (g_norm + p_norm * wd + eps)
    return {"local_lr": local_lr.clamp(max=lr) if clip else local_lr}


larc_layer_lr.defaults = dict(trust_coeff=0.02, wd=0.0, eps=1e-8)


def larc_step(p: Any, local_lr: Any, grad_avg: Any = None, **kwargs: Any) -> None:
    """Descend with the tensor's own learning rate.

    Formula: ``p ← p - η·a`` with ``a = m`` where `average_grad` ran, else ``g``.
    Args: `local_lr` 0-d tensor or number; `grad_avg` tensor.
    State: none; reads ``local_lr``, ``grad_avg``.
    Source: see `larc_layer_lr`.
    Deviations: none.
    """
    p.data.sub_((p.grad.data if grad_avg is None else grad_avg) * local_lr)


def lamb_step(
    p: Any, lr: Any, mom: Any, step: Any, sqr_mom: Any, grad_avg: Any, sqr_avg: Any, eps: Any, **kwargs: Any
) -> None:
    """LAMB: Adam's update, scaled per tensor to the size of the parameter.

    Formula: ``u = m̂ / (√v̂ + eps)``; ``q = min(rms(p) / rms(u), 10)``, or 1 if either is 0;
    ``p ← p - lr·q·u``.
    Args: `lr`, `mom`, `sqr_mom`, `eps` numbers; `step` int; `grad_avg` (dampened), `sqr_avg` tensors.
    State: none; reads ``grad_avg``, ``sqr_avg``, ``step``.
    Source: You et al., "Large Batch Optimization for Deep Learning", arXiv:1904.00962.
    Deviations: none from fastai. From the paper: weight decay acts on the parameter and is not part of u, and
    q is capped at 10.
    """
    debias1 = debias(mom, 1 - mom, step)
    debias2 = debias(sqr_mom, 1 - sqr_mom, step)
    update = (grad_avg / debias1) / (sqr_avg / debias2).sqrt().add_(eps)
    p_rms, update_rms = p.data.pow(2).mean().sqrt(), update.pow(2).mean().sqrt()
    ratio = 1.0 if p_rms == 0 or update_rms == 0 else (p_rms / update_rms).clamp(max=10)
    p.data.sub_(update * (lr * ratio))


lamb_step.defaults = dict(eps=1e-6, wd=0.0)


# ------------------------------------------------------------------------------------------------------------
# Lookahead: `lookahead_slow` goes first in the list, `lookahead` last


def lookahead_slow(p: Any, slow: Any = None, **kwargs: Any) -> Any:
    """Remember where the parameter was before its first step.

    Formula: ``s ← p``, once.
    Args: `slow` tensor.
    State: ``slow``.
    Source: Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back", arXiv:1907.08610.
    Deviations: see `lookahead`.
    """
    if slow is None:
        return {"slow": p.data.clone()}


def lookahead(
    p: Any, slow: Any, lookahead_k: Any, lookahead_alpha: Any, lookahead_count: Any = 0, **kwargs: Any
) -> dict[str, Any]:
    """Every k-th step, move the slow weights towards the fast ones and restart from there.

    Formula: ``c ← c + 1``; if k divides c: ``s ← s + lookahead_alpha·(p - s); p ← s``.
    Args: `lookahead_k` int, at least 1; `lookahead_alpha` number in [0, 1]; `lookahead_count` int; `slow`
    tensor.
    State: ``slow``, ``lookahead_count``.
    Source: Zhang et al., arXiv:1907.08610.
    Deviations: fastai wraps the optimizer and counts its steps; here slow weights and count belong to each
    parameter, so one that had no gradient for a while synchronises on its own k-th step, and both are saved
    with the rest of the state.
    """
    lookahead_count = lookahead_count + 1
    if lookahead_count % lookahead_k != 0:
        return {"lookahead_count": lookahead_count}
    slow.add_(p.data - slow, alpha=lookahead_alpha)
    p.data.copy_(slow)
    return {"slow": slow, "lookahead_count": lookahead_count}


lookahead.defaults = dict(lookahead_k=6, lookahead_alpha=0.5)
