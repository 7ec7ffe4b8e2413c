"""What is measured on: a GPU, or, to rehearse the script where there is none, the CPU with tiny sizes."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch

from ..cases import Case

T = TypeVar("T")
Step = Callable[[], object]


class Gpu:
    """The first CUDA device.

    rounds: samples of each provider; large: elements of one tensor beyond 32-bit offsets; copy: bytes copied to measure
    bandwidth.
    """

    type = "cuda"
    backends: tuple[str, ...] = ("cuda", "triton")
    rounds = 25
    large = 2**31 + 4_097
    copy = 2 << 30
    longest_hold = 0.1

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name()
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cache = torch.zeros(max(2 * l2, 1 << 27) // 4, device="cuda")
        self._cycles_per_second = self._calibrate()

    @property
    def slug(self) -> str:
        """The device as a file name."""
        return "-".join(re.findall(r"[a-z0-9]+", self.name.lower()))

    def _calibrate(self) -> float:
        cycles = 20_000_000
        for _ in range(5):  # the first ones load the kernel and wake the clock
            seconds = self._events(lambda: torch.cuda._sleep(cycles)) / 1e3
        return cycles / seconds

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free_memory(self) -> int:
        """Bytes."""
        return torch.cuda.mem_get_info()[0]

    def release(self) -> None:
        """Give memory back that torch only keeps for later."""
        torch.cuda.empty_cache()

    def size(self, case: Case) -> Case:
        """The case as it is measured here."""
        return case

    def some(self, things: Sequence[T], few: int = 1) -> Sequence[T]:
        """What there is time for: here all, in a rehearsal a few."""
        return things

    def _events(self, work: Step) -> float:
        self._start.record()
        work()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)

    def hold(self, seconds: float) -> None:
        """Keep the device busy, so that what follows waits in its queue."""
        torch.cuda._sleep(int(seconds * self._cycles_per_second))

    def time(self, work: Step, hold: float) -> tuple[float, bool]:
        """Milliseconds on the device, its cache cold, without the host's; and whether the host kept ahead of it.

        The queue is held until the host has sent everything. Where it takes longer than ``hold`` seconds, gaps between
        kernels are part of the time.
        """
        self.synchronize()
        self.hold(hold)
        self._cache.sum()  # reading leaves nothing that would have to be written back during the measurement
        self._start.record()
        work()
        self._end.record()
        ahead = not self._start.query()
        self._end.synchronize()
        return self._start.elapsed_time(self._end), ahead

    def capture(self, step: Step) -> Step:
        """The step as a CUDA graph; what it returns replays it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        """Another stream than the current one, which is where steps are warmed up before a capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Raise if the block synchronizes: torch says so of its own calls; the queue, held half a second, of all."""
        self.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.hold(0.5)
            held = torch.cuda.Event()
            held.record()
            yield
            if held.query():
                raise AssertionError("the block ended only when the device had done all that was queued")
        finally:
            torch.cuda.set_sync_debug_mode("default")
            self.synchronize()


class Rehearsal:
    """The CPU in a GPU's place: the same script end to end, with the host's clock, and numbers that mean nothing."""

    type = "cpu"
    name = "rehearsal"
    slug = "rehearsal"
    backends: tuple[str, ...] = ("cpp",)
    rounds = 2
    large = 70_001
    copy = 1 << 20
    longest_hold = 0.0

    def synchronize(self) -> None:
        pass

    def free_memory(self) -> int:
        return 1 << 40

    def release(self) -> None:
        pass

    def size(self, case: Case) -> Case:
        return case.small()

    def some(self, things: Sequence[T], few: int = 1) -> Sequence[T]:
        return things[:: max(1, len(things) // few)][:few]

    def hold(self, seconds: float) -> None:
        pass

    def time(self, work: Step, hold: float) -> tuple[float, bool]:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3, True

    def capture(self, step: Step) -> Step:
        return step

    def side_stream(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def no_waiting(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


Device = Gpu | Rehearsal


def find(rehearse: bool) -> Device:
    """The device. Raises RuntimeError if torch finds no GPU."""
    if rehearse:
        return Rehearsal()
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no NVIDIA GPU here; with --rehearse the script runs on the CPU")
    return Gpu()
