"""Launches: the tables of buckets that share a program, and what a step commits together with them."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..backends import Kernel, Launch
from ..extension import leaf
from ..trace.cuts import CALLED, GIVEN
from ..trace.run import GRAD, PARAM
from . import items, sharded, totals
from .buckets import Bucket
from .commit import Change, commit
from .items import Groups, Item
from .rounds import Round
from .scaling import Norm, Scaling


@dataclass
class Launched:
    """Plans that shared a launch, one scalar set each."""

    plans: list[Bucket]
    launch: Launch

    @property
    def kernel(self) -> Kernel:
        return self.plans[0].kernel


class GraphScalars:
    """Launches whose scalars live on the device, so that a CUDA graph of them can be replayed with others."""

    def __init__(
        self, launched: list[Launched], rounds: Sequence[Round], changed: Callable[[], str | None]
    ) -> None:
        self.rounds, self._changed = rounds, changed
        summing = [one for each in rounds for one in each.summing if one.kernel.program.slots]
        self.launches = [
            (
                [entry.launch, *(one.launch for one in summing if one.of == k)],
                [(plan.known.replay, plan.items[0].where[0]) for plan in entry.plans],
            )
            for k, entry in enumerate(launched)
            if any(item.hyper.get("capturable") for plan in entry.plans for item in plan.items)
        ]

    def upload(self, hypers: list[dict[str, Any]], captured: bool = True) -> None:
        """Send the scalars that follow from these hyperparameters of each group.

        Raises RuntimeError, sending none, if other launches do. Not if these are in no graph: ``captured``.
        """
        tables = []
        for launches, sets in self.launches:
            same = self._changed() is None
            found = [replay and same and replay(hypers[group], {}) for replay, group in sets]
            for (replay, group), one in zip(sets, found, strict=True):
                if not one and not captured:
                    return
                if not one:
                    why = (
                        "a callback is not pure"
                        if not replay
                        else "a branch that they decide goes another way now"
                        if same
                        else "a callback reads something else now"
                    )
                    raise RuntimeError(
                        f"the captured step does not fit the hyperparameters of group {group}: {why}. Remedy: capture "
                        "the step again"
                    )
            tables.append((launches, np.array([slots for slots, _ in found], dtype=np.float64)))  # type: ignore[misc]
        for launches, slots in tables:
            for each in launches:
                each.upload(slots)
        for before in self.rounds:
            before.upload()


def run(
    plans: list[Bucket],
    scaling: Scaling,
    groups: Groups | None = None,
    stores: Sequence[Change] = (),
) -> tuple[list[Launched], list[Round]]:
    """Launch the plans, after rounds of totals; with that ``stores`` are made, what eager callbacks leave."""
    shared = together(plans)
    # Before anything changes: a number may be too large for a float.
    tables = [np.array([plan.slots for plan in group], dtype=np.float64) for group in shared]
    for plan in plans:
        for item in plan.items:
            item.lay_out(plan.by_rows)
    stepped = [(plan, item) for plan in plans for item in plan.items]
    changed = [_allocated(plan, item) | plan.numbers for plan, item in stepped]
    given = [handed(item, new, groups) for (_, item), new in zip(stepped, changed, strict=True)]
    launched, changes = [], []
    for group, slots in zip(shared, tables, strict=True):
        prepared, runs = launch(group, slots, scaling)
        launched.append(Launched(group, prepared))
        changes += runs
    for plan, item in stepped:
        changes += _finishing(plan, item)
    rounds = totals_of(shared, scaling)
    for each in rounds:
        each.run(tables)
    commit([*changes, *given, *stores, *(each.commit for each in rounds)])
    for entry in launched:
        entry.launch.let_go()
    for each in rounds:
        each.let_go()
        each.end()
    return launched, [*rounds]


def totals_of(
    groups: list[list[Bucket]], scaling: Scaling, repeated: Groups | None = None
) -> Sequence[Round]:
    """The rounds of totals and torch calls before the launches of these plans.

    repeated: where to find state anew in each step
    """
    find = functools.partial(_in_groups, repeated) if repeated is not None else None
    return totals.rounds(groups, scaling, _columns, find)


def _in_groups(groups: Groups, plan: Bucket) -> Callable[[str], list[torch.Tensor]]:
    """What finds the tensors of the state of a plan's parameters, which it does not hold."""
    owners = [weakref.ref(item.owner) for item in plan.items]
    places = {
        key: (stored, nested, inner) for stored, nested, inner, key, _ in groups.entries(plan.items[0].owner)
    }

    def found(key: str) -> list[torch.Tensor]:
        if key in (PARAM, GRAD):
            params: list[torch.nn.Parameter] = [owner() for owner in owners]  # type: ignore[misc]
            # One that has no gradient now is not stepped: what is called for it goes nowhere.
            return [p.detach() if key == PARAM or p.grad is None else p.grad.detach() for p in params]
        stored, nested, inner = places[key]
        values = [groups.state[owner()][stored] for owner in owners]
        return [items.inside(value)[inner] for value in values] if nested else values

    return found


def together(plans: list[Bucket]) -> list[list[Bucket]]:
    """The plans of each launch."""
    found: dict[tuple[Any, ...], list[Bucket]] = {}
    for plan in plans:
        found.setdefault((*plan.kernels, plan.trace.signature.device), []).append(plan)
    return list(found.values())


def _allocated(plan: Bucket, item: Item) -> dict[str, torch.Tensor]:
    """New state; if there is no memory for it, nothing has changed."""
    try:
        return items.allocate(item, plan.trace.created, plan.trace.starts)
    except RuntimeError as error:
        group, i = item.where
        raise torch.OutOfMemoryError(
            f"no memory for the state ({', '.join(plan.trace.created)}) of parameter {i} of group {group}, which has "
            f"shape {tuple(item.param.shape)} and is on {item.param.device}; nothing was stepped. Remedy: "
            f"state_dtype=torch.bfloat16 halves it, or an optimizer with less state. {error}"
        ) from error


def _column(name: str, rows: list[Item], scaling: Scaling) -> list[torch.Tensor]:
    """The tensor of each row for a buffer of the program."""
    where, _, key = name.partition(".")
    if where in ("param", "grad"):
        return [getattr(item, where) for item in rows]
    if where in ("scaling", "total"):
        return [scaling.buffer(name, rows[0].param.device)] * len(rows)
    return [(item.hyper if where == "hyper" else item.state)[key] for item in rows]


def _columns(name: str, plans: list[Bucket], scaling: Scaling) -> list[torch.Tensor]:
    """That of all rows of these plans."""
    if name.startswith((GIVEN, CALLED)):
        return [row for plan in plans for row in plan.memory[name].unbind()]
    return _column(name, [item for plan in plans for item in plan.items], scaling)


def handed(item: Item, new: dict[str, Any], groups: Groups | None) -> Change:
    """What gives the user new state, which the item has at once; but for tensors in whose place something else comes,
    which kernels read."""
    seen, item.state = item.state, item.state | new
    change = (
        groups.hand_over(item)
        if groups and not isinstance(item, sharded.KINDS)
        else functools.partial(seen.update, new)
    )
    gone = (k for k, v in new.items() if not isinstance(v, torch.Tensor))
    item.state |= {k: seen[k] for k in gone if isinstance(seen.get(k), torch.Tensor)}
    return change


def _finishing(plan: Bucket, item: Item) -> list[Change]:
    """What is left to do after the launch: see `Item.finish`."""
    if isinstance(item, sharded.KINDS):
        return [functools.partial(item.finish, plan.trace.created)]
    return [functools.partial(item.home.copy_, item.param)] if item.param is not item.home else []


def counts(launched: Sequence[Launched]) -> list[tuple[Kernel, int]]:
    """The kernel of each launch, and how many tensors it goes over."""
    return [(entry.kernel, sum(len(plan.items) for plan in entry.plans)) for entry in launched]


def table(plans: list[Bucket], scaling: Scaling) -> Launch:
    """The launch of plans that share a program, each a scalar set."""
    kernel, rows = plans[0].kernel, [item for plan in plans for item in plan.items]
    columns = {name: _columns(name, plans, scaling) for name, _ in kernel.program.buffers}
    sets = [k for k, plan in enumerate(plans) for _ in plan.items]
    sizes = [item.param.numel() for item in rows]
    resident = any(item.hyper.get("capturable") for item in rows)
    several = [plan for plan in plans if kernel.program.axes > 1]
    shapes = [plan.trace.lengths(item.param.shape) for plan in several for item in plan.items]
    prepare = plans[0].known.backend.prepare
    return prepare(kernel, columns, sizes, sets, resident, **items.facts(kernel, rows, shapes))


def launch(plans: list[Bucket], slots: np.ndarray, scaling: Scaling) -> tuple[Launch, list[Change]]:
    """The launch of these plans, each with its own row of scalars, and what runs it."""
    prepared, rows = table(plans, scaling), [item for plan in plans for item in plan.items]
    for name, _ in plans[0].kernel.program.stores:
        leaf.bump_versions(_column(name, rows, scaling))
    planned = None if any(isinstance(item, sharded.Shard) for item in rows) else prepared.planned(slots)
    if planned is not None:
        return prepared, list(leaf.calls(*planned))
    return prepared, [functools.partial(sharded.runner(prepared, rows), slots)]


def norm_of(plans: list[Bucket], work: list[Item], scaling: Scaling) -> Norm | None:
    """What takes the norm of all gradients: of plans, and of work copies."""
    if not scaling.measures or not (plans or work):
        return None
    for plan in plans:
        for item in plan.items:
            item.lay_out(plan.by_rows)
    launches, apart = [], list(work)
    for group in together(plans):
        backend, rows = group[0].known.backend, [item for plan in group for item in plan.items]
        if any(map(sharded.is_shard, rows)) and not sharded.runs_parts(backend):
            apart += [item.whole if isinstance(item, sharded.Shard) else item for item in rows]
        else:
            launches.append((backend, rows, group[0].kernel.program))
    return Norm(scaling, launches, apart)
