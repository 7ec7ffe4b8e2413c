"""Bound steps: what may differ between steps without a look at every tensor, what may not, and what is said of it."""

import random
import warnings

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, needs_extension
from torch import nn

import fusedopt
from fusedopt import optim
from fusedopt.backends import chunking as plan
from fusedopt.extension import leaf
from fusedopt.step import bound

pytestmark = needs_extension
SHAPES = [(4,), (3, 5), (2, 3, 4), ()]


def parameters(seed=0, n=1):
    gen = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=gen)) for s in SHAPES * n]


def gradients(params, seed):
    gen = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=gen)


def drop_some(opt, params, t):
    chosen = random.Random(t).sample(params, 3)
    for p in chosen:
        p.grad = None


def heads_in_turn(opt, params, t):
    for i, p in enumerate(params):
        if i % 3 != t % 3:
            p.grad = None


def new_data(opt, params, t):
    for p in params:
        p.data = p.data.clone()


def new_state(opt, params, t):
    for state in opt.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                state[key] = value.clone()


def new_state_dicts(opt, params, t):
    for p in params:
        opt.state[p] = dict(opt.state[p])


def transposed(opt, params, t):
    params[1].grad = params[1].grad.t().contiguous().t()


def in_its_own_memory(opt, params, t):
    params[0].grad = params[0].detach()


def new_groups(opt, params, t):
    opt.param_groups[:] = [dict(reversed(group.items())) for group in opt.param_groups]


def params_in_a_tuple(opt, params, t):
    for group in opt.param_groups:
        group["params"] = (tuple if t % 2 else list)(group["params"])


def numpy_rate(opt, params, t):
    opt.param_groups[0]["lr"] = np.float64(0.01 * (1 + t % 3))


def tensor_rate(opt, params, t):
    opt.param_groups[0]["lr"] = torch.tensor(0.01 * (1 + t % 3))


def somebody_elses_key(opt, params, t):
    opt.param_groups[0]["seen_by"] = [object()]


def decay_on_and_off(opt, params, t):
    opt.param_groups[0]["weight_decay"] = 0.0 if t % 2 else 0.01


def int_and_float(opt, params, t):
    opt.param_groups[0]["lr"] = 1 if t % 2 else 0.5


def counts_by_hand(opt, params, t):
    opt.state[params[t % len(params)]]["step"] += 3


CHANGES = [
    drop_some, heads_in_turn, new_data, new_state, new_state_dicts, transposed, in_its_own_memory, new_groups,
    params_in_a_tuple, numpy_rate, tensor_rate, somebody_elses_key, decay_on_and_off, int_and_float, counts_by_hand,
]  # fmt: skip
RULES = {
    "AdamW": lambda ps: optim.AdamW(ps, lr=0.01),
    "groups": lambda ps: optim.AdamW(
        [{"params": ps[::2]}, {"params": ps[1::2], "lr": 0.02}], weight_decay=0.1
    ),
    "Lamb": lambda ps: fusedopt.Lamb(ps, lr=0.01),
    "RAdam": lambda ps: fusedopt.RAdam(ps, lr=0.01),
    "SGD": lambda ps: optim.SGD(ps, lr=0.01, momentum=0.9),
    "clipped": lambda ps: optim.AdamW(ps, lr=0.01, max_grad_norm=0.5),
    "Lookahead": lambda ps: fusedopt.Lookahead(fusedopt.Adam(ps, lr=0.01), k=3),
}


PAIRS = [
    pytest.param(name, change, id=f"{name}-{change.__name__}")
    for name in RULES
    for change in CHANGES
    if (name, change) != ("SGD", counts_by_hand)  # it counts no steps
]


@pytest.mark.parametrize(("name", "change"), PAIRS)
def test_a_bound_step_is_the_long_one(name, change):
    """To the last bit, for every change between steps, and most steps are repeated."""
    # Counts that differ take other sides of the branch, in another combination each time.
    apart = name in ("RAdam", "Lookahead") and change in (drop_some, heads_in_turn, counts_by_hand)
    twins = []
    for binds in (True, False):
        random.seed(0)
        params = parameters(n=2)
        opt = RULES[name](params)
        for t in range(24):
            gradients(params, t)
            if t > 2:
                change(opt, params, t)
            opt.engine.binds = binds
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if apart else "error")
                opt.step()
        twins.append((params, [opt.state[p] for p in params], opt))
    (ours, states, opt), (expected, others, _) = twins
    for p, q, s, t in zip(ours, expected, states, others, strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert s.keys() == t.keys()
        for key in s:
            if isinstance(s[key], torch.Tensor):
                assert_same_bits(s[key], t[key])
            else:
                assert (type(s[key]), s[key]) == (type(t[key]), t[key])
    if not apart:
        assert opt.engine.steps.repeated >= 24 - 8, str(opt.engine.steps)


def test_alternating_structures_are_each_bound_once():
    params = parameters()
    opt = optim.AdamW(params, lr=0.01)
    for t in range(30):
        gradients(params, t)
        opt.param_groups[0]["lr"] = 1 if t % 2 else 0.5
        opt.step()
    assert len(opt.engine.bound) == 2
    assert opt.engine.steps.anew <= 4


def test_structures_that_never_come_again_do_not_pile_up():
    params = parameters()
    opt = fusedopt.Optimizer(
        params, lambda p, lr, flag, **kwargs: p.data.sub_(p.grad, alpha=lr), lr=0.01, flag=""
    )
    with pytest.warns(RuntimeWarning, match="most of the last"):
        for t in range(40):
            gradients(params, t)
            opt.param_groups[0]["flag"] = f"step {t}"
            opt.step()
    assert len(opt.engine.bound) == bound.MOST


@pytest.mark.parametrize("each", [1, 4], ids=["a group for each", "groups of four"])
def test_groups_that_rest_take_part_in_the_step_that_is_bound(each):
    """As experts do, of which a few have gradients in each step."""
    params, twins = parameters(n=8), parameters(n=8)
    ours, torchs = (
        kind([dict(params=ps[i : i + each]) for i in range(0, len(ps), each)], lr=0.01)
        for kind, ps in ((optim.AdamW, params), (torch.optim.AdamW, twins))
    )
    for t in range(60):
        gradients(params, t)
        active = random.Random(t).sample(range(0, len(params), each), 3)
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            p.grad = p.grad if t == 0 or i // each * each in active else None
            q.grad = p.grad
        ours.param_groups[t % 3]["lr"] = torchs.param_groups[t % 3]["lr"] = 0.01 / (1 + t)
        ours.step()
        torchs.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert ours.engine.steps.anew <= 3, str(ours.engine.steps)


# -- what is said --


def float_of_the_count(p, lr, step=0, **kwargs):
    p.data.sub_(p.grad, alpha=lr * float(str(float(step + 1))))
    return {"step": step + 1}


SLOW = {
    "a flag that changes": (
        lambda p, lr, flag="", **kwargs: p.data.sub_(p.grad, alpha=lr),
        lambda opt, params, t: opt.param_groups[0].update(flag=f"{t}"),
        "group 0: flag: it is another kind of value, or a flag that has changed",
    ),
    "a number that leaves": (
        float_of_the_count,
        lambda opt, params, t: None,
        "a number that changes with each step leaves recorded arithmetic",
    ),
    "shapes that change": (
        lambda p, lr, **kwargs: p.data.sub_(p.grad, alpha=lr),
        lambda opt, params, t: (
            params[0].__setattr__("grad", None),
            params[0].__setattr__("data", torch.ones(t + 1)),
            params[0].__setattr__("grad", torch.ones(t + 1)),
        ),
        "parameter 0 of group 0: it is of another dtype or shape",
    ),
}


@pytest.mark.parametrize("name", SLOW)
def test_steps_that_keep_being_slow_are_announced_once_with_the_reason(name):
    callback, change, why = SLOW[name]
    params = parameters()
    opt = fusedopt.Optimizer(params, callback, lr=0.01)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for t in range(60):
            gradients(params, t)
            change(opt, params, t)
            opt.step()
    (text,) = [str(w.message) for w in said if "most of the last" in str(w.message)]
    assert why in text and "Remedy: " in text
    assert why in str(opt.explain()).split("steps: ")[1]


def test_a_step_that_is_slow_now_and_then_is_explained_and_not_announced():
    params = parameters()
    opt = optim.AdamW(params, lr=0.01)
    for t in range(60):
        gradients(params, t)
        if t % 10 == 9:
            opt.load_state_dict(opt.state_dict())
        opt.step()
    assert opt.engine.steps.anew == 8
    assert "52 of 60 without Python work for each tensor; 8 with it, the last one" in str(opt.explain())


# -- rules that C++ and Python both have --


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_chunks_are_shared_among_threads_as_in_python(threads):
    rng = random.Random(threads)
    for _ in range(50):
        sizes = tuple(rng.choice([0, 1, 64, 1000, 70_000, 300_000]) for _ in range(rng.randrange(1, 40)))
        layout = plan.layout(sizes)
        theirs = leaf.native.splits(layout.chunks.ctypes.data, len(layout.chunks), threads)
        assert tuple(theirs) == plan.splits(layout, threads)


@pytest.mark.parametrize("make", [lambda ps: optim.SGD(ps, lr=0.5), lambda ps: optim.Adam(ps, lr=0.5)])
def test_a_parameter_that_is_not_dense_in_memory_is_stepped_alone_and_never_bound(make):
    whole = torch.arange(12.0).reshape(3, 4)
    rest, dense = whole[:, 2:].clone(), nn.Parameter(whole[:, :2].clone())
    p = nn.Parameter(whole[:, :2])
    opt, twin = make([p]), make([dense])
    for t in range(4):
        p.grad = dense.grad = torch.full((3, 2), float(t))
        opt.step()
        twin.step()
    assert_same_bits(p.detach().contiguous(), dense.detach())
    assert torch.equal(whole[:, 2:], rest)
    assert opt.engine.steps.repeated == 0 and "not dense in memory" in opt.engine.steps.why
