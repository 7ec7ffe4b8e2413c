"""`fuse`: an optimizer's ``step`` in fused kernels, or as it was written where it has no such form."""

from __future__ import annotations

import contextlib
import copyreg
import dataclasses
import functools
import inspect
import time
import types
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
import torch.optim.optimizer as _torch_optimizer

from .. import backends, env
from ..callback import place_of
from ..extension import leaf
from ..optimizer.core import Optimizer
from ..optimizer.explain import Explanation, explanation
from ..optimizer.storing import held
from ..step import transforms
from ..step.engine import Engine
from ..step.items import Item
from ..step.scaling import Scaling
from ..step.verdicts import Eager
from ..storage.policy import PARAM, POLICIES, chosen, of
from ..trace.signals import Untraceable
from ..trace.totals import Total
from . import amp
from .buckets import ClassGroups, StepBuckets, Waits
from .capture import FIRST, Captures, refuse
from .check import Sample
from .shadow import OURS, NewState
from .stored import plain
from .stores import stores_of
from .tracing import Options, plain_function
from .watch import where_raised

RETRACES = 3
"""Steps in a row that have to be traced anew, or that have no trace, after which none is tried any more."""
KINDS = 12
"""The same where each has gradients of other kinds of parameters, of which there are only so many; and how many traces
may be left unpaid (`PAID`)."""
PAID = 1 / 16
"""The part of a trace that a step pays for by being one that is known."""
DEAR = 2.0
"""Seconds that traces may take before they count as several: of this thread, without what compilers take, so that
neither a slow one nor a busy machine counts. The first trace counts as one."""
UNKNOWN = "it was not traced yet: the first step makes the class's state, and the second one is. Remedy: take two steps"
BEFORE = "no parameter has a gradient before its closure is called: later steps may be fused"
REMEDY = "nothing is wrong, it is as fast as without fusedopt; docs/classes.md says what fuses"
REFERENCE = 'the reference backend compiles nothing. Remedy: backend="auto"'

Opt = TypeVar("Opt", bound=torch.optim.Optimizer)


class Fused:
    """What stands behind a fused optimizer's ``step``. ``reason``: why the last step ran as it was written, or "".

    ``given_up``: no step is traced any more.
    """

    def __init__(self, opt: torch.optim.Optimizer, options: Options) -> None:
        self._ref, self.options = weakref.ref(opt), options
        self.takes = amp.takes(opt, options.amp_fused, options.max_grad_norm)
        self.scaling = (amp.Handed if self.takes else Scaling)(False, options.max_grad_norm)
        self.groups = ClassGroups(opt, options.storage, options.capturable)
        self.buckets = StepBuckets(self.groups, type(opt).__name__, options, self.scaling)
        self.engine, self.captures = Engine(self.buckets), Captures()
        self.given_up = options.backend == "reference"
        self.reason, self._why = REFERENCE if self.given_up else "", ""
        self._misses = self._steps = self._failures = self._asked = 0
        self._traces = 0
        self._owed = self._took = self._spent = 0.0
        self._new_trace = False
        self.said: set[Any] = set()

    def __reduce__(self) -> Any:
        return _nothing, ()

    def of(self, opt: torch.optim.Optimizer) -> Fused:
        """What stands behind this optimizer: a copy of one has its own."""
        if self._ref() is opt:
            return self
        vars(opt)["_fusedopt"] = other = Fused(opt, self.options)
        return other

    def step(self, opt: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        if not self.takes or not (handed := amp.taken(opt)):
            return self._step(opt, closure)
        try:
            begins = amp.begins(self.scaling, handed, closure is not None, _captured())
            return self._step(opt) if begins else None
        finally:
            vars(opt).update(handed)
            self.scaling.receive(None, None)

    def _step(self, opt: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        if self.options.capturable and _captured():
            return self._captured_step(opt, closure)
        if self.given_up or transforms.active() or _captured():
            return self._own(opt, closure)
        loss = None
        self.buckets.closure = closure is not None
        if closure is not None:
            if not self.buckets.foreseen() and not (self._can(opt) and self.buckets.foreseen()):
                return self._own(opt, self._observed(opt, closure))
            with torch.enable_grad():
                loss = closure()
        self._steps += 1
        sampled = self.options.check > 1 and self._steps % self.options.check == 0
        sample = Sample(opt, closure is not None, self.buckets.sums, self.scaling) if sampled else None
        if self._repeat():
            self.reason = ""
            self._misses, self._owed = 0, max(self._owed - PAID, 0.0)
        elif not self._anew(opt):
            return self._own(opt, None if closure is None else _called_once(closure, loss))
        host: Any = self.engine.read
        host.write(vars(opt), functools.partial(self._total, opt))
        if self._new_trace:  # now that the step is done, as warnings may be errors
            self._miss(opt, self.engine.steps.why, self._took if self._traces > 1 else 0.0)
        repeated, self._new_trace = not self._new_trace, False
        # What another step would do, which may be to draw numbers, is not done twice.
        if sample is not None and repeated and (sample.whole or not host.sums):
            programs = [kernel.program for kernel, _ in self.engine.launched]
            if why := sample.difference(opt, programs):
                self.reason = f"step {self._steps} was another than its own in {why}. Remedy: report it"
                self._give_up(opt)
        return loss if host.returns_loss else host.returned

    def with_arguments(
        self, opt: torch.optim.Optimizer, closure: Any, more: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        """The class's own step, with these arguments. Raises TypeError where the step is more than that."""
        own = type(opt).step
        inspect.signature(own).bind(opt, closure, *more, **named)
        if self.scaling.max_norm is not None or (self.takes and amp.taken(opt)):
            given = ", ".join([*map(repr, more), *named])
            raise TypeError(
                f"{type(opt).__name__}.step is given {given}, and gradients are to be clipped or unscaled in kernels. "
                "Remedy: fuse it without max_grad_norm and amp_fused"
            )
        self.groups.decode()
        result = own(opt, closure, *more, **named)
        self.groups.encode()
        return result

    def _captured_step(self, opt: torch.optim.Optimizer, closure: Callable[[], Any] | None) -> Any:
        """A step whose launches go into a CUDA graph. Raises RuntimeError if replays of them would not be steps."""
        self.captures.check(opt, self.engine, self.reason, self.given_up)
        self.buckets.closure = closure is not None
        loss = None
        if closure is not None:
            if not self.buckets.foreseen():
                refuse(f"no step with a closure was done before. {FIRST}")
            with torch.enable_grad():
                loss = closure()
        if not self.engine.repeat(self.scaling):
            refuse(f"it is none of those that were done before. {FIRST}")
        self.captures.keep(self.engine)
        return loss if self.engine.read.returns_loss else self.engine.read.returned

    def upload_hypers(self, opt: torch.optim.Optimizer) -> None:
        self.captures.upload(opt, self.engine, self.buckets)

    def _total(self, opt: torch.optim.Optimizer, which: int) -> float:
        """What a total came to in the last step. Waits for the device, where each has all of them."""
        device = next(p.device for group in opt.param_groups for p in group["params"] if p.grad is not None)
        return self.scaling.buffer(str(Total(0, which)), device).item()

    def _own(self, opt: torch.optim.Optimizer, closure: Callable[[], Any] | None) -> Any:
        """The class's own step, of gradients that are unscaled and clipped."""
        if self.takes:
            amp.unscale(opt, self.scaling.inverse)
        self.groups.decode()
        result = self._clipped(opt, closure)
        if not self.given_up:
            self.groups.encode()
        return result

    def _clipped(self, opt: torch.optim.Optimizer, closure: Callable[[], Any] | None) -> Any:
        own, norm = type(opt).step, self.scaling.max_norm
        if getattr(own, "hooked", False):  # torch's hooks are run around all of this
            own = getattr(own, "__wrapped__", own)
        if norm is None:
            return own(opt) if closure is None else own(opt, closure)

        def clip() -> None:
            torch.nn.utils.clip_grad_norm_([p for group in opt.param_groups for p in group["params"]], norm)

        def clipped() -> Any:
            assert closure is not None
            loss = closure()
            clip()
            return loss

        if closure is not None:
            return own(opt, clipped)
        clip()
        return own(opt)

    def _repeat(self) -> bool:
        """Repeat a known step. False if this is none, or a torch call in it raises, nothing having changed."""
        try:
            return bool(self.engine.repeat(self.scaling))
        except Exception as error:
            if not getattr(error, "of_a_call", False) or isinstance(error, torch.OutOfMemoryError):
                raise
            return False

    def _can(self, opt: torch.optim.Optimizer) -> bool:
        """Whether the step calls its closure first, and once, so that we may."""
        if not self._graded():
            self.reason = BEFORE
            return False
        return self._traceable(opt, self.buckets.prepare)

    def _graded(self) -> bool:
        return any(p.grad is not None for p in self.groups.params())

    def _observed(self, opt: torch.optim.Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, given to a step that is not known to call it first. Where gradients are only there once it was
        called, that is found out then, for later steps."""
        known = self._graded()

        def observed() -> Any:
            nonlocal known
            loss = closure()
            if not known:
                known = self._can(opt) or True
            return loss

        return observed

    def _anew(self, opt: torch.optim.Optimizer) -> bool:
        """A step of a structure that is not known; False if the class has to do it, nothing having changed."""
        if not self._traceable(
            opt, lambda todo: self.engine.step(todo, self.scaling, self.groups, bind=True)
        ):
            return False
        self.reason = ""
        self._failures = 0 if self._new_trace else self._failures
        return True

    @torch.no_grad()
    def _traceable(self, opt: torch.optim.Optimizer, use: Callable[[list[Item]], Any]) -> bool:
        """Use what there is to step. False, with the reason noted, if that has no trace."""
        made, began = self.buckets.traces_made, time.thread_time() - self.buckets.compiling
        try:
            self.buckets.wait()
            todo = self.groups.items(self.scaling)
            if not todo:
                raise NewState("no parameter has a gradient", traced=False)
            use(todo)
            if self.buckets.traces_made > made:
                self._new_trace, self._took = True, time.thread_time() - self.buckets.compiling - began
                self._traces, self._spent = self._traces + 1, self._spent + self._took
            return True
        except Waits:
            self.reason = self._why
            return False
        except (Untraceable, Exception) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.reason = self._described(opt, error)
            missed = not isinstance(error, NewState) or error.traced
        if missed:
            self._failures += 1
            if self._failures >= RETRACES:  # time and again, between steps that have one: try ever fewer
                self.buckets.waits, self._why = 2 ** min(self._failures, 16), self.reason
            self._miss(opt, self.reason)
        return False

    def _miss(self, opt: torch.optim.Optimizer, why: str, took: float = 0.0) -> None:
        """Note a step that is traced anew, in so many seconds, or that has no trace."""
        asked = len(self.buckets.attributes)
        if asked > self._asked:  # of parameters: steps that had a trace when less was asked need another
            self._asked, self._misses = asked, 0
        self._misses, self._owed = self._misses + 1, self._owed + max(took / DEAR, 1.0)
        most = RETRACES if self.buckets.known_kinds or self.reason else KINDS
        if self._misses >= most or self._owed >= KINDS:
            if not self.reason:
                self.reason = self._another(opt, why)
            self._give_up(opt)

    def _another(self, opt: torch.optim.Optimizer, why: str) -> str:
        """Why no more steps are traced, of which each had a trace."""
        place = place_of(inspect.unwrap(plain_function(type(opt).step)))
        count = f"{self._traces} of {self._steps} steps were traced anew, in {self._spent:.1f} s"
        return f"{place}: each step is another one{why and f': {why}'}; {count}. Remedy: {REMEDY}"

    def _described(self, opt: torch.optim.Optimizer, error: BaseException) -> str:
        inside = getattr(error, "inside", False)  # the class's code, on its shadow
        where = (inside and getattr(error, "where", "")) or (inside and where_raised(error))
        where = where or place_of(inspect.unwrap(plain_function(type(opt).step)))
        text = (
            str(error) if isinstance(error, (Untraceable, NewState)) else f"{type(error).__name__}: {error}"
        )
        return f"{where}: {text}. Remedy: {getattr(error, 'remedy', '') or REMEDY}"

    def _give_up(self, opt: torch.optim.Optimizer) -> None:
        self.given_up = True
        env.warn_once(
            self.said, "eager", f"{type(opt).__name__}.step runs as it was written, unfused: {self.reason}"
        )

    def explain(self, opt: torch.optim.Optimizer) -> Explanation:
        """What a step does: stages, launches, bytes; what was compiled and why; what runs as it was written and why."""
        name = f"{type(opt).__name__}.step"
        reason = self.reason or ("" if self.engine.launched else UNKNOWN)
        eager = (Eager(name, reason),) if reason else ()
        found = explanation(
            self.engine,
            type(opt).__name__,
            (name,),
            [] if eager else self.engine.launched,
            eager,
            leaf.native is None,
        )
        return dataclasses.replace(found, held=held(self.groups.kept())) if self.options.storage else found


def _called_once(closure: Callable[[], Any], loss: Any) -> Callable[[], Any]:
    """The closure, for a step that is the class's own after all: what it gave is given once more, at the first call."""
    first = True

    def given() -> Any:
        nonlocal first
        if not first:
            return closure()
        first = False
        return loss

    return given


def _nothing() -> None:
    return None


def _captured() -> bool:
    """Whether a CUDA graph is being captured, which would repeat this step's numbers for ever."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _step(
    self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None, *more: Any, **named: Any
) -> Any:
    """A step in fused kernels; see fusedopt.fuse. With other arguments than a closure it is the class's own."""
    if more or named:
        return _fused_of(self).with_arguments(self, closure, more, named)
    if _observed(self) or torch.compiler.is_compiling():
        return _hooked(self, *(() if closure is None else (closure,)))
    return _fused_of(self).step(self, closure)


def _fused_of(opt: torch.optim.Optimizer) -> Fused:
    fused = vars(opt)["_fusedopt"]
    if fused is None:  # a copy of all that it has
        fused = vars(opt)["_fusedopt"] = Fused(opt, Options())
    return fused.of(opt)


# Opaque to dynamo: a kernel launch is nothing it could trace.
@torch._disable_dynamo
@torch.optim.Optimizer.profile_hook_step
def _hooked(self: torch.optim.Optimizer, *closure: Any) -> Any:
    return _fused_of(self).step(self, *closure)


def _scheduled(self: torch.optim.Optimizer, *arguments: Any, **named: Any) -> Any:
    """A step of an optimizer that a scheduler watches."""
    self._opt_called = True  # type: ignore[attr-defined]
    return _step(self, *arguments, **named)


_scheduled._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def _explain(self: torch.optim.Optimizer) -> Explanation:
    return _fused_of(self).explain(self)


def _upload_hypers(self: torch.optim.Optimizer) -> None:
    """Send learning rates and other numbers to where a captured step reads them; see `Optimizer.upload_hypers`."""
    _fused_of(self).upload_hypers(self)


def _kernel_source(self: torch.optim.Optimizer) -> str:
    return _explain(self).source


def _observed(opt: torch.optim.Optimizer) -> bool:
    """Whether somebody hooks into steps, or profiles them."""
    if "_optimizer_step_pre_hooks" not in vars(opt):  # its class does not call torch's constructor
        return False
    return bool(
        opt._optimizer_step_pre_hooks
        or opt._optimizer_step_post_hooks
        or _torch_optimizer._global_optimizer_pre_hooks
        or _torch_optimizer._global_optimizer_post_hooks
        or torch.autograd.profiler._is_profiler_enabled
    )


@overload
def fuse(
    opt: Opt,
    *,
    backend: str | None = None,
    max_grad_norm: float | None = None,
    write_grads: bool = True,
    check: int = 1,
    rounding: str = "each",
    storage: Any = None,
    state_dtype: torch.dtype | None = None,
    amp_fused: bool = False,
    capturable: bool = False,
) -> Opt: ...
@overload
def fuse(
    opt: type[Opt],
    *,
    backend: str | None = None,
    max_grad_norm: float | None = None,
    write_grads: bool = True,
    check: int = 1,
    rounding: str = "each",
    storage: Any = None,
    state_dtype: torch.dtype | None = None,
    amp_fused: bool = False,
    capturable: bool = False,
) -> type[Opt]: ...
@overload
def fuse(
    opt: Callable[..., Opt],
    *,
    backend: str | None = None,
    max_grad_norm: float | None = None,
    write_grads: bool = True,
    check: int = 1,
    rounding: str = "each",
    storage: Any = None,
    state_dtype: torch.dtype | None = None,
    amp_fused: bool = False,
    capturable: bool = False,
) -> Callable[..., Opt]: ...
def fuse(
    opt: Any,
    *,
    backend: str | None = None,
    max_grad_norm: float | None = None,
    write_grads: bool = True,
    check: int = 1,
    rounding: str = "each",
    storage: Any = None,
    state_dtype: torch.dtype | None = None,
    amp_fused: bool = False,
    capturable: bool = False,
) -> Any:
    """Run an optimizer's own ``step`` as fused kernels. Returns the same object, of the same class.

    Its ``step`` is traced on symbolic tensors; the kernels that follow do what it does, to the tensors and numbers
    where the class keeps them, so ``state_dict``, schedulers, hooks and pickles are as before. A step that has no fused
    form, or that makes or drops state, is the class's own, exactly; if that does not change, a warning says so, with
    the place in the code. ``opt.explain()`` and ``opt.kernel_source()`` show what became of it; `unfuse` undoes it.

    Args:
        opt: a ``torch.optim.Optimizer``; or a class or function that makes one, for which a class or function is
            returned that makes fused ones.
        backend: as of `fusedopt.Optimizer`.
        max_grad_norm: as of `fusedopt.Optimizer`: gradients are scaled inside the step.
        write_grads: whether what the class writes into gradients is written; without, that much traffic is saved.
        check: 1 compares every trace with the class's own step, on copies of a few parameters, before it is used; a
            larger number also every so many steps, on what kernels did; 0 never.
        rounding: of bfloat16 and float16. ``"each"``: after every torch function, as the class itself has it;
            ``"once"``: when a result is stored, which is closer to the exact one, and faster.
        storage: policies for state, as of `fusedopt.Optimizer`, by the names that it has in ``opt.state[p]``:
            ``"int8"``, ``{"exp_avg": "bfloat16_sr"}``. To the class, and in ``state_dict()``, state is what it was.
        state_dtype: short for ``storage={"*": "bfloat16"}``, or ``"float16"``.
        amp_fused: let ``torch.amp.GradScaler`` hand over its scale and what it found: kernels multiply gradients by one
            over the scale, none is rewritten. Whether the step is skipped the host waits to know, as GradScaler does.
        capturable: let a step be captured into a CUDA graph, as of `fusedopt.Optimizer`, with ``opt.upload_hypers()``;
            or say why it cannot be: it has to leave nothing on the host. Without, the class's own step is captured.

    Values are computed in float32, float64 for float64 parameters; reductions are accumulated in float64.

    Raises:
        TypeError: ``opt`` is no optimizer and makes none, is a ``fusedopt.Optimizer``, is fused already, or has a
            ``step`` that needs arguments.
            Policies, and the state is in several optimizers.
        ValueError: an unknown backend, rounding or policy; a negative check; max_grad_norm that is not above zero.
            A policy for the parameter that applies: what a class does to it is rounded to its dtype.
        RuntimeError: later, in ``step()``: under GradScaler with a closure or in a CUDA graph; captured with
            ``capturable``, and no replay of it would be a step. Nothing has changed then.
    """
    if state_dtype is not None and storage is not None:
        raise ValueError('state_dtype is short for storage={"*": dtype}; give one of them')
    storage = state_dtype if storage is None else storage
    text = chosen(storage) if storage else ""
    options = Options(
        backends.check_name(backend),
        max_grad_norm,
        write_grads,
        check,
        rounding,
        text,
        bool(amp_fused),
        bool(capturable),
    )
    if check < 0:
        raise ValueError(f"check is 0 for never, 1 for each trace, or a number of steps; it is {check}")
    if rounding not in ("each", "once"):
        raise ValueError(f"rounding is 'each' or 'once'; it is {rounding!r}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be above 0, or None to clip nothing; it is {max_grad_norm}")
    if not isinstance(opt, torch.optim.Optimizer):
        if not callable(opt) or isinstance(opt, torch.nn.Module):
            raise TypeError(
                "fuse() takes a torch.optim.Optimizer, or a class or function that makes one; this is a "
                f"{type(opt).__name__}"
            )
        return _maker(opt, options)
    if isinstance(opt, Optimizer):
        raise TypeError("a fusedopt.Optimizer steps in fused kernels as it is")
    if "_fusedopt" in vars(opt):
        raise TypeError("this optimizer is fused already; fusedopt.unfuse(opt) undoes it")
    parameters = list(inspect.signature(plain_function(type(opt).step)).parameters.values())[1:]
    for given in parameters:
        if (
            given.default is given.empty
            and given.kind <= given.POSITIONAL_OR_KEYWORD
            and given.name != "closure"
        ):
            raise TypeError(
                f"{type(opt).__name__}.step needs the argument {given.name!r}; fuse() is for steps that are called as "
                "step() or step(closure)"
            )
    had = vars(opt).get("step")
    watched = getattr(had, "_wrapped_by_lr_sched", False)
    if had is not None and not watched:
        raise TypeError(f"the step of this {type(opt).__name__} was replaced by {had!r}; fuse it before that")
    if text:
        _store(opt, text)
    vars(opt)["_fusedopt"] = Fused(opt, options)
    vars(opt)["step"] = types.MethodType(_scheduled if watched else _step, opt)
    vars(opt)["explain"] = types.MethodType(_explain, opt)
    vars(opt)["kernel_source"] = types.MethodType(_kernel_source, opt)
    if options.capturable:
        vars(opt)["upload_hypers"] = types.MethodType(_upload_hypers, opt)
    if options.amp_fused:
        amp.support(opt)
    return opt


def _store(opt: torch.optim.Optimizer, storage: str) -> None:
    """Check that these policies are for this optimizer; have its checkpoints be plain."""
    if len(stores_of(opt)) > 1:
        raise TypeError(
            f"storage is for classes that keep all state in one place, and this {type(opt).__name__} has an optimizer "
            "in it that has some, too. Remedy: fuse that one"
        )
    code = POLICIES[of(storage, PARAM) or "float32"].code
    if any(p.dtype == code != torch.float32 for group in opt.param_groups for p in group["params"]):
        raise ValueError(
            "storage has a policy for parameters, and what a class does to a parameter is rounded to its dtype. "
            "Remedy: policies for state alone, or the rule as callbacks (fusedopt.rules)"
        )
    opt.register_state_dict_post_hook(_plain_checkpoint)


def _plain_checkpoint(opt: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return plain(state_dict)


def _maker(make: Callable[..., Any], options: Options) -> Callable[..., Any]:
    if isinstance(make, type) and issubclass(make, torch.optim.Optimizer):
        with contextlib.suppress(TypeError):  # of a class that wants no subclasses, or other ones
            return _class(make, options)

    @functools.wraps(make)
    def fused(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(
                f"{getattr(make, '__name__', make)!r} made a {type(made).__name__}, which is no optimizer"
            )
        return fuse(made, **dataclasses.asdict(options))

    return fused


class _Maker(type):
    """What ``fuse(cls)`` returns is a class of this kind, for trainers that look whether they got a class.

    Calling it makes a fused ``cls``, not an instance of a class that nobody could name, so that pickles are as before.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        of, options = cls._fuses  # type: ignore[attr-defined]
        made = super().__call__(*args, **kwargs) if "_fuses" not in vars(cls) else of(*args, **kwargs)
        return fuse(made, **dataclasses.asdict(options))

    def __instancecheck__(cls, instance: Any) -> bool:
        if "_fuses" not in vars(cls):  # somebody's subclass of what fuse() returned
            return super().__instancecheck__(instance)
        return isinstance(instance, vars(cls)["_fuses"][0]) and "_fusedopt" in vars(instance)

    @property
    def __signature__(cls) -> inspect.Signature:  # else it would be that of the above
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def _class(of: type, options: Options) -> type:
    kind = _Maker if type(of) is type else type(_Maker.__name__, (_Maker, type(of)), {})
    copyreg.pickle(kind, _remake)
    names = {name: vars(of)[name] for name in ("__module__", "__doc__") if name in vars(of)}
    return kind(of.__name__, (of,), {**names, "__qualname__": of.__qualname__, "_fuses": (of, options)})


def _remake(cls: Any) -> Any:
    """By name, as classes are pickled, or as the class and the options that it was made from."""
    if "_fuses" not in vars(cls):
        return cls.__qualname__
    of, options = cls._fuses
    return functools.partial(fuse, **dataclasses.asdict(options)), (of,)


def unfuse(opt: Opt) -> Opt:
    """Give an optimizer its own ``step`` back; state and groups stay as they are.

    Args: `opt`, as `fuse` returned it.
    Raises: TypeError if it is not fused.
    """
    if "_fusedopt" not in vars(opt):
        raise TypeError(f"this {type(opt).__name__} is not fused")
    vars(opt)["_fusedopt"].of(opt).groups.decode()
    for name in OURS:
        vars(opt).pop(name, None)
    amp.withdraw(opt)
    return opt
