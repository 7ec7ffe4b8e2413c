"""Which backend runs where: one row per backend, and the first that can compile a program is taken.

A backend is a folder: how it renders programs, compiles and launches them. `register` adds one, a user's own too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .. import env
from ..compile.cache import BuildError
from ..ir.program import Program
from .base import Backend, Kernel, Launch

__all__ = [
    "Backend", "Kernel", "Launch", "candidates", "check_name", "compile_program", "get", "names", "register",
]  # fmt: skip


class Row(NamedTuple):
    """A backend that is known: what makes it, and the type of the devices that it runs on.

    ``tried``: by ``auto``, in the order of rows.
    """

    make: Callable[[], Backend]
    device: str
    tried: bool = True


def _ours(name: str, kind: str) -> Callable[[], Backend]:
    return lambda: getattr(importlib.import_module(f"{__name__}.{name}.backend"), kind)()


ROWS = {
    "cpp": Row(_ours("cpp", "Cpp"), "cpu"),
    "cuda": Row(_ours("cuda", "Cuda"), "cuda"),
    "triton": Row(_ours("triton", "Triton"), "cuda"),
}
"""Compiled backends by name. The reference is none: it has no kernels."""
made: dict[str, Backend] = {}
"""Those that were asked for: a backend keeps its kernels."""


def register(name: str, make: Callable[[], Backend], device: str, tried: bool = False) -> None:
    """Make a backend known by a name, for ``Optimizer(backend=name)``; in place of the one with that name, if any.

    ``make()`` gives it (see ``backends.base``) when it is first needed; ``device`` is the type of the devices that it
    runs on. ``tried``: ``auto`` tries it too, after those that were there before.

    Raises ValueError for the names ``auto`` and ``reference``.
    """
    if name in ("auto", "reference"):
        raise ValueError(f"{name!r} is not the name of a compiled backend; choose another")
    ROWS[name] = Row(make, device, tried)
    made.pop(name, None)


def names() -> tuple[str, ...]:
    """What may be asked for."""
    return ("auto", *ROWS, "reference")


def get(name: str) -> Backend:
    """The backend of this name."""
    if name not in made:
        made[name] = ROWS[name].make()
    return made[name]


def check_name(name: str | None) -> str:
    """The backend asked for: the argument, else FUSEDOPT_BACKEND, else auto. Raises ValueError for an unknown one."""
    chosen = name if name is not None else env.backend()
    if chosen not in names():
        raise ValueError(f"unknown backend {chosen!r}; this version has {', '.join(names())}")
    return chosen


_warned: set[str] = set()
_ELSEWHERE = {
    "triton": ", or start Python with TRITON_INTERPRET=1 to run it on the CPU in Triton's interpreter"
}


def candidates(name: str, device: torch.device) -> tuple[Backend, ...]:
    """The compiled backends to try on this device, best first; none means the reference."""
    if name == "reference":
        return ()
    if name == "auto":
        found = [n for n, row in ROWS.items() if row.tried and row.device == device.type]
        if not found:
            env.warn_once(
                _warned,
                device.type,
                f"this version compiles nothing for {device.type}, so parameters there are stepped unfused",
            )
        return tuple(map(get, found))
    backend = get(name)
    if backend.device != device.type:
        raise ValueError(
            f"backend {name!r} runs on {backend.device}, and a parameter is on {device}; use backend='auto'"
            + (_ELSEWHERE.get(name, "") if device.type == "cpu" else "")
        )
    return (backend,)


def compile_program(
    name: str, device: torch.device, program: Program, title: str, slot_names: Sequence[str]
) -> tuple[Backend, Kernel] | None:
    """Compile with the first backend that can. None: the reference has to do it (``auto`` only), said once.

    Raises BuildError if the backend was asked for by name.
    """
    tried = candidates(name, device)
    for k, backend in enumerate(tried):
        try:
            return backend, backend.compile(program, title, slot_names, device)
        except BuildError as error:
            if name != "auto":
                raise
            following = tried[k + 1 :]
            instead = f"{following[0].name} compiles instead" if following else "steps run unfused"
            env.warn_once(
                _warned, backend.name, f"the {backend.name} backend cannot be used, so {instead}. {error}"
            )
    return None
