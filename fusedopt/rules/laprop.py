"""LaProp: momentum over gradients that were divided already, so that both decays may be chosen apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..callbacks import debias
from ..optimizer.described import described
from ..optimizer.names import MOMENTS
from ..optimizer.torch_face import TorchFace

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def laprop_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, eps: Any, step: Any, sqr_avg: Any, grad_avg: Any = None,
    **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """LaProp: first divide by the root of the second moment, then average.

    Formula: ``m ← mom·m + (1 - mom)·g / (√v̂ + eps)``, ``v̂ = v / (1 - sqr_mom^t)``; m starts at zero;
    ``p ← p - lr·m / (1 - mom^t)``.
    Args: `lr`, `mom`, `sqr_mom`, `eps` numbers (`eps` in gradient units); `step` int; `sqr_avg`, `grad_avg` tensors.
    State: ``grad_avg`` (m, of divided gradients, without a unit); reads ``sqr_avg``, ``step``.
    Source: Ziyin et al., "LaProp: Separating Momentum and Adaptivity in Adam", arXiv:2002.04839, algorithm 1.
    Deviations: the authors' code averages ``lr·g / (...)`` and so lets a changed `lr` act slowly; with one `lr` it is
    the same. Its ``centered`` variant is left out.
    """
    if grad_avg is None:
        grad_avg = torch.zeros_like(p.grad.data)
    denom = (sqr_avg / debias(sqr_mom, 1 - sqr_mom, step)).sqrt().add_(eps)
    grad_avg.mul_(mom).addcdiv_(p.grad.data, denom, value=1 - mom)
    p.data.sub_(grad_avg, alpha=lr / debias(mom, 1 - mom, step))
    return {"grad_avg": grad_avg}


laprop_step.defaults = dict(mom=0.9, eps=1e-15)


_CBS = [
    callbacks.maximize_grad,
    callbacks.weight_decay,
    callbacks.average_sqr_grad,
    callbacks.step_stat,
    laprop_step,
]


@described(callbacks.weight_decay, callbacks.average_sqr_grad, laprop_step)
class LaProp(TorchFace):
    """LaProp with decoupled weight decay: see `laprop_step`.

    State: ``step``, ``exp_avg``, ``exp_avg_sq``.
    """

    state_names: ClassVar[dict[str, str]] = MOMENTS

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 4e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        self._start(_CBS, locals())
