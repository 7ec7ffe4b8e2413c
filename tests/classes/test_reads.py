"""What a class's step asks of its optimizer may change, and is seen; what it does not ask for may be anything."""

import array
import collections
import copy
import ctypes
import dataclasses
import enum
import fractions
import functools
import operator
import statistics
import types
import typing

import numpy as np
import pytest
import torch
import typing_extensions

import fusedopt

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:fusedopt")]


class Read(torch.optim.Optimizer):
    """Its ``scale`` is what ``read(self, group)`` finds."""

    above = 1.0

    def __init__(self, params, read=lambda self, group: 1.0):
        super().__init__(params, dict(lr=0.1, key=None))
        self.read = types.MethodType(read, self)

    @property
    def half(self):
        return self.x / 2

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            scale = self.read(group)
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] * float(scale))


def trained(read, fuse, before, between):
    """Parameters after each of ten steps; ``between(opt)`` is called before the sixth."""
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(3)]
    opt = Read(params, read)
    before(opt)
    if fuse:
        fusedopt.fuse(opt)
    seen = []
    for t in range(10):
        if t == 5:
            between(opt)
        for p in params:
            p.grad = torch.full((4,), t + 1.0)
        opt.step()
        seen.append(torch.stack(params).detach())
    return torch.stack(seen), opt


def is_seen(read, before, between, launches=1):
    (ours, opt), (theirs, _) = (trained(read, fuse, before, between) for fuse in (True, False))
    assert torch.allclose(ours, theirs)
    assert opt.explain().launches == launches, opt.explain()
    unchanged, _ = trained(read, False, before, lambda opt: None)
    assert not torch.allclose(theirs, unchanged)


def put(**attributes):
    return lambda opt: vars(opt).update({k: copy.copy(v) for k, v in attributes.items()})


READS = {
    "the attribute": (lambda self, group: self.x, put(x=1.0), put(x=2.0)),
    "getattr": (lambda self, group: getattr(self, "".join(["x"])), put(x=1.0), put(x=2.0)),
    "attrgetter": (lambda self, group: operator.attrgetter("x")(self), put(x=1.0), put(x=2.0)),
    "vars": (lambda self, group: vars(self)["x"], put(x=1.0), put(x=2.0)),
    "its dict": (lambda self, group: self.__dict__["x"], put(x=1.0), put(x=2.0)),
    "around __getattribute__": (
        lambda self, group: object.__getattribute__(self, "x"),
        put(x=1.0),
        put(x=2.0),
    ),
    "a property": (lambda self, group: self.half, put(x=1.0), put(x=2.0)),
    "an attribute of its class, hidden later": (lambda self, group: self.above, put(), put(above=2.0)),
    "an attribute that comes": (lambda self, group: getattr(self, "new", 1.0), put(), put(new=2.0)),
    "whether there is one": (lambda self, group: 1.0 + hasattr(self, "new"), put(), put(new=None)),
    "a list": (lambda self, group: self.x[0], put(x=[1.0]), lambda opt: opt.x.__setitem__(0, 2.0)),
    "a list that grows": (lambda self, group: len(self.x), put(x=[1.0]), lambda opt: opt.x.append(2.0)),
    "a list that is another one": (lambda self, group: self.x[0], put(x=[1.0]), put(x=[2.0])),
}


@pytest.mark.parametrize("name", READS)
def test_what_is_asked_for_is_seen(name):
    is_seen(*READS[name])


def test_what_is_found_twice_is_seen_by_either_name():
    def before(opt):
        opt.a = opt.b = types.SimpleNamespace(x=1.0)

    is_seen(lambda self, group: self.b.x, before, lambda opt: setattr(opt.a, "x", 2.0))
    is_seen(lambda self, group: self.a.x, before, lambda opt: setattr(opt.b, "x", 2.0))
    is_seen(lambda self, group: self.b.x, before, lambda opt: setattr(opt, "b", types.SimpleNamespace(x=2.0)))


class Held:
    def __init__(self, x):
        self.x = x

    def now(self):
        return self.x

    def whether(self):
        return 2.0 if self.x == 2.0 else 1.0


METHODS = {
    "an attribute": lambda opt, held, method: vars(opt).update(x=method),
    "an attribute, and the object another": lambda opt, held, method: vars(opt).update(held=held, x=method),
    "the object an attribute, and it another": lambda opt, held, method: vars(opt).update(
        x=method, held=held
    ),
    "a partial": lambda opt, held, method: vars(opt).update(held=held, x=functools.partial(method)),
    "a closure": lambda opt, held, method: vars(opt).update(held=held, x=lambda: method()),
    "a global": lambda opt, held, method: vars(opt).update(held=held, x=lambda: GLOBAL[0]()),
}
GLOBAL = []


@pytest.mark.parametrize("name", ["now", "whether"])
@pytest.mark.parametrize("where", METHODS)
def test_what_the_object_of_a_bound_method_has_is_seen(where, name):
    held = []

    def before(opt):
        held[:] = [Held(1.0)]
        GLOBAL[:] = [getattr(held[0], name)]
        METHODS[where](opt, held[0], getattr(held[0], name))

    is_seen(lambda self, group: self.x(), before, lambda opt: setattr(held[0], "x", 2.0))


def test_a_method_of_the_optimizer_within_a_partial_is_its_own():
    def before(opt):
        opt.flag, opt.x = 1.0, functools.partial(Held.now, types.SimpleNamespace(x=1.0))
        opt.x = functools.partial(types.MethodType(lambda self: self.flag, opt))

    is_seen(lambda self, group: self.x(), before, put(flag=2.0))


def test_what_a_step_leaves_is_left_each_time():
    """Also where it leaves what was there in the trace."""

    class Periodic(Read):
        def step(self, closure=None):
            self.t += 1
            self.synced = False
            if self.t % 4 == 0:
                self.synced = True
            super().step()

    def run(fuse):
        params = [torch.nn.Parameter(torch.ones(4))]
        opt = Periodic(params)
        opt.t, opt.synced, seen = 0, False, []
        fusedopt.fuse(opt) if fuse else opt
        for _ in range(20):
            params[0].grad = torch.ones(4)
            opt.step()
            seen.append(opt.synced)
        return seen, opt

    (ours, opt), (theirs, _) = run(True), run(False)
    assert ours == theirs and opt.explain().launches


LARGE = {"array": np.ones(3), "list": [0] * 5000, "tuple": (0,) * 5000, "iterator": iter([1])}


@pytest.mark.parametrize("value", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("where", ["an attribute", "a group"])
def test_whether_there_is_something_is_seen(where, value):
    def read(self, group):
        return 2.0 if (self.x if where == "an attribute" else group["key"]) is not None else 1.0

    (_, set_) = PLACES[where]
    is_seen(read, lambda opt: set_(opt, value), lambda opt: set_(opt, None))


def test_an_optimizer_may_have_what_has_the_optimizer():
    def before(opt):
        opt.x, opt.me, opt.held = 1.0, opt, Held(opt)

    is_seen(lambda self, group: self.x, before, put(x=2.0))
    is_seen(lambda self, group: self.held.x.x, before, put(x=2.0))


@pytest.mark.parametrize("where", ["an attribute", "a group", "a list", "a dict"])
def test_objects_that_are_replaced_in_each_step_are_what_they_have(where):
    """Schedules that put a new one there each time."""
    (_, set_) = PLACES[where]

    def read(self, group):
        x = group["key"] if where == "a group" else self.x
        return (x[0] if where == "a list" else x["k"] if where == "a dict" else x).x

    params = [torch.nn.Parameter(torch.ones(4))]
    opt = Read(params, read)
    set_(opt, Held(0.0))
    fusedopt.fuse(opt)
    for t in range(10):
        set_(opt, Held(float(t)))
        params[0].grad = torch.ones(4)
        opt.step()
    assert torch.allclose(params[0], torch.full((4,), 1 - 4.5), atol=1e-5)
    assert opt.explain().launches == 1 and opt.explain().steps.startswith("8 of 9"), opt.explain()


class Half:
    def __call__(self):
        return 0.5


class First:
    def __new__(cls):
        return 1.0


class Second:
    def __new__(cls):
        return 2.0


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x

    def __call__(self):
        return self.x


class Calls:
    def __init__(self, x):
        self.x = x

    def __call__(self):
        return self.x


def one():
    return 1.0


def two():
    return 2.0


THINGS = {
    "functions": (one, two),
    "partials": (functools.partial(float, 1), functools.partial(float, 2)),
    "classes": (First, Second),
    "objects": (Calls(1.0), Half()),
    "objects of one class": (Calls(1.0), Calls(2.0)),
    "objects with slots": (Slotted(1.0), Slotted(2.0)),
}
PLACES = {
    "an attribute": (lambda self, group: self.x(), lambda opt, x: setattr(opt, "x", x)),
    "a group": (lambda self, group: group["key"](), lambda opt, x: opt.param_groups[0].update(key=x)),
    "a list": (
        lambda self, group: self.x[0](),
        lambda opt, x: vars(opt).setdefault("x", [0]).__setitem__(0, x),
    ),
    "a dict": (lambda self, group: self.x["k"](), lambda opt, x: vars(opt).setdefault("x", {}).update(k=x)),
    "a tuple": (lambda self, group: self.x[0](), lambda opt, x: setattr(opt, "x", (x,))),
    "an object": (
        lambda self, group: self.x.f(),
        lambda opt, x: setattr(vars(opt).setdefault("x", types.SimpleNamespace()), "f", x),
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("things", THINGS)
def test_what_is_replaced_is_seen_wherever_it_is(things, place):
    (read, set_), (before, after) = PLACES[place], THINGS[things]
    is_seen(read, lambda opt: set_(opt, before), lambda opt: set_(opt, after))


def test_an_object_may_become_one_of_another_class():
    is_seen(lambda self, group: self.x(), put(x=Calls(1.0)), lambda opt: setattr(opt.x, "__class__", Half))


class Pair(collections.namedtuple("Pair", "a b")):
    pass


class Other(collections.namedtuple("Other", "b a")):
    pass


class Grade(enum.IntEnum):
    ONE = 1


VALUES = {
    "numpy's integers": (lambda x: x, np.int64(1), np.int64(3)),
    "numpy's flags": (lambda x: 2.0 if x else 1.0, np.bool_(True), np.bool_(False)),
    "fractions": (lambda x: x, fractions.Fraction(1, 2), fractions.Fraction(1, 3)),
    "a tuple that gets longer": (sum, (1, 2), (1, 2, 3)),
    "an empty one": (lambda x: 1.0 + len(x), (), (3,)),
    "a list in the place of a tuple": (lambda x: 2.0 if isinstance(x, tuple) else 1.0, (1,), [1]),
    "tuples with names": (lambda x: x.a, Pair(1.0, 2.0), Other(1.0, 2.0)),
    "members of an enumeration": (lambda x: 2.0 if isinstance(x, Grade) else 1.0, Grade.ONE, 1),
}


@pytest.mark.parametrize("where", ["an attribute", "a group", "a list", "a dict", "a tuple"])
@pytest.mark.parametrize("values", VALUES)
def test_numbers_and_tuples_of_all_kinds_are_seen(values, where):
    (of, before, after), (_, set_) = VALUES[values], PLACES[where]

    def read(self, group):
        kept = self.x if hasattr(self, "x") else None
        x = group["key"] if where == "a group" else kept["k"] if where == "a dict" else kept
        return of(x[0] if where in ("a list", "a tuple") else x)

    is_seen(read, lambda opt: set_(opt, before), lambda opt: set_(opt, after))


UNREAD = {
    "a long list of numbers": lambda t: [float(t)] * 3000,
    "one that is longer than any that is looked at": lambda t: [t] * 10_000,
    "text": lambda t: f"epoch {t}",
    "an array": lambda t: np.full(3, t),
    "a set of tensors": lambda t: {torch.zeros(t)},
    "an iterator": lambda t: iter([t]),
    "objects": lambda t: [types.SimpleNamespace(t=t)] * t,
    "numbers in tensors": lambda t: [torch.tensor(1.0)] * t,
    "by tuples": lambda t: {(t, "loss"): torch.tensor(1.0)},
}


@pytest.mark.parametrize("kind", UNREAD)
def test_what_is_not_asked_for_may_be_anything(kind):
    """It is not looked at before each step, so neither its size nor that it changes costs anything."""
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(3)]
    opt = Read(params)
    opt.log, opt.history = UNREAD[kind](0), []
    fusedopt.fuse(opt)
    for t in range(10):
        for p in params:
            p.grad = torch.ones(4)
        opt.step()
        opt.log = UNREAD[kind](t)
        opt.history.append(t)
        setattr(opt, f"at_{t}", t)
    assert torch.allclose(params[0], torch.zeros(4), atol=1e-6)
    said = opt.explain()
    assert said.launches == 1 and not said.eager and said.steps.startswith("8 of 9"), said


OPAQUE = {
    "a number of ctypes": (
        lambda: ctypes.c_double(1.0),
        lambda x: x.value,
        lambda x: setattr(x, "value", 2.0),
    ),
    "a view of memory": (
        lambda: memoryview(array.array("d", [1.0])),
        lambda x: x[0],
        lambda x: x.__setitem__(0, 2.0),
    ),
    "an array": (lambda: array.array("d", [1.0]), lambda x: x[0], lambda x: x.__setitem__(0, 2.0)),
    "a large array": (lambda: np.ones(5000), lambda x: x[0], lambda x: x.__setitem__(0, 2.0)),
    "many objects": (
        lambda: [Calls(1.0) for _ in range(3000)],
        lambda x: x[0](),
        lambda x: x.__setitem__(0, Calls(2.0)),
    ),
}
WATCHED = {("an array", "a global"), ("many objects", "an attribute")}


@pytest.mark.parametrize("where", ["an attribute", "a global"])
@pytest.mark.parametrize("kind", OPAQUE)
def test_data_that_nobody_watches_is_left_to_the_class(kind, where):
    make, of, change = OPAQUE[kind]
    held = []

    def before(opt):
        held[:] = [make()]
        space["HELD"] = held[0]
        if where == "an attribute":
            opt.x = held[0]

    source = "self.x" if where == "an attribute" else "HELD"
    space = {"of": of}
    exec(f"def read(self, group):\n    return of({source})", space)
    is_seen(space["read"], before, lambda opt: change(held[0]), launches=int((kind, where) in WATCHED))


class Scaled(dict):
    def __getitem__(self, key):
        return 2 * super().__getitem__(key)


class Attributes(dict):
    __getattr__ = dict.__getitem__


def test_a_dict_with_a_way_of_its_own_to_find_things_is_the_class_s_own():
    is_seen(lambda self, group: self.x["k"], put(x=Scaled(k=1.0)), put(x=Scaled(k=2.0)), launches=0)
    is_seen(lambda self, group: self.x.k, put(x=Attributes(k=1.0)), put(x=Attributes(k=2.0)), launches=1)


class Manifold(torch.nn.Parameter):
    pass


def test_parameters_of_a_class_that_a_step_may_ask_for_are_the_class_s_own():
    class Asks(Read):
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=0.5 if isinstance(p, Manifold) else 1.0)

    params = [Manifold(torch.ones(3)), torch.nn.Parameter(torch.ones(3))]
    opt = fusedopt.fuse(Asks(params))
    for _ in range(4):
        for p in params:
            p.grad = torch.ones(3)
        opt.step()
    assert [p[0].item() for p in params] == [-1.0, -3.0]
    assert "is a Manifold, and the step may ask for that" in str(opt.explain())


@pytest.mark.parametrize(
    "call",
    [
        "datetime.datetime.now()", "time.localtime()", "os.urandom(1)", "os.stat('.')",
        "sys._getframe(1)", "inspect.currentframe()", "inspect.stack()",
    ],
)  # fmt: skip
def test_a_step_that_asks_for_what_changes_by_itself_is_the_class_s_own(call):
    space = {}
    exec(
        f"import datetime, inspect, os, sys, time\ndef read(self, group):\n    {call}\n    return 1.0", space
    )
    _, opt = trained(space["read"], True, put(), put())
    assert not opt.explain().launches and opt.explain().eager


def subscripted(self, group):
    return typing.cast(typing.List[typing.Tuple[float, int]], [(1.0, 2)])[0][0]  # noqa: UP006


def annotated(self, group):
    def helper(x: typing.Dict[str, float]) -> typing_extensions.Annotated[typing.List[float], 1]:  # noqa: UP006
        return x["a"]

    return helper({"a": 1.0})


def makes_types(self, group):
    class Pair(typing.NamedTuple):
        x: float

    class Kind(typing.Generic[typing.TypeVar("T")]):
        pair = Pair(1.0)

    @dataclasses.dataclass
    class Data:
        pair: Pair

    return Data(Kind[int]().pair).pair.x * enum.Enum("E", ["ONE"]).ONE.value


@pytest.mark.parametrize("read", [subscripted, annotated, makes_types], ids=lambda f: f.__name__)
def test_types_may_be_made_in_a_step(read):
    """Libraries ask then who calls them, for the name of a module."""
    _, opt = trained(read, True, put(), put())
    assert opt.explain().launches and not opt.explain().eager, opt.explain()


def adds_up(self, group):
    return statistics.mean([group["params"][0].grad.norm().item(), 1.0])


def test_a_reason_within_a_library_has_the_place_where_it_was_called():
    _, opt = trained(adds_up, True, put(), put())
    (eager,) = opt.explain().eager
    assert eager.reason.startswith(f"test_reads.py:{adds_up.__code__.co_firstlineno + 1}: "), eager.reason
