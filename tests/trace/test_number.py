"""Numbers that record themselves: they behave as the float or int they hold, and what they did can be run again."""

import math
import operator

import numpy as np
import pytest
import torch
from helpers import operands, signature

from fusedopt import table
from fusedopt.trace.number import ARITHMETIC, Number, ScalarProgram, operate
from fusedopt.trace.replay import Replay
from fusedopt.trace.signals import Untraceable
from fusedopt.trace.tracer import trace

MODULES = {"math": math, "numpy": np}
"""What expressions of scalar programs name."""
HYPER = dict(lr=0.25, mom=0.9)
STATE = dict(step=7)
OTHER = dict(lr=3.5, mom=0.5), dict(step=11)


@pytest.fixture
def program():
    return ScalarProgram()


@pytest.fixture
def lr(program):
    return program.number(("hyper", "lr"), HYPER["lr"])


@pytest.fixture
def mom(program):
    return program.number(("hyper", "mom"), HYPER["mom"])


@pytest.fixture
def step(program):
    return program.number(("state", "step"), STATE["step"])


def escapes(program):
    return [(program.expression(g.index), g.value) for g in program.guards if g.where == "escape"]


def branches(program):
    return [(program.expression(g.index), g.value) for g in program.guards if g.where == "branch"]


# ---------------------------------------------------------------- arithmetic

FORMULAS = {
    "bias correction": lambda lr, mom, step: -lr * (1 - mom) / (1 - mom**step),
    "python's constants": lambda lr, mom, step: 2 / (1 - mom) - 1 + 0.5 * lr,
    "reflected": lambda lr, mom, step: 10 - (3 + (2 * (1 / (2**lr)))),
    "whole numbers": lambda lr, mom, step: (step + 1) % 5 + step // 2 + 100 // step + 100 % step,
    "signs": lambda lr, mom, step: abs(-lr) + (+mom) - (-step),
    "powers": lambda lr, mom, step: step**0.5 + mom**2 + lr**step,
    "built-in pow": lambda lr, mom, step: pow(mom, step) + sum([lr, mom]),
    "true as one": lambda lr, mom, step: lr + True,
    "rounding": lambda lr, mom, step: (
        math.floor(10 * lr) + math.ceil(10 * mom) + math.trunc(step / 2) + round(7 * lr)
    ),
    "decimals": lambda lr, mom, step: round(lr / 3, 2) + round(step / 3, step),
    "both of a division": lambda lr, mom, step: sum(divmod(step, 4)) + sum(divmod(9, lr)),
    "numpy": lambda lr, mom, step: np.exp(-lr) * np.cos(step) + np.hypot(lr, mom) / np.maximum(mom, 3.0),
    "numpy's number leaves as Python's": lambda lr, mom, step: np.sqrt(lr).item() // 0.01,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_arithmetic_is_pythons_and_is_recorded(name, program, lr, mom, step):
    formula = FORMULAS[name]
    result = formula(lr, mom, step)
    expected = formula(HYPER["lr"], HYPER["mom"], STATE["step"])
    assert type(result) is Number and type(result.value) is type(expected) and result.value == expected
    assert program.guards == []
    hyper, state = OTHER
    other = eval(program.expression(result.index), MODULES, hyper | state)
    assert other == formula(hyper["lr"], hyper["mom"], state["step"]) != expected
    again = eval(program.expression(result.index), MODULES, HYPER | STATE)
    assert again == expected


def test_the_recorded_expressions_give_the_recorded_values(program, lr, mom, step):
    for formula in FORMULAS.values():
        formula(lr, mom, step)
    texts = map(program.expression, range(len(program.entries)))
    assert [eval(text, MODULES, HYPER | STATE) for text in texts] == program.values


def test_whole_numbers_stay_whole(program, lr, step):
    for result in (step + 1, step % 5, step // 2, -step, abs(step), step * 3, step**2, 10 - step):
        assert type(result.value) is int
    assert type((step / 7).value) is float and type((step * 1.0).value) is float
    assert [10, 20, 30][step - 5] == 30 and list(range(step))[-1] == 6
    with pytest.raises(TypeError):
        range(lr)


def test_the_same_arithmetic_is_one_entry(program, lr, mom):
    first = lr * mom + 1
    n = len(program.entries)
    assert (lr * mom + 1).index == first.index and len(program.entries) == n
    assert (lr * mom + 1.0).index != first.index, "an int and a float are two constants"


def test_numbers_inside_a_tuple_hyperparameter_are_run_again():
    def callback(p, betas, **kwargs):
        p.data.mul_(betas[0] - betas[1])

    t = trace([callback], signature(), dict(betas=(0.9, 0.5)))
    assert t.slot_values() == [0.4]
    assert Replay(t)(dict(betas=(3.0, 1.0)), {}) == ((2.0,), {})


def test_errors_are_pythons(lr, step):
    with pytest.raises(ZeroDivisionError):
        lr / 0
    with pytest.raises(ZeroDivisionError):
        1 // (step - 7)
    with pytest.raises(Untraceable, match="complex"):  # Python's is no error
        (-lr) ** 0.5
    with pytest.raises(TypeError):
        lr + "1"
    with pytest.raises(OverflowError):
        (lr * 1e300) ** 10


def test_a_number_kept_from_another_program_counts_as_its_value(program, lr):
    stray = ScalarProgram()
    old = stray.number(("hyper", "lr"), 100.0) * 2
    assert (lr + old).value == 200.25
    (total,) = [i for i, e in enumerate(program.entries) if e[0] == "add"]
    assert eval(program.expression(total), {}, dict(lr=1.0)) == 201.0


# ---------------------------------------------------------------- guards

COMPARISONS = {
    "gt": (lambda lr: lr > 0.1, "(lr > 0.1)", True),
    "ge": (lambda lr: lr >= 1, "(lr >= 1)", False),
    "lt reflected": (lambda lr: 0.1 < lr, "(lr > 0.1)", True),  # noqa: SIM300
    "le": (lambda lr: lr <= 0.25, "(lr <= 0.25)", True),
    "eq": (lambda lr: lr == 0.25, "(lr == 0.25)", True),
    "ne": (lambda lr: lr != 0, "(lr != 0)", True),
    "bool": (lambda lr: bool(lr), "(lr != 0)", True),
    "not": (lambda lr: not lr, "(lr != 0)", True),
    "of arithmetic": (lambda lr: 2 * lr > 1, "((2 * lr) > 1)", False),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_is_the_true_one_and_leaves_a_guard(name, program, lr):
    compare, text, outcome = COMPARISONS[name]
    assert compare(lr) is compare(0.25)
    assert branches(program) == [(text, outcome)]


def test_two_numbers_compare_and_guard(program, lr, mom):
    assert min(lr, mom) is lr and max(lr, mom) is mom
    assert set(branches(program)) == {("(mom < lr)", False), ("(mom > lr)", True)}


def test_a_guard_is_kept_once(program, lr):
    assert lr > 0.1 and lr > 0.1
    math.sqrt(lr), math.sqrt(lr)
    assert len(program.guards) == 2


def test_comparing_with_something_else_is_no_error_and_no_guard(program, lr):
    assert (lr == None) is False and (lr != "x") is True and lr is not None  # noqa: E711
    assert program.guards == []
    with pytest.raises(TypeError):
        lr < "x"  # noqa: B015


# ---------------------------------------------------------------- escapes

ESCAPES = {
    "float": lambda x: float(x),
    "int": lambda x: int(x),
    "complex": lambda x: complex(x),
    "math.sqrt": lambda x: math.sqrt(x),
    "math.isclose": lambda x: math.isclose(x, 0.25),
    "format": lambda x: f"{x:.3f}",
    "percent": lambda x: "%g" % x,  # noqa: UP031
    "str": lambda x: str(x),
    "is_integer": lambda x: float.is_integer(float(x)),
    "numpy number": lambda x: np.float64(2) * x,
    "numpy float32": lambda x: x + np.float32(1),
    "numpy array": lambda x: x * np.ones(2),
    "numpy array first": lambda x: np.ones(2) - x,
    "tensor": lambda x: x * torch.ones(2),
    "tensor first": lambda x: torch.ones(2) / x,
    "tensor method": lambda x: torch.ones(2).add_(torch.ones(2), alpha=x),
    "torch function": lambda x: torch.clamp(torch.ones(2), max=x),
    "torch.full": lambda x: torch.full((2,), x),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_what_leaves_is_the_true_value_and_leaves_a_guard(name, program, lr):
    left, expected = ESCAPES[name](lr), ESCAPES[name](0.25)
    assert type(left) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(left, expected) and left.dtype == expected.dtype
    else:
        assert np.array_equal(left, expected)
    assert escapes(program) == [("lr", 0.25)]


def test_an_index_is_an_escape(program, step):
    assert operator.index(step) == 7 and "abcdefgh"[step] == "h"
    assert escapes(program) == [("step", 7)]


def test_isinstance_finds_what_it_finds_eagerly(program, lr, step):
    assert isinstance(lr, float) and isinstance(lr, (int, float)) and not isinstance(lr, int)
    assert isinstance(step, int) and not isinstance(step, float) and not isinstance(lr, torch.Tensor)
    assert program.guards == []


def test_item_is_the_number_itself(program, lr):
    assert lr.item() is lr and program.guards == []


def test_every_operation_of_the_scalar_program_runs():
    for name, op in ARITHMETIC.items():
        p = ScalarProgram()
        x, y = p.number(("hyper", "x"), 1), p.number(("hyper", "y"), 2)
        arguments = [x, y][: operands(name)]
        try:
            with np.errstate(all="ignore"):
                expected = op(*(a.value for a in arguments))
                operate(name, *arguments)
        except (ArithmeticError, ValueError) as error:
            with pytest.raises(type(error)):
                operate(name, *arguments)
            continue
        if type(expected) in (int, float, bool, np.float64):  # others leave
            with np.errstate(all="ignore"):
                again = eval(p.expression(len(p.entries) - 1), MODULES, dict(x=1, y=2))
            assert repr(again) == repr(p.values[-1]) == repr(expected), name


def test_what_raises_holds_for_the_numbers_that_it_was_raised_for(program, lr, mom):
    with pytest.raises(ZeroDivisionError):
        lr / (mom - 0.9)
    with pytest.raises(ValueError, match="domain"):
        operate("math.log", -lr)
    assert escapes(program) == [("lr", 0.25), ("(mom - 0.9)", 0.0), ("-lr", -0.25)]


def test_what_numpys_numbers_do_otherwise_than_pythons_leaves(program, lr):
    root = np.sqrt(lr)
    assert type(root.value) is np.float64 and isinstance(root, float) and not program.guards
    assert type(root**2) is type(root % 1) is type(root // 1) is type(round(root, 1)) is np.float64
    assert escapes(program) == [("numpy.sqrt(lr)", 0.5)]


# ---------------------------------------------------------------- a whole trace


def later(row):
    """A function that traces a later step of a named optimizer: (step, changed hypers) to (trace, hyper, state)."""
    opt = row.factory([torch.zeros(1, requires_grad=True)], **row.variants[0].kwargs)
    group = opt.hyper_map.of_group(opt.param_groups[0])
    first = trace(opt.cbs, signature(), group)

    def at(step, **changes):
        state = {k: step if v == 1 else v for k, v in first.new_numbers().items()}
        return trace(opt.cbs, signature(**first.created, **state), group | changes), group | changes, state

    return at


@pytest.mark.parametrize("row", table.rows(calls=False), ids=lambda row: f"{row.face}-{row.name}")
def test_the_scalar_program_of_a_step_gives_the_scalars_of_others(row):
    """Steps 100 and 118 take the same branches (RAdam's flips before; Lookahead synchronises every 6th)."""
    at = later(row)
    (old, *_), (new, hyper, state) = at(100), at(118, lr=0.123)
    assert new.program == old.program
    expected = new.slot_values(), new.new_numbers()
    assert expected[0] != old.slot_values(), "nothing would be tested"
    slots, numbers = Replay(old)(hyper, state)
    assert (list(slots), numbers) == expected


def test_replay_refuses_when_a_guard_no_longer_holds():
    at = later(table.row("fastai", "RAdam"))
    (old, *_), (_, hyper, state) = at(2), at(100)
    assert Replay(old)(hyper, state) is None
    (old, *_), (_, hyper, state) = at(100), at(2)
    assert Replay(old)(hyper, state) is None


def test_replay_refuses_after_an_escape_of_another_value():
    def callback(p, lr, **kwargs):
        p.data.mul_(float(repr(lr)))

    replay = Replay(trace([callback], signature(), dict(lr=0.25)))
    assert replay(dict(lr=0.25), {}) == ((0.25,), {})
    assert replay(dict(lr=0.5), {}) is None


@pytest.mark.parametrize("bound", [math.inf, -math.inf, math.nan])
def test_replay_copes_with_an_escape_of_infinity(bound):
    def callback(p, lr, bound, **kwargs):
        if math.isfinite(bound):
            p.data.clamp_(max=bound)
        p.data.mul_(lr)

    replay = Replay(trace([callback], signature(), dict(lr=0.25, bound=bound)))
    assert replay(dict(lr=0.5, bound=bound), {}) in (((0.5,), {}), None)
    assert replay(dict(lr=0.5, bound=1.0), {}) is None


def test_constants_written_in_a_callback_are_constants():
    def callback(p, lr, **kwargs):
        p.data.mul_(1 - 0.5 * 0.96**lr)

    t = trace([callback], signature(), dict(lr=0.25))
    assert {e[-1] for e in t.scalars.entries if e[0] == "const"} == {1, 0.5, 0.96}
