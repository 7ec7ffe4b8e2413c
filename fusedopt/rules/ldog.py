"""L-DoG: DoG for each tensor by itself."""

from __future__ import annotations

from typing import Any

import torch

from ..callbacks import l2_reg
from ..optimizer.described import described
from .dog import DoG


def ldog_step(
    p: Any, lr: Any, eps: Any, reps_rel: Any, start: Any = None, farthest: Any = None, sqr_sum: Any = 0.0,
    **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """L-DoG: DoG for each tensor by itself.

    Formula: ``r ← max(r, ‖p - p₀‖)`` from ``reps_rel·(1 + ‖p₀‖)``; ``G ← G + ‖g‖²`` from zero;
    ``p ← p - lr·r / √(G + eps)·g``. Norms are of the tensor.
    Args: `lr` number, 1 in the paper; `eps` (gradient units squared), `reps_rel` numbers; `start` tensor; `farthest`,
    `sqr_sum` 0-d tensors.
    State: ``start`` (p₀); ``farthest`` (r), ``sqr_sum`` (G), one number per tensor.
    Source: arXiv:2302.12022, section 4.3, and its authors' code.
    Deviations: ``init_eta`` and the averaging of weights are left out.
    """
    if start is None:
        start, farthest = p.data.clone(), reps_rel * (1 + (p.data**2).sum().sqrt())
    distance = ((p.data - start) ** 2).sum().sqrt()
    farthest = torch.maximum(farthest, distance)
    sqr_sum = sqr_sum + (p.grad.data**2).sum()
    p.data.sub_(p.grad.data * (lr * farthest / (sqr_sum + eps).sqrt()))
    return {"start": start, "farthest": farthest, "sqr_sum": sqr_sum}


ldog_step.defaults = dict(eps=1e-8, reps_rel=1e-6)


@described(l2_reg, ldog_step)
class LDoG(DoG):
    """L-DoG: see `ldog_step`; otherwise as `DoG`.

    Args: `lr`, `reps_rel` and `eps` as of `DoG`.
    """

    _rule = staticmethod(ldog_step)
