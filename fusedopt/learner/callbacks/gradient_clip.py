"""Gradients no longer than allowed."""

from __future__ import annotations

from torch import nn

from ..callback import Callback
from .mixed_precision import MixedPrecision


class GradientClip(Callback):
    """Scales the gradients of a step so that the ``norm_type``-norm over all of them is at most ``max_norm``.

    An optimizer made with ``max_grad_norm`` does it within its step, and rewrites no gradient.

    Raises:
        RuntimeError: in a fit, the optimizer releases gradients (``release_gradients``).
    """

    order = MixedPrecision.order + 1

    def __init__(self, max_norm: float = 1.0, norm_type: float = 2.0) -> None:
        self.max_norm, self.norm_type = max_norm, norm_type

    def before_fit(self) -> None:
        if getattr(self.opt, "gradient_release", None) is not None:
            raise RuntimeError(
                "GradientClip scales gradients before the step, and release_gradients() has used most of them by then. "
                'Remedy: an optimizer with max_grad_norm, and release_gradients(clip="last")'
            )

    def before_step(self) -> None:
        if hasattr(self, "mixed_precision"):
            self.mixed_precision.unscale()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm, self.norm_type)
