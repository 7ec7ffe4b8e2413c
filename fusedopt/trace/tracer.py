"""Run a callback list once, on symbolic tensors, and keep what it did as a program.

A *signature* is all that the callbacks can see of a parameter apart from element values: dtypes, state keys, scalar
state. Parameters of one group with the same signature share a trace. ``trace`` raises ``Untraceable`` (its
``callback`` attribute says which) when a callback has no fused form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..callback import Callback, arguments_of, is_temporary
from ..ir.ops import DRAWS, ELEMENT, OPS, TENSOR, is_partial, is_reduction, op_of
from ..ir.passes import optimize
from ..ir.program import Buffer, Graph, Program, Value, depth_first, reachable
from .axes import along, blocks, sizes, uncut
from .cuts import Cuts, Externs, alone, cut, key_of, numbered
from .externs import EXTERN, Calls, Kept, Result
from .number import Number, Scalar, ScalarProgram
from .run import GRAD, PARAM, Cell, Matrix, Pass, alike, either, is_number, load
from .signals import Begins, NeedsAttribute, Unsuited, Untraceable
from .signature import CODES, FACTOR, FOUND_INF, HERE_IN_ORDER, STARTED, Foreign, Signature, stored_dtype
from .totals import BUFFER, Total

BLOCKED = "01"
"""The axes of a parameter that is cut into blocks of elements: the blocks, and the elements in each."""
Axes = tuple[tuple[int, ...], ...]
"""The dimensions of a parameter that each axis of a program is; none if it has a single one."""


@dataclass
class Trace:
    """A traced callback list: the fused program, the scalar program that feeds it, and the state it leaves.

    ``slots[i]`` is the scalar program's entry for slot i. ``numbers`` is the new scalar state: an entry's index
    (``scalars.values`` has its value) or a flag. ``created`` are state buffers that did not exist; they start as
    zeros, or, for counts on the device, at ``starts``; ``asked`` is the dtype the user would see for each tensor.
    ``axes`` are the parameter's dimensions that each of the program's axes is, if it has several; ``contiguous`` says
    that kernels need them in their order, also where the parameter's memory has another. ``shared`` says that the
    program is the later steps' too. ``moved`` are the callbacks that did anything.

    ``rounds`` are the programs to run before: each stores what a parameter adds to some totals, and takes what it needs
    of those of the rounds before. All take their slots from the same ones, have the same axes if any, and no buffers
    that ``program`` does not have too, but for what calls are given: ``externs`` are the torch calls between programs.
    """

    signature: Signature
    program: Program
    scalars: ScalarProgram
    slots: tuple[int, ...]
    numbers: dict[str, Any]
    created: dict[str, Buffer]
    asked: dict[str, torch.dtype]
    axes: Axes = ()
    shared: bool = True
    starts: dict[str, float] = field(default_factory=dict)
    moved: frozenset[int] = frozenset()
    rounds: tuple[Program, ...] = ()
    externs: Externs | None = None

    @functools.cached_property
    def contiguous(self) -> bool:
        """Whether kernels need memory in the order of dimensions, and the parameter's may have another."""
        drawn = any(program.draws for program in (self.program, *self.rounds))
        if self.externs is not None or (drawn and not self.signature.in_order):
            return True
        if self.signature.line:
            return bool(self.axes) and dict(self.signature.attributes)[HERE_IN_ORDER] is not True
        old = [v for _, v in self.signature.state if isinstance(v, Buffer)]
        return in_memory(self.signature, [*old, *self.created.values()]) != list(self.signature.order)

    def lengths(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Those of the program's axes, for a parameter of this shape."""
        if self.program.blocked:
            return (*sizes(blocks(self.program.line), shape), self.program.line)
        return tuple(sizes(self.axes, self.signature.lengths(shape)))

    def slot_values(self) -> list[Scalar]:
        return [self.scalars.values[i] for i in self.slots]

    def new_numbers(self) -> dict[str, Any]:
        return {
            k: self.scalars.values[v.index] if isinstance(v, Number) else v for k, v in self.numbers.items()
        }

    def branches(self) -> dict[str, Scalar | bool]:
        """The outcome of every branch that callbacks took on numbers, by its expression."""
        return {self.scalars.expression(g.index): g.value for g in self.scalars.guards if g.where == "branch"}


def trace(
    callbacks: Sequence[Callback],
    signature: Signature,
    *args: Any,
    **kwargs: Any,
) -> Trace:
    """`traced`, for the first of the signatures that this may be which has a fused form; else the error of the one that
    went furthest."""
    last: BaseException | None = None
    furthest = (-1, False)
    for found in signature.resolved():
        try:
            return traced(callbacks, found, *args, **kwargs)
        except (Begins, NeedsAttribute):
            raise
        except (Untraceable, Exception) as error:
            # A callback by dimensions runs eagerly between those that encode and decode blocks, rather than these.
            blocks = isinstance(error, Unsuited) and error.blocks
            how_far = -1 if blocks else getattr(error, "callback", 0), not isinstance(error, Unsuited)
            if last is None or how_far > furthest:
                last, furthest = error, how_far
    assert last is not None
    raise last


def traced(
    callbacks: Sequence[Callback],
    signature: Signature,
    hyper: dict[str, Any],
    *,
    first: int = 0,
    state_dtype: torch.dtype | None = None,
    work: bool = False,
    keeps: bool = False,
    lasting: Sequence[bool] = (),
) -> Trace:
    """Trace ``callbacks`` (the optimizer's list from number ``first`` on) for parameters with this signature.

    State keys that are missing are traced twice: as they are, and with the new tensors as inputs. If the second,
    fed zeros, is the first, the first step and all later ones share a program, and the buffers start as zeros.
    Where steps may be skipped, a state flag on the device tells the two apart instead (see ``STARTED``); raises Begins
    where the state has one already, and more begins.
    ``work``: for work copies, between eager callbacks, so a changed gradient is stored and new state is not rounded.
    ``keeps``: other callbacks follow, so temporary values are stored, too.
    ``lasting``: of each callback, whether it finds constants around it alone, so that it has made all tensors itself.
    """
    graph, scalars = Graph(told_apart(signature)), ScalarProgram()
    calls = Calls(graph, signature.device, lasting)
    passes: list[Pass] = []

    def run(given: dict[str, Buffer], without: Sequence[str] = ()) -> dict[str, Any]:
        passes.append(Pass(callbacks, signature, hyper, graph, scalars, first, keeps, calls))
        return passes[-1].run(given, without)

    starts = _starts(callbacks, signature, hyper, first, lasting) if signature.modes.on_device else {}
    # As the next step will see it: see ``items.per_element``.
    count = Buffer(
        torch.float64, ELEMENT if signature.zero_dim and signature.param == torch.float64 else TENSOR
    )
    counts = dict.fromkeys(starts, count)
    flag = next((k for k, _ in signature.state if k.startswith(STARTED)), None)
    late = flag.removeprefix(STARTED).split(",") if flag else []
    a = run(counts, late)
    old = dict(signature.state)
    waits = bool(late) and not any(k in a for k in late)
    if waits:  # these callbacks start nothing: what is there stays as it is
        kept = {k: (load(graph, signature, f"state.{k}", old[k]), old[k]) for k in late if k in old}
        a |= {k: Cell(node, buffer.dtype, buffer.dims) for k, (node, buffer) in kept.items()}
    asked = {
        k: _asked_dtype(k, v, graph, signature, state_dtype)
        for k, v in a.items()
        if _is_new(k, v, signature) and k not in counts
    }
    created = {
        k: _created(a[k], graph, signature.compute if work else dtype, signature)
        for k, dtype in asked.items()
    }
    if flag and created:
        raise Begins
    if work:  # what callbacks have just made may have got another dtype, as a policy of storage gives it
        seen = {
            k: signature.seen(k, v) for k, v in old.items() if isinstance(v, Buffer) and v.kind == ELEMENT
        }
        cast = {k: v.asked for k, v in a.items() if isinstance(v, Cell) and v.asked != seen.get(k, v.asked)}
        codes = {k: v.asked for k, v in a.items() if isinstance(v, Cell) and v.asked in CODES}
        asked |= {k: dtype for k, dtype in (cast | codes).items() if dtype is not None}
    cells, shared = a, True
    if created or late:
        b = _again(run, counts | created)
        shared = not late and b is not None and _same_from_zeros(graph, calls, signature, a, b, created)
        if shared and b is not None:
            cells = b
        elif late or signature.modes.skips:
            flag = flag or STARTED + ",".join(created)
            cells = _until_started(graph, signature, flag, count, a, b, first, waits)
            created |= {} if late else {flag: count}
            shared = True
    created |= counts
    graded = work and not signature.modes.bare
    rounds: tuple[Program, ...] = ()
    externs = None
    if not calls.calls and not any(isinstance(k, Total) for k in cells):
        program, slots, axes = program_of(graph, signature, hyper, cells, created, materialize_grad=graded)
    else:
        try:
            program, rounds, slots, axes, externs = cut_up(
                graph, calls, signature, hyper, cells, created, graded
            )
        except Untraceable as error:
            error.callback = first  # type: ignore[attr-defined]
            raise
    numbers = {k: v for k, v in cells.items() if not isinstance(v, (Cell, Foreign, Matrix))}
    moved = frozenset(passes[0].moved)
    return Trace(
        signature,
        program,
        scalars,
        slots,
        numbers,
        created,
        asked,
        axes,
        shared,
        starts,
        moved,
        rounds,
        externs,
    )


def told_apart(signature: Signature) -> str:
    """Those that a trace tells apart."""
    return along(signature.dims) if signature.dims else BLOCKED if signature.line else "0"


def _again(run: Callable[..., dict[str, Any]], given: dict[str, Buffer]) -> dict[str, Any] | None:
    """The second trace, with the created buffers as inputs; None if it cannot be had."""
    try:
        return run(given)
    except (Untraceable, Exception):
        return None


def _starts(
    callbacks: Sequence[Callback],
    signature: Signature,
    hyper: dict[str, Any],
    first: int,
    lasting: Sequence[bool],
) -> dict[str, float]:
    """The numbers that callbacks leave in the state for the first time, and where they start: arguments' defaults."""
    graph = Graph(told_apart(signature))
    calls = Calls(graph, signature.device, lasting)
    cells = Pass(callbacks, signature, hyper, graph, ScalarProgram(), first, calls=calls).run(
        {}, counting=True
    )
    known = dict(signature.state)
    out = {}
    for key in (k for k, v in cells.items() if is_number(v) and k not in known and not is_temporary(k)):
        # Whoever takes it first starts it. What nobody takes is only written.
        i, default = next(
            ((i, arguments_of(cb)[key]) for i, cb in enumerate(callbacks) if key in arguments_of(cb)),
            (0, 0.0),
        )
        if type(default) not in (int, float):
            error = Untraceable(
                f"the number {key!r} in the state lives on the device, and needs a number as the default of the "
                f"argument {key!r} to start from"
            )
            error.callback = first + i  # type: ignore[attr-defined]
            raise error
        out[key] = float(default)
    return out


def _created(cell: Cell, graph: Graph, dtype: torch.dtype, signature: Signature) -> Buffer:
    kind, dims = graph.values[cell.node].kind, cell.shown
    if dims is None and is_partial(kind):
        dims = blocks(signature.line)
    elif dims is not None and signature.cut is not None:
        dims = uncut(dims, signature.cut)
    return Buffer(dtype, kind, dims)


def _is_new(key: Any, cell: Any, signature: Signature) -> bool:
    known = dict(signature.state).get(key)
    if isinstance(key, Total):
        return False
    return isinstance(cell, Cell) and key not in (PARAM, GRAD) and not isinstance(known, Buffer)


def _asked_dtype(
    key: str, cell: Cell, graph: Graph, signature: Signature, state_dtype: torch.dtype | None
) -> torch.dtype:
    """The dtype of new state: as asked, or the policy's; one number per tensor keeps the type it is computed in."""
    value = graph.values[cell.node]
    if cell.shown is None and is_partial(value.kind):  # the scales of blocks
        return cell.asked or signature.compute
    if value.kind != ELEMENT or cell.shown is not None:
        return torch.float64 if value.type == "d" else signature.compute
    # Made of a mask and numbers, it has torch's default.
    mixed = (signature.asked or (signature.param,))[0] if signature.zero_dim else torch.get_default_dtype()
    dtype = state_dtype or cell.asked or mixed
    return stored_dtype(dtype, signature.param, signature.zero_dim, signature.modes)


def _until_started(
    graph: Graph,
    signature: Signature,
    flag: str,
    buffer: Buffer,
    a: dict[str, Any],
    b: dict[str, Any] | None,
    first: int,
    waits: bool,
) -> dict[str, Any]:
    """Trace a until a step has not been skipped, and then trace b, by a flag on the device.

    ``waits``: these callbacks do not start what the flag is for, so it stays as it is.
    """
    if b is None or a.keys() != b.keys():
        error = Untraceable("its first step and the later ones differ by more than a select can tell apart")
        error.callback = first  # type: ignore[attr-defined]
        raise error
    now = load(graph, signature, f"state.{flag}", buffer)
    yes = graph.op("ne", now, graph.leaf("const", 0.0))
    if waits:
        return {k: either(graph, yes, b[k], a[k]) for k in b} | {flag: Cell(now, None)}
    one = graph.leaf("const", 1.0)
    started = Cell(graph.op("expand", one) if buffer.kind == ELEMENT else one, None)
    return {k: either(graph, yes, b[k], a[k]) for k in b} | {flag: started}


def _same_from_zeros(
    graph: Graph,
    calls: Calls,
    signature: Signature,
    a: dict[str, Any],
    b: dict[str, Any],
    created: dict[str, Buffer],
) -> bool:
    """Whether trace b, its created buffers read as zeros, is trace a."""
    replace = {}
    for k, buffer in created.items():
        loaded = load(graph, signature, f"state.{k}", buffer)
        zero = graph.leaf("const", 0.0, type=graph.values[loaded].type)
        to = None if buffer.kind == ELEMENT else buffer.kind
        replace[loaded] = graph.op("expand", zero, to=to) if buffer.kind != TENSOR else zero
    decoded = any(":" in k for k in created)  # by a policy of storage
    roots = [v.node for v in b.values() if isinstance(v, Cell)]
    for i in reachable(graph.values, roots):
        v = graph.values[i]
        if v.op == EXTERN:
            replace[i] = calls.again(i, replace)
        elif v.args:
            args = [replace.get(x, x) for x in v.args]
            replace[i] = _made_again(graph, v, args) if decoded else graph.op(v.op, *args, to=v.attr)
    return a.keys() == b.keys() and all(_same(calls, a[k], b[k], replace) for k in a)


def _made_again(graph: Graph, v: Value, args: list[int]) -> int:
    """The value of other arguments. What is made of constants alone, as new state decoded from zeros is, is one."""
    if v.op not in OPS or v.kind == TENSOR or v.type != "f":
        return graph.op(v.op, *args, to=v.attr)
    expanded = [graph.values[i] for i in args]
    numbers = [graph.values[x.args[0]] if x.op == "expand" else x for x in expanded]
    if v.op == "add_bits" and numbers[1].op == "const" and numbers[1].attr == 0:
        return args[0]
    if is_reduction(v.op) or any(x.op != "const" for x in numbers):
        return graph.op(v.op, *args, to=v.attr)
    types = {"f": torch.float32, "d": torch.float64, "b": torch.bool}
    constants = [torch.tensor(x.attr, dtype=types[x.type]) for x in numbers]
    made = graph.leaf("const", op_of(v.op).torch(*constants).item())
    return graph.op("expand", made, to=None if v.kind == ELEMENT else v.kind)


def _same(calls: Calls, a: Any, b: Any, replace: dict[int, int]) -> bool:
    if isinstance(b, Matrix):
        b = Matrix(calls.remade(b.ref, replace), b.asked)
    return alike(a, Cell(replace.get(b.node, b.node), b.asked, b.shown) if isinstance(b, Cell) else b)


def program_of(
    graph: Graph,
    signature: Signature,
    hyper: dict[str, Any],
    cells: dict[str, Any],
    created: dict[str, Buffer],
    materialize_grad: bool,
    axes: Axes | None = None,
    more: dict[str, Buffer] | None = None,
) -> tuple[Program, tuple[int, ...], Axes]:
    """The program for the final cells, in canonical numbering, the scalar entries of its slots, and its axes."""
    buffers = _buffers(signature, hyper, cells, created) | (more or {})
    skip = _skip(graph) if signature.modes.skips else None
    stores = _stores(signature, cells, created, materialize_grad)
    old = {k: v for k, v in signature.state if isinstance(v, Buffer)}
    dims = in_memory(signature, (old | created).values(), _draws(graph, cells))
    program, slots, axes = canonical(graph, signature.compute, buffers, stores, skip, axes=axes, dims=dims)
    program = replace(program, line=_line(signature, axes))
    return _optimized(program, tuple(v.where for v in program.values)), slots, axes


def _stores(
    signature: Signature, cells: dict[str, Any], created: dict[str, Buffer], materialize_grad: bool
) -> dict[str, int]:
    """What the program leaves in the end, by buffer."""
    stores: dict[str, int] = {"param": cells[PARAM].node}
    if materialize_grad:
        stores["grad"] = cells[GRAD].node
    old = {k: v for k, v in signature.state if isinstance(v, Buffer)}
    for key in sorted(old | created):
        if isinstance(cell := cells.get(key), Cell):
            stores[f"state.{key}"] = cell.node
    return stores


def _skip(graph: Graph) -> int:
    """Whether nothing is to be stored."""
    return graph.op("ne", graph.leaf("load", FOUND_INF), graph.leaf("const", 0.0))


def _buffers(
    signature: Signature, hyper: dict[str, Any], cells: dict[Any, Any], created: dict[str, Buffer]
) -> dict[str, Buffer]:
    """All that a program may read or write."""
    buffers = {"param": Buffer(signature.param, ELEMENT), "grad": Buffer(signature.grad, ELEMENT)}
    buffers |= {name: Buffer(torch.float32, TENSOR) for name in (FACTOR, FOUND_INF)}
    buffers |= {
        f"hyper.{k}": Buffer(v.dtype, TENSOR) for k, v in hyper.items() if isinstance(v, torch.Tensor)
    }
    buffers |= {str(k): BUFFER for k in cells if isinstance(k, Total)}
    old = {k: v for k, v in signature.state if isinstance(v, Buffer)}
    return buffers | {f"state.{key}": buffer for key, buffer in sorted((old | created).items())}


def cut_up(
    graph: Graph,
    calls: Calls,
    signature: Signature,
    hyper: dict[str, Any],
    cells: dict[Any, Any],
    created: dict[str, Buffer],
    materialize_grad: bool,
    depths: dict[Total, int] | None = None,
) -> tuple[Program, tuple[Program, ...], tuple[int, ...], Axes, Externs | None]:
    """The program, those of the rounds before it, the slots and axes of all of them, and the calls between them.

    cells: of a total that the parameter adds nothing to, None
    depths: which round each total is of, if that is known, and there are no calls
    """
    shares = {k: v.node for k, v in cells.items() if isinstance(k, Total) and isinstance(v, Cell)}
    everything = reachable(graph.values, [v.node for v in cells.values() if isinstance(v, Cell)])
    if depths is None:
        cells = cells | _handed(graph, calls, signature, cells)
        roots = _stores(signature, cells, created, materialize_grad)
        written = {k: v.ref for k, v in cells.items() if isinstance(v, Matrix) and v.ref != Kept(k)}
        shape = dict(signature.attributes).get("shape")
        known = _buffers(signature, hyper, cells, created)
        cuts = cut(graph, calls, roots.values(), shares, written, known, shape)
        if cuts.externs is not None:
            changing = frozenset(map(key_of, roots)) & cuts.externs.kept.keys()
            cuts.externs = replace(cuts.externs, changing=changing)
    else:
        cuts = Cuts(graph, _by_depth(shares, depths), {}, {known.share: BUFFER for known in shares})
    buffers = _buffers(signature, hyper, cells, created) | cuts.buffers
    old = {k: v for k, v in signature.state if isinstance(v, Buffer)}
    order = in_memory(signature, (old | created).values(), cuts.externs is not None or _draws(graph, cells))
    axes = axes_of(graph, everything, buffers, order)
    program, slots, _ = program_of(
        cuts.graph, signature, hyper, cells, created, materialize_grad, axes, cuts.buffers
    )
    rounds = []
    for stores in cuts.stores:
        with_theirs = buffers | {name: cuts.private[name] for name in stores}
        one, slots, _ = canonical(cuts.graph, signature.compute, with_theirs, stores, slots=slots, axes=axes)
        one = replace(one, line=_line(signature, axes))
        rounds.append(_optimized(one, tuple(v.where for v in one.values)))
    there = dict(buffer for one in (program, *rounds) for buffer in one.buffers)
    kept = tuple((name, there[name]) for name in buffers if name in there)
    externs = None if cuts.externs is None else numbered(cuts.externs, all_slots := list(slots))
    slots = slots if externs is None else tuple(all_slots)
    program = replace(program, slots=len(slots), buffers=kept)
    return program, tuple(replace(one, slots=len(slots)) for one in rounds), slots, axes, externs


def _handed(graph: Graph, calls: Calls, signature: Signature, cells: dict[Any, Any]) -> dict[Any, Matrix]:
    """State that becomes what a call gives, as it is, and that programs do not need: large tensors on a CPU."""
    shape = dict(signature.attributes).get("shape")
    found: dict[Any, Result] = {}
    for key, buffer in signature.state:
        cell = cells.get(key)
        if isinstance(cell, Cell) and isinstance(buffer, Buffer) and graph.values[cell.node].op == EXTERN:
            result = Result(graph.values[cell.node].attr)
            meta = calls.meta(result)
            same = buffer.kind == ELEMENT and meta.dtype == buffer.dtype == signature.compute
            if same and meta.shape == shape and alone(signature.device, meta.dtype, meta.shape):
                found[key] = result
    others = [cell.node for key, cell in cells.items() if isinstance(cell, Cell) and key not in found]
    needed = set(reachable(graph.values, others))
    return {key: Matrix(result, None) for key, result in found.items() if cells[key].node not in needed}


def _by_depth(shares: dict[Total, int], depths: dict[Total, int]) -> list[dict[str, int]]:
    found = sorted({depths[k] for k in shares})
    return [{k.share: node for k, node in shares.items() if depths[k] == depth} for depth in found]


@functools.lru_cache(maxsize=256)
def _optimized(program: Program, where: tuple[str, ...]) -> Program:
    """``where`` only tells equal programs of different callbacks apart."""
    return optimize(program)


def canonical(
    graph: Graph,
    compute: torch.dtype,
    buffers: dict[str, Buffer],
    stores: dict[str, int],
    skip: int | None = None,
    slots: Sequence[int] = (),
    axes: Axes | None = None,
    dims: Sequence[int] = (),
) -> tuple[Program, tuple[int, ...], Axes]:
    """Number the reachable values, the slots and the axes in order, so that equal structure is equal text.

    ``slots`` and ``axes``: those that have their numbers already. ``dims``: the parameter's dimensions as kernels walk
    them.
    """
    order = depth_first(graph.values, [*stores.values(), *([] if skip is None else [skip])])
    number = {old: new for new, old in enumerate(order)}
    found = (graph.values[i].attr for i in order if graph.values[i].op == "slot")
    slots = list(dict.fromkeys([*slots, *found]))
    if axes is None:
        axes = axes_of(graph, order, buffers, dims)

    def renamed(kind: Any) -> Any:
        if not isinstance(kind, str) or not is_partial(kind):
            return kind
        return "".join(str(a) for a, group in enumerate(axes) if str(group[0]) in kind)

    values = []
    for i in order:
        v = graph.values[i]
        attr = slots.index(v.attr) if v.op == "slot" else renamed(v.attr) if v.args else v.attr
        values.append(Value(v.op, tuple(number[a] for a in v.args), attr, renamed(v.kind), v.type, v.where))
    kept = tuple((n, number[i]) for n, i in stores.items())
    program = Program(
        compute,
        tuple((n, Buffer(b.dtype, renamed(b.kind))) for n, b in buffers.items()),
        tuple(values),
        kept,
        len(slots),
        None if skip is None else number[skip],
        max(len(axes), 1),
    )
    return program, tuple(slots), axes


def _line(signature: Signature, axes: Axes) -> int:
    """How many elements a program's lines have, if they are blocks."""
    line = signature.line
    return line if line and axes and axes[-1] == (int(told_apart(signature)[-1]),) else 0


def axes_of(graph: Graph, values: Iterable[int], buffers: dict[str, Buffer], dims: Sequence[int]) -> Axes:
    """The axes that these values and buffers need; ``dims`` are the parameter's dimensions as kernels walk them."""
    kinds = {graph.values[i].kind for i in values} | {b.kind for b in buffers.values()}
    return merged_axes(dims, kinds)


def _draws(graph: Graph, cells: dict[Any, Any]) -> bool:
    """Whether elements are numbered in the order of dimensions, for random numbers."""
    nodes = reachable(graph.values, [v.node for v in cells.values() if isinstance(v, Cell)])
    return any(graph.values[i].op in DRAWS for i in nodes)


def in_memory(signature: Signature, state: Iterable[Buffer], contiguous: bool = False) -> list[int]:
    """The order of dimensions that kernels walk: that of the parameter's memory, unless some state has another.

    contiguous: it has to be that of the dimensions, as tensors between programs have it
    """
    if signature.line:
        return list(map(int, told_apart(signature)))
    order = list(signature.order)
    if contiguous:
        return sorted(order)
    for buffer in state:
        mine = [d for group in buffer.dims or () for d in group]
        if mine != [d for d in order if d in mine]:
            return sorted(order)
    return order


def merged_axes(order: Sequence[int], kinds: Iterable[str]) -> Axes:
    """The dimensions of a parameter as axes: neighbours that no kind tells apart are one. None if no kind tells any."""
    partial = sorted(filter(is_partial, kinds))
    groups: list[list[int]] = []
    for d in order if partial else ():
        if groups and all((str(d) in kind) == (str(groups[-1][-1]) in kind) for kind in partial):
            groups[-1].append(d)
        else:
            groups.append([d])
    return tuple(map(tuple, groups))
