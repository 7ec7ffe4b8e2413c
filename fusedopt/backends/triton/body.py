"""The functions of one program in Triton: a stage, and what is stored once per tensor.

A stage is two functions. ``element_k`` does the work on a block of elements. ``stage_k`` finds the chunk, computes
what there is one of per tensor, and calls it: for whole blocks with pointers that are said to be multiples of 16 bytes,
which is what makes 128-bit accesses of them, and for the rest without. The two must not share a pointer. Such a promise
is kept with the value it is made for and would hold for the rest too, where it is not true; and what a wider access
then writes past the end, no interpreter notices.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch

from ...ir.ops import DRAWS, ELEMENT, OPS, TENSOR, Reduction, is_reduction, reduction
from ...ir.program import Program, Value, identifier
from ...ir.stages import Stage
from .. import body
from ..base import place_word
from ..body import element_op

POINTERS = {
    torch.float32: "FLOAT32",
    torch.float64: "FLOAT64",
    torch.bfloat16: "BFLOAT16",
    torch.float16: "HALF",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.int16: "INT16",
}
_SPELLED = {word for op in OPS.values() for word in re.findall(r"[a-z_]\w*", op.triton or "")}
_TAKEN = frozenset(
    {"triton", "at", "end", "load", "store", "rounded", "spread", "infinity", *DRAWS} | _SPELLED
)
"""Names that a generated element function uses itself."""


class Body(body.Body):
    types: ClassVar = {"f": "T", "d": "tl.float64"}

    def __init__(self, program: Program, slot_names: Sequence[str]) -> None:
        super().__init__(program, slot_names)
        self.pointer: dict[str, str] = {}
        for n, _ in program.buffers:
            name = identifier(n)
            while name in _TAKEN or name in self.pointer.values():
                name += "_"
            self.pointer[n] = name

    # -- reductions --
    def joins(self) -> list[str]:
        """What joins two results of a reduction for which Triton has no word."""
        lines = []
        for op in self.reduces():
            if op.triton is None:
                lines += [
                    "",
                    "",
                    *function(f"{op.name}_", ["a", "b"], [f"return {op.join.format('a', 'b')}"]),
                ]
        return lines

    def _total(self, op: Reduction, block: str) -> str:
        """The numbers of a block, joined."""
        return (op.triton or f"tl.reduce({{0}}, 0, {op.name}_)").format(block)

    # -- the work on a block --
    def element(self, k: int, stage: Stage) -> list[str]:
        arguments = ["at", "end", *(self.pointer[n] for n in self._buffers(stage)), *self._uniform(stage)]
        arguments += ["place", "first"] if self._draws(stage) else []
        lines = [self._line(i) for i in stage.values if self.program.values[i].kind == ELEMENT]
        lines += [f"store({self.pointer[n]}, at, end, {self.name(i)}, WHOLE)" for n, i in stage.stores]
        if stage.reductions:
            lines.append(
                f"return {', '.join(self.name(self.program.values[i].args[0]) for i in stage.reductions)}"
            )
        return function(f"element_{k}", [*arguments, "WHOLE: tl.constexpr"], lines or ["pass"])

    def _draws(self, stage: Stage) -> bool:
        return any(self.program.values[i].op in DRAWS for i in stage.values)

    def _buffers(self, stage: Stage) -> list[str]:
        """The buffers with a number per element that it reads or writes."""
        used = {*stage.loads(self.program), *(n for n, _ in stage.stores)}
        return [n for n in self.buffer_index if n in used]

    def _uniform(self, stage: Stage) -> list[str]:
        """What the element function needs of what there is one of per tensor."""
        values = self.program.values
        used = {a for i in stage.values if values[i].kind == ELEMENT for a in values[i].args}
        used |= {i for _, i in stage.stores} | {values[i].args[0] for i in stage.reductions}
        return [self.name(i) for i in sorted(used) if values[i].kind == TENSOR and values[i].op != "const"]

    # -- one program per chunk --
    def stage(self, k: int, stage: Stage) -> list[str]:
        buffers = self._buffers(stage)
        addresses = [f"a{self.buffer_index[n]}" for n in buffers]
        pointers = [
            f"{a}.to({POINTERS[self.program.buffer[n].dtype]}) + i"
            for a, n in zip(addresses, buffers, strict=True)
        ]
        # The rest is accessed one element at a time: in smaller blocks, to need no more registers than whole blocks do.
        # Not where it is reduced: which element goes to which accumulator must not depend on alignment.
        rest = "BLOCK" if stage.reductions else "REST"
        skip = self.program.skip
        lines = [
            "chunk = tl.program_id(0).to(tl.int64)",
            "piece = chunks + chunk * CHUNK_WORDS",
            f"row = rows + tl.load(piece) * {self._width}",
            "begin = tl.load(piece + 1)",
            "end = tl.load(piece + 2)",
            *self._prologue(stage),
            *(
                [f"end = tl.where({self.name(skip)}, begin, end)"]
                if skip is not None and stage.stores
                else []
            ),
            *self._numbers(stage),
            *(f"{a} = tl.load(row + HEAD + {a[1:]})" for a in addresses),
            *([f"place = tl.load(row + {place_word(self.program)})"] if self._draws(stage) else []),
            *(
                f"acc{j} = tl.full((BLOCK,), {reduction(self.program.values[i].op).init}, tl.float64)"
                for j, i in enumerate(stage.reductions)
            ),
            "at = tl.arange(0, BLOCK)",
            f"whole = whole_blocks({' | '.join(addresses) or '0'}, begin, end, BLOCK)",
            "for i in range(begin, whole, BLOCK):",
            *indent(self._visit(k, stage, [f"tl.multiple_of({p}, 16)" for p in pointers], whole=True)),
            f"at = tl.arange(0, {rest})",
            # What would move out of this loop are the addresses of its elements: two registers for each.
            f"for i in tl.range(whole, end, {rest}, disable_licm=True):",
            f"    left = tl.minimum(end - i, {rest}).to(tl.int32)",
            *indent(self._visit(k, stage, pointers, whole=False)),
        ]
        for j, i in enumerate(stage.reductions):
            total = self._total(reduction(self.program.values[i].op), f"acc{j}")
            lines.append(f"tl.store(partials + {self._partial('chunk', i)}, {total})")
        arguments = ["rows", "chunks", "partials", "slots", "BLOCK: tl.constexpr"]
        return function(f"stage_{k}", arguments, lines)

    def _visit(self, k: int, stage: Stage, pointers: list[str], whole: bool) -> list[str]:
        """The call of the element function, and what becomes of its results."""
        numbers = [*self._uniform(stage), *(["place", "i"] if self._draws(stage) else [])]
        calls = call(f"element_{k}", ["at", "BLOCK" if whole else "left", *pointers, *numbers, str(whole)])
        if not stage.reductions:
            return calls
        targets = ", ".join(f"x{j}" for j in range(len(stage.reductions)))
        lines = [f"{targets} = {calls[0]}", *calls[1:]]
        for j, i in enumerate(stage.reductions):
            op = reduction(self.program.values[i].op)
            joined = op.join.format(f"acc{j}", f"x{j}.to(tl.float64)")
            lines.append(f"acc{j} = {joined}" if whole else f"acc{j} = tl.where(at < left, {joined}, acc{j})")
        return lines

    # -- one program per row --
    def scalars(self, stage: Stage) -> list[str]:
        lines = [
            f"row = rows + tl.program_id(0).to(tl.int64) * {self._width}",
            *self._prologue(stage),
            *self._stores("tl.load(row) > 0", stage.stores),
        ]
        return function("scalars", ["rows", "partials", "slots"], lines)

    def _numbers(self, stage: Stage) -> list[str]:
        """What a stage stores once per tensor, by who has the first elements."""
        return self._stores("begin == 0", stage.numbers) if stage.numbers else []

    def _stores(self, when: str, stores: Iterable[tuple[str, int]]) -> list[str]:
        skip = self.program.skip
        return [
            f"if {when}{'' if skip is None else f' and not {self.name(skip)}'}:",
            *(f"    store({self._at(n)}, 0, 1, {self.name(i)}, True)" for n, i in stores),
        ]

    # -- the once-per-tensor part --
    @property
    def _width(self) -> str:
        return f"(HEAD + {len(self.program.buffers) + self.program.draws})"

    def _prologue(self, stage: Stage) -> list[str]:
        lines = []
        values = self.program.values
        if any(values[i].op == "slot" for i in stage.values):
            lines.append(f"numbers = slots + tl.load(row + 1) * {self.program.slots}")
        for i in stage.values:
            v = values[i]
            if v.kind == TENSOR and is_reduction(v.op):
                lines.append(self._commented(f"{self.name(i)} = {self._joined(i)}.to(T)", v))
            elif v.kind == TENSOR:
                lines.append(self._line(i))
        return lines

    def _joined(self, i: int) -> str:
        """A reduction's part results, joined; in double."""
        op = reduction(self.program.values[i].op)
        k, n = self.reductions.index(i), len(self.reductions)
        joined = self._total(op, f"parts(partials + {k}, {n}, row, {op.init})")
        return f"({joined} / tl.load(row).to(tl.float64))" if op.averaged else joined

    def _partial(self, chunk: str, i: int) -> str:
        return f"{chunk} * {len(self.reductions)} + {self.reductions.index(i)}"

    def _at(self, buffer: str) -> str:
        """The pointer to a buffer with one number per tensor."""
        pointer = POINTERS[self.program.buffer[buffer].dtype]
        return f"tl.load(row + HEAD + {self.buffer_index[buffer]}).to({pointer})"

    # -- values --
    def _line(self, i: int) -> str:
        v = self.program.values[i]
        return "" if v.op == "const" else self._commented(f"{self.name(i)} = {self._expression(v)}", v)

    def _expression(self, v: Value) -> str:
        if v.op == "slot":
            return f"tl.load(numbers + {v.attr}).to({self.types[v.type]})"
        if v.op == "numel":
            return f"tl.load(row).to({self.types[v.type]})"
        if v.op == "load" and v.kind == ELEMENT:
            return f"load({self.pointer[v.attr]}, at, end, WHOLE)"
        if v.op == "load":
            return (
                f"tl.load({self._at(v.attr)})" if v.type == "d" else f"load({self._at(v.attr)}, 0, 1, True)"
            )
        if v.op in DRAWS:
            return f"{v.op}({', '.join(self.arguments(v))}, {v.attr}, place, first + at).to(T)"
        spelling = element_op(v).triton
        assert spelling is not None
        return spelling.format(*self.arguments(v))

    def arguments(self, v: Value) -> list[str]:
        """Masks that meet in a block are blocks."""
        texts = super().arguments(v)
        if v.op in DRAWS or element_op(v).types != "bb>b" or v.kind == TENSOR:
            return texts
        return [
            t if self.program.values[i].kind == ELEMENT else f"spread({t}, at)"
            for i, t in zip(v.args, texts, strict=True)
        ]

    def constant(self, x: float, type_: str) -> str:
        if not math.isfinite(x):
            return f'tl.full((), float("{x}"), {type_})'
        if x == 0 and math.copysign(1.0, x) < 0:  # a constant that equals zero becomes a positive one
            return f"(tl.full((), 0.0, {type_}) * -1.0)"
        return f"tl.full((), {x!r}, {type_})"

    def converted(self, text: str, type_: str) -> str:
        return f"{text}.to({type_})"

    def _commented(self, text: str, v: Value) -> str:
        comment = self.comment(v)
        return f"{text:<44}  # {comment}" if comment else text


def function(name: str, arguments: Sequence[str], lines: Iterable[str]) -> list[str]:
    head = call(f"def {name}", arguments)
    return ["@triton.jit", *head[:-1], f"{head[-1]}:", *indent(lines)]


def call(name: str, arguments: Sequence[str]) -> list[str]:
    """A call, on one line if it fits there."""
    line = f"{name}({', '.join(arguments)})"
    if len(line) <= 90:
        return [line]
    body = textwrap.wrap(f"{', '.join(arguments)},".replace(": tl", ":\0tl"), 96, break_long_words=False)
    return [f"{name}(", *indent(line.replace("\0", " ") for line in body), ")"]


def indent(lines: Iterable[str]) -> list[str]:
    return [textwrap.indent(line, "    ") for line in lines if line]
