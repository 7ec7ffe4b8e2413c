"""Steps over more items than fit into a batch."""

from __future__ import annotations

from contextlib import ExitStack

from ..batches import batch_size
from ..callback import Callback
from ..events import CancelBatchException
from .mixed_precision import MixedPrecision


class GradientAccumulation(Callback):
    """Steps after ``n_acc`` items or more, with the sum of their losses' gradients over ``n_acc``.

    Batches without a step end in ``after_cancel_batch``. What a fit has left over is dropped when the next one begins;
    in fastai it is added to that one's first step.

    Where the optimizer releases gradients (``release_gradients``), they are kept until the batch that steps.
    """

    order, run_valid = MixedPrecision.order - 4, False

    def __init__(self, n_acc: int = 32) -> None:
        self.n_acc, self.count = n_acc, 0
        self._keeping = ExitStack()

    def before_fit(self) -> None:
        self.count = 0
        if self.opt is not None:
            self.opt.zero_grad()

    def after_loss(self) -> None:
        self.learn.loss_grad = self.loss_grad / (self.n_acc / batch_size(self.yb))

    def before_backward(self) -> None:
        self._keeping.close()  # of a batch that was cut short
        release = getattr(self.opt, "gradient_release", None)
        if release is not None:
            more = self.count + batch_size(self.yb) < self.n_acc
            self._keeping.enter_context(release.accumulate(more))

    def after_backward(self) -> None:
        self._keeping.close()

    def clean_up(self) -> None:
        self._keeping.close()

    def before_step(self) -> None:
        self.count += batch_size(self.yb)
        if self.count < self.n_acc:
            raise CancelBatchException
        self.count = 0
