"""One optimizer step: sort parameters into buckets, trace, compile, and only then launch.

Parameters whose callbacks all fuse are updated in place by kernels: one launch per stage for all that share a program.
Where a callback has no fused form, its parameters are stepped on work copies: a program up to that callback, the
callback itself run eagerly, the next program after it; results are stored when everything has succeeded. The reference
backend is the same with no program at all.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import env, reference
from ..callback import identity, name_of
from ..trace.number import Scalar
from ..trace.purity import Sources, is_pure
from ..trace.replay import Replay, can_replay
from ..trace.run import NeedsAttribute
from ..trace.signature import FACTOR, Signature, is_plain, static_of, structure_of
from ..trace.tensor import Untraceable
from ..trace.tracer import Trace, trace
from . import backends, items, leaf, sharded
from .backends import Backend, Kernel, Launch
from .history import History
from .items import Item
from .scaling import Norm, Scaling

MAX_KNOWN = 7
"""Traces of one structure that are kept for replay: the sides of branches on numbers that a schedule visits."""


class Eager(NamedTuple):
    """A callback that runs eagerly, and why."""

    callback: str
    reason: str


@dataclass
class Known:
    """A compiled trace, kept for later steps; ``replay`` is None if its callbacks have to be run every time."""

    trace: Trace
    backend: Backend
    kernel: Kernel
    replay: Replay | None


@dataclass
class Plan:
    """A bucket that fuses, with this step's scalars: launched when the whole step is known to work."""

    items: list[Item]
    known: Known
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

    plans: list[Plan]
    launch: Launch

    @property
    def kernel(self) -> Kernel:
        return self.plans[0].kernel

    @property
    def tensors(self) -> int:
        return sum(len(plan.items) for plan in self.plans)


class Resident:
    """Launches whose scalars live on the device, so that a CUDA graph of them can be replayed with others."""

    def __init__(self, launched: list[Launched], norm: Norm | None) -> None:
        self.norm = norm
        self.launches = [
            (entry.launch, [(plan.known.replay, plan.items[0].where[0]) for plan in entry.plans])
            for entry in launched
            if any(item.hyper.get("capturable") for plan in entry.plans for item in plan.items)
        ]

    def upload(self, hypers: list[dict[str, Any]]) -> None:
        """Send the scalars that follow from these hyperparameters of each group. Raises RuntimeError, sending none."""
        tables = []
        for launch, sets in self.launches:
            found = [replay and replay(hypers[group], {}) for replay, group in sets]
            for (replay, group), one in zip(sets, found, strict=True):
                if one is None:
                    why = (
                        "a branch that they decide goes another way now"
                        if replay
                        else "a callback is not pure"
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

    ``history`` has the kernels used so far, ``eager`` the verdicts on callbacks with no fused form, ``launched`` the
    kernels of the last step's launches, and how many tensors each stepped, ``norm`` how its gradients' norm was taken,
    ``resident`` its launches whose scalars live on the device.
    """

    def __init__(
        self,
        callbacks: Sequence[Callable[..., Any]],
        backend: str,
        title: str,
        state_dtype: torch.dtype | None,
    ) -> None:
        self.callbacks, self.backend = list(callbacks), backend
        self.title, self.state_dtype = title, state_dtype
        self.attributes: tuple[str, ...] = ()
        self.history = History()
        self.eager: dict[tuple[int, Any], Eager] = {}
        self.norm: Norm | None = None
        self.resident: Resident | None = None
        self.launched: list[tuple[Kernel, int]] = []
        self._pure = [is_pure(cb) for cb in callbacks]
        self._sources = Sources(cb for cb, pure in zip(callbacks, self._pure, strict=True) if pure)
        self._known = self._shared_traces()
        self._said: set[str] = set()

    @property
    def pure(self) -> bool:
        """Whether calling its callbacks has no effect but the one on their arguments."""
        return all(self._pure)

    def follows(self, callbacks: Sequence[Callable[..., Any]]) -> bool:
        """Whether it still does what these callbacks do."""
        return self.callbacks == callbacks and self._sources.unchanged()

    def _shared_traces(self) -> dict[tuple, list[Known]]:
        """Those of other engines with these callbacks; but what has a closure is not kept beyond its time."""
        key = (*map(identity, self.callbacks), *self._sources.found)
        try:
            if all(self._pure) and not self._sources.closed:
                return _known_traces(key, self.backend, self.title, self.state_dtype)
        except TypeError:  # a default that cannot be hashed
            pass
        return {}

    def step(self, todo: list[Item], scaling: Scaling) -> list[Launched]:
        """Step every item: its ``home`` is updated in place, its ``state`` holds the new state.

        If a callback or the compiler raises, nothing has changed. Returns the launches, if these were all of the step:
        nothing if a callback ran eagerly.
        """
        verdicts = dict(self.eager)
        try:
            plans, unfused = self.prepare(sharded.localized(todo))
            copies = [(item, items.work_copy(item)) for item in unfused]
            self.launched = []
            self.norm = self._scale(plans, [work for _, work in copies], scaling)
            if copies and scaling.amp and scaling.skipped({item.param.device for item in unfused}):
                copies = []
            self._advance([work for _, work in copies if type(work) is Item], 0)
            self._run_whole([work for _, work in copies if type(work) is sharded.Whole])
            self._say()
        except BaseException:
            self.eager = verdicts  # a callback that raised may fuse once it no longer does
            raise
        launched = self._launch(plans, scaling)
        self.resident = Resident(launched, self.norm)
        for item, work in copies:
            items.store(item, work, self.state_dtype)
        return [] if unfused else launched

    def foresee(self, todo: list[Item]) -> list[tuple[Kernel, int]]:
        """What a step of these items would launch, as far as that is known before callbacks run eagerly."""
        plans, _ = self.prepare(sharded.localized(todo))
        counts: dict[Kernel, int] = {}
        for plan in plans:
            counts[plan.kernel] = counts.get(plan.kernel, 0) + len(plan.items)
        return list(counts.items())

    def prepare(self, todo: list[Item]) -> tuple[list[Plan], list[Item]]:
        """Trace and compile: plans for the buckets that fuse whole, and the items that need work copies."""
        plans: list[Plan] = []
        unfused: list[Item] = []
        try:
            for bucket, signature in self._buckets(todo):
                plan = self.backend != "reference" and self._fuse(bucket, signature, 0, len(self.callbacks))
                if isinstance(plan, Plan):
                    fuses = [item.fuses(plan.known.backend) for item in bucket]
                    plan.items = list(compress(bucket, fuses))
                    plans += [plan] if plan.items else []
                    bucket = [item for item, fused in zip(bucket, fuses, strict=True) if not fused]
                unfused += map(sharded.unfused, bucket)
        except NeedsAttribute as need:
            self.attributes += (need.name,)
            return self.prepare(todo)
        return plans, unfused

    def _buckets(self, todo: list[Item], work: bool = False) -> list[tuple[list[Item], Signature]]:
        """Items of one group with one signature, together."""
        buckets: dict[tuple[int, Signature], list[Item]] = {}
        for item in todo:
            buckets.setdefault((item.where[0], item.signature(self.attributes, work)), []).append(item)
        return [(bucket, signature) for (_, signature), bucket in buckets.items()]

    # -- fusing --
    def _fuse(self, bucket: list[Item], signature: Signature, first: int, stop: int) -> Plan | int:
        """The plan of callbacks ``first`` up to ``stop``, or the number of the first one that has to run eagerly.

        The scalar program of an earlier trace is replayed where that is sound, else the callbacks are traced.
        """
        if not backends.candidates(self.backend, signature.device):
            return first
        structure = structure_of(signature)
        eager = [i for i in range(first, stop) if (i, structure) in self.eager]
        if eager:
            return eager[0]
        hyper = bucket[0].hyper
        plain = is_plain(v for _, v in signature.state) and is_plain(hyper.values())
        key = first, stop, structure, signature.asked, static_of(hyper)
        known = self._known.setdefault(key, []) if plain else []
        for candidate in known:
            again = candidate.replay and candidate.replay(hyper, dict(signature.state))
            if again:
                return self._planned(Plan(bucket, candidate, *again))
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
            i = getattr(error, "callback", first)
            reason = str(error) if isinstance(error, Untraceable) else f"{type(error).__name__}: {error}"
            self.eager[i, structure] = Eager(name_of(self.callbacks[i]), reason)
            return i
        compiled = self._compile(traced)
        if compiled is None:
            return first
        sound = plain and can_replay(traced) and all(self._pure[first:stop])
        entry = Known(traced, *compiled, Replay(traced) if sound else None)
        if sound:
            known[:] = [*known[-MAX_KNOWN:], entry]
        return self._planned(Plan(bucket, entry, traced.slot_values(), traced.new_numbers()))

    def _planned(self, plan: Plan) -> Plan:
        self.history.note(plan.items[0].where, plan.kernel, plan.trace)
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
    def _scale(self, plans: list[Plan], work: list[Item], scaling: Scaling) -> Norm | None:
        """Take the norm of all gradients, and scale those of work copies."""
        norm = None
        if scaling.max_norm is not None and (plans or work):
            for plan in plans:
                for item in plan.items:
                    item.lay_out()
            launches = [
                (group[0].known.backend, [item for plan in group for item in plan.items])
                for group in _together(plans)
            ]
            norm = Norm(scaling, launches, work)
        for item in work if scaling else ():
            item.grad.mul_(scaling.buffer(FACTOR, item.param.device))
        return norm

    def _launch(self, plans: list[Plan], scaling: Scaling) -> list[Launched]:
        together = _together(plans)
        # Before anything changes: a number may be too large for a float.
        tables = [np.array([plan.slots for plan in group], dtype=np.float64) for group in together]
        for plan in plans:
            for item in plan.items:
                item.lay_out()
        for item, made in [(item, _allocated(plan, item)) for plan in plans for item in plan.items]:
            item.state.update(made)
        launched = [
            Launched(group, launch(group, slots, scaling))
            for group, slots in zip(together, tables, strict=True)
        ]
        self.launched += [(entry.kernel, entry.tensors) for entry in launched]
        for plan in plans:
            for item in plan.items:
                item.state.update(plan.numbers)
                item.finish(plan.trace.created)
        return launched

    # -- work copies --
    def _advance(self, work: list[Item], first: int) -> None:
        """Run callbacks from ``first`` on over work copies: a program as far as that goes, one eagerly, and so on."""
        if first == len(self.callbacks):
            return
        if self.backend == "reference":
            for callback in self.callbacks[first:]:
                self._run_eagerly(callback, work)
            return
        try:
            found = [self._fuse_until(*bucket, first) for bucket in self._buckets(work, work=True)]
        except NeedsAttribute as need:
            self.attributes += (need.name,)
            self._advance(work, first)
            return
        plans = [plan for plan, _, _ in found if plan is not None]
        self._launch(plans, _UNSCALED)
        for plan in plans:
            for item in plan.items:
                for key, dtype in plan.trace.asked.items():
                    reference.mark(item.state[key], dtype)
        for stop in sorted({stop for _, stop, _ in found} - {len(self.callbacks)}):
            rest = [item for _, i, bucket in found if i == stop for item in bucket]
            self._run_eagerly(self.callbacks[stop], rest)
            self._advance(rest, stop + 1)

    def _fuse_until(
        self, bucket: list[Item], signature: Signature, first: int
    ) -> tuple[Plan | None, int, list[Item]]:
        """The plan of the longest run of callbacks from ``first`` on that fuses, if there is one, and where it ends."""
        stop = len(self.callbacks)
        while stop > first:
            plan = self._fuse(bucket, signature, first, stop)
            if isinstance(plan, Plan):
                return plan, stop, bucket
            stop = plan
        return None, first, bucket

    def _run_eagerly(self, callback: Callable[..., Any], work: list[Item]) -> None:
        for item in work:
            reference.run_callback(callback, item.param, item.state, item.hyper)
            items.attach_gradient(item, item.param.grad)  # the callback may have set another

    def _run_whole(self, work: list[Item]) -> None:
        """Run all callbacks eagerly, on tensors whose memory kernels cannot walk: there are no programs in between."""
        for callback in self.callbacks:
            self._run_eagerly(callback, work)
        tensors = [t for item in work for t in (item.param, item.grad) if not items.walkable(t)]
        if tensors and self.backend != "reference" and "whole" not in self._said:
            self._said.add("whole")
            kinds = ", ".join(sorted({type(t).__name__ for t in tensors}))
            text = f"fusedopt: tensors of type {kinds} are stepped unfused, by torch's own operations on them"
            warnings.warn(text, RuntimeWarning, stacklevel=env.caller_level())

    def _say(self) -> None:
        for eager in dict.fromkeys(self.eager.values()):
            if eager.callback not in self._said:
                self._said.add(eager.callback)
                text = f"fusedopt: the callback {eager.callback} runs eagerly, parameter by parameter: {eager.reason}"
                warnings.warn(text, RuntimeWarning, stacklevel=env.caller_level())


_UNSCALED = Scaling(amp=False)


def _together(plans: list[Plan]) -> list[list[Plan]]:
    """The plans of each launch."""
    together: dict[tuple, list[Plan]] = {}
    for plan in plans:
        together.setdefault((plan.kernel, plan.trace.signature.device), []).append(plan)
    return list(together.values())


def _allocated(plan: Plan, item: Item) -> dict[str, torch.Tensor]:
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


def launch(plans: list[Plan], slots: np.ndarray, scaling: Scaling) -> Launch:
    """Launch plans that share a program, each with its own row of scalars."""
    kernel, rows = plans[0].kernel, [item for plan in plans for item in plan.items]
    columns = {name: _column(name, rows, scaling) for name, _ in kernel.program.buffers}
    sets = [k for k, plan in enumerate(plans) for _ in plan.items]
    sizes = [item.param.numel() for item in rows]
    resident = any(item.hyper.get("capturable") for item in rows)
    prepared = plans[0].known.backend.prepare(kernel, columns, sizes, sets, resident)
    sharded.run(prepared, slots, rows)
    for name, _ in kernel.program.stores:
        leaf.bump_versions(columns[name])
    return prepared


@functools.lru_cache(maxsize=64)
def _known_traces(
    callbacks: tuple[Hashable, ...], backend: str, title: str, state_dtype: torch.dtype | None
) -> dict[tuple, list[Known]]:
    """Compiled traces, shared by all optimizers with these callbacks: a thousand small ones trace once."""
    return {}
