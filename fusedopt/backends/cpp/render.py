"""Staged programs as C++: the body that is dropped into ``kernels/cpu.cpp``."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from ...ir.ops import OPS, Op
from ...ir.program import Program, Value, identifier
from ...ir.stages import Stage
from .. import c_family
from ..c_family import TYPES, entries, indent
from .blocks import Blocks
from .lines import Lines

__all__ = ["SLOT", "TYPES", "VERSION", "entries", "render", "source"]

VERSION = "6"
SLOT = '#include "cpu_example.inc"'


def render(program: Program, slot_names: Sequence[str] = (), title: str = "") -> str:
    """The generated body. ``slot_names`` are the scalars' expressions, for the comments."""
    language = _Lines if program.line else _Body if program.axes == 1 else _Blocks
    return c_family.render(language, program, slot_names, title)


def source(skeleton: str, body: str) -> str:
    """The whole file: the skeleton with the body in place of its example."""
    return c_family.source(skeleton, SLOT, body)


class _Body(c_family.Body):
    qualifiers = "static"
    element_by_element = True
    """Whether loops go over elements, one like another."""

    def __init__(self, program: Program, slot_names: Sequence[str]) -> None:
        super().__init__(program, slot_names)
        if any(op.averaged for op in self.reduces()):  # of no elements there is no mean
            self.first += " && row.numel() > 0"
        values = program.values
        self._asked = {
            i for v in values for i in v.args if values[i].type == "b" and values[i].kind != v.kind
        }
        """Conditions that hold for more than an element. They are numbers: gcc makes no vectors of a loop over bfloat16
        in which it finds a bool that was there before."""

    def declarations(self) -> list[str]:
        """Besides reductions, the functions of the C library that are called: the skeleton includes no header."""
        ops = [OPS[v.op] for v in self.program.values if v.op in OPS]
        spelled = [op.cpp if isinstance(op, Op) else op.join for op in ops]
        called = [name for text in spelled for name in re.findall(r"::(\w+)\(", text)]
        functions = [f"FUSEDOPT_FUNCTION({name})" for name in dict.fromkeys(called)]
        return [*(["FUSEDOPT_WIDEST"] if self._has_integers() else []), *functions, *super().declarations()]

    def _has_integers(self) -> bool:
        return (
            self.program.draws
            or self.program.line > 0
            or any(getattr(OPS.get(v.op), "bits", False) for v in self.program.values)
        )

    def declared(self, name: str, type_: str) -> str:
        if not self.element_by_element or not type_.endswith("half"):
            return super().declared(name, type_)
        return f"Near<T, {type_}> {identifier(name)}{{{self.pointer(name, type_)}}};"

    def storing(self, buffer: str, i: int) -> str:
        narrow = self.program.buffer[buffer].dtype == torch.bfloat16
        return "store_rounded" if narrow and self._is_rounded(self.program.values[i]) else "store"

    def _is_rounded(self, v: Value) -> bool:
        """Whether it is one of bfloat16's numbers."""
        if v.op in ("where", "expand"):
            return all(self._is_rounded(self.program.values[i]) for i in v.args[v.op == "where" :])
        if v.op == "const":
            return v.attr != v.attr or torch.tensor(v.attr).bfloat16().item() == v.attr
        return v.op in ("to_bfloat16", "high_bits", "bfloat16_at_random")

    def type_of(self, i: int) -> str:
        return "T" if i in self._asked else super().type_of(i)

    def arguments(self, v: Value) -> list[str]:
        given = zip(v.args, super().arguments(v), strict=True)
        return [f"({text} != T(0))" if i in self._asked else text for i, text in given]

    def _expression(self, i: int, v: Value) -> str:
        text = super()._expression(i, v)
        return f"{text} ? T(1) : T(0)" if i in self._asked else text

    def loop(self, stage: Stage) -> list[str]:
        return self._reduce(stage) if stage.reductions else self._plain(stage)

    def _plain(self, stage: Stage) -> list[str]:
        arguments = ", ".join(["begin", "end", "element", *map(identifier, self.touched(stage))])
        return [
            "const auto element = [&](int64_t i) {",
            *indent(self.element(stage)),
            "};",
            f"for_blocks({arguments});",
        ]

    def _reduce(self, stage: Stage) -> list[str]:
        """Lane accumulators: sixteen per reduction whatever the machine's vectors, so that results do not differ."""
        totals = [
            f"partial[{self.reductions.index(i)}] = acc{j}.total();" for j, i in enumerate(stage.reductions)
        ]
        return [
            *self.accumulators(stage),
            "const auto element = [&](int64_t i, int lane) {",
            *indent([*self.element(stage), *self.accumulate(stage)]),
            "};",
            f"for_lanes({', '.join(['begin', 'end', 'element', *map(identifier, self.touched(stage))])});",
            *totals,
        ]


class _Blocks(Blocks, _Body):
    """Of a program with several axes."""


class _Lines(Lines, _Body):
    """Of one with lines that are all equally long."""
