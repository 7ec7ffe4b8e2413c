"""The methods of symbolic tensors: torch's functions in terms of the op table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..ir.ops import OPS, is_reduction
from .number import Number
from .tensor import FLOATS, METHODS, SymTensor, Untraceable, as_bool, as_float, expand, lift, new


def _unary(op: str) -> Callable[..., SymTensor]:
    return lambda x: new(x, op, as_float(x))


def _binary(op: str) -> Callable[..., SymTensor]:
    def method(x: SymTensor, other: Any) -> SymTensor:
        return new(x, op, as_float(x), as_float(lift(x.run, other)))

    return method


def _logical(op: str) -> Callable[..., SymTensor]:
    return lambda x, *other: new(x, op, as_bool(x), *(as_bool(lift(x.run, o)) for o in other))


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


def _floor_divide(x: SymTensor, other: Any, symbol: str = "//") -> SymTensor:
    other = lift(x.run, other)
    if "F" in (x.kind, other.kind):
        raise Untraceable(f"the operator {symbol} on tensors with elements has no fused form")
    return _unary("floor")(_div(x, other))


def _remainder(x: SymTensor, other: Any) -> SymTensor:
    return _sub(x, _binary("mul")(_floor_divide(x, other, "%"), other))


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
    return new(condition, "where", as_bool(condition), as_float(lift(run, a)), as_float(lift(run, b)))


STRUCTURAL_POWERS: dict[float, Callable[[SymTensor], SymTensor]] = {
    1: lambda x: x,
    2: lambda x: new(x, "mul", x, x),
    3: lambda x: new(x, "mul", new(x, "mul", x, x), x),
    0.5: lambda x: new(x, "sqrt", x),
    -0.5: lambda x: new(x, "div", x.run.constant(1.0), new(x, "sqrt", x)),
    -1: lambda x: new(x, "div", x.run.constant(1.0), x),
    -2: lambda x: new(x, "div", x.run.constant(1.0), new(x, "mul", x, x)),
}
"""Exponents that are structure, not slots: ``g**2`` as a general power is seventy times slower."""


def _pow(x: SymTensor, exponent: Any) -> SymTensor:
    x = as_float(x)
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
    filled = as_float(lift(x.run, value))
    if x.kind == "F":
        filled = expand(filled)
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
        return as_bool(x)
    if x.is_bool and dtype in FLOATS:
        return as_float(x)
    raise Untraceable(f"a cast to {dtype}; inside a callback tensors are {x.run.compute}")


def _clone(x: SymTensor, **_: Any) -> SymTensor:
    return SymTensor(x.run, x.node, x.asked)


def _whole(x: SymTensor, dims: tuple, kwargs: dict) -> SymTensor:
    """The operand of a reduction over everything, or Untraceable."""
    wanted = [d for d in (*dims, kwargs.get("dim")) if d is not None and d != ()]
    if wanted or kwargs.get("keepdim"):
        raise Untraceable("a reduction over some dimensions; whole-tensor reductions fuse")
    return as_float(x)


def _reduce(op: str) -> Callable[..., SymTensor]:
    def method(x: SymTensor, *dims: Any, **kwargs: Any) -> SymTensor:
        x = _whole(x, dims, kwargs)
        if x.kind == "S":
            return x
        return new(x, op, x)

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
        return _reduce("sum")(as_float(_binary("ne")(x, 0)))
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


# Elementwise ops of the table are methods of the same name; what torch spells otherwise follows.
METHODS |= {op.name: _unary(op.name) for op in OPS.values() if op.types == "f>f" and op.name != "expand"}
METHODS |= {op.name: _binary(op.name) for op in OPS.values() if op.types in ("ff>f", "ff>b")}
METHODS |= {name: _logical(name) for name in ("logical_and", "logical_or", "logical_xor", "logical_not")}
METHODS |= {f"bitwise_{name}": _bitwise(f"logical_{name}") for name in ("and", "or", "xor", "not")}
METHODS |= {name: _reduce(name) for name in OPS if is_reduction(name)}
METHODS |= {
    "add": _add,
    "sub": _sub,
    "rsub": lambda x, other: _sub(lift(x.run, other), x),
    "div": _div,
    "rdiv": lambda x, other: _div(lift(x.run, other), x),
    "floor_divide": _floor_divide,
    "rfloor_divide": lambda x, other: _floor_divide(lift(x.run, other), x),
    "remainder": _remainder,
    "rremainder": lambda x, other: _remainder(lift(x.run, other), x),
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
    "any": lambda x: as_bool(_reduce("amax")(as_float(as_bool(x)))),
    "all": lambda x: as_bool(_reduce("amin")(as_float(as_bool(x)))),
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
