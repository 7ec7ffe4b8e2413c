"""Bars that show how far a training has come, in a terminal or a notebook."""

from __future__ import annotations

import time
from typing import Any

from ..callback import Callback
from .recorder import as_line, print_line


class Progress(Callback):
    """A bar for epochs and one for batches, and at the end the optimizer's share of a training step.

    The share is the time in ``opt.step()`` over that of training batches, without loading them, both as the host sees
    them: a GPU may be behind. Named ``ProgressCallback`` in fastai, which does not tell.
    """

    order = 60

    def __init__(self) -> None:
        self.epochs: Any = None
        self.batches: Any = None
        self.in_steps = self.in_batches = 0.0

    def before_fit(self) -> None:
        if self.inferring:  # predictions are a fit without training
            self.run = False
            return
        from tqdm.auto import tqdm

        self._tqdm, self.in_steps, self.in_batches = tqdm, 0.0, 0.0
        self.epochs = tqdm(total=self.n_epoch, initial=self.start_epoch, desc="epochs", leave=False)
        if self.logger is print_line:
            self.learn.logger = self._write
        if self.opt is not None:
            self._time_steps()

    def _time_steps(self) -> None:
        """By a step of this optimizer's own: at an event, the time of other callbacks would be in it."""
        self._timed = opt = self.opt
        step, clock = opt.step, time.perf_counter

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return step(*args, **kwargs)
            finally:
                self.in_steps += clock() - start

        opt.step = timed

    def before_train(self) -> None:
        self._new_bar("train")

    def before_validate(self) -> None:
        self._new_bar("valid")

    def _new_bar(self, desc: str) -> None:
        self._close_bar()
        self.batches = self._tqdm(total=len(self.dl), desc=desc, leave=False)

    def before_batch(self) -> None:
        self._batch_start = time.perf_counter()

    def after_batch(self) -> None:
        if self.training:
            self.in_batches += time.perf_counter() - self._batch_start
        # true where it has been drawn, some times a second: only then is the loss asked for
        if self.batches.update(1) and hasattr(self.learn, "smooth_loss"):
            self.batches.set_postfix_str(f"loss {float(self.learn.smooth_loss):.4f}", refresh=False)

    def after_epoch(self) -> None:
        self._close_bar()
        self.epochs.update(1)

    def after_fit(self) -> None:
        if self.in_batches and self.logger == self._write:
            self._tqdm.write(
                f"optimizer: {self.in_steps / self.in_batches:.1%} of the time of training steps "
                f"({self.in_steps:.2f} of {self.in_batches:.2f} s)"
            )
        self.clean_up()

    def _write(self, cells: list[Any]) -> None:
        self._tqdm.write(as_line(cells))

    def _close_bar(self) -> None:
        if self.batches is not None:
            self.batches.close()
            self.batches = None

    def clean_up(self) -> None:
        self._close_bar()
        if self.epochs is not None:
            self.epochs.close()
            self.epochs = None
        if self.logger == self._write:
            self.learn.logger = print_line
        if (timed := self.__dict__.pop("_timed", None)) is not None:
            del timed.step
