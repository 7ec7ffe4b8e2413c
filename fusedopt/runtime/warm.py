"""The warm step: a step like the last one, without Python work per tensor.

After a step that was one fused program per bucket, everything that decided it is recorded. If the next step finds all
of it unchanged (checked in C++), only what may change on every step is done: the scalar programs are replayed on this
step's hyperparameters and counters, for all scalar sets at once, and the same tables are launched again. In any doubt
the step is done the long way, which is always right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..names import NOT_NEGATIVE
from ..trace.replay import Replay, array
from . import leaf
from .cpu import HEAD
from .engine import Launched, Plan

if TYPE_CHECKING:
    from ..optimizer import Optimizer

FEW = 4
"""Up to this many scalar sets Python floats are faster than numpy arrays."""
SAME, TENSOR, NUMBER = range(3)


@dataclass
class Batch:
    """Scalar sets of one launch that share a replay.

    ``sets`` are their numbers among all sets, ``rows`` their rows in ``slots``; ``leaves`` says for each input of the
    replay where it is found: a column of cells, or the key of scalar state; ``whole`` which cells are integers.
    """

    replay: Replay
    sets: list[int]
    rows: slice
    slots: np.ndarray
    leaves: list[np.ndarray | str]
    whole: np.ndarray

    def evaluate(self, cells: np.ndarray, numbers: dict[str, list]) -> dict[str, Sequence] | None:
        """Fill the slots; returns the new scalar state by key, or None if a guard no longer holds."""
        ways = (self._one_by_one,) if len(self.sets) <= FEW else (self._all_at_once, self._one_by_one)
        for evaluate in ways:
            with contextlib.suppress(ArithmeticError, TypeError, ValueError):
                return evaluate(cells, numbers)
        return None

    def _one_by_one(self, cells: np.ndarray, numbers: dict[str, list]) -> dict[str, Sequence] | None:
        out: list[tuple] = []
        for k, s in enumerate(self.sets):
            inputs = [
                numbers[leaf][s] if isinstance(leaf, str) else self._cell(cells, leaf[k])
                for leaf in self.leaves
            ]
            slots, new, guards = self.replay.function(*inputs)
            if not all(guards):
                return None
            self.slots[self.rows.start + k] = slots
            out.append(new)
        return {key: [new[i] for new in out] for i, key in enumerate(self.replay.number_keys)}

    def _cell(self, cells: np.ndarray, k: int) -> int | float:
        value = cells.item(k)
        return int(value) if self.whole[k] else value

    def _all_at_once(self, cells: np.ndarray, numbers: dict[str, list]) -> dict[str, Sequence] | None:
        """With numpy; raises where Python's numbers might do something else."""
        n = len(self.sets)
        inputs = [
            array([numbers[leaf][s] for s in self.sets])
            if isinstance(leaf, str)
            else cells[leaf]
            if not self.whole[leaf].any()
            else array([self._cell(cells, k) for k in leaf])
            for leaf in self.leaves
        ]
        with np.errstate(all="raise", under="ignore"):
            slots, new, guards = self.replay.array_function(*inputs)
        if not all(np.all(g) for g in guards):
            return None
        for i, value in enumerate(slots):
            self.slots[self.rows, i] = value
        return {k: np.broadcast_to(v, n).tolist() for k, v in zip(self.replay.number_keys, new, strict=True)}


class Warm:
    """A recorded step of one optimizer. ``step`` repeats it and returns True, or returns False having done nothing."""

    def __init__(
        self,
        opt: Optimizer,
        launched: list[Launched],
        hypers: list[list[tuple]],
        place: list[dict[Any, int]],
        whole: np.ndarray,
    ) -> None:
        self.state, self.version, self.engine = opt.state, opt.state.version, opt.engine
        self.launches = [
            (entry.launch, np.array([p.slots for p in entry.plans], dtype=np.float64)) for entry in launched
        ]
        plans = [plan for entry in launched for plan in entry.plans]
        self.keys = sorted({key for plan in plans for key in _number_keys(plan)})
        self.numbers = {key: [plan.numbers.get(key) for plan in plans] for key in self.keys}
        self.cells = np.zeros(len(whole))
        self.batches = _batches(launched, [slots for _, slots in self.launches], place, whole)
        rows = [
            row for entry, first in _with_first_set(launched) for row in _rows(opt, entry, first, self.keys)
        ]
        stepped = {id(item.home) for plan in plans for item in plan.items}
        absent = [p for group in opt.param_groups for p in group["params"] if id(p) not in stepped]
        self.recording = leaf.native.Recording(list(opt.param_groups), absent, rows, hypers)  # type: ignore[union-attr]

    def step(self, opt: Optimizer) -> bool:
        """Repeat the recorded step if it is still the right one."""
        if opt.state is not self.state or self.state.version != self.version or opt.engine is not self.engine:
            return False
        if not self.recording.check(opt.param_groups, self.cells.ctypes.data):
            return False
        new = {key: list(values) for key, values in self.numbers.items()}
        for batch in self.batches:
            found = batch.evaluate(self.cells, self.numbers)
            if found is None:
                return False
            for key, values in found.items():
                for s, value in zip(batch.sets, values, strict=True):
                    new[key][s] = value
        for launch, slots in self.launches:
            launch.run(slots)
        self.numbers = new
        self.recording.commit([new[key] for key in self.keys])
        return True


def record(opt: Optimizer, launched: list[Launched]) -> Warm | None:
    """The recording of a step that was these launches, or None if its like needs a look at every tensor again."""
    plans = [plan for entry in launched for plan in entry.plans]
    if leaf.native is None or not plans or not all(map(_repeatable, plans)):
        return None
    hypers, place, whole = _hyper_cells(opt)
    found = all(key in place[plan.items[0].where[0]] for plan in plans for key in _hyper_leaves(plan))
    return Warm(opt, launched, hypers, place, whole) if found else None


def _repeatable(plan: Plan) -> bool:
    """Whether a step like it can be repeated: no state is new, and only tensors and numbers in it change.

    Its kernel has to take the user's own tensors (where ``p.grad`` is torch's, and not of a subclass that puts another
    in its place), and its scalars have to be replayable.
    """
    own = all(
        item.param is item.home and item.grad is item.home.grad and type(item.home).grad is torch.Tensor.grad
        for item in plan.items
    )
    old = dict(plan.trace.signature.state)
    same = not plan.trace.created and all(
        k in old and type(v) is type(old[k]) and (type(v) in (int, float) or v == old[k])
        for k, v in plan.numbers.items()
    )
    return own and same and plan.known.replay is not None


def _number_keys(plan: Plan) -> list[str]:
    """Scalar state that its replay reads or writes."""
    replay = plan.known.replay
    assert replay is not None
    return [*replay.number_keys, *(name for kind, name, *_ in replay.leaves if kind == "state")]


def _hyper_leaves(plan: Plan) -> list[Any]:
    """Where its replay finds numbers among the hyperparameters: a name, or a name and a position."""
    replay = plan.known.replay
    assert replay is not None
    return [(name, *path) if path else name for kind, name, *path in replay.leaves if kind == "hyper"]


def _hyper_cells(opt: Optimizer) -> tuple[list[list[tuple]], list[dict[Any, int]], np.ndarray]:
    """For each group what to check and read; for each group the cell of each number, by callback name.

    And for each cell whether it is an integer.
    """
    checks, places = [], []
    whole: list[bool] = []
    for group in opt.param_groups:
        found: list[tuple[str, Any, list[tuple] | None]] = []
        place: dict[Any, int] = {}
        for key, value in group.items():
            if key == "params":
                found.append((key, value, None))
                continue
            parts = []
            for i, part in enumerate(value) if type(value) in (tuple, list) else [(-1, value)]:
                name = opt.hyper_map.name.get((key, i) if i >= 0 else key, (key, i) if i >= 0 else key)
                cell = -1
                if type(part) in (int, float):
                    place[name] = cell = len(whole)
                    whole.append(type(part) is int)
                parts.append((i, cell, name not in NOT_NEGATIVE, part))
            found.append((key, value, parts))
        checks.append(found)
        places.append(place)
    return checks, places, np.array(whole or [False])


def _batches(
    launched: list[Launched], slots: list[np.ndarray], place: list[dict[Any, int]], whole: np.ndarray
) -> list[Batch]:
    out = []
    for (entry, first), table in zip(_with_first_set(launched), slots, strict=True):
        start = 0
        while start < len(entry.plans):
            replay = entry.plans[start].known.replay
            stop = start + 1
            while stop < len(entry.plans) and entry.plans[stop].known.replay is replay:
                stop += 1
            assert replay is not None
            groups = [plan.items[0].where[0] for plan in entry.plans[start:stop]]
            leaves: list[np.ndarray | str] = []
            for kind, name, *path in replay.leaves:
                key = (name, *path) if path else name
                leaves.append(name if kind == "state" else np.array([place[g][key] for g in groups]))
            sets = list(range(first + start, first + stop))
            out.append(Batch(replay, sets, slice(start, stop), table, leaves, whole))
            start = stop
    return out


def _with_first_set(launched: list[Launched]) -> list[tuple[Launched, int]]:
    """Each launch with the number of its first scalar set."""
    out, first = [], 0
    for entry in launched:
        out.append((entry, first))
        first += len(entry.plans)
    return out


def _rows(opt: Optimizer, entry: Launched, first: int, keys: list[str]) -> list[tuple]:
    """What to check for each row of a launch: see csrc/recording.h."""
    program = entry.plans[0].kernel.program
    column = {name: HEAD + k for k, (name, _) in enumerate(program.buffers)}
    written = {name for name, _ in program.stores}
    address = entry.launch.rows.ctypes.data
    out: list[tuple] = []
    for s, plan in enumerate(entry.plans, start=first):
        number_keys = plan.known.replay.number_keys  # type: ignore[union-attr]
        for item in plan.items:
            entries: list[tuple] = []
            live = opt.state[item.home]
            for stored, value in live.items():
                key = opt.callback_name_of(stored)
                buffer = f"state.{key}"
                if buffer in column:
                    entries.append((stored, value, TENSOR, column[buffer], buffer in written))
                elif key in number_keys:
                    entries.append((stored, value, NUMBER, keys.index(key), False))
                else:
                    entries.append((stored, value, SAME, -1, False))
            row = address + 8 * entry.launch.rows.shape[1] * len(out)
            grad = column.get("grad", -1)
            out.append((item.home, live, row, grad, "param" in written, s, entries))
    return out
