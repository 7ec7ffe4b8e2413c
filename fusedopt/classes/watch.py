"""What a class's step does besides arithmetic, found while its shadow steps.

That is what it reads around it, and what it must not do in a step that is replayed.
"""

from __future__ import annotations

import builtins
import datetime
import dis
import gc
import inspect
import os
import random
import sys
import time
import traceback
import types
from collections.abc import Callable, Container, Iterable
from typing import Any

import numpy as np
import torch

from ..extension import leaf
from ..trace.signals import Untraceable, place_of
from ..trace.snapshot import Snapshot
from ..trace.sources import content_of
from ..trace.standins import StandIns
from .around import UNWATCHED, Around
from .reach import (
    LIBRARIES,
    attributes_of,
    is_iterator,
    is_unwatched,
    is_used_up,
    reached,
)
from .shadow import Path

_CALLS: dict[Any, str] = {
    builtins.print: "prints",
    builtins.id: "asks for id(), which is another number in a trace",
    builtins.open: "opens a file",
    builtins.input: "asks its user",
    builtins.globals: "asks for its globals",
    builtins.locals: "asks for its locals",
}
_CALLS |= dict.fromkeys([sys._getframe, inspect.currentframe, inspect.stack], "asks who calls it")
_CLOCKS = "time perf monotonic process thread localtime gmtime strftime ctime asctime".split()  # noqa: SIM905
_CALLS |= {
    getattr(time, name): "reads the clock"
    for name in dir(time)
    if name.split("_")[0] in _CLOCKS and callable(getattr(time, name))
}
_CALLS |= dict.fromkeys(
    [datetime.datetime.now, datetime.datetime.utcnow, datetime.datetime.today, datetime.date.today],
    "reads the clock",
)
_CALLS |= dict.fromkeys([torch.initial_seed, torch.seed], "asks for the seed of random numbers")
_CALLS |= {
    getattr(torch, name): "asks for a setting of torch's"
    for name in """
    get_default_dtype is_grad_enabled is_inference_mode_enabled is_autocast_enabled is_autocast_cpu_enabled
    get_autocast_dtype get_num_threads is_anomaly_enabled are_deterministic_algorithms_enabled
    get_float32_matmul_precision
    """.split()  # noqa: SIM905
}
_MODULES = {"logging": "logs", "os": "asks the operating system", "random": "draws random numbers"}
_HARMLESS = frozenset(
    """
    abc bisect builtins collections contextlib copy dataclasses decimal enum fractions functools heapq importlib inspect
    itertools keyword linecache math numbers operator re reprlib statistics string types typing warnings weakref
    """.split()  # noqa: SIM905
)
"""Modules of the standard library whose functions do no more than compute."""
_ACTING = (
    "torch.distributed",
    "torch.serialization",
    "torch.utils.tensorboard",
    "torch.utils.data",
    "torch.cuda",
)
_ASKING = frozenset(
    ["is_available", "is_initialized", "get_rank", "get_world_size", "is_torchelastic_launched"]
)
_PARAMETERS = frozenset(["parameters", "named_parameters", "_named_members"])
_CODES = {f.__code__: what for f, what in _CALLS.items() if isinstance(f, types.FunctionType)}
_ABSENT = object()
RAISES = "look at the loss or at gradients before the step, and take this out of it; or leave it: it is right as it is"


def _beyond(module: str, frame: types.FrameType) -> str | None:
    """What a library's function does that a replay would not do again, as far as that is known of its module."""
    top = module.split(".")[0]
    if (what := _CODES.get(frame.f_code)) is not None:
        return what
    if module == "torch.nn.modules.module" and frame.f_code.co_name in _PARAMETERS:
        return "goes over a module's parameters, and not those it is given"
    if top in _MODULES or (top == "collections" and frame.f_locals.get("self") is os.environ):
        return _MODULES.get(top, _MODULES["os"])
    if module.startswith(_ACTING) and frame.f_code.co_name not in _ASKING:
        return f"calls {module}.{frame.f_code.co_name}"
    if top.strip("_") in sys.stdlib_module_names | {""} and top not in _HARMLESS and not top.startswith("_"):
        return f"calls {module}.{frame.f_code.co_name}, which may do more than arithmetic"
    return None


def _is_library(frame: types.FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).split(".")[0] in LIBRARIES


class Generators:
    """The states of what draws random numbers: the libraries' own, and these objects."""

    def __init__(self, objects: Iterable[Any]) -> None:
        self._objects = [random, np.random.mtrand._rand, torch.default_generator, *objects]
        self._states = list(map(_state_of, self._objects))

    def restored(self) -> bool:
        """Whether one was drawn from; it is as it was now."""
        drawn = [
            (each, was)
            for each, was in zip(self._objects, self._states, strict=True)
            if repr(_state_of(each)) != repr(was)
        ]
        for each, was in drawn:
            if isinstance(each, torch.Generator):
                each.set_state(torch.tensor(was, dtype=torch.uint8))
            elif isinstance(each, np.random.Generator):
                each.bit_generator.state = was
            elif isinstance(each, np.random.RandomState):
                each.set_state(was)
            else:
                each.setstate(was)
        return bool(drawn)


DRAWING = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


def _state_of(each: Any) -> Any:
    if isinstance(each, torch.Generator):
        return each.get_state().tolist()
    if isinstance(each, np.random.Generator):
        return each.bit_generator.state
    if isinstance(each, np.random.RandomState):
        name, key, *rest = each.get_state(legacy=True)
        return (name, np.asarray(key).tolist(), *rest)
    return each.getstate()


class Watch:
    """A context in which the code that is run is noted.

    ``owners``: the classes that it is of; ``referred``: objects that the optimizer has, and its shadow too, with their
    paths; ``params``: the ids of its parameters; ``codes``: where the code is noted.
    """

    def __init__(
        self,
        stand_ins: StandIns,
        owners: Iterable[type],
        referred: Iterable[tuple[Path, Any]],
        params: Container[int],
        codes: set[types.CodeType] | None = None,
    ) -> None:
        self._stand_ins, self._owners = stand_ins, list(owners)
        self._places, self._params = list(referred), params
        self._referred = [x for _, x in self._places]
        self._codes: set[types.CodeType] = set() if codes is None else codes
        self._globals: dict[types.CodeType, dict[str, Any]] = {}
        """Those of the code that was run, also where it was reached through an object or a module."""
        self._refused: tuple[str, types.CodeType, int] | None = None

    def before(self) -> None:
        """Raise Untraceable for what a step may use up or change, which nobody notes and nothing puts back."""
        for function, made in self._stand_ins.made.items():
            for name, value in _around(function, made).items():
                for x in reached([value]):
                    if is_iterator(x) or is_unwatched(x):
                        place = place_of(function.__code__, function.__code__.co_firstlineno)
                        what = f"{name or 'what it closes over'} is, or has, a {type(x).__name__}"
                        why = "which a step may change" if is_iterator(x) else UNWATCHED
                        raise _untraceable(f"{what}, {why}", place)

    def __enter__(self) -> Watch:
        functions = self._stand_ins.made
        self._put = {
            f: (dict(made.__globals__), dict(vars(made)), _contents(made)) for f, made in functions.items()
        }
        values = [v for f, made in functions.items() for v in _around(f, made).values()]
        found = list(reached([*self._owners, *self._referred, *values]))
        self._objects, self._snapshot = Objects(found), Snapshot(found)
        cells = (cell for x in found if isinstance(x, types.FunctionType) for cell in x.__closure__ or ())
        self._cells = [(cell, content_of(cell, "")) for cell in cells]
        self._generators = Generators(v for v in (*self._referred, *values) if isinstance(v, DRAWING))
        self._collects, self._before = gc.isenabled(), sys.getprofile()
        gc.disable()  # what others have called with each collection is none of the step's
        if leaf.native is None:
            sys.setprofile(self._note)
        else:
            leaf.native.Profile(self._note, _is_library).start()
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(self._before)
        if self._collects:
            gc.enable()

    def _note(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "c_call":
            what = _CALLS.get(arg) if arg.__hash__ is not None else None
            if what is None and isinstance(getattr(arg, "__self__", None), random.Random):
                what = "draws random numbers"
            if what is None and getattr(arg, "__module__", None) in ("posix", "nt"):
                what = _MODULES["os"]
            if what is None and is_used_up(owner := getattr(arg, "__self__", None)):
                what = f"uses a {type(owner).__name__}, which becomes another by it"
            if what is not None and not _is_library(frame):
                self._refuse(what, frame)
        elif event == "call":
            if not _is_library(frame):
                self._codes.add(frame.f_code)
                self._globals[frame.f_code] = frame.f_globals
                return
            name = str(frame.f_globals.get("__name__", ""))
            if name.startswith("torch.optim"):
                self._codes.add(frame.f_code)
            if frame.f_back is not None and not _is_library(frame.f_back) and (what := _beyond(name, frame)):
                self._refuse(what, frame.f_back)

    def _refuse(self, what: str, frame: types.FrameType) -> None:
        """Raise Untraceable, before it is done; `check` does it again, should the class catch everything."""
        if self._refused is None:
            self._refused = what, frame.f_code, frame.f_lineno
        raise _untraceable(f"the step {what}", place_of(frame.f_code, frame.f_lineno))

    def check(self) -> None:
        """Raise Untraceable if the step did what a replay would not do again; what it changed is put back."""
        changed = self._snapshot.restored()
        drawn, set_ = self._generators.restored(), self._objects.restored()
        rebound = [(cell, was) for cell, was in self._cells if content_of(cell, "") is not was]
        for cell, was in rebound:
            cell.cell_contents = was
        if self._refused is not None:
            what, code, line = self._refused
            raise _untraceable(f"the step {what}", place_of(code, line))
        if drawn:
            raise Untraceable("the step draws random numbers")
        if changed:
            raise Untraceable("the step changes a list, dict, set or tensor around it")
        if rebound:
            raise Untraceable("the step changes what a function closes over")
        if set_:
            raise Untraceable(f"the step sets {set_}, which is none of the optimizer's own attributes")
        for function, made in self._stand_ins.made.items():
            names, own, contents = self._put[function]
            now = {k: v for k, v in made.__globals__.items() if k != "__warningregistry__"}
            same = _same(now, names) and _same(vars(made), own) and _same_items(_contents(made), contents)
            if not same:
                place = place_of(function.__code__, function.__code__.co_firstlineno)
                raise _untraceable("the step changes a global, or what a function closes over", place)

    def around(self, kind: type, leaves: frozenset[str]) -> Callable[[], str | None]:
        """What tells whether all that the step has read around it is still there: why not, or None. ``leaves``: what
        the optimizer has and the step did not ask for."""
        found = Around(self._codes, self._params)
        for function in self._stand_ins.made:
            if function.__code__ in self._codes:
                found.ran(function, near=True)
        ours = {f.__code__ for f in self._stand_ins.made}
        for code, around in self._globals.items():
            if code not in ours:
                found.loaded(code, around)
        for owner in (*kind.__mro__, *(x for path, x in self._places if path[0][1] not in leaves)):
            found.explore(owner)
        return found.guards.made()


class Objects:
    """What objects have set on them: classes, modules and instances that are not a library's."""

    def __init__(self, objects: Iterable[Any]) -> None:
        found = {id(x): (x, inside) for x in objects if (inside := attributes_of(x)) is not None}
        self._saved = list(found.values())

    def restored(self) -> str:
        """The name of something that was set; all is as it was again."""
        name = ""
        for owner, was in self._saved:
            inside = attributes_of(owner) or {}
            for key in [k for k in {**inside, **was} if inside.get(k, _ABSENT) is not was.get(k, _ABSENT)]:
                name = name or key
                if key in was:
                    setattr(owner, key, was[key])
                else:
                    delattr(owner, key)
        return name


def _around(function: types.FunctionType, made: types.FunctionType) -> dict[str, Any]:
    """What a function can get at by itself, by name: globals that it loads, what it closes over, defaults."""
    found = {k: v for k, v in made.__globals__.items() if k[:2] != "__"}
    found |= {f"default {k}": v for k, v in enumerate(function.__defaults__ or ())}
    found |= function.__kwdefaults__ or {}
    return found | dict(zip(function.__code__.co_freevars, _contents(function), strict=True))


def _contents(function: types.FunctionType) -> list[Any]:
    return [content_of(cell, "") for cell in function.__closure__ or ()]


def _same(now: dict[str, Any], was: dict[str, Any]) -> bool:
    return all(now.get(k, _ABSENT) is v for k, v in was.items() if k != "__warningregistry__") and len(
        now
    ) <= len(was)


def _same_items(now: list[Any], was: list[Any]) -> bool:
    return all(a is b for a, b in zip(now, was, strict=True))


def _untraceable(message: str, where: str, remedy: str = "") -> Untraceable:
    error = Untraceable(message, remedy)
    error.where = where
    error.inside = True  # type: ignore[attr-defined]
    return error


def where_raised(error: BaseException) -> str:
    """The innermost place in code that is no library's, but for torch's own classes."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if _is_somebodys(frame, "torch.optim."):
            found = place_of(frame.f_code, line)
    return found


def _is_somebodys(frame: types.FrameType, *but: str) -> bool:
    """Whether it is no library's, but for these modules."""
    return str(frame.f_globals.get("__name__", "")).startswith(but) or not _is_library(frame)


def after_branch(error: BaseException) -> Untraceable | None:
    """What to say of an error from a step that took branches on tensors, both ways of which are tried; None if no
    statement of the step raised it: that a call fails is no matter of branches."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not isinstance(error, Exception):
        return None
    operation = dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]]
    if operation != "RAISE_VARARGS" or not _is_somebodys(trace.tb_frame, "torch.optim.", "torch.nn.utils."):
        return None
    what = f"a branch on the values of tensors leads to `raise {error!r}`, which kernels cannot do"
    return _untraceable(what, where_raised(error), RAISES)
