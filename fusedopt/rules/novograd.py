"""NovoGrad: one second moment per tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..optimizer.described import described
from ..optimizer.torch_face import TorchFace
from .first import first_step

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def novograd_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, eps: Any, wd: Any, step: Any, grad_averaging: bool = False,
    do_wd: bool = True, grad_avg: Any = None, layer_sqr_avg: Any = None, **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """NovoGrad: momentum over gradients that were divided by a running norm of their whole tensor.

    Formula: ``v ← sqr_mom·v + (1 - sqr_mom)·‖g‖²``, the first time ``v ← ‖g‖²``;
    ``m ← mom·m + a·(g / (√v + eps) + wd·p)`` from zero; ``p ← p - lr·m``; ``a = 1``, or ``1 - mom`` with
    `grad_averaging`.
    Args: `lr`, `mom`, `sqr_mom`, `eps` (gradient units), `wd` numbers; `step` int; `grad_averaging` flag; `do_wd`
    per-parameter flag; `grad_avg` tensor; `layer_sqr_avg` one number per tensor (0-d tensor).
    State: ``grad_avg`` (m), ``layer_sqr_avg`` (v); reads ``step`` and the flag ``do_wd``.
    Source: Ginsburg et al., "Stochastic Gradient Methods with Layer-wise Adaptive Moments", arXiv:1905.11286.
    Deviations: none; `grad_averaging` is of the authors' code.
    """
    grad = p.grad.data
    later = 1 - first_step(step)
    count = torch.ones_like(grad).sum()
    if grad_avg is None:
        grad_avg, layer_sqr_avg = torch.zeros_like(grad), torch.zeros_like(count)
    # The old number is in the sum too, an equal share for each element: the launch after it reads the new one alone.
    layer_sqr_avg = (grad**2 * (1 - sqr_mom * later) + layer_sqr_avg * sqr_mom / count).sum()
    update = grad / (layer_sqr_avg.sqrt() + eps)
    if do_wd and wd != 0:
        update.add_(p.data, alpha=wd)
    grad_avg.mul_(mom).add_(update, alpha=1 - mom if grad_averaging else 1)
    p.data.sub_(grad_avg, alpha=lr)
    return {"grad_avg": grad_avg, "layer_sqr_avg": layer_sqr_avg}


novograd_step.defaults = dict(mom=0.95, sqr_mom=0.98, eps=1e-8, wd=0.0)


@described(novograd_step)
class NovoGrad(TorchFace):
    """NovoGrad: see `novograd_step`.

    Args: `grad_averaging`: whether gradients are averaged, or summed.
    State: ``step``, ``exp_avg``, and ``exp_avg_sq``, one number per tensor.
    """

    state_names: ClassVar[dict[str, str]] = {"grad_avg": "exp_avg", "layer_sqr_avg": "exp_avg_sq"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_averaging: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        self._start([callbacks.maximize_grad, callbacks.step_stat, novograd_step], locals())
