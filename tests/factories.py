"""Parameters with random numbers in them, gradients for them, and what becomes of them: for tests of optimizers."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

SHAPES = ((4,), (3, 5), (2, 2))


def _random(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Drawn in float32 whatever the dtype, so that the numbers differ by rounding alone."""
    return torch.randn(shape, generator=generator).to(dtype)


def parameters(
    shapes: Iterable[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(_random(shape, dtype, generator)) for shape in shapes]


def parameters_with_gradients(
    shapes: Iterable[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(_random(shape, dtype, generator)) for shape in shapes]
    for p in params:
        p.grad = _random(p.shape, dtype, generator)
    return params


def give_gradients(params: Iterable[torch.Tensor], t: int = 0, scale: float = 1.0) -> None:
    """The gradients of step ``t``."""
    generator = torch.Generator().manual_seed(1000 + t)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def params_of(opt: Any) -> list[nn.Parameter]:
    return [p for group in opt.param_groups for p in group["params"]]


def flat(params: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in params])


def assert_equal(ours: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor]) -> None:
    """The same numbers, tensor by tensor."""
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.detach(), b.detach())
