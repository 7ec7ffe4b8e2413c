"""Run a callback list once, on symbolic tensors, and keep what it did as a program.

A *signature* is all that the callbacks can see of a parameter apart from element values: dtypes, state keys, scalar
state. Parameters of one group with the same signature share a trace. ``trace`` raises ``Untraceable`` (its
``callback`` attribute says which) when a callback has no fused form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..callback import Callback, arguments_of
from ..ir.passes import optimize
from ..ir.program import Buffer, Graph, Program, depth_first, reachable
from . import methods  # noqa: F401  (fills the table of tensor methods)
from .number import Number, Scalar, ScalarProgram
from .signature import FACTOR, FOUND_INF, STARTED, Foreign, Opaque, Signature
from .tensor import SymParameter, SymTensor, Untraceable, lift

MAX_PATHS = 8
PARAM, GRAD = ".param", ".grad"
"""Cells of the parameter and its gradient, apart from state under any name, "grad" included."""


@dataclass(frozen=True)
class Cell:
    """The tensor value of a location: its node, and the dtype eager torch would have given it."""

    node: int
    asked: torch.dtype | None


@dataclass
class Trace:
    """A traced callback list: the fused program, the scalar program that feeds it, and the state it leaves.

    ``slots[i]`` is the scalar program's entry for slot i. ``numbers`` is the new scalar state: an entry's index
    (``scalars.values`` has its value) or a flag. ``created`` are state buffers that did not exist; they start as
    zeros, or, for counts on the device, at ``starts``; ``asked`` is the dtype the user would see for each tensor.
    ``shared`` says that the program is the later steps' too.
    """

    signature: Signature
    program: Program
    scalars: ScalarProgram
    slots: tuple[int, ...]
    numbers: dict[str, Any]
    created: dict[str, Buffer]
    asked: dict[str, torch.dtype]
    shared: bool = True
    starts: dict[str, float] = field(default_factory=dict)

    def slot_values(self) -> list[Scalar]:
        return [self.scalars.values[i] for i in self.slots]

    def new_numbers(self) -> dict[str, Any]:
        return {
            k: self.scalars.values[v.index] if isinstance(v, Number) else v for k, v in self.numbers.items()
        }

    def branches(self) -> dict[str, Scalar | bool]:
        """The outcome of every branch that callbacks took on numbers, by its expression."""
        return {self.scalars.expression(g.index): g.value for g in self.scalars.guards if g.where == "branch"}


class NeedsAttribute(BaseException):
    """A callback read a shape attribute that the signature does not hold yet: sign again with it."""

    def __init__(self, name: str) -> None:
        self.name = name


@dataclass
class Run:
    """One run of one callback along one path: what symbolic tensors need to build values."""

    graph: Graph
    scalars: ScalarProgram
    signature: Signature
    callback: int
    decisions: tuple[bool, ...] = ()
    conditions: list[int] = field(default_factory=list)
    taken: list[bool] = field(default_factory=list)
    raw: int = 0
    finished: bool = False

    @property
    def compute(self) -> torch.dtype:
        return self.signature.compute

    @property
    def device(self) -> torch.device:
        return self.signature.device

    def slot(self, x: Number | Scalar) -> int:
        """A number as a value. Plain numbers are told apart by where they occur, never by what they are."""
        if isinstance(x, Number) and x.program is self.scalars:
            return self.graph.leaf("slot", x.index)
        x = x.value if isinstance(x, Number) else x  # one kept from an earlier step is a plain number
        self.raw += 1
        return self.graph.leaf(
            "slot", self.scalars.entry(("raw", self.callback, tuple(self.taken), self.raw), x)
        )

    def constant(self, x: float) -> SymTensor:
        return SymTensor(self, self.graph.leaf("const", x), None)

    def branch(self, condition: SymTensor) -> bool:
        """The answer to ``if condition`` on this path; an unasked condition is taken as true first."""
        if self.finished:
            raise Untraceable("a branch on a tensor kept from another call of a callback")
        if condition.node in self.conditions:
            return self.taken[self.conditions.index(condition.node)]
        i = len(self.taken)
        answer = self.decisions[i] if i < len(self.decisions) else True
        self.conditions.append(condition.node)
        self.taken.append(answer)
        self.raw = 0
        return answer

    def attribute(self, kind: str, name: str) -> Any:
        if kind == "S":
            return {"shape": torch.Size(()), "ndim": 0, "count": 1, "itemsize": self.compute.itemsize}[name]
        known = dict(self.signature.attributes)
        if name not in known:
            raise NeedsAttribute(name)
        return known[name]


def trace(
    callbacks: Sequence[Callback],
    signature: Signature,
    hyper: dict[str, Any],
    *,
    first: int = 0,
    state_dtype: torch.dtype | None = None,
    work: bool = False,
) -> Trace:
    """Trace ``callbacks`` (the optimizer's list from number ``first`` on) for parameters with this signature.

    State keys that are missing are traced twice: as they are, and with the new tensors as inputs. If the second,
    fed zeros, is the first, the first step and all later ones share a program, and the buffers start as zeros.
    Where steps may be skipped, a state flag on the device tells the two apart instead (see ``STARTED``).
    ``work``: for work copies, between eager callbacks, so a changed gradient is stored and new state is not rounded.
    """
    graph, scalars = Graph(), ScalarProgram()

    def run(given: dict[str, Buffer], without: Sequence[str] = ()) -> dict[str, Any]:
        return _Pass(callbacks, signature, hyper, graph, scalars, first).run(given, without)

    starts = _starts(callbacks, signature, hyper, first) if signature.modes.on_device else {}
    # As the next step will see it: see ``items.per_element``.
    count = Buffer(torch.float64, "F" if signature.zero_dim and signature.param == torch.float64 else "S")
    counts = dict.fromkeys(starts, count)
    flag = next((k for k, _ in signature.state if k.startswith(STARTED)), None)
    late = flag.removeprefix(STARTED).split(",") if flag else []
    a = run(counts, late)
    asked = {
        k: _asked_dtype(k, v, graph, signature, state_dtype)
        for k, v in a.items()
        if _is_new(k, v, signature) and k not in counts
    }
    created = {
        k: Buffer(signature.compute if work else dtype, graph.values[a[k].node].kind)
        for k, dtype in asked.items()
    }
    cells, shared = a, True
    if created or late:
        b = _again(run, counts | created)
        shared = not late and b is not None and _same_from_zeros(graph, signature, a, b, created)
        if shared and b is not None:
            cells = b
        elif late or signature.modes.skips:
            flag = flag or STARTED + ",".join(created)
            cells = _either(graph, signature, flag, count, a, b, first)
            created |= {} if late else {flag: count}
            shared = True
    created |= counts
    program, slots = _program(graph, signature, hyper, cells, created, materialize_grad=work)
    numbers = {k: v for k, v in cells.items() if not isinstance(v, (Cell, Foreign))}
    return Trace(signature, program, scalars, slots, numbers, created, asked, shared, starts)


def _again(run: Callable[..., dict[str, Any]], given: dict[str, Buffer]) -> dict[str, Any] | None:
    """The second trace, with the created buffers as inputs; None if it cannot be had."""
    try:
        return run(given)
    except (Untraceable, Exception):
        return None


def _starts(
    callbacks: Sequence[Callback], signature: Signature, hyper: dict[str, Any], first: int
) -> dict[str, float]:
    """The numbers that callbacks leave in the state for the first time, and where they start: arguments' defaults."""
    cells = _Pass(callbacks, signature, hyper, Graph(), ScalarProgram(), first).run({}, counting=True)
    known = dict(signature.state)
    out = {}
    for key in (k for k, v in cells.items() if _is_number(v) and k not in known):
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


def _is_number(x: Any) -> bool:
    return isinstance(x, Number) or type(x) in (int, float)


def _is_new(key: str, cell: Any, signature: Signature) -> bool:
    known = dict(signature.state).get(key)
    return isinstance(cell, Cell) and key not in (PARAM, GRAD) and not isinstance(known, Buffer)


def _asked_dtype(
    key: str, cell: Cell, graph: Graph, signature: Signature, state_dtype: torch.dtype | None
) -> torch.dtype:
    """The dtype of new state: as asked, or the policy's; one number per tensor keeps the type it is computed in."""
    value = graph.values[cell.node]
    if value.kind == "S":
        return torch.float64 if value.type == "d" else signature.compute
    return state_dtype or cell.asked or (signature.asked or (signature.param,))[0]


def _load(graph: Graph, signature: Signature, name: str, buffer: Buffer) -> int:
    wide = buffer.kind == "S" and buffer.dtype == torch.float64 != signature.compute
    return graph.leaf("load", name, kind=buffer.kind, type="d" if wide else "f")


def _either(
    graph: Graph,
    signature: Signature,
    flag: str,
    buffer: Buffer,
    a: dict[str, Any],
    b: dict[str, Any] | None,
    first: int,
) -> dict[str, Any]:
    """Trace a until a step has not been skipped, and then trace b, by a flag on the device."""
    if b is None or a.keys() != b.keys():
        error = Untraceable("its first step and the later ones differ by more than a select can tell apart")
        error.callback = first  # type: ignore[attr-defined]
        raise error
    yes = graph.op("ne", _load(graph, signature, f"state.{flag}", buffer), graph.leaf("const", 0.0))
    one = graph.leaf("const", 1.0)
    started = Cell(graph.op("expand", one) if buffer.kind == "F" else one, None)
    return {k: _select(graph, yes, b[k], a[k]) for k in b} | {flag: started}


def _same_from_zeros(
    graph: Graph, signature: Signature, a: dict[str, Any], b: dict[str, Any], created: dict[str, Buffer]
) -> bool:
    """Whether trace b, its created buffers read as zeros, is trace a."""
    replace = {}
    for k, buffer in created.items():
        load = _load(graph, signature, f"state.{k}", buffer)
        zero = graph.leaf("const", 0.0, type=graph.values[load].type)
        replace[load] = graph.op("expand", zero) if buffer.kind == "F" else zero
    roots = [v.node for v in b.values() if isinstance(v, Cell)]
    for i in reachable(graph.values, roots):
        v = graph.values[i]
        if v.args:
            replace[i] = graph.op(v.op, *[replace.get(x, x) for x in v.args])
    return a.keys() == b.keys() and all(_same(a[k], b[k], replace) for k in a)


def _same(a: Any, b: Any, replace: dict[int, int]) -> bool:
    if isinstance(a, Cell) and isinstance(b, Cell):
        return a.node == replace.get(b.node, b.node)
    if isinstance(a, Number) and isinstance(b, Number):
        return a.index == b.index
    return a is b or (type(a) is type(b) and bool(a == b))


class _Pass:
    """One pass over the callback list. ``cells`` maps PARAM, GRAD and state keys to a Cell, Number or flag."""

    def __init__(
        self,
        callbacks: Sequence[Callback],
        signature: Signature,
        hyper: dict[str, Any],
        graph: Graph,
        scalars: ScalarProgram,
        first: int,
    ) -> None:
        self.callbacks, self.signature, self.first = callbacks, signature, first
        self.graph, self.scalars = graph, scalars
        self.hyper = {k: self._hyper(k, v) for k, v in hyper.items()}

    def _hyper(self, name: str, value: Any) -> Any:
        """A number, or the cell of a tensor that kernels read."""
        if isinstance(value, torch.Tensor):
            buffer = Buffer(value.dtype, "S")
            return Cell(_load(self.graph, self.signature, f"hyper.{name}", buffer), value.dtype)
        return self._number(("hyper", name), value)

    def run(
        self, given: dict[str, Buffer], without: Sequence[str] = (), counting: bool = False
    ) -> dict[str, Any]:
        """Trace every callback. ``given`` are state buffers to feed in addition to the signature's, less ``without``.

        ``counting``: leave numbers in the state numbers, even if they belong on the device.
        """
        s = self.signature
        asked = s.asked or (s.param, s.grad)
        grad = self.graph.leaf("load", "grad", kind="F")
        if s.modes.scaled:
            factor = self.graph.leaf("load", FACTOR)
            grad = self.graph.op("mul", grad, factor, where=lambda: "scaling")
        cells: dict[str, Any] = {
            PARAM: Cell(self.graph.leaf("load", "param", kind="F"), asked[0]),
            GRAD: Cell(grad, asked[1]),
        }
        for key, value in (dict(s.state) | given).items():
            if key in without or key.startswith(STARTED):
                continue
            if isinstance(value, Buffer):
                cells[key] = Cell(_load(self.graph, s, f"state.{key}", value), value.dtype)
            elif type(value) in (int, float):
                cells[key] = self._number(("state", key), value)
            else:
                cells[key] = value.value if isinstance(value, Opaque) else value
        for i, callback in enumerate(self.callbacks):
            try:
                cells = self._all_paths(i, callback, cells)
                self._check_kinds(cells)
            except (Untraceable, Exception) as error:
                error.callback = self.first + i  # type: ignore[union-attr]
                raise
        if s.modes.on_device and not counting:
            cells = {k: self._on_device(v) if _is_number(v) else v for k, v in cells.items()}
        return self._per_element(cells) if s.zero_dim else cells

    def _on_device(self, x: Any) -> Cell:
        """A number as a value that a kernel can store."""
        index = x.index if isinstance(x, Number) else self.scalars.entry(("const", type(x).__name__, x), x)
        wide = self.signature.compute != torch.float64
        return Cell(self.graph.leaf("slot", index, type="d" if wide else "f"), torch.float64)

    def _per_element(self, cells: dict[str, Any]) -> dict[str, Any]:
        """For a 0-d parameter all state is one number per element: the next step could not tell it apart."""

        def per_element(cell: Any) -> Any:
            value = self.graph.values[cell.node] if isinstance(cell, Cell) else None
            whole = value is not None and value.kind == "S" and value.type == "f"
            return Cell(self.graph.op("expand", cell.node), cell.asked) if whole else cell

        return {key: per_element(cell) for key, cell in cells.items()}

    def _check_kinds(self, cells: dict[str, Any]) -> None:
        """State is floating point and keeps its kind. For a 0-d parameter everything is one number per element."""
        for key, cell in cells.items():
            if isinstance(cell, Cell) and self.graph.values[cell.node].type == "b":
                raise Untraceable(f"the state {key!r} is a mask; fused state is floating point")
        for key, buffer in self.signature.state:
            cell = cells.get(key)
            if isinstance(buffer, Buffer) and isinstance(cell, Cell):
                value = self.graph.values[cell.node]
                if value.kind != buffer.kind and self.signature.zero_dim:
                    cells[key] = Cell(self.graph.op("expand", cell.node), cell.asked)
                elif value.kind != buffer.kind:
                    raise Untraceable(
                        f"the state {key!r} changes between one number per element and one per tensor"
                    )

    def _number(self, key: tuple, value: Any) -> Any:
        if type(value) in (int, float):
            return self.scalars.number(key, value)
        if type(value) in (tuple, list):
            return type(value)(self._number((*key, i), v) for i, v in enumerate(value))
        return value

    def _all_paths(self, i: int, callback: Callback, cells: dict[str, Any]) -> dict[str, Any]:
        """Run the callback along every path through its branches on S values, and merge the outcomes by select."""
        outcomes: dict[tuple[bool, ...], tuple[Run, dict[str, Any]]] = {}
        todo: list[tuple[bool, ...]] = [()]
        while todo:
            run = Run(self.graph, self.scalars, self.signature, i, todo.pop())
            after = self._one_path(run, callback, dict(cells))
            taken = tuple(run.taken)
            outcomes[taken] = run, after
            todo += [(*taken[:k], not taken[k]) for k in range(len(run.decisions), len(taken))]
            if len(outcomes) + len(todo) > MAX_PATHS:
                raise Untraceable(f"more than {MAX_PATHS} paths through branches on norms and means")
        return self._merge(outcomes, ())

    def _one_path(self, run: Run, callback: Callback, cells: dict[str, Any]) -> dict[str, Any]:
        boxes = {k: SymTensor(run, v.node, v.asked) for k, v in cells.items() if isinstance(v, Cell)}
        p = SymParameter(run, cells[PARAM].node, cells[PARAM].asked, boxes[GRAD])
        state = {k: boxes.get(k, v) for k, v in cells.items() if k not in (PARAM, GRAD)}
        given = state | {
            k: SymTensor(run, v.node, v.asked) if isinstance(v, Cell) else v for k, v in self.hyper.items()
        }
        # Default numbers are handed in, so that those of ``step=0`` are recorded too.
        for name, value in arguments_of(callback).items():
            if name not in given and type(value) in (int, float):
                given[name] = self._number(("default", run.callback, name), value)
        returned = callback(p, **given)
        run.finished = True
        cells[PARAM], cells[GRAD] = Cell(p.node, p.asked), Cell(p.grad.node, p.grad.asked)
        for key in state:
            if key in boxes:
                cells[key] = Cell(boxes[key].node, boxes[key].asked)
        for key, value in returned.items() if isinstance(returned, dict) else ():
            cells[key] = self._returned(run, key, value)
        return cells

    def _returned(self, run: Run, key: str, value: Any) -> Any:
        if isinstance(value, SymTensor):
            value = lift(run, value)
            return Cell(value.node, value.asked)
        if isinstance(value, Number) and value.program is not self.scalars:
            return value.value
        if isinstance(value, torch.Tensor):
            raise Untraceable(
                f"the state {key!r} is a tensor not made from the parameter, its gradient or its state"
            )
        if value is not None and not isinstance(value, (Number, int, float, bool, str, Foreign)):
            raise Untraceable(f"the state {key!r} is a {type(value).__name__}")
        return value

    def _merge(
        self, outcomes: dict[tuple[bool, ...], tuple[Run, dict[str, Any]]], path: tuple[bool, ...]
    ) -> dict[str, Any]:
        if path in outcomes:
            return outcomes[path][1]
        run = next(run for taken, (run, _) in outcomes.items() if taken[: len(path)] == path)
        yes, no = self._merge(outcomes, (*path, True)), self._merge(outcomes, (*path, False))
        if yes.keys() != no.keys():
            raise Untraceable("a branch on a norm or mean decides which state there is")
        condition = run.conditions[len(path)]
        return {k: _select(self.graph, condition, yes[k], no[k], run.slot) for k in yes}


def _select(graph: Graph, condition: int, yes: Any, no: Any, slot: Callable[[Any], int] | None = None) -> Any:
    """The cell of either, by a condition on the device; ``slot`` makes values of numbers."""
    if yes is no or (isinstance(yes, Cell) and isinstance(no, Cell) and yes.node == no.node):
        return yes
    if isinstance(yes, Number) and isinstance(no, Number) and yes.index == no.index:
        return yes
    if not isinstance(yes, (Cell, Number)) and type(yes) is type(no) and yes == no:
        return yes
    nodes = [
        x.node if isinstance(x, Cell) else slot(x) if slot and _is_number(x) else None for x in (yes, no)
    ]
    if nodes[0] is None or nodes[1] is None:
        raise Untraceable("a branch on a norm or mean decides about a flag in the state")
    return Cell(select(graph, condition, nodes[0], nodes[1]), _asked(yes, no))


def _asked(a: Any, b: Any) -> torch.dtype | None:
    return a.asked if isinstance(a, Cell) else b.asked if isinstance(b, Cell) else None


def select(graph: Graph, condition: int, yes: int, no: int) -> int:
    """``where(condition, yes, no)``, moved down past what both sides share: ``p + s * where(c, q, 1)``."""
    if yes == no:
        return yes
    a, b = graph.values[yes], graph.values[no]
    if a.op == b.op and a.args and a.kind == b.kind == "F":
        different = [k for k, (x, y) in enumerate(zip(a.args, b.args, strict=True)) if x != y]
        if len(different) == 1 and graph.values[a.args[different[0]]].type == "f":
            k = different[0]
            args = list(a.args)
            args[k] = select(graph, condition, a.args[k], b.args[k])
            return graph.op(a.op, *args, where=lambda: a.where)
    return graph.op("where", condition, yes, no, where=lambda: a.where or b.where)


def _program(
    graph: Graph,
    signature: Signature,
    hyper: dict[str, Any],
    cells: dict[str, Any],
    created: dict[str, Buffer],
    materialize_grad: bool,
) -> tuple[Program, tuple[int, ...]]:
    """The program for the final cells, in canonical numbering, and the scalar entries of its slots."""
    buffers = {"param": Buffer(signature.param, "F"), "grad": Buffer(signature.grad, "F")}
    buffers |= {name: Buffer(torch.float32, "S") for name in (FACTOR, FOUND_INF)}
    buffers |= {f"hyper.{k}": Buffer(v.dtype, "S") for k, v in hyper.items() if isinstance(v, torch.Tensor)}
    found = graph.leaf("load", FOUND_INF)
    skip = graph.op("ne", found, graph.leaf("const", 0.0)) if signature.modes.skips else None
    stores: dict[str, int] = {"param": cells[PARAM].node}
    if materialize_grad:
        stores["grad"] = cells[GRAD].node
    old = {k: v for k, v in signature.state if isinstance(v, Buffer)}
    for key, buffer in sorted((old | created).items()):
        buffers[f"state.{key}"] = buffer
        if isinstance(cells[key], Cell):
            stores[f"state.{key}"] = cells[key].node
    program, slots = canonical(graph, signature.compute, buffers, stores, skip)
    return _optimized(program, tuple(v.where for v in program.values)), slots


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
) -> tuple[Program, tuple[int, ...]]:
    """Number the reachable values and the slots in order, so that equal structure is equal text."""
    order = depth_first(graph.values, [*stores.values(), *([] if skip is None else [skip])])
    number = {old: new for new, old in enumerate(order)}
    slots = list(dict.fromkeys(graph.values[i].attr for i in order if graph.values[i].op == "slot"))
    values = []
    for i in order:
        v = graph.values[i]
        attr = slots.index(v.attr) if v.op == "slot" else v.attr
        values.append(type(v)(v.op, tuple(number[a] for a in v.args), attr, v.kind, v.type, v.where))
    kept = tuple((n, number[i]) for n, i in stores.items())
    program = Program(
        compute,
        tuple(buffers.items()),
        tuple(values),
        kept,
        len(slots),
        None if skip is None else number[skip],
    )
    return program, tuple(slots)
