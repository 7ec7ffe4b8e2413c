"""Model and batches on one device."""

from __future__ import annotations

import torch

from ..batches import mapped
from ..callback import Callback


class DeviceCallback(Callback):
    """Moves the model to a device, for good, and each batch: the course's CudaCallback.

    fastai's Learner does so itself, with ``dls.device``.

    Args:
        device: None for the accelerator, if there is one, else the CPU.
    """

    order = -20  # before whatever looks at the model or a batch

    def __init__(self, device: torch.device | str | None = None) -> None:
        if device is None:
            device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        self.device = torch.device(device)

    def after_create(self) -> None:
        self._move()

    def before_fit(self) -> None:
        self._move()

    def before_batch(self) -> None:
        self.learn.xb, self.learn.yb = mapped((self.xb, self.yb), self._there)

    def _there(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.device, non_blocking=True)

    def _move(self) -> None:
        self.model.to(self.device)
        if isinstance(self.loss_func, torch.nn.Module):
            self.loss_func.to(self.device)
        if self.opt is not None and self._left_behind():
            self.opt.load_state_dict(self.opt.state_dict())  # which puts each tensor beside its parameter

    def _left_behind(self) -> bool:
        """Whether the optimizer has state on another device, from training there."""
        return any(
            isinstance(x, torch.Tensor) and x.ndim > 0 and x.device != p.device
            for p, state in self.opt.state.items()
            for x in state.values()
        )
