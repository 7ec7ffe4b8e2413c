"""Programs that draw random numbers, for all backends."""

import numpy as np
import torch

from fusedopt import backends
from fusedopt.ir import random
from fusedopt.ir.ops import axes_of
from fusedopt.ir.passes import optimize
from fusedopt.ir.program import Buffer, Graph, Program, interpret

PLACES = [random.place(0, 0), random.place(0, 1), random.place(3, 1 << 20), random.place(40_000, 7)]
SLOTS = [-123_456_789_012.0, 5.0, 2.0**33 + 3]
"""A seed of more than 32 bits, a step, and another one of more than 32."""


def drawing(dtype=torch.float32, storage=torch.float32, axes=1) -> Program:
    """Both kinds, of several streams, steps and seeds; also in sums, so that stages draw the same again."""
    g = Graph("".join(map(str, range(axes))))
    wide = "f" if dtype == torch.float64 else "d"
    seed, step, later = (g.leaf("slot", i, type=wide) for i in range(3))
    uniform = g.op("uniform", seed, step, to=0)
    normal = g.op("normal", seed, step, to=0)
    other = g.op("normal", step, later, to=255)
    largest = g.op("amax", other)
    stores = {
        "param": g.op("sub", g.leaf("load", "param", kind="F"), g.op("mul", normal, largest)),
        "state.uniform": uniform,
        "state.normal": normal,
        "state.other": other,
        "state.largest": largest,
    }
    kinds = dict.fromkeys(stores, "F") | {"state.largest": "S"}
    if axes > 1:
        rows, columns = g.axes[:-1], g.axes[-1]
        stores["state.rows"], kinds["state.rows"] = g.op("amax", normal, to=rows), rows
        stores["state.columns"], kinds["state.columns"] = g.op("amin", uniform, to=columns), columns
        less = g.op("sub", other, stores["state.rows"])
        stores["state.other"] = g.op("mul", less, stores["state.columns"])
    dtypes = {"param": storage}
    buffers = tuple((name, Buffer(dtypes.get(name, dtype), kind)) for name, kind in kinds.items())
    return optimize(Program(dtype, buffers, tuple(g.values), tuple(stores.items()), 3, axes=axes))


def rows_of(program, shapes, offset=0):
    """Tensors of these shapes, which start so many elements behind where memory is aligned."""
    out = []
    for shape in shapes:
        row = {}
        for name, buffer in program.buffers:
            size = [n for a, n in enumerate(shape) if str(a) in axes_of(buffer.kind, program.all_axes)]
            if program.axes == 1 and buffer.kind == "F":
                size = list(shape)
            whole = torch.zeros(int(np.prod(size)) + offset, dtype=buffer.dtype)
            row[name] = whole[offset:].view(size)
        out.append(row)
    return out


def launched(program, shapes, backend="cpp", places=PLACES, offset=0):
    """What a backend's kernel leaves in tensors of these shapes."""
    rows = rows_of(program, shapes, offset)
    chosen = backends.get(backend)
    kernel = chosen.compile(program, "drawing", ["seed", "step", "later"])
    columns = {name: [row[name] for row in rows] for name, _ in program.buffers}
    sizes = [int(np.prod(shape)) for shape in shapes]
    several = {"shapes": [tuple(s) for s in shapes]} if program.axes > 1 else {}
    launch = chosen.prepare(kernel, columns, sizes, [0] * len(sizes), places=places[: len(sizes)], **several)
    launch.run(np.array([SLOTS]))
    return rows


def interpreted(program, shapes, places=PLACES):
    rows = rows_of(program, shapes)
    return [
        row | interpret(program, row, SLOTS, shape if program.axes > 1 else None, place)
        for row, shape, place in zip(rows, shapes, places, strict=False)
    ]


SHAPES = {
    1: [(1,), (7,), (1029,), (70_001,)],
    2: [(1, 1), (3, 5), (64, 33), (3, 1030)],
    3: [(2, 3, 5), (1, 4, 1), (5, 30, 3), (2, 40, 35)],
}


def noisy(name: str) -> Program:
    """A parameter with random numbers added."""
    g = Graph()
    drawn = g.op(name, *(g.leaf("slot", i, type="d") for i in range(2)), to=0)
    total = g.op("add", g.leaf("load", "param", kind="F"), g.op("mul", drawn, g.leaf("slot", 2)))
    buffers = (("param", Buffer(torch.float32, "F")),)
    return Program(torch.float32, buffers, tuple(g.values), (("param", total),), 3)
