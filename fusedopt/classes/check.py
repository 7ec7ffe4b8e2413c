"""A trace against the class itself: one step of a few parameters, on copies of them, by both."""

from __future__ import annotations

from typing import Any

import torch

from ..ir.program import interpret
from ..step.items import Item
from ..trace.signature import FACTOR, FOUND_INF
from ..trace.tracer import Trace
from .shadow import Path, Shadow, shown
from .tracing import StepTrace, plain_function

CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
"""How far results may be apart, relative to the largest, by the lowest precision among the tensors of a step: a class
rounds after every operation, kernels once."""


def difference(opt: torch.optim.Optimizer, step: StepTrace) -> str | None:
    """What a trace does otherwise than the class's own step, to copies of the parameters it was traced with."""
    examples = [example for bucket in step.examples for example in bucket]
    tensors: dict[int, Any] = {}
    states: dict[int, dict[str, Any]] = {}
    for item, _ in examples:
        copy = torch.nn.Parameter(item.owner.detach().clone(), requires_grad=item.owner.requires_grad)
        copy.grad = item.owner.grad.detach().clone()  # type: ignore[union-attr]
        tensors[id(item.owner)], tensors[id(item.owner.grad)] = copy, copy.grad
        states[id(item.owner)] = {
            k: tensors.setdefault(id(v), v.detach().clone()) if isinstance(v, torch.Tensor) else v
            for k, v in item.state.items()
        }
    for group in opt.param_groups:
        for p in group["params"]:
            if p.grad is None and id(p) not in tensors:
                tensors[id(p)] = torch.nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
                if p in opt.state:
                    states[id(p)] = {k: _clone((), v) for k, v in opt.state[p].items()}
                break
    shadow = Shadow(opt, type(opt), tensors, _clone, states)
    own = plain_function(type(opt).step)
    own(shadow.opt, *((lambda: torch.zeros(()),) if step.host.returns_loss or step.closure else ()))
    for item, trace in examples:
        p = tensors[id(item.owner)]
        if why := _apart(item, trace, p, states[id(item.owner)]):
            return why
    return step.host.differs(vars(opt), vars(shadow.opt))


def _clone(path: Path, value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _apart(item: Item, trace: Trace, p: torch.Tensor, state: dict[str, Any]) -> str | None:
    buffers = {"param": item.param, "grad": item.grad} | {f"state.{k}": v for k, v in item.state.items()}
    one = torch.ones(()), torch.zeros(())
    given = {n: buffers.get(n, one[n == FOUND_INF]) for n, _ in trace.program.buffers}
    assert FACTOR
    given |= {"param": item.param}
    on_host = {k: v.detach().cpu() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    ours = interpret(trace.program, on_host, trace.slot_values())
    floats = [v.dtype for v in [item.param, item.grad, *item.state.values()] if isinstance(v, torch.Tensor)]
    close = max(CLOSE.get(t, 0.0) for t in floats)
    theirs = {"param": p.detach(), "grad": p.grad} | {f"state.{k}": v for k, v in state.items()}
    for name, value in theirs.items():
        before = buffers[name]
        if not isinstance(value, torch.Tensor):
            continue
        now = ours.get(name, before)
        if not _close(now, value.cpu(), before.detach().cpu() if name == "param" else None, close):
            return f"{name} of a parameter of shape {tuple(item.param.shape)}"
    numbers = trace.new_numbers()
    for key, value in numbers.items():
        if type(value) is not type(state[key]) or not _same_number(value, state[key]):
            return f"the state {key!r} is {value!r}, not {state[key]!r}"
    return None


def _close(a: torch.Tensor, b: torch.Tensor, start: torch.Tensor | None, close: float) -> bool:
    a, b = a.detach().cpu().double(), b.double()
    if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return False
    finite = torch.isfinite(b)
    a, b = a[finite], b[finite]
    if not b.numel() or torch.equal(a, b):
        return True
    largest = float(b.abs().max())
    moved = largest if start is None else float((b - start.double()[finite]).abs().max())
    return float((a - b).abs().max()) <= 10 * close * moved + close * 1e-2 * largest


def _same_number(a: Any, b: Any) -> bool:
    if isinstance(a, float):
        return a == b or a != a and b != b or abs(a - b) <= 1e-9 * abs(b)
    return bool(a == b)


__all__ = ["difference", "shown"]
