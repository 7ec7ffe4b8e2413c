"""A shadow of an optimizer: a copy with a few of its parameters, whose numbers and tensors may be other than the real.

All that a class keeps is found by its path from the optimizer's own ``__dict__``: numbers are read there on every step,
flags have to stay what they were, and what ``step`` leaves in the copy's containers is written to the real ones.
"""

from __future__ import annotations

import array
import collections
import enum
import functools
import numbers
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..trace.number import Number
from ..trace.signals import Untraceable
from ..trace.signature import PLAIN
from .amp import SUPPORTS
from .places import Several
from .reach import OPAQUE, is_iterator

OURS = "step", "explain", "kernel_source", "upload_hypers", "_fusedopt"
"""What `fuse` puts into an optimizer's ``__dict__``."""
OWN = frozenset({*OURS, "_opt_called", "_zero_grad_profile_name", SUPPORTS})
"""Names in an optimizer's ``__dict__`` that say nothing of what its class does: ours and torch's."""
MOST = 4096
"""Elements of a container that are looked at."""
_KNOWN_TYPES = (
    types.BuiltinFunctionType,
    types.ModuleType,
    type,
    torch.Generator,
    torch.nn.Module,
)
_LIBRARIES = frozenset(
    ["torch", "numpy", "builtins", "logging", "threading", "weakref", "functools", "_thread"]
)

Path = tuple[tuple[str, Any], ...]
"""Steps from the optimizer's ``__dict__``: ("item", key) or ("attr", name)."""


class NewState(Exception):
    """This step makes or drops state, which the class does itself: the next one may be another.

    ``traced``: a trace found it out.
    """

    def __init__(self, message: str, traced: bool = True) -> None:
        super().__init__(message)
        self.traced = traced


class Meeting(Untraceable):
    """What is done to a parameter depends on others, or a number picks from a list. It may be that their numbers meet
    there: where all parameters have the same one, it can be taken for one that they have in common."""


class Refused:
    """In place of what tells parameters apart, which a step must not look at: a few of them stand for the others.
    ``why``: what is said of a step that does."""

    __slots__ = ("why",)

    def __init__(self, why: str) -> None:
        self.why = why

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        raise Untraceable(self.why)

    def __getattr__(self, name: str) -> Any:
        raise Untraceable(self.why)

    __iter__ = __getitem__ = __len__ = __contains__ = __bool__ = lambda self, *_: self.__getattr__("")
    __eq__ = __ne__ = __hash__ = __iter__


WHOLE = frozenset(["__dict__", "__reduce_ex__", "__reduce__", "__getstate__"])
"""Asked for by who goes over all attributes."""
_ACCESS = ("__getattribute__", "__setattr__", "__delattr__")
_PAST = frozenset(["__getattribute__", "getattr_static"])
"""By these attributes are asked for where nobody notes it."""


class Reads:
    """Which attributes of an optimizer (``of``) are asked for, or set."""

    def __init__(self) -> None:
        self.of: Any = None
        self.names: set[str] = set()

    def noted(self, kind: type) -> type:
        """The class, whose instance notes what it is asked for."""

        def noting(plain: Any) -> Callable[..., Any]:
            def method(obj: Any, name: str, *value: Any) -> Any:
                if obj is self.of:
                    self.names.add(name)
                return plain(obj, name, *value)

            return method

        # What is set, too: a step that leaves there what was there is the same step while that is there.
        methods = {name: noting(getattr(kind, name)) for name in _ACCESS}
        own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        return type(kind.__name__, (kind,), own | methods)

    def leaves(self, shadow: Shadow, codes: Iterable[types.CodeType]) -> frozenset[str]:
        """The attributes that were not asked for: what a step does cannot depend on them."""
        if self.names & WHOLE or any(not _PAST.isdisjoint(code.co_names) for code in codes):
            return frozenset()
        read = self.names | {"param_groups", "state"}
        found = [*((path, first) for path, first, _ in shadow.aliases if first), *shadow.bound]
        while more := {str(first[0][1]) for path, first in found if path[0][1] in read} - read:
            read |= more  # what is found there is guarded where it was found first
        return frozenset(vars(shadow.opt).keys() - read)


SOME = "{} has some of the parameters in it, and not others like them"


class Some(list[Any]):
    """A group's list of parameters, without those that others stand for."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice) and key != slice(None):
            raise Untraceable("the step picks parameters by their places in a list")
        return super().__getitem__(key)

    def length_in_trace(self) -> int:
        return Several(len(self))


ROW = ("row", None)
"""In a path: the row of a table that is looked up."""


class Table:
    """A list of rows of numbers, one of which a step may look up by a number that is another one in each step.

    ``index`` is that number then, ``put`` what its row had, ``row`` what it has now. Else it is a list like others.
    """

    def __init__(
        self,
        real: list[list[Any]],
        path: Path,
        number: Callable[[Path, Any], Any],
        plain: Callable[[], list[Any]],
    ) -> None:
        self.real, self.path = real, path
        self.index: Number | None = None
        self.put: list[Any] = []
        self.row: list[Any] = []
        self._number, self._make = number, plain
        self._plain: list[Any] | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return list

    @staticmethod
    def can_be(value: Any) -> bool:
        """Whether it is a list of lists of as many numbers, or None in their places."""
        return (
            type(value) is list
            and 1 < len(value) <= MOST
            and all(type(row) is list and len(row) == len(value[0]) > 0 for row in value)
            and all(v is None or type(v) in (int, float) for row in value for v in row)
        )

    def __len__(self) -> int:
        return len(self.real)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._as_list())

    def __getitem__(self, key: Any) -> Any:
        if type(key) is not Number or type(key.value) is not int or self._plain is not None:
            return self._as_list()[key]
        if self.index is None:
            self.index = key
            places = ((*self.path, ROW, ("item", j)) for j in range(len(self.real[0])))
            row = zip(places, self.real[key.value], strict=True)
            self.put = [v if v is None else self._number(place, v) for place, v in row]
            self.row = [*self.put]
        if key.index != self.index.index:
            raise Meeting(f"{shown(self.path)} is looked up at several places")
        return self.row

    def __setitem__(self, key: Any, value: Any) -> None:
        self._as_list()[key] = value

    def _as_list(self) -> list[Any]:
        if self.index is not None:
            raise Untraceable(f"{shown(self.path)} is looked up by numbers that change, and otherwise too")
        if self._plain is None:
            self._plain = self._make()
        return self._plain

    def changes(self) -> Iterator[tuple[Path, Any, Any]]:
        """What was left in its row, as of containers."""
        if len(self.row) != len(self.put):
            raise NewState(f"a row of {shown(self.path)} gets or loses elements")
        for j, (now, was) in enumerate(zip(self.row, self.put, strict=True)):
            if now is not was:
                yield (*self.path, ROW), j, now


@dataclass
class Container:
    """A container of the copy: ``put`` is what was put into it, by key. ``partial``: it has some of the parameters."""

    path: Path
    real: Any
    copy: Any
    put: dict[Any, Any]
    partial: bool = False
    store: bool = False
    """Whether it has state by parameter."""


def is_own(name: str) -> bool:
    return name in OWN or (name.startswith("_optimizer_") and name.endswith("hooks"))


class Shadow:
    """A copy of an optimizer. ``tensors`` are what stands for its tensors, by id; ``number(path, value)`` makes what
    stands for a number, ``function(f)`` for a function, ``kinds(c)`` for a class; ``state`` has what stands for the
    entries of each store of state, by the ids of store and parameter. ``numbers`` and ``flags`` are the optimizer's, by
    path. ``tables``: whether rows may be looked up by numbers that change. ``alike``: a key for each parameter that is
    stepped, the same for those of which a few stand for the others: what tells these apart is refused.
    """

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        kind: type,
        tensors: dict[int, Any],
        number: Callable[[Path, Any], Any],
        state: dict[int, dict[int, Any]],
        function: Callable[[Any], Any] = lambda f: f,
        kinds: Callable[[type], type] = lambda kind: kind,
        tables: bool = False,
        alike: Mapping[int, Any] | None = None,
    ) -> None:
        self._kinds, self._alike = kinds, alike or {}
        self._with_tables, self.tables = tables, list[Table]()
        self._number, self._tensors, self._function = number, tensors, function
        self.params = {id(p) for group in opt.param_groups for p in group["params"]}
        self._memo: dict[int, Any] = {}
        self._first: dict[int, Path] = {id(opt): ()}
        self._alive: list[Any] = []
        self.containers: list[Container] = []
        self.numbers: dict[Path, Any] = {}
        self.flags: list[tuple[Path, Any]] = []
        self.referred: list[tuple[Path, Any]] = []
        """Objects that it has in common with the optimizer."""
        self._sets: list[tuple[Path, Any, Any]] = []
        self.aliases: list[tuple[Path, Path, Any]] = []
        """Objects that are found by another path too, the second, which was taken first."""
        self.bound: list[tuple[Path, Path]] = []
        """Where a method of an object is found, and where that object is."""
        self.things: list[tuple[Path, Any]] = []
        """Objects that have to stay who they are: functions, classes, and what has no attributes to go by."""
        self.objects: list[tuple[Path, type]] = []
        """Those of which attributes are known, with their classes."""
        self.tuples: list[tuple[Path, type, int]] = []
        self.opt: Any = object.__new__(kind)
        self._memo[id(opt)] = self.opt
        self._stores = state
        own = {}
        # Groups first: their numbers have the shortest names.
        for name, value in sorted(vars(opt).items(), key=lambda entry: entry[0] != "param_groups"):
            if name not in OURS:
                own[name] = value if is_own(name) else self._copied(value, (("item", name),))
        self.opt.__dict__.update(own)
        kept = {k: v for k, v in vars(self.opt).items() if not is_own(k)}
        self.containers.append(Container((), vars(opt), vars(self.opt), kept))

    def _states(self, real: Any, path: Path) -> Iterator[tuple[Any, Any]]:
        state = self._stores[id(real)]
        for key, value in real.items():
            if not isinstance(key, torch.Tensor):
                yield key, self._copied(value, (*path, ("item", key)))
            elif id(key) in state:
                yield self._tensors[id(key)], state[id(key)]

    def _container(self, path: Path, real: Any, copy: Any, items: Any, partial: bool) -> Any:
        put = dict(items)
        if isinstance(copy, (list, collections.deque)):
            copy.extend(put.values())
        else:
            copy.update(put)
        self.containers.append(Container(path, real, copy, put, partial))
        return copy

    def _copied(self, value: Any, path: Path) -> Any:
        kind = type(value)
        if kind in (int, float) or isinstance(value, np.floating):
            self.numbers[path] = value
            return self._number(path, value)
        if isinstance(value, (*PLAIN, enum.Enum, numbers.Number, np.generic)) or kind in (
            torch.device,
            torch.Size,
        ):
            self.flags.append((path, value))
            return value
        # Another tuple may take its place here, and not where it is known from.
        known_by_itself = not isinstance(value, (tuple, frozenset))
        if known_by_itself and id(value) in self._memo:
            if not isinstance(value, torch.Tensor):
                self.aliases.append((path, self._first[id(value)], value))
            return self._memo[id(value)]
        if known_by_itself:
            self._alive.append(value)
            self._first[id(value)] = path
        made = self._of_kind(kind, value, path)
        if known_by_itself:
            self._memo[id(value)] = made
        if type(made) is Refused:
            self.things.append((path, value))
        return made

    def _of_kind(self, kind: type, value: Any, path: Path) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, (list, tuple, collections.deque, dict)) and len(value) > MOST:
            return Refused(f"{shown(path)} has {len(value)} elements")
        if isinstance(value, (list, dict, collections.deque)) and (name := _of_its_own(kind)):
            return Refused(f"{shown(path)} is a {kind.__name__}, which has a {name} of its own")
        if self._with_tables and Table.can_be(value):
            self.tables.append(Table(value, path, self._number, lambda: self._sequence(kind, value, path)))
            return self.tables[-1]
        if isinstance(value, (list, tuple, collections.deque)):
            return self._sequence(kind, value, path)
        if isinstance(value, dict):
            made_by = [value.default_factory] if isinstance(value, collections.defaultdict) else []
            copy = kind(*made_by)
            self._memo[id(value)] = copy
            if id(value) in self._stores:
                made = self._container(path, value, copy, self._states(value, path), False)
                self.containers[-1].store = True
                return made
            if self._tells_apart(value):
                return Refused(SOME.format(shown(path)))
            return self._container(path, value, copy, self._entries(value, path), any(map(_is_tensor, value)))
        if kind in (set, frozenset):
            if any(isinstance(v, torch.Tensor) for v in value):
                return Refused(f"{shown(path)} is a set of tensors")
            self.flags.append((path, kind(value)))
            self._sets.append((path, copied := kind(value), kind(value)))
            return copied
        if isinstance(value, torch.optim.Optimizer):
            self.things.append((path, value))
            return self._inner(kind, value, path)
        if isinstance(value, (np.ndarray, array.array, bytearray, *OPAQUE)) or is_iterator(value):
            return Refused(f"{shown(path)} is a {kind.__name__}, which a step may change")
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            self.things.append((path, value))
        if isinstance(value, types.MethodType) and id(value.__self__) in self._memo:
            self._binds(path, value)
            return types.MethodType(self._function(value.__func__), self._memo[id(value.__self__)])
        bound = value.func if isinstance(value, functools.partial) else None
        if isinstance(bound, types.MethodType) and id(bound.__self__) in self._memo:
            self.referred += [(path, value.args), (path, value.keywords)]
            self._binds(path, bound)
            method = types.MethodType(self._function(bound.__func__), self._memo[id(bound.__self__)])
            return functools.partial(method, *value.args, **value.keywords)
        if isinstance(value, (types.FunctionType, functools.partial)):
            self.referred.append((path, value))
            return self._function(value)
        if (
            isinstance(value, _KNOWN_TYPES)
            or kind.__module__.split(".")[0] in _LIBRARIES
            or not hasattr(value, "__dict__")
            or not _is_plain(kind)
        ):
            self.things.append((path, value))
            self.referred.append((path, value))
            return value
        self.objects.append((path, kind))
        return self._object(kind, value, path)

    def _binds(self, path: Path, method: types.MethodType) -> None:
        """What is found at this path has an object of ours, whose own place is asked for with it."""
        if first := self._first.get(id(method.__self__)):
            self.bound.append((path, first))
            self.things.append((first, method.__self__))

    def _sequence(self, kind: type, value: Any, path: Path) -> Any:
        if path[-1:] != (("item", "params"),) and self._tells_apart(value):
            return Refused(SOME.format(shown(path)))
        ours = [not isinstance(v, torch.Tensor) or id(v) not in self.params for v in value]
        partial = not all(ours) and path[-1:] != (("item", "params"),)
        chosen = [(i, v) for i, v in enumerate(value) if ours[i] or id(v) in self._tensors]
        parts = [(i, self._copied(v, (*path, ("item", i)))) for i, v in chosen]
        if isinstance(value, tuple):
            made = [v for _, v in parts]
            self.tuples.append((path, kind, len(value)))
            return kind(*made) if hasattr(kind, "_fields") else tuple(made)
        copy: Any = collections.deque(maxlen=value.maxlen) if isinstance(value, collections.deque) else kind()
        if path[-1:] == (("item", "params"),) and len(parts) < len(value):
            copy = Some()
        self._memo[id(value)] = copy
        return self._container(path, value, copy, parts, partial or path[-1:] == (("item", "params"),))

    def _tells_apart(self, value: Iterable[Any]) -> bool:
        """Whether a container has some parameters, and not others like them."""
        found = Counter(self._alike[id(v)] for v in value if _is_tensor(v) and id(v) in self._alike)
        every = Counter(self._alike.values()) if found else {}
        return any(every[key] != count for key, count in found.items())

    def _entries(self, value: dict[Any, Any], path: Path) -> Iterator[tuple[Any, Any]]:
        for key, inner in value.items():
            if key == "param_names" and "params" in value and len(inner) == len(value["params"]):
                named = zip(inner, value["params"], strict=True)
                names = [name for name, p in named if id(p) in self._tensors]
                yield key, Refused("the step looks at the names of parameters") if self._alike else names
            elif isinstance(key, torch.Tensor):
                if id(key) in self._tensors:
                    yield self._tensors[id(key)], self._copied(inner, (*path, ("item", key)))
            else:
                yield key, self._copied(inner, (*path, ("item", key)))

    def _inner(self, kind: type, value: torch.optim.Optimizer, path: Path) -> Any:
        """An optimizer within the optimizer."""
        if any(vars(value).get(f"_optimizer_step_{when}_hooks") for when in ("pre", "post")):
            raise Untraceable(f"{shown(path)} is another optimizer, whose steps have hooks")
        return self._object(kind, value, path, OURS)  # it may be fused, too

    def _object(self, kind: type, value: Any, path: Path, without: Iterable[str] = ()) -> Any:
        copy: Any = object.__new__(self._kinds(kind))
        self._memo[id(value)] = copy
        self.referred.append((path, kind))
        entries = {
            k: v if is_own(k) else self._copied(v, (*path, ("attr", k)))
            for k, v in vars(value).items()
            if k not in without
        }
        vars(copy).update(entries)
        self.containers.append(Container((*path, ("dict", None)), vars(value), vars(copy), entries))
        return copy

    def _tensor(self, value: torch.Tensor, path: Path) -> Any:
        found = self._tensors.get(id(value))
        if found is not None:
            return found
        return self._number(path, value)

    def changes(self) -> list[tuple[Path, Any, Any]]:
        """What was left in containers: (path of the container, key, value). Raises NewState, Untraceable."""
        out: list[tuple[Path, Any, Any]] = []
        for path, now, was in self._sets:
            if now != was:
                raise Untraceable(f"{shown(path)}, a set, is changed")
        for c in self.containers:
            now = dict(enumerate(c.copy)) if isinstance(c.copy, (list, collections.deque)) else dict(c.copy)
            put = dict(enumerate(c.put.values())) if isinstance(c.copy, (list, collections.deque)) else c.put
            if not c.path:
                now = {k: v for k, v in now.items() if not is_own(str(k))}
            if now.keys() != put.keys():
                more = [str(k) for k in now.keys() ^ put.keys() if not isinstance(k, torch.Tensor)]
                raise NewState(
                    f"{shown(c.path) or 'the optimizer'} gets or loses {', '.join(more) or 'elements'}"
                )
            for key, value in now.items():
                if value is put[key] or (isinstance(value, PLAIN) and same_plain(value, put[key])):
                    continue
                if c.partial:
                    raise Untraceable(f"{shown(c.path)} is changed, which has parameters in it")
                out.append((c.path, key, value))
        for table in self.looked_up():
            if any(id(row) in self._memo for row in table.real):
                raise Untraceable(f"rows of {shown(table.path)} are found elsewhere too")
            out += table.changes()
        return out

    def looked_up(self) -> list[Table]:
        """Those of which a row was looked up by a number that changes."""
        return [table for table in self.tables if table.index is not None]


def _of_its_own(kind: type) -> str:
    """A method by which a container finds its elements otherwise than the built-in one that it is made from."""
    ours = (base for base in kind.__mro__ if base.__module__ not in ("builtins", "collections", "typing"))
    return next((name for base in ours for name in vars(base) if name in _METHODS), "")


_METHODS = ({*vars(dict), *vars(list), "__missing__"} - {*vars(object)}) - {"__class_getitem__"}


def _is_plain(kind: type) -> bool:
    """Whether all that objects of a class are is in their attributes: files, say, are more."""
    try:
        object.__new__(kind)
    except TypeError:
        return False
    return True


def same_plain(a: Any, b: Any) -> bool:
    return type(a) is type(b) and type(a) not in (Number,) and repr(a) == repr(b)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def shown(path: Path) -> str:
    """A path as code has it: ``self.param_groups[0]['lr']``."""
    text = ""
    for i, (kind, key) in enumerate(path):
        if kind == "dict":
            continue
        what = "…" if kind == "row" else "parameter" if isinstance(key, torch.Tensor) else repr(key)
        text += f"self.{key}" if not i else f".{key}" if kind == "attr" else f"[{what}]"
    return text
