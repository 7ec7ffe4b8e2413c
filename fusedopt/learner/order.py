"""Callbacks as they are given, and the order that they run in."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import Any

from .callback import Callback
from .events import name_for


def listed(x: Any) -> list[Any]:
    """None, one thing or several, as a list. Several are in a list or whatever else is iterable, as fastcore's L."""
    if x is None:
        return []
    one = callable(x) or isinstance(x, (str, bytes, Mapping)) or not isinstance(x, Iterable)
    return [x] if one else list(x)


def in_order(callbacks: Iterable[Callback]) -> list[Callback]:
    """By ``order``, then as given, but for what ``run_before`` and ``run_after`` say. Raises ValueError for a cycle."""
    cbs = list(callbacks)
    waits: list[set[int]] = [set() for _ in cbs]
    for i, cb in enumerate(cbs):
        for j, other in enumerate(cbs):
            if i != j and _names(cb.run_after, other):
                waits[i].add(j)
            if i != j and _names(cb.run_before, other):
                waits[j].add(i)
    ready = [(cb.order, i) for i, cb in enumerate(cbs) if not waits[i]]
    heapq.heapify(ready)
    out: list[Callback] = []
    while ready:
        _, i = heapq.heappop(ready)
        out.append(cbs[i])
        for j, waiting in enumerate(waits):
            if i in waiting:
                waiting.remove(i)
                if not waiting:
                    heapq.heappush(ready, (cbs[j].order, j))
    if len(out) < len(cbs):
        stuck = ", ".join(repr(cb) for cb in cbs if cb not in out)
        raise ValueError(
            f"run_before and run_after of these callbacks form a cycle: {stuck}; drop one of them"
        )
    return out


def listening(callbacks: Iterable[Callback], event_name: str) -> list[Callback]:
    """Those that an event must be told to, in order: the others' calls would cost more than the rest of the loop.

    All of them at ``after_fit``, where callbacks that were silenced for a fit come back.
    """
    return [
        cb
        for cb in in_order(callbacks)
        if event_name == "after_fit"
        or type(cb).__call__ is not Callback.__call__
        or name_for(cb, event_name) is not None
    ]


def _names(given: Iterable[type | str], cb: Callback) -> bool:
    """Whether a callback is among those named, by class or by a class's name."""
    each = (given,) if isinstance(given, (type, str)) else given
    return any(
        isinstance(cb, x) if isinstance(x, type) else x in {c.__name__ for c in type(cb).__mro__}
        for x in each
    )
