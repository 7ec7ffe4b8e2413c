"""The op table: every operation of the IR, once, with its meaning in each language.

The tracer, the interpreter, the verifier, the renderers and whoever joins part results walk this table. A new op is a
row; a new language is a column.

``types`` reads like a signature: ``"ff>b"`` takes two floats and gives a bool. Floats have the program's compute
type (float32, or float64 when a buffer is float64); there are no integers among element values.

The C++ column serves CUDA too. In it, ``::f(...)`` is the C library's ``f``, of floats or of doubles. What Triton has
in no form that is accurate and that its interpreter knows is written out in its skeleton; a power in float64 is not,
and its backend then leaves the program to another.

NaN rules are torch's: ``maximum``, ``minimum`` and the clamps built from them return NaN when either side is NaN,
``sign`` of NaN is zero, comparisons with NaN are false except ``ne``. ``expand`` makes one number per element of one
per tensor (``zeros_like``); it costs nothing. ``to_bfloat16`` and ``to_float16`` round to what such a tensor holds.
The bits of a float32 are an integer: ``add_bits`` adds a whole number to it, ``low_bits`` is its lower half, from -2¹⁵
up to 2¹⁵ - 1, and ``high_bits`` what is left without that. ``bfloat16_at_random`` and its like round to one of the two
nearest, as noise from 1 up to 2 says. ``near_root`` is a function close to the root (within 6 %), made of the bits:
half the exponent, and between powers of four a straight line; of negative numbers it means nothing.
``near_square`` has the number's sign and undoes it, but for the last bit. ``absmax`` is the largest size, ``bitmax``
the largest of numbers none of which is negative: else it is NaN, or one of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import random

ELEMENT, TENSOR = "F", "S"
"""The kinds of values, as programs print them: one number per element, and one per tensor. Between the two are those
of a tensor with several axes: one number for each place along some of them, printed as their numbers. Of a matrix "0"
is one number per row, "1" one per column."""


def is_partial(kind: str) -> bool:
    """Whether it is one number for each place along some axes, not along all of them."""
    return kind not in (ELEMENT, TENSOR)


def axes_of(kind: str, axes: str) -> str:
    """The axes along which a kind has numbers, of those that there are."""
    return axes if kind == ELEMENT else "" if kind == TENSOR else kind


def kind_of(kept: Iterable[str], axes: str) -> str:
    """The kind that has numbers along these axes."""
    kept = "".join(sorted(set(kept)))
    return TENSOR if not kept else ELEMENT if kept == axes else kept


@dataclass(frozen=True)
class Op:
    """An elementwise operation: its types, its eager torch meaning, and its spelling in C++ and in Triton.

    triton: None if it has none; ``triton_double`` is whether that is accurate in float64 too
    bits: whether it computes with the bits of floats, as integers
    """

    name: str
    types: str
    torch: Callable[..., Any]
    cpp: str
    triton: str | None = None
    triton_double: bool = True
    bits: bool = False

    @property
    def arity(self) -> int:
        return self.types.index(">")

    @property
    def result(self) -> str:
        return self.types[-1]


@dataclass(frozen=True)
class Reduction:
    """A reduction of all elements to one float per tensor, or along some axes to one for each place along the others.

    Partial results are doubles, one per chunk, joined in chunk order. ``init`` and ``join`` spell the monoid, in C++
    and Triton alike; ``numpy`` is that join on the host, for parts from several processes; ``torch`` is the meaning,
    computed in double.

    triton: joins a block of numbers; None: by ``join``
    averaged: whether the result is divided by the element count
    exact: whether it is the same in any order, and needs no double
    """

    name: str
    torch: Callable[[torch.Tensor], torch.Tensor]
    numpy: np.ufunc
    init: str
    join: str
    triton: str | None = None
    averaged: bool = False
    exact: bool = False

    types = "f>f"
    arity = 1
    result = "f"


def _maximum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of two equal numbers the second. Of two zeros ``torch.maximum`` gives either, by their place in the tensor."""
    return torch.where((a > b) | (a != a), a, b)


def _minimum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where((a < b) | (a != a), a, b)


def _fmod(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Exact. On CPU ``torch.fmod`` of a long tensor is NaN where the quotient is beyond the largest number."""
    if a.device.type != "cpu":
        return torch.fmod(a, b)
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.fmod(a.detach().numpy(), b.detach().numpy())))


def _rounded_to(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.to(torch.float32).to(dtype).to(x.dtype)


ROOT_OF_ZERO = 0x1FC00000
"""The bits of what ``near_root`` makes of zero."""


def _add_bits(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    return (_bits(x) + n.to(torch.int32)).view(torch.float32).to(x.dtype)


def _low_bits(x: torch.Tensor) -> torch.Tensor:
    return (_bits(x) << 16 >> 16).to(x.dtype)


def _high_bits(x: torch.Tensor) -> torch.Tensor:
    bits = _bits(x)
    return (bits - (bits << 16 >> 16)).view(torch.float32).to(x.dtype)


def _near_root(x: torch.Tensor) -> torch.Tensor:
    return ((_bits(x) >> 1 & 0x7FFFFFFF) + ROOT_OF_ZERO).view(torch.float32).to(x.dtype)


def _near_square(x: torch.Tensor) -> torch.Tensor:
    bits = _bits(x)
    square = ((bits & 0x7FFFFFFF).clamp(min=ROOT_OF_ZERO) - ROOT_OF_ZERO) << 1
    return (square | (bits & -0x80000000)).view(torch.float32).to(x.dtype)


def _absmax(x: torch.Tensor, **along: Any) -> torch.Tensor:
    return torch.amax(x.abs(), **along)


def _bitmax(x: torch.Tensor, **along: Any) -> torch.Tensor:
    return torch.amax(torch.where(x.signbit(), math.nan, x), **along)


def _bfloat16_at_random(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    moved = (_bits(x) + (_bits(noise) >> 7 & 0xFFFF)) & ~0xFFFF
    return torch.where(x.float().isfinite(), moved.view(torch.float32).to(x.dtype), x)


def _float16_at_random(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Normal numbers have 13 bits less than those of float32; those below 2⁻¹⁴ are multiples of 2⁻²⁴."""
    moved = (_bits(x) + (_bits(noise) >> 10 & 0x1FFF)) & ~0x1FFF
    small = (x.float() * 2.0**24 + (noise.float() - 1)).floor() * 2.0**-24
    found = torch.where(x.abs() < 2.0**-14, small, moved.view(torch.float32)).to(x.dtype)
    return torch.where(x.float().isfinite(), found, x)


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32).contiguous().view(torch.int32)


def _called(f: Callable[..., torch.Tensor], arguments: str) -> Op:
    """An op on bits, which every language has a function of the same name for."""
    name = f.__name__.removeprefix("_")
    call = f"{name}({arguments})"
    return Op(name, f"{'f' * arguments.count('{')}>f", f, call, call, bits=True)


def _unary(name: str, cpp: str, triton: str | None = None) -> Op:
    return Op(name, "f>f", getattr(torch, name), cpp, triton)


def _infix(name: str, types: str, symbol: str) -> Op:
    return Op(name, types, getattr(torch, name), f"{{0}} {symbol} {{1}}", f"{{0}} {symbol} {{1}}")


def _compare(name: str, symbol: str) -> Op:
    return Op(name, "ff>b", getattr(torch, name), f"({{0}} {symbol} {{1}})", f"{{0}} {symbol} {{1}}")


OPS: dict[str, Op | Reduction] = {
    op.name: op
    for op in (
        _infix("add", "ff>f", "+"),
        _infix("sub", "ff>f", "-"),
        _infix("mul", "ff>f", "*"),
        Op("div", "ff>f", torch.div, "{0} / {1}", "div({0}, {1})"),
        Op("pow", "ff>f", torch.pow, "::pow({0}, {1})", "pow({0}, {1})", triton_double=False),
        Op("fmod", "ff>f", _fmod, "::fmod({0}, {1})", "fmod({0}, {1})"),
        Op("atan2", "ff>f", torch.atan2, "::atan2({0}, {1})", "atan2({0}, {1})"),
        Op("copysign", "ff>f", torch.copysign, "::copysign({0}, {1})", "copysign({0}, {1})"),
        Op("maximum", "ff>f", _maximum, "maximum({0}, {1})", "maximum({0}, {1})"),
        Op("minimum", "ff>f", _minimum, "minimum({0}, {1})", "minimum({0}, {1})"),
        _unary("neg", "-{0}", "{0} * -1.0"),
        _unary("abs", "::fabs({0})", "tl.abs({0})"),
        _unary("sign", "sign({0})", "sign({0})"),
        Op("sqrt", "f>f", random.root, "::sqrt({0})", "sqrt({0})"),
        _unary("exp", "::exp({0})", "exp({0})"),
        _unary("expm1", "::expm1({0})", "expm1({0})"),
        _unary("log", "::log({0})", "tl.log({0})"),
        _unary("log1p", "::log1p({0})", "log1p({0})"),
        _unary("log2", "::log2({0})", "tl.log2({0})"),
        _unary("sin", "::sin({0})", "tl.sin({0})"),
        _unary("cos", "::cos({0})", "tl.cos({0})"),
        _unary("tanh", "::tanh({0})", "tanh({0})"),
        _unary("atan", "::atan({0})", "atan({0})"),
        _unary("erf", "::erf({0})", "tl.erf({0})"),
        _unary("floor", "::floor({0})", "tl.floor({0})"),
        _unary("ceil", "::ceil({0})", "tl.ceil({0})"),
        _unary("trunc", "::trunc({0})", "trunc({0})"),
        _unary("round", "::nearbyint({0})", "nearbyint({0})"),
        _compare("gt", ">"),
        _compare("ge", ">="),
        _compare("lt", "<"),
        _compare("le", "<="),
        _compare("eq", "=="),
        _compare("ne", "!="),
        Op("logical_and", "bb>b", torch.logical_and, "({0} & {1})", "{0} & {1}"),
        Op("logical_or", "bb>b", torch.logical_or, "({0} | {1})", "{0} | {1}"),
        Op("logical_xor", "bb>b", torch.logical_xor, "({0} != {1})", "{0} ^ {1}"),
        Op("logical_not", "b>b", torch.logical_not, "(!{0})", "~{0}"),
        Op("where", "bff>f", torch.where, "({0} ? {1} : {2})", "tl.where({0}, {1}, {2})"),
        Op("expand", "f>f", lambda x: x, "{0}", "{0}"),
        Op("as_float", "b>f", lambda b: b.to(torch.get_default_dtype()), "({0} ? T(1) : T(0))", "{0}.to(T)"),
        Op("to_bfloat16", "f>f", _rounded_to(torch.bfloat16), "to_bfloat16({0})", "to_bfloat16({0})"),
        Op("to_float16", "f>f", _rounded_to(torch.float16), "to_float16({0})", "to_float16({0})"),
        _called(_add_bits, "{0}, {1}"),
        _called(_low_bits, "{0}"),
        _called(_high_bits, "{0}"),
        _called(_bfloat16_at_random, "{0}, {1}"),
        _called(_float16_at_random, "{0}, {1}"),
        _called(_near_root, "{0}"),
        _called(_near_square, "{0}"),
        Reduction("sum", torch.sum, np.add, "0.0", "{0} + {1}", "tl.sum({0}, 0)"),
        Reduction("mean", torch.mean, np.add, "0.0", "{0} + {1}", "tl.sum({0}, 0)", averaged=True),
        Reduction("amax", torch.amax, np.maximum, "-infinity", "maximum({0}, {1})", exact=True),
        Reduction("absmax", _absmax, np.maximum, "0.0", "absmax({0}, {1})", exact=True),
        Reduction("bitmax", _bitmax, np.maximum, "0.0", "bitmax({0}, {1})", exact=True),
        Reduction("amin", torch.amin, np.minimum, "infinity", "minimum({0}, {1})", exact=True),
    )
}


@dataclass(frozen=True)
class Draw:
    """Random numbers, one per element: a function of a seed and a step (one number per tensor each), of the stream
    (attr: a whole number), of the parameter's place among all, and of the element's number in the parameter.

    ``torch`` is the meaning, for all elements of a tensor: ``(count, seed, step, stream, place)``. Every language has a
    function of the same name for one of them; how that is called is the renderers' part.
    """

    name: str
    torch: Callable[..., torch.Tensor]

    types = "ff>f"
    arity = 2
    result = "f"


DRAWS: dict[str, Draw] = {
    op.name: op
    for op in (
        Draw("uniform", random.uniform),
        Draw("normal", random.normal),
        Draw("noise", random.noise),
    )
}
"""What is random: see random.py, which says what it computes."""

LEAVES = ("load", "slot", "const", "numel")
"""Values without arguments: a buffer (attr: its name), a scalar slot (its index), a constant, the element count."""


def is_reduction(name: str) -> bool:
    """Whether the op turns many values into fewer."""
    return isinstance(OPS.get(name), Reduction)


def reduction(name: str) -> Reduction:
    op = OPS[name]
    assert isinstance(op, Reduction)
    return op


def op_of(name: str) -> Op | Reduction | Draw:
    return DRAWS[name] if name in DRAWS else OPS[name]


def result_kind(name: str, kinds: Iterable[str], to: Any = None, axes: str = "0") -> str:
    """A reduction gives one per tensor, ``expand`` one per element, or both what they say: ``to``. What is drawn is one
    per element.

    Any other op has numbers along all the axes that one of its arguments has: the kinds are a lattice, and this their
    join.
    """
    if is_reduction(name):
        return to or TENSOR
    if name == "expand":
        return to or ELEMENT
    if name in DRAWS:
        return ELEMENT
    kinds = list(kinds)
    return ELEMENT if ELEMENT in kinds else kind_of("".join(axes_of(k, axes) for k in kinds), axes)
