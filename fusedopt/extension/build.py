"""Finds, loads and, if the install came without it, builds the extension `fusedopt._C`.

It must be compiled against the torch that it runs with, and many ways of installing keep torch away from builds. So
where it is missing, or is of another torch, it is compiled once into the compile cache, by the compiler that kernels
need anyway. That takes about half a minute, in a thread of its own; steps take the Python way until it is done.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import threading
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch

from .. import env
from ..compile import cache, toolchain
from . import recipe

NAME = "fusedopt._C"
PACKAGE = Path(__file__).parents[1]
PATIENCE = 1.0  # seconds that the first step waits: finding an earlier build in the cache takes less
LAST = 3
"""The step that waits for the extension to be built; those before it go on in Python."""
TIMEOUT = 600.0  # seconds for the compiler, which shares the machine with a training


# ---------------------------------------------------------------- what was installed


def library() -> Path | None:
    """The file of the extension in this package, and not one that another checkout has installed."""
    spec = PathFinder.find_spec(NAME, [str(PACKAGE)])
    return Path(spec.origin) if spec and spec.origin else None


def built_for(path: Path) -> str | None:
    """The torch version compiled into the extension (`fusedopt_built_for_torch` in csrc/module.cpp)."""
    found = re.search(rb"fusedopt built for torch ([^\0]+)\0", path.read_bytes())
    return found[1].decode() if found else None


def load_installed() -> tuple[ModuleType | None, str]:
    """The extension that was installed, or None; and the reason in words."""
    found = library()
    if found is None:
        return None, f"{NAME} is not installed"
    version = built_for(found)
    if version != torch.__version__:
        return None, f"{NAME} was built for torch {version}, and this is torch {torch.__version__}"
    try:
        return importlib.import_module(NAME), f"built for torch {version}"
    except ImportError as error:
        return None, f"{NAME} does not load: {error}"


def remedy() -> str:
    """What to type to have the extension from the start, by the way in which fusedopt was installed."""
    tools = "" if _has_build_tools() else "pip install --upgrade setuptools && "
    return f"{tools}pip install --no-build-isolation {_what_to_install()}"


def _has_build_tools() -> bool:
    """Whether there is a setuptools that setup.py accepts: a new environment has an old one, or none."""
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= recipe.SETUPTOOLS
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False


def _what_to_install() -> str:
    tree = PACKAGE.parent
    if (tree / "setup.py").is_file() and (tree / "csrc").is_dir():
        return f"-e {shlex.quote(str(tree))}"
    again = "--force-reinstall --no-deps --no-cache-dir"
    try:
        origin = json.loads(importlib.metadata.distribution("fusedopt").read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        origin = {}
    url = origin.get("url", "")
    if not url or url.endswith(".whl"):  # from an index, which has it for no torch in particular
        return f"{again} --no-binary fusedopt fusedopt"
    if "vcs_info" in origin:
        url = f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    return f"{again} {shlex.quote(url.removeprefix('file://'))}"


# ---------------------------------------------------------------- what can be built


def sources() -> Path:
    """The folder csrc/: in the package, or beside it in a source tree."""
    inside = PACKAGE / "csrc"
    return inside if inside.is_dir() else PACKAGE.parent / "csrc"


def why_not() -> str:
    """Why the extension cannot be built here, with the remedy; "" if it can be tried."""
    if NAME in sys.modules and sys.modules[NAME] is None:  # Python's way to forbid an import
        return f"sys.modules forbids importing {NAME}. Remedy: take that entry away"
    if not (sources() / recipe.SOURCE).is_file():
        return f"its source {recipe.SOURCE} was not installed. Remedy: {remedy()}"
    python = Path(sysconfig.get_path("include"), "Python.h")
    if not python.is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"Python's headers are missing ({python}). Remedy: `apt install python{version}-dev`, or alike"
    headers, _ = recipe.torch_folders()
    if not (headers / "torch").is_dir():
        return f"torch's headers are missing ({headers}). Remedy: install torch from its wheels"
    try:
        toolchain.compiler()
    except toolchain.CompilerNotFound as error:
        return str(error).rstrip(".")
    return ""


class Build:
    """Builds the extension in a thread of its own, or finds it in the cache. ``done``, then ``path`` or ``error``."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.path: Path | None = None
        self.error = ""
        self._pid = os.getpid()
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False
        cache.folder()  # here, where a warning about it can be seen
        self._thread = threading.Thread(target=self._run, name="fusedopt-extension", daemon=True)
        atexit.register(self.stop)
        self._thread.start()

    def stop(self) -> None:
        """At exit: nobody waits for a compiler whose work nobody will use, and nothing of it stays behind."""
        self._stopped = True
        if os.getpid() == self._pid and self._thread.is_alive():  # a forked child runs our exit handlers too
            if self._process is not None:
                toolchain._kill(self._process)
            self._thread.join(2.0)

    def _run(self) -> None:
        try:
            self.path = self._build().path
        except Exception as error:  # whatever it is, steps go on without the extension and say so
            self.error = str(error) or type(error).__name__
        finally:
            self.done.set()

    def _build(self) -> cache.Entry:
        """By the first compiler that can: not each that compiles kernels knows C++20 or has a library for it."""
        source = (sources() / recipe.SOURCE).read_text(encoding="utf-8")
        problems: list[str] = []
        for tool in toolchain.compilers():
            try:
                return cache.load_or_build(
                    "extension",
                    key(tool),
                    source,
                    "so",
                    lambda _, out, tool=tool: self._compile(tool, out),  # type: ignore[misc]
                    meta={"compiler": str(tool)},
                )
            except toolchain.CompileError as error:
                problems.append(str(error))
                if self._stopped:
                    break
        raise cache.BuildError("\n".join(problems))

    def _compile(self, tool: toolchain.Compiler, out: Path) -> str:
        source = sources() / recipe.SOURCE
        command = recipe.command([tool.path, *tool.command[1:]], source, out)
        if self._stopped:
            raise toolchain.CompileError("extension", source, shlex.join(command), "stopped")
        with toolchain.started(command) as self._process:
            if self._stopped:  # between the start and its being known here: nobody has killed it
                toolchain._kill(self._process)
            try:
                output, _ = self._process.communicate(timeout=TIMEOUT)
            except subprocess.TimeoutExpired:
                output = f"took more than {TIMEOUT:.0f} s"
                toolchain._kill(self._process)
        if self._process.returncode or not out.is_file():
            what = f"the compiler ended with status {self._process.returncode}"
            raise toolchain.CompileError("extension", source, shlex.join(command), what, output)
        return output


def key(tool: toolchain.Compiler) -> str:
    """sha256 over all that decides the machine code."""
    files = sorted(sources().glob("*.*"))
    headers, _ = recipe.torch_folders()
    parts = [
        *((file.name, file.read_text(encoding="utf-8")) for file in files if file.suffix in (".cpp", ".h")),
        *tool,
        *recipe.FLAGS,
        sorted(recipe.macros().items()),
        (torch.version.git_version, str(headers), sysconfig.get_config_var("EXT_SUFFIX")),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def load(path: Path) -> ModuleType:
    """Load a file as the module fusedopt._C. Raises ImportError."""
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return module


# ---------------------------------------------------------------- what was missing


class Missing:
    """An extension that did not come with the install: why, and what has become of it since.

    ``seek`` starts looking for it, and says so once; ``take`` has the module as soon as there is one.
    """

    def __init__(self, why: str) -> None:
        self.why = why
        self._build: Build | None = None
        self._module: ModuleType | None = None
        self._over = False
        self._steps = 0
        self._said: set[str] = set()
        self._reset()
        if hasattr(os, "register_at_fork"):  # a forked child has none of the threads
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        if self._build is not None and not self._build.done.is_set():
            self._build = None

    @property
    def reason(self) -> str:
        """Why it is not in use, or what is being done about that, and what to type."""
        if self._over:
            return self.why
        if self._build is None and (problem := why_not()):
            return f"{self.why}, and cannot be built: {problem}"
        doing = "it is being built in the background" if self._build else "it is built in the first step"
        return f"{self.why}; {doing}. To have it from the start: {remedy()}"

    def seek(self, wait: bool = False) -> ModuleType | None:
        """Look for it in the cache, else have it built. Warns if that takes time, or cannot be. ``wait``: till then."""
        if self._over:
            return None
        with self._lock:
            if self._build is None:
                if problem := why_not():
                    self._give_up(f"cannot be built: {problem}")
                    return None
                self._build = Build()
            build = self._build
        build.done.wait(0 if self._said else PATIENCE)
        if not build.done.is_set():
            until = "this step waits for it" if wait else f"step {LAST} waits for what is left of that"
            env.warn_once(
                self._said,
                "built",
                f"{self.why}, so it is being built in the background, once, which takes about half a minute; {until}. "
                f"If this process ends before that: python -m fusedopt doctor. To have it from the start: {remedy()}",
            )
            build.done.wait(None if wait else 0)
        return self._taken()

    def take(self) -> ModuleType | None:
        """The module, once it is there. Asked in every step without it, so this costs next to nothing.

        The third step waits: short runs would never have it, and pay for it every time.
        """
        self._steps += 1
        if self._build is None:  # as in a forked child
            return self.seek()
        if self._steps == LAST:
            self._build.done.wait()
        return self._taken()

    def _taken(self) -> ModuleType | None:
        if self._over or self._build is None or not self._build.done.is_set():
            return None
        with self._lock:
            if self._build.path is None:
                self._give_up(f"could not be built: {self._build.error}")
                return None
            try:
                self._module = self._module or load(self._build.path)  # two threads may get here
                return self._module
            except ImportError as error:
                with contextlib.suppress(OSError):
                    self._build.path.unlink()  # so that the next process builds it anew
                self._give_up(f"was built and does not load: {error}")
                return None

    def _give_up(self, problem: str) -> None:
        self._over = True
        self.why = f"{self.why}, and {problem}; steps are slower without it. To install it: {remedy()}"
        env.warn_once(self._said, "over", self.why)
