"""AdaBelief: Adam whose second moment is of what the gradient does unexpectedly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..callbacks import adam_step, radam_step
from ..optimizer.described import described
from ..optimizer.torch_face import TorchFace
from .parts import dampened

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def average_sqr_surprise(
    p: Any, sqr_mom: Any, eps: Any, grad_avg: Any, sqr_avg: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """Running average of the squared distance of the gradient from its own average.

    Formula: ``s ← sqr_mom·s + (1 - sqr_mom)·(g - m)² + eps``; s starts at zero.
    Args: `sqr_mom`, `eps` numbers (`eps` in gradient units squared); `grad_avg` (dampened), `sqr_avg` tensors.
    State: ``sqr_avg`` (s); reads ``grad_avg``, which has this step's gradient in it already.
    Source: Zhuang et al., "AdaBelief Optimizer", arXiv:2010.07468, algorithm 2.
    Deviations: none. `eps` stays in s and adds up, as in the paper.
    """
    if sqr_avg is None:
        sqr_avg = torch.zeros_like(p.grad.data)
    surprise = p.grad.data - grad_avg
    sqr_avg.mul_(sqr_mom).addcmul_(surprise, surprise, value=1 - sqr_mom).add_(eps)
    return {"sqr_avg": sqr_avg}


average_sqr_surprise.defaults = dict(sqr_mom=0.999, eps=1e-16)


def adabelief_step(
    p: Any, lr: Any, mom: Any, step: Any, sqr_mom: Any, grad_avg: Any, sqr_avg: Any, eps: Any,
    rectify: bool = False, **kwargs: Any,
) -> None:  # fmt: skip
    """Adam's step, or RAdam's if `rectify`.

    Formula: `callbacks.adam_step`; `callbacks.radam_step` with `eps_before_debias`.
    Args: `lr`, `mom`, `sqr_mom`, `eps` numbers; `step` int; `rectify` flag; `grad_avg` (dampened), `sqr_avg` tensors.
    State: none; reads ``grad_avg``, ``sqr_avg``, ``step``.
    Source: arXiv:2010.07468; `rectify` as in its authors' code.
    Deviations: none.
    """
    if rectify:
        radam_step(p, lr, mom, step, sqr_mom, grad_avg, sqr_avg, eps, eps_before_debias=True)
    else:
        adam_step(p, lr, mom, step, sqr_mom, grad_avg, sqr_avg, eps)


adabelief_step.defaults = dict(eps=1e-16)

_CBS = [
    callbacks.maximize_grad,
    callbacks.weight_decay,
    dampened,
    average_sqr_surprise,
    callbacks.step_stat,
    adabelief_step,
]


@described(callbacks.weight_decay, dampened, average_sqr_surprise, adabelief_step)
class AdaBelief(TorchFace):
    """AdaBelief: `average_sqr_surprise` in the place of Adam's second moment, rectified as RAdam.

    Args: `eps`: in gradient units squared; `rectify` is of the authors' code; without it, this is the paper's
    algorithm.
    State: ``step``, ``exp_avg``, ``exp_avg_var``.
    """

    state_names: ClassVar[dict[str, str]] = {"grad_avg": "exp_avg", "sqr_avg": "exp_avg_var"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        *,
        rectify: bool = True,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        self._start(_CBS, locals())
