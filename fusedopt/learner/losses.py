"""Loss functions, one loss per item."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch


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
