"""The ``cpp`` backend: C++ through the system compiler, launched on torch's threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch

from ..compile import toolchain
from ..ir.program import Program
from ..kernels import source as skeleton
from ..render import cpp
from . import leaf, plan
from .backends import Kernel

Handle = tuple[list[int], int | None]
"""Addresses of the stages, and of the function that stores scalar state."""
HEAD = 4
"""Words of a row before its pointers: element count, scalar set, first chunk, number of chunks."""


class Cpp:
    name = "cpp"
    device = "cpu"

    def __init__(self) -> None:
        self._kernels: dict[tuple[Program, str], Kernel] = {}

    def compile(self, program: Program, name: str, slot_names: Sequence[str]) -> Kernel:
        if (program, name) not in self._kernels:
            self._kernels[program, name] = self._compile(program, name, slot_names)
        return self._kernels[program, name]

    def _compile(self, program: Program, name: str, slot_names: Sequence[str]) -> Kernel:
        body = cpp.render(program, slot_names, name)
        library = toolchain.compile_library(
            name, cpp.source(skeleton("cpu.cpp"), body), key_parts=[cpp.VERSION]
        )
        symbols, scalars = cpp.entries(program)
        handle = [library.address(s) for s in symbols], scalars and library.address(scalars)
        return Kernel(
            self.name,
            name,
            program,
            body,
            str(library.source_path),
            library.seconds,
            not library.built,
            handle,
        )

    def prepare(
        self,
        kernel: Kernel,
        columns: dict[str, list[torch.Tensor]],
        sizes: Sequence[int],
        sets: Sequence[int],
    ) -> Launch:
        return Launch(kernel, columns, tuple(sizes), sets)


class Launch:
    """A kernel's tables, ready to run: a row per tensor, the chunk list, space for part results."""

    def __init__(
        self,
        kernel: Kernel,
        columns: dict[str, list[torch.Tensor]],
        sizes: tuple[int, ...],
        sets: Sequence[int],
    ) -> None:
        buffers = kernel.program.buffers
        self.sizes, self.layout = sizes, plan.layout(sizes)
        self.stages, self.scalars = cast(Handle, kernel.handle)
        width, n_reductions = HEAD + len(buffers), sum(len(s.reductions) for s in kernel.stages)
        self.rows = rows = np.empty((len(sizes), width), np.int64)
        rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] = sizes, sets, self.layout.first, self.layout.count
        for k, (name, _) in enumerate(buffers):
            leaf.write_pointers(columns[name], rows.ctypes.data, len(sizes), width, HEAD + k)
        self.partials = np.empty((len(self.layout), n_reductions))
        tables = [t.ctypes.data for t in (rows, self.layout.chunks, self.partials)]
        self.head = np.array([*tables, 0, width, kernel.program.slots, n_reductions], np.int64)
        self.address = self.head.ctypes.data
        self.slots: np.ndarray | None = None
        self.threads = 0

    def run(self, slots: np.ndarray) -> None:
        """Run all stages with these scalars: float64, scalar sets × slots."""
        if not len(self.layout):
            return
        if self.threads != leaf.thread_count():
            self.threads = leaf.thread_count()
            self.splits = [list(plan.splits(self.sizes, self.threads))] * len(self.stages)
        if self.slots is not slots:
            self.slots, self.head[3] = slots, slots.ctypes.data
        leaf.run_cpu(self.stages, self.address, self.splits)
        if self.scalars:
            leaf.run_cpu([self.scalars], self.address, [[0, len(self.sizes)]])
