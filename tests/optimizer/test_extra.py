"""Extra tensors of one step, one per parameter: read where they are, never changed, never kept."""

import copy
import warnings

import pytest
import torch
from helpers import assert_same_bits, needs_extension
from torch import nn

import fusedopt

SHAPES = [(4,), (3, 5), (2, 3, 4), (), (0, 2)]
BACKENDS = ["cpp", "reference"]


def parameters(dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in SHAPES]


def like(params, seed, dtype=None):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=gen).to(dtype or p.dtype) for p in params]


def gradients(params, seed):
    for p, g in zip(params, like(params, seed), strict=True):
        p.grad = g


def sophia_step(p, lr, mom, rho, hess=None, grad_avg=None, hess_avg=None, **kwargs):
    """The Hessian's estimate is there on every few steps only (arXiv:2305.14342)."""
    if grad_avg is None:
        grad_avg, hess_avg = torch.zeros_like(p), torch.zeros_like(p)
    if hess is not None:
        hess_avg.mul_(0.5).add_(hess, alpha=0.5)
    grad_avg.mul_(mom).add_(p.grad, alpha=1 - mom)
    p.data.sub_((grad_avg / (rho * hess_avg.abs() + 1e-2)).clamp(-1, 1), alpha=lr)
    return {"grad_avg": grad_avg, "hess_avg": hess_avg}


def plain(x, g, hess, avg, hess_avg, lr=0.1, mom=0.9, rho=0.5):
    if hess is not None:
        hess_avg.mul_(0.5).add_(hess, alpha=0.5)
    avg.mul_(mom).add_(g, alpha=1 - mom)
    x -= lr * (avg / (rho * hess_avg.abs() + 1e-2)).clamp(-1, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by", ["list", "dict", "generator"])
def test_sophia_is_that_of_plain_torch(backend, by):
    params = parameters(torch.float64)
    truth = [p.detach().clone() for p in params]
    avg, hess_avg = ([torch.zeros_like(x) for x in truth] for _ in range(2))
    opt = fusedopt.Optimizer(params, sophia_step, lr=0.1, mom=0.9, rho=0.5, backend=backend)
    for t in range(10):
        gradients(params, t)
        hess = None if t % 3 else like(params, 100 + t)
        before = copy.deepcopy(hess)
        if hess is None:
            opt.step()
        else:
            given = {
                "list": hess,
                "dict": dict(zip(params, hess, strict=True)),
                "generator": (h for h in hess),
            }
            opt.step(extra={"hess": given[by]})
            assert all(torch.equal(h, b) for h, b in zip(hess, before, strict=True))
        for i, p in enumerate(params):
            plain(truth[i], p.grad, hess and hess[i], avg[i], hess_avg[i])
    for p, x in zip(params, truth, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-12, atol=1e-12)
        assert opt.state[p].keys() == {"grad_avg", "hess_avg"}


@needs_extension
def test_steps_with_and_without_them_are_bound_and_nothing_is_copied():
    params = parameters()
    opt = fusedopt.Optimizer(params, sophia_step, lr=0.1, mom=0.9, rho=0.5)
    for t in range(12):
        gradients(params, t)
        opt.step(extra=None if t % 3 else {"hess": like(params, t)})
    # the first step makes state; then one with the Hessian and one without are bound
    assert (opt.engine.steps.repeated, opt.engine.steps.anew) == (9, 3)
    opt.step(extra={"hess": like(params, 1)})
    last = opt.explain().stages[-1]
    assert set(last.reads) == {"param", "grad", "grad_avg", "hess_avg", "hess"}
    assert set(last.writes) == {"param", "grad_avg", "hess_avg"}


@needs_extension
def test_rows_without_a_gradient_or_without_one_of_them():
    params = parameters()
    twins = copy.deepcopy(params)
    opt, twin = (
        fusedopt.Optimizer(ps, sophia_step, lr=0.1, mom=0.9, rho=0.5, backend=backend)
        for ps, backend in ((params, "cpp"), (twins, "reference"))
    )
    for t in range(9):
        gradients(params, t)
        if t % 2:
            params[t % 3].grad = None
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad
        hess = like(params, t)
        hess[3] = None
        opt.step(extra={"hess": hess})
        twin.step(extra={"hess": hess})
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q)
    assert opt.engine.steps.repeated >= 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float64])
def test_they_may_be_of_other_dtypes(dtype, other):
    found = []
    for backend in BACKENDS:
        params = parameters(dtype)
        opt = fusedopt.Optimizer(params, sophia_step, lr=0.1, mom=0.5, rho=0.5, backend=backend)
        for t in range(4):
            gradients(params, t)
            opt.step(extra={"hess": like(params, 50 + t, other)})
        found.append(params)
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def nudge(p, lr, towards, weight=1.0, **kwargs):
    """Changes what it was given in place, which nobody is to see."""
    towards.sub_(p.data).mul_(weight)
    p.data.add_(towards, alpha=lr)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_applied_takes_them_and_one_number_per_parameter(backend):
    params = parameters(torch.float64)
    truth = [p.detach().clone() for p in params]
    opt = fusedopt.SGD(params, lr=0.5, backend=backend)
    goals = like(params, 1)
    weights = [torch.tensor(float(i), dtype=torch.float64) for i in range(len(params))]
    before = copy.deepcopy(goals)
    for _ in range(4):
        opt.apply(nudge, extra={"towards": goals, "weight": dict(zip(params, weights, strict=True))}, lr=0.25)
        for x, goal, w in zip(truth, before, weights, strict=True):
            x += 0.25 * w * (goal - x)
    for p, x, goal, old in zip(params, truth, goals, before, strict=True):
        torch.testing.assert_close(p.detach(), x)
        assert torch.equal(goal, old)
    assert not opt.state
    if backend == "cpp":
        assert next(iter(opt.applications)).engine.steps.anew == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_they_reach_callbacks_that_run_eagerly(backend):
    def sorted_towards(p, towards, **kwargs):
        if p.dim():
            towards.copy_(towards.sort(dim=0).values)

    params = parameters(torch.float64)
    goals = like(params, 1)
    before = copy.deepcopy(goals)
    expected = [
        p.detach() + 0.5 * ((g.sort(dim=0).values if g.dim() else g) - p.detach())
        for p, g in zip(params, goals, strict=True)
    ]
    opt = fusedopt.SGD(params, lr=0.5, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.apply([sorted_towards, nudge], extra={"towards": goals})
    for p, x, goal, old in zip(params, expected, goals, before, strict=True):
        torch.testing.assert_close(p.detach(), x)
        assert torch.equal(goal, old)
    assert not opt.state


@needs_extension
@pytest.mark.parametrize("t", [0, 1, 2, 3])
def test_layouts_and_memory_that_overlap(t):
    """Transposed, a slice of a larger tensor, the parameter itself, its state."""
    p = nn.Parameter(torch.arange(12.0).reshape(3, 4))
    opt = fusedopt.SGD([p], lr=0.5)
    opt.state[p]["kept"] = torch.full((3, 4), 2.0)

    def both(p, kept, other, **kwargs):
        p.data.mul_(0.5).add_(other)
        kept.add_(other)

    for _ in range(3):
        other = [
            torch.ones(4, 3).t(),
            torch.ones(3, 9)[:, ::2][:, :4],
            p.detach(),
            opt.state[p]["kept"],
        ][t]
        x, kept = p.detach() * 0.5 + other, opt.state[p]["kept"] + other
        opt.apply(both, extra={"other": [other]})
        assert_same_bits(p.detach(), x)
        assert_same_bits(opt.state[p]["kept"], kept)


BAD = [
    ({"hes": "list"}, TypeError, "no callback takes the extra tensors 'hes'; did you mean 'hess'"),
    ("list", TypeError, "extra is a dict from names to tensors, not a list"),
    (
        {"hess": "short"},
        ValueError,
        "the extra tensors 'hess' are 2, the parameters 5. Remedy: a list with one per",
    ),
    (
        {"hess": "tensor"},
        TypeError,
        "the extra tensors 'hess' are a list with one per parameter.*not a Tensor",
    ),
    ({"hess": "stranger"}, ValueError, "by parameter, and \\(7,\\) is no parameter of this optimizer"),
    (
        {"hess": "shape"},
        ValueError,
        "'hess' of parameter 1 of group 0 has shape \\(5, 3\\), the parameter \\(3, 5\\)",
    ),
    (
        {"hess": "integers"},
        TypeError,
        "'hess' of parameter 1 of group 0 must be a dense floating point tensor",
    ),
    ({"hess": "number"}, TypeError, "'hess' of parameter 1 of group 0 must be .* it is a float"),
    ({"grad_avg": "list"}, ValueError, "'grad_avg' of parameter 0 of group 0 has the name of its state"),
    ({"mom": "list"}, ValueError, "'mom' of parameter 0 of group 0 has the name of its state, or of a hyper"),
]


@pytest.mark.parametrize(("extra", "error", "message"), BAD)
@pytest.mark.parametrize("bound", [False, True])
def test_what_does_not_fit_is_refused_and_nothing_changes(extra, error, message, bound):
    params = parameters()
    opt = fusedopt.Optimizer(params, sophia_step, lr=0.1, mom=0.9, rho=0.5)
    for t in range(3 if bound else 1):
        gradients(params, t)
        opt.step(extra={"hess": like(params, t)})
    tensors = like(params, 3)
    kinds = {
        "list": tensors,
        "short": tensors[:2],
        "tensor": torch.ones(5),
        "stranger": {torch.ones(7): torch.ones(7)},
        "shape": [tensors[0], torch.ones(5, 3), *tensors[2:]],
        "integers": [tensors[0], torch.ones(3, 5, dtype=torch.int64), *tensors[2:]],
        "number": [tensors[0], 1.5, *tensors[2:]],
    }
    given = kinds[extra] if isinstance(extra, str) else {k: kinds[v] for k, v in extra.items()}
    before = copy.deepcopy(opt.state_dict()["state"])
    old = [p.detach().clone() for p in params]
    with pytest.raises(error, match=message):
        opt.step(extra=given)
    torch.testing.assert_close(opt.state_dict()["state"], before, rtol=0, atol=0)
    assert all(torch.equal(p, x) for p, x in zip(params, old, strict=True))
    opt.step(extra={"hess": tensors})


def test_one_that_is_needed_and_not_given_is_missed():
    params = parameters()
    opt = fusedopt.SGD(params, lr=0.5)
    opt.apply(nudge, extra={"towards": like(params, 1)})
    with pytest.raises(TypeError, match=r"nudge.*needs towards"):
        opt.apply(nudge)
    with pytest.raises(TypeError, match=r"nudge.*needs towards"):
        opt.apply(nudge, extra={"towards": [None, *like(params, 1)[1:]]})


def test_groups_closures_hooks_and_gradient_scaling():
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.2}]
    opt = fusedopt.Optimizer(groups, sophia_step, lr=0.1, mom=0.9, rho=0.5, max_grad_norm=1.0)
    twins = parameters()
    groups = [{"params": twins[:2]}, {"params": twins[2:], "lr": 0.2}]
    twin = fusedopt.Optimizer(
        groups, sophia_step, lr=0.1, mom=0.9, rho=0.5, max_grad_norm=1.0, backend="reference"
    )
    calls = []
    opt.register_step_pre_hook(lambda *args: calls.append(args[2]))
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for t in range(4):
        gradients(params, t)
        gradients(twins, t)
        hess = like(params, t)
        assert opt.step(lambda: 3, extra={"hess": hess}) == 3
        twin.step(extra={"hess": hess})
        for p in (*params, *twins):
            p.grad = None
        scaler.scale(sum(p.sum() for p in params)).backward()
        scaler.step(opt, extra={"hess": hess})
        scaler.update()
        for q in twins:
            q.grad = torch.ones_like(q)
        twin.step(extra={"hess": hess})
    assert len(calls) == 8 and "hess" in calls[0]["extra"]
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q)


def test_a_parameter_listed_twice_is_refused():
    p = nn.Parameter(torch.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = fusedopt.Optimizer([p, p], sophia_step, lr=0.1, mom=0.9, rho=0.5)
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="listed twice, and extra tensors are one per parameter"):
        opt.step(extra={"hess": [torch.ones(3)] * 2})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [5, 300_000])
@pytest.mark.parametrize("of", ["parameters", "state", "parts"])
def test_what_lies_in_anothers_memory_is_what_it_was_before_the_step(backend, size, of):
    """As in mutual learning, where each of several models is told where another one is."""

    def towards(p, lr, other=None, mean=None, **kwargs):
        mean = torch.zeros_like(p) if mean is None else mean
        mean.lerp_(p.grad, 0.5)
        p.data.sub_(mean, alpha=lr).sub_(other, alpha=0.1)
        return {"mean": mean}

    torch.manual_seed(0)
    flat = torch.randn(3 * size)
    params = [
        nn.Parameter(x)
        for x in (flat.split(size) if of == "parts" else [torch.randn(size) for _ in range(3)])
    ]
    opt = fusedopt.Optimizer(params, towards, lr=0.1, backend=backend)
    x, m = [p.detach().double() for p in params], [torch.zeros(size).double() for _ in params]
    for t in range(4):
        for p in params:
            p.grad = torch.randn(size)
        there = [opt.state[p].get("mean", p.detach()) if of == "state" and t else p.detach() for p in params]
        others = [there[(i + 1) % 3] for i in range(3)]
        known = [other.double().clone() for other in others]
        opt.step(extra={"other": others})
        for i, p in enumerate(params):
            m[i].lerp_(p.grad.double(), 0.5)
            x[i] -= 0.1 * m[i] + 0.1 * known[i]
            torch.testing.assert_close(p.detach().double(), x[i], rtol=1e-4, atol=1e-5)


@needs_extension
def test_extra_tensors_apart_are_read_where_they_are():
    params = [nn.Parameter(torch.randn(4)) for _ in range(3)]
    opt = fusedopt.Optimizer(params, lambda p, lr, h=None, **kw: p.data.sub_(h, alpha=lr), lr=0.1)
    flat = torch.randn(12)
    for _ in range(5):
        for p in params:
            p.grad = torch.randn(4)
        opt.step(extra={"h": list(flat.split(4))})
    assert opt.engine.steps.anew == 1
