"""Replay of the scalar program: exactly what the callbacks would have done, or not at all."""

import contextlib
import functools
import itertools
import math
import os
import random
import struct
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import atan2
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from factories import parameters_with_gradients, params_of
from helpers import assert_same_bits, needs_extension, operands, signature
from torch import nn

import fusedopt
from fusedopt import backends, callbacks, weight_decay
from fusedopt.backends.cpp import backend as cpu
from fusedopt.extension import leaf
from fusedopt.step import buckets, verdicts
from fusedopt.table import TABLE
from fusedopt.trace.number import ARITHMETIC
from fusedopt.trace.purity import ACTS, PURE, READS, VARIES, Verdict, examine
from fusedopt.trace.replay import Replay
from fusedopt.trace.snapshot import Snapshot
from fusedopt.trace.sources import Sources
from fusedopt.trace.standins import StandIns
from fusedopt.trace.tracer import trace


def is_pure(callback):
    return examine(callback).level == PURE


def parameters(n=1, dtype=torch.float64):
    return parameters_with_gradients([(5,)] * n, dtype)


def make(cbs, n=1, backend="cpp", **hypers):
    """An optimizer with one group per parameter. One title, so that one kernel serves nearly all tests here."""
    params = parameters(n)
    groups = [{"params": [p]} for p in params]
    return fusedopt.Optimizer(groups, cbs, backend=backend, title="replay", **{"lr": 0.1} | hypers)


def forget(opt):
    """The next step is done the long way, if need be by replay, and not repeated as a whole."""
    opt.engine.bound.clear()


@pytest.fixture(autouse=True)
def fresh_traces():
    """No trace is shared between tests."""
    buckets.known_traces.cache_clear()
    yield
    buckets.known_traces.cache_clear()


@pytest.fixture
def traces(monkeypatch):
    """The traces made, as a list that grows: none is made by a step that replays."""
    made = []
    original = buckets.trace

    def spy(*args, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(buckets, "trace", spy)
    return made


@pytest.fixture
def naive(monkeypatch):
    """The mutation: every callback counts as pure, and nothing around it ever changes."""
    monkeypatch.setattr(verdicts, "examine", lambda callback: Verdict(PURE))
    monkeypatch.setattr(Sources, "changed", lambda self: "")
    monkeypatch.setattr(Sources, "now", lambda self: [])
    monkeypatch.setattr(Snapshot, "restored", lambda self: False)


# --
# Unsound cases: callbacks that do not depend on their arguments alone

FACTOR = 1.0
FACTORS = {"it": 1.0}


class Settings:
    factor = 1.0


def shrink(x):
    return x * 0.5


def grow(x):
    return x * 2.0


HELPER = shrink


@dataclass
class Unsound:
    """A callback, and what changes between steps: ``change(t, opt)`` before step t."""

    callback: Callable
    change: Callable = lambda t, opt: None


def descend(p, x):
    p.data.add_(p.grad.data, alpha=-x)


def closure_over_a_list():
    factors = [1.0]

    def cb(p, lr, **kwargs):
        descend(p, lr * factors[0])

    return Unsound(cb, lambda t, opt: factors.__setitem__(0, 1.0 + t))


def closure_over_a_number():
    factor = 1.0

    def cb(p, lr, **kwargs):
        descend(p, lr * factor)

    def change(t, opt):
        nonlocal factor
        factor = 1.0 + t

    return Unsound(cb, change)


def counter_of_its_own():
    calls = 0

    def cb(p, lr, **kwargs):
        nonlocal calls
        calls += 1
        descend(p, lr * calls)

    return Unsound(cb)


def iterator_in_a_closure():
    count = itertools.count()

    def cb(p, lr, **kwargs):
        descend(p, lr * next(count))

    return Unsound(cb)


def global_number():
    def cb(p, lr, **kwargs):
        descend(p, lr * FACTOR)

    return Unsound(cb, lambda t, opt: globals().update(FACTOR=1.0 + t))


def global_counter_it_rebinds():
    def cb(p, lr, **kwargs):
        global FACTOR
        FACTOR = FACTOR + 1
        descend(p, lr * FACTOR)

    return Unsound(cb, lambda t, opt: globals().update(FACTOR=1.0) if t == 0 else None)


def global_dict():
    def cb(p, lr, **kwargs):
        descend(p, lr * FACTORS["it"])

    return Unsound(cb, lambda t, opt: FACTORS.update(it=1.0 + t))


def python_random():
    def cb(p, lr, **kwargs):
        descend(p, lr * random.random())

    return Unsound(cb, lambda t, opt: random.seed(0) if t == 0 else None)


def random_generator_in_a_closure():
    rng = random.Random(0)

    def cb(p, lr, **kwargs):
        descend(p, lr * rng.random())

    return Unsound(cb)


def torch_random():
    def cb(p, lr, **kwargs):
        descend(p, lr * torch.rand(()).item())

    return Unsound(cb, lambda t, opt: torch.manual_seed(0) if t == 0 else None)


def torch_random_under_another_name():
    def cb(p, lr, **kwargs):
        module = torch
        descend(p, lr * module.rand(()).item())

    return Unsound(cb, lambda t, opt: torch.manual_seed(0) if t == 0 else None)


def torch_generator():
    generator = torch.Generator().manual_seed(0)

    def cb(p, lr, **kwargs):
        descend(p, lr * torch.rand((), generator=generator).item())

    return Unsound(cb)


def numpy_random():
    def cb(p, lr, **kwargs):
        descend(p, lr * np.random.rand())

    return Unsound(cb, lambda t, opt: np.random.seed(0) if t == 0 else None)


def numpy_generator():
    rng = np.random.default_rng(0)

    def cb(p, lr, **kwargs):
        descend(p, lr * rng.random())

    return Unsound(cb)


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, p, lr, **kwargs):
        self.calls += 1
        descend(p, lr * self.calls)

    def method(self, p, lr, **kwargs):
        self(p, lr)


def callable_object():
    return Unsound(Counting())


def method():
    return Unsound(Counting().method)


def method_of_a_global_tensor():
    total = torch.ones(())
    read = total.sum  # a bound method that does not show what it is bound to

    def cb(p, lr, **kwargs):
        descend(p, lr * read().item())

    return Unsound(cb, lambda t, opt: total.fill_(1.0 + t))


def mutable_default():
    def cb(p, lr, memory=[0], **kwargs):  # noqa: B006
        memory[0] += 1
        descend(p, lr * memory[0])

    return Unsound(cb)


def attribute_of_an_object():
    settings = Settings()

    def cb(p, lr, **kwargs):
        descend(p, lr * settings.factor)

    return Unsound(cb, lambda t, opt: setattr(settings, "factor", 1.0 + t))


def attribute_of_a_class():
    def cb(p, lr, **kwargs):
        descend(p, lr * Settings.factor)

    return Unsound(cb, lambda t, opt: setattr(Settings, "factor", 1.0 + t))


def attribute_of_a_function():
    def cb(p, lr, **kwargs):
        descend(p, lr * shrink.max)  # by a name that a tensor method has, too

    return Unsound(cb, lambda t, opt: setattr(shrink, "max", 1.0 + t))


def the_time():
    def cb(p, lr, **kwargs):
        descend(p, lr * time.thread_time())

    return Unsound(cb)


def the_environment():
    def cb(p, lr, **kwargs):
        descend(p, lr * float(os.environ["FUSEDOPT_TEST_FACTOR"]))

    return Unsound(cb, lambda t, opt: os.environ.update(FUSEDOPT_TEST_FACTOR=str(t)))


def mutable_argument_of_a_partial():
    factors = [1.0]

    def cb(p, lr, factors, **kwargs):
        descend(p, lr * factors[0])

    return Unsound(partial(cb, factors=factors), lambda t, opt: factors.__setitem__(0, 1.0 + t))


def object_among_the_hyperparameters():
    settings = Settings()

    def cb(p, lr, settings=None, **kwargs):
        descend(p, lr * settings.mean)  # a name that tensors have, too

    def change(t, opt):
        settings.mean = 1.0 + t
        opt.param_groups[0]["settings"] = settings

    return Unsound(cb, change)


def dict_in_the_state():
    def cb(p, lr, table=None, **kwargs):
        descend(p, lr * table["factor"])

    def change(t, opt):
        opt.state[params_of(opt)[0]].setdefault("table", {})["factor"] = 1.0 + t

    return Unsound(cb, change)


def helper_in_a_global_replaced():
    def cb(p, lr, **kwargs):
        descend(p, HELPER(lr))

    return Unsound(cb, lambda t, opt: globals().update(HELPER=grow if t % 2 else shrink))


def helper_in_a_closure_replaced():
    helper = shrink

    def cb(p, lr, **kwargs):
        descend(p, helper(lr))

    def change(t, opt):
        nonlocal helper
        helper = grow if t % 2 else shrink

    return Unsound(cb, change)


def code_replaced():
    def cb(p, lr, **kwargs):
        descend(p, lr * 0.5)

    def other(p, lr, **kwargs):
        descend(p, lr * 2.0)

    def third(p, lr, **kwargs):
        descend(p, lr * 3.0)

    return Unsound(cb, lambda t, opt: setattr(cb, "__code__", (other if t % 2 else third).__code__))


UNSOUND = [
    closure_over_a_list,
    closure_over_a_number,
    counter_of_its_own,
    iterator_in_a_closure,
    global_number,
    global_counter_it_rebinds,
    global_dict,
    python_random,
    random_generator_in_a_closure,
    torch_random,
    torch_random_under_another_name,
    torch_generator,
    numpy_random,
    numpy_generator,
    callable_object,
    method,
    method_of_a_global_tensor,
    mutable_default,
    attribute_of_an_object,
    attribute_of_a_class,
    attribute_of_a_function,
    the_time,
    the_environment,
    mutable_argument_of_a_partial,
    object_among_the_hyperparameters,
    dict_in_the_state,
    helper_in_a_global_replaced,
    helper_in_a_closure_replaced,
    code_replaced,
]
BY_CHANGE = UNSOUND[-3:]
"""Pure as they stand: what makes them unsound is that what they are made of is replaced."""
BY_ARGUMENTS = [object_among_the_hyperparameters, dict_in_the_state]
"""What makes them unsound is that an argument's contents change."""
BY_CALLBACK = [f for f in UNSOUND if f not in BY_ARGUMENTS]


def run_unsound(factory, backend, steps=6):
    """What each step leaves of the parameter, from the same beginning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "thread_time", partial(next, itertools.count(1)))
        patch.setenv("FUSEDOPT_TEST_FACTOR", "1")
        case = factory()
        opt = make(case.callback, backend=backend)
        seen = []
        for t in range(steps):
            case.change(t, opt)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # that it runs eagerly
                opt.step()
            seen.append(params_of(opt)[0].detach().clone())
    return seen


@pytest.fixture
def unsound(request):
    yield request.param
    globals().update(FACTOR=1.0, HELPER=shrink)
    FACTORS["it"] = Settings.factor = 1.0
    vars(shrink).pop("max", None)


@pytest.mark.parametrize("unsound", UNSOUND, indirect=True, ids=attrgetter("__name__"))
def test_a_callback_that_reads_more_than_its_arguments_is_run_on_every_step(unsound):
    for ours, eager in zip(run_unsound(unsound, "cpp"), run_unsound(unsound, "reference"), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("unsound", BY_CALLBACK, indirect=True, ids=attrgetter("__name__"))
def test_mutation_naive_replay_would_be_wrong(unsound, naive):
    found = zip(run_unsound(unsound, "cpp"), run_unsound(unsound, "reference"), strict=True)
    assert not all(torch.allclose(ours, eager, rtol=1e-3, atol=1e-3) for ours, eager in found)


@pytest.mark.parametrize("factory", BY_ARGUMENTS, ids=attrgetter("__name__"))
def test_mutation_objects_taken_for_plain_values_would_be_wrong(factory, monkeypatch):
    monkeypatch.setattr(buckets, "is_plain", lambda values: True)
    found = zip(run_unsound(factory, "cpp"), run_unsound(factory, "reference"), strict=True)
    assert not all(torch.allclose(ours, eager, rtol=1e-3, atol=1e-3) for ours, eager in found)


def test_an_optimizer_made_after_a_helper_was_replaced_does_not_share_the_old_trace(monkeypatch):
    def cb(p, lr, **kwargs):
        descend(p, HELPER(lr))

    steps = []
    for helper in (shrink, grow, shrink):
        monkeypatch.setitem(globals(), "HELPER", helper)
        opt = make(cb)
        before = params_of(opt)[0].detach().clone()
        opt.step()
        steps.append(((before - params_of(opt)[0]) / params_of(opt)[0].grad)[0].item())
    assert steps == pytest.approx([0.05, 0.2, 0.05])


# --
# Purity


READING = [closure_over_a_number, global_number, attribute_of_an_object, attribute_of_a_class]
"""What they do besides arithmetic is to read constants, which may be others on the next step."""
VARYING = [closure_over_a_list, global_dict, mutable_default, mutable_argument_of_a_partial]
"""They read what may change and stay the same object. (That ``mutable_default`` writes is found when it is traced.)"""


@pytest.mark.parametrize("factory", BY_CALLBACK, ids=attrgetter("__name__"))
def test_unsound_callbacks_are_told_apart_by_whether_they_only_read(factory):
    levels = {
        f: level for level, fs in {READS: READING, VARIES: VARYING, PURE: BY_CHANGE}.items() for f in fs
    }
    assert examine(factory().callback).level == levels.get(factory, ACTS)


class Nested:
    class Inner:
        factor = 0.5

    def __init__(self):
        self.inner, self.pair = self.Inner(), (0.25, 2.0)


SETTINGS = types.ModuleType("settings")
LAZY = types.ModuleType("lazy")
LAZY.__getattr__ = lambda name: FACTOR
SETTINGS.LR, SETTINGS.nested, SETTINGS.lazy = 0.5, Nested(), LAZY


def scales(x):
    return x * SETTINGS.LR


class Holds:
    factor = 0.5

    def __call__(self, p, lr, **kwargs):
        descend(p, lr * self.factor)


def reading(kind):
    """A callback, and ``change(value)``, which changes what it reads."""
    factor, nested = 0.5, Nested()
    if kind == "closure":

        def change(value):
            nonlocal factor
            factor = value

        return lambda p, lr, **kwargs: descend(p, lr * factor), change
    if kind == "object":
        holds = Holds()
        return holds, partial(setattr, holds, "factor")
    if kind == "chain":
        return lambda p, lr, **kwargs: descend(p, lr * nested.inner.factor), partial(
            setattr, Nested.Inner, "factor"
        )
    if kind == "tuple":

        def change_pair(value):
            nested.pair = (value, 2.0)

        return lambda p, lr, **kwargs: descend(p, lr * nested.pair[0] * nested.pair[1]), change_pair
    if kind == "lazy attribute":
        return lambda p, lr, **kwargs: descend(p, lr * LAZY.anything), lambda x: globals().update(FACTOR=x)
    if kind == "module":
        return lambda p, lr, **kwargs: descend(p, lr * SETTINGS.LR), partial(setattr, SETTINGS, "LR")
    if kind == "helper":
        return lambda p, lr, **kwargs: descend(p, scales(lr)), partial(setattr, SETTINGS, "LR")
    return lambda p, lr, **kwargs: descend(p, lr * FACTOR), lambda x: globals().update(FACTOR=x)


KINDS = ["closure", "object", "chain", "tuple", "lazy attribute", "module", "helper", "global"]


def drive_reading(kind, backend, values):
    try:
        callback, change = reading(kind)
        opt, seen = make(callback, backend=backend), []
        for value in values:
            change(value)
            opt.step()
            seen.append(params_of(opt)[0].detach().clone())
        return opt, seen
    finally:
        globals().update(FACTOR=1.0)
        SETTINGS.LR = Nested.Inner.factor = 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_constants_that_a_callback_reads_are_followed_and_traced_when_they_change(kind, traces):
    one, two = 1.0, -0.0
    values = [one] * 4 + [two] * 4 + [0.0, 0.0, 1, one, two, two]
    opt, seen = drive_reading(kind, "cpp", values)
    lazy = kind == "lazy attribute"
    assert examine(opt.cbs[0]).level == (VARIES if lazy else READS)
    assert len(traces) == (14 if kind in ("lazy attribute", "tuple") else 4), "tuples are made anew here"
    assert len(opt.explain().compiled) == 1, "constants are slots"
    if leaf.available() and kind not in ("lazy attribute", "tuple"):
        assert opt.engine.bound
    for ours, eager in zip(seen, drive_reading(kind, "reference", values)[1], strict=True):
        assert_same_bits(ours, eager)


@pytest.mark.parametrize(
    "native", [pytest.param(True, marks=needs_extension), False], ids=["bound", "replayed"]
)
def test_a_number_of_the_state_that_becomes_a_constant_is_written(native):
    def counts_down(p, lr, left=0, **kwargs):
        left = left or 3.0
        p.data.sub_(p.grad.data, alpha=lr / left)
        return {"left": left - 1.0}

    ours, theirs = make(counts_down), make(counts_down, backend="reference")
    for _ in range(8):
        for opt in (ours, theirs):
            opt.step()
            native or forget(ours)
        (mine,), (right,) = ([opt.state[p]["left"] for p in params_of(opt)] for opt in (ours, theirs))
        assert type(mine) is type(right) and mine == right
    assert torch.allclose(params_of(ours)[0], params_of(theirs)[0])


@pytest.mark.parametrize("name", [n for n in callbacks.__all__ if n != "debias"])
def test_our_callbacks_are_pure(name):
    assert is_pure(getattr(callbacks, name))


FASTAI = [
    "sgd_step",
    "weight_decay",
    "l2_reg",
    "average_grad",
    "average_sqr_grad",
    "momentum_step",
    "step_stat",
]
FASTAI += [
    "rms_prop_step",
    "adam_step",
    "radam_step",
    "qhadam_step",
    "larc_layer_lr",
    "larc_step",
    "lamb_step",
]


@pytest.mark.parametrize("name", FASTAI)
def test_fastais_callbacks_are_pure(name):
    optimizer = pytest.importorskip("fastai.optimizer")
    assert is_pure(getattr(optimizer, name))


def recursive(p, lr, depth=0, **kwargs):
    if depth < 2:
        recursive(p, lr, depth + 1)
    descend(p, lr)


def mutual(p, lr, **kwargs):
    if lr > 1e9:
        tual(p, lr)
    descend(p, lr)


def tual(p, lr, **kwargs):
    mutual(p, lr - 1)


def nested(p, lr, **kwargs):
    def half(x):
        return x / 2

    descend(p, half(lr) + (lambda x: x * lr)(2.0))


def names_of_modules(p, lr, **kwargs):
    x = torch.nn.functional.softplus(p.grad.data) + torch.linalg.vector_norm(p.data)
    p.data.sub_(torch.where(x > 0, x, torch.zeros_like(x)) * (lr * math.pi), alpha=1.0)


def containers(p, lr, **kwargs):
    found = {"lr": lr, **kwargs}
    weights = [found.get("lr"), found.pop("nothing", 1.0)]
    weights.append(max((0.9, 0.99)))
    descend(p, sum(weights) / len(weights))
    return {k: v for k, v in {"kept": 1.0}.items()}


def attributes_of_arguments(p, lr, kept=None, **kwargs):
    if kept is None:
        kept = torch.zeros_like(p.grad.data, dtype=torch.float32)
    if p.ndim > 1 and p.shape[0] > 1 and p.dtype == torch.float32 and isinstance(lr, float):
        p.grad = p.grad.data * 2
    return {"kept": kept.mul_(0.9)}


def catches(p, lr, **kwargs):
    try:
        x = 1 / lr
    except ZeroDivisionError:
        x = 0.0
    descend(p, x)


from_closure = functools.wraps(descend)(lambda f: lambda p, lr, **kwargs: f(p, lr))(descend)

ALONE = [
    recursive,
    mutual,
    nested,
    names_of_modules,
    containers,
    attributes_of_arguments,
    catches,
    from_closure,
]
ALONE += [
    partial(recursive, depth=1),
    partial(partial(recursive), depth=1),
    lambda p, lr, **kwargs: descend(p, lr),
]


@pytest.mark.parametrize("callback", ALONE, ids=lambda cb: getattr(cb, "__name__", "partial"))
def test_what_depends_on_arguments_alone_is_pure(callback):
    assert is_pure(callback)


def impure_variants():
    buffer, lists = torch.ones(3), [1.0]

    def yields(p, lr, **kwargs):
        yield descend(p, lr)

    def imports(p, lr, **kwargs):
        import fusedopt.env

        descend(p, lr * len(fusedopt.env.__name__))

    def prints(p, lr, **kwargs):
        print("a step")
        descend(p, lr)

    def missing(p, lr, **kwargs):
        descend(p, lr * NOT_THERE_YET)  # noqa: F821

    def global_tensor(p, lr, **kwargs):
        p.data.sub_(buffer * lr)

    def remembers(p, lr, **kwargs):
        remembers.calls = 1
        descend(p, lr)

    def calls_impure(p, lr, **kwargs):
        prints(p, lr)

    def nested_impure(p, lr, **kwargs):
        def inner():
            return random.random()

        descend(p, lr * inner())

    def nested_closure(p, lr, **kwargs):
        descend(p, (lambda: lists[0])() * lr)

    def hands_out_a_module(p, lr, **kwargs):
        def module():
            return torch

        descend(p, lr * module().rand(()).item())

    def chooses_a_module(p, lr, **kwargs):
        descend(p, lr * (torch if lr else math).rand(()).item())

    def seed(p, lr, **kwargs):
        descend(p, lr * torch.initial_seed())

    def threads(p, lr, **kwargs):
        descend(p, lr * torch.get_num_threads())

    def keyword_default(p, lr, *, memory=[], **kwargs):  # noqa: B006
        descend(p, lr * len(memory))

    def clock(p, lr, read=time.time, **kwargs):
        descend(p, lr * read())

    def itself_recursive(p, lr, **kwargs):
        if lists:
            itself_recursive(p, lr)

    cached = functools.lru_cache(lambda p, lr, **kwargs: descend(p, lr))
    local = dict(locals())
    return {k: v for k, v in local.items() if callable(v)} | {
        "partial of an impure function": partial(prints),
        "partial with a list": partial(recursive, depth=[1]),
        "partial with a tensor": partial(recursive, depth=buffer),
        "a builtin": torch.add,
        "a class": Counting,
    }


IMPURE = impure_variants()


@pytest.mark.parametrize("name", IMPURE)
def test_what_may_depend_on_more_is_not_pure(name):
    assert not is_pure(IMPURE[name])


def test_a_verdict_of_purity_ends_with_what_it_was_about(monkeypatch):
    def cb(p, lr, **kwargs):
        descend(p, HELPER(lr))

    assert is_pure(cb)
    monkeypatch.setitem(globals(), "HELPER", random.uniform)
    assert not is_pure(cb)
    monkeypatch.setitem(globals(), "HELPER", lambda x: x * FACTOR)
    assert not is_pure(cb)


# --
# Escapes: numbers that leave the recording

ESCAPES = {
    "formatting": lambda p, lr, **kwargs: descend(p, float(f"{lr:.3f}")),
    "repr": lambda p, lr, **kwargs: descend(p, float(repr(lr)) if repr else 0.0),
    "numpy operand": lambda p, lr, **kwargs: descend(p, float(lr * np.float64(3.0))),
    "torch.tensor": lambda p, lr, **kwargs: descend(p, torch.tensor(float(lr)).sqrt().item()),
    "torch op on a real tensor": lambda p, lr, **kwargs: descend(p, (torch.ones(()) * lr).item()),
    "index": lambda p, lr, **kwargs: descend(p, (0.5, 0.25, 0.125)[round(lr * 10)]),
    "range": lambda p, lr, **kwargs: [descend(p, 0.1) for _ in range(round(lr * 10))] and None,
    "comparison": lambda p, lr, **kwargs: descend(p, 1.0 if lr > 0.15 else 3.0),
    "truth": lambda p, lr, **kwargs: descend(p, 1.0 if lr - 0.1 else 3.0),
    "exponent": lambda p, lr, **kwargs: p.data.sub_(p.grad.data.abs() ** (lr * 20)),
    "membership": lambda p, lr, **kwargs: descend(p, 1.0 if lr in (0.1, 0.3) else 3.0),
}


RECORDED = {
    "math.sqrt": lambda x: math.sqrt(x),
    "math.log": lambda x: -math.log(x) / math.log(x, 2),
    "math.exp and pi": lambda x: math.exp(-x) * math.cos(math.pi * x),
    "from math import": lambda x: atan2(x, 0.3),
    "imported inside": lambda x: imported_inside(x),
    "float and int": lambda x: float(int(x * 100)) / 100,
    "round": lambda x: round(x, 3) + round(100 * x),
    "max and min": lambda x: max(min(x, 0.15), 0.12) if isinstance(x, float) else math.nan,
    "numpy": lambda x: np.sqrt(x) * np.exp(-x) / np.tanh(x) + np.pi,
    "sign of zero": lambda x: math.copysign(1.0, (0.15 - x) * 0.0),
    "helper": lambda x: helper(x),
    "nested": lambda x: (lambda y: math.exp(y))(x),
    "map": lambda x: sum(map(math.exp, [x, 2 * x])),
    "comprehension": lambda x: sum([math.sin(k * x) for k in range(3)]),
}


def imported_inside(x):
    import math as m
    from math import expm1

    return m.log1p(x) + expm1(x)


def helper(x, again=True):
    return helper(math.sqrt(x), False) if again else math.sqrt(x)


def recorded(name):
    compute = RECORDED[name]
    return lambda p, lr, **kwargs: descend(p, compute(lr))


class Scheduled:
    def __init__(self, compute):
        self.compute = compute

    def __call__(self, p, lr, **kwargs):
        descend(p, math.exp(-lr))

    def method(self, p, lr, **kwargs):
        descend(p, math.exp(-lr))


def as_written_by_a_person(kind):
    if kind == "partial":
        return partial(lambda p, lr, x, **kwargs: descend(p, math.exp(-lr) * x), x=2.0)
    if kind == "no_grad":
        return torch.no_grad()(lambda p, lr, **kwargs: descend(p, math.exp(-lr)))
    return Scheduled(None) if kind == "object" else Scheduled(None).method


@pytest.mark.parametrize("kind", ["partial", "no_grad", "object", "method"])
def test_functions_are_recorded_in_callbacks_of_every_kind(kind, traces):
    ours, opt = drive_numbers(as_written_by_a_person(kind), "cpp")
    eager, _ = drive_numbers(as_written_by_a_person(kind), "reference")
    for x, y in zip(ours, eager, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-14)
    assert len(traces) == 1 and not opt.explain().eager


@pytest.mark.parametrize("name", RECORDED)
def test_functions_of_numbers_are_recorded(name, traces):
    """One trace serves every value, warm or not, and the numbers are the callback's."""
    ours, opt = drive_numbers(recorded(name), "cpp")
    eager, _ = drive_numbers(recorded(name), "reference")
    for x, y in zip(ours, eager, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-14)
    assert len(traces) == 1 and not opt.explain().eager
    if leaf.available():
        assert opt.engine.bound


def test_while_a_callback_is_traced_other_threads_call_the_real_functions():
    seen, functions = [], (math.exp, float, max, torch.tensor)

    def cb(p, lr, **kwargs):
        descend(p, math.exp(lr))
        seen.append((math.exp, float, max, torch.tensor))

    stand_in = StandIns().callback(cb)
    assert (math.exp, float, max, torch.tensor) == functions
    with contextlib.suppress(AttributeError):
        stand_in(None, 0.1)
    assert stand_in.__code__ is cb.__code__ and cb.__globals__["math"] is math


def test_what_raises_in_a_trace_may_not_raise_on_the_next_step():
    def cb(p, lr, **kwargs):
        try:
            x = math.sqrt(lr - 0.15)
        except ValueError:
            x = 0.5
        try:
            x = x + 1 / (lr - 0.1)
        except ZeroDivisionError:
            x = x + 0.25
        descend(p, x)

    ours, _ = drive_numbers(cb, "cpp")
    eager, _ = drive_numbers(cb, "reference")
    for x, y in zip(ours, eager, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-14)


def drive_escape(name, backend, lrs=(0.1, 0.1, 0.1, 0.2, 0.2, 0.1, 0.1)):
    return drive_numbers(ESCAPES[name], backend, lrs)


def drive_numbers(callback, backend, lrs=(0.1, 0.1, 0.1, 0.2, 0.2, 0.1, 0.1)):
    opt = make(callback, backend=backend)
    seen = []
    for lr in lrs:
        opt.set_hyper("lr", lr)
        opt.step()
        seen.append(params_of(opt)[0].detach().clone())
    return seen, opt


@pytest.mark.parametrize("name", ESCAPES)
def test_an_escaped_number_is_guarded_by_its_value(name, traces):
    ours, opt = drive_escape(name, "cpp")
    eager, _ = drive_escape(name, "reference")
    for x, y in zip(ours, eager, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-14)
    assert not opt.explain().eager
    if is_pure(ESCAPES[name]):
        assert len(traces) <= 2, "each value is traced once"


@pytest.mark.parametrize("name", [n for n, cb in ESCAPES.items() if is_pure(cb)])
def test_mutation_replay_without_guards_would_be_wrong(name, monkeypatch):
    monkeypatch.setattr(Replay, "__init__", _without_guards(Replay.__init__))
    ours, _ = drive_escape(name, "cpp")
    eager, _ = drive_escape(name, "reference")
    assert not all(torch.allclose(x, y) for x, y in zip(ours, eager, strict=True))


def _without_guards(init):
    def changed(self, traced):
        guards, traced.scalars.guards = traced.scalars.guards, []
        init(self, traced)
        traced.scalars.guards = guards

    return changed


def test_zeros_of_both_signs_are_told_apart():
    def cb(p, lr, side, **kwargs):
        descend(p, lr * math.copysign(1.0, side))

    for n in (1, 6):
        opt, eager = make(cb, n, side=0.0), make(cb, n, "reference", side=0.0)
        for side in (0.0, 0.0, -0.0, -0.0, 0.0):
            for o in (opt, eager):
                o.set_hyper("side", side)
                o.step()
            for p, q in zip(params_of(opt), params_of(eager), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-15, atol=1e-15)


def test_whole_numbers_and_floats_are_told_apart():
    def cb(p, lr, k, **kwargs):
        descend(p, lr if isinstance(k, int) else -lr)

    opt, eager = make(cb, k=2), make(cb, 1, "reference", k=2)
    for k in (2, 2, 2.0, 2.0, 2, 3):
        for o in (opt, eager):
            o.set_hyper("k", k)
            o.step()
        torch.testing.assert_close(params_of(opt), params_of(eager), rtol=1e-15, atol=1e-15)


def test_a_number_that_escapes_with_every_step_is_not_kept_for_replay(traces):
    def cb(p, lr, step=0, **kwargs):
        descend(p, lr / float(str(step + 1)))
        return {"step": step + 1}

    opt = make(cb)
    for _ in range(12):
        opt.step()
    assert len(traces) == 12
    assert not any(opt.engine.buckets.known.values()), "nothing is kept that would never be used"
    assert len(opt.explain().compiled) == 1


@pytest.mark.filterwarnings("ignore:fusedopt. most of the last")
def test_a_callback_whose_numbers_escape_with_the_learning_rate_keeps_few_traces():
    def cb(p, lr, **kwargs):
        descend(p, float(str(lr)))

    opt = make(cb)
    for t in range(40):
        opt.set_hyper("lr", 0.1 + t)
        opt.step()
    assert sum(map(len, opt.engine.buckets.known.values())) <= buckets.MAX_KNOWN + 1
    assert len(opt.explain().compiled) == 1


def _of_defaults(p, lr, factor=1.0, **kwargs):
    descend(p, lr * factor)


def _of_named_defaults(p, lr, *, factor=1.0, **kwargs):
    descend(p, lr * factor)


class _Settings:
    def __init__(self, factor):
        self.chosen = types.SimpleNamespace(factor=factor)

    def __call__(self, p, lr, **kwargs):
        descend(p, lr * self.chosen.factor)


def _given(p, lr, factor, **kwargs):
    descend(p, lr * factor)


REPLACED = {
    "defaults": (lambda: _of_defaults, lambda cb, x: setattr(cb, "__defaults__", (x,))),
    "named defaults": (
        lambda: _of_named_defaults,
        lambda cb, x: setattr(cb, "__kwdefaults__", {"factor": x}),
    ),
    "settings": (
        lambda: _Settings(1.0),
        lambda cb, x: setattr(cb, "chosen", types.SimpleNamespace(factor=x)),
    ),
    "an argument": (lambda: partial(_given, factor=1.0), lambda cb, x: cb.keywords.update(factor=x)),
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_a_callback_is_made_of_may_be_replaced_and_in_each_step_that_is_said(name):
    make_one, replace = REPLACED[name]
    cb = make_one()
    replace(cb, 1.0)
    p, sum_of = nn.Parameter(torch.zeros(4)), 0.0
    opt = fusedopt.Optimizer([p], cb, lr=0.5)
    with pytest.warns(RuntimeWarning, match="most of the last 16 steps took Python work"):
        for t in range(20):
            replace(cb, float(t))
            sum_of += float(t)
            p.grad = torch.ones(4)
            opt.step()
    assert torch.equal(p.detach(), torch.full((4,), -0.5 * sum_of))
    assert opt.engine.steps.anew >= 19 and "is another object" in str(opt.explain().steps)
    for _ in range(3):
        opt.step()
    assert opt.engine.steps.repeated >= 2, "it goes on as soon as nothing is replaced"


_FACTOR = 0.5


def test_a_constant_that_is_read_again_as_an_equal_one_is_the_same():
    def cb(p, lr, **kwargs):
        descend(p, lr * _FACTOR)

    opt = make(cb)
    for _ in range(6):
        globals()["_FACTOR"] = float("0.5")
        opt.step()
    assert opt.engine.steps.anew == 1
    globals()["_FACTOR"] = -0.0
    opt.step()
    globals()["_FACTOR"] = 0.0
    opt.step()
    assert opt.engine.steps.anew == 3, "zeros of two signs are two numbers"


@pytest.mark.parametrize("kind", [np.float64, np.float32, torch.tensor, float])
def test_other_kinds_of_numbers_keep_one_trace(kind, traces):
    opt = make(lambda p, lr, **kwargs: descend(p, lr))
    for t in range(10):
        opt.param_groups[0]["lr"] = kind(0.1 + t)
        opt.step()
    assert len(traces) == len(opt.engine.buckets.known) == 1
    assert not opt.explain().eager


# --
# Replayed numbers are the callbacks', exactly


class Log(NamedTuple):
    """The scalars of each launch, as bytes, and the programs handed to the compiler."""

    slots: list
    compiled: list


@pytest.fixture
def no_kernels(monkeypatch):
    """Programs are not compiled, and launches do nothing but keep their scalars."""
    kernels, log = {}, Log([], [])

    class NoKernels:
        name, device, native = "cpp", "cpu", False

        def prepare(self, *args, **how):
            return cpu.Launch(*args[:2], tuple(args[2]), args[3])

    def compile_program(backend, device, program, title, names):
        log.compiled.append(program)
        if program not in kernels:
            kernels[program] = backends.Kernel(
                "cpp", title, program, "", "", 0.0, True, cpu.Handle([], [], 0)
            )
        return NoKernels(), kernels[program]

    monkeypatch.setattr(backends, "compile_program", compile_program)
    monkeypatch.setattr(cpu.Launch, "planned", lambda self, table: None)
    monkeypatch.setattr(cpu.Launch, "native", lambda self: None)
    monkeypatch.setattr(cpu.Launch, "run", lambda self, table: log.slots.append(table.tobytes()))
    return log


def schedule(opt, t):
    """Other hyperparameters on each step, and in each group."""
    for g, h in enumerate(opt.hypers):
        wave = math.sin(1.0 + t + 0.1 * g)
        for name, value in START[id(opt)][g].items():
            if type(value) is float and name in ("mom", "sqr_mom", "nu_1", "nu_2", "dampening", "rho"):
                h[name] = value * (0.9 + 0.09 * wave)
            elif type(value) is float:
                h[name] = value * (1.0 + 0.5 * wave)


START = {}


def numbers_of(opt):
    """Every number of the state: type and bits."""
    return [
        [
            (k, type(v).__name__, struct.pack("d", v))
            for k, v in opt.state[p].items()
            if type(v) in (int, float)
        ]
        for p in params_of(opt)
    ]


ROWS = [pytest.param(row, v, id=f"{row.face}-{row.name}-{v.id}") for row in TABLE for v in row.variants]


@pytest.mark.filterwarnings("ignore:fusedopt. most of the last")
@pytest.mark.parametrize("sets", [1, 6])
@pytest.mark.parametrize(("row", "variant"), ROWS)
def test_replayed_numbers_equal_the_callbacks_exactly(row, variant, sets, no_kernels, monkeypatch, traces):
    """Over 50 steps: repeated steps (all scalar sets at once), replay set by set, and the callbacks themselves."""
    opts = []
    for _ in range(3):
        params = [nn.Parameter(torch.ones(2)) for _ in range(sets)]
        for p in params:
            p.grad = torch.ones(2)
        opts.append(row.factory([{"params": [p]} for p in params], **variant.kwargs))
        START[id(opts[-1])] = [dict(h) for h in opts[-1].hypers]
    repeated, replayed, traced = opts
    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "examine", lambda callback: Verdict(VARIES))
        assert not any(traced.engine.buckets.verdicts.lasting)
    steps = 50 if sets == 1 else 14
    scalars = {opt: [] for opt in opts}
    counts = dict.fromkeys(opts, 0)
    for t in range(steps):
        for opt in opts:
            schedule(opt, t)
            opt.engine.binds = opt is repeated
            before = len(traces)
            opt.step()
            counts[opt] += len(traces) - before
            scalars[opt].append(no_kernels.slots[:])
            no_kernels.slots.clear()
        assert scalars[repeated][-1] == scalars[traced][-1], f"step {t + 1}, repeated"
        assert scalars[replayed][-1] == scalars[traced][-1], f"step {t + 1}, replayed"
        assert numbers_of(repeated) == numbers_of(replayed) == numbers_of(traced), f"step {t + 1}"
    START.clear()
    assert counts[traced] == steps * sets
    assert counts[repeated] + counts[replayed] <= 14, "most steps are replayed"


def divide_by_multiplying(replay, native):
    """Change a replay, for Python or for the extension only: ``a / b`` becomes ``a * (1 / b)``."""
    out, at = [], []
    for op, *given in replay.instructions:
        if op == "truediv":
            a, b = (at[k] for k in given)
            out += [("value", 1.0), ("truediv", len(out), b), ("mul", a, len(out) + 1)]
        else:
            out.append((op, *(given if op in ("leaf", "value") else (at[k] for k in given))))
        at.append(len(out) - 1)
    before = vars(replay).copy()
    replay.instructions, replay.guards = out, [(at[i], value) for i, value in replay.guards]
    replay.slots, replay.numbers = [at[i] for i in replay.slots], [at[i] for i in replay.numbers]
    if not native:
        vars(replay).update(before, function=replay._compiled())


@pytest.mark.parametrize(
    "native", [False, pytest.param(True, marks=needs_extension)], ids=["python", "native"]
)
def test_mutation_one_rounding_more_in_replay_is_noticed(native, no_kernels, monkeypatch, traces):
    original = Replay.__init__

    def init(self, *args):
        original(self, *args)
        divide_by_multiplying(self, native)

    monkeypatch.setattr(Replay, "__init__", init)
    row, variant = next(p.values for p in ROWS if p.id == "torch-Adam-lr=0.01")
    with pytest.raises(AssertionError, match="repeated" if native else "replayed"):
        test_replayed_numbers_equal_the_callbacks_exactly(row, variant, 1, no_kernels, monkeypatch, traces)


def everything(p, lr, mom, k, j, step=0, **kwargs):
    """Every operation of the scalar program, on floats, whole numbers, and both."""
    numbers = [lr + mom, lr - mom, lr * mom, lr / mom, lr // mom, lr % mom, abs(lr) ** mom, -lr, abs(lr)]
    numbers += [k + j, k - j, k * j, k / j, k // j, k % j, -k, abs(k), 2**step]
    numbers += [lr**2, lr**k, abs(mom) ** -0.5]
    numbers += [lr * k, k - mom, j / lr, k // mom, 7 % lr, 1.5**j, lr + 1, 3 * step]
    for x in numbers:
        descend(p, x)
    return {"step": step + 1, "mixed": step + lr}


def bits(x):
    return type(x), struct.pack("d", x)


def native_program(replay):
    return leaf.native.ScalarProgram(replay.instructions, replay.slots, replay.numbers, replay.guards)


@needs_extension
def test_the_extension_computes_numbers_as_python_to_the_last_bit():
    hyper = dict(lr=0.3, mom=0.7, k=3, j=2)
    replay = Replay(trace([everything], signature(step=3, mixed=0.5), hyper))
    rng = random.Random(0)

    def number(leaf):
        if leaf[1] in ("k", "j", "step"):
            return rng.randrange(1, 40)
        return rng.choice([-1, 1]) * rng.uniform(1e-3, 10.0)

    program = native_program(replay)
    for _ in range(500):
        row = [number(leaf) for leaf in replay.leaves]
        slots, new, _ = replay.function(*row)
        assert [[bits(x) for x in out] for out in program(row)] == [
            [bits(x) for x in out] for out in (slots, new)
        ]


TINY, HUGE, LARGEST = 5e-324, 1.7e308, 2**53 - 1
REALS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    -2.5,
    3.0,
    0.1,
    -7.3,
    TINY,
    HUGE,
    -HUGE,
    1e-200,
    math.inf,
    -math.inf,
    math.nan,
]
NUMBERS = [*REALS, 0, 1, -1, 2, 3, -7, 40, 1023, LARGEST, -LARGEST, True, False]


@needs_extension
@pytest.mark.parametrize("op", ARITHMETIC)
def test_every_operation_of_the_extension_is_pythons_or_refused(op):
    count = operands(op)
    program = leaf.native.ScalarProgram(
        [("leaf", 0), ("leaf", 1), (op, 0) if count == 1 else (op, 0, 1)], [], [2], []
    )
    rng, refused = random.Random(0), 0
    pairs = [(rng.gauss(0, 10), rng.gauss(0, 3)) for _ in range(200)]
    pairs += [(rng.randrange(60), rng.randrange(20)) for _ in range(50)]
    for a, b in [*itertools.product(NUMBERS, NUMBERS), *pairs]:
        if op in ("pow", "builtins.round") and type(b) is int and abs(b) > 2000:
            continue  # Python would take its time
        found = program([a, b])
        try:
            with np.errstate(all="ignore"):
                expected = ARITHMETIC[op](*[a, b][:count])
        except (ArithmeticError, TypeError, ValueError):
            expected = None
        if isinstance(expected, complex) or (type(expected) is int and abs(expected) > LARGEST):
            expected = None
        if op.startswith("numpy.") and not (type(expected) is np.float64 and math.isfinite(expected)):
            expected = None  # it may have warned, or is of a type that is not recorded
        refused += expected is None
        if expected is None or found is None:
            assert found is expected, (a, op, b)
        elif expected != expected:
            assert found[1][0] != found[1][0], (a, op, b)
        else:
            expected = expected.item() if isinstance(expected, np.float64) else expected
            assert bits(found[1][0]) == bits(expected), (a, op, b)
    assert "." in op or refused < len(NUMBERS) ** 2 / 3


@needs_extension
def test_the_extension_refuses_what_it_cannot_hold():
    program = leaf.native.ScalarProgram([("leaf", 0)], [0], [], [(0, 0.0)])
    assert program([0.0]) == ([0.0], [])
    assert program([0]) == ([0], [])
    assert program([-0.0]) is None
    for value in (2**53, 10**400, "1", None, np.float64(1.0)):
        with pytest.raises(ValueError, match="not a number that fits"):
            program([value])
    with pytest.raises(IndexError, match="not an earlier"):
        leaf.native.ScalarProgram([("neg", 0)], [], [], [])
    with pytest.raises(IndexError, match="not an earlier"):
        leaf.native.ScalarProgram([("leaf", 0)], [1], [], [])


CASES = {
    "a power of two that grows": (lambda lr, step: lr * 2 ** (step + 50), 20),
    "a negative power of a whole number": (lambda lr, step: lr * 2**-step, 10),
    "a product of large whole numbers": (lambda lr, step: lr / ((step + 2) * 10**17 + 1), 5),
    "a power that underflows": (lambda lr, step: lr * (1 - 1e-30 ** (step + 9)), 6),
    "a product that overflows": (lambda lr, step: lr / (1e200 * 10.0 ** (step * 40)), 6),
    "a whole number beyond floats in between": (lambda lr, step: (10**400 + step) // 10**400 * lr, 4),
}


@pytest.mark.filterwarnings("ignore:fusedopt. most of the last")
@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("name", CASES)
def test_numbers_at_the_limits_are_pythons(name, n):
    compute, steps = CASES[name]

    def cb(p, lr, step=0, **kwargs):
        descend(p, compute(lr, step))
        return {"step": step + 1}

    opt, eager = make(cb, n), make(cb, n, "reference")
    for _ in range(steps):
        opt.step(), eager.step()
    torch.testing.assert_close(params_of(opt), params_of(eager), rtol=1e-13, atol=1e-13)
    assert numbers_of(opt) == numbers_of(eager)


@pytest.mark.parametrize("n", [1, 6])
def test_state_that_comes_from_whole_hyperparameters_stays_whole(n):
    def cb(p, lr, k, count=0, **kwargs):
        descend(p, lr * count)
        return {"count": count + k}

    opt = make(cb, n, k=2**53 - 1)
    total = 0
    for k in (2, 2, 3, 2**53 + 1, 1, 2**53 - 1):
        total += k
        opt.set_hyper("k", k)
        opt.step()
        assert {opt.state[p]["count"] for p in params_of(opt)} == {total}
    assert {type(opt.state[p]["count"]) for p in params_of(opt)} == {int}


# --
# Guards: the kernel follows the branch, and none is compiled twice


def small(factory, **kwargs):
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    return factory([p], **kwargs)


def test_radams_branch_flips_at_its_step_and_back(traces, no_kernels):
    opt = small(fusedopt.RAdam, lr=0.1)
    p = params_of(opt)[0]
    kernels = []
    for _ in range(12):
        opt.step()
        kernels.append(opt.engine.launched[0][0])
    flip = next(i for i, k in enumerate(kernels) if k is not kernels[0])
    assert flip == 5, "r > 5 at the sixth step, with sqr_mom = 0.99"
    assert kernels == [kernels[0]] * flip + [kernels[-1]] * (12 - flip)
    assert len(traces) == len(no_kernels.compiled) == 3, "first step, state in place, beyond the branch"
    for _ in range(3):
        opt.state[p]["step"] = 0
        for _ in range(7):
            opt.step()
    assert len(traces) == 3, "both sides are known by now"
    assert len(opt.explain().compiled) == 2
    assert "> 5" in opt.explain().compiled[1].why or "<= 5" in opt.explain().compiled[1].why


@pytest.mark.parametrize("k", [1, 2, 3])
def test_lookahead_synchronises_on_every_kth_step_with_two_traces(k, traces, no_kernels):
    opt = small(lambda params, **kw: fusedopt.Lookahead(fusedopt.SGD(params, **kw), k=k), lr=0.1)
    kernels = []
    for _ in range(4 * k):
        opt.step()
        kernels.append(opt.engine.launched[0][0])
    steady = kernels[k:]
    assert all((kernel is steady[k - 1]) == ((i + 1) % k == 0) for i, kernel in enumerate(steady))
    before = len(traces)
    for _ in range(4 * k):
        opt.step()
    assert len(traces) == len(no_kernels.compiled) == before
    opt.set_hyper("lookahead_k", k + 1)
    for _ in range(3 * (k + 1)):
        opt.step()
    assert len(traces) <= before + (k == 1), "another k is another number"


def test_weight_decay_that_comes_and_goes_reuses_its_two_kernels(traces, no_kernels):
    opt = small(fusedopt.SGD, lr=0.1)
    for wd in (0.0, 0.0, 0.1, 0.2, 0.0, 0.0, 0.3, 0.3, 0.0):
        opt.set_hyper("wd", wd)
        opt.step()
        reads = opt.explain().stages[0]
        assert reads.bytes_per_element == 12
    assert len(traces) == len(no_kernels.compiled) == len(opt.explain().compiled) == 2
    assert "wd" in opt.explain().compiled[1].why


def test_guards_hold_for_each_scalar_set_on_its_own():
    """Groups on both sides of a branch: two launches, and a group that changes sides changes launches."""
    cbs = [weight_decay, lambda p, lr, **kwargs: descend(p, lr)]
    opt, eager = make(cbs, 8, wd=0.0), make(cbs, 8, "reference", wd=0.0)
    sizes = []
    for with_decay in (0, 0, 3, 3, 8, 8, 2, 0):
        for o in (opt, eager):
            o.set_hyper("wd", [0.1] * with_decay + [0.0] * (8 - with_decay))
            o.step()
        sizes.append(sorted(s.tensors for s in opt.explain().stages))
        torch.testing.assert_close(params_of(opt), params_of(eager), rtol=1e-15, atol=1e-15)
    assert sizes == [[8], [8], [3, 5], [3, 5], [8], [8], [2, 6], [8]]
    assert len(opt.explain().compiled) == 2


def test_flags_in_the_state_that_change_are_followed():
    def cb(p, lr, back=False, **kwargs):
        descend(p, -lr if back else lr * 2)
        return {"back": not back}

    opt, eager = make(cb, 2), make(cb, 2, "reference")
    for _ in range(7):
        opt.step(), eager.step()
        torch.testing.assert_close(params_of(opt), params_of(eager), rtol=1e-15, atol=1e-15)
    assert opt.state == eager.state or [*opt.state.values()] == [*eager.state.values()]


def test_state_that_is_set_to_a_constant_is_followed():
    def cb(p, lr, phase=0, **kwargs):
        descend(p, lr * phase)
        return {"phase": 3}

    opt, eager = make(cb), make(cb, backend="reference")
    for t in range(7):
        if t == 4:
            for o in (opt, eager):
                o.state[params_of(o)[0]]["phase"] = 5.0
        opt.step(), eager.step()
        torch.testing.assert_close(params_of(opt), params_of(eager), rtol=1e-15, atol=1e-15)
        assert numbers_of(opt) == numbers_of(eager)


# --
# Errors of arithmetic go back to the callbacks


def divides(p, lr, a, **kwargs):
    descend(p, lr / (1 - a))


def overflows(p, lr, a, **kwargs):
    descend(p, lr * (a * 1e9) ** 99.0)


def complex_root(p, lr, a, **kwargs):
    descend(p, lr * (0.75 - a) ** 0.5)


def too_large(p, lr, a, **kwargs):
    descend(p, lr * int(a) ** 9999)


def unordered(p, lr, a, **kwargs):
    if (0.75 - a) ** 0.3 > 0.1:
        descend(p, lr)


ERRORS = {
    divides: (1.0, ZeroDivisionError),
    overflows: (1.0, OverflowError),
    complex_root: (1.0, RuntimeError),
    too_large: (2.0, OverflowError),
    unordered: (1.0, TypeError),
}


@pytest.mark.parametrize("repeat", [True, False], ids=["repeated", "replayed"])
@pytest.mark.parametrize("n", [1, 3, 6])
@pytest.mark.parametrize("callback", ERRORS, ids=attrgetter("__name__"))
def test_what_cannot_be_computed_raises_as_eager_does_and_changes_nothing(callback, n, repeat):
    bad, error = ERRORS[callback]
    opt, eager = make(callback, n, a=1e-9), make(callback, n, "reference", a=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for t in range(8):
            for o in (opt, eager):
                o.param_groups[-1]["a"] = bad if t == 4 else 1e-9
                if not repeat:
                    forget(o)
                before = [p.detach().clone() for p in params_of(o)]
                if t == 4:
                    with pytest.raises(error):
                        o.step()
                    assert all(map(torch.equal, params_of(o), before))
                else:
                    o.step()
            torch.testing.assert_close(params_of(opt), params_of(eager), rtol=1e-12, atol=1e-12)
    assert not opt.explain().eager, "it fuses again"


def test_a_number_too_large_for_a_float_changes_nothing_in_any_launch():
    """Two kernels: neither has run when it turns out that the second one's numbers do not fit."""

    def cb(p, lr, step=1021, twice=False, **kwargs):
        p.data.add_(p.grad.data, alpha=lr)
        p.data.mul_(2.0**step)
        if twice:
            p.data.mul_(2.0**step)
        return {"step": step + 1}

    params = parameters() + parameters()
    groups = [{"params": params[:1]}, {"params": params[1:], "twice": True}]
    opt = fusedopt.Optimizer(groups, cb, lr=0.1, backend="cpp", title="replay")
    opt.state[params[0]]["step"] = 1
    opt.step(), opt.step()
    before = [p.detach().clone() for p in params]
    opt.state[params[1]]["step"] = 1024
    with pytest.raises(OverflowError):
        opt.step()
    for p, old in zip(params, before, strict=True):
        assert_same_bits(p.detach(), old)
    assert [opt.state[p]["step"] for p in params] == [3, 1024]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("use", "value", "raises"),
    [
        (lambda p, x: p.data.add_(p.grad, alpha=x), 1e300, "overflow"),
        (lambda p, x: p.data.addcdiv_(p.grad, p.data, value=-x), 1e39, "overflow"),
        (lambda p, x: p.data.add_(p.grad, alpha=x), 3.5e38, "overflow"),
        (lambda p, x: p.data.add_(p.grad, alpha=x), 10**30, "overflow|too big|too large"),
        (lambda p, x: p.data.add_(p.grad, alpha=x), math.inf, None),
        (lambda p, x: p.data.mul_(x), 1e300, None),
        (lambda p, x: p.data.add_(x), -1e39, None),
    ],
)
def test_a_number_that_is_no_float_is_what_torch_makes_of_it(use, value, raises, backend):
    """An error where it is a factor, infinity elsewhere; also where the steps before were repeated as a whole."""

    def cb(p, x, **kwargs):
        use(p, x)

    params = parameters(2, torch.float32)
    opt = fusedopt.Optimizer(params, cb, lr=0.5, x=0.5, backend=backend)
    for x in (0.5, 0.25, 0.125):
        opt.set_hyper("x", x)
        opt.step()
    expected = [p.detach().clone() for p in params]
    opt.set_hyper("x", value)
    if raises:
        with pytest.raises((RuntimeError, OverflowError), match=raises):
            opt.step()
    else:
        for p, e in zip(params, expected, strict=True):
            e.grad = p.grad
            use(e, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            opt.step()
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-6, atol=0, equal_nan=True)
