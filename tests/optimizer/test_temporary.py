"""Values that callbacks hand to later ones of the same step: never state, and no memory traffic where all is fused."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers import assert_same_bits, needs_extension
from torch import nn

import fusedopt
from fusedopt.ir.program import identifier

SHAPES = [(4,), (3, 5), (2, 3, 4), (), (0, 2)]
BACKENDS = ["cpp", "reference"]


def parameters(dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in SHAPES]


def gradients(params, seed):
    gen = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)


def momentum(p, mom, slow=None, step=0, **kwargs):
    """Hands on an update, a norm and a number, and keeps a buffer and a count."""
    if slow is None:
        slow = torch.zeros_like(p)
    slow.mul_(mom).add_(p.grad)
    return {"slow": slow, "step": step + 1, "_update": p.grad + mom * slow, "_rate": 1 / (step + 1)}


def masked(p, _update, **kwargs):
    """Changes what it was handed in place, and hands on a mask."""
    _update.mul_(0.5)
    return {"_same": _update * p.data > 0, "_norm": p.data.square().mean().sqrt()}


def descend(p, lr, _update, _rate, _same, _norm, **kwargs):
    p.data.sub_(torch.where(_same, _update, 2 * _update) * _norm, alpha=lr * _rate)


def sorts(p, _update, **kwargs):
    """Has no fused form, as it reads a number on the host."""
    if p.dim():
        _update.sum().item()
        _update.copy_(_update.sort(dim=0).values)


RULE = [momentum, masked, descend]


def plain(x, g, slow, t, lr=0.1, mom=0.9, middle=None):
    """One step in plain torch."""
    slow.mul_(mom).add_(g)
    update = g + mom * slow
    if middle is not None and x.dim():
        update = middle(update)
    update = update * 0.5
    norm = x.square().mean().sqrt()
    x -= lr / (t + 1) * torch.where(update * x > 0, update, 2 * update) * norm


@pytest.mark.parametrize("backend", BACKENDS)
def test_they_arrive_and_are_gone_after_the_step(backend):
    params = parameters(torch.float64)
    opt = fusedopt.Optimizer(params, RULE, lr=0.1, mom=0.9, backend=backend)
    truth = [p.detach().clone() for p in params]
    slow = [torch.zeros_like(x) for x in truth]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(5):
            gradients(params, t)
            opt.step()
            for x, p, s in zip(truth, params, slow, strict=True):
                plain(x, p.grad, s, t)
    for x, p in zip(truth, params, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-12, atol=1e-12)
        assert opt.state[p].keys() == {"slow", "step"}
    assert all(state.keys() == {"slow", "step"} for state in opt.state_dict()["state"].values())


def test_fused_they_move_no_memory_and_steps_stay_bound():
    params = parameters()
    opt = fusedopt.Optimizer(params, RULE, lr=0.1, mom=0.9)
    for t in range(6):
        gradients(params, t)
        opt.step()
    last = opt.explain().stages[-1]
    assert set(last.reads) == {"param", "grad", "slow"} and set(last.writes) == {"param", "slow"}
    assert identifier("_update") not in str(opt.explain().stages)


@needs_extension
def test_steps_with_them_are_bound():
    params = parameters()
    opt = fusedopt.Optimizer(params, RULE, lr=0.1, mom=0.9)
    for t in range(6):
        gradients(params, t)
        opt.step()
    assert (opt.engine.steps.repeated, opt.engine.steps.anew) == (4, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree(dtype):
    found = []
    for backend in BACKENDS:
        params = parameters(dtype)
        opt = fusedopt.Optimizer(params, RULE, lr=0.1, mom=0.5, backend=backend)
        for t in range(4):
            gradients(params, t)
            opt.step()
        found.append(params)
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, dict(max_grad_norm=1e6), dict(capturable=True)], ids=str)
def test_they_reach_callbacks_that_run_eagerly_and_those_behind(backend, options):
    params = parameters(torch.float64)
    opt = fusedopt.Optimizer(
        params, [momentum, sorts, masked, descend], lr=0.1, mom=0.9, backend=backend, **options
    )
    truth = [p.detach().clone() for p in params]
    slow = [torch.zeros_like(x) for x in truth]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(4):
            gradients(params, t)
            opt.step()
            for x, p, s in zip(truth, params, slow, strict=True):
                plain(x, p.grad, s, t, middle=lambda u: u.sort(dim=0).values)
    for x, p in zip(truth, params, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-6, atol=1e-6)
        assert opt.state[p].keys() == {"slow", "step"}
    assert len(caught) == (backend == "cpp"), [str(w.message) for w in caught]
    if backend == "cpp":
        assert [e.callback for e in opt.explain().eager] == ["sorts"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_they_are_values_not_views(backend):
    def hand_on(p, **kwargs):
        return {"_old": p.data, "_gradient": p.grad}

    def change(p, **kwargs):
        p.data.mul_(2)
        p.grad.zero_()

    def take(p, _old, _gradient, **kwargs):
        p.data.sub_(_old).add_(_gradient)

    params = parameters(torch.float64)
    before = [p.detach().clone() for p in params]
    opt = fusedopt.Optimizer(params, [hand_on, change, take], lr=1.0, backend=backend)
    gradients(params, 0)
    opt.step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), old + p.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_that_nobody_has_handed_on_is_missed(backend):
    params = parameters()
    gradients(params, 0)
    opt = fusedopt.Optimizer(params, [descend, momentum], lr=0.1, mom=0.9, backend=backend)
    with pytest.raises(TypeError, match=r"needs _update.*put the callback that returns it before this one"):
        opt.step()
    assert not opt.state


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_absent_at_the_beginning_of_each_step_whatever_the_state_has(backend):
    def first(p, _seen=None, **kwargs):
        p.data.add_(1 if _seen is None else 100)
        return {"_seen": p.data}

    def second(p, _seen, **kwargs):
        p.data.add_(_seen, alpha=0)

    params = [nn.Parameter(torch.zeros(3))]
    opt = fusedopt.Optimizer(params, [first, second], lr=0.1, backend=backend)
    opt.state[params[0]]["_seen"] = torch.ones(3)  # somebody's note
    for t in range(4):
        gradients(params, t)
        opt.step()
    assert torch.equal(params[0].detach(), torch.full((3,), 4.0))
    assert torch.equal(opt.state[params[0]]["_seen"], torch.ones(3))


def test_branches_on_norms_may_decide_what_is_handed_on():
    def choose(p, **kwargs):
        if p.grad.norm() > 1:
            return {"_scale": 1 / p.grad.norm()}
        return {"_scale": 1.0}

    def take(p, lr, _scale, **kwargs):
        p.data.sub_(p.grad * _scale, alpha=lr)

    params = parameters(torch.float64)
    before = [p.detach().clone() for p in params]
    opt = fusedopt.Optimizer(params, [choose, take], lr=1.0)
    gradients(params, 0)
    opt.step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), old - p.grad / max(1.0, p.grad.norm().item()))
    assert not opt.explain().eager


def test_copies_and_loading_know_nothing_of_them():
    params = parameters()
    opt = fusedopt.Optimizer(params, RULE, lr=0.1, mom=0.9)
    for t in range(3):
        gradients(params, t)
        opt.step()
    other = pickle.loads(pickle.dumps(opt))
    third = fusedopt.Optimizer(copy.deepcopy(params), RULE, lr=0.1, mom=0.9)
    third.load_state_dict(opt.state_dict())
    for each in (opt, other, third):
        for t in range(3, 6):
            gradients(each.param_groups[0]["params"], t)
            each.step()
    for each in (other, third):
        for p, q in zip(params, each.param_groups[0]["params"], strict=True):
            assert_same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_they_are_handed_on_within_what_is_applied(backend):
    def halve(p, **kwargs):
        return {"_half": p.data / 2}

    def take(p, _half, **kwargs):
        p.data.copy_(_half)

    params = parameters()
    before = [p.detach().clone() for p in params]
    opt = fusedopt.SGD(params, lr=0.1, backend=backend)
    for _ in range(3):
        opt.apply([halve, take])
    for p, old in zip(params, before, strict=True):
        assert_same_bits(p.detach(), old / 8)
    assert not opt.state


def test_of_fused_classes_state_with_an_underscore_is_state():
    class Own(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, dict(lr=lr))

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state["_sum"] = torch.zeros_like(p)
                    state["_sum"].add_(p.grad)
                    p.sub_(state["_sum"], alpha=group["lr"])

    params = [nn.Parameter(torch.zeros(3))]
    opt = fusedopt.fuse(Own(params, lr=1.0))
    for _ in range(4):
        params[0].grad = torch.ones(3)
        opt.step()
    assert torch.equal(params[0].detach(), torch.full((3,), -10.0))
    assert not opt.explain().eager
