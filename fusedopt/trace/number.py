"""Numbers that record themselves: the host half of a step, as a straight-line scalar program.

Hyperparameters and scalar state (``step``) reach callbacks as ``Number``s. They hold this step's true value, so
``if r > 5`` takes the true branch, and they remember how they were made, so the arithmetic of a step (bias
corrections, schedules) can be shown, and replayed without running the callbacks again.

``Number`` is no subclass of float: on one, formatting would call no hook. A value that leaves this world (formatting,
an index, real tensors, numpy arrays) is an *escape*: recorded as the guard that the number equals what it was. What
calls no hook either way (``math.exp(x)``, ``float(x)``) is recorded by stand-ins for these functions: see standins.py.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .signals import Untraceable

Scalar = int | float

_OF_MATH = """
    acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh degrees erf erfc exp exp2 expm1 fabs floor fmod
    gamma hypot isfinite isinf isnan ldexp lgamma log log10 log1p log2 nextafter pow radians remainder sin sinh sqrt tan
    tanh trunc ulp
"""
_OF_NUMPY = """
    absolute add arccos arccosh arcsin arcsinh arctan arctan2 arctanh cbrt ceil copysign cos cosh deg2rad degrees divide
    exp exp2 expm1 fabs float_power floor fmax fmin fmod hypot log log10 log1p log2 maximum minimum multiply negative
    power rad2deg radians reciprocal rint sign sin sinh sqrt square subtract tan tanh trunc
"""


def _of(module: Any, names: Iterable[str]) -> dict[str, Callable[..., Any]]:
    return {f"{module.__name__}.{n}": getattr(module, n) for n in names if hasattr(module, n)}


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
    **_of(builtins, ("float", "int", "max", "min", "round")),
    **_of(math, _OF_MATH.split()),
    **_of(np, _OF_NUMPY.split()),
}
"""Every operation of the scalar program, with Python's own meaning. One with a dot in its name is that function of that
module: wherever a program is run, this function is called, so nobody has to compute what it does again."""

_NUMPYS_OWN = ("floordiv", "mod", "pow", "builtins.round")
"""What numpy's float64 does otherwise than Python's float, where both give a number."""

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
        self.entries: list[tuple[Any, ...]] = []
        self.values: list[Scalar] = []
        self.guards: list[Guard] = []
        self._known: dict[tuple[Any, ...], int] = {}

    def entry(self, key: tuple[Any, ...], value: Scalar) -> int:
        index = self._known.get(key)
        if index is None:
            index = self._known[key] = len(self.entries)
            self.entries.append(key)
            self.values.append(value)
        return index

    def constant(self, value: Scalar) -> int:
        """The entry of a constant. Its text tells zeros of both signs apart, which are equal."""
        return self.entry(("const", type(value).__name__, repr(value), value), value)

    def number(self, key: tuple[Any, ...], value: Scalar) -> Number:
        return Number(self, self.entry(key, value), value)

    def guard(self, index: int, value: Scalar | bool, where: str = "") -> None:
        guard = Guard(index, value.item() if isinstance(value, np.generic) else value, where)
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
        return f"-{args[0]}" if op == "neg" else f"{op.removeprefix('builtins.')}({', '.join(args)})"


def leave(x: Any) -> Any:
    return x.escape() if isinstance(x, Number) else x


def operate(op: str, *args: Any) -> Any:
    """What an operation makes of these, one of which is a `Number`: another, if it makes a number of numbers."""
    function = ARITHMETIC[op]
    program = next(x.program for x in args if isinstance(x, Number))
    # A number kept from an earlier step is a plain one.
    args = tuple(x.value if isinstance(x, Number) and x.program is not program else x for x in args)
    values = [x.value if isinstance(x, Number) else x for x in args]
    numpys = any(type(x) is np.float64 for x in values) and op in _NUMPYS_OWN
    if numpys or not all(isinstance(x, Number) or type(x) in (int, float, bool) for x in args):
        return function(*map(leave, args))
    try:
        result = function(*values)
    except Exception:  # it holds for what raises: the callback may catch it
        for x in args:
            leave(x)
        raise
    if isinstance(result, complex):
        shown = ", ".join(program.expression(x.index) if isinstance(x, Number) else repr(x) for x in args)
        raise Untraceable(f"{op} of {shown} is complex")
    if type(result) not in (bool, int, float, np.float64):
        return function(*map(leave, args))
    at = program.entry(
        (op, *(x.index if isinstance(x, Number) else program.constant(x) for x in args)), result
    )
    if type(result) is bool:
        program.guard(at, result, "branch")
        return result
    return Number(program, at, result)


class Number:
    """A number of this step that remembers how it was computed. Behaves as the int or float it holds."""

    __slots__ = ("index", "program", "value")

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
        if hasattr(type(other), "symbolic"):  # which knows better what to do with a Number
            return NotImplemented
        if not isinstance(other, (int, float, np.generic, np.ndarray, torch.Tensor)):  # as Numbers are, too
            return NotImplemented
        return operate(op, other, self) if swapped else operate(op, self, other)

    def __hash__(self) -> int:
        return hash(self.escape())

    def __pos__(self) -> Number:
        return self

    def __bool__(self) -> bool:
        return bool(operate("ne", self, 0))

    def __float__(self) -> float:
        return float(self.escape())

    def __int__(self) -> int:
        return int(self.escape())

    def __index__(self) -> int:
        return operator.index(self.escape())  # type: ignore[arg-type]

    def __round__(self, digits: Any = None) -> Any:
        return operate("builtins.round", self, *(() if digits is None else (digits,)))

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __repr__(self) -> str:
        return repr(self.escape())

    def __format__(self, spec: str) -> str:
        return format(self.escape(), spec)

    def item(self) -> Number:
        return operate("builtins.float", self) if isinstance(self.value, np.generic) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.escape(), name)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *args: Any, **kwargs: Any) -> Any:
        op = f"numpy.{ufunc.__name__}"
        if method == "__call__" and not kwargs and ARITHMETIC.get(op) is ufunc:
            return operate(op, *args)
        return getattr(ufunc, method)(*map(leave, args), **kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*map(leave, args), **{k: leave(v) for k, v in (kwargs or {}).items()})


def _install() -> None:
    for op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
        setattr(Number, f"__{op}__", lambda self, other, op=op: self._operate(op, other))
        setattr(Number, f"__r{op}__", lambda self, other, op=op: self._operate(op, other, swapped=True))
    for op in ("gt", "ge", "lt", "le", "eq", "ne"):
        setattr(Number, f"__{op}__", lambda self, other, op=op: self._operate(op, other))
    for op in ("neg", "abs", "math.floor", "math.ceil", "math.trunc"):
        setattr(Number, f"__{op.removeprefix('math.')}__", lambda self, op=op: operate(op, self))


_install()
