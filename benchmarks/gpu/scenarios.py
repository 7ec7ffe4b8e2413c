"""What training does to an optimizer, on every backend: many groups and tensors, huge ones, AMP, graphs, clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusedopt import optim

from ..providers import compiled_by
from .compare import capturable, close, noise, run, same, supported
from .device import Device
from .jobs import Job, Skipped

F32, BF16 = torch.float32, torch.bfloat16
SHAPES = ((1,), (127,), (64, 64), (4097,), (100_003,))


def jobs(device: Device) -> Iterator[Job]:
    """Every check on every backend."""
    checks: tuple[Callable[[Device, str], str], ...] = (
        wrong_rate, groups, many_tensors, clipping, found_inf, graph, no_waiting, huge_tensor, huge_total,
    )  # fmt: skip
    for check in checks:
        for backend in device.backends:
            yield Job(f"{check.__name__}/{backend}", partial(check, device, backend))


def _start(device: Device) -> list[Tensor]:
    return [p.requires_grad_() for p in noise(SHAPES, 0, device.type, F32)]


def _made(backend: str, make: Callable[[], Any], keyword: str = "") -> Any:
    with compiled_by(backend):
        return supported(make, keyword) if keyword else make()


def _feed(params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()


def wrong_rate(device: Device, backend: str) -> str:
    """The comparison that checks optimizers finds a rate that is a hundredth too high."""
    gradients = [noise(SHAPES, seed, device.type, F32) for seed in range(1, 4)]
    how = dict(start=noise(SHAPES, 0, device.type, F32), gradients=gradients, device=device.type)
    truth = run(partial(optim.AdamW, lr=1e-2), "reference", **how, dtype=torch.float64).tensors
    eager = run(partial(optim.AdamW, lr=1e-2), "reference", **how, dtype=F32).tensors
    wrong = run(partial(optim.AdamW, lr=1.01e-2), backend, **how, dtype=F32).tensors
    try:
        close(backend, wrong, truth, eager)
    except AssertionError as found:
        return str(found)
    raise AssertionError("a wrong learning rate was not found out")


def groups(device: Device, backend: str) -> str:
    """465 groups with rates of their own: as the reference, in one launch."""
    shapes = [(64,)] * len(device.some(range(465), 20))
    gradients = [noise(shapes, seed, device.type, F32) for seed in range(1, 4)]

    def make(params: list[Tensor]) -> Any:
        return optim.AdamW([{"params": [p], "lr": 1e-3 * (1 + k)} for k, p in enumerate(params)])

    how = dict(start=noise(shapes, 0, device.type, F32), gradients=gradients, device=device.type)
    ours = run(make, backend, **how, dtype=F32)
    truth, eager = (run(make, "reference", **how, dtype=t).tensors for t in (torch.float64, F32))
    worst = close(backend, ours.tensors, truth, eager)
    launches = ours.opt.explain().launches
    if launches != 1:
        raise AssertionError(f"{launches} launches")
    return f"{worst:.2g} ulp, one launch"


def many_tensors(device: Device, backend: str) -> str:
    """10,000 tensors: the bits of the same elements in one tensor, with and without misaligned gradients."""
    count = len(device.some(range(10_000), 300))
    [flat], gradients = (
        noise([(count * 64,)], 0, device.type, F32),
        [noise([(count * 64,)], seed, device.type, F32) for seed in range(1, 4)],
    )
    make = partial(optim.AdamW, lr=1e-2)
    how = dict(device=device.type, dtype=F32)
    [whole] = run(make, backend, [flat], gradients, **how).tensors
    for misaligned in (False, True):
        parts = run(
            make, backend, flat.split(64), [g.split(64) for [g] in gradients], **how, misaligned=misaligned
        )
        same(f"misaligned: {misaligned}", [torch.cat(parts.tensors)], [whole])
    return f"{count} tensors"


def huge_tensor(device: Device, backend: str) -> str:
    """One tensor of more than 2³¹ elements."""
    return _huge(device, backend, [device.large])


def huge_total(device: Device, backend: str) -> str:
    """More than 2³¹ elements in three tensors."""
    return _huge(device, backend, [device.large // 3 + 5] * 3)


def _huge(device: Device, backend: str, sizes: Sequence[int]) -> str:
    """Every element has changed, and in windows at starts, ends and 2³¹ they are the bits of small tensors."""
    if device.free_memory() < 9 * sum(
        sizes
    ):  # parameters, gradients and a copy in two bytes, and three of one byte
        raise Skipped(f"{device.free_memory() / 1e9:.0f} GB are free, which are too few")
    params, grads = (
        [torch.empty(n, dtype=BF16, device=device.type).uniform_(*between) for n in sizes]
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
                same(f"elements from {at}", [p[piece]], [small])
    if unchanged:
        raise AssertionError(f"{unchanged} elements of {sum(sizes)} were left out")
    return f"{sum(sizes):,} elements"


def _step_sgd(backend: str, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    leaves = [p.requires_grad_() for p in params]
    for p, g in zip(leaves, grads, strict=True):
        p.grad = g
    _made(backend, lambda: optim.SGD(leaves, lr=0.5)).step()
    for p in leaves:
        p.grad = None
        p.requires_grad_(False)


def found_inf(device: Device, backend: str) -> str:
    """With ``amp_fused``, a first step and a later one that overflow change nothing and count for nothing."""
    ours, plain = _start(device), _start(device)
    opt = _made(backend, lambda: optim.AdamW(ours, lr=1e-2, amp_fused=True), "amp_fused")
    other = _made(backend, lambda: optim.AdamW(plain, lr=1e-2))
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=1_000_000)
    for step in range(7):
        given, bad = noise(SHAPES, 1 + step, device.type, F32), step in (0, 4)
        scale = scaler.scale(torch.ones((), device=device.type)).item()
        before = [p.detach().clone() for p in ours]
        _feed(ours, [g * scale for g in given])
        _feed(plain, given)
        if bad:
            ours[step].grad.view(-1)[-1] = float("inf")  # type: ignore[union-attr]
        else:
            other.step()
        scaler.step(opt)
        scaler.update()
        if bad:
            same(f"step {step}, which overflowed", [p.detach() for p in ours], before)
    worst = _alike(ours, plain)
    return f"{worst:.2g} ulp from steps without overflow"


def _alike(ours: Sequence[Tensor], other: Sequence[Tensor], ulp: float = 4.0) -> float:
    """Scalars computed on the device may round once more than the host's."""
    return close("parameters", [p.detach() for p in ours], [p.detach().double() for p in other], ulp=ulp)


def graph(device: Device, backend: str) -> str:
    """Replays of a captured step, with rates, momentum and weight decay that change, against plain steps."""
    said = []
    for name, keys in (
        ("AdamW", ("lr", "betas", "weight_decay")),
        ("SGD", ("lr", "momentum", "weight_decay")),
    ):
        kind = getattr(optim, name)
        first = dict(lr=1e-2, weight_decay=0.1) | ({"momentum": 0.9} if name == "SGD" else {})
        ours, plain = _start(device), _start(device)
        opt = _made(backend, partial(capturable, partial(kind, ours, **first)))
        other = _made(backend, partial(kind, plain, **first))
        _feed(ours, noise(SHAPES, 1, device.type, F32))
        _feed(plain, noise(SHAPES, 1, device.type, F32))
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
            for p, q, g in zip(ours, plain, noise(SHAPES, 5 + step, device.type, F32), strict=True):
                p.grad.copy_(g)  # type: ignore[union-attr]
                q.grad.copy_(g)  # type: ignore[union-attr]
            replay()
            other.step()
        said.append(f"{name} {_alike(ours, plain):.2g} ulp")
    return ", ".join(said)


def clipping(device: Device, backend: str) -> str:
    """``max_grad_norm`` against ``clip_grad_norm_`` before plain steps, above and below the norm."""
    ours, plain = _start(device), _start(device)
    opt = _made(backend, lambda: optim.AdamW(ours, lr=1e-2, max_grad_norm=1.0), "max_grad_norm")
    other = _made(backend, lambda: optim.AdamW(plain, lr=1e-2))
    for step, size in enumerate((1.0, 1e-4, 10.0)):
        given = [g * size for g in noise(SHAPES, 1 + step, device.type, F32)]
        _feed(ours, given)
        _feed(plain, given)
        norm = torch.nn.utils.clip_grad_norm_(plain, 1.0)
        opt.step()
        other.step()
        torch.testing.assert_close(opt.grad_norm.to(norm).reshape(()), norm, rtol=1e-5, atol=0.0)
    return f"{_alike(ours, plain):.2g} ulp"


def no_waiting(device: Device, backend: str) -> str:
    """Warm steps, with new gradients and rates, neither ask the device for anything nor wait for it."""
    params = _start(device)
    opt = _made(backend, lambda: optim.AdamW(params, lr=1e-2))
    given = [noise(SHAPES, seed, device.type, F32) for seed in range(1, 7)]
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
