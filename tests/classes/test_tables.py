"""Numbers that all parameters have in common, and rows that are looked up by them: the memo of RAdam and its like.

Of all parameters of a step the first one computes what the others find in a list, at a place that is another in each
step. Kernels compute it for all of them; the list is written as the class does it.
"""

import copy
import math
import re

import pytest
import torch
import torch_optimizer
from test_fuse import alike, compared, leaves, rule, run

import fusedopt


def rectified(self, p, g, s):
    """RAdam as its authors published it, without its moments."""
    s["step"] = s.get("step", 0) + 1
    row = g["memo"][int(s["step"] % 4)]
    if s["step"] == row[0]:
        length, size = row[1], row[2]
    else:
        row[0] = s["step"]
        row[1] = length = 2 / (1 - 0.9) - 1 - 2 * s["step"] * 0.9 ** s["step"] / (1 - 0.9 ** s["step"])
        row[2] = size = g["lr"] * math.sqrt(length / (2 + length)) if length >= 5 else g["lr"]
    p.add_(p.grad if length >= 5 else p.grad.sign(), alpha=-size)


def by_the_groups_count(self, p, g, s):
    """The list is the optimizer's, and what picks from it is no state."""
    row = self.memo[g["step"] % 4]
    row[1] = 0.5 * g["lr"] + (0 if row[1] is None else row[1])
    p.add_(p.grad, alpha=-row[1] / g["step"])


def of_all(self, p, g, s):
    """No list: one parameter compares its number with another's."""
    s["step"] = s.get("step", 0) + 1
    first = self.state[self.param_groups[0]["params"][0]]
    p.add_(p.grad, alpha=-g["lr"] if s["step"] == first.get("step") else -2 * g["lr"])


def plainly(self, p, g, s):
    """By numbers that do not change, and all of it."""
    p.add_(p.grad, alpha=-g["lr"] * sum(row[1] for row in self.weights) * self.weights[1][0])


def memo(count=4):
    return [[None, None, None] for _ in range(count)]


def in_group(one, **more):
    return rule(one, __init__=lambda self, params: init(self, params, one), **more)


def init(self, params, one):
    super(type(self), self).__init__(params, memo=memo())
    self.memo, self.weights = memo(), [[1.0, 0.5], [0.25, 2.0]]


@pytest.mark.parametrize("one", [rectified, of_all, plainly], ids=lambda f: f.__name__)
def test_it_fuses_and_does_what_the_class_does(one):
    opt = compared(in_group(one), steps=14)
    assert not opt.explain().eager and opt.explain().launches == 1


def test_only_what_is_new_is_traced():
    """None in the rows, a branch on the way, numbers in the rows: then nothing is traced any more."""
    _, opt = run(in_group(rectified), steps=30)
    assert int(re.search(r"; (\d+) with it", str(opt.explain()))[1]) <= 4
    assert opt.param_groups[0]["memo"][30 % 4][0] == 30


def test_a_list_of_the_optimizer_is_looked_up_by_a_count_of_the_group():
    opt = compared(in_group(by_the_groups_count), steps=3)
    assert opt.explain().eager  # each parameter adds to it


@pytest.mark.filterwarnings("ignore:fusedopt. .* runs as it was written")
@pytest.mark.parametrize("one", [rectified, of_all], ids=lambda f: f.__name__)
def test_where_numbers_are_no_longer_the_same_the_class_steps(one):
    opt = compared(in_group(one), steps=14, missing=True)
    (eager,) = opt.explain().eager
    assert "Remedy: " in eager.reason


def loaded(opt):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def emptied(opt):
    opt.param_groups[0]["memo"] = memo()


def longer(opt):
    opt.param_groups[0]["memo"] = memo(5)


def wider(opt):
    for row in opt.param_groups[0]["memo"]:
        row.append(1.0)


def of_floats(opt):
    for row in opt.param_groups[0]["memo"]:
        row[0] = None if row[0] is None else float(row[0])


def ahead(opt):
    """The first parameter finds what it would compute, or something else."""
    opt.param_groups[0]["memo"][8 % 4][:] = [8, 7.0, 0.5]


def of_one(opt):
    opt.param_groups[0]["memo"] = [memo()[0]] * 4


@pytest.mark.parametrize(
    "poke", [loaded, emptied, longer, wider, of_floats, ahead, of_one], ids=lambda f: f.__name__
)
def test_what_is_changed_between_steps_counts(poke):
    opt = compared(in_group(rectified), steps=14, poke=poke)
    assert not opt.explain().eager


def counted_otherwise(opt):
    first, *_ = opt.param_groups[0]["params"]
    opt.state[first]["step"] += 1


def without_state(opt):
    del opt.state[opt.param_groups[0]["params"][0]]


@pytest.mark.filterwarnings("ignore:fusedopt. .* runs as it was written")
@pytest.mark.parametrize("poke", [counted_otherwise, without_state], ids=lambda f: f.__name__)
def test_a_number_that_is_no_longer_all_parameters_is_noticed(poke):
    compared(in_group(rectified), steps=14, poke=poke)


def at_two_places(self, p, g, s):
    s["step"] = s.get("step", 0) + 1
    g["memo"][s["step"] % 4][0] = g["memo"][(s["step"] + 1) % 4][1] = s["step"]
    p.add_(p.grad, alpha=-g["lr"])


def in_two_ways(self, p, g, s):
    s["step"] = s.get("step", 0) + 1
    g["memo"][s["step"] % 4][0] = s["step"]
    p.add_(p.grad, alpha=-g["lr"] * len([row for row in g["memo"] if row[0] is not None]))


def makes_it_longer(self, p, g, s):
    s["step"] = s.get("step", 0) + 1
    g["memo"][s["step"] % 4].append(1.0)
    p.add_(p.grad, alpha=-g["lr"])


def beyond_the_end(self, p, g, s):
    s["step"] = s.get("step", 0) + 1
    try:
        row = g["memo"][s["step"]]
    except IndexError:
        row = [1.0, 1.0, 1.0]
    p.add_(p.grad, alpha=-g["lr"] * (row[0] or 2.0))


@pytest.mark.filterwarnings("ignore:fusedopt. .* runs as it was written")
@pytest.mark.parametrize(
    "one", [at_two_places, in_two_ways, makes_it_longer, beyond_the_end], ids=lambda f: f.__name__
)
def test_what_is_more_than_one_row_of_numbers_is_the_classs_own_step(one):
    compared(in_group(one), steps=10)


def test_rows_that_are_found_elsewhere_too_are_the_classs_own_step():
    def shared(self, params):
        init(self, params, rectified)
        self.row = self.param_groups[0]["memo"][2]

    with pytest.warns(RuntimeWarning, match="are found elsewhere too"):
        compared(rule(rectified, __init__=shared), steps=12)


def test_groups_have_a_memo_in_common_or_one_each():
    """With other rates, and with other betas in published classes, the first one's numbers are what the others find."""

    def two(params, shared=True):
        opt = in_group(rectified)(params)
        more = torch.nn.Parameter(torch.ones(3))
        more.grad = torch.full((3,), 0.5)
        opt.add_param_group(
            dict(params=[more], lr=0.01, memo=opt.param_groups[0]["memo"] if shared else memo())
        )
        return opt

    for shared in (True, False):
        opt = compared(lambda params, shared=shared: two(params, shared), steps=12)
        assert not opt.explain().eager


@pytest.mark.filterwarnings("ignore:This overload of add")
@pytest.mark.parametrize("name", ["RAdam", "Ranger"])
def test_the_published_classes(name):
    def make(params):
        return getattr(torch_optimizer, name)(params, lr=0.01, weight_decay=0.1)

    found = []
    for fuse in (True, False):
        params, opt = run(make, steps=25, fuse=fuse)
        found.append((leaves(opt, params), opt))
    assert alike(found[0][0], found[1][0])
    assert not found[0][1].explain().eager
    fusedopt.unfuse(found[0][1]).step()
    found[1][1].step()
    assert alike(*(leaves(opt, opt.param_groups[0]["params"]) for _, opt in found))
