"""Where a trace is cut into several programs: at totals over all parameters, and at torch calls between programs.

A program of a round leaves what the cut needs: a parameter's share of a total, or the tensors that calls are given
(``given.<n>``). What comes back is loaded by the programs after it: a total, or what calls gave (``called.<n>``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..ir.program import Buffer, Graph, Value, reachable
from .externs import EXTERN, Call, Calls, Constant, Given, Result, Slot, mapped
from .signals import Untraceable
from .signature import Signature
from .totals import BUFFER, TOTAL, Total

GIVEN, CALLED = "given.", "called."
"""What the names of buffers begin with: of tensors that calls are given, and of what they gave."""


class Load(NamedTuple):
    """What a program has left, by its buffer's name."""

    buffer: str


class Number(NamedTuple):
    """A slot of the programs."""

    slot: int


class Step(NamedTuple):
    """A call of a round: of what calls before it gave (`Result`), what programs left, and numbers. ``last``: the
    results that nobody needs afterwards."""

    number: int
    call: Call
    last: tuple[int, ...]


@dataclass(frozen=True)
class Function:
    """The calls of a round, and the buffers that their results are written to."""

    steps: tuple[Step, ...]
    outputs: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Externs:
    """The calls of a trace: for each round its function, if it has any, and the tensors around them.

    ``buffers``: the dtype and shape of each for one parameter; ``ranks``: of each call's result its dimensions;
    ``reused``: buffers of results with that of a given tensor which has room for it.
    """

    functions: tuple[Function | None, ...]
    buffers: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ranks: Mapping[int, int | None]
    reused: Mapping[str, str] = field(default_factory=dict)

    @property
    def may_fail(self) -> bool:
        """Whether some call refuses numbers that are not finite."""
        calls = [step.call for function in self.functions if function for step in function.steps]
        return any("linalg" in call.name or call.name in _MAY_FAIL for call in calls)


_MAY_FAIL = frozenset("qr svd inverse cholesky cholesky_inverse pinverse logdet slogdet matrix_power".split())


@dataclass
class Cuts:
    """What each round stores, besides the program after them; and the graph with loads in place of what comes back.

    ``stores`` are values by buffer, ``buffers`` those of all programs, ``private`` those that rounds alone have.
    """

    graph: Graph
    stores: list[dict[str, int]]
    buffers: dict[str, Buffer]
    private: dict[str, Buffer]
    externs: Externs | None = None


def cut(
    graph: Graph, calls: Calls, signature: Signature, roots: Iterable[int], totals: dict[Total, int]
) -> Cuts:
    """The rounds that come before the program that computes these values. Raises Untraceable if they have no order."""
    level, roots = _levels(graph, totals), list(roots)
    for i in reachable(graph.values, [*roots, *totals.values()]):
        level(i)
    found = reachable(graph.values, [*roots, *totals.values()])
    externs = [i for i in found if graph.values[i].op == EXTERN]
    depth = max((level(i) for i in [*roots, *found]), default=0)
    stores: list[dict[str, int]] = [{} for _ in range(depth)]
    stores += [{}] * (max((level(node) + 1 for node in totals.values()), default=0) - depth)
    for known, node in totals.items():
        stores[level(node)] = stores[level(node)] | {known.share: node}
    cuts = Cuts(graph, stores, {}, {known.share: BUFFER for known in totals})
    if externs:
        _with_calls(cuts, calls, signature, sorted(externs, key=level), level)
    return cuts


def _levels(graph: Graph, totals: dict[Total, int]) -> Callable[[int], int]:
    """The number of rounds that a value needs."""
    known: dict[int, int] = {}
    after: dict[str, int] = {}

    def level(i: int) -> int:
        for k in reachable(graph.values, [i]) if i not in known else ():
            if k not in known:
                known[k] = of(graph.values[k], [known[a] for a in graph.values[k].args])
        return known[i]

    def of(value: Value, args: list[int]) -> int:
        if value.op == "load" and isinstance(value.attr, str) and value.attr.startswith(TOTAL):
            if value.attr not in after:
                raise Untraceable(
                    "a total is made of one that the callback calls for later, or not every time"
                )
            return after[value.attr]
        return max(args, default=0) + (value.op == EXTERN)

    for total, node in sorted(totals.items()):  # those that are made of others are called for later
        after[str(total)] = level(node) + 1
    return level


def _with_calls(
    cuts: Cuts, calls: Calls, signature: Signature, externs: list[int], level: Callable[[int], int]
) -> None:
    graph = cuts.graph
    given: dict[Given, str] = {}
    done: set[int] = set()
    rounds: list[tuple[list[int], list[tuple[str, int]]]] = [([], []) for _ in cuts.stores]
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    values = list(graph.values)
    for n, i in enumerate(externs):
        value, name = graph.values[i], f"{CALLED}{n}"
        for one in calls.given(Result(value.attr)):
            if one not in given:
                given[one] = f"{GIVEN}{len(given)}"
                cuts.stores[level(one.node)] = cuts.stores[level(one.node)] | {given[one]: one.node}
                cuts.private[given[one]] = Buffer(one.dtype, graph.values[one.node].kind)
                shapes[given[one]] = one.dtype, tuple(calls.meta(one).shape)
        steps, outputs = rounds[level(i) - 1]
        steps += [k for k in calls.needed([value.attr]) if k not in done]
        done.update(steps)
        outputs.append((name, value.attr))
        meta = calls.meta(Result(value.attr))
        cuts.buffers[name] = Buffer(meta.dtype, value.kind)
        shapes[name] = meta.dtype, tuple(meta.shape)
        values[i] = Value("load", (), name, value.kind, value.type)
    cuts.graph = Graph(graph.axes)
    cuts.graph.values = values
    cuts.externs = _described(calls, rounds, given, shapes)


def _described(
    calls: Calls,
    rounds: list[tuple[list[int], list[tuple[str, int]]]],
    given: dict[Given, str],
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]],
) -> Externs:
    """The functions, with the last use of each result and of each given tensor."""
    order = [k for steps, _ in rounds for k in steps]
    last: dict[int, int] = {}
    for k in order:
        last |= {ref.call: k for ref in calls.calls[k].refs() if isinstance(ref, Result)}
    kept = {k for _, outputs in rounds for _, k in outputs}
    functions: list[Function | None] = []
    for steps, outputs in rounds:
        made = tuple(
            Step(k, _with_names(calls.calls[k], given), tuple(r for r, at in last.items() if at == k and r not in kept))
            for k in steps
        )
        functions.append(Function(made, tuple(outputs)) if outputs else None)
    metas = {k: calls.meta(Result(k)) for k in order}
    ranks = {k: m.dim() if isinstance(m, torch.Tensor) else None for k, m in metas.items()}
    return Externs(tuple(functions), shapes, ranks, _reused(functions, shapes))


def _with_names(call: Call, given: dict[Given, str]) -> Call:
    def named(x: Any) -> Any:
        return Load(given[x]) if isinstance(x, Given) else x.value if isinstance(x, Constant) else x

    kwargs = tuple((k, mapped(v, named)) for k, v in call.kwargs)
    return call._replace(args=mapped(call.args, named), kwargs=kwargs)


def _reused(
    functions: list[Function | None], shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, str]:
    """For results the memory of a given tensor of their size that no later round needs."""
    loads = [
        {x.buffer for s in f.steps for x in s.call.refs() if isinstance(x, Load)} if f else set() for f in functions
    ]
    out: dict[str, str] = {}
    for r, function in enumerate(functions):
        free = sorted(loads[r] - set().union(*loads[r + 1 :]) - set(out.values()))
        for name, _ in function.outputs if function else ():
            fitting = [one for one in free if shapes[one] == shapes[name]]
            if fitting:
                out[name] = fitting[0]
                free.remove(fitting[0])
    return out


def numbered(externs: Externs, slots: list[int]) -> Externs:
    """With numbers of the step by their slots; adds to these what programs do not read."""

    def slot(x: Any) -> Any:
        if not isinstance(x, Slot):
            return x
        if x.entry not in slots:
            slots.append(x.entry)
        return Number(slots.index(x.entry))

    functions = []
    for function in externs.functions:
        steps = [
            step._replace(
                call=step.call._replace(
                    args=mapped(step.call.args, slot),
                    kwargs=tuple((k, mapped(v, slot)) for k, v in step.call.kwargs),
                )
            )
            for step in (function.steps if function else ())
        ]
        functions.append(Function(tuple(steps), function.outputs) if function else None)
    return Externs(tuple(functions), externs.buffers, externs.ranks, externs.reused)


