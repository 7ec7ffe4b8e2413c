"""Losses, metrics and hyperparameters of a training, and the line that is printed after each epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from ...optimizer.names import number
from ..callback import Callback
from ..metrics import AvgLoss, AvgSmoothLoss

TITLES = {
    "lr": "learning rate",
    "mom": "momentum",
    "sqr_mom": "momentum of squares",
    "wd": "weight decay",
    "eps": "epsilon",
}
"""Hyperparameters in words; others are titled by their names."""


class Recorder(Callback):
    """Keeps what a training does. Values of the last training stay until the next: validating leaves them alone.

    Per batch: ``losses`` (smoothed), ``lrs``, ``moms`` (of the last group), and ``hps``, these and others by name.
    Per epoch: ``values``, a row of losses and metrics as ``metric_names`` says, and ``iters``, batches until then.
    A part of an epoch that was cancelled has None in its row (fastai leaves it out, and columns move).
    A batch that was cancelled before it had a loss is in none of these (fastai takes an earlier batch's in its place),
    one that was cancelled later is; values of no batch at all are NaN.

    Args:
        add_time: add the time an epoch takes to the line that is printed.
        train_metrics: measure metrics on training batches, too.
        valid_metrics: measure the loss and metrics on validation batches.
        beta: how much of the smoothed loss is kept at each batch.
    """

    order = 50

    def __init__(
        self,
        add_time: bool = True,
        train_metrics: bool = False,
        valid_metrics: bool = True,
        beta: float = 0.98,
    ) -> None:
        self.add_time, self.train_metrics, self.valid_metrics = add_time, train_metrics, valid_metrics
        self.loss, self.smooth_loss = AvgLoss(), AvgSmoothLoss(beta)
        self._columns: list[str] = []
        self._new_history()

    def _new_history(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.lrs: list[float] = []
        self.moms: list[float] = []
        self.hps: dict[str, list[float]] = {"lr": self.lrs, "mom": self.moms}
        self.values: list[list[float | None]] = []
        self.iters: list[int] = []
        self.smooth_loss.reset()

    def before_fit(self) -> None:
        self._fresh, self._seen = True, 0
        self._train_mets = [self.smooth_loss, *(self.metrics if self.train_metrics else ())]
        self._valid_mets = [self.loss, *self.metrics] if self.valid_metrics else []
        names = [m.name for m in self.metrics]
        both = self.train_metrics and self.valid_metrics
        of_train = ["train_loss", *(f"train_{n}" if both else n for n in names if self.train_metrics)]
        of_valid = ["valid_loss", *(f"valid_{n}" if both else n for n in names)] if self.valid_metrics else []
        self._columns = [*of_train, *of_valid]
        self.metric_names = ["epoch", *self._columns, *(["time"] if self.add_time else [])]

    def before_epoch(self) -> None:
        self._start, self._trained, self._cancelled = time.perf_counter(), False, False
        self._row: list[Any] = []

    def before_train(self) -> None:
        if self._fresh:
            self._new_history()
            self.logger(self.metric_names)
        self._fresh, self._trained, self._cancelled, self._seen = False, True, False, 0
        for metric in self._train_mets[1:]:
            metric.reset()

    def before_validate(self) -> None:
        self._cancelled, self._seen = False, 0
        for metric in self._valid_mets:
            metric.reset()

    def after_batch(self) -> None:
        learn = self.learn
        if not (learn.yb and learn.measured):
            return
        self._seen += 1
        for metric in self._train_mets if learn.training else self._valid_mets:
            metric.accumulate(learn)
        if learn.training:
            self.lrs.append(learn.opt.hypers[-1]["lr"])
            if (mom := learn.opt.hypers[-1].get("mom")) is not None:
                self.moms.append(mom)
            learn.smooth_loss = self.smooth_loss.value
            self.losses.append(learn.smooth_loss)

    def after_cancel_train(self) -> None:
        self._cancelled = True

    def after_cancel_validate(self) -> None:
        self._cancelled = True

    def after_train(self) -> None:
        self._row += [None if self._cancelled else _value(m, self._seen) for m in self._train_mets]

    def after_validate(self) -> None:
        self._row += [None if self._cancelled else _value(m, self._seen) for m in self._valid_mets]

    def after_epoch(self) -> None:
        if self._trained:
            self._row += [None] * (len(self._columns) - len(self._row))
            self.values.append(self._row)
            self.iters.append(self.smooth_loss.count)
        self.learn.final_record = list(self._row)
        took = [format_time(time.perf_counter() - self._start)] if self.add_time else []
        self.log = [self.epoch, *self._row, *took]
        self.logger(self.log)

    def plot_loss(
        self,
        skip_start: int = 5,
        with_valid: bool = True,
        log: bool = False,
        show_epochs: bool = False,
        ax: Any = None,
    ) -> Any:
        """Draw the smoothed training loss over batches, and validation's after each epoch. Returns the Axes.

        Args:
            skip_start: how many batches to leave out.
            with_valid: draw validation's too.
            log: logarithmic axes.
            show_epochs: mark where epochs end.
            ax: the Axes to draw into; None: new ones.
        """
        ax = _axes() if ax is None else ax
        steps = range(skip_start, len(self.losses))
        ax.plot(steps, [float(x) for x in self.losses[skip_start:]], label="train")
        if log:
            ax.set(xscale="log", yscale="log")
        for x in self.iters if show_epochs else ():
            ax.axvline(x, color="grey", ls=":")
        ax.set(ylabel="loss", xlabel="steps", title="learning curve")
        if with_valid and "valid_loss" in self._columns:
            column = self._columns.index("valid_loss")
            points = [(i, row[column]) for i, row in zip(self.iters, self.values, strict=True)]
            points = [(i, y) for i, y in points if i >= skip_start and y is not None]
            ax.plot([i for i, _ in points], [y for _, y in points], label="valid")
            ax.legend()
        return ax

    def plot_sched(self, keys: Sequence[str] | str | None = None, figsize: Any = None) -> list[Any]:
        """Draw hyperparameters over batches: ``keys``, or all that were recorded. Returns a list of Axes.

        ``figsize``: the figure's, in inches. Raises ValueError if there are none.
        """
        import matplotlib.pyplot as plt

        keys = [keys] if isinstance(keys, str) else list(keys or (k for k, v in self.hps.items() if v))
        if not keys:
            raise ValueError("no hyperparameters are recorded yet; fit first")
        columns = min(2, len(keys))
        rows = (len(keys) + 1) // 2
        size = figsize or (6 * columns, 4 * rows)
        _, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        drawn, unused = axes.flatten()[: len(keys)].tolist(), axes.flatten()[len(keys) :]
        for key, ax in zip(keys, drawn, strict=True):
            ax.plot(self.hps[key])
            ax.set(title=TITLES.get(key, key), xlabel="batch", ylabel=key)
        for ax in unused:
            ax.remove()
        return drawn

    def plot_lr_find(
        self,
        skip_end: int = 5,
        suggestions: Sequence[tuple[float, float]] | None = None,
        nms: Sequence[str] | None = None,
        ax: Any = None,
    ) -> Any:
        """Draw the loss over the rates of `Learner.lr_find`, marked at each suggestion with its rate. Returns the
        Axes.

        Args:
            skip_end: how many batches to leave out at the end.
            suggestions: points to mark.
            nms: their names.
            ax: the Axes to draw into; None: new ones.
        """
        ax = _axes() if ax is None else ax
        until = max(len(self.lrs) - skip_end, 0)
        ax.plot(self.lrs[:until], [float(x) for x in self.losses[:until]])
        ax.set(ylabel="Loss", xlabel="Learning Rate", xscale="log")
        for i, (point, name) in enumerate(zip(suggestions or (), nms or (), strict=True)):
            ax.plot(*point, "o", label=name, c=f"C{i + 1}")
            ax.annotate(f"{point[0]:.2g}", point, (7, 5), textcoords="offset points", c=f"C{i + 1}")
        if suggestions:
            ax.legend(loc="best")
        return ax


def _value(metric: Any, batches: int) -> Any:
    """What a metric came to; NaN where there was no batch and it has nothing to say, or cannot."""
    try:
        value = number(metric.value)
    except Exception:
        if batches:
            raise
        return math.nan
    return math.nan if value is None and not batches else value


def _axes() -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots()[1]


def format_time(seconds: float) -> str:
    """As 00:05, or 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02}:{s:02}" if h else f"{m:02}:{s:02}"


def as_line(cells: Sequence[Any]) -> str:
    """A line of the table that a fit prints: names, or an epoch's values."""
    texts = ("-" if c is None else f"{c:.6f}" if isinstance(c, float) else str(c) for c in cells)
    return " ".join(f"{text:>12}" for text in texts)


def print_line(cells: Sequence[Any]) -> None:
    """The Learner's ``logger``, where nothing else is set."""
    print(as_line(cells), flush=True)


def print_nothing(cells: Sequence[Any]) -> None:
    """The logger of a silent Learner: at the top of a module, for it goes into pickles."""
