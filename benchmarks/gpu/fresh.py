"""What has to be seen from outside of a process: the first step with empty caches, and compute-sanitizer's findings.

``python -m benchmarks.gpu.fresh RULE PROVIDER DEVICE`` prints a first step's seconds and compile times, as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..cases import CASES
from ..measure import ROOT, Row
from ..providers import make
from . import checks
from .device import Device
from .jobs import Job, Skipped

RULES = ("AdamW", "LAMB")
TOOLS = ("memcheck", "racecheck")


def first_jobs(device: Device) -> Iterator[Job]:
    """Backend by backend and rule by rule."""
    for backend in device.backends:
        for rule in device.some(RULES):
            yield Job(f"first step/{rule}/{backend}", partial(first_step, device, backend, rule))


def sanitizer_jobs(device: Device, tool: str) -> Iterator[Job]:
    """One of compute-sanitizer's tools on every backend."""
    for backend in device.backends:
        yield Job(f"{tool}/{backend}", partial(sanitize, device, tool, backend))


def first_step(device: Device, backend: str, rule: str) -> list[Row]:
    """The first step of a process whose caches are empty, and what of it each kernel's compiler took."""
    with tempfile.TemporaryDirectory() as folder:
        empty = {"FUSEDOPT_CACHE_DIR": folder, "TRITON_CACHE_DIR": str(Path(folder, "triton"))}
        done = _python(["benchmarks.gpu.fresh", rule, f"fusedopt {backend}", device.type], empty)
    found = json.loads(done.stdout.splitlines()[-1])
    key = ("tiny", rule, "empty cache", f"fusedopt {backend}")
    return [
        Row.of(key, "first step", "ms", [found["first"] * 1e3]),
        Row.of(key, "compile", "ms", [s * 1e3 for s in found["compile"]], note=", ".join(found["kernels"])),
    ]


def sanitize(device: Device, tool: str, backend: str) -> str:
    """compute-sanitizer on the test of what is written; without it the test alone."""
    if find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    prefix = []
    if device.type == "cuda":
        found = shutil.which("compute-sanitizer") or shutil.which(
            "compute-sanitizer", path="/usr/local/cuda/bin"
        )
        if found is None:
            raise Skipped("compute-sanitizer is not installed; it comes with the CUDA toolkit")
        prefix = [found, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    command = ["pytest", checks.SANITIZED, "-k", backend, *checks.options(device.type)]
    done = _python(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, prefix, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, flush=True)
        raise AssertionError(
            f"{tool} ended with status {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
        )
    return done.stdout.strip().splitlines()[-1]


def _python(
    arguments: list[str], environment: dict[str, str], prefix: list[str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """A module in a process of its own. Raises RuntimeError with what it said, if it fails and is checked."""
    command = [*(prefix or []), sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-1500:]}")
    return done


# --
# In that process


def probe(rule: str, provider: str, device: str) -> dict[str, Any]:
    """Seconds of the first step, and of each kernel's compiler."""
    params = CASES["tiny"].tensors(device=device)
    runner = make(provider, rule, params)
    start = time.perf_counter()
    runner.step()
    params[0].sum().item()  # wait for the device
    seconds = time.perf_counter() - start
    compiled = runner.optimizer.explain().compiled
    return {"first": seconds, "kernels": [k.name for k in compiled], "compile": [k.seconds for k in compiled]}


if __name__ == "__main__":
    print(json.dumps(probe(*sys.argv[1:4])))
