"""Named pure passes from program to program, and the split of a program into stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .ops import ELEMENT, TENSOR, is_reduction
from .program import Program, depth_first, verify


def drop_unchanged_stores(program: Program) -> Program:
    """A store of what the buffer holds already is no store."""
    same = {n for n, i in program.stores if program.values[i].op == "load" and program.values[i].attr == n}
    return replace(program, stores=tuple((n, i) for n, i in program.stores if n not in same))


def drop_dead_values(program: Program) -> Program:
    """Keep what the stores need, renumbered."""
    order = depth_first(program.values, program.roots)
    number = {old: new for new, old in enumerate(order)}
    values = tuple(
        replace(program.values[i], args=tuple(number[a] for a in program.values[i].args)) for i in order
    )
    skip = None if program.skip is None else number[program.skip]
    return replace(program, values=values, stores=tuple((n, number[i]) for n, i in program.stores), skip=skip)


def drop_unused_buffers(program: Program) -> Program:
    """A buffer that is neither read nor written needs no pointer."""
    used = {v.attr for v in program.values if v.op == "load"} | {n for n, _ in program.stores}
    return replace(program, buffers=tuple(b for b in program.buffers if b[0] in used))


PASSES: tuple[Callable[[Program], Program], ...] = (
    drop_unchanged_stores,
    drop_dead_values,
    drop_unused_buffers,
)


def optimize(program: Program, snapshots: list[tuple[str, Program]] | None = None) -> Program:
    """Run the passes, verifying between them; ``snapshots`` receives each pass's name and result."""
    verify(program)
    for step in PASSES:
        program = step(program)
        verify(program)
        if snapshots is not None:
            snapshots.append((step.__name__, program))
    return program


@dataclass(frozen=True)
class Stage:
    """One launch: the values it computes, in order, the reductions it takes part results of, and what it stores.

    Only the last stage stores; earlier ones reduce. A later stage computes again what it needs from the buffers.
    """

    values: tuple[int, ...]
    reductions: tuple[int, ...] = ()
    stores: tuple[tuple[str, int], ...] = ()

    def loads(self, program: Program) -> list[str]:
        """The element buffers it reads."""
        leaves = (program.values[i] for i in self.values)
        return [v.attr for v in leaves if v.op == "load" and v.kind == ELEMENT]

    def bytes_per_element(self, program: Program) -> int:
        size = {n: b.dtype.itemsize for n, b in program.buffers if b.kind == ELEMENT}
        return sum(size.get(n, 0) for n in [*self.loads(program), *(n for n, _ in self.stores)])


def stages(program: Program) -> tuple[Stage, ...]:
    """Split at the reductions: those of a stage need only the results of the stages before it.

    What is stored once per tensor needs no stage: see ``scalar_stores``.
    """
    level: list[int] = []
    for v in program.values:
        level.append(max((level[a] for a in v.args), default=0) + is_reduction(v.op))
    out = []
    for depth in range(1, max(level, default=0) + 1):
        found = tuple(i for i, v in enumerate(program.values) if is_reduction(v.op) and level[i] == depth)
        out.append(Stage(_needed(program, [program.values[i].args[0] for i in found]), found))
    element = tuple(s for s in program.stores if program.buffer[s[0]].kind == ELEMENT)
    return (*out, _storing(program, element)) if element or not out else tuple(out)


def scalar_stores(program: Program) -> Stage:
    """What is stored once per tensor, after the last stage."""
    return _storing(program, tuple(s for s in program.stores if program.buffer[s[0]].kind == TENSOR))


def _storing(program: Program, stores: tuple[tuple[str, int], ...]) -> Stage:
    """The stage of these stores; whether they are to be skipped is for it to find out."""
    roots = [i for _, i in stores] + ([program.skip] if stores and program.skip is not None else [])
    return Stage(_needed(program, roots), (), stores)


def _needed(program: Program, roots: list[int]) -> tuple[int, ...]:
    """The values the roots need, taking results of reductions as given."""
    needed: set[int] = set()
    todo = list(roots)
    while todo:
        i = todo.pop()
        if i not in needed:
            needed.add(i)
            if not is_reduction(program.values[i].op):
                todo.extend(program.values[i].args)
    return tuple(sorted(needed))
