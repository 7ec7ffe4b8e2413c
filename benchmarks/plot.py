"""What was measured: the CSV, and what is made from the CSV alone: tables, the bars to reach, the picture."""

from __future__ import annotations

import csv
import math
import os
import platform
import re
import subprocess
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator

import fusedopt
from fusedopt.compile.toolchain import compiler, cpu_features

from .cases import CASES, FIRST_STEPS, PAIRS
from .measure import ROOT, SCHEDULES, Row
from .providers import PROVIDERS, RULES
from .situations import CASE, SITUATIONS, Bound, Situation

# --
# Where and when


def facts() -> dict[str, str]:
    """The columns that say what the numbers belong to."""
    return {
        "commit": _commit(),
        "device": cpu_features().model,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedopt": fusedopt.__version__,
        "compiler": compiler().version.splitlines()[0],
        "date": str(date.today()),
    }


FACTS = ("commit", "device", "cores", "threads", "python", "torch", "fusedopt", "compiler", "date")


def _commit() -> str:
    """The short commit of this checkout, with ``-dirty`` if what is measured, or measures, has changed since."""
    try:
        return _git("rev-parse", "--short=10", "HEAD") + "-dirty" * bool(_git("status", "--porcelain", *CODE))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


CODE = ("--", "fusedopt", "kernels", "csrc", "benchmarks", "setup.py", ":!benchmarks/results", ":!*.md")
"""Where a change, or a file that is not committed, makes other numbers."""


class NotOneState(Exception):
    """Numbers that are kept would be of a tree that nobody can go back to, or of several."""


def check_clean(
    commit: str, others: Iterable[str] = (), remedy: str = "--out FOLDER writes elsewhere"
) -> None:
    """Raise NotOneState unless ``commit`` is one, without changes, and the ``others`` are the same."""
    if commit == "unknown":
        raise NotOneState(f"this is no git checkout, so nobody could say what was measured; {remedy}")
    if commit.endswith("-dirty"):
        changed = ", ".join(line[3:] for line in _git("status", "--porcelain", *CODE).splitlines())
        raise NotOneState(f"not committed: {changed}. Commit or stash it first, or {remedy}")
    if different := sorted(set(others) - {commit}):
        raise NotOneState(
            f"there are lines of {', '.join(different)} beside those of {commit}: measure everything, or {remedy}"
        )


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.rstrip()


def slug() -> str:
    """This machine's CPU as a file name."""
    words = re.sub(r"\((r|tm)\)|@.*|\bcpu\b", " ", cpu_features().model.lower())
    return "-".join([*re.findall(r"[a-z0-9]+", words), f"{os.cpu_count()}-cores"])


# --
# The CSV

KEY = ("case", "rule", "mode", "provider", "what")
COLUMNS = (*(f.name for f in fields(Row)), *FACTS)
Line = dict[str, Any]
"""A line of the CSV: the columns of `Row`, numbers as numbers, and those of `facts`."""


def lines(rows: Iterable[Row], where: dict[str, str]) -> list[Line]:
    """Rows with the facts beside them."""
    return [asdict(row) | where for row in rows]


def read(path: Path) -> list[Line]:
    """The lines of a CSV; none if it is not there."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [_parsed(line) for line in csv.DictReader(file)]


def _parsed(line: dict[str, str]) -> Line:
    numbers = {k: float(line[k]) if line[k] else math.nan for k in ("p20", "p50", "p80", "ratio")}
    return {**line, **numbers, "rounds": int(line["rounds"])}


def write(path: Path, found: Iterable[Line]) -> None:
    """Write a CSV. Numbers have four significant digits: more would be noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for line in found:
            writer.writerow({k: _cell(v) for k, v in line.items()})


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def merge(old: Iterable[Line], new: Iterable[Line]) -> list[Line]:
    """All lines, in the order of the suite; where both have one, the new one."""
    found = {tuple(line[k] for k in KEY): line for line in [*old, *new]}
    return sorted(found.values(), key=_order)


def _order(line: Line) -> tuple:
    cases = [*((p.case, p.rule, p.mode) for p in PAIRS), *(s.key for s in SITUATIONS)]
    place = line["case"], line["rule"], line["mode"]
    providers = list(PROVIDERS)
    return (
        cases.index(place) if place in cases else len(cases),
        line["what"] if place not in cases else "",
        place,
        providers.index(line["provider"]) if line["provider"] in providers else len(providers),
        line["what"],
    )


class Missing(LookupError):
    """Not measured."""


class Results:
    """The lines of one CSV, by case, rule, mode, provider and what."""

    def __init__(self, found: Sequence[Line]) -> None:
        self.lines = list(found)
        self._by_key = {tuple(line[k] for k in KEY): line for line in found}

    def line(self, case: str, rule: str, mode: str, provider: str, what: str = "step") -> Line:
        """One line. Raises Missing."""
        try:
            return self._by_key[case, rule, mode, provider, what]
        except KeyError:
            raise Missing(f"{case}/{rule}/{mode} by {provider}: {what}") from None

    def p50(self, *key: str) -> float:
        """A median. Raises Missing."""
        return self.line(*key)["p50"]

    def ratio(self, *key: str) -> float:
        """A provider's time in fusedopt's: the median over rounds. Raises Missing."""
        ratio = self.line(*key)["ratio"]
        if math.isnan(ratio):
            raise Missing(f"{key}: nothing to compare with")
        return ratio


# --
# The bars

Verdict = tuple[str, bool]


@dataclass(frozen=True)
class Bar:
    """What fusedopt must reach. ``judge`` gives what was measured, in words, and whether that is enough."""

    name: str
    required: str
    judge: Callable[[Results], Verdict]


def _faster(case: str, rule: str, mode: str, provider: str, least: float) -> Bar:
    def judge(results: Results) -> Verdict:
        ratio = results.ratio(case, rule, mode, provider)
        return f"{ratio:.2f}×", ratio >= least

    what = f"{rule}, {case}, {mode}"
    return Bar(f"{what}: speed over {provider}", f"≥ {least:g}×", judge)


def _near_bare(results: Results, key: tuple[str, str, str]) -> Verdict:
    ours, bare = results.p50(*key, "fusedopt"), results.p50(*key, "bare loop")
    return f"{ours * 1e3:.0f} µs; bare loop {bare * 1e3:.0f} µs", ours <= 1.5 * bare + 0.150


def _groups(results: Results) -> Verdict:
    ratio = 1 / results.ratio("groups-465", "AdamW", "warm", "fusedopt one group")
    return f"{ratio:.2f}×", ratio <= 1.5


def _launches(results: Results) -> Verdict:
    count = results.p50("groups-465", "AdamW", "warm", "fusedopt", "launches")
    return f"{count:.0f}", count == 1


def _host(results: Results, mode: str, most: float) -> Verdict:
    us = results.p50("small-500", "AdamW", mode, "fusedopt", "host") * 1e3
    return f"{us:.0f} µs", us <= most


def _first_step(results: Results, cache: str, most: float) -> Verdict:
    seconds = {c: results.p50(c, r, cache, "fusedopt", "first step") / 1e3 for c, r in FIRST_STEPS}
    return ", ".join(f"{c} {s:.2f} s" for c, s in seconds.items()), max(seconds.values()) <= most


def _kernels(results: Results, name: str, most: int) -> Verdict:
    first, last = (results.p50("tiny", name, m, "fusedopt", "kernels") for m in ("first step", "one-cycle"))
    return f"{first:.0f} after the first step, {last:.0f} in the end", last == most


def _grows(results: Results, rule: str, what: str) -> Verdict:
    """How much more is needed by the same number of tensors when they are larger, in parts of the parameters' bytes."""
    sizes = ("resnet-50-narrow", "resnet-50")
    small, large = (results.p50(case, rule, "memory", "fusedopt", what) for case in sizes)
    more = 4 * (CASES["resnet-50"].numel - CASES["resnet-50-narrow"].numel)
    return (
        f"{(large - small) / 1e6:.2f} MB for {more / 1e6:.0f} MB more parameters",
        large - small <= 0.01 * more,
    )


_SMALL = ("small-500", "AdamW", "warm")
BARS = (
    _faster(*_SMALL, "torch fused", 10),
    Bar("AdamW, small-500, warm: step", "≤ 1.5 × bare loop + 150 µs", partial(_near_bare, key=_SMALL)),
    _faster("small-500", "AdamW", "training", "torch fused", 8),
    _faster("20x1m", "AdamW", "warm", "torch fused", 1.0),
    _faster("20x1m", "AdamW", "warm", "bare loop", 0.95),
    *(
        _faster("resnet-50", rule, "warm", "torch default", 3)
        for rule in ("SGD-momentum", "RMSprop", "Adagrad", "RAdam", "NAdam")
    ),
    _faster("resnet-50", "LAMB", "warm", "eager", 3),
    Bar("465 groups: launches per step", "1", _launches),
    Bar("465 groups: step, in steps of the same tensors in one group", "≤ 1.5×", _groups),
    Bar("host time, small-500, warm", "≤ 100 µs", partial(_host, mode="warm", most=100)),
    Bar("host time, small-500, training", "≤ 450 µs", partial(_host, mode="training", most=450)),
    Bar("first step, empty cache", "≤ 2 s", partial(_first_step, cache="empty cache", most=2.0)),
    Bar("first step, warm cache", "≤ 0.2 s", partial(_first_step, cache="warm cache", most=0.2)),
    *(
        Bar(f"kernels of a one-cycle schedule, {s.name}", f"{s.kernels}: {s.why}",
            partial(_kernels, name=s.name, most=s.kernels))
        for s in SCHEDULES
    ),
    *(
        Bar(f"memory that grows with the model, {rule}: {words}", "≤ 1 %", partial(_grows, rule=rule, what=what))
        for rule in ("AdamW", "LAMB")
        for what, words in (("peak growth", "during a step"), ("beyond state", "kept besides the state"))
    ),
)  # fmt: skip


def _situation(situation: Situation, bound: Bound) -> Bar:
    def judge(results: Results) -> Verdict:
        ours = results.line(*situation.key, "fusedopt", bound.what)
        if bound.against is None:
            value, text = ours["p50"], f"{ours['p50']:.3g} {bound.unit}"
        else:
            ratio = results.ratio(*situation.key, bound.against)
            value = ratio if bound.sign == "≥" else 1 / ratio
            theirs = results.line(*situation.key, bound.against)
            text = f"{value:.2f}× ({_ms(ours)} ms, theirs {_ms(theirs)})"
        return text, value >= bound.limit if bound.sign == "≥" else value <= bound.limit

    what = bound.what if bound.against is None else bound.against
    over = {"≥": "speed over", "≤": "time of"}[bound.sign] if bound.against else ""
    name = " ".join(filter(None, (f"{situation.name}, {situation.rule.name}:", over, what)))
    return Bar(name, f"{bound.sign} {bound.limit:g}{'' if bound.unit == '×' else ' '}{bound.unit}", judge)


SITUATION_BARS = tuple(_situation(s, bound) for s in SITUATIONS for bound in s.bounds)


def judge(results: Results, bars: Sequence[Bar] = BARS) -> list[tuple[Bar, str, bool | None]]:
    """Every bar with what was measured and whether it is reached; None where it was not measured."""
    out: list[tuple[Bar, str, bool | None]] = []
    for bar in bars:
        try:
            out.append((bar, *bar.judge(results)))
        except Missing:
            out.append((bar, "not measured", None))
    return out


# --
# Tables


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table, its columns padded so that it can be read as text too."""
    all_ = [list(head), *map(list, rows)]
    width = [max(len(row[k]) for row in all_) for k in range(len(head))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, width, strict=True)) + " |" for row in all_]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *text[1:]])


def bars_table(results: Results, bars: Sequence[Bar] = BARS) -> str:
    """The bars, what was measured, and the verdict."""
    said = {True: "yes", False: "**no**", None: ""}
    rows = [(bar.name, bar.required, text, said[ok]) for bar, text, ok in judge(results, bars)]
    return _table(("bar", "required", "measured", "reached"), rows)


def steps_table(results: Results) -> str:
    """Milliseconds per step, a line per pair and a column per provider."""
    steps = [line for line in results.lines if line["what"] == "step"]
    used = [p for p in (*PROVIDERS, "fusedopt plain") if any(line["provider"] == p for line in steps)]
    found: dict[tuple, dict[str, Line]] = {}
    for line in steps:
        found.setdefault((line["case"], line["rule"], line["mode"]), {})[line["provider"]] = line
    rows = [
        (
            *key,
            *(_ms(by.get(p)) for p in used),
            *(_times(by.get(p)) for p in ("torch default", "torch fused")),
        )
        for key, by in found.items()
    ]
    return _table(("case", "rule", "mode", *used, "× default", "× fused"), rows)


def _ms(line: Line | None) -> str:
    return "" if line is None else f"{line['p50']:.3g}" if line["p50"] < 1000 else f"{line['p50']:.0f}"


def _times(line: Line | None) -> str:
    return "" if line is None or math.isnan(line["ratio"]) else f"{line['ratio']:.1f}"


def others_table(results: Results) -> str:
    """Everything that is no step time."""
    rows = [
        (line["what"], line["case"], line["rule"], line["mode"], line["provider"], *_amounts(line))
        for line in results.lines
        if line["what"] not in ("step", "launches")
    ]
    return _table(("what", "case", "rule", "mode", "provider", "p20", "p50", "p80", "unit"), sorted(rows))


def _amounts(line: Line) -> list[str]:
    unit, scale = ("MB", 1e6) if line["unit"] == "bytes" else (line["unit"], 1)
    return [f"{line[k] / scale:.4g}" for k in ("p20", "p50", "p80")] + [unit]


def where_from(results: Results) -> str:
    """The machine, versions, commits and dates behind the lines, each distinct value once."""
    values = {k: list(dict.fromkeys(line[k] for line in results.lines)) for k in FACTS}
    said = {k: ", ".join(v) for k, v in values.items()}
    return (
        f"{said['device']}, {said['cores']} cores, {said['threads']} threads; Python {said['python']}, "
        f"torch {said['torch']}, fusedopt {said['fusedopt']} at {said['commit']}, {said['compiler']}; {said['date']}"
    )


def report(results: Results) -> str:
    """All of it as markdown."""
    return "\n\n".join([
        f"Measured on {where_from(results)}.",
        "## Bars", bars_table(results),
        "## Situations", bars_table(results, SITUATION_BARS),
        "## Steps", "Milliseconds, medians; the last columns: how many of fusedopt's steps fit into one of torch's.",
        steps_table(results),
        "## Everything else", others_table(results),
    ]) + "\n"  # fmt: skip


# --
# The picture

LOOKS = {
    "eager": "#e7b54a",
    "torch loop": "#9ec1ec",
    "torch default": "#6ea6e8",
    "torch foreach": "#3b7dd8",
    "torch compiled": "#8d6cc9",
    "torch fused": "#2a5db0",
    "deepspeed": "#5fa777",
    "optimi": "#3f9b8f",
    "heavyball": "#86a83c",
    "pytorch-optimizer": "#5fa777",
    "timm": "#3c8a3c",
    "transformers": "#b07cc6",
    "bitsandbytes": "#a8743a",
    "torchao": "#c9609c",
    "bare loop": "#9a9a9a",
    "fusedopt": "#d1382c",
    "fusedopt one group": "#e78d85",
}
"""Providers from top to bottom, in colours that can be seen on white and on black."""


def draw(results: Results, path: Path) -> None:
    """How many times fusedopt's step others take: AdamW on every case, and every rule on ResNet-50.

    Marks are joined with 1, fusedopt's own time, and have milliseconds beside them. Scales are logarithmic, where bars
    from the edge of a picture would be as long as somebody chose the edge.
    """
    steps = _comparable(results)
    panels = [
        ("AdamW", [line for line in steps if line["rule"] == "AdamW"], _case_label),
        ("ResNet-50", [line for line in steps if line["case"] == "resnet-50"], lambda line: line["rule"]),
    ]
    panels = [panel for panel in panels if panel[1]] or [("Steps", steps, _pair_label)]
    lanes = [len(found) + len({label(line) for line in found}) for _, found, label in panels]
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(7.6 * len(panels), 2.2 + 0.2 * max(lanes)),
        layout="constrained",
        squeeze=False,
    )
    for axis, (title, found, label) in zip(axes.flat, panels, strict=True):
        _draw_panel(axis, title, found, label)
    _legend(figure, steps)
    figure.suptitle(
        "Optimizer step, in steps of fusedopt: median and 20th to 80th percentile; left is faster",
        fontsize=13,
    )
    figure.supxlabel(textwrap.fill(where_from(results), 100 * len(panels)), fontsize=8, alpha=0.7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _comparable(results: Results) -> list[Line]:
    """Steps of the cases that fusedopt stepped in, too."""
    steps = [line for line in results.lines if line["what"] == "step" and line["case"] != CASE]
    ours = {_place(line) for line in steps if line["provider"] == "fusedopt"}
    return [line for line in steps if _place(line) in ours and line["provider"] in LOOKS]


def _place(line: Line) -> tuple[str, str, str]:
    return line["case"], line["rule"], line["mode"]


def _case_label(line: Line) -> str:
    return line["case"] + ("\nin training" if line["mode"] == "training" else "")


def _pair_label(line: Line) -> str:
    return f"{line['case']}\n{line['rule']}"


def _draw_panel(axis: Any, title: str, found: Sequence[Line], label: Callable[[Line], str]) -> None:
    groups: dict[str, dict[str, Line]] = {}
    for line in found:
        groups.setdefault(label(line), {})[line["provider"]] = line
    lane, places = 0, {}
    for k, (name, by) in enumerate(groups.items()):
        shown = [p for p in LOOKS if p in by]
        if k % 2:
            axis.axhspan(lane - 1, lane + len(shown), color="grey", alpha=0.08, linewidth=0)
        places[lane + (len(shown) - 1) / 2] = name
        for provider in shown:
            _draw_mark(axis, lane, by[provider], by["fusedopt"]["p50"])
            lane += 1
        lane += 1
    ratios = [line["p50"] / groups[label(line)]["fusedopt"]["p50"] for line in found]
    axis.axvline(1, color=LOOKS["fusedopt"], linewidth=1.2, zorder=0)
    axis.set_yticks([*places], places.values())
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(lane - 1, -1)
    axis.set(
        title=title, xlabel="times fusedopt's step", xscale="log", xlim=(min(ratios) / 1.6, max(ratios) * 2.2)
    )
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    axis.minorticks_off()
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)


def _draw_mark(axis: Any, y: float, line: Line, ours: float) -> None:
    low, middle, high = (line[k] / ours for k in ("p20", "p50", "p80"))
    colour, own = LOOKS[line["provider"]], line["provider"] == "fusedopt"
    axis.plot([1, middle], [y, y], color=colour, linewidth=2.2, alpha=0.6, solid_capstyle="butt")
    axis.plot([low, high], [y, y], color=colour, linewidth=5, alpha=0.4, solid_capstyle="butt")
    axis.plot(middle, y, "o", color=colour, markersize=6)
    axis.annotate(
        f"{_ms(line)} ms" if own else _ms(line), (max(high, middle, 1.0), y), (6, 0), textcoords="offset points",
        va="center", fontsize=8, fontweight="bold" if own else "normal",
    )  # fmt: skip


def _legend(figure: Any, steps: Sequence[Line]) -> None:
    used = [p for p in LOOKS if any(line["provider"] == p for line in steps)]
    handles = [plt.Line2D([], [], color=LOOKS[p], marker="o", linewidth=2.2) for p in used]
    figure.legend(handles, used, loc="outside right upper", fontsize=9, frameon=False)


def publishable(results: Results) -> bool:
    """Whether there is enough for a picture."""
    return any(line["rule"] in RULES for line in _comparable(results))
