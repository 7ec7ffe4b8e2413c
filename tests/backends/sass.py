"""What NVRTC makes of the CUDA kernels, read from cubins and PTX: no GPU is needed.

`tests/golden/cuda_gates.txt` has a line for each stage of each named optimizer. To make it anew, and
`kernels/cuda_example.inc` with it:

    PYTHONPATH=tests python tests/backends/sass.py

Then read the difference. Tests compare and never write.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cuda_kernels
import golden

from fusedopt.backends.cuda import backend as cuda
from fusedopt.backends.cuda import nvrtc
from fusedopt.ir.program import Program
from fusedopt.ir.stages import Stage, scalar_stores, stages

ARCHS = ("sm_80", "sm_90", "sm_100")
GATES = golden.FOLDER / "cuda_gates.txt"
HEADER = "kernel, stage: bytes per element; 128-bit loads and stores; single ones; registers on " + ", ".join(
    ARCHS
)


def cuobjdump() -> Path | None:
    """NVIDIA's disassembler as it comes with triton; None without triton."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.is_file() else None


@dataclass(frozen=True)
class Function:
    """A kernel function in a cubin: what it needs, and how often each instruction stands in it."""

    registers: int
    stack: int
    local: int
    instructions: Counter[str]

    def count(self, pattern: str) -> int:
        """How many instructions match the pattern as a whole."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))


_USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
# Address, predicate, name, operands. HFMA2 of zeros is how a constant gets into a register.
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(?![\w.]| R\d+, -RZ, RZ,)", re.MULTILINE
)


def functions(cubin: Path) -> dict[str, Function]:
    """The kernel functions of a cubin, by name."""

    def dump(what: str) -> str:
        tool = cuobjdump()
        assert tool is not None
        return subprocess.run([tool, what, cubin], capture_output=True, text=True, check=True).stdout

    code = re.split(r"^\s*Function : (\w+)$", dump("-sass"), flags=re.MULTILINE)
    instructions = dict(zip(code[1::2], code[2::2], strict=True))
    return {
        name: Function(*map(int, usage), Counter(_INSTRUCTION.findall(instructions[name])))
        for name, *usage in _USAGE.findall(dump("-res-usage"))
    }


def ptx(source: str, arch: str) -> dict[str, Counter[str]]:
    """How often each instruction stands in each function's PTX, before the assembler's expansions.

    cuda-core wants a GPU driver for PTX, so this asks NVRTC itself, with the options that cuda-core would give it.
    """
    from cuda.bindings import nvrtc as bindings

    options = ["--std=c++17", "--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false"]
    options.append(f"--gpu-architecture={arch.replace('sm', 'compute')}")
    _, program = bindings.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    (status,) = bindings.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    assert not int(status), status
    text = bytearray(bindings.nvrtcGetPTXSize(program)[1])
    bindings.nvrtcGetPTX(program, text)
    bindings.nvrtcDestroyProgram(program)
    parts = re.split(r"^\s*\.visible \.entry (\w+)\(", text.decode(), flags=re.MULTILINE)
    instruction = re.compile(r"^\s*(?:@!?%p\d+ )?([a-z]\w*(?:\.[\w:]+)*)[^:\n]*;", re.MULTILINE)
    return {
        name: Counter(instruction.findall(code)) for name, code in zip(parts[1::2], parts[2::2], strict=True)
    }


# ---------------------------------------------------------------- every named optimizer


@functools.cache
def kernels() -> dict[str, tuple[Program, Stage]]:
    """Every stage of every case, by the name of its function in `source`."""
    return {
        f"{case}_{k}_stage_{j}": (r.program, stage)
        for case in cuda_kernels.CASES
        for k, r in enumerate(cuda_kernels.rendered(case))
        for j, stage in enumerate(stages(r.program))
    }


@functools.cache
def scalar_functions() -> set[str]:
    """The names of the functions that store one number per tensor."""
    return {
        f"{case}_{k}_scalars"
        for case in cuda_kernels.CASES
        for k, r in enumerate(cuda_kernels.rendered(case))
        if scalar_stores(r.program).stores
    }


@functools.cache
def source() -> str:
    """All of them in one source: compiling them together takes a third of the time. Those with few parameters only."""
    return cuda.SMALL_ONLY + cuda_kernels.together(
        {
            f"{case}_{k}": r.body
            for case in cuda_kernels.CASES
            for k, r in enumerate(cuda_kernels.rendered(case))
        }
    )


@functools.cache
def compiled(arch: str) -> tuple[dict[str, Function], str]:
    """All functions as compiled for an architecture, and what the assembler said.

    It says nothing of what is found in a cache, so each process compiles it anew.
    """
    entry = nvrtc.compile_cubin("all_optimizers", source(), arch, key_parts=[str(os.getpid())])
    return functions(entry.path), entry.log


def table(archs: Sequence[str] = ARCHS) -> str:
    """What stands in the golden file; without the registers of other architectures."""
    lines = [f"NVRTC {nvrtc.nvrtc().version}", HEADER]
    for name, (program, stage) in kernels().items():
        found = [compiled(arch)[0][name] for arch in archs]
        f = found[0]
        wide, single = (f.count(r"LDG\.E\.128"), f.count(r"STG\.E\.128")), (f.count(LOAD), f.count(STORE))
        registers = " ".join(f"{g.registers:3}" for g in found)
        lines.append(
            f"{name:<38} {stage.bytes_per_element(program):3}  {wide[0]:3} {wide[1]:3}  "
            f"{single[0]:3} {single[1]:3}  {registers}"
        )
    return "\n".join(lines) + "\n"


LOAD, STORE = r"LDG\.E(\.U16)?", r"STG\.E(\.U16)?"
"""One element of 4 or 2 bytes. Tables, scalars and partial results have 8."""


def main() -> None:
    GATES.write_text(table(), encoding="utf-8")
    cuda_kernels.EXAMPLE.write_text(cuda_kernels.rendered(golden.EXAMPLE_OF)[0].body, encoding="utf-8")
    print(GATES.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
