"""Steps of a class that are captured into a CUDA graph: the same launches, repeated, with scalars that are sent anew.

A replay does what the device does, and nothing of the host's half of a step. So there must be none: what the class
counts has to be in tensors on the device, as torch.optim's classes have it with ``capturable=True``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch

from ..step.bound import BoundStep
from ..step.engine import Engine
from ..step.launching import GraphScalars
from ..step.sharded import is_dtensor
from .buckets import StepBuckets
from .host import Host

UNFUSED = "Remedy: capture the class's own step, with fusedopt.unfuse(opt), if it can be captured"
COUNTS = (
    "Remedy: keep it in a tensor on the parameters' device, as torch.optim's classes do with capturable=True, or "
    "call step() outside of the graph"
)
FIRST = "Remedy: do three steps before capturing, on a side stream, with gradients that stay where they are"


class Captures:
    """The captured steps of one optimizer. What a graph replays has to live as long as the optimizer."""

    def __init__(self) -> None:
        self._kept: list[tuple[GraphScalars, Host]] = []

    def check(self, opt: torch.optim.Optimizer, engine: Engine, reason: str, given_up: bool) -> None:
        """Raise RuntimeError if a step that is captured would not be what replays have to do.

        ``reason``: why the last step ran as it was written, or ""; ``given_up``: whether they all do from now on.
        """
        why = reason.partition(". Remedy: ")[0] or engine.steps.why
        if given_up:
            refuse(f"it runs as it was written, unfused: {why}. {UNFUSED}")
        if not engine.bound:
            refuse(f"no step like it was done in kernels before{why and f' ({why})'}. {FIRST}")
        if any(is_dtensor(p) for group in opt.param_groups for p in group["params"]):
            refuse(f"its parameters are spread over processes. {UNFUSED}")
        for bound in engine.bound:
            for what in _frozen(bound):
                refuse(f"{what}, which a replay would leave as it is now. {COUNTS}")
            if calls := [call for each in bound.rounds for call in each.called()]:
                refuse(
                    f"it calls torch between kernels ({calls[0]}), with this step's numbers. Remedy: call step() "
                    "outside of the graph"
                )

    def keep(self, engine: Engine) -> None:
        """Note the step that was captured just now."""
        resident, host = engine.resident, engine.read
        assert resident is not None
        if not any(resident is kept for kept, _ in self._kept):
            self._kept.append((resident, host))

    def upload(self, opt: torch.optim.Optimizer, engine: Engine, buckets: StepBuckets) -> None:
        """Send the scalars that follow from the class's numbers to where captured launches read them.

        Raises RuntimeError, having sent nothing, if a captured step is not the one that would be done now.
        """
        kept, last = [resident for resident, _ in self._kept], engine.resident
        if not any(each.launches for each in (*kept, last) if each):
            raise RuntimeError(
                "upload_hypers() is for optimizers that were fused with capturable=True and have stepped"
            )
        for _, host in self._kept:
            buckets.closure = host.closure
            if why := buckets.changed(host):
                raise RuntimeError(
                    f"the captured step is not the one to do now: {why}. Remedy: capture the step again"
                )
        for resident, host in self._kept:
            buckets.closure = host.closure
            resident.upload([host.numbers for _ in opt.param_groups])
        if last is not None and last not in kept:  # it may be captured next
            host = engine.read
            buckets.closure = host.closure
            last.upload([host.numbers for _ in opt.param_groups], captured=False)


def _frozen(bound: BoundStep) -> Iterator[str]:
    """What a step of this structure leaves on the host, or takes from it and the state."""
    host: Any = bound.read
    for name in host.left:
        yield f"it leaves {name} on the host"
    for _, sets in bound.resident.launches:
        for replay, _ in sets:
            for kind, name, *_ in replay.leaves:
                if kind == "state":
                    yield f"the state {name!r} is a number of the host"


def refuse(why: str) -> NoReturn:
    raise RuntimeError(f"step() is being captured into a CUDA graph, which cannot repeat it: {why}")
