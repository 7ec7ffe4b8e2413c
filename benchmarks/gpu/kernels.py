"""How long steps take on the device, and how fast that is compared with copying memory."""

from __future__ import annotations

import gc
import random
import statistics
import time
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count

import torch

from ..cases import CASES, Pair
from ..measure import Row, _runners, agree, one_cycle
from ..providers import RULES, Runner
from .device import Device
from .jobs import Job, Partly, Skipped

WARM = 8
"""Steps before the first one that counts: RAdam changes its structure at the sixth."""
BOUND_BY_MEMORY = "4x32m"
LONGEST_RACE = 3.0
"""Seconds."""
RULES_TIMED = ("AdamW", "LAMB", "RAdam", "NAdam", "Lion", "AdaBelief", "SGD-momentum")
STORED = ("AdamW-bfloat16_sr", "AdamW-int8")
MATRICES = "48-matrices"
MODELS = ("resnet-50", "gpt2-124m", "llama-1b")
MANY = ("10000x64", "1000x1024")
OTHERS = ("torch foreach", "torch fused", "optimi", "apex")


def pairs(device: Device) -> list[Pair]:
    """Rules and cases to time."""
    ours = tuple(f"fusedopt {b}" for b in device.backends)
    one_group = tuple(f"{name} one group" for name in ours)
    names = ours + OTHERS
    out = [
        Pair(BOUND_BY_MEMORY, rule, ("eager", *names) if RULES[rule].torch is None else names)
        for rule in RULES_TIMED
    ]
    out += [Pair(case, "AdamW", names) for case in (*MODELS, *MANY)]
    out += [Pair(BOUND_BY_MEMORY, rule, ours) for rule in STORED]  # others' arithmetic is another
    out.append(Pair(BOUND_BY_MEMORY, "Lion-class", (*ours, "torch default")))
    out += [Pair(MATRICES, rule, (*ours, "torch default")) for rule in ("Adafactor", "Muon")]
    out.append(Pair("resnet-50", "Adafactor", (*ours, "transformers")))
    out.append(Pair("resnet-50", "LAMB", ("eager", *ours)))
    return [*out, Pair("groups-465", "AdamW", (*ours, *one_group, "torch fused"))]


def jobs(device: Device) -> Iterator[Job]:
    """Bandwidth first: everything is measured against it."""
    yield Job("copy", partial(bandwidth, device))
    for pair in pairs(device):
        yield Job(f"{pair.case}/{pair.rule}", partial(times, device, pair))


def rounds(device: Device, more: int = 0) -> Iterator[int]:
    """Rounds of a race: as many as the device has, or a third of that if they take long; and ``more``."""
    begin = time.perf_counter()
    for k in range(device.rounds + more):
        if k < device.rounds // 3 + more or time.perf_counter() - begin < LONGEST_RACE:
            yield k


def bandwidth(device: Device) -> list[Row]:
    """Bytes read and written per second when memory is copied on the device."""
    source = torch.randn(device.copy // 4, device=device.type)
    target = torch.empty_like(source)
    samples = [device.time(lambda: target.copy_(source), 0.001)[0] for _ in range(device.rounds + 3)][3:]
    speeds = [2 * device.copy / ms / 1e6 for ms in samples]
    return [Row.of(("copy", "copy", "gpu", "torch"), "bandwidth", "GB/s", speeds)]


def contenders(device: Device, pair: Pair) -> tuple[list[Runner], list[str]]:
    """A pair's providers, on the same tensors, after it is known that they do the same; and what is wrong with others.

    Other packages that fail are left out.
    """
    case = device.size(CASES[pair.case])
    need = case.numel * case.dtype.itemsize * (5 + 2 * len(pair.providers))
    if need > device.free_memory():
        raise Skipped(f"it needs {need / 1e9:.0f} GB, and {device.free_memory() / 1e9:.0f} are free")
    params = case.tensors(device=device.type)
    # torch's first: if one of ours is wrong, the others are not compared with that
    order = sorted(pair.providers, key=lambda name: name.startswith("fusedopt"))
    good: list[Runner] = []
    problems = []
    for name in order:
        base = [r.name for r in good if r.comparable][:1]  # made anew, since it has taken steps
        try:
            runners = list(_runners([*base, name], pair.rule, params, case.learning_rates(), print))
            found = [r for r in runners if r.name == name]
            _, failed = agree(runners, params)
        except Exception as error:
            traceback.print_exc()
            problems.append(f"{name}: {type(error).__name__}: {error}")
        else:
            good += [r for r in found if r.name not in failed]
    gc.collect()
    return good, problems


class Clock:
    """Times one runner's steps on the device; learns how long the queue must be held for the host to keep ahead."""

    def __init__(self, device: Device, runner: Runner, numbers: Iterator[int]) -> None:
        self.device, self.runner, self.numbers = device, runner, numbers
        self.samples: list[float] = []
        self.ahead = True
        for _ in range(WARM):
            seconds = self._host_seconds()
        self.hold = min(2 * seconds + 2e-4, device.longest_hold)

    def _prepare(self) -> None:
        self.runner.set(*one_cycle(next(self.numbers)))
        self.runner.prepare()

    def _host_seconds(self) -> float:
        self._prepare()
        self.device.synchronize()
        start = time.perf_counter()
        self.runner.step()
        return time.perf_counter() - start

    def _sample(self) -> tuple[float, bool]:
        self._prepare()
        return self.device.time(self.runner.step, self.hold)

    def take(self) -> None:
        """One more sample; again, with the queue held longer, where the host fell behind."""
        ms, ahead = self._sample()
        while not ahead and self.hold < self.device.longest_hold:
            self.hold = min(2 * self.hold, self.device.longest_hold)
            ms, ahead = self._sample()
        self.samples.append(ms)
        self.ahead &= ahead

    @property
    def note(self) -> str:
        return "" if self.ahead else "the queue ran dry: the host's time is part of it"


def times(device: Device, pair: Pair) -> list[Row]:
    """Device times, taken in turns; launches and bytes of fusedopt's."""
    runners, problems = contenders(device, pair)
    numbers, order = count(), random.Random(0)
    clocks = [Clock(device, runner, numbers) for runner in runners]
    for _ in rounds(device):
        for clock in order.sample(clocks, len(clocks)):
            clock.take()
    ours = next((c for c in clocks if c.runner.name == f"fusedopt {device.backends[0]}"), None)
    rows = []
    for clock in clocks:
        key = (pair.case, pair.rule, "gpu", clock.runner.name)
        ratio = _ratio(clock.samples, ours.samples) if ours else float("nan")
        rows.append(Row.of(key, "device", "ms", clock.samples, ratio=ratio, note=clock.note))
        rows += explained(key, clock.runner)
    return whole(rows, problems)


def whole(rows: list[Row], problems: Sequence[str]) -> list[Row]:
    """The rows. Raises Partly if there are problems."""
    if problems:
        raise Partly(rows, "; ".join(problems))
    return rows


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Round by round, so that what the machine did besides met both."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def explained(key: tuple[str, str, str, str], runner: Runner) -> list[Row]:
    """What fusedopt says of its own steps; the numbers of others are not known."""
    if not runner.name.startswith("fusedopt"):
        return []
    said = runner.optimizer.explain()
    return [
        Row.of(key, "launches", "count", [said.launches]),
        Row.of(key, "bytes", "bytes per element", [said.bytes_per_element]),
    ]
