"""Where optimizers meet policies of storage: what is asked for, and checkpoints, which know nothing of policies."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..callback import arguments_of, keys_made, looked_up
from ..storage import functions
from ..storage.callbacks import SMALL, decode, dtypes, encode, encoded, keys, parted
from ..storage.policy import OTHERS, PARAM, POLICIES, Policy, choice, chosen, of

if TYPE_CHECKING:
    from .groups import ParamGroups

AROUND = decode, encode
"""The callbacks before and after a rule's own."""
HYPER = "storage"
"""The key of param groups that has the choice of policies, by the names that callbacks have for state."""


def as_text(storage: Any, groups: ParamGroups) -> str:
    """A choice of policies as groups have it. Raises TypeError or ValueError for what is none, or names no state."""
    found = {groups.called(name): policy for name, policy in choice(chosen(storage)).items()}
    known: set[str] = set()
    for cb in groups.callbacks:
        if cb in AROUND:
            continue
        mentioned = looked_up(cb)
        if mentioned is None:  # it may keep anything
            return chosen(found)
        known |= {*list(arguments_of(cb))[1:], *mentioned, *keys_made(cb)}
    for name in found:
        if name not in known and name not in (PARAM, OTHERS):
            near = difflib.get_close_matches(groups.stored(name), map(groups.stored, known), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"storage names the state {groups.stored(name)!r}, and no callback keeps such{hint}"
            )
    return chosen(found)


def of_group(storage: Any, groups: ParamGroups) -> str:
    """The choice of a param group. Raises ValueError where the optimizer has none, else as `as_text`."""
    if not groups.around:
        raise ValueError(
            "a param group has 'storage', and the optimizer has none. Remedy: give it one too, e.g. "
            'storage={"*": "float32"}'
        )
    return as_text(storage, groups)


def held(states: Iterable[tuple[torch.Tensor, dict[str, Any]]]) -> str:
    """How many bytes there are for each parameter of these and their state, and how many there would be as float32."""
    sizes: dict[str, int] = {}
    count = numbers = 0
    policies: dict[str, str] = {}
    for p, state in states:
        policies |= parted(state)
        count += p.numel()
        for key, value in {PARAM: p.detach(), **state}.items():
            if isinstance(value, torch.Tensor) and value.dim():
                name = key.split(":")[0]
                sizes[name] = sizes.get(name, 0) + _here(value).nbytes
                numbers += 4 * _here(value).numel() if ":" not in key else 0
    if not count:
        return ""
    each = (
        f"{name} {size / count:.2f}{f' ({policies[name]})' if name in policies else ''}"
        for name, size in sizes.items()
    )
    total = f"{sum(sizes.values()) / count:.2f} bytes per parameter, {numbers / count:.2f} as float32"
    return f"{', '.join(each)}: {total}"


def _here(t: Any) -> torch.Tensor:
    return t.to_local() if hasattr(t, "placements") else t


MASTER = f"{PARAM}:master"
"""Under which a checkpoint has the parameter that a policy makes more precise than its dtype."""


def plain(p: torch.Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state as numbers, in plain tensors."""
    found = parted(state)
    rest = {key for name, policy in found.items() for key in keys(name, policy)}
    out = {key: value for key, value in state.items() if key not in rest}
    for name, policy in found.items():
        code = p.detach() if name == PARAM else state[name]
        more = [state[key] for key in keys(name, policy)]
        out[MASTER if name == PARAM else name] = _local(POLICIES[policy].decode, code, more)
    return out


def as_stored(p: torch.Tensor, state: Mapping[str, Any], storage: str, groups: ParamGroups) -> dict[str, Any]:
    """A parameter's plain state as it is stored here."""
    out = {key: value for key, value in state.items() if key != MASTER}
    there = {groups.called(key): value for key, value in state.items()}
    if MASTER in state:
        there[PARAM] = state[MASTER]
    for name, value in there.items():
        if (policy := _fitting(p, name, value, storage)) is None:
            continue
        if name == PARAM:
            value = _beside(p, value, POLICIES[policy])
        parts = _split(POLICIES[policy], value)
        made = dict(zip([name, *keys(name, policy)], parts, strict=True))
        out |= {groups.stored(key): part for key, part in made.items() if key != PARAM}
    return out


def in_dtype(p: torch.Tensor, state: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """A parameter's state with its floats, one for each element, in the dtype that was asked for, if one was."""
    wanted = {k for k, v in state.items() if dtype and functions.is_whole(p, v) and v.is_floating_point()}
    return {k: v.to(dtype) if k in wanted else v for k, v in state.items()}


def stored_anew(
    p: torch.Tensor,
    beside: Iterable[Any],
    state: dict[str, Any],
    group: dict[str, Any],
    groups: ParamGroups,
    known: bool,
) -> bool:
    """Whether a parameter's state was not stored as a step of these dtypes reads and writes it; now it is.

    Dtypes change from step to step: a model is cast, a gradient comes in float64. Where something is float64 no
    policy is in use, and one of parameters is for a single dtype: what is in such a one would be decoded in every
    step, and not encoded again.

    beside: what there is in the step besides parameter and state: its gradient, and extra tensors
    known: that is all of it; if not, plain tensors stay what they are
    """
    there = {t.dtype for t in (p, *beside, *state.values()) if isinstance(t, torch.Tensor) and t.dim()}
    wide = torch.float64 in there
    over = {k: v for k, v in parted(state).items() if wide or (k == PARAM and p.dtype != POLICIES[v].code)}
    late = _late(p, state, group, groups) if known and not wide else {}
    if not over and not late:
        return False
    stored = {key for name, policy in over.items() for key in (name, *keys(name, policy))} & state.keys()
    numbers = plain(p, {key: state.pop(key) for key in stored})
    if MASTER in numbers:
        p.data.copy_(numbers.pop(MASTER))
    state |= numbers | as_stored(p, late, group[HYPER], groups)
    return True


def _late(
    p: torch.Tensor, state: Mapping[str, Any], group: dict[str, Any], groups: ParamGroups
) -> dict[str, Any]:
    """State in plain tensors that a policy has several for."""
    found, ignores = parted(state), groups.roles(group).ignores
    whole = {k: v for k, v in state.items() if k not in found and not ignores(k)}
    policies = {k: _fitting(p, groups.called(k), v, group[HYPER]) for k, v in whole.items()}
    return {k: state[k] for k, policy in policies.items() if policy and len(dtypes(POLICIES[policy])) > 1}


def _fitting(p: torch.Tensor, name: str, value: Any, storage: str) -> str | None:
    """The policy that numbers are stored in, None if they stay as they are."""
    policy = of(storage, name) if name and ":" not in name and functions.is_whole(p, value) else None
    if policy is None or policy not in POLICIES or p.dtype == torch.float64:
        return None
    if p.numel() < POLICIES[policy].least:
        policy = SMALL
    return None if name == PARAM and p.dtype != POLICIES[policy].code else policy


def _beside(p: torch.Tensor, value: Any, policy: Policy) -> Any:
    """The numbers that a parameter stands for, those that it has rounded otherwise than this policy would moved to it.

    Policies take different ones of two codes equally near. The rest is stored beside the parameter's own, so it has to
    be the rest of that one, and the next number towards it has this code in all of them.
    """
    x, own = (_here(t.detach()).to(torch.float32) for t in (value, p))
    for nearer in (x.nextafter(own), own):
        code = encoded(policy, x, None)[0].to(policy.code).to(torch.float32)
        x = torch.where((code != own) & ((own - x).abs() <= (code - x).abs()), nearer, x)
    return functions.part_of(x, value)


def _split(policy: Any, value: Any) -> list[torch.Tensor]:
    """What a policy makes of numbers; of a DTensor of those that are here, each as its part is."""
    local = _here(value)
    parts = [
        part.to(dtype)
        for part, dtype in zip(encoded(policy, local.to(torch.float32), None), dtypes(policy), strict=True)
    ]
    return [functions.part_of(part, value) if part.shape == local.shape else part for part in parts]


def _local(decode: Any, code: Any, rest: list[Any]) -> Any:
    """What a policy decodes; of a DTensor of what is here."""
    parts = [_here(t) for t in (code, *rest)]
    return functions.part_of(decode(*(t.to(torch.float32) for t in parts)), code)


def say_changed(saved: Iterable[Mapping[str, Any]], live: Iterable[Mapping[str, Any]]) -> None:
    """Warn of a checkpoint that was stored in other policies than are asked for here, which are used from now on."""
    for g, (theirs, ours) in enumerate(zip(saved, live, strict=True)):
        old, new = theirs.get(HYPER, ""), ours.get(HYPER, "")
        if old != new:
            warnings.warn(
                f"group {g} of the checkpoint was stored as {old or 'plain tensors'}, and is from here on as "
                f"{new or 'plain tensors'}",
                stacklevel=6,
            )
            return
