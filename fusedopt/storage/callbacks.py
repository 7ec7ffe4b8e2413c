"""The two callbacks around those of a rule: what is stored becomes numbers, and numbers what is stored.

Beside its code, under the name of the state, what else is stored of it is in the state as ``name:policy``, of the
parameter as ``param:policy``; of a policy with several such tensors with their number, from the second on.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch

from ..trace.draws import noise
from . import functions
from .policy import OTHERS, PARAM, POLICIES, Policy, choice, of

STEP = "storage_step"
SMALL = "float32"
"""The policy of state of tensors that are too small for another."""


def keys(name: str, policy: str) -> list[str]:
    """Where in the state the rest of it is."""
    return [f"{name}:{policy}{f':{k}' if k else ''}" for k in range(len(dtypes(POLICIES[policy])) - 1)]


def is_of_storage(key: str) -> bool:
    """Whether what is in the state under this key is there because of a policy."""
    return key == STEP or ":" in key


def dtypes(policy: Policy) -> list[torch.dtype]:
    """Those of all that is stored: the code, the rest, and the scale."""
    return [policy.code, *policy.rest, *([torch.float32] if policy.block else [])]


@functools.lru_cache(maxsize=1024)
def block_of(key: str) -> int:
    """If it is the key of scales, how many elements there is one for; else 0."""
    name, _, policy = key.partition(":")
    found = POLICIES.get(policy.partition(":")[0])
    return found.block if found and key == keys(name, policy.partition(":")[0])[-1] else 0


def parted(state: Any) -> dict[str, str]:
    """The policy of all that is stored in more than one tensor, by its name."""
    split = (key.split(":") for key in state if isinstance(key, str) and ":" in key)
    return {parts[0]: parts[1] for parts in split if len(parts) == 2 and parts[1] in POLICIES}


def decode(p: Any, **state: Any) -> dict[str, Any]:
    """Make of what is stored the numbers that it stands for."""
    new = {}
    for name, policy in parted(state).items():
        rest = [functions.as_number(state[key], p) for key in keys(name, policy)]
        if name == PARAM:
            functions.put(p, POLICIES[policy].decode(p.data, *rest))
        else:
            new[name] = POLICIES[policy].decode(functions.as_number(state[name], p), *rest)
    return new


def encode(p: Any, storage: str = "", storage_step: Any = 0, storage_seed: Any = 0, **state: Any) -> Any:
    """Make of numbers what is stored of them, as ``storage`` says (`policy.chosen`).

    storage_step: counts steps, where something is rounded at random; storage_seed: other random numbers for another
    """
    new: dict[str, Any] = {}
    if functions.is_zero_dim(p):
        return new
    for name, was in parted(state).items():
        if of(storage, name) != was:
            raise RuntimeError(
                f"{name!r} is stored in the policy {was!r}, and the param group's storage has {of(storage, name)!r} "
                "for it now. Remedy: make an optimizer with the storage that you want, and load this one's state_dict()"
            )
    for name in choice(storage):
        value = state.get(name)
        if name not in (PARAM, OTHERS) and value is not None and not functions.is_whole(p, value):
            raise ValueError(
                f"storage names the state {name!r}, which is not one number for each element: policies are for state "
                "of the parameter's shape. Remedy: leave it out"
            )
    stream = 0
    for name, value in [(PARAM, p.data), *sorted(state.items())]:
        found = _policy(p, storage, name, value)
        if found is None:
            continue
        bits = None
        if POLICIES[found].noisy:
            bits = noise(p, seed=storage_seed, step=storage_step, stream=stream)
            new[STEP] = storage_step + 1
            stream += 1
        code, *rest = encoded(POLICIES[found], value, bits)
        if name == PARAM:
            functions.put(p, code)
        else:
            new[name] = functions.stored_as(code, POLICIES[found].code)
        stored = zip(keys(name, found), rest, dtypes(POLICIES[found])[1:], strict=True)
        new |= {key: functions.stored_as(x, dtype) for key, x, dtype in stored}
    return new


def encoded(policy: Policy, x: Any, noise: Any) -> tuple[Any, ...]:
    with functions.constants(x) if policy.fixed else nullcontext():
        found = policy.encode(x, noise)
    return found if type(found) is tuple else (found,)


def _policy(p: Any, storage: str, name: str, value: Any) -> str | None:
    """The policy for it, None if it is stored as it is."""
    if name.startswith("_") or ":" in name or not functions.is_whole(p, value):
        return None
    found = of(storage, name)
    if found is None or not functions.is_narrow(p):
        return None
    if functions.fewer(p, POLICIES[found].least):
        return None if name == PARAM else SMALL
    return None if name == PARAM and functions.dtype_of(p) != POLICIES[found].code else found
