"""``fusedopt.total`` in fused steps: rounds of sums, each made of what earlier ones have joined."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..backends import Kernel
from ..ir.ops import ELEMENT
from ..ir.program import Buffer, Graph, Program, verify
from ..trace.totals import BUFFER, SUM, TOTAL
from . import externs
from .items import Item
from .rounds import Piece, Round, resident, space
from .scaling import Scaling

if TYPE_CHECKING:
    from .buckets import Bucket

JOIN_KERNEL = "total"
Column = Callable[[str, "list[Bucket]", Scaling], list[torch.Tensor]]
Place = tuple[int, int]
"""A program of a round: the number of the main launch, and its own among those before it."""


def rounds(
    groups: Sequence[list[Bucket]],
    scaling: Scaling,
    column: Column,
    tensors: Callable[[Bucket], externs.Tensors] | None = None,
) -> list[Totals]:
    """The rounds of launches of these buckets. ``column`` gives the tensors of rows for a buffer; ``tensors`` finds
    state for torch calls.

    Raises RuntimeError if there is no order for them.
    """
    programs = {
        (k, r): kernel.program
        for k, group in enumerate(groups)
        for r, (_, kernel) in enumerate(group[0].known.rounds)
    }
    if not programs:
        return []
    makes = {place: sums(program) for place, program in programs.items()}
    takes = {
        place: {_share(n) for n, _ in program.buffers if n.startswith(TOTAL)}
        for place, program in programs.items()
    }
    calling = {k: externs.calling(group, tensors) for k, group in enumerate(groups)}
    memory = _memory(groups, makes)
    out: list[Totals] = []
    missing = {name for names in makes.values() for name in names}
    while programs:
        ready = [
            (k, r)
            for k, r in programs
            if takes[k, r].isdisjoint(missing) and (not calling[k] or (k, r - 1) not in programs)
        ]
        for place in ready:
            del programs[place]
        still = {name for place in programs for name in makes[place]}
        if not ready:
            raise RuntimeError(
                "fusedopt.total: parameters of different structure make their totals of one another, in no order that "
                "would do. Remedy: call total for the same things in the same order for all parameters"
            )
        out.append(_round(groups, ready, sorted(missing - still), memory, scaling, column))
        out[-1].calls = [(k, r, each) for k, r in ready for each in calling[k]]
        missing = still
    return out


def sums(program: Program) -> list[str]:
    """The shares of totals that it leaves."""
    return [name for name, _ in program.stores if name.startswith(SUM)]


def _share(total: str) -> str:
    return SUM + total.removeprefix(TOTAL)


Memory = dict[str, tuple[torch.Tensor, dict[Place, Piece]]]


def _memory(groups: Sequence[list[Bucket]], makes: dict[Place, list[str]]) -> Memory:
    """For the shares in each total: all of it, and each program's piece."""
    places: dict[str, list[Place]] = {}
    for place, names in makes.items():
        for name in names:
            places.setdefault(name, []).append(place)
    out: Memory = {}
    for name, found in places.items():
        whole, pieces = space(
            _device(groups[0]), [(_device(groups[k]), len(_items(groups[k]))) for k, _ in found]
        )
        out[name] = whole, dict(zip(found, pieces, strict=True))
    return out


def _round(
    groups: Sequence[list[Bucket]],
    ready: Sequence[Place],
    done: Sequence[str],
    memory: Memory,
    scaling: Scaling,
    column: Column,
) -> Totals:
    """The round of these programs, which joins what is complete then."""
    out = Totals(_device(groups[0]), {_device(group) for group in groups}, scaling)
    for place in ready:
        group, items = groups[place[0]], _items(groups[place[0]])
        backend, kernel = group[0].known.rounds[place[1]]
        left = {name: memory[name][1][place] for name in sums(kernel.program)}
        columns = {
            name: list(left[name][0].unbind()) if name in left else column(name, group, scaling)
            for name, _ in kernel.program.buffers
        }
        sets = [k for k, plan in enumerate(group) for _ in plan.items]
        main = group[0].kernel.program
        shapes = [plan.trace.lengths(item.param.shape) for plan in group for item in plan.items]
        pieces = [*left.values()]
        out.add(place[0], backend, kernel, items, columns, main, pieces, sets, resident(items), shapes)
    if done:
        first = groups[0][0]
        kernel = join_kernel(first)
        out.totals = [TOTAL + name.removeprefix(SUM) for name in done]
        columns = {
            "sums": [memory[name][0] for name in done],
            "joined": [scaling.buffer(name, out.main) for name in out.totals],
        }
        out.set_join(first.known.backend, kernel, columns)
    return out


class Totals(Round):
    """A round of totals. ``totals`` are those that it joins."""

    def __init__(self, main: torch.device, devices: set[torch.device], scaling: Scaling) -> None:
        super().__init__("fusedopt.total", main, devices)
        self.scaling = scaling
        self.totals: list[str] = []
        self.calls: list[tuple[int, int, externs.Calling]] = []

    def run(self, slots: Sequence[np.ndarray]) -> None:
        super().run(slots)
        for k, number, calling in self.calls:
            if number == 0:
                calling.forget()
            on = {*self.devices, self.main}
            if not (self.scaling.amp and calling.looks_first and self.scaling.skipped(on)):
                calling.run(number, slots[k][calling.set])

    def called(self) -> list[str]:
        return [calling.described(number) for _, number, calling in self.calls if calling.calls(number)]

    def commit(self) -> None:
        for calling in dict.fromkeys(calling for _, _, calling in self.calls):
            calling.commit()

    def end(self) -> None:
        for _, _, calling in self.calls:
            calling.let_go()

    def native(self) -> Any:
        return None if self.calls else super().native()

    def finish(self) -> None:
        super().finish()
        for device in self.devices - {self.main}:
            for name in self.totals:
                there, here = self.scaling.buffer(name, device), self.scaling.buffer(name, self.main)
                there.copy_(here, non_blocking=True)


def join_kernel(bucket: Bucket) -> Kernel:
    """The kernel that joins, where this bucket is first."""
    return bucket.known.backend.compile(joined(), JOIN_KERNEL, [], bucket.trace.signature.device)


@functools.cache
def joined() -> Program:
    """Σ sums, for each total."""
    graph = Graph()
    total = graph.op("sum", graph.leaf("load", "sums", kind=ELEMENT))
    buffers = ("sums", Buffer(torch.float64, ELEMENT)), ("joined", BUFFER)
    program = Program(torch.float64, buffers, tuple(graph.values), (("joined", total),), 0)
    verify(program)
    return program


def _items(group: list[Bucket]) -> list[Item]:
    return [item for plan in group for item in plan.items]


def _device(group: list[Bucket]) -> torch.device:
    return _items(group)[0].param.device
