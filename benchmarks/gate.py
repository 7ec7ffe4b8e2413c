"""Whether a step has become slower: ``python -m benchmarks.gate`` prints it, tests/benchmarks/test_gate.py is red then.

A time means nothing on a machine that does other things as well. So each of fusedopt's times is taken beside those of
others that do the same work (torch's fused kernels, the bare C loop, the compiler alone), all in turns in one process
on one thread, and the shortest of many counts: what else the machine does can only make times longer, and leaves some
of them alone. What is judged is fusedopt's shortest over another's. A gate is closed if that is above the limit beside
*each* of the others, in each of several attempts; what is slower stays slower, and noise does not.
"""

from __future__ import annotations

import itertools
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import fusedopt
from fusedopt.compile.toolchain import FLAGS, compiler, cpu_features

from . import providers
from .baseline import SOURCE
from .providers import Runner

Timed = Callable[[], float]
"""Does its work once, and returns the seconds of the part that counts."""
OURS = "fusedopt"
HOME = "Intel(R) Xeon(R) Processor"
"""The processor that the usual ratios are of, with g++ 12.2, torch 2.13 and Python 3.11."""
MARGIN = 1.4 if cpu_features().model == HOME else 2.5
"""How much more than usual is too much. Ratios move by a tenth from run to run; another processor has others."""


@dataclass(frozen=True)
class Gate:
    """What is timed, and by name of the others the usual ratio of fusedopt's time to theirs.

    Another processor or torch moves them, which is why one of them is enough to be let through.
    """

    name: str
    make: Callable[[], dict[str, Timed]]
    usual: dict[str, float]
    seconds: float = 0.6
    least: int = 40

    def attempt(self) -> dict[str, float]:
        """fusedopt's shortest time over each other's, in usual ratios: 1 is as usual, 2 twice as slow."""
        timed, best = self.make(), dict[str, float]()
        stop = time.perf_counter() + self.seconds
        for turn in itertools.count():
            if turn >= self.least and time.perf_counter() > stop:
                break
            for name, once in timed.items():
                best[name] = min(best.get(name, math.inf), once())
        return {name: best[OURS] / best[name] / usual for name, usual in self.usual.items()}


@dataclass(frozen=True)
class Verdict:
    """How slow a step is, in usual ratios, by whom it is compared with; the best of the attempts."""

    name: str
    slower: dict[str, float]

    @property
    def open(self) -> bool:
        return min(self.slower.values()) <= MARGIN

    def __str__(self) -> str:
        said = ", ".join(f"{ratio:.2f} of the usual beside {name}" for name, ratio in self.slower.items())
        return f"{self.name}: {said}: {'within' if self.open else 'above'} {MARGIN}"


def judge(gate: Gate, attempts: int = 3) -> Verdict:
    """Try until it is let through, or as often as that."""
    found = []
    with one_thread():
        for _ in range(attempts):
            found.append(Verdict(gate.name, gate.attempt()))
            if found[-1].open:
                break
    return min(found, key=lambda verdict: min(verdict.slower.values()))


@contextmanager
def one_thread() -> Iterator[None]:
    """Another thread would wait for a core that is not there."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --
# What is timed


def tensors(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Parameters with gradients, always the same."""
    gen = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=gen)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=gen)
    return params


def timed(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    work()
    return clock() - start


def processor() -> float:
    """Seconds that processors worked for this process and for those it has waited for, such as the compiler."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def warm(shapes: Sequence[tuple[int, ...]], **rules: str) -> Callable[[], dict[str, Timed]]:
    """Steps after others, by provider; ``rules``: which rule a provider has, if that is not AdamW."""

    def make() -> dict[str, Timed]:
        params = tensors(shapes)
        names = (OURS, "torch fused", "bare loop")
        runners = {n: providers.make(n, rules.get(n, "AdamW"), params) for n in names}
        for runner in runners.values():
            runner(1.0), runner(1.0), runner(1.0)
        counts = itertools.count()

        def once(runner: Runner) -> float:
            runner.set(1 + next(counts) % 7 / 10, None)
            runner.prepare()
            return timed(runner.step)

        return {name: lambda runner=runner: once(runner) for name, runner in runners.items()}  # type: ignore[misc]

    return make


def first_steps() -> dict[str, Timed]:
    """First steps of optimizers whose kernels are there already: looking at parameters, making state, binding."""
    params = tensors([(64,)] * 200)

    def first(make: Callable[..., torch.optim.Optimizer], **flags: bool) -> Timed:
        return lambda: timed(make(params, lr=1e-3, **flags).step)

    return {
        OURS: first(fusedopt.optim.AdamW),
        "torch fused": first(torch.optim.AdamW, fused=True),
        "torch foreach": first(torch.optim.AdamW, foreach=True),
    }


def _sine(p, lr, **kwargs):
    p.data.sub_(p.grad.sin(), alpha=lr)


def _root(p, lr, **kwargs):
    p.data.sub_((p.grad.abs() + 1).sqrt(), alpha=lr)


def _square(p, lr, **kwargs):
    p.data.sub_(p.grad * p.grad, alpha=lr)


def _decay(p, lr, **kwargs):
    p.data.mul_(1 - lr)


_LISTS = itertools.product((_sine, _root, _square, _decay), repeat=6)
"""Callbacks that nobody has compiled: every optimizer gets another list."""


def compiling() -> dict[str, Timed]:
    """First steps that have a kernel compiled, beside the compiler's runs over the bare loop and over nothing."""
    params = tensors([(64,)] * 4)
    tool = compiler()

    def first() -> float:
        with tempfile.TemporaryDirectory() as folder, variable("FUSEDOPT_CACHE_DIR", folder):
            opt = fusedopt.Optimizer(params, list(next(_LISTS)), lr=1e-3)
            seconds = timed(opt.step, processor)
            assert len(opt.explain().compiled) == 1, "nothing was compiled"
            return seconds

    def alone(source: str, text: str | None = None) -> float:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                tool.path,
                *tool.command[1:],
                *FLAGS,
                "-fopenmp",
                "-x",
                "c++",
                source,
                "-o",
                f"{folder}/a.so",
            ]
            work = partial(subprocess.run, command, input=text, text=True, check=True, capture_output=True)
            return timed(work, processor)

    bare, nothing = partial(alone, str(SOURCE)), partial(alone, "-", "int nothing;")
    return {OURS: first, "the compiler over the bare loop": bare, "over nothing": nothing}


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """An environment variable that has this value in the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ.update({} if before is None else {name: before})


_IN_CACHE = ((1 << 15,),) * 8
GATES = (
    Gate("host: 500 small tensors", warm(((64,),) * 500), {"torch fused": 0.094, "bare loop": 4.4}),
    Gate("kernel: AdamW", warm(_IN_CACHE), {"torch fused": 0.58, "bare loop": 1.38}),
    Gate("kernel: LAMB", warm(_IN_CACHE, fusedopt="LAMB"), {"torch fused": 1.20, "bare loop": 2.85}),
    Gate("first step, compiled before", first_steps, {"torch fused": 1.2, "torch foreach": 0.61}),
    Gate(
        "first step, compiling",
        compiling,
        {"the compiler over the bare loop": 0.3, "over nothing": 2.2},
        least=5,
    ),
)


def main() -> int:
    verdicts = []
    for gate in GATES:
        verdicts.append(judge(gate))
        print(verdicts[-1], flush=True)
    return 0 if all(verdict.open for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
