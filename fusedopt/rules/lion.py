"""Lion: the sign of a momentum that was found by a search over programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..optimizer.described import described
from ..optimizer.torch_face import TorchFace

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def lion_step(p: Any, lr: Any, mom: Any, sqr_mom: Any, grad_avg: Any = None, **kwargs: Any) -> dict[str, Any]:
    """Lion: every element moves by `lr`, in the direction in which the gradient and its average agree.

    Formula: ``p ← p - lr·sign(mom·m + (1 - mom)·g); m ← sqr_mom·m + (1 - sqr_mom)·g``; m starts at zero.
    Args: `lr`, `mom`, `sqr_mom` numbers (the paper's β₁ and β₂); `grad_avg` tensor.
    State: ``grad_avg`` (m).
    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, algorithm 2.
    Deviations: none.
    """
    if grad_avg is None:
        grad_avg = torch.zeros_like(p.grad.data)
    p.data.sub_((grad_avg * mom).add_(p.grad.data, alpha=1 - mom).sign_(), alpha=lr)
    grad_avg.mul_(sqr_mom).add_(p.grad.data, alpha=1 - sqr_mom)
    return {"grad_avg": grad_avg}


lion_step.defaults = dict(mom=0.9, sqr_mom=0.99)


@described(callbacks.weight_decay, lion_step)
class Lion(TorchFace):
    """Lion with decoupled weight decay: see `lion_step`.

    Args: `lr`: what every element moves by, in parameter units.
    State: ``exp_avg``.
    """

    state_names: ClassVar[dict[str, str]] = {"grad_avg": "exp_avg"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        self._start([callbacks.maximize_grad, callbacks.weight_decay, lion_step], locals())
