"""Which kernels an optimizer has used so far, and why each became necessary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import env
from ..backends import Kernel
from ..ir.program import Buffer
from ..trace.signature import Foreign, Signature
from ..trace.tracer import Trace


class Used(NamedTuple):
    """A kernel under the name this optimizer gives it, and what made it necessary."""

    kernel: Kernel
    label: str
    why: str


class History:
    """``used`` lists the kernels in the order of their first use."""

    def __init__(self) -> None:
        self.used: dict[Kernel, Used] = {}
        self._last: dict[tuple[int, int], Trace] = {}

    def note(self, where: tuple[int, int], kernels: Sequence[Kernel], trace: Trace) -> None:
        """The parameter at (group, position) is stepped by these kernels, according to this trace."""
        if not all(kernel in self.used for kernel in kernels):
            why = self._why(self._last.get(where), trace)
            for kernel, program in zip(kernels, (*trace.rounds, trace.program), strict=True):
                if kernel not in self.used:
                    label = f"{kernel.name} #{len(self.used) + 1}"
                    self.used[kernel] = Used(kernel, label, why)
                    env.debug(1, f"# {label}: {why}", program)
            if trace.externs is not None:
                env.debug(1, "# torch calls after the programs of rounds", trace.externs)
        self._last[where] = trace

    def _why(self, old: Trace | None, new: Trace) -> str:
        if old is not None:
            return "; ".join(differences(old, new)) or "the callbacks did something else than before"
        return f"first step of parameters with {describe(new.signature)}" if self.used else "first step"


def describe(signature: Signature) -> str:
    """A signature in words: dtypes, tensors in the state, flags."""
    tensors = [k for k, v in signature.state if isinstance(v, (Buffer, Foreign))]
    flags = [f"{k}={v}" for k, v in signature.state if v is None or isinstance(v, (bool, str))]
    parts = [f"{_short(signature.param)} parameter", f"{_short(signature.grad)} gradient"]
    parts += [f"state {', '.join(tensors)}"] if tensors else ["no state"]
    return ", ".join(parts + flags + [f"{k} {v}" for k, v in signature.attributes])


def differences(old: Trace, new: Trace) -> list[str]:
    """Why two traces of one parameter may differ: dtypes, state, flags, branches on numbers."""
    out = []
    a, b = old.signature, new.signature
    if (a.param, a.grad) != (b.param, b.grad):
        out.append(f"now {_short(b.param)} parameter with {_short(b.grad)} gradient")
    was, now = _structural(a), _structural(b)
    appeared = [k for k in now if k not in was]
    if appeared:
        out.append(f"state {', '.join(appeared)} is there now")
    out += [f"state {k} is now {now[k]}" for k in now if k in was and now[k] != was[k]]
    before, after = old.branches(), new.branches()
    return out + [f"{text} is now {x}" for text, x in after.items() if before.get(text, x) != x]


def _structural(signature: Signature) -> dict[str, Any]:
    return {k: v for k, v in signature.state if type(v) not in (int, float)}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
