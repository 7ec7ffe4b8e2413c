"""The bare C loop: the same bytes, moved by hand-written code. No optimizer can be much faster on this machine.

It is compiled by fusedopt's compiler with fusedopt's flags, runs on as many threads as torch, and splits the elements
evenly among them (by prefix sum, across tensors).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fusedopt.compile.toolchain import FLAGS, compiler

SOURCE = Path(__file__).with_name("bare_loop.cpp")
ALIGN = 16
"""Pieces begin at a multiple of this many elements: a cache line."""


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled loop, once per process. Raises RuntimeError with the compiler's words."""
    tool = compiler()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "bare_loop.so")
        command = [tool.path, *tool.command[1:], *FLAGS, "-fopenmp", str(SOURCE), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
        return ctypes.CDLL(str(out))  # loaded: it stays when the file goes


def split(sizes: Sequence[int], threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces (row, begin, end) and each thread's bounds among them, with about as many elements for every thread."""
    ends = np.cumsum(sizes)
    cuts = [int(ends[-1]) * t // threads for t in range(threads + 1)]
    pieces, bounds = [], [0]
    for low, high in itertools.pairwise(cuts):
        for row, (size, end) in enumerate(zip(sizes, ends, strict=True)):
            begin, stop = (_cut(x - (int(end) - size), size) for x in (low, high))
            if begin < stop:
                pieces.append((row, begin, stop))
        bounds.append(len(pieces))
    return np.array(pieces, np.int64).reshape(-1, 3), np.array(bounds, np.int64)


def _cut(x: int, size: int) -> int:
    """An element of a row at which to cut it: inside the row, and a multiple of ALIGN but at the row's end."""
    return size if x >= size else max(x, 0) // ALIGN * ALIGN


class BareLoop:
    """AdamW, SGD with momentum, or Adagrad on float32 tensors in one group, as these hyperparameters say.

    ``prepare`` does what is not the loop: it reads the gradients' addresses and computes the step's scalars.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float,
        *,
        betas: tuple[float, float] | None = None,
        momentum: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.params, self.lr, self.eps, self.wd = list(params), lr, eps, weight_decay
        self.mom, self.sqr_mom = betas if betas is not None else (momentum, None)
        self.count = 0
        buffers = 1 if betas is None else 2
        self.state = [[torch.zeros_like(p) for p in self.params] for _ in range(buffers)]
        self.rows = np.zeros((len(self.params), 4), np.int64)
        for column, tensors in zip((0, 2, 3), (self.params, *self.state), strict=False):
            self.rows[:, column] = [t.data_ptr() for t in tensors]
        self.scalars = np.zeros(8, np.float32)
        threads = torch.get_num_threads()
        self.pieces, self.bounds = split([p.numel() for p in self.params], threads)
        name = "adamw" if betas is not None else "adagrad" if momentum is None else "momentum"
        tables = [ctypes.c_void_p(t.ctypes.data) for t in (self.rows, self.pieces, self.bounds, self.scalars)]
        loop = getattr(library(), name)
        self.step = functools.partial(loop, *tables[:3], ctypes.c_int64(threads), tables[3])

    def prepare(self) -> None:
        """Everything but the loop."""
        self.count += 1
        self.rows[:, 1] = [p.grad.data_ptr() for p in self.params]  # type: ignore[union-attr]
        if self.sqr_mom is None:
            self.scalars[:2] = self.lr, self.eps if self.mom is None else self.mom
            return
        scale = self.lr / (1 - self.mom**self.count)
        root = (1 - self.sqr_mom**self.count) ** -0.5
        decay = 1 - self.lr * self.wd
        self.scalars[:] = decay, self.mom, 1 - self.mom, self.sqr_mom, 1 - self.sqr_mom, root, self.eps, scale
