"""Loss functions, one loss per item."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from .batches import batch_size


@contextlib.contextmanager
def unreduced(loss_func: Callable[..., torch.Tensor]) -> Iterator[Callable[..., torch.Tensor]]:
    """The loss function in a form that reduces nothing, in a ``with`` block."""
    if not hasattr(loss_func, "reduction"):
        yield partial(loss_func, reduction="none")
        return
    before, loss_func.reduction = loss_func.reduction, "none"
    try:
        yield loss_func
    finally:
        loss_func.reduction = before


def of_items(loss: torch.Tensor, targets: Any) -> torch.Tensor:
    """A batch's loss that was not reduced, as one per item: the mean of those that belong to it.

    A loss function may have flattened them, as fastai's do. One number for all is left as it is.
    """
    n = batch_size(targets)
    return loss.reshape(n, -1).mean(1) if loss.ndim and loss.numel() % n == 0 else loss
