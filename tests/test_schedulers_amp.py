"""torch's learning-rate schedulers, gradient scaler and weight averaging drive our optimizers as they drive torch's.

Both sides run side by side on the same gradients: hyperparameters must be equal, parameters equal to rounding.
"""

import copy
import inspect
import math
from functools import partial

import pytest
import torch
from factories import flat, give_gradients, parameters
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim import swa_utils

import fusedopt
from fusedopt import table

TORCH = {r.name: r for r in table.rows("torch")}
KWARGS = {
    "SGD": dict(momentum=0.9, weight_decay=0.01),
    "RMSprop": dict(momentum=0.9, eps=1e-3),
    "Adadelta": dict(eps=1e-3),
    "Adagrad": dict(lr_decay=0.01),
}
"""Arguments that make a peer more than its defaults do; denominators that do not amplify rounding."""
STEPS = 12
LOSSES = [3.0, 2.0, 2.5, 2.6, 2.7, 1.0, 1.1, 1.2, 1.3, 0.5, 0.6, 0.7]


def groups_of(params, lr=0.02):
    return [dict(params=params[:1]), dict(params=params[1:], lr=lr)]


def numbers(opt):
    """All groups without their parameters; tensors as numbers."""
    return [
        {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in g.items() if k != "params"}
        for g in opt.param_groups
    ]


class Twins:
    """One of torch's optimizers and ours by the same name, each with parameters of its own."""

    def __init__(self, name, dtype=torch.float32, **kwargs):
        kwargs = {"lr": 0.01, **KWARGS.get(name, {}), **kwargs}
        self.ours, self.theirs = parameters(dtype=dtype), parameters(dtype=dtype)
        # each its own tensor, where there is one
        self.a = TORCH[name].factory(groups_of(self.ours), **copy.deepcopy(kwargs))
        self.b = getattr(torch.optim, name)(groups_of(self.theirs), foreach=False, **copy.deepcopy(kwargs))

    def __iter__(self):
        return iter(((self.a, self.ours), (self.b, self.theirs)))

    def check(self):
        ours, theirs = numbers(self.a), numbers(self.b)
        for a, b in zip(ours, theirs, strict=True):
            b["foreach"] = None  # which only the peer was told
            assert a == b
        torch.testing.assert_close(flat(self.ours), flat(self.theirs), rtol=1e-5, atol=2e-6)


# --
# Every scheduler


def one_cycle(opt, **kwargs):
    return lrs.OneCycleLR(opt, [0.03, 0.05], total_steps=STEPS + 1, **kwargs)


def sequential(opt):
    return lrs.SequentialLR(opt, [lrs.LinearLR(opt, 0.1, 1.0, 4), lrs.ExponentialLR(opt, 0.8)], [4])


def chained(opt):
    return lrs.ChainedScheduler([lrs.ConstantLR(opt, 0.1, 3), lrs.ExponentialLR(opt, 0.9)], opt)


SCHEDULERS = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, [lambda t: 1 / (t + 1), lambda t: 0.9**t]),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda t: 0.8),
    "StepLR": lambda o: lrs.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 5, 9], 0.3),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.2, 4),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.1, 1.0, 6),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.7),
    "SequentialLR": sequential,
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 5, 1e-4),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0, factor=0.5, cooldown=1),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.001, 0.05, step_size_up=3, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR": partial(one_cycle, cycle_momentum=False),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=6),
}
CYCLES = {  # these move momentum, too
    "OneCycleLR-cos": one_cycle,
    "OneCycleLR-linear-three-phases": partial(one_cycle, anneal_strategy="linear", three_phase=True),
    "CyclicLR-triangular2": lambda o: lrs.CyclicLR(o, 0.001, 0.05, step_size_up=3, mode="triangular2"),
    "CyclicLR-exp_range": lambda o: lrs.CyclicLR(o, 0.001, 0.05, step_size_up=2, mode="exp_range", gamma=0.9),
}


def test_every_scheduler_of_torch_is_tried():
    """A scheduler that a new torch brings is noticed here."""
    found = {
        name
        for module in (lrs, swa_utils)
        for name, c in vars(module).items()
        if inspect.isclass(c) and issubclass(c, lrs.LRScheduler) and not name.startswith("_")
    }
    assert found - {"LRScheduler"} == set(SCHEDULERS)


def run_schedule(name, make, dtype=torch.float32, steps=STEPS, **kwargs):
    """Both under the same schedule, compared at every step. Returns the first group's numbers of each step."""
    twins, seen = Twins(name, dtype, **kwargs), []
    schedulers = [make(opt) for opt, _ in twins]
    twins.check()
    for t in range(steps):
        for (opt, params), scheduler in zip(twins, schedulers, strict=True):
            give_gradients(params, t)
            opt.step()
            by_loss = isinstance(scheduler, lrs.ReduceLROnPlateau)
            scheduler.step(*([LOSSES[t]] if by_loss else []))
        twins.check()
        assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
        seen.append(numbers(twins.a)[0])
    return twins, seen


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_scheduler_drives_it_step_by_step_as_it_drives_torchs(name, scheduler):
    twins, seen = run_schedule(name, SCHEDULERS[scheduler])
    assert len({g["lr"] for g in seen}) > 1, "the schedule moves"
    assert len(twins.a.explain().compiled) == 1, "and compiles nothing"


@pytest.mark.parametrize("name", [n for n in TORCH if n not in ("AdamW", "SGD")])
def test_every_optimizer_follows_a_schedule(name):
    _, seen = run_schedule(name, SCHEDULERS["CosineAnnealingLR"])
    assert len({g["lr"] for g in seen}) > 4


@pytest.mark.parametrize("cycle", CYCLES)
@pytest.mark.parametrize("name", TORCH)
def test_momentum_is_cycled_as_torchs_is(name, cycle):
    """Where torch refuses to cycle momentum, for want of one, so does the scheduler on ours."""
    if name in ("Adagrad", "Adadelta"):
        for opt, _ in Twins(name):
            with pytest.raises(ValueError, match="momentum"):
                CYCLES[cycle](opt)
        return
    _, seen = run_schedule(name, CYCLES[cycle])
    assert len({g["betas"][0] if "betas" in g else g["momentum"] for g in seen}) > 3


def test_a_schedule_that_is_not_followed_is_noticed():
    twins = Twins("AdamW")
    scheduler = lrs.StepLR(twins.b, 1, 0.5)
    for opt, params in twins:
        give_gradients(params, 0)
        opt.step()
    scheduler.step()
    with pytest.raises(AssertionError):
        twins.check()


def test_one_cycle_switches_momentum_on_in_torchs_face_only():
    """torch's SGD asks at each step whether there is momentum; fastai's only when it is made."""
    twins, _ = run_schedule("SGD", one_cycle, momentum=0)
    assert "momentum_buffer" in twins.a.state[twins.ours[0]]
    params = parameters()
    opt = fusedopt.SGD(groups_of(params), lr=0.01)
    scheduler = one_cycle(opt)
    for t in range(STEPS):
        give_gradients(params, t)
        opt.step()
        scheduler.step()
        assert opt.hypers[0]["mom"] == opt.param_groups[0]["momentum"] > 0.8
    assert set(opt.state[params[0]]) <= {"do_wd", "force_train"}


@pytest.mark.parametrize("name", ["Adam", "QHAdam", "RAdam", "Lamb", "Larc", "RMSProp", "SGD", "ranger"])
@pytest.mark.parametrize("cycle", ["OneCycleLR-cos", "CyclicLR-triangular2"])
def test_torchs_cycles_reach_the_callbacks_of_fastais_names(name, cycle):
    """As if a user had set ``lr`` and ``mom`` by hand, in fastai's words, to what torch's optimizer has."""
    kwargs = dict(mom=0.9) if name in ("SGD", "RMSProp") else {}
    ours, others = parameters(), parameters()
    opt, other = (getattr(fusedopt, name)(groups_of(ps), lr=0.01, **kwargs) for ps in (ours, others))
    peer = torch.optim.SGD(groups_of(parameters()), lr=0.01, momentum=0.9)
    scheduler, schedule = CYCLES[cycle](opt), CYCLES[cycle](peer)
    for t in range(5):
        give_gradients(ours, t), give_gradients(others, t)
        other.set_hyper("lr", [g["lr"] for g in peer.param_groups])
        other.set_hyper("mom", [g["momentum"] for g in peer.param_groups])
        opt.step(), other.step(), peer.step()
        scheduler.step(), schedule.step()
        assert torch.equal(flat(ours), flat(others))
    assert {h["mom"] for h in opt.hypers} == {g["momentum"] for g in peer.param_groups}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_tensor_learning_rate_is_filled_in_place(scheduler):
    if scheduler == "SWALR":  # its interpolation does not fit a tensor for torch's own optimizers, either
        make = lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=1)  # noqa: E731
    else:
        make = SCHEDULERS[scheduler]
    lr = torch.tensor(0.01, dtype=torch.float64)
    twins = Twins("SGD", lr=lr)
    schedulers = [make(opt) for opt, _ in twins]
    tensor = twins.a.param_groups[0]["lr"]
    assert isinstance(tensor, torch.Tensor)
    for t in range(6):
        for (opt, params), s in zip(twins, schedulers, strict=True):
            give_gradients(params, t)
            opt.step()
            s.step(*([LOSSES[t]] if scheduler == "ReduceLROnPlateau" else []))
        twins.check()
        assert twins.a.param_groups[0]["lr"] is tensor and type(twins.a.hypers[0]["lr"]) is float


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("start", [0.3, 0.1, 0.7])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_schedule_that_ends_just_below_zero_by_rounding_ends_well(name, start, tensor):
    """LinearLR multiplies its way down to zero, and lands on numbers like -2e-18; torch trains on, and so do we."""
    lows = []
    for total in (3, 6, 8, 9):
        lr = torch.tensor(1.0) if tensor else 0.1
        make = partial(lrs.LinearLR, start_factor=start, end_factor=0.0, total_iters=total)
        twins, seen = run_schedule(name, make, steps=total + 2, lr=lr)
        lows += [g["lr"] for g in [seen[-1], *numbers(twins.a)]]
    assert max(map(abs, lows)) < 1e-7
    assert start != 0.3 or min(lows) < 0, "this is where it happens"


@pytest.mark.parametrize("scheduler", ["OneCycleLR-cos", "CyclicLR-triangular2", "SequentialLR", "SWALR"])
def test_a_schedule_goes_on_from_a_checkpoint(scheduler):
    """Optimizer and scheduler are saved half-way; new ones that load both end where an undisturbed run ends."""
    make = {**SCHEDULERS, **CYCLES}[scheduler]

    def steps(opt, schedule, params, span):
        for t in span:
            give_gradients(params, t)
            opt.step()
            schedule.step()

    whole = parameters()
    opt = fusedopt.optim.AdamW(groups_of(whole), lr=0.01)
    schedule = make(opt)
    steps(opt, schedule, whole, range(5))
    saved = copy.deepcopy((opt.state_dict(), schedule.state_dict()))
    half = [nn.Parameter(p.detach().clone()) for p in whole]
    resumed = fusedopt.optim.AdamW(groups_of(half), lr=0.5)
    again = make(resumed)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    steps(opt, schedule, whole, range(5, 10))
    steps(resumed, again, half, range(5, 10))
    assert torch.equal(flat(whole), flat(half))
    assert numbers(opt) == numbers(resumed)
    # what the scheduler left in the groups is a number there, and harmless
    assert all(type(v) in (int, float) for h in opt.hypers for v in h.values())


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_scheduler_stepped_first_gets_torchs_own_warning(name):
    for opt, _ in Twins(name):
        with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
            lrs.StepLR(opt, 2).step()


def test_a_scheduler_refuses_a_group_added_behind_its_back_as_it_does_with_torchs():
    messages = []
    for opt, params in Twins("AdamW"):
        scheduler = one_cycle(opt)
        opt.add_param_group(dict(params=[nn.Parameter(torch.zeros(2))]))
        give_gradients(params, 0)
        opt.step()
        with pytest.raises(KeyError) as error:
            scheduler.step()
        messages.append(str(error.value))
    assert messages[0] == messages[1]


# --
# GradScaler


def snapshot(opt, params):
    """Parameters and all state, bit for bit."""
    state = [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in opt.state.get(p, {}).items()}
        for p in params
    ]
    return [p.detach().clone() for p in params], state


def assert_same_snapshot(a, b):
    for x, y in zip(a[0], b[0], strict=True):
        assert torch.equal(x, y)
    for s, t in zip(a[1], b[1], strict=True):
        assert s.keys() == t.keys()
        for k in s:
            same = torch.equal(s[k], t[k]) if isinstance(s[k], torch.Tensor) else s[k] == t[k]
            assert same and type(s[k]) is type(t[k]), k


def new_scaler(**kwargs):
    return torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2, **kwargs)


def scaled_step(opt, params, scaler, t, bad=None, unscale=False, clip=None):
    """One step with scaled gradients; with ``bad``, one element of one of them is not finite."""
    scaler.scale(torch.tensor(0.0))  # makes the scale, as the loss would
    give_gradients(params, t, scaler.get_scale())
    if bad is not None:
        params[1].grad[2, 3] = bad
    if unscale or clip:
        scaler.unscale_(opt)
    if clip:
        nn.utils.clip_grad_norm_(params, clip)
    scaler.step(opt)
    scaler.update()


LAST = 4


@pytest.mark.parametrize("bad", [math.inf, math.nan], ids=["inf", "nan"])
@pytest.mark.parametrize("unscale", [False, True], ids=["step", "after-unscale"])
@pytest.mark.parametrize("when", [(0,), (2,), (LAST,), (0, 1, LAST), tuple(range(LAST + 1))], ids=str)
def test_an_overflow_changes_nothing_and_training_goes_on_as_torchs_does(when, unscale, bad):
    twins = Twins("AdamW")
    scalers = [new_scaler(), new_scaler()]
    for t in range(LAST + 1):
        before = snapshot(twins.a, twins.ours)
        for (opt, params), scaler in zip(twins, scalers, strict=True):
            scaled_step(opt, params, scaler, t, bad if t in when else None, unscale)
        after = snapshot(twins.a, twins.ours)
        if t in when:
            assert_same_snapshot(before, after)
        else:
            assert not torch.equal(flat(before[0]), flat(after[0]))
            steps = t + 1 - sum(w <= t for w in when)
            assert all(s["step"] == steps for s in after[1])
        assert scalers[0].get_scale() == scalers[1].get_scale()
        twins.check()
    assert not hasattr(twins.a, "grad_scale") and not hasattr(twins.a, "found_inf")


@pytest.mark.parametrize(
    ("row", "variant"),
    [pytest.param(r, r.variants[-1], id=f"{r.face}-{r.name}") for r in table.rows()],
)
def test_with_every_optimizer_a_skipped_step_is_no_step(row, variant):
    """Overflows on the first, the third and the last step: the others are those of a run without a scaler."""
    ours, plain = parameters(), parameters()
    opt, other = (row.factory(groups_of(ps), **variant.kwargs) for ps in (ours, plain))
    scaler = new_scaler()
    for t in range(5):
        if t in (0, 2, 4):
            before = snapshot(opt, ours)
            scaled_step(opt, ours, scaler, t, math.inf)
            assert_same_snapshot(before, snapshot(opt, ours))
            assert opt.state or t == 0
        else:
            scaled_step(opt, ours, scaler, t)  # by a power of two: exact
            give_gradients(plain, t)
            other.step()
        assert torch.equal(flat(ours), flat(plain))
    assert_same_snapshot(snapshot(opt, ours), snapshot(other, plain))


def test_an_overflow_that_is_not_skipped_is_noticed():
    params, scaler = parameters(), new_scaler()
    opt = fusedopt.optim.AdamW(groups_of(params))
    before = snapshot(opt, params)
    scaled_step(opt, params, scaler, 0)
    with pytest.raises(AssertionError):
        assert_same_snapshot(before, snapshot(opt, params))


def test_gradients_are_divided_once_when_they_are_clipped_before_the_step():
    twins, scalers = Twins("AdamW"), [new_scaler(), new_scaler()]
    clipped = []
    for t in range(4):
        for (opt, params), scaler in zip(twins, scalers, strict=True):
            scaled_step(opt, params, scaler, t, clip=0.25)
            clipped.append(flat([p.grad for p in params]).norm().item())
        twins.check()
    assert clipped == pytest.approx([0.25] * 8, rel=1e-4)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_without_any_gradient_the_scaler_says_the_same_as_with_torchs(name):
    messages = []
    for opt, params in Twins(name):
        scaler = new_scaler()
        scaler.scale(torch.tensor(0.0))
        before = snapshot(opt, params)
        with pytest.raises(AssertionError) as error:
            scaler.step(opt)
        messages.append(str(error.value))
        assert_same_snapshot(before, snapshot(opt, params))
        assert not hasattr(opt, "grad_scale") and not hasattr(opt, "found_inf")
    assert messages == ["No inf checks were recorded for this optimizer."] * 2


def test_parameters_without_gradients_are_left_alone_by_a_scaled_step():
    twins, scalers = Twins("AdamW"), [new_scaler(), new_scaler()]
    for t in range(4):
        for (opt, params), scaler in zip(twins, scalers, strict=True):
            scaler.scale(torch.tensor(0.0))
            give_gradients(params, t, scaler.get_scale())
            params[t % 3].grad = None
            scaler.step(opt)
            scaler.update()
        twins.check()
    assert [twins.a.state[p]["step"] for p in twins.ours] == [2, 3, 3]


def test_two_optimizers_share_a_scaler_and_only_the_one_that_overflowed_skips():
    params, others = parameters(), parameters(seed=1)
    a, b = fusedopt.optim.AdamW(params), fusedopt.Lamb(others, lr=0.1)
    scaler = new_scaler()
    scaler.scale(torch.tensor(0.0))
    give_gradients(params, 0, 64.0), give_gradients(others, 1, 64.0)
    params[0].grad[0] = math.inf
    before = snapshot(a, params)
    scaler.step(a), scaler.step(b)
    scaler.update()
    assert_same_snapshot(before, snapshot(a, params))
    assert not a.state and b.state[others[0]]["step"] == 1
    assert scaler.get_scale() == 32.0


def test_a_scaler_that_is_disabled_steps_and_hands_over_the_closures_value():
    params = parameters()
    opt = fusedopt.optim.AdamW(params)
    give_gradients(params, 0)
    assert torch.amp.GradScaler("cpu", enabled=False).step(opt, lambda: 7.0) == 7.0
    assert opt.state[params[0]]["step"] == 1


def test_a_scaler_and_a_scheduler_work_together():
    """The scheduler sees that the first step was skipped exactly as it does with torch's optimizer."""
    twins, scalers = Twins("AdamW"), [new_scaler(), new_scaler()]
    schedulers = [one_cycle(opt) for opt, _ in twins]
    for t in range(5):
        for (opt, params), scaler, scheduler in zip(twins, scalers, schedulers, strict=True):
            scaled_step(opt, params, scaler, t, math.inf if t == 2 else None)
            scheduler.step()
        twins.check()


def test_scaled_bfloat16_parameters_with_float32_gradients():
    """float16 gradients the scaler refuses by itself; float32 ones of narrower parameters it takes."""
    params, plain = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    opt, other = fusedopt.optim.AdamW(params, lr=0.1), fusedopt.optim.AdamW(plain, lr=0.1)
    for p in (*params, *plain):
        p.grad_dtype = torch.float32
    scaler = new_scaler()
    for t in range(3):
        scaler.scale(torch.tensor(0.0))
        for ps, scale in ((params, scaler.get_scale()), (plain, 1.0)):
            gen = torch.Generator().manual_seed(t)
            for p in ps:
                p.grad = torch.randn(p.shape, generator=gen) * scale
        if t == 1:
            params[0].grad[0] = math.inf
        else:
            other.step()
        scaler.step(opt)
        scaler.update()
        assert torch.equal(flat(params), flat(plain))


# --
# Weight averaging


def network():
    """No bias before the batch norm: its gradient would be rounding alone, which Adam scales up to a full step."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


@pytest.mark.parametrize(
    "average",
    [
        {},
        dict(multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5)),
        dict(avg_fn=swa_utils.get_swa_avg_fn(), use_buffers=True),
    ],
    ids=["swa", "ema", "with-buffers"],
)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_stochastic_weight_averaging_follows_torchs(name, average):
    gen = torch.Generator().manual_seed(1)
    batches = [torch.randn(5, 4, generator=gen) for _ in range(6)]

    def run(module):
        model = network()
        opt = getattr(module, name)(model.parameters(), lr=0.05, weight_decay=0.01)
        averaged = swa_utils.AveragedModel(model, **average)
        scheduler = swa_utils.SWALR(opt, swa_lr=0.01, anneal_epochs=3)
        for t, x in enumerate(batches):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
            if t >= 2:
                averaged.update_parameters(model)
                scheduler.step()
        swa_utils.update_bn(batches, averaged)
        assert averaged.n_averaged == 4
        return averaged.state_dict(), model.state_dict(), opt.param_groups[0]["lr"]

    ours, theirs = run(fusedopt.optim), run(torch.optim)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.equal(ours[0]["module.0.weight"], ours[1]["0.weight"])


def test_an_average_can_be_taken_of_a_model_whose_optimizer_is_copied_along():
    """AveragedModel deep-copies the module, and with it whatever hangs on it."""
    model = network()
    model.opt = fusedopt.optim.AdamW(model.parameters())
    model(torch.randn(5, 4)).square().mean().backward()
    model.opt.step()
    averaged = swa_utils.AveragedModel(model)
    twin = averaged.module.opt
    kept = {id(p) for p in averaged.module.parameters()}
    assert {id(p) for p in twin.param_groups[0]["params"]} == kept == {id(p) for p in twin.state}
