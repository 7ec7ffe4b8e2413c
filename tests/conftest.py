"""What every test has: a compile cache that is not the user's, a fixed seed, and torch's threads as it found them."""

import os

import pytest
import torch

from fusedopt.runtime import backends, engine

OURS = ("FUSEDOPT_BACKEND", "FUSEDOPT_DEBUG", "FUSEDOPT_CACHE_DIR")


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
    """One private cache folder for the whole run: nothing of the user's is touched, and nothing is compiled twice."""
    before = {name: os.environ.pop(name, None) for name in OURS}
    folder = tmp_path_factory.mktemp("compile_cache")
    os.environ["FUSEDOPT_CACHE_DIR"] = str(folder)
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


@pytest.fixture
def nothing_compiled(monkeypatch):
    """As in a fresh process: no kernel is loaded, no trace is known."""
    monkeypatch.setattr(backends, "_made", {})
    engine._known_traces.cache_clear()
    yield
    engine._known_traces.cache_clear()
