"""Schedule-Free: an average of the weights instead of a schedule of the learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..callbacks import debias
from ..optimizer.described import described
from ..optimizer.torch_face import TorchFace
from .first import first_step

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def schedule_free_step(
    p: Any, lr: Any, mom: Any, wd: Any, step: Any, warmup_steps: Any, r: Any, weight_lr_power: Any,
    train_mode: bool = True, do_wd: bool = True, z: Any = None, lr_max: Any = 0.0, weight_sum: Any = 0.0,
    **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """Schedule-Free: step the iterate z, and move y, where gradients are taken, along with it and with the average.

    Formula: ``η = lr·min(t / warmup_steps, 1)``; ``η_max ← max(η_max, η)``; ``w = t^r · η_max^weight_lr_power``;
    ``W ← W + w``; ``c = w / W``, or 0 where W is; ``u = g + wd·y``; ``y ← y + c·(z - y) + η·(mom·(1 - c) - 1)·u``;
    ``z ← z - η·u``. The parameter is y, z starts as it; the average ``x = y + (1 - 1/mom)·(z - y)`` is not stored.
    Args: `lr`, `mom` (in (0, 1), y's share of x), `wd`, `warmup_steps` (steps), `r`, `weight_lr_power` numbers; `step`
    int; `train_mode` flag; `do_wd` per-parameter flag; `z` tensor; `lr_max`, `weight_sum` numbers.
    State: ``z``, in parameter units, ``lr_max`` (η_max), ``weight_sum`` (W); reads ``step`` and the flag ``do_wd``.
    Raises: RuntimeError unless `train_mode`.
    Source: Defazio et al., "The Road Less Scheduled", arXiv:2405.15682, and its authors' code.
    Deviations: η_max and W belong to each parameter, so that one that misses gradients has its own; in the code to the
    group. z is stored as zeros before the first step, which then finds the parameter in its place.
    """
    if not train_mode:
        raise RuntimeError(
            "the parameters are the averaged ones of eval(); call the optimizer's train() before it steps"
        )
    if z is None:
        z = torch.zeros_like(p.data)
    if warmup_steps:
        lr = lr * min(step / warmup_steps, 1.0)
    lr_max = max(lr_max, lr)
    weight = step**r * lr_max**weight_lr_power
    weight_sum = weight_sum + weight
    new = weight / weight_sum if weight_sum else 0.0
    z.add_(p.data, alpha=first_step(step))
    update = p.grad.data
    if do_wd and wd != 0:
        update = update + wd * p.data
    p.data.lerp_(z, new).add_(update, alpha=lr * (mom * (1 - new) - 1))
    z.sub_(update, alpha=lr)
    return {"z": z, "lr_max": lr_max, "weight_sum": weight_sum}


schedule_free_step.defaults = dict(mom=0.9, wd=0.0, warmup_steps=0, r=0.0, weight_lr_power=2.0)


def divide_by_rms(p: Any, sqr_mom: Any, sqr_avg: Any, eps: Any, step: Any, **kwargs: Any) -> None:
    """Divide the gradient by the root of its second moment, as RMSProp does, but with Adam's bias correction.

    Formula: ``g ← g / (√v̂ + eps)``, ``v̂ = v / (1 - sqr_mom^t)``.
    Args: `sqr_mom`, `eps` numbers (`eps` in gradient units); `step` int; `sqr_avg` tensor.
    State: none; reads ``sqr_avg``, ``step``.
    Source: Kingma & Ba, arXiv:1412.6980, with a β₁ of 0.
    Deviations: none.
    """
    p.grad.data.div_((sqr_avg / debias(sqr_mom, 1 - sqr_mom, step)).sqrt().add_(eps))


divide_by_rms.defaults = dict(eps=1e-8)


_SGD = [callbacks.maximize_grad, callbacks.step_stat, schedule_free_step]
_ADAMW = [
    callbacks.maximize_grad,
    callbacks.average_sqr_grad,
    callbacks.step_stat,
    divide_by_rms,
    schedule_free_step,
]


class _ScheduleFree(TorchFace):
    """An optimizer whose parameters are y in training, and x, the averaged weights, otherwise."""

    _not_negative = ("r", "weight_lr_power", "warmup_steps")

    @torch.no_grad()
    def _swap(self, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] is train_mode:
                continue
            group["train_mode"] = train_mode
            mom = group["betas"][0] if "betas" in group else group["momentum"]
            found = [p for p in group["params"] if "z" in self.state.get(p, {})]
            targets = [self.state[p]["z"].to(p.dtype) for p in found]
            if found:
                torch._foreach_lerp_(found, targets, 1 - mom if train_mode else 1 - 1 / mom)

    def train(self) -> None:
        """Make the parameters what gradients are taken at (y). This is how the optimizer starts; step() needs it."""
        self._swap(True)

    def eval(self) -> None:
        """Make the parameters the averaged ones (x): for validation, and for a checkpoint that is used as a model."""
        self._swap(False)


def _check_momentum(mom: float) -> None:
    if not 0.0 < mom < 1.0:
        raise ValueError(f"Invalid momentum value: {mom}; Schedule-Free needs one between 0 and 1")


@described(schedule_free_step)
class SGDScheduleFree(_ScheduleFree):
    """Schedule-Free SGD: see `schedule_free_step`. Needs `train` and `eval` calls, as a model does.

    Args: `momentum`: in (0, 1), the average's share of where gradients are taken; `warmup_steps`: in how many steps the
    learning rate reaches `lr`; `r`, `weight_lr_power`: powers of the step and of the largest learning rate in a step's
    weight in the average.
    State: ``step``, ``z``, ``lr_max``, ``weight_sum``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        _check_momentum(momentum)
        self._start(_SGD, locals(), train_mode=True)


@described(callbacks.average_sqr_grad, divide_by_rms, schedule_free_step)
class AdamWScheduleFree(_ScheduleFree):
    """Schedule-Free AdamW: see `schedule_free_step`. Needs `train` and `eval` calls, as a model does.

    Args: `betas`: the average's share of where gradients are taken, in (0, 1), and the weight of the old average of
    squares; `warmup_steps`: in how many steps the learning rate reaches `lr`; `r`, `weight_lr_power`: powers of the
    step and of the largest learning rate in a step's weight in the average.
    State: ``step``, ``z``, ``exp_avg_sq``, ``lr_max``, ``weight_sum``.
    """

    state_names: ClassVar[dict[str, str]] = {"sqr_avg": "exp_avg_sq"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        _check_momentum(betas[0])
        self._start(_ADAMW, locals(), train_mode=True)
