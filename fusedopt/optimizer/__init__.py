"""The optimizer class, and what belongs to it: groups, state, checkpoints, fastai's face, named optimizers."""

from .core import AllOptions, Optimizer, Options

__all__ = ["AllOptions", "Optimizer", "Options"]
