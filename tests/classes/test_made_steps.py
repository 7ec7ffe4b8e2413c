"""Steps that hypothesis makes: any arithmetic of a class is what its kernels do."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusedopt

UNARY = ["abs", "sqrt_abs", "sign", "tanh", "square", "neg", "clamp", "clone", "flat", "exp_small"]
BINARY = ["add", "sub", "mul", "div_safe", "maximum", "where", "lerp", "addcmul", "out"]
IN_PLACE = ["add_", "mul_", "copy_", "data"]
NUMBERS = ["lr", "beta", "count", "half", "schedule", "norm", "mean_item"]


def number(kind, opt, group, x):
    return {
        "lr": lambda: group["lr"],
        "beta": lambda: group["betas"][1],
        "count": lambda: 1 / group["step"],
        "half": lambda: 0.5,
        "schedule": lambda: math.sqrt(group["step"]) / (1 + opt.calls),
        "norm": lambda: torch.tanh(x.norm()),
        "mean_item": lambda: max(min(x.mean().item(), 1.0), -1.0),
    }[kind]()


def unary(kind, x):
    return {
        "abs": lambda: x.abs(),
        "sqrt_abs": lambda: torch.sqrt(torch.abs(x) + 0.1),
        "sign": lambda: x.sign(),
        "tanh": lambda: torch.tanh(x),
        "square": lambda: (x / 4) ** 2,
        "neg": lambda: -x,
        "clamp": lambda: x.clamp(-1, 1),
        "clone": lambda: x.clone(),
        "flat": lambda: x.reshape(-1).mul(2).view_as(x) / 2,
        "exp_small": lambda: torch.exp(x.clamp(max=1.0)),
    }[kind]()


def binary(kind, x, y, n):
    def out():
        z = torch.zeros_like(x)
        torch.mul(x, y, out=z)
        return z / (1 + z.abs())

    return {
        "add": lambda: x + y * n,
        "sub": lambda: torch.sub(x, y, alpha=0.3),
        "mul": lambda: x * y / 4,
        "div_safe": lambda: x / (y.abs() + 1),
        "maximum": lambda: torch.maximum(x, y),
        "where": lambda: torch.where(x > y, x * n, y),
        "lerp": lambda: x.lerp(y, 0.25),
        "addcmul": lambda: x.addcmul(y, y, value=0.1),
        "out": out,
    }[kind]()


def write(kind, x, y, n):
    if kind == "data":
        x.data = x + 0.1 * y.tanh()
    else:
        {
            "add_": lambda: x.add_(y, alpha=0.1),
            "mul_": lambda: x.mul_(n * 0.1 + 0.8),
            "copy_": lambda: x.copy_(y.tanh()),
        }[kind]()


class Made(torch.optim.Optimizer):
    """Runs a list of instructions on the parameter, its gradient, its state, and what came of earlier ones."""

    def __init__(self, params, code):
        super().__init__(params, dict(lr=0.1, betas=(0.9, 0.99), step=0))
        self.code, self.calls = tuple(code), 0

    @torch.no_grad()
    def step(self, closure=None):
        self.calls += 1
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(m=torch.zeros_like(p), n=0)
                state["n"] += 1
                values = [p, p.grad.clone(), state["m"]]
                for kind, a, b, of in self.code:
                    x, y = values[a % len(values)], values[b % len(values)]
                    n = number(of, self, group, y)
                    if kind in UNARY:
                        values.append(unary(kind, x))
                    elif kind in BINARY:
                        values.append(binary(kind, x, y, n))
                    else:
                        write(kind, values[a % 3], y, n)
                if values[-1].abs().max() > 3:
                    p.sub_(values[-1].clamp(-3, 3), alpha=0.01)
                else:
                    p.sub_(values[-1], alpha=group["lr"] / state["n"])
                state["m"].mul_(0.9).add_(p.grad, alpha=0.1)


CODE = st.lists(
    st.tuples(
        st.sampled_from(UNARY + BINARY + IN_PLACE),
        st.integers(0, 9),
        st.integers(0, 9),
        st.sampled_from(NUMBERS),
    ),
    min_size=1,
    max_size=7,
)


def trained(code, fuse):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((5,), (3, 4), (2, 2, 2))]
    opt = Made(params, code)
    if fuse:
        fusedopt.fuse(opt)
    for i in range(5):
        for k, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * i + k))
        opt.step()
        opt.param_groups[0]["lr"] *= 0.9
    return params, opt


@pytest.mark.filterwarnings("ignore:fusedopt")
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(CODE)
def test_any_arithmetic_is_what_the_class_does(code):
    theirs, eager = trained(code, fuse=False)
    ours, opt = trained(code, fuse=True)
    for a, b in zip(theirs, ours, strict=True):
        # A branch or a comparison may go the other way where rounding decides.
        close = torch.isclose(a, b, rtol=1e-3, atol=1e-3)
        assert close.double().mean() > 0.9, code
        assert eager.state[a]["n"] == opt.state[b]["n"]
    explained = opt.explain()
    assert explained.launches or explained.eager
    assert eager.param_groups[0]["step"] == opt.param_groups[0]["step"] and eager.calls == opt.calls
