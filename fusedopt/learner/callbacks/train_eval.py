"""Training and validation mode, and how far training has come."""

from __future__ import annotations

import torch

from ..callback import Callback


class TrainEval(Callback):
    """Sets the model's mode, and counts: ``train_iter`` batches so far, ``pct_train`` of all of them, from 0 to 1."""

    order, run_valid = -10, False

    def before_fit(self) -> None:
        self.learn.epoch, self.learn.loss = 0, torch.tensor(0.0)
        self.learn.train_iter, self.learn.pct_train = 0, 0.0
        if hasattr(self.model, "reset"):
            self.model.reset()

    def before_train(self) -> None:
        self.learn.pct_train = self.epoch / self.n_epoch
        self.model.train()
        self.learn.training = True

    def after_batch(self) -> None:
        learn = self.learn
        learn.pct_train += 1.0 / (learn.n_iter * learn.n_epoch)
        learn.train_iter += 1

    def before_validate(self) -> None:
        self.model.eval()
        self.learn.training = False
