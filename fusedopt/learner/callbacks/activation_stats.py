"""What the activations of a model look like while it trains, and three pictures of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..batches import mapped
from ..callback import Callback
from ..hooks import Hooks

NEAR_ZERO = 0.05
"""What fastai takes for a dead activation: up to here, all negative ones included."""
BINS, SPAN = 40, 10.0
"""Of the histograms of absolute values: as many bars, up to here."""


class ActivationStats(Callback):
    """Mean, standard deviation, share of near-zero activations and histogram of layers, for each batch of training.

    As in fastai: ``modules`` to look at (default: every layer with parameters of its own and no layers inside), and
    only each ``every``-th batch; as in the course: ``mod_filter`` chooses among the model's modules instead, for
    example ``lambda m: isinstance(m, nn.ReLU)``. Hooks are removed when a fit ends; a new fit starts anew.

    ``names`` has the layers' names; ``stats[i]`` of layer i is a dict of ``mean``, ``std`` (unbiased: of n values by
    n - 1, so NaN for one), ``near_zero`` (the share of values up to 0.05, and so of all that are negative) and ``hist``
    (40 counts of sizes, without sign, from 0 to 10), each a list with a tensor per batch. All but ``hist`` is as in
    fastai. Of a layer that gives several tensors it is the first (fastai: each), and of one that runs twice in a batch
    there are two (fastai: the last).

    Raises:
        ValueError: ``every`` below 1; when training begins, no layers to look at.
    """

    order = -20

    def __init__(
        self,
        modules: Iterable[nn.Module] | None = None,
        every: int = 1,
        mod_filter: Callable[[nn.Module], bool] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(
                f"every={every}: it is the number of batches from one look to the next, at least 1"
            )
        self.modules, self.every = None if modules is None else list(modules), every
        self.mod_filter = mod_filter or _has_own_params
        self.names: list[str] = []
        self.stats: list[dict[str, list[torch.Tensor]]] = []
        self.hooks: Hooks | None = None

    def before_train(self) -> None:
        # Not before_fit, which validating and predicting between fits have too: statistics stay until the next fit.
        if self.hooks is None:
            self._start()

    def _start(self) -> None:
        names = {module: name for name, module in self.model.named_modules()}
        chosen = [m for m in names if self.mod_filter(m)] if self.modules is None else self.modules
        if not chosen:
            raise ValueError("ActivationStats has no layer to look at: pass modules or another mod_filter")
        self.names = [f"{names.get(m, '')} {type(m).__name__}".strip() for m in chosen]
        self.stats = [{"mean": [], "std": [], "near_zero": [], "hist": []} for _ in chosen]
        of = dict(zip(chosen, self.stats, strict=True))
        self.hooks = Hooks(chosen, lambda module, _, output: self._look(of[module], output))

    def clean_up(self) -> None:
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None

    def _look(self, stats: dict[str, list[torch.Tensor]], output: Any) -> None:
        if not self.training or self.train_iter % self.every:
            return
        x = _first_tensor(output)
        if x is None:
            return
        x = x.float()
        several = x.numel() > 1  # torch warns of the deviation of one value
        std, mean = torch.std_mean(x) if several else (x.new_full((), math.nan), x.mean())
        # They stay on their device: asking for numbers now would make the host wait in every layer.
        stats["mean"].append(mean)
        stats["std"].append(std)
        stats["near_zero"].append((x <= NEAR_ZERO).float().mean())
        stats["hist"].append(x.abs().histc(BINS, 0, SPAN))

    def _curve(self, i: int, what: str) -> list[Any]:
        """One statistic of a layer, batch by batch."""
        found = self.stats[i][what]
        return torch.stack(found).tolist() if found else []

    def layer_stats(self, idx: int) -> list[list[float]]:
        """Means, standard deviations and near-zero shares of layer ``idx`` (fastai's name)."""
        return [self._curve(idx, what) for what in ("mean", "std", "near_zero")]

    def hist(self, idx: int) -> torch.Tensor:
        """The histograms of layer ``idx`` by the logarithm, ``log(1 + count)``: sizes by batches (fastai's name)."""
        seen = self.stats[idx]["hist"] or [torch.zeros(BINS)]  # a layer may have had no turn
        return torch.stack(seen).cpu().T.log1p()

    # -- pictures --
    def plot_stats(self) -> Any:
        """Means beside standard deviations of all layers, by batch. Returns the two Axes."""
        axes = self._subplots(1, 2, (11, 3.6))
        for ax, what, title in zip(axes, ("mean", "std"), ("mean", "standard deviation"), strict=True):
            for i, name in enumerate(self.names):
                ax.plot(self._curve(i, what), label=name, linewidth=1)
            ax.set(title=f"{title} of activations", xlabel=self._batches)
        axes[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        return axes

    def color_dim(self) -> Any:
        """How the sizes of each layer's activations are distributed, by batch: bright is many. Returns the Axes."""
        axes = self._grid()
        for i, ax in enumerate(axes):
            image = self.hist(i).numpy()
            ax.imshow(image, origin="lower", aspect="auto", extent=(0, image.shape[1], 0, SPAN))
            ax.set(title=self.names[i], xlabel=self._batches, ylabel="size")
        return axes

    def dead_chart(self) -> Any:
        """Each layer's share of near-zero activations, by batch. Returns the Axes."""
        axes = self._grid()
        for i, ax in enumerate(axes):
            ax.plot(self._curve(i, "near_zero"), linewidth=1)
            ax.set(title=self.names[i], xlabel=self._batches, ylabel="share near zero", ylim=(0, 1))
        return axes

    @property
    def _batches(self) -> str:
        return "batch" if self.every == 1 else f"batch / {self.every}"

    def _grid(self) -> Any:
        """Axes, one per layer, four in a row."""
        columns = min(4, len(self.names))
        rows = -(-len(self.names) // max(columns, 1))
        axes = self._subplots(rows, columns, (3.2 * columns, 2.6 * rows))
        for unused in axes[len(self.names) :]:
            unused.remove()
        return axes[: len(self.names)]

    def _subplots(self, rows: int, columns: int, size: tuple[float, float]) -> Any:
        if not any(stats["mean"] for stats in self.stats):
            raise RuntimeError("ActivationStats has seen no batch: fit with it first")
        import matplotlib.pyplot as plt

        return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)[1].ravel()


def _first_tensor(output: Any) -> torch.Tensor | None:
    found: list[torch.Tensor] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        found.append(x)
        return x

    mapped(output, note)
    return found[0] if found else None


def _has_own_params(module: nn.Module) -> bool:
    return not list(module.children()) and bool(list(module.parameters()))
