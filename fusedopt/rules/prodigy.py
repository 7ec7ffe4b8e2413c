"""Prodigy: Adam that finds its learning rate from how far the parameters have come."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..callbacks import debias
from ..optimizer.described import described
from ..optimizer.names import Place
from ..optimizer.torch_face import check_betas
from ..trace.totals import total
from .distance import FindsDistance, check_d0

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def prodigy_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, d_mom: Any, eps: Any, wd: Any, d0: Any, d_coef: Any,
    growth_rate: Any, step: Any, use_bias_correction: bool = False, decouple: bool = True,
    safeguard_warmup: bool = False, do_wd: bool = True, start: Any = None, grad_sum: Any = None,
    grad_avg: Any = None, sqr_avg: Any = None, d: Any = None, d_max: Any = None, d_numerator: Any = 0.0,
    **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """Prodigy: Adam's step in units of d, a lower bound for the distance from the start to the solution.

    Formula: ``η = lr·d``, with `use_bias_correction` ``η = lr·d·√(1 - sqr_mom^t) / (1 - mom^t)``; ``g ← g + wd·p``
    unless `decouple`; ``N ← d_mom·N + (d/d0)·η·Σ g·(p₀ - p)``; ``m ← mom·m + (1 - mom)·d·g``;
    ``v ← sqr_mom·v + (1 - sqr_mom)·d²·g²``; ``s ← d_mom·s + (d/d0)·η·g``, with `safeguard_warmup` d for η;
    ``d̂ = d_coef·N / Σ|s|``; ``d_max ← max(d_max, d̂)``; ``d ← min(d_max, growth_rate·d)``, where d is ``max(d, d̂)`` for
    as long as it is `d0`; ``p ← p·(1 - η·wd) - η·m / (√v + d·eps)``. Sums go over all parameters of the step. Nothing
    moves where ``Σ|s|`` is 0.
    Args: `lr`, `mom`, `sqr_mom`, `d_mom` (β₃; None: the root of `sqr_mom`), `eps` (gradient units), `wd`, `d0`
    (parameter units), `d_coef`, `growth_rate` numbers; `step` int; `use_bias_correction`, `decouple`,
    `safeguard_warmup` flags; `do_wd` per-parameter flag; `start`, `grad_sum`, `grad_avg`, `sqr_avg` tensors; `d`,
    `d_max`, `d_numerator` 0-d tensors.
    State: ``start`` (p₀), ``grad_sum`` (s), ``grad_avg`` (m), ``sqr_avg`` (v); ``d``, ``d_max``, ``d_numerator`` (N),
    the same for all parameters; reads ``step`` and the flag ``do_wd``.
    Source: Mishchenko & Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", arXiv:2306.06101, in the
    form of its authors' code.
    Deviations: ``slice_p`` is left out. Groups may have learning rates of their own; while one is 0, averages go on. A
    parameter without a gradient keeps its d, and goes on from there; in the code, all have that of the group.
    """
    grad = p.grad.data
    if start is None:
        start = p.data.clone()
        d = d_max = torch.full_like(grad.sum(), d0, dtype=torch.float64)
        grad_sum, grad_avg, sqr_avg = torch.zeros_like(grad), torch.zeros_like(grad), torch.zeros_like(grad)
    d_mom = sqr_mom**0.5 if d_mom is None else d_mom
    decay = wd if do_wd else 0.0
    if not decouple:
        grad = grad + decay * p.data
    own_lr, scale = d * lr, d / d0
    if use_bias_correction:
        own_lr = own_lr * (debias(sqr_mom, 1 - sqr_mom, step) ** 0.5 / debias(mom, 1 - mom, step))
    gain = total((grad * (start - p.data)).sum() * (scale * own_lr))
    grad_avg.mul_(mom).add_(grad * (d * (1 - mom)))
    sqr_avg.mul_(sqr_mom).add_(grad**2 * (d * d * (1 - sqr_mom)))
    grad_sum.mul_(d_mom).add_(grad * (scale * d if safeguard_warmup else scale * own_lr))
    size = total(grad_sum.abs())
    moved, d_numerator = size > 0, d_mom * d_numerator + gain
    found = d_coef * d_numerator / size
    begun = torch.where((d == d0) & (found > d), found, d)
    top = torch.where(found > d_max, found, d_max)
    most = begun * growth_rate
    new_d = torch.where(moved, torch.where(top < most, top, most), d)
    update = own_lr * grad_avg / (sqr_avg.sqrt() + new_d * eps)
    if decouple:
        update = update + (decay * own_lr) * p.data
    p.data.sub_(torch.where(moved, update, 0.0))
    return {
        "start": start, "grad_sum": grad_sum, "grad_avg": grad_avg, "sqr_avg": sqr_avg, "d": new_d,
        "d_max": torch.where(moved, top, d_max), "d_numerator": d_numerator,
    }  # fmt: skip


prodigy_step.defaults = dict(
    mom=0.9, sqr_mom=0.999, d_mom=None, eps=1e-8, wd=0.0, d0=1e-6, d_coef=1.0, growth_rate=math.inf
)


@described(prodigy_step)
class Prodigy(FindsDistance):
    """Prodigy: see `prodigy_step`; leave `lr` at 1, but for a schedule, and change `d_coef` rather.

    For parameters of half precision, d² is too small a number: give ``state_dtype=torch.float32``.

    Args: `lr`: a factor; `beta3`: of the sums that d is estimated from, in [0, 1), None: the root of ``betas[1]``;
    `decouple`: AdamW's decay, in place of L2; `use_bias_correction`: Adam's; `safeguard_warmup`: leave `lr` out of the
    estimate's denominator; `d0`: the first estimate, above 0, in parameter units; `growth_rate`: how many times the
    last one an estimate may be, at most; `d_coef`: a factor of estimates.
    State: ``step``, ``p0``, ``s``, ``exp_avg``, ``exp_avg_sq``; ``d``, ``d_max``, ``d_numerator``.
    Raises: ValueError: another `d0`.
    """

    state_names: ClassVar[dict[str, str]] = {
        "start": "p0",
        "grad_sum": "s",
        "grad_avg": "exp_avg",
        "sqr_avg": "exp_avg_sq",
    }
    hyper_names: ClassVar[dict[str, Place]] = {
        "mom": ("betas", 0),
        "sqr_mom": ("betas", 1),
        "d_mom": "beta3",
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        check_d0(d0)
        if beta3 is not None:
            check_betas((beta3,), 1)
        self._start([callbacks.maximize_grad, callbacks.step_stat, prodigy_step], locals())
