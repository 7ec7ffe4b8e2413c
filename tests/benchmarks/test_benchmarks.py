"""The benchmark suite measures what it says: shapes, agreement between providers, CSV, verdicts, picture."""

import csv
import itertools
import math
import re
import subprocess
import tracemalloc
import warnings
from dataclasses import replace
from functools import partial

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import fusedopt
from benchmarks import __main__ as suite
from benchmarks import baseline, cases, measure, plot, providers, situations
from benchmarks.cases import CASES, PAIRS, Case
from benchmarks.measure import Disagreement, Effort, Row
from benchmarks.situations import SITUATIONS

HASTE = Effort(seconds=0.0, rounds=(2, 2), turn=0.001, steps=2, repeats=1, cycle=20)
SMALL = Case("small", "a few tensors of several sizes", ((64,), (33, 5), (1000,), (3, 3, 3), (1,)))


@pytest.fixture
def agg():
    """Pictures without a display."""
    before = plt.get_backend()
    plt.switch_backend("agg")
    yield
    plt.switch_backend(before)


# --
# Cases


@pytest.mark.parametrize(
    ("name", "tensors", "numel"),
    [
        ("resnet-34", 110, 21_797_672),
        ("resnet-50", 161, 25_557_032),
        ("gpt2-124m", 148, 124_439_808),
        ("moe-1000", 1000, 32_154_880),
        ("small-500", 500, 400 * 64 + 100 * 64 * 64),
        ("20x1m", 20, 20 << 20),
        ("groups-465", 465, 465 * 64 * 64),
    ],
)
def test_parameter_counts(name, tensors, numel):
    assert (len(CASES[name].shapes), CASES[name].numel) == (tensors, numel)


def test_the_network_has_the_tensors_of_small_500():
    ours = sorted(p.numel() for p in cases.SmallTensors().parameters())
    assert ours == sorted(math.prod(s) for s in CASES["small-500"].shapes)


def test_the_other_network_has_as_many():
    assert len([*cases.Separable().parameters()]) == 500


@pytest.mark.parametrize("network", [cases.SmallTensors, cases.Separable])
def test_training_brings_new_gradients(network):
    training = cases.Training(network=network)
    params = training.tensors()
    before = [p.grad for p in params]
    training.run()
    assert all(p.grad is not g and p.grad.abs().max() > 0 for p, g in zip(params, before, strict=True))


def test_groups_of_their_own_have_learning_rates_of_their_own():
    rates = CASES["groups-465"].learning_rates()
    assert len(set(rates)) == 465
    assert CASES["20x1m"].learning_rates() == [1.0]


def test_every_bar_looks_at_something_that_is_measured():
    """No bar can stay unmeasured because of a typing error: give every pair every line, and judge."""
    rows = [
        Row(p.case, p.rule, p.mode, name, what, "ms", 1, 1, 1, 1, 1.0)
        for p in PAIRS
        for name in p.providers
        for what in ("step", "host", "launches")
    ]
    rows += [
        Row(case, rule, f"{cache} cache", "fusedopt", "first step", "ms", 1, 1, 1, 1)
        for case, rule in cases.FIRST_STEPS
        for cache in ("empty", "warm")
    ]
    rows += [
        Row(case, rule, "memory", "fusedopt", what, "bytes", 0, 0, 0, 1)
        for case, rule in cases.MEMORY
        for what in ("peak growth", "beyond state")
    ]
    for schedule in measure.SCHEDULES:
        rows += measure.kernels(schedule, HASTE)
    verdicts = plot.judge(plot.Results(plot.lines(rows, plot.facts())))
    assert not [bar.name for bar, _, reached in verdicts if reached is None]


@pytest.mark.parametrize("pattern", ["small-500/AdamW/warm", "adamw/WARM", "small*warm", None])
def test_only(pattern):
    assert cases.matches("small-500/AdamW/warm", pattern)
    assert pattern is None or not cases.matches("20x1m/Lion/training", pattern)


# --
# Providers


@pytest.mark.parametrize("rule", providers.RULES)
def test_providers_of_a_rule_agree(rule):
    params = [p for p in SMALL.tensors() if p.ndim == 2 or rule != "Muon"]
    runners = list(measure._runners(["eager", *providers.PROVIDERS], rule, params, [1.0], print))
    runners = [r for r in runners if r.name not in providers.OPTIONAL]
    assert {"torch default" if rule == "Lion-class" else "eager", "fusedopt"} <= {r.name for r in runners}
    measure.agree(runners, params)


WRONG = {
    "a rate 1 % too high": lambda runner: runner.optimizer.param_groups[0].__setitem__("lr", 1.01e-3),
    "no weight decay": lambda runner: runner.optimizer.param_groups[0].__setitem__("weight_decay", 0.0),
    "another momentum": lambda runner: runner.optimizer.param_groups[0].__setitem__("betas", (0.85, 0.999)),
    "a tensor left out": lambda runner: runner.optimizer.param_groups[0]["params"].pop(),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_provider_is_found_out(how):
    params = SMALL.tensors()
    right = providers.make("torch default", "AdamW", params)
    wrong = providers.make("torch foreach", "AdamW", params)
    WRONG[how](wrong)
    if "rate" in how:
        wrong.set = lambda factor, momentum: None
        right.set = lambda factor, momentum: None
    with pytest.raises(Disagreement, match="torch foreach is"):
        measure.agree([right, wrong], params)


def test_a_provider_that_does_nothing_is_found_out():
    params = SMALL.tensors()
    idle = replace(providers.make("torch default", "AdamW", params), step=lambda: None)
    with pytest.raises(Disagreement):
        measure.agree([idle, providers.make("fusedopt", "AdamW", params)], params)


def test_agreement_leaves_everything_as_it_was():
    params = SMALL.tensors()
    before = [t.detach().clone() for p in params for t in (p, p.grad)]
    measure.agree([providers.make(n, "AdamW", params) for n in ("eager", "fusedopt")], params)
    assert all(map(torch.equal, [t for p in params for t in (p, p.grad)], before))


@pytest.mark.parametrize("name", providers.PEERS)
def test_packages_that_are_here_do_what_fusedopt_does(name):
    """Those that are not say so."""
    module, kinds = providers.PEERS[name]
    for rule in kinds:
        params = SMALL.tensors()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                runner = providers.make(name, rule, params)
        except providers.Unavailable as why:
            assert providers.installed(module) is None and str(why) == f"{name} is not installed"
            continue
        if name in providers.SLOW_TO_START:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs
            _, failed = measure.agree([providers.make("fusedopt", rule, params), runner], params)
        assert not failed and re.fullmatch(r"\S+ \d\S*", runner.package)
    with pytest.raises(providers.Unavailable, match=f"{name} is not taken for NAdam"):
        providers.make(name, "NAdam", SMALL.tensors())


def test_the_peers_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(suite, "PEERS", {"torch": ("torch.optim", {}), "what": ("nobody_has_this", {})})
    assert suite.peers() == f"torch {torch.__version__}; not installed, so left out: what"


def test_an_optional_provider_may_fail(monkeypatch):
    def fail(*_):
        raise RuntimeError("no such\nthing")

    monkeypatch.setitem(providers.PROVIDERS, "deepspeed", fail)
    said = []
    assert not list(measure._runners(["deepspeed"], "AdamW", SMALL.tensors(), [1.0], said.append))
    assert said == ["  without deepspeed: RuntimeError: no such thing"]


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", [[1], [5, 1000, 3], [64] * 400 + [4096] * 100, [100_003]])
def test_pieces_cover_every_element_once_and_evenly(sizes, threads):
    pieces, bounds = baseline.split(sizes, threads)
    seen = [np.zeros(size, int) for size in sizes]
    for row, begin, end in pieces:
        seen[row][begin:end] += 1
    assert all((s == 1).all() for s in seen)
    work = [(pieces[a:b, 2] - pieces[a:b, 1]).sum() for a, b in itertools.pairwise(bounds)]
    assert len(work) == threads
    assert max(work) - min(work) <= sum(sizes) % threads + 2 * baseline.ALIGN


def test_the_launch_clock_sees_fusedopt_only():
    params = SMALL.tensors()
    clock = measure.LaunchClock()
    providers.make("torch default", "AdamW", params).step()
    assert clock.take() is None
    providers.make("fusedopt", "AdamW", params).step()
    assert clock.take() > 0


# --
# Situations


def ids(chosen):
    return [pytest.param(s, id=s.id) for s in chosen]


@pytest.mark.parametrize("situation", ids(s for s in SITUATIONS if not s.world))
@pytest.mark.filterwarnings("ignore:fusedopt. the callback cumulative runs eagerly:RuntimeWarning")
def test_providers_of_a_situation_agree(situation):
    params = CASES[situation.case].small(tensors=20).tensors()
    situation.start(params)
    before = [p.grad for p in params]
    runners = situation.runners(params)
    assert "fusedopt" in {r.name for r in runners}
    assert len(runners) > 1 or not situation.bounds[0].against
    measure.agree(runners, params, situation.checked)
    assert all(p.grad is g for p, g in zip(params, before, strict=True))


@pytest.mark.slow
def test_processes_of_a_situation_agree():
    """All in the same two processes: it takes those much longer to import what they need than to do it."""
    shared = [s for s in SITUATIONS if s.world == 2]
    rows = situations.in_processes(shared, HASTE, layers=2)
    found = {(r.case, r.rule, r.mode, r.provider) for r in rows if r.what == "step"}
    assert len(shared) > 1 and found == {(*s.key, provider) for s in shared for provider in s.providers}


def test_every_bar_of_a_situation_looks_at_something_that_is_measured():
    rows = [
        Row(*s.key, name, what, "ms", 1, 1, 1, 1, 1.0)
        for s in SITUATIONS
        for name in (*s.providers, *(["fusedopt plain"] if s.plain else []))
        for what in ("step", *(b.what for b in s.bounds))
    ]
    assert len({s.key for s in SITUATIONS}) == len(SITUATIONS)
    verdicts = plot.judge(plot.Results(plot.lines(rows, plot.facts())), plot.SITUATION_BARS)
    assert not [bar.name for bar, _, reached in verdicts if reached is None]


def test_a_situation_from_end_to_end(tmp_path, monkeypatch, capsys, agg):
    monkeypatch.setattr(suite, "QUICK", HASTE)
    assert suite.main(["--quick", "--only", "lr a tensor", "--out", str(tmp_path)]) == 0
    said = (tmp_path / f"{plot.slug()}.md").read_text()
    assert re.search(
        r"lr a tensor, AdamW: speed over torch fused +\| ≥ 8× +\| [\d.]+× \(.*\| (yes|\*\*no)", said
    )
    assert "lr a tensor, AdamW: speed over torch fused" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))


# --
# The suite


def test_a_pair_from_end_to_end(tmp_path, monkeypatch, capsys, agg):
    monkeypatch.setattr(suite, "QUICK", HASTE)
    arguments = ["--quick", "--only", "groups-465", "--out", str(tmp_path)]
    assert suite.main(arguments) == 0
    path = tmp_path / f"{plot.slug()}.csv"
    found = plot.Results(plot.read(path))
    line = found.line("groups-465", "AdamW", "warm", "fusedopt")
    assert 0 < line["p20"] <= line["p50"] <= line["p80"]
    assert (line["ratio"], line["rounds"], line["torch"]) == (1.0, 2, torch.__version__)
    assert line["fusedopt"] == fusedopt.__version__
    assert all(line[fact] for fact in plot.FACTS)
    assert found.ratio("groups-465", "AdamW", "warm", "torch fused") > 1
    assert found.p50("groups-465", "AdamW", "warm", "fusedopt", "launches") == 1
    host = found.p50("groups-465", "AdamW", "warm", "fusedopt", "host")
    assert 0 < host < line["p80"]
    assert "| groups-465 | AdamW | warm" in path.with_suffix(".md").read_text()
    assert "465 groups: launches per step" in capsys.readouterr().out
    assert drawn_pixels(path.with_suffix(".png")) > 0.02


def drawn_pixels(path):
    """The fraction of a picture that is not white."""
    return (matplotlib.image.imread(path)[..., :3].min(-1) < 0.9).mean()


def test_list_and_a_pattern_that_matches_nothing(capsys):
    assert suite.main(["--list", "--quick"]) == 0
    assert "small-500/AdamW/training" in capsys.readouterr().out.splitlines()
    assert suite.main(["--only", "no such thing"]) == 2
    assert "nothing matches" in capsys.readouterr().out


def test_a_new_run_replaces_the_lines_it_measured_and_no_others(tmp_path):
    def line(case, value, commit):
        row = Row.of((case, "AdamW", "warm", "fusedopt"), "step", "ms", [value])
        return plot.lines([row], plot.facts() | {"commit": commit})

    path = tmp_path / "x.csv"
    plot.write(path, line("20x1m", 1.0, "old") + line("small-500", 2.0, "old"))
    merged = plot.merge(plot.read(path), line("20x1m", 3.0, "new"))
    assert [(m["case"], m["p50"], m["commit"]) for m in merged] == [
        ("small-500", 2.0, "old"),
        ("20x1m", 3.0, "new"),
    ]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout in the place of this one, with the folder of results in it; a job that takes no time."""
    for name in ("benchmarks/results", "fusedopt", "docs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "fusedopt/a.py").write_text("A = 1\n")
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "FOLDER", tmp_path / "benchmarks/results")
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def git(folder, *arguments):
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True)


def commit(folder):
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "a state")
    return plot.facts()["commit"]


def job(case, meanwhile=lambda: None):
    def run():
        meanwhile()
        return [Row.of((case, "AdamW", "warm", "fusedopt"), "step", "ms", [1.0, 2.0])]

    return suite.Job(case, run)


def test_results_are_of_one_commit(checkout):
    path = checkout / "benchmarks/results/x.csv"
    suite.run([job("20x1m"), job("small-500")], path, keep=False)
    (checkout / "docs/notes.md").write_text("A page changes no number.\n")
    suite.run([job("20x1m")], path, keep=True)
    first = plot.facts()["commit"]
    assert [line["commit"] for line in plot.read(path)] == [first] * 2 and "dirty" not in first
    second, before = commit(checkout), path.read_text()
    with pytest.raises(
        plot.NotOneState, match=f"lines of {first} beside those of {second}: measure everything, or"
    ):
        suite.run([job("20x1m")], path, keep=True)
    assert path.read_text() == before
    suite.run([job("20x1m")], path, keep=False)
    assert [line["commit"] for line in plot.read(path)] == [second]


@pytest.mark.parametrize("name", ["fusedopt/a.py", "fusedopt/new.py"])
def test_no_results_of_a_tree_that_is_not_committed(name, checkout):
    path = checkout / "benchmarks/results/x.csv"
    (checkout / name).write_text("A = 2\n")
    assert plot.facts()["commit"].endswith("-dirty")
    with pytest.raises(plot.NotOneState, match=rf"not committed: {name}\. Commit or stash it first"):
        suite.run([job("20x1m")], path, keep=False)
    assert not path.exists()
    suite.run([job("20x1m")], checkout / "elsewhere/x.csv", keep=False)


def test_no_results_of_a_tree_that_changes_meanwhile(checkout):
    path = checkout / "benchmarks/results/x.csv"
    edit = partial((checkout / "fusedopt/a.py").write_text, "A = 3\n")
    with pytest.raises(plot.NotOneState, match=r"not committed: fusedopt/a\.py"):
        suite.run([job("20x1m"), job("small-500", edit)], path, keep=False)
    assert [line["case"] for line in plot.read(path)] == ["20x1m"]


def test_a_refusal_is_said(checkout, monkeypatch, capsys):
    (checkout / "fusedopt/a.py").write_text("A = 2\n")
    monkeypatch.setattr(suite, "jobs", lambda *_: [job("20x1m")])
    assert suite.main([]) == 1
    assert "is of one commit: not committed: fusedopt/a.py" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(suite.FOLDER.glob("*.csv")), ids=lambda path: path.stem)
def test_what_is_kept_is_of_one_commit(path):
    with path.open(newline="", encoding="utf-8") as file:
        commits = {line["commit"] for line in csv.DictReader(file)}
    assert len(commits) == 1 and not commits.pop().endswith(("-dirty", "unknown"))


def test_what_is_written_is_read_again(tmp_path):
    rows = [
        Row("tiny", "AdamW", "warm", "eager", "step", "ms", 0.12345678, 123456.7, math.inf, 3),
        Row("tiny", "AdamW", "memory", "eager", "peak growth", "bytes", 0, 4096, 1e9, 1, note='a, "b"'),
    ]
    path = tmp_path / "x.csv"
    plot.write(path, plot.lines(rows, plot.facts()))
    a, b = plot.read(path)
    assert (a["p20"], a["p50"], a["p80"], a["rounds"]) == (0.1235, 123457, math.inf, 3)
    assert math.isnan(a["ratio"])
    assert (b["p50"], b["p80"], b["note"]) == (4096, 1e9, 'a, "b"')


def test_the_picture_of_a_whole_run(tmp_path, agg):
    rows = [
        Row(p.case, p.rule, p.mode, name, "step", "ms", 0.9 * k, k, 1.2 * k, 9, 1.0 * k)
        for p in PAIRS
        for k, name in enumerate(p.providers, 1)
    ]
    path = tmp_path / "bench.png"
    plot.draw(plot.Results(plot.lines(rows, plot.facts())), path)
    assert drawn_pixels(path) > 0.03


@pytest.fixture
def untraced():
    """The probe is meant for a process of its own, and leaves memory traced."""
    yield
    tracemalloc.stop()


def test_the_probe_tells_state_from_the_rest(untraced):
    found = measure.probe("tiny", "AdamW", "fusedopt")
    assert found["first"] > 0
    params = CASES["tiny"].tensors()
    runner = providers.make("fusedopt", "AdamW", params)
    runner.step()
    assert measure.state_bytes(runner.optimizer) == 2 * 4 * CASES["tiny"].numel
    assert abs(found["peak growth"]) < 1 << 20


def test_peak_growth_sees_memory_that_is_gone_again():
    assert measure.peak_growth(lambda: torch.ones(8 << 20).sum()) >= 4 * (8 << 20) * 0.9
    assert measure.peak_growth(lambda: None) < 1 << 20


@pytest.mark.parametrize("name", ["SGD", "Lookahead"])
def test_kernels_of_a_schedule(name):
    schedule = next(s for s in measure.SCHEDULES if s.name == name)
    first, last = measure.kernels(schedule, HASTE)
    assert (first.mode, first.p50) == ("first step", 1)
    assert (last.mode, last.p50) == ("one-cycle", schedule.kernels)
    assert "first step" in last.note
