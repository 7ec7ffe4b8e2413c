"""Mixed precision: the model runs in half the bits, the optimizer in all of them."""

from __future__ import annotations

import warnings
from enum import Enum
from typing import Any

import torch

from ... import env
from ..batches import mapped
from ..callback import Callback
from ..events import CancelStepException


class AMPMode(str, Enum):
    """The modes, for an editor to complete. Equal to the strings."""

    FP16 = "fp16"
    BF16 = "bf16"


MODES = {AMPMode.FP16: torch.float16, AMPMode.BF16: torch.bfloat16}
SLOW = {("cpu", torch.float16)}
"""Where half the bits take many times as long: nothing is done there."""


class MixedPrecision(Callback):
    """Model and loss run under autocast; in float16 a GradScaler keeps gradients from underflowing.

    As in fastai gradients are unscaled before the step, and it is cancelled where one is infinite: ``scales`` has the
    scale of the steps that were done. An optimizer made with ``amp_fused=True`` is handed the scaled gradients and does
    both in its kernel: nobody waits, no gradient is rewritten, no step is cancelled, and there are no ``scales``. So
    does one that releases gradients: in float16 it has to be by ``release_gradients(skip="batches")``.

    Works on every device that autocast knows, fastai's on CUDA's alone. On a CPU float16 is many times slower than
    float32, so there, as in fastai, a training in it stays in the model's own precision, and a warning says so.

    Args:
        amp_mode: ``"fp16"`` or ``"bf16"``, which needs no scaling; or an `AMPMode`, fastai's too.
        kwargs: of ``torch.amp.GradScaler``.

    Raises:
        ValueError: another mode.
    """

    order = 10
    autocast: Any = None

    def __init__(self, amp_mode: str | Enum = AMPMode.FP16, **kwargs: Any) -> None:
        try:
            self.amp_mode = AMPMode(amp_mode.value if isinstance(amp_mode, Enum) else amp_mode)
        except ValueError:
            modes = ", ".join(mode.value for mode in AMPMode)
            raise ValueError(f"amp_mode must be one of {modes}, not {amp_mode!r}") from None
        self.kwargs, self._warned = kwargs, False
        self._release: Any = None
        self.scales: list[float] = []

    def before_fit(self) -> None:
        device, dtype = next(self.model.parameters()).device.type, MODES[self.amp_mode]
        if slow := (device, dtype) in SLOW:
            self._warn()
        self._context = torch.autocast(device, dtype=dtype, enabled=not slow)
        scaled = dtype is torch.float16 and not slow
        self.learn.scaler = torch.amp.GradScaler(device, **{**self.kwargs, "enabled": scaled})
        self.scales, self._checked = [], False
        self._release = getattr(self.opt, "gradient_release", None)
        if self._release is not None:
            self._scaler_before, self._release.scaler = self._release.scaler, self.learn.scaler
        if self._fused():
            self.learn._step = self._scaled_step

    def _warn(self) -> None:
        if not self._warned:
            warnings.warn(
                "fusedopt: MixedPrecision does nothing in float16 on a CPU, where that is many times slower than "
                "float32: train on a GPU, or in bfloat16, or without it (to_bf16, to_fp32)",
                stacklevel=env.caller_level(),
            )
        self._warned = True

    def before_batch(self) -> None:
        self.autocast = self._context
        self.autocast.__enter__()

    def after_pred(self) -> None:
        self.learn.pred = mapped(self.pred, _to_float)

    def after_loss(self) -> None:
        self._leave()

    def after_cancel_batch(self) -> None:
        self._leave()

    def before_backward(self) -> None:
        self.learn.loss_grad = self.scaler.scale(self.loss_grad)

    def before_step(self) -> None:
        if self._fused():
            return
        if all(p.grad is None for group in self.opt.param_groups for p in group["params"]):
            raise CancelStepException  # nothing to look at: the backward pass was cancelled
        self.skipped, self._checked = True, True
        self.scaler.step(self)
        if self.skipped:
            raise CancelStepException
        self.scales.append(self.scaler.get_scale())

    def after_step(self) -> None:
        if self._checked:
            self.scaler.update()
        self._checked = False

    def clean_up(self) -> None:
        self._leave()
        if self._release is not None:
            self._release.scaler, self._release = self._scaler_before, None
        self.learn.__dict__.pop("_step", None)
        self.learn.__dict__.pop("scaler", None)

    def unscale(self) -> None:
        """Make the gradients what they are without scaling, for who looks at them in ``before_step``."""
        if self._fused():
            self.scaler.unscale_(self.opt)

    # -- an optimizer, as far as GradScaler can tell: its step only notes that it would be done --
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's, for GradScaler."""
        return self.opt.param_groups

    def step(self) -> None:
        """What GradScaler calls where no gradient is infinite."""
        self.skipped = False

    # --
    def _scaled_step(self) -> None:
        self.scaler.step(self.opt)
        self._checked = True

    def _fused(self) -> bool:
        return getattr(self.opt, "_step_supports_amp_scaling", False)

    def _leave(self) -> None:
        if self.autocast is not None:
            self.autocast.__exit__(None, None, None)
        self.autocast = None


class Precision:
    """The Learner's methods that choose a precision."""

    add_cb: Any
    remove_cb: Any

    def to_fp16(self, **kwargs: Any) -> Any:
        """Train in float16 where that is safe; arguments of ``torch.amp.GradScaler``."""
        return self.to_fp32().add_cb(MixedPrecision(**kwargs))

    def to_bf16(self) -> Any:
        """Train in bfloat16 where that is safe."""
        return self.to_fp32().add_cb(MixedPrecision(amp_mode=AMPMode.BF16))

    def to_fp32(self) -> Any:
        """Train in the model's own precision again."""
        return self.remove_cb(MixedPrecision)


def _to_float(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in MODES.values() else x
