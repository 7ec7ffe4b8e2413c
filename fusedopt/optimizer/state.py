"""``opt.state``: a dict per parameter, whose changes are counted; and the counts of steps that are kept in there."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

COUNTERS = ("step", "mu_product")
"""Numbers that torch's schema keeps as 0-d float32 tensors."""
FLAGS = ("do_wd", "force_train")
"""State that describes a parameter (fastai sets it) rather than what the optimizer has learnt about it."""


def count(step: torch.Tensor) -> int | float:
    """A counter tensor as the Python number it stands for."""
    value = step.item()
    return int(value) if float(value).is_integer() else value


def counts_to(device: torch.device, state: dict[str, Any]) -> None:
    """Make a parameter's numbers float64 tensors on the device, for kernels to read and advance."""
    for key, value in list(state.items()):
        if type(value) in (int, float):
            state[key] = torch.tensor(float(value), dtype=torch.float64, device=device)
        elif key in COUNTERS and isinstance(value, torch.Tensor) and value.numel() == 1:
            state[key] = value.detach().reshape(()).to(device, torch.float64)


class State(defaultdict[Any, Any]):
    """``opt.state``: one dict per parameter, made on first access; and what users keep under keys of their own.

    It counts as empty while it holds nothing of a parameter's but fastai's flags: checkpoint code asks ``if
    optimizer.state`` in order to know whether there has been a step.
    """

    def __init__(self, *args: Any) -> None:
        given = args[1:] if args[:1] == (dict,) else args  # defaultdict's copy() hands over the factory
        super().__init__(dict, *given)
        self.version = 0
        """Counts changes of which parameters have a dict, and which dict that is."""

    def __reduce__(self) -> tuple[Any, ...]:
        return State, (dict(self),)

    def __bool__(self) -> bool:
        return any(key not in FLAGS for _, state in self.of_parameters() for key in list(state))

    def of_parameters(self) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """The parameters that have a dict, with it."""
        return [(p, s) for p, s in list(self.items()) if isinstance(p, torch.Tensor) and isinstance(s, dict)]


def _counted(name: str) -> Callable[..., Any]:
    method = getattr(defaultdict, name)

    @functools.wraps(method)
    def changed(self: State, *args: Any, **kwargs: Any) -> Any:
        self.version += 1
        return method(self, *args, **kwargs)

    return changed


for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(State, _name, _counted(_name))
