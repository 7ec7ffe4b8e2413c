"""The skeletons that generated kernel bodies are dropped into, one per language.

The folder sits at the top of the repository and is installed as `fusedopt.kernels`. Each skeleton is
valid source that compiles alone with its example body.
"""

from importlib import resources


def source(name: str) -> str:
    """The text of the skeleton `name`, e.g. `source("cpu.cpp")`. Raises FileNotFoundError."""
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
