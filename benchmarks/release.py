"""What ``opt.release_gradients()`` saves in memory and costs in time: ``python -m benchmarks.release``.

A small GPT and a small ResNet train with AdamW: as ever (*plain*), with released gradients in batches of the default
size, and with every parameter stepped on its own; both plain and released with loss scaling in the kernel; and with
torch's fused AdamW, plain and as torch's tutorial has it, with an optimizer for each parameter that its hook steps. All
of them are in one process, in turns, each on a model of its own; the time is that of a whole training step. Live
gradients are counted when a gradient is complete, before it is used. By how much a training step raises the process's
resident memory is measured in a fresh process each, which gives freed blocks back at once.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedopt.optim as optim

from .measure import ROOT, peak_growth
from .timing import machine

GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc keeps freed blocks of up to 32 MB, as it likes; with this none of 64 KiB and more."""
WAYS = (
    *("plain", "released", "released, each on its own", "scaled", "released, scaled"),
    *("torch fused", "torch fused in hooks"),
)


class Block(nn.Module):
    """Attention and a network of two layers, each beside the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder whose embedding is its last layer too."""

    def __init__(self, words: int = 4096, width: int = 256, blocks: int = 8, length: int = 64) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.blocks(self.words(x) + self.places.weight[: x.shape[1]])
        return F.linear(self.norm(hidden), self.words.weight)


class Residual(nn.Module):
    """Two convolutions beside the stream, which becomes narrower and deeper with a stride of 2."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.along = nn.Conv2d(before, after, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.along(x) + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def resnet() -> nn.Module:
    """A small ResNet of 2.8 million parameters."""
    widths = [32, 32, 64, 64, 128, 128, 256, 256]
    pairs = zip([32, *widths], widths, strict=False)
    blocks = [Residual(a, b, 1 if a == b else 2) for a, b in pairs]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), *blocks, *head)


def gpt_batch() -> tuple[Tensor, Tensor]:
    x = torch.randint(4096, (2, 65))
    return x[:, :-1], x[:, 1:].flatten()


def resnet_batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3, 32, 32), torch.randint(10, (8,))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "GPT": (GPT, gpt_batch),
    "ResNet": (resnet, resnet_batch),
}


def hook_own(p: Tensor) -> None:
    """Give the parameter an optimizer of its own, and have it stepped in backward."""
    opt = torch.optim.AdamW([p], lr=1e-3, fused=True)

    def step(_: Tensor) -> None:
        opt.step()
        opt.zero_grad()

    p.register_post_accumulate_grad_hook(step)


class Training:
    """A model that trains on one batch."""

    def __init__(self, name: str, how: str) -> None:
        make, batch = MODELS[name]
        torch.manual_seed(0)
        self.model, (self.x, self.y) = make(), batch()
        self.params = list(self.model.parameters())
        self.live = 0
        self._hooks = [p.register_post_accumulate_grad_hook(self._count) for p in self.params]
        self.opt: torch.optim.Optimizer | None = None
        self.scaler = torch.amp.GradScaler("cpu", enabled="scaled" in how)
        if how == "torch fused":
            self.opt = torch.optim.AdamW(self.params, lr=1e-3, fused=True)
        elif how == "torch fused in hooks":
            for p in self.params:
                hook_own(p)
        else:
            self.opt = ours = optim.AdamW(self.params, lr=1e-3, amp_fused="scaled" in how)
            if "released" in how:
                size = 0 if "on its own" in how else None
                ours.release_gradients(size, scaler=self.scaler, skip="batches")

    def step(self) -> None:
        loss = F.cross_entropy(self.model(self.x).flatten(0, -2), self.y)
        self.scaler.scale(loss).backward()
        if self.opt is not None:
            self.scaler.step(self.opt)
            self.scaler.update()
            self.opt.zero_grad()

    def _count(self, _: Tensor) -> None:
        self.live = max(self.live, sum(p.grad.nbytes for p in self.params if p.grad is not None))

    def counted(self) -> int:
        """The most bytes of gradients that were alive in a step. From then on nobody counts."""
        self.step()
        for hook in self._hooks:
            hook.remove()
        return self.live


def compare(name: str, rounds: int = 30) -> None:
    """Print what each way takes."""
    runs = {how: Training(name, how) for how in WAYS}
    live = {how: run.counted() for how, run in runs.items()}
    for run in runs.values():
        run.step()  # which binds
    times: dict[str, list[float]] = {how: [] for how in WAYS}
    order = list(WAYS)
    for _ in range(rounds):
        random.shuffle(order)
        for how in order:
            start = time.perf_counter()
            runs[how].step()
            times[how].append(time.perf_counter() - start)
    params = runs["plain"].params
    for how, run in runs.items():
        assert "torch" in how or all(map(torch.equal, params, run.params)), how
    print(f"{name}: {sum(p.numel() for p in params) / 1e6:.1f} million parameters in {len(params)} tensors")
    for how, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, times["plain"], strict=True))
        command = [sys.executable, "-m", "benchmarks.release", name, how]
        found = subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=ROOT, env=os.environ | GIVEN_BACK
        )
        print(
            f"  {how}: {statistics.median(taken) * 1e3:.1f} ms, {ratio:.3f} of plain; {live[how] / 1e6:.1f} MB of "
            f"gradients at once, {int(found.stdout) / 1e6:.1f} MB more resident in a step"
        )


def growth(name: str, how: str) -> int:
    """By how many bytes a training step raises the resident memory, at its peak."""
    run = Training(name, how)
    for _ in range(3):
        run.counted()
    return peak_growth(run.step)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:]:
        print(growth(*sys.argv[1:]))
    else:
        print(machine())
        for name in MODELS:
            compare(name)
