"""Numbers that only the device knows: loss scale and found infinity, the norm's coefficient, step counts.

On a CPU the device is the CPU, and the kernels are the same programs as on a GPU. With --device cuda it is a GPU.
"""

import copy
import itertools
from functools import partial

import pytest
import torch
from devices import COMPILED, DEVICE
from factories import assert_equal
from torch.nn.utils import clip_grad_norm_

import fusedopt
import fusedopt.optim as optim
from fusedopt import table
from fusedopt.callbacks import average_grad, sgd_step, step_stat

SHAPES = [(3, 5), (7,), (), (130,)]
SCALE = 1024.0
ROWS = [pytest.param(r, r.variants[0], id=f"{r.face}-{r.name}") for r in table.rows(calls=False)]
LATE = [
    pytest.param(r, v, id=f"{r.face}-{r.name}-{v.id}")
    for r in table.rows(calls=False)
    for v in r.variants
    if v.first_step_kernel and v is not r.variants[0]
]
"""Optimizers whose state starts as something other than zeros."""
BACKENDS = [*COMPILED, "reference"]


def parameters(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(DEVICE, dtype).requires_grad_() for s in shapes]


def gradients(steps, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes] for _ in range(steps)]


def give(params, grads, scale=1.0):
    for p, g in zip(params, grads, strict=True):
        p.grad = g * scale


WIDE = {"AdamMini", "Prodigy"}
"""Rules whose numbers per tensor meet counts: on the device these are doubles, and so, as torch has it, are results."""


def assert_alike(ours, plain, row=None):
    """The same bits; on a GPU, where one side takes powers and roots on the device, the other on the host, nearly."""
    rounding = 0.0 if DEVICE.type == "cpu" else 1e-5
    if row is not None and row.name in WIDE:
        rounding = 1e-6
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)


def scaled_step(opt, params, grads, found=False, scale=SCALE, extra=None):
    """A step as GradScaler takes it; ``found``: a gradient is infinite."""
    give(params, grads, scale)
    if found:
        params[0].grad.view(-1)[0] = torch.inf
    opt.grad_scale, opt.found_inf = (torch.tensor(x, device=DEVICE) for x in (scale, float(found)))
    opt.step(**({"extra": extra} if extra else {}))
    del opt.grad_scale, opt.found_inf


# ---------------------------------------------------------------- loss scaling


@pytest.mark.parametrize(("row", "variant"), ROWS + LATE)
def test_a_scaled_step_is_a_step_and_a_skipped_one_is_none(row, variant, compiled):
    ours, plain = parameters(), parameters()
    opt = row.factory(ours, **variant.kwargs, amp_fused=True, backend=compiled)
    twin = row.factory(plain, **variant.kwargs, backend=compiled)
    for t, grads in enumerate(gradients(12)):
        before = [p.detach().clone() for p in ours]
        scaled_step(opt, ours, grads, found=t in (0, 1, 6))
        if t in (0, 1, 6):
            assert_equal(ours, before)
        else:
            give(plain, grads)
            twin.step()
    assert_alike(ours, plain, row)
    assert opt.engine.bound
    assert not opt.explain().eager


def test_without_the_gate_an_infinity_gets_through(compiled):
    (p,) = params = parameters(shapes=[(4,)])
    opt = optim.AdamW(params, amp_fused=True, backend=compiled)
    give(params, [torch.full((4,), torch.inf, device=DEVICE)])
    opt.found_inf = torch.tensor(0.0, device=DEVICE)
    opt.step()
    assert not p.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_backends_agree_on_scaled_steps(backend, dtype):
    """Gradients are divided in the compute type, whatever they are stored in.

    (torch itself rounds a 0-d tensor that meets others differently from a number, by an ulp.)
    """
    ours, truth = parameters(dtype), parameters(dtype)
    opt = optim.AdamW(ours, lr=0.1, amp_fused=True, backend=backend)
    twin = optim.AdamW(truth, lr=0.1, backend=backend)
    for t, grads in enumerate(gradients(5, dtype)):
        scaled_step(opt, ours, grads, found=t == 2, scale=2.0)
        if t != 2:
            give(truth, grads)
            twin.step()
    if backend != "reference":
        assert_alike(ours, truth)
    for p, q in zip(ours, truth, strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)


def test_torchs_scaler_drives_it_as_it_drives_torchs_own(compiled):
    def train(make, **options):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)).to(DEVICE)
        opt = make(model.parameters(), lr=0.01, backend=compiled, **options)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**12, growth_interval=3)
        scales = []
        for t in range(12):
            x = torch.randn(5, 6, device=DEVICE)
            loss = model(x).pow(2).mean() * (float("inf") if t in (0, 5) else 1.0)
            opt.zero_grad()
            scaler.scale(loss).backward()
            if t == 7:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
            scales.append(scaler.get_scale())
            assert not hasattr(opt, "grad_scale") and not hasattr(opt, "found_inf")
        return list(model.parameters()), scales

    ours, scales = train(optim.AdamW, amp_fused=True)
    plain, expected = train(optim.AdamW)
    assert scales == expected
    assert len(set(scales)) > 2
    for a, b in zip(ours, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


def test_a_scaler_finds_the_flag_only_where_it_was_asked_for():
    (p,) = parameters(shapes=[(2,)])
    assert not hasattr(optim.AdamW([p]), "_step_supports_amp_scaling")
    opt = optim.AdamW([p], amp_fused=True, max_grad_norm=2.0)
    again = copy.deepcopy(opt)
    assert opt._step_supports_amp_scaling and again._step_supports_amp_scaling
    assert again.max_grad_norm == 2.0
    assert not hasattr(opt, "grad_scale") and not hasattr(opt, "found_inf")


def test_without_a_scaler_a_step_is_a_plain_one_even_after_a_skipped_one(compiled):
    ours, plain = parameters(), parameters()
    opt, twin = (
        optim.AdamW(params, backend=compiled, **options)
        for params, options in ((ours, {"amp_fused": True}), (plain, {}))
    )
    first, second = gradients(2)
    scaled_step(opt, ours, first, found=True)
    for params, o in ((ours, opt), (plain, twin)):
        give(params, second)
        o.step()
    assert_alike(ours, plain)


def test_a_step_that_fails_leaves_the_scaler_its_own_scale():
    """GradScaler multiplies its scale by what it finds on the optimizer."""
    fails = [True]

    def fragile(p, lr, **_):
        if fails.pop():
            raise ValueError("not today")
        p.data.sub_(p.grad, alpha=lr)

    (p,) = params = parameters(shapes=[(4,)])
    start = p.detach().clone()
    opt = fusedopt.Optimizer(params, fragile, lr=0.5, amp_fused=True, backend="reference")
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=8.0)
    scaler.scale(p.sum()).backward()
    with pytest.raises(ValueError, match="not today"):
        scaler.step(opt)
    assert not hasattr(opt, "grad_scale") and not hasattr(opt, "found_inf")
    fails.append(False)
    scaler.step(opt)
    assert torch.equal(p.detach(), start - 0.5)


def clones(p, slow=None, **_):
    """Keeps a copy of where the parameter started."""
    slow = p.data.clone() if slow is None else slow
    p.data.add_(p.grad.data * 0.1)
    return {"slow": slow * 0.5}


def test_state_that_starts_as_a_clone_survives_a_skipped_first_step_and_a_checkpoint(compiled):
    (p,) = params = parameters(shapes=[(4,)])
    start = p.detach().clone()
    opt = fusedopt.Optimizer(params, clones, amp_fused=True, backend=compiled)
    grads = gradients(3, shapes=[(4,)])
    scaled_step(opt, params, grads[0], found=True)
    saved = copy.deepcopy(opt.state_dict())
    for t, backend in ((1, compiled), (2, "reference")):
        (q,) = again = parameters(shapes=[(4,)])
        other = fusedopt.Optimizer(again, clones, amp_fused=True, backend=backend)
        other.load_state_dict(saved)
        scaled_step(other, again, grads[t])
        assert torch.equal(other.state[q]["slow"], start * 0.5)
        scaled_step(other, again, grads[t])
        assert torch.equal(other.state[q]["slow"], start * 0.25)


RESUMED = {  # state whose names are not those that callbacks have for it, and numbers that begin as something
    "SGD": partial(optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "Adagrad": partial(optim.Adagrad, lr=0.1, initial_accumulator_value=0.1),
    "AdamW": partial(optim.AdamW, lr=0.1, amsgrad=True),
    "DoG": fusedopt.rules.DoG,
    "Prodigy": fusedopt.rules.Prodigy,
    "ranger": partial(fusedopt.ranger, lr=0.1),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_after_a_skipped_first_step_is_one_of_what_has_not_begun(name, compiled):
    """As trainings in float16 begin: the scale is too large at first."""
    made = [parameters(shapes=[(5, 4)]) for _ in range(2)]
    whole, resumed = (RESUMED[name](params, amp_fused=True, backend=compiled) for params in made)
    grads = gradients(4, shapes=[(5, 4)])
    for t, grad in enumerate(grads):
        for opt, params in zip((whole, resumed), made, strict=True):
            scaled_step(opt, params, grad, found=t == 0)
        if t == 0:
            saved = copy.deepcopy(resumed.state_dict())
            resumed = RESUMED[name](made[1], amp_fused=True, backend=compiled)
            resumed.load_state_dict(saved)
    assert_equal(*made)


def test_what_has_not_begun_is_no_state_of_fastais(compiled):
    params = parameters(shapes=[(4,)])
    opt = fusedopt.Lookahead(fusedopt.SGD(params, lr=0.1, mom=0.9, amp_fused=True, backend=compiled))
    scaled_step(opt, params, gradients(1, shapes=[(4,)])[0], found=True)
    assert opt.to_fastai_state_dict()["state"] == [{}] and "slow_weights" not in opt.to_fastai_state_dict()


def unfusable(p, lr, **_):
    p.data.sub_(p.grad.data.msort() * lr)


def test_callbacks_that_run_eagerly_are_scaled_and_skipped_too(compiled):
    ours, plain = parameters(shapes=[(6,)]), parameters(shapes=[(6,)])
    with pytest.warns(RuntimeWarning, match="unfusable runs eagerly"):
        make = partial(fusedopt.Optimizer, cbs=[average_grad, unfusable], lr=0.1, mom=0.9, backend=compiled)
        opt, twin = make(ours, amp_fused=True), make(plain)
        for t, grads in enumerate(gradients(4, shapes=[(6,)])):
            scaled_step(opt, ours, grads, found=t in (0, 2))
            if t not in (0, 2):
                give(plain, grads)
                twin.step()
    assert_equal(ours, plain)
    assert_equal([opt.state[ours[0]]["grad_avg"]], [twin.state[plain[0]]["grad_avg"]])


def test_state_that_starts_as_a_clone_may_start_between_two_programs(compiled):
    """A first step that is fused and skipped, and then one with a callback that runs eagerly."""
    (p,) = params = parameters(shapes=[(4,)])
    start, grads = p.detach().clone(), gradients(3, shapes=[(4,)])
    opt = fusedopt.Optimizer(params, clones, lr=0.1, amp_fused=True, backend=compiled)
    scaled_step(opt, params, grads[0], found=True)
    opt.cbs = [clones, unfusable]
    with pytest.warns(RuntimeWarning, match="unfusable runs eagerly"):
        scaled_step(opt, params, grads[1])
    assert torch.equal(opt.state[p]["slow"], start * 0.5)
    opt.cbs = [clones]
    scaled_step(opt, params, grads[2])
    assert torch.equal(opt.state[p]["slow"], start * 0.25)


def undefaulted(p, count=None, **_):
    p.data.sub_(p.grad.data)
    return {"count": 1 if count is None else count + 1}


def drifting(p, lr, decay, slow=None, fast=None, hessian=None, **_):
    """What is there first is a copy; ``fast`` begins when there is a decay or an extra tensor."""
    out = {"slow": p.data.clone() if slow is None else slow}
    if hessian is not None or decay:
        seen = p.grad.data if hessian is None else hessian
        out["fast"] = seen.clone() if fast is None else fast.mul_(0.5).add_(seen, alpha=0.25)
        p.data.sub_(out["fast"], alpha=lr)
    p.data.sub_((p.data - out["slow"]) * 0.1 + p.grad.data, alpha=lr)
    return out


def mean_of_steps(p, mean=None, **_):
    return {"mean": p.data.clone() if mean is None else mean * 0.5 + p.data * 0.5}


BEGINNINGS = {
    "a hyperparameter": lambda opt: opt.param_groups[0].update(decay=1.0),
    "another callback": lambda opt: opt.cbs.append(mean_of_steps),
    "outside of a step": lambda opt: opt.apply(mean_of_steps),
    "from the start": None,
}


@pytest.mark.parametrize("skipped", [(), (0, 1, 2, 3), (3,)], ids=["none", "all", "the first of it"])
@pytest.mark.parametrize("how", BEGINNINGS)
def test_state_may_begin_later_than_other_state(how, skipped, compiled):
    """Of the older, the device alone knows whether it has begun; what is new starts as if there were no scaler."""

    def run(backend):
        (p,) = params = parameters(shapes=[(5,)])
        decay = 1.0 if BEGINNINGS[how] is None else 0.0
        opt = fusedopt.Optimizer(params, drifting, lr=0.1, decay=decay, amp_fused=True, backend=backend)
        for t, grads in enumerate(gradients(7, shapes=[(5,)])):
            if t == 3 and BEGINNINGS[how] is not None:
                BEGINNINGS[how](opt)
            scaled_step(opt, params, grads, found=t in skipped)
        return [p.detach(), *(opt.state_dict()["state"][0][k] for k in sorted(opt.state_dict()["state"][0]))]

    with torch.no_grad():
        found, wanted = run(compiled), run("reference")
    assert len(found) == len(wanted) > 1
    torch.testing.assert_close(found, wanted)


def test_extra_tensors_may_come_later_than_other_state(compiled):
    def run(backend):
        (p,) = params = parameters(shapes=[(5,)])
        opt = fusedopt.Optimizer(params, drifting, lr=0.1, decay=0.0, amp_fused=True, backend=backend)
        for t, grads in enumerate(gradients(6, shapes=[(5,)])):
            given = {} if t < 2 else {"hessian": [torch.full((5,), 2.0, device=DEVICE)]}
            scaled_step(opt, params, grads, found=t == 2, extra=given)
        return [p.detach(), opt.state[p]["slow"], opt.state[p]["fast"]]

    torch.testing.assert_close(run(compiled), run("reference"))


def from_the_first_gradient(p, lr, mean=None, **_):
    """The numbers that later steps have come before those that all have."""
    mean = p.grad.data.clone() if mean is None else mean.mul_(0.5).add_(p.grad.data, alpha=0.5)
    p.data.sub_(mean, alpha=lr).sub_(p.data * 0.1, alpha=lr)
    return {"mean": mean}


def test_first_steps_and_later_ones_have_numbers_of_their_own(compiled):
    def run(backend):
        (p,) = params = parameters(shapes=[(5,)])
        opt = fusedopt.Optimizer(params, from_the_first_gradient, lr=0.1, amp_fused=True, backend=backend)
        for t, grads in enumerate(gradients(5, shapes=[(5,)])):
            scaled_step(opt, params, grads, found=t in (0, 3))
        return [p.detach(), opt.state[p]["mean"]]

    torch.testing.assert_close(run(compiled), run("reference"))


def test_a_count_that_starts_nowhere_is_named_and_still_right(compiled):
    (p,) = params = parameters(shapes=[(3,)])
    opt = fusedopt.Optimizer(params, undefaulted, capturable=True, backend=compiled)
    give(params, [torch.ones(3, device=DEVICE)])
    with pytest.warns(RuntimeWarning, match="'count' in the state lives on the device, and needs a number"):
        opt.step()
    opt.step()
    assert float(opt.state[p]["count"]) == 2.0


# ---------------------------------------------------------------- the global norm


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_is_that_of_clip_grad_norm(backend, dtype, limit):
    ours, truth = parameters(dtype), parameters(torch.float64)
    opt = optim.SGD(ours, lr=0.1, max_grad_norm=limit, backend=backend)
    with torch.no_grad():
        for p, q in zip(ours, truth, strict=True):
            q.copy_(p)
    for grads in gradients(1, dtype):
        give(ours, grads)
        give(truth, [g.double() for g in grads])
        kept = [p.grad.clone() for p in ours]
        opt.step()
        assert_equal([p.grad for p in ours], kept)  # no gradient is rewritten
        norm = clip_grad_norm_(truth, limit)
        torch.optim.SGD(truth, lr=0.1).step()
    assert opt.grad_norm.dtype == torch.float32 and opt.grad_norm.dim() == 0
    assert opt.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    tolerance = 2e-7 if dtype != torch.bfloat16 else 2**-8
    for p, q in zip(ours, truth, strict=True):
        assert torch.allclose(p.double(), q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("row", "variant"), ROWS)
def test_every_optimizer_clips_as_if_its_gradients_had_been_clipped(row, variant, compiled):
    """All in double, so that only the rounding of the float32 coefficient tells the two apart."""
    ours, plain = parameters(torch.float64), parameters(torch.float64)
    opt = row.factory(ours, **variant.kwargs, max_grad_norm=0.7, backend=compiled)
    twin = row.factory(plain, **variant.kwargs, backend=compiled)
    for grads in gradients(6, torch.float64):
        give(ours, grads)
        give(plain, grads)
        clip_grad_norm_(plain, 0.7)
        opt.step()
        twin.step()
    for p, q in zip(ours, plain, strict=True):
        assert torch.allclose(p, q, rtol=2e-6, atol=2e-6)
    assert not opt.explain().eager


def test_a_norm_that_is_not_clipped_by_would_be_noticed(compiled):
    ours, plain = parameters(torch.float64), parameters(torch.float64)
    for params, options in ((ours, {"max_grad_norm": 0.7}), (plain, {})):
        opt = optim.SGD(params, lr=0.1, backend=compiled, **options)
        give(params, gradients(1, torch.float64)[0])
        opt.step()
    assert not torch.allclose(ours[0], plain[0], rtol=2e-6, atol=2e-6)


def test_the_norm_is_over_groups_dtypes_and_parameters_that_have_a_gradient(compiled):
    wide, narrow = parameters(shapes=[(40,), (3,)]), parameters(torch.bfloat16, shapes=[(9,)])
    groups = [{"params": wide}, {"params": narrow, "lr": 0.5, "weight_decay": 0.1}]
    opt = optim.SGD(groups, max_grad_norm=1.0, backend=compiled)
    for generator_step, absent in ((0, None), (1, None), (2, 1)):
        for i, p in enumerate([*wide, *narrow]):
            torch.manual_seed(generator_step)
            p.grad = None if i == absent else torch.randn_like(p)
        grads = [p.grad.double() for p in [*wide, *narrow] if p.grad is not None]
        opt.step()
        expected = torch.cat([g.flatten() for g in grads]).norm()
        assert opt.grad_norm.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_norm_is_over_all_chunks_of_a_tensor(compiled):
    shapes = [(1,), (127,), (64, 64), (140_003,)]
    ours, plain = parameters(shapes=shapes), parameters(shapes=shapes)
    opt = optim.AdamW(ours, lr=1e-2, max_grad_norm=1.0, backend=compiled)
    twin = optim.AdamW(plain, lr=1e-2, backend=compiled)
    for grads, size in zip(gradients(3, shapes=shapes), (1.0, 1e-4, 10.0), strict=True):  # below once
        give(ours, grads, size)
        norm = torch.cat([p.grad.double().flatten() for p in ours]).norm()
        give(plain, [g * min(1.0, 1.0 / norm.item()) for g in grads], size)
        opt.step()
        twin.step()
        assert opt.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_without_elements_adds_nothing_to_the_norm(backend, monkeypatch):
    """No kernel writes the sum of its squares, so that must not be what memory held before."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody has written is NaN
    try:
        params = parameters(shapes=[(40,), (0,), (3,)])
        opt = optim.SGD(params, lr=0.1, max_grad_norm=1.0, backend=backend)
        for grads in gradients(3, shapes=[(40,), (0,), (3,)]):
            give(params, grads)
            opt.step()
            expected = torch.cat([g.flatten().double() for g in grads]).norm()
            assert opt.grad_norm.item() == pytest.approx(expected.item(), rel=1e-6)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_norm_is_measured_again_on_warm_steps_and_its_limit_is_live(compiled):
    ours, plain = parameters(torch.float64), parameters(torch.float64)
    opt = optim.SGD(ours, lr=0.1, max_grad_norm=0.5, backend=compiled)
    twin = optim.SGD(plain, lr=0.1, backend=compiled)
    for t, grads in enumerate(gradients(6, torch.float64)):
        give(ours, grads)
        give(plain, grads)
        if t == 4:
            opt.max_grad_norm = 0.1
        norm = clip_grad_norm_(plain, opt.max_grad_norm)
        opt.step()
        twin.step()
        assert opt.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    assert opt.engine.bound
    for p, q in zip(ours, plain, strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)


def test_clipping_is_after_unscaling_and_an_infinite_norm_is_reported_not_stepped_by(compiled):
    ours, plain = parameters(), parameters()
    opt = optim.SGD(ours, lr=0.1, amp_fused=True, max_grad_norm=0.5, backend=compiled)
    twin = optim.SGD(plain, lr=0.1, max_grad_norm=0.5, backend=compiled)
    for t, grads in enumerate(gradients(4)):
        scaled_step(opt, ours, grads, found=t == 1)
        if t == 1:
            assert opt.grad_norm.item() == torch.inf
            continue
        give(plain, grads)
        twin.step()
        assert opt.grad_norm.item() == pytest.approx(twin.grad_norm.item(), rel=1e-6)
    for p, q in zip(ours, plain, strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)


def test_eager_callbacks_are_clipped_by_the_norm_of_all(compiled):
    fused, eager = parameters(torch.float64, [(5,)]), parameters(torch.float64, [(6,)])
    twins = [p.detach().clone().requires_grad_() for p in (*fused, *eager)]
    grads = gradients(1, torch.float64, [(5,), (6,)])[0]

    def sorting(p, lr, sort, **_):
        p.data.sub_((p.grad.data.msort() if sort else p.grad.data) * lr)

    groups = [{"params": fused, "sort": False}, {"params": eager, "sort": True}]
    opt = fusedopt.Optimizer(groups, sorting, lr=0.1, sort=False, max_grad_norm=0.5, backend=compiled)
    give([*fused, *eager], grads)
    give(twins, grads)
    with pytest.warns(RuntimeWarning, match="sorting runs eagerly"):
        opt.step()
    norm = clip_grad_norm_(twins, 0.5)
    assert opt.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    assert torch.allclose(fused[0], twins[0] - 0.1 * twins[0].grad, rtol=1e-6)
    assert torch.allclose(eager[0], twins[1] - 0.1 * twins[1].grad.sort().values, rtol=1e-6)


def test_a_kernel_that_reads_no_gradient_is_no_reason_not_to_take_its_norm(compiled):
    def decay(p, lr, **_):
        p.data.mul_(1 - lr)

    params = parameters()
    opt = fusedopt.Optimizer(params, decay, lr=0.1, max_grad_norm=1.0, backend=compiled)
    for grads in gradients(4):
        give(params, grads)
        opt.step()
        assert opt.grad_norm.item() == pytest.approx(clip_grad_norm_(params, 1e9).item(), rel=1e-6)


def test_without_gradients_there_is_no_norm_and_no_step():
    params = parameters()
    opt = optim.AdamW(params, max_grad_norm=1.0, amp_fused=True)
    opt.found_inf = 0  # what GradScaler sets where no parameter had a gradient
    opt.step()
    assert opt.grad_norm is None
    assert_equal(params, parameters())


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_must_be_above_zero(limit):
    with pytest.raises(ValueError, match="max_grad_norm must be above 0"):
        optim.AdamW(parameters(), max_grad_norm=limit)
    opt = optim.AdamW(parameters(), max_grad_norm=1.0)
    with pytest.raises(ValueError, match="max_grad_norm must be above 0"):
        opt.max_grad_norm = limit
    assert opt.max_grad_norm == 1.0


def test_explain_shows_what_the_norm_costs(compiled):
    params = parameters()
    opt = optim.AdamW(params, max_grad_norm=1.0, backend=compiled)
    give(params, gradients(1)[0])
    opt.step()
    report = opt.explain()
    assert report.bytes_per_element == 28 + 4
    assert [s.kernel.split(" #")[0] for s in report.stages] == [
        "grad_norm",
        "grad_norm",
        "clip",
        "clip",
        "AdamW",
    ]
    assert {c.name.split(" #")[0] for c in report.compiled} == {"grad_norm", "clip", "AdamW"}
    assert "writes scaling_norm, once per tensor" in str(report)


# ---------------------------------------------------------------- counts on the device


@pytest.mark.parametrize(("row", "variant"), ROWS + LATE)
def test_counts_on_the_device_give_the_steps_that_numbers_do(row, variant, compiled):
    ours, plain = parameters(), parameters()
    opt = row.factory(ours, **variant.kwargs, capturable=True, backend=compiled)
    twin = row.factory(plain, **variant.kwargs, backend=compiled)
    for t, grads in enumerate(gradients(9)):
        for params, o in ((ours, opt), (plain, twin)):
            give(params, grads)
            for group in o.param_groups:
                group["lr"] *= 0.9**t
            o.step()
    assert_alike(ours, plain, row)
    assert not opt.explain().eager
    for state in opt.state.values():
        assert not any(type(v) in (int, float) for v in state.values())


def test_one_kernel_serves_both_sides_of_a_branch_on_the_step(compiled):
    params = parameters()
    opt = optim.RAdam(params, lr=0.01, capturable=True, backend=compiled)
    for grads in gradients(8):
        give(params, grads)
        opt.step()
    assert len(opt.explain().compiled) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
def test_a_tensor_learning_rate_may_be_a_whole_number(dtype, backend):
    ours, plain = parameters(), parameters()
    number = torch.tensor(2, dtype=dtype, device=DEVICE)
    opt = optim.AdamW(ours, lr=number, capturable=True, backend=backend)
    twin = optim.AdamW(plain, lr=2.0, capturable=True, backend=backend)
    for t, grads in enumerate(gradients(4)):
        for params, o in ((ours, opt), (plain, twin)):
            give(params, grads)
            o.step()
        number.fill_(t % 2)
        twin.param_groups[0]["lr"] = float(t % 2)
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_learning_rate_is_read_where_it_is(backend):
    ours, plain = parameters(), parameters()
    lr = torch.tensor(0.1, device=DEVICE)
    opt = optim.SGD(ours, lr=lr, momentum=0.9, capturable=True, backend=backend)
    twin = optim.SGD(plain, lr=0.1, momentum=0.9, backend=backend)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (opt, twin)]
    for grads in gradients(5):
        for params, o, schedule in zip((ours, plain), (opt, twin), schedules, strict=True):
            give(params, grads)
            o.step()
            schedule.step()
    assert opt.param_groups[0]["lr"] is lr and lr.item() == pytest.approx(0.1 * 0.5**5)
    for p, q in zip(ours, plain, strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.cpu_only("torch's own refuses on a GPU what is taken back here")
def test_checkpoints_go_between_counts_on_the_device_and_numbers():
    makers = [
        lambda params: optim.AdamW(params, lr=0.1, capturable=True),
        lambda params: torch.optim.AdamW(params, lr=0.1),
        lambda params: optim.AdamW(params, lr=0.1),
    ]
    expected = parameters(torch.float64)
    whole = torch.optim.AdamW(expected, lr=0.1)
    grads = gradients(4, torch.float64)
    for g in grads:
        give(expected, g)
        whole.step()
    for first, second in itertools.permutations(makers, 2):
        params = parameters(torch.float64)
        opt = first(params)
        for g in grads[:2]:
            give(params, g)
            opt.step()
        saved = copy.deepcopy(opt.state_dict())
        assert all(s["step"].dtype == torch.float32 for s in saved["state"].values())
        opt = second(params)
        opt.load_state_dict(saved)
        if isinstance(opt, torch.optim.AdamW):  # torch's takes the saved group, and refuses this on a CPU
            opt.param_groups[0]["capturable"] = False
        for g in grads[2:]:
            give(params, g)
            opt.step()
        for p, q in zip(params, expected, strict=True):
            assert torch.allclose(p, q, rtol=1e-12, atol=1e-12)


def test_a_count_on_another_device_or_of_another_type_is_brought_over():
    (p,) = params = parameters(shapes=[(3,)])
    opt = optim.AdamW(params, capturable=True)
    give(params, [torch.ones(3, device=DEVICE)])
    opt.step()
    opt.state[p]["step"] = torch.tensor([4.0])
    opt.step()
    assert opt.state[p]["step"].dtype == torch.float64 and opt.state[p]["step"].item() == 5.0


def test_the_bias_correction_is_computed_in_double(compiled):
    """In float32, 1 - 0.999 is off by 1e-5 of itself."""
    (p,) = params = [torch.zeros(1, device=DEVICE).requires_grad_()]
    hypers = dict(lr=1.0, betas=(0.0, 0.999), eps=0.0, weight_decay=0.0)
    opt = optim.AdamW(params, **hypers, capturable=True, backend=compiled)
    give(params, [torch.tensor([0.3], device=DEVICE)])
    opt.step()
    assert p.item() == pytest.approx(-1.0, abs=2e-7)


def per_thousand(p, lr, step=0, **_):
    p.data.sub_(p.grad.data * (lr * (1 + step // 2 + step % 2)))
    return {"step": step + 1}


def test_whole_division_and_remainder_of_counts(compiled):
    ours, plain = parameters(), parameters()
    opt = fusedopt.Optimizer(ours, per_thousand, lr=0.1, capturable=True, backend=compiled)
    twin = fusedopt.Optimizer(plain, per_thousand, lr=0.1, backend=compiled)
    for grads in gradients(6):
        for params, o in ((ours, opt), (plain, twin)):
            give(params, grads)
            o.step()
    assert not opt.explain().eager
    for p, q in zip(ours, plain, strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)


def test_groups_may_differ_in_where_their_counts_are():
    host, device = parameters(shapes=[(3,)]), parameters(shapes=[(3,)])
    opt = fusedopt.Optimizer(
        [{"params": host}, {"params": device, "capturable": True}],
        [sgd_step, step_stat],
        lr=0.1,
        capturable=False,
    )
    give([*host, *device], [torch.ones(3, device=DEVICE)] * 2)
    opt.step()
    opt.step()
    assert opt.state[host[0]]["step"] == 2 and type(opt.state[host[0]]["step"]) is int
    assert isinstance(opt.state[device[0]]["step"], torch.Tensor)
    assert_equal(host, device)


@pytest.mark.cpu_only("the error is made, and any allocator's is as good")
def test_a_state_that_does_not_fit_in_memory_leaves_everything_as_it_was(monkeypatch):
    params, others = parameters(), parameters()
    traced = optim.AdamW(others, backend="cpp")  # so that callbacks, which make zeros too, need not run again
    give(others, gradients(1)[0])
    traced.step()
    opt = optim.AdamW(params, backend="cpp")
    give(params, gradients(1)[0])
    zeros_like, made = torch.zeros_like, []

    def failing(*args, **kwargs):
        made.append(args)
        if len(made) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return zeros_like(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros_like", failing)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"parameter 1 of group 0.*nothing was stepped.*state_dtype"
    ):
        opt.step()
    monkeypatch.undo()
    assert_equal(params, parameters())
    assert not any(opt.state.values())
    opt.step()
