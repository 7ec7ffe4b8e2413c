"""Ray Train: two workers on this machine, whose gradients are averaged, report losses and leave a checkpoint.

python examples/integrations/ray_train.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import torch
from comparing import Trained, compare, regression, small_net, weights

import fusedopt

WORLD, STEPS = 2, 8


def loop(config: dict) -> None:
    """What each worker does."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ray.train.torch.prepare_model(small_net(), move_to_device=False)
    opt = config["make"](model.parameters(), lr=1e-2)
    rank = ray.train.get_context().get_world_rank()
    x, y = (values.chunk(WORLD)[rank] for values in regression())
    losses = []
    for _ in range(STEPS):
        loss = torch.nn.functional.mse_loss(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    with tempfile.TemporaryDirectory() as folder:
        torch.save((losses, weights(model.parameters()), opt), f"{folder}/found.pt")
        ray.train.report({"loss": losses[-1]}, checkpoint=ray.train.Checkpoint(folder) if rank == 0 else None)


def train(make) -> Trained:
    """The first worker's losses, weights and optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        result = ray.train.torch.TorchTrainer(
            loop,
            train_loop_config={"make": make},
            scaling_config=ray.train.ScalingConfig(num_workers=WORLD),
            torch_config=ray.train.torch.TorchConfig(backend="gloo"),
            run_config=ray.train.RunConfig(name="small", storage_path=folder),
        ).fit()
        with result.checkpoint.as_directory() as checkpoint:
            losses, values, opt = torch.load(Path(checkpoint) / "found.pt", weights_only=False)
    return Trained(losses, values, opt)


def main() -> dict[str, float]:
    """How far the weights are apart, by optimizer."""
    here = os.path.dirname(os.path.abspath(__file__))
    paths = [here, os.path.dirname(os.path.dirname(fusedopt.__file__))]
    ray.init(num_cpus=WORLD + 1, include_dashboard=False, log_to_driver=False,
             runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}})  # fmt: skip
    try:
        pairs = {"AdamW": (torch.optim.AdamW, fusedopt.optim.AdamW)}
        return compare(train, pairs, tolerance=1e-9)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
