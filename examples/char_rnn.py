"""A character model of Python's own standard library: text that is always there, learnt in less than a minute.

An LSTM reads modules from end to end, and keeps what it remembers from one batch to the next: `ModelResetter` makes it
forget between them and validation, which is on modules that it has not seen. Its activations are regularized by
`RNNRegularizer`. The optimizer, the loop and the schedule are fusedopt's; no other library but torch is needed.

    python examples/char_rnn.py --epochs 4
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fusedopt.learner import GradientClip, Learner, rnn_cbs

TRAIN = ["argparse", "ast", "dataclasses", "datetime", "enum", "pathlib", "shutil", "zipfile"]
VALID = ["functools", "textwrap"]
CHARACTERS = 128
"""ASCII; others are a question mark."""

# ------------------------------------------------------------------------------------------------------------
# Text


def source(modules: list[str]) -> torch.Tensor:
    """The characters of these modules, one after another."""
    folder = Path(os.__file__).parent
    text = "".join((folder / f"{name}.py").read_text("utf-8") for name in modules)
    return torch.tensor(list(text.encode("ascii", "replace")))


def loader(text: torch.Tensor, bs: int, length: int) -> DataLoader:
    """Batches of pieces of so many characters; the target of each is the next. A row goes on in the next batch's."""
    n = (len(text) - 1) // (bs * length)
    rows = (t[: n * bs * length].view(bs, n, length).transpose(0, 1) for t in (text[:-1], text[1:]))
    return DataLoader(TensorDataset(*(t.reshape(n * bs, length) for t in rows)), batch_size=bs)


# ------------------------------------------------------------------------------------------------------------
# Model


class CharModel(nn.Module):
    """Predicts each next character; returns activations before and after dropout with it, for `RNNRegularizer`."""

    def __init__(self, width: int, p: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, width // 2)
        self.lstm = nn.LSTM(width // 2, width, batch_first=True)
        self.drop = nn.Dropout(p)
        self.head = nn.Linear(width, CHARACTERS)
        self.reset()

    def reset(self) -> None:
        """Forget what was read."""
        self.memory: tuple[torch.Tensor, ...] | None = None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raw, memory = self.lstm(self.embed(x), self.memory)
        self.memory = tuple(t.detach() for t in memory)
        out = self.drop(raw)
        return self.head(out), raw, out


def loss_func(pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(pred.flatten(0, 1), y.flatten())


@torch.no_grad()
def sample(model: CharModel, start: str, n: int, temperature: float = 0.6) -> str:
    """So many characters that the model finds likely, after these."""
    model.eval()
    model.reset()
    read = torch.tensor([list(start.encode())])
    for _ in range(n):
        scores = model(read)[0][0, -1] / temperature
        read = torch.multinomial(scores.softmax(0), 1)[None]
        start += chr(int(read))
    model.reset()
    return start


# ------------------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class Found:
    """What `main` returns: bits per character of modules that were not trained on, and what the model writes."""

    before: float
    after: float
    text: str


def bits(learn: Learner) -> float:
    return learn.validate()[0] / math.log(2)


def main(
    epochs: int = 4,
    width: int = 128,
    bs: int = 16,
    length: int = 64,
    train: list[str] = TRAIN,
    valid: list[str] = VALID,
    seed: int = 0,
) -> Found:
    """Train on some modules and see what has been learnt of others."""
    torch.manual_seed(seed)
    dls = [loader(source(modules), bs, length) for modules in (train, valid)]
    cbs = [*rnn_cbs(alpha=0.1, beta=0.1), GradientClip(1.0)]
    learn = Learner(dls, CharModel(width), loss_func, cbs=cbs)
    before = bits(learn)
    learn.fit_one_cycle(epochs, lr_max=0.01)
    after = bits(learn)
    text = sample(learn.model, "    def ", 300)
    print(f"bits per character of {', '.join(valid)}: {before:.2f} before, {after:.2f} after\n\n{text}")
    return Found(before, after, text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # steps in time are small and follow each other: a second thread would only wait
    main(args.epochs, seed=args.seed)
