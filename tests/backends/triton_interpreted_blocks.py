"""What Triton kernels of programs with several axes compute, in Triton's interpreter:
test_triton_interpreter.py starts pytest on this file.

By hand: TRITON_INTERPRET=1 python -m pytest tests/backends/triton_interpreted_blocks.py
"""

import functools
from dataclasses import replace

import pytest
import test_blocks
import torch
from quick_interpreter import join_in_halves, look_types_up_once, patch_once, rewrite_once
from test_blocks import LINES, PROGRAMS, compared

import fusedopt
from fusedopt import rules
from fusedopt.backends import chunking as plan
from fusedopt.backends.triton import backend
from fusedopt.ir.program import Value
from fusedopt.storage import policies

if not backend.interpreting():
    pytest.skip("TRITON_INTERPRET=1 must be set when Python starts", allow_module_level=True)
patch_once()
rewrite_once()
look_types_up_once()
join_in_halves()

SHAPES = {
    LINES: [(1,), (63,), (65,), (200,), (0,)],
    2: [(1, 1), (3, 5), (1, 40), (40, 1), (3, 101), (60, 3), (12, 40), (0, 4), (2, 0), (17, 16)],
    3: [(1, 1, 1), (2, 3, 5), (20, 3, 3), (5, 1, 7), (0, 2, 2), (2, 20, 17)],
    4: [(2, 3, 4, 5), (5, 6, 3, 3), (1, 40, 1, 2)],
}


@pytest.fixture
def small(monkeypatch):
    """Tiles of 128 elements and chunks of as many, so that small tensors have several, and share places with others."""
    monkeypatch.setattr(backend, "TILES", {8: 1, 32: 1})
    monkeypatch.setattr(plan, "LINES", 64)
    for name, value in (("CHUNK", 128), ("SHARED", 2)):
        monkeypatch.setattr(plan, name, value)
    plan.blocks.cache_clear()
    yield
    plan.blocks.cache_clear()


@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels_do_what_the_program_says(name, small):
    program, axes = PROGRAMS[name]
    compared(program, SHAPES[axes], "triton")


@pytest.mark.parametrize("name", ["factored matrix", "columns of centred"])
def test_with_tiles_and_chunks_as_they_are(name):
    program, axes = PROGRAMS[name]
    compared(program, [*SHAPES[axes], (90, 300)], "triton")


@pytest.mark.parametrize("shape", [(1, 200), (200, 1), (20, 20)])
def test_alone_lines_have_the_tiles_that_suit_them(shape, small):
    """Each shape of tiles, with one tensor a launch."""
    for name in ("factored matrix", "centred twice", "by rows"):
        compared(PROGRAMS[name][0], [shape], "triton")


@pytest.mark.parametrize("name", ["factored matrix", "by rows", "numbers of rows", "covered"])
def test_what_is_skipped_is_left_as_it_is(name, small):
    """The scalar of these launches is 0.9."""
    program, _ = PROGRAMS[name]
    n = len(program.values)
    slot, limit = Value("slot", (), 0, "S", "f"), Value("const", (), 0.5, "S", "f")
    values = (*program.values, slot, limit, Value("gt", (n, n + 1), None, "S", "b"))
    compared(replace(program, values=values, skip=n + 2), SHAPES[2][:5], "triton")
    compared(
        replace(program, values=(*values[:-1], replace(values[-1], op="lt")), skip=n + 2),
        SHAPES[2][:5],
        "triton",
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_tensors(dtype, small):
    made = test_blocks.build(2, test_blocks.by_rows, param="F", grad="F", v="0")
    buffers = tuple((n, replace(b, dtype=dtype)) for n, b in made.buffers)
    program = replace(made, buffers=buffers)
    rows = [test_blocks.tensors(program, shape, 3) for shape in SHAPES[2]]
    theirs = [{n: t.clone() for n, t in row.items()} for row in rows]
    test_blocks.run(program, rows, SHAPES[2], "triton")
    test_blocks.run(program, theirs, SHAPES[2], "cpp")
    for ours, other in zip(rows, theirs, strict=True):
        for n in ours:
            torch.testing.assert_close(ours[n], other[n])


@pytest.mark.parametrize("where", [0, 100, 399])
def test_reductions_pass_on_nan(where, small):
    program, _ = PROGRAMS["covered"]
    row = test_blocks.tensors(program, (10, 40), 1)
    row["grad"].view(-1)[where] = torch.nan
    test_blocks.run(program, [row], [(10, 40)], "triton")
    assert [row[f"state.m{a}"].isnan().nonzero().tolist() for a in range(2)] == [
        [[where // 40]],
        [[where % 40]],
    ]


def test_what_is_wrong_would_be_found(small, monkeypatch):
    right = backend.skeleton("triton.py.in")
    wrong = right.replace("acc = join(acc, x)", "acc = join(x, x)")
    assert wrong != right
    monkeypatch.setattr(backend, "skeleton", lambda name: wrong)
    program = test_blocks.build(2, test_blocks.factored, param="F", grad="F", row="0", col="1")
    with pytest.raises(AssertionError):
        compared(replace(program, slots=2), [(90, 90)], "triton")


# ---------------------------------------------------------------- an optimizer


def adafactor(p, lr, row=None, col=None, beta=0.9, **kwargs):
    """Adafactor's step of a matrix."""
    square = p.grad * p.grad + 1e-30
    row = (torch.zeros_like(square.mean(-1)) if row is None else row) * beta + square.mean(-1) * (1 - beta)
    col = (torch.zeros_like(square.mean(-2)) if col is None else col) * beta + square.mean(-2) * (1 - beta)
    factor = (row / row.mean()).sqrt()
    p.data.sub_(p.grad / (factor.unsqueeze(-1) * col.sqrt().unsqueeze(-2)), alpha=lr)
    return {"row": row, "col": col}


def trained(on):
    generator = torch.Generator().manual_seed(2)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES[2] if 0 not in s]
    opt = fusedopt.Optimizer(params, adafactor, lr=0.1, backend=on)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        opt.step()
    assert opt.explain().backend == on
    return [*params, *(v for p in params for v in opt.state[p].values() if isinstance(v, torch.Tensor))]


def test_a_factored_step_is_the_references(small):
    for ours, theirs in zip(trained("triton"), trained("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"amp_fused": True}], ids=str)
def test_a_factored_step_of_many_matrices_is_the_references(options):
    """Programs share what is done between stages, and none of them stores the count that others read."""
    found = []
    for on in ("triton", "reference"):
        generator = torch.Generator().manual_seed(2)
        params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in [(5, 4, 3), (7, 2, 3, 3)]]
        opt = rules.Adafactor(params, backend=on, **options)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            opt.step()
        assert opt.explain().backend == on
        kept = (
            v for p in params for v in opt.state[p].values() if isinstance(v, torch.Tensor) and v.ndim > 1
        )
        found.append([*params, *kept])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


def stored(on, make, shapes, key):
    """The parameters after two steps of an optimizer, and what is stored under a name."""
    generator = torch.Generator().manual_seed(2)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    opt = make(params, backend=on)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        opt.step()
    assert opt.explain().backend == on and not opt.explain().eager
    return [*params, *(s[key] for s in opt.state_dict()["state"].values())]


@pytest.mark.parametrize("rule", ["AdamMini", "CAME"])
def test_rows_and_columns_beside_blocks_are_the_references(rule, monkeypatch, small):
    """The last axis is a block's, and one more tells blocks apart."""
    monkeypatch.setattr(policies.Blocks, "least", 0)
    make = functools.partial(getattr(rules, rule), storage={"exp_avg": "int8"})
    found = (stored(on, make, ((5, 64), (2, 3, 128)), "exp_avg") for on in ("triton", "reference"))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", ["int8", "float16_sr"])
def test_policies_of_storage_are_the_references(storage, monkeypatch, small):
    monkeypatch.setattr(policies.Blocks, "least", 0)
    make = functools.partial(fusedopt.optim.AdamW, lr=0.1, storage=storage)
    found = (stored(on, make, ((101,), (5,)), "exp_avg_sq") for on in ("triton", "reference"))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
