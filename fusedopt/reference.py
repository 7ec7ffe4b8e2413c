"""The reference: callbacks run eagerly, parameter by parameter, with plain torch ops. It defines what is correct.

Its rules, which every backend shares:

- Parameter, gradient and state are upcast to the compute type (float32, or float64 if one of them is), the callbacks
  run on those copies, and results are rounded once, when they are stored.
- A new state buffer gets the dtype the callback asked for: ``zeros_like(p)`` the parameter's, ``dtype=`` that one. A
  0-d state (a norm, say) keeps the compute type. ``state_dtype=`` overrides both for tensors with elements.
- Returned state is taken by value.
- Nothing of the user's is written before every callback of the step has returned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AskedDtypes(TorchFunctionMode):
    """Keeps the compute type inside callbacks, and remembers on each tensor the dtype eager torch would have given it.

    Callbacks see low-precision tensors upcast, so ``zeros_like(p)`` alone cannot tell which dtype its state is to be
    stored in. The dtype travels from operands to results by torch's promotion.
    """

    def __init__(self, compute: torch.dtype) -> None:
        super().__init__()
        self.compute = compute

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        explicit = kwargs.get("dtype") if func.__name__.endswith("_like") else None
        if explicit in FLOATS:
            kwargs["dtype"] = self.compute
        out = func(*args, **kwargs)
        known = hasattr(out, "_fusedopt_asked")  # p.grad, or what an in-place method returns: its dtype stays
        if isinstance(out, torch.Tensor) and out.is_floating_point() and not known:
            mark(out, explicit or self._promoted(args))
        return out

    def _promoted(self, args: Any) -> torch.dtype:
        tensors = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        strong = [a for a in tensors if a.dim()] or tensors
        result = asked(strong[0]) if strong else self.compute
        for t in strong[1:]:
            result = torch.promote_types(result, asked(t))
        return result


def mark(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Remember the dtype the user would see for this compute-type tensor."""
    t._fusedopt_asked = dtype  # type: ignore[attr-defined]
    return t


def asked(t: torch.Tensor) -> torch.dtype:
    """The dtype remembered by ``mark``, else the tensor's own."""
    return getattr(t, "_fusedopt_asked", t.dtype)


def upcast(t: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """A private copy in the compute type that remembers its dtype; of counts, and tensors of others, as they are."""
    if not t.is_floating_point() or (t.dtype == torch.float64 and t.dim() == 0):
        return t.detach().clone()
    return mark(t.detach().to(compute, copy=True), t.dtype)


def run_callback(
    callback: Callable[..., Any], p: torch.Tensor, state: dict[str, Any], hyper: Mapping[str, Any]
) -> None:
    """Call one callback on work copies and take the state it returns, by value."""
    mode = AskedDtypes(p.dtype) if p.device.type == "cpu" or p.is_cuda else contextlib.nullcontext()
    with mode:
        returned = callback(p, **{**state, **hyper})
        for key, value in returned.items() if isinstance(returned, dict) else ():
            alias = isinstance(value, torch.Tensor) and value is not state.get(key)
            state[key] = value.detach().clone() if alias else value
