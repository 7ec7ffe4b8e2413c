"""What happens in a training loop, in order, and the exceptions that cut its parts short."""

from __future__ import annotations

import difflib
import functools
import inspect
import warnings
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
OF_BATCH = {"x", "y", "xb", "yb", "pred", "loss", "loss_grad"}
"""What a Learner has of a batch."""
SAME = {**FIRST_EDITION, **{old: name for name, old in FIRST_EDITION.items()}}
"""The other name of an event, by either."""
HEARD = {*EVENTS, *FIRST_EDITION.values()}
"""All names that a callback's function for an event can have."""
OF_2019 = {"_order": "order", "set_runner": "learn, which is set for you"}
"""What callbacks of the course of 2019 have besides events, and what to say in its place."""


def name_for(cb: Any, event_name: str) -> str | None:
    """The name that a callback has an event's function under: the event's, or the first edition's."""
    for name in (event_name, FIRST_EDITION.get(event_name)):
        if name is not None and (name in cb.__dict__ or hasattr(type(cb), name)):
            return name
    return None


def method_for(cb: Any, event_name: str) -> Callable[[], Any] | None:
    """A callback's function for an event, its own or its class's, to be called without arguments.

    A function that was assigned, or handed to the constructor, gets the callback if it asks for an argument.
    """
    name = name_for(cb, event_name)
    found = None if name is None else getattr(cb, name)
    if found is None or getattr(found, "__self__", None) is cb:
        return found
    return functools.partial(found, cb) if _asks_for_one(found) else found


def _asks_for_one(function: Callable[..., Any]) -> bool:
    try:
        each = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins do not tell
        return False
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in each)


def as_event(cb: Any, name: str) -> str:
    """The name of an event; TypeError if it is none."""
    if name not in HEARD:
        close = difflib.get_close_matches(name, HEARD, 1)
        raise TypeError(f"{cb!r} got {name!r}, which is no event" + "".join(f"; {x!r} is one" for x in close))
    return name


def refuse_half(cb: Any) -> None:
    """Raises TypeError for a callback of which a part would never be called."""
    has = {*dir(type(cb)), *vars(cb)}
    for old in sorted(OF_2019.keys() & has):
        raise TypeError(
            f"{cb!r} has {old!r}, which is of the course of 2019, and would do nothing here: say {OF_2019[old]}"
        )
    for name, old in FIRST_EDITION.items():
        if {name, old} <= has:
            raise _twice(cb, name, old)


def _twice(cb: Any, name: str, old: str) -> TypeError:
    return TypeError(
        f"{cb!r} has both {name!r} and {old!r}, which are one event, and only the first would be called: make them one"
    )


def assigned(cb: Any, name: str, value: Any) -> None:
    """What there is to do, or to say, when an attribute of a callback is about to be assigned."""
    if name in HEARD:
        if value is not None and not callable(value):
            raise TypeError(
                f"{name!r} of {cb!r} must be a function, not {value!r}: it is called at that event"
            )
        other = SAME.get(name)
        if value is not None and other is not None and (other in vars(cb) or hasattr(type(cb), other)):
            raise _twice(cb, *sorted([name, other]))
        getattr(cb.learn, "_listening", {}).clear()  # whom to tell of events is found out once
    elif name in OF_BATCH and cb.learn is not None:
        warnings.warn(
            f"fusedopt: {cb!r} writes self.{name}, which stays its own and hides the Learner's: "
            f"write self.learn.{name}, or choose another name",
            stacklevel=3,
        )


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
