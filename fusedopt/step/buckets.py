"""Sort the tensors of a step into buckets, and trace and compile what their callbacks do: each bucket gets its kernel.

A bucket is the parameters of one group that callbacks cannot tell apart. Compiled traces are kept: a later step with
other numbers replays the scalar program of one, where that is sound, and runs no callback.
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

import torch

from .. import backends
from ..backends import Backend, Kernel
from ..callback import identity, name_of, place_of
from ..ir.program import Buffer, Program
from ..trace.number import Scalar
from ..trace.purity import calls_total, sources_of
from ..trace.replay import Replay, can_replay
from ..trace.signals import Begins, NeedsAttribute, Untraceable
from ..trace.signature import Signature, is_plain, static_of, structure_of
from ..trace.snapshot import Snapshot, same_constant
from ..trace.sources import seeks_extremes
from ..trace.tracer import Trace, trace
from . import externs, sharded
from .history import History
from .items import Item, has_flag
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

    ``read`` is the data that the callbacks found around them: with other data the trace would be another. ``rounds``
    are the kernels of the trace's, see `totals`.
    """

    trace: Trace
    backend: Backend
    kernel: Kernel
    replay: Replay | None
    read: list[Any]
    why: str = ""
    rounds: tuple[tuple[Backend, Kernel], ...] = ()


@dataclass
class Bucket:
    """A bucket that fuses, with this step's scalars: launched when the whole step is known to work."""

    items: list[Item]
    known: CompiledTrace
    slots: Sequence[Scalar]
    numbers: dict[str, Any]

    @functools.cached_property
    def memory(self) -> externs.Memory:
        """What its programs leave for torch calls, and find of them."""
        assert self.trace.externs is not None
        return externs.memory(self.trace.externs, len(self.items), self.trace.signature.device)

    @property
    def trace(self) -> Trace:
        return self.known.trace

    @property
    def kernel(self) -> Kernel:
        return self.known.kernel

    @property
    def kernels(self) -> list[Kernel]:
        """With those of rounds, in the order of their launches."""
        return [*(kernel for _, kernel in self.known.rounds), self.kernel]

    @property
    def by_rows(self) -> bool:
        """Whether its kernel needs memory in the order of dimensions."""
        return self.trace.contiguous


class Buckets:
    """The buckets of one callback list's steps. It holds no tensors.

    ``history`` has the kernels used so far, ``verdicts`` which callbacks run eagerly, ``attributes`` what callbacks ask
    of parameters, ``read`` the data that they found around them in the last step, ``known`` the traces by structure,
    ``totalling`` the callbacks that call ``fusedopt.total``.
    ``acted``: whether callbacks have been run eagerly in this step, so that none can be taken back. ``beside``:
    callbacks that are run over the same state at other times, if there may be such. ``own``: how
    many of them are the optimizer's own list, if param groups have others.
    """

    def __init__(
        self,
        callbacks: Sequence[Callable[..., Any]],
        backend: str,
        title: str,
        state_dtype: torch.dtype | None,
        said: set[Any] | None = None,
        beside: Sequence[Callable[..., Any]] | None = None,
        own: int | None = None,
    ) -> None:
        self.callbacks, self.backend = list(callbacks), backend
        self.title, self.state_dtype = title, state_dtype
        self.attributes: tuple[str, ...] = ()
        self.history = History()
        self.verdicts = Verdicts(self.callbacks, said, beside)
        self._sources = sources_of(callbacks)
        self.totalling = frozenset(i for i, cb in enumerate(callbacks) if calls_total(cb))
        self.read = self._sources.now()
        self.known = self._shared_traces()
        self.acted = False
        self._own = len(self.callbacks) if own is None else own
        self._spans: Sequence[range] = ()

    @property
    def spans(self) -> Sequence[range]:
        """For each param group which of the callbacks are its list; none where all are."""
        return self._spans

    @spans.setter
    def spans(self, spans: Sequence[range]) -> None:
        self._spans, self.verdicts.lists = spans, list(dict.fromkeys(spans))

    def span_of(self, item: Item) -> range:
        """The callbacks that step it, by number."""
        return self._spans[item.where[0]] if self._spans else range(len(self.callbacks))

    def outdated(self, callbacks: Sequence[Callable[..., Any]]) -> str:
        """Why they are no longer these callbacks, which are the first list if there are several; "" if they are."""
        if self.callbacks[: self._own] != callbacks:
            return "there are other callbacks"
        what = self._sources.changed()
        return what and f"{what} is another object than it was when callbacks were traced"

    def around(self) -> list[Any]:
        """The data around the callbacks that a call of one may change."""
        return self._sources.values()

    def changed(self, data: list[Any]) -> str | None:
        """Why this (``read`` after an earlier step) is not the data that the callbacks find around them now."""
        now = self._sources.now()
        same = all(map(operator.is_, data, now)) or all(map(same_constant, data, now))
        return None if same else "a constant that a callback reads has changed"

    def forget(self) -> None:
        """Drop the structures that were met first, if there are too many."""
        drop_first(self.known, MAX_STRUCTURES)
        drop_first(self.verdicts.unfused, MAX_STRUCTURES)

    def _shared_traces(self) -> dict[tuple[Any, ...], list[CompiledTrace]]:
        """Those of other engines with these callbacks; but what has a closure is not kept beyond its time."""
        key = (*map(identity, self.callbacks), *self._sources.found, *backends.ROWS.items())
        try:
            if all(self.verdicts.lasting) and not self._sources.closed and not self.read:
                known = known_traces(key, self.backend, self.title, self.state_dtype)
                weakref.finalize(self, drop_first, known, KEPT_STRUCTURES).atexit = False
                return known
        except TypeError:  # a default that cannot be hashed
            pass
        return {}

    def prepare(self, todo: list[Item]) -> tuple[list[Bucket], list[Item]]:
        """Trace and compile: plans for the buckets that fuse whole, and the items that need work copies."""
        self.read = self._sources.now()
        plans: list[Bucket] = []
        unfused: list[Item] = []
        for bucket, plan in self.traced(todo):
            if isinstance(plan, Bucket):
                dims = plan.trace.signature.dims is not None
                along = dims or plan.trace.externs is not None
                shards = any(map(sharded.is_shard, bucket))
                programs = [plan.kernel.program, *(kernel.program for _, kernel in plan.known.rounds)]
                whole = shards and any(map(sharded.looks_at_all, programs))
                state = (*dict(plan.trace.signature.state).values(), *plan.trace.created.values())
                kept = any(isinstance(v, Buffer) and v.dims for v in state)
                mine = (self.callbacks[i] for i in self.span_of(bucket[0]))
                # A part without elements keeps no rows or columns, and has no largest element.
                if shards and (kept or (dims and any(map(seeks_extremes, mine)))):
                    for item in bucket:
                        sharded.check_rows(item)
                fuses = [item.fuses(plan.known.backend, along, whole) for item in bucket]
                plan.items = list(compress(bucket, fuses))
                plans += [plan] if plan.items else []
                bucket = [item for item, fused in zip(bucket, fuses, strict=True) if not fused]
            unfused += map(sharded.unfused, bucket)
        if self.backend != "reference" and any(map(has_flag, unfused)):
            raise Begins  # callbacks that run eagerly are to find what has begun
        return plans, unfused

    def traced(
        self, todo: list[Item], span: range | None = None, work: bool = False
    ) -> list[tuple[list[Item], Bucket | int]]:
        """Each bucket with its plan, or the number of its first callback that has no fused form.

        ``span``: the callbacks, if not the whole list of each.
        """
        while True:
            try:
                found = [
                    (items, signature, self.span_of(items[0]) if span is None else span)
                    for items, signature in self._sorted(todo, work)
                ]
                if self.backend == "reference":
                    return [(bucket, own.start) for bucket, _, own in found]
                return [
                    (bucket, self._fuse(bucket, seen, own.start, own.stop)) for bucket, seen, own in found
                ]
            except NeedsAttribute as need:
                self.attributes += (need.name,)
            except ActsAfterAll:
                if not self.acted:
                    raise

    def _sorted(self, todo: list[Item], work: bool = False) -> list[tuple[list[Item], Signature]]:
        """Items of one group with one signature, together."""
        buckets: dict[tuple[int, tuple[Any, ...]], list[Item]] = {}
        known: dict[Any, list[Item]] = {}
        for item in todo:
            alike = item.alike if not self.attributes else None
            if alike is None or alike not in known:
                place = item.where[0], item.visible(self.attributes, work)
                known[alike] = buckets.setdefault(place, [])
            known[alike].append(item)
        return [(bucket, Signature(*visible)) for (_, visible), bucket in buckets.items()]

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
        known = self.known.setdefault(key, []) if plain else []
        for candidate in known:
            if candidate.replay is None or not all(map(operator.is_, candidate.read, self.read)):
                continue
            again = candidate.replay(hyper, dict(signature.state))
            if again and fit(again[0], signature.compute):
                return self._planned(Bucket(bucket, candidate, *again))
        keeps = stop < self.span_of(bucket[0]).stop
        traced = self._trace(signature, hyper, range(first, stop), plain, keeps)
        if isinstance(traced, int):
            return traced
        if not fit(traced.slot_values(), signature.compute):
            return first  # torch knows which number is an error, and which makes infinity
        title = self.title if stop <= self._own else name_of(self.callbacks[stop - 1])
        compiled, rounds = self._compile(traced, title), self._compile_rounds(traced, title)
        if compiled is None or rounds is None:
            return first
        lasting = all(self.verdicts.lasting[first:stop]) and not self.changed(self.read)
        sound = plain and lasting and can_replay(traced)
        why = "" if sound else self._unsound(traced, first, stop)
        replay = Replay(traced) if sound else None
        entry = CompiledTrace(traced, *compiled, replay, self.read, why, rounds)
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
        self, signature: Signature, hyper: dict[str, Any], callbacks: range, plain: bool, keeps: bool
    ) -> Trace | int:
        """The trace, or the number of the callback that has none, with the verdict on it noted."""
        handed = {} if plain else self.verdicts.handed(signature, hyper, callbacks)
        snapshot = Snapshot([*self._sources.values(), *handed.values()])
        traced: Trace | int
        try:
            traced = trace(
                self.callbacks[callbacks.start : callbacks.stop],
                signature,
                hyper,
                first=callbacks.start,
                state_dtype=self.state_dtype,
                work=signature.asked is not None,
                keeps=keeps,
                lasting=self.verdicts.lasting[callbacks.start : callbacks.stop],
            )
        except (Untraceable, Exception) as error:
            traced = getattr(error, "callback", callbacks.start)
            self.verdicts.untraceable(traced, error, signature, handed)
        finally:
            changed = snapshot.restored()
        if changed:
            self.verdicts.changed(callbacks, handed)
        return traced

    def _planned(self, plan: Bucket) -> Bucket:
        self.history.note(plan.items[0].where, plan.kernels, plan.trace)
        self.verdicts.moved(plan.trace.moved)
        return plan

    def _compile(self, traced: Trace, title: str) -> tuple[Backend, Kernel] | None:
        """Backend and kernel, or None where no backend can compile and the reference has to step in."""
        return self._compile_program(traced, traced.program, title)

    def _compile_rounds(self, traced: Trace, title: str) -> tuple[tuple[Backend, Kernel], ...] | None:
        """Those of its rounds."""
        compiled = []
        for k, program in enumerate(traced.rounds):
            one = self._compile_program(traced, program, f"{title} round {k + 1}")
            if one is None:
                return None
            compiled.append(one)
        return tuple(compiled)

    def _compile_program(self, traced: Trace, program: Program, title: str) -> tuple[Backend, Kernel] | None:
        names = [traced.scalars.expression(i) for i in traced.slots]
        device = traced.signature.device
        compiled = backends.compile_program(self.backend, device, program, title, names)
        if compiled is None:
            self.backend = "reference"  # said by compile_program; do not ask a broken compiler again
            return None
        return compiled


def fit(slots: Sequence[Scalar], compute: torch.dtype) -> bool:
    """Whether torch would take these numbers as they are: whole ones of 64 bits, others finite as floats if at all."""
    largest = torch.finfo(compute).max
    return all(
        -(2**63) <= x < 2**63 if type(x) is int else abs(x) <= largest or abs(x) == math.inf or x != x
        for x in slots
    )


def drop_first(found: dict[Any, Any], most: int) -> None:
    """Drop what was found first, until this many are left."""
    for key in list(found)[: max(0, len(found) - most)]:
        del found[key]


@functools.lru_cache(maxsize=16)
def known_traces(
    callbacks: tuple[Hashable, ...], backend: str, title: str, state_dtype: torch.dtype | None
) -> dict[tuple[Any, ...], list[CompiledTrace]]:
    """Compiled traces, shared by all optimizers with these callbacks: a thousand small ones trace once."""
    return {}
