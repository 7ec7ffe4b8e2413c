"""What a run leaves: a CSV, everything as JSON, tables as markdown, a picture; all named after the device."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from .. import plot
from ..plot import Line, Results, _ms, _table
from .bars import BARS, judge
from .device import Gpu, Rehearsal
from .jobs import Outcome
from .kernels import BOUND_BY_MEMORY

SAID = {True: "yes", False: "**no**", None: ""}
COLORS = ("#d1382c", "#e78d85", "#1f4e96", "#3b7dd8", "#6ea6e8", "#5fa777", "#8d6cc9", "#9a9a9a", "#e7b54a")


class Report:
    """Outcomes by part, and what follows from them."""

    def __init__(self, rehearsal: bool, commit: str | None = None) -> None:
        self.rehearsal, self.commit = rehearsal, commit
        self.backends = (Rehearsal if rehearsal else Gpu).backends
        self.parts: dict[str, list[Outcome]] = {}
        self.printed: dict[str, str] = {}

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for part in self.parts.values() for outcome in part]

    @property
    def facts(self) -> dict[str, Any]:
        """What the environment's part found."""
        return {k: v for outcome in self.parts.get("environment", []) for k, v in outcome.found.items()}

    @property
    def name(self) -> str:
        """Of all files."""
        return self.facts.get("slug", "rehearsal" if self.rehearsal else "gpu")

    @property
    def results(self) -> Results:
        columns = self.facts.get("columns", dict.fromkeys(plot.FACTS, "unknown"))
        columns |= {"commit": self.commit} if self.commit else {}
        return Results([row | columns for outcome in self.outcomes for row in outcome.rows])

    def failed(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.status == "failed"]

    def write(self, folder: Path, seconds: float) -> list[Path]:
        """All but the picture; called after every part, so that a run that is cut off leaves what it has."""
        folder.mkdir(parents=True, exist_ok=True)
        csv, js, md, log = (folder / f"{self.name}{end}" for end in (".csv", ".json", ".md", ".log"))
        plot.write(csv, self.results.lines)
        js.write_text(json.dumps(self._everything(seconds), indent=1, default=str) + "\n", encoding="utf-8")
        md.write_text(self.markdown(seconds), encoding="utf-8")
        log.write_text("\n".join(f"== {n}\n{text}" for n, text in self.printed.items()), encoding="utf-8")
        return [csv, js, md, log]

    def _everything(self, seconds: float) -> dict[str, Any]:
        results = self.results
        bars = [
            {"bar": bar.name, "required": bar.required, "backend": backend, "measured": said, "reached": ok}
            for bar in BARS
            for backend in self.backends
            for said, ok in [judge(bar, results, backend)]
        ]
        jobs = [
            {"part": part, **{k: getattr(o, k) for k in ("job", "status", "detail", "seconds")}}
            for part, found in self.parts.items()
            for o in found
        ]
        return {"seconds": seconds, "rehearsal": self.rehearsal, **self.facts, "bars": bars, "jobs": jobs}

    # -- tables --
    def bars(self) -> str:
        """The bars, with what each backend reached."""
        results, rows = self.results, []
        for bar in BARS:
            cells = [judge(bar, results, backend) for backend in self.backends]
            rows.append([bar.name, bar.required, *(f"{text} {SAID[ok]}".strip() for text, ok in cells)])
        return _table(("bar", "required", *self.backends), rows)

    def checks(self) -> str:
        """How many jobs of each part passed, and what became of the others."""
        rows = [
            (part, *(str(sum(o.status == s for o in found)) for s in ("passed", "failed", "skipped")),
             f"{sum(o.seconds for o in found):.0f}")
            for part, found in self.parts.items()
        ]  # fmt: skip
        others = [
            f"- {o.status}: {part}: {o.job}: {' '.join(o.detail.split())[:400]}"
            for part, found in self.parts.items()
            for o in found
            if o.status != "passed"
        ]
        return "\n".join([_table(("part", "passed", "failed", "skipped", "seconds"), rows), "", *others])

    def times(self, what: str) -> str:
        """Medians in milliseconds, a line per case, rule and mode, and a column per provider."""
        lines = [line for line in self.results.lines if line["what"] == what]
        used = list(dict.fromkeys(line["provider"] for line in lines))
        found: dict[tuple[str, ...], dict[str, Line]] = {}
        for line in lines:
            found.setdefault((line["case"], line["rule"], line["mode"]), {})[line["provider"]] = line
        rows = [(*key, *(_cell(by.get(p)) for p in used)) for key, by in found.items()]
        return _table(("case", "rule", "mode", *used), rows)

    def markdown(self, seconds: float) -> str:
        """All of it."""
        words = (
            "A rehearsal on a CPU with tiny sizes: **no number here means anything.**\n\n"
            if self.rehearsal
            else ""
        )
        where = plot.where_from(self.results) if self.results.lines else "nothing: nothing was measured"
        smi = ", ".join(f"{k} {v}" for k, v in self.facts.get("nvidia-smi", {}).items())
        sections = [
            f"{words}Measured on {where}. {smi + '. ' if smi else ''}The run took {seconds:.0f} s.",
            "## Bars", self.bars(),
            "## Checks", self.checks(),
            "## Device time", "Milliseconds from kernel to kernel, cold caches, medians; ~: the host is part of it.",
            self.times("device"),
            "## Host time", "Milliseconds until step() returns, medians; the queue was empty.", self.times("host"),
            "## Whole steps", "Milliseconds until the device is done, from an empty queue.", self.times("step"),
            "## First step of a process, empty caches", self.times("first step"),
            "## Compiling a kernel", self.times("compile"),
            "## Everything else", self._others(),
        ]  # fmt: skip
        return "\n\n".join(sections) + "\n"

    def _others(self) -> str:
        rows = [
            (line["what"], line["case"], line["rule"], line["provider"], f"{line['p50']:.4g}", line["unit"])
            for line in self.results.lines
            if line["what"] in ("bandwidth", "bytes", "launches")
        ]
        return _table(("what", "case", "rule", "provider", "p50", "unit"), rows)

    # -- the picture --
    def panels(self) -> list[tuple[str, list[Line], str]]:
        """Device time of AdamW by case, of every rule where memory is the limit, and host time; what was measured."""
        lines = [line for line in self.results.lines if line["mode"] == "gpu"]
        device = [line for line in lines if line["what"] == "device"]
        panels = [
            ("AdamW: device", [x for x in device if x["rule"] == "AdamW"], "case"),
            (f"{BOUND_BY_MEMORY}: device", [x for x in device if x["case"] == BOUND_BY_MEMORY], "rule"),
            ("AdamW: host", [x for x in lines if x["what"] == "host"], "case"),
        ]
        return [panel for panel in panels if panel[1]]

    def draw(self, path: Path) -> None:
        """The panels, of which there is at least one."""
        panels = self.panels()
        used = list(dict.fromkeys(line["provider"] for _, found, _ in panels for line in found))
        colors = {p: COLORS[k % len(COLORS)] for k, p in enumerate(used)}
        plt.switch_backend("agg")
        size = 1 + 5.4 * len(panels), 8
        figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
        for axis, (title, found, label) in zip(axes[0], panels, strict=True):
            _panel(axis, title, found, label, colors)
        handles = [plt.Line2D([], [], marker="o", linestyle="", color=colors[p]) for p in used]
        figure.legend(handles, used, loc="outside right upper", fontsize=8, frameon=False)
        title = "REHEARSAL on a CPU: no number means anything" if self.rehearsal else "Optimizer step"
        figure.suptitle(f"{title}: median and 20th to 80th percentile, left is faster")
        figure.supxlabel(plot.where_from(self.results), fontsize=7, color="#666666")
        figure.savefig(path, dpi=100)
        plt.close(figure)


def _cell(line: Line | None) -> str:
    return "" if line is None else _ms(line) + (" ~" if line["note"].startswith("the queue") else "")


def _panel(axis: Any, title: str, found: Sequence[Line], label: str, colors: dict[str, str]) -> None:
    groups: dict[str, list[Line]] = {}
    for line in found:
        groups.setdefault(line[label], []).append(line)
    height = 0.86 / max(map(len, groups.values()), default=1)
    for k, group in enumerate(groups.values()):
        for i, line in enumerate(_ordered(group, colors)):
            y, middle = k + (i - (len(group) - 1) / 2) * height, line["p50"]
            spread = [[max(0.0, middle - line["p20"])], [max(0.0, line["p80"] - middle)]]
            axis.errorbar(middle, y, xerr=spread, fmt="o", markersize=5, color=colors[line["provider"]],
                          ecolor="#444444", elinewidth=0.8)  # fmt: skip
            axis.annotate(_ms(line), (max(line["p80"], middle), y), (6, 0), textcoords="offset points",
                          va="center", fontsize=6.5)  # fmt: skip
        axis.axhspan(k - 0.5, k + 0.5, color="#000000", alpha=0.04 * (k % 2), linewidth=0)
    axis.set_yticks(range(len(groups)), groups)
    axis.set_ylim(len(groups) - 0.5, -0.5)
    if times := [line["p50"] for line in found if line["p50"] > 0 and math.isfinite(line["p50"])]:
        axis.set(xscale="log", xlim=(min(times) / 1.5, max(times) * 2.5))
    axis.set(title=title, xlabel="milliseconds")
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)


def _ordered(lines: Iterable[Line], colors: dict[str, str]) -> list[Line]:
    order = list(colors)
    return sorted(lines, key=lambda line: order.index(line["provider"]))
