"""Generated CUDA C++: what it computes, run as C++ on the CPU. What NVRTC makes of it is in test_nvrtc.py.

The emulation covers the skeleton's walk, its tables, tails, alignment and reductions; its few lines of PTX (conversions
of 16-bit numbers, 128-bit stores) it does not.
"""

import functools
import math
import re

import cuda_kernels
import golden
import numpy as np
import pytest
import torch
from cuda_kernels import CASES, rendered
from helpers import assert_same_bits, new_rows

from fusedopt import backends
from fusedopt.backends import chunking as plan
from fusedopt.backends.cpp import render as cpp
from fusedopt.backends.cuda import render as cuda
from fusedopt.ir.ops import OPS, Op
from fusedopt.ir.program import Buffer, Graph, Program, interpret, verify
from fusedopt.ir.stages import scalar_stores, stages
from fusedopt.kernels import source as skeleton

SIZES = (1, 3, 0, 127, 128, 4097, 65536 + 5)
SETS = (0, 1, 2, 0, 1, 2, 1)
GUARD, BYTE = 64, 0xA5


class Memory:
    """Tensors with guard bytes before and behind each."""

    def __init__(self):
        self.raw = []

    def hold(self, values, offset=0):
        """A copy of the values at an aligned address, or ``offset`` elements behind one."""
        start = GUARD + offset * values.itemsize
        stop = start + values.numel() * values.itemsize
        raw = torch.full((stop + GUARD,), BYTE, dtype=torch.uint8)
        assert raw.data_ptr() % 16 == 0
        self.raw.append((raw, start, stop))
        held = raw[start:stop].view(values.dtype).view(values.shape)
        return held.copy_(values)

    def harmed(self):
        """How many guard bytes were written to."""
        outside = [torch.cat([raw[:start], raw[stop:]]) for raw, start, stop in self.raw]
        return sum(int((x != BYTE).sum()) for x in outside)


def inputs(program, sizes=SIZES):
    """Random tensors for each buffer of the program, one per size."""
    return {
        name: [
            (torch.randn(n) if name in ("param", "grad") else torch.rand(n) + 0.01).to(b.dtype)
            if b.kind == "F"
            else torch.rand(()).to(b.dtype)
            for n in sizes
        ]
        for name, b in program.buffers
    }


def scalars(program, sets=3):
    return np.random.default_rng(3).uniform(0.05, 0.95, (sets, program.slots))


def interpreted(program, given, sets, slots):
    """What the program means, tensor by tensor."""
    out = {name: [t.clone() for t in tensors] for name, tensors in given.items()}
    for k, scalar_set in enumerate(sets):
        at = {name: tensors[k] for name, tensors in given.items()}
        for name, value in interpret(program, at, slots[scalar_set]).items():
            out[name][k] = value
    return out


def emulated(library, name, program, given, sets, slots, offset=0, **how):
    """What the kernel makes of copies in guarded memory; ``offset`` misaligns the gradients by so many elements."""
    memory = Memory()
    held = {
        buffer: [memory.hold(t, offset if buffer == "grad" else 0) for t in tensors]
        for buffer, tensors in given.items()
    }
    partials = cuda_kernels.run(library, name, program, held, sets, slots, **how)
    assert memory.harmed() == 0
    return held, partials


def assert_same(found, expected):
    for name, tensors in expected.items():
        for ours, other in zip(found[name], tensors, strict=True):
            assert_same_bits(ours, other)


@pytest.fixture(scope="session")
def library():
    return cuda_kernels.named()


# ---------------------------------------------------------------- rendering


def test_the_example_in_the_kernels_folder_is_adam():
    """After a change that is meant: `PYTHONPATH=tests python tests/backends/sass.py`, and read the difference."""
    assert cuda_kernels.EXAMPLE.read_text(encoding="utf-8") == rendered(golden.EXAMPLE_OF)[0].body


@pytest.mark.parametrize("case", [c for c in CASES if not c.endswith("float16") or "bfloat16" in c])
def test_elements_and_scalars_are_computed_by_the_lines_of_the_cpp_kernel(case):
    for program, body in rendered(case):
        lines = [
            re.findall(r"^ +(?:const T|const bool|store).*;", text, flags=re.M)
            for text in (body, cpp.render(program))
        ]
        values = [[line.strip() for line in found] for found in lines]
        assert values[0] == values[1] and len(values[0]) > 3
        assert len(stages(program)) == body.count("::walk(begin, end, element, ")


def test_rendering_knows_no_hyperparameter_and_is_a_pure_function():
    program, body = rendered("torch_Adam_float32")[0]
    assert cuda.render(program) == cuda.render(program)
    assert "0.9" not in body and "0.01" not in body


def test_source_wants_one_place_for_the_body():
    assert cuda.source(f"before\n{cuda.SLOT}\nafter", "body") == "before\nbody\nafter"
    with pytest.raises(ValueError, match="once"):
        cuda.source("nowhere", "body")
    assert cuda.source(skeleton("cuda.cu"), "").count("#include") == 0


# ---------------------------------------------------------------- every named optimizer


@pytest.mark.parametrize("case", CASES)
def test_every_optimizer_computes_what_the_interpreter_does(library, case):
    """Seven tensors in three scalar sets, with tails of all kinds; once more with every gradient misaligned."""
    for k, (program, _) in enumerate(rendered(case)):
        given, slots = inputs(program), scalars(program)
        expected = interpreted(program, given, SETS, slots)
        changed = [name for name, _ in program.stores]
        assert all(t.isfinite().float().mean() > 0.9 for name in changed for t in expected[name] if t.numel())
        name = f"{case}_{k}"
        aligned, partials = emulated(library, name, program, given, SETS, slots)
        assert_same(aligned, expected)
        moved, others = emulated(library, name, program, given, SETS, slots, offset=1)
        assert_same(moved, expected)
        assert np.array_equal(partials, others), "a sum depends on alignment"


@pytest.mark.parametrize("case", ["fastai_Adam_float32", "fastai_Lamb_bfloat16", "fastai_Larc_float16"])
def test_blocks_of_several_threads_compute_the_same(library, case):
    program = rendered(case)[-1].program
    given, slots = inputs(program), scalars(program)
    expected, name = interpreted(program, given, SETS, slots), f"{case}_{len(rendered(case)) - 1}"
    for threads in (2, 16):
        found = []
        for blocks, offset in ((1, 0), (3, 0), (20, 1)):
            how = dict(offset=offset, blocks=blocks, threads=threads)
            results, partials = emulated(library, name, program, given, SETS, slots, **how)
            assert_same(results, expected)
            found.append(partials)
        assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


@pytest.mark.parametrize("case", ["torch_AdamW_float32", "fastai_Lamb_bfloat16", "fastai_ranger_float16"])
def test_the_cpp_backend_computes_the_same(library, case):
    for k, (program, _) in enumerate(rendered(case)):
        given, slots = inputs(program), scalars(program)
        compiled = {name: [t.clone() for t in tensors] for name, tensors in given.items()}
        cpu = backends.get("cpp")
        cpu.prepare(cpu.compile(program, case, []), compiled, SIZES, SETS).run(slots)
        assert_same(emulated(library, f"{case}_{k}", program, given, SETS, slots)[0], compiled)


# ---------------------------------------------------------------- the skeleton


def kernel(program, mutate=lambda text: text):
    return cuda_kernels.emulation(mutate(cuda_kernels.together({"k": cuda.render(program)})))


def replaced(old, new):
    def mutate(text):
        assert text.count(old) == 1, old
        return text.replace(old, new)

    return mutate


def test_the_comparison_notices_a_write_past_the_end_and_a_group_left_out():
    program, _ = rendered("fastai_SGD_float32")[-1]
    given, slots = inputs(program), scalars(program)
    expected = interpreted(program, given, SETS, slots)
    past = kernel(program, replaced("if (i + k < end) with_pointers", "with_pointers"))
    with pytest.raises(AssertionError, match="harmed"):
        emulated(past, "k", program, given, SETS, slots)
    longer = replaced("begin + int64_t(g) * width < end;", "begin + (int64_t(g) + 1) * width < end;")
    short = kernel(program, longer)
    with pytest.raises(AssertionError, match="index, ours, expected"):
        assert_same(emulated(short, "k", program, given, SETS, slots)[0], expected)


OPS_INPUTS = ("param", "grad", "state.third")
LIBRARY = ("pow", "atan2", "exp", "expm1", "log", "log1p", "log2", "sin", "cos", "tanh", "atan", "erf")


@functools.cache
def all_ops(dtype):
    """A program with every elementwise op, each in its own state buffer."""
    graph = Graph()
    numbers = [graph.leaf("load", name, kind="F") for name in OPS_INPUTS]
    masks = [graph.op("gt", numbers[0], numbers[1]), graph.op("ge", numbers[1], numbers[2])]
    buffers, stores = {name: Buffer(dtype, "F") for name in OPS_INPUTS}, {}
    for op in OPS.values():
        if isinstance(op, Op):
            pools = {"f": iter(numbers), "b": iter(masks)}
            result = graph.op(op.name, *[next(pools[t]) for t in op.types[: op.arity]])
            stores[f"state.{op.name}"] = graph.op("as_float", result) if op.result == "b" else result
            buffers[f"state.{op.name}"] = Buffer(dtype, "F")
    program = Program(dtype, tuple(buffers.items()), tuple(graph.values), tuple(stores.items()), 0)
    verify(program)
    return program


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_op_keeps_torchs_rules_on_special_values(dtype):
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -1.5, 1e-40, 3e38]
    x, y = (t.flatten() for t in torch.meshgrid(*[torch.tensor(special, dtype=dtype)] * 2, indexing="ij"))
    program = all_ops(dtype)
    given = {name: [torch.zeros_like(x)] for name, _ in program.buffers}
    given |= {"param": [x], "grad": [y], "state.third": [x.flip(0)]}
    found, _ = emulated(kernel(program), "k", program, given, [0], np.zeros((1, 0)))
    expected = interpreted(program, given, [0], np.zeros((1, 0)))
    noise = (y >= 1) & (y < 2)
    meant = {"add_bits": y.abs() < 2**31, "bfloat16_at_random": noise, "float16_at_random": noise}
    for name in expected:
        if (among := meant.get(name.removeprefix("state."))) is not None:
            assert_same_bits(found[name][0][among], expected[name][0][among])
        elif name.removeprefix("state.") not in LIBRARY:
            assert_same_bits(found[name][0], expected[name][0])
        else:
            torch.testing.assert_close(found[name][0], expected[name][0], equal_nan=True)


def test_a_row_is_all_that_a_new_op_needs():
    with new_rows() as (program, given, expected):
        given = {name: [t] for name, t in given.items()}
        found, _ = emulated(kernel(program), "k", program, given, [0], np.zeros((1, 0)), threads=4)
        torch.testing.assert_close(found["param"][0], expected)


@pytest.mark.parametrize("skip", [None, 0.0, 1.0])
def test_a_number_that_only_earlier_stages_read_is_stored_by_the_last_one(skip):
    graph = Graph()
    param, grad = (graph.leaf("load", name, kind="F") for name in ("param", "grad"))
    highest = graph.op("amax", graph.op("add", grad, graph.leaf("load", "state.seen", kind="S")))
    stores = ("param", graph.op("sub", param, highest)), ("state.seen", highest)
    buffers = [("param", Buffer(torch.float32, "F")), ("grad", Buffer(torch.float32, "F"))]
    buffers += [("state.seen", Buffer(torch.bfloat16, "S"))]
    skips = None if skip is None else graph.op("ne", graph.leaf("const", skip), graph.leaf("const", 0.0))
    program = Program(torch.float32, tuple(buffers), tuple(graph.values), stores, 0, skips)
    verify(program)
    assert not scalar_stores(program).stores
    given, none = inputs(program), np.zeros((3, 0))
    library, expected = kernel(program), interpreted(program, given, SETS, none)
    for how in (dict(), dict(offset=1), dict(offset=3, threads=4, blocks=2)):
        assert_same(emulated(library, "k", program, given, SETS, none, **how)[0], expected)


@pytest.mark.parametrize("compute", [torch.float32, torch.float64], ids=str)
def test_buffers_of_all_dtypes_side_by_side(compute):
    """A group is 16 bytes of the narrowest dtype, so several packs of the others; two numbers per tensor are stored."""
    graph = Graph()
    buffers = {"param": torch.bfloat16, "grad": torch.float16, "state.a": torch.float32, "state.b": compute}
    loads = [graph.leaf("load", name, kind="F") for name in buffers]
    out = graph.op("add", graph.op("mul", loads[0], loads[1]), graph.op("sub", loads[2], loads[3]))
    top, mean = graph.op("amax", out), graph.op("mean", out)
    old = graph.leaf("load", "state.seen", kind="S")
    stores = {name: graph.op("sub", out, top) for name in buffers}
    stores |= {"state.seen": graph.op("maximum", old, mean), "state.count": graph.leaf("numel")}
    typed = {name: Buffer(dtype, "F") for name, dtype in buffers.items()}
    typed |= {name: Buffer(compute, "S") for name in ("state.seen", "state.count")}
    program = Program(compute, tuple(typed.items()), tuple(graph.values), tuple(stores.items()), 0)
    verify(program)
    given, none = inputs(program), np.zeros((3, 0))
    library, expected = kernel(program), interpreted(program, given, SETS, none)
    for how in (dict(), dict(offset=1), dict(offset=3, threads=4, blocks=2)):
        found, _ = emulated(library, "k", program, given, SETS, none, **how)
        means = (found.pop("state.seen"), expected["state.seen"])
        assert_same(found, {name: tensors for name, tensors in expected.items() if name != "state.seen"})
        torch.testing.assert_close(*means, rtol=4 * torch.finfo(compute).eps, atol=0)


def test_reductions_are_those_of_float64_and_pass_on_nan():
    graph = Graph()
    x = graph.leaf("load", "param", kind="F")
    names = ("sum", "mean", "amax", "amin")
    stores = {f"state.{name}": graph.op(name, x) for name in names}
    buffers = {"param": Buffer(torch.float32, "F")} | {name: Buffer(torch.float64, "S") for name in stores}
    program = Program(torch.float32, tuple(buffers.items()), tuple(graph.values), tuple(stores.items()), 0)
    verify(program)
    library, sizes = kernel(program), (1, 7, 1000, 3 * 65536 + 5)
    for where, number in ((None, 0.0), (0, math.nan), (-1, math.nan)):
        given = {name: [torch.zeros((), dtype=torch.float64) for _ in sizes] for name in stores}
        given["param"] = [torch.randn(n) for n in sizes]
        for t in given["param"]:
            if where is not None:
                t[where] = number
        for how in (dict(), dict(threads=8, blocks=2)):
            found, _ = emulated(library, "k", program, given, [0] * 4, np.zeros((1, 0)), **how)
            for name in names:
                truth = [OPS[name].torch(t.double()).float().double() for t in given["param"]]
                torch.testing.assert_close(
                    found[f"state.{name}"], truth, rtol=2e-7, atol=1e-9, equal_nan=True
                )
                assert where is None or all(t.isnan() for t in found[f"state.{name}"])


def test_a_chunk_may_start_anywhere_and_the_rest_is_left_alone(library):
    """Chunks that start where no pack does are walked element by element; what no chunk covers stays."""
    program = rendered("fastai_SGD_float32")[0].program
    given, slots = inputs(program, (300,)), scalars(program, 1)
    expected = interpreted(program, given, [0], slots)["param"][0]
    chunks = np.array([[0, 1, 100], [0, 100, 164], [0, 171, 300]], np.int64)
    layout = plan.Layout(chunks, np.array([0]), np.array([3]))
    for threads in (1, 8):
        found, _ = emulated(
            library, "fastai_SGD_float32_0", program, given, [0], slots, chunks=layout, threads=threads
        )
        for begin, end, source in (
            (0, 1, given["param"][0]),
            (1, 164, expected),
            (164, 171, given["param"][0]),
        ):
            assert_same_bits(found["param"][0][begin:end], source[begin:end])
        assert_same_bits(found["param"][0][171:], expected[171:])
