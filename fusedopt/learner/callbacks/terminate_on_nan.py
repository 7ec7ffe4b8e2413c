"""An end to what has gone wrong."""

from __future__ import annotations

import torch

from ..callback import Callback
from ..events import CancelFitException


class TerminateOnNaN(Callback):
    """Ends the fit when a loss is NaN or infinite: fastai's TerminateOnNaNCallback. Predictions are not cut short."""

    order = -9

    def after_batch(self) -> None:
        if not self.inferring and self.loss is not None and not torch.isfinite(self.loss).all():
            raise CancelFitException
