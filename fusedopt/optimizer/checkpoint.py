"""State dicts: ours are torch.optim's schema, and loading one changes nothing unless it fits.

One key more than torch's, ``fusedopt``, holds what torch has no place for: fastai's flags and how far the model is
frozen. fastai's own checkpoints (``state`` a list in the order of the parameters, ``hypers`` a dict per group) are
converted when they are loaded, and `to_fastai` makes one.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..callback import GROUPS_OWN, arguments_of
from ..step.items import begun
from . import loadable, storing
from .loadable import LOOKAHEAD, Pair
from .names import check as check_hyper
from .names import number, plain
from .state import COUNTERS, FLAGS, count

if TYPE_CHECKING:
    from .core import Optimizer

OWN = ("foreach", "fused", "capturable", "differentiable", storing.HYPER)
"""Group keys that say how to run and not what to compute: a checkpoint does not decide them."""
EXTRA = "fusedopt"
VERSION = 1


# --
# Saving


def to_torch(opt: Optimizer) -> dict[Any, Any]:
    """The state to save: counters as tensors, no flags, only parameters in a group, and what is no parameter's."""
    known = {p for group in opt.param_groups for p in group["params"]}
    out = {key: value for key, value in list(opt.state.items()) if not isinstance(key, torch.Tensor)}
    for p, state in opt.state.of_parameters():
        found = storing.plain(p, _begun(opt, state))
        kept = {k: _as_tensor(k, v) for k, v in found.items() if k not in FLAGS}
        if p in known and kept:
            out[p] = kept
    return out


def _begun(opt: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state without what holds nothing yet; where nothing but flags would be left, without counts of no steps."""
    found = begun(state, opt.groups.called)
    flags = {k: v for k, v in found.items() if k in FLAGS}
    left = [v for k, v in found.items() if k not in flags]
    nothing = all(isinstance(v, (int, float)) or (isinstance(v, torch.Tensor) and v.dim() == 0) for v in left)
    return flags if len(found) < len(state) and nothing and not any(left) else found


def _as_tensor(key: str, value: Any) -> Any:
    """A counter as a float32 tensor, as torch has it, or as float64 where that would round it."""
    if key == "step" and isinstance(value, torch.Tensor):  # whole, so float32 holds it
        return value.to(torch.float32)
    if key not in COUNTERS or not isinstance(value, (int, float)):
        return value
    single = torch.tensor(float(value), dtype=torch.float32, device="cpu")  # whatever device is the default
    return single if single.item() == value else single.new_tensor(value, dtype=torch.float64)


def extra(opt: Optimizer, states: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    """What torch's schema has no place for; empty if there is nothing to say."""
    params = itertools.chain.from_iterable(group["params"] for group in opt.param_groups)
    flags = {i: found for i, p in enumerate(params) if (found := _flags(states.get(p, {})))}
    if not flags and not opt.frozen_idx:
        return {}
    return {"version": VERSION, "flags": flags, "frozen_idx": opt.frozen_idx}


def _flags(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: state[k] for k in FLAGS if k in state}


def to_fastai(opt: Optimizer) -> dict[str, Any]:
    """A checkpoint for ``fastai.optimizer.Optimizer.load_state_dict``, and for fastai's ``Lookahead``.

    Tensors are copies, as fastai's loading makes none. Warns about state that fastai's optimizers have no name for, and
    leaves it out.
    """
    state: list[dict[str, Any]] = []
    slow: list[list[Any]] = []
    counts, lost = [0], set()
    for group in opt.param_groups:
        found = [storing.plain(p, _begun(opt, opt.state.get(p, {}))) for p in group["params"]]
        slow.append([_own(s.get("slow")) for s in found])
        counts += [int(s.get("lookahead_count", 0)) for s in found]
        for stored in found:
            named = {opt.groups.called(k): v for k, v in stored.items()}
            foreign = _foreign_momentum(group, stored, torchs=False)
            lost |= foreign | named.keys() - {*FASTAI, *FLAGS, *LOOKAHEAD}
            state.append(
                {k: _own(v) for k, v in named.items() if k in (*FASTAI, *FLAGS) and k not in foreign}
            )
    if lost:
        warnings.warn(f"fastai has no such state, so it is left out: {', '.join(sorted(lost))}", stacklevel=3)
    out = {"state": state, "hypers": [dict(h) for h in opt.hypers]}
    looks_ahead = any(s is not None for group in slow for s in group)
    return out | ({"count": max(counts), "slow_weights": slow} if looks_ahead else {})


def _own(value: Any) -> Any:
    """As fastai has it: numbers as numbers, tensors as copies."""
    if isinstance(value, torch.Tensor) and value.dtype == torch.float64 and value.dim() == 0:
        return count(value)
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


MOMENTA = {"momentum_buffer", "grad_avg"}
"""The two meanings of an RMSProp's momentum."""
FASTAI = ("grad_avg", "sqr_avg", "step", "local_lr")
"""State of fastai's optimizers, and of ours under the names callbacks use."""


# --
# Loading


class Load:
    """One load, as a hook before torch's and one after it.

    ``prepare`` does whatever can fail while nothing has changed yet. It runs after the hooks of others, and ``finish``
    before theirs, so that both see what they would see with torch's own optimizers.
    """

    def __init__(self, opt: Optimizer) -> None:
        self.opt = opt

    def prepare(self, _: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Check and copy; returns what is left for torch to do: groups, and state of no parameter."""
        opt = self.opt
        if "hypers" in state_dict:
            state_dict = _from_fastai(opt, state_dict)
        loadable.check_form(state_dict)
        loadable.check_extra(state_dict.get(EXTRA, {}))
        saved, pairs = state_dict["param_groups"], _pairs(opt, state_dict)
        loadable.check_ids(state_dict)
        loadable.check_state(opt, pairs)
        flags = {p: _flags(s) for p, s in opt.state.of_parameters()}
        own = state_dict.get(EXTRA, {})
        if own:
            flags |= {p: own.get("flags", {}).get(i, {}) for i, (p, *_) in enumerate(pairs)}
        self.frozen_idx = own.get("frozen_idx", opt.frozen_idx)
        self.state: dict[torch.Tensor, dict[str, Any]] = {}
        lost: set[str] = set()
        for p, where, state in pairs:
            foreign = _foreign_momentum(saved[where[0]], state, torchs=_takes(opt, "momentum_buffer"))
            lost |= foreign
            counted = {k: v for k, v in saved[where[0]].items() if k in COUNTERS and state}
            kept = {
                k: _copied(k, v, p) for k, v in {**counted, **state}.items() if k not in {*FLAGS, *foreign}
            }
            self.state |= {p: kept} if kept else {}
        for p, kept in flags.items():
            if kept:
                self.state[p] = {**self.state.get(p, {}), **kept}
        if lost:
            warnings.warn(
                f"the checkpoint's {', '.join(sorted(lost))} cannot be used: RMSProp's momentum averages gradients in "
                "fastai and steps in torch.optim; it starts again from zero",
                stacklevel=5,
            )
        self.lists = [group.get(GROUPS_OWN) for group in opt.param_groups]
        groups = [
            _group(opt, live, theirs, [state for _, (k, _), state in pairs if k == g])
            for g, (live, theirs) in enumerate(zip(opt.param_groups, saved, strict=True))
        ]
        loadable.check_complete(opt, groups, self.state, MOMENTA if lost else set())
        storing.say_changed(saved, opt.param_groups)
        for p, (g, _), _ in pairs:
            if p in self.state:
                chosen = opt.param_groups[g].get(storing.HYPER, "")
                state = storing.as_stored(p, self.state[p], chosen, opt.groups)
                self.state[p] = storing.in_dtype(p, state, opt.state_dtype)
        ids = {i for group in saved for i in group["params"]}
        strange = {k: copy.deepcopy(v) for k, v in state_dict["state"].items() if k not in ids}
        return {**state_dict, "param_groups": groups, "state": strange}

    def finish(self, _: Any) -> None:
        """Put in place what ``prepare`` has made."""
        self.opt.state.update(self.state)
        for group, cbs in zip(self.opt.param_groups, self.lists, strict=True):
            group.update({} if cbs is None else {GROUPS_OWN: cbs})
        if self.opt.frozen_idx != self.frozen_idx:
            self.opt.frozen_idx = self.frozen_idx
            self.opt.apply_freezing()


def _pairs(opt: Optimizer, state_dict: dict[str, Any]) -> list[Pair]:
    """Each parameter with its group, place and saved state; ids are opaque, only their order counts."""
    live, saved = opt.param_groups, state_dict["param_groups"]
    _check_count(len(saved), len(live), "parameter groups")
    out = []
    for g, (ours, theirs) in enumerate(zip(live, saved, strict=True)):
        _check_count(len(theirs["params"]), len(ours["params"]), f"parameters in group {g}")
        for i, (p, key) in enumerate(zip(ours["params"], theirs["params"], strict=True)):
            state = state_dict["state"].get(key, {})
            out.append((p, (g, i), {} if _is_blank(state) else state))
    return out


def _is_blank(state: Any) -> bool:
    """Whether every entry is an empty dict: how torch.distributed.checkpoint flattens a parameter without state."""
    return isinstance(state, Mapping) and all(isinstance(v, Mapping) and not v for v in state.values())


def _check_count(saved: int, live: int, what: str) -> None:
    if saved != live:
        raise ValueError(f"loaded state dict has {saved} {what}, the optimizer {live}")


def _copied(key: str, value: Any, p: torch.Tensor) -> Any:
    """Our own copy: a counter as a number, a tensor in its own dtype (torch would cast it to the parameter's)."""
    if isinstance(value, torch.Tensor):
        counter = key in COUNTERS and value.numel() == 1
        return count(value) if counter else value.detach().to(p.device, copy=True)
    if isinstance(value, dict):
        return {k: _copied(k, v, p) for k, v in value.items()}
    return copy.deepcopy(plain(value) if np.ndim(value) == 0 else value)


def _group(
    opt: Optimizer, live: dict[str, Any], saved: Mapping[str, Any], states: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The saved group, but for how to run, which stays as it is here. (torch fills in defaults.)

    Counts that the states lack were kept in the group, as apex does, and are the states' own now.
    """
    for key in live.keys() & saved.keys() & opt.defaults.keys():  # others are the user's own
        ours, theirs = live[key], saved[key]
        if type(ours) is tuple and (not isinstance(theirs, (list, tuple)) or len(theirs) != len(ours)):
            raise loadable.refuse(
                f"{key!r} of a group is {theirs!r}; here it has {len(ours)} numbers, {ours!r}"
            )
    moved = {k for k in COUNTERS if any(state and k not in state for state in states)}
    kept = {k: v for k, v in saved.items() if k not in moved and k not in (GROUPS_OWN, storing.HYPER)}
    return {**kept, **{k: v for k, v in live.items() if k in OWN}}


def _from_fastai(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """fastai's checkpoint in torch's schema, with state under the names this optimizer stores it by."""
    hypers, states = state_dict["hypers"], list(state_dict["state"])
    sizes = [len(group["params"]) for group in opt.param_groups]
    _check_count(len(hypers), len(sizes), "parameter groups")
    _check_count(len(states), sum(sizes), "parameters")
    ids = iter(range(len(states)))
    groups = []
    for size, values in zip(sizes, hypers, strict=True):
        group: dict[str, Any] = {"params": list(itertools.islice(ids, size))}
        for name, value in values.items():
            value = number(value)
            check_hyper(name, value)
            opt.hyper_map.write(group, name, value)
        groups.append(group)
    state = {
        i: {opt.groups.stored(k): v for k, v in s.items() if k not in FLAGS} for i, s in enumerate(states)
    }
    slow = list(itertools.chain.from_iterable(state_dict.get("slow_weights") or ()))
    if slow and _takes(opt, "slow"):
        for i, weights in enumerate(slow):
            state[i] |= {"slow": weights, "lookahead_count": state_dict["count"]}
    elif slow:
        warnings.warn(
            "the checkpoint's slow_weights are left out: this optimizer does not look ahead", stacklevel=6
        )
    flags = {i: found for i, s in enumerate(states) if (found := _flags(s))}
    own = {EXTRA: {"flags": flags, "frozen_idx": opt.frozen_idx}} if flags else {}
    return {"state": {i: s for i, s in state.items() if s}, "param_groups": groups, **own}


def _takes(opt: Optimizer, name: str) -> bool:
    """Whether some callback has an argument of this name."""
    return any(name in arguments_of(cb) for cb in opt.groups.callbacks)


def _foreign_momentum(group: Mapping[str, Any], state: Mapping[str, Any], *, torchs: bool) -> set[str]:
    """The keys of an RMSProp's state that the other library's RMSProp cannot use.

    Momentum is an average of gradients in fastai (``grad_avg``) and of steps in torch (``momentum_buffer``), where a
    ``grad_avg`` is the mean that a centered RMSprop subtracts. ``torchs``: it is for torch's.
    """
    if "square_avg" not in state:
        return set()
    its_mean = bool(group.get("centered"))
    foreign = {"momentum_buffer"} if not torchs else set()
    return (foreign | ({"grad_avg"} if its_mean != torchs else set())) & state.keys()
