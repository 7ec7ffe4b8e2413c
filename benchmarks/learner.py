"""What the Learner's loop adds to a batch over a loop written by hand: ``python -m benchmarks.learner``.

All train the same tiny model on the same batches, in turns, so that whatever else the machine does meets everybody; and
it is the processor's time, since nothing here waits for anything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fusedopt
from fusedopt.learner import Callback, CancelValidException, Learner

from .timing import machine

BOUND = 50.0
"""Microseconds per batch that the loop may add."""


def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 4, generator=generator), torch.arange(8) % 2) for _ in range(n)]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def by_hand(data: list) -> Callable[[], None]:
    net = model()
    opt = fusedopt.Adam(net.parameters(), lr=1e-3)

    def epoch() -> None:
        net.train()
        for x, y in data:
            loss = cross_entropy(net(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()

    return epoch


class TrainOnly(Callback):
    """Validation would be in the time; and the bare loop has no TrainEval, which says that this is training."""

    def before_fit(self) -> None:
        self.learn.training = True

    def before_validate(self) -> None:
        raise CancelValidException


def learner(data: list, default_cbs: bool) -> Callable[[], None]:
    learn = Learner([data, data], model(), cross_entropy, default_cbs=default_cbs, cbs=TrainOnly)

    def epoch() -> None:
        with learn.no_logging():
            learn.fit(1)

    return epoch


def added(n: int = 1000, rounds: int = 15) -> dict[str, float]:
    """Microseconds per batch over the loop by hand: medians over rounds. What a fit does once is in them, over n."""
    data = batches(n)
    loops = {
        "by hand": by_hand(data),
        "bare loop": learner(data, default_cbs=False),
        "TrainEval and Recorder": learner(data, default_cbs=True),
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    for i in range(rounds + 1):
        for name, epoch in loops.items():
            start = time.process_time()
            epoch()
            if i:  # the first compiles
                times[name].append((time.process_time() - start) / n * 1e6)
    hand = times.pop("by hand")
    over = {
        name: statistics.median(ours - h for ours, h in zip(taken, hand, strict=True))
        for name, taken in times.items()
    }
    return {"by hand": statistics.median(hand), **over}


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    for name, microseconds in added().items():
        print(f"{name:24} {'' if name == 'by hand' else '+'}{microseconds:.1f} µs per batch")


if __name__ == "__main__":
    main()
