"""Where optimizers meet policies of storage: what is asked for, and checkpoints, which know nothing of policies."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from ..callback import arguments_of, looked_up
from ..storage.callbacks import decode, encode
from ..storage.policy import OTHERS, PARAM, choice, chosen

if TYPE_CHECKING:
    from .groups import ParamGroups

AROUND = decode, encode
"""The callbacks before and after a rule's own."""
HYPER = "storage"
"""The key of param groups that has the choice of policies, by the names that callbacks have for state."""


def as_text(storage: Any, groups: ParamGroups) -> str:
    """A choice of policies as groups have it. Raises TypeError or ValueError for what is none, or names no state."""
    found = {groups.called(name): policy for name, policy in choice(chosen(storage)).items()}
    known: set[str] = set()
    for cb in groups.callbacks:
        if cb in AROUND:
            continue
        mentioned = looked_up(cb)
        if mentioned is None:  # it may keep anything
            return chosen(found)
        known |= {*list(arguments_of(cb))[1:]} | mentioned
    for name in found:
        if name not in known and name not in (PARAM, OTHERS):
            near = difflib.get_close_matches(groups.stored(name), map(groups.stored, known), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"storage names the state {groups.stored(name)!r}, and no callback keeps such{hint}"
            )
    return chosen(found)
