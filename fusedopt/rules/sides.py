"""The dimensions of a tensor, each with a square matrix of its own: products of the gradient, bases, roots."""

from __future__ import annotations

from typing import Any


def sides_of(x: Any, most: Any, precondition_1d: Any) -> Any:
    """The dimensions of a tensor that have a basis."""
    found = range(min(x.dim(), 5)) if x.dim() > 1 or precondition_1d else ()
    return [i for i in found if x.shape[i] <= most]


def gram_of(x: Any, i: Any) -> Any:
    """The products with each other of what is along dimension i of a tensor: a square matrix."""
    if x.dim() != 2:
        x, i = x.movedim(i, 0).unsqueeze(-1).flatten(1), 0
    return x.mT @ x if i else x @ x.mT


def turned(x: Any, bases: Any, back: bool = False) -> Any:
    """A tensor with each dimension that has a basis in terms of it, or back: a product along each."""
    if all(basis is None for basis in bases):
        return x
    for i in range(x.dim()):
        x = x.mT if x.dim() == 2 else x.movedim(0, -1)  # once around, all dimensions are where they were
        basis = bases[i] if i < len(bases) else None
        if basis is not None:
            x = x @ (basis.mT if back else basis)
    return x


def squares_along(x: Any, i: Any) -> Any:
    """The diagonal of `gram_of`, as a tensor of length 1 along all other dimensions."""
    others = tuple(d for d in range(x.dim()) if d != i)
    return (x**2).sum(dim=others, keepdim=True) if others else x**2
