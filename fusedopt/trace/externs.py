"""Torch calls that have no fused form, such as matrix products: recorded, and made between fused programs.

A traced tensor that meets such a call *enters* a world of real ones: from there on it is an `ExternTensor`, and
whatever is done to it is recorded as the torch call that it is. Where such a tensor is used together with fused values
again, it *leaves*: it is a value of the graph that no kernel computes. ``cuts.py`` makes programs and functions of it.

What is recorded has no side effects: ``x.mul_(2)`` is ``x * 2`` in x's place. Equal calls are one, so that two traces
can be compared.
"""

from __future__ import annotations

import functools
import operator
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..ir.ops import ELEMENT, TENSOR, is_partial, kind_of
from . import axes
from .number import Number
from .signals import Starts, Untraceable, where_now
from .tensor import METHODS, SymTensor, as_bool, as_float, called, is_ours, lift, plain, rebind

if TYPE_CHECKING:
    from ..ir.program import Graph
    from .run import Run

EXTERN = "extern"
"""The op of a value that a recorded call gives. Its attr is the number of the call."""

STARTERS = frozenset(
    """
    matmul mm bmm addmm addbmm baddbmm mv addmv addr outer ger inner kron chain_matmul multi_dot einsum tensordot
    T mT H mH t transpose permute swapaxes swapdims movedim adjoint
    qr svd inverse pinverse cholesky cholesky_solve cholesky_inverse matrix_exp matrix_power det logdet slogdet
    linalg_qr linalg_eigh linalg_eigvalsh linalg_svd linalg_svdvals linalg_inv linalg_solve linalg_pinv linalg_cholesky
    linalg_solve_triangular linalg_lstsq linalg_matrix_exp linalg_matrix_power linalg_matrix_norm linalg_det
    linalg_slogdet linalg_matmul linalg_multi_dot linalg_diagonal
    trace diagonal diag diag_embed tril triu
    cumsum cumprod sort argsort topk roll flip fliplr flipud rot90 median quantile kthvalue
    index_select gather take_along_dim
    """.split()  # noqa: SIM905
)
"""Functions and attributes of torch that a tensor of a fused program enters for."""
_SCALED = frozenset(
    """
    add sub rsub mul div rdiv true_divide pow rpow gt ge lt le where full_like
    addmm baddbmm addbmm addmv addr addcmul addcdiv lerp clamp clamp_min
    """.split()  # noqa: SIM905
)
"""Functions whose numbers are factors and the like, which may change from step to step. Others' are structure."""
_FACTS = frozenset(("size", "dim", "numel", "nelement", "ndimension", "element_size"))
_FACTS |= frozenset(("is_floating_point", "is_complex"))
_CASTS = frozenset(("to", "type_as", "float", "double", "half", "bfloat16"))
_DEFINED: dict[str, Callable[..., Any]] = {
    "empty_like": torch.zeros_like,
    "new_empty": torch.Tensor.new_zeros,
}
"""Never uninitialised memory."""
_ATTRIBUTES = {name: getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}


class Given(NamedTuple):
    """What a fused program leaves: a value of the graph in a dtype."""

    node: int
    dtype: torch.dtype
    shape: torch.Size


class Result(NamedTuple):
    """What a call gives."""

    call: int


class Kept(NamedTuple):
    """What the state holds under this key when the step begins, in the type that callbacks compute in."""

    key: str


class Slot(NamedTuple):
    """A number of the step: an entry of the scalar program."""

    entry: int


class Constant:
    """A tensor made of nothing but constants. Equal ones are the same."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value.detach()
        self.key = value.dtype, value.shape, _bytes(self.value) if value.numel() <= 1 << 20 else id(value)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self.key == other.key


def _bytes(value: torch.Tensor) -> bytes:
    """What a tensor holds, in any dtype: numpy has no bfloat16."""
    plain = value.cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return bytes(plain.view(-1).view(torch.uint8).numpy())


Ref = Given | Result | Kept | Constant


class Call(NamedTuple):
    """One call: torch's function, and arguments with references in place of tensors and numbers of the step."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    where: str = ""

    @property
    def name(self) -> str:
        return name_of(self.function)

    def refs(self) -> Iterator[Any]:
        return leaves((self.args, self.kwargs))


def name_of(function: Callable[..., Any]) -> str:
    owner = getattr(function, "__self__", None)
    return getattr(owner, "__name__", "") if function.__name__ == "__get__" else function.__name__


def leaves(x: Any) -> Iterator[Any]:
    """All that is in nested tuples and lists."""
    if type(x) in (tuple, list):
        for part in x:
            yield from leaves(part)
    else:
        yield x


def mapped(x: Any, f: Callable[[Any], Any]) -> Any:
    """Nested tuples and lists with each leaf replaced."""
    return type(x)(mapped(part, f) for part in x) if type(x) in (tuple, list) else f(x)


def _key(x: Any) -> Any:
    """Arguments as a key: 1, 1.0 and True are not the same, nor are zeros of both signs."""
    if type(x) in (tuple, list):
        return type(x), tuple(map(_key, x))
    if isinstance(x, slice):
        return slice, _key((x.start, x.stop, x.step))
    return type(x), x, repr(x) if type(x) is float else None


class Calls:
    """The calls recorded in a trace, and tensors without memory that are like what they give.

    ``lasting`` says of each callback whether all tensors that it holds besides its arguments are of its own making.
    """

    def __init__(self, graph: Graph, device: torch.device, lasting: Sequence[bool] = ()) -> None:
        self.graph, self.device, self._lasting = graph, device, lasting
        self.calls: list[Call] = []
        self._metas: list[Any] = []
        self._given: dict[Given, torch.Tensor] = {}
        self._same: dict[int, int] = {}
        self._kept: dict[Kept, torch.Tensor] = {}
        self._known: dict[Any, int] = {}

    def give(self, node: int, dtype: torch.dtype, shape: torch.Size) -> Given:
        given = Given(node, dtype, shape)
        if given not in self._given:
            self._given[given] = torch.empty(shape, dtype=dtype, device="meta")
        return given

    def keep(self, key: str, dtype: torch.dtype, shape: torch.Size) -> Kept:
        """A tensor of the state that goes along no dimensions of the parameter."""
        self._kept.setdefault(Kept(key), torch.empty(shape, dtype=dtype, device="meta"))
        return Kept(key)

    def tensor(self, run: Run, ref: Ref, asked: torch.dtype | None) -> ExternTensor:
        return ExternTensor(run, Spot(ref, asked))

    def meta(self, ref: Any) -> Any:
        if isinstance(ref, Given):
            return self._given[ref]
        if isinstance(ref, Result):
            return self._metas[ref.call]
        if isinstance(ref, Kept):
            return self._kept[ref]
        if isinstance(ref, Constant):
            return ref.value.to("meta")
        if isinstance(ref, Slot):
            return 0.5
        return torch.device("meta") if ref == self.device else ref

    def record(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Result:
        """Another call. Raises what torch does for such arguments."""
        named = tuple(sorted(kwargs.items()))
        key = function, name_of(function), _key(args), _key(named)
        if key not in self._known:
            metas = mapped(args, self.meta), dict(mapped(named, self.meta))
            with torch.no_grad(), _NoEffects(metas, name_of(function)):
                made = function(*metas[0], **metas[1])
            parts = made if isinstance(made, tuple) else (made,)
            if not all(isinstance(part, torch.Tensor) for part in parts):
                raise Untraceable(f"torch.{name_of(function)} gives no tensor")
            self._known[key] = len(self.calls)
            self.calls.append(Call(function, args, named, where_now()))
            self._metas.append(made)
            if name_of(function) in _MAY_VIEW:
                self._same[self.memory(parts[0])] = self.memory(metas[0][0])
        return Result(self._known[key])

    def memory(self, meta: torch.Tensor) -> int:
        """Which memory a tensor has, one of those that it may be a view of, too."""
        found: int = meta.untyped_storage()._cdata
        while self._same.get(found, found) != found:
            found = self._same[found]
        return found

    def given(self, ref: Ref) -> list[Given]:
        """What programs have to leave for it, in the order in which it is needed."""
        found: dict[Given, None] = {}
        seen: set[int] = set()
        todo: list[Any] = [ref]
        while todo:
            one = todo.pop()
            if isinstance(one, Given):
                found[one] = None
            elif isinstance(one, Result) and one.call not in seen:
                seen.add(one.call)
                todo += reversed([*self.calls[one.call].refs()])
        return list(found)

    def value(self, result: Result, kind: str, type: str) -> int:
        """The value of the graph that a call's result is."""
        nodes = tuple(dict.fromkeys(given.node for given in self.given(result)))
        return self.graph.called(EXTERN, nodes, result.call, kind, type)

    def again(self, i: int, replace: dict[int, int]) -> int:
        """The value of the graph, an extern one, with others in place of what it is made of."""
        value = self.graph.values[i]
        made = self.remade(Result(value.attr), replace)
        assert isinstance(made, Result)
        return self.value(made, value.kind, value.type)

    def remade(self, ref: Ref, replace: dict[int, int]) -> Ref:
        """What calls give, with other values of the graph in place of what they are made of."""
        done: dict[int, Result] = {}

        def other(ref: Any) -> Any:
            if isinstance(ref, Given):
                return self.give(replace.get(ref.node, ref.node), ref.dtype, ref.shape)
            return done[ref.call] if isinstance(ref, Result) else ref

        for k in self.needed([ref.call] if isinstance(ref, Result) else []):
            call = self.calls[k]
            done[k] = self.record(call.function, mapped(call.args, other), dict(mapped(call.kwargs, other)))
        return other(ref)

    # -- what `SymTensor` asks --
    def starts(self, name: str) -> bool:
        """Whether a tensor of a fused program enters for this function or attribute of torch."""
        return name in STARTERS

    def attribute(self, x: SymTensor, name: str) -> Any:
        """``x.name``, of one for which it enters."""
        return getattr(enter(x), name)

    def dispatch(
        self, run: Run, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return dispatch(run, function, args, kwargs)

    def cast(self, x: SymTensor, dtype: torch.dtype) -> ExternTensor:
        """In a type in which fused programs do not compute."""
        return enter(x, dtype, copies=True)

    def written(self, x: SymTensor) -> None:
        """Something else comes where x is. Raises Untraceable if an extern tensor is a view of that."""
        for ref, places in x.run.lent.items():
            if x.place in places:
                if any(_sharing(self, x.run, self.meta(ref))):
                    raise Untraceable(
                        "a tensor is written to in place while a matrix may be a view of it",
                        "write to it out of place: x = x * 2 instead of x.mul_(2)",
                    )
                places.discard(x.place)

    def fuses(self, name: str, args: Any) -> bool:
        return fuses(name, args)

    def made(self, run: Run, x: Any) -> bool:
        """Whether it is a tensor that the callback has made of constants, such as ``torch.eye(3)``."""
        real = isinstance(x, torch.Tensor) and type(x) is torch.Tensor and x.dim() > 0
        return real and run.callback < len(self._lasting) and self._lasting[run.callback]

    def needed(self, results: list[int]) -> list[int]:
        """The calls that these need, in order."""
        found: set[int] = set()
        todo = list(results)
        while todo:
            k = todo.pop()
            if k not in found:
                found.add(k)
                todo += [ref.call for ref in self.calls[k].refs() if isinstance(ref, Result)]
        return sorted(found)


_MAY_VIEW = frozenset(["reshape", "reshape_as", "flatten", "ravel", "contiguous"])
"""Functions that give a view, or a copy where that cannot be, which the tensor's layout decides."""


class _NoEffects(TorchDispatchMode):
    """Raises Untraceable for what a recorded call must not do: draw random numbers, or write to what it is given."""

    def __init__(self, given: Any, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._name = name
        tensors = [x for x in leaves((given[0], tuple(given[1].values()))) if isinstance(x, torch.Tensor)]
        self._given = {x.untyped_storage()._cdata for x in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Untraceable(f"torch.{self._name} draws random numbers")
        for argument, x in zip(func._schema.arguments, args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and any(t.untyped_storage()._cdata in self._given for t in leaves(x)):
                raise Untraceable(f"torch.{self._name} writes to a tensor that it is given")
        return func(*args, **(kwargs or {}))


def _sharing(calls: Calls, run: Run, meta: torch.Tensor) -> Iterator[Spot]:
    """Where extern tensors are that share its memory, or may."""
    mine = calls.memory(meta)
    for ref in run.spots:
        if (spot := ref()) is not None and calls.memory(calls.meta(spot.ref)) == mine:
            yield spot


class Spot:
    """Where an extern tensor is: what is there now."""

    __slots__ = ("__weakref__", "asked", "ref")

    def __init__(self, ref: Ref, asked: torch.dtype | None) -> None:
        self.ref, self.asked = ref, asked


class ExternTensor:
    """A tensor of recorded torch calls.

    ``asked`` of its spot is the dtype that eager torch would give it, where that is another than the one in which
    callbacks compute.
    """

    extern = True
    run: Run
    spot: Spot

    def __init__(self, run: Run, spot: Spot) -> None:
        self.__dict__.update(run=run, spot=spot)
        run.spots.append(weakref.ref(spot))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        frame = sys._getframe(1)
        if "isinstance" in frame.f_code.co_names and not is_ours(frame):
            raise Untraceable("isinstance() of a tensor; it is a symbolic one while callbacks are traced")
        return type(self)

    @property
    def meta(self) -> torch.Tensor:
        return calls_of(self.run).meta(self.spot.ref)

    @property
    def asked(self) -> torch.dtype:
        return self.spot.asked or self.meta.dtype

    def leave(self, dims: axes.Dims | None = None) -> SymTensor:
        return leave(self, dims)

    def fits(self, dims: axes.Dims) -> bool:
        """Whether it may be a value of fused programs along these dimensions of the parameter."""
        whole = self.run.attribute(ELEMENT, "shape")
        return self.meta.dtype.is_floating_point and axes.sizes(dims, whole) == list(self.meta.shape)

    @property
    def leaves(self) -> bool:
        """Whether it may be a value of fused programs."""
        return shown_of(self) is not None

    @property
    def data(self) -> ExternTensor:
        return ExternTensor(self.run, self.spot)

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "ndim", "dtype"):
            return getattr(self.meta, name)
        if name in ("device", "requires_grad", "is_sparse", "is_leaf", "layout"):
            return {"device": self.run.device, "is_leaf": True, "layout": torch.strided}.get(name, False)
        if name in ("itemsize", "nbytes"):
            return self.asked.itemsize * (1 if name == "itemsize" else self.meta.numel())
        if name in _ATTRIBUTES:
            return dispatch(self.run, _ATTRIBUTES[name], (self,), {})
        if name.startswith("__") or not callable(getattr(torch.Tensor, name, None)):
            if name.startswith("__"):
                raise AttributeError(name)
            raise Untraceable(f"Tensor.{name} has no fused form")
        return functools.partial(_method, self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "data":
            raise Untraceable(f"setting .{name} on a tensor has no fused form")
        self.copy_(value)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        run = next(x.run for x in leaves((args, tuple((kwargs or {}).values()))) if type(x) is ExternTensor)
        return dispatch(run, func, args, dict(kwargs or {}))

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise Untraceable(
            "a tensor's value is read on the host (item, float, indexing, printing, ...)",
            "keep it a tensor: 0-d tensors fuse, and torch.where and comparisons take them",
        )

    def __bool__(self) -> bool:
        if self.meta.dim():
            raise Untraceable("a branch on element values; use torch.where, or a reduction such as .any()")
        return bool(lift(self.run, self))

    def __getitem__(self, index: Any) -> Any:
        return dispatch(self.run, torch.Tensor.__getitem__, (self, index), {})

    def __len__(self) -> int:
        return len(self.meta)

    __float__ = __int__ = __index__ = __iter__ = __setitem__ = __format__ = __contains__ = __repr__ = _refuse
    item = tolist = numpy = _refuse

    def __hash__(self) -> int:
        raise Untraceable("which tensor it is (in a set, as a key) cannot be told of a symbolic one")


def _method(x: ExternTensor, name: str, *args: Any, **kwargs: Any) -> Any:
    return dispatch(x.run, getattr(torch.Tensor, name), (x, *args), kwargs)


def calls_of(run: Run) -> Calls:
    """Where a run records calls. Raises Untraceable where it may not, as when a class's own step is traced."""
    if run.calls is None:
        raise Untraceable("a torch call between fused programs")
    return run.calls


def enter(x: SymTensor, dtype: torch.dtype | None = None, copies: bool = False) -> ExternTensor:
    """The value of a fused program as a real tensor, in this dtype if it is another; ``copies``: not x's own memory."""
    run, calls = x.run, calls_of(x.run)
    own = torch.float64 if run.graph.values[x.node].type == "d" else run.compute
    if x.is_bool:
        real = enter(as_float(x))
        return dispatch(run, torch.Tensor.bool, (real,), {})
    run.attribute(ELEMENT, "shape")  # the call is made for these sizes alone
    ref = _came_from(calls, x, dtype or own) or calls.give(x.node, dtype or own, x.fact("shape"))
    if not copies:
        run.lent.setdefault(ref, weakref.WeakSet()).add(x.place)
    asked = dtype if dtype is not None else x.asked
    return ExternTensor(run, Spot(ref, asked if asked != calls.meta(ref).dtype else None))


def _came_from(calls: Calls, x: SymTensor, dtype: torch.dtype) -> Result | None:
    """What a call gave, if x is that: no program has to leave it again."""
    value = calls.graph.values[x.node]
    if value.op != EXTERN:
        return None
    result = Result(value.attr)
    meta = calls.meta(result)
    return result if (meta.dtype, meta.shape) == (dtype, x.fact("shape")) else None


def leave(x: ExternTensor, dims: axes.Dims | None = None) -> SymTensor:
    """The tensor as a value of fused programs, along these dimensions of the parameter where sizes do not tell which.
    Raises Untraceable if it is none."""
    run, calls, meta = x.run, calls_of(x.run), x.meta
    shown = dims if (own := shown_of(x)) is None else own
    if shown is None:
        raise Untraceable(f"a tensor of shape {list(meta.shape)} meets the parameter's, of another shape")
    if meta.dtype == torch.bool:
        real = ExternTensor(run, Spot(calls.record(torch.Tensor.to, (x.spot.ref, run.compute), {}), None))
        return as_bool(leave(real))
    kind, ref = _kind(run, shown), x.spot.ref
    wide = kind == TENSOR and meta.dtype == torch.float64 != run.compute
    if meta.dtype == torch.float64 != run.compute and not wide:
        ref = calls.record(torch.Tensor.to, (ref, run.compute), {})
    if isinstance(ref, Given):
        node = _rounded(run, ref)
    else:
        if not isinstance(ref, Result):
            ref = calls.record(torch.Tensor.clone, (ref,), {})
        node = calls.value(ref, kind, "d" if wide else "f")
    known = run.graph.values[node].kind
    found = None if known == ELEMENT and meta.shape == run.attribute(ELEMENT, "shape") else shown
    return SymTensor(run, node, x.asked, plain(run, node, found) if found else None)


def _rounded(run: Run, given: Given) -> int:
    """What a program would leave, without leaving it."""
    if given.dtype in (torch.bfloat16, torch.float16):
        name = str(given.dtype).removeprefix("torch.")
        return run.graph.op(f"to_{name}", given.node, where=run.where)
    return given.node


def shown_of(x: ExternTensor) -> axes.Dims | None:
    """How its dimensions are the parameter's, as `SymTensor.dims`; None if they are not."""
    shape, whole = x.meta.shape, x.run.attribute(ELEMENT, "shape")
    if not (x.meta.dtype.is_floating_point or x.meta.dtype == torch.bool):
        return None
    if shape == whole:
        full = axes.full(whole) if len(whole) <= axes.MOST else tuple((d,) for d in range(len(whole)))
        return x.run.signature.shown(full)
    if shape.numel() == 1 or 0 in shape or len(whole) > axes.MOST:
        return tuple(() for _ in shape) if shape.numel() == 1 else None
    found = axes.layouts(shape, whole)
    return x.run.signature.shown(found[0]) if len(found) == 1 else None


def _kind(run: Run, shown: axes.Dims) -> str:
    whole = run.attribute(ELEMENT, "shape")
    full = run.signature.shown(axes.full(whole))
    if run.signature.zero_dim or full is None or shown == full:
        return ELEMENT
    if len(whole) > axes.MOST:
        return ELEMENT if axes.along(shown) else TENSOR
    kind = kind_of(axes.along(shown), axes.along(full))
    if is_partial(kind):
        run.attribute(ELEMENT, "dims")
    return kind


def _is_elements(x: Any) -> bool:
    return isinstance(x, SymTensor) and x.kind != TENSOR


def fuses(name: str, args: Any) -> bool:
    """Whether a call of this name is part of fused programs: its extern arguments leave, for others never entered."""
    found = [*leaves(args)]
    here = [x for x in found if type(x) is ExternTensor]
    return (
        name in METHODS
        and name not in _FACTS | _CASTS
        and any(map(_is_elements, found))
        and all(shown_of(x) is not None for x in here)
        and not any(type(x) is torch.Tensor and x.dim() for x in found)
    )


def dispatch(run: Run, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call gives that extern tensors, or symbolic ones that are to enter, are arguments of."""
    try:
        return _dispatched(run, function, tuple(args), kwargs)
    except Exception as error:
        raise Untraceable(f"torch.{name_of(function)}: {error}") from error


def _dispatched(run: Run, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name, out = name_of(function).removeprefix("linalg_"), kwargs.pop("out", None)
    if run.finished:
        raise Untraceable("a tensor kept from another call of a callback")
    if name in _FACTS:
        return getattr(args[0].meta, name)(*args[1:], **kwargs)
    if name in ("detach", "requires_grad_"):
        return args[0].data
    base = name[:-1] if name.endswith("_") and not name.endswith("__") else None
    if base is not None or out is not None:
        box = args[0] if out is None else out
        if base in ("copy", "zero", "fill"):
            made = _filled(run, base, args)
        else:
            whole = _functional(base) if base is not None else function
            made = dispatch(run, whole, args, kwargs)
        return rebind(box, made) if isinstance(box, SymTensor) else replaced(box, made)
    if name in _CASTS:
        return _cast(run, function, args, kwargs)
    if fuses(name, (args, tuple(kwargs.values()))):
        x = args[0] if isinstance(args[0], SymTensor) else lift(run, args[0])
        if name == "where":
            return called("where", METHODS["where"], lift(run, args[1]), lift(run, args[0]), args[2])
        return called(name, METHODS[name], x, *args[1:], **kwargs)
    defined: Callable[..., Any] = _DEFINED.get(name, function)
    return _recorded(run, defined, args, kwargs)


def _functional(base: str) -> Callable[..., Any]:
    owner = torch.Tensor if hasattr(torch.Tensor, base) else torch
    if not hasattr(owner, base):
        raise Untraceable(f"Tensor.{base}_ has no fused form")
    return getattr(owner, base)


def _filled(run: Run, base: str | None, args: tuple[Any, ...]) -> Any:
    """What ``copy_``, ``zero_`` and ``fill_`` leave."""
    box = args[0]
    if base == "copy":
        return args[1]
    return dispatch(run, torch.full_like, (box, 0.0 if base == "zero" else args[1]), {})


def replaced(box: ExternTensor, value: Any) -> ExternTensor:
    """``box.copy_(value)``, where nothing else sees the box's memory."""
    if isinstance(box, torch.Tensor):
        raise Starts("a tensor that is not made from the parameter, its gradient or its state is written to")
    run, calls = box.run, calls_of(box.run)
    meta = box.meta
    if any(spot is not box.spot for spot in _sharing(calls, run, meta)) or is_lent(box):
        raise Untraceable(
            "a matrix is written to in place while another tensor may be a view of it",
            "write to it out of place: x = x * 2 instead of x.mul_(2)",
        )
    made = value if type(value) is ExternTensor else _recorded(run, torch.Tensor.clone, (value,), {})
    if made.meta.shape != meta.shape:
        made = _recorded(run, torch.Tensor.expand, (made, *meta.shape), {})
    if made.meta.dtype != meta.dtype:
        made = _recorded(run, torch.Tensor.to, (made, meta.dtype), {})
    box.spot.ref = made.spot.ref
    return box


def is_lent(box: ExternTensor) -> bool:
    """Whether it is a view of a tensor of the fused programs, so that what is written to it would be written there."""
    calls = calls_of(box.run)
    mine = calls.memory(box.meta)
    return any(places and calls.memory(calls.meta(ref)) == mine for ref, places in box.run.lent.items())


def _cast(run: Run, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A cast as the user's tensor would take it: to the dtype that it has there it is itself."""
    x = args[0]
    calls = calls_of(run)
    rest = [a.spot.ref if type(a) is ExternTensor else a for a in args[1:]]
    wanted = function(
        x.meta.new_empty(0), *mapped(tuple(rest), calls.meta), **mapped_dict(kwargs, calls.meta)
    )
    if wanted.dtype == x.asked and not kwargs.get("copy"):
        return x.data
    if wanted.dtype == x.meta.dtype:
        made = _recorded(run, torch.Tensor.clone, (x,), {})
    else:
        made = _recorded(run, torch.Tensor.to, (x, wanted.dtype), {})
    made.spot.asked = None
    return made


def mapped_dict(kwargs: dict[str, Any], f: Callable[[Any], Any]) -> dict[str, Any]:
    return {k: mapped(v, f) for k, v in kwargs.items()}


def _recorded(run: Run, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    calls, factors = calls_of(run), name_of(function).strip("_").removesuffix("_") in _SCALED
    given = [x for x in leaves((args, tuple(kwargs.values()))) if type(x) is ExternTensor]
    floating = all(x.meta.dtype.is_floating_point for x in given)
    tensors: list[ExternTensor] = []

    def ref(x: Any) -> Any:
        if isinstance(x, SymTensor):
            x = enter(x)
        if type(x) is ExternTensor:
            if x.run is not run:
                raise Untraceable("a tensor kept from another call of a callback; keep it in the state")
            tensors.append(x)
            return x.spot.ref
        if isinstance(x, Number):
            # A slot is a float, which does not leave integers what they are.
            mine = x.program is run.scalars and factors and (type(x.value) is float or floating)
            return Slot(x.index) if mine else x.escape() if x.program is run.scalars else x.value
        if isinstance(x, torch.Tensor):
            return Constant(x)
        if isinstance(x, slice):
            return slice(*(i.escape() if isinstance(i, Number) else i for i in (x.start, x.stop, x.step)))
        return x

    made = calls.record(function, mapped(args, ref), mapped_dict(kwargs, ref))
    asked = _promoted(tensors)
    meta = calls.meta(made)
    if isinstance(meta, tuple):
        parts = [calls.record(operator.getitem, (made, k), {}) for k in range(len(meta))]
        found = [ExternTensor(run, Spot(part, _own(calls, part, asked))) for part in parts]
        return type(meta)(found)
    return ExternTensor(run, Spot(made, _own(calls, made, asked)))


def _own(calls: Calls, made: Result, asked: torch.dtype | None) -> torch.dtype | None:
    dtype = calls.meta(made).dtype
    return asked if asked != dtype and dtype.is_floating_point else None


def _promoted(tensors: list[ExternTensor]) -> torch.dtype | None:
    """The dtype eager torch would give a result of these; None if that is its own."""
    floats = [x for x in tensors if x.meta.dtype.is_floating_point]
    strong = [x for x in floats if x.meta.dim()] or floats
    if not strong or all(x.spot.asked is None for x in strong):
        return None
    return functools.reduce(torch.promote_types, [x.asked for x in strong])


_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "truediv": torch.div, "pow": torch.pow,
    "matmul": torch.matmul, "gt": torch.gt, "ge": torch.ge, "lt": torch.lt, "le": torch.le, "eq": torch.eq,
    "ne": torch.ne, "and": torch.bitwise_and, "or": torch.bitwise_or, "floordiv": torch.floor_divide,
    "mod": torch.remainder,
}  # fmt: skip


_REFLECTED: dict[Any, Callable[..., Any]] = {
    torch.sub: torch.rsub,
    torch.div: getattr(torch.Tensor, "__rdiv__"),  # noqa: B009  (stubs do not know it)
    torch.pow: getattr(torch.Tensor, "__rpow__"),  # noqa: B009
    torch.add: torch.add,
    torch.mul: torch.mul,
}
"""What torch has for a number to the left of a tensor."""


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, other: dispatch(x.run, function, (x, other), {})


def _swapped(function: Callable[..., Any]) -> Callable[..., Any]:
    def operated(x: ExternTensor, other: Any) -> Any:
        if (
            hasattr(type(other), "run")
            or isinstance(other, (torch.Tensor, SymTensor))
            or function not in _REFLECTED
        ):
            return dispatch(x.run, function, (other, x), {})
        return dispatch(x.run, _REFLECTED[function], (x, other), {})

    return operated


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, other: replaced(x, dispatch(x.run, function, (x, other), {}))


def _of_one(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: dispatch(x.run, function, (x,), {})


def _install() -> None:
    for name, function in _OPERATORS.items():
        setattr(ExternTensor, f"__{name}__", _operator(function))
        if name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
            setattr(ExternTensor, f"__r{name}__", _swapped(function))
            setattr(ExternTensor, f"__i{name}__", _in_place(function))
    for name, function in (("neg", torch.neg), ("abs", torch.abs), ("invert", torch.bitwise_not)):
        setattr(ExternTensor, f"__{name}__", _of_one(function))


_install()
