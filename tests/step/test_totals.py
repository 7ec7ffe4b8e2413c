"""``fusedopt.total``: sums over all parameters of a step, in callbacks."""

import math
import random
import warnings
import weakref

import parameter_free
import pytest
import torch
from devices import COMPILED, DEVICE
from factories import assert_equal

import fusedopt
from fusedopt import rules
from fusedopt.extension import leaf
from fusedopt.step import totals

SHAPES = [(3, 5), (7,), (), (130,), (0,), (6, 2, 4)]
BACKENDS = [*COMPILED, "reference"]
RNG = random.Random(0)
seen = []

needs_extension = pytest.mark.skipif(leaf.native is None, reason="steps are bound by the extension")


def clip(p, max_norm=1.0, **kwargs):
    norm = fusedopt.total(p.grad**2).sqrt()
    p.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1))


def descend(p, lr, **kwargs):
    p.data.sub_(p.grad, alpha=lr)


def chained(p, lr, gain=None, **kwargs):
    """Its second total is made of the first."""
    size = fusedopt.total(p.data.abs())
    gain = fusedopt.total(p.data * p.grad / size)
    p.data.sub_(p.grad * gain * lr)
    return {"gain": gain}


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(DEVICE, dtype).requires_grad_() for s in shapes]


def twins(params):
    return [p.detach().to(torch.float64, copy=True).requires_grad_() for p in params]


def give(params, others, seed, without=()):
    generator = torch.Generator().manual_seed(seed)
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        p.grad = None if i in without else torch.randn(p.shape, generator=generator).to(DEVICE, p.dtype)
        q.grad = None if i in without else p.grad.to(torch.float64, copy=True)


def clipped(params, lr, limit=1.0):
    """A step of [clip, descend], by plain torch."""
    live = [(p, x) for p, x in zip(params, lr, strict=True) if p.grad is not None]
    norm = torch.sqrt(sum((p.grad**2).sum() for p, _ in live))
    with torch.no_grad():
        for p, x in live:
            p.sub_(p.grad * (limit / (norm + 1e-6)).clamp(max=1), alpha=x)


def gained(params, lr):
    """A step of [chained], by plain torch."""
    live = [(p, x) for p, x in zip(params, lr, strict=True) if p.grad is not None]
    with torch.no_grad():
        size = sum(p.abs().sum() for p, _ in live)
        gain = sum((p * p.grad / size).sum() for p, _ in live)
        for p, x in live:
            p.sub_(p.grad * gain * x)
    return gain


def assert_near(ours, plain, rounding=2e-6):
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("callbacks", "plain"), [([clip, descend], clipped), ([chained], gained)])
def test_totals_are_over_all_groups(callbacks, plain, dtype, backend):
    ours = parameters(dtype=dtype)
    theirs = twins(ours)
    groups = [{"params": ours[:2]}, {"params": ours[2:], "lr": 0.2}]
    opt = fusedopt.Optimizer(groups, callbacks, lr=0.1, backend=backend)
    for t in range(6):
        give(ours, theirs, t, without={2: (1,), 4: (0, 3)}.get(t, ()))
        opt.step()
        plain(theirs, [0.1] * 2 + [0.2] * 4)
        assert_near(ours, theirs, 2e-6 if dtype == torch.float32 else 1e-12)
    if backend != "reference":
        assert opt.explain().eager == ()
    if backend == "cpp" and leaf.native is not None:
        assert opt.engine.steps.repeated >= 4  # the state is new in the first


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_total_is_over_buckets_of_different_programs(backend):
    ours = [
        *parameters(),
        *parameters(dtype=torch.bfloat16, seed=1),
        *parameters(dtype=torch.float64, seed=2),
    ]
    theirs = twins(ours)
    opt = fusedopt.Optimizer(ours, [clip, descend], lr=0.1, max_norm=0.5, backend=backend)
    for t in range(3):
        give(ours, theirs, t)
        opt.step()
        clipped(theirs, [0.1] * len(ours), 0.5)
        assert_near(ours[: len(SHAPES)], theirs[: len(SHAPES)], 1e-3)
    if backend != "reference":
        kernels = {k for k, _ in opt.engine.launched}
        assert len(kernels) == 3 + 1 + 3  # a round of three launches, their join, three launches


@pytest.mark.parametrize("backend", COMPILED)
def test_five_hundred_tensors_in_three_launches(backend):
    ours = parameters([(64,)] * 500)
    theirs = twins(ours)
    opt = fusedopt.Optimizer(ours, [clip, descend], lr=0.1, backend=backend)
    for t in range(3):
        give(ours, theirs, t)
        opt.step()
        clipped(theirs, [0.1] * 500)
    assert_near(ours, theirs)
    assert [n for _, n in opt.engine.launched] == [500, 1, 500]
    if leaf.native is not None and backend == "cpp":
        assert opt.engine.steps.repeated == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_and_state_in_other_layouts(backend):
    ours = [
        torch.randn(2, 3, 4, 5).to(DEVICE).to(memory_format=torch.channels_last),
        torch.randn(6, 4).to(DEVICE),
    ]
    ours = [p.requires_grad_() for p in ours]
    theirs = twins(ours)
    opt = fusedopt.Optimizer(ours, [chained], lr=0.1, backend=backend)
    for t in range(4):
        give(ours, theirs, t)
        if t > 1:
            ours[1].grad = ours[1].grad.t().contiguous().t()
        opt.step()
        gained(theirs, [0.1] * 2)
        assert_near(ours, theirs)


@pytest.mark.parametrize("backend", COMPILED)
def test_what_one_total_gives_does_not_depend_on_threads(backend):
    def stepped(threads):
        torch.set_num_threads(threads)
        ours = parameters([(64,)] * 100 + [(40_000,), (3, 70_000)])
        opt = fusedopt.Optimizer(ours, [chained, clip, descend], lr=0.1, backend=backend)
        for t in range(3):
            give(ours, twins(ours), t)
            opt.step()
        return [*ours, *(opt.state[p]["gain"] for p in ours)]

    assert_equal(stepped(1), stepped(4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", parameter_free.ALL)
def test_learning_rates_found_by_totals(name, backend):
    make, plain = parameter_free.ALL[name]
    shapes = [(3, 5), (7,), (130,), (8, 16)]
    target = parameters(shapes, torch.float64, seed=1)
    ours = parameters(shapes, torch.float64)
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    opt, other = make(ours, backend=backend), plain(theirs)
    start = [p.detach().clone() for p in ours]
    for _ in range(40):
        for p, q, x in zip(ours, theirs, target, strict=True):
            p.grad, q.grad = (p - x).detach(), (q - x).detach()
        opt.step(), other.step()
    assert_near(ours, theirs, 1e-7)
    assert all((p - q).abs().max() > 1e-3 for p, q in zip(ours, start, strict=True)) or name == "dog"
    if backend == "cpp" and leaf.native is not None:
        assert opt.engine.steps.anew == 2
        assert [n for _, n in opt.engine.launched] == [4, {"dog": 3}.get(name, 2), 4]


def test_prodigy_is_the_packages():
    package = pytest.importorskip("pytorch_optimizer")
    shapes = [(3, 5), (7,), (130,)]
    target = parameters(shapes, torch.float64, seed=1)
    # In float32 its first steps of 1e-6 are rounded off, and what is left decides where it goes.
    ours = parameters(shapes, torch.float64)
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    opt = rules.Prodigy(ours, weight_decay=0.01)
    other = package.Prodigy(theirs, weight_decay=0.01)
    for _ in range(30):
        for p, q, x in zip(ours, theirs, target, strict=True):
            p.grad, q.grad = (p - x).detach(), (q - x).detach()
        opt.step(), other.step()
    assert opt.d.item() == pytest.approx(other.param_groups[0]["d"], rel=1e-5)
    assert_near(ours, theirs, 1e-4)


# ---------------------------------------------------------------- with other things that are known late


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_max_grad_norm_totals_are_of_clipped_gradients(backend):
    ours = parameters()
    theirs = twins(ours)
    opt = fusedopt.Optimizer(ours, [chained], lr=0.1, max_grad_norm=0.5, backend=backend)
    for t in range(4):
        give(ours, theirs, t, without=(0,) if t == 2 else ())
        opt.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        gained(theirs, [0.1] * len(ours))
        assert_near(ours, theirs)
        assert opt.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    if backend == "cpp" and leaf.native is not None:
        assert opt.engine.steps.repeated == 2  # the state is new in the first


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skipped_step_leaves_state_as_it_was(backend):
    ours = parameters()
    theirs = twins(ours)
    opt = fusedopt.Optimizer(ours, [chained], lr=0.1, amp_fused=True, backend=backend)
    for t in range(6):
        give(ours, theirs, t)
        found = t in (0, 3)
        before = [p.detach().clone() for p in ours]
        for p in ours:
            p.grad.mul_(1024)
        if found:
            ours[0].grad.view(-1)[0] = math.inf
        opt.grad_scale = torch.tensor(1024.0, device=DEVICE)
        opt.found_inf = torch.tensor(float(found), device=DEVICE)
        opt.step()
        if found:
            assert_equal(ours, before)
        else:
            gain = gained(theirs, [0.1] * len(ours))
            assert opt.state[ours[0]]["gain"].item() == pytest.approx(gain.item(), rel=1e-5)
            assert_near(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_branches_and_hyperparameters_of_groups(backend):
    def branching(p, lr, wanted=True, **kwargs):
        if wanted and p.grad.norm() > 2:
            p.grad.mul_(1 / fusedopt.total(p.grad.abs()))
        p.data.sub_(p.grad, alpha=lr)

    ours = parameters()
    theirs = twins(ours)
    groups = [{"params": ours[:4]}, {"params": ours[4:], "wanted": False}]
    opt = fusedopt.Optimizer(groups, [branching], lr=0.1, wanted=True, backend=backend)
    for t in range(3):
        give(ours, theirs, t)
        opt.step()
        large = [p for p in theirs[:4] if p.grad.norm() > 2]
        assert 0 < len(large) < 4
        total = sum(p.grad.abs().sum() for p in large)
        with torch.no_grad():
            for p in theirs:
                p.sub_(p.grad / total if any(p is q for q in large) else p.grad, alpha=0.1)
        assert_near(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_total_of_one_number_per_tensor_and_a_branch_on_a_total(backend):
    def halved(p, lr, **kwargs):
        largest = fusedopt.total(p.grad.abs().max())
        if largest > 7.2:
            lr = lr / 2
        p.data.sub_(p.grad, alpha=lr)

    ours = parameters(SHAPES[:4])
    theirs = twins(ours)
    opt = fusedopt.Optimizer(ours, [halved], lr=0.1, backend=backend)
    rates = set()
    for t in range(6):
        give(ours, theirs, t)
        opt.step()
        rate = 0.05 if sum(p.grad.abs().max() for p in theirs) > 7.2 else 0.1
        rates.add(rate)
        with torch.no_grad():
            for p in theirs:
                p.sub_(p.grad, alpha=rate)
        assert_near(ours, theirs)
    assert len(rates) == 2


def weighed(p, lr, **kwargs):
    p.data.sub_(p.grad * fusedopt.total(p.grad * lr))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rate_that_is_a_tensor_is_read_where_it_is_now(backend):
    """Only the round reads it."""
    ours = parameters()
    theirs = twins(ours)
    opt = fusedopt.Optimizer(ours, [weighed], lr=torch.tensor(0.1, device=DEVICE), backend=backend)
    for t in range(6):
        rate = 0.1 / (t + 1)
        if t % 2:
            opt.param_groups[0]["lr"] = torch.tensor(rate, device=DEVICE)
        else:
            opt.param_groups[0]["lr"].fill_(rate)
        give(ours, theirs, t)
        opt.step()
        total = sum((p.grad * rate).sum() for p in theirs)
        with torch.no_grad():
            for p in theirs:
                p.sub_(p.grad * total)
        assert_near(ours, theirs)
    if backend == "cpp" and leaf.native is not None:
        assert opt.engine.steps.repeated == 5


def test_a_schedule_changes_what_totals_are_made_of():
    ours = parameters()
    theirs = twins(ours)
    opt = fusedopt.Optimizer([{"params": ours[:3]}, {"params": ours[3:]}], [weighed], lr=0.1)
    for t in range(5):
        for group, lr in zip(opt.param_groups, rates := (0.1 / (t + 1), 0.01 * t), strict=True):
            group["lr"] = lr
        give(ours, theirs, t)
        opt.step()
        total = sum(
            (p.grad * lr).sum() for p, lr in zip(theirs, [rates[0]] * 3 + [rates[1]] * 3, strict=True)
        )
        with torch.no_grad():
            for p in theirs:
                p.sub_(p.grad * total)
        assert_near(ours, theirs)


def test_parameters_that_differ_in_numbers_have_scalars_of_their_own():
    def counting(p, lr, step=0, **kwargs):
        step += 1
        p.data.sub_(p.grad * fusedopt.total(p.grad / step) * lr)
        return {"step": step}

    ours = parameters(SHAPES[:4])
    theirs = twins(ours)
    opt = fusedopt.Optimizer(ours, [counting], lr=0.1)
    steps = [0] * 4
    for t in range(8):
        without = (t % 4,) if t in (1, 2, 5) else ()
        give(ours, theirs, t, without)
        opt.step()
        live = [i for i in range(4) if i not in without]
        for i in live:
            steps[i] += 1
        total = sum((theirs[i].grad / steps[i]).sum() for i in live)
        with torch.no_grad():
            for i in live:
                theirs[i].sub_(theirs[i].grad * total * 0.1)
        assert_near(ours, theirs)


# ---------------------------------------------------------------- callbacks that run eagerly


def sorting(p, **kwargs):
    p.grad.copy_(p.grad.msort() if p.dim() else p.grad)


@pytest.mark.filterwarnings("ignore:fusedopt")
@pytest.mark.parametrize(
    "callbacks", [[sorting, clip, descend], [clip, sorting, descend], [clip, descend, sorting]]
)
def test_among_callbacks_that_run_eagerly(callbacks):
    ours = parameters()
    theirs = twins(ours)
    opt = fusedopt.Optimizer(ours, callbacks, lr=0.1)
    for t in range(3):
        give(ours, theirs, t)
        opt.step()
        if callbacks[2] is not sorting:
            for p in theirs:
                sorting(p)
        clipped(theirs, [0.1] * len(ours))
        assert_near(ours, theirs)
    assert {e.callback for e in opt.explain().eager} == {"sorting", "clip"}


@pytest.mark.filterwarnings("ignore:fusedopt")
def test_where_only_some_parameters_fuse():
    def sorting_vectors(p, lr, sort, **kwargs):
        scale = fusedopt.total(p.grad**2).sqrt()
        if sort:
            p.grad.copy_(p.grad.msort())
        p.data.sub_(p.grad / scale, alpha=lr)

    ours = parameters([(5,), (6,), (7,)])
    theirs = twins(ours)
    groups = [{"params": ours[:1], "sort": False}, {"params": ours[1:], "sort": True}]
    opt = fusedopt.Optimizer(groups, [sorting_vectors], lr=0.1, sort=False)
    for t in range(3):
        give(ours, theirs, t)
        opt.step()
        scale = torch.sqrt(sum((p.grad**2).sum() for p in theirs))
        with torch.no_grad():
            for k, p in enumerate(theirs):
                p.sub_((p.grad.msort() if k else p.grad) / scale, alpha=0.1)
        assert_near(ours, theirs)


@pytest.mark.filterwarnings("ignore:fusedopt")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_total_may_be_read_on_the_host(backend):
    def reading(p, lr, **kwargs):
        try:
            norm = math.sqrt(fusedopt.total(p.grad**2).item())
        except Exception:
            norm = 1.0
        if norm > 1:
            p.grad.div_(norm)
        again = fusedopt.total(p.grad**2).item()
        p.data.sub_(p.grad, alpha=lr * again)

    ours = parameters()
    theirs = twins(ours)
    opt = fusedopt.Optimizer(ours, [reading], lr=0.1, backend=backend)
    for t in range(3):
        give(ours, theirs, t)
        opt.step()
        norm = math.sqrt(sum((p.grad**2).sum() for p in theirs))
        assert norm > 1
        with torch.no_grad():
            for p in theirs:
                p.sub_(p.grad / norm, alpha=0.1)
        assert_near(ours, theirs)


@pytest.mark.filterwarnings("ignore:fusedopt")
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_run_on_copies_leaves_nothing(backend):
    calls = {"count": 0}

    def counted(p, lr, seen=None, **kwargs):
        calls["count"] += 1
        before = p.data.clone()
        p.data.add_(1.0)
        p.data.sub_(fusedopt.total(p.grad.msort()) * lr)
        return {"moved": (p.data - before).mean()}

    ours = parameters(SHAPES[:2])
    theirs = twins(ours)
    opt = fusedopt.Optimizer(ours, [counted], lr=0.1, backend=backend)
    for t in range(2):
        give(ours, theirs, t)
        opt.step()
        total = sum(p.grad.sum() for p in theirs)
        for p in theirs:
            p.data.add_(1.0).sub_(total * 0.1)
        assert_near(ours, theirs)
        assert calls["count"] == 2 * (
            t + 1
        )  # once for each parameter: what it counted on copies is taken back


@pytest.mark.filterwarnings("ignore:fusedopt")
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_that_does_more_than_change_its_arguments_is_refused(backend):
    def noisy(p, lr, **kwargs):
        p.grad.add_(torch.randn_like(p.grad))
        p.data.sub_(p.grad * fusedopt.total(p.grad), alpha=lr)

    ours = parameters()
    before = [p.detach().clone() for p in ours]
    opt = fusedopt.Optimizer(ours, [noisy], lr=0.1, backend=backend)
    give(ours, twins(ours), 0)
    with pytest.raises(RuntimeError, match=r"noisy calls fusedopt\.total.*randn_like.*Remedy"):
        opt.step()
    assert_equal(ours, before)


@pytest.mark.filterwarnings("ignore:fusedopt")
def test_one_whose_code_does_not_show_it_is_refused():
    def hidden(p, lr, **kwargs):
        from fusedopt import total

        p.data.sub_(p.grad * total(p.grad), alpha=lr)

    ours = parameters()
    before = [p.detach().clone() for p in ours]
    opt = fusedopt.Optimizer(ours, [hidden], lr=0.1)
    give(ours, twins(ours), 0)
    with pytest.raises(RuntimeError, match="its code does not show it"):
        opt.step()
    assert_equal(ours, before)
    assert fusedopt.total(torch.ones(3)) == 3  # nobody collects any more


@pytest.mark.filterwarnings("ignore:fusedopt")
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_leaves_everything_as_it_was(backend):
    def failing(p, lr, **kwargs):
        scale = fusedopt.total(p.grad**2)
        p.data.sub_(p.grad.msort() / scale, alpha=lr)
        if p.numel() == 7:
            raise ValueError("seven")

    ours = parameters(SHAPES[:2])
    before = [p.detach().clone() for p in ours]
    opt = fusedopt.Optimizer(ours, [failing], lr=0.1, backend=backend)
    give(ours, twins(ours), 0)
    with pytest.raises(ValueError, match="seven"):
        opt.step()
    assert_equal(ours, before)
    assert all(p.grad is not None for p in ours) and fusedopt.total(torch.ones(3)) == 3


# ---------------------------------------------------------------- what is said, and what is refused


def test_outside_of_steps_it_is_the_sum():
    x = torch.full((3, 4), 0.1)
    assert fusedopt.total(x).dtype == torch.float64
    assert fusedopt.total(x).item() == pytest.approx(1.2)
    assert fusedopt.total(torch.tensor(2.0)).item() == 2


@pytest.mark.filterwarnings("ignore:fusedopt")
@pytest.mark.parametrize("backend", BACKENDS)
def test_of_a_number_there_is_none(backend):
    def counting(p, lr, **kwargs):
        p.data.sub_(p.grad, alpha=lr / fusedopt.total(lr))

    ours = parameters()
    give(ours, twins(ours), 0)
    with pytest.raises(TypeError, match=r"fusedopt\.total sums tensors"):
        fusedopt.Optimizer(ours, [counting], lr=0.1, backend=backend).step()


def test_a_parameter_that_is_listed_twice():
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = fusedopt.Optimizer([p, p], [clip, descend], lr=0.1)
    with pytest.raises(RuntimeError, match=r"listed twice, and fusedopt\.total"):
        opt.step()


@pytest.mark.parametrize("backend", COMPILED)
def test_explain_shows_the_rounds(backend):
    ours = parameters(SHAPES[:2])
    opt = fusedopt.Optimizer(ours, [chained], lr=0.1, backend=backend)
    assert opt.explain().bytes_per_element == 4 + 8 + 12
    give(ours, twins(ours), 0)
    opt.step()
    report = opt.explain()
    kernels = [stage.kernel for stage in report.stages]
    assert list(dict.fromkeys(kernels)) == ["chained round 1 #1", "total", "chained round 2 #2", "chained #3"]
    assert report.bytes_per_element == 4 + 8 + 12
    assert "total_0_0" in opt.kernel_source()
    assert [stage.round for stage in report.stages] == [1, 1, None, None, 2, 2, None, None, 0, 0]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["", "clipped"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_has_been_summed_is_not_kept_alive(options, backend):
    ours = parameters()
    opt = fusedopt.Optimizer(ours, [clip, descend], lr=0.1, backend=backend, **options)
    for t in range(3):
        give(ours, twins(ours), t)
        grads = [weakref.ref(p.grad) for p in ours]
        opt.step()
        for p in ours:
            p.grad = None
        assert not any(grad() is not None for grad in grads)


@needs_extension
@pytest.mark.cpu_only("launches of rounds on GPUs are Python's")
def test_steps_with_totals_are_repeated_without_python():
    ours = parameters([(64,)] * 20)
    opt = fusedopt.Optimizer(ours, [clip, descend], lr=0.1)
    for t in range(5):
        give(ours, twins(ours), t)
        opt.step()
    assert opt.engine.steps.repeated == 4
    assert not opt.engine.bound[0]._measured


@pytest.mark.parametrize("backend", COMPILED)
def test_captured_numbers_can_be_sent_anew(backend):
    """What a CUDA graph would replay reads scalars that upload_hypers sends, in rounds too."""

    def weighed(p, lr, step=0, **kwargs):
        step += 1
        p.data.sub_(p.grad * fusedopt.total(p.grad * lr) / step)
        return {"step": step}

    ours = parameters()
    theirs = twins(ours)
    opt = fusedopt.Optimizer(ours, [weighed], lr=0.1, capturable=True, backend=backend)
    for t in range(4):
        give(ours, theirs, t)
        opt.step()
        total = sum((p.grad * 0.1).sum() for p in theirs)
        with torch.no_grad():
            for p in theirs:
                p.sub_(p.grad * total / (t + 1))
        assert_near(ours, theirs)
    opt.param_groups[0]["lr"] = 0.5
    opt.upload_hypers()
    launches = [launch for found, _ in opt.engine.resident.launches for launch in found]
    assert len(launches) == 2


@pytest.mark.cpu_only("what is another device here is the CPU by another name")
def test_sums_of_another_device_are_brought_to_the_first(monkeypatch):
    """What is another device here is the same by another name. Python runs the rounds then, of bound steps too."""
    other = torch.device("cpu", 1)

    def device(group):
        return other if group[0].trace.signature.param == torch.float64 else torch.device("cpu")

    monkeypatch.setattr(totals, "_device", device)
    ours = [*parameters(SHAPES[:4]), *parameters(SHAPES[:4], torch.float64, seed=1)]
    theirs = twins(ours)
    opt = fusedopt.Optimizer(ours, [chained], lr=0.1)
    for t in range(5):
        give(ours, theirs, t)
        opt.step()
        gained(theirs, [0.1] * len(ours))
        assert_near(ours, theirs)
    assert all(each.native() is None for each in opt.engine.rounds)
    assert {device for each in opt.engine.rounds for device in each.devices} == {other, torch.device("cpu")}
    if leaf.native is not None:
        assert opt.engine.steps.repeated == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_totals_of_what_is_reduced_along_dimensions(backend):
    """Rounds with rows and columns: the programs before the cut and after it share their axes."""

    def by_rows(p, lr, row=None, **kwargs):
        if p.ndim > 1:
            means = p.grad.mean(dim=1, keepdim=True)
            largest = fusedopt.total((p.grad - means).abs().amax(dim=0))
            row = (0.0 if row is None else row) + means / largest
            size = fusedopt.total(row**2)
            p.data.sub_(p.grad * row * lr / size.sqrt())
            return {"row": row}
        largest = fusedopt.total(p.grad.abs())
        size = fusedopt.total(p.grad**2 / largest)
        p.data.sub_(p.grad / size, alpha=lr)

    shapes = [(3, 5), (7,), (6, 4), (130,), (5, 5)]
    ours = parameters(shapes)
    theirs, rows = twins(ours), [0.0] * len(shapes)
    opt = fusedopt.Optimizer(ours, [by_rows], lr=0.1, backend=backend)
    for t in range(4):
        give(ours, theirs, t)
        opt.step()
        means = [p.grad.mean(dim=1, keepdim=True) if p.ndim > 1 else None for p in theirs]
        largest = sum(
            p.grad.abs().sum() if m is None else (p.grad - m).abs().amax(dim=0).sum()
            for p, m in zip(theirs, means, strict=True)
        )
        rows = [None if m is None else r + m / largest for r, m in zip(rows, means, strict=True)]
        size = sum(
            (p.grad**2 / largest).sum() if r is None else (r**2).sum()
            for p, r in zip(theirs, rows, strict=True)
        )
        with torch.no_grad():
            for p, r in zip(theirs, rows, strict=True):
                p.sub_(p.grad / size if r is None else p.grad * r / size.sqrt(), alpha=0.1)
        rows = [0.0 if r is None else r for r in rows]
        assert_near(ours, theirs, 1e-4)
    if backend == "cpp":
        assert opt.explain().eager == ()


def test_totals_keep_their_order_where_structures_differ():
    """What one bucket makes of a total, another makes of none: the rounds still wait for one another."""

    def uneven(p, lr, chain=True, **kwargs):
        first = fusedopt.total(p.grad.abs())
        second = fusedopt.total(p.grad / first if chain else p.grad)
        p.data.sub_(p.grad * second, alpha=lr)

    ours = parameters(SHAPES[:4])
    theirs = twins(ours)
    groups = [{"params": ours[:2]}, {"params": ours[2:], "chain": False}]
    opt = fusedopt.Optimizer(groups, [uneven], lr=0.1, chain=True)
    for t in range(3):
        give(ours, theirs, t)
        opt.step()
        first = sum(p.grad.abs().sum() for p in theirs)
        second = sum((p.grad / first if k < 2 else p.grad).sum() for k, p in enumerate(theirs))
        with torch.no_grad():
            for p in theirs:
                p.sub_(p.grad * second, alpha=0.1)
        assert_near(ours, theirs)


def test_totals_that_wait_for_one_another_are_refused():
    def tangled(p, lr, chain=True, **kwargs):
        total, one = fusedopt.total, (p.grad * 0 + 1).mean()
        first = total(one)
        second = total(one if chain else one / first)
        third = total(one / second if chain else one)
        fourth = total(one / third if chain else one)
        fifth = total(one if chain else one / fourth)
        p.data.sub_(p.grad, alpha=lr * fifth)

    ours = parameters(SHAPES[:2])
    before = [p.detach().clone() for p in ours]
    groups = [{"params": ours[:1]}, {"params": ours[1:], "chain": False}]
    opt = fusedopt.Optimizer(groups, [tangled], lr=0.1, chain=True)
    give(ours, twins(ours), 0)
    with pytest.raises(RuntimeError, match=r"of one another, in no order that would do.*Remedy"):
        opt.step()
    assert_equal(ours, before)
