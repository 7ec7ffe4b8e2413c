"""Programs with several axes in C++ and CUDA C++: stages over lines, which lie along the last axis, and what is done
between them.

In the code ``n0`` is the length of axis 0; ``o01`` is where a line begins in what has one number for each place along
axes 0 and 1, and ``c`` the place in the line; ``q0`` are the first of the results that loops keep for later ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence

from ..ir.ops import TENSOR, axes_of, is_partial, reduction
from ..ir.program import Value, identifier
from ..ir.stages import Between, Nest, Split, Stage, regions, schedule
from .base import HEAD
from .c_family import Body, indent


class Blocks(Body):
    """The functions of a program with several axes.

    A language says how a chunk and a nest are gone through, in loops over lines, whose bodies are written here.
    """

    axes = ""
    """Those that the loop being written goes along; the last one is the line."""
    making: Sequence[int] = ()
    """What it computes for later ones, which find it given."""
    placed = False
    """Whether what is written is for places ``from`` up to ``to`` along the first axis."""

    @property
    def split(self) -> Split:
        return Split.of(self.program)

    @property
    def regions(self) -> str:
        """The type of what says where a chunk's part results along axes begin."""
        return "const int64_t*"

    @abstractmethod
    def chunk(self, stage: Stage) -> list[str]:
        """The lines that do a stage's chunk, and leave its part results."""

    @abstractmethod
    def nest(self, nest: Nest) -> list[str]:
        """The lines that do a nest."""

    @abstractmethod
    def joined(self, i: int) -> str:
        """The line that joins the part results of a reduction along axes."""

    @abstractmethod
    def result(self, i: int) -> str:
        """Where the results of a value begin."""

    @abstractmethod
    def one(self, i: int) -> str:
        """The result of a value that there is one of per tensor."""

    @abstractmethod
    def over(self, inner: Sequence[str], lanes: bool) -> list[str]:
        """The loop over a line's places; with lanes to add up in, in a fixed order."""

    @abstractmethod
    def total(self, i: int) -> str:
        """What the lanes of a reduction come to."""

    @abstractmethod
    def last(self, stage: Stage, kept: Sequence[int]) -> list[str]:
        """What is done at a line once the sums along it are there: what the loop is for."""

    # -- functions --
    def stage(self, k: int, stage: Stage) -> list[str]:
        """A stage: its chunks are whole lines."""
        body = [
            *self._lengths(),
            *self._prologue(stage),
            *self._skip(stage),
            *self._pointers(stage),
            *self._given(stage.values),
            *self.chunk(stage),
        ]
        head = f"{self.qualifiers} void stage_{k}("
        return [
            f"{head}[[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,",
            f"{' ' * len(head)}[[maybe_unused]] double* partial, [[maybe_unused]] {self.regions} regions) {{",
            *indent(body),
            "}",
            f"FUSEDOPT_BLOCK_STAGE({k})",
        ]

    def between(self, k: int, between: Between) -> list[str]:
        """What is done once per tensor before stage k."""
        return [
            f"{self.qualifiers} void before_{k}([[maybe_unused]] const Launch& launch, const Row row) {{",
            *indent([*self._lengths(), *self._between(between, set())]),
            "}",
            f"FUSEDOPT_BETWEEN({k})",
        ]

    def scalars(self, stage: Stage) -> list[str]:
        """What is done, and stored, after all stages."""
        done: set[int] = set()
        skip = self.program.skip
        early = (
            []
            if skip is None
            else [*self._uniform(self.split.needed([skip]), done), f"if ({self.name(skip)}) return;"]
        )
        before, nests = self.after(schedule(self.program).between[-1], early, done)
        body = [*early, *nests, *self._uniform(stage.values, done)]
        return [
            *before,
            f"{self.qualifiers} void scalars([[maybe_unused]] const Launch& launch, const Row row) {{",
            *indent([*self._lengths(), *body, *self._scalar_stores(stage.stores)]),
            "}",
            "FUSEDOPT_SCALARS",
        ]

    def after(self, between: Between, early: Sequence[str], done: set[int]) -> tuple[list[str], list[str]]:
        """What is done after all stages: a function that others call too, if there is one, and what is done here."""
        return [], self._between(between, done)

    def _before(self, k: int, early: Sequence[str], between: Between, done: set[int]) -> list[str]:
        """What is done between stages, for some places along the first axis."""
        self.placed = True
        body = [*self._lengths(), *early, *self._between(between, done)]
        self.placed = False
        head = f"{self.qualifiers} void before_{k}("
        return [
            f"{head}[[maybe_unused]] const Launch& launch, const Row row,",
            f"{' ' * len(head)}[[maybe_unused]] int64_t from, [[maybe_unused]] int64_t to) {{",
            *indent(body),
            "}",
        ]

    def _between(self, between: Between, done: set[int]) -> list[str]:
        lines = list(map(self.joined, between.joined))
        for nest in between.nests:
            lines += [*self._uniform(nest.values, done), "{", *indent(self.nest(nest)), "}"]
        return lines

    def _uniform(self, values: Iterable[int], done: set[int]) -> list[str]:
        """What there is one of per tensor, unless it is there."""
        new = [i for i in values if self.program.values[i].kind == TENSOR and i not in done]
        done.update(new)
        return [self._line(i) for i in new]

    # -- where things are --
    def _lengths(self) -> list[str]:
        at = HEAD + len(self.program.buffers)
        lines = [
            f"[[maybe_unused]] const int64_t n{a} = row.words[{at + a}];" for a in range(self.program.axes)
        ]
        if self.program.line:
            lines[-1] = f"[[maybe_unused]] constexpr int64_t n{self.program.axes - 1} = {self.program.line};"
        return ["[[maybe_unused]] const int64_t n0 = to - from;", *lines[1:]] if self.placed else lines

    def _offset(self, kind: str) -> str:
        """What there is of a kind before the places that this is for."""
        lengths = "".join(f" * n{a}" for a in kind[1:])
        return f" + from{lengths}" if self.placed and kind.startswith(self.program.all_axes[0]) else ""

    def pointer(self, name: str, type_: str) -> str:
        return super().pointer(name, type_) + self._offset(self.program.buffer[name].kind)

    @property
    def length(self) -> str:
        """How long the line is that is gone over."""
        whole = self.axes == self.program.all_axes
        return "length" if self.program.line and whole else f"n{self.axes[-1]}"

    def last_line(self, end: str) -> str:
        """The number of the line behind the last one, of elements up to an end."""
        a = self.program.all_axes[-1]
        return f"({end} + n{a} - 1) / n{a}" if self.program.line else f"{end} / n{a}"

    def _count(self, kind: str) -> str:
        return " * ".join(f"n{a}" for a in axes_of(kind, self.program.all_axes)) or "1"

    def _word(self, i: int) -> int:
        """Which word of a row says where the results of a value begin."""
        return HEAD + len(self.program.buffers) + self.program.axes + schedule(self.program).results.index(i)

    def _q(self, i: int) -> str:
        return f"q{schedule(self.program).results.index(i)}"

    def _region(self, i: int) -> int:
        """Which of the words that a chunk has for its part results."""
        return regions(self.program).index(i)

    def _are_given(self, values: Iterable[int]) -> list[int]:
        """Those of which earlier loops have left more than one number."""
        return [i for i in values if self.split.given(i) and is_partial(self.program.values[i].kind)]

    def _given(self, values: Iterable[int]) -> list[str]:
        """Pointers to the results of earlier loops."""
        return [f"const double* __restrict {self._q(i)} = {self.result(i)};" for i in self._are_given(values)]

    def _prefix(self, kind: str) -> tuple[str, str]:
        """How many elements, and how many numbers of this kind, each place along the axes before its first gap has."""
        axes = self.program.all_axes
        inside = axes[next(k for k, a in enumerate(axes) if a not in kind) :]
        return self._count(inside), self._count("".join(a for a in inside if a in kind)) if kind else "1"

    def _place(self, kind: str) -> str:
        if kind == TENSOR:
            return "0"
        return f"o{kind} + c" if self._along_line(kind) else f"o{kind}"

    def _along_line(self, kind: str) -> bool:
        """Whether it has another number at each place of a line."""
        return self.axes[-1] in axes_of(kind, self.program.all_axes)

    # -- lines --
    def line(self, axes: str, stage: Stage, kept: Sequence[int] = ()) -> list[str]:
        """What is done at a line: it is gone over once for every sum along it that others need, then for the rest."""
        self.axes, self.making = axes, kept
        values = self.program.values
        fixed = [i for i in stage.values if values[i].kind != TENSOR and not self._along_line(values[i].kind)]
        body: list[str] = []
        done: set[int] = set()
        for sums in stage.lines:
            body += [*self._fixed(fixed, done), *self._line_sums(sums)]
            done.update(sums)
        body += [*self._fixed(fixed, done), *self.last(stage, kept)]
        kinds = {values[i].kind for i in (*stage.values, *stage.reductions, *kept)}
        kinds |= {self.program.buffer[n].kind for n, _ in stage.stores}
        return [*self._index(kinds), *body]

    def _index(self, kinds: Iterable[str]) -> list[str]:
        """Where the line begins in all that is accessed."""
        outer = self.axes[:-1]
        out = []
        if self.axes == self.program.all_axes:
            out.append(f"const int64_t first = line * n{self.axes[-1]};")
        out += self.where(outer)
        for kind in sorted(filter(is_partial, kinds)):
            place, stride = [], ""
            for a in reversed(kind):
                place += [f"i{a}{stride}"] if a in outer else []
                stride += f" * n{a}"
            out.append(f"[[maybe_unused]] const int64_t o{kind} = {' + '.join(place) or '0'};")
        return out

    def where(self, outer: str) -> list[str]:
        """Where the line is along the other axes."""
        out, rest = [], "line"
        for a in reversed(outer[1:]):
            out.append(f"[[maybe_unused]] const int64_t i{a} = {rest} % n{a};")
            rest = f"({rest} / n{a})"
        return out + ([f"[[maybe_unused]] const int64_t i{outer[0]} = {rest};"] if outer else [])

    def _fixed(self, fixed: Sequence[int], done: set[int]) -> list[str]:
        """What is one number for the whole line, as far as the sums that it needs are there."""
        out = []
        late = {i for i in fixed if i in self.split.inline} - done
        for i in fixed:
            if i in late or (not self.split.given(i) and late.intersection(self.program.values[i].args)):
                late.add(i)
            elif i not in done:
                done.add(i)
                out.append(self._line(i))
        return out

    def _varying(self, roots: Iterable[int]) -> list[int]:
        """What has to be computed at each place of the line."""
        roots, values = list(roots), self.program.values
        roots += [a for i in roots if i in self.making for a in values[i].args]
        return [i for i in self.split.needed(roots) if self._along_line(values[i].kind)]

    def _line_sums(self, sums: Sequence[int]) -> list[str]:
        values = self.program.values
        inner = [self._line(i) for i in self._varying(values[i].args[0] for i in sums)]
        inner += [self._added(i) for i in sums]
        out = [self._accumulator(i) for i in sums]
        out += self.over(inner, lanes=True)
        for i in sums:
            out.append(f"const T {self.name(i)} = T({self.total(i)}{self._averaged_over(i)});")
        return out

    def _averaged_over(self, i: int) -> str:
        averaged = reduction(self.program.values[i].op).averaged
        return f" / double({self.length})" if averaged else ""

    def _lanes(self, i: int) -> str:
        return f"acc{i}"

    def _accumulator(self, i: int) -> str:
        return f"Lanes<{self.program.values[i].op}_> {self._lanes(i)};"

    def _added(self, i: int) -> str:
        return f"{self._lanes(i)}.add(lane, {self.name(self.program.values[i].args[0])});"

    def _whole(self, stage: Stage) -> list[int]:
        return [i for i in stage.reductions if i in self.reductions]

    def accumulators(self, stage: Stage) -> list[str]:
        return list(map(self._accumulator, self._whole(stage)))

    # -- values --
    def _expression(self, i: int, v: Value) -> str:
        kind = v.kind
        if self.split.given(i) and i not in self.reductions and i not in self.making:
            gone = self._gone(i)
            number = self.one(i) if kind == TENSOR else f"{self._q(i)}[{self._place(kind)}]"
            return f"T({self.quotient(number, gone) if gone else number})"
        if v.op == "load" and is_partial(kind):
            return f"load<T>({identifier(v.attr)}, {self._place(kind)})"
        return super()._expression(i, v)

    def quotient(self, number: str, count: str) -> str:
        """A sum over how many numbers it is of."""
        return f"{number} / double({count})"

    def _gone(self, i: int) -> str:
        """How many numbers a result of earlier loops is the mean of, "" if it is none."""
        v, axes = self.program.values[i], self.program.all_axes
        source = self.program.values[v.args[0]].kind if v.op in self._averaged else v.kind
        gone = "".join(a for a in axes_of(source, axes) if a not in axes_of(v.kind, axes))
        return self._count(gone) if gone else ""

    @property
    def _averaged(self) -> set[str]:
        return {op.name for op in self.reduces() if op.averaged}
