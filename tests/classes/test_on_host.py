"""Step counts that the host keeps in tensors while parameters are on a GPU, as torch.optim's: numbers to kernels.

There is no GPU here: every 0-d tensor in the state is taken for one that the host keeps.
"""

import warnings

import pytest
import torch
from helpers import needs_extension
from test_fuse import rule

import fusedopt
from fusedopt.classes import buckets

pytestmark = needs_extension
SHAPES = (3,), (1000,), (64, 64)
TORCHS = [
    (name, more)
    for name in (
        "Adadelta",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
        "ASGD",
    )
    for more in ({}, {"foreach": True})
]


@pytest.fixture(autouse=True)
def seen(monkeypatch):
    """The names of the tensors that were taken for the host's."""
    found = []

    def on_host(value, p):
        there = type(value) is torch.Tensor and value.dim() == 0
        if there:
            found.append(value)
        return there

    monkeypatch.setattr(buckets, "on_host", on_host)
    return found


def repeated(opt):
    """How many steps took no Python work per tensor."""
    return int(opt.explain().steps.split()[0])


def start():
    torch.manual_seed(0)
    return [torch.randn(s, requires_grad=True) for s in SHAPES]


def give(params, t, without=()):
    torch.manual_seed(1 + t)
    for k, p in enumerate(params):
        p.grad = torch.randn(p.shape) if k not in without else None


def both(kind, steps=10, **more):
    """A fused one and its twin after the same steps, with a rate that changes and a gradient that is not there."""
    ours, plain = start(), start()
    opt, other = fusedopt.fuse(kind(ours, lr=1e-2, **more), check=3), kind(plain, lr=1e-2, **more)
    tensors = None
    for t in range(steps):
        for params, each in ((ours, opt), (plain, other)):
            give(params, t, (1,) if t == steps - 1 else ())
            each.param_groups[0]["lr"] = 1e-2 / (1 + t // 3)
            each.step()
        counts = [v for p in ours for v in opt.state[p].values() if torch.is_tensor(v) and not v.dim()]
        assert tensors is None or all(a is b for a, b in zip(tensors, counts, strict=True)), (
            "they stay the same"
        )
        tensors = counts if t else None
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for key, value in other.state[q].items():
            if torch.is_tensor(value):
                torch.testing.assert_close(opt.state[p][key], value, rtol=1e-5, atol=1e-6)
    return opt, ours


@pytest.mark.parametrize(("name", "more"), TORCHS)
def test_torchs_classes_are_fused(name, more, seen):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt, _ = both(getattr(torch.optim, name), **more)
    assert opt.explain().launches == 1 and not opt.explain().eager
    assert seen or name == "SGD"
    assert repeated(opt) >= 6


def counting(dtype, key="step"):
    def one(self, p, group, state):
        if key not in state:
            state[key] = torch.zeros((), dtype=dtype)
        state[key] += 1
        p.sub_(p.grad, alpha=group["lr"] / (1 + state[key].item()))

    return rule(one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16], ids=str)
def test_counts_of_any_type(dtype):
    opt, params = both(counting(dtype))
    assert not opt.explain().eager
    assert [opt.state[p]["step"].item() for p in params] == [10, 9, 10]
    assert opt.state[params[0]]["step"].dtype == dtype


def test_what_others_write_there_is_read():
    """As load_state_dict of a part, or a user, would."""
    opt, params = both(torch.optim.AdamW)
    before = repeated(opt)
    for p in params:
        opt.state[p]["step"].fill_(100.0)
    give(params, 20)
    opt.step()
    assert opt.state[params[0]]["step"].item() == 101.0
    assert repeated(opt) == before + 1
    opt.state[params[0]]["step"] = torch.tensor(7.0)
    give(params, 21)
    opt.step()
    assert [opt.state[p]["step"].item() for p in params] == [8.0, 102.0, 102.0]


def written(norm, state):
    state["norm"].copy_(norm)


def replaced(norm, state):
    state["norm"] = norm


@pytest.mark.parametrize(
    ("put", "words"),
    [(written, "gets a number from a parameter"), (replaced, "becomes a number of the device")],
)
def test_a_number_of_the_device_is_not_brought_there(put, words):
    def one(self, p, group, state):
        if not state:
            state["norm"] = torch.zeros(())
        put(p.grad.norm(), state)
        p.sub_(p.grad, alpha=group["lr"])

    params = start()
    opt = fusedopt.fuse(rule(one)(params))
    with pytest.warns(RuntimeWarning, match=words):
        for t in range(9):
            give(params, t)
            opt.step()


def test_a_count_that_parameters_share_is_the_classs_own():
    """Each of them counts: written once, it would fall behind. No comparison looks at that here."""

    def one(self, p, group, state):
        if not state:
            state["step"] = vars(self).setdefault("shared", torch.zeros(()))
        state["step"] += 1
        p.sub_(p.grad, alpha=group["lr"] / (1 + state["step"].item()))

    kind, ours, plain = rule(one), start(), start()
    opt, other = fusedopt.fuse(kind(ours), check=0), kind(plain)
    with pytest.warns(RuntimeWarning, match="have memory in common"):
        for t in range(6):
            for params, each in ((ours, opt), (plain, other)):
                give(params, t)
                each.step()
    assert opt.state[ours[0]]["step"].item() == other.state[plain[0]]["step"].item() == 18
    for p, q in zip(ours, plain, strict=True):
        assert torch.equal(p, q)


def test_the_comparison_with_the_class_notices_a_count(monkeypatch):
    """A trace that counts otherwise is not used."""
    monkeypatch.setattr(fusedopt.trace.tracer.Trace, "new_numbers", lambda self: {"step": 77.0})
    with pytest.warns(RuntimeWarning, match="the state 'step' is 77.0"):
        both(torch.optim.AdamW)
