"""Validation and predictions of a model as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, default_collate

from .batches import concat, mapped
from .callback import Callback
from .losses import unreduced
from .order import listed

CLASSIFY = (nn.CrossEntropyLoss, nn.NLLLoss, functional.cross_entropy, functional.nll_loss)


class GatherPreds(Callback):
    """Keeps what the model makes of each batch, on the CPU: fastai's GatherPredsCallback."""

    order = 1000  # predictions and losses are final

    def before_validate(self) -> None:
        self.seen: list[tuple] = []

    def after_loss(self) -> None:
        batch = self.xb, self.pred, self.yb, self.loss if self.yb else ()
        self.seen.append(mapped(batch, lambda x: x.detach().cpu()))


class Inference:
    """The Learner's methods for it. All of them leave optimizer, model and its mode as they are, and print nothing."""

    dls: Any
    model: nn.Module
    loss_func: Callable[..., torch.Tensor]
    training: bool
    cbs: list[Callback]
    added_cbs: Any
    no_logging: Any
    _forget_batch: Any
    _validate: Any
    _with_events: Any
    inferring = False
    """Whether this is no fit, although callbacks see the events of one."""

    def validate(
        self, ds_idx: int = 1, dl: Iterable[Any] | None = None, cbs: Any = None
    ) -> list[float] | None:
        """The loss and the metrics over a loader, by default that for validation; None without a Recorder."""
        self._infer(self.dls[ds_idx] if dl is None else dl, cbs)
        return getattr(self, "final_record", None)

    def get_preds(
        self,
        ds_idx: int = 1,
        dl: Iterable[Any] | None = None,
        with_input: bool = False,
        with_loss: bool = False,
        act: Callable[[Any], Any] | None = None,
        cbs: Any = None,
    ) -> tuple:
        """Predictions and targets of all batches, on the CPU: ``([inputs,] preds, targets[, losses])``.

        Args:
            ds_idx: 0 for training's loader, in the dataset's order and to its end; 1 for validation's.
            dl: a loader in place of these, with or without targets (which are None then).
            with_input: return the inputs too.
            with_loss: return each item's loss too. Needs a loss function with ``reduction``, as attribute or argument.
            act: applied to predictions; None: the loss function's ``activation``, if it has one.
            cbs: callbacks for this time.
        """
        gather = GatherPreds()
        dl = in_order(self.dls[ds_idx] if dl is None else dl)
        with self._losses_of_items() if with_loss else contextlib.nullcontext():
            self._infer(dl, [*listed(cbs), gather])
        if not gather.seen:
            raise ValueError("there is nothing to predict: the loader had no batches, or all were cancelled")
        inputs, preds, targets, losses = concat(gather.seen)
        if with_loss and not targets:
            raise ValueError(
                "there are no losses without targets: the loader must give them, or with_loss be False"
            )
        act = act or getattr(self.loss_func, "activation", None)
        preds = preds if act is None else act(preds)
        found = [*([_single(inputs)] if with_input else []), preds, _single(targets)]
        return (*found, losses.flatten(1).mean(1) if losses.ndim > 1 else losses) if with_loss else (*found,)

    def predict(self, item: Any) -> tuple[Any, Any, Any]:
        """What the model makes of one item: ``(label, decoded, prediction)``, as fastai's.

        Decoded is by the loss function's ``decodes`` if it has one, else the largest of predictions for classes, else
        the prediction. The label is ``dls.vocab[decoded]``, if there is a vocabulary, else decoded.

        Args:
            item: one input, as a dataset gives it; or a tuple of them, if ``dls.n_inp`` says how many.
        """
        preds, _ = self.get_preds(dl=[default_collate([item])])
        decoded = self._decodes(preds)[0]
        vocab = getattr(self.dls, "vocab", None)
        return decoded if vocab is None else vocab[int(decoded)], decoded, preds[0]

    def _infer(self, dl: Iterable[Any], cbs: Any) -> None:
        """One validation, with the events of a fit around it."""
        modes, training = [(m, m.training) for m in self.model.modules()], self.training
        with contextlib.ExitStack() as last:  # so that each has its turn, whatever another raises
            last.callback(self._as_before, modes, training)
            last.enter_context(self.no_logging())
            last.enter_context(self.added_cbs(cbs))
            for cb in self.cbs:
                last.callback(cb.clean_up)
            self.inferring = True
            self._with_events("fit", partial(self._with_events, "epoch", partial(self._validate, dl)))

    def _as_before(self, modes: list[tuple[nn.Module, bool]], training: bool) -> None:
        self.inferring, self.training = False, training
        for module, mode in modes:
            module.training = mode
        for cb in self.cbs:
            cb.run = True
        self._forget_batch()

    @contextlib.contextmanager
    def _losses_of_items(self) -> Iterator[None]:
        before = self.loss_func
        with unreduced(before) as self.loss_func:
            try:
                yield
            finally:
                self.loss_func = before

    def _decodes(self, preds: torch.Tensor) -> torch.Tensor:
        if hasattr(self.loss_func, "decodes"):
            return self.loss_func.decodes(preds)
        loss = type(self.loss_func) if isinstance(self.loss_func, nn.Module) else self.loss_func
        return preds.argmax(1) if loss in CLASSIFY else preds


def in_order(dl: Any) -> Any:
    """A loader of the whole dataset in its order, where one can be told to shuffle or to drop the last batch."""
    known = isinstance(dl, DataLoader) and not isinstance(dl.dataset, IterableDataset) and dl.batch_size
    if not known or not isinstance(dl.sampler, (RandomSampler, SequentialSampler)):
        return dl
    if isinstance(dl.sampler, SequentialSampler) and not dl.drop_last:
        return dl
    same = ("batch_size", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn")
    return DataLoader(dl.dataset, shuffle=False, drop_last=False, **{k: getattr(dl, k) for k in same})


def _single(batch: tuple) -> Any:
    """What is alone in a tuple; None if nothing is."""
    return None if not batch else batch[0] if len(batch) == 1 else batch
