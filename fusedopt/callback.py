"""What can be told of a callback without calling it: its name, its arguments, its hyperparameter defaults."""

from __future__ import annotations

import dis
import functools
import inspect
import operator
import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

Callback = Callable[..., Any]


def function_of(callback: Callback) -> Callback:
    """The callback itself, or what a partial wraps."""
    return function_of(callback.func) if isinstance(callback, functools.partial) else callback


def name_of(callback: Callback) -> str:
    """Its name for messages; a partial has its function's."""
    function = function_of(callback)
    return getattr(function, "__name__", type(function).__name__)


def is_ours(callback: Callback) -> bool:
    """Whether it is one of ``fusedopt.callbacks``."""
    return getattr(function_of(callback), "__module__", "") == f"{__package__}.callbacks"


def arguments_of(callback: Callback) -> Mapping[str, Any]:
    """Its named arguments with their defaults (``inspect.Parameter.empty`` without one)."""
    if isinstance(callback, functools.partial):
        own = arguments_of(callback.func)
        return dict(own) | {k: v for k, v in callback.keywords.items() if k in own}
    if not isinstance(callback, types.FunctionType):
        return _arguments(callback)
    made_of = callback.__code__, callback.__defaults__, callback.__kwdefaults__
    known = _known.get(callback)
    if known is None or any(map(operator.is_not, known[0], made_of)):
        known = _known[callback] = made_of, _arguments(callback)
    return known[1]


_known: weakref.WeakKeyDictionary[Callback, tuple[tuple, Mapping[str, Any]]] = weakref.WeakKeyDictionary()


def _arguments(callback: Callback) -> Mapping[str, Any]:
    try:
        return {p.name: p.default for p in inspect.signature(callback).parameters.values()}
    except (TypeError, ValueError):  # no signature to be had
        return {}


def defaults_of(callback: Callback) -> dict[str, Any]:
    """Its hyperparameter defaults; a partial has its function's, but for what it sets itself."""
    if isinstance(callback, functools.partial):
        return {k: v for k, v in defaults_of(callback.func).items() if k not in callback.keywords}
    return dict(getattr(callback, "defaults", {}))


def looked_up(callback: Callback) -> frozenset[str] | None:
    """Names it may take from ``**kwargs``: the strings in its code. None if it may take any."""
    function = function_of(callback)
    return _looked_up(function.__code__) if isinstance(function, types.FunctionType) else None


@functools.lru_cache(maxsize=256)
def _looked_up(code: types.CodeType) -> frozenset[str] | None:
    codes = list(_codes(code))
    if any(step.opname == "CALL_FUNCTION_EX" for code in codes for step in dis.get_instructions(code)):
        return None  # it hands its arguments on
    return frozenset(c for code in codes for c in code.co_consts if isinstance(c, str))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def identity(callback: Callback) -> Hashable:
    """Equal for callbacks that are the same function with the same bound arguments."""
    if isinstance(callback, functools.partial):
        bound = [*enumerate(callback.args), *sorted(callback.keywords.items())]
        return identity(callback.func), tuple((name, type(v), _hashable(v)) for name, v in bound)
    return callback if isinstance(callback, types.FunctionType) else id(callback)


def _hashable(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
