"""What happens in a training loop, in order, and the exceptions that cut its parts short."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

INNER = [
    "before_batch",
    "after_pred",
    "after_loss",
    "before_backward",
    "after_cancel_backward",
    "after_backward",
    "before_step",
    "after_cancel_step",
    "after_step",
    "after_cancel_batch",
    "after_batch",
]
"""Events of a batch, which callbacks for training or validation only see there."""
EVENTS = [
    "after_create",
    "before_fit",
    "before_epoch",
    "before_train",
    *INNER,
    "after_cancel_train",
    "after_train",
    "before_validate",
    "after_cancel_validate",
    "after_validate",
    "after_cancel_epoch",
    "after_epoch",
    "after_cancel_fit",
    "after_fit",
]
event = SimpleNamespace(**{name: name for name in EVENTS})
"""``event.before_fit`` and so on: names that an editor completes and a typing error cannot get past."""
FIRST_EDITION = {name: name.replace("before_", "begin_") for name in EVENTS if name.startswith("before_")}
"""What the first edition of the course calls them. Callbacks that speak it run too."""


def method_for(cls: type, event_name: str) -> Callable[..., Any] | None:
    """A callback's method for an event, under its name or the first edition's."""
    return getattr(cls, event_name, None) or getattr(cls, FIRST_EDITION.get(event_name, event_name), None)


class CancelBackwardException(Exception):
    """Skip the backward pass: go to ``after_backward``."""


class CancelStepException(Exception):
    """Skip the optimizer's step: go to ``after_step``."""


class CancelBatchException(Exception):
    """Skip the rest of the batch: go to ``after_batch``."""


class CancelTrainException(Exception):
    """Skip the rest of the epoch's training: go to ``after_train``."""


class CancelValidException(Exception):
    """Skip the rest of the epoch's validation: go to ``after_validate``."""


class CancelEpochException(Exception):
    """Skip the rest of the epoch: go to ``after_epoch``."""


class CancelFitException(Exception):
    """Stop training: go to ``after_fit``."""


CANCEL = {
    "backward": CancelBackwardException,
    "step": CancelStepException,
    "batch": CancelBatchException,
    "train": CancelTrainException,
    "validate": CancelValidException,
    "epoch": CancelEpochException,
    "fit": CancelFitException,
}
"""By the part of the loop that each cuts short."""
