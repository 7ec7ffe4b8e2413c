"""The one optimizer class: a ``torch.optim.Optimizer`` made of callbacks, which also speaks fastai's protocol."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypedDict

import torch
import torch.optim.optimizer as _torch_optimizer

from .. import backends, env
from ..callback import GROUPS_OWN, defaults_of, name_of
from ..step import sharing, transforms
from ..step.buckets import Buckets
from ..step.engine import Engine
from ..step.items import Item
from ..step.launching import GraphScalars
from ..step.scaling import NORM, Scaling
from . import checkpoint, names, storing
from .accepted import as_callbacks, as_param_groups, check_known, default_of, is_listed, list_of
from .apply import Applications
from .explain import Explanation, explain
from .fastai import FastaiFace
from .groups import ParamGroups
from .release import Clipping, GradientRelease, Skipping, refuse_totals
from .state import State


class Options(TypedDict, total=False):
    """What every named optimizer takes besides its hyperparameters; `Optimizer` says more of each."""

    backend: str | None
    """"auto" (by device), "cpp", "cuda", "triton" or "reference" (eagerly); None: ``FUSEDOPT_BACKEND``, else auto."""
    state_dtype: torch.dtype | None
    """The dtype that new state is stored in; None: what the rule asks for, which is mostly the parameter's."""
    storage: str | Mapping[str, str] | torch.dtype | None
    """How state and parameters are stored: a policy's name, or a dict from names of state, "param" and "*" to such."""
    amp_fused: bool
    """Read GradScaler's scale, and what it found, in the kernel."""
    max_grad_norm: float | None
    """The global norm above which gradients are scaled down inside the step; None: they are not."""


class AllOptions(Options, total=False):
    """With ``capturable``, which some of torch's optimizers name among their arguments."""

    capturable: bool
    """Keep counts of steps on the device, so that a step can be captured into a CUDA graph."""


class Optimizer(FastaiFace):
    """Steps parameters by a list of callbacks, compiled into one fused kernel.

    Args:
        params: parameters; or several groups: torch's dicts, or a list of lists as fastai's splitters give. A dict's
            ``cbs`` are the group's own callbacks, in place of the optimizer's.
        cbs: callbacks ``cb(p, **state, **hypers)``, run in order; ``p`` has ``.data`` and ``.grad``; a returned dict is
            kept in ``opt.state[p]`` and handed back on the next step, but for keys that begin with an underscore, which
            are handed to the later callbacks of the step alone. ``cb.defaults`` gives hyperparameter defaults.
        backend: ``"auto"`` (by device), ``"cpp"``, ``"cuda"``, ``"triton"``, or ``"reference"`` (the callbacks run
            eagerly). Default: the environment's ``FUSEDOPT_BACKEND``, else auto.
        state_dtype: storage dtype of state, whatever dtype the callbacks ask for or a checkpoint has.
        storage: how state and parameters are stored: a policy's name (``"bfloat16_sr"``), or a dict from names of
            state, ``"param"`` and ``"*"`` (all other state) to such; see `fusedopt.storage`. A group's may be another.
        state_names: callback argument name → key in ``opt.state[p]``, where they differ.
        hyper_names: callback argument name → param-group key, where the default map (see ``fusedopt.names``) does not
            fit.
        title: what kernels and explanations are called; else the last callback's name.
        amp_fused: let ``torch.amp.GradScaler`` hand over its scale and what it found, and read both in the kernel: no
            gradient is rewritten, and nobody waits to know whether a step is skipped. Off by default, because code that
            clips between ``unscale_`` and ``step`` (Lightning) refuses optimizers that do this.
        max_grad_norm: scale gradients as if by ``torch.nn.utils.clip_grad_norm_`` over all parameters with a gradient:
            by min(max_grad_norm / (norm + 1e-6), 1), inside the step, none is rewritten. See ``grad_norm``.
        hypers: hyperparameters, by fastai's names or torch's; ``lr`` may be a slice or a list, one value per group.
            ``capturable`` is one of them: keep step counts on the device; see ``upload_hypers``.

    Raises:
        TypeError: parameters that are no tensors, a hyperparameter given twice, callbacks that cannot be called.
        ValueError: no parameters, a parameter twice, a complex parameter, a negative or NaN hyperparameter, an unknown
            backend, a max_grad_norm that is not above zero.
    """

    state: State
    state_names: ClassVar[Mapping[str, str]] = {}
    hyper_names: ClassVar[Mapping[str, names.Place]] = {}
    _closed: ClassVar[bool] = False
    """Whether the hyperparameters given to the constructor are all there are to our own callbacks."""
    _looks_first: ClassVar[bool] = False
    """Whether a parameter listed twice has its state looked up for both before either steps."""

    @torch._disable_dynamo  # which would build half of it in compiled code
    def __init__(
        self,
        params: Any,
        cbs: Callable[..., Any] | Sequence[Any],
        *,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
        storage: str | Mapping[str, str] | torch.dtype | None = None,
        state_names: Mapping[str, str] | None = None,
        hyper_names: Mapping[str, names.Place] | None = None,
        title: str | None = None,
        amp_fused: bool = False,
        max_grad_norm: float | None = None,
        **hypers: Any,
    ) -> None:
        if hypers.pop("train_bn", None) is not None:
            warnings.warn(
                "train_bn has no effect on an optimizer; set it on the Learner",
                UserWarning,
                stacklevel=env.caller_level(),
            )
        self.cbs, params = as_callbacks(cbs), as_param_groups(params)
        theirs = [cb for group in params if isinstance(group, dict) for cb in list_of(group, [])]
        self.backend = backends.check_name(backend)
        if state_dtype is not None and not (
            isinstance(state_dtype, torch.dtype) and state_dtype.is_floating_point
        ):
            raise TypeError(f"state_dtype must be a floating point dtype, not {state_dtype!r}")
        self.state_dtype = state_dtype
        if storage is not None:
            if state_dtype is not None:
                raise TypeError("state_dtype is a simple case of storage, give one of them")
            hypers[storing.HYPER] = storage
        if state_names is not None:
            self.state_names = dict(state_names)  # type: ignore[misc]
        if hyper_names is not None:
            self.hyper_names = dict(hyper_names)  # type: ignore[misc]
        self.title = title
        self.frozen_idx = 0
        self._scaling = Scaling(bool(amp_fused))
        self.max_grad_norm = max_grad_norm
        self._set_up(hypers, theirs)
        if storage is not None:
            hypers[storing.HYPER] = storing.as_text(storage, self.groups)
        defaults: dict[str, Any] = {}
        values = self.hyper_map.to_fastai(hypers)
        check_known(values, [*self.groups.whole(self.cbs), *theirs])
        self._given = frozenset(values)
        values = {k: v for cb in self.cbs for k, v in defaults_of(cb).items()} | values
        listed = {k: v for k, v in values.items() if is_listed(k, v)}
        for name, value in values.items():
            value = default_of(name, value)
            names.check(name, value)
            self.hyper_map.write(defaults, name, value)
        defaults.setdefault("differentiable", False)
        super().__init__(params, defaults)
        for name, value in listed.items():
            self.set_hyper(name, value)

    def _set_up(self, hypers: Mapping[str, Any], theirs: Sequence[Callable[..., Any]]) -> None:
        """What is derived from callbacks (``theirs``: of param groups) and options, and so never saved."""
        self.groups = ParamGroups(
            self, list(hypers), self.hyper_names, self.state_names, self._closed, theirs
        )
        if storing.HYPER in hypers:
            self.groups.around = storing.AROUND
        self._engine: Engine | None = None
        self._anew = threading.RLock()
        """Of threads that share the optimizer one makes state and binds it. Else each would go on with its own."""
        self._applications = Applications()
        self._captured: list[GraphScalars] = []
        self.gradient_release: GradientRelease | None = None
        """What `release_gradients` returned, until that is removed."""
        tracer = transforms.tracer()
        self._made_in = None if tracer is None else weakref.ref(tracer)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler asks before it hands over its scale and what it found; there with ``amp_fused`` only.

        accelerate knows a skipped step by its not being called, so in its calls GradScaler decides. Where gradients
        are released, it has been asked batch by batch.
        """
        if self.gradient_release is not None:
            if self.gradient_release.scaler is None:
                raise RuntimeError(
                    "GradScaler looks at all gradients before a step, and release_gradients() has stepped most of them "
                    "already, scaled as they were. Remedy: release_gradients(scaler=scaler); or train in bfloat16, "
                    "which needs no loss scaling"
                )
            return True
        if not self._scaling.amp:
            raise AttributeError("_step_supports_amp_scaling")
        return getattr(self.step, "__module__", "") != "accelerate.optimizer"

    @property
    def max_grad_norm(self) -> float | None:
        """The global norm that gradients are scaled down to where theirs is larger; None: nothing is scaled."""
        return self._scaling.max_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if isinstance(value, (str, bytes)):
            raise TypeError(f"max_grad_norm must be a number or None, not {value!r}")
        if value is not None and not float(value) > 0:
            raise ValueError(f"max_grad_norm must be above 0, or None to clip nothing; it is {value}")
        self._scaling.max_norm = None if value is None else float(value)

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """The global norm of the last step's gradients before clipping: a float32 0-d tensor, written by each step.

        None without ``max_grad_norm``, and before the first step.
        """
        if self.gradient_release is not None:
            return self.gradient_release.grad_norm
        norm = self._engine and self._engine.norm
        return self._scaling.buffer(NORM, norm.main) if norm else None

    @property
    def engine(self) -> Engine:
        """The compiler and runtime behind ``step``; made anew when callbacks, or what they read, are changed."""
        if self._engine is None or (why := self._engine.buckets.outdated(self.groups.whole(self.cbs))):
            self._engine = self._new_engine(why if self._engine else "")
        return self._engine

    def look_at_groups(self) -> Engine:
        """The engine, for the lists of callbacks that groups have now. (Bound steps are guarded for that.)"""
        spans = self.groups.look()
        if self.engine.buckets.callbacks != self.groups.callbacks:
            self._engine = self._new_engine("a group has other callbacks")
        self.engine.buckets.spans = spans if self.groups.theirs else ()
        return self.engine

    def _new_engine(self, why: str) -> Engine:
        title = self.title or type(self).__name__
        if title == "Optimizer":
            title = name_of(self.cbs[-1]) if self.cbs else "nothing"
        said = self._engine.buckets.verdicts.said if self._engine else None
        spans, own = self.groups.look(), len(self.groups.whole(self.cbs))
        buckets = Buckets(self.groups.callbacks, self.backend, title, self.state_dtype, said, own=own)
        buckets.spans = spans if self.groups.theirs else ()
        return Engine(buckets, after=(self._engine.steps, why) if self._engine else None)

    # -- torch.optim --
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "state" and isinstance(value, dict) and not isinstance(value, State):
            value = State(value)
        super().__setattr__(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as torch.optim does.

        Args:
            param_group: ``{"params": ..., **hypers}``, with hyperparameters by torch's names or fastai's; ``cbs`` are
                callbacks of its own.

        Raises:
            TypeError: it is no dict; callbacks that cannot be called.
            KeyError: it has no ``params``.
            ValueError: a parameter that another group has, or that is complex; an empty list of callbacks; a negative
                or NaN hyperparameter; ``storage`` where the optimizer has none.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a param group must be a dict, not {type(param_group).__name__}")
        if "params" not in param_group:
            raise KeyError(
                f"a param group lists its parameters under 'params'; this one has {list(param_group)}"
            )
        group = {k: v for k, v in param_group.items() if k in names.NO_HYPERS}
        values = self.hyper_map.to_fastai({k: v for k, v in param_group.items() if k not in group})
        theirs = self._take_list(group)
        brought = {k: v for cb in theirs for k, v in defaults_of(cb).items() if k not in self._given}
        # torch fills in the defaults of a group that sets nothing itself
        if storing.HYPER in values:
            values[storing.HYPER] = storing.of_group(values[storing.HYPER], self.groups)
        filled = self.hyper_map.of_group(self.defaults) | brought | values if brought or values else {}
        roles, own = self.groups.roles(group), self.groups.own()
        for name, value in filled.items():
            value = names.plain(value)
            if roles.hands(name, own):  # other libraries' keys are not ours to check
                names.check(name, value)
            self.hyper_map.write(group, name, value)
        super().add_param_group(group)
        index = len(self.param_groups) - 1
        for i, p in enumerate(self.param_groups[index]["params"]):
            if p.is_complex():
                self.param_groups.pop()
                wrong = "complex; use torch.view_as_real(p) as the parameter instead"
                raise ValueError(f"parameter {i} of group {index} is {wrong}")
        self.groups.handed(self.param_groups[index])

    def _take_list(self, group: dict[str, Any]) -> list[Callable[..., Any]]:
        """Make the callbacks that a group has of its own a list there, and known by their names."""
        if group.get(GROUPS_OWN) is None:
            group.pop(GROUPS_OWN, None)
            return []
        found = group[GROUPS_OWN] = as_callbacks(group[GROUPS_OWN])
        if not found:
            raise ValueError(
                f"the {GROUPS_OWN!r} of a param group is empty. Remedy: name callbacks, or leave its parameters out"
            )
        self.groups.theirs += [cb for cb in found if cb not in self.groups.callbacks]
        return found

    def step(
        self, closure: Callable[[], Any] | None = None, *, extra: Mapping[str, Any] | None = None
    ) -> Any:
        """Step every parameter that has a gradient; returns what the closure returns, if there is one.

        Args:
            closure: as in torch.optim.
            extra: tensors that callbacks get in this step besides, by the names of their arguments: each a list with
                one per parameter, in the order of the groups (None: this one has none), or a dict by parameter; of the
                parameter's shape, or 0-d. They are read where they are, and never changed or kept.

        If a callback raises, or a gradient is refused (sparse, of another shape or device), or an extra tensor is
        (TypeError, ValueError), nothing has changed.
        """
        # torch would wrap this method, to run hooks and to name it in profiles, at a cost on every step that exceeds
        # the step's own. So its wrapper is used only when it has something to do. A subclass's own step torch wraps.
        if type(self).step is Optimizer.step and (_observed(self) or torch.compiler.is_compiling()):
            return _observed_step(self, closure, **({} if extra is None else {"extra": extra}))
        return self._step(closure, extra)

    step.hooked = True  # type: ignore[attr-defined]

    @torch._disable_dynamo
    @torch.no_grad()
    def apply(
        self,
        cbs: Callable[..., Any] | Sequence[Any],
        *,
        extra: Mapping[str, Any] | None = None,
        **hypers: Any,
    ) -> None:
        """Run callbacks once, outside of a step, over the same parameters, state and groups, as fused as a step is.

        For what is not done in each step: changing between training and evaluation weights, averages of weights,
        setting state up. State that they return is kept in ``opt.state``; counts of steps are what callbacks make of
        them. Callbacks whose code does not name ``grad`` are run on every parameter; if one of them does, all are run
        on those that have a gradient, and ``p.grad`` is as it is: neither clipped nor unscaled. Hooks of ``step`` are
        not called.

        Args:
            cbs: a callback or several, as in the constructor. Hand over the same ones each time: a function that is
                made anew is traced anew.
            extra: tensors that callbacks get in this call besides, see `step`.
            hypers: hyperparameters of this call, in place of the groups' own.

        Raises:
            TypeError: a callback that cannot be called; a hyperparameter or extra tensors that no callback takes.
            ValueError: a hyperparameter that is NaN, or negative where it must not be; extra tensors that do not fit.
            RuntimeError: the callbacks read gradients and no parameter has one, or `release_gradients` frees them; a
                CUDA graph is being captured.

        If anything is raised, nothing has changed.
        """
        found = as_callbacks(cbs)
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "apply() cannot be captured into a CUDA graph: it would repeat this call's numbers. Remedy: call it "
                "before or after the graph is replayed"
            )
        applied = self._applications.of(self, found)
        if self.gradient_release is not None and applied.graded is not None:
            raise RuntimeError(
                f"the callback {name_of(applied.graded)} reads gradients, and release_gradients() frees them in the "
                "backward pass; nothing was applied. Remedy: remove() what release_gradients() returned, or write the "
                "callback without p.grad"
            )
        applied.take(hypers)
        with applied.groups.with_extra(extra):
            if transforms.active():
                buckets = Buckets(found, "reference", "transformed", self.state_dtype)
                self._run_transformed(applied.items(), buckets, Scaling(amp=False))
            else:
                applied.run()

    def release_gradients(
        self,
        batch_bytes: int | None = None,
        *,
        clip: Clipping | None = None,
        scaler: torch.amp.GradScaler | None = None,
        skip: Skipping = "step",
    ) -> GradientRelease:
        """Step parameters during the backward pass, as their gradients are complete, and free these.

        So the gradients of the whole model never exist at once. ``step()`` stays in the training loop: it steps what is
        left, and ends the pass; all else goes on as before. What is stepped has the values that an ordinary step would
        give it. Where several backward passes are for one step, all but the last run within ``accumulate()`` of what
        this returns; its ``remove()`` ends it, and it is a context manager. See docs/memory.md.

        Args:
            batch_bytes: parameters are stepped together when their gradients are of this size; 0: each on its own.
                Default: a sixteenth of all gradients, from 1 to 64 MiB.
            clip: which norm ``max_grad_norm`` is compared with, as that of all gradients comes too late: ``"last"``,
                that of the pass before (the first is not clipped), or ``"measured"``, that of a backward pass more,
                within ``measure()`` of what this returns.
            scaler: who scales losses, if anybody does: the training loop calls its ``scale``, ``step`` and ``update``
                as ever. Gradients are multiplied by one over its scale as they are stepped.
            skip: what is left out where a gradient is infinite or NaN, while GradScaler finds its scale: ``"step"``,
                all of the step, which a backward pass more, within ``measure()``, has to find out; or ``"batches"``,
                the batches with such gradients alone, while the others of that pass are stepped.

        Raises:
            RuntimeError: gradients are released already; a parameter is listed twice; ``max_grad_norm`` without
                ``clip``; callbacks call ``fusedopt.total``; several processes train. Later, in backward or ``step()``:
                two passes for one step; a GradScaler that this does not know, or its ``unscale_``; extra tensors; a
                CUDA graph is captured.
            TypeError: a scaler that is no GradScaler.
            ValueError: a negative size, another ``clip`` or ``skip``.
        """
        if self.gradient_release is not None:
            raise RuntimeError(
                "gradients are released already. Remedy: remove() what the first call returned"
            )
        self.gradient_release = GradientRelease(self, batch_bytes, clip, scaler, skip)
        return self.gradient_release

    def _step_some(self, engine: Engine, scaling: Scaling) -> Engine:
        """Step those of the engine's parameters that have a gradient; returns the engine that did."""
        if transforms.active():
            return self._step_transformed(scaling, engine.among)
        if not engine.repeat(scaling):
            engine = self._step_some_anew(engine, scaling)
        return engine

    @torch.no_grad()
    def _step_some_anew(self, engine: Engine, scaling: Scaling) -> Engine:
        buckets = self.look_at_groups().buckets
        if engine.buckets is not buckets:
            engine = Engine(buckets, engine.among)
        refuse_totals(self)
        self._step_in_turn(engine, self.groups.items(scaling, among=engine.among), scaling)
        return engine

    def upload_hypers(self) -> None:
        """Send the hyperparameters of ``param_groups`` to where a step captured into a CUDA graph reads them.

        Capture a step of ``capturable`` groups after three that were not captured, with gradients that stay where they
        are. Before a replay, change learning rate, momentum, weight decay or ``max_grad_norm`` as you like and call
        this, on the stream that the graph is replayed on. Nothing waits for the device. A learning rate that is a
        tensor there is read by the kernels themselves; it needs no call.

        Raises RuntimeError if no capturable group has stepped yet, or if a callback would take another branch than the
        one captured; the remedy is to capture again.
        """
        last = self._engine.resident if self._engine else None
        if not any(each.launches for each in (*self._captured, last) if each):
            raise RuntimeError("upload_hypers() is for groups with capturable=True that have stepped")
        hypers = [self.groups.hypers(group) for group in self.param_groups]
        for each in self._captured:
            each.upload(hypers)
        if last is not None and last not in self._captured:
            last.upload(hypers, captured=not self._captured)  # it may be captured next

    def _keep_captured(self) -> None:
        """What a graph replays has to live as long as the optimizer."""
        if not all(group.get("capturable") for group in self.param_groups):
            raise RuntimeError(
                "step() is being captured into a CUDA graph, and would repeat this step's numbers for ever. Remedy: "
                "make the optimizer with capturable=True"
            )
        resident = self.engine.resident
        if resident is not None and resident not in self._captured:
            self._captured.append(resident)

    def _step(self, closure: Callable[[], Any] | None = None, extra: Mapping[str, Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._scaling.amp:  # GradScaler sets these attributes for the time of its call
            self._scaling.receive(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        try:
            if extra and self.gradient_release is not None:
                raise RuntimeError(
                    "extra tensors are for a whole step, and release_gradients() has stepped most of it already. "
                    "Remedy: step without them, or without release_gradients()"
                )
            if extra:
                with self.groups.with_extra(extra):
                    self._step_now()
            else:
                self._step_now()
        except BaseException:  # where GradScaler leaves them, and would multiply them by the next scale
            vars(self).pop("grad_scale", None), vars(self).pop("found_inf", None)
            raise
        # Nothing is captured before CUDA is initialised, and asking would need a driver.
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            self._keep_captured()
        return loss

    def _step_now(self) -> None:
        if self.gradient_release is not None:
            self.gradient_release.end()
        elif transforms.active():
            self._step_transformed(self._scaling)
        elif not self.engine.repeat(self._scaling):
            waited = not self._anew.acquire(blocking=False)
            if waited:
                self._anew.acquire()
            try:
                if not (waited and self.engine.repeat(self._scaling)):
                    self._step_anew()
            finally:
                self._anew.release()

    @torch.no_grad()
    def _step_anew(self) -> None:
        """A step of a structure that is not known: looks at every tensor."""
        self.look_at_groups()
        self._step_in_turn(self.engine, self.groups.items(self._scaling), self._scaling)

    def _step_in_turn(self, engine: Engine, todo: list[Item], scaling: Scaling) -> None:
        """Step at once what has no memory in common, and the others after it: one launch writes to each tensor once."""
        todo, later, why = sharing.in_turn(todo)
        remedy = f"list every parameter once{'' if 'twice' in why else ', or give it memory of its own'}"
        if later and self.max_grad_norm is not None:
            raise RuntimeError(
                f"{why}, and max_grad_norm takes each gradient's norm once. Remedy: {remedy}, or clip with "
                "torch.nn.utils.clip_grad_norm_"
            )
        if later and engine.buckets.totalling:
            raise RuntimeError(f"{why}, and fusedopt.total takes each once. Remedy: {remedy}")
        if later and self.groups.extra:
            raise RuntimeError(f"{why}, and extra tensors are one per parameter. Remedy: {remedy}")
        engine.step(todo, scaling, self.groups, bind=not later, why=why)
        while later:
            todo, later, _ = sharing.in_turn(later)
            for item in () if self._looks_first else todo:
                item.state = self.groups.state_of(item.home, item.where[0], item.modes.on_device)
                item.alike = None
            engine.step(todo, scaling, self.groups, why=None)

    @torch.no_grad()
    def _step_transformed(self, scaling: Scaling, among: frozenset[int] | None = None) -> Engine:
        """A step that a transform or a dispatch mode sees: see `transforms`."""
        buckets = self.look_at_groups().buckets
        own = Buckets(buckets.callbacks, "reference", "transformed", self.state_dtype)
        own.spans = buckets.spans
        return self._run_transformed(self.groups.items(scaling, among=among), own, scaling.fresh())

    def _run_transformed(self, todo: list[Item], buckets: Buckets, scaling: Scaling) -> Engine:
        made_in = self._made_in and self._made_in()
        todo, later, why = sharing.in_turn(transforms.prepared(todo, made_in))
        if later:
            raise RuntimeError(f"{why}, and stepped within a transform; list it once, in memory of its own")
        if made_in is None and (names := transforms.names()):
            what = f"operations go through {names}, so parameters are stepped unfused, by operations that it sees"
            self.engine.buckets.verdicts.warn("transformed", what)
        engine = Engine(buckets)
        engine.step(todo, scaling)
        self.groups.keep(todo)
        return engine

    def state_dict(self) -> dict[str, Any]:
        """The state in torch.optim's schema, plus ``"fusedopt"`` if fastai's flags are set. Tensors are live."""
        live = self.state

        def translate(opt: torch.optim.Optimizer) -> None:
            object.__setattr__(opt, "state", checkpoint.to_torch(self))

        def complete(opt: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            state_dict.update({checkpoint.EXTRA: found} if (found := checkpoint.extra(self, live)) else {})
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
                if GROUPS_OWN in saved:  # which are no data, but for what they are called
                    saved[GROUPS_OWN] = [name_of(cb) for cb in list_of(group, [])]
                if saved.get("capturable") and all(p.device.type == "cpu" for p in group["params"]):
                    saved["capturable"] = False  # torch's own optimizers have it on accelerators only

        # Innermost, so that the hooks of others see what they expect.
        with contextlib.ExitStack() as hooks:
            hooks.callback(self.register_state_dict_pre_hook(translate).remove)
            hooks.callback(self.register_state_dict_post_hook(complete, prepend=True).remove)
            try:
                return super().state_dict()
            finally:
                self.state = live

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict of ours, of torch.optim's matching optimizer, or of fastai's.

        Nothing is shared with it, and every tensor keeps its dtype. State that the same rule of the other library
        means differently (RMSProp's momentum) is left out with a warning.

        Args:
            state_dict: what ``state_dict()`` or ``to_fastai_state_dict()`` returned.

        Raises:
            ValueError: it does not fit; nothing has changed.
        """
        if not isinstance(state_dict, dict):
            raise ValueError(
                f"a state dict has the keys 'state' and 'param_groups'; this is a {type(state_dict).__name__}"
            )
        load = checkpoint.Load(self)
        with contextlib.ExitStack() as hooks:
            hooks.callback(self.register_load_state_dict_pre_hook(load.prepare).remove)
            hooks.callback(self.register_load_state_dict_post_hook(load.finish, prepend=True).remove)
            super().load_state_dict(state_dict)
            self._forget_bound()  # they are of the old tensors

    def clear_state(self) -> None:
        """Forget all state of parameters but the flags ``do_wd`` and ``force_train``."""
        self._forget_bound()
        super().clear_state()

    def _forget_bound(self) -> None:
        released = self.gradient_release.engines if self.gradient_release is not None else []
        for engine in (self.engine, *released, *(applied.engine for applied in self._applications)):
            engine.bound.clear()

    def to_fastai_state_dict(self) -> dict[str, Any]:
        """The state as fastai's own optimizers save and load it (fastai cannot read torch's schema)."""
        return checkpoint.to_fastai(self)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("cbs", "backend", "state_dtype", "state_names", "hyper_names", "frozen_idx", "title")
        own = {k: getattr(self, k) for k in kept} | {
            "max_grad_norm": self.max_grad_norm,
            "_given": self._given,
        }
        if self.groups.theirs:
            own["hyper_names"] = self.hyper_map.place  # which theirs have a part in
        if self._scaling.amp:
            own["_step_supports_amp_scaling"] = True
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "cbs" in state:
            self._scaling = Scaling(state.get("_step_supports_amp_scaling", False))
        super().__setstate__({k: v for k, v in state.items() if k != "max_grad_norm"})
        if "cbs" in state:
            self._given = state.get("_given", frozenset())
            theirs = [cb for group in self.param_groups for cb in list_of(group, [])]
            self._set_up(self.defaults, theirs)
            self.max_grad_norm = state.get("max_grad_norm")
        self.state = State(self.state) if not isinstance(self.state, State) else self.state
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    # -- what it does --
    def explain(self) -> Explanation:
        """What a step does: stages, launches, bytes; what was compiled and why; what runs eagerly and why."""
        return explain(self)

    def kernel_source(self) -> str:
        """The generated kernels' source, one after another (without the fixed skeleton around them)."""
        return explain(self).source

    @property
    def applications(self) -> Applications:
        """The callbacks that were applied, and what became of them."""
        return self._applications


def _observed(opt: Optimizer) -> bool:
    """Whether somebody hooks into steps, or profiles them."""
    hooks = (
        opt._optimizer_step_pre_hooks,
        opt._optimizer_step_post_hooks,
        _torch_optimizer._global_optimizer_pre_hooks,
        _torch_optimizer._global_optimizer_post_hooks,
    )
    return any(hooks) or torch.autograd.profiler._is_profiler_enabled


# Opaque to dynamo: a kernel launch is nothing it could trace.
_observed_step = torch._disable_dynamo(torch.optim.Optimizer.profile_hook_step(Optimizer._step))
