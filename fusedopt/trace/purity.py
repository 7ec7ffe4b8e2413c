"""Whether a callback may be replayed: is what it does decided by its arguments alone?

Replay runs the recorded arithmetic of a trace instead of the callback. That is sound only if the callback would do the
same again for the same arguments, so its code may read nothing but arguments, constants and functions that are
themselves pure. A closure over a list, a number in a global, a random generator, a callable object: not replayable, and
then the callback is simply run on every step. When in doubt the answer is no.
"""

from __future__ import annotations

import dis
import functools
import math
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional

from . import methods  # noqa: F401  (fills the table)
from .signature import PLAIN as CONSTANTS
from .tensor import METHODS

MODULES = (torch, math, torch.nn, torch.nn.functional, torch.linalg, torch.special)
BUILTINS = (
    abs,
    min,
    max,
    round,
    pow,
    sum,
    len,
    range,
    zip,
    enumerate,
    isinstance,
    int,
    float,
    bool,
    tuple,
    dict,
    any,
    all,
)
_NAMES = {name for m in MODULES for name in vars(m) if name in METHODS or name.removesuffix("_") in METHODS}
_NAMES |= set(vars(math)) | {
    "nn",
    "functional",
    "linalg",
    "special",
    "preserve_format",
    "contiguous_format",
    "inf",
}
_NAMES |= {str(v).removeprefix("torch.") for v in vars(torch).values() if isinstance(v, torch.dtype)}
"""What pure code may take from a module: functions the tracer knows, mathematics, dtypes. Not ``torch.rand``."""
MAX_KNOWN = 512


class Sources:
    """What decides what pure callbacks do: their code, their defaults, and what they read from around them.

    A notebook cell that is run again changes it under a callback that stays the same object.
    """

    def __init__(self, callbacks: Iterable[Callable[..., Any]]) -> None:
        self.functions: list[tuple[types.FunctionType, types.CodeType, Any]] = []
        self.reads: list[tuple[Callable[[str], Any], str, Any]] = []
        self._seen: set[types.FunctionType] = set()
        for callback in callbacks:
            self._add(callback)

    def _add(self, value: Any) -> None:
        if isinstance(value, functools.partial):
            self._add(value.func)
        elif isinstance(value, types.FunctionType) and not _of_a_library(value) and value not in self._seen:
            self._seen.add(value)
            self.functions.append((value, value.__code__, value.__defaults__))
            for name in _global_names(value):
                found = value.__globals__.get(name)
                self.reads.append((value.__globals__.get, name, found))
                self._add(found)
            for cell in value.__closure__ or ():
                self.reads.append((functools.partial(getattr, cell), "cell_contents", cell.cell_contents))
                self._add(cell.cell_contents)

    def unchanged(self) -> bool:
        """Whether all of it is still there. Asked on every step, hence the plain loops."""
        for read, name, found in self.reads:
            if read(name) is not found:
                return False
        for function, code, defaults in self.functions:
            if function.__code__ is not code or function.__defaults__ is not defaults:
                return False
        return True

    @property
    def found(self) -> list[Any]:
        """All of it, to tell two apart."""
        return [x for _, *made_of in self.functions for x in made_of] + [found for _, _, found in self.reads]

    @property
    def closed(self) -> bool:
        """Whether some function has a closure, and so may hold on to anything."""
        return any(function.__closure__ for function, _, _ in self.functions)


_known: dict[types.FunctionType, tuple[bool, Sources]] = {}
"""Verdicts on functions without a closure; they hold until their sources change."""


def is_pure(callback: Callable[..., Any]) -> bool:
    """Whether the callback reads only its arguments, constants and pure functions."""
    if isinstance(callback, functools.partial):
        values = (*callback.args, *callback.keywords.values())
        return is_pure(callback.func) and all(isinstance(v, CONSTANTS) for v in values)
    return isinstance(callback, types.FunctionType) and _is_pure_function(callback)


def _is_pure_function(function: types.FunctionType) -> bool:
    verdict, sources = _known.get(function, (None, None))
    if verdict is None or not sources.unchanged():  # type: ignore[union-attr]
        verdict = _check(function, frozenset())
        if not function.__closure__:
            if len(_known) >= MAX_KNOWN:
                _known.clear()
            _known[function] = verdict, Sources([function] if verdict else ())
    return verdict


def _check(function: types.FunctionType, seen: frozenset) -> bool:
    if function in seen:
        return True
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    cells = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            cells[name] = cell.cell_contents
        except ValueError:  # not set yet
            return False
    if not all(isinstance(v, CONSTANTS) for v in defaults) or any(
        isinstance(v, CONSTANTS) for v in cells.values()
    ):
        return False  # a mutable default, or a number in a closure
    seen = seen | {function}
    reads = cells | _globals(function)
    return _plain_code(function.__code__, reads) and all(_is_pure_value(v, seen) for v in reads.values())


def _globals(function: types.FunctionType) -> dict[str, Any]:
    """What the code loads by global name, nested functions included; Ellipsis for a name that is not there."""
    builtins = function.__globals__.get("__builtins__", {})
    builtins = vars(builtins) if isinstance(builtins, types.ModuleType) else builtins
    names = _global_names(function)
    return {name: function.__globals__.get(name, builtins.get(name, ...)) for name in names}


def _global_names(function: types.FunctionType) -> tuple[str, ...]:
    return _loaded_names(function.__code__)


@functools.lru_cache(maxsize=MAX_KNOWN)
def _loaded_names(code: types.CodeType) -> tuple[str, ...]:
    steps = (step for inner in _codes(code) for step in dis.get_instructions(inner))
    return tuple(step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


_IMPURE_STEPS = ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "IMPORT_NAME", "YIELD_VALUE", "SEND")
_OF_ARGUMENTS = {"data", "grad", "dtype", "shape", "ndim", "device", "itemsize", "item", "is_integer"} | {
    *("get", "items", "keys", "values", "pop", "setdefault", "update", "append", "extend")
}
"""Attributes of tensors, numbers, dicts and lists, besides the tensor methods that the tracer knows."""


def _plain_code(code: types.CodeType, reads: dict[str, Any]) -> bool:
    """No writes to globals or closures, no imports, no generators; and no attributes but those named above.

    ``reads`` is what comes from around the code: only modules have attributes that are what they were.
    """
    for inner in _codes(code):
        owner: Any = None
        for step in dis.get_instructions(inner):
            if step.opname in _IMPURE_STEPS or (
                step.opname in ("STORE_ATTR", "DELETE_ATTR") and step.argval not in ("data", "grad")
            ):
                return False
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and not (
                _attribute_is_pure(step.argval) and (owner is None or isinstance(owner, types.ModuleType))
            ):
                return False
            around = step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF")
            owner = reads.get(step.argval) if around else None
    return True


def _attribute_is_pure(name: str) -> bool:
    return name in _NAMES or name in _OF_ARGUMENTS or _known_method(name)


def _known_method(name: str) -> bool:
    return name in METHODS or name.removesuffix("_") in METHODS


def _of_a_library(function: types.FunctionType) -> bool:
    return (function.__module__ or "").split(".")[0] in ("torch", "math")


def _is_pure_value(value: Any, seen: frozenset) -> bool:
    if isinstance(value, types.FunctionType):
        return _known_method(value.__name__) if _of_a_library(value) else _check(value, seen)
    if isinstance(value, functools.partial):
        return _is_pure_value(value.func, seen) and all(
            isinstance(v, CONSTANTS) for v in (*value.args, *value.keywords.values())
        )
    if isinstance(value, types.ModuleType):
        return value in MODULES or value is np
    if isinstance(value, type):
        return issubclass(value, BaseException) or value in BUILTINS
    if isinstance(value, types.BuiltinFunctionType):
        free = value.__self__ is None or isinstance(value.__self__, types.ModuleType)  # no object's method
        return value in BUILTINS or value in vars(math).values() or (free and _known_method(value.__name__))
    return False
