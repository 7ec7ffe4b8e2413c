"""Lines of a constant length in C++: several at a time, and those that are left one by one, against the interpreter."""

import re

import pytest
import torch
from helpers import assert_same_bits, needs_extension
from test_blocks import build, tensors
from test_blocks import run as run_rows
from test_cuda_lines import OTHERS, PROGRAMS, with_dtypes

from fusedopt.backends.cpp.lines import AT_ONCE
from fusedopt.backends.cpp.render import render
from fusedopt.ir.program import interpret

pytestmark = needs_extension


def twice(g, x):
    """What a line comes to, and then what comes of that in all of it; both are needed for what is stored."""
    first = g.op("div", x["grad"], g.op("absmax", x["grad"], to="0"))
    second = g.op("mul", first, g.op("amax", g.op("sub", first, x["param"]), to="0"))
    return {"param": g.op("add", x["param"], second), "lines": g.op("absmax", second, to="0")}


def overwritten(g, x):
    """The parameter could be stored before its line's size is known, but for who needs it as it was."""
    size = g.op("absmax", x["grad"], to="0")
    rest = g.op("mul", g.op("sqrt", g.op("mul", x["param"], x["param"])), size)
    return {"param": g.op("sub", x["param"], x["grad"]), "many": rest}


def sizes_and_sums(g, x):
    """A sum of the whole tensor of what is made with each line's size, and sums that depend on their order."""
    size = g.op("absmax", x["grad"], to="0")
    mean = g.op("mean", g.op("div", x["grad"], size), to="0")
    whole = g.op("sum", g.op("mul", g.op("sub", x["grad"], mean), size))
    return {"param": g.op("sub", x["param"], whole), "code": g.op("mul", x["grad"], mean)}


def narrow_update(g, x):
    new = g.op("sub", x["param"], g.op("mul", x["grad"], g.leaf("slot", 0)))
    return {"param": new, "code": g.op("div", new, g.op("absmax", new, to="0"))}


def apart(g, x):
    """The parameter has nothing to do with the line."""
    square = g.op("mul", x["grad"], x["grad"])
    return {
        "param": g.op("sub", x["param"], x["grad"]),
        "code": g.op("div", square, g.op("absmax", square, to="0")),
    }


BF16 = torch.bfloat16
CASES = PROGRAMS | {
    name: build(2, make, line_length=64, param="F", grad="F") for name, make in OTHERS.items()
}
CASES |= {
    "twice": build(2, twice, line_length=64, param="F", grad="F", lines="0"),
    "overwritten": build(2, overwritten, line_length=64, param="F", grad="F", many="F"),
    "sizes and sums": build(2, sizes_and_sums, line_length=64, param="F", grad="F", code="F"),
    "apart": build(2, apart, line_length=64, param="F", grad="F", code="F"),
    "narrow": with_dtypes(
        build(2, narrow_update, line_length=64, param="F", grad="F", code="F"), param=BF16, code=BF16
    ),
    "one at a time": with_dtypes(
        build(2, narrow_update, line_length=1000, param="F", grad="F", code="F"), code=BF16
    ),
}


def shapes(program):
    n, many = program.line, max(AT_ONCE // program.line, 1)
    lines = (0, 1, many - 1, many, many + 1, 3 * many)
    return [(k,) for k in sorted({max(m * n + more, 0) for m in lines for more in (-1, 0, 1)})]


@pytest.mark.parametrize("name", CASES)
def test_kernels_have_the_bits_of_the_interpreter(name):
    program = CASES[name]
    sizes = shapes(program)
    rows = [tensors(program, size, seed) for seed, size in enumerate(sizes)]
    wanted = [interpret(program, row, [0.9], size) for row, size in zip(rows, sizes, strict=True)]
    run_rows(program, rows, sizes)
    for row, found in zip(rows, wanted, strict=True):
        for buffer, value in found.items():
            expected = value.to(row[buffer].dtype).view(row[buffer].shape)
            assert_same_bits(row[buffer].float(), expected.float())


def test_what_waits_for_no_line_is_stored_before_them():
    """So divisions of an update are not done after a line's maximum, while nothing else is to do."""

    def is_early(program, store):
        body = render(program, ["s"])
        return body.index(store) < re.search(r"= joined<|\.total\(", body).start()

    assert not is_early(
        CASES["codes in lines of 64"], "store(param"
    )  # its update needs the line's largest number
    assert not is_early(CASES["overwritten"], "store(param")
    assert not is_early(CASES["narrow"], "store(param")
    early = CASES["apart"]
    assert is_early(early, "store(param") and not is_early(early, "store(code")


def factored(g, x):
    """Codes of what is made with means of rows and sums of columns, beside which blocks are one more axis."""
    square = g.op("mul", x["grad"], x["grad"])
    rows, columns = g.op("mean", square, to="0"), g.op("sum", square, to="12")
    new = g.op("sub", g.op("div", x["grad"], g.op("sqrt", rows)), g.op("mul", x["code"], columns))
    size = g.op("absmax", new, to="01")
    left = g.op("sum", g.op("mul", new, new), to="0")
    return {
        "param": g.op("sub", x["param"], new),
        "code": g.op("div", new, size),
        "sizes": size,
        "rows": g.op("add", rows, left),
        "columns": columns,
    }


@pytest.mark.parametrize("code", [torch.float32, BF16])
def test_with_more_axes_the_last_one_is_a_line(code):
    kinds = {"param": "F", "grad": "F", "code": "F", "sizes": "01", "rows": "0", "columns": "12"}
    program = with_dtypes(build(3, factored, line_length=64, **kinds), code=code)
    body = render(program, ["s"])
    assert "with_lines<many, n2>" in body and bool(re.search(r"T k\d+\[n2\];", body)) == (code == BF16)
    sizes = [(1, 1, 64), (3, 1, 64), (7, 5, 64), (2, 8, 64), (40, 33, 64), (0, 2, 64)]
    rows = [tensors(program, size, seed) for seed, size in enumerate(sizes)]
    wanted = [interpret(program, row, [0.9], size) for row, size in zip(rows, sizes, strict=True)]
    run_rows(program, rows, sizes)
    for row, found in zip(rows, wanted, strict=True):
        for buffer, value in found.items():
            torch.testing.assert_close(row[buffer], value.to(row[buffer].dtype).view(row[buffer].shape))
