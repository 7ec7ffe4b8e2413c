"""Named pure passes from program to program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .ops import TENSOR
from .program import Program, Value, depth_first, verify


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


def fold_ones(program: Program) -> Program:
    """``x / x`` is 1, or NaN if x is 0, infinite or NaN; of these two the root and the reciprocal are the same again.

    Such quotients are left of means along a dimension of length 1. To compute one without a division, let alone two and
    a root, takes a fraction of the time: ``(inf if x == 0 else x) * 0 + 1``.
    """
    values: list[Value] = []
    number: list[int] = []  # of each old value
    ones: set[int] = set()
    constants: dict[float, int] = {}

    def add(value: Value) -> int:
        values.append(value)
        return len(values) - 1

    def constant(x: float) -> int:
        if x not in constants:
            constants[x] = add(Value("const", (), x, TENSOR, "f"))
        return constants[x]

    for old in program.values:
        v = replace(old, args=tuple(number[a] for a in old.args))
        if v.op == "div" and v.kind != TENSOR and v.args[0] == v.args[1]:
            (x, _), here = v.args, {"kind": v.kind, "where": v.where}
            is_zero = add(Value("eq", (x, constant(0.0)), None, type="b", **here))
            not_zero = add(Value("where", (is_zero, constant(float("inf")), x), None, type="f", **here))
            nothing = add(Value("mul", (not_zero, constant(0.0)), None, type="f", **here))
            number.append(add(Value("add", (nothing, constant(1.0)), None, type="f", **here)))
            ones.add(number[-1])
        elif v.op == "sqrt" and v.args[0] in ones:
            number.append(v.args[0])
        elif v.op == "div" and v.args[1] in ones and _is_one(values[v.args[0]]):
            number.append(v.args[1])
        else:
            number.append(add(v))
    skip = None if program.skip is None else number[program.skip]
    stores = tuple((n, number[i]) for n, i in program.stores)
    return replace(program, values=tuple(values), stores=stores, skip=skip) if ones else program


def _is_one(v: Value) -> bool:
    return v.op == "const" and bool(v.attr == 1)


PASSES: tuple[Callable[[Program], Program], ...] = (
    drop_unchanged_stores,
    fold_ones,
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
