"""Chapter 16's four runs with fusedopt's own Learner: SGD, momentum, RMSProp and Adam on the same net and data.

Each is a list of fusedopt's callbacks, run from the same weights on the same batches: SGD at a flat learning rate, the
others with one cycle, as in the chapter. (``book_ch16_optimizers.py`` is about writing such callbacks, with fastai.)

    python examples/learner_ch16_runs.py --out demo_output
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from digits_cnn import cnn, digits
from matplotlib.figure import Figure
from momentum_pictures import save
from torch import nn

import fusedopt
from fusedopt import callbacks as cbs
from fusedopt.learner import Learner, accuracy


@dataclass(frozen=True)
class Recipe:
    """An update rule, and the learning rate that suits it."""

    name: str
    cbs: tuple[Callable, ...]
    lr: float
    one_cycle: bool = True


RECIPES = (
    Recipe("SGD", (cbs.sgd_step,), lr=0.03, one_cycle=False),
    Recipe("momentum", (cbs.average_grad, cbs.momentum_step), lr=0.03),
    Recipe("RMSProp", (cbs.average_sqr_grad, cbs.rms_prop_step), lr=1e-3),
    Recipe(
        "Adam",
        (partial(cbs.average_grad, dampening=True), cbs.average_sqr_grad, cbs.step_stat, cbs.adam_step),
        lr=5e-3,
    ),
)


@dataclass(frozen=True)
class Run:
    """What one training came to."""

    name: str
    losses: list[float]
    """One per batch, smoothed."""
    lrs: list[float]
    accuracies: list[float]
    """One per epoch."""


def train(recipe: Recipe, epochs: int, width: int) -> Run:
    """From the same weights, on the same batches, whatever the recipe."""
    torch.manual_seed(16)
    opt_func = partial(fusedopt.Optimizer, cbs=list(recipe.cbs))
    learn = Learner(digits(), cnn(width), nn.CrossEntropyLoss(), opt_func, metrics=accuracy)
    with learn.no_logging():
        (learn.fit_one_cycle if recipe.one_cycle else learn.fit)(epochs, recipe.lr)
    column = learn.recorder.metric_names.index("accuracy") - 1  # the epoch's number is not among the values
    return Run(
        recipe.name,
        [float(loss) for loss in learn.recorder.losses],
        list(learn.recorder.lrs),
        [row[column] for row in learn.recorder.values],
    )


def draw(runs: Iterable[Run]) -> Figure:
    """Smoothed losses, accuracies and learning rates."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    losses, accuracies, lrs = figure.subplots(1, 3)
    for run in runs:
        losses.plot(run.losses, label=run.name)
        accuracies.plot(range(1, len(run.accuracies) + 1), [100 * a for a in run.accuracies], marker=".")
        lrs.plot(run.lrs)
    losses.set(title="training loss, smoothed", xlabel="batch", yscale="log")
    accuracies.set(title="accuracy in %", xlabel="epoch", ylim=(80, 100))
    lrs.set(title="learning rate", xlabel="batch", yscale="log", ylim=(1e-5, 0.1))
    losses.legend()
    return figure


def main(epochs: int = 6, width: int = 16, out: Path | None = None) -> list[Run]:
    """Train every recipe, print what it came to, save ch16_runs.png in `out` if that is given."""
    runs = [train(recipe, epochs, width) for recipe in RECIPES]
    print(f"{'rule':10}{'loss':>8}{'accuracy in %':>16}")
    for run in runs:
        print(f"{run.name:10}{run.losses[-1]:8.3f}{100 * run.accuracies[-1]:16.2f}")
    if out is not None:
        save(draw(runs), out / "ch16_runs.png")
    return runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # for images this small, a second thread costs more than it does
    main(epochs=arguments.epochs, out=arguments.out)
