"""accelerate: a training loop with accumulated gradients, clipping and a schedule, saved half way and resumed.

python examples/integrations/accelerate_loop.py
"""

from __future__ import annotations

import tempfile

import torch
from accelerate import Accelerator
from comparing import Trained, compare, regression, small_net, weights
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

import fusedopt

EPOCHS, BATCHES, ACCUMULATE = 4, 8, 2


def train(make) -> Trained:
    """Half of the epochs, then the other half by objects that are new and loaded from a file."""
    with tempfile.TemporaryDirectory() as folder:
        first = half(make, load=None, save=folder)
        rest = half(make, load=folder, save=None)
    return Trained(first.losses + rest.losses, rest.weights, rest.opt)


def half(make, load: str | None, save: str | None) -> Trained:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    model = small_net()
    opt = make(model.parameters(), lr=1e-3)
    schedule = OneCycleLR(opt, 1e-2, total_steps=EPOCHS * BATCHES // ACCUMULATE)
    loader = DataLoader(TensorDataset(*regression()), batch_size=4)
    model, opt, loader, schedule = accelerator.prepare(model, opt, loader, schedule)
    if load is not None:
        accelerator.load_state(load)
    losses = []
    for _ in range(EPOCHS // 2):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                opt.step()
                schedule.step()
                opt.zero_grad()
            losses.append(loss.item())
    if save is not None:
        accelerator.save_state(save)
    return Trained(losses, weights(model.parameters()), opt.optimizer)


def main() -> dict[str, float]:
    """How far the weights are apart, by optimizer."""
    pairs = {
        "AdamW": (torch.optim.AdamW, fusedopt.optim.AdamW),
        "torch's Adamax by fuse()": (torch.optim.Adamax, fusedopt.fuse(torch.optim.Adamax)),
    }
    return compare(train, pairs, tolerance=1e-9)


if __name__ == "__main__":
    main()
