"""The best of all epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .tracker import Tracker


class SaveModel(Tracker):
    """Saves the model whenever it is better, and loads the best when the fit ends: fastai's SaveModelCallback.

    If no epoch was better (all losses NaN, say), nothing is loaded; fastai loads what lies there from elsewhere.

    Args:
        fname: as for ``learn.save``.
        every_epoch: save every so many epochs (True: each), as ``fname_epoch``, and load none.
        at_end: save when the fit ends, and load none.
        with_opt: save, and load, the optimizer's state too.
        monitor, comp, min_delta, reset_on_fit: see `Tracker`.
    """

    order = Tracker.order + 1

    def __init__(
        self,
        monitor: str = "valid_loss",
        comp: Any = None,
        min_delta: float = 0.0,
        fname: str = "model",
        every_epoch: bool | int = False,
        at_end: bool = False,
        with_opt: bool = False,
        reset_on_fit: bool = True,
    ) -> None:
        super().__init__(monitor, comp, min_delta, reset_on_fit)
        if every_epoch and at_end:
            raise ValueError("every_epoch and at_end are two ways to choose what is saved; give one of them")
        self.fname, self.every_epoch, self.at_end, self.with_opt = fname, every_epoch, at_end, with_opt
        self.last_saved_path: Path | None = None

    def before_fit(self) -> None:
        super().before_fit()
        if self.run and self.reset_on_fit:
            self.last_saved_path = None

    def after_epoch(self) -> None:
        if self.every_epoch:
            if self.epoch % self.every_epoch == 0:
                self._save(f"{self.fname}_{self.epoch}")
            return
        super().after_epoch()
        if self.new_best:
            print(f"Better model found at epoch {self.epoch} with {self.monitor} value: {self.best}.")
            self._save(self.fname)

    def after_fit(self) -> None:
        if self.at_end:
            self._save(self.fname)
        elif not self.every_epoch and self.last_saved_path is not None:
            self.learn.load(self.last_saved_path, with_opt=self.with_opt)

    def _save(self, name: str) -> None:
        self.last_saved_path = self.learn.save(name, with_opt=self.with_opt)
