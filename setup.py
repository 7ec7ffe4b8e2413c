"""The build: finds the packages, and compiles fusedopt._C if it can. Metadata is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

REBUILD = "pip install --no-build-isolation -v -e ."


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
    import torch
    from torch.utils import cpp_extension

    extension.include_dirs += cpp_extension.include_paths()
    extension.library_dirs += cpp_extension.library_paths()
    extension.libraries += ["c10", "torch", "torch_cpu", "torch_python"]
    extension.define_macros += [
        ("FUSEDOPT_TORCH_VERSION", f'"{torch.__version__}"'),
        ("_GLIBCXX_USE_CXX11_ABI", str(int(torch.compiled_with_cxx11_abi()))),
    ]


def _notice(error):
    return f"""
*** fusedopt: the C++ extension was not built, and fusedopt is installed without it.
*** Everything works; the host side of a step is slower.
*** Reason: {type(error).__name__}: {error}
*** To try again, with a C++20 compiler and torch installed: {REBUILD}
"""


setup(
    packages=[*find_packages(include=["fusedopt", "fusedopt.*"]), "fusedopt.kernels"],
    # A wheel needs no more than this mapping; an editable install also needs kernels/__init__.py.
    package_dir={"fusedopt.kernels": "kernels"},
    package_data={"fusedopt.kernels": ["*.cpp", "*.cu", "*.cuh", "*.h", "*.inc", "*.py.in"]},
    ext_modules=[
        Extension(
            "fusedopt._C",
            ["csrc/leaf.cpp"],
            depends=["csrc/cuda.h", "csrc/recording.h", "csrc/scalars.h", "csrc/stages.h"],
            language="c++",
            # -fopenmp: without it at::parallel_for is serial. -g0: debug data would cost 9 s.
            extra_compile_args=["-std=c++20", "-O2", "-g0", "-fopenmp", "-fvisibility=hidden"],
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": OptionalBuildExt},
)
