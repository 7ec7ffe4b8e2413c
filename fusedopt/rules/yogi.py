"""Yogi: Adam whose second moment moves by steps of the squared gradient, up or down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..optimizer.described import described
from ..optimizer.names import MOMENTS
from ..optimizer.torch_face import TorchFace
from .first import first_step
from .parts import dampened

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def average_sqr_yogi(
    p: Any, sqr_mom: Any, step: Any, initial_accumulator_value: Any, sqr_avg: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """A second moment that changes additively, so that it forgets large gradients slowly.

    Formula: ``v ← v - (1 - sqr_mom)·sign(v - g²)·g²``; v starts at `initial_accumulator_value`.
    Args: `sqr_mom` number in [0, 1]; `initial_accumulator_value` number, in gradient units squared; `step` int;
    `sqr_avg` tensor.
    State: ``sqr_avg`` (v); reads ``step``.
    Source: Zaheer et al., "Adaptive Methods for Nonconvex Optimization", NeurIPS 2018, algorithm 2.
    Deviations: none.
    """
    if sqr_avg is None:
        sqr_avg = torch.zeros_like(p.grad.data)
    sqr_avg.add_(initial_accumulator_value * first_step(step))
    sqr_grad = p.grad.data**2
    sqr_avg.sub_((sqr_avg - sqr_grad).sign_() * sqr_grad, alpha=1 - sqr_mom)
    return {"sqr_avg": sqr_avg}


average_sqr_yogi.defaults = dict(sqr_mom=0.999, initial_accumulator_value=1e-6)


_CBS = [
    callbacks.maximize_grad,
    callbacks.l2_reg,
    dampened,
    callbacks.step_stat,
    average_sqr_yogi,
    callbacks.adam_step,
]


@described(callbacks.l2_reg, dampened, average_sqr_yogi, callbacks.adam_step)
class Yogi(TorchFace):
    """Yogi: `average_sqr_yogi` in the place of Adam's second moment; weight decay is L2.

    Args: `initial_accumulator_value`: what the second moment starts with, in gradient units squared.
    State: ``step``, ``exp_avg``, ``exp_avg_sq``.
    Deviations: from the paper's algorithm: Adam's bias corrections, as in its first author's code (TensorFlow Addons,
    which adds eps before the second moment's correction). The first moment starts at zero, in torch-optimizer and optax
    at ``initial_accumulator_value``.
    """

    state_names: ClassVar[dict[str, str]] = MOMENTS

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-3,
        initial_accumulator_value: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        self._start(_CBS, locals())
