"""What a callback may do besides changing its tensors: decided from its code, before it is ever called.

A traced callback is run once for many parameters, on symbolic tensors, or not at all when the arithmetic of an earlier
trace is replayed. Whoever wrote it expects a plain loop: one call for each parameter, with the real one. Both agree
only if the callback does nothing but arithmetic, so three kinds are told apart:

PURE: what it does is decided by its arguments alone, so a trace may be replayed.
READS: it also reads what may change (a number in a closure, a dict, an attribute), so it is traced on every step.
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
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional

from . import methods  # noqa: F401  (fills the table)
from .signals import place_of
from .signature import PLAIN as CONSTANTS
from .tensor import METHODS


class Level(enum.IntEnum):
    """See above."""

    PURE = 0
    READS = 1
    ACTS = 2


PURE, READS, ACTS = Level


class Verdict(NamedTuple):
    """What a callback does at most, and for ACTS why that is thought."""

    level: Level
    reason: str = ""


# --
# What code may use

BUILTINS = (
    *(abs, min, max, round, pow, sum, divmod, len, range, zip, enumerate, sorted, reversed, map, filter),
    *(isinstance, int, float, bool, complex, str, repr, tuple, list, dict, set, frozenset, slice, any, all),
)
MODULES = (torch, math, torch.nn, torch.nn.functional, torch.linalg, torch.special, np)
SIZE_OF_SNAPSHOT = 4096
"""Elements of a tensor or array around a callback up to which a trace keeps a copy."""
MAX_KNOWN = 512

_NAMES = {name for m in MODULES for name in vars(m) if name in METHODS or name.removesuffix("_") in METHODS}
_NAMES |= {*vars(math), "nn", "functional", "linalg", "special", "inf", "no_grad", "enable_grad"}
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
    if isinstance(callback, types.FunctionType):
        return _of_function(callback)
    return _Examination().callable(callback)


def is_pure(callback: Callable[..., Any]) -> bool:
    """Whether the callback reads only its arguments, constants and pure functions."""
    return examine(callback).level == PURE


_known: dict[types.FunctionType, tuple[Verdict, Sources]] = {}
"""Verdicts on functions without a closure; they hold until their sources change."""


def _of_function(function: types.FunctionType) -> Verdict:
    known = _known.get(function)
    if known is not None and known[1].unchanged():
        return known[0]
    verdict = _Examination().callable(function)
    if not function.__closure__:
        if len(_known) >= MAX_KNOWN:
            _known.clear()
        _known[function] = verdict, Sources([function])
    return verdict


class _Acts(Exception):
    """The verdict is ACTS, for this reason."""


class _Examination:
    """One examination of a callback: the functions it has been through, and the worst that they do."""

    def __init__(self) -> None:
        self.level: Level = PURE
        self.seen: set[types.FunctionType] = set()

    def callable(self, callback: Any) -> Verdict:
        try:
            self._call(callback)
        except _Acts as acts:
            return Verdict(ACTS, str(acts))
        return Verdict(self.level)

    def _call(self, callback: Any) -> None:
        if isinstance(callback, functools.partial):
            for bound in (*callback.args, *callback.keywords.values()):
                self._bound(bound, f"{_called(callback.func)} is bound to")
            self._call(callback.func)
        elif isinstance(callback, types.MethodType):
            self._function(callback.__func__, callback.__self__)
        elif isinstance(callback, types.FunctionType):
            self._function(callback)
        else:
            self._function(_method_of(callback), callback)

    def _function(self, function: Any, itself: Any = None) -> None:
        """``itself``: the object that it is a method of."""
        if not isinstance(function, types.FunctionType):
            unknown = function if itself is None or function is None else itself
            raise _Acts(f"{_called(unknown)} is no function whose code could be looked into")
        if function.__globals__.get("__name__") == "torch.utils._contextlib":  # @torch.no_grad()
            self._call(inspect.unwrap(function))
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
        for inner in _codes(code):
            self._code(inner, around, frozenset(code.co_freevars))

    def _code(self, code: types.CodeType, around: _Around, free: frozenset[str]) -> None:
        """Go through the steps of some code."""
        owner: Any = _NOTHING  # what the step before has loaded from around, if it has
        before, line = "", code.co_firstlineno
        for step in dis.get_instructions(code):
            if step.opname == "EXTENDED_ARG":
                continue
            line = _line(step, line)
            where = f"{place_of(code, line)}: {code.co_name}"
            name = _name_of(step)
            if owner is not _NOTHING and step.opname not in (
                "LOAD_ATTR",
                "LOAD_METHOD",
                "PUSH_NULL",
                "CACHE",
            ):
                self._value(owner, f"{where} uses")
                owner = _NOTHING
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                if owner is _NOTHING:
                    self._attribute(name, where)
                else:
                    owner = self._attribute_of(owner, name, where)
            elif (found := around.loaded(step.opname, name)) is not _NOTHING:
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
            raise _Acts(f"{where} uses the attribute .{name}")

    def _attribute_of(self, owner: Any, name: str, where: str) -> Any:
        """The attribute of a thing around the code: a module, a class, an object with plain attributes."""
        if isinstance(owner, types.ModuleType):
            value = getattr(owner, name, _NOTHING)
            if owner in MODULES:
                if not _is_arithmetic(owner, name, value):
                    raise _Acts(f"{where} uses {owner.__name__}.{name}, which may do more than arithmetic")
                return value if isinstance(value, types.ModuleType) else _NOTHING
            value = ... if value is _NOTHING else value
            return self._unchangeable(value, f"{where} uses {owner.__name__}.{name}")
        if isinstance(owner, (torch.Tensor, np.ndarray, np.generic, *_CONTAINERS, *CONSTANTS)):
            self._value(owner, f"{where} uses")
            self._attribute(name, where)
            return _NOTHING
        value = _plain_attribute(owner, name)
        if value is _NOTHING:
            raise _Acts(f"{where} uses the attribute .{name} of {_called(owner)}")
        self.level = READS
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
            self.level = READS
        elif isinstance(value, types.FunctionType) and _of_a_library(value):
            if not _known_method(value.__name__):
                raise _Acts(f"{what} {_called(value)}, which may do more than arithmetic")
        elif isinstance(value, (types.FunctionType, functools.partial)):
            self._call(value)
        elif isinstance(value, types.ModuleType):
            raise _Acts(f"{what} the module {value.__name__} under another name")
        elif not _harmless(value):
            raise _Acts(f"{what} {_called(value)}, which may do more than arithmetic")


_NOTHING = object()
_CONTAINERS = (list, dict, set, frozenset, tuple)


class _Around:
    """What names stand for that a function loads from outside: closure cells, globals, the object it is a method of."""

    def __init__(self, function: types.FunctionType, itself: Any = None) -> None:
        code = function.__code__
        self.globals = function.__globals__
        builtins = self.globals.get("__builtins__", {})
        self.builtins = vars(builtins) if isinstance(builtins, types.ModuleType) else builtins
        self.cells = {
            name: _content(cell, name)
            for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)
        }
        self.own = {code.co_varnames[0]: itself} if itself is not None and code.co_argcount else {}

    def loaded(self, op: str, name: Any) -> Any:
        """What a step loads from outside; Ellipsis for what is not there; _NOTHING if it loads nothing from there."""
        if op in ("LOAD_GLOBAL", "LOAD_NAME"):
            return self.globals.get(name, self.builtins.get(name, ...))
        if op == "LOAD_DEREF":
            return self.cells.get(name, self.own.get(name, _NOTHING))
        return self.own.get(name, _NOTHING) if op.startswith("LOAD_FAST") else _NOTHING


def _content(cell: Any, name: str) -> Any:
    """What is in a closure's cell; Ellipsis before it is set. (``name`` makes it readable as attributes are.)"""
    try:
        return cell.cell_contents
    except ValueError:
        return ...


@functools.lru_cache(maxsize=MAX_KNOWN)
def _loaded_names(code: types.CodeType) -> tuple[str, ...]:
    steps = (step for inner in _codes(code) for step in dis.get_instructions(inner))
    return tuple(dict.fromkeys(s.argval for s in steps if s.opname in ("LOAD_GLOBAL", "LOAD_NAME")))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _name_of(step: dis.Instruction) -> Any:
    """What a step is about. Steps that load two variables (Python 3.13) leave the second on top."""
    pair = step.opname.startswith("LOAD_FAST") and isinstance(step.argval, tuple)
    return step.argval[-1] if pair else step.argval


def _line(step: dis.Instruction, before: int) -> int:
    positions = getattr(step, "positions", None)  # Python 3.11 and later
    line = positions.lineno if positions else step.starts_line
    return before if line is None or isinstance(line, bool) else line


def _method_of(callback: Any) -> Any:
    """What is run when the object is called."""
    return inspect.getattr_static(type(callback), "__call__", None)


def _called(value: Any) -> str:
    """What to call a thing in a message."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    module = getattr(value, "__module__", None)
    if not isinstance(name, str):
        return f"an object of type {type(value).__name__}"
    return f"{module}.{name}" if isinstance(module, str) and module not in ("builtins", "__main__") else name


def _known_method(name: str) -> bool:
    return name in METHODS or name.removesuffix("_") in METHODS


def _of_a_library(function: types.FunctionType) -> bool:
    return (function.__module__ or "").split(".")[0] in ("torch", "math")


def _harmless(value: Any) -> bool:
    """A class or a builtin that is only a name for something pure."""
    if isinstance(value, type):
        return issubclass(value, (BaseException, torch.Tensor, torch.Size)) or value in BUILTINS
    if isinstance(value, types.BuiltinFunctionType):
        free = value.__self__ is None or isinstance(value.__self__, types.ModuleType)  # no object's method
        return value in BUILTINS or value in vars(math).values() or (free and _known_method(value.__name__))
    return isinstance(value, np.ufunc)


def _plain_attribute(owner: Any, name: str) -> Any:
    """The attribute if reading it runs no code: it is in the object's own dict, or a plain value of its class."""
    kind = owner if isinstance(owner, type) else type(owner)
    if isinstance(owner, (types.FunctionType, type)):
        own: Any = vars(owner)
    elif isinstance(kind.__getattribute__, types.FunctionType) or hasattr(kind, "__getattr__"):
        return _NOTHING
    else:
        own = getattr(owner, "__dict__", {})
    inherited = inspect.getattr_static(kind, name, _NOTHING)
    if hasattr(type(inherited), "__set__"):  # a property goes before the object's own dict
        return _NOTHING
    if name in own and not isinstance(own[name], (staticmethod, classmethod, property)):
        return own[name]
    if isinstance(inherited, types.FunctionType) and not isinstance(owner, type):
        return types.MethodType(inherited, owner)
    return inherited if is_data(inherited) else _NOTHING


def _attribute(owner: Any, name: str) -> Any:
    return getattr(owner, name, None)


# --
# Data around callbacks


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
        if type(value) in (list, dict, set):
            self.saved.append((value, value.copy()))
        elif isinstance(value, torch.Tensor):
            self.saved.append((value, (value._version, value.detach().clone())))
        elif isinstance(value, np.ndarray):
            self.saved.append((value, value.copy()))
        for inner in value.values() if type(value) is dict else value if type(value) in _CONTAINERS else ():
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
            else:
                value.clear()
                value.extend(was) if type(value) is list else value.update(was)
        return bool(changed)


def _unchanged(value: Any, was: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return bool(value._version == was[0])
    if isinstance(value, np.ndarray):
        return bool(np.array_equal(value, was, equal_nan=value.dtype.kind in "fc"))
    if type(value) is set:
        return bool(value == was)
    if type(value) is list:
        return len(value) == len(was) and all(x is y for x, y in zip(value, was, strict=True))
    return list(value) == list(was) and all(value[k] is was[k] for k in was)


# --
# What decides what callbacks do


class Sources:
    """What callbacks are made of: their code, defaults and bound arguments, and what these read from around them.

    A notebook cell that is run again, a keyword of a partial, a module loaded again change it under a callback that
    stays the same object. Data (`is_data`) may change at will where the callback is traced on every step; for the
    rest, and for what PURE callbacks are made of, identity counts.
    """

    def __init__(self, callbacks: Iterable[Callable[..., Any]]) -> None:
        self.functions: list[tuple[types.FunctionType, types.CodeType, Any]] = []
        self.reads: list[tuple[Callable[[str], Any], str, Any]] = []
        self.data: list[tuple[Callable[[str], Any], str]] = []
        self.dicts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._seen: set[int] = set()
        for callback in callbacks:
            self._add(callback)

    def _add(self, value: Any) -> None:
        if isinstance(value, functools.partial):
            self.dicts.append((value.keywords, dict(value.keywords)))
            for inner in (value.func, *value.args, *value.keywords.values()):
                self._add(inner)
        elif isinstance(value, types.MethodType):
            self._add_function(value.__func__, value.__self__)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif not is_data(value):
            self._add_function(_method_of(value), value)

    def _add_function(self, function: Any, itself: Any = None) -> None:
        if (
            not isinstance(function, types.FunctionType)
            or _of_a_library(function)
            or id(function) in self._seen
        ):
            return
        self._seen.add(id(function))
        self.functions.append((function, function.__code__, function.__defaults__))
        if function.__kwdefaults__:
            self.dicts.append((function.__kwdefaults__, dict(function.__kwdefaults__)))
        for name in _loaded_names(function.__code__):
            self._read(function.__globals__.get, name, function)
        for cell in function.__closure__ or ():
            self._read(functools.partial(_content, cell), "", function)
        if itself is not None:
            for name in _attributes_after(function.__code__, function.__code__.co_varnames[:1]):
                if _plain_attribute(itself, name) is not _NOTHING:
                    self._read(functools.partial(_attribute, itself), name, function)

    def _read(self, read: Callable[[str], Any], name: str, function: types.FunctionType) -> None:
        found = read(name)
        if isinstance(found, types.MethodType):  # made anew at each reading
            self._add(found)
            return
        if found is not None and is_data(found):
            self.data.append((read, name))
            return
        self.reads.append((read, name, found))
        if isinstance(found, types.ModuleType) and found not in MODULES:
            variable = name or function.__code__.co_freevars
            for attribute in _attributes_after(function.__code__, variable):
                if hasattr(found, attribute):
                    self._read(vars(found).get, attribute, function)
        elif not isinstance(found, type):
            self._add(found)

    def unchanged(self) -> bool:
        """Whether all of it is still there. Asked on every step, hence the plain loops."""
        for read, name, found in self.reads:
            if read(name) is not found:
                return False
        for function, code, defaults in self.functions:
            if function.__code__ is not code or function.__defaults__ is not defaults:
                return False
        for live, known in self.dicts:
            if len(live) != len(known):
                return False
            for name, found in known.items():
                if live.get(name, _NOTHING) is not found:
                    return False
        return all(is_data(read(name)) for read, name in self.data) if self.data else True

    @property
    def found(self) -> list[Any]:
        """All of it, to tell two apart."""
        return [
            *(x for _, *made_of in self.functions for x in made_of),
            *(found for _, _, found in self.reads),
            *(x for _, known in self.dicts for x in known.values()),
        ]

    @property
    def closed(self) -> bool:
        """Whether some function has a closure, and so may hold on to anything."""
        return any(function.__closure__ for function, _, _ in self.functions)

    def values(self) -> list[Any]:
        """The data that they read or hold, as it is now: what a trace could change."""
        held = [value for _, _, defaults in self.functions for value in defaults or ()]
        held += [value for _, known in self.dicts for value in known.values()]
        return [value for value in held if is_data(value)] + [read(name) for read, name in self.data]


@functools.lru_cache(maxsize=MAX_KNOWN)
def _attributes_after(code: types.CodeType, variables: str | tuple[str, ...]) -> tuple[str, ...]:
    """The attributes that are read from a variable right after it is loaded."""
    names = (variables,) if isinstance(variables, str) else variables
    out, loaded = [], False
    for inner in _codes(code):
        for step in dis.get_instructions(inner):
            if loaded and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                out.append(step.argval)
            loaded = step.opname.startswith("LOAD_") and _name_of(step) in names
    return tuple(dict.fromkeys(out))
