"""What the Triton tests have in common: the programs of the named optimizers, traced and not compiled."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from fusedopt import backends, table
from fusedopt.backends.base import HEAD
from fusedopt.backends.triton import render as renderer
from fusedopt.ir.ops import OPS, Op
from fusedopt.ir.program import Buffer, Graph, Program, verify
from fusedopt.step import buckets

DTYPES = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, None),
    "float64": (torch.float64, None),
}
"""Of parameters and gradients, and of state where that is another."""
NAMED = {f"{row.face}_{row.name}": row for row in table.TABLE}
STEPS = 7
EXAMPLE_OF = "fastai_Adam"


class Traced(NamedTuple):
    """A program, with what a renderer is told about it."""

    program: Program
    slot_names: list[str]
    title: str

    def body(self) -> str:
        return renderer.render(self.program, self.slot_names, self.title)


class _Recorder:
    """A backend that compiles and runs nothing."""

    name, device, native = "cpp", "cpu", False

    def __init__(self) -> None:
        self.kernels: dict[Program, backends.Kernel] = {}
        self.found: list[Traced] = []

    def compile(self, program: Program, name: str, slot_names: Any, device: Any = None) -> backends.Kernel:
        if program not in self.kernels:
            self.kernels[program] = backends.Kernel("cpp", name, program, "", "", 0.0, False, None)
            self.found.append(Traced(program, list(slot_names), name))
        return self.kernels[program]

    def prepare(self, kernel: backends.Kernel, columns: Any, sizes: Any, *args: Any, **how: Any) -> Any:
        rows = np.zeros((len(sizes), HEAD + len(kernel.program.buffers)), np.int64)
        return SimpleNamespace(
            rows=rows, run=lambda slots: None, planned=lambda slots: None, let_go=lambda: None
        )


@contextmanager
def recording() -> Iterator[list[Traced]]:
    """Programs are traced, and added to the list this gives, but not compiled and not run."""
    recorder = _Recorder()
    with (
        mock.patch.dict(backends.made, cpp=recorder),
        mock.patch.object(buckets, "known_traces", lambda *args: {}),
    ):
        yield recorder.found


def made(
    name: str, params: Any, backend: str, dtype: str = "float32", variant: int = 0, **options: Any
) -> Any:
    """A named optimizer on this backend, with the dtype of its state."""
    row = NAMED[name]
    kwargs = row.variants[variant].kwargs | options
    return row.factory(params, **kwargs, backend=backend, state_dtype=DTYPES[dtype][1])


def traced(name: str, dtype: str = "float32", variant: int = 0, **options: Any) -> list[Traced]:
    """The programs that some steps of a named optimizer need."""
    p = torch.zeros(3, dtype=DTYPES[dtype][0], requires_grad=True)
    p.grad = torch.zeros_like(p)
    with recording() as found:
        opt = made(name, [p], "cpp", dtype, variant, **options)
        opt.engine.binds = False  # there is nothing that could be run
        for _ in range(STEPS):
            opt.step()
    return found


INPUTS = ("param", "grad", "state.third")
SPELLED = [op for op in OPS.values() if isinstance(op, Op) and op.triton is not None]


def spelled(dtype: torch.dtype) -> list[Op]:
    """The elementwise ops that Triton has: a power only where double is more than is asked for."""
    return [op for op in SPELLED if op.triton_double or dtype != torch.float64]


def all_ops(dtype: torch.dtype, ops: Sequence[Op] | None = None) -> Program:
    """All of them, or these, each into its own state buffer."""
    graph = Graph()
    numbers = [graph.leaf("load", name, kind="F") for name in INPUTS]
    masks = [graph.op("gt", numbers[0], numbers[1]), graph.op("ge", numbers[1], numbers[2])]
    stores = {}
    for op in spelled(dtype) if ops is None else ops:
        pools = {"f": iter(numbers), "b": iter(masks)}
        result = graph.op(op.name, *[next(pools[t]) for t in op.types[: op.arity]])
        stores[f"state.{op.name}"] = graph.op("as_float", result) if op.result == "b" else result
    buffers = tuple((name, Buffer(dtype, "F")) for name in (*INPUTS, *stores))
    program = Program(dtype, buffers, tuple(graph.values), tuple(stores.items()), 0)
    verify(program)
    return program
