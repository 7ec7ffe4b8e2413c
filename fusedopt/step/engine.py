"""One optimizer step: what was bound before is repeated; else buckets are made, and bound or launched.

Parameters whose callbacks all fuse are updated in place by kernels: one launch per stage for all that share a program.
Where a callback has no fused form, its parameters are stepped on work copies, see `eager`; results are stored when
everything has succeeded. The reference backend is the same with no program at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..backends import Kernel
from ..extension import leaf
from ..trace.signals import Begins
from . import items, launching, sharded, sharing, totals, transforms
from .bound import MOST, RECENT, BoundStep, Steps, Unbound, unbindable
from .buckets import Bucket, Buckets
from .commit import Change
from .eager import Eager
from .items import Groups, Item
from .launching import GraphScalars, Launched
from .rounds import Round
from .scaling import Norm, Scaling
from .verdicts import ActsAfterAll


class Engine:
    """Steps parameters by a callback list. It holds no tensors: state lives with the optimizer.

    ``buckets`` has what callbacks are compiled to. ``rounds`` are those of the last step, ``resident`` its launches
    whose scalars live on the device. ``bound`` are the structures of steps that were bound, the last one
    first; without ``binds`` every step looks at each tensor; ``steps``: how they went. ``among``: the
    parameters, by their ids, that steps are about, whatever gradients others have; None: all. ``after``: how steps went
    before, and why this engine was made.
    """

    def __init__(
        self, buckets: Buckets, among: frozenset[int] | None = None, after: tuple[Steps, str] | None = None
    ) -> None:
        self.buckets, self.among = buckets, among
        self.rounds: list[Round] = []
        self.resident: GraphScalars | None = None
        self.binds = True
        self.bound: list[BoundStep] = []
        self.steps, self._made = after or (Steps(), "")
        self._eager = Eager(self.buckets)
        self._launched: list[tuple[Kernel, int]] = []
        self._last: BoundStep | None = None
        self._why = ""

    @property
    def norm(self) -> Norm | None:
        """How the last step's norm was taken."""
        return next((each for each in self.rounds if isinstance(each, Norm)), None)

    @property
    def launched(self) -> list[tuple[Kernel, int]]:
        """The kernels of the last step's launches, and how many tensors each went over."""
        return self._launched if self._last is None else self._last.stepped()

    @property
    def read(self) -> Any:
        """What the last step took for granted around it (``buckets.read``)."""
        return self.buckets.read if self._last is None else self._last.read

    def repeat(self, scaling: Scaling) -> bool:
        """Do the step if it is of a structure that was bound; else nothing has changed."""
        whys = []
        for bound in self.bound:
            why = (self.buckets.changed(bound.read) if bound.read else None) or bound.run(scaling)
            if why is None:
                if bound is not self._last:
                    self._take(bound)
                self.steps.note()
                return True
            whys.append(why)
        self._why = whys[0] if whys else self._made
        return False

    def step(
        self,
        todo: list[Item],
        scaling: Scaling,
        groups: Groups | None = None,
        bind: bool = False,
        why: str | None = "",
    ) -> None:
        """Step every item: its ``home`` is updated in place, its ``state`` holds the new state.

        ``groups``: theirs, which get what ``item.state`` holds together with parameters. ``bind``: a step of the same
        structure may follow, so this one is bound, if it can be; ``why``: it cannot be; None: it is a part of the last.

        If a callback or the compiler raises, nothing has changed.
        """
        saved = self.buckets.verdicts.saved()
        sharing.keep_apart(todo)
        try:
            while True:
                try:
                    plans, unfused = self._prepared(todo)
                    if not bind or groups is None:
                        if why is not None:
                            self._note(why)
                    elif self._bind(plans, unfused, scaling, groups):
                        return
                    copies = self._eager.run(plans, unfused, scaling)
                    break
                except ActsAfterAll:  # from the beginning, in the order of a plain loop
                    continue
                except Begins:
                    assert groups is not None  # without them nothing is traced
                    groups.settle(todo)
            self._say(plans, copies)
        except BaseException:
            self.buckets.verdicts.restore(saved)
            self._eager.tidy()
            raise
        stores: list[Change] = []
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for item, work in copies:
            copied, changes, new = items.stored(item, work, self.buckets.state_dtype)
            pairs += copied
            stores += [*changes, launching.handed(item, new, groups)]
        stores += items.copying(pairs, transforms.active())
        launched, rounds = launching.run(plans, scaling, groups, stores)
        norm = self._eager.norm
        self._last, self.rounds = None, [*([norm] if norm else []), *rounds]
        before = [counted for each in rounds for counted in each.kernels]
        self._launched = [*self._eager.launched, *before, *launching.counts(launched)]
        self.resident = self._scalars(launched, self.rounds)
        if norm is not None:
            norm.let_go()
        if groups is not None:  # those of other classes, whose state is a part of theirs
            kept = {id(item) for item in (*unfused, *(i for plan in plans for i in plan.items))}
            groups.keep([item for item in todo if id(item) not in kept])

    def measure(self, todo: list[Item], scaling: Scaling) -> None:
        """Take the norm of these items' gradients, and step none."""
        plans, unfused = self._looked_at(todo, self._prepared)
        norm = launching.norm_of(plans, unfused, scaling)
        if norm is not None:
            norm.run([])
            norm.let_go()
        self._last, self.rounds = None, [norm] if norm else []

    def _looked_at(
        self, todo: list[Item], prepare: Callable[[list[Item]], tuple[list[Bucket], list[Item]]]
    ) -> tuple[list[Bucket], list[Item]]:
        """What is made of the items where none is stepped: what the optimizer has stays as it is."""
        while True:
            try:
                return prepare(todo)
            except ActsAfterAll:
                continue
            except Begins:
                for item in todo:
                    items.settled(item)

    def _prepared(self, todo: list[Item]) -> tuple[list[Bucket], list[Item]]:
        """Plans, and the items that are stepped on work copies: all, where totals are to be taken and not all fuse."""
        plans, unfused = self.buckets.prepare(sharded.localized(todo))
        if unfused and self.buckets.totalling:
            if self.buckets.backend != "reference":
                self.buckets.verdicts.parted(self.buckets.totalling)
            unfused += [sharded.unfused(item) for plan in plans for item in plan.items]
            plans = []
        return plans, unfused

    def _bind(self, plans: list[Bucket], unfused: list[Item], scaling: Scaling, groups: Groups) -> bool:
        """Bind a step of these plans and do it. If that cannot be, the reason is noted, and nothing has changed."""
        try:
            if not self.binds:
                raise Unbound
            if unfused:
                raise Unbound(f"{len(unfused)} of its parameters are stepped by callbacks that run eagerly")
            if why := unbindable(plans):
                raise Unbound(why)
            if not plans or not leaf.available():
                raise Unbound("no parameter has a gradient" if not plans else leaf.extension_status()[1])
            bound, launched = self._bound(plans, scaling, groups)
            self._say(plans, [])
            if why := bound.run(scaling):
                raise Unbound(why)
        except Unbound as why:
            self._note(str(why))
            return False
        self._note(self._why)
        bound.read = self.buckets.read
        bound.resident = self._scalars(launched, bound.rounds)
        self._take(bound)
        return True

    def _scalars(self, launched: list[Launched], rounds: list[Round]) -> GraphScalars:
        return GraphScalars(launched, rounds, functools.partial(self.buckets.changed, self.buckets.read))

    def _take(self, bound: BoundStep) -> None:
        """Note which structure the last step had; those that were longest not seen are dropped."""
        self.bound = [bound, *(b for b in self.bound if b is not bound)][:MOST]
        self.rounds, self.resident, self._last = bound.rounds, bound.resident, bound

    def _bound(
        self, plans: list[Bucket], scaling: Scaling, groups: Groups
    ) -> tuple[BoundStep, list[Launched]]:
        todo = [item for plan in plans for item in plan.items]
        calls = any(plan.trace.externs is not None for plan in plans)  # which are made for all rows
        native = all(plan.known.backend.native for plan in plans) and not calls
        if native and not any(map(sharded.is_shard, todo)):
            plans = [*plans, *self._resting(groups.resting(todo, scaling, self.among), plans)]
        tables, shared = [], launching.together(plans)
        for group in shared:
            for plan in group:
                for item in plan.items:
                    item.lay_out(plan.by_rows)
            tables.append(Launched(group, launching.table(group, scaling)))
        norm = launching.norm_of(plans, [], scaling)
        if norm is not None and norm.eager:
            raise Unbound("the norm is of tensors spread over processes, and is torch's")
        rounds = [*([norm] if norm else []), *launching.totals_of(shared, scaling, groups)]
        try:
            return BoundStep(groups, tables, rounds, scaling, self.among), tables
        except ValueError as error:  # a number that only Python can hold
            raise Unbound(str(error)) from None
        finally:
            for entry in tables:
                entry.launch.let_go()
            for each in rounds:
                each.let_go()

    def _resting(self, resting: list[Item], plans: list[Bucket]) -> list[Bucket]:
        """Plans for parameters that have no gradient now, as far as kernels of these plans step them when they have."""
        known = {id(plan.known) for plan in plans}
        usable = [item for item in resting if items.dense(item.param) and item.walkable()]
        try:
            found = [plan for _, plan in self.buckets.traced(usable)]
        except Begins:  # they are asked when they step
            return []
        return [
            plan
            for plan in found
            if isinstance(plan, Bucket) and id(plan.known) in known and not unbindable([plan])
        ]

    def _note(self, why: str) -> None:
        """Note why a step was bound anew, or not at all."""
        self.buckets.forget()
        self.steps.note(why, anew=True)
        verdicts = self.buckets.verdicts
        told = leaf.native is None or self.buckets.backend == "reference" or verdicts.all()
        if self.steps.keeps_failing and not told:
            verdicts.warn(
                "anew",
                f"most of the last {RECENT} steps took Python work for every tensor, which is slow: {why}. Remedy: "
                "leave between steps as it is what this names; opt.explain() says how each step went",
            )

    def foresee(self, todo: list[Item]) -> list[tuple[Kernel, int]]:
        """What a step of these items would launch, as far as that is known before callbacks run eagerly."""
        plans, _ = self._looked_at(todo, lambda todo: self.buckets.prepare(sharded.localized(todo)))
        counts: dict[Kernel, int] = {}
        for round_ in range(max((len(plan.known.rounds) for plan in plans), default=0)):
            found = [
                (plan, plan.known.rounds[round_][1]) for plan in plans if len(plan.known.rounds) > round_
            ]
            for plan, kernel in found:
                counts[kernel] = counts.get(kernel, 0) + len(plan.items)
            sums = {name for _, kernel in found for name in totals.sums(kernel.program)}
            if sums:
                join = totals.join_kernel(plans[0])
                counts[join] = counts.get(join, 0) + len(sums)
        for plan in plans:
            counts[plan.kernel] = counts.get(plan.kernel, 0) + len(plan.items)
        return list(counts.items())

    def rounds_of(self) -> dict[Kernel, int | None]:
        """Which round of sums a kernel is for, counted from 1; None if it joins sums. Others are not among them."""
        known = [entry for found in self.buckets.known.values() for entry in found]
        out: dict[Kernel, int | None] = {
            kernel: r + 1 for entry in known for r, (_, kernel) in enumerate(entry.rounds)
        }
        for r, each in enumerate(self.rounds):
            out |= dict.fromkeys((kernel for kernel, _ in each.kernels), None)
            out |= dict.fromkeys((one.kernel for one in each.summing), r + 1)
        return out

    def _say(self, plans: list[Bucket], copies: list[tuple[Item, Item]]) -> None:
        """Warn of what runs eagerly and of what does nothing."""
        verdicts = self.buckets.verdicts
        if self.buckets.backend != "reference":
            verdicts.say()
            whole = [work for _, work in copies if type(work) is sharded.Whole]
            tensors = [t for item in whole for t in (item.param, item.grad) if not items.walkable(t)]
            if tensors:
                kinds = ", ".join(sorted({type(t).__name__ for t in tensors}))
                what = f"tensors of type {kinds} are stepped unfused, by torch's own operations on them"
                verdicts.warn("whole", what)
        if plans or copies:
            states = [(plan.items[0], plan.trace.asked | plan.numbers) for plan in plans]
            states += [(item, work.state) for item, work in copies]
            ran = {i for item, _ in states for i in self.buckets.span_of(item)}
            verdicts.say_idle(
                dict.fromkeys(k for item, new in states for k in new if k not in item.state),
                ran,
                {k for item, new in states for k in (*item.state, *new)},
                {k for item, _ in states for k in item.hyper},
            )
