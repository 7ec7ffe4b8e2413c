"""Where a class keeps state by parameter: in its own dict, in those of optimizers within it, in containers in these."""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..step.items import inside
from .reach import LIBRARIES
from .stored import Stored

State = dict[Any, Any]
"""What is kept of one parameter: its entry in the store; of several stores, by their number, each with its entry."""


_OTHERS = (torch.Tensor, torch.nn.Module, torch.optim.Optimizer, dict, list, tuple, set, type, enum.Enum)
_SET = object.__setattr__
NOTHING = "an empty list"
"""In place of a list without elements, in a container in a state: this string."""


def stores_of(opt: Any) -> list[dict[Any, State]]:
    """The dicts in which an optimizer, and those in it, keep state by parameter."""
    found: dict[int, dict[Any, State]] = {}
    todo, seen = [opt], set()
    while todo:
        each = todo.pop(0)
        if id(each) not in seen:
            seen.add(id(each))
            for store in (vars(each).get("state"), getattr(each, "state", None)):
                if isinstance(store, dict):
                    found.setdefault(id(store), store)
            todo += [v for v in vars(each).values() if isinstance(v, torch.optim.Optimizer)]
    return list(found.values())


def whole_of(stores: Sequence[dict[Any, State]], p: torch.Tensor) -> State | None:
    """What they keep of a parameter; None if that is nothing."""
    if len(stores) == 1:
        return stores[0].get(p)
    return {i: store[p] for i, store in enumerate(stores) if p in store} or None


def flattened(state: State, parted: bool = False) -> dict[str, tuple[Any, bool, Any, Any]]:
    """What a state has, by name: the key, whether it is in a container there, under which key, and it.

    parted: of what a policy stores each part is by itself, as for kernels
    """
    out: dict[str, tuple[Any, bool, Any, Any]] = {}
    for key, value in state.items():
        if parted and isinstance(value, Stored):
            out |= {name: (key, True, inner, vars(value)[inner]) for inner, name in value.places(key)}
            continue
        parts = _parts(value)
        for inner, part in parts:
            name = f"{key}[{inner!r}]" if not isinstance(key, int) else str(inner)
            if _is_object(value):
                name = f"{key}.{inner} of {type(value).__module__}.{type(value).__qualname__}"
            out[name if name not in out else f"{name}@{key}"] = key, True, inner, part
        if not parts:
            out[str(key)] = key, False, None, value
    return out


def _parts(value: Any) -> list[tuple[Any, Any]]:
    found = vars(value) if _is_object(value) else value
    return list(found.items() if isinstance(found, dict) else enumerate(found) if type(found) is list else ())


def _is_object(value: Any) -> bool:
    """Whether it is an object of somebody's own class, which has nothing but attributes."""
    kind = type(value)
    if (
        isinstance(value, _OTHERS)
        or kind.__module__.split(".")[0] in LIBRARIES
        or kind.__setattr__ is not _SET  # type: ignore[comparison-overlap]
    ):
        return False
    plain = not any(vars(base).get("__slots__") for base in kind.__mro__[:-1])
    return plain and type(getattr(value, "__dict__", None)) is dict


def _copied(container: Any, kinds: Callable[[type], type]) -> Any:
    """A container with the same in it."""
    if not _is_object(container):
        return copy.copy(container)
    out: Any = object.__new__(kinds(type(container)))
    vars(out).update(vars(container))
    return out


def _is_empty(value: Any) -> bool:
    return type(value) is list and not value


def values_of(state: State, parted: bool = False) -> dict[str, Any]:
    found = flattened(state, parted).items()
    return {name: NOTHING if nested and _is_empty(value) else value for name, (_, nested, _, value) in found}


def put(state: State, values: dict[str, Any], parted: bool = False) -> None:
    """Put values where a state has these names; a number where a tensor is becomes the tensor's."""
    for name, (key, nested, inner, value) in flattened(state, parted).items():
        if isinstance(value, torch.Tensor) and type(values[name]) in (int, float):
            value.fill_(values[name])
        elif not _is_empty(value) or values[name] is not NOTHING:
            (inside(state[key]) if nested else state)[inner if nested else key] = values[name]


def rebuilt(
    state: State, make: Callable[[str, Any], Any], kinds: Callable[[type], type] = lambda kind: kind
) -> State:
    """A copy of a state with other values: ``make(name, value)``; objects in it are of the class ``kinds(theirs)``."""
    out = {key: _copied(value, kinds) if _parts(value) else value for key, value in state.items()}
    values = {name: [] if value is NOTHING else make(name, value) for name, value in values_of(state).items()}
    put(out, values)
    return out


def in_stores(stores: Sequence[dict[Any, State]], state: State) -> dict[int, State]:
    """A copy of what is kept of a parameter, by the ids of the stores that it belongs in."""
    return {id(stores[0]): state} if len(stores) == 1 else {id(stores[i]): kept for i, kept in state.items()}
