"""An average of the weights, which is often better than the last of them."""

from __future__ import annotations

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..callback import Callback


class EMA(Callback):
    """Averages the weights over a fit, exponentially, and validates with the average.

        average ← decay · average + (1 − decay) · weights  after each step, from the weights that the fit begins with

    Buffers are copied. From validation on until the next epoch's training the model has the average, so that what is
    saved after an epoch is what was validated; and it keeps it when the fit ends, unless that is by an error.

    Raises:
        ValueError: a ``decay`` below 0, or of 1 or more.
    """

    order = 55  # before those that save the model

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and less than 1; it is {decay}")
        self.decay = decay
        self.average: list[torch.Tensor] = []
        self.stored: list[torch.Tensor] | None = None

    def before_fit(self) -> None:
        self.run = not (self.inferring or hasattr(self, "lr_finder"))
        if self.run:
            self.average = _copies(self._tensors())

    def after_step(self) -> None:
        with torch.no_grad():
            n = len(list(self.model.parameters()))
            now = self._tensors()
            get_ema_multi_avg_fn(self.decay)(self.average[:n], now[:n], 0)  # made here: no pickle takes it
            _copy(now[n:], self.average[n:])

    def before_validate(self) -> None:
        self.store()

    def before_train(self) -> None:
        self.restore()

    def after_fit(self) -> None:
        self.store()
        self.stored = None

    def clean_up(self) -> None:
        self.restore()
        self.average = []

    def store(self) -> None:
        """Put the model's own weights aside, and the average into the model."""
        if self.stored is None:
            self.stored = _copies(self._tensors())
            _copy(self.average, self._tensors())

    def restore(self) -> None:
        """Put the model's own weights back."""
        if self.stored is not None:
            _copy(self.stored, self._tensors())
        self.stored = None

    def _tensors(self) -> list[torch.Tensor]:
        """Parameters, then buffers."""
        return [*self.model.parameters(), *self.model.buffers()]


def _copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.detach().clone() for t in tensors]


def _copy(source: list[torch.Tensor], target: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for a, b in zip(source, target, strict=True):
            b.copy_(a)
