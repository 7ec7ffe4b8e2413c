"""Callbacks of `fusedopt.callbacks` as many rules here want them."""

from __future__ import annotations

from functools import partial

from ..callbacks import average_grad

dampened = partial(average_grad, dampening=True)
"""The running average of the gradients that Adam has; without ``dampening`` it is their sum."""
