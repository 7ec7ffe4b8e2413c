"""Regularized recurrent models: what they return besides predictions, and what is made of it."""

from __future__ import annotations

import torch

from ..callback import Callback
from .model_resetter import ModelResetter


class RNNCallback(Callback):
    """Takes a model's ``pred, raw_out, out`` apart: activations before and after dropout, of the last layer if listed.

    The first becomes the prediction; the others are here for `RNNRegularizer`.
    """

    raw_out: torch.Tensor
    out: torch.Tensor

    def after_pred(self) -> None:
        last = [x[-1] if isinstance(x, (list, tuple)) else x for x in self.pred]
        self.learn.pred, self.raw_out, self.out = last

    def clean_up(self) -> None:
        self.__dict__.pop("raw_out", None)
        self.__dict__.pop("out", None)


class RNNRegularizer(Callback):
    """Adds activation regularization and temporal activation regularization to what is minimized, not to the ``loss``.

        alpha · mean(out²) + beta · mean((raw_out[:, 1:] − raw_out[:, :-1])²)

    The second needs two points in time; fastai's asks for two items. Merity et al., https://arxiv.org/abs/1708.01009

    Raises:
        ValueError: when a fit begins, without an `RNNCallback`.
    """

    order, run_valid = RNNCallback.order + 1, False

    def __init__(self, alpha: float = 0.0, beta: float = 0.0) -> None:
        self.alpha, self.beta = alpha, beta

    def before_fit(self) -> None:
        if not hasattr(self, "rnn"):
            raise ValueError(
                "RNNRegularizer needs an RNNCallback to hand it activations: use rnn_cbs(alpha, beta)"
            )

    def after_loss(self) -> None:
        if self.alpha:
            self.learn.loss_grad = self.loss_grad + self.alpha * self.rnn.out.float().pow(2).mean()
        raw = self.rnn.raw_out
        if self.beta and raw.shape[1] > 1:
            change = (raw[:, 1:] - raw[:, :-1]).float()
            self.learn.loss_grad = self.loss_grad + self.beta * change.pow(2).mean()


def rnn_cbs(alpha: float = 0.0, beta: float = 0.0) -> list[Callback]:
    """All that a recurrent model needs; regularized unless ``alpha`` and ``beta`` are 0."""
    regularizer = [RNNRegularizer(alpha, beta)] if alpha or beta else []
    return [ModelResetter(), RNNCallback(), *regularizer]
