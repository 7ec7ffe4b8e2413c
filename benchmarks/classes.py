"""Every optimizer class of some packages, fused beside itself: ``python -m benchmarks.classes [PACKAGE ...]``.

Each class is made over a few small parameters in a process of its own, with a time limit. It takes ten steps as it is
and ten fused, with the same gradients and another rate each time, once with all gradients and once with some missing;
parameters, state and groups are compared after each. Then 200 small tensors are stepped by both in turns. What becomes
of a class is a row of docs/classes_table.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import itertools
import math
import multiprocessing
import os
import pkgutil
import re
import statistics
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from fusedopt.extension import leaf

from .beside import Run, difference, ratio, without_dtypes
from .plot import ROOT, facts

PACKAGES = ("torch.optim", "pytorch_optimizer", "torch_optimizer")
SMALL, MANY = ((8, 6), (5,), (4, 4), (3, 2, 3, 3)), ((32,), (8, 8)) * 100
TABLE = ROOT / "docs" / "classes_table.md"
MISSING, SECONDS = (2, 3, 7), 120
ROUNDING = 1e-4  # of a tensor's largest element; what was seen is below 1e-6
MORE = 10.0
"""How many times as far off a fused class may be as the class itself is from what it is in float64."""
REQUIRED: dict[str, Any] = dict(
    base_optimizer=torch.optim.AdamW, lr=0.01, num_iterations=100, num_data=100, rho=0.05
)
"""For arguments without a default."""


class Row(NamedTuple):
    """A class and what became of it. ``ratio``: time of its own step over that of a fused one."""

    name: str
    verdict: str
    why: str
    launches: int = 0
    ratio: float = math.nan
    difference: float = math.nan


def classes(package: str) -> Iterator[type[Optimizer]]:
    """The optimizers that a package defines, or shows as its own; those that have a step."""
    modules = [root := importlib.import_module(package)]
    for info in pkgutil.walk_packages(getattr(root, "__path__", []), f"{package}."):
        with contextlib.suppress(Exception):  # a module for something that is not here
            modules.append(importlib.import_module(info.name))
    found = {c for m in modules for c in vars(m).values() if isinstance(c, type) and issubclass(c, Optimizer)}
    for cls in sorted(found, key=lambda c: (c.__name__.lower(), c.__module__)):
        own = f"{cls.__module__}.".startswith(f"{package}.")
        shown = getattr(root, cls.__name__, None) is cls and not cls.__module__.startswith("torch.")
        named = getattr(sys.modules[cls.__module__], cls.__name__, None) is cls  # no other class's stand-in
        if named and (own or shown) and cls.step is not Optimizer.step and not inspect.isabstract(cls):
            yield cls


def ways(cls: type[Optimizer]) -> Iterator[Callable[[list[nn.Parameter]], Optimizer]]:
    """How an optimizer may be made of parameters, the usual way first."""
    wanted = inspect.signature(cls).parameters.values()
    required = {p.name for p in wanted if p.default is p.empty} & REQUIRED.keys()
    make: Any = partial(cls, **{name: REQUIRED[name] for name in required})
    yield make
    yield partial(make, lr=0.001)
    yield lambda ps: make([p for p in ps if p.ndim == 2])
    yield lambda ps: make(
        [dict(params=[p for p in ps if (p.ndim > 1) == m], use_muon=m) for m in (True, False)]
    )
    yield lambda ps: make([p for p in ps if p.ndim == 2], [p for p in ps if p.ndim != 2])
    yield lambda ps: make(nn.ParameterList(ps))
    yield lambda ps: make(torch.optim.AdamW(ps))


def examine(cls: type[Optimizer]) -> Row:
    errors = []
    for way, closure in itertools.product(ways(cls), (False, True)):
        found, limit, reasons, launches = 0.0, ROUNDING, [], []
        for missing in ((), MISSING):
            made = False
            try:
                own, made = Run(way, SMALL, closure, fused=False), True
                theirs = own.steps(missing)
            except Exception as error:
                errors.append((made, f"{type(error).__name__}: {error}"))
                break
            run = Run(way, SMALL, closure, fused=True)
            found = max(found, *map(difference, run.steps(missing), theirs))
            if found > limit:  # where the class itself is not exact: it subtracts what is nearly the same
                limit = max(limit, MORE * _inexact(way, closure, missing, theirs))
            said = run.opt.explain()
            launches.append(said.launches)
            reasons.append(said.eager[0].reason.split(". Remedy:")[0] if said.eager else "")
        if not launches:
            continue
        verdict = "eager" if reasons[0] else "complete" if launches[0] else "silent"
        verdict = verdict if found <= limit else "differs"
        why = reasons[0] or "".join(f"where gradients are missing in some steps: {r}" for r in reasons if r)
        if ROUNDING < found <= limit:
            why = f"in float32 the class itself is as far from what it is in float64. {why}".strip()
        times = ratio(Run(way, MANY, closure, fused=False), Run(way, MANY, closure, fused=True))
        return Row(cls.__name__, verdict, why, launches[0], times, found)
    _, why = max(errors, key=lambda error: error[0])  # of one that could be made, if any
    return Row(cls.__name__, "not run", why)


def _inexact(way: Any, closure: bool, missing: Sequence[int], steps: list[dict[str, Any]]) -> float:
    """How far these steps, the class's own in float32, are from those in float64."""
    exact = Run(way, SMALL, closure, fused=False, dtype=torch.float64).steps(missing)
    return max(map(difference, map(without_dtypes, steps), map(without_dtypes, exact)))


def _child(cls: type[Optimizer], out: Connection) -> None:
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    try:
        out.send(examine(cls))
    except Exception as error:
        out.send(Row(cls.__name__, "error", f"{type(error).__name__}: {error}"))


def isolated(cls: type[Optimizer]) -> Row:
    """A class in a process of its own: a crash or a hang costs that class."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(cls, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(SECONDS) else Row(cls.__name__, "error", f"longer than {SECONDS} s")
    except EOFError:
        return Row(cls.__name__, "error", "its process died")
    finally:
        child.kill()
        child.join()


VERDICTS = ("complete", "eager", "differs", "silent", "error", "not run")
TEXT = """# Optimizer classes, fused

Written by `python -m benchmarks.classes`. Each class takes ten steps as it is and ten after `fusedopt.fuse`, over four
small parameters. *Difference* is the largest in any parameter, state or group after any step, relative to the largest
element of its tensor. *× own step*: 200 tensors of 32 or 8×8 elements, on one thread, both in turns; the median over
rounds of the own step's time over the fused one's.

Verdicts: *complete*, nothing runs eagerly; *eager*, its own step runs, for the reason in its row; *differs*, by more
than rounding, and than ten times what the class itself is from its steps in float64; *silent*, nothing is launched and
no reason is given; *error*, fused it fails or takes too long; *not run*, it cannot be made of a few parameters and
stepped, fused or not, without knowing more about it.
"""


def short(text: str, length: int = 120) -> str:
    """A cell of a table, without places of this machine."""
    text = re.sub(r"\S*/site-packages/| at 0x[0-9a-f]+", "", " ".join(text.split())).replace("|", "\\|")
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " …"


def line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def version(package: str) -> str:
    name = package.split(".")[0]
    known = metadata.packages_distributions().get(name)
    return f"{name} {metadata.version(known[0])}" if known else name


def table(found: dict[str, list[Row]]) -> str:
    """The document."""
    said = facts()
    where = f"{said['date']}, commit {said['commit']}, {said['device']}, {said['cores']} cores, {said['compiler']}"
    versions = dict.fromkeys(map(version, ["torch", *found]))
    lines = [TEXT, f"{where}, Python {said['python']}, {', '.join(versions)}.", ""]
    lines += [line("package", "classes", *VERDICTS, "median × own step, complete"), "|---" * 9 + "|"]
    for name, rows in {**found, "all": list(itertools.chain(*found.values()))}.items():
        count, ratios = Counter(r.verdict for r in rows), [r.ratio for r in rows if r.verdict == "complete"]
        middle = f"{statistics.median(ratios or [math.nan]):.1f}"
        lines.append(line(name, len(rows), *(count[v] for v in VERDICTS), middle))
    for name, rows in found.items():
        lines += [
            "",
            f"## {name}",
            "",
            line("class", "verdict", "launches", "× own step", "difference", "why"),
        ]
        lines.append("|---" * 6 + "|")
        for row in rows:
            numbers = row.launches, f"{row.ratio:.2f}", f"{row.difference:.1e}"
            ran = not math.isnan(row.ratio)
            lines.append(line(row.name, row.verdict, *(numbers if ran else "---"), short(row.why)))
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.classes", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("packages", nargs="*", default=PACKAGES, help="importable packages or modules")
    parser.add_argument("--out", type=Path, default=TABLE, help="the table's file")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    leaf.seek(wait=True)
    found: dict[str, list[Row]] = {package: [] for package in given.packages}
    for package, rows in found.items():
        for cls in classes(package):
            rows.append(row := isolated(cls))
            print(f"{package}.{row.name}: {row.verdict} {row.ratio:.2f} {row.difference:.0e} {row.why[:80]}")
    given.out.write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    main()
