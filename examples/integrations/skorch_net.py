"""skorch: a network as an estimator of scikit-learn's, with a search over the optimizer's settings.

python examples/integrations/skorch_net.py
"""

from __future__ import annotations

import torch
from comparing import Trained, compare, regression, small_net, weights
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetRegressor
from skorch.callbacks import GradientNormClipping, LRScheduler
from torch.optim.lr_scheduler import OneCycleLR

import fusedopt

EPOCHS = 5


def train(make) -> Trained:
    """A fit by the best of two rates, which cross-validation finds, and more of it by ``partial_fit``."""
    cycle = LRScheduler(OneCycleLR, max_lr=0.02, total_steps=200, step_every="batch")
    net = NeuralNetRegressor(
        Net,
        max_epochs=EPOCHS,
        batch_size=8,
        optimizer=make,
        optimizer__weight_decay=0.1,
        optimizer__param_groups=[("*.bias", {"weight_decay": 0.0})],
        callbacks=[("schedule", cycle), ("clip", GradientNormClipping(0.5))],
        iterator_train__shuffle=False,
        verbose=0,
    )
    x, y = regression()
    torch.manual_seed(0)
    search = GridSearchCV(net, {"optimizer__betas": [(0.9, 0.99), (0.5, 0.99)]}, cv=2, scoring="r2")
    search.fit(x.numpy(), y.numpy())
    best = search.best_estimator_.partial_fit(x.numpy(), y.numpy())
    return Trained(best.history[:, "train_loss"], weights(best.module_.parameters()), best.optimizer_)


class Net(torch.nn.Module):
    """A module of its own, for skorch makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x):
        return self.net(x)


def main() -> dict[str, float]:
    """How far the weights are apart, by optimizer."""
    pairs = {
        "AdamW": (torch.optim.AdamW, fusedopt.optim.AdamW),
        "torch's Adamax by fuse()": (torch.optim.Adamax, fusedopt.fuse(torch.optim.Adamax)),
    }
    return compare(train, pairs, tolerance=1e-9)


if __name__ == "__main__":
    main()
