"""DTensor parameters in two processes: each steps its shard as if it had the whole model."""

import json
import subprocess
import sys

import distributed_workers
import pytest
import torch


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
