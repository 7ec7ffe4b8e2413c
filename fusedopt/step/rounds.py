"""Rounds: what a step has to know of all parameters before it steps any, such as the gradients' norm.

A round is launches that leave a sum of each of their rows, and one that joins these sums, in their order, to a number
in the device's memory. Later rounds and the main launches read it there; the host never does. Rows and scalars are
those of the main launches: a launch of a round takes over the words of their tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..backends import Backend, Kernel, Launch
from ..backends.base import HEAD
from ..extension import leaf
from ..ir.program import Program
from . import sharded
from .items import Item, facts

NO_SLOTS = np.empty((1, 0))
SET = 1
"""The word of a row that names its scalar set."""

Words = list[tuple[int, int]]
Piece = tuple[torch.Tensor, torch.Tensor]
"""Sums of a launch's rows: where it leaves them, on its device, and where they are joined."""


def space(main: torch.device, rows: Sequence[tuple[torch.device, int]]) -> tuple[torch.Tensor, list[Piece]]:
    """Memory for the sums of launches on these devices, over so many rows each: all of it, and theirs.

    Zeros: a kernel leaves no sum of a tensor without elements.
    """
    whole = torch.zeros(sum(n for _, n in rows), dtype=torch.float64, device=main)
    pieces = whole.split([n for _, n in rows])
    return whole, [
        (here if device == main else torch.zeros_like(here, device=device), here)
        for (device, _), here in zip(rows, pieces, strict=True)
    ]


def words_of(main: Program, program: Program) -> Words:
    """The words of a row that it has in common with the main launch's: where they are, and where in that."""
    there = {name: HEAD + k for k, (name, _) in enumerate(main.buffers)}
    found = [(HEAD + k, there[name]) for k, (name, _) in enumerate(program.buffers) if name in there]
    return [(SET, SET), *found] if program.slots else found


@dataclass
class Summing:
    """A launch that leaves sums of each of its rows. ``of`` is the number of the main launch with the same rows.

    It holds none of their tensors, as it may wait for its next run for long.
    """

    of: int
    kernel: Kernel
    launch: Launch
    words: Words
    runs: Callable[[np.ndarray], None]
    spread: bool
    """Whether processes exchange what they sum."""

    @property
    def sums(self) -> list[int]:
        """The words of its rows with addresses of what it stores."""
        stored = {name for name, _ in self.kernel.program.stores}
        return [HEAD + k for k, (name, _) in enumerate(self.kernel.program.buffers) if name in stored]

    def follow(self, rows: np.ndarray) -> None:
        """Take over what is in the main launch's rows now."""
        for here, there in self.words:
            self.launch.rows[:, here] = rows[:, there]

    def run(self, slots: Sequence[np.ndarray]) -> None:
        self.runs(slots[self.of] if self.kernel.program.slots else NO_SLOTS)


class Round:
    """One round. ``why`` says what it is for; ``devices`` are those that read its results, ``main`` where it joins.

    ``kernels`` are those of its launches, with over how many tensors each goes, and last the one that joins.
    """

    def __init__(self, why: str, main: torch.device, devices: set[torch.device]) -> None:
        self.why, self.main, self.devices = why, main, devices
        self.summing: list[Summing] = []
        self.join: Launch | None = None
        self.kernels: list[tuple[Kernel, int]] = []
        self.pieces: list[Piece] = []

    def add(
        self,
        of: int,
        backend: Backend,
        kernel: Kernel,
        items: list[Item],
        columns: dict[str, list[torch.Tensor]],
        main: Program,
        left: Sequence[Piece],
        sets: Sequence[int] | None = None,
        resident: bool = False,
        shapes: Sequence[tuple[int, ...]] = (),
    ) -> None:
        """Another launch of sums, over the rows of a main one of this program. ``left``: what it leaves there."""
        sizes = [item.param.numel() for item in items]
        sets = sets or [0] * len(items)
        launch = backend.prepare(kernel, columns, sizes, sets, resident, **facts(kernel, items, shapes))
        self.pieces += left
        runs, spread = sharded.runner(launch, items), any(map(sharded.is_shard, items))
        self.summing.append(Summing(of, kernel, launch, words_of(main, kernel.program), runs, spread))
        self.kernels.append((kernel, len(items)))

    def set_join(
        self,
        backend: Backend,
        kernel: Kernel,
        columns: dict[str, list[torch.Tensor]],
        resident: bool = False,
    ) -> None:
        """What joins the sums."""
        sizes = [t.numel() for t in columns[kernel.program.buffers[0][0]]]
        self.join = backend.prepare(kernel, columns, sizes, [0] * len(sizes), resident)
        self.kernels.append((kernel, len(sizes)))

    @property
    def limits(self) -> bool:
        """Whether the largest norm is a scalar of what joins."""
        return False

    def run(self, slots: Sequence[np.ndarray]) -> None:
        """Sum and join. ``slots`` are the scalars of each main launch, if launches of this round read any."""
        for summing in self.summing:
            summing.run(slots)
        for there, here in self.pieces:
            if there is not here:
                here.copy_(there, non_blocking=True)
        self.finish()

    def finish(self) -> None:
        """Join, and hand the results to all devices."""
        if self.join is not None:
            self.join.run(NO_SLOTS)

    def follow(self, tables: Sequence[np.ndarray]) -> None:
        """Take over what is in the tables of the main launches now."""
        for summing in self.summing:
            summing.follow(tables[summing.of])

    def native(self) -> Any:
        """The round for C++ to run (csrc/bound_step.h); None if it cannot."""
        found = [summing.launch.native() for summing in self.summing]
        join = self.join and self.join.native()
        elsewhere = any(there is not here for there, here in self.pieces)
        spread = any(summing.spread for summing in self.summing)
        if elsewhere or spread or None in found or (self.join and join is None):
            return None
        native: Any = leaf.native
        return native.Round(
            summing=[
                native.Summing(native=one, of=summing.of, words=summing.words, sums=summing.sums)
                for one, summing in zip(found, self.summing, strict=True)
            ],
            join=join,
            limits=self.limits,
        )

    def counted(self, rows: Sequence[int]) -> list[tuple[Kernel, int]]:
        """Its kernels, where the main launches went over so many rows."""
        counts = [rows[summing.of] for summing in self.summing]
        kernels = [(kernel, n) for (kernel, _), n in zip(self.kernels, counts, strict=False)]
        return [*kernels, *self.kernels[len(counts) :]]

    def called(self) -> list[str]:
        """The torch calls of the round, in words."""
        return []

    def commit(self) -> None:
        """Write what it leaves for the user's tensors, once the step is known to work."""

    def end(self) -> None:
        """Hold no memory of its own: it will not be run again."""

    def let_go(self) -> None:
        """Keep no tensor's memory alive from here on."""
        for summing in self.summing:
            summing.launch.let_go()

    def upload(self) -> None:
        """Put scalars of its own where captured launches read them."""


def resident(items: Sequence[Item]) -> bool:
    """Whether scalars stay on the device, for CUDA graphs."""
    return any(item.hyper.get("capturable") for item in items)
