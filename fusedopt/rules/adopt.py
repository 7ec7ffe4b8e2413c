"""ADOPT: Adam that divides by what was known before this gradient, and so converges with any second moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..optimizer.described import described
from ..optimizer.names import MOMENTS
from ..optimizer.torch_face import TorchFace
from .first import first_step

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def adopt_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, eps: Any, clip_exp: Any, wd: Any, step: Any,
    decouple: bool = False, do_wd: bool = True, grad_avg: Any = None, sqr_avg: Any = None, **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """ADOPT: average the gradients that were divided by the root of the second moment of those before them.

    Formula: first step: ``v ← g²``, and p stays. Later: ``c = (t - 1)^clip_exp``;
    ``m ← mom·m + (1 - mom)·clip(g / max(√v, eps), -c, c)``; ``p ← p - lr·m``; ``v ← sqr_mom·v + (1 - sqr_mom)·g²``;
    m starts at zero. With `wd`: ``g ← g + wd·p`` at first, or ``p ← p·(1 - lr·wd)`` from the second step on if
    `decouple`.
    Args: `lr`, `mom`, `sqr_mom`, `eps` (gradient units), `clip_exp`, `wd` numbers; `step` int; `decouple` flag; `do_wd`
    per-parameter flag; `grad_avg`, `sqr_avg` tensors.
    State: ``grad_avg`` (m), ``sqr_avg`` (v); reads ``step`` and the flag ``do_wd``.
    Source: Taniguchi et al., "ADOPT: Modified Adam Can Converge with Any β₂ with the Optimal Rate", arXiv:2411.02853;
    clipping as in its authors' code.
    Deviations: `clip_exp` is a number and above 0, where the code takes a function of the step. In the first step
    ``c = 0`` keeps m at zero, so that it needs no kernel of its own.
    """
    grad = p.grad.data
    if grad_avg is None:
        grad_avg, sqr_avg = torch.zeros_like(grad), torch.zeros_like(grad)
    first = first_step(step)
    if do_wd and wd != 0:
        if decouple:
            p.data.mul_(1 - lr * wd * (1 - first))
        else:
            grad.add_(p.data, alpha=wd)
    clip = (step - 1) ** clip_exp
    normed = (grad / sqr_avg.sqrt().clamp_(min=eps)).clamp_(-clip, clip)
    grad_avg.mul_(mom).add_(normed, alpha=1 - mom)
    p.data.sub_(grad_avg, alpha=lr)
    sqr_avg.mul_(sqr_mom).addcmul_(grad, grad, value=1 - sqr_mom * (1 - first))
    return {"grad_avg": grad_avg, "sqr_avg": sqr_avg}


adopt_step.defaults = dict(mom=0.9, sqr_mom=0.9999, eps=1e-6, clip_exp=0.25, wd=0.0)


@described(adopt_step)
class ADOPT(TorchFace):
    """ADOPT: see `adopt_step`.

    Args: `clip_exp`: above 0, the power of the step that divided gradients are clipped to; `decouple`: AdamW's decay,
    in place of L2.
    State: ``step``, ``exp_avg``, ``exp_avg_sq``.
    Raises: ValueError: another `clip_exp`.
    """

    state_names: ClassVar[dict[str, str]] = MOMENTS

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        clip_exp: float = 0.25,
        weight_decay: float = 0.0,
        decouple: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        if not clip_exp > 0:
            raise ValueError(f"Invalid clip_exp value: {clip_exp}; it must be above 0")
        self._start([callbacks.maximize_grad, callbacks.step_stat, adopt_step], locals())
