"""The main job: a small ResNet on real handwritten digits, five update rules, each by four implementations.

``python -m benchmarks.demo`` trains along the arc of chapter 16 of the fastai book: SGD, momentum, RMSProp, Adam, and
Adam with decoupled weight decay. Each rule is run by

- ``eager``: fusedopt's callbacks in a plain loop, parameter by parameter, as fastai runs them;
- ``torch``: the optimizer of torch.optim with the same rule, as it comes;
- ``torch fused``: the same with ``fused=True``, where torch has that;
- ``fusedopt``: the same callbacks as ``eager``, compiled into one kernel.

All of them start from the same weights, see the same batches and follow the same learning rate schedule. They take
turns, batch by batch, so what else the machine does meets all alike; an optimizer's step is timed between a real
backward pass and the next forward pass.

Beside the rules there are classes that were written elsewhere, pytorch-optimizer's Lion and Adan: as they are, and with
their ``step`` run by ``fusedopt.fuse``.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_optimizer
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import fusedopt

from .eager import EagerOptimizer
from .timing import Stopwatch, machine

NAMES = ("eager", "torch", "torch fused", "fusedopt")
NUDGED = "eager, nudged"
"""The control: eager callbacks, and after every step some of the weights move to the next float."""
NUDGE_EVERY = 200
"""Which weights these are: about as many as fusedopt and torch round differently in a step."""
EARLY = 10
"""How many steps "at first" is."""

# --
# The data, the model


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits: 1,797 images of 8x8 pixels, scaled to [0, 1]; one in five is for validation."""

    train_x: Tensor
    train_y: Tensor
    valid_x: Tensor
    valid_y: Tensor

    @classmethod
    def load(cls, seed: int = 0) -> Digits:
        pixels, labels = load_digits(return_X_y=True)
        x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        y = torch.tensor(labels)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        valid, train = order[: len(x) // 5], order[len(x) // 5 :]
        return cls(x[train], y[train], x[valid], y[valid])

    def batches(self, epochs: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled whole batches, the same for everybody who asks with the same seed."""
        random = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(self.train_x), generator=random)
            for chosen in order[: len(order) // size * size].split(size):
                yield self.train_x[chosen], self.train_y[chosen]


class Block(nn.Module):
    """Two 3x3 convolutions with batchnorm, and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.around: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            around = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.around = nn.Sequential(around, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.around(x))


def resnet(widths: Sequence[int], blocks: int = 2, classes: int = 10) -> nn.Sequential:
    """A stem and, for each width, a stage of blocks; each stage after the first halves the image."""
    layers: list[nn.Module] = [
        nn.Conv2d(1, widths[0], 3, 1, 1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
    ]
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(Block(inputs, width, stride=2 if stage and not block else 1))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


# --
# The rules


@dataclass(frozen=True)
class Rule:
    """An update rule and who has it: with these arguments fusedopt and torch.optim do the same thing."""

    name: str
    fusedopt: Callable[..., fusedopt.Optimizer]
    torch: Callable[..., torch.optim.Optimizer]
    has_torch_fused: bool = True

    def makers(self) -> dict[str, Callable[[list[Tensor]], Any]]:
        """For each implementation, what makes its optimizer for some parameters."""
        all_ = {
            "eager": lambda params: EagerOptimizer.like(self.fusedopt(params)),
            "torch": self.torch,
            "torch fused": partial(self.torch, fused=True),
            "fusedopt": self.fusedopt,
        }
        return {name: all_[name] for name in NAMES if name != "torch fused" or self.has_torch_fused}


_ADAM = dict(lr=3e-3, mom=0.9, sqr_mom=0.99, eps=1e-5)
_TORCH_ADAM = dict(lr=3e-3, betas=(0.9, 0.99), eps=1e-5)
RULES = (
    Rule("SGD", partial(fusedopt.SGD, lr=0.1), partial(torch.optim.SGD, lr=0.1)),
    Rule(
        "momentum",
        partial(fusedopt.SGD, lr=0.03, mom=0.9),
        partial(torch.optim.SGD, lr=0.03, momentum=0.9),
    ),
    Rule(
        "RMSProp",
        partial(fusedopt.RMSProp, lr=1e-3, sqr_mom=0.99),
        partial(torch.optim.RMSprop, lr=1e-3, alpha=0.99),
        has_torch_fused=False,
    ),
    Rule("Adam", partial(fusedopt.Adam, wd=0.0, **_ADAM), partial(torch.optim.Adam, **_TORCH_ADAM)),
    Rule(
        "AdamW",
        partial(fusedopt.Adam, wd=0.1, **_ADAM),
        partial(torch.optim.AdamW, weight_decay=0.1, **_TORCH_ADAM),
    ),
)

CLASSES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Lion": partial(pytorch_optimizer.Lion, lr=3e-4, weight_decay=0.1),
    "Adan": partial(pytorch_optimizer.Adan, lr=3e-3, weight_decay=0.02),
}
"""Optimizers of others, for `fusedopt.fuse`."""
OWN, FUSED = "as it is", "fused"

# --
# Training


@dataclass(frozen=True)
class Settings:
    """How much to train; the defaults are the demo, smaller ones the test.

    One thread, because two gain nothing on a model this small, and wait for each other for most of the time as soon as
    the machine has something else to do.
    """

    epochs: int = 4
    batch_size: int = 64
    widths: tuple[int, ...] = (16, 32, 64)
    steps: int | None = None
    threads: int = 1
    seed: int = 0
    out: Path = Path("demo_output")

    @property
    def total(self) -> int:
        """Steps that each implementation takes."""
        per_epoch = (1797 - 1797 // 5) // self.batch_size
        return min(self.epochs * per_epoch, self.steps or sys.maxsize)


@dataclass
class Run:
    """One implementation at work on its own copy of the model."""

    model: nn.Module
    optimizer: Any
    losses: list[float] = field(default_factory=list)
    watch: Stopwatch = field(default_factory=Stopwatch)

    @classmethod
    def start(cls, model: nn.Module, make: Callable[[list[Tensor]], Any]) -> Run:
        """A run on a copy of the model, with the optimizer that ``make`` makes for it."""
        own = copy.deepcopy(model)
        return cls(own, make(list(own.parameters())))

    def step(self, x: Tensor, y: Tensor, warmth: float) -> None:
        """One batch, at ``warmth`` times the learning rate it was made with; only the optimizer's step is timed."""
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * warmth
        with self.watch.time():
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    @torch.no_grad()
    def accuracy(self, digits: Digits) -> float:
        """Percent of the validation images it gets right."""
        self.model.eval()
        right = self.model(digits.valid_x).argmax(1) == digits.valid_y
        return right.float().mean().item() * 100


@dataclass
class Result:
    """What came of one rule: values per implementation.

    ``first_step``: largest difference between any weight of eager and of fusedopt after one step, when both still had
    the same gradients. ``start``: milliseconds of fusedopt's first step, which traces and compiles.
    """

    rule: Rule
    accuracy: dict[str, float]
    ms: dict[str, float]
    losses: dict[str, list[float]]
    first_step: float
    start: float
    optimizer: fusedopt.Optimizer

    def speed_up(self, over: str) -> float:
        """How many of fusedopt's steps fit into one of the other's; NaN where there is none."""
        return self.ms.get(over, math.nan) / self.ms["fusedopt"]

    def gap(self, a: str, b: str, steps: int | None = None) -> float:
        """The largest difference between two loss curves over the first ``steps`` steps."""
        pairs = list(zip(self.losses[a], self.losses[b], strict=True))[:steps]
        return max(abs(x - y) for x, y in pairs)


def one_cycle(step: int, total: int) -> float:
    """A fraction of the peak learning rate: up along a line for a quarter of the steps, down along a cosine."""
    top = max(1, total // 4)
    if step < top:
        return (step + 1) / top
    return 0.5 * (1 + math.cos(math.pi * (step - top + 1) / max(1, total - top)))


def train(rule: Rule, model: nn.Module, digits: Digits, settings: Settings) -> Result:
    """Train every implementation of a rule, and the control, in turns."""
    makers = rule.makers()
    runs = {name: Run.start(model, make) for name, make in makers.items()}
    runs[NUDGED] = Run.start(model, makers["eager"])
    for step in _in_turns(rule.name, list(runs.values()), digits, settings):
        nudge(runs[NUDGED].model, step)
        if step == 0:
            first_step = distance(runs["eager"].model, runs["fusedopt"].model)
    return Result(
        rule,
        {name: runs[name].accuracy(digits) for name in makers},
        {name: runs[name].watch.median for name in makers},
        {name: run.losses for name, run in runs.items()},
        first_step,
        runs["fusedopt"].watch.samples[0] * 1e3,
        runs["fusedopt"].optimizer,
    )


def _in_turns(name: str, turn: list[Run], digits: Digits, settings: Settings) -> Iterator[int]:
    """Let all of them take every step, each time beginning with another one; yields its number behind each."""
    batches = digits.batches(settings.epochs, settings.batch_size, settings.seed)
    for step, (x, y) in zip(_progress(settings.total, name), batches, strict=False):
        for run in turn[step % len(turn) :] + turn[: step % len(turn)]:
            run.step(x, y, one_cycle(step, settings.total))
        yield step


@dataclass
class ClassResult:
    """What came of a class of others: its own step, and the same in fused kernels."""

    name: str
    accuracy: dict[str, float]
    ms: dict[str, float]
    losses: dict[str, list[float]]
    optimizer: Any

    def gap(self, steps: int | None = None) -> float:
        """The largest difference between the two loss curves over the first ``steps`` steps."""
        pairs = list(zip(self.losses[OWN], self.losses[FUSED], strict=True))[:steps]
        return max(abs(x - y) for x, y in pairs)


def train_class(name: str, model: nn.Module, digits: Digits, settings: Settings) -> ClassResult:
    """Train with a class of others as it is, and fused, in turns."""
    make = CLASSES[name]
    runs = {OWN: Run.start(model, make), FUSED: Run.start(model, fusedopt.fuse(make))}
    for _ in _in_turns(name, list(runs.values()), digits, settings):
        pass
    return ClassResult(
        name,
        {k: run.accuracy(digits) for k, run in runs.items()},
        {k: run.watch.median for k, run in runs.items()},
        {k: run.losses for k, run in runs.items()},
        runs[FUSED].optimizer,
    )


@torch.no_grad()
def nudge(model: nn.Module, step: int) -> None:
    """Move one weight in NUDGE_EVERY to the next float; other weights at another step."""
    for p in model.parameters():
        some = p.view(-1)[step % NUDGE_EVERY :: NUDGE_EVERY]
        some.copy_(torch.nextafter(some, some + 1))


@torch.no_grad()
def distance(a: nn.Module, b: nn.Module) -> float:
    """The largest difference between two models' parameters."""
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def _progress(total: int, name: str) -> tqdm:
    """A progress bar; where nobody watches it move, it only reports now and then."""
    every = 0.1 if sys.stderr.isatty() else 10
    return tqdm(range(total), desc=f"{name:<8}", unit="batch", mininterval=every, ncols=80)


# --
# What it prints


def table(results: Sequence[Result]) -> str:
    """The one table: accuracy, time of a step, and how much faster fusedopt is than each of the others."""
    others = NAMES[:-1]
    head = ["rule", *NAMES, *NAMES, *others]
    rows = [
        [r.rule.name]
        + [_number(r.accuracy.get(n), 1) for n in NAMES]
        + [_number(r.ms.get(n), 2) for n in NAMES]
        + [_number(r.speed_up(n), 2) for n in others]
        for r in results
    ]
    width, lines = _aligned([head, *rows])
    groups = (
        ("", 0, 1),
        ("accuracy, %", 1, 5),
        ("optimizer step, ms (median)", 5, 9),
        ("speed-up of fusedopt over", 9, 12),
    )
    spans = [text.center(sum(width[a:b]) + 2 * (b - a - 1), "-" if text else " ") for text, a, b in groups]
    return "\n".join(["  ".join(spans), *lines])


def _aligned(rows: list[list[str]]) -> tuple[list[int], list[str]]:
    """The widths of a table's columns, and its lines."""
    width = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(w) if k else cell.ljust(w) for k, (cell, w) in enumerate(zip(row, width, strict=True))
        )
        for row in rows
    ]
    return width, lines


def _number(x: float | None, digits: int) -> str:
    return "-" if x is None or math.isnan(x) else f"{x:.{digits}f}"


PAIRS = (("fusedopt", "eager"), ("fusedopt", "torch"), (NUDGED, "eager"))

MEANING = f"""\
fusedopt rounds after every operation, on every backend alike; torch's CPU kernels round a multiply-add once. So some
weights differ in the last bit after a step from the same gradients, and training amplifies that as it does any
disturbance. How much is the network's doing, the last column shows: eager callbacks against themselves, one weight
in {NUDGE_EVERY} moved to the next float after every step. A wrong rule would stand out in the first steps."""


def differences(results: Sequence[Result]) -> str:
    """How far loss curves of one rule are apart, at first and in the end, and what that means."""
    total = len(results[0].losses["fusedopt"])
    early = min(EARLY, total)
    lines = [
        f"Largest difference between two loss curves over the first {early} and over all {total} steps",
        f"{'rule':<8}  " + "  ".join(f"{f'{a} - {b}':>21}" for a, b in PAIRS),
    ]
    for r in results:
        cells = [f"{r.gap(a, b, early):.1e}  {r.gap(a, b):.1e}" for a, b in PAIRS]
        lines.append(f"{r.rule.name:<8}  " + "  ".join(f"{c:>21}" for c in cells))
    for b in ("eager", "torch"):
        at_first, whole = (max(r.gap("fusedopt", b, n) for r in results) for n in (early, None))
        lines.append(
            f"Largest of all, fusedopt against {b}: {at_first:.1e} at first, {whole:.1e} in the whole run."
        )
    weights = max(r.first_step for r in results)
    lines.append(
        f"Largest difference of a weight after the first step, fusedopt against eager: {weights:.1e}."
    )
    return "\n".join([*lines, MEANING])


def classes(results: Sequence[ClassResult]) -> str:
    """Classes of others, as they are and fused."""
    total = len(results[0].losses[OWN])
    early = min(EARLY, total)
    title = "Classes of pytorch-optimizer: their own step, and the same run by fusedopt.fuse"
    head = ["class", "accuracy, %: own", "fused", "ms (median): own", "fused", "speed-up", "launches"]
    head += [f"losses apart: first {early}", f"all {total}"]
    rows = [
        [
            r.name,
            *(_number(r.accuracy[k], 1) for k in (OWN, FUSED)),
            *(_number(r.ms[k], 2) for k in (OWN, FUSED)),
            _number(r.ms[OWN] / r.ms[FUSED], 2),
            str(r.optimizer.explain().launches),
            f"{r.gap(early):.1e}",
            f"{r.gap():.1e}",
        ]
        for r in results
    ]
    return "\n".join([title, *_aligned([head, *rows])[1]])


def compiled(results: Sequence[Result]) -> str:
    """How many kernels that took, and how long."""
    kernels = [k for r in results for k in r.optimizer.explain().compiled]
    new = sum(not k.cached for k in kernels)
    starts = [r.start for r in results]
    return (
        f"Kernels: {len(kernels)} for {len(results)} rules, though the learning rate changed at every step; "
        f"{new} compiled now, {len(kernels) - new} from the cache.\n"
        f"First steps of fusedopt, tracing and compiling included: {min(starts):.0f} to {max(starts):.0f} ms."
    )


def kernel(result: Result) -> str:
    """What a rule ran as: the explanation and the generated source."""
    opt = result.optimizer
    source = opt.kernel_source() or "(no kernel: the callbacks ran eagerly)"
    return f"{result.rule.name} as fusedopt ran it\n{opt.explain()}\n\n{source}"


# --
# What it draws


def draw(results: Sequence[Result], path: Path) -> None:
    """Loss curves of every rule, eager and torch below fusedopt's dashes, and how far they are apart."""
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, result in zip(axes.flat, results, strict=False):
        _draw_losses(axis, result)
    axes.flat[0].legend()
    for axis in axes.flat[len(results) + 1 :]:
        axis.set_visible(False)
    if len(results) < axes.size:
        _draw_gaps(axes.flat[len(results)], results)
    figure.suptitle("Training loss on scikit-learn's digits: the same rule, run by different implementations")
    figure.savefig(path, dpi=110)


def _draw_losses(axis: Any, result: Result) -> None:
    style = {
        "eager": dict(color="#f2b134", linewidth=6, alpha=0.55, label="eager callbacks"),
        "torch": dict(color="#3b7dd8", linewidth=2.4, label="torch.optim"),
        "fusedopt": dict(color="black", linewidth=1.1, linestyle=(0, (4, 3)), label="fusedopt"),
    }
    for name, how in style.items():
        axis.plot(range(1, len(result.losses[name]) + 1), result.losses[name], **how)
    axis.set(title=result.rule.name, xlabel="step", ylabel="cross entropy", yscale="log")
    axis.grid(alpha=0.25)


FLOOR = 3e-8
"""Where a difference of zero is drawn."""


def _draw_gaps(axis: Any, results: Sequence[Result]) -> None:
    for k, result in enumerate(results):
        for name, line in (("fusedopt", "-"), (NUDGED, ":")):
            gaps = [abs(x - y) for x, y in zip(result.losses[name], result.losses["eager"], strict=True)]
            label = result.rule.name if line == "-" else None
            gaps = [max(gap, FLOOR) for gap in gaps]
            axis.plot(range(1, len(gaps) + 1), gaps, line, color=f"C{k}", linewidth=1.3, label=label)
    axis.set(xlabel="step", yscale="log")
    axis.set_title("|loss − eager's|: fusedopt solid, control dotted", fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right", ncols=2)


# --
# The job


def run(settings: Settings, rules: Sequence[Rule]) -> list[Result]:
    """Train, print and draw everything."""
    settings.out.mkdir(parents=True, exist_ok=True)  # at once: it may be refused
    torch.set_num_threads(settings.threads)
    digits = Digits.load(settings.seed)
    torch.manual_seed(settings.seed)
    model = resnet(settings.widths)
    sizes = [p.numel() for p in model.parameters()]
    print(f"machine: {machine()}")
    print(
        f"data: {len(digits.train_x)} images of handwritten digits to train on, {len(digits.valid_x)} to validate;\n"
        f"model: a ResNet of {sum(sizes):,} parameters in {len(sizes)} tensors; "
        f"{settings.total} batches of {settings.batch_size}",
        flush=True,
    )
    results = [train(rule, model, digits, settings) for rule in rules]
    others = [train_class(name, model, digits, settings) for name in CLASSES]
    path = settings.out / "loss_curves.png"
    draw(results, path)
    shown = next((r for r in results if r.rule.name == "Adam"), results[-1])
    print(f"\n{table(results)}\n\n{differences(results)}\n\n{classes(others)}\n\nLoss curves: {path}")
    print(f"{compiled(results)}\n\n{kernel(shown)}")
    return results


def _count(text: str) -> int:
    """A whole number from 1 on, as an argument."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and do the job."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Settings.out, help="folder for the picture (%(default)s)")
    parser.add_argument(
        "--epochs", type=_count, default=Settings.epochs, help="epochs of training (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=Settings.seed, help="of split, weights and batches (%(default)s)"
    )
    parser.add_argument("--steps", type=_count, help="stop after this many steps")
    parser.add_argument("--threads", type=_count, default=Settings.threads, help="torch's (%(default)s)")
    given = parser.parse_args(arguments)
    run(
        Settings(
            epochs=given.epochs, steps=given.steps, threads=given.threads, seed=given.seed, out=given.out
        ),
        RULES,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
