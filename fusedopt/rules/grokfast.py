"""Grokfast: any rule, on gradients whose slow part is amplified."""

from __future__ import annotations

from typing import Any

import torch

from ..optimizer import Optimizer
from ..optimizer.described import described
from .first import first_step


def grokfast_filter(
    p: Any, grok_alpha: Any, grok_lamb: Any, grok_avg: Any = None, grok_count: Any = 0, **kwargs: Any
) -> dict[str, Any]:
    """Add a running average of the gradient to it.

    Formula: ``a ← grok_alpha·a + (1 - grok_alpha)·g``, the first time ``a ← g``; ``g ← g + grok_lamb·a``.
    Args: `grok_alpha` number in [0, 1]; `grok_lamb` number; `grok_avg` tensor; `grok_count` int.
    State: ``grok_avg`` (a), ``grok_count``, the steps it has seen.
    Source: Lee et al., "Grokfast: Accelerated Grokking by Amplifying Slow Gradients", arXiv:2405.20233, algorithm 2
    (``gradfilter_ema``).
    Deviations: the user's ``p.grad`` stays as it was; the callbacks behind this one see the other.
    """
    if grok_avg is None:
        grok_avg = torch.zeros_like(p.grad.data)
    grok_count = grok_count + 1
    later = 1 - first_step(grok_count)
    grok_avg.mul_(grok_alpha).add_(p.grad.data, alpha=1 - grok_alpha * later)
    p.grad.data.add_(grok_avg, alpha=grok_lamb)
    return {"grok_avg": grok_avg, "grok_count": grok_count}


grokfast_filter.defaults = dict(grok_alpha=0.98, grok_lamb=2.0)


@described(grokfast_filter)
def GrokFast(opt: Optimizer, alpha: float = 0.98, lamb: float = 2.0) -> Optimizer:
    """Filter the gradients before all callbacks of `opt`, and return `opt`: ``GrokFast(optim.AdamW(params))``.

    Args: `opt`, any optimizer of fusedopt; `alpha` decay of the average; `lamb` its weight. They are hyperparameters:
    ``grok_alpha`` and ``grok_lamb``. See `grokfast_filter`.
    Raises: TypeError for an optimizer of another library; ValueError for an `alpha` outside [0, 1], a `lamb` below
    zero, or an optimizer that has the filter.
    """
    if not isinstance(opt, Optimizer):
        raise TypeError(f"GrokFast changes an Optimizer of fusedopt, and this is a {type(opt).__name__}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"GrokFast needs an alpha between 0 and 1, got {alpha!r}")
    if not lamb >= 0.0:
        raise ValueError(f"GrokFast needs a lamb of at least 0, got {lamb!r}")
    if grokfast_filter in opt.cbs:
        raise ValueError("this optimizer has Grokfast's filter already")
    opt.cbs = [grokfast_filter, *opt.cbs]
    opt.title = f"GrokFast_{opt.title or type(opt).__name__}"
    for name, value in dict(grok_alpha=alpha, grok_lamb=lamb).items():
        opt.defaults[name] = value
        opt.set_hyper(name, value)
    return opt
