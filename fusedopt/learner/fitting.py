"""The ways to train that have a schedule."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from .callbacks.lr_finder import LRFinder, valley
from .callbacks.recorder import Recorder
from .callbacks.schedule import ParamScheduler, combine_scheds, combined_cos, sched_cos
from .order import listed


class Fitting:
    """Part of the `Learner`. Rates are a number, a list with one per group, or a slice: see ``Optimizer.set_hyper``.

    ``n_epoch``, ``wd``, ``cbs``, ``reset_opt`` and ``start_epoch`` are as for `Learner.fit`.
    """

    dls: Any
    opt: Any
    lr: Any
    moms: tuple[float, float, float]
    recorder: Recorder
    fit: Callable[..., None]
    create_opt: Callable[[], None]
    freeze: Callable[[], None]
    unfreeze: Callable[[], None]
    no_logging: Callable[[], AbstractContextManager[Any]]

    def fit_one_cycle(
        self,
        n_epoch: int,
        lr_max: Any = None,
        div: float = 25.0,
        div_final: float = 1e5,
        pct_start: float = 0.25,
        wd: float | None = None,
        moms: tuple[float, float, float] | None = None,
        cbs: Any = None,
        reset_opt: bool = False,
        start_epoch: int = 0,
    ) -> None:
        """Train with one cycle: the rate from lr_max / div to lr_max to lr_max / div_final, momentum through ``moms``.

        ``pct_start`` of the batches are for the way up. Both ways are half cosines.
        ``n_epoch``, ``wd``, ``cbs``, ``reset_opt`` and ``start_epoch`` are as for `Learner.fit`.
        """
        top = self._rates(lr_max)
        scheds = {
            "lr": combined_cos(pct_start, top / div, top, top / div_final),
            "mom": combined_cos(pct_start, *(self.moms if moms is None else moms)),
        }
        self._fit_scheduled(n_epoch, scheds, wd, cbs, reset_opt, start_epoch)

    def fit_flat_cos(
        self,
        n_epoch: int,
        lr: Any = None,
        div_final: float = 1e5,
        pct_start: float = 0.75,
        wd: float | None = None,
        cbs: Any = None,
        reset_opt: bool = False,
        start_epoch: int = 0,
    ) -> None:
        """Train at a flat rate for ``pct_start`` of the batches, then along half a cosine down to lr / div_final.

        ``n_epoch``, ``wd``, ``cbs``, ``reset_opt`` and ``start_epoch`` are as for `Learner.fit`.
        """
        flat = self._rates(lr)
        scheds = {"lr": combined_cos(pct_start, flat, flat, flat / div_final)}
        self._fit_scheduled(n_epoch, scheds, wd, cbs, reset_opt, start_epoch)

    def fit_sgdr(
        self,
        n_cycles: int,
        cycle_len: int,
        lr_max: Any = None,
        cycle_mult: int = 2,
        cbs: Any = None,
        reset_opt: bool = False,
        wd: float | None = None,
        start_epoch: int = 0,
    ) -> None:
        """Train in cycles with warm restarts: each from lr_max down to 0, and ``cycle_mult`` times as long as the last.

        There are ``n_cycles``, the first of ``cycle_len`` epochs. ``cycle_mult`` may be 1 (fastai divides by zero).
        ``wd``, ``cbs``, ``reset_opt`` and ``start_epoch`` are as for `Learner.fit`.
        """
        top, lengths = self._rates(lr_max), [cycle_len * cycle_mult**i for i in range(n_cycles)]
        n_epoch = sum(lengths)
        pcts = [length / n_epoch for length in lengths]
        scheds = {"lr": combine_scheds(pcts, [sched_cos(top, 0)] * n_cycles)}
        self._fit_scheduled(n_epoch, scheds, wd, cbs, reset_opt, start_epoch)

    def fine_tune(
        self,
        epochs: int,
        base_lr: float = 2e-3,
        freeze_epochs: int = 1,
        lr_mult: float = 100,
        pct_start: float = 0.3,
        div: float = 5.0,
        **kwargs: Any,
    ) -> None:
        """Train the last group for a while, then all of them at half the rate, both by `fit_one_cycle`.

        Args:
            epochs: how many with all groups.
            base_lr: the highest rate of the first part; in the second half of it is that of the last group.
            freeze_epochs: how many with the last group alone.
            lr_mult: by what the first group's rate is smaller.
            pct_start, div: of the second part's cycle.
            kwargs: of `fit_one_cycle`.
        """
        self.freeze()
        self.fit_one_cycle(freeze_epochs, slice(base_lr), pct_start=0.99, **kwargs)
        base_lr /= 2
        self.unfreeze()
        self.fit_one_cycle(epochs, slice(base_lr / lr_mult, base_lr), pct_start=pct_start, div=div, **kwargs)

    def lr_find(
        self,
        start_lr: Any = 1e-7,
        end_lr: Any = 10,
        num_it: int = 100,
        stop_div: bool = True,
        show_plot: bool = True,
        suggest_funcs: Any = (valley,),
    ) -> Any:
        """Train at growing rates, undo it all, and return what the losses suggest: a named tuple of learning rates.

        Args:
            start_lr, end_lr, num_it, stop_div: as of `LRFinder`.
            show_plot: draw the losses and what is suggested.
            suggest_funcs: of `valley`, `slide`, `minimum`, `steep`, or functions like them; None for none.

        Raises:
            ValueError: too few losses to suggest anything, because there were few batches or they became NaN.
        """
        had_opt = self.opt is not None
        hypers = [dict(h) for h in self.opt.hypers] if had_opt else []
        try:
            with self.no_logging():
                self.fit(num_it // len(self.dls[0]) + 1, cbs=LRFinder(start_lr, end_lr, num_it, stop_div))
        finally:
            if not had_opt:
                self.opt = None
            for view, was in zip(self.opt.hypers if had_opt else (), hypers, strict=True):
                view.update(was)
        suggested = self._suggest(num_it, listed(suggest_funcs))
        if show_plot:
            self.recorder.plot_lr_find(
                suggestions=[point for _, point in suggested.values()], nms=list(suggested)
            )
        if suggest_funcs is None:
            return None
        return namedtuple("SuggestedLRs", list(suggested))(*(lr for lr, _ in suggested.values()))

    def _suggest(self, num_it: int, funcs: Sequence[Callable[..., Any]]) -> dict[str, Any]:
        """What each function makes of the curve, without its first tenth, its last five, and what follows a NaN."""
        rec = self.recorder
        lrs = torch.tensor(rec.lrs[num_it // 10 : -5])
        losses = torch.tensor([float(x) for x in rec.losses[num_it // 10 : -5]])
        n = int(losses.isnan().int().cumsum(0).eq(0).sum())
        if funcs and n < 2:
            raise ValueError(
                f"{len(rec.losses)} batches left {n} losses to suggest a learning rate from, without the first "
                f"{num_it // 10}, the last 5, and all from the first NaN on: take a larger num_it, or a lower start_lr"
            )
        names = [(f.func if isinstance(f, functools.partial) else f).__name__ for f in funcs]
        return {name: f(lrs[:n], losses[:n], num_it) for name, f in zip(names, funcs, strict=True)}

    def _rates(self, lr: Any) -> np.ndarray:
        """The learning rate of each group."""
        if self.opt is None:
            self.create_opt()
        self.opt.set_hyper("lr", self.lr if lr is None else lr)
        return np.array([h["lr"] for h in self.opt.hypers])

    def _fit_scheduled(
        self, n_epoch: int, scheds: dict[str, Any], wd: Any, cbs: Any, reset_opt: bool, start_epoch: int
    ) -> None:
        cbs = [ParamScheduler(scheds), *listed(cbs)]
        self.fit(n_epoch, wd=wd, cbs=cbs, reset_opt=reset_opt, start_epoch=start_epoch)
