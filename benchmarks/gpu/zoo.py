"""Every named optimizer on every backend: against the reference, against the other backend, and against itself."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterator
from functools import partial

import torch

from fusedopt.table import TABLE, Row, Variant

from .compare import Run, close, noise, run, same
from .device import Device
from .jobs import Job

SIZES = (0, 1, 3, 7, 127, 128, 129, 4095, 4097, 65_541, 300_007)
"""Elements per tensor: none, less than an access, tails of every kind, more than a chunk."""
STEPS = 7
"""RAdam's and Lookahead's structure changes at the sixth."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def jobs(device: Device, share: int = 0, shares: int = 1) -> Iterator[Job]:
    """One per optimizer, variant and dtype; in 16 bits the first variant. ``share`` of ``shares`` processes' work."""
    cases = [
        (row, variant, dtype)
        for row in TABLE
        for k, variant in enumerate(row.variants)
        for dtype in DTYPES
        if k == 0 or dtype == torch.float32
    ]
    for row, variant, dtype in device.some(cases, 3)[share::shares]:
        name = f"{row.face}.{row.name}({variant.id})/{str(dtype).removeprefix('torch.')}"
        yield Job(name, partial(check, device, row, variant, dtype))


def check(device: Device, row: Row, variant: Variant, dtype: torch.dtype) -> str:
    """Our error is at most twice eager torch's; steps taken again, and other backends', have the same bits.

    Eager torch runs on the device and on the CPU: it contracts on one and not on the other. Backends are not compared
    where an optimizer needs a number per tensor: they sum in other orders.
    """
    shapes = [(n,) for n in device.some(SIZES, 9)] + [(5, 3, 3, 3)]
    start = noise(shapes, 0, device.type, dtype)
    gradients = [noise(shapes, 1 + step, device.type, dtype) for step in range(STEPS)]

    def steps(backend: str, on: str = device.type, by: torch.dtype = dtype) -> Run:
        def make(params: list[torch.Tensor]) -> object:
            return row.factory(params, **variant.kwargs)

        ours = backend != "reference"
        return run(make, backend, start, gradients, device=on, dtype=by, state=variant.state, misaligned=ours)

    truth = steps("reference", by=torch.float64)
    eager = steps("reference"), steps("reference", "cpu")
    found: dict[str, list[torch.Tensor]] = {}
    said, problems = [], []
    for backend in device.backends:
        try:
            tensors = steps(backend).tensors
            same("run again", steps(backend).tensors, tensors)
            worst = close("against float64", tensors, truth.tensors, *(e.tensors for e in eager))
        except Exception as error:  # the other backend is looked at all the same
            traceback.print_exc()
            problems.append(f"{backend}: {type(error).__name__}: {error}")
        else:
            found[backend] = tensors
            said.append(f"{backend} {worst:.2g} ulp")
    if problems:
        raise AssertionError("; ".join(problems))
    if not row.reductions:
        for a, b in itertools.combinations(device.backends, 2):
            same(f"{a} and {b}", found[a], found[b])
    return ", ".join(said)
