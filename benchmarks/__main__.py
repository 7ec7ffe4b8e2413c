"""The benchmark suite: ``python -m benchmarks --help``. How it measures: benchmarks/README.md."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt

from . import measure, plot, situations
from .cases import FIRST_STEPS, MEMORY, PAIRS, matches
from .measure import FULL, QUICK, ROOT, SCHEDULES, Effort, Row
from .providers import PEERS, installed
from .timing import machine

FOLDER = Path(__file__).resolve().with_name("results")
QUICK_FOLDER = ROOT / "build" / "bench"
PICTURE = ROOT / "docs" / "images" / "bench.png"


@dataclass(frozen=True)
class Job:
    """Something to measure. ``id`` is what ``--only`` looks at."""

    id: str
    run: Callable[[], list[Row]]
    quick: bool = True


def jobs(effort: Effort, compiled: bool) -> list[Job]:
    """Everything, in order."""
    out = [Job(p.id, partial(measure.measure, p, effort, compiled), p.quick) for p in PAIRS]
    out += [
        Job(s.id, partial(situations.measure, s, effort), k == 0) for k, s in enumerate(situations.SITUATIONS)
    ]
    out += [Job(f"kernels/{s.name}", partial(measure.kernels, s, effort)) for s in SCHEDULES]
    for k, (case, rule) in enumerate(FIRST_STEPS):
        out.append(Job(f"first-step/{case}/{rule}", partial(measure.first_steps, case, rule, effort), k == 0))
    out += [Job(f"memory/{case}/{rule}", partial(measure.memory, case, rule), False) for case, rule in MEMORY]
    return out


def chosen(given: argparse.Namespace) -> list[Job]:
    """The jobs that the command line asks for. ``--only`` reaches beyond what ``--quick`` would choose."""
    everything = jobs(QUICK if given.quick else FULL, given.compile)
    return [
        job
        for job in everything
        if matches(job.id, given.only) and (job.quick or not given.quick or given.only is not None)
    ]


def summary(rows: Sequence[Row]) -> str:
    """A job's outcome in a line."""
    steps = {row.provider: row for row in rows if row.what == "step"}
    if not steps:
        return ", ".join(
            f"{row.provider} {row.mode} {row.what} {row.p50:.4g} {row.unit}"
            for row in rows
            if row.p50 == row.p50
        )
    ours = steps.pop("fusedopt", None)
    said = [f"fusedopt {ours.p50:.3g} ms"] if ours else []
    return ", ".join([*said, *(f"{name} {row.p50:.3g} ({row.ratio:.2f}×)" for name, row in steps.items())])


def run(todo: Sequence[Job], path: Path, keep: bool) -> plot.Results:
    """Measure; the CSV is written after every job. ``keep``: lines of earlier runs stay where they are not replaced.

    What is written into the folder of results is of one commit. Raises `plot.NotOneState` before anything is measured
    if it would not be, and afterwards if the tree was changed meanwhile.
    """
    where, old, new = plot.facts(), plot.read(path), []
    old = old if keep else []
    kept = path.parent.resolve() == FOLDER
    if kept:
        plot.check_clean(where["commit"], (line["commit"] for line in old))
    for k, job in enumerate(todo, 1):
        start = time.perf_counter()
        print(f"[{k}/{len(todo)}] {job.id}", flush=True)
        rows = job.run()
        if kept:
            plot.check_clean(plot.facts()["commit"], [where["commit"]])
        new += plot.lines(rows, where)
        plot.write(path, plot.merge(old, new))
        print(f"  {summary(rows)}  [{time.perf_counter() - start:.0f} s]", flush=True)
    found = plot.merge(old, new)
    plot.write(path, found)
    return plot.Results(found)


def busy() -> str:
    """A warning if other processes are at work: the threads then wait for each other, and no time means much."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return f"\nWARNING: the load is {load:.1f}; wait until the machine is quiet" if load > 0.5 else ""


def peers() -> str:
    """The packages that take part, and those that do not because they are not here."""
    found = {name: installed(module) for name, (module, _) in PEERS.items()}
    missing = ", ".join(name for name, package in found.items() if package is None)
    here = ", ".join(package for package in found.values() if package) or "none"
    return here + (f"; not installed, so left out: {missing}" if missing else "")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure optimizer steps by fusedopt and others, all in turns; write a CSV, tables, a picture.",
    )
    out.add_argument(
        "--quick", action="store_true", help="a few small cases, seconds each; to see that it works"
    )
    out.add_argument(
        "--only", metavar="PATTERN", help="part of an id (see --list) or a glob for it; keeps other lines"
    )
    out.add_argument(
        "--compile", action="store_true", help="torch.compile(opt.step) too, which takes minutes"
    )
    out.add_argument(
        "--out", type=Path, help=f"folder for all output ({_shown(FOLDER)}; --quick: build/bench)"
    )
    out.add_argument("--publish", action="store_true", help=f"also write the picture to {_shown(PICTURE)}")
    out.add_argument("--draw", action="store_true", help="measure nothing: tables and picture from the CSV")
    out.add_argument("--list", action="store_true", help="print the ids of what would be measured")
    return out


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and do as it says."""
    given = parser().parse_args(arguments)
    todo = chosen(given)
    if given.list or not todo:
        print("\n".join(job.id for job in todo) or f"nothing matches {given.only!r}")
        return 0 if todo else 2
    start = time.perf_counter()
    path = (given.out or (QUICK_FOLDER if given.quick else FOLDER)) / f"{plot.slug()}.csv"
    if given.draw:
        results = plot.Results(plot.read(path))
    else:
        print(f"machine: {machine()}{busy()}\npeers: {peers()}", flush=True)
        try:
            results = run(todo, path, keep=given.only is not None)
        except plot.NotOneState as error:
            print(f"{_shown(path)} is of one commit: {error}", file=sys.stderr)
            return 1
    path.with_suffix(".md").write_text(plot.report(results), encoding="utf-8")
    print(f"\n{plot.bars_table(results)}\n\n{plot.bars_table(results, plot.SITUATION_BARS)}")
    print(f"\n{plot.steps_table(results)}\n\n{plot.others_table(results)}")
    plt.switch_backend("agg")
    for picture in [path.with_suffix(".png"), *([PICTURE] if given.publish else [])]:
        if plot.publishable(results):
            plot.draw(results, picture)
            print(f"picture: {_shown(picture)}")
    print(f"results: {_shown(path)}; took {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
