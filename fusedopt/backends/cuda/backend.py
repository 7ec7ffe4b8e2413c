"""The ``cuda`` backend: CUDA C++ through NVRTC, launched through the driver on the tensors' current stream.

An ordinary step copies nothing to the device: its scalars and the gradients' addresses are parameters of the kernels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from ...compile.cache import BuildError
from ...extension import build as extension
from ...extension import leaf
from ...ir.program import Program
from ...ir.stages import regions
from ...kernels import source as skeleton
from .. import chunking
from ..base import HEAD, Compiler, Kernel, Rows, place_word
from ..upload import Upload, capturing
from . import nvrtc
from . import render as renderer

LIBRARY = "libcuda.so.1"
THREADS, TEAMS = 128, 256
"""Of a block; and where they are in teams, for lines and places along axes."""
ALONE = 256
"""Elements that are worth a block. Blocks that have fewer take turns, and ask for what they need next meanwhile."""
SMALL, BIG = ((limit - 80) // 8 for limit in (4096, 32764))
"""Words that a launch carries by value: `small_words` and `big_words` of the skeleton."""
BIG_SINCE = 12010
"""The first driver that takes so many, as the driver counts versions."""
SMALL_ONLY = "#define FUSEDOPT_SMALL_ONLY\n"
"""Before the source, for older ones."""
OLDEST = 7, 0
"""The first compute capability where kernels find such parameters by address."""
SLICE, MOST_SLICES = 1 << 12, 128
"""Part results along axes that are worth a block to join them; how many blocks there are for a tensor at most."""
FALLBACK = 'or use backend="triton" or backend="reference"'


class Handle(NamedTuple):
    """A loaded module; the address of each of its kernels, by name, and how many of its blocks run at a time; what a
    launch may carry by value."""

    module: Any
    functions: dict[str, tuple[int, int]]
    capacities: tuple[int, ...]


class Cuda(Compiler):
    """``library``: the driver. It is opened when it is first needed."""

    name = "cuda"
    device = "cuda"

    def __init__(self, library: str = "") -> None:
        super().__init__()
        self.library = library or LIBRARY
        self._opened: Any = None
        # By cubin and GPU: an optimizer that fell back would ask again in every step.
        self._refused: dict[tuple[str, int], BuildError] = {}

    def driver(self) -> Any:
        """The driver, initialised. Raises BuildError with the reason."""
        leaf.seek(wait=True)
        if leaf.native is None:
            raise BuildError(
                f"the cuda backend needs the C++ extension, and {leaf.extension_status()[1]}. "
                f"Remedy: with a C++20 compiler, {extension.remedy()}; {FALLBACK}."
            )
        if self._opened is None:
            try:
                with _refusing():
                    self._opened = leaf.native.Driver(self.library)
            except BuildError as error:
                self._opened = error
        if isinstance(self._opened, BuildError):
            raise self._opened.with_traceback(None)
        return self._opened

    def arch(self, index: int) -> str:
        """What to compile for. Raises BuildError for a GPU that is too old."""
        driver = self.driver()
        with _refusing():
            major, minor = capability = driver.capability(index)
        if capability < OLDEST:
            raise BuildError(
                f"GPU {index} has compute capability {major}.{minor}, and the cuda backend needs "
                f"{'.'.join(map(str, OLDEST))}. Remedy: {FALLBACK.removeprefix('or ')}."
            )
        return f"sm_{major}{minor}"

    def describe(self) -> str:
        """Driver, compiler and devices in words. Raises BuildError where one of them is missing."""
        driver, tool = self.driver(), nvrtc.nvrtc()
        with _refusing():
            gpus = ", ".join(f"{driver.name(i)} ({self.arch(i)})" for i in range(driver.count))
        return f"driver for CUDA {_version(driver.version)}, NVRTC {tool.version}, {gpus or 'no GPU'}"

    def _compile(
        self, program: Program, name: str, slot_names: Sequence[str], device: torch.device
    ) -> Kernel:
        index = _index(device)
        body = renderer.render(program, slot_names, name)
        source = renderer.source(skeleton("cuda.cu"), body)
        capacities = (SMALL, BIG) if self.driver().version >= BIG_SINCE else (SMALL,)
        if BIG not in capacities:
            source = SMALL_ONLY + source
        entry = nvrtc.compile_cubin(name, source, self.arch(index), key_parts=[renderer.VERSION])
        symbols = [symbol for symbol, _ in renderer.launches(program)]
        variants = [s + v for s in symbols for v in _suffixes(capacities)]
        module, functions = self._load(name, entry, index, variants, threads(program))
        kernel = Kernel(
            self.name, name, program, body, str(entry.source_path), entry.seconds, not entry.built, None
        )
        kernel.handle = Handle(module, functions, capacities)
        return kernel

    def _load(
        self, name: str, entry: Any, index: int, symbols: list[str], threads: int
    ) -> tuple[Any, dict[str, tuple[int, int]]]:
        key = str(entry.path), index
        if key in self._refused:
            raise self._refused[key].with_traceback(None)
        made_by = f"compiled by NVRTC {nvrtc.nvrtc().version}"
        try:
            with _refusing(f"kernel {name!r}, {made_by}, cannot be loaded on GPU {index}: "):
                module = leaf.native.Module(self.driver(), entry.path.read_bytes(), index)  # type: ignore[union-attr]
                return module, {s: module.function(s, threads) for s in symbols}
        except BuildError as error:
            self._refused[key] = error
            raise

    def prepare(self, *rows: Any, **how: Any) -> Launch:
        return Launch(*rows, **how)


def threads(program: Program) -> int:
    """Of a block."""
    return THREADS if program.axes == 1 else TEAMS


class Carried(NamedTuple):
    """Whether scalars and gradients' addresses go along by value; how many words the kernels for that take."""

    slots: bool
    gradients: bool
    capacity: int


def carried(n_slots: int, n_gradients: int, capacities: Sequence[int]) -> Carried:
    """As much as fits, in the smallest kernels that it fits into."""
    for slots, gradients in ((True, True), (True, False), (False, True)):
        for capacity in capacities:
            if slots * n_slots + gradients * n_gradients <= capacity:
                return Carried(slots, gradients, capacity)
    return Carried(False, False, capacities[0])


class Launch(Rows):
    """A kernel's tables on the device, where they stay, and the launches that walk them.

    Of ``rows`` only the gradients' addresses may change between runs. ``resident`` scalars are in the device's memory,
    so that a launch in a CUDA graph sees later ones.
    """

    def _get_ready(self) -> None:
        handle = cast(Handle, self.kernel.handle)
        names = [name for name, _ in self.kernel.program.buffers]
        self._gradients = self.rows[:, HEAD + names.index("grad")] if "grad" in names else self.rows[:0, 0]
        self._n_slots = self.n_sets * self.kernel.program.slots
        n = self._n_slots, len(self._gradients)
        self.carried = carried(*n, handle.capacities)
        if self.resident:
            self.carried = carried(0, n[1], handle.capacities)._replace(slots=False)
        self._slots, self._addresses = Upload(self.device, resident=True), Upload(self.device)
        self._host: np.ndarray | None = None
        self._launcher = self._prepared(handle) if len(self.layout) and names else None

    def _prepared(self, handle: Handle) -> Any:
        """The launches of a step. Tables are sent once, and kept."""
        tables = self._tables = {name: Upload(self.device).of(t) for name, t in self._host_tables().items()}
        if self.kernel.program.axes > 1:
            tables["joins"] = Upload(self.device).of(self._joins(tables["chunks"].data_ptr()))
            tables["places"] = Upload(self.device).of(self._places())
        rows, elements = tables["rows"], int(self.rows[:, 0].sum())
        self._partials = torch.empty(
            (len(self.layout), self.n_reductions), dtype=torch.float64, device=self.device
        )
        suffix = _suffixes(handle.capacities)[handle.capacities.index(self.carried.capacity)]
        kernels = []
        for symbol, over in renderer.launches(self.kernel.program):
            function, at_a_time = handle.functions[symbol + suffix]
            if n := len(tables[over]):
                blocks = n if elements >= ALONE * n else min(n, at_a_time)
                kernels.append((function, blocks, tables[over].data_ptr(), n))
        gradients = self._gradients
        return leaf.native.Launcher(  # type: ignore[union-attr]
            handle.module,
            kernels,
            (rows.data_ptr(), self._partials.data_ptr()),
            (self.rows.shape[1], self.kernel.program.slots, self.n_reductions),
            (gradients.ctypes.data if len(gradients) else 0, len(gradients)),
            self.carried.capacity,
            threads(self.kernel.program),
        )

    def _host_tables(self) -> dict[str, np.ndarray]:
        """What kernels walk. With several axes rows and chunks say where results are, and not only which those are."""
        rows, chunks, program = self.rows, self.layout.chunks, self.kernel.program
        if program.axes == 1:
            return {"rows": rows, "chunks": chunks, "tiles": chunking.tiles(chunks)}
        self._results = torch.empty(self.n_results, dtype=torch.float64, device=self.device)
        address, size = self._results.data_ptr(), self._results.element_size()
        lengths = HEAD + len(program.buffers)
        rows, chunks = rows.copy(), chunks.copy()
        results = slice(lengths + program.axes, place_word(program))
        for words in (rows[:, results], chunks[:, chunking.CHUNK_WORDS :]):
            words[...] = address + size * words
        lines = rows[chunks[:, 0], lengths + program.axes - 1]
        return {"rows": rows, "chunks": chunks, "tiles": chunking.tiles(chunks, lines)}

    def _joins(self, chunks: int) -> np.ndarray:
        """Which blocks join part results of which row: (row, slice of its places, slices, address of its first chunk).

        chunks: their table's address on the device
        """
        program, table = self.kernel.program, self.layout.chunks
        kinds = [program.values[i].kind for i in regions(program)]
        where = HEAD + len(program.buffers)
        shapes, whole = (
            self.rows[:, where : where + program.axes],
            self.rows[:, where + program.axes :][:, : len(kinds)],
        )
        out = []
        for row in np.flatnonzero(self.layout.count > 1):
            first, count = self.layout.first[row], self.layout.count[row]
            apart = table[first, chunking.CHUNK_WORDS :] != whole[row]
            shape = tuple(map(int, shapes[row]))
            parts = sum(
                chunking.parts(shape, kind, table[first : first + count])
                for kind, on in zip(kinds, apart, strict=True)
                if on
            )
            slices = min(MOST_SLICES, -(-parts // SLICE))
            address = chunks + int(first) * table.shape[1] * table.itemsize
            out += [(row, k, slices, address) for k in range(slices)]
        return np.array(out, np.int64).reshape(-1, 4)

    def _places(self) -> np.ndarray:
        """Which blocks do what is done between stages, where they can share a tensor: (row, from, to), of the places
        along its first axis. One that is long has a place for each of its lines in what is done."""
        where = HEAD + len(self.kernel.program.buffers)
        out = []
        for row in np.flatnonzero(self.rows[:, 0] > 0):
            first, *others = map(int, self.rows[row, where : where + self.kernel.program.axes])
            slices = min(MOST_SLICES, first, -(-first * math.prod(others[:-1]) // SLICE))
            ends = [first * k // slices for k in range(slices + 1)]
            out += [(row, begin, end) for begin, end in itertools.pairwise(ends)]
        return np.array(out, np.int64).reshape(-1, 3)

    def run(self, slots: np.ndarray) -> None:
        """Run all stages with these scalars: float64, scalar sets × slots. Nothing here waits for the device.

        Raises RuntimeError while a CUDA graph is captured, if the scalars in the device's memory are others.
        """
        if self._launcher is None:
            return
        if self.carried.slots:
            address, count = self._address_of(slots), self._n_slots
        else:
            address, count = self._slots.of(slots).data_ptr(), 0
        gradients = 0
        if not self.carried.gradients:
            gradients = self._addresses.of(np.ascontiguousarray(self._gradients)).data_ptr()
        self._launcher.run(address, count, gradients, _stream(self.device))

    def upload(self, slots: np.ndarray) -> None:
        """Put these scalars where the launch, and captured ones, read them: in the order of the stream."""
        if not self.resident:
            raise RuntimeError(
                "scalars go along by value here. Remedy: prepare the launch with resident=True"
            )
        self._slots.of(slots)

    def _address_of(self, slots: np.ndarray) -> int:
        if self._n_slots and capturing(self.device):
            raise RuntimeError(
                "a CUDA graph would repeat this step's scalars for ever. Remedy: prepare the launch with resident=True"
            )
        if self._host is not slots:
            self._host, self._host_address = slots, slots.ctypes.data
        return self._host_address


@contextmanager
def _refusing(what: str = "") -> Iterator[None]:
    """What the driver says becomes a BuildError, so that ``auto`` goes on to the next backend."""
    try:
        yield
    except BuildError:
        raise
    except RuntimeError as error:
        raise BuildError(f"{what}{error}; {FALLBACK}.") from error


def _suffixes(capacities: Sequence[int]) -> tuple[str, ...]:
    """What the names of the kernels that take so many words end in."""
    return ("", "_big")[: len(capacities)]


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _index(device: torch.device) -> int:
    if device.index is None and device.type == "cuda":
        return torch.cuda.current_device()
    return device.index or 0


def _stream(device: torch.device) -> int:
    """The current stream's handle; there is none where a stand-in for the driver runs kernels on the CPU."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
