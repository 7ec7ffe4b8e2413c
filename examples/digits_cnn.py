"""A small convolutional net reads scikit-learn's digits: fusedopt's Learner, Adam and one cycle.

Prints its accuracy and what it confuses, and saves pictures of training, activations and mistakes.

    python examples/digits_cnn.py --out demo_output
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from momentum_pictures import save
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusedopt
from fusedopt.learner import ActivationStats, Callback, Interpretation, Learner, Progress, accuracy


def digits(bs: int = 64) -> tuple[DataLoader, DataLoader]:
    """1,797 images of 1 x 8 x 8, scaled to [0, 1]; every fifth one is for validation."""
    pixels, targets = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(targets)
    valid = torch.arange(len(y)) % 5 == 0
    train_set, valid_set = (TensorDataset(x[rows], y[rows]) for rows in (~valid, valid))
    return DataLoader(train_set, bs, shuffle=True, drop_last=True), DataLoader(valid_set, 128)


def conv(a: int, b: int, stride: int = 1) -> nn.Sequential:
    """A convolution, normalized, and what is positive of it."""
    return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())


def cnn(width: int = 32) -> nn.Sequential:
    """8 x 8 pixels become 4 x 4, then 2 x 2, of more and more channels."""
    w = width
    convs = conv(1, w), conv(w, 2 * w, 2), conv(2 * w, 2 * w), conv(2 * w, 4 * w, 2)
    return nn.Sequential(*convs, nn.Flatten(), nn.Dropout(0.2), nn.Linear(16 * w, 10))


class Shift(Callback):
    """Moves every training image by up to one pixel, up or down and left or right."""

    run_valid = False

    def before_batch(self) -> None:
        (x,) = self.xb
        n, size = len(x), torch.arange(8)
        rows = torch.randint(3, (n, 1, 1)) + size.view(1, 8, 1)
        columns = torch.randint(3, (n, 1, 1)) + size
        padded = F.pad(x, (1, 1, 1, 1)).squeeze(1)
        self.learn.xb = (padded[torch.arange(n).view(n, 1, 1), rows, columns].unsqueeze(1),)


@dataclass(frozen=True)
class Found:
    """What the training came to."""

    accuracy: float
    """Of validation, from 0 to 1."""
    losses: list[float]
    confusion: torch.Tensor
    most_confused: list[tuple[int, int, int]]
    pictures: list[Path]


def main(epochs: int = 20, width: int = 32, seed: int = 0, out: Path | None = None) -> Found:
    """Train, print, and save pictures in `out` if that is given. The same seed and threads give the same numbers."""
    torch.manual_seed(seed)
    stats = ActivationStats(mod_filter=lambda module: isinstance(module, nn.ReLU))
    learn = Learner(
        digits(),
        cnn(width),
        nn.CrossEntropyLoss(),
        opt_func=fusedopt.Adam,
        cbs=[Shift, Progress, stats],
        metrics=accuracy,
    )
    print(learn.summary())
    learn.fit_one_cycle(epochs, 5e-3)
    found = Interpretation.from_learner(learn)
    right, of = found.confusion_matrix().diag().sum().item(), len(found.targs)
    print(f"\naccuracy {100 * right / of:.2f} %: {right} of {of}\n\nactual by predicted digit")
    print("\n".join("".join(f"{n:5}" for n in row) for row in found.confusion_matrix().tolist()))
    print("most confused (actual, predicted, how often):", found.most_confused())
    pictures = [] if out is None else save_pictures(learn, stats, found, out)
    losses = [float(loss) for loss in learn.recorder.losses]
    return Found(right / of, losses, found.confusion_matrix(), found.most_confused(), pictures)


def save_pictures(learn: Learner, stats: ActivationStats, found: Interpretation, out: Path) -> list[Path]:
    """Loss and schedule of the training, activations behind every relu, the confusion matrix, the worst mistakes."""
    figures = {
        "loss": learn.recorder.plot_loss().figure,
        "schedule": learn.recorder.plot_sched()[0].figure,
        "activation_means": stats.plot_stats()[0].figure,
        "activation_sizes": stats.color_dim()[0].figure,
        "activations_near_zero": stats.dead_chart()[0].figure,
        "confusion": found.plot_confusion_matrix().figure,
        "top_losses": draw_top_losses(learn, found),
    }
    return [save(figure, out / f"{name}.png") for name, figure in figures.items()]


def draw_top_losses(learn: Learner, found: Interpretation):
    """The eight images with the largest losses."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(7, 4.4), layout="constrained")
    images = learn.dls[1].dataset.tensors[0]
    for ax, loss, i in zip(axes.flat, *found.top_losses(8), strict=True):
        ax.imshow(images[i, 0].numpy(), cmap="gray_r")
        ax.set_title(f"{found.targs[i]}, taken for {found.preds[i].argmax()}\nloss {loss:.2f}", fontsize=10)
        ax.axis("off")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    arguments = parser.parse_args()
    main(epochs=arguments.epochs, out=arguments.out)
