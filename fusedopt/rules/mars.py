"""MARS: AdamW on gradients whose variance is reduced by those of the step before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..callbacks import debias
from ..optimizer.described import described
from ..optimizer.names import MOMENTS, Place
from ..optimizer.torch_face import TorchFace, check_betas, check_numbers

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def mars_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, gamma: Any, eps: Any, wd: Any, mom_1d: Any, sqr_mom_1d: Any,
    lr_1d_factor: Any, weight_decay_1d: Any, step: Any, optimize_1d: bool = False, do_wd: bool = True,
    grad_avg: Any = None, sqr_avg: Any = None, last_grad: Any = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """MARS-AdamW: AdamW's step on a corrected and clipped gradient; plain AdamW for vectors.

    Formula: ``c = g + gamma·mom / (1 - mom)·(g - g')`` with the last step's gradient g', at first 0; ``c ← c / ‖c‖`` if
    ``‖c‖ > 1``, over the tensor; ``m ← mom·m + (1 - mom)·c; v ← sqr_mom·v + (1 - sqr_mom)·c²``;
    ``p ← p - lr·(m̂ / (√v̂ + eps) + wd·p)``, hats as in Adam. A parameter of less than two dimensions, unless
    `optimize_1d`, has ``c = g``, `mom_1d`, `sqr_mom_1d`, ``lr·lr_1d_factor``, `weight_decay_1d` instead.
    Args: `lr`, `mom`, `sqr_mom`, `gamma`, `eps` (gradient units), `wd`, `mom_1d`, `sqr_mom_1d`, `lr_1d_factor`,
    `weight_decay_1d` numbers; `step` int; `optimize_1d` flag; `do_wd` per-parameter flag; `grad_avg`, `sqr_avg`,
    `last_grad` tensors.
    State: ``grad_avg`` (m), ``sqr_avg`` (v), ``last_grad`` (not for vectors); reads ``step`` and the flag ``do_wd``.
    Source: Yuan et al., "MARS: Unleashing the Power of Variance Reduction for Training Large Models", arXiv:2411.10438,
    algorithm 2, in the approximate form (g' is of the batch before, not of this one) of its authors' code.
    Deviations: MARS-Lion, MARS-Shampoo and the exact form are left out.
    """
    grad = p.grad.data
    if grad_avg is None:
        grad_avg, sqr_avg = torch.zeros_like(grad), torch.zeros_like(grad)
    new = {"grad_avg": grad_avg, "sqr_avg": sqr_avg}
    if optimize_1d or p.ndim >= 2:
        if last_grad is None:
            last_grad = torch.zeros_like(grad)
        new["last_grad"] = grad
        grad = grad + (grad - last_grad) * (gamma * (mom / (1 - mom)))
        grad = grad / torch.norm(grad).clamp(min=1)
    else:
        mom, sqr_mom, lr, wd = mom_1d, sqr_mom_1d, lr * lr_1d_factor, weight_decay_1d
    grad_avg.mul_(mom).add_(grad, alpha=1 - mom)
    sqr_avg.mul_(sqr_mom).addcmul_(grad, grad, value=1 - sqr_mom)
    if do_wd and wd != 0:
        p.data.mul_(1 - lr * wd)
    denom = (sqr_avg / debias(sqr_mom, 1 - sqr_mom, step)).sqrt().add_(eps)
    p.data.addcdiv_(grad_avg, denom, value=-lr / debias(mom, 1 - mom, step))
    return new


mars_step.defaults = dict(
    mom=0.95, sqr_mom=0.99, gamma=0.025, eps=1e-8, wd=0.0, mom_1d=0.9, sqr_mom_1d=0.95, lr_1d_factor=1.0,
    weight_decay_1d=0.1,
)  # fmt: skip


@described(mars_step)
class MARS(TorchFace):
    """MARS-AdamW: see `mars_step`.

    Args: `gamma`: how much of a gradient's change is added to it; `optimize_1d`: vectors too; else they are AdamW's,
    with `betas_1d` and `weight_decay_1d`. `lr_1d` is what vectors' learning rate is while that of the others is `lr`,
    one number; a schedule changes both alike.
    State: ``step``, ``exp_avg``, ``exp_avg_sq``, ``last_grad``.
    Raises: TypeError: another `lr`.
    """

    state_names: ClassVar[dict[str, str]] = MOMENTS
    hyper_names: ClassVar[dict[str, Place]] = {
        "mom": ("betas", 0),
        "sqr_mom": ("betas", 1),
        "mom_1d": ("betas_1d", 0),
        "sqr_mom_1d": ("betas_1d", 1),
    }
    _not_negative = ("gamma", "weight_decay_1d", "lr_1d_factor")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 0.025,
        optimize_1d: bool = False,
        lr_1d: float = 3e-3,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        weight_decay_1d: float = 0.1,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        if not isinstance(lr, (int, float)):
            raise TypeError(f"MARS compares lr with lr_1d, so lr must be one number, not {lr!r}")
        betas_1d = check_betas(betas_1d, name="beta_1d")
        check_numbers(lr_1d=lr_1d)
        lr_1d_factor = lr_1d / lr if lr else 1.0
        self._start(
            [callbacks.maximize_grad, callbacks.step_stat, mars_step],
            {k: v for k, v in locals().items() if k != "lr_1d"},
        )
