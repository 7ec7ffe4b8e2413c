"""``fusedopt.total``: a sum over all parameters of a step, for callbacks.

In a trace it cuts the program. What is summed goes to a buffer of each parameter's own (``sum.<id>``), and what comes
back is read from one that all share (``total.<id>``), so the programs before the cut and after it are ordinary ones.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from ..ir.ops import TENSOR
from ..ir.program import Buffer
from .signals import Untraceable
from .tensor import METHODS, SymTensor, called, is_extern

TOTAL, SUM = "total.", "sum."
"""What the names of buffers begin with: of a sum over all parameters, and of one parameter's share of it."""
BUFFER = Buffer(torch.float64, TENSOR)


class Total(NamedTuple):
    """Which total it is: of the n-th call by a callback, for every parameter."""

    callback: int
    call: int

    def __str__(self) -> str:
        return f"{TOTAL}{self.callback}.{self.call}"

    @property
    def share(self) -> str:
        return f"{SUM}{self.callback}.{self.call}"


class Collecting(Protocol):
    """Who knows the totals of a step that runs callbacks eagerly."""

    def total(self, x: torch.Tensor) -> torch.Tensor: ...


_T = TypeVar("_T")
_asked: ContextVar[Collecting | None] = ContextVar("fusedopt.total", default=None)


def collect(by: Collecting, run: Callable[[], _T]) -> _T:
    """What ``run`` returns, while which ``total`` asks ``by``.

    In a context of its own, which ends with it however it ends: a signal may come between any two lines of Python.
    """

    def asking() -> _T:
        _asked.set(by)
        return run()

    return copy_context().run(asking)


def total(x: Any) -> Any:
    """The sum of ``x`` over its elements and over all parameters of the step; for callbacks.

    Each parameter adds the sum of its own ``x``, or ``x`` itself where that is one number per tensor (0-d); those of
    all groups, dtypes and devices, of DTensors the whole. Parameters that are not stepped, for they have no gradient,
    and those without elements add nothing. The result is a 0-d float64 tensor, the same for all parameters::

        def clip(p, max_norm, **kwargs):
            norm = fusedopt.total(p.grad**2).sqrt()
            p.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1))

    Totals may be made of totals: each that depends on an earlier one takes one more pass over what it is made of.
    The n-th call that a callback makes for one parameter is summed with the n-th it makes for the others. Where it
    calls ``total`` on one side of a branch only, parameters that go the other way add nothing.

    Where a callback cannot be fused, it is run up to each ``total`` on copies that are thrown away, once for each of
    its totals, and then to its end. So one that acts on anything but its arguments is refused.

    Outside of callbacks it is the sum of ``x`` alone, in float64.

    Raises TypeError for what is no tensor. RuntimeError within a step: see above.
    """
    if is_extern(x):
        return _symbolic(x.double().sum().leave())
    if issubclass(type(x), SymTensor):
        return _symbolic(x)
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"fusedopt.total sums tensors, made of the parameter, its gradient or its state, not {type(x).__name__}; "
            "make one of a number, e.g. torch.full_like(p, x).mean()"
        )
    by = _asked.get()
    return summed(x) if by is None else by.total(x)


def summed(x: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's elements in float64, of a DTensor's all over its mesh."""
    out = x.detach().sum(dtype=torch.float64)
    return out.full_tensor() if hasattr(out, "full_tensor") else out


def _symbolic(x: SymTensor) -> SymTensor:
    run = x.run
    share = called("total", METHODS["sum"], x)
    if share.kind != TENSOR:
        raise Untraceable("a total of what is no number per tensor once it is summed")
    known = Total(run.first + run.callback, len(run.totals))
    run.totals.append(share.node)
    wide = run.compute != torch.float64
    node = run.graph.leaf("load", str(known), type="d" if wide else "f")
    return SymTensor(run, node, torch.float64)
