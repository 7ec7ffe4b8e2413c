"""A backend in one file: what a user registers is chosen by name, or tried by auto, and steps like the others."""

import ctypes
import math

import numpy as np
import pytest
import torch

import fusedopt
from fusedopt import backends
from fusedopt.ir.program import interpret


class ToyLaunch:
    """Interprets a program over tables of addresses."""

    movable = True

    def __init__(self, kernel, columns, sizes, sets):
        self.program, self.n_sets = kernel.program, max(sets, default=-1) + 1
        pointers = [[t.data_ptr() for t in columns[name]] for name, _ in self.program.buffers]
        nothing = [0] * len(sizes)
        self.rows = np.array([sizes, sets, nothing, nothing, *pointers], np.int64).T.copy()

    def native(self):
        return None

    def planned(self, slots):
        return None

    def let_go(self):
        pass

    def run(self, slots):
        for size, scalar_set, _, _, *pointers in self.rows.tolist():
            at = {}
            for (name, buffer), pointer in zip(self.program.buffers, pointers, strict=True):
                shape = (size,) if buffer.kind == "F" else ()
                memory = (ctypes.c_char * (math.prod(shape) * buffer.dtype.itemsize)).from_address(pointer)
                at[name] = torch.frombuffer(memory, dtype=buffer.dtype).view(shape)
            for name, value in interpret(self.program, at, slots[scalar_set]).items():
                at[name].copy_(value)


class Toy:
    name, device, native = "toy", "cpu", False

    def __init__(self):
        self.kernels = {}

    def compile(self, program, name, slot_names, device=None):
        kernel = backends.Kernel(self.name, name, program, str(program), "", 0.0, False, None)
        return self.kernels.setdefault(program, kernel)

    def prepare(self, kernel, columns, sizes, sets, resident=False, shapes=()):
        return ToyLaunch(kernel, columns, sizes, sets)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(backends, "ROWS", dict(backends.ROWS))
    monkeypatch.setattr(backends, "made", {})


def stepped(backend):
    params = [
        torch.nn.Parameter(torch.linspace(-1, 1, math.prod(s)).view(s)) for s in ((3,), (300, 500), (7,))
    ]
    opt = fusedopt.Lamb(params, lr=0.1, backend=backend, max_grad_norm=1.0)
    for t in range(5):
        for p in params:
            p.grad = torch.linspace(t, 1, p.numel()).view_as(p)
        params[1].grad = (
            params[1].grad.t().contiguous().t()
        )  # another layout: what is copied has to live long enough
        opt.step()
    return opt, params


def test_a_backend_of_the_users_is_chosen_by_name(registry):
    backends.register("toy", Toy, device="cpu")
    opt, ours = stepped("toy")
    assert opt.explain().backend == "toy" and not opt.explain().eager
    for p, q in zip(ours, stepped("reference")[1], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert stepped("auto")[0].explain().backend == "cpp", "which it comes after"


def test_auto_tries_it_if_it_was_told_so(registry):
    del backends.ROWS["cpp"]
    backends.register("toy", Toy, device="cpu", tried=True)
    assert stepped("auto")[0].explain().backend == "toy"


def test_what_cannot_be_is_refused(registry):
    for name in ("auto", "reference"):
        with pytest.raises(ValueError, match="not the name of a compiled backend"):
            backends.register(name, Toy, device="cpu")
    with pytest.raises(
        ValueError, match="unknown backend 'toy'; this version has auto, cpp, cuda, triton, reference"
    ):
        fusedopt.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, backend="toy")
