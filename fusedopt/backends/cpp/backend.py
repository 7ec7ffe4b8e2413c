"""The ``cpp`` backend: C++ through the system compiler, launched on torch's threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from ...compile import toolchain
from ...extension import leaf
from ...ir.ops import reduction
from ...ir.program import Program
from ...kernels import source as skeleton
from .. import chunking
from ..base import Compiler, Kernel, Planned, Rows
from . import render as cpp


class Handle(NamedTuple):
    """Addresses of the stages, and of what is done once per tensor before each and after all of them; 0: nothing."""

    stages: list[int]
    before: list[int]
    scalars: int


class Cpp(Compiler):
    name = "cpp"
    device = "cpu"
    runs_parts = True
    native = True

    def _compile(
        self, program: Program, name: str, slot_names: Sequence[str], device: torch.device
    ) -> Kernel:
        body = cpp.render(program, slot_names, name)
        entries = cpp.entries(program)
        library = toolchain.compile_library(
            name,
            cpp.source(skeleton("cpu.cpp"), body),
            symbols=entries.all,
            key_parts=[cpp.VERSION],
        )
        leaf.seek()
        stages, before, scalars = (
            [library.address(s) if s else 0 for s in names]
            for names in (entries.stages, entries.before, [entries.scalars])
        )
        return Kernel(
            self.name,
            name,
            program,
            body,
            str(library.source_path),
            library.seconds,
            not library.built,
            Handle(stages, before, *scalars),
        )

    def prepare(self, *rows: Any, **how: Any) -> Launch:
        return Launch(*rows, **how)


class Launch(Rows):
    """A kernel's tables, ready to run: a row per tensor, the chunk list, space for part results."""

    def _get_ready(self) -> None:
        self.handle = cast(Handle, self.kernel.handle)
        self.partials = np.empty((len(self.layout), self.n_reductions))
        self.results = np.empty(self.n_results)
        tables = [t.ctypes.data for t in (self.rows, self.layout.chunks, self.partials)]
        widths = [self.rows.shape[1], self.kernel.program.slots, self.n_reductions]
        self.head = np.array(
            [*tables, 0, *widths, self.results.ctypes.data, self.layout.chunks.shape[1]], np.int64
        )
        self.address = self.head.ctypes.data
        self.slots: np.ndarray | None = None

    movable = empties = True
    wanted = 0

    def native(self) -> Any:
        rows, chunks = self.rows, self.layout.chunks
        return leaf.native.Launch(  # type: ignore[union-attr]
            stages=self.handle.stages,
            before=self.handle.before,
            scalars=self.handle.scalars,
            rows=rows.ctypes.data,
            n_rows=len(rows),
            row_words=rows.shape[1],
            chunks=chunks.ctypes.data,
            n_chunks=len(chunks),
            chunk_words=chunks.shape[1],
            n_results=self.n_results,
            n_slots=self.kernel.program.slots,
            n_reductions=self.n_reductions,
        )

    def upload(self, slots: np.ndarray) -> None:
        """Put these scalars where the launch reads them."""
        if self.slots is None:
            self.slots = slots.copy()
            self.head[3] = self.slots.ctypes.data
        else:
            self.slots[...] = slots

    def run(self, slots: np.ndarray) -> None:
        """Run all stages with these scalars: float64, scalar sets × slots."""
        leaf.run_cpu(*self.planned(slots))

    def planned(self, slots: np.ndarray) -> Planned:
        """What ``run`` gives to `leaf.run_cpu`, which reads the scalars where they are now."""
        if self.slots is not slots:
            self.slots, self.head[3] = slots, slots.ctypes.data
        if not len(self.layout):
            return [], self.address, [], 0
        by_chunk = list(chunking.splits(self.layout, leaf.thread_count()))
        by_row = [0, len(self.sizes)]
        calls = []
        for stage, before in zip(self.handle.stages, self.handle.before, strict=True):
            calls += [(before, by_row), (stage, by_chunk)]
        calls = [call for call in (*calls, (self.handle.scalars, by_row)) if call[0]]
        cost = chunking.cost(self.layout)
        return [entry for entry, _ in calls], self.address, [split for _, split in calls], cost

    def run_parts(
        self,
        slots: np.ndarray,
        counts: Sequence[int],
        exchange: Callable[[Sequence[str], np.ndarray], None],
    ) -> None:
        """Run for tensors of which only a part may be here; the whole ones have these element counts.

        After each stage that reduces, ``exchange(ops, totals)`` makes the whole tensors' totals of those of the parts,
        rows × reductions. Kernels find them where the partial result of a single chunk would be.
        """
        n_chunks, n_rows = len(self.layout), len(self.rows)
        row_of_chunk = self.layout.chunks[:, 0]
        partials = np.empty((n_chunks + n_rows, self.partials.shape[1]))
        self.rows[:, 0], self.rows[:, 2], self.rows[:, 3] = counts, n_chunks + np.arange(n_rows), 1
        self.partials, self.head[2], self.head[3] = partials, partials.ctypes.data, slots.ctypes.data
        splits = list(chunking.splits(self.layout, leaf.thread_count()))
        done = 0
        for stage, address in zip(self.kernel.stages, self.handle.stages, strict=True):
            leaf.run_cpu([address], self.address, [splits], chunking.cost(self.layout))
            if stage.reductions:
                ops = [self.kernel.program.values[i].op for i in stage.reductions]
                mine = slice(done, done + len(ops))
                totals = joined(ops, partials[:n_chunks, mine], row_of_chunk, n_rows)
                exchange(ops, totals)
                partials[n_chunks:, mine] = totals
                done += len(ops)
        if self.handle.scalars:
            leaf.run_cpu([self.handle.scalars], self.address, [[0, n_rows]])


def joined(ops: Sequence[str], parts: np.ndarray, where: np.ndarray, n: int) -> np.ndarray:
    """n × ops totals of parts × ops, part i belonging to total ``where[i]``. In order, so that it is reproducible."""
    totals = np.empty((n, len(ops)))
    with np.errstate(invalid="ignore"):
        for k, op in enumerate(map(reduction, ops)):
            totals[:, k] = float(op.init)
            op.numpy.at(totals[:, k], where, parts[:, k])
    return totals
