"""From source text to loaded code: the system compiler and the cache of what it made."""

from .cache import BuildError, CacheError, CacheWarning
from .toolchain import CompileError, CompilerNotFound

__all__ = [
    "BuildError",
    "CacheError",
    "CacheWarning",
    "CompileError",
    "CompilerNotFound",
]
