"""The system compiler: found, run, and its failures explained."""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
from helpers import ends

import fusedopt
from fusedopt import backends
from fusedopt.compile import BuildError, CacheWarning, CompileError, CompilerNotFound, cache, toolchain

REAL = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(REAL is None or os.name != "posix", reason="needs a C++ compiler and a shell")
linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the linker is left alone")

ADD = """
#include <cstdint>
extern "C" int64_t add(int64_t a, int64_t b) { return a + b; }
"""

AXPY = """
#include <cmath>
#include <cstdint>
#include <cstring>
extern "C" void axpy(const float* a, float* p, int64_t n) {
    for (int64_t i = 0; i < n; i++) p[i] = p[i] - a[i] * std::sqrt(std::fabs(a[i]));
}
"""


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache, no memory of earlier libraries, and the system's own compiler."""
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("FUSEDOPT_DEBUG", raising=False)
    monkeypatch.setattr(cache, "_opened", {})
    monkeypatch.setattr(cache, "_warned", set())
    forget(monkeypatch)


def forget(monkeypatch):
    """What a new process would not know."""
    monkeypatch.setattr(toolchain, "_libraries", {})
    monkeypatch.setattr(toolchain, "_failed", {})
    monkeypatch.setattr(toolchain, "_refused", set())


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Makes a shell script the compiler. It answers --version itself and counts its other calls in a file."""

    def make(body, version='echo "pretend 1.0"; exit 0'):
        path = tmp_path / "pretend-c++"
        path.write_text(
            f'#!/bin/sh\ncase "$*" in *--version*) {version};; esac\necho "$@" >> {tmp_path}/calls\n{body}\n'
        )
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        toolchain._find_compiler.cache_clear()
        return path

    yield make
    toolchain._find_compiler.cache_clear()


def calls(tmp_path):
    file = tmp_path / "calls"
    return file.read_text().splitlines() if file.exists() else []


def call(library, a, b):
    function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    return function(library.address("add"))(a, b)


# ---------------------------------------------------------------- compiling


def test_compile_load_call(tmp_path):
    library = toolchain.compile_library("add", ADD)
    assert call(library, 2, 3) == 5
    assert library.built
    assert library.path.parent == tmp_path / "cache"
    assert library.source_path.read_text() == ADD
    assert library.seconds > 0
    assert "compiled" in repr(library)
    with pytest.raises(AttributeError, match="nothing"):
        library.address("nothing")


def test_one_library_per_key_and_process(monkeypatch):
    first = toolchain.compile_library("add", ADD)
    assert toolchain.compile_library("add", ADD) is first
    forget(monkeypatch)
    second = toolchain.compile_library("add", ADD)
    assert (second.path, second.built) == (first.path, False)
    assert "found" in repr(second)


def test_a_warm_load_starts_no_process(monkeypatch):
    toolchain.compile_library("axpy", AXPY)
    forget(monkeypatch)
    monkeypatch.setattr(toolchain, "_run", None)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert not toolchain.compile_library("axpy", AXPY).built


def test_the_key_holds_all_that_decides_the_code(monkeypatch):
    tool = toolchain.compiler()

    def key(text=ADD, tool=tool, parts=("1",)):
        return toolchain.library_keys(text, tool, parts)

    seen = [key(), key(ADD + " "), key(parts=("2",)), key(parts=("1", "1")), key(parts=("", "1"))]
    seen += [key(tool=tool._replace(version="other")), key(tool=tool._replace(path="other"))]
    cpu = toolchain.cpu_features()
    monkeypatch.setattr(toolchain, "cpu_features", lambda: cpu._replace(digest="another machine"))
    seen.append(key())
    for flags in ("FLAGS", "LIBRARIES"):
        monkeypatch.setattr(toolchain, flags, (*getattr(toolchain, flags), "-g"))
        seen.append(key())
    for of_one in zip(*seen, strict=True):
        assert len(set(of_one)) == len(seen)


@pytest.mark.parametrize(
    ("text", "other", "same"),
    [
        ("int x; // one", "int x;  // the other", True),
        ("// one\nint x;", "// the other\nint x;", True),
        ("int x;", "int x; //", True),
        ("int x; // one\nint y;", "int x; // int y;", False),
        ("int x; // one \\\nint y;", "int x; // one\nint y;", False),
        ('char x[] = "http://one";', 'char x[] = "http://two";', False),
        ("/*\n// one */ int x;", "/*\n// one */", False),
        ('char x[] = R"(\n//one)";', 'char x[] = R"(\n//two)";', False),
    ],
)
def test_comments_are_no_code(text, other, same):
    tool = toolchain.compiler()
    (code, key), (other_code, other_key) = (toolchain.library_keys(t, tool, ()) for t in (text, other))
    assert (code == other_code) is same and key != other_key


def test_a_source_with_other_comments_is_not_compiled(monkeypatch):
    first = toolchain.compile_library("axpy", AXPY)
    monkeypatch.setattr(toolchain, "_compile", None)
    for name, more in (("axpy", "// of other tensors"), ("adamw", "// of another name")):
        same = toolchain.compile_library(name, f"{AXPY}{more}")
        assert not same.built and same.entry.reason == ""
        assert same.path != first.path and same.path.read_bytes() == first.path.read_bytes()
        assert more in same.source_path.read_text() and same.path.name.startswith(name)
        assert "the code is that of axpy_" in same.path.with_suffix(".json").read_text()


def test_what_another_name_has_is_taken_only_as_it_was_stored():
    first = toolchain.compile_library("add", ADD)
    more = first.path.read_bytes() + b"more"
    first.path.unlink()  # or what is loaded here would be written to
    first.path.write_bytes(more)
    assert toolchain.compile_library("plus", f"{ADD}// again").built


def test_no_fast_math_and_no_contraction(script, tmp_path):
    """sign(v - g*g) must be zero when v is g*g: with contraction into FMA it is not."""
    script(f'exec {REAL} "$@"')
    source = """
    extern "C" double residue(double g) { volatile double v = g * g; return v - g * g; }
    """
    library = toolchain.compile_library("residue", source)
    residue = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)(library.address("residue"))
    assert all(residue(1 + k / 7) == 0 for k in range(1, 50))
    (line,) = calls(tmp_path)
    assert "-ffp-contract=off" in line
    assert "fast-math" not in line


def test_debug_output(monkeypatch, capfd):
    monkeypatch.setenv("FUSEDOPT_DEBUG", "2")
    toolchain.compile_library("add", ADD)
    err = capfd.readouterr().err
    assert "// kernel add" in err
    assert "int64_t add(" in err
    assert "-O3" not in err
    monkeypatch.setenv("FUSEDOPT_DEBUG", "3")
    toolchain.compile_library("add", ADD + "// again\n")
    assert "-O3" in capfd.readouterr().err


def test_cpu_features():
    cpu = toolchain.cpu_features()
    assert cpu.model
    assert len(cpu.digest) == 64
    assert cpu is toolchain.cpu_features()


# ---------------------------------------------------------------- no compiler, bad compilers


def test_no_compiler_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompilerNotFound, match=r"c\+\+: not found; g\+\+: not found") as caught:
        toolchain.compile_library("add", ADD)
    assert "install g++" in str(caught.value)
    assert 'backend="reference"' in str(caught.value)


def test_cxx_is_tried_alone_and_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompilerNotFound, match=r"CXX .*no-such-compiler: not found.*unset CXX"):
        toolchain.compiler()


@pytest.mark.parametrize("line", ["'unbalanced", "''", "/"])
def test_cxx_is_nonsense(monkeypatch, line):
    monkeypatch.setenv("CXX", line)
    with pytest.raises(CompilerNotFound, match="CXX names no working compiler"):
        toolchain.compiler()


def test_cxx_may_have_arguments(monkeypatch):
    monkeypatch.setenv("CXX", f"env {REAL}")
    assert toolchain.compiler().command == ("env", REAL)
    assert call(toolchain.compile_library("add", ADD), 4, 5) == 9


def test_a_compiler_that_only_fails(script):
    script("exit 1", version='echo "licence expired"; exit 1')
    with pytest.raises(CompilerNotFound, match=r"`--version` ended with status 1: licence expired"):
        toolchain.compile_library("add", ADD)


def test_a_broken_first_candidate_is_passed_over(tmp_path, monkeypatch):
    broken = tmp_path / "bin" / "c++"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    (broken.parent / "g++").symlink_to(REAL)
    monkeypatch.setenv("PATH", f"{broken.parent}{os.pathsep}{os.environ['PATH']}")
    assert toolchain.compiler().command == ("g++",)


def test_a_compiler_that_fails_on_the_kernel(script, tmp_path):
    path = script("for i in $(seq 50); do echo line $i; done; exit 3")
    with pytest.raises(CompileError) as caught:
        toolchain.compile_library("my kernel", ADD)
    error, text = caught.value, str(caught.value)
    assert isinstance(error, BuildError)
    for part in ("'my kernel'", "status 3", str(path), "-O3", "line 50", "line 31", "CXX", "reference"):
        assert part in text
    assert "line 30\n" not in text  # the last lines only,
    assert "line 30\n" in error.output  # but all of them on the error
    assert error.source_path.read_text() == ADD
    assert len(calls(tmp_path)) == 1


def test_what_failed_is_not_tried_again_in_this_process(script, tmp_path, monkeypatch):
    script("exit 3")
    for _ in range(3):
        with pytest.raises(CompileError, match="status 3"):
            toolchain.compile_library("add", ADD)
    assert len(calls(tmp_path)) == 1
    forget(monkeypatch)
    with pytest.raises(CompileError, match="status 3"):
        toolchain.compile_library("add", ADD)
    assert len(calls(tmp_path)) == 2


def test_source_that_does_not_compile():
    with pytest.raises(CompileError, match=r"error: .*oops"):
        toolchain.compile_library("bad", "int f() { return oops; }")


def test_a_compiler_that_makes_nothing(script):
    script("exit 0")
    with pytest.raises(CompileError, match="made no file"):
        toolchain.compile_library("add", ADD)


def test_a_compiler_that_makes_no_library(script):
    script('while [ "$1" != -o ]; do shift; done; echo "no code" > "$2"')
    with pytest.raises(CompileError, match="cannot be loaded"):
        toolchain.compile_library("add", ADD)


def test_a_compiler_that_hangs_is_killed_with_its_children(script, monkeypatch, tmp_path):
    script(f"sh -c 'echo $$ > {tmp_path}/child; sleep 1000; true'")  # longer than a test may take
    monkeypatch.setattr(toolchain, "TIMEOUT", 0.5)
    with pytest.raises(CompileError, match="took more than"):
        toolchain.compile_library("add", ADD)
    child = int((tmp_path / "child").read_text())
    assert ends(child)


def test_a_compiler_that_is_stopped_has_a_moment_to_tidy_up(tmp_path, monkeypatch):
    """As when somebody presses Ctrl-C, or a process ends while the extension is built."""
    monkeypatch.setattr(toolchain, "GRACE", 60.0)  # of which a busy machine may take more than half a second
    left = tmp_path / "left"
    # Short sleeps: one that the shell begins just after the signal is waited for.
    work = f"trap 'rm {left}; exit 1' TERM; touch {left}; while true; do sleep 0.05; done"
    process = toolchain.started(["sh", "-c", work])
    while not left.exists():
        time.sleep(0.002)
    toolchain._kill(process)
    process.communicate()
    assert not left.exists()


def test_a_disk_that_is_full_is_named(script):
    script('echo "ld: final link failed: No space left on device"; exit 1')
    with pytest.raises(CompileError, match="remedy: make room on the disk"):
        toolchain.compile_library("add", ADD)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("-march=native", "error: unknown value native for -march"),
        pytest.param("-nodefaultlibs", "ld.lld: error: unable to find library -lgcc", marks=linux),
    ],
)
def test_a_flag_is_dropped_where_refused(script, tmp_path, flag, words):
    script(f'case "$*" in *{flag}*) echo "{words}"; exit 1;; esac\nexec {REAL} "$@"')
    assert call(toolchain.compile_library("add", ADD), 1, 1) == 2
    toolchain.compile_library("add2", ADD + "\n")
    assert [flag in line for line in calls(tmp_path)] == [True, False, False]  # asked once


@linux
def test_a_kernel_is_linked_with_the_c_library_alone():
    """Whose functions have several versions there: a library that does not name it would get the oldest."""
    source = """
    extern "C" double power(double a, double b) { return __builtin_pow(a, b); }
    extern "C" float widened(const _Float16* x) { return float(*x); }
    """
    library = toolchain.compile_library("power", source)
    loaded = library.path.read_bytes()
    assert b"libm.so" in loaded and b"libstdc++" not in loaded
    power = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double, ctypes.c_double)(library.address("power"))
    assert power(2.0, 0.5) == 2**0.5
    assert ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_char_p)(library.address("widened"))(b"\0\x3c") == 1.0


def test_an_intact_entry_that_does_not_load_is_built_again(monkeypatch):
    path = toolchain.compile_library("add", ADD).path
    forget(monkeypatch)
    real, refused = ctypes.CDLL, []

    def refuse_once(name, *args, **kwargs):
        if not refused:
            refused.append(name)
            raise OSError("version `GLIBC_9.99' not found")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(ctypes, "CDLL", refuse_once)
    library = toolchain.compile_library("add", ADD)
    assert refused == [str(path)]
    assert library.built


def test_a_corrupt_library_is_built_again():
    _, key = toolchain.library_keys(ADD, toolchain.compiler(), ())
    path = cache.folder() / f"{cache.stem('add', key)}.so"
    path.write_bytes(b"\x7fELF, but not for long")
    path.with_suffix(".json").write_text(json.dumps({"key": key, "sha256": "of the whole file"}))
    library = toolchain.compile_library("add", ADD)
    assert library.path == path
    assert library.built
    assert "corrupt" in library.entry.reason
    assert call(library, 20, 22) == 42


# ---------------------------------------------------------------- libraries that are not all there


def cut(tmp_path, commands):
    """The body of a compiler that exits with 0 after doing this to the library ``$out``."""
    find = 'while [ "$1" != -o ]; do shift; done; out=$2'
    return f'{REAL} "$@" || exit 1\n{find}\n{commands}\nexit 0'


@pytest.mark.parametrize(
    "commands",
    [
        ': > "$out"',
        'echo "all is well" > "$out"',
        'rm "$out"',
        "kill -9 $$",
        'printf "\\177ELF" > "$out"',
        *(f'truncate -s {n} "$out"' for n in (1, 16, 40, 63, 64, 200, 1000, 4096, 5000, 8192, 12288)),
        'truncate -s -1 "$out"',
        """printf '\\363' | dd of="$out" bs=1 seek=18 conv=notrunc""",
        """echo 'extern "C" int other() { return 1; }' > other.cpp; c++ -shared -fPIC other.cpp -o "$out" """,
    ],
)
def test_a_library_that_is_not_what_it_should_be_is_refused_and_forgotten(
    script, tmp_path, commands, monkeypatch
):
    """Of any length, of another machine, of other functions: an error, no signal, and a good compiler mends it."""
    monkeypatch.chdir(tmp_path)
    script(cut(tmp_path, commands))
    for _ in range(2):
        with pytest.raises(CompileError, match="remedy: point CXX"):
            toolchain.compile_library("add", ADD, symbols=["add"])
    script(f'exec {REAL} "$@"')  # of the same name and version: its key is the same
    forget(monkeypatch)
    library = toolchain.compile_library("add", ADD, symbols=["add"])
    assert library.built and call(library, 2, 3) == 5


def test_a_library_is_refused_however_much_of_its_end_is_missing(tmp_path):
    whole = toolchain.compile_library("add", ADD).path.read_bytes()
    path = tmp_path / "cut.so"
    for size in (*range(0, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:size])
        assert toolchain._unloadable(path, ["add"])
    path.write_bytes(whole)
    assert not toolchain._unloadable(path, ["add"])
    assert toolchain._unloadable(path, ["add", "subtract"]) == "it has no subtract"


@pytest.mark.parametrize("left", [0, 5000])
def test_an_entry_cut_off_in_the_cache_is_built_again(left, monkeypatch):
    """Also where its checksum says that it was stored so, by an earlier version."""
    first = toolchain.compile_library("add", ADD, symbols=["add"])
    for stored_so in (False, True):
        path = first.path
        data = path.read_bytes()[:left]
        path.unlink()
        path.write_bytes(data)
        path.chmod(0o700)
        if stored_so:
            sidecar = path.with_suffix(".json")
            meta = json.loads(sidecar.read_text()) | {"sha256": hashlib.sha256(data).hexdigest()}
            sidecar.write_text(json.dumps(meta))
        forget(monkeypatch)
        again = toolchain.compile_library("add", ADD, symbols=["add"])
        assert again.built and call(again, 2, 3) == 5


@pytest.mark.parametrize(
    "commands", ['truncate -s 5000 "$out"', ': > "$out"', 'strip -x -N add "$out"; exit 3']
)
def test_auto_goes_on_without_it(script, tmp_path, commands, monkeypatch):
    script(cut(tmp_path, commands))
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(backends, "made", {})

    def descend(p, lr, **kwargs):
        p.data.sub_(p.grad, alpha=lr)

    def stepped(backend):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        fusedopt.Optimizer([p], descend, lr=0.1, backend=backend, title="cut off").step()
        return p.detach()

    with pytest.warns(RuntimeWarning, match="cpp backend cannot be used"):
        torch.testing.assert_close(stepped("auto"), torch.full((3,), 0.9))
    with pytest.raises(BuildError):
        stepped("cpp")


def test_an_unsafe_folder_still_gives_a_kernel(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.warns(CacheWarning, match="written by other users"):
        library = toolchain.compile_library("add", ADD)
    assert call(library, 1, 2) == 3
    assert tmp_path not in library.path.parents


# ---------------------------------------------------------------- several processes

WORKER = """
import ctypes, pathlib, sys, time
from fusedopt.compile import toolchain
folder = pathlib.Path(sys.argv[1])
(folder / f"ready{sys.argv[2]}").touch()
while not (folder / "go").exists():
    time.sleep(0.002)
library = toolchain.compile_library("add", (folder / "add.cpp").read_text())
function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(library.address("add"))
print(function(20, 22), library.built)
"""


def test_two_processes_at_once_compile_once(script, tmp_path):
    script(f'sleep 0.3; exec {REAL} "$@"')
    (tmp_path / "add.cpp").write_text(ADD)
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*command, str(index)], **pipes) for index in range(2)]
    while sum((tmp_path / f"ready{index}").exists() for index in range(2)) < 2:
        assert all(worker.poll() is None for worker in workers), workers[0].communicate()
        time.sleep(0.01)
    (tmp_path / "go").touch()
    said = [worker.communicate(timeout=60) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert sorted(out.strip() for out, _ in said) == ["42 False", "42 True"]
    assert len(calls(tmp_path)) == 1


class Slow(subprocess.Popen):
    """One that takes its time to close the ends of pipes that are the compiler's."""

    closing = threading.Event()

    def _close_pipe_fds(self, *fds):
        self.closing.set()
        time.sleep(0.3)
        super()._close_pipe_fds(*fds)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("held", [True, False], ids=["", "mutation"])
def test_a_process_forked_while_a_compiler_is_started_is_not_waited_for(held, monkeypatch):
    """As the workers of a DataLoader are, while the first step's thread builds the extension."""
    monkeypatch.setattr(toolchain.subprocess, "Popen", Slow)
    if not held:
        monkeypatch.setattr(toolchain, "_starting", contextlib.nullcontext())
    took = []

    def run():
        start = time.perf_counter()
        toolchain._run(["true"], 60.0)
        took.append(time.perf_counter() - start)

    Slow.closing.clear()
    thread = threading.Thread(target=run)
    thread.start()
    Slow.closing.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that this process has threads is the point
        pid = os.fork()
    if pid == 0:
        time.sleep(3.0)
        os._exit(0)
    thread.join()
    os.waitpid(pid, 0)
    assert (took[0] < 2.5) == held
