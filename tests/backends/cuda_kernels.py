"""Every named optimizer's programs as CUDA C++, many in one source, and that source at work on CPU memory.

A row of `CASES` is a named optimizer with storage dtypes; `programs` are those of eight steps of its first variant.
"""

import ctypes
import functools
import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import golden
import numpy as np
import torch
from triton_programs import traced

from fusedopt import table
from fusedopt.backends import chunking as plan
from fusedopt.backends.cpp import backend as cpu
from fusedopt.backends.cuda import backend as runtime
from fusedopt.backends.cuda import render as cuda
from fusedopt.compile import cache, toolchain
from fusedopt.ir.program import Program
from fusedopt.ir.stages import scalar_stores, stages
from fusedopt.kernels import source as skeleton

EXAMPLE = golden.EXAMPLE.with_name("cuda_example.inc")
EMULATION = Path(__file__).with_name("cuda_emulation.h")
STORAGE: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, None),
}
"""Parameters and gradients, and state (None: as the callbacks ask, which is the parameter's)."""
CASES = [f"{row.face}_{row.name}_{dtype}" for row in table.TABLE for dtype in STORAGE]


ON_DEVICE = [
    ("fastai_Adam", {"amp_fused": True, "max_grad_norm": 1.0}),
    ("fastai_Lamb", {"amp_fused": True}),
    ("fastai_Lookahead", {"amp_fused": True}),
    ("torch_NAdam", {"capturable": True}),
    ("torch_RAdam", {"capturable": True}),
]
"""Optimizers whose step counts, scale and norm the device keeps."""


class Rendered(NamedTuple):
    program: Program
    body: str


@functools.cache
def rendered(case: str) -> tuple[Rendered, ...]:
    """The case's programs and their CUDA bodies; nothing is compiled."""
    face, name, dtype = case.split("_")
    row, (storage, state) = table.row(face, name), STORAGE[dtype]
    found: list[Rendered] = []

    def render(program: Program, slot_names: Sequence[str], title: str) -> str:
        found.append(Rendered(program, cuda.render(program, slot_names, title)))
        return ""

    p = torch.zeros(3, dtype=storage, requires_grad=True)
    p.grad = torch.zeros_like(p)
    with golden.nothing_is_compiled(), mock.patch.object(cpu.cpp, "render", render):
        opt = row.factory([p], **row.variants[0].kwargs)
        opt.state_dtype = state
        for _ in range(golden.STEPS):
            opt.step()
    return tuple(found)


def on_device() -> dict[str, str]:
    """The bodies of those that keep numbers there."""
    return {
        f"{name}_{k}": cuda.render(made.program, made.slot_names, made.title)
        for name, options in ON_DEVICE
        for k, made in enumerate(traced(name, "float32", 0, **options))
    }


def together(bodies: dict[str, str]) -> str:
    """One source with many bodies: each in a namespace, its functions called `<name>_stage_0` and so on."""
    parts = []
    for name, body in bodies.items():
        parts += [
            "#undef FUSEDOPT_STAGE",
            "#undef FUSEDOPT_BLOCK_STAGE",
            "#undef FUSEDOPT_JOIN",
            "#undef FUSEDOPT_BETWEEN",
            "#undef FUSEDOPT_PLACES",
            "#undef FUSEDOPT_SCALARS",
            f"#define FUSEDOPT_BLOCK_STAGE(k) FUSEDOPT_ENTRIES({name}_stage_##k, each_block, stage_##k)",
            f"#define FUSEDOPT_JOIN(k) FUSEDOPT_ENTRIES({name}_join_##k, each_join, join_##k)",
            f"#define FUSEDOPT_BETWEEN(k) FUSEDOPT_ENTRIES({name}_before_##k, each_row, before_##k)",
            f"#define FUSEDOPT_PLACES(k) FUSEDOPT_ENTRIES({name}_before_##k, each_place, before_##k)",
            f"#define FUSEDOPT_STAGE(k) FUSEDOPT_ENTRIES({name}_stage_##k, each_piece, stage_##k)",
            f"#define FUSEDOPT_SCALARS FUSEDOPT_ENTRIES({name}_scalars, each_row, scalars)",
            f"namespace {name}_ {{\n{body}}}",
        ]
    return cuda.source(skeleton("cuda.cu"), "\n".join(parts))


# ---------------------------------------------------------------- on the CPU


class LaunchTable(ctypes.Structure):
    """`struct Launch` of the skeleton."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "pieces", "partials", "slots", "gradients")),
        *((name, ctypes.c_int64) for name in ("row_words", "n_slots", "n_reductions", "first_gradient")),
    ]


EMULATE = f"""
static_assert(sizeof(Launch) == {ctypes.sizeof(LaunchTable)});
static_assert(small_words == {runtime.SMALL} && big_words == {runtime.BIG});
static_assert(max_threads >= {runtime.THREADS});
template <int n>
void launch(void* kernel, void** parameters, unsigned blocks, unsigned threads) {{
  emulate(reinterpret_cast<void (*)(Launch, int64_t, Inline<n>)>(kernel), blocks, threads,
          *static_cast<const Launch*>(parameters[0]), *static_cast<const int64_t*>(parameters[1]),
          *static_cast<const Inline<n>*>(parameters[2]));
}}
extern "C" void emulated(void* kernel, bool big, void** parameters, unsigned blocks, unsigned threads) {{
  (big ? launch<big_words> : launch<small_words>)(kernel, parameters, blocks, threads);
}}
"""
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fno-strict-aliasing")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


def stored(
    name: str, source: str, options: Sequence[str], suffix: str, source_suffix: str = "cpp"
) -> cache.Entry:
    """What the system's compiler makes of a source. It is made once, whichever tests and processes want it."""
    tool = toolchain.compiler()

    def build(path: Path, out: Path) -> str:
        command = [*tool.command, *options, str(path), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stderr

    key = hashlib.sha256(repr([source, *tool, *options]).encode()).hexdigest()
    return cache.load_or_build(name, key, source, suffix, build, source_suffix=source_suffix)


def emulation(source: str, *flags: str) -> ctypes.CDLL:
    """The source compiled for the CPU and loaded. The header is compiled beforehand: it is longer than most sources."""
    options = [*FLAGS, *WARNINGS, *flags]
    header = stored("emulation", EMULATION.read_text(), [*options, "-x", "c++-header"], "h.gch", "h")
    included = [*options, "-include", str(header.source_path)]
    return ctypes.CDLL(str(stored("emulated", source + EMULATE, included, "so").path))


@functools.cache
def named() -> ctypes.CDLL:
    """All programs of all cases, compiled together: `<case>_<k>_stage_0` and so on."""
    return emulation(
        together({f"{case}_{k}": r.body for case in CASES for k, r in enumerate(rendered(case))})
    )


def run(
    library: ctypes.CDLL,
    name: str,
    program: Program,
    columns: dict[str, list[torch.Tensor]],
    sets: Sequence[int],
    slots: np.ndarray,
    blocks: int = 1,
    threads: int = 1,
    chunks: plan.Layout | None = None,
) -> np.ndarray:
    """Launch all stages on CPU tensors, as a launcher would on a GPU; returns the partial results."""
    sizes = tuple(t.numel() for t in columns["param"])
    layout = chunks or plan.layout(sizes)
    pointers = [[t.data_ptr() for t in columns[buffer]] for buffer, _ in program.buffers]
    rows = np.array([sizes, sets, layout.first, layout.count, *pointers], np.int64).T.copy()
    reductions = sum(len(stage.reductions) for stage in stages(program))
    partials = np.full((len(layout), reductions), np.nan)
    addresses = [a.ctypes.data for a in (rows, layout.chunks, partials)]
    launch = LaunchTable(*addresses, None, None, rows.shape[1], slots.shape[1], reductions, slots.size)
    words = np.zeros(runtime.SMALL, np.int64)
    gradients = [t.data_ptr() for t in columns.get("grad", [])]
    words[: slots.size], words[slots.size :][: len(gradients)] = slots.view(np.int64).ravel(), gradients

    def start(symbol: str, n: int) -> None:
        kernel: Any = ctypes.cast(getattr(library, f"{name}_{symbol}"), ctypes.c_void_p)
        count = ctypes.c_int64(n)
        parameters = (ctypes.c_void_p * 3)(
            ctypes.addressof(launch), ctypes.addressof(count), words.ctypes.data
        )
        library.emulated(kernel, False, parameters, blocks, threads)

    for k in range(len(stages(program))):
        start(f"stage_{k}", len(layout))
    if scalar_stores(program).stores:
        start("scalars", len(sizes))
    return partials
