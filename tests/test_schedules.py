"""Schedules compile nothing, first steps are quick, and nothing but the state grows with the model."""

import gc
import json
import math
import os
import subprocess
import sys
import tracemalloc
import warnings
import weakref
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from factories import parameters_with_gradients
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fusedopt import average_grad, momentum_step, sgd_step, step_stat, weight_decay
from fusedopt.extension import leaf
from fusedopt.step import transforms


def parameters(n=3, size=20):
    return parameters_with_gradients([(size,)] * n)


def one_cycle(opt, steps=60, peak=0.05):
    """fastai's ``fit_one_cycle``: both lr and momentum on their way up and down; weight decay moves, too."""
    for t in range(steps):
        warmth = 0.5 - 0.5 * math.cos(2 * math.pi * (t + 1) / (steps + 1))
        opt.set_hypers(lr=peak * (0.04 + warmth), mom=0.95 - 0.1 * warmth, wd=0.01 * (0.1 + warmth))
        opt.step()
        yield opt.explain()


FLAT = dict(
    SGD=lambda ps: fusedopt.SGD(ps, lr=0.1, mom=0.9, wd=0.01),
    RMSProp=lambda ps: fusedopt.RMSProp(ps, lr=0.1, mom=0.9, wd=0.01),
    Adam=lambda ps: fusedopt.Adam(ps, lr=0.1),
    Lamb=lambda ps: fusedopt.Lamb(ps, lr=0.1, wd=0.01),
)


@pytest.mark.parametrize("name", FLAT)
def test_a_one_cycle_compiles_nothing_after_the_first_step(name):
    params = parameters()
    reports = list(one_cycle(FLAT[name](params)))
    assert [len(r.compiled) for r in reports] == [1] * 60
    assert {r.compiled for r in reports} == {reports[0].compiled}
    assert {(r.launches, r.backend, r.eager) for r in reports} == {(2 if name == "Lamb" else 1, "cpp", ())}
    expected = parameters()
    reference = FLAT[name](expected)
    reference.backend = "reference"
    list(one_cycle(reference))
    torch.testing.assert_close(params, expected, rtol=1e-4, atol=1e-5)


def test_mutation_a_schedule_that_is_not_followed_is_noticed():
    params, still = parameters(), parameters()
    list(one_cycle(FLAT["Adam"](params)))
    opt = FLAT["Adam"](still)
    for _ in range(60):
        opt.step()
    assert not torch.allclose(params[0], still[0], rtol=1e-4, atol=1e-5)


def test_a_number_that_becomes_zero_is_a_branch_and_says_so():
    """``if wd != 0`` in weight_decay: its kernel without decay is another one, compiled once."""
    opt = fusedopt.SGD(parameters(), lr=0.1, wd=0.01)
    for wd in (0.01, 0.02, 0.0, 0.0, 0.03, 0.0):
        opt.set_hyper("wd", wd)
        opt.step()
    assert [c.why for c in opt.explain().compiled] == ["first step", "(wd != 0) is now False"]


def test_radam_has_two_kernels_and_says_why():
    opt = fusedopt.RAdam(parameters(), lr=0.1)
    counts = [len(r.compiled) for r in one_cycle(opt)]
    assert counts == [1] * 5 + [2] * 55, "its variance is known well enough at the sixth step"
    why = opt.explain().compiled[1].why
    assert why.endswith("<= 5) is now False") and "sqr_mom" in why


def test_ranger_has_four_kernels_and_says_why():
    """Lookahead's first step keeps the weights; every sixth synchronises; RAdam turns at the sixth, too."""
    opt = fusedopt.ranger(parameters(), lr=0.1)
    counts = [len(r.compiled) for r in one_cycle(opt)]
    assert counts == [1] + [2] * 4 + [3] + [4] * 54
    whys = [c.why for c in opt.explain().compiled]
    assert whys[0] == "first step"
    assert "state" in whys[1] and "slow" in whys[1] and "is there now" in whys[1]
    assert "% lookahead_k) != 0) is now False" in whys[2] and "<= 5) is now False" in whys[2]
    assert "% lookahead_k) != 0) is now True" in whys[3] and "<= 5)" not in whys[3]


def test_lookahead_alone_has_three():
    opt = fusedopt.Lookahead(fusedopt.SGD(parameters(), lr=0.1, mom=0.9, wd=0.1), k=3)
    counts = [len(r.compiled) for r in one_cycle(opt, 20)]
    assert counts == [1, 2] + [3] * 18


@pytest.mark.filterwarnings("ignore:fusedopt. most of the last")
def test_a_rule_that_reads_its_numbers_on_the_host_still_follows_its_schedule():
    """``math`` on a recorded number holds for that number only: such callbacks are run on every step."""

    def cosine(p, lr, step, **kwargs):
        p.data.sub_(p.grad.data, alpha=lr * math.cos(step / 10))

    both = []
    for backend in ("reference", "cpp"):
        params = parameters()
        opt = fusedopt.Optimizer(params, [step_stat, cosine], lr=0.1, backend=backend)
        reports = list(one_cycle(opt, 30))
        both.append(params)
    assert len(reports[-1].compiled) == 1, "it is the same kernel all the same"
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)


def test_what_a_callback_reads_elsewhere_is_read_on_every_step():
    box = {"scale": 1.0}
    scale = 1.0

    def from_box(p, lr, **kwargs):
        p.data.sub_(p.grad.data, alpha=lr * box["scale"])

    def from_closure(p, lr, **kwargs):
        p.data.sub_(p.grad.data, alpha=lr * scale)

    class Callable:
        def __call__(self, p, lr, **kwargs):
            p.data.sub_(p.grad.data, alpha=lr * self.scale)

    from_object = Callable()
    for cb in (from_box, from_closure, from_object):
        params = parameters(1)
        opt = fusedopt.Optimizer(params, cb, lr=1.0)
        start, g = params[0].detach().clone(), params[0].grad
        for k in range(5):
            box["scale"] = scale = from_object.scale = 2.0**-k
            opt.step()
        torch.testing.assert_close(params[0].detach(), start - g * 1.9375)
        assert len(opt.explain().compiled) == 1


def shrink(x):
    return x * 0.5


def shrinking(p, lr, times=1.0, **kwargs):
    p.data.sub_(shrink(p.grad.data) * (lr * times))


def test_a_helper_or_a_callback_defined_anew_counts_from_the_next_step_on(monkeypatch):
    """As in a notebook whose cells are run again, or under autoreload: names stay, what they stand for does not."""

    def fresh():
        params = parameters(1)
        return fusedopt.Optimizer(params, shrinking, lr=1.0), params[0]

    opt, p = fresh()
    start, g = p.detach().clone(), p.grad
    for _ in range(4):
        opt.step()
    monkeypatch.setattr(sys.modules[__name__], "shrink", lambda x: x * 2.0)
    opt.step()
    torch.testing.assert_close(p.detach(), start - 4 * g)
    other, q = fresh()
    other.step()
    torch.testing.assert_close(q.detach(), start - 2 * g)

    def doubled(p, lr, times=2.0, **kwargs):
        p.data.sub_(shrink(p.grad.data) * (lr * times))

    monkeypatch.setattr(shrinking, "__defaults__", doubled.__defaults__)
    opt.step()
    torch.testing.assert_close(p.detach(), start - 8 * g)
    monkeypatch.setattr(shrinking, "__code__", (lambda p, lr, times, **kwargs: p * times).__code__)
    with pytest.warns(RuntimeWarning, match="shrinking .* changed nothing"):
        opt.step()
    torch.testing.assert_close(p.detach(), start - 8 * g)


def test_numbers_bound_by_partial_may_be_of_any_kind():
    def scaled(p, lr, scales=(), **kwargs):
        p.data.sub_(p.grad.data * (lr * scales[0]))

    for scales in ((0.5,), [0.5], np.array([0.5]), torch.tensor([0.5], dtype=torch.float64)):
        params = parameters(1)
        start = params[0].detach().clone()
        opt = fusedopt.Optimizer(params, partial(scaled, scales=scales), lr=1.0)
        for _ in range(3):
            opt.step()
        torch.testing.assert_close(params[0].detach(), start - 1.5 * params[0].grad)


# --
# What the first step does (how long it takes is measured in benchmarks/)

FIRST = """
import json, sys
import torch, fusedopt

def first_step(title, sizes):
    params = [torch.nn.Parameter(torch.randn(n)) for n in sizes]
    for p in params:
        p.grad = torch.randn(p.shape)
    cbs = fusedopt.Adam(params, lr=0.1).cbs
    opt = fusedopt.Optimizer(params, cbs, lr=0.1, mom=0.9, sqr_mom=0.99, wd=0.01, backend="cpp", title=title)
    opt.step()
    (compiled,) = opt.explain().compiled
    return compiled.cached

unwanted = ["triton"] if "triton" in sys.modules else []  # making an optimizer of torch's imports it
torch.randn(10).sum()
cached = [first_step("small", [20, 30]), first_step("three hundred", [10 + i for i in range(300)])]
unwanted += [m for m in ("fastai", "fastcore") if m in sys.modules]
print(json.dumps(dict(cached=cached, unwanted=unwanted)))
"""


def test_the_first_step_compiles_one_kernel_and_none_with_a_warm_cache(tmp_path):
    """In a fresh process, for a small model and for one of 300 parameters, whose kernel has another title and the same
    code; nothing is imported in vain."""
    env = dict(os.environ, FUSEDOPT_CACHE_DIR=str(tmp_path))
    for found in (False, True):
        out = subprocess.run(
            [sys.executable, "-c", FIRST], env=env, capture_output=True, text=True, check=True
        )
        assert json.loads(out.stdout) == {"cached": [found, True], "unwanted": []}


# --
# What grows with the model


@pytest.fixture
def launches(monkeypatch):
    """The stages that were really launched: counted by the extension, else by what stands in for it."""
    if leaf.native is not None:
        before = leaf.native.launched()[0]
        return lambda: leaf.native.launched()[0] - before
    seen, run = [], leaf.run_cpu
    monkeypatch.setattr(leaf, "run_cpu", lambda stages, *rest: seen.extend(stages) or run(stages, *rest))
    return lambda: len(seen)


@pytest.mark.parametrize(("name", "per_step"), [("Adam", 1), ("Lamb", 2)])
@pytest.mark.parametrize("n", [1, 7, 300])
def test_launches_do_not_depend_on_the_number_of_tensors(name, per_step, n, launches):
    opt = FLAT[name](parameters(n))
    for step in range(1, 5):
        opt.step()
        assert launches() == step * per_step
    assert opt.explain().launches == per_step
    assert {s.tensors for s in opt.explain().stages} == {n}


def test_launches_do_not_depend_on_the_number_of_groups(launches):
    params = parameters(30)
    opt = fusedopt.Adam([[p] for p in params], lr=[0.1 / (i + 1) for i in range(30)])
    for step in range(1, 5):
        opt.step()
        assert launches() == step
        for p in params[:step]:  # counts of their own do not make launches of their own
            opt.state[p]["step"] += step
    expected = parameters(30)
    reference = fusedopt.Adam([[p] for p in expected], lr=[0.1 / (i + 1) for i in range(30)])
    reference.backend = "reference"
    for step in range(1, 5):
        reference.step()
        for p in expected[:step]:
            reference.state[p]["step"] += step
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-6)


class Made(TorchDispatchMode):
    """Counts the bytes of every tensor that torch makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __enter__(self):
        self.patch = mock.patch.object(
            transforms, "active", lambda: False
        )  # or the step would be by torch's operations
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not any(out is a for a in args):
            self.bytes += out.nbytes
        return out


@pytest.mark.parametrize("name", FLAT)
def test_no_buffers_but_the_state_grow_with_the_model(name):
    size = 1 << 20
    params = parameters(2, size)
    opt = FLAT[name](params)
    opt.explain()  # compiles
    with Made() as made:
        opt.step()
    state = sum(v.nbytes for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    assert state == 2 * (1 if name == "SGD" else 2) * size * 4
    assert made.bytes == state, "the first step makes the state and nothing else"
    for p in params:
        p.grad = p.grad.clone()
    peaks = []
    for _ in range(2):  # in the first round Python fills caches of its own
        tracemalloc.start()
        try:
            with Made() as made:
                for _ in range(3):
                    opt.step()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert made.bytes == 0
    assert peaks[1] < 1 << 17, "chunk tables and part results: a few words for every 65,536 elements"


def test_nothing_piles_up_over_many_steps():
    def host(p, **kwargs):
        p.data.mul_(1 + 0 * p.data.sum().item())

    opts = [
        FLAT["Adam"](parameters()),
        fusedopt.Optimizer(
            parameters(), [weight_decay, average_grad, host, momentum_step], lr=0.1, mom=0.9, wd=0.1
        ),
        fusedopt.Optimizer(
            parameters(), [lambda p, lr, **_: p.data.sub_(p.grad.data * lr)], lr=0.1, backend="reference"
        ),
    ]

    def steps(n):
        for t in range(n):
            for opt in opts:
                opt.set_hyper("lr", 0.1 / (t + 1))
                for p in opt.param_groups[0]["params"]:
                    p.grad = torch.full_like(p, 1.0)
                opt.step()
        gc.collect()
        return len(gc.get_objects())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        before = steps(20)
        after = steps(100)
    assert after - before < 100, f"{after - before} objects more after 100 steps"


class Model:
    """Something a callback may close over, and that must not stay alive for it."""


def test_an_optimizer_that_is_gone_leaves_nothing_behind():
    def life():
        model, params = Model(), parameters()

        def mine(p, lr, **kwargs):
            assert model is not None
            p.data.sub_(p.grad.data * lr)

        def pure(p, lr, **kwargs):
            sgd_step(p, lr)

        opts = [fusedopt.Optimizer(params, cbs, lr=0.1) for cbs in ([weight_decay, mine], [pure])]
        with pytest.warns(RuntimeWarning, match="the callback mine runs eagerly"):
            for opt in (*opts, *opts, *opts):
                opt.step()
        return [weakref.ref(x) for x in (model, params[0], *opts)]

    left = life()
    gc.collect()
    assert [ref() for ref in left] == [None] * 4
