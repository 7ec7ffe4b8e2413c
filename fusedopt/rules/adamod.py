"""AdaMod: Adam whose learning rates may not exceed their own running average."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..callbacks import debias
from ..optimizer.described import described
from ..optimizer.names import Place
from ..optimizer.torch_face import TorchFace, check_betas
from .parts import dampened

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def adamod_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, lr_mom: Any, step: Any, grad_avg: Any, sqr_avg: Any, eps: Any,
    lr_avg: Any = None, **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """AdaMod: Adam's learning rate for each element, bounded by its average over the steps so far.

    Formula: ``η = lr·√(1 - sqr_mom^t) / (1 - mom^t) / (√v + eps)``; ``s ← lr_mom·s + (1 - lr_mom)·η`` from zero;
    ``p ← p - min(η, s)·m``.
    Args: `lr`, `mom`, `sqr_mom`, `lr_mom` (β₃), `eps` (gradient units) numbers; `step` int; `grad_avg` (dampened),
    `sqr_avg`, `lr_avg` tensors.
    State: ``lr_avg`` (s); reads ``grad_avg``, ``sqr_avg``, ``step``.
    Source: Ding et al., "An Adaptive and Momental Bound Method for Stochastic Learning", arXiv:1910.12249, and its
    authors' code.
    Deviations: none from the code.
    """
    if lr_avg is None:
        lr_avg = torch.zeros_like(p.grad.data)
    size = lr * debias(sqr_mom, 1 - sqr_mom, step) ** 0.5 / debias(mom, 1 - mom, step)
    rates = size / sqr_avg.sqrt().add_(eps)
    lr_avg.mul_(lr_mom).add_(rates, alpha=1 - lr_mom)
    p.data.sub_(torch.minimum(rates, lr_avg) * grad_avg)
    return {"lr_avg": lr_avg}


adamod_step.defaults = dict(eps=1e-8, lr_mom=0.999)


_CBS = [
    callbacks.maximize_grad,
    callbacks.weight_decay,
    dampened,
    callbacks.average_sqr_grad,
    callbacks.step_stat,
    adamod_step,
]


@described(callbacks.weight_decay, dampened, callbacks.average_sqr_grad, adamod_step)
class AdaMod(TorchFace):
    """AdaMod with decoupled weight decay: see `adamod_step`.

    Args: `beta3`: weight of the old average of learning rates in the new one, in [0, 1).
    State: ``step``, ``exp_avg``, ``exp_avg_sq``, ``exp_avg_lr``.
    """

    state_names: ClassVar[dict[str, str]] = {
        "grad_avg": "exp_avg",
        "sqr_avg": "exp_avg_sq",
        "lr_avg": "exp_avg_lr",
    }
    hyper_names: ClassVar[dict[str, Place]] = {"lr_mom": "beta3"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        check_betas((beta3,), 1)
        self._start(_CBS, locals())
