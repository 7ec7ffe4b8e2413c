"""Second moments of matrices, kept as the means of their rows and of their columns."""

from __future__ import annotations

from typing import Any

import torch


def inverse_root_factored(sqr: Any, weight: Any, row: Any, col: Any) -> Any:
    """One over the root of a running average that is kept by rows and columns only; averages are made as zeros.

    Formula: ``r ← (1 - weight)·r + weight·mean(sqr, -1)``, ``c ← (1 - weight)·c + weight·mean(sqr, -2)``, and of these
    ``1 / √(r·c / mean(r, -1))``, over the last two dimensions as by Adafactor's authors.
    Args: `sqr` tensor of two or more dimensions; `weight` number; `row`, `col` tensors of one dimension less, or None.
    Returns it with the new averages.
    """
    row_mean, col_mean = sqr.mean(-1), sqr.mean(-2)
    if row is None:
        row, col = torch.zeros_like(row_mean), torch.zeros_like(col_mean)
    row.mul_(1 - weight).add_(row_mean, alpha=weight)
    col.mul_(1 - weight).add_(col_mean, alpha=weight)
    of_row = (row / row.mean(-1, keepdim=True)).rsqrt()
    return of_row.unsqueeze(-1) * col.rsqrt().unsqueeze(-2), row, col


def rms(x: Any) -> Any:
    """The root of the mean square of a tensor's elements, 0-d."""
    return (x**2).mean().sqrt()
