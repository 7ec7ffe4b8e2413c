"""Overflow in 16 bits: kernels compute in float32 and round once, when they store. State overflows where torch's does.

torch rounds each operation. Where only what lies between overflows there, or its eps is rounded to zero, our parameter
is the number that float32 gives; it is infinite one step later, when the state that overflowed is read again.
"""

import pytest
import torch

import fusedopt

OPTIONS = {name: {} for name in ("Adam", "AdamW", "RMSprop", "Adagrad", "Adamax", "NAdam", "RAdam", "SGD")}
OPTIONS["SGD"] = {"lr": 0.1, "momentum": 0.9}
GRADIENTS = [6e4, -6e4, 3e38, float("inf"), -float("inf"), float("nan"), 300.0, 1e-7, 0.0, -1.0, 1e3]


def steps(name, dtype, backend, n):
    """Pairs of torch's tensor and ours after each of n steps, named."""
    gradients = torch.tensor(GRADIENTS).to(dtype)
    theirs, ours = (torch.nn.Parameter(torch.ones(len(gradients), dtype=dtype)) for _ in range(2))
    eager = getattr(torch.optim, name)([theirs], **OPTIONS[name], foreach=False)
    opt = getattr(fusedopt.optim, name)([ours], **OPTIONS[name])
    opt.backend = backend
    for _ in range(n):
        theirs.grad, ours.grad = gradients.clone(), gradients.clone()
        eager.step()
        opt.step()
        yield "param", theirs.detach().clone(), ours.detach().clone()
        for key, value in eager.state[theirs].items():
            if isinstance(value, torch.Tensor) and value.dim():
                yield key, value, opt.state[ours][key]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_state_is_infinite_where_torchs_is_and_nothing_is_nan_alone(name, dtype, backend):
    infinite = 0
    for key, theirs, ours in steps(name, dtype, backend, 4):
        assert not (ours.isnan() & ~theirs.isnan()).any(), key
        if key != "param":
            there = theirs.isinf()
            assert torch.equal(ours[there], theirs[there]), key
            infinite += there.sum()
    assert infinite


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_parameter_follows_its_state_one_step_later(backend):
    """Momentum of 114,000 is stored as infinity; the parameter was stepped by the number, and is by infinity next."""
    found = [(t[:2], o[:2]) for key, t, o in steps("SGD", torch.float16, backend, 3) if key == "param"]
    infinity = torch.tensor([-torch.inf, torch.inf], dtype=torch.float16)
    assert torch.equal(found[1][0], infinity)
    torch.testing.assert_close(found[1][1], torch.tensor([-17400.0, 17400.0]).half(), rtol=1e-3, atol=0.0)
    assert torch.equal(found[2][1], infinity)
