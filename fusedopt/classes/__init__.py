"""Optimizers as they are: a ``torch.optim.Optimizer`` of any class, whose ``step`` runs as fused kernels.

The class's own ``step`` is run on a shadow of the optimizer, with two symbolic parameters for each kind that there is.
What it does to them is a trace, as that of a callback list; engine, bound step and backends are the same from there on.
What has no such form runs as it was written, and that is said once.
"""

from . import functions  # noqa: F401  (what torch's functions do to symbolic tensors)
from .fused import fuse, unfuse

__all__ = ["fuse", "unfuse"]
