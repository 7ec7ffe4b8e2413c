"""fusedopt installs without a compiler; `kernels/` becomes `fusedopt.kernels`; what wheels and the sources hold."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ["pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "csrc", "fusedopt", "kernels"]
EXTENSION = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
IMPORT = "import fusedopt.kernels as k; print(k.__file__)"


def run_python(*arguments: str, cwd: Path, **environment: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built_without_compiler(tmp_path_factory) -> tuple[Path, str]:
    """A wheel from a machine without a compiler, unpacked, and what its build printed.

    The tree and its build folder hold the extension of an earlier build, which must not slip in.
    """
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    stale = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "fusedopt"
    for place in (source / "fusedopt", stale):
        place.mkdir(parents=True, exist_ok=True)
        (place / EXTENSION).write_bytes(b"stale")
    pip = ["-m", "pip", "wheel", "-v", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    missing = str(folder / "missing")
    printed = run_python(*pip, str(source), cwd=folder, CC=missing, CXX=missing)
    assert not (stale / EXTENSION).exists(), "the build folder has another name: this test tests nothing"
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site", printed


def test_wheel_without_compiler_has_no_extension(built_without_compiler):
    site, printed = built_without_compiler
    assert not list(site.rglob("_C*"))
    assert "the C++ extension was not built" in printed
    assert "--no-build-isolation" in printed


def test_wheel_has_every_module_and_kernel(built_without_compiler):
    site, _ = built_without_compiler
    for top, installed in (("fusedopt",) * 2, ("kernels", "fusedopt/kernels"), ("csrc", "fusedopt/csrc")):
        for path in (ROOT / top).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("_C."):
                assert (site / installed / path.relative_to(ROOT / top)).is_file(), path
    assert not (site / "kernels").exists() and not (site / "tests").exists()


def metadata(site: Path) -> importlib.metadata.Distribution:
    (found,) = importlib.metadata.distributions(name="fusedopt", path=[str(site)])
    return found


def test_wheel_says_who_it_is(built_without_compiler, tmp_path):
    """One version, types, and a command that can be called."""
    site, _ = built_without_compiler
    wheel = metadata(site)
    printed = run_python(
        "-c", "import fusedopt; print(fusedopt.__version__)", cwd=tmp_path, PYTHONPATH=str(site)
    )
    assert wheel.version == printed.strip()
    assert wheel.metadata["Author"] == "fusedopt authors" and "optimizer" in wheel.metadata["Keywords"]
    assert (
        "Typing :: Typed" in wheel.metadata.get_all("Classifier")
        and (site / "fusedopt" / "py.typed").is_file()
    )
    (command,) = wheel.entry_points.select(group="console_scripts")
    assert (command.name, command.value) == ("fusedopt", "fusedopt.__main__:main")


def test_the_long_description_leads_nowhere(built_without_compiler):
    """An index has no docs/: links are their text, and pictures are gone, but not what looks like them in code."""
    text = metadata(built_without_compiler[0]).metadata.get_payload()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (
        text.startswith("# fusedopt")
        and "([docs/gpu.md](docs/gpu.md#measured))" in readme
        and "(docs/gpu.md)" in text
    )
    assert "const auto element = [&](int64_t i) {" in text and "![" in readme and "![" not in text
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    assert not re.findall(r"\]\((?!https?://)", prose)


def test_wheel_imports(built_without_compiler, tmp_path):
    site, _ = built_without_compiler
    printed = run_python("-c", IMPORT, cwd=tmp_path, PYTHONPATH=str(site))
    assert Path(printed.strip()) == site / "fusedopt" / "kernels" / "__init__.py"


def test_this_install_imports(tmp_path):
    """From outside the repository: the install itself, editable under `make setup`, finds the kernels."""
    printed = run_python("-c", IMPORT, cwd=tmp_path)
    assert Path(printed.strip()).is_file()


def test_a_tree_runs_without_being_installed(tmp_path):
    printed = run_python("-S", "-c", TREE, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert Path(printed.strip()) == ROOT / "kernels" / "__init__.py"


TREE = f"""
import site, sys
site.addsitedir = lambda *_: None  # no editable install's finder
sys.path += {[p for p in sys.path if p.endswith("-packages")]!r}
import fusedopt.kernels
print(fusedopt.kernels.__file__)
"""


# -- With and without the extension, and the sources


@pytest.fixture
def tracked_tree(tmp_path) -> Path:
    """A copy of what git tracks, or of all that an unpacked source distribution holds."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        names = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    else:
        names = (ROOT / "fusedopt.egg-info" / "SOURCES.txt").read_text().splitlines()
    for name in names:
        if (ROOT / name).is_file():  # one may be deleted, and not committed yet
            (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "tree" / name)
    return tmp_path / "tree"


def build(tree: Path, what: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"import setuptools.build_meta as build; build.build_{what}('dist')"
    environment = os.environ | environment
    return subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True
    )


def test_the_sources_are_complete(tracked_tree):
    """Tests, documents and benchmarks run from an unpacked source distribution, so it has every tracked file."""
    tracked = {
        path.relative_to(tracked_tree).as_posix() for path in tracked_tree.rglob("*") if path.is_file()
    }
    (tracked_tree / "fusedopt" / EXTENSION).write_bytes(b"of this machine")
    done = build(tracked_tree, "sdist")
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (tracked_tree / "dist").iterdir()
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    assert len(tracked) > 400 and not tracked - packed
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]


def test_a_wheel_for_every_platform(tracked_tree):
    done = build(tracked_tree, "wheel", FUSEDOPT_EXTENSION="0")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tracked_tree / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fusedopt/csrc/module.cpp" in names and not [name for name in names if name.endswith(".so")]


def test_a_wheel_that_was_to_have_the_extension_is_not_made_without(tracked_tree):
    done = build(tracked_tree, "wheel", FUSEDOPT_EXTENSION="1", CC="/missing", CXX="/missing")
    assert done.returncode and "/missing" in done.stderr and not list(tracked_tree.glob("dist/*"))
    done = build(tracked_tree, "wheel", FUSEDOPT_EXTENSION="yes")
    assert done.returncode and "FUSEDOPT_EXTENSION='yes': expected 0" in done.stderr


@pytest.fixture
def old_setuptools(tmp_path):
    (tmp_path / "setuptools" / "command").mkdir(parents=True)
    for name, text in {
        "__init__": "__version__ = '65.5.0'\nExtension = find_packages = setup = None",
        "command/__init__": "",
        "command/build_ext": "build_ext = object",
    }.items():
        (tmp_path / "setuptools" / f"{name}.py").write_text(text)
    return tmp_path


def test_an_old_setuptools_is_one_line(old_setuptools):
    command = [sys.executable, "setup.py", "egg_info"]
    environment = os.environ | {"PYTHONPATH": str(old_setuptools)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == ""
    for part in ("setuptools 77 or later", "65.5.0", "pip install --upgrade setuptools"):
        assert part in line


def made(*arguments: str) -> list[str]:
    """The commands that make would run for a target, in a tree without environments."""
    command = ["make", "-n", "-B", *arguments]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [line for line in printed.splitlines() if " -m pip " in line and "--without-pip" not in line]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("arguments", [["setup", "VENV=.venv-none"], ["test-torch", "TORCH=2.14.1"]])
def test_fastai_is_installed_last_so_that_pip_has_nothing_to_complain_about(arguments):
    """pip names the requirements of an installed package that are missing whenever it installs one of the others."""
    commands = made(*arguments)
    about = [k for k, line in enumerate(commands) if "fastai" in line]
    assert "uninstall" in commands[about[0]] and "--no-deps" in commands[about[-1]]
    assert len(about) == 2 and about[-1] == len(commands) - 1


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_another_torch_has_an_environment_of_its_own():
    commands = "\n".join(made("test-torch", "TORCH=2.14.1"))
    assert "torch==2.14.1" in commands
    assert ".venv-torch-2.14.1/bin/python" in commands and " .venv/bin" not in commands


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_says_what_there_is_to_make():
    printed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert re.findall(r"^make (\S+) +\w", printed, re.M) == targets.split()
    assert max(map(len, printed.splitlines())) <= 120


def test_constraints_are_for_every_python_that_is_claimed():
    """Exactly one line for a package and a Python; torch's lines are left out for another torch by their names."""
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    names = {pin.name for pin in pins}
    for python in ("3.10", "3.11", "3.13"):
        environment = {"python_version": python}
        found = [pin.name for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
        assert len(found) == len(set(found)) and set(found) == names
