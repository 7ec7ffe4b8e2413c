"""Staged programs as C++: the body that is dropped into ``kernels/cpu.cpp``."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.passes import Stage
from ..ir.program import Program
from . import c_family
from .c_family import TYPES, entries, indent

__all__ = ["SLOT", "TYPES", "VERSION", "entries", "render", "source"]

VERSION = "2"
SLOT = '#include "cpu_example.inc"'


def render(program: Program, slot_names: Sequence[str] = (), title: str = "") -> str:
    """The generated body. ``slot_names`` are the scalars' expressions, for the comments."""
    return c_family.render(_Body, program, slot_names, title)


def source(skeleton: str, body: str) -> str:
    """The whole file: the skeleton with the body in place of its example."""
    return c_family.source(skeleton, SLOT, body)


class _Body(c_family.Body):
    qualifiers = "static"

    def loop(self, stage: Stage) -> list[str]:
        return self._reduce(stage) if stage.reductions else self._plain(stage)

    def _plain(self, stage: Stage) -> list[str]:
        head = ["FUSEDOPT_INDEPENDENT", "for (int64_t i = begin; i < end; ++i) {"]
        return [*head, *indent(self.element(stage)), "}"]

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
            "for_lanes(begin, end, element);",
            *totals,
        ]
