"""``fusedopt.uniform`` and ``fusedopt.normal`` in callbacks: the same numbers however a step is done."""

import copy
import math

import pytest
import torch
from devices import COMPILED, DEVICE
from helpers import assert_same_bits

import fusedopt
from fusedopt.ir import random
from fusedopt.trace import purity

SHAPES = [(3, 5), (7,), (), (70_001,), (0,), (2, 3, 4, 5), (6, 4), (1, 1)]
BACKENDS = [*COMPILED, "reference"]


def noise(p, lr, seed=0, step=0, **kwargs):
    """Adds what others can be compared with to the bit: no product is left to torch's own rounding."""
    p.data.add_(fusedopt.normal(p, seed=seed, step=step))
    return {"step": step + 1}


def drop(p, seed=0, step=0, rate=0.5, **kwargs):
    p.grad.mul_(fusedopt.uniform(p, seed=seed, step=step, stream=7) >= rate)


def descend(p, lr, **kwargs):
    p.data.sub_(p.grad * lr)


def parameters(dtype=torch.float32, shapes=SHAPES):
    """The 4-d one in channels_last, the last matrix transposed."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]
    made = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in made]
    made = [t.t().contiguous().t() if t.shape == (6, 4) else t for t in made]
    return [t.requires_grad_() for t in made]


def give(params, without=()):
    for i, p in enumerate(params):
        p.grad = None if i in without else torch.ones_like(p)


def stepped(params, callbacks, steps=4, without=lambda k: (), **options):
    opt = fusedopt.Optimizer(params, callbacks, lr=0.5, **options)
    for k in range(steps):
        give(params, without(k))
        opt.step()
    return opt


def expected_noise(p, seed, step, index, group=0, stream=0):
    """By the interpreter's own function."""
    numbers = [torch.tensor(float(x), dtype=torch.float64) for x in (seed, step)]
    return random.normal(p.numel(), *numbers, stream, random.place(group, index)).reshape(p.shape).to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_are_those_of_seed_step_parameter_and_element(backend):
    params = parameters(torch.float64)
    before = [p.detach().clone() for p in params]
    stepped(params, [noise], 3, seed=11, backend=backend)
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        for step in range(3):
            old = old + expected_noise(p, 11, step, i)
        assert_same_bits(p.detach(), old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", COMPILED)
def test_fused_steps_and_plain_ones_have_the_same_bits(backend, dtype):
    ours, plain = parameters(dtype), parameters(dtype)
    gaps = {1: (1, 3), 2: (0,)}.get
    for params, name in ((ours, backend), (plain, "reference")):
        stepped(params, [drop, noise, descend], 5, lambda k: gaps(k, ()), seed=3, backend=name)
    for a, b in zip(ours, plain, strict=True):
        assert_same_bits(a.detach(), b.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_which_gradients_are_there_makes_no_difference(backend):
    """Nor does the number of threads. Here all parameters have one step count, so that steps are the same."""

    def counted(p, lr, seed=0, at=0, **kwargs):
        p.data.add_(fusedopt.normal(p, seed=seed, step=at))

    alone, among = parameters(), parameters()
    opts = [
        fusedopt.Optimizer(params, [counted], lr=0.1, backend=backend, seed=5, at=0)
        for params in (alone, among)
    ]
    for k in range(4):
        for params, opt, without in ((alone, opts[0], {0, 1, 2, 4, 5, 6, 7}), (among, opts[1], set())):
            torch.set_num_threads(1 + k % 2)
            opt.param_groups[0]["at"] = k
            give(params, without if k % 2 else without - {5})
            opt.step()
    assert_same_bits(alone[3].detach(), among[3].detach())


@pytest.mark.cpu_only("the backend is cpp")
def test_steps_are_repeated_without_python_and_a_seed_may_change():
    if fusedopt.extension.leaf.native is None:
        pytest.skip("steps are bound by the extension")
    params, plain = parameters(shapes=[(5,), (70_001,)]), parameters(shapes=[(5,), (70_001,)])
    opts = [
        stepped(ps, [drop, noise, descend], 3, seed=1, backend=b)
        for ps, b in ((params, "cpp"), (plain, "reference"))
    ]
    before = opts[0].engine.steps.repeated
    for k in range(4):
        for ps, opt in ((params, opts[0]), (plain, opts[1])):
            opt.param_groups[0]["seed"] = 2**40 + k
            give(ps, {k} if k < 2 else ())
            opt.step()
    assert opts[0].engine.steps.repeated == before + 4
    for a, b in zip(params, plain, strict=True):
        assert_same_bits(a.detach(), b.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_can_be_repeated_and_goes_on_from_a_checkpoint(backend):
    whole, first = parameters(), parameters()
    stepped(whole, [drop, noise, descend], 5, seed=9, backend=backend)
    opt = stepped(first, [drop, noise, descend], 2, seed=9, backend=backend)
    saved = copy.deepcopy(opt.state_dict())
    second = [p.detach().clone().requires_grad_() for p in first]
    opt = fusedopt.Optimizer(second, [drop, noise, descend], lr=0.5, seed=0, backend=backend)
    opt.load_state_dict(saved)
    for _ in range(3):
        give(second)
        opt.step()
    for a, b in zip(whole, second, strict=True):
        assert_same_bits(a.detach(), b.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_of_other_groups_get_other_numbers(backend):
    params = [torch.zeros(1000, device=DEVICE, requires_grad=True) for _ in range(4)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    stepped(groups, [noise], 0, backend=backend)
    opt = fusedopt.Optimizer(groups, [noise], lr=0.1, backend=backend, seed=4)
    give(params)
    opt.step()
    for i, p in enumerate(params):
        assert_same_bits(p.detach(), expected_noise(p, 4, 0, i % 2, group=i // 2))
        for q in params[:i]:
            assert abs(torch.corrcoef(torch.stack([p, q]).detach())[0, 1]) < 4 / math.sqrt(1000)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_step_counts_may_be_tensors(backend, capturable):
    """On the device, where counts live there; or made of other numbers per tensor."""

    def later(p, step=0, **kwargs):
        size = (p.data * 0).sum()
        p.data.add_(fusedopt.normal(p, seed=size + 3, step=step * 2))
        return {"step": step + 1}

    params = [torch.zeros(50, device=DEVICE, requires_grad=True)]
    opt = fusedopt.Optimizer(params, [later], lr=0.1, backend=backend, capturable=capturable)
    total = torch.zeros(50, device=DEVICE)
    for k in range(3):
        give(params)
        opt.step()
        total += expected_noise(total, 3, 2 * k, 0)
    assert_same_bits(params[0].detach(), total)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("seed", [5, 2**24 + 1, 2**53 - 1])
def test_seeds_may_be_tensors_of_whole_numbers(seed, capturable, backend):
    def noisy(p, seed, **kwargs):
        p.data.add_(fusedopt.normal(p, seed=seed, step=0))

    params = [torch.zeros(50, device=DEVICE, requires_grad=True)]
    seeds = torch.tensor(seed, device=DEVICE)
    opt = fusedopt.Optimizer(params, [noisy], seed=seeds, lr=0.1, backend=backend, capturable=capturable)
    give(params)
    opt.step()
    assert_same_bits(params[0].detach(), expected_noise(params[0], seed, 0, 0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_sums_along_rows_and_over_all_parameters(backend):
    """A kernel with several axes, and rounds before it, which draw the same numbers again."""

    def scaled(p, seed=1, step=0, **kwargs):
        x = fusedopt.normal(p, seed=seed, step=step)
        largest = fusedopt.total((x * 0).amax()) + 1
        p.data.add_((x - x.amax(1, keepdim=True)) * largest)
        return {"step": step + 1}

    params = [torch.zeros(s, device=DEVICE, requires_grad=True) for s in ((30, 40), (5, 300))]
    stepped(params, [scaled], 3, backend=backend)
    for i, p in enumerate(params):
        total = torch.zeros_like(p)
        for k in range(3):
            x = expected_noise(p, 1, k, i)
            total = total + (x - x.amax(1, keepdim=True))
        assert_same_bits(p.detach(), total.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_what_a_branch_leaves_out_nothing_is_drawn(backend):
    def sometimes(p, seed=1, step=0, **kwargs):
        if p.data.abs().sum() > 0:
            p.data.add_(fusedopt.normal(p, seed=seed, step=step))
        else:
            p.data.add_(fusedopt.uniform(p, seed=seed, step=step, stream=2))
        return {"step": step + 1}

    params = [
        torch.zeros(9, device=DEVICE, requires_grad=True),
        torch.ones(9, device=DEVICE, requires_grad=True),
    ]
    stepped(params, [sometimes], 1, backend=backend)
    assert (params[0] >= 0).all() and (params[0] < 1).all()
    assert_same_bits(params[1].detach(), 1 + expected_noise(params[1], 1, 0, 1))


# ---------------------------------------------------------------- a rule: Langevin dynamics


def langevin(p, lr, seed=0, step=0, temperature=1.0, **kwargs):
    """Stochastic gradient Langevin dynamics: parameters are samples of exp(-loss / temperature) in the end."""
    z = fusedopt.normal(p, seed=seed, step=step)
    p.data.sub_(p.grad * lr).add_(z * (2 * lr * temperature) ** 0.5)
    return {"step": step + 1}


@pytest.mark.parametrize("backend", COMPILED)
def test_langevin_dynamics_samples_the_posterior(backend):
    """Of the loss x²/2 it is normal; with steps of this length, of variance 1 / (1 - lr / 2).

    False alarms: one seed in ten thousand, for each of the two.
    """
    count, lr, temperature = 20_000, 0.2, 0.5
    x = torch.zeros(count, device=DEVICE, requires_grad=True)
    opt = fusedopt.Optimizer([x], [langevin], lr=lr, temperature=temperature, seed=2, backend=backend)
    for _ in range(60):
        x.grad = x.detach().clone()
        opt.step()
    variance = temperature / (1 - lr / 2)
    found = x.detach().double()
    assert abs(found.mean()) < 3.9 * math.sqrt(variance / count)
    assert abs(found.var() / variance - 1) < 3.9 * math.sqrt(2 / count)


# ---------------------------------------------------------------- outside of callbacks, and errors


def test_outside_of_callbacks_it_is_the_first_parameter():
    p = torch.zeros(4, 3, dtype=torch.float64).t()
    assert_same_bits(fusedopt.normal(p, seed=1, step=2), expected_noise(p, 1, 2, 0).double().cpu())
    u = fusedopt.uniform(torch.zeros(1000), seed=torch.tensor(1), step=2, stream=3)
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1 and not u.requires_grad
    assert_same_bits(u, fusedopt.uniform(torch.ones(1000), seed=1.0, step=torch.tensor(2.0), stream=3))
    assert fusedopt.uniform(torch.zeros(0, 3), seed=0, step=0).shape == (0, 3)


def test_after_a_step_no_parameter_is_the_current_one():
    params = [torch.zeros(3, requires_grad=True) for _ in range(2)]
    before = fusedopt.normal(params[0], seed=0, step=0)
    stepped(params, [noise], 1, backend="reference")
    assert_same_bits(fusedopt.normal(params[0], seed=0, step=0), before)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((3.0, 0, 0, 0), TypeError, "draws for a tensor of floating point, not for float"),
        ((torch.zeros(2, dtype=torch.int64), 0, 0, 0), TypeError, "not for one of torch.int64"),
        ((torch.zeros(2), "a", 0, 0), TypeError, "seed is a number, or a 0-d tensor, not str"),
        ((torch.zeros(2), 0, torch.zeros(2), 0), TypeError, "step is a number"),
        ((torch.zeros(2), 0, 0, 256), ValueError, "stream is a whole number from 0 to 255, not 256"),
        ((torch.zeros(2), 0, 0, 1.0), ValueError, "not 1.0"),
    ],
)
def test_errors(arguments, error, says):
    p, seed, step, stream = arguments
    for draw in (fusedopt.uniform, fusedopt.normal):
        with pytest.raises(error, match=says):
            draw(p, seed=seed, step=step, stream=stream)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_stream_in_a_callback_is_the_callers_error(backend):
    def wrong(p, **kwargs):
        p.data.add_(fusedopt.uniform(p, seed=0, step=0, stream=-1))

    with pytest.raises(ValueError, match="stream"):
        stepped([torch.zeros(3, device=DEVICE, requires_grad=True)], [wrong], 1, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_for_a_part_of_the_parameter_are_drawn_eagerly(backend):
    def rows(p, seed=1, step=0, **kwargs):
        p.data.add_(fusedopt.normal(p.data.sum(1), seed=seed, step=step).unsqueeze(1))

    p = torch.zeros(3, 2, device=DEVICE, requires_grad=True)
    if backend == "reference":
        stepped([p], [rows], 1, backend=backend)
    else:
        with pytest.warns(RuntimeWarning, match="random numbers for what has not the parameter's shape"):
            stepped([p], [rows], 1, backend=backend)
    assert_same_bits(p.detach(), expected_noise(torch.zeros(3), 1, 0, 0).unsqueeze(1).expand(3, 2).clone())


def test_drawing_is_arithmetic():
    for callback in (noise, drop, langevin):
        assert purity.examine(callback).level == purity.PURE
