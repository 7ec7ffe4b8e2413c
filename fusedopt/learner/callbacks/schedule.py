"""Schedules: how hyperparameters change while a training goes on."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..callback import Callback


def annealer(f: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``f(start, end, ..., pos)`` be called without ``pos`` too: that gives a function of it."""
    n = len(inspect.signature(f).parameters)

    @functools.wraps(f)
    def either(*args: Any) -> Any:
        return f(*args) if len(args) == n else functools.partial(either, *args)

    return either


@annealer
def sched_lin(start: Any, end: Any, pos: float) -> Any:
    """From ``start`` to ``end`` as ``pos`` goes from 0 to 1, evenly: start + pos (end − start)."""
    return start + pos * (end - start)


@annealer
def sched_cos(start: Any, end: Any, pos: float) -> Any:
    """Along half a cosine, flat at both ends: start + (1 + cos(π (1 − pos))) (end − start) / 2."""
    return start + (1 + math.cos(math.pi * (1 - pos))) * (end - start) / 2


@annealer
def sched_no(start: Any, end: Any, pos: float) -> Any:
    """``start`` at each ``pos``, whatever the ``end``."""
    return start


@annealer
def sched_exp(start: Any, end: Any, pos: float) -> Any:
    """By the same factor each time: start (end / start)^pos."""
    return start * (end / start) ** pos


@annealer
def sched_poly(start: Any, end: Any, power: float, pos: float) -> Any:
    """Along a power: start + (end − start) pos^power."""
    return start + (end - start) * pos**power


SchedLin, SchedCos, SchedNo, SchedExp, SchedPoly = sched_lin, sched_cos, sched_no, sched_exp, sched_poly


def combine_scheds(pcts: Sequence[float], scheds: Sequence[Callable[[float], Any]]) -> Callable[[float], Any]:
    """One of ``scheds`` after another, each for its share ``pcts`` of the way.

    Raises ValueError if shares are negative, do not sum up to 1, or are not one per schedule.
    """
    pcts, scheds = list(pcts), list(scheds)
    if len(pcts) != len(scheds) or min(pcts) < 0 or not math.isclose(sum(pcts), 1.0):
        raise ValueError(
            f"combine_scheds takes a share per schedule, and shares sum up to 1; "
            f"these are {pcts} for {len(scheds)} schedules"
        )
    # In float32, as fastai has it: positions are running sums, and would miss an edge by their rounding otherwise.
    edges = np.cumsum(np.array([0, *pcts], np.float32), dtype=np.float64).astype(np.float32)
    return functools.partial(_combined, edges, scheds)


def _combined(edges: np.ndarray, scheds: Sequence[Callable[[float], Any]], pos: float) -> Any:
    """At the top of the module, and not a closure, for it goes into pickles."""
    at = np.float32(pos)
    i = min(int(np.searchsorted(edges, at, side="right")), len(scheds)) - 1
    return scheds[i](float((at - edges[i]) / (edges[i + 1] - edges[i])))


def combined_cos(pct: float, start: Any, middle: Any, end: Any) -> Callable[[float], Any]:
    """From ``start`` to ``middle`` in ``pct`` of the way, then to ``end``, along half cosines."""
    return combine_scheds([pct, 1 - pct], [sched_cos(start, middle), sched_cos(middle, end)])


class ParamScheduler(Callback):
    """Sets hyperparameters before each batch by functions of the training's progress, from 0 to 1.

    ``scheds``: function by hyperparameter, as in ``{"lr": sched_cos(1e-2, 0)}``; it gives one value, or one per group.
    What was set is in ``recorder.hps`` afterwards.
    """

    order, run_valid = 60, False

    def __init__(self, scheds: Mapping[str, Callable[[float], Any]]) -> None:
        self.scheds = dict(scheds)
        self.hps: dict[str, list[float]] = {}

    def before_fit(self) -> None:
        self.run = not self.inferring  # or predicting would forget what was set
        if self.run:
            self.hps = {name: [] for name in self.scheds}

    def before_batch(self) -> None:
        self.set_at(self.pct_train)

    def set_at(self, pos: float) -> None:
        """Set the hyperparameters to their values at ``pos``, from 0 to 1."""
        for name, sched in self.scheds.items():
            self.opt.set_hyper(name, sched(pos))

    def after_batch(self) -> None:
        for name, values in self.hps.items():
            values.append(self.opt.hypers[-1].get(name))

    def after_fit(self) -> None:
        if hasattr(self.learn, "recorder"):
            self.learn.recorder.hps.update(self.hps)
