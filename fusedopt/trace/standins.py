"""Callbacks as a trace runs them: their own code, with stand-ins for functions that would take a number's value.

``math.exp(x)`` asks ``x`` for its float, and ``float(x)`` has to return one: neither leaves room for a `Number`. So a
trace runs a callback's code with globals of its own, in which these names stand for functions that record what is done
to a Number, and hand on anything else. Nothing outside the trace is changed, so other threads never meet them.

That they can be told from the real ones (``type(x) is float``) does not matter: code that asks is never traced (see
purity.py). A function that is reached another way, through an object's attribute say, is the real one, and what it
takes of a Number escapes.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import math
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .number import ARITHMETIC, Number, leave, operate
from .signals import Untraceable
from .sources import loaded_names, method_of, of_a_library


def _recording(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        if not kwargs and 1 <= len(args) <= 2:
            for x in args:  # what is read from a tensor knows what to do with a Number
                if hasattr(type(x), "symbolic"):
                    return type(x).of_math(op, *args)
            if any(isinstance(x, Number) for x in args):
                return operate(op, *args)
        return function(*args, **kwargs)

    return recorded


def _choosing(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``max`` and ``min``. Of an int and a float it takes a branch, as the result's type depends on which it is."""

    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        for x in args if not kwargs and len(args) == 2 else ():
            if hasattr(type(x), "chosen") and (found := type(x).chosen(op, *args)) is not None:
                return found
        if not kwargs and len(args) == 2 and any(isinstance(x, Number) for x in args):
            a, b = (x.value if isinstance(x, Number) else x for x in args)
            if type(a) is type(b):
                return operate(op, *args)
        return function(*args, **kwargs)

    return recorded


class _Kind(type):
    """Of a class that stands in for its base."""

    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, cls.__bases__)


class _Float(float, metaclass=_Kind):
    def __new__(cls, *args: Any) -> Any:
        if len(args) == 1 and hasattr(type(args[0]), "symbolic"):
            return args[0].item()
        recorded = len(args) == 1 and isinstance(args[0], Number)
        return operate("builtins.float", *args) if recorded else float(*args)


class _Int(int, metaclass=_Kind):
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and hasattr(type(args[0]), "symbolic"):
            return type(args[0]).of_math("math.trunc", args[0])
        plain = kwargs or len(args) != 1 or not isinstance(args[0], Number)
        return int(*args, **kwargs) if plain else operate("builtins.int", *args)


def _place(i: int, x: Any) -> int:
    """The index of what is in a list, in words of its own where the list is of some parameters out of many."""
    x = x[0] if type(x) is tuple and x else x
    return x.place_in_trace(i) if hasattr(type(x), "place_in_trace") else i


def _enumerate(iterable: Iterable[Any], start: int = 0) -> Iterator[tuple[int, Any]]:
    return ((_place(i, x), x) for i, x in enumerate(iterable, start))


def _len(x: Any) -> int:
    return x.length_in_trace() if hasattr(type(x), "length_in_trace") else len(x)


def _zip(*iterables: Any, strict: bool = False) -> Any:
    """Some parameters out of many would be paired with what a list has for others."""
    lists = [x for x in iterables if isinstance(x, (list, tuple)) and x]
    some = {len(x) for x in lists if type(_place(0, next(iter(x)))) is not int}
    if some and any(len(x) not in some for x in lists):
        raise Untraceable(
            "the step pairs parameters, a few of which stand for all, with what is beside them in another list",
            "keep what belongs to a parameter in its state: self.state[p]",
        )
    return zip(*iterables, strict=strict)


class _Torch:
    """torch, but for what makes tensors of numbers: it takes Python's own only."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _leaving(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *args, **kwargs: function(leave(x), *args, **kwargs)


for _name in ("tensor", "as_tensor", "scalar_tensor"):
    setattr(_Torch, _name, staticmethod(_leaving(getattr(torch, _name))))


def _import(name: str, *args: Any) -> Any:
    module = builtins.__import__(name, *args)
    return _MODULES.get(id(module), module)


_BUILTINS: dict[str, Any] = {
    "float": _Float,
    "int": _Int,
    "max": _choosing("builtins.max", max),
    "min": _choosing("builtins.min", min),
    "__import__": _import,
    "enumerate": _enumerate,
    "len": _len,
    "zip": _zip,
}
_FUNCTIONS = {id(f): _recording(op, f) for op, f in ARITHMETIC.items() if op.startswith("math.")}
_MATH = types.SimpleNamespace(**{name: _FUNCTIONS.get(id(x), x) for name, x in vars(math).items()})
_MODULES = {id(math): _MATH, id(torch): _Torch()}
_ALL = {id(getattr(builtins, n)): f for n, f in _BUILTINS.items()} | _FUNCTIONS | _MODULES


class StandIns:
    """What callbacks, and the functions that they call, are run as in one trace.

    ``made`` are the functions with stand-ins, by those they stand in for; ``within``: packages of torch whose functions
    get them too.
    """

    def __init__(self, within: str = "") -> None:
        self._builtins = vars(builtins) | _BUILTINS
        self.made: dict[types.FunctionType, types.FunctionType] = {}
        self._within = within

    def callback(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        method = method_of(callback)
        if isinstance(method, types.FunctionType):  # an object that is called
            return types.MethodType(self.of(method), callback)
        return self.of(callback)

    def of(self, value: Any) -> Any:
        if isinstance(value, functools.partial):
            return functools.partial(self.callback(value.func), *value.args, **value.keywords)
        if isinstance(value, types.MethodType):
            return types.MethodType(self.of(value.__func__), value.__self__)
        if isinstance(value, types.FunctionType) and self._ours(value):
            return self.made.get(value) or self._function(value)
        if self._within and value is torch:  # whose functions are seen as they are called
            return value
        return _ALL.get(id(value), value)

    def _ours(self, function: types.FunctionType) -> bool:
        within = self._within and (function.__module__ or "").startswith(self._within)
        return bool(within) or not of_a_library(function)

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        around, code = function.__globals__, function.__code__
        names: dict[str, Any] = {"__name__": around.get("__name__", "")}
        names["__warningregistry__"] = around.setdefault("__warningregistry__", {})
        standard = around.get("__builtins__") in (builtins, vars(builtins))
        names["__builtins__"] = self._builtins if standard else around.get("__builtins__", builtins)
        cells = [(cell, types.CellType()) for cell in function.__closure__ or ()]
        made = types.FunctionType(
            code, names, function.__name__, function.__defaults__, tuple(new for _, new in cells)
        )
        made.__kwdefaults__ = function.__kwdefaults__
        made.__dict__.update(function.__dict__)
        self.made[function] = made  # before what it calls, which may be itself
        for name in loaded_names(code):
            if name in around:
                names[name] = self.of(around[name])
        for cell, new in cells:
            with contextlib.suppress(ValueError):  # not set yet, so neither is the other
                new.cell_contents = self.of(cell.cell_contents)
        return made
