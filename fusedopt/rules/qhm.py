"""QHM: SGD between a plain step and one with momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from .. import callbacks
from ..optimizer.described import described
from ..optimizer.names import MOMENTUM
from ..optimizer.torch_face import TorchFace
from .parts import dampened

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def qhm_step(p: Any, lr: Any, nu: Any, grad_avg: Any, **kwargs: Any) -> None:
    """Quasi-hyperbolic momentum: a blend of the gradient and its average.

    Formula: ``p ← p - lr·((1 - nu)·g + nu·m)``.
    Args: `lr`, `nu` numbers; `grad_avg` (dampened) tensor.
    State: none; reads ``grad_avg``.
    Source: Ma & Yarats, "Quasi-hyperbolic momentum and Adam for deep learning", arXiv:1810.06801.
    Deviations: none.
    """
    p.data.sub_((1 - nu) * p.grad.data + nu * grad_avg, alpha=lr)


qhm_step.defaults = dict(nu=0.7)


@described(callbacks.l2_reg, dampened, qhm_step)
class QHM(TorchFace):
    """QHM: see `qhm_step`. Weight decay is L2.

    Args: `nu`: weight of the average against the gradient itself.
    State: ``momentum_buffer``.
    """

    state_names: ClassVar[dict[str, str]] = MOMENTUM
    _not_negative = ("nu",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.999,
        nu: float = 0.7,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        self._start([callbacks.maximize_grad, callbacks.l2_reg, dampened, qhm_step], locals())
