"""What a step can get at around it: objects that are no library's, and what is in containers, some steps away."""

from __future__ import annotations

import collections
import contextvars
import ctypes
import functools
import io
import queue
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..trace.signals import STANDARD
from ..trace.signature import PLAIN
from ..trace.snapshot import is_data
from ..trace.sources import content_of

LIBRARIES = STANDARD | {"torch", "numpy", "fusedopt"}
DEPTH, MOST = 6, 2000
"""How many steps away, and how many objects in all and in a container, are looked at."""
_LEAVES = (*PLAIN, complex, torch.Tensor, torch.nn.Module, types.FunctionType, types.BuiltinFunctionType)
_INSIDE = (torch.Tensor, types.FunctionType, types.BuiltinMethodType)
"""Of these, what has no attributes that are looked at, and is no leaf to who seeks what may be changed."""
SEQUENCES = (list, tuple, set, frozenset, collections.deque)
_HOLDING = {"collections", "types"}
"""Libraries whose objects hold what others put into them: UserDict, SimpleNamespace."""
OPAQUE = (memoryview, types.MappingProxyType, ctypes._SimpleCData, ctypes.Array, ctypes.Structure)
_USED_UP = (contextvars.ContextVar, io.IOBase, queue.SimpleQueue)


def is_used_up(x: Any) -> bool:
    """Whether calling its methods makes another thing of it, which cannot be put back: a file, a queue, an iterator."""
    return isinstance(x, _USED_UP) or is_iterator(x)


def is_unwatched(x: Any) -> bool:
    """Whether it holds data that others may change in place, of which no copy is kept to compare with."""
    if isinstance(x, OPAQUE):
        return True
    if isinstance(x, np.ndarray):
        return not is_data(x)
    return isinstance(x, (dict, *SEQUENCES)) and len(x) > MOST and not is_data(x)


def is_iterator(x: Any) -> bool:
    """Whether a loop uses it up, without a call."""
    return hasattr(type(x), "__next__") and not isinstance(x, io.IOBase)


def attributes_of(x: Any) -> dict[str, Any] | None:
    """An object's own attributes, those in slots too; None for libraries' modules and classes, and what has none."""
    if isinstance(x, _LEAVES):
        return None
    if isinstance(x, types.ModuleType):
        return None if _root(x.__name__) in LIBRARIES else dict(vars(x))
    if isinstance(x, type):
        return None if _root(x.__module__) in LIBRARIES else dict(vars(x))
    own = getattr(x, "__dict__", None)
    found = dict(own) if isinstance(own, dict) else {}
    for base in type(x).__mro__ if _root(type(x).__module__) not in LIBRARIES else ():
        for name, slot in vars(base).items():
            if isinstance(slot, types.MemberDescriptorType) and hasattr(x, name):
                found[name] = getattr(x, name)
    return found or (found if isinstance(own, dict) else None)


def places_of(x: Any) -> list[tuple[Any, Mapping[str, Any]]]:
    """Where the attributes of a module, a class or an nn.Module are looked up, one after another, with what is there;
    of a library's nowhere."""
    if isinstance(x, torch.nn.Module):
        inner = [] if not x._modules else [(x._modules, x._modules)]
        return [(x, vars(x)), *inner, *places_of(type(x))]
    if isinstance(x, types.ModuleType):
        return [] if _root(x.__name__) in LIBRARIES else [(x, vars(x))]
    return [] if _root(x.__module__) in LIBRARIES else [(kind, vars(kind)) for kind in x.__mro__]


def reached(roots: Iterable[Any]) -> Iterator[Any]:
    """These, and what code can get at from them. In modules and classes functions, classes and modules are left out."""
    seen: set[int] = set()
    todo = [(x, DEPTH) for x in roots]
    while todo and len(seen) < MOST:
        x, depth = todo.pop()
        if (isinstance(x, _LEAVES) and not isinstance(x, _INSIDE)) or id(x) in seen:
            continue
        seen.add(id(x))
        yield x
        if depth:
            todo += [(part, depth - 1) for part in parts_of(x).values()]


def parts_of(x: Any) -> dict[Any, Any]:
    """What is in it, by the attribute, key or index that it is found by; nothing of a very large container."""
    if isinstance(x, (dict, *SEQUENCES)):
        return {} if len(x) > MOST else x if isinstance(x, dict) else dict(enumerate(x))
    if isinstance(x, functools.partial):
        return {"func": x.func, "args": x.args, "keywords": x.keywords}
    if isinstance(x, types.MethodType) or (
        isinstance(x, types.BuiltinMethodType) and not is_used_up(x.__self__)
    ):
        return {} if isinstance(x.__self__, (types.ModuleType, type)) else {"__self__": x.__self__}
    if isinstance(x, types.FunctionType):
        return _closed_over(x) if _root(x.__module__ or "") not in LIBRARIES else {}
    found = attributes_of(x) or {}
    if isinstance(x, (types.ModuleType, type)):
        left = (types.ModuleType, type, types.FunctionType)
        return {k: v for k, v in found.items() if not isinstance(v, left) and not is_iterator(v)}
    return {} if is_library(x) else found


def _closed_over(function: types.FunctionType) -> dict[Any, Any]:
    """What a function has for itself: cells, defaults and attributes."""
    cells = {f"cell {k}": content_of(cell, "") for k, cell in enumerate(function.__closure__ or ())}
    defaults = {f"default {k}": value for k, value in enumerate(function.__defaults__ or ())}
    return cells | defaults | (function.__kwdefaults__ or {}) | vars(function)


def is_library(x: Any) -> bool:
    """Whether it is an object of a library's own class, of which code asks for some attributes at most."""
    return (
        not isinstance(x, (dict, *SEQUENCES, functools.partial))
        and _root(type(x).__module__) in LIBRARIES - _HOLDING
    )


def _root(module: str) -> str:
    return module.split(".")[0]
