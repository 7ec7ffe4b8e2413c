"""The ``triton`` backend: Triton through its own compiler and launcher, on the tensors' current stream.

Started with TRITON_INTERPRET=1, Triton runs its kernels in an interpreter, on tensors in main memory. Then this backend
does too: the same tables, the same launches.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from ... import env
from ...compile import cache
from ...compile.cache import BuildError
from ...ir.program import Program
from ...ir.stages import wholes
from ...kernels import source as skeleton
from .. import chunking
from ..base import HEAD, Compiler, Kernel, Rows
from ..upload import Upload
from . import render as renderer
from .blocks import most_kept_lines

BLOCK = 1024
"""Elements of a block: with WARPS, eight per thread, which is 128 bits of a 16-bit type."""
WARPS = 4
NARROW = 16
"""Bytes per element, up to which a program has two blocks, for what is done once to weigh less."""
TILES = {4: 4, 16: 4, 64: 4, 256: 8}
"""How many columns tiles of lines may have, and how many warps then: each shape that is needed is compiled."""
EACH = 4
"""Elements of a tile for each thread: more of each is kept in registers than in a block."""
EACH_WHOLE = 8
"""The same where lines are not longer than tiles, and gone over more than once: then nothing is computed twice."""
JOINING = 16
"""Programs that share the joining of a tensor's part results along axes."""
SHARING = 64
"""Those that share what is done between stages, where it is done for each place along the first axis by itself."""
FALLBACK = 'use backend="reference", which compiles nothing'


class Handle(NamedTuple):
    """The kernels of the stages, whether each is launched over tiles, and the kernel that stores scalar state."""

    stages: list[Any]
    tiled: list[bool]
    scalars: Any | None


class Step(NamedTuple):
    """A kernel of a program with several axes.

    It is launched over chunks, which may be cut further (tiled), or over tensors, with ``shared`` programs for each
    """

    kernel: Any
    over_chunks: bool
    tiled: bool = False
    shared: int = 1


class Tile(NamedTuple):
    """Of lines, as kernels are given it."""

    lines: int
    columns: int
    whole: bool
    warps: int

    @classmethod
    def of(cls, columns: int, whole: bool = False) -> Tile:
        each = EACH_WHOLE if whole else EACH
        return cls(each * 32 * TILES[columns] // columns, columns, whole, TILES[columns])


class Triton(Compiler):
    name = "triton"

    def __init__(self) -> None:
        super().__init__()
        self.device = "cpu" if interpreting() else "cuda"

    def _compile(
        self, program: Program, name: str, slot_names: Sequence[str], device: torch.device
    ) -> Kernel:
        start = time.perf_counter()
        version = _version()
        try:
            body = renderer.render(program, slot_names, name)
        except BuildError as error:
            raise BuildError(f"kernel {name!r}: {error}. Remedy: {FALLBACK}.") from None
        entry = _store(name, renderer.source(skeleton("triton.py.in"), body), version)
        module = load(entry.source_path)
        handle: Handle | list[Step]
        if program.axes == 1:
            handle = _handle(program, module)
            _compile_now(name, handle, entry.source_path, device)
        else:
            handle = _steps(program, module)
            # For other tensors tiles may have another shape: then it is compiled again when it is prepared for them.
            usual = (1 << 10, program.line or max(TILES))
            _compile_blocks(name, handle, entry.source_path, device, _tile(program, np.array([usual])))
        seconds = time.perf_counter() - start
        return Kernel(
            self.name, name, program, body, str(entry.source_path), seconds, not entry.built, handle
        )

    def prepare(self, kernel: Kernel, *rows: Any, **how: Any) -> Launch | BlocksLaunch:
        return (Launch if kernel.program.axes == 1 else BlocksLaunch)(kernel, *rows, **how)


def _handle(program: Program, module: dict[str, Any]) -> Handle:
    names = renderer.entries(program)
    return Handle(
        [module[s] for s in names.stages],
        [not s.reductions and not renderer.joins_parts(program, s) for s in renderer.stages(program)],
        module[names.scalars] if names.scalars else None,
    )


def _steps(program: Program, module: dict[str, Any]) -> list[Step]:
    """The kernels of a program with several axes, in the order in which they are launched."""
    split, steps = renderer.stages(program), []
    for k, names in enumerate(renderer.kernels(program)):
        if names.join:
            steps.append(Step(module[names.join], over_chunks=False, shared=JOINING))
        if names.between:
            shared = SHARING if names.shared else 1
            steps.append(Step(module[names.between], over_chunks=False, shared=shared))
        if names.stage:
            joins = any(v in wholes(program) for v in split[k].values)
            steps.append(Step(module[names.stage], True, tiled=not split[k].reductions and not joins))
    return steps


class Launch(Rows):
    """A kernel's tables, ready to run. ``rows`` is what the host knows of the rows; it is uploaded when it changed.

    Scalars are always resident: they are read from the device's memory.
    """

    def _get_ready(self) -> None:
        program, self.handle = self.kernel.program, cast(Handle, self.kernel.handle)
        self.n_chunks, chunks = len(self.layout) if program.buffers else 0, self.layout.chunks
        self._rows, self._slots = Upload(self.device), Upload(self.device, resident=True)
        if self.n_chunks:
            self._chunks = Upload(self.device).of(chunks)
            self._tiles = self._chunks
            if any(self.handle.tiled):
                size = renderer.stages(program)[-1].bytes_per_element(program)
                tiles = chunking.tiles(chunks, times=2 if size <= NARROW else 1)
                self._tiles = Upload(self.device).of(tiles)
            n_partials = self.n_chunks * self.n_reductions
            self._partials = torch.empty(n_partials, dtype=torch.float64, device=self.device)

    def upload(self, slots: np.ndarray) -> None:
        """Put these scalars where the launch, and captured ones, read them: in the order of the stream."""
        self._slots.of(slots)

    def run(self, slots: np.ndarray) -> None:
        """Run all stages with these scalars: float64, scalar sets × slots. Nothing here waits for the device."""
        if not self.n_chunks:
            return
        with _on(self.device):
            rows, numbers = self._rows.of(self.rows), self._slots.of(slots)
            for stage, tiled in zip(self.handle.stages, self.handle.tiled, strict=True):
                chunks = self._tiles if tiled else self._chunks
                stage[(len(chunks),)](rows, chunks, self._partials, numbers, BLOCK=BLOCK, **options())
            if self.handle.scalars is not None:
                self.handle.scalars[(len(self.rows),)](rows, self._partials, numbers, **options())


class BlocksLaunch(Rows):
    """Of a program with several axes: chunks are whole lines, and there is memory for results along axes.

    Results are written before they are read in each run, so those of an earlier one may lie there.
    """

    def _get_ready(self) -> None:
        program = self.kernel.program
        self.steps = cast(list[Step], self.kernel.handle)
        self.n_chunks = len(self.layout)
        self._rows, self._slots = Upload(self.device), Upload(self.device, resident=True)
        if not self.n_chunks:
            return
        first = HEAD + len(program.buffers)
        axes = self.rows[:, first : first + program.axes]
        lines = axes[self.layout.chunks[:, 0], -1]
        chunks, n_kept = _with_room_for_lines(
            self.layout.chunks, lines, self.n_results, most_kept_lines(program)
        )
        self.tile = _tile(program, axes[self.rows[:, 0] > 0])
        self._chunks = Upload(self.device).of(chunks)
        tiled = any(step.tiled for step in self.steps)
        self._tiles = Upload(self.device).of(chunking.line_tiles(chunks, lines)) if tiled else self._chunks
        self._partials, self._results = (
            torch.empty(n, dtype=torch.float64, device=self.device)
            for n in (self.n_chunks * self.n_reductions, self.n_results + n_kept)
        )
        _compile_blocks(self.kernel.name, self.steps, self.kernel.source_path, self.device, self.tile)

    def upload(self, slots: np.ndarray) -> None:
        """Put these scalars where the launch, and captured ones, read them: in the order of the stream."""
        self._slots.of(slots)

    def run(self, slots: np.ndarray) -> None:
        """Run all kernels with these scalars: float64, scalar sets × slots. Nothing here waits for the device."""
        if not self.n_chunks:
            return
        with _on(self.device):
            rows, numbers = self._rows.of(self.rows), self._slots.of(slots)
            for step in self.steps:
                chunks = self._tiles if step.tiled else self._chunks
                grid = (len(chunks),) if step.over_chunks else (len(self.rows), step.shared)
                *shape, warps = self.tile
                step.kernel[grid](
                    rows, chunks, self._partials, self._results, numbers, *shape, **options(warps)
                )


def _with_room_for_lines(
    chunks: np.ndarray, lines: np.ndarray, begin: int, each: int
) -> tuple[np.ndarray, int]:
    """Chunks that also say where, from ``begin`` on, ``each`` numbers of each line are kept, less the place of those of
    their tensor's first line; and how many numbers that is."""
    count = (chunks[:, 2] - chunks[:, 1]) // lines * each
    first = begin + np.cumsum(count) - count - chunks[:, 1] // lines * each
    return np.concatenate([chunks, first[:, None]], axis=1), int(count.sum())


def _tile(program: Program, axes: np.ndarray) -> Tile:
    """The tiles for tensors with axes of these lengths: the longest that leave little empty.

    A line that is longer has several tiles.
    """
    length, count = axes[:, -1], np.prod(axes[:, :-1], axis=1)
    tiles = [Tile.of(columns) for columns in TILES]
    work = {t: t.warps * int((-(-count // t.lines) * -(-length // t.columns)).sum()) for t in tiles}
    columns = max(t.columns for t in tiles if work[t] <= 1.25 * min(work.values()))
    again = any(stage.lines for stage in renderer.stages(program))
    return Tile.of(columns, again and int(length.max()) <= columns)


def options(warps: int = WARPS) -> dict[str, Any]:
    """How kernels are compiled: nothing contracted, and numbers too small to be normal kept.

    Allowed all 255 registers, NVIDIA's assembler uses fewer; left alone it spills, to fit one program more.
    """
    common = {"num_warps": warps, "enable_fp_fusion": False}
    return common if torch.version.hip else common | {"enable_reflect_ftz": False, "maxnreg": 255}


def load(path: Path) -> dict[str, Any]:
    """A kernel file's names. Not imported: Python would keep a compiled copy beside it, unchecked."""
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    return module.__dict__


def interpreting() -> bool:
    """Whether Triton was started with its interpreter; the variable means nothing once Triton is imported."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret) and not isinstance(triton.language.sum, triton.JITFunction)


def _version() -> str:
    try:
        import triton
    except ImportError as error:
        raise BuildError(
            f"the triton package cannot be imported ({error}). Remedy: `pip install triton`, or {FALLBACK}."
        ) from error
    return str(triton.__version__)


def _store(name: str, text: str, version: str) -> cache.Entry:
    """The source in the compile cache. It is what is loaded, so it is checked as a library is."""

    def build(source: Path, out: Path) -> str:
        shutil.copyfile(source, out)
        return ""

    env.debug(2, f"# kernel {cache.plain(name)}\n{text}")
    key = hashlib.sha256(repr([text, renderer.VERSION, version]).encode()).hexdigest()
    meta = {"compiler": f"triton {version}"}
    return cache.load_or_build(name, key, text, "py", build, source_suffix="py", meta=meta)


def _compile_now(name: str, handle: Handle, path: Path, device: torch.device) -> None:
    """Compile before the first launch, so that what cannot be compiled is known before anything has changed."""
    words, numbers = torch.int64, torch.float64
    with _compiling(name, path, device):
        for stage in handle.stages:
            stage.warmup(words, words, numbers, numbers, BLOCK=BLOCK, grid=(1,), **options())
        if handle.scalars is not None:
            handle.scalars.warmup(words, numbers, numbers, grid=(1,), **options())


def _compile_blocks(
    name: str, steps: Sequence[Step], path: Path | str, device: torch.device, tile: Tile
) -> None:
    """The same for tiles of this shape."""
    words, numbers = torch.int64, torch.float64
    with _compiling(name, path, device):
        for step in steps:
            *shape, warps = tile
            step.kernel.warmup(words, words, numbers, numbers, numbers, *shape, grid=(1,), **options(warps))


@contextmanager
def _compiling(name: str, path: Path | str, device: torch.device) -> Iterator[None]:
    """What Triton says against it becomes a BuildError."""
    try:
        with nullcontext() if device.index is None else _on(device):
            yield
    except Exception as error:
        raise BuildError(
            f"kernel {name!r}: Triton cannot compile it: {type(error).__name__}: {error}\n  source: {path}\n"
            f"  remedy: {FALLBACK}"
        ) from error


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device. Its interpreter computes with numpy, which warns of NaN and infinity."""
    return torch.cuda.device(device) if device.type == "cuda" else np.errstate(all="ignore")
