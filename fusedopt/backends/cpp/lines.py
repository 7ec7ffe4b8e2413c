"""Programs whose lines are all equally long, as blocks of codes are: loops over several lines at a time.

What a line comes to, and what is made of that, has to wait for all of the line: with several of them a processor has
the others to work on meanwhile, and vectors across them. In the code ``k`` is which of the lines, ``c`` a place in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from ...ir.ops import ELEMENT, TENSOR, reduction
from ...ir.program import Value, identifier
from ...ir.stages import Stage
from .. import blocks
from ..c_family import indent
from .blocks import Blocks

AT_ONCE = 512
"""Elements: what is noted of so many has room in the fastest cache."""


class _Part(NamedTuple):
    """What is done at all of the lines before the next is done at any."""

    code: list[str]
    once: Sequence[int] = ()
    """What it computes once for each line,"""
    places: Sequence[int] = ()
    """and at each place of one;"""
    roots: Iterable[int] = ()
    """and what it stores, or adds up."""


class Lines(Blocks):
    """The functions of such a program."""

    notes: Sequence[int] = ()
    """What is computed for what a line comes to, and needed once more: kept in arrays. So is what has fewer bits in
    memory: of loops with numbers of several sizes compilers make slow vectors."""
    noted: Sequence[int] = ()
    """Those that are there already."""
    single = False
    """Whether the lines of the loop being written are gone over one by one."""

    def _loop(self, axes: str, stage: Stage, kept: Sequence[int] = ()) -> list[str]:
        if axes != self.program.all_axes or kept or set(stage.reductions) - set(self.reductions):
            return super()._loop(axes, stage, kept)
        n = f"n{axes[-1]}"
        return [
            f"constexpr int64_t many = {max(AT_ONCE // self.program.line, 1)};",
            f"for (int64_t line = begin / {n}; line < {self.last_line('end')};) {{",
            f"  line += with_lines<many, {n}>(end - line * {n}, [&](auto lines, auto length) FUSEDOPT_INLINE {{",
            *indent(indent(self._several(stage))),
            "  });",
            "}",
        ]

    def _several(self, stage: Stage) -> list[str]:
        self.axes, self.making = self.program.all_axes, ()
        parts, n = list(self._parts(stage)), f"n{self.axes[-1]}"
        arrays, body = [f"T k{i}[many][{n}];" for i in sorted({*self.noted})], list[str]()
        self.notes = self.noted = ()
        # What is ahead is asked for bit by bit, where most is done at each element: all at once would be waited for.
        touched = [name for name in self.touched(stage) if self.program.buffer[name].kind == ELEMENT]
        most = max(parts, key=lambda part: len(part.places))
        most.code[:0] = [f"fetch<{n}>({identifier(name)} + first + ahead);" for name in touched]
        made: set[int] = set()
        for at, part in enumerate(parts):
            later = set[int]().union(*map(self._needed_by, parts[at + 1 :]))
            kept = [i for i in part.once if i in later]
            given = sorted(self._needed_by(part) & made)
            made.update(kept)
            arrays += [f"{self.type_of(i)} f{i}[many];" for i in kept]
            inner = [
                *self._at(stage, part.code),
                *(f"const {self.type_of(i)} {self.name(i)} = f{i}[k];" for i in given),
                *part.code,
                *(f"f{i}[k] = {self.name(i)};" for i in kept),
            ]
            if part.places:
                body += ["for (int64_t k = 0; k < lines; ++k) {", *indent(inner), "}"]
            else:
                body += ["each(lines, [&](int64_t k) FUSEDOPT_INLINE {", *indent(inner), "});"]
        return [*arrays, *body]

    def _at(self, stage: Stage, code: Sequence[str]) -> list[str]:
        """Where line k of several is, as far as this code asks."""
        if self.program.blocked:
            return [f"[[maybe_unused]] const int64_t first = (line + k) * n{self.axes[-1]}, o0 = line + k;"]
        values, buffer = self.program.values, self.program.buffer
        kinds = {values[i].kind for i in stage.values} | {buffer[n].kind for n, _ in stage.stores}
        found: list[str] = []
        for text in reversed(blocks.Blocks._index(self, kinds)):
            name = text.removeprefix("[[maybe_unused]] ").split()[2]
            if any(re.search(rf"\b{name}\b", line) for line in (*code, *found)):
                found.insert(0, re.sub(r"\bline\b", "(line + k)", text.removeprefix("[[maybe_unused]] ")))
        return found

    def where(self, outer: str) -> list[str]:
        return super().where(outer) if self.single else blocks.Blocks.where(self, outer)

    def line(self, axes: str, stage: Stage, kept: Sequence[int] = ()) -> list[str]:
        self.single = True
        if axes == self.program.all_axes:
            self.noted = self._narrow(stage)
        found = super().line(axes, stage, kept)
        self.single, self.noted = False, ()
        return found

    def _index(self, kinds: Iterable[str]) -> list[str]:
        found = super()._index(kinds)
        if self.axes != self.program.all_axes:
            return found
        n = f"n{self.axes[-1]}"
        arrays = [f"T k{i}[{n}];" for i in self.noted]
        return [
            *found,
            f"[[maybe_unused]] constexpr auto length = Fixed<{n}>{{}};",
            *arrays,
            *(line for i in self.noted for line in self._widened(i).code),
        ]

    def _needed_by(self, part: _Part) -> set[int]:
        """What a part needs, besides what it makes itself."""
        args = {a for i in (*part.once, *part.places) for a in self.program.values[i].args}
        return {*args, *part.roots} - {*part.once}

    # -- the parts --
    def _parts(self, stage: Stage) -> Iterator[_Part]:
        values = self.program.values
        fixed = [i for i in stage.values if values[i].kind != TENSOR and not self._along_line(values[i].kind)]
        done: set[int] = set()
        narrow = self._narrow(stage)
        yield from map(self._widened, narrow)
        self.noted = narrow
        early = self._early(stage) if stage.lines else []
        later = replace(stage, stores=tuple(s for s in stage.stores if s not in early))
        self.notes = self._worth_noting(later, early)
        for at, sums in enumerate(stage.lines):
            yield from self._once(fixed, done)
            yield from self._summed(sums, early if at == 0 else [])
            done.update(sums)
        yield from self._once(fixed, done)
        yield from self._rest(later)

    def _narrow(self, stage: Stage) -> list[int]:
        """What is loaded, and has fewer bits in memory."""
        values = self.program.values
        return [i for i in stage.values if values[i].op == "load" and self._is_narrow(str(values[i].attr))]

    def _is_narrow(self, buffer: str) -> bool:
        found = self.program.buffer[buffer]
        return found.kind == ELEMENT and found.dtype.itemsize < self.program.compute.itemsize

    def _widened(self, i: int) -> _Part:
        load = super()._expression(i, self.program.values[i])
        return _Part(self.over([f"{self._noted_at(i)} = {load};"], lanes=False), places=[i])

    def _once(self, fixed: Sequence[int], done: set[int]) -> Iterator[_Part]:
        """What is one number for a line, as far as what it needs is there."""
        before = {*done}
        if code := self._fixed(fixed, done):
            yield _Part(code, once=sorted(done - before))

    def _early(self, stage: Stage) -> list[tuple[str, int]]:
        """What can be stored before any sums are there: nothing that comes later loads what it overwrites."""
        values, waits = self.program.values, self.split.inline
        stores = [
            (n, i)
            for n, i in stage.stores
            if self._along_line(self.program.buffer[n].kind)
            and not self._is_narrow(n)
            and waits.isdisjoint(self.split.needed([i]))
        ]
        later = self._varying(
            self._roots(replace(stage, stores=tuple(s for s in stage.stores if s not in stores)))
        )
        loaded = {values[i].attr for i in later if values[i].op == "load" and i not in self.noted}
        return [s for s in stores if s[0] not in loaded]

    def _worth_noting(self, later: Stage, early: Sequence[tuple[str, int]]) -> list[int]:
        """What is computed with the first sums along a line, and is what the rest of it begins with."""
        values = self.program.values
        sums = [values[i].args[0] for level in later.lines for i in level]
        first = set(self._varying([*sums, *(i for _, i in early)]))
        rest = set(self._varying(self._roots(later))) - first
        needed = {a for i in rest for a in values[i].args} | self._roots(later)
        needed |= {values[i].args[0] for level in later.lines for i in level if reduction(values[i].op).exact}
        return sorted(i for i in first & needed if values[i].op != "load")

    def _summed(self, sums: Sequence[int], early: Sequence[tuple[str, int]]) -> Iterator[_Part]:
        """What is joined in any order is joined once it is noted: of loops that do only that there are vectors."""
        values = self.program.values
        args = {i: values[i].args[0] for i in sums}
        roots = [*args.values(), *(i for _, i in early)]
        made = self._varying(roots)
        new = [i for i in self.notes if i in made and i not in self.noted]
        exact = [i for i in sums if reduction(values[i].op).exact and args[i] in (*new, *self.noted)]
        rest = [i for i in sums if i not in exact]
        inner = [
            *map(self._line, made),
            *map(self._added, rest),
            *map(self._note, new),
            *map(self._store, early),
        ]
        totals = [f"const T {self.name(i)} = T({self.total(i)}{self._averaged_over(i)});" for i in rest]
        yield _Part(
            [*map(self._accumulator, rest), *self.over(inner, bool(rest)), *totals], rest, made, roots
        )
        self.noted = [*self.noted, *new]
        joined = [f"const T {self.name(i)} = joined<{values[i].op}_>(k{args[i]}[k], length);" for i in exact]
        yield _Part(joined, once=exact)

    def _rest(self, stage: Stage) -> Iterator[_Part]:
        """What is left once all sums are there; what is narrow is stored in loops of its own."""
        values = self.program.values
        along = [s for s in stage.stores if self._along_line(self.program.buffer[s[0]].kind)]
        narrow = [s for s in along if self._is_narrow(s[0])]
        roots = self._roots(stage)
        made = self._varying(i for i in roots if self._along_line(values[i].kind))
        new = sorted({i for _, i in narrow} - {*self.noted})
        inner = [
            *map(self._line, made),
            *map(self._added, stage.reductions),
            *map(self._note, new),
            *(self._store(s) for s in along if s not in narrow),
        ]
        once = [
            self.store(n, self._place(self.program.buffer[n].kind), i)
            for n, i in stage.stores
            if (n, i) not in along
        ]
        yield _Part([*self.over(inner, bool(stage.reductions)), *once], (), made, roots)
        self.noted = [*self.noted, *new]
        for n, i in narrow:
            yield _Part(self.over([self.store(n, "i", i, self._noted_at(i))], False), places=[i])

    # -- lines of code --
    def _note(self, i: int) -> str:
        return f"{self._noted_at(i)} = {self.name(i)};"

    def _noted_at(self, i: int) -> str:
        return f"k{i}[c]" if self.single else f"k{i}[k][c]"

    def _store(self, store: tuple[str, int]) -> str:
        return self.store(store[0], "i", store[1])

    def _expression(self, i: int, v: Value) -> str:
        return self._noted_at(i) if i in self.noted else super()._expression(i, v)

    def _varying(self, roots: Iterable[int]) -> list[int]:
        found: set[int] = set()
        todo = [*roots]
        todo += [a for i in todo if i in self.making for a in self.program.values[i].args]
        while todo:
            i = todo.pop()
            if i not in found:
                found.add(i)
                if i not in self.noted and not self.split.given(i):
                    todo += self.program.values[i].args
        return [i for i in sorted(found) if self._along_line(self.program.values[i].kind)]
