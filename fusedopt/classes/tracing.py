"""A class's ``step`` as traces: it is run on a shadow with two parameters of each kind, and must do the same to both.

A parameter's kind is its bucket: what the class can see of it apart from its elements (`trace.signature`). Each of the
two has a graph of its own, so that a step that mixes parameters is noticed where it does. Branches on numbers of
tensors are traced along both of their ways, all parameters at once.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..ir.program import Buffer
from ..step.items import Item
from ..trace.number import ARITHMETIC, Guard, Number, ScalarProgram
from ..trace.replay import Replay, can_replay
from ..trace.run import MAX_PATHS
from ..trace.signals import Mismatched, NeedsAttribute, Untraceable, latest
from ..trace.signature import PLAIN, Foreign, Several, Signature
from ..trace.standins import StandIns
from ..trace.tracer import Trace
from .host import FILL, Host, There, bucket_key
from .representative import COMMON, Representative, in_common, meta_of, mover
from .shadow import Meeting, Path, Reads, Shadow, shown
from .stores import in_stores, rebuilt, stores_of, whole_of
from .sums import StepRun, Sums, new_step, of_step, settled, totals_in
from .symbolic import Symbolic, TensorNumber, made, tracing
from .watch import Watch, after_branch

Bucket = tuple[list[Item], Signature]
REPRESENTATIVES = 2
"""Parameters of each bucket that a step is traced with."""
CHOICES = 16
"""How many ways are tried in which state may go along a parameter's dimensions."""
COMPARED, SMALL = 16, 1 << 20
"""Parameters of each bucket of which a trace is compared with the class's own step, but for those of more elements. A
step which sums over parameters is compared for one more at least."""
CHANGES = "a number that changes with each step leaves recorded arithmetic (an index, formatting)"
USED = "a parameter without a gradient is used"
DEPENDS = "what it does to a parameter depends on the others, or on their order"


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


def _owners(shared: ScalarProgram, i: int) -> set[int]:
    op, *operands = shared.entries[i]
    if op in ARITHMETIC:
        return set().union(*(_owners(shared, k) for k in operands))
    return {operands[0]} - {COMMON} if op == "state" else set()


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
    def __init__(self, shadow: Shadow) -> None:
        self.calls, self.late, self.loss, self.shadow = 0, False, Loss(), shadow
        self.mode: Any = None

    def __call__(self) -> Loss:
        self.calls += 1
        self.late |= self.mode.acted or bool(self.shadow.changes())
        return self.loss


@dataclass(frozen=True)
class Shadowing:
    """tables, alike: as of `Shadow`. resting: parameters that are taken to have no gradient.
    reads: notes what the step asks the optimizer for."""

    tables: bool
    alike: dict[int, int]
    resting: Sequence[torch.Tensor]
    reads: Reads


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

    Where sizes leave open along which dimensions a state goes, the first choice is taken that fits. Numbers that all
    parameters have in common are taken for one, and rows looked up by numbers, where nothing else helps.
    """
    common: tuple[str, ...] | None = None
    choices = [
        [*signature.resolved(CHOICES), *([] if signature.line else _of_other_shapes(items, signature))]
        for items, signature in buckets
    ]
    while True:
        chosen = [(items, found[0]) for (items, _), found in zip(buckets, choices, strict=True)]
        try:
            return _trace_step(opt, chosen, closure, options, names, common)
        except Meeting:
            if common is not None:
                raise
            common = _in_common(opt, buckets)
        except Mismatched as error:
            bucket_of = [b for b, (items, _) in enumerate(buckets) for _ in items[:REPRESENTATIVES]]
            found = choices[bucket_of[error.of]] if error.of is not None else []
            if len(found) < 2:
                raise
            del found[: -1 if error.matrix else 1]


def _in_common(opt: torch.optim.Optimizer, buckets: Sequence[Bucket]) -> tuple[str, ...]:
    """The keys of numbers in the state that are the same for all parameters."""
    store, *others = stores_of(opt)
    if others or vars(opt).get("state") is not store:
        return ()
    first, *more = [store.get(item.owner, {}) for items, _ in buckets for item in items]
    return tuple(
        key
        for key, value in first.items()
        if type(key) is str
        and type(value) in (int, float)
        and all(type(state.get(key)) is type(value) and state[key] == value for state in more)
    )


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
    common: tuple[str, ...] | None,
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
                Representative(first + k, item, signature, scalars, stores, kinds, common or ())
                for k, item in enumerate(chosen)
            ]
        )
    representatives = [r for group in groups for r in group]
    reads = Reads()
    kind = reads.noted(kinds(type(opt)))
    bucket_of = [b for b, group in enumerate(groups) for _ in group]
    sums = Sums(bucket_of, [group[0].item.where[0] for group in groups])
    codes: set[types.CodeType] = set()

    alike = {id(item.owner): b for b, (items, _) in enumerate(buckets) for item in items}

    def run(
        representatives: list[Representative],
        decisions: tuple[bool, ...],
        resting: Sequence[Representative] = (),
    ) -> _Ran:
        step = new_step(scalars, sums, decisions, representatives[0].signature)
        rest = [r.item.owner for r in resting]
        how = Shadowing(common is not None, alike, rest, reads)
        ran = _run(opt, kind, stand_ins, representatives, scalars, closure, options, names, step, codes, how)
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
                raise Meeting(
                    "what the step leaves in the optimizer depends on how many parameters there are"
                )
    several = any(len(group) > 1 for group in groups)
    needs_all = (several or not sums.shares) and _needs_all(run, paths, groups, scalars)
    shared, own = _guards(representatives, scalars)
    branches = {path: ran.step.conditions for path, ran in paths.items()}
    for r in representatives:
        r.join(branches, sums)
    later = {}
    for bucket, group in zip(buckets, groups, strict=True):
        counts = group[0].later
        if any(_different(a.trace, r.later[path].trace) for r in group[1:] for path, a in counts.items()):
            raise Meeting(DEPENDS)
        later[bucket_key(*bucket)] = counts
    host = _host(paths, shared, scalars, buckets, sums, options.capturable, later, reads, codes)
    host.closure, host.needs_all, host.kind = closure, needs_all, type(opt)
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
            raise Meeting(DEPENDS)
        traces.append(found[0])
        known = [(r.item, t) for r, t in zip(group, found, strict=True)]
        more = _more(buckets[len(examples)][0], [r.item for r in group], least=bool(sums.shares))
        examples.append([*known, *((item, found[0]) for item in more)])
    if not all(map(can_replay, traces)):
        raise Meeting(CHANGES)
    return StepTrace(host, traces, examples, closure)


def _more(items: Sequence[Item], known: Sequence[Item], least: bool) -> list[Item]:
    """Parameters beside the representatives, to be compared too, from the first to the last: a step may tell parameters
    apart by their order, or sum over the first few only."""
    others = [item for item in items if not any(item is one for one in known)]
    small = [item for item in others if item.param.numel() <= SMALL]
    if not small:
        return sorted(others, key=lambda item: item.param.numel())[: int(least)]
    count = min(COMPARED - len(known), len(small))
    return [small[k * (len(small) - 1) // max(count - 1, 1)] for k in range(count)]


def _needs_all(
    run: Callable[..., _Ran],
    paths: dict[tuple[bool, ...], _Ran],
    groups: Sequence[Sequence[Representative]],
    scalars: ScalarProgram,
) -> bool:
    """Whether the step is another one where parameters have no gradient: it does something to these, or counts them.

    All but one of each bucket rest; where there is one of each, all but one. A step that is like that is traced again
    when gradients are missing, and is the class's own then.
    """
    stepped = [group[-1] for group in groups]
    if all(len(group) == 1 for group in groups):
        stepped = stepped[-1:]
    resting = [r for group in groups for r in group if not any(r is one for one in stepped)]
    guards, outcomes = [*scalars.guards], [{k: {**v} for k, v in r.by_step.items()} for r in stepped]
    try:
        for path, ran in paths.items() if resting else ():
            alone = run(stepped, path, resting)
            if alone.path != path or alone.left() != ran.left():
                return True
    except NeedsAttribute:
        raise
    except (Untraceable, Exception):
        return True
    finally:  # what such a step takes for granted is nothing to others
        scalars.guards[:] = guards
        for r, found in zip(stepped, outcomes, strict=True):
            r.by_step, r.todo = found, []
    return False


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
        raise Meeting("a branch depends on numbers of several parameters")
    return shared, own


def _host(
    paths: dict[tuple[bool, ...], _Ran],
    shared: Sequence[Guard],
    scalars: ScalarProgram,
    buckets: Sequence[Bucket],
    sums: Sums,
    capturable: bool,
    later: dict[Any, dict[tuple[bool, ...], Replay]],
    reads: Reads,
    codes: set[types.CodeType],
) -> Host:
    """The host's half of the step, with what it leaves along each of its paths."""
    first, *others = paths.values()
    if any(ran.returns != first.returns for ran in others):
        raise Untraceable("a branch on a sum over parameters decides what the step returns")
    ours = ScalarProgram()
    move = mover(scalars, ours, None)
    leaves = reads.leaves(first.shadow, codes)
    around = first.watch.around(first.kind, leaves)
    host = Host(
        first.shadow, first.used, first.hosted, around, sums, capturable, frozenset(reads.names), leaves
    )
    host.returns_loss, host.returned = first.returns
    host.takes_for_one({e[2]: in_common(e[2]) for e in scalars.entries if e[:2] == ("state", COMMON)})
    for table in first.shadow.looked_up():
        assert table.index is not None
        program = ScalarProgram()
        at = mover(scalars, program, None)(table.index.index)
        host.looks_up(table, Number(program, at, table.index.value), first.used)
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
    how: Shadowing,
) -> _Ran:
    """Let the shadow step once. ``codes``: all that was run so far."""
    tensors: dict[int, Any] = {}
    for r in representatives:
        r.begin(step)
        tensors |= r.tensors()
    known: dict[int, dict[int, Any]] = {id(store): {} for store in representatives[0].stores}
    for r in representatives:
        for store, state in in_stores(r.stores, r.state).items() if r.state is not None else ():
            known[store][id(r.item.owner)] = state
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

    kept = _resting(opt, representatives[0].stores, tensors, known, how.resting)
    shadow = Shadow(
        opt,
        kind,
        tensors,
        number,
        known,
        stand_ins.of,
        representatives[0].kinds,
        how.tables,
        how.alike,
    )
    given, partial = _Closure(shadow), len(tensors.keys() & shadow.params) < len(shadow.params)
    watch = Watch(stand_ins, (*type(opt).__mro__, kind), shadow.referred, shadow.params, codes)
    watch.before()
    latest()
    try:
        with watch, tracing(options.rounding == "each", partial) as mode:
            given.mode, how.reads.of = mode, shadow.opt
            returned = shadow.opt.step(given) if closure else shadow.opt.step()
    except NeedsAttribute:
        watch.check()
        raise
    except BaseException as error:
        watch.check()
        branched = step.taken or any(r.run.taken for r in representatives)
        if branched and (why := after_branch(error)) is not None:
            raise why from error
        error.inside = True  # type: ignore[attr-defined]
        raise
    finally:
        how.reads.of = None
    watch.check()
    if (signal := latest()) is not None:
        raise signal
    if given.late or given.calls != closure:
        raise Untraceable("the step calls its closure more than once, or not before anything else")
    if returned is not given.loss and type(returned) not in PLAIN:
        raise Untraceable("the step returns something that is not the loss")
    if any(now.keys() != was.keys() or any(now[k] is not was[k] for k in was) for now, was in kept):
        raise Untraceable(USED)
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
    more: Sequence[torch.Tensor],
) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    """One parameter of each group that has no gradient, and ``more``: the step must leave them alone. What stands for
    their states, and what was in it."""

    def poison(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return made(None, meta_of(value), USED)
        return made(None, torch.empty((), device="meta"), USED) if type(value) in (int, float) else value

    out = []
    for group in opt.param_groups:
        for p in [*[p for p in group["params"] if p.grad is None][:1], *more]:
            tensors[id(p)] = made(None, meta_of(p), USED)
            tensors[id(p)].__dict__.update(_is_param=True, gradient=None, _hash=hash(p))
            if (whole := whole_of(stores, p)) is not None:
                for store, state in in_stores(stores, rebuilt(whole, poison)).items():
                    known[store][id(p)] = state
                    out.append((state, dict(state)))
        more = ()
    return out
