"""What is refused, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .callback import Callback


def as_callback(given: Any) -> Callback:
    """A callback, or one of this class. Raises TypeError for anything else."""
    cb = given() if isinstance(given, type) else given
    if not isinstance(cb, Callback):
        raise TypeError(f"{given!r} is no callback: inherit from fusedopt.learner.Callback")
    return cb


def free_name(cb: Callback, learn: Any) -> str:
    """The name that the Learner will have a callback under; ValueError if it has something else there."""
    if not isinstance(getattr(learn, cb.name, cb), Callback):
        raise ValueError(
            f"the Learner's own {cb.name!r} would be lost to the callback {cb!r}: call the class otherwise"
        )
    return cb.name


def add_note(error: Exception, note: str) -> None:
    """Say more about an error; before Python 3.11, which prints notes under messages, as part of the message."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.args = (f"{error}\n{note}", *error.args[1:])


def as_tensor(loss: Any) -> torch.Tensor:
    """The loss; TypeError if it is no tensor."""
    if not isinstance(loss, torch.Tensor):
        raise TypeError(
            f"the loss must be a tensor that leads back to the model; loss_func gave {loss!r}: "
            f"drop .item(), .numpy() and the like"
        )
    return loss


def one_number(loss: torch.Tensor) -> torch.Tensor:
    """The loss; ValueError if it is several numbers."""
    if loss.numel() != 1:
        raise ValueError(
            f"the loss must be one number to train with; loss_func gave the shape {tuple(loss.shape)}: "
            f"average it, as with reduction='mean'"
        )
    return loss


def as_loaders(dls: Any) -> Any:
    """The loaders. TypeError if they are no pair with a length each, ValueError if one is empty."""
    try:
        loaders = {"training": dls[0], "validation": dls[1]}
    except (TypeError, IndexError, KeyError):
        raise TypeError(f"dls must be two loaders, for training and validation, not {dls!r}") from None
    for part, dl in loaders.items():
        try:
            n = len(dl)
        except TypeError:
            raise TypeError(
                f"the {part} loader has no length, and schedules need to know it: give {dl!r} a __len__"
            ) from None
        if n == 0:
            raise ValueError(
                f"the {part} loader has no batches: is its dataset empty, or smaller than a batch to drop?"
            )
    return dls


def trained(groups: Iterable[Any]) -> list[Any]:
    """What a splitter gave. ValueError if no parameter in it wants a gradient."""
    groups = list(groups)
    each = ([g] if isinstance(g, torch.Tensor) else g["params"] if isinstance(g, dict) else g for g in groups)
    if not any(p.requires_grad for group in each for p in group):
        raise ValueError("the model has no parameters to train: all are frozen, or it has none")
    return groups


def as_optimizer(opt: Any) -> Any:
    """The optimizer. TypeError if its hyperparameters cannot be set in the way that schedules do."""
    if not hasattr(opt, "set_hypers"):
        name = type(opt).__name__
        raise TypeError(
            f"opt_func gave a {name} without set_hypers: take fusedopt.optim.{name}, or a fusedopt.Optimizer"
        )
    return opt
