"""Which backend runs where. A backend compiles programs to kernels and launches them; adding one is adding a row."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from .. import env
from ..compile.cache import BuildError
from ..ir.passes import Stage, stages
from ..ir.program import Program


@dataclass(eq=False)
class Kernel:
    """A compiled program: one object per program and name. ``handle`` is the backend's own."""

    backend: str
    name: str
    program: Program
    body: str
    source_path: str
    seconds: float
    cached: bool
    handle: object = field(repr=False)

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        return stages(self.program)


class Launch(Protocol):
    """A kernel's tables, ready to run any number of times."""

    rows: np.ndarray
    n_sets: int
    movable: bool
    """Whether any address in the table may change between runs, not only those of gradients."""

    def native(self) -> Any:
        """The launch for C++ to run (csrc/launch.h); None if it cannot."""

    def run(self, slots: np.ndarray) -> None:
        """Run all stages with these scalars: float64, scalar sets × slots."""

    def planned(self, slots: np.ndarray) -> tuple[list[int], int, list[list[int]]] | None:
        """What `leaf.run_cpu` needs to do the same as ``run``; None if it takes more than that."""

    def let_go(self) -> None:
        """The launch keeps its tensors' memory alive until this is called."""

    def upload(self, slots: np.ndarray) -> None:
        """Put these scalars where the launch reads them, also one that a CUDA graph replays, and run nothing."""


class Backend(Protocol):
    """What the runtime asks of a backend."""

    name: str
    device: str
    native: bool
    """Whether C++ runs its launches, and can switch rows off and on."""

    def compile(
        self, program: Program, name: str, slot_names: Sequence[str], device: torch.device | None = None
    ) -> Kernel:
        """The kernel of a program for a device (None: the current one of this backend's type), compiled or cached.

        What cannot be compiled or loaded is known here, before anything has changed. Raises BuildError.
        """

    def prepare(
        self,
        kernel: Kernel,
        columns: dict[str, list[torch.Tensor]],
        sizes: Sequence[int],
        sets: Sequence[int],
        resident: bool = False,
    ) -> Launch:
        """Tables for launching the kernel over rows of tensors.

        columns: for each buffer of the program one tensor per row; sizes: elements per row; sets: each row's scalar
        set; resident: scalars stay in the device's memory, so that a launch in a CUDA graph sees later ones.
        """


def _cpp() -> Backend:
    from .cpu import Cpp

    return Cpp()


def _cuda() -> Backend:
    from .cuda import Cuda

    return Cuda()


def _triton() -> Backend:
    from .triton import Triton

    return Triton()


COMPILED = {"cpp": _cpp, "cuda": _cuda, "triton": _triton}
"""Compiled backends by name."""
FOR_DEVICE = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
"""What ``auto`` tries, by device type; the reference comes last."""
NAMES = ("auto", *COMPILED, "reference")

_made: dict[str, Backend] = {}


def get(name: str) -> Backend:
    if name not in _made:
        _made[name] = COMPILED[name]()
    return _made[name]


def check_name(name: str | None) -> str:
    """The backend asked for: the argument, else FUSEDOPT_BACKEND, else auto. Raises ValueError for an unknown one."""
    chosen = name if name is not None else env.backend()
    if chosen not in NAMES:
        raise ValueError(f"unknown backend {chosen!r}; this version has {', '.join(NAMES)}")
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
        if device.type not in FOR_DEVICE:
            _say(
                device.type,
                f"this version compiles nothing for {device.type}, so parameters there are stepped unfused",
            )
        return tuple(get(n) for n in FOR_DEVICE.get(device.type, ()))
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
    for backend, following in zip(tried, (*tried[1:], None), strict=True):
        try:
            return backend, backend.compile(program, title, slot_names, device)
        except BuildError as error:
            if name != "auto":
                raise
            instead = f"{following.name} compiles instead" if following else "steps run unfused"
            _say(backend.name, f"the {backend.name} backend cannot be used, so {instead}. {error}")
    return None


def _say(topic: str, text: str) -> None:
    """Warn once per topic."""
    if topic not in _warned:
        _warned.add(topic)
        warnings.warn(f"fusedopt: {text}", RuntimeWarning, stacklevel=env.caller_level())
