"""Steps on work copies, of which the user sees nothing yet: programs as far as callbacks fuse, one eagerly, and on."""

from __future__ import annotations

from ..backends import Kernel
from ..trace.signature import FACTOR
from ..trace.sources import asks_for_dtypes
from . import items, launching, reference, sharded, transforms
from .buckets import Bucket, Buckets
from .items import Item
from .scaling import Norm, Scaling

_UNSCALED = Scaling(amp=False)


class Eager:
    """Runs what has no fused form. ``norm`` is how the last step's norm was taken, ``launched`` what it launched."""

    def __init__(self, buckets: Buckets) -> None:
        self.buckets = buckets
        self.norm: Norm | None = None
        self.launched: list[tuple[Kernel, int]] = []
        self._lent: reference.Lent | None = None

    def run(self, plans: list[Bucket], unfused: list[Item], scaling: Scaling) -> list[tuple[Item, Item]]:
        """The items that plans leave with work copies on which every callback has been run; none if it is skipped."""
        buckets = self.buckets
        unfused.sort(key=lambda item: item.where)
        copies = items.work_copies(unfused, transforms.active())
        work = [work for _, work in copies]
        self.norm = launching.norm_of(plans, work, scaling)
        if self.norm is not None:
            self.norm.measure()
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
        for whole, span in as_loop.items():
            self._advance(lists[whole], whole.start, span.start)
        buckets.acted = any(as_loop.values())
        self._run_eagerly([(item, as_loop.get(buckets.span_of(item), range(0))) for item in work])
        for whole, span in as_loop.items():
            self._advance(lists[whole], span.stop, whole.stop)
        return copies

    def tidy(self) -> None:
        """Take back what the last callback was lent, if it raised."""
        reference.tidy(self._lent)

    def _advance(self, work: list[Item], first: int, last: int) -> None:
        """Run callbacks ``first`` up to ``last`` over work copies: a program as far as it goes, one eagerly, and on."""
        if first == last:
            return
        self._run_eagerly([(item, range(first, last)) for item in work if type(item) is sharded.Whole])
        found = self._fused_until([item for item in work if type(item) is Item], first, last)
        plans = [plan for plan, _, _ in found if plan is not None]
        self.launched += launching.counts(launching.run(plans, _UNSCALED))
        for plan in plans:
            for item in plan.items:
                for key, dtype in plan.trace.asked.items():
                    reference.mark(item.state[key], dtype)
        for stop in sorted({stop for _, stop, _ in found} - {last}):
            rest = [item for _, i, bucket in found if i == stop for item in bucket]
            self._run_eagerly([(item, range(stop, stop + 1)) for item in rest])
            self._advance(rest, stop + 1, last)

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
            for i in span:
                lent = self._lent = reference.Lent(item.owner, item.param)
                moved = reference.run_callback(callbacks[i], lent, item.state, item.hyper, watch[i])
                item.param = lent.work
                items.attach_gradient(item, item.param.grad)  # the callback may have set another
                if moved and verdicts.watching:
                    verdicts.moved([i])
