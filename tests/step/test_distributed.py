"""DTensor parameters in two processes: each steps its shard as if it had the whole model."""

import json
import subprocess
import sys
from functools import partial

import distributed_workers
import pytest
import torch
from torch.utils._pytree import tree_map_only

import fusedopt


@pytest.fixture(scope="module")
def results(compile_cache, tmp_path_factory):
    """What each of two processes found in each check; all in one go, for their start takes the longest."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(distributed_workers.main, (2, str(folder)), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", distributed_workers.CHECKS)
def test_in_two_processes(results, name):
    for rank, found in enumerate(results):
        assert name in found, "did not run: a check before it failed"
        assert not found[name], f"process {rank}: {found[name]}"


def test_importing_fusedopt_does_not_import_dtensors():
    """It would take seconds, and change which of torch's own optimizers take their foreach path."""
    program = "import sys, fusedopt; assert 'torch.distributed.tensor' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


class Wrapped(torch.Tensor):
    """A tensor whose elements are in another one, as a DTensor's are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrap = partial(tree_map_only, cls, lambda t: t.inner)
        out = func(*unwrap(args), **unwrap(kwargs or {}))
        if func._schema.is_mutable:
            return args[0]
        return tree_map_only(torch.Tensor, cls, out)


@pytest.mark.parametrize("wrapped", ["parameter", "gradient"])
def test_a_tensor_without_memory_of_its_own_is_stepped_eagerly(wrapped):
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    if wrapped == "parameter":
        p = torch.nn.Parameter(Wrapped(torch.ones(3)))
    ours, plain = fusedopt.Adam([p], lr=0.1), fusedopt.Adam([q], lr=0.1)
    p.grad, q.grad = Wrapped(torch.ones(3)), torch.ones(3)
    assert p.grad.data_ptr() == 0
    with pytest.warns(RuntimeWarning, match="tensors of type Wrapped are stepped unfused"):
        ours.step()
    ours.step()
    plain.step(), plain.step()
    torch.testing.assert_close(p.inner if wrapped == "parameter" else p.data, q.data)
