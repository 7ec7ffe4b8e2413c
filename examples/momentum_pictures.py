"""What momentum sees: noisy values, and their moving averages as the optimizer's callbacks keep them.

After chapter 16 of "Deep Learning for Coders" and the course's lesson on optimizers. A parameter that is never moved is
given the values as its gradients, one per step; ``grad_avg`` in its state is the moving average.

    python examples/momentum_pictures.py --out demo_output
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

import fusedopt

BETAS = (0.5, 0.7, 0.9, 0.99)
ROWS = (
    ("sum", "not dampened:\nm ← β m + g"),
    ("average", "dampened:\nm ← β m + (1 − β) g"),
    ("debiased", "and debiased:\nm / (1 − βⁿ)"),
)


def noisy_values(n: int = 150, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Points beside the curve ``1 - (x / 3)**2``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(-4, 4, n)
    return x, 1 - (x / 3) ** 2 + 0.3 * torch.randn(n, generator=generator)


def moving_averages(values: torch.Tensor, beta: float, kind: str) -> torch.Tensor:
    """The optimizer's ``grad_avg`` after each value; `kind` is the first in a row of `ROWS`."""
    p = torch.nn.Parameter(torch.zeros(()))
    average_grad = partial(fusedopt.callbacks.average_grad, dampening=kind != "sum")
    opt = fusedopt.Optimizer([p], cbs=[average_grad], lr=0.0, mom=beta)
    seen = []
    for value in values:
        p.grad = value.clone()
        opt.step()
        seen.append(opt.state[p]["grad_avg"].clone())
    debias = 1 - beta ** torch.arange(1, len(values) + 1)
    return torch.stack(seen) / (debias if kind == "debiased" else 1)


def draw(betas: Sequence[float] = BETAS) -> Figure:
    """A column per beta, a row per kind of average."""
    x, values = noisy_values()
    figure = Figure(figsize=(9.2, 5.4), layout="constrained")
    axes = figure.subplots(len(ROWS), len(betas), sharex=True, squeeze=False)
    for row, (kind, label) in zip(axes, ROWS, strict=True):
        row[0].set_ylabel(label)
        for ax, beta in zip(row, betas, strict=True):
            ax.scatter(x, values, s=5, color="0.65", linewidths=0)
            ax.plot(x, moving_averages(values, beta, kind), color="tab:red")
            if kind != "sum":
                ax.set_ylim(-1.5, 1.8)
    for ax, beta in zip(axes[0], betas, strict=True):
        ax.set_title(f"β = {beta}")
    return figure


def save(figure: Figure, path: Path) -> Path:
    """As a PNG of a few colours, which is a third of the size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    with Image.open(path) as image:
        image.convert("RGB").quantize(32).save(path, optimize=True)
    print(f"picture: {path}")
    return path


def main(out: Path) -> Path:
    """Save momentum.png in a folder, and return where it is."""
    return save(draw(), out / "momentum.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    main(parser.parse_args().out)
