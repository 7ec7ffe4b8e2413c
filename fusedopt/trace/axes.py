"""How the dimensions of a traced tensor are those of its parameter.

``dims`` has for each dimension of a tensor the parameter's dimensions that it goes along: ``((0,), (1,))`` for a
matrix, ``((0,), ())`` for a sum along its rows with ``keepdim=True``, ``((0,),)`` without, ``((0,), (1, 2, 3))`` for
the weights of a convolution seen as a matrix. Dimensions of length 1 go along none. Sizes say less: of a square matrix
they do not tell a sum of rows from one of columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from .signals import Mismatched, Untraceable

Dims = tuple[tuple[int, ...], ...]
MOST = 10
"""Dimensions that a digit can name."""


def full(shape: Sequence[int]) -> Dims:
    """Those of the parameter itself."""
    return tuple((d,) if n != 1 else () for d, n in enumerate(shape))


def memory_order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The dimensions of a dense tensor as they follow one another in memory, but for those of length 1."""
    return tuple(sorted((d for d, n in enumerate(shape) if n != 1), key=lambda d: (-stride[d], d)))


def along(dims: Dims) -> str:
    """The parameter's dimensions that a tensor goes along, a digit each."""
    return "".join(map(str, sorted(d for group in dims for d in group)))


def blocks(count: int) -> Dims:
    """Those of a tensor with one number for so many neighbouring elements of its parameter."""
    return ((-count,),)


def cut(dims: Dims, d: int) -> Dims:
    """Those of a tensor if its parameter's last dimension, d, is cut in two: into blocks, and what is in each."""
    return tuple((*group, d + 1) if d in group else group for group in dims)


def uncut(dims: Dims, d: int) -> Dims:
    """What `cut` makes these of."""
    return tuple(tuple(one for one in group if one != d + 1) for group in dims)


def is_blocks(dims: Dims | None) -> bool:
    return bool(dims and dims[0] and dims[0][0] < 0)


def sizes(dims: Dims, shape: Sequence[int]) -> list[int]:
    """A tensor's sizes, of those of its parameter."""
    if is_blocks(dims):
        return [-(-math.prod(shape) // -dims[0][0])]
    return [math.prod(shape[d] for d in group) for group in dims]


def broadcast(a: Dims, b: Dims) -> Dims:
    """Those of a result: as torch does it, from the last dimension on. Raises Mismatched where it would go along two
    dimensions at once."""
    out = []
    for x, y in itertools.zip_longest(reversed(a), reversed(b), fillvalue=()):
        if x and y and x != y:
            raise Mismatched(f"dimensions {x} and {y} of the parameter are put side by side")
        out.append(x or y)
    found = tuple(reversed(out))
    if len(along(found)) != len(set(along(found))):
        raise Mismatched("one dimension of the parameter is put across itself")
    return found


def reduced(dims: Dims, which: Sequence[int], keepdim: bool) -> Dims:
    """Those of a sum along some."""
    gone = {positive(d, len(dims)) for d in which}
    if keepdim:
        return tuple(() if d in gone else group for d, group in enumerate(dims))
    return tuple(group for d, group in enumerate(dims) if d not in gone)


def positive(d: int, n: int) -> int:
    """A dimension counted from the first one."""
    if not -max(n, 1) <= d < max(n, 1):
        raise IndexError(f"Dimension out of range (expected to be in range of [{-n}, {n - 1}], but got {d})")
    return d % max(n, 1)


def regrouped(dims: Dims, shape: Sequence[int], wanted: Sequence[int]) -> Dims:
    """Those of a view with these sizes, one of which may be -1."""
    single = [d for group in dims for d in group]
    if single != sorted(single):
        raise Untraceable("a tensor is seen in another shape than its memory has")
    total = math.prod(shape[d] for d in single)
    known = math.prod(n for n in wanted if n != -1)
    asked = [total // max(known, 1) if n == -1 else n for n in wanted]
    if math.prod(asked) != total:
        raise RuntimeError(f"shape {list(wanted)} is invalid for input of size {total}")
    out = []
    for n in asked:
        group: list[int] = []
        while math.prod(shape[d] for d in group) < n and single:
            group.append(single.pop(0))
        if math.prod(shape[d] for d in group) != n:
            raise Untraceable("a tensor is seen in a shape that cuts one of its dimensions")
        out.append(tuple(group))
    return tuple(out)


def layouts(shape: Sequence[int], like: Sequence[int]) -> list[Dims]:
    """How a tensor of this shape may go along a parameter of that one: more than one way only if sizes are equal."""
    whole = full(like)
    if len(shape) == len(like):
        same = all(n in (1, m) for n, m in zip(shape, like, strict=True))
        return [tuple(d if n != 1 else () for n, d in zip(shape, whole, strict=True))] if same else []
    return list(_runs(tuple(shape), like, [d for d, n in enumerate(like) if n != 1]))


def _runs(shape: tuple[int, ...], like: Sequence[int], left: Sequence[int]) -> Iterator[Dims]:
    """The ways in which these sizes are those of neighbouring dimensions, of the ones that are left."""
    if not shape:
        yield ()
        return
    if shape[0] == 1:
        yield from (((), *rest) for rest in _runs(shape[1:], like, left))
        return
    for first, last in itertools.combinations(range(len(left) + 1), 2):
        group = tuple(left[first:last])
        if math.prod(like[d] for d in group) == shape[0]:
            yield from ((group, *rest) for rest in _runs(shape[1:], like, left[last:]))
