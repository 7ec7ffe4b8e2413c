"""The warm step: a step like the last one, without Python work per tensor.

After a step that was one fused program per bucket, everything that decided it is recorded. If the next step finds all
of it unchanged (checked in C++), only what may change on every step is done: the scalar programs are replayed on this
step's hyperparameters and counters, for all scalar sets at once, and the same tables are launched again: on the CPU all
in one call, which no signal comes between. In any doubt the step is done the long way, which is always right.
"""

from __future__ import annotations

from itertools import count, groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import names
from ..accepted import hyper_of
from . import leaf
from .backends import Launch
from .engine import Launched, Plan
from .tables import HEAD

if TYPE_CHECKING:
    from ..optimizer import Optimizer

SAME, TENSOR, NUMBER = range(3)


class Warm:
    """A recorded step of one optimizer. ``step`` repeats it and returns True, or returns False having done nothing."""

    def __init__(
        self,
        opt: Optimizer,
        launched: list[Launched],
        hypers: list[list[tuple]],
        place: list[dict[Any, Any]],
    ) -> None:
        self.state, self.version, self.engine = opt.state, opt.state.version, opt.engine
        self.read = self.engine.read
        self.launches = [
            (entry.launch, np.array([p.slots for p in entry.plans], dtype=np.float64)) for entry in launched
        ]
        plans = [plan for entry in launched for plan in entry.plans]
        keys = sorted({key for plan in plans for key in _number_keys(plan)})
        rows, batches, first = [], [], 0
        for entry, (_, slots) in zip(launched, self.launches, strict=True):
            rows += _rows(opt, entry, first, keys)
            _place_tensors(entry, place)
            batches += _batches(entry, first, slots, place, keys)
            first += len(entry.plans)
        stepped = {id(item.home) for plan in plans for item in plan.items}
        absent = [p for group in opt.param_groups for p in group["params"] if id(p) not in stepped]
        numbers = [[plan.numbers.get(key) for plan in plans] for key in keys]
        self.norm = opt.engine.norm
        self.gradients = (
            [entry.launch.rows[:, _column(entry, "grad")] for entry in launched] if self.norm else []
        )
        self.recording = leaf.native.Recording(  # type: ignore[union-attr]
            list(opt.param_groups), absent, rows, hypers, batches, numbers
        )
        self.threads = 0
        self.others: list[tuple[Launch, np.ndarray]] = []

    def step(self, opt: Optimizer) -> bool:
        """Repeat the recorded step if it is still the right one."""
        if opt.state is not self.state or self.state.version != self.version or opt.engine is not self.engine:
            return False
        if self.read and not self.engine.reads(self.read):
            return False
        if self.threads != leaf.thread_count():
            self._plan()
        if not self.recording.step(opt.param_groups, self._measure if self.norm is not None else None):
            return False
        for launch, slots in self.others:
            launch.run(slots)
        return True

    def _measure(self) -> None:
        assert self.norm is not None
        self.norm.repeat(self.gradients)

    def _plan(self) -> None:
        """Hand over the launches that the recording itself can run."""
        self.threads = leaf.thread_count()
        planned = [(launch, slots, launch.planned(slots)) for launch, slots in self.launches]
        self.recording.plan([each for _, _, each in planned if each is not None])
        self.others = [(launch, slots) for launch, slots, each in planned if each is None]


def record(opt: Optimizer, launched: list[Launched]) -> Warm | None:
    """The recording of a step that was these launches, or None if its like needs a look at every tensor again."""
    plans = [plan for entry in launched for plan in entry.plans]
    if not plans or not leaf.available() or not all(map(_repeatable, plans)):
        return None
    if opt.engine.norm is not None and not all("grad" in entry.kernel.program.buffer for entry in launched):
        return None
    try:
        hypers, place = _hyper_cells(opt)
        if not all(key in place[plan.items[0].where[0]] for plan in plans for key in _hyper_leaves(plan)):
            return None
        return Warm(opt, launched, hypers, place)
    except ValueError:  # a number that only Python can hold; or another thread has replaced a tensor since
        return None


def _column(entry: Launched, name: str) -> int:
    """Where a buffer's pointer is in a row; -1 if the program has no such buffer."""
    names = [n for n, _ in entry.kernel.program.buffers]
    return HEAD + names.index(name) if name in names else -1


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


def _hyper_cells(opt: Optimizer) -> tuple[list[list[tuple]], list[dict[Any, Any]]]:
    """For each group what to check and read; for each group, by callback name, the cell of each number.

    For a tensor that kernels read it has, in place of the cell, a list for the addresses where its own belongs.
    """
    checks, places = [], []
    cells = count()
    for group in opt.param_groups:
        found: list[tuple[str, Any, list[tuple] | None]] = []
        place: dict[Any, Any] = {}
        for key, value in group.items():
            if key == "params":
                found.append((key, value, None))
                continue
            parts = []
            for i, part in enumerate(value) if type(value) in (tuple, list) else [(-1, value)]:
                name: Any = opt.hyper_map.name.get((key, i) if i >= 0 else key, (key, i) if i >= 0 else key)
                cell = -1
                words: list[int] | None = None
                seen = None if opt.hyper_map.shadowed(key, group) else hyper_of(group, name, part)
                if isinstance(seen, torch.Tensor):
                    place[name] = words = []
                elif type(seen) in (int, float):
                    place[name] = cell = next(cells)
                parts.append((i, cell, names.lowest(name), part, words))
            found.append((key, value, parts))
        checks.append(found)
        places.append(place)
    return checks, places


def _place_tensors(entry: Launched, place: list[dict[Any, Any]]) -> None:
    """Where in the tables of a launch the addresses of hyperparameters belong that its kernel reads."""
    table = entry.launch.rows
    rows = [item for plan in entry.plans for item in plan.items]
    for k, (name, _) in enumerate(entry.kernel.program.buffers):
        kind, _, key = name.partition(".")
        for i, item in enumerate(rows) if kind == "hyper" else ():
            place[item.where[0]][key].append(table.ctypes.data + 8 * (table.shape[1] * i + HEAD + k))


def _batches(
    entry: Launched, first: int, slots: np.ndarray, place: list[dict[Any, Any]], keys: list[str]
) -> list[tuple]:
    """The scalar sets of a launch, those with the same program together: see csrc/recording.h."""
    out = []
    for replay, plans in groupby(entry.plans, key=lambda plan: plan.known.replay):
        assert replay is not None
        groups = [plan.items[0].where[0] for plan in plans]
        leaves = [
            (keys.index(name), [])
            if kind == "state"
            else (-1, [place[g][(name, *path) if path else name] for g in groups])
            for kind, name, *path in replay.leaves
        ]
        program = leaf.native.ScalarProgram(  # type: ignore[union-attr]
            replay.instructions, replay.slots, replay.numbers, replay.guards
        )
        columns = [keys.index(key) for key in replay.number_keys]
        narrow = entry.kernel.program.compute == torch.float32
        out.append((program, first, len(groups), slots.ctypes.data, leaves, columns, narrow))
        first += len(groups)
        slots = slots[len(groups) :]
    return out


def _rows(opt: Optimizer, entry: Launched, first: int, keys: list[str]) -> list[tuple]:
    """What to check for each row of a launch: see csrc/recording.h."""
    program = entry.kernel.program
    column = {name: HEAD + k for k, (name, _) in enumerate(program.buffers)}
    written = {name for name, _ in program.stores}
    address = entry.launch.rows.ctypes.data
    out: list[tuple] = []
    for s, plan in enumerate(entry.plans, start=first):
        number_keys = plan.known.replay.number_keys  # type: ignore[union-attr]
        for item in plan.items:
            entries: list[tuple] = []
            live = opt.state[item.home]
            for stored, value in list(live.items()):
                key = opt.callback_name_of(stored)
                buffer = f"state.{key}"
                if buffer in column:
                    entries.append((stored, value, TENSOR, column[buffer], buffer in written))
                elif key in number_keys:
                    entries.append((stored, value, NUMBER, keys.index(key), False))
                else:
                    entries.append((stored, value, SAME, -1, False))
            row = address + 8 * entry.launch.rows.shape[1] * len(out)
            grad, param = _column(entry, "grad"), _column(entry, "param")
            out.append((item.home, live, row, grad, "param" in written, s, entries, param))
    return out
