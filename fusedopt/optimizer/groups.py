"""Param groups as the runtime sees them: the one place where both vocabularies of hyperparameters meet.

Callbacks call hyperparameters and state what fastai calls them; param groups and ``opt.state`` have torch's names.
"""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from ..callback import GROUPS_OWN, arguments_of, defaults_of
from ..extension import leaf
from ..step import transforms
from ..step.items import Item, settled
from ..step.memory import check_memory
from ..step.scaling import Scaling
from ..trace.signature import Modes
from . import storing
from .accepted import (
    Roles,
    check_extra,
    check_gradient,
    check_known,
    check_state,
    hyper_of,
    list_of,
    one_each,
    roles_of,
    warn_of_misspelt,
)
from .names import HyperNames, Place, lowest
from .state import COUNTERS, State, count, counts_to


class Held(Protocol):
    """What an optimizer holds. Its users and torch put others in place of these at any time."""

    param_groups: list[dict[str, Any]]
    state: State
    defaults: dict[str, Any]
    cbs: list[Callable[..., Any]]


MOST = 16
"""Lists of callbacks whose roles are kept."""
_ABSENT = -2
"""The kind of a parameter without a gradient."""


class ParamGroups:
    """An optimizer's groups and state, with what their names mean to its callbacks.

    ``given``: names of hyperparameters given to the optimizer, by either vocabulary; ``declared``: places of its own
    (see `names`); ``stored``: callback argument → key in ``opt.state[p]`` where they differ; ``closed``: whether the
    hyperparameters given are all there are to our own callbacks; ``theirs``: callbacks of groups that have their own;
    ``others``: callbacks besides those.
    """

    def __init__(
        self,
        held: Held,
        given: Sequence[str],
        declared: Mapping[str, Place],
        stored: Mapping[str, str],
        closed: bool,
        theirs: Sequence[Callable[..., Any]] = (),
        others: Sequence[Callable[..., Any]] = (),
    ) -> None:
        self._ref, self.closed = weakref.ref(held), closed  # or it would wait for the garbage collector
        self._others, self.theirs = list(others), list(theirs)
        self.given, self.declared = list(given), declared
        known = held.cbs if closed else [*held.cbs, *theirs]
        self.around: tuple[Callable[..., Any], ...] = ()
        """What is run before and after each list of callbacks: two of them, or none."""
        names = {*given, *(name for cb in known for name in defaults_of(cb))}
        taken = {name for cb in [*known, *others] for name in arguments_of(cb)}
        self.names = HyperNames(names, declared, taken)
        self._stored = dict(stored)
        self._called = {key: name for name, key in self._stored.items()}
        self._roles: list[tuple[list[Any], Roles]] = []
        self.extra: dict[str, list[torch.Tensor | None]] = {}
        """Tensors that callbacks get in this step besides, by their names for them: one per parameter, or None."""
        self._strange: set[str] = set()
        """Keys of groups that nobody takes, and that were looked at."""

    @property
    def _held(self) -> Held:
        held = self._ref()
        assert held is not None
        return held

    @property
    def callbacks(self) -> list[Callable[..., Any]]:
        """All that names mean something to."""
        return [*self.whole(self._held.cbs), *self.theirs, *self._others]

    def whole(self, cbs: list[Callable[..., Any]]) -> list[Callable[..., Any]]:
        """A list of callbacks with those around it."""
        if not self.around:
            return cbs
        before, after = self.around
        return [before, *cbs, after]

    def list_of(self, group: dict[str, Any]) -> list[Callable[..., Any]]:
        """The callbacks of a group: its own, else the optimizer's."""
        return self.whole(list_of(group, self._held.cbs))

    def look(self) -> list[range]:
        """Look which callbacks groups have of their own: ``theirs``, each list once.

        Returns for each group which of the optimizer's callbacks and ``theirs`` are its list.
        """
        own = self.whole(self._held.cbs)
        every, spans = list(own), []
        known = [(every[:], range(len(every)))]
        for group in self._held.param_groups:
            if storing.HYPER in group and (self.around or not self._taken(storing.HYPER)):
                group[storing.HYPER] = storing.of_group(group[storing.HYPER], self)
            found = self.list_of(group)
            span = next((span for cbs, span in known if cbs == found), None)
            if span is None:
                span = range(len(every), len(every) + len(found))
                every += found
                known.append((found, span))
            spans.append(span)
        self.theirs = every[len(own) :]
        return spans

    def _taken(self, name: str) -> bool:
        """Whether a callback takes an argument of this name."""
        return any(name in arguments_of(cb) for cb in self.callbacks)

    @property
    def live(self) -> list[dict[str, Any]]:
        """The list itself."""
        return self._held.param_groups

    @property
    def state(self) -> State:
        return self._held.state

    def numbers_of(self, group: int) -> tuple[int, ...]:
        """The groups whose numbers this group's callbacks get; a later one's replace an earlier one's."""
        return (group,)

    def modes(self, group: dict[str, Any], scaling: Scaling) -> Modes:
        """What of a step of the group's parameters is known to the device only."""
        return scaling.modes(bool(group.get("capturable")))

    # -- names --
    def called(self, stored: str) -> str:
        """The callback argument that a key of ``opt.state[p]`` is handed to."""
        name, colon, rest = stored.partition(":") if isinstance(stored, str) else (stored, "", "")
        return self._called.get(name, name) + colon + rest if colon else self._called.get(name, name)

    def entries(self, p: torch.Tensor) -> Iterator[tuple[Any, bool, Any, str, Any]]:
        """What the state of a parameter has: the key, whether it is in a container there, under which key, the name
        that callbacks have for it, and it."""
        for stored, value in list(self.state[p].items()):
            yield stored, False, None, self.called(stored), value

    def stored(self, name: str) -> str:
        """The key of ``opt.state[p]`` where what callbacks call this is kept."""
        first, colon, rest = name.partition(":")
        return self._stored.get(first, first) + colon + rest

    def roles(self, group: dict[str, Any]) -> Roles:
        """What names mean to the callbacks of a group, and to the others."""
        callbacks = [*self.list_of(group), *self._others]
        known = next((roles for cbs, roles in self._roles if cbs == callbacks), None)
        if known is None:
            stored = (*self._stored, *self._called)
            closed = self.closed and callbacks == self.whole(
                self._held.cbs
            )  # others may be told what these were not
            known = roles_of(callbacks, stored, closed)
            if self._others:  # which alone are called
                known = known._replace(never=roles_of(self._others, (), False).never)
            self._roles = [*self._roles, (callbacks, known)][-MOST:]
        return known

    def ignores(self, group: int, name: Any) -> bool:
        """Whether what the state of a group's parameter has under this name is handed to no callback."""
        return self.roles(self._held.param_groups[group]).ignores(name)

    # -- hyperparameters --
    def handed(self, group: dict[str, Any]) -> dict[str, Any]:
        """The hyperparameters of a group that callbacks get, by their names for them.

        These are the ones the optimizer was given (``defaults``, and what callbacks bring along), and others that a
        callback takes and that are neither state, nor the parameter, nor bound by a partial. Whatever else the group
        holds is carried and saved, and nobody is handed it: as in torch.
        """
        found, roles, own = self.names.of_group(group), self.roles(group), self.own()
        strange = [k for k in found if not roles.hands(k, own)]
        if unseen := [k for k in strange if isinstance(k, str) and k not in self._strange]:
            self._strange.update(unseen)
            warn_of_misspelt(unseen, {*self._held.defaults, *own, *(roles.taken or ())})
        return {k: v for k, v in found.items() if k not in strange}

    def own(self) -> set[str]:
        """The hyperparameters the optimizer was given, by callbacks' names."""
        defaults = self.names.of_group(self._held.defaults)
        return {*defaults, *(k for cb in [*self._held.cbs, *self.theirs] for k in defaults_of(cb))}

    def hypers(self, group: dict[str, Any]) -> dict[str, Any]:
        """Those of a group as callbacks get them: numbers, flags, and tensors that kernels read."""
        return {k: hyper_of(group, k, v) for k, v in self.handed(group).items()}

    def places(self, group: dict[str, Any]) -> Iterator[tuple[str, int, Any, Any, Any, float]]:
        """Where in a group the hyperparameters are that callbacks get, in the order of its keys.

        Each as the key, the place in a tuple or list there (else -1), what is there, the name that callbacks have for
        it (for a place without one the name of the whole, with the place), it as callbacks get it, and the lowest
        number that it may be.
        """
        handed = self.handed(group)
        for key, value in group.items():
            if key == "params" or self.names.shadowed(key, group):
                continue
            several = type(value) in (tuple, list) and len(value) > 0
            if key == GROUPS_OWN:
                for i, cb in enumerate(value) if several else [(-1, value)]:
                    yield key, i, cb, (key, i), cb, 0.0
                continue
            whole = self.names.name.get(key, key)
            for i, part in enumerate(value) if several else [(-1, value)]:
                name: Any = self.names.name.get((key, i), (whole, i)) if several else whole
                if (whole if isinstance(name, tuple) else name) in handed:
                    yield key, i, part, name, hyper_of(group, name, part), lowest(name)

    # -- what there is to step --
    def items(
        self, scaling: Scaling, pretend: bool = False, among: Container[int] | None = None
    ) -> list[Item]:
        """What there is to step. ``pretend``: as if every parameter had a gradient (to explain a step before it).
        ``among``: the parameters, by their ids, that are looked at; None: all."""
        todo: list[Item] = []
        apart: list[Item] = []  # those that were not known to be like an earlier one
        for g, group in enumerate(self._held.param_groups):
            modes = self.modes(group, scaling)
            params = list(group["params"])
            places = [i for i, p in enumerate(params) if among is None or id(p) in among]
            if among is not None and not places:
                continue
            hyper, params = self.hypers(group), [params[i] for i in places]
            leaf.settle(params)
            names: dict[int, list[str]] = {}  # of the state of parameters of each kind
            instead = pretend or modes.bare
            each = instead or modes.on_device or bool(self.extra)
            for i, (p, kind, grad, state) in zip(places, self._surveyed(params, each), strict=True):
                if kind < 0:
                    grad = p if instead else None if kind == _ABSENT else p.grad
                if grad is None:
                    continue
                if kind in names:
                    state = dict(zip(names[kind], state.values(), strict=True))
                    todo.append(Item(p, grad, state, (g, i), hyper, modes, (g, kind)))
                    continue
                check_gradient(p, grad, g, i)
                found = self.state_of(p, g, modes.on_device)
                check_state(p, dict(self.state.get(p, {})), g, i)
                given = self._given(p, g, i, {**found, **hyper})
                if not pretend and self._stored_anew(p, g, (grad, *given.values()), known=not modes.bare):
                    found = self.state_of(p, g, modes.on_device)
                own = modes._replace(given=tuple(given)) if given else modes
                item = Item(p.detach() if pretend else p, grad, {**found, **given}, (g, i), hyper, own)
                todo.append(item)
                apart.append(item)
                if kind < 0 or len(found) != len(state):
                    continue
                if all(map(operator.is_, found.values(), state.values())):  # no count was made a number
                    names[kind], item.alike = list(found), (g, kind)
        if not pretend and not transforms.active():  # whose tensors have none
            check_memory(apart, self.stored)
        return todo

    def _surveyed(
        self, params: list[torch.Tensor], each: bool
    ) -> Iterator[tuple[torch.Tensor, int, Any, dict[str, Any]]]:
        """Each parameter with the number of its kind, which those share that are alike, its gradient and its state.

        The last two are of the moment that the kind was found; where it is below zero (_ABSENT: there is no gradient)
        they say nothing. ``each``: every parameter on its own.
        """
        if each or leaf.native is None or transforms.active():
            return ((p, -1, None, {}) for p in params)
        kinds, grads, states = leaf.native.survey(params, list(map(self.state.get, params)))
        return zip(params, kinds, grads, states, strict=True)

    @contextlib.contextmanager
    def with_extra(self, extra: Mapping[str, Any] | None) -> Iterator[None]:
        """With these extra tensors. Raises TypeError or ValueError, naming them, unless they are one per parameter."""
        self.extra = self._listed(extra) if extra else {}
        try:
            yield
        finally:
            self.extra = {}

    def _listed(self, extra: Mapping[str, Any]) -> dict[str, list[torch.Tensor | None]]:
        """Each as a list of our own, with one for every parameter."""
        if not isinstance(extra, Mapping):
            raise TypeError(f"extra is a dict from names to tensors, not a {type(extra).__name__}")
        params = [p for group in self._held.param_groups for p in group["params"]]
        check_known(extra, self.callbacks, "extra tensors", ())
        return {name: one_each(name, given, params) for name, given in extra.items()}

    def _given(self, p: torch.Tensor, g: int, i: int, taken: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The extra tensors of a parameter; ``taken``: the names of other arguments."""
        if not self.extra:
            return {}
        place = sum(len(group["params"]) for group in self._held.param_groups[:g]) + i
        found = {name: value for name, given in self.extra.items() if (value := given[place]) is not None}
        for name, value in found.items():
            check_extra(p, name, value, g, i, name in taken)
        return found

    def resting(
        self, stepped: list[Item], scaling: Scaling, among: Container[int] | None = None
    ) -> list[Item]:
        """Parameters without a gradient now that had one before, as if theirs were zero. ``among``: the ids of the
        parameters that are looked at; None: all."""
        found: list[Item] = []
        if len(stepped) == sum(len(group["params"]) for group in self.live):
            return found
        hypers = {item.where[0]: item.hyper for item in stepped}
        for g, group in enumerate(self.live):
            modes = self.modes(group, scaling)
            for i, p in enumerate(group["params"]):
                if among is not None and id(p) not in among:
                    continue
                if p.grad is None and self.state.get(p):
                    if g not in hypers:
                        hypers[g] = self.hypers(group)
                    given = self._given(p, g, i, {})
                    self._stored_anew(p, g, given.values(), known=False)
                    state = self.state_of(p, g, modes.on_device)
                    own = modes._replace(given=tuple(given)) if given else modes
                    found.append(Item(p, p.detach(), {**state, **given}, (g, i), hypers[g], own))
        return found

    def state_of(self, p: torch.Tensor, group: int, on_device: bool) -> dict[str, Any]:
        """The parameter's state by the names callbacks use: a copy, as other threads may change the dict meanwhile."""
        live: dict[str, Any] = self.state.get(p, {})
        if on_device:
            counts_to(p.device, live)
        for key in () if on_device else COUNTERS:
            # written by hand or, in torch's schema, by ZeroRedundancyOptimizer
            if isinstance(value := live.get(key), torch.Tensor) and value.numel() == 1:
                live[key] = count(value)
        roles = self.roles(
            self._held.param_groups[group]
        )  # an entry that they ignore is somebody's note, and no argument
        return {self.called(k): v for k, v in dict(live).items() if not roles.ignores(k)}

    def settle(self, todo: Sequence[Item]) -> None:
        """Wait for the device to know what state has begun; what has not is as if it had never been."""
        for item in todo:
            for key in settled(item):
                self.state[item.home].pop(self.stored(key), None)

    def _stored_anew(self, p: torch.Tensor, group: int, beside: Iterable[torch.Tensor], known: bool) -> bool:
        """Whether policies of storage had to store a parameter's state anew, for what else there is in this step.

        ``known``: the gradient is among that. Without it, what is in numbers stays so: it may be for the gradient.
        """
        found, state = self._held.param_groups[group], self.state.get(p)
        if not self.around or not state or not found.get(storing.HYPER):
            return False
        return storing.stored_anew(p, beside, state, found, self, known)

    def hand_over(self, item: Item) -> Callable[[], None]:
        """What puts an item's state into ``opt.state``."""
        kept = {self.stored(k): v for k, v in item.state.items() if k not in item.modes.given}
        return partial(self.state[item.home].update, kept)

    def keep(self, todo: list[Item]) -> None:
        """Put what their state dicts lack into them."""
        for item in todo:
            self.hand_over(item)()
