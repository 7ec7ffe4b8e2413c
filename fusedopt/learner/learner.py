"""The Learner: model, data, loss and optimizer in one place, and the ways to train them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import named
from .callbacks.mixed_precision import Precision
from .callbacks.recorder import Recorder, print_line, print_nothing
from .callbacks.train_eval import TrainEval
from .checks import as_callback, as_loaders, as_optimizer, trained
from .fitting import Fitting
from .freezing import say_if_nothing_froze
from .inference import Inference
from .loop import Loop
from .metrics import as_metric
from .order import listed
from .parameters import norm_bias_params, trainable_params
from .saving import Saving
from .summary import Summary

LR = 1e-3


class Learner(Fitting, Inference, Precision, Saving, Summary, Loop):
    """Trains a model, as ``fastai.learner.Learner`` does and under its names.

    Args:
        dls: the loaders for training and validation: any pair of ``torch.utils.data.DataLoader``.
        model: takes a batch's inputs and gives predictions.
        loss_func: takes predictions and targets and gives one number.
        opt_func: takes parameters (a list per group) and ``lr``.
        lr: learning rate; ``slice(a, b)`` for rates from a to b over the groups.
        splitter: the model's parameters, as one list or several; each list is a group that can be frozen.
        cbs: callbacks, or their classes.
        metrics: functions of predictions and targets, averaged over validation; or objects, see `Metric`.
        wd: weight decay; None leaves it to ``opt_func``.
        wd_bn_bias: decay normalization layers and biases too.
        train_bn: train normalization layers of frozen groups.
        moms: momentum at the start, in the middle and at the end of `fit_one_cycle`.
        path: where `save` and `export` put files.
        default_cbs: whether `TrainEval` and `Recorder` come with it.

    Raises:
        TypeError: dls that are no pair with lengths, callbacks or metrics that are none; in a fit, an optimizer that is
            not like fastai's, a loss that is no tensor.
        ValueError: an empty loader, callbacks whose order is a cycle or whose name is taken; in a fit, a model without
            parameters to train, a loss that is not one number.
    """

    def __init__(
        self,
        dls: Sequence[Iterable[Any]],
        model: torch.nn.Module,
        loss_func: Callable[..., torch.Tensor],
        opt_func: Callable[..., Any] = named.Adam,
        lr: float | slice = LR,
        splitter: Callable[[torch.nn.Module], Any] = trainable_params,
        cbs: Any = None,
        metrics: Any = None,
        wd: float | None = None,
        wd_bn_bias: bool = False,
        train_bn: bool = True,
        moms: tuple[float, float, float] = (0.95, 0.85, 0.95),
        path: str | Path = ".",
        default_cbs: bool = True,
    ) -> None:
        super().__init__()
        self.dls, self.model, self.loss_func, self.opt_func = as_loaders(dls), model, loss_func, opt_func
        self.lr, self.splitter, self.metrics = lr, splitter, metrics
        self.wd, self.wd_bn_bias, self.train_bn, self.moms = wd, wd_bn_bias, train_bn, moms
        self.path, self.opt = Path(path), None
        self.logger: Callable[..., Any] = print_line
        for cb in [*([TrainEval, Recorder] if default_cbs else []), *listed(cbs)]:
            self.add_cb(cb)
        self("after_create")

    @property
    def metrics(self) -> list[Any]:
        """What is measured in validation; assign functions or metrics."""
        return self._metrics

    @metrics.setter
    def metrics(self, given: Any) -> None:
        self._metrics = [as_metric(m) for m in listed(given)]

    # -- training --
    def fit(
        self,
        n_epoch: int,
        lr: float | slice | None = None,
        wd: float | None = None,
        cbs: Any = None,
        reset_opt: bool = False,
    ) -> None:
        """Train for some epochs, with these callbacks besides the Learner's own."""
        with self.added_cbs(cbs):
            if reset_opt or self.opt is None:
                self.create_opt()
            if (wd := self.wd if wd is None else wd) is not None:
                self.opt.set_hypers(wd=wd)
            self.opt.set_hypers(lr=self.lr if lr is None else lr)
            self._run(n_epoch)

    def create_opt(self) -> None:
        """Make the optimizer anew: flags say which parameters are not decayed, and which are trained when frozen."""
        if isinstance(self.opt_func, partial) and "lr" in self.opt_func.keywords:
            self.lr = self.opt_func.keywords["lr"]
        params = trained(self.splitter(self.model))
        self.opt = as_optimizer(self.opt_func(params, lr=self.lr))
        for p in norm_bias_params(self.model, with_bias=True) if not self.wd_bn_bias else ():
            self.opt.state[p]["do_wd"] = False
        for p in norm_bias_params(self.model, with_bias=False) if self.train_bn else ():
            self.opt.state[p]["force_train"] = True

    def freeze_to(self, n: int) -> None:
        """Train the groups from ``n`` on only."""
        if self.opt is None:
            self.create_opt()
        self.opt.freeze_to(n)
        self.opt.clear_state()
        say_if_nothing_froze(self.opt, n)

    def freeze(self) -> None:
        """Train the last group only."""
        self.freeze_to(-1)

    def unfreeze(self) -> None:
        """Train all groups."""
        self.freeze_to(0)

    # -- callbacks --
    def add_cbs(self, cbs: Any) -> Learner:
        for cb in listed(cbs):
            self.add_cb(cb)
        return self

    def remove_cbs(self, cbs: Any) -> Learner:
        for cb in listed(cbs):
            self.remove_cb(cb)
        return self

    @contextlib.contextmanager
    def added_cbs(self, cbs: Any) -> Iterator[Learner]:
        """With these callbacks in a ``with`` block."""
        made = [as_callback(cb) for cb in listed(cbs)]
        try:
            self.add_cbs(made)
            yield self
        finally:
            self.remove_cbs(made)

    @contextlib.contextmanager
    def no_logging(self) -> Iterator[Learner]:
        """Without a line per epoch in a ``with`` block."""
        logger, self.logger = self.logger, print_nothing
        try:
            yield self
        finally:
            self.logger = logger
