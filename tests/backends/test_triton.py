"""The Triton backend without a GPU: the generated source, what Triton's compiler makes of it for three generations of
NVIDIA GPUs, and what the backend says where it cannot run.

What the kernels compute is in test_triton_interpreter.py.
"""

import math
import re
import sys
from collections import Counter
from typing import Any

import golden
import numpy as np
import pytest
import torch
from random_programs import noisy
from test_blocks import PROGRAMS, tensors
from triton_programs import EXAMPLE_OF, NAMED, Traced, all_ops, spelled, traced

import fusedopt
from fusedopt.backends import chunking as plan
from fusedopt.backends.triton import backend
from fusedopt.backends.triton import render as renderer
from fusedopt.compile import BuildError
from fusedopt.ir.ops import DRAWS, OPS, Reduction, is_reduction
from fusedopt.ir.program import Buffer, Graph, Program
from fusedopt.ir.stages import Stage, stages
from fusedopt.kernels import source as skeleton

triton = pytest.importorskip("triton")
import triton_gates as gates  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

REGISTERS = 128
"""Four programs of 128 threads then fit the 65,536 registers of a multiprocessor."""


@pytest.fixture(scope="module", autouse=True)
def triton_cache(tmp_path_factory):
    """Triton's own cache, out of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton_cache")))
        yield


# ---------------------------------------------------------------- gates: every named optimizer × dtypes × architectures


def rest_of(stage: Stage) -> int:
    """Elements that a thread has under way where not all of a block is there."""
    names = gates.module(traced(EXAMPLE_OF)[0].body())
    return (backend.BLOCK if stage.reductions else names["REST"].value) // gates.THREADS


def expected_accesses(program: Program, stage: Stage) -> dict:
    """Of a stage's elements: 128 bits at a time without a guard, and one element at a time with one."""
    found: Counter = Counter()
    for kind, buffers in (("ld", stage.loads(program)), ("st", [n for n, _ in stage.stores])):
        for name in buffers:
            if program.buffer[name].kind == "F":
                size = program.buffer[name].dtype.itemsize
                found[False, kind, 128] += backend.BLOCK * size // 16 // gates.THREADS
                found[True, kind, 8 * size] += rest_of(stage)
            else:  # a number per tensor, stored by one thread
                found[True, kind, 8 * program.buffer[name].dtype.itemsize] += 1
    joined = sum(is_reduction(program.values[i].op) for i in stage.values)
    if joined:
        found[True, "ld", 64] += joined * plan.MAX_CHUNKS // gates.THREADS
    for _ in stage.reductions:  # a part result, stored by one thread
        found[True, "st", 64] += 1
    return dict(found)


def check(made: Traced, name: str, kernel: gates.Compiled) -> None:
    """Everything in registers, accesses as wide as they may be and no wider, IEEE arithmetic."""
    stage, program = gates.stage_of(made.program, name), made.program
    assert kernel.registers <= REGISTERS and (kernel.stack, kernel.local) == (0, 0)
    expected = expected_accesses(program, stage)
    # The rest are words of tables and numbers there is one of per tensor.
    assert {k: n for k, n in kernel.accesses().items() if k[0] or k[2] > 64} == expected
    moved = sum(n * bits // 8 for (_, _, bits), n in expected.items() if bits == 128)
    assert moved * gates.THREADS == backend.BLOCK * stage.bytes_per_element(program)
    arithmetic = kernel.arithmetic()
    allowed = r"(add|sub|mul)\.rn\.(f32|f64|f32x2|f32\.b?f16)|(div|sqrt)\.rn\.f(32|64)"
    assert all(re.fullmatch(allowed, i) for i in arithmetic), arithmetic
    assert not re.search(r"ftz|approx|\.full\.", kernel.ptx)
    # Of the element function there is a copy for each element that a thread has under way.
    values = [program.values[i] for i in stage.values]
    copies = backend.BLOCK // gates.THREADS + rest_of(stage)
    for op in ("div", "sqrt"):
        each = copies * sum(v.op == op and v.kind == "F" for v in values)
        once = sum((v.op == op and v.kind == "S") or (v.op == "mean" and op == "div") for v in values)
        count = sum(n for i, n in arithmetic.items() if i.startswith(op))
        assert each <= count <= each + once, (op, count)


HERE = ("float32", 90)
"""What the named optimizers are compiled for without --all-architectures."""


@pytest.mark.parametrize(
    ("dtype", "arch"),
    [
        pytest.param(dtype, arch, marks=() if (dtype, arch) == HERE else pytest.mark.all_architectures)
        for arch in gates.ARCHS
        for dtype in gates.STORED
    ],
)
def test_named_optimizers_compile_to_what_they_should(dtype, arch):
    for title, made in gates.programs(dtype).items():
        kernels = gates.compiled(made, arch)
        found = renderer.entries(made.program)
        names, scalars = found.stages, found.scalars
        assert list(kernels) == [*names, *([scalars] if scalars else [])]
        for name, kernel in kernels.items():
            try:
                check(made, name, kernel)
            except AssertionError as error:
                raise AssertionError(f"{title} {name} sm_{arch}: {error}") from error


@pytest.mark.parametrize("name", ["fastai_Adam", "fastai_Lamb"])
def test_float64_does_too_but_for_its_registers(name):
    for made in traced(name, "float64"):
        for kernel_name, kernel in gates.compiled(made, 90).items():
            check(made, kernel_name, kernel._replace(registers=0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fastai_Lamb", {"amp_fused": True}),
        ("torch_RAdam", {"capturable": True}),
        ("torch_SGD", {"amp_fused": True, "max_grad_norm": 1.0}),
    ],
)
def test_numbers_on_the_device_need_no_more(name, options):
    for made in traced(name, "float32", 0, **options):
        for kernel in gates.compiled(made, 90).values():
            assert kernel.registers <= 128 and (kernel.stack, kernel.local) == (0, 0)


def test_the_table_of_gates_is_the_golden_one(all_architectures):
    """After a change that is meant: run triton_gates.py, as it says, and read the difference."""
    dtypes, archs = (gates.STORED, gates.ARCHS) if all_architectures else ([x] for x in HERE)
    expected = golden.gates(gates.GATES, [gates.ARCHS.index(a) for a in archs], dtypes)
    if expected.splitlines()[0] != gates.VERSION:
        pytest.skip(f"registers differ between compilers, and the table is {expected.splitlines()[0]}'s")
    assert gates.table(dtypes, archs) == expected
    everything = golden.gates(gates.GATES, range(len(gates.ARCHS)), gates.STORED)
    assert everything == gates.GATES.read_text(encoding="utf-8")


def test_the_gates_notice_spills_narrow_accesses_and_contraction():
    """The same reader, on kernels that break the rules."""
    made = traced("fastai_Lamb")[0]
    spilled = gates.compile_body(made.body(), 90, maxnreg=32)["stage_1"]
    assert spilled.registers <= 32 and spilled.stack + spilled.local > 0
    narrow = gates.compile_body(re.sub(r"tl.multiple_of\((a\d.*?), 16\)", r"\1", made.body()), 90)["stage_1"]
    assert not any(bits == 128 for _, _, bits in narrow.accesses())
    fused = gates.compile_body(made.body(), 90, enable_fp_fusion=True)["stage_1"]
    for wrong in (spilled, narrow, fused):
        with pytest.raises(AssertionError):
            check(made, "stage_1", wrong)


def test_a_promise_kept_for_the_rest_too_would_be_noticed():
    body = traced("torch_SGD")[0].body()
    whole, rest = body.split("for i in tl.range(whole, end, REST")
    promised = re.sub(r"(a\d\.to\(\w+\) \+ i)", r"tl.multiple_of(\1, 16)", rest)
    promised = promised.replace("left = tl.minimum(end - i, REST)", "left = tl.multiple_of(end - i, 16)")
    assert gates.compile_body(body, 90)["stage_0"].accesses()[True, "st", 64] == 0
    mutant = f"{whole}for i in tl.range(whole, end, REST{promised}"
    assert gates.compile_body(mutant, 90)["stage_0"].accesses()[True, "st", 64] > 0


@pytest.mark.parametrize("arch", [80, 90])
def test_nothing_is_contracted_in_the_machine_code(arch):
    """A program without division and root has no fused multiply-add; allowed to, the compiler makes some."""
    made = traced("torch_SGD")[0]
    assert {"div", "sqrt"}.isdisjoint(v.op for v in made.program.values)
    for fuse in (False, True):
        kernel = gates.compile_body(made.body(), arch, enable_fp_fusion=fuse)["stage_0"]
        sass = gates.dump("-sass", kernel.cubin)
        assert "FMUL" in sass or fuse
        assert ("FFMA" in sass) == fuse


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.all_architectures)], ids=str
)
def test_every_op_with_a_spelling_compiles(dtype):
    """In four kernels, which together take two fifths of the time of one."""
    for k in range(4):
        program = all_ops(dtype, spelled(dtype)[k::4])
        kernel = gates.compile_body(renderer.render(program), 90)["stage_0"]
        found, expected = kernel.accesses(), expected_accesses(program, stages(program)[0])
        assert all(found[key] == n for key, n in expected.items())


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_made_in_registers_and_nothing_is_contracted(name):
    program = noisy(name)
    kernel = gates.compile_body(renderer.render(program), 90)["stage_0"]
    assert kernel.registers <= REGISTERS and (kernel.stack, kernel.local) == (0, 0)
    assert all(re.match(r"(add|sub|mul|sqrt)\.rn\.", i) for i in kernel.arithmetic()), kernel.arithmetic()
    found, expected = kernel.accesses(), expected_accesses(program, stages(program)[0])
    assert all(found[key] == n for key, n in expected.items() if key[2] == 128)


# ---------------------------------------------------------------- programs with several axes

PLAIN = {"factored matrix", "factored batch", "centred", "by rows"}
"""Those compiled without --all-architectures."""


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        pytest.param(
            name,
            columns,
            marks=() if name in PLAIN and columns == 64 else pytest.mark.all_architectures,
        )
        for name in PROGRAMS
        for columns in backend.TILES
    ],
)
def test_programs_with_several_axes_compile_without_spills(name, columns):
    program, _ = PROGRAMS[name]
    again = any(stage.lines for stage in stages(program))
    kernels = [*gates.compile_blocks(program, 90, columns).items()]
    kernels += gates.compile_blocks(program, 90, columns, whole=True).items() if again else ()
    for kernel_name, kernel in kernels:
        assert (kernel.stack, kernel.local) == (0, 0) and kernel.registers <= 255, kernel_name
        assert not re.search(r"ftz|approx|\.full\.|\b(atom|red)\.", kernel.ptx), kernel_name
        fused = [i for i in kernel.arithmetic() if i.startswith(("fma", "mad"))]
        assert not fused, (kernel_name, fused)


def test_a_barrier_stands_between_what_threads_store_and_others_read():
    program, _ = PROGRAMS["factored matrix"]
    source = renderer.render(program)
    before = source.split("def before_1(")[1].split("@triton.jit")[0]
    made, used = before.index("tl.store(q2"), before.index("tl.store(q3")
    assert made < before.index("tl.debug_barrier()") < used
    ptx = gates.compile_blocks(program, 90, 64)["before_1"].ptx
    stores = [m.start() for m in re.finditer(r"st\.global", ptx)]
    assert "bar.sync" in ptx[stores[0] : stores[-1]]


def test_their_kernels_are_launched_in_order_over_tiles_of_lines(driver):
    program, _ = PROGRAMS["factored matrix"]
    used = backend.Triton()
    kernel = used.compile(program, "blocks", ["s"])
    shapes = [(300, 700), (0, 3), (2, 5)]
    columns: dict = {n: [] for n, _ in program.buffers}
    for shape in shapes:
        for n, t in tensors(program, shape, 0).items():
            columns[n].append(t)
    launch = used.prepare(kernel, columns, [math.prod(s) for s in shapes], [0, 0, 0], shapes=shapes)
    launch.run(np.ones((1, 1)))
    found = [(name, grid[:2]) for name, grid, _, _ in driver.launched]
    # 300 lines of 700 are 19 chunks of 16, so that each part result has as many elements.
    assert found == [
        ("stage_0", (20, 1)),
        ("join_1", (3, backend.JOINING)),
        ("before_1", (3, 1)),
        ("stage_1", (20, 1)),
        ("stage_2", (20, 1)),
        ("scalars", (3, 1)),
    ]


@pytest.mark.parametrize(
    ("shapes", "columns"),
    [
        ([(1000, 3)], 4),
        ([(1000, 7)], 4),
        ([(1000, 16), (100, 12)], 16),
        ([(1000, 64)], 64),
        ([(64, 1000)], 256),
        ([(1, 100_000)], 256),
        ([(100_000, 1), (5, 300)], 4),
        ([(7, 7), (512, 512)], 256),
    ],
)
def test_tiles_are_as_long_as_leaves_little_of_them_empty(shapes, columns):
    once, again = PROGRAMS["factored matrix"][0], PROGRAMS["by rows"][0]
    assert backend._tile(once, np.array(shapes)) == backend.Tile.of(columns)
    whole = max(length for _, length in shapes) <= columns
    assert backend._tile(again, np.array(shapes)) == backend.Tile.of(columns, whole)


# ---------------------------------------------------------------- the source


def test_the_skeleton_takes_as_many_part_results_as_there_may_be():
    assert gates.module(traced(EXAMPLE_OF)[0].body())["MAX_PARTS"].value == plan.MAX_CHUNKS


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
            promised = re.findall(r"multiple_of\((a\d+)\.to\(\w+\) \+ i, 16\)", stage)
            assert sorted(asked) == sorted(promised) and len(set(asked)) == len(asked)
            assert set(re.findall(r"\b(a\d+)\.to\(", stage)) == set(asked)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_spellings_use_their_arguments(op):
    if op.triton is None and isinstance(op, Reduction):
        return  # then it is made of the join
    assert [f"{{{k}}}" in op.triton for k in range(4)] == [k < op.arity for k in range(4)]


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
        ("stage_0", (14, 1, 1)),  # 100,000 elements are 13 of them
        ("stage_1", (14, 1, 1)),
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
    with pytest.raises(BuildError, match=r"cannot be imported.*pip install triton.*reference"):
        backend.Triton().compile(made.program, "SGD", [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this needs a machine without a GPU")
def test_without_a_gpu_it_says_that_nothing_can_be_compiled():
    made = traced("torch_SGD")[0]
    with pytest.raises(BuildError, match=r"kernel 'SGD': Triton cannot compile it(.|\n)*source: .*SGD_"):
        backend.Triton().compile(made.program, "SGD", [])


def test_an_op_without_a_spelling_is_named():
    graph = Graph()
    x = graph.leaf("load", "param", kind="F")
    buffers = (("param", Buffer(torch.float64, "F")),)
    y = graph.op("pow", x, x)
    program = Program(torch.float64, buffers, tuple(graph.values), (("param", y),), 0)
    with pytest.raises(BuildError, match=r"kernel 'curious': Triton has no pow .*Remedy"):
        backend.Triton().compile(program, "curious", [])
