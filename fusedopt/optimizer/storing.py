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
from ..storage.policy import OTHERS, PARAM, POLICIES, choice, chosen, of

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
        policy = of(storage, name) if ":" not in name and functions.is_whole(p, value) else None
        found = POLICIES.get(policy or "")
        if policy is None or found is None or p.dtype == torch.float64:
            continue
        if p.numel() < found.least:
            policy, found = SMALL, POLICIES[SMALL]
        if name == PARAM and p.dtype != found.code:
            continue
        parts = _split(found, value)
        made = dict(zip([name, *keys(name, policy)], parts, strict=True))
        out |= {groups.stored(key): part for key, part in made.items() if key != PARAM}
    return out


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
