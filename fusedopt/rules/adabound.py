"""AdaBound: Adam that becomes SGD, as bounds around its learning rates close."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from .. import callbacks
from ..callbacks import debias
from ..optimizer.described import described
from ..optimizer.names import MOMENTS
from ..optimizer.torch_face import TorchFace
from .parts import dampened

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def adabound_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, step: Any, grad_avg: Any, sqr_avg: Any, eps: Any, final_lr: Any,
    gamma: Any, base_lr: Any, **kwargs: Any,
) -> None:  # fmt: skip
    """AdaBound: Adam's learning rate for each element, between bounds that end where SGD's would be.

    Formula: ``η = lr·√(1 - sqr_mom^t) / (1 - mom^t) / (√v + eps)``; ``f = final_lr·lr / base_lr``;
    ``p ← p - clip(η, f·(1 - 1/(gamma·t + 1)), f·(1 + 1/(gamma·t)))·m``.
    Args: `lr`, `mom`, `sqr_mom`, `eps` (gradient units), `final_lr` (of SGD), `gamma`, `base_lr` numbers; `step` int;
    `grad_avg` (dampened), `sqr_avg` tensors.
    State: none; reads ``grad_avg``, ``sqr_avg``, ``step``.
    Source: Luo et al., "Adaptive Gradient Methods with Dynamic Bound of Learning Rate", arXiv:1902.09843, and its
    authors' code, where a schedule of `lr` moves the bounds too.
    Deviations: AMSBound is left out.
    """
    size = lr * debias(sqr_mom, 1 - sqr_mom, step) ** 0.5 / debias(mom, 1 - mom, step)
    final = final_lr * lr / base_lr
    lowest, highest = final * (1 - 1 / (gamma * step + 1)), final * (1 + 1 / (gamma * step))
    p.data.sub_((size / sqr_avg.sqrt().add_(eps)).clamp_(lowest, highest) * grad_avg)


adabound_step.defaults = dict(eps=1e-8, final_lr=0.1, gamma=1e-3)


_CBS = [
    callbacks.maximize_grad,
    callbacks.l2_reg,
    dampened,
    callbacks.average_sqr_grad,
    callbacks.step_stat,
    adabound_step,
]


@described(callbacks.l2_reg, dampened, callbacks.average_sqr_grad, adabound_step)
class AdaBound(TorchFace):
    """AdaBound: see `adabound_step`. Weight decay is L2, as in the authors' code.

    Args: `lr`: one number above 0; `final_lr`: the learning rate of SGD that the bounds meet at; `gamma`: how fast they
    do, in (0, 1). ``base_lr`` of a group is the learning rate that `final_lr` belongs to: `lr`, unless the group says
    otherwise.
    State: ``step``, ``exp_avg``, ``exp_avg_sq``.
    Raises: ValueError: another `lr` or `gamma`.
    """

    state_names: ClassVar[dict[str, str]] = MOMENTS
    _not_negative = ("final_lr",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        final_lr: float = 0.1,
        gamma: float = 1e-3,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        if not isinstance(lr, (int, float)) or not lr > 0:
            raise ValueError(
                f"Invalid learning rate: {lr}; AdaBound's bounds are relative to one number above 0"
            )
        if not 0.0 < gamma < 1.0:
            raise ValueError(f"Invalid gamma value: {gamma}; it must be between 0 and 1")
        self._start(_CBS, locals(), base_lr=lr)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `Optimizer.add_param_group`; the own ``lr`` of ``param_group`` is its ``base_lr`` too."""
        if isinstance(param_group, dict) and "lr" in param_group:
            param_group.setdefault("base_lr", param_group["lr"])
        super().add_param_group(param_group)
