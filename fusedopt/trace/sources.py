"""What callbacks are made of: their code, and what it reads from around it."""

from __future__ import annotations

import dis
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional

from .snapshot import is_data

MODULES = (torch, math, torch.nn, torch.nn.functional, torch.linalg, torch.special, np)
"""Modules whose attributes stay what they are."""
MAX_KNOWN = 512
NOTHING = object()
OURS = (
    "fusedopt.trace.totals",
    "fusedopt.trace.draws",
    "fusedopt.storage.callbacks",
    "fusedopt.storage.functions",
)
"""The modules of ``fusedopt.total`` and the like, which code reads as it does torch's functions."""


class Sources:
    """What callbacks are made of: their code, defaults and bound arguments, and what these read from around them.

    A notebook cell that is run again, a keyword of a partial, a module loaded again change it under a callback that
    stays the same object. Identity counts. Data (`is_data`) may be other data on every step: `now` is what to compare.
    """

    def __init__(self, callbacks: Iterable[Callable[..., Any]] = ()) -> None:
        self.functions: list[tuple[types.FunctionType, types.CodeType, Any, Any]] = []
        self.reads: list[tuple[Callable[[str], Any], str, Any]] = []
        self.data: list[tuple[Callable[[str], Any], str]] = []
        self.dicts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._seen: set[int] = set()
        self._attributes: set[tuple[int, str]] = set()
        for callback in callbacks:
            self.add(callback)

    def join(self, other: Sources) -> None:
        """Those of another callback too."""
        self.functions += other.functions
        self.reads += other.reads
        self.data += other.data
        self.dicts += other.dicts

    def add(self, value: Any) -> None:
        """Those of a callback, or of a function that one calls."""
        if isinstance(value, functools.partial):
            self.dicts.append((value.keywords, dict(value.keywords)))
            for inner in (value.func, *value.args, *value.keywords.values()):
                self.add(inner)
        elif isinstance(value, types.MethodType):
            self._add_function(value.__func__, value.__self__)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif callable(value) and not isinstance(value, (type, types.BuiltinFunctionType)):
            self._add_function(method_of(value), value)

    def _add_function(self, function: Any, itself: Any = None) -> None:
        if (
            not isinstance(function, types.FunctionType)
            or of_a_library(function)
            or id(function) in self._seen
        ):
            return
        self._seen.add(id(function))
        named = function.__kwdefaults__
        self.functions.append((function, function.__code__, function.__defaults__, named))
        if named:
            self.dicts.append((named, dict(named)))
        for name in loaded_names(function.__code__):
            self._read(function.__globals__.get, name, function)
        for cell in function.__closure__ or ():
            self._read(functools.partial(content_of, cell), "", function)
        if itself is not None:
            for name in _attributes_after(function.__code__, function.__code__.co_varnames[:1]):
                if plain_attribute(itself, name) is not NOTHING:
                    self._read(functools.partial(_attribute, itself), name, function)

    def _read(self, read: Callable[[str], Any], name: str, function: types.FunctionType) -> None:
        found = read(name)
        if isinstance(found, types.MethodType):  # made anew at each reading
            self.add(found)
            return
        if found is not None and is_data(found):
            self.data.append((read, name))
            return
        self.reads.append((read, name, found))
        if isinstance(found, types.ModuleType) and found in MODULES:
            return
        variable = name or function.__code__.co_freevars
        for attribute in _attributes_after(function.__code__, variable):
            if (id(found), attribute) in self._attributes:
                continue
            self._attributes.add((id(found), attribute))
            if isinstance(found, types.ModuleType):
                if attribute in vars(found):
                    self._read(vars(found).get, attribute, function)
            elif plain_attribute(found, attribute) is not NOTHING:
                self._read(functools.partial(_attribute, found), attribute, function)
        if not isinstance(found, (type, types.ModuleType)):
            self.add(found)

    def changed(self) -> str:
        """What of it is another object now, "" if nothing is. Asked on every step, hence the plain loops."""
        for read, name, found in self.reads:
            if read(name) is not found:
                return name or "what a function closes over"
        for function, code, defaults, named in self.functions:
            if function.__code__ is not code:
                return f"the code of {function.__qualname__}"
            if function.__defaults__ is not defaults or function.__kwdefaults__ is not named:
                return f"the defaults of {function.__qualname__}"
        for live, known in self.dicts:
            if len(live) != len(known):
                return "the arguments of a callback"
            for name, found in known.items():
                if live.get(name, NOTHING) is not found:
                    return f"the argument {name!r}"
        for read, name in self.data:
            if not is_data(read(name)):
                return name or "what a function closes over"
        return ""

    def now(self) -> list[Any]:
        """The data that they read, as it is now. While it is the same constants, they do the same."""
        return [read(name) for read, name in self.data]

    @property
    def found(self) -> list[Any]:
        """All of it, to tell two apart."""
        return [
            *(x for _, code, defaults, _ in self.functions for x in (code, defaults)),
            *(found for _, _, found in self.reads),
            *(x for _, known in self.dicts for x in known.values()),
        ]

    @property
    def closed(self) -> bool:
        """Whether some function has a closure, and so may hold on to anything."""
        return any(function.__closure__ for function, *_ in self.functions)

    def values(self) -> list[Any]:
        """The data that they read or hold, as it is now: what a trace could change."""
        held = [value for _, _, defaults, _ in self.functions for value in defaults or ()]
        held += [value for _, known in self.dicts for value in known.values()]
        return [value for value in held if is_data(value)] + self.now()


def _attribute(owner: Any, name: str) -> Any:
    return getattr(owner, name, None)


def content_of(cell: Any, name: str) -> Any:
    """What is in a closure's cell; Ellipsis before it is set. (``name`` makes it readable as attributes are.)"""
    try:
        return cell.cell_contents
    except ValueError:
        return ...


def plain_attribute(owner: Any, name: str) -> Any:
    """The attribute if reading it runs no code: it is in the object's own dict, or a plain value of its class."""
    kind = owner if isinstance(owner, type) else type(owner)
    if isinstance(owner, (types.FunctionType, type)):
        own: Any = vars(owner)
    elif isinstance(kind.__getattribute__, types.FunctionType) or hasattr(kind, "__getattr__"):
        return NOTHING
    else:
        own = getattr(owner, "__dict__", {})
    inherited = inspect.getattr_static(kind, name, NOTHING)
    if hasattr(type(inherited), "__set__"):  # a property goes before the object's own dict
        return NOTHING
    if name in own and not isinstance(own[name], (staticmethod, classmethod, property)):
        return own[name]
    if isinstance(inherited, types.FunctionType) and not isinstance(owner, type):
        return types.MethodType(inherited, owner)
    return inherited if is_data(inherited) else NOTHING


def method_of(callback: Any) -> Any:
    """What is run when the object is called."""
    return inspect.getattr_static(type(callback), "__call__", None)


def of_a_library(function: types.FunctionType) -> bool:
    module = function.__module__ or ""
    return module.split(".")[0] in ("torch", "math") or module in OURS


def is_ours(value: Any) -> bool:
    """Whether it is a function of ours that code reads as it does torch's."""
    return isinstance(value, types.FunctionType) and value.__module__ in OURS


@functools.lru_cache(maxsize=MAX_KNOWN)
def loaded_names(code: types.CodeType) -> tuple[str, ...]:
    steps = (step for inner in codes(code) for step in dis.get_instructions(inner))
    return tuple(dict.fromkeys(s.argval for s in steps if s.opname in ("LOAD_GLOBAL", "LOAD_NAME")))


@functools.lru_cache(maxsize=MAX_KNOWN)
def imported_names(code: types.CodeType) -> tuple[str, ...]:
    """The modules that it imports itself."""
    steps = (step for inner in codes(code) for step in dis.get_instructions(inner))
    return tuple(dict.fromkeys(s.argval for s in steps if s.opname == "IMPORT_NAME"))


_DTYPES = {"dtype", "to", "type", "type_as", "itemsize", "element_size", "nbytes", "float", "double", "half"}
_DTYPES |= {str(v).removeprefix("torch.") for v in vars(torch).values() if isinstance(v, torch.dtype)}


def asks_for_dtypes(callback: Callable[..., Any]) -> bool:
    """Whether it, or a function that it calls, may ask what dtype something has, or for a certain one."""
    return _names_any(callback, _DTYPES)


def reads_gradient(callback: Callable[..., Any]) -> bool:
    """Whether it, or a function that it calls, may ask for a gradient."""
    return _names_any(callback, {"grad"})


def seeks_extremes(callback: Callable[..., Any]) -> bool:
    """Whether it, or a function that it calls, may ask for the largest or smallest of some numbers."""
    return _names_any(callback, {"amax", "amin", "max", "min"}, texts=False)  # ``clamp(max=…)`` is none


def _names_any(callback: Callable[..., Any], names: set[str], texts: bool = True) -> bool:
    """Whether its code, or that of a function that it calls, has one of these names; True if it cannot be seen.
    ``texts``: texts and the names of arguments count as well."""
    functions = Sources([callback]).functions
    return not functions or any(not names.isdisjoint(_named(code, texts)) for _, code, *_ in functions)


@functools.lru_cache(maxsize=MAX_KNOWN)
def _named(code: types.CodeType, texts: bool) -> frozenset[str]:
    used = [x for inner in codes(code) for x in (*inner.co_names, *(inner.co_consts if texts else ()))]
    return frozenset(x for y in used for x in (y if type(y) is tuple else (y,)) if isinstance(x, str))


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def name_of(step: dis.Instruction) -> Any:
    """What a step is about. Of two variables in one step (Python 3.13 and later) the second is on top."""
    return step.argval[-1] if is_pair(step) else step.argval


def is_pair(step: dis.Instruction) -> bool:
    """Whether it loads or stores two variables."""
    return "LOAD_FAST" in step.opname and isinstance(step.argval, tuple)


def line_of(step: dis.Instruction, before: int) -> int:
    positions = getattr(step, "positions", None)  # Python 3.11 and later
    line = positions.lineno if positions else step.starts_line
    return before if line is None or isinstance(line, bool) else line


@functools.lru_cache(maxsize=MAX_KNOWN)
def _attributes_after(code: types.CodeType, variables: str | tuple[str, ...]) -> tuple[str, ...]:
    """The attributes that are read from a variable right after it is loaded."""
    names = (variables,) if isinstance(variables, str) else variables
    out, loaded = [], False
    for inner in codes(code):
        for step in dis.get_instructions(inner):
            if step.opname in ("EXTENDED_ARG", "PUSH_NULL"):
                continue
            if loaded and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                out.append(step.argval)
            loaded = step.opname.startswith("LOAD_") and name_of(step) in names
    return tuple(dict.fromkeys(out))
