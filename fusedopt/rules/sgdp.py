"""SGDP: SGD without the part of its step along a weight whose scale does not matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..optimizer.described import described
from ..optimizer.names import MOMENTUM
from ..optimizer.torch_face import TorchFace
from .projected import projected

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def sgdp_step(
    p: Any, lr: Any, mom: Any, dampening: Any, eps: Any, wd: Any, delta: Any, wd_ratio: Any,
    nesterov: bool = False, do_wd: bool = True, grad_avg: Any = None, **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """SGDP: SGD's step with momentum, projected for weights whose gradients are about orthogonal to them.

    Formula: ``m ← mom·m + (1 - dampening)·g`` from zero; ``u = m``, with `nesterov` ``g + mom·m``; ``u, r`` are
    projected with `delta` and `wd_ratio` (`projected.projected`); ``p ← p·(1 - lr·wd·r / (1 - mom)) - lr·u``.
    Args: `lr`, `mom`, `dampening`, `eps` (gradient units), `wd`, `delta`, `wd_ratio` numbers; `nesterov` flag; `do_wd`
    per-parameter flag; `grad_avg` tensor.
    State: ``grad_avg`` (m, gradient units); reads the flag ``do_wd``.
    Source: Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
    arXiv:2006.08217, algorithm 1, in the form of its authors' code.
    Deviations: none from the paper; the code, without `nesterov`, projects m itself with u.
    """
    grad = p.grad.data
    if grad_avg is None:
        grad_avg = torch.zeros_like(grad)
    grad_avg.mul_(mom).add_(grad, alpha=1 - dampening)
    update = grad + grad_avg * mom if nesterov else grad_avg
    update, ratio = projected(update, grad, p.data, delta, wd_ratio, eps)
    if do_wd and wd != 0:
        p.data.mul_(1 - lr * wd / (1 - mom) * ratio)
    p.data.sub_(update, alpha=lr)
    return {"grad_avg": grad_avg}


sgdp_step.defaults = dict(mom=0.0, dampening=0.0, eps=1e-8, wd=0.0, delta=0.1, wd_ratio=0.1)


@described(sgdp_step)
class SGDP(TorchFace):
    """SGDP: see `sgdp_step`. Decay is decoupled.

    Args: `dampening`: how much less than 1 a gradient counts in the momentum; `nesterov`: whether to look ahead along
    it; `delta`: below which cosine, times the root of a row's length, a gradient counts as orthogonal; `wd_ratio`: of
    the decay of such weights to that of others.
    State: ``momentum_buffer``.
    """

    state_names: ClassVar[dict[str, str]] = MOMENTUM
    _not_negative = ("delta", "wd_ratio")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-1,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        self._start([callbacks.maximize_grad, sgdp_step], locals())
