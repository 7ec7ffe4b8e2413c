"""The tracer's rules: a callback list runs once on symbolic tensors, and what it did is what it does eagerly.

``assert_as_eager`` traces and interprets (no compiler) and runs the same callbacks eagerly, in float64.
"""

import functools
import math
import re
import warnings

import numpy as np
import pytest
import torch
from helpers import Stepper, assert_as_eager, signature

import fusedopt
from fusedopt import callbacks, table
from fusedopt.ir.program import Buffer
from fusedopt.ir.stages import stages
from fusedopt.trace.methods import STRUCTURAL_POWERS
from fusedopt.trace.run import MAX_PATHS, NeedsAttribute
from fusedopt.trace.signals import Untraceable
from fusedopt.trace.tracer import trace

F32, F64 = torch.float32, torch.float64


def ops(program):
    return [v.op for v in program.values]


def callback(body, name="callback", **scope):
    """A callback ``def callback(p, lr, m=None, **kwargs)`` with this body."""
    namespace = {"torch": torch, "math": math, "np": np, "functional": torch.nn.functional} | scope
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    exec(f"def {name}(p, lr, m=None, **kwargs):\n{lines}", namespace)
    return namespace[name]


def test_the_comparison_with_eager_can_fail():
    """The tracer sees other code than the eager run: a sign, a state that is not kept, a number's type."""
    for traced, eager in [
        ("p.data.sub_(p.grad)", "p.data.add_(p.grad)"),
        ("return {}", "return {'x': p.grad.clone()}"),
        ("return {'x': 1}", "return {'x': 1.0}"),
    ]:
        body = f"if type(p).__name__ == 'SymParameter':\n    {traced}\nelse:\n    {eager}"
        with pytest.raises(AssertionError):
            assert_as_eager(callback(body))


# ---------------------------------------------------------------- locations

LOCATIONS = {
    "in-place on .data": "p.data.add_(p.grad, alpha=-lr)",
    "chained in place": "p.data.mul_(1 - lr).add_(p.grad).clamp_(-1, 1)",
    "augmented assignment": "p.data -= lr * p.grad",
    "all augmented assignments": (
        "p.data *= 2\np.data += p.grad\np.data /= 3\np.data -= 1\np.grad **= 2\np.data += p.grad"
    ),
    "assignment to .data": "p.data = p.data - lr * p.grad",
    "the parameter itself": "with torch.no_grad():\n    p.add_(p.grad, alpha=-lr)",
    ".data is an alias": "a, b = p.data, p.data\na.add_(1)\np.data.add_(b)",
    ".detach() is an alias": "g = p.grad.detach()\ng.mul_(2)\np.data.sub_(p.grad)",
    "same-dtype .to() is an alias": "g = p.grad.to(p.dtype)\ng.mul_(2)\np.data.sub_(p.grad)",
    "clone is no alias": "x = p.data.clone()\nx.add_(1)\np.data.add_(x)",
    "an op's result is no alias": "x = p.data * 1\nx.add_(1)\np.data.add_(x)",
    "the gradient, in place": "p.grad.mul_(2)\np.data.sub_(p.grad, alpha=lr)",
    "the gradient, assigned": "p.grad = p.grad * 2\np.data.sub_(p.grad)",
    "the gradient's data, assigned": "p.grad.data = p.grad * 2\np.data.sub_(p.grad)",
    "out=": "torch.add(p.data, p.grad, alpha=-lr, out=p.data)",
    "out= of a new tensor": "x = torch.empty_like(p)\ntorch.mul(p.data, 2, out=x)\np.data.sub_(x)",
    "copy_": "p.data.copy_(p.grad)\np.grad.mul_(5)",
    "fill_ and zero_": "p.grad.fill_(lr)\np.data.add_(p.grad)\np.grad.zero_()\np.data.add_(p.grad)",
    "in place on a 0-d tensor": "n = p.grad.norm()\nn.mul_(2)\np.data.div_(n)",
    "a 0-d tensor into one with elements": "p.grad.copy_(p.grad.mean())\np.data.sub_(p.grad)",
    "in place on a mask": "x = p.grad > 0\nx.logical_not_()\np.data.mul_(x)",
    "keyword arguments": "torch.mul(input=p.data, other=0.5, out=p.data)\np.data.sub_(other=p.grad)",
}


@pytest.mark.parametrize("name", LOCATIONS)
def test_locations_are_rebound_as_memory_would_be_written(name):
    assert_as_eager([callback(LOCATIONS[name]), callbacks.sgd_step])


def test_a_changed_gradient_is_seen_by_later_callbacks_and_is_not_stored():
    t = assert_as_eager([callbacks.l2_reg, callbacks.sgd_step], wd=0.1).traces[-1]
    assert [n for n, _ in t.program.stores] == ["param"]
    assert fused_store_of_grad([callbacks.l2_reg]) == ["grad"]


def fused_store_of_grad(cbs):
    """What is stored when an eager callback follows."""
    t = trace(cbs, signature(), dict(lr=0.1, wd=0.1), work=True)
    return [n for n, _ in t.program.stores]


# ---------------------------------------------------------------- ops

OPS = {
    "operators": "p.data += (-p.grad + 2) * p.data / 3 - abs(p.grad) + (1 - p.grad) + 2 / (p.data + 9)",
    "add with alpha": (
        "p.data.add_(p.grad, alpha=-lr)\np.data.sub_(p.grad, alpha=2)\np.data.add_(torch.rsub(p.grad, 1))"
    ),
    "addcmul": "p.data.addcmul_(p.grad, p.grad, value=-lr)\np.data.addcmul_(p.grad, p.data)",
    "addcdiv": "p.data.addcdiv_(p.grad, p.grad.abs() + 1, value=-lr)",
    "lerp": "p.data.lerp_(p.grad, lr)\np.data.lerp_(p.grad, 1 - lr)\np.data.lerp_(p.grad, 0.5)",
    "lerp by a tensor": "p.data.lerp_(p.grad, p.grad.sigmoid())",
    "clamp": (
        "p.data.clamp_(-lr, lr)\np.data.add_(p.grad.clamp(min=-lr).clamp(max=lr)).add_(p.grad.clip(-1, 1))"
    ),
    "clamp by tensors": "p.data.clamp_(-p.grad.abs(), p.grad.abs())",
    "where": (
        "p.data.copy_(torch.where(p.grad > 0, p.data, lr))\np.data.add_(p.data.where(p.grad < 0, p.grad))"
    ),
    "masked_fill": "p.data.masked_fill_(p.grad > 0, lr)",
    "masks as numbers": "p.data.mul_(p.grad > 0).add_((p.grad < lr).float()).add_(~(p.grad > p.data))",
    "masks together": (
        "a, b = p.grad > 0, p.data > 0\np.data.mul_(a & b).add_(a | b).add_(a ^ b).mul_(torch.logical_not(a))"
    ),
    "comparisons": (
        "p.data.mul_(p.grad.gt(0)).add_(p.grad.le(lr)).add_(p.grad == p.data).add_(p.grad.ne(p.data) > 0)"
    ),
    "sign": "p.data.sub_(p.grad.sign() * lr).add_(torch.sign(p.data))",
    "functions": (
        "p.data.add_(p.grad.exp() + p.grad.tanh() + p.grad.sin() + p.grad.cos() + p.grad.atan() "
        "+ p.grad.erf())"
    ),
    "logarithms": "x = p.grad.abs() + 1\np.data.add_(x.log() + x.log1p() + x.log2() + x.expm1())",
    "rounding": "x = p.grad * 3\np.data.add_(x.floor() + 2 * x.ceil() + 3 * x.trunc() + 4 * x.round())",
    "div with rounding": (
        "p.data.add_(torch.div(p.grad, lr, rounding_mode='floor')).add_((p.grad / lr).trunc())"
    ),
    "softplus and sigmoid": (
        "p.data.add_(functional.softplus(p.grad, 2.0)).add_(functional.softplus(p.grad))"
        ".mul_(p.grad.sigmoid())"
    ),
    "maximum": (
        "p.data.add_(torch.maximum(p.grad, p.data)).add_(torch.max(p.grad, p.data)).add_(p.grad.min(p.data))"
    ),
    "atan2": "p.data.add_(torch.atan2(p.grad, p.data))",
    "nan tests": "p.data.add_(p.grad.isnan().float()).mul_(p.grad.isfinite()).add_(torch.isinf(p.grad))",
    "new tensors": (
        "p.data.add_(torch.ones_like(p) * lr).add_(torch.full_like(p, lr)).add_(torch.zeros_like(p))"
    ),
    "long names": "p.data.multiply_(2).divide_(3).subtract_(p.grad).add_(p.grad.absolute().negative())",
    "a 0-d tensor from outside": "p.data.mul_(torch.tensor(0.5))",
}


@pytest.mark.parametrize("name", OPS)
def test_elementwise_ops_are_eager_torchs(name):
    assert_as_eager(callback(OPS[name]))


REDUCTIONS = {
    "norms": (
        "p.data.add_(p.grad.norm() + p.grad.norm(1) + p.grad.norm(math.inf) + p.grad.norm(3) "
        "+ p.grad.norm(-math.inf))"
    ),
    "torch.norm": (
        "p.data.add_(torch.norm(p.grad)).add_(torch.linalg.norm(p.grad))"
        ".add_(torch.linalg.vector_norm(p.grad, ord=1))"
    ),
    "sum and mean": (
        "p.data.add_(p.grad.sum() * p.grad.mean()).add_(torch.sum(p.data * p.grad)).mul_(torch.mean(p.grad))"
    ),
    "max and min": "p.data.add_(p.grad.max()).add_(p.grad.min()).mul_(torch.max(p.data)).sub_(p.grad.abs().amax())",
    "std and var": (
        "p.data.add_(p.grad.std()).add_(p.grad.var(unbiased=False)).add_(torch.std(p.grad, correction=0))"
    ),
    "rms": "p.data.mul_(p.grad.pow(2).mean().sqrt()).add_(p.grad.square().sum() ** 0.5)",
    "dot": "p.data.add_(p.grad.dot(p.data)).add_(torch.dot(p.grad, p.grad))",
    "any and all": "p.data.mul_((p.grad > 0).any()).add_((p.grad > -9).all())",
    "counts": "p.data.add_((p.grad > 0).sum()).add_(p.grad.norm(0))",
    "arithmetic on them": (
        "n = p.grad.norm()\np.data.mul_(1 / (1 + n)).add_((n - 1).clamp(min=0)).add_(2 ** n).add_(-n)"
    ),
    "of what has one": "g = p.grad / p.grad.norm()\np.data.sub_(g * (g - p.data).norm())",
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_whole_tensor_reductions_are_eager_torchs(name):
    assert_as_eager(callback(REDUCTIONS[name]))


def test_a_value_that_occurs_twice_is_computed_once():
    t = assert_as_eager(callback("p.data.add_(p.grad.norm())\np.data.mul_(p.grad.norm())")).traces[0]
    assert ops(t.program).count("sum") == 1 and len(stages(t.program)) == 2


# ---------------------------------------------------------------- numbers and structure


@pytest.mark.parametrize("exponent", STRUCTURAL_POWERS)
def test_structural_exponents_are_no_powers_and_no_slots(exponent):
    body = f"x = p.grad.abs() + 1\np.data.mul_(x ** {exponent}).add_(torch.pow(x, {exponent}))"
    t = assert_as_eager(callback(body)).traces[0]
    assert "pow" not in ops(t.program) and len(t.slots) == 1  # the 1 that is added


def test_any_other_exponent_is_a_power_with_a_slot():
    seen = assert_as_eager(
        callback("p.data.add_(p.grad.abs() ** kwargs['k']).add_(kwargs['k'] ** p.grad)"),
        hypers=lambda t: dict(k=1.25 + t),
    )
    assert len(seen.programs) == 1 and "pow" in ops(seen.programs[0])


def test_a_hyperparameter_that_becomes_a_structural_exponent_selects_another_program():
    powered = callback("p.data.mul_(p.grad.abs() ** kwargs['k'])")
    seen = assert_as_eager(powered, hypers=lambda t: dict(k=[1.5, 2.0, 2.5][t]))
    assert [("pow" in ops(t.program)) for t in seen.traces] == [True, False, True]
    assert seen.traces[0].program == seen.traces[2].program


@pytest.mark.parametrize("row", table.rows(calls=False), ids=lambda row: f"{row.face}-{row.name}")
def test_a_schedule_selects_no_other_program(row):
    """Every number that may change between steps is a slot: lr, momentum, decay, epsilon, the step."""
    opt = row.factory([torch.zeros(1, requires_grad=True)], **row.variants[0].kwargs)
    hyper = opt.hyper_map.of_group(opt.param_groups[0])
    first = trace(opt.cbs, signature(), hyper)
    found = set()
    for scale, step in ((1.0, 200), (0.37, 200), (0.93, 206), (0.0123, 284)):
        changed = {k: v * scale if type(v) is float else v for k, v in hyper.items()}
        changed["sqr_mom"] = hyper.get("sqr_mom", 0.9)  # it decides when RAdam becomes adaptive
        numbers = {k: v if k == "mu_product" else step for k, v in first.new_numbers().items()}
        t = trace(opt.cbs, signature(**first.created, **numbers), changed)
        found.add(t.program)
        assert t.created == {}
    assert len(found) == 1


def test_structure_selects_another_program():
    """The counterpart: a flag, another dtype, weight decay switched off."""
    adam = [callbacks.weight_decay, callbacks.average_grad, callbacks.momentum_step]
    hyper = dict(lr=0.1, wd=0.1, mom=0.9)
    base = trace(adam, signature(), hyper).program
    assert base == trace(adam, signature(), hyper | dict(wd=0.2)).program
    undecayed = trace(adam, signature(), hyper | dict(wd=0))
    assert undecayed.program == trace(adam, signature(do_wd=False), hyper).program
    others = [
        undecayed,
        trace(adam, signature(torch.bfloat16), hyper),
        trace(adam, signature(F32, torch.bfloat16), hyper),
        trace(adam[:2], signature(), hyper),
    ]
    assert len({base, *(t.program for t in others)}) == 5


def test_the_order_of_a_norm_is_structure():
    seen = assert_as_eager(
        callback("p.data.sub_(p.grad.norm(kwargs['k']))"), hypers=lambda t: dict(k=[1, 2, 3][t])
    )
    assert len(seen.programs) == 3
    assert [(g.value, g.where) for g in seen.traces[0].scalars.guards] == [(1, "escape")]


def test_plain_numbers_in_a_callback_are_slots_too():
    values = iter([0.5, 0.25, 0.125, 0.1])
    drawn = callback("p.data.mul_(next(values)).sub_(p.grad, alpha=3)", values=values)
    seen = Stepper([drawn], torch.ones(2), lr=0.1)
    for _ in range(3):
        seen.step(torch.zeros(2))
    assert len(seen.programs) == 1
    assert seen.p.tolist() == [0.5 * 0.25 * 0.125] * 2


def test_a_number_of_one_and_a_computed_one_are_told_apart():
    """alpha=1 is left out of the code; an alpha that happens to be 1.0 may be another number on the next step."""
    seen = assert_as_eager(
        callback("p.data.add_(p.grad, alpha=lr)"), hypers=lambda t: dict(lr=[1.0, 0.5, 1][t])
    )
    assert len(seen.programs) == 1
    assert trace([callback("p.data.add_(p.grad)")], signature(), dict(lr=1.0)).slots == ()


def test_hyperparameter_wins_over_state_of_the_same_name():
    stores = callback("return {'lr': 5.0, 'k': 7.0}")
    uses = callback("p.data.mul_(lr).add_(kwargs['k'])")
    seen = assert_as_eager([stores, uses], lr=0.1)
    assert seen.state == {"lr": 5.0, "k": 7.0}


def test_argument_defaults_are_recorded_numbers():
    """So the first step (the default) and later ones (state) are one program."""
    seen = assert_as_eager([callbacks.step_stat, callback("p.data.div_(kwargs['step'] + 1.5)")])
    assert len(seen.programs) == 1 and type(seen.state["step"]) is int and seen.state["step"] == 3


def test_a_partial_is_a_callback():
    average = functools.partial(callbacks.average_grad, dampening=True)
    seen = assert_as_eager([average, callbacks.momentum_step], mom=0.9)
    assert len(seen.programs) == 1
    with_default = functools.partial(callback("p.data.mul_(kwargs['k'])"), k=0.5)
    assert_as_eager([with_default])


def test_flags_and_none_are_structure():
    switch = callback("if kwargs['on']:\n    p.data.sub_(p.grad)\nelse:\n    p.data.add_(1)")
    seen = assert_as_eager(switch, hypers=lambda t: dict(on=[True, False, None][t]))
    assert len(seen.programs) == 2
    keeps = callback("return {'seen': True, 'name': 'x', 'nothing': None}")
    assert assert_as_eager(keeps).state == {"seen": True, "name": "x", "nothing": None}


def test_a_0_d_state_number_is_one_per_tensor():
    seen = assert_as_eager(
        callback("n = p.grad.norm() if m is None else (m + p.grad.norm()) / 2\nreturn {'m': n}")
    )
    assert seen.state["m"].shape == ()
    assert dict(seen.traces[-1].program.buffers)["state.m"].kind == "S"


# ---------------------------------------------------------------- state


def test_returned_state_is_taken_by_value():
    """The gradient that is returned is changed in place afterwards; the state is not."""
    keeps = callback("return {'kept': p.grad.data, 'start': p.data, 'again': kwargs.get('kept')}")
    changes = callback("p.grad.mul_(100)\np.data.sub_(p.grad)")
    start = torch.ones(3, dtype=F64)
    seen = Stepper([keeps, changes], start, lr=0.1)
    first, second = torch.randn(2, 3, dtype=F64)
    seen.step(first)
    assert torch.equal(seen.state["kept"], first) and torch.equal(seen.state["start"], start)
    seen.step(second)
    assert torch.equal(seen.state["kept"], second) and torch.equal(seen.state["again"], first)


def test_one_tensor_under_two_keys_is_two_states():
    both = callback("x = p.grad * 2\nreturn {'a': x, 'b': x}")
    seen = assert_as_eager([both, callback("kwargs['a'].add_(1)\np.data.sub_(kwargs['b'])")])
    assert not torch.equal(seen.state["a"], seen.state["b"])


def test_state_changed_in_place_need_not_be_returned():
    first = callback("if m is None:\n    return {'m': torch.zeros_like(p)}")
    assert_as_eager([first, callback("m.add_(p.grad)\np.data.sub_(m)")])


@pytest.mark.parametrize("key", ["param", "grad", "p_", "data", "s0", "lr2", "T", "a-b"])
def test_state_may_have_any_name(key):
    """ "param" and "grad" too: they are not the parameter and its gradient."""
    keeps = callback(f"m = kwargs.get({key!r})\nreturn {{{key!r}: p.grad * 2 if m is None else m + p.grad}}")
    seen = assert_as_eager([keeps, callbacks.sgd_step])
    assert list(seen.state) == [key]


def test_zeros_state_shares_the_first_steps_program():
    seen = assert_as_eager([callbacks.average_grad, callbacks.momentum_step], mom=0.9)
    assert seen.traces[0].shared and len(seen.programs) == 1
    assert seen.traces[0].created == {"grad_avg": Buffer(F64, "F")} and seen.traces[1].created == {}


@pytest.mark.parametrize("start", ["p.data.clone()", "torch.ones_like(p)", "p.grad.clone()", "p.grad.norm()"])
def test_other_state_has_a_first_step_program_of_its_own(start):
    body = f"if m is None:\n    m = {start}\nelse:\n    m = m * 0.9 + 1\np.data.sub_(m)\nreturn {{'m': m}}"
    seen = assert_as_eager(callback(body))
    assert not seen.traces[0].shared
    assert len(seen.programs) == 2 and seen.traces[1].program == seen.traces[2].program


def test_empty_like_starts_as_zeros():
    """Never uninitialised memory: with zeros, the first step is like all later ones."""
    body = "if m is None:\n    m = torch.empty_like(p)\nm.mul_(0.5).add_(p.grad)\np.data.sub_(m)\nreturn {'m': m}"
    seen = Stepper([callback(body)], torch.zeros(3), lr=0.1)
    seen.step(torch.ones(3))
    seen.step(torch.ones(3))
    assert len(seen.programs) == 1 and seen.p.tolist() == [-2.5] * 3


def test_state_may_appear_at_step_three():
    late = callback(
        "if kwargs['step'] < 3:\n    p.data.sub_(p.grad)\n    return\n"
        "m = torch.zeros_like(p) if m is None else m\nm = 0.9 * m + p.grad\np.data.sub_(m)\nreturn {'m': m}"
    )
    seen = assert_as_eager([callbacks.average_grad, callbacks.step_stat, late], steps=5, mom=0.9)
    assert [sorted(t.created) for t in seen.traces] == [["grad_avg"], [], ["m"], [], []]
    assert len(seen.programs) == 2


def test_state_may_be_replaced_by_a_number_and_back():
    turns = callback("return {'m': p.grad * 2 if kwargs['step'] % 2 else 0.5}")
    assert_as_eager([callbacks.step_stat, turns], steps=4)


def test_new_state_has_the_dtype_the_callback_asked_for():
    def keeps(p, like=None, grad_like=None, wide=None, mixed=None, n=None, **kwargs):
        like = p.grad.data
        wide = torch.zeros_like(p, dtype=F32)
        return {
            "like": torch.zeros_like(p),
            "grad_like": like * 2,
            "wide": wide,
            "mixed": wide + like,
            "n": like.norm(),
        }

    t = trace([keeps], signature(torch.bfloat16, torch.float16), dict(lr=0.1))
    dtypes = {k: b.dtype for k, b in t.created.items()}
    expected = {"like": torch.bfloat16, "grad_like": torch.float16, "wide": F32, "mixed": F32, "n": F32}
    assert dtypes == expected
    p = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.ones(2, dtype=torch.bfloat16)
    opt = fusedopt.Optimizer([p], [keeps], backend="reference", lr=0.1)
    opt.step()
    t = trace([keeps], signature(torch.bfloat16), dict(lr=0.1))
    assert {k: b.dtype for k, b in t.created.items()} == {k: v.dtype for k, v in opt.state[p].items()}
    t = trace([keeps], signature(torch.bfloat16), dict(lr=0.1), state_dtype=F32)
    assert {b.dtype for b in t.created.values()} == {F32}


def test_values_are_computed_in_float32_or_in_float64():
    def compute(*dtypes, **state):
        return trace([callbacks.sgd_step], signature(*dtypes, **state), dict(lr=0.1)).program.compute

    assert compute(torch.bfloat16) == compute(torch.float16) == compute(F32) == F32
    assert compute(F64) == compute(F32, F64) == compute(F32, m=Buffer(F64, "F")) == F64


def test_the_callback_sees_the_compute_dtype():
    seen = []
    trace(
        [callback("seen.append((p.dtype, p.grad.dtype, (p > 0).dtype))", seen=seen)],
        signature(torch.bfloat16),
        {"lr": 1},
    )
    assert seen == [(F32, F32, torch.bool)]


# ---------------------------------------------------------------- branches on norms and means

BIG, SMALL = torch.full((7,), 5.0, dtype=F64), torch.full((7,), 0.01, dtype=F64)


BRANCHES = {
    "if": "n = p.data.norm()\nif n > 1:\n    p.data.div_(n)\nelse:\n    p.data.add_(p.grad)",
    "if without else": "if p.data.norm() > 1:\n    p.data.sub_(p.grad)",
    "truth of a number": "n = p.data.norm()\nif n:\n    p.data.div_(n)",
    "not": "if not p.data.norm() > 1:\n    p.data.sub_(p.grad)",
    "conditional expression": "p.data.sub_(p.grad * (lr if p.data.norm() < 1 else 2 * lr))",
    "min of a number and a norm": "p.data.sub_(p.grad * min(lr, p.data.norm()))",
    "max of a norm and a number": "p.data.sub_(p.grad * max(p.data.norm(), lr))",
    "two in a row": "if p.data.norm() > 1:\n    p.data.mul_(0.5)\nif p.grad.norm() > 2:\n    p.data.add_(1)",
    "nested": (
        "if p.data.norm() > 1:\n    if p.grad.norm() > 2:\n        p.data.add_(1)\nelse:\n    p.data.mul_(3)"
    ),
    "or": "q = 1 if p.data.norm() == 0 or p.grad.norm() > 2 else p.data.norm()\np.data.sub_(p.grad * q)",
    "any": "if (p.data > 1).any():\n    p.data.sub_(1)",
    "isfinite": "if torch.isfinite(p.grad).all():\n    p.data.sub_(p.grad)",
    "one side raises nothing and returns": "if p.data.norm() < 1:\n    return\np.data.sub_(p.grad)",
    "both sides return state": (
        "if p.data.norm() > 1:\n    return {'m': p.grad * 2}\nreturn {'m': p.data * 3}"
    ),
    "the same question twice": (
        "n = p.data.norm()\nif n > 1:\n    p.data.add_(1)\nif n > 1:\n    p.data.add_(p.grad)"
    ),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_on_a_norm_is_right_on_either_side(name):
    """As eager where the parameter is large, small and zero, by one program."""
    for start in (BIG, SMALL, BIG * 0):
        seen = assert_as_eager(callback(BRANCHES[name]), start=start.clone())
        assert len(seen.programs) == 1 and "where" in ops(seen.programs[0])


@pytest.mark.parametrize(
    ("result", "large", "small"),
    [
        ("min(lr, r)", 0.1, SMALL.norm().item()),
        ("r if r < lr else 3", 3, SMALL.norm().item()),
        ("2 if r > lr else 4.0", 2, 4),
    ],
)
def test_what_a_branch_decides_is_a_number_per_tensor(result, large, small):
    """Eagerly it would be a Python number on one side; the kernel cannot tell the host which."""
    for start, expected in ((BIG, large), (SMALL, small)):
        seen = Stepper(
            [callback(f"r = p.data.norm()\nreturn {{'m': {result}}}"), callback("p.data.mul_(m)")],
            start,
            lr=0.1,
        )
        seen.step(SMALL)
        assert seen.state["m"].shape == () and seen.state["m"].item() == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(seen.p, start * expected)


def test_a_branch_leaves_counters_alone():
    """A number that is the same on all paths stays a number, and an int."""
    counts = callback(
        "if p.data.norm() > 1:\n    p.data.mul_(0.9)\nreturn {'count': kwargs.get('count', 0) + 1}"
    )
    seen = assert_as_eager([callbacks.step_stat, counts], start=BIG.clone())
    assert seen.state == {"step": 3, "count": 3} and type(seen.state["count"]) is int


def count_paths(body):
    calls = []
    trace([callback("calls.append(1)\n" + body, calls=calls)], signature(m=Buffer(F32, "F")), dict(lr=0.1))
    return len(calls)


@pytest.mark.parametrize(("n", "paths"), [(0, 1), (1, 2), (2, 4), (3, 8)])
def test_every_path_is_taken_once(n, paths):
    assert (
        count_paths(
            "\n".join(f"if p.grad.norm() > {k}:\n    p.data.add_({k + 1})" for k in range(n)) or "pass"
        )
        == paths
    )
    assert MAX_PATHS == 8


def test_a_chain_of_else_ifs_has_a_path_for_each_link():
    links = "".join(
        f"{'el' if k else ''}if p.grad.norm() > {9 - k}:\n    p.data.add_({k})\n" for k in range(7)
    )
    assert count_paths(links) == 8


def test_more_than_eight_paths_are_refused():
    body = "\n".join(f"if p.grad.norm() > {k}:\n    p.data.add_({k + 1})" for k in range(4))
    with pytest.raises(Untraceable, match="more than 8 paths"):
        count_paths(body)


def test_lambs_four_paths_and_larcs_two_merge_into_two_stages():
    for row, wheres in ((table.row("fastai", "Lamb"), 2), (table.row("fastai", "Larc"), 0)):
        opt = row.factory([torch.zeros(1, requires_grad=True)], **row.variants[0].kwargs)
        program = trace(opt.cbs, signature(), opt.hyper_map.of_group(opt.param_groups[0])).program
        assert len(stages(program)) == 2 and ops(program).count("where") == wheres
        kinds = {program.values[i].kind for i in range(len(program.values)) if ops(program)[i] == "where"}
        assert kinds <= {"S"}, "selected once per tensor, not per element"


def test_a_branch_that_decides_which_state_there_is_is_refused():
    with pytest.raises(Untraceable, match="decides which state there is"):
        trace([callback("if p.grad.norm() > 1:\n    return {'new': p.grad * 2}")], signature(), dict(lr=0.1))


def test_a_branch_that_decides_a_flag_is_refused():
    with pytest.raises(Untraceable, match="decides about a flag"):
        trace([callback("return {'big': bool(p.grad.norm() > 1)}")], signature(), dict(lr=0.1))


# ---------------------------------------------------------------- shapes


def test_a_shape_attribute_that_is_read_extends_the_signature():
    by_size = callback("p.data.mul_(1 / p.numel()) if p.ndim > 1 else p.data.zero_()")
    with pytest.raises(NeedsAttribute) as need:
        trace([by_size], signature(F32, F32, ()), dict(lr=0.1))
    assert need.value.name == "ndim"
    t = trace([by_size], signature(F32, F32, (("ndim", 2), ("count", 6))), dict(lr=0.1))
    assert t.slot_values() == [1 / 6]
    assert trace([by_size], signature(F32, F32, (("ndim", 1),)), dict(lr=0.1)).slots == ()


def test_attributes_of_norms_and_dtypes_need_no_signature():
    body = "n = p.grad.norm()\nassert n.shape == () and n.ndim == 0 and n.numel() == 1\nassert p.dtype == torch.float32"
    body += "\nassert p.device.type == 'cpu' and not p.is_sparse and p.is_floating_point()"
    trace([callback(body)], signature(), dict(lr=0.1))


def test_parameters_of_other_shapes_are_traced_apart_only_if_a_callback_looks():
    def matrices_decay(p, lr, **kwargs):
        if p.ndim > 1:
            p.data.mul_(1 - lr)

    params = [torch.ones(s, requires_grad=True) for s in [(2, 3), (3,), (4, 4), (1,)]]
    for p in params:
        p.grad = torch.zeros_like(p)
    opt = fusedopt.Optimizer(params, [matrices_decay], backend="cpp", lr=0.5)
    opt.step()
    assert [p.mean().item() for p in params] == [0.5, 1, 0.5, 1]
    opt = fusedopt.Optimizer(params, [callbacks.sgd_step], backend="cpp", lr=0.5)
    opt.step()
    assert opt.explain().launches == 1 and opt.explain().eager == ()


# ---------------------------------------------------------------- what has no fused form

UNTRACEABLE = {
    "branch on elements": ("if p.grad > 0:\n    p.data.add_(1)", "a branch on element values"),
    "min of elements": ("p.data.mul_(min(lr, p.grad))", "a branch on element values"),
    "index": ("p.data.add_(p.grad[0])", "indexing"),
    "slice": ("p.data[1:] = 0", "some elements are written to"),
    "mask index": ("p.data[p.grad > 0] = 0", "some elements are written to"),
    "elements by a mask": ("p.data.add_(p.grad[p.grad > 0].sum())", "some elements are taken"),
    "len": ("len(p.grad)", "read on the host"),
    "iteration": ("for g in p.grad:\n    pass", "read on the host"),
    "item": ("p.data.mul_(p.grad.norm().item())", "item"),
    "float": ("p.data.mul_(float(p.grad.norm()))", "float"),
    "math of a norm": ("p.data.mul_(math.sqrt(p.grad.norm()))", "read on the host"),
    "format": ("print(f'{p.grad}')", "read on the host"),
    "tolist": ("p.grad.tolist()", "read on the host"),
    "unknown function": ("p.data.add_(torch.logcumsumexp(p.grad, 0))", r"torch\.logcumsumexp"),
    "unknown method": ("p.data.add_(p.grad.logcumsumexp(0))", r"Tensor\.logcumsumexp"),
    "unknown in-place method": ("p.data.hypot_(p.grad)", r"Tensor\.hypot_"),
    "sort": ("torch.msort(p.grad)", r"torch\.msort"),
    "stack": ("torch.stack([p.grad, p.data])", r"torch\.stack"),
    "foreach": ("torch._foreach_add_([p.data], [p.grad])", r"torch\._foreach_add_"),
    "random like": ("p.data.add_(torch.randn_like(p.data))", r"torch\.randn_like"),
    "random in place": ("p.data.normal_()", r"Tensor\.normal_"),
    "dropout": ("p.data.copy_(functional.dropout(p.grad))", r"torch\.dropout"),
    "cast to int": ("p.data.add_(p.grad.to(torch.int32))", r"cast to torch\.int32"),
    "integer state": ("return {'n': torch.zeros_like(p, dtype=torch.int64)}", r"torch\.int64"),
    "mask as state": ("return {'m': p.grad > 0}", "is a mask"),
    "a list as state": ("return {'m': [p.grad]}", "is a list"),
    "a tensor from outside": ("p.data.add_(torch.ones(3))", "from outside the callback's arguments"),
    "state from outside": ("return {'m': torch.zeros(3)}", "not made from the parameter"),
    "elements into a 0-d tensor": ("p.grad.norm().add_(p.grad)", "does not fit the 0-d tensor"),
    "setting an attribute": ("p.requires_grad = False", r"setting \.requires_grad"),
    "a function of numpy's": ("p.data.add_(np.sign(p.grad))", r"numpy\.sign of a tensor"),
    "an assertion about elements": (
        "assert p.grad.isfinite().all()",
        "a branch that a tensor decides may end in AssertionError",
    ),
    "something else as operand": ("p.data.add_('x')", "str is no operand"),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_what_has_no_fused_form_is_refused_by_name(name):
    body, message = UNTRACEABLE[name]
    with pytest.raises(Untraceable, match=message) as refused:
        trace([callbacks.sgd_step, callback(body)], signature(), dict(lr=0.1))
    assert refused.value.callback == 1


@pytest.mark.parametrize("name", ["branch on elements", "sort", "item", "random like", "index"])
def test_a_callback_cannot_swallow_the_refusal(name):
    body = "\n".join(f"    {line}" for line in UNTRACEABLE[name][0].splitlines())
    swallowing = callback(f"try:\n{body}\nexcept Exception:\n    p.data.zero_()")
    assert issubclass(Untraceable, BaseException) and not issubclass(Untraceable, Exception)
    with pytest.raises(Untraceable):
        trace([swallowing], signature(), dict(lr=0.1))


def test_the_refusal_names_the_callback_by_its_place_in_the_optimizers_list():
    cbs = [callback("p.grad.msort()")]
    with pytest.raises(Untraceable) as refused:
        trace(cbs, signature(), dict(lr=0.1), first=4)
    assert refused.value.callback == 4


def test_a_callbacks_own_error_passes_through_with_its_place():
    with pytest.raises(ZeroDivisionError) as error:
        trace([callbacks.sgd_step, callback("1 / 0")], signature(), dict(lr=0.1))
    assert error.value.callback == 1


def test_state_that_changes_its_kind_is_refused():
    with pytest.raises(Untraceable, match="'m' changes its shape"):
        trace([callback("return {'m': p.grad * 2}")], signature(m=Buffer(F32, "S")), dict(lr=0.1))
    with pytest.raises(Untraceable, match="'m' is a mask"):
        trace([callback("return {'m': p.grad > 0}")], signature(m=Buffer(F32, "F")), dict(lr=0.1))


@pytest.mark.parametrize(
    "use", ["p.data.add_(old)", "p.data.copy_(old * 2)", "p.data.mul_(old.norm())", "return {'m': old}"]
)
def test_a_tensor_kept_outside_the_state_is_refused(use):
    """It belongs to another trace: its value there is another one here."""
    box = []
    keeps = callback("box.append(p.grad * 2)", box=box)
    trace([keeps], signature(), dict(lr=0.1))
    with pytest.raises((Untraceable, RuntimeError), match="kept from another call"):
        trace([callback(f"old = box[0]\n{use}", box=box)], signature(), dict(lr=0.1))


def test_a_branch_on_a_kept_tensor_is_refused():
    box = []
    trace([callback("box.append(p.grad.norm() > 1)", box=box)], signature(), dict(lr=0.1))
    with pytest.raises(Untraceable, match="kept from another call"):
        trace([callback("if box[0]:\n    p.data.zero_()", box=box)], signature(), dict(lr=0.1))


def test_a_number_kept_outside_the_state_is_a_plain_number():
    rates = []
    averages = callback("rates.append(lr)\np.data.mul_(sum(rates) / len(rates)).add_(rates[0])", rates=rates)
    for lr in (0.5, 0.25):
        t = trace([averages], signature(), dict(lr=lr))
    assert t.slot_values() == [(0.5 + 0.25) / 2, 0.5]


def test_isinstance_of_numbers_finds_what_it_finds_eagerly():
    assert_as_eager(callback("p.data.mul_(2 if isinstance(lr, float) and not isinstance(lr, int) else 3)"))


def test_isinstance_of_tensors_is_refused_since_it_would_be_told_wrong():
    refused = callback("p.data.mul_(2 if isinstance(p.grad, torch.Tensor) else 3)")
    with pytest.raises(Untraceable, match="isinstance"):
        trace([refused], signature(), dict(lr=0.1))


# ---------------------------------------------------------------- refusals at work


def test_an_untraceable_callback_runs_eagerly_between_fused_ones_and_says_so_once():
    def reorder(p, **kwargs):
        p.grad.copy_(p.grad.msort())

    def run(backend):
        torch.manual_seed(1)
        p = torch.randn(5, requires_grad=True)
        opt = fusedopt.Optimizer(
            [p], [callbacks.weight_decay, reorder, callbacks.average_grad, callbacks.momentum_step],
            backend=backend, lr=0.1, wd=0.1, mom=0.9,
        )  # fmt: skip
        for _ in range(3):
            p.grad = torch.randn(5)
            opt.step()
        return p, opt

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        p, opt = run("cpp")
    ((name, reason),) = opt.explain().eager
    assert name == "reorder"
    assert re.fullmatch(r"test_trace\.py:\d+: Tensor\.msort has no fused form\. Remedy: .+", reason)
    said_once = f"fusedopt: the callback reorder runs eagerly, parameter by parameter: {reason}"
    assert [str(w.message) for w in said] == [said_once]
    torch.testing.assert_close(p, run("reference")[0], rtol=1e-6, atol=1e-7)
