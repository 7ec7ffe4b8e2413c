"""What every benchmark needs: a stopwatch that keeps all samples, and a line that says what they were taken on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date

import torch

import fusedopt
from fusedopt.compile.toolchain import cpu_features


class Stopwatch:
    """Samples in seconds. ``synchronize`` is called before each reading of the clock (for devices that run behind)."""

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self.samples: list[float] = []
        self._synchronize = synchronize or (lambda: None)

    @contextmanager
    def time(self) -> Iterator[None]:
        """Take the time of the block as one sample."""
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self.samples.append(time.perf_counter() - start)

    def percentile(self, percent: int) -> float:
        """A percentile of the samples, in milliseconds; NaN without samples."""
        if len(self.samples) < 2:
            return self.samples[0] * 1e3 if self.samples else float("nan")
        return statistics.quantiles(self.samples, n=100, method="inclusive")[percent - 1] * 1e3

    @property
    def median(self) -> float:
        """The median in milliseconds: a slow first sample (compiling) and bursts of other work weigh little."""
        return self.percentile(50)


def machine() -> str:
    """CPU, cores, threads, versions and date: without them a number means nothing."""
    cpu = f"{cpu_features().model}, {os.cpu_count()} cores, torch on {torch.get_num_threads()}"
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, fusedopt {fusedopt.__version__}"
    )
    return f"{cpu}; {versions}; {date.today()}"
