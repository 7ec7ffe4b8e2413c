"""Checkpoints know nothing of policies: they hold plain tensors, and come back to the bit."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

from fusedopt import optim

CHOICES = {
    "int8": (torch.float32, "int8"),
    "at random": (torch.float32, "bfloat16_sr"),
    "corrected": (torch.bfloat16, {"param": "bf16+16", "exp_avg": "int8", "exp_avg_sq": "bf16+8"}),
    "masters": (torch.bfloat16, {"param": "master", "*": "float32"}),
    "kahan": (torch.bfloat16, {"param": "kahan", "*": "kahan"}),
}


def made(choice, backend="cpp", **options):
    dtype, storage = CHOICES[choice]
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((80, 61), (4096,), (3,))]
    return params, optim.AdamW(params, lr=0.01, storage=storage, backend=backend, **options)


def train(params, opt, first, last):
    for t in range(first, last):
        torch.manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape).to(p.dtype)
        opt.step()


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(choice, backend):
    params, opt = made(choice, backend)
    train(params, opt, 0, 3)
    saved = copy.deepcopy(opt.state_dict())
    others, other = made(choice, backend)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(saved)
    for p, q in zip(params, others, strict=True):
        assert opt.state[p].keys() == other.state[q].keys()
        for key, value in opt.state[p].items():
            if isinstance(value, torch.Tensor):
                assert_same_bits(other.state[q][key].float(), value.float())
                assert other.state[q][key].dtype == value.dtype
            else:
                assert other.state[q][key] == value
    train(params, opt, 3, 6)
    train(others, other, 3, 6)
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("choice", ["int8", "at random"])
def test_torchs_optimizer_reads_it_and_ours_torchs(choice):
    params, opt = made(choice)
    train(params, opt, 0, 3)
    saved = opt.state_dict()
    assert all(
        v.is_floating_point() for s in saved["state"].values() for v in s.values() if torch.is_tensor(v)
    )
    theirs = torch.optim.AdamW([nn.Parameter(p.detach().clone()) for p in params], lr=0.01)
    theirs.load_state_dict(copy.deepcopy(saved))
    own = theirs.param_groups[0]["params"]
    train(own, theirs, 3, 5)
    train(params, opt, 3, 5)
    for p, q in zip(params, own, strict=True):
        torch.testing.assert_close(p, q, rtol=0.02, atol=0.002)
    _, ours = made(choice)
    del theirs.param_groups[0]["storage"]  # which it has kept as it does what it does not know
    with pytest.warns(UserWarning, match="was stored as plain tensors, and is from here on as"):
        ours.load_state_dict(theirs.state_dict())
    first = ours.param_groups[0]["params"][0]
    kept = {k: v.dtype for k, v in ours.state[first].items() if torch.is_tensor(v)}
    assert kept == {k: v.dtype for k, v in opt.state[params[0]].items() if torch.is_tensor(v)}
    train(ours.param_groups[0]["params"], ours, 5, 6)


def test_storage_may_be_another_one_and_that_is_said():
    params, opt = made("int8")
    train(params, opt, 0, 3)
    saved = opt.state_dict()
    _, other = made("at random")
    with pytest.warns(UserWarning, match=r"as \*=int8, and is from here on as \*=bfloat16_sr"):
        other.load_state_dict(saved)
    state = other.state[other.param_groups[0]["params"][0]]
    assert state["exp_avg"].dtype == torch.bfloat16 and "exp_avg:int8" not in state
    plain = optim.AdamW([nn.Parameter(p.detach().clone()) for p in params], lr=0.01)
    with pytest.warns(UserWarning, match="from here on as plain tensors"):
        plain.load_state_dict(saved)
    state = plain.state[plain.param_groups[0]["params"][0]]
    assert_same_bits(state["exp_avg"], saved["state"][0]["exp_avg"])
    train(plain.param_groups[0]["params"], plain, 3, 4)


def test_copies_and_pickles_keep_what_is_stored():
    params, opt = made("int8")
    train(params, opt, 0, 2)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        state = other.state[other.param_groups[0]["params"][0]]
        assert state["exp_avg"].dtype == torch.int8 and "exp_avg:int8" in state
        train(other.param_groups[0]["params"], other, 2, 3)


def test_a_failing_step_leaves_codes_as_they_were():
    params, opt = made("int8")
    train(params, opt, 0, 2)
    before = copy.deepcopy({k: v for k, v in opt.state[params[0]].items()})
    params[2].grad = torch.randn(3).to_sparse()
    with pytest.raises(RuntimeError):
        opt.step()
    for key, value in before.items():
        now = opt.state[params[0]][key]
        assert torch.equal(now, value) if torch.is_tensor(value) else now == value


def test_a_step_that_a_scaler_skips_leaves_codes_as_they_were():
    params, opt = made("int8", amp_fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for t, bad in enumerate((False, False, True, False)):
        for p in params:
            p.grad = torch.full_like(p, float("inf") if bad else 0.1 * (t + 1)) * 4
        scaler.scale(torch.zeros(()))
        before = copy.deepcopy([opt.state[p] for p in params])
        scaler.step(opt)
        scaler.update()
        for p, old in zip(params, before, strict=True) if bad else ():
            for key, value in old.items():
                assert torch.equal(torch.as_tensor(opt.state[p][key]), torch.as_tensor(value)), key
    assert all(p.isfinite().all() for p in params)
