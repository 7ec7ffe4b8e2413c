"""fastai's own callbacks, unmodified, in our Optimizer: they fuse whole, and do what fastai's optimizer does.

Every list that fastai's factories build is taken from the optimizer they return. Tolerance by competition: fastai's
optimizer in float64 is the truth, in float32 the competitor.
"""

import warnings
from functools import cache

import pytest
import torch
from helpers import assert_close_to_float64

import fusedopt

with warnings.catch_warnings():
    # fastai scripts a function at import; torch deprecates that, and fastai is not ours to change
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=DeprecationWarning)
    from fastai import optimizer as fastai

STEPS = 20
SHAPES = [(4, 5), (7,), (1,), (130,), (3,)]
ZERO = 4  # starts at zero, so that it has no norm: another path through LAMB's branches

# factory, keyword arguments, launches per step: one of Larc's stores its rate per tensor
LISTS = [
    ("SGD", dict(), 1),
    ("SGD", dict(mom=0.9, wd=0.01), 1),
    ("SGD", dict(mom=0.9, wd=0.01, decouple_wd=False), 1),
    ("RMSProp", dict(wd=0.01), 1),
    ("RMSProp", dict(mom=0.9, wd=0.01, decouple_wd=False), 1),
    ("Adam", dict(), 1),
    ("Adam", dict(wd=0.1, decouple_wd=False), 1),
    ("RAdam", dict(wd=0.01), 1),
    ("RAdam", dict(beta=50.0), 1),
    ("QHAdam", dict(wd=0.01), 1),
    ("Larc", dict(wd=0.01), 3),
    ("Larc", dict(mom=0.0, trust_coeff=5.0, wd=0.01, decouple_wd=False), 3),
    ("Larc", dict(clip=False), 3),
    ("Lamb", dict(wd=0.01), 2),
    ("Lamb", dict(wd=0.01, decouple_wd=False), 2),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in kwargs.items())]) for name, kwargs, _ in LISTS]
CASES = pytest.mark.parametrize("case", range(len(LISTS)), ids=IDS)


@cache
def problem():
    """Start values and the gradients of every step, exact in float32."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    start[ZERO].zero_()
    return start, [[torch.randn(s, generator=generator) * 0.5 + 0.2 for s in SHAPES] for _ in range(STEPS)]


def fastai_optimizer(case, params):
    name, kwargs, _ = LISTS[case]
    return getattr(fastai, name)(params, lr=0.03, **kwargs)


def run(make, dtype):
    """The optimizer and its parameters after all steps, with one learning rate in the first half, another after."""
    start, grads = problem()
    params = [p.to(dtype, copy=True).requires_grad_() for p in start]
    opt = make(params)
    for t in range(STEPS):
        for p, g in zip(params, grads[t], strict=True):
            p.grad = g.to(dtype, copy=True)  # fastai's l2_reg writes to it
        if t == STEPS // 2:
            opt.set_hyper("lr", 0.02)
        opt.step()
    return opt, [p.detach() for p in params]


@cache
def fastai_runs(case):
    """fastai's parameters in float64, and in float32."""
    return [run(lambda params: fastai_optimizer(case, params), d)[1] for d in (torch.float64, torch.float32)]


def ours(case, mutate=lambda cbs: cbs, backend="cpp"):
    """Our Optimizer on fastai's callbacks and hyperparameters, after all steps, and its parameters."""

    def make(params):
        theirs = fastai_optimizer(case, params)
        return fusedopt.Optimizer(params, mutate(theirs.cbs), backend=backend, **theirs.hypers[0])

    return run(make, torch.float32)


@CASES
def test_unmodified_callbacks_fuse_and_agree_with_fastai(case):
    opt, params = ours(case)
    truth, competitor = fastai_runs(case)
    assert_close_to_float64(params, competitor, truth)
    explained = opt.explain()
    assert explained.eager == () and explained.launches == LISTS[case][2]
    assert explained.backend == "cpp"


@CASES
def test_the_reference_agrees_with_fastai(case):
    truth, competitor = fastai_runs(case)
    assert_close_to_float64(ours(case, backend="reference")[1], competitor, truth)


def step_too_long(cbs):
    """The last callback's step, one part in a thousand longer."""
    *rest, last = cbs

    def longer(p, **kwargs):
        before = p.data.clone()
        returned = last(p, **kwargs)
        p.data.add_(p.data - before, alpha=1e-3)
        return returned

    longer.defaults = getattr(last, "defaults", {})
    return [*rest, longer]


@CASES
def test_a_step_that_is_a_thousandth_too_long_is_noticed(case):
    truth, competitor = fastai_runs(case)
    with pytest.raises(AssertionError, match="above"):
        assert_close_to_float64(ours(case, step_too_long, backend="reference")[1], competitor, truth)


@pytest.mark.parametrize("case", [k for k, (_, kwargs, _) in enumerate(LISTS) if kwargs.get("wd")])
def test_weight_decay_that_is_dropped_is_noticed(case):
    truth, competitor = fastai_runs(case)
    with pytest.raises(AssertionError, match="above"):
        assert_close_to_float64(ours(case, lambda cbs: cbs[1:], backend="reference")[1], competitor, truth)


def test_the_callbacks_are_fastais_own():
    cbs = fastai_optimizer(IDS.index("Lamb-wd=0.01"), [torch.ones(1, requires_grad=True)]).cbs
    functions = [getattr(cb, "func", cb) for cb in cbs]
    assert {f.__module__ for f in functions} == {"fastai.optimizer"}
    assert [f.__name__ for f in functions] == [
        "weight_decay",
        "average_grad",
        "average_sqr_grad",
        "step_stat",
        "lamb_step",
    ]


def test_every_factory_of_fastai_is_here():
    """Lookahead and ranger wrap an optimizer; they are compared in test_named."""
    made = {name for name in fastai.__all__ if name[0].isupper()} - {"Optimizer", "OptimWrapper", "Lookahead"}
    assert made == {name for name, *_ in LISTS}


@pytest.mark.parametrize("name", ["Adam", "Lamb", "Larc"])
def test_a_schedule_compiles_nothing_after_the_first_step(name):
    case = IDS.index(f"{name}-wd=0.01" if name != "Adam" else "Adam")
    opt, _ = ours(case)
    assert len(opt.explain().compiled) == 1
    before = opt.explain().compiled
    opt.set_hyper("lr", 0.005), opt.set_hyper("wd", 0.03)
    opt.step()
    assert opt.explain().compiled == before


def test_radam_compiles_a_second_kernel_where_it_becomes_adaptive():
    opt, _ = ours(IDS.index("RAdam-wd=0.01"))
    assert len(opt.explain().compiled) == 2


def test_fastais_learner_freezing_flags_are_seen_by_its_callbacks():
    """``do_wd=False`` in a parameter's state, as fastai sets it for biases and norms."""
    p, q = (torch.ones(3, requires_grad=True) for _ in range(2))
    opt = fusedopt.Optimizer([p, q], fastai.SGD([p], lr=0.1, wd=0.5).cbs, backend="cpp", lr=0.1, wd=0.5)
    opt.state[q]["do_wd"] = False
    p.grad, q.grad = torch.zeros(3), torch.zeros(3)
    opt.step()
    assert torch.equal(p, torch.full((3,), 1 - 0.1 * 0.5)) and torch.equal(q, torch.ones(3))
