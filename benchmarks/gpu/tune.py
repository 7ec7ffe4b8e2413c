"""What kernels are made with, varied: ``python -m benchmarks.gpu.tune``, in about a minute on a GPU.

Every variant steps the same tensors, in turns, so what else the machine does meets all of them. What was found so far
is in docs/gpu.md; that a variant is faster says nothing of whether it is right, which is what ``make gpu`` is for.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from fusedopt import backends
from fusedopt.backends import chunking
from fusedopt.backends.cuda import backend as cuda
from fusedopt.backends.triton import backend as triton

from ..cases import CASES
from ..plot import _table
from ..providers import make
from .device import Device, find
from .kernels import BOUND_BY_MEMORY, Clock, bandwidth

CASES_TIMED = (
    (BOUND_BY_MEMORY, "AdamW"), (BOUND_BY_MEMORY, "LAMB"), ("resnet-50", "AdamW"), ("small-500", "AdamW"),
    ("groups-465", "AdamW"), ("10000x64", "AdamW"),
)  # fmt: skip
CONSTANTS = {
    "threads": (cuda, "THREADS"),
    "tile": (chunking, "TILE"),
    "block": (triton, "BLOCK"),
    "warps": (triton, "WARPS"),
}
"""By the names that variants have for them. Others are constants of kernels/cuda.cu."""


@dataclass(frozen=True)
class Variant:
    """values: of constants; blocks: at most so many per multiprocessor, where as many are launched as run at a time."""

    backend: str
    values: tuple[tuple[str, int], ...] = ()
    blocks: int = 0

    @property
    def name(self) -> str:
        words = [f"{name} {value}" for name, value in self.values]
        return ", ".join([*words, *[f"blocks {self.blocks}"] * bool(self.blocks)]) or "as it is"


def of(backend: str, blocks: int = 0, **values: int) -> Variant:
    """A variant."""
    return Variant(backend, tuple(values.items()), blocks)


VARIANTS = (
    of("cuda"),
    *(of("cuda", blocks) for blocks in (2, 3, 4, 5, 6, 7, 8)),
    *(of("cuda", blocks, in_flight=16) for blocks in (2, 3, 4, 5)),
    of("cuda", 5, tile=4096),
    of("cuda", 5, tile=16384),
    of("cuda", 2, threads=256),
    of("cuda", 3, threads=256),
    of("cuda", 8, threads=64),
    of("triton"),
    of("triton", block=512, warps=2),
)


def source(variant: Variant, text: str) -> str:
    """The skeleton with the variant's constants."""
    for name, value in variant.values:
        if name not in CONSTANTS:
            text, found = re.subn(rf"(constexpr int {name} = )\d+;", rf"\g<1>{value};", text)
            if found != 1:
                raise ValueError(f"kernels/cuda.cu has no constant {name!r}")
    return text


@contextmanager
def applied(variant: Variant) -> Iterator[None]:
    """Kernels that are compiled, and launches that are prepared, within the block are the variant's."""
    before: list[tuple[Any, str, Any]] = [
        (cuda, "skeleton", cuda.skeleton),
        (cuda.Cuda, "_load", cuda.Cuda._load),
    ]
    before += [
        (*CONSTANTS[name], getattr(*CONSTANTS[name])) for name, _ in variant.values if name in CONSTANTS
    ]
    skeleton, load = cuda.skeleton, cuda.Cuda._load

    def at_most(*given: Any) -> Any:
        module, functions = load(*given)
        most = variant.blocks * torch.cuda.get_device_properties().multi_processor_count
        return module, {name: (address, min(n, most)) for name, (address, n) in functions.items()}

    _forget()
    try:
        cuda.skeleton = lambda name: source(variant, skeleton(name))  # type: ignore[assignment]
        if variant.blocks:
            cuda.Cuda._load = at_most  # type: ignore[method-assign]
        for name, value in variant.values:
            if name in CONSTANTS:
                setattr(*CONSTANTS[name], value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        _forget()


def _forget() -> None:
    """Kernels that were compiled, and how tensors were cut."""
    for backend in backends.made.values():
        backend._kernels.clear()  # type: ignore[attr-defined]
    for cached in (chunking.layout, chunking.blocks, chunking.splits):
        cached.cache_clear()


def race(device: Device, case: str, rule: str, variants: Sequence[Variant]) -> dict[Variant, float]:
    """Milliseconds on the device, medians; a variant that does not work is told, and left out."""
    sized = device.size(CASES[case])
    params, numbers = sized.tensors(device=device.type), count()
    clocks: dict[Variant, Clock] = {}
    for variant in variants:
        try:
            with applied(variant):
                runner = make(f"fusedopt {variant.backend}", rule, params, sized.learning_rates())
                clocks[variant] = Clock(device, runner, numbers)
        except Exception as error:
            print(f"{variant.backend}, {variant.name}: {case}, {rule}: {type(error).__name__}: {error}"[:500])
    order = random.Random(0)
    for _ in range(max(device.rounds // 2, 2)):
        for clock in order.sample(list(clocks.values()), len(clocks)):
            clock.take()
    return {variant: statistics.median(clock.samples) for variant, clock in clocks.items()}


def table(device: Device, variants: Sequence[Variant] = VARIANTS) -> str:
    """Microseconds of every variant, and in parts of the first one's of its backend."""
    found = {}
    for case, rule in CASES_TIMED:
        found[case, rule] = race(device, case, rule, variants)
        device.release()
    rows = []
    for variant in variants:
        base = next(v for v in variants if v.backend == variant.backend)
        cells = [
            f"{times[variant] * 1e3:.1f} ({times[variant] / times[base]:.3f})" if variant in times else ""
            for times in found.values()
        ]
        rows.append([f"{variant.backend}, {variant.name}", *cells])
    return _table(["variant", *(f"{case}, {rule}" for case, rule in found)], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tune", description=__doc__)
    parser.parse_args(arguments)
    device = find(False)
    print(f"{device.name}; copying: {bandwidth(device)[0].p50:.0f} GB/s\n\n{table(device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
