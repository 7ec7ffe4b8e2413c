"""How it is measured: everybody in turns, in one run; what comes out is `Row`s.

``python -m benchmarks.measure CASE RULE PROVIDER`` is the part that needs a fresh process: it prints what a first step
took and how much memory steps needed, as JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedopt
from fusedopt.extension import leaf

from . import cases, providers
from .cases import CASES, Pair
from .providers import Runner
from .timing import Stopwatch

ROOT = Path(__file__).parents[1]

Say = Callable[[str], object]


@dataclass(frozen=True)
class Effort:
    """How long to measure. A turn is a few steps of one provider; in a round everybody has one turn.

    seconds: per pair, within the limits for rounds, and twice that with training passes between steps; turn: seconds
    that a turn aims at; steps: at most so many in it; repeats: fresh processes per first step; cycle: steps of the
    one-cycle schedule.
    """

    seconds: float = 8.0
    rounds: tuple[int, int] = (7, 150)
    turn: float = 0.02
    steps: int = 40
    repeats: int = 3
    cycle: int = 1000


FULL = Effort()
QUICK = Effort(seconds=0.5, rounds=(2, 30), steps=20, repeats=1, cycle=100)


@dataclass(frozen=True)
class Row:
    """One line of the CSV, without the columns that say where and when.

    what: ``step``, ``host`` (a step without its launches), ``first step``, ``compile`` (ms); ``peak growth``,
    ``beyond state`` (bytes); ``kernels``, ``launches`` (counts). ratio: p50 over rounds of this provider's time to
    fusedopt's in the same round; NaN where there is none.
    """

    case: str
    rule: str
    mode: str
    provider: str
    what: str
    unit: str
    p20: float
    p50: float
    p80: float
    rounds: int
    ratio: float = math.nan
    note: str = ""

    @classmethod
    def of(cls, key: Sequence[str], what: str, unit: str, samples: Sequence[float], **more: Any) -> Row:
        """A row of samples. ``key``: case, rule, mode, provider."""
        low, middle, high = (quantile(samples, q) for q in (20, 50, 80))
        return cls(*key, what, unit, low, middle, high, **{"rounds": len(samples), **more})


def quantile(samples: Sequence[float], percent: int) -> float:
    """A percentile, interpolated."""
    if len(samples) == 1:
        return samples[0]
    return statistics.quantiles(samples, n=100, method="inclusive")[percent - 1]


# --
# Everybody does the same


class Disagreement(AssertionError):
    """A provider that does something else than the others: its time means nothing."""


STEPS_CHECKED = 3


@torch.no_grad()
def agree(
    runners: Sequence[Runner], params: Sequence[Tensor], steps: int = STEPS_CHECKED
) -> tuple[dict[str, float], dict[str, Exception]]:
    """Run every provider for a few steps from the same start and compare where they arrive.

    Returns the seconds of first steps, and why optional providers failed. Raises Disagreement if a parameter is off by
    more than a thousandth of the largest update, plus rounding. In 16 bits that is as large as an update; there, and
    where state is kept in fewer bits, it is half of the norm of all updates.
    """
    start, grads = [p.clone() for p in params], [p.grad for p in params]
    first, expected = "", None
    seconds: dict[str, float] = {}
    failed: dict[str, Exception] = {}
    for runner in runners:
        try:
            seconds[runner.name] = _first_steps(runner, grads, steps)
            if runner.comparable and expected is not None:
                _compare(runner.name, first, params, expected, start, runner.near)
        except Exception as error:
            if runner.name not in providers.OPTIONAL:
                raise
            failed[runner.name] = error
        else:
            if runner.comparable and expected is None:
                first, expected = runner.name, [p.clone() for p in params]
        for p, s, g in zip(params, start, grads, strict=True):
            p.copy_(s)
            p.grad = g
    return seconds, failed


def _first_steps(runner: Runner, grads: Sequence[Tensor | None], steps: int) -> float:
    """Take the steps to compare; seconds of the first one.

    Each step has other gradients: where they stay the same, Adam's momentum makes no difference.
    """
    before = time.perf_counter()
    runner(1.0)
    seconds = time.perf_counter() - before
    for step in range(1, steps):
        torch._foreach_mul_(grads, -0.5)
        runner(1.0 - 0.2 * (step % STEPS_CHECKED))
    torch._foreach_mul_(grads, (-2.0) ** (steps - 1))  # a power of two: just as they were
    return seconds


def _compare(
    name: str, other: str, found: Sequence, expected: Sequence, start: Sequence, near: bool = False
) -> None:
    if near or expected[0].itemsize == 2:
        update, off = _norm(expected, start, 2), _norm(found, expected, 2)
        allowed = update / 2
    else:
        update, off = _norm(expected, start, math.inf), _norm(found, expected, math.inf)
        size = torch.stack(torch._foreach_norm(expected, math.inf)).max().item()
        allowed = 1e-3 * update + 4 * torch.finfo(expected[0].dtype).eps * size
    if not off <= allowed or update == 0:
        raise Disagreement(
            f"{name} is {off:.2g} off from {other}; {allowed:.2g} is rounding, updates are {update:.2g}"
        )


def _norm(a: Sequence, b: Sequence, order: float) -> float:
    """The norm of the difference of two lists of tensors, as of one vector: of tens of thousands in a few launches."""
    norms = torch.stack(torch._foreach_norm(torch._foreach_sub(list(a), list(b)), order)).double()
    return torch.linalg.vector_norm(norms, order).item()


# --
# In turns


class LaunchClock:
    """Seconds that fusedopt spent in kernels: the rest of its step is the host's."""

    def __init__(self) -> None:
        self.before = self._now()

    @staticmethod
    def _now() -> tuple[int, float]:
        return leaf.native.launched() if leaf.native else (0, 0.0)

    def take(self) -> float | None:
        """The seconds since the last time; None if nothing was launched."""
        (stages, seconds), (last, until) = self._now(), self.before
        self.before = stages, seconds
        return seconds - until if stages > last else None


@dataclass
class Record:
    """One provider's samples in seconds: per round a turn of steps, and what of them was the host's."""

    turns: list[list[float]] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    @property
    def steps(self) -> list[float]:
        return [s for turn in self.turns for s in turn]


def one_cycle(step: int) -> tuple[float, float]:
    """Factor of the learning rate and momentum, both other than the step before."""
    phase = step % 200 / 200
    return 0.55 - 0.45 * math.cos(2 * math.pi * phase), 0.9 + 0.05 * math.cos(2 * math.pi * phase)


class Race:
    """Providers that take turns on the same tensors.

    ``between`` is run before every step (training). Without it a turn is some steps off the clock, which bring the
    provider's own memory back into the caches, and four times as many on it.
    """

    def __init__(
        self,
        runners: Sequence[Runner],
        effort: Effort,
        between: Callable[[], None] | None = None,
    ) -> None:
        self.runners, self.effort, self.between = list(runners), effort, between
        self.records = {r.name: Record() for r in runners}
        self.count = 0
        self.random = random.Random(0)
        self.clock = LaunchClock()

    def run(self) -> dict[str, Record]:
        """Rounds until the time is up, each in another order."""
        fewest, most = self.effort.rounds
        lengths = {r.name: self._length(r) for r in self.runners}
        seconds = self.effort.seconds * (1 if self.between is None else 2)
        stop = time.perf_counter() + seconds
        for turn in range(most):
            if turn >= fewest and time.perf_counter() > stop:
                break
            self._round(lengths)
        return self.records

    def _round(self, lengths: dict[str, int]) -> None:
        self.random.shuffle(self.runners)
        for runner in self.runners:
            record = self.records[runner.name]
            for _ in range(math.ceil(lengths[runner.name] / 4) if lengths[runner.name] > 1 else 0):
                self._step(runner)
            turn = [self._step(runner, record) for _ in range(lengths[runner.name])]
            record.turns.append(turn)

    def _length(self, runner: Runner) -> int:
        """Steps in a turn: one where each is preceded by a pass or so slow that no cache lasts from one to the next."""
        self._step(runner)
        seconds = self._step(runner)
        if self.between is not None or seconds > self.effort.turn:
            return 1
        return max(2, min(self.effort.steps, int(self.effort.turn / seconds)))

    def _step(self, runner: Runner, record: Record | None = None) -> float:
        if self.between is not None:
            self.between()
        runner.set(*one_cycle(self.count))
        runner.prepare()
        self.count += 1
        self.clock.take()
        watch = Stopwatch()
        with watch.time():
            runner.step()
        launched = self.clock.take()
        if record is not None and launched is not None:
            record.host.append(watch.samples[0] - launched)
        return watch.samples[0]


def measure(pair: Pair, effort: Effort, compiled: bool = False, say: Say = print) -> list[Row]:
    """Everything about one pair."""
    case = CASES[pair.case]
    names = [n for n in pair.providers if compiled or n not in providers.SLOW_TO_START]
    if not _fits(case, len(names)):
        say(f"  left out: it needs {_need(case, len(names)) / 1e9:.0f} GB of memory")
        return []
    training = cases.Training() if pair.mode == "training" else None
    params = training.tensors() if training else case.tensors()
    runners = list(_runners(names, pair.rule, params, case.learning_rates(), say))
    seconds, failed = agree(runners, params)
    for name, error in failed.items():
        say(_without(name, error))
    runners = [r for r in runners if r.name not in failed]
    gc.collect()
    records = Race(runners, effort, training and training.run).run()
    return step_rows(pair, runners, records, seconds)


def _runners(
    names: Sequence[str], rule: str, params: Sequence[Tensor], rates: Sequence[float], say: Say
) -> Iterator[Runner]:
    for name in names:
        try:
            yield providers.make(name, rule, params, rates)
        except providers.Unavailable:
            pass
        except Exception as error:
            if name not in providers.OPTIONAL:
                raise
            say(_without(name, error))


def _without(name: str, error: Exception) -> str:
    return f"  without {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def step_rows(
    pair: Pair, runners: Sequence[Runner], records: dict[str, Record], seconds: dict[str, float]
) -> list[Row]:
    """Steps, the host's part of them and launches, by provider."""
    rows = []
    ours = records.get("fusedopt")
    for runner in runners:
        key, record = (pair.case, pair.rule, pair.mode, runner.name), records[runner.name]
        ratios = _ratios(record, ours) if ours else []
        ratio = statistics.median(ratios) if ratios else math.nan
        ms = [s * 1e3 for s in record.steps]
        rows.append(Row.of(key, "step", "ms", ms, rounds=len(record.turns), ratio=ratio, note=runner.package))
        if record.host:
            rows.append(Row.of(key, "host", "ms", [s * 1e3 for s in record.host], rounds=len(record.turns)))
        if isinstance(runner.optimizer, fusedopt.Optimizer):
            rows.append(Row.of(key, "launches", "count", [runner.optimizer.explain().launches]))
        if runner.name in providers.SLOW_TO_START:
            rows.append(Row.of(key, "compile", "ms", [seconds[runner.name] * 1e3]))
    return rows


def _ratios(theirs: Record, ours: Record) -> list[float]:
    """Round by round, so that what the machine did besides met both."""
    pairs = zip(theirs.turns, ours.turns, strict=True)
    return [statistics.median(a) / statistics.median(b) for a, b in pairs]


def _need(case: cases.Case, count: int) -> int:
    """Bytes: parameters, gradients, two copies of the parameters to compare, states, temporaries of the largest."""
    return 4 * case.numel * (2 + 2 + 2 * count + 2)


def _fits(case: cases.Case, count: int) -> bool:
    return _need(case, count) < available_memory()


def available_memory() -> int:
    """Bytes that could be used now."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


# --
# A process of its own: the first step, and memory


STATE = "state alone"
"""In place of a provider: making two zeroed buffers per parameter, which is where every Adam's first step begins."""


def probe(case: str, rule: str, provider: str) -> dict[str, float]:
    """Seconds of the first step, and the memory that this step and later ones needed, in bytes."""
    params = CASES[case].tensors()
    if provider == STATE:
        start = time.perf_counter()
        kept = [torch.zeros_like(p) for p in params for _ in range(2)]
        return {"first": time.perf_counter() - start, "buffers": len(kept)}
    runner = providers.make(provider, rule, params)
    gc.collect()
    before = resident()
    start = time.perf_counter()
    runner.step()
    seconds = time.perf_counter() - start
    for step in range(3):
        runner(*one_cycle(step))
    gc.collect()
    out = {"first": seconds, "beyond state": resident() - before - state_bytes(runner.optimizer)}
    out["peak growth"] = peak_growth(lambda: runner(*one_cycle(4)))
    tracemalloc.start()
    runner(*one_cycle(5))
    tracemalloc.reset_peak()
    held = tracemalloc.get_traced_memory()[0]
    runner(*one_cycle(6))
    out["python peak growth"] = tracemalloc.get_traced_memory()[1] - held
    return out


def state_bytes(opt: Any) -> int:
    """Bytes in the tensors of an optimizer's state."""
    tensors = [v for state in opt.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def resident() -> int:
    """Bytes of memory this process occupies, without what malloc only keeps for later."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # only glibc has it
        trim(0)
    return _status("VmRSS")


def peak_growth(work: Callable[[], Any]) -> int:
    """How much more memory than before the work occupied at its peak."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, f"/proc/self/status has no {key}"
    return int(found[1]) * 1024


def in_new_process(case: str, rule: str, provider: str, cache: Path) -> dict[str, float]:
    """`probe` in a fresh Python, with this compile cache."""
    command = [sys.executable, "-m", "benchmarks.measure", case, rule, provider]
    environment = {**os.environ, "FUSEDOPT_CACHE_DIR": str(cache)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def first_steps(case: str, rule: str, effort: Effort) -> list[Row]:
    """The first step of a process, with an empty compile cache, with a warm one, and without fusedopt."""
    samples: dict[tuple[str, str], list[float]] = {}
    for _ in range(effort.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("empty cache", "warm cache"):
                found = in_new_process(case, rule, "fusedopt", Path(folder))
                samples.setdefault((cache, "fusedopt"), []).append(found["first"] * 1e3)
            for other in ("torch fused" if providers.RULES[rule].fused else "eager", STATE):
                found = in_new_process(case, rule, other, Path(folder))
                samples.setdefault(("no cache", other), []).append(found["first"] * 1e3)
    return [Row.of((case, rule, mode, name), "first step", "ms", s) for (mode, name), s in samples.items()]


def memory(case: str, rule: str) -> list[Row]:
    """Memory that a warm step needs for a while, and that the first ones took for good besides the state."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("fusedopt", "torch foreach" if providers.RULES[rule].torch else "eager"):
            found = in_new_process(case, rule, name, Path(folder))
            for what in ("peak growth", "python peak growth", "beyond state"):
                rows.append(Row.of((case, rule, "memory", name), what, "bytes", [found[what]]))
    return rows


# --
# How many kernels a schedule needs


@dataclass(frozen=True)
class Schedule:
    """A rule under a one-cycle schedule of learning rate and momentum; how many kernels it implies, and why."""

    name: str
    make: Callable[[list[Tensor]], fusedopt.Optimizer]
    kernels: int
    why: str


_ONE = "nothing but numbers changes"
_SLOW = "the first step stores the slow weights, every k-th moves to them"
SCHEDULES = (
    Schedule("SGD", partial(fusedopt.SGD, lr=0.1, mom=0.9), 1, _ONE),
    Schedule("RMSProp", partial(fusedopt.RMSProp, lr=1e-3, mom=0.9), 1, _ONE),
    Schedule("Adam", partial(fusedopt.Adam, lr=1e-3), 1, _ONE),
    Schedule("LAMB", partial(fusedopt.Lamb, lr=1e-3), 1, _ONE),
    Schedule("RAdam", partial(fusedopt.RAdam, lr=1e-3), 2, "at first the step is not adaptive"),
    Schedule("Lookahead", lambda p: fusedopt.Lookahead(fusedopt.SGD(p, lr=0.1, mom=0.9)), 3, _SLOW),
    Schedule("ranger", partial(fusedopt.ranger, lr=1e-3), 4, f"{_SLOW}; at first the step is not adaptive"),
)


def kernels(schedule: Schedule, effort: Effort) -> list[Row]:
    """Kernels compiled after one step, and after a whole cycle."""
    opt = schedule.make(CASES["tiny"].tensors())
    counts = {}
    for step in range(effort.cycle):
        factor, momentum = one_cycle(step * 200 // effort.cycle)
        opt.set_hypers(lr=1e-3 * factor, mom=momentum)
        opt.step()
        if step in (0, effort.cycle - 1):
            counts["first step" if step == 0 else "one-cycle"] = opt.explain().compiled
    note = "; ".join(f"{k.name}: {k.why}" for k in counts["one-cycle"])
    return [
        Row.of(("tiny", schedule.name, mode, "fusedopt"), "kernels", "count", [len(found)], note=note)
        for mode, found in counts.items()
    ]


if __name__ == "__main__":
    print(json.dumps(probe(*sys.argv[1:4])))
