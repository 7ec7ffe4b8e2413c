"""Symbolic tensors: what a callback sees in place of the parameter, its gradient and its state.

A symbolic tensor is a view of a *place* that holds a value of the graph. In-place methods put another value there;
``.data`` and ``.detach()`` are views of the same place, and ``p.data = x`` makes p one of x's. The table ``METHODS`` is
all a callback may do to one; anything else raises ``Untraceable``, and the callback is run eagerly instead.
"""

from __future__ import annotations

import functools
import operator
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..ir.ops import ELEMENT, TENSOR, axes_of
from . import axes
from .number import Number
from .signals import Mismatched, Untraceable

if TYPE_CHECKING:
    from .run import Run

METHODS: dict[str, Callable[..., Any]] = {}
"""What a callback may do to a tensor, by torch's name; ``methods.py`` fills it."""
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def is_ours(frame: types.FrameType) -> bool:
    """Whether the code is no callback's."""
    return frame.f_globals.get("__name__", "").split(".")[0] in ("fusedopt", "torch", "numpy")


Shown = axes.Dims | Callable[[], axes.Dims] | None


class Place:
    """Where a value is: ``node`` is the value now, ``asked`` the dtype eager torch would give it."""

    __slots__ = ("__weakref__", "asked", "node")

    def __init__(self, node: int, asked: torch.dtype | None) -> None:
        self.node, self.asked = node, asked


class SymTensor:
    """A tensor that builds graph values: a view of a place.

    ``shown`` is how its dimensions are the parameter's (see axes.py), or what finds that out once it matters; None: all
    of them, or none where there is one number per tensor.
    """

    place: Place
    shown: Shown

    def __init__(self, run: Run, node: int, asked: torch.dtype | None, shown: Shown = None) -> None:
        self.__dict__.update(run=run, place=run.new_place(node, asked), shown=shown)

    # -- what it is --
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What ``isinstance`` asks for. A callback would be told that this is no tensor; it runs eagerly instead."""
        # torch's own argument parser asks too, in the name of the same frame.
        if "isinstance" in sys._getframe(1).f_code.co_names and not is_ours(sys._getframe(1)):
            raise Untraceable("isinstance() of a tensor; it is a symbolic one while callbacks are traced")
        return type(self)

    @property
    def node(self) -> int:
        return self.place.node

    @property
    def asked(self) -> torch.dtype | None:
        return self.place.asked

    @property
    def kind(self) -> str:
        return self.run.graph.values[self.node].kind

    @property
    def dims(self) -> axes.Dims:
        """How its dimensions are the parameter's."""
        shown = self.shown
        if callable(shown):
            self.__dict__["shown"] = shown = shown()
        if shown is not None:
            return shown
        return () if self.kind == TENSOR else self.run.attribute(ELEMENT, "dims")

    def fact(self, name: str) -> Any:
        """Its shape, number of dimensions or elements, as a callback asks for it."""
        if self.shown is None or name == "contiguous":
            return self.run.attribute(self.kind, name)
        shape = torch.Size(axes.sizes(self.dims, self.run.lengths()))
        return {"shape": shape, "ndim": len(shape), "count": shape.numel()}[name]

    @property
    def is_bool(self) -> bool:
        return self.run.graph.values[self.node].type == "b"

    @property
    def dtype(self) -> torch.dtype:
        type_ = self.run.graph.values[self.node].type
        return {"b": torch.bool, "d": torch.float64}.get(type_, self.run.compute)

    @property
    def itemsize(self) -> int:
        """As the user's tensor has it, not the one in the compute type."""
        return (self.dtype if self.is_bool else self.asked or self.dtype).itemsize

    @property
    def data(self) -> SymTensor:
        return alias(self)

    def _replacement(self, value: Any) -> SymTensor:
        """What takes the place of this tensor's memory: another of the same kind."""
        value = value.leave() if is_extern(value) else value
        other = lift(self.run, value)
        mine = self.kind, self.is_bool, self.shown
        if not isinstance(value, SymTensor) or (other.kind, other.is_bool, other.shown) != mine:
            raise Untraceable("a tensor is replaced by one of another shape or type")
        return other

    def __getattr__(self, name: str) -> Any:
        if name in _CONSTANT:
            return _CONSTANT[name]
        if name in METHODS:
            return functools.partial(called, name, METHODS[name], self)
        base = name[:-1]
        if name.endswith("_") and not name.endswith("__") and base in METHODS:
            return lambda *args, **kwargs: rebind(self, called(name, METHODS[base], self, *args, **kwargs))
        if name in _SHAPE:
            return self.fact(name)
        if name == "device":
            return self.run.device
        if name.startswith("__"):
            raise AttributeError(name)
        if self.run.calls is not None and self.run.calls.starts(name):
            return self.run.calls.attribute(self, name)
        raise Untraceable(f"Tensor.{name} has no fused form")

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "data":
            raise Untraceable(f"setting .{name} on a tensor has no fused form")
        self.__dict__["place"] = self._replacement(value).place

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", str(func)), dict(kwargs or {})
        run = next(x.run for x in _arguments(args, kwargs) if isinstance(x, SymTensor))
        base = name.removeprefix("linalg_")
        real = any(_is_real(run, x) for x in _arguments(args, kwargs))
        if run.calls is not None and (real or run.calls.starts(name)):
            return run.calls.dispatch(run, func, args, kwargs)
        out = kwargs.pop("out", None)
        if base == "where":
            condition, x, other = args
            result = called("where", METHODS["where"], lift(condition.run, x), condition, other)
        elif base in METHODS or (base.endswith("_") and base[:-1] in METHODS):
            first = args[0] if args else kwargs.pop("input", None)
            if not isinstance(first, SymTensor):
                first = lift(next(a for a in args if isinstance(a, SymTensor)).run, first)
            result = getattr(first, base)(*args[1:], **kwargs)
        else:
            raise Untraceable(f"torch.{name} has no fused form")
        return result if out is None else rebind(out, result)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *args: Any, **kwargs: Any) -> Any:
        """numpy's numbers leave an operator to tensors, as they do to torch's; its functions know no symbolic ones."""
        symbol = _OF_NUMPY.get(ufunc.__name__)
        plain = [a.item() if isinstance(a, (np.generic, np.ndarray)) and a.ndim == 0 else a for a in args]
        if symbol is None or method != "__call__" or kwargs or any(isinstance(a, np.ndarray) for a in plain):
            raise Untraceable(
                f"numpy.{ufunc.__name__} of a tensor",
                "torch has most of numpy's functions, and what it has fuses",
            )
        return symbol(*plain)

    # -- what leaves the graph --
    def __bool__(self) -> bool:
        if self.kind != TENSOR:
            raise Untraceable(
                "a branch on element values; use torch.where, or a reduction such as .any() or .mean()"
            )
        return self.run.branch(as_bool(self))

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise Untraceable(
            "a tensor's value is read on the host (item, float, indexing, printing, ...)",
            "keep it a tensor: 0-d tensors fuse, and torch.where and comparisons take them",
        )

    def __getitem__(self, index: Any) -> SymTensor:
        """``x[:, None]`` and its like."""
        return called("__getitem__", METHODS["__getitem__"], self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise Untraceable("some elements are written to, by an index or a mask", SOME_ELEMENTS)

    __float__ = __int__ = __index__ = __len__ = __iter__ = __format__ = __contains__ = _refuse
    item = tolist = numpy = _refuse

    def __repr__(self) -> str:
        return "<a symbolic tensor of a trace that is over>" if self.run.finished else self._refuse()

    def __hash__(self) -> int:
        raise Untraceable("which tensor it is (in a set, as a key) cannot be told of a symbolic one")


SOME_ELEMENTS = "torch.where(mask, x, y) over all elements fuses"
_OF_NUMPY: dict[str, Callable[..., Any]] = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv,
    "power": operator.pow, "greater": operator.gt, "greater_equal": operator.ge, "less": operator.lt,
    "less_equal": operator.le, "equal": operator.eq, "not_equal": operator.ne,
}  # fmt: skip
"""What numpy calls the operators."""


def _arguments(args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """All arguments, those in lists too."""
    flat = [part for a in (*args, *kwargs.values()) for part in (a if type(a) in (tuple, list) else (a,))]
    return flat


def is_extern(x: Any) -> bool:
    """Whether it is an `externs.ExternTensor`."""
    return getattr(type(x), "extern", False)


def _is_real(run: Run, x: Any) -> bool:
    """Whether what it is used with is done by torch calls."""
    return is_extern(x) or (run.calls is not None and run.calls.made(run, x))


def alias(x: SymTensor) -> SymTensor:
    """Another view of the same place."""
    view = SymTensor(x.run, x.node, x.asked, x.shown)
    view.__dict__["place"] = x.place
    return view


def called(name: str, method: Callable[..., Any], x: SymTensor, *args: Any, **kwargs: Any) -> Any:
    """The method's result. What it does not take torch may, so an error is no error of the callback's yet."""
    if x.run.finished:
        raise RuntimeError(
            f"Tensor.{name} of a tensor kept from another call of a callback, a symbolic one whose trace is over; keep "
            "tensors in the state that callbacks return"
        )
    if any(_is_real(x.run, a) for a in args) and not x.run.calls.fuses(name, (x, *args)):
        return x.run.calls.dispatch(x.run, getattr(torch.Tensor, _TORCHS.get(name, name)), (x, *args), kwargs)
    try:
        return method(x, *args, **kwargs)
    except Mismatched as error:
        error.of = x.run.callback
        raise
    except Exception as error:
        raise Untraceable(f"Tensor.{name}: {error}") from error


def rebind(box: SymTensor, value: Any) -> SymTensor:
    """``box.copy_(value)``: the place gets the value; its kind stays (an S value is expanded into an F place)."""
    new = lift(box.run, value)
    if box.run.lent:
        box.run.calls.written(box)
    if box.kind == TENSOR and new.kind == ELEMENT:
        raise Untraceable("an in-place result does not fit the 0-d tensor it is written to")
    if box.shown != new.shown and not _fits(box, new):
        error = Mismatched("an in-place result does not fit the shape of the tensor it is written to")
        error.of = box.run.callback
        raise error
    if box.is_bool != new.is_bool:
        new = as_bool(new) if box.is_bool else as_float(new)
    if box.kind != new.kind:
        new = expand(new, box)
    box.place.node = new.node
    return box


def _fits(box: SymTensor, new: SymTensor) -> bool:
    if box.kind == new.kind == TENSOR:  # one number each, in whatever shape torch allows
        return True
    try:
        return axes.broadcast(box.dims, new.dims) == box.dims
    except Mismatched:
        return False


def expand(x: SymTensor, like: SymTensor | None = None) -> SymTensor:
    """x with as many numbers as another tensor, else as the parameter."""
    if x.is_bool:
        raise Untraceable("a 0-d mask is written to a tensor with elements")
    kind, shown = (ELEMENT, None) if like is None else (like.kind, like.shown)
    node = x.run.graph.op("expand", x.node, where=x.run.where, to=None if kind == ELEMENT else kind)
    return SymTensor(x.run, node, x.asked, shown)


def lift(run: Run, x: Any) -> SymTensor:
    """Anything a tensor op accepts as a symbolic tensor: numbers become scalar slots."""
    if isinstance(x, SymTensor):
        if x.run is not run:
            raise Untraceable("a tensor kept from another call of a callback; keep it in the state")
        return x
    if is_extern(x):
        if x.run is not run:
            raise Untraceable("a tensor kept from another call of a callback; keep it in the state")
        return x.leave()
    if isinstance(x, torch.Tensor):
        if x.dim() or x.device.type != "cpu":
            raise Untraceable(
                "a tensor from outside the callback's arguments; keep it in the state, or pass a number"
            )
        x = x.item()
    if isinstance(x, (np.integer, np.floating)):
        x = x.item()
    if isinstance(x, (Number, int, float)):
        return SymTensor(run, run.slot(x), None)
    raise Untraceable(f"{type(x).__name__} is no operand of a fused tensor op")


def new(like: SymTensor, op: str, *args: SymTensor) -> SymTensor:
    run = like.run
    shown: Shown = None
    seen = [a.shown for a in args if a.shown is not None or a.kind != TENSOR]
    if any(s is not seen[0] for s in seen):
        shown = functools.reduce(axes.broadcast, (a.dims for a in args))
    elif seen:
        shown = seen[0]
    node = run.graph.op(op, *[a.node for a in args], where=run.where)
    return SymTensor(run, node, _promote(args), plain(run, node, shown))


def plain(run: Run, node: int, shown: Shown) -> Shown:
    """The dimensions of a value, None if they are what its kind says."""
    kind = run.graph.values[node].kind
    if callable(shown):
        return shown
    if shown is None or (kind == TENSOR and shown == ()):
        return None
    return None if kind == ELEMENT and shown == run.attribute(ELEMENT, "dims") else shown


def along(x: SymTensor, op: str, shown: axes.Dims) -> SymTensor:
    """A reduction of x that leaves these dimensions."""
    run = x.run
    kept, had, value = axes.along(shown), axes_of(x.kind, run.graph.axes), run.graph.values[x.node]
    if kept == had and kept:
        node = x.node
    elif op == "sum" and not kept and value.op == "expand" and run.graph.values[value.args[0]].kind == TENSOR:
        node = run.graph.op(
            "mul", value.args[0], run.graph.leaf("numel"), where=run.where
        )  # one number, so often
    else:
        node = run.graph.op(op, x.node, where=run.where, to=kept or None) if x.kind != TENSOR else x.node
    return SymTensor(run, node, x.asked, plain(run, node, shown))


def _promote(args: tuple[SymTensor, ...]) -> torch.dtype | None:
    """The dtype eager torch gives the result: 0-d tensors and numbers do not widen tensors with elements."""
    floats = [
        (a.kind != TENSOR or bool(a.shown), a.asked) for a in args if not a.is_bool and a.asked is not None
    ]
    strong = [asked for large, asked in floats if large] or [asked for _, asked in floats]
    return functools.reduce(torch.promote_types, strong) if strong else None


def as_float(x: SymTensor) -> SymTensor:
    return new(x, "as_float", x) if x.is_bool else x


def as_bool(x: SymTensor) -> SymTensor:
    return x if x.is_bool else new(x, "ne", x, lift(x.run, 0))


_SHAPE = ("shape", "ndim")
_CONSTANT = {"requires_grad": False, "is_sparse": False, "is_leaf": True, "layout": torch.strided}

OPERATORS = {
    "__add__": "add", "__radd__": "add", "__sub__": "sub", "__rsub__": "rsub", "__mul__": "mul", "__rmul__": "mul",
    "__truediv__": "div", "__rtruediv__": "rdiv", "__pow__": "pow", "__rpow__": "rpow",
    "__floordiv__": "floor_divide", "__rfloordiv__": "rfloor_divide", "__mod__": "remainder", "__rmod__": "rremainder",
    "__neg__": "neg", "__abs__": "abs",
    "__gt__": "gt", "__ge__": "ge", "__lt__": "lt", "__le__": "le", "__eq__": "eq", "__ne__": "ne",
    "__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor", "__invert__": "bitwise_not",
}  # fmt: skip
IN_PLACE = {
    "__iadd__": "add_",
    "__isub__": "sub_",
    "__imul__": "mul_",
    "__itruediv__": "div_",
    "__ipow__": "pow_",
}
_NO_OPERATOR = {"<<": "lshift", ">>": "rshift"}
_TORCHS = {"rdiv": "__rdiv__", "rpow": "__rpow__", "rsub": "__rsub__"}
"""Methods of the table that torch has under other names."""


def _multiply(self: SymTensor, other: Any) -> Any:
    return _product(self, self, other)


def _multiply_right(self: SymTensor, other: Any) -> Any:
    return _product(self, other, self)


def _product(x: SymTensor, a: Any, b: Any) -> Any:
    if x.run.calls is None:
        return _refuse_operator(x, "@", b)
    return x.run.calls.dispatch(x.run, torch.matmul, (a, b), {})


def _install() -> None:
    for dunder, product in (("__matmul__", _multiply), ("__rmatmul__", _multiply_right)):
        setattr(SymTensor, dunder, product)
    for dunder, name in (OPERATORS | IN_PLACE).items():
        setattr(SymTensor, dunder, lambda self, *other, name=name: getattr(self, name)(*other))
    for symbol, name in _NO_OPERATOR.items():
        for dunder in (f"__{name}__", f"__r{name}__"):
            setattr(SymTensor, dunder, functools.partialmethod(_refuse_operator, symbol))


def _refuse_operator(self: SymTensor, symbol: str, other: Any) -> Any:
    raise Untraceable(f"the operator {symbol} on tensors has no fused form")


_install()


class SymParameter(SymTensor):
    """The parameter: a symbolic tensor with a gradient."""

    def __init__(self, run: Run, node: int, asked: torch.dtype | None, grad: SymTensor | None) -> None:
        super().__init__(run, node, asked)
        self.__dict__["grad"] = grad

    @property
    def requires_grad(self) -> bool:
        return self.run.attribute(self.kind, "requires_grad")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "grad" and self.grad is not None:
            self.__dict__["grad"] = self.grad._replacement(value)
        else:
            super().__setattr__(name, value)
