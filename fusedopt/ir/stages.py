"""The split of a program into stages: launches over elements, and what is done once per tensor between them.

A reduction ends a stage: chunks leave part results, and a later stage needs the whole. Stages keep nothing else: a
later one computes again what it needs from the buffers, and only the last one stores. One number per tensor is stored
by a launch of its own after it, over tensors: chunks of the last stage would read what one of them has overwritten.
Where only earlier stages read it (NovoGrad's second moment is in the sum that makes the new one), the last stage stores
it on its way.

Of a program with several axes a *line* is what lies along the last one. A sum along lines needs no launch of its own: a
stage goes over each line twice, while it is in cache. Where one cannot (columns, sums of sums), part results are joined
*between* stages, once per tensor: there too what has fewer numbers than elements is computed, where the next stage
would compute it once per element.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from .ops import ELEMENT, TENSOR, is_partial, is_reduction
from .program import Program


@dataclass(frozen=True)
class Stage:
    """One launch: the values it computes, in order, the reductions it takes part results of, and what it stores.

    Only the last stage stores; earlier ones reduce. ``lines`` are the sums along lines that it takes on its way: those
    that need none of the others first. ``numbers`` is what it stores once per tensor, on the side: by whoever has the
    tensor's first elements, as nobody reads there meanwhile.
    """

    values: tuple[int, ...]
    reductions: tuple[int, ...] = ()
    stores: tuple[tuple[str, int], ...] = ()
    lines: tuple[tuple[int, ...], ...] = ()
    numbers: tuple[tuple[str, int], ...] = ()

    def loads(self, program: Program) -> list[str]:
        """The element buffers it reads."""
        leaves = (program.values[i] for i in self.values)
        return [v.attr for v in leaves if v.op == "load" and v.kind == ELEMENT]

    def bytes_per_element(self, program: Program) -> int:
        size = {n: b.dtype.itemsize for n, b in program.buffers if b.kind == ELEMENT}
        return sum(size.get(n, 0) for n in [*self.loads(program), *(n for n, _ in self.stores)])


@dataclass
class Nest:
    """A loop over the places of a kind, done once per tensor.

    It computes ``values``, keeps some of them for later stages, reduces, and stores.
    """

    kind: str
    values: tuple[int, ...] = ()
    kept: list[int] = field(default_factory=list)
    reductions: list[int] = field(default_factory=list)
    stores: list[tuple[str, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Between:
    """What is done once per tensor before a stage, or after the last one: part results along axes that are joined, and
    loops."""

    joined: tuple[int, ...] = ()
    nests: tuple[Nest, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.joined or self.nests)


@dataclass(frozen=True)
class Schedule:
    """Stages, and what comes before each and after the last. ``results`` are the values kept between them that are more
    than one number per tensor, or made of such."""

    stages: tuple[Stage, ...]
    between: tuple[Between, ...]
    results: tuple[int, ...]


def stages(program: Program) -> tuple[Stage, ...]:
    """The launches over elements.

    What is stored once per tensor needs no stage: see ``scalar_stores``.
    """
    return schedule(program).stages


def scalar_stores(program: Program) -> Stage:
    """What is stored once per tensor, after the last stage."""
    split = Split.of(program)
    return split.storing([s for s in split.numbers if s not in split.beside])


def wholes(program: Program) -> list[int]:
    """The reductions of elements to one number per tensor, of which every chunk leaves a part."""
    return [i for stage in stages(program) for i in stage.reductions if program.values[i].kind == TENSOR]


def regions(program: Program, stage: Stage | None = None) -> list[int]:
    """The reductions of elements along some axes, of which every chunk leaves parts: all, or those of a stage."""
    found = [stage] if stage is not None else stages(program)
    return [i for each in found for i in each.reductions if is_partial(program.values[i].kind)]


@functools.lru_cache(maxsize=512)
def schedule(program: Program) -> Schedule:
    """How a program is run."""
    return Split.of(program).schedule()


def by_places(program: Program, k: int) -> bool:
    """Whether what is done once per tensor before stage k, or after all of them, is done for each place along the first
    axis by itself."""
    nests, values = schedule(program).between[k].nests, program.values
    made = [i for nest in nests for i in (*nest.values, *nest.reductions)]
    kinds = [nest.kind for nest in nests] + [values[i].kind for nest in nests for i in nest.reductions]
    return bool(kinds) and all(
        kind.startswith(program.all_axes[0])
        for kind in [*kinds, *(values[i].kind for i in made if values[i].kind != TENSOR)]
    )


def _along_lines(program: Program) -> frozenset[int]:
    """The sums along lines that only elements and stores of one number per line need."""
    if program.axes == 1:
        return frozenset()
    values, lines = program.values, program.all_axes[:-1]
    depends: list[set[int]] = []
    found: set[int] = set()
    bad: set[int] = set()
    for i, v in enumerate(values):
        mine = set().union(*(depends[a] for a in v.args))
        if is_reduction(v.op):
            bad |= mine
            mine = {i} if values[v.args[0]].kind == ELEMENT and v.kind == lines else set()
            found |= mine
        depends.append(mine if is_partial(v.kind) else set())
    return frozenset(found - bad)


class Split:
    """A program with the sums that stages take on their way: ``inline``."""

    @staticmethod
    @functools.lru_cache(maxsize=512)
    def of(program: Program) -> Split:
        split = Split(program, _along_lines(program))
        return Split(program, ()) if split.hurts() else split

    def __init__(self, program: Program, inline: Iterable[int]) -> None:
        self.program, self.values = program, program.values
        self.inline = frozenset(inline)
        self.level: list[int] = []
        for i, v in enumerate(self.values):
            above = max((self.level[a] for a in v.args), default=0)
            self.level.append(above + self.ends_stage(i))

    def ends_stage(self, i: int) -> bool:
        """Whether it is a reduction over elements, whose part results have to be joined."""
        v = self.values[i]
        return is_reduction(v.op) and not is_partial(self.values[v.args[0]].kind) and i not in self.inline

    # -- stages --
    def schedule(self) -> Schedule:
        ending = list(filter(self.ends_stage, range(len(self.values))))
        depth = max((self.level[i] for i in ending), default=0)
        out = []
        for level in range(1, depth + 1):
            found = [i for i in ending if self.level[i] == level]
            out.append(self._stage([self.values[i].args[0] for i in found], found, []))
        kinds = {n: b.kind for n, b in self.program.buffers}
        here = [(n, i) for n, i in self.program.stores if kinds[n] == ELEMENT or self._on_the_way(i)]
        if here or not out:
            out.append(self.storing(here, self.beside))
        if self.program.axes == 1:
            return Schedule(tuple(out), (Between(),) * (len(out) + 1), ())
        between = [self._between(k, k == len(out)) for k in range(len(out) + 1)]
        nests = [nest for b in between for nest in b.nests]
        results = [i for b in between for i in b.joined]
        results += [i for nest in nests for i in (*nest.reductions, *nest.kept)]
        return Schedule(tuple(out), tuple(between), tuple(results))

    @functools.cached_property
    def numbers(self) -> list[tuple[str, int]]:
        """The stores of one number per tensor."""
        return [s for s in self.program.stores if self.program.buffer[s[0]].kind == TENSOR]

    @functools.cached_property
    def beside(self) -> list[tuple[str, int]]:
        """Those of them that the last stage stores on its way: all, if earlier stages have read what was there, and the
        last one does not. Its other parts may still read when one of them has stored. What no stage reads is for others
        to look at, and has a launch of its own."""
        elements = [s for s in self.program.stores if self.program.buffer[s[0]].kind == ELEMENT]
        if self.program.axes > 1 or not elements or not any(map(self.ends_stage, range(len(self.values)))):
            return []
        names = {n for n, _ in self.numbers}
        last = self.storing(elements, self.numbers).values
        loads = {v.attr: i in last for i, v in enumerate(self.values) if v.op == "load" and v.attr in names}
        return self.numbers if loads.keys() == names and not any(loads.values()) else []

    def storing(self, stores: Sequence[tuple[str, int]], numbers: Sequence[tuple[str, int]] = ()) -> Stage:
        """The stage of these stores; whether they are to be skipped is for it to find out."""
        roots = [i for _, i in (*stores, *numbers)]
        skip = self.program.skip
        stage = self._stage(roots + ([skip] if stores and skip is not None else []), [], stores)
        return replace(stage, numbers=tuple(numbers))

    def _stage(
        self, roots: Sequence[int], reductions: Sequence[int], stores: Sequence[tuple[str, int]]
    ) -> Stage:
        values = self.needed(roots)
        deep: dict[int, int] = {}
        for i in values:
            v = self.values[i]
            deep[i] = 0 if self.given(i) else max((deep[a] for a in v.args), default=0) + (i in self.inline)
        lines = [
            tuple(i for i in values if i in self.inline and deep[i] == d)
            for d in range(1, max(deep.values(), default=0) + 1)
        ]
        return Stage(values, tuple(reductions), tuple(stores), tuple(lines))

    def needed(self, roots: Iterable[int]) -> tuple[int, ...]:
        """The values the roots need, taking what was computed before as given."""
        needed: set[int] = set()
        todo = list(roots)
        while todo:
            i = todo.pop()
            if i not in needed:
                needed.add(i)
                if not self.given(i):
                    todo.extend(self.values[i].args)
        return tuple(sorted(needed))

    def given(self, i: int) -> bool:
        """Whether stages and loops find it computed: reductions, and what is kept."""
        return (is_reduction(self.values[i].op) and i not in self.inline) or i in self.kept

    @functools.cached_property
    def kept(self) -> frozenset[int]:
        """What would be computed for each element, and is one number for many of them: computed before the stage."""
        if self.program.axes == 1:
            return frozenset()
        last = self.program.all_axes[-1]
        out = set()
        for i, v in enumerate(self.values):
            users = v.args if v.kind == ELEMENT or self.ends_stage(i) or i in self.inline else ()
            for a in users:
                x = self.values[a]
                if (
                    x.args
                    and is_partial(x.kind)
                    and last in x.kind
                    and not is_reduction(x.op)
                    and self.level[a]
                ):
                    out.add(a)
        return frozenset(out)

    # -- between stages --
    def _on_the_way(self, i: int) -> bool:
        """Whether a stage has it only while it is at a line."""
        return any(j in self.inline for j in self.needed([i]))

    def hurts(self) -> bool:
        """Whether what a stage stores for each line is needed as it was once the stages are over."""
        kinds = {n: b.kind for n, b in self.program.buffers}
        partial = [(n, i) for n, i in self.program.stores if kinds[n] != ELEMENT]
        stored = {n for n, i in partial if self._on_the_way(i)}
        later = self.needed(i for n, i in partial if n not in stored)
        return any(self.values[i].op == "load" and self.values[i].attr in stored for i in later)

    def _between(self, k: int, last: bool) -> Between:
        """What is done before stage k; after all of them what is left is stored."""
        joined = [
            i
            for i in range(len(self.values))
            if self.ends_stage(i) and self.level[i] == k and is_partial(self.values[i].kind)
        ]
        nests: list[Nest] = []
        for i, v in enumerate(self.values):
            if self.level[i] != k or self.ends_stage(i):
                continue
            reduces = is_reduction(v.op) and i not in self.inline
            if not reduces and i not in self.kept:
                continue
            kind = self.values[v.args[0]].kind if reduces else v.kind
            needs = set(self.needed(v.args))
            if not nests or nests[-1].kind != kind or needs & set(nests[-1].reductions):
                nests.append(Nest(kind))
            (nests[-1].reductions if reduces else nests[-1].kept).append(i)
        if last:
            nests += self._storing_nests()
        for nest in nests:
            roots = [a for i in (*nest.kept, *nest.reductions) for a in self.values[i].args]
            values = {*self.needed([*roots, *(i for _, i in nest.stores)]), *nest.kept}
            nest.values = tuple(sorted(values))
        return Between(tuple(joined), tuple(nests))

    def _storing_nests(self) -> list[Nest]:
        """Those with more axes first: they may need what those with fewer will overwrite."""
        by_kind: dict[str, Nest] = {}
        for n, i in self.program.stores:
            kind = self.program.buffer[n].kind
            if is_partial(kind) and not self._on_the_way(i):
                by_kind.setdefault(kind, Nest(kind)).stores.append((n, i))
        return sorted(by_kind.values(), key=lambda nest: -len(nest.kind))
