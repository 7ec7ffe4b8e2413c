"""Loaders for training and validation in one object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader


class DataLoaders:
    """Loaders under the names that fastai's ``DataLoaders`` has for them: ``train``, ``valid``, and ``dls[i]``.

    A pair of loaders is as good for a Learner. This is for what goes with them.

    Args:
        loaders: for training, for validation, and any others.
        path: where the Learner puts files.
        n_inp: how many of a batch's parts are inputs; None: all but the last.
        vocab: names of classes.
    """

    def __init__(
        self, *loaders: Any, path: str | Path = ".", n_inp: int | None = None, vocab: Any = None
    ) -> None:
        self.loaders, self.path = list(loaders), Path(path)
        if n_inp is not None:
            self.n_inp = n_inp
        if vocab is not None:
            self.vocab = vocab

    @classmethod
    def from_dsets(cls, *dsets: Any, bs: int = 64, path: str | Path = ".", **kwargs: Any) -> DataLoaders:
        """Loaders of these ``dsets`` in batches of ``bs``: the first shuffles, and drops what makes no whole batch.

        ``path`` is as for the class; ``kwargs`` are of torch's DataLoader, for all of them.
        """
        first = {"shuffle": True, "drop_last": True}
        return cls(
            *(DataLoader(ds, bs, **{**({} if i else first), **kwargs}) for i, ds in enumerate(dsets)),
            path=path,
        )

    @property
    def train(self) -> Any:
        """The loader for training."""
        return self.loaders[0]

    @property
    def valid(self) -> Any:
        """The loader for validation."""
        return self.loaders[1]

    @property
    def train_ds(self) -> Any:
        """The dataset that is trained on."""
        return self.train.dataset

    @property
    def valid_ds(self) -> Any:
        """The dataset for validation."""
        return self.valid.dataset

    def __getitem__(self, i: int) -> Any:
        return self.loaders[i]

    def __len__(self) -> int:
        return len(self.loaders)

    def __repr__(self) -> str:
        return f"DataLoaders({', '.join(f'{len(dl)} batches' for dl in self.loaders)})"
