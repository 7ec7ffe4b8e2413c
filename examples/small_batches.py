"""Two images in a batch: BatchNorm2d normalizes by their noise, lesson 10's RunningBatchNorm by running statistics.

Two nets on scikit-learn's digits: behind three convolutions, each image has one value in a channel.

    python examples/small_batches.py
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from digits_cnn import digits
from torch import nn

import fusedopt
from fusedopt.learner import Learner, RunningBatchNorm, accuracy

NORMS = {"BatchNorm2d": nn.BatchNorm2d, "RunningBatchNorm": RunningBatchNorm}


def cnn(norm: Callable[[int], nn.Module], convs: int, width: int = 8) -> nn.Sequential:
    """Convolutions that halve the image, each normalized."""
    sizes = [1, *(width * 2**i for i in range(convs))]
    layers = [
        nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), norm(b), nn.ReLU())
        for a, b in pairwise(sizes)
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(sizes[-1] * (8 >> convs) ** 2, 10))


@dataclass(frozen=True)
class Run:
    """Validation after each training, one value per seed."""

    layer: str
    convs: int
    losses: list[float]
    accuracies: list[float]

    def line(self, bs: int) -> str:
        """For the table, accuracy in %."""
        loss, accuracy = statistics.fmean(self.losses), statistics.fmean(self.accuracies)
        values = bs * (8 >> self.convs) ** 2
        return (
            f"{self.layer:18}{self.convs:7}{values:8}{loss:12.3f}{max(self.losses):9.3f}"
            f"{100 * accuracy:17.1f}{100 * min(self.accuracies):8.1f}"
        )


def train(layer: str, convs: int, seed: int, bs: int, epochs: int, lr: float) -> list[float]:
    """Validation's loss and accuracy. Weights and batches are the same for each layer."""
    torch.manual_seed(seed)
    model = cnn(NORMS[layer], convs)
    learn = Learner(digits(bs), model, nn.CrossEntropyLoss(), fusedopt.SGD, metrics=accuracy)
    with learn.no_logging():
        learn.fit(epochs, lr)
    return learn.final_record[1:]


def main(
    bs: int = 2, epochs: int = 1, lr: float = 0.05, seeds: int = 5, convs: Sequence[int] = (2, 3)
) -> list[Run]:
    """Train with each layer in nets of so many convolutions, and print how it went."""
    print(f"batches of {bs}, {epochs} epoch(s), SGD at {lr}, {seeds} seeds")
    print("values: of a channel, in a batch, that the last layer normalizes; accuracy in %")
    print(
        f"{'layer':18}{'convs':>7}{'values':>8}{'loss: mean':>12}{'worst':>9}{'accuracy: mean':>17}{'worst':>8}"
    )
    runs = []
    for n in convs:
        for layer in NORMS:
            found = [train(layer, n, seed, bs, epochs, lr) for seed in range(seeds)]
            runs.append(Run(layer, n, *map(list, zip(*found, strict=True))))
            print(runs[-1].line(bs))
    return runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.05)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # for images this small, a second thread costs more than it does
    main(bs=arguments.bs, epochs=arguments.epochs, lr=arguments.lr)
