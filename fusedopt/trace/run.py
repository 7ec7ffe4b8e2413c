"""One run of a callback list on symbolic tensors: what each location holds in the end.

A callback is run once along every path through its branches on S values; the outcomes are merged by select.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..callback import Callback, arguments_of, call, is_temporary
from ..ir.ops import ELEMENT, OPS, TENSOR
from ..ir.program import Buffer, Graph
from . import axes, methods  # noqa: F401  (fills the table of tensor methods)
from .axes import Dims
from .number import Number, Scalar, ScalarProgram
from .signals import Changes, NeedsAttribute, Starts, Untraceable, latest, where_now
from .signature import FACTOR, STARTED, Foreign, Opaque, Signature
from .standins import StandIns
from .tensor import FLOATS, Place, SymParameter, SymTensor, expand, is_extern, lift
from .totals import Total

MAX_PATHS = 8
PARAM, GRAD = ".param", ".grad"
"""Cells of the parameter and its gradient, apart from state under any name, "grad" included."""


@dataclass(frozen=True)
class Cell:
    """The tensor value of a location: its node, the dtype eager torch would have given it, and its dimensions."""

    node: int
    asked: torch.dtype | None
    shown: Dims | None = None


@dataclass(frozen=True)
class Matrix:
    """The tensor of a location that no fused program has: what torch calls give, or the state that it was."""

    ref: Any
    asked: torch.dtype | None


@dataclass
class Run:
    """One run of one callback along one path: what symbolic tensors need to build values.

    ``callback`` is counted from number ``first`` of the optimizer's list on; ``totals`` are its shares of these.
    ``calls``: where torch calls that have no fused form are recorded (see externs.py); None if they may not be made.
    ``spots``: weak references to where results of those are; ``lent``: the places whose memory calls were given.
    ``constants``: whether plain numbers are the program's own, as they are, because they never change.
    """

    graph: Graph
    scalars: ScalarProgram
    signature: Signature
    callback: int
    decisions: tuple[bool, ...] = ()
    first: int = 0
    totals: list[int] = field(default_factory=list)
    conditions: list[int] = field(default_factory=list)
    taken: list[bool] = field(default_factory=list)
    raw: int = 0
    constants: bool = False
    finished: bool = False
    calls: Any = None
    spots: list[Any] = field(default_factory=list)
    lent: dict[Any, Any] = field(default_factory=dict)

    where = staticmethod(where_now)
    """What is said of the code that a new value comes from."""

    def new_place(self, node: int, asked: torch.dtype | None) -> Place:
        return Place(node, asked)

    @property
    def compute(self) -> torch.dtype:
        return self.signature.compute

    @property
    def device(self) -> torch.device:
        return self.signature.device

    def slot(self, x: Number | Scalar) -> int:
        """A number as a value. Plain numbers are told apart by where they occur, not by what they are."""
        if isinstance(x, Number) and x.program is self.scalars:
            return self.graph.leaf("slot", x.index)
        x = x.value if isinstance(x, Number) else x  # one kept from an earlier step is a plain number
        x = x.item() if isinstance(x, np.generic) else x  # which the extension knows
        if self.constants:
            return self.graph.leaf("const", float(x))
        self.raw += 1
        key = "raw", self.callback, tuple(self.taken), self.raw
        index = self.scalars.entry(key, x)
        if repr(self.scalars.values[index]) != repr(
            x
        ):  # the first step has another number there than later ones
            index = self.scalars.entry((*key, repr(x)), x)
        return self.graph.leaf("slot", index)

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
        if kind == TENSOR:
            return {"shape": torch.Size(()), "ndim": 0, "count": 1, "contiguous": True}[name]
        known = dict(self.signature.attributes)
        if name == "dims":
            self.signature.need_dims()
            if self.signature.line and known[name] is None:
                raise self.signature.unsuited(self.callback)
        if name not in known:
            raise NeedsAttribute(name)
        if name == "dims" and known[name] is None:
            raise Untraceable(f"a reduction along dimensions of a tensor with more than {axes.MOST}")
        return known[name]

    def lengths(self) -> Sequence[int]:
        """Those of the dimensions that are told apart."""
        return self.signature.lengths(self.attribute(ELEMENT, "shape"))


class Pass:
    """One pass over the callback list. ``cells`` maps PARAM, GRAD and state keys to a Cell, Number or flag.

    ``moved`` are the callbacks that did anything, ``totals`` the cells of what the parameter adds to each; ``keeps``:
    others follow, which temporary values are kept for.
    """

    def __init__(
        self,
        callbacks: Sequence[Callback],
        signature: Signature,
        hyper: dict[str, Any],
        graph: Graph,
        scalars: ScalarProgram,
        first: int,
        keeps: bool = False,
        calls: Any = None,
    ) -> None:
        self.callbacks, self.signature, self.first, self.keeps = callbacks, signature, first, keeps
        self.calls = calls
        self.stand_ins = list(map(StandIns().callback, callbacks))
        self.graph, self.scalars = graph, scalars
        self.lists: dict[str, tuple[list[Any], tuple[Any, ...]]] = {}
        self.hyper = {k: self._hyper(k, v) for k, v in hyper.items()}
        self.moved: set[int] = set()
        self.totals: dict[Any, Cell] = {}

    def _hyper(self, name: str, value: Any) -> Any:
        """A number, or the cell of a tensor that kernels read."""
        if isinstance(value, torch.Tensor):
            buffer = Buffer(value.dtype, TENSOR)
            return Cell(load(self.graph, self.signature, f"hyper.{name}", buffer), value.dtype)
        return self._number(("hyper", name), value)

    def run(
        self, given: dict[str, Buffer], without: Sequence[str] = (), counting: bool = False
    ) -> dict[str, Any]:
        """Trace every callback. ``given`` are state buffers to feed in addition to the signature's, less ``without``.

        ``counting``: leave numbers in the state numbers, even if they belong on the device.
        """
        s = self.signature
        asked = s.asked or (s.param, s.grad, ())
        grad = self.graph.leaf("load", "grad", kind=ELEMENT)
        if s.modes.scaled:
            factor = self.graph.leaf("load", FACTOR)
            grad = self.graph.op("mul", grad, factor, where=lambda: "scaling")
        cells: dict[str, Any] = {
            PARAM: Cell(self.graph.leaf("load", "param", kind=ELEMENT), asked[0]),
            GRAD: Cell(grad, asked[1]),
        }
        for key, value in (dict(s.state) | given).items():
            if key in without or key.startswith(STARTED):
                continue
            if isinstance(value, Buffer):
                shown = None if axes.is_blocks(value.dims) else s.shown(value.dims)
                if shown is not None:
                    s.need_dims()
                cells[key] = Cell(load(self.graph, s, f"state.{key}", value), s.seen(key, value), shown)
            elif isinstance(value, Foreign) and value.dtype in FLOATS and self.calls is not None:
                asked_for = seen if (seen := s.seen(key, value)) != s.compute else None
                cells[key] = Matrix(self.calls.keep(key, s.compute, value.shape), asked_for)
            elif type(value) in (int, float):
                cells[key] = self._number(("state", key), value)
            else:
                cells[key] = value.value if isinstance(value, Opaque) else value
        for i, callback in enumerate(self.callbacks):
            try:
                before, cells = cells, self._all_paths(i, callback, cells)
                self._check_kinds(cells)
            except (Untraceable, Exception) as error:
                error.callback = self.first + i  # type: ignore[union-attr]
                raise
            if before.keys() != cells.keys() or any(not alike(before[k], v) for k, v in cells.items()):
                self.moved.add(self.first + i)
        if not self.keeps:
            ours = {k for k in cells if is_temporary(k) or k.partition(":")[0] in s.modes.given}
            cells = {k: v for k, v in cells.items() if k not in ours}
        if s.modes.on_device and not counting:
            stays = {k for k, v in cells.items() if not is_number(v) or is_temporary(k)}
            cells = {k: v if k in stays else self._on_device(v) for k, v in cells.items()}
        return (self._per_element(cells) if s.zero_dim else cells) | self.totals

    def _on_device(self, x: Any) -> Cell:
        """A number as a value that a kernel can store."""
        index = x.index if isinstance(x, Number) else self.scalars.constant(x)
        wide = self.signature.compute != torch.float64
        return Cell(self.graph.leaf("slot", index, type="d" if wide else "f"), torch.float64)

    def _per_element(self, cells: dict[str, Any]) -> dict[str, Any]:
        """For a 0-d parameter all state is one number per element: the next step could not tell it apart."""

        def per_element(cell: Any) -> Any:
            value = self.graph.values[cell.node] if isinstance(cell, Cell) else None
            whole = value is not None and value.kind == TENSOR and value.type == "f"
            return Cell(self.graph.op("expand", cell.node), cell.asked) if whole else cell

        return {key: per_element(cell) for key, cell in cells.items()}

    def _check_kinds(self, cells: dict[str, Any]) -> None:
        """State is floating point and keeps its kind. For a 0-d parameter everything is one number per element."""
        for key, cell in cells.items():
            handed = is_temporary(key) and not self.keeps
            if isinstance(cell, Cell) and self.graph.values[cell.node].type == "b" and not handed:
                raise Untraceable(f"the state {key!r} is a mask; fused state is floating point")
        for key, buffer in self.signature.state:
            cell = cells.get(key)
            if isinstance(buffer, Buffer) and isinstance(cell, Cell):
                value = self.graph.values[cell.node]
                if value.kind != buffer.kind and self.signature.zero_dim:
                    cells[key] = Cell(self.graph.op("expand", cell.node), cell.asked)
                elif value.kind != buffer.kind or (
                    cell.shown != self.signature.shown(buffer.dims) and not axes.is_blocks(buffer.dims)
                ):
                    raise Untraceable(f"the state {key!r} changes its shape")

    def _number(self, key: tuple[Any, ...], value: Any) -> Any:
        if type(value) in (int, float):
            return self.scalars.number(key, value)
        if type(value) not in (tuple, list):
            return value
        numbers = type(value)(self._number((*key, i), v) for i, v in enumerate(value))
        if type(value) is list:
            self.lists[key[1]] = numbers, (*numbers,)
        return numbers

    def _all_paths(self, i: int, callback: Callback, cells: dict[str, Any]) -> dict[str, Any]:
        """Run the callback along every path through its branches on S values, and merge the outcomes by select."""
        outcomes: Outcomes = {}
        todo: list[tuple[bool, ...]] = [()]
        while todo:
            run = Run(self.graph, self.scalars, self.signature, i, todo.pop(), self.first, calls=self.calls)
            try:
                after = self._one_path(run, callback, dict(cells))
            except Exception as error:
                if not run.taken:
                    raise
                what = f"{type(error).__name__}{': ' if str(error) else ''}{error}"
                raise Untraceable(
                    f"a branch that a tensor decides may end in {what}",
                    "a kernel raises nothing: ask and raise outside of the callback",
                ) from error
            taken = tuple(run.taken)
            outcomes[taken] = run, after
            todo += [(*taken[:k], not taken[k]) for k in range(len(run.decisions), len(taken))]
            if len(outcomes) + len(todo) > MAX_PATHS:
                raise Untraceable(f"more than {MAX_PATHS} paths through branches on norms and means")
        return self._with_totals_apart(merged(self.graph, with_totals(self.graph, outcomes)))

    def _with_totals_apart(self, cells: dict[Any, Any]) -> dict[str, Any]:
        self.totals |= {key: cells.pop(key) for key in list(cells) if isinstance(key, Total)}
        return cells

    def _one_path(self, run: Run, callback: Callback, cells: dict[str, Any]) -> dict[str, Any]:
        boxes = {k: SymTensor(run, v.node, v.asked, v.shown) for k, v in cells.items() if isinstance(v, Cell)}
        grad = None if self.signature.modes.bare else boxes[GRAD]
        matrices = {
            k: self.calls.tensor(run, v.ref, v.asked) for k, v in cells.items() if isinstance(v, Matrix)
        }
        boxes |= matrices
        p = SymParameter(run, cells[PARAM].node, cells[PARAM].asked, grad)
        state = {k: boxes.get(k, v) for k, v in cells.items() if k not in (PARAM, GRAD)}
        given = state | {
            k: SymTensor(run, v.node, v.asked) if isinstance(v, Cell) else v for k, v in self.hyper.items()
        }
        # Default numbers are handed in, so that those of ``step=0`` are recorded too.
        for name, value in arguments_of(callback).items():
            if name not in given and type(value) in (int, float):
                given[name] = self._number(("default", run.callback, name), value)
        latest()
        try:
            returned = call(self.stand_ins[run.callback], p, given)
        finally:
            run.finished = True
        if (signal := latest()) is not None:  # the callback has caught it, and gone on
            raise signal
        for name, (numbers, were) in self.lists.items():
            if len(numbers) != len(were) or any(x is not y for x, y in zip(numbers, were, strict=True)):
                raise Changes(f"the hyperparameter {name!r} is a list, which is changed")
        cells[PARAM] = Cell(p.node, p.asked)
        if grad is not None:
            cells[GRAD] = Cell(p.grad.node, p.grad.asked)
        for key in state:
            if key in matrices:
                cells[key] = Matrix(matrices[key].spot.ref, matrices[key].spot.asked)
            elif key in boxes:
                cells[key] = Cell(boxes[key].node, boxes[key].asked, cells[key].shown)
        for key, value in returned.items() if isinstance(returned, dict) else ():
            cells[key] = self._returned(run, key, value)
        return cells

    def _matrix(self, key: str, known: Any, value: Any) -> Matrix:
        """State that goes along no dimensions of the parameter."""
        if isinstance(known, Foreign) and known.shape == value.shape:
            return Matrix(value.spot.ref, value.spot.asked)
        if known is not None:
            raise Untraceable(f"the state {key!r} changes its shape")
        raise Starts(f"the state {key!r} is a new tensor that goes along no dimensions of the parameter")

    def _returned(self, run: Run, key: str, value: Any) -> Any:
        known = dict(self.signature.state).get(key)
        if isinstance(known, Foreign) and isinstance(value, SymTensor) and self.calls is not None:
            value = self.calls.cast(value, self.signature.compute)
        if is_extern(value) and isinstance(known, Buffer) and known.dims and value.fits(known.dims):
            # Also where sizes alone do not tell which these are.
            value = value.leave(self.signature.shown(known.dims))
        if is_extern(value) and (isinstance(known, Foreign) or not value.leaves):
            return self._matrix(key, known, value)
        if isinstance(value, SymTensor) or is_extern(value):
            value = lift(run, value)
            if value.shown is not None and value.dims == self.signature.dims:  # the parameter's own shape
                value = expand(value) if value.kind != ELEMENT else value
                return Cell(value.node, value.asked)
            return Cell(value.node, value.asked, value.shown and value.dims)
        if isinstance(value, Number) and value.program is not self.scalars:
            return value.value
        if isinstance(value, torch.Tensor):
            made = self.calls is not None and self.calls.made(run, value)
            strange = made and isinstance(known, (type(None), Foreign))
            whole = strange and value.shape == run.attribute(ELEMENT, "shape")
            raise (Starts if strange and not whole else Untraceable)(
                f"the state {key!r} is a tensor not made from the parameter, its gradient or its state"
            )
        if value is not None and not isinstance(value, (Number, int, float, bool, str, Foreign)):
            raise Untraceable(
                f"the state {key!r} is a {type(value).__name__}",
                "tensors, numbers, flags and texts of their own names fuse as state",
            )
        return value


Outcomes = dict[tuple[bool, ...], tuple[Run, dict[Any, Any]]]
"""What each path through the branches on S values leaves."""


def merged(graph: Graph, outcomes: Outcomes, path: tuple[bool, ...] = ()) -> dict[str, Any]:
    """The outcomes of all paths that begin like this one, joined by select."""
    if path in outcomes:
        return outcomes[path][1]
    run = next(run for taken, (run, _) in outcomes.items() if taken[: len(path)] == path)
    yes, no = merged(graph, outcomes, (*path, True)), merged(graph, outcomes, (*path, False))
    if yes.keys() != no.keys():
        raise Untraceable("a branch on a norm or mean decides which state there is")
    condition = run.conditions[len(path)]
    return {k: either(graph, condition, yes[k], no[k], run.slot) for k in yes}


def with_totals(graph: Graph, outcomes: Outcomes) -> Outcomes:
    """The outcomes with what each adds to the totals: nothing to those that only other paths call for."""
    nothing = graph.leaf("const", 0.0)
    calls = max(len(run.totals) for run, _ in outcomes.values())
    return {
        path: (
            run,
            after | {Total(run.first + run.callback, k): _share(run, k, nothing) for k in range(calls)},
        )
        for path, (run, after) in outcomes.items()
    }


def _share(run: Run, call: int, nothing: int) -> Cell:
    return Cell(run.totals[call] if call < len(run.totals) else nothing, torch.float64)


def alike(a: Any, b: Any) -> bool:
    """Whether two values of a location are the same. Zeros of both signs are equal, and not the same."""
    if isinstance(a, Cell) and isinstance(b, Cell):
        return (a.node, a.shown) == (b.node, b.shown)
    if isinstance(a, Number) and isinstance(b, Number):
        return a.index == b.index
    return a is b or (type(a) is type(b) and repr(a) == repr(b) and bool(a == b))


def is_number(x: Any) -> bool:
    return isinstance(x, Number) or type(x) in (int, float)


def load(graph: Graph, signature: Signature, name: str, buffer: Buffer) -> int:
    # Seeds have more bits than float32.
    exact = buffer.dtype == torch.float64 or not buffer.dtype.is_floating_point
    wide = buffer.kind == TENSOR and exact and signature.compute != torch.float64
    return graph.leaf("load", name, kind=buffer.kind, type="d" if wide else "f")


def either(graph: Graph, condition: int, yes: Any, no: Any, slot: Callable[[Any], int] | None = None) -> Any:
    """The cell of either, by a condition on the device; ``slot`` makes values of numbers."""
    if yes is no or (isinstance(yes, Cell) and isinstance(no, Cell) and yes.node == no.node):
        return yes
    if isinstance(yes, Number) and isinstance(no, Number) and yes.index == no.index:
        return yes
    if not isinstance(yes, (Cell, Number)) and alike(yes, no):
        return yes
    nodes = [x.node if isinstance(x, Cell) else slot(x) if slot and is_number(x) else None for x in (yes, no)]
    if isinstance(yes, Matrix) or isinstance(no, Matrix):
        raise Untraceable(
            "a branch on what the device alone knows decides about a matrix that torch calls make",
            "make it in each step, or leave counts of steps on the host (without capturable and amp_fused)",
        )
    if nodes[0] is None or nodes[1] is None:
        raise Untraceable("a branch on a norm or mean decides about a flag in the state")
    shown = {x.shown for x in (yes, no) if isinstance(x, Cell)}
    if len(shown) > 1:
        raise Untraceable("a branch on a norm or mean decides about a tensor's shape")
    return Cell(select(graph, condition, nodes[0], nodes[1]), _asked(yes, no), *shown)


def _asked(a: Any, b: Any) -> torch.dtype | None:
    return a.asked if isinstance(a, Cell) else b.asked if isinstance(b, Cell) else None


def select(graph: Graph, condition: int, yes: int, no: int) -> int:
    """``where(condition, yes, no)``, moved down past what both sides share: ``p + s * where(c, q, 1)``."""
    if yes == no:
        return yes
    a, b = graph.values[yes], graph.values[no]
    if a.op == b.op and a.attr == b.attr and a.op in OPS and a.kind == b.kind == ELEMENT:
        different = [k for k, (x, y) in enumerate(zip(a.args, b.args, strict=True)) if x != y]
        if len(different) == 1 and graph.values[a.args[different[0]]].type == "f":
            k = different[0]
            args = list(a.args)
            args[k] = select(graph, condition, a.args[k], b.args[k])
            return graph.op(a.op, *args, where=lambda: a.where, to=a.attr)
    return graph.op("where", condition, yes, no, where=lambda: a.where or b.where)
