"""The table of optimizer classes: what is found in a package, and what a row says."""

import math
import os
import signal

import pytest
import torch
import torch_optimizer

from benchmarks import beside, classes
from benchmarks.classes import Row

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def haste(monkeypatch):
    monkeypatch.setattr(beside, "ROUNDS", 3)


class Failing(torch.optim.SGD):
    """It cannot be made."""

    def __init__(self, params):
        raise RuntimeError("no parameters are good enough")


class Dying(torch.optim.SGD):
    def step(self, closure=None):
        os.kill(os.getpid(), signal.SIGKILL)


def test_classes_are_found_by_their_own_names():
    found = [cls.__name__ for cls in classes.classes("torch.optim")]
    assert len(found) == len(set(found)) and {"AdamW", "Muon", "LBFGS", "SparseAdam"} <= set(found)
    assert "Optimizer" not in found and "NewCls" not in found
    assert {"Ranger", "Yogi"} <= {cls.__name__ for cls in classes.classes("torch_optimizer")}


def test_a_class_that_fuses_is_complete():
    row = classes.examine(torch.optim.Adagrad)
    assert row.verdict == "complete" and row.why == "" and row.launches > 0
    assert row.difference < 1e-6 and row.ratio > 0


class Inexact(torch.optim.Optimizer):
    """It takes the difference of two norms that are nearly the same."""

    def __init__(self, params, lr=1e-4):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    norm, state = p.norm(), self.state[p]
                    if not state:
                        state["before"] = norm.clone()
                    p.sub_(p.grad * (1 + 3e5 * (norm - state["before"]).abs()), alpha=group["lr"])
                    state["before"].copy_(norm)


def test_a_class_that_is_not_exact_itself_may_be_as_far_off(monkeypatch):
    row = classes.examine(Inexact)
    assert row.verdict == "complete" and row.difference > classes.ROUNDING and "float64" in row.why
    monkeypatch.setattr(classes, "_inexact", lambda *_: 0.0)
    assert classes.examine(Inexact).verdict == "differs"


@pytest.mark.filterwarnings("ignore:fusedopt. .* runs as it was written")
def test_a_class_that_does_not_fuse_says_where():
    row = classes.examine(torch_optimizer.SWATS)
    assert row.verdict == "eager" and row.why.startswith("swats.py:") and "Remedy" not in row.why
    assert row.difference == 0 and row.launches == 0


def test_a_class_that_cannot_be_made_or_dies_is_a_row():
    assert classes.examine(Failing) == Row(
        "Failing", "not run", "RuntimeError: no parameters are good enough"
    )
    row = classes.isolated(Dying)
    assert (row.verdict, row.why) == ("error", "its process died")


def test_differences():
    one = {"params": [torch.tensor([1.0, -4.0])], "step": 3}
    assert beside.difference(dict(beside.leaves(one)), dict(beside.leaves(one))) == 0
    for other, expected in [
        ({"params": [torch.tensor([1.0, -4.0])], "step": 4}, 0.25),
        ({"params": [torch.tensor([3.0, -4.0])], "step": 3}, 0.5),
        ({"params": [torch.tensor([1.0, -4.0])], "step": 3.0}, math.inf),
        ({"params": [torch.tensor([1.0, -4.0]).double()], "step": 3}, math.inf),
        ({"params": [torch.tensor([1.0, math.nan])], "step": 3}, math.inf),
    ]:
        found = beside.difference(dict(beside.leaves(one)), dict(beside.leaves(other)))
        assert found == pytest.approx(expected)


def test_the_table_counts_and_names_no_place_of_this_machine():
    rows = [
        Row("A", "complete", "", 1, 4.0, 1e-7),
        Row("B", "complete", "", 1, 2.0, 0.0),
        Row("C", "not run", "E: /home/x/site-packages/c.py | <f at 0x7f00>\nmore"),
    ]
    text = classes.table({"torch.optim": rows})
    assert "| all | 3 | 2 | 0 | 0 | 0 | 0 | 1 | 3.0 |" in text
    assert "| A | complete | 1 | 4.00 | 1.0e-07 |  |" in text
    assert "| C | not run | - | - | - | E: c.py \\| <f> more |" in text
