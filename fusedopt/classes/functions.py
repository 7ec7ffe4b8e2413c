"""Torch's functions on symbolic tensors: what each gives, as far as it has a fused form.

Dtypes and shapes come from the same function on meta tensors, which also raises torch's own errors; values come from
the table of methods that callbacks have (``trace.methods``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..ir.ops import ELEMENT, TENSOR
from ..ir.program import Buffer
from ..trace.axes import Dims, regrouped, sizes
from ..trace.methods import Extreme, scale_last, seen
from ..trace.number import Number
from ..trace.run import Run
from ..trace.signals import Untraceable
from ..trace.tensor import (
    FLOATS,
    IN_PLACE,
    METHODS,
    OPERATORS,
    SymTensor,
    alias,
    as_bool,
    as_float,
    called,
    expand,
    lift,
    new,
    rebind,
)
from . import matrices
from .counts import Count, plain
from .sums import StepRun, added, is_open, lowered_to, of_step, opened, run_of, settled, snapshot, view_of
from .symbolic import Symbolic, TensorNumber, Tracing, made, place

_Meta = torch.Tensor

_VIEWS = frozenset(
    """
    view reshape flatten ravel unsqueeze squeeze view_as reshape_as expand_as expand unflatten atleast_1d
    """.split()  # noqa: SIM905
)
"""What shows the same elements in another shape, as long as there are as many."""
_OF_SHAPE = {
    "shape": "shape",
    "size": "shape",
    "ndim": "ndim",
    "dim": "ndim",
    "ndimension": "ndim",
    "numel": "count",
}
_OF_SHAPE |= {"nelement": "count", "__len__": "shape", "is_contiguous": "contiguous"}
_OF_TYPE = frozenset(
    """
    dtype is_floating_point is_complex is_sparse layout is_quantized itemsize
    element_size is_signed is_mkldnn is_sparse_csr is_nested is_conj is_neg is_inference
    is_same_size names result_type promote_types can_cast is_storage is_tensor
    """.split()  # noqa: SIM905
)
_OF_DEVICE = frozenset(f"is_{kind}" for kind in ("cpu", "cuda", "meta", "mps", "xpu", "xla"))
_UNCHANGED = frozenset(
    [
        "detach",
        "detach_",
        "requires_grad_",
        "alias",
        "contiguous",
        "positive",
        "resolve_conj",
        "resolve_neg",
        "cpu",
        "conj",
        "conj_physical",
    ]
)
_READS = frozenset(["item", "__float__", "__int__", "__index__", "tolist"])
_GRAD_MODES = frozenset(
    """
    is_grad_enabled _set_grad_enabled set_grad_enabled is_inference_mode_enabled get_default_dtype
    is_compiling is_scripting _record_function_enter_new _record_function_exit is_autocast_enabled device
    promote_types finfo iinfo broadcast_shapes
    """.split()  # noqa: SIM905
)
_NAMES = (
    OPERATORS
    | IN_PLACE
    | {"__rdiv__": "rdiv", "__div__": "div", "__idiv__": "div_", "sgn": "sign", "sgn_": "sign_"}
)
_OF_DATA = frozenset({"tensor", "as_tensor", "scalar_tensor", "asarray"})
_FACTORIES = _OF_DATA | {"zeros", "ones", "full", "empty"}
_DIMENSIONAL = frozenset("sum mean amax amin max min any all norm vector_norm std var".split())  # noqa: SIM905


def flat(x: Any) -> Iterator[Any]:
    if isinstance(x, (list, tuple)):
        for y in x:
            yield from flat(y)
    elif type(x) is dict:
        for y in x.values():
            yield from flat(y)
    else:
        yield x


def mapped(f: Callable[[Any], Any], x: Any) -> Any:
    if type(x) in (list, tuple):
        return type(x)(mapped(f, y) for y in x)
    return {k: mapped(f, y) for k, y in x.items()} if type(x) is dict else f(x)


def call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a torch function gives."""
    with torch._C.DisableTorchFunction():
        name = getattr(func, "__name__", str(func))
        if any(type(x) is Count for x in flat((args, kwargs))):
            args, kwargs = mapped(plain, args), mapped(plain, kwargs)
        if name in ("__get__", "__set__"):
            of = getattr(getattr(func, "__self__", None), "__name__", "")
            if name == "__set__":
                raise Untraceable(f"setting .{of} of a tensor has no fused form")
            return _property(of, func, args)
        return _function(name.removeprefix("linalg_"), func, args, kwargs)


def _property(name: str, func: Any, args: Any) -> Any:
    x = args[0]
    if not isinstance(x, Symbolic):
        return func(*args)
    if name in _OF_SHAPE or name in _OF_TYPE:
        return _fact(name, func, args, {})
    if name in ("T", "mT", "H", "mH"):
        return _function(name, func, args, {})
    if name == "device" or name in _OF_DEVICE:
        if x.sym is None and x.why:
            raise Untraceable(x.why)
        device = x.device_now()
        return device if name == "device" else device.type == name.removeprefix("is_")
    if name == "is_leaf":
        return True
    if name in ("grad_fn", "_base"):
        return None
    raise Untraceable(f"Tensor.{name} has no fused form")


def _fact(name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a tensor says of itself. What depends on its shape splits the parameters by it."""
    for x in flat(args):
        if name == "is_contiguous" and isinstance(x, Symbolic) and x.ext is not None:
            raise Untraceable("is_contiguous() of a matrix")
        ours = isinstance(x, Symbolic) and name in _OF_SHAPE and x.sym is not None and not of_step(x.sym)
        if ours and x.sym.kind != TENSOR:
            if _OF_SHAPE[name] == "count" and x.sym.shown is None and x.sym.kind == ELEMENT:
                return Count(x.sym)
            known = x.sym.fact(_OF_SHAPE[name])
            if name == "is_contiguous":
                if known is None or any(m != torch.contiguous_format for m in (*args[1:], *kwargs.values())):
                    raise Untraceable("is_contiguous() of tensors with several layouts")
                return known
    return func(*mapped(_meta, args), **mapped(_meta, kwargs))


def _meta(x: Any) -> Any:
    kind = type(x)
    if kind is Symbolic:
        return x.meta
    return x.value if kind is Number else 1.0 if kind is TensorNumber else x


def _operand(x: Any, run: Run | None = None) -> Any:
    kind = type(x)
    if kind is Symbolic or kind is TensorNumber:
        if kind is Symbolic and x.number is not None:
            return x.number
        return place(x) if run is None else lowered_to(run, place(x))
    if isinstance(x, torch.Tensor):
        raise Untraceable("a tensor from outside the parameters, their gradients and their state")
    return x


def _function(name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if name.startswith("_foreach_"):
        return _foreach(name.removeprefix("_foreach_"), args, kwargs)
    symbolic = [x for x in flat((args, kwargs)) if type(x) is Symbolic]
    mode = Tracing.current
    if not symbolic:
        return _outside(name, func, args, kwargs)
    if mode is not None:
        mode.acted = True
    if all(x.constant is not None for x in symbolic):
        return _of_constants(func, args, kwargs)
    if name in _OF_SHAPE or name in _OF_TYPE:
        return _fact(name, func, args, kwargs)
    if name == "get_device":
        return symbolic[0].device.index if symbolic[0].device.index is not None else -1
    if name in _READS:
        if name == "tolist" and args[0].parts is not None:
            return [TensorNumber.read(part) for part in args[0].parts]
        if name == "tolist" and args[0].meta.shape == (1,):
            return [TensorNumber.read(args[0])]
        return TensorNumber.read(args[0])
    if name == "__bool__" or name == "is_nonzero":
        if args[0].number is not None:
            return bool(args[0].number)
        args = mapped(matrices.left, args)
        symbolic = list(args)
        _settle(symbolic)
        x = place(args[0])
        if x.kind != TENSOR:
            return bool(TensorNumber.read(args[0]))
        return x.run.branch(as_bool(x))
    name = _NAMES.get(name, name)
    if name not in _ADDS:
        _settle(symbolic)
    out = kwargs.get("out")
    if out is not None:
        kwargs = {k: v for k, v in kwargs.items() if k != "out"}
        _write(out, _function(name, func, args, kwargs))
        return out
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
    return _method(name, func, args, kwargs)


def _outside(name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A function of no tensor of the shadow: a tensor of one number, or of several."""
    if name.split(".")[0] in _GRAD_MODES:
        return func(*args, **kwargs)
    if any(isinstance(x, torch.Tensor) for x in flat((args, kwargs))):
        raise Untraceable(
            f"torch.{name} of a tensor from outside the parameters, their gradients and their state"
        )
    if name in _CONSTANT:
        return _of_constants(func, args, kwargs)
    if name not in _FACTORIES:
        _refuse(name)
    values = kwargs.get("data", args[0] if args else None) if name in _OF_DATA else None
    if isinstance(values, (list, tuple)):
        parts = [_outside(name, func, (v,), {k: v for k, v in kwargs.items() if k != "data"}) for v in values]
        meta = torch.stack([part.meta for part in parts])
        if len(parts) == 1 and parts[0].parts is None:
            return made(parts[0].sym, meta, number=parts[0].number)
        return made(None, meta, parts=parts)
    options = {k: v for k, v in mapped(_meta, kwargs).items() if k != "device"}
    meta = func(*mapped(_meta, args), device="meta", **options)
    if name in _OF_DATA:
        number = values
    elif name == "full":
        number = kwargs.get("fill_value", args[1] if len(args) > 1 else None)
    else:
        number = 1.0 if name == "ones" else 0.0
    if type(number) is TensorNumber:
        return made(number.sym, meta)
    return made(None, meta, number=number)


_CONSTANT = frozenset(["eye", "arange", "linspace", "tril_indices", "triu_indices"])
"""What makes tensors of constants."""


def _of_constants(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A function of nothing but constants, on the real ones."""

    def real(x: Any) -> Any:
        return x.constant if type(x) is Symbolic else x.escape() if type(x) is Number else x

    if any(type(x) is TensorNumber for x in flat((args, kwargs))):
        raise Untraceable("constants meet a number that was read from a tensor")
    found = func(*mapped(real, args), **mapped(real, kwargs))
    given = {id(x.constant): x for x in flat((args, kwargs)) if type(x) is Symbolic}

    def seen(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return (
            given[id(x)] if id(x) in given else made(None, x.to("meta"), "a tensor of constants", constant=x)
        )

    if isinstance(found, tuple) and type(found) is not tuple:  # torch's own kinds of tuples
        return type(found)(map(seen, found))
    return mapped(seen, found)


def _like(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The same function on meta tensors, for shape and dtype, or for torch's own error."""
    options = {
        k: 1.0 if k in _SCALARS and type(v) is Symbolic else mapped(_meta, v) for k, v in kwargs.items()
    }
    try:
        return func(*mapped(_meta, args), **options)
    except RuntimeError:
        taken = [1.0 if type(x) is Symbolic and x.meta.dim() == 0 else x for x in args[1:]]
        if all(a is b for a, b in zip(taken, args[1:], strict=True)):
            raise
        # Tensors where torch takes numbers, which those on meta do not have: clamp(0.0, tensor).
        return func(_meta(args[0]), *mapped(_meta, taken), **options)


_SCALARS = frozenset({"alpha", "value", "min", "max"})
"""Arguments that torch takes the number of, where they are tensors."""


_ADDS = frozenset("add add_ sub sub_ rsub stack detach alias sum norm vector_norm copy_ clone".split())  # noqa: SIM905
"""What a sum over parameters may go on growing after."""


def _settle(tensors: list[Symbolic]) -> None:
    """Close what is an open sum among them."""
    for x in tensors:
        if x.sym is not None:
            x.__dict__["sym"] = settled(x.sym)


def _sum(base: str, in_place: bool, meta: _Meta, args: Any, kwargs: dict[str, Any]) -> Symbolic | None:
    """A sum over parameters that goes on growing; None if this is none."""
    if base not in ("add", "sub", "rsub") or len(args) != 2 or not kwargs.keys() <= {"alpha", "other"}:
        return None
    if not isinstance(meta, torch.Tensor) or meta.numel() != 1 or any(_is_poison(x) for x in args):
        return None
    x, other = args[::-1] if base == "rsub" else args
    a, b, alpha = _operand(x), _operand(other), _operand(kwargs.get("alpha", 1))
    if in_place and is_open(b) and isinstance(a, SymTensor) and not of_step(a):
        return None
    result = added(a, b, alpha, 1 if base == "add" else -1, in_place)
    if result is None:
        return None
    if not in_place:
        return made(SymTensor(result.run, result.node, meta.dtype) if not is_open(result) else result, meta)
    if x.sym is not None and of_step(x.sym):  # whoever else sees it sees it grow
        mine: Any = x.sym.place
        mine.grow(result.place)
    else:
        x.__dict__.update(sym=result, number=None)
    return x


def _is_poison(x: Any) -> bool:
    return isinstance(x, Symbolic) and x.sym is None and x.number is None


def _method(name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    in_place = name.endswith("_") and not name.endswith("__")
    base = name[:-1] if in_place and name not in METHODS else name
    # Before torch is asked, whose meta tensors have no number to give.
    args, kwargs = scale_last(base, args, kwargs)
    x = args[0]
    tensors = [t for t in flat((args, kwargs)) if type(t) is Symbolic]
    if name in ("stack", "cat") and not (
        matrices.of_one(tensors) and matrices.calls(name, base, tensors, None)
    ):
        return _stack(name, func, args, kwargs)
    if any(t.parts is not None for t in tensors):
        return _on_parts(name, func, args, kwargs)
    if (outer := matrices.outer(name, args, kwargs)) is not None:
        return _function("mul", torch.mul, outer, {})
    if matrices.calls(name, base, tensors, x if in_place else None):
        if in_place and isinstance(x, Symbolic) and x.ext is None and name not in matrices.STARTERS:
            whole = getattr(torch.Tensor, base, None) or getattr(torch, base, None)
            made_of = args[1] if base == "copy" else _function(base, whole, args, kwargs)
            _write(x, made_of)
            return x
        return matrices.recorded(name, func, args, kwargs, tensors)
    if any(t.ext is not None for t in tensors):
        args, kwargs = mapped(matrices.left, args), mapped(matrices.left, kwargs)
        x = args[0]
    if name in _PARTS and isinstance(x, Symbolic) and (one := _only(x)) is not None:
        if name != "__getitem__":
            return iter((one,)) if name == "__iter__" else (one,)
        if type(args[1]) is int:
            return one
    if name == "__setitem__":
        return _put(*args)
    if isinstance(x, Symbolic) and name in _VIEWS:
        return _view(name, _like(func, args, kwargs), x)
    if isinstance(x, Symbolic) and name in _UNCHANGED and not kwargs and len(args) == 1:
        if x.number is not None:  # whoever writes to either writes to both
            return x
        if name == "contiguous" and x.sym is not None and x.sym.kind == ELEMENT:
            return _wrapped(name, called(name, METHODS[name], place(x)), x.meta, x)
        return (
            x
            if name.endswith("_")
            else made(None if x.sym is None else view_of(x.sym), x.meta, x.why, x.number)
        )
    if name == "__getitem__" and x.sym is not None and _adds_dimensions(args[1]):
        return _view(name, _like(func, args, kwargs), x)
    if base in ("as_tensor", "asarray") and isinstance(x, Symbolic):  # which is one
        return _cast(x, torch.Tensor.to, args[1:], kwargs) if len(args) > 1 or kwargs else x
    if base == "type" and isinstance(x, Symbolic):  # by the names that types of tensors had
        (named,) = args[1:] or [kwargs.get("dtype")]
        if named is None:
            return _type_name(x.meta.dtype, x.device_now())
        return _cast(x, torch.Tensor.to, [_dtype_of(named, x.device_now())], {})
    if base in _CASTS and isinstance(x, Symbolic):
        return _cast(x, func, args[1:], kwargs)
    if base not in METHODS:
        _refuse(name)
    meta = _like(func, args, kwargs)
    if (growing := _sum(base, in_place, meta, args, kwargs)) is not None:
        return growing
    _settle(tensors)
    operands = [x for x in flat((args, kwargs)) if type(x) in (Symbolic, TensorNumber)]
    run = run_of([settled(x.sym) for x in operands if x.sym is not None])
    if run is None:
        return _on_numbers(base, in_place, meta, args, kwargs)
    if in_place and isinstance(x, Symbolic):
        if x.number is not None:
            _place_number(x, run)
        elif x.sym is not None and of_step(x.sym) and x.sym.run is not run:
            _place_in(x, run)
    operands, options = (
        [_operand(a, run) for a in args],
        {_WORDS.get(k, k): _operand(v, run) for k, v in kwargs.items()},
    )
    if base == "where" and func is not torch.Tensor.where:  # torch's function has the condition first
        condition, yes, *no = operands
        operands = [yes, condition, *no]
    if not isinstance(operands[0], SymTensor):
        operands[0] = lift(run, operands[0])
    if base in _IN_DTYPE and run.device.type == "cpu":
        operands = [_in_dtype(run, o, meta.dtype) for o in operands]
        options = {k: _in_dtype(run, o, meta.dtype) for k, o in options.items()}
    result = called(name, METHODS[base], *operands, **options)
    if in_place:
        if not isinstance(x, Symbolic):
            raise Untraceable(f"Tensor.{name} writes to a tensor from outside")
        rebind(place(x), _as_stored(result, x.meta.dtype))
        return x
    if isinstance(result, Extreme):
        where = made(None, meta[1], "where a tensor is largest or smallest has no fused form")
        return type(meta)((_wrapped(name, result.values, meta[0], x), where))
    return _wrapped(name, _as_stored(result, meta.dtype), meta, x)


_CASTS = frozenset(["to", "float", "double", "half", "bfloat16", "type", "type_as"])
_ROUNDS = {torch.bfloat16: "to_bfloat16", torch.float16: "to_float16"}
_EXACT = frozenset(["neg", "abs"])
"""What gives numbers of its arguments' precision."""


_IN_DTYPE = frozenset({"add", "sub", "rsub"})
"""What takes numbers in the tensors' own dtype, on the CPU; all else takes them as float32."""


def _in_dtype(run: Run, x: Any, dtype: torch.dtype) -> Any:
    is_number = type(x) in (Number, float) or (isinstance(x, SymTensor) and x.asked is None)
    return _as_stored(lift(run, x), dtype) if is_number and dtype in _ROUNDS else x


def _as_stored(x: Any, dtype: torch.dtype, always: bool = False) -> Any:
    """A result as torch has it, which rounds after every function."""
    if not isinstance(x, SymTensor) or x.is_bool or dtype not in _ROUNDS:
        return x
    wanted = always or Tracing.current is None or Tracing.current.rounds
    if not wanted or _is_exact(x.run, x.node, dtype):
        return x
    out = new(x, _ROUNDS[dtype], x)
    return SymTensor(x.run, out.node, dtype, x.shown)


def _is_exact(run: Any, node: int, dtype: torch.dtype) -> bool:
    """Whether its numbers are of this dtype as they are."""
    v = run.graph.values[node]
    if v.op == "load":
        signature = run.signature
        known = {"param": signature.param, "grad": signature.grad}
        known |= {f"state.{k}": b.dtype for k, b in signature.state if isinstance(b, Buffer)}
        return known.get(v.attr) == dtype
    return v.op in ("sign", _ROUNDS[dtype]) or (v.op in _EXACT and _is_exact(run, v.args[0], dtype))


def _type_name(dtype: torch.dtype, device: torch.device) -> str:
    name = torch.empty(0, dtype=dtype).type()
    return name if device.type == "cpu" else name.replace("torch.", f"torch.{device.type}.")


def _dtype_of(named: Any, device: torch.device) -> Any:
    found = [t for t in FLOATS if named == _type_name(t, device)]
    return found[0] if found else named if isinstance(named, torch.dtype) else _refuse("type")


def _cast(x: Symbolic, func: Any, args: Any, kwargs: dict[str, Any]) -> Symbolic:
    """A tensor in another dtype."""
    sym = place(x) if x.number is None else None
    devices = [a for a in (*args, kwargs.get("device")) if isinstance(a, (str, torch.device))]
    step = sym is not None and of_step(sym)
    if sym is not None and any(torch.device(d) != sym.run.device for d in devices):
        raise Untraceable(f"a tensor is moved from {sym.run.device} to {devices[0]}")
    args = [_meta(a) for a in args if not isinstance(a, (str, torch.device))]
    kwargs = {k: v for k, v in kwargs.items() if k != "device"}
    meta = func(x.meta, *args, **kwargs) if args or kwargs or not devices else x.meta
    if not isinstance(meta, torch.Tensor):
        _refuse("type")
    if meta is x.meta:
        return x
    if sym is None:
        return made(None, meta, number=x.number)
    if meta.dtype == torch.bool:
        return made(as_bool(sym), meta)
    if meta.dtype not in FLOATS or (
        meta.dtype == torch.float64 and sym.run.compute != torch.float64 and not step
    ):
        raise Untraceable(f"a cast to {meta.dtype}; values are {sym.run.compute}")
    value = SymTensor(sym.run, as_float(sym).node, meta.dtype, sym.shown)
    return made(_as_stored(value, meta.dtype, always=True) if meta.dtype != x.meta.dtype else value, meta)


_WORDS = {"fill_value": "value", "exponent": "exponent"}


_PARTS = frozenset({"unbind", "__iter__", "__getitem__"})


def _only(x: Symbolic) -> Symbolic | None:
    """The only number of a tensor of shape (1,), as a 0-d tensor; None for others."""
    if x.meta.shape != (1,) or (x.number is None and (x.sym is None or x.sym.kind != TENSOR)):
        return None
    return made(None if x.sym is None else view_of(x.sym), x.meta[0], number=x.number)


def _place_number(x: Symbolic, run: Run) -> None:
    """Make a tensor of one number one of a parameter's: it is written to."""
    if x.hosted and type(run) is not StepRun:
        raise Untraceable("a tensor of the optimizer itself gets a number from a parameter")
    sym = lift(run, x.number)
    alone = type(run) is not StepRun and run.shape.numel() == 1  # type: ignore[attr-defined]
    if x.meta.numel() != 1 or alone:
        sym = expand(sym)
    x.__dict__.update(sym=SymTensor(run, sym.node, x.meta.dtype), number=None)


def _place_in(x: Symbolic, run: Run) -> None:
    """Make a tensor of the step one of a parameter's: it is written to."""
    if x.hosted:
        raise Untraceable("a tensor of the optimizer itself gets a number from a parameter")
    x.__dict__["sym"] = lowered_to(run, x.sym)


_ON_NUMBERS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b, alpha=1: a + (b if type(alpha) is int and alpha == 1 else b * alpha),
    "sub": lambda a, b, alpha=1: a - (b if type(alpha) is int and alpha == 1 else b * alpha),
    "rsub": lambda a, b: b - a,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "rdiv": lambda a, b: b / a,
    "pow": lambda a, b: a**b,
    "rpow": lambda a, b: b**a,
    "neg": lambda a: -a,
    "abs": abs,
    "sqrt": lambda a: a**0.5,
    "square": lambda a: a * a,
    "clone": lambda a: a,
    "zeros_like": lambda a: 0.0,
    "ones_like": lambda a: 1.0,
    "empty_like": lambda a: 0.0,
    "zero": lambda a: 0.0,
    "fill": lambda a, b: b,
    "copy": lambda a, b: b,
    "to": lambda a, *_, **__: a,
    "float": lambda a: a,
}


def _on_numbers(base: str, in_place: bool, meta: _Meta, args: Any, kwargs: dict[str, Any]) -> Any:
    """A function of tensors of numbers of the host alone."""
    if base not in _ON_NUMBERS:
        _refuse(base)
    number = _ON_NUMBERS[base](*map(_operand, args), **{k: _operand(v) for k, v in kwargs.items()})
    if in_place:
        args[0].__dict__["number"] = number
        return args[0]
    return made(None, meta, number=number)


def _put(x: Any, mask: Any, value: Any) -> None:
    """``x[mask] = value``: where the mask is, the value."""
    whole = isinstance(mask, Symbolic) and mask.meta.dtype == torch.bool and mask.meta.shape == x.meta.shape
    if not whole or (isinstance(value, torch.Tensor) and value.numel() != 1):
        raise Untraceable("elements of a tensor are written one by one, or where other elements are")
    run = place(x).run
    value, mask = lift(run, _operand(value, run)), lowered_to(run, place(mask))
    rebind(place(x), called("where", METHODS["where"], value, mask, place(x)))


def _stack(name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``torch.stack`` (``cat`` of tensors of one element): what is done to all of them is done to each."""
    parts = list(args[0])
    if all(part.numel() == 1 for part in parts):
        parts = list(map(matrices.left, parts))
    if name == "cat" and any(p.shape != (1,) for p in parts):
        _refuse(name)
    matrices_only = not (len(args) > 1 or kwargs) and all(map(matrices.is_matrix, parts))
    if name == "stack" and any(p.dim() for p in parts) and not matrices_only:
        _refuse(name)
    copies = [
        made(
            None if p.sym is None else snapshot(p.sym),
            p.meta,
            p.why,
            p.number,
            ext=None if p.ext is None else matrices.copied(p.ext),
        )
        for p in parts
    ]
    return made(None, _like(func, args, kwargs), parts=copies)


def _on_parts(name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if any(t.dim() > 1 for t in flat((args, kwargs)) if type(t) is Symbolic and t.parts is not None):
        return _on_stack(name, func, args, kwargs)
    if name in ("unbind", "__iter__", "split", "chunk"):
        parts = x.parts
        return tuple(parts) if name != "__iter__" else iter(parts)
    if name == "__getitem__" and type(args[1]) is int:
        return x.parts[args[1]]
    base = name.removesuffix("_")
    if base in ("sum", "norm", "vector_norm") and type(x) is Symbolic and x.parts is not None:
        return _over_parts(base, func, args, kwargs)
    if base in _DIMENSIONAL or base not in METHODS:
        raise Untraceable(f"torch.{name} mixes parameters")
    count = next(len(t.parts) for t in flat((args, kwargs)) if type(t) is Symbolic and t.parts is not None)

    def of(a: Any, i: int) -> Any:
        return a.parts[i] if type(a) is Symbolic and a.parts is not None else a

    results = [
        _function(name, func, tuple(of(a, i) for a in args), {k: of(v, i) for k, v in kwargs.items()})
        for i in range(count)
    ]
    if name.endswith("_") and not name.endswith("__"):
        return x
    return made(None, torch.stack([r.meta.reshape(()) for r in results]), parts=results)


_OF_STACKS = {"bmm": torch.mm, "baddbmm": torch.addmm}
"""Functions of stacks of matrices, and those of one."""
_OF_EACH = frozenset(["mT", "matmul", "__matmul__"])


def _on_stack(name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A function of stacked matrices that takes each by itself."""
    stacks = [t for t in flat((args, kwargs)) if type(t) is Symbolic and t.parts is not None]
    x, base, count = args[0], name.removesuffix("_"), len(stacks[0].parts or ())
    if name in ("unbind", "__iter__") and len(args) == 1 and not kwargs:
        return tuple(x.parts) if name == "unbind" else iter(x.parts)
    if name == "__getitem__" and type(args[1]) is int:
        return x.parts[args[1]]
    meta = _like(func, args, kwargs)
    others = [
        t for t in flat((args, kwargs)) if isinstance(t, torch.Tensor) and all(t is not s for s in stacks)
    ]
    alike = {t.dim() for t in stacks} == {3} and {len(t.parts or ()) for t in stacks} == {count}
    if not alike or any(t.dim() > 2 for t in others) or type(x) is not Symbolic or x.parts is None:
        raise Untraceable(f"torch.{name} mixes parameters")
    if name == "flatten" and meta.shape == x.meta.shape:
        return x
    if name in ("reshape", "view") and meta.shape[:1] == (count,):
        nested = not isinstance(args[1], int)
        each = tuple(args[1] if nested else args[1:])[1:]
        args = (x, each) if nested else (x, *each)
    elif base in _DIMENSIONAL:
        dims = kwargs.get("dim")
        if not all(
            -2 <= d < 0 for d in (dims if isinstance(dims, (tuple, list)) else (0 if dims is None else dims,))
        ):
            raise Untraceable(f"torch.{name} mixes parameters")
    elif name in _VIEWS or (
        base not in METHODS and base not in _CASTS and name not in _OF_EACH | _OF_STACKS.keys()
    ):
        raise Untraceable(f"torch.{name} of a stack of matrices")
    one = _OF_STACKS.get(name, func)

    def of(a: Any, i: int) -> Any:
        return a.parts[i] if type(a) is Symbolic and a.parts is not None else a

    results = [
        _function(
            getattr(one, "__name__", name) if name in _OF_STACKS else name,
            one,
            tuple(of(a, i) for a in args),
            {k: of(v, i) for k, v in kwargs.items()},
        )
        for i in range(count)
    ]
    if name.endswith("_") and not name.endswith("__"):
        return x
    return made(None, meta, parts=results)


def _over_parts(base: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Symbolic:
    """The sum or the norm of tensors of one number."""
    meta, parts = _like(func, args, kwargs), args[0].parts
    order = kwargs.get("ord", kwargs.get("p", args[1] if len(args) > 1 else None)) if base != "sum" else 1
    order = 2 if order in (None, "fro") and base != "sum" else order
    if meta.numel() != 1 or (base != "sum" and (type(order) not in (int, float) or order not in (1, 2))):
        raise Untraceable(f"torch.{base} mixes parameters")
    if base != "sum":
        name = "abs" if order == 1 else "square"
        parts = [_function(name, getattr(torch, name), (part,), {}) for part in parts]
    total = parts[0] if parts[0].sym is None else made(opened(parts[0].sym), parts[0].meta)
    for part in parts[1:]:
        total = _function("add", torch.add, (total, part), {})
    if base != "sum" and order == 2:
        total = _function("sqrt", torch.sqrt, (total,), {})
    if total.sym is None:
        return made(None, meta, total.why, total.number)
    return made(total.sym, meta)


def _refuse(name: str) -> Any:
    raise Untraceable(f"torch.{name} has no fused form")


def _wrapped(name: str, result: Any, meta: Any, x: Any) -> Any:
    """A result as the class sees it."""
    if not isinstance(result, SymTensor):
        return result
    if not isinstance(meta, torch.Tensor):
        _refuse(name)
    if isinstance(x, Symbolic) and x.sym is not None and result.place is x.sym.place and meta is x.meta:
        return made(result, meta)
    run: Any = result.run
    if result.shown is not None and not callable(result.shown):
        fits = list(meta.shape) == sizes(result.shown, run.signature.lengths(run.shape))
    else:
        fits = meta.numel() == (1 if result.kind == TENSOR else run.shape.numel())
    if not fits:
        raise Untraceable(f"torch.{name} makes a tensor of another shape than the parameter's")
    return made(result, meta)


def flattened(sym: SymTensor, meta: torch.Tensor, shape: torch.Size) -> Symbolic:
    """What stands for a tensor in one row whose elements are those of a tensor of a parameter's shape."""
    return _view("flatten", meta, made(sym, torch.empty(shape, dtype=meta.dtype, device="meta")))


def _view(name: str, meta: _Meta, x: Symbolic) -> Symbolic:
    sym = place(x)
    if sym.kind != TENSOR and name not in ("unsqueeze", "squeeze", "__getitem__"):
        sym.run.attribute(ELEMENT, "contiguous")
    if name.startswith("expand") and meta.shape != x.meta.shape:
        return _broadcast(sym, meta)
    if meta.numel() != x.meta.numel() or not (meta.is_contiguous() and x.meta.is_contiguous()):
        raise Untraceable(f"Tensor.{name} shows a tensor's elements in another order or number")
    if sym.kind == TENSOR or meta.shape == x.meta.shape:
        return made(alias(sym), meta)
    run: Any = sym.run
    if sym.kind == ELEMENT and meta.shape == run.shape:
        return made(seen(sym, None), meta)

    def shown() -> Dims:
        return regrouped(sym.dims, run.lengths(), meta.shape)

    # To ask for the shape has a price, a trace for each, and most that is seen flat goes back to its shape.
    return made(seen(sym, shown if sym.kind == ELEMENT else shown()), meta)


def _adds_dimensions(index: Any) -> bool:
    """Whether it is that of ``x[:, None]`` and its like."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or _is_all(part) for part in parts)


def _is_all(part: Any) -> bool:
    return isinstance(part, slice) and (part.start, part.stop) == (None, None) and part.step in (None, 1)


def _broadcast(sym: SymTensor, meta: _Meta) -> Symbolic:
    """A tensor as large as another, which whatever takes both makes of it anyway. Nothing may be written to it."""
    view = alias(sym)
    view.__dict__["shown"] = (*[()] * (meta.dim() - len(sym.dims)), *sym.dims)
    return made(view, meta)


def _write(to: Any, value: Any) -> None:
    if not isinstance(to, Symbolic) or not isinstance(value, Symbolic):
        raise Untraceable("a tensor from outside is written to")
    if value.parts is not None and (to.parts is not None or to.number is not None):
        return _write_parts(to, value)
    if to.ext is not None or (value.ext is not None and to.sym is None):
        return matrices.write(to, value)
    value = matrices.left(matrices.in_dtype(value, to.meta.dtype))
    _settle([to, value])
    if value.sym is not None:
        if to.number is not None:
            _place_number(to, value.sym.run)
        elif to.sym is not None and of_step(to.sym) and not of_step(value.sym):
            _place_in(to, value.sym.run)
    if to.number is not None:
        to.__dict__["number"] = value.number
    else:
        given = value.number if value.sym is None and value.number is not None else place(value)
        rebind(place(to), lowered_to(place(to).run, given))


def _write_parts(to: Symbolic, value: Symbolic) -> None:
    """What is made of stacked tensors, to a stack."""
    if to.meta.shape != value.meta.shape or to.meta.dtype != value.meta.dtype or to.hosted:
        raise Untraceable("a stack of tensors is written to another kind of tensor")
    if to.parts is None:
        to.__dict__.update(parts=value.parts, number=None)
        return
    for one, part in zip(to.parts, value.parts or (), strict=True):
        _write(one, part)


_POSITIONS = {"addcdiv": 3, "addcmul": 3}
_ALONE = {"maximum": "clamp_min", "minimum": "clamp_max", "clamp_min": "clamp_min", "clamp_max": "clamp_max"}


def _foreach(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """``_foreach_add_`` and its like, tensor by tensor. Tensors of a list have one shape with those they meet."""
    base, in_place = name.removesuffix("_"), name.endswith("_")
    count = len(next(a for a in args if isinstance(a, (list, tuple))))
    out = []
    for i in range(count):
        given = [a[i] if isinstance(a, (list, tuple)) else a for a in args]
        named = {k: v[i] if isinstance(v, (list, tuple)) else v for k, v in kwargs.items()}
        for word in ("scalars", "scalar", "tensors2", "other", "weight", "weights", "exponent", "value"):
            if word in named and not (word == "value" and base not in _POSITIONS):
                given.append(named.pop(word))
        if len(given) > _POSITIONS.get(base, 9):
            named["value"] = given.pop()
        if base == "norm":
            out.append(_function("vector_norm", torch.linalg.vector_norm, tuple(given), named))
            continue
        x, plain = given[0], _ALONE.get(base)
        if in_place and base in ("add", "sub") and x.numel() == 1 and (x.sym is None or of_step(x.sym)):
            _function(f"{base}_", getattr(torch.Tensor, f"{base}_"), tuple(given), named)
            continue
        if plain and len(given) == 2 and not isinstance(given[1], torch.Tensor):
            base = plain
        function = getattr(torch.Tensor, base, None) or getattr(torch, base, None)
        if not isinstance(x, torch.Tensor):  # _foreach_pow(number, tensors)
            function = getattr(torch, base)
        if base in ("zero", "copy", "fill"):
            _function(f"{base}_", getattr(torch.Tensor, f"{base}_"), tuple(given), named)
            continue
        if function is None:
            _refuse(f"_foreach_{name}")
        result = _function(base, function, tuple(given), named)
        if in_place:
            _write(x, result)
        out.append(result)
    return None if in_place else out


Tracing.function = staticmethod(call)
