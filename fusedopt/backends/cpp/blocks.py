"""Programs with several axes as C++: loops over lines, one after another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from ...ir.ops import ELEMENT, TENSOR, axes_of
from ...ir.program import Value, identifier
from ...ir.stages import Between, Nest, Stage, regions, schedule
from .. import blocks
from ..base import HEAD
from ..c_family import indent


class Blocks(blocks.Blocks):
    """The functions of a program with several axes."""

    flat = False
    """Whether the places of a loop between stages are gone over in one line."""
    element_by_element = False
    tiled = False
    """Whether many short lines are gone over at a time: ``k`` is which of them, ``c`` a place in each."""

    # -- chunks that go on --
    def _goes_on(self, k: int) -> bool:
        """Whether a chunk that has all of each of its places along the first axis can go on to what comes before stage
        k, and to that: it has made all that they need. After the last stage, to what comes then."""
        found, values = schedule(self.program), self.program.values
        if (
            k == 0
            or len(self.program.all_axes) == 2
            or set(found.stages[k - 1].reductions) & set(self.reductions)
        ):
            return False
        nests = found.between[k].nests
        made = [*found.between[k].joined, *(i for nest in nests for i in nest.reductions)]
        kinds = [*(values[i].kind for i in made), *(nest.kind for nest in nests)]
        return bool(kinds) and all(kind.startswith(self.program.all_axes[0]) for kind in kinds)

    def stage(self, k: int, stage: Stage) -> list[str]:
        lines, goes_on, follows = super().stage(k, stage), self._goes_on(k + 1), self._goes_on(k)
        if not goes_on and not follows:
            return lines
        last = k + 1 == len(schedule(self.program).stages)
        then = f"before_{k + 1}(launch, row, chunk[1] / each, chunk[2] / each);"
        more = [
            f"if (const int64_t each = whole_places(launch, row, row.words[{self._first_length}])) {{",
            *indent([then, "" if last else f"chunk_{k + 1}(launch, row, c);"]),
            "}",
        ]
        parts = "launch.partials + c * launch.n_reductions, chunk + chunk_words"
        later = [
            f"static void before_{k + 1}(const Launch& launch, const Row row, int64_t from, int64_t to);",
            "" if last else f"static void chunk_{k + 1}(const Launch& launch, const Row row, int64_t c);",
        ]
        return [
            *lines[:-1],
            *(filter(None, later) if goes_on else []),
            f"static void chunk_{k}(const Launch& launch, const Row row, int64_t c) {{",
            *indent(["const int64_t* chunk = launch.chunks + c * launch.chunk_words;"]),
            *indent([f"stage_{k}(launch, row, chunk[1], chunk[2], {parts});", *(more if goes_on else [])]),
            "}",
            f"FUSEDOPT_CHUNKS({k}, {str(follows).lower()}, {self._first_length})",
        ]

    def between(self, k: int, between: Between) -> list[str]:
        if not self._goes_on(k):
            return super().between(k, between)
        return [*self._before(k, [], between, set()), f"FUSEDOPT_PLACES({k}, {self._first_length})"]

    def after(self, between: Between, early: Sequence[str], done: set[int]) -> tuple[list[str], list[str]]:
        k = len(schedule(self.program).stages)
        if not self._goes_on(k):
            return super().after(between, early, done)
        word = f"row.words[{self._first_length}]"
        call = f"if (!whole_places(launch, row, {word})) before_{k}(launch, row, 0, {word});"
        return self._before(k, early, between, {*done}), [call]

    @property
    def _first_length(self) -> int:
        """Which word of a row says how long the first axis is."""
        return HEAD + len(self.program.buffers)

    def chunk(self, stage: Stage) -> list[str]:
        mine, values = regions(self.program, stage), self.program.values
        return [
            *(
                f"double* __restrict {self._q(i)} = launch.results + regions[{self._region(i)}];"
                for i in mine
            ),
            *(self._cleared(i, "begin", "end") for i in mine if values[i].kind != self.program.all_axes[:-1]),
            *self.accumulators(stage),
            *self._loop(self.program.all_axes, stage),
            *(f"partial[{self.reductions.index(i)}] = {self.total(i)};" for i in self._whole(stage)),
        ]

    def nest(self, nest: Nest) -> list[str]:
        own = [*nest.kept, *nest.reductions]
        loop = self._flat if self._is_flat(nest) else self._loop
        values = self.program.values
        stage = Stage(nest.values, tuple(nest.reductions), tuple(nest.stores))
        return [
            *self._pointers(stage),
            *self._given(i for i in nest.values if i not in own),
            *(f"double* __restrict {self._q(i)} = {self.result(i)};" for i in own),
            *(
                f"clear<{values[i].op}_>({self._q(i)}, 0, {self._count(values[i].kind)});"
                for i in nest.reductions
                if values[i].kind != nest.kind[:-1]
            ),
            *loop(nest.kind, stage, nest.kept),
        ]

    def _is_flat(self, nest: Nest) -> bool:
        """Whether it is the same at every place, so that it needs no lines."""
        kinds = {self.program.values[i].kind for i in nest.values} - {TENSOR}
        return not nest.reductions and kinds == {nest.kind}

    def _flat(self, kind: str, stage: Stage, kept: Sequence[int]) -> list[str]:
        """One line of all places."""
        length = f"const int64_t count = {self._count(kind)}, n{kind[-1]} = count;"
        self.flat = True
        body = self.line(kind[-1], stage, kept)
        self.flat = False
        return ["{", *indent([length, *body]), "}"]

    def _loop(self, axes: str, stage: Stage, kept: Sequence[int] = ()) -> list[str]:
        """The lines in their order, and with them where each is along the other axes."""
        body = self.line(axes, stage, kept)
        outer, length = axes[:-1], f"n{axes[-1]}"
        if not outer:
            return body
        whole = axes == self.program.all_axes
        last = self.last_line("end") if whole else self._count(outer)
        first = f"begin / {length}" if whole else "0"
        if len(self.program.all_axes) == 2 or (whole and self.program.line):
            return [
                *self._start(outer, first),
                f"for (int64_t line = {first}; line < {last}; ++line) {{",
                *indent([*body, *self._next(outer)]),
                "}",
            ]
        # The last of several axes is often as short as a convolution's kernel.
        tiles = self._tiles(axes, stage, kept)
        lines = [
            *self._start(outer, "start" if tiles else first),
            f"for (int64_t line = {'start' if tiles else first}; line < {'stop' if tiles else last}; ++line) {{",
            *indent([*body, *self._next(outer)]),
            "}",
        ]
        if not tiles:
            return [f"with_length({length}, [&](auto {length}) {{", *indent(lines), "});"]
        return [
            f"int64_t start = {first};",
            f"const int64_t stop = {last};",
            f"if ({length} == tiled) {{",
            *indent(
                [f"constexpr int64_t {length} = tiled;", "for (; start + tile <= stop; start += tile) {"]
            ),
            *indent(indent(tiles)),
            *indent(["}"]),
            "}",
            *lines,
        ]

    # -- tiles --
    def _tiles(self, axes: str, stage: Stage, kept: Sequence[int]) -> list[str]:
        """What is done at a tile of lines. None unless all that is accessed is there for each line, or for each run of
        lines along the axis before the last."""
        values, buffers = self.program.values, self.program.buffer
        touched = [values[i] for i in (*stage.values, *stage.reductions, *kept)]
        kinds = {v.kind for v in touched} | {buffers[n].kind for n, _ in stage.stores}
        known = (axes, axes[:-1], axes[:-2], axes[:-2] + axes[-1])
        own = {values[i].kind for i in stage.reductions if i not in self.reductions}
        if any(axes_of(kind, self.program.all_axes) not in (*known, "") for kind in kinds) or TENSOR in own:
            return []
        self.tiled = True
        body = self.line(axes, stage, kept)
        spread = [i for i in stage.values if i in self._spread(stage.values)]
        lines = [*self._fetches(stage)]
        for i in spread:
            v, m = values[i], self._numbers_in_run(i)
            source = identifier(v.attr) if v.op == "load" else self._q(i)
            over = self._gone(i) or "Fixed<1>{}"
            lines.append(f"T e{i}[{m}][tile];")
            lines.append(f"spread<{m}>(e{i}, {source}, start, n{axes[-2]}, {over});")
        apart = [i for i in stage.reductions if self._is_apart(i)]
        lines += [f"double y{i}[{self._numbers_in_run(i)}][tile];" for i in apart]
        lines += [
            "FUSEDOPT_INDEPENDENT",
            "for (int64_t k = 0; k < tile; ++k) {",
            *indent(["const int64_t line = start + k;", *body]),
            "}",
        ]
        for i in apart:
            if i in self.reductions:
                lines.append(f"collect({self._lanes(i)}, y{i});")
            else:
                how = f"{values[i].op}_, {self._numbers_in_run(i)}"
                lines.append(f"collect<{how}>({self._q(i)}, y{i}, start, n{axes[-2]});")
        self.tiled = False
        return lines

    def _of_run(self, i: int) -> bool:
        """Whether it is the same for each line of a run."""
        kind = axes_of(self.program.values[i].kind, self.program.all_axes)
        return kind in (self.axes[:-2], self.axes[:-2] + self.axes[-1]) and kind != ""

    def _spread(self, values: Iterable[int]) -> set[int]:
        """What is read of runs."""
        return {
            i
            for i in values
            if self._of_run(i)
            and i not in self.making
            and (self.split.given(i) or self.program.values[i].op == "load")
        }

    def _is_apart(self, i: int) -> bool:
        """Whether what lines make is collected after a tile."""
        return i in self.reductions or self._of_run(i)

    def _numbers_in_run(self, i: int) -> str:
        along = i in self.reductions or self._along_line(self.program.values[i].kind)
        return f"n{self.axes[-1]}" if along else "1"

    def _fetches(self, stage: Stage) -> list[str]:
        """What is read and written next to one another for each line is asked for early."""
        last = self.axes[-1]
        places = {
            self.axes: f"start * n{last} + ahead, n{last} * tile",
            self.axes[:-1]: "start + ahead, tile",
        }
        found = {identifier(n): self.program.buffer[n].kind for n in self.touched(stage)}
        given = [*self._are_given(stage.values), *stage.reductions]
        found |= {self._q(i): self.program.values[i].kind for i in given if i not in self.reductions}
        out = []
        for name, kind in found.items():
            place = places.get(axes_of(kind, self.program.all_axes))
            out += [f"fetch({name} + {place});"] if place else []
        return out

    def _start(self, outer: str, line: str) -> list[str]:
        """Where the first line is. Not so for each line: divisions would take longer than a short one."""
        out = []
        for k, a in reversed(list(enumerate(outer))):
            place = f"({line})" + "".join(f" / n{b}" for b in outer[k + 1 :])
            out.append(f"[[maybe_unused]] int64_t i{a} = {place}{f' % n{a}' if k else ''};")
        return out

    def _next(self, outer: str) -> list[str]:
        """Go on to the next line."""
        text = f"++i{outer[0]};"
        for _, a in pairwise(outer):
            text = f"if (++i{a} == n{a}) {{ i{a} = 0; {text} }}"
        return [text]

    def _expression(self, i: int, v: Value) -> str:
        if self.tiled and i in self._spread([i]):
            return f"e{i}[{'c' if self._along_line(v.kind) else 0}][k]"
        return super()._expression(i, v)

    def quotient(self, number: str, count: str) -> str:
        # In loops that vectors are made of. Elsewhere it would only be more to compile.
        return f"quotient({number}, {count})" if self.tiled or self.flat else super().quotient(number, count)

    def _accumulator(self, i: int) -> str:
        if self.tiled:
            return f"Lanes<{self.program.values[i].op}_, n{self.axes[-1]}> {self._lanes(i)};"
        return super()._accumulator(i)

    def _roots(self, stage: Stage, kept: Sequence[int] = ()) -> set[int]:
        """What a line is gone over for, once its sums are there."""
        values = self.program.values
        return {*(i for _, i in stage.stores), *(values[i].args[0] for i in stage.reductions), *kept}

    def where(self, outer: str) -> list[str]:
        return []

    def _index(self, kinds: Iterable[str]) -> list[str]:
        if not self.tiled:
            return super()._index(kinds)
        last, found = self.axes[-1], set(kinds)
        out = [f"[[maybe_unused]] const int64_t first = line * n{last};"] if ELEMENT in found else []
        out += [f"const int64_t o{self.axes[:-1]} = line;"] if self.axes[:-1] in found else []
        return out + ([f"const int64_t o{self.axes} = line * n{last};"] if self.axes in found else [])

    def last(self, stage: Stage, kept: Sequence[int]) -> list[str]:
        values = self.program.values
        inner = [self._line(i) for i in self._varying(self._roots(stage, kept))]
        before, after = [], []
        added: dict[tuple[str, int], int] = {}
        for i in stage.reductions:
            v, whole = values[i], i in self.reductions
            arg, along = self.name(v.args[0]), whole or self._along_line(v.kind)
            apart = self.tiled and self._is_apart(i)
            if apart and along:
                inner.append(f"y{i}[c][k] = {arg};")
                continue
            if whole:
                inner.append(self._added(i))
                continue
            at = f"{self._q(i)}[{self._place(v.kind)}]"
            if along:
                inner.append(f"{at} = {v.op}_::join({at}, {arg});")
                continue
            # What a line comes to is the same for all that it goes to.
            if added.setdefault((v.op, v.args[0]), i) == i:
                before.append(self._accumulator(i))
                inner.append(self._added(i))
            total = self.total(added[v.op, v.args[0]])
            once = v.kind == self.axes[:-1]  # of which each line has its own
            at = f"y{i}[0][k]" if apart else at
            after.append(f"{at} = {total};" if apart or once else f"{at} = {v.op}_::join({at}, {total});")
        inner += [f"{self._q(i)}[{self._place(values[i].kind)}] = double({self.name(i)});" for i in kept]
        for n, i in stage.stores:
            kind = self.program.buffer[n].kind
            place = "i" if kind == ELEMENT else self._place(kind)
            (inner if self._along_line(kind) else after).append(self.store(n, place, i))
        lanes = any(".add(lane" in line for line in inner)
        return [*before, *(self.over(inner, lanes) if inner else []), *after]

    def over(self, inner: Sequence[str], lanes: bool) -> list[str]:
        length = self.length
        at = ["[[maybe_unused]] const int64_t i = first + c;"] if self.axes == self.program.all_axes else []
        if self.tiled:
            at += ["[[maybe_unused]] const int lane = c;"] if lanes else []
            head, tail = [f"for (int c = 0; c < {length}; ++c) {{"], "}"
        elif lanes:
            head, tail = [f"for_lanes(0, {length}, [&](int64_t c, int lane) {{"], "});"
        else:
            head, tail = [f"each({length}, [&](int64_t c) FUSEDOPT_INLINE {{"], "});"
        return [*head, *indent([*at, *inner]), tail]

    def total(self, i: int) -> str:
        return f"{self._lanes(i)}.total({'' if i in self.reductions else self.length})"

    # -- results --
    def result(self, i: int) -> str:
        return f"launch.results + row.words[{self._word(i)}]" + self._offset(self.program.values[i].kind)

    def one(self, i: int) -> str:
        return f"launch.results[row.words[{self._word(i)}]]"

    def _cleared(self, i: int, begin: str, end: str) -> str:
        v = self.program.values[i]
        inside, tail = self._prefix(v.kind)
        first, last = f"{begin} / ({inside}) * ({tail})", f"(({end} - 1) / ({inside}) + 1) * ({tail})"
        return f"clear<{v.op}_>({self._q(i)}, {first}, {last});"

    def joined(self, i: int) -> str:
        v = self.program.values[i]
        inside, tail = self._prefix(v.kind)
        where = f"{self._region(i)}, row.words[{self._word(i)}]"
        return f"join_chunks<{v.op}_>(launch, row, {where}, {inside}, {tail}, {self._count(v.kind)});"
