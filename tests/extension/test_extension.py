"""The extension where the install came without it: it is built once where it runs, and taken; or it is said why not."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import ends, needs_extension

import fusedopt.optim
from fusedopt import backends
from fusedopt.compile import cache, toolchain
from fusedopt.extension import build as extension
from fusedopt.extension import leaf, recipe

ROOT = Path(__file__).parents[2]
REAL = next(filter(shutil.which, toolchain.CANDIDATES), "false")
WHY = "fusedopt._C is not installed"
LIBRARY = leaf.native and leaf.native.__file__  # in a tree that nobody installed it is in the cache

# A compiler that leaves kernels to the real one. Asked for the extension, it does some work and copies a library.
COMPILER = """#!/bin/sh
case "$*" in *--version*) echo fake 1.0; exit 0;; *module.cpp*) ;; *) exec {real} "$@";; esac
echo "$$ $*" >> {calls}
{work}
while [ "$1" != -o ]; do shift; done
cp {library} "$2"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def compiler(folder, monkeypatch):
    """Makes CXX, and the only compiler there is, one that does this and then hands over the built extension."""

    def use(work=":", library=None):
        program = folder / "c++"
        library = library or LIBRARY
        program.write_text(COMPILER.format(real=REAL, calls=folder / "calls", work=work, library=library))
        program.chmod(0o700)
        monkeypatch.setenv("CXX", str(program))
        monkeypatch.setattr(toolchain, "CANDIDATES", ())
        return lambda: (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []

    return use


@pytest.fixture
def missing(monkeypatch):
    """As in a process whose install has no extension. What is loaded here is another copy than the process's own."""
    monkeypatch.setitem(sys.modules, extension.NAME, sys.modules.get(extension.NAME) or ModuleType("_C"))
    monkeypatch.setattr(extension, "PATIENCE", 20.0)
    found = extension.Missing(WHY)
    monkeypatch.setattr(leaf, "native", None)
    monkeypatch.setattr(leaf, "_missing", found)
    monkeypatch.setattr(leaf, "_reason", WHY)
    for name in ("write_pointers", "run_cpu", "bump_versions"):
        monkeypatch.setattr(leaf, name, getattr(leaf.python, name))
    return found


def optimizer():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return fusedopt.optim.SGD([p], lr=0.1)


def said(act):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in caught]


# -- What was installed


def library_of(monkeypatch, version):
    monkeypatch.setattr(extension, "library", lambda: Path("_C.so"))
    monkeypatch.setattr(extension, "built_for", lambda path: version)


def test_an_extension_of_another_torch_is_not_loaded(monkeypatch):
    library_of(monkeypatch, "1.0.0")
    module, reason = extension.load_installed()
    assert module is None
    assert reason == f"fusedopt._C was built for torch 1.0.0, and this is torch {torch.__version__}"


def test_an_extension_that_does_not_load_is_reported(monkeypatch):
    def refuse(name):
        raise ImportError("undefined symbol: gone")

    library_of(monkeypatch, torch.__version__)
    monkeypatch.setattr(extension.importlib, "import_module", refuse)
    assert extension.load_installed() == (None, "fusedopt._C does not load: undefined symbol: gone")


def test_no_extension_is_a_reason(monkeypatch):
    monkeypatch.setattr(extension, "library", lambda: None)
    assert extension.load_installed() == (None, WHY)


def test_the_version_is_read_without_loading(tmp_path):
    library = tmp_path / "_C.so"
    library.write_bytes(b"\x7fELF..fusedopt built for torch 2.99.0+cpu\0..")
    assert extension.built_for(library) == "2.99.0+cpu"
    library.write_bytes(b"something else")
    assert extension.built_for(library) is None


# -- Built where it runs


@needs_extension
def test_a_step_has_it_built_and_takes_it(missing, compiler):
    calls = compiler()
    opt = optimizer()
    assert said(opt.step) == []  # this compiler is fast
    assert leaf.native is not None and leaf.run_cpu is leaf.native.run_cpu
    opt.step()
    assert opt.engine.bound
    assert leaf.extension_status() == (True, f"built for torch {torch.__version__} where it runs")
    assert opt.explain().extension == ""
    (build,) = calls()
    for flag in recipe.FLAGS:
        assert flag in build


@needs_extension
def test_it_is_built_once_for_all_processes(missing, compiler):
    calls = compiler()
    assert leaf.seek()
    again = extension.Missing(WHY)
    assert again.seek() is not None
    assert len(calls()) == 1
    (entry,) = [e for e in cache.entries() if e.stem.startswith("extension_")]
    assert entry.meta["compiler"].endswith("fake 1.0")


@needs_extension
def test_while_it_is_built_two_steps_go_on_and_the_third_waits_as_is_said(
    missing, compiler, folder, monkeypatch
):
    gate = folder / "gate"
    compiler(f"while [ ! -e {gate} ]; do sleep 0.05; done")
    monkeypatch.setattr(extension, "PATIENCE", 0.0)
    opt = optimizer()
    (text,) = said(lambda: [opt.step() for _ in range(2)])
    for part in (WHY, "being built in the background", "step 3 waits", "pip install", "doctor"):
        assert part in text
    assert leaf.native is None
    explained = str(opt.explain())
    assert "without the C++ extension: fusedopt._C is not installed; it is being built" in explained
    assert "pip install" in explained
    threading.Timer(0.3, gate.touch).start()
    assert said(opt.step) == [] and leaf.native is not None
    assert said(lambda: [opt.step() for _ in range(2)]) == []
    assert leaf.native is not None and opt.engine.bound
    torch.testing.assert_close(opt.param_groups[0]["params"][0].data, torch.full((3,), 0.5))


@needs_extension
def test_who_cannot_do_without_it_waits_and_is_told(missing, compiler, monkeypatch):
    compiler("sleep 0.3")
    monkeypatch.setattr(extension, "PATIENCE", 0.0)
    (text,) = said(lambda: leaf.seek(wait=True))
    assert "this step waits for it" in text and leaf.native is not None


def test_a_compiler_that_fails_is_said_once_and_steps_go_on(missing, compiler):
    calls = compiler(
        'case "$*" in *module.cpp*) echo "error: C++20 is too new"; exit 1;; esac', library="/bin/true"
    )
    (text,) = said(lambda: [leaf.seek(), leaf.seek(), leaf.available()])
    for part in (WHY, "could not be built", "error: C++20 is too new", "pip install"):
        assert part in text
    assert len(calls()) == 1 and leaf.native is None
    assert "C++20 is too new" in leaf.extension_status()[1]


def test_another_compiler_is_tried_where_the_first_one_fails(missing, compiler, folder, monkeypatch):
    calls = compiler("exit 1", library="/bin/true")
    second = folder / "second"
    second.write_text((folder / "c++").read_text().replace("exit 1", ":"))
    second.chmod(0o700)
    monkeypatch.setattr(toolchain, "CANDIDATES", (str(second),))
    build = extension.Build()
    assert build.done.wait(60) and build.path.read_bytes() == Path("/bin/true").read_bytes()
    assert len(calls()) >= 2


def test_a_library_that_does_not_load_is_said_and_built_anew_next_time(missing, compiler, folder):
    wrong = folder / "wrong.so"
    wrong.write_bytes(b"not a library")
    compiler(library=wrong)
    (text,) = said(leaf.seek)
    assert "was built and does not load" in text
    assert not list((folder / "cache").glob("extension_*.so"))


def test_a_warning_that_is_an_error_leaves_parameters_as_they_were(missing, nothing_compiled, monkeypatch):
    monkeypatch.setattr(extension, "why_not", lambda: "there is no such thing here")
    opt = optimizer()
    with warnings.catch_warnings(), pytest.raises(RuntimeWarning, match="no such thing"):
        warnings.simplefilter("error")
        opt.step()
    assert opt.param_groups[0]["params"][0].tolist() == [1, 1, 1]
    assert said(opt.step) == []
    assert "no such thing here" in str(opt.explain())


def test_the_reference_wants_none(missing, monkeypatch):
    monkeypatch.setattr(extension, "Build", None)
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = fusedopt.optim.SGD([p], lr=0.1, backend="reference")
    assert said(opt.step) == [] and "_C" not in str(opt.explain())


# -- Why it cannot be built


def no_compiler():
    raise toolchain.CompilerNotFound("no C++ compiler works here. Remedy: install g++.")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.setitem(sys.modules, extension.NAME, None), "sys.modules forbids importing fusedopt._C"),
        (lambda m: m.setattr(extension, "sources", lambda: Path("gone")), "module.cpp was not installed"),
        (lambda m: m.setattr(extension.sysconfig, "get_path", lambda n: "/gone"), "Python's headers.*-dev"),
        (lambda m: m.setattr(recipe, "torch_folders", lambda: (Path("/gone"), None)), "torch's headers"),
        (lambda m: m.setattr(toolchain, "compiler", no_compiler), "no C.. compiler works.*install g"),
    ],
    ids=["forbidden", "no sources", "no Python.h", "no torch headers", "no compiler"],
)
def test_what_is_missing_is_said_once_with_what_to_type(change, reason, missing, monkeypatch):
    with monkeypatch.context() as patch:
        change(patch)
        (text,) = said(lambda: [leaf.seek(), leaf.seek(), leaf.available()])
    assert re.search(reason, text)
    assert "pip install --" in text
    assert leaf.extension_status() == (False, text.removeprefix("fusedopt: "))


def test_without_a_compiler_nothing_is_compiled_and_explain_says_what_is_missing(
    missing, nothing_compiled, folder, monkeypatch
):
    """Not even kernels are, so the warning is about them; the remedy is the same."""
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    opt = optimizer()
    (text,) = said(lambda: [opt.step() for _ in range(2)])
    explained = str(opt.explain())
    assert "apt install g++" in text and "apt install g++" in explained
    assert "fusedopt._C is not installed, and cannot be built: no C++ compiler works here" in explained


# -- What to type


def installed(monkeypatch, tmp_path, origin, setuptools="80.1"):
    monkeypatch.setattr(extension, "PACKAGE", tmp_path / "site" / "fusedopt")
    text = None if origin is None else json.dumps(origin)
    monkeypatch.setattr(
        importlib.metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text)
    )
    monkeypatch.setattr(importlib.metadata, "version", lambda name: setuptools)
    return extension.remedy()


AGAIN = "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir"


@pytest.mark.parametrize(
    ("origin", "remedy"),
    [
        (None, f"{AGAIN} --no-binary fusedopt fusedopt"),
        ({"url": "file:///home/me/my code", "dir_info": {}}, f"{AGAIN} '/home/me/my code'"),
        (
            {"url": "https://host/fusedopt", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            f"{AGAIN} git+https://host/fusedopt@abc",
        ),
        ({"url": "file:///x/fusedopt-0.1.0.tar.gz", "archive_info": {}}, f"{AGAIN} /x/fusedopt-0.1.0.tar.gz"),
        ({"url": "file:///x/fusedopt-0.1.0-py3-none-any.whl"}, f"{AGAIN} --no-binary fusedopt fusedopt"),
    ],
    ids=["index", "folder", "git", "sdist", "wheel"],
)
def test_the_remedy_works_for_the_way_of_installing(monkeypatch, tmp_path, origin, remedy):
    assert installed(monkeypatch, tmp_path, origin) == remedy


def test_the_remedy_in_a_tree_is_an_editable_install(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "80.1")
    assert extension.remedy() == f"pip install --no-build-isolation -e {ROOT}"


@pytest.mark.parametrize("version", ["65.5.0", "strange"])
def test_the_remedy_begins_with_the_tools_it_needs(monkeypatch, tmp_path, version):
    remedy = installed(monkeypatch, tmp_path, None, setuptools=version)
    assert remedy.startswith("pip install --upgrade setuptools && pip install --no-build-isolation")


# -- Threads, forks, and the end


@needs_extension
def test_threads_that_step_together_build_it_once(missing, compiler):
    calls = compiler("sleep 0.2")
    threads = [threading.Thread(target=leaf.seek) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert leaf.available() and len(calls()) == 1


@needs_extension
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_wait_for_a_thread_it_has_not(missing, compiler, folder, monkeypatch):
    gate = folder / "gate"
    calls = compiler(f"while [ ! -e {gate} ]; do sleep 0.05; done")
    monkeypatch.setattr(extension, "PATIENCE", 0.0)
    assert len(said(leaf.seek)) == 1
    while not any("module.cpp" in call for call in calls()):  # the thread holds the entry's lock, and waits
        time.sleep(0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that this process has threads is the point
        pid = os.fork()
    if pid == 0:
        gate.touch()
        os._exit(0 if leaf.seek(wait=True) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert leaf.seek(wait=True)


EXIT = """
import sys, time, pathlib, warnings
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "fusedopt._C" else find(name, *rest)
from fusedopt import backends
from fusedopt.extension import build as extension, leaf
extension.PATIENCE = 0.0
warnings.simplefilter("ignore")
assert not leaf.seek()
calls = pathlib.Path(sys.argv[1])
while not calls.exists(): time.sleep(0.01)
print("bye")
"""


def test_a_process_that_ends_takes_its_compiler_with_it(compiler, folder):
    calls = compiler("sleep 60")
    command = [sys.executable, "-c", EXIT, str(folder / "calls")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "bye\n", "")
    assert ends(int(calls()[0].split()[0]))
    assert not list((folder / "cache").glob(f"{cache.TEMPORARY}*"))


# -- For real


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_sources_compile_by_themselves_and_give_the_same(folder):
    """As after `pip install .`: with torch's headers, no setuptools, and each compiler that there is."""
    if extension.why_not():
        pytest.skip(extension.why_not())
    tool = toolchain.compiler()
    out = folder / "extension.so"
    command = recipe.command([tool.path, *tool.command[1:]], extension.sources() / recipe.SOURCE, out)
    subprocess.run(command, check=True)
    code = (
        f"import torch, sys; from fusedopt.extension import build as extension; m = extension.load({str(out)!r});"
        "t = [torch.ones(2)];"
        "m.bump_versions(t); print(t[0]._version, m.torch_version == torch.__version__, 'setuptools' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "True", "False"], done.stderr
