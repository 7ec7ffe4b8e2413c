"""What a callback may do besides changing its tensors: decided from its code, before it is ever called.

A traced callback is run once for many parameters, on symbolic tensors, or not at all when the arithmetic of an earlier
trace is replayed. Whoever wrote it expects a plain loop: one call for each parameter, with the real one. Both agree
only if the callback does nothing but arithmetic, so four kinds are told apart:

PURE: what it does is decided by its arguments alone, so a trace may be replayed.
READS: it also reads constants (a number of its module, of a closure, of an object that holds settings), so a trace may
be replayed as long as it would find the same ones: see `Sources.now`.
VARIES: it also reads what changes while it stays the same object (a list, a dict, a tensor), so it is traced on every
step.
ACTS: it may do more (draw random numbers, print, count its calls, ask which parameter it was given), or calls what
cannot be looked into. It is never traced, but run eagerly, once for each parameter in the order of a plain loop.

When in doubt the answer is ACTS. What is seen from the code only as a name (``x.append``) may still change a list that
the callback reads, so a trace takes a `Snapshot` of these and undoes and reports a change.
"""

from __future__ import annotations

import dis
import enum
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional

from . import methods  # noqa: F401  (fills the table)
from .signals import place_of
from .signature import PLAIN as CONSTANTS
from .snapshot import CONTAINERS, is_constant, is_data
from .sources import (
    MAX_KNOWN,
    MODULES,
    NOTHING,
    Sources,
    codes,
    content_of,
    is_ours,
    is_pair,
    line_of,
    method_of,
    name_of,
    of_a_library,
    plain_attribute,
)
from .tensor import METHODS
from .totals import total


class Level(enum.IntEnum):
    """See above."""

    PURE = 0
    READS = 1
    VARIES = 2
    ACTS = 3


PURE, READS, VARIES, ACTS = Level


class Verdict(NamedTuple):
    """What a callback does at most, and for ACTS why that is thought."""

    level: Level
    reason: str = ""
    remedy: str = ""


# --
# What code may use

BUILTINS = (
    *(abs, min, max, round, pow, sum, divmod, len, range, zip, enumerate, sorted, reversed, map, filter),
    *(isinstance, int, float, bool, complex, str, repr, tuple, list, dict, set, frozenset, slice, any, all),
)

_NAMES = {name for m in MODULES for name in vars(m) if name in METHODS or name.removesuffix("_") in METHODS}
_NAMES |= {
    *vars(math),
    "nn",
    "functional",
    "linalg",
    "special",
    "einsum",
    "tensordot",
    "inf",
    "no_grad",
    "enable_grad",
}
_NAMES |= {"preserve_format", "contiguous_format"}
_NAMES |= {str(v).removeprefix("torch.") for v in vars(torch).values() if isinstance(v, torch.dtype)}
"""What pure code may take from a module: functions the tracer knows, mathematics, dtypes. Not ``torch.rand``."""

_MAKERS = {
    "tensor",
    "as_tensor",
    "scalar_tensor",
    "zeros",
    "ones",
    "full",
    "finfo",
    "eye",
    "arange",
    "linspace",
}
_RANDOM = {
    *(
        "bernoulli",
        "multinomial",
        "poisson",
        "binomial",
        "normal",
        "random",
        "uniform",
        "cauchy",
        "exponential",
    ),
    *(
        "geometric",
        "log_normal",
        "rrelu",
        "dropout",
        "alpha_dropout",
        "feature_dropout",
        "feature_alpha_dropout",
    ),
}
DRAWS = (
    "fusedopt.uniform and fusedopt.normal draw random numbers in kernels (docs/callbacks.md#random-numbers)"
)
_OTHER_EFFECTS = {
    *(
        "backward",
        "retain_grad",
        "share_memory_",
        "set_",
        "resize_",
        "resize_as_",
        "untyped_storage",
        "storage",
    ),
    *(
        "apply_",
        "map_",
        "map2_",
        "register_hook",
        "register_post_accumulate_grad_hook",
        "pin_memory",
        "is_shared",
    ),
}


def _public(*kinds: type) -> set[str]:
    return {name for kind in kinds for name in dir(kind) if not name.startswith("_")}


_OF_TENSORS = {
    name
    for name in _public(torch.Tensor) - _OTHER_EFFECTS
    if name.removesuffix("_") not in _RANDOM and not name.startswith("__")
}
_OF_ARGUMENTS = {"data", "grad", "dtype", "shape", "ndim", "device", "itemsize", "requires_grad", "item"}
_OF_ARGUMENTS |= _OF_TENSORS | _public(int, float, str, tuple, list, dict, set, torch.finfo)
"""Attributes of tensors, numbers and containers that pure code may use. What a symbolic tensor lacks it refuses, and a
changed container is found by a `Snapshot`."""

_ASYNCHRONOUS = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_GENERATOR
_STEPS = {
    "STORE_GLOBAL": "assigns the global {}",
    "DELETE_GLOBAL": "deletes the global {}",
    "STORE_NAME": "defines a class",
    "LOAD_BUILD_CLASS": "defines a class",
    "MATCH_CLASS": "asks for the class of a value (match)",
    "LOAD_SUPER_ATTR": "calls a method of super()",
}


def _is_arithmetic(module: types.ModuleType, name: str, value: Any) -> bool:
    """Whether an attribute of a module that is known here does nothing but compute when it is called."""
    if name in _NAMES:
        return True
    if name.removesuffix("_") in _RANDOM or name.startswith("_"):
        return False
    if module in (torch.linalg, torch.special) or isinstance(value, (np.ufunc, *CONSTANTS)):
        return True
    return (module in (torch, torch.nn.functional) and name in _OF_TENSORS) or (
        module in (torch, np) and name in _MAKERS
    )


# --
# Verdicts


def examine(callback: Callable[..., Any]) -> Verdict:
    """What the callback may do, with everything that it calls."""
    if is_ours(callback):
        return Verdict(PURE)
    if isinstance(callback, types.FunctionType):
        return _of_function(callback)
    examination = _Examination()
    if isinstance(callback, functools.partial):  # its function is likely to be known
        return max(examination.of(examination.bound_by, callback), examine(callback.func))
    return examination.of(examination.call, callback)


_known: dict[types.FunctionType, tuple[Verdict, Sources]] = {}
"""Verdicts on functions without a closure; they hold until their sources change."""


def _of_function(function: types.FunctionType) -> Verdict:
    known = _known.get(function)
    if known is not None and not known[1].changed():
        return known[0]
    examination = _Examination()
    verdict = examination.of(examination.call, function)
    if not function.__closure__:
        if len(_known) >= MAX_KNOWN:
            _known.clear()
        _known[function] = verdict, Sources([function])
    return verdict


def sources_of(callbacks: Iterable[Callable[..., Any]]) -> Sources:
    """The sources of callbacks that have been examined."""
    out = Sources()
    for callback in callbacks:
        known = _known.get(callback) if isinstance(callback, types.FunctionType) else None
        out.join(known[1]) if known is not None else out.add(callback)
    return out


def calls_total(callback: Callable[..., Any]) -> bool:
    """Whether its code, or that of functions it calls, names ``fusedopt.total``."""
    return any(found is total for found in sources_of([callback]).found)


class _Acts(Exception):
    """The verdict is ACTS, for this reason."""

    def __init__(self, reason: str, name: str = "") -> None:
        """``name``: of the function that is called, if it is one whose work kernels could do otherwise."""
        super().__init__(reason)
        self.remedy = DRAWS if name.startswith("rand") or name.removesuffix("_") in _RANDOM else ""


class _Examination:
    """One examination of a callback: the functions it has been through, and the worst that they do."""

    def __init__(self) -> None:
        self.level: Level = PURE
        self.seen: set[types.FunctionType] = set()

    def of(self, look: Callable[[Any], None], callback: Any) -> Verdict:
        """The verdict from one way to look at it."""
        try:
            look(callback)
        except _Acts as acts:
            return Verdict(ACTS, str(acts), acts.remedy)
        return Verdict(self.level)

    def at_least(self, level: Level) -> None:
        self.level = max(self.level, level)

    def bound_by(self, callback: functools.partial[Any]) -> None:
        for value in (*callback.args, *callback.keywords.values()):
            self._bound(value, f"{_called(callback.func)} is bound to")

    def call(self, callback: Any) -> None:
        if isinstance(callback, functools.partial):
            self.bound_by(callback)
            self.call(callback.func)
        elif isinstance(callback, types.MethodType):
            self._function(callback.__func__, callback.__self__)
        elif isinstance(callback, types.FunctionType):
            self._function(callback)
        else:
            self._function(method_of(callback), callback)

    def _function(self, function: Any, itself: Any = None) -> None:
        """``itself``: the object that it is a method of."""
        if not isinstance(function, types.FunctionType):
            unknown = function if itself is None or function is None else itself
            raise _Acts(f"{_called(unknown)} is no function whose code could be looked into")
        if function.__globals__.get("__name__") == "torch.utils._contextlib":  # @torch.no_grad()
            self.call(inspect.unwrap(function))
            return
        if function in self.seen:
            return
        self.seen.add(function)
        code = function.__code__
        if code.co_flags & _ASYNCHRONOUS:
            raise _Acts(
                f"{place_of(code, code.co_firstlineno)}: {code.co_name} is a generator or a coroutine"
            )
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._bound(value, f"{place_of(code, code.co_firstlineno)}: a default of {code.co_name} is")
        around = _Around(function, itself)
        for inner in codes(code):
            self._code(inner, around, frozenset(code.co_freevars))

    def _code(self, code: types.CodeType, around: _Around, free: frozenset[str]) -> None:
        """Go through the steps of some code."""
        owner: Any = NOTHING  # what the step before has loaded from around, if it has
        before, line = "", code.co_firstlineno
        for step in dis.get_instructions(code):
            if step.opname == "EXTENDED_ARG":
                continue
            line = line_of(step, line)
            where = f"{place_of(code, line)}: {code.co_name}"
            name = name_of(step)
            if is_pair(step) and step.argval[0] in around.own:
                self._value(around.own[step.argval[0]], f"{where} uses")
            if owner is not NOTHING and step.opname not in (
                "LOAD_ATTR",
                "LOAD_METHOD",
                "PUSH_NULL",
                "CACHE",
            ):
                self._value(owner, f"{where} uses")
                owner = NOTHING
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                if owner is NOTHING:
                    self._attribute(name, where)
                else:
                    owner = self._attribute_of(owner, name, where)
            elif (found := around.loaded(step.opname, name)) is not NOTHING:
                if found is isinstance and name != "isinstance":
                    raise _Acts(f"{where} calls isinstance under another name")
                owner = found
            else:
                self._step(step.opname, name, before, free, where)
            before = step.opname

    def _step(self, op: str, name: Any, before: str, free: frozenset[str], where: str) -> None:
        if op in _STEPS:
            raise _Acts(f"{where} {_STEPS[op].format(name)}")
        if op in ("STORE_DEREF", "DELETE_DEREF") and name in free:
            raise _Acts(f"{where} assigns {name!r} outside itself")
        if op in ("STORE_ATTR", "DELETE_ATTR") and name not in ("data", "grad"):
            raise _Acts(f"{where} assigns the attribute .{name}")
        if op == "IMPORT_NAME" and name not in ("math", "torch", "numpy"):
            raise _Acts(f"{where} imports {name}")
        if op == "IS_OP" and not before.startswith(("LOAD_CONST", "LOAD_COMMON_CONSTANT")):
            raise _Acts(f"{where} asks whether two names are one object (is)")

    def _attribute(self, name: str, where: str) -> None:
        """An attribute of what is an argument, or made from one."""
        if name not in _OF_ARGUMENTS and name not in _NAMES and name not in _MAKERS:
            raise _Acts(f"{where} uses the attribute .{name}", name)

    def _attribute_of(self, owner: Any, name: str, where: str) -> Any:
        """The attribute of a thing around the code: a module, a class, an object with plain attributes."""
        if isinstance(owner, types.ModuleType):
            value = getattr(owner, name, NOTHING)
            if owner in MODULES:
                if not _is_arithmetic(owner, name, value):
                    raise _Acts(
                        f"{where} uses {owner.__name__}.{name}, which may do more than arithmetic", name
                    )
                return value if isinstance(value, types.ModuleType) else NOTHING
            value = ... if value is NOTHING else value
            if type(owner) is not types.ModuleType or name not in vars(owner):
                self.at_least(VARIES)  # its own code finds it
            return self._unchangeable(value, f"{where} uses {owner.__name__}.{name}")
        if isinstance(owner, (torch.Tensor, np.ndarray, np.generic, *CONTAINERS, *CONSTANTS)):
            self._value(owner, f"{where} uses")
            self._attribute(name, where)
            return NOTHING
        value = plain_attribute(owner, name)
        if value is NOTHING:
            raise _Acts(f"{where} uses the attribute .{name} of {_called(owner)}")
        self.at_least(READS)
        return self._unchangeable(value, f"{where} uses the attribute .{name} of {_called(owner)}")

    def _unchangeable(self, value: Any, what: str) -> Any:
        """What is reached through something else, so that no `Snapshot` holds it."""
        if isinstance(value, (list, dict, set, torch.Tensor, np.ndarray)):
            raise _Acts(f"{what}, a {type(value).__name__} that it might change")
        return value

    def _bound(self, value: Any, what: str) -> None:
        """A default, or what a partial binds: it stays, unless its contents change."""
        if not isinstance(value, CONSTANTS):
            self._value(value, what)

    def _value(self, value: Any, what: str) -> None:
        """Something from around the code that it holds in its hands."""
        if value is ... or is_data(value):
            self.at_least(READS if value is not ... and is_constant(value) else VARIES)
        elif is_ours(value):
            return
        elif isinstance(value, types.FunctionType) and of_a_library(value):
            if not _known_method(value.__name__):
                raise _Acts(f"{what} {_called(value)}, which may do more than arithmetic")
        elif isinstance(value, (types.FunctionType, functools.partial)):
            self.call(value)
        elif isinstance(value, types.ModuleType):
            raise _Acts(f"{what} the module {value.__name__} under another name")
        elif not _harmless(value):
            raise _Acts(f"{what} {_called(value)}, which may do more than arithmetic")


class _Around:
    """What names stand for that a function loads from outside: closure cells, globals, the object it is a method of."""

    def __init__(self, function: types.FunctionType, itself: Any = None) -> None:
        code = function.__code__
        self.globals = function.__globals__
        builtins = self.globals.get("__builtins__", {})
        self.builtins = vars(builtins) if isinstance(builtins, types.ModuleType) else builtins
        self.cells = {
            name: content_of(cell, name)
            for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)
        }
        self.own = {code.co_varnames[0]: itself} if itself is not None and code.co_argcount else {}

    def loaded(self, op: str, name: Any) -> Any:
        """What a step loads from outside; Ellipsis for what is not there; NOTHING if it loads nothing from there."""
        if op in ("LOAD_GLOBAL", "LOAD_NAME"):
            return self.globals.get(name, self.builtins.get(name, ...))
        if op == "LOAD_DEREF":
            return self.cells.get(name, self.own.get(name, NOTHING))
        return self.own.get(name, NOTHING) if "LOAD_FAST" in op else NOTHING


def _called(value: Any) -> str:
    """What to call a thing in a message."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    module = getattr(value, "__module__", None)
    if not isinstance(name, str):
        return f"an object of type {type(value).__name__}"
    return f"{module}.{name}" if isinstance(module, str) and module not in ("builtins", "__main__") else name


def _known_method(name: str) -> bool:
    return name in METHODS or name.removesuffix("_") in METHODS


def _harmless(value: Any) -> bool:
    """A class or a builtin that is only a name for something pure."""
    if isinstance(value, type):
        return issubclass(value, (BaseException, torch.Tensor, torch.Size)) or value in BUILTINS
    if isinstance(value, types.BuiltinFunctionType):
        free = value.__self__ is None or isinstance(value.__self__, types.ModuleType)  # no object's method
        return value in BUILTINS or value in vars(math).values() or (free and _known_method(value.__name__))
    return isinstance(value, np.ufunc)
