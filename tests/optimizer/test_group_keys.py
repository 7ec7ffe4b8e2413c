"""What is in a param group and no hyperparameter of the rule: carried and saved, and nobody is handed it."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fusedopt
from fusedopt import optim
from fusedopt.optimizer.groups import ParamGroups

TORCHS = {
    "SGD": dict(momentum=0.9),
    "Adam": {},
    "AdamW": {},
    "RMSprop": dict(momentum=0.9),
    "RAdam": {},
    "NAdam": {},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
}
FASTAIS = {
    "SGD": lambda ps: fusedopt.SGD(ps, lr=0.1, mom=0.9),
    "Adam": lambda ps: fusedopt.Adam(ps, lr=0.1),
    "RMSProp": lambda ps: fusedopt.RMSProp(ps, lr=0.1),
    "RAdam": lambda ps: fusedopt.RAdam(ps, lr=0.1),
    "Lamb": lambda ps: fusedopt.Lamb(ps, lr=0.1),
    "Lookahead": lambda ps: fusedopt.Lookahead(fusedopt.SGD(ps, lr=0.1), k=2),
}
FOREIGN = {
    "step": 5, "grad_avg": 1.0, "sqr_avg": 2.0, "exp_avg": 1.0, "momentum_buffer": 1.0, "square_avg": 3.0, "slow": 1.0,
    "mu_product": 0.3, "p": 1.0, "self": 2, "do_wd": False, "lr_mult": 0.5, "max_momentum": 0.95, "name": "head",
    "shape": torch.ones(3), "list": [1, 2],
}  # fmt: skip
OFTEN = ("dampening", "amsgrad", "centered", "nesterov")
"""Flags of other rules of torch's."""


def construct(make, params, key, value):
    return make([{"params": params[:1], key: value}, {"params": params[1:]}])


def assign(make, params, key, value):
    opt = make([{"params": params[:1]}, {"params": params[1:]}])
    opt.param_groups[0][key] = value
    return opt


def add(make, params, key, value):
    opt = make([{"params": params[1:]}])
    opt.add_param_group({"params": params[:1], key: value})
    return opt


def load(make, params, key, value):
    opt = make([{"params": params[:1]}, {"params": params[1:]}])
    saved = opt.state_dict()
    saved["param_groups"][0][key] = value
    opt.load_state_dict(saved)
    return opt


WAYS = {"constructed": construct, "assigned": assign, "added": add, "loaded": load}


def trained(make, way, key, value):
    """Two parameters after five steps: from the fourth on they are warm. A number is counted up, as a wrapper would."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((3,), 2.0))]
    opt = WAYS[way](make, params, key, value)
    group = next(g for g in opt.param_groups if key in g)
    for t in range(5):
        for p in params:
            p.grad = torch.tensor([1.0, -2.0, 0.3]) * (t + 1)
        opt.step()
        if isinstance(value, int):
            group[key] += 1
    assert key in group and any(key in g for g in opt.state_dict()["param_groups"])
    return params


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TORCHS)
def test_torchs_optimizers_ignore_foreign_keys_as_torch_does(name, way):
    ours, theirs = (
        lambda ps, face=face: getattr(face, name)(ps, lr=0.1, **TORCHS[name]) for face in (optim, torch.optim)
    )
    defaults = theirs([nn.Parameter(torch.ones(1))]).defaults
    for key, value in {**FOREIGN, **dict.fromkeys(OFTEN, True)}.items():
        if key not in defaults:
            for p, q in zip(trained(ours, way, key, value), trained(theirs, way, key, value), strict=True):
                torch.testing.assert_close(p, q, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FASTAIS)
def test_fastais_optimizers_never_take_state_from_a_group(name, way):
    expected = trained(FASTAIS[name], way, "nobody_takes_this", 1.0)
    for key, value in FOREIGN.items():
        for p, q in zip(trained(FASTAIS[name], way, key, value), expected, strict=True):
            assert torch.equal(p, q), key


def scaled(p, lr, factor=1.0, shift=None, seen=None, **kwargs):
    """Takes what a group may have, named and through ``kwargs``; keeps ``seen``."""
    p.data.sub_(p.grad, alpha=lr * factor * kwargs.get("by_name", 1.0))
    seen = torch.zeros_like(p) if seen is None else seen
    return dict(seen=seen)


def stepped(keys, cbs=(scaled,), state=None):
    p = nn.Parameter(torch.ones(2))
    opt = fusedopt.Optimizer([p], list(cbs), lr=0.1)
    opt.param_groups[0].update(keys)
    opt.state[p].update(state or {})
    p.grad = torch.ones(2)
    opt.step()
    return round(p[0].item(), 6)


def test_what_a_callback_takes_it_gets():
    assert stepped({}) == 0.9
    assert stepped({"factor": 2.0}) == 0.8
    assert stepped({"by_name": 3.0}) == 0.7
    assert stepped({"seen": 7.0}) == 0.9  # it is returned, so it is state
    assert stepped({"shift": 1.0, "kwargs": 2}) == 0.9


def test_a_hyperparameter_of_the_rule_wins_over_state_as_in_fastai():
    assert stepped({"lr": 0.2}, state={"lr": 0.5}) == 0.8


def test_no_note_in_the_state_is_an_argument():
    assert stepped({}, state={"p": 1.0}) == 0.9
    p = nn.Parameter(torch.ones(2))
    opt = optim.Adam([p], lr=0.1)
    opt.state[p]["dampening"] = False  # bound by a partial
    p.grad = torch.ones(2)
    opt.step()
    assert round(p[0].item(), 6) == 0.9 and opt.state[p]["dampening"] is False


def test_what_set_hyper_sets_can_be_read_back():
    opt = fusedopt.Adam([nn.Parameter(torch.ones(2))], lr=0.1)
    opt.set_hyper("foo", 1)
    assert opt.hypers[0]["foo"] == 1 and opt.param_groups[0]["foo"] == 1


def messages(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught]


def train(opt, steps=3):
    for _ in range(steps):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        opt.step()


@pytest.mark.parametrize(
    "key, meant", {"weigth_decay": "weight_decay", "momentun": "momentum", "LR": "lr"}.items()
)
@pytest.mark.parametrize(
    "make", [lambda g: fusedopt.SGD(g, lr=0.1, mom=0.9), lambda g: optim.SGD(g, momentum=0.9)]
)
def test_a_misspelt_key_is_said_once(make, key, meant):
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opts = []
    said = messages(lambda: opts.append(make([{"params": [a], key: 0.1}, {"params": [b], key: 0.2}])))
    assert len(said) == 1 and repr(key) in said[0] and repr(meant) in said[0]
    assert messages(lambda: train(opts[0])) == []
    late = make([a])
    late.param_groups[0][key] = 0.1
    said = messages(lambda: train(late))
    assert len(said) == 1 and repr(key) in said[0]


def test_other_libraries_keys_are_no_misspellings():
    keys = ("lr_mult", "lr_scale", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "name",
            "weight_decay_mult", "wd_mult", "group_name", "fix_lr", "step", "param_group_name")  # fmt: skip
    group = {"params": [nn.Parameter(torch.ones(2))], **dict.fromkeys(keys, 1)}
    assert messages(lambda: train(optim.SGD([group], lr=0.1))) == []
    assert messages(lambda: train(fusedopt.Adam([group], lr=0.1))) == []


@pytest.mark.parametrize(
    "one",
    [
        torch.tensor([0.02]),
        np.array([0.02]),
        np.array([[0.02]]),
        [0.02],
        (0.02,),
        torch.tensor(0.02),
        np.array(0.02),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [optim.SGD, fusedopt.SGD])
def test_a_list_of_one_is_a_default(make, one):
    a, b = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    opt = make([{"params": [a], "lr": 0.5}, {"params": [b]}], lr=one)
    assert [h["lr"] for h in opt.hypers] == pytest.approx([0.5, 0.02])
    train(opt, 1)
    assert [a[0].item(), b[0].item()] == pytest.approx([-0.5, -0.02])


def test_lists_of_several_are_one_per_group_and_of_none_are_refused():
    groups = [[nn.Parameter(torch.zeros(2))] for _ in range(2)]
    assert [h["lr"] for h in fusedopt.SGD(groups, lr=[0.1, 0.2]).hypers] == [0.1, 0.2]
    for empty in ([], np.zeros(0), torch.zeros(0)):
        with pytest.raises(ValueError, match="lr is empty"):
            fusedopt.SGD(groups, lr=empty)


@pytest.mark.parametrize(
    "make", [lambda p: fusedopt.SGD(p, lr=0.1), lambda p: fusedopt.Optimizer(p, scaled, lr=0.1)]
)
def test_a_lone_tensor_is_a_list_of_one_as_in_fastai(make):
    p = nn.Parameter(torch.ones(3))
    opt = make(p)
    train(opt, 1)
    assert opt.param_lists == [[p]] and round(p[0].item(), 6) == 0.9


@pytest.mark.parametrize("name", TORCHS)
def test_a_lone_tensor_is_refused_where_torch_refuses_it(name):
    for face in (torch.optim, optim):
        with pytest.raises(TypeError, match=r"params argument .* should be an iterable of Tensors or dicts"):
            getattr(face, name)(nn.Parameter(torch.ones(3)))


# --
# A parameter listed more than once


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("name", TORCHS)
def test_a_parameter_is_stepped_once_per_listing_as_by_torch(name, times):
    p, q, other, twin = (nn.Parameter(torch.ones(n)) for n in (5, 5, 2, 2))
    opts = []
    for face, params in ((optim, [p, other]), (torch.optim, [q, twin])):
        with pytest.warns(UserWarning, match="duplicate parameters"):
            opts.append(getattr(face, name)([*params, *params[:1] * (times - 1)], lr=0.1, **TORCHS[name]))
    for _ in range(6):
        for x in (p, q, other, twin):
            x.grad = torch.arange(float(len(x)))
        for opt in opts:
            opt.step()
    torch.testing.assert_close([p, other], [q, twin])
    assert float(opts[0].state[p].get("step", 0)) == float(opts[1].state[q].get("step", 0))
    assert (
        opts[0].state_dict()["param_groups"][0]["params"] == opts[1].state_dict()["param_groups"][0]["params"]
    )


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_norm_over_a_parameter_listed_twice_is_refused():
    p = nn.Parameter(torch.ones(3))
    opt = optim.SGD([p, p], lr=0.1, max_grad_norm=1.0)
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="listed twice"):
        opt.step()
    assert torch.equal(p, torch.ones(3))


# --
# Entries of opt.state that belong to no parameter

NOTES = {"epoch": 3, "parts": {"a": 1, "b": torch.ones(2)}, 2026: "x", ("a", 1): [1], "tensor": torch.ones(2)}


@pytest.mark.parametrize("make", [optim.Adam, fusedopt.Adam, optim.SGD])
def test_state_of_no_parameter_survives(make):
    p = nn.Parameter(torch.ones(3))
    opt = make([p], lr=0.1)
    opt.state.update(NOTES)
    train(opt, 4)
    fresh = make([nn.Parameter(torch.ones(3))], lr=0.1)
    fresh.load_state_dict(opt.state_dict())
    assert fresh.state["parts"]["b"] is not opt.state["parts"]["b"]
    theirs = torch.optim.Adam([nn.Parameter(torch.ones(3))], lr=0.1)
    theirs.load_state_dict(opt.state_dict())
    opt.clear_state()
    for each in (opt, fresh, theirs, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        kept = {k: v for k, v in each.state.items() if not isinstance(k, torch.Tensor)}
        assert kept.keys() == NOTES.keys() and kept["epoch"] == 3 and kept["parts"]["a"] == 1
        assert torch.equal(kept["parts"]["b"], torch.ones(2)) and kept[("a", 1)] == [1]
    assert not opt.state  # nothing of a parameter's is there
    opt.explain(), opt.all_params(), opt.to_fastai_state_dict()


def test_mutation_a_key_that_is_handed_on_is_noticed(monkeypatch):
    monkeypatch.setattr(ParamGroups, "handed", lambda groups, group: groups.names.of_group(group))
    with pytest.raises(TypeError, match="multiple values"):
        stepped({"p": 1.0})
