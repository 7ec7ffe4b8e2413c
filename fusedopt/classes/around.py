"""What a class's step finds around it, from the code that was run: what it counts on, and what it must not get at."""

from __future__ import annotations

import collections
import sys
import types
import weakref
from collections.abc import Container, Iterator, Set, Sized
from typing import Any

import torch

from ..trace.signals import Untraceable
from ..trace.snapshot import is_data
from ..trace.sources import imported_names, loaded_names
from .guards import Guards, of_cell, read_of
from .reach import (
    DEPTH,
    MOST,
    SEQUENCES,
    attributes_of,
    is_library,
    is_unwatched,
    parts_of,
    places_of,
)

UNWATCHED = "too large or too strange to be watched for changes"


class Around:
    """Goes over what code can get at, and notes it in ``guards``.

    ``codes``: the code that was run; ``params``: the ids of the parameters, which may be found by way of the optimizer
    only, as what stands for one in a trace is another object.
    """

    def __init__(self, codes: Set[types.CodeType], params: Container[int]) -> None:
        self.guards = Guards()
        self._codes, self._params = codes, params
        constants = [x for code in codes for x in code.co_consts if isinstance(x, str)]
        texts = {*filter(str.isidentifier, constants)}
        self._used = {"step", *texts}.union(*(code.co_names for code in codes))
        self._asked = texts if not self._used.isdisjoint(("getattr", "hasattr")) else set()
        """What may be asked for and not be there yet."""
        self._explored: set[int] = set()

    def ran(self, function: types.FunctionType, near: bool = False) -> None:
        """What a function reads that was run. ``near``: it is the step's own."""
        note = self.guards.note
        self.loaded(function.__code__, function.__globals__, near)
        for cell in function.__closure__ or ():
            read = of_cell(cell)
            note(read, "", read("", None), cell)
            self.explore(read("", None), near=near)
        note(function, "__code__", function.__code__, function, "the code of a function")
        for which, kind_of in (("__defaults__", "defaults"), ("__kwdefaults__", "named defaults")):
            value = getattr(function, which)
            note(function, which, value, function, f"the {kind_of} of a function")
            self.explore(value, near=near)
        for name, value in vars(function).items():
            note(vars(function).get, name, value, vars(function))

    def loaded(self, code: types.CodeType, around: dict[str, Any], near: bool = False) -> None:
        """The globals that code loads."""
        for name in imported_names(code):
            self.explore(sys.modules.get(name))
        for name in loaded_names(code):
            if name in around:
                self.guards.note(around.get, name, around[name], around)
                self.explore(around[name], near=near)

    def explore(self, owner: Any, depth: int = DEPTH, near: bool = False) -> None:
        """What is read of an object, and of what it has: what code names, of modules, classes and libraries.

        ``near``: the step's own code names it, or what has it.
        """
        owner = owner() if isinstance(owner, weakref.ref) else owner
        self._no_parameter(owner)
        if near and is_unwatched(owner):
            raise Untraceable(f"the step looks at a {type(owner).__name__} around it, {UNWATCHED}")
        if id(owner) in self._explored or len(self._explored) > MOST:
            return
        if is_data(owner) and not isinstance(owner, dict):
            self._no_parameter(*_within(owner))
            return
        self._explored.add(id(owner))
        if isinstance(owner, types.FunctionType):
            if owner.__code__ in self._codes:
                self.ran(owner)
        elif isinstance(owner, (types.ModuleType, type, torch.nn.Module)):
            for name in self._used:
                self._look_up(owner, name, depth)
        elif isinstance(owner, types.MethodType | types.BuiltinMethodType):
            for value in (*parts_of(owner).values(), getattr(owner, "__func__", None)):
                self.explore(value, depth)
        elif is_library(owner):
            asked = {k: v for k, v in (attributes_of(owner) or {}).items() if k in self._used}
            self._note_parts(owner, asked, depth, near)
        else:
            self._explore_object(owner, depth, near)

    def _explore_object(self, owner: Any, depth: int, near: bool) -> None:
        parts = parts_of(owner)
        self._no_parameter(*parts, *parts.values())
        parts = {k: v for k, v in parts.items() if not isinstance(v, torch.Tensor)}
        self.explore(type(owner), depth)
        if isinstance(owner, (set, frozenset)):  # no place in it says which element is there
            self.guards.note_elements(owner)
            for value in parts.values() if depth else ():
                self.explore(value, depth - 1)
            return
        own = owner if isinstance(owner, Sized) else getattr(owner, "__dict__", None)
        if isinstance(own, (dict, list, collections.deque)):  # more may hide what its class has
            self.guards.note_length(own)
        self._note_parts(owner, parts, depth, near)

    def _note_parts(self, owner: Any, parts: dict[Any, Any], depth: int, near: bool) -> None:
        for name, value in parts.items():
            if not isinstance(value, property):
                self.guards.note(read_of(owner), name, value, owner)
                if depth:
                    self.explore(value, depth - 1, near and depth == DEPTH)

    def _look_up(self, owner: Any, name: str, depth: int) -> None:
        """An attribute, where it is found, and that it is not where it would be found before."""
        if isinstance(owner, torch.nn.Module):
            self._no_parameter(owner._parameters.get(name))
        places = places_of(owner)
        found = next((k for k, (_, own) in enumerate(places) if name in own), None)
        if found is None and name not in self._asked:
            return
        for place, own in places[:found]:
            self.guards.note(own.get, name, None, place)
        if found is not None:
            place, own = places[found]
            if not isinstance(own[name], property):
                self.guards.note(own.get, name, own[name], place)
                if depth:
                    self.explore(own[name], depth - 1)

    def _no_parameter(self, *values: Any) -> None:
        """Raise Untraceable for a parameter."""
        if any(id(value) in self._params for value in values):
            raise Untraceable("the step can get at a parameter otherwise than by what the optimizer has")


def _within(data: Any) -> Iterator[Any]:
    """What is in containers of data, and what it is found by there."""
    for key, value in parts_of(data).items() if type(data) in (dict, *SEQUENCES) else ():
        yield key
        yield value
        yield from _within(value)
