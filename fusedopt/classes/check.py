"""A trace against the class itself: one step of a few parameters, on copies of them, by both.

Of DTensors the class steps DTensors. What is here of these is compared, or, as all processes must find the same where
they exchange what kernels reduce, all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..ir.program import Program, interpret
from ..step import externs
from ..step.items import Item
from ..step.scaling import Scaling
from ..step.sharded import gathered, here, is_dtensor, looks_at_all
from ..trace.signals import Untraceable
from ..trace.signature import PLAIN
from ..trace.totals import SUM, TOTAL, Total
from ..trace.tracer import Trace
from .host import bucket_key
from .shadow import Path, Shadow
from .stored import Stored
from .stores import in_stores, rebuilt, stores_of, values_of, whole_of
from .tracing import Options, StepTrace, plain_function

CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
"""How far results may be apart, relative to the largest, by the lowest precision among the tensors of a step: a class
rounds after every operation, kernels once."""

CODED = CLOSE[torch.bfloat16]
"""The same of state that a policy stores."""

NARROW = (torch.bfloat16, torch.float16)
"""Dtypes in which a step may be as small as an ulp of what it changes."""

View = Callable[[torch.Tensor], torch.Tensor]
"""What is looked at of a tensor, which may be a DTensor."""


class Copies:
    """Copies of some of an optimizer's parameters, with gradients times a factor, for the class itself to step."""

    def __init__(
        self, opt: torch.optim.Optimizer, params: list[torch.Tensor], closure: bool, factor: float
    ) -> None:
        self.tensors: dict[int, Any] = {}
        self._closure = closure
        self._factor = factor
        self._stores = stores_of(opt)
        self._states: dict[int, Any] = {}
        known: dict[int, dict[int, Any]] = {id(store): {} for store in self._stores}
        for p in params:
            self._add(opt, p)
        for group in opt.param_groups:
            resting = [p for p in group["params"] if p.grad is None][:1]
            for p in resting:
                self._add(opt, p)
        for at, state in self._states.items():
            for store, kept in in_stores(self._stores, state).items():
                known[store][at] = kept
        self.shadow = Shadow(opt, type(opt), self.tensors, _clone, known)

    def step(self) -> None:
        given = [lambda: torch.zeros(())] if self._closure else []
        plain_function(type(self.shadow.opt).step)(self.shadow.opt, *given)

    def _add(self, opt: torch.optim.Optimizer, p: torch.Tensor) -> None:
        copy = torch.nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
        vars(copy).update((k, v) for k, v in vars(p).items() if isinstance(v, PLAIN))
        self.tensors[id(p)] = copy
        if p.grad is not None:
            copy.grad = self.tensors[id(p.grad)] = _times(p.grad.detach(), self._factor)
        if (whole := whole_of(self._stores, p)) is not None:
            self._states[id(p)] = rebuilt(whole, self._copied)

    def _copied(self, name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return self.tensors.setdefault(id(value), value.detach().clone())

    def of(self, p: torch.Tensor, view: View) -> tuple[torch.Tensor, dict[str, Any]]:
        """The copy of a parameter, and its state by name."""
        copy, state = self.tensors[id(p)], values_of(self._states.get(id(p), {}))
        if not is_dtensor(copy):
            return copy, state
        seen = view(copy.detach())
        seen.grad = view(copy.grad)
        return seen, _viewed(state, view)


def difference(
    opt: torch.optim.Optimizer, step: StepTrace, options: Options, factor: float = 1.0
) -> str | None:
    """What a trace does otherwise than the class's own step, to copies of the parameters it was traced with.

    ``factor``: what their gradients are multiplied by, for both.
    """
    view = view_of([program for trace in step.traces for program in (trace.program, *trace.rounds)])
    seen = [[(_seen(item, view, factor), trace) for item, trace in bucket] for bucket in step.examples]
    examples = [example for bucket in seen for example in bucket]
    copies = Copies(opt, [item.owner for item, _ in examples], step.closure, factor)
    copies.step()
    totals = _totals([each for each in examples if each[1].externs is None])
    if why := step.host.look(vars(opt)):
        return why

    def total(k: int) -> float:
        return totals[str(Total(0, k))].item()

    counted = step.host.counted(total)
    for bucket in seen:
        called = _Called(bucket) if bucket[0][1].externs is not None else None
        for k, (item, trace) in enumerate(bucket):
            given, new = (totals, {}) if called is None else called.of(k)
            numbers = trace.new_numbers() | counted(bucket_key([item], trace.signature), item.state)
            copy, state = copies.of(item.owner, view)
            if why := _apart(item, trace, copy, state, options.write_grads, given, new, numbers):
                return why
    return step.host.differs(vars(opt), vars(copies.shadow.opt), total)


def view_of(programs: list[Program]) -> View:
    """What has to be looked at of a step of these programs."""
    return gathered if any(map(looks_at_all, programs)) else here


def _as_it_is(t: torch.Tensor) -> torch.Tensor:
    return t


def _times(grad: torch.Tensor, factor: float) -> torch.Tensor:
    return grad.clone() if factor == 1.0 else grad * factor


def _viewed(state: dict[str, Any], view: View) -> dict[str, Any]:
    return {k: view(v) if isinstance(v, torch.Tensor) else v for k, v in state.items()}


class Seen(Item):
    """What is looked at of an item of a class. ``coded``: as of that."""

    __slots__ = ("coded",)
    coded: dict[str, Stored]


def _seen(item: Any, view: View, factor: float) -> Seen:
    view = view if is_dtensor(item.param) else _as_it_is
    param, grad, state = view(item.param.detach()), view(item.grad), _viewed(item.state, view)
    out = Seen(param, _times(grad, factor), state, item.where, item.hyper, item.modes)
    out.owner, out.coded = item.owner, item.coded
    return out


class _Called:
    """The torch calls of a bucket's examples, of all at once as in a step."""

    def __init__(self, bucket: Sequence[tuple[Item, Trace]]) -> None:
        found = bucket[0][1].externs
        assert found is not None
        self._memory = externs.memory(found, len(bucket), torch.device("cpu"))
        self._state = {
            key: [externs.held(item, key).detach().cpu().clone() for item, _ in bucket] for key in found.kept
        }
        calling = externs.Calling(found, self._memory, 0, lambda key: self._state[key])
        for number, program in enumerate(bucket[0][1].rounds):
            for k, (item, trace) in enumerate(bucket):
                left = _interpreted(trace, program, item, _given(item, program, self.of(k)[0]))
                for name, value in left.items():
                    self._memory[name][k].copy_(value)
            calling.run(number, bucket[0][1].slot_values())
        calling.commit()

    def of(self, k: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Of an example, what is between its programs, and its state that they take or write."""
        state = {f"state.{key}": values[k] for key, values in self._state.items()}
        return {name: values[k] for name, values in self._memory.items()}, state


def _totals(examples: Sequence[tuple[Item, Trace]]) -> dict[str, torch.Tensor]:
    """The sums over these parameters, by name; each is made of those that are known before."""
    todo = [(item, trace, program) for item, trace in examples for program in trace.rounds]
    out: dict[str, torch.Tensor] = {}
    while todo:
        missing = {_total(name) for _, _, program in todo for name, _ in program.stores}
        ready = [each for each in todo if missing.isdisjoint(name for name, _ in each[2].buffers)]
        if not ready:
            raise Untraceable("sums over parameters are made of one another")
        todo = [each for each in todo if not any(each is one for one in ready)]
        for item, trace, program in ready:
            for name, share in _interpreted(trace, program, item, _given(item, program, out)).items():
                out[_total(name)] = out.get(_total(name), torch.zeros((), dtype=torch.float64)) + share
    return out


def _total(share: str) -> str:
    return TOTAL + share.removeprefix(SUM)


def _given(item: Item, program: Program, totals: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The buffers of a program, on the host."""
    buffers = {"param": item.param, "grad": item.grad} | {f"state.{k}": v for k, v in item.state.items()}
    buffers |= totals
    given = {n: buffers.get(n, torch.ones(())) for n, _ in program.buffers} | {"param": item.param}
    return {k: v.detach().cpu() if isinstance(v, torch.Tensor) else v for k, v in given.items()}


class Sample:
    """A few parameters before a step: what the class itself does to them is compared with what kernels did.

    ``whole``: of all of them, as sums over them are those of all.
    """

    def __init__(self, opt: torch.optim.Optimizer, closure: bool, whole: bool, scaling: Scaling) -> None:
        found = [[p for p in group["params"] if p.grad is not None] for group in opt.param_groups]
        self.whole = whole
        self.params = [p for ps in found for p in sorted(ps, key=torch.Tensor.numel)[: None if whole else 2]]
        self.starts = [p.detach().clone() for p in self.params]
        grads = [p.grad for ps in found for p in ps if p.grad.layout == torch.strided]
        self.copies = Copies(opt, self.params, closure, scaling.factor(grads))

    def difference(self, opt: torch.optim.Optimizer, programs: list[Program]) -> str | None:
        """What the step of these programs did otherwise."""
        self.copies.step()
        view = view_of(programs)
        for p, start in zip(self.params, self.starts, strict=True):
            copy, state = self.copies.of(p, view)
            close = _closeness([p, p.grad, *state.values()])
            if not _close(view(p.detach()), copy.detach(), view(start), close):
                return f"a parameter of shape {tuple(p.shape)}"
            real = _viewed(values_of(whole_of(stores_of(opt), p) or {}), view)
            for key, value in state.items():
                ours: Any = real.get(key)
                same = (
                    _close(ours, value, None, CODED if isinstance(ours, Stored) else close)
                    if isinstance(value, torch.Tensor)
                    else _same_number(ours, value)
                )
                if not same:
                    return f"the state {key!r} of a parameter of shape {tuple(p.shape)}"
        return None


def _clone(path: Path, value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _interpreted(
    trace: Trace, program: Program, item: Item, buffers: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """What a program of the trace leaves; it sees dimensions in the order of memory."""
    order, lengths = [d for group in trace.axes for d in group], trace.lengths(item.param.shape)
    if order == sorted(order):
        return interpret(program, buffers, trace.slot_values(), lengths)
    order += [d for d in range(item.param.dim()) if d not in order]  # those of length 1
    turned = {n: t.permute(order) if t.shape == item.param.shape else t for n, t in buffers.items()}
    found = interpret(program, turned, trace.slot_values(), lengths)
    back = [order.index(d) for d in range(len(order))]
    return {n: t.permute(back) if turned[n] is not buffers[n] else t for n, t in found.items()}


def _apart(
    item: Seen,
    trace: Trace,
    p: torch.Tensor,
    state: dict[str, Any],
    grads: bool,
    totals: dict[str, torch.Tensor],
    new: dict[str, torch.Tensor],
    numbers: dict[str, Any],
) -> str | None:
    buffers = {"param": item.param, "grad": item.grad} | {f"state.{k}": v for k, v in item.state.items()}
    ours = new | _interpreted(trace, trace.program, item, _given(item, trace.program, totals))
    for key, stored in item.coded.items():
        parts: list[Any] = [ours.get(f"state.{part}", item.state[part]) for part in stored.keys(key)]
        ours[f"state.{key}"] = stored.numbers(parts)
    between = trace.externs.dtypes if trace.externs is not None else ()
    close = max(
        _closeness([item.param, item.grad, *state.values()]), *(CLOSE.get(t, 0.0) for t in between), 0.0
    )
    theirs = (
        {"param": p.detach()}
        | ({"grad": p.grad} if grads else {})
        | {f"state.{k}": v for k, v in state.items()}
    )
    for name, value in theirs.items():
        before = buffers[name]
        if not isinstance(value, torch.Tensor) or name.removeprefix("state.") in numbers:
            continue
        now = ours.get(name, before)
        value = value.reshape(before.shape) if value.numel() == before.numel() else value  # a flattened one
        start = before.detach().cpu() if name == "param" else None
        if now is None or not _close(
            now, value.cpu(), start, CODED if name.removeprefix("state.") in item.coded else close
        ):
            return f"{name} of a parameter of shape {tuple(item.param.shape)}"
    for key, value in numbers.items():
        if key not in state:  # of what is stored
            continue
        if isinstance(held := state[key], torch.Tensor):  # by the host, in this precision
            if not _close(torch.full_like(held, value), held, None, close):
                return f"the state {key!r} is {value!r}, not {held.item()!r}"
        elif type(value) is not type(state[key]) or not _same_number(value, state[key]):
            return f"the state {key!r} is {value!r}, not {state[key]!r}"
    return None


def _closeness(values: list[Any]) -> float:
    return max(CLOSE.get(v.dtype, 0.0) for v in values if isinstance(v, torch.Tensor))


def _close(a: torch.Tensor, b: torch.Tensor, start: torch.Tensor | None, close: float) -> bool:
    dtype, a, b = b.dtype, a.detach().cpu().double(), b.cpu().double()
    if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return False
    finite = torch.isfinite(b)
    a, b = a[finite], b[finite]
    if not b.numel() or torch.equal(a, b):
        return True
    start = None if start is None else start.cpu().double()[finite]
    largest = float(b.abs().max())
    moved = largest if start is None else float((b - start).abs().max())
    limit = 10 * close * moved + close * 1e-2 * largest
    return float((a - b).abs().max()) <= limit or (
        start is not None and dtype in NARROW and _rounds_otherwise(a, b, start, dtype, limit)
    )


def _rounds_otherwise(
    a: torch.Tensor, b: torch.Tensor, start: torch.Tensor, dtype: torch.dtype, limit: float
) -> bool:
    """Whether elements are further apart by one ulp only: torch's loop over the last ones of a tensor rounds more often
    than the one over vectors. That all in all they went less far than the class's, or further, is not rounding's doing.
    """
    info, size = torch.finfo(dtype), torch.maximum(torch.maximum(a.abs(), b.abs()), start.abs())
    ulp = torch.exp2(size.clamp(min=info.smallest_normal).log2().floor()) * info.eps
    apart, moved = (a - b) / ulp, (b - start) / ulp
    leaning = float((apart * moved.sign()).sum().abs())
    by_chance = 2 * math.sqrt(apart.numel())
    one = bool(((a - b).abs() <= ulp.clamp(min=limit)).all())
    return one and leaning <= 0.25 * float(moved.abs().sum()) + by_chance


def _same_number(a: Any, b: Any) -> bool:
    if isinstance(a, float):
        return a == b or (a != a and b != b) or abs(a - b) <= 1e-9 * abs(b)
    return bool(a == b)
