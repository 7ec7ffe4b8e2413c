"""Symbolic tensors: what a callback sees in place of the parameter, its gradient and its state.

A symbolic tensor is a *location* holding a value of the graph. In-place methods rebind the location they were called
on; ``.data`` and ``.detach()`` are the same location. The table ``METHODS`` below is all a callback may do to one;
anything else raises ``Untraceable``, and the callback is run eagerly instead.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .number import Number

if TYPE_CHECKING:
    from .tracer import Run

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


class SymTensor:
    """A tensor that builds graph values. ``node`` is its value now; ``asked`` the dtype eager torch would give it."""

    def __init__(self, run: Run, node: int, asked: torch.dtype | None) -> None:
        self.__dict__.update(run=run, node=node, asked=asked)

    # -- what it is --
    @property
    def kind(self) -> str:
        return self.run.graph.values[self.node].kind

    @property
    def is_bool(self) -> bool:
        return self.run.graph.values[self.node].type == "b"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bool if self.is_bool else self.run.compute

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
            result = _where(*args, **kwargs)
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
        return self.run.branch(self if self.is_bool else _binary("ne")(self, 0))

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
        new = _as_bool(new) if box.is_bool else _as_float(new)
    if box.kind == "F" and new.kind == "S":
        new = _expand(new)
    box.node = new.node
    return box


def _expand(x: SymTensor) -> SymTensor:
    if x.is_bool:
        raise Untraceable("a 0-d mask is written to a tensor with elements")
    return _new(x, "expand", x)


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


def _new(like: SymTensor, op: str, *args: SymTensor) -> SymTensor:
    run = like.run
    node = run.graph.op(op, *[a.node for a in args], where=where_now)
    return SymTensor(run, node, _promote(args))


def _promote(args: tuple[SymTensor, ...]) -> torch.dtype | None:
    """The dtype eager torch gives the result: 0-d tensors and numbers do not widen tensors with elements."""
    floats = [a for a in args if not a.is_bool and a.asked is not None]
    strong = [a for a in floats if a.kind == "F"] or floats
    return functools.reduce(torch.promote_types, [a.asked for a in strong]) if strong else None


def _as_float(x: SymTensor) -> SymTensor:
    return _new(x, "as_float", x) if x.is_bool else x


def _as_bool(x: SymTensor) -> SymTensor:
    return x if x.is_bool else _binary("ne")(x, 0)


def _unary(op: str) -> Callable[..., SymTensor]:
    return lambda x: _new(x, op, _as_float(x))


def _binary(op: str) -> Callable[..., SymTensor]:
    def method(x: SymTensor, other: Any) -> SymTensor:
        return _new(x, op, _as_float(x), _as_float(lift(x.run, other)))

    return method


def _logical(op: str) -> Callable[..., SymTensor]:
    return lambda x, *other: _new(x, op, _as_bool(x), *(_as_bool(lift(x.run, o)) for o in other))


def _bitwise(op: str) -> Callable[..., SymTensor]:
    def method(x: SymTensor, *other: Any) -> SymTensor:
        if not x.is_bool:
            raise Untraceable("bitwise operations are for masks")
        return _logical(op)(x, *other)

    return method


def _times(value: Any, x: SymTensor) -> SymTensor:
    """``value * x``; nothing for the default ``1``. A recorded or computed 1.0 stays a slot: it may change."""
    return x if type(value) is int and value == 1 else _binary("mul")(lift(x.run, value), x)


def _add(x: SymTensor, other: Any, *, alpha: Any = 1) -> SymTensor:
    return _binary("add")(x, _times(alpha, lift(x.run, other)))


def _sub(x: SymTensor, other: Any, *, alpha: Any = 1) -> SymTensor:
    return _binary("sub")(x, _times(alpha, lift(x.run, other)))


def _div(x: SymTensor, other: Any, *, rounding_mode: str | None = None) -> SymTensor:
    out = _binary("div")(x, other)
    return out if rounding_mode is None else _unary(rounding_mode)(out)


def _addcmul(x: SymTensor, a: Any, b: Any, *, value: Any = 1) -> SymTensor:
    return _add(x, _binary("mul")(_times(value, lift(x.run, a)), b))


def _addcdiv(x: SymTensor, a: Any, b: Any, *, value: Any = 1) -> SymTensor:
    return _add(x, _binary("div")(_times(value, lift(x.run, a)), b))


def _lerp(x: SymTensor, end: Any, weight: Any) -> SymTensor:
    """torch's: from the start below weight ½, from the end above it, so that both ends are exact."""
    end, weight = lift(x.run, end), lift(x.run, weight)
    gap = _sub(end, x)
    near_start = _add(x, _binary("mul")(weight, gap))
    near_end = _sub(end, _binary("mul")(gap, _sub(x.run.constant(1.0), weight)))
    return _where(_binary("lt")(_unary("abs")(weight), x.run.constant(0.5)), near_start, near_end)


def _where(condition: SymTensor, a: Any, b: Any) -> SymTensor:
    run = condition.run
    return _new(condition, "where", _as_bool(condition), _as_float(lift(run, a)), _as_float(lift(run, b)))


STRUCTURAL_POWERS: dict[float, Callable[[SymTensor], SymTensor]] = {
    1: lambda x: x,
    2: lambda x: _new(x, "mul", x, x),
    3: lambda x: _new(x, "mul", _new(x, "mul", x, x), x),
    0.5: lambda x: _new(x, "sqrt", x),
    -0.5: lambda x: _new(x, "div", x.run.constant(1.0), _new(x, "sqrt", x)),
    -1: lambda x: _new(x, "div", x.run.constant(1.0), x),
    -2: lambda x: _new(x, "div", x.run.constant(1.0), _new(x, "mul", x, x)),
}
"""Exponents that are structure, not slots: ``g**2`` as a general power is seventy times slower."""


def _pow(x: SymTensor, exponent: Any) -> SymTensor:
    x = _as_float(x)
    if isinstance(exponent, Number) and exponent.value in STRUCTURAL_POWERS:
        exponent = exponent.escape()
    if type(exponent) in (int, float) and exponent in STRUCTURAL_POWERS:
        return STRUCTURAL_POWERS[exponent](x)
    return _binary("pow")(x, exponent)


def _clamp(x: SymTensor, min: Any = None, max: Any = None) -> SymTensor:
    if min is not None:
        x = _binary("maximum")(x, min)
    return x if max is None else _binary("minimum")(x, max)


def _softplus(x: SymTensor, beta: Any = 1, threshold: Any = 20) -> SymTensor:
    scaled = _times(beta, x)
    soft = _unary("log1p")(_unary("exp")(scaled))
    return _where(
        _binary("gt")(scaled, threshold), x, soft if type(beta) is int and beta == 1 else _div(soft, beta)
    )


def _sigmoid(x: SymTensor) -> SymTensor:
    one = x.run.constant(1.0)
    return _div(one, _add(one, _unary("exp")(_unary("neg")(x))))


def _full_like(x: SymTensor, value: Any, *, dtype: torch.dtype | None = None, **_: Any) -> SymTensor:
    if dtype is not None and dtype not in FLOATS:
        raise Untraceable(f"a new tensor of {dtype}; fused state is floating point")
    filled = _as_float(lift(x.run, value))
    if x.kind == "F":
        filled = _expand(filled)
    return SymTensor(x.run, filled.node, dtype or x.asked)


def _constant_like(value: float) -> Callable[..., SymTensor]:
    return lambda x, **kwargs: _full_like(x, x.run.constant(value), **kwargs)


def _to(x: SymTensor, *args: Any, dtype: Any = None, **_: Any) -> SymTensor:
    for a in args:
        dtype = (
            a
            if isinstance(a, torch.dtype)
            else a.dtype
            if isinstance(a, (SymTensor, torch.Tensor))
            else dtype
        )
    if dtype is None or dtype == x.dtype:
        return x
    if dtype == torch.bool:
        return _as_bool(x)
    if x.is_bool and dtype in FLOATS:
        return _as_float(x)
    raise Untraceable(f"a cast to {dtype}; inside a callback tensors are {x.run.compute}")


def _clone(x: SymTensor, **_: Any) -> SymTensor:
    return SymTensor(x.run, x.node, x.asked)


def _whole(x: SymTensor, dims: tuple, kwargs: dict) -> SymTensor:
    """The operand of a reduction over everything, or Untraceable."""
    wanted = [d for d in (*dims, kwargs.get("dim")) if d is not None and d != ()]
    if wanted or kwargs.get("keepdim"):
        raise Untraceable("a reduction over some dimensions; whole-tensor reductions fuse")
    return _as_float(x)


def _reduce(op: str) -> Callable[..., SymTensor]:
    def method(x: SymTensor, *dims: Any, **kwargs: Any) -> SymTensor:
        x = _whole(x, dims, kwargs)
        if x.kind == "S":
            return x
        return _new(x, op, x)

    return method


def _norm(x: SymTensor, p: Any = 2, dim: Any = None, **kwargs: Any) -> SymTensor:
    p = kwargs.pop("ord", p)
    p = 2 if p in ("fro", None) else p
    p = p.escape() if isinstance(p, Number) else p
    x = _whole(x, (dim,), kwargs)
    if p == float("inf"):
        return _reduce("amax")(_unary("abs")(x))
    if p == float("-inf"):
        return _reduce("amin")(_unary("abs")(x))
    if p == 1:
        return _reduce("sum")(_unary("abs")(x))
    if p == 2:
        return _unary("sqrt")(_reduce("sum")(STRUCTURAL_POWERS[2](x)))
    if p == 0:
        return _reduce("sum")(_as_float(_binary("ne")(x, 0)))
    return _pow(_reduce("sum")(_pow(_unary("abs")(x), p)), 1 / p)


def _std(square_root: bool) -> Callable[..., SymTensor]:
    def method(
        x: SymTensor, *dims: Any, unbiased: bool = True, correction: int | None = None, **kwargs: Any
    ) -> SymTensor:
        if dims and isinstance(dims[0], bool):
            unbiased, dims = dims[0], ()
        x = _whole(x, dims, kwargs)
        total = _reduce("sum")(STRUCTURAL_POWERS[2](_sub(x, _reduce("mean")(x))))
        correction = int(unbiased) if correction is None else correction
        count = _sub(SymTensor(x.run, x.run.graph.leaf("numel"), x.asked), correction)
        return _unary("sqrt")(_div(total, count)) if square_root else _div(total, count)

    return method


def _max_min(pair: str, whole: str) -> Callable[..., SymTensor]:
    def method(x: SymTensor, *args: Any, **kwargs: Any) -> SymTensor:
        if args and isinstance(args[0], (SymTensor, Number)):
            return _binary(pair)(x, args[0])
        return _reduce(whole)(x, *args, **kwargs)

    return method


def _cast(dtype: torch.dtype) -> Callable[..., SymTensor]:
    return lambda x: _to(x, dtype)


METHODS: dict[str, Callable[..., Any]] = {
    name: _unary(name)
    for name in (
        "neg",
        "abs",
        "sign",
        "sqrt",
        "exp",
        "expm1",
        "log",
        "log1p",
        "log2",
        "sin",
        "cos",
        "tanh",
        "atan",
    )
    + ("erf", "floor", "ceil", "trunc", "round")
}
METHODS |= {
    name: _binary(name) for name in ("maximum", "minimum", "atan2", "gt", "ge", "lt", "le", "eq", "ne")
}
METHODS |= {name: _logical(name) for name in ("logical_and", "logical_or", "logical_xor", "logical_not")}
METHODS |= {f"bitwise_{name}": _bitwise(f"logical_{name}") for name in ("and", "or", "xor", "not")}
METHODS |= {name: _reduce(name) for name in ("sum", "mean", "amax", "amin")}
METHODS |= {
    "add": _add,
    "sub": _sub,
    "rsub": lambda x, other: _sub(lift(x.run, other), x),
    "mul": _binary("mul"),
    "div": _div,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "lerp": _lerp,
    "pow": _pow,
    "rpow": lambda x, other: _binary("pow")(lift(x.run, other), x),
    "square": lambda x: _pow(x, 2),
    "rsqrt": lambda x: _pow(x, -0.5),
    "reciprocal": lambda x: _pow(x, -1),
    "clamp": _clamp,
    "clamp_min": lambda x, min: _clamp(x, min=min),
    "clamp_max": lambda x, max: _clamp(x, max=max),
    "relu": lambda x: _clamp(x, min=x.run.constant(0.0)),
    "sigmoid": _sigmoid,
    "softplus": _softplus,
    "where": lambda x, condition, other: _where(condition, x, other),
    "masked_fill": lambda x, mask, value: _where(mask, value, x),
    "isnan": lambda x: _binary("ne")(x, x),
    "isfinite": lambda x: _binary("lt")(_unary("abs")(x), x.run.constant(float("inf"))),
    "isinf": lambda x: _binary("eq")(_unary("abs")(x), x.run.constant(float("inf"))),
    "max": _max_min("maximum", "amax"),
    "min": _max_min("minimum", "amin"),
    "norm": _norm,
    "vector_norm": _norm,
    "std": _std(True),
    "var": _std(False),
    "any": lambda x: _as_bool(_reduce("amax")(_as_float(_as_bool(x)))),
    "all": lambda x: _as_bool(_reduce("amin")(_as_float(_as_bool(x)))),
    "dot": lambda x, other: _reduce("sum")(_binary("mul")(x, other)),
    "zeros_like": _constant_like(0.0),
    "ones_like": _constant_like(1.0),
    # Never uninitialised memory: what a callback leaves unwritten is zero.
    "empty_like": _constant_like(0.0),
    "full_like": _full_like,
    "zero": _constant_like(0.0),
    "fill": _full_like,
    "copy": lambda x, other, non_blocking=False: _clone(lift(x.run, other)),
    "clone": _clone,
    "detach": lambda x: x,
    "contiguous": lambda x, **_: x,
    "to": _to,
    "type_as": lambda x, other: _to(x, other),
    "float": _cast(torch.float32),
    "double": _cast(torch.float64),
    "half": _cast(torch.float16),
    "bfloat16": _cast(torch.bfloat16),
    "bool": _cast(torch.bool),
    "size": lambda x, dim=None: (
        x.run.attribute(x.kind, "shape") if dim is None else x.run.attribute(x.kind, "shape")[dim]
    ),
    "dim": lambda x: x.run.attribute(x.kind, "ndim"),
    "numel": lambda x: x.run.attribute(x.kind, "count"),
    "nelement": lambda x: x.run.attribute(x.kind, "count"),
    "is_floating_point": lambda x: not x.is_bool,
    "is_complex": lambda x: False,
    "requires_grad": lambda x, value=True: x,
}
METHODS |= {
    "subtract": METHODS["sub"],
    "multiply": METHODS["mul"],
    "divide": METHODS["div"],
    "true_divide": METHODS["div"],
    "clip": METHODS["clamp"],
    "absolute": METHODS["abs"],
    "negative": METHODS["neg"],
    "not_equal": METHODS["ne"],
    "greater": METHODS["gt"],
    "less": METHODS["lt"],
}

_SHAPE = ("shape", "ndim", "itemsize")
_CONSTANT = {"requires_grad": True, "is_sparse": False, "is_leaf": True, "layout": torch.strided}

_OPERATORS = {
    "__add__": "add", "__radd__": "add", "__sub__": "sub", "__rsub__": "rsub", "__mul__": "mul", "__rmul__": "mul",
    "__truediv__": "div", "__pow__": "pow", "__rpow__": "rpow", "__neg__": "neg", "__abs__": "abs",
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
_NO_OPERATOR = {"@": "matmul", "//": "floordiv", "%": "mod", "<<": "lshift", ">>": "rshift"}


def _install() -> None:
    for dunder, name in (_OPERATORS | _IN_PLACE).items():
        setattr(SymTensor, dunder, lambda self, *other, name=name: getattr(self, name)(*other))
    SymTensor.__rtruediv__ = lambda self, other: _div(lift(self.run, other), self)  # type: ignore[attr-defined]
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
