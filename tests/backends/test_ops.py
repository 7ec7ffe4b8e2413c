"""The op table: what each row means in C++ is what it means in torch, special values included.

One kernel per compute type holds every op, so a new row is tested without a new test. First, the tests' own rulers.
"""

import math
from functools import cache

import numpy as np
import pytest
import torch
from helpers import (
    SLOT,
    assert_close_to_float64,
    assert_same_bits,
    bits,
    compile_kernel,
    copies,
    doubles,
    error_in_ulp,
    new_rows,
    run_kernel,
    ulp_distance,
)

from fusedopt.backends.cpp.backend import joined
from fusedopt.ir.ops import OPS, Op, Reduction, result_kind
from fusedopt.ir.program import Buffer, Graph, Program, interpret, verify

# ---------------------------------------------------------------- the rulers


def test_ulp_distance_counts_the_numbers_in_between():
    one = torch.tensor(1.0)
    cases = [
        (1.0, 1.0, 0),
        (1.0, math.nextafter(1.0, 2.0), 1),
        (0.0, -0.0, 0),
        (-math.ulp(0.0), math.ulp(0.0), 2),
        (math.nan, math.nan, 0),
        (math.nan, 1.0, 2**63 - 1),
        (-math.inf, math.inf, 2**63 - 1),
        (1.7976931348623157e308, math.inf, 1),
    ]
    for a, b, distance in cases:
        a, b = (torch.tensor(x, dtype=torch.float64) for x in (a, b))
        assert ulp_distance(a, b) == ulp_distance(b, a) == distance
    assert ulp_distance(one, one + 3 * torch.finfo(torch.float32).eps) == 3
    assert ulp_distance(one.bfloat16(), one.bfloat16() * 1.015) == 2


def test_the_bits_of_zeros_differ_and_those_of_nans_do_not():
    assert bits(torch.tensor(0.0)) != bits(torch.tensor(-0.0))
    assert bits(torch.tensor(math.nan)) == bits(-torch.tensor(math.nan))
    with pytest.raises(AssertionError, match="index, ours, expected"):
        assert_same_bits(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]))


def test_competition_accepts_twice_the_competitors_error_and_no_more():
    truth = torch.randn(100, dtype=torch.float64)
    exact, ulp = truth.float(), truth.abs().amax().item() * torch.finfo(torch.float32).eps
    truth = exact.double()
    eager = exact + 3 * ulp
    assert error_in_ulp(eager, truth) == pytest.approx(3, rel=0.2)
    assert_close_to_float64(exact + 4 * ulp, eager, truth)
    with pytest.raises(AssertionError, match="eager torch"):
        assert_close_to_float64(exact + 9 * ulp, eager, truth)


def test_competition_allows_two_ulp_where_the_competitor_is_exact():
    truth = torch.randn(100, dtype=torch.float64).float().double()
    exact, ulp = truth.float(), truth.abs().amax().item() * torch.finfo(torch.float32).eps
    assert_close_to_float64(exact + 1.4 * ulp, exact, truth)
    with pytest.raises(AssertionError):
        assert_close_to_float64(exact + 3.1 * ulp, exact, truth)


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf], ids=["sign", "nan", "inf"])
def test_competition_notices_a_single_wrong_element(wrong):
    truth = torch.rand(2, 50, dtype=torch.float64) + 1
    eager = truth.float()
    ours = eager.clone()
    ours[1, 7] *= wrong
    assert_close_to_float64([eager, eager], [eager, eager], [truth, truth])
    with pytest.raises(AssertionError):
        assert_close_to_float64([eager, ours], [eager, eager], [truth, truth])


def test_competition_wants_infinity_and_nan_where_they_belong():
    truth = torch.tensor([math.inf, math.nan, 1.0], dtype=torch.float64)
    eager = truth.float()
    assert_close_to_float64(eager.clone(), eager, truth)
    for k, value in [(0, -math.inf), (0, 3e38), (1, 1.0), (2, math.nan)]:
        ours = eager.clone()
        ours[k] = value
        with pytest.raises(AssertionError):
            assert_close_to_float64(ours, eager, truth)
    with pytest.raises(AssertionError, match="no competition"):
        assert_close_to_float64(eager, eager * math.nan, truth)


def test_competition_wants_the_same_shapes_and_dtypes():
    truth = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_close_to_float64(truth.float(), truth.bfloat16(), truth)
    with pytest.raises(AssertionError):
        assert_close_to_float64(truth.float()[:2], truth.float()[:2], truth)
    with pytest.raises(ValueError, match="zip"):
        assert_close_to_float64([truth.float()], [truth.float()], [truth, truth])


# ---------------------------------------------------------------- elementwise

DTYPES = [torch.float32, torch.float64]
ELEMENTWISE = [op for op in OPS.values() if isinstance(op, Op)]
REDUCTIONS = [op for op in OPS.values() if isinstance(op, Reduction)]
LIBRARY = ("pow", "atan2", "exp", "expm1", "log", "log1p", "log2", "sin", "cos", "tanh", "atan", "erf")
"""Ops that are a mathematical library's work, so exact in neither. Any other op, new ones too, is exact."""
LIBRARY_ULP = 4
INPUTS = ("param", "grad", "state.third")


def special_values(dtype):
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    positive = [0.0, tiny, info.smallest_normal - tiny, info.smallest_normal, info.eps, 0.3, 0.5, 1.0]
    positive += [1.0 + info.eps, 1.5, 2.0, 2.5, 3.0, 88.5, 2.0**24 + 1, 1e10, info.max, math.inf]
    return torch.tensor([math.nan, *positive, *(-x for x in positive)], dtype=dtype)


@cache
def inputs(dtype):
    """Every pair of special values, and random numbers of all sizes."""
    generator = torch.Generator().manual_seed(1)
    special = special_values(dtype)
    x, y = (t.flatten() for t in torch.meshgrid(special, special, indexing="ij"))
    sizes = torch.randint(-30, 30, (3, 4000), generator=generator)
    random = torch.randn(3, 4000, generator=generator, dtype=dtype) * 2.0**sizes
    columns = [torch.cat([x, random[0]]), torch.cat([y, random[1]]), torch.cat([x.flip(0), random[2]])]
    return dict(zip(INPUTS, columns, strict=True))


@cache
def outputs(dtype):
    """What C++ and the interpreter make of every elementwise op, each in its own state buffer."""
    graph = Graph()
    numbers = [graph.leaf("load", name, kind="F") for name in INPUTS]
    masks = [graph.op("gt", numbers[0], numbers[1]), graph.op("ge", numbers[1], numbers[2])]
    buffers, stores = {name: Buffer(dtype, "F") for name in INPUTS}, {}
    for op in ELEMENTWISE:
        pools = {"f": iter(numbers), "b": iter(masks)}
        result = graph.op(op.name, *[next(pools[t]) for t in op.types[: op.arity]])
        stores[f"state.{op.name}"] = graph.op("as_float", result) if op.result == "b" else result
        buffers[f"state.{op.name}"] = Buffer(dtype, "F")
    program = Program(dtype, tuple(buffers.items()), tuple(graph.values), tuple(stores.items()), 0)
    verify(program)
    given = inputs(dtype) | {name: torch.zeros_like(inputs(dtype)["param"]) for name in stores}
    run_kernel(compile_kernel(program, "all_ops"), ran := copies(given))
    for name in INPUTS:
        assert_same_bits(ran[name], given[name])
    return ran, interpret(program, given, [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ELEMENTWISE, ids=lambda op: op.name)
def test_elementwise_op_is_torchs(op, dtype):
    ours, expected = (t[f"state.{op.name}"] for t in outputs(dtype))
    if op.name not in LIBRARY:
        assert_same_bits(ours, expected)
    else:
        assert ulp_distance(ours, expected).max() <= LIBRARY_ULP


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ELEMENTWISE, ids=lambda op: op.name)
def test_the_interpreters_own_spellings_are_torchs_functions(op, dtype):
    """Where it does not call torch's function itself: that may be off by an ulp, or leave a zero's sign open."""
    theirs = getattr(torch, op.name, op.torch)
    if op.torch is not theirs:
        arguments = list(inputs(dtype).values())[: op.arity]
        ours, eager = op.torch(*arguments), theirs(*arguments)
        if op.name == "fmod":  # theirs is NaN where the quotient overflows
            ours, eager = (x[(arguments[0] / arguments[1]).isfinite()] for x in (ours, eager))
        assert ulp_distance(ours, eager).max() <= (op.name == "sqrt")


def test_no_nan_is_rounded_to_an_infinity():
    """Those that no arithmetic makes have only bits that a narrower number lacks."""
    g = Graph()
    x, noise = (g.leaf("load", name, kind="F") for name in ("param", "grad"))
    out = g.op("bfloat16_at_random", x, noise)
    floats = dict.fromkeys(("param", "grad"), Buffer(torch.float32, "F"))
    buffers = tuple((floats | {"state.a": Buffer(torch.bfloat16, "F")}).items())
    program = Program(torch.float32, buffers, tuple(g.values), (("state.a", out),), 0)
    bits = torch.tensor(
        [0x7F800001, 0x7F80FFFF, -0x7FFFFF, 0x7FC00000, 0x7F800000, 0x3F800000], dtype=torch.int32
    )
    given = {
        "param": bits.repeat(20).view(torch.float32),
        "grad": torch.full((120,), 1.5),
        "state.a": torch.zeros(120, dtype=torch.bfloat16),
    }
    run_kernel(compile_kernel(program, "nans"), given)
    found = given["state.a"].view(20, 6)
    assert found[:, :4].isnan().all() and found[:, 4].isinf().all() and (found[:, 5] == 1).all()


def test_doubles_of_kind_s_are_computed_in_double():
    program, given = doubles(ELEMENTWISE)
    run_kernel(compile_kernel(program), ran := copies(given), [SLOT])
    expected = interpret(program, given, [SLOT])
    for name, value in expected.items():
        library = name.removeprefix("state.") in LIBRARY or name == "param"
        assert ulp_distance(ran[name], value).max() <= library * LIBRARY_ULP, name
    third, tenth = given["state.wide"].item(), SLOT
    assert expected["state.mul"].item() == third * tenth  # as Python has it
    assert expected["state.mul"].item() != float(torch.tensor(third) * torch.tensor(tenth))


def test_the_comparison_of_ops_can_fail():
    for name, other in [("add", "sub"), ("maximum", "minimum"), ("gt", "ge"), ("trunc", "floor")]:
        with pytest.raises(AssertionError, match="index, ours, expected"):
            assert_same_bits(
                outputs(torch.float32)[0][f"state.{name}"], outputs(torch.float32)[1][f"state.{other}"]
            )
    exp, expm1 = (outputs(torch.float32)[k][f"state.{name}"] for k, name in enumerate(("exp", "expm1")))
    assert ulp_distance(exp, expm1).max() > LIBRARY_ULP


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_no_column_of_the_table_is_empty(op):
    assert OPS[op.name] is op
    assert set(op.types[:-2]) <= {"f", "b"} and op.types[-2] == ">" and op.types[-1] in "fb"
    assert callable(op.torch)
    for spelling in (op.init, op.join) if isinstance(op, Reduction) else (op.cpp,):
        assert isinstance(spelling, str) and spelling.strip()
    text = op.join if isinstance(op, Reduction) else op.cpp
    used = [f"{{{k}}}" in text for k in range(4)]
    arity = 2 if isinstance(op, Reduction) else op.arity
    assert used == [k < arity for k in range(4)]


def test_a_row_is_all_that_a_new_op_needs():
    """Here in C++, by the interpreter, in print and where part results are joined; CUDA and Triton have such a test."""
    with new_rows() as (program, given, expected):
        run_kernel(compile_kernel(program), ran := copies(given))
        torch.testing.assert_close(ran["param"], expected)
        torch.testing.assert_close(interpret(program, given, [])["param"], expected)
        assert "torch.cosh(" in str(program) and "torch.prod(" in str(program)
        assert joined(["prod"], np.array([[2.0], [3.0], [5.0]]), np.array([0, 1, 0]), 2).tolist() == [
            [10.0],
            [3.0],
        ]


@pytest.mark.parametrize("op", REDUCTIONS, ids=lambda op: op.name)
def test_the_host_joins_part_results_as_kernels_do(op):
    special = special_values(torch.float64).tolist()
    a, b = (np.array(x) for x in zip(*((x, y) for x in special for y in special), strict=True))
    join = op.join.format("a", "b")
    if op.name in ("absmax", "bitmax"):  # part results are sizes
        a, b = abs(a), abs(b)
    with np.errstate(all="ignore"):
        expected = eval(
            join,
            dict(
                a=a,
                b=b,
                maximum=np.maximum,
                minimum=np.minimum,
                absmax=np.maximum,
                bitmax=np.maximum,
            ),
        )
        found = joined([op.name], np.concatenate([a, b])[:, None], np.tile(np.arange(len(a)), 2), len(a))
    np.testing.assert_array_equal(found[:, 0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_rules_of_the_docstring(dtype):
    results = outputs(dtype)[0]
    x, y = (inputs(dtype)[name] for name in ("param", "grad"))
    either = x.isnan() | y.isnan()
    assert either.any() and not either.all()
    for name in ("maximum", "minimum", "add", "mul", "div"):
        assert results[f"state.{name}"][either].isnan().all(), name
    for name in ("gt", "ge", "lt", "le", "eq"):
        assert not results[f"state.{name}"][either].any(), name
    assert results["state.ne"][either].all()
    assert (results["state.sign"][x.isnan()] == 0).all()


def test_no_product_is_contracted_with_a_sum():
    """v - g*g, where v is g*g rounded, is zero; with a fused multiply-add it is the product's rounding error."""
    graph = Graph()
    p, g = (graph.leaf("load", name, kind="F") for name in ("param", "grad"))
    difference = graph.op("sub", p, graph.op("mul", g, g))
    buffers = (("param", Buffer(torch.float32, "F")), ("grad", Buffer(torch.float32, "F")))
    program = Program(torch.float32, buffers, tuple(graph.values), (("param", difference),), 0)
    g = torch.randn(4096)
    tensors = {"param": g * g, "grad": g}
    run_kernel(compile_kernel(program), tensors)
    assert not tensors["param"].any()


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_kinds_follow_the_rule(op):
    assert result_kind(op.name, ["S"] * op.arity) == ("F" if op.name == "expand" else "S")
    expected = "S" if isinstance(op, Reduction) else "F"
    assert result_kind(op.name, ["F"] + ["S"] * (op.arity - 1)) == expected


# ---------------------------------------------------------------- reductions

SIZES = (1, 15, 16, 17, 1000, 3 * 65536 + 5)


@cache
def reduction_kernel(dtype):
    graph = Graph()
    x = graph.leaf("load", "param", kind="F")
    buffers, stores = {"param": Buffer(dtype, "F")}, {}
    for op in REDUCTIONS:
        buffers[f"state.{op.name}"] = Buffer(torch.float64, "S")
        stores[f"state.{op.name}"] = graph.op(op.name, x)
    program = Program(dtype, tuple(buffers.items()), tuple(graph.values), tuple(stores.items()), 0)
    verify(program)
    return compile_kernel(program, "reductions")


def reduced(x):
    buffers = {f"state.{op.name}": torch.zeros((), dtype=torch.float64) for op in REDUCTIONS}
    run_kernel(reduction_kernel(x.dtype), buffers | {"param": x})
    return {op.name: buffers[f"state.{op.name}"] for op in REDUCTIONS}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions_are_those_of_float64(dtype, size):
    x = torch.randn(size, dtype=dtype) * 10.0 ** torch.randint(-3, 3, (size,))
    for name, ours in reduced(x).items():
        wide = x.double()
        truth = OPS[name].torch(wide)
        # float32: one rounding, at the end. float64: the order of summation is free.
        scale = wide.abs().sum() / (size if name == "mean" else 1) if name in ("sum", "mean") else truth.abs()
        bound = torch.finfo(dtype).eps * (truth.abs() if dtype == torch.float32 else 16 * scale)
        assert (ours - truth).abs() <= bound or (ours.isnan() and truth.isnan()), name
        assert truth.isnan() == (name == "bitmax" and bool((x < 0).any())), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions_do_not_depend_on_the_number_of_threads(dtype):
    x = torch.randn(SIZES[-1], dtype=dtype) * 10.0 ** torch.randint(-8, 8, (SIZES[-1],))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found += [reduced(x), reduced(x)]
    for name in found[0]:
        for other in found[1:]:
            assert_same_bits(other[name], found[0][name])
    if dtype == torch.float64:  # a float32 sum is rounded from double, which hides the order
        assert not torch.equal(found[0]["sum"], reduced(x.flip(0))["sum"]), "no sum would depend on the order"


@pytest.mark.parametrize("where", [0, 15, 16, 100000, SIZES[-1] - 1])
def test_reductions_pass_on_nan_and_infinity(where):
    x = torch.randn(SIZES[-1])
    x[where] = math.nan
    assert all(value.isnan() for value in reduced(x).values())
    x[where] = math.inf
    assert {k: v.item() for k, v in reduced(x).items() if k not in ("amin", "bitmax")} == dict.fromkeys(
        ("sum", "mean", "amax", "absmax"), math.inf
    )
    assert reduced(x.abs())["bitmax"] == math.inf and reduced(x)["bitmax"].isnan()
    assert reduced(x)["amin"].isfinite() and reduced(-x)["amin"] == -math.inf


# ---------------------------------------------------------------- storage dtypes


@cache
def storage_kernel(compute):
    """Loads bfloat16 (param), half (grad) and float32; stores a number of the compute type in each of them."""
    loads = {"param": torch.bfloat16, "grad": torch.float16, "state.single": torch.float32}
    graph = Graph()
    buffers = {name: Buffer(dtype, "F") for name, dtype in loads.items()}
    buffers |= {f"state.{name}_loaded": Buffer(compute, "F") for name in ("param", "grad", "single")}
    buffers["state.x"] = Buffer(compute, "F")
    x = graph.leaf("load", "state.x", kind="F")
    stores = {}
    for name in loads:
        stores[f"state.{name.removeprefix('state.')}_loaded"] = graph.leaf("load", name, kind="F")
        stores[name] = x
    program = Program(compute, tuple(buffers.items()), tuple(graph.values), tuple(stores.items()), 0)
    verify(program)
    return compile_kernel(program, "storage")


def load_and_store(compute, x, param, grad, single):
    n = len(x)
    tensors = {"param": param.clone(), "grad": grad.clone(), "state.single": single.clone(), "state.x": x}
    tensors |= {f"state.{name}_loaded": torch.zeros(n, dtype=compute) for name in ("param", "grad", "single")}
    run_kernel(storage_kernel(compute), tensors)
    return {name.removeprefix("state."): t for name, t in tensors.items()}


def all_patterns(dtype):
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("compute", DTYPES, ids=str)
def test_every_16_bit_number_is_loaded_and_stored_as_torch_does(compute):
    param, grad = all_patterns(torch.bfloat16), all_patterns(torch.float16)
    single = torch.randn(65536)
    for x in (param.to(compute), grad.to(compute)):
        found = load_and_store(compute, x, param, grad, single)
        for name, stored in (("param", param), ("grad", grad), ("single", single)):
            assert_same_bits(found[f"{name}_loaded"], stored.to(compute))
            assert_same_bits(found[name], x.to(stored.dtype))
    assert_same_bits(found["grad"], grad)  # the round trip


def between(dtype, compute):
    """Around every 16-bit number: the ties on both sides, and their neighbours."""
    x = all_patterns(dtype).to(torch.float64)
    x = x[x.isfinite()].sort().values
    ties = ((x[1:] + x[:-1]) / 2).to(compute)
    up, down = torch.tensor(math.inf, dtype=compute), torch.tensor(-math.inf, dtype=compute)
    return torch.cat([ties, torch.nextafter(ties, up), torch.nextafter(ties, down)])


@pytest.mark.parametrize("compute", DTYPES, ids=str)
def test_stores_round_as_torch_does(compute):
    generator = torch.Generator().manual_seed(2)
    size = torch.randint(-160, 160, (100000,), generator=generator)
    random = torch.randn(100000, generator=generator, dtype=torch.float64) * 2.0**size
    special = [
        math.nan,
        math.inf,
        -math.inf,
        65504.0,
        65519.99,
        65520.0,
        3.3895e38,
        3.3962e38,
        2.0**-25,
        2.0**-134,
    ]
    x = torch.cat([random, torch.tensor(special, dtype=torch.float64)]).to(compute)
    x = torch.cat([x, between(torch.bfloat16, compute), between(torch.float16, compute)])
    empty = torch.zeros(len(x))
    found = load_and_store(compute, x, empty.bfloat16(), empty.half(), empty)
    for name, dtype in (("param", torch.bfloat16), ("grad", torch.float16), ("single", torch.float32)):
        assert_same_bits(found[name], x.to(dtype))
    truncated = (x.float().view(torch.int32) & -65536).view(torch.float32).bfloat16()
    assert not torch.equal(bits(truncated), bits(found["param"])), "rounding towards zero would pass"
