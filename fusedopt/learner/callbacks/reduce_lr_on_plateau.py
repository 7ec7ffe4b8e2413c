"""Smaller steps when large ones stop helping."""

from __future__ import annotations

from typing import Any

from .tracker import Patient, Tracker


class ReduceLROnPlateau(Patient):
    """Divides the learning rates after ``patience`` epochs without a better value. See `Tracker`.

    Args:
        factor: what they are divided by.
        min_lr: what they do not fall below.
        monitor, comp, min_delta, reset_on_fit: see `Tracker`.
        patience: how many epochs it waits.
    """

    order = Tracker.order + 2

    def __init__(
        self,
        monitor: str = "valid_loss",
        comp: Any = None,
        min_delta: float = 0.0,
        patience: int = 1,
        factor: float = 10.0,
        min_lr: float = 0.0,
        reset_on_fit: bool = True,
    ) -> None:
        super().__init__(monitor, comp, min_delta, patience, reset_on_fit)
        self.factor, self.min_lr = factor, min_lr

    def give_up(self) -> None:
        before = self.opt.hypers[-1]["lr"]
        for hyper in self.opt.hypers:
            hyper["lr"] = max(hyper["lr"] / self.factor, self.min_lr)
        self.wait = 0
        if (now := self.opt.hypers[-1]["lr"]) < before:
            print(f"Epoch {self.epoch}: reducing lr to {now}")
