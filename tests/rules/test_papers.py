"""Every rule against its paper, written once more in plain torch: see papers.py.

Tolerance by competition: the paper's loop runs in float64 (the truth) and in float32. Ours may be off from the truth by
at most twice the float32 loop's own error, or 2 ulp. Mutations show that the comparison can fail.
"""

import inspect
import math
from functools import cache

import pytest
import torch
from papers import JOINT, PAPERS, constant

from fusedopt import table

STEPS, SNAPSHOTS = 60, (1, 2, 7, 20, 60)
SHAPES = [(1,), (7,), (3, 5), (130,), (4,), (2, 3, 2)]
ZERO = 4
"""A parameter that starts at zero, and so has no norm."""
CASES = [pytest.param(r, v, id=f"{r.name}-{v.id}") for r in table.RULES for v in r.exact]
FIRST = [pytest.param(r, r.exact[0], id=r.name) for r in table.RULES]


def half_cosine(t):
    return 0.5 * (1 + math.cos(math.pi * t / STEPS))


@cache
def problem():
    """Start values and gradients of every step, exact in float32."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator) for s in SHAPES]
    start[ZERO].zero_()
    return start, [[torch.randn(s, generator=generator) * 0.5 + 0.2 for s in SHAPES] for _ in range(STEPS)]


def problem_of(row):
    """Of the parameters that a rule takes."""
    start, grads = problem()
    taken = [i for i, p in enumerate(start) if row.shapes([p.shape])]
    return [start[i] for i in taken], [[given[i] for i in taken] for given in grads]


@cache
def paper_runs(name, index, dtype, schedule):
    """Snapshots of the paper's loop: a row for each, of all parameters."""
    row = table.row("rules", name)
    kwargs = dict(row.variants[index].kwargs)
    sign = -1.0 if kwargs.pop("maximize", False) else 1.0
    start, grads = problem_of(row)
    params = [p.to(dtype, copy=True) for p in start]
    grads = [[sign * g.to(dtype) for g in given] for given in grads]
    if name in JOINT:
        loops = [PAPERS[name](params, grads, **kwargs, schedule=schedule)]
    else:
        loops = [
            PAPERS[name](p, [g[i] for g in grads], **kwargs, schedule=schedule) for i, p in enumerate(params)
        ]
    seen = []
    for t, _ in enumerate(zip(*loops, strict=True), 1):
        if t in SNAPSHOTS:
            seen.append([p.double().flatten().clone() for p in params])
    return [torch.stack(of_one) for of_one in zip(*seen, strict=True)]


def our_runs(row, variant, dtype, schedule, mutate=None, **options):
    """Our optimizer and its parameters, at one snapshot after another."""
    start, grads = problem_of(row)
    params = [torch.nn.Parameter(p.to(dtype, copy=True)) for p in start]
    opt = row.factory(params, **variant.kwargs, **options)
    if mutate is not None:
        mutate(opt)
    rates = [g["lr"] for g in opt.param_groups]
    for t in range(1, STEPS + 1):
        for p, g in zip(params, grads[t - 1], strict=True):
            p.grad = g.to(dtype, copy=True)
        for group, lr in zip(opt.param_groups, rates, strict=True):
            group["lr"] = lr * schedule(t)
        opt.step()
        if t in SNAPSHOTS:
            yield opt, [p.detach().double().flatten() for p in params]


def assert_competes(ours, truth, theirs, dtype, steps):
    """Each parameter, after these steps, is as near to the truth as rounding allows."""
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps

    def error(found):
        return torch.stack([_relative(a, t) for a, t in zip(found, truth, strict=True)]).amax()

    assert all(t.isfinite().all() for t in truth)
    bound = 2 * error(theirs) * (eps / eps32) + eps * (2 + steps / 2)
    assert error(ours) <= bound, f"error {error(ours):.3g} above {bound:.3g} after {steps} steps"


def _relative(found, truth):
    return (found - truth).abs().amax() / truth.abs().amax().clamp(min=1e-3)


def check(row, variant, dtype, schedule=constant, mutate=None, followed=None, **options):
    """We compete, at each snapshot; what is wrong at the first goes no further. ``followed``: another schedule."""
    index = row.variants.index(variant)
    runs = [paper_runs(row.name, index, d, schedule) for d in (torch.float64, torch.float32)]
    snapshots = our_runs(row, variant, dtype, followed or schedule, mutate, **options)
    for k, (steps, snapshot) in enumerate(zip(SNAPSHOTS, snapshots, strict=True)):
        opt, ours = snapshot
        assert_competes(ours, *([seen[k] for seen in run] for run in runs), dtype, steps)
    return opt


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("row", "variant"), CASES)
def test_a_rule_is_its_papers(row, variant, dtype):
    opt = check(row, variant, dtype, backend="cpp")
    assert not opt.explain().eager


@pytest.mark.parametrize(("row", "variant"), CASES)
def test_its_callbacks_run_eagerly_are_the_papers(row, variant):
    check(row, variant, torch.float64, backend="reference")


@pytest.mark.parametrize(("row", "variant"), FIRST)
def test_a_schedule_changes_what_it_changes_in_the_paper_and_compiles_nothing(row, variant):
    opt = check(row, variant, torch.float32, half_cosine, backend="cpp")
    kinds = (1 + row.changes_structure + variant.first_step_kernel) * (1 + row.totals) + row.totals
    compiled = opt.explain().compiled
    if row.calls:  # kernels for each shape, and for steps that call other things
        same = check(row, variant, torch.float32, backend="cpp").explain().compiled
        assert [(c.name, c.why) for c in compiled] == [(c.name, c.why) for c in same]
    elif row.matrix_launches:  # a kernel for each number of dimensions, in the first step
        assert len(compiled) > 1 and all(c.why.startswith("first step") for c in compiled)
    else:
        assert len(compiled) == kinds


@pytest.mark.parametrize(("row", "variant"), CASES)
def test_arguments_and_defaults_are_those_written_down_with_the_paper(row, variant):
    paper = inspect.signature(PAPERS[row.name]).parameters
    theirs = {k: p.default for k, p in paper.items() if p.default is not p.empty}
    ours = inspect.signature(row.factory).parameters
    for name, parameter in ours.items():
        if name not in ("params", "maximize", "options", "kwargs"):
            assert parameter.default == theirs[name], name
    assert set(variant.kwargs) <= {*theirs, "maximize"}


# --
# Mutations


def flip_sign(opt):
    def flip(p, **kwargs):
        p.grad.data.neg_()

    opt.cbs = [flip, *opt.cbs]


def shift_lr(opt):
    for group in opt.param_groups:
        group["lr"] *= 1.01


def more_momentum(opt):
    opt.set_hyper("mom", opt.hypers[0]["mom"] * 0.99)


def more_decay(opt):
    opt.set_hyper("wd", opt.hypers[0]["wd"] * 1.1)


MOMENTUM = {"Adafactor": -1, "SGDP": -1, "SM3": -1, "DoG": None, "LDoG": None}
"""The variant that has momentum, of rules whose first has none; None: of those that never have."""


def mutations():
    for row in table.RULES:
        yield row, row.exact[0], flip_sign
        yield row, row.exact[0], shift_lr
        which = MOMENTUM.get(row.name, 0)
        if which is not None:
            yield row, row.exact[which], more_momentum
        decayed = next((v for v in row.exact if v.kwargs.get("weight_decay")), None)
        if decayed is not None:
            yield row, decayed, more_decay


@pytest.mark.parametrize(
    ("row", "variant", "mutate"),
    [pytest.param(*m, id=f"{m[0].name}-{m[2].__name__}") for m in mutations()],
)
def test_mutation_is_noticed(row, variant, mutate):
    with pytest.raises(AssertionError, match=r"error .* above"):
        check(row, variant, torch.float64, mutate=mutate, backend="reference")


@pytest.mark.parametrize(("row", "variant"), FIRST)
def test_mutation_a_schedule_that_is_not_followed_is_noticed(row, variant):
    with pytest.raises(AssertionError, match=r"error .* above"):
        check(row, variant, torch.float32, half_cosine, followed=constant, backend="reference")
