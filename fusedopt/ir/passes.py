"""Named pure passes from program to program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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
