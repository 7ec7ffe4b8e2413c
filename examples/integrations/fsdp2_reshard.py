"""FSDP2: two processes train shards of a model, save them with torch.distributed.checkpoint, and one process goes on.

    python examples/integrations/fsdp2_reshard.py

The processes are on the CPU and talk by gloo. The checkpoint is in two processes' shards; whoever loads it takes the
parts that are its own, here all of them.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from comparing import Trained, compare, regression, small_net, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fusedopt

WORLD, STEPS = 2, 4
# Processes begin with what takes seconds to import.
multiprocessing.set_forkserver_preload(
    ["torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "fusedopt"]
)


def work(
    rank: int, world: int, make, folder: str, first: int, load: str | None, save: str | None
) -> torch.optim.Optimizer:
    """One process: ``STEPS`` steps from the checkpoint ``load`` on, then a checkpoint, and all weights from rank 0."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting_of_{world}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    torch.manual_seed(0)
    model = small_net()
    mesh = init_device_mesh("cpu", (world,))
    for layer in model:
        if [*layer.parameters()]:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    opt = make(model.parameters(), lr=1e-2)
    if load is not None:
        restore(model, opt, load)
    x, y = (values.chunk(world)[rank] for values in regression())
    losses = []
    for _ in range(first, first + STEPS):
        loss = nn.functional.mse_loss(model(x), y)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
    if save is not None:
        own, state = get_state_dict(model, opt)
        checkpointed(torch.distributed.checkpoint.save, {"model": own, "opt": state}, save)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save((losses, [*whole.values()]), f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()
    return opt


def restore(model: nn.Module, opt: torch.optim.Optimizer, folder: str) -> None:
    """Read the parts of the checkpoint that this process needs, into tensors that are there already."""
    own, state = get_state_dict(model, opt)
    checkpointed(torch.distributed.checkpoint.load, {"model": own, "opt": state}, folder)
    set_state_dict(model, opt, model_state_dict=own, optim_state_dict=state)


def checkpointed(what, states: dict, folder: str) -> None:
    """Without torch's warnings about torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        what(states, checkpoint_id=folder)


def train(make) -> Trained:
    """Two processes, then this one alone."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, found = f"{folder}/checkpoint", Path(folder) / "found.pt"
        given = (WORLD, make, folder, 0, None, checkpoint)
        torch.multiprocessing.start_processes(work, given, nprocs=WORLD, start_method="forkserver")
        before, _ = torch.load(found)
        opt = work(0, 1, make, folder, STEPS, checkpoint, None)
        after, values = torch.load(found)
    return Trained(before + after, weights(values), opt)


def main() -> dict[str, float]:
    """How far the weights are apart, by optimizer."""
    pairs = {
        "AdamW": (torch.optim.AdamW, fusedopt.optim.AdamW),
        "NAdam, a class that is fused": (torch.optim.NAdam, fusedopt.fuse(torch.optim.NAdam)),
    }
    return compare(train, pairs, tolerance=1e-9)


if __name__ == "__main__":
    main()
