"""Steps of a class under ``torch.amp.GradScaler``, which hands over what it would have done to gradients itself.

The scale goes to kernels, which multiply gradients by one over it. Whether a gradient is infinite the host has to know:
counts of a class are numbers of the host, and a step that is skipped must not count.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ..step.scaling import Scaling

SUPPORTS = "_step_supports_amp_scaling"
"""What GradScaler asks of an optimizer before it hands over."""
HANDED = "grad_scale", "found_inf"
"""The attributes that it sets for the time of a step. Some of torch's own classes read them, and get what is done."""


class Handed(Scaling):
    """A scaling by what is handed over, where it is.

    A skipped step is none that kernels see, so all they get is the factor.
    """

    def __bool__(self) -> bool:
        return True


class Supports:
    """``opt._step_supports_amp_scaling`` of a fused class: whether GradScaler is to hand over. ``had``: its own.

    accelerate knows a skipped step by its not being called, so in its calls GradScaler decides.
    """

    def __init__(self, opt: torch.optim.Optimizer, had: Any) -> None:
        self._ref, self.had = weakref.ref(opt), had

    def __bool__(self) -> bool:
        step = getattr(self._ref(), "step", None)
        return getattr(step, "__module__", "") != "accelerate.optimizer"

    def __reduce__(self) -> Any:
        return bool, (bool(self.had),)


def takes(opt: torch.optim.Optimizer, asked: bool, max_norm: float | None) -> bool:
    """Whether to take what is handed over: if it was asked for; or if it is the class that does, and gradients are to
    be clipped, which is of unscaled ones."""
    return asked or (max_norm is not None and bool(getattr(opt, SUPPORTS, False)))


def support(opt: torch.optim.Optimizer) -> None:
    """Let GradScaler hand over."""
    vars(opt)[SUPPORTS] = Supports(opt, vars(opt).get(SUPPORTS))


def withdraw(opt: torch.optim.Optimizer) -> None:
    """Undo that."""
    mine = vars(opt).get(SUPPORTS)
    if isinstance(mine, Supports):
        del vars(opt)[SUPPORTS]
        if mine.had is not None:
            vars(opt)[SUPPORTS] = mine.had


def taken(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """What is handed over for this step, which the class must not see: it is done already."""
    own = vars(opt)
    return {name: own.pop(name) for name in HANDED if name in own}


def begins(scaling: Scaling, handed: dict[str, Any], closure: bool, captured: bool) -> bool:
    """Whether the step is to be done, by what was handed over for it. Waits for the device to know.

    Raises RuntimeError if it is given a closure, or captured into a CUDA graph.
    """
    scale, found = handed.get("grad_scale"), handed.get("found_inf")
    if closure:
        raise RuntimeError(
            "GradScaler has looked at the gradients before the step, whose closure makes others. Remedy: step without "
            "a closure, or without GradScaler"
        )
    if captured:
        raise RuntimeError(
            "a step under GradScaler is being captured into a CUDA graph, and whether it is skipped is for the host to "
            "know each time. Remedy: capture forward and backward passes, and call scaler.step() after the replay"
        )
    if found is not None and float(found) != 0.0:
        return False
    scaling.receive(scale, None)
    return True


@torch.no_grad()
def unscale(opt: torch.optim.Optimizer, inverse: float) -> None:
    """Multiply the gradients, as GradScaler would have."""
    if inverse == 1.0:
        return
    for group in opt.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                (p.grad._values() if p.grad.is_sparse else p.grad).mul_(inverse)
