"""Programs: what the verifier rejects, what the printer prints, what the interpreter means."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import signature

from fusedopt import callbacks, table
from fusedopt.ir.program import (
    Buffer,
    Graph,
    Program,
    ProgramError,
    Value,
    identifier,
    interpret,
    render_python,
    verify,
)
from fusedopt.trace.tracer import trace

F32 = torch.float32
ADAM = [
    callbacks.weight_decay,
    callbacks.average_grad,
    callbacks.average_sqr_grad,
    callbacks.step_stat,
    callbacks.adam_step,
]
HYPER = dict(lr=0.1, wd=0.01, mom=0.9, sqr_mom=0.99, eps=1e-5)


def small():
    """A program with every kind of leaf, a reduction, a mask and stores of both kinds; it is correct."""
    g = Graph()
    p, s = g.leaf("load", "param", kind="F"), g.leaf("load", "state.norm")
    scaled = g.op("mul", p, g.leaf("slot", 0))
    norm = g.op("sqrt", g.op("sum", g.op("mul", p, p)))
    mask = g.op("gt", norm, g.op("add", s, g.op("mul", g.leaf("const", 0.5), g.leaf("numel"))))
    out = g.op("where", mask, scaled, g.op("expand", norm))
    buffers = (("param", Buffer(F32, "F")), ("state.norm", Buffer(F32, "S")))
    return Program(F32, buffers, tuple(g.values), (("param", out), ("state.norm", norm)), 1)


def at(program, op):
    return next(i for i, v in enumerate(program.values) if v.op == op)


def with_value(first, **changes):
    """The small program with the first value of that op changed."""

    def change(program):
        i = at(program, first)
        value = replace(program.values[i], **changes)
        return replace(program, values=(*program.values[:i], value, *program.values[i + 1 :]))

    return change


def with_store(name, op):
    return lambda program: replace(program, stores=(*program.stores, (name, at(program, op))))


MALFORMED = {
    "unknown op": (with_value("mul", op="frobnicate"), "no op frobnicate"),
    "too few arguments": (with_value("mul", args=(0,)), "no op mul with 1"),
    "too many arguments": (with_value("sqrt", args=(0, 0)), "no op sqrt with 2"),
    "argument after its use": (with_value("mul", args=(0, 9)), "does not stand before its use"),
    "argument is itself": (with_value("sqrt", args=(at(small(), "sqrt"),)), "does not stand before"),
    "negative argument": (with_value("mul", args=(0, -1)), "does not stand before"),
    "mask where a number belongs": (with_value("mul", type="b"), "mul is ff>f, not ff>b"),
    "number where a mask belongs": (with_value("where", args=(0, 0, 0)), "where is bff>f, not fff>f"),
    "number where a mask comes out": (with_value("gt", type="f"), "gt is ff>b"),
    "per element claimed per tensor": (with_value("mul", kind="S"), "cannot be of kind S"),
    "per tensor claimed per element": (with_value("sqrt", kind="F"), "cannot be of kind F"),
    "reduction claimed per element": (with_value("sum", kind="F"), "cannot be of kind F"),
    "leaf with arguments": (with_value("slot", args=(0,)), "takes no arguments"),
    "slot per element": (with_value("slot", kind="F"), "slot is no f of kind F"),
    "constant mask": (with_value("const", type="b"), "const is no b"),
    "slot out of range": (with_value("slot", attr=1), "slot 1 of 1"),
    "negative slot": (with_value("slot", attr=-1), "slot -1 of 1"),
    "load of an unknown buffer": (with_value("load", attr="state.x"), "load of 'state.x'"),
    "load of another kind": (with_value("load", attr="state.norm"), "which is no F buffer"),
    "store to an unknown buffer": (with_store("state.x", "mul"), "unknown buffer 'state.x'"),
    "store of a mask": (lambda p: replace(p, stores=(("param", at(p, "gt")),)), "store of the bool"),
    "store per element to a 0-d buffer": (
        lambda p: replace(p, stores=(("state.norm", at(p, "mul")),)),
        "to 'state.norm', which is of kind S",
    ),
    "store of a value that is not there": (lambda p: replace(p, stores=(("param", 99),)), "not there"),
    "store of a negative number": (lambda p: replace(p, stores=(("param", -1),)), "not there"),
    "two stores to one buffer": (with_store("param", "mul"), "stored to twice"),
    "two buffers of one name": (lambda p: replace(p, buffers=p.buffers * 2), "listed twice"),
}


def test_a_correct_program_is_accepted():
    verify(small())


@pytest.mark.parametrize("name", MALFORMED)
def test_verify_rejects(name):
    change, message = MALFORMED[name]
    with pytest.raises(ProgramError, match=message):
        verify(change(small()))


def test_the_same_op_on_the_same_arguments_is_one_value():
    g = Graph()
    p = g.leaf("load", "param", kind="F")
    assert g.op("mul", p, p) == g.op("mul", p, p) != g.op("add", p, p)
    assert g.leaf("load", "param", kind="F") == p != g.leaf("slot", 0)


def test_the_two_zeros_are_two_constants_and_two_programs():
    def program(*constants):
        graph = Graph()
        p = graph.leaf("load", "param", kind="F")
        for x in constants:
            p = graph.op("maximum", p, graph.leaf("const", x))
        return Program(
            torch.float32, (("param", Buffer(torch.float32, "F")),), tuple(graph.values), (("param", p),), 0
        )

    assert program(0.0) != program(-0.0)
    assert hash(program(0.0)) == hash(program(0.0)) and program(0.0) == program(0.0)
    assert [v.attr for v in program(0.0, -0.0, 0.0).values if v.op == "const"] == [0.0, -0.0]


def test_where_a_value_comes_from_is_no_part_of_what_a_program_is():
    program = small()
    moved = replace(program, values=tuple(replace(v, where="elsewhere.py:1") for v in program.values))
    assert moved == program and hash(moved) == hash(program)
    assert with_value("const", attr=0.25)(program) != program


# ---------------------------------------------------------------- the interpreter


def test_interpret_means_what_the_op_table_says():
    p = torch.tensor([3.0, 4.0])
    big, small_norm = torch.tensor(10.0), torch.tensor(0.0)
    tensors = {"param": p, "state.norm": small_norm}
    out = interpret(small(), tensors, [2.0])
    assert out["param"].tolist() == [6.0, 8.0] and out["state.norm"] == 5.0
    out = interpret(small(), tensors | {"state.norm": big}, [2.0])
    assert out["param"].tolist() == [5.0, 5.0]
    assert p.tolist() == [3.0, 4.0] and small_norm == 0.0, "its arguments are left alone"


def test_interpret_rounds_once_on_the_store():
    """Two steps of half a bfloat16 ulp each make one; rounded in between they would make none."""
    g = Graph()
    p, s = g.leaf("load", "param", kind="F"), g.leaf("slot", 0)
    program = Program(
        F32,
        (("param", Buffer(torch.bfloat16, "F")),),
        tuple(g.values),
        (("param", g.op("add", g.op("add", p, s), s)),),
        1,
    )
    program = replace(program, values=tuple(g.values))
    p = torch.ones(3, dtype=torch.bfloat16)
    half_ulp = torch.finfo(torch.bfloat16).eps / 2
    assert p[0] + half_ulp == p[0]
    assert interpret(program, {"param": p}, [half_ulp])["param"].tolist() == [1 + 2 * half_ulp] * 3


def test_interpret_reduces_in_double():
    g = Graph()
    total = g.op("sum", g.leaf("load", "param", kind="F"))
    buffers = (("param", Buffer(F32, "F")), ("state.s", Buffer(F32, "S")))
    program = Program(F32, buffers, tuple(g.values), (("state.s", total),), 0)
    p = torch.tensor([1e8, 1.0, -1e8])
    assert interpret(program, {"param": p, "state.s": torch.tensor(0.0)}, [])["state.s"] == 1.0


# ---------------------------------------------------------------- the printer


def run_printed(program, tensors, slots):
    """Execute the printed Python."""
    namespace = {"torch": torch}
    exec(render_python(program), namespace)
    arguments = {identifier(n): t for n, t in tensors.items()} | {"numel": tensors["param"].numel()}
    arguments |= {f"s{k}": torch.tensor(x, dtype=program.compute) for k, x in enumerate(slots)}
    code = namespace["program"].__code__
    return namespace["program"](*(arguments[name] for name in code.co_varnames[: code.co_argcount]))


def tensors_for(program):
    made = {"param": torch.randn(5, dtype=program.compute)}
    for name, buffer in program.buffers:
        made[name] = torch.rand(() if buffer.kind == "S" else 5, dtype=program.compute) + 0.5
    return made


def assert_print_runs(program, slots):
    tensors = tensors_for(program)
    expected, printed = interpret(program, tensors, slots), run_printed(program, tensors, slots)
    assert printed.keys() == expected.keys()
    for name, value in printed.items():
        value = value.expand(expected[name].shape).to(expected[name].dtype)
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-14)


def first_programs(row):
    """The programs of an optimizer's first step, with and without state, in double."""
    opt = row.factory([torch.zeros(1, requires_grad=True)], **row.variants[0].kwargs)
    hyper = opt.hyper_map.of_group(opt.param_groups[0])
    first = trace(opt.cbs, signature(torch.float64), hyper)
    state = first.created | {k: v for k, v in first.new_numbers().items() if k != "step"}
    later = trace(opt.cbs, signature(torch.float64, step=100, **state), hyper)
    return [first, later]


@pytest.mark.parametrize("row", table.rows(calls=False), ids=lambda row: f"{row.face}-{row.name}")
def test_printed_python_runs_and_computes_what_interpret_does(row):
    for t in first_programs(row):
        assert_print_runs(t.program, t.slot_values())


def test_a_program_with_every_kind_of_leaf_prints_and_runs():
    program = replace(small(), compute=torch.float64)
    assert_print_runs(program, [2.0])


def test_the_comparison_with_the_print_can_fail(monkeypatch):
    monkeypatch.setattr("fusedopt.ir.program._INFIX", {"mul": "+", "add": "+", "gt": ">"})
    with pytest.raises(AssertionError):
        assert_print_runs(small(), [2.0])


def test_a_program_prints_without_the_parameter_it_never_reads():
    def callback(p, **kwargs):
        return {"kept": torch.zeros_like(p.grad), "sign": (p.grad > 0).float()}

    t = trace([callback], signature(torch.float64), {})
    assert "param" not in t.program.buffer
    assert_print_runs(t.program, t.slot_values())


def test_infinite_constants_print_as_python():
    g = Graph()
    p = g.leaf("load", "param", kind="F")
    out = g.op("minimum", g.op("add", p, g.leaf("const", math.inf)), g.leaf("const", -math.inf))
    buffers = (("param", Buffer(torch.float64, "F")),)
    assert_print_runs(Program(torch.float64, buffers, tuple(g.values), (("param", out),), 0), [])


def test_the_print_names_buffers_and_where_each_value_comes_from():
    text = str(trace(ADAM, signature(), HYPER).program)
    first, *lines, last = text.splitlines()
    assert first.startswith("def program(param, grad, grad_avg, sqr_avg, s0, ")
    assert last.startswith("    return {'param': ") and "'state.grad_avg': " in last
    where = [line.rsplit("# ", 1)[1] for line in lines]
    assert all(text.split(", ")[1].startswith("callbacks.py:") for text in where)
    assert {w.split(",")[0] for w in where} == {cb.__name__ for cb in ADAM if cb is not callbacks.step_stat}


KEYS = [
    "grad_avg",
    "exp_avg",
    "m",
    "grad",
    "param",
    "s0",
    "v12",
    "r1",
    "acc0",
    "i",
    "T",
    "int",
    "class",
    "lambda",
]
KEYS += ["row", "a-b", "a.b", "a_b", "", "x y", "é", "__v", "sign", "end", "Row", "sqrt", "rows", "tl"]


def test_identifiers_are_distinct_and_take_no_word_of_the_generated_code():
    buffers = ["param", "grad", *(f"state.{key}" for key in KEYS)]
    names = {buffer: identifier(buffer) for buffer in buffers}
    assert len(set(names.values())) == len(names)
    assert all(n.isidentifier() and n.isascii() for n in names.values())
    unchanged = {buffer for buffer, name in names.items() if name == buffer.removeprefix("state.")}
    assert unchanged == {"param", "grad", "state.grad_avg", "state.exp_avg", "state.m", "state.a_b"}


def test_values_compare_by_what_they_compute():
    assert Value("add", (0, 1), None, "F", "f", "a") == Value("add", (0, 1), None, "F", "f", "b")
    assert Value("add", (0, 1), None, "F", "f") != Value("add", (1, 0), None, "F", "f")
