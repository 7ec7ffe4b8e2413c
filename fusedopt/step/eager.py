"""Steps on work copies, of which the user sees nothing yet: programs as far as callbacks fuse, one eagerly, and on."""

from __future__ import annotations

import contextlib

import torch

from ..backends import Kernel
from ..callback import Callback, name_of
from ..trace import draws
from ..trace.signature import FACTOR, is_plain
from ..trace.snapshot import Snapshot
from ..trace.sources import asks_for_dtypes
from ..trace.totals import collect
from . import items, launching, reference, sharded, transforms
from .buckets import Bucket, Buckets
from .items import Item
from .lockstep import Known, Unasked, Unknown, throw_away
from .scaling import Norm, Scaling

_UNSCALED = Scaling(amp=False)


class Eager:
    """Runs what has no fused form. ``norm`` is how the last step's norm was taken, ``launched`` what it launched."""

    def __init__(self, buckets: Buckets) -> None:
        self.buckets = buckets
        self.norm: Norm | None = None
        self.launched: list[tuple[Kernel, int]] = []
        self._lent: reference.Lent | None = None
        self._known: Known | None = None

    def run(self, plans: list[Bucket], unfused: list[Item], scaling: Scaling) -> list[tuple[Item, Item]]:
        """The items that plans leave with work copies on which every callback has been run; none if it is skipped."""
        buckets = self.buckets
        unfused.sort(key=lambda item: item.where)
        copies = items.work_copies(unfused, transforms.active())
        work = [work for _, work in copies]
        self.norm = launching.norm_of(plans, work, scaling)
        if self.norm is not None:
            self.norm.run([])
        for item in work if scaling else ():
            item.grad.mul_(scaling.buffer(FACTOR, item.param.device))
        self.launched = list(self.norm.kernels) if self.norm else []
        if copies and scaling.amp and scaling.skipped({item.param.device for item in unfused}):
            return []
        lists: dict[range, list[Item]] = {}
        for item in work:
            lists.setdefault(buckets.span_of(item), []).append(item)
        as_loop = {
            whole: whole if buckets.backend == "reference" else buckets.verdicts.span(whole.start)
            for whole in lists
            if whole
        }
        buckets.acted = False
        collect(Unasked(), lambda: self._run(work, lists, as_loop))
        return copies

    def tidy(self) -> None:
        """Take back what the last callback was lent, if it raised."""
        reference.tidy(self._lent)

    def _run(self, work: list[Item], lists: dict[range, list[Item]], as_loop: dict[range, range]) -> None:
        """Run every callback; ``lists``: items by the callbacks that are theirs, ``as_loop``: the span of each."""
        buckets = self.buckets
        if buckets.totalling:
            for whole, span in as_loop.items():
                self._in_lockstep(lists[whole], whole, span)
            return
        for whole, span in as_loop.items():
            self._advance(lists[whole], whole.start, span.start)
        buckets.acted = any(as_loop.values())
        self._run_eagerly([(item, as_loop.get(buckets.span_of(item), range(0))) for item in work])
        for whole, span in as_loop.items():
            self._advance(lists[whole], span.stop, whole.stop)

    def _advance(self, work: list[Item], first: int, last: int) -> None:
        """Run callbacks ``first`` up to ``last`` over work copies: a program as far as it goes, one eagerly, and on."""
        if first == last:
            return
        self._run_eagerly([(item, range(first, last)) for item in work if type(item) is sharded.Whole])
        found = self._fused_until([item for item in work if type(item) is Item], first, last)
        plans = [plan for plan, _, _ in found if plan is not None]
        self.launched += launching.counts(launching.run(plans, _UNSCALED)[0])
        for plan in plans:
            for item in plan.items:
                items.attach_gradient(item)  # the kernel may have needed the parameter in another layout
                for key, dtype in plan.trace.asked.items():
                    reference.mark(item.state[key], dtype)
        for stop in sorted({stop for _, stop, _ in found} - {last}):
            rest = [item for _, i, bucket in found if i == stop for item in bucket]
            self._run_eagerly([(item, range(stop, stop + 1)) for item in rest])
            self._advance(rest, stop + 1, last)

    def _in_lockstep(self, work: list[Item], whole: range, span: range) -> None:
        """Run callback by callback, each for all parameters: those that call ``total`` need the others to have come."""
        buckets, i = self.buckets, whole.start
        while i < whole.stop:
            stop = i + 1
            if i in buckets.totalling:
                self._run_with_totals(i, work)
            elif i in span:
                buckets.acted = True
                self._run_eagerly([(item, range(i, stop)) for item in work])
            else:
                apart = (k for k in range(i, whole.stop) if k in buckets.totalling or k in span)
                stop = next(apart, whole.stop)
                self._advance(work, i, stop)
            i = stop

    def _run_with_totals(self, i: int, work: list[Item]) -> None:
        """Run a callback on copies until its totals are known, and then for good."""
        buckets = self.buckets
        callback = buckets.callbacks[i]
        if reason := buckets.verdicts.unseen.get(i):
            raise RuntimeError(
                f"the callback {name_of(callback)} calls fusedopt.total, so where it is not fused it is run several "
                f"times, and it may do more than change its arguments: {reason}. Remedy: do that in a callback of its "
                "own"
            )
        known = self._known = Known()

        def run() -> None:
            while shares := self._shares(callback, work, known):
                known.totals.append(torch.stack(shares).sum())
            known.complete = True
            self._run_eagerly([(item, range(i, i + 1)) for item in work])

        try:
            collect(known, run)
        finally:
            self._known = None

    def _shares(self, callback: Callback, work: list[Item], known: Known) -> list[torch.Tensor]:
        """What the parameters add to the first total that is not known; nothing if the callback asks for no other."""
        found = []
        held = [v for item in work for d in (item.state, item.hyper) for v in d.values() if not is_plain([v])]
        around = Snapshot([*self.buckets.around(), *held])
        try:
            for item in map(throw_away, work):
                known.begin()
                lent = self._lent = reference.Lent(item.owner, item.param)
                draws.of(*item.where)
                with contextlib.suppress(Unknown):
                    reference.run_callback(callback, lent, item.state, item.hyper)
                if known.share is not None:  # a parameter without elements has a stand-in with one
                    found.append(known.share if item.owner.numel() else torch.zeros_like(known.share))
        finally:
            around.restored()
        return [share.to(found[0].device) for share in found]

    def _fused_until(
        self, work: list[Item], first: int, last: int
    ) -> list[tuple[Bucket | None, int, list[Item]]]:
        """For each bucket the plan of the longest run of callbacks from ``first`` on that fuses, and where it ends."""
        done: list[tuple[Bucket | None, int, list[Item]]] = []
        for bucket, plan in self.buckets.traced(work, range(first, last), work=True):
            if isinstance(plan, Bucket):
                done.append((plan, last, bucket))
            elif plan == first:
                done.append((None, first, bucket))
            else:
                done += self._fused_until(bucket, first, plan)
        return done

    def _run_eagerly(self, work: list[tuple[Item, range]]) -> None:
        """Run callbacks on items, one item after another."""
        verdicts, callbacks = self.buckets.verdicts, self.buckets.callbacks
        used = {i for span in {span for _, span in work} for i in span}
        watch = {i: verdicts.watching or asks_for_dtypes(callbacks[i]) for i in used}
        for item, span in work:
            if span:
                item.alike = None  # whatever callbacks do to it
            draws.of(*item.where)
            for i in span:
                if self._known is not None:
                    self._known.begin()
                lent = self._lent = reference.Lent(item.owner, item.param)
                moved = reference.run_callback(callbacks[i], lent, item.state, item.hyper, watch[i])
                item.param = lent.work
                items.attach_gradient(item, item.param.grad)  # the callback may have set another
                if moved and verdicts.watching:
                    verdicts.moved([i])
