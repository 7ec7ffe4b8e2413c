"""A trace is of a few parameters that stand for others like them: what is done to some and not to others is noticed.

By order, name, identity or rank, by how many there are, and by whether there is a gradient. Then the class steps.
"""

import collections
import types
import weakref

import pytest
import torch
from test_fuse import Base

import fusedopt

pytestmark = pytest.mark.filterwarnings("ignore:fusedopt. .* runs as it was written")
NAMES = [f"{layer}.{what}" for what in ("weight", "bias") for layer in "abcdefghijkl"]


def by_name(self, group):
    for p, name in zip(group["params"], group["param_names"], strict=True):
        p.sub_(p.grad, alpha=group["lr"] * (0.1 if name.endswith("bias") else 1.0))


def by_order(self, group):
    for i, p in enumerate(group["params"]):
        if i < 3:
            p.sub_(p.grad, alpha=group["lr"])


def some_of_a_slice(self, group):
    for p in group["params"][:4]:
        p.sub_(p.grad, alpha=group["lr"])


def by_a_dict(self, group):
    for p in group["params"]:
        p.sub_(p.grad, alpha=group["lr"] * self.scale.get(p, 1.0))


def by_identity(self, group):
    for p in group["params"]:
        if not any(p is q for q in self.frozen):
            p.sub_(p.grad, alpha=group["lr"])


def by_rank(self, group):
    for p in sorted(group["params"], key=lambda p: -p.numel())[:2]:
        p.sub_(p.grad, alpha=group["lr"])


def one_more_each_step(self, group):
    for i, p in enumerate(group["params"]):
        if i <= self.calls:
            p.sub_(p.grad, alpha=group["lr"])


def by_how_many(self, group):
    for p in group["params"]:
        p.sub_(p.grad, alpha=0.1 if len(group["params"]) > 3 else 1.0)


def but_for_the_last(self, group):
    for p in group["params"]:
        if p is not group["params"][-1]:
            p.sub_(p.grad, alpha=group["lr"])


def by_place(self, group):
    for i, p in enumerate(group["params"]):
        p.sub_(p.grad, alpha=group["lr"] * (2.0 if i in (1, 4) else 1.0))


def paired(self, group):
    for p, scale in zip(group["params"], self.scales, strict=True):
        p.sub_(p.grad, alpha=group["lr"] * scale)


def one_of_a_slotted(self, group):
    for p in group["params"]:
        p.sub_(p.grad, alpha=group["lr"] * (2.0 if p is self.slotted.p else 1.0))


def one_that_is_referred_to(self, group):
    for p in group["params"]:
        p.sub_(p.grad, alpha=group["lr"] * (2.0 if p is self.weak() else 1.0))


def one_of_a_module(self, group):
    for p in group["params"]:
        p.sub_(p.grad, alpha=group["lr"] * (2.0 if p is self.model.head else 1.0))


def those_of_a_module(self, group):
    for p in group["params"]:
        p.sub_(p.grad, alpha=group["lr"] * (2.0 if p in set(self.model.parameters()) else 1.0))


def those_of_a_global(self, group):
    for p in group["params"]:
        p.sub_(p.grad, alpha=group["lr"] * (2.0 if any(p is q for q in FROZEN) else 1.0))


def those_of_a_set(self, group):
    for p in group["params"]:
        p.sub_(p.grad, alpha=group["lr"] * (2.0 if p in CHOSEN else 1.0))


def those_of_a_dict(self, group):
    for p in group["params"]:
        p.sub_(p.grad, alpha=group["lr"] * RATES.get(p, 1.0))


def those_of_a_dict_further_away(self, group):
    for p in group["params"]:
        p.sub_(p.grad, alpha=group["lr"] * HELD.rates.get(p, 1.0))


def those_of_a_dict_in_a_list(self, group):
    for p in group["params"]:
        p.sub_(p.grad, alpha=group["lr"] * LISTED[0][0].get(p, 1.0))


def those_of_a_list_in_a_list(self, group):
    for p in group["params"]:
        p.sub_(p.grad, alpha=group["lr"] * (2.0 if any(p is q for q in LISTED[1]) else 1.0))


FROZEN, CHOSEN, RATES = [], set(), {}
HELD = types.SimpleNamespace(rates=collections.OrderedDict())
LISTED = [[{}], []]


class Slotted:
    __slots__ = ("p",)


class Model(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head


def decays_all(self, group):
    for p in group["params"]:
        p.mul_(0.9)
        if p.grad is not None:
            p.sub_(p.grad, alpha=group["lr"])


def momentum_of_all(self, group):
    for p in group["params"]:
        state = self.state[p]
        state.setdefault("m", torch.zeros_like(p)).mul_(0.9)
        if p.grad is not None:
            state["m"].add_(p.grad)
        p.sub_(state["m"], alpha=group["lr"])


def counts_all(self, group):
    for p in group["params"]:
        state = self.state[p]
        state["n"] = state.get("n", 0) + 1
        if p.grad is not None:
            p.sub_(p.grad, alpha=group["lr"] / state["n"])


def all_or_none(self, group):
    if all(p.grad is not None for p in group["params"]):
        for p in group["params"]:
            p.sub_(p.grad, alpha=group["lr"])


def counts_the_missing(self, group):
    for p in group["params"]:
        if p.grad is None:
            self.missing += 1
        else:
            p.sub_(p.grad, alpha=group["lr"])


def demands_all(self, group):
    for p in group["params"]:
        assert p.grad is not None, "no gradient"
        p.sub_(p.grad, alpha=group["lr"])


def leaves_them_alone(self, group):
    for p in group["params"]:
        if p.grad is not None:
            p.sub_(p.grad, alpha=group["lr"])


def kind(one):
    @torch.no_grad()
    def step(self, closure=None):
        self.calls += 1
        for group in self.param_groups:
            one(self, group)

    return type(one.__name__, (Base,), {"step": step})


def stepped(one, fuse, count, missing=False):
    """What is left after eight steps: gradients go missing from the fifth on."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(count)]
    opt = kind(one)(list(zip(NAMES, params, strict=False)))
    opt.missing, opt.scale, opt.frozen = 0, {params[count // 2]: 0.5}, params[-2:]
    one = params[count // 2]
    opt.scales, opt.slotted = [1.0 + k / count for k in range(count)], Slotted()
    opt.weak, opt.model, opt.slotted.p = weakref.ref(one), Model(one), one
    FROZEN.clear(), CHOSEN.clear(), RATES.clear(), HELD.rates.clear(), LISTED[0][0].clear(), LISTED[1].clear()
    FROZEN.append(one), CHOSEN.add(one), RATES.update({one: 2.0})
    HELD.rates[one] = LISTED[0][0][one] = 2.0
    LISTED[1].append(one)
    opt = fusedopt.fuse(opt) if fuse else opt
    raised = 0
    for i in range(8):
        for k, p in enumerate(params):
            p.grad = None if missing and i >= 4 and k == count // 2 else torch.full_like(p, 0.5)
        try:
            opt.step()
        except AssertionError:
            raised += 1
    left = [
        {k: v for k, v in opt.state[p].items() if not isinstance(v, torch.Tensor)}
        for p in params
        if p in opt.state
    ]
    tensors = [t for p in params for t in (p, *opt.state.get(p, {}).values()) if isinstance(t, torch.Tensor)]
    return torch.stack([t.detach() for t in tensors]), (left, opt.missing, raised), opt


@pytest.mark.parametrize("count", [6, 24])
@pytest.mark.parametrize(
    "one",
    [
        by_name, by_order, some_of_a_slice, by_a_dict, by_identity, by_rank, one_more_each_step, by_how_many,
        but_for_the_last, by_place, paired, one_of_a_slotted, one_that_is_referred_to, one_of_a_module,
        those_of_a_module, those_of_a_global, those_of_a_set, those_of_a_dict,
        those_of_a_dict_further_away, those_of_a_dict_in_a_list, those_of_a_list_in_a_list,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_parameters_that_a_step_tells_apart(one, count):
    (theirs, *_), (ours, _, opt) = stepped(one, False, count), stepped(one, True, count)
    assert torch.equal(theirs, ours) and opt.explain().eager


def test_that_there_are_some_tells_none_apart():
    def if_any(self, group):
        if len(group["params"]) == 0 or not len(group["params"]):
            return
        for p in group["params"][:]:
            p.sub_(p.grad, alpha=group["lr"])

    (theirs, *_), (ours, _, opt) = stepped(if_any, False, 24), stepped(if_any, True, 24)
    assert torch.equal(theirs, ours) and not opt.explain().eager


@pytest.mark.parametrize(
    "one",
    [
        decays_all,
        momentum_of_all,
        counts_all,
        all_or_none,
        counts_the_missing,
        demands_all,
        leaves_them_alone,
    ],
    ids=lambda f: f.__name__,
)
def test_what_a_step_does_where_there_is_no_gradient(one):
    """As long as all have one, it fuses."""
    _, _, opt = stepped(one, True, 6)
    assert not opt.explain().eager
    (theirs, counts, _), (ours, found, opt) = stepped(one, False, 6, True), stepped(one, True, 6, True)
    torch.testing.assert_close(ours, theirs)
    assert found == counts and bool(opt.explain().eager) == (one is not leaves_them_alone)


@pytest.mark.parametrize(
    "what",
    [
        lambda self: self.param_groups[0]["lr"],
        lambda self: self.calls,
        lambda self: sum(p.numel() for p in self.param_groups[0]["params"]),
        lambda self: max(p.numel() for p in self.param_groups[0]["params"]),
    ],
    ids=["rate", "count", "elements", "largest"],
)
@pytest.mark.parametrize("kept", [False, True], ids=["returned", "kept"])
def test_what_a_step_returns_or_keeps_is_a_plain_number(what, kept):
    @torch.no_grad()
    def step(self, closure=None):
        self.calls += 1
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=0.1)
        if not kept:
            return what(self)
        self.seen = what(self)

    found = []
    for fuse in (False, True):
        params = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(3)]
        opt = type("Returns", (Base,), {"step": step, "seen": 0})(params)
        opt.seen = 0
        opt = fusedopt.fuse(opt) if fuse else opt
        found.append([])
        for i in range(5):
            opt.param_groups[0]["lr"] = 1.0 / (1 + i)
            for p in params:
                p.grad = torch.ones_like(p)
            returned = opt.step()
            found[-1].append((returned, opt.seen))
        assert all(type(x) in (int, float, type(None)) for pair in found[-1] for x in pair)
    assert found[0] == found[1]


def test_a_step_may_be_given_more_than_a_closure():
    class Scaled(Base):
        @torch.no_grad()
        def step(self, closure=None, scale=1.0):
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=scale * 0.1)

    p = torch.nn.Parameter(torch.ones(3))
    opt = fusedopt.fuse(Scaled([p]))
    for arguments in ({}, {}, {"scale": 2.0}, {}):
        p.grad = torch.ones(3)
        opt.step(**arguments)
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.5))
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        opt.step(size=2.0)
    clipped = fusedopt.fuse(Scaled([p]), max_grad_norm=1.0)
    with pytest.raises(TypeError, match="Remedy"):
        clipped.step(scale=2.0)


def test_what_is_counted_before_a_closure_is_counted_when_it_is_called():
    class Late(Base):
        def step(self, closure=None):
            self.calls += 1
            loss = closure()
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.sub_(p.grad, alpha=0.1)
            return loss

    p = torch.nn.Parameter(torch.ones(3))
    opt, seen = fusedopt.fuse(Late([p])), []

    def closure():
        seen.append(opt.calls)
        p.grad = torch.ones(3)

    for _ in range(5):
        opt.step(closure)
    assert seen == [1, 2, 3, 4, 5]


def test_an_object_that_becomes_one_of_another_class_steps_as_that():
    params = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(3)]
    opt = fusedopt.fuse(kind(leaves_them_alone)(params))
    for k in range(6):
        if k == 4:
            opt.__class__ = kind(decays_all)
        for p in params:
            p.grad = torch.zeros(2, 2)
        opt.step()
    torch.testing.assert_close(params[0].detach(), torch.full((2, 2), 0.81))


def test_stateless_parameters_whose_gradients_come_and_go_are_stepped_without_work_for_each():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(20)]
    opt = fusedopt.fuse(torch.optim.SGD(params, lr=0.1))
    generator = torch.Generator().manual_seed(0)
    for k in range(30):
        for p in params:
            there = k < 2 or torch.rand((), generator=generator) < 0.5
            p.grad = torch.ones(3) if there else None
        opt.step()
    steps = str(opt.explain())
    warm, _, every = steps[steps.index("steps: ") + 7 :].split()[:3]
    assert int(warm) >= int(every) - 3, steps


def test_lists_beside_the_parameters_are_said_to_be_that():
    """They are as long as that of parameters; a trace has fewer of these."""

    def from_their_starts(self, group):
        group.setdefault("starts", [p.clone() for p in group["params"]])
        for p, start in zip(group["params"], group["starts"], strict=True):
            p.copy_(start.sub(p.grad, alpha=group["lr"]))

    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(5)]
    opt = fusedopt.fuse(kind(from_their_starts)(params))
    for _ in range(4):
        for p in params:
            p.grad = torch.ones(3)
        opt.step()
    (eager,) = opt.explain().eager
    assert "pairs parameters" in eager.reason and "in another list. Remedy: keep" in eager.reason, eager
