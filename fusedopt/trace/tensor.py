"""Symbolic tensors: what a callback sees in place of the parameter, its gradient and its state.

A symbolic tensor is a *location* holding a value of the graph. In-place methods rebind the location they were called
on; ``.data`` and ``.detach()`` are the same location. The table ``METHODS`` is all a callback may do to one; anything
else raises ``Untraceable``, and the callback is run eagerly instead.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .number import Number

if TYPE_CHECKING:
    from .run import Run

METHODS: dict[str, Callable[..., Any]] = {}
"""What a callback may do to a tensor, by torch's name; ``methods.py`` fills it."""
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Untraceable(BaseException):
    """A callback did what has no fused form. A BaseException, so that a callback's ``try`` cannot swallow it."""


def where_now() -> str:
    """``callback, file.py:12`` for the innermost frame outside this package's tracer."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        ("fusedopt.trace", "fusedopt.ir")
    ):
        frame = frame.f_back
    code = frame.f_code
    return f"{code.co_name}, {code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"


def _is_ours(frame: types.FrameType) -> bool:
    return frame.f_globals.get("__name__", "").split(".")[0] in ("fusedopt", "torch", "numpy")


class SymTensor:
    """A tensor that builds graph values. ``node`` is its value now; ``asked`` the dtype eager torch would give it."""

    def __init__(self, run: Run, node: int, asked: torch.dtype | None) -> None:
        self.__dict__.update(run=run, node=node, asked=asked)

    # -- what it is --
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What ``isinstance`` asks for. A callback would be told that this is no tensor; it runs eagerly instead."""
        # torch's own argument parser asks too, in the name of the same frame.
        if "isinstance" in sys._getframe(1).f_code.co_names and not _is_ours(sys._getframe(1)):
            raise Untraceable("isinstance() of a tensor; it is a symbolic one while callbacks are traced")
        return type(self)

    @property
    def kind(self) -> str:
        return self.run.graph.values[self.node].kind

    @property
    def is_bool(self) -> bool:
        return self.run.graph.values[self.node].type == "b"

    @property
    def dtype(self) -> torch.dtype:
        type_ = self.run.graph.values[self.node].type
        return {"b": torch.bool, "d": torch.float64}.get(type_, self.run.compute)

    @property
    def data(self) -> SymTensor:
        return self

    @data.setter
    def data(self, value: Any) -> None:
        _rebind(self, value)

    def __getattr__(self, name: str) -> Any:
        if name in METHODS:
            return lambda *args, **kwargs: METHODS[name](self, *args, **kwargs)
        base = name[:-1]
        if name.endswith("_") and not name.endswith("__") and base in METHODS:
            return lambda *args, **kwargs: _rebind(self, METHODS[base](self, *args, **kwargs))
        if name in _CONSTANT:
            return _CONSTANT[name]
        if name in _SHAPE:
            return self.run.attribute(self.kind, name)
        if name == "device":
            return self.run.device
        if name.startswith("__"):
            raise AttributeError(name)
        raise Untraceable(f"Tensor.{name} has no fused form")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            _rebind(self, value)
        elif name == "node":
            self.__dict__["node"] = value
        else:
            raise Untraceable(f"setting .{name} on a tensor has no fused form")

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", str(func)), dict(kwargs or {})
        out = kwargs.pop("out", None)
        base = name.removeprefix("linalg_")
        if base == "where":
            condition, x, other = args
            result = METHODS["where"](lift(condition.run, x), condition, other)
        elif base in METHODS or (base.endswith("_") and base[:-1] in METHODS):
            first = args[0] if args else kwargs.pop("input", None)
            if not isinstance(first, SymTensor):
                first = lift(next(a for a in args if isinstance(a, SymTensor)).run, first)
            result = getattr(first, base)(*args[1:], **kwargs)
        else:
            raise Untraceable(f"torch.{name} has no fused form")
        return result if out is None else _rebind(out, result)

    # -- what leaves the graph --
    def __bool__(self) -> bool:
        if self.kind == "F":
            raise Untraceable(
                "a branch on element values; use torch.where, or a reduction such as .any() or .mean()"
            )
        return self.run.branch(as_bool(self))

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise Untraceable("a tensor's value is read on the host (item, float, indexing, printing, ...)")

    __float__ = __int__ = __index__ = __len__ = __iter__ = __getitem__ = __setitem__ = __format__ = (
        __contains__
    ) = _refuse
    item = tolist = numpy = _refuse
    __hash__ = object.__hash__


def _rebind(box: SymTensor, value: Any) -> SymTensor:
    """``box.copy_(value)``: the location gets the value; its kind stays (an S value is expanded into an F location)."""
    new = lift(box.run, value)
    if box.kind == "S" and new.kind == "F":
        raise Untraceable("an in-place result does not fit the 0-d tensor it is written to")
    if box.is_bool != new.is_bool:
        new = as_bool(new) if box.is_bool else as_float(new)
    if box.kind == "F" and new.kind == "S":
        new = expand(new)
    box.node = new.node
    return box


def expand(x: SymTensor) -> SymTensor:
    if x.is_bool:
        raise Untraceable("a 0-d mask is written to a tensor with elements")
    return new(x, "expand", x)


def lift(run: Run, x: Any) -> SymTensor:
    """Anything a tensor op accepts as a symbolic tensor: numbers become scalar slots."""
    if isinstance(x, SymTensor):
        if x.run is not run:
            raise Untraceable("a tensor kept from another call of a callback; keep it in the state")
        return x
    if isinstance(x, torch.Tensor):
        if x.dim() or x.device.type != "cpu":
            raise Untraceable(
                "a tensor from outside the callback's arguments; keep it in the state, or pass a number"
            )
        x = x.item()
    if isinstance(x, (Number, int, float)):
        return SymTensor(run, run.slot(x), None)
    raise Untraceable(f"{type(x).__name__} is no operand of a fused tensor op")


def new(like: SymTensor, op: str, *args: SymTensor) -> SymTensor:
    run = like.run
    node = run.graph.op(op, *[a.node for a in args], where=where_now)
    return SymTensor(run, node, _promote(args))


def _promote(args: tuple[SymTensor, ...]) -> torch.dtype | None:
    """The dtype eager torch gives the result: 0-d tensors and numbers do not widen tensors with elements."""
    floats = [a for a in args if not a.is_bool and a.asked is not None]
    strong = [a for a in floats if a.kind == "F"] or floats
    return functools.reduce(torch.promote_types, [a.asked for a in strong]) if strong else None


def as_float(x: SymTensor) -> SymTensor:
    return new(x, "as_float", x) if x.is_bool else x


def as_bool(x: SymTensor) -> SymTensor:
    return x if x.is_bool else new(x, "ne", x, lift(x.run, 0))


_SHAPE = ("shape", "ndim", "itemsize")
_CONSTANT = {"requires_grad": True, "is_sparse": False, "is_leaf": True, "layout": torch.strided}

_OPERATORS = {
    "__add__": "add", "__radd__": "add", "__sub__": "sub", "__rsub__": "rsub", "__mul__": "mul", "__rmul__": "mul",
    "__truediv__": "div", "__rtruediv__": "rdiv", "__pow__": "pow", "__rpow__": "rpow",
    "__floordiv__": "floor_divide", "__rfloordiv__": "rfloor_divide", "__mod__": "remainder", "__rmod__": "rremainder",
    "__neg__": "neg", "__abs__": "abs",
    "__gt__": "gt", "__ge__": "ge", "__lt__": "lt", "__le__": "le", "__eq__": "eq", "__ne__": "ne",
    "__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor", "__invert__": "bitwise_not",
}  # fmt: skip
_IN_PLACE = {
    "__iadd__": "add_",
    "__isub__": "sub_",
    "__imul__": "mul_",
    "__itruediv__": "div_",
    "__ipow__": "pow_",
}
_NO_OPERATOR = {"@": "matmul", "<<": "lshift", ">>": "rshift"}


def _install() -> None:
    for dunder, name in (_OPERATORS | _IN_PLACE).items():
        setattr(SymTensor, dunder, lambda self, *other, name=name: getattr(self, name)(*other))
    for symbol, name in _NO_OPERATOR.items():
        for dunder in (f"__{name}__", f"__r{name}__"):
            setattr(SymTensor, dunder, functools.partialmethod(_refuse_operator, symbol))


def _refuse_operator(self: SymTensor, symbol: str, other: Any) -> Any:
    raise Untraceable(f"the operator {symbol} on tensors has no fused form")


_install()


class SymParameter(SymTensor):
    """The parameter: a symbolic tensor with a gradient."""

    def __init__(self, run: Run, node: int, asked: torch.dtype | None, grad: SymTensor) -> None:
        super().__init__(run, node, asked)
        self.__dict__["grad"] = grad

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "grad":
            _rebind(self.grad, value)
        else:
            super().__setattr__(name, value)
