"""What can be told of a callback without calling it: its name, its arguments, its hyperparameter defaults."""

from __future__ import annotations

import collections
import dis
import functools
import inspect
import operator
import re
import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

Callback = Callable[..., Any]
GROUPS_OWN = "cbs"
"""The key of a param group for callbacks of its own, in place of the optimizer's."""


def is_temporary(key: Any) -> bool:
    """Whether what callbacks return under this key is handed to later callbacks of the same step and to no other."""
    return isinstance(key, str) and key.startswith("_")


def function_of(callback: Callback) -> Callback:
    """The callback itself, or what a partial wraps."""
    return function_of(callback.func) if isinstance(callback, functools.partial) else callback


def name_of(callback: Callback) -> str:
    """Its name for messages; a partial has its function's."""
    function = function_of(callback)
    return getattr(function, "__name__", type(function).__name__)


def is_ours(callback: Callback) -> bool:
    """Whether it is one of ``fusedopt.callbacks`` or ``fusedopt.rules``."""
    module = getattr(function_of(callback), "__module__", None) or ""
    return module == f"{__package__}.callbacks" or module.startswith(f"{__package__}.rules.")


def arguments_of(callback: Callback) -> Mapping[str, Any]:
    """Its named arguments with their defaults (``inspect.Parameter.empty`` without one)."""
    if isinstance(callback, functools.partial):
        own = arguments_of(callback.func)
        return dict(own) | {k: v for k, v in callback.keywords.items() if k in own}
    if not isinstance(callback, types.FunctionType):
        return _arguments(callback)
    made_of = callback.__code__, callback.__defaults__, *(callback.__kwdefaults__ or {}).values()
    known = _known.get(callback)
    if known is None or len(known[0]) != len(made_of) or any(map(operator.is_not, known[0], made_of)):
        known = _known[callback] = made_of, _arguments(callback)
    return known[1]


_known: weakref.WeakKeyDictionary[Callback, tuple[tuple[Any, ...], Mapping[str, Any]]] = (
    weakref.WeakKeyDictionary()
)


def _arguments(callback: Callback) -> Mapping[str, Any]:
    try:
        return {p.name: p.default for p in inspect.signature(callback).parameters.values()}
    except (TypeError, ValueError):  # no signature to be had
        return {}


def call(callback: Callback, p: Any, given: Mapping[str, Any]) -> Any:
    """``callback(p, **given)``. A TypeError because it takes too little, or needs more, says which and what to do; so
    does one because names of returned state are no texts."""
    try:
        returned = callback(p, **given)
    except TypeError as error:
        if message := _misfit(callback, given):
            raise TypeError(message) from error
        raise
    if isinstance(returned, dict):
        for key in returned:
            if not isinstance(key, str):
                raise TypeError(
                    f"the callback {name_of(callback)} ({place_of(callback)}) returned state under {key!r}; the names "
                    "of state are those of arguments, and so texts"
                )
    return returned


def _misfit(callback: Callback, given: Mapping[str, Any]) -> str:
    """Why it cannot be called with these arguments; empty if it can."""
    try:
        parameters = list(inspect.signature(callback).parameters.values())
    except (TypeError, ValueError):
        return ""
    who = f"the callback {name_of(callback)} ({place_of(callback)})"
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)][1:]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not takes_any and (extra := [name for name in given if name not in names]):
        return (
            f"{who} does not take {', '.join(extra)}. Every callback is called with all state and all hyperparameters: "
            "add **kwargs to its arguments"
        )
    required = [p.name for p in parameters if p.default is p.empty and p.name in names]
    if missing := [name for name in required if name not in given]:
        return (
            f"{who} needs {', '.join(missing)}, which is no hyperparameter of this optimizer and not in the state: put "
            "the callback that returns it before this one, or give the argument a default"
        )
    return ""


def place_of(callback: Callback) -> str:
    """``file.py:12``, where it is defined, or its type."""
    function = function_of(callback)
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None:
        return type(function).__name__
    return f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}"


def forgets(callback: Callback) -> frozenset[str]:
    """Arguments that look like state which it makes, changes and never names to return; none if it may return any.

    They have the default None, are assigned, and are changed: by a method in place, or, where its code makes tensors,
    by an assignment that reads them.
    """
    function = function_of(callback)
    function = getattr(function, "__func__", function)
    named = looked_up(function)
    if not isinstance(function, types.FunctionType) or named is None:
        return frozenset()
    optional = {name for name, default in arguments_of(callback).items() if default is None}
    return (_changed(function.__code__) & optional) - named - keys_made(function)


_MAKES = frozenset(("zeros_like", "ones_like", "full_like", "empty_like", "clone", "zeros", "new_zeros"))


@functools.lru_cache(maxsize=256)
def _changed(code: types.CodeType) -> frozenset[str]:
    """Local names that the code assigns, and changes in place or assigns from themselves."""
    if "locals" in code.co_names:
        return frozenset()
    read, written, changed = set[str](), set[str](), set[str]()
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG")]
    makes = not _MAKES.isdisjoint(code.co_names)
    for i, step in enumerate(steps):
        if step.starts_line:
            read = set()
        after = steps[i + 1] if i + 1 < len(steps) else step
        for verb, name in _locals(step):
            if verb == "STORE":
                written.add(name)
                changed |= {name} & read if makes else set()
            elif after.opname in ("LOAD_ATTR", "LOAD_METHOD") and re.fullmatch(r"\w*[a-z0-9]_", after.argval):
                changed.add(name)
            elif not (
                _DECIDES.search(after.opname) or (after.opname == "LOAD_CONST" and after.argval is None)
            ):
                read.add(name)
    return frozenset(written & changed)


_DECIDES = re.compile("NONE|JUMP|COPY|BOOL|STORE|DUP")
"""What only asks whether a name has something, or assigns it to itself: ``x = 0 if x is None else x``."""


def _locals(step: dis.Instruction) -> Iterator[tuple[str, str]]:
    """Whether a step loads or stores local names, and which; since Python 3.13 one does both."""
    if "FAST" in step.opname or "DEREF" in step.opname:
        verbs = [word for word in step.opname.split("_") if word in ("LOAD", "STORE")]
        yield from zip(verbs, step.argval if isinstance(step.argval, tuple) else (step.argval,), strict=False)


def uses_parameter(callback: Callback) -> bool:
    """Whether its code does anything with its first argument; True if it cannot be looked into."""
    function = function_of(callback)
    if not isinstance(function, types.FunctionType):
        return True
    code = function.__code__
    return any(name in _loads(code) for name in code.co_varnames[:1])


def branches(callback: Callback) -> bool:
    """Whether its code may do other things on other calls; True if it cannot be looked into."""
    function = function_of(callback)
    return not isinstance(function, types.FunctionType) or _branches(function.__code__)


@functools.lru_cache(maxsize=256)
def _branches(code: types.CodeType) -> bool:
    return any(step.opcode in (*dis.hasjrel, *dis.hasjabs) for step in dis.get_instructions(code))


def may_take(key: str, callback: Callback, returns: bool = False) -> bool:
    """Whether it may take what is called this: as an argument, or from its ``**kwargs``.

    ``returns``: it may be the one that returns it, so that it names it once more than it takes it.
    """
    function = function_of(callback)
    if key in arguments_of(callback) or not isinstance(function, types.FunctionType):
        return True
    code = function.__code__
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return False
    rest = code.co_varnames[
        code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    ]
    loads = _loads(code)
    return rest in loads and (looked_up(function) is None or loads[key] > returns)


@functools.lru_cache(maxsize=256)
def _loads(code: types.CodeType) -> collections.Counter[str]:
    """How often its code loads each name and each text."""
    steps = [step for inner in _codes(code) for step in dis.get_instructions(inner)]
    loaded = [step.argval for step in steps if step.opname.startswith("LOAD")]
    pairs = [
        x for found in loaded for x in (found if isinstance(found, tuple) else (found,))
    ]  # since Python 3.13
    return collections.Counter(x for x in pairs if isinstance(x, str))


def defaults_of(callback: Callback) -> dict[str, Any]:
    """Its hyperparameter defaults; a partial has its function's, but for what it sets itself, and its own."""
    if isinstance(callback, functools.partial):
        functions = {k: v for k, v in defaults_of(callback.func).items() if k not in callback.keywords}
        return functions | vars(callback).get("defaults", {})
    return dict(getattr(callback, "defaults", {}))


def looked_up(callback: Callback) -> frozenset[str] | None:
    """Names it may take from ``**kwargs``: the strings in its code. None if it may take any."""
    function = function_of(callback)
    return _looked_up(function.__code__) if isinstance(function, types.FunctionType) else None


@functools.lru_cache(maxsize=256)
def _looked_up(code: types.CodeType) -> frozenset[str] | None:
    codes = list(_codes(code))
    if any(step.opname == "CALL_FUNCTION_EX" for code in codes for step in dis.get_instructions(code)):
        return None  # it hands its arguments on
    return frozenset(c for code in codes for c in code.co_consts if isinstance(c, str))


def keys_made(callback: Callback) -> frozenset[str]:
    """Keys of the dicts that its code makes of several names at once: ``{"a": a, "b": b}``, ``return dict(a=a)``."""
    function = function_of(callback)
    return _keys_made(function.__code__) if isinstance(function, types.FunctionType) else frozenset()


@functools.lru_cache(maxsize=256)
def _keys_made(code: types.CodeType) -> frozenset[str]:
    steps = list(dis.get_instructions(code))
    found: set[str] = set()
    for i, step in enumerate(steps):
        keys = code.co_consts[step.arg] if step.opname == "KW_NAMES" and step.arg is not None else step.argval
        if not isinstance(keys, tuple) or not all(isinstance(key, str) for key in keys):
            continue
        after = [s.opname for s in steps[i + 1 : i + 4]]
        if "BUILD_CONST_KEY_MAP" in after[:1] or ("dict" in code.co_names and "RETURN_VALUE" in after):
            found |= {*keys}
    return frozenset(found)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def identity(callback: Callback) -> Hashable:
    """Equal for callbacks that are the same function with the same bound arguments."""
    if isinstance(callback, functools.partial):
        bound = [*enumerate(callback.args), *sorted(callback.keywords.items())]
        return identity(callback.func), tuple((name, type(v), _hashable(v)) for name, v in bound)
    return callback if isinstance(callback, types.FunctionType) else id(callback)


def _hashable(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
