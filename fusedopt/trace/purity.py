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
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional

from . import methods  # noqa: F401  (fills the table)
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
CONSTANTS = (type(None), bool, int, float, str, bytes, type(...), torch.dtype, torch.memory_format)
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


@functools.lru_cache(maxsize=512)
def _is_pure_function(function: types.FunctionType) -> bool:
    return _check(function, frozenset())


def is_pure(callback: Callable[..., Any]) -> bool:
    """Whether the callback reads only its arguments, constants and pure functions."""
    if isinstance(callback, functools.partial):
        values = (*callback.args, *callback.keywords.values())
        return is_pure(callback.func) and all(isinstance(v, CONSTANTS) for v in values)
    return isinstance(callback, types.FunctionType) and _is_pure_function(callback)


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
    reads = [*cells.values(), *_globals(function)]
    return _plain_code(function.__code__) and all(_is_pure_value(v, seen) for v in reads)


def _globals(function: types.FunctionType) -> Iterator[Any]:
    """What the code loads by global name, nested functions included; Ellipsis for a name that is not there."""
    builtins = function.__globals__.get("__builtins__", {})
    builtins = vars(builtins) if isinstance(builtins, types.ModuleType) else builtins
    for code in _codes(function.__code__):
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                yield function.__globals__.get(step.argval, builtins.get(step.argval, ...))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


_IMPURE_STEPS = ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "IMPORT_NAME", "YIELD_VALUE", "SEND")


def _plain_code(code: types.CodeType) -> bool:
    """No writes to globals or closures, no imports, no generators; and from modules only what is pure."""
    for inner in _codes(code):
        previous = None
        for step in dis.get_instructions(inner):
            if step.opname in _IMPURE_STEPS:
                return False
            from_module = previous is not None and previous.opname in (
                "LOAD_GLOBAL",
                "LOAD_DEREF",
                "LOAD_ATTR",
                "LOAD_METHOD",
            )
            if (
                step.opname in ("LOAD_ATTR", "LOAD_METHOD")
                and from_module
                and not _attribute_is_pure(step.argval)
            ):
                return False
            previous = step
    return True


def _attribute_is_pure(name: str) -> bool:
    return (
        name in _NAMES
        or name in METHODS
        or name.removesuffix("_") in METHODS
        or name in ("data", "grad", "dtype", "shape", "ndim", "device", "get", "items")
    )


def _is_pure_value(value: Any, seen: frozenset) -> bool:
    if isinstance(value, types.FunctionType):
        return value.__module__.split(".")[0] in ("torch", "math") or _check(value, seen)
    if isinstance(value, functools.partial):
        return _is_pure_value(value.func, seen) and all(
            isinstance(v, CONSTANTS) for v in (*value.args, *value.keywords.values())
        )
    if isinstance(value, types.ModuleType):
        return value in MODULES or value is np
    if isinstance(value, type):
        return issubclass(value, BaseException) or value in BUILTINS
    if isinstance(value, types.BuiltinFunctionType):
        return value in BUILTINS or value.__name__ in METHODS or value in vars(math).values()
    return False
