"""What code written for torch.optim relies on, side by side with torch.optim's own classes.

Both optimizers get the same calls in the same order; what can be seen from outside must be the same: parameters to
rounding, everything else exactly.
"""

import copy
import inspect
import math
import pickle
import warnings
from collections import defaultdict
from contextlib import nullcontext
from functools import partial

import fastai.optimizer as fastai_optimizer
import numpy as np
import pytest
import torch
from factories import flat, give_gradients, parameters, params_of
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fusedopt
from fusedopt import average_grad, sgd_step, table

ROWS = {r.name: r for r in table.rows("torch")}
KWARGS = {
    "SGD": dict(lr=0.01, momentum=0.9, weight_decay=0.01),
    "RMSprop": dict(momentum=0.9, eps=1e-3),
    "Adadelta": dict(eps=1e-3),
    "Adagrad": dict(lr_decay=0.01),
}
"""Arguments that make a peer more than its defaults do; denominators that do not amplify rounding."""
every_optimizer = pytest.mark.parametrize("name", ROWS)
every_factory = pytest.mark.parametrize(
    "row", [pytest.param(r, id=f"{r.face}-{r.name}") for r in table.rows()]
)


def groups_without_params(opt):
    return [{k: v for k, v in g.items() if k not in ("params", "foreach")} for g in opt.param_groups]


def both(name, params=parameters, **kwargs):
    """Ours and torch's optimizer, each with parameters of its own."""
    kwargs = {**KWARGS.get(name, {}), **kwargs}
    return ROWS[name].factory(params(), **kwargs), getattr(torch.optim, name)(
        params(), foreach=False, **kwargs
    )


def assert_alike(a, b, rtol=1e-5, atol=2e-6):
    """Groups and state keys equal, parameters and state equal to rounding."""
    assert groups_without_params(a) == groups_without_params(b)
    torch.testing.assert_close(flat(params_of(a)), flat(params_of(b)), rtol=rtol, atol=atol)
    ours, theirs = a.state_dict()["state"], b.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for i in ours:
        assert ours[i].keys() == theirs[i].keys()
        for k, v in theirs[i].items():
            exact = k != "mu_product"  # a number here, saved in float64 where float32 would round it
            torch.testing.assert_close(
                ours[i][k], v, rtol=rtol, atol=atol, check_dtype=exact, msg=lambda m, k=k: f"{k}: {m}"
            )


def train(opt, span=range(3)):
    for t in span:
        give_gradients(params_of(opt), t)
        opt.step()


def test_a_difference_would_be_noticed():
    for spoil in (
        lambda opt: opt.param_groups[0].update(lr=0.5),
        lambda opt: opt.state[params_of(opt)[1]].pop("exp_avg"),
        lambda opt: opt.state[params_of(opt)[1]]["exp_avg"].neg_(),
        lambda opt: params_of(opt)[1].data.mul_(1.001),
    ):
        ours, theirs = both("AdamW")
        train(ours), train(theirs)
        assert_alike(ours, theirs)
        spoil(ours)
        with pytest.raises(AssertionError):
            assert_alike(ours, theirs)


# --
# Construction


def p():
    return nn.Parameter(torch.ones(2))


def names():
    return list(nn.Linear(2, 3).named_parameters())


SAME = {
    "a tensor": lambda: (p(), {}),
    "a number": lambda: (3, {}),
    "None": lambda: (None, {}),
    "a module": lambda: (nn.Linear(2, 2), {}),
    "one group, not in a list": lambda: (dict(params=[p()]), {}),
    "a dict of names": lambda: (dict(names()), {}),
    "nothing": lambda: ([], {}),
    "an empty generator": lambda: (iter(()), {}),
    "a list": lambda: ([p(), p()], {}),
    "a generator": lambda: ((p() for _ in range(3)), {}),
    "values of a dict": lambda: (dict(names()).values(), {}),
    "a ParameterList": lambda: (nn.ParameterList([p(), p()]), {}),
    "names": lambda: (iter(names()), {}),
    "names in groups": lambda: ([dict(params=names()), dict(params=names(), lr=0.5)], {}),
    "names for some": lambda: ([("a", p()), p()], {}),
    "names for the last": lambda: ([p(), ("a", p())], {}),
    "names in one group only": lambda: ([dict(params=names()), dict(params=[p()])], {}),
    "strings": lambda: (["weight"], {}),
    "an array": lambda: ([np.zeros(2)], {}),
    "a set in a group": lambda: ([dict(params={p()})], {}),
    "a group of one tensor": lambda: ([dict(params=p())], {}),
    "a group from a generator": lambda: ([dict(params=iter([p(), p()]))], {}),
    "a group without params": lambda: ([dict(lr=0.1)], {}),
    "an empty group": lambda: ([dict(params=[]), dict(params=[p()])], {}),
    "groups and tensors": lambda: ([dict(params=[p()]), p()], {}),
    "tensors and groups": lambda: ([p(), dict(params=[p()])], {}),
    "a group with a key of its own": lambda: ([dict(params=[p()], layer="head", depth=3)], {}),
    "a tensor that is no leaf": lambda: ([p() * 2], {}),
    "no gradient required": lambda: ([torch.zeros(2)], {}),
    "a parameter in two groups": lambda: ((lambda q: [dict(params=[q]), dict(params=[q])])(p()), {}),
    **{f"lr={v}": lambda v=v: ([p()], dict(lr=v)) for v in (-1, math.nan, math.inf, 0, 1, True, "a", None)},
    "lr of one element": lambda: ([p()], dict(lr=torch.tensor([0.1]))),
    "lr of two elements": lambda: ([p()], dict(lr=torch.ones(2))),
    **{
        f"betas={v}": lambda v=v: ([p()], dict(betas=v))
        for v in ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), [0.5, 0.9], ("a", "b"), 0.9, None)
    },
    "betas as tensors": lambda: ([p()], dict(betas=(torch.tensor(0.5), torch.tensor(0.5)))),
    **{f"eps={v}": lambda v=v: ([p()], dict(eps=v)) for v in (-1, 0, "a", None)},
    **{f"weight_decay={v}": lambda v=v: ([p()], dict(weight_decay=v)) for v in (-1, 0, "a", None)},
    "fused and foreach": lambda: ([p()], dict(fused=True, foreach=True)),
    "another's keyword": lambda: ([p()], dict(momentum=0.9)),
}


def outcome(make):
    """What comes of it: the error's type and, where a user may look for it, its text; or the groups."""
    try:
        opt = make()
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        return type(error), str(error) if isinstance(error, ValueError) else ""
    return [
        (len(g["params"]), g.get("param_names"), {k: v for k, v in g.items() if k != "params"})
        for g in opt.param_groups
    ]


@pytest.mark.parametrize("case", SAME)
def test_the_constructor_takes_and_refuses_what_torchs_does(case):
    def make(cls):
        params, kwargs = SAME[case]()
        return cls(params, **kwargs)

    assert outcome(lambda: make(fusedopt.optim.AdamW)) == outcome(lambda: make(torch.optim.AdamW))


STRICTER = {
    "a complex parameter": (lambda: ([nn.Parameter(torch.zeros(2) * 1j)], {}), "view_as_real"),
    "three betas": (lambda: ([p()], dict(betas=(0.9, 0.9, 0.9))), "two numbers"),
    "one beta": (lambda: ([p()], dict(betas=(0.9,))), "two numbers"),
    "a group's negative lr": (lambda: ([dict(params=[p()], lr=-1)], {}), "lr: -1"),
    "a group's NaN": (lambda: ([dict(params=[p()], eps=math.nan)], {}), "eps: NaN"),
}


@pytest.mark.parametrize("case", STRICTER)
def test_the_constructor_is_stricter_where_torch_goes_on_or_fails_later(case):
    make, match = STRICTER[case]
    params, kwargs = make()
    with pytest.raises(ValueError, match=match):
        fusedopt.optim.AdamW(params, **kwargs)


WIDER = {
    "lists in a list": lambda: ([[p()], [p()]], {}),
    "integer betas": lambda: ([p()], dict(betas=(0, 0.9))),
    "a number and a tensor as betas": lambda: ([p()], dict(betas=(0.9, torch.tensor(0.9)))),
    "a tensor lr with foreach": lambda: ([p()], dict(lr=torch.tensor(0.1), foreach=True)),
}


@pytest.mark.parametrize("case", WIDER)
def test_the_constructor_takes_a_little_more_than_torchs(case):
    params, kwargs = WIDER[case]()
    opt = fusedopt.optim.AdamW(params, **kwargs)
    train(opt)
    with pytest.raises((TypeError, ValueError)):
        torch.optim.AdamW(WIDER[case]()[0], **kwargs)


# --
# The class


@every_factory
def test_nothing_stands_in_the_way_of_those_who_subclass_wrap_or_ask(row):
    """Names that mean something to torch, fastai, accelerate or Lightning, before a step and after one."""
    opt = row.factory(parameters(), **row.variants[0].kwargs)
    for _ in range(2):
        for name in ("__call__", "__len__", "train", "eval", "_init_group", "grad_scale", "found_inf"):
            assert hasattr(opt, name) == (row.swaps and name in ("train", "eval")), name
        assert not getattr(opt, "_step_supports_amp_scaling", False)
        for name in ("state", "param_groups", "defaults"):
            assert name in vars(opt) and not hasattr(type(opt), name)
        assert bool(opt) and not callable(opt) and opt.frozen_idx == 0
        assert not any("__slots__" in vars(c) for c in type(opt).__mro__)
        assert inspect.isfunction(inspect.getattr_static(opt, "step")) and "step" not in vars(opt)
        assert "grad_scaler" not in inspect.signature(opt.step).parameters
        assert all(isinstance(k, str) for g in opt.param_groups for k in g)
        train(opt, range(1))
    made = type("Wrapped" + type(opt).__name__, (type(opt),), {})  # as Lightning does
    opt.__class__ = made
    train(opt, range(1))


@every_optimizer
def test_it_prints_as_torchs_does(name):
    params = lambda: [dict(params=parameters()), dict(params=[p()], lr=0.5)]  # noqa: E731
    ours, theirs = both(name, params)
    assert repr(ours) == repr(theirs).replace("foreach: False", "foreach: None")


@pytest.mark.parametrize(
    ("row", "variant"),
    [pytest.param(r, v, id=f"{r.face}-{r.name}-{v.id}") for r in table.rows() for v in r.variants],
)
def test_state_and_groups_hold_nothing_that_torch_would_garble(row, variant, monkeypatch):
    """Loading, distributed checkpoints and safe files know tensors, numbers, flags and tuples of them only."""
    monkeypatch.setenv("FUSEDOPT_BACKEND", "reference")
    opt = row.factory(parameters(), **variant.kwargs)
    keys = set(opt.param_groups[0]) - {"params"}
    assert keys == set(opt.defaults) and "lr" in keys and "differentiable" in keys
    train(opt)
    state_dict = opt.state_dict()
    plain = (torch.Tensor, int, float, bool, type(None))
    assert all(type(v) in plain for s in state_dict["state"].values() for v in s.values())
    for g in state_dict["param_groups"]:
        for v in g.values():
            assert all(type(x) in plain for x in (v if type(v) in (tuple, list) else [v]))
    assert all(type(v) in plain for s in opt.state.values() for v in s.values())
    opt.load_state_dict(state_dict)
    assert set(opt.param_groups[0]) - {"params"} == keys == set(opt.defaults)


@every_optimizer
def test_groups_that_lack_keys_are_filled_when_loaded_as_torchs_are(name):
    """A checkpoint of an older version: what torch's class fills in, ours fills in, too."""
    ours, theirs = both(name)
    full = set(ours.param_groups[0])
    for opt in (ours, theirs):
        train(opt)
        saved = copy.deepcopy(opt.state_dict())
        for key in ("maximize", "foreach", "differentiable"):
            del saved["param_groups"][0][key]
        opt.load_state_dict(saved)
        train(opt, range(3, 5))
    assert_alike(ours, theirs)
    assert set(ours.param_groups[0]) == full == set(theirs.param_groups[0])


@every_optimizer
def test_every_number_may_be_an_array_scalar_or_a_tensor(name):
    """In a group, whenever: lr, betas and all others. The step is bitwise that with Python's floats."""
    opt, other = (ROWS[name].factory(parameters(), **KWARGS.get(name, {})) for _ in range(2))
    changed = 0
    for t, kind in enumerate([np.float64, lambda v: torch.tensor(v, dtype=torch.float64), np.array, float]):
        group = opt.param_groups[0]
        for key, value in other.param_groups[0].items():
            if type(value) is float:
                group[key] = kind(value)
                changed += 1
            elif key == "betas":
                group[key] = tuple(kind(v) for v in value)
        train(opt, [t, t + 10]), train(other, [t, t + 10])
        assert torch.equal(flat(params_of(opt)), flat(params_of(other)))
    assert changed >= 4


@pytest.mark.parametrize(
    "kind",
    [int, np.int64, lambda v: torch.tensor(v), lambda v: torch.tensor([float(v)]), np.float32],
    ids=["int", "np.int64", "int tensor", "tensor of one", "np.float32"],
)
def test_whole_numbers_may_be_of_any_type_from_the_start(kind):
    opt, other = (
        fusedopt.optim.AdamW(parameters(), lr=f(1), betas=(f(0), f(0)), weight_decay=0.5)
        for f in (kind, float)
    )
    train(opt), train(other)
    assert torch.equal(flat(params_of(opt)), flat(params_of(other)))


# --
# Hooks


def log_hooks(opt, log):
    """Every hook there is, each noting when it is called; returns the handles."""

    def note(what, result=None):
        def hook(*args, **kwargs):
            log.append(what)
            return result

        return hook

    return [
        opt.register_step_pre_hook(note("pre")),
        opt.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        opt.register_state_dict_pre_hook(note("sd pre")),
        opt.register_state_dict_pre_hook(note("sd pre first"), prepend=True),
        opt.register_state_dict_post_hook(note("sd post")),
        opt.register_state_dict_post_hook(note("sd post first"), prepend=True),
        opt.register_load_state_dict_pre_hook(note("load pre")),
        opt.register_load_state_dict_pre_hook(note("load pre first"), prepend=True),
        opt.register_load_state_dict_post_hook(note("load post")),
        opt.register_load_state_dict_post_hook(note("load post first"), prepend=True),
    ]


def hooked_life(opt):
    """What hooks see of some steps, a scheduler, a save, a load and a closure."""
    log, seen = [], []
    handles = log_hooks(opt, log)
    try:
        for act in (
            lambda: train(opt, range(2)),
            lambda: opt.zero_grad(),
            lambda: opt.step(),
            lambda: train(opt, range(1)),
            lambda: lr_scheduler.StepLR(opt, 1),
            lambda: train(opt, range(1)),
            lambda: opt.step(lambda: torch.tensor(1.0)),
            lambda: opt.load_state_dict(opt.state_dict()),
            lambda: train(opt, range(1)),
        ):
            act()
            seen.append(list(log))
            log.clear()
    finally:
        for handle in handles:
            handle.remove()
    train(opt, range(1))
    opt.load_state_dict(opt.state_dict())
    assert not log, "removed hooks are silent"
    return seen


@pytest.mark.filterwarnings("error")
@every_optimizer
def test_hooks_fire_as_often_and_in_the_order_they_do_with_torchs(name):
    ours, theirs = both(name)
    seen = hooked_life(ours)
    assert seen == hooked_life(theirs)
    assert seen[0] == ["global pre", "pre", "post", "global post"] * 2
    assert_alike(ours, theirs)


@pytest.mark.parametrize("name", ["Adam", "ranger", "Lamb", "SGD"])
def test_hooks_fire_as_often_for_fastais_names(name):
    ours = getattr(fusedopt, name)(parameters(), lr=0.01)
    assert hooked_life(ours) == hooked_life(torch.optim.SGD(parameters()))


@pytest.mark.parametrize("base", [fusedopt.optim.AdamW, torch.optim.AdamW], ids=["ours", "torchs"])
def test_hooks_fire_once_for_each_step_that_torch_wraps(base):
    """A class whose own ``step`` calls the inherited one, among instances of both."""

    class Outer(base):
        def step(self, closure=None):
            return super().step(closure)

    plain, opt, fired = base(parameters()), Outer(parameters()), []
    opt.register_step_post_hook(lambda *_: fired.append(1))
    train(plain, range(1)), train(opt, range(2))
    assert fired == [1] * (2 if base is fusedopt.optim.AdamW else 4)  # torch fires them for both methods


@every_optimizer
def test_what_a_step_hook_changes_counts(name):
    """A pre-hook sees the old parameters and may change gradients and numbers; a post-hook sees the new ones."""

    def before(opt, args, kwargs):
        seen.append(flat(params_of(opt)))
        opt.param_groups[0]["lr"] = 0.02
        for q in params_of(opt):
            q.grad = -q.grad

    def after(opt, args, kwargs):
        seen.append(flat(params_of(opt)))
        with torch.no_grad():
            params_of(opt)[0].add_(1.0)

    ours, theirs = both(name)
    for opt in (ours, theirs):
        train(opt, range(2))
        seen = []
        opt.register_step_pre_hook(before), opt.register_step_post_hook(after)
        train(opt, range(2, 4))
        assert not torch.equal(seen[0], seen[1])
    assert_alike(ours, theirs)


def test_a_pre_hook_may_replace_the_arguments_or_is_refused():
    for opt in both("AdamW"):
        give_gradients(params_of(opt))
        handle = opt.register_step_pre_hook(lambda o, args, kwargs: ((o,), dict(closure=lambda: 7.0)))
        assert opt.step() == 7.0
        handle.remove()
        with_scheduler = lr_scheduler.StepLR(opt, 1)
        handle = opt.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 8.0), {}))
        assert opt.step() == 8.0
        with_scheduler.step()
        handle.remove()
        before = flat(params_of(opt))
        opt.register_step_pre_hook(lambda o, args, kwargs: "nonsense")
        with pytest.raises(RuntimeError, match="must return None or a tuple"):
            opt.step()
        assert torch.equal(flat(params_of(opt)), before)


def test_a_post_hook_is_not_called_after_a_step_that_raised():
    def fail():
        raise ArithmeticError

    for opt in both("AdamW"):
        give_gradients(params_of(opt))
        fired = []
        opt.register_step_pre_hook(lambda *_, fired=fired: fired.append("pre"))
        opt.register_step_post_hook(lambda *_, fired=fired: fired.append("post"))
        with pytest.raises(ArithmeticError):
            opt.step(fail)
        assert fired == ["pre"]
        opt.step()
        assert fired == ["pre", "pre", "post"]


@every_optimizer
def test_a_state_dict_that_a_hook_returns_is_the_one_that_counts(name):
    """A post-hook on saving may return another dict, a pre-hook on loading, too; and neither sees our inner form."""

    def on_save(opt, state_dict):
        assert all(isinstance(k, int) for k in state_dict["state"])
        assert isinstance(state_dict["state"][0].get("step", torch.tensor(0.0)), torch.Tensor)
        return {**state_dict, "note": "ours"}

    def on_load(opt, state_dict):
        assert state_dict.pop("note") == "ours"  # a shallow copy: the caller keeps it
        groups = [{**g, "lr": 0.0625} for g in state_dict["param_groups"]]
        state = {
            i: {k: v * 2 if isinstance(v, torch.Tensor) and v.dim() else v for k, v in s.items()}
            for i, s in state_dict["state"].items()
        }
        return dict(state=state, param_groups=groups)

    ours, theirs = both(name)
    for opt in (ours, theirs):
        train(opt)
        opt.register_state_dict_post_hook(on_save)
        opt.register_load_state_dict_pre_hook(on_load)
        saved = opt.state_dict()
        opt.load_state_dict(saved)
        assert saved["note"] == "ours" and opt.param_groups[0]["lr"] == 0.0625
        opt._optimizer_state_dict_post_hooks.clear()
        train(opt, range(3, 6))
    assert_alike(ours, theirs)


def test_a_state_dict_pre_hook_may_change_the_optimizer_before_it_is_saved():
    def before(opt):
        opt.param_groups[0]["lr"] = 0.25
        for state in opt.state.values():
            state["exp_avg"].zero_()

    for opt in both("AdamW"):
        train(opt)
        opt.register_state_dict_pre_hook(before)
        saved = opt.state_dict()
        assert saved["param_groups"][0]["lr"] == 0.25 and not saved["state"][1]["exp_avg"].any()
        assert saved["state"][1]["exp_avg_sq"].any()


def test_a_load_post_hook_sees_what_was_loaded():
    for opt in both("AdamW"):
        train(opt)
        saved, seen = copy.deepcopy(opt.state_dict()), []
        train(opt, range(3, 5))
        opt.register_load_state_dict_post_hook(
            lambda o, seen=seen: seen.append(o.state[params_of(o)[0]]["exp_avg"].clone())
        )
        opt.load_state_dict(saved)
        assert torch.equal(seen[0], saved["state"][0]["exp_avg"]) and len(seen) == 1


# --
# Steps, closures, gradients


@every_optimizer
def test_closures_are_called_as_torchs_are(name):
    def run(opt):
        calls = []

        def closure():
            calls.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            opt.zero_grad()
            loss = sum((q * q).sum() for q in params_of(opt))
            loss.backward()
            return loss

        losses = [opt.step(closure), opt.step(closure=closure)]
        with torch.no_grad():
            losses.append(opt.step(closure))
            assert not torch.is_grad_enabled()
        assert opt.step() is None and torch.is_grad_enabled()
        assert all(loss.requires_grad for loss in losses)
        return calls, torch.stack(losses).detach()

    ours, theirs = both(name)
    (calls, losses), (expected, their_losses) = run(ours), run(theirs)
    assert calls == expected == [(True, False)] * 3
    torch.testing.assert_close(losses, their_losses)
    assert losses[2] != losses[0]
    assert_alike(ours, theirs)


@pytest.mark.parametrize("hints", [{}, dict(foreach=True), dict(fused=True)], ids=str)
@pytest.mark.parametrize("set_to_none", [None, True, False])
def test_zero_grad_does_what_torchs_does(hints, set_to_none):
    found = []
    for module in (fusedopt.optim, torch.optim):
        opt = module.AdamW(parameters(), **hints)
        give_gradients(params_of(opt))
        params_of(opt)[1].grad = None
        kept = params_of(opt)[0].grad
        opt.zero_grad(**{} if set_to_none is None else dict(set_to_none=set_to_none))
        grads = [q.grad for q in params_of(opt)]
        found.append([None if g is None else g.abs().sum().item() for g in grads])
        assert set_to_none is not False or grads[0] is kept
    assert found[0] == found[1]


@every_optimizer
def test_a_group_added_on_the_way_is_stepped_as_torchs_is(name):
    ours, theirs = both(name)
    for opt in (ours, theirs):
        train(opt)
        scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
        train(opt, range(3, 4))
        opt.add_param_group(dict(params=parameters(seed=7), lr=0.03, weight_decay=0.1))
        opt.add_param_group(dict(params=iter(parameters(((3,),), seed=8))))
        opt.add_param_group(dict(params=[]))
        opt.add_param_group(dict(params=nn.Parameter(torch.ones(1)), layer="head"))
        assert scheduler.get_last_lr()
        train(opt, range(4, 8))
    assert_alike(ours, theirs)
    ours.load_state_dict(ours.state_dict()), theirs.load_state_dict(theirs.state_dict())
    train(ours, range(8, 10)), train(theirs, range(8, 10))
    assert_alike(ours, theirs)


BAD_GROUPS = {
    "no dict": lambda opt: [p()],
    "no params": lambda opt: dict(lr=0.1),
    "a set": lambda opt: dict(params={p()}),
    "no tensor": lambda opt: dict(params=[1.0]),
    "no leaf": lambda opt: dict(params=[p() * 2]),
    "known already": lambda opt: dict(params=[p(), params_of(opt)[1]]),
    "names": lambda opt: dict(params=names()),
    "some names": lambda opt: dict(params=[*names(), p()]),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_a_bad_group_is_refused_with_torchs_error_and_changes_nothing(case):
    errors = []
    for opt in both("AdamW"):
        train(opt)
        before = copy.deepcopy(opt.state_dict())
        with pytest.raises((TypeError, ValueError, KeyError)) as error:
            opt.add_param_group(BAD_GROUPS[case](opt))
        errors.append(error.type)
        assert len(opt.param_groups) == 1 and len(params_of(opt)) == 3
        assert str(opt.state_dict()) == str(before)
    assert errors[0] is errors[1]


SURGERY = {
    "state is replaced": lambda opt: setattr(opt, "state", defaultdict(dict)),
    "state is cleared": lambda opt: opt.state.clear(),
    "one state is cleared": lambda opt: opt.state[params_of(opt)[1]].clear(),
    "one state is dropped": lambda opt: opt.state.pop(params_of(opt)[0], None),
    "a parameter is replaced": lambda opt: opt.param_groups[0]["params"].__setitem__(0, *parameters(((6,),))),
    "a parameter is taken out": lambda opt: opt.param_groups[0]["params"].pop(),
    "a parameter is appended": lambda opt: opt.param_groups[0]["params"].append(*parameters(((6,),))),
    "parameters change places": lambda opt: opt.param_groups[0]["params"].reverse(),
    "a parameter's data is replaced": lambda opt: setattr(params_of(opt)[1], "data", torch.full((3, 5), 0.5)),
    "a group is taken out": lambda opt: (
        opt.add_param_group(dict(params=[p()])),
        train(opt, range(1)),
        opt.param_groups.pop(),
    ),
    "the list of groups is replaced": lambda opt: setattr(
        opt, "param_groups", [dict(g) for g in opt.param_groups]
    ),
    "parameters are a tuple": lambda opt: opt.param_groups[0].update(params=tuple(params_of(opt))),
    "a key of its own comes": lambda opt: opt.param_groups[0].update(layer="head", depth=[1, 2]),
    "a group is replaced": lambda opt: opt.param_groups.__setitem__(0, dict(opt.param_groups[0], lr=0.05)),
    "shapes change": lambda opt: (
        opt.state.clear(),
        [setattr(q, "grad", None) or setattr(q, "data", q.data.flatten()[:3]) for q in params_of(opt)],
    ),
}


@pytest.mark.parametrize("case", SURGERY)
@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop"])
def test_surgery_between_steps_is_followed_as_torch_follows_it(name, case):
    ours, theirs = both(name)
    for opt in (ours, theirs):
        train(opt)
        SURGERY[case](opt)
        train(opt, range(3, 6))
    torch.testing.assert_close(flat(params_of(ours)), flat(params_of(theirs)), rtol=1e-5, atol=2e-6)
    assert groups_without_params(ours) == groups_without_params(theirs)


# --
# Copies


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "pickle, protocol 2": lambda x: pickle.loads(pickle.dumps(x, protocol=2)),
}


@pytest.mark.parametrize("duplicate", COPIES)
@every_factory
def test_a_copy_with_a_scheduler_attached_is_on_its_own(row, duplicate, monkeypatch):
    """The scheduler patches ``step`` on the instance; a copy must not step the original's parameters with it."""
    monkeypatch.setenv("FUSEDOPT_BACKEND", "reference")
    opt = row.factory(parameters(), **row.variants[0].kwargs)
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    train(opt)
    scheduler.step()
    before = flat(params_of(opt))
    twin, schedule = COPIES[duplicate]((opt, scheduler))
    assert schedule.optimizer is twin and type(twin) is type(opt)
    train(twin, range(3, 6))
    schedule.step()
    assert torch.equal(flat(params_of(opt)), before)
    train(opt, range(3, 6))
    scheduler.step()
    assert torch.equal(flat(params_of(opt)), flat(params_of(twin)))
    assert groups_without_params(opt) == groups_without_params(twin)
    assert scheduler.get_last_lr() == schedule.get_last_lr()


def test_a_model_that_is_copied_with_its_optimizer_keeps_them_together():
    model = nn.Linear(3, 2)
    model.opt = fusedopt.optim.AdamW(model.named_parameters())
    train(model.opt)
    twin = copy.deepcopy(model)
    assert (
        {id(q) for q in params_of(twin.opt)}
        == {id(q) for q in twin.parameters()}
        == set(map(id, twin.opt.state))
    )
    assert twin.opt.param_groups[0]["param_names"] == ["weight", "bias"]
    train(twin.opt, range(3, 5)), train(model.opt, range(3, 5))
    assert torch.equal(flat(twin.parameters()), flat(model.parameters()))


# --
# Swapping state in


@pytest.mark.skipif(
    not hasattr(torch.optim, "swap_in_optimizer_params_and_state"), reason="this torch has no swapping in"
)
@every_optimizer
def test_a_step_on_swapped_in_parameters_leaves_the_optimizers_own_alone(name):
    ours, theirs = both(name)
    results = []
    for opt in (ours, theirs):
        train(opt)
        state_dict = copy.deepcopy(opt.state_dict())
        swapped = {str(i): q.detach().clone() for i, q in enumerate(params_of(opt))}
        before, state, groups = flat(params_of(opt)), opt.state, [dict(g) for g in opt.param_groups]
        give_gradients(swapped.values())
        with torch.optim.swap_in_optimizer_params_and_state(opt, swapped, state_dict):
            opt.step()
        assert opt.state is state and opt.param_groups == groups
        assert torch.equal(flat(params_of(opt)), before)
        assert not torch.equal(flat(swapped.values()), before)
        results.append(flat(swapped.values()))
        train(opt, range(3, 5))
    torch.testing.assert_close(*results, rtol=1e-5, atol=2e-6)
    assert_alike(ours, theirs)


# --
# Dtypes and layouts


@every_optimizer
def test_gradients_wider_than_their_parameters_are_taken_where_torch_refuses_them(name):
    """bfloat16 parameters whose ``grad_dtype`` is float32: the first step is float32's, rounded."""
    kwargs = KWARGS.get(name, {}) | dict(lr=0.25)
    narrow, wide, theirs = (parameters(dtype=torch.bfloat16) for _ in range(3))
    wide = [nn.Parameter(q.detach().float()) for q in wide]
    for params in (narrow, wide, theirs):
        gen = torch.Generator().manual_seed(0)
        for q in params:
            q.grad_dtype = torch.float32
            q.grad = torch.randn(q.shape, generator=gen)
    opt = ROWS[name].factory(narrow, **kwargs)
    opt.step(), getattr(torch.optim, name)(wide, foreach=False, **kwargs).step()
    assert narrow[0].dtype == torch.bfloat16 and narrow[0].grad.dtype == torch.float32
    # a value that falls between two may be rounded either way
    torch.testing.assert_close(flat(narrow), flat(wide).bfloat16(), rtol=2**-7, atol=0)
    assert (flat(narrow) == flat(wide).bfloat16()).float().mean() > 0.9
    start = flat(parameters(dtype=torch.bfloat16))
    assert not torch.equal(flat(narrow), start)
    if name in ("Adam", "AdamW"):
        with pytest.raises(RuntimeError):
            getattr(torch.optim, name)(theirs, foreach=False, **kwargs).step()


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        *[
            pytest.param(r.factory, torch.float32, id=f"{r.face}-{r.name}")
            for r in table.rows()
            if r.name != "Adafactor"
        ],
        pytest.param(partial(fusedopt.rules.Adafactor, relative_step=False), torch.float32, id="Adafactor"),
        pytest.param(fusedopt.optim.AdamW, torch.bfloat16, id="AdamW-bfloat16"),
        pytest.param(fusedopt.Lamb, torch.bfloat16, id="Lamb-bfloat16"),
    ],
)
def test_gradients_may_be_views_of_one_buffer_at_any_offset(make, dtype):
    """As in the buckets of distributed training: nothing is aligned, memory stays, numbers around it stay."""
    shapes = ((3,), (5, 7), (1,), (131,))
    apart, bucketed = parameters(shapes, dtype), parameters(shapes, dtype)
    opt, other = make(apart, lr=0.01), make(bucketed, lr=0.01)
    buffer = torch.full((1 + sum(q.numel() + 1 for q in apart),), 77.0, dtype=dtype)
    inside, at = torch.zeros(len(buffer), dtype=torch.bool), 1
    for q in bucketed:
        q.grad = buffer[at : at + q.numel()].view(q.shape)
        inside[at : at + q.numel()] = True
        at += q.numel() + 1
    for t in range(4):
        give_gradients(apart, t)
        for q, r in zip(apart, bucketed, strict=True):
            r.grad.copy_(q.grad)
        kept = buffer.clone()
        opt.step(), other.step()
        assert torch.equal(flat(apart), flat(bucketed)) and torch.equal(buffer, kept)
        other.zero_grad(set_to_none=False)
        assert (buffer[~inside] == 77.0).all() and not buffer[inside].any()


@every_optimizer
def test_a_model_may_turn_channels_last_and_back_as_with_torchs(name):
    def run(opt, model):
        for t, layout in enumerate([None, torch.channels_last, None, torch.contiguous_format, None]):
            if layout:
                model.to(memory_format=layout)
            gen = torch.Generator().manual_seed(t)
            for _ in range(2):
                model.zero_grad()
                model(torch.randn(2, 3, 4, 4, generator=gen)).square().mean().backward()
                opt.step()
            layouts.append(model[0].weight.is_contiguous(memory_format=torch.channels_last))

    models, opts, layouts = [], [], []
    for module in (fusedopt.optim, torch.optim):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 2)))
        single = dict(foreach=False) if module is torch.optim else {}
        opts.append(getattr(module, name)(models[-1].parameters(), **KWARGS.get(name, {}), **single))
        run(opts[-1], models[-1])
    assert layouts[:5] == layouts[5:] == [False, True, True, False, False]
    assert_alike(*opts, rtol=1e-4, atol=1e-5)


@every_optimizer
def test_a_model_may_be_moved_to_double_and_back(name):
    """Other memory, same numbers: training goes on as if nothing had happened."""
    moved, undisturbed = both(name)[0], both(name)[0]
    train(moved), train(undisturbed)
    model = nn.ParameterList(params_of(moved))
    model.zero_grad()
    assert model.double()[0].dtype == torch.float64
    model.to(torch.float32)
    assert all(a is b for a, b in zip(params_of(moved), model, strict=True))
    train(moved, range(3, 6)), train(undisturbed, range(3, 6))
    assert torch.equal(flat(params_of(moved)), flat(params_of(undisturbed)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@every_optimizer
def test_a_model_may_change_its_dtype_for_good(name, dtype):
    """What state there is keeps its dtype, and its numbers are those of before, computed with the new ones."""
    opt, other = both(name)[0], both(name)[0]
    train(opt), train(other)
    for o, d in ((opt, dtype), (other, torch.float64)):
        nn.ParameterList(params_of(o)).zero_grad()
        nn.ParameterList(params_of(o)).to(d)
        for q in params_of(o):  # the other one computes with the same numbers, exactly
            q.data = q.data.to(dtype).to(d)
    for t in range(2):
        give_gradients(params_of(opt), t)
        for q, r in zip(params_of(opt), params_of(other), strict=True):
            r.grad = q.grad.double()
        opt.step(), other.step()
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    got, expected = flat(params_of(opt)), flat(params_of(other))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=4 * eps, atol=8 * eps)
    for q in params_of(opt):
        buffers = [v for v in opt.state[q].values() if isinstance(v, torch.Tensor)]
        assert buffers and all(v.dtype == torch.float32 for v in buffers)
        assert all(torch.isfinite(v).all() for v in buffers)


@every_optimizer
def test_another_default_device_or_dtype_changes_nothing(name):
    """Whoever steps, saves or loads inside ``with torch.device(...)`` means other tensors."""
    ours, theirs = both(name)
    for opt in (ours, theirs):
        train(opt, range(2))
        give_gradients(params_of(opt), 2)
        dtype = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float64)
            with torch.device("meta"):
                opt.step()
                saved = opt.state_dict()
                opt.load_state_dict(saved)
        finally:
            torch.set_default_dtype(dtype)
        assert all(v.device.type == "cpu" for s in saved["state"].values() for v in s.values())
        train(opt, range(3, 5))
    assert_alike(ours, theirs)


def test_tensors_without_memory_are_stepped_as_torch_steps_them():
    """Fake tensors, with which programs are planned: nothing is computed, and nothing is written anywhere."""
    with FakeTensorMode():
        states = []
        for module in (fusedopt.optim, torch.optim):
            q = nn.Parameter(torch.ones(3, 2))
            opt = module.AdamW([q])
            ours = module is fusedopt.optim
            with pytest.warns(RuntimeWarning, match="FakeTensor.*unfused") if ours else nullcontext():
                for _ in range(3):
                    q.grad = torch.ones(3, 2)
                    opt.step()
            states.append(opt.state[q])
    for key in ("exp_avg", "exp_avg_sq"):
        assert type(states[0][key]) is type(states[1][key]) is FakeTensor
        assert states[0][key].shape == (3, 2)
    assert states[0]["step"] == 3


# --
# torch.compile


def compiled_as_eager(backend):
    """Steps inside a compiled function, with another learning rate each; and the same steps outside."""
    ours, plain = (fusedopt.optim.AdamW(parameters()) for _ in range(2))
    before = dict(ours.param_groups[0])
    train(ours, range(1)), train(plain, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # dynamo's own, about what it cannot trace: the step is opaque on purpose
        compiled = torch.compile(lambda: ours.step(), backend=backend)
        for t in range(1, 5):
            for opt in (ours, plain):
                opt.param_groups[0]["lr"] = 0.1 / t
                give_gradients(params_of(opt), t)
            compiled()
            plain.step()
            assert torch.equal(flat(params_of(ours)), flat(params_of(plain)))
    after = dict(ours.param_groups[0])
    assert after.pop("lr") == 0.1 / 4 and before.pop("lr") == 1e-3
    assert after == before, "tracing has not switched anything on, capturable least of all"
    assert ours.state[params_of(ours)[0]]["step"] == 5


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_function_may_step(fresh_dynamo):
    compiled_as_eager("eager")


@pytest.mark.slow
def test_a_function_compiled_by_inductor_may_step(fresh_dynamo):
    compiled_as_eager("inductor")


@pytest.mark.slow
def test_a_whole_training_step_may_be_compiled(fresh_dynamo):
    def run(compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        opt = fusedopt.optim.AdamW(model.parameters())
        schedule = lr_scheduler.ExponentialLR(opt, 0.5)

        def step(x):
            opt.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            opt.step()
            return loss

        step = torch.compile(step, backend="aot_eager") if compiled else step
        losses = []
        for t in range(4):
            losses.append(step(torch.randn(5, 3, generator=torch.Generator().manual_seed(t))).detach())
            schedule.step()
        return torch.stack(losses), flat(model.parameters())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own
        torch.testing.assert_close(run(True), run(False), rtol=1e-5, atol=1e-6)


# --
# Where the two vocabularies mean the same, and where they do not


def distance(make, other, steps=30):
    """How far apart two optimizers are after some steps on noisy gradients, at most."""
    opts = [f(parameters(((50,),))) for f in (make, other)]
    for opt in opts:
        train(opt, range(steps))
    a, b = (flat(params_of(opt)) for opt in opts)
    return (a - b).abs().max().item()


ADAM = dict(lr=0.01, eps=1e-5)
SGD = dict(lr=0.03, mom=0.9, wd=0.1)
TORCH_SGD = dict(lr=0.03, momentum=0.9, weight_decay=0.1, foreach=False)
RMS = dict(lr=0.01, eps=1e-3)
fast = fastai_optimizer

SAME_RULE = {
    "Adam, decoupled, is AdamW": (
        partial(fusedopt.Adam, **ADAM, mom=0.9, sqr_mom=0.99, wd=0.1),
        partial(torch.optim.AdamW, **ADAM, betas=(0.9, 0.99), weight_decay=0.1, foreach=False),
    ),
    "Adam with L2 is Adam": (
        partial(fusedopt.Adam, **ADAM, mom=0.9, sqr_mom=0.99, wd=0.1, decouple_wd=False),
        partial(torch.optim.Adam, **ADAM, betas=(0.9, 0.99), weight_decay=0.1, foreach=False),
    ),
    "SGD with L2 is SGD": (
        partial(fusedopt.SGD, **SGD, decouple_wd=False),
        partial(torch.optim.SGD, **TORCH_SGD),
    ),
    "RMSProp is RMSprop": (
        partial(fusedopt.RMSProp, **RMS, sqr_mom=0.9),
        partial(torch.optim.RMSprop, **RMS, alpha=0.9, foreach=False),
    ),
    **{
        f"RAdam, eps={eps}, as in {which}": (
            partial(ours, lr=0.01, eps=eps),
            partial(theirs, lr=0.01, eps=eps, **more),
        )
        for eps in (0.0, 1e-5, 1e-2)
        for which, ours, theirs, more in (
            ("fastai", fusedopt.RAdam, fast.RAdam, {}),
            ("torch", fusedopt.optim.RAdam, torch.optim.RAdam, dict(foreach=False)),
        )
    },
    "RMSProp with momentum, as in fastai": (
        partial(fusedopt.RMSProp, lr=0.01, mom=0.9),
        partial(fast.RMSProp, lr=0.01, mom=0.9),
    ),
}
OTHER_RULE = {
    "SGD's decay is decoupled unless told": (
        partial(fusedopt.SGD, **SGD),
        partial(torch.optim.SGD, **TORCH_SGD),
    ),
    "RMSProp averages gradients, RMSprop steps": (
        partial(fusedopt.RMSProp, **RMS, mom=0.9, sqr_mom=0.9),
        partial(torch.optim.RMSprop, **RMS, alpha=0.9, momentum=0.9, foreach=False),
    ),
    "RAdam's eps counts before or after the bias correction": (
        partial(fusedopt.RAdam, lr=0.01, eps=1e-2, mom=0.9, sqr_mom=0.999),
        partial(fusedopt.optim.RAdam, lr=0.01, eps=1e-2),
    ),
}


@pytest.mark.parametrize("case", SAME_RULE)
def test_the_vocabularies_mean_the_same(case):
    assert distance(*SAME_RULE[case]) < 2e-6


@pytest.mark.parametrize("case", OTHER_RULE)
def test_the_vocabularies_mean_different_rules(case):
    assert distance(*OTHER_RULE[case]) > 1e-4


@pytest.mark.parametrize("mom", [0.9, 0.5])
def test_the_first_buffer_is_dampened_in_fastais_words_only(mom):
    """fastai dampens from the first gradient on; torch keeps that one whole."""
    q = nn.Parameter(torch.ones(3))
    q.grad = torch.full((3,), 2.0)
    opt = fusedopt.Optimizer([q], [partial(average_grad, dampening=True), sgd_step], lr=0.1, mom=mom)
    opt.step()
    kept = fast.average_grad(q, mom=mom, dampening=True)["grad_avg"]
    torch.testing.assert_close(opt.state[q]["grad_avg"], kept)
    buffers = []
    for module in (fusedopt.optim, torch.optim):
        r = nn.Parameter(torch.ones(3))
        r.grad = torch.full((3,), 2.0)
        o = module.SGD([r], lr=0.1, momentum=mom, dampening=0.5)
        o.step()
        buffers.append(o.state[r]["momentum_buffer"])
    assert torch.equal(*buffers) and (buffers[0] == 2.0).all()
    assert not torch.equal(buffers[0], opt.state[q]["grad_avg"])
