"""AdamP: Adam without the part of its step along a weight whose scale does not matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from .. import callbacks
from ..callbacks import debias
from ..optimizer.described import described
from ..optimizer.names import MOMENTS
from ..optimizer.torch_face import TorchFace
from .parts import dampened
from .projected import projected

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def adamp_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, eps: Any, wd: Any, delta: Any, wd_ratio: Any, step: Any,
    grad_avg: Any, sqr_avg: Any, nesterov: bool = False, do_wd: bool = True, **kwargs: Any,
) -> None:  # fmt: skip
    """AdamP: Adam's step, projected for weights whose gradients are about orthogonal to them.

    Formula: ``u = m / (√(v / (1 - sqr_mom^t)) + eps)``, with `nesterov` ``mom·m + (1 - mom)·g`` for m; ``u, r``
    are projected with `delta` and `wd_ratio` (`projected.projected`); ``p ← p·(1 - lr·wd·r) - lr / (1 - mom^t)·u``.
    Args: `lr`, `mom`, `sqr_mom`, `eps` (gradient units), `wd`, `delta`, `wd_ratio` numbers; `step` int; `grad_avg`
    (dampened), `sqr_avg` tensors; `nesterov` flag; `do_wd` per-parameter flag.
    State: none; reads ``grad_avg`` (m), ``sqr_avg`` (v), ``step`` and the flag ``do_wd``.
    Source: Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
    arXiv:2006.08217, algorithm 2, in the form of its authors' code.
    Deviations: none.
    """
    grad = p.grad.data
    update = grad_avg * mom + grad * (1 - mom) if nesterov else grad_avg
    update = update / (sqr_avg / debias(sqr_mom, 1 - sqr_mom, step)).sqrt().add_(eps)
    update, ratio = projected(update, grad, p.data, delta, wd_ratio, eps)
    if do_wd and wd != 0:
        p.data.mul_(1 - lr * wd * ratio)
    p.data.sub_(update, alpha=lr / debias(mom, 1 - mom, step))


adamp_step.defaults = dict(eps=1e-8, wd=0.0, delta=0.1, wd_ratio=0.1)

_CBS = [callbacks.maximize_grad, dampened, callbacks.average_sqr_grad, callbacks.step_stat, adamp_step]


@described(dampened, callbacks.average_sqr_grad, adamp_step)
class AdamP(TorchFace):
    """AdamP: see `adamp_step`. Decay is decoupled.

    Args: `delta`: below which cosine, times the root of a row's length, a gradient counts as orthogonal; `wd_ratio`: of
    the decay of such weights to that of others; `nesterov`: whether to look ahead along the momentum.
    State: ``step``, ``exp_avg``, ``exp_avg_sq``.
    """

    state_names: ClassVar[dict[str, str]] = MOMENTS
    _not_negative = ("delta", "wd_ratio")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        self._start(_CBS, locals())
