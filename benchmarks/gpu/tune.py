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

from fusedopt import backends
from fusedopt.backends import chunking
from fusedopt.backends.cuda import backend as cuda
from fusedopt.backends.triton import backend as triton
from fusedopt.step import buckets

from ..cases import CASES
from ..plot import _table
from ..providers import make
from .device import Device, find
from .kernels import BOUND_BY_MEMORY, MATRICES, Clock, bandwidth

CASES_TIMED = (
    (BOUND_BY_MEMORY, "AdamW"), (BOUND_BY_MEMORY, "LAMB"), ("resnet-50", "AdamW"), ("small-500", "AdamW"),
    ("groups-465", "AdamW"), ("10000x64", "AdamW"), (MATRICES, "Adafactor"),
    ("resnet-50", "Adafactor"), (BOUND_BY_MEMORY, "AdamW-int8"),
)  # fmt: skip
CONSTANTS = {
    "threads": (cuda, "THREADS"),
    "teams": (cuda, "TEAMS"),
    "tile": (chunking, "TILE"),
    "lines": (chunking, "LINES"),
    "alone": (cuda, "ALONE"),
    "block": (triton, "BLOCK"),
    "warps": (triton, "WARPS"),
    "each": (triton, "EACH"),
    "each_whole": (triton, "EACH_WHOLE"),
    "sharing": (triton, "SHARING"),
    "joining": (triton, "JOINING"),
}
"""By the names that variants have for them. Others are constants of kernels/cuda.cu."""
PATCHES = {
    "stores streamed": ("st.global.v4.b32", "st.global.cs.v4.b32"),
    "loads streamed": (
        "return *reinterpret_cast<const Pack<E, n>*>(from);",
        "return __builtin_bit_cast(Pack<E, n>, __ldcs(reinterpret_cast<const uint4*>(from)));",
    ),
    "rows not prefetched": ("prefetch.global.L2 [%0];", "// %0"),
}
"""What is put in place of what in kernels/cuda.cu."""


@dataclass(frozen=True)
class Variant:
    """values: of constants; patches: by their names."""

    backend: str
    patches: tuple[str, ...] = ()
    values: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        return ", ".join([*(f"{name} {value}" for name, value in self.values), *self.patches]) or "as it is"


def of(backend: str, *patches: str, **values: int) -> Variant:
    """A variant."""
    return Variant(backend, patches, tuple(values.items()))


VARIANTS = (
    of("cuda"),
    of("cuda", alone=0),
    of("cuda", alone=sys.maxsize),
    of("cuda", tile=8192),
    of("cuda", tile=8192, alone=sys.maxsize),
    of("cuda", tile=2048, threads=256),
    of("cuda", tile=512, threads=64),
    of("cuda", teams=128),
    of("cuda", lines=2048),
    of("cuda", lines=1 << 15),
    *(of("cuda", patch) for patch in PATCHES),
    of("triton"),
    of("triton", tile=8192),
    of("triton", lines=2048),
    of("triton", block=512),
    of("triton", block=2048, warps=8),
    of("triton", each=8),
    of("triton", each_whole=4),
    of("triton", sharing=256),
)


def source(variant: Variant, text: str) -> str:
    """The skeleton with the variant's constants."""
    for name, value in variant.values:
        if name not in CONSTANTS:
            text, found = re.subn(rf"(constexpr int {name} = )\d+;", rf"\g<1>{value};", text)
            if found != 1:
                raise ValueError(f"kernels/cuda.cu has no constant {name!r}")
    for patch in variant.patches:
        old, new = PATCHES[patch]
        if text.count(old) != 1:
            raise ValueError(f"kernels/cuda.cu has not once what {patch!r} replaces: {old}")
        text = text.replace(old, new)
    return text


@contextmanager
def applied(variant: Variant) -> Iterator[None]:
    """Kernels that are compiled, and launches that are prepared, within the block are the variant's."""
    skeleton = cuda.skeleton
    _forget()
    try:
        cuda.skeleton = lambda name: source(variant, skeleton(name))  # type: ignore[assignment]
        with with_constants(variant):
            yield
    finally:
        cuda.skeleton = skeleton
        _forget()


@contextmanager
def with_constants(variant: Variant) -> Iterator[None]:
    """Within the block constants are the variant's. Triton's are asked for in each step."""
    chosen = {CONSTANTS[name]: value for name, value in variant.values if name in CONSTANTS}
    before = {place: getattr(*place) for place in chosen}
    try:
        for place, value in chosen.items():
            setattr(*place, value)
        yield
    finally:
        for place, value in before.items():
            setattr(*place, value)


def _forget() -> None:
    """Kernels that were compiled, also those of steps that other optimizers traced, and how tensors were cut."""
    buckets.known_traces.cache_clear()
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
        for variant, clock in order.sample(list(clocks.items()), len(clocks)):
            with with_constants(variant):
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
