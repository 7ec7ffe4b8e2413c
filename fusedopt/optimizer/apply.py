"""Callbacks that run outside of a step, over the same groups and state: ``opt.apply(cb)``.

Everything is as in a step (tracing, kernels, bound steps, what runs eagerly) but for gradients: callbacks whose code
does not name them are run on every parameter, and no gradient is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from ..callback import defaults_of, identity, name_of
from ..step.buckets import Buckets
from ..step.engine import Engine
from ..step.items import Item
from ..step.scaling import Scaling
from ..trace.signature import Modes
from ..trace.sources import reads_gradient
from . import names
from .accepted import check_known
from .groups import ParamGroups

if TYPE_CHECKING:
    from .core import Optimizer

MOST = 16
"""Lists of callbacks that an optimizer has applied and that are kept, with their bound steps."""
_UNSCALED = Scaling(amp=False)


class AppliedGroups(ParamGroups):
    """An optimizer's groups and state as the callbacks see them that are applied.

    Their own hyperparameters are in two groups more, without parameters: ``brought`` by callbacks, which a group's own
    replace, and those of this call (``now``), which replace both.
    """

    def __init__(self, opt: Optimizer, cbs: Sequence[Callable[..., Any]], bare: bool) -> None:
        own = opt.groups
        super().__init__(opt, own.given, own.declared, opt.state_names, own.closed, own.theirs, cbs)
        self.brought = _numbers({k: v for cb in cbs for k, v in defaults_of(cb).items()})
        self.now = _numbers({})
        self._bare, self._amp = bare, opt._scaling.amp

    @property
    def live(self) -> list[dict[str, Any]]:
        return [*self._held.param_groups, self.brought, self.now]

    def numbers_of(self, group: int) -> tuple[int, ...]:
        return -2, group, -1

    def modes(self, group: dict[str, Any], scaling: Scaling) -> Modes:
        return Modes(on_device=bool(group.get("capturable")) or self._amp, bare=self._bare)

    def hypers(self, group: dict[str, Any]) -> dict[str, Any]:
        found = {**self.brought, **super().hypers(group), **self.now}
        return {k: v for k, v in found.items() if k != "params"}

    def places(self, group: dict[str, Any]) -> Iterator[tuple[str, int, Any, Any, Any, float]]:
        if group is not self.brought and group is not self.now:
            yield from super().places(group)
            return
        for name, value in group.items():
            several = type(value) in (tuple, list) and len(value) > 0
            for i, part in enumerate(value) if several else [(-1, value)]:
                if name != "params":
                    yield name, i, part, (name, i) if several else name, part, names.lowest(name)

    def resting(
        self, stepped: list[Item], scaling: Scaling, among: Container[int] | None = None
    ) -> list[Item]:
        return [] if self._bare else super().resting(stepped, scaling, among)


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """A group of hyperparameters alone."""
    for name, value in values.items():
        names.check(name, value)
    return {"params": [], **{name: names.number(value) for name, value in values.items()}}


class Applied:
    """A list of callbacks that is applied, with what became of it. ``graded``: a callback that reads gradients."""

    def __init__(self, opt: Optimizer, cbs: Sequence[Callable[..., Any]]) -> None:
        self.cbs, self.own = list(cbs), list(opt.cbs)
        self.graded = next((cb for cb in cbs if reads_gradient(cb)), None)
        whole = opt.groups.whole(self.cbs)
        self.groups = AppliedGroups(opt, whole, self.graded is None)
        title = name_of(cbs[-1]) if cbs else "nothing"
        self.engine = Engine(Buckets(whole, opt.backend, title, opt.state_dtype, beside=opt.groups.callbacks))

    def fits(self, opt: Optimizer) -> bool:
        """Whether it is still what its callbacks do, beside the optimizer's."""
        return self.own == opt.cbs and not self.engine.buckets.outdated(opt.groups.whole(self.cbs))

    def take(self, hypers: Mapping[str, Any]) -> None:
        """Take the hyperparameters of this call. Raises TypeError for one that no callback takes."""
        values = self.groups.names.to_fastai(hypers)
        check_known(values, self.cbs)
        self.groups.now = _numbers(values)

    def run(self) -> None:
        if not self.engine.repeat(_UNSCALED):
            self._run_anew()

    @torch.no_grad()
    def _run_anew(self) -> None:
        todo = self.items()
        once = {id(item.home): item for item in reversed(todo)}
        first = [item for item in todo if once[id(item.home)] is item]
        self.engine.step(first, _UNSCALED, self.groups, bind=len(first) == len(todo))

    def items(self) -> list[Item]:
        """What there is to run them on. Raises RuntimeError if they read gradients and there is none."""
        self.groups.look()
        todo = self.groups.items(_UNSCALED)
        if not todo and self.graded is not None:
            raise RuntimeError(
                f"the callback {name_of(self.graded)} reads gradients, and no parameter has one; nothing was applied. "
                "Remedy: apply it between backward and zero_grad, or write it without p.grad"
            )
        return todo


class Applications:
    """The lists of callbacks that an optimizer has applied, the last one last."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Applied] = {}

    def __iter__(self) -> Iterator[Applied]:
        return iter(self._known.values())

    def of(self, opt: Optimizer, cbs: Sequence[Callable[..., Any]]) -> Applied:
        """What became of these callbacks: found by what they are, so that an equal partial is no other callback."""
        key = tuple(cb if isinstance(cb, MethodType) else identity(cb) for cb in cbs)
        applied = self._known.pop(key, None)
        if applied is None or not applied.fits(opt):
            applied = Applied(opt, cbs)
        self._known[key] = applied
        for old in list(self._known)[:-MOST]:
            del self._known[old]
        return applied
