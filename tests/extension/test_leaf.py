"""The leaf functions: the C++ extension and its Python replacement do the same."""

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import needs_extension
from torch import nn

from fusedopt.extension import leaf

COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ["c++", "g++", "clang++"]), None)

# Stages that note who ran which row. `visit` holds every range back until `wait_for` ranges have been
# entered, so that ranges which can overlap do, however slow the machine is.
PROBE = """
#include <atomic>
#include <chrono>
#include <cstdint>
#include <pthread.h>

struct Launch { int64_t rows, wait_for, *entered, *visits, *threads, *seen; };

extern "C" void visit(const void* launch, int64_t begin, int64_t end) {
  const auto& l = *static_cast<const Launch*>(launch);
  std::atomic_ref<int64_t> entered(*l.entered);
  entered.fetch_add(1);
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (entered.load() < l.wait_for && std::chrono::steady_clock::now() < give_up) {}
  for (int64_t row = begin; row < end; ++row) {
    std::atomic_ref<int64_t>(l.visits[row]).fetch_add(1);
    l.threads[row] = (int64_t)pthread_self();
  }
}

// How many rows an earlier stage had visited when this one reached the row.
extern "C" void look_back(const void* launch, int64_t begin, int64_t end) {
  const auto& l = *static_cast<const Launch*>(launch);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t other = 0; other < l.rows; ++other) l.seen[row] += l.visits[other];
}
"""


class Launch(ctypes.Structure):
    names = ("rows", "wait_for", "entered", "visits", "threads", "seen")
    _fields_ = tuple((name, ctypes.c_int64) for name in names)


class Probe:
    """One launch of the stages above over `rows` rows."""

    def __init__(self, library: ctypes.CDLL, rows: int, wait_for: int = 0):
        self.library = library
        self.arrays = {name: np.zeros(rows, np.int64) for name in ("visits", "threads", "seen")}
        self.entered = np.zeros(1, np.int64)
        pointers = {name: array.ctypes.data for name, array in self.arrays.items()}
        self.launch = Launch(rows=rows, wait_for=wait_for, entered=self.entered.ctypes.data, **pointers)

    def __getattr__(self, name):
        return self.arrays[name]

    def run(self, implementation, *stages: tuple[str, list[int]]) -> None:
        entries = [ctypes.cast(getattr(self.library, name), ctypes.c_void_p).value for name, _ in stages]
        implementation.run_cpu(entries, ctypes.addressof(self.launch), [split for _, split in stages])


@pytest.fixture(scope="module")
def probe_library(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text(PROBE)
    command = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "probe.cpp", "-o", "probe.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "probe.so"))


@pytest.fixture(params=["python", "native"])
def implementation(request):
    found = getattr(leaf, request.param)
    if found is None:
        pytest.skip(leaf.extension_status()[1])
    return found


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------ the extension


def test_extension_is_built_where_it_can_be():
    if COMPILER is None or not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("no C++ compiler or no Python headers")
    available, reason = leaf.extension_status()
    assert available, reason
    assert leaf.native.torch_version == leaf.torch_version == torch.__version__
    assert leaf.run_cpu is leaf.native.run_cpu


# ------------------------------------------------------------------------------------------ write_pointers


@pytest.mark.parametrize("rows", [4, 9, None])
def test_write_pointers(implementation, rows):
    tensors = [torch.ones(3), torch.ones(8)[2:], torch.empty(0), torch.nn.Parameter(torch.ones(2, 2).T)]
    table = np.full((rows or 4, 5), -1)
    implementation.write_pointers(tensors, table.ctypes.data, rows, 5, 3)
    assert table[:4, 3].tolist() == [t.data_ptr() for t in tensors]
    table[:4, 3] = -1
    assert (table == -1).all(), "only that column, and only as many rows as there are tensors"


def test_write_pointers_nothing(implementation):
    implementation.write_pointers([], np.zeros(1, np.int64).ctypes.data, 0, 1, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tensors": [torch.ones(1), 3]}, TypeError, r"tensors\[1\] must be a Tensor, not int"),
        ({"tensors": (torch.ones(1),)}, TypeError, "list"),
        ({"rows": 1}, ValueError, "2 tensors do not fit into a table of 1 rows"),
        ({"column": 5}, ValueError, "column 5 is outside a table of 5 columns"),
        ({"column": -1}, ValueError, "column -1 is outside a table of 5 columns"),
        ({"table_ptr": 0}, ValueError, "table_ptr is null"),
        ({"table_ptr": 1.5}, TypeError, "."),
        ({"tensors": [torch.eye(2).to_sparse()]}, RuntimeError, "storage"),
    ],
)
def test_write_pointers_refuses(implementation, change, error, message):
    table = np.zeros((2, 5), np.int64)
    arguments = {"tensors": [torch.ones(1)] * 2, "table_ptr": table.ctypes.data, "rows": 2, "columns": 5}
    with pytest.raises(error, match=message):
        implementation.write_pointers(**{**arguments, "column": 0, **change})


# ------------------------------------------------------------------------------------------ run_cpu


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("split", [[0, 9], [0, 4, 9], [0, 0, 1, 1, 3, 9], list(range(10))])
def test_every_row_runs_once(implementation, probe_library, split, threads):
    torch.set_num_threads(threads)
    probe = Probe(probe_library, rows=9)
    probe.run(implementation, ("visit", split))
    assert probe.visits.tolist() == [1] * 9
    assert probe.entered[0] == len(split) - 1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_ranges_run_on_torch_threads(implementation, probe_library, threads):
    torch.set_num_threads(threads)
    assert leaf.thread_count() == threads
    probe = Probe(probe_library, rows=6, wait_for=threads)
    probe.run(implementation, ("visit", list(range(7))))
    assert len(set(probe.threads)) == threads


def test_one_range_runs_on_the_calling_thread(implementation, probe_library):
    torch.set_num_threads(2)
    probe = Probe(probe_library, rows=6)
    probe.run(implementation, ("visit", [0, 6]))
    assert set(probe.threads) == {threading.get_ident()}


def test_a_stage_begins_when_the_one_before_is_done(implementation, probe_library):
    torch.set_num_threads(2)
    split = [0, 1, 6]
    probe = Probe(probe_library, rows=6)
    probe.run(implementation, ("visit", split), ("look_back", split), ("visit", split), ("look_back", split))
    assert probe.seen.tolist() == [6 + 12] * 6


def test_the_gil_is_released(implementation, probe_library):
    """The stage waits for a third party to enter: a Python thread, which needs the GIL for it."""
    torch.set_num_threads(2)
    probe = Probe(probe_library, rows=2, wait_for=3)
    done = threading.Event()

    def enter():
        while probe.entered[0] < 2 and not done.is_set():
            done.wait(0.001)
        probe.entered[0] += 1 if not done.is_set() else 100

    other = threading.Thread(target=enter)
    other.start()
    probe.run(implementation, ("visit", [0, 1, 2]))
    done.set()
    other.join()
    assert probe.entered[0] == 3


def test_nothing_to_run(implementation, probe_library):
    probe = Probe(probe_library, rows=2)
    probe.run(implementation)
    probe.run(implementation, ("visit", []), ("visit", [0]))
    assert probe.entered[0] == 0


def test_numpy_splits(implementation, probe_library):
    probe = Probe(probe_library, rows=6)
    probe.run(implementation, ("visit", np.array([0, 2, 6])))
    assert probe.visits.tolist() == [1] * 6


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (([0], 0, [[0, 1]]), ValueError),
        (([1], 0, []), ValueError),
        (([1.5], 0, [[0, 1]]), TypeError),
        (([1], 0, [[0, 1.5]]), TypeError),
        (([1], None, [[0, 1]]), TypeError),
        ((1, 0, [[0, 1]]), TypeError),
    ],
)
def test_run_cpu_refuses(implementation, arguments, error):
    with pytest.raises(error):
        implementation.run_cpu(*arguments)


# ------------------------------------------------------------------------------------------ bump_versions


def test_bump_versions(implementation):
    tensors = [torch.ones(2), torch.nn.Parameter(torch.ones(2))]
    implementation.bump_versions(tensors)
    assert [t._version for t in tensors] == [1, 1]


def test_autograd_sees_the_write(implementation):
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    implementation.bump_versions([weight])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors_are_passed_over(implementation):
    with torch.inference_mode():
        inference = torch.ones(2)
    normal = torch.ones(2)
    implementation.bump_versions([inference, normal])
    assert normal._version == 1


def test_bump_versions_refuses(implementation):
    with pytest.raises(TypeError, match=r"tensors\[0\] must be a Tensor, not NoneType"):
        implementation.bump_versions([None])


# ------------------------------------------------------------------------------------------ settle

DROPPED = """
import sys, threading, time
import torch
from fusedopt.extension import leaf

sys.setswitchinterval(10)  # nobody is interrupted: the GIL changes hands where it is let go
p = torch.nn.Parameter(torch.zeros(100_000_000))
meanwhile = 0
for _ in range(2):
    p.grad = torch.ones_like(p)
    begin, done = threading.Event(), threading.Event()
    asked, dropped = [], []

    def drop():
        begin.wait()
        dropped.append(time.perf_counter())
        p.grad = None
        dropped.append(time.perf_counter())
        done.set()

    thread = threading.Thread(target=drop)
    thread.start()
    begin.set()
    while not done.is_set():
        start = time.perf_counter()
        leaf.settle([p])
        asked.append((start, time.perf_counter()))
        time.sleep(0)
    thread.join()
    (start, end), margin = dropped, (dropped[1] - dropped[0]) / 5
    meanwhile += sum(start + margin < a and b < end - margin for a, b in asked)
print(meanwhile)
"""


@needs_extension
@pytest.mark.parametrize("settle", [True, False], ids=["", "mutation"])
def test_a_gradient_that_another_thread_is_freeing_is_waited_for(settle):
    """torch lets go of the GIL while it frees one, and its own ``p.grad`` reads freed memory then."""
    text = DROPPED if settle else DROPPED.replace("leaf.settle([p])", "pass")
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert (int(done.stdout) == 0) == settle, done.stderr


def test_settle(implementation):
    free, held = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    held.grad = torch.ones(2)
    implementation.settle([free, held])
    assert free.grad is None and held.grad is not None


# ------------------------------------------------------------------------------------- first_other


def test_first_other(implementation):
    """Identity counts, and nothing is as good as None."""
    one, own = [1], {"a": 1}
    looked = [(own, "a", own["a"]), (own, "gone", None), ({"list": one}, "list", one)]
    assert implementation.first_other(looked) == -1 == implementation.first_other([])
    looked[2][0]["list"] = [1]
    assert implementation.first_other(looked) == 2
    own["gone"] = 0
    assert implementation.first_other(looked) == 1
    del own["a"]
    assert implementation.first_other(looked) == 0
    with pytest.raises(TypeError):
        implementation.first_other([({}, [], None)])

    def function(x=one):
        return x

    values = {name: getattr(function, name) for name in ("__code__", "__defaults__", "__kwdefaults__")}
    others = {"__code__": (lambda x: None).__code__, "__defaults__": (2,), "__kwdefaults__": {}}
    looked = [(function, name, value) for name, value in values.items()]
    assert implementation.first_other(looked) == -1
    for k, name in reversed([*enumerate(values)]):
        setattr(function, name, others[name])
        assert implementation.first_other(looked) == k
    with pytest.raises((TypeError, AttributeError)):
        implementation.first_other([(function, "gone", None)])
