"""Staged programs as CUDA C++: the body that is dropped into ``kernels/cuda.cu``."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ...ir.program import Program
from ...ir.stages import Stage, by_places, scalar_stores, schedule
from .. import c_family
from ..c_family import TYPES, entries, indent
from .blocks import Blocks, walked

__all__ = ["SLOT", "TYPES", "VERSION", "entries", "launches", "render", "source"]

VERSION = "4"
SLOT = '#include "cuda_example.inc"'


def render(program: Program, slot_names: Sequence[str] = (), title: str = "") -> str:
    """The generated body. ``slot_names`` are the scalars' expressions, for the comments."""
    language = _Body if program.axes == 1 else _Blocks
    head, rest = c_family.render(language, program, slot_names, title).split("\n\n", 1)
    # Powers in double, and divisions of places, need registers that the assembler, aiming at more blocks, would rather
    # spill.
    blocks = 2 if program.axes > 1 or any(v.type == "d" for v in program.values) else 0
    return f"{head}\nconstexpr int resident_blocks = {blocks};\n\n{rest}"


def launches(program: Program) -> list[tuple[str, str]]:
    """The kernels of a step, in order, and what each has blocks for: "joins", "rows", "places" of rows, "chunks", or
    "tiles" of them."""
    found, names = schedule(program), entries(program)
    out = []
    for k, between in enumerate(found.between):
        out += [(f"fusedopt_join_{k}", "joins")] if between.joined else []
        if k < len(found.stages):
            before = names.before[k]
            over = "places" if by_places(program, k) else "rows"
            out += [(before, over)] if before and between.nests else []
            out.append((names.stages[k], "chunks" if found.stages[k].reductions else "tiles"))
    if by_places(program, k := len(found.stages)):
        out.append((f"fusedopt_before_{k}", "places"))
        return [*out, *([("fusedopt_scalars", "rows")] if scalar_stores(program).stores else [])]
    return [*out, *([(names.scalars, "rows")] if names.scalars else [])]


def source(skeleton: str, body: str) -> str:
    """The whole file: the skeleton with the body in place of its example."""
    return c_family.source(skeleton, SLOT, body)


class _Body(c_family.Body):
    qualifiers = "static __device__"
    number = "::number_of(numbers, i)"
    first = "begin == 0 && threadIdx.x == 0"

    def pointer(self, name: str, type_: str) -> str:
        """The gradient's comes with each launch: it is another one in every step."""
        return f"row.gradient<{type_}>(launch)" if name == "grad" else super().pointer(name, type_)

    def scalars(self, stage: Stage) -> list[str]:
        """The block joins part results together; one of its threads stores, when all have read."""
        lines = super().scalars(stage)
        first = next(i for i, line in enumerate(lines) if line.startswith("  store("))
        return [*lines[:first], "  __syncthreads();", "  if (threadIdx.x != 0) return;", *lines[first:]]

    def loop(self, stage: Stage) -> list[str]:
        """One function of an element, which ``walk`` calls with pointers, or with what it has in registers."""
        lines = [*self.element(stage), *self.accumulate(stage)]
        if not lines:
            return ["(void)row, (void)begin, (void)end;  // only numbers per tensor are stored"]
        names, buffers = walked(self, stage)
        numbers = ["int64_t i" if names else "int64_t", "int lane" if stage.reductions else "int"]
        arguments = ", ".join([*(f"auto& {n}" for n in names), *numbers])
        totals = [
            f"acc{j}.finish(partial + {self.reductions.index(i)});" for j, i in enumerate(stage.reductions)
        ]
        return [
            *self.accumulators(stage),
            *textwrap.wrap(f"const auto element = [&]({arguments}) {{", 108, subsequent_indent=" " * 26),
            *indent(lines),
            "};",
            *textwrap.wrap(
                f"::walk({', '.join(['begin', 'end', 'element', *buffers])});", 108, subsequent_indent=" " * 7
            ),
            *totals,
        ]


class _Blocks(Blocks, _Body):
    """Of a program with several axes."""

    number = "i"
