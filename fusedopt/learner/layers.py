"""Layers of the course's lesson 10."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class GeneralRelu(nn.Module):
    """``min(leaky_relu(x, leak) - sub, maxv)``, of which each part may be left out.

    ``sub`` about 0.4 takes the mean of activations, which relu makes positive, back to zero.
    """

    def __init__(
        self, leak: float | None = None, sub: float | None = None, maxv: float | None = None
    ) -> None:
        super().__init__()
        self.leak, self.sub, self.maxv = leak, sub, maxv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the formula makes of x."""
        x = F.relu(x) if self.leak is None else F.leaky_relu(x, self.leak)
        if self.sub is not None:
            x = x - self.sub
        return x if self.maxv is None else x.clamp_max(self.maxv)

    def extra_repr(self) -> str:
        return f"leak={self.leak}, sub={self.sub}, maxv={self.maxv}"


class RunningBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization by running statistics, in training too: it works with batches of two.

    ``nf`` is C of inputs of any shape (N, C, ...).

    ``nn.BatchNorm2d`` trains on one batch's mean and variance, which are noise where batches are small. Here
    ``y = weight * (x - mean) / sqrt(var + eps) + bias`` with ``mean = sums / count``, ``var = sqrs / count - mean**2``:

    - the averages are of sums and of sums of squares, as an average of variances is no variance of all items;
    - how many values went into the sums is averaged with them, so batches may differ in size;
    - an average is debiased: batch t of weight w goes in with ``w / (1 - (1 - w)**t)``, the first one entirely;
      ``w = 1 - (1 - mom) / sqrt(N - 1)``, as a larger batch says more;
    - before 20 items have been seen, ``var`` is at least 0.01: they may all be alike in a channel.

    Gradients flow through the batch at hand, not through earlier ones. It differs from the course's layer in that the
    averages are kept debiased (so before the first batch they can be mean 0 and variance 1), a batch of one item is
    taken as one of two, statistics are those of the buffers' dtype, and parameters are ``weight`` and ``bias``.
    """

    FIRST_ITEMS, LEAST_VAR = 20, 0.01
    sums: torch.Tensor
    sqrs: torch.Tensor
    count: torch.Tensor
    debias: torch.Tensor
    items: torch.Tensor

    def __init__(self, nf: int, mom: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__(nf, eps=eps, track_running_stats=False)
        self.mom = mom
        self.register_buffer("sums", torch.zeros(nf))
        self.register_buffer("sqrs", torch.ones(nf))
        self.register_buffer("count", torch.tensor(1.0))
        self.register_buffer("debias", torch.tensor(0.0))
        self.register_buffer("items", torch.tensor(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x, normalized; in training the averages take it in."""
        sums, sqrs = self._averaged(x) if self.training else (self.sums, self.sqrs)
        mean = sums / self.count
        # A tensor, not a branch: the host need not wait for the device. Rounding may take it below zero later.
        least = self.LEAST_VAR * (self.items < self.FIRST_ITEMS)
        var = torch.maximum(sqrs / self.count - mean.square(), least.to(sqrs.dtype))
        scale = self.weight * (var + self.eps).rsqrt()
        shape = (1, -1, *[1] * (x.dim() - 2))
        return (x * scale.view(shape) + (self.bias - mean * scale).view(shape)).to(x.dtype)

    def _averaged(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Averages of sums and squares with this batch in them, and in the graph; the buffers take their values."""
        x = x.to(self.sums.dtype)
        dims = [d for d in range(x.dim()) if d != 1]
        weight = 1 - (1 - self.mom) / max(1, len(x) - 1) ** 0.5
        self.debias = self.debias.lerp(torch.ones_like(self.debias), weight)
        part = weight / self.debias
        sums = torch.lerp(self.sums, x.sum(dims), part)
        sqrs = torch.lerp(self.sqrs, x.square().sum(dims), part)
        self.sums, self.sqrs = sums.detach(), sqrs.detach()
        self.count = torch.lerp(self.count, torch.full_like(self.count, x.numel() / x.shape[1]), part)
        self.items = self.items + len(x)
        return sums, sqrs
