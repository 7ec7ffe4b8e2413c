"""What the numbers belong to: device, driver, clocks, versions, commit."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fusedopt import doctor

from .device import Device
from .jobs import Job

ASKED = (
    "name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.limit", "temperature.gpu", "persistence_mode", "ecc.mode.current", "mig.mode.current",
)  # fmt: skip


def jobs(device: Device) -> Iterator[Job]:
    """One job with all facts that are known at once, and one that asks fusedopt whether it works."""
    yield Job("facts", partial(facts, device))
    yield Job("doctor", lambda: {"doctor": _anonymous(doctor.report())})


def facts(device: Device) -> dict[str, Any]:
    """Everything about the machine."""
    from .. import plot  # and matplotlib with it, which no other part needs

    smi = _nvidia_smi()
    versions = {"triton": _triton(), "nvrtc": _nvrtc(), "cuda": torch.version.cuda or "none"}
    driver = smi.get("driver_version", "none")
    compiler = f"NVRTC {versions['nvrtc']}, Triton {versions['triton']}, driver {driver}"
    columns = plot.facts() | {"device": device.name, "compiler": compiler}
    out: dict[str, Any] = {"columns": columns, "slug": device.slug, "versions": versions, "nvidia-smi": smi}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        out["properties"] = {k: str(getattr(properties, k)) for k in dir(properties) if not k.startswith("_")}
    return out


def _nvidia_smi() -> dict[str, str]:
    """Read-only questions; nothing where the driver cannot answer them."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stdout + done.stderr).strip()}
    return dict(zip(ASKED, done.stdout.strip().split(", "), strict=False))


def _triton() -> str:
    try:
        import triton
    except Exception as error:
        return f"none ({type(error).__name__})"
    return triton.__version__


def _nvrtc() -> str:
    try:
        from fusedopt.backends.cuda.nvrtc import nvrtc

        return nvrtc().version
    except Exception as error:
        return f"none ({type(error).__name__})"


def _anonymous(report: Any) -> Any:
    """The report without the user's folder, as results are published."""
    return json.loads(json.dumps(report, default=str).replace(str(Path.home()), "~"))
