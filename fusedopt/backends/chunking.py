"""How tensors are cut into chunks, and chunks shared among threads. Pure functions of sizes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

CHUNK = 1 << 16
"""Elements in a chunk, unless the tensor would have more than MAX_CHUNKS."""
MAX_CHUNKS = 1024
"""Chunks, and so part results of a reduction, per tensor."""
ALIGN = 64
"""Chunks start at multiples of this many elements: full vectors, whole cache lines."""
CHUNK_COST = 64
"""What starting a chunk costs, in elements."""
TILE = 1 << 13
"""Elements in the pieces of a chunk that GPU stages are launched over where they leave no part results."""
GRAIN = 1 << 14
"""Below this cost a thread is not worth waking."""


@dataclass(frozen=True)
class Layout:
    """The chunk table (row, begin, end) as int64, and each row's first chunk and chunk count."""

    chunks: np.ndarray
    first: np.ndarray
    count: np.ndarray

    def __len__(self) -> int:
        return len(self.chunks)


@functools.lru_cache(maxsize=64)
def layout(sizes: tuple[int, ...]) -> Layout:
    """Cut tensors of these element counts into chunks; a tensor without elements has none."""
    size = np.asarray(sizes, dtype=np.int64)
    length = np.maximum(CHUNK, -(-size // MAX_CHUNKS))
    length = -(-length // ALIGN) * ALIGN
    count = -(-size // length)
    first = np.cumsum(count) - count
    row = np.repeat(np.arange(len(size), dtype=np.int64), count)
    begin = (np.arange(len(row), dtype=np.int64) - first[row]) * length[row]
    end = np.minimum(begin + length[row], size[row])
    return Layout(np.ascontiguousarray(np.stack([row, begin, end], axis=1)), first, count)


def tiles(chunks: np.ndarray) -> np.ndarray:
    """Chunks cut further, for more programs to share a tensor: the same table with more rows."""
    begin, end = chunks[:, 1], chunks[:, 2]
    count = -(-(end - begin) // TILE)
    chunk = np.repeat(np.arange(len(chunks)), count)
    start = begin[chunk] + (np.arange(len(chunk)) - (np.cumsum(count) - count)[chunk]) * TILE
    return np.stack([chunks[chunk, 0], start, np.minimum(start + TILE, end[chunk])], axis=1)


@functools.lru_cache(maxsize=64)
def splits(sizes: tuple[int, ...], threads: int) -> tuple[int, ...]:
    """Bounds of the chunk ranges, one per thread, of nearly equal cost: by prefix sum, not by count."""
    chunks = layout(sizes).chunks
    cost = np.cumsum(chunks[:, 2] - chunks[:, 1] + CHUNK_COST)
    total = int(cost[-1]) if len(cost) else 0
    parts = max(1, min(threads, total // GRAIN))
    targets = np.arange(1, parts) * (total / parts)
    return (0, *np.searchsorted(cost, targets, side="right").tolist(), len(chunks))
