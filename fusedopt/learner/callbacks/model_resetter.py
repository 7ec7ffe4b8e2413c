"""Recurrent models that start afresh."""

from __future__ import annotations

from ..callback import Callback


class ModelResetter(Callback):
    """Calls ``model.reset()`` before training and validation of each epoch and after the fit."""

    def before_train(self) -> None:
        self.model.reset()

    def before_validate(self) -> None:
        self.model.reset()

    def after_fit(self) -> None:
        self.model.reset()
