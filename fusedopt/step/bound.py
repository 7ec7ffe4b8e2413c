"""Steps of known structure: bound once, then done in C++ without Python work per tensor (csrc/bound_step.h).

What a step depends on is of two kinds. What would take another kernel is guarded: which parameters, groups and state
entries there are, dtypes, sizes, flags. The rest is read anew in each step: addresses, numbers, which gradients there
are.
A step that is none of those bound so far says why, is bound, and then runs like the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch

from ..backends import Kernel
from ..backends.base import HEAD
from ..callback import GROUPS_OWN
from ..extension import leaf
from ..ir.ops import TENSOR
from ..ir.program import Buffer
from ..trace.signature import PLAIN, Foreign
from . import sharded
from .buckets import Bucket
from .items import Groups, Item, dense, inside
from .launching import Launched
from .rounds import Round
from .scaling import Norm, Scaling

MOST = 6
"""Bound steps of one optimizer that are kept: the sides of branches that a schedule visits, losses in turn."""
RECENT = 16
"""Steps of which most have to be bound anew before that is worth a warning."""


class Unbound(Exception):
    """A step that cannot be bound, and why."""


class BoundStep:
    """One structure of steps. ``run`` does a step of it, or says why this is none, having changed nothing.

    ``scaling``: whose numbers its tables have the addresses of. ``among``: the parameters, by their ids, that it is
    about; None: all. Others may have gradients, and keep them.
    """

    def __init__(
        self,
        groups: Groups,
        launched: Sequence[Launched],
        rounds: list[Round],
        scaling: Scaling,
        among: Container[int] | None = None,
    ) -> None:
        self.groups, self.rounds, self.scaling = groups, rounds, scaling
        self.resident: Any = None
        self._extra = list(groups.extra)
        self.read: list[Any] = []
        described, cells = _described(groups, launched)
        state = groups.state
        self.launches = [entry.launch for entry in launched]
        self.kernels = [entry.kernel for entry in launched]
        self.slots = [np.zeros((entry.launch.n_sets, entry.kernel.program.slots)) for entry in launched]
        if any(isinstance(each, Norm) for each in rounds) and any(column_of(e, "grad") < 0 for e in launched):
            raise Unbound("a kernel reads no gradient, whose norm is taken")
        natives = [None if _exchanges(entry) else entry.launch.native() for entry in launched]
        before = [each.native() for each in rounds] if None not in natives else [None for _ in rounds]
        if None in before:  # rows and scalars are the caller's, then
            natives = [None] * len(natives)
        native: Any = leaf.native
        runs: list[Any] = []
        buckets: list[Any] = []
        rows: list[tuple[Item, int]] = []
        known: dict[tuple[int, ...], int] = {}
        for k, entry in enumerate(launched):
            table = entry.launch.rows
            runs.append(
                native.Run(
                    native=natives[k],
                    rows=table.ctypes.data,
                    row_words=table.shape[1],
                    slots=self.slots[k].ctypes.data,
                    movable=entry.launch.movable,
                )
            )
            for plan in entry.plans:
                key: tuple[int, ...] = (k, plan.items[0].where[0], id(plan.known))
                if natives[k] is None:  # whose scalar sets are plans
                    key = *key, id(plan)
                if key not in known:
                    known[key] = len(buckets)
                    buckets.append(_bucket(groups, plan, k, cells))
                rows += [(item, known[key]) for item in plan.items]
        self._others = [
            (slots, _runner(entry))
            for entry, slots, one in zip(launched, self.slots, natives, strict=True)
            if one is None
        ]
        self._measured = None in before
        stepped = {id(item.owner) for item, _ in rows}
        every = [p for group in groups.live for p in group["params"]]
        self._bound = native.BoundStep(
            groups=described,
            buckets=buckets,
            runs=runs,
            params=[item.owner for item, _ in rows],
            states=[state[item.owner] for item, _ in rows],
            bucket_of=[bucket for _, bucket in rows],
            indices=[item.where[1] for item, _ in rows],
            absent=[p for p in every if id(p) not in stepped and (among is None or id(p) in among)],
            rounds=[] if self._measured else before,
            graded=not any(item.modes.bare for item, _ in rows),
        )

    def stepped(self) -> list[tuple[Kernel, int]]:
        """The kernels of its last step, those of rounds first, and how many tensors each went over."""
        counts = self._bound.stepped()
        found = [counted for each in self.rounds for counted in each.counted(counts)]
        return [*found, *((kernel, n) for kernel, n in zip(self.kernels, counts, strict=True) if n)]

    def run(self, scaling: Scaling) -> str | None:
        """Do the step if it is of this structure; else why not."""
        if scaling.measures != any(isinstance(each, Norm) for each in self.rounds):
            return "max_grad_norm was set or unset"
        if scaling is not self.scaling:
            return "gradients are scaled in another way"
        extra = self.groups.extra
        if list(extra) != self._extra:
            return "other extra tensors are given"
        measure = self._measure if self._measured else None
        why = self._bound.step(
            self.groups.live, self.groups.state, scaling.max_norm or 0.0, measure, list(extra.values())
        )
        if why is None:
            for slots, run in self._others:
                run(slots)
            for each in self.rounds:
                each.commit()
        return why

    def _measure(self) -> None:
        tables = [launch.rows for launch in self.launches]
        for each in self.rounds:
            each.follow(tables)
            each.run(self.slots)


def unbindable(plans: Sequence[Bucket]) -> str | None:
    """Why a step of these plans cannot be bound; None if it can."""
    for plan in plans:
        item = plan.items[0]
        where = f"group {item.where[0]}"
        if plan.by_rows and not all(each.home.is_contiguous() for each in plan.items):
            return f"{where}: kernels need dimensions in their order, and a parameter's memory has another"
        if plan.trace.created:
            return f"{where}: state is new"
        if plan.known.replay is None:
            return f"{where}: callbacks have to be run in every step, because {plan.known.why}"
        old = dict(plan.trace.signature.state)
        for key, value in plan.numbers.items():
            if key not in old:
                return f"{where}: state is new"
            if type(value) is not type(old[key]) or (type(value) not in (int, float) and value != old[key]):
                return f"{where}: the state {key!r} becomes another flag, or a number of another type"
        for item in plan.items:
            if item.alike is not None:
                continue
            if item.param is not item.home or not dense(item.param):
                return f"parameter {item.where[1]} of group {item.where[0]}: it is not dense in memory"
            if type(item.owner).grad is not torch.Tensor.grad:
                return (
                    f"parameter {item.where[1]} of group {item.where[0]}: its class has gradients of its own"
                )
    return None


def _exchanges(entry: Launched) -> bool:
    """Whether processes exchange what its stages reduce, or one without elements has to keep a tensor's numbers."""
    shards = [item for plan in entry.plans for item in plan.items if sharded.is_shard(item)]
    reduces = any(s.reductions for s in entry.kernel.stages)
    empty = any(item.param.numel() == 0 for item in shards)
    return bool(shards) and (reduces or (empty and sharded.looks_at_all(entry.kernel.program)))


def _runner(entry: Launched) -> Callable[[np.ndarray], None]:
    return sharded.runner(entry.launch, [item for plan in entry.plans for item in plan.items])


def column_of(entry: Launched, name: str) -> int:
    """Where a buffer's address is in a row; -1 if the program has no such buffer."""
    found = [n for n, _ in entry.kernel.program.buffers]
    return HEAD + found.index(name) if name in found else -1


def _described(groups: Groups, launched: Sequence[Launched]) -> tuple[list[Any], list[dict[Any, int]]]:
    """What there is to check and read of each group, and the cell of each number by its callbacks' name."""
    native: Any = leaf.native
    described, places = [], []
    cells = count()
    for g, group in enumerate(groups.live):
        hypers, place = [], {}
        for key, i, part, name, seen, lowest in groups.places(group):
            cell, words = -1, []
            if isinstance(seen, torch.Tensor):
                words = [w for entry in launched for w in _words(entry, g, name)]
            elif type(seen) in (int, float):
                place[name] = cell = next(cells)
            elif type(part) not in PLAIN and not (key == GROUPS_OWN and callable(part)):
                raise Unbound(f"group {g}: {key!r} is of type {type(part).__name__}")
            kind = type(group[key])
            hypers.append(
                native.Hyper(
                    key=key, index=i, value=part, cell=cell, lowest=lowest, words=words, container=kind
                )
            )
        described.append(native.Group(params=list(group["params"]), keys=list(group), hypers=hypers))
        places.append(place)
    return described, places


def _words(entry: Launched, g: int, name: Any) -> list[int]:
    """Where in a launch's table the address of a hyperparameter of this group belongs."""
    column, table = column_of(entry, f"hyper.{name}"), entry.launch.rows
    rows = [item for plan in entry.plans for item in plan.items]
    of_group = (i for i, item in enumerate(rows) if item.where[0] == g)
    return [table.ctypes.data + 8 * (table.shape[1] * i + column) for i in of_group] if column >= 0 else []


def _bucket(groups: Groups, plan: Bucket, launch: int, places: Sequence[dict[Any, int]]) -> Any:
    """Rows of one group with one program: what their state has, and what its scalars are made of."""
    native: Any = leaf.native
    replay, program, item = plan.known.replay, plan.kernel.program, plan.items[0]
    assert replay is not None
    signature, group = plan.trace.signature, item.where[0]
    cells = {name: cell for g in groups.numbers_of(group) for name, cell in places[g].items()}
    seen = dict(signature.state)
    columns = {name: HEAD + k for k, (name, _) in enumerate(program.buffers)}
    written = {name for name, _ in program.stores}
    kinds = native.Kind
    entries: list[Any] = []
    at: dict[str, int] = {}
    numbers: dict[str, int] = {}
    for stored, nested, inner, key, value in groups.entries(item.owner):
        what, buffer = seen.get(key), f"state.{key}"
        kind, kept = kinds.flag, value
        if groups.ignores(group, key):
            kind = kinds.ignored
        elif isinstance(what, Buffer):
            other = what.dims is not None or value.shape != item.owner.shape  # as what is flattened
            plain = kinds.part if other else kinds.element
            kind, kept = (kinds.whole if what.kind == TENSOR else plain), what.dtype
        elif isinstance(what, Foreign):
            kind, kept = kinds.other, what.dtype
        elif type(what) in (int, float):
            kind, kept, numbers[key] = kinds.number, what, len(numbers)
        at[key] = len(entries)
        container = groups.state[item.owner][stored] if nested else None
        entries.append(
            native.Entry(
                key=stored,
                kind=kind,
                value=kept,
                column=columns.get(buffer, -1),
                written=buffer in written,
                nested=nested,
                inner=inner,
                owner=None if container is None or inside(container) is container else type(container),
                held=value.dtype if kind == kinds.number and isinstance(value, torch.Tensor) else None,
            )
        )
    for which, key in enumerate(groups.extra):
        what = seen.get(key)
        kind = kinds.flag
        if isinstance(what, Buffer):
            kind = kinds.whole if what.kind == TENSOR else kinds.element
        entries.append(
            native.Entry(
                key=key,
                kind=kind,
                value=what.dtype if isinstance(what, Buffer) else None,
                column=columns.get(f"state.{key}", -1),
                written=False,
                nested=False,
                inner=None,
                extra=which,
            )
        )
    try:
        leaves = [
            (True, numbers[name]) if kind == "state" else (False, cells[(name, *path) if path else name])
            for kind, name, *path in replay.leaves
        ]
        outputs = [at[key] for key in replay.number_keys if numbers[key] >= 0]
    except KeyError as key:
        raise Unbound(f"group {group}: {key} is no number that C++ can hold") from None
    return native.Bucket(
        group=group,
        launch=launch,
        param=signature.param,
        grad=signature.grad,
        param_column=columns.get("param", -1),
        grad_column=columns.get("grad", -1),
        param_written="param" in written,
        grad_written="grad" in written,
        looked_at=bool(signature.attributes),
        entries=entries,
        program=native.ScalarProgram(replay.instructions, replay.slots, replay.numbers, replay.guards),
        leaves=leaves,
        outputs=outputs,
        narrow=program.compute == torch.float32,
    )


@dataclass
class Steps:
    """How an optimizer's steps went: how many were repeated, how many anew, looking at every tensor; and why."""

    repeated: int = 0
    anew: int = 0
    since: int = 0
    """The number of the last step that was anew, from 1 on."""
    why: str = ""
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT))

    def note(self, why: str = "", anew: bool = False) -> None:
        self.recent.append(bool(why))
        if anew:
            self.anew, self.why = self.anew + 1, why
            self.since = self.anew + self.repeated
        else:
            self.repeated += 1

    @property
    def keeps_failing(self) -> bool:
        """Whether most of the recent steps were bound anew."""
        return len(self.recent) == RECENT and sum(self.recent) > RECENT // 2

    def __str__(self) -> str:
        total = self.repeated + self.anew
        if not total:
            return ""
        which = "the last one" if self.since == total else f"the last of these was step {self.since}"
        why = f": {self.why}" if self.why else ""
        return f"{self.repeated} of {total} without Python work for each tensor; {self.anew} with it, {which}{why}"
