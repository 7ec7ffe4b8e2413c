"""Two vocabularies for hyperparameters: callbacks speak fastai's (``mom``, ``sqr_mom``, ``wd``), param groups torch's.

One declared map: ``wd`` ↔ ``weight_decay``; ``mom`` with ``sqr_mom`` ↔ ``betas``; ``mom`` alone ↔ ``momentum``;
``sqr_mom`` alone ↔ ``alpha``. Any other name is the same on both sides. An optimizer class may declare its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from ..callback import GROUPS_OWN

Place = str | tuple[str, int]
TORCH = {"weight_decay": ("wd",), "betas": ("mom", "sqr_mom"), "momentum": ("mom",), "alpha": ("sqr_mom",)}
"""torch's names, and what callbacks call the same."""
MOMENTS = {"grad_avg": "exp_avg", "sqr_avg": "exp_avg_sq"}
MOMENTUM = {"grad_avg": "momentum_buffer"}
"""What checkpoints call the state, so that they load into the matching class of torch.optim."""
NOT_NEGATIVE = ("lr", "eps", "wd", "mom", "sqr_mom")
NO_HYPERS = ("params", "param_names", GROUPS_OWN)
ROUNDING = 1e-7
"""What a schedule that ends at zero may be below it: torch's LinearLR often ends at -1e-18, or -1e-8 in float32."""


class HyperNames:
    """The map for one optimizer: callback name → param-group key, or (key, position) in a tuple there."""

    def __init__(
        self, names: Iterable[str], declared: Mapping[str, Place] | None = None, taken: Iterable[str] = ()
    ) -> None:
        """``names``: the hyperparameters given, in either vocabulary; ``taken``: the arguments that callbacks name.

        A callback that itself has an argument ``alpha`` gets the group's ``alpha``, not as ``sqr_mom``.
        """
        taken = set(taken)
        names = {
            own for name in names for own in (TORCH.get(name, (name,)) if name not in taken else (name,))
        }
        momentum: dict[str, Place] = {"mom": "momentum", "sqr_mom": "alpha"}
        if {"mom", "sqr_mom"} <= names:
            momentum = {"mom": ("betas", 0), "sqr_mom": ("betas", 1)}
        places = {"wd": "weight_decay", **momentum, **(declared or {})}
        self.place = {k: v for k, v in places.items() if (v[0] if isinstance(v, tuple) else v) not in taken}
        self.name: dict[Place, str] = {place: name for name, place in self.place.items()}

    def of_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A param group's hyperparameters by the names callbacks use."""
        out: dict[str, Any] = {}
        for key, value in group.items():
            if key in NO_HYPERS or self.shadowed(key, group):
                continue
            if (key, 0) in self.name and isinstance(value, (tuple, list)):
                out.update((self.name[key, i], v) for i, v in enumerate(value) if (key, i) in self.name)
            else:
                out[self.name.get(key, key)] = value
        return out

    def shadowed(self, key: str, group: Mapping[str, Any]) -> bool:
        """Whether the key is a callback's name for what the group also has in its place, which then counts.

        ZeroRedundancyOptimizer copies keys of groups as the user wrote them into groups that we have translated.
        """
        place = self.place.get(key, key)
        own = place[0] if isinstance(place, tuple) else place
        return own != key and own in group

    def write(self, group: dict[str, Any], name: str, value: Any) -> None:
        """Set one hyperparameter in a group; a tensor there is filled, tuples are replaced."""
        place = self.place.get(name, name)
        if isinstance(place, tuple):
            key, i = place
            old = list(group.get(key, ()))
            old += [0.0] * (i + 1 - len(old))
            old[i] = value
            group[key] = tuple(old)
        elif isinstance(group.get(place), torch.Tensor) and not isinstance(value, torch.Tensor):
            group[place].fill_(value)
        else:
            group[place] = value

    def to_fastai(self, hypers: Mapping[str, Any]) -> dict[str, Any]:
        """Hypers in either vocabulary, in fastai's. Raises TypeError if both spellings disagree, or a tuple is none."""
        out: dict[str, Any] = {}
        under: dict[str, str] = {}
        for key, value in hypers.items():
            parts = {self.name.get(key, key): value}
            if (key, 0) in self.name:
                if not isinstance(value, Iterable) or isinstance(value, str):
                    own = " and ".join(name for place, name in self.name.items() if place[0] == key)
                    raise TypeError(f"{key} must be a tuple of numbers ({own}), not {value!r}")
                parts = {self.name[key, i]: v for i, v in enumerate(value)}
            for name, v in parts.items():
                if name in out and out[name] is not v and out[name] != v:
                    # The group's own key stays.
                    stays, goes = sorted((under[name], key), key=lambda k: k == name)
                    raise TypeError(
                        f"{name} is given twice: {out[name]!r} as {under[name]!r} (which may be its default), and "
                        f"{v!r} as {key!r}. Remedy: {stays!r} alone, without {goes!r}"
                    )
                out[name], under[name] = v, key
        return out


def plain(value: Any) -> Any:
    """numpy numbers, and arrays of one, as Python's: a checkpoint of the others cannot be loaded safely."""
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.size == 1 else value


def check(name: str, value: Any) -> None:
    """Raise ValueError for NaN, and for a negative learning rate, decay, epsilon or momentum; TypeError for text."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, not a tensor of shape {tuple(value.shape)}")
        value = value.item()
    others = (str, bytes, dict, slice, complex, *((list, tuple) if name == "lr" else ()))
    if name in NOT_NEGATIVE and isinstance(value, others):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"invalid {name}: NaN")
    if isinstance(value, (int, float)) and value < lowest(name):
        raise ValueError(f"invalid {name}: {value} is negative")


def lowest(name: str) -> float:
    """The lowest number that a hyperparameter may be."""
    return -math.inf if name not in NOT_NEGATIVE else 0.0 if name == "eps" else -ROUNDING


def per_group(name: str, value: Any, n: int) -> list[Any]:
    """One value per param group, by fastai's rules.

    ``slice(a, b)`` is geometric from a to b; ``slice(b)`` is b for the last group and b/10 for the others; one value
    serves all. Raises AssertionError, as fastai, for another number of values.
    """
    if isinstance(value, slice):
        stop = value.stop
        if value.start:
            step = (stop / value.start) ** (1 / (n - 1)) if n > 1 else 1.0
            values = [value.start * step**i for i in range(n)] if n > 1 else [stop]
        else:
            values = [stop / 10] * (n - 1) + [stop]
    elif isinstance(value, torch.Tensor):
        values = value.tolist() if value.ndim == 1 and len(value) != 1 else [value]
    elif isinstance(value, Iterable) and not isinstance(value, str) and getattr(value, "ndim", 1) > 0:
        values = list(value)
    else:
        values = [value]
    if len(values) == 1:
        values = values * n
    if len(values) != n:
        raise AssertionError(
            f"Trying to set {len(values)} values for {name} but there are {n} parameter groups."
        )
    return [plain(v) for v in values]


def number(value: Any) -> Any:
    """A number of torch's (a one-element tensor) or numpy's as Python's; anything else as it is."""
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else plain(value)
