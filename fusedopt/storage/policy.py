"""What a policy is, and which there are."""

from __future__ import annotations

import difflib
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ..trace.purity import ACTS, examine

PARAM, OTHERS = "param", "*"
"""What a choice of policies calls the parameter, and all state that it does not name."""


class Policy(ABC):
    """How a tensor is stored: a *code*, and further tensors if that is not all.

    A subclass says how in plain torch, as callbacks do: arithmetic on whole tensors, and the functions of
    `fusedopt.storage.functions`. It is traced into the kernels of every backend::

        class Halves(storage.Policy):
            \"""Two bfloat16 numbers whose sum it is.\"""

            code, rest = torch.bfloat16, (torch.bfloat16,)

            def encode(self, x, noise):
                high = functions.rounded(x, torch.bfloat16)
                return high, functions.cut(x - high)

            def decode(self, code, low):
                return code + low

        storage.register("halves", Halves())
        opt = fusedopt.optim.AdamW(params, storage={"exp_avg": "halves"})

    ``encode`` gets the numbers in the compute type, and ``noise``: numbers from 1 up to 2 to round at random with, one
    for each element, or None where numbers are to be rounded to the nearest (when a checkpoint is loaded). What it
    returns is rounded to ``code`` and ``rest`` when it is stored; for integer types these must be whole numbers in
    their range. ``decode`` gets what is stored, in the compute type. Zeros must decode to zeros: that is what new state
    is made of. What is decoded has to be encoded to the same again, or a checkpoint is not exact. Attributes cannot be
    set once the policy is registered.

    code: the dtype of what has the tensor's shape, and of a parameter its own
    rest: the dtypes of further tensors of its shape
    block: besides there is a float32 number for so many neighbouring elements, the last of what is stored; 0: none
    noisy: whether ``encode`` uses ``noise``
    least: the state of tensors with fewer elements is float32
    state: whether it is for state; params: whether it is for parameters
    fixed: whether the numbers that ``encode`` computes with never change, so that kernels may have them as they are
    """

    code: ClassVar[torch.dtype] = torch.float32
    rest: ClassVar[tuple[torch.dtype, ...]] = ()
    block: ClassVar[int] = 0
    noisy: ClassVar[bool] = False
    least: ClassVar[int] = 0
    state: ClassVar[bool] = True
    params: ClassVar[bool] = False
    fixed: ClassVar[bool] = False

    def __setattr__(self, name: str, value: Any) -> None:
        self._stays(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._stays(name)
        super().__delattr__(name)

    def _stays(self, name: str) -> None:
        if any(known is self for known in POLICIES.values()):
            raise AttributeError(
                f"{name!r} of a policy that is registered cannot change: what is stored would be other numbers then. "
                "Remedy: register another policy, and make an optimizer with it that loads this one's state_dict()"
            )

    @abstractmethod
    def encode(self, x: Any, noise: Any) -> Any:
        """What is stored of the numbers ``x``: the code, or a tuple with the rest. ``noise``: see above."""

    @abstractmethod
    def decode(self, code: Any, *rest: Any) -> Any:
        """The numbers that ``code`` and ``rest`` are stored for."""


POLICIES: dict[str, Policy] = {}
PRESETS = {
    "memory": {PARAM: "bfloat16_sr", OTHERS: "int8"},
    "balanced": {PARAM: "bf16+16", OTHERS: "bfloat16_sr"},
}
"""Names for choices of policies: the fewest bytes that trained as float32 did (docs/storage_curves.md), and fewer bytes
whose steps, of float32 parameters, take no longer (docs/storage_table.md)."""


def register(name: str, policy: Policy) -> None:
    """Make a policy known by a name.

    Args: `name`: of letters, digits, + and _; `policy`: see `Policy`.
    Raises: ValueError: a name that is taken or has other characters, or a policy that does more than compute.
    """
    if not name.replace("+", "").replace("_", "").isalnum():
        raise ValueError(f"a policy's name has letters, digits, + and _ only, not {name!r}")
    if name in POLICIES:
        raise ValueError(f"there is a policy {name!r} already")
    for method in (policy.encode, policy.decode):
        if (verdict := examine(method)).level == ACTS:
            raise ValueError(f"a policy may only compute: {verdict.reason}")
    some = torch.tensor([1.0, -0.375])
    if not policy.rest and not policy.block and not torch.equal(policy.decode(some), some):
        # Whether a tensor is encoded is seen by what is beside it.
        raise ValueError(
            "a policy that stores its code alone must decode it as it is. Remedy: have some of the number in `rest`, "
            "or a scale for a `block`"
        )
    POLICIES[name] = policy


def chosen(storage: Any) -> str:
    """A choice of policies as one text, which groups and callbacks have: ``"param=kahan exp_avg=bfloat16"``.

    Raises TypeError or ValueError, naming what there is, for what is no choice.
    """
    if isinstance(storage, str):
        if "=" in storage:
            storage = dict(part.partition("=")[::2] for part in storage.split())
        elif storage in PRESETS:
            storage = PRESETS[storage]
        else:
            storage = {OTHERS: storage}
    if isinstance(storage, torch.dtype):
        storage = {OTHERS: str(storage).removeprefix("torch.")}
    if not isinstance(storage, Mapping):
        raise TypeError(
            "storage is the name of a policy, or a dict from names of state (or 'param') to policies, not "
            f"{type(storage).__name__}"
        )
    for name, policy in storage.items():
        _check(name, policy)
    return " ".join(f"{name}={policy}" for name, policy in storage.items())


def _check(name: Any, policy: Any) -> None:
    if not isinstance(name, str) or not isinstance(policy, str):
        raise TypeError(f"storage has names of state and of policies, not {name!r}: {policy!r}")
    known = POLICIES.get(policy)
    if known is None:
        near = difflib.get_close_matches(policy, [*POLICIES, *PRESETS], 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join([*POLICIES, *PRESETS])}"
        raise ValueError(f"no policy of storage is called {policy!r}; {hint}")
    if not (known.params if name == PARAM else known.state):
        fit = ", ".join(n for n, p in POLICIES.items() if (p.params if name == PARAM else p.state))
        what = "parameters" if name == PARAM else "state"
        raise ValueError(f"the policy {policy!r} is not for {what}; these are: {fit}")


@functools.lru_cache(maxsize=64)
def choice(text: str) -> dict[str, str]:
    """What `chosen` has written, by name of state."""
    return dict(part.partition("=")[::2] for part in text.split())


NOT_NEGATIVE = frozenset(
    {
        *("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sqr_avg", "sum"),
        *("exp_avg_var", "exp_avg_res_sq", "acc_delta"),
    }
)
"""Names of state, torch's and others', that is never below zero: second moments."""


def of(text: str, name: str) -> str | None:
    """The policy of state, or of the parameter, by its name; None: it is stored as it is."""
    found = choice(text)
    if name in found:
        return found[name]
    if name == PARAM or OTHERS not in found:
        return None
    policy = found[OTHERS]
    unsigned = f"u{policy}"
    return unsigned if name in NOT_NEGATIVE and unsigned in POLICIES else policy
