"""State dicts: ours are torch.optim's schema, and loading one changes nothing unless it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .optimizer import Optimizer

COUNTERS = ("step", "mu_product")
"""Numbers that torch's schema keeps as 0-d float32 tensors."""
FLAGS = ("do_wd", "force_train")
"""State that describes a parameter (fastai sets it) rather than what the optimizer has learnt about it."""


def count(step: torch.Tensor) -> int | float:
    """A counter tensor as the Python number it stands for."""
    value = step.item()
    return int(value) if float(value).is_integer() else value


def to_torch(opt: Optimizer) -> dict[torch.Tensor, dict[str, Any]]:
    """The state to save: counters as tensors, no flags, and only parameters that are in a group."""
    known = {p for group in opt.param_groups for p in group["params"]}
    out = {}
    for p, state in opt.state.items():
        kept = {k: _as_tensor(k, v) for k, v in state.items() if k not in FLAGS}
        if p in known and kept:
            out[p] = kept
    return out


def _as_tensor(key: str, value: Any) -> Any:
    """A counter as a float32 tensor, as torch has it, or as float64 where that would round it."""
    if key not in COUNTERS or not isinstance(value, (int, float)):
        return value
    single = torch.tensor(float(value), dtype=torch.float32)
    return single if single.item() == value else single.new_tensor(value, dtype=torch.float64)


def check(opt: Optimizer, state_dict: dict[str, Any]) -> None:
    """Raise ValueError, naming the parameter, if state tensors do not fit the parameters they are for."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("a state dict has the keys 'state' and 'param_groups'")
    for p, where, state in _pairs(opt, state_dict):
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and not _fits(value.shape, p.shape):
                shapes = f"{tuple(value.shape)}, and the parameter is {tuple(p.shape)}"
                raise ValueError(f"loaded state dict: {key!r} of {where} has shape {shapes}")


def _fits(shape: torch.Size, param: torch.Size) -> bool:
    """Whether it can be state of the parameter: its shape, or a statistic with fewer dimensions or some of size one."""
    same_rank = len(shape) == len(param)
    return (
        all(a in (1, b) for a, b in zip(shape, param, strict=True)) if same_rank else len(shape) < len(param)
    )


def _pairs(opt: Optimizer, state_dict: dict[str, Any]) -> list[tuple[torch.Tensor, str, dict[str, Any]]]:
    """Each parameter with its saved state; ids in the state dict are opaque, only their order counts."""
    live, saved = opt.param_groups, state_dict["param_groups"]
    if len(live) != len(saved):
        raise ValueError(f"loaded state dict has {len(saved)} parameter groups, the optimizer {len(live)}")
    out = []
    for g, (ours, theirs) in enumerate(zip(live, saved, strict=True)):
        if len(ours["params"]) != len(theirs["params"]):
            sizes = f"{len(theirs['params'])} parameters in group {g}, the optimizer {len(ours['params'])}"
            raise ValueError(f"loaded state dict has {sizes}")
        for i, (p, key) in enumerate(zip(ours["params"], theirs["params"], strict=True)):
            out.append((p, f"parameter {i} of group {g}", state_dict["state"].get(key, {})))
    return out


def finish_load(opt: Optimizer, state_dict: dict[str, Any], flags: dict[Any, dict[str, Any]]) -> None:
    """After torch's load: our copies of the tensors, each in its own dtype, counters as numbers, flags back."""
    for p, _, saved in _pairs(opt, state_dict):
        for key, value in saved.items():
            if key in COUNTERS and isinstance(value, torch.Tensor):
                opt.state[p][key] = count(value)
            elif isinstance(value, torch.Tensor):
                # torch casts state to the parameter's dtype, and shares tensors that need no cast.
                opt.state[p][key] = value.detach().to(p.device, copy=True)
    for p, kept in flags.items():
        if kept:
            opt.state[p].update(kept)
