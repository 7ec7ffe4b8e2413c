"""Bad input gets a clear error, and parameters, state and step counts stay bitwise as they were."""

import os
import stat
import warnings
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from factories import parameters_with_gradients
from torch import nn

import fusedopt
from fusedopt import (
    adam_step,
    average_grad,
    average_sqr_grad,
    backends,
    optim,
    sgd_step,
    step_stat,
    weight_decay,
)

BACKENDS = ["reference", "cpp"]
SHAPES = [(4,), (3, 5), ()]
HYPERS = dict(lr=0.1, wd=0.01, mom=0.9, sqr_mom=0.99)
ADAM = [weight_decay, average_grad, average_sqr_grad, step_stat, adam_step]


parameters = partial(parameters_with_gradients, SHAPES)


def stepped(backend="cpp", cbs=ADAM, steps=2, **hypers):
    """An optimizer with two groups that has made some steps, and its parameters."""
    params = parameters()
    opt = fusedopt.Optimizer([params[:2], params[2:]], cbs, backend=backend, **HYPERS | hypers)
    for _ in range(steps):
        opt.step()
    return opt, params


def frozen(value):
    """A copy that can be compared: tensors by dtype, strides and bits."""
    if isinstance(value, torch.Tensor):
        bits = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return value.dtype, value.shape, value.stride(), bytes(bits.tolist())
    if isinstance(value, dict):
        return {k: frozen(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [frozen(v) for v in value]
    return value


class Snapshot:
    """All that a refused input must leave alone: parameters, gradients, state, groups."""

    def __init__(self, opt):
        self.opt = opt
        self.params = [p for group in opt.param_groups for p in group["params"]]
        self.before = self.now()

    def now(self):
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.opt.param_groups]
        ids = [[id(p) for p in g["params"]] for g in self.opt.param_groups]
        state = [frozen(dict(self.opt.state.get(p, {}))) for p in self.params]
        grads = [None if p.grad is None or p.grad.is_sparse else frozen(p.grad) for p in self.params]
        return frozen(self.params), grads, state, frozen(groups), ids

    def check(self):
        assert self.now() == self.before


@contextmanager
def refuses(opt, error, match=None):
    """``pytest.raises`` that also checks that the optimizer is as it was."""
    snapshot = Snapshot(opt)
    with pytest.raises(error, match=match):
        yield
    snapshot.check()


def test_the_snapshot_can_fail():
    for change in (
        lambda o, p: p.data[0].neg_(),
        lambda o, p: o.state[p]["grad_avg"].copy_(-0.0 * o.state[p]["grad_avg"]),
        lambda o, p: o.state[p].update(step=3),
        lambda o, p: p.grad.zero_(),
        lambda o, p: o.set_hyper("lr", 0.2),
        lambda o, p: o.step(),
    ):
        opt, params = stepped()
        snapshot = Snapshot(opt)
        snapshot.check()
        change(opt, params[0])
        with pytest.raises(AssertionError):
            snapshot.check()


# --
# Hyperparameters

BAD_NUMBERS = [
    ("lr", -0.1),
    ("lr", float("nan")),
    ("lr", np.float64("nan")),
    ("lr", torch.tensor(-1.0)),
    ("lr", torch.tensor(float("nan"))),
    ("eps", -1e-8),
    ("wd", -0.1),
    ("mom", -0.5),
    ("mom", float("nan")),
    ("sqr_mom", float("nan")),
]
NUMBER_IDS = [f"{k}={type(v).__name__} {float(v)}" for k, v in BAD_NUMBERS]


@pytest.mark.parametrize(("name", "value"), BAD_NUMBERS, ids=NUMBER_IDS)
def test_a_bad_number_is_refused_by_the_constructor(name, value):
    params = parameters()
    before = frozen(params)
    with pytest.raises(ValueError, match=name):
        fusedopt.Optimizer(params, ADAM, **HYPERS | {name: value})
    with pytest.raises(ValueError, match=name):
        fusedopt.Adam(params, **{"lr": 0.1, name: value})
    assert frozen(params) == before


@pytest.mark.parametrize(("name", "value"), BAD_NUMBERS, ids=NUMBER_IDS)
def test_a_bad_number_is_refused_by_set_hyper_and_views(name, value):
    opt, _ = stepped()
    with refuses(opt, ValueError, match=name):
        opt.set_hyper(name, value)
    with refuses(opt, ValueError, match=name):
        opt.set_hyper(name, [0.5, value])
    with refuses(opt, ValueError, match=name):
        opt.hypers[-1][name] = value


def test_a_bad_number_is_refused_in_a_group_of_its_own_and_a_new_group():
    params = parameters()
    with pytest.raises(ValueError, match="lr"):
        fusedopt.Optimizer([dict(params=params[:1]), dict(params=params[1:], lr=-1.0)], ADAM, **HYPERS)
    opt, _ = stepped()
    with refuses(opt, ValueError, match="wd"):
        opt.add_param_group(dict(params=[nn.Parameter(torch.ones(2))], wd=float("nan")))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", torch.tensor(float("nan"))),
        ("betas", (float("nan"), 0.9)),
        ("betas", (0.9, -0.1)),
        ("eps", -1.0),
        ("weight_decay", -1.0),
    ],
)
def test_a_bad_number_written_to_the_group_is_refused_by_step(backend, key, value):
    opt, _ = stepped(backend)
    assert key in opt.param_groups[1]
    opt.param_groups[1][key] = value  # the second group: the first must not have been stepped either
    with refuses(opt, ValueError, match=r"invalid (lr|mom|sqr_mom|eps|wd)"):
        opt.step()


def test_set_hyper_refuses_another_number_of_values():
    opt, _ = stepped()
    with refuses(opt, AssertionError, match="Trying to set 3 values for lr but there are 2 parameter groups"):
        opt.set_hyper("lr", [0.1, 0.2, 0.3])


def test_a_hyperparameter_under_two_names_is_refused():
    with pytest.raises(TypeError, match="mom is given twice"):
        fusedopt.Optimizer(parameters(), ADAM, lr=0.1, mom=0.8, sqr_mom=0.99, betas=(0.9, 0.99))
    fusedopt.Optimizer(parameters(), ADAM, lr=0.1, mom=0.9, sqr_mom=0.99, betas=(0.9, 0.99))


def test_a_name_that_a_default_is_under_already_says_which():
    with pytest.raises(
        TypeError, match=r"0.01 as 'weight_decay' .*, and 0.1 as 'wd'. Remedy: 'weight_decay' alone"
    ):
        optim.AdamW(parameters(), wd=0.1)
    with pytest.raises(TypeError, match=r"Remedy: 'betas' alone, without 'mom'"):
        fusedopt.Optimizer(parameters(), ADAM, lr=0.1, mom=0.8, sqr_mom=0.99, betas=(0.9, 0.99))


@pytest.mark.parametrize("value", ["1e-3", 1j, None], ids=repr)
@pytest.mark.parametrize("name", ["lr", "weight_decay", "eps"])
def test_what_is_no_number_is_refused_by_name(name, value):
    """A rate that a YAML file spells 1e-3 is text."""
    with pytest.raises(TypeError, match=rf"^{name} must be a number, not "):
        optim.AdamW(parameters(), **{name: value})
    if value is None:
        return
    own = {"weight_decay": "wd"}.get(name, name)
    with pytest.raises(TypeError, match=rf"^{own} must be a number, not "):
        fusedopt.Adam(parameters(), **{"lr": 0.1, own: value})
    opt, _ = stepped()
    opt.param_groups[1][name] = value
    with refuses(opt, TypeError, match=rf"^{own} must be a number, not "):
        opt.step()


@pytest.mark.parametrize("betas", [0.9, None, ("0.9", 0.99)], ids=repr)
def test_betas_that_are_no_two_numbers_are_refused(betas):
    with pytest.raises(TypeError, match=r"^betas"):
        optim.AdamW(parameters(), betas=betas)


def test_betas_that_are_one_number_are_refused_of_callbacks():
    with pytest.raises(TypeError, match=r"betas must be a tuple of numbers \(mom and sqr_mom\), not 0.9"):
        fusedopt.Optimizer(parameters(), ADAM, lr=0.1, betas=0.9)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("weight_deacy", "did you mean 'weight_decay'"), ("momentum", "its name for callbacks is 'mom'")],
)
def test_an_unknown_keyword_is_answered_with_one_that_is_known(name, hint):
    with pytest.raises(TypeError, match=hint):
        optim.AdamW(parameters(), **{name: 0.1})


@pytest.mark.parametrize("cls", [optim.AdamW, fusedopt.Adam])
@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)], ids=["Sequential", "Linear"]
)
def test_a_model_in_place_of_its_parameters_is_refused(cls, model):
    with pytest.raises(TypeError, match=rf"a {type(model).__name__}\); give model.parameters\(\)"):
        cls(model, lr=0.1)


def test_a_group_without_parameters_is_refused():
    with pytest.raises(KeyError, match=r"under 'params'; this one has .*'param'"):
        optim.AdamW([{"param": parameters()}])


def test_a_text_in_place_of_callbacks_is_named_whole():
    with pytest.raises(TypeError, match="'adam' is not"):
        fusedopt.Optimizer(parameters(), "adam", lr=0.1)


@pytest.mark.parametrize("name", ["bakend", "state_dtyp", "wdd", "momm"])
def test_an_unknown_keyword_is_refused(name):
    with pytest.raises(TypeError, match=name):
        fusedopt.Optimizer(parameters(), ADAM, **HYPERS, **{name: 0.5})
    with pytest.raises(TypeError, match=name):
        fusedopt.Adam(parameters(), lr=0.1, **{name: 0.5})


def test_a_keyword_that_a_callback_takes_is_known():
    def named(p, lr, special, **kwargs):
        p.data.sub_(p.grad.data * (lr * special))

    def by_key(p, lr, **kwargs):
        p.data.sub_(p.grad.data * (lr * kwargs["special"]))

    for cb in (named, by_key):
        params = parameters()
        expected = [p.detach() - p.grad * 0.05 for p in params]
        fusedopt.Optimizer(params, cb, lr=0.1, special=0.5, backend="reference").step()
        for p, e in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), e)


# --
# Parameters


def test_a_bare_tensor_among_lists_is_refused():
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="group 1 is a Parameter, not a list"):
        fusedopt.Adam([[nn.Parameter(torch.ones(2))], p], lr=0.1)


def test_an_empty_parameter_list_is_refused():
    for params in ([], (), iter(())):
        with pytest.raises(ValueError, match="empty parameter list"):
            fusedopt.Adam(params, lr=0.1)


def test_a_parameter_in_two_groups_is_refused():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        fusedopt.Adam([[p], [q, p]], lr=0.1)
    opt = fusedopt.Adam([p], lr=0.1)
    with refuses(opt, ValueError, match="more than one parameter group"):
        opt.add_param_group(dict(params=[p]))


def test_complex_parameters_are_refused_with_the_remedy():
    z = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 is complex.*view_as_real"):
        fusedopt.Adam([nn.Parameter(torch.ones(2)), z], lr=0.1)
    opt, _ = stepped()
    with refuses(opt, ValueError, match="complex"):
        opt.add_param_group(dict(params=[z]))


def test_what_is_no_parameter_is_refused():
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        fusedopt.Adam([p, "weight"], lr=0.1)
    with pytest.raises(ValueError, match="non-leaf"):
        fusedopt.Adam([p * 2], lr=0.1)
    opt = fusedopt.Adam([p], lr=0.1)
    with refuses(opt, TypeError, match="a param group must be a dict"):
        opt.add_param_group([p])


# --
# Backends and callbacks


def test_an_unknown_backend_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'cp'; this version has auto, cpp"):
        fusedopt.Optimizer(parameters(), ADAM, **HYPERS, backend="cp")
    monkeypatch.setenv("FUSEDOPT_BACKEND", "fast")
    with pytest.raises(ValueError, match="FUSEDOPT_BACKEND='fast'"):
        fusedopt.Adam(parameters(), lr=0.1)
    fusedopt.Optimizer(parameters(), ADAM, **HYPERS, backend="cpp")  # the argument goes first


def test_callbacks_that_cannot_be_called_are_refused():
    with pytest.raises(TypeError, match=r"callbacks must be callable; 3 is not"):
        fusedopt.Optimizer(parameters(), [sgd_step, 3], lr=0.1)


def test_a_state_dtype_that_is_no_float_is_refused():
    for wrong in (torch.int8, "float32"):
        with pytest.raises(TypeError, match="state_dtype"):
            fusedopt.Optimizer(parameters(), ADAM, **HYPERS, state_dtype=wrong)


def test_cpp_refuses_a_parameter_on_another_device():
    p = nn.Parameter(torch.ones(3, device="meta"))
    p.grad = torch.ones(3, device="meta")
    opt = fusedopt.Optimizer([p], sgd_step, lr=0.1, backend="cpp")
    with pytest.raises(ValueError, match="backend 'cpp' runs on cpu, and a parameter is on meta"):
        opt.step()
    assert not dict(opt.state)


# --
# Gradients


class WithGrad(nn.Parameter):
    """A parameter whose gradient is whatever a test says: torch itself lets few wrong ones through."""

    grad = None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("grad", "match"),
    [
        (lambda p: torch.ones(p.shape).to_sparse(), "sparse"),
        (lambda p: torch.ones(p.shape, device="meta"), "on meta, the parameter on cpu"),
        (lambda p: torch.ones(4, 5), r"has shape \(4, 5\), the parameter \(3, 5\)"),
        (lambda p: torch.ones(5), r"has shape \(5,\), the parameter \(3, 5\)"),
        (lambda p: torch.ones(3, 5, dtype=torch.int64), "torch.int64 gradient; .* only"),
        (lambda p: torch.ones(3, 5, dtype=torch.complex64), "torch.complex64 gradient; .* only"),
        (lambda p: torch.ones(3, 5).to(torch.float8_e5m2), "torch.float8_e5m2 gradient; .* only"),
    ],
    ids=["sparse", "meta", "shape", "broadcastable", "int", "complex", "float8"],
)
def test_a_bad_gradient_is_refused_and_nothing_is_stepped(backend, grad, match):
    params = parameters()
    params[1] = WithGrad(params[1].detach())
    params[1].grad = torch.ones(3, 5)
    opt = fusedopt.Optimizer([params[:1], params[1:]], ADAM, backend=backend, **HYPERS)
    for _ in range(3):
        opt.step()
    snapshot, good = Snapshot(opt), params[1].grad
    params[1].grad = grad(params[1])
    with pytest.raises(RuntimeError, match=rf"parameter 0 of group 1.*{match}"):
        opt.step()
    params[1].grad = good
    snapshot.check()
    opt.step()
    assert [opt.state[p]["step"] for p in params] == [4, 4, 4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_parameter_is_refused(backend):
    p, q = nn.Parameter(torch.ones(1).expand(5)), nn.Parameter(torch.ones(2))
    opt = fusedopt.Optimizer([q, p], ADAM, backend=backend, **HYPERS)
    p.grad, q.grad = torch.ones(5), torch.ones(2)
    with refuses(opt, RuntimeError, match="parameter 1 of group 0 is expanded"):
        opt.step()


def test_a_real_sparse_gradient_is_refused():
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    opt = fusedopt.optim.AdamW(table.parameters())
    with refuses(opt, RuntimeError, match=r"sparse; use dense gradients.*SparseAdam"):
        opt.step()


# --
# Callbacks that raise midway


class Boom(Exception):
    pass


def raiser(when):
    """An sgd-like callback that keeps state and raises Boom when told to, after it has written."""
    calls = dict(step=0, count=0)

    def cb(p, lr, seen=None, **kwargs):
        seen = torch.zeros_like(p.data) if seen is None else seen
        seen.add_(1)
        p.data.sub_(p.grad.data * lr)
        p.grad.data.mul_(2)
        calls["count"] += 1
        if when(calls):
            raise Boom("no")
        return {"seen": seen}

    cb.calls = calls
    return cb


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eager", [False, True], ids=["traceable", "eager"])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "middle", "last"])
def test_a_callback_that_raises_at_a_step_changes_nothing(backend, eager, place):
    broken = raiser(lambda calls: calls["step"] == 3)

    def read_on_host(p, **kwargs):
        p.data.mul_(1 + 0 * p.data.sum().item())

    cbs = [weight_decay, step_stat]
    cbs.insert(place, broken)
    if eager:
        cbs.insert(1, read_on_host)
    opt, _ = stepped(backend, cbs, steps=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # about read_on_host
        for step in (1, 2):
            broken.calls["step"] = step
            opt.step()
        broken.calls["step"] = 3
        for _ in range(2):
            with refuses(opt, Boom):
                opt.step()
        broken.calls["step"] = 4
        opt.step()
    assert {s["step"] for s in opt.state.values()} == {3}
    acting = {"cb", "read_on_host"} if eager else {"cb"}
    assert {e.callback for e in opt.explain().eager} == (acting if backend == "cpp" else set())


def test_a_pure_callback_that_has_raised_fuses_again():
    def cb(p, lr, limit, **kwargs):
        p.data.sub_(p.grad.data * lr)
        if lr > limit:
            raise Boom("no")

    opt, _ = stepped("cpp", [cb], limit=1.0)
    opt.set_hyper("limit", 0.0)
    with refuses(opt, Boom):
        opt.step()
    opt.set_hyper("limit", 1.0)
    opt.step()
    assert not opt.explain().eager


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_callback_that_raises_at_the_second_parameter_changes_nothing(backend, steps):
    def broken(p, lr, fail, **kwargs):
        p.data.sub_(p.grad.data * lr)
        if fail and p.data.sum().item() == total:  # read on the host: runs eagerly
            raise Boom("no")

    params = parameters()
    opt = fusedopt.Optimizer(params, [average_grad, broken, step_stat], lr=0.0, fail=False, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(steps):
            opt.step()
        total = params[1].data.sum().item()
        opt.set_hyper("fail", True)
        with refuses(opt, Boom):
            opt.step()
        opt.set_hyper("fail", False)
        opt.step()
    assert [opt.state[p]["step"] for p in params] == [steps + 1] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_callback_that_refuses_a_number_changes_nothing_and_fuses_afterwards(backend):
    def picky(p, lr, **kwargs):
        if lr > 1:
            raise Boom("lr")
        p.data.sub_(p.grad.data * lr)

    opt, params = stepped(backend, [weight_decay, picky, step_stat], steps=1)
    opt.set_hyper("lr", [0.1, 2.0])
    with refuses(opt, Boom):
        opt.step()
    opt.set_hyper("lr", 0.5)
    opt.step()
    assert not opt.explain().eager
    assert [opt.state[p]["step"] for p in params] == [2, 2, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_hyperparameter_is_an_error_that_names_it(backend):
    params = parameters()
    opt = fusedopt.Optimizer(params, sgd_step, backend=backend)
    with refuses(opt, TypeError, match="lr"):
        opt.step()


def test_a_closure_that_raises_changes_nothing():
    opt, _ = stepped()

    def closure():
        raise Boom("no")

    with refuses(opt, Boom):
        opt.step(closure)


# --
# State dicts


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda sd: sd.pop("param_groups"), "keys 'state' and 'param_groups'"),
        (lambda sd: sd["param_groups"].pop(), "1 parameter groups, the optimizer 2"),
        (lambda sd: sd["param_groups"][1]["params"].append(7), "2 parameters in group 1, the optimizer 1"),
        (
            lambda sd: sd["state"][1].update(grad_avg=torch.ones(5, 3)),
            r"'grad_avg' of parameter 1 of group 0 has shape \(5, 3\), and the parameter is \(3, 5\)",
        ),
        (
            lambda sd: sd["state"].update({0: sd["state"][1], 1: sd["state"][0]}),
            r"parameter 0 of group 0 has shape \(3, 5\)",
        ),
        (lambda sd: sd["state"][2].update(sqr_avg=torch.ones(2)), "parameter 0 of group 1"),
    ],
    ids=["no groups", "group count", "parameter count", "transposed", "swapped", "0-d"],
)
def test_a_state_dict_that_does_not_fit_is_refused(spoil, match):
    opt, _ = stepped()
    state_dict = {k: v.copy() for k, v in opt.state_dict().items()}
    state_dict["param_groups"] = [
        dict(g, params=list(g["params"]), lr=0.7) for g in state_dict["param_groups"]
    ]
    state_dict["state"] = {k: dict(v) for k, v in state_dict["state"].items()}
    spoil(state_dict)
    for target in (opt, stepped(steps=0)[0]):
        with refuses(target, ValueError, match=match):
            target.load_state_dict(state_dict)


def test_what_is_no_state_dict_is_refused():
    opt, _ = stepped()
    with refuses(opt, ValueError, match="a state dict has the keys"):
        opt.load_state_dict([1, 2])


# --
# Compilers that fail


@pytest.fixture
def no_warning_given(monkeypatch):
    """As in a fresh process: nothing has been said about any backend."""
    monkeypatch.setattr(backends, "_warned", set())


@pytest.fixture(params=["cannot run", "cannot compile", "makes no file", "makes no library"])
def broken_compiler(request, monkeypatch, tmp_path, no_warning_given, nothing_compiled):
    """CXX is a compiler that fails in one of several ways, and the cache is empty. Gives its log of calls."""
    log = tmp_path / "calls"
    bodies = {
        "cannot run": "exit 1",
        "cannot compile": 'case "$*" in *--version*) echo broken 1.0; exit 0;; esac; echo "error: no luck" >&2; exit 1',
        "makes no file": 'case "$*" in *--version*) echo broken 2.0;; esac; exit 0',
        "makes no library": (
            'case "$*" in *--version*) echo broken 3.0; exit 0;; esac; '
            'while [ $# -gt 1 ]; do if [ "$1" = -o ]; then echo junk > "$2"; fi; shift; done'
        ),
    }
    script = tmp_path / "broken-c++"
    script.write_text(f"#!/bin/sh\necho call >> {log}\n{bodies[request.param]}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(cache))
    monkeypatch.setenv("CXX", str(script))
    return log


# Not one of the usual lists, so that no other test has left its kernel in this process.
UNUSUAL = [step_stat, weight_decay, weight_decay, average_grad, sgd_step]


def test_auto_falls_back_with_one_warning_and_right_results(broken_compiler):
    expected = stepped("reference", UNUSUAL, steps=3)[1]
    with pytest.warns(RuntimeWarning) as caught:
        opt, params = stepped("auto", UNUSUAL, steps=3)
        other, _ = stepped("auto", UNUSUAL, steps=1)
    texts = [str(w.message) for w in caught]
    assert len(texts) == 1, texts
    assert "cpp backend cannot be used" in texts[0] and "CXX" in texts[0]
    for p, e in zip(params, expected, strict=True):
        assert torch.equal(p, e)
    assert [opt.state[p]["step"] for p in params] == [3, 3, 3]
    assert opt.explain().backend == other.explain().backend == "reference"
    calls = broken_compiler.read_text().count("call")
    assert calls <= 4, f"the compiler was called {calls} times: failing once is enough"


def test_cpp_raises_and_changes_nothing(broken_compiler):
    opt, _ = stepped("cpp", UNUSUAL, steps=0)
    for _ in range(2):
        with refuses(opt, fusedopt.compile.cache.BuildError, match=r"(?s)CXX.*reference"):
            opt.step()
    assert not any(opt.state.values())


def test_a_mended_compiler_is_used_by_cpp(broken_compiler, monkeypatch):
    opt, _ = stepped("cpp", UNUSUAL, steps=0)
    with refuses(opt, fusedopt.compile.cache.BuildError):
        opt.step()
    monkeypatch.delenv("CXX")
    opt.step()
    assert opt.explain().backend == "cpp"


def test_an_earlier_step_survives_a_compiler_that_breaks(tmp_path, monkeypatch):
    opt, params = stepped("cpp", UNUSUAL, steps=1)
    monkeypatch.setenv("CXX", os.devnull)
    params[0].data = params[0].data.double()  # another kernel is needed now
    params[0].grad = params[0].grad.double()
    with refuses(opt, fusedopt.compile.cache.BuildError):
        opt.step()


def test_state_on_another_device_than_its_parameter_is_refused():
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    opt = fusedopt.optim.AdamW([p])
    opt.step()
    before = p.detach().clone()
    opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"].to("meta")
    with pytest.raises(
        RuntimeError, match="state 'exp_avg' of parameter 0 of group 0 is on meta, the parameter on"
    ):
        opt.step()
    assert torch.equal(p, before) and opt.state[p]["step"] == 1


def test_a_class_on_a_device_without_a_backend_says_so(no_warning_given):
    p = nn.Parameter(torch.ones(3, device="meta"))
    opt = fusedopt.fuse(torch.optim.AdamW([p]))
    with pytest.warns(RuntimeWarning, match="compiles nothing for meta|runs as it was written") as caught:
        for _ in range(6):
            p.grad = torch.ones(3, device="meta")
            opt.step()
    assert len(caught) == 2 and "no compiled backend can be used here" in opt.explain().eager[0].reason


def test_a_class_fused_for_the_reference_steps_as_it_was_written():
    """Asked for, it is no reason to warn."""
    p = nn.Parameter(torch.ones(3))
    opt = fusedopt.fuse(torch.optim.AdamW([p]), backend="reference")
    for _ in range(6):
        p.grad = torch.ones(3)
        opt.step()
    assert opt.state[p]["step"] == 6 and "compiles nothing" in opt.explain().eager[0].reason


def test_a_device_without_a_backend_is_said_once_and_the_others_still_fuse(no_warning_given):
    there, here = nn.Parameter(torch.ones(3, device="meta")), nn.Parameter(torch.ones(3))
    opt = fusedopt.SGD([there, here], lr=0.1)
    with pytest.warns(RuntimeWarning, match="compiles nothing for meta") as caught:
        for _ in range(2):
            there.grad, here.grad = torch.ones(3, device="meta"), torch.ones(3)
            opt.step()
    assert len(caught) == 1
    assert opt.explain().launches == 1 and opt.explain().backend == "cpp"
    torch.testing.assert_close(here.detach(), torch.full((3,), 0.8))


WRONG = {
    "one number for two": (
        lambda opt: opt.set_hyper("betas", 0.5),
        TypeError,
        "betas must be 2 numbers, not 0.5",
    ),
    "text for a norm": (
        lambda opt: setattr(opt, "max_grad_norm", "1"),
        TypeError,
        "max_grad_norm must be a number",
    ),
    "half a group": (lambda opt: opt.freeze_to(1.5), TypeError, "float"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_set_wrongly_is_said_and_nothing_is_set(name):
    do, kind, text = WRONG[name]
    params = parameters()
    opt = optim.AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    opt.step()
    before = frozen(opt.param_groups[0]["betas"]), opt.max_grad_norm, opt.frozen_idx
    with pytest.raises(kind, match=text):
        do(opt)
    assert before == (frozen(opt.param_groups[0]["betas"]), opt.max_grad_norm, opt.frozen_idx)
    opt.step()
