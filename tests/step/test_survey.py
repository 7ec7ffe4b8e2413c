"""csrc/survey.h against Python: what it calls alike is what callbacks and kernels cannot tell apart."""

from __future__ import annotations

import pytest
import torch

from fusedopt import optim
from fusedopt.extension import leaf
from fusedopt.step import items
from fusedopt.step.scaling import Scaling

pytestmark = pytest.mark.skipif(leaf.native is None, reason="needs the extension")


def several(make, n=3):
    return [make() for _ in range(n)]


def parameter(shape=(4, 3), dtype=torch.float32, grad=None, **state):
    p = torch.nn.Parameter(torch.randn(shape).to(dtype))
    p.grad = torch.randn(shape).to(dtype) if grad is None else grad(p)
    return p, state


def strided(p):
    return torch.randn(*p.shape[::-1]).t()


def moments(p_dtype=torch.float32, **other):
    return {"exp_avg": torch.zeros(4, 3, dtype=p_dtype), "exp_avg_sq": torch.zeros(4, 3), **other}


class Tagged(torch.Tensor):
    pass


KINDS = {
    "plain": lambda: parameter(),
    "half": lambda: parameter(dtype=torch.bfloat16),
    "gradient of another layout": lambda: parameter(grad=strided),
    "gradient in the parameter's memory": lambda: parameter(grad=lambda p: p.detach()),
    "gradient whose memory is negative": lambda: parameter(grad=lambda p: torch._neg_view(torch.randn(4, 3))),
    "no elements": lambda: parameter((0,)),
    "no dimensions": lambda: parameter(()),
    "moments": lambda: parameter(**moments(step=3)),
    "moments, another count": lambda: parameter(**moments(step=4)),
    "moments, a real count": lambda: parameter(**moments(step=3.0)),
    "moments, a count that is a tensor": lambda: parameter(**moments(step=torch.tensor(3.0))),
    "narrow moments": lambda: parameter(**moments(torch.bfloat16, step=3)),
    "a moment of another layout": lambda: parameter(**(moments(step=3) | {"exp_avg": torch.zeros(3, 4).t()})),
    "a moment of another shape": lambda: parameter(**(moments(step=3) | {"exp_avg": torch.zeros(4, 1)})),
    "flags": lambda: parameter(**moments(step=3, do_wd=False)),
    "a name": lambda: parameter(**moments(step=3, name="head")),
    "a state of another class": lambda: parameter(
        **(moments(step=3) | {"exp_avg": torch.zeros(4, 3).as_subclass(Tagged)})
    ),
    "a list": lambda: parameter(**moments(step=3, history=[1])),
}


def surveyed(kinds):
    found = [pair for kind in kinds for pair in several(KINDS[kind])]
    opt = optim.Adam([p for p, _ in found], lr=0.1)
    for p, state in found:
        if state:
            opt.state[p] = state
    return opt


def items_of(opt, monkeypatch, native):
    with monkeypatch.context() as patch:
        if not native:
            patch.setattr(leaf, "native", None)
        return opt.groups.items(Scaling(amp=False))


def test_items_are_those_that_python_makes(monkeypatch):
    opt = surveyed(KINDS)
    quick, slow = items_of(opt, monkeypatch, True), items_of(opt, monkeypatch, False)
    assert [item.where for item in quick] == [item.where for item in slow]
    for a, b in zip(quick, slow, strict=True):
        assert a.visible(("shape", "contiguous"), False) == b.visible(("shape", "contiguous"), False)
        torch.testing.assert_close(
            [a.param, a.grad, *(t for _, t in a.tensors())], [b.param, b.grad, *(t for _, t in b.tensors())]
        )


def test_what_is_alike_looks_the_same_and_is_laid_out(monkeypatch):
    found: dict[object, list[items.Item]] = {}
    for item in items_of(surveyed(KINDS), monkeypatch, True):
        if item.alike is not None:
            found.setdefault(item.alike, []).append(item)
    for same in found.values():
        assert len({item.visible((), False) for item in same}) == 1
        for item in same:
            tensors = [item.grad, *(t for _, t in item.tensors())]
            assert items.dense(item.param) and all(items.same_layout(t, item.param) for t in tensors)
            assert all(map(items.walkable, [item.param, *tensors]))
            assert not items.overlap(item.grad, item.param)


ORDINARY = (
    "plain",
    "half",
    "no elements",
    "no dimensions",
    "moments",
    "moments, a real count",
    "flags",
    "a name",
)


@pytest.mark.parametrize("kind", KINDS)
def test_which_kinds_are_ordinary(kind, monkeypatch):
    """The others are looked at one by one: nothing is said of them."""
    alike = {item.alike for item in items_of(surveyed([kind]), monkeypatch, True)}
    many = kind in (*ORDINARY, "moments, another count", "narrow moments")
    assert len(alike) == 1 and (alike == {None}) != many


def test_one_without_elements_is_like_no_other(monkeypatch):
    """It is stepped on a stand-in."""
    assert len({item.alike for item in items_of(surveyed(["plain", "no elements"]), monkeypatch, True)}) == 2


def test_a_parameter_without_a_gradient_is_no_item(monkeypatch):
    opt = surveyed(["plain"])
    opt.param_groups[0]["params"][1].grad = None
    assert [item.where for item in items_of(opt, monkeypatch, True)] == [(0, 0), (0, 2)]
