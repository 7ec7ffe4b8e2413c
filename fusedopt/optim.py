"""torch.optim's optimizers on fused kernels: ``import fusedopt.optim as optim`` in place of ``torch.optim``.

The classes below have torch.optim's arguments, defaults, param-group keys, state names and results (to
rounding). Every other name of ``torch.optim`` (``LBFGS``, ``lr_scheduler``, ``Optimizer``, ...) is torch's
own object.

What differs from torch.optim, for all of them:
- ``foreach`` and ``fused`` are accepted and kept; they choose nothing, since every step is one fused kernel.
- ``differentiable=True`` is refused: see `fusedopt.optimizer.torch_face`.
- ``capturable=True`` keeps all numbers of the state on the device, also on a CPU, and graphs can be replayed with other
  hyperparameters: see `Optimizer.upload_hypers`. Every class takes it.
- Every class takes `Optimizer`'s own options: see `fusedopt.optimizer.Options`.
- NaN is refused wherever a negative number is (torch lets some of them pass); betas may be ints; one-element
  tensors for anything but ``lr`` become floats; ``lr`` may also be a slice or a list, one value per param
  group.
- A flag or number that a param group sets for itself holds for that group.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .callbacks import (
    adadelta_step,
    adagrad_step,
    adam_step,
    adamax_step,
    average_grad,
    average_sqr_grad,
    flagged_weight_decay,
    l2_reg,
    maximize_grad,
    nadam_step,
    radam_step,
    rms_momentum_step,
    sgd_momentum_step,
    step_stat,
)
from .classes import fuse
from .optimizer import AllOptions, Options
from .optimizer.described import described
from .optimizer.names import MOMENTS, MOMENTUM
from .optimizer.torch_face import TorchFace

if TYPE_CHECKING:  # what __getattr__ finds, with torch's types
    from torch.optim import ASGD as ASGD
    from torch.optim import LBFGS as LBFGS
    from torch.optim import Adafactor as Adafactor
    from torch.optim import Muon as Muon
    from torch.optim import Optimizer as Optimizer
    from torch.optim import Rprop as Rprop
    from torch.optim import SparseAdam as SparseAdam
    from torch.optim import lr_scheduler as lr_scheduler
    from torch.optim import swa_utils as swa_utils
    from torch.optim import swap_in_optimizer_params_and_state as swap_in_optimizer_params_and_state
    from typing_extensions import Unpack

__all__ = [*torch.optim.__all__]

_AS_THEY_ARE = ("Optimizer", "LBFGS", "SparseAdam")
"""torch's classes whose steps are never fused."""

_dampened = partial(average_grad, dampening=True)
_radam_step = partial(radam_step, beta=0.0, eps_before_debias=True)
_ADAM = [maximize_grad, flagged_weight_decay, _dampened, average_sqr_grad, step_stat, adam_step]


# ------------------------------------------------------------------------------------------------------------
# The optimizers


@described(l2_reg, sgd_momentum_step)
class SGD(TorchFace):
    """torch.optim.SGD.

    Args: `dampening`: how much less than 1 a gradient counts in the momentum; `nesterov`: whether to look ahead along
    it.
    State: ``momentum_buffer`` while momentum is not 0.
    Raises: ValueError: `nesterov` without momentum, or with dampening.
    """

    state_names: ClassVar[dict[str, str]] = MOMENTUM
    _looks_first = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[AllOptions],
    ) -> None:
        if dampening != dampening:
            raise ValueError(f"Invalid dampening value: {dampening}")
        self._start([maximize_grad, l2_reg, sgd_momentum_step], locals())
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")


@described(l2_reg, average_sqr_grad, rms_momentum_step)
class RMSprop(TorchFace):
    """torch.optim.RMSprop.

    Args: `alpha`: weight of the old average of squared gradients in the new one; `centered`: divide by the root of
    their variance.
    State: ``step``, ``square_avg``, ``momentum_buffer`` while momentum is not 0, ``grad_avg`` if centered.
    """

    state_names: ClassVar[dict[str, str]] = {"sqr_avg": "square_avg"}
    hyper_names: ClassVar[dict[str, str]] = {"mom": "momentum", "sqr_mom": "alpha"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._start([maximize_grad, l2_reg, step_stat, average_sqr_grad, rms_momentum_step], locals())


@described(flagged_weight_decay, _dampened, average_sqr_grad, adam_step)
class Adam(TorchFace):
    """torch.optim.Adam.

    Args: `amsgrad`: divide by the root of the largest second moment so far; `decoupled_weight_decay`: AdamW's decay.
    State: ``step``, ``exp_avg``, ``exp_avg_sq``, and ``max_exp_avg_sq`` if amsgrad.
    """

    state_names: ClassVar[dict[str, str]] = {**MOMENTS, "max_sqr_avg": "max_exp_avg_sq"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._start(_ADAM, locals())


@described(flagged_weight_decay, _dampened, average_sqr_grad, adam_step)
class AdamW(Adam):
    """torch.optim.AdamW: Adam whose weight decay is always decoupled, also after loading an Adam's state.

    Args: `amsgrad`: divide by the root of the largest second moment so far.
    State: ``step``, ``exp_avg``, ``exp_avg_sq``, and ``max_exp_avg_sq`` if amsgrad.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._start(_ADAM, locals(), decoupled_weight_decay=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True


@described(l2_reg, adagrad_step)
class Adagrad(TorchFace):
    """torch.optim.Adagrad.

    Args: `lr_decay`: per step, ``lr / (1 + (t - 1)·lr_decay)``; `initial_accumulator_value`: what the sum of squares
    starts with, in gradient units squared.
    State: ``step``, ``sum``, from the first step on.
    """

    state_names: ClassVar[dict[str, str]] = {"sqr_sum": "sum"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[AllOptions],
    ) -> None:
        self._start([maximize_grad, l2_reg, step_stat, adagrad_step], locals())

    def share_memory(self) -> None:
        """Refused: sums are made with the first step, and step counts are Python numbers of one process."""
        raise NotImplementedError(
            "fusedopt's Adagrad keeps its step counts in this process, so its state cannot be shared between "
            "processes; use torch.optim.Adagrad for that"
        )


@described(l2_reg, _dampened, adamax_step)
class Adamax(TorchFace):
    """torch.optim.Adamax.

    State: ``step``, ``exp_avg``, ``exp_inf``.
    """

    state_names: ClassVar[dict[str, str]] = {"grad_avg": "exp_avg", "inf_avg": "exp_inf"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._start([maximize_grad, l2_reg, _dampened, step_stat, adamax_step], locals())


@described(flagged_weight_decay, _dampened, average_sqr_grad, nadam_step)
class NAdam(TorchFace):
    """torch.optim.NAdam.

    Args: `momentum_decay`: how fast the momentum warms up, per step; `decoupled_weight_decay`: AdamW's decay.
    State: ``step``, ``mu_product`` (both numbers), ``exp_avg``, ``exp_avg_sq``.
    """

    state_names: ClassVar[dict[str, str]] = MOMENTS

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._start(
            [maximize_grad, flagged_weight_decay, _dampened, average_sqr_grad, step_stat, nadam_step],
            locals(),
        )


@described(flagged_weight_decay, _dampened, average_sqr_grad, _radam_step)
class RAdam(TorchFace):
    """torch.optim.RAdam: `callbacks.radam_step` with eps inside the bias correction (``eps_before_debias``).

    Args: `decoupled_weight_decay`: AdamW's decay.
    State: ``step``, ``exp_avg``, ``exp_avg_sq``.
    """

    state_names: ClassVar[dict[str, str]] = MOMENTS

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._start(
            [maximize_grad, flagged_weight_decay, _dampened, average_sqr_grad, step_stat, _radam_step],
            locals(),
        )


@described(l2_reg, average_sqr_grad, adadelta_step)
class Adadelta(TorchFace):
    """torch.optim.Adadelta.

    Args: `rho`: weight of the old averages of squares in the new ones, in [0, 1].
    State: ``step``, ``square_avg``, ``acc_delta``.
    Raises: ValueError: another `rho`.
    """

    state_names: ClassVar[dict[str, str]] = {"sqr_avg": "square_avg", "sqr_delta": "acc_delta"}
    hyper_names: ClassVar[dict[str, str]] = {"sqr_mom": "rho"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        if not 0.0 <= rho <= 1.0:
            raise ValueError(f"Invalid rho value: {rho}")
        self._start([maximize_grad, l2_reg, step_stat, average_sqr_grad, adadelta_step], locals())


# ------------------------------------------------------------------------------------------------------------
# Everything else is torch's


if not TYPE_CHECKING:  # else every name would be there, and be anything

    def __getattr__(name: str) -> Any:
        if not name.startswith("__") and hasattr(torch.optim, name):
            found = getattr(torch.optim, name)
            if (
                isinstance(found, type)
                and issubclass(found, torch.optim.Optimizer)
                and name not in _AS_THEY_ARE
            ):
                found = globals()[name] = fuse(found)
            return found
        rules = sys.modules[f"{__package__}.rules"]
        where = f"; it is {rules.__name__}.{name}" if isinstance(vars(rules).get(name), type) else ""
        missing = f"module {__name__!r} has no attribute {name!r}, and neither has torch.optim{where}"
        raise AttributeError(missing, name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted({*globals(), *(n for n in dir(torch.optim) if not n.startswith("_"))})
