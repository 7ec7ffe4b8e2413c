"""The chunk planner: pure functions of sizes, so two billion elements cost nothing here."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedopt.backends.chunking import (
    ALIGN,
    CHUNK,
    CHUNK_COST,
    GRAIN,
    LINES,
    MAX_CHUNKS,
    TILE,
    blocks,
    layout,
    splits,
    tiles,
)

CASES = {
    "nothing": (),
    "no elements": (0,),
    "one": (1,),
    "odd": (12345,),
    "one less than a chunk": (CHUNK - 1,),
    "a chunk": (CHUNK,),
    "one more than a chunk": (CHUNK + 1,),
    "not a multiple of the alignment": (3 * CHUNK + ALIGN // 2 + 1,),
    "as many chunks as there may be": (CHUNK * MAX_CHUNKS,),
    "one element too many for that": (CHUNK * MAX_CHUNKS + 1,),
    "above 2**31": (2**31 + 1,),
    "far above 2**31": (2**40 + 3,),
    "small ones": (1, 2, 3, 5, 7),
    "empty ones in between": (0, 5, 0, 0, CHUNK + 1, 0),
    "small and large": (3, 2**31 + 7, 0, CHUNK, 1),
}

SIZE = st.one_of(
    st.integers(0, 5),
    st.integers(0, 10 * CHUNK),
    st.integers(0, 2**36),
    st.integers(0, 64).map(CHUNK.__mul__),
)
SIZES = st.lists(SIZE, max_size=12).map(tuple)


def check_layout(sizes, least=0):
    """Every element is in exactly one chunk; chunks are aligned and in order; a tensor has at most 1,024."""
    table = layout(sizes, least=least)
    assert table.chunks.dtype == np.int64 and table.chunks.flags["C_CONTIGUOUS"]
    assert table.chunks.shape == (len(table), 3) and len(table.first) == len(table.count) == len(sizes)
    position = 0
    for row, size in enumerate(sizes):
        assert table.first[row] == position and least <= table.count[row] <= MAX_CHUNKS
        end = 0
        for chunk in table.chunks[position : position + table.count[row]].tolist():
            assert chunk[0] == row and chunk[1] == end and chunk[1] % ALIGN == 0
            assert chunk[2] > chunk[1] or (size == 0 and least)
            end = chunk[2]
        assert end == size
        position += table.count[row]
    assert position == len(table)
    return table


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_chunks_cover_every_element_once(name, least):
    check_layout(CASES[name], least)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(SIZES)
def test_chunks_cover_every_element_once_for_any_sizes(sizes):
    check_layout(sizes)


@pytest.mark.parametrize(
    ("size", "count"),
    [(0, 0), (1, 1), (CHUNK, 1), (CHUNK + 1, 2), (CHUNK * MAX_CHUNKS, MAX_CHUNKS), (2**31 + 1, MAX_CHUNKS)],
)
def test_number_of_chunks(size, count):
    assert layout((size,)).count.tolist() == [count]


def test_large_tensors_get_longer_chunks_and_not_more():
    lengths = np.diff(layout((2**40 + 3,)).chunks[:, 1:]).flatten()
    assert len(lengths) <= MAX_CHUNKS and lengths[0] > CHUNK and len(set(lengths[:-1].tolist())) == 1


def test_a_tensors_chunks_depend_on_nothing_but_its_size():
    """So a reduction over it joins the same part results wherever it stands."""
    sizes = (5, 3 * CHUNK + 9, 0, 2**31 + 1)
    together = layout(sizes)
    for row, size in enumerate(sizes):
        first = together.first[row]
        mine = together.chunks[first : first + together.count[row], 1:]
        assert np.array_equal(mine, layout((size,)).chunks[:, 1:])


# ---------------------------------------------------------------- sharing among threads


def check_splits(sizes, threads):
    """Ranges that cover all chunks in order; none costs more than its share and one chunk."""
    bounds, chunks = splits(layout(tuple(sizes)), threads), layout(tuple(sizes)).chunks
    assert bounds[0] == 0 and bounds[-1] == len(chunks)
    assert list(bounds) == sorted(bounds) and 2 <= len(bounds) <= threads + 1
    cost = chunks[:, 2] - chunks[:, 1] + CHUNK_COST
    if len(chunks):
        parts = [cost[a:b].sum() for a, b in pairwise(bounds)]
        assert sum(parts) == cost.sum()
        assert max(parts) <= cost.sum() / len(parts) + cost.max()
    return bounds


@pytest.mark.parametrize("threads", [1, 2, 7, 64])
@pytest.mark.parametrize("name", CASES)
def test_splits_cover_all_chunks_and_are_balanced(name, threads):
    check_splits(CASES[name], threads)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(SIZES, st.integers(1, 100))
def test_splits_cover_all_chunks_and_are_balanced_for_any_sizes(sizes, threads):
    check_splits(sizes, threads)


def test_splits_go_by_cost_and_not_by_count():
    """400 small tensors, then 100 larger ones: half the work is not half the tensors."""
    sizes = (100,) * 400 + (50_000,) * 100
    _, middle, end = check_splits(sizes, 2)
    assert end == 500 and 430 < middle < 460
    by_count = sum(s + CHUNK_COST for s in sizes[:250]), sum(s + CHUNK_COST for s in sizes[250:])
    assert max(by_count) > 1.9 * sum(by_count) / 2


def test_little_work_wakes_no_second_thread():
    assert splits(layout((100, 100)), 8) == (0, 2)
    assert splits(layout((GRAIN,)), 8) == (0, 1)
    assert splits(layout((CHUNK,) * 8), 8) == tuple(range(9))
    assert splits(layout(()), 4) == (0, 0) and splits(layout((0, 0)), 4) == (0, 0)


# ---------------------------------------------------------------- pieces of chunks


def test_pieces_of_chunks_are_whole_lines_where_they_have_to_be():
    shapes = ((300, 700), (1000, 1), (3, 100_003), (0, 4), (5, 3, TILE - 1))
    chunks = blocks(shapes, ("1",), ()).layout.chunks
    lines = np.array([shape[-1] for shape in shapes])[chunks[:, 0]]
    pieces = tiles(chunks, lines)
    for row, begin, end, *words in chunks.tolist():
        mine = pieces[(pieces[:, 0] == row) & (begin <= pieces[:, 1]) & (pieces[:, 2] <= end)]
        assert mine[0, 1] == begin and mine[-1, 2] == end and (mine[1:, 1] == mine[:-1, 2]).all()
        line = shapes[row][-1]
        assert (mine[:, 1:3] % line == 0).all() and (mine[:, 2] - mine[:, 1] < LINES + line).all()
        assert (mine[:, 3:] == words).all()
    plain = layout((3 * CHUNK + 5,)).chunks
    assert len(tiles(plain)) == 3 * CHUNK // TILE + 1 and tiles(plain)[-1].tolist() == [
        0,
        3 * CHUNK,
        3 * CHUNK + 5,
    ]
