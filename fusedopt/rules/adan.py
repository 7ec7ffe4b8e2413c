"""Adan: Nesterov momentum, estimated from the differences of gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..optimizer.described import described
from ..optimizer.names import Place
from ..optimizer.torch_face import TorchFace
from .first import first_step

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def adan_step(
    p: Any, lr: Any, mom: Any, diff_mom: Any, sqr_mom: Any, eps: Any, wd: Any, step: Any,
    grad_avg: Any = None, diff_avg: Any = None, sqr_avg: Any = None, last_grad: Any = None,
    no_prox: bool = False, do_wd: bool = True, **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """Adan: averages of the gradient and of its change, over the root of their sum's second moment.

    Formula: ``d = g - g'`` with the last step's gradient g', 0 in the first step; ``m ← mom·m + (1 - mom)·g``;
    ``v ← diff_mom·v + (1 - diff_mom)·d``; ``n ← sqr_mom·n + (1 - sqr_mom)·(g + diff_mom·d)²``; all start at zero;
    ``p ← (p - lr·(m̂ + diff_mom·v̂) / (√n̂ + eps)) / (1 + lr·wd)``, where hats divide a moment's bias away; with
    `no_prox` ``p ← p·(1 - lr·wd) - lr·(...)``.
    Args: `lr`, `mom`, `diff_mom`, `sqr_mom`, `eps`, `wd` numbers (moments are the code's betas, 1 less the paper's);
    `step` int; `no_prox` flag; `do_wd` per-parameter flag; the averages and `last_grad` tensors.
    State: ``grad_avg`` (m), ``diff_avg`` (v), ``sqr_avg`` (n), ``last_grad``; reads ``step`` and the flag ``do_wd``.
    Source: Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm", arXiv:2208.06677, and its authors' code.
    Deviations: from the paper: bias corrections, and no restarts, as in the code. From the code: the last gradient is
    stored as it is (there negated), and clipping is the option ``max_grad_norm`` of every optimizer here.
    """
    grad = p.grad.data
    if grad_avg is None:
        grad_avg, diff_avg = torch.zeros_like(grad), torch.zeros_like(grad)
        sqr_avg, last_grad = torch.zeros_like(grad), torch.zeros_like(grad)
    diff = (grad - last_grad) * (1 - first_step(step))
    grad_avg.mul_(mom).add_(grad, alpha=1 - mom)
    diff_avg.mul_(diff_mom).add_(diff, alpha=1 - diff_mom)
    ahead = grad + diff * diff_mom
    sqr_avg.mul_(sqr_mom).addcmul_(ahead, ahead, value=1 - sqr_mom)
    debias1, debias2, debias3 = 1 - mom**step, 1 - diff_mom**step, 1 - sqr_mom**step
    update = grad_avg / debias1 + diff_avg * (diff_mom / debias2)
    update.div_((sqr_avg / debias3).sqrt().add_(eps))
    decay = lr * wd if do_wd else 0.0
    if no_prox:
        p.data.mul_(1 - decay).sub_(update, alpha=lr)
    else:
        p.data.sub_(update, alpha=lr).div_(1 + decay)
    return {"grad_avg": grad_avg, "diff_avg": diff_avg, "sqr_avg": sqr_avg, "last_grad": grad}


adan_step.defaults = dict(mom=0.98, diff_mom=0.92, sqr_mom=0.99, eps=1e-8, wd=0.0)


@described(adan_step)
class Adan(TorchFace):
    """Adan: see `adan_step`.

    Args: `betas`: of gradients, of their changes, of squares, each in [0, 1); `no_prox`: decay as AdamW's, in place of
    a division by ``1 + lr·weight_decay``.
    State: ``step``, ``exp_avg``, ``exp_avg_diff``, ``exp_avg_sq``, ``previous_grad``.
    """

    state_names: ClassVar[dict[str, str]] = {
        "grad_avg": "exp_avg",
        "diff_avg": "exp_avg_diff",
        "sqr_avg": "exp_avg_sq",
        "last_grad": "previous_grad",
    }
    hyper_names: ClassVar[dict[str, Place]] = {
        "mom": ("betas", 0),
        "diff_mom": ("betas", 1),
        "sqr_mom": ("betas", 2),
    }
    _betas = 3

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        no_prox: bool = False,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        self._start([callbacks.maximize_grad, callbacks.step_stat, adan_step], locals())
