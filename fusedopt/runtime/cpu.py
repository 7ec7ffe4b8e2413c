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

    def compile(self, program: Program, name: str, slot_names: Sequence[str]) -> Kernel:
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

    def launch(
        self,
        kernel: Kernel,
        columns: dict[str, list[torch.Tensor]],
        sizes: Sequence[int],
        sets: Sequence[int],
        slots: np.ndarray,
    ) -> None:
        sizes = tuple(sizes)
        layout = plan.layout(sizes)
        if not len(layout):
            return
        buffers = kernel.program.buffers
        width, n_reductions = HEAD + len(buffers), sum(len(s.reductions) for s in kernel.stages)
        rows = np.empty((len(sizes), width), np.int64)
        rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] = sizes, sets, layout.first, layout.count
        for k, (name, _) in enumerate(buffers):
            leaf.write_pointers(columns[name], rows.ctypes.data, len(sizes), width, HEAD + k)
        partials = np.empty((len(layout), n_reductions))
        tables = [t.ctypes.data for t in (rows, layout.chunks, slots, partials)]
        head = np.array([*tables, width, kernel.program.slots, n_reductions], np.int64)
        stages, scalars = cast(Handle, kernel.handle)
        bounds = list(plan.splits(sizes, leaf.thread_count()))
        leaf.run_cpu(stages, head.ctypes.data, [bounds] * len(stages))
        if scalars:
            leaf.run_cpu([scalars], head.ctypes.data, [[0, len(sizes)]])
