"""A parameter that stands for those of its bucket while a class's step is traced, and what the step does to it."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch

from ..ir.ops import ELEMENT, TENSOR
from ..ir.program import Buffer, Graph, Program
from ..trace.externs import Calls, is_lent
from ..trace.number import ARITHMETIC, Guard, Number, ScalarProgram
from ..trace.replay import Replay
from ..trace.run import GRAD, MAX_PATHS, PARAM, Cell, Matrix, Outcomes, alike, is_number, load, merged
from ..trace.signals import Mismatched, Untraceable
from ..trace.signature import FACTOR, PLAIN, Foreign, Signature
from ..trace.tensor import FLOATS, SymTensor
from ..trace.totals import Total
from ..trace.tracer import Trace, cut_up, program_of, told_apart
from . import coding, matrices
from .functions import flattened
from .shadow import Meeting, NewState
from .stored import DRAWS
from .stores import rebuilt, values_of, whole_of
from .sums import Elements, StepRun, Sums, lowered_to, of_step, settled, totals_in
from .symbolic import Symbolic, made, parameter, place

COMMON = -1
"""In the place of a parameter: all that have a gradient, whose number is the same."""
JOINED = 1 << 20
"""Beyond the plain numbers of a run: where those begin that join its paths."""
AS_WHOLE = Buffer(torch.float32, ELEMENT)


class Representative:
    """A parameter that stands for those of its bucket."""

    def __init__(
        self,
        index: int,
        item: Any,
        signature: Signature,
        scalars: ScalarProgram,
        stores: Sequence[dict[Any, Any]],
        kinds: Callable[[type], type],
        common: Container[str] = (),
    ) -> None:
        self.kinds, self.common = kinds, common
        self.stores, self.whole = stores, whole_of(stores, item.owner)
        self.index, self.item, self.signature = index, item, signature
        self.graph, self.scalars = Graph(told_apart(signature)), scalars
        self.calls = Calls(self.graph, signature.device)
        self.outcomes: Outcomes = {}
        self.todo: list[tuple[bool, ...]] = [()]
        self.by_step: dict[tuple[bool, ...], Outcomes] = {}
        """The outcomes along each path through the step's own branches."""
        grad = self.graph.leaf("load", "grad", kind=ELEMENT)
        if signature.modes.scaled:
            grad = self.graph.op("mul", grad, self.graph.leaf("load", FACTOR), where=lambda: "scaling")
        self.grad = grad

    def begin(self, step: StepRun) -> None:
        """Make what stands for its tensors in the next run of the shadow."""
        decisions = self.todo.pop() if self.todo else ()
        item, signature = self.item, self.signature
        self.run = run = Elements(self.graph, self.scalars, signature, self.index, decisions)
        run.shape, run.step, run.calls = item.param.shape, step, self.calls
        self.p = SymTensor(run, self.graph.leaf("load", "param", kind=ELEMENT), signature.param)
        self.g = SymTensor(run, self.grad, signature.grad)
        self.gradient = made(self.g, meta_of(item.grad))
        self.param = parameter(self.p, meta_of(item.param), self.gradient, item.owner)
        self.put: dict[str, Any] = {}
        self.codes: dict[str, coding.Code] = {}
        for name, stored in item.coded.items():
            self.codes[name], sym = coding.decode(run, name, stored)
            self.put[name] = made(sym, meta_of(stored))
        parts = {key for name, value in item.coded.items() for _, key in value.places(name)}
        known = dict(signature.state)
        for key, value in item.state.items():
            if key in parts:
                continue
            what = known[key]
            if isinstance(what, Buffer):
                if what.dims is not None:
                    run.attribute(ELEMENT, "dims")
                node = load(self.graph, signature, f"state.{key}", what)
                sym = SymTensor(run, node, what.dtype, signature.shown(what.dims))
                flat = item.flat.get(key)
                self.put[key] = (
                    made(sym, meta_of(value)) if flat is None else flattened(sym, meta_of(flat), value.shape)
                )
            elif isinstance(what, Foreign):
                if what.dtype in FLOATS:
                    kept = self.calls.keep(key, what.dtype, what.shape)
                    self.put[key] = made(None, meta_of(value), ext=self.calls.tensor(run, kept, None))
                else:  # nothing would be won: what is done to it is no product of matrices
                    self.put[key] = made(None, meta_of(value), f"the state {key!r} is a {what.dtype} tensor")
            elif type(value) in (int, float):
                whose = COMMON if key in self.common else self.index
                held = self.scalars.number(("state", whose, key), value)
                there = item.hosted.get(key)
                self.put[key] = (
                    held if there is None else made(None, meta_of(there), number=held, hosted=True)
                )
            elif isinstance(value, PLAIN):
                self.put[key] = value
            else:
                raise Untraceable(f"the state {key!r} is a {type(value).__name__}")
        self.state = (
            None if self.whole is None else rebuilt(self.whole, lambda name, _: self.put[name], self.kinds)
        )

    def _draws(self, name: str) -> Number:
        key = f"{name}:{DRAWS}"
        return self.scalars.number(("state", self.index, key), self.item.state[key])

    def tensors(self) -> dict[int, Any]:
        item = self.item
        found = {id(item.owner): self.param, id(item.owner.grad): self.gradient}
        real = item.state | item.hosted | item.coded | item.flat
        found |= {id(real[k]): v for k, v in self.put.items() if isinstance(v, Symbolic)}
        return found

    def end(self, step: tuple[bool, ...]) -> None:
        """Note what its places hold after a step along this path of its own."""
        self.outcomes = self.by_step.setdefault(step, {})
        if self.param.__dict__["gradient"] is None:
            raise Untraceable("the step drops a gradient")
        for tensor in (self.param, self.gradient, *self.put.values()):
            if isinstance(tensor, Symbolic) and (added := tensor.added()):
                raise Untraceable(f"the step sets the attribute {added[0]!r} of a tensor")
        grad = self._place(self.param.__dict__["gradient"], "the gradient", self.item.grad)
        cells: dict[str, Any] = {PARAM: Cell(self.p.node, self.p.asked), GRAD: Cell(grad.node, grad.asked)}
        state = values_of(self.state or {})
        if state.keys() != self.put.keys():
            raise NewState(f"state {', '.join(map(str, state.keys() ^ self.put.keys()))} comes or goes")
        # With what has them: an address that is free again would be another tensor's.
        taken: dict[Any, Any] = {id(place): place for place in (self.p.place, self.g.place)}
        for key, value in state.items():
            cells[key] = self._left(key, value, taken)
            if key in self.codes:
                cells |= coding.encode(self.run, self.codes, key, cells[key].node, self._draws)
        self.run.finished = True
        path = tuple(self.run.taken)
        if path in self.outcomes:  # while others go along more of theirs, or with fewer of them
            before = self.outcomes[path][1]
            if any(not alike(v, cells[k]) for k, v in before.items() if not isinstance(v, Foreign)):
                raise Meeting("what it does to a parameter depends on how many there are, or on their order")
            return
        self.outcomes[path] = self.run, cells
        self.todo += [(*path[:k], not path[k]) for k in range(len(self.run.decisions), len(path))]
        if len(self.outcomes) + len(self.todo) > MAX_PATHS:
            raise Untraceable(f"more than {MAX_PATHS} paths through branches on norms and means")

    def _own_memory(self, key: str, value: Symbolic, taken: dict[Any, Any]) -> None:
        """Raises Untraceable if what torch calls give is a view of another tensor that stays."""
        memory: Any = None
        of: Any = None
        if value.ext is not None:
            of = value.ext.meta
            memory = "calls", self.calls.memory(of)
        elif self.put[key].ext is not None:
            of = place(value).place
            memory = id(of)
        if memory is not None:
            if memory in taken or (value.ext is not None and is_lent(value.ext)):
                raise Untraceable(f"the state {key!r} becomes another tensor's own memory; keep a copy of it")
            taken[memory] = of

    def _left(self, key: str, value: Any, taken: dict[Any, Any]) -> Any:
        """What the step leaves as this state."""
        put = self.put[key]
        if key in self.item.hosted:
            if not isinstance(value, Symbolic) or value.number is None:
                raise Untraceable(f"the state {key!r}, which the host keeps, becomes a number of the device")
            if (value.meta.shape, value.meta.dtype) != (put.meta.shape, put.meta.dtype):
                raise NewState(f"the state {key!r} gets another shape or dtype")
            return value.number
        if isinstance(put, Symbolic) and put.sym is None and put.why:
            if value is not put:
                raise Untraceable(f"the state {key!r}, which kernels cannot take, is replaced")
            return Foreign(put.meta.dtype, put.meta.shape)
        if isinstance(put, Symbolic) and isinstance(value, Symbolic) and put.sym is None:
            if (value.meta.shape, value.meta.dtype) != (put.meta.shape, put.meta.dtype):
                raise NewState(f"the state {key!r} gets another shape or dtype")
            self._own_memory(key, value, taken)
            return Matrix(matrices.entered(value).spot.ref, None)
        if isinstance(value, Symbolic):
            if not isinstance(put, Symbolic):
                raise NewState(f"the state {key!r} becomes a tensor")
            self._own_memory(key, value, taken)
            sym = self._place(value, f"the state {key!r}", put.meta)
            if id(sym.place) in taken:
                raise Untraceable(f"the state {key!r} becomes another tensor's own memory; keep a copy of it")
            taken[id(sym.place)] = sym.place
            buffer = AS_WHOLE if key in self.codes else dict(self.signature.state)[key]
            node = sym.node
            if (dims := self.signature.shown(buffer.dims)) is not None and sym.dims != dims:
                error = Mismatched(f"the state {key!r} goes along other dimensions")
                error.of = self.index
                raise error
            if buffer.kind != sym.kind:
                if buffer.kind == TENSOR or not (self.signature.zero_dim or buffer.dims):
                    raise Untraceable(
                        f"the state {key!r} changes between one number per element and one per tensor"
                    )
                node = self.graph.op("expand", node, to=buffer.kind if buffer.dims else None)
            return Cell(node, sym.asked, dims)
        if isinstance(put, Symbolic) and self.run.taken and is_number(value) and put.meta.numel() == 1:
            # On one side of a branch on a norm a number, on the other a tensor: which, only kernels know.
            node = self.run.slot(value)
            return Cell(
                self.graph.op("expand", node) if place(put).kind == ELEMENT else node, place(put).asked
            )
        if isinstance(put, Symbolic) or isinstance(value, torch.Tensor):
            raise NewState(f"the state {key!r} becomes another kind of thing")
        if type(value) is Number or isinstance(value, (int, float, *PLAIN)):
            return value
        raise Untraceable(f"the state {key!r} is left as a {type(value).__name__}")

    def _place(self, value: Symbolic, what: str, real: torch.Tensor) -> SymTensor:
        if isinstance(value, Symbolic) and value.ext is not None and value.meta.shape == real.shape:
            value = matrices.left(value)
        if isinstance(value, Symbolic) and value.sym is not None:
            value.__dict__["sym"] = settled(value.sym)
            if of_step(value.sym):
                value = made(lowered_to(self.run, value.sym), value.meta)
        if not isinstance(value, Symbolic) or value.sym is None or value.sym.run is not self.run:
            raise Untraceable(f"{what} becomes a tensor of another parameter, or from outside")
        if (value.meta.shape, value.meta.dtype) != (real.shape, real.dtype) or value.sym.is_bool:
            raise NewState(f"{what} gets another shape or dtype")
        return value.sym

    def join(self, branches: dict[tuple[bool, ...], list[int]], sums: Sums) -> None:
        """Join what all paths leave. ``branches``: the conditions along each of the step's."""
        joined: Outcomes = {}
        found = {path: dict(merged(self.graph, outcomes)) for path, outcomes in self.by_step.items()}
        self.later = self._taken_out(found)
        for path, cells in found.items():
            along = Elements(self.graph, self.scalars, self.signature, self.index)
            along.conditions = [
                sums.lowered(node, self.graph, self.signature.compute) for node in branches[path]
            ]
            along.raw = JOINED
            joined[path] = along, cells
        self.cells: dict[Any, Any] = merged(self.graph, joined)
        for key, value in self.signature.state:
            if not isinstance(value, (Buffer, Foreign)) and isinstance(self.cells.get(key), Cell):
                raise Untraceable(
                    f"the state {key!r}, a number of the host, follows from what is read from tensors"
                )

    def _taken_out(self, found: dict[tuple[bool, ...], dict[Any, Any]]) -> dict[tuple[bool, ...], Replay]:
        """Numbers of the host in the state that follow from the step's own branches: what they become along each.

        They are taken out of what its paths leave: the host writes them when it knows which way the step went.
        """
        own = self.stores[0].get(self.item.owner, {}) if len(self.stores) == 1 else {}
        keys = []
        for key in self.put.keys() & own.keys() - self.item.hosted.keys():
            first, *others = (cells[key] for cells in found.values())
            if all(map(is_number, (first, *others))) and not all(alike(first, other) for other in others):
                keys.append(key)
        out = {}
        for path, cells in found.items() if keys else ():
            ours = ScalarProgram()
            move = mover(self.scalars, ours, self.index)
            numbers = {
                k: Number(ours, move(v.index), v.value) if isinstance(v := cells[k], Number) else v
                for k in sorted(keys)
            }
            out[path] = Replay(Trace(self.signature, None, ours, (), numbers, {}, {}))  # type: ignore[arg-type]
            cells.update((k, self.put[k]) for k in keys)
        return out

    def nodes(self) -> list[int]:
        return [v.node for v in self.cells.values() if isinstance(v, Cell)]

    def add_totals(self, sums: Sums, used: set[int]) -> None:
        """Note what it adds to these totals, and which it takes."""
        mine = {k: shares[self.index] for k, shares in enumerate(sums.shares) if self.index in shares}
        mine = {k: node for k, node in mine.items() if k in used}
        needed = totals_in(self.graph, [*self.nodes(), *mine.values()])
        self.cells |= {
            Total(0, k): Cell(mine[k], torch.float64) if k in mine else None for k in sorted({*needed, *mine})
        }

    def traced(self, guards: Sequence[Guard], write_grads: bool, depths: Sequence[int]) -> Trace:
        """The trace of its bucket, by it. ``depths``: which round each total is of."""
        cells = self.cells
        grad = cells[GRAD].node != self.grad
        if grad and self.signature.modes.scaled:
            raise Untraceable("the step writes to gradients, and max_grad_norm or amp_fused scales them")
        graded = grad and write_grads
        rounds: tuple[Program, ...] = ()
        externs = None
        totals = {k: depths[k.call] for k in cells if isinstance(k, Total)}
        if totals and self.calls.calls:
            raise Untraceable("sums over parameters, and torch calls between programs")
        if totals or self.calls.calls:
            program, rounds, slots, axes, externs = cut_up(
                self.graph, self.calls, self.signature, {}, cells, {}, graded, totals or None
            )
        else:
            program, slots, axes = program_of(self.graph, self.signature, {}, cells, {}, graded)
        ours = ScalarProgram()
        move = mover(self.scalars, ours, self.index)
        numbers = {
            k: Number(ours, move(v.index), v.value) if type(v) is Number else v
            for k, v in cells.items()
            if not isinstance(v, (Cell, Foreign, Matrix)) and not isinstance(k, Total)
        }
        trace = Trace(
            self.signature,
            program,
            ours,
            tuple(map(move, slots)),
            numbers,
            {},
            {},
            axes,
            rounds=rounds,
            externs=externs,
        )
        for guard in guards:
            ours.guard(move(guard.index), guard.value, guard.where)
        return trace


def in_common(key: str) -> str:
    """What a number of all parameters' state is called among the host's."""
    return f"{key} of all parameters"


def meta_of(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta")


def mover(shared: ScalarProgram, ours: ScalarProgram, index: int | None) -> Callable[[int], int]:
    """What copies an entry into a program of one parameter's own, or, with None, of none."""
    known: dict[int, int] = {}

    def move(i: int) -> int:
        if i not in known:
            op, *operands = shared.entries[i]
            if op in ARITHMETIC:
                entry: tuple[Any, ...] = (op, *map(move, operands))
            elif op in ("state", "raw"):
                whose, *rest = operands
                if op == "state" and whose not in (index, COMMON):
                    raise Meeting(
                        "a number of one parameter's state goes to another parameter, or to the optimizer"
                    )
                entry = ("hyper", in_common(*rest)) if op == "state" and index is None else (op, *rest)
            else:
                entry = (op, *operands)
            known[i] = ours.entry(entry, shared.values[i])
        return known[i]

    return move
