"""Check and measure everything on an NVIDIA GPU: ``python -m benchmarks.gpu --help``. See benchmarks/README.md."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from . import checks, environment, fresh, host, kernels, scenarios
from .device import Device, find
from .jobs import Job, Outcome, Part, do

FOLDER = Path(__file__).parents[1] / "results"
SHARES = 10
"""Processes that share the tests: most of their time is the host's, and compilers'."""
REPORTING = 15
"""Seconds kept for the report."""


@dataclass(frozen=True)
class Plan:
    """A part: what its process does, giving its exit status, and its limit in seconds.

    ``beside``: it may run beside others, since nothing is timed.
    """

    do: Callable[[Device, Path], int]
    seconds: float
    beside: bool = False


def jobs(*parts: Callable[[Device], Iterable[Job]]) -> Callable[[Device, Path], int]:
    """What a process does that works through these parts' jobs."""
    return lambda device, log: do(chain.from_iterable(part(device) for part in parts), device, log)


def plans(rehearse: bool) -> dict[str, Plan]:
    """All parts in order: what everything else needs, checks side by side, then measurements one after the other.

    A rehearsal has all jobs in one process but the first: starting processes is most of what it would do.
    """
    shares = 1 if rehearse else min(SHARES, max(1, (os.cpu_count() or 2) - 4))
    parts = {"environment": Plan(jobs(environment.jobs), 60)}
    for k in range(shares):
        parts[f"tests-{k + 1}"] = Plan(partial(checks.do, share=k, shares=shares), 300, beside=True)
    alone = {
        "kernels": (kernels.jobs, 120),
        "host": (host.host_jobs, 45),
        "graphs": (host.graph_jobs, 30),
        "first-steps": (fresh.first_jobs, 60),
    }
    tools = {t: partial(fresh.sanitizer_jobs, tool=t) for t in (fresh.TOOLS[:1] if rehearse else fresh.TOOLS)}
    beside = {"scenarios": scenarios.jobs, **tools}
    if rehearse:
        every = (*beside.values(), *(part for part, _ in alone.values()))
        return parts | {"rehearsal": Plan(jobs(*every), 300)}
    parts |= {name: Plan(jobs(part), 150, beside=True) for name, part in beside.items()}
    return parts | {name: Plan(jobs(part), seconds) for name, (part, seconds) in alone.items()}


def _part(name: str) -> str:
    """What a person calls it: shares of one part are one."""
    return re.sub(r"-\d+$", "", name)


class WholeRun:
    """A whole run: parts in turn, each within its limit and all within ``given.seconds``."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        from .report import Report  # and matplotlib with it, which the parts' processes do without

        self.given, self.folder = given, folder
        self.begun = time.monotonic()
        self.report = Report(given.rehearse, given.commit)

    def elapsed(self) -> float:
        return time.monotonic() - self.begun

    def run(self) -> None:
        """Groups of parts: those that may run side by side do."""
        only = self.given.only
        waiting = {n: p for n, p in plans(self.given.rehearse).items() if not only or _part(n) in only}
        while waiting:
            first = next(iter(waiting))
            group = [n for n, p in waiting.items() if n == first or (p.beside and waiting[first].beside)]
            try:
                self._together({n: waiting.pop(n) for n in group})
            finally:
                self.report.write(self.given.out, self.elapsed())

    def _together(self, group: dict[str, Plan]) -> None:
        left = self.given.seconds - REPORTING - self.elapsed()
        if left <= 0:
            for name in group:
                self.report.parts[name] = [Outcome(f"{name}/process", "failed", "left out: the time was up")]
            return
        print(f"[{self.elapsed():4.0f} s] {', '.join(group)}", flush=True)
        arguments = ["--rehearse"] if self.given.rehearse else []
        environment = {"FUSEDOPT_TESTS_CACHE": str(self.folder / "cache")}  # which the tests' processes share
        environment |= {"OMP_NUM_THREADS": "2"} if len(group) > 1 else {}
        parts = [Part(n, arguments, self.folder, min(p.seconds, left), environment) for n, p in group.items()]
        try:
            running = parts
            while running := [p for p in running if p.running()]:
                time.sleep(0.05)
        finally:
            for part in parts:
                part.end()
                self._collect(part)

    def _collect(self, part: Part) -> None:
        found = self.report.parts[part.name] = part.outcomes()
        self.report.printed[part.name] = part.printed()
        for outcome in found:
            if outcome.status != "passed":
                print(f"  {outcome.status}: {outcome.job}: {' '.join(outcome.detail.split())[:300]}")
        passed = sum(o.status == "passed" for o in found)
        print(f"[{self.elapsed():4.0f} s]   {part.name}: {passed} of {len(found)} passed", flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Check and measure on an NVIDIA GPU."
    )
    out.add_argument("--out", type=Path, default=FOLDER, help="folder for CSV, JSON, tables and picture")
    out.add_argument(
        "--seconds", type=float, default=600, help="for the whole run; what does not fit is left out (600)"
    )
    parts = list(dict.fromkeys(map(_part, [*plans(False), *plans(True)])))
    out.add_argument("--only", metavar="PART", nargs="+", choices=parts, help=f"some of {', '.join(parts)}")
    out.add_argument("--rehearse", action="store_true", help="on the CPU, tiny: to see that the script works")
    out.add_argument("--commit", help="what is measured, where git does not know")
    out.add_argument("--part", help=argparse.SUPPRESS)
    out.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and do as it says. 0: all checks passed, whether or not the bars are reached."""
    given = parser().parse_args(arguments)
    if given.part:
        device = find(given.rehearse)
        return plans(given.rehearse)[given.part].do(device, given.log)
    try:
        if not given.rehearse:
            _needs_gpu()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that parts end with the run
    with tempfile.TemporaryDirectory() as folder:
        whole = WholeRun(given, Path(folder))
        whole.run()
    report = whole.report
    files = report.write(given.out, whole.elapsed())
    if report.panels():
        files.append(given.out / f"{report.name}.png")
        report.draw(files[-1])
    print(
        f"\n{report.checks()}\n\n{report.bars()}\n\n{', '.join(map(str, files))}; took {whole.elapsed():.0f} s"
    )
    return 1 if report.failed() else 0


def _needs_gpu() -> None:
    """Raises RuntimeError where torch finds no GPU; the device itself is left to the parts' processes."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no NVIDIA GPU here; with --rehearse the script runs on the CPU")


if __name__ == "__main__":
    sys.exit(main())
