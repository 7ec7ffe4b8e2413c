"""Constructors that speak torch.optim's names: what they check of their arguments, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from torch import Tensor

from .core import Optimizer

_NOT_NEGATIVE = (
    "eps", "weight_decay", "momentum", "alpha", "lr_decay", "initial_accumulator_value", "momentum_decay", "lr",
)  # fmt: skip
_LABELS = {"lr": "learning rate", "eps": "epsilon value"}


def _each(value: Any) -> Iterator[Any]:
    """The numbers in a hyperparameter: itself, or those of a slice, list or array (one per param group)."""
    if isinstance(value, slice):
        yield from (v for v in (value.start, value.stop) if v is not None)
    elif (
        not isinstance(value, (Tensor, str))
        and hasattr(value, "__iter__")
        and getattr(value, "ndim", None) != 0
    ):
        yield from value
    else:
        yield value


def _plain(name: str, value: Any) -> Any:
    """A one-element tensor as a Python number, anything else as it is."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
        return value.item()
    return value


def check_numbers(**values: Any) -> None:
    """Raise torch's ValueError for a number below zero, or NaN; TypeError for what is no number."""
    for name, value in values.items():
        for v in _each(value):
            if not _at_least_zero(name, _plain(name, v)):
                raise ValueError(f"Invalid {_LABELS.get(name, f'{name} value')}: {v}")


def _at_least_zero(name: str, v: Any) -> bool:
    try:
        return bool(v >= 0.0)
    except TypeError:
        raise TypeError(f"{name} must be a number, not {v!r}") from None


def check_whole(**values: Any) -> None:
    """Raise ValueError for what is no whole number of at least one."""
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"Invalid {name} value: {value}; it must be a whole number of 1 or more")


def check_betas(betas: tuple[Any, ...], n: int = 2, name: str = "beta") -> tuple[Any, ...]:
    """All `n` betas as numbers in [0, 1); torch's ValueError for any other, TypeError for what are no numbers."""
    if not isinstance(betas, Iterable):
        raise TypeError(f"{name}s must be {('no', 'one', 'two', 'three')[n]} numbers, got {betas!r}")
    plain = tuple(_plain(f"{name}s[{i}]", b) for i, b in enumerate(betas))
    if len(plain) != n:
        raise ValueError(f"{name}s must be {('no', 'one', 'two', 'three')[n]} numbers, got {betas!r}")
    for i, b in enumerate(plain):
        if not _at_least_zero(f"{name}s[{i}]", b) or not b < 1.0:
            raise ValueError(f"Invalid {name} parameter at index {i}: {b}")
    return plain


def _refuse_modes(name: str, group: dict[str, Any]) -> None:
    """Raise for the torch.optim modes that a fused kernel cannot honour."""
    if group.get("differentiable"):
        raise ValueError(
            f"{name}(differentiable=True) asks for a step() that autograd can differentiate through. A fused "
            "kernel writes the parameters in place and leaves no graph. Leave differentiable=False, or use "
            f"torch.optim.{name}(differentiable=True)."
        )
    if group.get("fused") and group.get("foreach"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


class TorchFace(Optimizer):
    """An Optimizer whose constructor speaks torch.optim's names."""

    _closed = True
    _betas: ClassVar[int] = 2
    """How many numbers its ``betas`` are."""
    _not_negative: ClassVar[tuple[str, ...]] = ()
    """Numbers of its own that may not be below zero."""

    def _start(self, cbs: list[Any], arguments: dict[str, Any], **fixed: Any) -> None:
        """Set up from a constructor's ``locals()``, when these are its arguments: the groups' numbers and flags."""
        given = {
            k: v for k, v in arguments.items() if k not in ("self", "__class__", "params", "options")
        } | fixed
        if "betas" in given:
            given["betas"] = check_betas(given["betas"], self._betas)
        not_negative = (*_NOT_NEGATIVE, *self._not_negative)
        check_numbers(**{name: given[name] for name in not_negative if name in given})
        given |= {name: _plain(name, given[name]) for name in ("eps", "weight_decay") if name in given}
        _refuse_modes(type(self).__name__, given)
        params = arguments["params"]
        if isinstance(params, Tensor):
            raise TypeError(
                "params argument given to the optimizer should be an iterable of Tensors or dicts, but got "
                f"{params.type()}; put it into a list"
            )
        super().__init__(params, cbs, **given, **arguments["options"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `Optimizer.add_param_group`; the flags of ``param_group`` are checked as the constructor's are."""
        if isinstance(param_group, dict):
            _refuse_modes(type(self).__name__, param_group)
        super().add_param_group(param_group)
