"""The build: finds the packages, compiles fusedopt._C if it can, and makes the long description of README.md.

The other metadata is in pyproject.toml.
"""

import os
import re
import runpy
import sys
from glob import glob
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

RECIPE = runpy.run_path(str(Path(__file__).with_name("fusedopt") / "extension" / "recipe.py"))
if (
    int(setuptools.__version__.split(".")[0]) < RECIPE["SETUPTOOLS"]
):  # it would refuse pyproject.toml in forty lines
    sys.exit(
        f"fusedopt is built by setuptools {RECIPE['SETUPTOOLS']} or later, and here is {setuptools.__version__}. Type "
        "`pip install --upgrade setuptools`, or leave --no-build-isolation out."
    )


# FUSEDOPT_EXTENSION=0 makes a wheel for every platform, and 1 has a build fail that cannot make the extension.
WANTED = os.environ.get("FUSEDOPT_EXTENSION", "").strip()
if WANTED not in ("", "0", "1"):
    sys.exit(
        f"FUSEDOPT_EXTENSION={WANTED!r}: expected 0 (without), 1 (not without), or nothing (if it can be built)"
    )


class OptionalBuildExt(build_ext):
    """Compiles against the installed torch; when that fails, the install goes on without the extension.

    `Extension(optional=True)` covers compiler errors only. A torch that is not there is as good a reason.
    """

    def build_extensions(self):
        self.force = True  # setuptools compares file times, and a new torch does not touch the sources
        try:
            self._remove_stale()
            for extension in self.extensions:
                _use_torch(extension)
            super().build_extensions()
        except Exception as error:
            if WANTED == "1":
                raise
            self.extensions = []
            print(_notice(error), file=sys.stderr, flush=True)

    def _remove_stale(self):
        """A build that fails must not leave, or package, the extension of an earlier one."""
        for extension in self.extensions:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            if self.editable_mode:
                Path("fusedopt", Path(self.get_ext_filename(extension.name)).name).unlink(missing_ok=True)


def _extension():
    return Extension(
        "fusedopt._C",
        [f"csrc/{RECIPE['SOURCE']}"],
        depends=sorted(glob("csrc/*.h")),
        language="c++",
        extra_compile_args=list(RECIPE["FLAGS"]),
        libraries=list(RECIPE["LIBRARIES"]),
    )


def _use_torch(extension):
    """Adds torch's headers, libraries and ABI. Imports torch only here, where a failure is caught."""
    headers, libraries = RECIPE["torch_folders"]()
    extension.include_dirs.append(str(headers))
    extension.library_dirs.append(str(libraries))
    extension.define_macros += RECIPE["macros"]().items()


def _notice(error):
    return f"""
*** fusedopt: the C++ extension was not built, and fusedopt is installed without it.
*** Everything works; the first optimizer that steps has it built in the background, if there is a C++20 compiler.
*** Reason: {type(error).__name__}: {error}
*** To have it from the start, in an environment with torch: pip install --no-build-isolation ...
"""


def _long_description():
    """README.md for a package index, which has none of the files that its links and pictures lead to.

    A link leaves its text, which is the file's path in the sources; a picture leaves nothing.
    """
    code = re.compile(r"(^```.*?^```$)", re.M | re.S)
    relative = re.compile(r"(!)?\[([^]]*)\]\((?!https?://|#)[^)]*\)")
    parts = code.split(Path(__file__).with_name("README.md").read_text(encoding="utf-8"))
    parts[::2] = [relative.sub(lambda link: "" if link[1] else link[2], part) for part in parts[::2]]
    return "".join(parts)


setup(
    long_description=_long_description(),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["fusedopt", "fusedopt.*"]), "fusedopt.kernels", "fusedopt.csrc"],
    # A wheel needs no more than this mapping; an editable install also needs kernels/__init__.py. The extension's
    # sources are installed because it is compiled where it runs if it could not be here.
    package_dir={"fusedopt.kernels": "kernels", "fusedopt.csrc": "csrc"},
    package_data={
        "fusedopt": ["py.typed"],
        "fusedopt.kernels": ["*.cpp", "*.cu", "*.cuh", "*.h", "*.inc", "*.py.in"],
        "fusedopt.csrc": ["*.cpp", "*.h"],
    },
    ext_modules=[] if WANTED == "0" else [_extension()],
    cmdclass={"build_ext": OptionalBuildExt},
)
