"""Every environment variable fusedopt reads, each looked up at the time of the call.

| variable | values | meaning |
|---|---|---|
| `FUSEDOPT_BACKEND` | auto, cpp, cuda, triton, reference | backend of optimizers that name none |
| `FUSEDOPT_CACHE_DIR` | a folder | where compiled kernels are kept |
| `FUSEDOPT_DEBUG` | 0, 1, 2, 3 | 1 prints the program, 2 also its source, 3 also the compiler's output |
| `CXX` | a compiler, arguments allowed | compiles CPU kernels |

And what is told without being a warning: records of the logger ``fusedopt``. Programs, sources and compilers' words are
DEBUG records of ``fusedopt.program``, ``fusedopt.source`` and ``fusedopt.compiler``. Where an application has set up no
logging, the messages alone go to stderr.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

logger = logging.getLogger("fusedopt")
TOPICS = ("program", "source", "compiler")
"""Loggers below that one, for each level of ``FUSEDOPT_DEBUG``."""

BACKENDS = ("auto", "cpp", "cuda", "triton", "reference")


def _text(name: str) -> str | None:
    """Value of `name` without blanks around it; None when unset or empty, as shells may export it."""
    return os.environ.get(name, "").strip() or None


def backend() -> str:
    """`FUSEDOPT_BACKEND`, "auto" when unset. Raises ValueError for a name that is no backend."""
    value = (_text("FUSEDOPT_BACKEND") or "auto").lower()
    if value not in BACKENDS:
        raise ValueError(f"FUSEDOPT_BACKEND={value!r} is no backend; choose one of {', '.join(BACKENDS)}")
    return value


def cache_dir() -> Path | None:
    """`FUSEDOPT_CACHE_DIR` as an absolute path with `~` expanded, None when unset."""
    value = _text("FUSEDOPT_CACHE_DIR")
    return Path(os.path.abspath(os.path.expanduser(value))) if value else None


def debug_level() -> int:
    """`FUSEDOPT_DEBUG`, 0 when unset. Raises ValueError for anything but 0, 1, 2 or 3."""
    value = _text("FUSEDOPT_DEBUG") or "0"
    if value not in ("0", "1", "2", "3"):
        raise ValueError(
            f"FUSEDOPT_DEBUG={value!r}: expected 0, 1 (program), 2 (plus source) or 3 (plus compiler)"
        )
    return int(value)


def cxx() -> str | None:
    """`CXX`, the C++ compiler's command line, None when unset."""
    return _text("CXX")


class _Stderr(logging.Handler):
    """The messages alone, to what is stderr now."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


_stderr = _Stderr()
_stderr.addFilter(lambda record: not logging.getLogger().handlers)  # an application's own, which get it too
logger.addHandler(_stderr)
logger.setLevel(logger.level or logging.INFO)  # an application may have set one before it imports this


def debug(level: int, *lines: object) -> None:
    """Log `lines` where this level's logger has DEBUG enabled; else to stderr if `FUSEDOPT_DEBUG` is at least `level`.

    If neither, they are not even made strings.
    """
    topic, asked = logger.getChild(TOPICS[level - 1]), debug_level() >= level
    if topic.isEnabledFor(logging.DEBUG):
        topic.debug("\n".join(map(str, lines)), stacklevel=2)
    elif asked:  # past all levels and handlers of an application, which are not what was asked
        message = "\n".join(map(str, lines))
        _stderr.emit(topic.makeRecord(topic.name, logging.DEBUG, __file__, 0, message, (), None))


def warn_once(said: set[Any], topic: Any, text: str) -> None:
    """Warn, unless this topic is among those ``said``; it is added first, as a warning may be an error."""
    if topic not in said:
        said.add(topic)
        warnings.warn(f"fusedopt: {text}", RuntimeWarning, stacklevel=caller_level())


def caller_level() -> int:
    """The ``stacklevel`` with which a warning names the user's line: the first frame outside fusedopt and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
        "fusedopt",
        "torch",
    ):
        level, frame = level + 1, frame.f_back
    return level
