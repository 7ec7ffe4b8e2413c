"""What a step changes, all of it or nothing: no signal handler comes between.

Python runs handlers between its own instructions. So the changes are prepared as calls of functions written in C, and
carried out within a single one.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

Change = Callable[[], Any]

_call = operator.methodcaller("__call__")


def commit(changes: Iterable[Change]) -> None:
    """Call them in order. Those that are written in C, or `functools.partial` of such, are not interrupted."""
    deque(map(_call, list(changes)), maxlen=0)
