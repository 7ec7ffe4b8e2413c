"""An optimizer beside its fused self: steps from the same start, how far apart they end, and what they take."""

from __future__ import annotations

import itertools
import math
import random
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fusedopt

STEPS, ROUNDS = 10, 40


class Run:
    """An optimizer, made of new parameters by ``make``, and its steps. Runs of equal shapes get the same gradients, in
    this dtype."""

    def __init__(
        self,
        make: Callable,
        shapes: Sequence,
        closure: bool,
        fused: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
        self.opt: Any = make(self.params)
        if callable(getattr(self.opt, "train", None)):  # the schedule-free ones
            self.opt.train()
        if fused:
            fusedopt.fuse(self.opt)
        self.arguments = (self._loss,) * closure

    def _loss(self) -> Tensor:
        for p in self.params:
            p.grad = p.detach().clone() if p.grad is None else p.grad
        return sum((p.detach().square().sum() for p in self.params), torch.zeros(()))

    def prepare(self, t: int, missing: Sequence[int] = ()) -> None:
        """The gradients and rates of step ``t``, of which the first parameter's gradient may be missing."""
        gen = torch.Generator().manual_seed(t)
        for p in self.params:
            p.grad = torch.randn(p.shape, generator=gen).to(self.dtype)
        if t in missing:
            self.params[0].grad = None
        for group in self.opt.param_groups:
            if isinstance(group.get("lr"), float):
                group["lr"] *= (0.9, 1.0, 1.1)[t % 3]
        torch.manual_seed(t)
        random.seed(t)
        np.random.seed(t)

    def step(self) -> None:
        self.opt.step(*self.arguments)

    def steps(self, missing: Sequence[int]) -> list[dict[str, Any]]:
        """What there is after each step."""
        seen = []
        for t in range(STEPS):
            self.prepare(t, missing)
            self.step()
            seen.append(dict(leaves({"params": self.params, **self.opt.state_dict()})))
        return seen


def leaves(x: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and numbers in a structure, and the types of all else, by paths that name dtypes and shapes."""
    if isinstance(x, dict | list | tuple | deque):
        for key, value in x.items() if isinstance(x, dict) else enumerate(x):
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(x, Tensor):
        yield f"{path}: {x.dtype} {tuple(x.shape)}", x.detach().double().clone()
    else:
        value = x if isinstance(x, int | float) else 0.0
        yield f"{path}: {type(x).__name__}", torch.tensor(value, dtype=torch.float64)


def without_dtypes(seen: dict[str, Any]) -> dict[str, Any]:
    """What there is after a step, by paths that name no dtypes."""
    return {re.sub(r"torch\.float\d+", "float", path): value for path, value in seen.items()}


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest, each relative to the largest element of its tensor; infinite where the structures differ."""
    worst = 0.0 if ours.keys() == theirs.keys() else math.inf
    for key in ours.keys() & theirs.keys():
        a, b = ours[key], theirs[key]
        if not torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)):
            far = ((a - b).abs().max() / b.abs().max()).item()
            worst = max(worst, far if math.isfinite(far) else math.inf)
    return worst


def ratio(own: Run, fused: Run, seconds: float = 1.5) -> float:
    """The median over rounds, in which both take a step."""
    rounds: list[float] = []
    begin = time.perf_counter()
    for t in itertools.count():
        took = {}
        for run in (own, fused) if t % 2 else (fused, own):
            run.prepare(t)
            start = time.perf_counter()
            run.step()
            took[run] = time.perf_counter() - start
        rounds += [took[own] / took[fused]] if t >= 5 else []  # the first ones trace, compile and make state
        if len(rounds) >= ROUNDS or (len(rounds) > 2 and time.perf_counter() - begin > seconds):
            break
    return statistics.median(rounds)
