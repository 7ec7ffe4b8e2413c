"""The tensors of a step: one ``Item`` per parameter, their layouts, and the work copies of the eager path."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..callback import is_temporary
from ..ir import random
from ..ir.ops import ELEMENT, TENSOR, kind_of
from ..ir.program import Buffer
from ..storage.callbacks import block_of
from ..trace import axes
from ..trace.signature import (
    CODES,
    HERE_IN_ORDER,
    HOST,
    LINE,
    MISSING,
    OWN,
    PLAIN,
    STARTED,
    WHOLE,
    Foreign,
    Modes,
    Opaque,
    Several,
    Signature,
    compute_dtype,
    stored_dtype,
)
from . import reference
from .commit import Change

if TYPE_CHECKING:
    from ..backends import Backend, Kernel
    from .scaling import Scaling

State = dict[str, Any]
_first = operator.itemgetter(0)


class Item:
    """One parameter in this step. ``param`` and ``grad`` are what kernels see, ``home`` is where results go.

    ``param`` is another tensor than ``home`` for a parameter that is not dense in memory (a slice of a larger one).
    ``owner`` is the user's parameter, also where ``home`` is a work copy of it. ``where`` is the index of its param
    group and its own in there, ``hyper`` the group's hyperparameters, ``state`` its state by the names callbacks use,
    ``modes`` what only the device knows; where they are bare, ``grad`` is the parameter itself.
    ``laid_out``: nothing was put in its place since it was last laid out. ``alike``: equal for items that callbacks and
    kernels cannot tell apart, which have dense tensors of their own in one layout (csrc/survey.h); None where that is
    not known.
    """

    one_is_whole = False
    """Whether state of one element is one number per tensor in any shape, not only where it is 0-d."""
    __slots__ = ("alike", "grad", "home", "hyper", "laid_out", "modes", "owner", "param", "state", "where")

    def __init__(
        self,
        home: torch.Tensor,
        grad: torch.Tensor,
        state: State,
        where: tuple[int, int],
        hyper: dict[str, Any],
        modes: Modes = HOST,
        alike: Hashable | None = None,
    ) -> None:
        self.home = self.param = self.owner = home
        self.grad, self.state, self.where, self.hyper = grad, state, where, hyper
        self.modes, self.laid_out, self.alike = modes, False, alike

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """State tensors with the parameter's shape."""
        for key, value in self.state.items():
            if isinstance(value, torch.Tensor) and per_element(value, self.param, self.modes):
                yield key, value

    def lay_out(self, rows: bool = False) -> None:
        """Give gradient and state the parameter's memory order, so that kernels can walk all of them flat.

        rows: kernels tell rows and columns apart, so memory has to be in the order of the dimensions
        """
        if rows and not self.param.is_contiguous():
            self.param = _in_order(self.param)
            self.laid_out, self.alike = False, None
        if self.laid_out or self.alike is not None:
            return
        self.laid_out = True
        if not dense(self.param):
            self.param = _in_order(self.param)
        graded = not self.modes.bare
        if graded and (not same_layout(self.grad, self.param) or overlap(self.grad, self.param)):
            self.grad = with_layout(self.grad, self.param)
        for key, value in list(self.tensors()):
            if not same_layout(value, self.param):
                self.state[key] = with_layout(value, self.param)

    def fuses(self, backend: Backend, along: bool = False, whole: bool = False) -> bool:
        """Whether the backend's kernels can step it. along: they tell its dimensions apart; whole: they look at all of
        the tensor, which may be spread over processes."""
        return self.walkable()

    def walkable(self) -> bool:
        """Whether its tensors have memory of their own."""
        if self.alike is not None:
            return True
        tensors = (v for v in self.state.values() if isinstance(v, torch.Tensor))
        return walkable(self.param) and walkable(self.grad) and all(map(walkable, tensors))

    def finish(self, created: dict[str, Buffer]) -> None:
        """Hand over what a launch has left: what kernels saw may have been copies. ``created`` is its new state."""
        if self.param is not self.home:
            self.home.copy_(self.param)

    def attribute(self, name: str) -> Any:
        """What callbacks may ask of the parameter. ``contiguous``: of all its tensors; None where they differ."""
        p = self.param
        if name == "contiguous":
            found = {t.is_contiguous() for t in (p, self.grad, *(t for _, t in self.tensors()))}
            return found.pop() if len(found) == 1 else None
        if name == "count":
            return p.numel()
        if name.startswith(LINE):
            return int(name.removeprefix(LINE))
        if name.startswith(WHOLE):
            last = next((n for n in reversed(p.shape) if n != 1), 1)
            return p.dim() < axes.MOST and last % int(name.removeprefix(WHOLE)) == 0
        if name.startswith(OWN):
            return own_attribute(self.owner, name)
        if name.startswith("fewer:"):  # than a number of elements
            return p.numel() < int(name.partition(":")[2])
        if name in ("in_order", HERE_IN_ORDER):  # what is not dense is copied, and then is
            return (p.is_contiguous() or not dense(p)) if walkable(p) else None
        if name == "dims":
            return axes.full(p.shape) if p.dim() <= axes.MOST else None
        if name == "order":
            return (
                axes.memory_order(p.shape, p.stride())
                if dense(p)
                else axes.memory_order(p.shape, (0,) * p.dim())
            )
        return getattr(self.owner if name == "requires_grad" else p, name)

    @property
    def has_codes(self) -> bool:
        """Whether policies of storage say how its state is stored."""
        return "storage" in self.hyper

    def code(self, key: str) -> Buffer | None:
        """What a policy of storage has made of state, if it is whole numbers."""
        value = self.state[key]
        if not isinstance(value, torch.Tensor) or not isinstance(key, str):
            return None
        if (count := block_of(key)) and value.dim() == 1:
            return _buffer(value.dtype, "0", axes.blocks(count))
        coded = value.dtype in CODES and value.shape == self.param.shape
        ours = coded and (":" in key or any(str(k).startswith(f"{key}:") for k in self.state))
        return _buffer(value.dtype, ELEMENT) if ours else None

    def signature(self, attributes: tuple[str, ...], work: bool) -> Signature:
        """What callbacks can see of it. ``work``: it is a work copy, whose dtypes are not the user's."""
        return Signature(*self.visible(attributes, work))

    def visible(self, attributes: tuple[str, ...], work: bool) -> tuple[Any, ...]:
        """The fields of its signature."""
        p, modes = self.param, self.modes
        state = [
            (k, v if type(v) in PLAIN else _visible(v, p, modes, self.one_is_whole))
            for k, v in self.state.items()
        ]
        if self.has_codes:
            state = [(k, self.code(k) or v) for k, v in state]
        state.sort(key=_first)
        read = tuple([(name, self.attribute(name)) for name in attributes])
        asked = None
        if work:
            marked = [
                (k, v)
                for k, v in self.state.items()
                if isinstance(v, torch.Tensor) and reference.is_marked(v)
            ]
            marks = tuple(sorted((k, reference.asked(v)) for k, v in marked))
            asked = reference.asked(p), reference.asked(self.grad), marks
        return p.device, p.dtype, self.grad.dtype, tuple(state), read, asked, p.dim() == 0, modes


def own_attribute(p: torch.Tensor, name: str) -> Any:
    """What is asked for by `OWN` and a name; if it is no number or flag, which object it is."""
    value = getattr(p, name.removeprefix(OWN), MISSING)
    return value if isinstance(value, PLAIN) else Opaque(value)


def facts(kernel: Kernel, rows: Sequence[Item], shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """What only some kernels have to know of parameters: the lengths of their axes, and which ones they are, to draw
    random numbers for them. Backends that know of no such kernels are not told."""
    found: dict[str, Any] = {"shapes": shapes} if kernel.program.axes > 1 else {}
    drawn = {"places": [random.place(*item.where) for item in rows]} if kernel.program.draws else {}
    return found | drawn


def inside(container: Any) -> Any:
    """What a container in the state has: the dict or list itself, or an object's attributes."""
    return container if isinstance(container, (dict, list)) else vars(container)


class Groups(Protocol):
    """What is asked of `optimizer.groups.ParamGroups`."""

    @property
    def live(self) -> list[dict[str, Any]]: ...
    @property
    def state(self) -> dict[Any, Any]: ...
    @property
    def extra(self) -> dict[str, list[torch.Tensor | None]]: ...
    def ignores(self, group: int, name: Any) -> bool: ...
    def numbers_of(self, group: int) -> Sequence[int]: ...
    def entries(self, p: torch.Tensor) -> Iterator[tuple[Any, bool, Any, str, Any]]: ...
    def places(self, group: dict[str, Any]) -> Iterator[tuple[str, int, Any, Any, Any, float]]: ...
    def settle(self, todo: Sequence[Item]) -> None: ...
    def hand_over(self, item: Item) -> Callable[[], None]: ...
    def resting(
        self, stepped: list[Item], scaling: Scaling, among: Container[int] | None = None
    ) -> list[Item]: ...
    def keep(self, todo: list[Item]) -> None: ...


def _visible(value: Any, p: torch.Tensor, modes: Modes, one_is_whole: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return Opaque(value)
    whole = per_element(value, p, modes)
    several = value.numel() != 1 if one_is_whole else value.dim()
    if value.dtype in reference.FLOATS and not whole and several and value.is_contiguous():
        found = _along(value.dtype, value.shape, p.shape)
        if found is not None:
            return found
    if value.dtype not in reference.FLOATS or (not whole and several):
        return Foreign(value.dtype, value.shape)
    return _buffer(value.dtype, ELEMENT if whole else TENSOR)


_buffer = functools.lru_cache(Buffer)


@functools.lru_cache(maxsize=4096)
def _along(dtype: torch.dtype, shape: torch.Size, like: torch.Size) -> Buffer | Several | None:
    """State that goes along some dimensions of its parameter."""
    if len(like) > axes.MOST:
        return None
    whole = axes.along(axes.full(like))
    found = tuple(Buffer(dtype, kind_of(axes.along(d), whole), d) for d in axes.layouts(shape, like))
    return None if not found else found[0] if len(found) == 1 else Several(found)


def per_element(value: torch.Tensor, p: torch.Tensor, modes: Modes) -> bool:
    """Whether state has one number per element. That of a 0-d parameter has, but for counts on the device (float64)."""
    if value.shape != p.shape:
        return False
    return not (modes.on_device and value.dim() == 0 and value.dtype == torch.float64 != p.dtype)


def dense(t: torch.Tensor) -> bool:
    """Whether its elements fill one block of memory, in whatever order of dimensions."""
    plain = t.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(t))
    return plain and not t.is_neg()


def walkable(t: torch.Tensor) -> bool:
    """Whether its memory is its own: subclasses that dispatch (DTensor, fake tensors) have it elsewhere or nowhere."""
    plain = type(t) in (torch.Tensor, torch.nn.Parameter)
    return plain or type(t).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ or t.numel() == 0


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether flat position i is the same element in both; strides of dimensions of size one do not matter."""
    if a.is_neg():  # torch has real tensors whose memory holds their negative
        return False
    x, y = a.stride(), b.stride()
    return x == y or all(s == 1 or i == j for s, i, j in zip(b.shape, x, y, strict=True))


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one layout share memory, so that writing the one might change the other in mid-kernel."""
    return abs(a.data_ptr() - b.data_ptr()) < b.numel() * max(a.itemsize, b.itemsize)


def _in_order(t: torch.Tensor) -> torch.Tensor:
    """A copy of ``t`` with its dimensions in their order in memory."""
    out = t.detach().contiguous().resolve_neg()
    return reference.mark(out, reference.asked(t)) if reference.is_marked(t) else out


def with_layout(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A copy of ``t`` with the strides of the dense tensor ``like``."""
    out = torch.empty_strided(like.size(), like.stride(), dtype=t.dtype, device=t.device).copy_(t)
    return reference.mark(out, reference.asked(t))


def allocate(item: Item, created: dict[str, Buffer], starts: dict[str, float]) -> State:
    """New state buffers, as zeros: skipped steps never leave uninitialised memory behind. Counts have ``starts``."""
    p, made = item.param, {}
    for key, buffer in created.items():
        if buffer.dims is not None:
            made[key] = torch.zeros(axes.sizes(buffer.dims, p.shape), dtype=buffer.dtype, device=p.device)
        elif buffer.kind == ELEMENT and key not in starts:
            made[key] = torch.zeros_like(p, dtype=buffer.dtype, requires_grad=False)
        else:
            made[key] = torch.full((), starts.get(key, 0.0), dtype=buffer.dtype, device=p.device)
    return made


def stand_in(shape: Sequence[int]) -> int:
    """The length, in a stand-in for a parameter of this shape, of dimensions that have none.

    Its rows and columns can be told from single numbers, and from those of other dimensions.
    """
    return next(n for n in itertools.count(2) if n not in shape)


def work_copy(item: Item) -> Item:
    """Private copies in the compute type. A parameter without elements gets a stand-in that has some.

    With it the callbacks can count steps; none of its tensors is kept.
    """
    floats = {t.dtype for _, t in item.tensors() if t.is_floating_point()}
    compute = compute_dtype(item.param.dtype, item.grad.dtype, *floats)
    one = {compute, item.param.dtype, item.grad.dtype, *floats} == {compute}
    empty = item.param.numel() == 0

    def copy(t: torch.Tensor) -> torch.Tensor:
        if empty and t.numel() == 0:
            shape = [n or stand_in(item.param.shape) for n in t.shape]
            t = reference.mark(torch.zeros(shape, dtype=t.dtype, device=t.device), t.dtype)
        return t.detach().clone() if one and t.dtype == compute else reference.upcast(t, compute)

    state = {k: copy(v) if isinstance(v, torch.Tensor) else v for k, v in begun(item.state).items()}
    for key, value in state.items() if item.has_codes else ():
        if item.code(key) and value.dtype in CODES:  # callbacks make numbers of it
            state[key] = reference.mark(value.to(compute), value.dtype)
    param = copy(item.param)
    grad = param if item.modes.bare else copy(item.grad)
    work = type(item)(param, grad, state, item.where, item.hyper, _of_copy(item.modes))
    work.owner = item.owner
    attach_gradient(work)
    return work


def work_copies(todo: list[Item], transformed: bool) -> list[tuple[Item, Item]]:
    """Each item with its work copy. Where nothing is converted, all tensors are copied in one call."""
    copied: dict[Any, bool] = {}
    together = []
    for item in todo:
        if item.alike is None or item.alike not in copied:
            copied[item.alike] = not transformed and _is_ordinary(item)
        together.append(copied[item.alike])
    made = iter(_clones([t for item in compress(todo, together) for t in _tensors(item)]))
    out = []
    for item, ordinary in zip(todo, together, strict=True):
        if not ordinary:
            out.append((item, work_copy(item)))
            continue
        param = next(made)
        grad = param if item.modes.bare else next(made)
        state = {k: next(made) if isinstance(v, torch.Tensor) else v for k, v in item.state.items()}
        work = Item(param, grad, state, item.where, item.hyper, _of_copy(item.modes), item.alike)
        work.owner = item.owner
        attach_gradient(work)
        out.append((item, work))
    return out


def _is_ordinary(item: Item) -> bool:
    """Whether its tensors are ordinary ones of one compute dtype."""
    dtype = item.param.dtype
    if type(item) is not Item or item.param.numel() == 0 or has_flag(item) or dtype != compute_dtype(dtype):
        return False
    return all(t.dtype == dtype and type(t) in (torch.Tensor, torch.nn.Parameter) for t in _tensors(item))


def _of_copy(modes: Modes) -> Modes:
    """Those of a work copy, whose gradient is scaled and whose step is not skipped."""
    return Modes(on_device=modes.on_device, bare=modes.bare, given=modes.given)


def _tensors(item: Item) -> list[torch.Tensor]:
    own = [item.param] if item.modes.bare else [item.param, item.grad]
    return [*own, *(v for v in item.state.values() if isinstance(v, torch.Tensor))]


def _clones(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    if hasattr(torch, "_foreach_clone"):  # torch 2.13 has it
        return torch._foreach_clone(tensors) if tensors else ()
    return [t.detach().clone() for t in tensors]


def has_flag(item: Item) -> bool:
    """Whether only the device knows what of its state has begun."""
    return any(isinstance(k, str) and k.startswith(STARTED) for k in item.state)


def settled(item: Item) -> list[str]:
    """Take from the item's state what `begun` leaves out: afterwards it has begun, or is new. Returns the keys."""
    left = begun(item.state)  # asked for once: it waits for the device
    gone = [k for k in item.state if k not in left]
    for key in gone:
        del item.state[key]
    item.alike = None if gone else item.alike
    return gone


def begun(state: Mapping[str, Any], called: Callable[[str], str] = str) -> dict[str, Any]:
    """The state without what holds nothing yet because every step was skipped so far, and without the flag for that.

    ``called``: what callbacks call an entry, where the state has other names.
    """
    state = dict(state)
    flag = next((k for k in state if isinstance(k, str) and k.startswith(STARTED)), None)
    if flag is None:
        return state
    late = () if state[flag].item() else flag.removeprefix(STARTED).split(",")
    return {k: v for k, v in state.items() if called(k) not in late and k != flag}


def attach_gradient(work: Item, grad: torch.Tensor | None = None) -> None:
    """Make ``grad`` (else the item's own) what kernels and callbacks both see as the work copy's gradient."""
    if grad is not None:
        work.grad = grad
    work.laid_out = False  # which `alike` overrules: copies of tensors in one layout are in one
    work.lay_out()
    if not work.modes.bare and work.param.grad is not work.grad:
        work.param.grad = work.grad


def stored(
    item: Item, work: Item, state_dtype: torch.dtype | None
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[Change], State]:
    """What writes a work copy's results to the user's tensors: rounded once, existing state in its own dtype.

    Returns which tensors to copy to from which, the other changes to make, and state that is new or no tensor.
    """
    empty, new, pairs = item.param.numel() == 0, {}, []
    changes: list[Change] = [
        functools.partial(value.fill_, 1.0) for key, value in item.state.items() if key.startswith(STARTED)
    ]
    if not empty:
        pairs.append((item.home, work.param))
    for key, value in work.state.items():
        if is_temporary(key) or key.partition(":")[0] in item.modes.given:
            continue
        old = item.state.get(key)
        if not isinstance(value, torch.Tensor):
            new[key] = value
        elif not isinstance(old, torch.Tensor) or (old.shape != value.shape and not empty):
            new[key] = _new_state(item, work, value, state_dtype)
        elif not empty or _is_number(old, item):
            pairs.append((old, value))
    return pairs, changes, new


def copying(pairs: list[tuple[torch.Tensor, torch.Tensor]], transformed: bool) -> list[Change]:
    """What copies to the first of each pair from the second: in one call, but for what torch refuses there."""
    plain: list[tuple[torch.Tensor, torch.Tensor]] = []
    out: list[Change] = []
    for to, value in pairs:
        if transformed or to.is_neg() or value.is_neg() or not walkable(to) or not walkable(value):
            out.append(functools.partial(to.copy_, value))
        else:
            plain.append((to, value))
    if plain:
        to_all, values = [to for to, _ in plain], [value for _, value in plain]
        out.append(functools.partial(torch._foreach_copy_, to_all, values))
    return out


def _new_state(item: Item, work: Item, value: torch.Tensor, state_dtype: torch.dtype | None) -> torch.Tensor:
    """A copy of it, laid out like the parameter if it has its shape; of a stand-in's state only numbers are copied."""
    if not per_element(value, work.param, work.modes):
        out = torch.zeros_like(value)
        if item.param.numel() == 0:
            found, length = axes.layouts(value.shape, work.param.shape), stand_in(item.param.shape)
            other = [n if n != length else 0 for n in value.shape]
            out = value.new_zeros(axes.sizes(found[0], item.param.shape) if found else other)
    else:
        dtype = state_dtype or reference.asked(value) if value.is_floating_point() else value.dtype
        dtype = stored_dtype(dtype, item.param.dtype, item.param.dim() == 0, item.modes)
        out = torch.zeros_like(item.param, dtype=dtype, requires_grad=False)
    return out.copy_(value) if item.param.numel() or _is_number(out, item) else out


def _is_number(value: torch.Tensor, item: Item) -> bool:
    """Whether it is one number, such as a count, of a tensor of whatever shape."""
    return value.dim() == 0 and not per_element(value, item.param, item.modes)
