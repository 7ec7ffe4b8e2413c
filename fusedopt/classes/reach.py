"""What a step can get at around it: objects that are no library's, and what is in containers, some steps away."""

from __future__ import annotations

import collections
import contextvars
import functools
import io
import queue
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..trace.signature import PLAIN

LIBRARIES = frozenset(
    {"torch", "numpy", "fusedopt", "importlib", "_frozen_importlib", *sys.stdlib_module_names}
)
DEPTH, MOST = 6, 2000
"""How many steps away, and how many objects in all and in a container, are looked at."""
_LEAVES = (*PLAIN, complex, torch.Tensor, torch.nn.Module, types.FunctionType, types.BuiltinFunctionType)
_SEQUENCES = (list, tuple, set, frozenset, collections.deque)
_HOLDING = {"collections", "types"}
"""Libraries whose objects hold what others put into them: UserDict, SimpleNamespace."""
_USED_UP = (contextvars.ContextVar, io.IOBase, queue.SimpleQueue)


def is_used_up(x: Any) -> bool:
    """Whether calling its methods makes another thing of it, which cannot be put back: a file, a queue, an iterator."""
    return isinstance(x, _USED_UP) or is_iterator(x)


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
        if (isinstance(x, _LEAVES) and not isinstance(x, torch.Tensor)) or id(x) in seen:
            continue
        seen.add(id(x))
        yield x
        if depth:
            todo += [(part, depth - 1) for part in parts_of(x).values()]


def parts_of(x: Any) -> dict[Any, Any]:
    """What is in it, by the attribute, key or index that it is found by; nothing of a very large container."""
    if isinstance(x, (dict, *_SEQUENCES)):
        return {} if len(x) > MOST else x if isinstance(x, dict) else dict(enumerate(x))
    if isinstance(x, functools.partial):
        return {"func": x.func, "args": x.args, "keywords": x.keywords}
    if isinstance(x, types.MethodType):
        return {"__self__": x.__self__}
    found = attributes_of(x) or {}
    if isinstance(x, (types.ModuleType, type)):
        left = (types.ModuleType, type, types.FunctionType)
        return {k: v for k, v in found.items() if not isinstance(v, left) and not is_iterator(v)}
    return {} if is_library(x) else found


def is_library(x: Any) -> bool:
    """Whether it is an object of a library's own class, of which code asks for some attributes at most."""
    return (
        not isinstance(x, (dict, *_SEQUENCES, functools.partial))
        and _root(type(x).__module__) in LIBRARIES - _HOLDING
    )


def _root(module: str) -> str:
    return module.split(".")[0]
