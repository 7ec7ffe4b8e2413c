"""Fused classes under a real GradScaler: with ``amp_fused`` kernels unscale, and skipped steps change nothing."""

import copy
import pickle
import warnings
from functools import partial

import benchmarks.torchvision_ops  # noqa: F401  accelerate imports torchvision if it is there

# isort: split
import accelerate
import pytest
import pytorch_optimizer
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from factories import assert_equal, flat, give_gradients, parameters, params_of
from helpers import needs_extension
from test_fuse import Base, leaves, rule
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

import fusedopt

pytestmark = [
    needs_extension,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fusedopt. .* runs as it was written"),
]
SCALE = 2.0**10
FIRST, MIDDLE = (0,), (0, 4, 5)
CLASSES = [
    *(
        pytest.param(partial(getattr(torch.optim, name), **more), id=f"torch.{name}")
        for name, more in (
            ("SGD", dict(lr=0.01, momentum=0.9)),
            ("Adam", dict(weight_decay=0.1)),
            ("AdamW", dict(foreach=True)),
            ("NAdam", {}),
            ("RAdam", dict(lr=0.01)),
            ("Adagrad", {}),
            ("Rprop", {}),
            ("Adafactor", {}),
        )
    ),
    *(
        pytest.param(getattr(pytorch_optimizer, name), id=f"po.{name}")
        for name in ("Lion", "AdaBelief", "Adan", "StableAdamW", "Lamb", "Amos", "Prodigy", "SOAP")
    ),
]
WRITING, UNFUSED = pytorch_optimizer.ScheduleFreeAdamW, pytorch_optimizer.Kron


def train(make, steps=9, over=MIDDLE, clip=None, scale=SCALE, **options):
    """An optimizer after steps under a GradScaler; ``over``: those in which a gradient is infinite.

    With options it is fused by them. ``clip``: to this norm, between ``unscale_`` and ``step``.
    """
    torch.manual_seed(0)
    opt = make(parameters())
    if hasattr(opt, "train"):
        opt.train()
    if options:
        fusedopt.fuse(opt, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    for t in range(steps):
        scaler.scale(torch.zeros(()))
        give_gradients(params_of(opt), t, scale=scaler.get_scale())
        if t in over:
            params_of(opt)[1].grad[0, 0] = float("inf")
        before = copy.deepcopy(leaves(opt, params_of(opt)))
        if clip is not None:
            scaler.unscale_(opt)
            clip_grad_norm_(params_of(opt), clip)
        scaler.step(opt)
        scaler.update()
        assert {"grad_scale", "found_inf"}.isdisjoint(vars(opt))
        if t in over and options.get("amp_fused"):
            assert same(before, leaves(opt, params_of(opt))), "a skipped step changes nothing"
    return opt, scaler


def same(a, b, close=0.0):
    """The same numbers, to the last bit, or as far apart as this, relative to the largest of a tensor."""
    if isinstance(a, torch.Tensor):
        far = (a - b).abs().max() if a.shape == b.shape else torch.inf
        return a.dtype == b.dtype and bool(torch.equal(a, b) or far <= close * b.abs().max())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], close) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b, [close] * len(a)))
    if isinstance(a, float):
        return a == pytest.approx(b, rel=close)
    return type(a) is type(b) and a == b


def near(a, b):
    return same(a, b, 2e-5)


def left(opt):
    """All that is kept."""
    *kept, own = leaves(opt, params_of(opt))
    return *kept, {k: v for k, v in own.items() if k != "_step_supports_amp_scaling"}


def is_fused(opt):
    return not opt.explain().eager and opt.explain().launches > 0


@pytest.mark.parametrize("over", [(), FIRST, MIDDLE], ids=["", "the first", "some"])
@pytest.mark.parametrize("make", CLASSES)
def test_a_class_is_stepped_as_without_it(make, over):
    """As the class itself, to rounding; as its kernels of unscaled gradients, to the bit: the scale is a power of 2."""
    ours, scaler = train(make, over=over, amp_fused=True, check=3)
    plain, theirs = train(make, over=over, check=1)
    own, _ = train(make, over=over)
    assert scaler.get_scale() == theirs.get_scale() != SCALE
    assert is_fused(ours) and is_fused(plain)
    assert "scaling" in ours.kernel_source() and "scaling" not in plain.kernel_source()
    assert same(left(ours), left(plain))
    assert near(left(ours), left(own))


@pytest.mark.parametrize("make", [WRITING, UNFUSED])
def test_a_step_that_has_no_fused_form_gets_unscaled_gradients(make):
    ours, _ = train(make, amp_fused=True)
    own, _ = train(make)
    assert not is_fused(ours)
    assert same(params_of(ours), params_of(own))


def test_what_writes_to_gradients_is_named():
    ours, _ = train(WRITING, amp_fused=True)
    (eager,) = ours.explain().eager
    assert "the step writes to gradients, and max_grad_norm or amp_fused scales them" in eager.reason


def test_another_scale_than_a_power_of_two_agrees_to_rounding():
    ours, _ = train(torch.optim.AdamW, scale=1000.7, amp_fused=True)
    own, _ = train(torch.optim.AdamW, scale=1000.7)
    assert is_fused(ours) and near(left(ours), left(own))


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (make, check)
        for make in (*(param.values[0] for param in (CLASSES[2], CLASSES[8], CLASSES[-1])), WRITING, UNFUSED)
        for check in (1, 2)
    ],
)
def test_the_norm_that_clips_is_of_unscaled_gradients(make, check):
    """In every step; the first is the class's own, and so is the one after a class has given up."""
    ours, _ = train(make, amp_fused=True, max_grad_norm=0.5, check=check)
    own, _ = train(make, clip=0.5)
    assert is_fused(ours) == (make not in (WRITING, UNFUSED))
    assert near(params_of(ours), params_of(own))


def test_gradients_stay_as_they_are_where_kernels_step():
    opt, scaler = train(torch.optim.AdamW, over=(), amp_fused=True)
    scaler.scale(torch.zeros(()))
    give_gradients(params_of(opt), 0, scale=scaler.get_scale())
    grads = [p.grad.clone() for p in params_of(opt)]
    scaler.step(opt)
    assert is_fused(opt)
    assert_equal([p.grad for p in params_of(opt)], grads)


def test_gradients_that_were_unscaled_before_are_not_again():
    ours, _ = train(torch.optim.AdamW, clip=0.5, amp_fused=True)
    own, _ = train(torch.optim.AdamW, clip=0.5)
    assert is_fused(ours) and near(left(ours), left(own))


@pytest.mark.parametrize("fused", [False, True])
def test_sampled_steps_are_compared_with_what_is_clipped(fused):
    """A comparison with the class's step of gradients as they are would find another step, and give up."""
    options = dict(amp_fused=True) if fused else {}
    opt = fusedopt.fuse(torch.optim.AdamW(parameters()), max_grad_norm=0.1, check=2, **options)
    for t in range(6):
        give_gradients(params_of(opt), t)
        opt.step()
    assert is_fused(opt)


def test_squares_of_scaled_gradients_that_overflow_are_no_reason_to_give_up():
    """A trace is compared with the class on unscaled gradients."""
    options = dict(scale=2.0**70, over=())
    ours, _ = train(torch.optim.AdamW, amp_fused=True, **options)
    own, _ = train(torch.optim.AdamW, **options)
    assert is_fused(ours) and near(left(ours), left(own))


@pytest.mark.parametrize("enabled", [False, None])
def test_steps_without_a_scaler_are_of_gradients_as_they_are(enabled):
    """Before and after some with one."""
    pair = [torch.optim.Adam(parameters()) for _ in range(2)]
    fusedopt.fuse(pair[0], amp_fused=True)
    for opt in pair:
        for t in range(9):
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=t % 3 == 2)
            scaler.scale(torch.zeros(()))
            give_gradients(params_of(opt), t, scale=scaler.get_scale())
            scaler.step(opt) if scaler.is_enabled() or enabled is False else opt.step()
    assert is_fused(pair[0]) and near(*map(left, pair))


class Counting(Base):
    """Counts its steps in itself, its groups and its state."""

    def one(self, p, g, s):
        s["step"] = s.get("step", 0) + 1
        p.add_(p.grad, alpha=-g["lr"] / (self.calls + g["step"] + s["step"]))


def test_skipped_steps_are_counted_nowhere():
    ours, _ = train(Counting, over=MIDDLE, amp_fused=True)
    counts = ours.calls, ours.param_groups[0]["step"], ours.state[params_of(ours)[0]]["step"]
    assert counts == (6, 6, 6) and is_fused(ours)


def test_a_model_that_accumulates_gradients_under_schedules():
    """Of three passes each, one step overflows, and nobody steps the schedule then."""
    found = []
    for options in (dict(amp_fused=True), dict(amp_fused=True, max_grad_norm=0.3), {}, dict(clip=0.3)):
        clip = options.pop("clip", None)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        opt = pytorch_optimizer.Lion(model.parameters(), lr=0.01, weight_decay=0.1)
        if options:
            fusedopt.fuse(opt, **options)
        schedule = LambdaLR(opt, lambda t: 1 / (1 + t))
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=3)
        for t in range(10):
            for _ in range(3):
                loss = model(torch.randn(8, 4)).square().mean() * (float("inf") if t == 4 else 1.0)
                scaler.scale(loss / 3).backward()
            if clip:
                scaler.unscale_(opt)
                clip_grad_norm_(model.parameters(), clip)
            before = scaler.get_scale()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            if scaler.get_scale() >= before:
                schedule.step()
        assert schedule.last_epoch == 9
        found.append((flat(model.parameters()), opt))
    (ours, opt), (clipped, other), (plain, _), (by_torch, _) = found
    assert is_fused(opt) and is_fused(other)
    assert torch.allclose(ours, plain, atol=1e-6) and torch.allclose(clipped, by_torch, atol=1e-6)
    assert not torch.equal(ours, clipped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    found = []
    for fused in (True, False):
        opt = torch.optim.Adam(parameters(dtype=dtype), lr=0.01)
        if fused:
            fusedopt.fuse(opt, amp_fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        for t in range(6):
            scaler.scale(torch.zeros(()))
            give_gradients(params_of(opt), t, scale=SCALE)
            scaler.step(opt)
            scaler.update()
        found.append(opt)
    assert is_fused(found[0])
    close = dict(rtol=1e-12) if dtype == torch.float64 else dict(rtol=0.01, atol=0.01)
    for a, b in zip(*map(params_of, found), strict=True):
        assert torch.allclose(a, b, **close)


def test_a_sparse_gradient_is_unscaled():
    found = []
    for options in (dict(amp_fused=True), {}):
        torch.manual_seed(0)
        table = nn.Embedding(6, 3, sparse=True)
        opt = torch.optim.SGD(table.parameters(), lr=0.1)
        if options:
            fusedopt.fuse(opt, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        for t in range(6):
            scaler.scale(table(torch.tensor([t % 3, 4, 4])).square().sum()).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        found.append(table.weight)
    assert torch.equal(*found)


# ---------------------------------------------------------------- classes that are handed the scale themselves


@pytest.mark.parametrize(
    "options",
    [dict(check=1), dict(amp_fused=True), dict(max_grad_norm=0.5), dict(amp_fused=True, max_grad_norm=0.5)],
    ids=str,
)
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_what_a_class_of_torch_reads_itself_is_done_once(name, options):
    """torch's ``fused=True`` takes grad_scale and found_inf: it unscales, and skips. Clipping comes after that."""
    make = partial(getattr(torch.optim, name), lr=0.01, fused=True)
    clip = options.get("max_grad_norm")
    ours, _ = train(make, **options)
    theirs, _ = train(make, clip=clip)
    assert near(left(ours), left(theirs))
    assert fusedopt.unfuse(ours)._step_supports_amp_scaling is True
    own, _ = train(partial(getattr(torch.optim, name), lr=0.01), clip=clip)
    assert near(params_of(ours), params_of(own))


class Reading(Base):
    """Unscales by itself, as a class may that GradScaler hands over to."""

    _step_supports_amp_scaling = True

    def one(self, p, g, s):
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found is None or float(found) == 0:
            p.add_(p.grad / (1.0 if scale is None else float(scale)), alpha=-g["lr"])


@pytest.mark.parametrize("options", [dict(check=1), dict(amp_fused=True), dict(max_grad_norm=0.5)], ids=str)
def test_what_a_class_reads_itself_is_done_once(options):
    ours, _ = train(Reading, over=(), **options)
    theirs, _ = train(
        rule(lambda self, p, g, s: p.add_(p.grad, alpha=-g["lr"]), "Plain"),
        over=(),
        clip=options.get("max_grad_norm"),
    )
    assert is_fused(ours)
    assert near(params_of(ours), params_of(theirs))


# ---------------------------------------------------------------- around it


def test_it_is_asked_for_and_undone():
    opt = torch.optim.AdamW(parameters())
    assert not getattr(fusedopt.fuse(opt), "_step_supports_amp_scaling", False)
    fusedopt.unfuse(opt)
    before = set(vars(opt))
    assert fusedopt.fuse(opt, amp_fused=True)._step_supports_amp_scaling
    assert set(vars(fusedopt.unfuse(opt))) == before


def test_a_class_or_function_that_makes_them():
    for make in (torch.optim.AdamW, lambda params: torch.optim.AdamW(params)):
        ours, _ = train(fusedopt.fuse(make, amp_fused=True))
        own, _ = train(torch.optim.AdamW)
        assert ours._step_supports_amp_scaling and is_fused(ours)
        assert near(left(ours), left(own))


class Whole(torch.optim.AdamW):
    """Puts all that it has into copies."""

    def __getstate__(self):
        return vars(self).copy()


@pytest.mark.parametrize(
    ("cls", "copied"),
    [
        (torch.optim.AdamW, copy.deepcopy),
        (torch.optim.AdamW, lambda opt: pickle.loads(pickle.dumps(opt))),
        (Whole, copy.deepcopy),
    ],
    ids=["copied", "pickled", "copied whole"],
)
def test_a_copy_is_unscaled_once(cls, copied):
    opt, _ = train(cls, over=(), amp_fused=True)
    other, twin = copied(opt), fusedopt.unfuse(opt)
    for each in (other, twin):
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        for t in range(4):
            scaler.scale(torch.zeros(()))
            give_gradients(params_of(each), t, scale=SCALE)
            scaler.step(each)
            scaler.update()
    assert near(params_of(other), params_of(twin))


def test_hooks_are_called_around_a_skipped_step_too():
    """As torch's own fused optimizers do."""
    opt = fusedopt.fuse(torch.optim.AdamW(parameters()), amp_fused=True)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for over in (False, True, False):
        scaler.scale(torch.zeros(()))
        give_gradients(params_of(opt), 0, scale=float("inf") if over else 4.0)
        scaler.step(opt)
        scaler.update()
    assert calls == ["before", "after"] * 3


def test_a_closure_with_a_scaler_is_refused():
    opt = fusedopt.fuse(torch.optim.AdamW(parameters()), amp_fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    give_gradients(params_of(opt))
    with pytest.raises(RuntimeError, match="GradScaler has looked at the gradients before the step"):
        scaler.step(opt, lambda: torch.zeros(()))
    opt = fusedopt.fuse(torch.optim.AdamW(parameters()), amp_fused=True)
    give_gradients(params_of(opt))
    assert opt.step(lambda: 7.0) == 7.0


def test_a_step_under_a_scaler_cannot_be_captured(monkeypatch):
    opt, scaler = train(torch.optim.AdamW, over=(), amp_fused=True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = flat(params_of(opt))
    with pytest.raises(RuntimeError, match="captured into a CUDA graph, and whether it is skipped"):
        scaler.step(opt)
    assert torch.equal(before, flat(params_of(opt)))


@pytest.fixture
def accelerator(monkeypatch):
    singletons = AcceleratorState, PartialState, GradientState
    for state in singletons:
        state._reset_state()
    yield accelerate.Accelerator(cpu=True)
    for state in singletons:
        state._reset_state()


def test_accelerate_still_knows_a_skipped_step(accelerator):
    """By its not being called, so GradScaler unscales there, and skips."""
    opt = fusedopt.fuse(torch.optim.AdamW(parameters()), amp_fused=True)
    prepared = accelerate.optimizer.AcceleratedOptimizer(
        opt, scaler=torch.amp.GradScaler("cpu", init_scale=4.0)
    )
    twin = torch.optim.AdamW(parameters())
    for t in range(6):
        prepared.scaler.scale(torch.zeros(()))
        give_gradients(params_of(opt), t, scale=prepared.scaler.get_scale())
        give_gradients(params_of(twin), t)
        if t in MIDDLE:
            params_of(opt)[0].grad[0] = float("inf")
        else:
            twin.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepared.step()
        assert prepared.step_was_skipped == (t in MIDDLE)
    assert near(params_of(opt), params_of(twin)) and opt._step_supports_amp_scaling
