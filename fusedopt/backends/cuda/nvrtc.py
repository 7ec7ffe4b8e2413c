"""CUDA C++ to a cubin by NVIDIA's runtime compiler, through the package cuda-core: neither nvcc nor a GPU is needed.

A kernel's key is a hash over its source, the architecture, the options and NVRTC's version.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ... import env
from ...compile import cache

# No contraction, IEEE division and root, subnormal numbers kept: every backend rounds alike. Never fast-math.
OPTIONS = {
    "std": "c++17",
    "fma": False,
    "prec_div": True,
    "prec_sqrt": True,
    "ftz": False,
    "device_as_default_execution_space": True,  # else NVRTC 12 and 13.0 take lambdas for the host's
    "ptxas_options": ["-v"],  # registers and spills, for the log
}
OLDEST = 12, 3
"""The first that has all that the kernels are written with."""
INSTALL = 'install them with `pip install "fusedopt[cuda]"`'
FALLBACK = 'or use backend="triton" or backend="reference", which need no NVRTC'
SHOWN_LINES = 20


class NvrtcNotFound(cache.BuildError):
    """cuda-core or NVRTC is not installed, or does not load."""


class UnsupportedArch(cache.BuildError):
    """This NVRTC does not compile for that GPU architecture."""


class NvrtcError(cache.BuildError):
    """NVRTC failed on a kernel.

    name, source_path, output : the kernel, its source (kept), and all that NVRTC said
    """

    def __init__(self, name: str, source_path: Path, arch: str, output: str) -> None:
        self.name, self.source_path, self.output = name, source_path, output
        tail = "\n".join(f"    {line}" for line in output.strip().splitlines()[:SHOWN_LINES])
        super().__init__(
            f"kernel {name!r}: NVRTC does not compile it for {arch}\n  source: {source_path}\n"
            f"  its first words:\n{tail}\n  remedy: {FALLBACK.removeprefix('or ')}"
        )


class Nvrtc(NamedTuple):
    """version: NVRTC's; archs: the architectures it compiles for; compile: source to cubin, and what was said."""

    version: str
    archs: tuple[str, ...]
    compile: Callable[[str, str, str], tuple[bytes, str]]


def nvrtc() -> Nvrtc:
    """The compiler. Raises NvrtcNotFound, with the reason. Looked for once."""
    found = _find()
    if isinstance(found, str):
        raise NvrtcNotFound(found)
    return found


@functools.lru_cache(maxsize=1)
def _find() -> Nvrtc | str:
    """The compiler, or the message that says there is none."""
    try:
        from cuda.bindings import nvrtc as bindings
        from cuda.core import Program, ProgramOptions

        version = _checked(bindings.nvrtcVersion())
        archs = tuple(f"sm_{number}" for number in _checked(bindings.nvrtcGetSupportedArchs())[0])
    except Exception as error:  # a library that is not there or too old is reported in many ways
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return f"cuda-core with NVRTC does not work here ({reason}). Remedy: {INSTALL}, {FALLBACK}."
    if tuple(version) < OLDEST:
        return (
            f"NVRTC {'.'.join(map(str, version))} is here, and kernels need {'.'.join(map(str, OLDEST))} or later. "
            f"Remedy: `pip install --upgrade nvidia-cuda-nvrtc`, {FALLBACK}."
        )

    def compile(name: str, source: str, arch: str) -> tuple[bytes, str]:
        options = ProgramOptions(name=f"{cache.plain(name)}.cu", arch=arch, **OPTIONS)
        log = io.StringIO()
        program = Program(source, "c++", options)
        try:
            code = bytes(program.compile("cubin", logs=log).code)
        finally:
            program.close()
        return code, _clean(log.getvalue())

    return Nvrtc(".".join(map(str, version)), archs, compile)


def _checked(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    status, *values = answer
    if int(status):
        raise RuntimeError(str(status))
    return tuple(values)


def _clean(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.replace("\0", "").splitlines() if line.strip())


_failed: dict[str, NvrtcError] = {}  # by key, or an optimizer that fell back would compile again every step


def compile_cubin(name: str, source: str, arch: str, *, key_parts: Sequence[str] = ()) -> cache.Entry:
    """Compile CUDA C++ into a cubin for an architecture such as "sm_90", or find it in the cache.

    name : of the kernel, for files and messages
    key_parts : more that the binary depends on, such as the renderer's version

    The entry's ``log`` has each function's registers and spills. Raises NvrtcNotFound, UnsupportedArch, NvrtcError or
    cache.CacheError, all of them cache.BuildError. What failed once in this process fails again at once.
    """
    tool = nvrtc()
    _check_arch(tool, arch)
    key = cubin_key(source, arch, tool, key_parts)
    if key in _failed:
        raise _failed[key].with_traceback(None)
    env.debug(2, f"// kernel {cache.plain(name)}\n{source}")

    def build(source_path: Path, out: Path) -> str:
        try:
            code, log = tool.compile(name, source, arch)
        except Exception as error:
            _failed[key] = NvrtcError(name, source_path, arch, _clean(str(error)))
            raise _failed[key] from error
        out.write_bytes(code)
        return log

    meta = {"compiler": f"NVRTC {tool.version}", "arch": arch, "flags": str(OPTIONS)}
    entry = cache.load_or_build(name, key, source, "cubin", build, source_suffix="cu", meta=meta)
    env.debug(3, f"{entry.path.name} {entry.reason}\n{entry.log}".rstrip())
    return entry


def cubin_key(source: str, arch: str, tool: Nvrtc, key_parts: Sequence[str]) -> str:
    """sha256 over all that decides the machine code."""
    parts = [source, arch, tool.version, sorted(OPTIONS.items()), *key_parts]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _check_arch(tool: Nvrtc, arch: str) -> None:
    base = re.fullmatch(r"(sm_\d+)[af]?", arch)
    if base is None or base[1] not in tool.archs:
        raise UnsupportedArch(
            f"NVRTC {tool.version} does not compile for {arch!r}; it does for {', '.join(tool.archs)}. "
            f"Remedy: install another version of nvidia-cuda-nvrtc, {FALLBACK}."
        )
