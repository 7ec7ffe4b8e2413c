"""What storage in fewer bytes does to training: ``python -m benchmarks.storage_curves`` writes docs/storage_curves.md.

A small GPT learns the characters of Python's standard library, and a ResNet handwritten digits, each with AdamW and
every choice of `CHOICES`, from several seeds. A seed is the same initial weights, rounded for parameters in bfloat16,
and the same batches for all choices. A model whose parameters are bfloat16 also computes in it; its loss is in float32.

All losses of validation are kept in benchmarks/results/storage_curves.csv, from which ``--draw`` makes table and
picture again.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from fusedopt import optim

from .demo import Digits, one_cycle, resnet
from .plot import ROOT, check_clean, facts

TABLE = ROOT / "docs" / "storage_curves.md"
PICTURE = ROOT / "docs" / "images" / "storage_curves.png"
RESULTS = ROOT / "benchmarks" / "results" / "storage_curves.csv"


class Choice(NamedTuple):
    """The dtype of parameters, and the optimizer's ``storage``."""

    dtype: torch.dtype
    storage: Any


_F32, _BF16 = torch.float32, torch.bfloat16
PLAIN, BARE = "float32", "bfloat16, no care"
CHOICES = {
    PLAIN: Choice(_F32, None),
    "float32, state bfloat16": Choice(_F32, "bfloat16"),
    "float32, state bfloat16_sr": Choice(_F32, "bfloat16_sr"),
    "float32, state int8": Choice(_F32, "int8"),
    "float32, state int8_256": Choice(_F32, "int8_256"),
    BARE: Choice(_BF16, None),
    "master": Choice(_BF16, {"param": "master", "*": "float32"}),
    "bf16+16": Choice(_BF16, {"param": "bf16+16", "*": "float32"}),
    "kahan": Choice(_BF16, {"param": "kahan", "*": "float32"}),
    "bf16+8": Choice(_BF16, {"param": "bf16+8", "*": "float32"}),
    "bfloat16_sr": Choice(_BF16, {"param": "bfloat16_sr", "*": "float32"}),
    "bf16+16, state int8": Choice(_BF16, {"param": "bf16+16", "*": "int8"}),
    "bf16+8, state int8": Choice(_BF16, {"param": "bf16+8", "*": "int8"}),
    "bfloat16_sr, state int8": Choice(_BF16, {"param": "bfloat16_sr", "*": "int8"}),
}
REPEATED = (PLAIN, BARE, "bf16+16, state int8", "bf16+8, state int8", "bfloat16_sr, state int8")
"""Choices that are trained from all seeds of a task, the others from its first ones."""


# --
# What is trained


class Layer(nn.Module):
    """Attention to what was before, and two linear layers, each behind a norm and with a way around."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    """279,264 parameters. It sees each character with the three before it, and so learns within minutes."""

    def __init__(self, width: int = 96, layers: int = 2, heads: int = 4, length: int = 64) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(128, width), nn.Parameter(torch.zeros(length, width))
        self.near = nn.Conv1d(width, width, 4)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)), nn.LayerNorm(width))
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.embed.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        near = self.near(F.pad(self.embed(x).transpose(1, 2), (3, 0))).transpose(1, 2)
        return F.linear(self.layers(near + self.place[: x.shape[1]]), self.embed.weight)


@cache
def text(*modules: str) -> Tensor:
    """The characters of these modules of the standard library; what is not ASCII is a question mark."""
    folder = Path(os.__file__).parent
    found = "".join((folder / f"{name}.py").read_text("utf-8") for name in modules)
    return torch.tensor(list(found.encode("ascii", "replace")))


TRAIN = (
    "argparse",
    "ast",
    "dataclasses",
    "datetime",
    "enum",
    "inspect",
    "pathlib",
    "shutil",
    "tarfile",
    "zipfile",
)
VALID = ("functools", "textwrap")
Batch = tuple[Tensor, Tensor]


def pieces(steps: int, seed: int, size: int = 16, length: int = 64) -> Iterator[Batch]:
    """Random pieces of the text, and of each character the next."""
    random, all_ = torch.Generator().manual_seed(seed), text(*TRAIN)
    for _ in range(steps):
        where = torch.randint(len(all_) - length, (size, 1), generator=random) + torch.arange(length + 1)
        yield all_[where[:, :-1]], all_[where[:, 1:]]


def unseen(size: int = 128, length: int = 64) -> Batch:
    """As many pieces of the text that is not trained on, next to each other."""
    found = text(*VALID)[: size * length + 1]
    return found[:-1].view(-1, length), found[1:].view(-1, length)


@cache
def digits() -> Digits:
    return Digits.load()


class Task(NamedTuple):
    """A model, its batches for a number of steps and a seed, and what it is validated on every so many steps.

    ``few``: seeds of choices that are not `REPEATED`; ``unit``: what the loss is divided by.
    """

    title: str
    loss: str
    model: Callable[[], nn.Module]
    batches: Callable[[int, int], Iterator[Batch]]
    valid: Callable[[], Batch]
    lr: float
    steps: int
    every: int
    seeds: int
    few: int
    unit: float = 1.0


TASKS = {
    "gpt": Task(
        "a GPT on characters", "bits per character", GPT, pieces, unseen, 2e-3, 500, 50, 3, 1, math.log(2)
    ),
    "digits": Task(
        "a ResNet on digits",
        "cross entropy",
        lambda: resnet((16, 32, 64)),
        lambda steps, seed: digits().batches(math.ceil(steps / 22), 64, seed),
        lambda: (digits().valid_x, digits().valid_y),
        3e-3, 88, 8, 5, 5,
    ),
}  # fmt: skip


# --
# Training


class Point(NamedTuple):
    """A loss on what was not trained on: a line of the CSV."""

    task: str
    choice: str
    seed: int
    step: int
    loss: float


def loss_of(model: nn.Module, batch: Batch, dtype: torch.dtype) -> Tensor:
    x, y = batch
    out = model(x.to(dtype) if x.is_floating_point() else x)
    return F.cross_entropy(out.float().flatten(0, -2), y.flatten())


def train(name: str, choice: str, seed: int, steps: int) -> Iterator[Point]:
    """Losses of validation, the last of them behind the last step."""
    task, (dtype, storage) = TASKS[name], CHOICES[choice]
    torch.manual_seed(seed)
    model = task.model().to(dtype)
    opt = optim.AdamW(model.parameters(), lr=task.lr, weight_decay=0.1, storage=storage)
    for group in opt.param_groups:
        if storage is not None:
            group["storage_seed"] = seed
    for step, batch in zip(range(steps), task.batches(steps, seed), strict=False):
        for group in opt.param_groups:
            group["lr"] = task.lr * one_cycle(step, steps)
        loss_of(model, batch, dtype).backward()
        opt.step()
        opt.zero_grad()
        if (step + 1) % task.every == 0 or step + 1 == steps:
            model.eval()
            with torch.no_grad():
                found = loss_of(model, task.valid(), dtype).item() / task.unit
            model.train()
            yield Point(name, choice, seed, step + 1, found)
    said = opt.explain()
    if said.eager:
        raise RuntimeError(f"{choice}: {said.eager[0]}")


def trained(tasks: Sequence[str], share: float = 1.0) -> list[Point]:
    """All tasks, choices and seeds; seed by seed, so that what is cut off is whole."""
    todo = [
        (t, c, s)
        for t in tasks
        for s in range(TASKS[t].seeds)
        for c in CHOICES
        if s < TASKS[t].few or c in REPEATED
    ]
    found: list[Point] = []
    for task, choice, seed in tqdm(todo, mininterval=0.1 if sys.stderr.isatty() else 20, ncols=80):
        found += train(task, choice, seed, max(1, round(TASKS[task].steps * share)))
    return found


# --
# What is written


def last(points: Sequence[Point], task: str, choice: str) -> dict[int, float]:
    """The losses in the end, by seed."""
    mine = [p for p in points if (p.task, p.choice) == (task, choice)]
    end = max(p.step for p in mine)
    return {p.seed: p.loss for p in mine if p.step == end}


def beside(points: Sequence[Point], task: str, choice: str) -> tuple[float, float]:
    """The mean of what its losses are above float32's from the same seeds, and the standard error; NaN of one."""
    ours, theirs = last(points, task, choice), last(points, task, PLAIN)
    apart = [ours[seed] - theirs[seed] for seed in ours]
    return statistics.mean(apart), _stdev(apart) / math.sqrt(len(apart))


def _stdev(x: Sequence[float]) -> float:
    return statistics.stdev(x) if len(x) > 1 else math.nan


def held(choice: str) -> str:
    """Bytes of parameter and state for each element, in tensors that are large enough for blocks."""
    p = nn.Parameter(torch.zeros(1 << 16, dtype=CHOICES[choice].dtype))
    p.grad = torch.zeros_like(p)
    opt = optim.AdamW([p], storage=CHOICES[choice].storage)
    opt.step()
    kept = [p.detach(), *(v for v in opt.state[p].values() if isinstance(v, Tensor))]
    return f"{sum(v.numel() * v.element_size() for v in kept) / p.numel():.3g}"


TEXT = """# Training with storage in fewer bytes

Written by `python -m benchmarks.storage_curves`: AdamW on {tasks}.
Losses are of data that was not trained on, behind the last step. A choice's seeds have the weights and the batches of
float32's, and *beside float32* is the mean of the differences, seed by seed, with the standard error of that mean; the
*spread* is the standard deviation between seeds. Without these, it is one seed.

Choices that begin with float32 are of parameters in float32; models of all others are bfloat16, and compute in it.
*{bare}* has its state in bfloat16 too, and no policy. Bytes are of parameter and state, for each element of
tensors that are large enough for blocks.

![Losses in training, and in the end](images/storage_curves.png)

"""


def table(points: Sequence[Point], where: dict[str, str]) -> str:
    """The document."""
    tasks = [t for t in TASKS if any(p.task == t for p in points)]
    said = " and ".join(
        f"{TASKS[t].title} ({sum(p.numel() for p in TASKS[t].model().parameters()):,} parameters, "
        f"{TASKS[t].steps} steps, {TASKS[t].seeds} seeds)"
        for t in tasks
    )
    columns = [f"{TASKS[t].title}: {TASKS[t].loss} | spread | beside float32" for t in tasks]
    lines = [TEXT.format(tasks=said, bare=BARE), f"| parameters, state | bytes | {' | '.join(columns)} |\n"]
    lines.append("|---" * (2 + 3 * len(tasks)) + "|\n")
    for choice in CHOICES:
        cells = [choice, held(choice)]
        for task in tasks:
            ends, (apart, error) = [*last(points, task, choice).values()], beside(points, task, choice)
            cells += [f"{statistics.mean(ends):.4f}", _cell(_stdev(ends))]
            cells.append("" if choice == PLAIN else f"{apart:+.4f}{_cell(error, ' ± ')}")
        lines.append(f"| {' | '.join(cells)} |\n")
    facts_ = (
        f"{where['date']}, commit {where['commit']}, {where['device']}, torch {where['torch']}, one thread"
    )
    return "".join([*lines, f"\n{facts_}, {where['minutes']} minutes.\n"])


def _cell(x: float, before: str = "") -> str:
    return "" if math.isnan(x) else f"{before}{x:.4f}"


COLOURS = {
    PLAIN: "black",
    BARE: "#d1352b",
    "bf16+8, state int8": "#3b7dd8",
    "bf16+16, state int8": "#2a9d5c",
    "bfloat16_sr, state int8": "#f2a134",
}
"""Of the choices whose curves are drawn, which have all seeds; the ends of all others are grey."""


def draw(points: Sequence[Point], path: Path) -> None:
    """A row for each task: curves of some choices, and where all seeds of all choices end beside float32's."""
    tasks = [t for t in TASKS if any(p.task == t for p in points)]
    figure = Figure(figsize=(12, 4.4 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False, width_ratios=(1, 1.15))
    for (left, right), task in zip(axes, tasks, strict=True):
        _draw_curves(left, [p for p in points if p.task == task], TASKS[task])
        _draw_ends(right, points, task)
    axes[0][0].legend(fontsize=10)
    figure.suptitle("AdamW whose parameters and state are stored in fewer bytes", fontsize=14)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_curves(axis: Any, points: Sequence[Point], task: Task) -> None:
    for choice, colour in COLOURS.items():
        mine = [p for p in points if p.choice == choice]
        steps = sorted({p.step for p in mine})
        mean = [statistics.mean(p.loss for p in mine if p.step == s) for s in steps]
        how = dict(linewidth=3.5, alpha=0.5) if choice == PLAIN else dict(linewidth=1.6)
        axis.plot(steps, mean, color=colour, label=choice, marker=".", **how)
    axis.set(
        title=f"{task.title}: mean of {task.seeds} seeds", xlabel="step", ylabel=f"validation, {task.loss}"
    )
    if task.unit == 1:  # losses that become ten times smaller
        axis.set_yscale("log")
    axis.grid(alpha=0.25, which="both")


def _draw_ends(axis: Any, points: Sequence[Point], task: str) -> None:
    names = [c for c in CHOICES if c != PLAIN][::-1]
    plain = last(points, task, PLAIN)
    spread = _stdev([*plain.values()])
    axis.axvspan(
        -spread, spread, color="black", alpha=0.08, linewidth=0, label="float32: spread between seeds"
    )
    axis.axvline(0, color="black", linewidth=1)
    for y, choice in enumerate(names):
        ends, colour = last(points, task, choice), COLOURS.get(choice, "#777777")
        apart = [ends[seed] - plain[seed] for seed in ends]
        axis.plot(apart, [y] * len(apart), "o", color=colour, markersize=5, alpha=0.6)
        axis.plot([statistics.mean(apart)] * 2, [y - 0.33, y + 0.33], color=colour, linewidth=2.4)
    axis.set_yticks(range(len(names)), [f"{n}  ({held(n)} B)" for n in names], fontsize=9)
    axis.set(
        title="in the end: each seed beside float32's, and the mean",
        xlabel=f"validation, difference in {TASKS[task].loss}; left is better",
    )
    axis.legend(fontsize=8, loc="upper right")
    axis.set_ylim(-0.7, len(names) + 0.4)
    axis.grid(alpha=0.25)


def write(points: Sequence[Point], where: dict[str, str]) -> None:
    """The CSV: points, and the columns that say what they belong to."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Point._fields, *where])
        writer.writerows([*p[:-1], f"{p.loss:.5f}", *where.values()] for p in points)


def read() -> tuple[list[Point], dict[str, str]]:
    with RESULTS.open(newline="", encoding="utf-8") as file:
        lines = [*csv.DictReader(file)]
    points = [Point(d["task"], d["choice"], int(d["seed"]), int(d["step"]), float(d["loss"])) for d in lines]
    return points, {k: v for k, v in lines[0].items() if k not in Point._fields}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.storage_curves", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument(
        "--draw", action="store_true", help="table and picture, from what was measured before"
    )
    parser.add_argument("--tasks", nargs="*", choices=[*TASKS], default=[*TASKS])
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.draw:
        where, begin = facts(), time.perf_counter()
        check_clean(where["commit"], remedy="leave it")
        points = trained(given.tasks)
        where["minutes"] = f"{(time.perf_counter() - begin) / 60:.0f}"
        write(points, where)
    points, where = read()
    TABLE.write_text(table(points, where), encoding="utf-8")
    draw(points, PICTURE)


if __name__ == "__main__":
    main()
