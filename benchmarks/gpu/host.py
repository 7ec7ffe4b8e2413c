"""What a step costs the host, and what is left of it when steps are replayed from a CUDA graph."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count

import torch

from fusedopt import optim

from ..cases import CASES, Pair
from ..measure import Row, one_cycle
from ..providers import compiled_by
from .device import Device
from .jobs import Job
from .kernels import MANY, WARM, contenders, rounds, whole

SMALL = "small-500"
GRAPHS = (SMALL, "resnet-50")
Contender = tuple[str, Callable[[], None], Callable[[], object]]
"""A name, what comes before a step off the clock, and the step."""


def host_jobs(device: Device) -> Iterator[Job]:
    """AdamW on many tensors."""
    for case in (SMALL, "resnet-50", *MANY):
        yield Job(f"{case}/host", partial(host, device, case))


def graph_jobs(device: Device) -> Iterator[Job]:
    """Replays and plain steps in one race."""
    for case in GRAPHS:
        for backend in device.backends:
            yield Job(f"{case}/graph/{backend}", partial(graphs, device, case, backend))


def race(device: Device, case: str, mode: str, contenders: Sequence[Contender]) -> list[Row]:
    """In turns: until ``step()`` returns (host), and until the device has done it (step); the queue is empty before."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in contenders}
    order = random.Random(0)
    for turn in rounds(device, 3):
        for name, before, step in order.sample(list(contenders), len(contenders)):
            for _ in range(2):  # the first brings the contender's own memory back into the host's caches
                before()
                device.synchronize()
                start = time.perf_counter()
                step()
                returned = time.perf_counter()
                device.synchronize()
                done = time.perf_counter()
            if turn >= 3:
                samples[name].append(((returned - start) * 1e3, (done - start) * 1e3))
    return [
        Row.of((case, "AdamW", mode, name), what, "ms", [s[k] for s in taken])
        for name, taken in samples.items()
        for k, what in enumerate(("host", "step"))
    ]


def host(device: Device, case: str) -> list[Row]:
    """fusedopt against torch's own."""
    names = tuple(f"fusedopt {b}" for b in device.backends)
    pair = Pair(case, "AdamW", (*names, "torch foreach", "torch fused"))
    runners, problems = contenders(device, pair)
    numbers = count()

    def before(runner) -> None:
        runner.set(*one_cycle(next(numbers)))

    rows = race(device, case, "gpu", [(r.name, partial(before, r), r.step) for r in runners])
    return whole(rows, problems)


def graphs(device: Device, case: str, backend: str) -> list[Row]:
    """Plain steps and replays of a backend's, and of torch's fused."""
    size = device.size(CASES[case])
    entrants: list[Contender] = []
    for name, whose in ((f"fusedopt {backend}", backend), ("torch fused", None)):
        for graph in (False, True):
            opt = _adamw(size.tensors(device=device.type), whose, graph)
            with device.side_stream():
                for _ in range(WARM):
                    opt.step()
            step = device.capture(opt.step) if graph else opt.step
            entrants.append((f"{name} graph" if graph else name, partial(_change, opt, whose), step))
    return race(device, case, f"graph, {backend}", entrants)


def _adamw(params: Sequence[torch.Tensor], backend: str | None, graph: bool):
    if backend is None:
        return torch.optim.AdamW(params, lr=1e-3, fused=True, capturable=graph)
    with compiled_by(backend):
        return optim.AdamW(params, lr=1e-3, capturable=graph)


def _change(opt, backend: str | None) -> None:
    """Another rate for the next step, where it can be had: torch's graphs keep the one they were captured with."""
    if backend is not None:
        opt.param_groups[0]["lr"] *= 0.999
        if opt.param_groups[0].get("capturable"):
            opt.upload_hypers()
