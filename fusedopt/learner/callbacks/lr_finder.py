"""Looking for a learning rate: a mock training at growing rates, and what its losses suggest."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ..events import CancelFitException, CancelValidException
from .schedule import ParamScheduler, sched_exp

Suggestion = tuple[float, tuple[float, float]]
"""A learning rate, and the point of the curve to mark."""


class LRFinder(ParamScheduler):
    """Trains with exponentially growing rates until the loss is four times its best, then undoes all of it.

    Args:
        start_lr, end_lr: the first and the last rate; lists for one per group.
        num_it: batches; at least 6.
        stop_div: stop when the loss diverges.
    """

    def __init__(
        self, start_lr: Any = 1e-7, end_lr: Any = 10, num_it: int = 100, stop_div: bool = True
    ) -> None:
        ends = [np.asarray(x, float) if isinstance(x, (list, tuple)) else x for x in (start_lr, end_lr)]
        super().__init__({"lr": sched_exp(*ends)})
        self.num_it, self.stop_div = max(num_it, 6), stop_div
        self._undo = ExitStack()

    def before_fit(self) -> None:
        super().before_fit()
        if not self.run:
            return
        self._undo.enter_context(as_before(self.learn))
        self.best_loss = float("inf")

    def before_batch(self) -> None:
        self.set_at(self.train_iter / self.num_it)

    def after_batch(self) -> None:
        super().after_batch()
        loss = float(self.smooth_loss) if self.measured else self.best_loss
        self.best_loss = min(loss, self.best_loss)
        if (loss > 4 * self.best_loss and self.stop_div) or self.train_iter >= self.num_it:
            raise CancelFitException

    def before_validate(self) -> None:
        raise CancelValidException

    def clean_up(self) -> None:
        self._undo.close()


@contextmanager
def as_before(learn: Any) -> Iterator[None]:
    """What a training changes in a ``with`` block is as before after it: model, optimizer, random numbers.

    Of the model: parameters, buffers, gradients, and modules' own attributes (mode, counters, hidden state) that are
    replaced and not changed in place.
    """
    model, opt, training = learn.model, learn.opt, learn.training
    attributes = [(m, {k: v for k, v in vars(m).items() if k not in TABLES}) for m in model.modules()]
    tables = [(vars(m)[k], dict(vars(m)[k])) for m in model.modules() for k in TABLES]
    tensors = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    grads = [(p, p.grad) for p in model.parameters()]
    saved, random_numbers = copy.deepcopy(opt.state_dict()), _random_state(learn.dls)
    for p, _ in grads:
        p.grad = None  # those that are there stay as they are
    try:
        yield
    finally:
        for m, values in attributes:
            for k in vars(m).keys() - values.keys() - TABLES:
                delattr(m, k)
            vars(m).update(values)
        for table, values in tables:
            table.clear()
            table.update(values)
        with torch.no_grad():
            for t, was in tensors:
                t.copy_(was)
        for p, grad in grads:
            p.grad = grad
        opt.load_state_dict(saved)
        learn.training = training
        for put_back in random_numbers:
            put_back()


TABLES = {"_parameters", "_buffers"}
"""Where a module has its tensors: the same dicts must stay, since others hold on to them."""


def _random_state(dls: Any) -> list[Callable[[], Any]]:
    """What puts random numbers back to where they are now: torch's, its devices', loaders', numpy's and Python's."""
    places: list[tuple[Any, Any]] = [
        (torch.get_rng_state, torch.set_rng_state),
        (np.random.get_state, np.random.set_state),
        (random.getstate, random.setstate),
    ]
    if torch.cuda.is_initialized():
        places += [(torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all)]
    for dl in (dls[0], dls[1]):
        for owner in (dl, getattr(dl, "sampler", None)):
            if (own := getattr(owner, "generator", None)) is not None:
                places += [(own.get_state, own.set_state)]
    return [functools.partial(put, get()) for get, put in places]


# -- what losses suggest: functions of the rates, their losses, and how many batches there were to be --
def _arrays(lrs: Any, losses: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(lrs, np.float32), np.asarray(losses, np.float32)


def minimum(lrs: Any, losses: Any, num_it: int) -> Suggestion:
    """A tenth of the rate with the least loss: the last before it diverges.

    ``lrs``, ``losses`` and ``num_it`` are as of `valley`.
    """
    lrs, losses = _arrays(lrs, losses)
    i = losses.argmin()
    return float(lrs[i]) / 10, (float(lrs[i]), float(losses[i]))


def steep(lrs: Any, losses: Any, num_it: int) -> Suggestion:
    """The rate at which the loss falls fastest, by the rate's logarithm.

    ``lrs``, ``losses`` and ``num_it`` are as of `valley`.
    """
    lrs, losses = _arrays(lrs, losses)
    i = (np.diff(losses) / np.diff(np.log(lrs))).argmin()
    return float(lrs[i]), (float(lrs[i]), float(losses[i]))


def valley(lrs: Any, losses: Any, num_it: int) -> Suggestion:
    """Half way down the longest valley: the longest series of losses that fall, others between them aside.

    ``lrs`` and ``losses`` have one number per batch; ``num_it`` is how many batches there were to be.
    """
    lrs, losses = _arrays(lrs, losses)
    length = np.ones(len(losses), int)
    """Of the longest such series that ends at each."""
    for i in range(1, len(losses)):
        length[i] += length[:i][losses[:i] > losses[i]].max(initial=0)
    end = int(length.argmax())
    n = int(length[end]) if end else 0
    i = end - n + n // 3 + n // 6
    return float(lrs[i]), (float(lrs[i]), float(losses[i]))


def slide(
    lrs: Any,
    losses: Any,
    num_it: int,
    lr_diff: int = 15,
    thresh: float = 0.005,
    adjust_value: float = 1.0,
) -> Suggestion:
    """From the highest rate down, the one where the slope is no longer another than ``lr_diff`` batches before.

    Slopes are the same up to ``thresh``; the rate is multiplied by ``adjust_value``. ``lrs``, ``losses`` and
    ``num_it`` are as of `valley`.
    """
    lrs, losses = _arrays(lrs, losses)
    lr_diff = min(lr_diff, len(lrs) - 1)
    slope = np.gradient(losses)[::-1]
    calm = np.abs(slope[:-lr_diff] - slope[lr_diff:]) <= thresh
    steps = int(calm.argmax()) if calm.any() else len(calm)
    lr = float(lrs[::-1][lr_diff + max(steps - 1, 0)]) * adjust_value
    return lr, (lr, float(np.interp(np.log10(lr), np.log10(lrs), losses)))


SuggestionMethod = SimpleNamespace(Valley=valley, Slide=slide, Minimum=minimum, Steep=steep)
"""The four, for an editor to complete."""
