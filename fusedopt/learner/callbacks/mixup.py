"""Training on mixtures."""

from __future__ import annotations

import torch
from torch.distributions.beta import Beta

from ..callback import Callback
from ..losses import unreduced


class Mixup(Callback):
    """Mixes each item with another of its batch: fastai's MixUp, https://arxiv.org/abs/1710.09412.

        x ← λ · x + (1 − λ) · x₁,  λ from Beta(alpha, alpha), and at least a half

    Targets are mixed likewise where they are floats. Where they are integers, which name classes, their losses are:
    ``loss_func`` must have a ``reduction``, as attribute or argument. (fastai asks its ``y_int`` which it is.)

    Args:
        alpha: above 0; small for mixtures that are mostly one of the two.
    """

    run_valid = False

    def __init__(self, alpha: float = 0.4) -> None:
        self.distrib = Beta(torch.tensor(alpha), torch.tensor(alpha))

    def before_batch(self) -> None:
        y = self.yb[0]
        lam = self.distrib.sample((len(y),)).to(y.device)
        self.lam = torch.maximum(lam, 1 - lam)
        shuffle = torch.randperm(len(y)).to(y.device)
        self.yb1 = tuple(y[shuffle] for y in self.yb)
        self.learn.xb = tuple(self._mixed(x[shuffle], x) for x in self.xb)
        self.mix_losses = not y.is_floating_point()
        if not self.mix_losses:
            self.learn.yb = tuple(self._mixed(y1, y) for y1, y in zip(self.yb1, self.yb, strict=True))

    def after_loss(self) -> None:
        if not self.mix_losses:
            return
        with unreduced(self.loss_func) as losses:
            mixed = self._mixed(losses(self.pred, *self.yb1), losses(self.pred, *self.yb))
        total = getattr(self.loss_func, "reduction", "mean") == "sum"
        self.learn.loss_grad = mixed.sum() if total else mixed.mean()
        self.learn.loss = self.loss_grad.clone()

    def _mixed(self, other: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
        lam = self.lam.reshape(-1, *[1] * (one.ndim - 1)).to(one.dtype)
        return torch.lerp(other, one, lam)
