"""What checks share: guarded memory, comparisons that can fail, and runs of an optimizer over given gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..providers import compiled_by
from .jobs import Skipped

GUARD, BYTE = 256, 0xA5
INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}
FLIPPED = 0.05
"""Parts of the elements that may round the other way in 16 bits: eager torch on a GPU contracts, kernels do not."""


class Memory:
    """Tensors with guard bytes before and behind each."""

    def __init__(self) -> None:
        self.raw: list[tuple[Tensor, int, int]] = []

    def hold(self, values: Tensor, offset: int = 0) -> Tensor:
        """A copy of the values at an aligned address, or ``offset`` elements behind one."""
        start = GUARD + offset * values.itemsize
        stop = start + values.numel() * values.itemsize
        raw = torch.full((stop + GUARD,), BYTE, dtype=torch.uint8, device=values.device)
        self.raw.append((raw, start, stop))
        return raw[start:stop].view(values.dtype).view(values.shape).copy_(values)

    def check(self) -> None:
        """Raises AssertionError if a guard byte was written to."""
        if not self.raw:
            return
        guards = torch.cat([x for raw, a, b in self.raw for x in (raw[:a], raw[b:])])
        if harmed := int((guards != BYTE).sum()):
            raise AssertionError(f"{harmed} bytes outside of the tensors were written to")


def differ(a: Tensor, b: Tensor) -> int:
    """How many elements differ in any bit; all NaN are one."""
    both_nan = a.isnan() & b.isnan()
    kind = INTEGER[a.itemsize]
    return int(((a.contiguous().view(kind) != b.contiguous().view(kind)) & ~both_nan).sum())


def same(what: str, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Raises AssertionError unless all tensors agree to the last bit."""
    for k, (x, y) in enumerate(zip(a, b, strict=True)):
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            raise AssertionError(f"{what}: tensor {k} is {x.dtype} {x.shape}, not {y.dtype} {y.shape}")
        if found := differ(x, y):
            raise AssertionError(f"{what}: {found} of {x.numel()} elements of tensor {k} differ")


def error(found: Tensor, truth: Tensor) -> float:
    """The largest distance from the truth in ulp, at the size of the tensor's largest element; infinite for NaN."""
    off = (found.double() - truth).abs()
    off = off.masked_fill(found.isnan() & truth.isnan(), 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
    finite = truth[truth.isfinite()].abs()
    scale = finite.amax().item() if finite.numel() else 0.0
    return off.amax().item() / (torch.finfo(found.dtype).eps * scale or math.ulp(0.0))


def close(
    what: str,
    found: Sequence[Tensor],
    truth: Sequence[Tensor],
    *eager: Sequence[Tensor],
    ulp: float = 2.0,
) -> float:
    """Our largest error, in ulp, against that of eager torch. Raises AssertionError if it is more than twice as large.

    truth: in float64; eager: runs in the dtype of ``found``. In 16 bits, where eager's error may be large, all but a
    few elements must also be those of the first eager run.
    """
    worst = 0.0
    for k, (ours, true) in enumerate(zip(found, truth, strict=True)):
        if not ours.numel():
            continue
        others = [run[k] for run in eager]
        bound = max([2 * error(other.to(true.device), true) for other in others] + [ulp])
        off = error(ours, true)
        worst = max(worst, off)
        if not off <= bound:
            raise AssertionError(
                f"{what}: tensor {k} of {ours.numel()} is {off:.3g} ulp off; allowed: {bound:.3g}"
            )
        if others and ours.itemsize == 2 and differ(ours, others[0]) > max(2, FLIPPED * ours.numel()):
            count = differ(ours, others[0])
            raise AssertionError(
                f"{what}: {count} of {ours.numel()} elements of tensor {k} are not eager torch's"
            )
    return worst


@dataclass
class Run:
    """An optimizer after some steps: parameters, then the state's buffers, key by key."""

    opt: Any
    tensors: list[Tensor]


def run(
    make: Callable[..., Any],
    backend: str,
    start: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
    *,
    device: str,
    dtype: torch.dtype,
    state: Sequence[str] = (),
    misaligned: bool = False,
) -> Run:
    """Steps from ``start``, one per list of gradients, all in guarded memory. Raises AssertionError if that is harmed.

    misaligned: every second gradient and third parameter lie one element behind an aligned address.
    """
    memory, passing = Memory(), Memory()

    def hold(where: Memory, k: int, t: Tensor, every: int) -> Tensor:
        return where.hold(t.to(device, dtype), int(misaligned and k % every == every - 1))

    params = [hold(memory, k, p, 3).requires_grad_() for k, p in enumerate(start)]
    with compiled_by(backend):
        opt = make(params)
    for step, given in enumerate(gradients):
        passing.raw.clear()
        for k, (p, g) in enumerate(zip(params, given, strict=True)):
            p.grad = hold(passing, k, g, 2)
        opt.step()
        passing.check()
        memory.check()
        for p in params if step == 0 else ():
            for key in state if p.numel() else ():
                opt.state[p][key] = memory.hold(opt.state[p][key])
    kept = [opt.state[p][key] for key in state for p in params if p.numel()]
    return Run(opt, [t.detach() for t in (*params, *kept)])


def noise(shapes: Sequence[tuple[int, ...]], seed: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Random tensors, each representable in the dtype."""
    random = torch.Generator(device).manual_seed(seed)
    return [torch.randn(s, generator=random, device=device).to(dtype) for s in shapes]


def supported(make: Callable[..., Any], name: str) -> Any:
    """What ``make()`` gives. Raises Skipped if the constructor refuses the keyword ``name``."""
    try:
        return make()
    except (TypeError, ValueError, NotImplementedError) as error:
        if name in str(error):
            raise Skipped(f"this version refuses {name}: {str(error)[:200]}") from error
        raise


def capturable(make: Callable[..., Any]) -> Any:
    """What ``make(capturable=True)`` gives. Raises Skipped if it is refused, or new rates cannot reach the device."""
    opt = supported(lambda: make(capturable=True), "capturable")
    if not hasattr(opt, "upload_hypers"):
        raise Skipped("this version refuses capturable: it has no upload_hypers()")
    return opt
