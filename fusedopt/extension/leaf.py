"""The runtime's leaf functions: from the C++ extension `fusedopt._C`, else the same in Python.

    write_pointers(tensors, table_ptr, rows, columns, column)
    run_cpu(entries, launch_ptr, splits, cost)
    bump_versions(tensors)
    settle(params)

The namespaces `python` and `native` (None without the extension) hold both implementations.
The extension is used only when it was built against the torch that is running: another torch lays out
its tensors differently, and calling into it may crash. So its version is read before it is loaded.
Where it is missing it is built (extension.py), and what is asked of this module changes hands when that is done.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from operator import index
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import build as extension

# What a compiled stage looks like from C: void stage(const void* launch, int64_t begin, int64_t end).
# A call through ctypes releases the GIL.
_Stage = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def thread_count() -> int:
    """How many threads a CPU launch runs on: torch's, so `torch.set_num_threads` rules here too.

    A forked child, which has inherited OpenMP's pool and none of its threads, runs on the calling thread.
    """
    return 1 if _forked else torch.get_num_threads()


def _write_pointers(
    tensors: list[Tensor], table_ptr: int, rows: int | None, columns: int, column: int
) -> list[torch.UntypedStorage]:
    """Write each tensor's data pointer into one column of a table of int64; returns what keeps their memory alive.

    `table[row * columns + column] = tensors[row].data_ptr()`, the table being `rows` × `columns` at the
    address `table_ptr`. `rows` guards against writing past the end; None says the caller has checked.
    Raises TypeError for what is no tensor, ValueError for what does not fit.
    """
    _check_tensors(tensors)
    if rows is not None and len(tensors) > rows:
        raise ValueError(f"{len(tensors)} tensors do not fit into a table of {rows} rows")
    if not 0 <= column < columns:
        raise ValueError(f"column {column} is outside a table of {columns} columns")
    if table_ptr == 0:
        raise ValueError("table_ptr is null")
    kept = [t.untyped_storage() for t in tensors]
    if tensors:
        cells = (ctypes.c_int64 * (len(tensors) * columns)).from_address(index(table_ptr))
        np.ctypeslib.as_array(cells)[column::columns] = [
            storage.data_ptr() + t.storage_offset() * t.itemsize
            for storage, t in zip(kept, tensors, strict=True)
        ]
    return kept


def _run_cpu(entries: Sequence[int], launch_ptr: int, splits: Sequence[Sequence[int]], cost: int = 0) -> None:
    """Run compiled stages one after another, each over its ranges of rows in parallel.

    `entries[k]` is the address of `extern "C" void stage(const void* launch, int64_t begin, int64_t end)`
    and `splits[k]` the ascending bounds of its ranges: [splits[k][t], splits[k][t + 1]) for each t. Every
    range of a stage is done before the next stage begins. The GIL is released. A single range, and any
    launch from inside another parallel region, runs on the calling thread. `cost` is about how many nanoseconds
    one thread takes for a stage: the extension leaves what is short to one while other work keeps the cores busy.
    """
    stages = [_Stage(index(entry)) for entry in entries]
    ranges = [list(pairwise(map(index, split))) for split in splits]
    if len(stages) != len(ranges):
        raise ValueError(f"{len(stages)} entries need as many splits, not {len(ranges)}")
    if 0 in entries:
        raise ValueError("an entry is null")
    for stage, todo in zip(stages, ranges, strict=True):
        run = functools.partial(_run_range, stage, index(launch_ptr))
        if len(todo) > 1 and thread_count() > 1:
            list(_pool(thread_count()).map(run, todo))
        else:
            list(map(run, todo))


def _bump_versions(tensors: list[Tensor]) -> None:
    """Tell autograd that these tensors were written to, so that a stale use in backward is an error.

    Inference tensors have no version counter and are passed over.
    """
    _check_tensors(tensors)
    torch.autograd.graph.increment_version(tensors)


def _settle(params: list[Tensor]) -> None:
    """Wait until no other thread is freeing one of these parameters' gradients. (Python cannot tell.)"""


def _first_other(looked: list[tuple[Any, Any, Any]]) -> int:
    """The first of (dict or function, name, value) that has another object under the name, where None is as good as
    nothing. -1 if there is none. Of a function the names are ``__code__``, ``__defaults__`` and ``__kwdefaults__``."""

    def found(own: Any, name: Any) -> Any:
        return own.get(name) if isinstance(own, dict) else getattr(own, name)

    return next((k for k, (own, name, value) in enumerate(looked) if found(own, name) is not value), -1)


def _run_range(stage: Callable[..., object], launch_ptr: int, bounds: tuple[int, int]) -> None:
    stage(launch_ptr, *bounds)


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fusedopt")


_forked = False


def _after_fork() -> None:
    """A forked child inherits pools but none of their threads."""
    global _forked
    _forked = True
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _check_tensors(tensors: list[Tensor]) -> None:
    if not isinstance(tensors, list):
        raise TypeError(f"tensors must be a list, not {type(tensors).__name__}")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors[{i}] must be a Tensor, not {type(tensor).__name__}")


def calls(
    entries: Sequence[int], launch_ptr: int, splits: Sequence[Sequence[int]], cost: int
) -> list[Callable[[], None]]:
    """``run_cpu`` as calls of functions that are not written in Python, so that no signal handler comes between.

    Without the extension that is only so on a single thread.
    """
    if run_cpu is not _run_cpu or (thread_count() > 1 and any(len(split) > 2 for split in splits)):
        return [functools.partial(run_cpu, entries, launch_ptr, splits, cost)]
    return [
        functools.partial(_Stage(index(entry)), index(launch_ptr), first, last)
        for entry, split in zip(entries, splits, strict=True)
        for first, last in pairwise(map(index, split))
    ]


python = SimpleNamespace(
    write_pointers=_write_pointers,
    run_cpu=_run_cpu,
    bump_versions=_bump_versions,
    settle=_settle,
    first_other=_first_other,
    torch_version=str(torch.__version__),
)
native, _reason = extension.load_installed()
_missing = None if native else extension.Missing(_reason)

_active = native or python
write_pointers = _active.write_pointers
run_cpu = _active.run_cpu
bump_versions = _active.bump_versions
settle = _active.settle
first_other = _active.first_other
torch_version = _active.torch_version


def seek(wait: bool = False) -> bool:
    """Before a step that could use the extension: whether it is there. If it is missing, see to it, and say so once.

    ``wait``: until it is built, for those who cannot do without.
    """
    return _use(_missing.seek(wait) if _missing else None)


def available() -> bool:
    """Whether the extension is in use, from now on if it has been built meanwhile."""
    return _use(_missing.take() if _missing else None)


def _use(module: ModuleType | None) -> bool:
    """Whoever runs these functions right now may go on with Python's: they do the same."""
    global native, write_pointers, run_cpu, bump_versions, settle, first_other, _missing, _reason
    if module is not None and native is None:
        write_pointers, run_cpu, bump_versions = module.write_pointers, module.run_cpu, module.bump_versions
        settle, first_other = module.settle, module.first_other
        native, _missing, _reason = module, None, f"built for torch {module.torch_version} where it runs"
    return native is not None


def extension_status() -> tuple[bool, str]:
    """Whether the C++ extension is in use, and why or why not."""
    return native is not None, _missing.reason if _missing else _reason
