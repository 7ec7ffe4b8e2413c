"""Passes are pure functions from program to program; stages split a program at its reductions."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import signature

from fusedopt import callbacks, table
from fusedopt.ir import passes
from fusedopt.ir.ops import is_reduction
from fusedopt.ir.passes import (
    PASSES,
    drop_dead_values,
    drop_unchanged_stores,
    drop_unused_buffers,
    optimize,
)
from fusedopt.ir.program import Buffer, Graph, Program, ProgramError, interpret, verify
from fusedopt.ir.stages import scalar_stores, stages
from fusedopt.trace.tracer import trace

F32 = torch.float32
F, S = Buffer(F32, "F"), Buffer(F32, "S")


def build(make, slots=0, **buffers):
    """A program from a function that takes (graph, loads by name) and returns the stores by name."""
    g = Graph()
    buffers = {name if name in ("param", "grad") else f"state.{name}": b for name, b in buffers.items()}
    loads = {n.removeprefix("state."): g.leaf("load", n, kind=b.kind) for n, b in buffers.items()}
    stores = {n if n in buffers else f"state.{n}": i for n, i in make(g, loads).items()}
    program = Program(F32, tuple(buffers.items()), tuple(g.values), tuple(stores.items()), slots)
    verify(program)
    return program


def wasteful():
    """Stores that change nothing, values nobody uses, a buffer nobody needs."""

    def make(g, x):
        g.op("exp", g.op("mul", x["grad"], x["idle"]))
        g.op("sum", x["kept"])
        return {"param": g.op("sub", x["param"], x["grad"]), "kept": x["kept"], "grad": x["grad"]}

    return build(make, param=F, grad=F, kept=F, idle=F)


def ops(program):
    return [v.op for v in program.values]


def test_stores_of_what_is_there_already_are_dropped():
    program = drop_unchanged_stores(wasteful())
    assert [name for name, _ in program.stores] == ["param"]
    swapped = build(lambda g, x: {"a": x["b"], "b": x["a"]}, param=F, a=F, b=F)
    assert drop_unchanged_stores(swapped) == swapped


def test_values_that_no_store_needs_are_dropped():
    program = drop_dead_values(drop_unchanged_stores(wasteful()))
    assert sorted(ops(program)) == ["load", "load", "sub"]
    verify(program)


def test_buffers_that_nothing_uses_are_dropped():
    dead = drop_dead_values(drop_unchanged_stores(wasteful()))
    assert [n for n, _ in drop_unused_buffers(dead).buffers] == ["param", "grad"]
    written = build(lambda g, x: {"out": x["grad"]}, param=F, grad=F, out=F)
    assert [n for n, _ in optimize(written).buffers] == ["grad", "state.out"]


@pytest.mark.parametrize("step", PASSES, ids=lambda step: step.__name__)
def test_a_pass_is_pure_and_repeating_it_changes_nothing(step):
    program = wasteful()
    before = copy.deepcopy(program)
    after = step(program)
    assert program == before and [v.where for v in program.values] == [v.where for v in before.values]
    verify(after)
    assert step(after) == after


def inverse_root_of_one(g, x):
    """One over the root of a number over its mean along a dimension of length 1."""
    quotient = g.op("div", x["grad"], x["grad"])
    return {"param": g.op("div", g.leaf("const", 1.0), g.op("sqrt", quotient)), "kept": quotient}


def test_quotients_of_numbers_and_themselves_take_no_division():
    program = build(inverse_root_of_one, param=F, grad=F, kept=F)
    small = optimize(program)
    assert {"div", "sqrt"} <= {*ops(program)} and not {"div", "sqrt"} & {*ops(small)}
    numbers = [0.0, -0.0, 1.5, -3.0, 1e-45, -1e-40, 3e38, float("inf"), float("-inf"), float("nan")]
    tensors = {"param": torch.zeros(10), "state.kept": torch.zeros(10), "grad": torch.tensor(numbers)}
    wanted, found = (interpret(p, tensors, []) for p in (program, small))
    for name in wanted:
        assert torch.equal(found[name].nan_to_num(7), wanted[name].nan_to_num(7))
    assert wanted["param"].nan_to_num(7).tolist() == [7, 7, 1, 1, 1, 1, 1, 7, 7, 7]


def test_other_quotients_roots_and_reciprocals_stay():
    def make(g, x):
        size = g.op("sum", x["grad"])  # of one number a division takes no time
        one = g.op("div", size, size)
        two = g.op("div", g.leaf("const", 2.0), g.op("div", x["grad"], x["grad"]))
        return {"param": g.op("mul", one, g.op("div", g.leaf("const", 1.0), g.op("sqrt", two)))}

    program = build(make, param=F, grad=F)
    small = optimize(program)
    assert ops(program).count("div") == 4 and ops(small).count("div") == 3 and "sqrt" in ops(small)
    tensors = {"param": torch.zeros(3), "grad": torch.tensor([1.0, 2.0, -5.0])}
    assert torch.equal(interpret(small, tensors, [])["param"], interpret(program, tensors, [])["param"])


def test_optimizing_keeps_the_meaning():
    program = wasteful()
    small = optimize(program)
    assert len(small.values) < len(program.values) and len(small.buffers) < len(program.buffers)
    tensors = {n: torch.randn(4) for n, _ in program.buffers}
    assert torch.equal(interpret(small, tensors, [])["param"], interpret(program, tensors, [])["param"])


def test_optimize_hands_out_what_each_pass_made():
    snapshots = []
    result = optimize(wasteful(), snapshots)
    assert [name for name, _ in snapshots] == [step.__name__ for step in PASSES]
    assert snapshots[-1][1] == result
    assert optimize(result) == result


def test_optimize_verifies_between_passes(monkeypatch):
    def break_it(program):
        return replace(program, stores=(("state.nowhere", 0),))

    monkeypatch.setattr(passes, "PASSES", (break_it,))
    with pytest.raises(ProgramError, match="nowhere"):
        optimize(wasteful())


# ---------------------------------------------------------------- stages


def norm(g, x):
    return g.op("sqrt", g.op("sum", g.op("mul", x, x)))


def three_levels():
    """mean(g), then the variance around it, then a norm of what is scaled by that."""

    def make(g, x):
        centred = g.op("sub", x["grad"], g.op("mean", x["grad"]))
        scaled = g.op("div", centred, norm(g, centred))
        last = g.op("mul", scaled, norm(g, g.op("add", scaled, x["param"])))
        return {"param": g.op("sub", x["param"], last), "m": g.op("add", x["m"], x["grad"])}

    return build(make, param=F, grad=F, m=F)


def check_stages(program):
    """What holds for any program's stages."""
    split = stages(program)
    assert all(not stage.stores for stage in split[:-1]), "only the last stage stores"
    assert all(stage.reductions for stage in split[:-1]) and not split[-1].reductions
    reductions = [i for stage in split for i in stage.reductions]
    assert sorted(reductions) == [i for i, v in enumerate(program.values) if is_reduction(v.op)]
    done = set()
    for stage in split:
        computed = set(stage.values)
        for i in stage.values:
            if is_reduction(program.values[i].op):
                assert i in done, "a result is used before the stage that reduces it"
            else:
                assert set(program.values[i].args) <= computed
        assert list(stage.values) == sorted(stage.values)
        for i in stage.reductions:
            assert set(program.values[i].args) <= computed
        for _, i in (*stage.stores, *stage.numbers):
            assert i in computed
        done |= set(stage.reductions)
    stored = [*split[-1].stores, *split[-1].numbers, *scalar_stores(program).stores]
    assert sorted(stored) == sorted(program.stores)
    read = {program.values[i].attr for i in split[-1].values if program.values[i].op == "load"}
    assert not read & {n for n, _ in split[-1].numbers}, "others read what one of them stores"
    return split


def traced_row(row):
    opt = row.factory([torch.zeros(1, requires_grad=True)], **row.variants[0].kwargs)
    return trace(opt.cbs, signature(), opt.hyper_map.of_group(opt.param_groups[0])).program


@pytest.mark.parametrize("row", table.rows(calls=False), ids=lambda row: f"{row.face}-{row.name}")
def test_named_optimizers_split_into_as_many_stages_as_the_table_says(row):
    assert len(check_stages(traced_row(row))) == row.stages


def test_lamb_moves_44_bytes_in_two_stages():
    first, last = check_stages(traced_row(table.row("fastai", "Lamb")))
    program = traced_row(table.row("fastai", "Lamb"))
    assert (first.bytes_per_element(program), last.bytes_per_element(program)) == (16, 28)
    assert len(first.reductions) == 2 and {n for n, _ in last.stores} == {
        "param",
        "state.grad_avg",
        "state.sqr_avg",
    }


def test_a_reduction_of_a_reduction_of_a_reduction_takes_a_stage_each_before_the_last():
    program = three_levels()
    split = check_stages(program)
    assert [len(stage.reductions) for stage in split] == [1, 1, 1, 0]
    assert [stage.loads(program) for stage in split] == [
        ["grad"],
        ["grad"],
        ["param", "grad"],
        ["param", "grad", "state.m"],
    ]


def test_reductions_that_do_not_need_each_other_share_a_stage():
    def make(g, x):
        ratio = g.op("div", norm(g, x["param"]), norm(g, x["grad"]))
        return {"param": g.op("mul", x["param"], ratio)}

    split = check_stages(build(make, param=F, grad=F))
    assert [len(stage.reductions) for stage in split] == [2, 0]


def test_a_stage_computes_again_what_it_needs_and_no_more():
    """Applying the average twice, in the first stage and again in the second, is what this rules out."""

    def make(g, x):
        average = g.op("mul", g.op("add", x["m"], x["grad"]), g.leaf("const", 0.5))
        return {"param": g.op("sub", x["param"], g.op("mul", average, norm(g, average))), "m": average}

    program = build(make, param=F, grad=F, m=F)
    first, last = check_stages(program)
    assert first.loads(program) == ["grad", "state.m"] and last.loads(program) == ["param", "grad", "state.m"]
    assert {program.values[i].op for i in first.values} == {"load", "const", "add", "mul"}


def test_a_program_without_reductions_is_one_stage():
    program = trace([callbacks.sgd_step], signature(), dict(lr=0.1)).program
    (only,) = check_stages(program)
    assert only.bytes_per_element(program) == 12


def test_scalars_are_stored_after_the_last_stage():
    def make(g, x):
        size = norm(g, x["grad"])
        return {"param": g.op("mul", x["param"], size), "size": g.op("add", x["size"], size)}

    program = build(make, param=F, grad=F, size=S)
    split = check_stages(program)
    assert [n for n, _ in split[-1].stores] == ["param"] and not split[-1].numbers
    assert [n for n, _ in scalar_stores(program).stores] == ["state.size"]


def test_a_number_that_only_earlier_stages_read_is_stored_by_the_last_one():
    def make(g, x):
        size = norm(g, g.op("add", x["grad"], x["size"]))
        return {"param": g.op("mul", x["param"], size), "size": size}

    program = build(make, param=F, grad=F, size=S)
    split = check_stages(program)
    assert [n for n, _ in split[-1].stores] == ["param"] and not scalar_stores(program).stores
    assert [n for n, _ in split[-1].numbers] == ["state.size"]


@pytest.mark.parametrize("other", ["read by the last stage", "read by none"])
def test_numbers_are_stored_together(other):
    """Where one of them has to wait for the last stage, or nobody reads it, all have a launch of their own."""

    def make(g, x):
        size = norm(g, g.op("add", x["grad"], x["size"]))
        count = (
            g.op("add", x["count"], size) if other == "read by the last stage" else g.op("mul", size, size)
        )
        return {"param": g.op("mul", x["param"], size), "size": size, "count": count}

    program = drop_dead_values(build(make, param=F, grad=F, size=S, count=S))
    split = check_stages(program)
    assert not split[-1].numbers
    assert {n for n, _ in scalar_stores(program).stores} == {"state.count", "state.size"}


def test_numbers_of_a_program_that_reduces_nothing_have_a_launch():
    def make(g, x):
        return {"param": g.op("mul", x["param"], x["size"]), "count": x["size"]}

    program = build(make, param=F, size=S, count=S)
    assert [n for n, _ in scalar_stores(program).stores] == ["state.count"] and not stages(program)[
        -1
    ].numbers


def test_bytes_count_each_buffer_in_its_own_dtype_and_no_scalars():
    def make(g, x):
        return {"param": g.op("mul", g.op("sub", x["param"], x["grad"]), x["size"])}

    program = build(make, param=Buffer(torch.bfloat16, "F"), grad=F, size=S)
    (only,) = check_stages(program)
    assert only.bytes_per_element(program) == 2 + 4 + 2
