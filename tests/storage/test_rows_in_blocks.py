"""Rules by rows and columns, whose other state is stored in blocks of neighbouring elements."""

import warnings

import pytest
import torch
from devices import DEVICE
from helpers import needs_extension
from torch import nn

import fusedopt
from fusedopt import optim, rules
from fusedopt.optimizer import Optimizer

pytestmark = needs_extension
SHAPES = [
    (128, 64),
    (70, 128),
    (3, 32, 64),
    (8192,),
    (2, 2, 16, 192),
    (1, 4096),
    (16, 1, 320),
    (70, 64, 1, 1),
]
"""With a last dimension in whole blocks,"""
OTHERS = [(5000,), (10, 84), (6,), (32, 3, 3)]
"""and others, which are too small for blocks, or have no rows."""
RULES = {
    "CAME": lambda params, **o: rules.CAME(params, lr=1e-2, **o),
    "AdamMini": lambda params, **o: rules.AdamMini(params, lr=1e-2, **o),
    "AdamP": lambda params, **o: rules.AdamP(params, lr=1e-2, **o),
    "Adafactor": lambda params, **o: rules.Adafactor(params, beta1=0.9, **o),
    "SM3": lambda params, **o: rules.SM3(params, lr=1e-2, **o),
    "centralized": lambda params, **o: rules.Centralize(optim.AdamW(params, lr=1e-2, **o)),
}


def stepped(make, shapes, storage, backend, steps=4, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter((torch.randn(s, generator=generator) * 0.1).to(device)) for s in shapes]
    opt = make(params, storage=storage, backend=backend)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        opt.step()
    return params, opt


def tensors(opt, p):
    return {k: v for k, v in opt.state[p].items() if isinstance(v, torch.Tensor)}


def assert_the_same(ours, theirs):
    """Up to a code here and there, where another last digit is rounded to the next one."""
    (params, opt), (others, other) = ours, theirs
    for p, q in zip(params, others, strict=True):
        a, b = tensors(opt, p), tensors(other, q)
        assert {k: (v.dtype, v.shape) for k, v in a.items()} == {k: (v.dtype, v.shape) for k, v in b.items()}
        for x, y in [(p, q), *((a[k], b[k]) for k in a)]:
            assert (x.cpu().double() - y.double()).norm() <= 2e-3 * y.double().norm()


@pytest.mark.parametrize(("rule", "storage"), [*((rule, "int8") for rule in RULES), ("CAME", "int8_256")])
def test_they_fuse_and_are_as_the_reference_has_them(rule, storage, compiled):
    shapes = [s for s in SHAPES if s[-1] % 256 == 0] if storage == "int8_256" else SHAPES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = stepped(RULES[rule], [*shapes, *OTHERS], storage, compiled, device=DEVICE)
    params, opt = found
    assert not opt.explain().eager
    coded = [v.dtype in (torch.int8, torch.uint8) for p in params for v in tensors(opt, p).values()]
    assert any(coded) and not all(coded)
    assert_the_same(found, stepped(RULES[rule], [*shapes, *OTHERS], storage, "reference"))


def test_a_matrix_that_is_not_in_whole_blocks_is_stepped_eagerly_and_says_why():
    with pytest.warns(
        RuntimeWarning, match=r"came_step runs eagerly.* last dimension is not in whole blocks of 64"
    ):
        found = stepped(RULES["CAME"], [(128, 64), (100, 100)], "int8", "cpp")
    assert_the_same(found, stepped(RULES["CAME"], [(128, 64), (100, 100)], "int8", "reference"))


def with_means_of_rows(p, lr, mean=None, rows=None, **_):
    """Once there are means of rows nothing asks along what they go."""
    mean = torch.zeros_like(p) if mean is None else mean
    rows = p.grad.mean(-1) if rows is None else rows * 0.5
    mean = mean + (p.grad - mean) * 0.1
    p.data.sub_(mean, alpha=lr)
    return {"mean": mean, "rows": rows}


@pytest.mark.parametrize("shape", [(512, 128), (512, 100)])
def test_state_of_rows_is_not_taken_for_that_of_blocks(shape):
    """Of which there are more: kernels would write beyond its end."""

    def make(params, **options):
        return Optimizer(params, with_means_of_rows, lr=0.1, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = stepped(make, [shape], {"mean": "int8"}, "cpp")
    assert_the_same(found, stepped(make, [shape], {"mean": "int8"}, "reference"))


def test_groups_may_have_blocks_of_different_sizes():
    params = [nn.Parameter(torch.randn(64, 128)) for _ in range(2)]
    groups = [{"params": [p], "storage": s} for p, s in zip(params, ("int8", "int8_256"), strict=True)]
    opt = optim.AdamW(groups, storage="int8")
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
    assert not opt.explain().eager
    assert [
        opt.state[p][f"exp_avg:{s}"].numel() for p, s in zip(params, ("int8", "int8_256"), strict=True)
    ] == [
        128,
        32,
    ]


class Factored(torch.optim.Optimizer):
    """A class with a row of second moments for each matrix."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["rows"] = torch.zeros_like(p[..., 0])
                state["rows"].mul_(0.9).add_(p.grad.square().mean(dim=-1), alpha=0.1)
                state["exp_avg"].mul_(0.9).add_(p.grad, alpha=0.1)
                p.sub_(state["exp_avg"] / (state["rows"].unsqueeze(-1).sqrt() + 1e-8), alpha=group["lr"])


def test_so_are_fused_classes():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=generator) for s in [(128, 64), (3, 32, 128)]]
    ours, theirs = ([nn.Parameter(v.clone()) for v in values] for _ in range(2))
    opt, plain = fusedopt.fuse(Factored(ours), storage={"exp_avg": "int8"}), Factored(theirs)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        opt.step()
        plain.step()
    assert not opt.explain().eager and "cpp" in str(opt.explain())
    for p, q, v in zip(ours, theirs, values, strict=True):
        assert 0 < (p - q).norm() < 0.05 * (q - v).norm()  # codes of 8 bits
        torch.testing.assert_close(opt.state[p]["rows"], plain.state[q]["rows"])


def test_a_block_of_another_group_is_not_said_to_be_this_ones():
    params = [nn.Parameter(torch.randn(s)) for s in [(128, 64), (64, 64)]]
    groups = [
        {"params": [p], "storage": {"exp_avg": s}} for p, s in zip(params, ("int8", "int8_256"), strict=True)
    ]
    opt = rules.AdamMini(groups, lr=1e-3, storage={"exp_avg": "int8"})
    with pytest.warns(RuntimeWarning, match="adam_mini_step runs eagerly") as warned:
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            opt.step()
    assert {e.callback for e in opt.explain().eager} == {"adam_mini_step"}
    assert all("adam_mini_step" in str(w.message) for w in warned)


@pytest.mark.parametrize("shape", [(8, 8, 8, 8), (16, 16, 16)], ids=str)
def test_tensors_that_calls_take_are_no_rows(shape):
    """However many of the parameter's dimensions have their sizes."""

    def make(params, **options):
        return rules.SOAP(params, lr=1e-3, **options)

    found = stepped(make, [shape], "int8", "cpp", steps=3)
    assert not found[1].explain().eager
    assert_the_same(found, stepped(make, [shape], "int8", "reference", steps=3))


class Squares(Factored):
    """With more state of one row or column than there are ways tried for each."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                    for k in range(2):
                        state[f"rows{k}"] = torch.zeros_like(p[:, 0])
                        state[f"columns{k}"] = torch.zeros_like(p[0])
                square = p.grad.square()
                for k in range(2):
                    state[f"rows{k}"].lerp_(square.mean(dim=1), 0.1)
                    state[f"columns{k}"].lerp_(square.mean(dim=0), 0.1)
                scale = state["rows0"].unsqueeze(1) * state["columns1"]
                state["exp_avg"].mul_(0.9).add_(p.grad / (scale.sqrt() + 1e-8), alpha=0.1)
                p.add_(state["exp_avg"], alpha=-group["lr"])


def test_square_matrices_fuse_as_others_do():
    ours = [nn.Parameter(torch.randn(s)) for s in [(64, 64), (128, 64)]]
    opt = fusedopt.fuse(Squares(ours), storage={"exp_avg": "int8"})
    for _ in range(3):
        for p in ours:
            p.grad = torch.randn_like(p)
        opt.step()
    assert not opt.explain().eager and "cpp" in str(opt.explain())
