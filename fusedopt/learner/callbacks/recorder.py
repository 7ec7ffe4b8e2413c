"""Losses, metrics and hyperparameters of a training, and the line that is printed after each epoch."""

from __future__ import annotations

from ..callback import Callback


class Recorder(Callback):
    """..."""

    order = 50
