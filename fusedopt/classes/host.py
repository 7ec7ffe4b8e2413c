"""The host's half of a class's step: the numbers it reads, the flags it relies on, and the numbers it leaves.

Made once for each trace, as one generated function: a step asks it whether all is as it was, at a few microseconds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..step.items import Item, own_attribute
from ..trace.number import Number, ScalarProgram
from ..trace.replay import Replay
from ..trace.signals import Untraceable
from ..trace.signature import OWN, PLAIN, Signature, structure_of
from ..trace.tracer import Trace
from .evaluation import Evaluation
from .looking import Looking, reader
from .shadow import ROW, Path, Shadow, Table, shown
from .sums import Sums
from .symbolic import Symbolic, TensorNumber

_NO_SIGNATURE = Signature(torch.device("cpu"), torch.float32, torch.float32)
FILL = object()
"""In place of a key: the tensor at the path itself gets the number."""


class There(NamedTuple):
    """A tensor of the optimizer, which is left somewhere else too."""

    path: Path


BucketKey = tuple[int, Any]
"""The group that parameters are of, and the structure of what a class sees of them."""


def bucket_key(items: Sequence[Item], signature: Signature) -> BucketKey:
    return items[0].where[0], structure_of(signature)


Totals = Callable[[int], float]
"""What a total came to in the step."""
Write = tuple[Callable[[Any], Any], Any, Any]


@dataclass
class Left:
    """What is left of one step: numbers by entry, values by node, new tensors by what stood for them."""

    root: dict[str, Any]
    numbers: dict[int, Any]
    values: dict[int, Any]
    tensors: dict[int, torch.Tensor] = field(default_factory=dict)


def numbers_of_host(capturable: bool) -> dict[str, Any]:
    """The group that the host's numbers are in; what it has besides says where kernels' scalars are."""
    return {"params": [], **({"capturable": True} if capturable else {})}


class Host:
    """What a trace took for granted on the host, and what its step writes there.

    ``numbers`` holds what `look` found, by name, as kernels' scalars are made of it. ``nodes`` are the values of the
    step that decide what is written, and that are written. ``closure``: whether it is given one. ``capturable``:
    kernels' scalars stay on the device.
    """

    def __init__(
        self,
        shadow: Shadow,
        names: dict[Path, str],
        tensors: list[list[Path]],
        around: Callable[[], str | None],
        sums: Sums,
        capturable: bool = False,
        reads: frozenset[str] = frozenset(),
        leaves: frozenset[str] = frozenset(),
    ) -> None:
        self.numbers = numbers_of_host(capturable)
        self.around, self.returns_loss, self.closure = around, False, False
        self.returned: Any = None
        self.nodes: list[int] = []
        self.left: list[str] = []
        """The places that it writes to, in words."""
        self.later: dict[BucketKey, dict[tuple[bool, ...], Replay]] = {}
        """By bucket, and by path through the step's own branches: numbers in the state that it decides about."""
        self.leaves_something = False
        self._sums = sums
        self._paths: dict[tuple[bool, ...], tuple[list[Write], list[int]]] = {}
        """What is written along each path through the step's own branches, and the conditions of these."""
        self.kind: type = object
        """The class whose step it is."""
        self.needs_all = False
        """Whether the step is another one where one of the parameters has no gradient."""
        self.sums = self._all = False
        """Whether the step sums over its parameters; whether some of each bucket have to have gradients."""
        self._function: Callable[..., Any] | None = None
        self._left: dict[Any, Any] = {}
        self._met: dict[Any, dict[int, torch.Tensor]] = {}
        """The parameters that were met, by their bucket: of each some have a gradient."""
        self._own: dict[Any, tuple[tuple[str, Any], ...]] = {}
        """The attributes that others gave them and the step asks for."""
        self._alone: Counter[BucketKey] = Counter()
        """Of how many parameters of a bucket gradients are known to be possible, where more would be another step. They
        were alone in their buckets, of which several have a key where numbers in the state differ."""
        self._kept: list[Any] = []
        self._common: dict[str, str] = {}
        """The numbers of the state that all parameters have in common, and what they are called here."""
        self._rows: dict[Path, _Row] = {}
        """Of the tables that are looked up, by their paths."""
        self._look = Looking(shadow, names, tensors, self.numbers, reads, leaves).made()

    def takes_for_one(self, common: dict[str, str]) -> None:
        """Numbers that all parameters have in common, by the key of the state, and what they are called here."""
        self._common = common

    def looks_up(self, table: Table, index: Number, names: dict[Path, str]) -> None:
        """A table of which the step looks up a row."""
        self._rows[table.path] = _Row(table, index, names)

    def writes(
        self,
        paths: dict[tuple[bool, ...], tuple[list[tuple[Path, Any, Any]], list[int]]],
        scalars: ScalarProgram,
        own: Callable[[int], int],
        ours: ScalarProgram,
    ) -> None:
        """Take over what the shadow left in containers: numbers, flags, tensors, and tuples and lists of such."""
        entries: dict[int, Number] = {}

        def entry(index: int) -> int:
            at = own(index)
            entries[at] = Number(ours, at, scalars.values[index])
            return at

        def template(value: Any, where: str) -> Any:
            if type(value) is Number and value.program is scalars:
                at = entry(value.index)
                return lambda left: left.numbers[at]
            if type(value) is There:
                read = reader(value.path)
                return lambda left: read(left.root)
            if type(value) is TensorNumber:
                self.nodes.append(node := value.sym.node)
                return lambda left: float(left.values[node])
            if type(value) is Symbolic and not value.why and value.parts is None:
                return tensor(value, where)
            if type(value) in PLAIN:
                return lambda left: value
            if type(value) in (tuple, list):
                parts = [template(v, where) for v in value]
                kind = type(value)
                return lambda left: kind(part(left) for part in parts)
            raise Untraceable(f"{where} gets a {type(value).__name__} that is no number or flag of the host")

        def tensor(value: Symbolic, where: str) -> Any:
            number = template(_number(value), where)
            shape, dtype, which = value.meta.shape, value.meta.dtype, id(value)
            self._kept.append(value)

            def made(left: Left) -> torch.Tensor:
                if which not in left.tensors:
                    left.tensors[which] = torch.full(shape, number(left), dtype=dtype)
                return left.tensors[which]

            return made

        def fill(value: Any, where: str) -> Any:
            return template(_number(value), where)

        for taken, (changes, conditions) in paths.items():
            writes: list[Write] = []
            for path, key, value in changes:
                where = shown(path if key is FILL else (*path, ("item", key))) if path else f"self.{key}"
                self.left += [where] if where not in self.left else []
                row = self._rows.get(path[:-1]) if path[-1:] == (ROW,) else None
                read = reader(path) if row is None else row.read
                writes.append((read, key, (fill if key is FILL else template)(value, where)))
            self._paths[taken] = writes, conditions
        self.leaves_something = bool(self.later) or any(writes for writes, _ in self._paths.values())
        self.left += sorted(
            {f"the state {k!r}" for each in self.later.values() for r in each.values() for k in r.number_keys}
        )
        if self.leaves_something:
            self.nodes += [node for _, conditions in self._paths.values() for node in conditions]
        else:
            self.nodes = []
        self.nodes = list(dict.fromkeys(self.nodes))
        if self.nodes:
            self._evaluation = Evaluation(self._sums.graph, self.nodes)
            self._slots = [entry(index) for index in self._evaluation.slots]
        self._numbers, self._scalars = entries, ours

    def finish(self) -> None:
        """Make what computes the numbers that are left; all guards are known now."""
        if self.leaves_something:
            numbers: dict[Any, Any] = dict(self._numbers)
            program = Trace(_NO_SIGNATURE, None, self._scalars, (), numbers, {}, {})  # type: ignore[arg-type]
            replay = Replay(program)
            self._inputs, self._keys = [name for _, name, *_ in replay.leaves], replay.number_keys
            self._function = replay.function

    def meets(self, buckets: Sequence[tuple[list[Item], Signature]]) -> None:
        """Note the parameters of a step that is of these buckets."""
        for items, signature in buckets:
            key = bucket_key(items, signature)
            self._met.setdefault(key, {}).update((id(item.owner), item.owner) for item in items)
            if own := tuple((k, v) for k, v in signature.attributes if k.startswith(OWN)):
                self._own[key] = own

    def traced(self, buckets: Sequence[tuple[list[Item], Signature]]) -> None:
        """Note the parameters of the step that was traced."""
        self.meets(buckets)
        self._alone = Counter(bucket_key(*buckets[b]) for b in self._sums.lonely)
        self.sums = bool(self._sums.shares)
        self._all = self.sums or self.leaves_something

    def _after(self, root: dict[str, Any], totals: Totals) -> tuple[Left, tuple[bool, ...]]:
        """What is left, and the path through the step's own branches."""
        if not self.nodes:
            return Left(root, self._left, {}), next(iter(self._paths))
        found = self._evaluation(
            [self._left[k] for k in self._slots], [totals(k) for k in self._evaluation.totals]
        )
        values = dict(zip(self.nodes, found, strict=True))
        path = next(
            taken
            for taken, (_, conditions) in self._paths.items()
            if all(bool(values[c]) == t for c, t in zip(conditions, taken, strict=True))
        )
        return Left(root, self._left, values), path

    def _counted(self, bucket: BucketKey, path: tuple[bool, ...], state: dict[Any, Any]) -> dict[str, Any]:
        """The numbers of a parameter's state that follow from the step's path, after it."""
        replay = self.later[bucket][path]
        return dict(
            zip(replay.number_keys, replay.function(*replay.inputs(self.numbers, state))[1], strict=True)
        )

    def counted(self, totals: Totals) -> Callable[[BucketKey, dict[Any, Any]], dict[str, Any]]:
        """What gives them, by the parameter's bucket and its state before the step, after `look`."""
        _, path = self._after({}, totals)
        return lambda bucket, state: self._counted(bucket, path, state) if bucket in self.later else {}

    def as_it_was(self, root: dict[str, Any]) -> str | None:
        """Read the numbers; or why they, or what is around them, are those of another step than was traced."""
        why = self._look(root) or self.around() or self._looked_up(root)
        if why is None and self._function is not None:
            try:
                _, left, guards = self._function(*[self.numbers[name] for name in self._inputs])
            except (ArithmeticError, ValueError) as error:
                return f"what the step computes on the host has no result: {error}"
            if not all(guards):
                return "a branch that numbers decide goes another way now"
            self._left = dict(zip(self._keys, left, strict=True))
        return why

    def look(self, root: dict[str, Any]) -> str | None:
        """The same, and which gradients there are."""
        why = self.as_it_was(root)
        if why is None and (self._all or self._alone) and not self._all_step():
            return "other parameters have gradients"
        if why is None and self.needs_all and self._some_rest():
            return "a parameter has no gradient, which the step does something about"
        if why is None and self._own and not self._own_as_they_were():
            return "an attribute of a parameter is another one now"
        return why

    def _looked_up(self, root: dict[str, Any]) -> str | None:
        """Read numbers that all parameters have in common, and rows; or why that cannot be."""
        if not (self._common or self._rows):
            return None
        stepped = [p for params in self._met.values() for p in params.values() if p.grad is not None]
        for key, name in self._common.items():
            states = map(root["state"].get, stepped)
            numbers = {(type(n), n) for n in (None if state is None else state.get(key) for state in states)}
            if len(numbers) != 1 or (found := numbers.pop())[0] not in (int, float):
                return f"the state {key!r} is no longer one number for all parameters"
            self.numbers[name] = found[1]
        for row in self._rows.values():
            if why := row.look(root, self.numbers):
                return why
        return None

    def _own_as_they_were(self) -> bool:
        return all(
            own_attribute(p, name) == value
            for key, attributes in self._own.items()
            for name, value in attributes
            for p in self._met[key].values()
        )

    def _some_rest(self) -> bool:
        return any(p.grad is None for params in self._met.values() for p in params.values())

    def _all_step(self) -> bool:
        """Whether some parameters of each bucket have gradients; and no more than were met where that matters."""
        for key, params in self._met.items():
            if key in self._alone and sum(p.grad is not None for p in params.values()) > self._alone[key]:
                return False
            if self._all:
                for p in params.values():
                    if p.grad is not None:
                        break
                else:
                    return False
        return True

    def differs(self, root: dict[str, Any], other: dict[str, Any], totals: Totals) -> str | None:
        """What the step would leave here otherwise than another has been left."""
        if why := self.look(root):
            return why
        left, path = self._after(root, totals)
        close = _CLOSE if self.nodes else 1e-9
        for read, key, made in self._paths[path][0]:
            ours, theirs = made(left), read(other) if key is FILL else read(other)[key]
            if not _alike(ours, theirs, close):
                return f"{'a tensor' if key is FILL else key} becomes {ours!r}, not {theirs!r}"
        return None

    def write(self, root: dict[str, Any], totals: Totals) -> None:
        """Leave what the step leaves."""
        if not self.leaves_something:
            return
        left, path = self._after(root, totals)
        found = [(read(root), key, made(left)) for read, key, made in self._paths[path][0]]
        for bucket in self.later:
            states = [root["state"][p] for p in self._met[bucket].values() if p.grad is not None]
            numbers = [self._counted(bucket, path, state) for state in states]
            found += [
                (state, k, v) for state, new in zip(states, numbers, strict=True) for k, v in new.items()
            ]
        for where, key, value in found:
            if key is FILL:
                where.fill_(value)
            else:
                where[key] = value


class _Row:
    """Of a table: the row that a step looks up."""

    def __init__(self, table: Table, index: Number, names: dict[Path, str]) -> None:
        self._what, self._table, self._count = shown(table.path), reader(table.path), len(table.real)
        self._kinds = [type(v) if v is None else type(v.value) for v in table.put]
        self._names = [names.get((*table.path, ROW, ("item", j)), "") for j in range(len(table.put))]
        self._index = Replay(Trace(_NO_SIGNATURE, None, index.program, (), {0: index}, {}, {}))  # type: ignore[arg-type, dict-item]
        self._which = 0

    def read(self, root: Any) -> Any:
        """The row that was looked up last."""
        return self._table(root)[self._which]

    def look(self, root: Any, numbers: dict[str, Any]) -> str | None:
        """Look the row up, and read its numbers; or why that is none that was traced."""
        try:
            _, (self._which,), _ = self._index.function(*self._index.inputs(numbers, {}))
            rows, row = self._table(root), self.read(root)
        except (ArithmeticError, KeyError, IndexError, AttributeError, TypeError) as error:
            return f"no row of {self._what} can be looked up: {error}"
        if type(rows) is not list or len(rows) != self._count or type(row) is not list:
            return f"{self._what} is another container, or of another length"
        if [*map(type, row)] != self._kinds:
            return f"numbers in {self._what} are of other types now"
        numbers.update((name, number) for name, number in zip(self._names, row, strict=True) if name)
        return None


def _number(x: Any) -> Any:
    """What a tensor of the shadow has in it."""
    if type(x) is not Symbolic:
        return x
    return x.number if x.sym is None else TensorNumber(x.sym)


_CLOSE = 1e-4
"""How far numbers that follow from sums may be apart, relatively: a class rounds after every operation."""


def _alike(ours: Any, theirs: Any, close: float) -> bool:
    if isinstance(theirs, torch.Tensor):
        if isinstance(ours, torch.Tensor) and (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            return False
        ours, theirs = float(ours), float(theirs) if theirs.numel() == 1 else math.nan
    if isinstance(ours, float) and isinstance(theirs, float):
        return repr(ours) == repr(theirs) or abs(ours - theirs) <= close * abs(theirs)
    if type(ours) is type(theirs) and isinstance(ours, (tuple, list)):
        return len(ours) == len(theirs) and all(map(_alike, ours, theirs, [close] * len(ours)))
    return repr(ours) == repr(theirs)
