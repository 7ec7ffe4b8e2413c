"""What callbacks can see of a parameter apart from its elements."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ..ir.ops import TENSOR, is_partial
from ..ir.program import Buffer
from . import axes
from .axes import Dims
from .signals import NeedsAttribute, Unsuited, Untraceable


@dataclass(frozen=True)
class Foreign:
    """A state tensor that no kernel can take: another shape than the parameter's, or integers."""

    dtype: torch.dtype
    shape: torch.Size

    def __getattr__(self, name: str) -> Any:
        raise Untraceable(
            f"a {self.dtype} state tensor of another shape than the parameter's, or of integers"
        )


@dataclass(frozen=True)
class Several:
    """A state tensor whose sizes do not say along which dimensions of its parameter it goes, as two of them are equal.
    Which it is, how it is used says."""

    buffers: tuple[Buffer, ...]


PLAIN = (type(None), bool, int, float, str, bytes, type(...), torch.dtype, torch.memory_format)
"""Types of values that stay what they are: the same value gives the same trace."""


class Opaque:
    """State that is no tensor, number or flag, a dict say. What is in it may change, so callbacks are always run."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class Modes(NamedTuple):
    """What kind of step it is: what of it is known to the device only, and what it is given.

    on_device: numbers in the state (step counts) are float64 tensors there, which kernels read and advance
    scaled: gradients are multiplied by the 0-d buffer FACTOR (one over the loss scale, the clip coefficient)
    skips: where the 0-d buffer FOUND_INF is not zero, nothing is stored
    bare: gradients are not looked at, and p.grad is None
    given: names of the state that is handed over for this step only (extra tensors), and never stored
    """

    on_device: bool = False
    scaled: bool = False
    skips: bool = False
    bare: bool = False
    given: tuple[str, ...] = ()


HOST = Modes()


def stored_dtype(dtype: torch.dtype, param: torch.dtype, zero_dim: bool, modes: Modes) -> torch.dtype:
    """The dtype of new state that was asked for in this one.

    Where counts are 0-d float64 tensors, a 0-d parameter's other state must not look like them, and is float32.
    """
    ambiguous = zero_dim and modes.on_device and dtype == torch.float64 != param
    return torch.float32 if ambiguous else dtype


CODES = (torch.int8, torch.uint8, torch.int16)
"""Whole numbers that state may be stored as, see `storage`."""
FACTOR, FOUND_INF = "scaling.factor", "scaling.found_inf"
"""Buffers of all parameters together, one number each."""
STARTED = "started:"
"""Key of a state flag, followed by the state keys that hold something once it is 1: those whose start is no zero, where
a first step may be skipped."""


HERE_IN_ORDER = "here_in_order"
"""Attribute: whether the dimensions of what is here of the parameter follow one another in memory as they are."""
OWN, MISSING = "own:", "none of its attributes"
"""Attribute of parameters, followed by the name of one that torch's have not; and its value where there is none."""
LINE, WHOLE = "line:", "whole:"
"""Attributes of parameters that say into blocks of how many elements they are cut, and whether their last dimension
that is longer than 1 is so many of such blocks."""
CUT = "cut"
"""Attribute of a signature: which dimension that is, if it is two of those that are told apart."""


@dataclass(frozen=True)
class Signature:
    """What callbacks can see of a parameter besides its elements; equal signatures give equal traces.

    ``state`` maps each key to a ``Buffer`` or ``Several`` (a tensor), to the number, flag or None itself, or to an
    ``Opaque``.
    ``attributes`` are the attributes of the parameter that some callback reads. ``asked`` are the parameter's and the
    gradient's dtypes as the user sees them, and those of state where they differ from the buffers' (work copies in the
    compute dtype).
    ``zero_dim``: the parameter is 0-d, so that its state cannot be told apart into one number per element and one per
    tensor.
    """

    device: torch.device
    param: torch.dtype
    grad: torch.dtype
    state: tuple[tuple[str, Any], ...] = ()
    attributes: tuple[tuple[str, Any], ...] = ()
    asked: tuple[torch.dtype, torch.dtype, tuple[tuple[str, torch.dtype], ...]] | None = None
    zero_dim: bool = False
    modes: Modes = HOST

    def seen(self, key: str, buffer: Buffer | Foreign) -> torch.dtype:
        """The dtype of state as the user sees it."""
        return dict(self.asked[2] if self.asked else ()).get(key, buffer.dtype)

    @property
    def dims(self) -> Dims | None:
        """The parameter's own, if some callback's tensors go along some of them only."""
        return dict(self.attributes).get("dims")

    @property
    def order(self) -> tuple[int, ...]:
        """Its dimensions as they follow one another in memory; known where ``dims`` is."""
        return dict(self.attributes).get("order", ())

    @property
    def in_order(self) -> bool:
        """Whether they follow one another in memory as they are; True where nobody has asked."""
        return dict(self.attributes).get("in_order", True) is not False

    @property
    def line(self) -> int:
        """How many neighbouring elements there is one number for, if some callback's tensors have such; else 0."""
        return next((v for k, v in self.attributes if k.startswith(LINE) and v), 0)

    @property
    def cut(self) -> int | None:
        """The last dimension longer than 1, where `dims` has it as two: blocks of ``line``, and what is in each."""
        found: int | None = dict(self.attributes).get(CUT)
        return found

    @property
    def blocks(self) -> str:
        """The kind of a number for each block."""
        return "0" if self.cut is None else axes.along(self.dims or ())[:-1]

    def shown(self, dims: Dims | None) -> Dims | None:
        """The dimensions of a tensor by those that are told apart."""
        return dims if dims is None or self.cut is None else axes.cut(dims, self.cut)

    def lengths(self, shape: Sequence[int]) -> Sequence[int]:
        """Those of the dimensions that are told apart, of a parameter of this shape."""
        return shape if self.cut is None else (*shape[: self.cut], shape[self.cut] // self.line, self.line)

    def need_dims(self) -> None:
        """Raises NeedsAttribute for what has to be known of dimensions, and is not."""
        for name in ("dims", "order"):
            if name not in dict(self.attributes):
                raise NeedsAttribute(name)

    def resolved(self, most: int = 256) -> Iterator[Signature]:
        """The signatures that it may be: sizes do not tell along which dimensions state goes (`Several`, of which no
        more than so many combinations are tried), and for some callbacks blocks of elements are told apart, for others
        the parameter's dimensions."""
        known = dict(self.attributes)
        lines = [k for k, v in self.attributes if k.startswith(LINE) and v]
        for line in lines if len(lines) > 1 else ():
            yield from self._with(**dict.fromkeys(lines, 0) | {line: known[line]}).resolved(most)
        if len(lines) > 1:
            return
        if not lines or "dims" not in known:
            yield from self._chosen(most)
            return
        if (whole := f"{WHOLE}{self.line}") not in known:
            raise NeedsAttribute(whole)
        kept = {k: axes.is_blocks(v.dims) for k, v in self._partial()}
        if False not in kept.values():
            yield self._with(dims=None)
        if known[whole] and self.dims:
            last = max(d for group in self.dims for d in group)
            yield from self._with(dims=axes.cut(self.dims, last), **{CUT: last})._chosen(most)
        if True not in kept.values():
            yield from self._with(**{lines[0]: 0})._chosen(most)
        if False in kept.values():
            yield self._with(dims=None)._without_rows()

    def _chosen(self, most: int) -> Iterator[Signature]:
        """With one of the ways along which each state may go, and kinds by what is told apart."""
        several = {k: v.buffers for k, v in self.state if isinstance(v, Several)}
        for chosen in itertools.islice(itertools.product(*several.values()), most):
            found = self._with_state(dict(zip(several, chosen, strict=True)))
            yield found._with_state({k: self._told_apart(v) for k, v in found._partial()})

    def _partial(self) -> list[tuple[str, Buffer]]:
        """The state with some numbers for each parameter, but not one for each element."""
        state = [(k, v.buffers[0] if isinstance(v, Several) else v) for k, v in self.state]
        return [(k, v) for k, v in state if isinstance(v, Buffer) and is_partial(v.kind)]

    def _told_apart(self, buffer: Buffer) -> Buffer:
        """With its kind by what is told apart."""
        whole = axes.is_blocks(buffer.dims)
        return Buffer(
            buffer.dtype, self.blocks if whole else axes.along(self.shown(buffer.dims) or ()), buffer.dims
        )

    def _without_rows(self) -> Signature:
        """With state along dimensions as that of tensors that torch calls may take."""
        rows = {k: v for k, v in self._partial() if not axes.is_blocks(v.dims)}
        if "shape" not in dict(self.attributes):
            raise NeedsAttribute("shape")
        shape = dict(self.attributes)["shape"]
        return self._with_state(
            {k: Foreign(v.dtype, torch.Size(axes.sizes(v.dims or (), shape))) for k, v in rows.items()}
        )

    def unsuited(self, of: int | None = None) -> Unsuited:
        """That tensors go along what is not told apart."""
        sizes = " or ".join(k.removeprefix(LINE) for k, _ in self.attributes if k.startswith(LINE))
        error = Unsuited(
            f"rows or columns of a parameter whose last dimension is not in whole blocks of {sizes} elements, where "
            "storage is in blocks",
            "store the state of this rule in a policy without blocks, such as bf16+8",
        )
        error.of = of
        return error

    def _with(self, **attributes: Any) -> Signature:
        return replace(self, attributes=tuple((dict(self.attributes) | attributes).items()))

    def _with_state(self, state: Mapping[str, Any]) -> Signature:
        return replace(self, state=tuple((k, state.get(k, v)) for k, v in self.state))

    @property
    def compute(self) -> torch.dtype:
        buffers = [v.dtype for _, v in self.state if isinstance(v, Buffer) and v.kind != TENSOR]
        return compute_dtype(self.param, self.grad, *buffers)


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if any of them is float64, else float32: values are upcast on load and rounded once on store."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def structure_of(signature: Signature) -> tuple[Any, ...]:
    """The signature without its numbers' values, and without whether it is a work copy."""
    state = tuple((k, type(v) if type(v) in (int, float, Opaque) else v) for k, v in signature.state)
    s = signature
    return s.device, s.param, s.grad, state, s.attributes, s.zero_dim, s.modes


def static_of(hyper: dict[str, Any]) -> tuple[Any, ...]:
    """The hyperparameters without their numbers' values: names, types, flags, and how many numbers a tuple has."""
    return tuple((k, _shape_of(v)) for k, v in hyper.items())


def _shape_of(value: Any) -> Any:
    if type(value) in (tuple, list):
        return (type(value), *map(_shape_of, value))
    if isinstance(value, torch.Tensor):
        return value.dtype
    return value if type(value) in PLAIN and type(value) not in (int, float) else type(value)


def is_plain(values: Iterable[Any]) -> bool:
    """Whether they are tensors, numbers and flags, in tuples or lists at most."""
    return all(
        type(v) in (Buffer, Several, Foreign, *PLAIN)
        or isinstance(v, torch.Tensor)
        or (type(v) in (tuple, list) and is_plain(v))
        for v in values
    )
