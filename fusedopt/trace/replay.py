"""Replay: a trace's scalar program as a function, run on later steps in place of the callbacks.

The function takes the leaves (hyperparameters and scalar state) and returns slots, new scalar state, and whether each
guard still holds. It works on floats, and on numpy arrays: one entry per scalar set, all sets at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .number import ARITHMETIC, Guard, Number, Scalar, ScalarProgram
from .tracer import Trace


def can_replay(trace: Trace) -> bool:
    """Whether replay has a chance: no number that changes with every step has left the scalar program.

    Such an escape (``math.sqrt`` of a step count, say) is guarded by the value it had, and would fail each time.
    """
    return not any(_changes(trace.scalars, g.index) for g in trace.scalars.guards if g.where == "escape")


def _changes(scalars: ScalarProgram, index: int) -> bool:
    op, *operands = scalars.entries[index]
    if op in ARITHMETIC:
        return any(_changes(scalars, i) for i in operands)
    return op in ("state", "default")


LARGEST = 2**53
"""From here on integers are left to Python: as float64 they are not exact, and numpy's overflow."""


def array(values: list) -> np.ndarray:
    """Numbers of one type as an array. Raises TypeError for several, OverflowError for large integers."""
    if len(set(map(type, values))) > 1:
        raise TypeError("integers and floats")
    out = np.array(values)
    if out.dtype.kind != "f" and (out.dtype.kind != "i" or np.abs(out).max() >= LARGEST):
        raise OverflowError("an integer beyond numpy's")
    return out


def _power(a: Scalar, b: Scalar) -> Scalar:
    result = a**b
    if isinstance(result, complex):
        raise ValueError("a complex number")
    return result


def _powers(a: Any, b: Any) -> Any:
    """Element by element with Python's power: numpy's may differ in the last bit."""
    x, y = np.broadcast_arrays(a, b)
    if x.ndim and all(v.flat[0] != 0 and np.all(v == v.flat[0]) for v in (x, y)):
        return _power(x.item(0), y.item(0))
    return array(list(map(_power, x.ravel().tolist(), y.ravel().tolist()))).reshape(x.shape)


def _product(a: Any, b: Any) -> Any:
    if np.result_type(a, b).kind in "iuO" and np.any(np.abs(np.multiply(a, b, dtype=np.float64)) >= LARGEST):
        raise OverflowError("an integer beyond numpy's")
    return a * b


class Replay:
    """``leaves`` are the inputs, as ``("hyper", name, ...)`` and ``("state", key, ...)`` entries, in order."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        scalars = trace.scalars
        self.leaves = [e for e in scalars.entries if e[0] in ("hyper", "state")]
        self.number_keys = [k for k, v in trace.numbers.items() if isinstance(v, Number)]
        self.source = _source(scalars, trace.slots, [trace.numbers[k].index for k in self.number_keys])
        self.function = self._compiled({"pow": _power})

    @functools.cached_property
    def array_function(self) -> Callable[..., Any]:
        """``function`` for arrays: equal to the last bit, or it raises where numpy's numbers are not Python's."""
        return self._compiled({"mul": _product, "pow": _powers, "copysign": np.copysign})

    def _compiled(self, replaced: dict[str, Any]) -> Callable[..., Any]:
        namespace = {**ARITHMETIC, "copysign": math.copysign, **replaced, "values": self.trace.scalars.values}
        namespace |= {"inf": math.inf, "nan": math.nan}  # as guards spell them
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
        flags = {k: v for k, v in self.trace.numbers.items() if not isinstance(v, Number)}
        return slots, flags | dict(zip(self.number_keys, numbers, strict=True))


def _source(scalars: ScalarProgram, slots: Sequence[int], numbers: Sequence[int]) -> str:
    """The scalar program as Python; entries that nothing needs are left out."""
    needed: set[int] = set()
    todo = [*slots, *numbers, *(g.index for g in scalars.guards)]
    while todo:
        i = todo.pop()
        if i not in needed:
            needed.add(i)
            op, *operands = scalars.entries[i]
            todo += operands if op in ARITHMETIC else []
    leaves = [i for i, e in enumerate(scalars.entries) if e[0] in ("hyper", "state")]
    lines = [f"def replay({', '.join(f't{i}' for i in leaves)}):"]
    for i in sorted(needed):
        op, *operands = scalars.entries[i]
        if op in ARITHMETIC:
            lines.append(f"    t{i} = {op}({', '.join(f't{k}' for k in operands)})")
        elif op not in ("hyper", "state"):
            lines.append(f"    t{i} = values[{i}]")
    guards = [text for g in scalars.guards for text in _conditions(g)]
    parts = [
        "".join(f"{t}, " for t in part)
        for part in ([f"t{i}" for i in slots], [f"t{i}" for i in numbers], guards)
    ]
    lines.append(f"    return ({parts[0]}), ({parts[1]}), ({parts[2]})")
    return "\n".join(lines)


def _conditions(guard: Guard) -> list[str]:
    name = f"t{guard.index}"
    conditions = [f"{name} == {guard.value!r}"]
    if type(guard.value) is float and guard.value == 0:  # both zeros are equal, and not the same
        conditions.append(f"copysign(1.0, {name}) == {math.copysign(1.0, guard.value)}")
    return conditions
