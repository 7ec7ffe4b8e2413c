"""The system's C++ compiler: find it, run it, load what it made.

A kernel's key is a hash over everything that decides its machine code: source, which includes nothing, compiler and
version, flags, and, because of `-march=native`, the CPU's features. A home folder shared between different machines
therefore never hands one machine the other's instructions.
"""

from __future__ import annotations

import _ctypes
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .. import env
from . import cache, elf

# No contraction, so that every backend rounds alike; no errno and no traps, so that gcc vectorises.
# Never fast-math: it changes results.
NATIVE = "-march=native"
FLAGS = (
    "-std=c++17",
    "-O3",
    NATIVE,
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
)
# Kernels call the C library's functions and the compiler's own. Left alone, the compiler also has the linker read the
# C++ library, which takes longer than to link.
LIBRARIES = ("-nodefaultlibs", "-lm", "-lc", "-lgcc") if sys.platform == "linux" else ()
NOT_EVERYWHERE = {
    NATIVE: re.compile(r"march|mcpu|no such instruction|unsupported instruction"),
    LIBRARIES: re.compile(r"nodefaultlibs|-lgcc"),
}
"""Flags that some compilers refuse, or their assemblers and linkers do, and the words by which that is recognised."""
CANDIDATES = ("c++", "g++", "clang++")
TIMEOUT = 120.0  # seconds
GRACE = 0.5  # seconds
SHOWN_LINES = 20
FALLBACK = 'or use backend="reference", which compiles nothing'


class CompilerNotFound(cache.BuildError):
    """No C++ compiler works here."""


class CompileError(cache.BuildError):
    """The compiler failed on a kernel, or what it made cannot be loaded.

    name, source_path, command, output : the kernel, its source (kept), what was run, and all it said
    """

    def __init__(self, name: str, source_path: Path, command: str, what: str, output: str = "") -> None:
        self.name, self.source_path, self.command, self.output = name, source_path, command, output
        tail = "\n".join(f"    {line}" for line in output.strip().splitlines()[-SHOWN_LINES:])
        super().__init__(
            f"kernel {name!r}: {what}\n  command: {command}\n  source: {source_path}\n"
            + (f"  the compiler's last lines:\n{tail}\n" if tail else "")
            + f"  remedy: {_remedy(output)}, {FALLBACK}"
        )


def _remedy(output: str) -> str:
    if re.search(r"No space left|Disk quota exceeded", output):
        return "make room on the disk, of the cache folder or of temporary files"
    return "point CXX to a working g++ or clang++"


# ---------------------------------------------------------------- compiler and CPU


class Compiler(NamedTuple):
    """command: program and arguments (CXX may be "ccache g++"); path: the program; version: its words."""

    command: tuple[str, ...]
    path: str
    version: str

    def __str__(self) -> str:
        return f"{shlex.join(self.command)}: {self.version.splitlines()[0]}"


def compiler() -> Compiler:
    """The C++ compiler: `CXX` if set, else the first of c++, g++, clang++ that runs.

    Raises CompilerNotFound, with what was tried. Looked for once per value of CXX and PATH.
    """
    found = _find_compiler(env.cxx(), os.environ.get("PATH", ""))
    if isinstance(found, str):
        raise CompilerNotFound(found)
    return found


def compilers() -> list[Compiler]:
    """All that work here, the one that compiles kernels first."""
    names = dict.fromkeys(filter(None, (env.cxx(), *CANDIDATES)))
    found = (_find_compiler(name, os.environ.get("PATH", "")) for name in names)
    return list(dict.fromkeys(tool for tool in found if isinstance(tool, Compiler)))


@functools.lru_cache
def _find_compiler(cxx: str | None, search_path: str) -> Compiler | str:
    """The compiler, or the message that says there is none: that too is found out only once."""
    tried = []
    for candidate in (cxx,) if cxx else CANDIDATES:
        found = _try_compiler(candidate, search_path)
        if isinstance(found, Compiler):
            return found
        tried.append(f"{candidate}: {found}")
    where = "the environment variable CXX names no working compiler" if cxx else "no C++ compiler works here"
    remedy = "correct or unset CXX" if cxx else "install g++ (Debian, Ubuntu: `apt install g++`) or set CXX"
    return f"{where} ({'; '.join(tried)}). Remedy: {remedy}, {FALLBACK}."


def _try_compiler(line: str, search_path: str) -> Compiler | str:
    """The compiler behind a command line, or why it does not work."""
    try:
        command = tuple(shlex.split(line))
    except ValueError as error:
        return str(error)
    path = shutil.which(command[0], path=search_path) if command else None
    if path is None:
        return "not found"
    try:
        done = _run((path, *command[1:], "--version"), timeout=20.0)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode:
        return f"`--version` ended with status {done.returncode}: {' '.join(done.stdout.split())[:200]}"
    return Compiler(command, path, done.stdout.strip() or "version unknown")


class Cpu(NamedTuple):
    """model: its name; features: the instruction sets it has; digest: a hash of both, for keys."""

    model: str
    features: tuple[str, ...]
    digest: str


@functools.lru_cache(maxsize=1)
def cpu_features() -> Cpu:
    """Of this machine's first CPU, from /proc/cpuinfo; from `platform` where there is none."""
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:  # no further than the first CPU: Linux takes long to write about two hundred
            if not line.strip():
                break
            name, _, value = line.partition(":")
            facts[name.strip().lower()] = value.strip()
    model = facts.get("model name") or platform.processor() or platform.machine()
    features = tuple(sorted((facts.get("flags") or facts.get("features") or "").split()))
    # ARM has no model name but numbers for who made the core and which one it is.
    parts = [facts.get(f"cpu {part}", "") for part in ("family", "implementer", "part", "variant")]
    whole = [sys.platform, platform.machine(), model, facts.get("model", ""), *parts, *features]
    return Cpu(model, features, hashlib.sha256("\n".join(whole).encode()).hexdigest())


# ---------------------------------------------------------------- compiling


class Library:
    """A loaded kernel library. It is never unloaded, so addresses stay valid as long as the process lives."""

    def __init__(self, name: str, key: str, entry: cache.Entry, loaded: ctypes.CDLL) -> None:
        self.name, self.key, self.entry, self._loaded = name, key, entry, loaded

    def address(self, symbol: str) -> int:
        """Address of an `extern "C"` function. Raises AttributeError when there is none of that name."""
        return ctypes.cast(getattr(self._loaded, symbol), ctypes.c_void_p).value or 0

    @property
    def path(self) -> Path:
        return self.entry.path

    @property
    def source_path(self) -> Path:
        return self.entry.source_path

    @property
    def built(self) -> bool:
        """Whether this process compiled it, rather than found it in the cache."""
        return self.entry.built

    @property
    def seconds(self) -> float:
        """What compiling it, or finding it, took."""
        return self.entry.seconds

    def __repr__(self) -> str:
        how = "compiled" if self.built else "found"
        return f"<Library {self.path.name}, {how} in {self.seconds * 1e3:.1f} ms>"


_libraries: dict[str, Library] = {}
_failed: dict[str, CompileError] = {}  # by key, or an optimizer that fell back would compile again every step
_refused: set[tuple[str, str | tuple[str, ...]]] = set()  # paths of compilers, and which of those flags


def compile_library(
    name: str,
    source: str,
    *,
    symbols: Sequence[str] = (),
    key_parts: Sequence[str] = (),
) -> Library:
    """Compile C++ source into a loaded library, or find it in this process or in the cache.

    name : of the kernel, for files and messages
    symbols : the functions that it must have
    key_parts : more that the binary depends on, such as the renderer's version

    Raises CompilerNotFound, CompileError or cache.CacheError, all of them cache.BuildError. What failed once in
    this process fails again at once.
    """
    tool = compiler()
    code, key = library_keys(source, tool, key_parts)
    if key in _failed:
        raise _failed[key].with_traceback(None)
    library = _libraries.get(key)
    if library is None:
        env.debug(2, f"// kernel {cache.plain(name)}\n{source}")
        try:
            # Two threads may both get here; the cache makes one of them wait, and the first library stays.
            library = _libraries.setdefault(key, _load(name, key, code, source, symbols, tool))
        except CompileError as error:
            _failed[key] = error
            raise
        env.debug(3, f"{library!r} {library.entry.reason}\n{library.entry.log}".rstrip())
    return library


def without_comments(source: str) -> str:
    """The source without those comments to the end of a line of which one is sure, by which the code is recognised.

    Not after a quote, nor one that may go on in the next line, nor in sources with what may hide that there is none.
    """
    if "/*" in source or 'R"' in source:
        return source
    return "\n".join(_without_comment(line) if "//" in line else line for line in source.split("\n"))


def _without_comment(line: str) -> str:
    code, _, comment = line.partition("//")
    doubtful = '"' in code or "'" in code or "\\" in comment
    return line if doubtful else code.rstrip()


def library_keys(source: str, tool: Compiler, key_parts: Sequence[str]) -> tuple[str, str]:
    """sha256 over all that decides the machine code, and the entry's key, which is over the comments too.

    The key begins with the other's first digits, by which entries of the same code find each other.
    """
    parts = [*tool, *FLAGS, *LIBRARIES, cpu_features().digest, *key_parts]
    # repr keeps neighbours apart: ("ab", "c") and ("a", "bc") must differ.
    code, whole = (
        hashlib.sha256(repr([text, *parts]).encode()).hexdigest()
        for text in (without_comments(source), source)
    )
    return code, code[: cache.CODE_DIGITS] + whole[cache.CODE_DIGITS :]


def _load(name: str, key: str, code: str, source: str, symbols: Sequence[str], tool: Compiler) -> Library:
    def build(source_path: Path, out: Path) -> str:
        return _compile(name, tool, source_path, out)

    def entry(code: str) -> cache.Entry:
        meta = {"compiler": str(tool), "flags": " ".join((*FLAGS, *LIBRARIES)), "cpu": cpu_features().model}
        return cache.load_or_build(name, key, source, "so", build, meta=meta, code=code)

    for again in (True, False):
        found = entry(code if again else "")
        wrong = _unloadable(found.path, symbols)
        if not wrong:
            return Library(name, key, found, ctypes.CDLL(str(found.path)))
        # Nobody is to find it: not a compiler that has been mended, nor the next process. And one that is as it was
        # stored may be of no use here, as where another machine with an older C library shares the home folder.
        cache.discard(found)
        if found.built or not again:
            break
    raise CompileError(name, found.source_path, str(tool), f"cannot be loaded: {wrong}", found.log)


def _unloadable(path: Path, symbols: Sequence[str]) -> str:
    """What is wrong with a library, "" where nothing is."""
    try:
        cut_off = elf.missing(path)
        if cut_off:
            return cut_off
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        return str(error)
    lacking = [s for s in symbols if not hasattr(loaded, s)]
    if lacking and hasattr(_ctypes, "dlclose"):
        _ctypes.dlclose(loaded._handle)  # or whoever loads another one from this path is given this one
    return f"it has no {', '.join(lacking)}" if lacking else ""


def _compile(name: str, tool: Compiler, source_path: Path, out: Path) -> str:
    """Run the compiler; returns its command line and words. Raises CompileError."""
    flags = [flag for flag in FLAGS if (tool.path, flag) not in _refused]
    libraries = LIBRARIES if (tool.path, LIBRARIES) not in _refused else ()
    command = (*tool.command, *flags, str(source_path), "-o", str(out), *libraries)
    shown = shlex.join(command)
    try:
        done = _run((tool.path, *command[1:]), timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise CompileError(name, source_path, shown, f"the compiler took more than {TIMEOUT:.0f} s") from None
    except OSError as error:
        raise CompileError(name, source_path, shown, f"the compiler cannot be run: {error}") from error
    if done.returncode == 0:
        if not out.is_file():
            raise CompileError(name, source_path, shown, "the compiler made no file", done.stdout)
        return f"{shown}\n{done.stdout}"
    for flag, words in NOT_EVERYWHERE.items():
        if (tool.path, flag) not in _refused and words.search(done.stdout):
            _refused.add((tool.path, flag))
            return _compile(name, tool, source_path, out)
    raise CompileError(
        name, source_path, shown, f"the compiler ended with status {done.returncode}", done.stdout
    )


def _run(command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run with errors and output together, in English; kill it with its children when time is up.

    A compiler is a driver that starts others: killing it alone, also on Ctrl-C, would leave them at work.
    """
    with started(command) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException:
            _kill(process)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, "")


_starting = threading.RLock()
"""Held while a compiler is started. A process that another thread forks meanwhile would have the pipe open by which
the compiler's words come, and their end would be waited for until that process ends."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release
    )


def started(command: Sequence[str]) -> subprocess.Popen[str]:
    """A compiler at work, in English and in a group of its own."""
    with _starting:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C"},
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )


def _kill(process: subprocess.Popen[str]) -> None:
    """End it, and what it has started. It has a moment for that, in which compilers delete their temporary files."""
    with contextlib.suppress(OSError):
        if not hasattr(os, "killpg"):
            process.kill()
            return
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)
