"""Symbolic tensors that are real ones to code that asks: what a class's ``step`` sees in place of its tensors.

A ``Symbolic`` is a ``torch.Tensor`` without memory. Every torch function on it is handed to `call`: dtypes and shapes
come from the same function on meta tensors, values from the table of methods that callbacks have (``trace.methods``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..ir.ops import ELEMENT, TENSOR
from ..trace import methods  # noqa: F401  (fills the table of tensor methods)
from ..trace.externs import ExternTensor, leave
from ..trace.number import Number, operate
from ..trace.run import Run
from ..trace.signals import Untraceable
from ..trace.signature import MISSING, OWN, PLAIN
from ..trace.tensor import (
    METHODS,
    OPERATORS,
    SymTensor,
    as_float,
    called,
    rebind,
)
from .places import Place
from .sums import StepRun, added, lowered_to, run_of, settled, view_of

_Meta = torch.Tensor


class Symbolic(torch.Tensor):
    """A tensor of the shadow. ``meta`` has its shape and dtype.

    It is one of six: ``sym``, a place in the graph of a parameter; ``ext``, what torch calls give (see matrices.py);
    ``constant``, a real tensor made of nothing else; ``number``, one number of the host in all its elements; ``parts``,
    several tensors stacked; or none of these, where kernels cannot take it: ``why``.
    """

    sym: SymTensor | None
    meta: _Meta
    why: str
    number: Any
    parts: list[Symbolic] | None
    ext: ExternTensor | None
    constant: torch.Tensor | None
    hosted: bool
    """Whether it is a tensor of the optimizer itself, with one number in it."""
    symbolic = True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Tracing.function(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise Untraceable(f"{func} is called out of sight of what traces it")

    @staticmethod
    def of_math(op: str, *args: Any) -> Any:
        return TensorNumber.of_math(op, *(x.item() if isinstance(x, Symbolic) else x for x in args))

    def __hash__(self) -> int:
        """That of the parameter it stands for, so that one who looks this up among real ones comes to compare them."""
        return self.__dict__.get("_hash", id(self))

    def place_in_trace(self, place: int) -> int:
        """The place of a parameter or a gradient in a list, where others are missing."""
        partial = Tracing.current is not None and Tracing.current.partial
        return Place(place) if partial and self.__dict__.get("_listed") else place

    def __float__(self) -> float:
        raise Untraceable(
            "float() of a tensor is called by a function that was found in a container or a default, "
            "out of sight of what traces it"
        )

    def device_now(self) -> torch.device:
        """Where it would be."""
        of = next((x for x in (self.sym, self.ext) if x is not None), None)
        if self.parts:
            return self.parts[0].device_now()
        if of is not None:
            return of.run.device
        return torch.device("cpu") if self.constant is None else self.constant.device

    @property
    def grad(self) -> Any:
        return self.__dict__.get("gradient")

    @grad.setter
    def grad(self, value: Any) -> None:
        if "gradient" not in self.__dict__:
            raise Untraceable("setting .grad of a tensor that is no parameter")
        self.__dict__["gradient"] = value

    @property
    def data(self) -> Any:
        if self.ext is not None:
            return made(None, self.meta, ext=self.ext.data)
        return made(view_of(place(self)), self.meta)

    @data.setter
    def data(self, value: Any) -> None:
        if not isinstance(value, Symbolic) or (value.meta.shape, value.meta.dtype) != (
            self.meta.shape,
            self.meta.dtype,
        ):
            raise Untraceable("a tensor's memory is replaced by that of another kind of tensor")
        value = made(leave(value.ext), value.meta) if value.ext is not None else value
        rebind(place(self), place(value))

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        if not self.__dict__.get("_is_param"):
            return False
        return bool(place(self).run.attribute(ELEMENT, "requires_grad"))

    def added(self) -> list[str]:
        """What a step has put into its ``__dict__``."""
        return sorted(vars(self).keys() - _OURS)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("grad", "data"):  # a replay would not do it again
            raise Untraceable(f"the step sets the attribute {name!r} of a tensor")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise Untraceable(f"the step deletes the attribute {name!r} of a tensor")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        raise Untraceable("a tensor is printed")

    def __format__(self, spec: str) -> str:
        raise Untraceable("a tensor is printed")

    def __getattr__(self, name: str) -> Any:
        if name in ("_is_param", "_base"):
            return self.__dict__.get(name)
        if (
            self.__dict__.get("_is_param") and self.sym is not None
        ):  # one that others give a parameter, as FSDP does
            value = self.sym.run.attribute(ELEMENT, OWN + name)
            if value is MISSING:
                raise AttributeError(f"'Parameter' object has no attribute {name!r}")
            if isinstance(value, PLAIN):
                return value
        raise Untraceable(
            f"the attribute {name!r} of a tensor is asked for, which is not torch's own, and no number or flag"
        )


_OURS = {
    "sym",
    "meta",
    "why",
    "number",
    "parts",
    "hosted",
    "ext",
    "constant",
    "gradient",
    "_hash",
    "_is_param",
    "_listed",
    "place",
    "shown",
}
"""What functions of this package keep in its ``__dict__``."""


def made(
    sym: SymTensor | None,
    meta: _Meta,
    why: str = "",
    number: Any = None,
    parts: list[Symbolic] | None = None,
    hosted: bool = False,
    ext: ExternTensor | None = None,
    constant: torch.Tensor | None = None,
) -> Symbolic:
    of = next((x for x in (sym, ext) if x is not None), None)
    device = of.run.device if of is not None else torch.device("cpu") if constant is None else constant.device
    with torch._C.DisableTorchFunction():
        out = torch.Tensor._make_wrapper_subclass(
            Symbolic, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=device
        )
    out.__dict__.update(sym=sym, meta=meta, why=why, number=number, parts=parts, hosted=hosted)
    out.__dict__.update(ext=ext, constant=constant)
    return out


def parameter(sym: SymTensor, meta: _Meta, gradient: Symbolic | None, real: torch.Tensor) -> Symbolic:
    out = made(sym, meta)
    out.__dict__.update(_is_param=True, _listed=True, gradient=gradient, _hash=hash(real))
    if gradient is not None:
        gradient.__dict__["_listed"] = True
    return out


def place(x: Symbolic) -> SymTensor:
    """Its place in the graph, or Untraceable."""
    if x.sym is None:
        raise Untraceable(x.why or "a tensor of numbers that belongs to no parameter is used as if it did")
    return x.sym


class TensorNumber:
    """A number that was read from a tensor (``item()``): one per tensor, which only kernels know. A float, if asked.

    A branch on it is traced along both of its ways. ``counts``: it is the number of some parameters' elements, so
    above zero.
    """

    __slots__ = ("counts", "sym")
    symbolic = True

    def __init__(self, sym: SymTensor, counts: bool = False) -> None:
        self.sym, self.counts = sym, counts

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return float

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Tracing.function(func, args, kwargs or {})

    @staticmethod
    def read(x: Symbolic) -> Any:
        """The number of a tensor with one element."""
        if x.number is not None:
            return x.number
        if x.ext is not None:
            return TensorNumber.read(made(leave(x.ext), x.meta))
        one = x.__dict__["sym"] = settled(place(x))
        run, one = one.run, as_float(one)
        if one.kind != TENSOR:
            if x.meta.numel() != 1:
                raise ValueError(f"a Tensor with {x.meta.numel()} elements cannot be converted to Scalar")
            run.attribute(ELEMENT, "count")
            one = METHODS["sum"](one)
        if type(run) is StepRun:
            return TensorNumber(SymTensor(run, one.node, None))
        wide = "f" if run.compute == torch.float64 else "d"
        node = run.graph.op("mul", one.node, run.graph.leaf("const", 1.0, type=wide))
        return TensorNumber(SymTensor(run, node, None))

    @staticmethod
    def of_math(op: str, *args: Any) -> Any:
        """``math.sqrt(x)`` and its like."""
        if not any(type(x) is TensorNumber for x in args):
            return operate(op, *args)
        name = op.rpartition(".")[2]
        if name not in METHODS:
            raise Untraceable(f"{op} of a number that was read from a tensor has no fused form")
        first, *others = args
        run = next(x.sym.run for x in args if type(x) is TensorNumber)
        return _operate(name, first if type(first) is TensorNumber else _number(run, first), *others)

    @staticmethod
    def chosen(op: str, *args: Any) -> Any:
        """``max`` or ``min`` of two floats, as Python has it: the first, unless the second is larger. Else None."""
        a, b = (x.sym if type(x) is TensorNumber else x for x in args)
        if not all(isinstance(x, (SymTensor, float)) for x in (a, b)):
            return None
        a, b = settled(a), settled(b)
        run = run_of(x for x in (a, b) if isinstance(x, SymTensor))
        assert run is not None
        a, b = (lowered_to(run, x) if isinstance(x, SymTensor) else _number(run, x).sym for x in (a, b))
        takes = called(op, METHODS["gt" if op.endswith("max") else "lt"], b, a)
        return TensorNumber(called(op, METHODS["where"], b, takes, a))

    def item(self) -> TensorNumber:
        return self

    def is_integer(self) -> bool:
        return bool(_operate("eq", _operate("floor", self), self))

    def __bool__(self) -> bool:
        return bool(_operate("ne", self, 0))

    def __float__(self) -> float:
        raise Untraceable("a number that was read from a tensor leaves recorded arithmetic")

    __int__ = __index__ = __format__ = __repr__ = __str__ = __round__ = __hash__ = __float__  # type: ignore[assignment]


_NUMBERS = (TensorNumber, Number, int, float, bool)


def _number(run: Run, x: Any) -> TensorNumber:
    return TensorNumber(SymTensor(run, run.slot(x), None))


def _operate(name: str, x: TensorNumber, *others: Any) -> Any:
    if x.counts and name in _ABOVE_ZERO and type(others[0]) in (int, float) and others[0] == 0:
        return _ABOVE_ZERO[name]
    operands = [o.sym if type(o) is TensorNumber else o for o in (x, *others)]
    if name in _SUMS and len(operands) == 2:
        a, b = operands[::-1] if name == "rsub" else operands
        if (result := added(a, b, sign=1 if name == "add" else -1, again=True)) is not None:
            counts = x.counts and all(o.counts if type(o) is TensorNumber else o == 0 for o in others)
            return TensorNumber(result, counts and name == "add")
    operands = [settled(o) for o in operands]
    run = run_of(o for o in operands if isinstance(o, SymTensor))
    assert run is not None
    result = called(name, METHODS[name], *(lowered_to(run, o) for o in operands))
    if result.is_bool:
        return run.branch(result)
    return TensorNumber(result)


_ABOVE_ZERO = {"eq": False, "ne": True, "gt": True, "ge": True, "lt": False, "le": False}
_SUMS = frozenset({"add", "sub", "rsub"})  # what a sum over parameters is made with


def _dunder(operation: str) -> Callable[..., Any]:
    def method(self: TensorNumber, *others: Any) -> Any:
        if any(hasattr(type(o), "summed") for o in others):
            if operation == "add":  # which is theirs
                return NotImplemented
            others = tuple(o.item() if hasattr(type(o), "summed") else o for o in others)
        if not all(type(o) in _NUMBERS for o in others):
            return NotImplemented
        return _operate(operation, self, *others)

    return method


for _dunder_name, _operation in OPERATORS.items():
    if not _operation.startswith("bitwise"):
        setattr(TensorNumber, _dunder_name, _dunder(_operation))


class Tracing(TorchFunctionMode):
    """Every torch function while a shadow steps. ``acted``: whether any was called on its tensors; ``rounds``: whether
    results are rounded to their dtype, as torch does it; ``partial``: whether only some of the parameters are there."""

    current: Tracing | None = None
    function: Callable[..., Any]
    """What a torch function gives (see functions.py)."""

    def __init__(self, rounds: bool, partial: bool) -> None:
        super().__init__()
        self.acted, self.rounds, self.partial = False, rounds, partial

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Tracing.function(func, args, kwargs or {})


@contextmanager
def tracing(rounds: bool, partial: bool) -> Iterator[Tracing]:
    mode = Tracing(rounds, partial)
    before, Tracing.current = Tracing.current, mode
    try:
        with mode:
            yield mode
    finally:
        Tracing.current = before
