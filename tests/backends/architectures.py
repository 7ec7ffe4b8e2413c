"""Which sources of GPU kernels were compiled for every architecture and dtype, and found as they should be.

That takes minutes, so tests compile for one, and compare the sources with `tests/golden/architectures.txt`: the same
compiler makes the same of the same source. After a change, from the repository's root:

    make architectures

It runs the tests that are for all architectures, and writes the file if they pass.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import cuda_kernels
import golden
import pytest
import sass
import test_blocks
import torch
import triton_gates
from test_cuda import all_ops as all_cuda_ops
from triton_programs import all_ops, spelled

from fusedopt.backends.cuda import nvrtc
from fusedopt.backends.cuda import render as cuda
from fusedopt.backends.triton import backend as triton
from fusedopt.backends.triton import render
from fusedopt.kernels import source as skeleton

FILE = golden.FOLDER / "architectures.txt"
TESTS = [str(Path(__file__).with_name(name)) for name in ("test_triton.py", "test_nvrtc.py")]


def sources() -> Iterator[str]:
    """All that those tests compile, and with which compilers and options."""
    yield f"{triton_gates.VERSION}, NVRTC {nvrtc.nvrtc().version}"
    yield f"{triton_gates.ARCHS} {sass.ARCHS} {triton.options()} {triton.BLOCK} {triton.TILES}"
    yield skeleton("triton.py.in")
    for dtype in triton_gates.STORED:
        for name, made in triton_gates.programs(dtype).items():
            yield f"{name}\n{made.body()}"
    for name, (program, _) in test_blocks.PROGRAMS.items():
        yield f"{name}\n{render.render(program)}"
    yield sass.source()
    yield repr(cuda_kernels.on_device())
    for dtype in (torch.float32, torch.float64):
        yield render.render(all_ops(dtype, spelled(dtype)))
        yield cuda.render(all_cuda_ops(dtype))


def digest() -> str:
    """Of the sources, without comments: those say where an expression is from."""
    text = "\0".join(re.sub(r"\s*(#|//) .*", "", source) for source in sources())
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    if status := pytest.main(["--all-architectures", "-q", "-n", "2", "-k", "not are_those", *TESTS]):
        sys.exit(status)
    FILE.write_text(f"{next(sources())}\n{digest()}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
