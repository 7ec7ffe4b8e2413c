"""What a classifier gets wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .batches import plain
from .inference import class_names


class Interpretation:
    """A classifier's predictions, of shape (items, classes, ...), beside their targets, with one loss per item.

    Items are numbered as in the predictions. It is fastai's ``ClassificationInterpretation``, but for what that reads
    from fastai's data sets.

    Args:
        preds: scores of classes.
        targs: class numbers.
        losses: of shape (items,).
        vocab: names of classes; None: their numbers.

    Raises:
        ValueError: shapes that do not fit each other, or another number of names than of classes.
    """

    def __init__(
        self,
        preds: torch.Tensor,
        targs: torch.Tensor,
        losses: torch.Tensor,
        vocab: Sequence[Any] | None = None,
    ) -> None:
        preds, targs, losses = map(plain, (preds, targs, losses))
        if preds.ndim < 2:
            raise ValueError(
                f"predictions of shape {tuple(preds.shape)} are no scores of classes: the model has to give "
                "(items, classes)"
            )
        if len(preds) != len(targs) or losses.shape != preds.shape[:1]:
            raise ValueError(
                f"{len(preds)} predictions come with {len(targs)} targets and losses of shape {tuple(losses.shape)}: "
                "give one of each per item; a loss function has to give that with reduction='none'"
            )
        self.preds, self.targs, self.losses = preds, targs, losses
        self.vocab = list(range(preds.shape[1])) if vocab is None else list(vocab)
        if len(self.vocab) != preds.shape[1]:
            raise ValueError(
                f"vocab has {len(self.vocab)} names, and predictions have {preds.shape[1]} classes"
            )

    @classmethod
    def from_learner(
        cls, learn: Any, ds_idx: int = 1, dl: Iterable[Any] | None = None, vocab: Sequence[Any] | None = None
    ) -> Interpretation:
        """From `Learner.get_preds` with a loss for each item: by default of the loader for validation.

        ``learn``, its ``ds_idx``-th loader, or ``dl`` in place of that; ``vocab``: None: the loaders', if there is one.
        """
        preds, targs, losses = learn.get_preds(ds_idx, dl, with_loss=True)
        return cls(preds, targs, losses, class_names(learn.dls) if vocab is None else vocab)

    def confusion_matrix(self) -> torch.Tensor:
        """How many items of each class (rows) were taken for each class (columns)."""
        n = len(self.vocab)
        actual, predicted = self.targs.flatten().long(), self.preds.argmax(1).flatten()
        known = (actual >= 0) & (actual < n)  # a loss may ignore some, such as -100
        return torch.bincount(actual[known] * n + predicted[known], minlength=n * n).view(n, n)

    def most_confused(self, min_val: int = 1) -> list[tuple[Any, Any, int]]:
        """``(actual, predicted, how often)`` of mistakes made at least ``min_val`` times, the most frequent first."""
        matrix = self.confusion_matrix().fill_diagonal_(0)
        found = [(i, j, int(matrix[i, j])) for i, j in (matrix >= max(min_val, 1)).nonzero().tolist()]
        return [(self.vocab[i], self.vocab[j], n) for i, j, n in sorted(found, key=lambda row: -row[2])]

    def top_losses(self, k: int | None = None, largest: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``k`` largest losses (all by default), or smallest, and the numbers of their items."""
        n = len(self.losses)
        return self.losses.topk(n if k is None else min(k, n), largest=largest)

    def plot_confusion_matrix(
        self,
        normalize: bool = False,
        title: str = "Confusion matrix",
        cmap: str = "Blues",
        norm_dec: int = 2,
        plot_txt: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Draw it, with ``normalize`` as shares of the actual class. Returns the Axes; ``kwargs`` are the figure's.

        ``title`` and ``cmap`` are matplotlib's; ``plot_txt``: with the numbers, shares with ``norm_dec`` decimals.
        Where nothing was taken for a class there is no number, so that mistakes stand out.
        """
        import matplotlib.pyplot as plt

        matrix = self.confusion_matrix()
        if normalize:
            matrix = matrix / matrix.sum(1, keepdim=True).clamp_min(1)
        ax = plt.subplots(**{"layout": "constrained", **kwargs})[1]
        ax.imshow(matrix.numpy(), cmap=cmap)
        ticks = range(len(self.vocab))
        ax.set_xticks(ticks, [str(name) for name in self.vocab], rotation=90)
        ax.set_yticks(ticks, [str(name) for name in self.vocab])
        edges = [tick - 0.5 for tick in ticks]
        ax.set_xticks(edges, minor=True)
        ax.set_yticks(edges, minor=True)
        ax.grid(which="minor", color="grey", alpha=0.25, linewidth=0.6)
        ax.tick_params(which="minor", length=0)
        ax.set(title=title, xlabel="Predicted", ylabel="Actual")
        for i, row in enumerate(matrix.tolist() if plot_txt else []):
            for j, value in enumerate(row):
                if not value:
                    continue
                color = "white" if value > matrix.max() / 2 else "black"
                text = f"{value:.{norm_dec}f}" if normalize else str(value)
                ax.text(j, i, text, ha="center", va="center", color=color)
        return ax
