"""Generated callbacks, pure and impure, do what they do in a plain loop: to parameters, state, and all around them.

A plain loop is what callbacks mean: for each parameter in turn ``state.update(cb(p, **state, **hypers))``.
"""

import contextlib
import io
import itertools
import linecache
import random
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fusedopt

HYPERS = {"lr": 0.1, "k": 0.5}
SHAPES = ((3,), (2, 4), (), (5,), (2, 1, 3))

PURE = [
    "p.data.sub_(p.grad, alpha=lr)",
    "p.data.mul_(1 - lr * k)",
    "m = torch.zeros_like(p) if m is None else m\nm.mul_(0.9).add_(p.grad)\np.data.sub_(m, alpha=lr)",
    "n = n + 1\np.data.add_(p.grad, alpha=-lr / n)",
    "if p.ndim > 1:\n    p.data.mul_(0.5)",
    "p.data.copy_(torch.where(p.grad > 0, p.data, -p.data))",
    "old = p.data\np.data = p.data * 0.5\nold.zero_()",
    "if p.grad.norm() > 1:\n    p.data.mul_(0.9)",
    "p.data.add_(-lr, p.grad)",
    "p.data.add_((p.grad // 0.3) % 0.7, alpha=lr)",
]
READING = [
    "p.data.mul_(settings['k'])",
    "p.data.mul_(FACTOR)",
    "p.data.mul_(box.k)",
    "p.data.mul_(sum(rates) / len(rates))",
    "p.data.mul_(scalar)",
]
IMPURE = [
    "log.append(round(float(lr * k), 6))",
    "log.append(tuple(p.shape))",
    "calls[0] += 1\np.data.mul_(1 + calls[0] * 1e-2)",
    "p.data.mul_(random.random())",
    "p.data.mul_(torch.rand(()).item())",
    "p.data.add_(torch.randn_like(p), alpha=lr)",
    "p.data.mul_(np.random.rand())",
    "p.data.mul_(draw())",
    "print(tuple(p.shape), round(lr, 6))",
    "print(f'{p.grad.sum().item():.3f}')",
    "box.n += 1\np.data.mul_(1 + box.n * 1e-2)",
    "log.append(index[id(p)])",
    "log.append(index_of[p])\nif p in skipped:\n    p.data.zero_()",
    "p.data.mul_(getattr(p, 'scale', 1.0))",
    "p.data.mul_(1 + next(counter) * 1e-2)",
    "settings['sum'] = settings.get('sum', 0.0) + float(p.grad.sum())",
    "hist = [] if hist is None else hist\nhist.append(n)",
    "p.data.mul_(0.5 if type(lr) is float else 2.0)",
    "global COUNT\nCOUNT += 1\np.data.mul_(1 + COUNT * 1e-2)",
    "scalar.mul_(0.9)\np.data.mul_(scalar)",
    "match p.grad:\n    case torch.Tensor():\n        p.data.mul_(0.9)",
    "if not torch.is_tensor(p.grad):\n    p.data.zero_()",
    "p.data.mul_(2.0 if p.requires_grad else 0.5)\nlog.append(p.itemsize)",
    "p.data.mul_(p.data.sum().item())",
]
STATE = ("m", "n", "hist")


def callback(number, pieces):
    """A callback made of pieces of source, as ``make(env)``: each run has an environment of its own."""
    body = "\n".join(f"    {line}" for piece in pieces for line in piece.split("\n"))
    kept = ", ".join(f"{key!r}: {key}" for key in STATE if any(f"{key} = " in piece for piece in pieces))
    source = f"def cb{number}(p, lr, k, m=None, n=0, hist=None, **kwargs):\n{body}\n    return {{{kept}}}\n"
    name = f"<generated {source}>"
    linecache.cache[name] = len(source), None, source.splitlines(True), name
    code = compile(source, name, "exec")

    def make(env):
        exec(code, env)
        return env[f"cb{number}"]

    return make


def lists():
    """Lists of callbacks: pure, reading and impure pieces in all mixtures, each impure piece several times."""
    choose, out = random.Random(0), []
    for i in range(240):
        pieces = [[choose.choice(PURE + READING)] for _ in range(choose.choice((1, 1, 2, 3)))]
        if i % 5:
            choose.choice(pieces).append(IMPURE[i % len(IMPURE)])
        if i % 3 == 0:
            choose.choice(pieces).insert(0, choose.choice(IMPURE))
        out.append([callback(k, found) for k, found in enumerate(pieces)])
    return out


def environment(params):
    """What callbacks find around them, new for each run."""
    box = types.SimpleNamespace(n=0, k=0.75)
    env = dict(
        torch=torch, random=random, np=np, draw=random.Random(3).random, box=box, counter=itertools.count()
    )
    env |= dict(log=[], calls=[0], settings={"k": 0.5}, rates=[0.25, 0.75], FACTOR=0.875, COUNT=0)
    env |= dict(scalar=torch.tensor(0.9, dtype=torch.float64), skipped={params[1]})
    return env | dict(
        index={id(p): i for i, p in enumerate(params)}, index_of={p: i for i, p in enumerate(params)}
    )


def around(env, printed):
    """All that can be seen of an environment afterwards, and the next random numbers."""
    seen = {k: env[k] for k in ("log", "calls", "settings", "rates", "FACTOR", "COUNT")}
    seen |= {"box": vars(env["box"]), "scalar": env["scalar"].item(), "counter": next(env["counter"])}
    drawn = random.random(), torch.rand(()).item(), np.random.rand(), env["draw"]()
    return seen | {"printed": printed.getvalue(), "drawn": drawn}


def looped(params, callbacks):
    states = [{} for _ in params]

    def step():
        for p, state in zip(params, states, strict=True):
            for cb in callbacks:
                with torch.no_grad():
                    state.update(cb(p, **{**state, **HYPERS}) or {})

    return step, states


def optimized(params, callbacks, backend):
    opt = fusedopt.Optimizer(params, callbacks, backend=backend, title="generated", **HYPERS)
    return opt.step, [opt.state[p] for p in params]


def drive(makers, backend=None, steps=3):
    """Parameters, state and everything around them after some steps, in a plain loop or by a backend."""
    gen = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(s, generator=gen, dtype=torch.float64) + 0.1) for s in SHAPES]
    params[3].scale = 0.5
    env = environment(params)
    callbacks = [make(env) for make in makers]
    random.seed(2), torch.manual_seed(2), np.random.seed(2)
    printed = io.StringIO()
    step, states = optimized(params, callbacks, backend) if backend else looped(params, callbacks)
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # what is said is tested elsewhere, and torch deprecates add_(number, tensor)
        for _ in range(steps):
            for p in params:
                p.grad = torch.randn(p.shape, generator=gen, dtype=torch.float64)
            step()
    return params, states, around(env, printed)


def assert_same(found, expected):
    params, states, seen = found
    for p, q in zip(params, expected[0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    for state, other in zip(states, expected[1], strict=True):
        assert state.keys() == other.keys()
        for key in state:
            torch.testing.assert_close(state[key], other[key], rtol=1e-12, atol=1e-12)
    assert seen == expected[2]


LISTS = lists()


@pytest.mark.parametrize("part", range(12))
def test_generated_callbacks_do_what_they_do_in_a_plain_loop(part):
    for makers in LISTS[part::12]:
        expected = drive(makers)
        for backend in ("reference", "cpp"):
            assert_same(drive(makers, backend), expected)


def test_mutation_a_side_effect_too_many_is_noticed():
    makers = [callback(0, ["calls[0] += 1"])]
    params, states, seen = drive(makers)
    with pytest.raises(AssertionError):
        assert_same((params, states, seen | {"calls": [16]}), drive(makers, "cpp"))


@pytest.mark.parametrize("piece", PURE + READING)
def test_what_only_computes_and_reads_is_fused(piece):
    gen = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(3, generator=gen, dtype=torch.float64))]
    params[0].grad = torch.ones_like(params[0])
    env = environment([params[0], params[0]])
    opt = fusedopt.Optimizer(params, callback(0, [piece])(env), backend="cpp", title="generated", **HYPERS)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "(?s)fusedopt: the callback .* changed nothing"
        )  # a branch not taken
        opt.step()
    assert not opt.explain().eager


@pytest.mark.parametrize("piece", IMPURE)
def test_what_does_more_runs_eagerly_and_says_where_and_what_to_do(piece):
    params = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    env = environment(params)
    opt = fusedopt.Optimizer(params, callback(0, [piece])(env), backend="cpp", title="generated", **HYPERS)
    with pytest.warns(RuntimeWarning) as caught, contextlib.redirect_stdout(io.StringIO()):
        opt.step()
    said = [str(w.message) for w in caught if "runs eagerly" in str(w.message)]
    ((name, reason),) = opt.explain().eager
    assert said == [f"fusedopt: the callback {name} runs eagerly, parameter by parameter: {reason}"]
    assert ":" in reason and ". Remedy: " in reason
