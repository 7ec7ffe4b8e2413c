"""What a callback asks is answered truly, and what torch would do to its tensors is done: on every backend.

Each situation is compared with a plain loop, or with the value that Python and torch give.
"""

import functools
import importlib
import math
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fusedopt

BACKENDS = ["reference", "cpp"]


def parameters(n=2, dtype=torch.float32, shape=(3,)):
    gen = torch.Generator().manual_seed(0)
    params = [nn.Parameter((torch.rand(shape, generator=gen) + 0.5).to(dtype)) for _ in range(n)]
    for p in params:
        p.grad = (torch.rand(shape, generator=gen) - 0.5).to(dtype)
    return params


def looped(params, callbacks, steps=1, **hypers):
    states = [{} for _ in params]
    for _ in range(steps):
        for p, state in zip(params, states, strict=True):
            grad = p.grad.clone()
            for cb in callbacks:
                with torch.no_grad():
                    state.update(cb(p, **{**state, **hypers}) or {})
            p.grad = grad  # an optimizer does not change it
    return params


def optimized(params, callbacks, backend, steps=1, **hypers):
    opt = fusedopt.Optimizer(params, callbacks, backend=backend, title="truth", **hypers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            opt.step()
    return params


def assert_as_looped(callback, backend, make=parameters, steps=2, **hypers):
    hypers = {"lr": 0.1, **hypers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates signatures
        expected = looped(make(), [callback], steps, **hypers)
    for p, q in zip(optimized(make(), [callback], backend, steps, **hypers), expected, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-7)


def source(body, **names):
    """A callback of this body."""
    lines = "".join(f"    {line}\n" for line in body.split("\n"))
    namespace = {"torch": torch, "math": math, **names}
    exec(f"def callback(p, lr, m=None, **kwargs):\n{lines}", namespace)
    return namespace["callback"]


# --
# The parameter is the user's


def special():
    params = parameters(3)
    params[1].lr_scale, params[1].no_decay, params[2].lr_scale = 10.0, True, 0.5
    params[2].requires_grad_(False)
    return params


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "body",
    [
        "p.data.sub_(p.grad, alpha=lr * getattr(p, 'lr_scale', 1.0))",
        "if hasattr(p, 'lr_scale'):\n    p.data.mul_(p.lr_scale)",
        "if not getattr(p, 'no_decay', False):\n    p.data.mul_(0.5)",
        "p.data.mul_(vars(p).get('lr_scale', 2.0))",
        "if p.requires_grad:\n    p.data.mul_(0.5)",
        "p.data.mul_(2 if p.data.requires_grad or p.grad.requires_grad else 3)",
        "p.data.mul_(p.itemsize).mul_(p.element_size()).mul_(p.grad.itemsize)",
        "p.data.mul_(2 if isinstance(p, torch.nn.Parameter) else 3)",
        "p.data.mul_(2 if isinstance(p.data, torch.Tensor) and torch.is_tensor(p.grad) else 3)",
        "p.data.mul_(2 if type(p) is torch.nn.Parameter and type(lr) is float else 3)",
        "match p:\n    case torch.nn.Parameter():\n        p.data.mul_(0.5)",
        "match lr:\n    case float():\n        p.data.mul_(0.5)",
        "p.data.mul_(2 if p.is_leaf and p.device.type == 'cpu' and not p.is_cuda else 3)",
    ],
)
def test_what_is_asked_of_the_parameter_is_what_it_is(body, backend):
    assert_as_looped(source(body), backend, special)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "body",
    [
        "if p in known:\n    p.data.zero_()",
        "p.data.mul_(factors.get(p, 0.5))",
        "if id(p) in ids:\n    p.data.zero_()",
        "if any(p is q for q in listed):\n    p.data.zero_()",
        "p.data.mul_(0.5 if first is not p else 2.0)",
        "seen.append(p)\nif len(seen) > 1 and seen[0] is p:\n    p.data.zero_()",
    ],
)
def test_the_parameter_is_the_one_that_was_given(body, backend):
    def around(params):
        first = params[0]
        return dict(
            known={first}, factors={first: 0.0}, ids={id(first)}, listed=[first], first=first, seen=[]
        )

    ours, expected = parameters(), parameters()
    looped(expected, [source(body, **around(expected))], 2, lr=0.1)
    optimized(ours, [source(body, **around(ours))], backend, 2, lr=0.1)
    for p, q in zip(ours, expected, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_parameter_that_was_lent_to_a_callback_is_as_it_was(dtype, backend):
    """Its memory, gradient, attributes and autograd history are the user's again, also when the callback raises."""
    (p,) = parameters(1, dtype)
    p.tag = "mine"
    memory, grad, seen = p.data_ptr(), p.grad, []

    def looks(p, lr, **kwargs):
        seen.append((p.tag, p.itemsize, p.dtype))
        p.data = p.data * 2
        if lr > 1:
            raise KeyError("too fast")

    opt = fusedopt.Optimizer([p], looks, lr=0.1, backend=backend)
    before = p.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step()
        opt.set_hyper("lr", 2.0)
        with pytest.raises(KeyError, match="too fast"):
            opt.step()
    assert seen == [("mine", dtype.itemsize, torch.float64 if dtype == torch.float64 else torch.float32)] * 2
    assert p.data_ptr() == memory and p.grad is grad and p.dtype == dtype and vars(p) == {"tag": "mine"}
    assert torch.equal(p, before * 2)


# --
# torch's semantics


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "body",
    [
        "new = p.data * 0.9\np.data = new\nnew.sub_(p.grad, alpha=lr)",
        "old = p.data\np.data = p.data * 0.5\nold.zero_()",
        "new = p.data * 0.5\np.data = new\np.data = new * 2\nnew.zero_()",
        "new = p.grad * 2\np.grad = new\nnew.mul_(3)\np.data.sub_(p.grad, alpha=lr)",
        "old = p.grad\np.grad = p.grad * 2\nold.zero_()\np.data.sub_(p.grad)",
        "m = torch.zeros_like(p) if m is None else m\nm.data = m + p.grad\np.data.sub_(m, alpha=lr)\nreturn {'m': m}",
        "x = p.data.detach()\nx.mul_(0.5)",
        "x = p.data.clone()\nx.mul_(0)",
        "x = p.data.to(torch.float32)\nx.mul_(0.5)",
        "x = p.data.to(torch.float32, copy=True)\nx.mul_(0)",
        "x = p.data.to(torch.float32, False, True)\nx.mul_(0)",
        "x = p.data.to('cpu')\nx.mul_(0.5)",
        "x = p.data.to(p.grad)\nx.mul_(0.5)",
        "x = p.data.type_as(p.grad)\nx.mul_(0.5)",
        "x = p.data.float()\nx.mul_(0.5)",
        "x = p.data.contiguous()\nx.mul_(0.5)",
        "x = p.data.half().float()\np.data.copy_(x)",
        "p.data.add_(-lr, p.grad)",
        "p.data.sub_(lr, p.grad)",
        "p.data.addcmul_(lr, p.grad, p.data)",
        "p.data.addcdiv_(-lr, p.grad, p.data + 1)",
        "p.data.copy_(torch.add(p.data, -lr, p.grad))",
        "p.data.copy_(torch.addcmul(p.data, lr, p.grad, p.grad))",
        "p.data.copy_(p.data.add(-lr, p.grad))",
        "try:\n    p.data.mul_(p.grad.sum().item())\nexcept:\n    p.data.zero_()",
        "try:\n    p.data.mul_(p.grad.sum().item())\nexcept BaseException:\n    pass\np.data.add_(1)",
        "try:\n    p.data.addcmul_(p.grad, p.grad, value=2, other=3)\nexcept TypeError:\n    p.data.mul_(0.5)",
        "try:\n    x = (-lr) ** 0.5\n    p.data.mul_(abs(x))\nexcept ValueError:\n    p.data.zero_()",
    ],
)
def test_tensors_alias_and_copy_as_torchs_do(body, backend):
    assert_as_looped(source(body), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_contiguous_is_the_tensor_itself_or_a_copy(layout, backend):
    def make():
        if layout == "transposed":
            values = torch.arange(6.0).reshape(2, 3).t()
        else:
            values = torch.arange(120.0).reshape(2, 3, 4, 5)
            values = values.to(
                memory_format=getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)
            )
        p = nn.Parameter(values)
        p.grad = torch.ones_like(p)
        return [p]

    assert_as_looped(
        source("p.data.contiguous().mul_(0.5)\np.grad.contiguous().mul_(2)\np.data.sub_(p.grad)"),
        backend,
        make,
    )


def test_a_cast_to_the_dtype_that_the_user_sees_is_no_copy_and_another_is():
    """Inside a callback low precision is float32, but what is a copy is decided by the parameter's own dtype."""
    for backend in BACKENDS:
        for cast, halved in ((torch.bfloat16, True), (torch.float32, False)):
            (p,) = parameters(1, torch.bfloat16)
            before = p.detach().clone()
            optimized([p], [halving(cast)], backend, lr=0.1)
            assert torch.equal(p, before * 0.5 if halved else before)


def halving(cast):
    def callback(p, lr, **kwargs):
        p.data.to(cast).mul_(0.5)

    return callback


VALUES = [0.0, -0.0, 0.1, -0.1, 0.3, 1.0, -1.0, 2.5, -7.0, 1e-3, 1e5, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "body",
    [
        "p.data.copy_(p.data // p.grad)",
        "p.data.copy_(p.data % p.grad)",
        "p.data.copy_(torch.div(p.data, p.grad, rounding_mode='floor'))",
        "p.data.copy_(torch.div(p.data, p.grad, rounding_mode='trunc'))",
        "p.data.copy_(torch.remainder(p.data, p.grad))",
        "p.data.copy_(p.data.fmod(p.grad))",
        "p.data.floor_divide_(p.grad)",
        "p.data.remainder_(0.1)",
        "p.data.copy_(1 // p.grad)",
        "p.data.copy_(-1.0 % p.grad)",
    ],
)
def test_division_without_remainder_is_torchs_to_the_bit(body, dtype, backend):
    def make():
        a, b = torch.meshgrid(
            torch.tensor(VALUES, dtype=dtype), torch.tensor(VALUES, dtype=dtype), indexing="ij"
        )
        p = nn.Parameter(a.flatten().clone())
        p.grad = b.flatten().clone()
        return [p]

    (expected,) = looped(make(), [source(body)], lr=0.1)
    (found,) = optimized(make(), [source(body)], backend, lr=0.1)
    same = (found == expected) & (found.signbit() == expected.signbit()) | (found.isnan() & expected.isnan())
    assert same.all(), [
        (x, y) for x, y, s in zip(found.tolist(), expected.tolist(), same, strict=True) if not s
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_of_both_signs_are_two_constants(backend):
    for zero in (0.0, -0.0):
        body = f"a, b = lr * {-zero}, lr * {zero}\np.data.mul_(a + 1).copy_(1 / torch.full_like(p, b))"
        assert_as_looped(source(body), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ("(p.grad > 0).float()", torch.float32),
        ("(p.grad > 0).to(torch.float16)", torch.float16),
        ("(p.grad > 0) * 2.0", torch.float32),
        ("(p.grad > 0) * p.data", None),
        ("torch.where(p.grad > 0, p.data, p.grad)", None),
        ("torch.zeros_like(p)", None),
        ("torch.zeros_like(p, dtype=torch.float32)", torch.float32),
        ("p.grad.float()", torch.float32),
        ("p.grad.float() + p.data", torch.float32),
        ("p.grad.norm()", "compute"),
    ],
)
def test_state_has_the_dtype_that_torch_gives_it(made, expected, dtype, backend):
    (p,) = parameters(1, dtype)
    opt = fusedopt.Optimizer([p], source(f"return {{'m': {made}}}"), lr=0.1, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step()
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = compute if expected == "compute" else expected or dtype
    if dtype == torch.float64 and "+ p.data" in made:
        wanted = torch.float64
    assert opt.state[p]["m"].dtype == wanted


# --
# Changes are noticed


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_callback_is_made_of_may_change_at_any_time(backend):
    def scaled(p, lr, k, **kwargs):
        p.data.sub_(p.grad, alpha=lr * k)

    def keyword(p, *, lr, k=1.0, **kwargs):
        p.data.sub_(p.grad, alpha=lr * k)

    class Rule:
        k = 1.0

        def __call__(self, p, lr, **kwargs):
            p.data.sub_(p.grad, alpha=lr * self.k)

    bound, rule = functools.partial(scaled, k=1.0), Rule()
    changes = {
        bound: lambda: bound.keywords.update(k=0.0),
        keyword: lambda: keyword.__kwdefaults__.update(k=0.0),
        rule: lambda: setattr(rule, "k", 0.0),
        Rule().__call__: lambda: setattr(Rule, "k", 0.0),
    }
    for callback, change in changes.items():
        (p,) = parameters(1)
        opt = fusedopt.Optimizer([p], callback, lr=0.1, backend=backend)
        for _ in range(4):
            opt.step()
        before = p.detach().clone()
        change()
        opt.step()
        assert torch.equal(p, before), callback


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_that_is_loaded_again_is_noticed(backend, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "rules_loaded_again.py"
    text = "def half(x):\n    return x * {}\ndef rule(p, lr, **kwargs):\n    p.data.mul_(half(1.0))\n"
    file.write_text(text.format(0.5))
    rules = importlib.import_module("rules_loaded_again")

    def through_the_module(p, lr, **kwargs):
        p.data.mul_(rules.half(1.0))

    for callback in (rules.rule, through_the_module):
        file.write_text(text.format(0.5))
        importlib.reload(rules)
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        opt = fusedopt.Optimizer([p], callback, lr=0.1, backend=backend)
        for _ in range(3):
            opt.step()
        file.write_text(text.format(0.25))
        importlib.reload(rules)
        opt.step()
        assert p[0].item() == 0.5**3 * 0.25, callback
    del sys.modules["rules_loaded_again"]


# --
# What does nothing says so


def messages(callbacks, steps=3, **hypers):
    params = parameters()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt = fusedopt.Optimizer(params, callbacks, **{"lr": 0.1, **hypers})
        for _ in range(steps):
            opt.step()
    return [str(w.message) for w in caught]


def rebinds(p, lr, **kwargs):
    p = p - lr * p.grad


def rebinds_data(p, lr, wd=0.1, **kwargs):
    d = p.data
    if wd:
        d = d * (1 - lr * wd)
    d = d - lr * p.grad


def prints_and_rebinds(p, lr, note=[], **kwargs):  # noqa: B006
    note.append(1)
    p = p.data - lr * p.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("callback", [rebinds, rebinds_data, prints_and_rebinds])
def test_a_rule_that_changes_nothing_says_so_once(callback, backend):
    said = [m for m in messages([callback], backend=backend) if "changed nothing" in m]
    place = f"{callback.__name__} (test_truth.py:{callback.__code__.co_firstlineno})"
    assert len(said) == 1 and place in said[0] and "p.data.sub_" in said[0]


def test_a_rule_that_changes_nothing_says_so_beside_others():
    said = messages([fusedopt.weight_decay, rebinds, fusedopt.sgd_step], wd=0.1)
    assert len(said) == 1 and "the callback rebinds (" in said[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rules_that_do_something_are_not_accused(backend):
    def accepts_more(p, my_hyper=0.0, **kwargs):
        pass

    callbacks = [accepts_more, fusedopt.weight_decay, fusedopt.average_grad, fusedopt.momentum_step]
    assert messages(callbacks, mom=0.9, wd=0.0, my_hyper=1.0, backend=backend) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_that_nobody_takes_is_named_with_what_may_be_meant(backend):
    def keeps(p, lr, avg=None, **kwargs):
        avg = torch.zeros_like(p) if avg is None else avg
        p.data.sub_(avg.add_(p.grad), alpha=lr)
        return {"avgs": avg}

    (said,) = messages([keeps], backend=backend)
    assert "the state 'avgs'" in said and "'avg'" in said


def not_returned(p, lr, mom, avg=None, **kwargs):
    if avg is None:
        avg = torch.zeros_like(p)
    avg.mul_(mom).add_(p.grad)
    p.data.sub_(avg, alpha=lr)


def returned_bare(p, lr, mom, avg=None, **kwargs):
    avg = torch.zeros_like(p) if avg is None else avg
    avg = mom * avg + p.grad
    p.data.sub_(avg, alpha=lr)
    return avg


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("callback", [not_returned, returned_bare, functools.partial(not_returned, mom=0.5)])
def test_state_that_is_made_and_not_returned_is_named_once(callback, backend):
    (said,) = messages([callback], mom=0.9, backend=backend)
    assert f"{fusedopt.callback.name_of(callback)} (test_truth.py:" in said and "return {'avg': avg}" in said


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_that_are_no_forgotten_state_are_passed_over(backend):
    def optional(p, lr, damp=None, scale=None, hess=None, **kwargs):
        damp = 0.5 if damp is None else damp
        if scale is None:
            scale = 1.0
        scale = scale or 2.0
        hess = p.grad if hess is None else hess
        scratch = torch.zeros_like(p)
        scratch.add_(p.grad)
        p.data.sub_(scratch * damp * scale * hess, alpha=lr)

    def in_some(p, lr, avg=None, **kwargs):
        if p.dim() < 2:
            return dict(other=p.grad)
        avg = torch.zeros_like(p) if avg is None else avg
        avg.add_(p.grad)
        return {"avg": avg}

    def in_a_call(p, lr, mine=None, **kwargs):
        mine = torch.zeros_like(p) if mine is None else mine
        p.data.sub_(mine.add_(p.grad), alpha=lr)
        return dict(mine=mine)

    def by_another(p, other=None, **kwargs):
        other = torch.zeros_like(p) if other is None else other
        other.mul_(2.0)
        p.data.sub_(other)

    assert messages([optional], backend=backend) == []
    assert messages([in_some, by_another, in_a_call], backend=backend) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, whose", [("lr", "the hyperparameter"), ("p", "the parameter")])
def test_state_whose_name_callbacks_know_as_something_else_is_said(name, whose, backend):
    def keeps(p, lr, **kwargs):
        p.data.sub_(p.grad, alpha=lr)
        return {name: p.grad * 1}

    (said,) = messages([keeps], backend=backend)
    assert f"the state {name!r} is kept, but {whose} is" in said


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_whose_name_is_no_text_is_refused(backend):
    def numbers(p, lr, **kwargs):
        p.data.sub_(p.grad, alpha=lr)
        return {0: p.grad * 1}

    with pytest.raises(TypeError, match=r"numbers \(test_truth\.py:\d+\) returned state under 0"):
        messages([numbers], backend=backend)


@pytest.mark.parametrize(
    "scaled",
    [
        lambda g, lr: np.float64(0.5) * g,
        lambda g, lr: g * np.float32(0.3),
        lambda g, lr: g / np.int64(3) - np.float32(0.1),
        lambda g, lr: np.float64(2.0) ** g,
        lambda g, lr: torch.where(np.float32(0.1) < g, g, 0.0),
        lambda g, lr: g.mul(np.sqrt(lr) * np.float32(0.5)),
    ],
    ids=["first", "second", "both", "power", "comparison", "of a rate"],
)
def test_numbers_of_numpys_meet_tensors_as_in_torch(scaled):
    def rule(p, lr, **kwargs):
        p.data.sub_(scaled(p.grad, lr), alpha=np.float32(0.25))

    ours = parameters()
    opt = fusedopt.Optimizer(ours, [rule], lr=0.1, backend="cpp")
    for _ in range(4):
        opt.step()
    expected = looped(parameters(), [rule], 4, lr=0.1)
    assert opt.explain().eager == () and "3 of 4 without" in str(opt.explain())
    for p, q in zip(ours, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def draws(p, lr, **kwargs):
    p.data.add_(torch.randn_like(p), alpha=lr)


def draws_in_place(p, lr, **kwargs):
    p.data.add_(torch.empty_like(p).uniform_(), alpha=lr)


@pytest.mark.parametrize("callback", [draws, draws_in_place])
def test_a_rule_with_random_numbers_is_told_of_those_in_kernels(callback):
    (said,) = messages([callback], backend="cpp")
    assert "fusedopt.uniform and fusedopt.normal draw" in said


def test_state_that_is_looked_up_is_taken():
    def keeps(p, lr, **kwargs):
        avg = kwargs.get("avg")
        avg = torch.zeros_like(p) if avg is None else avg
        p.data.sub_(avg.add_(p.grad), alpha=lr)
        return {"avg": avg}

    def hands_on(p, **kwargs):
        return keeps(p, **kwargs)

    assert messages([keeps]) == [] and messages([hands_on]) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_callback_that_cannot_be_called_names_what_it_lacks(backend):
    def strict(p, lr):
        p.data.sub_(p.grad, alpha=lr)

    def needy(p, lr, sqr_avg, **kwargs):
        p.data.sub_(sqr_avg, alpha=lr)

    with pytest.raises(TypeError, match=r"strict \(test_truth\.py:\d+\) does not take .*wd.* \*\*kwargs"):
        messages([fusedopt.weight_decay, strict], wd=0.1, backend=backend)
    with pytest.raises(TypeError, match=r"needy \(test_truth\.py:\d+\) needs sqr_avg, .*default"):
        messages([needy], backend=backend)


def test_every_reason_is_kept_and_every_callback_is_said_once():
    def sorts(p, lr, **kwargs):
        p.data.sub_(p.grad.msort(), alpha=lr)

    def by_shape(p, lr, **kwargs):
        p.data.sub_(p.grad.cummax(0).values if p.ndim > 1 else p.grad.logcumsumexp(0), alpha=lr)

    params = [*parameters(1), *parameters(1, shape=(2, 2))]
    opt = fusedopt.Optimizer(params, [sorts, by_shape], lr=0.1, backend="cpp")
    with pytest.warns(RuntimeWarning) as caught:
        opt.step(), opt.step()
    assert len(caught) == 2
    reasons = [e.reason for e in opt.explain().eager]
    for operation in ("Tensor.msort", "Tensor.cummax", "Tensor.logcumsumexp"):
        assert sum(operation in r and "test_truth.py:" in r and "Remedy:" in r for r in reasons) == 1


def test_nothing_symbolic_is_in_what_a_callback_raises_or_leaves_behind():
    class Failed(Exception):
        pass

    kept = types.SimpleNamespace(last=None)

    def raises(p, lr, **kwargs):
        norm = p.grad.norm()
        if lr > 1:
            raise Failed(lr, norm)

    def leaves(p, lr, table={}, **kwargs):  # noqa: B006
        table["last"] = p.grad * 2
        kept.last = table["last"]
        p.data.sub_(table["last"], alpha=lr)

    params = parameters(1)
    opt = fusedopt.Optimizer(params, [raises, leaves], lr=0.1, backend="cpp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step()
        opt.set_hyper("lr", 2.0)
        with pytest.raises(Failed) as error:
            opt.step()
    lr, norm = error.value.args
    assert type(lr) is float and type(norm) is torch.Tensor and type(kept.last) is torch.Tensor
    assert torch.equal(kept.last, params[0].grad * 2)
