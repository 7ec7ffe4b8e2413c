"""Tiger: Signum, as it was found to be enough for language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .. import callbacks
from ..optimizer.described import described
from ..optimizer.names import Place
from ..optimizer.torch_face import TorchFace, check_betas
from .parts import dampened
from .signum import sign_step

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


@described(callbacks.weight_decay, dampened, sign_step)
class Tiger(TorchFace):
    """Tiger: `signum.sign_step` with one decay rate, and decoupled weight decay.

    Args: `lr`: what every element moves by, in parameter units; `beta`: weight of the old average, in [0, 1).
    State: ``exp_avg``.
    Source: Su, "Tiger: A Tight-fisted Optimizer", 2023, github.com/bojone/tiger.
    Deviations: gradient accumulation in the average, learning rates by layer and the start-up for NaN are left out.
    """

    state_names: ClassVar[dict[str, str]] = {"grad_avg": "exp_avg"}
    hyper_names: ClassVar[dict[str, Place]] = {"mom": "beta"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        beta: float = 0.965,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        check_betas((beta,), 1)
        self._start([callbacks.maximize_grad, callbacks.weight_decay, dampened, sign_step], locals())
