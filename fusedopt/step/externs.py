"""Torch calls between fused programs: what they are given is stacked, and they are made once for many parameters.

Parameters of a bucket have one shape. What a program leaves of all of them is one tensor, a slice for each, so small
matrices are multiplied in one call; of large ones, each that is as much as a batch, it is a call for each.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..trace.cuts import Externs, Function, Load, Number, Placed, Step, alone
from ..trace.externs import Call, Kept, Result, leaves, mapped
from ..trace.run import GRAD, PARAM
from ..trace.tensor import METHODS

if TYPE_CHECKING:
    from .buckets import Bucket
    from .items import Item

BATCH = 1 << 20
"""Elements of a parameter and those stacked with it: more does not pay, and has to be kept in memory."""

Memory = dict[str, torch.Tensor]
"""What programs leave and find, by buffer: a slice for each parameter."""


def memory(externs: Externs, count: int, device: torch.device) -> Memory:
    """Memory for so many parameters. Zeros: a kernel leaves nothing of a tensor without elements."""
    own = {
        name: torch.zeros((count, *shape), dtype=dtype, device=device)
        for name, (dtype, shape) in externs.buffers.items()
        if name not in externs.reused
    }
    return own | {name: own[given] for name, given in externs.reused.items()}


Tensors = Callable[[str], list[torch.Tensor]]
"""What the state of each parameter of a bucket has under a callback's name for it, now; the parameters under
``PARAM``, their gradients under ``GRAD``."""


def held(item: Item, key: str) -> torch.Tensor:
    """One of these, of a parameter."""
    own = {PARAM: item.param, GRAD: item.grad}.get(key)
    found: torch.Tensor = item.state[key] if own is None else own.detach()
    return found


def _of_items(plan: Bucket) -> Tensors:
    return lambda key: [held(item, key) for item in plan.items]


def calling(plans: Sequence[Bucket], tensors: Callable[[Bucket], Tensors] | None = None) -> list[Calling]:
    """The calls of each of these plans that share a launch, a scalar set each.

    tensors: who finds their state, where steps are repeated
    """
    return [
        Calling(plan.trace.externs, plan.memory, k, tensors(plan) if tensors else _of_items(plan))
        for k, plan in enumerate(plans)
        if plan.trace.externs is not None
    ]


class Later(NamedTuple):
    """A call that updates state in place, once the whole step is known to work: nothing else needs what it gives."""

    into: Into
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def reads_but(self, own: torch.Tensor, changing: set[int]) -> bool:
        """Whether it takes memory that may change before that, besides the state's own."""
        tensors = [x for x in leaves((self.args, tuple(self.kwargs.values()))) if isinstance(x, torch.Tensor)]
        return any(t is not own and t.untyped_storage().data_ptr() in changing for t in tensors)


class Calling:
    """The calls of one bucket in a step. What they give in one round is kept for the next."""

    def __init__(self, externs: Externs, memory: Memory, set_: int, tensors: Tensors) -> None:
        self.externs, self.memory, self.set = externs, memory, set_
        self.count = len(next(iter(memory.values())))
        self._batches = list(self._batched())
        self._theirs = {t.untyped_storage().data_ptr() for t in memory.values()}
        self._tensors: Tensors | None = tensors
        self._kept: list[dict[int, Any]] = []
        self._new: list[tuple[torch.Tensor, torch.Tensor | Later]] = []

    @property
    def looks_first(self) -> bool:
        """Whether a step that is to be skipped has to be known on the host: infinities would be an error."""
        on_cpu = all(t.device.type == "cpu" for t in self.memory.values())
        return on_cpu or self.externs.may_fail or bool(self.externs.kept)

    def calls(self, number: int) -> list[str]:
        """What a round calls."""
        function = self.externs.functions[number]
        steps = function.steps if function else ()
        return [s.call.name.strip("_") for s in steps if s.call.function is not operator.getitem]

    def described(self, number: int) -> str:
        """That in words."""
        names, stack = self.calls(number), min(self.stack, self.count)
        shape = "×".join(map(str, max((s for _, s in self.externs.buffers.values()), key=math.prod)))
        counts = ", ".join(f"{names.count(n)} {n}" for n in dict.fromkeys(names))
        how = "for each" if stack == 1 else f"for {stack} at once"
        tensors = "1 tensor" if self.count == 1 else f"{self.count} tensors"
        return f"{tensors} of {shape or 'no dimensions'}, {how}: torch's {counts}"

    @functools.cached_property
    def stack(self) -> int:
        """How many parameters a call is made for."""
        tensors = [*self.externs.buffers.values(), *self.externs.kept.values()]
        device = next(iter(self.memory.values())).device
        if any(alone(device, dtype, shape) for dtype, shape in tensors):
            return 1
        return max(1, BATCH // max(1, *(math.prod(shape) for _, shape in tensors)))

    def commit(self) -> None:
        """Write what calls left for the state."""
        with torch.no_grad():
            for there, new in self._new:
                if isinstance(new, Later):
                    new.into(*new.args, **new.kwargs, out=there)
                else:
                    there.copy_(new)
        self._new = []

    def forget(self) -> None:
        """What an earlier step left that came to nothing."""
        self._new, self._kept = [], []

    def let_go(self) -> None:
        """Hold no memory from here on."""
        self.forget()
        self.memory, self._batches, self._tensors = {}, [], None

    def _state(self, key: str) -> list[torch.Tensor]:
        """Raises RuntimeError if it is not what the calls were recorded for."""
        assert self._tensors is not None
        found, (_, shape) = self._tensors(key), self.externs.kept[key]
        if any(not isinstance(t, torch.Tensor) or t.shape != shape for t in found):
            raise RuntimeError(f"the state {key!r} has another shape than {list(shape)}, which it had before")
        return found

    def run(self, number: int, slots: Sequence[float]) -> None:
        """Make the calls of a round. Torch's own error, if one of them fails: nothing has changed then."""
        function = self.externs.functions[number]
        if function is None:
            return
        if any(0 in shape for _, shape in self.externs.buffers.values()):
            return
        last = not any(self.externs.functions[number + 1 :])
        used = {x.key for step in function.steps for x in step.call.refs() if isinstance(x, Kept)}
        state = {key: self._state(key) for key in used.union(key for key, _ in function.written)}
        self._kept = self._kept or [{} for _ in self._batches]
        with torch.no_grad():
            for (batch, count, views), known in zip(self._batches, self._kept, strict=True):
                try:
                    self._batch(number, count, views, known, slots, {k: v[batch] for k, v in state.items()})
                except Exception as error:
                    error.of_a_call = True  # type: ignore[attr-defined]
                    raise
                if last:
                    known.clear()
        if last:
            self._kept = []

    def _batched(self) -> Iterator[tuple[slice, int, Memory]]:
        """The parameters that a call is made for, how many they are, and their memory: of a single one no stack."""
        for i in range(0, self.count, self.stack):
            batch = slice(i, min(i + self.stack, self.count))
            single = batch.stop == i + 1
            views = {name: t[i] if single else t[batch] for name, t in self.memory.items()}
            yield batch, batch.stop - i, views

    def _batch(
        self,
        number: int,
        count: int,
        views: Memory,
        known: dict[int, Any],
        slots: Sequence[float],
        state: dict[str, list[torch.Tensor]],
    ) -> None:
        single = count == 1
        used, done, between = _between(self.externs, number, single)
        kept = {
            k: (state[k][0] if single else torch.stack(state[k])).to(self.externs.kept[k][0]) for k in used
        }
        if self.externs.views:
            kept = {k: t.contiguous() for k, t in kept.items()}
        changed = self.externs.changing.union(
            key for f in self.externs.functions if f for key, _ in f.written
        )
        changing = self._theirs.union(kept[k].untyped_storage().data_ptr() for k in changed & kept.keys())

        def update(
            key: str, into: Into, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Later | torch.Tensor:
            later = Later(into, args, kwargs)
            waits = state[key][0].dtype == kept[key].dtype and not later.reads_but(kept[key], changing)
            return later if waits else into(*args, **kwargs)

        between(known, views, kept, slots, count, update)
        theirs = self._theirs.union(t.untyped_storage().data_ptr() for t in kept.values())

        def own(call: int) -> torch.Tensor:
            """What a call gave, if need be a copy: memory that it may be a view of is written to."""
            found = known[call]
            return found.clone() if found.untyped_storage().data_ptr() in theirs else found

        function = self.externs.functions[number]
        assert function is not None
        made = [(name, own(call)) for name, call in function.outputs if name not in done]
        for key, call in function.written:
            if isinstance(known[call], Later):
                self._new.append((state[key][0], known[call]))
                continue
            new = [own(call)] if single else own(call).unbind()
            self._new += zip(state[key], new, strict=True)
        for name, found in made:
            views[name].copy_(found)


Between = Callable[[dict[int, Any], Memory, Memory, Sequence[float], int, Callable[..., Any]], None]
"""The calls of a round: what calls gave by number, which it adds to, what programs left, state, slots, how many, and
what is done about updates of state."""


def _between(externs: Externs, number: int, single: bool) -> tuple[list[str], frozenset[str], Between]:
    """The state that the calls of a round take, the buffers that they fill themselves, and they as one generated
    function, of stacks or of one parameter."""
    key = number, single
    if key not in externs.compiled:
        function = externs.functions[number]
        assert function is not None
        used = {x.key for step in function.steps for x in step.call.refs() if isinstance(x, Kept)}
        placed = _filling(externs, function) if single else {}
        done = frozenset(place.buffer for _, place in placed.values())
        externs.compiled[key] = sorted(used), done, _generated(externs, function, single, placed)
    found: tuple[list[str], frozenset[str], Between] = externs.compiled[key]
    return found


Into = Callable[..., torch.Tensor]
_INTO = frozenset(
    "matmul mm bmm mv addmm baddbmm addmv index_select add sub mul div pow square sqrt rsqrt neg lerp".split()  # noqa: SIM905
)
"""Functions that write what they give where ``out`` says, without a copy of it."""


def _filling(externs: Externs, function: Function) -> dict[int, tuple[Into, Placed]]:
    """The calls of one parameter's tensors that can leave what they give in its buffer: with what, and where."""
    # What has one element may have it in another shape than in the trace.
    places = {place.call: place for place in function.placed if math.prod(place.shape) > 1}
    out: dict[int, tuple[Into, Placed]] = {}
    for step in function.steps:
        name = step.call.name
        if step.number not in places or _rank(next(step.call.refs(), None), externs) is None:
            continue
        if name in _INTO:
            out[step.number] = getattr(torch, name), places[step.number]
        elif turned := _product(step.call, externs):
            out[step.number] = functools.partial(_multiplied, turned), places[step.number]
    return out


def _later(externs: Externs, function: Function) -> dict[int, str]:
    """The calls of one parameter's tensors that nothing needs but the state that they are an update of, and its key."""
    steps = [step for f in externs.functions if f for step in f.steps]
    needed = {x.call for step in steps for x in step.call.refs() if isinstance(x, Result)}
    needed |= {call for f in externs.functions if f for _, call in f.outputs}
    written = [call for _, call in function.written]
    updates = {call: Kept(key) for key, call in function.written if written.count(call) == 1}
    return {
        step.number: updates[step.number].key
        for step in function.steps
        if step.number in updates.keys() - needed
        and step.call.name in _INTO
        and math.prod(externs.kept[updates[step.number].key][1]) > 1
        and next(step.call.refs(), None) == updates[step.number]
    }


def _product(call: Call, externs: Externs) -> tuple[bool, bool] | None:
    """Which matrix to transpose in a contraction that is a product of two; None if it is none."""
    ranks = [r for x in call.refs() if (r := _rank(x, externs)) is not None]
    return _contracted(call) if call.name == "tensordot" and ranks == [2, 2] else None


def _multiplied(
    turned: tuple[bool, bool], a: torch.Tensor, b: torch.Tensor, *_: Any, **kwargs: Any
) -> torch.Tensor:
    return torch.matmul(a.mT if turned[0] else a, b.mT if turned[1] else b, out=kwargs.get("out"))


def _generated(
    externs: Externs, function: Function, single: bool, placed: dict[int, tuple[Into, Placed]]
) -> Between:
    space: dict[str, Any] = {}
    own = {step.number for step in function.steps}
    later = _later(externs, function) if single else {}
    lines = ["def between(known, views, kept, slots, count, update):"]

    def constant(x: Any) -> str:
        space[name := f"k{len(space)}"] = x
        return name

    def spelled(x: Any) -> str:
        if type(x) in (tuple, list):
            inner = "".join(f"{spelled(part)}, " for part in x)
            return f"({inner})" if type(x) is tuple else f"[{inner}]"
        if isinstance(x, Result):
            return f"r{x.call}" if x.call in own else f"known[{x.call}]"
        if isinstance(x, Load):
            return f"views[{x.buffer!r}]"
        if isinstance(x, Kept):
            return f"kept[{x.key!r}]"
        return f"slots[{x.slot}]" if isinstance(x, Number) else constant(x)

    for step in function.steps:
        call = step.call
        args = [spelled(x) for x in call.args]
        kwargs = [(k, spelled(v)) for k, v in call.kwargs]
        of_parameters = any(isinstance(x, (Result, Load, Kept)) for x in call.refs())
        if call.function is torch.Tensor.clone and not kwargs and of_parameters:
            made = args[0]  # nothing is written in place
        elif step.number in later:
            named = "".join(f"{k!r}: {v}, " for k, v in kwargs)
            into = getattr(torch, call.name)
            made = f"update({later[step.number]!r}, {constant(into)}, ({''.join(f'{a}, ' for a in args)}), {{{named}}})"
        elif step.number in placed:
            into, (_, buffer, shape) = placed[step.number]
            place = f"views[{buffer!r}]"
            place += "" if shape == externs.buffers[buffer][1] else f".view({shape})"
            keywords = [*(f"{k}={v}" for k, v in kwargs), f"out={place}"]
            made = f"{constant(into)}({', '.join([*args, *keywords])})"
        elif single or not of_parameters:
            made = f"{constant(call.function)}({', '.join([*args, *(f'{k}={v}' for k, v in kwargs)])})"
            made = made if single else f"{constant(_spread)}({made}, count)"  # of constants alone
        else:
            named = "".join(f"{k!r}: {v}, " for k, v in kwargs)
            made = f"{constant(stacked(step, externs))}(({''.join(f'{a}, ' for a in args)}), {{{named}}})"
        lines.append(f"    r{step.number} = {made}")
        lines += [f"    del r{gone}" if gone in own else f"    del known[{gone}]" for gone in step.last]
        own -= set(step.last)
    lines += [f"    known[{n}] = r{n}" for n in sorted(own)]
    exec("\n".join(lines), space)
    between: Between = space["between"]
    return between


def _spread(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.expand(count, *x.shape)


# --
# Calls on stacked tensors

Stacked = Callable[[Any, dict[str, Any]], Any]
_CASTS = frozenset(["to", "bfloat16", "float", "half", "double", "bool", "clone", "contiguous"])
_LINEAR_ALGEBRA = frozenset(
    """
    linalg_qr linalg_eigh linalg_eigvalsh linalg_svd linalg_svdvals linalg_inv inverse linalg_cholesky cholesky
    linalg_pinv linalg_matrix_exp matrix_exp linalg_solve tril triu
    """.split()  # noqa: SIM905
)
"""Functions of matrices that take stacks of them."""
_NOT_ELEMENTWISE = frozenset(
    """
    sum mean amax amin max min norm vector_norm std var any all normalize cosine_similarity __getitem__ unsqueeze
    squeeze view reshape flatten view_as reshape_as expand_as dot size dim numel nelement is_floating_point is_complex
    element_size requires_grad softplus nan_to_num
    """.split()  # noqa: SIM905
)
_TRANSPOSED = frozenset(("T", "mT", "H", "mH", "t", "adjoint"))


def stacked(step: Step, externs: Externs) -> Stacked:
    """The call on stacks: torch's function for them where there is one, else ``torch.vmap``."""
    call, name = step.call, step.call.name
    parts = [*leaves(call.args), *leaves(tuple(v for _, v in call.kwargs))]
    ranks = [_rank(x, externs) for x in parts]
    of_tensors = [r for r in ranks if r is not None]
    if call.function is operator.getitem:
        return lambda args, kwargs: args[0][args[1]]
    if name in _CASTS and len(of_tensors) == 1:
        return lambda args, kwargs: call.function(*args, **kwargs)
    if of_tensors == [2] and name in _TRANSPOSED:
        return lambda args, kwargs: args[0].mT
    if name in ("matmul", "mm", "bmm") and len(set(of_tensors)) == 1 and of_tensors[0] >= 2:
        return lambda args, kwargs: torch.matmul(*args)
    if (turned := _product(call, externs)) is not None:
        return lambda args, kwargs: _multiplied(turned, *args)
    if name == "addmm" and of_tensors == [2, 2, 2]:
        return lambda args, kwargs: torch.baddbmm(*args, **kwargs)
    if name in ("norm", "linalg_norm", "linalg_matrix_norm") and of_tensors == [2] and len(parts) == 1:
        return lambda args, kwargs: torch.linalg.vector_norm(args[0], dim=(1, 2))
    if name in _LINEAR_ALGEBRA and set(of_tensors) == {2}:
        return lambda args, kwargs: call.function(*args, **kwargs)
    if name.strip("_").removesuffix("_") in METHODS.keys() - _NOT_ELEMENTWISE and None not in of_tensors:
        return functools.partial(_elementwise, call.function, ranks, max(of_tensors, default=0))
    return functools.partial(_mapped, call.function, ranks)


def _contracted(call: Call) -> tuple[bool, bool] | None:
    """Which of two matrices to transpose, for their product to sum along these dimensions; None for other sums."""
    dims = [*call.args[2:], *(v for k, v in call.kwargs if k == "dims")]
    pair = [list(d) for d in dims[0]] if dims and type(dims[0]) in (list, tuple) else []
    if len(dims) != 1 or len(call.kwargs) > 1 or list(map(len, pair)) != [1, 1]:
        return None
    (a,), (b,) = pair
    return a % 2 == 0, b % 2 == 1


def _rank(x: Any, externs: Externs) -> int | None:
    """The dimensions of one parameter's tensor, where there is one for each parameter."""
    if isinstance(x, Result):
        return externs.ranks[x.call]
    if isinstance(x, Kept):
        return len(externs.kept[x.key][1])
    return len(externs.buffers[x.buffer][1]) if isinstance(x, Load) else None


def _elementwise(
    function: Callable[..., Any], ranks: list[int | None], rank: int, args: Any, kwargs: dict[str, Any]
) -> Any:
    """Broadcast as single ones would be: dimensions go between the first, which is theirs, and the others."""
    left = iter(ranks)

    def aligned(x: Any) -> Any:
        own = next(left)
        if own is None or own == rank:
            return x
        return x.reshape(x.shape[0], *[1] * (rank - own), *x.shape[1:])

    args = mapped(args, aligned)
    return function(*args, **{k: mapped(v, aligned) for k, v in kwargs.items()})


def _mapped(function: Callable[..., Any], ranks: list[int | None], args: Any, kwargs: dict[str, Any]) -> Any:
    flat = [*leaves(args), *leaves(tuple(kwargs.values()))]
    which = [k for k, rank in enumerate(ranks) if rank is not None]

    def of_one(*tensors: Any) -> Any:
        values = list(flat)
        for k, tensor in zip(which, tensors, strict=True):
            values[k] = tensor
        left = iter(values)
        again = mapped(args, lambda _: next(left))
        return function(*again, **{k: mapped(v, lambda _: next(left)) for k, v in kwargs.items()})

    tensors = [flat[k] for k in which]
    try:
        return torch.vmap(of_one)(*tensors)
    except RuntimeError:  # it has no such rule, or fails, which it says again
        found = [of_one(*each) for each in zip(*tensors, strict=True)]
        if isinstance(found[0], tuple):
            return type(found[0])(map(torch.stack, zip(*found, strict=True)))
        return torch.stack(found)
