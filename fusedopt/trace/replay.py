"""Replay: a trace's scalar program as a function, run on later steps in place of the callbacks.

The function takes the leaves (hyperparameters and scalar state) and returns slots, new scalar state, and whether each
guard still holds. The extension runs the same instructions for all scalar sets at once (``csrc/scalars.h``).
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .number import ARITHMETIC, Number, Scalar, ScalarProgram
from .tracer import Trace


def can_replay(trace: Trace) -> bool:
    """Whether replay has a chance: no number that changes with every step has left the scalar program.

    Such an escape (a step count that is formatted, say) is guarded by the value it had, and would fail each time.
    """
    return not any(_changes(trace, g.index) for g in trace.scalars.guards if g.where == "escape")


def _changes(trace: Trace, index: int) -> bool:
    op, *operands = trace.scalars.entries[index]
    if op in ARITHMETIC:
        return any(_changes(trace, i) for i in operands)
    if op == "state":  # unless it is left as it was
        new = trace.numbers.get(operands[0])
        return not (type(new) is Number and new.index == index)
    return bool(op == "default")


def _power(a: Scalar, b: Scalar) -> Scalar:
    result = a**b
    if isinstance(result, complex):
        raise ValueError("a complex number")
    return result


class Replay:
    """A trace's scalar program, reduced to what a step needs.

    ``leaves`` are the inputs, as ``("hyper", name, ...)`` and ``("state", key, ...)`` entries, in order.
    ``instructions`` are ``("leaf", which)``, ``("value", number)``, or an operation with the instructions it takes;
    ``slots``, ``numbers`` (scalar state, by ``number_keys``) and ``guards`` (with their values) refer to instructions.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        scalars = trace.scalars
        self.leaves = [e for e in scalars.entries if e[0] in ("hyper", "state")]
        # A number that the state had, and in whose place a constant comes, is written like any other.
        left = {k: v for k, v in trace.numbers.items() if type(v) in (Number, int, float)}
        self.number_keys = list(left)
        numbers = [v.index if type(v) is Number else scalars.constant(v) for v in left.values()]
        needed = _needed(scalars, [*trace.slots, *numbers, *(g.index for g in scalars.guards)])
        at = {i: k for k, i in enumerate(needed)}
        self.instructions = [self._instruction(i, at) for i in needed]
        self.slots, self.numbers = [at[i] for i in trace.slots], [at[i] for i in numbers]
        self.guards = [(at[g.index], g.value) for g in scalars.guards]
        self.function = self._compiled()

    def _instruction(self, i: int, at: dict[int, int]) -> tuple[Any, ...]:
        scalars = self.trace.scalars
        op, *operands = entry = scalars.entries[i]
        if op in ARITHMETIC:
            return op, *(at[k] for k in operands)
        return ("leaf", self.leaves.index(entry)) if entry in self.leaves else ("value", scalars.values[i])

    @property
    def source(self) -> str:
        """The program as Python: returns slots, new scalar state, and whether each guard holds."""
        given = {operands[0]: f"t{i}" for i, (op, *operands) in enumerate(self.instructions) if op == "leaf"}
        lines = [f"def replay({', '.join(given.get(k, f'_{k}') for k in range(len(self.leaves)))}):"]
        for i, (op, *operands) in enumerate(self.instructions):
            if op in ARITHMETIC:
                lines.append(f"    t{i} = {op}({', '.join(f't{k}' for k in operands)})")
            elif op == "value":
                lines.append(f"    t{i} = values[{i}]")
        guards = [text for guard in self.guards for text in _conditions(*guard)]
        outputs = [f"t{i}" for i in self.slots], [f"t{i}" for i in self.numbers], guards
        parts = ["".join(f"{t}, " for t in part) for part in outputs]
        lines.append(f"    return ({parts[0]}), ({parts[1]}), ({parts[2]})")
        return "\n".join(lines)

    def _compiled(self) -> Callable[..., tuple[Any, ...]]:
        values = {i: operands[0] for i, (op, *operands) in enumerate(self.instructions) if op == "value"}
        namespace: dict[str, Any] = {**ARITHMETIC, "pow": _power, "copysign": math.copysign, "values": values}
        namespace |= {"inf": math.inf, "nan": math.nan}  # as guards spell them
        namespace |= {"builtins": builtins, "math": math, "numpy": np}
        exec(compile(self.source, "<scalar program>", "exec"), namespace)
        return namespace["replay"]

    def inputs(self, hyper: dict[str, Any], state: dict[str, Any]) -> list[Scalar]:
        """The leaves' values for one scalar set."""
        out = []
        for kind, name, *path in self.leaves:
            value = (hyper if kind == "hyper" else state)[name]
            for i in path:
                value = value[i]
            out.append(value)
        return out

    def __call__(
        self, hyper: dict[str, Any], state: dict[str, Any]
    ) -> tuple[Sequence[Scalar], dict[str, Any]] | None:
        """Slots and new scalar state, or None if the callbacks have to be run: a guard fails, or arithmetic does."""
        try:
            inputs = self.inputs(hyper, state)
            if any(type(v) not in (int, float) for v in inputs):
                return None
            slots, numbers, guards = self.function(*inputs)
        except (ArithmeticError, KeyError, IndexError, TypeError, ValueError):
            return None
        if not all(guards):
            return None
        flags = {k: v for k, v in self.trace.numbers.items() if k not in self.number_keys}
        return slots, flags | dict(zip(self.number_keys, numbers, strict=True))


def _needed(scalars: ScalarProgram, outputs: Iterable[int]) -> list[int]:
    """The entries that these need, in order."""
    needed: set[int] = set()
    todo = [*outputs]
    while todo:
        i = todo.pop()
        if i not in needed:
            needed.add(i)
            op, *operands = scalars.entries[i]
            todo += operands if op in ARITHMETIC else []
    return sorted(needed)


def _conditions(index: int, value: Scalar) -> list[str]:
    conditions = [f"t{index} == {value!r}"]
    if type(value) is float and value == 0:  # both zeros are equal, and not the same
        conditions.append(f"copysign(1.0, t{index}) == {math.copysign(1.0, value)}")
    return conditions
