"""`fusedopt doctor`: what is installed, which backends work, why the others do not, what to do.

`report()` finds out, `render()` prints it. What a backend needs is imported inside its probe, so that one
broken part is a line of the report and not the end of it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from . import __version__, env
from .compile import cache, toolchain

STEPS = 3
SHAPES = ((1,), (7,), (33, 5), (1024,), (3, 4, 2, 2))
DEFECT = "this is a defect in fusedopt: please report it"


class Status(NamedTuple):
    """Whether a part works; reason: how it was found to, or why it does not; remedy: what to do about it."""

    works: bool
    reason: str
    remedy: str = ""


# ---------------------------------------------------------------- backends


def probe_cpp() -> Status:
    """The system compiler makes a library that loads and runs here."""
    source = 'extern "C" int fusedopt_answer() { return 42; }\n'
    try:
        library = toolchain.compile_library("doctor", source, symbols=["fusedopt_answer"])
    except toolchain.CompilerNotFound as error:
        return Status(
            False,
            str(error),
            "correct or unset CXX" if env.cxx() else "install g++, or set CXX to a C++17 compiler",
        )
    except cache.CacheError as error:
        return Status(False, str(error), "set FUSEDOPT_CACHE_DIR to a folder of your own")
    except cache.BuildError as error:
        return Status(False, str(error), "point CXX to a working g++ or clang++")
    import ctypes

    answer = ctypes.CFUNCTYPE(ctypes.c_int)(library.address("fusedopt_answer"))()
    if answer != 42:
        return Status(
            False, f"a compiled function returned {answer} instead of 42", "set CXX to another compiler"
        )
    return Status(True, "compiles and runs")


def probe_reference() -> Status:
    """Plain torch operations need nothing more."""
    return Status(True, "plain torch operations, one parameter after another")


def probe_triton() -> Status:
    """Triton is there, and torch finds a GPU for it."""
    if importlib.util.find_spec("triton") is None:
        return Status(False, "triton is not installed", "pip install 'fusedopt[triton]'")
    if not torch.cuda.is_available():
        return Status(False, "torch finds no GPU", "use it where torch.cuda.is_available()")
    return Status(True, "triton is installed, and torch finds a GPU")


def probe_cuda() -> Status:
    """The extension opens the driver, and it has a GPU that torch and NVRTC know."""
    from .backends.cuda.backend import Cuda

    try:
        found = Cuda().describe()
    except cache.BuildError as error:
        reason, _, remedy = str(error).partition(". Remedy: ")
        return Status(False, reason, remedy)
    if not torch.cuda.is_available():
        return Status(False, f"torch finds no GPU ({found})", "install a build of torch for CUDA")
    return Status(True, found)


# Name of each backend -> what finds out whether it can work here. A new backend adds its line.
PROBES: dict[str, Callable[[], Status]] = {
    "cpp": probe_cpp,
    "cuda": probe_cuda,
    "triton": probe_triton,
    "reference": probe_reference,
}
DEVICES = {"cuda": "cuda", "triton": "cuda"}  # the others are tested on the CPU


def check_backend(name: str) -> Status:
    """Probe a backend, and if it can work, let it prove so in a self-test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cache.CacheWarning)  # the report has a line for the cache
            status = PROBES[name]()
            if not status.works:
                return status
            tested = self_test(name)
            return tested._replace(reason=f"{tested.reason}; {status.reason}") if tested.works else tested
    except Exception as error:  # whatever it is belongs in the report
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(place.filename)}:{place.lineno}"
        told = str(error) in _environment()["problems"]  # which the report names by itself
        return Status(False, f"{type(error).__name__}: {error} ({where})", "" if told else DEFECT)


def self_test(name: str) -> Status:
    """A few steps of Adam: this backend must come as near to a float64 run as the reference does.

    error <= max(2 * the reference's error, 2 ulp) for each tensor. Equal bits cannot be asked for: the vectorised
    loops of torch's own `add(alpha=)` and `addcmul` fuse multiply and add, and fusedopt never does.
    """
    start = time.perf_counter()
    device = DEVICES.get(name, "cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mine, used, eager = _train(name, device)
    said = [str(w.message) for w in caught if not issubclass(w.category, cache.CacheWarning)]
    if used != name:
        return Status(
            False, f"fell back to {used}: {' '.join(said)}", "see the reason, then run doctor again"
        )
    if eager:
        return Status(False, f"ran callbacks without fusing them: {' '.join(eager)}", DEFECT)
    reference, _, _ = _train("reference", device)
    truth, _, _ = _train("reference", device, "float64")
    worst = max(map(_distance, mine, reference))
    if not all(map(_near, mine, reference, truth)):
        return Status(False, f"{STEPS} steps of Adam differ from the reference by {worst:.2g}", DEFECT)
    seconds = time.perf_counter() - start
    return Status(True, f"{STEPS} steps of Adam agree with the reference to {worst:.2g} ({seconds:.2f} s)")


def _near(mine: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor) -> bool:
    ulp = 2.0**-23 * float(truth.abs().max())
    return _distance(mine, truth) <= max(2 * _distance(reference, truth), 2 * ulp)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference between two tensors; infinite where there is a NaN, which equals nothing."""
    return float((a.double() - b.double()).abs().nan_to_num(nan=float("inf")).max())


def _train(backend: str, device: str, dtype: str = "float32") -> tuple[list[torch.Tensor], str, list[str]]:
    """Parameters after a few steps, the backend that was used, and what it ran eagerly and why."""
    from . import callbacks as cb
    from .optimizer import Optimizer

    random = torch.Generator().manual_seed(0)

    def noise(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(device, getattr(torch, dtype))

    params = [torch.nn.Parameter(noise(shape)) for shape in SHAPES]
    moments = [partial(cb.average_grad, dampening=True), cb.average_sqr_grad, cb.step_stat]
    adam = [cb.weight_decay, *moments, cb.adam_step]
    opt = Optimizer(params, adam, backend=backend, lr=0.01, mom=0.9, sqr_mom=0.99, eps=1e-5, wd=0.01)
    for _ in range(STEPS):
        for param in params:
            param.grad = noise(param.shape)
        opt.step()
    explained = opt.explain()
    eager = [] if backend == "reference" else [str(callback) for callback in explained.eager]
    return [param.detach() for param in params], explained.backend, eager


# ---------------------------------------------------------------- the rest of the machine


def report() -> dict[str, Any]:
    """All findings, as plain values that can be written as JSON."""
    found: dict[str, Any] = {
        "versions": _versions(),
        "environment": _environment(),
        "compiler": _compiler()._asdict(),
        "cpu": _cpu(),
        "cache": _cache(),
        "gpus": _gpus(),
        "extension": _extension()._asdict(),
        "backends": {name: check_backend(name)._asdict() for name in PROBES},
    }
    works = any(status["works"] for name, status in found["backends"].items() if name != "reference")
    return {**found, "works": works, "next": _next(found)}


def _versions() -> dict[str, str]:
    """Of everything that decides what fusedopt does; "not installed" for what is not there."""
    versions = {"python": platform.python_version(), "fusedopt": __version__}
    for package in ("torch", "numpy", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _environment() -> dict[str, Any]:
    """The variables that are set, and what is wrong with their values."""
    names = ("FUSEDOPT_BACKEND", "FUSEDOPT_CACHE_DIR", "FUSEDOPT_DEBUG", "CXX")
    problems = []
    for read in (env.backend, env.debug_level):
        try:
            read()
        except ValueError as error:
            problems.append(str(error))
    return {"set": {name: os.environ[name] for name in names if name in os.environ}, "problems": problems}


def _compiler() -> Status:
    try:
        return Status(True, str(toolchain.compiler()))
    except toolchain.CompilerNotFound as error:
        return Status(False, str(error))


def _cpu() -> dict[str, Any]:
    return {
        "model": toolchain.cpu_features().model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _cache() -> dict[str, Any]:
    problem = cache.prepare(cache.configured())
    stored = cache.entries()
    return {
        "folder": str(cache.configured()),
        "usable": problem is None,
        "reason": problem.reason if problem else "",
        "remedy": problem.remedy if problem else "",
        "kernels": len(stored),
        "bytes": sum(entry.size for entry in stored),
    }


def _gpus() -> list[str]:
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old driver warns; what counts is that there is nothing to use
        if torch.cuda.is_available():
            return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return []


def _extension() -> Status:
    try:
        from .extension import leaf

        if leaf.native is None:
            env.logger.info("fusedopt: looking for the C++ extension, or building it: up to a minute")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report has a line for it
            leaf.seek(wait=True)
    except Exception as error:
        return Status(False, f"{type(error).__name__}: {error}")
    return Status(*leaf.extension_status())


def _next(found: dict[str, Any]) -> list[str]:
    """What the user could do, most useful first."""
    todo = list(found["environment"]["problems"])
    compiles = found["compiler"]["works"]
    for name, status in found["backends"].items():
        for_compiler = (
            not compiles and "C++ extension" in status["reason"]
        )  # a compiler is all that it needs first
        if status["remedy"] and not for_compiler:
            todo.append(f"{name}: {status['remedy']}")
    if not found["cache"]["usable"]:
        todo.append(f"cache: {found['cache']['remedy']}")
    if not found["extension"]["works"]:
        why = found["extension"]["reason"] if compiles else "it is built once there is a compiler"
        todo.append(f"extension: fusedopt works without it, only slower ({why})")
    return todo


# ---------------------------------------------------------------- printing


def render(found: dict[str, Any]) -> str:
    """The report for people."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    cpu, store = found["cpu"], found["cache"]
    usable = "usable" if store["usable"] else f"{store['reason']}; a temporary folder is used instead"
    lines = [
        _line("versions", versions),
        _line("compiler", found["compiler"]["reason"]),
        _line("CPU", f"{cpu['model']}, {cpu['cores']} cores, torch uses {cpu['threads']} threads"),
        _line("GPUs", ", ".join(found["gpus"]) or "none that torch can use"),
        _line(
            "cache",
            f"{store['folder']}: {usable}; {store['kernels']} kernels, {store['bytes'] / 1024:.0f} KiB",
        ),
        _line(
            "extension",
            ("in use: " if found["extension"]["works"] else "not in use: ") + found["extension"]["reason"],
        ),
        *(_line(name, value) for name, value in found["environment"]["set"].items()),
        "",
        "backends",
    ]
    for name, status in found["backends"].items():
        lines.append(_line(name, ("works: " if status["works"] else "") + status["reason"]))
    lines += ["", "next", *(f"  - {text}" for text in found["next"] or ["nothing to do"])]
    return "\n".join(lines)


def _line(name: str, text: str) -> str:
    return f"  {name:<11} " + text.replace("\n", "\n" + " " * 14)


def main(as_json: bool = False) -> int:
    """Print the report. Exit status 0 when at least one compiled backend works, 1 otherwise."""
    found = report()
    print(json.dumps(found, indent=2) if as_json else render(found))
    return 0 if found["works"] else 1
