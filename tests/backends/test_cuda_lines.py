"""Lines of a constant length, as 8-bit state has them: whole ones go through registers, against the interpreter.

A stand-in for the driver runs the kernels on the CPU, as in test_cuda_blocks.py. A line of 64 is for 8 threads: with
fewer in a block there are none who could have it, with 64 there are two warps that have four lines each.
"""

from dataclasses import replace

import cuda_kernels
import golden
import numpy as np
import pytest
import sass
import torch
from helpers import assert_same_bits, needs_extension
from test_blocks import F32, build, tensors
from test_blocks import run as run_rows
from test_cuda_blocks import fake  # noqa: F401
from test_cuda_launch import built  # noqa: F401
from test_nvrtc import REGISTERS, every_arch, needs_cuobjdump, needs_nvrtc

import fusedopt
from fusedopt.backends.cpp import backend as cpu
from fusedopt.backends.cuda import nvrtc
from fusedopt.backends.cuda import render as renderer
from fusedopt.ir.program import Buffer, interpret
from fusedopt.ir.stages import stages

pytestmark = needs_extension


def coded(g, x):
    """A moment as codes in units of what is largest in its line, and one that is at least as large as it was."""
    value = g.op("mul", x["code"], x["scale"])
    new = g.op("add", g.op("mul", value, g.leaf("slot", 0)), x["grad"])
    scale = g.op("div", g.op("absmax", new, to="0"), g.leaf("const", 127.0))
    largest = g.op("maximum", g.op("bitmax", g.op("mul", new, new), to="0"), x["with_line"])
    step = g.op("div", new, g.op("sqrt", largest))
    code = g.op("round", g.op("div", new, scale))
    return {"param": g.op("sub", x["param"], step), "code": code, "scale": scale, "with_line": largest}


def drawn(g, x):
    """Noise on what a line's range is made of; a second state is written and not read."""
    noise = g.op("normal", g.leaf("slot", 0, type="d"), g.leaf("const", 3.0, type="d"), to=1)
    noisy = g.op("add", x["grad"], noise)
    extent = g.op("sub", g.op("amax", noisy, to="0"), g.op("amin", noisy, to="0"))
    return {"param": g.op("add", g.op("mul", x["param"], extent), noise), "copy": noisy}


def unreduced(g, x):
    """Nothing is reduced. What is made of a line's number alone is stored after the stage."""
    new = g.op("mul", x["param"], x["scale"])
    return {"param": new, "scale": g.op("mul", x["scale"], g.leaf("slot", 0))}


def with_dtypes(program, **dtypes):
    """The program with some buffers of other dtypes."""
    kept = ((n, b, dtypes.get(n.removeprefix("state."), b.dtype)) for n, b in program.buffers)
    return replace(program, buffers=tuple((n, Buffer(dtype, b.kind)) for n, b, dtype in kept))


KINDS = dict(param="F", grad="F", code="F", scale="0", with_line="0")


def codes(length, **dtypes):
    return with_dtypes(build(2, coded, line_length=length, **KINDS), **({"code": torch.int8} | dtypes))


BF16, HELD = torch.bfloat16, 8
PROGRAMS = {f"codes in lines of {n}": codes(n) for n in (32, 64, 128, 256)} | {
    "codes of bfloat16": codes(64, param=BF16, grad=BF16),
    "codes of float64": codes(64, param=torch.float64),
    "codes in double": with_dtypes(build(2, coded, torch.float64, 128, **KINDS), code=torch.int8),
    "drawn": with_dtypes(build(2, drawn, line_length=64, param="F", grad="F", copy="F"), copy=torch.float16),
    "unreduced": build(2, unreduced, line_length=256, param="F", scale="0"),
}
OTHERS = {
    "a sum along lines": lambda g, x: {"param": g.op("mul", x["param"], g.op("sum", x["grad"], to="0"))},
    "a sum of all": lambda g, x: {"param": g.op("div", x["param"], g.op("sum", x["grad"]))},
}


def shapes(program):
    n = program.line
    return [(k,) for k in (1, n - 1, n, n + 1, 5 * n, 0, 4 * n, 33 * n + 7)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """What stands for cubins: a library with the kernels of all programs."""
    folder = tmp_path_factory.mktemp("images")
    bodies = {f"p{k}": renderer.render(p, ["s"], "blocks") for k, p in enumerate(PROGRAMS.values())}
    library = cuda_kernels.emulation(cuda_kernels.together(bodies))
    made = {}
    for name, body in bodies.items():
        made[body] = folder / f"{name}.image"
        made[body].write_text(f"{library._name} {name}_")
    return made


def behind(t, count):
    """A copy so many elements behind an aligned address."""
    room = torch.zeros(t.numel() + count, dtype=t.dtype)
    assert room.data_ptr() % 16 == 0
    return room[count:].view(t.shape).copy_(t)


def compared(program, sizes=None, **offsets):
    """The kernels have the interpreter's bits. offsets: elements that buffers are behind an aligned address."""
    sizes = sizes or shapes(program)
    rows = [tensors(program, size, seed) for seed, size in enumerate(sizes)]
    for row in rows:
        for name in row:
            row[name] = behind(row[name], offsets.get(name.removeprefix("state."), 0))
    wanted = [interpret(program, row, [0.9], size) for row, size in zip(rows, sizes, strict=True)]
    run_rows(program, rows, sizes, "cuda")
    for row, found in zip(rows, wanted, strict=True):
        for name, value in found.items():
            ours, expected = row[name], value.to(row[name].dtype).view(row[name].shape)
            whole = not ours.is_floating_point()
            assert_same_bits(ours.float() if whole else ours, expected.float() if whole else expected)


@pytest.mark.parametrize("threads", [1, 4, 8, 64])
@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels_have_the_bits_of_the_interpreter(fake, name, threads):  # noqa: F811
    fake.threads = threads
    compared(PROGRAMS[name])


@pytest.mark.parametrize(
    "offsets", [dict(grad=1), dict(param=2), dict(code=4), dict(code=8), dict(scale=1)], ids=str
)
@pytest.mark.parametrize("length", [64, 256])
def test_tensors_may_lie_anywhere(fake, length, offsets):  # noqa: F811
    fake.threads = 64
    compared(PROGRAMS[f"codes in lines of {length}"], **offsets)


def mutated(images, folder, monkeypatch, program, line, other):
    """From here on a program's kernels are made with another line in the skeleton."""
    body = renderer.render(program, ["s"], "blocks")
    source = cuda_kernels.together({"wrong": body})
    assert source.count(line) == 1
    library = cuda_kernels.emulation(source.replace(line, other))
    (folder / "wrong.image").write_text(f"{library._name} wrong_")
    monkeypatch.setitem(images, body, folder / "wrong.image")


MUTATIONS = {
    "half of the threads are not joined": (
        "for (unsigned n = size / 2; n > 0; n /= 2) x =",
        "n > 0",
        "n > 1",
    ),
    "an element is left out": ("for (int k = 0; k < held; ++k) element", "k < held", "k < held - 1"),
    "lines are left out": ("line += blockDim.x / Held::size", "blockDim.x", "2 * blockDim.x"),
    "threads store lines of others": (
        "(tile.flush(buffer, at, 0), ...)",
        "(buffer, at",
        "(buffer, at ^ held",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_comparison_notices(fake, images, name, tmp_path, monkeypatch):  # noqa: F811
    line, old, new = MUTATIONS[name]
    program = PROGRAMS["codes in lines of 64"]
    mutated(images, tmp_path, monkeypatch, program, line, line.replace(old, new))
    fake.threads = 64
    with pytest.raises(AssertionError, match="ours, expected"):
        compared(program)


def test_whole_lines_go_the_one_way_and_others_the_other(fake, images, tmp_path, monkeypatch):  # noqa: F811
    """Where what goes through memory is not done at all, aligned tensors of whole lines do not notice."""
    program = PROGRAMS["codes in lines of 64"]
    line = "for (int64_t line = first + whole + team.index; line * n < end; line += team.count)"
    mutated(images, tmp_path, monkeypatch, program, line, "for (int64_t line = first; line < 0;)")
    fake.threads = 64
    compared(program, [(64,), (64 * 8,), (64 * 33,)], code=8)
    with pytest.raises(AssertionError, match="ours, expected"):
        compared(program, [(65,)])
    with pytest.raises(AssertionError, match="ours, expected"):
        compared(program, [(64,)], code=4)
    fake.threads = 4
    with pytest.raises(AssertionError, match="ours, expected"):
        compared(program, [(64,)])


@pytest.mark.parametrize("name", OTHERS)
def test_sums_are_added_up_in_the_order_that_they_had(name):
    """Their stages do not go through registers, nor do lines that are too long, or too short to be worth it."""
    body = renderer.render(build(2, OTHERS[name], line_length=64, param="F", grad="F"))
    assert "walk_lines" not in body.split("FUSEDOPT_BLOCK_STAGE(0)")[0]
    assert all("walk_lines" not in renderer.render(codes(n)) for n in (16, 48, 512))
    assert all("::walk_lines<n1>(" in renderer.render(p) for p in PROGRAMS.values())


@pytest.mark.parametrize("threads", [4, 64])
def test_what_is_not_finite_is_found_by_all_threads(fake, threads):  # noqa: F811
    program = PROGRAMS["drawn"]
    row = tensors(program, (64 * 9 + 5,), 0)
    for i, x in ((7, np.nan), (64 + 40, np.inf), (128 + 63, -np.inf), (9 * 64 + 4, np.nan)):
        row["grad"][i] = x
    wanted = interpret(program, row, [0.9], (64 * 9 + 5,))
    fake.threads = threads
    run_rows(program, [row], [(64 * 9 + 5,)], "cuda")
    lines = row["param"][: 9 * 64].view(9, 64)
    assert lines[0].isnan().all() and lines[3:].isfinite().all() and not lines[1:3].isfinite().any()
    assert_same_bits(row["param"], wanted["param"])


# ---------------------------------------------------------------- AdamW


BLOCKS_OF_256 = {"exp_avg": "int8_256", "exp_avg_sq": "uint8_256"}
ADAMW = {
    "int8": (F32, "int8"),
    "int8_256": (F32, BLOCKS_OF_256),
    "at random": (BF16, {"param": "bfloat16_sr", "*": "int8"}),
}


def adamw(name, backend, sizes=(70 * 61, 4096, 64 * 67)):
    dtype, storage = ADAMW[name]
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in sizes]
    return params, fusedopt.optim.AdamW(params, lr=0.1, storage=storage, backend=backend)


@pytest.mark.parametrize("name", ADAMW)
def test_adamw_has_the_bits_of_cpp(fake, name):  # noqa: F811
    """Codes and scales, too; with gradients that are misaligned, and some that are not finite."""
    fake.threads = 64
    found = []
    for on in ("cuda", "cpp"):
        params, opt = adamw(name, on)
        for step in range(4):
            for k, p in enumerate(params):
                p.grad = behind(torch.randn(p.shape).to(p.dtype), k)
            if step == 2:
                params[0].grad[3], params[1].grad[77] = np.inf, np.nan
            opt.step()
        assert {kernel.backend for kernel, _ in opt.engine.launched} == {on} and not opt.explain().eager
        state = [t for p in params for t in opt.state[p].values() if isinstance(t, torch.Tensor)]
        found.append([t.detach().float() for t in (*params, *state)])
    assert len(found[0]) == 5 * 3
    for ours, theirs in zip(*found, strict=True):
        assert_same_bits(ours, theirs)


def rendered(name):
    """The program of AdamW's second step, and its body; nothing is compiled."""
    made = []

    def render(program, slot_names, title):
        made.append((program, renderer.render(program, slot_names, title)))
        return ""

    with golden.nothing_is_compiled(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu.cpp, "render", render)
        params, opt = adamw(name, None)
        for _ in range(2):
            for p in params:
                p.grad = torch.zeros_like(p)
            opt.step()
    return made[-1]


@needs_nvrtc
@needs_cuobjdump
def test_nvrtc_compiles_all_of_them_without_spills():
    bodies = {f"p{k}": renderer.render(p, ["s"], "blocks") for k, p in enumerate(PROGRAMS.values())}
    source = sass.cuda.SMALL_ONLY + cuda_kernels.together(bodies)
    found = sass.functions(nvrtc.compile_cubin("lines", source, "sm_90").path)
    assert len(found) == sum(len(renderer.launches(p)) for p in PROGRAMS.values())
    for name, f in found.items():
        assert f.registers <= REGISTERS and (f.stack, f.local) == (0, 0), name


@needs_nvrtc
@needs_cuobjdump
@every_arch
def test_whole_lines_are_loaded_and_stored_once_by_vectors(arch):
    made = {f"adamw{k}": rendered(name) for k, name in enumerate(ADAMW)}
    source = cuda_kernels.together({name: body for name, (_, body) in made.items()})
    found = sass.functions(nvrtc.compile_cubin("lines", sass.cuda.SMALL_ONLY + source, arch).path)
    for name, (program, _) in made.items():
        (stage,), f = stages(program), found[f"{name}_stage_0"]
        size = {n: b.dtype.itemsize for n, b in program.buffers if b.kind == "F"}
        loads, stores = (
            [size[n] for n in names if n in size] for names in (stage.loads(program), dict(stage.stores))
        )
        assert f.registers <= REGISTERS and (f.stack, f.local) == (0, 0)
        assert f.count(r"(LDL|STL)\b.*") == 0
        assert f.count(r"LDG\.E\.128.*") * 16 == HELD * sum(n for n in loads if n > 1)
        assert f.count(r"STG\.E\.128.*") * 16 == HELD * sum(n for n in stores if n > 1)
        assert f.count(r"STG\.E\.64.*") * 8 == HELD * stores.count(1) > 0
        # One at a time is the other way's: twice in each loop, of which one stores.
        assert f.count(r"LDG\.E\.[SU]8.*") == 4 * loads.count(1)
        assert f.count(r"STG\.E\.U8.*") == 2 * stores.count(1)
