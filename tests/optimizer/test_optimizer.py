"""One class, two contracts: fastai's optimizer protocol and torch.optim.Optimizer's."""

import copy
import gc
import inspect
import operator
import pickle
import random
import warnings
import weakref
from functools import partial

import factories
import numpy as np
import pytest
import torch
from factories import SHAPES, assert_equal, give_gradients
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fusedopt
from fusedopt import (
    adam_step,
    average_grad,
    average_sqr_grad,
    l2_reg,
    momentum_step,
    sgd_step,
    step_stat,
    weight_decay,
)
from fusedopt.extension import leaf
from fusedopt.step.engine import Engine

with warnings.catch_warnings():
    # fastai scripts a function at import; torch deprecates that, and fastai is not ours to change
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=DeprecationWarning)
    import fastai.optimizer as fastai_optimizer
    from fastcore.foundation import L

BACKENDS = ["reference", "cpp"]
ADAM = [weight_decay, partial(average_grad, dampening=True), average_sqr_grad, step_stat, adam_step]


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    params = factories.parameters(shapes, dtype, seed)
    give_gradients(params, seed)
    return params


def values(params):
    return [p.detach().clone() for p in params]


def splits():
    """A fastai splitter's result: three lists, one of them empty."""
    params = parameters()
    return [params[:1], [], params[1:]]


# --
# Construction


@pytest.mark.parametrize("shape", [list, tuple, iter, L])
def test_one_group_from_any_iterable(shape):
    params = parameters()
    opt = fusedopt.Adam(shape(params), lr=0.1)
    assert [id(p) for p in opt.param_groups[0]["params"]] == [id(p) for p in params]
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("shape", [list, tuple, iter, L, lambda x: L(x).map(list)])
def test_a_list_of_lists_is_one_group_each(shape):
    groups = splits()
    opt = fusedopt.Adam(shape(groups), lr=0.1)
    assert [[id(p) for p in g] for g in opt.param_lists] == [[id(p) for p in g] for g in groups]


def test_named_parameters_are_no_groups():
    model = nn.Linear(3, 2)
    opt = fusedopt.Adam(model.named_parameters(), lr=0.1)
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
    assert "param_names" not in opt.hypers[0]
    give_gradients(model.parameters())
    opt.step()


def test_torch_groups_take_either_vocabulary_and_are_not_changed():
    a, b, c = parameters()
    groups = [
        dict(params=[a], wd=0.5, mom=0.7),
        dict(params=[b], weight_decay=0.4, betas=(0.6, 0.5)),
        dict(params=c),
    ]
    before = [dict(g) for g in groups]
    opt = fusedopt.Adam(groups, lr=0.1, wd=0.1)
    assert groups == before
    assert [g["weight_decay"] for g in opt.param_groups] == [0.5, 0.4, 0.1]
    assert [g["betas"] for g in opt.param_groups] == [(0.7, 0.99), (0.6, 0.5), (0.9, 0.99)]
    assert all("wd" not in g and "mom" not in g for g in opt.param_groups)
    assert [h["mom"] for h in opt.hypers] == [0.7, 0.6, 0.9]


@pytest.mark.parametrize(
    ("lr", "expected"),
    [
        (slice(1e-5, 1e-3), [1e-5, 1e-4, 1e-3]),
        (slice(1e-3), [1e-4, 1e-4, 1e-3]),
        ([1e-3, 2e-3, 3e-3], [1e-3, 2e-3, 3e-3]),
        (np.array([1e-3, 2e-3, 3e-3]), [1e-3, 2e-3, 3e-3]),
        (np.float64(0.5), [0.5] * 3),
    ],
    ids=str,
)
def test_one_learning_rate_per_group(lr, expected):
    opt = fusedopt.Adam(splits(), lr=lr)
    assert [h["lr"] for h in opt.hypers] == pytest.approx(expected)
    assert all(type(g["lr"]) is float for g in opt.param_groups)


def test_options_of_the_class():
    opt = fusedopt.Optimizer(
        parameters(), ADAM, lr=0.1, mom=0.9, sqr_mom=0.9, wd=0.0, title="mine", backend="cpp"
    )
    opt.step()
    assert "mine #1" in str(opt.explain()) and "// mine" in opt.kernel_source()
    assert fusedopt.Optimizer(parameters(), sgd_step, lr=0.1).cbs == [sgd_step]


def test_defaults_of_callbacks_are_hyperparameters():
    opt = fusedopt.Optimizer(
        parameters(), [weight_decay, average_grad, average_sqr_grad, step_stat, adam_step], lr=0.1
    )
    assert dict(opt.hypers[0]) == dict(lr=0.1, wd=0.0, mom=0.9, sqr_mom=0.99, eps=1e-5)
    theirs = fastai_optimizer.Optimizer(
        parameters(), [fastai_optimizer.weight_decay, fastai_optimizer.average_grad], lr=0.1
    )
    ours = fusedopt.Optimizer(parameters(), [weight_decay, average_grad], lr=0.1)
    assert {k: v for k, v in theirs.hypers[0].items() if k in ours.hypers[0]} == dict(ours.hypers[0])


# --
# fastai: hypers


@pytest.mark.parametrize(
    "value",
    [0.3, [0.1, 0.2, 0.3], [0.5], slice(1e-4, 1e-2), slice(0.1), np.array([0.1, 0.2, 0.3]), L(0.1, 0.2, 0.3)],
    ids=str,
)
@pytest.mark.parametrize("name", ["lr", "mom", "foo"])
def test_set_hyper_follows_fastai(name, value):
    ours = fusedopt.Adam(splits(), lr=0.1)
    theirs = fastai_optimizer.Adam(splits(), lr=0.1)
    ours.set_hyper(name, value), theirs.set_hyper(name, value)
    assert [h[name] for h in ours.hypers] == pytest.approx([h[name] for h in theirs.hypers])
    assert all(type(h[name]) is float for h in ours.hypers)


def test_set_hyper_takes_numpy_and_torch_scalars_too():
    opt = fusedopt.Adam(splits(), lr=0.1)
    for value in (np.float32(0.5), np.array(0.5), torch.tensor(0.5)):
        opt.set_hypers(lr=value, mom=value)
        assert [h["lr"] for h in opt.hypers] == [0.5] * 3
    opt.step()


def test_hypers_are_live_views_under_fastais_names():
    opt = fusedopt.Adam(splits(), lr=0.1)
    view = opt.hypers[-1]
    assert (len(opt.hypers), len(opt.hypers[0:2])) == (3, 2)
    view["lr"], view["mom"], view["wd"] = 0.5, 0.8, 0.3
    group = opt.param_groups[-1]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.8, 0.99), 0.3)
    group["lr"] = 0.7
    assert view["lr"] == opt.hypers[-1]["lr"] == 0.7
    assert opt.param_groups[0]["lr"] == 0.1, "the others are their own"
    assert set(view) == set(view.keys()) == {"lr", "mom", "sqr_mom", "eps", "wd"}
    assert len(view) == 5 and "lr" in view and "params" not in view
    assert all(type(v) in (int, float) for v in view.values())
    assert repr(view).startswith("{") and "'mom': 0.8" in repr(view)
    with pytest.raises(KeyError):
        view["nothing"]
    with pytest.raises(TypeError, match="cannot be removed"):
        del view["lr"]


def test_views_survive_a_loaded_state_dict():
    opt = fusedopt.Adam(splits(), lr=0.1)
    view = opt.hypers[0]
    opt.load_state_dict(opt.state_dict())
    view["lr"] = 0.5
    assert opt.param_groups[0]["lr"] == 0.5


def test_a_tensor_learning_rate_is_kept_and_read_as_a_number():
    lr = torch.tensor(0.1)
    opt = fusedopt.optim.AdamW(parameters(), lr=lr)
    assert opt.param_groups[0]["lr"] is lr
    assert type(opt.hypers[0]["lr"]) is float
    opt.set_hyper("lr", 0.5)
    assert opt.param_groups[0]["lr"] is lr and lr == 0.5
    start = values(opt.param_groups[0]["params"])
    opt.step()
    first = [(p - s).abs().max().item() for p, s in zip(opt.param_groups[0]["params"], start, strict=True)]
    lr.fill_(0.0)  # behind the optimizer's back, as a captured schedule does
    before = values(opt.param_groups[0]["params"])
    opt.step()
    assert max(first) > 0.4
    assert_equal(opt.param_groups[0]["params"], before)


# --
# fastai: parameters, freezing, state


def test_param_lists_are_fresh_lists_and_can_be_replaced():
    opt = fusedopt.Adam(splits(), lr=0.1)
    old = opt.param_lists
    old[0].clear()
    assert len(opt.param_groups[0]["params"]) == 1
    old = opt.param_lists
    new = [[nn.Parameter(torch.zeros(2))] for _ in old]
    opt.param_lists = new
    assert [[id(p) for p in g] for g in opt.param_lists] == [[id(p) for p in g] for g in new]
    opt.param_lists = old
    assert [[id(p) for p in g] for g in opt.param_lists] == [[id(p) for p in g] for g in old]
    with pytest.raises(ValueError):
        opt.param_lists = old[:2]


def test_all_params_follows_fastai():
    ours, theirs = (make(splits(), lr=0.1) for make in (fusedopt.Adam, fastai_optimizer.Adam))
    for opt in (ours, theirs):
        opt.param_lists[0][0].grad = None
    for n in (slice(None), slice(1, None), slice(0, 1)):
        for with_grad in (False, True):
            a, b = (list(opt.all_params(n, with_grad=with_grad)) for opt in (ours, theirs))
            assert [(p.shape, len(pg), h["lr"]) for p, pg, _, h in a] == [
                (p.shape, len(pg), h["lr"]) for p, pg, _, h in b
            ]
    assert not dict(ours.state), "looking makes no state"
    ours.step()
    p, group, state, hyper = ours.all_params()[1]
    assert state is ours.state[p] and any(q is p for q in group)
    hyper["lr"] = 0.5
    assert ours.param_groups[2]["lr"] == 0.5


@pytest.mark.parametrize("n", [0, 1, 2, -1, -2])
def test_freeze_to_follows_fastai(n):
    ours, theirs = (make(splits(), lr=0.1) for make in (fusedopt.Adam, fastai_optimizer.Adam))
    assert ours.frozen_idx == 0
    for opt in (ours, theirs):
        opt.state[opt.param_lists[0][0]]["force_train"] = True
        opt.freeze_to(n)
    assert ours.frozen_idx == theirs.frozen_idx
    trains = [[p.requires_grad for g in opt.param_lists for p in g] for opt in (ours, theirs)]
    assert trains[0] == trains[1]
    ours.unfreeze()
    assert ours.frozen_idx == 0 and all(p.requires_grad for g in ours.param_lists for p in g)


def test_freezing_everything_warns_and_freezing_needs_groups():
    opt = fusedopt.Adam(splits(), lr=0.1)
    with pytest.warns(UserWarning, match="whole model is frozen"):
        opt.freeze_to(5)
    opt.freeze()
    assert opt.frozen_idx == 2
    assert dict(opt.state) == {}, "freezing makes no state"
    with pytest.raises(AssertionError):
        fusedopt.Adam(parameters(), lr=0.1).freeze()


@pytest.mark.parametrize("backend", BACKENDS)
def test_clear_state_keeps_flags_and_starts_again(backend):
    params, fresh = parameters(), parameters()
    make = partial(fusedopt.Optimizer, cbs=ADAM, lr=0.1, mom=0.9, sqr_mom=0.99, wd=0.1, backend=backend)
    opt, other = make(params), make(fresh)
    for o, p in ((opt, params[0]), (other, fresh[0])):
        o.state[p]["do_wd"] = False
        o.state[p]["force_train"] = True
    for _ in range(3):
        opt.step()
    opt.clear_state()
    assert {k for s in opt.state.values() for k in s} == {"do_wd", "force_train"}
    with torch.no_grad():
        for p, q in zip(fresh, params, strict=True):
            p.copy_(q)
    for _ in range(2):
        opt.step(), other.step()
    assert_equal(params, fresh)
    assert opt.state[params[0]]["step"] == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", [weight_decay, l2_reg])
def test_flags_set_before_the_first_step_count(backend, decay):
    params = parameters()
    opt = fusedopt.Optimizer(params, [decay, average_grad, momentum_step], lr=0.1, wd=0.5, backend=backend)
    assert not opt.state
    opt.state[params[0]]["do_wd"] = False  # fastai's Learner does this right after construction
    assert not opt.state and dict(opt.state), "flags alone are no state yet"
    start, grads = values(params), [p.grad for p in params]
    opt.step()
    assert opt.state
    scale = 0.95 if decay is weight_decay else 1.0
    penalty = 0.5 if decay is l2_reg else 0.0
    torch.testing.assert_close(params[0].detach(), start[0] - 0.1 * grads[0])
    torch.testing.assert_close(params[1].detach(), scale * start[1] - 0.1 * (grads[1] + penalty * start[1]))


def test_state_is_a_dict_that_makes_entries_and_copies():
    opt = fusedopt.Adam(parameters(), lr=0.1)
    opt.step()
    for made in (
        copy.copy(opt.state),
        opt.state.copy(),
        copy.deepcopy(opt.state),
        pickle.loads(pickle.dumps(opt.state)),
    ):
        assert type(made) is type(opt.state) and len(made) == 3
        assert made["anything"] == {}
    assert not callable(opt.state)
    opt.state = {}  # accelerate and OptimWrapper assign it
    opt.state[opt.param_lists[0][0]]["do_wd"] = False
    opt.step()
    assert opt.state[opt.param_lists[0][0]]["step"] == 1


# --
# torch: the class


def test_it_is_a_torch_optimizer_and_nothing_else():
    opt = fusedopt.Adam(parameters(), lr=0.1)
    assert isinstance(opt, torch.optim.Optimizer)
    *ours, base, root = type(opt).__mro__
    assert ours[0] is fusedopt.Optimizer and all(c.__module__.startswith("fusedopt.") for c in ours)
    assert (base, root) == (torch.optim.Optimizer, object)
    for name in ("state", "param_groups", "defaults"):
        assert name in vars(opt) and not isinstance(getattr(type(opt), name, None), property)
    assert set(opt.param_groups[0]) - {"params"} == set(opt.defaults)
    assert bool(opt)


FORBIDDEN = ("__call__", "__len__", "train", "eval", "_init_group", "grad_scale", "found_inf")


@pytest.mark.parametrize("make", [fusedopt.Adam, fusedopt.optim.AdamW, fusedopt.ranger])
def test_forbidden_names(make):
    """Names that other libraries take for something else, see the contract of torch, fastai and accelerate."""
    opt = make(parameters(), lr=0.1)
    opt.step()
    for name in FORBIDDEN:
        assert not hasattr(opt, name), name
    assert not callable(opt)
    assert not any("__slots__" in vars(c) for c in type(opt).__mro__)
    for name in ("state", "param_groups", "defaults", "step"):
        assert not isinstance(inspect.getattr_static(type(opt), name, None), property), name
    assert inspect.isfunction(inspect.getattr_static(type(opt), "step"))


def test_signatures_that_callers_rely_on():
    parameters_of = lambda f: inspect.signature(f).parameters  # noqa: E731
    assert list(parameters_of(fusedopt.Optimizer.load_state_dict)) == ["self", "state_dict"]
    assert parameters_of(fusedopt.Optimizer.step)["closure"].default is None
    assert "grad_scaler" not in parameters_of(fusedopt.Optimizer.step)
    assert "set_to_none" in parameters_of(fusedopt.Optimizer.zero_grad)
    assert list(parameters_of(fusedopt.Optimizer))[:2] == ["params", "cbs"]


def test_repr_shows_every_group():
    text = repr(fusedopt.Adam(splits(), lr=slice(1e-3, 1e-1)))
    assert text.startswith("Optimizer (") and text.count("Parameter Group") == 3
    assert "betas: (0.9, 0.99)" in text and "lr: 0.1" in text


def test_zero_grad():
    params = parameters()
    opt = fusedopt.Adam(params, lr=0.1)
    opt.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in params)
    opt.zero_grad()
    assert all(p.grad is None for p in params)
    opt.step()
    assert not opt.state and not opt.explain().eager


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closure_is_called_once_with_gradients_on_and_its_value_returned(backend):
    model, calls = nn.Linear(3, 1), []
    x = torch.randn(5, 3)
    opt = fusedopt.Optimizer(model.parameters(), sgd_step, lr=0.1, backend=backend)

    def closure():
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        return loss

    for step in (lambda: opt.step(closure), lambda: opt.step(closure=closure)):
        with torch.no_grad():
            before = values(model.parameters())
            loss = step()
        assert loss.requires_grad and loss.item() == model_loss(before, x)
    assert calls == [True, True]
    assert opt.step() is None
    assert torch.is_grad_enabled(), "and the switch is as it was"


def model_loss(params, x):
    return (x @ params[0].t() + params[1]).pow(2).mean().item()


@pytest.mark.parametrize("make", [partial(fusedopt.Adam, lr=0.1), fusedopt.optim.AdamW, fusedopt.optim.SGD])
def test_hooks_fire_once(make):
    params = parameters()
    opt, plain = make(params), make(parameters())
    fired = []
    handles = [
        opt.register_step_pre_hook(lambda o, args, kwargs: fired.append("before")),
        opt.register_step_post_hook(lambda o, args, kwargs: fired.append("after")),
        register_optimizer_step_pre_hook(lambda o, args, kwargs: fired.append("everywhere")),
    ]
    try:
        for _ in range(3):
            opt.step()
            assert sorted(fired) == ["after", "before", "everywhere"] and fired[-1] == "after"
            fired.clear()
    finally:
        for handle in handles:
            handle.remove()
    opt.step()
    assert not fired
    for _ in range(4):
        plain.step()
    assert_equal(params, plain.param_groups[0]["params"])


def test_a_pre_hook_may_hand_over_a_closure():
    opt, called = fusedopt.optim.SGD(parameters()), []
    opt.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: called.append(1) or 7.0), {}))
    assert opt.step() == 7.0 and called == [1]


def test_state_dict_hooks_fire_once():
    opt, fired = fusedopt.optim.AdamW(parameters()), []
    opt.step()
    opt.register_state_dict_pre_hook(lambda o: fired.append("pre"))
    opt.register_state_dict_post_hook(lambda o, sd: fired.append("post"))
    opt.register_load_state_dict_pre_hook(lambda o, sd: fired.append("load pre"))
    opt.register_load_state_dict_post_hook(lambda o: fired.append("load post"))
    opt.load_state_dict(opt.state_dict())
    assert fired == ["pre", "post", "load pre", "load post"]


def test_a_profile_names_the_step():
    opt = fusedopt.optim.AdamW(parameters())
    opt.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    assert any("Optimizer.step#AdamW.step" in e.key for e in profile.key_averages())


def test_subclasses_may_wrap_step():
    class Counting(fusedopt.Optimizer):
        count = 0

        def step(self, closure=None):
            self.count += 1
            return super().step(closure)

    params, plain = parameters(), parameters()
    opt, other = (cls(ps, sgd_step, lr=0.1) for cls, ps in ((Counting, params), (fusedopt.Optimizer, plain)))
    fired = []
    opt.register_step_post_hook(lambda o, args, kwargs: fired.append(1))
    for _ in range(2):
        opt.step(), other.step()
    assert opt.count == 2 and fired == [1, 1]
    assert_equal(params, plain)


# --
# torch: schedulers


@pytest.mark.parametrize(
    ("make_scheduler", "steps"),
    [
        (lambda o: lr_scheduler.StepLR(o, 2, 0.5), 6),
        (lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=10), 9),
        (lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False), 6),
        (lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3), 6),
        (lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)), 6),
    ],
    ids=["StepLR", "OneCycleLR", "CyclicLR", "CosineAnnealingWarmRestarts", "LambdaLR"],
)
def test_schedulers_drive_it_as_they_drive_torchs(make_scheduler, steps):
    ours, theirs = parameters(), parameters()
    a, b = fusedopt.optim.AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1, foreach=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s, t = make_scheduler(a), make_scheduler(b)
        for seed in range(steps):
            for opt, params, scheduler in ((a, ours, s), (b, theirs, t)):
                give_gradients(params, seed)
                opt.step()
                scheduler.step()
            keep = ("lr", "betas")
            assert [a.param_groups[0][k] for k in keep] == [b.param_groups[0][k] for k in keep]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert len(a.explain().compiled) == 1


def test_one_cycle_moves_momentum_of_fastais_names_too():
    opt = fusedopt.SGD(parameters(), lr=0.1, mom=0.9)
    scheduler = lr_scheduler.OneCycleLR(opt, 0.3, total_steps=10)
    seen = []
    for _ in range(9):
        opt.step()
        scheduler.step()
        seen.append(opt.hypers[0]["mom"])
        assert opt.param_groups[0]["momentum"] == opt.hypers[0]["mom"]
    assert min(seen) < 0.86 and max(seen) > 0.94


def test_reduce_on_plateau_and_a_schedule_over_groups():
    opt = fusedopt.Adam(splits(), lr=[0.1, 0.2, 0.3])
    plateau = lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5)
    for loss in (1.0, 1.0, 1.0):
        opt.step()
        plateau.step(loss)
    assert [h["lr"] for h in opt.hypers] == pytest.approx([0.025, 0.05, 0.075])


def test_gradient_scaler_on_cpu_skips_a_bad_batch():
    params = parameters()
    opt = fusedopt.optim.AdamW(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    expected = values(params)
    scaler.scale(torch.tensor(1.0))
    params[1].grad[0, 0] = float("inf")
    scaler.step(opt)
    scaler.update()
    assert_equal(params, expected)
    assert not opt.state
    give_gradients(params)
    scaler.step(opt)
    scaler.update()
    assert opt.state[params[0]]["step"] == 1


# --
# torch: copies, groups


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_a_copy_goes_on_from_here_and_leaves_the_original_alone(duplicate, scheduled, backend):
    params = parameters()
    opt = fusedopt.Optimizer(
        [params[:1], params[1:]],
        ADAM,
        lr=0.1,
        mom=0.9,
        sqr_mom=0.9,
        wd=0.1,
        backend=backend,
        state_dtype=torch.float64,
    )
    scheduler = lr_scheduler.StepLR(opt, 1, 0.5) if scheduled else None
    opt.state[params[0]]["do_wd"] = False
    opt.freeze_to(1)
    for _ in range(2):
        opt.step()
    if scheduler:
        scheduler.step()
    twin = duplicate(opt)
    assert (twin.frozen_idx, twin.backend, twin.state_dtype, twin.cbs[0]) == (
        1,
        backend,
        torch.float64,
        weight_decay,
    )
    assert type(twin.state) is type(opt.state)
    twins = [p for g in twin.param_lists for p in g]
    assert_equal(twins, params)
    assert twin.state[twins[0]]["do_wd"] is False
    before = values(params)
    give_gradients(twins)
    twin.step()
    assert_equal(params, before)
    opt.step()
    assert_equal(params, twins)
    assert twin.hypers[0]["lr"] == opt.hypers[0]["lr"]
    twin.set_hyper("lr", 0.77)
    assert opt.hypers[0]["lr"] != 0.77


@pytest.mark.parametrize(
    "make", [fusedopt.ranger, fusedopt.Larc, fusedopt.optim.RMSprop, fusedopt.optim.NAdam]
)
def test_named_optimizers_copy_too(make):
    params = parameters()
    opt = make(params, lr=0.01)
    for _ in range(7):
        opt.step()
    twin = pickle.loads(pickle.dumps(opt))
    assert type(twin) is type(opt)
    twins = twin.param_groups[0]["params"]
    give_gradients(twins)
    for _ in range(7):
        opt.step(), twin.step()
    assert_equal(params, twins)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_added_on_the_way_starts_from_its_own_first_step(backend):
    first, late, alone = parameters(seed=0), parameters(seed=1), parameters(seed=1)
    make = partial(fusedopt.Optimizer, cbs=ADAM, lr=0.1, mom=0.9, sqr_mom=0.99, wd=0.1, backend=backend)
    opt, other = make(first), make(alone, wd=0.0, lr=0.5)
    for _ in range(3):
        opt.step()
    group = dict(params=late, wd=0.0, lr=0.5)
    opt.add_param_group(group)
    assert set(group) == {"params", "wd", "lr"}
    for _ in range(3):
        opt.step(), other.step()
    assert_equal(late, alone)
    assert (opt.state[first[0]]["step"], opt.state[late[0]]["step"]) == (6, 3)


# --
# Nothing stale: whatever happens between steps, the next one sees it


def event_new_gradients(opt, params, rng):
    give_gradients(params, rng.randrange(10**6))


def event_gradient_in_place(opt, params, rng):
    for p in params:
        if p.grad is not None:
            p.grad.mul_(-0.5)


def event_gradient_missing(opt, params, rng):
    params[rng.randrange(len(params))].grad = None


def event_gradient_transposed(opt, params, rng):
    params[1].grad = torch.full((5, 3), rng.random()).t()


def event_parameter_moved(opt, params, rng):
    p = params[rng.randrange(len(params))]
    p.data = p.data.clone()


def event_parameter_transposed(opt, params, rng):
    params[1].data = params[1].data.t().contiguous().t()


def event_parameter_contiguous(opt, params, rng):
    params[1].data = params[1].data.contiguous()


def event_parameter_overwritten(opt, params, rng):
    with torch.no_grad():
        params[0].fill_(rng.random())


def event_double(opt, params, rng):
    p = params[2]
    p.grad, p.data = None, p.data.double()
    p.grad = torch.ones_like(p)


def event_float(opt, params, rng):
    p = params[2]
    p.grad, p.data = None, p.data.float()
    p.grad = torch.ones_like(p)


def event_flag(opt, params, rng):
    opt.state[params[rng.randrange(len(params))]]["do_wd"] = rng.random() < 0.5


def event_step_count(opt, params, rng):
    state = opt.state[params[0]]
    if "step" in state:
        state["step"] = rng.randrange(1, 50)


def event_step_tensor(opt, params, rng):
    params[0].grad = torch.ones_like(
        params[0]
    )  # an optimizer that has nothing to do with it leaves it a tensor
    state = opt.state[params[0]]
    if "step" in state:
        state["step"] = torch.tensor(float(rng.randrange(1, 50)))


def event_state_replaced(opt, params, rng):
    state = opt.state[params[1]]
    if "sqr_avg" in state:
        state["sqr_avg"] = torch.full((3, 5), 0.5)


def event_state_in_place(opt, params, rng):
    for state in opt.state.values():
        if "grad_avg" in state:
            state["grad_avg"].mul_(0.5)


def event_state_dropped(opt, params, rng):
    opt.state.pop(params[rng.randrange(len(params))], None)


def event_clear_state(opt, params, rng):
    opt.clear_state()


def event_reload(opt, params, rng):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def event_lr(opt, params, rng):
    opt.set_hyper("lr", [rng.random() * 0.1 for _ in opt.param_groups])


def event_lr_int(opt, params, rng):
    opt.param_groups[0]["lr"] = 0


def event_lr_tensor(opt, params, rng):
    opt.param_groups[1]["lr"] = torch.tensor(rng.random() * 0.1)


def event_betas(opt, params, rng):
    opt.param_groups[1]["betas"] = (rng.random(), 0.9 + 0.05 * rng.random())


def event_no_decay(opt, params, rng):
    opt.hypers[0]["wd"] = rng.choice([0.0, 0.3])


def event_lists_swapped(opt, params, rng):
    opt.param_lists = [[params[0], params[1]], [params[2], params[3]]]


def event_lists_back(opt, params, rng):
    opt.param_lists = [[params[2]], [params[0], params[1], params[3]]]


def event_another_callback(opt, params, rng):
    opt.cbs = [l2_reg if cb is weight_decay else weight_decay if cb is l2_reg else cb for cb in opt.cbs]


def event_copy(opt, params, rng):
    copy.deepcopy(opt).step()


def event_explain(opt, params, rng):
    str(opt.explain())


EVENTS = [f for name, f in sorted(globals().items()) if name.startswith("event_")]


def beginning(backend):
    params = parameters(shapes=((4,), (3, 5), (2, 2), (7,)))
    opt = fusedopt.Optimizer(
        [params[:2], params[2:]], ADAM, lr=0.1, mom=0.9, sqr_mom=0.99, eps=1e-3, wd=0.1, backend=backend
    )
    return opt, params


def drive(backend, seed, steps=60):
    """An optimizer's life: several steps alike, then something happens."""
    rng = random.Random(seed)
    opt, params = beginning(backend)
    log = []
    for _ in range(steps):
        if rng.random() < 0.5:
            event = rng.choice(EVENTS)
            event(opt, params, rng)
            log.append(event.__name__)
        opt.step()
        log.append("step")
        yield opt, params, log


def assert_same_life(a, pa, b, pb, log):
    for p, q in zip(pa, pb, strict=True):
        s, t = a.state.get(p, {}), b.state.get(q, {})
        assert s.keys() == t.keys(), log
        for k in s:
            if isinstance(s[k], torch.Tensor):
                assert s[k].dtype == t[k].dtype, (k, log)
                torch.testing.assert_close(s[k], t[k], rtol=1e-5, atol=1e-6, msg=f"{k}: {log}")
            else:
                assert s[k] == t[k] and type(s[k]) is type(t[k]), (k, log)
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=str(log))


@pytest.mark.parametrize("event", EVENTS, ids=lambda f: f.__name__)
def test_the_step_after_an_event_sees_it(event):
    lives = [beginning(backend) for backend in ("reference", "cpp")]
    for seed in range(3):
        for opt, params in lives:
            for _ in range(3):
                opt.step()
            event(opt, params, random.Random(seed))
            opt.step()
        (a, pa), (b, pb) = lives
        assert_same_life(a, pa, b, pb, event.__name__)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_stale_whatever_happens_between_steps(seed):
    for (a, pa, log), (b, pb, _) in zip(drive("reference", seed), drive("cpp", seed), strict=True):
        assert_same_life(a, pa, b, pb, log[-12:])


def test_mutation_a_stale_learning_rate_would_be_noticed():
    (a, pa), (b, pb) = beginning("reference"), beginning("cpp")
    for opt in (a, b):
        opt.step()
    b.set_hyper("lr", 0.0999)
    for opt in (a, b):
        opt.step()
    with pytest.raises(AssertionError, match="log"):
        assert_same_life(a, pa, b, pb, "log")


@pytest.fixture
def long_ways(monkeypatch):
    """Counts the steps that looked at every tensor in Python. Without the extension every step does."""
    if leaf.native is None:
        pytest.skip("the C++ extension is not built")
    seen, step = [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda self, *args, **kw: seen.append(1) or step(self, *args, **kw))
    return seen


@pytest.mark.filterwarnings("ignore:fusedopt. most of the last")
@pytest.mark.parametrize("groups", [2, 9])
def test_counters_of_repeated_steps_stay_what_they_were(groups):
    """Numbers in the state keep their type and exact value, however many scalar sets are computed at once."""

    def count(p, lr, mom, k, n=0, total=0, big=1, ratio=1.0, late=False, **kwargs):
        p.data.sub_(p.grad.data * (lr * ratio))
        return {"n": n + 1, "total": total + n * k, "big": big * 3, "ratio": ratio * mom, "late": n > 40}

    both = []
    for backend in BACKENDS:
        params = parameters(shapes=[(3,)] * groups)
        opt = fusedopt.Optimizer([[p] for p in params], count, lr=0.1, mom=0.5, k=3, backend=backend)
        for _ in range(50):
            opt.step()
        both.append([opt.state[p] for p in params])
    for s, t in zip(*both, strict=True):
        assert s == t
        assert {k: type(v) for k, v in s.items()} == {k: type(v) for k, v in t.items()}
    assert s["big"] == 3**50, "far beyond 64 bits"


@pytest.mark.parametrize("groups", [2, 9])
def test_long_training_underflows_without_harm(groups, long_ways):
    """Bias corrections become exactly one; nothing is raised, nothing changes, nothing gets slower."""
    both = []
    for backend in BACKENDS:
        params = parameters(shapes=[(3,)] * groups)
        opt = fusedopt.Optimizer([[p] for p in params], ADAM, lr=0.1, mom=0.5, sqr_mom=0.9, backend=backend)
        opt.step()
        for p in params:
            opt.state[p]["step"] = 1060  # 0.5 ** 1074 is the last number that is not zero
        before = len(long_ways)
        for _ in range(30):
            opt.step()
        both.append(params)
    assert len(long_ways) - before <= 2, "cpp goes on as it began"
    for p, q in zip(*both, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_integer_powers_of_step_counts():
    def powers(p, lr, step, **kwargs):
        p.data.sub_(p.grad.data * (lr * 2**-step + 1 / (step**9 + 1)))

    both = []
    for backend in BACKENDS:
        params = parameters(shapes=[(3,)] * 9)
        opt = fusedopt.Optimizer([[p] for p in params], [step_stat, powers], lr=0.1, backend=backend)
        for _ in range(4):
            opt.step()
        for p in params:
            opt.state[p]["step"] = 200  # its ninth power is above 2⁶³
        for _ in range(3):
            opt.step()
        both.append(params)
    for p, q in zip(*both, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_returned_state_is_taken_by_value(backend):
    def alias(p, lr, last=None, here=None, again=None, **kwargs):
        return {"last": p.grad.data, "here": p.data, "again": p.grad.data}

    def change(p, lr, **kwargs):
        p.grad.data.mul_(2)
        p.data.sub_(p.grad.data, alpha=lr)

    params = parameters()
    opt = fusedopt.Optimizer(params, [alias, change], lr=0.1, backend=backend)
    for seed in range(3):
        give_gradients(params, seed)
        start = values(params)
        opt.step()
        for p, s in zip(params, start, strict=True):
            state = opt.state[p]
            assert torch.equal(state["last"], p.grad) and torch.equal(state["here"], s)
            places = [t.data_ptr() for t in (p, p.grad, *state.values())]
            assert len(set(places)) == 5


def test_two_optimizers_do_not_disturb_each_other():
    params, others, alone = parameters(), parameters(seed=3), parameters()
    a, b, c = (fusedopt.Adam(ps, lr=0.1) for ps in (params, others, alone))
    for _ in range(4):
        a.step(), b.step()
    for _ in range(4):
        c.step()
    assert_equal(params, alone)


def test_parameters_of_inference_mode_are_stepped():
    with torch.inference_mode():
        p = torch.ones(5)
        opt = fusedopt.Optimizer([p], sgd_step, lr=0.5)
        for _ in range(3):
            p.grad = torch.ones(5)
            opt.step()
        assert torch.equal(p, torch.full((5,), -0.5))


def test_a_parameter_that_refers_to_its_optimizer_is_collected():
    p = nn.Parameter(torch.ones(3))
    p.opt = fusedopt.Adam([p], lr=0.1)
    for _ in range(5):  # enough for a step to be recorded
        p.grad = torch.ones(3)
        p.opt.step()
    gone = weakref.ref(p)
    del p
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", ["Adam", "SGD", "RMSProp", "optim.AdamW", "optim.SGD", "optim.RMSprop"])
def test_a_hyperparameter_is_shown_under_one_name_and_read_without_the_others(name):
    opt = operator.attrgetter(name)(fusedopt)([torch.nn.Parameter(torch.ones(2))], lr=0.3)
    view = opt.hypers[-1]
    for key in ("lr", "mom", "sqr_mom", "wd", "weight_decay", "betas", "momentum", "alpha", "maximize", "no"):
        assert view.get(key) == dict(view).get(key), key
    opt.set_hypers(lr=0.2)
    assert view["lr"] == 0.2
    with pytest.raises(KeyError, match="weight_decay"):
        view["weight_decay"]


def _normed(p, lr, size=None, **kwargs):
    size = torch.zeros((), dtype=p.dtype, device=p.device) if size is None else size
    size = size * 0.5 + p.grad.norm() * 0.5
    p.data.sub_(p.grad / (size + 1.0), alpha=lr)
    return {"size": size}


COUNTING = {
    "AdamW": lambda ps, **o: fusedopt.optim.AdamW(ps, lr=0.1, **o),
    "capturable": lambda ps, **o: fusedopt.optim.AdamW(ps, lr=0.1, capturable=True, **o),
    "a product": lambda ps, **o: fusedopt.optim.NAdam(ps, lr=0.1, capturable=True, **o),
    "amp_fused": lambda ps, **o: fusedopt.optim.AdamW(ps, lr=0.1, amp_fused=True, **o),
    "a norm": lambda ps, **o: fusedopt.Optimizer(ps, _normed, lr=0.1, **o),
    "NovoGrad": lambda ps, **o: fusedopt.rules.NovoGrad(ps, lr=0.1, **o),
}


@pytest.mark.parametrize("name", COUNTING)
def test_a_parameter_without_elements_is_counted_as_others_are(name):
    params = [nn.Parameter(torch.ones(shape)) for shape in ((3,), (0,), (0, 4))]
    opt = COUNTING[name](params, backend="reference")
    for _ in range(5):
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.step()
    numbers = [
        {k: float(v) for k, v in opt.state[p].items() if not isinstance(v, torch.Tensor) or v.dim() == 0}
        for p in params
    ]
    assert numbers[0] and numbers[0] == numbers[1] == numbers[2]
