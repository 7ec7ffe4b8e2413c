"""What ends a trace from within a callback, and where in the user's code that was."""

from __future__ import annotations

import linecache
import sys
import threading
import types
from typing import Any

_raised = threading.local()
_OURS = ("fusedopt.trace", "fusedopt.ir", "fusedopt.classes")
STANDARD = sys.stdlib_module_names | {"_frozen_importlib", "typing_extensions"}
"""Python's own modules, and one that puts functions of its own into ``typing``."""


class Signal(BaseException):
    """A BaseException, so that a callback's ``try`` does not swallow it.

    One that does (``except:``) goes on with what is none of its results; `latest` finds that out when it returns.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        _raised.latest = self


def latest() -> Signal | None:
    """The last signal raised in this thread since this was last asked."""
    found, _raised.latest = getattr(_raised, "latest", None), None
    return found


class Untraceable(Signal):
    """A callback did what has no fused form. ``where`` is the place in its code, ``remedy`` what to do about it."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        frame = _caller((*_OURS, "torch.", "numpy."))
        between = frame.f_globals.get("__name__", "").startswith(
            ("fusedopt.step", "fusedopt.optimizer")
        )  # no callback
        self.where = "" if between else place_of(frame.f_code, frame.f_lineno)
        self.remedy = remedy


class Changes(Untraceable):
    """A callback changes what it was handed and does not own: how often it is called matters."""


class Starts(Untraceable):
    """A callback makes state that no kernel could. The step that does so runs eagerly, and later ones need not."""


class Mismatched(Untraceable):
    """Tensors meet along different dimensions of their parameter. ``of`` is the number of the run that met it.

    If sizes left open along which a state goes, another choice may fit. ``matrix``: what torch calls give met elements.
    """

    of: int | None = None
    matrix = False


class Unsuited(Mismatched):
    """Tensors go along what a signature does not tell apart: dimensions, or, ``blocks``, blocks of elements."""

    blocks = False


class Begins(Signal):
    """State begins beside other state of which only the device knows whether it has begun: sign again with that."""


class NeedsAttribute(Signal):
    """A callback read an attribute that the signature does not hold yet: sign again with it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _caller(inner: tuple[str, ...] = _OURS) -> types.FrameType:
    """The innermost frame outside this package's tracer and Python's own modules."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_within(frame.f_globals.get("__name__", ""), inner):
        frame = frame.f_back
    return frame


def _is_within(module: str, inner: tuple[str, ...]) -> bool:
    """Whether code of this module is passed over. Rules of torch's are somebody's code, too."""
    rule = module.startswith("torch.optim.") and module != "torch.optim.optimizer"
    return (module.startswith(inner) or module.partition(".")[0] in STANDARD) and not rule


def place_of(code: types.CodeType, line: int) -> str:
    """``file.py:12``."""
    return f"{code.co_filename.rsplit('/', 1)[-1]}:{line}"


def line_now() -> str:
    """The line of code and its place, for the innermost frame outside this package's tracer."""
    frame = _caller((*_OURS, "torch."))
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return f"{line or frame.f_code.co_name}, {place_of(frame.f_code, frame.f_lineno)}"


def where_now() -> str:
    """``callback, file.py:12`` for the innermost frame outside this package's tracer."""
    frame = _caller((*_OURS, "torch."))
    return f"{frame.f_code.co_name}, {place_of(frame.f_code, frame.f_lineno)}"
