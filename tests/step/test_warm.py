"""The warm step: bitwise what the long way gives, whatever happens between steps, and no Python work per tensor."""

import copy
import gc
import math
import pickle
import random
import sys
import tracemalloc
import warnings
import weakref

import numpy as np
import pytest
import torch
from factories import parameters, params_of
from helpers import assert_same_bits, needs_extension
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fusedopt import average_grad, l2_reg, momentum_step, weight_decay
from fusedopt.extension import leaf
from fusedopt.optimizer.groups import ParamGroups
from fusedopt.step import buckets, items, transforms, verdicts
from fusedopt.step.engine import Engine
from fusedopt.table import TABLE
from fusedopt.trace.purity import VARIES, Verdict

SHAPES = [(4,), (3, 5), (2, 3, 2, 2), ()]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def give_gradients(params, seed):
    gen = torch.Generator().manual_seed(seed)
    for p in params:
        grad = torch.randn(p.shape, generator=gen).to(p.grad_dtype or p.dtype)
        p.grad = items.with_layout(grad, p) if p.dim() else grad


def adam(params, **hypers):
    """Adam in two groups, the second with its own learning rate."""
    groups = [{"params": params[: len(params) // 2]}, {"params": params[len(params) // 2 :], "lr": 0.03}]
    return fusedopt.Adam(groups, **{"lr": 0.1, "wd": 0.1, "eps": 1e-3} | hypers)


def is_warm(opt):
    """Whether the next step repeats a recorded one, as far as can be told before it."""
    return bool(opt.engine.bound)


def assert_same_state(a, b, where=""):
    """Parameters, state and hyperparameters of two optimizers: equal to the last bit, in one order, of one type."""
    assert len(a.param_groups) == len(b.param_groups)
    for g, h in zip(a.param_groups, b.param_groups, strict=True):
        assert {k: v for k, v in g.items() if k != "params"} == {
            k: v for k, v in h.items() if k != "params"
        }, where
    for i, (p, q) in enumerate(zip(params_of(a), params_of(b), strict=True)):
        assert p.stride() == q.stride(), where
        assert_same_bits(p.detach(), q.detach())
        s, t = a.state.get(p, {}), b.state.get(q, {})
        assert list(s) == list(t), f"{where}: parameter {i}"
        for key in s:
            if isinstance(s[key], torch.Tensor):
                assert s[key].stride() == t[key].stride(), f"{where}: {key}"
                assert_same_bits(s[key], t[key])
            else:
                same = type(s[key]) is type(t[key]) and s[key] == t[key]
                assert same, f"{where}: {key} of parameter {i}: {s[key]!r}, {t[key]!r}"


@pytest.fixture
def long_way(monkeypatch):
    """The optimizers that looked at every tensor, one entry per such step."""
    seen = []
    original = ParamGroups.items

    def spy(self, *args, **kwargs):
        seen.append(self._held)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ParamGroups, "items", spy)
    return seen


class Twins:
    """Two optimizers alike from the start: ``a`` steps as it likes, ``b`` always goes the long way."""

    def __init__(self, make=adam, shapes=SHAPES, dtype=torch.float32):
        self.a, self.b = (make(parameters(shapes, dtype)) for _ in range(2))
        self.t = 0

    def __iter__(self):
        return iter((self.a, self.b))

    def step(self, gradients=True, **step):
        """One step of both, from the same gradients."""
        self.t += 1
        for opt in self:
            if gradients:
                give_gradients([p for p in params_of(opt) if p.requires_grad], self.t)
        self.b.engine.binds = False
        for opt in self:
            opt.step(**step)
        self.check()

    def check(self):
        assert_same_state(self.a, self.b, f"step {self.t}")

    def warm_up(self, steps=3):
        for _ in range(steps):
            self.step()
        assert is_warm(self.a)
        return self

    def both(self, change):
        """Apply a change to each of them: ``change(opt, params)``."""
        return [change(opt, params_of(opt)) for opt in self]


# --
# A step like the last one


ROWS = [
    pytest.param(row, dtype, id=f"{row.face}-{row.name}-{str(dtype)[6:]}")
    for row in TABLE
    for dtype in DTYPES
]


@pytest.mark.filterwarnings("ignore:fusedopt. most of the last")  # said of those that are told to be slow
@needs_extension
@pytest.mark.parametrize(("row", "dtype"), ROWS)
def test_a_warm_step_is_bitwise_the_long_one(row, dtype, long_way, monkeypatch):
    """Several groups, flags of their own, step counts of their own, hyperparameters that change with every step.

    Against the long way with replay, and against the long way that runs the callbacks on every step.
    """
    shapes = [(7,), (3, 5), (130,), (2, 3), (), (4, 1), (0, 3)]

    def make(params):
        groups = [{"params": params[:3]}, {"params": params[3:5]}, {"params": params[5:]}]
        opt = row.factory(groups, **row.variants[0].kwargs)
        opt.state[params[1]]["do_wd"] = False
        return opt

    twins = Twins(make, shapes, dtype)
    eager = make(parameters(shapes, dtype))
    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "examine", lambda callback: Verdict(VARIES))
        assert eager.engine
    warm_steps = 0
    steps = 16
    for t in range(steps):
        for opt in (*twins, eager):
            for g, h in enumerate(opt.hypers):
                h["lr"] = 0.01 * (1 + g) * (1 + 0.5 * math.sin(t))
            if t == 0:  # one parameter starts later and so has its own count from then on
                params_of(opt)[3].requires_grad_(False)
            if t == 2:
                params_of(opt)[3].requires_grad_(True)
        give_gradients([p for p in params_of(eager) if p.requires_grad], t + 1)
        long_way.clear()
        twins.step()
        warm_steps += twins.a not in long_way
        assert twins.b in long_way
        eager.step()
        assert eager in long_way
        assert_same_state(twins.a, eager, f"step {t + 1} with callbacks")
    # A step after another structure is long: Lookahead's every sixth one, and for two counts, RAdam's sixth.
    expected = {"Lookahead": 4, "ranger": 3, "RAdam": steps - 8}.get(row.name, steps - 4)
    assert warm_steps >= expected, f"only {warm_steps} of {steps} steps were warm"
    assert all(s.get("step", t + 1) <= t + 1 for s in twins.a.state.values())


@needs_extension
def test_a_warm_step_sees_nothing_but_tables(monkeypatch):
    """On a warm step neither items nor traces nor torch operations are made."""
    twins = Twins().warm_up()

    def refuse(*args, **kwargs):
        raise AssertionError("a long step")

    class NoOps(TorchDispatchMode):
        def __torch_dispatch__(self, func, *args, **kwargs):
            raise AssertionError(func)

    give_gradients(params_of(twins.a), 9)
    give_gradients(params_of(twins.b), 9)
    twins.b.step()
    monkeypatch.setattr(ParamGroups, "items", refuse)
    monkeypatch.setattr(Engine, "step", refuse)
    monkeypatch.setattr(buckets, "trace", refuse)
    monkeypatch.setattr(transforms, "active", lambda: False)  # the mode is here to watch
    with NoOps():
        twins.a.step()
    twins.check()


@needs_extension
def test_mutation_a_warm_step_that_skips_its_scalars_is_noticed(monkeypatch):
    program = leaf.native.ScalarProgram
    monkeypatch.setattr(
        leaf.native, "ScalarProgram", lambda code, slots, numbers, guards: program(code, [], numbers, guards)
    )
    with pytest.raises(AssertionError):
        Twins().warm_up()


@pytest.fixture
def without_extension(monkeypatch):
    """As installed without a compiler."""
    monkeypatch.setattr(leaf, "native", None)
    for name in ("write_pointers", "run_cpu", "bump_versions"):
        monkeypatch.setattr(leaf, name, getattr(leaf.python, name))


def test_without_the_extension_every_step_goes_the_long_way_and_is_the_same(without_extension, long_way):
    twins = Twins()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaf, "native", None)
        for t in range(6):
            twins.a.set_hyper("lr", 0.1 + 0.01 * t)
            twins.b.set_hyper("lr", 0.1 + 0.01 * t)
            long_way.clear()
            twins.step()
            assert twins.a in long_way and twins.b in long_way
            assert not is_warm(twins.a)
    versions = [p._version for p in params_of(twins.a)]
    twins.step()
    assert [p._version for p in params_of(twins.a)] == [v + 1 for v in versions]


@needs_extension
def test_with_and_without_the_extension_the_results_are_the_same_bits(monkeypatch):
    twins = Twins()
    for _ in range(5):
        give_gradients(params_of(twins.a), twins.t)
        give_gradients(params_of(twins.b), twins.t)
        twins.t += 1
        twins.a.step()
        with monkeypatch.context() as patch:
            patch.setattr(leaf, "native", None)
            for name in ("write_pointers", "run_cpu", "bump_versions"):
                patch.setattr(leaf, name, getattr(leaf.python, name))
            twins.b.step()
        twins.check()


# --
# What changes between steps. Each of these is done to both; the first must notice.
# LONG: the next step has to look at every tensor. WARM: it must not.

LONG, WARM = True, False
CHANGES = {}


def change(noticed, name=None):
    def register(function):
        CHANGES[name or function.__name__] = function, noticed
        return function

    return register


@change(WARM)
def nothing(opt, params):
    pass


@change(WARM)
def new_gradient_tensors(opt, params):
    give_gradients(params, 77)


@change(WARM)
def gradients_in_place(opt, params):
    for p in params:
        p.grad.mul_(-0.5)


@change(WARM)
def gradients_in_a_flat_buffer(opt, params):
    """As with DDP: views at offsets that suit no vector."""
    flat = torch.linspace(-1, 1, 100)
    for i, p in enumerate(params):
        p.grad = flat[i * 24 + 1 :][: p.numel()].view_as(p)


@change(WARM)
def parameters_in_place(opt, params):
    with torch.no_grad():
        for p in params:
            p.mul_(0.5)


@change(WARM)
def state_in_place(opt, params):
    opt.state[params[1]]["exp_avg_sq"].mul_(2.0)


@change(WARM)
def frozen_with_a_gradient(opt, params):
    params[0].requires_grad_(False)


@change(WARM)
def learning_rate(opt, params):
    opt.set_hyper("lr", [0.5, 0.25])


@change(WARM)
def learning_rate_of_a_slice(opt, params):
    opt.set_hyper("lr", slice(1e-3, 1e-1))


@change(WARM)
def learning_rate_in_the_group(opt, params):
    opt.param_groups[1]["lr"] = 0.7


@change(WARM)
def several_hypers(opt, params):
    opt.set_hypers(mom=0.8, sqr_mom=0.95, eps=1e-2, wd=0.3)


@change(WARM)
def tuple_of_betas_replaced(opt, params):
    opt.param_groups[0]["betas"] = (0.5, 0.6)


@change(WARM)
def groups_list_replaced_by_an_equal_one(opt, params):
    opt.param_groups = list(opt.param_groups)


@change(WARM)
def params_list_replaced_by_an_equal_one(opt, params):
    opt.param_groups[0]["params"] = list(opt.param_groups[0]["params"])


@change(WARM)
def threads(opt, params):
    torch.set_num_threads(1)


@change(WARM)
def gradient_missing(opt, params):
    params[1].grad = None


@change(LONG)
def all_gradients_missing(opt, params):
    opt.zero_grad()


@change(LONG)
def gradient_of_another_dtype(opt, params):
    params[1].grad = None
    params[1].grad_dtype = torch.float64
    params[1].grad = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(3, 5)


@change(WARM)
def gradient_transposed(opt, params):
    params[1].grad = torch.linspace(-1, 1, 15).reshape(5, 3).t()


@change(LONG)
def gradient_expanded(opt, params):
    params[1].grad = torch.linspace(-1, 1, 3)[:, None].expand(3, 5)


@change(WARM)
def gradient_from_a_larger_tensor(opt, params):
    params[1].grad = torch.linspace(-1, 1, 60).reshape(6, 10)[::2, ::2]


@change(WARM)
def gradient_whose_memory_is_negative(opt, params):
    params[1].grad = torch._neg_view(torch.linspace(-1, 1, 15).reshape(3, 5))


@change(WARM)
def parameter_data_replaced(opt, params):
    params[1].data = params[1].data * 2


@change(LONG)
def parameter_transposed(opt, params):
    params[1].data = params[1].data.t().contiguous().t()


@change(LONG)
def parameter_transposed_in_place(opt, params):
    p = params[1]
    p.data = p.data.as_strided((3, 5), (1, 3))


@change(LONG)
def parameter_channels_last(opt, params):
    params[2].data = params[2].data.to(memory_format=torch.channels_last)


@change(LONG)
def parameter_of_another_dtype(opt, params):
    p = params[1]
    grad, p.grad = p.grad, None
    p.data = p.data.double()
    p.grad = grad.double()


@change(LONG)
def parameter_in_half(opt, params):
    p = params[1]
    grad, p.grad = p.grad, None
    p.data = p.data.to(torch.bfloat16)
    p.grad = grad.to(torch.bfloat16)


@change(LONG)
def parameter_part_of_a_larger_tensor(opt, params):
    p = params[1]
    larger = torch.zeros(3, 10)
    larger[:, ::2] = p.data
    p.data = larger[:, ::2]


@change(LONG)
def parameter_of_another_shape(opt, params):
    p = params[1]
    grad, p.grad = p.grad, None
    p.data = p.data.reshape(5, 3)
    p.grad = grad.reshape(5, 3)
    opt.state[p].clear()


@change(LONG)
def learning_rate_as_an_int(opt, params):
    opt.param_groups[0]["lr"] = 1


@change(WARM)
def learning_rate_as_a_tensor(opt, params):
    opt.param_groups[0]["lr"] = torch.tensor(0.25)


@change(WARM)
def learning_rate_of_numpy(opt, params):
    opt.param_groups[0]["lr"] = np.float64(0.25)


@change(LONG)
def betas_as_a_list(opt, params):
    opt.param_groups[0]["betas"] = [0.5, 0.6]


@change(LONG)
def betas_with_an_int(opt, params):
    opt.param_groups[0]["betas"] = (0, 0.6)


@change(LONG)
def betas_with_a_third(opt, params):
    opt.param_groups[0]["betas"] = (0.5, 0.6, 0.7)


@change(LONG)
def decay_switched_off(opt, params):
    opt.set_hyper("wd", 0.0)


@change(LONG)
def a_new_key(opt, params):
    opt.param_groups[0]["initial_lr"] = 0.1


@change(WARM)
def keys_in_another_order(opt, params):
    group = opt.param_groups[0]
    group["lr"] = group.pop("lr")


@change(LONG)
def a_list_of_milestones(opt, params):
    opt.param_groups[0]["milestones"] = [10, 20]


@change(LONG)
def a_dict_of_notes(opt, params):
    opt.param_groups[0]["notes"] = {"layer": 3}


@change(LONG)
def a_flag_in_the_group(opt, params):
    opt.param_groups[0]["maximize"] = True


@change(LONG)
def a_flag_as_a_number(opt, params):
    opt.param_groups[0]["maximize"] = 1


@change(LONG)
def an_alias_next_to_the_key(opt, params):
    opt.param_groups[0]["wd"] = 0.4


@change(LONG)
def no_decay_for_one(opt, params):
    opt.state[params[1]]["do_wd"] = False


@change(LONG)
def force_train_for_one(opt, params):
    opt.state[params[1]]["force_train"] = True


@change(LONG)
def notes_in_the_state(opt, params):
    opt.state[params[1]]["notes"] = {"layer": 3}


@change(WARM)
def state_tensor_replaced(opt, params):
    opt.state[params[1]]["exp_avg_sq"] = torch.full((3, 5), 0.5)


@change(WARM)
def state_tensor_data_replaced(opt, params):
    opt.state[params[1]]["exp_avg_sq"].data = torch.full((3, 5), 0.5)


@change(LONG)
def state_tensor_of_another_dtype(opt, params):
    state = opt.state[params[1]]
    state["exp_avg_sq"].data = state["exp_avg_sq"].double()


@change(LONG)
def state_tensor_transposed_in_place(opt, params):
    state = opt.state[params[1]]
    state["exp_avg_sq"].data = state["exp_avg_sq"].data.as_strided((3, 5), (1, 3))


@change(LONG)
def state_entry_added(opt, params):
    opt.state[params[1]]["mine"] = 3.0


@change(LONG)
def state_tensor_added(opt, params):
    opt.state[params[1]]["mine"] = torch.zeros(3, 5)


@change(LONG)
def state_entry_removed(opt, params):
    del opt.state[params[1]]["exp_avg_sq"]


@change(LONG)
def state_entry_renamed(opt, params):
    state = opt.state[params[1]]
    state["other"] = state.pop("exp_avg_sq")


@change(LONG)
def state_of_one_cleared(opt, params):
    opt.state[params[1]].clear()


@change(WARM)
def step_set_by_hand(opt, params):
    opt.state[params[1]]["step"] = 40


@change(LONG)
def step_set_to_a_float(opt, params):
    opt.state[params[1]]["step"] = float(opt.state[params[1]]["step"])


@change(LONG)
def step_set_to_a_tensor(opt, params):
    opt.state[params[1]]["step"] = torch.tensor(40.0)


@change(WARM)
def state_dict_of_one_replaced(opt, params):
    opt.state[params[1]] = {k: v for k, v in opt.state[params[1]].items()}


@change(LONG)
def state_dict_of_one_emptied(opt, params):
    opt.state[params[1]] = {}


@change(LONG)
def state_popped(opt, params):
    opt.state.pop(params[1])


@change(LONG)
def state_deleted(opt, params):
    del opt.state[params[1]]


@change(LONG)
def state_updated(opt, params):
    opt.state.update({params[1]: {}})


@change(LONG)
def state_merged(opt, params):
    opt.state |= {params[1]: {}}


@change(LONG)
def state_emptied(opt, params):
    opt.state.clear()


@change(WARM)
def state_replaced(opt, params):
    opt.state = {p: dict(s) for p, s in opt.state.items()}


@change(LONG)
def state_forgotten(opt, params):
    opt.clear_state()


@change(LONG)
def state_dict_loaded(opt, params):
    opt.load_state_dict(opt.state_dict())


@change(LONG)
def state_dict_loaded_from_a_file(opt, params):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


@change(WARM)
def state_dict_taken(opt, params):
    opt.state_dict()


@change(LONG)
def group_added(opt, params):
    opt.add_param_group({"params": parameters([(2, 2)], seed=5), "lr": 0.2})
    give_gradients(params_of(opt)[-1:], 6)


@change(LONG)
def group_removed(opt, params):
    opt.param_groups.pop()


@change(LONG)
def groups_swapped(opt, params):
    opt.param_groups.reverse()


@change(WARM)
def group_replaced(opt, params):
    opt.param_groups[0] = dict(opt.param_groups[0])


@change(LONG)
def parameter_appended(opt, params):
    new = parameters([(2, 2)], seed=5)
    give_gradients(new, 6)
    opt.param_groups[0]["params"] += new


@change(LONG)
def parameter_removed(opt, params):
    opt.param_groups[0]["params"].pop()


@change(LONG)
def parameters_reversed(opt, params):
    opt.param_groups[0]["params"].reverse()


@change(LONG)
def parameter_replaced(opt, params):
    new = parameters([(3, 5)], seed=5)
    give_gradients(new, 6)
    opt.param_groups[0]["params"][1:2] = new


@change(LONG)
def param_lists_assigned(opt, params):
    opt.param_lists = [params[2:], params[:2]]


@change(WARM)
def param_lists_assigned_as_they_are(opt, params):
    opt.param_lists = opt.param_lists


@change(LONG)
def callbacks_replaced(opt, params):
    opt.cbs = [l2_reg if cb is weight_decay else cb for cb in opt.cbs]


@change(LONG)
def callback_replaced_in_place(opt, params):
    opt.cbs[0] = l2_reg


@change(LONG)
def callback_appended(opt, params):
    opt.cbs.append(fusedopt.sgd_step)


@change(WARM)
def callbacks_as_they_are(opt, params):
    opt.cbs = list(opt.cbs)


@change(LONG)
def copied_on_write(opt, params):
    opt.kept = torch._lazy_clone(params[1].detach())


@change(WARM)
def explained(opt, params):
    str(opt.explain())


@change(WARM)
def a_copy_made_and_stepped(opt, params):
    other = copy.deepcopy(opt)
    for p, q in zip(params_of(other), params, strict=True):
        p.grad = q.grad * 3
    for _ in range(3):
        other.step()


@needs_extension
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_steps_is_followed(name, long_way):
    function, noticed = CHANGES[name]
    twins = Twins().warm_up()
    for opt in twins:
        give_gradients(params_of(opt), 50)
    twins.both(function)
    long_way.clear()
    twins.step(gradients=False)
    assert (twins.a in long_way) == noticed
    for _ in range(3):
        twins.step(gradients=not name.startswith("gradient_"))
    # And again: what one change leaves behind must not hide the next.
    for opt in twins:
        opt.set_hyper("lr", 0.01)
    twins.step()


@needs_extension
def test_a_copy_that_shares_memory_until_written_to_is_left_alone():
    twins = Twins().warm_up()
    p, state = params_of(twins.a)[1], twins.a.state[params_of(twins.a)[1]]
    kept = [torch._lazy_clone(t.detach()) for t in (p, state["exp_avg"])]
    expected = [t.clone() for t in kept]
    for _ in range(3):
        twins.step()
    assert all(map(torch.equal, kept, expected))


@needs_extension
@pytest.mark.filterwarnings("ignore:fusedopt:RuntimeWarning")
def test_state_that_becomes_one_number_is_noticed(long_way):
    twins = Twins(
        lambda params: fusedopt.Optimizer(params, [average_grad, momentum_step], lr=0.1, mom=0.9)
    ).warm_up()
    for opt in twins:
        state = opt.state[params_of(opt)[1]]
        state["grad_avg"].data = state["grad_avg"].data.view(-1)[0]
    long_way.clear()
    with pytest.raises(RuntimeError):
        twins.step()
    assert long_way == [twins.a], "and it is as little use to the callbacks"


@needs_extension
@pytest.mark.filterwarnings("ignore:fusedopt. most of the last")
def test_memory_that_is_used_again_is_told_apart(long_way):
    """New tensors may lie where old ones did: the objects themselves, and their elements."""
    twins = Twins().warm_up()
    for t in range(20):
        for opt in twins:
            p = params_of(opt)[1]
            state, opt.state[p]["exp_avg_sq"] = opt.state[p]["exp_avg_sq"], None
            del state
            opt.state[p]["exp_avg_sq"] = torch.full((3, 5), 0.1 * t)
            give_gradients(params_of(opt), t)
        twins.step(gradients=False)
        for opt in twins:
            group = opt.param_groups[0]
            opt.state.pop(group["params"].pop())
            group["params"] += parameters([(3, 5)], seed=t)
        twins.step()


@needs_extension
def test_a_parameter_with_a_gradient_of_its_own_is_never_repeated(long_way):
    """Subclasses may put another tensor in place of ``grad``; the C++ side would see torch's."""

    class MainGrad(nn.Parameter):
        @property
        def grad(self):
            return self.main_grad

    p = MainGrad(torch.ones(3))
    super(MainGrad, type(p)).grad.__set__(p, torch.full((3,), 100.0))
    opt = fusedopt.SGD([p], lr=0.5)
    for t in range(4):
        p.main_grad = torch.full((3,), float(t))
        opt.step()
    assert p.tolist() == [1 - 0.5 * (0 + 1 + 2 + 3)] * 3
    assert len(long_way) == 4


@needs_extension
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_of_one_by_one_convolutions_are_warm(layout, long_way):
    """Their strides differ from the parameter's in dimensions of size one, where strides mean nothing."""
    p = nn.Parameter(torch.randn(4, 3, 1, 1).to(memory_format=layout))
    opt = fusedopt.Adam([p], lr=0.1)
    for t in range(5):
        grad = torch.randn(4, 3, 1, 1)
        p.grad = grad.as_strided((4, 3, 1, 1), (3, 1, 3, 3) if t % 2 else (3, 1, 1, 1))
        opt.step()
    assert len(long_way) == 2


@needs_extension
@pytest.mark.parametrize("bad", [math.nan, -0.1, torch.tensor(math.nan), np.float64(-1.0)], ids=str)
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_an_invalid_number_is_refused_on_a_warm_step_and_changes_nothing(bad, name):
    twins = Twins().warm_up()
    before = copy.deepcopy(twins.a.state_dict()), [p.detach().clone() for p in params_of(twins.a)]
    good = twins.a.param_groups[1][name]
    for _ in range(2):
        twins.a.param_groups[1][name] = bad
        with pytest.raises(ValueError, match="invalid"):
            twins.a.step()
        assert all(map(torch.equal, params_of(twins.a), before[1]))
        for i, state in twins.a.state_dict()["state"].items():
            assert all(torch.equal(v, before[0]["state"][i][k]) for k, v in state.items())
    twins.a.param_groups[1][name] = good
    for _ in range(3):
        twins.step()


@needs_extension
def test_a_sparse_gradient_is_refused_on_a_warm_step_and_changes_nothing():
    twins = Twins().warm_up()
    p = params_of(twins.a)[1]
    good, before = p.grad, p.detach().clone()
    p.grad = torch.ones(3, 5).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        twins.a.step()
    assert torch.equal(p, before)
    p.grad = good
    for _ in range(3):
        twins.step()


@needs_extension
def test_a_missing_gradient_that_comes_back(long_way):
    twins = Twins().warm_up()
    for present in (False, False, False, True, True, True, False, True):
        for opt in twins:
            params = params_of(opt)
            give_gradients(params, 60 + twins.t)
            if not present:
                params[1].grad = None
        long_way.clear()
        twins.step(gradients=False)
    assert twins.a.state[params_of(twins.a)[1]]["step"] == 3 + 4
    assert twins.a.state[params_of(twins.a)[0]]["step"] == 3 + 8


@needs_extension
def test_flags_of_torchs_face_are_followed():
    def make(params):
        return fusedopt.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)

    twins = Twins(make).warm_up()
    for flags in (
        dict(nesterov=True),
        dict(maximize=True),
        dict(nesterov=False),
        dict(maximize=False),
        dict(momentum=0),
    ):
        for opt in twins:
            opt.param_groups[0].update(flags)
        for _ in range(3):
            twins.step()


@needs_extension
def test_hyperparameters_in_tuples_and_lists_are_followed(long_way):
    def weighted(p, lr, weights, **kwargs):
        total = 0.0
        for w in weights:
            total = total + w
        p.data.add_(p.grad.data, alpha=-lr * total)

    twins = Twins(lambda params: fusedopt.Optimizer(params, weighted, lr=0.1, weights=(1.0,)))
    shared = [1.0, 2.0]
    values = [(1.0,)] * 3 + [
        (2.0,),
        (1.0, 2.0),
        (3.0, 2.0),
        (),
        (1.0,),
        [1.0],
        shared,
        shared,
        [],
        [1],
        (2, 3.0),
    ]
    for i, value in enumerate(values):
        for opt in twins:
            opt.param_groups[0]["weights"] = value
        shared[0] = float(i)
        twins.step()
        twins.step()
    shared.append(5.0)
    for opt in twins:
        opt.param_groups[0]["weights"] = shared
    twins.step(), twins.step()
    shared.append(6.0)
    twins.step()
    long_way.clear()
    shared[0] = 7.0
    twins.step()
    assert twins.a not in long_way, "numbers in a list are read on every step"


@needs_extension
def test_every_setter_of_state_counts():
    """A dict that is replaced without being noticed would be stepped no more."""
    opt = adam(parameters(SHAPES))
    p = params_of(opt)[0]
    ways = [
        lambda s: s.__setitem__(p, {}),
        lambda s: s.__delitem__(p),
        lambda s: s.setdefault(p, {}),
        lambda s: s.update({p: {}}),
        lambda s: s.pop(p),
        lambda s: s[p],
        lambda s: s.popitem(),
        lambda s: s.__ior__({p: {}}),
        lambda s: s.clear(),
    ]
    for way in ways:
        before = opt.state.version
        way(opt.state)
        assert opt.state.version > before


# --
# Copies


@needs_extension
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_warm_optimizer_is_on_its_own(duplicate, scheduled):
    twins = Twins()
    if scheduled:
        for opt in twins:
            opt.scheduler = LambdaLR(opt, lambda t: 1.0)
    twins.warm_up()
    other = duplicate(twins.a)
    assert not is_warm(other)
    before = [p.detach().clone() for p in params_of(twins.a)]
    for t in range(4):
        give_gradients(params_of(other), t)
        other.step()
    assert all(map(torch.equal, params_of(twins.a), before))
    assert {s["step"] for s in other.state.values()} == {7}
    for _ in range(2):
        twins.step()


@needs_extension
def test_two_optimizers_with_the_same_callbacks_do_not_mix():
    first, second = Twins().warm_up(), Twins(shapes=[(6,), (2, 2)]).warm_up()
    for t in range(5):
        for twins in (first, second):
            for opt in twins:
                opt.set_hyper("lr", 0.01 * (t + 1))
            twins.step()


# --
# Hooks, closures, schedulers, profilers, compilers


@needs_extension
def test_hooks_added_to_a_warm_optimizer_fire_once_per_step_and_in_order(long_way):
    twins = Twins().warm_up()
    log = []
    opt = twins.a
    handles = [
        opt.register_step_pre_hook(lambda *args: log.append("pre")),
        opt.register_step_post_hook(lambda *args: log.append("post")),
        register_optimizer_step_pre_hook(lambda o, *args: log.append("global pre") if o is opt else None),
        register_optimizer_step_post_hook(lambda o, *args: log.append("global post") if o is opt else None),
    ]
    try:
        for n in range(1, 4):
            long_way.clear()
            twins.step()
            assert opt not in long_way, "hooks alone are no reason to look at every tensor"
            assert log == ["global pre", "pre", "post", "global post"] * n
    finally:
        for handle in handles:
            handle.remove()
    twins.step()
    assert len(log) == 12


@needs_extension
def test_a_hook_may_change_what_the_step_takes():
    twins = Twins().warm_up()
    for opt in twins:
        opt.register_step_pre_hook(lambda o, args, kwargs: [p.grad.mul_(2) for p in params_of(o)] and None)
    for _ in range(3):
        twins.step()


@needs_extension
def test_a_closure_is_called_once_and_its_changes_are_seen(long_way):
    twins = Twins().warm_up()
    calls = []

    def closure_of(opt):
        def closure():
            assert torch.is_grad_enabled()
            calls.append(opt)
            params = params_of(opt)
            opt.zero_grad()
            loss = sum((p**2).sum() for p in params)
            loss.backward()
            opt.set_hyper("lr", 0.01)
            return loss

        return closure

    for _ in range(3):
        twins.b.engine.binds = False
        before = len(calls)
        losses = [opt.step(closure_of(opt)) for opt in twins]
        assert calls[before:] == [twins.a, twins.b]
        assert torch.equal(*losses)
        twins.check()
    assert long_way[-2:] == [twins.b, twins.b]


@needs_extension
def test_a_profiled_step_is_named_and_stays_warm(long_way):
    twins = Twins().warm_up()
    for opt in twins:
        give_gradients(params_of(opt), 5)
    long_way.clear()
    with torch.profiler.profile() as profile:
        twins.a.step()
    assert not long_way
    names = [event.key for event in profile.key_averages()]
    assert names.count("Optimizer.step#Optimizer.step") == 1, names
    twins.b.step()
    twins.check()


SCHEDULERS = {
    "StepLR": lambda opt: StepLR(opt, step_size=2, gamma=0.5),
    "OneCycleLR": lambda opt: OneCycleLR(opt, max_lr=[0.1, 0.2], total_steps=40),
    "LambdaLR": lambda opt: LambdaLR(opt, lambda t: 1.0 / (1 + t)),
}


@pytest.mark.parametrize(
    "extension", [pytest.param(True, marks=needs_extension), False], ids=["warm", "long"]
)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_patch_step_and_drive_it(name, extension, request, long_way):
    if not extension:
        request.getfixturevalue("without_extension")
    twins = Twins()
    schedulers = [SCHEDULERS[name](opt) for opt in twins]
    lrs = []
    for _ in range(12):
        long_way.clear()
        twins.step()
        for scheduler in schedulers:
            scheduler.step()  # with warnings as errors: it sees that step was called
        lrs.append(twins.a.param_groups[0]["lr"])
    assert len(set(lrs)) > 4
    assert (twins.a in long_way) != extension


@needs_extension
def test_a_scheduler_attached_to_a_warm_optimizer():
    twins = Twins().warm_up()
    schedulers = [OneCycleLR(opt, max_lr=0.1, total_steps=20) for opt in twins]
    for _ in range(5):
        twins.step()
        for scheduler in schedulers:
            scheduler.step()
    assert is_warm(twins.a)


@needs_extension
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_compiled_step_is_the_eager_one():
    twins = Twins().warm_up()
    step = torch.compile(twins.a.step, backend="eager")
    for t in range(3):
        for opt in twins:
            give_gradients(params_of(opt), t)
            opt.set_hyper("lr", 0.1 / (1 + t))
        step()
        twins.b.engine.binds = False
        twins.b.step()
        twins.check()


@needs_extension
def test_inference_tensors_are_stepped():
    """They have no version counter, and torch refuses to write to them outside inference mode; a kernel does not."""
    with torch.inference_mode():
        p = nn.Parameter(torch.ones(5), requires_grad=False)
        p.grad = torch.ones(5)
        opt = fusedopt.Adam([p], lr=0.1)
        for _ in range(4):
            opt.step()
    assert is_warm(opt)
    q = nn.Parameter(torch.ones(5))
    other = fusedopt.Adam([q], lr=0.1)
    for _ in range(4):
        q.grad = torch.ones(5)
        other.step()
    assert torch.equal(p, q)


# --
# Many groups, one launch


def one_each(shape, n, **kwargs):
    """``n`` groups of one tensor with learning rates of their own, and as many optimizers of one group."""
    together, alone = parameters([shape] * n), parameters([shape] * n)
    lrs = [0.01 + 1e-4 * i for i in range(n)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(together, lrs, strict=True)]
    opt = fusedopt.optim.AdamW(groups, **kwargs)
    others = [fusedopt.optim.AdamW([p], lr=lr, **kwargs) for p, lr in zip(alone, lrs, strict=True)]
    return opt, together, others, alone


def assert_all_same(together, alone):
    for p, q in zip(together, alone, strict=True):
        assert_same_bits(p.detach(), q.detach())


def test_465_groups_of_one_tensor_are_one_launch():
    opt, together, others, alone = one_each((4, 4), 465)
    copies = parameters([(4, 4)] * 465)
    torchs = torch.optim.AdamW([{"params": [p]} for p in copies])
    for t in range(5):
        factor = 1 + 0.3 * math.sin(t)
        for group, other, its in zip(opt.param_groups, others, torchs.param_groups, strict=True):
            other.param_groups[0]["lr"] = its["lr"] = group["lr"] = group["lr"] * factor
        for params in (together, alone, copies):
            give_gradients(params, t)
        opt.step()
        for other in others:
            other.step()
        torchs.step()
        assert opt.explain().launches == 1
        assert opt.explain().stages[0].tensors == 465
        assert_all_same(together, alone)
    assert is_warm(opt) == (leaf.native is not None)
    for p, q in zip(together, copies, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_experts_that_skip_steps_stay_in_one_launch():
    """A random subset has gradients: each expert counts its own steps, and all that step do so together."""
    rng = random.Random(0)
    opt, together, others, alone = one_each((5,), 40)
    counts = [0] * 40
    for t in range(12):
        chosen = set(rng.sample(range(40), 12 if t % 3 else 40))
        for params in (together, alone):
            give_gradients(params, t)
            for i in set(range(40)) - chosen:
                params[i].grad = None
        opt.step()
        for i in chosen:
            others[i].step()
            counts[i] += 1
        found = opt.explain()
        assert (found.launches, found.stages[0].tensors) == (1, len(chosen))
        assert_all_same(together, alone)
    assert [opt.state[p]["step"] if counts[i] else 0 for i, p in enumerate(together)] == counts
    assert len(set(counts)) > 3
    assert len(opt.explain().compiled) == 1


def test_experts_of_one_group_with_counts_of_their_own_are_warm_and_one_launch(long_way):
    params, alone = parameters([(5,)] * 30), parameters([(5,)] * 30)
    opt = fusedopt.optim.AdamW(params, lr=0.01)
    others = [fusedopt.optim.AdamW([p], lr=0.01) for p in alone]
    for t in range(20):
        for given in (params, alone):
            give_gradients(given, t)
            for p in given[min(30, 5 * (t + 1)) :]:
                p.grad = None
        long_way.clear()
        opt.step()
        went_long = opt in long_way
        for other, p in zip(others, alone, strict=True):
            if p.grad is not None:
                other.step()
        assert opt.explain().launches == 1
        assert_all_same(params, alone)
    assert sorted({s["step"] for s in opt.state.values()}) == [15, 16, 17, 18, 19, 20]
    assert went_long == (leaf.native is None)


def test_layers_frozen_and_thawed_stay_in_one_launch():
    opt, together, others, alone = one_each((5,), 6)
    for frozen in (0, 0, 3, 3, 3, 5, 2, 0, 0):
        opt.freeze_to(frozen)
        for params in (together, alone):
            give_gradients(params, frozen + len(opt.state))
            for p in params[:frozen]:
                p.grad = None
        opt.step()
        for other in others[frozen:]:
            other.step()
        assert opt.explain().launches == 1
        assert_all_same(together, alone)
    assert [opt.state[p]["step"] for p in together] == [4, 4, 5, 8, 8, 9]


# --
# Cost


def work_of(function):
    """Python bytecodes executed and functions called."""
    counts = {"opcode": 0, "call": 0}

    def tracer(frame, event, arg):
        frame.f_trace_opcodes = True
        if event in counts:
            counts[event] += 1
        return tracer

    def profiler(frame, event, arg):
        if event == "c_call":
            counts["c_call"] = counts.get("c_call", 0) + 1

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(tracer)
    sys.setprofile(profiler)
    try:
        function()
    finally:
        sys.setprofile(before[1])
        sys.settrace(before[0])
    return counts


@needs_extension
@pytest.mark.parametrize("change_lr", [False, True])
def test_a_warm_step_does_no_python_work_per_tensor(change_lr):
    found = []
    for n in (10, 1000):
        params = parameters([(3,)] * n)
        opt = fusedopt.Adam(params, lr=0.1)
        for t in range(4):
            give_gradients(params, t)
            opt.step()
        give_gradients(params, 5)

        def step(opt=opt):
            if change_lr:
                opt.param_groups[0]["lr"] = 0.05
            opt.step()

        found.append(work_of(step))
        assert is_warm(opt)
        opt.engine.bound.clear()
        assert work_of(opt.step)["opcode"] > 10 * n, "the mutation: a long step is work per tensor"
    assert found[0] == found[1]


@needs_extension
def test_a_warm_step_keeps_no_memory():
    params = parameters([(8,)] * 20)
    opt = adam(params)
    for t in range(4):
        give_gradients(params, t)
        opt.step()
    gc.collect()
    tracemalloc.start()
    try:
        held = []
        for _ in range(3):  # Python keeps a few freed objects for reuse: the first round fills these lists
            for t in range(100):
                opt.set_hyper("lr", 0.1 / (1 + t))
                opt.step()
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert is_warm(opt)
    assert held[2] - held[1] < 4096, "less than 41 bytes a step"


def recorded_bytes(n, elements):
    """What Python and numpy hold more once a step has been recorded."""
    params = parameters([(elements,)] * n)
    opt = fusedopt.SGD(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    opt.engine.bound.clear()
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        opt.step()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


@needs_extension
def test_tables_grow_with_the_number_of_tensors_and_with_nothing_else():
    small, wide, many = recorded_bytes(50, 4), recorded_bytes(50, 40_000), recorded_bytes(500, 4)
    assert wide < small + 8192
    assert many < 10 * small + 8192
    assert many < 500 * 1024


@pytest.mark.parametrize(
    "extension", [pytest.param(True, marks=needs_extension), False], ids=["warm", "long"]
)
def test_gradients_are_let_go_of_by_zero_grad(extension, request):
    if not extension:
        request.getfixturevalue("without_extension")
    params = parameters(SHAPES)
    opt = adam(params)
    for t in range(5):
        give_gradients(params, t)
        opt.step()
        grads = [weakref.ref(p.grad) for p in params]
        opt.zero_grad()
        assert [g() for g in grads] == [None] * len(params), f"step {t + 1}"


@pytest.mark.parametrize(
    "extension", [pytest.param(True, marks=needs_extension), False], ids=["warm", "long"]
)
def test_copies_made_for_the_sake_of_strides_are_released_after_the_step(extension, request, monkeypatch):
    if not extension:
        request.getfixturevalue("without_extension")
    copies = []
    original = items.with_layout

    def spy(*args):
        out = original(*args)
        copies.append(weakref.ref(out))
        return out

    monkeypatch.setattr(items, "with_layout", spy)
    p = nn.Parameter(torch.ones(4, 6))
    opt = fusedopt.Adam([p], lr=0.1)
    for t in range(4):
        p.grad = torch.randn(6, 4).t()
        opt.step()
        assert len(copies) == (t + 1 if not extension else min(t, 1) + 1), "a bound step makes its own"
        assert not any(c() is not None for c in copies)


@needs_extension
def test_replaced_tensors_are_let_go_of():
    """A recorded step holds what it was about until the next step, but nothing that was forgotten by name."""
    params = parameters(SHAPES)
    opt = adam(params)
    for t in range(4):
        give_gradients(params, t)
        opt.step()
    p = params[1]
    old = weakref.ref(opt.state[p]["exp_avg_sq"])
    opt.clear_state()
    assert old() is None
    opt.step()
    old = weakref.ref(opt.state[p]["exp_avg_sq"])
    opt.step()
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert old() is None


@needs_extension
def test_an_optimizer_is_collected_with_its_recording():
    params = parameters(SHAPES)
    opt = adam(params)
    for t in range(4):
        give_gradients(params, t)
        opt.step()
    assert is_warm(opt)
    gone = weakref.ref(opt), weakref.ref(params[1])
    del opt, params
    gc.collect()
    assert [g() for g in gone] == [None, None]


# --
# Version counters


@needs_extension
def test_a_warm_step_counts_as_a_write():
    twins = Twins().warm_up()
    tensors = [
        [
            t
            for p in params_of(opt)
            for t in (p, p.grad, *[v for v in opt.state[p].values() if torch.is_tensor(v)])
        ]
        for opt in twins
    ]
    before = [[t._version for t in found] for found in tensors]
    twins.b.engine.binds = False
    for opt in twins:
        opt.step()
    grown = [
        [t._version - v for t, v in zip(found, old, strict=True)]
        for found, old in zip(tensors, before, strict=True)
    ]
    assert grown[0] == [1, 0, 1, 1] * len(SHAPES) == grown[1]


@needs_extension
def test_autograd_catches_a_step_between_forward_and_backward():
    p = nn.Parameter(torch.ones(4))
    opt = fusedopt.SGD([p], lr=0.1)
    for _ in range(3):
        p.grad = torch.ones(4)
        opt.step()
    assert is_warm(opt)
    loss = (p**2).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_extension
def test_state_that_is_only_read_is_not_counted_as_written():
    def cb(p, lr, weights=None, **kwargs):
        p.data.sub_(p.grad.data * weights, alpha=lr)

    p = nn.Parameter(torch.ones(4))
    opt = fusedopt.Optimizer([p], cb, lr=0.1)
    opt.state[p]["weights"] = weights = torch.arange(4.0)
    for _ in range(4):
        p.grad = torch.ones(4)
        opt.step()
    assert is_warm(opt)
    assert weights._version == 0
    assert p.tolist() == pytest.approx([1.0, 0.6, 0.2, -0.2])


# --
# Where steps cannot be repeated


@needs_extension
def test_steps_with_eager_callbacks_or_callbacks_that_are_not_pure_are_never_recorded():
    factors = [1.0]

    def impure(p, lr, **kwargs):
        p.data.add_(p.grad.data, alpha=-lr * factors[0])

    def on_the_host(p, lr, **kwargs):
        p.data.add_(p.grad.data, alpha=-lr * p.grad.data.abs().max().item())

    for cbs in ([average_grad, impure], [on_the_host], [average_grad, on_the_host, momentum_step]):
        twins = Twins(lambda params, cbs=cbs: fusedopt.Optimizer(params, cbs, lr=0.1, mom=0.9))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for t in range(4):
                factors[0] = 1.0 + t
                twins.step()
                assert not is_warm(twins.a)


@needs_extension
def test_state_names_of_torchs_face_are_repeated_too(long_way):
    """Keys in ``opt.state`` differ from the arguments' names there."""
    twins = Twins(lambda params: fusedopt.optim.AdamW(params, lr=0.1)).warm_up()
    long_way.clear()
    twins.step()
    assert twins.a not in long_way
    for opt in twins:
        del opt.state[params_of(opt)[0]]["exp_avg"]
    twins.step()
    assert twins.a in long_way


@needs_extension
@pytest.mark.parametrize("cbs", [[], [fusedopt.step_stat]], ids=["none", "counter"])
def test_callbacks_that_write_no_tensor(cbs):
    twins = Twins(lambda params: fusedopt.Optimizer(params, cbs, lr=0.1))
    for _ in range(4):
        twins.step()


@needs_extension
def test_no_parameters_with_gradients_is_no_step():
    opt = adam(parameters(SHAPES))
    for _ in range(3):
        opt.step()
    assert not any(opt.state.values())
    give_gradients(params_of(opt), 1)
    opt.step()
    assert {s["step"] for s in opt.state.values()} == {1}


@needs_extension
def test_parameters_without_elements_count_their_steps():
    twins = Twins(shapes=[(0,), (3, 0), (4,)]).warm_up()
    for _ in range(3):
        twins.step()
    assert {s["step"] for s in twins.a.state.values()} == {6}


def forgotten(p, lr, a=None, step=0, **kwargs):
    """Every third step it has no momentum."""
    p.data.sub_(p.grad if a is None else a, alpha=lr)
    return {"a": None if step % 3 == 2 else p.grad.clone(), "step": step + 1}


def a_number_instead(p, lr, a=None, step=0, **kwargs):
    p.data.sub_(p.grad if a is None else p.grad * a, alpha=lr)
    return {"a": 2.0 if step % 3 == 2 else p.grad.clone(), "step": step + 1}


def under_another_name(p, lr, a=None, b=None, **kwargs):
    new = p.grad.clone() if a is None else a + p.grad
    p.data.sub_(new if b is None else b + new, alpha=lr)
    return {"a": None if b is None else new, "b": new if b is None else None}


@pytest.mark.parametrize(
    "callback", [forgotten, a_number_instead, under_another_name], ids=lambda f: f.__name__
)
def test_state_that_is_a_tensor_no_more_was_one_in_that_step(callback):
    found = []
    for backend in ("reference", "cpp"):
        p = nn.Parameter(torch.zeros(3))
        opt = fusedopt.Optimizer([p], callback, lr=0.1, backend=backend)
        for t in range(8):
            p.grad = torch.full((3,), float(t + 1))
            opt.step()
        found.append((p.detach(), {k: v for k, v in opt.state[p].items()}))
    (theirs, kept), (ours, left) = found
    torch.testing.assert_close(ours, theirs)
    assert kept.keys() == left.keys() and all(type(kept[k]) is type(left[k]) for k in kept)
