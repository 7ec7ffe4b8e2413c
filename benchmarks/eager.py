"""Optimizer callbacks run by a plain loop, parameter by parameter: what fastai does, and what fusedopt replaces."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

import fusedopt


class EagerOptimizer:
    """The loop of ``fastai.optimizer.Optimizer.step``, without the list classes around it (so a little faster).

    ``param_groups`` are dicts of ``params`` and hyperparameters by the callbacks' names; ``state`` maps parameters to
    what their callbacks returned.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], cbs: Sequence[Callable[..., Any]], **hypers: Any
    ) -> None:
        defaults = {k: v for cb in cbs for k, v in getattr(cb, "defaults", {}).items()}
        self.cbs = list(cbs)
        self.param_groups = [{"params": list(params), **defaults, **hypers}]
        self.state: dict[torch.Tensor, dict[str, Any]] = defaultdict(dict)

    @classmethod
    def like(cls, opt: fusedopt.Optimizer) -> EagerOptimizer:
        """The same callbacks and hyperparameters on the same parameters as a fusedopt optimizer, without its state."""
        out = cls([], opt.cbs)
        out.param_groups = [
            {"params": list(group["params"]), **opt.hyper_map.of_group(group)} for group in opt.param_groups
        ]
        return out

    @torch.no_grad()
    def step(self) -> None:
        """Run every callback on every parameter that has a gradient."""
        for group in self.param_groups:
            hyper = {k: v for k, v in group.items() if k != "params"}
            for p in group["params"]:
                if p.grad is not None:
                    self._run_callbacks(p, hyper)

    def _run_callbacks(self, p: torch.Tensor, hyper: dict[str, Any]) -> None:
        state = self.state[p]
        for cb in self.cbs:
            returned = cb(p, **{**state, **hyper})
            if isinstance(returned, dict):
                state.update(returned)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None
