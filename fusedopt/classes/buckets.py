"""The buckets of a class's steps: what `step.buckets` is for callback lists. Engine and bound step are the same."""

from __future__ import annotations

import operator
import time
import weakref
from collections.abc import Callable, Container, Iterator, Sequence, Sized
from functools import partial
from typing import Any, ClassVar

import torch

from ..extension import leaf
from ..ir.program import Buffer
from ..step import sharded, sharing
from ..step.buckets import MAX_KNOWN, Bucket, Buckets, CompiledTrace, fit
from ..step.items import Item, dense, same_layout, walkable
from ..step.scaling import Scaling
from ..step.sharded import Shard, Whole, here, is_dtensor, is_replicated
from ..trace.replay import Replay
from ..trace.signals import NeedsAttribute, Untraceable
from ..trace.signature import Opaque, Signature, is_plain
from ..trace.tracer import Trace
from .check import difference
from .host import Host, bucket_key, numbers_of_host
from .shadow import NewState, Path, shown
from .stored import Stored, decode, encode
from .stores import flattened, put, stores_of, values_of, whole_of
from .tracing import Options, trace_step


def on_host(value: Any, p: torch.Tensor) -> bool:
    """Whether it is a tensor of one number that stays with the host while the parameter is elsewhere, or spread over
    processes: a step count."""
    if (
        not isinstance(value, torch.Tensor)
        or value.numel() != 1
        or value.device.type != "cpu"
        or value.is_complex()
    ):
        return False
    if type(value) is torch.Tensor:
        return p.device.type != "cpu" or is_dtensor(p)
    return is_dtensor(p) and value.shape != p.shape and is_replicated(value)


class ClassItem(Item):
    """An item of a class: a state tensor of one element is one number per tensor, whatever its shape.

    ``hosted``: the tensors that `on_host` is about. In ``state`` are their numbers, which is what they are to kernels.
    ``coded``: what policies store, by name. In ``state`` are its parts.
    ``flat``: flattened tensors of as many elements as the parameter. In ``state`` are views of them in its shape.
    """

    __slots__ = ("coded", "flat", "hosted")
    one_is_whole = True

    def __init__(self, p: torch.Tensor, grad: torch.Tensor, kept: dict[Any, Any], *given: Any) -> None:
        super().__init__(p, grad, values_of(kept, parted=True), *given)
        self.coded = {k: v for k, v in kept.items() if isinstance(v, Stored)}
        self.hosted = {k: v for k, v in self.state.items() if on_host(v, self.param)}
        self.state |= {k: v.item() for k, v in self.hosted.items()}
        self.flat = {k: v for k, v in self.state.items() if _is_flat(v, self.param)}
        self.state |= {k: v.view(self.param.shape) for k, v in self.flat.items()}

    @property
    def has_codes(self) -> bool:
        return bool(self.coded)

    def visible(self, attributes: tuple[str, ...], work: bool) -> tuple[Any, ...]:
        *before, read, asked, zero_dim, modes = super().visible(attributes, work)
        if self.hosted:
            read = *read, ("on the host", " ".join(map(str, self.hosted)))
        if self.coded:
            stored = (f"{v.dtype} {k} as {v.policy}" for k, v in self.coded.items())
            read = *read, ("stored", ", ".join(stored))
        if self.flat:
            read = *read, ("flattened", " ".join(map(str, self.flat)))
        return *before, read, asked, zero_dim, modes


class ClassWhole(ClassItem, Whole):
    """The item of a DTensor, which is what the class sees of it."""

    __slots__ = ()


class ClassShard(Shard):
    """What is here of a DTensor, for kernels. ``kept``: the state, where the class keeps it."""

    __slots__ = ("kept",)

    def __init__(self, whole: ClassWhole, kept: dict[Any, Any]) -> None:
        super().__init__(whole)
        self.kept, self.grad = kept, here(whole.grad)

    def visible(self, attributes: tuple[str, ...], work: bool) -> tuple[Any, ...]:
        *before, read, asked, zero_dim, modes = super().visible(attributes, work)
        return *before, (*read, ("spread over", "processes")), asked, zero_dim, modes

    def finish(self, created: dict[str, Buffer]) -> None:
        super().finish(created)
        put(self.kept, self.whole.state)


class ClassGroups:
    """A class's groups and state as the runtime sees them. Numbers of the host are in a group of their own."""

    extra: ClassVar[dict[str, list[torch.Tensor | None]]] = {}

    def __init__(self, opt: torch.optim.Optimizer, storage: str = "", capturable: bool = False) -> None:
        self._ref, self.storage = weakref.ref(opt), storage
        self.numbers: dict[str, Any] = numbers_of_host(capturable)
        self._known: Any = None
        """The store of state, where there is one."""
        self._stateless: set[int] = set()
        self._instead: tuple[list[tuple[Any, list[Any]]], dict[Any, Any]] | None = None

    @property
    def opt(self) -> torch.optim.Optimizer:
        opt = self._ref()
        assert opt is not None
        return opt

    @property
    def live(self) -> list[dict[str, Any]]:
        return [*self.opt.param_groups, self.numbers]

    @property
    def state(self) -> dict[Any, Any]:
        """The class's own; or a dict that has what it keeps of each parameter, as long as that is where it was.

        The other is there where parameters have no state, and where several optimizers, one in another, have some.
        """
        if self._instead is not None:
            known, instead = self._instead
            stores = stores_of(self.opt)
            if len(stores) == len(known) and all(
                a is b and len(a) == len(values) and all(map(operator.is_, a.values(), values))
                for a, (b, values) in zip(stores, known, strict=True)
            ):
                return instead
            return {}
        own = vars(self.opt).get("state")
        if own is None or own is not self._known:
            self._known = stores_of(self.opt)[0]
        return self._known

    def ignores(self, group: int, name: Any) -> bool:
        """Nothing: a class looks after its state itself."""
        return False

    def numbers_of(self, group: int) -> tuple[int, ...]:
        return (-1,)

    def entries(self, p: torch.Tensor) -> Iterator[tuple[Any, bool, Any, str, Any]]:
        for name, (stored, nested, inner, value) in flattened(self.state[p], parted=True).items():
            yield stored, nested, inner, name, value

    def places(self, group: dict[str, Any]) -> Iterator[tuple[str, int, Any, Any, Any, float]]:
        if group is self.numbers:
            for name, value in group.items():
                if name != "params":
                    yield name, -1, value, name, value, float("-inf")

    def settle(self, todo: Sequence[Item]) -> None:
        """Nothing: a class begins its state itself, before kernels step."""

    def hand_over(self, item: Item) -> Callable[[], None]:
        flat = item.flat if isinstance(item, ClassItem) else {}
        return partial(put, self.state[item.home], item.state | flat, parted=True)

    def keep(self, todo: list[Item]) -> None:
        """Nothing: state is the class's own."""

    def items(self, scaling: Scaling) -> list[Item]:
        """The parameters with a gradient. Raises Untraceable for one that kernels cannot take."""
        todo: list[Item] = []
        modes, whole = scaling.modes(False), self._looked_up()
        for g, group in enumerate(self.opt.param_groups):
            params = list(group["params"])
            leaf.settle(params)
            for i, p in enumerate(params):
                if p.grad is None:
                    continue
                kept = whole[p]
                if why := _strangely_spread(p, p.grad, values_of(kept)) or _strange(p) or _strange(p.grad):
                    raise Untraceable(f"parameter {i} of group {g} {why}")
                given = p, p.grad, kept, (g, i), self.numbers, modes
                item = ClassShard(ClassWhole(*given), whole[p]) if is_dtensor(p) else ClassItem(*given)
                todo.append(item)
                if any(isinstance(v, torch.Tensor) and v.device != p.device for v in item.state.values()):
                    raise Untraceable(f"parameter {i} of group {g} has state on another device")
        if len({id(item.owner) for item in todo}) < len(todo):
            raise Untraceable("a parameter is listed twice")
        state = [v for item in todo for v in item.state.values() if isinstance(v, torch.Tensor)]
        state += [v for item in todo for v in _hosted(item).values()]
        written = [here(t) for t in (*(item.param for item in todo), *state)]
        if not sharing.disjoint(written, [here(item.grad) for item in todo]):
            raise Untraceable("parameters, gradients or state have memory in common")
        return todo

    def _looked_up(self) -> dict[Any, dict[Any, Any]]:
        """What is kept of each parameter that has a gradient. Raises NewState if there is more to come."""
        stores = stores_of(self.opt)
        params = [p for group in self.opt.param_groups for p in group["params"] if p.grad is not None]
        found = ((p, whole_of(stores, p)) for p in params)
        whole = {p: kept for p, kept in found if kept is not None}
        self.encode()
        without = [p for p in params if p not in whole]
        new = {id(p) for p in without}
        if not new <= self._stateless:  # the class makes their state; if not, they need none
            self._stateless |= new
            raise NewState("state is new", traced=False)
        if without and not all(whole.values()):  # the class looks it up, which makes an entry
            raise NewState("a parameter gets its entry in the state", traced=False)
        self._instead = None
        if without or len(stores) > 1:
            whole |= {p: {} for p in without}
            resting = ((p, whole_of(stores, p)) for p in self.params() if p.grad is None)
            whole |= {p: kept or {} for p, kept in resting if kept is not None or id(p) in self._stateless}
            self._instead = [(store, list(store.values())) for store in stores], {**stores[0], **whole}
        return whole

    def decode(self) -> None:
        """Make what policies store plain tensors, for the class."""
        for kept in list(stores_of(self.opt)[0].values()) if self.storage else ():
            decode(kept)

    def encode(self) -> None:
        """Store what the class has made."""
        if self.storage:
            encode(self.opt, stores_of(self.opt)[0], self.storage)

    def kept(self) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """Each parameter with its state, as it is stored."""
        for p in self.params():
            yield p, values_of(stores_of(self.opt)[0].get(p, {}), parted=True)

    def params(self) -> list[torch.Tensor]:
        return [p for group in self.opt.param_groups for p in group["params"]]

    def resting(
        self, stepped: list[Item], scaling: Scaling, among: Container[int] | None = None
    ) -> list[Item]:
        """Parameters without a gradient now that had one before, as if theirs were zero."""
        modes, state = stepped[0].modes, self.state
        return [
            ClassItem(p, p.detach(), state[p], (g, i), self.numbers, modes)
            for g, group in enumerate(self.opt.param_groups)
            for i, p in enumerate(group["params"])
            if p.grad is None
            and (among is None or id(p) in among)
            and p in state
            and not is_dtensor(p)
            and not _strange(p)
        ]


def _hosted(item: Any) -> dict[str, torch.Tensor]:
    """The tensors that the host keeps, each of which is written once."""
    found: dict[str, torch.Tensor] = (item.whole if sharded.is_shard(item) else item).hosted
    return found


def _is_flat(value: Any, p: torch.Tensor) -> bool:
    """Whether it is a tensor that is the parameter's in shape, flattened."""
    return (
        type(value) is torch.Tensor
        and value.dim() == 1 != p.dim()
        and value.numel() == p.numel() > 1
        and value.is_contiguous()
        and p.is_contiguous()
        and not is_dtensor(p)
    )


def _strange(t: torch.Tensor) -> str:
    """Why kernels cannot take a tensor, or what is here of it."""
    if not t.numel():
        return "has no elements"
    t = here(t)
    if t.layout != torch.strided or t.is_complex() or not t.is_floating_point():
        return f"is a {t.layout} tensor of {t.dtype}"
    if not walkable(t) or (torch.overrides.is_tensor_like(t) and type(t).__torch_function__ not in _ORDINARY):
        return f"is a {type(t).__name__}, whose memory is elsewhere"
    if type(t).__module__.split(".")[0] != "torch":
        return f"is a {type(t).__name__}, and the step may ask for that"
    return "" if dense(t) else "is not dense in memory"


def _strangely_spread(p: Any, grad: Any, state: dict[str, Any]) -> str:
    """Why shards of a parameter, its gradient and state do not belong together. All processes find the same."""
    tensors = [v for v in state.values() if isinstance(v, torch.Tensor) and not on_host(v, p)]
    if not is_dtensor(p):
        return "is no DTensor, and its gradient or state is" if any(map(is_dtensor, [grad, *tensors])) else ""
    if any(placement.is_partial() for placement in p.placements):
        return "is a DTensor whose elements are still to be summed"
    for name, one in [("a gradient", grad), *(("state", t) for t in tensors)]:
        if not is_dtensor(one) or one.shape != p.shape:
            return f"is a DTensor, and has {name} that is none of its shape"
        if (one.device_mesh, one.placements) != (p.device_mesh, p.placements):
            return f"has {name} that is spread over processes in another way"
    return ""


_ORDINARY = (torch.Tensor.__torch_function__, torch.nn.Parameter.__torch_function__)


class Waits(Exception):
    """This step has no known trace, and is not traced."""


class StepBuckets(Buckets):
    """``waits``: how many steps without a known trace are not traced; ``closure``: whether the next step is given one;
    ``known_kinds``: whether the last trace was of parameters of the same kinds as one before; ``compiling``: seconds of
    this thread that went into compiling."""

    def __init__(self, groups: ClassGroups, title: str, options: Options, scaling: Scaling) -> None:
        super().__init__([], options.backend, title, None)
        self.groups, self.options, self.scaling = groups, options, scaling
        self.closure, self.traces_made, self.known_kinds, self.waits = False, 0, False, 0
        self.compiling = 0.0
        self.read: Any = None
        self._hosts: dict[Any, list[tuple[Host, list[CompiledTrace]]]] = {}
        self._current: list[tuple[tuple[Any, ...], CompiledTrace]] = []

    @property
    def sums(self) -> bool:
        """Whether some step was one that sums over its parameters."""
        return any(host.sums for known in self._hosts.values() for host, _ in known)

    def changed(self, host: Any) -> str | None:
        """Why a step is not the one that was traced, by what the host can see; its numbers are the groups' now."""
        self.groups.numbers = host.numbers
        return self._is_for(host) or host.look(vars(self.groups.opt))

    def _is_for(self, host: Host) -> str | None:
        if host.closure != self.closure:
            return f"a closure is {'given' if self.closure else 'no longer given'}"
        return None if type(self.groups.opt) is host.kind else "the optimizer is of another class"

    def forget(self) -> None:
        super().forget()
        for key in list(self._hosts)[:-16]:
            del self._hosts[key]

    def foreseen(self) -> bool:
        """Whether all on the host is as it was for a step that is known, whatever gradients there are."""
        hosts = [host for known in self._hosts.values() for host, _ in known]
        return any(
            self._is_for(host) is None and host.as_it_was(vars(self.groups.opt)) is None for host in hosts
        )

    def wait(self) -> None:
        """Raise Waits while no trace is to be tried, and no step that is known can be this one."""
        if self.waits and not self.foreseen():
            self.waits -= 1
            raise Waits

    def prepare(self, todo: list[Item]) -> tuple[list[Bucket], list[Item]]:
        while True:
            try:
                return self._prepared(self._sorted(todo)), []
            except NeedsAttribute as need:
                self.attributes += (need.name,)

    def traced(self, todo: list[Item], span: range | None = None, work: bool = False) -> list[Any]:
        """Each bucket with its plan in the step that was prepared last; -1 if it is none of that."""
        found: list[Any] = []
        for items, signature in self._sorted(todo):
            plan = None
            for key, known in self._current:
                if key == bucket_key(items, signature) and plan is None:
                    plan = self._replayed(items, signature, known)
            if plan is not None:
                self.read.meets([(items, signature)])
            found.append((items, plan or -1))
        return found

    def _prepared(self, buckets: list[tuple[list[Item], Signature]]) -> list[Bucket]:
        keys = [bucket_key(*bucket) for bucket in buckets]
        known = self._hosts.setdefault((self.closure, *keys), [])
        for host, compiled in known:
            host.meets(buckets)
            if not self.changed(host):
                plans = [self._replayed(*b, c) for b, c in zip(buckets, compiled, strict=True)]
                if all(plans):
                    return self._taken(host, keys, compiled, plans)
        if self.waits:
            self.waits -= 1
            raise Waits
        opt = self.groups.opt
        for _, signature in buckets:
            _look_at_state(signature)
        self.traces_made += 1
        self.known_kinds = bool(known)
        seen = [([*map(sharded.unfused, items)], signature) for items, signature in buckets]
        step = trace_step(opt, seen, self.closure, self.options, self._name)
        if not any(trace.program.stores for trace in step.traces):
            raise Untraceable("the step changes no parameter and no tensor of its state")
        for (items, _), trace in zip(buckets, step.traces, strict=True):
            if _writes_elsewhere(trace, items):
                raise Untraceable(
                    "gradients, which the step writes to, are in another layout than their parameters, or have memory "
                    "in common"
                )
            if any(map(sharded.is_shard, items)) and (looks := _beyond_parts(trace)):
                raise Untraceable(f"{looks} of a tensor that is spread over processes")
        began = time.thread_time()
        compiled = [self._compiled(trace) for trace in step.traces]
        self.compiling += time.thread_time() - began
        for (items, _), one in zip(buckets, compiled, strict=True):
            whole = any(map(sharded.looks_at_all, [one.trace.program, *one.trace.rounds]))
            if any(not item.fuses(one.backend, whole=whole) for item in items):
                raise Untraceable(
                    "the step takes a norm, a sum or a mean of a tensor that is spread over processes, which the "
                    f"{one.backend.name} backend does not exchange"
                )
        if self.options.check and (why := difference(opt, step, self.options, self.scaling.inverse)):
            raise Untraceable(f"what kernels would do differs from what the step does: {why}")
        known[:] = [*known[-MAX_KNOWN:], (step.host, compiled)]
        if why := self.changed(step.host):
            raise Untraceable(f"the step cannot be repeated: {why}")
        plans = [self._replayed(*b, c) for b, c in zip(buckets, compiled, strict=True)]
        if not all(plans):
            raise Untraceable("the step cannot be repeated: numbers go another way when they are replayed")
        return self._taken(step.host, keys, compiled, plans)

    def _taken(
        self, host: Host, keys: list[tuple[Any, ...]], compiled: list[CompiledTrace], plans: list[Any]
    ) -> list[Bucket]:
        self.read, self._current = host, list(zip(keys, compiled, strict=True))
        for plan in plans:
            self._planned(plan)
        return plans

    def _compiled(self, trace: Any) -> CompiledTrace:
        compiled = self._compile(trace, self.title)
        if compiled is None:
            raise Untraceable("no compiled backend can be used here; python -m fusedopt doctor says why")
        replay = Replay(trace)
        rounds = self._compile_rounds(trace, self.title)
        if rounds is None:
            raise Untraceable("no compiled backend can be used here; python -m fusedopt doctor says why")
        return CompiledTrace(trace, *compiled, replay, [], rounds=rounds)

    def _replayed(self, items: list[Item], signature: Signature, known: CompiledTrace) -> Bucket | None:
        assert known.replay is not None
        if _writes_elsewhere(known.trace, items):
            return None
        again = known.replay(self.groups.numbers, dict(signature.state))
        return Bucket(items, known, *again) if again and fit(again[0], signature.compute) else None

    def _name(self, path: Path) -> str:
        """What a number of the host is called in kernels' comments, and in the group of numbers."""
        groups = self.groups.opt.param_groups
        if path[0] == ("item", "param_groups") and len(path) > 2:
            which = f"group{path[1][1]}." if len(groups) > 1 else ""
            return which + str(path[2][1]) + "".join(f"[{key!r}]" for _, key in path[3:])
        return shown(path)


def _look_at_state(signature: Signature) -> None:
    """Raise Untraceable for a value of the state that may change in ways that nobody sees."""
    for key, value in signature.state:
        if not is_plain([value]):
            what = _called(value.value if isinstance(value, Opaque) else value)
            raise Untraceable(
                f"the state {key!r} is {what}, and state is tensors, numbers, texts and flags, at most in one dict, "
                "list or object"
            )


def _called(value: Any) -> str:
    kind, empty = type(value), isinstance(value, Sized) and not len(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"an empty {name}" if empty else f"a {name}"


def _writes_elsewhere(trace: Trace, items: list[Item]) -> bool:
    """Whether what is written into gradients would be written to copies of them, or into other parameters' too."""
    if not any(name == "grad" for name, _ in trace.program.stores):
        return False
    alike = all(same_layout(item.grad, item.param) for item in items)
    return not alike or not sharing.disjoint([here(item.grad) for item in items], [])


def _beyond_parts(trace: Trace) -> str:
    """What a step looks at that processes do not exchange."""
    if trace.externs is not None:
        return "torch is called with all"
    along = any(program.axes > 1 for program in (trace.program, *trace.rounds))
    return "the step looks at rows or columns" if along else ""
