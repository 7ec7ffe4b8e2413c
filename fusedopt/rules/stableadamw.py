"""StableAdamW: AdamW that steps less where its second moment lags behind the gradients."""

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


def stable_adamw_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, eps: Any, wd: Any, step: Any, do_wd: bool = True,
    grad_avg: Any = None, sqr_avg: Any = None, **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """StableAdamW: AdamW with a learning rate per tensor, divided by how much its gradients exceed what is expected.

    Formula: ``w = (1 - β) / (1 - β^t)`` for each β, `mom` and `sqr_mom`; ``m ← (1 - w₁)·m + w₁·g``;
    ``v ← (1 - w₂)·v + w₂·g²``, unbiased averages; ``r = √mean(g² / max(v, eps²))`` over the tensor;
    ``η = lr / max(1, r)``; ``p ← p·(1 - η·wd) - η·m / (√v + eps)``.
    Args: `lr`, `mom`, `sqr_mom`, `eps` (gradient units), `wd` numbers; `step` int; `do_wd` per-parameter flag;
    `grad_avg`, `sqr_avg` tensors.
    State: ``grad_avg`` (m), ``sqr_avg`` (v); reads ``step`` and the flag ``do_wd``.
    Source: Wortsman et al., "Stable and low-precision training for large-scale vision-language models",
    arXiv:2304.13013, algorithm 2.
    Deviations: none.
    """
    grad = p.grad.data
    if grad_avg is None:
        grad_avg, sqr_avg = torch.zeros_like(grad), torch.zeros_like(grad)
    weight1, weight2 = 1 / debias(mom, 1.0, step), 1 / debias(sqr_mom, 1.0, step)
    grad_avg.mul_(1 - weight1).add_(grad, alpha=weight1)
    sqr_avg.mul_(1 - weight2).addcmul_(grad, grad, value=weight2)
    rms = (grad**2 / sqr_avg.clamp(min=eps**2)).mean().sqrt()
    own_lr = lr / rms.clamp(min=1)
    if do_wd and wd != 0:
        p.data.mul_(1 - own_lr * wd)
    p.data.sub_(grad_avg / sqr_avg.sqrt().add_(eps) * own_lr)
    return {"grad_avg": grad_avg, "sqr_avg": sqr_avg}


stable_adamw_step.defaults = dict(mom=0.9, sqr_mom=0.99, eps=1e-6, wd=1e-2)


@described(stable_adamw_step)
class StableAdamW(TorchFace):
    """AdamW with update clipping: see `stable_adamw_step`.

    State: ``step``, ``exp_avg``, ``exp_avg_sq``.
    """

    state_names: ClassVar[dict[str, str]] = MOMENTS

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        self._start([callbacks.maximize_grad, callbacks.step_stat, stable_adamw_step], locals())
