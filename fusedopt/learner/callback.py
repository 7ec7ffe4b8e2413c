"""The base of all callbacks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from .events import INNER, as_event, assigned, method_for


class Callback:
    """Something that happens at events: methods named after them, or functions: ``Callback(after_batch=f)``.

    What is not found here is read from the Learner; what is written stays here (for the other, ``self.learn.x = ...``).
    ``order`` says when, among callbacks, and ``run_before``, ``run_after`` (classes or their names) overrule it.
    ``run`` False silences it for the rest of a fit; ``run_train``, ``run_valid`` say in which of them it sees batches.
    """

    learn: Any = None
    order, run, run_train, run_valid = 0, True, True, True
    run_before: ClassVar[Iterable[type | str]] = ()
    run_after: ClassVar[Iterable[type | str]] = ()

    def __init__(self, **functions: Callable[..., Any]) -> None:
        super().__init__()
        for event_name, function in functions.items():
            setattr(self, as_event(self, event_name), function)

    @property
    def name(self) -> str:
        """The class's name without Callback, in snake case: the Learner has the callback under it."""
        plain = re.sub(r"Callback$", "", type(self).__name__) or "callback"
        return re.sub(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", plain).lower()

    def __call__(self, event_name: str) -> Any:
        """Do what there is to do at an event. Override it to see them all."""
        training = getattr(self.learn, "training", False)
        here = event_name not in INNER or (self.run_train if training else self.run_valid)
        method = method_for(self, event_name) if self.run and here else None
        result = method() if method is not None else None
        if event_name == "after_fit":
            self.run = True
        return result

    def clean_up(self) -> None:
        """Called when a fit ends, however it ends: give back what must not outlive it, such as hooks."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self.learn is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.learn, name)

    def __setattr__(self, name: str, value: Any) -> None:
        assigned(self, name, value)
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return type(self).__name__
