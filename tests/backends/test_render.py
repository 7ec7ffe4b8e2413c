"""Generated C++: what is committed under tests/golden is what is generated, and it compiles without a warning.

`python -m tests.golden` writes the golden files anew; nothing here does.
"""

import math
import re
import shutil
import subprocess
from pathlib import Path

import golden
import pytest
import torch
from helpers import signature

from fusedopt import callbacks, rules
from fusedopt.backends.base import HEAD
from fusedopt.backends.cpp import render as cpp
from fusedopt.compile import toolchain
from fusedopt.ir.program import Buffer, Graph, Program
from fusedopt.kernels import source as skeleton
from fusedopt.trace.tracer import trace

# Of two lists that make the same program, the one seen first names the lines.
pytestmark = pytest.mark.usefixtures("nothing_compiled")

WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
ALL_ADAM = dict(lr=0.123, mom=0.77, sqr_mom=0.88, eps=0.0321, wd=0.456)


def compile_alone(text, folder, *flags):
    """What the compiler says about a source file; raises if it fails or warns."""
    path = folder / "kernel.cpp"
    path.write_text(text)
    tool = toolchain.compiler()
    done = subprocess.run(
        [*tool.command, *toolchain.FLAGS, *WARNINGS, *flags, str(path), "-o", str(folder / "kernel.so")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


# ---------------------------------------------------------------- golden code


@pytest.mark.parametrize("name", golden.NAMES)
def test_generated_code_is_the_golden_code(name):
    """After a change that is meant: `python -m tests.golden`, and read the difference."""
    assert golden.generate(name) == golden.path(name).read_text(encoding="utf-8")


def test_every_golden_file_belongs_to_an_optimizer():
    assert {p.name for p in golden.FOLDER.glob("*.cpp")} == {golden.path(name).name for name in golden.NAMES}


@pytest.mark.parametrize("name", golden.NAMES[::2])
def test_no_learning_rate_ever_appears_in_the_code(name):
    assert golden.generate(name, lr=0.0123) == golden.path(name).read_text(encoding="utf-8")


def test_no_hyperparameter_ever_appears_in_the_code():
    code = golden.generate(golden.EXAMPLE_OF, **ALL_ADAM)
    assert code == golden.path(golden.EXAMPLE_OF).read_text(encoding="utf-8")
    assert not any(str(value) in code for value in ALL_ADAM.values())


def test_the_comparison_with_golden_code_can_fail():
    undecayed = golden.generate(golden.EXAMPLE_OF, wd=0.0)
    assert undecayed != golden.path(golden.EXAMPLE_OF).read_text(encoding="utf-8")
    assert "weight_decay" not in undecayed


@pytest.mark.parametrize("name", golden.NAMES)
def test_each_stage_loads_and_stores_a_buffer_once_per_element(name):
    stages = re.split(r"^// Stage ", golden.path(name).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    for stage in stages:
        loads, stores = re.findall(r"load<T>\((\w+), i\)", stage), re.findall(r"store\((\w+), i,", stage)
        assert loads and len(set(loads)) == len(loads) and len(set(stores)) == len(stores)
        reads = re.search(r"reads ([\w, ]+); ", stage)[1].split(", ")
        assert sorted(loads) == sorted(reads)
        writes = re.search(r"; writes ([\w, ]+); ", stage)
        assert stores == (writes[1].split(", ") if writes else [])
        for pointer in re.findall(r"^ *(const )?\w+\* __restrict (\w+) =", stage, flags=re.MULTILINE):
            assert bool(pointer[0]) == (pointer[1] not in stores)


# ---------------------------------------------------------------- the skeleton


def test_the_example_in_the_kernels_folder_is_the_golden_adam():
    example = golden.EXAMPLE.read_text(encoding="utf-8")
    assert example == golden.path(golden.EXAMPLE_OF).read_text(encoding="utf-8")


def test_the_skeleton_compiles_alone_with_its_example(tmp_path):
    compile_alone(skeleton("cpu.cpp"), tmp_path, f"-I{golden.EXAMPLE.parent}")


def test_kernels_include_nothing():
    """A first step would take twice as long."""
    assert re.findall(r"^#include.*", skeleton("cpu.cpp"), flags=re.MULTILINE) == [cpp.SLOT]


def test_no_golden_code_gives_the_compiler_cause_to_warn(tmp_path):
    """All in one file, each kernel in a namespace, so that this takes a second instead of a minute."""
    parts = ["#undef FUSEDOPT_STAGE", "#undef FUSEDOPT_SCALARS"]
    parts += [
        "#define FUSEDOPT_STAGE(k) void run_##k(const Launch& l, Row r) { stage_##k(l, r, 0, 1, nullptr); }"
    ]
    parts += ["#define FUSEDOPT_SCALARS void run(const Launch& l, Row r) { scalars(l, r); }"]
    bodies = [body for name in golden.NAMES for body in golden.kernels(name)]
    called = {line for body in bodies for line in body.splitlines() if line.startswith("FUSEDOPT_FUNCTION")}
    parts += sorted(called)  # once, and global
    for line in called:
        bodies = [body.replace(line, "") for body in bodies]
    parts += [f"namespace kernel_{k} {{\n{body}\n}}" for k, body in enumerate(bodies)]
    compile_alone(cpp.source(skeleton("cpu.cpp"), "\n".join(parts)), tmp_path, "-fsyntax-only")


def test_a_warning_would_be_noticed(tmp_path):
    body = golden.EXAMPLE.read_text(encoding="utf-8").replace(
        "const auto element", "const T unused = 0;\nconst auto element"
    )
    with pytest.raises(AssertionError, match="unused"):
        compile_alone(cpp.source(skeleton("cpu.cpp"), body), tmp_path, "-fsyntax-only")


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm lists what a library has, and is not here")
@pytest.mark.parametrize("storage", ["kahan", "bf16+8"])
def test_however_long_a_rule_is_its_loops_call_nothing(tmp_path, storage):
    """Four buffers that are rounded with care are more than a compiler puts into a loop, which then has no vectors."""
    param = torch.nn.Parameter(torch.zeros(64, 8, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    opt = rules.Adan([param], storage=storage, backend="cpp")
    opt.step()
    compile_alone(cpp.source(skeleton("cpu.cpp"), opt.kernel_source()), tmp_path)
    listed = subprocess.run(["nm", tmp_path / "kernel.so"], capture_output=True, text=True, check=True).stdout
    functions = {line.split()[-1] for line in listed.splitlines() if line.split()[-2] in "tT"}
    ours = {name for name in functions if name.startswith(("_Z", "fusedopt"))}
    assert ours == {"fusedopt_stage_0"}


LOOPS_OF_VECTORS = {
    "sums of whole tensors": (rules.LARS, torch.float32, {}, "int k = 0; k < lanes", "for_lanes("),
    "a choice that is made once per row": (
        rules.AdamP,
        torch.bfloat16,
        {},
        "int64_t c = 0; c < n",
        "each(n1",
    ),
    "of narrow state, too": (
        rules.AdamP,
        torch.float32,
        {"storage": "bfloat16_sr"},
        "int64_t c = 0; c < n",
        "each(n1",
    ),
    "much in a loop": (
        rules.Prodigy,
        torch.float32,
        {"storage": "int8"},
        "int64_t c = 0; c < n",
        "each(length",
    ),
}
"""By rule: how a loop of the skeleton begins, and how generated code calls for it."""


@pytest.mark.skipif("clang" in toolchain.compiler().version, reason="gcc tells which loops have vectors")
@pytest.mark.parametrize("case", LOOPS_OF_VECTORS)
def test_loops_have_vectors(tmp_path, case):
    """Where gcc leaves it at single numbers, or undoes the loop first, a step takes two to four times as long."""
    rule, dtype, options, loop, call = LOOPS_OF_VECTORS[case]
    param = torch.nn.Parameter(torch.ones(64, 80, dtype=dtype))
    param.grad = torch.ones_like(param)
    opt = rule([param], backend="cpp", **options)
    for _ in range(3):
        opt.step()
    bodies = re.split(r"(?m)^(?=// .*\nusing T =)", opt.kernel_source())
    body = next(text for text in reversed(bodies) if call in text)
    whole = cpp.source(skeleton("cpu.cpp"), body)
    said = compile_alone(whole, tmp_path, "-fopt-info-vec-optimized")
    places = re.findall(r"kernel\.cpp:(\d+):\d+: optimized: loop vectorized", said)
    lines = whole.splitlines()
    assert sum(f"for ({loop};" in lines[int(n) - 1] for n in places) >= body.count(call) > 0


def test_source_wants_one_place_for_the_body():
    assert cpp.source(f"before\n{cpp.SLOT}\nafter", "body") == "before\nbody\nafter"
    for wrong in ("nowhere", f"{cpp.SLOT} {cpp.SLOT}"):
        with pytest.raises(ValueError, match="once"):
            cpp.source(wrong, "body")


# ---------------------------------------------------------------- rendering


def lamb_with_state():
    """Two stages and a number per tensor that is stored."""

    def keep_norm(p, **kwargs):
        return {"norm": p.grad.norm()}

    cbs = [
        keep_norm,
        callbacks.average_grad,
        callbacks.average_sqr_grad,
        callbacks.step_stat,
        callbacks.lamb_step,
    ]
    return trace(cbs, signature(), dict(lr=0.1, mom=0.9, sqr_mom=0.99, eps=1e-6)).program


def test_every_stage_and_the_scalar_stores_have_a_symbol():
    program = lamb_with_state()
    body = cpp.render(program)
    found = cpp.entries(program)
    symbols, scalars = found.stages, found.scalars
    assert symbols == ["fusedopt_stage_0", "fusedopt_stage_1"] and scalars == "fusedopt_scalars"
    assert re.findall(r"^FUSEDOPT_STAGE\((\d)\)", body, flags=re.MULTILINE) == ["0", "1"]
    assert body.count("\nFUSEDOPT_SCALARS\n") == 1
    plain = trace([callbacks.sgd_step], signature(), dict(lr=0.1)).program
    assert cpp.entries(plain).all == ["fusedopt_stage_0"] and "FUSEDOPT_SCALARS" not in cpp.render(plain)


def test_rendering_is_a_pure_function_of_the_program():
    assert cpp.render(lamb_with_state()) == cpp.render(lamb_with_state())


def test_comments_name_the_scalar_and_the_callback_of_each_line():
    program = trace([callbacks.sgd_step], signature(), dict(lr=0.1)).program
    body = cpp.render(program, ["-lr"], "plain SGD")
    assert body.startswith("// plain SGD\nusing T = float;\n")
    assert re.search(r"row\.slot\(launch, 0\)\);\s+// -lr$", body, flags=re.MULTILINE)
    assert re.search(r"\* v\d+;\s+// sgd_step$", body, flags=re.MULTILINE)
    assert not re.search(r"// .*\.py", body), "a moved line must not make another kernel"


@pytest.mark.parametrize("compute", [torch.float32, torch.float64], ids=str)
def test_storage_dtypes_are_spelled_by_buffer_and_the_compute_type_once(compute):
    buffers = {"param": torch.bfloat16, "grad": torch.float16, "state.a": torch.float32, "state.b": compute}
    g = Graph()
    loads = [g.leaf("load", name, kind="F") for name in buffers]
    out = g.op("add", g.op("add", loads[0], loads[1]), g.op("add", loads[2], loads[3]))
    program = Program(
        compute,
        tuple((n, Buffer(d, "F")) for n, d in buffers.items()),
        tuple(g.values),
        (("state.b", out),),
        0,
    )
    body = cpp.render(program)
    assert f"using T = {cpp.TYPES[compute]};" in body
    for k, (name, dtype) in enumerate(buffers.items()):
        if dtype == torch.float16:  # which are converted in loops of their own
            assert f"Near<T, const half> {name}{{row.buffer<const half>({k})}};" in body
        else:
            assert f"{cpp.TYPES[dtype]}* __restrict {name.removeprefix('state.')} = row.buffer<" in body, k


@pytest.mark.parametrize("op", ["to_bfloat16", "high_bits", "neg"])
@pytest.mark.parametrize("other", [None, math.nan, 0.5, 0.1])
def test_what_was_rounded_is_not_rounded_again(op, other):
    """Nor is a choice between such numbers."""
    g = Graph()
    x = g.leaf("load", "param", kind="F")
    out = g.op(op, x)
    if other is not None:
        out = g.op("where", g.op("eq", x, x), out, g.leaf("const", other))
    buffers = tuple((n, Buffer(torch.bfloat16, "F")) for n in ("param", "state.a"))
    body = cpp.render(Program(torch.float32, buffers, tuple(g.values), (("state.a", out),), 0))
    assert (f"store_rounded(a, i, v{out});" in body) == (op != "neg" and other != 0.1)


def test_constants_are_written_to_the_last_digit():
    g = Graph()
    p = g.leaf("load", "param", kind="F")
    for x in (0.1, 1e-45, math.inf, -math.inf, float("nan"), -float("nan")):
        p = g.op("maximum", p, g.leaf("const", x))
    buffers = (("param", Buffer(torch.float64, "F")),)
    body = cpp.render(Program(torch.float64, buffers, tuple(g.values), (("param", p),), 0))
    assert "T(0.1)" in body and "T(1e-45)" in body
    assert ", T(infinity))" in body and ", -T(infinity))" in body
    assert body.count(", T(not_a_number))") == 2
    assert sum(v.attr != v.attr for v in g.values) == 1  # which has no sign


def test_stages_are_handed_the_tables_that_launches_fill():
    """kernels/cpu.cpp declares what csrc/launch.h does: neither can include the other."""
    root = Path(__file__).parents[2]
    launch, kernel, chunks = (
        re.sub(r"//.*", "", (root / file).read_text())
        for file in ("csrc/launch.h", "kernels/cpu.cpp", "csrc/chunks.h")
    )

    def fields(text: str, name: str) -> list[str]:
        return re.search(rf"struct {name} {{(.*?)}};", text, re.DOTALL)[1].split()

    def constant(text: str, name: str) -> int:
        return int(re.search(rf"\b{name} = (\d+)", text)[1])

    assert fields(launch, "Tables") == fields(kernel, "Launch") != []
    words = re.search(r"enum : int64_t {(.*?)}", launch)[1].replace(",", "").split()
    assert words.index("head") == constant(kernel, "head_words") == HEAD
    assert constant(chunks, "chunk_words") == constant(kernel, "chunk_words")
