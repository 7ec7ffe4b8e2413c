"""How state and parameters are stored, apart from what rules do with them: fewer bytes for any rule.

A *policy* encodes a tensor of numbers into what is stored, and decodes it. A rule never knows: `decode` is run before
its callbacks and `encode` after them, in the same program, so kernels decode where they load and encode where they
store. Policies are plain torch, as callbacks are; see `Policy` for how to write one.
"""

from . import policies as _policies  # noqa: F401  (registers them)
from .policy import PRESETS, Policy, register

__all__ = ["PRESETS", "Policy", "register"]
