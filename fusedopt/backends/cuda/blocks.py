"""Programs with several axes as CUDA C++: a block's threads share a chunk, or between stages a tensor, or where they do
not meet some places along its first axis.

Lines are dealt out to teams of threads. Part results along axes that lines have in common would be written to by many
threads; so each of their places has a team too, which goes through what the place is made of. No result depends on who
comes first.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ...ir.ops import DRAWS, ELEMENT, TENSOR, axes_of, is_partial, reduction
from ...ir.program import Value, identifier
from ...ir.stages import Between, Nest, Stage, by_places, regions, scalar_stores, schedule
from .. import blocks
from ..c_family import Body, indent

SHARED = 1 << 14
"""Bytes of shared memory for sums along lines that places are made of."""

HELD = (32, 64, 128, 256)
"""Lengths of lines that some threads of a warp can have in registers."""


def walked(body: Body, stage: Stage) -> tuple[list[str], list[str]]:
    """What a function of an element takes for the stage's buffers, and what it is called for: see the skeleton."""
    values, read = body.program.values, stage.loads(body.program)
    names = [n for n in body.touched(stage) if body.program.buffer[n].kind == ELEMENT]
    buffers = [identifier(n) if n in read else f"::written({identifier(n)})" for n in names]
    drawn = any(values[i].op in DRAWS for i in stage.values)
    return [*map(identifier, names), *["numbers"] * drawn], [*buffers, *["::Numbers()"] * drawn]


@dataclass(frozen=True)
class Range:
    """Elements of a space with these axes: a chunk's, or all that a nest goes over."""

    axes: str
    begin: str
    end: str


class Blocks(blocks.Blocks):
    """The functions of a program with several axes."""

    at_place = False
    """Whether what is being written is done at a place of its own: along no line."""
    nested = False
    """Whether it is for a loop between stages."""
    held: Sequence[int] = ()
    """The sums that a line leaves in shared memory."""
    in_registers = False
    """Whether the line may be in registers, where its elements are numbered from 0 on in each thread."""

    @property
    def regions(self) -> str:
        return f"Regions<{len(regions(self.program))}>"

    # -- stages --
    def chunk(self, stage: Stage) -> list[str]:
        mine, values = regions(self.program, stage), self.program.values
        across = [i for i in mine if values[i].kind != self.program.all_axes[:-1]]
        sums = [i for i in self._needed(values[a].args[0] for a in across) if i in self.split.inline]
        along = self._along(stage, across, sums)
        chunk = Range(self.program.all_axes, "begin", "end")
        body = (
            self._in_parts(along, across, sums, chunk)
            if sums
            else [*self._lines(along, chunk), *self._across(across, chunk)]
        )
        out = [
            *(f"double* const {self._q(i)} = regions[{self._region(i)}];" for i in mine),
            *self.accumulators(stage),
            *body,
            *(f"{self._lanes(i)}.finish(partial + {self.reductions.index(i)});" for i in self._whole(stage)),
        ]
        return out or ["(void)row, (void)begin, (void)end;  // only numbers per tensor are stored"]

    def _along(self, stage: Stage, across: Sequence[int], sums: Sequence[int]) -> Stage:
        """The part of a stage that is done along lines: all but some reductions, for which it has these sums."""
        values = self.program.values
        reductions = tuple(i for i in stage.reductions if i not in across)
        roots = [*(i for _, i in stage.stores), *(values[i].args[0] for i in reductions), *sums]
        needed = self.split.needed(roots)
        lines = (tuple(i for i in deep if i in needed) for deep in stage.lines)
        return Stage(needed, reductions, stage.stores, tuple(filter(None, lines)))

    def _lines(self, stage: Stage, chunk: Range) -> list[str]:
        """Every line has its team."""
        if not stage.values:
            return []
        if self._fits_registers(stage):
            return self._walked(stage)
        length = f"n{chunk.axes[-1]}"
        left = f"{chunk.end} - line * {length}"
        shorter = f"{left} < {length} ? {left} : {length}"
        last = self.last_line(chunk.end) if chunk.axes == self.program.all_axes else f"{chunk.end} / {length}"
        head = f"for (int64_t line = {chunk.begin} / {length} + team.index; line < {last};"
        return [
            "{",
            f"  const Team team = Team::neighbours({length});",
            f"  {head} line += team.count) {{",
            *([f"    const int64_t length = {shorter};"] if self.program.line else []),
            *indent(indent(self.line(chunk.axes, stage))),
            "  }",
            "}",
        ]

    def _fits_registers(self, stage: Stage) -> bool:
        """Whether whole lines can be held: those are short, and what becomes of them is the same in any order."""
        values, buffer = self.program.values, self.program.buffer
        kinds = {values[i].kind for i in stage.values} | {buffer[n].kind for n, _ in stage.stores}
        return (
            self.program.line in HELD
            and not (stage.reductions or self.held)
            and all(reduction(values[i].op).exact for sums in stage.lines for i in sums)
            and ELEMENT in kinds
            and kinds <= {TENSOR, self.program.all_axes[:-1], ELEMENT}
        )

    def _walked(self, stage: Stage) -> list[str]:
        """One function of a line, which ``walk_lines`` calls with pointers, or with what it has in registers."""
        names, buffers = walked(self, stage)
        self.in_registers, number, self.number = True, self.number, "::number_of(numbers, i)"
        body = self.line(self.program.all_axes, stage)
        self.in_registers, self.number = False, number
        elements = ", ".join(f"auto&& {n}" for n in names)
        head = f"const auto with_line = [&](const auto& team, int64_t line, int64_t length, {elements}) {{"
        call = f"::walk_lines<n{self.program.all_axes[-1]}>({', '.join(['begin', 'end', 'with_line', *buffers])});"
        return [
            *textwrap.wrap(head, 108, subsequent_indent=" " * 28),
            *indent(body),
            "};",
            *textwrap.wrap(call, 108, subsequent_indent=" " * 17),
        ]

    def _in_parts(self, along: Stage, across: Sequence[int], sums: Sequence[int], chunk: Range) -> list[str]:
        """Some lines after others: as many as there is shared memory for the sums that places need of each."""
        values, length = self.program.values, f"n{chunk.axes[-1]}"
        count = SHARED // (8 * len(sums))
        part = Range(chunk.axes, "part", "stop")
        self.held = sums
        loop = [
            f"const int64_t stop = part + {count} * {length} < end ? part + {count} * {length} : end;",
            f"const int64_t held = part / {length};",
            "__syncthreads();  // until nobody reads the sums of the lines before",
            *self._lines(along, part),
            "__syncthreads();",
            *self._across(across, part, onto=True),
        ]
        self.held = ()
        out = [f"__shared__ T sums{i}[{count}];" for i in sums]
        for i in across:
            first, last = self._places(values[i].kind, chunk)
            out += [
                f"for (int64_t p = {first} + threadIdx.x; p < {last}; p += blockDim.x)",
                f"  {self._q(i)}[p] = {values[i].op}_::init;",
            ]
        head = f"for (int64_t part = begin; part < end; part += {count} * {length}) {{"
        return [*out, head, *indent(loop), "}"]

    # -- lines --
    def over(self, inner: Sequence[str], lanes: bool) -> list[str]:
        if self.in_registers:
            head = f"team.each(first, first + length, [&](int64_t i, int{' lane' if lanes else ''}) {{"
            return [head, *indent(inner), "});"]
        at = ["[[maybe_unused]] const int64_t i = first + c;"]
        head = f"team.each(0, {self.length}, [&](int64_t c, int{' lane' if lanes else ''}) {{"
        return [head, *indent([*at, *inner]), "});"]

    def _accumulator(self, i: int) -> str:
        op = self.program.values[i].op
        number = ", T" if i in self.split.inline and reduction(op).exact else ""
        return f"Lanes<{op}_{number}> {self._lanes(i)};"

    def total(self, i: int) -> str:
        return f"{self._lanes(i)}.total(team)"

    def last(self, stage: Stage, kept: Sequence[int]) -> list[str]:
        values = self.program.values
        roots = {*(i for _, i in stage.stores), *(values[i].args[0] for i in stage.reductions)}
        inner = [self._line(i) for i in self._varying(roots)]
        inner += map(self._added, stage.reductions)
        mine = [i for i in stage.reductions if i not in self.reductions]
        alone = [f"{self._q(i)}[{self._place(values[i].kind)}] = {self.name(i)};" for i in mine]
        alone += [f"sums{i}[line - held] = {self.name(i)};" for i in self.held]
        written: list[str] = []
        for n, i in stage.stores:
            kind = self.program.buffer[n].kind
            place = "i" if kind == ELEMENT else self._place(kind)
            (inner if kind == ELEMENT else written).append(
                f"store({identifier(n)}, {place}, {self.name(i)});"
            )
        return [
            *map(self._accumulator, mine),
            *(self.over(inner, bool(stage.reductions)) if inner else []),
            *(f"const double {self.name(i)} = {self.total(i)};" for i in mine),
            *(["team.sync();  // until all have read what is written now"] if written else []),
            *(["if (team.lane == 0) {", *indent([*alone, *written]), "}"] if alone or written else []),
        ]

    def _varying(self, roots: Iterable[int]) -> list[int]:
        return [i for i in self._needed(roots) if self._along_line(self.program.values[i].kind)]

    def _needed(self, roots: Iterable[int]) -> list[int]:
        """What has to be computed for the roots: sums along lines are there, and so is what others have made."""
        needed: set[int] = set()
        todo = list(roots)
        while todo:
            i = todo.pop()
            there = i in self.split.inline or (self.split.given(i) and i not in self.making)
            if i not in needed:
                needed.add(i)
                todo.extend(() if there else self.program.values[i].args)
        return sorted(needed)

    # -- places --
    def _across(self, sums: Sequence[int], elements: Range, onto: bool = False) -> list[str]:
        """Reductions whose results have a place each, with a team that goes through what it is made of.

        onto: to join with what is there already
        """
        out = []
        for kind in dict.fromkeys(self.program.values[i].kind for i in sums):
            same = [i for i in sums if self.program.values[i].kind == kind]
            out += ["{", *indent(self._of_kind(kind, same, elements, onto)), "}"]
        return out

    def _places(self, kind: str, elements: Range) -> tuple[str, str]:
        """The first place of this kind that some of the elements have, and the one behind the last."""
        kept = axes_of(kind, self.program.all_axes)
        if elements.begin == "0":
            return "0", self._count(kept) if kept else "1"
        inside, tail = self._prefix(kind)
        return (
            f"{elements.begin} / ({inside}) * ({tail})",
            f"(({elements.end} - 1) / ({inside}) + 1) * ({tail})",
        )

    def _of_kind(self, kind: str, sums: Sequence[int], elements: Range, onto: bool) -> list[str]:
        values = self.program.values
        kept = axes_of(kind, self.program.all_axes)
        first, last = self._places(kind, elements)
        every = elements.end if elements.begin == "0" else f"({elements.end} - {elements.begin})"
        team = (
            f"across(places - start, {every})"
            if elements.axes[-1] in kept
            else f"neighbours({every} / (places - start))"
        )
        results = []
        for i in sums:
            at, x = f"{self._q(i)}[place]", self.name(i)
            results.append(f"{at} = {f'{values[i].op}_::join({at}, {x})' if onto else x};")
        return [
            f"int64_t start = {first};",
            f"const int64_t places = {last};",
            f"const Team team = Team::{team};",
            "for (; start < places; start += team.count) {",
            *indent(
                [
                    "const int64_t place = start + team.index;",
                    *map(self._accumulator, sums),
                    "if (place < places) {",
                    *indent(self._members(kept, sums, elements)),
                    "}",
                    *(f"const double {self.name(i)} = {self.total(i)};" for i in sums),
                    "if (team.lane == 0 && place < places) {",
                    *indent(results),
                    "}",
                ]
            ),
            "}",
        ]

    def _members(self, kept: str, sums: Sequence[int], elements: Range) -> list[str]:
        """What a place is made of: numbered in order, from the first one that is among the elements."""
        axes = elements.axes
        inside = axes[next(k for k, a in enumerate(axes) if a not in kept) :]
        gone = "".join(a for a in inside if a not in kept)
        roots = [self.program.values[i].args[0] for i in sums]
        body = [*self._axes_of("member", gone), *self._at_place(axes, roots), *map(self._added, sums)]
        head = self._axes_of("place", kept)
        if elements.begin == "0":
            span = f"0, {self._count(gone)}"
        else:
            tail = self._count("".join(a for a in inside if a in kept)) if set(inside) & set(kept) else "1"
            head += [
                f"const int64_t before = place / ({tail}) * ({self._count(inside)});",
                *self._from(kept, inside),
            ]
            bounds = (
                f"from(clamped({x} - before, {self._count(inside)}))" for x in (elements.begin, elements.end)
            )
            span = ", ".join(bounds)
        return [*head, f"team.each({span}, [&](int64_t member, int lane) {{", *indent(body), "});"]

    def _from(self, kept: str, inside: str) -> list[str]:
        """A function: the first member at or behind element ``x`` of those that its place may have."""
        lines = ["int64_t m = 0;"]
        for k, a in enumerate(inside):
            stride = f"({self._count(inside[k + 1 :])})" if inside[k + 1 :] else ""
            digit, rest = (f"x / {stride}", [f"x %= {stride};"]) if stride else ("x", [])
            if a not in kept:
                lines += [f"m = m * n{a} + {digit};", *rest]
                continue
            left = "".join(b for b in inside[k:] if b not in kept)
            all_left = f" * ({self._count(left)})" if left else ""
            lines += [f"if (i{a} != {digit}) return (i{a} < {digit} ? m + 1 : m){all_left};", *rest]
        return ["const auto from = [&](int64_t x) {", *indent([*lines, "return m;"]), "};"]

    def _axes_of(self, place: str, axes: str) -> list[str]:
        """Where along each of these axes a place is, of those that are counted along them."""
        out, rest = [], place
        for a in reversed(axes):
            last = a == axes[0]
            out.append(f"[[maybe_unused]] const int64_t i{a} = {rest if last else f'{rest} % n{a}'};")
            rest = f"({rest} / n{a})"
        return out

    def _at_place(self, axes: str, roots: Iterable[int]) -> list[str]:
        """The roots, computed at one place along these axes."""
        values = self.program.values
        self.axes, self.at_place = axes, True
        needed = [i for i in self._needed(roots) if values[i].kind != TENSOR]
        kinds = sorted({values[i].kind for i in needed} | {"".join(axes) if self.nested else ELEMENT})
        lines = [
            f"[[maybe_unused]] const int64_t {'i' if kind == ELEMENT else f'o{kind}'} = {self._number(kind)};"
            for kind in kinds
        ]
        lines += [self._line(i) for i in needed]
        self.at_place = False
        return lines

    def _number(self, kind: str) -> str:
        """Which of the places of a kind it is."""
        text = ""
        for a in axes_of(kind, self.program.all_axes):
            text = f"({text}) * n{a} + i{a}" if text else f"i{a}"
        return text

    def _place(self, kind: str) -> str:
        if self.at_place and is_partial(kind):
            return f"o{kind}"
        return super()._place(kind)

    # -- between stages --
    def nest(self, nest: Nest) -> list[str]:
        own = [*nest.kept, *nest.reductions]
        values = self.program.values
        axes = axes_of(nest.kind, self.program.all_axes)
        stage = Stage(nest.values, tuple(nest.reductions), tuple(nest.stores))
        self.making, self.nested = nest.kept, True
        body = [
            *self._pointers(stage),
            *self._given(i for i in nest.values if i not in own),
            *(f"double* const {self._q(i)} = {self.result(i)};" for i in own),
            *self._across(nest.reductions, Range(axes, "0", self._count(axes))),
            *self._each_place(nest, axes),
        ]
        self.making, self.nested = (), False
        assert all(values[i].kind == nest.kind for i in nest.kept)
        return [*body, "__syncthreads();"]

    def _each_place(self, nest: Nest, axes: str) -> list[str]:
        """What is kept or stored, in any order."""
        roots = [*nest.kept, *(i for _, i in nest.stores)]
        if not roots:
            return []
        body = [*self._axes_of("place", axes), *self._at_place(axes, roots)]
        body += [f"{self._q(i)}[place] = double({self.name(i)});" for i in nest.kept]
        body += [f"store({identifier(n)}, place, {self.name(i)});" for n, i in nest.stores]
        head = f"for (int64_t place = threadIdx.x; place < {self._count(axes)}; place += blockDim.x) {{"
        return [head, *indent(body), "}"]

    def between(self, k: int, between: Between) -> list[str]:
        joins, rest = self._join(k, between), replace(between, joined=())
        if by_places(self.program, k):
            return [*joins, *self._before(k, [], rest, set()), f"FUSEDOPT_PLACES({k})"]
        return [*joins, *(super().between(k, rest) if rest else [])]

    def after(self, between: Between, early: Sequence[str], done: set[int]) -> tuple[list[str], list[str]]:
        """Many blocks do it where it is done by places: a kernel of its own."""
        k = len(schedule(self.program).stages)
        if not by_places(self.program, k):
            return super().after(between, early, done)
        return [*self._before(k, early, between, {*done}), f"FUSEDOPT_PLACES({k})"], []

    def scalars(self, stage: Stage) -> list[str]:
        found = schedule(self.program)
        k = len(found.stages)
        joins, lines = self._join(k, found.between[-1]), super().scalars(stage)
        if by_places(self.program, k) and not scalar_stores(self.program).stores:
            lines = lines[: lines.index(f"FUSEDOPT_PLACES({k})") + 1]
        return [*joins, *lines]

    def _join(self, k: int, between: Between) -> list[str]:
        """A kernel of its own: one block would take longer for the parts of a large tensor than all do for a stage."""
        if not between.joined:
            return []
        arguments = "[[maybe_unused]] const Launch& launch, const Row row, const Join join"
        head = f"{self.qualifiers} void join_{k}({arguments}) {{"
        lines = [*self._lengths(), *(self._joined_parts(i) for i in between.joined)]
        return [head, *indent(lines), "}", f"FUSEDOPT_JOIN({k})", ""]

    def joined(self, i: int) -> str:
        return ""  # by then they are

    def _joined_parts(self, i: int) -> str:
        v = self.program.values[i]
        inside, tail = self._prefix(v.kind)
        words = f"{self._region(i)}, {self._word(i)}"
        kind = f"{v.op}_, {len(regions(self.program))}"
        return f"join_chunks<{kind}>(row, join, {words}, {inside}, {tail}, {self._count(v.kind)});"

    def result(self, i: int) -> str:
        return f"row.result({self._word(i)})" + self._offset(self.program.values[i].kind)

    def one(self, i: int) -> str:
        return f"*{self.result(i)}"

    def _scalar_stores(self, stores: Iterable[tuple[str, int]]) -> list[str]:
        """One thread stores, when all have read."""
        lines = super()._scalar_stores(stores)
        return ["__syncthreads();", "if (threadIdx.x != 0) return;", *lines] if lines else []

    # -- values --
    def _expression(self, i: int, v: Value) -> str:
        if self.at_place and i in self.split.inline:
            return f"sums{i}[o{v.kind} - held]"
        return super()._expression(i, v)

    # What one kernel writes and reads again, in other threads, is no memory of a pointer's own.
    def _pointers(self, stage: Stage) -> list[str]:
        stored = {n for n, _ in stage.stores if is_partial(self.program.buffer[n].kind)}
        return [
            line.replace(" __restrict", "") if self.nested or name in stored else line
            for name, line in zip(self.touched(stage), super()._pointers(stage), strict=True)
        ]

    def _given(self, values: Iterable[int]) -> list[str]:
        lines = super()._given(values)
        return [line.replace(" __restrict", "") if self.nested else line for line in lines]
