"""Torch calls between fused programs in a class's step: those that have no fused form (see ``trace.externs``).

A tensor of the shadow that meets such a call enters a world of real tensors, in the dtype that it has in torch; what
is done to it there is recorded. Where it meets elements of the parameter again, and has their dtype, it leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..ir.ops import TENSOR
from ..trace.externs import STARTERS as MATRIX_FUNCTIONS
from ..trace.externs import Constant, ExternTensor, Spot, dispatch, enter, leave, shown_of
from ..trace.number import Number
from ..trace.run import Run
from ..trace.signals import Mismatched, Untraceable
from ..trace.tensor import FLOATS, METHODS, SymTensor
from .sums import Elements, of_step, settled
from .symbolic import Symbolic, TensorNumber, made, place

STARTERS = MATRIX_FUNCTIONS | frozenset(
    """
    index_select gather take_along_dim narrow select tensor_split split chunk unfold searchsorted bucketize cdist
    softmax log_softmax logsumexp std_mean var_mean aminmax repeat_interleave tile repeat
    eigh eigvalsh svdvals inv solve pinv solve_triangular triangular_solve lstsq matrix_norm lu_factor cond
    transpose_ t_ swapaxes_ swapdims_ index_add index_copy scatter scatter_add
    """.split()  # noqa: SIM905
)
"""Functions that a tensor of fused programs enters for."""
_RESHAPES = frozenset(["transpose_", "t_", "swapaxes_", "swapdims_", "unsqueeze_", "squeeze_"])
_CASTS = frozenset(["to", "type", "type_as", "float", "double", "half", "bfloat16", "bool", "int", "long"])
_ATTRIBUTES = {name: getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}


def calls(name: str, base: str, tensors: list[Symbolic], target: Any) -> bool:
    """Whether this is a torch call: it has no fused form, or is of tensors that fused programs do not have.

    target: what is written to in place, or None
    """
    externs = [x for x in tensors if x.ext is not None or x.constant is not None]
    if not externs:
        starts = name in STARTERS or base in STARTERS
        return starts and base not in METHODS and any(map(_has_elements, tensors))
    if name in ("stack", "cat") and all(x.numel() == 1 for x in tensors):
        return False
    if base not in METHODS or base in _CASTS or any(x is target for x in externs):
        return True
    return not (any(map(_has_elements, tensors)) and all(map(fits, externs)))


def outer(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Two matrices whose product has sums of one term each: that of their elements, broadcast. None if they are not."""
    if name not in ("matmul", "mm", "__matmul__", "__rmatmul__") or kwargs or len(args) != 2:
        return None
    a, b = args[::-1] if name == "__rmatmul__" else args
    if not all(
        type(x) is Symbolic and x.ext is None and x.sym is not None and x.meta.dim() >= 2 for x in (a, b)
    ):
        return None
    return (a, b) if a.meta.shape[-1] == b.meta.shape[-2] == 1 and a.meta.dtype == b.meta.dtype else None


def in_dtype(x: Symbolic, dtype: torch.dtype) -> Symbolic:
    """What torch calls give in this dtype, where fused programs do not have its own."""
    if x.ext is None or fits(x) or x.meta.dtype == dtype:
        return x
    return wrapped(dispatch(x.ext.run, torch.Tensor.to, (x.ext, dtype), {}))


def _has_elements(x: Symbolic) -> bool:
    return x.sym is not None and not of_step(x.sym) and x.sym.kind != TENSOR


def fits(x: Symbolic) -> bool:
    """Whether it may be a value of fused programs."""
    if x.ext is None:
        return False
    dtype, compute = x.meta.dtype, x.ext.run.compute
    narrow = dtype != torch.float64 or compute == dtype or x.meta.numel() == 1
    return narrow and (dtype in FLOATS or dtype == torch.bool) and shown_of(x.ext) is not None


def left(x: Any) -> Any:
    """A tensor as one of fused programs."""
    if type(x) is not Symbolic or x.ext is None:
        return x
    if not fits(x):
        error = Mismatched(
            f"a {x.meta.dtype} tensor of shape {list(x.meta.shape)} meets the parameter's elements"
        )
        error.of, error.matrix = x.ext.run.callback, True
        raise error
    return made(leave(x.ext), x.meta)


def wrapped(x: ExternTensor) -> Symbolic:
    """As the class sees it."""
    return made(None, x.meta, ext=x)


def entered(x: Symbolic) -> ExternTensor:
    """A tensor of fused programs, as a real one."""
    if x.ext is not None:
        return x.ext
    sym = x.__dict__["sym"] = settled(place(x))
    if type(sym.run) is not Elements:
        raise Untraceable("a torch call of a tensor that belongs to no parameter")
    out = enter(sym, None if sym.is_bool else x.meta.dtype)
    if out.meta.shape == x.meta.shape:
        return out
    seen: ExternTensor = dispatch(sym.run, torch.Tensor.reshape, (out, tuple(x.meta.shape)), {})
    return seen


def run_of(tensors: list[Symbolic]) -> Elements:
    """The run of the only parameter that these belong to."""
    found = [t.ext if t.ext is not None else settled(t.sym) for t in tensors]
    runs = {id(x.run): x.run for x in found if x is not None and not of_step(x)}
    if len(runs) != 1:
        raise Untraceable("a torch call mixes parameters")
    (run,) = runs.values()
    assert isinstance(run, Elements)
    return run


def of_one(tensors: list[Symbolic]) -> bool:
    """Whether all of them belong to one parameter."""
    found = [t.ext if t.ext is not None else t.sym for t in tensors]
    return len({id(x.run) for x in found if x is not None}) == 1


def is_matrix(x: Any) -> bool:
    return (
        type(x) is Symbolic
        and x.dim() == 2
        and (x.ext is not None or (x.sym is not None and not of_step(x.sym)))
    )


def copied(x: ExternTensor) -> ExternTensor:
    """The same values somewhere else."""
    return ExternTensor(x.run, Spot(x.spot.ref, x.spot.asked))


def recorded(
    name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], tensors: list[Symbolic]
) -> Any:
    """What a torch call gives."""
    run, x = run_of(tensors), args[0]

    def given(a: Any) -> Any:
        if type(a) in (list, tuple):
            return type(a)(map(given, a))
        if type(a) is TensorNumber:
            return _number(run, a.sym)
        if type(a) is not Symbolic:
            return a
        if a.parts is not None:
            raise Untraceable(f"torch.{name} mixes parameters")
        if a.constant is not None:
            return constant(run, a.constant)
        return _filled(run, a) if a.number is not None else entered(a)

    if name == "cpu" and run.device.type == "cpu":
        return wrapped(x.ext.data)
    if name in _RESHAPES:
        return _turned(name, run, x, args[1:])
    if name in ("__matmul__", "__rmatmul__"):
        func, args = torch.matmul, args[::-1] if name == "__rmatmul__" else args
    elif func.__name__.startswith("__") and hasattr(torch.Tensor, name):
        func = getattr(torch.Tensor, name)
    if name in _OF_OTHERS:
        func, args = getattr(torch.Tensor, name.removesuffix("_as")), (x, tuple(args[1].meta.shape))
    if name in ("type", "type_as"):
        func, args = torch.Tensor.to, (x, args[1].dtype if name == "type_as" else args[1])
    if name == "copy_":  # which is no view of what it is a copy of
        args = (x, _function_of(torch.Tensor.clone, run, given(args[1])))
    result = dispatch(
        run, _ATTRIBUTES.get(name, func), given(tuple(args)), {k: given(v) for k, v in kwargs.items()}
    )
    if isinstance(x, Symbolic) and x.ext is result:
        return x
    return _all_wrapped(result)


_OF_OTHERS = frozenset(["view_as", "reshape_as", "expand_as"])


def _function_of(function: Callable[..., Any], run: Run, x: Any) -> Any:
    return dispatch(run, function, (x,), {}) if type(x) is ExternTensor else x


def _all_wrapped(x: Any) -> Any:
    if isinstance(x, (tuple, list)):
        parts = map(_all_wrapped, x)
        return type(x)(parts) if type(x) in (tuple, list) or not hasattr(x, "_make") else type(x)(*parts)
    return wrapped(x) if type(x) is ExternTensor else x


def _number(run: Elements, sym: SymTensor) -> ExternTensor:
    """A number that was read from a tensor, as a tensor: in float64, which makes no other tensor wider."""
    sym = settled(sym)
    if sym.run is not run:
        raise Untraceable("a torch call mixes parameters")
    return enter(sym)


def _filled(run: Elements, x: Symbolic) -> Any:
    """A tensor of one number of the host."""
    if x.meta.numel() == 1 and not x.meta.dim() and isinstance(x.number, (int, float)):
        return x.number
    if type(x.number) is Number or not isinstance(x.number, (int, float, bool)):
        raise Untraceable("a torch call of a tensor of numbers of the host")
    return constant(run, torch.full(x.meta.shape, x.number, dtype=x.meta.dtype, device=run.device))


def constant(run: Elements, x: torch.Tensor) -> ExternTensor:
    """One made of nothing but constants, as it is now."""
    return ExternTensor(run, Spot(Constant(x.clone()), None))


def _turned(name: str, run: Elements, x: Symbolic, args: Any) -> Symbolic:
    """``x.transpose_(0, 1)``: another shape of the same tensor, which nobody may know by its old one."""
    turn: Callable[..., Any] = getattr(torch.Tensor, name.removesuffix("_"))
    meta = turn(x.meta, *args)
    if meta.shape == x.meta.shape and meta.stride() == x.meta.stride():
        return x
    if x.ext is None:
        raise Untraceable(f"Tensor.{name} of a tensor of fused programs")
    out = wrapped(dispatch(run, turn, (x.ext, *args), {}))
    x.__dict__.update(ext=None, why=f"a tensor that Tensor.{name} has turned is used by its old shape")
    return out


def write(to: Symbolic, value: Symbolic) -> None:
    """``to.copy_(value)``, where one of them is of torch calls."""
    if to.ext is not None:
        given = entered(value)
        if value.ext is None:  # whose memory it stays
            given = _function_of(torch.Tensor.clone, to.ext.run, given)
        dispatch(to.ext.run, torch.Tensor.copy_, (to.ext, given), {})
        return
    assert value.ext is not None
    if to.hosted or to.parts is not None or to.number is None:
        raise Untraceable("a tensor of the optimizer itself gets a matrix")
    source = value.ext
    if source.meta.shape != to.meta.shape:
        source = dispatch(source.run, torch.Tensor.expand, (source, tuple(to.meta.shape)), {})
    if source.meta.dtype != to.meta.dtype:
        source = dispatch(source.run, torch.Tensor.to, (source, to.meta.dtype), {})
    if source is value.ext:
        source = copied(source)
    to.__dict__.update(ext=source, number=None)
