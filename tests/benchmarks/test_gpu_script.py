"""The GPU script, where there is no GPU: a rehearsal from end to end, and that what it checks with can find faults."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch

from benchmarks import plot, providers
from benchmarks.cases import CASES, Pair
from benchmarks.gpu import bars, compare, jobs, kernels, scenarios, zoo
from benchmarks.gpu.device import Gpu, Rehearsal
from benchmarks.gpu.jobs import Job, Outcome, Part, Skipped
from benchmarks.gpu.report import Report
from benchmarks.measure import ROOT, Row
from fusedopt.table import row

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
    assert {job["status"] for job in said["jobs"]} <= {"passed", "skipped"}
    skipped = {job["job"]: job["detail"] for job in said["jobs"] if job["status"] == "skipped"}
    assert all("this version refuses" in why for why in skipped.values())
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
    assert done.stdout.count("left out: the time was up") == 2
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
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


# --
# What checks are made of


@pytest.mark.parametrize("at", [-1, 5])
def test_a_write_outside_of_a_tensor_is_found(at):
    memory = compare.Memory()
    held = memory.hold(torch.ones(5), offset=1)
    assert held.data_ptr() % 16 == 4
    memory.check()
    base = held.as_strided((7,), (1,), held.storage_offset() - 1)
    base[at + 1] = 0.0
    with pytest.raises(AssertionError, match="4 bytes outside"):
        memory.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_close_is_as_strict_as_eager_is_exact(dtype):
    truth = torch.linspace(1, 2, 1000, dtype=torch.float64)
    eager = truth.to(dtype)
    compare.close("same", [eager], [truth], [eager])
    for wrong in (eager * 1.02, eager.clone().fill_(float("nan")), eager.index_fill(0, torch.tensor(7), 9.0)):
        with pytest.raises(AssertionError, match="ulp off"):
            compare.close("wrong", [wrong], [truth], [eager])


def test_in_16_bits_a_small_change_of_all_elements_is_found():
    truth = torch.linspace(1, 2, 1000, dtype=torch.float64)
    eager = truth.to(torch.bfloat16)
    shifted = (eager.view(torch.int16) + 1).view(torch.bfloat16)
    with pytest.raises(AssertionError, match="not eager torch's"):
        compare.close("shifted", [shifted], [truth], [eager])


def test_same_looks_at_bits():
    compare.same("nan", [torch.tensor([float("nan"), 0.0])], [torch.tensor([float("nan"), 0.0])])
    with pytest.raises(AssertionError, match="1 of 2 elements"):
        compare.same("zeros", [torch.tensor([1.0, -0.0])], [torch.tensor([1.0, 0.0])])


def test_an_optimizer_that_is_not_the_reference_is_found(monkeypatch):
    adam = row("torch", "Adam")
    right = adam.factory

    def wrong(params, **kwargs):
        backend = os.environ["FUSEDOPT_BACKEND"]
        return right(params, **kwargs | ({"lr": 0.0101} if backend != "reference" else {}))

    assert "ulp" in zoo.check(CPU, adam, adam.variants[0], torch.float32)
    broken = SimpleNamespace(factory=wrong, reductions=False)
    with pytest.raises(AssertionError, match="ulp off"):
        zoo.check(CPU, broken, adam.variants[0], torch.float32)


# --
# Scenarios, with torch's optimizers in the place of ours


class Stand(torch.optim.AdamW):
    """AdamW with the keywords that scenarios use."""

    def __init__(self, params, amp_fused=False, capturable=False, max_grad_norm=None, **kwargs):
        super().__init__(params, fused=amp_fused or None, **kwargs)
        self.max_grad_norm = max_grad_norm

    def upload_hypers(self):
        pass

    def step(self):
        if self.max_grad_norm is not None:
            params = self.param_groups[0]["params"]
            self.grad_norm = torch.nn.utils.clip_grad_norm_(params, self.max_grad_norm)
        super().step()


class Sgd(torch.optim.SGD):
    def __init__(self, params, capturable=False, **kwargs):
        super().__init__(params, **kwargs)

    upload_hypers = Stand.upload_hypers


class IgnoresOverflow(Stand):
    def __init__(self, params, amp_fused=False, **kwargs):
        super().__init__(params, **kwargs)
        self._step_supports_amp_scaling = amp_fused

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.grad = torch.nan_to_num(p.grad / getattr(self, "grad_scale", 1.0))
        super().step()


class KeepsItsRate(Stand):
    def __init__(self, params, capturable=False, **kwargs):
        super().__init__(params, **kwargs)
        self.kept = capturable

    def step(self):
        self.param_groups[0].update({"lr": 1e-2} if self.kept else {})
        super().step()


class DoesNotClip(Stand):
    def step(self):
        self.grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self.param_groups[0]["params"]])
        torch.optim.AdamW.step(self)


@pytest.mark.parametrize(
    ("check", "wrong"),
    [("found_inf", IgnoresOverflow), ("graph", KeepsItsRate), ("clipping", DoesNotClip)],
)
def test_scenarios_pass_what_is_right_and_nothing_else(monkeypatch, check, wrong):
    right = SimpleNamespace(AdamW=Stand, SGD=Sgd)
    monkeypatch.setattr(scenarios, "optim", right)
    assert "ulp" in getattr(scenarios, check)(CPU, "cpp")
    right.AdamW = wrong
    with pytest.raises(AssertionError):
        getattr(scenarios, check)(CPU, "cpp")


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
