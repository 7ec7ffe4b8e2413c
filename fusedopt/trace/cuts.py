"""Where a trace is cut into several programs: at totals over all parameters, and at torch calls between programs.

A program of a round leaves what the cut needs: a parameter's share of a total, or the tensors that calls are given
(``given.<n>``). What comes back is loaded by the programs after it: a total, or what calls gave (``called.<n>``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ..ir.program import Buffer, Graph, Value, reachable
from .externs import EXTERN, Call, Calls, Constant, Given, Kept, Ref, Result, Slot, mapped
from .signals import Untraceable
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
    """The calls of a round, and the buffers and the tensors of the state that their results are written to."""

    steps: tuple[Step, ...]
    outputs: tuple[tuple[str, int], ...]
    written: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Externs:
    """The calls of a trace: for each round its function, if it has any, and the tensors around them.

    ``buffers``: the dtype and shape of each for one parameter; ``kept``: those of the state's tensors that calls take
    or write, in the type that callbacks compute in; ``ranks``: of each call's result its dimensions; ``reused``:
    buffers of results with that of a given tensor which has room for it; ``dtypes``: those of all results;
    ``compiled``: what makes the calls (see step/externs.py).
    """

    functions: tuple[Function | None, ...]
    buffers: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ranks: Mapping[int, int | None]
    reused: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    dtypes: frozenset[torch.dtype] = frozenset()
    compiled: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def key(self) -> Any:
        """What it is compared by with others: tensors by what they hold."""

        def keyed(x: Any) -> Any:
            return Constant(x) if isinstance(x, torch.Tensor) else x

        calls = [
            (s.number, s.call.function, mapped(s.call.args, keyed), mapped(s.call.kwargs, keyed), s.last)
            for f in self.functions
            for s in (f.steps if f else ())
        ]
        return calls, [f and (f.outputs, f.written) for f in self.functions], self.buffers, self.kept

    @property
    def may_fail(self) -> bool:
        """Whether some call refuses numbers that are not finite."""
        calls = [step.call for function in self.functions if function for step in function.steps]
        return any("linalg" in call.name or call.name in _MAY_FAIL for call in calls)

    def __str__(self) -> str:
        """The functions as Python."""
        lines = []
        for number, function in enumerate(self.functions):
            if function is not None:
                lines += [f"def between_{number + 1}(memory, state, slots):", *map(_line, function.steps)]
                lines += [f"    memory[{name!r}] = r{call}" for name, call in function.outputs]
                lines += [f"    state[{key!r}] = r{call}" for key, call in function.written]
        return "\n".join(lines)


def _line(step: Step) -> str:
    call = step.call
    args = [*map(_spelled, call.args), *(f"{k}={_spelled(v)}" for k, v in call.kwargs)]
    text = f"    r{step.number} = {call.name}({', '.join(args)})"
    return f"{text:<56}# {call.where}" if call.where else text


def _spelled(x: Any) -> str:
    if type(x) in (tuple, list):
        return f"[{', '.join(map(_spelled, x))}]"
    if isinstance(x, Result):
        return f"r{x.call}"
    if isinstance(x, (Load, Kept)):
        return f"memory[{x.buffer!r}]" if isinstance(x, Load) else f"state[{x.key!r}]"
    if isinstance(x, Number):
        return f"slots[{x.slot}]"
    return f"a tensor of {list(x.shape)}" if isinstance(x, torch.Tensor) else repr(x)


_MAY_FAIL = frozenset(
    ["qr", "svd", "inverse", "cholesky", "cholesky_inverse", "pinverse", "logdet", "slogdet", "matrix_power"]
)


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
    graph: Graph, calls: Calls, roots: Iterable[int], totals: dict[Total, int], written: dict[str, Ref]
) -> Cuts:
    """The rounds that come before the program that computes these values. Raises Untraceable if they have no order.

    written: what calls leave in the state
    """
    level = _levels(graph, totals)
    results = {key: _result(calls, ref) for key, ref in written.items()}
    given = [one.node for result in results.values() for one in calls.given(result)]
    found = reachable(graph.values, [*roots, *totals.values(), *given])
    externs = [i for i in found if graph.values[i].op == EXTERN]
    depth = max([0, *map(level, found), *(level(i) + 1 for i in given)])
    stores: list[dict[str, int]] = [{} for _ in range(depth)]
    stores += [{}] * (max((level(node) + 1 for node in totals.values()), default=0) - depth)
    for known, node in totals.items():
        stores[level(node)] = stores[level(node)] | {known.share: node}
    cuts = Cuts(graph, stores, {}, {known.share: BUFFER for known in totals})
    if externs or results:
        _with_calls(cuts, calls, sorted(externs, key=level), results, level)
    return cuts


def _result(calls: Calls, ref: Ref) -> Result:
    return ref if isinstance(ref, Result) else calls.record(torch.Tensor.clone, (ref,), {})


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
    cuts: Cuts,
    calls: Calls,
    externs: list[int],
    written: dict[str, Result],
    level: Callable[[int], int],
) -> None:
    """Add what calls are given and what they give."""
    graph = cuts.graph
    given: dict[Given, str] = {}
    done: set[int] = set()
    rounds: list[Round] = [([], [], []) for _ in cuts.stores]
    shapes: Shapes = {}
    values = list(graph.values)

    def need(result: Result, r: int) -> Round:
        for one in calls.given(result):
            if one not in given:
                given[one] = f"{GIVEN}{len(given)}"
                cuts.stores[level(one.node)] = cuts.stores[level(one.node)] | {given[one]: one.node}
                cuts.private[given[one]] = Buffer(one.dtype, graph.values[one.node].kind)
                shapes[given[one]] = one.dtype, tuple(calls.meta(one).shape)
        rounds[r][0].extend(k for k in calls.needed([result.call]) if k not in done)
        done.update(rounds[r][0])
        return rounds[r]

    of_state = {
        key: max((level(one.node) for one in calls.given(x)), default=-1) for key, x in written.items()
    }
    for r in range(len(rounds)):
        for i in [i for i in externs if level(i) == r + 1]:
            need(Result(values[i].attr), r)
        for key in [k for k, at in of_state.items() if at == r or (at < 0 and r == len(rounds) - 1)]:
            need(written[key], r)[2].append((key, written[key].call))
    if -1 in of_state.values() and not rounds:
        raise Untraceable("state is made of nothing but state")
    for n, i in enumerate(externs):
        value, name = graph.values[i], f"{CALLED}{n}"
        rounds[level(i) - 1][1].append((name, value.attr))
        meta = calls.meta(Result(value.attr))
        cuts.buffers[name] = Buffer(meta.dtype, value.kind)
        shapes[name] = meta.dtype, tuple(meta.shape)
        values[i] = Value("load", (), name, value.kind, value.type)
    cuts.graph = Graph(graph.axes)
    cuts.graph.values = values
    if not all(cuts.stores):
        raise Untraceable("a tensor is made of nothing but state, by torch calls")
    cuts.externs = _described(calls, rounds, given, shapes)


Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Round = tuple[list[int], list[tuple[str, int]], list[tuple[str, int]]]
"""Of a round: its calls, what buffers get of them, and what the state does."""


def _described(
    calls: Calls,
    rounds: list[Round],
    given: dict[Given, str],
    shapes: Shapes,
) -> Externs:
    """The functions, with the last use of each result and of each given tensor."""
    order = [k for steps, _, _ in rounds for k in steps]
    last: dict[int, int] = {}
    for k in order:
        last |= {ref.call: k for ref in calls.calls[k].refs() if isinstance(ref, Result)}
    kept = {k for _, outputs, written in rounds for _, k in (*outputs, *written)}
    functions: list[Function | None] = []
    for steps, outputs, written in rounds:
        made = tuple(
            Step(
                k,
                _with_names(calls.calls[k], given),
                tuple(r for r, at in last.items() if at == k and r not in kept),
            )
            for k in steps
        )
        functions.append(Function(made, tuple(outputs), tuple(written)) if made else None)
    metas = {k: calls.meta(Result(k)) for k in order}
    ranks = {k: m.dim() if isinstance(m, torch.Tensor) else None for k, m in metas.items()}
    refs = {x for k in order for x in calls.calls[k].refs() if isinstance(x, Kept)}
    refs |= {Kept(key) for _, _, written in rounds for key, _ in written}
    state = {ref.key: (calls.meta(ref).dtype, tuple(calls.meta(ref).shape)) for ref in sorted(refs)}
    names = {calls.memory(calls.meta(one)): name for one, name in given.items()}
    tensors = {k: m for k, m in metas.items() if isinstance(m, torch.Tensor)}
    views = {k: names[calls.memory(m)] for k, m in tensors.items() if calls.memory(m) in names}
    dtypes = frozenset(m.dtype for m in tensors.values())
    return Externs(tuple(functions), shapes, ranks, _reused(functions, shapes, views), state, dtypes)


def _with_names(call: Call, given: dict[Given, str]) -> Call:
    def named(x: Any) -> Any:
        return Load(given[x]) if isinstance(x, Given) else x.value if isinstance(x, Constant) else x

    kwargs = tuple((k, mapped(v, named)) for k, v in call.kwargs)
    return call._replace(args=mapped(call.args, named), kwargs=kwargs)


def _reused(functions: list[Function | None], shapes: Shapes, views: Mapping[int, str]) -> dict[str, str]:
    """For results the memory of a given tensor of their size that no later round needs, nor a view of it.

    views: of calls that give one, the given tensor
    """
    loads = [_loaded(function, views) if function else set() for function in functions]
    out: dict[str, str] = {}
    for r, function in enumerate(functions):
        free = sorted(loads[r] - set().union(*loads[r + 1 :]) - set(out.values()))
        for name, _ in function.outputs if function else ():
            fitting = [one for one in free if shapes[one] == shapes[name]]
            if fitting:
                out[name] = fitting[0]
                free.remove(fitting[0])
    return out


def _loaded(function: Function, views: Mapping[int, str]) -> set[str]:
    """The given tensors whose memory a round reads."""
    refs = [x for step in function.steps for x in step.call.refs()]
    results = [x.call for x in refs if isinstance(x, Result)]
    results += [call for _, call in (*function.outputs, *function.written)]
    return {x.buffer for x in refs if isinstance(x, Load)} | {views[k] for k in results if k in views}


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
        functions.append(replace(function, steps=tuple(steps)) if function else None)
    return replace(externs, functions=tuple(functions))
