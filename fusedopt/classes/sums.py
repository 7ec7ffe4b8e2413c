"""Sums over parameters in a class's step, and what follows from them: values of the step, the same for all parameters.

Values of the step have a graph of their own, beside those of the parameters that stand for all. A sum is open while it
grows: what each parameter adds to it is a value of that parameter's graph. Whoever takes it otherwise than to add to it
closes it. Then it is a total (see ``trace.totals``), if all parameters of a kind have added the same to it; or a number
of the one that has. Where a value of the step meets a parameter's, it is made again in that parameter's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..ir.ops import TENSOR
from ..ir.program import Graph, Value, depth_first, reachable
from ..trace.methods import STRUCTURAL_POWERS  # noqa: F401  (fills the table of tensor methods)
from ..trace.number import Number, ScalarProgram
from ..trace.run import Run
from ..trace.signals import Untraceable, line_now
from ..trace.tensor import METHODS, Place, SymTensor, alias, called
from ..trace.totals import TOTAL, Total

FEW_GROUPS = 4
STEP = -1
"""In place of a parameter's number: the step itself."""


@dataclass
class Elements(Run):
    """A run whose parameter has this shape. ``step`` is that of the values of the step."""

    shape: torch.Size = field(default_factory=lambda: torch.Size(()))
    step: StepRun | None = None

    where = staticmethod(line_now)

    def slot(self, x: Any) -> int:
        """As of a callback; but the same place has to give the same number in every run of the shadow."""
        if type(x) is Number and x.program is self.scalars:
            return self.graph.leaf("slot", x.index)
        x = x.value if type(x) is Number else x
        self.raw += 1
        key = "raw", self.callback, self.path, self.raw
        node = self.graph.leaf("slot", self.scalars.entry(key, x))
        if repr(self.scalars.values[self.graph.values[node].attr]) != repr(x):
            raise Untraceable("a number depends on how many parameters there are, or on their order")
        return node

    @property
    def path(self) -> tuple[Any, ...]:
        """The branches that were taken up to here, the step's and its own."""
        return () if self.step is None else tuple(self.step.taken), tuple(self.taken)


@dataclass
class StepRun(Elements):
    """A run of what belongs to no parameter."""

    sums: Sums = field(default_factory=lambda: Sums())

    def new_place(self, node: int, asked: torch.dtype | None) -> Place:
        return SumPlace(self, node, asked)

    def slot(self, x: Any) -> int:
        """Plain numbers are told by what they are: how many it comes to depends on how many parameters there are."""
        if type(x) is Number and x.program is self.scalars:
            return self.graph.leaf("slot", x.index)
        return self.graph.leaf("slot", self.scalars.constant(x.value if type(x) is Number else x))


class Share(NamedTuple):
    """What a parameter adds to a sum. ``decided``: after a branch on numbers of its own."""

    run: Elements
    node: int
    decided: bool


class SumPlace(Place):
    """Where a value of the step is: ``base``, a node of its graph, to which parameters add their ``shares``."""

    __slots__ = ("base", "run", "shares")

    def __init__(self, run: StepRun, node: int, asked: torch.dtype | None) -> None:
        self.run, self.base, self.asked = run, node, asked
        self.shares: dict[int, Share] = {}

    @property
    def node(self) -> int:
        if self.shares:
            self.close()
        return self.base

    @node.setter
    def node(self, node: int) -> None:
        self.base, self.shares = node, {}

    def grow(self, other: SumPlace) -> None:
        """Take over a sum that was made of this one."""
        self.base, self.shares = other.base, other.shares

    def close(self) -> None:
        graph, sums = self.run.graph, self.run.sums
        which = sums.total(self.base, self.shares)
        load = graph.leaf("load", str(Total(0, which)), type="d")
        zero = graph.values[self.base].op == "const" and not graph.values[self.base].attr
        self.node = load if zero else graph.op("add", self.base, load, where=self.run.where)


class Sums:
    """The sums of a step, for all of its runs.

    ``bucket_of``: which bucket each representative is of, ``group_of``: which group each bucket; ``last``: the last
    representative of each bucket; ``fewer``: only these are stepped now; ``lonely``: the buckets of which nothing tells
    whether what they add is over all of their parameters, as there is one.
    """

    def __init__(self, bucket_of: Sequence[int] = (), group_of: Sequence[int] = ()) -> None:
        self.graph = Graph()
        self.bucket_of, self.group_of = list(bucket_of), list(group_of)
        self.last = {b: r for r, b in enumerate(self.bucket_of)}
        self.fewer = False
        self.shares: list[dict[int, int]] = []
        """What each representative adds to each total."""
        self.lonely: set[int] = set()
        self._keys: dict[tuple[Any, ...], int] = {}
        self._closed: set[tuple[Any, ...]] = set()
        self._lowered: dict[int, dict[int, int]] = {}
        self._raised: dict[int, dict[int, int]] = {}

    def _key(self, shares: dict[int, Share]) -> tuple[Any, ...]:
        """What tells a total, also where each bucket has one representative less."""
        return tuple(sorted((r, s.node) for r, s in shares.items() if self.last[self.bucket_of[r]] == r))

    def owner(self, base: int, shares: dict[int, Share]) -> Elements | None:
        """The run of the parameter whose number this is, as it alone has added to it; None if it is a total."""
        if len(shares) > 1:
            return None
        ((r, share),) = shares.items()
        bucket = self.bucket_of[r]
        if self.fewer and bucket not in self.lonely:
            return None if (base, self._key(shares)) in self._closed else share.run
        if self.bucket_of.count(bucket) > 1:
            return share.run
        self.lonely.add(bucket)
        return share.run if share.decided or not self._may_be_all(bucket) else None

    def _may_be_all(self, bucket: int) -> bool:
        """Whether a bucket of one parameter is all that there is, or all of a group. Of many groups each sum of one
        would be another total, and have kernels of its own."""
        groups = self.group_of
        return len(self.last) == 1 or (groups.count(groups[bucket]) == 1 and len(set(groups)) <= FEW_GROUPS)

    def total(self, base: int, shares: dict[int, Share]) -> int:
        """The number of the total of these shares."""
        if any(share.decided for share in shares.values()):
            raise Untraceable("what a branch on a parameter's number decides is summed over parameters")
        buckets = {self.bucket_of[r] for r in shares}
        if not self.complete(shares):
            raise Untraceable("a sum over some of the parameters of a kind, and not over others")
        self.lonely |= {b for b in buckets if self.bucket_of.count(b) == 1}
        key = self._key(shares)
        if key not in self._keys:
            if self.fewer:
                raise Untraceable("what the step sums depends on how many parameters there are")
            self._keys[key] = len(self.shares)
            self.shares.append({r: share.node for r, share in shares.items()})
        elif not self.fewer and self.shares[self._keys[key]] != {r: s.node for r, s in shares.items()}:
            raise Untraceable("what parameters add to a sum depends on their order")
        self._closed.add((base, key))
        return self._keys[key]

    def _steps(self, r: int) -> bool:
        return not self.fewer or self.last[self.bucket_of[r]] == r

    def is_closed(self, base: int, shares: dict[int, Share]) -> bool:
        return (base, self._key(shares)) in self._closed

    def lowered(self, node: int, graph: Graph, compute: torch.dtype) -> int:
        """A value of the step in a parameter's graph."""
        known, back = self._lowered.setdefault(id(graph), {}), self._raised.setdefault(id(graph), {})
        for i in depth_first(self.graph.values, [node]):
            if i in known:
                continue
            v = self.graph.values[i]
            if v.args:
                known[i] = graph.op(v.op, *(known[a] for a in v.args), where=_place_of(v), to=v.attr)
            else:
                wide = v.type == "d" and compute != torch.float64
                known[i] = graph.leaf(v.op, v.attr, type="d" if wide else "f")
            back[known[i]] = i
        return known[node]

    def raised(self, node: int, graph: Graph) -> int | None:
        """The value of the step that a value in a parameter's graph is, if it is one."""
        v = graph.values[node]
        if v.op in ("slot", "const"):
            return self.graph.leaf(v.op, v.attr)
        return self._raised.get(id(graph), {}).get(node)

    def complete(self, shares: dict[int, Share]) -> bool:
        """Whether all parameters of the kinds of some have added to it."""
        buckets = {self.bucket_of[r] for r in shares}
        return {r for r, b in enumerate(self.bucket_of) if b in buckets and self._steps(r)} == shares.keys()

    def depths(self, graphs: Sequence[Graph]) -> list[int]:
        """How many totals each is made of, one of another."""
        out: list[int] = []
        for shares in self.shares:
            needed = {k for r, node in shares.items() for k in totals_in(graphs[r], [node])}
            out.append(max((out[k] + 1 for k in needed), default=0))
        return out

    def used(self, roots: Iterable[int], graphs: Sequence[Graph]) -> set[int]:
        """These totals, and those they are made of."""
        found: set[int] = set()
        todo = list(roots)
        while todo:
            k = todo.pop()
            if k not in found:
                found.add(k)
                for r, node in self.shares[k].items():
                    todo += totals_in(graphs[r], [node])
        return found


def _place_of(v: Value) -> Callable[[], str]:
    return lambda: v.where


def totals_in(graph: Graph, nodes: Iterable[int]) -> list[int]:
    """The totals that these values are made of."""
    attrs = (graph.values[i].attr for i in reachable(graph.values, nodes) if graph.values[i].op == "load")
    return [int(attr.rpartition(".")[2]) for attr in attrs if attr.startswith(TOTAL)]


# ---- what grows ----------------------------------------------------------------------------------------------------


def is_open(x: Any) -> bool:
    return isinstance(x, SymTensor) and isinstance(x.place, SumPlace) and bool(x.place.shares)


def of_step(x: Any) -> bool:
    return isinstance(x, SymTensor) and type(x.run) is StepRun


def snapshot(x: SymTensor) -> SymTensor:
    """The same value somewhere else, an open sum as it is now."""
    if not is_open(x):
        return SymTensor(x.run, x.node, x.asked, x.shown)
    place: Any = x.place
    out = SymTensor(x.run, place.base, x.asked)
    out.place.shares = dict(place.shares)  # type: ignore[attr-defined]
    return out


def view_of(x: SymTensor) -> SymTensor:
    """Another view of the same place, where an open sum may go on growing."""
    if not is_open(x):
        return alias(x)
    place: Any = x.place
    out = SymTensor(x.run, place.base, x.asked)
    out.__dict__["place"] = place
    return out


def opened(x: SymTensor) -> SymTensor:
    """A number of a parameter as a sum that others may add to."""
    run: Any = x.run
    if of_step(x) or run.step is None:
        return x
    out = SymTensor(run.step, run.step.graph.leaf("const", 0.0), x.asked)
    out.place.shares = {run.callback: _share(run, x.node)}  # type: ignore[attr-defined]
    return out


def _share(run: Elements, node: int) -> Share:
    return Share(run, node, bool(run.taken))


def added(
    a: Any, b: Any, alpha: Any = 1, sign: int = 1, in_place: bool = False, again: bool = False
) -> SymTensor | None:
    """``a + sign * alpha * b`` as a sum that grows; None if it is none.

    ``in_place``: it is written to a, which then is that of all parameters if it is none's; ``again``: also where all
    have added to it and this one does so again, which else is taken for a use of the sum.
    """
    values = [x for x in (a, b) if isinstance(x, SymTensor)]
    own = {x.run.callback for x in values if not of_step(x)}
    if isinstance(alpha, SymTensor) and not of_step(alpha):
        return None
    if not _grows(a, b, own, in_place, again):
        return None
    if any(x.kind != TENSOR or x.is_bool for x in values if not of_step(x)):
        return None
    step = next(x.run if of_step(x) else x.run.step for x in values)
    if step is None:
        return None
    base, shares = _parts(step, a, b)
    more, theirs = _parts(step, b, a)
    node = _plus(step, base, more, alpha, sign)
    out = SymTensor(step, step.graph.leaf("const", 0.0) if node is None else node, None)
    place: Any = out.place
    place.shares = dict(shares)
    for r, share in theirs.items():
        before = shares[r].node if r in shares else None
        total = _plus(share.run, before, share.node, alpha, sign)
        assert total is not None
        place.shares[r] = Share(share.run, total, share.decided or (r in shares and shares[r].decided))
    return out


def _grows(a: Any, b: Any, own: set[int], in_place: bool, again: bool) -> bool:
    """Whether to add these makes a sum grow. ``own``: the parameters whose numbers are among them."""
    opens = [x.place.shares for x in (a, b) if is_open(x)]
    if in_place:
        return bool(opens or len(own) > 1 or (own and (not isinstance(a, SymTensor) or of_step(a))))
    begins = any(type(x) in (int, float) and x == 0 for x in (a, b))
    if len(own) > 1 or begins:
        return bool(own or opens)
    if own:
        return bool(opens) and (again or not _covers(a if is_open(a) else b, own))
    return len(opens) == 2 and (again or not (_covers(a, opens[1]) or _covers(b, opens[0])))


def _covers(x: Any, which: Iterable[int]) -> bool:
    """Whether all parameters have added to a sum, and with them these."""
    return set(which) <= x.place.shares.keys() and x.run.sums.complete(x.place.shares)


def _plus(run: Run, a: int | None, b: int | None, alpha: Any, sign: int) -> int | None:
    if b is None:
        return a
    x = SymTensor(run, b, None)
    if type(alpha) is not int or alpha != 1:
        x = called("mul", METHODS["mul"], x, lowered_to(run, alpha))
    if sign < 0:
        x = called("neg", METHODS["neg"], x)
    return x.node if a is None else called("add", METHODS["add"], SymTensor(run, a, None), x).node


def _parts(step: StepRun, x: Any, other: Any) -> tuple[int | None, dict[int, Share]]:
    """What of a summand belongs to the step, and what to parameters."""
    if not isinstance(x, SymTensor):
        if type(x) in (int, float) and x == 0:
            return None, {}
        return step.slot(x), {}
    if of_step(x):
        place: Any = x.place
        zero = place.shares and step.graph.values[place.base] == step.graph.values[_zero(step)]
        return None if zero else place.base, dict(place.shares)
    run: Any = x.run
    found = _split(run, x.node)
    if found is None or (
        isinstance(other, SymTensor) and not of_step(other) and _split(other.run, other.node)
    ):
        return None, {run.callback: _share(run, x.node)}
    base, rest = found
    return base, {run.callback: _share(run, rest)}


def _zero(step: StepRun) -> int:
    return step.graph.leaf("const", 0.0)


def _split(run: Run, node: int) -> tuple[int, int] | None:
    """A value of the step, and a parameter's that was added to it: where a sum began."""
    v, step = run.graph.values[node], getattr(run, "step", None)
    if v.op != "add" or step is None:
        return None
    for first, rest in (v.args, v.args[::-1]):
        one = run.graph.values[first]
        plain = one.op == "slot" and run.scalars.entries[one.attr][0] == "raw"
        base = None if plain else step.sums.raised(first, run.graph)
        if base is not None:
            return base, rest
    return None


# ---- what is done with it ------------------------------------------------------------------------------------------


def settled(x: Any) -> Any:
    """x, closed if it is an open sum: as a value of the step, or of the only parameter that has added to it."""
    if not isinstance(x, SymTensor):
        return x
    if not of_step(x):
        return _known(x)
    if is_open(x):
        place: Any = x.place
        owner = place.run.sums.owner(place.base, place.shares)
        if owner is not None:
            ((_, share),) = place.shares.items()
            base = place.run.graph.values[place.base]
            if base.op == "const" and base.attr == 0:
                return SymTensor(owner, share.node, x.asked)
            lower = place.run.sums.lowered(place.base, owner.graph, owner.compute)
            return SymTensor(owner, owner.graph.op("add", lower, share.node, where=owner.where), x.asked)
        place.close()
    return x


def _known(x: SymTensor) -> SymTensor:
    """A parameter's number that is a total where there are more of them."""
    run: Any = x.run
    step = getattr(run, "step", None)
    if step is None or not step.sums.fewer or x.kind != TENSOR:
        return x
    found = _split(run, x.node)
    if found is None:
        return x
    base, shares = _parts(step, x, None)
    if base is None or not step.sums.is_closed(base, shares):
        return x
    out = SymTensor(step, base, x.asked)
    out.place.shares = shares  # type: ignore[attr-defined]
    out.place.close()  # type: ignore[attr-defined]
    return out


def lowered_to(run: Run, x: Any) -> Any:
    """x for a value of this run."""
    if not of_step(x) or x.run is run:
        return x
    step: Any = x.run
    return SymTensor(run, step.sums.lowered(x.node, run.graph, run.compute), x.asked)


def run_of(values: Iterable[SymTensor]) -> Run | None:
    """The run that these are of: that of one parameter, or, without any, of the step."""
    runs = {id(x.run): x.run for x in values}
    own = [run for run in runs.values() if type(run) is not StepRun]
    if len(own) > 1:
        raise Untraceable("the step mixes parameters, and a kernel sees one at a time")
    return own[0] if own else next(iter(runs.values()), None)


def new_step(scalars: ScalarProgram, sums: Sums, decisions: tuple[bool, ...], signature: Any) -> StepRun:
    run = StepRun(sums.graph, scalars, signature, STEP, decisions)
    run.sums = sums
    return run
