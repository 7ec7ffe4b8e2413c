"""What every test has: a compile cache that is not the user's, a fixed seed, and torch's threads as it found them."""

import os
import shutil
import tracemalloc
import warnings
from pathlib import Path

import devices
import pytest
import torch
from filelock import FileLock

from fusedopt import backends
from fusedopt.extension import leaf
from fusedopt.step import buckets

OURS = ("FUSEDOPT_BACKEND", "FUSEDOPT_DEBUG", "FUSEDOPT_CACHE_DIR")
ROOT = Path(__file__).parents[1]
LONGEST = (
    "test_rules",
    "test_triton_interpreter",
    "test_integrations",
    "test_gpu_script",
    "test_every_optimizer",
    "test_packages",
    "test_fuse",
    "test_scaling",
    "test_matrices",
    "test_sums",
    "test_papers",
    "test_storage_table",
    "test_benchmarks",
    "test_distributed_classes",
    "test_triton",
    "test_distributed",
    "test_rows",
    "test_externs",
    "test_warm",
    "test_dtypes_layouts",
    "test_peers",
    "test_cuda_launch",
    "test_site",
    "test_stress",
    "test_nvrtc",
    "test_cuda_blocks",
    "test_extension",
    "test_examples",
    "test_typing",
    "test_gate",
)


def pytest_configure(config):
    """Tests run from a tree that nobody has installed, too: what they start finds it, and it gets its extension."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the header says it
        leaf.seek(wait=True)
    devices.use(config.getoption("--device"))


def pytest_report_header(config):
    works, reason = leaf.extension_status()
    return f"extension: {'' if works else 'not in use, so the tests that need it are skipped: '}{reason}"


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="where tests that name no backend of their own make their tensors; "
        "what runs on cuda is in benchmarks/gpu/checks.py",
    )
    parser.addoption(
        "--all-architectures",
        action="store_true",
        help="compile GPU kernels for every architecture and dtype, as make architectures does; else for one",
    )
    parser.addoption("--pictures", metavar="FOLDER", help="where test_site.py puts what a browser shows")


def pytest_collection_modifyitems(config, items):
    """With several workers the files that take longest are handed out first, so that all end at about the same time."""
    if not config.getoption("--all-architectures"):
        skip = pytest.mark.skip(reason="this needs --all-architectures")
        for item in items:
            if item.get_closest_marker("all_architectures"):
                item.add_marker(skip)
    for item in items if devices.DEVICE.type != "cpu" else ():
        for mark in item.iter_markers("cpu_only"):
            item.add_marker(pytest.mark.skip(reason=f"this is for the CPU only: {mark.args[0]}"))
    if hasattr(config, "workerinput"):
        rank = {name: k for k, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_generate_tests(metafunc):
    """``compiled``: each backend that compiles for the device."""
    if "compiled" in metafunc.fixturenames:
        metafunc.parametrize("compiled", devices.COMPILED)


@pytest.fixture
def all_architectures(pytestconfig):
    return pytestconfig.getoption("--all-architectures")


@pytest.fixture(scope="session", autouse=True)
def compile_cache(request, tmp_path_factory):
    """One private cache folder for the whole run: nothing of the user's is touched, and nothing is compiled twice.

    The workers of pytest-xdist share it, as processes share a user's cache, and so does a pytest that a test starts.
    """
    before = {name: os.environ.pop(name, None) for name in OURS}
    base = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # in a worker: its folder is in that of the run
        base = base.parent
    folder = Path(os.environ.get("FUSEDOPT_TESTS_CACHE") or base / "compile_cache")
    folder.mkdir(mode=0o700, exist_ok=True)
    os.environ["FUSEDOPT_CACHE_DIR"] = str(folder)
    if leaf.native is not None:  # an extension that was built for these tests serves what they start
        for file in Path(leaf.native.__file__).parent.glob("extension_*"):
            with FileLock(base / "extension.lock"):
                if not (folder / file.name).exists():
                    shutil.copy(file, folder)
    yield folder
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def same_start():
    """Every test sees the same random numbers, and leaves torch's number of threads alone."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    assert not tracemalloc.is_tracing(), (
        "memory is traced still: Python takes five times as long from here on"
    )


@pytest.fixture
def one_thread(same_start):
    """Tiny models gain nothing from a second thread, and stall where it is busy."""
    torch.set_num_threads(1)


@pytest.fixture
def nothing_compiled(monkeypatch):
    """As in a fresh process: no kernel is loaded, no trace is known."""
    monkeypatch.setattr(backends, "made", {})
    buckets.known_traces.cache_clear()
    yield
    buckets.known_traces.cache_clear()
