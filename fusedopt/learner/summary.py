"""A table of a model's layers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .batches import mapped, parts
from .hooks import Hooks


class Table(str):
    """Text that is shown as it is, also where only its ``repr`` would be."""

    def __repr__(self) -> str:
        return str(self)


class Summary:
    """What `Learner` can say about its model."""

    model: nn.Module
    dls: Any
    opt: Any
    loss_func: Any
    opt_func: Any
    cbs: list[Any]

    def summary(self) -> Table:
        """Layers in the order they run in: output shape, parameters and whether they are trained; then the totals.

        One batch goes through the model, in evaluation mode; modes and the CPU's random numbers are left as they were.
        Unlike fastai's it shows the layers' own names, counts a shared parameter once, and makes no optimizer.
        """
        with torch.random.fork_rng(devices=[]):  # a loader that shuffles draws a seed
            rows = layer_info(self.model, *self._first_inputs())
        params = list(self.model.parameters())
        total, trained = (
            sum(p.numel() for p in ps) for ps in (params, [p for p in params if p.requires_grad])
        )
        frozen = getattr(self.opt, "frozen_idx", 0)
        lines = [
            *_table([("Layer", "Output shape", "Params", "Trained"), *rows]),
            f"Total params: {total:,}",
            f"Total trainable params: {trained:,}",
            f"Total non-trainable params: {total - trained:,}",
            f"Optimizer: {called(self.opt_func)}",
            f"Loss function: {called(self.loss_func)}",
            *([f"Frozen up to parameter group {frozen}"] if frozen else []),
            f"Callbacks: {', '.join(map(repr, self.cbs))}",
        ]
        return Table("\n".join(lines))

    def _first_inputs(self) -> tuple[Any, ...]:
        device = next((p.device for p in self.model.parameters()), None)
        xb, _ = parts(next(iter(self.dls[0])), getattr(self.dls, "n_inp", None), self.model)
        return mapped(xb, lambda x: x.to(device))


def layer_info(model: nn.Module, *xb: Any) -> list[tuple[str, str, str, str]]:
    """Name and class, output shape, parameters and whether they are trained, of every layer that these inputs run."""
    names = {module: name for name, module in model.named_modules()}
    rows, seen = [], set()

    def add_row(module: nn.Module, input: Any, output: Any) -> None:
        # A container has rows of its own parameters only; its layers have theirs.
        own = [p for p in module.parameters(recurse=False) if p not in seen]
        seen.update(own)
        label = f"{names[module]} ({type(module).__name__})".strip()
        trained = ("yes" if any(p.requires_grad for p in own) else "no") if own else ""
        rows.append((label, _shape(output), f"{sum(p.numel() for p in own):,}" if own else "", trained))

    layers = [m for m in names if not list(m.children()) or list(m.parameters(recurse=False))]
    with _kept_modes(model), Hooks(layers, add_row), torch.no_grad():
        model.eval()(*xb)
    rest = [p for p in model.parameters() if p not in seen]
    if rest:
        trained = "yes" if any(p.requires_grad for p in rest) else "no"
        rows.append(("(in no layer above)", "", f"{sum(p.numel() for p in rest):,}", trained))
    return rows


def _shape(output: Any) -> str:
    if isinstance(output, torch.Tensor):
        return " x ".join(map(str, output.shape))
    return ", ".join(filter(None, map(_shape, output))) if isinstance(output, (tuple, list)) else ""


def _table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    """Aligned, with lines around the head and behind the last row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d:{widths[3]}}".rstrip() for a, b, c, d in rows
    ]
    rule = "-" * max(map(len, lines))
    return [lines[0], rule, *lines[1:], rule]


def called(function: Any) -> str:
    """The name of a function, a partial of one, or a module."""
    function = function.func if isinstance(function, functools.partial) else function
    return getattr(function, "__name__", None) or str(function)


@contextlib.contextmanager
def _kept_modes(model: nn.Module) -> Iterator[None]:
    """In a ``with`` block: afterwards each module is in training or evaluation mode as before."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
