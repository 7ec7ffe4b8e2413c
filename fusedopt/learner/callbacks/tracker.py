"""What callbacks have in common that watch a value from epoch to epoch."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable

from ..callback import Callback


class Tracker(Callback):
    """Keeps track of the ``best`` of what the Recorder has under a name: fastai's TrackerCallback.

    It sits out `lr_find`, and prediction and validation outside of a fit, where fastai's takes the wrong value.

    Args:
        monitor: the value's name: a loss or a metric.
        comp: whether its first argument is better than its second; None: less for losses and errors, else greater.
        min_delta: by how much a value must be better than the best so far.
        reset_on_fit: forget the best when a fit begins.

    Raises:
        ValueError: when a fit begins, for a monitor that is not recorded.
    """

    order = 60

    def __init__(
        self,
        monitor: str = "valid_loss",
        comp: Callable[[float, float], bool] | None = None,
        min_delta: float = 0.0,
        reset_on_fit: bool = True,
    ) -> None:
        if comp is None:
            comp = operator.lt if "loss" in monitor or "error" in monitor else operator.gt
        self.monitor, self.comp, self.reset_on_fit = monitor, comp, reset_on_fit
        self.lower = bool(comp(0, 1))
        self.min_delta = -min_delta if self.lower else min_delta
        self.best, self.new_best = self._worst(), False

    def before_fit(self) -> None:
        self.run = not (self.inferring or hasattr(self, "lr_finder"))
        if not self.run:
            return
        if self.reset_on_fit:
            self.best = self._worst()
        names = [name for name in self.recorder.metric_names[1:] if name != "time"]
        if self.monitor not in names:
            raise ValueError(f"{self.monitor!r} is not recorded; monitor one of {', '.join(names)}")
        self.idx = names.index(self.monitor)

    def after_epoch(self) -> None:
        record = self.recorder.values[-1]
        value = math.nan if record[self.idx] is None else record[self.idx]  # None: it was cut short
        self.new_best = bool(self.comp(value - self.min_delta, self.best))
        if self.new_best:
            self.best = value

    def _worst(self) -> float:
        return math.inf if self.lower else -math.inf


class Patient(Tracker, ABC):
    """Counts the epochs that it has been waiting for a better value, in ``wait``.

    Args:
        patience: how many, before something is done: `give_up`.
    """

    def __init__(
        self,
        monitor: str = "valid_loss",
        comp: Callable[[float, float], bool] | None = None,
        min_delta: float = 0.0,
        patience: int = 1,
        reset_on_fit: bool = True,
    ) -> None:
        super().__init__(monitor, comp, min_delta, reset_on_fit)
        self.patience, self.wait = patience, 0

    def before_fit(self) -> None:
        self.wait = 0
        super().before_fit()

    def after_epoch(self) -> None:
        super().after_epoch()
        self.wait = 0 if self.new_best else self.wait + 1
        if self.wait >= self.patience:
            self.give_up()

    @abstractmethod
    def give_up(self) -> None:
        """What is done when it has waited long enough."""
