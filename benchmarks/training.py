"""The optimizer's share of a whole training step: ``python -m benchmarks.training`` writes docs/training_table.md.

A small CNN on scikit-learn's digits, a small GPT and a small vision transformer of timm train with AdamW: torch's as it
comes, torch's fused, and fusedopt's. Each has a copy of the model and the same batches, and takes a step in turn, in an
order that is shuffled each time; passes (forward, loss, backward) and the optimizer's step are timed apart.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedopt.optim

from .plot import ROOT, NotOneState, check_clean, facts
from .timing import machine

TABLE = ROOT / "docs" / "training_table.md"
Batches = Iterator[tuple[Tensor, Tensor]]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch": torch.optim.AdamW,
    "torch fused": partial(torch.optim.AdamW, fused=True),
    "fusedopt": fusedopt.optim.AdamW,
}


@dataclass(frozen=True)
class Model:
    """What is trained. ``batches`` gives inputs and classes without end; ``needs``: modules beside torch."""

    name: str
    make: Callable[[], nn.Module]
    batches: Callable[[], Batches]
    needs: tuple[str, ...] = ()


def digits_cnn() -> nn.Module:
    from .demo import resnet

    return resnet((16, 32, 64))


def digits() -> Batches:
    from .demo import Digits

    return Digits.load().batches(epochs=1000, size=64, seed=0)


def gpt() -> nn.Module:
    from .release import GPT

    return GPT()


def words() -> Batches:
    gen = torch.Generator().manual_seed(0)
    while True:
        x = torch.randint(4096, (4, 65), generator=gen)
        yield x[:, :-1], x[:, 1:].flatten()


def vit() -> nn.Module:
    from . import torchvision_ops  # noqa: F401, I001  before timm, which imports torchvision
    from timm.models import create_model

    return create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10)


def images() -> Batches:
    gen = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(8, 3, 32, 32, generator=gen), torch.randint(10, (8,), generator=gen)


MODELS = (
    Model("ResNet on digits, batches of 64", digits_cnn, digits, ("sklearn", "pytorch_optimizer")),
    Model("GPT, 4 × 64 tokens", gpt, words),
    Model("ViT-tiny of timm, 8 images of 32 × 32", vit, images, ("timm",)),
)


# --
# Training in turns


@dataclass
class Run:
    """A model with its optimizer: losses, and seconds of passes and of the optimizer's steps."""

    model: nn.Module
    opt: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def train(self, x: Tensor, y: Tensor) -> None:
        self.opt.zero_grad()
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(x).flatten(0, -2), y)
        loss.backward()
        between = time.perf_counter()
        self.opt.step()
        self.steps.append(time.perf_counter() - between)
        self.passes.append(between - start)
        self.losses.append(loss.item())


COMPARED, WARM = 3, 5
"""Steps after which losses must still be alike, and steps that are not in the medians."""


def measure(model: Model, seconds: float, least: int = 20) -> dict[str, Run]:
    """Train by every optimizer. Raises AssertionError if they do not do the same."""
    torch.manual_seed(0)
    start = model.make()
    runs = {}
    for name, make in OPTIMIZERS.items():
        own = copy.deepcopy(start)
        runs[name] = Run(own, make(own.parameters(), lr=1e-4, weight_decay=0.01))
    batches, order, shuffle = model.batches(), list(runs.values()), random.Random(0)
    stop = time.perf_counter() + seconds
    while len(order[0].steps) < WARM + least or time.perf_counter() < stop:
        x, y = next(batches)
        shuffle.shuffle(order)
        for run in order:
            torch.manual_seed(0)  # of dropout
            run.train(x, y)
    for name, run in runs.items():
        for loss, expected in zip(run.losses[:COMPARED], runs["torch"].losses, strict=False):
            assert abs(loss - expected) <= 1e-4 * abs(expected), (
                f"{name} trains to {loss}, torch to {expected}"
            )
    return runs


# --
# The table


@dataclass(frozen=True)
class Row:
    """A model's numbers: milliseconds of passes, and by optimizer of steps."""

    name: str
    tensors: int
    numel: int
    passes: float
    steps: dict[str, float]

    @classmethod
    def of(cls, model: Model, runs: dict[str, Run]) -> Row:
        params = [*runs["torch"].model.parameters()]
        passes = statistics.median(s for run in runs.values() for s in run.passes[WARM:]) * 1e3
        steps = {name: statistics.median(run.steps[WARM:]) * 1e3 for name, run in runs.items()}
        return cls(model.name, len(params), sum(p.numel() for p in params), passes, steps)

    def share(self, name: str) -> float:
        """Of a training step, in percent."""
        return 100 * self.steps[name] / (self.passes + self.steps[name])


def table(rows: Sequence[Row], left_out: dict[str, str], where: str) -> str:
    """The page."""
    head = ["model", "tensors", "parameters", "passes, ms", *(f"{n}, ms" for n in OPTIMIZERS)]
    head += [f"share: {n}" for n in OPTIMIZERS]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row.name, f"{row.tensors}", f"{row.numel / 1e6:.2f} M", f"{row.passes:.3g}"]
        cells += [f"{row.steps[n]:.3g}" for n in OPTIMIZERS] + [f"{row.share(n):.1f} %" for n in OPTIMIZERS]
        lines.append("| " + " | ".join(cells) + " |")
    missing = "".join(f"Left out: {name}, because {why}.\n" for name, why in left_out.items())
    return "\n".join([
        "# The optimizer's share of a training step",
        "",
        "Written by `python -m benchmarks.training`. AdamW in float32; medians of steps that the optimizers",
        "took in turns, each on a copy of the model. *Passes* are forward, loss and backward; a share is the",
        "step's part of passes and step.",
        "",
        *lines,
        "",
        missing + where,
    ]) + "\n"  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__.partition("\n")[0]
    )  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=TABLE, help="where to write the table")
    parser.add_argument("--seconds", type=float, default=20, help="for each model")
    given = parser.parse_args(arguments)
    before = facts()
    try:
        if given.out.resolve() == TABLE:
            check_clean(before["commit"], remedy="--out FILE writes elsewhere")
        rows, left_out = [], {}
        for model in MODELS:
            missing = [name for name in model.needs if importlib.util.find_spec(name) is None]
            if missing:
                left_out[model.name] = f"there is no {' and no '.join(missing)}"
                continue
            rows.append(Row.of(model, measure(model, given.seconds)))
            said = ", ".join(
                f"{n} {ms:.3g} ms ({rows[-1].share(n):.1f} %)" for n, ms in rows[-1].steps.items()
            )
            print(f"{model.name}: passes {rows[-1].passes:.3g} ms; {said}", flush=True)
        if given.out.resolve() == TABLE:
            check_clean(facts()["commit"], [before["commit"]], remedy="--out FILE writes elsewhere")
    except NotOneState as error:
        print(f"{TABLE.relative_to(ROOT)} is of one commit: {error}", file=sys.stderr)
        return 1
    given.out.write_text(table(rows, left_out, f"{machine()}; commit {before['commit']}."), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
