"""What several test files need: distances in ulp, the tolerance by competition, and one program's kernel at work."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from fusedopt import backends
from fusedopt.extension import leaf
from fusedopt.ir.ops import OPS, Op, Reduction
from fusedopt.ir.program import Buffer, Graph, Program, interpret, verify
from fusedopt.step import reference
from fusedopt.trace.methods import METHODS, method
from fusedopt.trace.number import ARITHMETIC
from fusedopt.trace.signature import Signature
from fusedopt.trace.tracer import Trace, trace

CPU = torch.device("cpu")
INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}
Tensors = torch.Tensor | Sequence[torch.Tensor]
needs_extension = pytest.mark.skipif(
    leaf.native is None, reason=f"this needs the C++ extension: {leaf.extension_status()[1]}"
)


def bits(x: torch.Tensor) -> torch.Tensor:
    """The elements' bit patterns as integers. All NaN are one: IEEE leaves their sign and payload open."""
    nan = torch.full_like(x, math.nan)
    return torch.where(x.isnan(), nan, x).contiguous().view(INTEGER[x.itemsize])


def assert_same_bits(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the last bit, zeros' signs included; says where not."""
    assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
    wrong = (bits(ours) != bits(expected)).flatten().nonzero().flatten()[:5].tolist()
    found = [(i, ours.flatten()[i].item(), expected.flatten()[i].item()) for i in wrong]
    assert not found, f"(index, ours, expected): {found}"


def ulp_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many floating point numbers lie from ``a`` to ``b``; 0 between NaNs, the largest int if one is NaN.

    Zeros of both signs are one number. Infinity is next to the largest finite number.
    """
    assert a.dtype == b.dtype
    lowest = torch.iinfo(INTEGER[a.itemsize]).min
    # ordered: a negative number's bits count downwards from zero
    x, y = (torch.where(i < 0, lowest - i, i) for i in (bits(a).to(torch.int64), bits(b).to(torch.int64)))
    too_far = (x.double() - y.double()).abs() > 2**62  # the difference may not fit
    far = torch.iinfo(torch.int64).max
    distance = (x - y).abs().masked_fill(too_far | (a.isnan() != b.isnan()), far)
    return distance.masked_fill(a.isnan() & b.isnan(), 0)


def _as_list(x: Tensors) -> list[torch.Tensor]:
    return [x] if isinstance(x, torch.Tensor) else list(x)


def error_in_ulp(x: Tensors, truth: Tensors) -> float:
    """The largest distance from the truth, in ulp of ``x``'s dtype at the size of each tensor's largest element.

    Per tensor and not per element: where terms cancel, the rounding of what cancelled remains, and it is as large as
    that was. Infinite where one side is not finite and the other is not the same.
    """
    worst = 0.0
    for ours, true in zip(_as_list(x), _as_list(truth), strict=True):
        assert true.dtype == torch.float64 and ours.shape == true.shape, (ours.shape, true.shape, true.dtype)
        same = (ours == true) | (ours.isnan() & true.isnan())
        error = (ours.double() - true).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
        finite = true[true.isfinite()].abs()
        if not ours.numel() or not error.any():
            continue
        scale = finite.amax().item() if finite.numel() else 0.0
        worst = max(worst, error.amax().item() / (torch.finfo(ours.dtype).eps * scale or math.ulp(0.0)))
    return worst


def assert_close_to_float64(ours: Tensors, eager: Tensors, truth: Tensors, ulp: float = 2.0) -> None:
    """Tolerance by competition: our error is at most twice that of eager torch in the same dtype, or 2 ulp.

    ``ours`` and ``eager`` are a tensor or several (their worst errors are compared), ``truth`` the same in float64.
    """
    assert [(t.dtype, t.shape) for t in _as_list(ours)] == [(t.dtype, t.shape) for t in _as_list(eager)]
    error, competitor = error_in_ulp(ours, truth), error_in_ulp(eager, truth)
    assert competitor < math.inf, "eager torch is not finite where float64 is: there is no competition"
    bound = max(2 * competitor, ulp)
    assert error <= bound, f"error {error:.3g} ulp, above {bound:.3g} (eager torch: {competitor:.3g} ulp)"


def ends(pid: int, seconds: float = 20.0) -> bool:
    """Whether the process is gone in a while: one that was killed is there until somebody asks how it ended."""
    late = time.monotonic() + seconds
    while time.monotonic() < late:
        try:
            os.kill(pid, 0)
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except ProcessLookupError:
            return True
        except FileNotFoundError:  # no /proc here, or it ended between the lines
            pass
        time.sleep(0.01)
    return False


def compile_kernel(program, name="test"):
    """The program's C++ kernel, compiled."""
    return backends.get("cpp").compile(program, name, [])


def run_kernel(kernel, buffers: dict[str, torch.Tensor], slots: Iterable[float] = ()) -> None:
    """Launch a kernel on one parameter's tensors, which it changes in place."""
    columns = {name: [buffers[name]] for name, _ in kernel.program.buffers}
    table = np.array([list(slots)], dtype=np.float64)
    backends.get("cpp").prepare(kernel, columns, [buffers["param"].numel()], [0]).run(table)


def copies(buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in buffers.items()}


# ---------------------------------------------------------------- traces, without a compiler


VECTOR = (("ndim", 1),)


def signature(
    param: torch.dtype = torch.float32,
    grad: torch.dtype | None = None,
    attributes: tuple = VECTOR,
    /,
    **state: Any,
) -> Signature:
    """What callbacks see of a parameter; ``state`` maps keys to Buffers, numbers and flags."""
    return Signature(CPU, param, grad or param, tuple(sorted(state.items())), attributes)


def operands(op: str) -> int:
    """How many numbers an operation of the scalar program takes, at most."""
    function = ARITHMETIC[op]
    if isinstance(function, np.ufunc):
        return function.nin
    for values in ((4, 2), (4.0, 2.0)):
        with contextlib.suppress(TypeError):
            function(*values)
            return 2
    return 1


class Stepper:
    """A callback list at work on one parameter: traced, and its program interpreted, step by step.

    ``traces`` holds the trace of each step. ``hyper`` may be changed between steps.
    """

    def __init__(self, callbacks: Sequence[Callable], p: torch.Tensor, **hyper: Any) -> None:
        self.callbacks, self.p, self.hyper = callbacks, p.clone(), hyper
        self.state: dict[str, Any] = {}
        self.traces: list[Trace] = []

    def step(self, grad: torch.Tensor) -> Trace:
        state = {k: self._seen(v) for k, v in self.state.items()}
        t = trace(self.callbacks, signature(self.p.dtype, grad.dtype, **state), self.hyper)
        for key, new in t.created.items():
            self.state[key] = torch.zeros(self.p.shape if new.kind == "F" else (), dtype=new.dtype)
        tensors = {f"state.{k}": v for k, v in self.state.items()} | {"param": self.p, "grad": grad}
        for name, value in interpret(t.program, tensors, t.slot_values()).items():
            if name == "param":
                self.p = value
            else:
                self.state[name.removeprefix("state.")] = value
        self.state |= t.new_numbers()
        self.traces.append(t)
        return t

    def _seen(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return Buffer(value.dtype, "F" if value.shape == self.p.shape else "S")

    @property
    def programs(self) -> list[Program]:
        """The different programs so far, in order."""
        return list(dict.fromkeys(t.program for t in self.traces))


def assert_as_eager(
    callbacks: Sequence[Callable] | Callable,
    steps: int = 3,
    start: torch.Tensor | None = None,
    hypers: Callable[[int], dict[str, Any]] = lambda t: {},
    **hyper: Any,
) -> Stepper:
    """Traced and interpreted, the callbacks do what they do eagerly, in float64; returns the Stepper.

    ``hypers(t)`` are further hyperparameters of step t, from 0.
    """
    callbacks = [callbacks] if callable(callbacks) else callbacks
    p = torch.randn(7, dtype=torch.float64) if start is None else start
    ours, state = Stepper(callbacks, p, **{"lr": 0.1, **hyper}), {}
    for t in range(steps):
        ours.hyper |= hypers(t)
        grad = torch.randn_like(p)
        ours.step(grad)
        p = reference.upcast(p, torch.float64)
        p.grad = grad.clone()
        for callback in callbacks:
            reference.run_callback(callback, reference.Lent(p, p), state, ours.hyper)
        assert_same_result(ours.p, p, "p")
        assert ours.state.keys() == state.keys()
        for key, value in state.items():
            assert_same_result(ours.state[key], value, key)
    return ours


def assert_same_result(ours: Any, eager: Any, name: str) -> None:
    """Tensors equal but for rounding; other values equal and of one type."""
    assert isinstance(ours, torch.Tensor) == isinstance(eager, torch.Tensor), f"{name}: {ours} for {eager}"
    if isinstance(eager, torch.Tensor):
        torch.testing.assert_close(
            ours, eager, rtol=1e-12, atol=1e-14, equal_nan=True, msg=lambda m: f"{name}: {m}"
        )
    else:
        assert (type(ours), ours) == (type(eager), eager), name


def doubles(ops: Iterable[Op]) -> tuple[Program, dict[str, torch.Tensor]]:
    """A float32 program that applies each op to numbers of which one is a double, and tensors for it to run on.

    The results go to double state of their own, as numbers per tensor; their sum with the gradient to the parameter.
    """
    graph = Graph()
    wide, single = graph.leaf("load", "state.wide", type="d"), graph.leaf("load", "state.single")
    values = [wide, graph.leaf("slot", 0), single]
    masks = [graph.op("gt", wide, single), graph.op("le", single, wide)]
    stores, total = {}, graph.leaf("load", "grad", kind="F")
    for op in ops:
        pools = {"f": iter(values), "b": iter(masks)}
        result = graph.op(op.name, *[next(pools[t]) for t in op.types[: op.arity]])
        result = graph.op("as_float", result) if graph.values[result].type == "b" else result
        if graph.values[result].kind == "S":
            stores[f"state.{op.name}"] = result
        total = graph.op("add", total, result)
    single_number, double = Buffer(torch.float32, "S"), Buffer(torch.float64, "S")
    buffers = {name: Buffer(torch.float32, "F") for name in ("param", "grad")}
    buffers |= {"state.wide": double, "state.single": single_number} | dict.fromkeys(stores, double)
    stores |= {"param": total}
    program = Program(torch.float32, tuple(buffers.items()), tuple(graph.values), tuple(stores.items()), 1)
    verify(program)
    tensors = {name: torch.zeros((), dtype=torch.float64) for name in stores if name != "param"}
    tensors |= {"state.wide": torch.tensor(1 / 3, dtype=torch.float64), "state.single": torch.tensor(0.7)}
    return program, tensors | {"param": torch.zeros(5), "grad": torch.arange(5.0)}


SLOT = 0.1
"""A slot for ``doubles`` that float32 would round."""


@contextmanager
def new_rows() -> Iterator[tuple[Program, dict[str, torch.Tensor], torch.Tensor]]:
    """A function and a reduction that the op table has for so long.

    Gives a program that a callback calling them makes, tensors for it, and what the parameter becomes.
    """
    rows = {
        "cosh": Op("cosh", "f>f", torch.cosh, "::cosh({0})", "(exp({0}) + exp({0} * -1.0)) * 0.5"),
        "prod": Reduction("prod", torch.prod, np.multiply, "1.0", "{0} * {1}"),
    }

    def callback(p: Any, **kwargs: Any) -> None:
        p.data.sub_(p.grad.cosh() * p.grad.prod())

    with (
        mock.patch.dict(OPS, rows),
        mock.patch.dict(METHODS, {name: method(row) for name, row in rows.items()}),
    ):
        program = trace([callback], signature(), {}).program
        generator = torch.Generator().manual_seed(0)
        tensors = {name: torch.randn(3000, generator=generator) for name in ("param", "grad")}
        tensors["grad"] = 1 + tensors["grad"] / 100
        p = torch.nn.Parameter(tensors["param"].clone())
        p.grad = tensors["grad"].clone()
        callback(p)
        yield program, tensors, p.detach()
