"""The methods of symbolic tensors: torch's functions in terms of the op table."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from ..ir.ops import OPS, TENSOR, Op, Reduction
from . import axes
from .axes import Dims
from .number import Number
from .signals import Untraceable
from .tensor import (
    FLOATS,
    METHODS,
    SOME_ELEMENTS,
    Shown,
    SymParameter,
    SymTensor,
    alias,
    along,
    as_bool,
    as_float,
    expand,
    is_extern,
    lift,
    new,
    plain,
)


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


_SCALES = {"add": (1, "alpha"), "sub": (1, "alpha"), "addcmul": (2, "value"), "addcdiv": (2, "value")}
"""What has a factor, which is no keyword and comes first in torch's deprecated signature, ``add(alpha, other)``, with
how many operands it has beside the tensor."""


def scale_last(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments, the tensor first, with a factor of the deprecated signature as the keyword that it is now."""
    operands, scale = _SCALES.get(name, (0, ""))
    if scale and len(args) == operands + 2 and scale not in kwargs:
        return (args[0], *args[2:]), kwargs | {scale: args[1]}
    return args, kwargs


def _scale_first(name: str, method: Callable[..., SymTensor]) -> Callable[..., SymTensor]:
    def either_way(*args: Any, **kwargs: Any) -> SymTensor:
        args, kwargs = scale_last(name, args, kwargs)
        return method(*args, **kwargs)

    return either_way


def _add(x: SymTensor, other: Any, *, alpha: Any = 1) -> SymTensor:
    return _binary("add")(x, _times(alpha, lift(x.run, other)))


def _sub(x: SymTensor, other: Any, *, alpha: Any = 1) -> SymTensor:
    return _binary("sub")(x, _times(alpha, lift(x.run, other)))


def _div(x: SymTensor, other: Any, *, rounding_mode: str | None = None) -> SymTensor:
    if rounding_mode == "floor":
        return _floor_divide(x, other)
    out = _binary("div")(x, other)
    return out if rounding_mode is None else _unary(rounding_mode)(out)


def _signs_differ(a: SymTensor, b: SymTensor) -> SymTensor:
    zero = a.run.constant(0.0)
    return _binary("ne")(_binary("lt")(a, zero), _binary("lt")(b, zero))


def _floor_divide(x: SymTensor, other: Any) -> SymTensor:
    """torch's, which is Python's: what is left is subtracted before dividing, as 1 // 0.1 is 9, and 1 / 0.1 is 10."""
    zero, one = x.run.constant(0.0), x.run.constant(1.0)
    other = as_float(lift(x.run, other))
    quotient = _div(x, other)
    left = _binary("fmod")(x, other)
    out = _div(_sub(x, left), other)
    below = METHODS["logical_and"](_binary("ne")(left, zero), _signs_differ(left, other))
    out = _where(below, _sub(out, one), out)
    whole = _unary("floor")(out)
    whole = _where(_binary("gt")(_sub(out, whole), x.run.constant(0.5)), _add(whole, one), whole)
    # A zero has the quotient's sign.
    whole = _where(_binary("eq")(out, zero), _binary("mul")(quotient, zero), whole)
    return _where(_binary("eq")(other, zero), quotient, whole)


def _remainder(x: SymTensor, other: Any) -> SymTensor:
    """torch's, which is Python's: it has the divisor's sign."""
    other = as_float(lift(x.run, other))
    left = _binary("fmod")(x, other)
    wrong = METHODS["logical_and"](_binary("ne")(left, x.run.constant(0.0)), _signs_differ(left, other))
    return _where(wrong, _add(left, other), left)


def _addcmul(x: SymTensor, a: Any, b: Any, *, value: Any = 1) -> SymTensor:
    return _add(x, _binary("mul")(_times(value, lift(x.run, a)), b))


def _addcdiv(x: SymTensor, a: Any, b: Any, *, value: Any = 1) -> SymTensor:
    return _add(x, _binary("div")(_times(value, lift(x.run, a)), b))


def _lerp(x: SymTensor, end: Any, weight: Any) -> SymTensor:
    """torch's: from the start below weight ½, from the end above it, so that both ends are exact."""
    end, weight = lift(x.run, end), lift(x.run, weight)
    near = _binary("lt")(_unary("abs")(weight), x.run.constant(0.5))
    part = _where(near, weight, _sub(weight, x.run.constant(1.0)))
    return _add(_where(near, x, end), _binary("mul")(part, _sub(end, x)))


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


def _nan_to_num(x: SymTensor, nan: Any = 0.0, posinf: Any = None, neginf: Any = None) -> SymTensor:
    largest = torch.finfo(x.asked or x.dtype).max
    infinity = x.run.constant(float("inf"))
    out = _where(_binary("ne")(x, x), x.run.constant(0.0) if nan is None else nan, x)
    out = _where(_binary("eq")(x, infinity), x.run.constant(largest) if posinf is None else posinf, out)
    return _where(
        _binary("eq")(x, _unary("neg")(infinity)), x.run.constant(-largest) if neginf is None else neginf, out
    )


def _sigmoid(x: SymTensor) -> SymTensor:
    one = x.run.constant(1.0)
    return _div(one, _add(one, _unary("exp")(_unary("neg")(x))))


def _full_like(x: SymTensor, value: Any, *, dtype: torch.dtype | None = None, **_: Any) -> SymTensor:
    if dtype is not None and dtype not in FLOATS:
        raise Untraceable(f"a new tensor of {dtype}; fused state is floating point")
    filled = as_float(lift(x.run, value))
    if x.kind != TENSOR:
        filled = expand(filled, x)
    return SymTensor(x.run, filled.node, dtype or x.asked, x.shown)


def _constant_like(value: float) -> Callable[..., SymTensor]:
    return lambda x, **kwargs: _full_like(x, x.run.constant(value), **kwargs)


def _to(
    x: SymTensor,
    *args: Any,
    dtype: Any = None,
    device: Any = None,
    copy: bool = False,
    memory_format: Any = torch.preserve_format,
    non_blocking: bool = False,
) -> SymTensor:
    for a in args:
        if isinstance(a, torch.dtype):
            dtype = a
        elif isinstance(a, (str, torch.device)):
            device = a
        elif type(a) is not bool:
            dtype = a.asked if is_extern(a) else lift(x.run, a).asked or a.dtype
    if device is not None and torch.device(device) != x.run.device:
        raise Untraceable(f"a tensor is moved to {device}; its parameter is on {x.run.device}")
    if memory_format != torch.preserve_format:
        raise Untraceable(f"a tensor gets the layout {memory_format}")
    return _cast_to(x, dtype, copy or [a for a in args if type(a) is bool][1:] == [True])


def _cast_to(x: SymTensor, dtype: torch.dtype | None, copy: bool = False) -> SymTensor:
    """x in the dtype, which is x itself where it has it already, as the user sees it."""
    seen = torch.bool if x.is_bool else x.asked or x.dtype
    if dtype is None or dtype == seen:
        return _clone(x) if copy else alias(x)
    if dtype == torch.bool:
        return as_bool(x)
    if dtype == x.dtype or (x.is_bool and dtype in FLOATS):
        return SymTensor(x.run, as_float(x).node, dtype, x.shown)
    if x.run.calls is not None and dtype in FLOATS:
        return x.run.calls.cast(x, dtype)
    raise Untraceable(f"a cast to {dtype}; inside a callback tensors are {x.run.compute}")


def _contiguous(x: SymTensor, memory_format: Any = torch.contiguous_format) -> SymTensor:
    """x itself, or a copy of what is not."""
    contiguous = x.run.attribute(x.kind, "contiguous") if memory_format == torch.contiguous_format else None
    if contiguous is None:
        raise Untraceable("contiguous() of tensors with several layouts")
    return alias(x) if contiguous else _clone(x)


def _requires_grad(x: SymTensor, value: bool = True) -> SymTensor:
    if value or isinstance(x, SymParameter):
        raise Untraceable("requires_grad_() has no fused form")
    return x


def _clone(x: SymTensor, **_: Any) -> SymTensor:
    return SymTensor(x.run, x.node, x.asked, x.shown)


# ---- reductions, of all elements or along some dimensions ----------------------------------------------------------


def _left(x: SymTensor, dim: Any, keepdim: bool) -> Dims:
    """The dimensions that a reduction along ``dim`` leaves."""
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return tuple(() for _ in range(x.fact("ndim"))) if keepdim else ()
    which = dim if isinstance(dim, (tuple, list)) else [dim]
    return axes.reduced(x.dims, [operator.index(d) for d in which], keepdim)


def _reduce(op: str) -> Callable[..., SymTensor]:
    def method(
        x: SymTensor, dim: Any = None, keepdim: bool = False, *, axis: Any = None, dtype: Any = None
    ) -> SymTensor:
        dim = axis if dim is None else dim
        out = along(as_float(x), op, _left(x, dim, keepdim))
        return out if dtype is None else _cast_to(out, dtype)

    return method


def _norm(x: SymTensor, p: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> SymTensor:
    p = kwargs.pop("ord", p)
    p = 2 if p in ("fro", None) else p
    p = p.escape() if isinstance(p, Number) else p
    x = as_float(x)

    def total(x: SymTensor, op: str = "sum") -> SymTensor:
        return _reduce(op)(x, dim, keepdim)

    if p == float("inf"):
        return total(_unary("abs")(x), "amax")
    if p == float("-inf"):
        return total(_unary("abs")(x), "amin")
    if p == 1:
        return total(_unary("abs")(x))
    if p == 2:
        return _unary("sqrt")(total(STRUCTURAL_POWERS[2](x)))
    if p == 0:
        return total(as_float(_binary("ne")(x, 0)))
    return _pow(total(_pow(_unary("abs")(x), p)), 1 / p)


def _std(square_root: bool) -> Callable[..., SymTensor]:
    def method(
        x: SymTensor,
        dim: Any = None,
        unbiased: bool = True,
        keepdim: bool = False,
        *,
        correction: int | None = None,
    ) -> SymTensor:
        if isinstance(dim, bool):
            unbiased, dim = dim, None
        x = as_float(x)
        less = _sub(x, _reduce("mean")(x, dim, dim is not None))
        total = _reduce("sum")(STRUCTURAL_POWERS[2](less), dim, keepdim)
        correction = int(unbiased) if correction is None else correction
        if dim is None:
            count = SymTensor(x.run, x.run.graph.leaf("numel"), x.asked)
        else:
            count = lift(x.run, x.fact("count") // max(SymTensor.fact(total, "count"), 1))
        count = _sub(count, correction)
        return _unary("sqrt")(_div(total, count)) if square_root else _div(total, count)

    return method


def _any_all(op: str) -> Callable[..., SymTensor]:
    return lambda x, dim=None, keepdim=False: as_bool(_reduce(op)(as_float(as_bool(x)), dim, keepdim))


def _normalize(x: SymTensor, p: Any = 2.0, dim: Any = 1, eps: Any = 1e-12, out: None = None) -> SymTensor:
    """``torch.nn.functional.normalize``."""
    return _div(x, _clamp(_norm(x, p, dim, True), min=eps))


def _cosine_similarity(x: SymTensor, other: Any, dim: Any = 1, eps: Any = 1e-8) -> SymTensor:
    """``torch.nn.functional.cosine_similarity``: of vectors that are made unit vectors first."""
    units = [_div(v, _clamp(_norm(v, 2, dim, True), min=eps)) for v in (x, lift(x.run, other))]
    return _reduce("sum")(_binary("mul")(*units), dim)


# ---- the same elements in another shape ----------------------------------------------------------------------------


def seen(x: SymTensor, shown: Shown) -> SymTensor:
    """The same elements with other dimensions."""
    view = alias(x)
    view.__dict__["shown"] = plain(x.run, x.node, shown)
    return view


def _unsqueeze(x: SymTensor, dim: Any) -> SymTensor:
    dims = list(x.dims)
    dims.insert(axes.positive(operator.index(dim), len(dims) + 1), ())
    return seen(x, tuple(dims))


def _getitem(x: SymTensor, index: Any) -> SymTensor:
    """All elements, with new dimensions of length 1 where the index is None."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(part, SymTensor) for part in parts):
        raise Untraceable("some elements are taken, by a mask", SOME_ELEMENTS)
    if any(part is not None and part is not Ellipsis and part != slice(None) for part in parts):
        x._refuse()
    left = list(x.dims)
    rest = len(left) - sum(part == slice(None) for part in parts if part is not None)
    out: list[tuple[int, ...]] = []
    for part in parts:
        count = 1 if part is not Ellipsis else rest
        out += [()] if part is None else [left.pop(0) for _ in range(count)]
    return seen(x, (*out, *left))


def _squeeze(x: SymTensor, dim: Any = None) -> SymTensor:
    if dim is None:
        return seen(x, tuple(group for group in x.dims if group))
    which = [axes.positive(d, len(x.dims)) for d in (dim if isinstance(dim, (tuple, list)) else [dim])]
    return seen(x, tuple(group for d, group in enumerate(x.dims) if group or d not in which))


def _view(x: SymTensor, *shape: Any) -> SymTensor:
    if shape and isinstance(shape[0], torch.dtype):
        raise Untraceable("a tensor's memory is seen as another type")
    wanted = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    return seen(x, axes.regrouped(x.dims, x.run.lengths(), [operator.index(n) for n in wanted]))


def _flatten(x: SymTensor, start_dim: int = 0, end_dim: int = -1) -> SymTensor:
    shape = list(x.fact("shape")) or [1]
    first, last = axes.positive(start_dim, len(shape)), axes.positive(end_dim, len(shape))
    return _view(x, *shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :])


def _expand_as(x: SymTensor, other: SymTensor) -> SymTensor:
    """x beside the other: whatever takes both broadcasts it."""
    axes.broadcast(x.dims, lift(x.run, other).dims)
    return x


def _max_min(pair: str, whole: str) -> Callable[..., Any]:
    def method(x: SymTensor, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], (SymTensor, Number)):
            return _binary(pair)(x, args[0])
        result = _reduce(whole)(x, *args, **kwargs)
        return Extreme((result, None)) if args or "dim" in kwargs else result

    return method


class Extreme(tuple[Any, ...]):
    """What ``max(dim)`` gives: values, and where they are, which no kernel says."""

    values = property(operator.itemgetter(0))

    def __getitem__(self, i: Any) -> Any:
        if i != 0:
            raise Untraceable("where a tensor is largest or smallest has no fused form")
        return super().__getitem__(0)

    def __iter__(self) -> Any:
        raise Untraceable("where a tensor is largest or smallest has no fused form")

    indices = property(lambda self: self[1])


def _cast(dtype: torch.dtype) -> Callable[..., SymTensor]:
    return lambda x, memory_format=torch.preserve_format: _to(x, dtype, memory_format=memory_format)


def method(op: Op | Reduction) -> Callable[..., SymTensor]:
    """The method that is one op of the table."""
    if isinstance(op, Reduction):
        return _reduce(op.name)
    made = {"f>f": _unary, "ff>f": _binary, "ff>b": _binary, "b>b": _logical, "bb>b": _logical}
    return made[op.types](op.name)


_NO_METHODS = ("expand", "as_float", "where", "to_bfloat16", "to_float16")
# Ops of the table are methods of the same name; what torch spells otherwise follows.
METHODS |= {op.name: method(op) for op in OPS.values() if op.name not in _NO_METHODS}
METHODS |= {f"bitwise_{name}": _bitwise(f"logical_{name}") for name in ("and", "or", "xor", "not")}
METHODS |= {
    "add": _scale_first("add", _add),
    "sub": _scale_first("sub", _sub),
    "rsub": lambda x, other: _sub(lift(x.run, other), x),
    "div": _div,
    "rdiv": lambda x, other: _div(lift(x.run, other), x),
    "floor_divide": _floor_divide,
    "rfloor_divide": lambda x, other: _floor_divide(as_float(lift(x.run, other)), x),
    "remainder": _remainder,
    "rremainder": lambda x, other: _remainder(as_float(lift(x.run, other)), x),
    "addcmul": _scale_first("addcmul", _addcmul),
    "addcdiv": _scale_first("addcdiv", _addcdiv),
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
    "nan_to_num": _nan_to_num,
    "softplus": _softplus,
    "where": lambda x, condition, other: _where(condition, x, other),
    "masked_fill": lambda x, mask, value: _where(mask, value, x),
    "add_bits": _binary("add_bits"),
    "low_bits": _unary("low_bits"),
    "copysign": _binary("copysign"),
    "near_root": _unary("near_root"),
    "near_square": _unary("near_square"),
    "high_bits": _unary("high_bits"),
    "bfloat16_at_random": _binary("bfloat16_at_random"),
    "float16_at_random": _binary("float16_at_random"),
    "to_bfloat16": _unary("to_bfloat16"),
    "to_float16": _unary("to_float16"),
    "isnan": lambda x: _binary("ne")(x, x),
    "isfinite": lambda x: _binary("lt")(_unary("abs")(x), x.run.constant(float("inf"))),
    "isinf": lambda x: _binary("eq")(_unary("abs")(x), x.run.constant(float("inf"))),
    "max": _max_min("maximum", "amax"),
    "min": _max_min("minimum", "amin"),
    "norm": _norm,
    "vector_norm": _norm,
    "std": _std(True),
    "var": _std(False),
    "any": _any_all("amax"),
    "all": _any_all("amin"),
    "normalize": _normalize,
    "cosine_similarity": _cosine_similarity,
    "__getitem__": _getitem,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "view": _view,
    "reshape": _view,
    "flatten": _flatten,
    "view_as": lambda x, other: _view(x, *other.shape),
    "reshape_as": lambda x, other: _view(x, *other.shape),
    "expand_as": _expand_as,
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
    "detach": alias,
    "contiguous": _contiguous,
    "to": _to,
    "type_as": lambda x, other: _to(x, other),
    "float": _cast(torch.float32),
    "double": _cast(torch.float64),
    "half": _cast(torch.float16),
    "bfloat16": _cast(torch.bfloat16),
    "bool": _cast(torch.bool),
    "size": lambda x, dim=None: x.fact("shape") if dim is None else x.fact("shape")[dim],
    "dim": lambda x: x.fact("ndim"),
    "numel": lambda x: x.fact("count"),
    "nelement": lambda x: x.fact("count"),
    "is_floating_point": lambda x: not x.is_bool,
    "is_complex": lambda x: False,
    "element_size": lambda x: x.itemsize,
    "requires_grad": _requires_grad,
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
