"""Checkpoints travel between fastai, torch.optim and here, and training goes on along the same trajectory."""

import copy
import itertools
import warnings
from functools import partial

import pytest
import torch
from fastai import optimizer as fastai
from fastcore.foundation import L
from test_state_dict import adam, assert_equal, copied, parameters, through_a_file, train
from torch import nn

import fusedopt

STEPS = 4


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """Trajectories are compared; which backend takes the steps is other tests' matter."""
    monkeypatch.setenv("FUSEDOPT_BACKEND", "reference")


def goes_on(make_a, make_b, convert, tolerance=0.0):
    """Train with one optimizer, hand its checkpoint to another, and go on with both."""
    params = parameters()
    a = make_a(params)
    train_any(a, params, STEPS)
    twins = copied(params)
    b = make_b(twins)
    b.load_state_dict(convert(a))
    train_any(a, params, STEPS, STEPS), train_any(b, twins, STEPS, STEPS)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(q, p, rtol=tolerance, atol=tolerance)
    return a, b


def train_any(opt, params, steps, start=0):
    """``train`` for optimizers of any kind: the same gradients in the order of the parameters."""
    for t in range(start, start + steps):
        gen = torch.Generator().manual_seed(100 + t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)
        opt.step()


# --
# fastai

FASTAI = {
    "SGD": dict(lr=0.1),
    "SGD momentum": dict(lr=0.1, mom=0.9),
    "RMSProp": dict(lr=0.01),
    "RMSProp momentum": dict(lr=0.01, mom=0.9),
    "Adam": dict(lr=0.1, wd=0.1),
    "Adam L2": dict(lr=0.1, wd=0.1, decouple_wd=False),
    "RAdam": dict(lr=0.1),
    "QHAdam": dict(lr=0.1),
    "Larc": dict(lr=0.1, wd=0.1),
    "Lamb": dict(lr=0.1),
}


def makers(name):
    name, kwargs = name.split()[0], FASTAI[name]
    return partial(getattr(fastai, name), **kwargs), partial(getattr(fusedopt, name), **kwargs)


@pytest.mark.parametrize("name", FASTAI)
def test_training_with_fastai_goes_on_here(name):
    theirs, ours = makers(name)
    goes_on(theirs, ours, lambda opt: opt.state_dict(), tolerance=2e-6)


@pytest.mark.parametrize("name", FASTAI)
def test_training_here_goes_on_with_fastai(name):
    theirs, ours = makers(name)
    with warnings.catch_warnings():
        if name == "RMSProp":  # our step count is nothing to it
            warnings.simplefilter("error")
        goes_on(ours, theirs, lambda opt: opt.to_fastai_state_dict(), tolerance=2e-6)


@pytest.mark.parametrize("here_first", [True, False])
def test_lookahead_moves_with_its_slow_weights(here_first):
    def theirs(params):
        return fastai.Lookahead(fastai.SGD(params, lr=0.1, mom=0.9), k=3)

    def ours(params):
        return fusedopt.Lookahead(fusedopt.SGD(params, lr=0.1, mom=0.9), k=3)

    if here_first:
        goes_on(ours, theirs, lambda opt: opt.to_fastai_state_dict(), tolerance=2e-6)
    else:
        goes_on(theirs, ours, lambda opt: opt.state_dict(), tolerance=2e-6)


def groups(params):
    return [params[:1], params[1:]]


def test_groups_hyperparameters_and_flags_come_with_it():
    params, twins = parameters(), parameters()
    theirs, ours = fastai.Adam(groups(params), lr=0.1), fusedopt.Adam(groups(twins), lr=0.5)
    theirs.set_hyper("lr", slice(1e-3, 1e-1))
    theirs.set_hyper("mom", L(0.7, 0.8))
    theirs.state[params[2]]["do_wd"] = False
    train_any(theirs, params, 2)
    saved = theirs.state_dict()
    before = copy.deepcopy(saved)
    ours.load_state_dict(saved)
    assert [h["lr"] for h in ours.hypers] == [1e-3, 1e-1]
    assert [g["betas"] for g in ours.param_groups] == [(0.7, 0.99), (0.8, 0.99)]
    assert [ours.state[p].get("do_wd") for p in twins] == [None, None, False, None]
    assert [ours.state[p]["step"] for p in twins] == [2] * 4
    train(ours, 3)
    for old, new in zip(before["state"], saved["state"], strict=True):
        assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in ("grad_avg", "sqr_avg"))


def test_a_fastai_checkpoint_before_the_first_step_starts_again():
    ours = fusedopt.Adam(parameters(), lr=0.5)
    train(ours, 2)
    ours.load_state_dict(fastai.Adam(parameters(), lr=0.1).state_dict())
    assert not ours.state and ours.hypers[0]["lr"] == 0.1


def test_fastais_own_adam_loads_into_adamw_here():
    goes_on(
        partial(fastai.Adam, lr=0.1, eps=1e-8, wd=0.1),
        partial(fusedopt.optim.AdamW, lr=0.1, betas=(0.9, 0.99), weight_decay=0.1),
        lambda opt: opt.state_dict(),
        tolerance=2e-6,
    )


# --
# torch.optim, from and to the optimizers with fastai's names

TORCH = {
    "SGD": (dict(lr=0.1, mom=0.9, decouple_wd=False), "SGD", dict(lr=0.1, momentum=0.9)),
    "RMSProp": (dict(lr=0.01, wd=0.1, decouple_wd=False), "RMSprop", dict(lr=0.01, weight_decay=0.1)),
    "Adam": (dict(lr=0.1, wd=0.1), "AdamW", dict(lr=0.1, betas=(0.9, 0.99), eps=1e-5, weight_decay=0.1)),
    "RAdam": (dict(lr=0.1, eps=0.0), "RAdam", dict(lr=0.1, betas=(0.9, 0.99), eps=0.0)),
}


@pytest.mark.parametrize("here_first", [True, False], ids=["to torch", "from torch"])
@pytest.mark.parametrize("name", TORCH)
def test_named_optimizers_exchange_with_the_matching_class_of_torch(name, here_first):
    kwargs, peer, peer_kwargs = TORCH[name]
    ours, theirs = (
        partial(getattr(fusedopt, name), **kwargs),
        partial(getattr(torch.optim, peer), **peer_kwargs),
    )
    first, second = (ours, theirs) if here_first else (theirs, ours)
    a, b = goes_on(first, second, lambda opt: through_a_file(opt.state_dict()), tolerance=1e-5)
    here, there = (a, b) if here_first else (b, a)
    mine, its = here.state_dict()["state"][0], there.state_dict()["state"][0]
    assert mine.keys() == its.keys()
    assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in its.items()}


def peer_rms(centered):
    return partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=centered)


MOMENTUM = {
    "torch to fastai's meaning": (peer_rms(False), fusedopt.RMSProp, "momentum_buffer"),
    "torch centered to fastai's meaning": (peer_rms(True), fusedopt.RMSProp, "momentum_buffer"),
    "fastai to torch's meaning": (partial(fastai.RMSProp, mom=0.9), fusedopt.optim.RMSprop, "grad_avg"),
    "here to torch's meaning": (partial(fusedopt.RMSProp, mom=0.9), fusedopt.optim.RMSprop, "grad_avg"),
}


@pytest.mark.parametrize("how", MOMENTUM)
def test_rmsprops_momentum_is_not_taken_for_what_it_is_not(how):
    first, second, lost = MOMENTUM[how]
    params, twins = parameters(), parameters()
    a = first(params, lr=0.01) if "torch" not in how.split()[0] else first(params)
    b = second(twins, lr=0.01, **{"mom" if second is fusedopt.RMSProp else "momentum": 0.9})
    train_any(a, params, 3)
    with pytest.warns(UserWarning, match=f"{lost} cannot be used"):
        b.load_state_dict(a.state_dict())
    square = a.state[params[1]].get("square_avg", a.state[params[1]].get("sqr_avg"))
    assert torch.equal(b.state[twins[1]]["square_avg"], square)
    assert not {"momentum_buffer", "grad_avg"} & b.state[twins[1]].keys()
    train(b, 2)


def test_what_fastai_has_no_name_for_is_left_out_with_a_warning():
    opt = fusedopt.optim.Adam(parameters(), amsgrad=True)
    train(opt, 1)
    with pytest.warns(UserWarning, match="max_sqr_avg"):
        state = opt.to_fastai_state_dict()["state"]
    assert {k for s in state for k in s} == {"grad_avg", "sqr_avg", "step"}
    rms = fusedopt.optim.RMSprop(parameters(), momentum=0.9)
    train(rms, 1)
    with pytest.warns(UserWarning, match="momentum_buffer"):
        rms.to_fastai_state_dict()


def test_slow_weights_without_lookahead_are_left_out_with_a_warning():
    params = parameters()
    theirs = fastai.Lookahead(fastai.SGD(params, lr=0.1))
    train_any(theirs, params, 1)
    with pytest.warns(UserWarning, match="slow_weights"):
        fusedopt.SGD(parameters(), lr=0.1).load_state_dict(theirs.state_dict())


# --
# What torch's schema has no place for


def test_flags_and_freezing_are_saved_and_restored():
    opt = fusedopt.Adam(groups(parameters()), lr=0.1)
    params = list(itertools.chain(*opt.param_lists))
    opt.state[params[0]]["force_train"] = True
    opt.state[params[2]]["do_wd"] = False
    opt.freeze_to(1)
    train(opt, 1)
    saved = through_a_file(opt.state_dict())
    other = fusedopt.Adam(groups(parameters()), lr=0.1)
    twins = list(itertools.chain(*other.param_lists))
    other.state[twins[3]]["do_wd"] = False  # the checkpoint knows better
    other.load_state_dict(saved)
    flags = [{k: v for k, v in other.state[p].items() if k in ("do_wd", "force_train")} for p in twins]
    assert flags == [{"force_train": True}, {}, {"do_wd": False}, {}]
    assert other.frozen_idx == 1
    torch.optim.AdamW(groups_of(parameters()), lr=0.1).load_state_dict(saved)


def groups_of(params):
    return [{"params": ps} for ps in groups(params)]


def test_without_flags_there_is_nothing_but_torchs_schema():
    opt = fusedopt.Adam(parameters(), lr=0.1)
    train(opt, 1)
    assert opt.state_dict().keys() == {"state", "param_groups"}


# --
# Hooks, sources, failures


def test_hooks_see_torchs_schema_and_fire_once():
    opt = fusedopt.Adam(parameters(), lr=0.1)
    train(opt, 1)
    opt.state[opt.param_lists[0][0]]["do_wd"] = False
    seen = []
    opt.register_state_dict_pre_hook(lambda o: seen.append(("pre", type(o.state).__name__)))
    opt.register_state_dict_post_hook(lambda o, sd: seen.append(("post", sorted(sd))))
    opt.register_load_state_dict_pre_hook(lambda o, sd: seen.append(("load pre", sorted(sd))))
    opt.register_load_state_dict_post_hook(lambda o: seen.append(("load post", o.state[first(o)]["step"])))
    keys = ["fusedopt", "param_groups", "state"]
    opt.load_state_dict(opt.state_dict())
    assert seen == [("pre", "State"), ("post", keys), ("load pre", keys), ("load post", 1)]


def first(opt):
    return opt.param_groups[0]["params"][0]


def test_what_a_hook_returns_is_what_counts():
    opt, other = fusedopt.Adam(parameters(), lr=0.1), fusedopt.Adam(parameters(), lr=0.1)
    train(opt, 3)
    saved = opt.state_dict()
    other.register_load_state_dict_pre_hook(lambda o, sd: saved)
    other.load_state_dict(fastai.SGD(parameters(), lr=0.1).state_dict() | {"nonsense": 1})
    assert other.state[first(other)]["step"] == 3
    opt.register_state_dict_post_hook(lambda o, sd: {"replaced": sd})
    assert opt.state_dict().keys() == {"replaced"}


def wrong_groups(sd):
    sd["param_groups"] = sd["param_groups"] * 2


def wrong_shape(sd):
    sd["state"][3]["exp_avg"] = torch.zeros(7, 7)


def wrong_hyper(sd):
    sd["hypers"] = [dict(lr=-1.0)]


def too_few(sd):
    sd["state"] = sd["state"][:2]


BAD = {
    wrong_groups: (fusedopt.Adam, "2 parameter groups"),
    wrong_shape: (fusedopt.Adam, "parameter 3 of group 0"),
    wrong_hyper: (fastai.Adam, "lr: -1.0 is negative"),
    too_few: (fastai.Adam, "2 parameters"),
}


@pytest.mark.parametrize("damage", BAD, ids=lambda f: f.__name__)
def test_a_checkpoint_that_does_not_fit_changes_nothing(damage):
    make, message = BAD[damage]
    params = parameters()
    source = make(params, lr=0.3)
    train_any(source, params, 1)
    saved = copy.copy(source.state_dict())
    damage(saved)
    opt = fusedopt.Adam(parameters(), lr=0.1)
    train(opt, 2)
    before, hypers, live = copy.deepcopy(dict(opt.state)), dict(opt.hypers[0]), opt.state
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert opt.state is live and dict(opt.hypers[0]) == hypers
    for old, new in zip(before.values(), live.values(), strict=True):
        assert old.keys() == new.keys() and all(
            torch.equal(torch.as_tensor(old[k]), torch.as_tensor(new[k])) for k in old
        )
    train(opt, 1)


def test_a_checkpoint_does_not_decide_how_to_run():
    source, opt = torch.optim.AdamW(parameters(), foreach=True), fusedopt.optim.AdamW(parameters())
    train(source, 1)
    saved = source.state_dict()
    saved["param_groups"][0]["capturable"] = True  # as of a run on a GPU
    opt.load_state_dict(saved)
    group = opt.param_groups[0]
    assert (group["foreach"], group["capturable"]) == (None, False)
    train(opt, 1)


def test_a_step_count_in_the_group_is_every_parameters_own():
    """As apex saves it. A hyperparameter of that name would stand before the state's count for good."""
    source, opt, other = (fusedopt.optim.AdamW(parameters()) for _ in range(3))
    train(source, 3)
    saved = source.state_dict()
    other.load_state_dict(copy.deepcopy(saved))
    for state in saved["state"].values():
        del state["step"]
    saved["param_groups"][0]["step"] = 3
    opt.load_state_dict(saved)
    assert "step" not in opt.param_groups[0]
    train(opt, 2, start=3), train(other, 2, start=3)
    assert_equal(opt.param_groups[0]["params"], other.param_groups[0]["params"])
    assert opt.state[first(opt)]["step"] == 5


def test_strings_and_nested_state_survive():
    opt, other = adam(parameters()), adam(parameters())
    train(opt, 1)
    opt.state[first(opt)].update(kind="row", parts={"step": torch.ones(2), "sizes": [1, 2]})
    other.load_state_dict(opt.state_dict())
    loaded = other.state[first(other)]
    assert loaded["kind"] == "row" and loaded["parts"]["sizes"] == [1, 2]
    assert torch.equal(loaded["parts"]["step"], torch.ones(2))
    assert loaded["parts"]["step"] is not opt.state[first(opt)]["parts"]["step"]


def test_state_of_no_parameter_is_kept_as_torch_keeps_it():
    opt, stranger = adam(parameters()), nn.Parameter(torch.ones(2))
    opt.load_state_dict(opt.state_dict() | {"state": {"extra": {"x": 1}}})
    assert opt.state["extra"] == {"x": 1} and stranger not in opt.state


def test_mutation_a_conversion_that_forgets_the_momentum_is_noticed(monkeypatch):
    monkeypatch.setattr(
        "fusedopt.optimizer.checkpoint._copied", lambda key, value, p: torch.zeros_like(value)
    )
    with pytest.raises((AssertionError, TypeError)):
        goes_on(
            partial(fastai.SGD, lr=0.1, mom=0.9),
            partial(fusedopt.SGD, lr=0.1, mom=0.9),
            lambda o: o.state_dict(),
        )


def test_checkpoints_for_fastai_share_nothing():
    opt = fusedopt.Adam(parameters(), lr=0.1)
    train(opt, 2)
    saved = opt.to_fastai_state_dict()
    params, twins = parameters(), parameters()
    a, b = fastai.Adam(params, lr=0.1), fastai.Adam(twins, lr=0.1)
    a.load_state_dict(saved), b.load_state_dict(opt.to_fastai_state_dict())
    train_any(a, params, 2), train_any(b, twins, 2)
    assert_equal(params, twins)
    assert opt.state[first(opt)]["step"] == 2


# --
# Checkpoints that cannot be continued


def tampered(key, value):
    def change(state):
        if value is GONE:
            del state[key]
        else:
            state[key] = value

    return change


GONE = object()
UNFIT = {
    "a negative step": tampered("step", torch.tensor(-5.0)),
    "a step that is NaN": tampered("step", torch.tensor(float("nan"))),
    "an infinite step": tampered("step", float("inf")),
    "half a step": tampered("step", 2.5),
    "a step in words": tampered("step", "3"),
    "a list of steps": tampered("step", [3]),
    "no step": tampered("step", GONE),
    "None for the step": tampered("step", None),
    "no average": tampered("exp_avg", GONE),
    "no second average": tampered("exp_avg_sq", GONE),
    "None for an average": tampered("exp_avg", None),
    "a list for an average": tampered("exp_avg", [0.0, 0.0, 0.0]),
    "a number for an average": tampered("exp_avg", 0.0),
    "one number for an average": tampered("exp_avg", torch.tensor(0.0)),
    "an average of integers": tampered("exp_avg", torch.zeros(3, dtype=torch.int64)),
    "a key that is no name": tampered(7, 1.0),
}


def stepped_adam(make, steps=3):
    p = nn.Parameter(torch.ones(3))
    opt = make([p])
    for t in range(steps):
        p.grad = torch.full((3,), t + 1.0)
        opt.step()
    return p, opt


def refuses(opt, p, saved, match="loaded state dict"):
    before = (
        p.detach().clone(),
        copy.deepcopy(dict(opt.state[p])),
        copy.deepcopy(opt.param_groups[0]["betas"]),
    )
    with pytest.raises(ValueError, match=match):
        opt.load_state_dict(saved)
    after = p.detach().clone(), dict(opt.state[p]), opt.param_groups[0]["betas"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("make", [fusedopt.optim.AdamW, fusedopt.optim.NAdam, partial(fusedopt.Adam, lr=0.1)])
@pytest.mark.parametrize("damage", UNFIT)
def test_state_that_cannot_be_continued_is_refused_and_changes_nothing(damage, make):
    p, opt = stepped_adam(make)
    saved = copy.deepcopy(opt.state_dict())
    UNFIT[damage](saved["state"][0])
    refuses(opt, p, saved)


@pytest.mark.parametrize("key", ["0", 9, torch.ones(1)], ids=["a string", "no parameter's", "a tensor"])
def test_state_under_an_id_that_no_group_has_is_refused(key):
    p, opt = stepped_adam(fusedopt.optim.AdamW)
    saved = opt.state_dict()
    refuses(opt, p, saved | {"state": {key: saved["state"][0]}}, "no group lists a parameter of that id")


@pytest.mark.parametrize(
    "change",
    [{"state": [1]}, {"state": {0: None}}, {"param_groups": None}, {"param_groups": [{}]}, {"fusedopt": 3},
     {"fusedopt": {"flags": {}, "frozen_idx": -1}}],
)  # fmt: skip
def test_what_has_not_the_form_of_a_state_dict_is_refused(change):
    p, opt = stepped_adam(fusedopt.optim.AdamW)
    refuses(opt, p, opt.state_dict() | change)


def test_another_optimizers_state_is_refused():
    source = stepped_adam(partial(fusedopt.optim.SGD, momentum=0.9))[1]
    p, opt = stepped_adam(fusedopt.optim.AdamW)
    saved = source.state_dict() | {"param_groups": opt.state_dict()["param_groups"]}
    refuses(opt, p, saved, "missing.*'momentum_buffer'")


def test_what_a_rule_makes_later_may_be_missing():
    p, opt = stepped_adam(partial(fusedopt.optim.SGD, momentum=0.9))
    for state in ({}, {"momentum_buffer": None}, {"note": "x"}):
        opt.load_state_dict(opt.state_dict() | {"state": {0: state}})
        p.grad = torch.ones(3)
        opt.step()
        assert isinstance(opt.state[p]["momentum_buffer"], torch.Tensor)


@pytest.mark.parametrize("extra", [[1], "x", None, {"a": 1}, torch.ones(3), 2.0], ids=str)
@pytest.mark.parametrize("key", ["note", "p", "dampening", "lr"])
def test_entries_more_are_carried_and_change_nothing(key, extra):
    p, opt = stepped_adam(fusedopt.optim.AdamW)
    q, twin = stepped_adam(fusedopt.optim.AdamW)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0][key] = extra
    opt.load_state_dict(saved)
    for each, x in ((opt, p), (twin, q)):
        x.grad = torch.ones(3)
        each.step()
    assert torch.equal(p, q)
    assert str(opt.state_dict()["state"][0][key]) == str(extra)


def test_a_users_own_step_may_be_anything():
    def halved(p, lr, step=1.0, **kwargs):
        p.data.sub_(p.grad, alpha=lr * step)
        return {"step": -step / 2}

    make = partial(fusedopt.Optimizer, cbs=halved, lr=0.1)
    (p, opt), (q, other) = stepped_adam(make), stepped_adam(make, 1)
    other.load_state_dict(opt.state_dict())
    assert other.state[q]["step"] == opt.state[p]["step"] == -0.125


def test_a_wrappers_count_in_the_group_stays_there():
    p, opt = stepped_adam(fusedopt.optim.AdamW)
    opt.param_groups[0]["step"] = 17
    opt.load_state_dict(opt.state_dict())
    assert opt.state[p]["step"] == 3 and opt.param_groups[0]["step"] == 17


def test_freezing_is_restored_with_its_effect():
    lists = [[nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2)]
    twins = copy.deepcopy(lists)
    opt, other = fusedopt.Adam(lists, lr=0.1), fusedopt.Adam(twins, lr=0.1)
    opt.state[lists[0][0]]["force_train"] = True
    opt.freeze_to(1)
    other.load_state_dict(opt.state_dict())
    assert [p.requires_grad for p in itertools.chain(*twins)] == [True, False, True, True]
    opt.unfreeze()
    other.load_state_dict(opt.state_dict())
    assert other.frozen_idx == 0 and all(p.requires_grad for p in itertools.chain(*twins))


def test_loading_leaves_requires_grad_alone_if_nothing_is_frozen_or_thawed():
    first, second = ([nn.Parameter(torch.ones(3))] for _ in range(2))
    opt = fusedopt.Adam([first, second], lr=0.1)
    opt.state[second[0]]["do_wd"] = False
    first[0].requires_grad_(False)
    opt.load_state_dict(opt.state_dict())
    assert [first[0].requires_grad, second[0].requires_grad] == [False, True]


@pytest.mark.parametrize(
    "options", [dict(capturable=True), dict(amp_fused=True), dict(capturable=True, amp_fused=True)]
)
@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("SGD", dict(momentum=0.9)),
        ("Adam", dict(amsgrad=True)),
        ("NAdam", {}),
        ("RMSprop", {}),
        ("Adamax", {}),
    ],
)
def test_numbers_on_the_device_go_on_in_torchs_optimizer(name, kwargs, options):
    p, ours = stepped_adam(partial(getattr(fusedopt.optim, name), **kwargs, **options))
    q, theirs = stepped_adam(partial(getattr(torch.optim, name), **kwargs))
    r, fresh = stepped_adam(partial(getattr(torch.optim, name), **kwargs), 0)
    r.data.copy_(p.data)
    fresh.load_state_dict(copy.deepcopy(ours.state_dict()))
    for x, opt in ((p, ours), (q, theirs), (r, fresh)):
        for _ in range(2):
            x.grad = torch.ones(3)
            opt.step()
    torch.testing.assert_close([p, r], [q, q])
    assert not any(key.startswith("started") for key in ours.state_dict()["state"][0])


@pytest.mark.parametrize(
    "options", [{}, dict(flatten_optimizer_state_dict=True), dict(full_state_dict=True)], ids=str
)
@pytest.mark.parametrize("make", [fusedopt.optim.AdamW, partial(fusedopt.Adam, lr=0.1)])
def test_distributed_checkpoints_of_a_parameter_that_never_trained(make, options):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(strict=False, **options)
    models = [nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 1)}) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [make(model.parameters()) for model in models]

    def train(i, steps):
        for _ in range(steps):
            models[i]["used"](torch.ones(1, 2)).sum().backward()
            opts[i].step()
            opts[i].zero_grad()

    train(0, 3)
    models[1].load_state_dict(models[0].state_dict())
    set_optimizer_state_dict(
        models[1], opts[1], get_optimizer_state_dict(models[0], opts[0], options=options), options=options
    )
    train(0, 2), train(1, 2)
    assert_equal(list(models[1].parameters()), list(models[0].parameters()))
    assert opts[1].state[models[1]["used"].weight]["step"] == 5
