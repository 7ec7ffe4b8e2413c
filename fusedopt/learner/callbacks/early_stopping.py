"""No more epochs than help."""

from __future__ import annotations

from ..events import CancelFitException
from .tracker import Patient, Tracker


class EarlyStopping(Patient):
    """Ends the fit after ``patience`` epochs without a better value: fastai's EarlyStoppingCallback. See `Tracker`."""

    order = Tracker.order + 3

    def give_up(self) -> None:
        print(f"No improvement since epoch {self.epoch - self.wait}: early stopping")
        raise CancelFitException
