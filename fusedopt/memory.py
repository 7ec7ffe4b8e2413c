"""Whether tensors have the memory that they claim: storages can be freed or cut, as FSDP does between uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .runtime.items import walkable

_REMEDY = "give it its memory back before the step (FSDP: step its own flat parameters), or leave it out of the step"


def check_memory(
    p: torch.Tensor,
    grad: torch.Tensor,
    state: Mapping[str, Any],
    hyper: Mapping[str, Any],
    group: int,
    i: int,
) -> None:
    """Raise RuntimeError for a parameter, gradient, state or hyperparameter whose storage is too small for it."""
    what = f"parameter {i} of group {group}"
    tensors = [
        (what, p),
        (f"the gradient of {what}", grad),
        *((f"the state {key!r} of {what}", value) for key, value in state.items()),
        *((f"the hyperparameter {key!r} of group {group}", value) for key, value in hyper.items()),
    ]
    for name, t in tensors:
        if isinstance(t, torch.Tensor) and _needs(t) > _has(t):
            raise RuntimeError(
                f"{name} has shape {tuple(t.shape)}, and its storage was freed or cut to {_has(t)} bytes; nothing was "
                f"stepped. Remedy: {_REMEDY}"
            )


def _needs(t: torch.Tensor) -> int:
    """Bytes from the start of its storage to the end of its last element; none where that is not its own."""
    if not t.numel() or t.layout is not torch.strided or not walkable(t):
        return 0
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return (t.storage_offset() + last + 1) * t.itemsize


def _has(t: torch.Tensor) -> int:
    return t.untyped_storage().nbytes()
