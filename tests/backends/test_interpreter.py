"""The interpreter runs every program that is launched, and means by it what its kernel does.

The backend of these tests interprets each row of a launch, then runs the kernel, then compares the memory: whatever the
optimizer launches, the global norm's programs and steps that are skipped among it.
"""

import ctypes
import math
from typing import ClassVar

import pytest
import torch
from helpers import assert_same_bits
from test_ops import LIBRARY

import fusedopt
from fusedopt import backends, table
from fusedopt.backends.cpp import backend as cpu
from fusedopt.extension import leaf
from fusedopt.ir.ops import is_reduction
from fusedopt.ir.program import interpret
from fusedopt.step import buckets, scaling

SIZES = (3, 0, 100, 65536 + 5)


class CheckedLaunch(cpu.Launch):
    """Notes the programs that it ran."""

    ran: ClassVar[list] = []

    def planned(self, slots):
        return None  # or others would run it

    def native(self):
        return None

    def run(self, slots):
        program, expected = self.kernel.program, []
        for row in self.rows.tolist():
            before = {name: t.clone() for name, t in self.tensors(row).items()}
            stored = interpret(program, {"param": torch.empty(row[0])} | before, slots[row[1]])
            expected.append(before | stored)
            assert list(stored) == [name for name, _ in program.stores]
        leaf.run_cpu(*super().planned(slots))
        ops = {v.op for v in program.values}
        exact = not any(is_reduction(op) or op in LIBRARY for op in ops)
        compare = assert_same_bits if exact else torch.testing.assert_close
        for row, wanted in zip(self.rows.tolist(), expected, strict=True):
            for name, t in self.tensors(row).items():
                compare(t, wanted[name])
        self.ran.append(program)

    def tensors(self, row):
        """What lies in a row's memory."""
        found = {}
        for (name, buffer), address in zip(self.kernel.program.buffers, row[4:], strict=True):
            shape = (row[0],) if buffer.kind == "F" else ()
            size = math.prod(shape) * buffer.dtype.itemsize
            memory = (ctypes.c_char * size).from_address(address) if size else bytearray()
            found[name] = (
                torch.frombuffer(memory, dtype=buffer.dtype) if size else torch.empty(0, dtype=buffer.dtype)
            )
            found[name] = found[name].view(shape)
        return found


class Checked(cpu.Cpp):
    def prepare(self, *rows, **how):
        return CheckedLaunch(*rows, **how)


@pytest.fixture
def launch(monkeypatch):
    """The checked launches of this test."""
    monkeypatch.setitem(backends.made, "cpp", Checked())
    monkeypatch.setattr(buckets, "known_traces", lambda *args: {})
    monkeypatch.setattr(CheckedLaunch, "ran", [])
    return CheckedLaunch


def parameters(dtype=torch.float32, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return params


def step(opt, params, skipped=(), resting=()):
    """Three steps; those are skipped whose numbers are given. ``resting``: further ones in which parameters stay."""
    for k in range(3):
        if skipped:
            opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(float(k in skipped))
        before = [p.detach().clone() for p in params]
        opt.step()
        same = all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
        assert same == (k in (*skipped, *resting))


@pytest.mark.parametrize("skips", [False, True], ids=["plain", "skips"])
@pytest.mark.parametrize("row", table.rows(calls=False), ids=lambda row: f"{row.face}-{row.name}")
def test_launches_of_named_optimizers_are_what_is_interpreted(launch, row, skips):
    """As they are, and with everything on the device: counts, bias corrections, the global norm, whether to skip."""
    params = parameters()
    options = dict(amp_fused=True, max_grad_norm=1.0) if skips else {}
    opt = row.factory(params, **row.variants[0].kwargs | options)
    step(opt, params, skipped=(1,) if skips else (), resting=(0,) if row.rests_first else ())
    stepping = [p for p in launch.ran if any(n == "param" or n.startswith("state.") for n, _ in p.stores)]
    assert len(stepping) == 3 and len(launch.ran) >= (9 if skips else 3)
    assert any(program.skip is not None for program in launch.ran) == skips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_programs_of_the_global_norm_are_interpreted(launch, dtype):
    """One gradient a row, each of another length; then one row, of as many elements as there were gradients."""
    params = parameters(dtype)
    step(fusedopt.SGD(params, lr=0.1, max_grad_norm=1.0), params)
    assert len(launch.ran) == 9
    assert launch.ran[::3] == [scaling.squares(dtype)] * 3
    assert launch.ran[1::3] == [scaling.coefficient()] * 3


def test_numbers_alone_are_counted_by_the_elements_of_the_parameter(launch):
    def total(p, lr, total=None, **kwargs):
        return {"total": torch.full_like(p.grad, lr).sum()}

    params = parameters(sizes=(3, 5))
    opt = fusedopt.Optimizer(params, total, lr=0.5)
    opt.step()
    assert [[b.kind for _, b in program.buffers] for program in launch.ran] == [["S"]]
    assert [opt.state[p]["total"].item() for p in params] == [1.5, 2.5]


def test_a_launch_that_is_not_what_is_interpreted_is_noticed(launch, monkeypatch):
    wrong = cpu.skeleton("cpu.cpp").replace("a + b; }", "a + b + 1; }").replace("joined;", "joined + 1;")
    assert wrong != cpu.skeleton("cpu.cpp")
    monkeypatch.setattr(cpu, "skeleton", lambda name: wrong)
    params = parameters()
    with pytest.raises(AssertionError, match="not close"):
        fusedopt.SGD(params, lr=0.1, max_grad_norm=1.0).step()
