"""What policies, and the callbacks that apply them, do to tensors: eager ones, and symbolic ones in a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..ir.ops import ELEMENT, OPS
from ..trace.signals import Unsuited, Untraceable
from ..trace.signature import CODES, HERE_IN_ORDER, LINE
from ..trace.tensor import FLOATS, METHODS, SymTensor, called

__all__ = [
    "add_bits",
    "block_amax",
    "cut",
    "joined",
    "low_bits",
    "near_root",
    "near_square",
    "rounded",
    "shortened",
    "split",
    "spread",
]
"""What policies may call besides torch; the rest is for the callbacks that apply policies."""


def _is_symbolic(x: Any) -> bool:
    return issubclass(type(x), SymTensor)


def _op(name: str, x: Any, *args: Any) -> Any:
    if _is_symbolic(x):
        return called(name, METHODS[name], x, *args)
    if hasattr(x, "placements"):  # torch sees no bits of a DTensor
        here = [a.to_local() if hasattr(a, "placements") else a for a in args]
        return part_of(_op(name, x.to_local(), *here), x)
    other = [a if isinstance(a, torch.Tensor) else torch.full_like(x, a) for a in args]
    return OPS[name].torch(x, *other)


def put(p: Any, data: Any) -> None:
    """``p.data = data``, and of a DTensor what it has its elements in, which that leaves as it is."""
    p.data = data
    if isinstance(data, torch.Tensor) and hasattr(data, "_local_tensor"):
        p._local_tensor, p._spec = data._local_tensor, data._spec  # type: ignore[attr-defined]


def part_of(local: torch.Tensor, like: Any) -> Any:
    """What is here of a DTensor that is spread as another one, if that is one."""
    if not hasattr(like, "placements"):
        return local
    shape = {"shape": like.shape, "stride": like.stride()}
    return type(like).from_local(local, like.device_mesh, like.placements, run_check=False, **shape)


def add_bits(x: Any, n: Any) -> Any:
    """The numbers whose bits, as integers, are those of the float32 numbers x and n more; n are whole numbers."""
    return _op("add_bits", x, n)


def low_bits(x: Any) -> Any:
    """The lower 16 bits of the float32 numbers x, as numbers from -2¹⁵ up to 2¹⁵ - 1."""
    return _op("low_bits", x)


def cut(x: Any) -> Any:
    """x without the lower 16 bits: a number of bfloat16 that is no larger in size."""
    return _op("high_bits", add_bits(x, -(2.0**15)))


def near_root(x: Any) -> Any:
    """Close to the root of x, within 6 %, for no more than an addition costs; `near_square` undoes it.

    Of infinity it is 2⁶⁴, of NaN more; of negative numbers it means nothing.
    """
    return _op("near_root", x)


def near_square(x: Any) -> Any:
    """Close to the square of x, with its sign: what `near_root` has made root of, but for its last bit."""
    return _op("near_square", x)


def shortened(x: Any) -> Any:
    """x, rounded to 16 significant bits (Veltkamp's splitting), so that its product with one of 8 is exact."""
    more = x * 257.0
    return more - (more - x)


def rounded(x: Any, dtype: torch.dtype, noise: Any = None) -> Any:
    """x as bfloat16 or float16 has it, in its own dtype: to the nearest number, or by ``noise`` to one of the two
    beside it, to each as often as x is near it, so that on average it is x."""
    name = str(dtype).removeprefix("torch.")
    return _op(f"to_{name}", x) if noise is None else _op(f"{name}_at_random", x, noise)


def split(x: Any) -> tuple[Any, Any]:
    """x as the nearest number that bfloat16 has, and what its bits are more than that: see `joined`.

    Of two numbers that are as near it is the one that is further from zero.
    """
    return torch.where(x == x, _op("high_bits", x), float("nan")), torch.where(x == x, low_bits(x), 0.0)


joined = add_bits
"""What `split` has parted."""


def block_amax(x: Any, block: int, signed: bool = True) -> Any:
    """The largest size in x of each block of so many neighbouring elements, the last of which may be shorter.

    signed: else NaN where one is negative

    Raises RuntimeError for a DTensor. (Untraceable, within a trace, has the callback run eagerly.)
    """
    if not _is_symbolic(x):
        if hasattr(x, "placements"):
            raise RuntimeError(
                "blocks of a DTensor, whose callbacks run eagerly; opt.explain() says why. Remedy: a policy of storage "
                "without blocks, such as bf16+8"
            )
        flat = (x.abs() if signed else torch.where(x.signbit(), float("nan"), x)).reshape(-1)
        left = -flat.numel() % block
        return torch.cat([flat, flat.new_zeros(left)]).view(-1, block).amax(1)
    _in_blocks(run := x.run, block)
    return SymTensor(
        run,
        run.graph.op("absmax" if signed else "bitmax", x.node, to=run.signature.blocks, where=run.where),
        x.asked,
    )


def _in_blocks(run: Any, block: int) -> None:
    """See to it that the lines of a trace's program are blocks of so many elements."""
    run.attribute(ELEMENT, f"{LINE}{block}")
    line = run.signature.line  # see Signature.resolved
    if line != block:
        error = run.signature.unsuited(run.callback)
        if line:
            error = Unsuited(
                f"blocks of {block} and of {line} elements in one rule",
                "choose policies with blocks of one size for all state of a parameter",
            )
        error.of, error.blocks = run.callback, True
        raise error
    if run.attribute(ELEMENT, HERE_IN_ORDER) is None:
        raise Untraceable("blocks of a tensor whose memory is elsewhere")


@contextmanager
def constants(x: Any) -> Iterator[None]:
    """Within it plain numbers are part of x's program. As scalars they would be given to each of its kernels anew."""
    if not _is_symbolic(x):
        yield
        return
    before, x.run.constants = x.run.constants, True
    try:
        yield
    finally:
        x.run.constants = before


def spread(scale: Any, x: Any, block: int) -> Any:
    """One number of each block, of ``scale``, as one for each element of x."""
    if _is_symbolic(scale):
        _in_blocks(scale.run, block)
        return scale
    return scale.repeat_interleave(block)[: x.numel()].view(x.shape)


def stored_as(x: Any, dtype: torch.dtype) -> Any:
    """x, to be stored in this dtype."""
    if _is_symbolic(x):
        return SymTensor(x.run, x.node, dtype, x.shown)
    out = x.clone()
    out._fusedopt_asked = dtype
    return out


def as_number(x: Any, like: Any) -> Any:
    """A stored tensor in the compute type."""
    if _is_symbolic(x):
        return SymTensor(x.run, x.node, like.asked, x.shown)
    return x.to(like.dtype)


def fewer(p: Any, count: int) -> bool:
    """Whether a parameter has fewer elements."""
    return bool(count) and (
        p.run.attribute(ELEMENT, f"fewer:{count}") if _is_symbolic(p) else p.numel() < count
    )


def is_whole(p: Any, x: Any) -> bool:
    """Whether it is a tensor of floats, or codes, with a number for each of the parameter's elements."""
    if _is_symbolic(x):
        return x.kind == ELEMENT and not x.is_bool and x.shown is None
    return isinstance(x, torch.Tensor) and x.shape == p.shape and x.dtype in (*FLOATS, *CODES) and x.dim() > 0


def dtype_of(p: Any) -> torch.dtype:
    """The dtype of the user's parameter."""
    if _is_symbolic(p):
        signature = p.run.signature
        return signature.asked[0] if signature.asked else signature.param
    return getattr(p, "_fusedopt_asked", p.dtype)


def is_zero_dim(p: Any) -> bool:
    return p.run.signature.zero_dim if _is_symbolic(p) else p.dim() == 0


def is_narrow(p: Any) -> bool:
    """Whether it is computed in float32."""
    return (p.run.compute if _is_symbolic(p) else p.dtype) == torch.float32
