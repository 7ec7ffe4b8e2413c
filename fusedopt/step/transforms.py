"""Steps inside torch's transforms and traces: ``make_fx``, ``torch.func``, fake tensors, any dispatch mode.

A kernel launch is invisible to them, and their tensors have no memory of their own for it to walk. So a step there
runs the callbacks eagerly, by torch's own operations, which every transform sees; what could not be right is refused
before anything is recorded or written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .items import Item
from .sharded import Whole

_dispatched = torch._C._len_torch_dispatch_stack
_transformed = torch._C._functorch.peek_interpreter_stack
_includes, _PRE_DISPATCH = torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch


def active() -> bool:
    """Whether this thread's operations go through a transform or a dispatch mode. Asked on every step."""
    return bool(_dispatched()) or _transformed() is not None or _includes(_PRE_DISPATCH)


def names() -> str:
    """The dispatch modes that are active, by their types' names."""
    return " and ".join(type(mode).__name__ for mode in _get_current_dispatch_mode_stack())


def tracer() -> Any:
    """What records this thread's operations into a graph, if anything does."""
    module = sys.modules.get("torch.fx.experimental.proxy_tensor")  # without it nobody traces
    return module.get_proxy_mode() if module is not None and active() else None


def prepared(todo: Sequence[Item], made_in: Any) -> list[Item]:
    """The items to step by torch's own operations. Raises RuntimeError where the outcome could not be right.

    ``made_in``: the tracer that the optimizer was made in.
    """
    keys = {layer.key() for layer in torch._C._functorch.get_interpreter_stack() or ()}
    functional = torch._C._functorch.TransformType.Functionalize
    if keys - {functional}:
        names = ", ".join(sorted(str(key).split(".")[-1].lower() for key in keys - {functional}))
        raise RuntimeError(
            f"step() is called within torch.func's {names}, and writes parameters in place, which that cannot follow. "
            "Remedy: return the gradients from the transformed function, and step outside of it"
        )
    if _includes(_PRE_DISPATCH):
        raise RuntimeError(
            "step() is traced before dispatch (make_fx(pre_dispatch=True), torch.export), where p.data leaves no "
            "trace. Remedy: make_fx without pre_dispatch, or step outside of the traced function"
        )
    if tracer() is not made_in:
        raise RuntimeError(
            "step() is traced into a graph, and the optimizer was made outside of the traced function: its state and "
            "step counts would be constants there. Remedy: make the optimizer within the traced function, or trace "
            "forward and backward only, and step outside"
        )
    for item in todo:
        _refuse_stranger(item, functional in keys)
    return [Whole(x.home, x.grad, x.state, x.where, x.hyper, x.modes) for x in todo]


def _refuse_stranger(item: Item, functional: bool) -> None:
    """Raise for a parameter that is real while its gradient is not, or the other way round."""
    fake = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", ())
    for what, is_one in (
        ("fake", lambda t: isinstance(t, fake)),
        ("functional", torch._is_functional_tensor),
    ):
        wanted = is_one(item.grad) or (functional and what == "functional")
        if is_one(item.home) != wanted:
            group, i = item.where
            which = ("parameter", "gradient") if wanted else ("gradient", "parameter")
            raise RuntimeError(
                f"the {which[0]} {i} of group {group} is real, and its {which[1]} is a {what} one, of a mode or "
                "transform that cannot write to it. Remedy: make parameters and optimizer inside too, or step outside"
            )
