"""How the extension `fusedopt._C` is compiled: setup.py runs this file, and extension/build.py imports it.

It imports nothing of fusedopt, since setup.py runs before there is one, and no setuptools, which an environment with
torch need not have. torch is imported where a failure is caught.
"""

import sysconfig
from pathlib import Path

SETUPTOOLS = 77  # the oldest that understands pyproject.toml
SOURCE = "module.cpp"
# -g0: debug data would cost 9 s. No -fopenmp: see csrc/parallel.h.
FLAGS = ("-std=c++20", "-O2", "-g0", "-fvisibility=hidden")
LIBRARIES = ("c10", "torch", "torch_cpu", "torch_python")


def torch_folders() -> tuple[Path, Path]:
    """torch's headers, pybind11's among them, and its libraries."""
    import torch

    root = Path(torch.__file__).parent
    return root / "include", root / "lib"


def macros() -> dict[str, str]:
    """What the code has to know of the torch that it will run with."""
    import torch

    return {
        "FUSEDOPT_TORCH_VERSION": f'"{torch.__version__}"',
        "_GLIBCXX_USE_CXX11_ABI": str(int(torch.compiled_with_cxx11_abi())),
    }


def command(compiler: list[str], source: Path, out: Path) -> list[str]:
    """The one call that compiles and links, for a machine that has torch and no setuptools."""
    headers, libraries = torch_folders()
    return [
        *compiler,
        *FLAGS,
        "-DNDEBUG",
        "-fPIC",
        "-shared",
        *(f"-D{name}={value}" for name, value in macros().items()),
        *(f"-isystem{folder}" for folder in (headers, sysconfig.get_path("include"))),
        str(source),
        f"-L{libraries}",
        *(f"-l{library}" for library in LIBRARIES),
        "-o",
        str(out),
    ]
