"""What gradients are multiplied by before callbacks see them: one over the loss scale, and the clip coefficient.

Both are numbers that only the device knows. They live in 0-d tensors that kernels read, so a step neither waits for
them nor rewrites a gradient. A found infinity is a third: where it is not zero, kernels store nothing.

The global norm is two programs more: the sum of squares of each gradient, and from all of those the norm and the
coefficient. They are compiled, launched and, for DTensors, joined over processes like any other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..backends import Backend, Kernel
from ..ir.ops import ELEMENT, TENSOR
from ..ir.program import Buffer, Graph, Program, verify
from ..trace.signature import FACTOR, FOUND_INF, Modes, compute_dtype
from ..trace.totals import TOTAL
from .items import Item
from .rounds import Round, resident, space

INVERSE, NORM = "scaling.inverse", "scaling.norm"
NORM_KERNEL = "grad_norm"
EPS = 1e-6
"""Added to the norm, as torch.nn.utils.clip_grad_norm_ does."""


class Scaling:
    """The scaling of one optimizer's gradients; falsy if there is none.

    amp: grad_scale and found_inf of torch.amp.GradScaler are received in each step
    max_norm: the global norm above which gradients are scaled down to it; None: as they are
    """

    def __init__(self, amp: bool, max_norm: float | None = None) -> None:
        self.amp, self.max_norm = amp, max_norm
        self._there: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._received: dict[str, Any] = {INVERSE: 1.0, FOUND_INF: 0.0}

    def __bool__(self) -> bool:
        return self.amp or self.max_norm is not None

    @property
    def measures(self) -> bool:
        """Whether a step takes the norm of its gradients."""
        return self.max_norm is not None

    def modes(self, capturable: bool) -> Modes:
        return Modes(on_device=capturable or self.amp, scaled=bool(self), skips=self.amp)

    def buffer(self, name: str, device: torch.device) -> torch.Tensor:
        """The number of this name on that device; it stays where it is."""
        if name == FACTOR and self.max_norm is None:
            name = INVERSE
        if (name, device) not in self._there:
            dtype = torch.float64 if name.startswith(TOTAL) else torch.float32
            there = torch.zeros((), dtype=dtype, device=device)
            _set(there, self._received.get(name, 0.0))
            self._there[name, device] = there  # once it holds its number: a signal may come before
        return self._there[name, device]

    def fresh(self) -> Scaling:
        """The same scaling with buffers of its own."""
        other = Scaling(self.amp, self.max_norm)
        other._received = self._received
        return other

    def receive(self, scale: torch.Tensor | None, found_inf: torch.Tensor | float | None) -> None:
        """Take over what GradScaler says of this step, without waiting for it; None: it has no part in it."""
        inverse = 1.0 if scale is None else scale.reciprocal()
        self._hand_over({INVERSE: inverse, FOUND_INF: 0.0 if found_inf is None else found_inf})

    def _hand_over(self, values: dict[str, Any]) -> None:
        old = self._received
        if all(type(v) is type(old[k]) is float and v == old[k] for k, v in values.items()):
            return  # numbers, as before: a tensor is not looked at, it may be on its way
        for (name, _), there in self._there.items():
            if name in values:
                _set(there, values[name])
        self._received = values

    @property
    def inverse(self) -> float:
        """One over the scale of gradients. Waits for the device."""
        return float(self._received[INVERSE])

    def factor(self, grads: Sequence[torch.Tensor]) -> float:
        """What these gradients, all there are, are multiplied by. Waits for the device."""
        inverse = self.inverse
        if self.max_norm is None:
            return inverse
        norm = math.sqrt(sum(float(_square(grad)) for grad in grads)) * inverse
        return min(self.max_norm / (norm + EPS), 1.0) * inverse

    def skipped(self, devices: set[torch.device]) -> bool:
        """Whether nothing is to be stored. Waits for the device: for callbacks that run eagerly."""
        return any(bool(self.buffer(FOUND_INF, device)) for device in devices)


class Given(Scaling):
    """A factor that is known before the step. ``measures``: a step takes its gradients' norm all the same."""

    measures = False

    def __bool__(self) -> bool:
        return True

    def fresh(self) -> Given:
        other = Given(self.amp)
        other.measures, other._received = self.measures, self._received
        return other

    def multiply(self, factor: torch.Tensor | float, found_inf: torch.Tensor | float = 0.0) -> None:
        """Multiply the gradients of the steps to come by this; where an infinity was found, store nothing."""
        self._hand_over({INVERSE: factor, FOUND_INF: found_inf})


def _set(there: torch.Tensor, value: torch.Tensor | float) -> None:
    there.copy_(value, non_blocking=True) if isinstance(value, torch.Tensor) else there.fill_(value)


class Norm(Round):
    """The global norm of one step's gradients, and the factor that follows.

    launches: for each main launch of the step its backend, rows and program; eager: the items that are stepped without
    one. Where the scaling has no limit, the squares are all that is taken.
    """

    def __init__(
        self,
        scaling: Scaling,
        launches: Sequence[tuple[Backend, list[Item], Program]],
        eager: Sequence[Item],
    ) -> None:
        rows = [*(items for _, items, _ in launches), *([item] for item in eager)]
        on = [items[0].param.device for items in rows]
        super().__init__("max_grad_norm", on[0], set(on))
        self.scaling = scaling
        self.squares, pieces = space(self.main, [(d, len(items)) for d, items in zip(on, rows, strict=True)])
        self._resident = any(map(resident, rows))
        for k, (backend, items, main) in enumerate(launches):
            kernel = self._compiled(backend, NORM_KERNEL, squares(items[0].grad.dtype), on[k])
            columns = {"grad": [item.grad for item in items], NORM: list(pieces[k][0].unbind())}
            self.add(k, backend, kernel, items, columns, main, [pieces[k]])
        self.eager = list(zip(pieces[len(launches) :], eager, strict=True))
        self.pieces += [piece for piece, _ in self.eager]
        if launches and scaling.max_norm is not None:
            self._set_coefficient(launches[0][0])

    @property
    def limits(self) -> bool:
        return self.join is not None

    def run(self, slots: Sequence[np.ndarray]) -> None:
        for (out, _), item in self.eager:
            out.fill_(_square(item.grad))
        super().run(slots)

    def native(self) -> Any:
        return None if self.eager else super().native()

    def let_go(self) -> None:
        self.eager = []
        super().let_go()

    def upload(self) -> None:
        """Put the limit where captured launches read it."""
        if self.join is not None and self.scaling.max_norm is not None:
            self.join.upload(np.array([[self.scaling.max_norm]], dtype=np.float64))

    def _set_coefficient(self, backend: Backend) -> None:
        columns = {name: [self.scaling.buffer(name, self.main)] for name in (INVERSE, NORM, FACTOR)}
        kernel = self._compiled(backend, "clip", coefficient(), self.main)
        self.set_join(backend, kernel, {"squares": [self.squares], **columns}, self._resident)

    def _compiled(self, backend: Backend, name: str, program: Program, device: torch.device) -> Kernel:
        return backend.compile(program, name, ["max_grad_norm"], device)

    def finish(self) -> None:
        scaling, limit = self.scaling, self.scaling.max_norm
        if limit is None:
            return
        norm, factor, inverse = (scaling.buffer(name, self.main) for name in (NORM, FACTOR, INVERSE))
        if self.join is not None:
            self.join.run(np.array([[limit]], dtype=np.float64))
        else:
            exact = self.squares.sum().sqrt() * inverse
            norm.copy_(exact)
            factor.copy_((limit / (exact + EPS)).clamp(max=1.0) * inverse)
        for device in self.devices - {self.main}:
            scaling.buffer(FACTOR, device).copy_(factor, non_blocking=True)


def _square(grad: torch.Tensor) -> torch.Tensor:
    """The sum of squares of one gradient, the whole of it if it is a DTensor's."""
    norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm) ** 2


@functools.cache
def squares(grad: torch.dtype) -> Program:
    """Σ g², for each gradient."""
    graph = Graph()
    g = graph.leaf("load", "grad", kind=ELEMENT)
    total = graph.op("sum", graph.op("mul", g, g))
    buffers = ("grad", Buffer(grad, ELEMENT)), (NORM, Buffer(torch.float64, TENSOR))
    return _verified(graph, compute_dtype(grad), buffers, {NORM: total}, 0)


@functools.cache
def coefficient() -> Program:
    """norm = √(Σ squares) · inverse; factor = min(max_norm / (norm + ε), 1) · inverse."""
    graph = Graph()
    inverse = graph.leaf("load", INVERSE)
    norm = graph.op(
        "mul", graph.op("sqrt", graph.op("sum", graph.leaf("load", "squares", kind=ELEMENT))), inverse
    )
    room = graph.op("div", graph.leaf("slot", 0), graph.op("add", norm, graph.leaf("const", EPS)))
    factor = graph.op("mul", graph.op("minimum", room, graph.leaf("const", 1.0)), inverse)
    single = Buffer(torch.float32, TENSOR)
    buffers = ("squares", Buffer(torch.float64, ELEMENT)), (INVERSE, single), (NORM, single), (FACTOR, single)
    return _verified(graph, torch.float64, buffers, {NORM: norm, FACTOR: factor}, 1)


def _verified(
    graph: Graph, compute: torch.dtype, buffers: tuple[Any, ...], stores: dict[str, int], slots: int
) -> Program:
    program = Program(compute, buffers, tuple(graph.values), tuple(stores.items()), slots)
    verify(program)
    return program
