"""Where the tests that run on a GPU too make their tensors: on the CPU, or where ``--device`` says."""

import torch

from fusedopt import backends

DEVICE = torch.device("cpu")
COMPILED = ["cpp"]
"""The backends that compile for it."""


def use(name: str) -> None:
    """What conftest.py does before tests are imported: they take both from here."""
    global DEVICE, COMPILED
    DEVICE = torch.device(name)
    COMPILED = [backend for backend, row in backends.ROWS.items() if row.device == DEVICE.type]
