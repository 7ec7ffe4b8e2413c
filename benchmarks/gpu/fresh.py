"""What has to be seen from outside of a process: the first step with empty caches, and compute-sanitizer's findings.

``python -m benchmarks.gpu.fresh RULE PROVIDER DEVICE`` prints a first step's seconds and compile times, as JSON;
``python -m benchmarks.gpu.fresh sanitized BACKEND DEVICE`` takes a few steps that have everything kernels can meet.
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
from pathlib import Path
from typing import Any

import fusedopt
from fusedopt import optim

from ..cases import CASES
from ..measure import ROOT, Row
from ..providers import make
from .compare import noise, run
from .device import Device
from .jobs import Job, Skipped

RULES = ("AdamW", "LAMB")
TOOLS = ("memcheck", "racecheck")
SIZES = (0, 1, 7, 129, 4097, 70_001)


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
        done = _python([rule, f"fusedopt {backend}", device.type], empty)
    found = json.loads(done.stdout.splitlines()[-1])
    key = ("tiny", rule, "empty cache", f"fusedopt {backend}")
    return [
        Row.of(key, "first step", "ms", [found["first"] * 1e3]),
        Row.of(key, "compile", "ms", [s * 1e3 for s in found["compile"]], note=", ".join(found["kernels"])),
    ]


def sanitize(device: Device, tool: str, backend: str) -> str:
    """compute-sanitizer on a few steps."""
    prefix = []
    if device.type == "cuda":
        found = shutil.which("compute-sanitizer") or shutil.which(
            "compute-sanitizer", path="/usr/local/cuda/bin"
        )
        if found is None:
            raise Skipped("compute-sanitizer is not installed; it comes with the CUDA toolkit")
        prefix = [found, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    done = _python(
        ["sanitized", backend, device.type], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, prefix, check=False
    )
    if done.returncode:
        print(done.stdout, done.stderr, flush=True)
        raise AssertionError(
            f"{tool} ended with status {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
        )
    return done.stdout.strip().splitlines()[-1]


def _python(
    arguments: list[str], environment: dict[str, str], prefix: list[str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """This module in a process of its own. Raises RuntimeError with what it said, if it fails and is checked."""
    command = [*(prefix or []), sys.executable, "-m", "benchmarks.gpu.fresh", *arguments]
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


def sanitized(backend: str, device: str) -> str:
    """Steps with tails, misaligned gradients and norms. Inputs are made on the CPU: fewer kernels to look at."""
    shapes = [(n,) for n in SIZES]
    start = noise(shapes, 0, "cpu", CASES["tiny"].dtype)
    for make_ in (partial(optim.AdamW, lr=1e-2), partial(fusedopt.Lamb, lr=1e-2)):
        gradients = [noise(shapes, seed, "cpu", start[0].dtype) for seed in range(1, 3)]
        run(make_, backend, start, gradients, device=device, dtype=start[0].dtype, misaligned=True)
    return f"{len(SIZES)} tensors, two optimizers, two steps"


if __name__ == "__main__":
    if sys.argv[1] == "sanitized":
        print(sanitized(*sys.argv[2:4]))
    else:
        print(json.dumps(probe(*sys.argv[1:4])))
