"""timm: a small vision transformer with rates that fall layer by layer, timm's schedule and average of weights.

python examples/integrations/timm_vit.py
"""

from __future__ import annotations

from functools import partial

import timm.optim
import torch
from comparing import Trained, compare, weights
from timm.models import create_model
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad

import fusedopt

STEPS = 8


def vit():
    """Two blocks of a transformer that looks at 16 patches of an image of 16 x 16."""
    shape = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=4)
    return create_model("vit_tiny_patch16_224", **shape).double()


def train(make) -> Trained:
    """The weights are those of the model and those of its moving average."""
    model = vit()
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.7
    )  # with lr_scale, which the schedule heeds
    opt = make(groups, lr=2e-3)
    schedule = CosineLRScheduler(opt, t_initial=STEPS, warmup_t=2, warmup_lr_init=1e-4, t_in_epochs=False)
    average = ModelEmaV3(model, decay=0.9)
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(16, 3, 16, 16, generator=gen, dtype=torch.float64)
    y = torch.randint(4, (16,), generator=gen)
    losses = []
    for step in range(STEPS):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), 1.0)
        opt.step()
        average.update(model)
        schedule.step_update(step + 1)
        losses.append(loss.item())
    return Trained(losses, weights([*model.parameters(), *average.module.parameters()]), opt)


def main() -> dict[str, float]:
    """How far the weights are apart, by optimizer."""
    adan = partial(timm.optim.Adan, foreach=False)
    pairs = {
        "AdamW": (torch.optim.AdamW, fusedopt.optim.AdamW),
        "LAMB by fuse()": (timm.optim.Lamb, fusedopt.fuse(timm.optim.Lamb)),
        "Adan by fuse()": (adan, fusedopt.fuse(adan)),
    }
    return compare(train, pairs, tolerance=1e-9)


if __name__ == "__main__":
    main()
