"""What a class's step reads and changes around it: as without `fuse`, however many steps away it is."""

import argparse
import array
import collections
import contextvars
import functools
import io
import itertools
import linecache
import queue
import sys
import types
import weakref

import numpy as np
import pytest
import torch

import fusedopt

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:fusedopt")]


class Slotted:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 1


class Plain:
    kind = 1

    def __init__(self):
        self.n = 1

    def half(self):
        return self.n * 0.5

    def __call__(self):
        return self.n


class Deep:
    def __init__(self):
        self.plain, self.slotted, self.array, self.list = Plain(), Slotted(), np.ones(3), [1]
        self.objects, self.named = [Plain()], {"a": Plain()}


class Net(torch.nn.Module):
    debug = 1.0

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Dropout()


def module():
    found = types.ModuleType("users")
    exec(
        "factor = 1\nvalues = [1]\nclass Kind:\n  n = 1\none = Kind()\n"
        "def of_factor():\n  return factor\ndef of_one():\n  return one.n\ndef of_values():\n  return values[0]",
        vars(found),
    )
    return found


def around():
    """What is around the step, by the names that it has for it."""
    values = [1]

    def closed():
        return values[0]

    def defaulted(x=[1]):  # noqa: B006
        return x[0]

    def named_default(*, x=1):
        return x

    rate, count_ = 1, 0

    def rated():
        return rate

    def set_rate(value):
        nonlocal rate
        rate = value

    def counts():
        nonlocal count_
        count_ += 1
        return count_

    def by_default(f=rated):
        return f()

    def with_attribute():
        return with_attribute.k

    with_attribute.k = 1

    class Inherits(Plain):
        pass

    plain, log = Plain(), []
    plain.rated = rated
    return dict(
        slotted=Slotted(), plain=plain, weak=weakref.ref(plain), inherits=Inherits(), net=Net(),
        deep=Deep(), objects=[Plain()], slots=[Slotted()], named={"a": Plain()},
        nested={1: [{"k": Plain()}]}, pair=(Plain(),), space=types.SimpleNamespace(n=1),
        chain=collections.ChainMap({"n": 1}), user=collections.UserDict(n=1), deque=collections.deque([1]),
        counter=collections.Counter(a=1), ordered=collections.OrderedDict(a=1), numbers=np.ones(3), called=Plain(),
        bytes_=bytearray(4), typed=array.array("d", [1.0]), module=module(), closed=closed, values=values,
        defaulted=defaulted, named_default=named_default,
        partial=functools.partial(Plain.half, Plain()), count=itertools.count(),
        generator=iter(range(100)), simple=queue.SimpleQueue(), text=io.StringIO(),
        arguments=argparse.Namespace(n=1, inner=Plain()), elements={0}, members={Plain()},
        registry={"rated": rated, "counts": counts, "log": log.append, "odd": defaulted}, set_rate=set_rate, log=log,
        counted=lambda: count_, by_default=by_default, applied=functools.partial(by_default, rated),
        with_attribute=with_attribute, odd={(1, "a"): Plain(), torch: Plain()},
        variable=contextvars.ContextVar("variable", default=0),
    )  # fmt: skip


def trained(line, fuse, between=lambda t, names: None):
    """Parameters after each of ten steps that have this line, which says what ``k`` is; and what was around them."""
    body = f"""
class Above(torch.optim.Optimizer):
    scale = 1.0

    def scaled(self):
        return 1.0

class Around(Above):
    def __init__(self, params):
        super().__init__(params, dict(lr=0.1, t=0))
        self.plain, self.slotted, self.objects = Plain(), Slotted(), [Plain()]
        self.partial, self.file = functools.partial(Plain.half, self.plain), io.StringIO()
        self.inherits, self.net = inherits, net

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["t"] += 1
            t, k = group["t"], 1.0
            {line}
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"] * k)
"""
    names = around() | dict(torch=torch, np=np, functools=functools, io=io, Plain=Plain, Slotted=Slotted)
    names["__name__"] = "users"
    linecache.cache[line] = len(body), None, body.splitlines(True), line
    exec(compile(body, line, "exec"), names)
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(3)]
    names["opt"] = opt = names["Around"](params)
    if fuse:
        fusedopt.fuse(opt)
    seen = []
    for t in range(10):
        between(t, names)
        for p in params:
            p.grad = torch.full((4,), t + 1.0)
        opt.step()
        seen.append([p.detach().clone() for p in params])
    return torch.stack([torch.stack(each) for each in seen]), names


CHANGES = [
    ("slotted.n += 1", "slotted.n"),
    ("plain.n += 1", "plain.n"),
    ("deep.plain.n += 1", "deep.plain.n"),
    ("deep.slotted.n += 1", "deep.slotted.n"),
    ("deep.objects[0].n += 1", "deep.objects[0].n"),
    ("deep.named['a'].n += 1", "deep.named['a'].n"),
    ("deep.array[0] = t", "deep.array[0]"),
    ("deep.list[0] += 1", "deep.list"),
    ("objects[0].n += 1", "objects[0].n"),
    ("named['a'].n += 1", "named['a'].n"),
    ("nested[1][0]['k'].n += 1", "nested[1][0]['k'].n"),
    ("space.n += 1", "space.n"),
    ("chain['n'] += 1", "dict(chain)"),
    ("user['n'] += 1", "dict(user)"),
    ("deque.append(t)", "list(deque)"),
    ("counter.update(['a'])", "dict(counter)"),
    ("ordered['b'] = t; ordered.move_to_end('a')", "list(ordered.items())"),
    ("elements.add(t)", "elements"),
    ("bytes_[0] = int(t)", "bytes(bytes_)"),
    ("typed[0] = t", "list(typed)"),
    ("typed[0] += 1", "list(typed)"),
    ("bytes_[0] += 1", "bytes(bytes_)"),
    ("numbers += 1", "list(numbers)"),
    ("next(count)", "next(count)"),
    ("next(generator)", "next(generator)"),
    ("simple.put(t)", "simple.qsize()"),
    ("text.write('x')", "text.getvalue()"),
    ("registry['counts']()", "counted()"),
    ("registry['log'](int(t))", "log"),
    ("variable.set(variable.get() + 1)", "variable.get()"),
    ("module.one.n += 1", "module.one.n"),
    ("module.values[0] += 1", "module.values"),
    ("values[0] += 1", "values"),
    ("self.slotted.n += 1", "opt.slotted.n"),
    ("self.plain.n += 1", "opt.plain.n"),
    ("self.objects[0].n += 1", "opt.objects[0].n"),
]


@pytest.mark.parametrize(("line", "seen"), CHANGES, ids=[line for line, _ in CHANGES])
def test_what_a_step_changes_it_changes_once_a_step(line, seen):
    ours, mine = trained(line if "numbers +=" not in line else "numbers.__iadd__(1)", True)
    theirs, plain = trained(line if "numbers +=" not in line else "numbers.__iadd__(1)", False)
    assert torch.allclose(ours, theirs)
    now = eval(seen, mine)
    assert now == eval(seen, plain) != eval(seen.replace("opt.", ""), around() | dict(dict=dict, list=list))


READS = [
    ("slotted.n", "slotted.n = v"),
    ("plain.n", "plain.n = v"),
    ("plain.half()", "plain.n = v"),
    ("plain.kind", "plain.kind = v"),
    ("getattr(plain, 'n')", "plain.n = v"),
    ("vars(plain)['n']", "plain.n = v"),
    ("deep.plain.n", "deep.plain.n = v"),
    ("deep.slotted.n", "deep.slotted.n = v"),
    ("deep.plain.half()", "deep.plain.n = v"),
    ("deep.objects[0].n", "deep.objects[0].n = v"),
    ("deep.named['a'].n", "deep.named['a'].n = v"),
    ("deep.list[0]", "deep.list[0] = v"),
    ("float(deep.array[0])", "deep.array[0] = v"),
    ("objects[0].n", "objects[0].n = v"),
    ("objects[0].n", "objects[0] = type(plain)(); objects[0].n = v"),
    ("slots[0].n", "slots[0].n = v"),
    ("named['a'].n", "named['a'].n = v"),
    ("nested[1][0]['k'].n", "nested[1][0]['k'].n = v"),
    ("pair[0].n", "pair[0].n = v"),
    ("space.n", "space.n = v"),
    ("chain['n']", "chain['n'] = v"),
    ("user['n']", "user['n'] = v"),
    ("deque[0]", "deque[0] = v"),
    ("arguments.n", "arguments.n = v"),
    ("arguments.inner.n", "arguments.inner.n = v"),
    ("float(len(deque))", "deque.append(v)"),
    ("sum(x.n for x in objects)", "objects.append(type(plain)())"),
    ("sum(counter.values())", "counter[v] = v"),
    ("counter['a']", "counter['a'] = v"),
    ("ordered['a']", "ordered['a'] = v"),
    ("float(numbers[0])", "numbers[0] = v"),
    ("float(numbers[0])", "numbers[:2] = v, np.nan"),
    ("odd[(1, 'a')].n", "odd[(1, 'a')].n = v"),
    ("typed[0]", "typed[0] = v"),
    ("float(bytes_[0])", "bytes_[0] = int(v)"),
    ("sum(x.n for x in members)", "next(iter(members)).n = v"),
    ("sum(x.n for x in members)", "members.add(type(plain)())"),
    ("called()", "called.n = v"),
    ("registry['rated']()", "set_rate(v)"),
    ("registry['odd']()", "registry['odd'].__defaults__[0][0] = v"),
    ("plain.rated()", "set_rate(v)"),
    ("self.plain.rated() if hasattr(self.plain, 'rated') else 1", "opt.plain.rated = lambda: v"),
    ("by_default()", "set_rate(v)"),
    ("applied()", "set_rate(v)"),
    ("with_attribute()", "with_attribute.k = v"),
    ("module.factor", "module.factor = v"),
    ("module.of_factor()", "module.factor = v"),
    ("module.of_one()", "module.one.n = v"),
    ("module.of_values()", "module.values[0] = v"),
    ("module.one.n", "module.Kind.n = v"),
    ("closed()", "values[0] = v"),
    ("defaulted()", "defaulted.__defaults__[0][0] = v"),
    ("partial()", "partial.args[0].n = v"),
    ("self.slotted.n", "opt.slotted.n = v"),
    ("self.plain.half()", "opt.plain.n = v"),
    ("self.objects[0].n", "opt.objects[0].n = v"),
    ("self.partial()", "opt.plain.n = v"),
    ("self.defaults['lr']", "opt.defaults['lr'] = v"),
    ("inherits.kind", "type(inherits).kind = v"),
    ("inherits.kind", "inherits.kind = v"),
    ("self.inherits.kind", "type(opt.inherits).kind = v"),
    ("self.scale", "type(opt).scale = v"),
    ("self.scaled()", "type(opt).scaled = lambda self: v"),
    ("getattr(type(self), 'slow', 1)", "type(opt).slow = v"),
    ("getattr(module, 'factor')", "module.factor = v"),
    ("getattr(module, 'absent', 1)", "module.absent = v"),
    ("2.0 if hasattr(Plain, 'absent') else 1.0", "Plain.absent = v"),
    ("1.0 if net.training else 2.0", "net.eval()"),
    ("1.0 if self.net.training else 2.0", "opt.net.eval()"),
    ("net.debug", "net.debug = v"),
    ("net.debug", "type(net).debug = v"),
    ("1.0 if self.net.inner.training else 2.0", "opt.net.inner.eval()"),
    ("weak().n", "plain.n = v"),
    ("named_default()", "named_default.__kwdefaults__['x'] = v"),
    ("named_default()", "named_default.__kwdefaults__ = {'x': v}"),
]
IMPORTS = [
    "import users_of_around; k = users_of_around.factor",
    "from users_of_around import factor; k = factor",
]


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    """Of what changes are made to a module that can be imported, and to a class that all tests have."""
    monkeypatch.setitem(sys.modules, "users_of_around", module())
    yield
    for kind, name in ((Plain, "absent"), (Net, "debug")):
        if name in vars(kind):
            delattr(kind, name)
    Net.debug = 1.0


@pytest.mark.parametrize(("read", "change"), READS, ids=[f"{read}, {change}" for read, change in READS])
def test_what_a_step_reads_may_change_between_steps(read, change, nothing_is_left):
    may_change(f"k = {read}", change)


@pytest.mark.parametrize("line", IMPORTS)
def test_what_a_step_imports_may_change_between_steps(line):
    may_change(line, "sys.modules['users_of_around'].factor = v")


def may_change(line, change):
    def between(t, names):
        if t in (5, 8):
            exec(change, names | {"v": float(t), "sys": sys})

    def fresh(*args):
        sys.modules["users_of_around"], Net.debug = module(), 1.0
        if "absent" in vars(Plain):
            del Plain.absent
        return trained(line, *args)

    ours, names = fresh(True, between)
    theirs, _ = fresh(False, between)
    assert torch.allclose(ours, theirs)
    assert names["opt"].explain().launches, names["opt"].explain()
    unchanged, _ = fresh(False)
    assert not torch.allclose(theirs, unchanged)


SETTINGS = [
    "2.0 if torch.is_grad_enabled() else 1.0",
    "2.0 if torch.get_default_dtype() == torch.float64 else 1.0",
    "2.0 if torch.are_deterministic_algorithms_enabled() else 1.0",
    "float(os.environ.get('FACTOR_OF_AROUND', 1))",
    "2.0 if 'FACTOR_OF_AROUND' in os.environ else 1.0",
]


@pytest.mark.parametrize("read", SETTINGS)
def test_a_step_that_asks_for_settings_is_the_class_s_own(read):
    _, names = trained(f"import os; k = {read}", True)
    assert names["opt"].explain().eager and not names["opt"].explain().launches


def test_files_and_queues_that_are_there_and_not_used_are_no_reason():
    _, names = trained("k = 0.5 if None not in (self.file, text, simple, variable) else 1.0", True)
    assert names["opt"].explain().launches and not names["opt"].explain().eager
