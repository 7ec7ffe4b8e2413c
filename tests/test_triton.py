"""The Triton backend without a GPU: the generated source, what Triton's compiler makes of it for three generations of
NVIDIA GPUs, and what the backend says where it cannot run.

What the kernels compute is in triton_interpreted.py, which a process of its own runs: Triton reads TRITON_INTERPRET
when it is imported.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from triton_programs import DTYPES, EXAMPLE_OF, NAMED, Traced, all_ops, traced

import fusedopt
from fusedopt.compile import cache as compile_cache
from fusedopt.ir.ops import OPS, Reduction
from fusedopt.ir.passes import Stage, scalar_stores, stages
from fusedopt.ir.program import Buffer, Graph, Program
from fusedopt.kernels import source as skeleton
from fusedopt.render import triton as renderer
from fusedopt.runtime import plan
from fusedopt.runtime import triton as backend

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

THREADS = 32 * backend.WARPS
ARGUMENTS = {"rows": "*i64", "chunks": "*i64", "partials": "*fp64", "slots": "*fp64", "BLOCK": "constexpr"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@pytest.fixture(scope="module", autouse=True)
def triton_cache(tmp_path_factory):
    """Triton's own cache, out of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton_cache")))
        yield


# ---------------------------------------------------------------- ahead of time


class Compiled(NamedTuple):
    """A kernel as PTX, as machine code, and what the loader is told that it needs."""

    name: str
    ptx: str
    sass: str
    usage: str


def module(body: str, folder: Path) -> dict[str, Any]:
    path = folder / "kernel.py"
    path.write_text(renderer.source(skeleton("triton.py.in"), body), encoding="utf-8")
    return backend.load(path)


def compile_body(
    body: str, program: Program, arch: int, folder: Path, sass: bool = False, **changed: Any
) -> list[Compiled]:
    """The kernels for an architecture, compiled as the backend compiles them but for what is changed."""
    names, scalars = renderer.entries(program)
    functions = module(body, folder)
    out = []
    for name in [*names, *([scalars] if scalars else [])]:
        function = functions[name]
        signature = {a: ARGUMENTS[a] for a in function.arg_names}
        constants = {"BLOCK": backend.BLOCK} if "BLOCK" in signature else {}
        tensors = [(i,) for i, a in enumerate(function.arg_names) if a not in constants]
        source = ASTSource(function, signature, constants, {i: [["tt.divisibility", 16]] for i in tensors})
        target = GPUTarget("cuda", arch, 32)
        kernel = triton.compile(source, target=target, options=backend.options() | changed)
        path = folder / f"{name}.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", path)
        out.append(Compiled(name, kernel.asm["ptx"], _tool("nvdisasm", "-c", path) if sass else "", usage))
    return out


def _tool(name: str, *arguments: Any) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


ACCESS = re.compile(r"^\s*(@\S+ )?(ld|st)\.global(?:\.\w+)*?(?:\.(v\d))?\.b(\d+)", re.MULTILINE)


def accesses(ptx: str) -> Counter:
    """How often (guarded by a predicate, "ld" or "st", bits) is accessed in global memory."""
    found: Counter = Counter()
    for guard, kind, vector, bits in ACCESS.findall(ptx):
        found[bool(guard), kind, int(bits) * int(vector[1:] or 1 if vector else 1)] += 1
    return found


def expected_accesses(program: Program, stage: Stage) -> dict:
    """Of a stage's elements: 128 bits at a time without a guard, and one element at a time with one."""
    found: Counter = Counter()
    for kind, buffers in (("ld", stage.loads(program)), ("st", [n for n, _ in stage.stores])):
        for name in buffers:
            if program.buffer[name].kind == "F":
                size = program.buffer[name].dtype.itemsize
                found[False, kind, 128] += backend.BLOCK * size // 16 // THREADS
                found[True, kind, 8 * size] += backend.BLOCK // THREADS
            else:  # a number per tensor, stored by one thread
                found[True, kind, 8 * program.buffer[name].dtype.itemsize] += 1
    for _ in stage.reductions:  # a part result, stored by one thread
        found[True, "st", 64] += 1
    return dict(found)


def stage_of(program: Program, kernel: str) -> Stage:
    return (
        scalar_stores(program) if kernel == "scalars" else stages(program)[int(kernel.removeprefix("stage_"))]
    )


def check(made: Traced, arch: int, folder: Path) -> None:
    """Accesses as wide as they may be and no wider, IEEE arithmetic, everything in registers."""
    for kernel in compile_body(made.body(), made.program, arch, folder):
        where, stage = f"{made.title} {kernel.name} sm_{arch}", stage_of(made.program, kernel.name)
        expected = expected_accesses(made.program, stage)
        found = accesses(kernel.ptx)
        # The rest are words of tables and numbers there is one of per tensor.
        assert {k: n for k, n in found.items() if k[0] or k[2] > 64} == expected, where
        assert not INEXACT.search(kernel.ptx), where
        used = {made.program.values[i].op for i in stage.values}
        assert ("sqrt.rn.f" in kernel.ptx) == ("sqrt" in used), where
        assert ("div.rn.f" in kernel.ptx) == bool({"div", "mean"} & used), where
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", kernel.usage))
        assert usage["STACK"] == usage["LOCAL"] == "0", f"{where}: {kernel.usage}"


INEXACT = re.compile(r"\bfma\.|\bmad\.\w*\.f|\.ftz|\.approx|div\.full")
OTHERS = ["fastai_Adam", "fastai_Lamb", "fastai_Larc", "torch_Adamax", "torch_SGD"]
CASES = [(n, d, 90) for d in list(DTYPES)[:3] for n in NAMED]
CASES += [(n, d, arch) for arch in (80, 100) for d in list(DTYPES)[:3] for n in OTHERS]
CASES += [(n, "float64", 90) for n in OTHERS[:2]]
_checked: set[tuple[Program, int]] = set()


@pytest.mark.parametrize(("name", "dtype", "arch"), CASES, ids=str)
def test_named_optimizers_compile_to_what_they_should(name, dtype, arch, tmp_path):
    """All on sm_90; on sm_80 and sm_100 one optimizer of each kind, to keep the time short."""
    for made in traced(name, dtype):
        if (made.program, arch) not in _checked:
            check(made, arch, tmp_path)
            _checked.add((made.program, arch))


def test_a_promise_kept_for_the_rest_too_would_be_noticed(tmp_path):
    made = traced("torch_SGD")[0]
    body = made.body()
    whole, rest = body.split("for i in range(whole, end, BLOCK):")
    promised = re.sub(r"(a\d)\.to\((\w+)\)", r"tl.multiple_of(\1.to(\2), 16)", rest)
    promised = promised.replace("at = i + lanes", "at = tl.multiple_of(i + lanes, 64)")
    mutant = f"{whole}for i in range(whole, tl.multiple_of(end, 16), BLOCK):{promised}".replace(
        "end = tl.load(piece + 2)", "end = tl.multiple_of(tl.load(piece + 2), 16)"
    )
    kernel = compile_body(mutant, made.program, 90, tmp_path)[0]
    assert accesses(kernel.ptx)[True, "st", 128] > 0
    assert accesses(compile_body(body, made.program, 90, tmp_path)[0].ptx)[True, "st", 128] == 0


@pytest.mark.parametrize("arch", [80, 90])
def test_nothing_is_contracted_in_the_machine_code(arch, tmp_path):
    """A program without division and root has no fused multiply-add; allowed to, the compiler makes some."""
    made = traced("torch_SGD")[0]
    assert {"div", "sqrt"}.isdisjoint(v.op for v in made.program.values)
    for fuse in (False, True):
        kernel = compile_body(made.body(), made.program, arch, tmp_path, sass=True, enable_fp_fusion=fuse)[0]
        assert "FMUL" in kernel.sass or fuse
        assert ("FFMA" in kernel.sass) == fuse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_op_with_a_spelling_compiles(dtype, tmp_path):
    program = all_ops(dtype)
    (kernel,) = compile_body(renderer.render(program), program, 90, tmp_path)
    found, expected = accesses(kernel.ptx), expected_accesses(program, stages(program)[0])
    assert all(found[key] == n for key, n in expected.items())


# ---------------------------------------------------------------- the source


def test_the_skeleton_is_a_module_with_the_example_it_names(tmp_path):
    text = skeleton("triton.py.in")
    assert text == renderer.source(text, traced(EXAMPLE_OF)[0].body())
    path = tmp_path / "alone.py"
    path.write_text(text, encoding="utf-8")
    assert isinstance(backend.load(path)["stage_0"], triton.JITFunction)


def test_source_wants_one_place_for_the_body():
    assert renderer.source(f"before\n{renderer.SLOT}example", "body") == f"before\n{renderer.SLOT}body"
    for wrong in ("nowhere", f"{renderer.SLOT}{renderer.SLOT}"):
        with pytest.raises(ValueError, match=r"once"):
            renderer.source(wrong, "body")


@pytest.mark.parametrize("name", NAMED)
def test_lines_are_short_and_hold_no_hyperparameter(name):
    """But for comments, which are as long as the expressions they show."""
    for made in traced(name):
        assert all(len(line.split("  #")[0]) <= 110 for line in made.body().splitlines() if line[:1] != "#")
        assert not any(str(x) in made.body() for x in NAMED[name].kwargs[0].values() if type(x) is float)


@pytest.mark.parametrize("name", NAMED)
def test_every_pointer_of_a_stage_has_a_say_in_whether_it_is_aligned(name):
    for made in traced(name):
        for stage in made.body().split("\ndef stage_")[1:]:
            stage = stage.split("@triton.jit")[0]
            asked = re.search(r"whole_blocks\(([^,]*),", stage)[1].split(" | ")
            promised = re.findall(r"multiple_of\((a\d+)\.to\(\w+\), 16\)", stage)
            assert sorted(asked) == sorted(promised) and len(set(asked)) == len(asked)
            assert set(re.findall(r"\b(a\d+)\.to\(", stage)) == set(asked)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_spellings_use_their_arguments(op):
    missing = {"pow", "atan2", "expm1", "log1p", "tanh", "atan"}
    assert (op.triton is None) == (op.name in missing)
    if op.triton is not None:
        arity = 1 if isinstance(op, Reduction) else op.arity
        assert [f"{{{k}}}" in op.triton for k in range(4)] == [k < arity for k in range(4)]


# ---------------------------------------------------------------- launching


class Driver:
    """Stands where NVIDIA's driver would: it names a GPU and a stream, and notes what it is told to launch."""

    def __init__(self) -> None:
        self.utils, self.loaded, self.launched = self, [], []

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 12345

    def get_current_stream(self, device: int) -> int:
        return 77

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 17}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        self.loaded.append(name)
        return 1, 2, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            tables = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
            self.launched.append((metadata.name, (x, y, z), stream, tables))

        return launch


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", made)
    return made


SIZES = (100_000, 0, 5)


def launch(name: str) -> backend.Launch:
    """What the backend prepares for tensors of these sizes, compiled for the GPU that the driver names."""
    made, used = traced(name)[0], backend.Triton()
    kernel = used.compile(made.program, made.title, made.slot_names)
    columns = {
        name: [torch.zeros(n if b.kind == "F" else (), dtype=b.dtype) for n in SIZES]
        for name, b in made.program.buffers
    }
    return used.prepare(kernel, columns, SIZES, [0, 1, 1])


def test_kernels_are_compiled_before_the_first_launch_and_launched_once_per_stage(driver):
    """Through Triton's own launcher, down to the driver: stages over chunks, a kernel for scalar state over rows."""
    larc = launch("fastai_Larc")
    kernels = [*larc.handle.stages, larc.handle.scalars]
    assert [len(k.device_caches[driver.get_current_device()][0]) for k in kernels] == [1, 1, 1]
    n_slots = traced("fastai_Larc")[0].program.slots
    assert driver.loaded == driver.launched == []
    numbers = torch.rand(2, n_slots, dtype=torch.float64).numpy()
    larc.run(numbers)
    assert [(name, grid) for name, grid, _, _ in driver.launched] == [
        ("stage_0", (3, 1, 1)),
        ("stage_1", (3, 1, 1)),
        ("scalars", (3, 1, 1)),
    ]
    assert [len(k.device_caches[driver.get_current_device()][0]) for k in kernels] == [1, 1, 1]
    assert {stream for _, _, stream, _ in driver.launched} == {77}
    for name, _, _, tables in driver.launched:
        assert torch.equal(tables[0], torch.from_numpy(larc.rows))
        assert torch.equal(tables[-1 if name == "scalars" else 3], torch.from_numpy(numbers))


def test_a_stage_without_part_results_is_launched_over_tiles(driver):
    adam = launch("fastai_Adam")
    adam.run(torch.rand(2, 8, dtype=torch.float64).numpy())
    pieces = -(-65536 // plan.TILE) + -(-(100_000 - 65536) // plan.TILE) + 1
    assert [(name, grid) for name, grid, _, _ in driver.launched] == [("stage_0", (pieces, 1, 1))]


def test_what_the_host_changed_is_there_at_the_next_launch_and_nothing_is_compiled_again(driver):
    adam = launch("fastai_Adam")
    numbers = torch.rand(2, 8, dtype=torch.float64).numpy()
    for _ in range(2):
        adam.run(numbers)
        adam.rows[:, 5] += 16
        numbers[1] *= 0.5
    (_, _, _, first), (_, _, _, second) = driver.launched
    assert torch.equal(second[0][:, 5], first[0][:, 5] + 16)
    assert torch.equal(second[3][1], first[3][1] * 0.5) and torch.equal(second[3][0], first[3][0])
    assert driver.loaded == ["stage_0"]


# ---------------------------------------------------------------- where it cannot run


def parameter() -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return p


def test_on_the_cpu_it_says_how_to_have_it_interpreted():
    opt = fusedopt.Optimizer([parameter()], fusedopt.sgd_step, lr=0.1, backend="triton")
    with pytest.raises(
        ValueError, match=r"runs on cuda, and a parameter is on cpu.*'auto'.*TRITON_INTERPRET=1"
    ):
        opt.step()


def test_without_triton_it_says_what_to_install(monkeypatch):
    made = traced("torch_SGD")[0]
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not backend.interpreting()
    with pytest.raises(compile_cache.BuildError, match=r"cannot be imported.*pip install triton.*reference"):
        backend.Triton().compile(made.program, "SGD", [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this needs a machine without a GPU")
def test_without_a_gpu_it_says_that_nothing_can_be_compiled():
    made = traced("torch_SGD")[0]
    with pytest.raises(
        compile_cache.BuildError, match=r"kernel 'SGD': Triton cannot compile it(.|\n)*source: .*SGD_"
    ):
        backend.Triton().compile(made.program, "SGD", [])


def test_an_op_without_a_spelling_is_named():
    graph = Graph()
    y = graph.op("tanh", graph.leaf("load", "param", kind="F"))
    buffers = (("param", Buffer(torch.float32, "F")),)
    program = Program(torch.float32, buffers, tuple(graph.values), (("param", y),), 0)
    with pytest.raises(compile_cache.BuildError, match=r"kernel 'curious': Triton has no tanh .*Remedy"):
        backend.Triton().compile(program, "curious", [])


# ---------------------------------------------------------------- what the kernels compute


@pytest.mark.slow
def test_in_tritons_interpreter():
    """triton_interpreted.py, in a process that is started for it."""
    file = Path(__file__).with_name("triton_interpreted.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout, done.stdout[-2000:]
