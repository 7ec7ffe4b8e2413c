"""What only a GPU shows, on every backend: graphs, steps that wait for nothing, tensors beyond 32-bit offsets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fusedopt
from fusedopt import optim

from ..providers import RULES, Lion
from .device import Device
from .jobs import Job, Skipped

SHAPES = ((1,), (127,), (64, 64), (4097,), (100_003,))


class Global(torch.optim.Optimizer):
    """Steps by the largest norm of all gradients so far; without one above zero nothing is counted."""

    def __init__(self, params: Sequence[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr, "largest": 0.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = sum(p.grad.square().sum().item() for p in found) ** 0.5
        if norm == 0:
            return
        for group in self.param_groups:
            group["largest"] = max(group["largest"], norm)
        for p in found:
            self.state[p]["step"] = self.state[p].get("step", 0) + 1
            p.sub_(p.grad, alpha=group["lr"] / group["largest"] / self.state[p]["step"])


CLASSES: tuple[tuple[Any, dict[str, Any]], ...] = (
    (Lion, {k: v for k, v in RULES["Lion"].hypers.items() if k != "lr"}),
    (Global, {}),
    *(
        (getattr(torch.optim, name), {})
        for name in (
            "Adadelta",
            "Adagrad",
            "Adam",
            "AdamW",
            "Adamax",
            "NAdam",
            "RAdam",
            "RMSprop",
            "Rprop",
            "SGD",
        )
    ),
)


def jobs(device: Device) -> Iterator[Job]:
    """Every check on every backend."""
    checks: tuple[Callable[[Device, str], str], ...] = (
        graph, no_waiting, overflow, sharded, classes, class_graph, class_overflow, class_stored,
        huge_tensor, huge_total,
    )  # fmt: skip
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


def overflow(device: Device, backend: str) -> str:
    """A loss scaler that finds an infinity in the first step, and in a later one: nothing is stored or counted."""
    ours, plain = _start(device), _start(device)
    opt = optim.AdamW(ours, lr=1e-2, backend=backend, amp_fused=True)
    other = optim.AdamW(plain, lr=1e-2, backend=backend)
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0)
    for step in range(5):
        given, before = _noise(device, 1 + step), [p.detach().clone() for p in ours]
        scale = scaler.scale(torch.ones((), device=device.type)).item()
        _feed(ours, [g * scale for g in given])
        if bad := step in (0, 3):
            ours[2].grad.view(-1)[5] = float("inf")  # type: ignore[union-attr]
        scaler.step(opt)
        scaler.update()
        if not bad:
            _feed(plain, given)
            other.step()
        for p, b, q in zip(ours, before, plain, strict=True):
            torch.testing.assert_close(p, b if bad else q, rtol=1e-6, atol=1e-6 * (not bad))
    if (count := float(opt.state[ours[0]]["step"])) != 3:
        raise AssertionError(f"three of five steps are to be counted, and {count} were")
    return "five steps, of which two overflow"


def sharded(device: Device, backend: str) -> str:
    """FSDP2 in a group of one process, against the same model whole: fusedopt's own AdamW, and torch's fused."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    library = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(library, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        options = {"backend": backend, "max_grad_norm": 1.0}
        for make in (
            partial(optim.AdamW, lr=1e-2, **options),
            lambda params: fusedopt.fuse(torch.optim.AdamW(params, lr=1e-2), **options),
        ):
            torch.manual_seed(0)
            plain = torch.nn.Sequential(torch.nn.Linear(65, 33), torch.nn.ReLU(), torch.nn.Linear(33, 7))
            plain = plain.to(device.type)
            model = copy.deepcopy(plain)
            fully_shard(model, mesh=init_device_mesh(device.type, (1,)))
            opt, other = make(model.parameters()), optim.AdamW(plain.parameters(), lr=1e-2, **options)
            for step in range(4):
                torch.manual_seed(1 + step)
                x = torch.randn(16, 65, device=device.type)
                for net, each in ((model, opt), (plain, other)):
                    each.zero_grad()
                    net(x).square().sum().backward()
                    each.step()
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]
            _whole(opt, type(opt).__module__)
    finally:
        distributed.destroy_process_group()
    return "two optimizers, four steps, clipped"


def classes(device: Device, backend: str) -> str:
    """torch.optim's classes as they are, fused, against their own steps."""
    kinds = device.some(CLASSES, 3)
    for kind, more in kinds:
        ours, plain = _start(device), _start(device)
        opt = fusedopt.fuse(kind(ours, lr=1e-2, **more), backend=backend)
        other = kind(plain, lr=1e-2, **more)
        for step in range(8):
            _feed(ours, _noise(device, 1 + step))
            _feed(plain, _noise(device, 1 + step))
            opt.step()
            other.step()
        _near(ours, plain, kind.__name__)
        _whole(opt, kind.__name__)
    return f"{len(kinds)} classes"


def class_graph(device: Device, backend: str) -> str:
    """Fused classes in a graph, replayed with rates and weight decay that change, against their own steps."""
    on_device = {"capturable": device.type == "cuda"}  # where AdamW keeps its counts
    for kind, more in (
        CLASSES[0],
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.AdamW, on_device),
    ):
        ours, plain = _start(device), _start(device)
        opt = fusedopt.fuse(kind(ours, lr=1e-2, **more), backend=backend, capturable=True)
        other = kind(plain, lr=1e-2, **more)
        _feed(ours, _noise(device, 1))
        _feed(plain, _noise(device, 1))
        with device.side_stream():
            for _ in range(4):
                opt.step()
        for _ in range(4):
            other.step()
        replay = device.capture(opt.step)
        for step in range(4):
            for each in (opt, other):
                (group,) = each.param_groups
                decay = "weight_decay" if "weight_decay" in group else "wd"
                group.update({"lr": 1e-3 * (2 + step), decay: 0.01 * (1 + step)})
            opt.upload_hypers()  # type: ignore[attr-defined]
            for p, q, g in zip(ours, plain, _noise(device, 5 + step), strict=True):
                p.grad.copy_(g)  # type: ignore[union-attr]
                q.grad.copy_(g)  # type: ignore[union-attr]
            replay()
            other.step()
        _near(ours, plain, kind.__name__)
    return "Lion, SGD, AdamW; four replays each"


def class_overflow(device: Device, backend: str) -> str:
    """Fused classes that a loss scaler hands its scale to, clipped, against their own steps after both."""
    kinds = device.some(CLASSES, 3)
    for kind, more in kinds:
        found = []
        for fused in (True, False):
            params = _start(device)
            opt = kind(params, lr=1e-2, **more)
            if fused:
                fusedopt.fuse(opt, backend=backend, amp_fused=True, max_grad_norm=1.0)
            scaler = torch.amp.GradScaler(device.type, init_scale=8.0)
            for step in range(6):
                scale = scaler.scale(torch.ones((), device=device.type)).item()
                _feed(params, [g * scale for g in _noise(device, 1 + step)])
                if step in (0, 3):
                    params[2].grad.view(-1)[5] = float("inf")  # type: ignore[union-attr]
                if not fused:
                    scaler.unscale_(opt)
                    torch.nn.utils.clip_grad_norm_(params, 1.0)
                scaler.step(opt)
                scaler.update()
            found.append(params)
            if fused:
                _whole(opt, kind.__name__)
        _near(*found, kind.__name__)
    return f"{len(kinds)} classes, six steps of which two overflow"


def class_stored(device: Device, backend: str) -> str:
    """Policies for a fused class's state, against kernels of the CPU.

    The first step is torch's own, rounded otherwise on the CPU: the next code is stored for some elements.
    """
    policies = ("bfloat16", "bf16+8", "kahan", "int8")
    for policy in policies:
        found = []
        for place, compiled_by in ((device.type, backend), ("cpu", "cpp")):
            params = [p.detach().to(place).requires_grad_() for p in _start(device)]
            opt = fusedopt.fuse(torch.optim.AdamW(params, lr=1e-2), backend=compiled_by, storage=policy)
            for step in range(5):
                _feed(params, [g.to(place) for g in _noise(device, 1 + step)])
                opt.step()
            _whole(opt, f"{policy} on {place}")
            found.append([p.cpu() for p in params])
        far = torch.cat([(a - b).abs().flatten() for a, b in zip(*found, strict=True)])
        if (apart := int((far > 1e-5).sum())) > len(far) / 100:
            raise AssertionError(
                f"{policy}: {apart} of {len(far)} elements differ, by up to {float(far.max()):.1e}"
            )
    return f"AdamW; {', '.join(policies)}"


def _near(ours: Sequence[Tensor], theirs: Sequence[Tensor], what: str) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda m: f"{what}: {m}")


def _whole(opt: Any, what: str) -> None:
    """Raises AssertionError if something runs eagerly."""
    if opt.explain().eager or not opt.explain().launches:
        raise AssertionError(f"{what}: something runs eagerly:\n{opt.explain()}")
