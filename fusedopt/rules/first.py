"""How a rule treats its first step apart without a kernel of its own."""

from __future__ import annotations

from typing import Any


def first_step(step: Any) -> Any:
    """1 in a parameter's first step, 0 in all later ones.

    Formula: ``0 ** (t - 1)``: arithmetic, so it is recorded, and one kernel serves all steps; a branch would make two.
    Args: `step` int, at least 1. Returns a number.
    """
    return 0.0 ** (step - 1)
