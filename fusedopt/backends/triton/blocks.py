"""Programs with several axes as Triton: loops over tiles of lines, which lie along the last axis, and what is done
between stages.

A *pass* goes over places along some axes, and at each block of them over places along others: tiles of two dimensions,
whose rows are the places ``y`` and whose columns are the places ``x``. A stage's first pass has lines as its rows. It
reduces along them, and to numbers per tensor; the last stage's stores. Each other reduction along axes has a pass of
its own, in which the loop outside is over the places of the result. So each number is made in one place, one after
another in a fixed order: no two programs add to the same, and what comes out depends on no scheduling.

In the code ``n0`` is the length of axis 0, ``i0`` the place along it, ``o01`` the place in what has one number for each
along axes 0 and 1, ``at`` the element; ``q0`` are the first of the results that are kept for later.

Threads of one program see what others of it have stored only after a barrier. One stands wherever memory that was
written is read again, or may still be read by threads that lag behind when it is written. Between kernels there is the
order of the stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ...ir.ops import DRAWS, ELEMENT, TENSOR, Reduction, axes_of, is_reduction, reduction
from ...ir.program import Program, Value
from ...ir.stages import Between, Nest, Split, Stage, regions, schedule
from ..base import place_word
from ..body import element_op
from .body import POINTERS, Body, call, function, indent

SIZES = ["LINES: tl.constexpr", "COLUMNS: tl.constexpr", "WHOLE: tl.constexpr"]
ARGUMENTS = ["rows", "chunks", "partials", "results", "slots", *SIZES]
FEW = 8
"""Members that one thread joins by itself."""
BARRIER = "tl.debug_barrier()"


class Side(NamedTuple):
    """One dimension of a tile: the axes whose places it has, how many at a time, and from where to where."""

    name: str
    axes: str
    size: str
    shaped: str
    first: str
    last: str


def rows(axes: str, first: str, last: str, size: str = "LINES") -> Side:
    return Side("y", axes, size, "[:, None]", first, last)


def columns(axes: str, first: str, last: str, size: str = "COLUMNS") -> Side:
    return Side("x", axes, size, "[None, :]", first, last)


class Pass(NamedTuple):
    """Two loops, one in the other; of what has few numbers a single one.

    within: of what its places make, only elements of the chunk are meant
    making: what is computed for later passes, which find it given
    """

    outer: Side | None
    inner: Side
    within: bool = False
    making: Sequence[int] = ()

    @property
    def sides(self) -> list[Side]:
        return [self.inner] if self.outer is None else sorted([self.outer, self.inner], reverse=True)

    @property
    def shape(self) -> str:
        return f"({', '.join(side.size for side in self.sides)}{'' if self.outer else ','})"


def kept_lines(program: Program, stage: Stage) -> list[int]:
    """The sums along lines that a stage's other passes need too, which keep no lines."""
    if not stage.lines or not regions(program, stage):
        return []
    others = [i for i in regions(program, stage) if program.values[i].kind != program.all_axes[:-1]]
    split, found, todo = Split.of(program), set[int](), [program.values[i].args[0] for i in others]
    while todo:
        i = todo.pop()
        if i in split.inline:
            found.add(i)
        elif not split.given(i):
            todo += program.values[i].args
    return sorted(found)


def most_kept_lines(program: Program) -> int:
    """How many numbers a chunk needs room for, for each of its lines."""
    return max(len(kept_lines(program, stage)) for stage in schedule(program).stages)


class Blocks(Body):
    """The functions of a program with several axes."""

    now: Pass
    """The pass that is being written."""
    stored_lines: Sequence[int] = ()
    """Sums along lines that lie in memory already."""
    at_hand: set[int | str] | None = None
    """Where tiles have whole lines: values of elements, and lines of code, that are there already."""
    placed = False
    """Whether what is written is for the ``n0`` places from ``begin`` on along the first axis."""

    @property
    def split(self) -> Split:
        return Split.of(self.program)

    @property
    def axes(self) -> str:
        return self.program.all_axes

    # -- kernels --
    def joins(self) -> list[str]:
        """What joins two results of each reduction; and those of each column, where chunks have parts."""
        parts = {self.program.values[i].op for i in regions(self.program)}
        lines = []
        for op in self.reduces():
            lines += ["", "", *function(f"{op.name}_", ["a", "b"], [f"return {op.join.format('a', 'b')}"])]
            if op.name in parts:
                total = f"return {self._joined_block(op, 'a', 0)}"
                lines += ["", "", *function(f"{op.name}_total", ["a"], [total])]
        return lines

    def stage(self, k: int, stage: Stage) -> list[str]:
        """Two functions: the work, and what finds out whether that can be done 128 bits at a time, compiled for both.

        Not where sums are made, whose order must not depend on alignment. Otherwise tiles are smaller where accesses
        are single, to need no more registers than the others do.
        """
        skip = self.program.skip
        head = [
            "chunk = tl.program_id(0).to(tl.int64)",
            f"piece = chunks + chunk * {self._chunk_words}",
            f"row = rows + tl.load(piece) * {self._width}",
        ]
        lines = [
            *head,
            "begin = multiple(tl.load(piece + 1), 8, ALIGNED)",
            "end = multiple(tl.load(piece + 2), 8, ALIGNED)",
            *self._lengths(),
            f"n{self.axes[-1]} = multiple(n{self.axes[-1]}, 8, ALIGNED)",
            *([f"which = tl.load(row + {place_word(self.program)})"] if self._draws(stage) else []),
            *self._given(stage.values),
            *self._prologue(stage),
            *(
                [f"end = tl.where({self.name(skip)}, begin, end)"]
                if skip is not None and stage.stores
                else []
            ),
            *self._addresses(stage.values, stage.stores, aligned="ALIGNED"),
            *(f"{self._q(i)} = results + tl.load(piece + {3 + self._region(i)})" for i in self._parts(stage)),
            *self._along_lines(stage),
        ]
        self.stored_lines = kept_lines(self.program, stage)
        if self.stored_lines:
            lines.append(BARRIER)
        kinds = [self.program.values[i].kind for i in self._parts(stage)]
        for kind in dict.fromkeys(kinds):
            if kind != self.axes[:-1]:
                made = [i for i in self._parts(stage) if self.program.values[i].kind == kind]
                lines += ["", f"# To kind {kind}."]
                lines += self._across(kind, made)
        self.stored_lines = ()
        given = [argument.partition(":")[0] for argument in ARGUMENTS]
        fewer = ["LINES // (4 if WHOLE else 2)", "COLUMNS", "WHOLE"]
        buffers = [n for n in self._buffers(stage) if self.program.buffer[n].kind == ELEMENT]
        addresses = [f"tl.load(row + HEAD + {self.buffer_index[n]})" for n in buffers]
        length = f"tl.load(row + HEAD + {len(self.program.buffers) + len(self.axes) - 1})"
        sums = [*stage.reductions, *(i for some in stage.lines for i in some)]
        if all(reduction(self.program.values[i].op).exact for i in sums):
            choice = [
                *head,
                f"address = {' | '.join(addresses) or '0'}",
                f"length = {length} | tl.load(piece + 2)",
                "if ((address & 15) == 0) & ((length & 7) == 0):",
                *indent(call(f"tiles_{k}", [*given, "True"])),
                "else:",
                *indent(call(f"tiles_{k}", [*given[: -len(fewer)], *fewer, "False"])),
            ]
        else:
            choice = call(f"tiles_{k}", [*given, "False"])
        work = function(f"tiles_{k}", [*ARGUMENTS, "ALIGNED: tl.constexpr"], lines)
        return [*work, "", "", *function(f"stage_{k}", ARGUMENTS, choice)]

    def join(self, k: int, between: Between) -> list[str]:
        """Before or after a stage: a program for some places of a tensor's results."""
        lines = [f"row = rows + tl.program_id(0).to(tl.int64) * {self._width}", *self._lengths()]
        for i in between.joined:
            v = self.program.values[i]
            inside, tail = self._prefix(v.kind)
            lines += [
                "join_chunks(",
                f"    results, row, chunks, {self._chunk_words}, {3 + self._region(i)}, "
                f"tl.load(row + {self._word(i)}),",
                f"    {inside}, {tail}, {self._count(v.kind)}, {reduction(v.op).init}, "
                f"{v.op}_, {v.op}_total,",
                ")",
            ]
        return function(f"join_{k}", ARGUMENTS, lines)

    def between(self, name: str, between: Between, shared: bool = False) -> list[str]:
        """A program per tensor, or several. After the last stage numbers per tensor are stored too, and steps may be
        skipped."""
        last = self._last(name)
        self.placed = shared
        nests, stores = between.nests, last.stores
        values = {i for nest in nests for i in nest.values} | set(last.values)
        stored = [s for nest in nests for s in nest.stores]
        done: set[int] = set()
        lines = [f"row = rows + tl.program_id(0).to(tl.int64) * {self._width}", *self._lengths()]
        if self.placed:
            lines += [
                "begin = n0 * tl.program_id(1) // tl.num_programs(1)",
                "n0 = n0 * (tl.program_id(1) + 1) // tl.num_programs(1) - begin",
            ]
        ends = name in ("scalars", f"before_{len(schedule(self.program).stages)}")
        skip = self.program.skip if ends else None
        early = () if skip is None else self.split.needed([skip])
        if any(self.program.values[i].op == "slot" for i in (*values, *early)):
            lines.append(f"numbers = slots + tl.load(row + 1) * {self.program.slots}")
        lines.append("live = tl.load(row) > 0")
        if skip is not None:
            lines += [
                *self._given(early),
                *self._once_per_tensor(early, done),
                f"live = live & ~{self.name(skip)}",
            ]
        made = [i for nest in nests for i in (*nest.kept, *nest.reductions)]
        lines += [
            *self._addresses(values, stored),
            *self._given(values | set(made)),
        ]
        for nest in nests:
            lines += [*self._once_per_tensor(nest.values, done), *self._nest(nest), BARRIER]
        lines += self._once_per_tensor(last.values, done)
        if stores:
            lines += [BARRIER, "if live:"]
            lines += [f"    store({self._at(n)}, 0, 1, {self.name(i)}, True)" for n, i in stores]
        self.placed = False
        return function(name, ARGUMENTS, lines)

    def _offset(self, kind: str) -> str:
        """What there is of a kind before the places that this is for."""
        lengths = "".join(f" * n{a}" for a in kind[1:])
        return f" + begin{lengths}" if self.placed and kind.startswith(self.axes[0]) else ""

    def _last(self, name: str) -> Stage:
        if name != "scalars":
            return Stage(())
        whole = [s for s in self.program.stores if self.program.buffer[s[0]].kind == TENSOR]
        return self.split.storing(whole)

    # -- a stage's passes --
    def _parts(self, stage: Stage) -> list[int]:
        return regions(self.program, stage)

    def _along_lines(self, stage: Stage) -> list[str]:
        """The pass over lines: over each once for every sum along it that others need, then for what it is for."""
        values, lines = self.program.values, self.axes[:-1]
        whole = [i for i in stage.reductions if i in self.reductions]
        mine = [i for i in self._parts(stage) if values[i].kind == lines]
        kept = kept_lines(self.program, stage)
        if not (whole or mine or kept or stage.stores):
            return []
        length = f"n{self.axes[-1]}"
        self.now = Pass(rows(lines, "first_line", "last_line"), columns(self.axes[-1], "0", length))
        roots = [i for _, i in stage.stores] + [values[i].args[0] for i in (*whole, *mine)]
        needed = self._needed([*roots, *(a for s in stage.lines for i in s for a in values[i].args)])
        fixed = [i for i in needed if self._fixed_kind(values[i].kind)]

        def on_lines() -> list[str]:
            body: list[str] = []
            done: set[int] = set()
            for sums in stage.lines:
                body += [*self._fixed(fixed, done), *self._line_sums(sums)]
                done.update(sums)
            body += self._fixed(fixed, done)
            stored = [(f"results + {self._kept_line(kept, i)}", i) for i in kept]
            body += [f"tl.store({to}, {self.name(i)}.to(tl.float64), mask=in_y)" for to, i in stored]
            body += [self._accumulator(i) for i in mine]
            inner = [self._line(i) for i in self._varying(roots)]
            inner += [self._added(i) for i in (*whole, *mine)]
            per_line: list[str] = []
            for n, i in stage.stores:
                kind = self.program.buffer[n].kind
                (per_line if self._fixed_kind(kind) else inner).append(self._stored(n, i))
            if inner:
                body += self._loop(self.now.inner, inner, self._kinds(stage.values, stage.stores, inner=True))
            to = self._o(lines)
            body += [f"tl.store({self._q(i)} + {to}, {self._total_of(i, 1)}, mask=in_y)" for i in mine]
            # Threads that share a line have all read what is its now.
            return body + ([BARRIER, *per_line] if per_line else [])

        body = on_lines()
        if stage.lines:
            self.at_hand = set()
            body = ["if WHOLE:", *indent(on_lines()), "else:", *indent(body)]
            self.at_hand = None
        assert self.now.outer is not None
        kinds = self._kinds(stage.values, stage.stores, inner=False) | ({lines} if mine else set())
        last = f"(end + {length} - 1) // {length}" if self.program.blocked else f"end // {length}"
        out = [f"first_line = begin // {length}", f"last_line = {last}"]
        out += [*map(self._accumulator, whole), *self._loop(self.now.outer, body, kinds)]
        for i in whole:
            total = self._joined_block(reduction(values[i].op), f"acc{i}", 1)
            total = self._joined_block(reduction(values[i].op), total, 0)
            out.append(f"tl.store(partials + {self._partial('chunk', i)}, {total})")
        return out

    def _line_sums(self, sums: Sequence[int]) -> list[str]:
        values = self.program.values
        inner = [self._line(i) for i in self._varying(values[i].args[0] for i in sums)]
        inner += [self._added(i) for i in sums]
        used = self._needed(values[i].args[0] for i in sums)
        lines = [
            *map(self._accumulator, sums),
            *self._loop(self.now.inner, inner, self._kinds(used, (), True)),
        ]
        for i in sums:
            op = reduction(values[i].op)
            length = f"n{self.axes[-1]}"
            if self.program.blocked:  # of which the last one is what is left
                length = f"tl.minimum(end - y * {length}, {length})"
            scale = f" / {length}.to(tl.float64)" if op.averaged else ""
            text = f"{self.name(i)} = ({self._total_of(i, 1)}{scale}).to(T)"
            lines.append(self._commented(text, values[i]))
        return lines

    def _across(self, kind: str, made: Sequence[int]) -> list[str]:
        """The pass of reductions to a kind other than that of lines.

        Where the places that share a chunk have more elements each than it has, they are taken one after another: then
        only those along the first axis that is reduced are visited which the chunk has.
        """
        inside, tail = self._prefix(kind)
        members = "".join(a for a in self.axes if a not in kind)
        gap = members[0]
        each, rest = self._after(self.axes, gap), self._count(members[1:])
        head = [
            f"inside = {inside}",
            "alone = inside > end - begin",
            "first_place = begin // inside",
            "n_places = (end - 1) // inside + 1 - first_place",
        ]
        one = kind[: self.axes.index(gap)] == ""
        group = [
            f"place = first_place{'' if one else ' + group'}",
            f"first = {_times('place', tail)}",
            f"last = {_times('(place + 1)' if one else '(place + tl.where(alone, 1, n_places))', tail)}",
            "low = tl.where(alone, " + _divided("tl.maximum(begin - place * inside, 0)", each) + ", 0)",
            "high = " + _divided("(tl.minimum(end - place * inside, inside) - 1)", each) + " + 1",
            f"high = tl.where(alone, high, n{gap})",
            *([] if rest == "1" else [f"low = low * ({rest})", f"high = high * ({rest})"]),
            *self._reduce(self.axes, kind, made, ("first", "last"), ("low", "high"), within=True),
        ]
        if one:
            return [*head, *group]
        return [*head, "for group in range(0, tl.where(alone, n_places, 1)):", *indent(group)]

    def _reduce(
        self,
        source: str,
        kind: str,
        made: Sequence[int],
        places: tuple[str, str],
        members: tuple[str, str],
        within: bool = False,
        making: Sequence[int] = (),
    ) -> list[str]:
        """Reductions of what has numbers along the axes ``source`` to a kind: each of its places, over the members.

        A thread has places of its own where those have few members. Elsewhere tiles are as for lines, or, of what
        is not elements, so that some of what is read lies side by side.
        """
        many = ["LINES", "COLUMNS"]
        if not within:
            many = ["LINES * COLUMNS // 16", "16"] if source[-1] in kind else ["4", "LINES * COLUMNS // 4"]
        outer, inner = reversed(many) if source[-1] in kind else many
        return [
            f"if {members[1]} - {members[0]} <= {FEW}:",
            *indent(
                self._reduced(
                    source, kind, made, (*places, "LINES * COLUMNS"), (*members, "1"), within, making
                )
            ),
            "else:",
            *indent(self._reduced(source, kind, made, (*places, outer), (*members, inner), within, making)),
        ]

    def _reduced(
        self,
        source: str,
        kind: str,
        made: Sequence[int],
        places: tuple[str, str, str],
        members: tuple[str, str, str],
        within: bool,
        making: Sequence[int],
    ) -> list[str]:
        """With tiles of a certain size."""
        values = self.program.values
        gone = "".join(a for a in source if a not in kind)
        outer, inner = (columns, rows) if source[-1] in kind else (rows, columns)
        self.now = Pass(outer(kind, *places), inner(gone, *members), within, making)
        roots = [values[i].args[0] for i in made]
        used = self._needed(roots)
        body = self._fixed([i for i in used if self._fixed_kind(values[i].kind)], set())
        body += map(self._accumulator, made)
        lines = [self._line(i) for i in self._varying(roots)]
        lines += map(self._added, made)
        body += self._loop(inner_side := self.now.inner, lines, self._kinds(used, (), inner=True))
        axis, mask = (0, "in_x") if inner_side.name == "y" else (1, "in_y")
        body += [
            f"tl.store({self._q(i)} + {self._o(kind)}, {self._total_of(i, axis)}, mask={mask})" for i in made
        ]
        assert self.now.outer is not None
        return self._loop(self.now.outer, body, self._kinds(used, (), inner=False) | {kind})

    # -- what is done once per tensor --
    def _nest(self, nest: Nest) -> list[str]:
        values, axes = self.program.values, axes_of(nest.kind, self.axes)
        whole = [i for i in nest.reductions if values[i].kind == TENSOR]
        lines = [f"count = tl.where(live, {self._count(axes)}, 0)"]
        if whole or nest.kept or nest.stores:
            lines += self._once(nest, axes, whole)
        for kind in dict.fromkeys(values[i].kind for i in nest.reductions if i not in whole):
            made = [i for i in nest.reductions if values[i].kind == kind]
            gone = "".join(a for a in axes if a not in kind)
            lines += [
                f"places = tl.where(live, {self._count(kind)}, 0)",
                f"members = {self._count(gone)}",
                *self._reduce(axes, kind, made, ("0", "places"), ("0", "members"), making=nest.kept),
            ]
        return lines

    def _once(self, nest: Nest, axes: str, whole: Sequence[int]) -> list[str]:
        """The pass over a nest's places: what is kept, stored, and made one number per tensor."""
        values = self.program.values
        self.now = Pass(None, Side("x", axes, "LINES * COLUMNS", "", "0", "count"), making=nest.kept)
        roots = [*(i for _, i in nest.stores), *(values[i].args[0] for i in whole), *nest.kept]
        used = self._needed(roots)
        lines = [self._line(i) for i in used if values[i].kind != TENSOR]
        lines += map(self._added, whole)
        lines += [
            f"tl.store({self._q(i)} + {self._o(nest.kind)}, {self.name(i)}.to(tl.float64), mask=in_x)"
            for i in nest.kept
        ]
        lines += [self._stored(n, i) for n, i in nest.stores]
        kinds = self._kinds(used, nest.stores, inner=True) | ({nest.kind} if nest.kept else set())
        out = [*map(self._accumulator, whole), *self._loop(self.now.inner, lines, kinds)]
        return out + [f"tl.store({self._q(i)}, {self._total_of(i, 0)})" for i in whole]

    def _once_per_tensor(self, values: Iterable[int], done: set[int]) -> list[str]:
        """What there is one of per tensor, unless it is there."""
        new = [i for i in values if self.program.values[i].kind == TENSOR and i not in done]
        done.update(new)
        return [self._line(i) for i in new]

    # -- loops --
    def _loop(self, side: Side, body: Sequence[str], kinds: Iterable[str]) -> list[str]:
        """Over the places of one side of tiles. kinds: those whose place is known here, and not before."""
        name, both = side.name, side == self.now.inner and self.now.outer is not None
        kinds = sorted(kinds)
        lines = [
            f"{name} = ({name}0 + tl.arange(0, {side.size})){side.shaped}",
            f"in_{name} = {name} < {side.last}",
            *self._digits(side),
            *(f"{self._o(kind)} = {self._place(kind)}" for kind in kinds if kind != ELEMENT),
        ]
        ragged = both and self.program.blocked
        if ELEMENT in kinds or (both and self.now.within) or ragged:
            lines.append(f"at = {self._place(ELEMENT)}")
        if both:
            more = " & (at >= begin) & (at < end)" if self.now.within else " & (at < end)" if ragged else ""
            lines.append(f"there = in_y & in_x{more}")
        if side == self.now.inner and self.at_hand is not None:  # from the first place to the last at once
            lines = [line for line in lines if line not in self.at_hand]
            self.at_hand.update(lines)
            return [*([f"{name}0 = {side.first}"] if lines else []), *lines, *body]
        return [f"for {name}0 in range({side.first}, {side.last}, {side.size}):", *indent([*lines, *body])]

    def _digits(self, side: Side) -> list[str]:
        """The place along each of a side's axes; the compiler drops those that nothing needs."""
        if len(side.axes) < 2:
            return [f"i{a} = {side.name}" for a in side.axes]
        lines, rest = [], side.name
        for a in reversed(side.axes[1:]):
            lines.append(f"i{a} = {rest} % n{a}")
            rest = f"({rest} // n{a})"
        return [*lines, f"i{side.axes[0]} = {rest}"]

    def _place(self, kind: str) -> str:
        axes, terms = axes_of(kind, self.axes), []
        for side in self.now.sides:
            if side.axes in axes:
                terms.append(_times(side.name, self._after(axes, side.axes[-1])))
            else:
                terms += [_times(f"i{a}", self._after(axes, a)) for a in side.axes if a in axes]
        return " + ".join(terms)

    def _o(self, kind: str) -> str:
        return "at" if kind == ELEMENT else f"o{kind}"

    def _mask(self, kind: str) -> str:
        """Which places of a tile there are, of those that a value of this kind has."""
        axes = axes_of(kind, self.axes)
        mine = [side.name for side in self.now.sides if set(side.axes) & set(axes)]
        return "there" if len(mine) == 2 else f"in_{mine[0]}"

    def _fixed_kind(self, kind: str) -> bool:
        """Whether the loop inside finds it computed."""
        return kind != TENSOR and not set(axes_of(kind, self.axes)) & set(self.now.inner.axes)

    def _kinds(self, values: Iterable[int], stores: Iterable[tuple[str, int]], inner: bool) -> set[str]:
        """The kinds of what is read or written in the loop inside, or in the one outside alone."""
        found = [(i, self.program.values[i]) for i in values]
        lying = {v.kind for i, v in found if v.op in DRAWS or self._lies(i, v)}
        lying |= {self.program.buffer[n].kind for n, _ in stores}
        return {k for k in lying - {TENSOR} if self._fixed_kind(k) != inner}

    def _fixed(self, fixed: Sequence[int], done: set[int]) -> list[str]:
        """What is one number for all of the loop inside, as far as the sums along lines that it needs are there."""
        out = []
        late = {i for i in fixed if i in self.split.inline and i not in self.stored_lines} - done
        for i in fixed:
            if i in late or (not self._found(i) and late.intersection(self.program.values[i].args)):
                late.add(i)
            elif i not in done:
                done.add(i)
                out.append(self._line(i))
        return out

    def _varying(self, roots: Iterable[int]) -> list[int]:
        """What has to be computed in the loop inside."""
        kinds, there = self.program.values, self.at_hand or ()
        found = [
            i
            for i in self._needed(roots)
            if kinds[i].kind != TENSOR and not self._fixed_kind(kinds[i].kind) and i not in there
        ]
        if self.at_hand is not None:
            self.at_hand.update(found)
        return found

    def _needed(self, roots: Iterable[int]) -> list[int]:
        """The values that the roots need, but for what was computed before."""
        needed: set[int] = set()
        todo = list(roots)
        while todo:
            i = todo.pop()
            if i not in needed:
                needed.add(i)
                if not self._found(i) and i not in self.split.inline:
                    todo += self.program.values[i].args
        return sorted(needed)

    # -- reductions --
    def _accumulator(self, i: int) -> str:
        op = reduction(self.program.values[i].op)
        return f"acc{i} = tl.full({self.now.shape}, {op.init}, {self._joined_in(op)})"

    def _added(self, i: int) -> str:
        v, mask = self.program.values[i], "in_x" if self.now.outer is None else "there"
        op = reduction(v.op)
        new = f"tl.where({mask}, {self.name(v.args[0])}.to({self._joined_in(op)}), {op.init})"
        return f"acc{i} = {op.join.format(f'acc{i}', new)}"

    def _joined_in(self, op: Reduction) -> str:
        return "T" if op.exact else "tl.float64"

    def _joined_block(self, op: Reduction, block: str, axis: int) -> str:
        """The numbers of a block along an axis, joined; Triton knows sums."""
        return f"tl.sum({block}, {axis})" if op.triton else f"tl.reduce({block}, {axis}, {op.name}_)"

    def _total_of(self, i: int, axis: int) -> str:
        """What was added up, in the shape in which the loop outside has its numbers."""
        total = self._joined_block(reduction(self.program.values[i].op), f"acc{i}", axis)
        return total if self.now.outer is None else f"{total}{self.now.outer.shaped}"

    # -- where things are --
    @property
    def _width(self) -> str:
        found = schedule(self.program).results
        return f"(HEAD + {len(self.program.buffers) + self.program.axes + len(found) + self.program.draws})"

    @property
    def _chunk_words(self) -> int:
        return 4 + len(regions(self.program))

    def _lengths(self) -> list[str]:
        first = len(self.program.buffers)
        return [f"n{a} = tl.load(row + HEAD + {first + int(a)})" for a in self.axes]

    def _addresses(
        self, values: Iterable[int], stores: Iterable[tuple[str, int]], aligned: str = "False"
    ) -> list[str]:
        """Of the buffers that loops read or write. aligned: when those of elements are known to be."""
        loads = [v for i in values if (v := self.program.values[i]).op == "load" and v.kind != TENSOR]
        used = {*(v.attr for v in loads), *(n for n, _ in stores)}
        lines = []
        for n, k in self.buffer_index.items():
            if n in used:
                buffer = self.program.buffer[n]
                each = aligned if buffer.kind == ELEMENT else "False"
                address = f"pointer(row + HEAD + {k}, {POINTERS[buffer.dtype]}, {each})"
                lines.append(f"a{k} = {address}{self._offset(buffer.kind)}")
        return lines

    def _given(self, values: Iterable[int]) -> list[str]:
        """Pointers to results, of loops that were or will be."""
        found = [i for i in sorted(values) if i in schedule(self.program).results]
        begin = {i: f"results + tl.load(row + {self._word(i)})" for i in found}
        return [f"{self._q(i)} = {begin[i]}{self._offset(self.program.values[i].kind)}" for i in found]

    def _word(self, i: int) -> str:
        """Which word of a row says where the results of a value begin."""
        k = schedule(self.program).results.index(i)
        return f"HEAD + {len(self.program.buffers) + self.program.axes + k}"

    def _q(self, i: int) -> str:
        return f"q{schedule(self.program).results.index(i)}"

    def _region(self, i: int) -> int:
        """Which of the words that a chunk has for its part results."""
        return regions(self.program).index(i)

    def _kept_line(self, kept: Sequence[int], i: int) -> str:
        """Where among the results a sum along a line is kept: the last word of a chunk says where those begin."""
        first = f"tl.load(piece + {self._chunk_words - 1})"
        place = self._place(self.axes[:-1])
        return f"{first} + ({place}) * {most_kept_lines(self.program)} + {list(kept).index(i)}"

    def _count(self, axes: str) -> str:
        return " * ".join(f"n{a}" for a in axes) or "1"

    def _after(self, axes: str, a: str) -> str:
        """How many places the axes after one have."""
        return self._count(axes[axes.index(a) + 1 :])

    def _prefix(self, kind: str) -> tuple[str, str]:
        """How many elements, and how many numbers of this kind, each place along the axes before its first gap has."""
        inside = self.axes[next(k for k, a in enumerate(self.axes) if a not in kind) :]
        return self._count(inside), self._count("".join(a for a in inside if a in kind))

    # -- values --
    def _found(self, i: int) -> bool:
        """Whether it was computed before."""
        if i in self.stored_lines:
            return True
        return self.split.given(i) and i not in self.now.making

    def _lies(self, i: int, v: Value) -> bool:
        """Whether it is read from memory, at its place."""
        return v.kind != TENSOR and (v.op == "load" or self._found(i))

    def _line(self, i: int) -> str:
        text = self._read(i, v := self.program.values[i])
        return super()._line(i) if text is None else self._commented(f"{self.name(i)} = {text}", v)

    def _read(self, i: int, v: Value) -> str | None:
        """What was computed before, or lies in memory."""
        if v.kind == TENSOR and is_reduction(v.op):
            if i in self.reductions:
                return f"{self._joined(i)}.to(T)"
            return f"(tl.load({self._q(i)}){self._scale(v)}).to(T)"
        if v.kind == TENSOR or not self._lies(i, v):
            return None
        o, mask = self._o(v.kind), self._mask(v.kind)
        if i in self.stored_lines:
            return f"tl.load(results + {self._kept_line(self.stored_lines, i)}, mask={mask}, other=0).to(T)"
        if v.op == "load":
            return f"load_tile(a{self.buffer_index[v.attr]}, {o}, {mask})"
        return f"(tl.load({self._q(i)} + {o}, mask={mask}, other=0){self._scale(v)}).to(T)"

    def _expression(self, v: Value) -> str:
        if v.op in DRAWS:
            return f"{v.op}({', '.join(self.arguments(v))}, {v.attr}, which, at).to(T)"
        return super()._expression(v)

    def _scale(self, v: Value) -> str:
        """What makes an average of a sum."""
        if not is_reduction(v.op) or not reduction(v.op).averaged:
            return ""
        source = axes_of(self.program.values[v.args[0]].kind, self.axes)
        gone = "".join(a for a in source if a not in axes_of(v.kind, self.axes))
        return f" / ({self._count(gone)}).to(tl.float64)"

    def _stored(self, name: str, i: int) -> str:
        kind = self.program.buffer[name].kind
        return f"store_tile(a{self.buffer_index[name]}, {self._o(kind)}, {self._mask(kind)}, {self.name(i)})"

    def _prologue(self, stage: Stage) -> list[str]:
        """What there is one of per tensor."""
        whole = [i for i in stage.values if self.program.values[i].kind == TENSOR]
        slots = any(self.program.values[i].op == "slot" for i in whole)
        numbers = f"numbers = slots + tl.load(row + 1) * {self.program.slots}"
        return [*([numbers] if slots else []), *map(self._line, whole)]

    def arguments(self, v: Value) -> list[str]:
        """Masks that meet in a tile are tiles."""
        texts = super(Body, self).arguments(v)
        if v.kind == TENSOR or v.op in DRAWS or element_op(v).types != "bb>b":
            return texts
        tile = " + ".join(side.name for side in self.now.sides)
        kinds = [self.program.values[i].kind for i in v.args]
        return [f"spread({t}, {tile})" if k == TENSOR else t for t, k in zip(texts, kinds, strict=True)]


def _divided(place: str, count: str) -> str:
    return place if count == "1" else f"{place} // ({count})"


def _times(place: str, count: str) -> str:
    return place if count == "1" else f"{place} * ({count})" if " " in count else f"{place} * {count}"
