"""The CUDA backend from the optimizer down to the driver, where a stand-in runs the kernels on the CPU.

NVRTC's place is taken by the system's compiler (see cuda_kernels.py), the GPU's memory is the host's.
"""

import copy
import ctypes
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import cuda_kernels
import numpy as np
import pytest
import torch
from cuda_kernels import CASES, STORAGE, rendered
from helpers import assert_same_bits, needs_extension

import fusedopt
from fusedopt import backends, doctor, optim, table
from fusedopt.backends import chunking, upload
from fusedopt.backends.cuda import backend as cuda
from fusedopt.backends.cuda import nvrtc
from fusedopt.backends.cuda import render as renderer
from fusedopt.classes import buckets as class_buckets
from fusedopt.compile import BuildError, cache, toolchain
from fusedopt.extension import leaf
from fusedopt.kernels import source as skeleton
from fusedopt.step import buckets

pytestmark = needs_extension
ROOT = Path(__file__).parent


class Fake:
    """The stand-in: its settings (`fake_…` in the source) are attributes, and `launches` is what was launched."""

    def __init__(self, path):
        object.__setattr__(self, "path", str(path))
        object.__setattr__(self, "library", ctypes.CDLL(str(path)))
        self.library.fake_log.restype = ctypes.c_char_p

    def __getattr__(self, name):
        return ctypes.c_int.in_dll(self.library, f"fake_{name}").value

    def __setattr__(self, name, value):
        ctypes.c_int.in_dll(self.library, f"fake_{name}").value = value

    def fail(self, call, status):
        (ctypes.c_char * 64).in_dll(self.library, "fake_failing").value = call.encode()
        self.status = status

    @property
    def launches(self):
        """(kernel, blocks, threads, stream, scalars came by value, gradients came by value)."""
        lines = self.library.fake_log().decode().splitlines()
        return [(name, *map(int, numbers)) for name, *numbers in map(str.split, lines)]

    def clear(self):
        self.library.fake_clear()


DEFAULTS = dict(version=13000, devices=1, major=9, minor=0, blocks=2, threads=1, status=0, capturing=0)
DEFAULTS |= dict(words=cuda.SMALL, big_words=cuda.BIG)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The stand-in, compiled."""
    folder = tmp_path_factory.mktemp("driver")
    path, tool = folder / "libcuda.so.1", toolchain.compiler()
    source = ROOT / "fake_cuda_driver.cpp"
    command = [*tool.command, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, str(source), "-o", str(path)], check=True)
    return SimpleNamespace(fake=Fake(path), folder=folder, images={})


@pytest.fixture
def fake(built, monkeypatch, nothing_compiled):
    """The stand-in, behind a `cuda` backend for tensors on the CPU."""
    for name, value in DEFAULTS.items():
        setattr(built.fake, name, value)
    built.fake.fail("", 0)
    built.fake.clear()
    backend = cuda.Cuda(built.fake.path)
    backend.device = "cpu"
    monkeypatch.setitem(backends.made, "cuda", backend)
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda *args, **kwargs: image(built, *args))
    monkeypatch.setattr(nvrtc, "nvrtc", lambda: nvrtc.Nvrtc("13.5", ("sm_90",), None))
    yield built.fake
    assert built.fake.library.fake_depth() == 0, "a context was left current"


def image(built, name, source, arch):
    """What stands for a cubin: a library with all named optimizers' kernels, or one of its own for others."""
    before, after = skeleton("cuda.cu").split(renderer.SLOT)
    body = source.removeprefix(cuda.SMALL_ONLY).removeprefix(before).removesuffix(after)
    if not built.images:
        for case in CASES:
            for k, r in enumerate(rendered(case)):
                built.images[r.body] = cuda_kernels.named()._name, f"{case}_{k}_"
    if body not in built.images:
        library = cuda_kernels.emulation(cuda_kernels.together({"k": body}))
        built.images[body] = library._name, "k_"
    path = built.folder / f"{abs(hash((body, arch)))}.image"
    path.write_text(" ".join(built.images[body]))
    return cache.Entry(path, path, True, 0.0, "", "")


@contextmanager
def copies():
    """The tables that are sent to the device."""
    sent, staged = [], upload.Upload._staged
    with mock.patch.object(upload.Upload, "_staged", lambda self, t: sent.append(t.shape) or staged(self, t)):
        yield sent


def parameters(*sizes, dtype=torch.float32):
    return [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in sizes]


def sgd(params, on="cuda", **hypers):
    """SGD with a momentum buffer: the programs of fastai's SGD are among those compiled together."""
    opt = fusedopt.SGD(params, **({"lr": 0.1, "wd": 0.01} | hypers))
    opt.backend = on
    return opt


def give_gradients(params, seed, offset=0):
    """New gradients, in new memory; ``offset`` elements behind an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        room = torch.zeros(p.numel() + offset, dtype=p.dtype)
        room[offset:] = torch.randn(p.numel(), generator=generator).to(p.dtype)
        p.grad = room[offset:].view(p.shape)


def both(make, steps=3, offset=0, schedule=lambda opt, t: None):
    """Parameters after some steps with the CUDA kernels, and with the C++ kernels."""
    out = []
    for on in ("cuda", "cpp"):
        torch.manual_seed(1)
        opt = make(on)
        params = [p for group in opt.param_groups for p in group["params"]]
        for t in range(steps):
            give_gradients(params, seed=t, offset=offset)
            opt.step()
            schedule(opt, t)
        assert {k.backend for k, _ in opt.engine.launched} == {on}
        state = [v for p in params for v in opt.state[p].values() if isinstance(v, torch.Tensor)]
        out.append([t.detach() for t in [*params, *state]])
    return out


def assert_same(make, **how):
    ours, theirs = both(make, **how)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b)


# ---------------------------------------------------------------- every named optimizer


@pytest.mark.parametrize("case", CASES)
def test_named_optimizers_have_the_bits_of_cpp(fake, built, case):
    """Two groups with schedules; tails, tensors without elements, gradients that are not aligned."""
    face, name, dtype = case.split("_")
    row, (storage, state) = table.row(face, name), STORAGE[dtype]

    def make(on):
        params = parameters(1, 1031, 0, 70, 1024, dtype=storage)
        groups = [{"params": params[:2]}, {"params": params[2:]}]
        opt = row.factory(groups, **row.variants[0].kwargs)
        opt.backend, opt.state_dtype = on, state
        opt.param_groups[1]["lr"] *= 0.7
        return opt

    def schedule(opt, t):
        opt.param_groups[0]["lr"] *= 0.9

    for offset in (0, 1):
        ours, theirs = both(make, 7 if row.changes_structure else 3, offset, schedule)
        for a, b in zip(ours, theirs, strict=True):
            if row.reductions:  # sums are rounded once from double, but their order is another
                torch.testing.assert_close(a, b)
            else:
                assert_same_bits(a, b)
    assert all(prefix != "k_" for _, prefix in built.images.values()), "a kernel of its own was compiled"
    assert {slots and gradients for *_, slots, gradients in fake.launches} == {1}


@pytest.mark.parametrize("name", ["Lamb", "Larc"])
def test_tensors_of_many_chunks_are_joined_by_all_threads(fake, name):
    fake.threads = 8

    def make(on):
        opt = getattr(fusedopt, name)(parameters(5 * 65536 + 77, 3, 65536), lr=0.01, wd=0.01)
        opt.backend = on
        return opt

    ours, theirs = both(make, steps=2)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    first, second = fake.launches[:2]
    assert first[0] == "fusedopt_stage_0" and second[0] == "fusedopt_stage_1"


def test_joining_does_not_depend_on_how_many_blocks_there_are(fake, monkeypatch):
    monkeypatch.setattr(cuda, "ALONE", sys.maxsize)
    found = []
    fake.threads = 4
    for blocks in (1, 2, 100):
        fake.blocks = blocks
        backends.made["cuda"]._kernels.clear()
        buckets.known_traces.cache_clear()
        torch.manual_seed(0)
        params = parameters(3 * 65536 + 5)
        opt = fusedopt.Lamb(params, lr=0.01, wd=0.01)
        opt.backend = "cuda"
        give_gradients(params, 1)
        opt.step()
        found.append(params[0].detach())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert [blocks for _, blocks, *_ in fake.launches] == [2, 2, 4, 4, 25, 193]


def test_scalar_state_is_stored_once_for_each_tensor(fake):
    def keep_norm(p, norm=None, **kwargs):
        return {"norm": p.grad.norm()}

    fake.threads = 4

    def make(on):
        steps = [keep_norm, fusedopt.sgd_step]
        return fusedopt.Optimizer(parameters(3 * 65536 + 9, 0, 5), steps, lr=0.1, backend=on)

    ours, theirs = both(make)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert ours[-1].dim() == 0 and ours[-1] > 0
    assert ("fusedopt_scalars", 3, cuda.THREADS, 0, 1, 1) in fake.launches


# ---------------------------------------------------------------- what goes along by value


@pytest.mark.parametrize(
    ("slots", "gradients", "capacities", "expected"),
    [
        (2, 3, (5, 9), (True, True, 5)),
        (2, 4, (5, 9), (True, True, 9)),
        (4, 9, (5, 9), (True, False, 5)),
        (6, 9, (5, 9), (True, False, 9)),
        (10, 9, (5, 9), (False, True, 9)),
        (10, 5, (5, 9), (False, True, 5)),
        (10, 10, (5, 9), (False, False, 5)),
        (2, 4, (5,), (True, False, 5)),
        (0, 0, (5,), (True, True, 5)),
    ],
)
def test_as_much_goes_by_value_as_fits(slots, gradients, capacities, expected):
    assert cuda.carried(slots, gradients, capacities) == expected


def test_an_ordinary_step_copies_nothing_though_its_gradients_are_elsewhere(fake):
    def make(on):
        return sgd(parameters(*range(1, 40)), on)

    kept = []
    with copies() as sent, mock.patch.object(cuda, "Launch", side_effect=cuda.Launch) as prepared:
        counts = []

        def schedule(opt, t):
            kept.extend(p.grad for p in opt.param_groups[0]["params"])  # so that the next are elsewhere
            opt.param_groups[0]["lr"] *= 0.5
            counts.append((prepared.call_count, len(sent)))

        assert_same(make, steps=7, schedule=schedule)
    cuda_counts = counts[:7]
    assert cuda_counts[3:] == [cuda_counts[3]] * 4, "a warm step prepares or copies something"
    n_prepared, n_sent = cuda_counts[-1]
    assert n_sent == 3 * n_prepared  # rows, chunks, tiles


@pytest.mark.parametrize(
    ("tensors", "name", "slots", "gradients"),
    [
        (cuda.SMALL - 2, "fusedopt_stage_0", 1, 1),
        (cuda.SMALL - 1, "fusedopt_stage_0_big", 1, 1),
        (cuda.BIG - 2, "fusedopt_stage_0_big", 1, 1),
        (cuda.BIG - 1, "fusedopt_stage_0", 1, 0),
    ],
)
def test_many_tensors_take_the_smallest_kernel_that_holds_them_or_a_table(
    fake, tensors, name, slots, gradients
):
    with copies() as sent:
        assert_same(lambda on: sgd(parameters(*[1] * tensors), on), steps=4)
    assert {launch[0] for launch in fake.launches} == {name}
    assert {launch[4:] for launch in fake.launches} == {(slots, gradients)}
    uploaded = sum(shape == (tensors,) for shape in sent)
    assert uploaded == (0 if gradients else 4)


@pytest.mark.parametrize(("groups", "kind"), [(100, (1, 1)), (300, (0, 1)), (600, (0, 0))])
def test_many_groups_are_one_launch_with_a_scalar_set_each(fake, groups, kind):
    fake.version = 12000  # so that it takes few groups to have too many

    def make(on):
        each = [{"params": [p], "lr": 0.1 + 0.001 * k} for k, p in enumerate(parameters(*[2] * groups))]
        return sgd(each, on)

    assert_same(make, steps=2)
    assert len(fake.launches) == 2 and {launch[4:] for launch in fake.launches} == {kind}


def test_an_older_driver_gets_small_kernels_and_tables(fake):
    fake.version = 12000
    sources = []
    compile_cubin = nvrtc.compile_cubin
    with mock.patch.object(
        nvrtc, "compile_cubin", lambda n, s, a, **k: sources.append(s) or compile_cubin(n, s, a)
    ):
        assert_same(lambda on: sgd(parameters(*[1] * 600), on))
    assert sources and all(s.startswith("#define FUSEDOPT_SMALL_ONLY\n") for s in sources)
    assert {
        (name, *kind) for name, *_, slots, gradients in fake.launches for kind in [(slots, gradients)]
    } == {("fusedopt_stage_0", 1, 0)}


def test_launches_are_sized_by_the_device_and_go_to_the_current_stream(fake, monkeypatch):
    monkeypatch.setattr(cuda, "_stream", lambda device: 77)
    params = parameters(10 * 8192, 5)
    give_gradients(params, 0)
    sgd(params).step()
    small = parameters(5)
    give_gradients(small, 0)
    sgd(small).step()
    tiny = parameters(*[5] * 9)
    give_gradients(tiny, 0)
    sgd(tiny).step()
    pieces = sum(-(-p.numel() // chunking.TILE) for p in params)
    # nine tensors are for the blocks that run at a time: two multiprocessors with two each
    assert fake.launches == [
        ("fusedopt_stage_0", blocks, cuda.THREADS, 77, 1, 1) for blocks in (pieces, 1, 4)
    ]


def test_no_elements_are_no_launch(fake):
    params = parameters(0, 0)
    give_gradients(params, 0)
    opt = sgd(params)
    opt.step()
    opt.step()
    assert fake.launches == []


def test_a_program_that_touches_nothing_is_no_launch(fake):
    opt = fusedopt.Optimizer(parameters(3), lambda p, **kwargs: None, lr=0.1, backend="cuda")
    give_gradients(opt.param_groups[0]["params"], 0)
    opt.step()
    assert not opt.explain().eager and fake.launches == []


def test_modules_are_unloaded_with_their_kernels(fake):
    before = fake.modules, fake.retained
    params = parameters(5)
    give_gradients(params, 0)
    opt = sgd(params)
    opt.step()
    assert (fake.modules, fake.retained) == (before[0] + 1, before[1] + 1)
    launch = prepared(opt, params)
    module = launch.kernel.handle.module
    assert module.function("fusedopt_stage_0", 256)[1] == 4
    with pytest.raises(RuntimeError, match="cuModuleGetFunction: error 500"):
        module.function("fusedopt_nothing", 256)
    image = b"/nowhere k_"
    with pytest.raises(RuntimeError, match="INVALID_IMAGE"):
        leaf.native.Module(backends.get("cuda").driver(), image, 0)
    assert (fake.modules, fake.retained) == (before[0] + 1, before[1] + 1)
    again = leaf.native.Module(backends.get("cuda").driver(), Path(launch.kernel.source_path).read_bytes(), 0)
    assert fake.modules == before[0] + 2
    del again
    assert (fake.modules, fake.retained) == (before[0] + 1, before[1] + 1)


# ---------------------------------------------------------------- CUDA graphs


def prepared(opt, params, resident=False):
    """A launch over the parameters, of the kernel that the optimizer launched last."""
    kernel = opt.engine.launched[0][0]
    columns = {"param": [p.data for p in params], "grad": [p.grad for p in params]}
    columns = {name: columns[name] for name, _ in kernel.program.buffers}
    sizes = [p.numel() for p in params]
    return backends.get("cuda").prepare(kernel, columns, sizes, [0] * len(params), resident=resident)


@pytest.fixture
def resident(fake):
    """A launch of SGD with resident scalars, its parameters, and scalars that add 1 or 2 to them."""
    params = parameters(3, 70)
    give_gradients(params, 0)
    opt = sgd(params)
    opt.step()
    fake.clear()
    for p in params:
        p.data.zero_()
        p.grad.fill_(-1.0)
    kernel = opt.engine.launched[0][0]
    assert kernel.program.slots == 2
    return prepared(opt, params, resident=True), params, np.array([[1.0, 1.0]]), np.array([[1.0, 2.0]])


def moved(params):
    """By how much all elements were moved since the last call."""
    (distance,) = {float(x) for p in params for x in p.data.flatten()}
    for p in params:
        p.data.zero_()
    return abs(distance)


@contextmanager
def capture():
    with (
        mock.patch.object(upload, "capturing", lambda d: True),
        mock.patch.object(cuda, "capturing", lambda d: True),
    ):
        yield


def test_resident_scalars_are_read_from_the_device_and_sent_when_they_change(fake, resident):
    launch, params, one, two = resident
    with copies() as sent:
        launch.run(one)
        assert moved(params) == 1 and sent == [(1, 2)]
        launch.run(one.copy())
        assert moved(params) == 1 and sent == [(1, 2)]
        launch.run(two)
        assert moved(params) == 2 and len(sent) == 2
        launch.upload(one)
        assert moved(params) == 0 and len(sent) == 3
        launch.run(one)
        assert moved(params) == 1 and len(sent) == 3
    assert {kind[4:] for kind in fake.launches} == {(0, 1)}


def test_what_is_captured_reads_later_scalars(resident):
    """The launch that a graph keeps: the same parameters, with what `upload` put into their memory since."""
    launch, params, one, two = resident
    launch.run(one)
    moved(params)
    with capture():
        launch.run(one)  # a stand-in for the launch that is recorded
    moved(params)
    launch.upload(two)
    with mock.patch.object(upload.Upload, "of", lambda self, table: self._there):
        launch.run(one)  # replayed: nothing is sent
    assert moved(params) == 2


def test_capturing_with_other_scalars_than_the_devices_is_refused(resident):
    launch, params, one, two = resident
    with (
        capture(),
        pytest.raises(RuntimeError, match=r"not on the device yet.*Remedy: do three steps before"),
    ):
        launch.run(one)
    launch.run(one)
    moved(params)
    with capture(), pytest.raises(RuntimeError, match="not on the device yet"):
        launch.run(two)
    with capture(), pytest.raises(RuntimeError, match="not on the device yet"):
        launch.upload(two)
    assert moved(params) == 0
    with capture():
        launch.run(one)
    assert moved(params) == 1


def test_scalars_by_value_are_not_captured(fake):
    params = parameters(3)
    give_gradients(params, 0)
    opt = sgd(params)
    opt.step()
    launch = prepared(opt, params)
    with capture(), pytest.raises(RuntimeError, match=r"repeat.*Remedy: .*resident=True"):
        launch.run(np.array([[1.0, 1.0]]))
    with pytest.raises(RuntimeError, match=r"by value.*resident=True"):
        launch.upload(np.array([[1.0, 1.0]]))


def test_gradients_that_a_graph_copies_keep_their_staging_and_their_place():
    """What later steps send must not be in the graph, and what the graph sends must not be taken for theirs."""
    table, sent = upload.Upload(torch.device("cpu")), np.arange(3)
    there = table.of(sent)
    with capture():
        first = table.of(sent)
        second = table.of(sent + 1)
    assert len({t.data_ptr() for t in (there, first, second)}) == 3
    assert [len(t) for t in table._captured] == [2, 2]
    table.of(sent + 5)
    (staged, target), _ = table._captured
    assert target is first and torch.equal(staged, torch.arange(3)) and torch.equal(first, torch.arange(3))
    assert torch.equal(there, torch.arange(3) + 5) and torch.equal(second, torch.arange(3) + 1)


@pytest.mark.parametrize("name", ["cpp", "cuda"])
def test_upload_changes_what_the_launch_reads(resident, name):
    launch, params, one, two = resident
    if name == "cpp":
        kernel = backends.get("cpp").compile(launch.kernel.program, "SGD", [])
        columns = {"param": [p.data for p in params], "grad": [p.grad for p in params]}
        columns = {n: columns[n] for n, _ in kernel.program.buffers}
        launch = backends.get("cpp").prepare(kernel, columns, [3, 70], [0, 0], resident=True)
        launch.upload(two)
        launch.run(launch.slots)
        assert moved(params) == 2
        launch.run(one)
        launch.upload(two)
        assert (one == two).all() and launch.slots is one
    else:
        launch.upload(two)
        launch.run(two)
        assert moved(params) == 2


# ---------------------------------------------------------------- what can go wrong


def step(on="cuda"):
    params = parameters(5)
    give_gradients(params, 0)
    before = params[0].detach().clone()
    opt = sgd(params, on)
    try:
        opt.step()
    finally:
        assert torch.equal(params[0], before) == (not opt.state[params[0]] and not opt.engine.launched)
    return opt


REFUSED = {
    "no driver": (
        dict(library="/nowhere/libcuda.so.1"),
        r"no NVIDIA driver.*/nowhere.*Remedy: install the driver",
    ),
    "another library": (dict(library="libm.so.6"), r"has no cuInit: it is too old\. Remedy: install a newer"),
    "no device": (dict(fail=("cuInit", 100)), r"cuInit: CUDA_ERROR_NO_DEVICE.*CUDA_VISIBLE_DEVICES"),
    "a broken driver": (
        dict(fail=("cuInit", 999)),
        r"cuInit: CUDA_ERROR_UNKNOWN \(the driver's words\).*restart",
    ),
    "no such device": (dict(devices=0), r"cuDeviceGet: error 101.*make a GPU visible"),
    "an old driver, 200": (
        dict(fail=("cuModuleLoadData", 200), version=12040),
        r"kernel 'SGD', compiled by NVRTC 13\.5.*INVALID_IMAGE.*supports CUDA 12\.4\. Remedy: install a newer driver",
    ),
    "an old driver, 209": (dict(fail=("cuModuleLoadData", 209)), r"NO_BINARY_FOR_GPU.*nvidia-cuda-nvrtc"),
    "an old driver, 222": (
        dict(fail=("cuModuleLoadData", 222)),
        r"UNSUPPORTED_PTX_VERSION.*nvidia-cuda-nvrtc",
    ),
    "no context": (dict(fail=("cuDevicePrimaryCtxRetain", 2)), r"cuDevicePrimaryCtxRetain.*free GPU memory"),
    "an old GPU": (dict(major=6, minor=1), r"GPU 0 has compute capability 6\.1.* needs 7\.0\. Remedy: use"),
}


def refuse(fake, library=None, fail=None, **settings):
    for name, value in settings.items():
        setattr(fake, name, value)
    if fail:
        fake.fail(*fail)
    if library:
        backends.made["cuda"].library = library


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_said_before_anything_changes(fake, case):
    how, message = REFUSED[case]
    refuse(fake, **how)
    for _ in range(2):
        with pytest.raises(BuildError, match=f"(?s){message}") as caught:
            step()
        assert 'backend="triton" or backend="reference"' in str(caught.value)


def test_without_the_extension_it_says_how_to_build_it(fake, monkeypatch):
    monkeypatch.setattr(leaf, "native", None)
    with pytest.raises(BuildError, match=r"cuda backend needs the C\+\+ extension.*Remedy: .*pip install"):
        step()


def test_without_nvrtc_or_for_an_architecture_it_does_not_know(fake, monkeypatch):
    monkeypatch.undo()
    backend = cuda.Cuda(fake.path)
    program = rendered("fastai_SGD_float32")[0].program
    without = mock.patch.object(nvrtc, "_find", lambda: "there is no NVRTC here")
    with without, pytest.raises(nvrtc.NvrtcNotFound, match="there is no NVRTC here"):
        backend.compile(program, "SGD", [], torch.device("cpu"))
    known = nvrtc.Nvrtc("13.5", ("sm_80",), None)
    with (
        mock.patch.object(nvrtc, "_find", lambda: known),
        pytest.raises(nvrtc.UnsupportedArch, match="sm_90"),
    ):
        backend.compile(program, "SGD", [], torch.device("cpu"))


def test_a_kernel_that_does_not_compile_is_named_with_its_source(fake, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(nvrtc, "_failed", {})

    def compile(name, source, arch):
        raise RuntimeError("it does not")

    tool = nvrtc.Nvrtc("13.5", ("sm_90",), compile)
    with mock.patch.object(nvrtc, "_find", lambda: tool), pytest.raises(nvrtc.NvrtcError) as caught:
        cuda.Cuda(fake.path).compile(
            rendered("fastai_SGD_float32")[0].program, "SGD", [], torch.device("cpu")
        )
    assert "it does not" in str(caught.value) and Path(caught.value.source_path).is_file()


def test_a_launch_that_fails_names_the_call_and_the_remedy(fake):
    opt = step()
    fake.fail("cuLaunchKernel", 700)
    with pytest.raises(
        RuntimeError, match=r"cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS.*CUDA_LAUNCH_BLOCKING=1"
    ):
        opt.step()


def test_too_many_words_for_the_kernel_are_refused(fake):
    opt = step()
    launcher = prepared(opt, opt.param_groups[0]["params"])._launcher
    slots = np.zeros(cuda.SMALL)
    with pytest.raises(ValueError, match=rf"{cuda.SMALL + 1} words do not fit .* {cuda.SMALL}"):
        launcher.run(slots.ctypes.data, len(slots), 0, 0)


def test_auto_falls_back_and_says_why(fake, monkeypatch):
    rows = dict(backends.ROWS)
    monkeypatch.setattr(
        backends, "ROWS", {"cuda": rows["cuda"]._replace(device="cpu")} | {"cpp": rows["cpp"]}
    )
    assert [name for name, row in rows.items() if row.device == "cuda"] == ["cuda", "triton"]
    fake.fail("cuInit", 100)
    with pytest.warns(
        RuntimeWarning, match=r"cuda backend cannot be used, so cpp compiles instead.*NO_DEVICE"
    ):
        opt = step("auto")
    assert opt.explain().backend == "cpp"
    fake.fail("", 0)
    backends.made["cuda"]._opened = None
    assert step("auto").engine.launched


# ---------------------------------------------------------------- doctor


def probe(library):
    with mock.patch.object(cuda, "LIBRARY", library):
        return doctor.probe_cuda()


def test_doctor_names_driver_compiler_and_gpus(fake, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = probe(fake.path)
    assert found == doctor.Status(True, "driver for CUDA 13.0, NVRTC 13.5, a fake GPU (sm_90)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no GPU" in probe(fake.path).reason and probe(fake.path).remedy
    found = probe("/nowhere/libcuda.so.1")
    assert (
        not found.works
        and "no NVIDIA driver" in found.reason
        and found.remedy.startswith("install the driver")
    )
    monkeypatch.setattr(leaf, "native", None)
    assert not probe(fake.path).works


# ---------------------------------------------------------------- numbers on the device, and graphs of them


DEVICE = [
    "fastai_Adam",
    "fastai_Lamb",
    "fastai_Lookahead",
    "torch_Adagrad",
    "torch_NAdam",
    "torch_RAdam",
    "torch_SGD",
]


@pytest.mark.parametrize("mode", ["capturable", "amp_fused"])
@pytest.mark.parametrize("case", DEVICE)
def test_with_numbers_on_the_device_steps_have_the_bits_of_cpp(fake, case, mode):
    """Counts are advanced there; with ``amp_fused`` the first step is skipped."""
    row = table.row(*case.split("_"))
    out = []
    for on in ("cuda", "cpp"):
        torch.manual_seed(1)
        params = parameters(1, 1031, 0, 70)
        opt = row.factory(params, **row.variants[0].kwargs, **{mode: True}, backend=on)
        for t in range(4):
            give_gradients(params, seed=t)
            if mode == "amp_fused":
                opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(float(t == 0))
            opt.step()
        state = [v for p in params for v in opt.state[p].values()]
        out.append([t.detach() for t in [*params, *state]])
    for ours, theirs in zip(*out, strict=True):
        if row.reductions:
            torch.testing.assert_close(ours, theirs)
        else:
            assert_same_bits(ours, theirs)


def test_the_norm_is_taken_by_kernels(fake):
    ours, theirs = (parameters(1031, 70) for _ in range(2))
    opts = [optim.AdamW(p, max_grad_norm=0.5, backend=on) for p, on in ((ours, "cuda"), (theirs, "cpp"))]
    for a, b in zip(ours, theirs, strict=True):
        b.data.copy_(a.data)
    for t in range(3):
        for params, opt in zip((ours, theirs), opts, strict=True):
            give_gradients(params, seed=t)
            opt.step()
    torch.testing.assert_close(opts[0].grad_norm, opts[1].grad_norm)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def weighed(p, lr, step=0, **_):
    """Steps by a sum over all parameters, of what depends on numbers of the group and of the state."""
    step += 1
    gain = fusedopt.total(p.grad.data * p.data * lr / step)
    size = fusedopt.total((p.data - gain).abs())
    p.data.sub_(p.grad.data * (lr * (gain.abs() + 1) / size.sqrt()))
    return {"step": step}


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=["", "clipped"])
def test_totals_are_taken_by_kernels(fake, options):
    found = []
    for on in ("cuda", "cpp"):
        torch.manual_seed(0)
        params = parameters(1031, 0, 70)
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.3}]
        opt = fusedopt.Optimizer(groups, weighed, lr=0.1, backend=on, **options)
        for t in range(7):
            give_gradients(params, seed=t)
            if t == 2:
                params[2].grad = None
            opt.step()
        assert opt.engine.steps.repeated >= 1 and opt.explain().eager == ()
        found.append(params)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def graph(fake, monkeypatch):
    """A context in which launches are captured, and a function that replays them."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)

    @contextmanager
    def capture():
        fake.capturing = 1
        try:
            yield
        finally:
            fake.capturing = 0

    for module in (upload, cuda):
        monkeypatch.setattr(module, "capturing", lambda device: bool(fake.capturing))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(fake.capturing))
    return SimpleNamespace(capture=capture, replay=fake.library.fake_replay)


def ready(make, steps=3, **options):
    """An optimizer that may be captured, another that may not, and their parameters; gradients stay where they are."""
    torch.manual_seed(0)
    ours = parameters(1031, 70)
    plain = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    opt = make(ours, lr=0.1, capturable=True, backend="cuda", **options)
    twin = make(plain, lr=0.1, backend="cpp", **options)
    for params in (ours, plain):
        give_gradients(params, seed=0)
    for _ in range(steps):
        opt.step()
        twin.step()
    return opt, twin, ours, plain


def new_gradients(*lists):
    for params in lists:
        torch.manual_seed(5)
        for p in params:
            p.grad.copy_(torch.randn_like(p))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=["", "clipped"])
def test_a_replayed_step_counts_and_follows_the_hyperparameters(graph, options):
    opt, twin, ours, plain = ready(optim.AdamW, **options)
    with graph.capture():
        opt.step()
    for t in range(4):
        new_gradients(ours, plain)
        for o in (opt, twin):
            o.param_groups[0] |= dict(
                lr=0.1 / (t + 1), betas=(0.9 - 0.1 * t, 0.999), weight_decay=0.01 * t + 0.01
            )
            if options and t == 2:
                o.max_grad_norm = 0.25
        opt.upload_hypers()
        graph.replay()
        twin.step()
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7) if options else assert_same_bits(a, b)
    assert opt.state[ours[0]]["step"].item() == twin.state[plain[0]]["step"]


def test_a_replayed_step_takes_totals_anew(graph):
    opt, twin, ours, plain = ready(partial(fusedopt.Optimizer, cbs=weighed))
    with graph.capture():
        opt.step()
    for t in range(4):
        new_gradients(ours, plain)
        for o in (opt, twin):
            o.param_groups[0]["lr"] = 0.1 / (t + 1)
        opt.upload_hypers()
        graph.replay()
        twin.step()
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert opt.state[ours[0]]["step"].item() == twin.state[plain[0]]["step"]


def test_without_the_upload_a_replay_has_the_rate_it_was_captured_with(graph):
    opt, twin, ours, plain = ready(optim.SGD)
    with graph.capture():
        opt.step()
    opt.param_groups[0]["lr"] = 100.0
    graph.replay()
    twin.step()
    assert_same_bits(ours[0], plain[0])


def test_a_rate_that_is_a_tensor_needs_no_upload(graph):
    torch.manual_seed(0)
    (p,) = params = parameters(5)
    start, lr = p.detach().clone(), torch.tensor(0.5)
    opt = optim.SGD(params, lr=lr, capturable=True, backend="cuda")
    p.grad = torch.ones(5)
    for _ in range(3):
        opt.step()
    with graph.capture():
        opt.step()
    torch.testing.assert_close(p.detach(), start - 1.5)
    lr.fill_(2.0)
    graph.replay()
    torch.testing.assert_close(p.detach(), start - 3.5)


def test_graphs_outlive_steps_that_are_not_captured(graph):
    """A new launch takes the old one's place, which the graph still needs, and which still gets its scalars."""
    opt, twin, ours, plain = ready(optim.SGD)
    with graph.capture():
        opt.step()
    opt.engine.bound.clear()
    for o in (opt, twin):
        o.step()
        o.param_groups[0]["lr"] = 0.3
        o.step()
    opt.upload_hypers()
    graph.replay()
    twin.step()
    for a, b in zip(ours, plain, strict=True):
        assert_same_bits(a, b)


def test_capturing_too_early_or_an_optimizer_that_is_not_capturable_is_refused(graph):
    opt, *_ = ready(optim.SGD, steps=0)
    with graph.capture(), pytest.raises(RuntimeError, match="three steps before capturing"):
        opt.step()
    (p,) = parameters(5)
    p.grad = torch.ones(5)
    plain = optim.SGD([p], backend="cuda")
    with graph.capture(), pytest.raises(RuntimeError, match=r"capturable=True|resident=True"):
        plain.step()


def decaying(p, lr, wd, **_):
    if wd != 0:
        p.data.mul_(1 - lr * wd)
    p.data.add_(p.grad.data, alpha=-lr)


def test_hyperparameters_that_want_another_kernel_are_refused(graph):
    (p,) = parameters(5)
    p.grad = torch.ones(5)
    opt = fusedopt.Optimizer([p], decaying, lr=0.1, wd=0.0, capturable=True, backend="cuda")
    with pytest.raises(RuntimeError, match="for groups with capturable=True that have stepped"):
        opt.upload_hypers()
    for _ in range(3):
        opt.step()
    with graph.capture():
        opt.step()
    opt.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(
        RuntimeError, match=r"group 0: a branch that they decide goes another way now.*capture"
    ):
        opt.upload_hypers()
    opt.param_groups[0] |= dict(weight_decay=0.0, lr=0.2)
    opt.upload_hypers()
    before = p.detach().clone()
    graph.replay()
    torch.testing.assert_close(p.detach(), before - 0.2)


def test_steps_of_another_kernel_do_not_keep_a_graph_from_its_numbers(graph):
    """The last step is none that was captured, and would be another one now."""
    ours, plain = parameters(5), parameters(5)
    plain[0].data.copy_(ours[0])
    opt = fusedopt.Optimizer(ours, decaying, lr=0.1, wd=0.0, capturable=True, backend="cuda")
    twin = fusedopt.Optimizer(plain, decaying, lr=0.1, wd=0.0, backend="cpp")
    for params in (ours, plain):
        give_gradients(params, seed=0)
    for _ in range(3):
        opt.step(), twin.step()
    with graph.capture():
        opt.step()
    for t in range(6):
        for o in (opt, twin):
            o.param_groups[0] |= dict(lr=0.1 / (t + 1), weight_decay=0.1 * (t % 2))
        if t % 2:
            opt.step()
        else:
            opt.upload_hypers()
            graph.replay()
        twin.step()
        assert_same_bits(ours[0], plain[0])


# Fused classes in a CUDA graph: their counts have to be on the device, as torch.optim's are with capturable=True, which
# it lets nobody have on a CPU.
CAPTURABLE = ["Adam", "AdamW", "NAdam", "RAdam", "Adadelta", "Adamax", "RMSprop", "Rprop", "ASGD"]


@pytest.fixture
def on_any_device(monkeypatch):
    name = "_get_capturable_supported_devices"
    found = [m for path, m in sys.modules.items() if path.startswith("torch.optim.") and hasattr(m, name)]
    for module in found:
        monkeypatch.setattr(module, name, lambda *args, **kwargs: ["cpu"])


class Heavy(torch.optim.Optimizer):
    """Momentum, which counts nothing."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, dict(lr=lr, momentum=0.9, weight_decay=0.0))
        self.calls = 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.begin()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    mean.mul_(group["momentum"]).add_(p.grad)
                    if group["weight_decay"] != 0:
                        p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(mean, alpha=group["lr"])
                    self.count(self.state[p])
        return loss

    def begin(self):
        pass

    def count(self, state):
        pass


def classes_of(make, steps=4, **options):
    """A fused optimizer that may be captured, and one of the same class, after the same steps."""
    torch.manual_seed(0)
    ours = parameters(1031, 70)
    plain = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    opt, twin = make(ours), make(plain)
    fusedopt.fuse(opt, capturable=True, backend="cuda", **options)
    for params in (ours, plain):
        give_gradients(params, seed=0)
    for _ in range(steps):
        opt.step()
        clipped_step(twin, plain, **options)
    return opt, twin, ours, plain


def clipped_step(opt, params, max_grad_norm=None):
    """A step of clipped gradients, which stay as they are."""
    grads = [p.grad.clone() for p in params]
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
    opt.step()
    for p, grad in zip(params, grads, strict=True):
        p.grad.copy_(grad)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=["", "clipped"])
@pytest.mark.parametrize(
    "make",
    [
        Heavy,
        *(partial(vars(torch.optim)[name], capturable=True, foreach=False) for name in CAPTURABLE),
        partial(torch.optim.AdamW, capturable=True, foreach=True),
    ],
    ids=["Heavy", *CAPTURABLE, "AdamW, foreach"],
)
def test_a_class_that_counts_on_the_device_is_replayed(graph, on_any_device, make, options):
    opt, twin, ours, plain = classes_of(make, **options)
    assert opt.explain().launches > 0 and not opt.explain().eager
    with graph.capture():
        opt.step()
    for t in range(4):
        new_gradients(ours, plain)
        for o in (opt, twin):
            o.param_groups[0]["lr"] = 0.01 / (t + 1)
        opt.upload_hypers()
        graph.replay()
        clipped_step(twin, plain, **options)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for p, q in zip(ours, plain, strict=True):
        for key, value in opt.state[p].items():
            torch.testing.assert_close(value, twin.state[q][key], rtol=1e-5, atol=1e-6)


def test_without_the_upload_a_class_has_the_rate_it_was_captured_with(graph):
    opt, twin, ours, plain = classes_of(Heavy)
    with graph.capture():
        opt.step()
    opt.param_groups[0]["lr"] = 100.0
    graph.replay()
    twin.step()
    torch.testing.assert_close(ours, plain)
    twin.param_groups[0]["lr"] = 0.5
    opt.param_groups[0]["lr"] = 0.5
    opt.upload_hypers()
    graph.replay()
    twin.step()
    torch.testing.assert_close(ours, plain)


def test_steps_of_another_kernel_go_on_beside_replays(graph):
    """The last step is none that was captured, and the graph's launches get their numbers all the same."""
    opt, twin, ours, plain = classes_of(Heavy)
    with graph.capture():
        opt.step()
    for t in range(6):
        for o in (opt, twin):
            o.param_groups[0] |= dict(lr=0.1 / (t + 1), weight_decay=0.1 * (t % 2))
        if t % 2:
            opt.step()
        else:
            opt.upload_hypers()
            graph.replay()
        twin.step()
        torch.testing.assert_close(ours, plain)
    assert len(opt.explain().compiled) == 2


def test_a_closure_of_a_class_is_captured(graph):
    opt, twin, ours, plain = classes_of(Heavy, steps=0)
    for _ in range(3):
        opt.step(lambda: 7.0), twin.step()
    with graph.capture():
        assert opt.step(lambda: 7.0) == 7.0
    graph.replay(), twin.step()
    torch.testing.assert_close(ours, plain)


class OnGroups(Heavy):
    def begin(self):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1


class OnSelf(Heavy):
    def begin(self):
        self.calls += 1


class OnState(Heavy):
    def count(self, state):
        state["count"] = state.get("count", 0) + 1


class OnHost(Heavy):
    """As torch.optim's have it by default."""

    def count(self, state):
        state.setdefault("count", torch.zeros(())).add_(1)


class Multiplying(Heavy):
    def count(self, state):
        state["mean"].copy_(torch.linalg.qr(state["mean"].view(1, -1))[1].view(-1))


class Drawing(Heavy):
    def count(self, state):
        state["mean"].add_(torch.rand(()))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            OnGroups,
            r"it leaves self\.param_groups\[0\]\['count'\] on the host, .*Remedy: keep it in a tensor",
        ),
        (OnSelf, r"it leaves self\.calls on the host"),
        (OnState, "the state 'count' is a number of the host"),
        (OnHost, "the state 'count' is a number of the host"),
        (torch.optim.AdamW, "the state 'step' is a number of the host, .*capturable=True"),
        (Multiplying, "it calls torch between kernels .*Remedy: call step"),
        (Drawing, r"it runs as it was written, unfused: .*has no fused form\. Remedy: .*unfuse"),
    ],
)
@pytest.mark.filterwarnings("ignore:fusedopt. .* runs as it was written")
def test_what_a_class_keeps_on_the_host_is_no_part_of_a_graph(graph, monkeypatch, make, why):
    """Every tensor of one number is taken for one that the host keeps, as torch.optim's counts on a GPU are."""
    monkeypatch.setattr(class_buckets, "on_host", lambda value, p: torch.is_tensor(value) and not value.dim())
    opt, twin, ours, plain = classes_of(make)
    before = copy.deepcopy((ours, opt.state_dict(), opt.param_groups))
    with graph.capture(), pytest.raises(RuntimeError, match=f"captured into a CUDA graph.*: {why}"):
        opt.step()
    assert repr((ours, opt.state_dict(), opt.param_groups)) == repr(before)
    opt.step(), twin.step()
    if make is not Drawing:
        torch.testing.assert_close(ours, plain)


def test_without_capturable_a_class_is_captured_as_it_was_written(graph):
    opt = fusedopt.fuse(OnSelf(parameters(5)), backend="cuda")
    give_gradients(opt.param_groups[0]["params"], seed=0)
    with graph.capture():
        for _ in range(4):
            opt.step()
    assert opt.calls == 4 and not opt.explain().launches and not hasattr(opt, "upload_hypers")


def test_a_class_that_is_captured_too_early_is_refused(graph):
    opt, *_ = classes_of(Heavy, steps=0)
    with pytest.raises(RuntimeError, match="were fused with capturable=True and have stepped"):
        opt.upload_hypers()
    for _ in range(2):
        with (
            graph.capture(),
            pytest.raises(RuntimeError, match=r"no step like it was done.*three steps before"),
        ):
            opt.step()
        opt.step()
    opt.step()
    opt.param_groups[0]["weight_decay"] = 0.5
    with (
        graph.capture(),
        pytest.raises(RuntimeError, match=r"none of those that were done before.*three steps"),
    ):
        opt.step()
    with graph.capture(), pytest.raises(RuntimeError, match="no step with a closure was done before"):
        opt.step(lambda: None)


def test_numbers_that_changed_are_sent_before_a_class_is_captured(graph):
    opt, twin, ours, plain = classes_of(Heavy)
    for o in (opt, twin):
        o.param_groups[0]["lr"] = 0.5
    with graph.capture(), pytest.raises(RuntimeError, match="not on the device yet"):
        opt.step()
    opt.upload_hypers()
    with graph.capture():
        opt.step()
    graph.replay(), twin.step()
    torch.testing.assert_close(ours, plain)


def test_numbers_of_a_class_that_want_another_kernel_are_refused(graph):
    opt, twin, ours, plain = classes_of(Heavy)
    with graph.capture():
        opt.step()
    opt.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(RuntimeError, match=r"goes another way now.*Remedy: capture the step again"):
        opt.upload_hypers()
    opt.param_groups[0] |= dict(weight_decay=0.0, maximize=True)
    with pytest.raises(RuntimeError, match=r"is not the one to do now: .*Remedy: capture the step again"):
        opt.upload_hypers()
    del opt.param_groups[0]["maximize"]
    for o in (opt, twin):
        o.param_groups[0]["lr"] = 0.2
    opt.upload_hypers()
    graph.replay(), twin.step()
    torch.testing.assert_close(ours, plain)
    fusedopt.unfuse(opt)
    assert not hasattr(opt, "upload_hypers")
