"""LARS: SGD with momentum, whose step for a tensor is in proportion to the tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..optimizer.described import described
from ..optimizer.names import MOMENTUM
from ..optimizer.torch_face import TorchFace

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def lars_step(
    p: Any, lr: Any, mom: Any, wd: Any, trust_coefficient: Any, eps: Any, do_wd: bool = True,
    grad_avg: Any = None, **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """LARS: momentum over steps of which each is a fixed part of its tensor's norm.

    Formula: ``λ = trust_coefficient·‖p‖ / (‖g‖ + wd·‖p‖ + eps)``, or 1 if ``‖p‖`` or ``‖g‖`` is 0;
    ``m ← mom·m + lr·λ·(g + wd·p)`` from zero; ``p ← p - m``.
    Args: `lr`, `mom`, `wd`, `trust_coefficient`, `eps` (gradient units) numbers; `do_wd` per-parameter flag (False: no
    decay, but the ratio holds); `grad_avg` tensor.
    State: ``grad_avg`` (m, in parameter units).
    Source: You et al., "Large Batch Training of Convolutional Networks", arXiv:1708.03888, algorithm 1.
    Deviations: the ratio of tensors without a norm, which would never move, and `eps`. `callbacks.larc_layer_lr` has
    the ratio too, but outside of the momentum, as NVIDIA's LARC.
    """
    grad = p.grad.data
    if grad_avg is None:
        grad_avg = torch.zeros_like(grad)
    decay = wd if do_wd else 0.0
    p_norm, g_norm = torch.norm(p.data), torch.norm(grad)
    ratio = (
        1.0 if p_norm == 0 or g_norm == 0 else trust_coefficient * p_norm / (g_norm + decay * p_norm + eps)
    )
    grad_avg.mul_(mom).add_((grad + decay * p.data) * (lr * ratio))
    p.data.sub_(grad_avg)
    return {"grad_avg": grad_avg}


lars_step.defaults = dict(mom=0.9, wd=0.0, trust_coefficient=1e-3, eps=0.0)


@described(lars_step)
class LARS(TorchFace):
    """LARS: see `lars_step`. Biases and norms' weights are better put into a group of another optimizer.

    Args: the paper gives `lr` for each task (defaults here: 0.1), `trust_coefficient` 0.001, the part of a tensor's
    norm that a step may have, `momentum` 0.9 and `weight_decay` 0.0005.
    State: ``momentum_buffer``.
    """

    state_names: ClassVar[dict[str, str]] = MOMENTUM
    _not_negative = ("trust_coefficient",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        trust_coefficient: float = 1e-3,
        eps: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        self._start([callbacks.maximize_grad, lars_step], locals())
