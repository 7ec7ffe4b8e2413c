"""What callbacks read of a Learner besides what its loop sets."""

from __future__ import annotations

from typing import Any


class Views:
    """Part of the `Loop`: a batch's input and target by themselves, the loaders' first name, whether a batch ran."""

    dls: Any
    xb: tuple[Any, ...]
    yb: tuple[Any, ...]
    loss: Any
    _loss_before: Any = None
    _running = False
    """Whether this is in a fit."""

    @property
    def x(self) -> Any:
        """The batch's input; several are the tuple ``xb``, which is what to assign."""
        return single(self.xb)

    @property
    def y(self) -> Any:
        """The batch's target; several are the tuple ``yb``, which is what to assign. None without one."""
        return single(self.yb)

    @property
    def data(self) -> Any:
        """What chapter 16 calls ``dls``."""
        return self.dls

    @property
    def measured(self) -> bool:
        """Whether this batch has a loss of its own: it has not if it was cancelled before there was one.

        The loss, the predictions and what is made of them are still an earlier batch's then.
        """
        return self.loss is not self._loss_before


def single(batch: tuple[Any, ...]) -> Any:
    """What is alone in a tuple; None if nothing is."""
    return None if not batch else batch[0] if len(batch) == 1 else batch
