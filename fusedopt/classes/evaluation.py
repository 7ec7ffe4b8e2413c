"""Values of a step on the host: what a graph without parameters comes to, as one generated function of floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..ir.ops import OPS
from ..ir.program import Graph, depth_first
from .sums import totals_in

_WRITTEN = {
    "add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}", "neg": "-{}", "abs": "abs({})",
    "gt": "{} > {}", "ge": "{} >= {}", "lt": "{} < {}", "le": "{} <= {}", "eq": "{} == {}", "ne": "{} != {}",
    "where": "({1} if {0} else {2})", "sqrt": "sqrt({})", "logical_and": "({} and {})", "logical_or": "({} or {})",
    "logical_not": "(not {})", "as_float": "one * {}", "sum": "{}", "mean": "{}", "expand": "{}",
    "maximum": "({0} if {0} > {1} or {0} != {0} else {1})", "minimum": "({0} if {0} < {1} or {0} != {0} else {1})",
}  # fmt: skip
"""Operations as numpy's floats have them, which divide by zero as kernels do. Others are torch's."""


class Evaluation:
    """``slots`` are the entries of the scalar program, ``totals`` the numbers of the totals that it takes."""

    def __init__(self, graph: Graph, nodes: Sequence[int]) -> None:
        order = depth_first(graph.values, nodes)
        self.slots = list(dict.fromkeys(graph.values[i].attr for i in order if graph.values[i].op == "slot"))
        self.totals = sorted(set(totals_in(graph, nodes)))
        space: dict[str, Any] = {"one": np.float64(1), "sqrt": np.sqrt, "f64": np.float64, "nan": math.nan}
        space |= {"inf": math.inf, "quiet": np.errstate(all="ignore")}
        lines = ["def evaluate(slots, totals):"]
        for i in order:
            v = graph.values[i]
            if v.op == "slot":
                text = f"f64(slots[{self.slots.index(v.attr)}])"
            elif v.op == "load":
                text = f"f64(totals[{self.totals.index(int(v.attr.rpartition('.')[2]))}])"
            elif v.op == "const":
                text = f"f64({v.attr!r})"
            elif v.op in _WRITTEN:
                text = _WRITTEN[v.op].format(*(f"v{a}" for a in v.args))
            else:
                space[f"f{i}"] = _of_torch(v.op)
                text = f"f{i}({', '.join(f'v{a}' for a in v.args)})"
            lines.append(f"    v{i} = {text}")
        lines.append(f"    return [{', '.join(f'v{i}' for i in nodes)}]")
        exec(compile("\n".join(lines), "<values of a step>", "exec"), space)
        self._function: Callable[..., list[Any]] = space["evaluate"]

    def __call__(self, slots: Sequence[float], totals: Sequence[float]) -> list[Any]:
        with np.errstate(all="ignore"):
            return self._function(slots, totals)


def _of_torch(op: str) -> Callable[..., Any]:
    function = OPS[op].torch

    def call(*args: Any) -> Any:
        return np.float64(function(*(torch.tensor(float(x), dtype=torch.float64) for x in args)).item())

    return call
