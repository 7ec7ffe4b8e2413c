"""Random numbers: the generator, its statistics, and the same bits in every language, whatever is launched how."""

import math

import cuda_kernels
import numpy as np
import pytest
import sass
import torch
from helpers import assert_same_bits, needs_extension
from random_programs import PLACES, SHAPES, drawing, interpreted, launched
from test_cuda_launch import DEFAULTS, built  # noqa: F401
from test_nvrtc import REGISTERS, needs_cuobjdump, needs_nvrtc

from fusedopt import backends
from fusedopt.backends import chunking
from fusedopt.backends.cuda import backend as cuda
from fusedopt.backends.cuda import nvrtc
from fusedopt.backends.cuda import render as renderer
from fusedopt.compile import cache
from fusedopt.ir import random
from fusedopt.ir.ops import DRAWS
from fusedopt.ir.program import Graph, Program, ProgramError, verify
from fusedopt.kernels import source as skeleton

# ---------------------------------------------------------------- the generator

KNOWN = [
    ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
"""Of the authors' own implementation: counter, key, words."""


def words(text):
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_generator_is_philox(counter, key, expected):
    assert random.philox(words(counter), words(key)) == words(expected)


def number(x):
    return torch.tensor(float(x), dtype=torch.float64)


def drawn(name, count, seed=0, step=0, stream=0, place=0):
    found = DRAWS[name].torch(count, number(seed), number(step), stream, place)
    return found - 1 if name == "noise" else found


def test_what_becomes_of_words():
    """Of which words a number is made, so that no later version can change the numbers unseen."""
    place, seed, step, stream = random.place(2, 5), -(2**40) - 7, 2**32 + 9, 3
    for normal, name in enumerate(("uniform", "normal")):
        found = drawn(name, 11, seed, step, stream, place).tolist()
        for block in range(2):
            counter = block, stream << 8 | 2 << 16 | normal << 31, 9, 5
            key = seed % 2**64 % 2**32, seed % 2**64 >> 32
            made = [int(w) for w in random.philox(*(tuple(map(torch.tensor, x)) for x in (counter, key)))]
            if not normal:
                assert found[4 * block : 4 * block + 4] == [w // 2**8 / 2**24 for w in made]
                continue
            for k in (0, 2):
                r = math.sqrt(-2 * math.log((made[k] // 2 + 0.5) / 2**31))
                angle = math.tau * (made[k + 1] // 2**6 + 0.5) / 2**26 - math.pi / 4
                pair = [r * math.cos(angle), r * math.sin(angle)]
                np.testing.assert_allclose(found[4 * block + k : 4 * block + k + 2], pair, rtol=0, atol=3e-6)


def test_a_tensor_of_more_elements_than_a_word_counts_does_not_repeat_itself():
    seed = torch.tensor(0)
    near, far = (
        random.philox(
            (torch.tensor(block & random.WORD), torch.tensor(block >> 32 & 0xFF), seed, seed), (seed, seed)
        )
        for block in (5, 2**32 + 5)
    )
    assert near != far


def test_the_functions_that_normal_numbers_are_made_with_are_accurate():
    word = torch.cat([torch.arange(1 << 16), 2**32 - 1 - torch.arange(1 << 16)])
    word = torch.cat([word, torch.arange(0, 1 << 32, 12_345)])
    u = ((word >> 1).float() + 0.5) * 2.0**-31
    assert u.min() == 2.0**-32 and u.max() == 1
    exact = torch.sqrt(-2 * torch.log(u.double()))
    error = (random.radius(word).double() - exact).abs()
    assert (error <= 2e-7 * exact).all()
    angle = (((word & 0x3FFFFFFF) >> 6).double() + 0.5) * 2.0**-24 - 0.5 + (word >> 30).double()
    for odd, function in enumerate((torch.cos, torch.sin)):
        assert (random.cosine(word, odd).double() - function(angle * math.pi / 2)).abs().max() < 1.5e-7


@pytest.mark.parametrize(
    ("seed", "same"),
    [(0.0, -0.0), (3.0, 3.9), (-3.0, -3.9), (math.nan, -1e300), (math.inf, 2.0**62), (-math.inf, -(2.0**62))],
)
def test_seeds_are_whole_numbers_and_any_other_becomes_one(seed, same):
    assert_same_bits(drawn("uniform", 5, seed), drawn("uniform", 5, same))


# ---------------------------------------------------------------- statistics
#
# Seeds are fixed, so nothing here can fail by chance; the rates say how rarely a good generator would.

COUNT = 1 << 19
RATE = 1e-4
KOLMOGOROV = math.sqrt(-math.log(RATE / 2) / 2)
"""√n times the largest distance of distributions is larger with a probability of RATE."""
NORMAL = 3.891
"""So is a standard normal number's size than this."""


def cdf(name, x):
    return x if name != "normal" else 0.5 * (1 + torch.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("seed", [0, 1, 2**40, -5])
@pytest.mark.parametrize("name", DRAWS)
def test_distributions_are_what_they_are_called(name, seed):
    x = drawn(name, COUNT, seed, step=seed % 7).double()
    at = cdf(name, x.sort().values)
    rank = torch.arange(COUNT + 1, dtype=torch.float64) / COUNT
    distance = torch.maximum((rank[1:] - at).max(), (at - rank[:-1]).max())
    assert distance * math.sqrt(COUNT) < KOLMOGOROV
    mean, variance, fourth = (0.5, 1 / 12, 1 / 80) if name != "normal" else (0, 1, 3)
    less = x - mean
    assert abs(less.mean()) < NORMAL * math.sqrt(variance / COUNT)
    assert abs((less**2).mean() - variance) < NORMAL * math.sqrt((fourth - variance**2) / COUNT)
    if name != "normal":
        assert x.min() >= 0 and x.max() < 1 and (x * 2**24 == (x * 2**24).floor()).all()
    else:
        tail = (x.abs() > 3.5).double().mean().item()
        expected = 2 * (1 - cdf(name, torch.tensor(3.5, dtype=torch.float64)).item())
        assert abs(tail - expected) < NORMAL * math.sqrt(expected / COUNT)


WAYS = {
    "seed": {"seed": 1},
    "seed's upper half": {"seed": 2**32},
    "step": {"step": 1},
    "stream": {"stream": 1},
    "parameter": {"place": random.place(0, 1)},
    "group": {"place": random.place(1, 0)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DRAWS)
def test_numbers_for_one_thing_say_nothing_of_those_for_another(name, way):
    """Correlations of numbers and of their squares, also of neighbours: up to three elements apart."""
    one, other = drawn(name, COUNT).double(), drawn(name, COUNT, **WAYS[way]).double()
    assert not torch.equal(one, other)
    for f in (lambda x: x, torch.square):
        a, b = (f(x - (name != "normal") / 2) for x in (one, other))
        a, b = ((x - x.mean()) / x.std() for x in (a, b))
        for apart in range(-3, 4):
            assert abs((a * b.roll(apart)).mean()) < NORMAL / math.sqrt(COUNT), apart


@pytest.mark.parametrize("name", DRAWS)
def test_neighbours_are_independent(name):
    x = drawn(name, COUNT).double()
    x = (x - x.mean()) / x.std()
    for apart in (1, 2, 3, 4, 5, 8, 16, 1024):
        assert abs((x * x.roll(apart)).mean()) < NORMAL / math.sqrt(COUNT), apart


def test_uniform_and_normal_numbers_of_the_same_arguments_are_independent():
    a, b = drawn("uniform", COUNT).double() - 0.5, drawn("normal", COUNT).double()
    for apart in range(-3, 4):
        for f in (lambda x: x, torch.square):
            x, y = ((f(t) - f(t).mean()) / f(t).std() for t in (a, b.roll(apart)))
            assert abs((x * y).mean()) < NORMAL / math.sqrt(COUNT)


# ---------------------------------------------------------------- the same bits

DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float64)]


def assert_same(found, expected):
    for row, wanted in zip(found, expected, strict=True):
        for name in wanted:
            assert_same_bits(row[name], wanted[name])


@pytest.mark.parametrize("axes", SHAPES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_cpp_has_the_interpreters_bits(dtypes, axes):
    program = drawing(*dtypes, axes=axes)
    assert_same(launched(program, SHAPES[axes]), interpreted(program, SHAPES[axes]))


def test_numbers_are_the_same_in_all_compute_types():
    narrow, wide = (launched(drawing(dtype), SHAPES[1]) for dtype in (torch.float32, torch.float64))
    for a, b in zip(narrow, wide, strict=True):
        assert_same_bits(a["state.uniform"].double(), b["state.uniform"])
        assert_same_bits(a["state.normal"].double(), b["state.normal"])


@pytest.mark.parametrize("axes", SHAPES)
def test_threads_and_chunks_make_no_difference(axes, monkeypatch):
    program = drawing(axes=axes)
    expected = launched(program, SHAPES[axes])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same(launched(program, SHAPES[axes]), expected)
    for made in (chunking.layout, chunking.blocks):
        made.cache_clear()
    monkeypatch.setattr(chunking, "CHUNK", 64)
    monkeypatch.setattr(chunking, "SHARED", 1)
    try:
        assert_same(launched(program, SHAPES[axes]), expected)
    finally:
        for made in (chunking.layout, chunking.blocks):
            made.cache_clear()


def test_where_a_tensor_lies_in_memory_makes_no_difference():
    program = drawing()
    assert_same(launched(program, SHAPES[1], offset=1), launched(program, SHAPES[1]))


def test_which_other_rows_there_are_makes_no_difference():
    program = drawing()
    assert_same(launched(program, SHAPES[1][2:], places=PLACES[2:]), launched(program, SHAPES[1])[2:])


def test_the_comparison_can_fail():
    program, other = drawing(), [random.place(0, 9)] * 4
    with pytest.raises(AssertionError, match="index, ours, expected"):
        assert_same(launched(program, SHAPES[1], places=other), interpreted(program, SHAPES[1]))


# ---------------------------------------------------------------- CUDA C++, on the CPU

CUDA = {
    f"{axes} axes, {dtypes[1]}": (drawing(*dtypes, axes=axes), axes) for axes in SHAPES for dtypes in DTYPES
}
CUDA_SHAPES = SHAPES | {1: [(1,), (7,), (1029,), (9001,)]}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """What stands for cubins: a library with the kernels of all programs."""
    folder = tmp_path_factory.mktemp("images")
    names = ["seed", "step", "later"]
    bodies = {f"p{k}": renderer.render(p, names, "drawing") for k, (p, _) in enumerate(CUDA.values())}
    library = cuda_kernels.emulation(cuda_kernels.together(bodies))
    made = {}
    for name, body in bodies.items():
        made[body] = folder / f"{name}.image"
        made[body].write_text(f"{library._name} {name}_")
    return made


@pytest.fixture
def fake(built, images, monkeypatch):  # noqa: F811
    """A stand-in for the driver behind a `cuda` backend for tensors on the CPU."""
    for name, value in DEFAULTS.items():
        setattr(built.fake, name, value)
    built.fake.fail("", 0)
    built.fake.clear()
    backend = cuda.Cuda(built.fake.path)
    backend.device = "cpu"
    monkeypatch.setitem(backends.made, "cuda", backend)
    before, after = skeleton("cuda.cu").split(renderer.SLOT)

    def compiled(name, source, arch, key_parts):
        body = source.removeprefix(cuda.SMALL_ONLY).removeprefix(before).removesuffix(after)
        return cache.Entry(images[body], images[body], True, 0.0, "", "")

    monkeypatch.setattr(nvrtc, "compile_cubin", compiled)
    monkeypatch.setattr(nvrtc, "nvrtc", lambda: nvrtc.Nvrtc("13.5", ("sm_90",), None))
    return built.fake


@needs_extension
@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("name", CUDA)
def test_cuda_has_the_interpreters_bits(fake, monkeypatch, name, threads):
    for constant in ("THREADS", "TEAMS"):
        monkeypatch.setattr(cuda, constant, threads)
    program, axes = CUDA[name]
    assert_same(launched(program, CUDA_SHAPES[axes], "cuda"), interpreted(program, CUDA_SHAPES[axes]))


@needs_extension
def test_cuda_has_them_where_memory_is_not_aligned(fake, monkeypatch):
    monkeypatch.setattr(cuda, "THREADS", 4)
    program, _ = CUDA["1 axes, torch.float32"]
    assert_same(launched(program, CUDA_SHAPES[1], "cuda", offset=1), interpreted(program, CUDA_SHAPES[1]))


@needs_nvrtc
@needs_cuobjdump
def test_nvrtc_makes_them_in_registers():
    bodies = {f"p{k}": renderer.render(p, [], "drawing") for k, (p, _) in enumerate(CUDA.values())}
    source = cuda.SMALL_ONLY + cuda_kernels.together(bodies)
    for name, f in sass.functions(nvrtc.compile_cubin("drawing", source, "sm_90").path).items():
        assert f.registers <= REGISTERS and (f.stack, f.local) == (0, 0), name


# ---------------------------------------------------------------- the grammar


def program_of(graph):
    return Program(torch.float32, (), tuple(graph.values), (), 2)


@pytest.mark.parametrize("stream", [-1, 256, 1.0, None, "0"])
def test_a_stream_is_a_small_whole_number(stream):
    g = Graph()
    g.op("uniform", g.leaf("slot", 0, type="d"), g.leaf("slot", 1, type="d"), to=stream)
    with pytest.raises(ProgramError, match="stream"):
        verify(program_of(g))


def test_seed_and_step_are_numbers_of_the_tensor():
    g = Graph()
    slot = g.leaf("slot", 0, type="d")
    g.op("normal", slot, g.op("expand", g.leaf("slot", 1)), to=0)
    with pytest.raises(ProgramError, match="normal of"):
        verify(program_of(g))


def test_programs_without_random_numbers_have_nothing_for_them():
    from test_cuda import all_ops

    program = all_ops(torch.float32)
    assert not program.draws and "philox" not in renderer.render(program)
    assert "philox" in renderer.render(drawing())
