"""What an optimizer accepts (callbacks, hyperparameters, groups, gradients, state), and what it says of the rest."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from . import callback, names
from .callback import arguments_of, defaults_of
from .reference import FLOATS


def as_callbacks(cbs: Any) -> list[Callable]:
    found = [cbs] if callable(cbs) else list(cbs)
    for cb in found:
        if not callable(cb):
            raise TypeError(f"callbacks must be callable; {cb!r} is not")
    return found


COMMON = (
    "lr", "mom", "sqr_mom", "wd", "eps", "dampening", "maximize", "foreach", "fused", "capturable", "differentiable",
)  # fmt: skip
"""Hyperparameters that are accepted whether or not a callback takes them."""


def check_known(hypers: Iterable[str], cbs: Sequence[Callable]) -> None:
    """Raise TypeError for a hyperparameter that no callback takes: most likely a typing error."""
    taken = set(COMMON)
    for cb in cbs:
        found = callback.looked_up(cb)
        if found is None:
            return  # a callable object may take anything
        taken |= found | arguments_of(cb).keys() | defaults_of(cb).keys()
    for name in hypers:
        if name not in taken:
            near = difflib.get_close_matches(name, [*taken, "backend", "state_dtype", "title"], 1)
            hint = f"did you mean {near[0]!r}?" if near else "name it among a callback's arguments"
            raise TypeError(f"no callback takes the hyperparameter {name!r}; {hint}")


def last(value: Any) -> Any:
    return value.stop if isinstance(value, slice) else value[-1]


def as_param_groups(params: Any) -> Any:
    """Params as torch takes them: a list of lists (fastai's splitters) becomes one group per list."""
    if isinstance(params, (torch.Tensor, Mapping)):
        return params  # torch says what is wrong
    found = list(params)
    is_group = [not isinstance(p, (torch.Tensor, dict)) and _is_list(p) for p in found]
    if not any(is_group):
        return found
    for i, (group, p) in enumerate(zip(is_group, found, strict=True)):
        if not group:
            raise ValueError(
                f"group {i} is a {type(p).__name__}, not a list of parameters, while others are lists"
            )
    return [{"params": list(p)} for p in found]


def _is_list(p: Any) -> bool:
    """A list of parameters, not torch's ``(name, parameter)`` pair."""
    return (
        isinstance(p, Iterable)
        and not isinstance(p, str)
        and not (isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str))
    )


def hyper_of(group: dict[str, Any], name: str, value: Any) -> Any:
    """A hyperparameter as callbacks get it: a number, or a tensor of a capturable group, which kernels read."""
    there = {p.device for p in group["params"][:1]}
    if isinstance(value, torch.Tensor) and group.get("capturable") and {value.device} == there:
        return value.detach().reshape(())
    value = names.number(value)
    names.check(name, value)
    return value


def check_state(p: torch.Tensor, state: Mapping[str, Any], group: int, i: int) -> None:
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.device != p.device:
            raise RuntimeError(
                f"the state {key!r} of parameter {i} of group {group} is on {value.device}, the parameter on "
                f"{p.device}; move the model before the state dict is loaded, or the state with it"
            )


def check_gradient(p: torch.Tensor, grad: torch.Tensor, group: int, i: int) -> None:
    what = f"the gradient of parameter {i} of group {group}"
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{what} is sparse; use dense gradients (sparse=False) or torch.optim.SparseAdam for it"
        )
    if grad.device != p.device:
        raise RuntimeError(
            f"{what} is on {grad.device}, the parameter on {p.device}; move the model as a whole"
        )
    if grad.shape != p.shape:
        raise RuntimeError(f"{what} has shape {tuple(grad.shape)}, the parameter {tuple(p.shape)}")
    if p.dtype not in FLOATS or grad.dtype not in FLOATS:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise RuntimeError(
            f"parameter {i} of group {group} is {p.dtype} with a {grad.dtype} gradient; {known} only"
        )
    if not p.is_contiguous() and torch._debug_has_internal_overlap(p) == 1:
        raise RuntimeError(f"parameter {i} of group {group} is expanded, several elements are one; clone it")
