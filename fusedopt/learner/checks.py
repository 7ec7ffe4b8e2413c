"""What is refused, and what to do about it."""

from __future__ import annotations

import bisect
import difflib
import math
import re
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from .. import env, optim
from .callback import Callback
from .events import EVENTS, FIRST_EDITION
from .loaders import DataLoaders


def as_callback(given: Any) -> Callback:
    """A callback, or one of this class. Raises TypeError for anything else."""
    cb = given() if isinstance(given, type) else given
    if not isinstance(cb, Callback):
        raise TypeError(f"{given!r} is no callback: inherit from fusedopt.learner.Callback")
    return cb


def tell_misspelt(cb: Callback) -> None:
    """Warn of methods that look as if an event should call them, and none does."""
    if type(cb).__call__ is not Callback.__call__:
        return  # it hears every event, and may have names of its own for them
    classes = type(cb).__mro__[: type(cb).__mro__.index(Callback)]
    found = {k: v for c in reversed(classes) for k, v in vars(c).items()} | vars(cb)
    for name, value in found.items():
        method = callable(value) or isinstance(value, (staticmethod, classmethod))
        if method and not isinstance(value, type) and not hasattr(Callback, name) and (hint := _hint(name)):
            warnings.warn(
                f"fusedopt: no event calls {type(cb).__name__}.{name}: {hint} "
                f"(if it is a helper, call it otherwise)",
                RuntimeWarning,
                stacklevel=env.caller_level(),
            )


def known_event(name: str) -> str:
    """The event's name. ValueError for another name."""
    if name not in EVENTS:
        raise ValueError(f"there is no event {name!r}: {_hint(name) or ALL_EVENTS}")
    return name


ALL_EVENTS = f"events are {', '.join(EVENTS)}"


def _hint(name: str) -> str:
    """What a name may have been meant for; empty if it is an event's, or like none."""
    if name in EVENTS or name in FIRST_EDITION.values() or name.startswith("_"):
        return ""
    word = re.sub("^begin", "before", name.lower())
    prefixed = re.match("(before|after|begin)(_|[A-Z])", name)
    by_letters = {event.replace("_", ""): event for event in EVENTS}
    close = difflib.get_close_matches(word.replace("_", ""), by_letters, 1, 0.7 if prefixed else 0.85)
    return f"is it {by_letters[close[0]]}?" if close else ALL_EVENTS if prefixed else ""


def free_name(cb: Callback, learn: Any) -> str:
    """The name that the Learner will have a callback under; ValueError if it has something else there."""
    there = vars(learn).get(cb.name, getattr(type(learn), cb.name, cb))  # what the model has is no obstacle
    if not isinstance(there, Callback):
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
    if not hasattr(type(dls), "__getitem__") and hasattr(dls, "train") and hasattr(dls, "valid"):
        also = {name: getattr(dls, name) for name in ("path", "n_inp", "vocab") if hasattr(dls, name)}
        dls = DataLoaders(dls.train, dls.valid, **also)
    try:
        if _is_data(dls):
            raise TypeError
        loaders = {"training": dls[0], "validation": dls[1]}
    except (TypeError, IndexError, KeyError):
        raise TypeError(f"dls must be two loaders, for training and validation, not {dls!r}") from None
    for part, dl in loaders.items():
        as_loader(dl, part)
    return dls


def as_loader(dl: Any, part: str = "given") -> Any:
    """The loader. TypeError if it is none, or has no length, ValueError if it is empty; ``part`` is its name."""
    if dl is None:
        other = "training" if part == "validation" else "validation"
        raise TypeError(
            f"the {part} loader is None: give one, if need be the {other} loader once more; a callback that raises "
            f"CancelValidException in before_validate leaves validation out"
        )
    if isinstance(dl, type):
        raise TypeError(f"the {part} loader is the class {dl.__name__}: give an instance")
    if _is_data(dl):
        raise TypeError(
            f"the {part} loader is data, a {type(dl).__name__}, and would give single items: give batches, with "
            f"torch.utils.data.DataLoader(dataset, batch_size=64)"
        )
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
    return dl


def _is_data(given: Any) -> bool:
    """Whether it is a dataset or an array, and no loader."""
    cls = type(given)
    return (
        (isinstance(given, Dataset) and not isinstance(given, IterableDataset))
        or isinstance(given, (torch.Tensor, np.ndarray, str, bytes))
        or (hasattr(cls, "__getitem__") and not hasattr(cls, "__iter__") and not hasattr(given, "train"))
        or hasattr(cls, "dataloaders")  # fastai's
        or hasattr(cls, "column_names")  # Hugging Face's
    )


def as_model(model: Any) -> Any:
    """The model. TypeError if it is a class, or cannot be called."""
    if isinstance(model, type):
        raise TypeError(f"the model is the class {model.__name__}: give an instance, {model.__name__}(...)")
    if not callable(model):
        raise TypeError(f"the model must be a torch.nn.Module, not {model!r}")
    return model


def as_loss_func(given: Any, dls: Any = None) -> Any:
    """The loss function; None: the one that fastai's data have. TypeError if there is none, or it is a class."""
    if given is None:
        given = getattr(getattr(dls, "train_ds", None), "loss_func", None)
    inner = given
    while isinstance(inner, partial):
        inner = inner.func
    if isinstance(inner, type):
        name = inner.__name__
        raise TypeError(f"loss_func is the class {name}, which has to be made first: give {name}()")
    if not callable(inner):
        raise TypeError(
            f"loss_func must be a function of predictions and targets, such as torch.nn.functional.cross_entropy, "
            f"not {given!r}"
        )
    return given


def as_opt_func(given: Any) -> Any:
    """What makes an optimizer. TypeError if it is one already, or cannot be called."""
    if not isinstance(given, type) and hasattr(given, "step") and hasattr(given, "zero_grad"):
        name = type(given).__name__
        raise TypeError(
            f"opt_func is an optimizer ({name}), and has to be what makes one, such as fusedopt.Adam; to train with "
            f"this one, take opt_func=lambda params, lr: opt, or set learn.opt = opt"
        )
    if not callable(given):
        raise TypeError(
            f"opt_func must be what makes an optimizer of parameters and lr, such as fusedopt.Adam, not {given!r}"
        )
    return given


def not_finite(recorder: Any, epoch: int) -> str:
    """Since when a loss of this fit is NaN or infinite; empty if none is.

    By the smoothed losses, which stay so once they are: nobody has to wait for a device after every batch.
    """
    losses = recorder.losses
    if losses and not math.isfinite(losses[-1]):
        i = next(i for i, loss in enumerate(losses) if not math.isfinite(loss))
        ends = [0, *recorder.iters]
        k = bisect.bisect_right(ends, i) - 1
        behind = len(ends) - 1 - k - (ends[-1] == len(losses))  # epochs that have ended since
        return (
            f"the training loss is {float(losses[i])} from batch {i - ends[k]} of epoch {epoch - behind} on"
        )
    value = recorder.loss.value if recorder.valid_metrics else None
    if value is not None and not math.isfinite(value):
        return f"the validation loss is {float(value)} in epoch {epoch}"
    return ""


def epoch_number(given: int) -> int:
    """The number of an epoch. ValueError if it is negative."""
    if given < 0:
        raise ValueError(f"start_epoch is the number of the first epoch to train, from 0 on, not {given}")
    return given


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
        ours = f"take fusedopt.optim.{name}" if hasattr(optim, name) else "wrap it in fastai's OptimWrapper"
        raise TypeError(f"opt_func gave a {name} without set_hypers: {ours}, or take a fusedopt.Optimizer")
    return opt
