"""Whether a checkpoint can be loaded: everything that may be wrong with it is found before anything changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..callback import arguments_of, function_of, identity, is_ours
from ..callbacks import step_stat
from ..ir.ops import TENSOR
from ..ir.program import Buffer
from ..step.items import Item
from ..storage.callbacks import is_of_storage
from ..trace.axes import sizes
from ..trace.signals import NeedsAttribute, Untraceable
from ..trace.tracer import trace
from .names import number
from .state import COUNTERS

if TYPE_CHECKING:
    from .core import Optimizer

Pair = tuple[torch.Tensor, tuple[int, int], dict[str, Any]]
LEARNT = {
    *COUNTERS, "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "sqr_avg", "sum",
    "exp_inf", "acc_delta",
}  # fmt: skip
"""State that tells that an optimizer has stepped, one of torch, of fastai, or of ours."""
LOOKAHEAD = ("slow", "lookahead_count")
"""State that fastai keeps with its Lookahead rather than with parameters."""


def refuse(what: str) -> ValueError:
    return ValueError(f"loaded state dict: {what}")


def check_form(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError unless it has torch's schema."""
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("a state dict has the keys 'state' and 'param_groups' (or, of fastai, 'hypers')")
    states, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(states, Mapping):
        raise refuse(f"'state' must be a dict, not {type(states).__name__}")
    if not isinstance(groups, Sequence) or not all(
        isinstance(g, Mapping) and isinstance(g.get("params"), (list, tuple)) for g in groups
    ):
        raise refuse("'param_groups' must be a list of dicts, each with a list 'params'")


def check_ids(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError for state of a parameter that no group lists."""
    states = state_dict["state"]
    ids = {i for group in state_dict["param_groups"] for i in group["params"]}
    for key in states.keys() - ids:
        numbered = isinstance(key, int) or (isinstance(key, str) and key.isdigit())
        if isinstance(key, torch.Tensor) or (numbered and _is_learnt(states[key])):
            shown = "a tensor" if isinstance(key, torch.Tensor) else repr(key)
            raise refuse(
                f"there is state under {shown}, and no group lists a parameter of that id; keys of 'state' are in "
                "the groups' 'params' (JSON, for one, makes strings of numbers)"
            )


def _is_learnt(state: Any) -> bool:
    """Whether this is what an optimizer has learnt of a parameter, and not a user's notes."""
    return isinstance(state, Mapping) and any(
        isinstance(value, torch.Tensor) or key in COUNTERS for key, value in state.items()
    )


def check_extra(extra: Any) -> None:
    """Raise ValueError unless this is what we have put into the schema."""
    well = isinstance(extra, Mapping) and isinstance(extra.get("flags", {}), Mapping)
    frozen = extra.get("frozen_idx", 0) if well else None
    if type(frozen) is not int or frozen < 0:
        raise refuse(f"'fusedopt' has flags, and a frozen_idx of at least 0; this is {extra!r}")


def check_state(opt: Optimizer, pairs: list[Pair]) -> None:
    """Raise ValueError, naming the parameter, if its state does not fit it."""
    counts = _counts_steps(opt)
    for p, (g, i), state in pairs:
        what = f"parameter {i} of group {g}"
        if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
            raise refuse(f"the state of {what} must be a dict whose keys are names")
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and not _fits(value.shape, p.shape):
                shapes = f"{tuple(value.shape)}, and the parameter is {tuple(p.shape)}"
                raise refuse(f"{key!r} of {what} has shape {shapes}")
        if "step" in state and counts:
            _check_step(state["step"], what)


def _fits(shape: torch.Size, param: torch.Size) -> bool:
    """Whether it can be state of the parameter: its shape, a statistic with fewer dimensions or some of size one, or a
    square matrix for one of its dimensions."""
    if len(shape) == 2 and shape[0] == shape[1] and shape[0] in param:
        return True
    if len(shape) != len(param):
        return len(shape) < len(param)
    return all(a in (1, b) for a, b in zip(shape, param, strict=True))


def _counts_steps(opt: Optimizer) -> bool:
    """Whether ``step`` is a count of steps, and not what a callback of the user's makes of the name."""
    return all(is_ours(cb) for cb in opt.groups.callbacks if "step" in arguments_of(cb))


def _check_step(value: Any, what: str) -> None:
    value = number(value)
    counts = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not counts or not (
        value >= 0 and value % 1 == 0
    ):  # neither holds for NaN, nor the second for infinity
        raise refuse(f"'step' of {what} must be a whole number of at least 0; it is {value!r}")


def check_complete(
    opt: Optimizer,
    groups: Sequence[Mapping[str, Any]],
    loaded: Mapping[torch.Tensor, dict[str, Any]],
    optional: set[str],
) -> None:
    """Raise ValueError if a parameter has some of the state that its first step makes, but not all of it.

    The rest would start from nothing while counts go on. What Lookahead keeps may be missing, it then looks ahead from
    here, and so may ``optional``. A user's own entries say nothing of it, nor is it known of callbacks that do not
    fuse. Numbers that were kept on a device are plain ones in ``loaded`` from here on.
    """
    known: dict[Any, _FirstStates] = {}
    for g, (live, saved) in enumerate(zip(opt.param_groups, groups, strict=True)):
        group = {**opt.defaults, **saved, "params": live["params"]}
        hyper = opt.groups.hypers(group)
        cbs = opt.groups.list_of(live)
        hypers = tuple((k, type(v), not isinstance(v, torch.Tensor) and bool(v)) for k, v in hyper.items())
        kind = tuple(map(identity, cbs)), hypers
        for i, p in enumerate(live["params"]):
            state = loaded.get(p, {})
            if not any(k in LEARNT and v is not None for k, v in state.items()):
                continue
            if kind not in known:
                known[kind] = _FirstStates(opt, cbs, hyper)
            first = known[kind].of(p)
            for key in first.keys() - {*LOOKAHEAD, *optional}:
                if is_of_storage(key):  # which is made here of what there is
                    continue
                _check_entry(key, first[key], state, p, f"parameter {i} of group {g}")
                if type(first[key]) in (int, float) and isinstance(state[key], torch.Tensor):
                    state[key] = type(first[key])(state[key].item())


def _check_entry(key: str, first: Any, state: Mapping[str, Any], p: torch.Tensor, what: str) -> None:
    value = state.get(key)
    fits = isinstance(value, torch.Tensor) and value.is_floating_point()
    if isinstance(value, torch.Tensor) and isinstance(first, Buffer):
        fits = fits and (value.shape == p.shape or _has_as_many(value, first, p.shape))
    on_device = isinstance(value, torch.Tensor) and value.numel() == 1  # a number that was kept there
    if fits if isinstance(first, Buffer) else isinstance(value, (int, float)) or on_device:
        return
    found = "missing" if value is None else f"a {type(value).__name__}"
    if isinstance(value, torch.Tensor):
        found = f"a tensor of {value.dtype}, of shape {tuple(value.shape)}"
    raise refuse(
        f"{key!r} of {what} is {found}; there is {', '.join(map(repr, state))}. Was it saved by one of another "
        "kind, or with other options?"
    )


def _has_as_many(value: torch.Tensor, first: Buffer, shape: torch.Size) -> bool:
    """Whether it has as many numbers as a first step makes for a parameter of this shape."""
    if first.dims is not None:
        return value.numel() == math.prod(sizes(first.dims, shape))
    return first.kind == TENSOR


class _FirstStates:
    """What a first step leaves in the state, by the names it is stored under: buffers and numbers. Empty if unknown.

    It may be other state for a vector than for a matrix, so parameters are told apart as far as the callbacks do.
    """

    def __init__(self, opt: Optimizer, cbs: list[Callable[..., Any]], hyper: dict[str, Any]) -> None:
        self.opt, self.cbs, self.hyper = opt, cbs, hyper
        self.attributes = opt.engine.buckets.attributes
        self.known: dict[Any, dict[str, Any]] = {}

    def of(self, p: torch.Tensor) -> dict[str, Any]:
        """Of a parameter without state."""
        if not all(self.opt.engine.buckets.verdicts.lasting):
            return {}  # calling such a callback would do something
        item = Item(p.detach(), p.detach(), {}, (0, 0), self.hyper)
        while True:
            signature = item.signature(self.attributes, False)
            if signature in self.known:
                return self.known[signature]
            try:
                traced = trace(self.cbs, signature, self.hyper, state_dtype=self.opt.state_dtype)
            except NeedsAttribute as need:
                self.attributes += (need.name,)
            except (Untraceable, Exception):
                self.known[signature] = {}
            else:
                self.known[signature] = self._stored({**traced.created, **traced.new_numbers()})

    def _stored(self, created: dict[str, Any]) -> dict[str, Any]:
        takers = [function_of(cb) for cb in self.cbs]
        return {
            self.opt.groups.stored(k): v
            for k, v in created.items()
            if isinstance(v, Buffer)
            or (type(v) in (int, float) and [f for f in takers if k in arguments_of(f)] != [step_stat])
        }  # steps may be counted for nobody
