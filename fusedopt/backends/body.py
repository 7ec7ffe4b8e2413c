"""What all languages share: how values are named, converted and commented on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..ir.comments import one_line
from ..ir.ops import LEAVES, OPS, TENSOR, Op, Reduction, is_reduction, reduction
from ..ir.program import Program, Value, argument_type, identifier
from ..ir.stages import Stage, scalar_stores, schedule, wholes


@dataclass(frozen=True)
class Entries:
    """The names of a program's kernels: of each stage, of what is done once per tensor before it, if anything is, and
    of what is done after all of them."""

    stages: list[str]
    before: list[str | None]
    scalars: str | None

    @property
    def all(self) -> list[str]:
        return [name for name in (*self.stages, *self.before, self.scalars) if name is not None]


def entries(program: Program, prefix: str = "") -> Entries:
    found = schedule(program)
    names = [f"{prefix}stage_{k}" for k in range(len(found.stages))]
    before = [f"{prefix}before_{k}" if between else None for k, between in enumerate(found.between[:-1])]
    last = found.between[-1] or scalar_stores(program).stores
    return Entries(names, before, f"{prefix}scalars" if last else None)


def summary(program: Program, stage: Stage) -> str:
    """What a stage reads, what becomes of it, and how many bytes that is."""
    stored = [identifier(n) for n, _ in stage.stores]
    what = f"writes {', '.join(stored)}" if stored else "reduces"
    loads = ", ".join(identifier(n) for n in stage.loads(program)) or "nothing"
    return f"reads {loads}; {what}; {stage.bytes_per_element(program)} bytes per element"


def element_op(v: Value) -> Op:
    op = OPS[v.op]
    assert isinstance(op, Op)
    return op


class Body(ABC):
    """The generated code of one program. ``types`` are a language's names for f and d.

    slot_names: the scalars' expressions, for the comments
    """

    types: ClassVar[dict[str, str]]

    def __init__(self, program: Program, slot_names: Sequence[str]) -> None:
        self.program, self.slot_names = program, slot_names
        self.reductions = wholes(program)
        self.buffer_index = {n: k for k, (n, _) in enumerate(program.buffers)}

    def reduces(self) -> list[Reduction]:
        """The table's reductions that the program has."""
        ops = (v.op for v in self.program.values if is_reduction(v.op))
        return [reduction(op) for op in dict.fromkeys(ops)]

    @abstractmethod
    def constant(self, x: float, type_: str) -> str:
        """A number as a literal."""

    @abstractmethod
    def converted(self, text: str, type_: str) -> str:
        """An expression as another type."""

    def name(self, i: int) -> str:
        v = self.program.values[i]
        if v.op == "slot":
            return f"{'d' if v.type == 'd' else 's'}{v.attr}"
        if v.op == "const":
            return self.constant(v.attr, self.types[v.type])
        if i in self.reductions:
            return f"r{self.reductions.index(i)}"
        return f"v{i}"

    def arguments(self, v: Value) -> list[str]:
        """What an op takes, in the type in which it takes it."""
        values = [self.program.values[a] for a in v.args]
        wanted = argument_type(v, values)
        return [
            self.name(i) if a.type in (wanted, "b") else self.converted(self.name(i), self.types[wanted])
            for i, a in zip(v.args, values, strict=True)
        ]

    def comment(self, v: Value) -> str:
        """Where a value comes from: the callback, the scalar's expression, the state's key."""
        if v.op == "slot" and v.attr < len(self.slot_names):
            return one_line(self.slot_names[v.attr])
        if v.op == "load" and v.kind == TENSOR:
            return identifier(v.attr)
        return "" if v.op in LEAVES else one_line(v.where.rsplit(", ", 1)[0])
