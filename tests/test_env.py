"""The environment variables: defaults, values, and what a wrong value says."""

import logging
import os
import subprocess
import sys
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


class Unprintable:
    def __str__(self):
        raise AssertionError("nobody asked")


def test_debug_is_logged_where_its_topic_is_enabled(caplog, capsys):
    with caplog.at_level("DEBUG", "fusedopt.source"):
        env.debug(1, Unprintable())
        env.debug(2, "a kernel's", "source, 100%")
        env.debug(3, Unprintable())
    assert caplog.record_tuples == [("fusedopt.source", logging.DEBUG, "a kernel's\nsource, 100%")]
    assert capsys.readouterr() == ("", ""), "the application's handlers have it"


def test_what_is_logged_goes_to_stderr_where_nobody_has_set_up_logging(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])
        env.logger.info("this takes a %s", "minute")
        env.logger.debug("a detail")
    assert capsys.readouterr() == ("", "this takes a minute\n")


def run(code, *arguments, **environment):
    """A process of its own, in which nothing of fusedopt is imported yet."""
    environment = os.environ | environment | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "")
    return done.stderr


def test_debug_reaches_stderr_past_an_applications_logging(tmp_path):
    """And the logging of an application that wants nothing of it has nothing."""
    code = (
        "import logging, sys; from fusedopt import env; logging.basicConfig(filename=sys.argv[1], level='INFO');"
        "env.debug(1, 'shown'); logging.getLogger('app').info('own')"
    )
    assert run(code, tmp_path / "log", FUSEDOPT_DEBUG="1") == "shown\n"
    assert (tmp_path / "log").read_text() == "INFO:app:own\n"


def test_logging_may_be_set_up_before_the_import():
    code = (
        "import logging; logging.basicConfig(format='%(name)s, %(filename)s: %(message)s');"
        "logging.getLogger('fusedopt').setLevel('DEBUG'); from fusedopt import env; env.debug(3, 'words')"
    )
    assert run(code, FUSEDOPT_DEBUG="3") == "fusedopt.compiler, <string>: words\n"
