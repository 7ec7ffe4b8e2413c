"""What Triton's compiler makes of its kernels, read from PTX and cubins: no GPU is needed.

`tests/golden/triton_gates.txt` has a line for each stage of each named optimizer. To make it anew:

    PYTHONPATH=tests python tests/backends/triton_gates.py

Then read the difference. Tests compare and never write. A change to an optimizer that the skeleton shows as its
example wants the example in `kernels/triton.py.in` replaced by hand.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import golden
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_programs import DTYPES, NAMED, Traced, traced

from fusedopt.backends.triton import backend
from fusedopt.backends.triton import render as renderer
from fusedopt.ir.program import Program
from fusedopt.ir.stages import Stage, scalar_stores, stages
from fusedopt.kernels import source as skeleton

ARCHS = (80, 90, 100)
STORED = list(DTYPES)[:3]
GATES = golden.FOLDER / "triton_gates.txt"
VERSION = f"Triton {triton.__version__}"
HEADER = "kernel, stage: bytes per element; 128-bit loads and stores; single ones; registers on " + ", ".join(
    f"sm_{arch}" for arch in ARCHS
)
THREADS = 32 * backend.WARPS
ARGUMENTS = {"rows": "*i64", "chunks": "*i64", "partials": "*fp64", "results": "*fp64", "slots": "*fp64"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Compiled(NamedTuple):
    """A kernel: its PTX, its machine code, and what it needs."""

    ptx: str
    cubin: bytes
    registers: int
    stack: int
    local: int

    def arithmetic(self) -> Counter[str]:
        """How often each floating-point instruction stands in it."""
        found = re.findall(r"\s((?:add|sub|mul|div|sqrt|rsqrt|rcp|fma|mad|ex2|lg2)\.[\w.]*f\w*)\s", self.ptx)
        return Counter(found)

    def accesses(self) -> Counter[tuple[bool, str, int]]:
        """How often (guarded by a predicate, "ld" or "st", bits) is accessed in global memory."""
        found: Counter = Counter()
        for guard, kind, vector, bits in _ACCESS.findall(self.ptx):
            found[bool(guard), kind, int(bits) * int(vector[1:] or 1 if vector else 1)] += 1
        return found


_ACCESS = re.compile(r"^\s*(@\S+ )?(ld|st)\.global(?:\.\w+)*?(?:\.(v\d))?\.b(\d+)", re.MULTILINE)


def dump(what: str, cubin: bytes) -> str:
    """What cuobjdump says of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def module(body: str) -> dict[str, Any]:
    """The names of a kernel file; Triton reads the source of its functions there, so it is a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.py")
        path.write_text(renderer.source(skeleton("triton.py.in"), body), encoding="utf-8")
        return backend.load(path)


def compile_body(body: str, arch: int, **changed: Any) -> dict[str, Compiled]:
    """The kernels for an architecture, compiled as the backend compiles them but for what is changed."""
    names = module(body)
    entries = [n for n in names if re.fullmatch(r"stage_\d+|scalars", n)]
    return {n: compiled_function(names[n], arch, **changed) for n in entries}


def compile_blocks(program: Program, arch: int, columns: int, whole: bool = False) -> dict[str, Compiled]:
    """The same of a program with several axes, for tiles with that many columns; whole: where lines have no more."""
    names = module(renderer.render(program))
    entries = [n for each in renderer.kernels(program) for n in each[:3] if n is not None]
    tile = backend.Tile.of(columns, whole)
    sizes = {"LINES": tile.lines, "COLUMNS": columns, "WHOLE": whole}
    return {n: compiled_function(names[n], arch, sizes, num_warps=tile.warps) for n in entries}


def compiled_function(
    function: Any, arch: int, sizes: Mapping[str, int] | None = None, **changed: Any
) -> Compiled:
    constants = {a: n for a, n in (sizes or {"BLOCK": backend.BLOCK}).items() if a in function.arg_names}
    signature = {a: ARGUMENTS.get(a, "constexpr") for a in function.arg_names}
    tables = [i for i, a in enumerate(function.arg_names) if a not in constants]
    source = ASTSource(function, signature, constants, {(i,): [["tt.divisibility", 16]] for i in tables})
    options = backend.options() | changed
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = re.search(
        r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump("-res-usage", kernel.asm["cubin"])
    )
    assert usage is not None
    return Compiled(kernel.asm["ptx"], kernel.asm["cubin"], *map(int, usage.groups()))


# ---------------------------------------------------------------- every named optimizer


@functools.cache
def programs(dtype: str) -> dict[str, Traced]:
    """Those of every named optimizer, by name."""
    return {f"{name}_{dtype}_{k}": made for name in NAMED for k, made in enumerate(traced(name, dtype))}


@functools.cache
def _compiled(code: str, arch: int) -> dict[str, Compiled]:
    return compile_body(code, arch)


def compiled(made: Traced, arch: int) -> dict[str, Compiled]:
    """Its kernels. Programs that differ in comments alone are compiled once."""
    return _compiled(re.sub(r"\s*# .*", "", made.body()), arch)


def stage_of(program: Program, kernel: str) -> Stage:
    """The stage that a kernel runs."""
    return (
        scalar_stores(program) if kernel == "scalars" else stages(program)[int(kernel.removeprefix("stage_"))]
    )


def table(dtypes: Sequence[str] = STORED, archs: Sequence[int] = ARCHS) -> str:
    """What stands in the golden file; without the lines of other dtypes and the registers of other architectures."""
    lines = [VERSION, HEADER]
    for dtype in dtypes:
        for name, made in programs(dtype).items():
            for kernel in compiled(made, archs[0]):
                found = [compiled(made, arch)[kernel] for arch in archs]
                count, bits = found[0].accesses(), (128, 32, 16)
                wide, *single = [[count[b < 128, kind, b] for kind in ("ld", "st")] for b in bits]
                loads, stores = map(sum, zip(*single, strict=True))
                registers = " ".join(f"{f.registers:3}" for f in found)
                size = stage_of(made.program, kernel).bytes_per_element(made.program)
                lines.append(
                    f"{f'{name}_{kernel}':<38} {size:3}  {wide[0]:3} {wide[1]:3}  "
                    f"{loads:3} {stores:3}  {registers}"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    GATES.write_text(table(), encoding="utf-8")
    print(GATES.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
