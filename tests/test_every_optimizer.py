"""Every named optimizer's kernels: near float64, repeatable, alike on every backend, and within their tensors.

Tails of every kind, tensors without elements and misaligned ones, all with guard bytes around them. Truth and
competitor are eager torch on the CPU, whose arithmetic is that of the kernels: on a GPU eager torch contracts.
"""

import pytest
import torch
from devices import COMPILED, DEVICE
from helpers import assert_close_to_float64, assert_same_bits, bits

import fusedopt
from fusedopt import optim, table

GUARD, BYTE = 256, 0xA5
SIZES = [0, 1, 3, 7, 127, 128, 129, 4095, 4097]
"""Elements per tensor: none, less than an access, tails."""
if DEVICE.type != "cpu":  # more than a chunk; on the CPU that takes long, and test_dtypes_layouts.py has it
    SIZES += [65_541, 140_003]
SHAPES = [*((n,) for n in SIZES), (5, 3, 3, 3)]
STEPS = 7
"""RAdam's and Lookahead's structure changes at the sixth."""
FLIPPED = 0.05
"""Parts of the elements that may round the other way in 16 bits."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    pytest.param(row, variant, dtype, id=f"{row.face}-{row.name}-{variant.id}-{str(dtype)[6:]}")
    for row in table.rows()
    for k, variant in enumerate(row.variants)
    for dtype in DTYPES
    if k == 0 or dtype == torch.float32
]


class Memory:
    """Tensors on the device with guard bytes before and behind each."""

    def __init__(self):
        self.raw = []

    def hold(self, values, offset=0):
        """A copy of the values at an aligned address, or ``offset`` elements behind one."""
        start = GUARD + offset * values.itemsize
        stop = start + values.nbytes
        raw = torch.full((stop + GUARD,), BYTE, dtype=torch.uint8, device=DEVICE)
        self.raw.append((raw, start, stop))
        return raw[start:stop].view(values.dtype).view(values.shape).copy_(values)

    def check(self):
        guards = torch.cat([x for raw, a, b in self.raw for x in (raw[:a], raw[b:])])
        harmed = int((guards != BYTE).sum())
        assert not harmed, f"{harmed} bytes outside of the tensors were written to"


def noise(shapes, seed, dtype=torch.float32):
    """On the CPU, each number representable in the dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def problem(shapes=SHAPES, dtype=torch.float32, steps=STEPS):
    """Parameters, and gradients for each step."""
    return noise(shapes, 0, dtype), [noise(shapes, 1 + t, dtype) for t in range(steps)]


def eagerly(make, start, gradients, dtype, state=()):
    """Parameters and state after the reference's steps in this dtype."""
    params = [p.to(dtype, copy=True).requires_grad_() for p in start]
    opt = make(params)
    opt.backend = "reference"
    for given in gradients:
        for p, g in zip(params, given, strict=True):
            p.grad = g.to(dtype, copy=True)
        opt.step()
    return seen(opt, params, state)


def compiled_steps(make, start, gradients, backend, state=(), misaligned=True):
    """An optimizer after its steps in guarded memory, and its parameters and state, on the CPU.

    misaligned: every second gradient and third parameter lie one element behind an aligned address.
    """
    memory = Memory()
    params = [memory.hold(p, misaligned and k % 3 == 2).requires_grad_() for k, p in enumerate(start)]
    opt = make(params)
    opt.backend = backend
    for t, given in enumerate(gradients):
        passing = Memory()
        for k, (p, g) in enumerate(zip(params, given, strict=True)):
            p.grad = passing.hold(g, misaligned and k % 2 == 1)
        opt.step()
        passing.check()
        memory.check()
        for p in params if t == 0 else ():
            for key in state if p.numel() else ():
                opt.state[p][key] = memory.hold(opt.state[p][key])
    return opt, [t.cpu() for t in seen(opt, params, state)]


def seen(opt, params, state):
    kept = [opt.state[p][key] for key in state for p in params if p.numel()]
    return [t.detach() for t in (*params, *kept)]


def assert_same(ours, others):
    for a, b in zip(ours, others, strict=True):
        assert_same_bits(a, b)


def assert_competes(ours, eager, truth, ulp=2.0):
    """In 16 bits, where eager's error is large, all but a few elements of each tensor must also be eager's."""
    assert_close_to_float64(ours, eager, truth, ulp)
    for a, e in zip(ours, eager, strict=True):
        flipped = int((bits(a) != bits(e)).sum())
        allowed = max(2, FLIPPED * a.numel()) if a.itemsize == 2 else a.numel()
        assert flipped <= allowed, f"{flipped} of {a.numel()} elements are not eager torch's"


def check(make, backend, dtype=torch.float32, state=(), shapes=SHAPES, wrong=None, ulp=2.0):
    """Compiled steps compete with the reference's; ``wrong``: another optimizer takes them."""
    start, gradients = problem(shapes, dtype)
    opt, ours = compiled_steps(wrong or make, start, gradients, backend, state)
    truth, eager = (eagerly(make, start, gradients, d, state) for d in (torch.float64, dtype))
    assert_competes(ours, eager, truth, ulp)
    return opt, ours


@pytest.mark.parametrize(("row", "variant", "dtype"), CASES)
def test_every_optimizer_is_as_near_to_float64_as_eager_torch(row, variant, dtype, compiled):
    """And steps taken again, and other backends', have the same bits.

    But for optimizers that need a number per tensor: backends sum in other orders.
    """

    def make(params):
        return row.factory(params, **variant.kwargs)

    ulp = 16.0 if row.calls and DEVICE.type != "cpu" else 2.0  # torch's matrix products are others on a GPU
    _, ours = check(make, compiled, dtype, variant.state, ulp=ulp)
    others = [] if row.reductions else COMPILED[: COMPILED.index(compiled)]
    for backend in (compiled, *others):
        assert_same(compiled_steps(make, *problem(dtype=dtype), backend, variant.state)[1], ours)


@pytest.mark.parametrize("make", [optim.AdamW, fusedopt.Lamb], ids=["AdamW", "Lamb"])
def test_nothing_outside_of_the_tensors_is_written(make, compiled):
    """Little besides our kernels runs on the device: this is what compute-sanitizer looks at."""
    start, gradients = problem([(n,) for n in (0, 1, 7, 129, 4097, 70_001)], steps=2)
    compiled_steps(lambda params: make(params, lr=1e-2), start, gradients, compiled)


def test_465_groups_with_rates_of_their_own_are_one_launch(compiled):
    def make(params):
        return optim.AdamW([{"params": [p], "lr": 1e-3 * (1 + k)} for k, p in enumerate(params)])

    opt, _ = check(make, compiled, shapes=[(64,)] * 465)
    assert opt.explain().launches == 1


@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
def test_10_000_tensors_have_the_bits_of_their_elements_in_one(misaligned, compiled):
    start, gradients = problem([(10_000 * 64,)], steps=3)
    _, [whole] = compiled_steps(optim.AdamW, start, gradients, compiled)
    pieces = start[0].split(64), [g.split(64) for [g] in gradients]
    _, parts = compiled_steps(optim.AdamW, *pieces, compiled, misaligned=misaligned)
    assert_same_bits(torch.cat(parts), whole)


# --
# Mutations


def test_mutation_a_rate_one_percent_too_high_is_noticed(compiled):
    rates = [lambda params, lr=lr: optim.AdamW(params, lr=lr) for lr in (1e-2, 1.01e-2)]
    for dtype in DTYPES:
        check(rates[0], compiled, dtype)
        with pytest.raises(AssertionError, match=r"above|not eager"):
            check(rates[0], compiled, dtype, wrong=rates[1])


def test_mutation_a_small_change_of_all_elements_is_noticed_in_16_bits():
    truth = torch.linspace(1, 2, 1000, dtype=torch.float64)
    eager = truth.bfloat16()
    shifted = (eager.view(torch.int16) + 1).view(torch.bfloat16)
    assert_close_to_float64(shifted, eager, truth)
    with pytest.raises(AssertionError, match="not eager torch's"):
        assert_competes([shifted], [eager], [truth])


@pytest.mark.parametrize("at", [-1, 5])
def test_mutation_a_write_outside_of_a_tensor_is_noticed(at):
    memory = Memory()
    held = memory.hold(torch.ones(5), offset=1)
    assert held.data_ptr() % 16 == 4
    memory.check()
    held.as_strided((7,), (1,), held.storage_offset() - 1)[at + 1] = 0.0
    with pytest.raises(AssertionError, match="4 bytes outside"):
        memory.check()
