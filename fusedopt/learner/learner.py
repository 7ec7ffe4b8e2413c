"""The Learner: model, data, loss and optimizer in one place, and the ways to train them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import env
from ..optimizer import named
from .callbacks.mixed_precision import Precision
from .callbacks.progress import Progress
from .callbacks.recorder import Recorder, print_line, print_nothing
from .callbacks.train_eval import TrainEval
from .checks import (
    as_callback,
    as_loaders,
    as_loss_func,
    as_model,
    as_opt_func,
    as_optimizer,
    epoch_number,
    known_event,
    not_finite,
    tell_misspelt,
    trained,
)
from .fitting import Fitting
from .freezing import say_if_nothing_froze
from .inference import Inference
from .loop import Loop
from .metrics import as_metric
from .order import listed
from .parameters import norm_bias_params, trainable_params
from .saving import Saving
from .summary import Summary, called

LR = 1e-3


class Learner(Fitting, Inference, Precision, Saving, Summary, Loop):
    """Trains a model, as ``fastai.learner.Learner`` does and under its names.

    Args:
        dls: the loaders for training and validation: any pair of ``torch.utils.data.DataLoader``, or an object that has
            them as ``train`` and ``valid``.
        model: takes a batch's inputs and gives predictions.
        loss_func: takes predictions and targets and gives one number; None: that of fastai's data.
        opt_func: takes parameters (a list per group) and ``lr``.
        lr: learning rate; ``slice(a, b)`` for rates from a to b over the groups.
        splitter: the model's parameters, as one list or several; each list is a group that can be frozen.
        cbs: callbacks, or their classes.
        metrics: functions of predictions and targets, averaged over validation; or objects, see `Metric`.
        wd: weight decay; None leaves it to ``opt_func``.
        wd_bn_bias: decay normalization layers and biases too.
        train_bn: train normalization layers of frozen groups.
        moms: momentum at the start, in the middle and at the end of `fit_one_cycle`.
        path: where `save` and `export` put files; None: ``dls.path``, if there is one, else the working directory.
        default_cbs: whether `TrainEval` and `Recorder` come with it.

    Raises:
        TypeError: dls that are no pair with lengths, a class for an instance, an optimizer for what makes one, no
            callbacks or metrics; in a fit, an optimizer that is not like fastai's, a loss that is no tensor.
        ValueError: an empty loader, callbacks whose order is a cycle or whose name is taken; in a fit, a model without
            parameters to train, a loss that is not one number.
    """

    _told = _entered = False
    """Whether a fit has told that its loss is NaN, and whether a ``with`` block is in one."""

    def __init__(
        self,
        dls: Any,
        model: torch.nn.Module,
        loss_func: Callable[..., torch.Tensor] | None = None,
        opt_func: Callable[..., Any] = named.Adam,
        lr: float | slice = LR,
        splitter: Callable[[torch.nn.Module], Any] = trainable_params,
        cbs: Any = None,
        metrics: Any = None,
        wd: float | None = None,
        wd_bn_bias: bool = False,
        train_bn: bool = True,
        moms: tuple[float, float, float] = (0.95, 0.85, 0.95),
        path: str | Path | None = None,
        default_cbs: bool = True,
    ) -> None:
        super().__init__()
        self.dls, self.model, self.opt_func = as_loaders(dls), as_model(model), as_opt_func(opt_func)
        self.loss_func = as_loss_func(loss_func, dls)
        self.lr, self.splitter, self.metrics = lr, splitter, metrics
        self.wd, self.wd_bn_bias, self.train_bn, self.moms = wd, wd_bn_bias, train_bn, moms
        self.path, self.opt = Path(getattr(dls, "path", ".") if path is None else path), None
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
        start_epoch: int = 0,
    ) -> None:
        """Train for some epochs, with these callbacks besides the Learner's own.

        Args:
            n_epoch: how many, those before ``start_epoch`` among them.
            lr: learning rate; None: the Learner's.
            wd: weight decay; None: the Learner's.
            cbs: callbacks for this time.
            reset_opt: make the optimizer anew, without its state.
            start_epoch: goes on with a training that was interrupted: epochs before it are done, for schedules too.
                (In fastai they are gone through, without batches.)
        """
        as_loss_func(self.loss_func)
        self.start_epoch = epoch_number(start_epoch)
        with self.added_cbs(cbs):
            if reset_opt or self.opt is None:
                self.create_opt()
            if (wd := self.wd if wd is None else wd) is not None:
                self.opt.set_hypers(wd=wd)
            self.opt.set_hypers(lr=self.lr if lr is None else lr)
            self._told = False
            self._run(n_epoch)
            self._tell_not_finite()

    def create_opt(self) -> None:
        """Make the optimizer anew: flags say which parameters are not decayed, and which are trained when frozen."""
        if isinstance(self.opt_func, partial) and "lr" in self.opt_func.keywords:
            self.lr = self.opt_func.keywords["lr"]
        params = trained(self.splitter(self.model))
        self.opt = as_optimizer(as_opt_func(self.opt_func)(params, lr=self.lr))
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

    def one_batch(self, i: int, b: Any) -> None:
        """Train on the batch ``b``, the ``i``-th of its loader, or evaluate it, as ``learn.training`` says.

        Outside of a fit it is a fit of its own, but for the results, which stay: ``learn.pred``, ``learn.loss``.
        """
        if self.dl is not None or self._entered:
            return super().one_batch(i, b)
        with self.no_logging(), self:
            super().one_batch(i, b)

    def __enter__(self) -> Learner:
        """The events that begin a fit and an epoch, for batches that you go through yourself, with `one_batch`.

        Callbacks that watch over a whole fit sit it out, as they do predictions.
        """
        if self.training and self.opt is None:
            self.create_opt()
        self._entered, self.inferring, self.n_iter = True, True, max(self.n_iter, 1)
        self(["before_fit", "before_epoch"])
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.ExitStack() as last:
            for cb in self.cbs:
                last.callback(setattr, cb, "run", True)
                last.callback(cb.clean_up)
            last.callback(setattr, self, "inferring", False)
            self._entered = False
            self(["after_epoch", "after_fit"])

    def _epoch(self) -> None:
        super()._epoch()
        self._tell_not_finite()

    def _tell_not_finite(self) -> None:
        """Once a fit."""
        recorder = vars(self).get("recorder")
        if self._told or "lr_finder" in vars(self) or not isinstance(recorder, Recorder):
            return
        if where := not_finite(recorder, self.epoch):
            self._told = True
            warnings.warn(
                f"fusedopt: {where}. A lower learning rate may help, or GradientClip; TerminateOnNaN ends a fit there.",
                RuntimeWarning,
                stacklevel=env.caller_level(),
            )

    # -- callbacks --
    def __call__(self, event_name: Any) -> Any:
        """Tell every callback of an event, or of several in a list.

        With callbacks instead it is `added_cbs`: ``with learn([Progress()]): ...``.
        """
        if isinstance(event_name, str):
            if event_name not in self._listening:
                known_event(event_name)
            return super().__call__(event_name)
        given = listed(event_name)
        if not all(isinstance(x, str) for x in given):
            return self.added_cbs(given)
        for name in map(known_event, given):
            super().__call__(name)
        return None

    def add_cb(self, cb: Any) -> Learner:
        """Add the callback ``cb``, or one of this class; it is found under its name from now on."""
        cb = as_callback(cb)
        tell_misspelt(cb)
        return super().add_cb(cb)

    def add_cbs(self, cbs: Any) -> Learner:
        """Add each of ``cbs``, callbacks or their classes."""
        for cb in listed(cbs):
            self.add_cb(cb)
        return self

    def remove_cbs(self, cbs: Any) -> Learner:
        """Remove each of ``cbs``, callbacks or all of a class."""
        for cb in listed(cbs):
            self.remove_cb(cb)
        return self

    @contextlib.contextmanager
    def added_cbs(self, cbs: Any) -> Iterator[Learner]:
        """With the callbacks ``cbs`` in a ``with`` block."""
        made = [as_callback(cb) for cb in listed(cbs)]
        try:
            self.add_cbs(made)
            yield self
        finally:
            self.remove_cbs(made)

    @contextlib.contextmanager
    def removed_cbs(self, cbs: Any) -> Iterator[Learner]:
        """Without the callbacks ``cbs``, or all of their classes, in a ``with`` block, and as before it then."""
        before, named = list(self.cbs), listed(cbs)
        gone = [
            cb for cb in before if any(cb is x or (isinstance(x, type) and isinstance(cb, x)) for x in named)
        ]
        self.remove_cbs(gone)
        try:
            yield self
        finally:
            self.add_cbs([cb for cb in gone if cb not in self.cbs])
            self.cbs.sort(key=lambda cb: before.index(cb) if cb in before else len(before))

    def no_bar(self) -> contextlib.AbstractContextManager[Learner]:
        """Without `Progress` in a ``with`` block."""
        return self.removed_cbs(Progress)

    @contextlib.contextmanager
    def no_logging(self) -> Iterator[Learner]:
        """Without a line per epoch in a ``with`` block."""
        logger, self.logger = self.logger, print_nothing
        try:
            yield self
        finally:
            self.logger = logger

    # -- the model's attributes --
    def __getattr__(self, name: str) -> Any:
        """What the Learner has not, and its model has: ``learn.fc`` is ``learn.model.fc``. Private names are not."""
        model = self.__dict__.get("model")
        if name.startswith("_") or not hasattr(model, name):
            also = "" if model is None else f", and its model, a {type(model).__name__}, has none either"
            raise AttributeError(f"the Learner has no attribute {name!r}{also}", name=name, obj=self)
        return getattr(model, name)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(name for name in dir(self.model) if not name.startswith("_"))]

    def __repr__(self) -> str:
        parts = [type(self.model).__name__, called(self.loss_func), called(self.opt_func), f"lr={self.lr}"]
        metrics = [f"metrics: {', '.join(m.name for m in self.metrics)}"] if self.metrics else []
        return f"Learner({', '.join([*parts, *metrics])}, cbs: {', '.join(map(repr, self.cbs)) or 'none'})"
