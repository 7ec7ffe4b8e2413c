"""What several test files need: distances in ulp, the tolerance by competition, and one program's kernel at work."""

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from fusedopt.runtime import backends

INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}
Tensors = torch.Tensor | Sequence[torch.Tensor]


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
    x, y = ((i := bits(t)).to(torch.int64).where(i >= 0, lowest - i.to(torch.int64)) for t in (a, b))
    distance = (x - y).abs()
    distance = distance.where(distance >= 0, torch.iinfo(torch.int64).max)  # overflow, from end to end
    one_nan = a.isnan() != b.isnan()
    return distance.masked_fill(one_nan, torch.iinfo(torch.int64).max).masked_fill(a.isnan() & b.isnan(), 0)


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
        error = (ours.double() - true).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf)
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


def compile_kernel(program, name="test"):
    """The program's C++ kernel, compiled."""
    return backends.get("cpp").compile(program, name, [])


def run_kernel(kernel, buffers: dict[str, torch.Tensor], slots: Iterable[float] = ()) -> None:
    """Launch a kernel on one parameter's tensors, which it changes in place."""
    columns = {name: [buffers[name]] for name, _ in kernel.program.buffers}
    table = np.array([list(slots)], dtype=np.float64)
    sizes = [t.numel() for t in itertools.chain(*columns.values())]
    backends.get("cpp").prepare(kernel, columns, [max(sizes)], [0]).run(table)


def copies(buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in buffers.items()}
