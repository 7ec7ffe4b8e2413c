"""What can be told of a callback without calling it: its name, its arguments, its hyperparameter defaults."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any

Callback = Callable[..., Any]


def function_of(callback: Callback) -> Callback:
    """The callback itself, or what a partial wraps."""
    return function_of(callback.func) if isinstance(callback, functools.partial) else callback


def name_of(callback: Callback) -> str:
    """Its name for messages; a partial has its function's."""
    function = function_of(callback)
    return getattr(function, "__name__", type(function).__name__)


def arguments_of(callback: Callback) -> Mapping[str, Any]:
    """Its named arguments with their defaults (``inspect.Parameter.empty`` without one)."""
    try:
        return _arguments(callback)
    except TypeError:  # unhashable: look anew each time
        return _arguments.__wrapped__(callback)


@functools.lru_cache(maxsize=512)
def _arguments(callback: Callback) -> Mapping[str, Any]:
    if isinstance(callback, functools.partial):
        own = arguments_of(callback.func)
        return own | {k: v for k, v in callback.keywords.items() if k in own}  # type: ignore[operator]
    try:
        return {p.name: p.default for p in inspect.signature(callback).parameters.values()}
    except (TypeError, ValueError):  # no signature to be had
        return {}


def defaults_of(callback: Callback) -> dict[str, Any]:
    """Its hyperparameter defaults; a partial has its function's, but for what it sets itself."""
    if isinstance(callback, functools.partial):
        return {k: v for k, v in defaults_of(callback.func).items() if k not in callback.keywords}
    return dict(getattr(callback, "defaults", {}))


def looked_up(callback: Callback) -> set[str] | None:
    """Names it may take from ``**kwargs``: the strings in its code. None if that cannot be told."""
    function = function_of(callback)
    if not isinstance(function, types.FunctionType):
        return None
    return {c for c in function.__code__.co_consts if isinstance(c, str)}


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
