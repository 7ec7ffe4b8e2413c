"""Steps inside torch's compilers, traces and transforms: right, or refused before anything is recorded or written."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fusedopt import optim

RULES = {
    "SGD": lambda face, ps: face.SGD(ps, lr=0.1),
    "SGD momentum": lambda face, ps: face.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda face, ps: face.AdamW(ps, lr=0.1),
    "RMSprop": lambda face, ps: face.RMSprop(ps, lr=0.1, momentum=0.9),
    "RAdam": lambda face, ps: face.RAdam(ps, lr=0.1),
}
MODES = ("real", "fake", "symbolic")


def training(make, face, steps=3):
    """A function of parameter and gradient that makes an optimizer and steps."""

    def train(p, g):
        p = p.clone()
        opt = make(face, [p])
        for t in range(steps):
            p.grad = g * (t + 1)
            opt.step()
        return p.detach().clone()

    return train


def tensors():
    return torch.randn(4, 3), torch.randn(4, 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_in_the_graph_of_make_fx(rule, mode):
    graph = make_fx(training(RULES[rule], optim), tracing_mode=mode)(*tensors())
    values = tensors()
    torch.testing.assert_close(graph(*values), training(RULES[rule], torch.optim)(*values))


@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_functionalized(rule):
    values, train = tensors(), training(RULES[rule], optim)
    expected = training(RULES[rule], torch.optim)(*values)
    torch.testing.assert_close(torch.func.functionalize(train)(*values), expected)
    pure = torch.func.functionalize(train, remove="mutations_and_views")
    torch.testing.assert_close(make_fx(pure)(*tensors())(*values), expected)


def test_clipping_is_traced_too():
    def make(face, ps):
        return optim.SGD(ps, lr=0.1, max_grad_norm=1.0)

    p, g = torch.zeros(4, 3), torch.ones(4, 3)
    graph = make_fx(training(make, optim, steps=1))(*tensors())
    torch.testing.assert_close(graph(p, g), torch.full((4, 3), -0.1 / math.sqrt(12)))


REFUSED = {
    "vmap": lambda step: torch.func.vmap(step)(torch.ones(2, 3)),
    "jvp": lambda step: torch.func.jvp(step, (torch.ones(3),), (torch.ones(3),)),
    "grad": lambda step: torch.func.grad(lambda g: step(g).sum())(torch.ones(3)),
    "vmap of functionalize": lambda step: torch.func.vmap(torch.func.functionalize(step))(torch.ones(2, 3)),
    "functionalize": lambda step: torch.func.functionalize(step)(torch.ones(3)),
    "pre_dispatch": lambda step: make_fx(step, pre_dispatch=True)(torch.ones(3)),
    **{mode: lambda step, mode=mode: make_fx(step, tracing_mode=mode)(torch.ones(3)) for mode in MODES},
}
SAID = {
    "vmap": "vmap", "jvp": "jvp", "grad": "grad", "vmap of functionalize": "vmap", "functionalize": "functional",
    "pre_dispatch": "before dispatch", **dict.fromkeys(MODES, "made outside"),
}  # fmt: skip


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("where", REFUSED)
def test_what_could_not_be_right_is_refused_and_changes_nothing(where, warm):
    p = nn.Parameter(torch.ones(3))
    opt = optim.AdamW([p], lr=0.1)
    for _ in range(5 * warm):
        p.grad = torch.ones(3)
        opt.step()
    before, state = p.detach().clone(), {k: float(torch.as_tensor(v).sum()) for k, v in opt.state[p].items()}

    def step(g):
        p.grad = g
        opt.step()
        return p.detach().clone()

    with pytest.raises(RuntimeError, match=rf"{SAID[where]}(.|\n)*Remedy"):
        REFUSED[where](step)
    assert torch.equal(p, before)
    assert {k: float(torch.as_tensor(v).sum()) for k, v in opt.state[p].items()} == state
    p.grad = torch.ones(3)
    opt.step()
    assert bool((p < before).all())


def test_training_under_fake_tensors():
    with FakeTensorMode():
        model = nn.Linear(3, 2)
        opt = optim.AdamW(model.parameters(), max_grad_norm=1.0)
        with pytest.warns(
            RuntimeWarning, match="go through FakeTensorMode, so parameters are stepped unfused"
        ):
            for _ in range(4):
                model(torch.ones(1, 3)).sum().backward()
                opt.step()
    state = opt.state[model.weight]
    assert state["step"] == 4 and isinstance(state["exp_avg"], FakeTensor)


def test_a_real_parameter_is_not_stepped_by_a_fake_gradient():
    p = nn.Parameter(torch.ones(3))
    opt = optim.AdamW([p])
    with (
        FakeTensorMode(),
        pytest.raises(RuntimeError, match=r"parameter 0 of group 0 is real(.|\n)*Remedy"),
    ):
        p.grad = torch.ones(3)
        opt.step()
    assert torch.equal(p, torch.ones(3)) and not opt.state


class Log(TorchDispatchMode):
    """Counts the operations that it sees."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_step_and_the_next_one_is_warm_again():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    ours, theirs, log = optim.AdamW([p]), torch.optim.AdamW([q]), Log()
    for t in range(9):
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        if t in (0, 4):
            said = pytest.warns(RuntimeWarning, match="go through Log,") if t == 0 else nullcontext()
            with said, log:
                ours.step()
        else:
            ours.step()
        theirs.step()
    assert log.seen > 10 and ours.engine.bound
    torch.testing.assert_close(p, q)


@pytest.fixture
def compilers():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


MADE = {
    "SGD": lambda p: optim.SGD([p], lr=0.1),
    "AdamW": lambda p: optim.AdamW([p], lr=0.1),
    "Adam": lambda p: fusedopt.Adam([p], lr=0.1),
    "ranger": lambda p: fusedopt.ranger([p], lr=0.1),
    "callbacks": lambda p: fusedopt.Optimizer([p], [fusedopt.sgd_step], lr=0.1),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", MADE)
def test_made_and_stepped_in_compiled_code(name, backend, compilers):
    make = MADE[name]
    p, q, g = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3)), torch.tensor([1.0, -2.0, 0.5])

    @torch.compile(backend=backend)
    def first(w, g):
        y = w * 2
        opt = make(w)
        w.grad = g
        opt.step()
        return opt, y + w

    opt, y = first(p, g)

    @torch.compile(backend=backend)
    def second(w, g):
        w.grad = g
        opt.step()
        return w * 2

    twice = second(p, g)
    plain = make(q)
    for _ in range(2):
        before, q.grad = q.detach().clone(), g
        plain.step()
    torch.testing.assert_close([p, y, twice], [q, 2.0 + before, 2 * q], check_stride=False)
