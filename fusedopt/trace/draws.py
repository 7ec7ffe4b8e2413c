"""``fusedopt.uniform`` and ``fusedopt.normal``: random numbers for callbacks, the same wherever a callback runs."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch

from ..ir import random
from ..ir.ops import DRAWS, ELEMENT
from ..ir.random import STREAMS
from .number import Number
from .signals import Untraceable
from .tensor import SymTensor, called, lift

_place: ContextVar[int] = ContextVar("fusedopt.draws", default=0)


def of(group: int, index: int) -> None:
    """Draw from here on, in this context (`totals.collect`), for this parameter: number ``index`` of its group."""
    _place.set(random.place(group, index))


def uniform(p: Any, *, seed: Any, step: Any, stream: int = 0) -> Any:
    """Random numbers, at least 0 and less than 1, one for each element of the parameter; for callbacks.

    A tensor like ``torch.rand_like(p)``, but no generator is advanced: the numbers are a function of what is given, of
    the parameter (its group and its number in there) and of the element. So a run can be repeated, and is not changed
    by other threads, devices or backends, by which gradients are there, or by a restart from a checkpoint::

        def drop(p, seed=0, step=0, rate=0.1, **kwargs):
            p.grad.mul_(fusedopt.uniform(p, seed=seed, step=step) >= rate)

    ``seed`` and ``step`` are whole numbers up to 2⁵³ (of a step its lower 32 bits count), numbers or 0-d tensors: a
    hyperparameter and a step count in the state, most often. ``stream`` (0 to 255, always the same at one place in the
    code) tells numbers for one purpose from those for another: the same call twice gives the same numbers twice.

    Numbers are multiples of 2⁻²⁴ in any dtype that callbacks compute in. They are the same for the same element in
    whatever order memory has the dimensions. Of a DTensor, all processes take theirs from those of the whole.

    Outside of callbacks the numbers are those of the first parameter of the first group, rounded to p's dtype.

    Raises TypeError for what is no tensor with floats, or no number. ValueError for another stream.
    """
    return _drawn("uniform", p, seed, step, stream)


def normal(p: Any, *, seed: Any, step: Any, stream: int = 0) -> Any:
    """Random numbers of the standard normal distribution, one for each element of the parameter; for callbacks.

    Like ``torch.randn_like(p)``; all else is as with `uniform`, ``seed``, ``step`` and ``stream`` too: its numbers are
    independent of these also where the arguments are the same. They are float32 numbers in any dtype, up to ±6.7, and
    the same on all backends to the bit.
    """
    return _drawn("normal", p, seed, step, stream)


def noise(p: Any, *, seed: Any, step: Any, stream: int = 0) -> Any:
    """Random numbers from 1 up to 2, one for each element of the parameter, of 16 bits and cheap: to round with.

    Otherwise as `uniform`.
    """
    return _drawn("noise", p, seed, step, stream)


def _drawn(name: str, p: Any, seed: Any, step: Any, stream: Any) -> Any:
    if issubclass(type(p), SymTensor):
        return called(name, _symbolic, p, name, seed, step, stream)
    if not isinstance(p, torch.Tensor) or not p.is_floating_point():
        raise TypeError(f"fusedopt.{name} draws for a tensor of floating point, not for {_called(p)}")
    _check_stream(name, stream)
    with torch._C.DisableTorchFunction(), torch.no_grad():
        numbers = [_number(name, what, x, p.device) for what, x in (("seed", seed), ("step", step))]
        drawn = DRAWS[name].torch(p.numel(), *numbers, stream, _place.get())
        out = _placed(drawn.reshape(p.shape).to(p.dtype), p)
    out._fusedopt_asked = getattr(p, "_fusedopt_asked", p.dtype)  # type: ignore[attr-defined]
    return out


def _called(x: Any) -> str:
    return f"one of {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__


def _check_stream(name: str, stream: Any) -> None:
    if type(stream) is not int or not 0 <= stream < STREAMS:
        raise ValueError(f"fusedopt.{name}: stream is a whole number from 0 to {STREAMS - 1}, not {stream!r}")


def _number(name: str, what: str, x: Any, device: torch.device) -> torch.Tensor:
    """As kernels get it: a double."""
    if isinstance(x, torch.Tensor) and x.dim() == 0:
        return x.detach().to(device, torch.float64)
    if not isinstance(x, (int, float)):
        raise TypeError(f"fusedopt.{name}: {what} is a number, or a 0-d tensor, not {_called(x)}")
    return torch.tensor(float(x), dtype=torch.float64, device=device)


def _placed(drawn: torch.Tensor, like: Any) -> torch.Tensor:
    """Laid out like the parameter; of a DTensor the part that belongs here."""
    if hasattr(like, "placements"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(drawn, like.device_mesh, like.placements, src_data_rank=None)
    return drawn


def _symbolic(p: SymTensor, name: str, seed: Any, step: Any, stream: Any) -> SymTensor:
    run = p.run
    stream = stream.escape() if isinstance(stream, Number) else stream
    _check_stream(name, stream)
    if p.kind != ELEMENT or p.shown is not None or p.is_bool:
        raise Untraceable("random numbers for what has not the parameter's shape")
    if run.attribute(ELEMENT, "in_order") is None:
        raise Untraceable("random numbers for a tensor whose memory is elsewhere, or spread over processes")
    numbers = [lift(run, x) for x in (seed, step)]
    if any(x.kind == ELEMENT or x.dims or x.is_bool for x in numbers):
        raise Untraceable("a seed or step that is not one number per tensor")
    nodes = [x.node if run.compute == torch.float64 else run.graph.wide(x.node) for x in numbers]
    return SymTensor(run, run.graph.op(name, *nodes, to=stream, where=run.where), p.asked)
