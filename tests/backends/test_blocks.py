"""Programs with several axes: the compiled kernels against the interpreter, in float64, whatever the sizes."""

import ctypes
import itertools

import numpy as np
import pytest
import torch

from fusedopt import backends
from fusedopt.backends import chunking
from fusedopt.backends.cpp import backend as cpu
from fusedopt.backends.cpp import render as cpp
from fusedopt.compile import toolchain
from fusedopt.ir.ops import axes_of
from fusedopt.ir.passes import optimize
from fusedopt.ir.program import Buffer, Graph, Program, interpret
from fusedopt.kernels import source as skeleton

F32 = torch.float32


LINES = "lines"
"""In place of a number of axes: lines of 64 elements, the last of which may have fewer."""


def build(axes, make, dtype=F32, line_length=0, **kinds):
    """A program with these axes: ``make(graph, loads)`` returns the stores by name."""
    g = Graph("".join(map(str, range(axes))))
    names = {name: name if name in ("param", "grad") else f"state.{name}" for name in kinds}
    buffers = tuple((names[name], Buffer(dtype, kind)) for name, kind in kinds.items())
    loads = {name: g.leaf("load", names[name], kind=kind) for name, kind in kinds.items()}
    stores = tuple((names[name], i) for name, i in make(g, loads).items())
    return optimize(Program(dtype, buffers, tuple(g.values), stores, 1, axes=axes, line=line_length))


def factored(g, x):
    """Adafactor's step of a matrix, or of a batch of them."""
    batch, last = g.axes[:-2], g.axes[-1]
    s = g.leaf("slot", 0)
    square = g.op("add", g.op("mul", x["grad"], x["grad"]), g.leaf("const", 1e-30))
    row = g.op("add", g.op("mul", x["row"], s), g.op("mean", square, to=g.axes[:-1]))
    col = g.op("add", g.op("mul", x["col"], s), g.op("mean", square, to=batch + last))
    factor = g.op("sqrt", g.op("div", row, g.op("mean", row, to=batch or None)))
    update = g.op("div", x["grad"], g.op("mul", factor, g.op("sqrt", col)))
    size = g.op("sqrt", g.op("mean", g.op("mul", update, update)))
    scaled = g.op("div", update, g.op("maximum", size, g.leaf("const", 1.0)))
    return {"param": g.op("sub", x["param"], scaled), "row": row, "col": col}


def centred(g, x):
    """A gradient less the mean of each line."""
    less = g.op("sub", x["grad"], g.op("mean", x["grad"], to=g.axes[:-1]))
    return {"param": g.op("sub", x["param"], g.op("mul", less, g.leaf("slot", 0)))}


def by_rows(g, x):
    """One second moment per row, kept while the row is in cache."""
    mean = g.op("mean", g.op("mul", x["grad"], x["grad"]), to=g.axes[:-1])
    v = g.op("add", g.op("mul", x["v"], g.leaf("slot", 0)), mean)
    return {"param": g.op("sub", x["param"], g.op("div", x["grad"], g.op("sqrt", v))), "v": v}


def centred_twice(g, x):
    """Less the mean of each line, over the norm of that, over that of all."""
    less = g.op("sub", x["grad"], g.op("mean", x["grad"], to=g.axes[:-1]))
    norm = g.op("sqrt", g.op("sum", g.op("mul", less, less), to=g.axes[:-1]))
    scaled = g.op("div", less, norm)
    total = g.op("sqrt", g.op("sum", g.op("mul", scaled, scaled)))
    return {"param": g.op("sub", x["param"], g.op("div", scaled, total))}


def covered(g, x):
    """SM3: the largest along each axis."""
    least = None
    for a in g.axes:
        held = x[f"m{a}"]
        least = held if least is None else g.op("minimum", least, held)
    new = g.op("add", least, g.op("mul", x["grad"], x["grad"]))
    stores = {f"m{a}": g.op("amax", new, to=a) for a in g.axes}
    return {"param": g.op("sub", x["param"], g.op("div", x["grad"], g.op("sqrt", new))), **stores}


def scalars_of_rows(g, x):
    """Sums of rows and of columns that only numbers per tensor need, and a column that is stored in another's place."""
    row = g.op("sum", x["grad"], to="0")
    col = g.op("amax", g.op("abs", x["grad"]), to="1")
    both = g.op("add", g.op("amax", row), g.op("sum", x["col"]))
    return {"param": g.op("add", x["param"], both), "size": both, "col": g.op("add", col, both)}


def columns_of_centred(g, x):
    """One second moment per column, of gradients less the mean of each line."""
    less = g.op("sub", x["grad"], g.op("mean", x["grad"], to=g.axes[:-1]))
    square = g.op("mul", less, less)
    col = g.op("add", g.op("mul", x["col"], g.leaf("slot", 0)), g.op("mean", square, to=g.axes[-1]))
    step = g.op("div", g.op("mul", less, g.op("amax", g.op("abs", less))), g.op("sqrt", col))
    return {"param": g.op("sub", x["param"], step), "col": col}


def scaled(g, x):
    """State in units of the largest of its neighbours, and numbers of the whole tensor, which come before."""
    value = g.op("mul", x["m"], x["scale"])
    new = g.op("add", g.op("mul", value, g.leaf("slot", 0)), x["grad"])
    size = g.op("sqrt", g.op("mean", g.op("mul", new, new)))
    largest, mean = g.op("absmax", new, to="0"), g.op("mean", new, to="0")
    new_param = g.op("sub", x["param"], g.op("div", g.op("sub", new, mean), size))
    count = g.op("mul", size, g.leaf("numel"))
    return {"param": new_param, "m": g.op("div", new, largest), "scale": largest, "size": count}


def drawn(g, x):
    """Noise, less the largest of each line, and the mean of each column of that: drawn again wherever it is needed."""
    noise = g.op("normal", g.leaf("slot", 0, type="d"), g.leaf("const", 3.0, type="d"), to=1)
    noisy = g.op("add", x["grad"], noise)
    less = g.op("sub", noisy, g.op("amax", noisy, to=g.axes[:-1]))
    return {"param": g.op("sub", x["param"], less), "col": g.op("mean", less, to=g.axes[-1])}


PROGRAMS = {
    "in blocks": (build(2, scaled, line_length=64, param="F", grad="F", m="F", scale="0", size="S"), LINES),
    "factored matrix": (build(2, factored, param="F", grad="F", row="0", col="1"), 2),
    "factored batch": (build(3, factored, param="F", grad="F", row="01", col="02"), 3),
    "factored batch of batches": (build(4, factored, param="F", grad="F", row="012", col="013"), 4),
    "centred": (build(2, centred, param="F", grad="F"), 2),
    "by rows": (build(2, by_rows, param="F", grad="F", v="0"), 2),
    "by rows, of three axes": (build(3, by_rows, param="F", grad="F", v="01"), 3),
    "centred twice": (build(2, centred_twice, param="F", grad="F"), 2),
    "covered": (build(2, covered, param="F", grad="F", m0="0", m1="1"), 2),
    "covered, of four axes": (build(4, covered, param="F", grad="F", m0="0", m1="1", m2="2", m3="3"), 4),
    "numbers of rows": (build(2, scalars_of_rows, param="F", grad="F", col="1", size="S"), 2),
    "columns of centred": (build(2, columns_of_centred, param="F", grad="F", col="1"), 2),
    "columns of centred, of three axes": (build(3, columns_of_centred, param="F", grad="F", col="2"), 3),
    "drawn": (build(2, drawn, param="F", grad="F", col="1"), 2),
    "drawn, of three axes": (build(3, drawn, param="F", grad="F", col="2"), 3),
    "double": (build(2, factored, torch.float64, param="F", grad="F", row="0", col="1"), 2),
    "half": (build(2, by_rows, torch.float32, param="F", grad="F", v="0"), 2),
}
SHAPES = {
    LINES: [(1,), (63,), (64,), (65,), (1000,), (0,), (3 * 65536 + 65,)],
    2: [
        (1, 1),
        (3, 5),
        (64, 64),
        (1, 1000),
        (1000, 1),
        (7, 100_003),
        (100_003, 3),
        (300, 700),
        (0, 4),
        (2, 0),
        (17, 16),
    ],
    3: [
        (1, 1, 1),
        (2, 3, 5),
        (40_000, 3, 3),
        (31, 3, 3),
        (32, 3, 3),
        (33, 3, 3),
        (61, 2, 3),
        (13, 7, 3),
        (2, 40_001, 3),
        (2, 500, 300),
        (5, 1, 7),
        (3, 300, 401),
        (0, 2, 2),
    ],
    4: [(2, 3, 4, 5), (20, 30, 3, 3), (64, 3, 7, 7), (2, 2, 300, 300), (1, 70_000, 1, 2)],
}


def lengths(program, shape):
    """Those of a program's axes."""
    return (-(-shape[0] // program.line), program.line) if program.blocked else tuple(shape)


def tensors(program, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    count = int(np.prod(shape))
    shape = lengths(program, shape)
    for name, buffer in program.buffers:
        kept = axes_of(buffer.kind, program.all_axes)
        size = [n for a, n in enumerate(shape) if str(a) in kept]
        size = [count] if program.blocked and buffer.kind == "F" else size
        value = torch.randn(size, generator=generator, dtype=torch.float64)
        made[name] = (value if name in ("param", "grad") else value.abs() + 0.1).to(buffer.dtype)
    return made


def run(program, rows, shapes, backend="cpp", slots=(0.9,)):
    kernel = backends.get(backend).compile(program, "blocks", ["s"])
    columns = {name: [row[name] for row in rows] for name, _ in program.buffers}
    sizes = [int(np.prod(shape)) for shape in shapes]
    launch = backends.get(backend).prepare(
        kernel, columns, sizes, [0] * len(sizes), shapes=[lengths(program, s) for s in shapes]
    )
    launch.run(np.array([slots]))


def wide(program):
    """The same program in float64: what is right."""
    from dataclasses import replace

    f64 = tuple((n, Buffer(torch.float64, b.kind)) for n, b in program.buffers)
    return replace(program, compute=torch.float64, buffers=f64)


def compared(program, shapes, backend="cpp"):
    """The backend's kernels are as close to the program in float64 as the interpreter is."""
    rows = [tensors(program, shape, seed) for seed, shape in enumerate(shapes)]
    wanted = [
        interpret(wide(program), {n: t.double() for n, t in row.items()}, [0.9], shape)
        for row, shape in zip(rows, shapes, strict=True)
    ]
    narrow = [interpret(program, row, [0.9], shape) for row, shape in zip(rows, shapes, strict=True)]
    before = [{n: t.clone() for n, t in row.items()} for row in rows]
    run(program, rows, shapes, backend)
    for row, exact, plain, old, shape in zip(rows, wanted, narrow, before, shapes, strict=True):
        for n, t in row.items():
            if n not in exact:
                assert torch.equal(t, old[n])
                continue
            error, allowed = (t.double() - exact[n]).abs(), (plain[n].double() - exact[n]).abs()
            eps = torch.finfo(program.compute).eps
            scale = exact[n].abs().amax() if exact[n].numel() else 0
            # Sums are in double: where the results are too, each addition's rounding shows.
            times = 64 if program.compute == torch.float64 else 8
            limit = 4 * (allowed.amax() if allowed.numel() else 0) + times * eps * scale
            right = (error <= limit) | (t.isnan() & exact[n].isnan())
            assert right.all(), (n, shape, error.max(), limit)


@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels_do_what_the_program_says(name):
    program, axes = PROGRAMS[name]
    compared(program, SHAPES[axes])


def over_columns(g, x):
    """A gradient over what others have found for rows, columns and batches of them, and over the size of that."""
    less = g.op("div", x["grad"], g.op("add", g.op("mul", x["row"], x["batch"]), x["col"]))
    size = g.op("sqrt", g.op("sum", g.op("mul", less, less)))
    return {"param": g.op("sub", x["param"], g.op("div", less, size))}


def largest_of_batches(g, x):
    """Sums to each place of a batch, of what lines have less their means."""
    less = g.op("sub", x["grad"], g.op("mean", x["grad"], to=g.axes[:-1]))
    largest, mean = g.op("amax", g.op("abs", less), to="0"), g.op("mean", g.op("mul", less, less), to="0")
    step = g.op("div", g.op("mul", less, largest), g.op("add", mean, x["batch"]))
    return {"param": g.op("sub", x["param"], step), "batch": mean}


def columns_of_batches(g, x):
    """One second moment per column of each batch, of gradients less the mean of each line."""
    less = g.op("sub", x["grad"], g.op("mean", x["grad"], to=g.axes[:-1]))
    col = g.op("add", x["col"], g.op("mean", g.op("mul", less, less), to="02"))
    return {"param": g.op("sub", x["param"], g.op("div", less, g.op("sqrt", col))), "col": col}


TILED = {
    "factored batch": PROGRAMS["factored batch"][0],
    "factored batch of batches": PROGRAMS["factored batch of batches"][0],
    "by rows": PROGRAMS["by rows, of three axes"][0],
    "columns of batches": build(3, columns_of_batches, param="F", grad="F", col="02"),
    "over columns": build(3, over_columns, param="F", grad="F", row="01", col="02", batch="0"),
    "largest of batches": build(3, largest_of_batches, param="F", grad="F", batch="0"),
    "over columns, in double": build(
        3, over_columns, torch.float64, param="F", grad="F", row="01", col="02", batch="0"
    ),
    "factored, in double": build(3, factored, torch.float64, param="F", grad="F", row="01", col="02"),
    "in bfloat16": optimize(
        Program(
            F32,
            tuple((n, Buffer(torch.bfloat16, b.kind)) for n, b in PROGRAMS["factored batch"][0].buffers),
            *(getattr(PROGRAMS["factored batch"][0], name) for name in ("values", "stores", "slots")),
            axes=3,
        )
    ),
}
SHORT = [
    (15, 3, 3),
    (16, 3, 3),
    (17, 3, 3),
    (500, 3, 3),
    (67, 2, 3),
    (1, 97, 3),
    (13, 7, 3),
    (3, 301, 3),
    (40, 3, 5),
    (9, 9, 1),
]


@pytest.mark.parametrize("chunk", [chunking.CHUNK, 600])
@pytest.mark.parametrize("name", TILED)
def test_tiles_of_short_lines_are_as_one_line_after_another(name, chunk, monkeypatch):
    """Also where chunks begin inside of runs, or go on to the next stage, and whatever the number of threads."""
    program = TILED[name]
    monkeypatch.setattr(chunking, "CHUNK", chunk)
    chunking.blocks.cache_clear()
    shapes = [(5, *shape) if program.axes == 4 else shape for shape in SHORT]
    rows = [tensors(program, shape, seed) for seed, shape in enumerate(shapes)]

    def results(threads):
        monkeypatch.setattr(cpu.leaf, "thread_count", lambda: threads)
        mine = [{n: t.clone() for n, t in row.items()} for row in rows]
        run(program, mine, shapes)
        return [t for row in mine for t in row.values()]

    found = [results(threads) for threads in (1, 2, 3)]
    assert "== tiled)" in cpp.render(program)
    rendered = cpp.render
    monkeypatch.setattr(cpp, "render", lambda *args: rendered(*args).replace("== tiled)", "== -1)"))
    monkeypatch.setattr(
        cpu, "skeleton", lambda name: skeleton(name).replace("% each ? 0 : each", "% each ? 0 : 0")
    )
    monkeypatch.setattr(backends.get("cpp"), "_kernels", {})
    plain = results(1)
    chunking.blocks.cache_clear()
    for other in found[1:]:
        assert all(map(torch.equal, (t.nan_to_num(7) for t in found[0]), (t.nan_to_num(7) for t in other)))
    for ours, theirs in zip(found[0], plain, strict=True):
        close = (
            {"rtol": 1e-13, "atol": 1e-13} if ours.dtype == torch.float64 else {"rtol": 2e-7, "atol": 1e-9}
        )
        torch.testing.assert_close(ours, theirs, equal_nan=True, **close)


@pytest.mark.parametrize("shape", [(200, 3, 3), (2, 40_001, 3)])
def test_a_step_that_is_skipped_leaves_all_state_also_where_chunks_go_on(shape):
    """Of chunks with whole batches, and of ones that share them."""

    whole = build(3, factored, param="F", grad="F", row="01", col="02")
    g = Graph("012")
    kinds = {"param": "F", "grad": "F", "row": "01", "col": "02", "found": "S"}
    names = {n: n if n in ("param", "grad") else f"state.{n}" for n in kinds}
    loads = {n: g.leaf("load", names[n], kind=kind) for n, kind in kinds.items()}
    stores = tuple((names[n], i) for n, i in factored(g, loads).items())
    skip = g.op("ne", loads["found"], g.leaf("const", 0.0))
    buffers = tuple((names[n], Buffer(F32, kind)) for n, kind in kinds.items())
    program = optimize(Program(F32, buffers, tuple(g.values), stores, 1, skip=skip, axes=3))
    given = tensors(program, shape, 0)
    for found in (0.0, 1.0):
        row = {n: t.clone() for n, t in given.items()} | {"state.found": torch.full((), found)}
        run(program, [row], [shape])
        wanted = {n: t.clone() for n, t in given.items() if n != "state.found"}
        if not found:
            run(whole, [wanted], [shape])
        assert all(torch.equal(row[n], t) for n, t in wanted.items())


def test_quotients_by_lengths_are_rounded_as_divisions(tmp_path):
    """With multiply-adds: close to ties, at either end of the numbers there are, and of infinities."""
    body = """
extern "C" void quotients(const double* x, const int64_t* n, double* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = quotient(x[i], n[i]);
}
"""
    library = toolchain.compile_library(
        "quotients", cpp.source(skeleton("cpu.cpp"), body), symbols=["quotients"], key_parts=[]
    )
    generator = np.random.default_rng(0)
    lengths = [*range(1, 65), 127, 4097, 65_535, 2**20 - 1, 2**31 - 1, 2**33 + 1, 2**49 + 7]
    numbers = [
        0.0,
        5e-324,
        1e-300,
        2.0**-1022,
        1.7e308,
        np.inf,
        -np.inf,
        np.nan,
        1.0,
        -1.0,
        1 - 2**-53,
        1 + 2**-52,
    ]
    numbers += [*generator.standard_normal(2000), *(2 - np.arange(1, 200) * 2.0**-52)]
    pairs = [*itertools.product(numbers, lengths)]
    pairs += [(float(n) * q, n) for n in lengths for q in 1 + generator.integers(0, 2**52, 200) * 2.0**-52]
    x, n = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], np.int64)
    out = np.empty_like(x)
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, ctypes.c_int64)(library.address("quotients"))
    call(x.ctypes.data, n.ctypes.data, out.ctypes.data, len(x))
    np.testing.assert_array_equal(out, x / n)


OURS = ["line", "first", "regions", "c", "k", "n0", "i0", "o0", "q0", "e0", "y0", "tile", "tiled", "start"]
"""Names that generated code has for itself."""


def named(name):
    """A program with a number per row in a state buffer of this name."""

    def make(g, x):
        return by_rows(g, {**x, "v": x[name]}) | {name: g.op("mul", x[name], g.leaf("slot", 0))}

    kinds = {"param": "F", "grad": "F", name: "0"}
    return build(2, lambda g, x: {n: i for n, i in make(g, x).items() if n != "v"}, **kinds)


@pytest.mark.parametrize("name", OURS)
def test_state_may_be_called_what_generated_code_calls_its_own(name):
    compared(named(name), [(3, 5)])
