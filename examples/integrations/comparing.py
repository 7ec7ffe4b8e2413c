"""Train twice from the same start, by torch's or a package's own optimizer and by fusedopt's, and compare.

The scripts beside this one hand over how a framework trains; what they share is here. A difference in the update rule,
in what a schedule reaches, or in what clipping, accumulation and checkpoints do, makes weights differ by far more than
what is allowed for rounding.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Make = Callable[..., torch.optim.Optimizer]


@dataclass
class Trained:
    """What a training came to."""

    losses: list[float]
    weights: list[Tensor]
    opt: torch.optim.Optimizer
    """As what is compared made it, not a framework's wrapper."""


def weights(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Copies, which further training leaves alone."""
    return [p.detach().clone() for p in parameters]


def compare(
    train: Callable[[Make], Trained], pairs: Mapping[str, tuple[Make, Make]], tolerance: float
) -> dict[str, float]:
    """Train by both of each pair, and return how far the weights are apart in the end, as `apart` counts it.

    Args:
        train: makes a model, always the same, and trains it by the optimizer that what it is given makes.
        pairs: by name, what makes the optimizer to compare with, and what makes fusedopt's.
        tolerance: what is allowed of that.

    Raises AssertionError if they are further apart, or a step of fusedopt's was not in fused kernels.
    """
    found = {}
    for name, (theirs, ours) in pairs.items():
        expected, _ = _trained(train, theirs)
        got, seconds = _trained(train, ours)
        found[name] = apart(got.weights, expected.weights)
        print(
            f"{name}: loss {course(got.losses)} (without fusedopt {course(expected.losses)}); weights apart by "
            f"{found[name]:.1e}; {said(got.opt)}; {seconds:.1f} s",
            flush=True,
        )
        assert found[name] <= tolerance, f"{name}: {found[name]:.1e} apart, {tolerance:.0e} is allowed"
    return found


def _trained(train: Callable[[Make], Trained], make: Make) -> tuple[Trained, float]:
    start = time.perf_counter()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="fusedopt")
        trained = train(make)
    return trained, time.perf_counter() - start


def apart(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """The largest difference between weights, in parts of the largest weight."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    return max((a - b).abs().max().item() for a, b in pairs) / max(b.abs().max().item() for _, b in pairs)


def course(losses: list[float]) -> str:
    """The means of the first and of the last quarter."""
    n = max(1, len(losses) // 4)
    return f"{sum(losses[:n]) / n:.6f} to {sum(losses[-n:]) / n:.6f}"


def said(opt: Any) -> str:
    """What ``opt.explain()`` says, in a few words. AssertionError if some of the step is not fused."""
    explanation = opt.explain()
    assert not explanation.eager, f"some of it is not fused: {explanation}"
    return f"{explanation.launches} launch{'es' * (explanation.launches != 1)} per step"


def regression(rows: int = 32, inputs: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs and targets that a small network can learn, in float64."""
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(rows, inputs, generator=gen, dtype=torch.float64)
    return x, x[:, :2] * x[:, 2:4]


def small_net(inputs: int = 8) -> nn.Sequential:
    """Its weights are drawn from torch's generator."""
    return nn.Sequential(nn.Linear(inputs, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 2)).double()
