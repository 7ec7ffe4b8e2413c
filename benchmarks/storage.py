"""What each policy of `fusedopt.storage` costs: ``python -m benchmarks.storage`` writes docs/storage_table.md.

AdamW with each policy, and some other rules with some, take a step in turns, on the same 20 tensors of 1 M elements:
whatever else the machine does meets all alike. Ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fusedopt
from fusedopt import optim, rules
from fusedopt.classes.stored import Stored
from fusedopt.optimizer import Optimizer
from fusedopt.storage.callbacks import dtypes, encoded
from fusedopt.storage.policy import POLICIES

from .plot import ROOT, facts
from .timing import Stopwatch

TABLE = ROOT / "docs" / "storage_table.md"
SHAPES = ((1 << 20,),) * 20
THREADS, ROUNDS = (1, 2), 15
WARM = 2
"""Rounds that are not in the medians: their first steps trace, compile and make state."""


def small_rule(p: Any, lr: Any, mean: Any = None, **kwargs: Any) -> Any:
    """A user's: momentum, of which the root is stepped."""
    mean = torch.zeros_like(p) if mean is None else mean
    mean = mean + (p.grad - mean) * 0.1
    p.data.sub_(mean.sign() * mean.abs().sqrt(), alpha=lr)
    return {"mean": mean}


RULES: dict[str, Callable[..., Any]] = {
    "AdamW": lambda params, **o: optim.AdamW(params, lr=1e-4, **o),
    "Lion": lambda params, **o: rules.Lion(params, lr=1e-4, **o),
    "LAMB": lambda params, **o: fusedopt.Lamb(params, lr=1e-4, **o),
    "RAdam": lambda params, **o: optim.RAdam(params, lr=1e-4, **o),
    "torch's Adam, fused": lambda params, **o: fusedopt.fuse(torch.optim.Adam(params, lr=1e-4), **o),
    "a user's": lambda params, **o: Optimizer(params, small_rule, lr=1e-4, **o),
}


class Choice(NamedTuple):
    """A row: a rule, the parameters' dtype, and the policies of parameter and state (None: as they are)."""

    rule: str
    dtype: torch.dtype = torch.float32
    param: str | None = None
    state: str | None = None

    @property
    def storage(self) -> dict[str, str] | None:
        named = {"param": self.param, "*": self.state}
        return {k: v for k, v in named.items() if v} or None

    @property
    def plain(self) -> Choice:
        """What it is compared with: the same rule in float32."""
        return Choice(self.rule)

    def make(self, params: Sequence[nn.Parameter]) -> Any:
        return RULES[self.rule](params, storage=self.storage)


_STATE = [n for n, p in POLICIES.items() if p.state and n != "float32" and not n.startswith("uint8")]
_PARAM = [n for n, p in POLICIES.items() if p.params and p.code == torch.bfloat16]
CHOICES = (
    *(Choice("AdamW", state=name) for name in (None, *_STATE)),
    *(Choice("AdamW", torch.bfloat16, name, "float32") for name in _PARAM),
    *(Choice("AdamW", torch.bfloat16, *pair) for pair in [("bf16+16", "bfloat16_sr"), ("bf16+16", "int8")]),
    *(Choice("AdamW", torch.bfloat16, *pair) for pair in [("bf16+8", "int8"), ("bfloat16_sr", "int8")]),
    *(Choice(rule, state=name) for rule in list(RULES)[1:] for name in (None, "bfloat16_sr", "int8")),
)


# --
# What needs no clock


class Error(NamedTuple):
    """What a policy loses. ``stored``: bytes for each number; ``largest``: relative to its number, in blocks to the
    largest number of the block; ``rms``: root of the mean square, relative to that of the numbers."""

    stored: str
    largest: float
    rms: float


def error(name: str) -> Error:
    """Of numbers with a normal distribution; where none may be below zero, of their squares."""
    policy, generator = POLICIES[name], torch.Generator().manual_seed(0)
    x = torch.randn(1 << 18, generator=generator)
    x = x if name[0] != "u" else x.square()
    noise = 1 + torch.rand(x.shape, generator=generator) if policy.noisy else None
    parts = [
        part.to(dtype) for part, dtype in zip(encoded(policy, x.clone(), noise), dtypes(policy), strict=True)
    ]
    off = policy.decode(*(part.float() for part in parts)).double() - x.double()
    sizes = x.abs()
    if policy.block:
        sizes = sizes.view(-1, policy.block).amax(1).repeat_interleave(policy.block)
    largest = (off / sizes).abs().max().item()
    return Error(f"{_bytes(parts) / x.numel():.4g}", largest, (off.norm() / x.double().norm()).item())


def _parts(state: Any) -> list[Tensor]:
    """The tensors that some state has in memory."""
    found = vars(state).values() if isinstance(state, Stored) else [state]
    return [v for v in found if isinstance(v, Tensor)]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Cost(NamedTuple):
    """``moved``: bytes for each element in a step, gradient included; ``held``: of parameter and state."""

    moved: int
    held: str


def cost(opt: Any) -> Cost:
    """Of an optimizer that has stepped. Raises RuntimeError if some of it runs eagerly."""
    said = opt.explain()
    if said.eager:
        raise RuntimeError(f"{said.eager[0].callback} runs eagerly: {said.eager[0].reason}")
    params = [p for group in opt.param_groups for p in group["params"]]
    kept = [v for p in params for state in opt.state[p].values() for v in _parts(state)]
    held = _bytes([*params, *kept]) / sum(p.numel() for p in params)
    return Cost(said.bytes_per_element, f"{held:.4g}")


# --
# In turns


def parameters(dtype: torch.dtype, shapes: Sequence[Sequence[int]]) -> list[nn.Parameter]:
    """With gradients, the same each time."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter((torch.randn(*s, generator=generator) * 0.02).to(dtype)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).mul_(1e-3).to(dtype)
    return params


class Measured(NamedTuple):
    """A row's cost; by the number of threads, the median of its steps in milliseconds, and that of the ratios to the
    same rule in float32."""

    choice: Choice
    cost: Cost
    ms: tuple[float, ...]
    ratio: tuple[float, ...]


def measure(choices: Sequence[Choice], shapes: Sequence[Sequence[int]], rounds: int) -> list[Measured]:
    """All in turns, in another order each round. Those of one dtype share parameters and gradients."""
    params = {dtype: parameters(dtype, shapes) for dtype in {c.dtype for c in choices}}
    opts = {c: c.make(params[c.dtype]) for c in choices}
    before, order = torch.get_num_threads(), random.Random(0)
    watches: list[dict[Choice, Stopwatch]] = []
    try:
        for count in THREADS:
            torch.set_num_threads(count)
            watches.append({c: Stopwatch() for c in choices})
            for _ in range(WARM + rounds):
                for c in order.sample(list(choices), len(choices)):
                    with watches[-1][c].time():
                        opts[c].step()
    finally:
        torch.set_num_threads(before)

    def taken(watch: Stopwatch) -> list[float]:
        return watch.samples[WARM:]

    return [
        Measured(
            c,
            cost(opts[c]),
            tuple(statistics.median(taken(w[c])) * 1e3 for w in watches),
            tuple(
                statistics.median(a / b for a, b in zip(taken(w[c]), taken(w[c.plain]), strict=True))
                for w in watches
            ),
        )
        for c in choices
    ]


# --
# What is written

TEXT = """# Policies of storage, and what they cost

Written by `python -m benchmarks.storage`; [storage.md](storage.md) says what policies are.

*Errors* are of what is decoded of 2¹⁸ numbers with a normal distribution (for policies without a sign, of their
squares): the largest, relative to its number, or in blocks to the largest number of its block; and the root of the mean
square, relative to that of the numbers.

| policy | bytes for each number | for | largest error | rms error |
|---|---|---|---|---|
"""
STEPS = """
*Held* are bytes of parameter and state for each element, *moved* what a step reads and writes for each, gradient
included. Steps are of {shapes} tensors of {elements:,} elements, all rows in turns; medians of {rounds} rounds, ratios
taken round by round to the same rule with all in float32. Parameters and gradients are of the dtype that the row says.

| rule | parameters | their policy | state | held | moved | {threads} |
{line}
"""


def policies() -> str:
    """The first table: one line for each policy."""
    lines = []
    for name, policy in POLICIES.items():
        stored, largest, rms = error(name)
        for_ = " and ".join(w for w, fits in (("state", policy.state), ("parameters", policy.params)) if fits)
        lines.append(f"| `{name}` | {stored} | {for_} | {_small(largest)} | {_small(rms)} |\n")
    return TEXT + "".join(lines)


def _small(x: float) -> str:
    return f"{x:.1e}" if x else "0"


def row(choice: Choice, found: Cost) -> str:
    """A line of the second table, up to the times."""
    named = f"`{choice.param}`" if choice.param else ""
    kept = f"`{choice.state}`" if choice.state else "as it is"
    dtype = str(choice.dtype).removeprefix("torch.")
    return f"| {choice.rule} | {dtype} | {named} | {kept} | {found.held} | {found.moved} | "


def document(found: Sequence[Measured], shapes: Sequence[Sequence[int]], rounds: int) -> str:
    """The text of the file."""
    threads = " | ".join(f"ms, {n} thread{'s' * (n > 1)} | × float32" for n in THREADS)
    line = "|---" * (6 + 2 * len(THREADS)) + "|"
    lines = [
        policies(),
        STEPS.format(shapes=len(shapes), elements=shapes[0][0], rounds=rounds, threads=threads, line=line),
    ]
    for m in found:
        times = " | ".join(f"{ms:.1f} | {ratio:.2f}" for ms, ratio in zip(m.ms, m.ratio, strict=True))
        lines.append(f"{row(m.choice, m.cost)}{times} |\n")
    said = facts()
    where = f"{said['date']}, commit {said['commit']}, {said['device']}, {said['cores']} cores, {said['compiler']}"
    lines.append(f"\n{where}, Python {said['python']}, torch {said['torch']}.\n")
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.storage", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="steps of each row (%(default)s)")
    parser.add_argument("--out", type=Path, default=TABLE, help="the table's file")
    given = parser.parse_args()
    found = measure(CHOICES, SHAPES, given.rounds)
    given.out.write_text(document(found, SHAPES, given.rounds), encoding="utf-8")


if __name__ == "__main__":
    main()
