"""How many elements a tensor has, which a step may count over parameters."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from ..trace.number import ARITHMETIC, Number, operate
from ..trace.tensor import SymTensor
from .sums import opened
from .symbolic import TensorNumber, Tracing


class Count:
    """``p.numel()``: an int, if asked, which tells parameters apart; a sum once it is added to others', or to zero."""

    __slots__ = ("_of",)
    symbolic = True

    def __init__(self, of: SymTensor) -> None:
        self._of = of

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return int

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Tracing.function(func, args, kwargs or {})

    @staticmethod
    def of_math(op: str, *args: Any) -> Any:
        args = tuple(plain(x) for x in args)
        if any(type(x) is TensorNumber for x in args):
            return TensorNumber.of_math(op, *args)
        return operate(op, *args) if any(type(x) is Number for x in args) else ARITHMETIC[op](*args)

    def item(self) -> int:
        """As an int."""
        return self._of.fact("count")

    def summed(self) -> Any:
        run = self._of.run
        count = SymTensor(run, run.graph.leaf("numel"), None)
        return TensorNumber(opened(count), counts=True)

    def __add__(self, other: Any) -> Any:
        begins = type(other) in (int, float) and other == 0
        if begins or type(other) in (Count, TensorNumber):
            return self.summed() + (other.summed() if type(other) is Count else other)
        return self.item() + other

    __radd__ = __add__

    def __hash__(self) -> int:
        return hash(self.item())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.item(), name)


def plain(x: Any) -> Any:
    return x.item() if type(x) is Count else x


def _alone(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self.item(), name)(*others)


def _with_other(function: Callable[[Any, Any], Any], reflected: bool) -> Callable[..., Any]:
    """An operator: as of an int, which other types know what to do with."""
    if reflected:
        return lambda self, other: function(plain(other), self.item())
    return lambda self, other: function(self.item(), plain(other))


def _install() -> None:
    binary = "sub mul truediv floordiv mod pow and_ or_ xor lshift rshift".split()  # noqa: SIM905
    alone = "bool int float index neg pos abs invert round trunc floor ceil repr str format".split()  # noqa: SIM905
    for name in binary:
        plain_name, function = name.removesuffix("_"), getattr(operator, name)
        setattr(Count, f"__{plain_name}__", _with_other(function, reflected=False))
        setattr(Count, f"__r{plain_name}__", _with_other(function, reflected=True))
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(Count, f"__{name}__", _with_other(getattr(operator, name), reflected=False))
    for name, reflected in (("divmod", False), ("rdivmod", True)):
        setattr(Count, f"__{name}__", _with_other(divmod, reflected))
    for name in alone:
        setattr(Count, f"__{name}__", _alone(f"__{name}__"))


_install()
