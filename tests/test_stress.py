"""The step under stress: other threads, forks, signals, freed memory, hyperparameters that never stay the same."""

import functools
import gc
import itertools
import math
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import warnings
import weakref

import numpy as np
import pytest
import torch
from helpers import needs_extension
from torch import nn

import fusedopt
from fusedopt import optim
from fusedopt.extension import leaf
from fusedopt.optimizer import names
from fusedopt.step import buckets, commit

RULES = {
    "AdamW": lambda ps, **o: optim.AdamW(ps, lr=0.01, **o),
    "Adam": lambda ps, **o: fusedopt.Adam(ps, lr=0.01, **o),
    "SGD": lambda ps, **o: optim.SGD(ps, lr=0.01, momentum=0.9, dampening=0.5, **o),
    "RAdam": lambda ps, **o: fusedopt.RAdam(ps, lr=0.01, **o),
    "Lamb": lambda ps, **o: fusedopt.Lamb(ps, lr=0.01, **o),
    "NAdam": lambda ps, **o: optim.NAdam(ps, lr=0.01, **o),
    "clipped": lambda ps, **o: optim.AdamW(ps, lr=0.01, max_grad_norm=0.5, **o),
    "groups": lambda ps, **o: optim.AdamW(
        [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(ps)], **o
    ),
}
"""Optimizers by name: their steps commit numbers, tensors, several groups, or measure gradients first."""


def parameters(*sizes, dtype=torch.float32):
    return [nn.Parameter(torch.linspace(-1, 1, n).to(dtype)) for n in sizes]


def give_gradients(params):
    for p in params:
        p.grad = torch.linspace(0.5, 1, p.numel()).to(p.dtype).view_as(p)


def steps(opt, params, n=1):
    for _ in range(n):
        give_gradients(params)
        opt.step()


@pytest.fixture(autouse=True)
def gradients_are_on():
    """A signal may come within torch's own ``no_grad``, which then stays."""
    yield
    torch.set_grad_enabled(True)


@pytest.fixture(params=[pytest.param(True, marks=needs_extension), False], ids=["native", "python"])
def extension(request, monkeypatch):
    """With the extension, and without it."""
    if not request.param:
        monkeypatch.setattr(leaf, "native", None)
        for name in ("write_pointers", "run_cpu", "bump_versions"):
            monkeypatch.setattr(leaf, name, getattr(leaf.python, name))
    return request.param


# ---------------------------------------------------------------- other threads


def drop_gradients(opt, params):
    """Freed when no parameter refers to them: before, torch's own ``p.grad`` may crash (csrc/tensors.h, dropped)."""
    held = [p.grad for p in params]
    opt.zero_grad()
    del held


def replace_gradients(opt, params):
    for p in params:
        p.grad = torch.ones_like(p)


def replace_data(opt, params):
    for p in params:
        p.data = torch.zeros_like(p)


def clear_state(opt, params):
    opt.state.clear()


def clear_each_state(opt, params):
    for state in list(opt.state.values()):
        state.clear()


def load_state(opt, params):
    opt.load_state_dict({"state": {}, "param_groups": opt.state_dict()["param_groups"]})


DISTURBANCES = [drop_gradients, replace_gradients, replace_data, clear_state, clear_each_state, load_state]


@pytest.mark.parametrize("disturb", DISTURBANCES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lamb", "clipped"])
def test_a_step_owns_what_it_touches(name, disturb, extension):
    """Sizes that the allocator gives back to the system at once, so that memory that was let go of is a crash."""
    params = parameters(500_000, 500_000)
    opt = RULES[name](params)
    steps(opt, params, 3)
    for t in range(8):
        give_gradients(params)
        thread = threading.Timer(0.0004 * t, disturb, (opt, params))
        thread.start()
        opt.step()
        thread.join()
    steps(opt, params, 2)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("measured", [False, True])
@needs_extension
def test_a_warm_step_lets_go_of_what_it_owned(measured):
    params = parameters(200_000)
    opt = RULES["clipped" if measured else "AdamW"](params)
    steps(opt, params, 4)
    storage = params[0].grad.untyped_storage()
    count = torch._C._storage_Use_Count(storage._cdata)
    opt.step()
    assert opt.engine.bound
    assert torch._C._storage_Use_Count(storage._cdata) == count


@pytest.mark.parametrize("one", [False, True], ids=["two optimizers", "the same optimizer"])
def test_two_threads_step(one, extension):
    made = []
    for _ in range(2):
        params = parameters(200_000, 1000)
        made.append((RULES["AdamW"](params), params))
    if one:
        made[1] = made[0]
    failed = []

    def run(opt, params):
        try:
            for t in range(20):
                if t % 5 == 0:
                    give_gradients(params)
                opt.step()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=each) for each in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for opt, params in made:
        assert all(p.isfinite().all() for p in params)
        if not one:
            assert opt.state[params[0]]["step"] == 20
    if not one:
        assert torch.equal(made[0][1][0], made[1][1][0])


def test_threads_that_begin_together_share_one_state(extension):
    """The first steps of an optimizer, in several threads at once: all count on what one of them has made."""
    (p,) = parameters(10)
    give_gradients([p])
    opt, together, failed = RULES["AdamW"]([p]), threading.Barrier(4), []

    def run():
        try:
            together.wait()
            for _ in range(100):
                opt.step()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and opt.state[p]["step"] == 400


@needs_extension
def test_a_deleted_optimizer_ends_its_step():
    params = parameters(2_000_000)
    opt = RULES["AdamW"](params)
    steps(opt, params, 4)
    before = params[0].detach().clone()
    held = [opt]
    thread = threading.Thread(target=lambda: held.pop().step())
    del opt
    thread.start()
    for p in params:
        p.grad = None
    thread.join()
    gc.collect()
    assert not held and params[0].isfinite().all() and before.isfinite().all()


# ---------------------------------------------------------------- forks


def in_child(function, seconds=60):
    """Whether a forked child ends well by itself."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", ["AdamW", "clipped", "Lamb"])
def test_a_forked_child_steps(name, two_threads, extension):
    """The tensors are too small for torch's threads, and enough of them for ours: both tables and launches use two."""
    params = parameters(*[100] * 600)
    opt = RULES[name](params)
    twin = parameters(*[100] * 600)
    other = RULES[name](twin)
    steps(opt, params, 3)
    steps(other, twin, 5)

    def child():
        assert leaf.thread_count() == 1
        steps(opt, params, 2)
        assert all(torch.equal(p, q) for p, q in zip(params, twin, strict=True))
        steps(RULES[name](parameters(*[100] * 600)), params)

    assert in_child(child)
    assert leaf.thread_count() == 2
    steps(opt, params, 2)
    assert all(torch.equal(p, q) for p, q in zip(params, twin, strict=True))


def _worker(opt, params, queue):
    steps(opt, params, 2)
    queue.put(float(opt.state[params[0]]["step"]))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_of_multiprocessing_steps(two_threads):
    params = parameters(*[100] * 600)
    opt = RULES["AdamW"](params)
    steps(opt, params, 3)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_worker, args=(opt, params, queue))
    process.start()
    process.join(60)
    hangs = process.is_alive()
    process.kill()
    assert not hangs and queue.get() == 5


# ---------------------------------------------------------------- signals


class Interrupt(BaseException):
    """What a signal's handler raises."""


HOME = os.path.dirname(fusedopt.__file__)


def broken_off(step, n):
    """Break a step off at the n-th line of fusedopt's that it executes; False if it ends before."""
    left = [n]

    def tick(frame, event, arg):
        if not frame.f_code.co_filename.startswith(HOME) or frame.f_code is buckets.drop_first.__code__:
            return None  # not ours, or a finalizer, whose errors Python prints
        left[0] -= event == "line"
        if not left[0]:
            raise Interrupt
        return tick

    before = sys.gettrace()
    sys.settrace(tick)
    try:
        step()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
        assert fusedopt.total(torch.ones(3)) == 3, "what callbacks call is still told of a step"
    return False


def seen(opt, params):
    """Copies of parameters, and of each one's state."""
    copies = [p.detach().clone() for p in params]
    states = [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in opt.state.get(p, {}).items()}
        for p in params
    ]
    return copies, states


def same(a, b):
    equal = [torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True)]
    return all(equal) and all(
        s.keys() == t.keys() and all(bool(torch.as_tensor(s[k] == t[k]).all()) for k in s)
        for s, t in zip(a[1], b[1], strict=True)
    )


def whole(opt, params, before):
    """Whether every parameter and all of its state has moved (True), or nothing has (False); else AssertionError."""
    after = seen(opt, params)
    if same(before, after):
        return False
    assert not any(torch.equal(x, y) for x, y in zip(before[0], after[0], strict=True)), "some have not moved"
    for old, new in zip(before[1], after[1], strict=True):
        for key, value in old.items():
            moved = bool(torch.as_tensor(value != new[key]).any())
            assert moved, f"{key} has not moved"
        assert new
    return True


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_a_step_broken_off_anywhere_is_whole_or_nothing(name, warm, extension):
    params = parameters(3, 5)
    opt = RULES[name](params)
    steps(opt, params, 8)
    results = set()
    for n in itertools.count(1, 1 if warm and extension else 11):
        steps(opt, params)
        for p in params:  # averages never settle, however gradients are clipped
            p.grad.copy_((torch.arange(p.numel()) * (1.0 + n % 7) + n).sin().view(p.shape) + 2)
        if not warm:
            opt.engine.bound.clear()
        before = seen(opt, params)
        if not broken_off(opt.step, n):
            break
        results.add(whole(opt, params, before))
    assert False in results, "the mutation: a step is broken off before it has done anything"


@pytest.mark.parametrize("name", RULES)
def test_a_first_step_broken_off_anywhere_can_be_taken_again(name, extension):
    """Whatever is left behind, the next step is the first one, or the second if the first was whole."""
    results = {}
    expected = parameters(3, 5)
    opt = RULES[name](expected)
    right = []
    for _ in range(2):
        steps(opt, expected)
        right.append([p.detach().clone() for p in expected])
    for n in itertools.count(1, 17):
        params = parameters(3, 5)
        opt = RULES[name](params)
        give_gradients(params)
        if not broken_off(opt.step, n):
            break
        moved = not torch.equal(params[0], parameters(3)[0])
        results[moved] = True
        steps(opt, params)
        for p, q in zip(params, right[moved], strict=True):
            assert torch.equal(p, q), f"broken off at line {n}, {'after' if moved else 'before'} the step"
    assert False in results


@pytest.mark.parametrize("name", ["AdamW", "groups", "clipped"])
def test_signals_at_any_time_leave_steps_whole(name):
    def interrupt(*args):
        raise Interrupt

    params = parameters(3000, 50_000)
    opt = RULES[name](params)
    steps(opt, params, 4)
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for t in range(60):
            give_gradients(params)
            before = seen(opt, params)
            if t % 3 == 0:
                opt.engine.bound.clear()
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + 1e-5 * (t % 40))
                opt.step()
                time.sleep(0.01)
            except Interrupt:
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            whole(opt, params, before)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_changes_are_committed_by_one_call():
    """In order, and nothing of Python's runs but what is asked for; which is what the mutation asks for."""
    lines, counts = [], {}

    def tick(frame, event, arg):
        if frame.f_code.co_filename != commit.__file__:
            lines.append(frame.f_code.co_filename)

    changes = [functools.partial(counts.update, {k: 1}) for k in "abc"]
    mutation = [lambda: None]
    for each in (changes, mutation):
        lines.clear()
        before = sys.gettrace()
        sys.settrace(tick)
        commit.commit(each)
        sys.settrace(before)
        assert (__file__ in lines) == (each is mutation)
    assert list(counts) == ["a", "b", "c"]


# ---------------------------------------------------------------- memory that is gone


def freed(t):
    t.untyped_storage().resize_(0)


def cut(t):
    t.untyped_storage().resize_(t.itemsize)


WHICH = {
    "parameter 1 of group 0": lambda opt, p: p,
    "the gradient of parameter 1 of group 0": lambda opt, p: p.grad,
    "the state 'exp_avg_sq' of parameter 1 of group 0": lambda opt, p: opt.state[p]["exp_avg_sq"],
}


@pytest.mark.parametrize("take_away", [freed, cut], ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_memory_that_is_gone_is_named(take_away, which, warm, dtype, extension):
    params = parameters(4, 1000, 0, dtype=dtype)
    opt = RULES["AdamW"](params)
    steps(opt, params, 4)
    give_gradients(params)
    if not warm:
        opt.engine.bound.clear()
    before, count = params[0].detach().clone(), opt.state[params[0]]["step"]
    take_away(WHICH[which](opt, params[1]))
    with pytest.raises(RuntimeError, match=f"{which} has shape .*freed or cut.*Remedy: "):
        opt.step()
    assert torch.equal(params[0], before) and opt.state[params[0]]["step"] == count


def test_a_freed_parameter_of_the_first_step_is_named():
    params = parameters(4)
    give_gradients(params)
    freed(params[0])
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 has shape"):
        RULES["SGD"](params).step()


def test_parameters_that_need_no_memory_are_stepped():
    params = parameters(0, 3)
    freed(params[0])
    opt = RULES["AdamW"](params)
    steps(opt, params, 4)
    assert opt.state[params[0]]["step"] == 4


@pytest.mark.parametrize("swap", ["data", "set_"])
def test_memory_that_was_swapped_is_the_one_that_is_stepped(swap):
    params = parameters(4)
    opt = RULES["SGD"](params)
    steps(opt, params, 4)
    old, new = params[0].detach(), torch.full((4,), 9.0)
    before = old.clone()
    if swap == "data":
        params[0].data = new
    else:
        with torch.no_grad():
            params[0].set_(new)
    steps(opt, params)
    assert torch.equal(old, before) and (new < 9).all()


# ---------------------------------------------------------------- hyperparameters


def moves(opt, params):
    """How far the next step moves the first parameter; gradients are those of before."""
    before = params[0].detach().clone()
    opt.step()
    return (before - params[0].detach()).abs().max().item()


def set_data(opt, lr):
    lr.data = torch.tensor(0.0)


def set_storage(opt, lr):
    lr.set_(torch.zeros(5), 2, ())


def set_tensor(opt, lr):
    opt.param_groups[0]["lr"] = torch.tensor(0.0)


def fill(opt, lr):
    lr.fill_(0.0)


@pytest.mark.parametrize("change", [set_data, set_storage, set_tensor, fill], ids=lambda f: f.__name__)
@pytest.mark.parametrize("capturable", [True, False])
def test_a_learning_rate_that_is_a_tensor_is_read_where_it_is(change, capturable, extension):
    params, lr = parameters(5), torch.tensor(0.1)
    opt = optim.Adam(params, lr=lr, capturable=capturable)
    steps(opt, params, 4)
    old = lr.detach().clone()
    assert moves(opt, params) > 0
    change(opt, lr)
    assert moves(opt, params) == 0
    assert moves(opt, params) == 0
    opt.param_groups[0]["lr"] = torch.tensor(0.5)
    assert moves(opt, params) > 0.05 and old == torch.tensor(0.1)


@pytest.mark.parametrize("key", ["betas", "weight_decay", "eps"])
def test_other_hyperparameters_that_are_tensors_are_followed(key):
    twins = []
    for tensors in (True, False):
        params = parameters(5)
        value = {"betas": (0.9, 0.5), "weight_decay": 0.5, "eps": 0.125}[key]
        opt = optim.AdamW(params, lr=0.1, capturable=True)
        steps(opt, params, 4)
        if tensors:
            kept = tuple(map(torch.tensor, value)) if key == "betas" else torch.tensor(value)
            opt.param_groups[0][key] = kept
        else:
            opt.param_groups[0][key] = value
        steps(opt, params, 3)
        if tensors:
            (kept[1] if key == "betas" else kept).data = torch.tensor(0.25)
        else:
            opt.param_groups[0][key] = (0.9, 0.25) if key == "betas" else 0.25
        steps(opt, params, 2)
        twins.append(params[0].detach())
    torch.testing.assert_close(*twins, rtol=1e-5, atol=1e-6)


NUMBERS = [
    0.5, 3, -1e-18, math.inf, True, np.float64(0.5), np.float32(0.1), np.float16(0.1), np.int32(7), np.bool_(True),
    np.array(0.25), np.array(4), np.array([0.5]), np.array([1, 2]), torch.tensor(0.5), torch.tensor(3),
    torch.tensor([0.5]),     torch.tensor([1.0, 2.0]), torch.tensor(True), torch.tensor(0.1, requires_grad=True), 
    nn.Parameter(torch.tensor(2.0)),     torch.tensor(0.1, dtype=torch.bfloat16), "0.5", None, (0.5,), 2**80,
    1j, torch.tensor(1j),
]  # fmt: skip


@needs_extension
@pytest.mark.parametrize("x", NUMBERS, ids=lambda x: f"{type(x).__name__} {x}")
def test_the_extension_reads_numbers_as_names_does(x):
    here, there = names.number(x), leaf.native.number(x)
    if there is None:  # it may leave any to Python; but not those that hold small numbers
        assert type(here) not in (int, float, bool) or abs(here) > 2**53
    else:
        assert type(there) is type(here) and there == here


@needs_extension
@pytest.mark.parametrize("key", ["lr", "eps", "weight_decay", "betas", "other"])
@pytest.mark.parametrize("x", [0.0, -1e-18, -names.ROUNDING, -2 * names.ROUNDING, -1.0, math.nan], ids=str)
def test_both_know_the_same_lowest_numbers(key, x):
    """Where names raises, a warm step does not run; and the other way round."""
    place = {"weight_decay": "wd", "betas": "mom"}.get(key, key)
    params = parameters(3)

    def cb(p, lr, eps, wd, mom, sqr_mom, other, **kwargs):
        p.data.sub_(p.grad, alpha=lr + eps + wd + mom + other)

    opt = fusedopt.Optimizer(params, cb, lr=0.1, eps=0.1, wd=0.1, mom=0.1, sqr_mom=0.1, other=0.1)
    steps(opt, params, 4)
    anew = opt.engine.steps.anew
    opt.param_groups[0][key] = (x, 0.1) if key == "betas" else x
    try:
        names.check(place, x)
    except ValueError:
        with pytest.raises(ValueError, match=f"invalid {place}"):
            opt.step()
    else:
        opt.step()
        assert opt.engine.steps.anew == anew


@needs_extension
@pytest.mark.parametrize(
    "make",
    [
        np.float64,
        np.float32,
        torch.tensor,
        lambda x: torch.tensor(x, requires_grad=True),
        np.array,
        lambda x: x - 1e-18,
    ],
    ids=["float64", "float32", "tensor", "with gradient", "array", "float"],
)
def test_schedules_in_other_numbers_stay_warm(make):
    twins = []
    for convert in (make, lambda x: names.number(make(x))):
        params = parameters(5)
        opt = optim.AdamW(params, lr=0.1)
        steps(opt, params, 4)
        anew = opt.engine.steps.anew
        for t in range(5):
            opt.param_groups[0]["lr"] = convert(0.1 / (t + 1))
            steps(opt, params)
        assert opt.engine.steps.anew == anew
        twins.append(params[0].detach())
    assert torch.equal(*twins)


@needs_extension
def test_flags_are_compared_by_value():
    params = parameters(3)
    opt = fusedopt.Optimizer(
        params,
        lambda p, lr, how, **kwargs: p.data.sub_(p.grad, alpha=lr if how == "down" else -lr),
        lr=0.1,
        how="down",
    )
    steps(opt, params, 4)
    anew = opt.engine.steps.anew
    opt.param_groups[0]["how"] = "".join(["do", "wn"])
    steps(opt, params)
    assert opt.engine.steps.anew == anew
    opt.param_groups[0]["how"] = "up"
    steps(opt, params)
    assert opt.engine.steps.anew == anew + 1


@needs_extension
@pytest.mark.parametrize(("dtype", "stays"), [(torch.float32, False), (torch.float64, True)], ids=str)
def test_a_number_too_large_for_a_float_leaves_the_warm_path(dtype, stays):
    params = parameters(3, dtype=dtype)
    opt = RULES["SGD"](params)
    steps(opt, params, 4)
    (bound,) = opt.engine.bound
    opt.param_groups[0]["lr"] = 1e39
    give_gradients(params)
    assert (bound.run(bound.scaling) is None) == stays
    opt.param_groups[0]["lr"] = 3e38
    assert bound.run(bound.scaling) is None
    opt.param_groups[0]["lr"] = math.inf
    assert bound.run(bound.scaling) is None


# ---------------------------------------------------------------- caches


def named(p, lr, flag, **kwargs):
    p.data.sub_(p.grad, alpha=lr)


def shaped(p, lr, **kwargs):
    p.data.sub_(p.grad, alpha=lr / p.numel())


@pytest.mark.filterwarnings("ignore:fusedopt. most of the last")
def test_a_flag_that_never_stays_the_same_does_not_pile_up():
    params = parameters(3)
    opt = fusedopt.Optimizer(params, named, lr=0.1, flag="")
    for t in range(200):
        opt.param_groups[0]["flag"] = f"step {t}"
        steps(opt, params)
    known = opt.engine.buckets.known
    assert len(known) <= buckets.MAX_STRUCTURES
    del opt
    gc.collect()
    assert len(known) <= buckets.KEPT_STRUCTURES


@pytest.mark.filterwarnings("ignore:fusedopt. most of the last")
def test_shapes_that_keep_changing_do_not_pile_up():
    params = parameters(3)
    opt = fusedopt.Optimizer(params, shaped, lr=0.1)
    for t in range(100):
        params[0].data = torch.zeros(t + 1)
        steps(opt, params)
    assert len(opt.engine.buckets.known) <= buckets.MAX_STRUCTURES
    assert len(opt.engine.buckets.verdicts.unfused) <= buckets.MAX_STRUCTURES


def closure(x):
    def cb(p, lr, **kwargs):
        p.data.sub_(p.grad, alpha=lr * x)

    return cb


def test_closures_go_with_their_optimizers():
    """The last kernel at most is kept."""
    gone = []
    for _ in range(40):
        params, cb = parameters(3), closure(0.5)
        opt = fusedopt.Optimizer(params, cb, lr=0.1)
        steps(opt, params, 2)
        gone += [weakref.ref(cb), weakref.ref(opt), weakref.ref(opt.engine)]
        gone += map(weakref.ref, opt.engine.buckets.history.used)
    del opt, params, cb
    gc.collect()
    alive = {id(ref()): type(ref()).__name__ for ref in gone if ref() is not None}
    assert len(alive) <= 1 and set(alive.values()) <= {"Kernel"}, alive


def test_an_eager_step_broken_off_anywhere_is_whole_or_nothing():
    """Parameters that were lent to callbacks are the user's again, wherever the step ends."""

    def draws(p, lr, step=0, avg=None, **kwargs):
        avg = torch.zeros_like(p) if avg is None else avg
        p.data.sub_(avg.add_(p.grad), alpha=lr * (1 + random.random()))
        return {"step": step + 1, "avg": avg}

    params = parameters(3, 5)
    params[1].tag = "mine"
    memory, results = [p.data_ptr() for p in params], set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        opt = fusedopt.Optimizer(params, [fusedopt.weight_decay, draws], lr=0.1, wd=0.1)
        steps(opt, params, 3)
        for n in itertools.count(1, 3):
            steps(opt, params)
            before, grads = seen(opt, params), [p.grad for p in params]
            if not broken_off(opt.step, n):
                break
            results.add(whole(opt, params, before))
            assert [p.data_ptr() for p in params] == memory and all(
                p.grad is g for p, g in zip(params, grads, strict=True)
            )
            assert [vars(p) for p in params] == [{}, {"tag": "mine"}]
    assert results == {True, False}
