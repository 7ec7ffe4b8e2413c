"""What a training step minimizes, where callbacks change the loss."""

from __future__ import annotations

from typing import Any

import torch

LOSS_EVENTS = {"after_loss", "before_backward"}
"""Where callbacks may change what the gradient is of."""


class Minimized:
    """Part of the `Loop`: ``loss_grad``, which backward starts from, follows what a callback makes of ``loss``.

    A callback of today sets ``learn.loss_grad``, and with or without it ``learn.loss``, which is recorded: then both
    are what it says. One of the first edition knows ``learn.loss`` alone (``self.learn.loss += penalty``): what that
    has gained is in the gradient too. Told apart by callback, so that each finds what those before it have made.
    A loss that leads back to no parameter is for the record only.
    """

    training: bool
    loss: Any
    loss_grad: Any
    _loss_marks: Any = None

    def _begin_to_follow(self) -> None:
        """The loss is as the loss function gave it."""
        self._loss_told = self.loss_grad
        """As much of the loss as ``loss_grad`` has been told of. A tensor apart, for ``loss`` is changed in place."""
        self._loss_marks = self._marks() if self.training else None

    def _follow_loss(self) -> None:
        """Called after each callback at these events."""
        if self._loss_marks is None:
            return
        (loss, version), (grad, grad_version) = seen = self._marks()
        (old, old_version), (old_grad, old_grad_version) = self._loss_marks
        self._loss_marks = seen
        if (loss is old and version == old_version) or not isinstance(loss, torch.Tensor):
            return
        told, self._loss_told = self._loss_told, loss.clone()
        if grad is old_grad and grad_version == old_grad_version and loss.requires_grad:
            self.loss_grad = self._loss_told if grad is told else grad + (self._loss_told - told)
            self._loss_marks = self._marks()

    def _marks(self) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Which tensors they are, and how often these were changed in place."""
        loss, grad = self.loss, self.loss_grad
        return (loss, getattr(loss, "_version", 0)), (grad, getattr(grad, "_version", 0))

    def _follow_no_longer(self) -> None:
        self._loss_marks = self._loss_told = None
