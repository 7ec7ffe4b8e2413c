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
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode

from ..callback import Callback, call

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AskedDtypes(TorchFunctionMode):
    """Keeps the compute type inside callbacks, and remembers on each tensor the dtype eager torch would have given it.

    Callbacks see low-precision tensors upcast, so ``zeros_like(p)`` alone cannot tell which dtype its state is to be
    stored in. The dtype travels from operands to results by torch's promotion. ``touched`` says whether anything was
    written to.
    """

    def __init__(self, compute: torch.dtype) -> None:
        super().__init__()
        self.compute = compute
        self.touched = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), func.__name__
        self.touched |= name in ("__set__", "__setitem__", "numpy") or name.removesuffix("__").endswith("_")
        self.touched |= "out" in kwargs
        if name == "__get__" and (size := _SIZES.get(getattr(func, "__self__", None))):
            return size(args[0])
        if name == "element_size":
            return asked(args[0]).itemsize
        if name in _CASTS:
            return _cast(func, args, kwargs)
        explicit = kwargs.get("dtype") if name.endswith("_like") else None
        if explicit in FLOATS:
            kwargs["dtype"] = self.compute
        out = func(*args, **kwargs)
        known = hasattr(out, "_fusedopt_asked")  # p.grad, or what an in-place method returns: its dtype stays
        if isinstance(out, torch.Tensor) and out.is_floating_point() and not known:
            mark(out, explicit or self._promoted(args, out.dtype))
        return out

    def _promoted(self, args: Any, own: torch.dtype) -> torch.dtype:
        tensors = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        strong = [a for a in tensors if a.dim()] or tensors
        result = asked(strong[0]) if strong else own
        for t in strong[1:]:
            result = torch.promote_types(result, asked(t))
        return result


_SIZES: dict[Any, Callable[[torch.Tensor], int]] = {
    torch.Tensor.itemsize: lambda t: asked(t).itemsize,
    torch.Tensor.nbytes: lambda t: asked(t).itemsize * t.numel(),
}
"""Attributes that are the user's tensor's, not those of its copy in the compute type."""
_CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16"}


def _cast(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A cast as the user's tensor would take it: to the dtype that it has there it is itself, to another it is new."""
    t, flags = args[0], [a for a in args[1:] if type(a) is bool]  # non_blocking and copy
    copy = kwargs.get("copy") or flags[1:] == [True]
    wanted = func(t.new_empty([0] * t.dim()), *args[1:], **kwargs)
    if not isinstance(wanted, torch.Tensor) or not wanted.is_floating_point():
        return func(*args, **kwargs)
    other = next((a for a in args[1:] if isinstance(a, torch.Tensor)), None)
    dtype = wanted.dtype if other is None else asked(other)
    if dtype == asked(t) and not copy and wanted.device == t.device:
        return t
    out = func(*args, **kwargs)
    return mark(out.clone() if out is t else out, dtype)


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


def is_marked(t: torch.Tensor) -> bool:
    """Whether ``asked`` is another than its own dtype."""
    dtype = t.__dict__.get("_fusedopt_asked")
    return dtype is not None and dtype != t.dtype


class Lent:
    """The user's own parameter, for the time of a callback's call made of a work copy and its gradient.

    So a callback finds what it would in a plain loop: the parameter's identity and attributes. A tensor that cannot
    be lent (of a wrapper, whose memory is another tensor's, or made under inference mode) is replaced by the work copy,
    which has its attributes. Of wrappers DTensors can be lent: their local tensor is known.
    """

    def __init__(self, owner: torch.Tensor, work: torch.Tensor) -> None:
        self.owner, self.work = owner, work
        self.kept: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None = None

    def __enter__(self) -> torch.Tensor:
        owner, work = self.owner, self.work
        if owner is work:
            return work
        if _is_wrapper(owner):
            vars(work).update({k: v for k, v in vars(owner).items() if k not in vars(work)})
            return work
        self.kept = owner.data, owner.grad, _local(owner)
        try:
            _become(owner, work.data, work.grad, _local(work))
            if is_marked(work):
                mark(owner, asked(work))
        except (RuntimeError, TypeError, AttributeError):
            self.give_back()
            vars(work).update(vars(owner))
            return work
        return owner

    def __exit__(self, *_: Any) -> None:
        if self.kept is not None:
            dtype, self.work = asked(self.work), self.owner.data
            if dtype != self.work.dtype:
                mark(self.work, dtype)
            self.work.grad = self.owner.grad
            self.give_back()

    def give_back(self) -> None:
        """Make the owner what it was, if it is not."""
        if self.kept is not None:
            _become(self.owner, *self.kept)
            vars(self.owner).pop("_fusedopt_asked", None)
            self.kept = None


def tidy(lent: Lent | None) -> None:
    """After a step that a signal may have ended anywhere: no parameter is lent, and no mode of ours is active."""
    while isinstance(_get_current_function_mode(), AskedDtypes):
        _pop_mode()
    if lent is not None:
        lent.give_back()


def _local(t: torch.Tensor) -> torch.Tensor | None:
    """What a DTensor has its elements in; None for other tensors."""
    return vars(t).get("_local_tensor")


def _is_wrapper(t: torch.Tensor) -> bool:
    """Whether its elements are in another tensor, nobody knows which."""
    return type(t).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ and _local(t) is None


def _become(
    p: torch.Tensor, data: torch.Tensor, grad: torch.Tensor | None, local: torch.Tensor | None
) -> None:
    p.grad = None  # which may not fit what is next
    p.data = data
    if local is not None:  # a DTensor is not moved by that
        p._local_tensor = local  # type: ignore[attr-defined]
    try:
        p.grad = grad
    except RuntimeError:  # its gradient's dtype is fixed
        dtype, p.grad_dtype = p.grad_dtype, None
        p.grad = grad
        p.grad_dtype = dtype


def run_callback(
    callback: Callback, lent: Lent, state: dict[str, Any], hyper: Mapping[str, Any], watch: bool = True
) -> bool:
    """Call one callback with the lent parameter, and take the state that it returns, by value.

    ``lent.work`` is the work copy as the callback leaves it. Returns whether the callback did anything; True without
    ``watch``, which is for callbacks that ask for no dtype. Then, where all is of one dtype, they are called as in a
    plain loop.
    """
    work = lent.work
    for t in () if watch else (work, work.grad, *state.values()):
        if isinstance(t, torch.Tensor) and (t.dtype != work.dtype or is_marked(t)):
            watch = True
    mode = AskedDtypes(work.dtype) if watch and (work.device.type == "cpu" or work.is_cuda) else None
    with lent as p, mode or contextlib.nullcontext():
        returned = call(callback, p, {**state, **hyper})
        new = returned if isinstance(returned, dict) else {}
        for key, value in new.items():
            alias = isinstance(value, torch.Tensor) and value is not state.get(key)
            state[key] = value.detach().clone() if alias else value
    return bool(new) or mode is None or mode.touched
