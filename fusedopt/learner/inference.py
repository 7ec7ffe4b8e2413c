"""Validation and predictions of a model as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import default_collate

from .batches import batch_size, concat, mapped
from .callback import Callback
from .checks import as_loader
from .losses import of_items, unreduced
from .order import listed
from .ordered import numbered, order_of, whole
from .views import single

CLASSIFY = (nn.CrossEntropyLoss, nn.NLLLoss, functional.cross_entropy, functional.nll_loss)


class GatherPreds(Callback):
    """Keeps what the model makes of each batch, on the CPU: fastai's GatherPredsCallback."""

    order = 1000  # predictions and losses are final

    def __init__(self, with_input: bool = False, with_loss: bool = False) -> None:
        self.with_input, self.with_loss = with_input, with_loss

    def before_validate(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.iters: list[int] = []

    def after_loss(self) -> None:
        loss = of_items(self.loss, self.yb) if self.with_loss and self.yb else ()
        batch = self.xb if self.with_input else (), self.pred, self.yb, loss
        self.seen.append(self.to_detach(batch))
        self.iters.append(self.iter)


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
        """The loss and the metrics over a loader; None without a Recorder.

        ``ds_idx`` is the loader's number, by default that for validation, ``dl`` another in place of it; ``cbs`` are
        callbacks for this time.
        """
        self._infer(self.dls[ds_idx] if dl is None else as_loader(dl), cbs)
        return getattr(self, "final_record", None)

    def get_preds(
        self,
        ds_idx: int = 1,
        dl: Iterable[Any] | None = None,
        with_input: bool = False,
        with_decoded: bool = False,
        with_loss: bool = False,
        act: Callable[[Any], Any] | None = None,
        reorder: bool = True,
        cbs: Any = None,
    ) -> tuple[Any, ...]:
        """Predictions and targets, on the CPU: ``([inputs,] preds, targets[, decoded][, losses])``.

        They come in the order of the dataset, whatever a loader's sampler does. A loader that drops its last batch is
        taken to the dataset's end.

        Args:
            ds_idx: 0 for training's loader, of which all items are taken; 1 for validation's.
            dl: a loader in place of these, with or without targets (which are None then).
            with_input: return the inputs too.
            with_decoded: return what the predictions mean too, see `predict`.
            with_loss: return each item's loss too. Needs a loss function with ``reduction``, as attribute or argument.
            act: applied to predictions; None: the loss function's ``activation``, if it has one.
            reorder: False for the order in which the loader gives them.
            cbs: callbacks for this time.

        Raises:
            TypeError: dl is a dataset, or has no length.
            ValueError: no batches; losses without targets; an order that is not known, as when items are skipped.
        """
        gather = GatherPreds(with_input, with_loss)
        if dl is None or getattr(as_loader(dl), "drop_last", False):
            dl = whole(self.dls[ds_idx] if dl is None else dl)
        dl, numbers = numbered(dl) if reorder else (dl, None)
        with self._losses_of_items() if with_loss else contextlib.nullcontext():
            self._infer(dl, [*listed(cbs), gather])
        if not gather.seen:
            raise ValueError("there is nothing to predict: the loader had no batches, or all were cancelled")
        if with_loss and not gather.seen[0][2]:
            raise ValueError(
                "there are no losses without targets: the loader must give them, or with_loss be False"
            )
        inputs, preds, targets, losses = _in_one(gather, numbers)
        act = act or getattr(self.loss_func, "activation", None)
        preds = preds if act is None else act(preds)
        found = [*([single(inputs)] if with_input else []), preds, single(targets)]
        return (*found, *([self._decodes(preds)] if with_decoded else []), *([losses] if with_loss else []))

    def predict(self, item: Any) -> tuple[Any, Any, Any]:
        """What the model makes of one item: ``(label, decoded, prediction)``, as fastai's.

        Decoded is by the loss function's ``decodes``, if it has one, else the largest of predictions for classes, else
        the prediction. The label is ``dls.vocab[decoded]``, if there is a vocabulary, else decoded.

        Args:
            item: one input, as a dataset gives it; or a tuple of them, if ``dls.n_inp`` says how many.
        """
        preds, _ = self.get_preds(dl=[default_collate([item])])
        decoded = self._decodes(preds)[0]
        vocab = class_names(self.dls)
        return decoded if vocab is None else vocab[int(decoded)], decoded, preds[0]

    def to_detach(self, b: Any, cpu: bool = True) -> Any:
        """Tensors of ``b``, a batch or predictions, without their history, and with ``cpu`` on the CPU."""
        return mapped(b, lambda x: x.detach().cpu() if cpu else x.detach())

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


def class_names(dls: Any) -> Any:
    """The loaders' ``vocab``, if they have one. Where there are several, the last is that of the targets."""
    vocab = getattr(dls, "vocab", None)
    if not isinstance(vocab, (list, tuple)) or not vocab or isinstance(vocab[-1], str):
        return vocab
    return vocab[-1] if isinstance(vocab[-1], Collection) else vocab


def _in_one(gather: GatherPreds, numbers: list[list[int]] | None) -> Any:
    """What was gathered, in the order of these numbers of items, batch by batch."""
    if numbers is None:
        return concat(gather.seen)
    n = sum(batch_size(pred) for _, pred, *_ in gather.seen)
    return concat(gather.seen, order_of(numbers, gather.iters, n))
