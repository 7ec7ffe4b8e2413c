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


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_spellings_use_their_arguments(op):
    missing = {"pow", "atan2", "expm1", "log1p", "tanh", "atan"}
    assert (op.triton is None) == (op.name in missing)
    if op.triton is not None:
        arity = 1 if isinstance(op, Reduction) else op.arity
        assert [f"{{{k}}}" in op.triton for k in range(4)] == [k < arity for k in range(4)]


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
