"""Callbacks applied outside of a step: over the same state and groups, by the same kernels, bound when repeated."""

import copy
import functools
import warnings

import pytest
import torch
from helpers import needs_extension
from torch import nn

import fusedopt
from fusedopt import optim

SHAPES = [(4,), (3, 5), (2, 3, 4), (), (0, 2)]
BACKENDS = ["cpp", "reference"]


def parameters(dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in SHAPES]


def gradients(params, seed=1):
    gen = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)


def average(p, decay, avg=None, **kwargs):
    if avg is None:
        return {"avg": p.data.clone()}
    return {"avg": avg.lerp_(p.data, 1 - decay)}


average.defaults = dict(decay=0.9)


def swap(p, avg=None, **kwargs):
    if avg is not None:
        kept = p.data.clone()
        p.data.copy_(avg)
        avg.copy_(kept)


def shrink(p, lr, wd=0.5, **kwargs):
    p.data.mul_(1 - lr * wd)


def climb(p, lr, **kwargs):
    p.data.add_(p.grad, alpha=lr)


def sort_rows(p, **kwargs):
    if p.dim() > 0:
        p.data.sum().item()  # read on the host, which no kernel does
        p.data.copy_(p.data.sort(dim=0).values)


def calls(opt):
    """Repeated calls, and those anew, of what was applied last."""
    steps = list(opt.applications)[-1].engine.steps
    return steps.repeated, steps.anew


@pytest.mark.parametrize("backend", BACKENDS)
def test_averages_and_swaps_are_those_of_plain_torch(backend):
    params, decay = parameters(torch.float64), 0.8
    opt = fusedopt.SGD(params, lr=0.1, backend=backend)
    truth = [p.detach().clone() for p in params]
    means = [t.clone() for t in truth]
    for t in range(4):
        gradients(params, t)
        opt.step()
        opt.apply(average, decay=decay)
        for x, m, p in zip(truth, means, params, strict=True):
            x -= 0.1 * (p.grad + 0.0)
            if t:
                m.lerp_(x, 1 - decay)
            else:
                m.copy_(x)
    opt.apply(swap)
    for x, m, p in zip(truth, means, params, strict=True):
        torch.testing.assert_close(p.detach(), m, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(opt.state[p]["avg"], x, rtol=1e-14, atol=1e-14)
    opt.apply(swap)
    for x, p in zip(truth, params, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-14, atol=1e-14)


def schedule_free_step(p, lr, beta, z=None, step=0, **kwargs):
    if z is None:
        z = p.data.clone()
    c = 1 / (step + 1)
    p.data.lerp_(z, c).add_(p.grad, alpha=lr * (beta * (1 - c) - 1))
    z.sub_(p.grad, alpha=lr)
    return {"z": z, "step": step + 1}


def to_average(p, beta, z=None, **kwargs):
    if z is not None:
        p.data.lerp_(z, 1 - 1 / beta)


def to_training(p, beta, z=None, **kwargs):
    if z is not None:
        p.data.lerp_(z, 1 - beta)


@pytest.mark.parametrize("backend", BACKENDS)
def test_schedule_free_changes_between_its_weights(backend):
    """x, y and z as the paper defines them (arXiv:2405.15682), in float64; one parameter never gets a gradient."""
    params, lr, beta = parameters(torch.float64), 0.1, 0.9
    opt = fusedopt.Optimizer(params, schedule_free_step, lr=lr, beta=beta, backend=backend)
    x, z = ([p.detach().clone() for p in params] for _ in range(2))
    for t in range(8):
        gradients(params[:-2], t)
        opt.step()
        for i, p in enumerate(params[:-2]):
            z[i] = z[i] - lr * p.grad
            x[i] = x[i] + (z[i] - x[i]) / (t + 1)
        if t % 2:
            opt.apply(to_average)
            for p, expected in zip(params, x, strict=True):
                torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
            opt.apply(to_training)
        for p, a, b in zip(params[:-2], x, z, strict=False):
            torch.testing.assert_close(p.detach(), beta * a + (1 - beta) * b, rtol=1e-12, atol=1e-12)
    if backend == "cpp":
        assert [each.engine.steps.anew for each in opt.applications] == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree(dtype):
    found = []
    for backend in BACKENDS:
        params = parameters(dtype)
        opt = fusedopt.Adam(params, lr=0.1, backend=backend)
        for t in range(3):
            opt.apply(average)
            gradients(params[:3], t)
            opt.step()
            opt.apply([shrink, swap], lr=0.01)
        found.append([*(p.detach() for p in params), *(opt.state[p]["avg"] for p in params)])
        assert {opt.state[p]["avg"].dtype for p in params} == {dtype}
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)  # multiply-adds are rounded once by torch


@needs_extension
def test_repeated_calls_take_no_python_work_whatever_gradients_do():
    params = parameters()
    opt = fusedopt.Adam(params, lr=0.1)
    opt.apply(average, decay=0.5)
    opt.apply(average, decay=0.5)
    for t in range(6):
        gradients(params[t % 3 :], t)
        opt.apply(average, decay=0.5 + t / 20)
        opt.zero_grad()
        if t % 2:
            params[1].data = params[1].data.clone()
    assert calls(opt) == (6, 2)
    explained = opt.explain().applied[0]
    assert (explained.launches, explained.bytes_per_element) == (1, 12)
    assert "applied average on the cpp backend: 1 launch, 12 bytes per element, over all parameters" in str(
        opt.explain()
    )
    assert "6 of 8 without Python work" in str(opt.explain())
    assert "lerp" in opt.kernel_source() or "avg" in opt.kernel_source()


@needs_extension
def test_steps_stay_bound_between_calls():
    params = parameters()
    opt = fusedopt.Adam(params, lr=0.1)
    for t in range(6):
        gradients(params, t)
        opt.step()
        opt.apply(shrink)
    assert (opt.engine.steps.repeated, opt.engine.steps.anew) == (4, 2)
    assert calls(opt) == (5, 1)
    assert all(opt.state[p]["step"] == 6 for p in params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_are_what_callbacks_make_of_them(backend):
    params = parameters()
    opt = fusedopt.Adam(params, lr=0.1, backend=backend)
    gradients(params)
    opt.step()
    opt.apply(shrink)
    assert all(opt.state[p]["step"] == 1 for p in params)
    opt.apply(lambda p, step, **kwargs: {"step": step * 0})
    assert all(opt.state[p]["step"] == 0 for p in params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_gradients_only_parameters_that_have_one(backend):
    params = parameters()
    gradients(params[:2])
    before = [p.detach().clone() for p in params]
    opt = fusedopt.SGD(params, lr=0.5, backend=backend, max_grad_norm=1e-3)
    for _ in range(2):
        opt.apply([climb, shrink], wd=0.0)
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        expected = old + 0.5 * p.grad + 0.5 * p.grad if i < 2 else old
        torch.testing.assert_close(p.detach(), expected)
    assert "over the parameters with a gradient, as climb reads gradients" in str(opt.explain())
    if backend == "cpp":
        assert calls(opt)[1] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_any_gradient_what_reads_them_is_refused(backend):
    params = parameters()
    opt = fusedopt.SGD(params, lr=0.5, backend=backend)
    with pytest.raises(RuntimeError, match=r"climb reads gradients, and no parameter has one.*Remedy"):
        opt.apply([shrink, climb])
    assert not opt.state


@pytest.mark.parametrize("backend", BACKENDS)
def test_hyperparameters_are_the_callbacks_the_groups_or_the_calls(backend):
    def note(p, lr, wd, decay, more=7.0, **kwargs):
        p.data.fill_(0.0).add_(lr * 1000 + wd * 100 + decay * 10 + more)

    note.defaults = dict(decay=0.25)
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "lr": 2.0},
        {"params": params[2:], "decay": 0.5},
    ]
    opt = fusedopt.Adam(groups, lr=1.0, wd=0.5, backend=backend)
    for hypers, expected in [
        ({}, [1000 + 50 + 2.5 + 7, 2000 + 50 + 2.5 + 7, 1000 + 50 + 5 + 7]),
        ({"lr": 3.0}, [3059.5, 3059.5, 3062]),
        ({"weight_decay": 0.0, "more": 1}, [1003.5, 2003.5, 1006]),
        ({"decay": torch.tensor(1.0)}, [1067, 2067, 1067]),
        ({}, [1059.5, 2059.5, 1062]),
    ]:
        opt.apply(note, **hypers)
        assert [p[0].item() for p in params] == expected
    assert [g["lr"] for g in opt.param_groups] == [1.0, 2.0, 1.0]
    opt.param_groups[0]["lr"] = 5.0
    opt.apply(note)
    assert params[0][0].item() == 5059.5


def test_a_scheduled_rate_takes_no_python_work_and_betas_are_translated():
    def note(p, lr, mom, sqr_mom, **kwargs):
        p.data.mul_(0).add_(lr + mom * 10 + sqr_mom * 100)

    p = nn.Parameter(torch.zeros(3))
    opt = optim.AdamW([p], lr=0.0, betas=(0.5, 0.25))
    for t in range(4):
        opt.param_groups[0]["lr"] = float(t)
        opt.apply(note)
        assert p[0].item() == t + 5 + 25
    opt.apply(note, betas=(1.0, 1.0))
    assert p[0].item() == 3 + 10 + 100
    opt.apply(note, mom=0.0)
    assert p[0].item() == 3 + 25


@pytest.mark.parametrize(
    ("hypers", "error", "message"),
    [
        ({"decya": 0.5}, TypeError, "no callback takes the hyperparameter 'decya'; did you mean 'decay'"),
        ({"decay": float("nan")}, ValueError, "invalid decay: NaN"),
        ({"lr": -1.0}, ValueError, "lr"),
    ],
)
def test_wrong_hyperparameters_are_refused(hypers, error, message):
    params = parameters()
    opt = fusedopt.SGD(params, lr=0.5)
    opt.apply(average)
    before = [p.detach().clone() for p in params]
    with pytest.raises(error, match=message):
        opt.apply(average, **hypers)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_what_cannot_be_called_is_refused():
    opt = fusedopt.SGD(parameters(), lr=0.5)
    with pytest.raises(TypeError, match="callbacks must be callable"):
        opt.apply([shrink, 3])
    with pytest.raises(TypeError, match="callbacks must be callable; 3 is not"):
        opt.apply(3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_leaves_everything_as_it_was(backend):
    def fails(p, **kwargs):
        p.data.add_(1)
        if p.shape == (2, 3, 4):
            raise ValueError("here")
        return {"new": p.data.clone()}

    params = parameters()
    opt = fusedopt.Adam(params, lr=0.1, backend=backend)
    gradients(params)
    opt.step()
    before = copy.deepcopy(opt.state_dict())
    old = [p.detach().clone() for p in params]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            with pytest.raises(ValueError, match="here"):
                opt.apply([shrink, fails])
    torch.testing.assert_close(opt.state_dict()["state"], before["state"], rtol=0, atol=0)
    assert all(torch.equal(p, o) for p, o in zip(params, old, strict=True))
    with pytest.raises(TypeError, match="needs absent, which is no hyperparameter"):
        opt.apply(lambda p, absent, **kwargs: p.data.mul_(absent))
    gradients(params, 2)
    opt.step()
    assert all(opt.state[p]["step"] == 2 for p in params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_has_no_fused_form_runs_eagerly_and_fused_around_it(backend):
    params = parameters()
    expected = [(p.detach() * 0.5).sort(dim=0).values if p.dim() else p.detach() * 0.5 for p in params]
    expected = [x * 0.5 for x in expected]
    opt = fusedopt.SGD(params, lr=1.0, backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.apply([shrink, sort_rows, shrink, average], wd=0.5)
    assert bool(caught) == (backend == "cpp")
    for p, x in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), x)
        torch.testing.assert_close(opt.state[p]["avg"], x)
        assert p.grad is None
    if backend == "cpp":
        assert "sort_rows" in str(opt.explain().applied[0].eager)


def test_gradients_are_none_where_they_are_not_named():
    seen, halves = [], ("gr", "ad")

    def look(p, **kwargs):
        seen.append(getattr(p, "".join(halves)))
        p.data.mul_(2)

    params = parameters()
    gradients(params)
    given = [p.grad for p in params]
    opt = fusedopt.SGD(params, lr=1.0, backend="reference")
    opt.apply(look)
    assert seen == [None] * len(params)
    assert all(p.grad is g for p, g in zip(params, given, strict=True))


@needs_extension
def test_equal_partials_and_methods_are_the_same_callback():
    class Rule:
        rate = 0.5

        def relax(self, p, **kwargs):
            p.data.mul_(self.rate)

    params, rule = parameters(), Rule()
    opt = fusedopt.SGD(params, lr=1.0)
    for _ in range(3):
        opt.apply(functools.partial(average, decay=0.5))
        opt.apply(rule.relax)
    assert len(list(opt.applications)) == 2
    assert [each.engine.steps.repeated for each in opt.applications] == [1, 2]


def test_few_of_many_callbacks_are_kept():
    opt = fusedopt.SGD(parameters(), lr=1.0)
    for _ in range(40):
        opt.apply(lambda p, **kwargs: p.data.mul_(0.5))
    assert len(list(opt.applications)) < 20


def test_state_is_saved_and_loaded_and_used_by_steps():
    def pulled(p, lr, avg=None, **kwargs):
        if avg is not None:
            p.data.lerp_(avg, lr)

    params = parameters()
    opt = fusedopt.Optimizer(params, pulled, lr=0.5)
    opt.apply(average)
    opt.apply(shrink, wd=1.0)
    gradients(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
    other = fusedopt.Optimizer(parameters(seed=3), pulled, lr=0.5)
    other.apply(average)
    other.apply(swap)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    other.apply(swap)
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        assert torch.equal(q, opt.state[p]["avg"])
        torch.testing.assert_close(p.detach(), opt.state[p]["avg"] * 0.75)
    copied = copy.deepcopy(opt)
    copied.apply(swap)
    assert torch.equal(copied.param_groups[0]["params"][1], opt.state[params[1]]["avg"])


@pytest.mark.parametrize("options", [dict(amp_fused=True), dict(capturable=True)])
def test_counts_on_the_device_stay_there(options):
    params = parameters()
    opt = optim.AdamW(params, lr=0.1, **options)
    for t in range(4):
        gradients(params, t)
        opt.step()
        opt.apply(average)
        opt.apply(lambda p, step, **kwargs: p.data.mul_(1 / (1 + step)))
    assert all(opt.state[p]["step"].dtype == torch.float64 for p in params)
    assert all(opt.state[p]["step"].item() == 4 for p in params if p.numel())


def test_state_of_skipped_steps_is_not_there_yet():
    """The first steps find infinities, so that what they would have started from is still to come."""

    def anchored(p, lr, anchor=None, **kwargs):
        if anchor is None:
            anchor = p.data.clone()
        p.data.sub_(p.grad, alpha=lr)
        return {"anchor": anchor}

    def back(p, anchor=None, **kwargs):
        if anchor is not None:
            p.data.lerp_(anchor, 0.5)

    p = nn.Parameter(torch.ones(3))
    opt = fusedopt.Optimizer([p], anchored, lr=0.5, amp_fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    opt.apply(back)
    for t, expected in enumerate([1.0, 1.0, 0.75, 0.625]):
        opt.zero_grad()
        scaler.scale(p.sum() * (float("inf") if t < 2 else 1.0)).backward()
        scaler.step(opt)
        scaler.update()
        opt.apply(back)
        assert p[0].item() == expected
    assert not opt.explain().applied[0].eager


def test_parameters_that_are_not_dense_or_listed_twice():
    whole = torch.arange(12.0).reshape(3, 4)
    p = nn.Parameter(whole[:, :2])
    opt = fusedopt.SGD([p], lr=0.5)
    for _ in range(3):
        opt.apply(shrink, wd=1.0)
    torch.testing.assert_close(whole[:, :2], torch.arange(12.0).reshape(3, 4)[:, :2] / 8)
    torch.testing.assert_close(whole[:, 2:], torch.arange(12.0).reshape(3, 4)[:, 2:])
    q = nn.Parameter(torch.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = fusedopt.SGD([q, q], lr=0.5)
    for t in range(1, 4):
        opt.apply(shrink, wd=1.0)
        assert q[0].item() == 0.5**t


def test_groups_that_are_added_and_flags_are_seen():
    params = parameters()
    opt = fusedopt.SGD([{"params": params[:2]}], lr=0.5)
    opt.apply(average)
    opt.apply(average)
    opt.add_param_group({"params": params[2:]})
    opt.apply(average)
    assert all("avg" in opt.state[p] for p in params)

    def flagged(p, do_wd=True, **kwargs):
        if do_wd:
            p.data.zero_()

    opt.state[params[0]]["do_wd"] = False
    opt.apply(flagged)
    assert params[0].any() and not any(p.any() for p in params[1:])


def test_hooks_of_step_are_not_called_and_autograd_notices():
    params = parameters()
    opt = fusedopt.SGD(params, lr=0.5)
    opt.register_step_pre_hook(lambda *_: pytest.fail("called"))
    loss = params[0].square().sum()
    opt.apply(shrink)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    versions = [p._version for p in params[:2]]
    opt.apply(shrink)
    assert all(p._version > v for p, v in zip(params[:2], versions, strict=True))


def test_fake_parameters_are_applied_eagerly():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        params = [nn.Parameter(torch.ones(3))]
        opt = fusedopt.SGD(params, lr=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.apply(average)
        assert opt.state[params[0]]["avg"].shape == (3,)
