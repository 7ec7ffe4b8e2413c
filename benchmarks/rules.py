"""What each rule of `fusedopt.rules` costs, by its kernels: ``python -m benchmarks.rules`` writes docs/rules_table.md.

Every row of the table of optimizers is stepped a few times on small float32 parameters, and asked to explain itself.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from fusedopt import rules, table
from fusedopt.optimizer import Optimizer

from .plot import ROOT

TABLE = ROOT / "docs" / "rules_table.md"
SHAPES = ((4, 3), (2, 3))
ALIKE = ((4, 3), (4, 3))
"""Of rules with torch calls, which are made for all parameters of one shape."""
STEPS = 8
"""Beyond the step at which rectified rules become adaptive."""
TEXT = """# Rules, and what they cost

Written by `python -m benchmarks.rules`, from the kernels of the C++ backend: what a step launches for parameters of one
dtype, how many bytes it moves for each float32 element, what it keeps for each element (a buffer), each row or column,
each pair of rows or of columns (a square matrix), or each tensor (a number in memory), how many kernels eight steps
compile, and which callbacks run eagerly. Parameters are matrices. AdamW launches 1, moves 28 and keeps 2 buffers;
Cautious, Centralize and GrokFast are what they make of it.

Muon, Shampoo and SOAP make torch calls between their launches, for all matrices of one shape at once while these are
small; a semicolon is a launch. What these calls compute, read and write comes on top of the bytes, and is most of such
a step; launches are of one shape. SOAP's are of a step that leaves its bases as they are; the first step makes them
(`linalg_eigh`), and each tenth one after it turns them (`linalg_qr`).

| rule | in a sentence | launches | torch calls | bytes per element | buffers | rows, columns | matrices | numbers \
| kernels | eager |
|---|---|---|---|---|---|---|---|---|---|---|
"""


class Cost(NamedTuple):
    """What an optimizer does in a step. ``calls``: torch's, between launches; ``lines``: state by rows or columns, and
    ``matrices`` by pairs of them; ``eager``: what no kernel runs."""

    launches: int
    calls: str
    bytes: int
    buffers: int
    lines: int
    matrices: int
    numbers: int
    kernels: int
    eager: tuple[str, ...]


def cost(row: table.Row) -> Cost:
    """Of a row's first variant, in its last step."""
    generator = torch.Generator().manual_seed(0)
    shapes = ALIKE if row.calls else SHAPES
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    opt: Optimizer = row.factory(params, **row.variants[0].kwargs, backend="cpp")
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        opt.step()
    kept = [v for v in opt.state[params[0]].values() if isinstance(v, torch.Tensor)]
    buffers, numbers = (sum(v.numel() == n for v in kept) for n in (params[0].numel(), 1))
    matrices = sum(v.dim() == 2 and v.shape[0] == v.shape[1] > 1 for v in kept)
    said = opt.explain()
    eager = tuple(e.callback for e in said.eager)
    return Cost(
        said.launches,
        "; ".join(call.split("torch's ")[1] for call in said.calls) or "none",
        said.bytes_per_element,
        buffers,
        len(kept) - buffers - matrices - numbers,
        matrices,
        numbers,
        len(said.compiled),
        eager,
    )


def sentence(row: table.Row) -> str:
    """What the rule is: the first line of its file, behind the name."""
    rule = getattr(rules, row.name)
    module = importlib.import_module(rule.__module__)
    path = Path(inspect.getfile(module)).relative_to(ROOT).as_posix()
    said = (module.__doc__ or "").split("\n", 1)[0].split(": ", 1)[1].rstrip(".")
    return f"[{row.name}](../{path}) | {said[0].upper()}{said[1:]}"


def document() -> str:
    """The text of the file."""
    lines = []
    for row in table.RULES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a callback runs eagerly is in the table
            *numbers, eager = cost(row)
        lines.append(
            f"| {sentence(row)} | {' | '.join(map(str, numbers))} | {', '.join(eager) or 'nothing'} |"
        )
    return TEXT + "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(document(), encoding="utf-8")
