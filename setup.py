"""The build: finds the packages, and compiles fusedopt._C if it can. Metadata is in pyproject.toml."""

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
            self.extensions = []
            print(_notice(error), file=sys.stderr, flush=True)

    def _remove_stale(self):
        """A build that fails must not leave, or package, the extension of an earlier one."""
        for extension in self.extensions:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            if self.editable_mode:
                Path("fusedopt", Path(self.get_ext_filename(extension.name)).name).unlink(missing_ok=True)


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


setup(
    packages=[*find_packages(include=["fusedopt", "fusedopt.*"]), "fusedopt.kernels", "fusedopt.csrc"],
    # A wheel needs no more than this mapping; an editable install also needs kernels/__init__.py. The extension's
    # sources are installed because it is compiled where it runs if it could not be here.
    package_dir={"fusedopt.kernels": "kernels", "fusedopt.csrc": "csrc"},
    package_data={
        "fusedopt.kernels": ["*.cpp", "*.cu", "*.cuh", "*.h", "*.inc", "*.py.in"],
        "fusedopt.csrc": ["*.cpp", "*.h"],
    },
    ext_modules=[
        Extension(
            "fusedopt._C",
            [f"csrc/{RECIPE['SOURCE']}"],
            depends=sorted(glob("csrc/*.h")),
            language="c++",
            extra_compile_args=list(RECIPE["FLAGS"]),
            libraries=list(RECIPE["LIBRARIES"]),
        )
    ],
    cmdclass={"build_ext": OptionalBuildExt},
)
