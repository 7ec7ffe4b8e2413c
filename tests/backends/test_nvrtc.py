"""What NVRTC makes of generated CUDA C++, for GPUs that need not be here, and how compiling fails."""

import ctypes
import importlib.util
import re
import sys
from pathlib import Path

import cuda_kernels
import golden
import pytest
import sass
import test_blocks
import torch
from test_cuda import all_ops

from fusedopt.backends.cuda import nvrtc
from fusedopt.backends.cuda import render as cuda
from fusedopt.compile import BuildError
from fusedopt.ir.stages import stages
from fusedopt.kernels import source as skeleton

try:
    nvrtc.nvrtc()
    MISSING = ""
except BuildError as error:
    MISSING = str(error)
needs_nvrtc = pytest.mark.skipif(bool(MISSING), reason=MISSING)
needs_cuobjdump = pytest.mark.skipif(
    sass.cuobjdump() is None, reason="cuobjdump comes with triton, which is not here"
)

every_arch = pytest.mark.parametrize(
    "arch", [sass.ARCHS[0], *(pytest.param(a, marks=pytest.mark.all_architectures) for a in sass.ARCHS[1:])]
)

REGISTERS = 128
"""Two blocks of 256 threads then fit the 65,536 registers of a multiprocessor: while one waits, the other computes."""
IN_FLIGHT = 8
"""Elements of each buffer that a thread has under way: `in_flight` of the skeleton."""


def wanted(program, stage):
    """Bytes that a stage loads and stores per element, by the program's own count."""
    size = {name: buffer.dtype.itemsize for name, buffer in program.buffers}
    loads, stores = [size[n] for n in stage.loads(program)], [size[n] for n, _ in stage.stores]
    assert sum(loads) + sum(stores) == stage.bytes_per_element(program)
    return loads, stores


# ---------------------------------------------------------------- gates: every named optimizer × dtypes × architectures


@needs_nvrtc
@needs_cuobjdump
@every_arch
def test_nothing_spills_and_every_access_of_the_main_path_has_128_bits(arch):
    functions, log = sass.compiled(arch)
    assert functions.keys() == sass.kernels().keys() | sass.scalar_functions() and sass.scalar_functions()
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) == len(functions) and set(spills) == {("0", "0", "0")}
    for name, (program, stage) in sass.kernels().items():
        f, (loads, stores) = functions[name], wanted(program, stage)
        assert f.registers <= REGISTERS and (f.stack, f.local) == (0, 0), name
        assert f.count(r"(LDL|STL)\b.*") == 0, name
        assert f.count(r"LDG\.E\.128.*") * 16 == sum(loads) * IN_FLIGHT, name
        assert f.count(r"STG\.E\.128.*") * 16 == sum(stores) * IN_FLIGHT, name
        # The other path has two copies of the element, each with one load per buffer, and one store.
        assert f.count(sass.LOAD) == 2 * len(loads) and f.count(sass.STORE) == 2 * len(stores), name
        assert f.count(r"STG\.E\.64.*") == len(stage.reductions), name
        known = r"(LDG|STG)\.E(\.128|\.64|\.U16)?(\.CONSTANT|\.STRONG\.\w+)?"
        assert f.count(r"(LD|ST|LDG|STG|RED|ATOM\w*)(\..*)?") == f.count(known), name


@needs_nvrtc
@needs_cuobjdump
@every_arch
def test_nothing_spills_with_numbers_on_the_device_either(arch):
    bodies = cuda_kernels.on_device()
    entry = nvrtc.compile_cubin("on_device", cuda_kernels.together(bodies), arch)
    found = sass.functions(entry.path)
    # The norm's programs, and what is stored once per tensor.
    assert len(found) > len(bodies) > len(cuda_kernels.ON_DEVICE)
    for name, f in found.items():
        assert f.registers <= REGISTERS and (f.stack, f.local) == (0, 0), name


@needs_nvrtc
@needs_cuobjdump
@pytest.mark.parametrize("case", ["torch_AdamW_float32", "fastai_Lamb_bfloat16"])
def test_kernels_with_many_parameters_are_those_with_few(case):
    source = cuda_kernels.together({"k": cuda_kernels.rendered(case)[0].body})
    found = sass.functions(nvrtc.compile_cubin("both", source, "sm_90").path)
    small = [name for name in found if not name.endswith("_big")]
    assert len(found) == 2 * len(small) >= 2
    for name in small:
        assert found[f"{name}_big"].instructions == found[name].instructions
        assert found[f"{name}_big"].registers == found[name].registers


@needs_nvrtc
@needs_cuobjdump
def test_the_table_of_gates_is_the_golden_one(all_architectures):
    """After a change that is meant: `PYTHONPATH=tests python tests/backends/sass.py`, and read the difference."""
    columns = range(len(sass.ARCHS) if all_architectures else 1)
    expected = golden.gates(sass.GATES, columns)
    if expected.splitlines()[0] != f"NVRTC {nvrtc.nvrtc().version}":
        pytest.skip(f"registers differ between compilers, and the table is {expected.splitlines()[0]}'s")
    assert sass.table([sass.ARCHS[k] for k in columns]) == expected
    assert golden.gates(sass.GATES, range(len(sass.ARCHS))) == sass.GATES.read_text(encoding="utf-8")


@needs_nvrtc
@needs_cuobjdump
def test_sources_are_those_compiled_for_all_architectures():
    import architectures

    compilers, digest = architectures.FILE.read_text(encoding="utf-8").splitlines()
    if compilers != next(architectures.sources()):
        pytest.skip(f"other compilers make other code, and it was looked at as {compilers} makes it")
    assert digest == architectures.digest(), (
        "GPU kernels have changed: `make architectures` compiles them all"
    )


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_100", marks=pytest.mark.all_architectures)])
def test_no_product_is_contracted_and_division_and_root_are_ieee(arch):
    """In PTX: the assembler then expands division and root, with fused multiply-adds of their own, and nothing else."""
    found = sass.ptx(sass.source(), arch)
    assert found.keys() == sass.kernels().keys() | sass.scalar_functions()
    for name, (program, stage) in sass.kernels().items():
        code = found[name]
        arithmetic = {
            i for i in code if re.match(r"(add|sub|mul|div|sqrt|fma|mad|rcp|rsqrt)\.\w*\.?\w*\.?f\d", i)
        }
        assert arithmetic, name
        for instruction in arithmetic:
            assert re.fullmatch(r"(add|sub|mul|div|sqrt)\.rn\.f(32|64)", instruction), (name, instruction)
        assert not any("approx" in i or "ftz" in i or i.startswith(("fma", "mad.rn")) for i in code), name
        # Of the element function there are ten copies: eight in registers, two in the other path. At most: a product
        # of numbers per tensor stands outside of the loop, and what nobody needs nowhere.
        ops = [program.values[i].op for i in stage.values if program.values[i].kind == "F"]
        for op in ("div", "sqrt"):
            once = sum(program.values[i].op == op for i in stage.values if program.values[i].kind == "S")
            means = sum(program.values[i].op == "mean" for i in stage.values) if op == "div" else 0
            count = sum(n for i, n in code.items() if i.startswith(f"{op}.rn"))
            assert 10 * ops.count(op) <= count <= 10 * ops.count(op) + once + means, (name, op)
        stored = [(program.buffer[n].dtype, i) for n, i in stage.stores]
        for dtype, instruction in ((torch.bfloat16, "cvt.rn.bf16.f32"), (torch.float16, "cvt.rn.f16.f32")):
            rounded = [
                i for d, i in stored if d == dtype
            ]  # a value stored to two buffers may be rounded once
            assert 10 * len(set(rounded)) <= code[instruction] <= 10 * len(rounded), (name, dtype)


@needs_nvrtc
@needs_cuobjdump
def test_a_kernel_without_division_and_root_has_no_fused_multiply_add():
    functions, _ = sass.compiled("sm_80")
    plain = 0
    for name, (program, stage) in sass.kernels().items():
        ops = {program.values[i].op for i in stage.values}
        if not ops & {"div", "sqrt", "mean"}:
            plain += 1
            assert functions[name].count(r"[FHD]FMA2?(\..*)?") == 0, name
    assert plain >= 10


@needs_nvrtc
@needs_cuobjdump
def test_the_gates_notice_contraction_spills_and_narrow_accesses(monkeypatch):
    """The same readers, on kernels that break the rules."""
    (program, body), *_ = cuda_kernels.rendered("fastai_Lamb_float32")
    good = cuda_kernels.together({"k": body})
    narrow = good.replace("const bool aligned =", "const bool aligned = false &&")
    entry = nvrtc.compile_cubin("narrow", narrow, "sm_80")
    stage = stages(program)[0]
    assert sass.functions(entry.path)["k_stage_0"].count(r"LDG\.E\.128") == 0 < len(stage.loads(program))
    tight = good.replace("resident_blocks = 0", "resident_blocks = 8")
    entry = nvrtc.compile_cubin("tight", tight, "sm_80")
    f = sass.functions(entry.path)["k_stage_1"]
    assert f.registers == 32 and f.stack > 0 and f.count(r"STL\b.*") > 0
    assert re.search(r"k_stage_1\n.* [1-9]\d* bytes spill stores", entry.log)
    sgd = cuda_kernels.together({"k": cuda_kernels.rendered("fastai_SGD_float32")[0].body})
    monkeypatch.setitem(nvrtc.OPTIONS, "fma", True)
    fused = nvrtc.compile_cubin("fused", sgd, "sm_80")
    assert sass.functions(fused.path)["k_stage_0"].count(r"FFMA(\..*)?") > 0


# ---------------------------------------------------------------- other versions


def by_another(source, arch):
    """What the NVRTC of CUDA 12, which the package for tests brings as torch does, has against a source."""
    found = importlib.util.find_spec("nvidia.cuda_nvrtc")
    if found is None:
        pytest.skip("the package nvidia-cuda-nvrtc-cu12 is not installed")
    library = ctypes.CDLL(str(Path(next(iter(found.submodule_search_locations)), "lib", "libnvrtc.so.12")))
    from cuda.core import ProgramOptions

    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = ProgramOptions(arch=arch, **nvrtc.OPTIONS).as_bytes("nvrtc")
    assert (
        library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    )
    status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return log.value.decode() if status else ""


@needs_nvrtc
def test_kernels_compile_with_an_older_nvrtc(monkeypatch):
    """All ops, stages that reduce, joins: on a GPU, NVRTC 13.0 refused lambdas that 13.5 takes."""
    bodies = {"k": cuda_kernels.rendered("fastai_Lamb_float32")[0].body}
    sources = [
        cuda.source(skeleton("cuda.cu"), cuda.render(all_ops(t))) for t in (torch.float32, torch.float64)
    ]
    factored, _ = test_blocks.PROGRAMS["factored matrix"]
    sources += [cuda_kernels.together(bodies), cuda.source(skeleton("cuda.cu"), cuda.render(factored))]
    for source in sources:
        assert by_another(source, "sm_90") == ""
    monkeypatch.delitem(nvrtc.OPTIONS, "device_as_default_execution_space")
    assert "without execution space annotations" in by_another(sources[0], "sm_90")


def test_an_nvrtc_that_is_too_old_is_named(monkeypatch):
    bindings = pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setattr(bindings, "nvrtcVersion", lambda: (0, 12, 2))
    nvrtc._find.cache_clear()
    try:
        with pytest.raises(
            nvrtc.NvrtcNotFound, match=r"NVRTC 12\.2 is here, and kernels need 12\.3 or later"
        ):
            nvrtc.nvrtc()
    finally:
        nvrtc._find.cache_clear()


# ---------------------------------------------------------------- every op


@needs_nvrtc
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.all_architectures)], ids=str
)
def test_every_op_compiles_and_float32_is_not_computed_in_double(dtype):
    source = cuda.source(skeleton("cuda.cu"), cuda.render(all_ops(dtype)))
    nvrtc.compile_cubin("all_ops", source, "sm_80")
    code = sass.ptx(source, "sm_80")["fusedopt_stage_0"]
    if dtype == torch.float32:
        # sin and cos reduce large arguments in double: a conversion, a product, a conversion
        doubles = {i for i in code if "f64" in i}
        assert doubles <= {"cvt.rn.f64.s64", "mul.rn.f64", "cvt.rn.f32.f64"}, doubles


# ---------------------------------------------------------------- compiling


@needs_nvrtc
def test_a_cubin_is_compiled_once_and_found_by_all_that_decides_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path))
    source = cuda.source(skeleton("cuda.cu"), cuda_kernels.EXAMPLE.read_text(encoding="utf-8"))
    first = nvrtc.compile_cubin("adam", source, "sm_90")
    assert first.built and first.path.suffix == ".cubin" and first.path.read_bytes().startswith(b"\x7fELF")
    assert (
        first.source_path.suffix == ".cu"
        and first.source_path.read_text() == source
        and "registers" in first.log
    )
    assert not nvrtc.compile_cubin("adam", source, "sm_90").built
    others = [
        nvrtc.compile_cubin("adam", source, "sm_80"),
        nvrtc.compile_cubin("adam", source + "\n", "sm_90"),
        nvrtc.compile_cubin("adam", source, "sm_90", key_parts=["2"]),
    ]
    assert all(e.built for e in others) and len({first.path, *(e.path for e in others)}) == 4
    tool = nvrtc.nvrtc()
    key = nvrtc.cubin_key(source, "sm_90", tool, [])
    assert key != nvrtc.cubin_key(source, "sm_90", tool._replace(version="1.0"), [])
    monkeypatch.setitem(nvrtc.OPTIONS, "fma", True)
    assert key != nvrtc.cubin_key(source, "sm_90", tool, [])


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_35", "sm_9000", "gfx942", "90"])
def test_an_unsupported_architecture_is_named_with_those_that_are(arch):
    with pytest.raises(nvrtc.UnsupportedArch, match=rf"'{arch}'.*sm_90.*Remedy"):
        nvrtc.compile_cubin("k", "", arch)


@needs_nvrtc
def test_a_source_that_does_not_compile_is_named_with_the_compilers_words(monkeypatch):
    source = 'extern "C" __global__ void k() { undeclared = 1; }'
    with pytest.raises(nvrtc.NvrtcError, match='identifier "undeclared" is undefined') as caught:
        nvrtc.compile_cubin("broken", source, "sm_80")
    assert caught.value.source_path.read_text() == source and str(caught.value.source_path) in str(
        caught.value
    )
    assert "remedy" in str(caught.value) and isinstance(caught.value, BuildError)

    def compile(*args):
        raise AssertionError("it is compiled again")

    monkeypatch.setattr(nvrtc, "_find", lambda: nvrtc.Nvrtc(version, archs, compile))
    version, archs = "13.5", ("sm_80",)
    monkeypatch.setattr(nvrtc, "cubin_key", lambda *args: next(iter(nvrtc._failed)))
    with pytest.raises(nvrtc.NvrtcError, match="undeclared"):
        nvrtc.compile_cubin("broken", source, "sm_80")


@pytest.mark.parametrize("module", ["cuda", "cuda.bindings", "cuda.core"])
def test_without_cuda_core_the_message_says_what_to_install(monkeypatch, module):
    for name in [n for n in sys.modules if n == module or n.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(nvrtc, "_find", nvrtc._find.__wrapped__)
    with pytest.raises(
        nvrtc.NvrtcNotFound, match=r'(?s)cuda.*pip install "fusedopt\[cuda\]".*backend="triton"'
    ):
        nvrtc.compile_cubin("k", "", "sm_80")
