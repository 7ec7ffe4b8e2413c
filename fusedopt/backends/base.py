"""What a backend is, and what all of ours share: kernels that are compiled once, tables that launches walk."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
import torch

from ..extension import leaf
from ..ir.program import Program
from ..ir.stages import Stage, regions, schedule, stages, wholes
from . import chunking

Planned = tuple[list[int], int, list[list[int]], int]
"""A launch on the CPU as `leaf.run_cpu` takes it: addresses of stages and of what they read, ranges, and cost."""


@dataclass(eq=False)
class Kernel:
    """A compiled program: one object per program and name. ``handle`` is the backend's own."""

    backend: str
    name: str
    program: Program
    body: str
    source_path: str
    seconds: float
    cached: bool
    handle: object = field(repr=False)

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        return stages(self.program)


class Launch(Protocol):
    """A kernel's tables, ready to run any number of times."""

    rows: np.ndarray
    n_sets: int
    movable: bool
    """Whether any address in the table may change between runs, not only those of gradients."""

    def native(self) -> Any:
        """The launch for C++ to run (csrc/launch.h); None if it cannot."""

    def run(self, slots: np.ndarray) -> None:
        """Run all stages with these scalars: float64, scalar sets × slots."""

    def planned(self, slots: np.ndarray) -> Planned | None:
        """What `leaf.run_cpu` needs to do the same as ``run``; None if it takes more than that."""

    def let_go(self) -> None:
        """The launch keeps its tensors' memory alive until this is called."""

    def upload(self, slots: np.ndarray) -> None:
        """Put these scalars where the launch reads them, also one that a CUDA graph replays, and run nothing."""


class Backend(Protocol):
    """What the runtime asks of a backend."""

    name: str
    device: str
    native: bool
    """Whether C++ runs its launches, and can switch rows off and on."""

    def compile(
        self, program: Program, name: str, slot_names: Sequence[str], device: torch.device | None = None
    ) -> Kernel:
        """The kernel of a program for a device (None: the current one of this backend's type), compiled or cached.

        What cannot be compiled or loaded is known here, before anything has changed. Raises BuildError.
        """

    def prepare(
        self,
        kernel: Kernel,
        columns: dict[str, list[torch.Tensor]],
        sizes: Sequence[int],
        sets: Sequence[int],
        resident: bool = False,
        shapes: Sequence[tuple[int, ...]] = (),
        places: Sequence[int] = (),
    ) -> Launch:
        """Tables for launching the kernel over rows of tensors.

        columns: for each buffer of the program one tensor per row; sizes: elements per row; sets: each row's scalar
        set; resident: scalars stay in the device's memory, so that a launch in a CUDA graph sees later ones; shapes:
        the lengths of each row's axes, if the program has several; places: which parameter each row is, where the
        program draws (`ir.random.place`).
        """


HEAD = 4
"""Words of a row before its pointers: element count, scalar set, first chunk, number of chunks."""


class Compiler(ABC):
    """Compiles programs, and knows the kernels that are in use: one per program, name and device."""

    name: str
    device: str
    native = False

    def __init__(self) -> None:
        self._kernels: WeakValueDictionary[tuple[Program, str, torch.device], Kernel] = WeakValueDictionary()

    def compile(
        self, program: Program, name: str, slot_names: Sequence[str], device: torch.device | None = None
    ) -> Kernel:
        device = device or torch.device(self.device)
        key = program, name, device
        kernel = self._kernels.get(key)
        if kernel is None:
            self._kernels[key] = kernel = self._compile(program, name, slot_names, device)
        return kernel

    @abstractmethod
    def _compile(
        self, program: Program, name: str, slot_names: Sequence[str], device: torch.device
    ) -> Kernel:
        """Compile it, or find it in the cache."""


def _blocks(
    program: Program, shapes: Sequence[tuple[int, ...]], sizes: Sequence[int], wanted: int
) -> chunking.Blocks:
    """How tensors of a program with several axes are cut."""
    mine, kinds = regions(program), [v.kind for v in program.values]
    others = [i for i in schedule(program).results if i not in mine]
    own = tuple(sizes) if program.blocked else ()
    kept = tuple(kinds[i] for i in others)
    return chunking.blocks(tuple(shapes), tuple(kinds[i] for i in mine), kept, own, wanted)


def place_word(program: Program) -> int:
    """Which word of a row says which parameter it is (`ir.random.place`), where the program draws: the last one."""
    several = program.axes + len(schedule(program).results) if program.axes > 1 else 0
    return HEAD + len(program.buffers) + several


class Rows(ABC):
    """A launch. Here the row table on the host: element count, scalar set, first chunk, number of chunks, a pointer per
    buffer, with several axes their lengths and where results begin, and for random numbers the parameter's place; the
    rest is the backend's."""

    def __init__(
        self,
        kernel: Kernel,
        columns: dict[str, list[torch.Tensor]],
        sizes: Sequence[int],
        sets: Sequence[int],
        resident: bool = False,
        shapes: Sequence[tuple[int, ...]] = (),
        places: Sequence[int] = (),
    ) -> None:
        self.kernel, self.sizes, self.resident = kernel, tuple(sizes), resident
        program, buffers = kernel.program, kernel.program.buffers
        blocks = _blocks(program, shapes, sizes, self.wanted) if program.axes > 1 else None
        # Who has a tensor's first elements stores its numbers: where there may be none, whoever comes first.
        least = int(self.empties and any(stage.numbers for stage in kernel.stages))
        self.layout = blocks.layout if blocks else chunking.layout(self.sizes, self.wanted, least)
        self.n_results = blocks.total if blocks else 0
        self.n_sets = max(sets, default=-1) + 1
        self.n_reductions = len(wholes(program))
        tail = (
            np.concatenate([np.array(shapes), blocks.results], axis=1)
            if blocks
            else np.empty((len(sizes), 0))
        )
        if program.draws:
            mine = np.array(places or [0] * len(sizes), np.int64).reshape(-1, 1)
            tail = np.concatenate([tail.astype(np.int64), mine], axis=1)
        self.rows = rows = np.empty((len(sizes), HEAD + len(buffers) + tail.shape[1]), np.int64)
        rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] = sizes, sets, self.layout.first, self.layout.count
        rows[:, HEAD + len(buffers) :] = tail
        # Of the tensors' memory. Other threads may give tensors other memory, or drop them, while kernels run.
        self.kept: list[object] = [
            leaf.write_pointers(columns[name], rows.ctypes.data, *rows.shape, HEAD + k)
            for k, (name, _) in enumerate(buffers)
        ]
        # A program that touches nothing runs nowhere.
        self.device = columns[buffers[0][0]][0].device if buffers else torch.device("cpu")
        self._get_ready()

    movable = empties = False
    wanted = chunking.WANTED
    """How many chunks there have to be, where there are enough elements."""

    def native(self) -> Any:
        return None

    def planned(self, slots: np.ndarray) -> Planned | None:
        """What there is to run on the CPU with these scalars, if that is all of it."""
        return None

    def let_go(self) -> None:
        """Keep no memory alive from here on."""
        self.kept = []

    @abstractmethod
    def _get_ready(self) -> None:
        """Make what else is needed to run."""
