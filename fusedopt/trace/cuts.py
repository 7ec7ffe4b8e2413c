"""Where a trace is cut into several programs: at totals over all parameters, and at torch calls between programs.

A program of a round leaves what the cut needs: a parameter's share of a total, or the tensors that calls are given
(``given.<n>``). What comes back is loaded by the programs after it: a total, or what calls gave (``called.<n>``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ..ir.ops import ELEMENT
from ..ir.program import Buffer, Graph, Value, reachable
from .externs import EXTERN, Call, Calls, Constant, Given, Kept, Ref, Result, Slot, mapped
from .run import GRAD, PARAM
from .signals import Untraceable
from .totals import BUFFER, TOTAL, Total

GIVEN, CALLED = "given.", "called."
"""What the names of buffers begin with: of tensors that calls are given, and of what they gave."""


ALONE = 1 << 17
"""Bytes of a tensor from which on calls on a CPU are made for each: its products of stacks are no faster, and what has
to be copied for a stack is large."""

NARROW_ALONE = 1 << 20
"""The same of 16-bit floats, whose products are so fast that it counts how many there are."""


def alone(device: torch.device, dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether calls of such tensors are made for each."""
    least = NARROW_ALONE if dtype in (torch.bfloat16, torch.float16) else ALONE
    return device.type == "cpu" and math.prod(shape) * dtype.itemsize >= least


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


class Placed(NamedTuple):
    """A call, the buffer that gets what it gives, and the shape in which it gives it."""

    call: int
    buffer: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Function:
    """The calls of a round, and the buffers and the tensors of the state that their results are written to.

    ``placed``: the calls that may leave what they give in a buffer at once, as nobody reads its memory from there on
    """

    steps: tuple[Step, ...]
    outputs: tuple[tuple[str, int], ...]
    written: tuple[tuple[str, int], ...] = ()
    placed: tuple[Placed, ...] = ()


@dataclass(frozen=True)
class Externs:
    """The calls of a trace: for each round its function, if it has any, and the tensors around them.

    ``buffers``: the dtype and shape of each for one parameter; ``kept``: those of the state's tensors (and of the
    parameter, as ``PARAM``, and its gradient, ``GRAD``) that calls take as they are, or write, in the type that
    callbacks compute in; ``changing``: those that programs write after all calls; ``ranks``: of each call's result its
    dimensions; ``reused``: buffers of results with that of a given tensor which has room for it; ``dtypes``: those of
    all results; ``compiled``: what makes the calls (see step/externs.py).
    """

    functions: tuple[Function | None, ...]
    buffers: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ranks: Mapping[int, int | None]
    reused: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    dtypes: frozenset[torch.dtype] = frozenset()
    changing: frozenset[str] = frozenset()
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

    @functools.cached_property
    def views(self) -> bool:
        """Whether some call takes its tensor's layout to be that of contiguous ones, as in the trace."""
        calls = [step.call for function in self.functions if function for step in function.steps]
        return any(call.name in ("view", "view_as", "as_strided", "unflatten") for call in calls)

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
    graph: Graph,
    calls: Calls,
    roots: Iterable[int],
    totals: dict[Total, int],
    written: dict[str, Ref],
    buffers: Mapping[str, Buffer],
    shape: Sequence[int] | None,
) -> Cuts:
    """The rounds that come before the program that computes these values. Raises Untraceable if they have no order.

    written: what calls leave in the state
    buffers: those of all programs
    shape: the parameter's, where it is known
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
        whole = {name: buffer.dtype for name, buffer in buffers.items() if buffer.kind == ELEMENT}
        _with_calls(cuts, calls, sorted(externs, key=level), results, level, whole, shape)
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
    whole: Mapping[str, torch.dtype],
    shape: Sequence[int] | None,
) -> None:
    """Add what calls are given and what they give. ``whole``: the buffers of the parameter's shape."""
    graph = cuts.graph
    given: dict[Given, Load | Kept] = {}
    done: set[int] = set()
    rounds: list[Round] = [([], [], []) for _ in cuts.stores]
    shapes: Shapes = {}
    values = list(graph.values)

    def leave(one: Given) -> None:
        name = f"{GIVEN}{len(shapes)}"
        given[one] = Load(name)
        cuts.stores[level(one.node)] = cuts.stores[level(one.node)] | {name: one.node}
        cuts.private[name] = Buffer(one.dtype, graph.values[one.node].kind)
        shapes[name] = one.dtype, tuple(calls.meta(one).shape)

    def need(result: Result, r: int) -> Round:
        for one in calls.given(result):
            if one not in given:
                if one.shape == shape and (kept := _held(calls, one, whole)) is not None:
                    given[one] = kept
                else:
                    leave(one)
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
    if rounds and not cuts.stores[0] and (held := [one for one, at in given.items() if type(at) is Kept]):
        leave(min(held, key=lambda one: one.shape.numel()))  # a round is a program
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


def _held(calls: Calls, one: Given, whole: Mapping[str, torch.dtype]) -> Kept | None:
    """The tensor that a program would copy for calls, if these can take it itself: those of large ones, on a CPU, are
    made for each parameter."""
    value = calls.graph.values[one.node]
    if value.op != "load" or not isinstance(value.attr, str):
        return None
    key = key_of(value.attr)
    ours = key != value.attr and whole.get(value.attr) == one.dtype
    return Kept(key) if ours and alone(calls.device, one.dtype, one.shape) else None


def key_of(buffer: str) -> str:
    """The key in ``Externs.kept`` of what a program's buffer is."""
    return {"param": PARAM, "grad": GRAD}.get(buffer, buffer.removeprefix("state."))


Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Round = tuple[list[int], list[tuple[str, int]], list[tuple[str, int]]]
"""Of a round: its calls, what buffers get of them, and what the state does."""


def _described(
    calls: Calls,
    rounds: list[Round],
    given: dict[Given, Load | Kept],
    shapes: Shapes,
) -> Externs:
    """The functions, with the last use of each result and of each given tensor."""
    rounds = [(sorted(steps), outputs, written) for steps, outputs, written in rounds]  # as they were made
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
        placed = _placed(calls, steps, outputs) if made else ()
        functions.append(Function(made, tuple(outputs), tuple(written), placed) if made else None)
    metas = {k: calls.meta(Result(k)) for k in order}
    ranks = {k: m.dim() if isinstance(m, torch.Tensor) else None for k, m in metas.items()}
    refs = {x for k in order for x in calls.calls[k].refs() if isinstance(x, Kept)}
    taken: dict[str, Any] = {ref.key: ref for ref in refs}
    taken = {key: Result(k) for _, _, written in rounds for key, k in written} | taken
    state = {key: (calls.meta(x).dtype, tuple(calls.meta(x).shape)) for key, x in taken.items()}
    state |= {at.key: (one.dtype, tuple(one.shape)) for one, at in given.items() if isinstance(at, Kept)}
    names = {calls.memory(calls.meta(one)): at.buffer for one, at in given.items() if isinstance(at, Load)}
    tensors = {k: m for k, m in metas.items() if isinstance(m, torch.Tensor)}
    views = {k: names[calls.memory(m)] for k, m in tensors.items() if calls.memory(m) in names}
    dtypes = frozenset(m.dtype for m in tensors.values())
    functions, reused = _reused(functions, shapes, views)
    return Externs(tuple(functions), shapes, ranks, reused, dict(sorted(state.items())), dtypes)


def _placed(calls: Calls, steps: list[int], outputs: list[tuple[str, int]]) -> tuple[Placed, ...]:
    """For each buffer the call that makes its contents: of one that only gives them another shape, the call before."""
    out: dict[int, Placed] = {}
    for name, k in outputs:
        while calls.calls[k].name in _SAME_CONTENTS:
            before = calls.calls[k].args[0]
            if not isinstance(before, Result) or not calls.meta(before).is_contiguous():
                break
            k = before.call
        if k in steps and isinstance(meta := calls.meta(Result(k)), torch.Tensor):
            out.setdefault(k, Placed(k, name, tuple(meta.shape)))
    return tuple(out.values())


_SAME_CONTENTS = frozenset(["view", "reshape", "flatten", "contiguous", "clone", "view_as", "reshape_as"])
"""Functions that give what they are given, which is contiguous, in another shape at most."""


def _with_names(call: Call, given: dict[Given, Load | Kept]) -> Call:
    def named(x: Any) -> Any:
        return given[x] if isinstance(x, Given) else x.value if isinstance(x, Constant) else x

    kwargs = tuple((k, mapped(v, named)) for k, v in call.kwargs)
    return call._replace(args=mapped(call.args, named), kwargs=kwargs)


def _reused(
    functions: list[Function | None], shapes: Shapes, views: Mapping[int, str]
) -> tuple[list[Function | None], dict[str, str]]:
    """For results the memory of a given tensor of their size that no later round needs, nor a view of it. And the
    functions, with those placed that leave no memory to be read after them.

    A placed result that later rounds need would be held beside its buffer: it has memory of its own.

    views: of calls that give one, the given tensor
    """
    loads = [_loaded(function, views) if function else {} for function in functions]
    out: dict[str, str] = {}
    found: list[Function | None] = []
    for r, function in enumerate(functions):
        if function is None:
            found.append(None)
            continue
        rest = functions[r + 1 :]
        later = {x.call for f in rest if f for s in f.steps for x in s.call.refs() if isinstance(x, Result)}
        free = loads[r].keys() - set().union(*loads[r + 1 :]) - set(out.values())
        numbers = {step.number: at for at, step in enumerate(function.steps)}
        made = {each.buffer: numbers[each.call] for each in function.placed}
        held = {each.buffer for each in function.placed if each.call in later}
        names = [name for name, _ in function.outputs if name not in held]
        unclear = set(names)
        for clear in (True, False):
            for name in [name for name in names if name not in out]:
                fitting = [
                    one
                    for one in sorted(free)
                    if shapes[one] == shapes[name] and (not clear or loads[r][one] < made.get(name, -1))
                ]
                if fitting:
                    out[name] = fitting[0]
                    free.remove(fitting[0])
                if clear and fitting:
                    unclear.remove(name)
        unclear &= out.keys()
        placed = tuple(each for each in function.placed if each.buffer not in unclear)
        found.append(replace(function, placed=placed))
    return found, out


def _loaded(function: Function, views: Mapping[int, str]) -> dict[str, int]:
    """The given tensors whose memory a round reads, and in which of its steps it does so for the last time."""
    out: dict[str, int] = {}
    reads: list[tuple[int, Any]] = [
        (at, x) for at, step in enumerate(function.steps) for x in step.call.refs()
    ]
    reads += [(len(function.steps), Result(call)) for _, call in (*function.outputs, *function.written)]
    for at, x in reads:
        if isinstance(x, Load):
            out[x.buffer] = at
        elif isinstance(x, Result) and x.call in views:
            out[views[x.call]] = at
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
        functions.append(replace(function, steps=tuple(steps)) if function else None)
    return replace(externs, functions=tuple(functions))
