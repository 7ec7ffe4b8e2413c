"""``fusedopt.total`` in callbacks that run eagerly: what one parameter's call asks for takes all parameters.

A callback that asks for a total that is not known is ended there. So it is run on copies that are thrown away, for
every parameter, until all of its totals are known, one at a time, and then in earnest.
"""

from __future__ import annotations

import torch

from ..trace.totals import summed
from . import items, reference
from .items import Item


class Unknown(BaseException):
    """Ends the call of a callback that asks for a total that is not known. Not for a callback's ``try`` to catch."""


class Known:
    """The totals of one callback, by the number of its call for each.

    ``share`` is what the last parameter adds to the next one; ``complete``: there is no next one.
    """

    def __init__(self) -> None:
        self.totals: list[torch.Tensor] = []
        self.share: torch.Tensor | None = None
        self.complete = False
        self._calls = 0

    def begin(self) -> None:
        """The callback is called for another parameter."""
        self._calls, self.share = 0, None

    def total(self, x: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            if self.share is None and self._calls < len(self.totals):
                self._calls += 1
                return self.totals[self._calls - 1].to(x.device, copy=True)
            if self.complete:
                raise RuntimeError(
                    "a callback calls fusedopt.total more often than it did for the same parameters before. Remedy: "
                    "let what it calls depend on its arguments alone"
                )
            if self.share is None:
                self.share = summed(x)
        raise Unknown


class Unasked:
    """Answers where nobody asks for all parameters: it refuses."""

    def total(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(
            "a callback calls fusedopt.total, and its code does not show it, so its parameters were not waited for. "
            "Remedy: name it where it can be seen: import fusedopt at the top of the module, and call fusedopt.total"
        )


def throw_away(work: Item) -> Item:
    """A copy of a work copy, for a call whose effects nobody is to see."""

    def copy(t: torch.Tensor) -> torch.Tensor:
        out = t.detach().clone()
        return reference.mark(out, reference.asked(t)) if reference.is_marked(t) else out

    state = {k: copy(v) if isinstance(v, torch.Tensor) else v for k, v in work.state.items()}
    out = type(work)(copy(work.param), copy(work.grad), state, work.where, work.hyper, work.modes)
    out.owner = work.owner
    items.attach_gradient(out)
    return out
