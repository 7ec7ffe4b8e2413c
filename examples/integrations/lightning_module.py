"""Lightning: a Trainer steps, clips and schedules, and resumes from its checkpoint.

python examples/integrations/lightning_module.py
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path

import lightning
import torch
from comparing import Trained, compare, regression, small_net, weights
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

import fusedopt

EPOCHS, BATCHES = 4, 4


class Module(lightning.LightningModule):
    """Its optimizer is made by ``make``."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make, self.net, self.losses = make, small_net(), []

    def training_step(self, batch, _):
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        self.opt = self.make(self.parameters(), lr=1e-3)
        schedule = OneCycleLR(self.opt, 1e-2, total_steps=EPOCHS * BATCHES)
        return {"optimizer": self.opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(make, epochs: int, save: Path | None = None, load: Path | None = None) -> Module:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Module(make)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        precision="64-true",
        max_epochs=epochs,
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
        loader = DataLoader(TensorDataset(*regression()), batch_size=8)
        trainer.fit(module, loader, ckpt_path=load)
    if save is not None:
        trainer.save_checkpoint(save)
    return module


def train(make) -> Trained:
    """Half of the epochs, and the rest from the checkpoint, in a module and a Trainer that are new."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "half.ckpt"
        first = fit(make, EPOCHS // 2, save=checkpoint)
        rest = fit(make, EPOCHS, load=checkpoint)
    return Trained(first.losses + rest.losses, weights(rest.net.parameters()), rest.opt)


def main() -> dict[str, float]:
    """How far the weights are apart, by optimizer."""
    pairs = {
        "AdamW": (torch.optim.AdamW, fusedopt.optim.AdamW),
        "torch's RAdam by fuse()": (torch.optim.RAdam, fusedopt.fuse(torch.optim.RAdam)),
    }
    return compare(train, pairs, tolerance=1e-9)


if __name__ == "__main__":
    main()
