"""One optimizer step: sort parameters into buckets, trace, compile, and only then launch.

Parameters whose callbacks all fuse are updated in place by kernels: one launch per stage for all that share a program.
Where a callback has no fused form, its parameters are stepped on work copies: a program up to that callback, the
callback itself run eagerly, the next program after it; results are stored when everything has succeeded. The reference
backend is the same with no program at all.
"""

from __future__ import annotations

import functools
import math
import operator
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import torch

from .. import backends
from ..backends import Backend, Kernel, Launch
from ..callback import identity, name_of, place_of
from ..extension import leaf
from ..trace.number import Scalar
from ..trace.purity import sources_of
from ..trace.replay import Replay, can_replay
from ..trace.signals import NeedsAttribute, Untraceable
from ..trace.signature import FACTOR, Signature, is_plain, static_of, structure_of
from ..trace.snapshot import Snapshot
from ..trace.sources import asks_for_dtypes
from ..trace.tracer import Trace, trace
from . import items, reference, sharded, transforms
from .bound import MOST, RECENT, BoundStep, Groups, Steps, Unbound, unbindable
from .commit import Change, commit
from .history import History
from .items import Item
from .scaling import Norm, Scaling
from .verdicts import ActsAfterAll, Verdicts

MAX_STRUCTURES = 32
"""Structures whose traces or verdicts are kept while an optimizer lives, so that what changes with every step cannot
pile up: flags that are other strings, shapes that callbacks read."""
KEPT_STRUCTURES = 4
"""Those whose traces are kept for the next optimizer with the same callbacks."""
MAX_KNOWN = 7
"""Traces of one structure that are kept for replay: the sides of branches on numbers that a schedule visits."""


@dataclass
class CompiledTrace:
    """A compiled trace, kept for later steps; ``replay`` is None if its callbacks have to be run each time: ``why``.

    ``read`` is the data that the callbacks found around them: with other data the trace would be another.
    """

    trace: Trace
    backend: Backend
    kernel: Kernel
    replay: Replay | None
    read: list[Any]
    why: str = ""


@dataclass
class Bucket:
    """A bucket that fuses, with this step's scalars: launched when the whole step is known to work."""

    items: list[Item]
    known: CompiledTrace
    slots: Sequence[Scalar]
    numbers: dict[str, Any]

    @property
    def trace(self) -> Trace:
        return self.known.trace

    @property
    def kernel(self) -> Kernel:
        return self.known.kernel


@dataclass
class Launched:
    """Plans that shared a launch, one scalar set each."""

    plans: list[Bucket]
    launch: Launch

    @property
    def kernel(self) -> Kernel:
        return self.plans[0].kernel

    @property
    def tensors(self) -> int:
        return sum(len(plan.items) for plan in self.plans)


class GraphScalars:
    """Launches whose scalars live on the device, so that a CUDA graph of them can be replayed with others."""

    def __init__(self, launched: list[Launched], norm: Norm | None, same: Callable[[], bool]) -> None:
        self.norm, self._same = norm, same
        self.launches = [
            (entry.launch, [(plan.known.replay, plan.items[0].where[0]) for plan in entry.plans])
            for entry in launched
            if any(item.hyper.get("capturable") for plan in entry.plans for item in plan.items)
        ]

    def upload(self, hypers: list[dict[str, Any]]) -> None:
        """Send the scalars that follow from these hyperparameters of each group. Raises RuntimeError, sending none."""
        tables = []
        for launch, sets in self.launches:
            same = self._same()
            found = [replay and same and replay(hypers[group], {}) for replay, group in sets]
            for (replay, group), one in zip(sets, found, strict=True):
                if not one:
                    why = (
                        "a callback is not pure"
                        if not replay
                        else "a branch that they decide goes another way now"
                        if same
                        else "a callback reads something else now"
                    )
                    raise RuntimeError(
                        f"the captured step does not fit the hyperparameters of group {group}: {why}. Remedy: capture "
                        "the step again"
                    )
            tables.append((launch, np.array([slots for slots, _ in found], dtype=np.float64)))  # type: ignore[misc]
        for launch, slots in tables:
            launch.upload(slots)
        if self.norm is not None:
            self.norm.upload()


class Engine:
    """Steps parameters by a callback list. It holds no tensors: state lives with the optimizer.

    ``history`` has the kernels used so far, ``verdicts`` which callbacks run eagerly, ``norm`` how the last step's
    norm was taken, ``resident`` its launches whose scalars live on the device. ``bound`` are the structures of steps
    that were bound, the last one first; without ``binds`` every step looks at each tensor; ``steps``: how they went.
    ``said``: what an engine before this one has warned of.
    """

    def __init__(
        self,
        callbacks: Sequence[Callable[..., Any]],
        backend: str,
        title: str,
        state_dtype: torch.dtype | None,
        said: set[Any] | None = None,
    ) -> None:
        self.callbacks, self.backend = list(callbacks), backend
        self.title, self.state_dtype = title, state_dtype
        self.attributes: tuple[str, ...] = ()
        self.history = History()
        self.norm: Norm | None = None
        self.resident: GraphScalars | None = None
        self._launched: list[tuple[Kernel, int]] = []
        self.verdicts = Verdicts(self.callbacks, said)
        self._sources = sources_of(callbacks)
        self.read = self._sources.now()
        self._known = self._shared_traces()
        self.binds = True
        self.bound: list[BoundStep] = []
        self.steps = Steps()
        self._last: BoundStep | None = None
        self._why = ""
        self._acted = False
        self._lent: reference.Lent | None = None

    @property
    def launched(self) -> list[tuple[Kernel, int]]:
        """The kernels of the last step's launches, and how many tensors each went over."""
        return self._launched if self._last is None else self._last.stepped()

    def follows(self, callbacks: Sequence[Callable[..., Any]]) -> bool:
        """Whether it still does what these callbacks do."""
        return self.callbacks == callbacks and self._sources.unchanged()

    def reads(self, data: list[Any]) -> bool:
        """Whether this (``read`` after an earlier step) is still the data that the callbacks find around them."""
        return all(map(operator.is_, data, self._sources.now()))

    def _shared_traces(self) -> dict[tuple, list[CompiledTrace]]:
        """Those of other engines with these callbacks; but what has a closure is not kept beyond its time."""
        key = (*map(identity, self.callbacks), *self._sources.found, *backends.ROWS.items())
        try:
            if all(self.verdicts.lasting) and not self._sources.closed and not self.read:
                known = _known_traces(key, self.backend, self.title, self.state_dtype)
                weakref.finalize(self, _forget, known, KEPT_STRUCTURES).atexit = False
                return known
        except TypeError:  # a default that cannot be hashed
            pass
        return {}

    def repeat(self, scaling: Scaling) -> bool:
        """Do the step if it is of a structure that was bound; else nothing has changed."""
        whys = []
        for bound in self.bound:
            same = not bound.read or self.reads(bound.read)
            why = bound.run(scaling) if same else "a constant that a callback reads has changed"
            if why is None:
                if bound is not self._last:
                    self._take(bound)
                self.steps.note()
                return True
            whys.append(why)
        self._why = whys[0] if whys else ""
        return False

    def step(
        self, todo: list[Item], scaling: Scaling, groups: Groups | None = None, bind: bool = False
    ) -> None:
        """Step every item: its ``home`` is updated in place, its ``state`` holds the new state.

        ``groups``: theirs, which get what ``item.state`` holds together with parameters. ``bind``: a step of the same
        structure may follow, so this one is bound, if it can be.

        If a callback or the compiler raises, nothing has changed.
        """
        saved = self.verdicts.saved()
        try:
            while True:
                try:
                    plans, unfused = self.prepare(sharded.localized(todo))
                    if not bind or groups is None:
                        self._note("")
                    elif self._bind(plans, unfused, scaling, groups):
                        return
                    copies = self._computed(plans, unfused, scaling)
                    break
                except ActsAfterAll:  # from the beginning, in the order of a plain loop
                    continue
            self._say(plans, copies)
        except BaseException:
            self.verdicts.restore(saved)
            reference.tidy(self._lent)
            raise
        stores: list[Change] = []
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for item, work in copies:
            copied, changes, new = items.stored(item, work, self.state_dtype)
            pairs += copied
            stores += [*changes, _handed(item, new, groups)]
        stores += items.copying(pairs, transforms.active())
        self._last = None
        launched = self._launch(plans, scaling, groups, stores)
        self.resident = GraphScalars(launched, self.norm, functools.partial(self.reads, self.read))
        if self.norm is not None:
            self.norm.let_go()
        if groups is not None:  # those of other classes, whose state is a part of theirs
            kept = {id(item) for item in (*unfused, *(i for plan in plans for i in plan.items))}
            groups.keep([item for item in todo if id(item) not in kept])

    def _bind(self, plans: list[Bucket], unfused: list[Item], scaling: Scaling, groups: Groups) -> bool:
        """Bind a step of these plans and do it. If that cannot be, the reason is noted, and nothing has changed."""
        try:
            if not self.binds:
                raise Unbound
            if unfused:
                raise Unbound(f"{len(unfused)} of its parameters are stepped by callbacks that run eagerly")
            if why := unbindable(plans):
                raise Unbound(why)
            if not plans or not leaf.available():
                raise Unbound("no parameter has a gradient" if not plans else leaf.extension_status()[1])
            bound, launched = self._bound(plans, scaling, groups)
            self._say(plans, [])
            if why := bound.run(scaling):
                raise Unbound(why)
        except Unbound as why:
            self._note(str(why))
            return False
        self._note(self._why)
        bound.read = self.read
        bound.resident = GraphScalars(launched, bound.norm, functools.partial(self.reads, self.read))
        self._take(bound)
        return True

    def _take(self, bound: BoundStep) -> None:
        """Note which structure the last step had; those that were longest not seen are dropped."""
        self.bound = [bound, *(b for b in self.bound if b is not bound)][:MOST]
        self.norm, self.resident, self._last = bound.norm, bound.resident, bound

    def _bound(
        self, plans: list[Bucket], scaling: Scaling, groups: Groups
    ) -> tuple[BoundStep, list[Launched]]:
        todo = [item for plan in plans for item in plan.items]
        if all(plan.known.backend.native for plan in plans) and not any(map(sharded.is_shard, todo)):
            plans = [*plans, *self._resting(groups.resting(todo), plans)]
        tables = []
        for group in _together(plans):
            for plan in group:
                for item in plan.items:
                    item.lay_out()
            tables.append(Launched(group, table(group, scaling)))
        norm = self._norm(plans, [], scaling)
        try:
            return BoundStep(groups, tables, norm), tables
        except ValueError as error:  # a number that only Python can hold
            raise Unbound(str(error)) from None
        finally:
            for entry in tables:
                entry.launch.let_go()
            if norm is not None:
                norm.let_go()

    def _resting(self, resting: list[Item], plans: list[Bucket]) -> list[Bucket]:
        """Plans for parameters that have no gradient now, as far as kernels of these plans step them when they have."""
        known = {id(plan.known) for plan in plans}
        usable = [item for item in resting if items.dense(item.param) and item.walkable()]
        found = [plan for _, plan in self._traced(usable, 0, len(self.callbacks))]
        return [
            plan
            for plan in found
            if isinstance(plan, Bucket) and id(plan.known) in known and not unbindable([plan])
        ]

    def _note(self, why: str) -> None:
        """Note why a step was bound anew, or not at all."""
        _forget(self._known, MAX_STRUCTURES)
        _forget(self.verdicts.unfused, MAX_STRUCTURES)
        self.steps.note(why, anew=True)
        told = leaf.native is None or self.backend == "reference" or self.verdicts.all()
        if self.steps.keeps_failing and not told:
            self.verdicts.warn(
                "anew",
                f"most of the last {RECENT} steps took Python work for every tensor, which is slow: {why}. Remedy: "
                "leave between steps as it is what this names; opt.explain() says how each step went",
            )

    def _computed(
        self, plans: list[Bucket], unfused: list[Item], scaling: Scaling
    ) -> list[tuple[Item, Item]]:
        """The items that plans leave with work copies on which every callback has been run; none if it is skipped."""
        unfused.sort(key=lambda item: item.where)
        copies = items.work_copies(unfused, transforms.active())
        work = [work for _, work in copies]
        self.norm = self._scale(plans, work, scaling)
        self._launched = list(self.norm.kernels) if self.norm else []
        if copies and scaling.amp and scaling.skipped({item.param.device for item in unfused}):
            return []
        span = range(len(self.callbacks)) if self.backend == "reference" else self.verdicts.span()
        self._acted = False
        self._advance(work, 0, span.start)
        self._acted = bool(span)
        self._run_eagerly(span, work)
        self._advance(work, span.stop, len(self.callbacks))
        return copies

    def foresee(self, todo: list[Item]) -> list[tuple[Kernel, int]]:
        """What a step of these items would launch, as far as that is known before callbacks run eagerly."""
        try:
            plans, _ = self.prepare(sharded.localized(todo))
        except ActsAfterAll:
            return self.foresee(todo)
        return _counted([(plan.kernel, len(plan.items)) for plan in plans])

    def prepare(self, todo: list[Item]) -> tuple[list[Bucket], list[Item]]:
        """Trace and compile: plans for the buckets that fuse whole, and the items that need work copies."""
        self.read = self._sources.now()
        plans: list[Bucket] = []
        unfused: list[Item] = []
        for bucket, plan in self._traced(todo, 0, len(self.callbacks)):
            if isinstance(plan, Bucket):
                fuses = [item.fuses(plan.known.backend) for item in bucket]
                plan.items = list(compress(bucket, fuses))
                plans += [plan] if plan.items else []
                bucket = [item for item, fused in zip(bucket, fuses, strict=True) if not fused]
            unfused += map(sharded.unfused, bucket)
        return plans, unfused

    def _traced(
        self, todo: list[Item], first: int, stop: int, work: bool = False
    ) -> list[tuple[list[Item], Bucket | int]]:
        """Each bucket with its plan, or the number of its first callback that has no fused form."""
        while True:
            try:
                buckets = self._buckets(todo, work)
                if self.backend == "reference":
                    return [(bucket, first) for bucket, _ in buckets]
                return [(bucket, self._fuse(bucket, signature, first, stop)) for bucket, signature in buckets]
            except NeedsAttribute as need:
                self.attributes += (need.name,)
            except ActsAfterAll:
                if not self._acted:
                    raise

    def _buckets(self, todo: list[Item], work: bool = False) -> list[tuple[list[Item], Signature]]:
        """Items of one group with one signature, together."""
        buckets: dict[tuple[int, tuple], list[Item]] = {}
        for item in todo:
            buckets.setdefault((item.where[0], item.visible(self.attributes, work)), []).append(item)
        return [(bucket, Signature(*visible)) for (_, visible), bucket in buckets.items()]

    # -- fusing --
    def _fuse(self, bucket: list[Item], signature: Signature, first: int, stop: int) -> Bucket | int:
        """The plan of callbacks ``first`` up to ``stop``, or the number of the first one that has to run eagerly.

        The scalar program of an earlier trace is replayed where that is sound, else the callbacks are traced.
        """
        if not backends.candidates(self.backend, signature.device):
            return first
        eager = self.verdicts.first_eager(first, stop, signature)
        if eager is not None:
            return eager
        hyper = bucket[0].hyper
        plain = is_plain(v for _, v in signature.state) and is_plain(hyper.values())
        key = first, stop, structure_of(signature), signature.asked, static_of(hyper)
        known = self._known.setdefault(key, []) if plain else []
        for candidate in known:
            if candidate.replay is None or not all(map(operator.is_, candidate.read, self.read)):
                continue
            again = candidate.replay(hyper, dict(signature.state))
            if again and _fit(again[0], signature.compute):
                return self._planned(Bucket(bucket, candidate, *again))
        traced = self._trace(signature, hyper, first, stop, plain)
        if isinstance(traced, int):
            return traced
        if not _fit(traced.slot_values(), signature.compute):
            return first  # torch knows which number is an error, and which makes infinity
        compiled = self._compile(traced)
        if compiled is None:
            return first
        lasting = all(self.verdicts.lasting[first:stop]) and self.reads(self.read)
        sound = plain and lasting and can_replay(traced)
        why = "" if sound else self._unsound(traced, first, stop)
        entry = CompiledTrace(traced, *compiled, Replay(traced) if sound else None, self.read, why)
        if sound:
            known[:] = [*known[-MAX_KNOWN:], entry]
        return self._planned(Bucket(bucket, entry, traced.slot_values(), traced.new_numbers()))

    def _unsound(self, traced: Trace, first: int, stop: int) -> str:
        """Why the callbacks of a trace have to be run in every step."""
        for i in range(first, stop):
            if not self.verdicts.lasting[i]:
                where = place_of(self.callbacks[i])
                return f"{name_of(self.callbacks[i])} ({where}) reads what may change without its arguments"
        if not can_replay(traced):
            return (
                "a number that changes with each step leaves recorded arithmetic (float(), math, formatting)"
            )
        return "state or hyperparameters hold other objects than tensors, numbers and flags"

    def _trace(
        self, signature: Signature, hyper: dict[str, Any], first: int, stop: int, plain: bool
    ) -> Trace | int:
        """The trace, or the number of the callback that has none, with the verdict on it noted."""
        callbacks = range(first, stop)
        handed = {} if plain else self.verdicts.handed(signature, hyper, callbacks)
        snapshot = Snapshot([*self._sources.values(), *handed.values()])
        traced: Trace | int
        try:
            traced = trace(
                self.callbacks[first:stop],
                signature,
                hyper,
                first=first,
                state_dtype=self.state_dtype,
                work=signature.asked is not None,
            )
        except (Untraceable, Exception) as error:
            traced = getattr(error, "callback", first)
            self.verdicts.untraceable(traced, error, signature, handed)
        finally:
            changed = snapshot.restored()
        if changed:
            self.verdicts.changed(callbacks, handed)
        return traced

    def _planned(self, plan: Bucket) -> Bucket:
        self.history.note(plan.items[0].where, plan.kernel, plan.trace)
        self.verdicts.moved(plan.trace.moved)
        return plan

    def _compile(self, traced: Trace) -> tuple[Backend, Kernel] | None:
        """Backend and kernel, or None where no backend can compile and the reference has to step in."""
        names = [traced.scalars.expression(i) for i in traced.slots]
        device = traced.signature.device
        compiled = backends.compile_program(self.backend, device, traced.program, self.title, names)
        if compiled is None:
            self.backend = "reference"  # said by compile_program; do not ask a broken compiler again
            return None
        return compiled

    # -- launching --
    def _scale(self, plans: list[Bucket], work: list[Item], scaling: Scaling) -> Norm | None:
        """Take the norm of all gradients, and scale those of work copies."""
        norm = self._norm(plans, work, scaling)
        if norm is not None:
            norm.measure()
        for item in work if scaling else ():
            item.grad.mul_(scaling.buffer(FACTOR, item.param.device))
        return norm

    def _norm(self, plans: list[Bucket], work: list[Item], scaling: Scaling) -> Norm | None:
        """What takes the norm of all gradients."""
        if scaling.max_norm is None or not (plans or work):
            return None
        for plan in plans:
            for item in plan.items:
                item.lay_out()
        launches = [
            (group[0].known.backend, [item for plan in group for item in plan.items])
            for group in _together(plans)
        ]
        return Norm(scaling, launches, work)

    def _launch(
        self,
        plans: list[Bucket],
        scaling: Scaling,
        groups: Groups | None = None,
        stores: Sequence[Change] = (),
    ) -> list[Launched]:
        """Launch the plans; with that ``stores`` are made, what eager callbacks leave."""
        together = _together(plans)
        # Before anything changes: a number may be too large for a float.
        tables = [np.array([plan.slots for plan in group], dtype=np.float64) for group in together]
        for plan in plans:
            for item in plan.items:
                item.lay_out()
        stepped = [(plan, item) for plan in plans for item in plan.items]
        changed = [_allocated(plan, item) | plan.numbers for plan, item in stepped]
        handed = [_handed(item, new, groups) for (_, item), new in zip(stepped, changed, strict=True)]
        launched, changes = [], []
        for group, slots in zip(together, tables, strict=True):
            prepared, runs = launch(group, slots, scaling)
            launched.append(Launched(group, prepared))
            changes += runs
        for plan, item in stepped:
            changes += _finishing(plan, item)
        commit([*changes, *handed, *stores])
        for entry in launched:
            entry.launch.let_go()
        self._launched += [(entry.kernel, entry.tensors) for entry in launched]
        return launched

    # -- work copies --
    def _advance(self, work: list[Item], first: int, last: int) -> None:
        """Run callbacks ``first`` up to ``last`` over work copies: a program as far as it goes, one eagerly, and on."""
        if first == last:
            return
        self._run_eagerly(range(first, last), [item for item in work if type(item) is sharded.Whole])
        found = self._fused_until([item for item in work if type(item) is Item], first, last)
        plans = [plan for plan, _, _ in found if plan is not None]
        self._launch(plans, _UNSCALED)
        for plan in plans:
            for item in plan.items:
                for key, dtype in plan.trace.asked.items():
                    reference.mark(item.state[key], dtype)
        for stop in sorted({stop for _, stop, _ in found} - {last}):
            rest = [item for _, i, bucket in found if i == stop for item in bucket]
            self._run_eagerly(range(stop, stop + 1), rest)
            self._advance(rest, stop + 1, last)

    def _fused_until(
        self, work: list[Item], first: int, last: int
    ) -> list[tuple[Bucket | None, int, list[Item]]]:
        """For each bucket the plan of the longest run of callbacks from ``first`` on that fuses, and where it ends."""
        done: list[tuple[Bucket | None, int, list[Item]]] = []
        for bucket, plan in self._traced(work, first, last, work=True):
            if isinstance(plan, Bucket):
                done.append((plan, last, bucket))
            elif plan == first:
                done.append((None, first, bucket))
            else:
                done += self._fused_until(bucket, first, plan)
        return done

    def _run_eagerly(self, span: range, work: list[Item]) -> None:
        watch = {i: self.verdicts.watching or asks_for_dtypes(self.callbacks[i]) for i in span if work}
        for item in work:
            for i in span:
                lent = self._lent = reference.Lent(item.owner, item.param)
                moved = reference.run_callback(self.callbacks[i], lent, item.state, item.hyper, watch[i])
                item.param = lent.work
                items.attach_gradient(item, item.param.grad)  # the callback may have set another
                if moved and self.verdicts.watching:
                    self.verdicts.moved([i])

    def _say(self, plans: list[Bucket], copies: list[tuple[Item, Item]]) -> None:
        """Warn of what runs eagerly and of what does nothing."""
        if self.backend != "reference":
            self.verdicts.say()
            whole = [work for _, work in copies if type(work) is sharded.Whole]
            tensors = [t for item in whole for t in (item.param, item.grad) if not items.walkable(t)]
            if tensors:
                kinds = ", ".join(sorted({type(t).__name__ for t in tensors}))
                what = f"tensors of type {kinds} are stepped unfused, by torch's own operations on them"
                self.verdicts.warn("whole", what)
        if plans or copies:
            states = [(item, plan.trace.asked | plan.numbers) for plan in plans for item in plan.items]
            states += [(item, work.state) for item, work in copies]
            self.verdicts.say_idle(
                dict.fromkeys(k for item, new in states for k in new if k not in item.state)
            )


def _fit(slots: Sequence[Scalar], compute: torch.dtype) -> bool:
    """Whether torch would take these numbers as they are: whole ones of 64 bits, others finite as floats if at all."""
    largest = torch.finfo(compute).max
    return all(
        -(2**63) <= x < 2**63 if type(x) is int else abs(x) <= largest or abs(x) == math.inf or x != x
        for x in slots
    )


_UNSCALED = Scaling(amp=False)


def _together(plans: list[Bucket]) -> list[list[Bucket]]:
    """The plans of each launch."""
    together: dict[tuple, list[Bucket]] = {}
    for plan in plans:
        together.setdefault((plan.kernel, plan.trace.signature.device), []).append(plan)
    return list(together.values())


def _allocated(plan: Bucket, item: Item) -> dict[str, torch.Tensor]:
    """New state; if there is no memory for it, nothing has changed."""
    try:
        return items.allocate(item, plan.trace.created, plan.trace.starts)
    except RuntimeError as error:
        group, i = item.where
        raise torch.OutOfMemoryError(
            f"no memory for the state ({', '.join(plan.trace.created)}) of parameter {i} of group {group}, which has "
            f"shape {tuple(item.param.shape)} and is on {item.param.device}; nothing was stepped. Remedy: "
            f"state_dtype=torch.bfloat16 halves it, or an optimizer with less state. {error}"
        ) from error


def _column(name: str, rows: list[Item], scaling: Scaling) -> list[torch.Tensor]:
    """The tensor of each row for a buffer of the program."""
    where, _, key = name.partition(".")
    if where in ("param", "grad"):
        return [getattr(item, where) for item in rows]
    if where == "scaling":
        return [scaling.buffer(name, rows[0].param.device)] * len(rows)
    return [(item.hyper if where == "hyper" else item.state)[key] for item in rows]


def _handed(item: Item, new: dict[str, Any], groups: Groups | None) -> Change:
    """What gives the user new state, which the item has at once."""
    seen, item.state = item.state, item.state | new
    return groups.hand_over(item) if groups and type(item) is Item else functools.partial(seen.update, new)


def _finishing(plan: Bucket, item: Item) -> list[Change]:
    """What is left to do after the launch: see `Item.finish`."""
    if type(item) is not Item:
        return [functools.partial(item.finish, plan.trace.created)]
    return [functools.partial(item.home.copy_, item.param)] if item.param is not item.home else []


def _counted(found: list[tuple[Kernel, int]]) -> list[tuple[Kernel, int]]:
    """How many tensors each kernel steps."""
    counts: dict[Kernel, int] = {}
    for kernel, n in found:
        counts[kernel] = counts.get(kernel, 0) + n
    return list(counts.items())


def table(plans: list[Bucket], scaling: Scaling) -> Launch:
    """The launch of plans that share a program, each a scalar set."""
    kernel, rows = plans[0].kernel, [item for plan in plans for item in plan.items]
    columns = {name: _column(name, rows, scaling) for name, _ in kernel.program.buffers}
    sets = [k for k, plan in enumerate(plans) for _ in plan.items]
    sizes = [item.param.numel() for item in rows]
    resident = any(item.hyper.get("capturable") for item in rows)
    return plans[0].known.backend.prepare(kernel, columns, sizes, sets, resident)


def launch(plans: list[Bucket], slots: np.ndarray, scaling: Scaling) -> tuple[Launch, list[Change]]:
    """The launch of these plans, each with its own row of scalars, and what runs it."""
    prepared, rows = table(plans, scaling), [item for plan in plans for item in plan.items]
    for name, _ in plans[0].kernel.program.stores:
        leaf.bump_versions(_column(name, rows, scaling))
    planned = None if any(isinstance(item, sharded.Shard) for item in rows) else prepared.planned(slots)
    if planned is not None:
        return prepared, list(leaf.calls(*planned))
    return prepared, [functools.partial(sharded.runner(prepared, rows), slots)]


def _forget(found: dict[Any, Any], most: int) -> None:
    """Drop what was found first, until this many are left."""
    for key in list(found)[: max(0, len(found) - most)]:
        del found[key]


@functools.lru_cache(maxsize=16)
def _known_traces(
    callbacks: tuple[Hashable, ...], backend: str, title: str, state_dtype: torch.dtype | None
) -> dict[tuple, list[CompiledTrace]]:
    """Compiled traces, shared by all optimizers with these callbacks: a thousand small ones trace once."""
    return {}
