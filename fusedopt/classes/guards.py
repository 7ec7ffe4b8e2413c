"""What a step finds around it and counts on, and a function that tells whether all of that is still there."""

from __future__ import annotations

import array
import collections
import gc
import types
from collections.abc import Callable, Sized
from typing import Any

import numpy as np

from ..extension import leaf
from ..trace.snapshot import equal, is_constant, is_data
from ..trace.sources import content_of


class Guards:
    """What is noted of it."""

    def __init__(self) -> None:
        self._looked: list[tuple[Any, Any, Any]] = []
        """What is found in dicts, and what functions have, which is most of it: it takes no code."""
        self._whys: list[str] = []
        self._space: dict[str, Any] = {
            "equal": equal,
            "leaf": leaf,
            "looked": self._looked,
            "whys": self._whys,
        }
        self._lines = ["  k = leaf.first_other(looked)", "  if k >= 0: return whys[k]"]
        self._told: set[tuple[int, str]] = set()

    def note(self, read: Any, name: Any, value: Any, owner: Any, told_as: str = "") -> None:
        """That what has this name in ``owner`` is this object, and of data that it has not changed.

        ``read``: what reads it, or the function whose attribute it is; ``told_as``: what it is called.
        """
        where = id(owner), name
        if where in self._told:
            return
        self._told.add(where)
        k = len(self._space)
        if not told_as:
            told_as = (name or "what a function closes over") if isinstance(name, str) else "an element"
        self._space[f"v{k}"], why = value, f"{told_as} is another one now"
        own = read if isinstance(read, types.FunctionType) and read is owner else _dict_of(read)
        if own is not None:
            self._looked.append((own, name, value))
            self._whys.append(why)
        else:
            self._space.update({f"r{k}": read, f"n{k}": name})
            self._lines.append(f"  if r{k}(n{k}, None) is not v{k}: return {why!r}")
        changed = f"return {told_as!r} ' has changed'"
        if is_data(value) and not is_constant(value) and type(value) in (dict, list, set, tuple):
            self._space[f"w{k}"] = _copied(value)
            self._lines.append(f"  if v{k} != w{k}: {changed}")
        elif isinstance(value, np.ndarray) and is_data(value):
            self._space[f"w{k}"] = value.copy()
            self._lines.append(f"  if not equal(v{k}, w{k}): {changed}")
        elif isinstance(value, (bytearray, array.array)):
            self._space[f"w{k}"] = value[:]
            self._lines.append(f"  if v{k} != w{k}: {changed}")

    def note_elements(self, owner: set[Any] | frozenset[Any]) -> None:
        """That these are in the set."""
        k = len(self._space)
        self._space.update({f"o{k}": owner, f"w{k}": set(owner)})
        self._lines.append(f"  if o{k} != w{k}: return 'a set has changed'")

    def note_length(self, owner: Sized) -> None:
        """That so many are in it."""
        k = len(self._space)
        self._space[f"o{k}"] = owner
        other = "return 'an object or a container has more or fewer in it now'"
        self._lines.append(f"  if len(o{k}) != {len(owner)}: {other}")

    def made(self) -> Callable[[], str | None]:
        """What tells why not all is as it was noted; None if it is."""
        exec("\n".join(["def why():", *self._lines, "  return None"]), self._space)
        why: Callable[[], str | None] = self._space["why"]
        return why


def _copied(value: Any) -> Any:
    if type(value) is dict:
        return {k: _copied(v) for k, v in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, set, tuple) else value


def read_of(owner: Any) -> Callable[[Any, Any], Any]:
    """What reads an attribute, or what is in a container."""
    if isinstance(owner, dict):
        return owner.get
    if isinstance(owner, (list, tuple, collections.deque)):
        return lambda at, default: owner[at] if at < len(owner) else default
    own = getattr(owner, "__dict__", {})
    return lambda name, default: own[name] if name in own else getattr(owner, name, default)


def _dict_of(read: Callable[..., Any]) -> dict[Any, Any] | None:
    """The dict that ``read`` is the ``get`` of; also of one that is shown as a mapping, as a class shows its own."""
    own = getattr(read, "__self__", None) if getattr(read, "__name__", "") == "get" else None
    if isinstance(own, types.MappingProxyType):
        (own,) = gc.get_referents(own)
    return own if type(own) is dict else None


def of_cell(cell: Any) -> Callable[[str, Any], Any]:
    return lambda name, default: content_of(cell, name)
