"""DTensor parameters (FSDP2, tensor parallelism): each process steps its shard, by norms of the whole tensor.

A DTensor has no memory of its own (its ``data_ptr()`` is 0), so kernels walk its local tensor, which may have no
elements. State is created as DTensors like the parameter, so that checkpoints can be resharded. Where a program
reduces, the totals of all shards are gathered between its stages: one collective per stage for all tensors.

Callbacks that do not fuse run on the DTensors themselves, by torch's own rules for them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..backends.cpp.backend import joined
from ..extension import leaf
from ..ir.ops import ELEMENT, is_reduction
from ..ir.program import Buffer, Program
from ..ir.stages import scalar_stores
from ..trace.signature import HERE_IN_ORDER
from . import reference
from .items import Item, walkable

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from ..backends import Backend


def localized(todo: list[Item]) -> list[Item]:
    """The items with those of DTensor parameters as ``Shard`` items. Raises RuntimeError for what cannot be stepped."""
    kind = _dtensor()
    if kind is None:
        return todo
    return [
        item if item.alike is not None or isinstance(item, KINDS) else _localized(item, kind) for item in todo
    ]


def _dtensor() -> Any:
    """The class, if anybody has imported it: the import changes what torch's own optimizers do."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_dtensor(t: torch.Tensor) -> bool:
    """Whether it is spread over processes."""
    kind = _dtensor()
    return kind is not None and isinstance(t, kind)


def _localized(item: Item, kind: Any) -> Item:
    p: Any = item.home
    group, i = item.where
    what = f"parameter {i} of group {group}"
    if not isinstance(p, kind):
        if isinstance(item.grad, kind) or any(isinstance(v, kind) for v in item.state.values()):
            raise RuntimeError(f"{what} is no DTensor, but its gradient or state is; distribute it too")
        return item
    if not isinstance(item.grad, kind):
        raise RuntimeError(f"{what} is a DTensor, and its gradient is not; distribute it like the parameter")
    placed = [v for v in (item.grad, *item.state.values()) if isinstance(v, kind)]
    if any(v.device_mesh != p.device_mesh for v in placed):
        raise RuntimeError(f"{what} and its gradient or state are on different meshes; move them to one")
    # As `p.data = p.data.to(dtype)` leaves it.
    if any(v.dtype != v._local_tensor.dtype for v in (p, *placed)):
        raise RuntimeError(
            f"{what}, its gradient or state is a DTensor of another dtype than its elements are. Remedy: change dtypes "
            "with module.to(dtype)"
        )
    if any(placement.is_partial() for placement in p.placements):
        raise RuntimeError(
            f"{what} is a partial DTensor, whose elements are still to be summed; redistribute it first"
        )
    return Shard(Whole(p, item.grad, item.state, item.where, item.hyper, item.modes))


class Whole(Item):
    """A parameter whose memory kernels cannot walk, a DTensor or another class of wrapper: its callbacks run eagerly.

    Gradient and state of a DTensor get its placements, but one number per tensor is plain, the same on every process.
    """

    __slots__ = ()

    def attribute(self, name: str) -> Any:
        if name == HERE_IN_ORDER and isinstance(self.param, _dtensor() or ()):
            return local_of(self.param).is_contiguous()
        return super().attribute(name)

    def lay_out(self, rows: bool = False) -> None:
        kind = _dtensor()
        if kind is None or not isinstance(self.param, kind):  # a stand-in for one without elements is none
            return
        self.grad = _placed(self.grad, self.param)
        for key, value in self.state.items():
            if isinstance(value, torch.Tensor):
                self.state[key] = _placed(value, self.param)


def is_replicated(t: Any) -> bool:
    """Whether it is a DTensor that is the same on all its processes."""
    return is_dtensor(t) and all(placement.is_replicate() for placement in t.placements)


def here(t: torch.Tensor) -> torch.Tensor:
    """What is here of a tensor: all, unless it is spread over processes."""
    return local_of(t) if is_dtensor(t) else t


def gathered(t: torch.Tensor) -> torch.Tensor:
    """All of a tensor, from all processes that it is spread over."""
    whole: Any = t
    return whole.full_tensor() if is_dtensor(t) else t


def check_rows(item: Item) -> None:
    """Raise ValueError for a DTensor of which some processes have nothing: state of rows and columns fails for it by
    torch's rules, in some processes only, for which the others would wait. All find the same."""
    if not isinstance(item, Shard):
        return
    p: Any = item.owner
    for placement, processes in zip(p.placements, p.device_mesh.shape, strict=True):
        if placement.is_shard() and p.shape[placement.dim] < processes:
            g, i = item.where
            raise ValueError(
                f"parameter {i} of group {g} has length {p.shape[placement.dim]} along dimension {placement.dim}, "
                f"which is spread over {processes} processes; no rule by rows or columns can step it. Remedy: "
                "keep it whole (ignored_params= of fully_shard), or give it a group of its own with another rule"
            )


def unfused(item: Item) -> Item:
    """The item to step eagerly in its place."""
    if isinstance(item, Shard):
        return item.whole
    if item.walkable():
        return item
    return Whole(item.home, item.grad, item.state, item.where, item.hyper, item.modes)


class Shard(Item):
    """The local tensor of a DTensor parameter, for kernels. ``whole`` is the item of the parameter itself.

    Its state is a copy of the user's, and local from ``lay_out`` on; ``finish`` hands it back.
    """

    __slots__ = ("known", "whole")

    def __init__(self, whole: Whole) -> None:
        local = local_of(whole.home)
        super().__init__(local, whole.grad, dict(whole.state), whole.where, whole.hyper, whole.modes)
        self.whole, self.owner = whole, whole.home
        self.known: dict[str, torch.Tensor] = {}

    def fuses(self, backend: Backend, along: bool = False, whole: bool = False) -> bool:
        if along:  # of whose rows or columns a part may be elsewhere
            return False
        if whole and not runs_parts(backend):
            return False
        tensors = (self.whole.grad, *(value for _, value in self.whole.tensors()))
        kind = _dtensor()
        plain = all(walkable(local_of(t) if isinstance(t, kind) else t) for t in tensors)
        return plain and walkable(self.home)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((key, self.state[key]) for key, _ in self.whole.tensors())

    def visible(self, attributes: tuple[str, ...], work: bool) -> tuple[Any, ...]:
        return self.whole.visible(attributes, work)

    def lay_out(self, rows: bool = False) -> None:
        p = self.whole.home
        self.grad = local_of(_placed(self.whole.grad, p))
        for key, value in self.whole.tensors():
            placed = _placed(value, p)
            self.state[key] = local_of(placed)
            if placed is value:
                self.known[key] = self.state[key]
        self.laid_out = False
        super().lay_out()

    def finish(self, created: dict[str, Buffer]) -> None:
        super().finish(created)
        p, live = self.whole.home, self.whole.state
        shaped = {key for key, _ in self.tensors()} | {k for k, b in created.items() if b.kind == ELEMENT}
        for key, value in self.state.items():
            if key not in shaped:
                live[key] = value
            elif value is not self.known.get(key):
                live[key] = _wrapped(value, p)  # type: ignore[arg-type]
        # The local tensors' versions are counted by whoever wrote to them. DTensors have counters of their own.
        leaf.bump_versions([p, *(live[key] for key in shaped)])

    @property
    def spread(self) -> tuple[Any, tuple[int, ...]]:
        """The mesh, and its dimensions over which the elements are spread; over the others they are the same."""
        p: Any = self.whole.home
        mesh = p.device_mesh
        if mesh.get_coordinate() is None:  # a process outside the mesh has no part in it
            return mesh, ()
        return mesh, tuple(d for d, placement in enumerate(p.placements) if not placement.is_replicate())


def local_of(t: Any) -> torch.Tensor:
    """The local tensor of a DTensor, once it has arrived."""
    with torch.no_grad():
        local = t.to_local()
    return local.wait() if hasattr(local, "wait") else local


def _wrapped(local: torch.Tensor, like: DTensor) -> DTensor:
    return type(like).from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _placed(t: Any, like: Any) -> Any:
    """The tensor with the placements of the parameter it belongs to, if it has its shape, else the same everywhere.

    A plain tensor of the parameter's shape is taken for the whole, as it is in a checkpoint that was not sharded.
    """
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    mesh, placements = like.device_mesh, like.placements
    out: Any
    if not isinstance(t, DTensor):
        if t.shape != like.shape:
            return t
        out = distribute_tensor(t, mesh, placements, src_data_rank=None)
    elif t.shape != like.shape:
        out = t.redistribute(placements=[Replicate()] * t.device_mesh.ndim)
        if t.dim() == 0:
            out = local_of(out)
    elif t.placements == placements:
        return t
    else:
        out = t.redistribute(placements=placements)
    return reference.mark(out, reference.asked(t))


def exchange(rows: Sequence[Item]) -> Callable[[Sequence[str], np.ndarray], None]:
    """What makes totals of whole tensors from those of the parts that are here: rows × reductions, in place.

    Parts are gathered and joined in the order of processes, so that the result is the same on all of them, to the bit.
    """
    together: dict[Any, list[int]] = {}
    for i, item in enumerate(rows):
        if isinstance(item, Shard):
            together.setdefault(item.spread, []).append(i)

    def exchanged(ops: Sequence[str], totals: np.ndarray) -> None:
        for (mesh, dims), indices in together.items():
            for d in dims:
                parts = _gathered(totals[indices], mesh.get_group(d))
                same = np.tile(np.arange(len(indices)), len(parts) // len(indices))
                totals[indices] = joined(ops, parts, same, len(indices))

    return exchanged


def _gathered(mine: np.ndarray, group: Any) -> np.ndarray:
    """The rows of every process, in their order."""
    part = torch.from_numpy(mine)
    parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, part, group=group)
    return torch.cat(parts).numpy()


KINDS = Whole, Shard


def is_shard(item: Item) -> bool:
    return isinstance(item, Shard)


def runs_parts(backend: Backend) -> bool:
    """Whether processes can exchange between its stages what these reduce."""
    return getattr(backend, "runs_parts", False)


def looks_at_all(program: Program) -> bool:
    """Whether it needs to know something of a tensor as a whole, of which only a part may be here, or none: then a
    number per tensor is stored all the same."""
    return bool(scalar_stores(program).stores) or any(
        is_reduction(v.op) or v.op == "numel" for v in program.values
    )


def runner(launch: Any, rows: Sequence[Item]) -> Callable[[np.ndarray], None]:
    """What runs a launch whose rows may be shards, with these scalars."""
    if not any(map(is_shard, rows)) or not looks_at_all(launch.kernel.program):
        return launch.run
    counts = [item.whole.home.numel() if isinstance(item, Shard) else item.param.numel() for item in rows]
    return functools.partial(launch.run_parts, counts=counts, exchange=exchange(rows))
