"""The training process, after chapter 16 of "Deep Learning for Coders": update rules built up from small callbacks.

The baseline is a ready-made SGD. Then the same rule, momentum, RMSProp and Adam are put together from the callbacks
below, as ``partial(Optimizer, cbs=[...])``, once with fusedopt's Optimizer and once with fastai's. The two call the
same functions in the same training run; what differs is who steps the parameters, and how fast.

    python examples/book_ch16_optimizers.py --epochs 5
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import fastai.optimizer
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner  # with fit_one_cycle
from fastai.data.core import DataLoaders
from fastai.layers import ConvLayer, Flatten
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import fusedopt

# ------------------------------------------------------------------------------------------------------------
# Update rules, in plain torch. Nothing is done in place to save time: fusedopt fuses it anyway.


def sgd_cb(p, lr, **kwargs):
    """Step against the gradient."""
    p.data.sub_(lr * p.grad)


def average_grad(p, mom, grad_avg=None, **kwargs):
    """Remember the gradients of earlier steps, each step a little less."""
    return {"grad_avg": p.grad.clone() if grad_avg is None else mom * grad_avg + p.grad}


def average_sqr_grad(p, sqr_mom, sqr_avg=None, **kwargs):
    """Average the squares of the gradients, starting from zero."""
    new = (1 - sqr_mom) * p.grad.square()
    return {"sqr_avg": new if sqr_avg is None else sqr_mom * sqr_avg + new}


def count_steps(p, step=0, **kwargs):
    """How many values are in the averages."""
    return {"step": step + 1}


def momentum_step(p, lr, grad_avg, **kwargs):
    """Step along all gradients seen so far."""
    p.data.sub_(lr * grad_avg)


def rms_prop_step(p, lr, sqr_avg, eps, **kwargs):
    """Step by the gradient, measured in its own usual size."""
    p.data.sub_(lr * p.grad / (sqr_avg.sqrt() + eps))


def adam_step(p, lr, mom, sqr_mom, step, grad_avg, sqr_avg, eps, **kwargs):
    """Momentum and RMSProp at once, both averages divided by the weight that is in them so far."""
    mean = grad_avg * ((1 - mom) / (1 - mom**step))
    mean_sqr = sqr_avg / (1 - sqr_mom**step)
    p.data.sub_(lr * mean / (mean_sqr.sqrt() + eps))


average_grad.defaults = {"mom": 0.9}
average_sqr_grad.defaults = {"sqr_mom": 0.99}
rms_prop_step.defaults = adam_step.defaults = {"eps": 1e-5}


@dataclass(frozen=True)
class Recipe:
    """An update rule, and how to train with it."""

    name: str
    cbs: tuple[Callable, ...]
    """None at all: the baseline, ``SGD`` as each library has it."""
    lr: float
    one_cycle: bool = True

    def opt_func(self, library) -> Callable:
        """What a Learner makes its optimizer with; `library` is ``fusedopt`` or ``fastai.optimizer``."""
        return partial(library.Optimizer, cbs=list(self.cbs)) if self.cbs else library.SGD


RECIPES = (
    Recipe("baseline SGD", (), lr=0.1, one_cycle=False),
    Recipe("SGD", (sgd_cb,), lr=0.1, one_cycle=False),
    Recipe("momentum", (average_grad, momentum_step), lr=0.03),
    Recipe("RMSProp", (average_sqr_grad, rms_prop_step), lr=0.003),
    Recipe("Adam", (average_grad, average_sqr_grad, count_steps, adam_step), lr=0.01),
)


# ------------------------------------------------------------------------------------------------------------
# The training run around them


class DigitNet(nn.Module):
    """A small convolutional net, which also counts how many of its last activations are zero."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        sizes = [1, width, 2 * width, 4 * width]
        convs = [ConvLayer(a, b, stride=2) for a, b in pairwise(sizes)]
        self.body = nn.Sequential(*convs, Flatten())
        self.head = nn.Linear(sizes[-1], 10)
        self.reset()

    def reset(self) -> None:
        """Count from zero again."""
        self.dead = self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activations = self.body(x)
        self.dead += int((activations == 0).sum())
        self.seen += activations.numel()
        return self.head(activations)

    @property
    def dead_share(self) -> float:
        """The share of zeros since the last reset."""
        return self.dead / max(self.seen, 1)


class ModelReset(Callback):
    """Lets the model forget what it gathered, before it is trained and before it is validated."""

    def before_train(self) -> None:
        self.model.reset()

    def before_validate(self) -> None:
        self.model.reset()


class StepTimer(Callback):
    """Milliseconds of every optimizer step."""

    def before_fit(self) -> None:
        self.ms: list[float] = []

    def before_step(self) -> None:
        self.start = time.perf_counter()

    def after_step(self) -> None:
        self.ms.append(1e3 * (time.perf_counter() - self.start))


def digits(bs: int = 64) -> DataLoaders:
    """scikit-learn's 1,797 digits as images of 1 x 8 x 8; every fifth one is for validation."""
    pixels, targets = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(targets)
    valid = torch.arange(len(y)) % 5 == 0
    train_set, valid_set = (TensorDataset(x[rows], y[rows]) for rows in (~valid, valid))
    return DataLoaders.from_dsets(train_set, valid_set, bs=bs, num_workers=0)


@dataclass(frozen=True)
class Run:
    """What one training run came to."""

    name: str
    library: str
    losses: list[float]
    """The Recorder's: one per batch, smoothed."""
    lrs: list[float]
    accuracy: float
    dead_share: float
    """Of the activations, over the validation set."""
    seconds: float
    step_ms: float
    """The median optimizer step."""


def train(recipe: Recipe, library, epochs: int) -> Run:
    """Train from the same weights, on the same batches, whatever the recipe and the library."""
    set_seed(16)
    learn = Learner(
        digits(),
        DigitNet(),
        loss_func=nn.CrossEntropyLoss(),
        opt_func=recipe.opt_func(library),
        metrics=accuracy,
        cbs=[ModelReset(), StepTimer()],
    )
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, recipe.lr) if recipe.one_cycle else learn.fit(epochs, recipe.lr)
    seconds = time.perf_counter() - start
    recorder = learn.recorder
    column = recorder.metric_names.index("accuracy") - 1  # the epoch's number is not among the values
    return Run(
        name=recipe.name,
        library=library.__name__.partition(".")[0],
        losses=[float(loss) for loss in recorder.losses],
        lrs=[float(lr) for lr in recorder.lrs],
        accuracy=recorder.values[-1][column],
        dead_share=learn.model.dead_share,
        seconds=seconds,
        step_ms=statistics.median(learn.step_timer.ms),
    )


def table(runs: Iterable[Run]) -> str:
    """One line per recipe, fusedopt beside fastai."""
    by_name: dict[str, dict[str, Run]] = {}
    for run in runs:
        by_name.setdefault(run.name, {})[run.library] = run
    lines = [
        f"{'':14}{'accuracy in %':>18}{'seconds':>18}{'ms per step':>18}{'dead units in %':>18}",
        f"{'rule':14}" + 4 * f"{'fusedopt':>10}{'fastai':>8}",
    ]
    for name, pair in by_name.items():
        a, b = pair["fusedopt"], pair["fastai"]
        lines.append(
            f"{name:14}{100 * a.accuracy:10.1f}{100 * b.accuracy:8.1f}{a.seconds:10.2f}{b.seconds:8.2f}"
            f"{a.step_ms:10.2f}{b.step_ms:8.2f}{100 * a.dead_share:10.1f}{100 * b.dead_share:8.1f}"
        )
    return "\n".join(lines)


def main(epochs: int = 5, recipes: Iterable[Recipe] = RECIPES) -> list[Run]:
    """Train every recipe with both libraries, print the table, and return all runs."""
    runs = [train(recipe, lib, epochs) for recipe in recipes for lib in (fusedopt, fastai.optimizer)]
    print(table(runs))
    print(
        "seconds are of the whole training; fusedopt's include compiling, where a kernel is not yet in its cache"
    )
    return runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    torch.set_num_threads(1)  # for images this small, a second thread costs more than it does
    main(parser.parse_args().epochs)
