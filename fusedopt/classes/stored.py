"""A class's state in a policy of storage: to the class the tensor that it made, to kernels what is stored of it.

What the class itself makes is encoded when its step is over, and decoded before it steps again: only kernels, which
decode what they load and encode what they store, ever see the code. So the class needs to know of no policy.
"""

from __future__ import annotations

import types
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..storage.callbacks import dtypes, encoded, keys
from ..storage.policy import POLICIES, of
from ..trace.signature import PLAIN
from ..trace.tensor import FLOATS

DRAWS = "draws"
"""How often what is rounded at random was."""


class Stored(torch.Tensor):
    """State as its policy stores it. Whoever uses it gets the numbers that it stands for, in a tensor of their own;
    what is written to it is stored, rounded to the nearest. A copy, and a pickle, are plain tensors.

    ``code``, ``rest0``, ``rest1`` … are what is stored (`fusedopt.storage.Policy`), ``draws`` is `DRAWS`.
    """

    __slots__ = ("policy",)
    policy: str

    @staticmethod
    def __new__(cls, value: torch.Tensor, policy: str, parts: dict[str, Any] | None = None) -> Stored:
        out: Stored = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device
        )
        out.policy = policy
        if parts is None:
            parts = dict(zip(_attributes(policy), _encoded(policy, value), strict=True))
            parts |= {DRAWS: 0} if POLICIES[policy].noisy else {}
        vars(out).update(parts)
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:  # and x.data: the same memory
            return Stored(args[0], args[0].policy, vars(args[0]))
        plain = {id(x): (x, x.numbers()) for x in tree_leaves((args, kwargs)) if isinstance(x, Stored)}
        back = {id(numbers): x for x, numbers in plain.values()}
        args, kwargs = tree_map(lambda x: plain[id(x)][1] if id(x) in plain else x, (args, kwargs or {}))
        out = func(*args, **kwargs)
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name)):
                    if id(x) in back:
                        back[id(x)].store(x)
        return tree_map(lambda x: back.get(id(x), x), out)

    def numbers(self, parts: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """What it stands for, in a plain tensor; or would, if these were its parts."""
        parts = parts or [vars(self)[name] for name in _attributes(self.policy)]
        code, *rest = (part.to(torch.float32) for part in parts)
        return POLICIES[self.policy].decode(code, *rest).to(self.dtype)

    def store(self, value: torch.Tensor) -> None:
        """Stand for these numbers from now on."""
        for name, part in zip(_attributes(self.policy), _encoded(self.policy, value), strict=True):
            vars(self)[name].copy_(part)

    def keys(self, name: str) -> list[str]:
        """What kernels call its parts, if the state calls it this."""
        return [name, *keys(name, self.policy)]

    def places(self, name: str) -> Iterator[tuple[str, str]]:
        """Its attributes that a step reads and writes, with what kernels call them."""
        yield from zip(_attributes(self.policy), self.keys(name), strict=True)
        if POLICIES[self.policy].noisy:
            yield DRAWS, f"{name}:{DRAWS}"

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        memo[id(self)] = out = self.numbers()
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.numbers().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{self.numbers()!r}, stored as {self.policy}"


def _attributes(policy: str) -> list[str]:
    return ["code", *(f"rest{k}" for k in range(len(dtypes(POLICIES[policy])) - 1))]


@torch.no_grad()
def _encoded(policy: str, value: torch.Tensor) -> list[torch.Tensor]:
    found = POLICIES[policy]
    parts = encoded(found, value.detach().to(torch.float32), None)
    return [part.to(dtype) for part, dtype in zip(parts, dtypes(found), strict=True)]


def _policy(storage: str, name: Any, value: Any, p: torch.Tensor) -> str | None:
    """That of what a class keeps of a parameter under this name; None: it stays as it is."""
    if not isinstance(name, str) or ":" in name or type(value) is not torch.Tensor:
        return None
    if value.shape != p.shape or not p.dim() or value.dtype not in FLOATS or value.dtype == torch.float64:
        return None
    found = of(storage, name)
    if found is None or value.numel() < max(POLICIES[found].least, 1) or type(p.data) is not torch.Tensor:
        return None
    same = POLICIES[found].code == value.dtype and len(dtypes(POLICIES[found])) == 1
    return None if same and not POLICIES[found].noisy else found


def encode(opt: torch.optim.Optimizer, store: dict[Any, Any], storage: str) -> None:
    """Store what is kept of parameters as these policies say, but for what is so already.

    A tensor that is found elsewhere too, in the optimizer or the parameter's own memory, stays: another would not do.
    """
    states = [
        (p, kept) for p, kept in store.items() if isinstance(p, torch.Tensor) and isinstance(kept, dict)
    ]
    found = [
        (p, kept, name, policy)
        for p, kept in states
        for name, value in kept.items()
        if (policy := _policy(storage, name, value, p)) is not None
    ]
    if not found:
        return
    times = Counter([id(v) for _, kept in states for v in kept.values()])
    others = _tensors_of(opt, store)
    for p, kept, name, policy in found:
        value = kept[name]
        alone = times[id(value)] == 1 and id(value) not in others
        if alone and value.untyped_storage().data_ptr() != p.untyped_storage().data_ptr():
            kept[name] = Stored(value, policy)


def _tensors_of(opt: torch.optim.Optimizer, store: dict[Any, Any]) -> set[int]:
    """The ids of the tensors that an optimizer has in containers and objects, besides this store."""
    todo: list[Any] = list(vars(opt).values())
    seen = {id(store), id(opt)}
    found: set[int] = set()
    while todo:
        x = todo.pop()
        if isinstance(x, torch.Tensor):
            found.add(id(x))
        elif id(x) not in seen and not isinstance(x, (*PLAIN, torch.nn.Module, type, types.ModuleType)):
            seen.add(id(x))
            todo += (
                x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple, set, deque)) else ()
            )
            todo += getattr(x, "__dict__", {}).values()
    return found


def decode(state: Any) -> None:
    """Undo `encode`."""
    for name, value in list(state.items()) if isinstance(state, dict) else ():
        if isinstance(value, Stored):
            state[name] = value.numbers()


def plain(x: Any) -> Any:
    """A state_dict with plain tensors in it."""
    if isinstance(x, Stored):
        return x.numbers()
    if type(x) is dict:
        return {k: plain(v) for k, v in x.items()}
    return x
