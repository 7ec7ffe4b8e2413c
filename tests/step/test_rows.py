"""Callbacks that reduce along dimensions: their kernels against the reference, in every layout and shape."""

from __future__ import annotations

import warnings

import pytest
import torch

import fusedopt
from fusedopt.extension import leaf

SHAPES = [(5,), (1,), (3, 4), (6, 6), (1, 7), (7, 1), (1, 1), (2, 3, 4), (3, 3, 3), (4, 3, 3, 3), (5, 4, 1, 1),
          (2, 3, 2, 3, 2), (300, 40), (40, 3000), (0, 3), ()]  # fmt: skip


def factored(p, lr, row=None, col=None, **kwargs):
    """A second moment that is a product of rows and columns, of the last two dimensions."""
    if p.grad.dim() < 2:
        p.data.sub_(p.grad, alpha=lr)
        return {}
    square = p.grad.square() + 1e-3
    if row is None:
        row, col = torch.zeros_like(square.mean(-1)), torch.zeros_like(square.mean(-2))
    row.lerp_(square.mean(-1), 0.1)
    col.lerp_(square.mean(-2), 0.1)
    scale = (row / row.mean(-1, keepdim=True)).unsqueeze(-1) * col.unsqueeze(-2)
    update = p.grad / scale.sqrt()
    p.data.sub_(update / update.square().mean().sqrt().clamp(min=1), alpha=lr)
    return {"row": row, "col": col}


def centralized(p, lr, mom=0.9, kept=None, **kwargs):
    """Momentum of gradients less the mean of each output's."""
    if p.grad.dim() > 1:
        p.grad.sub_(p.grad.mean(dim=tuple(range(1, p.grad.dim())), keepdim=True))
    if kept is None:
        kept = torch.zeros_like(p)
    kept.mul_(mom).add_(p.grad)
    p.data.sub_(kept, alpha=lr)
    return {"kept": kept}


def of_outputs(p, lr, v=None, **kwargs):
    """One second moment for each output, kept with its dimensions."""
    dims = tuple(range(1, p.grad.dim()))
    size = p.grad.square().mean(dim=dims, keepdim=True) if dims else p.grad.square()
    v = torch.zeros_like(size) if v is None else v
    v.lerp_(size, 0.1)
    p.data.sub_(p.grad / (v.sqrt() + 1e-3), alpha=lr)
    return {"v": v}


def covered(p, lr, m0=None, m1=None, **kwargs):
    """Maxima over the first and over the last dimension, that become state by themselves."""
    if p.grad.dim() < 2:
        return {}
    new = p.grad.square()
    if m0 is not None:
        new = new + torch.minimum(m0.unsqueeze(-1), m1)
    p.data.sub_(p.grad / (new.sqrt() + 1e-3), alpha=lr)
    return {"m0": new.amax(dim=-1), "m1": new.amax(dim=0)}


def normalized(p, lr, **kwargs):
    """Views of the same elements, and norms along what they show."""
    if p.grad.dim() > 1:
        flat = p.grad.view(p.grad.size(0), -1)
        flat = flat / (flat.norm(dim=1)[:, None] + 1e-3) + flat.std(dim=0, correction=0)
        p.data.sub_(flat.view_as(p), alpha=lr)
    else:
        p.data.sub_(p.grad, alpha=lr)


RULES = [factored, centralized, of_outputs, covered, normalized]


def shapes_of(rule):
    return [s for s in SHAPES if rule is not normalized or 0 not in s]  # torch cannot tell what -1 is there


def contiguous(t):
    return t.contiguous()


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def turned(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t


def run(
    rule, backend, layout=contiguous, shapes=None, dtype=torch.float32, steps=4, missing=False, threads=None
):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(layout(torch.randn(shape).to(dtype))) for shape in shapes or shapes_of(rule)]
    opt = fusedopt.Optimizer(params, [rule], lr=0.1, backend=backend)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        for t in range(steps):
            for k, p in enumerate(params):
                p.grad = layout(torch.randn(p.shape).to(dtype))
                if missing and (t + k) % 3 == 0:
                    p.grad = None
            opt.step()
    finally:
        torch.set_num_threads(before)
    return params, opt


def assert_same(ours, theirs, times=16):
    (params, opt), (others, other) = ours, theirs
    for p, q in zip(params, others, strict=True):
        assert opt.state[p].keys() == other.state[q].keys()
        for x, y in [(p.detach(), q.detach()), *((opt.state[p][k], other.state[q][k]) for k in opt.state[p])]:
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            bound = times * torch.finfo(x.dtype).eps * max(1.0, float(y.abs().max())) if x.numel() else 0
            assert torch.allclose(x.double(), y.double(), rtol=0, atol=bound)


@pytest.fixture(autouse=True)
def nothing_runs_eagerly():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.mark.parametrize("layout", [contiguous, channels_last, turned], ids=lambda f: f.__name__)
@pytest.mark.parametrize("rule", RULES, ids=lambda f: f.__name__)
def test_kernels_do_what_the_reference_does(rule, layout):
    if rule is normalized and layout is not contiguous:
        pytest.skip("torch has no such view of memory in another order")
    assert_same(run(rule, "cpp", layout), run(rule, "reference", layout))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda f: f.__name__)
def test_every_dtype(rule, dtype):
    assert_same(run(rule, "cpp", dtype=dtype), run(rule, "reference", dtype=dtype), times=64)


@pytest.mark.parametrize("rule", RULES, ids=lambda f: f.__name__)
def test_gradients_come_and_go(rule):
    assert_same(run(rule, "cpp", missing=True, steps=9), run(rule, "reference", missing=True, steps=9))


@pytest.mark.parametrize("rule", RULES, ids=lambda f: f.__name__)
def test_results_do_not_depend_on_the_number_of_threads(rule):
    shapes = [(700, 300), (3000, 3, 3, 3), (5, 40_000)]
    one, two = (run(rule, "cpp", shapes=shapes, threads=n) for n in (1, 2))
    for p, q in zip(one[0], two[0], strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(one[1].state[p][k], two[1].state[q][k]) for k in one[1].state[p])


@pytest.mark.skipif(leaf.native is None, reason="steps are bound by the extension")
@pytest.mark.parametrize("rule", RULES, ids=lambda f: f.__name__)
def test_later_steps_do_no_python_work_for_each_tensor(rule):
    shapes = [s for s in SHAPES if s and 0 not in s]
    _, opt = run(rule, "cpp", shapes=shapes, steps=6)
    assert opt.engine.steps.repeated >= 3, str(opt.explain().steps)


@pytest.mark.parametrize("rule", [factored, of_outputs], ids=lambda f: f.__name__)
def test_state_of_other_shapes_survives_a_state_dict(rule):
    params, opt = run(rule, "cpp")
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = fusedopt.Optimizer(twins, [rule], lr=0.1, backend="cpp")
    other.load_state_dict(opt.state_dict())
    for p, q in zip(params, twins, strict=True):
        p.grad = torch.randn(p.shape)
        q.grad = p.grad.clone()
    opt.step(), other.step()
    assert_same((params, opt), (twins, other), times=0)


def test_what_is_put_side_by_side_has_to_fit():
    """Of a square matrix sizes do not tell; a row added to each column would be another thing than torch does."""

    def mixed(p, lr, **kwargs):
        p.data.sub_(p.grad.mean(-1) * lr)  # which torch takes for one number per column

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours, theirs = (run(mixed, backend, shapes=[(4, 4)]) for backend in ("cpp", "reference"))
    assert any("put side by side" in str(w.message) for w in said)
    assert_same(ours, theirs)


def test_mutation_another_dimension_is_noticed():
    def wrong(p, lr, **kwargs):
        p.data.sub_(p.grad - p.grad.mean(0, keepdim=True), alpha=lr)

    def right(p, lr, **kwargs):
        p.data.sub_(p.grad - p.grad.mean(1, keepdim=True), alpha=lr)

    with pytest.raises(AssertionError):
        assert_same(run(wrong, "cpp", shapes=[(4, 4)]), run(right, "reference", shapes=[(4, 4)]))
