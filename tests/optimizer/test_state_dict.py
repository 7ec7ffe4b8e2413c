"""State dicts: torch.optim's schema, safe to load, nothing shared, and training goes on where it was."""

import copy
import io
from functools import partial

import factories
import numpy as np
import pytest
import torch
from factories import assert_equal
from torch import nn

import fusedopt
from fusedopt import adam_step, average_grad, average_sqr_grad, optim, step_stat, table, weight_decay

SHAPES = ((4,), (3, 5), (), (2, 2))
VARIANTS = [pytest.param(r, v, id=f"{r.face}-{r.name}-{v.id}") for r in table.rows() for v in r.variants]
ADAM = [weight_decay, partial(average_grad, dampening=True), average_sqr_grad, step_stat, adam_step]


parameters = partial(factories.parameters, SHAPES)


def train(opt, steps, start=0):
    """Steps ``start`` to ``start + steps`` of one and the same training."""
    for t in range(start, start + steps):
        gen = torch.Generator().manual_seed(100 + t)
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)
        opt.step()


def copied(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def through_a_file(state_dict, **options):
    """As a checkpoint travels: saved, and loaded without trusting it."""
    file = io.BytesIO()
    torch.save(state_dict, file, **options)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --
# Round trips


THIN = ((7, 1), (1, 7), (1, 1), (4, 1, 3), (8, 4, 1, 1), (1, 1, 3, 3), (5, 1, 1))
BY_PARTS = ("Adafactor", "CAME", "AdamMini", "SM3", "NovoGrad", "SOAP", "Shampoo", "Muon")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("rule", BY_PARTS)
def test_state_of_tensors_with_dimensions_of_one_is_taken_back(rule):
    """Rows and columns of those cannot be told from single numbers, nor from the whole."""
    params = [nn.Parameter(torch.randn(shape)) for shape in THIN]
    opt = getattr(fusedopt.rules, rule)(params)
    train(opt, 2)
    other = getattr(fusedopt.rules, rule)(copied(params))
    other.load_state_dict(through_a_file(opt.state_dict()))
    mine, theirs = opt.state_dict()["state"], other.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    for i, state in mine.items():
        assert state.keys() == theirs[i].keys()
        assert_equal(*([v for v in s.values() if isinstance(v, torch.Tensor)] for s in (state, theirs[i])))


def round_trip(make):
    params = parameters()
    opt = make(params)
    train(opt, 8)  # beyond RAdam's sixth and Lookahead's k-th
    twins = copied(params)
    other = make(twins)
    other.load_state_dict(through_a_file(opt.state_dict()))
    for p, q in zip(params, twins, strict=True):
        s, t = opt.state[p], other.state[q]
        assert s.keys() == t.keys()
        for k in s:
            assert type(s[k]) is type(t[k]), k
            assert torch.equal(s[k], t[k]) if isinstance(s[k], torch.Tensor) else s[k] == t[k], k
    train(opt, 7, start=8), train(other, 7, start=8)
    return params, twins, opt, other


@pytest.mark.parametrize(("row", "variant"), VARIANTS)
def test_every_named_optimizer_goes_on_after_a_round_trip(row, variant, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_BACKEND", "reference")
    params, twins, *_ = round_trip(lambda ps: row.factory(ps, **variant.kwargs))
    assert_equal(params, twins)


@pytest.mark.parametrize(
    "make", [fusedopt.ranger, fusedopt.Larc, fusedopt.optim.NAdam], ids=lambda f: f.__name__
)
def test_a_round_trip_compiles_nothing_new(make, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_BACKEND", "cpp")
    params, twins, opt, other = round_trip(lambda ps: make(ps, lr=0.01))
    assert_equal(params, twins)
    mine = {c.source_path for c in opt.explain().compiled}
    assert {c.source_path for c in other.explain().compiled} <= mine


def test_mutation_a_lost_moment_is_noticed(monkeypatch):
    load = fusedopt.Optimizer.load_state_dict

    def forgetful(self, state_dict):
        load(self, state_dict)
        for state in self.state.values():
            state["exp_avg"].zero_()

    monkeypatch.setattr(fusedopt.Optimizer, "load_state_dict", forgetful)
    with pytest.raises(AssertionError):
        round_trip(lambda ps: fusedopt.Adam(ps, lr=0.1))


# --
# To and from torch.optim


def exchange(name, kwargs, ours_first):
    """One half of the training here, the other there; and all of it in torch.optim."""
    ours, theirs = getattr(fusedopt.optim, name), partial(getattr(torch.optim, name), foreach=False)
    first, second = (ours, theirs) if ours_first else (theirs, ours)
    params, expected = parameters(), parameters()
    a, c = first(params, **kwargs), theirs(expected, **kwargs)
    train(a, 8), train(c, 16)
    moved = copied(params)
    b = second(moved, **kwargs)
    b.load_state_dict(through_a_file(a.state_dict()))
    train(b, 8, start=8)
    return moved, expected, b, c


@pytest.mark.parametrize("ours_first", [True, False], ids=["to torch", "from torch"])
@pytest.mark.parametrize("row", table.rows("torch"), ids=lambda r: r.name)
def test_training_moves_between_torch_and_here(row, ours_first, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_BACKEND", "reference")
    moved, expected, b, c = exchange(row.name, row.variants[0].kwargs, ours_first)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)
    ours, theirs = b.state_dict(), c.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    assert [set(s) for s in ours["state"].values()] == [set(s) for s in theirs["state"].values()]
    assert [set(g) for g in ours["param_groups"]] == [set(g) for g in theirs["param_groups"]]


def test_adamw_moves_between_torch_and_the_fused_kernel():
    for ours_first in (True, False):
        moved, expected, b, _ = exchange("AdamW", dict(lr=0.01, amsgrad=True), ours_first)
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)
        if not ours_first:
            assert b.explain().backend == "cpp" and len(b.explain().compiled) == 1


# --
# What is in it


def adam(params, **options):
    return fusedopt.Optimizer(params, ADAM, **dict(lr=0.1, mom=0.9, sqr_mom=0.99, wd=0.1) | options)


def test_the_schema_is_torchs():
    params = parameters()
    opt, peer = fusedopt.optim.AdamW(params), torch.optim.AdamW(parameters())
    for o in (opt, peer):
        train(o, 2)
    ours, theirs = opt.state_dict(), peer.state_dict()
    assert ours.keys() == theirs.keys() and ours["param_groups"] == theirs["param_groups"]
    step = ours["state"][0]["step"]
    assert step.dtype == torch.float32 and step.dim() == 0 and step == 2
    assert opt.state[params[0]]["step"] == 2 and type(opt.state[params[0]]["step"]) is int, (
        "live, it is a number"
    )
    assert ours["state"][1]["exp_avg"] is opt.state[params[1]]["exp_avg"], "as torch's: the live tensors"


def test_flags_stay_out_of_it_and_survive_a_load():
    params, stranger = parameters(), nn.Parameter(torch.zeros(3))
    opt = adam(params)
    opt.state[params[0]]["do_wd"] = False
    opt.state[stranger]["force_train"] = True  # fastai flags parameters the optimizer has never seen
    assert opt.state_dict()["state"] == {}
    train(opt, 1)
    state_dict = opt.state_dict()
    assert set(state_dict["state"]) == {0, 1, 2, 3}
    assert not {"do_wd", "force_train"} & {k for s in state_dict["state"].values() for k in s}
    opt.load_state_dict(state_dict)
    assert opt.state[params[0]]["do_wd"] is False and opt.state[stranger] == {"force_train": True}


def test_numbers_from_numpy_make_no_unsafe_checkpoint():
    opt = adam(parameters())
    opt.set_hyper("lr", np.float64(0.3))
    opt.set_hyper("mom", np.array([0.7]))
    opt.hypers[0]["wd"] = np.float32(0.5)
    train(opt, 1)
    loaded = through_a_file(opt.state_dict(), pickle_protocol=2)  # fastai's
    assert loaded["param_groups"][0]["lr"] == 0.3 and loaded["param_groups"][0]["betas"] == (0.7, 0.99)
    kinds = {type(v) for g in opt.param_groups for k, v in g.items() if k != "params"}
    assert kinds <= {int, float, bool, tuple, type(None)}


def test_making_one_changes_nothing():
    opt = adam(parameters())
    train(opt, 2)
    before, live = copy.deepcopy(dict(opt.state)), opt.state
    opt.state_dict()
    assert opt.state is live and type(opt.state) is type(live)
    for p, (_, old) in zip(opt.state, before.items(), strict=True):
        assert opt.state[p].keys() == old.keys() and opt.state[p]["step"] == old["step"]


# --
# Loading


def test_nothing_is_shared_after_loading():
    params, twins = parameters(), parameters()
    a, b = adam(params), adam(twins)
    train(a, 2)
    state_dict = a.state_dict()
    kept = copy.deepcopy(state_dict)
    b.load_state_dict(state_dict)
    b.load_state_dict(state_dict)  # twice from the same dict
    for p, q in zip(params, twins, strict=True):
        for key in ("grad_avg", "sqr_avg"):
            assert a.state[p][key].data_ptr() != b.state[q][key].data_ptr()
    train(b, 3)
    b.set_hyper("lr", 0.9)
    for i in kept["state"]:
        for key, value in kept["state"][i].items():
            assert torch.equal(value, state_dict["state"][i][key])
    assert kept["param_groups"] == state_dict["param_groups"]
    assert a.hypers[0]["lr"] == 0.1 and a.state[params[0]]["step"] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_loaded_has_the_state_dtype_that_was_asked_for(dtype):
    params = [p for p in parameters() if p.dim()]
    theirs = torch.optim.AdamW(params)
    train(theirs, 2)
    twins = copied(params)
    opt = optim.AdamW(twins, state_dtype=dtype)
    opt.load_state_dict(through_a_file(theirs.state_dict()))
    for p, q in zip(params, twins, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert opt.state[q][key].dtype == dtype
            assert torch.equal(opt.state[q][key], theirs.state[p][key].to(dtype))
        assert opt.state[q]["step"] == 2
    train(opt, 1, start=2)
    assert {opt.state[q]["exp_avg"].dtype for q in twins} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64, None])
def test_state_keeps_its_dtype_and_bits(dtype, state_dtype):
    params = parameters(dtype)
    a = adam(params, state_dtype=state_dtype, backend="reference")
    train(a, 3)
    twins = copied(params)
    b = adam(twins, state_dtype=state_dtype, backend="reference")
    b.load_state_dict(through_a_file(a.state_dict()))
    for p, q in zip(params, twins, strict=True):
        for key in ("grad_avg", "sqr_avg"):
            assert b.state[q][key].dtype == (state_dtype or dtype)
            assert torch.equal(a.state[p][key], b.state[q][key])
    train(a, 2, start=3), train(b, 2, start=3)
    assert_equal(params, twins)


def test_state_of_any_kind_keeps_its_dtype():
    params = parameters(torch.bfloat16)
    opt = adam(params)
    extra = dict(
        codes=torch.arange(15, dtype=torch.uint8).reshape(3, 5),
        flips=torch.ones(3, 5, dtype=torch.int64),
        mask=torch.ones(3, 5, dtype=torch.bool),
        norm=torch.tensor(1e-30, dtype=torch.float32),
        count=7,
        ratio=0.25,
        on=True,
    )
    opt.state[params[1]].update(extra)
    other = adam(parameters(torch.bfloat16))
    other.load_state_dict(through_a_file(opt.state_dict()))
    loaded = other.state[other.param_groups[0]["params"][1]]
    assert loaded.keys() == extra.keys()
    for key, value in extra.items():
        assert type(loaded[key]) is type(value)
        if isinstance(value, torch.Tensor):
            assert loaded[key].dtype == value.dtype and torch.equal(loaded[key], value), key
        else:
            assert loaded[key] == value, key


def test_hyperparameters_come_with_it_and_missing_ones_are_filled():
    a, b = adam(parameters()), adam(parameters(), lr=0.5, wd=0.7)
    a.set_hypers(lr=0.2, mom=0.6)
    state_dict = a.state_dict()
    b.load_state_dict(state_dict)
    assert dict(b.hypers[0]) == dict(a.hypers[0])
    del state_dict["param_groups"][0]["weight_decay"], state_dict["param_groups"][0]["eps"]
    b.load_state_dict(state_dict)
    assert b.hypers[0]["wd"] == 0.7, "this optimizer's default"
    assert set(b.param_groups[0]) - {"params"} == set(b.defaults)
    train(b, 1)


def test_ids_are_opaque():
    """Distributed checkpoints name parameters by strings."""
    a, b = adam(parameters()), adam(parameters())
    train(a, 2)
    state_dict = a.state_dict()
    names = {i: f"layer.{i}.weight" for i in range(4)}
    state_dict["param_groups"][0]["params"] = [names[i] for i in range(4)]
    state_dict["state"] = {names[i]: s for i, s in state_dict["state"].items()}
    b.load_state_dict(state_dict=state_dict)
    params = [[p for group in opt.param_groups for p in group["params"]] for opt in (a, b)]
    for p, q in zip(*params, strict=True):
        assert torch.equal(a.state[p]["sqr_avg"], b.state[q]["sqr_avg"]) and b.state[q]["step"] == 2


def test_a_state_dict_from_before_the_first_step_starts_again():
    """What ``lr_find`` does: save, train with other numbers, load."""
    params, fresh = parameters(), parameters()
    opt, other = adam(params), adam(fresh)
    saved, start = copy.deepcopy(opt.state_dict()), copied(params)
    opt.set_hyper("lr", 3.0)
    train(opt, 4)
    opt.load_state_dict(saved)
    with torch.no_grad():
        for p, s in zip(params, start, strict=True):
            p.copy_(s)
    assert not opt.state and opt.hypers[0]["lr"] == 0.1
    train(opt, 3), train(other, 3)
    assert_equal(params, fresh)


def test_parameters_that_have_not_been_stepped_have_no_entry():
    params = parameters()
    opt = adam(params)
    params[1].grad = torch.ones_like(params[1])
    opt.step()
    assert set(opt.state_dict()["state"]) == {1}
    other = adam(parameters())
    other.load_state_dict(opt.state_dict())
    train(opt, 1), train(other, 1)
    assert [s["step"] for s in other.state.values()] == [2, 1, 1, 1]


def test_counters_that_are_no_whole_numbers_survive():
    opt = fusedopt.optim.NAdam(parameters())
    train(opt, 3)
    product = opt.state[opt.param_groups[0]["params"][0]]["mu_product"]
    other = fusedopt.optim.NAdam(parameters())
    other.load_state_dict(opt.state_dict())
    loaded = other.state[other.param_groups[0]["params"][0]]["mu_product"]
    assert type(loaded) is float and loaded == product, "though torch's is a float32"
    opt.state[opt.param_groups[0]["params"][0]]["step"] = 2**24 + 1
    assert opt.state_dict()["state"][0]["step"] == 2**24 + 1


@pytest.mark.parametrize("into", [True, False], ids=["capturable", "plain"])
@pytest.mark.parametrize(
    "make",
    [
        lambda params, **how: fusedopt.rules.AdamWScheduleFree(params, lr=0.1, **how),
        lambda params, **how: fusedopt.rules.GrokFast(fusedopt.optim.Adam(params, lr=0.1, **how)),
        lambda params, **how: fusedopt.optim.NAdam(params, lr=0.1, **how),
    ],
    ids=["AdamWScheduleFree", "GrokFast", "NAdam"],
)
def test_numbers_that_were_kept_on_the_device_are_loaded(make, into):
    """Also where they are none of torch's."""
    params = parameters()
    opt = make(params, capturable=True)
    train(opt, 4)
    twins = copied(params)
    other = make(twins, capturable=into)
    other.load_state_dict(through_a_file(opt.state_dict()))
    for each in (opt, other):
        train(each, 3, start=4)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("betas", [(0.9,), 0.9, (0.9, 0.99, 0.999)], ids=str)
def test_betas_are_as_many_as_there_are(betas):
    params = parameters()
    opt = fusedopt.optim.AdamW(params, lr=0.1)
    train(opt, 2)
    saved = opt.state_dict()
    saved["param_groups"][0]["betas"] = betas
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"'betas' of a group is .*; here it has 2 numbers"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["betas"] == (0.9, 0.999)
    assert all(map(torch.equal, params, before))
    opt.param_groups[0]["mine"] = (1, 2)
    saved["param_groups"][0].update(betas=(0.8, 0.9), mine=(1, 2, 3))
    opt.load_state_dict(saved)
    assert (opt.param_groups[0]["betas"], opt.param_groups[0]["mine"]) == ((0.8, 0.9), (1, 2, 3))
