"""What a step relies on in its optimizer, as one generated function: it reads numbers, and says what is another now."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..trace.signals import Untraceable
from ..trace.signature import PLAIN
from .shadow import Container, Path, Shadow, is_own, shown

_KEYS = (str, int, type(None))


def reader(path: Path) -> Callable[[Any], Any]:
    """What finds the object at a path, given the optimizer's ``__dict__``."""
    _check(path)
    return eval(f"lambda root: root{_steps(path)}")


class Looking:
    """Makes the function.

    ``names``: what numbers are called in ``numbers``, which it fills; ``tensors``: those of one number, each by the
    paths that it is found by; ``reads``: the optimizer's attributes that the step asked for, where there are such and
    where there are not; ``leaves``: those that it has and did not ask for, which are not looked at.
    """

    def __init__(
        self,
        shadow: Shadow,
        names: dict[Path, str],
        tensors: list[list[Path]],
        numbers: dict[str, Any],
        reads: frozenset[str],
        leaves: frozenset[str],
    ) -> None:
        self._shadow, self._names, self._tensors = shadow, names, tensors
        self._reads, self._leaves = reads, leaves
        self._space: dict[str, Any] = {"numbers": numbers}
        self._lines = ["def look(root):", "  try:"]
        self._known: dict[Path, str] = {(): "root"}

    def made(self) -> Callable[[dict[str, Any]], str | None]:
        """The function that reads numbers into the dict, and returns why something is not as it was."""
        self._containers()
        self._flags()
        self._objects()
        self._numbers()
        self._tensors_of_one()
        self._lines += [
            "  except (KeyError, IndexError, AttributeError, TypeError) as e:",
            "    return f'{e} is gone'",
            "  except (ValueError, RuntimeError) as e:",
            "    return f'what cannot be compared is there now: {e}'",
        ]
        exec(compile("\n".join(self._lines), "<what a step relies on>", "exec"), self._space)
        return self._space["look"]

    # -- the text --
    def _constant(self, x: Any) -> str:
        self._space[f"k{len(self._space)}"] = x
        return f"k{len(self._space) - 1}"

    def _variable(self, path: Path) -> str:
        if path not in self._known:
            before = self._variable(path[:-1])
            self._known[path] = f"c{len(self._known)}"
            self._lines.append(f"    {self._known[path]} = {before}{_steps(path[-1:])}")
        return self._known[path]

    def _place(self, path: Path) -> str:
        return f"{self._variable(path[:-1])}{_steps(path[-1:])}"

    def _demand(self, condition: str, what: str) -> None:
        self._lines.append(f"    if not ({condition}): return {what!r}")

    def _left(self, path: Path) -> bool:
        return bool(path) and path[0][1] in self._leaves

    def _those(self, entries: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Of entries that begin with a path: those that are looked at."""
        return [each for each in entries if not self._left(each[0]) and _readable(each[0])]

    # -- what is demanded --
    def _containers(self) -> None:
        """Of their types, with their keys."""
        for c in self._shadow.containers:
            if c.store or self._left(c.path):
                continue
            if not _readable(c.path):
                raise Untraceable(f"{shown(c.path[:1])} has keys of type {type(c.path[-1][1]).__name__}")
            if not c.path:
                present = self._constant({k for k in c.real if not is_own(k)} - self._leaves)
                absent = self._constant({k for k in self._reads - c.real.keys() if not is_own(k)})
                condition = f"{present} <= root.keys() and {absent}.isdisjoint(root)"
                self._demand(condition, "attributes were added or removed")
            elif c.path[-1][0] == "dict":
                self._attributes(c)
            elif c.path[-1] != ("item", "params"):  # which parameters there are is checked in C++
                x = self._variable(c.path)
                same = f"type({x}) is {self._constant(type(c.real))} and len({x}) == {len(c.real)}"
                self._demand(same, f"{shown(c.path)} is another container, or of another length")

    def _attributes(self, c: Container) -> None:
        x, known = self._variable(c.path), {k for k in c.real if not is_own(k)}
        count = f"sum(not {self._constant(is_own)}(k) for k in {x}) == {len(known)}"
        same = f"(len({x}) == {len(c.real)} or {count}) and {self._constant(known)} <= {x}.keys()"
        self._demand(same, "attributes were added or removed")

    def _flags(self) -> None:
        for path, value in self._shadow.flags:
            if self._left(path):
                continue
            x, what = self._place(path), f"{shown(path)} is another one now"
            by_itself = value is None or isinstance(value, (bool, enum.Enum))
            if not by_itself and type(value) not in PLAIN:
                self._demand(f"type({x}) is {self._constant(type(value))}", what)
            self._demand(f"{x} {'is' if by_itself else '=='} {self._constant(value)}", what)
        for path, kind, length in self._those(self._shadow.tuples):
            x = self._variable(path)
            same = f"type({x}) is {self._constant(kind)} and len({x}) == {length}"
            self._demand(same, f"{shown(path)} is another one now")

    def _objects(self) -> None:
        for path, first, value in self._those(self._shadow.aliases):
            if _readable(first):
                other = self._place(first) if first else self._constant(value)
                self._demand(f"{self._place(path)} is {other}", f"{shown(path)} is another object now")
        for path, value in self._those(self._shadow.things):
            same = f"{self._place(path)} is {self._constant(value)}"
            self._demand(same, f"{shown(path)} is another object now")
        for path, kind in self._those(self._shadow.objects):
            same = f"type({self._variable(path)}) is {self._constant(kind)}"
            self._demand(same, f"{shown(path)} is of another class now")

    def _numbers(self) -> None:
        for path, value in self._shadow.numbers.items():
            if self._left(path):
                continue
            _check(path)
            self._lines.append(f"    n = {self._place(path)}")
            same = f"type(n) is {self._constant(type(value))}"
            self._demand(same, f"{shown(path)} is of another type now")
            if path in self._names:
                plain = "n" if type(value) in (int, float) else "float(n)"
                self._lines.append(f"    numbers[{self._names[path]!r}] = {plain}")

    def _tensors_of_one(self) -> None:
        found = [(ways[0], [way for way in ways if not self._left(way)]) for ways in self._tensors]
        tensors = [(first, ways) for first, ways in found if ways]
        for i, (first, (path, *others)) in enumerate(tensors):
            _check(path)
            self._lines.append(f"    t{i} = {self._place(path)}")
            same = f"type(t{i}) is {self._constant(torch.Tensor)} and t{i}.numel() == 1"
            self._demand(same, f"{shown(path)} is of another kind now")
            self._lines.append(f"    numbers[{self._names[first]!r}] = t{i}.item()")
            for other in others:
                _check(other)
                self._demand(f"{self._place(other)} is t{i}", f"{shown(other)} is another tensor than it was")
        if len(tensors) > 1:
            ids = ", ".join(f"id(t{i})" for i in range(len(tensors)))
            first = tensors[0][1][0]
            self._demand(
                f"len({{{ids}}}) == {len(tensors)}", f"{shown(first)} is found in other places too now"
            )


def _steps(path: Path) -> str:
    return "".join(
        ".__dict__" if kind == "dict" else f".__dict__[{key!r}]" if kind == "attr" else f"[{key!r}]"
        for kind, key in path
    )


def _readable(path: Path) -> bool:
    return all(isinstance(key, _KEYS) for _, key in path)


def _check(path: Path) -> None:
    for _, key in path:
        if not isinstance(key, _KEYS):
            raise Untraceable(f"{shown(path[:1])} has keys of type {type(key).__name__}")
