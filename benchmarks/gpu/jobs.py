"""A part of the run is a list of jobs, worked through in a process of its own, which logs each before and after.

So whatever a job does to its process, others go on: the next process of the part leaves out what the log has.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..measure import ROOT, Row
from .device import Device

DEVICE_LOST = 3
"""Exit status of a part whose process can no longer use the device: the rest needs another process."""
RESTARTS = 4


class Skipped(Exception):
    """The job cannot be done here. Says why; that is no failure."""


class Partly(Exception):
    """The job has rows, and something went wrong besides."""

    def __init__(self, rows: list[Row], why: str) -> None:
        super().__init__(why)
        self.rows = rows


@dataclass(frozen=True)
class Job:
    """``run`` gives rows that were measured, or words on what was checked; what it raises is a failure."""

    id: str
    run: Callable[[], list[Row] | str | dict[str, Any] | None]


@dataclass
class Outcome:
    """What became of a job. status: ``passed``, ``failed`` or ``skipped``; detail: why, or what was found."""

    job: str
    status: str
    detail: str = ""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)


# --
# In the part's process


def do(jobs: Iterable[Job], device: Device, log: Path) -> int:
    """Do the jobs that the log does not have. The exit status."""
    before = begun(log)
    for job in jobs:
        if job.id in before:
            continue
        begin(log, job.id)
        finish(log, _done(job))
        gc.collect()
        try:
            device.synchronize()
            device.release()
        except Exception:
            return DEVICE_LOST
    return 0


def _done(job: Job) -> Outcome:
    start, outcome = time.perf_counter(), Outcome(job.id, "passed")
    try:
        found = job.run()
    except Skipped as why:
        outcome.status, outcome.detail = "skipped", str(why)
    except Partly as partly:
        outcome.status, outcome.detail = "failed", str(partly)[:2000]
        outcome.rows = [asdict(row) for row in partly.rows]
    except Exception as error:
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        outcome.status, outcome.detail = "failed", f"{type(error).__name__}: {error}"[:2000]
    else:
        if isinstance(found, list):
            outcome.rows = [asdict(row) for row in found]
        elif isinstance(found, dict):
            outcome.found = found
        else:
            outcome.detail = found or ""
    outcome.seconds = time.perf_counter() - start
    return outcome


def begun(log: Path) -> set[str]:
    """The jobs that this process or an earlier one has begun."""
    return {line["begun"] for line in _lines(log) if "begun" in line}


def begin(log: Path, job: str) -> None:
    """The job comes now: what happens to the process is its doing."""
    _write(log, {"begun": job})


def finish(log: Path, outcome: Outcome) -> None:
    """The job is done."""
    _write(log, asdict(outcome))


def _write(log: Path, line: dict[str, Any]) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _lines(log: Path) -> list[dict[str, Any]]:
    if not log.is_file():
        return []
    found = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # the process was ended while it wrote
            continue
    return found


# --
# In the main process


class Part:
    """A part at work in a process of its own. ``seconds``: its limit."""

    def __init__(
        self, name: str, arguments: list[str], folder: Path, seconds: float, environment: dict[str, str]
    ) -> None:
        self.name, self.seconds = name, seconds
        self.log, self.output = folder / f"{name}.log", folder / f"{name}.txt"
        self.command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--part",
            name,
            "--log",
            str(self.log),
            *arguments,
        ]
        self.environment = os.environ | environment
        self.stop = time.monotonic() + seconds
        self.restarts, self._seen = 0, 0
        self.why = ""
        self._start()

    def _start(self) -> None:
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def running(self) -> bool:
        """Whether there is more to come; a process that broke off is followed by another, one out of time ended."""
        status = self.process.poll()
        if status is None:
            if time.monotonic() < self.stop:
                return True
            self.end()
            self.why = f"did not end within {self.seconds:.0f} s"
        elif status and self.restarts < RESTARTS and self._progressed():
            self.restarts += 1
            self._start()
            return True
        elif status:
            self.why = f"its process ended with status {status}"
        return False

    def _progressed(self) -> bool:
        """Whether the last process began a job: else the next one would do no better."""
        before, self._seen = self._seen, len(_lines(self.log))
        return self._seen > before

    def end(self) -> None:
        """End the process and those it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def outcomes(self) -> list[Outcome]:
        """What is known now: finished jobs, those that took their process with them, and why the part broke off."""
        lines = _lines(self.log)
        finished = [Outcome(**line) for line in lines if "begun" not in line]
        done = {outcome.job for outcome in finished}
        lost = [line["begun"] for line in lines if "begun" in line and line["begun"] not in done]
        for job in lost:
            finished.append(Outcome(job, "failed", f"{self.why or 'its process ended'}; {self.last_words()}"))
        if self.why and not lost:
            finished.append(Outcome(f"{self.name}/process", "failed", f"{self.why}; {self.last_words()}"))
        return finished

    def last_words(self) -> str:
        """The end of what the process printed."""
        return self.printed()[-400:].strip()

    def printed(self) -> str:
        """What the process printed, without the beginning where that is long."""
        return self.output.read_text(encoding="utf-8", errors="replace")[-400_000:]
