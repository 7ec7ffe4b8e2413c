"""Fused classes whose parameters are DTensors, in two processes: each steps its shard as if it had the whole model."""

import json

import distributed_classes
import pytest
import torch


@pytest.fixture(scope="module")
def results(compile_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(distributed_classes.main, (2, str(folder)), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", distributed_classes.CHECKS)
def test_in_two_processes(results, name):
    for rank, found in enumerate(results):
        assert name in found, "did not run: a check before it failed"
        assert not found[name], f"process {rank}: {found[name]}"
