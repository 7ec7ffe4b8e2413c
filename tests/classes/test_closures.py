"""Closures, optimizers in optimizers, and steps that are of another kind now and then: as without `fuse`."""

import enum
import math
import random
import re
import time
import warnings

import pytest
import torch
from test_fuse import Base

import fusedopt
from fusedopt import backends
from fusedopt.classes import fused

pytestmark = pytest.mark.filterwarnings("ignore:fusedopt. .* runs as it was written")
pytorch_optimizer = pytest.importorskip("pytorch_optimizer")


def descend(opt):
    with torch.no_grad():
        for p in opt.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=opt.param_groups[0]["lr"])


class LookAgain(Base):
    """Its closure is called again in every third step, as LookSAM does."""

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        if self.calls % 3 == 2:
            descend(self)
            with torch.enable_grad():
                loss = closure()
        self.calls += 1
        descend(self)
        return loss


class ByFlag(Base):
    """It steps before its closure is called, once that is asked for."""

    def step(self, closure=None):
        if self.flag and self.param_groups[0]["params"][0].grad is not None:
            descend(self)
        with torch.enable_grad():
            loss = closure()
        descend(self)
        return loss


class Once(Base):
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        descend(self)
        return loss


def trained(kind, fuse, drops=False):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))
    opt, calls = kind([p]), 0
    if fuse:
        fusedopt.fuse(opt)

    def closure():
        nonlocal calls
        calls += 1
        opt.zero_grad()
        loss = (p.square() * torch.arange(1.0, 8.0, dtype=torch.float64)).sum() * 0.1
        loss.backward()
        return loss

    losses = []
    for t in range(15):
        opt.flag = t >= 8
        losses.append(opt.step(closure).item())
        if drops:
            opt.zero_grad()
    return p.detach(), losses, calls, opt


@pytest.mark.parametrize("drops", [False, True], ids=["gradients stay", "gradients are dropped after a step"])
@pytest.mark.parametrize("kind", [LookAgain, ByFlag, Once])
def test_closures_are_called_when_and_as_often_as_the_class_calls_them(kind, drops):
    ours, theirs = trained(kind, True, drops), trained(kind, False, drops)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.tensor(ours[1]), torch.tensor(theirs[1]))
    assert ours[2] == theirs[2]
    if kind is Once:
        assert ours[3].explain().launches == 1 and not ours[3].explain().eager


@pytest.mark.parametrize(
    "which", [(True, False), (False, True), (True, True)], ids=["inner", "outer", "both"]
)
@pytest.mark.parametrize("name", ["Lookahead", "OrthoGrad", "ScheduleFreeWrapper"])
def test_optimizers_in_optimizers_may_both_be_fused(name, which):
    def run(inner, outer):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64)) for _ in range(3)]
        base = torch.optim.Adam(params, lr=0.05)
        opt = getattr(pytorch_optimizer, name)(fusedopt.fuse(base) if inner else base)
        opt = fusedopt.fuse(opt) if outer else opt
        if hasattr(opt, "train"):
            opt.train()
        for _ in range(12):
            for p in params:
                p.grad = torch.randn_like(p)
            opt.step()
        return [p.detach() for p in params]

    for ours, theirs in zip(run(*which), run(False, False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


class Noisy(Base):
    """Now and then it draws, and notes that."""

    drawn = ()

    def step(self, closure=None):
        self.calls += 1
        if self.calls % 4 == 0:
            type(self).drawn = (*self.drawn, random.random())
        descend(self)


def test_a_sampled_comparison_does_nothing_twice():
    found = []
    for check in (None, 4):
        random.seed(0)
        Noisy.drawn = ()
        p = torch.nn.Parameter(torch.ones(3))
        opt = Noisy([p])
        opt = fusedopt.fuse(opt, check=check) if check else opt
        for _ in range(20):
            p.grad = torch.ones(3)
            opt.step()
        found.append(Noisy.drawn)
    assert found[0] == found[1] and len(found[0]) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e5, 1e-8])
def test_what_is_cast_as_it_was_loaded_is_rounded(dtype, scale):
    class Compressed(Base):
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                q = (-p.grad.to(dtype)).float()
                p.add_(torch.where(q.isfinite(), q, 0.0), alpha=0.1)

    def run(fuse):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(300))
        opt = fusedopt.fuse(Compressed([p])) if fuse else Compressed([p])
        for k in range(6):
            p.grad = torch.randn(300) * (scale if k > 3 else 1.0)
            opt.step()
        assert not fuse or opt.explain().launches == 1
        return p.detach()

    torch.testing.assert_close(run(True), run(False), rtol=1e-5, atol=1e-6)


def test_a_bfloat16_average_of_rounded_gradients_is_the_class_s():
    class Averaged(Base):
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                if not state:
                    state["m"] = torch.zeros_like(p, dtype=torch.bfloat16)
                state["m"].mul_(0.9).add_(p.grad.bfloat16(), alpha=0.1)
                p.sub_(state["m"].float(), alpha=0.1)

    def run(fuse):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(2048))
        opt = fusedopt.fuse(Averaged([p])) if fuse else Averaged([p])
        for _ in range(8):
            p.grad = torch.randn(2048)
            opt.step()
        assert not fuse or opt.explain().launches == 1
        return opt.state[p]["m"]

    assert torch.equal(run(True), run(False))


class Mode(enum.Enum):
    PLAIN, SIGNED = 1, 2


def test_members_of_enumerations_are_flags():
    class Moded(Base):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad.sign() if group["mode"] is Mode.SIGNED else p.grad, alpha=0.5)

    p = torch.nn.Parameter(torch.zeros(3))
    opt = fusedopt.fuse(Moded([{"params": [p], "mode": Mode.PLAIN}]))
    for k in range(8):
        opt.param_groups[0]["mode"] = Mode.SIGNED if k > 4 else Mode.PLAIN
        p.grad = torch.full((3,), 4.0)
        opt.step()
    assert torch.equal(p.detach(), torch.full((3,), -0.5 * (5 * 4 + 3)))
    assert opt.explain().launches == 1


class Noting(Once):
    def step(self, closure=None):
        assert isinstance(self.note, str)
        return super().step(closure)


@pytest.mark.parametrize("every", [2, 4])
def test_a_step_that_is_another_one_every_few_is_given_up_with_a_word(every):
    """A trace takes as long as dozens of steps: one that does not come again soon is not worth it."""
    p = torch.nn.Parameter(torch.ones(3))
    opt = fusedopt.fuse(Noting([p]))
    opt.note = ""

    def closure():
        p.grad = torch.ones(3)
        return p.sum()

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for k in range(100):
            opt.note = f"epoch {k // every}"
            opt.step(closure)
    assert math.isclose(p[0].item(), 1.0 - 100 * opt.param_groups[0]["lr"], rel_tol=1e-4)
    assert any("each step is another one: self.note" in str(w.message) for w in said)


def stepped(opt, p, steps):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(steps):
            p.grad = torch.ones(3)
            opt.step()
    return [str(each.message) for each in said]


def test_one_trace_is_not_too_dear_and_several_are(monkeypatch):
    monkeypatch.setattr(fused, "DEAR", 1e-9)
    p = torch.nn.Parameter(torch.ones(3))
    opt = fusedopt.fuse(torch.optim.SGD([p], lr=0.01))
    assert not stepped(opt, p, 20) and opt.explain().launches
    opt.param_groups[0]["maximize"] = True
    (said,) = stepped(opt, p, 20)
    place = r"sgd\.py:\d+: each step is another one: .*maximize"
    assert re.search(place + r".*; 2 of \d+ steps were traced anew, in \d+\.\d s\. Remedy: ", said), said


def test_what_compilers_take_does_not_make_traces_dear(monkeypatch):
    compile_program = backends.compile_program

    def slowly(*args):
        until = time.thread_time() + 0.5
        while time.thread_time() < until:
            pass
        return compile_program(*args)

    monkeypatch.setattr(backends, "compile_program", slowly)
    monkeypatch.setattr(fused, "DEAR", 0.5 / fused.KINDS)
    p = torch.nn.Parameter(torch.ones(3))
    opt = fusedopt.fuse(torch.optim.SGD([p], lr=0.01))
    stepped(opt, p, 5)
    opt.param_groups[0]["maximize"] = True
    assert not stepped(opt, p, 5) and opt.explain().launches


def test_one_that_is_another_one_seldom_is_not():
    p = torch.nn.Parameter(torch.ones(3))
    opt = fusedopt.fuse(torch.optim.SGD([p], lr=0.01))
    for k in range(400):
        opt.note = f"epoch {k // 40}"
        p.grad = torch.ones(3)
        opt.step()
    assert not opt.explain().eager and opt.explain().launches == 1
