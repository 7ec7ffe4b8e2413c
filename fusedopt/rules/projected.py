"""Steps without their part along a weight whose scale does not matter."""

from __future__ import annotations

from typing import Any

import torch


def projected(update: Any, grad: Any, p: Any, delta: Any, wd_ratio: Any, eps: Any) -> Any:
    """An update less its part along the parameter, where the gradient is about orthogonal to that; with the factor of
    weight decay.

    Formula: if of all rows ``max |cos(g, p)| < delta / √n``, n elements in a row: ``u ← u - p̂·Σ p̂·u`` for each row,
    ``p̂ = p / (‖p‖ + eps)``, and ``r = wd_ratio``; else the same if it is so of the whole tensor as one row; else
    u stays, and ``r = 1``. Rows go over all dimensions but the first; vectors stay as they are.
    """
    if p.dim() < 2:
        return update, 1.0
    rows = tuple(range(1, p.dim()))
    products = (p, p), (grad, grad), (p, grad), (p, update)
    of_rows = [(x * y).sum(dim=rows, keepdim=True) for x, y in products]
    of_all = [x.sum() for x in of_rows]
    count, lines = max(p.numel(), 1), max(p.shape[0], 1)
    by_row = cosine(*of_rows[:3], eps).amax() < delta / (count / lines) ** 0.5  # type: ignore[call-arg]
    as_one = cosine(*of_all[:3], eps) < delta / count**0.5  # type: ignore[call-arg]
    along = torch.where(by_row, radial(*of_rows, eps), radial(*of_all, eps))  # type: ignore[call-arg]
    either = by_row | as_one
    return update - torch.where(either, p * along, 0.0), torch.where(
        either, wd_ratio, torch.ones_like(of_all[0])
    )


def cosine(pp: Any, gg: Any, pg: Any, eps: Any) -> Any:
    """The absolute cosine of the angle between two vectors, of their products with themselves and each other."""
    return pg.abs() / ((pp.sqrt() + eps) * (gg.sqrt() + eps))


def radial(pp: Any, gg: Any, pg: Any, pu: Any, eps: Any) -> Any:
    """How often the parameter is in the update's part along it."""
    return pu / (pp.sqrt() + eps) ** 2
