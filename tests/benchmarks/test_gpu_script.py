"""The GPU script, where there is no GPU: a rehearsal from end to end, and that what it checks with can find faults."""

import json
import stat
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from helpers import ends

from benchmarks import plot, providers
from benchmarks.cases import CASES, Pair
from benchmarks.gpu import bars, checks, jobs, kernels, scenarios
from benchmarks.gpu.device import Gpu, Rehearsal
from benchmarks.gpu.jobs import Job, Outcome, Part, Skipped
from benchmarks.gpu.report import Report
from benchmarks.measure import ROOT, Row

CPU = Rehearsal()


def script(*arguments):
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


# --
# The script


@pytest.mark.slow
def test_a_rehearsal_from_end_to_end(tmp_path):
    done = script("--rehearse", "--out", tmp_path, "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"rehearsal.{x}" for x in ("csv", "json", "log", "md", "png")
    ]
    found = plot.Results(plot.read(tmp_path / "rehearsal.csv"))
    line = found.line("resnet-50", "AdamW", "gpu", "fusedopt cpp", "device")
    assert 0 < line["p20"] <= line["p50"] <= line["p80"] and line["ratio"] == 1
    assert (line["commit"], line["device"], line["torch"]) == ("abc", "rehearsal", torch.__version__)
    said = json.loads((tmp_path / "rehearsal.json").read_text())
    assert {job["status"] for job in said["jobs"]} == {"passed"}
    tests = [job["job"] for job in said["jobs"] if job["part"] == "tests-1"]
    assert all(len([t for t in tests if t.startswith(file)]) == 1 for file in checks.FILES)
    measured = [bar for bar in said["bars"] if bar["measured"] != "not measured"]
    assert len(measured) == len(bars.BARS)
    report = (tmp_path / "rehearsal.md").read_text()
    assert "no number here means anything" in report and "| resnet-50 " in report
    assert (matplotlib.image.imread(tmp_path / "rehearsal.png")[..., :3].min(-1) < 0.9).mean() > 0.02


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = script("--out", tmp_path)
    assert done.returncode == 1
    assert "no NVIDIA GPU" in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_there_is_no_time_for_is_left_out_and_said(tmp_path):
    done = script("--rehearse", "--seconds", 1, "--out", tmp_path)
    assert done.returncode == 1
    assert done.stdout.count("left out: the time was up") == 3
    assert "left out" in (tmp_path / "rehearsal.md").read_text()


# --
# Jobs and parts


def refuse():
    raise Skipped("not here")


ROW = Row.of(("tiny", "AdamW", "gpu", "fusedopt cuda"), "device", "ms", [1.0, 2.0, 3.0])
JOBS = (
    Job("measured", lambda: [ROW]),
    Job("wrong", lambda: 1 / 0),
    Job("refused", refuse),
    Job("said", lambda: "so"),
)


def statuses(part):
    return {outcome.job: outcome.status for outcome in part}


def finished(log):
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [Outcome(**line) for line in lines if "begun" not in line]


def test_a_job_that_fails_leaves_the_others(tmp_path):
    log = tmp_path / "log"
    assert jobs.do(JOBS, CPU, log) == 0
    found = finished(log)
    assert statuses(found) == {
        "measured": "passed",
        "wrong": "failed",
        "refused": "skipped",
        "said": "passed",
    }
    assert [o.detail for o in found] == ["", "ZeroDivisionError: division by zero", "not here", "so"]
    assert found[0].rows[0]["p50"] == 2.0


def test_a_lost_device_ends_the_process_and_the_next_one_goes_on(tmp_path):
    class Lost(Rehearsal):
        def synchronize(self):
            raise RuntimeError("an illegal memory access was encountered")

    log = tmp_path / "log"
    assert jobs.do(JOBS, Lost(), log) == jobs.DEVICE_LOST
    assert list(statuses(finished(log))) == ["measured"]
    assert jobs.do(JOBS, CPU, log) == 0
    assert len(finished(log)) == 4


def part(monkeypatch, folder, body, seconds=30.0):
    """A part whose process runs these lines of shell; ``$6`` is its log."""
    program = folder / "process"
    program.write_text(f"#!/bin/sh\necho these are the last words\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(jobs.sys, "executable", str(program))
    out = Part("part", [], folder, seconds, {})
    while out.running():
        out.process.poll()
    return out


DONE = json.dumps({"job": "second", "status": "passed"})


def test_a_process_that_breaks_off_is_followed_by_another(tmp_path, monkeypatch):
    body = f"""if [ -e "$6" ]; then echo '{{"begun": "second"}}\n{DONE}' >> "$6"
    else echo '{{"begun": "first"}}' >> "$6"; kill -9 $$; fi"""
    found = part(monkeypatch, tmp_path, body).outcomes()
    assert statuses(found) == {"second": "passed", "first": "failed"}
    assert "these are the last words" in found[-1].detail


def test_a_process_that_does_nothing_is_not_started_for_ever(tmp_path, monkeypatch):
    found = part(monkeypatch, tmp_path, "exit 5").outcomes()
    assert statuses(found) == {"part/process": "failed"}
    assert "status 5" in found[0].detail and "last words" in found[0].detail


def test_a_process_out_of_time_is_ended_with_those_it_started(tmp_path, monkeypatch):
    body = f"""echo '{{"begun": "slow"}}' >> "$6"; sleep 60 & echo $! > {tmp_path}/child; wait"""
    out = part(monkeypatch, tmp_path, body, seconds=1.0)
    assert statuses(out.outcomes()) == {"slow": "failed"}
    assert "did not end within 1 s" in out.outcomes()[0].detail
    assert ends(int((tmp_path / "child").read_text()))


# --
# Tests as jobs

TESTS = """
import os, pytest
def test_right(): pass
def test_wrong(): assert 1 == 2, "indeed"
def test_elsewhere(): pytest.skip("not here")
@pytest.mark.cpu_only("it is")
def test_of_the_cpu(): assert False
@pytest.fixture
def broken():
    yield
    raise KeyError("afterwards")
def test_ends_badly(broken): pass
def test_dies(): os._exit(9)
def test_last(): pass
"""
PROCESS = """
import sys
from pathlib import Path
import pytest
from benchmarks.gpu import checks, device
class All(device.Rehearsal):
    def some(self, things, few=1):
        return things
class Lost(All):
    def synchronize(self):
        raise RuntimeError("an illegal memory access was encountered")
where = Lost() if "lost" in sys.argv else All()
checks.FILES, checks.options = ("test_here.py", "test_broken.py"), lambda device: ["-c/dev/null", "--rootdir=."]
sys.exit(checks.do(where, Path("log")))
"""


def after_tests(folder, *arguments):
    """The exit status of a process that does these tests, and what its part's log has."""
    (folder / "test_here.py").write_text(TESTS)
    (folder / "test_broken.py").write_text("import not_installed")
    command = [sys.executable, "-c", PROCESS, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, {o.job.split("::")[-1]: o for o in finished(folder / "log")}


def test_tests_are_jobs_of_a_part(tmp_path):
    status, found = after_tests(tmp_path)
    assert status == 9 and "test_last" not in found
    status, found = after_tests(tmp_path)
    assert status in (0, 1) and jobs.begun(tmp_path / "log") == {o.job for o in found.values()} | {
        "test_here.py::test_dies"
    }
    assert {name: o.status for name, o in found.items()} == {
        "test_broken.py": "failed",
        "test_right": "passed",
        "test_wrong": "failed",
        "test_elsewhere": "skipped",
        "test_ends_badly": "failed",
        "test_last": "passed",
    }
    for name, words in (
        ("test_broken.py", "not_installed"),
        ("test_wrong", "indeed"),
        ("test_elsewhere", "not here"),
    ):
        assert words in found[name].detail
    assert found["test_elsewhere"].detail == "Skipped: not here"  # and no folder of this machine
    assert after_tests(tmp_path) == (0, found)


def test_without_pytest_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", None)
    for share in range(2):
        assert checks.do(CPU, tmp_path / f"log{share}", share, 2) == 0
    [outcome] = [Outcome(**line) for line in jobs._lines(tmp_path / "log0") if "begun" not in line]
    assert outcome.status == "failed" and "none of the tests was run" in outcome.detail
    assert not (tmp_path / "log1").exists()


def test_a_test_that_loses_the_device_ends_the_process(tmp_path):
    status, found = after_tests(tmp_path, "lost")
    assert status == jobs.DEVICE_LOST and list(found) == ["test_broken.py", "test_right"]


# --
# Scenarios, with torch's optimizers in the place of ours


class Stand:
    """The keywords and calls that a graph's optimizer has."""

    def __init__(self, params, capturable=False, backend=None, **kwargs):
        super().__init__(params, **kwargs)
        self.kept = capturable

    def upload_hypers(self):
        pass


class Right(Stand, torch.optim.AdamW):
    pass


class Sgd(Stand, torch.optim.SGD):
    pass


class KeepsItsRate(Right):
    def step(self):
        self.param_groups[0].update({"lr": 1e-2} if self.kept else {})
        super().step()


def test_a_graph_that_keeps_its_rate_is_found(monkeypatch):
    right = SimpleNamespace(AdamW=Right, SGD=Sgd)
    monkeypatch.setattr(scenarios, "optim", right)
    assert "replays" in scenarios.graph(CPU, "cpp")
    right.AdamW = KeepsItsRate
    with pytest.raises(AssertionError):
        scenarios.graph(CPU, "cpp")


def test_elements_that_are_left_out_are_found(monkeypatch):
    step = scenarios._step_sgd

    def forgetful(backend, params, grads):
        kept = params[0][1000:1002].clone()
        step(backend, params, grads)
        if params[0].numel() == CPU.large:
            params[0][1000:1002] = kept

    assert "70,001" in scenarios.huge_tensor(CPU, "cpp")
    monkeypatch.setattr(scenarios, "_step_sgd", forgetful)
    with pytest.raises(AssertionError):
        scenarios.huge_tensor(CPU, "cpp")


def test_a_provider_that_fails_leaves_the_others_and_is_reported(monkeypatch):
    def wrong(rule, params, rates):
        out = providers._fusedopt(rule, params, [2 * rate for rate in rates], backend="cpp")
        return replace(out, set=lambda factor, momentum: None)

    pair = Pair("tiny", "AdamW", ("fusedopt cpp", "torch fused"))
    assert {r.provider for r in kernels.times(CPU, pair)} == {"fusedopt cpp", "torch fused"}
    monkeypatch.setitem(providers.PROVIDERS, "fusedopt cpp", wrong)
    with pytest.raises(jobs.Partly, match="fusedopt cpp: Disagreement") as partly:
        kernels.times(CPU, pair)
    assert {r.provider for r in partly.value.rows} == {"torch fused"}


class FakeCuda:
    """As much of torch.cuda as `Gpu` uses; ``busy``: whether the device is still at what was queued."""

    def __init__(self):
        self.busy, self.slept, self.mode = True, [], "default"

    def Event(self, enable_timing=False):
        return SimpleNamespace(
            record=lambda: None,
            query=lambda: not self.busy,
            synchronize=lambda: None,
            elapsed_time=lambda end: 10.0,
        )

    def __getattr__(self, name):
        return {
            "get_device_name": lambda: "NVIDIA H100 80GB HBM3",
            "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=1 << 20),
            "_sleep": self.slept.append,
            "synchronize": lambda: None,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
        }[name]


@pytest.fixture
def gpu(monkeypatch):
    cuda = FakeCuda()
    zeros = torch.zeros
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    out = Gpu()
    out.cuda = cuda
    return out


def test_the_queue_is_held_while_a_step_is_sent(gpu):
    assert gpu.slug == "nvidia-h100-80gb-hbm3"
    assert gpu.time(lambda: None, hold=0.001) == (10.0, True)
    assert gpu.cuda.slept[-1] == pytest.approx(0.001 * gpu.cuda.slept[0] / 0.010)
    gpu.cuda.busy = False
    assert gpu.time(lambda: None, hold=0.001) == (10.0, False)


def test_a_step_that_waits_for_the_device_is_found(gpu):
    with gpu.no_waiting():
        assert gpu.cuda.mode == "error"
    with pytest.raises(AssertionError, match="only when the device had done"), gpu.no_waiting():
        gpu.cuda.busy = False
    assert gpu.cuda.mode == "default"


# --
# The bars


def rows(ms):
    """A run's rows where device times are ``ms(provider)`` per 28 bytes of each parameter, at 1 TB/s of copying."""
    out = [Row.of(("copy", "copy", "gpu", "torch"), "bandwidth", "GB/s", [1000.0])]
    device = SimpleNamespace(backends=Gpu.backends)
    for pair in kernels.pairs(device):
        moved = {"LAMB": 44, "Lion": 20, "SGD-momentum": 20}.get(pair.rule, 28)
        for name in pair.providers:
            key = (pair.case, pair.rule, "gpu", name)
            time = CASES[pair.case].numel * moved / 1e9 * ms(name)
            out.append(Row.of(key, "device", "ms", [time]))
            out.append(Row.of(key, "bytes", "bytes per element", [moved]))
            out.append(Row.of(key, "launches", "count", [2 if pair.rule == "LAMB" else 1]))
    for case in ("small-500", *kernels.MANY):
        for name in ("fusedopt cuda", "fusedopt triton", "torch fused"):
            host = 1e-4 * len(CASES[case].shapes) * ms(name)
            out.append(Row.of((case, "AdamW", "gpu", name), "host", "ms", [host]))
    for backend in Gpu.backends:
        key = ("tiny", "AdamW", "empty cache", f"fusedopt {backend}")
        out.append(Row.of(key, "compile", "ms", [250.0]))
    return out


@pytest.mark.parametrize(("theirs", "reached"), [(30.0, True), (0.1, False)])
def test_every_bar_is_judged_by_what_is_measured(theirs, reached):
    report = Report(rehearsal=False)
    found = [vars(r) for r in rows(lambda name: 1.05 if name.startswith("fusedopt") else theirs)]
    report.parts["kernels"] = [Outcome("all", "passed", rows=found)]
    judged = {(b.name, k): bars.judge(b, report.results, k) for b in bars.BARS for k in Gpu.backends}
    assert all(ok is not None for _, ok in judged.values())
    against = {key: ok for key, (_, ok) in judged.items() if "torch" in key[0]}
    assert len(against) == 18 and set(against.values()) == {reached}
    assert all(ok for key, (_, ok) in judged.items() if key not in against)


def test_slow_kernels_miss_their_bars():
    report = Report(rehearsal=False)
    found = [vars(r) for r in rows(lambda name: 4.0 if name.endswith("cuda") else 1.0)]
    report.parts["kernels"] = [Outcome("all", "passed", rows=found)]
    missed = {b.name for b in bars.BARS if not bars.judge(b, report.results, "cuda")[1]}
    assert "AdamW fp32, 134 M parameters: part of copy bandwidth" in missed
    assert "AdamW, 10000x64: host time per tensor" in missed
    assert "AdamW, 465 groups: device time of one group's" in missed


def test_nothing_measured_reaches_nothing():
    report = Report(rehearsal=False)
    assert {bars.judge(b, report.results, "cuda") for b in bars.BARS} == {("not measured", None)}
    assert "not measured" in report.markdown(1.0)
