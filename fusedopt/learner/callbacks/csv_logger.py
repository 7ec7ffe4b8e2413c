"""Epochs' values in a CSV file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from ..callback import Callback


class CSVLogger(Callback):
    """Writes the line of each epoch to ``learn.path / fname`` as soon as it is known.

    ``append``: go on in a file that is there already, whose names of columns are not written again (fastai does).
    Looking for a learning rate writes nothing.
    """

    order = 60

    def __init__(self, fname: str | Path = "history.csv", append: bool = False) -> None:
        self.fname, self.append = Path(fname), append
        self.file: Any = None

    def read_log(self) -> list[dict[str, str]]:
        """The file's lines, by column. (fastai gives a data frame: ``pandas.read_csv`` reads the file too.)"""
        with (self.path / self.fname).open(newline="") as file:
            return list(csv.DictReader(file))

    def before_train(self) -> None:
        """Opened here, not at the beginning: validating must not begin a new file."""
        if self.file is not None or hasattr(self.learn, "lr_finder"):
            return
        path = self.path / self.fname
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a" if self.append else "w", newline="")
        if self.file.tell() == 0:
            self._write(self.recorder.metric_names)

    def after_epoch(self) -> None:
        if self.file is not None:
            self._write(self.recorder.log)

    def _write(self, cells: list[Any]) -> None:
        csv.writer(self.file).writerow(cells)
        self.file.flush()

    def clean_up(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
