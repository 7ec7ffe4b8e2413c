"""What a freeze comes to."""

from __future__ import annotations

import warnings
from typing import Any

from .. import env


def say_if_nothing_froze(opt: Any, n: int) -> None:
    """Warn where all is trained although some groups were to be frozen, those before ``n``."""
    groups = opt.param_lists
    frozen = groups[: max(opt.frozen_idx, 0)]
    if n == 0 or any(not p.requires_grad for group in frozen for p in group):
        return
    why = (
        "there is one group of parameters: give the Learner a splitter that makes several"
        if len(groups) == 1
        else f"the first {len(frozen)} of {len(groups)} groups hold nothing but layers that train_bn keeps training"
        if frozen
        else f"there are {len(groups)} groups, and none before the one that training starts at"
    )
    warnings.warn(f"fusedopt: freeze_to({n}) freezes nothing: {why}", stacklevel=env.caller_level())
