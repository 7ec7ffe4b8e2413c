"""Tensors that have memory in common: what is stepped after what, as a plain loop over parameters would, and what is
copied first."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from ..extension import leaf
from .items import Item, dense, walkable
from .sharded import here

MOST_COMPARED = 1 << 22  # elements of tensors with gaps, of which it is asked which addresses they have
MOST_COUNTED = 1 << 26  # elements of memory
FEW = 32  # tensors of which each two are compared, as large ones are sooner than their elements are counted
_Span = tuple[int, int, int, bool, torch.Tensor]
"""Where a tensor begins and ends in memory, whose it is, whether it is written, and itself."""


class Turns(NamedTuple):
    """``first``: items that may be stepped at once; ``later``: those whose turn comes after them, "" or ``why``."""

    first: list[Item]
    later: list[Item]
    why: str


def in_turn(todo: list[Item]) -> Turns:
    """Which items may be stepped at once: those that have nothing in common with one before them.

    A parameter is stepped as often as it is listed. Where parameters lie in the same memory, or state or a gradient in
    that of another parameter, the one that is listed later sees what the one before has written. Gradients that only
    share memory with each other are read, and do not matter.
    """
    seen: dict[int, Item] = {}
    for item in todo:
        seen.setdefault(id(item.home), item)
    if len(seen) == len(todo) and _surely_apart(todo):
        return Turns(todo, [], "")
    waiting = {i for i, item in enumerate(todo) if seen[id(item.home)] is not item}
    why = "a parameter is listed twice" if waiting else ""
    written = [(i, here(t), True) for i, item in enumerate(todo) for t in _written(item)]
    every = [*written, *((i, here(item.grad), False) for i, item in enumerate(todo))]
    for i, j in _meeting(every):
        waiting.add(max(i, j))
        a, b = (f"parameter {todo[k].where[1]} of group {todo[k].where[0]}" for k in sorted((i, j)))
        why = why or f"{b} has memory in common with {a}"
    first: list[Item] = []
    later: list[Item] = []
    for i, item in enumerate(todo):
        (later if i in waiting else first).append(item)
    return Turns(first, later, why)


def _surely_apart(todo: list[Item]) -> bool:
    """Whether it is quickly found that no item writes to what another one has: ordinary tensors, and no extra ones."""
    plain = (torch.nn.Parameter, torch.Tensor)
    if leaf.native is None or any(type(item.home) not in plain or item.modes.given for item in todo):
        return False
    states = [item.state for item in todo]
    return bool(leaf.native.apart([item.home for item in todo], [item.grad for item in todo], states))


def disjoint(written: list[torch.Tensor], read: list[torch.Tensor]) -> bool:
    """Whether none of those that are written has memory in common with another one, be it written or read."""
    if leaf.native is not None and leaf.native.apart(written, read, []):
        return True
    every = [(k, t, k < len(written)) for k, t in enumerate([*written, *read])]
    return not any(True for _ in _meeting(every))


def keep_apart(todo: list[Item]) -> None:
    """Copy extra tensors that lie in memory which a step writes to, be it another parameter's."""
    given = [(item, key) for item in todo for key in item.modes.given if key in item.state]
    if not given:
        return
    written = [t for item in todo for t in (*_written(item), item.grad) if walkable(t)]
    spans = sorted(map(span, written))
    starts, ends = [first for first, _ in spans], [*itertools.accumulate((last for _, last in spans), max)]
    for item, key in given:
        value = item.state[key]
        if walkable(value):
            first, last = span(value)
            before = bisect.bisect_left(starts, last)
            if before and ends[before - 1] > first:
                item.state[key] = value.detach().clone()


def span(t: torch.Tensor) -> tuple[int, int]:
    """From where to where a tensor's elements are in memory."""
    length = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    return t.data_ptr(), t.data_ptr() + length * t.itemsize


def _written(item: Item) -> list[torch.Tensor]:
    """The parameter and the tensors of its state, without extra ones."""
    given = item.modes.given
    return [item.home, *[t for k, t in item.state.items() if isinstance(t, torch.Tensor) and k not in given]]


def _meeting(every: Iterable[tuple[int, torch.Tensor, bool]]) -> Iterator[tuple[int, int]]:
    """Of tensors with their owner and whether it writes them: pairs of owners of which one writes to what both have."""
    spans = [
        (*span(t), owner, written, t)
        for owner, t, written in every
        if walkable(t) and t.layout is torch.strided and t.numel() and t.data_ptr()
    ]
    spans.sort(key=lambda each: each[:2])
    together: list[_Span] = []
    end = 0
    for one in [*spans, None]:
        if one is None or one[0] >= end:
            if len(together) <= FEW or not _painted_apart(together):
                yield from _pairs(together)
            together = []
        if one is not None:
            together.append(one)
            end = max(end, one[1])


def _painted_apart(spans: list[_Span]) -> bool:
    """Whether it is certain that they have no element in common, though they reach into each other, as the columns of a
    matrix do: a count for each element of the memory says it, whatever their number."""
    first, size = spans[0][0], spans[0][4].itemsize
    length = (max(span[1] for span in spans) - first) // size
    if length > MOST_COUNTED or any(t.itemsize != size or (at - first) % size for at, *_, t in spans):
        return False
    counts = torch.zeros(length, dtype=torch.int16)
    views = [(counts.as_strided(t.shape, t.stride(), (at - first) // size), w) for at, _, _, w, t in spans]
    if any(torch._debug_has_internal_overlap(view) == 1 for view, _ in views):
        return False
    for view, written in views:
        if written:
            view.add_(1)
    return bool(counts.max() <= 1) and not any(view.any() for view, written in views if not written)


def _pairs(spans: list[_Span]) -> Iterator[tuple[int, int]]:
    reaching: list[_Span] = []  # those that go on beyond where one begins
    for one in spans:
        reaching = [other for other in reaching if other[1] > one[0]]
        for other in reaching:
            if one[2] != other[2] and (one[3] or other[3]) and _meet(one[4], other[4]):
                yield one[2], other[2]
        reaching.append(one)


def _meet(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors that reach into each other have an element in common: the columns of a matrix have none."""
    if dense(a) and dense(b):
        return True
    if a.stride() == b.stride() and a.itemsize == b.itemsize:
        dims = sorted(zip(a.stride(), a.shape, b.shape, strict=True), reverse=True)
        steps = [(s * a.itemsize, n, m) for s, n, m in dims if n > 1 or m > 1]
        reach = a.itemsize
        for step, n, m in reversed(steps):
            if step < reach:
                break
            reach += step * (max(n, m) - 1)
        else:
            return _steps_meet(b.data_ptr() - a.data_ptr(), steps, a.itemsize)
    return max(a.numel(), b.numel()) > MOST_COMPARED or bool(np.intersect1d(_bytes(a), _bytes(b)).size)


def _steps_meet(distance: int, steps: list[tuple[int, int, int]], size: int) -> bool:
    """Whether elements of two tensors meet whose first ones are so far apart: by steps, each longer than all that come
    after it together, and how many elements there are of each in either tensor."""
    if not steps:
        return abs(distance) < size
    (step, n, m), *shorter = steps
    counts = (distance // step, distance // step + 1)
    return any(-m < k < n and _steps_meet(distance - k * step, shorter, size) for k in counts)


def _bytes(t: torch.Tensor) -> np.ndarray:
    """The addresses of all its bytes."""
    found = np.array([t.data_ptr()])
    for n, step in [
        *((n, s * t.itemsize) for n, s in zip(t.shape, t.stride(), strict=True)),
        (t.itemsize, 1),
    ]:
        found = (found[:, None] + step * np.arange(n)).reshape(-1)
    return found
