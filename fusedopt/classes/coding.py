"""What a policy stores of a class's state (`stored`), in a trace: decoded before the step, and encoded after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ..storage.callbacks import dtypes, encoded
from ..storage.functions import rounded
from ..storage.policy import POLICIES, Policy
from ..trace.draws import noise
from ..trace.number import Number, operate
from ..trace.run import Cell, Run, load
from ..trace.signals import Untraceable
from ..trace.tensor import SymTensor
from .stored import DRAWS, Stored


class Code(NamedTuple):
    """State that is stored: under which keys, the values that were loaded from there, and what they decode to."""

    policy: Policy
    keys: list[str]
    nodes: list[int]
    decoded: int


def decode(run: Run, name: str, stored: Stored) -> tuple[Code, SymTensor]:
    """What is stored under this name, and what the class gets. Raises Untraceable where policies do not apply."""
    if run.compute != torch.float32:
        raise Untraceable(f"storage of the state {name!r}, where float64 is computed with")
    policy, known, keys = POLICIES[stored.policy], dict(run.signature.state), stored.keys(name)
    nodes = [load(run.graph, run.signature, f"state.{key}", known[key]) for key in keys]
    with _saying(run, f"decode {name} as {stored.policy}"):
        x = policy.decode(*(SymTensor(run, node, torch.float32) for node in nodes))
        x = x if stored.dtype == torch.float32 else rounded(x, stored.dtype)
    return Code(policy, keys, nodes, x.node), SymTensor(run, x.node, stored.dtype)


def encode(run: Run, codes: dict[str, Code], name: str, node: int, count: Callable[[str], Number]) -> Any:
    """The cells of what is stored of a value under this name; ``count``: how often a state was rounded at random."""
    policy, keys, nodes, before = codes[name]
    cells: dict[str, Any] = {}
    if policy.noisy:
        cells[f"{name}:{DRAWS}"] = operate("add", count(name), 1)
    if node == before:
        return cells | {key: Cell(n, torch.float32) for key, n in zip(keys, nodes, strict=True)}
    with _saying(run, f"encode {name}"):
        bits = _noise(run, codes, name, count) if policy.noisy else None
        parts = encoded(policy, SymTensor(run, node, torch.float32), bits)
    stored = zip(keys, parts, dtypes(policy), strict=True)
    return cells | {key: Cell(part.node, dtype) for key, part, dtype in stored}


def _noise(run: Run, codes: dict[str, Code], name: str, count: Callable[[str], Number]) -> SymTensor:
    """All state by one seed and one count: as other numbers of one draw, which gives several."""
    names = [k for k, code in codes.items() if code.policy.noisy]
    seed = Number(run.scalars, run.scalars.constant(0.0), 0.0)
    like = SymTensor(run, codes[name].nodes[0], torch.float32)
    drawn: SymTensor = noise(like, seed=seed, step=count(names[0]), stream=names.index(name))
    return drawn


@contextmanager
def _saying(run: Run, what: str) -> Iterator[None]:
    """What comments say of the values that are made meanwhile, in place of a line of the class."""
    vars(run)["where"] = lambda: what
    try:
        yield
    finally:
        del vars(run)["where"]
