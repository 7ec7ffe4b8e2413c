"""What only a GPU shows, on every backend: graphs, steps that wait for nothing, tensors beyond 32-bit offsets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from fusedopt import optim

from .device import Device
from .jobs import Job, Skipped

SHAPES = ((1,), (127,), (64, 64), (4097,), (100_003,))


def jobs(device: Device) -> Iterator[Job]:
    """Every check on every backend."""
    checks: tuple[Callable[[Device, str], str], ...] = (graph, no_waiting, huge_tensor, huge_total)
    for check in checks:
        for backend in device.backends:
            yield Job(f"{check.__name__}/{backend}", partial(check, device, backend))


def _start(device: Device) -> list[Tensor]:
    return [p.requires_grad_() for p in _noise(device, 0)]


def _noise(device: Device, seed: int) -> list[Tensor]:
    random = torch.Generator(device.type).manual_seed(seed)
    return [torch.randn(s, generator=random, device=device.type) for s in SHAPES]


def _feed(params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()


def huge_tensor(device: Device, backend: str) -> str:
    """One tensor of more than 2³¹ elements."""
    return _huge(device, backend, [device.large])


def huge_total(device: Device, backend: str) -> str:
    """More than 2³¹ elements in three tensors."""
    return _huge(device, backend, [device.large // 3 + 5] * 3)


def _huge(device: Device, backend: str, sizes: Sequence[int]) -> str:
    """Every element has changed, and in windows at starts, ends and 2³¹ they are the bits of small tensors."""
    # parameters, gradients and a copy in two bytes, and three of one byte
    if device.free_memory() < 9 * sum(sizes):
        raise Skipped(f"{device.free_memory() / 1e9:.0f} GB are free, which are too few")
    params, grads = (
        [torch.empty(n, dtype=torch.bfloat16, device=device.type).uniform_(*between) for n in sizes]
        for between in ((1, 2), (0.5, 1))
    )
    before = [p.clone() for p in params]
    _step_sgd(backend, params, grads)
    unchanged = sum(int((p == b).sum()) for p, b in zip(params, before, strict=True))
    for p, b, g in zip(params, before, grads, strict=True):
        width = min(1 << 16, p.numel() // 4)
        for at in (0, p.numel() // 2, 2**31 - width // 2, p.numel() - width):
            if at + width <= p.numel():
                piece = slice(at, at + width)
                small = b[piece].clone()
                _step_sgd(backend, [small], [g[piece].clone()])
                if not torch.equal(p[piece], small):
                    raise AssertionError(f"elements from {at} are not those of a small tensor")
    if unchanged:
        raise AssertionError(f"{unchanged} elements of {sum(sizes)} were left out")
    return f"{sum(sizes):,} elements"


def _step_sgd(backend: str, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    leaves = [p.requires_grad_() for p in params]
    for p, g in zip(leaves, grads, strict=True):
        p.grad = g
    optim.SGD(leaves, lr=0.5, backend=backend).step()
    for p in leaves:
        p.grad = None
        p.requires_grad_(False)


def graph(device: Device, backend: str) -> str:
    """Replays of a captured step, with rates, momentum and weight decay that change, against plain steps."""
    for kind, keys, first in (
        (optim.AdamW, ("lr", "betas", "weight_decay"), {}),
        (optim.SGD, ("lr", "momentum", "weight_decay"), {"momentum": 0.9}),
    ):
        first |= dict(lr=1e-2, weight_decay=0.1, backend=backend)
        ours, plain = _start(device), _start(device)
        opt, other = kind(ours, **first, capturable=True), kind(plain, **first)
        _feed(ours, _noise(device, 1))
        _feed(plain, _noise(device, 1))
        with device.side_stream():
            for _ in range(4):
                opt.step()
        for _ in range(4):
            other.step()
        replay = device.capture(opt.step)
        for step in range(4):
            values = dict(lr=1e-2 * (2 + step), momentum=0.8 - 0.1 * step, weight_decay=0.01 + 0.01 * step)
            values["betas"] = (values["momentum"], 0.99)
            for each in (opt, other):
                each.param_groups[0].update({k: values[k] for k in keys})
            opt.upload_hypers()
            for p, q, g in zip(ours, plain, _noise(device, 5 + step), strict=True):
                p.grad.copy_(g)  # type: ignore[union-attr]
                q.grad.copy_(g)  # type: ignore[union-attr]
            replay()
            other.step()
        for p, q in zip(ours, plain, strict=True):  # scalars computed on the device may be rounded once more
            torch.testing.assert_close(p, q, rtol=1e-6, atol=2e-6)
    return "AdamW and SGD, four replays each"


def no_waiting(device: Device, backend: str) -> str:
    """Warm steps, with new gradients and rates, neither ask the device for anything nor wait for it."""
    params = _start(device)
    opt = optim.AdamW(params, lr=1e-2, backend=backend)
    given = [_noise(device, seed) for seed in range(1, 7)]
    for k in range(3):
        _feed(params, given[k])
        opt.step()
    with device.no_waiting():
        for k in range(3, 6):
            for p, g in zip(params, given[k], strict=True):
                p.grad = g  # nothing is allocated while the device is held
            opt.param_groups[0]["lr"] = 1e-3 * k
            opt.step()
    return "three steps"
