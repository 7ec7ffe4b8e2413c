"""D-Adaptation: Adam that finds its learning rate from how well its gradients agree."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..callbacks import debias
from ..optimizer.described import described
from ..trace.totals import total
from .distance import FindsDistance, check_d0

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def dadapt_adam_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, eps: Any, wd: Any, d0: Any, growth_rate: Any, step: Any,
    use_bias_correction: bool = False, decouple: bool = False, do_wd: bool = True, grad_sum: Any = None,
    grad_avg: Any = None, sqr_avg: Any = None, d: Any = None, d_numerator: Any = 0.0, **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """D-Adapted Adam: Adam's step in units of d, a lower bound for the distance from the start to the solution.

    Formula: ``η = lr·d``, with `use_bias_correction` ``η = lr·d·√(1 - sqr_mom^t) / (1 - mom^t)``; ``β = √sqr_mom``;
    ``g ← g + wd·p`` unless `decouple`; ``N ← β·N + (1 - β)·η·Σ g·s / (√v + eps)``; ``m ← mom·m + (1 - mom)·η·g``;
    ``v ← sqr_mom·v + (1 - sqr_mom)·g²``; ``s ← β·s + (1 - β)·η·g``; ``d̂ = N / ((1 - β)·Σ|s|)``;
    ``d ← max(d, min(d̂, growth_rate·d))``; ``p ← p - m / (√v + eps)``, with `decouple` ``p ← p·(1 - η·wd)`` before it.
    Sums go over all parameters of the step. Nothing moves where ``Σ|s|`` is 0.
    Args: `lr`, `mom`, `sqr_mom`, `eps` (gradient units), `wd`, `d0` (parameter units), `growth_rate` numbers; `step`
    int; `use_bias_correction`, `decouple` flags; `do_wd` per-parameter flag; `grad_sum`, `grad_avg`, `sqr_avg` tensors;
    `d`, `d_numerator` 0-d tensors.
    State: ``grad_sum`` (s), ``grad_avg`` (m), ``sqr_avg`` (v); ``d``, ``d_numerator`` (N), the same for all parameters;
    reads ``step`` and the flag ``do_wd``.
    Source: Defazio & Mishchenko, "Learning-Rate-Free Learning by D-Adaptation", arXiv:2301.07733, algorithm 5, in the
    form of its authors' code.
    Deviations: ``layer_scale`` is left out. Groups may have learning rates of their own; while one is 0, averages go
    on. A parameter without a gradient keeps its d, and goes on from there; in the code, all have that of the group.
    """
    grad = p.grad.data
    if grad_sum is None:
        grad_sum, grad_avg, sqr_avg = torch.zeros_like(grad), torch.zeros_like(grad), torch.zeros_like(grad)
        d = d0
    beta, decay = sqr_mom**0.5, wd if do_wd else 0.0
    if not decouple:
        grad = grad + decay * p.data
    own_lr = d * lr
    if use_bias_correction:
        own_lr = own_lr * (debias(sqr_mom, 1 - sqr_mom, step) ** 0.5 / debias(mom, 1 - mom, step))
    gain = total((grad * grad_sum / (sqr_avg.sqrt() + eps)).sum() * own_lr)
    grad_avg.mul_(mom).add_(grad * (own_lr * (1 - mom)))
    sqr_avg.mul_(sqr_mom).addcmul_(grad, grad, value=1 - sqr_mom)
    grad_sum.mul_(beta).add_(grad * (own_lr * (1 - beta)))
    size = total(grad_sum.abs())
    moved = size > 0
    d_numerator = torch.where(moved, beta * d_numerator + (1 - beta) * gain, d_numerator)
    found, most = d_numerator / ((1 - beta) * size), d * growth_rate
    found = torch.where(found < most, found, most)
    update = grad_avg / (sqr_avg.sqrt() + eps)
    if decouple:
        update = update + (decay * own_lr) * p.data
    p.data.sub_(torch.where(moved, update, 0.0))
    new_d = torch.where(moved & (found > d), found, d)
    return {
        "grad_sum": grad_sum, "grad_avg": grad_avg, "sqr_avg": sqr_avg, "d": new_d, "d_numerator": d_numerator
    }  # fmt: skip


dadapt_adam_step.defaults = dict(mom=0.9, sqr_mom=0.999, eps=1e-8, wd=0.0, d0=1e-6, growth_rate=math.inf)


@described(dadapt_adam_step)
class DAdaptAdam(FindsDistance):
    """D-Adapted Adam: see `dadapt_adam_step`; leave `lr` at 1, but for a schedule.

    Args: `lr`: a factor; `decouple`: AdamW's decay, in place of L2; `use_bias_correction`: Adam's; `d0`: the first
    estimate, above 0, in parameter units; `growth_rate`: how many times the last one an estimate may be, at most.
    State: ``step``, ``s``, ``exp_avg``, ``exp_avg_sq``; ``d``, ``numerator_weighted``.
    Raises: ValueError: another `d0`.
    """

    state_names: ClassVar[dict[str, str]] = {
        "grad_sum": "s",
        "grad_avg": "exp_avg",
        "sqr_avg": "exp_avg_sq",
        "d_numerator": "numerator_weighted",
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = False,
        use_bias_correction: bool = False,
        d0: float = 1e-6,
        growth_rate: float = math.inf,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        check_d0(d0)
        self._start([callbacks.maximize_grad, callbacks.step_stat, dadapt_adam_step], locals())
