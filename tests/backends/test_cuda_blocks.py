"""CUDA kernels of programs with several axes: run as C++ on the CPU, against the interpreter.

A stand-in for the driver runs them, with blocks of 1, 8 or 64 threads: teams of one thread, of a warp, of a block. It
runs one block after another, so of what blocks must not do to each other nothing is seen here.
"""

import functools

import cuda_kernels
import numpy as np
import pytest
import sass
import test_blocks
import torch
from helpers import needs_extension
from test_blocks import LINES, PROGRAMS, build, compared, tensors
from test_cuda_launch import DEFAULTS, built  # noqa: F401
from test_nvrtc import REGISTERS, needs_cuobjdump, needs_nvrtc

import fusedopt
from fusedopt import backends
from fusedopt.backends import chunking
from fusedopt.backends.base import HEAD
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
OURS = [
    *test_blocks.OURS,
    "team",
    "place",
    "places",
    "start",
    "member",
    "before",
    "stop",
    "held",
    "part",
    "sums2",
]
ALL = PROGRAMS | MORE
CALLED = {f"state called {name}": (test_blocks.named(name), 2) for name in OURS}
SMALL = {
    LINES: [(1,), (63,), (64,), (65,), (1000,), (0,)],
    2: [(1, 1), (3, 5), (64, 33), (1, 1100), (90, 1), (5, 1025), (401, 3), (0, 4), (2, 0), (17, 16)],
    3: [(1, 1, 1), (2, 3, 5), (300, 3, 3), (2, 40, 35), (5, 1, 7), (3, 2, 1030), (0, 2, 2)],
    4: [(2, 3, 4, 5), (7, 5, 3, 3), (3, 3, 7, 7), (2, 2, 30, 40), (1, 300, 1, 2)],
}
"""For blocks of several threads, which are slow here: a line for one thread, a warp, and a block."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """What stands for cubins: a library with the kernels of all programs."""
    folder = tmp_path_factory.mktemp("images")
    bodies = {
        f"p{k}": renderer.render(p, ["s"], "blocks") for k, (p, _) in enumerate((ALL | CALLED).values())
    }
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
        if body not in images:
            library = cuda_kernels.emulation(cuda_kernels.together({"k": body}))
            images[body] = built.folder / f"{abs(hash(body))}.image"
            images[body].write_text(f"{library._name} k_")
        return cache.Entry(images[body], images[body], True, 0.0, "", "")

    monkeypatch.setattr(nvrtc, "compile_cubin", compiled)
    monkeypatch.setattr(nvrtc, "nvrtc", lambda: nvrtc.Nvrtc("13.5", ("sm_90",), None))
    return built.fake


@pytest.mark.parametrize("name", ALL | CALLED)
def test_kernels_do_what_the_program_says(fake, name):
    program, axes = (ALL | CALLED)[name]
    compared(program, test_blocks.SHAPES[axes], "cuda")


@pytest.fixture
def small_chunks(monkeypatch):
    """Tensors of some thousand elements have many chunks, several of them for one place."""
    for name, value in dict(CHUNK=256, SHARED=4, LINES=64).items():
        monkeypatch.setattr(chunking, name, value)
    monkeypatch.setattr(cuda, "SLICE", 16)
    chunking.blocks.cache_clear()
    yield
    chunking.blocks.cache_clear()


@pytest.mark.parametrize("threads", [8, 64])
@pytest.mark.parametrize("name", ALL)
def test_blocks_of_several_threads_do_the_same(fake, name, threads):
    program, axes = ALL[name]
    fake.threads = threads
    compared(program, SMALL[axes], "cuda")


@pytest.mark.parametrize("threads", [1, 64])
@pytest.mark.parametrize("name", ALL)
def test_many_chunks_are_joined(fake, small_chunks, name, threads):
    program, axes = ALL[name]
    fake.threads = threads
    compared(program, SMALL[axes], "cuda")


@pytest.mark.parametrize("name", ALL)
def test_results_do_not_depend_on_how_many_blocks_there_are(fake, small_chunks, name):
    program, axes = ALL[name]
    found = []
    fake.threads = 8
    for blocks in (1, 3, 100):
        fake.blocks = blocks
        backends.made["cuda"]._kernels.clear()
        rows = [tensors(program, shape, seed) for seed, shape in enumerate(SMALL[axes])]
        test_blocks.run(program, rows, SMALL[axes], "cuda")
        found.append(rows)
    for row, *others in zip(*found, strict=True):
        for n, t in row.items():
            assert all(torch.equal(t.nan_to_num(7), other[n].nan_to_num(7)) for other in others)


MUTATIONS = {
    "half a team is not joined": ("for (unsigned n = size / 2; n > 0; n /= 2) {", "n > 0", "n > 1"),
    "the last chunk is not joined": ("(first + inside - 1) / length + 1, [&]", "+ 1, [&]", ", [&]"),
    "a place begins too late": ("return x < 0 ? 0 : x < last", "x < 0 ? 0", "x < 1 ? 1"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_comparison_notices(fake, images, small_chunks, name, tmp_path, monkeypatch):
    line, old, new = MUTATIONS[name]
    program, axes = PROGRAMS["factored matrix"]
    body = renderer.render(program, ["s"], "blocks")
    source = cuda_kernels.together({"wrong": body})
    assert source.count(line) == 1
    library = cuda_kernels.emulation(source.replace(line, line.replace(old, new)))
    (tmp_path / "wrong.image").write_text(f"{library._name} wrong_")
    monkeypatch.setitem(images, body, tmp_path / "wrong.image")
    fake.threads = 64
    with pytest.raises(AssertionError, match=r"state\.row|state\.col|param"):
        compared(program, SMALL[axes], "cuda")


def rows_of(program, shapes):
    return [tensors(program, shape, seed) for seed, shape in enumerate(shapes)]


def test_between_stages_blocks_share_a_tensor_where_places_along_its_first_axis_do_not_meet(
    fake, small_chunks
):
    fake.blocks = 1000
    program, shapes = PROGRAMS["factored batch"][0], [(20, 3, 5), (2, 4, 3), (0, 4, 4)]
    test_blocks.run(program, rows_of(program, shapes), shapes, "cuda")
    shares = 4 + 1  # of 60 and 8 lines, for each 16 of which there is a block here
    assert [launch[:2] for launch in fake.launches if "before" in launch[0]] == [
        ("fusedopt_before_1", shares),
        ("fusedopt_before_3", shares),
    ]


def test_a_step_is_launched_in_order_over_chunks_and_tensors(fake):
    """Before a stage and after all of them a block per tensor, a stage with a block per chunk or piece of one."""
    fake.blocks = 1000
    program, shapes = PROGRAMS["factored matrix"][0], [(300, 700), (3, 5), (0, 4)]
    test_blocks.run(program, rows_of(program, shapes), shapes, "cuda")
    chunks, pieces = 19 + 1, 18 * 2 + 1 + 1  # of 16 lines, the last one of 12; those are cut into twelves
    assert [launch[:3] for launch in fake.launches] == [
        ("fusedopt_stage_0", chunks, cuda.TEAMS),
        ("fusedopt_join_1", 4, cuda.TEAMS),  # of a tensor's 13,300 parts of columns
        ("fusedopt_before_1", 3, cuda.TEAMS),
        ("fusedopt_stage_1", chunks, cuda.TEAMS),
        ("fusedopt_stage_2", pieces, cuda.TEAMS),
        ("fusedopt_scalars", 3, cuda.TEAMS),
    ]
    fake.clear()
    program = PROGRAMS["centred"][0]
    test_blocks.run(program, rows_of(program, [(0, 4), (2, 0)]), [(0, 4), (2, 0)], "cuda")
    assert fake.launches == []


def test_what_goes_by_value_and_what_by_table(fake):
    """Many tensors, with small kernels, big ones and tables; then scalars that stay on the device."""
    program = PROGRAMS["factored matrix"][0]
    for count, ending, kinds in (
        (cuda.SMALL - 1, "", (1, 1)),
        (cuda.SMALL, "_big", (1, 1)),
        (cuda.BIG, "", (1, 0)),
    ):
        fake.clear()
        compared(program, [(1, 2)] * count, "cuda")
        assert {launch[0] for launch in fake.launches} == {
            f"fusedopt_{k}{ending}" for k in ("stage_0", "before_1", "stage_1", "stage_2", "scalars")
        }
        assert {launch[4:] for launch in fake.launches} == {kinds}


def prepared(program, rows, shapes, **how):
    backend = backends.get("cuda")
    kernel = backend.compile(program, "blocks", ["s"])
    columns = {name: [row[name] for row in rows] for name, _ in program.buffers}
    sizes = [a * b for a, b in shapes]
    return backend.prepare(kernel, columns, sizes, [0] * len(sizes), shapes=shapes, **how)


def test_a_captured_step_reads_later_scalars_and_can_be_replayed(fake):
    """The launches of a graph: the same tables and results, with what was uploaded since."""
    program, shapes = PROGRAMS["by rows"][0], [(3, 5), (64, 33), (70_000, 3)]
    replayed, plain = rows_of(program, shapes), rows_of(program, shapes)
    launch = prepared(program, replayed, shapes, resident=True)
    launch.upload(np.array([[0.9]]))
    fake.capturing = 1
    launch.run(np.array([[0.9]]))
    fake.capturing = 0
    other = prepared(program, plain, shapes)
    for s in (0.9, 0.5, 0.5):
        launch.upload(np.array([[s]]))
        fake.library.fake_replay()
        other.run(np.array([[s]]))
    for a, b in zip(replayed, plain, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_gradients_may_be_elsewhere_in_every_step(fake):
    program, shapes = PROGRAMS["centred"][0], [(3, 5), (64, 33)]
    moved, plain = rows_of(program, shapes), rows_of(program, shapes)
    launch, other = prepared(program, moved, shapes), prepared(program, plain, shapes)
    place = HEAD + [name for name, _ in program.buffers].index("grad")
    kept = []
    for step in range(3):
        for k, row in enumerate(plain):
            row["grad"].mul_(step)
            kept.append(row["grad"].clone())
            launch.rows[k, place] = kept[-1].data_ptr()
        launch.run(np.array([[0.9]]))
        other.run(np.array([[0.9]]))
    assert all(torch.equal(a["param"], b["param"]) for a, b in zip(moved, plain, strict=True))


def centre(p, lr, **kwargs):
    less = p.grad.data - p.grad.data.mean(dim=-1, keepdim=True)
    p.data.sub_(lr * less / less.pow(2).sum(dim=0, keepdim=True).sqrt())


def stepped_as_by_cpp(make, shapes):
    """Three steps of an optimizer give the same on both backends."""
    found = []
    for on in ("cuda", "cpp"):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        opt = make(params, backend=on)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape)
            opt.step()
        assert {kernel.backend for kernel, _ in opt.engine.launched} == {on} and not opt.explain().eager
        found.append([p.detach() for p in params])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_optimizer_of_callbacks_computes_what_cpp_does(fake):
    fake.threads = 8
    make = functools.partial(fusedopt.Optimizer, cbs=centre, lr=0.1)
    stepped_as_by_cpp(make, [(3, 5), (64, 33), (40, 110)])
    assert {"fusedopt_stage_0", "fusedopt_before_1", "fusedopt_stage_1"} >= {
        launch[0] for launch in fake.launches
    }


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"amp_fused": True}], ids=str)
def test_factored_steps_of_many_matrices_are_those_of_cpp(fake, small_chunks, options):
    """Blocks share what is done between stages; counts are stored when all have read them."""
    fake.threads, fake.blocks = 8, 1000
    shapes = [(30, 4, 3), (7, 2, 3, 3)]
    stepped_as_by_cpp(functools.partial(fusedopt.rules.Adafactor, **options), shapes)
    assert max(launch[1] for launch in fake.launches if launch[0] == "fusedopt_before_1") > len(shapes)
    assert any(launch[0] == "fusedopt_scalars" for launch in fake.launches) == bool(options)


@pytest.mark.parametrize("storage", ["int8", "bf16+8", "bfloat16_sr", "float16_sr"])
def test_policies_of_storage_are_those_of_cpp(fake, storage):
    fake.threads = 64
    found = []
    for on in ("cuda", "cpp"):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(70, 61), (4096,), (5,)]]
        opt = fusedopt.optim.AdamW(params, lr=0.1, storage=storage, backend=on)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape)
            opt.step()
        assert {kernel.backend for kernel, _ in opt.engine.launched} == {on} and not opt.explain().eager
        found.append([*params, *(s["exp_avg_sq"] for s in opt.state_dict()["state"].values())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["AdamMini", "CAME"])
def test_rows_and_columns_beside_blocks_are_those_of_cpp(fake, rule):
    """The last axis is a block's, and one more tells blocks apart."""
    stepped_as_by_cpp(
        functools.partial(getattr(fusedopt.rules, rule), storage={"exp_avg": "int8"}),
        [(70, 64), (2, 16, 192)],
    )


# ---------------------------------------------------------------- NVRTC


@needs_nvrtc
@needs_cuobjdump
def test_nvrtc_compiles_all_of_them_without_spills():
    bodies = {f"p{k}": renderer.render(p, ["s"], "blocks") for k, (p, _) in enumerate(ALL.values())}
    source = cuda.SMALL_ONLY + cuda_kernels.together(bodies)
    found = sass.functions(nvrtc.compile_cubin("blocks", source, "sm_90").path)
    programs = [p for p, _ in ALL.values()]
    assert len(found) == sum(len(renderer.launches(p)) for p in programs)
    for name, f in found.items():
        assert f.registers <= REGISTERS and (f.stack, f.local) == (0, 0), name
        assert f.count(r"(RED|ATOM\w*)(\..*)?") == 0, name
        # What a kernel has written it also reads, so not through a cache that does not hear of it.
        assert f.count(r"LDG\..*CONSTANT.*") == 0 or "stage" in name, name
