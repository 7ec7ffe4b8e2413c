"""What fastai asks of an optimizer: its names for hyperparameters, lists of parameters, freezing."""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any

import torch

from . import names
from .groups import ParamGroups
from .names import HyperNames
from .state import FLAGS, State


class FastaiFace(torch.optim.Optimizer):
    """``fastai.optimizer.Optimizer``'s protocol over torch's groups and state."""

    state: State
    groups: ParamGroups
    frozen_idx: int

    @property
    def hyper_map(self) -> HyperNames:
        """Both names of each hyperparameter."""
        return self.groups.names

    @property
    def param_lists(self) -> list[list[torch.Tensor]]:
        """The parameters of each group; assigning replaces them."""
        return [list(group["params"]) for group in self.param_groups]

    @param_lists.setter
    def param_lists(self, lists: Sequence[Iterable[torch.Tensor]]) -> None:
        for group, params in zip(self.param_groups, lists, strict=True):
            group["params"] = list(params)

    @property
    def hypers(self) -> list[HypersView]:
        """Each group's hyperparameters under fastai's names, as live writable views."""
        return [HypersView(self, i) for i in range(len(self.param_groups))]

    def set_hyper(self, name: str, value: Any) -> None:
        """Set a hyperparameter in all groups.

        Args:
            name: fastai's or torch's.
            value: one for all; a list, one per group; ``slice(first, last)``, even ratios from group to group;
                ``slice(last)``, which is a tenth of it for all groups but the last.

        Raises:
            ValueError: NaN, or a negative value.
            TypeError: one number where there are several, as ``betas`` are.
            AssertionError: a list of another length, as in fastai.
        """
        values = names.per_group(name, value, len(self.param_groups))
        for group, v in zip(self.param_groups, values, strict=True):
            names.check(name, v)
            there = group.get(name)
            if type(there) is tuple and not (isinstance(v, (tuple, list)) and len(v) == len(there)):
                raise TypeError(f"{name} must be {len(there)} numbers, not {v!r}")
        for group, v in zip(self.param_groups, values, strict=True):
            self.hyper_map.write(group, name, v)

    def set_hypers(self, **hypers: Any) -> None:
        """Set several hyperparameters: ``hypers`` are `set_hyper`'s names and values."""
        for name, value in hypers.items():
            self.set_hyper(name, value)

    def all_params(self, n: slice | int = slice(None), with_grad: bool = False) -> list[tuple[Any, ...]]:
        """``(p, group's parameters, p's state, group's hypers)`` of groups ``n``; fastcore's list if it is loaded.

        ``with_grad``: only of parameters that have a gradient.
        """
        lists, hypers = self.param_lists, self.hypers
        chosen = range(len(lists))[n]
        rows = [
            (p, lists[g], self.state.get(p, {}), hypers[g])
            for g in ([chosen] if isinstance(chosen, int) else chosen)
            for p in lists[g]
            if p.grad is not None or not with_grad
        ]
        fastcore = sys.modules.get("fastcore.foundation")
        return fastcore.L(rows) if fastcore is not None else rows

    def freeze_to(self, n: int) -> None:
        """Freeze the groups before ``n``: no gradients, but for parameters flagged ``force_train``."""
        n = operator.index(n)
        self.frozen_idx = n if n >= 0 else len(self.param_groups) + n
        if self.frozen_idx >= len(self.param_groups):
            warnings.warn(
                f"Freezing {self.frozen_idx} groups; model has {len(self.param_groups)}; whole model is frozen.",
                UserWarning,
                stacklevel=2,
            )
        self.apply_freezing()

    def apply_freezing(self) -> None:
        """Give every parameter the ``requires_grad`` that follows from ``frozen_idx`` and its ``force_train``."""
        for i, params in enumerate(self.param_lists):
            for p in params:
                p.requires_grad_(i >= self.frozen_idx or bool(self.state.get(p, {}).get("force_train")))

    def freeze(self) -> None:
        """Freeze all groups but the last. Raises AssertionError, as in fastai, if there is only one."""
        if len(self.param_groups) < 2:
            raise AssertionError("freezing needs more than one param group: a splitter")
        self.freeze_to(-1)

    def unfreeze(self) -> None:
        """Unfreeze every group."""
        self.freeze_to(0)

    def clear_state(self) -> None:
        """Forget all state of parameters but the flags ``do_wd`` and ``force_train``."""
        for _, state in self.state.of_parameters():
            for key in state.keys() - {*FLAGS}:
                state.pop(key, None)


class HypersView(MutableMapping[str, Any]):
    """One param group's numbers under fastai's names: live and writable. Flags and None are not shown."""

    def __init__(self, opt: FastaiFace, index: int) -> None:
        self._opt, self._index = opt, index

    def _all(self) -> dict[str, Any]:
        group = self._opt.param_groups[self._index]
        values = self._opt.hyper_map.of_group(group).items()
        return {k: names.number(v) for k, v in values if _is_number(v)}

    def __getitem__(self, name: str) -> Any:
        known, group = self._opt.hyper_map, self._opt.param_groups[self._index]
        place = known.place.get(name, name)
        if known.name.get(place, place) != name:  # torch's name for what is shown under fastai's
            raise KeyError(name)
        value = group[place[0]][place[1]] if isinstance(place, tuple) else group[place]
        if not _is_number(value):
            raise KeyError(name)
        return names.number(value)

    def __setitem__(self, name: str, value: Any) -> None:
        value = names.plain(value)
        names.check(name, value)
        self._opt.hyper_map.write(self._opt.param_groups[self._index], name, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"hyperparameter {name!r} cannot be removed")

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def copy(self) -> dict[str, Any]:
        """The numbers as they are now, in a dict."""
        return self._all()

    def __repr__(self) -> str:
        return repr(self._all())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, torch.Tensor)) and not isinstance(value, bool)
