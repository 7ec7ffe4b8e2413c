"""signSGD, with momentum: only the sign of the averaged gradient counts."""

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


def sign_step(p: Any, lr: Any, grad_avg: Any, **kwargs: Any) -> None:
    """Every element moves by `lr`, against the sign of the average.

    Formula: ``p ← p - lr·sign(m)``.
    Args: `lr` number, in parameter units; `grad_avg` (dampened or not) tensor.
    State: none; reads ``grad_avg``.
    Source: Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", arXiv:1802.04434, algorithm 2.
    Deviations: none.
    """
    p.data.sub_(grad_avg.sign(), alpha=lr)


@described(callbacks.weight_decay, dampened, sign_step)
class Signum(TorchFace):
    """signSGD with momentum and decoupled weight decay: see `sign_step`; ``momentum=0`` is signSGD.

    Args: `lr`: what every element moves by, in parameter units.
    State: ``momentum_buffer``.
    """

    state_names: ClassVar[dict[str, str]] = MOMENTUM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        self._start([callbacks.maximize_grad, callbacks.weight_decay, dampened, sign_step], locals())
