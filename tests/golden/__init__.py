"""The generated code of every named optimizer, committed: a refactor changes none of it.

`<face>_<name>_<dtype>.cpp` holds the kernels that eight steps of the optimizer's first variant in
`fusedopt.table` need, one after another, for parameters and gradients of that dtype: the first step's if it
has one of its own, the later steps', RAdam's before and after its sixth step, Lookahead's every sixth.

To make them anew, and `kernels/cpu_example.inc` with them, from the repository's root:

    python -m tests.golden

Then read the difference. Tests compare and never write.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from fusedopt import backends, table
from fusedopt.backends.cpp import backend as cpu
from fusedopt.backends.cpp import render as cpp
from fusedopt.compile import toolchain
from fusedopt.kernels import source as skeleton
from fusedopt.step import buckets

FOLDER = Path(__file__).parent
EXAMPLE = FOLDER.parents[1] / "kernels" / "cpu_example.inc"
EXAMPLE_OF = "fastai_Adam_float32"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NAMES = [f"{row.face}_{row.name}_{dtype}" for row in table.TABLE for dtype in DTYPES]
STEPS = 8


def path(name: str) -> Path:
    """Where the golden code of this name is kept."""
    return FOLDER / f"{name}.cpp"


@contextmanager
def nothing_is_compiled() -> Iterator[list[str]]:
    """Kernels are rendered, but not compiled and not run. Gives the list that their bodies are added to."""
    before, after = skeleton("cpu.cpp").split(cpp.SLOT)
    bodies: list[str] = []

    def compile_library(name: str, source: str, **kwargs: Any) -> Any:
        bodies.append(source.removeprefix(before).removesuffix(after))
        return SimpleNamespace(address=lambda symbol: 1, source_path="", seconds=0.0, built=False)

    with (
        mock.patch.dict(os.environ, FUSEDOPT_BACKEND="cpp"),
        mock.patch.dict(backends.made, cpp=cpu.Cpp()),  # one that knows no kernel, and is forgotten
        mock.patch.object(buckets, "known_traces", lambda *args: {}),
        mock.patch.object(toolchain, "compile_library", compile_library),
        mock.patch.object(cpu.Launch, "native", lambda self: None),
        mock.patch.object(cpu.Launch, "planned", lambda self, slots: ([], self.address, [], 0)),
    ):
        yield bodies


def kernels(name: str, **hypers: float) -> list[str]:
    """The kernels' bodies of this name, as of now; ``hypers`` replace hyperparameters of the variant."""
    face, optimizer, dtype = name.split("_")
    row = table.row(face, optimizer)
    p = torch.zeros(3, dtype=DTYPES[dtype], requires_grad=True)
    p.grad = torch.zeros_like(p)
    with nothing_is_compiled() as bodies:
        opt = row.factory([p], **(row.variants[0].kwargs | hypers))
        for _ in range(STEPS):
            opt.step()
    return bodies


def generate(name: str, **hypers: float) -> str:
    """The generated code of this name, as of now."""
    return "\n".join(kernels(name, **hypers))


def gates(file: Path, archs: Sequence[int], dtypes: Sequence[str] = ("",)) -> str:
    """A golden table of gates: its lines about these dtypes, with the registers on the architectures of these numbers.

    Registers are the last columns of a line, three digits wide.
    """
    version, header, *lines = file.read_text(encoding="utf-8").splitlines()
    width = 4 * len(header.rpartition(" registers on ")[2].split(", ")) - 1
    kept = [line for line in lines if any(f"_{dtype}" in line for dtype in dtypes)]
    cut = [line[:-width] + " ".join(line[-width:][4 * k : 4 * k + 3] for k in archs) for line in kept]
    return "\n".join([version, header, *cut]) + "\n"
