"""What each of two processes does for tests/test_wrappers.py; a module of its own, so that a spawned one can import it.

The same functions with ``rank=None`` are the single process to compare with.
"""

import copy
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fusedopt

with warnings.catch_warnings():
    # torch scripts functions when this is imported, and deprecates that itself
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

WORLD = 2
STEPS = 4
GROUPS = 5  # of one parameter each: more than there are parameters on a rank
RULES = {"AdamW": dict(lr=0.05), "NAdam": dict(lr=0.05)}


def small_model() -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 1)
    return nn.Sequential(*layers).double()


def batch(t: int, rank: int | None) -> torch.Tensor:
    """Step t's inputs: all of them, or a rank's half."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    return x if rank is None else x.chunk(WORLD)[rank]


def backward(model: nn.Module, t: int, rank: int | None) -> None:
    model.zero_grad()
    model(batch(t, rank)).square().mean().backward()


def values(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def data_parallel(face, rank: int | None = None, **options) -> list[torch.Tensor]:
    """Weights after a training whose gradients are averaged over processes."""
    model = small_model()
    wrapped = model if rank is None else DistributedDataParallel(model, **options)
    opt = face.AdamW(wrapped.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=STEPS)
    for t in range(STEPS):
        backward(wrapped, t, rank)
        opt.step()
        schedule.step()
    return values(model)


def groups_of(model: nn.Module, decay: str) -> list[dict]:
    """One parameter each; the last one's weight decay by the name ``decay``."""
    groups: list[dict] = [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(model.parameters())]
    groups[-1][decay] = 0.2
    return groups


def sharded(face, name: str, rank: int | None = None) -> dict:
    """A training with state spread over processes, half way through resumed from a checkpoint by a new optimizer.

    Learning rates and the last group's weight decay change on every step, as a schedule would change them.
    """

    def make():
        kind = getattr(face, name)
        if rank is None:
            return kind(groups_of(model, "weight_decay"), **RULES[name])
        options = dict(RULES[name], parameters_as_bucket_view=name == "AdamW")
        return ZeroRedundancyOptimizer(groups_of(model, "wd"), optimizer_class=kind, **options)

    def train(steps):
        for t in steps:
            backward(model, t, None)
            for group in opt.param_groups:
                group["lr"] *= 0.9
            opt.param_groups[-1]["weight_decay"] *= 1.5
            opt.step()

    model = small_model()
    opt = make()
    train(range(STEPS))
    for to in range(WORLD if rank is not None else 0):
        opt.consolidate_state_dict(to=to)
        if to == rank:
            saved = opt.state_dict()
    if rank is None:
        saved = opt.state_dict()
    results = {"saved": copy.deepcopy(saved)}
    opt = make()
    opt.load_state_dict(saved)
    train(range(STEPS, 2 * STEPS))
    local = opt if rank is None else opt.optim
    sizes = [len(group["params"]) for group in local.param_groups]
    return results | {"weights": values(model), "sizes": sizes}


def run(rank: int, folder: str) -> None:
    """All that needs two processes; each leaves its results in the folder."""
    torch.set_num_threads(1)
    meeting = dict(init_method=f"file://{folder}/rendezvous", timeout=timedelta(minutes=2))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, **meeting)
    try:
        results = {
            "copied gradients": data_parallel(fusedopt.optim, rank, gradient_as_bucket_view=False),
            "gradients in buckets": data_parallel(fusedopt.optim, rank, gradient_as_bucket_view=True),
            "sharded": {name: sharded(fusedopt.optim, name, rank) for name in RULES},
        }
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
