"""Gradients that are freed as they are used: ``opt.release_gradients()`` steps parameters during the backward pass.

A parameter's gradient is complete when torch has accumulated all of it, and says so by a hook (torch's
``register_post_accumulate_grad_hook``). Parameters are collected until their gradients are of some size, stepped
together, and their gradients freed. What is left is stepped by ``opt.step()``, which ends the pass.

A batch is a step of some parameters, by an engine of its own over the optimizer's groups, state and traces. So it is
bound, and repeated, like any other step.

With loss scaling each batch is an optimizer, as far as torch's GradScaler can tell, which looks at its gradients, hands
over its scale and what it found, and knows of that in ``update()``. A step is skipped as a whole where a backward pass
within ``measure()`` has shown all gradients to GradScaler before, or else, if the user says so, batch by batch.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..callback import name_of
from ..step import sharded
from ..step.engine import Engine
from ..step.scaling import EPS, Given, Scaling

if TYPE_CHECKING:
    from .core import Optimizer

Clipping = Literal["last", "measured"]
Skipping = Literal["step", "batches"]
SHARE, LEAST, MOST = 16, 1 << 20, 1 << 26
"""A batch is a sixteenth of all gradients, if nobody says how large, and of 1 to 64 MiB."""


@dataclass(eq=False)
class Batch:
    """Parameters, by their ids, whose gradients were complete together when each was for the first time.

    Later passes may complete them in other batches: then some of them are stepped with some of another one, by the
    engine of each. Its kernels leave out what has no gradient, so nothing is bound anew.
    """

    params: dict[int, torch.Tensor]
    engine: Engine | None = None


@dataclass
class Waiting:
    """Parameters whose gradients are complete, and how many bytes these are."""

    params: dict[int, torch.Tensor] = field(default_factory=dict)
    size: int = 0


class Scaled:
    """Parameters whose scaled gradients are used together: an optimizer, as far as GradScaler can tell.

    ``use`` is called with the scale, and with what is not zero if one of the gradients is infinite or NaN.
    """

    _step_supports_amp_scaling = True
    grad_scale: torch.Tensor  # GradScaler sets these for the time of `step`
    found_inf: torch.Tensor

    def __init__(self, params: list[torch.Tensor], use: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        self.param_groups = [{"params": params}]
        self._use = use

    def step(self) -> None:
        self._use(self.grad_scale, self.found_inf)
        self.param_groups = []


class GradientRelease:
    """What ``opt.release_gradients()`` returns, and ends with ``remove()``, or as a context manager.

    ``opt`` is the optimizer; ``batch_bytes``: gradients of which size are stepped together; ``clip``: which norm
    ``max_grad_norm`` is compared with; ``scaler``: who scales losses; ``skip``: what of a step is left out where
    gradients are infinite. The last three may be changed between passes.

    Raises: as `Optimizer.release_gradients`: RuntimeError, TypeError, ValueError.
    """

    def __init__(
        self,
        opt: Optimizer,
        batch_bytes: int | None,
        clip: Clipping | None,
        scaler: torch.amp.GradScaler | None = None,
        skip: Skipping = "step",
    ) -> None:
        params = [p for group in opt.param_groups for p in group["params"]]
        if clip not in (None, "last", "measured"):
            raise ValueError(f'clip must be "last", "measured" or None, not {clip!r}')
        if skip not in ("step", "batches"):
            raise ValueError(f'skip must be "step" or "batches", not {skip!r}')
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, not {type(scaler).__name__}")
        if batch_bytes is None:
            size = sum(p.numel() * p.element_size() for p in params if p.requires_grad)
            batch_bytes = min(max(size // SHARE, LEAST), MOST)
        if batch_bytes < 0:
            raise ValueError(f"batch_bytes must not be negative; it is {batch_bytes}")
        self.batch_bytes, self.clip, self.scaler, self.skip = batch_bytes, clip, scaler, skip
        self._ref = weakref.ref(opt)
        self._lock = threading.RLock()  # gradients on several devices are completed by as many threads
        self._hooks: Any = WeakIdKeyDictionary()
        self._waiting: dict[Hashable, Waiting] = {}
        self._stepped: set[int] = set()
        """By their ids, the parameters that this pass has stepped, or measured."""
        self._batches: dict[int, Batch] = {}
        """That of each parameter, by its id."""
        self._passes = self._steps = self._last_steps = 0
        self._all = self._repeated = 0
        self._why = ""
        self._stepping, self._measuring, self._fresh = True, False, False
        self._scalings: dict[bool, Given] = {}
        self._squares: dict[torch.device, torch.Tensor] = {}
        self._norm: torch.Tensor | None = None
        self._finite: torch.Tensor | None = None
        """The last norm that was a number, NaN if none was."""
        self._inverse: torch.Tensor | float = 1.0
        """One over the scale of this pass."""
        self._found: torch.Tensor | float = 0.0
        """Not zero if measured gradients were infinite or NaN."""
        self._scaled: list[Scaled] = []
        """Those of this pass. GradScaler knows them by their ids until ``update()``, so those before it live too."""
        self._scaled_before: list[Scaled] = []
        self._refuse(opt, params)
        for p in params:
            self._hook(p)

    # -- what the user says --
    @contextlib.contextmanager
    def accumulate(self, more: bool = True) -> Iterator[None]:
        """The time of backward passes that are not the last one before ``opt.step()``: gradients are kept, and add up.

        ``more``: whether there is another one, so that one ``with`` serves all of them.
        """
        before, self._stepping = self._stepping, self._stepping and not more
        try:
            yield
        finally:
            self._stepping = before

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """The time of a backward pass that only takes the gradients' norm, and frees them: nothing is stepped.

        With loss scaling it also finds whether all are finite. The pass that steps comes after it, over the same graph
        (``retain_graph=True`` in this one) or the same forward pass done again. Raises RuntimeError where there are
        gradients already, which would be freed.
        """
        self._none_left("measure() frees gradients")
        self._forget_pass()
        self._measuring, self._fresh, self._found = True, False, 0.0
        try:
            yield
            with self._lock:
                self._use_left()
                self._take_norm()
                self._fresh = True
        finally:
            self._measuring = False
            self._forget_pass()

    def abandon(self) -> None:
        """Forget a pass that is not to be ended by ``opt.step()``, because backward failed or the loss is no number.

        Parameters that were stepped stay so. Gradients that are left stay too: ``zero_grad()`` frees them.
        """
        with self._lock:
            self._forget_pass()
            self._fresh = False

    def remove(self) -> None:
        """Step in ``opt.step()`` alone again, from the next pass on. Gradients that are left are stepped there."""
        for hook in list(self._hooks.values()):
            hook.remove()
        self._hooks.clear()
        self._forget_pass()
        opt = self._ref()
        if opt is not None and opt.gradient_release is self:
            opt.gradient_release = None

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """The global norm of the gradients of the last pass: a float32 0-d tensor. None if it was not taken.

        With loss scaling it is that of the unscaled ones.
        """
        return self._norm

    # -- what the optimizer says --
    def end(self) -> None:
        """Step what is left, and end the pass: ``opt.step()``.

        Raises RuntimeError within ``measure()``, and after GradScaler's ``unscale_``.
        """
        with self._lock:
            self._refuse_unscaled()
            if self._measuring:
                raise RuntimeError(
                    "opt.step() within measure(), which only takes the norm. Remedy: step after it"
                )
            self._use_left()
            self._take_norm()
            self._last_steps, self._fresh = self._steps, False
            self._scaled, self._scaled_before = [], self._scaled
            self._forget_pass()
            self._passes += 1

    @property
    def engines(self) -> list[Engine]:
        """Those of the batches."""
        return [batch.engine for batch in dict.fromkeys(self._batches.values()) if batch.engine is not None]

    def __str__(self) -> str:
        if not self._passes:
            return ""
        why = f", the last time because {self._why}" if self._why else ""
        return (
            f"the last one in {self._last_steps} batches, as gradients were complete; "
            f"{self._repeated} of {self._all} batches without Python work for each tensor{why}"
        )

    # -- the hook --
    def complete(self, p: torch.Tensor) -> None:
        """This parameter's gradient is complete."""
        if not (self._stepping or self._measuring):
            return
        with self._lock:
            known = id(p)
            if known in self._stepped:
                raise self._again(p)
            where = None if p.is_cpu else _where(p)
            waiting = self._waiting.get(where)
            if waiting is None:
                waiting = self._waiting[where] = Waiting()
            if known not in waiting.params:
                waiting.params[known] = p
                waiting.size += p.nbytes
            if waiting.size >= self.batch_bytes:
                self._release(where)

    def _use_left(self) -> None:
        """Step, or measure, whatever has a gradient."""
        groups = self._optimizer().param_groups
        left = [p for group in groups for p in group["params"] if p.grad is not None]
        if left:
            self._use(left)
        for p in left:
            self._hook(p)  # new ones, and those that were frozen

    def _release(self, where: Hashable) -> None:
        """Step what waits there; if that raises, it waits on."""
        if self._ref() is None:  # nobody steps any more
            self.remove()
            return
        found = [p for p in self._waiting[where].params.values() if p.grad is not None]
        if found:
            self._use(found)
        self._waiting.pop(where, None)

    def _use(self, params: list[torch.Tensor]) -> None:
        """Step these, or measure, and free their gradients."""
        opt = self._optimizer()
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, and release_gradients() steps in the backward pass. Remedy: remove() "
                "what it returned, and capture the step"
            )
        if not self._scales():
            self._inverse = 1.0
            self._use_batches(opt, params, 0.0)
            return
        if self.skip == "step" and not (self._measuring or self._fresh):
            raise _unmeasured()
        scaled = Scaled(params, functools.partial(self._use_scaled, opt, params))
        self._scaled.append(scaled)
        assert self.scaler is not None
        self.scaler.step(scaled)  # type: ignore[arg-type]

    def _use_scaled(
        self, opt: Optimizer, params: list[torch.Tensor], scale: torch.Tensor, found: torch.Tensor
    ) -> None:
        self._inverse = scale.reciprocal()
        if self._measuring:
            found = self._found = found + self._found
        elif self._fresh:
            found = found + self._found
        self._use_batches(opt, params, found)

    def _use_batches(self, opt: Optimizer, params: list[torch.Tensor], found: torch.Tensor | float) -> None:
        scaling = self._given(opt, measures=True) if self._measuring else self._scaling(opt, found)
        skips = not (self._measuring or scaling.amp) and bool(found)  # else the kernels do, and nobody waits
        for batch, some in self._shares(params).items():
            ids = set(map(id, some))
            kept = [(p, p.grad) for key, p in batch.params.items() if key not in ids and p.grad is not None]
            try:
                for p, _ in kept:  # accumulated before, and not complete
                    p.grad = None
                if skips:
                    self._skip_share(opt, batch, scaling)
                else:
                    self._use_share(opt, batch, scaling)
            finally:
                for p, grad in kept:
                    p.grad = grad
            self._stepped |= ids
            for p in some:
                if id(p) in self._batches:
                    p.grad = None

    def _shares(self, params: list[torch.Tensor]) -> dict[Batch, list[torch.Tensor]]:
        """These parameters by the batch of each; those that have none are a new one for each device, whose gradients
        are completed by a thread of its own."""
        new: dict[torch.device, Batch] = {}
        for p in params:
            if id(p) not in self._batches:
                batch = self._batches[id(p)] = new.setdefault(p.device, Batch({}))
                batch.params[id(p)] = p
        shares: dict[Batch, list[torch.Tensor]] = {}
        for p in params:
            shares.setdefault(self._batches[id(p)], []).append(p)
        return shares

    def _use_share(self, opt: Optimizer, batch: Batch, scaling: Scaling) -> None:
        """Step, or measure, those of a batch that have a gradient."""
        buckets = opt.look_at_groups().buckets if self._measuring else opt.engine.buckets
        engine = batch.engine
        if engine is None or engine.buckets is not buckets:
            engine = Engine(buckets, frozenset(batch.params))
        if self._measuring:
            with torch.no_grad():
                engine.measure(opt.groups.items(scaling, among=engine.among), scaling)
        else:
            before = engine.steps.repeated
            engine = batch.engine = opt._step_some(engine, scaling)
            repeated = engine.steps.repeated > before
            self._note(engine, repeated)
            if not repeated:
                self._let_go(opt, batch)
        if (norm := engine.norm) is not None:
            self._add(norm.squares.sum())

    def _skip_share(self, opt: Optimizer, batch: Batch, scaling: Scaling) -> None:
        """Leave out those of a batch that have a gradient, as that is not finite: nor is the norm."""
        self._let_go(opt, batch)
        if scaling.measures:
            device = next(iter(batch.params.values())).device
            self._add(torch.full((), math.inf, dtype=torch.float64, device=device))

    def _add(self, squares: torch.Tensor) -> None:
        others = self._squares.get(squares.device)
        self._squares[squares.device] = squares if others is None else others + squares

    def _let_go(self, opt: Optimizer, batch: Batch) -> None:
        """Leave parameters alone that the groups no longer have."""
        listed = {id(p) for group in opt.param_groups for p in group["params"]}
        for key in [key for key in batch.params if key not in listed]:
            p = batch.params.pop(key)
            del self._batches[key]
            if (hook := self._hooks.pop(p, None)) is not None:
                hook.remove()

    def _note(self, engine: Engine, repeated: bool) -> None:
        self._steps, self._all = self._steps + 1, self._all + 1
        if repeated:
            self._repeated += 1
        else:
            self._why = engine.steps.why

    # -- clipping --
    def _scaling(self, opt: Optimizer, found: torch.Tensor | float) -> Scaling:
        """What gradients are multiplied by: one over the loss scale, and the clip coefficient."""
        limit = opt.max_grad_norm
        if limit is None and not self._scales():
            opt._scaling.receive(None, None)  # GradScaler's of another step
            return opt._scaling
        given = self._given(opt, measures=limit is not None and self.clip == "last")
        factor = self._inverse
        if limit is not None and (coefficient := self._coefficient(limit)) is not None:
            if isinstance(factor, torch.Tensor):
                factor = factor.to(coefficient.device)
            factor = coefficient * factor
        given.multiply(factor, found)
        return given

    def _coefficient(self, limit: float) -> torch.Tensor | None:
        """What gradients are multiplied by so that their norm is no larger; None: nothing, as none was taken."""
        if self.clip is None:
            raise _unclipped()
        if self.clip == "measured" and not self._fresh:
            raise RuntimeError(
                "max_grad_norm needs the norm of this pass, which was not measured. Remedy: run the backward pass "
                'twice, first within measure(), or choose release_gradients(clip="last")'
            )
        norm = self._norm if self.clip == "measured" else self._finite
        if norm is None:
            return None
        coefficient = (limit / (norm.double() + EPS)).clamp(max=1.0)
        return coefficient if self.clip == "measured" else coefficient.nan_to_num(1.0)

    def _scales(self) -> bool:
        return self.scaler is not None and self.scaler.is_enabled()

    def _given(self, opt: Optimizer, measures: bool) -> Given:
        if measures not in self._scalings:
            self._scalings[measures] = Given(opt._scaling.amp)
            self._scalings[measures].measures = measures
        return self._scalings[measures]

    def _take_norm(self) -> None:
        """The norm that follows from the squares of all batches."""
        if found := list(self._squares.values()):
            root = torch.stack([each.to(found[0].device) for each in found]).sum().sqrt()
            inverse = self._inverse
            self._norm = (
                root * (inverse.to(root.device) if isinstance(inverse, torch.Tensor) else inverse)
            ).float()
            before = torch.full_like(self._norm, math.nan) if self._finite is None else self._finite
            self._finite = self._norm.where(self._norm.isfinite(), before.to(root.device))
            self._squares.clear()

    # -- checks --
    def _optimizer(self) -> Optimizer:
        opt = self._ref()
        assert opt is not None
        return opt

    def _hook(self, p: torch.Tensor) -> None:
        if p not in self._hooks and p.requires_grad:
            self._hooks[p] = p.register_post_accumulate_grad_hook(_hook_of(weakref.ref(self)))

    def _forget_pass(self) -> None:
        self._waiting.clear()
        self._stepped.clear()
        self._squares.clear()
        self._steps = 0

    def _refuse(self, opt: Optimizer, params: list[torch.Tensor]) -> None:
        """Raise RuntimeError for what cannot be had a batch at a time."""
        distributed = torch.distributed
        alone = (
            not (distributed.is_available() and distributed.is_initialized())
            or distributed.get_world_size() < 2
        )
        if len({id(p) for p in params}) < len(params):
            raise RuntimeError(
                "a parameter is listed twice, and its gradient is used once. Remedy: list every parameter once"
            )
        if not alone and not all(map(sharded.is_dtensor, params)):
            raise RuntimeError(
                "several processes train, and average gradients once these are complete, which is when "
                "release_gradients() uses them. Remedy: torch's fully_shard, which does so before"
            )
        if opt.max_grad_norm is not None and self.clip is None:
            raise _unclipped()
        refuse_totals(opt)

    def _refuse_unscaled(self) -> None:
        """Raise RuntimeError if GradScaler has divided what is left of the gradients by its scale."""
        opt = self._optimizer()
        if vars(opt).get("grad_scale", 0) is None:  # which says so
            raise RuntimeError(
                "GradScaler.unscale_ was called, and release_gradients() has stepped most parameters before it, and "
                "freed their gradients. Remedy: leave it out, as each batch is unscaled when it is stepped; clip by "
                "max_grad_norm"
            )

    def _none_left(self, what: str) -> None:
        groups = self._optimizer().param_groups
        for g, group in enumerate(groups):
            for i, p in enumerate(group["params"]):
                if p.grad is not None:
                    raise RuntimeError(
                        f"{what}, and parameter {i} of group {g} has one already. Remedy: zero_grad() before it; "
                        'clip="last" takes the norm of accumulated gradients too'
                    )

    def _again(self, p: torch.Tensor) -> RuntimeError:
        groups = self._optimizer().param_groups
        found = ((g, i) for g, group in enumerate(groups) for i, q in enumerate(group["params"]) if q is p)
        g, i = next(found, (-1, -1))
        return RuntimeError(
            f"parameter {i} of group {g} was {'measured' if self._measuring else 'stepped'} in this pass, and has a "
            "gradient again. Remedy: opt.step() once for each backward pass; run all but the last of several passes "
            "within accumulate(); after a pass without opt.step(), say because backward failed, call abandon()"
        )


def refuse_totals(opt: Optimizer) -> None:
    """Raise RuntimeError if a callback needs totals over all parameters."""
    buckets = opt.look_at_groups().buckets
    for which in sorted(buckets.totalling):
        raise RuntimeError(
            f"the callback {name_of(buckets.callbacks[which])} calls fusedopt.total, which is over all parameters, and "
            "release_gradients() steps some before others have a gradient. Remedy: step it without, or a rule without "
            "totals"
        )


def _unclipped() -> RuntimeError:
    return RuntimeError(
        "max_grad_norm is over all gradients, and release_gradients() steps some before others are there. Remedy: "
        'clip="last" scales by the norm of the pass before, clip="measured" by that of a backward pass within '
        "measure(), before the one that steps; or set max_grad_norm to None"
    )


def _unmeasured() -> RuntimeError:
    return RuntimeError(
        "a step is skipped where a gradient is infinite, and release_gradients() steps some parameters before others "
        'have one. Remedy: run the backward pass twice, first within measure(), which finds out; or skip="batches" '
        "leaves out only the batches with such gradients"
    )


def _where(p: torch.Tensor) -> Hashable:
    """What gradients must share to be used together: a device, and the stream there that they are made on."""
    streams = p.is_cuda or p.is_xpu
    return p.device, torch.accelerator.current_stream(p.device).stream_id if streams else None


def _hook_of(ref: weakref.ref[GradientRelease]) -> Any:
    """What torch calls, which keeps nothing alive."""

    def complete(p: torch.Tensor) -> None:
        release = ref()
        if release is not None:  # the optimizer lives
            release.complete(p)

    return complete
