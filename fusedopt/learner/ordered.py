"""Predictions in the order of a dataset, whatever the order in which a loader goes through it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Sequence
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

WHOLE = (RandomSampler, SequentialSampler, WeightedRandomSampler)
"""Samplers that are a way through a whole dataset, or draws from it."""


def whole(dl: Any) -> Any:
    """A loader of the dataset in its order and to its end, for torch's and fastai's; another is returned as it is."""
    if is_fastais(dl):
        return dl.new(shuffle=False, drop_last=False)
    if not _has_numbers(dl) or not dl.batch_size or not isinstance(dl.sampler, WHOLE):
        return dl
    sampler = SequentialSampler(dl.dataset)
    return _with(dl, sampler, BatchSampler(sampler, dl.batch_size, drop_last=False))


def numbered(dl: Any) -> tuple[Any, list[list[int]] | None]:
    """A loader that gives the same batches once more, and which items of the dataset each of them has.

    None in place of the items, where that is not known, or the order is the dataset's.
    """
    if is_fastais(dl):
        return _numbered_fastais(dl)
    if not _has_numbers(dl) or (isinstance(dl.sampler, SequentialSampler) and dl.batch_size):
        return dl, None
    keys: Any = list(islice(dl._index_sampler, len(dl)))
    if dl.batch_sampler is None:  # each item is a batch
        numbers = _as_numbers(keys)
        return (dl if numbers is None else _with(dl, sorted(numbers), None)), None
    batches: Any = [_as_numbers(batch) for batch in keys]
    return (dl, None) if None in batches else (_with(dl, dl.sampler, batches), batches)


def order_of(batches: Sequence[Sequence[int]], seen: Sequence[int], n: int) -> list[int]:
    """How to sort the ``n`` items of the batches ``seen`` by their numbers. ValueError if these are not as many."""
    numbers = [i for batch in seen for i in batches[batch]]
    if len(numbers) != n:
        raise ValueError(
            f"the loader was to give {len(numbers)} items, and there are predictions of {n}, in an order that is not "
            f"known: take them as they come, with reorder=False"
        )
    return sorted(range(n), key=numbers.__getitem__)


def is_fastais(dl: Any) -> bool:
    """Whether it is a loader of fastai's, by what it can do: nothing here imports fastai."""
    return all(hasattr(type(dl), name) for name in ("new", "get_idxs", "one_batch"))


def _numbered_fastais(dl: Any) -> tuple[Any, list[list[int]] | None]:
    if not dl.indexed or dl.n is None:
        return dl, None
    numbers = _as_numbers(dl.get_idxs())
    if numbers is None or numbers == sorted(numbers):
        return dl, None
    if dl.bs is None:  # each item is a batch
        return dl.new(get_idxs=functools.partial(sorted, numbers)), None
    batches = [numbers[i : i + dl.bs] for i in range(0, len(numbers), dl.bs)]
    return dl.new(get_idxs=functools.partial(list, numbers)), batches


def _has_numbers(dl: Any) -> bool:
    return isinstance(dl, DataLoader) and not isinstance(dl.dataset, IterableDataset)


def _as_numbers(keys: Iterable[Any]) -> list[int] | None:
    """The keys, if all are whole numbers of any make: Python's, numpy's or torch's."""
    numbers = [key.item() if isinstance(key, torch.Tensor) and not key.ndim else key for key in keys]
    return [int(n) for n in numbers] if all(isinstance(n, Integral) for n in numbers) else None


def _with(dl: DataLoader[Any], sampler: Any, batch_sampler: Any) -> DataLoader[Any]:
    """The same loader, of the same class and settings, with other samplers: torch has no way to ask for that."""
    other = copy.copy(dl)
    other.__dict__.update(sampler=sampler, batch_sampler=batch_sampler, drop_last=False, _iterator=None)
    return other
