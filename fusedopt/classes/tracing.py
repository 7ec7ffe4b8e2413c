"""A class's ``step`` as traces: it is run on a shadow with two parameters of each kind, and must do the same to both.

A parameter's kind is its bucket: what the class can see of it apart from its elements (`trace.signature`). Each of the
two has a graph of its own, so that a step that mixes parameters is noticed where it does. Branches on numbers of
tensors are traced along both of their ways, all parameters at once.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..ir.ops import ELEMENT, TENSOR
from ..ir.program import Buffer, Graph, Program
from ..step.items import Item
from ..trace.externs import Calls, is_lent
from ..trace.number import ARITHMETIC, Guard, Number, ScalarProgram
from ..trace.replay import Replay
from ..trace.run import GRAD, MAX_PATHS, PARAM, Cell, Matrix, Outcomes, alike, is_number, load, merged
from ..trace.signals import Mismatched, NeedsAttribute, Untraceable, latest
from ..trace.signature import FACTOR, PLAIN, Foreign, Several, Signature
from ..trace.standins import StandIns
from ..trace.tensor import FLOATS, SymTensor
from ..trace.totals import Total
from ..trace.tracer import Trace, cut_up, program_of, told_apart
from . import coding, matrices
from .functions import flattened
from .host import FILL, Host, There, bucket_key
from .shadow import NewState, Path, Shadow, shown
from .stored import DRAWS
from .stores import in_stores, rebuilt, stores_of, values_of, whole_of
from .sums import Elements, StepRun, Sums, lowered_to, new_step, of_step, settled, totals_in
from .symbolic import Symbolic, TensorNumber, made, parameter, place, tracing
from .watch import Watch

Bucket = tuple[list[Item], Signature]
REPRESENTATIVES = 2
CHOICES = 16
"""How many ways are tried in which state may go along a parameter's dimensions."""
COMPARED, SMALL = 8, 1 << 20
"""Parameters of each bucket that a step which sums over them is compared with the class's own; one more at least, and
others of no more elements."""
JOINED = 1 << 20
"""Beyond the plain numbers of a run: where those begin that join its paths."""
"""Parameters of each bucket that a step is traced with."""


@dataclass(frozen=True)
class Options:
    """How an optimizer is fused; see `fused.fuse`."""

    backend: str = "auto"
    max_grad_norm: float | None = None
    write_grads: bool = True
    check: int = 1
    rounding: str = "each"
    storage: str = ""
    amp_fused: bool = False
    capturable: bool = False


DEPENDS = "what it does to a parameter depends on the others, or on their order"
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
    ) -> None:
        self.kinds = kinds
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
        self.param = parameter(self.p, meta_of(item.param), self.gradient)
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
                sym = SymTensor(run, load(self.graph, signature, f"state.{key}", what), what.dtype, what.dims)
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
                held = self.scalars.number(("state", self.index, key), value)
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
                raise Untraceable(
                    "what it does to a parameter depends on how many there are, or on their order"
                )
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
            if buffer.dims is not None and sym.dims != buffer.dims:
                error = Mismatched(f"the state {key!r} goes along other dimensions")
                error.of = self.index
                raise error
            if buffer.kind != sym.kind:
                if buffer.kind == TENSOR or not (self.signature.zero_dim or buffer.dims):
                    raise Untraceable(
                        f"the state {key!r} changes between one number per element and one per tensor"
                    )
                node = self.graph.op("expand", node, to=buffer.kind if buffer.dims else None)
            return Cell(node, sym.asked, buffer.dims)
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
                if op == "state" and whose != index:
                    raise Untraceable(
                        "a number of one parameter's state goes to another parameter, or to the optimizer"
                    )
                entry = (op, *rest)
            else:
                entry = (op, *operands)
            known[i] = ours.entry(entry, shared.values[i])
        return known[i]

    return move


def _owners(shared: ScalarProgram, i: int) -> set[int]:
    op, *operands = shared.entries[i]
    if op in ARITHMETIC:
        return set().union(*(_owners(shared, k) for k in operands))
    return {operands[0]} if op == "state" else set()


@dataclass
class StepTrace:
    """The traces of a step, one per bucket, and the host's half."""

    host: Host
    traces: list[Trace]
    examples: list[list[tuple[Item, Trace]]]
    """Parameters of each bucket that are compared: those that stood for it with their own traces, and more."""
    closure: bool


class Loss:
    """What a closure returns in a trace. Whoever looks into it needs the real one."""

    def __getattr__(self, name: str) -> Any:
        raise Untraceable("the step looks at the loss that its closure returns")

    __float__ = __bool__ = __lt__ = __gt__ = __add__ = __mul__ = lambda self, *_: self.__getattr__("")


class _Closure:
    def __init__(self) -> None:
        self.calls, self.late, self.loss = 0, False, Loss()
        self.mode: Any = None

    def __call__(self) -> Loss:
        self.calls += 1
        self.late |= self.mode.acted
        return self.loss


def shadow_class(kind: type, stand_ins: StandIns) -> type:
    """The class with stand-ins in its methods."""
    own: dict[str, Any] = {}
    if not issubclass(kind, torch.optim.Optimizer) and "__init_subclass__" in dir(kind):
        hook: Any = kind.__init_subclass__
        if getattr(hook, "__objclass__", None) is not object and hasattr(hook, "__func__"):
            raise Untraceable(f"{kind.__qualname__} looks after its subclasses, which a trace makes")
    for base in kind.__mro__:
        if base in (torch.optim.Optimizer, object) or base.__module__ == "typing":
            continue
        for name, value in vars(base).items():
            if name in own or name == "__init__":
                continue
            if isinstance(value, (staticmethod, classmethod)):
                own[name] = type(value)(stand_ins.of(plain_function(value.__func__)))
            elif isinstance(value, types.FunctionType) or hasattr(value, "_torchdynamo_orig_callable"):
                own[name] = stand_ins.of(plain_function(value))
            elif type(value) is property:
                own[name] = property(*(f and stand_ins.of(f) for f in (value.fget, value.fset, value.fdel)))
    own |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), own)


def plain_function(function: Any) -> Any:
    """The function without torch.compile, and without torch's hooks around a step."""
    function = getattr(function, "_torchdynamo_orig_callable", function)
    if getattr(function, "hooked", False):
        function = getattr(function, "__wrapped__", function)
    return getattr(function, "_torchdynamo_orig_callable", function)


def trace_step(
    opt: torch.optim.Optimizer,
    buckets: Sequence[Bucket],
    closure: bool,
    options: Options,
    names: Callable[[Path], str],
) -> StepTrace:
    """Trace the step of these buckets. Raises Untraceable, NewState, NeedsAttribute, or what the class raises.

    Where sizes leave open along which dimensions a state goes, the first choice is taken that fits.
    """
    choices = [
        [*islice(signature.resolved(), CHOICES), *_of_other_shapes(items, signature)]
        for items, signature in buckets
    ]
    while True:
        chosen = [(items, found[0]) for (items, _), found in zip(buckets, choices, strict=True)]
        try:
            return _trace_step(opt, chosen, closure, options, names)
        except Mismatched as error:
            bucket_of = [b for b, (items, _) in enumerate(buckets) for _ in items[:REPRESENTATIVES]]
            found = choices[bucket_of[error.of]] if error.of is not None else []
            if len(found) < 2:
                raise
            del found[: -1 if error.matrix else 1]


def _of_other_shapes(items: list[Item], signature: Signature) -> Iterator[Signature]:
    """The signature if state that might go along the parameter's dimensions is of its own shape, as factors of a
    covariance are."""
    along = {
        k
        for k, v in signature.state
        if isinstance(v, Several) or (isinstance(v, Buffer) and v.dims is not None)
    }
    if along:
        found = {k: items[0].state[k] for k in along}
        state = {k: Foreign(found[k].dtype, found[k].shape) if k in along else v for k, v in signature.state}
        yield replace(signature, state=tuple(state.items()))


def _trace_step(
    opt: torch.optim.Optimizer,
    buckets: Sequence[Bucket],
    closure: bool,
    options: Options,
    names: Callable[[Path], str],
) -> StepTrace:
    scalars, stores = ScalarProgram(), stores_of(opt)
    stand_ins = StandIns("torch.optim")
    shadows: dict[type, type] = {}

    def kinds(kind: type) -> type:
        return shadows.get(kind) or shadows.setdefault(kind, shadow_class(kind, stand_ins))

    groups: list[list[Representative]] = []
    for items, signature in buckets:
        chosen = sorted(items, key=lambda item: item.param.numel())[:REPRESENTATIVES]
        first = sum(map(len, groups))
        groups.append(
            [
                Representative(first + k, item, signature, scalars, stores, kinds)
                for k, item in enumerate(chosen)
            ]
        )
    representatives = [r for group in groups for r in group]
    kind = kinds(type(opt))
    bucket_of = [b for b, group in enumerate(groups) for _ in group]
    sums = Sums(bucket_of, [group[0].item.where[0] for group in groups])
    codes: set[types.CodeType] = set()

    def run(representatives: list[Representative], decisions: tuple[bool, ...]) -> _Ran:
        step = new_step(scalars, sums, decisions, representatives[0].signature)
        ran = _run(opt, kind, stand_ins, representatives, scalars, closure, options, names, step, codes)
        for r in representatives:
            r.end(ran.path)
        step.finished = True
        return ran

    paths: dict[tuple[bool, ...], _Ran] = {}
    todo: list[tuple[bool, ...]] = [()]
    while todo:
        decisions = todo.pop()
        ran = _one_path(run, representatives, decisions)
        paths[ran.path] = ran
        todo += [(*ran.path[:k], not ran.path[k]) for k in range(len(decisions), len(ran.path))]
        if len(paths) + len(todo) > MAX_PATHS:
            raise Untraceable(f"more than {MAX_PATHS} paths through branches on sums over parameters")
    if any(len(group) > 1 for group in groups):
        sums.fewer = True
        fewer = [group[-1] for group in groups]
        for path, ran in paths.items():
            alone = run(fewer, path)
            if alone.path != path or alone.left() != ran.left():
                raise Untraceable(
                    "what the step leaves in the optimizer depends on how many parameters there are"
                )
    shared, own = _guards(representatives, scalars)
    branches = {path: ran.step.conditions for path, ran in paths.items()}
    for r in representatives:
        r.join(branches, sums)
    later = {}
    for bucket, group in zip(buckets, groups, strict=True):
        counts = group[0].later
        if any(_different(a.trace, r.later[path].trace) for r in group[1:] for path, a in counts.items()):
            raise Untraceable(DEPENDS)
        later[bucket_key(*bucket)] = counts
    host = _host(paths, shared, scalars, buckets, sums, options.capturable, later)
    host.closure = closure
    graphs = [r.graph for r in representatives]
    roots = [*totals_in(sums.graph, host.nodes)]
    used = sums.used([*roots, *(k for r in representatives for k in totals_in(r.graph, r.nodes()))], graphs)
    for r in representatives:
        r.add_totals(sums, used)
    depths = sums.depths(graphs)
    traces: list[Trace] = []
    examples: list[list[tuple[Item, Trace]]] = []
    for group in groups:
        found = [r.traced([*shared, *own[r.index]], options.write_grads, depths) for r in group]
        if any(_different(found[0], other) for other in found[1:]):
            raise Untraceable(DEPENDS)
        traces.append(found[0])
        known = [(r.item, t) for r, t in zip(group, found, strict=True)]
        more = _more(buckets[len(examples)][0]) if sums.shares else []
        examples.append([*known, *((item, found[0]) for item in more)])
    return StepTrace(host, traces, examples, closure)


def _more(items: Sequence[Item]) -> list[Item]:
    """Parameters beside the representatives, to be compared too: a sum may be over the first few parameters only."""
    found = sorted(items, key=lambda item: item.param.numel())[REPRESENTATIVES:COMPARED]
    return [item for k, item in enumerate(found) if not k or item.param.numel() <= SMALL]


def _one_path(
    run: Callable[[list[Representative], tuple[bool, ...]], _Ran],
    representatives: list[Representative],
    decisions: tuple[bool, ...],
) -> _Ran:
    """Let the shadow step along all of its parameters' paths, and one of its own."""
    for r in representatives:
        r.todo = [()]
    found: list[_Ran] = []
    while any(r.todo for r in representatives):
        found.append(run(representatives, decisions))
        decisions = found[0].path
    if any(one.path != decisions for one in found):
        raise Untraceable(
            "a branch on a number of one parameter decides whether one on a sum of all is taken"
        )
    if any(one.left() != found[0].left() for one in found):
        raise Untraceable(
            "a branch on a number of a tensor decides what the optimizer keeps besides its state"
        )
    return found[0]


def _guards(
    representatives: Sequence[Representative], scalars: ScalarProgram
) -> tuple[list[Guard], dict[int, list[Guard]]]:
    """Those on numbers of the host alone, and those of each parameter."""
    shared = [g for g in scalars.guards if not _owners(scalars, g.index)]
    own = {
        r.index: [g for g in scalars.guards if _owners(scalars, g.index) == {r.index}]
        for r in representatives
    }
    if len(shared) + sum(map(len, own.values())) < len(scalars.guards):
        raise Untraceable("a branch depends on numbers of several parameters")
    return shared, own


def _host(
    paths: dict[tuple[bool, ...], _Ran],
    shared: Sequence[Guard],
    scalars: ScalarProgram,
    buckets: Sequence[Bucket],
    sums: Sums,
    capturable: bool,
    later: dict[Any, dict[tuple[bool, ...], Replay]],
) -> Host:
    """The host's half of the step, with what it leaves along each of its paths."""
    first, *others = paths.values()
    if any(ran.returns != first.returns for ran in others):
        raise Untraceable("a branch on a sum over parameters decides what the step returns")
    ours = ScalarProgram()
    move = mover(scalars, ours, None)
    host = Host(first.shadow, first.used, first.hosted, first.watch.around(first.kind), sums, capturable)
    host.returns_loss, host.returned = first.returns
    host.later = {bucket: by_path for bucket, by_path in later.items() if by_path}
    host.writes({p: (ran.changes, ran.step.conditions) for p, ran in paths.items()}, scalars, move, ours)
    for guard in shared if host.leaves_something else ():
        ours.guard(move(guard.index), guard.value, guard.where)
    host.finish()
    host.traced(buckets)
    return host


def _different(a: Trace, b: Trace) -> bool:
    return any(
        of(a) != of(b)
        for of in (
            lambda t: (t.program, t.rounds, t.slots, t.scalars.entries, t.scalars.guards),
            lambda t: t.externs and t.externs.key(),
            lambda t: {k: _plain(v) for k, v in t.numbers.items()},
            lambda t: [
                repr(v) for e, v in zip(t.scalars.entries, t.scalars.values, strict=True) if e[0] == "raw"
            ],
        )
    )


def _plain(v: Any) -> Any:
    return ("entry", v.index) if type(v) is Number else (type(v), repr(v))


@dataclass
class _Ran:
    shadow: Shadow
    changes: list[tuple[Path, Any, Any]]
    step: StepRun
    used: dict[Path, str]
    hosted: list[list[Path]]
    """The tensors of numbers, each by the paths that it is found by."""
    returns: tuple[bool, Any]
    watch: Watch
    kind: type

    @property
    def path(self) -> tuple[bool, ...]:
        return tuple(self.step.taken)

    def left(self) -> list[Any]:
        return [(path, key, _shape(value)) for path, key, value in self.changes]


def _shape(value: Any) -> Any:
    if type(value) is Number:
        return "entry", value.index
    if type(value) in (TensorNumber, Symbolic) and value.sym is not None:
        return "value", id(value.sym.run.graph), value.sym.node
    if type(value) is Symbolic:
        return "tensor", _shape(value.number)
    if isinstance(value, (tuple, list)):
        return type(value).__name__, *map(_shape, value)
    return type(value).__name__, repr(value) if isinstance(value, PLAIN) else id(value)


def _run(
    opt: torch.optim.Optimizer,
    kind: type,
    stand_ins: StandIns,
    representatives: list[Representative],
    scalars: ScalarProgram,
    closure: bool,
    options: Options,
    names: Callable[[Path], str],
    step: StepRun,
    codes: set[types.CodeType],
) -> _Ran:
    """Let the shadow step once. ``codes``: all that was run so far."""
    tensors: dict[int, Any] = {}
    for r in representatives:
        r.begin(step)
        tensors |= r.tensors()
    known: dict[int, dict[int, Any]] = {id(store): {} for store in representatives[0].stores}
    for r in representatives:
        for store, kept in in_stores(r.stores, r.state).items() if r.state is not None else ():
            known[store][id(r.item.owner)] = kept
    used: dict[Path, str] = {}
    hosted: dict[int, tuple[Symbolic, Number, list[Path]]] = {}

    def number(path: Path, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.numel() == 1 and value.device.type == "cpu" and type(value) is torch.Tensor:
                if id(value) not in hosted:
                    used[path] = names(path)
                    held = scalars.number(("hyper", used[path]), value.item())
                    stands = made(None, meta_of(value), number=held, hosted=True)
                    hosted[id(value)] = stands, held, []
                hosted[id(value)][2].append(path)
                return hosted[id(value)][0]
            why = f"{shown(path)} is a tensor, which is none of a parameter's state"
            return made(None, meta_of(value), why)
        used[path] = names(path)
        plain = value if type(value) in (int, float) else float(np.float64(value))
        return scalars.number(("hyper", used[path]), plain)

    _resting(opt, representatives[0].stores, tensors, known)
    shadow = Shadow(opt, kind, tensors, number, known, stand_ins.of, representatives[0].kinds)
    given = _Closure()
    watch = Watch(stand_ins, (*type(opt).__mro__, kind), shadow.referred, codes)
    watch.before()
    latest()
    try:
        with watch, tracing(options.rounding == "each") as mode:
            given.mode = mode
            returned = shadow.opt.step(given) if closure else shadow.opt.step()
    except NeedsAttribute:
        watch.check()
        raise
    except BaseException as error:
        watch.check()
        error.inside = True  # type: ignore[attr-defined]
        raise
    watch.check()
    if (signal := latest()) is not None:
        raise signal
    if given.late or given.calls != closure:
        raise Untraceable("the step calls its closure more than once, or not before anything else")
    if returned is not given.loss and not isinstance(returned, PLAIN):
        raise Untraceable("the step returns something that is not the loss")
    changes = [(p, k, v) for p, k, v in shadow.changes() if v is not given.loss]
    changes += [
        (ways[0], FILL, t if t.sym is not None else t.number)
        for t, held, ways in hosted.values()
        if t.number is not held
    ]
    places = {id(t): ways[0] for t, _, ways in hosted.values()}
    changes = [(p, k, _closed(v, places) if k is not FILL else _closed(v, {})) for p, k, v in changes]
    returns = returned is given.loss, None if returned is given.loss else returned
    ways = [found for _, _, found in hosted.values()]
    return _Ran(shadow, changes, step, used, ways, returns, watch, type(opt))


def _closed(value: Any, places: dict[int, Path]) -> Any:
    """What is left somewhere, its sums closed; a tensor that was there before by its path."""
    if type(value) is Symbolic and id(value) in places:
        return There(places[id(value)])
    if type(value) in (TensorNumber, Symbolic) and value.sym is not None:
        sym = settled(value.sym)
        if not of_step(sym):
            raise Untraceable("a number of one parameter is left in the optimizer")
        if type(value) is TensorNumber:
            value.sym = sym
        else:
            value.__dict__["sym"] = sym
    elif type(value) in (list, tuple):
        return type(value)(_closed(v, places) for v in value)
    return value


def _resting(
    opt: torch.optim.Optimizer,
    stores: Sequence[dict[Any, Any]],
    tensors: dict[int, Any],
    known: dict[int, dict[int, Any]],
) -> None:
    """One parameter of each group that has no gradient: the step must leave it alone."""
    why = "a parameter without a gradient is used"

    def poison(name: str, value: Any) -> Any:
        return made(None, meta_of(value), why) if isinstance(value, torch.Tensor) else value

    for group in opt.param_groups:
        for p in [p for p in group["params"] if p.grad is None][:1]:
            tensors[id(p)] = made(None, meta_of(p), why)
            tensors[id(p)].__dict__.update(_is_param=True, gradient=None)
            if (whole := whole_of(stores, p)) is not None:
                for store, kept in in_stores(stores, rebuilt(whole, poison)).items():
                    known[store][id(p)] = kept
