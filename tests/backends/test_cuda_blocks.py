"""CUDA kernels of programs with several axes: run as C++ on the CPU, against the interpreter.

A stand-in for the driver runs them, with blocks of 1, 8 or 64 threads: teams of one thread, of a warp, of a block. It
runs one block after another, so of what blocks must not do to each other nothing is seen here.
"""

import cuda_kernels
import pytest
import test_blocks
from helpers import needs_extension
from test_blocks import PROGRAMS, build, compared
from test_cuda_launch import DEFAULTS, built  # noqa: F401

from fusedopt import backends
from fusedopt.backends.cuda import backend as cuda
from fusedopt.backends.cuda import nvrtc
from fusedopt.backends.cuda import render as renderer
from fusedopt.compile import cache
from fusedopt.kernels import source as skeleton

pytestmark = needs_extension


def columns_of_centred(g, x):
    """Sums of columns, and of what several lines have in common, of what needs sums along lines first."""
    less = g.op("sub", x["grad"], g.op("mean", x["grad"], to=g.axes[:-1]))
    norm = g.op("sqrt", g.op("sum", g.op("mul", less, less), to=g.axes[:-1]))
    scaled = g.op("div", less, g.op("add", norm, g.leaf("slot", 0)))
    stores = {f"m{a}": g.op("amax", scaled, to=a) for a in g.axes}
    return {
        "param": g.op("sub", x["param"], g.op("mul", scaled, g.op("mean", scaled, to=g.axes[-1]))),
        **stores,
    }


MORE = {
    "columns of centred": (
        build(2, columns_of_centred, param="F", grad="F", m0="0", m1="1"),
        2,
    ),
    "columns of centred, of three axes": (
        build(3, columns_of_centred, param="F", grad="F", m0="0", m1="1", m2="2"),
        3,
    ),
}
ALL = PROGRAMS | MORE
SMALL = {
    2: [(1, 1), (3, 5), (64, 33), (1, 1100), (90, 1), (5, 1025), (401, 3), (0, 4), (2, 0), (17, 16)],
    3: [(1, 1, 1), (2, 3, 5), (300, 3, 3), (2, 40, 35), (5, 1, 7), (3, 2, 1030), (0, 2, 2)],
    4: [(2, 3, 4, 5), (7, 5, 3, 3), (3, 3, 7, 7), (2, 2, 30, 40), (1, 300, 1, 2)],
}
"""For blocks of several threads, which are slow here: a line for one thread, a warp, and a block."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """What stands for cubins: a library with the kernels of all programs."""
    folder = tmp_path_factory.mktemp("images")
    bodies = {f"p{k}": renderer.render(p, ["s"], "blocks") for k, (p, _) in enumerate(ALL.values())}
    library = cuda_kernels.emulation(cuda_kernels.together(bodies))
    made = {}
    for name, body in bodies.items():
        made[body] = folder / f"{name}.image"
        made[body].write_text(f"{library._name} {name}_")
    return made


@pytest.fixture
def fake(built, images, monkeypatch):  # noqa: F811
    """The stand-in behind a `cuda` backend for tensors on the CPU."""
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


@pytest.mark.parametrize("name", ALL)
def test_kernels_do_what_the_program_says(fake, name):
    program, axes = ALL[name]
    compared(program, test_blocks.SHAPES[axes], "cuda")


@pytest.mark.parametrize("threads", [8, 64])
@pytest.mark.parametrize("name", ALL)
def test_blocks_of_several_threads_do_the_same(fake, name, threads):
    program, axes = ALL[name]
    fake.threads = threads
    compared(program, SMALL[axes], "cuda")
