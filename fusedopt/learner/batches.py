"""What a batch is made of: tensors, in tuples, lists and dicts of any depth."""

from __future__ import annotations

import copy
import inspect
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

TARGETS = ("labels", "label", "targets", "target", "y")
"""What the target of a batch that is a dict may be called; else it is the last."""


def mapped(batch: Any, func: Callable[[torch.Tensor], Any]) -> Any:
    """The batch with ``func`` applied to each of its tensors; what is no tensor stays."""
    if isinstance(batch, torch.Tensor):
        return func(batch)
    if isinstance(batch, (dict, UserDict)):
        other = copy.copy(batch)  # which may have a default or settings, and no constructor that takes values
        for k, v in batch.items():
            other[k] = mapped(v, func)
        return other
    if isinstance(batch, (tuple, list)):
        each = [mapped(x, func) for x in batch]
        return type(batch)(*each) if hasattr(batch, "_fields") else type(batch)(each)
    return batch


def concat(batches: Sequence[Any], order: Sequence[int] | None = None) -> Any:
    """Batches of the same structure as one, with its items in this order (None: as they come).

    Tensors whose items differ in shape become a list of items, and so does what is no tensor.
    """
    first = batches[0]
    if isinstance(first, torch.Tensor):
        if not first.ndim:
            return torch.stack(list(batches))
        if len({b.shape[1:] for b in batches}) == 1:
            whole = torch.cat(list(batches))
            return whole if order is None or len(order) != len(whole) else whole[list(order)]
        return _items([item for b in batches for item in b], order)
    if isinstance(first, Mapping):
        return {k: concat([b[k] for b in batches], order) for k in first}
    if isinstance(first, (tuple, list)) and not _of_text(first):
        each = (concat(each, order) for each in zip(*batches, strict=True))
        return type(first)(*each) if hasattr(first, "_fields") else type(first)(each)
    return _items([x for b in batches for x in (b if isinstance(b, (list, tuple)) else [b])], order)


def _of_text(batch: Sequence[Any]) -> bool:
    """Whether it is a value per item, as a loader gives what is no number, and not a structure."""
    return bool(batch) and all(isinstance(x, (str, bytes)) for x in batch)


def _items(items: list[Any], order: Sequence[int] | None) -> list[Any]:
    return items if order is None or len(order) != len(items) else [items[i] for i in order]


def batch_size(batch: Any) -> int:
    """The number of items in a batch: the length of the first tensor in it."""
    while not isinstance(batch, torch.Tensor):
        if not isinstance(batch, (tuple, list, Mapping)) or not batch:
            return 1
        batch = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    return len(batch) if batch.ndim else 1


def plain(x: torch.Tensor) -> torch.Tensor:
    """A subclass that is no more than a name for a kind of data, as fastai's are, as the tensor that it is.

    Mixed with each other, such as in ``pred == target``, they are refused by torch.
    """
    if type(x) is torch.Tensor or type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return (
            x  # those that have their own way of keeping values (nested, distributed) must stay what they are
        )
    return x.as_subclass(torch.Tensor)


def parts(batch: Any, n_inp: int | None, model: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Inputs and targets of a batch: the first ``n_inp``, or all but the last, are inputs.

    A batch that is a dict has its target under one of `TARGETS`, else it is the last. A model with one argument gets
    several inputs as a dict; else they come in the order of its arguments, if these have the same names, or the dict's.
    """
    if isinstance(batch, Mapping):
        batch, n_inp = _from_dict(batch, n_inp, model)
    batch = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    if any(type(x) is not torch.Tensor for x in batch):
        batch = mapped(batch, plain)
    n = max(1, len(batch) - 1) if n_inp is None else n_inp
    return batch[:n], batch[n:]


def _from_dict(batch: Mapping[Any, Any], n_inp: int | None, model: Any) -> tuple[list[Any], int]:
    """The values, inputs first, and how many of them are inputs."""
    names = list(batch)
    targets = names[n_inp:] if n_inp is not None else [_target(names)] if len(names) > 1 else []
    names = [name for name in names if name not in targets]
    arguments = _arguments(model)
    if arguments is not None and len(arguments) == 1 < len(names):
        return [{name: batch[name] for name in names}, *(batch[name] for name in targets)], 1
    if arguments is not None and set(arguments[: len(names)]) == set(names):
        names = arguments[: len(names)]
    return [batch[name] for name in (*names, *targets)], len(names)


def _target(names: list[str]) -> str:
    return next((name for name in TARGETS if name in names), names[-1])


def _arguments(model: Any) -> list[str] | None:
    """What a model calls its arguments; None if it takes any number of them, or does not tell."""
    try:
        parameters = inspect.signature(getattr(model, "forward", model)).parameters.values()
    except (TypeError, ValueError):
        return None
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return None if any(p.kind is p.VAR_POSITIONAL for p in parameters) else names
