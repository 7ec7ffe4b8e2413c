"""What is measured besides the loss, and how averages over batches are taken."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from .batches import batch_size, plain


class Metric(ABC):
    """Something measured over batches: `reset`, then `accumulate` after each, then `value`.

    Need not be inherited from: what has these four is a metric.
    """

    def reset(self) -> None:  # noqa: B027  (there may be nothing to forget)
        """Forget all batches."""

    def accumulate(self, learn: Any) -> None:  # noqa: B027
        """Take in the batch that ``learn``, the Learner, has just been through."""

    @property
    @abstractmethod
    def value(self) -> Any:
        """What came of it; None if there was no batch."""

    @property
    def name(self) -> str:
        """What the column of its values is called."""
        return type(self).__name__.removesuffix("Metric").lower()


class Average(Metric):
    """Mean over items of what `measure` gives for a batch. Sums stay on the device, so nobody waits for it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total: Any = 0.0
        self.count = 0

    @abstractmethod
    def measure(self, learn: Any) -> Any:
        """A batch's mean; ``learn`` has been through it."""

    def accumulate(self, learn: Any) -> None:
        n, value = batch_size(learn.yb), self.measure(learn)
        self.total += (value.detach() if isinstance(value, torch.Tensor) else value) * n
        self.count += n

    @property
    def value(self) -> Any:
        return self.total / self.count if self.count else None


class AvgMetric(Average):
    """Mean over items of ``func(predictions, targets)``, which itself gives a batch's mean."""

    def __init__(self, func: Callable[..., Any]) -> None:
        super().__init__()
        self.func = func

    def measure(self, learn: Any) -> Any:
        return self.func(learn.pred, *learn.yb)

    @property
    def name(self) -> str:
        func = self.func.func if isinstance(self.func, functools.partial) else self.func
        return getattr(func, "__name__", type(func).__name__)


class AvgLoss(Average):
    """Mean over items of the loss."""

    name = "loss"

    def measure(self, learn: Any) -> Any:
        return learn.loss.mean()


class AvgSmoothLoss(Metric):
    """Moving average of the loss, debiased: v ← β v + (1 − β) loss; v / (1 − β^n), where β is ``beta``."""

    name = "smooth_loss"

    def __init__(self, beta: float = 0.98) -> None:
        self.beta = beta
        self.reset()

    def reset(self) -> None:
        self.count = 0
        self.val: torch.Tensor | None = None

    def accumulate(self, learn: Any) -> None:
        loss = learn.loss.detach()
        loss = loss.mean() if loss.ndim else loss
        self.count += 1
        self.val = torch.lerp(loss, torch.zeros_like(loss) if self.val is None else self.val, self.beta)

    @property
    def value(self) -> Any:
        return torch.tensor(math.nan) if self.val is None else self.val / (1 - self.beta**self.count)


class ValueMetric(Metric):
    """What ``func()`` gives, such as a callback's number; the column is ``metric_name``, or the function's name."""

    def __init__(self, func: Callable[[], Any], metric_name: str | None = None) -> None:
        self.func, self.metric_name = func, metric_name

    @property
    def value(self) -> Any:
        return self.func()

    @property
    def name(self) -> str:
        return self.metric_name or self.func.__name__


def as_metric(given: Any) -> Any:
    """A metric, a metric's class, or a function to average, as a metric. Raises TypeError for anything else."""
    if all(
        hasattr(given, part) for part in ("reset", "accumulate", "name")
    ):  # the value may not be there yet
        return given() if isinstance(given, type) else given
    if isinstance(given, type) or not callable(given):
        raise TypeError(
            f"{given!r} is no metric: give a function of predictions and targets, or an object with reset, accumulate, "
            f"value and name"
        )
    return AvgMetric(given)


def accuracy(pred: torch.Tensor, target: torch.Tensor, axis: int = -1) -> torch.Tensor:
    """The share of items whose target is the class with the highest score in ``pred``, along ``axis``.

    Raises ValueError if there is not one target for each.
    """
    found, target = plain(pred).argmax(axis).flatten(), plain(target).flatten()
    if len(found) != len(target):
        raise ValueError(
            f"predictions of shape {tuple(pred.shape)} are for {len(found)} targets, and there are {len(target)}: "
            f"one class number each is needed"
        )
    return (found == target).float().mean()


def error_rate(pred: torch.Tensor, target: torch.Tensor, axis: int = -1) -> torch.Tensor:
    """The share of items whose target is another class than that of ``pred``, along ``axis``: 1 − `accuracy`."""
    return 1 - accuracy(pred, target, axis)
