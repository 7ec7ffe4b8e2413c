"""What is measured: parameter shapes, and which update rule runs on which of them.

Shapes are computed from the models' formulas, so that no model has to be installed; the tests hold them against the
published parameter counts. Not every rule runs on every case: `PAIRS` lists what does.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]

# --
# Shapes


def _conv(inputs: int, outputs: int, size: int) -> list[Shape]:
    """A convolution and the batchnorm behind it."""
    return [(outputs, inputs, size, size), (outputs,), (outputs,)]


def resnet(blocks: Sequence[int], expansion: int, width: int = 64, classes: int = 1000) -> list[Shape]:
    """He et al., arXiv:1512.03385, as torchvision has it. ``expansion`` 1: basic blocks; 4: bottlenecks."""
    shapes, inputs = _conv(3, width, 7), width
    for stage, count in enumerate(blocks):
        inner = width << stage
        outputs = inner * expansion
        for _ in range(count):
            if expansion == 1:
                shapes += _conv(inputs, inner, 3) + _conv(inner, outputs, 3)
            else:
                shapes += _conv(inputs, inner, 1) + _conv(inner, inner, 3) + _conv(inner, outputs, 1)
            if inputs != outputs:
                shapes += _conv(inputs, outputs, 1)
            inputs = outputs
    return [*shapes, (classes, inputs), (classes,)]


def gpt2(layers: int = 12, width: int = 768, words: int = 50257, positions: int = 1024) -> list[Shape]:
    """GPT-2. The output layer is the word embedding itself, which therefore is there once."""
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    feed_forward = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(words, width), (positions, width), *(norm + attention + norm + feed_forward) * layers, *norm]


def mixture_of_experts(
    layers: int = 10, experts: int = 32, width: int = 128, hidden: int = 256
) -> list[Shape]:
    """A stack of attention and gated experts, without embeddings: norm, qkv, output, router, 3 tensors per expert."""
    attention = [(width,), (3 * width, width), (width, width), (experts, width)]
    expert = [(hidden, width), (hidden, width), (width, hidden)]
    return (attention + expert * experts) * layers


def llama(
    layers: int = 16, width: int = 2048, kv: int = 512, hidden: int = 8192, words: int = 128256
) -> list[Shape]:
    """Llama 3.2 1B: grouped-query attention, a gated feed-forward layer, no biases, the embedding tied."""
    attention = [(width, width), (kv, width), (kv, width), (width, width)]
    feed_forward = [(hidden, width), (hidden, width), (width, hidden)]
    return [(words, width), *(attention + feed_forward + [(width,), (width,)]) * layers, (width,)]


# --
# Cases


@dataclass(frozen=True)
class Case:
    """Tensors to step. ``own_groups``: each is a param group of its own, with its own learning rate."""

    name: str
    what: str
    shapes: tuple[Shape, ...]
    own_groups: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def numel(self) -> int:
        """Parameters in all."""
        return sum(map(math.prod, self.shapes))

    def tensors(self, seed: int = 0, device: str = "cpu") -> list[Tensor]:
        """Parameters with gradients, both random."""
        random = torch.Generator(device).manual_seed(seed)
        how = dict(generator=random, device=device, dtype=self.dtype)
        params = [torch.randn(s, **how).mul_(0.1).requires_grad_() for s in self.shapes]
        for p in params:
            p.grad = torch.randn(p.shape, **how).mul_(0.1)
        return params

    def small(self, tensors: int = 8, side: int = 8) -> Case:
        """The same with the first few tensors only, and none of them large: to see that a script works."""
        shapes = [tuple(min(n, side) for n in shape) for shape in self.shapes[:tensors]]
        return replace(self, shapes=tuple(shapes))

    def learning_rates(self) -> list[float]:
        """One per param group, as a multiple of the rule's."""
        n = len(self.shapes)
        return [0.5 + k / n for k in range(n)] if self.own_groups else [1.0]


_SMALL = [(64,)] * 400 + [(64, 64)] * 100
_CASES = (
    ("small-500", "500 small tensors: 400 of 64, 100 of 64×64", _SMALL),
    ("500x64", "500 tensors of 64", [(64,)] * 500),
    (
        "200-mixed",
        "200 tensors: convolutions, matrices, vectors",
        [(8, 8, 3, 3), (16, 16), (64,), (64,)] * 50,
    ),
    ("20x1m", "20 tensors of 1,048,576: bound by memory", [(1 << 20,)] * 20),
    ("resnet-34", "ResNet-34", resnet((3, 4, 6, 3), 1)),
    ("resnet-50", "ResNet-50", resnet((3, 4, 6, 3), 4)),
    ("resnet-50-narrow", "ResNet-50 of a quarter of the width", resnet((3, 4, 6, 3), 4, width=16)),
    ("gpt2-124m", "GPT-2 124M, embedding tied", gpt2()),
    ("moe-1000", "a mixture of experts in 1,000 tensors", mixture_of_experts()),
    ("4x32m", "4 tensors of 33,554,432: bound by a GPU's memory", [(1 << 25,)] * 4),
    ("48-matrices", "the 48 matrices of GPT-2 124M", [s for s in gpt2()[2:] if len(s) > 1]),
    ("10000x64", "10,000 tensors of 64", [(64,)] * 10_000),
    ("1000x1024", "1,000 tensors of 1,024", [(1024,)] * 1000),
    ("tiny", "a linear layer of 64×64 and its bias", [(64, 64), (64,)]),
)
CASES = {name: Case(name, what, tuple(shapes)) for name, what, shapes in _CASES}
CASES["groups-465"] = Case(
    "groups-465",
    "465 tensors of 64×64, each a param group with its own learning rate",
    ((64, 64),) * 465,
    own_groups=True,
)
CASES["llama-1b"] = Case("llama-1b", "Llama 3.2 1B in bfloat16", tuple(llama()), dtype=torch.bfloat16)

# --
# Training


class SmallTensors(nn.Module):
    """A CNN of 100 residual blocks whose parameters are the 500 tensors of ``small-500``, in the order of its layers.

    Each block is pooling (the only look at neighbours), batchnorm, ReLU, a 1×1 convolution, batchnorm.
    """

    image, classes = (64, 8, 8), 64

    def __init__(self, blocks: int = 100, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.AvgPool2d(3, 1, 1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.mean((2, 3))


class Separable(nn.Module):
    """A CNN of depthwise and 1×1 convolutions, all with biases, in 500 tensors of 10 to 432 elements."""

    image, classes = (3, 8, 8), 10

    def __init__(self, blocks: int = 62, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, groups=width),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 1),
                nn.BatchNorm2d(width),
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, self.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class Training:
    """Forward and backward passes of a network on random images: what happens between two steps in real life."""

    def __init__(self, seed: int = 0, network: type[SmallTensors] | type[Separable] = SmallTensors) -> None:
        torch.manual_seed(seed)
        self.model = network()
        self.x, self.y = torch.randn(4, *network.image), torch.randint(network.classes, (4,))

    def tensors(self) -> list[Tensor]:
        """The parameters, with gradients."""
        self.run()
        return list(self.model.parameters())

    def run(self) -> None:
        """One pass: new gradients, in new memory; the caches hold what the passes left there."""
        self.model.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()


# --
# What is measured


@dataclass(frozen=True)
class Pair:
    """A rule on a case, by some providers. ``mode``: ``warm`` (step after step) or ``training`` (between passes)."""

    case: str
    rule: str
    providers: tuple[str, ...]
    mode: str = "warm"
    quick: bool = False

    @property
    def id(self) -> str:
        """Its name on the command line."""
        return f"{self.case}/{self.rule}/{self.mode}"


_TORCH = ("torch default", "torch foreach", "torch fused")
_ALL = (
    "eager",
    "torch loop",
    *_TORCH,
    "torch compiled",
    "deepspeed",
    "bare loop",
    "fusedopt",
)
_SOME = ("eager", *_TORCH, "torch compiled", "deepspeed", "bare loop", "fusedopt")
_PEERS = ("optimi", "heavyball", "pytorch-optimizer", "timm", "transformers", "bitsandbytes", "torchao")
"""Packages beside torch, where there is room for them."""
_FEW = ("torch default", "torch fused", "bare loop", "fusedopt")
_GROUPS = ("torch default", "torch fused", "fusedopt", "fusedopt one group")

PAIRS = (
    Pair("small-500", "AdamW", (*_ALL, *_PEERS), quick=True),
    Pair("small-500", "AdamW", _ALL, "training", quick=True),
    Pair("small-500", "Lion", (*_SOME, *_PEERS)),
    Pair("20x1m", "AdamW", (*_SOME, *_PEERS)),
    Pair("20x1m", "AdamW-int8", (*_PEERS, "fusedopt")),
    *(Pair("resnet-50", rule, (*_SOME, *_PEERS)) for rule in ("AdamW", "SGD-momentum", "RMSprop", "Adagrad")),
    *(Pair("resnet-50", rule, (*_SOME, *_PEERS)) for rule in ("RAdam", "NAdam", "LAMB", "Lion")),
    *(Pair("resnet-50", rule, (*_PEERS, "eager", "fusedopt")) for rule in ("AdaBelief", "Adafactor")),
    *(Pair("resnet-34", rule, _SOME) for rule in ("AdamW", "SGD-momentum")),
    Pair("gpt2-124m", "AdamW", _FEW),
    Pair("moe-1000", "AdamW", _SOME),
    Pair("groups-465", "AdamW", _GROUPS, quick=True),
)
"""What is measured. A provider that has no such rule, or is not there, is left out."""

FIRST_STEPS = (("tiny", "AdamW"), ("small-500", "LAMB"), ("gpt2-124m", "AdamW"))
"""Where the time to the first step is measured."""

MEMORY = (
    ("resnet-50", "AdamW"),
    ("resnet-50-narrow", "AdamW"),
    ("resnet-50", "LAMB"),
    ("resnet-50-narrow", "LAMB"),
)
"""Where memory is measured: the same number of tensors at two sizes, so that what grows with the model stands out."""


def matches(id_: str, pattern: str | None) -> bool:
    """Whether ``--only pattern`` asks for it: a glob for the whole id, or any part of it."""
    if pattern is None:
        return True
    return fnmatch.fnmatch(id_.lower(), pattern.lower()) or pattern.lower() in id_.lower()
