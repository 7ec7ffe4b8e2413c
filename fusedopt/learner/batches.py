"""What a batch is made of: tensors, in tuples, lists and dicts of any depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def mapped(batch: Any, func: Callable[[torch.Tensor], Any]) -> Any:
    """The batch with ``func`` applied to each of its tensors; what is no tensor stays."""
    if isinstance(batch, torch.Tensor):
        return func(batch)
    if isinstance(batch, dict):
        return type(batch)({k: mapped(v, func) for k, v in batch.items()})
    if isinstance(batch, (tuple, list)):
        each = [mapped(x, func) for x in batch]
        return type(batch)(*each) if hasattr(batch, "_fields") else type(batch)(each)
    return batch


def concat(batches: Sequence[Any]) -> Any:
    """Batches of the same structure as one."""
    first = batches[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(batches)) if first.ndim else torch.stack(list(batches))
    if isinstance(first, dict):
        return {k: concat([b[k] for b in batches]) for k in first}
    if isinstance(first, (tuple, list)):
        return type(first)(concat(each) for each in zip(*batches, strict=True))
    return [x for b in batches for x in (b if isinstance(b, list) else [b])]
