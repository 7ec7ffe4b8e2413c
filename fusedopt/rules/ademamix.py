"""AdEMAMix: Adam with a second, much slower average of the gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..callbacks import debias
from ..optimizer.described import described
from ..optimizer.names import Place
from ..optimizer.torch_face import TorchFace
from .parts import dampened

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def ademamix_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, slow_mom: Any, alpha: Any, eps: Any, step: Any, grad_avg: Any,
    sqr_avg: Any, alpha_warmup: Any = None, beta3_warmup: Any = None, slow_avg: Any = None, **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """AdEMAMix: Adam's step plus `alpha` times an average over very many gradients.

    Formula: ``s ← β₃·s + (1 - β₃)·g`` from zero; ``p ← p - lr·(m̂ + α·s) / (√v̂ + eps)``, hats as in Adam. While
    ``t < beta3_warmup``, β₃ goes from `mom` to `slow_mom` so that the average's half-life grows evenly; while
    ``t < alpha_warmup``, ``α = alpha·t / alpha_warmup``.
    Args: `lr`, `mom`, `sqr_mom`, `slow_mom`, `alpha`, `eps` numbers; `alpha_warmup`, `beta3_warmup` numbers of steps,
    or None; `step` int; `grad_avg` (dampened), `sqr_avg`, `slow_avg` tensors.
    State: ``slow_avg`` (s); reads ``grad_avg``, ``sqr_avg``, ``step``.
    Source: Pagliardini et al., "The AdEMAMix Optimizer", arXiv:2409.03137, and its authors' code.
    Deviations: none from the code. It and the paper divide no bias of s away.
    """
    if slow_avg is None:
        slow_avg = torch.zeros_like(p.grad.data)
    if alpha_warmup:
        alpha = alpha * min(step / alpha_warmup, 1.0)
    if beta3_warmup and step < beta3_warmup:
        done = step / beta3_warmup
        half_life = (1 - done) * half_life_of(mom) + done * half_life_of(slow_mom)
        slow_mom = 0.5 ** (1 / (half_life + 1))
    slow_avg.mul_(slow_mom).add_(p.grad.data, alpha=1 - slow_mom)
    denom = (sqr_avg / debias(sqr_mom, 1 - sqr_mom, step)).sqrt().add_(eps)
    update = grad_avg / debias(mom, 1 - mom, step) + slow_avg * alpha
    p.data.addcdiv_(update, denom, value=-lr)
    return {"slow_avg": slow_avg}


ademamix_step.defaults = dict(eps=1e-8, slow_mom=0.9999, alpha=2.0)


def half_life_of(mom: Any) -> Any:
    """In how many steps what has entered a running average comes to weigh half as much, less one.

    Formula: ``log ½ / log(mom + 1e-8) - 1``.
    Args: `mom` number in [0, 1). Returns a number of steps.
    Source: arXiv:2409.03137, appendix A; the 1e-8, for a `mom` of 0, is the code's.
    """
    return math.log(0.5) / math.log(mom + 1e-8) - 1


_CBS = [
    callbacks.maximize_grad,
    callbacks.weight_decay,
    dampened,
    callbacks.average_sqr_grad,
    callbacks.step_stat,
    ademamix_step,
]


@described(callbacks.weight_decay, dampened, callbacks.average_sqr_grad, ademamix_step)
class AdEMAMix(TorchFace):
    """AdEMAMix with decoupled weight decay: see `ademamix_step`.

    Args: `betas`: of gradients, of squares, of the slow average of gradients, each in [0, 1); `alpha`: how much the
    slow average counts; `beta3_warmup`, `alpha_warmup`: in how many steps its beta and `alpha` reach their values,
    None: at once.
    State: ``step``, ``exp_avg``, ``exp_avg_sq``, ``exp_avg_slow``.
    """

    state_names: ClassVar[dict[str, str]] = {
        "grad_avg": "exp_avg",
        "sqr_avg": "exp_avg_sq",
        "slow_avg": "exp_avg_slow",
    }
    hyper_names: ClassVar[dict[str, Place]] = {
        "mom": ("betas", 0),
        "sqr_mom": ("betas", 1),
        "slow_mom": ("betas", 2),
    }
    _betas = 3

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: int | None = None,
        alpha_warmup: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        self._start(_CBS, locals())
