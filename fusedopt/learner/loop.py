"""The training loop: epochs, batches and steps, with an event at every turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from .batches import parts
from .callback import Callback
from .checks import add_note, as_tensor, one_number
from .events import CANCEL
from .having import Having
from .minimized import LOSS_EVENTS, Minimized
from .order import listening
from .views import Views


class Loop(Having, Minimized, Views):
    """Epochs over two loaders, and callbacks at every event. `Learner` adds what makes it convenient.

    While it runs: ``epoch`` of ``n_epoch``; ``iter`` of ``n_iter`` in this loader ``dl``; ``xb`` and ``yb``, tuples;
    ``pred``; ``loss``, and ``loss_grad``, which backward starts from; ``training``. See `Views` and `Minimized` too.
    """

    dls: Sequence[Iterable[Any]]
    model: torch.nn.Module
    loss_func: Callable[..., torch.Tensor]
    opt: Any
    dl: Any
    loss: Any
    loss_grad: Any
    training, n_epoch = False, 1
    epoch = iter = n_iter = start_epoch = 0

    def __init__(self) -> None:
        self.cbs: list[Callback] = []
        self._listening: dict[str, list[Callback]] = {}
        self._forget_batch()

    def __call__(self, event_name: str) -> None:
        """Tell every callback of an event, in their order. What one raises names it and the event."""
        if event_name not in self._listening:
            self._listening[event_name] = listening(self.cbs, event_name)
        if event_name == "after_loss":
            self._begin_to_follow()
        for cb in self._listening[event_name]:
            try:
                cb(event_name)
            except tuple(CANCEL.values()):
                raise
            except Exception as error:
                add_note(error, f"in the callback {cb!r}, at the event {event_name}")
                raise
            if event_name in LOSS_EVENTS:
                self._follow_loss()

    # -- the loop --
    def _run(self, n_epoch: int) -> None:
        self.n_epoch, self._running = n_epoch, True
        self._listening.clear()  # classes may have new methods, as in a notebook
        try:
            self._with_events("fit", self._fit)
        except BaseException:
            self.opt.zero_grad()  # the next fit must not add to an unfinished batch's
            if (release := getattr(self.opt, "gradient_release", None)) is not None:
                release.abandon()
            raise
        finally:
            self._running = False
            with ExitStack() as last:  # so that each has its turn, whatever another raises
                last.callback(self._forget_batch)
                for cb in self.cbs:
                    cb.run = True
                    last.callback(cb.clean_up)

    def _with_events(self, part: str, run: Callable[[], None]) -> None:
        try:
            self(f"before_{part}")
            run()
        except CANCEL[part]:
            self(f"after_cancel_{part}")
        self(f"after_{part}")

    def _fit(self) -> None:
        for epoch in range(self.start_epoch, self.n_epoch):
            self.epoch = epoch
            self._with_events("epoch", self._epoch)

    def _epoch(self) -> None:
        self._train()
        self._validate()

    def _train(self) -> None:
        self.dl = self.dls[0]
        self._with_events("train", self._batches)

    def _validate(self, dl: Iterable[Any] | None = None) -> None:
        self.dl = self.dls[1] if dl is None else dl
        with torch.no_grad():
            self._with_events("validate", self._batches)

    def _batches(self) -> None:
        self.n_iter = len(self.dl)
        for i, batch in enumerate(self.dl):
            self.one_batch(i, batch)

    def one_batch(self, i: int, b: Any) -> None:
        """Train or evaluate on this batch, the ``i``-th of its loader."""
        self.iter, self._loss_before = i, self.loss
        self.xb, self.yb = parts(b, getattr(self.dls, "n_inp", None), self.model)
        self._with_events("batch", self._batch)

    def _batch(self) -> None:
        self.pred = self.model(*self.xb)
        self("after_pred")
        if self.yb:
            self.loss_grad = as_tensor(self.loss_func(self.pred, *self.yb))
            self.loss = self.loss_grad.clone()
        self("after_loss")
        if self.training and self.yb:
            self._with_events("backward", self._backward)
            self._with_events("step", self._step)
            self.opt.zero_grad()

    def _backward(self) -> None:
        one_number(self.loss_grad).backward()

    def _step(self) -> None:
        self.opt.step()

    def _forget_batch(self) -> None:
        self.dl, self.xb, self.yb, self.pred = None, (None,), (None,), None
        self.loss = self.loss_grad = self._loss_before = None
        self._follow_no_longer()
