"""Transforms of whole batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..callback import Callback


class BatchTransform(Callback):
    """Changes a batch's inputs, where they are by then: on the device, if there is a `DeviceCallback`.

    Args:
        tfm: takes the input (several: an argument each) and gives the new one (a tuple of them).
        on_train, on_valid: in training, in validation and prediction.
    """

    order = -5  # after the device, before what mixes or casts

    def __init__(self, tfm: Callable[..., Any], on_train: bool = True, on_valid: bool = True) -> None:
        self.tfm, self.run_train, self.run_valid = tfm, on_train, on_valid

    def before_batch(self) -> None:
        new = self.tfm(*self.xb)
        self.learn.xb = new if isinstance(new, tuple) else (new,)
