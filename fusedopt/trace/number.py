"""Numbers that record themselves: the host half of a step, as a straight-line scalar program.

Hyperparameters and scalar state (``step``) reach callbacks as ``Number``s. They hold this step's true value, so
``if r > 5`` takes the true branch, and they remember how they were made, so the arithmetic of a step (bias
corrections, schedules) can be shown, and replayed without running the callbacks again.

``Number`` is no subclass of float: on one, ``math.sqrt`` and formatting would call no hook. A value that leaves this
world (``float()``, ``math.*``, formatting, real tensors, numpy) is an *escape*: recorded as the guard that the number
equals what it was.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .signals import Untraceable

Scalar = int | float

ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "pow": operator.pow,
    "neg": operator.neg,
    "abs": operator.abs,
    "gt": operator.gt,
    "ge": operator.ge,
    "lt": operator.lt,
    "le": operator.le,
    "eq": operator.eq,
    "ne": operator.ne,
}
"""Every operation of the scalar program, with Python's own meaning."""

_SYMBOL = dict(
    add="+",
    sub="-",
    mul="*",
    truediv="/",
    floordiv="//",
    mod="%",
    pow="**",
    gt=">",
    ge=">=",
    lt="<",
    le="<=",
    eq="==",
    ne="!=",
)


@dataclass(frozen=True)
class Guard:
    """What the trace took for granted: that entry ``index`` of the scalar program has this value."""

    index: int
    value: Scalar | bool
    where: str


class ScalarProgram:
    """A list of entries ``(op, *operands)``: leaves name their source, operations name earlier entries.

    Leaves are ``("hyper", name)``, ``("state", key)``, ``("default", callback, argument)``, ``("const", ..., value)``
    and ``("raw", ...)``: a plain number that met a tensor, kept with its position so that two runs of the same code
    give it the same entry.
    """

    def __init__(self) -> None:
        self.entries: list[tuple] = []
        self.values: list[Scalar] = []
        self.guards: list[Guard] = []
        self._known: dict[tuple, int] = {}

    def entry(self, key: tuple, value: Scalar) -> int:
        index = self._known.get(key)
        if index is None:
            index = self._known[key] = len(self.entries)
            self.entries.append(key)
            self.values.append(value)
        return index

    def constant(self, value: Scalar) -> int:
        """The entry of a constant. Its text tells zeros of both signs apart, which are equal."""
        return self.entry(("const", type(value).__name__, repr(value), value), value)

    def number(self, key: tuple, value: Scalar) -> Number:
        return Number(self, self.entry(key, value), value)

    def guard(self, index: int, value: Scalar | bool, where: str = "") -> None:
        guard = Guard(index, value, where)
        if guard not in self.guards:
            self.guards.append(guard)

    def expression(self, index: int) -> str:
        """The entry as one Python expression over hyperparameters, state and constants."""
        op, *operands = self.entries[index]
        if op in ("hyper", "state", "default"):
            return "".join(f"[{o}]" if k else str(o) for k, o in enumerate(operands[op == "default" :]))
        if op == "const":
            return repr(operands[-1])
        if op == "raw":
            return "a number"
        args = [self.expression(i) for i in operands]
        if op in _SYMBOL:
            return f"({args[0]} {_SYMBOL[op]} {args[1]})"
        return f"-{args[0]}" if op == "neg" else f"{op}({args[0]})"


def _leave(x: Any) -> Any:
    return x.escape() if isinstance(x, Number) else x


class Number:
    """A number of this step that remembers how it was computed. Behaves as the int or float it holds."""

    __slots__ = ("index", "program", "value")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, program: ScalarProgram, index: int, value: Scalar) -> None:
        self.program, self.index, self.value = program, index, value

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """So that a callback's ``isinstance(lr, float)`` finds what it finds eagerly."""
        return type(self.value)

    def escape(self) -> Scalar:
        """The true value; from here on the trace holds for this value only."""
        self.program.guard(self.index, self.value, "escape")
        return self.value

    def _operate(self, op: str, other: Any, swapped: bool = False) -> Any:
        program = self.program
        if isinstance(other, Number) and other.program is not program:
            other = other.value  # kept from an earlier step
        if isinstance(other, Number):
            index, value = other.index, other.value
        elif type(other) in (int, float, bool):
            index, value = program.constant(other), other
        elif isinstance(other, (np.generic, np.ndarray, torch.Tensor)):
            return ARITHMETIC[op](*((other, self.escape()) if swapped else (self.escape(), other)))
        else:
            return NotImplemented
        if swapped:
            result = ARITHMETIC[op](value, self.value)
            key = (op, index, self.index)
        else:
            result = ARITHMETIC[op](self.value, value)
            key = (op, self.index, index)
        if isinstance(result, complex):
            raise Untraceable(f"{program.expression(self.index)} {op} {other} is complex")
        return program.number(key, result)

    def _compare(self, op: str, other: Any) -> Any:
        result = self._operate(op, other)
        if not isinstance(result, Number):
            return result
        self.program.guard(result.index, result.value, "branch")
        return result.value

    def __neg__(self) -> Number:
        return self.program.number(("neg", self.index), -self.value)

    def __pos__(self) -> Number:
        return self

    def __abs__(self) -> Number:
        return self.program.number(("abs", self.index), abs(self.value))

    def __bool__(self) -> bool:
        return self._compare("ne", 0)

    def __float__(self) -> float:
        return float(self.escape())

    def __int__(self) -> int:
        return int(self.escape())

    def __index__(self) -> int:
        return operator.index(self.escape())  # type: ignore[arg-type]

    def __trunc__(self) -> int:
        return int(self.escape())

    def __round__(self, digits: int | None = None) -> Scalar:
        return round(self.escape(), digits)

    def __repr__(self) -> str:
        return repr(self.escape())

    def __format__(self, spec: str) -> str:
        return format(self.escape(), spec)

    def item(self) -> Number:
        return self

    def is_integer(self) -> bool:
        return float(self.escape()).is_integer()

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(ufunc, method)(*map(_leave, args), **kwargs)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(_leave, args), **{k: _leave(v) for k, v in (kwargs or {}).items()})


def _install() -> None:
    for op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
        setattr(Number, f"__{op}__", lambda self, other, op=op: self._operate(op, other))
        setattr(Number, f"__r{op}__", lambda self, other, op=op: self._operate(op, other, swapped=True))
    for op in ("gt", "ge", "lt", "le", "eq", "ne"):
        setattr(Number, f"__{op}__", lambda self, other, op=op: self._compare(op, other))


_install()
