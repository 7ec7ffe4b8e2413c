"""Whether tensors have the memory that they claim: storages can be freed or cut, as FSDP does between uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ..extension import leaf
from .items import Item, walkable


def check_memory(todo: Sequence[Item], stored: Callable[[str], str]) -> None:
    """Raise RuntimeError for a parameter, gradient, state or hyperparameter whose storage is too small for it.

    ``stored``: what the user calls the state that callbacks call this.
    """
    tensors = []
    for item in todo:
        tensors += [item.home, item.grad]
        tensors += [t for t in item.state.values() if isinstance(t, torch.Tensor)]
        tensors += [t for t in item.hyper.values() if isinstance(t, torch.Tensor)]
    if leaf.native is not None and leaf.native.have_memory(tensors):
        return
    for item in todo:
        for name, t in _named(item, stored):
            if isinstance(t, torch.Tensor) and needed(t) > t.untyped_storage().nbytes():
                raise RuntimeError(
                    f"{name} has shape {tuple(t.shape)}, and its storage has {t.untyped_storage().nbytes()} of "
                    f"{needed(t)} bytes: it was freed or cut. Nothing was stepped. Remedy: give it its memory back "
                    "before the step (FSDP: step what it has made of the parameters), or take it out of the step"
                )


def _named(item: Item, stored: Callable[[str], str]) -> Iterator[tuple[str, object]]:
    group, i = item.where
    what = f"parameter {i} of group {group}"
    yield what, item.home
    yield f"the gradient of {what}", item.grad
    yield from ((f"the state {stored(key)!r} of {what}", value) for key, value in item.state.items())
    yield from ((f"the hyperparameter {key!r} of group {group}", value) for key, value in item.hyper.items())


def needed(t: torch.Tensor) -> int:
    """Bytes from the start of a tensor's storage to its last element's end; none where these are not its own."""
    if not t.numel() or t.layout is not torch.strided or not walkable(t):
        return 0
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return int(t.storage_offset() + last + 1) * t.itemsize
