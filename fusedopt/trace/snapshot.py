"""Data around callbacks: what they may read, and a trace must not change.

A list that is appended to in a trace would have been appended to once for each parameter. So a trace keeps the contents
of what its callbacks read, puts back what it has changed, and says so.
"""

from __future__ import annotations

import array
import collections
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from .signature import PLAIN as CONSTANTS

CONTAINERS = (list, dict, set, frozenset, tuple)
SIZE_OF_SNAPSHOT = 4096
"""Elements of a tensor or array around a callback up to which a trace keeps a copy."""


def is_constant(value: Any) -> bool:
    """Whether it is data that can never change: as long as a name stands for the same object, it is the same."""
    if type(value) in (tuple, frozenset):
        return all(map(is_constant, value))
    return type(value) in CONSTANTS or isinstance(value, (np.number, np.bool_))


def same_constant(a: Any, b: Any) -> bool:
    """Whether they are the same object, or equal numbers or texts, which programs cannot tell apart."""
    return a is b or (type(a) is type(b) and type(a) in CONSTANTS and repr(a) == repr(b))


def is_data(value: Any) -> bool:
    """Whether it is a number, flag, small tensor or array, or a container of such: readable, and to be snapshot."""
    if isinstance(value, (*CONSTANTS, np.generic)):
        return True
    if type(value) in (list, set, frozenset, tuple):
        return all(map(is_data, value))
    if type(value) is dict:
        return all(map(is_data, value.values()))
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return bool(value.numel() <= SIZE_OF_SNAPSHOT)
    return type(value) is np.ndarray and value.size <= SIZE_OF_SNAPSHOT and value.dtype != object


class Snapshot:
    """The contents of containers, tensors and arrays, to tell whether they were changed, and to put them back."""

    def __init__(self, values: Iterable[Any]) -> None:
        self.saved: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()
        for value in values:
            self._take(value)

    def _take(self, value: Any) -> None:
        if isinstance(value, CONSTANTS) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, (list, dict, set, collections.deque, bytearray)):
            self.saved.append((value, dict(value) if isinstance(value, dict) else value.copy()))
        elif isinstance(value, array.array):
            self.saved.append((value, value[:]))
        elif isinstance(value, torch.Tensor) and is_data(value):
            self.saved.append((value, (value._version, value.detach().clone())))
        elif isinstance(value, np.ndarray) and is_data(value):
            self.saved.append((value, value.copy()))
        for inner in value.values() if type(value) is dict else value if type(value) in CONTAINERS else ():
            self._take(inner)

    def restored(self) -> bool:
        """Whether anything was changed; then it is as it was again."""
        changed = [(value, was) for value, was in self.saved if not _unchanged(value, was)]
        for value, was in changed:
            if isinstance(value, torch.Tensor):
                with torch.no_grad():
                    value.detach().copy_(was[1])
            elif isinstance(value, np.ndarray):
                value[...] = was
            elif isinstance(value, array.array):
                value[:] = was
            elif isinstance(value, dict):  # a Counter's own update adds
                value.clear()
                dict.update(value, was) if isinstance(value, collections.Counter) else value.update(was)
            else:
                value.clear()
                value.update(was) if isinstance(value, set) else value.extend(was)
        return bool(changed)


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether arrays have the same in them, NaN too."""
    return bool(np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"))


def _unchanged(value: Any, was: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return bool(value._version == was[0])
    if isinstance(value, np.ndarray):
        return equal(value, was)
    if isinstance(value, (set, bytearray, array.array)):
        return bool(value == was)
    if isinstance(value, (list, collections.deque)):
        return len(value) == len(was) and all(x is y for x, y in zip(value, was, strict=True))
    return list(value) == list(was) and all(value[k] is was[k] for k in was)
