"""The environment variables: defaults, values, and what a wrong value says."""

from pathlib import Path

import pytest

from fusedopt import env

NAMES = ("FUSEDOPT_BACKEND", "FUSEDOPT_CACHE_DIR", "FUSEDOPT_DEBUG", "CXX")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("value", [None, "", "  "])
def test_defaults(monkeypatch, value):
    if value is not None:
        for name in NAMES:
            monkeypatch.setenv(name, value)
    assert (env.backend(), env.cache_dir(), env.debug_level(), env.cxx()) == ("auto", None, 0, None)


@pytest.mark.parametrize("name", env.BACKENDS)
def test_backend(monkeypatch, name):
    monkeypatch.setenv("FUSEDOPT_BACKEND", f" {name.upper()} ")
    assert env.backend() == name


def test_unknown_backend_names_variable_and_choices(monkeypatch):
    monkeypatch.setenv("FUSEDOPT_BACKEND", "metal")
    with pytest.raises(ValueError, match=r"FUSEDOPT_BACKEND='metal'.*auto, cpp, cuda, triton, reference"):
        env.backend()


def test_cache_dir_is_absolute_and_knows_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", "~/kernels")
    assert env.cache_dir() == tmp_path / "kernels"
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", "kernels")
    assert env.cache_dir() == Path.cwd() / "kernels"


@pytest.mark.parametrize("value", ["4", "-1", "yes", "1.5"])
def test_wrong_debug_level(monkeypatch, value):
    monkeypatch.setenv("FUSEDOPT_DEBUG", value)
    with pytest.raises(ValueError, match=f"FUSEDOPT_DEBUG='{value}'"):
        env.debug_level()


def test_debug_prints_from_its_level_on(monkeypatch, capsys):
    monkeypatch.setenv("FUSEDOPT_DEBUG", "2")  # read at the call, not at import
    for level in (1, 2, 3):
        env.debug(level, f"level {level}")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "level 1\nlevel 2\n")
