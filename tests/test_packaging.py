"""fusedopt installs without a compiler, and `kernels/` becomes `fusedopt.kernels`."""

import os
import shutil
import subprocess
import sys
import sysconfig
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
    for top, installed in (("fusedopt", "fusedopt"), ("kernels", "fusedopt/kernels")):
        for path in (ROOT / top).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("_C."):
                assert (site / installed / path.relative_to(ROOT / top)).is_file(), path
    assert not (site / "kernels").exists() and not (site / "tests").exists()


def test_wheel_imports(built_without_compiler, tmp_path):
    site, _ = built_without_compiler
    printed = run_python("-c", IMPORT, cwd=tmp_path, PYTHONPATH=str(site))
    assert Path(printed.strip()) == site / "fusedopt" / "kernels" / "__init__.py"


def test_this_install_imports(tmp_path):
    """From outside the repository: the install itself, editable under `make setup`, finds the kernels."""
    printed = run_python("-c", IMPORT, cwd=tmp_path)
    assert Path(printed.strip()).is_file()
