"""What ``help()`` says of each public name: all of it that a machine can check, and that no other name is public."""

import ast
import enum
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from factories import parameters

import fusedopt
from fusedopt import callbacks, learner, optim, optimizer, rules, storage, table
from fusedopt.callback import name_of
from fusedopt.learner.events import HEARD
from fusedopt.optimizer.explain import Explanation
from fusedopt.optimizer.release import GradientRelease
from fusedopt.storage import functions

ROOT = Path(__file__).parents[1]


def own(module: types.ModuleType) -> list[str]:
    """The public functions and classes of a module whose ``__all__`` has more, or is not there."""
    return [
        n for n, x in vars(module).items() if n[0] != "_" and getattr(x, "__module__", "") == module.__name__
    ]


PUBLIC = {
    fusedopt: fusedopt.__all__,
    optimizer: optimizer.__all__,
    optim: own(optim),
    rules: rules.__all__,
    callbacks: callbacks.__all__,
    storage: storage.__all__,
    functions: functions.__all__,
    learner: learner.__all__,
}
RETURNED = {"Explanation": Explanation, "GradientRelease": GradientRelease}
"""What public methods return."""


class Documented(NamedTuple):
    """A public function, class or method, and what is said of it."""

    name: str
    thing: Any
    doc: str

    @property
    def arguments(self) -> list[str]:
        try:
            found = inspect.signature(self.thing).parameters
        except (TypeError, ValueError):
            return []
        return [n for n in found if n not in ("self", "cls", "p", "kwargs")]


def said_of(cls: type) -> str:
    """Of a class: its own docstring, and those of its bases here, which say what arguments mean that it has of them."""
    docs = [c.__doc__ or "" for c in cls.__mro__ if c.__module__.startswith("fusedopt.")]
    return "\n".join([*docs, vars(cls).get("__init__", cls).__doc__ or ""])


def of_class(cls: type, name: str) -> Iterator[Documented]:
    """A class, and the methods and properties that it has from fusedopt; events are documented as such."""
    yield Documented(name, cls, said_of(cls) if cls.__doc__ else "")
    for key in dir(cls):
        owner = next((c for c in cls.__mro__ if key in vars(c)), None)
        if key[0] == "_" or key in HEARD or owner is None or not owner.__module__.startswith("fusedopt."):
            continue
        found = vars(owner)[key]
        function = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
        if isinstance(function, types.FunctionType):
            yield Documented(f"{name}.{key}", function, inspect.getdoc(getattr(cls, key)) or "")


def everything() -> Iterator[Documented]:
    for module, names in PUBLIC.items():
        for name in names:
            thing = getattr(module, name)
            if isinstance(thing, type) and not issubclass(thing, (BaseException, enum.Enum, dict)):
                yield from of_class(thing, f"{module.__name__}.{name}")
            elif isinstance(thing, (type, types.FunctionType)):
                plain = isinstance(thing, type)  # has the arguments of its base
                yield Documented(f"{module.__name__}.{name}", None if plain else thing, thing.__doc__ or "")
    for name, thing in RETURNED.items():
        yield from of_class(thing, name)


ALL = {each.name: each for each in everything()}


def test_there_is_something_to_check():
    assert len(ALL) > 250
    assert {"fusedopt.Adam", "fusedopt.rules.Lion", "fusedopt.learner.Learner.fit"} <= ALL.keys()


def test_every_public_name_has_a_docstring():
    assert not [name for name, each in ALL.items() if len(each.doc) < 10]
    assert not [m.__name__ for m in PUBLIC if not m.__doc__]


def test_docstrings_name_every_argument():
    assert not [
        f"{name}: {argument}"
        for name, each in ALL.items()
        for argument in each.arguments
        if not re.search(rf"\b{argument}\b", each.doc)
    ]


def raised(thing: Any) -> set[str]:
    """The exceptions that the code of a function, or of a class's constructor, raises in so many words."""
    function = vars(thing).get("__init__") if isinstance(thing, type) else thing
    if (
        not isinstance(function, types.FunctionType) or function.__code__.co_filename == "<string>"
    ):  # a dataclass's
        return set()
    found = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))))
    calls = [node.exc for node in found if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return {
        call.func.id for call in calls if isinstance(call.func, ast.Name) and not call.func.id.startswith("_")
    }


def test_docstrings_name_what_is_raised():
    assert raised(optim.Adadelta) == {"ValueError"}
    assert not [
        f"{name}: {error}"
        for name, each in ALL.items()
        for error in raised(each.thing)
        if not re.search(rf"Raises\b.*\b{error}\b|[Rr]aises {error}|[Rr]efused", each.doc, re.S)
    ]


# --
# Optimizers


NAMED = {
    row.name if row.face != "torch" else f"optim.{row.name}": row for row in (*table.TABLE, *table.RULES)
}
AROUND = ("Lookahead", "Cautious", "Centralize", "GrokFast")


def blocks(doc: str) -> dict[str, str]:
    """What `described` has added to a docstring, by the first word of each title."""
    found = re.findall(r"(?:^|\n\n)(\w+)\b[^\n]*(?:\n\S[^\n]*)*:((?:\n    [^\n]*)+)", doc)
    return dict(found)


@pytest.mark.parametrize("name", NAMED)
def test_an_optimizer_says_the_formula_of_what_it_is_made_of(name):
    """`described` is told of callbacks, and the optimizer is made of a list of them: these are the same."""
    row = NAMED[name]
    thing = getattr({"fastai": fusedopt, "torch": optim, "rules": rules}[row.face], row.name)
    found = blocks(thing.__doc__)
    assert {"Formula", "Arguments", "Raises", "Source"} <= found.keys() or row.name in AROUND
    described = set(re.findall(r"^    (\w+)[(:]", found["Formula"], re.M))
    made_of = {
        name_of(cb)
        for variant in row.variants
        for cb in row.factory(parameters(row.shapes([(3, 4), (5,)])), **variant.kwargs).cbs
    }
    assert described <= made_of
    assert row.name in AROUND or made_of - described <= {
        *("maximize_grad", "step_stat"),
        *({"l2_reg", "sgd_step"} if row.face == "fastai" else ()),
    }


def test_what_is_shared_is_not_said_where_it_is_said_already():
    """An argument's meaning is in one place: an optimizer's own text, or what all have in common."""
    doc = rules.LARS.__doc__
    assert "`momentum`" in doc and "    momentum:" not in doc and "    maximize:" in doc


# --
# What is public


def test_what_is_not_public_says_so():
    document = (ROOT / "docs" / "compiler.md").read_text(encoding="utf-8")
    internal = document[document.index("### The house") : document.index("## 10.")]
    for name in dir(fusedopt):
        if name[0] != "_" and name not in fusedopt.__all__:
            assert isinstance(getattr(fusedopt, name), types.ModuleType), name
            assert f"`fusedopt/{name}/`" in internal or f"`{name}" in internal, name


def test_help_lists_what_is_public():
    for name in fusedopt.__all__:
        assert re.search(rf"\b{name}\b", fusedopt.__doc__), name
