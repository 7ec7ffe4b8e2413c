"""How tensors are cut into chunks, and chunks shared among threads. Pure functions of sizes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..ir.ops import TENSOR

CHUNK = 1 << 16
"""Elements in a chunk, unless the tensor would have more than MAX_CHUNKS."""
WANTED = 1 << 11
"""So many chunks keep a GPU busy: where all tensors would have fewer, chunks are shorter."""
SHORTEST = 1 << 13
"""But have as many elements."""
MAX_CHUNKS = 1024
"""Chunks, and so part results of a reduction, per tensor."""
CHUNK_WORDS = 3
"""Words of a chunk: row, first element, one past the last. With several axes there are more."""
ALIGN = 64
"""Chunks start at multiples of this many elements: full vectors, whole cache lines."""
CHUNK_COST = 64
"""What starting a chunk costs, in elements."""
TILE = 1 << 10
"""Elements in the pieces of a chunk that GPU stages are launched over where they leave no part results: what a block
loads at once. Each block that ends makes room for another, and nothing waits for a slow one (docs/gpu.md)."""
LINES = 1 << 13
"""The same of pieces that are whole lines, more or less."""
GRAIN = 1 << 14
"""Below this cost a thread is not worth waking."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The chunk table (row, begin, end) as int64, and each row's first chunk and chunk count."""

    chunks: np.ndarray
    first: np.ndarray
    count: np.ndarray

    def __len__(self) -> int:
        return len(self.chunks)


def length(elements: int, wanted: int = 0) -> int:
    """Of the chunks of tensors with so many elements, for so many chunks to be there."""
    return min(CHUNK, max(SHORTEST, elements // wanted // ALIGN * ALIGN)) if wanted else CHUNK


@functools.lru_cache(maxsize=64)
def layout(sizes: tuple[int, ...], wanted: int = 0, least: int = 0) -> Layout:
    """Cut tensors of these element counts into chunks, of which a tensor without elements has ``least``."""
    size = np.asarray(sizes, dtype=np.int64)
    each = np.maximum(length(sum(sizes), wanted), -(-size // MAX_CHUNKS))
    each = -(-each // ALIGN) * ALIGN
    count = np.maximum(-(-size // each), least)
    first = np.cumsum(count) - count
    row = np.repeat(np.arange(len(size), dtype=np.int64), count)
    begin = (np.arange(len(row), dtype=np.int64) - first[row]) * each[row]
    end = np.minimum(begin + each[row], size[row])
    return Layout(np.ascontiguousarray(np.stack([row, begin, end], axis=1)), first, count)


@dataclass(frozen=True)
class Blocks:
    """A layout of tensors with several axes, whose chunks are whole lines.

    Chunks also say where in the results the part of each reduction along axes begins, less the place of its first
    number there; ``results`` says for each row and result where it begins; ``total`` is how many numbers there are.
    """

    layout: Layout
    results: np.ndarray
    total: int


SHARED = 64
"""At least as many elements go into each part result that several chunks have, or a quarter where chunks are short."""


@functools.lru_cache(maxsize=64)
def blocks(
    shapes: tuple[tuple[int, ...], ...],
    regions: tuple[str, ...],
    kept: tuple[str, ...],
    sizes: tuple[int, ...] = (),
    wanted: int = 0,
) -> Blocks:
    """Cut tensors with axes of these lengths.

    regions: the kinds of the reductions along axes, which are the first of the results; kept: those of the others
    sizes: how many elements there are, if the last line may be shorter than the others
    """
    chunks: list[np.ndarray] = []
    results = np.empty((len(shapes), len(regions) + len(kept)), np.int64)
    count = np.zeros(len(shapes), np.int64)
    chunk = length(sum(map(math.prod, shapes)), wanted)
    total = 0
    for row, shape in enumerate(shapes):
        for k, kind in enumerate((*regions, *kept)):
            results[row, k] = total
            total += _places(shape, kind)
        size = math.prod(shape)
        if not size:
            continue
        prefixes = [_prefix(shape, kind) for kind in regions]
        each = _chunk_length(shape, prefixes, chunk)
        begin = np.arange(0, size, each, dtype=np.int64)
        end = np.minimum(begin + each, sizes[row] if sizes else size)
        count[row] = len(begin)
        words = [np.full(len(begin), row, np.int64), begin, end]
        for k, (inside, tail) in enumerate(prefixes):
            if len(begin) == 1 or each % inside == 0:
                words.append(np.full(len(begin), results[row, k]))
                continue
            first, last = begin // inside * tail, ((end - 1) // inside + 1) * tail
            places = last - first
            words.append(total + np.cumsum(places) - places - first)
            total += int(places.sum())
        chunks.append(np.stack(words, axis=1))
    table = np.concatenate(chunks) if chunks else np.empty((0, 3 + len(regions)), np.int64)
    return Blocks(Layout(np.ascontiguousarray(table), np.cumsum(count) - count, count), results, total)


def parts(shape: tuple[int, ...], kind: str, chunks: np.ndarray) -> int:
    """How many part results of a reduction to this kind a tensor's chunks leave."""
    inside, tail = _prefix(shape, kind)
    first, last = chunks[:, 1] // inside, (chunks[:, 2] - 1) // inside
    return int((last - first + 1).sum()) * tail


def _places(shape: tuple[int, ...], kind: str) -> int:
    return 1 if kind == TENSOR else math.prod(shape[int(a)] for a in kind)


def _prefix(shape: tuple[int, ...], kind: str) -> tuple[int, int]:
    """How many elements, and how many numbers of this kind, each place along the axes before its first gap has."""
    gap = next(a for a in range(len(shape)) if str(a) not in kind)
    return math.prod(shape[gap:]), math.prod(n for a, n in enumerate(shape) if a > gap and str(a) in kind)


def _chunk_length(shape: tuple[int, ...], prefixes: Sequence[tuple[int, int]], chunk: int) -> int:
    """Whole lines; where it is not much more, whole places of what is reduced, so that no other chunk has a part."""
    line, shared = shape[-1], max(SHARED // 4, SHARED * chunk // CHUNK)
    least = max(chunk, -(-math.prod(shape) // MAX_CHUNKS), line)
    least = max([least, *(shared * tail for inside, tail in prefixes if inside > least)])
    unit = max([line, *(inside for inside, _ in prefixes if inside <= least)])
    return -(-least // unit) * unit


def tiles(chunks: np.ndarray, lines: np.ndarray | None = None, times: int = 1) -> np.ndarray:
    """Chunks cut further, for more programs to share a tensor: the same table with more rows.

    lines: of each chunk's tensor the length of a line, if pieces have to be whole lines
    times: how many times TILE others have
    """
    return _cut(chunks, np.full(len(chunks), times * TILE) if lines is None else -(-LINES // lines) * lines)


def line_tiles(chunks: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """Chunks of whole lines, of these lengths, cut into fewer: the same table with more rows."""
    return _cut(chunks, np.maximum(LINES // lines, 1) * lines)


def _cut(chunks: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Each chunk in pieces of its ``step`` elements, the last of which may be shorter."""
    count = -(-(chunks[:, 2] - chunks[:, 1]) // step)
    out, step = np.repeat(chunks, count, axis=0), np.repeat(step, count)
    out[:, 1] += (np.arange(len(out)) - np.repeat(np.cumsum(count) - count, count)) * step
    np.minimum(out[:, 1] + step, out[:, 2], out=out[:, 2])
    return out


@functools.lru_cache(maxsize=64)
def cost(layout: Layout) -> int:
    """What all chunks cost, in elements: that many nanoseconds, more or less, on one thread."""
    chunks = layout.chunks
    return int((chunks[:, 2] - chunks[:, 1] + CHUNK_COST).sum())


@functools.lru_cache(maxsize=64)
def splits(layout: Layout, threads: int) -> tuple[int, ...]:
    """Bounds of the chunk ranges, one per thread, of nearly equal cost: by prefix sum, not by count."""
    chunks = layout.chunks
    cost = np.cumsum(chunks[:, 2] - chunks[:, 1] + CHUNK_COST)
    total = int(cost[-1]) if len(cost) else 0
    parts = max(1, min(threads, total // GRAIN))
    targets = np.arange(1, parts) * (total / parts)
    return (0, *np.searchsorted(cost, targets, side="right").tolist(), len(chunks))
