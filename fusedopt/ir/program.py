"""The IR: a flat list of values in static single assignment form, and the buffers its results are stored to.

Grammar::

    program ::= compute axes buffer* value* store*
    buffer  ::= name dtype kind             # 'param', 'grad', 'state.<key>'
    value   ::= leaf | op(value, ...)       # numbered; arguments stand before their use
              | draw(seed, step, stream)    # random numbers; seed and step are values of kind S
    leaf    ::= load(buffer) | slot(i) | const(x) | numel
    store   ::= buffer <- value
    kind    ::= F (one number per element) | S (one number per tensor) | axis+ (one for each place along these axes)
    type    ::= f (float, of the compute type) | b (bool) | d (double, of kind S only)

An F value may use S values (they are broadcast), an S value is made from S values only, or by a reduction from an F
value. The same holds between kinds with fewer and more axes: a tensor is seen as a block with ``axes`` axes, the last
one contiguous in memory, and a sum along axis 1 of two is of kind "0", one number per row. Most programs have one axis,
which is all elements. With a ``line`` there are two: all elements in lines of that many, of which the last may have
fewer; or there are more, of which the last one has this length.

Slots are the step's scalars (learning rate, bias corrections): numbers the host computes and hands over, so a schedule
changes no program.

As in torch, one double among S values makes the result double, and beside an F value it is rounded to the compute type.
Step counts that live on the device are doubles, and with them bias corrections. Where the compute type is double
itself, there is no d.

``skip`` is a bool of kind S, or None: where it is true, nothing is stored.
"""

from __future__ import annotations

import functools
import keyword
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .comments import one_line
from .ops import (
    DRAWS,
    ELEMENT,
    LEAVES,
    OPS,
    TENSOR,
    Reduction,
    axes_of,
    is_partial,
    is_reduction,
    kind_of,
    op_of,
    reduction,
    result_kind,
)
from .random import STREAMS


class ProgramError(AssertionError):
    """A program that breaks the grammar: a mistake in a pass or in the tracer, not in the user's callback."""


@dataclass(frozen=True)
class Value:
    """One value: what computes it, its kind (F or S), its type (f, b or d), and the callback line it came from."""

    op: str
    args: tuple[int, ...]
    attr: Any
    kind: str
    type: str
    where: str = field(default="", compare=False)
    negative_zero: bool = field(init=False, repr=False)
    """Whether it is the constant -0.0, which is equal to 0.0 and another number."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "negative_zero", _is_negative_zero(self.attr))


def _is_negative_zero(x: Any) -> bool:
    return isinstance(x, float) and x == 0 and math.copysign(1.0, x) < 0


@dataclass(frozen=True)
class Buffer:
    """A tensor the program reads or writes: its storage dtype and its kind.

    dims: outside of programs, how the dimensions of a tensor with fewer numbers than elements are those of its
    parameter (see `trace.axes`)
    """

    dtype: torch.dtype
    kind: str
    dims: tuple[tuple[int, ...], ...] | None = None


class Graph:
    """Builds values; the same op on the same arguments is the same value.

    axes: the axes that there are, a digit each
    """

    def __init__(self, axes: str = "0") -> None:
        self.axes = axes
        self.values: list[Value] = []
        self._known: dict[tuple[Any, ...], int] = {}

    def leaf(self, op: str, attr: Any = None, kind: str = TENSOR, type: str = "f") -> int:
        if attr != attr:
            attr = math.nan  # which is itself where it is looked for
        key = (op, attr, kind, type, _is_negative_zero(attr))
        index = self._known.get(key)
        if index is None:
            index = self._known[key] = len(self.values)
            self.values.append(Value(op, (), attr, kind, type))
        return index

    def called(self, op: str, args: tuple[int, ...], attr: Any, kind: str, type: str) -> int:
        """A value that no op of the table makes of these, until a program reads it from a buffer."""
        key = (op, args, attr, kind, type)
        index = self._known.get(key)
        if index is None:
            index = self._known[key] = len(self.values)
            self.values.append(Value(op, args, attr, kind, type))
        return index

    def op(self, name: str, *args: int, where: Callable[[], str] = str, to: Any = None) -> int:
        """The value ``name(*args)``; ``where`` is asked for the callback's line when the value is new.

        to: the kind of a reduction along some axes, or that of ``expand``; the stream of what is drawn
        """
        if self._result(name, args, to)[1] == "d":
            args = tuple(map(self.wide, args))
        index = self._known.get((name, args, to))
        if index is None:
            kind, type = self._result(name, args, to)
            index = self._known[name, args, to] = len(self.values)
            self.values.append(Value(name, args, to, kind, type, where()))
        return index

    def _result(self, name: str, args: Iterable[int], to: Any) -> tuple[str, str]:
        return _result(name, [self.values[a] for a in args], to, self.axes)

    def wide(self, i: int) -> int:
        """Numbers of the host are doubles before they are anything else."""
        v = self.values[i]
        return self.leaf(v.op, v.attr, type="d") if v.op in ("slot", "const", "numel") else i


def _result(name: str, args: Iterable[Value], to: Any, axes: str) -> tuple[str, str]:
    """Kind and type of an op's result."""
    args = list(args)
    kind = result_kind(name, [a.kind for a in args], to, axes)
    result = op_of(name).result
    wide = kind == TENSOR and result == "f" and any(a.type == "d" for a in args)
    return kind, "d" if wide else result


def argument_type(v: Value, args: Iterable[Value]) -> str:
    """The type, f or d, in which an op takes its floats."""
    return "d" if (v.kind == TENSOR or v.op in DRAWS) and any(a.type == "d" for a in args) else "f"


@dataclass(frozen=True)
class Program:
    """What one run of a callback list does to one parameter's tensors. Equal programs share a kernel."""

    compute: torch.dtype
    buffers: tuple[tuple[str, Buffer], ...]
    values: tuple[Value, ...]
    stores: tuple[tuple[str, int], ...]
    slots: int
    skip: int | None = None
    axes: int = 1
    line: int = 0

    @property
    def all_axes(self) -> str:
        """Its axes, a digit each."""
        return "".join(map(str, range(self.axes)))

    @property
    def blocked(self) -> bool:
        """Whether its elements are all in lines of ``line``, of which the last may be shorter, whatever dimensions
        they are along. With more axes it is their last one that has this length."""
        return self.line > 0 and self.axes == 2

    @property
    def roots(self) -> list[int]:
        """The values that have to be computed."""
        return [*(i for _, i in self.stores), *([] if self.skip is None else [self.skip])]

    @functools.cached_property
    def draws(self) -> bool:
        """Whether there are random numbers in it, so that rows say which parameter they are."""
        return any(v.op in DRAWS for v in self.values)

    @property
    def buffer(self) -> dict[str, Buffer]:
        return dict(self.buffers)

    def __str__(self) -> str:
        return render_python(self)


def reachable(
    values: Mapping[int, Value] | tuple[Value, ...] | list[Value], roots: Iterable[int]
) -> list[int]:
    """The values that the roots need, in order."""
    needed: set[int] = set()
    todo = list(roots)
    while todo:
        i = todo.pop()
        if i not in needed:
            needed.add(i)
            todo.extend(values[i].args)
    return sorted(needed)


def depth_first(values: list[Value] | tuple[Value, ...], roots: Iterable[int]) -> list[int]:
    """The values that the roots need, arguments first: an order that depends on structure only."""
    order: dict[int, None] = {}
    todo = [(i, False) for i in reversed(list(roots))]
    while todo:
        i, ready = todo.pop()
        if ready:
            order[i] = None
        elif i not in order:
            todo.append((i, True))
            todo += [(a, False) for a in reversed(values[i].args)]
    return list(order)


def verify(program: Program) -> None:
    """Raise ProgramError, naming the value, unless the program keeps the grammar and the op table's types."""
    buffers = program.buffer
    if len(buffers) < len(program.buffers) or len(dict(program.stores)) < len(program.stores):
        raise ProgramError("a buffer is listed twice, or stored to twice")
    for i, v in enumerate(program.values):
        _check_value(program, buffers, i, v)
    for name, index in program.stores:
        if name not in buffers:
            raise ProgramError(f"store to the unknown buffer {name!r}")
        if not 0 <= index < len(program.values):
            raise ProgramError(f"store of v{index}, which is not there, to {name!r}")
        if program.values[index].type == "b":
            raise ProgramError(f"store of the bool v{index} to {name!r}")
        kinds = buffers[name].kind, program.values[index].kind
        if not set(axes_of(kinds[1], program.all_axes)) <= set(axes_of(kinds[0], program.all_axes)):
            raise ProgramError(
                f"store of v{index}, of kind {kinds[1]}, to {name!r}, which is of kind {kinds[0]}"
            )
    if program.skip is not None and (
        program.values[program.skip].kind,
        program.values[program.skip].type,
    ) != (
        TENSOR,
        "b",
    ):
        raise ProgramError(f"v{program.skip}, which says whether to skip, is no bool of kind S")


def _check_value(program: Program, buffers: dict[str, Buffer], i: int, v: Value) -> None:
    if v.op in LEAVES:
        if v.args:
            raise ProgramError(f"v{i}: {v.op} takes no arguments")
        types = "fd" if v.kind == TENSOR and program.compute != torch.float64 else "f"
        if v.type not in types or (v.op != "load" and v.kind != TENSOR) or not _known(v.kind, program):
            raise ProgramError(f"v{i}: {v.op} is no {v.type} of kind {v.kind}")
        if v.op == "load" and (v.attr not in buffers or buffers[v.attr].kind != v.kind):
            raise ProgramError(f"v{i}: load of {v.attr!r}, which is no {v.kind} buffer of this program")
        if v.op == "slot" and not 0 <= v.attr < program.slots:
            raise ProgramError(f"v{i}: slot {v.attr} of {program.slots}")
        return
    op = DRAWS.get(v.op) or OPS.get(v.op)
    if op is None or len(v.args) != op.arity:
        raise ProgramError(f"v{i}: no op {v.op} with {len(v.args)} arguments")
    if any(not 0 <= a < i for a in v.args):
        raise ProgramError(f"v{i}: an argument does not stand before its use")
    args = [program.values[a] for a in v.args]
    got = "".join(a.type for a in args) + ">" + v.type
    if got.replace("d", "f") != op.types:
        raise ProgramError(f"v{i}: {v.op} is {op.types}, not {got}")
    kinds = {a.kind for a in args}
    if v.op in DRAWS and (kinds != {TENSOR} or type(v.attr) is not int or not 0 <= v.attr < STREAMS):
        raise ProgramError(f"v{i}: {v.op} of {kinds}, stream {v.attr!r}")
    if v.op == "expand" or is_reduction(v.op):
        small, large = (args[0].kind, v.kind) if v.op == "expand" else (v.kind, args[0].kind)
        inside = set(axes_of(small, program.all_axes)) <= set(axes_of(large, program.all_axes))
        if not inside or not _known(v.kind, program):
            raise ProgramError(f"v{i}: {v.op} of {kinds} cannot be of kind {v.kind}")
    if (v.kind, v.type) != _result(v.op, args, v.attr, program.all_axes):
        raise ProgramError(f"v{i}: {v.op} of {kinds}, {got}, cannot be of kind {v.kind}")


def _known(kind: str, program: Program) -> bool:
    """Whether there is such a kind: axes are listed once, in order, and all of them are F."""
    return not is_partial(kind) or (
        set(kind) < set(program.all_axes) and kind_of(kind, program.all_axes) == kind
    )


# ---- the interpreter: the living definition of what a program means -----------------------------------------------


def interpret(
    program: Program,
    buffers: Mapping[str, torch.Tensor],
    slots: Iterable[float],
    sizes: Sequence[int] | None = None,
    place: int = 0,
) -> dict[str, torch.Tensor]:
    """Run the program on one row's tensors with plain torch ops; returns the buffers it stores, as new tensors.

    F buffers have as many numbers, S buffers one, others have theirs in the order of their axes. Values have the
    compute dtype, or are double; each result is rounded to its buffer's dtype once, at the end. Reductions are computed
    in double. Where there are no elements, what there is one of per tensor stays as it is.

    buffers: those of the program; if none of them is F, also "param", whose elements are counted
    sizes: the length of each axis, if there are several
    place: the parameter's among all, for what is drawn: see `random.place`
    """
    if program.axes == 1:
        sizes = buffers[_shaped(program)].shape
    if program.blocked:
        return _interpret_lines(program, buffers, slots, place)
    assert sizes is not None
    used = {*program.buffer, _shaped(program)}
    block = {n: buffers[n].reshape(_block(program, n, sizes)) for n in used}
    return {n: t.reshape(buffers[n].shape) for n, t in _interpret(program, block, slots, place).items()}


def _interpret_lines(
    program: Program, buffers: Mapping[str, torch.Tensor], slots: Iterable[float], place: int
) -> dict[str, torch.Tensor]:
    """With a last line as long as the others, whose last elements count for nothing."""
    like = buffers[_shaped(program)]
    sizes = [-(-like.numel() // program.line), program.line]
    left = sizes[0] * sizes[1] - like.numel()
    full, used = {}, {*program.buffer, _shaped(program)}
    for name in used:
        whole = name not in program.buffer or program.buffer[name].kind == ELEMENT
        flat = buffers[name].reshape(-1)
        padded = torch.cat([flat, flat.new_zeros(left)]) if whole else flat
        full[name] = padded.reshape(_block(program, name, sizes))
    there = torch.arange(sizes[0] * sizes[1], device=like.device).reshape(sizes) < like.numel()
    out = {}
    for name, t in _interpret(program, full, slots, place, there).items():
        out[name] = t.reshape(-1)[: buffers[name].numel()].reshape(buffers[name].shape)
    return out


def _shaped(program: Program) -> str:
    """The buffer whose elements are counted."""
    return next((n for n, b in program.buffers if b.kind == ELEMENT), "param")


def _block(program: Program, name: str, sizes: Sequence[int]) -> list[int]:
    """A buffer's shape as a block with all axes, those along which it has one number of length 1."""
    kind = program.buffer[name].kind if name in program.buffer else ELEMENT
    if not is_partial(kind):
        return [] if kind == TENSOR else list(sizes)
    return [n if str(a) in kind else 1 for a, n in enumerate(sizes)]


def _interpret(
    program: Program,
    buffers: Mapping[str, torch.Tensor],
    slots: Iterable[float],
    place: int,
    there: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """there: which elements count, if not all do"""
    dtype = program.compute
    like = buffers[_shaped(program)]
    if not like.numel():
        return {name: buffers[name].clone() for name, _ in program.stores}
    types = {"f": dtype, "d": torch.float64}
    scalars = torch.tensor(list(slots), dtype=torch.float64)
    leaf = {
        "load": lambda v: buffers[v.attr],
        "slot": lambda v: scalars[v.attr],
        "const": lambda v: torch.tensor(v.attr, dtype=torch.float64),
        "numel": lambda v: torch.tensor(
            like.numel() if there is None else int(there.sum()), dtype=torch.float64
        ),
    }
    results: list[torch.Tensor] = []
    for v in program.values:
        if v.op in LEAVES:
            results.append(leaf[v.op](v).to(types[v.type]))
            continue
        wanted = types[argument_type(v, [program.values[a] for a in v.args])]
        args = [x if x.dtype == torch.bool else x.to(wanted) for x in (results[a] for a in v.args)]
        if is_reduction(v.op):
            source = program.values[v.args[0]].kind
            over = _along(program, ELEMENT if source == TENSOR else source, like)
            results.append(_reduced(program, v, args[0].expand(over).to(torch.float64), there).to(dtype))
        elif v.op == "expand":
            results.append(args[0].expand(_along(program, v.kind, like)))
        elif v.op in DRAWS:
            seed, step = (x.to(like.device) for x in args)
            drawn = DRAWS[v.op].torch(like.numel(), seed, step, v.attr, place)
            results.append(drawn.reshape(like.shape).to(dtype))
        else:
            out = OPS[v.op].torch(*args)
            results.append(out if v.type == "b" else out.to(types[v.type]))
    if program.skip is not None and results[program.skip]:
        return {name: buffers[name].clone() for name, _ in program.stores}
    out = {}
    for name, i in program.stores:
        buffer = program.buffer[name]
        value = results[i].expand(_along(program, buffer.kind, like))
        out[name] = value.to(buffer.dtype, copy=True)
    return out


def _along(program: Program, kind: str, like: torch.Tensor) -> list[int]:
    """The shape of values of this kind."""
    if not is_partial(kind):
        return [] if kind == TENSOR else list(like.shape)
    return [n if str(a) in kind else 1 for a, n in enumerate(like.shape)]


def _reduced(program: Program, v: Value, x: torch.Tensor, there: torch.Tensor | None = None) -> torch.Tensor:
    op = reduction(v.op)
    whole: Callable[..., torch.Tensor] = torch.sum if there is not None and op.averaged else op.torch
    if there is not None and x.shape == there.shape:
        x = torch.where(there, x, float(op.init.replace("infinity", "inf")))
    over = [a for a in range(program.axes) if not is_partial(v.kind) or str(a) not in v.kind]
    out = whole(x, dim=over, keepdim=True) if is_partial(v.kind) else whole(x)
    if there is None or not op.averaged:
        return out
    return out / (there.sum(over, keepdim=True) if is_partial(v.kind) else there.sum())


# ---- the printer ---------------------------------------------------------------------------------------------------


_TAKEN = frozenset(keyword.kwlist) | frozenset(
    """
    alignas alignof asm auto bool break case catch char char16_t char32_t char8_t class co_await co_return co_yield
    compl concept const const_cast consteval constexpr constinit continue decltype default delete do double
    dynamic_cast else enum explicit export extern false float for friend goto if inline int long mutable namespace new
    noexcept nullptr operator private protected public register reinterpret_cast requires restrict return short signed
    sizeof static static_assert static_cast struct switch template this thread_local throw true try typedef typeid
    typename union unsigned using virtual void volatile wchar_t while and_eq bitand bitor not_eq or_eq xor xor_eq
    param grad launch row begin end partial i lane element load store combine for_lanes std
    half bfloat16 int64_t torch numel Lanes Launch Row infinity not_a_number
    line first regions c team place places start member before stop held part
    scaling_factor scaling_found_inf
    uniform normal noise numbers block_size ahead fetch for_blocks with_line with_lines lines many length count
    k tile tiled spread collect averaged quotient from to each chunk_words whole_places
    triton tl rows chunk chunks piece slots lanes partials address at rounded whole_blocks
    """.split()  # noqa: SIM905
)
"""Words that generated code uses itself, besides those that the op table calls."""
_CALLED = frozenset(
    word
    for op in OPS.values()
    for text in ((op.join,) if isinstance(op, Reduction) else (op.cpp, op.triton or ""))
    for word in re.findall(r"(?<![.:\w])[a-z_]\w*(?=\()", text)
)
LONGEST_NAME = 100
"""Characters of a name that generated code has in full."""
_NUMBERED = re.compile(
    r"(hyper|at|of)_.*|(sum|total)_\d+_\d+|(given|called)_\d+|(v|s|d|r|acc|n|i|o|q|e|y|sums)\d+|[A-Z_\d]+|.*__.*|_.*|.*_",
    re.ASCII,
)


def identifier(buffer: str) -> str:
    """A buffer's name as an identifier: ``state.exp_avg`` is ``exp_avg``, ``hyper.lr`` is ``hyper_lr``.

    A key that is no identifier, or that means something in generated code already, is told apart by a number.
    """
    key = buffer.removeprefix("state.")
    ours = key == buffer
    text = key.replace(".", "_") if ours else key
    plain = text.isidentifier() and text.isascii() and len(text) <= LONGEST_NAME
    if plain and (ours or (text not in _TAKEN | _CALLED and not _NUMBERED.fullmatch(text))):
        return text
    number = f"{zlib.crc32(key.encode(errors='surrogatepass')):08x}"
    name = f"{'of' if ours else 'at'}_{key[:LONGEST_NAME]}_{number}"
    return "".join(c if c.isalnum() and c.isascii() else "_" for c in name)


def names(program: Program) -> list[str]:
    """A readable name for each value: buffers and slots by theirs, the rest by number."""
    out = []
    for i, v in enumerate(program.values):
        fixed: dict[str, Callable[[Value], str]] = {
            "load": lambda v: identifier(v.attr),
            "slot": lambda v: f"s{v.attr}",
            "numel": lambda v: "numel",
        }
        out.append(fixed[v.op](v) if v.op in fixed else _literal(v.attr) if v.op == "const" else f"v{i}")
    return out


def _literal(x: float) -> str:
    return repr(x) if abs(x) < float("inf") else f"float('{x}')"


_OF_PARAM = {"expand", "as_float", *DRAWS}


def render_python(program: Program) -> str:
    """The program as Python that runs: ``program(param, grad, ..., s0, s1, ...)`` returns the stored buffers."""
    label = names(program)
    arguments = [identifier(b) for b, _ in program.buffers] + [f"s{i}" for i in range(program.slots)]
    if "param" not in arguments and any(v.op in _OF_PARAM for v in program.values):
        arguments.insert(0, "param")  # for its shape and dtype
    if any(v.op == "numel" for v in program.values):
        arguments.append("numel")
    lines = [f"def program({', '.join(arguments)}):"]
    for i, v in enumerate(program.values):
        if v.op in LEAVES:
            continue
        text = f"    {label[i]} = {_spell(program, v, label)}"
        lines.append(f"{text:<56}# {one_line(v.where)}" if v.where else text)
    if program.skip is not None:
        lines.append(f"    if {label[program.skip]}: return {{}}")
    lines.append("    return {" + ", ".join(f"{n!r}: {label[i]}" for n, i in program.stores) + "}")
    return "\n".join(lines)


_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**"}
_INFIX |= {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}


def _spell(program: Program, v: Value, label: list[str]) -> str:
    args = [label[a] for a in v.args]
    if v.op in _INFIX:
        return f"{args[0]} {_INFIX[v.op]} {args[1]}"
    if v.op in DRAWS:
        return f"fusedopt.{v.op}(param, seed={args[0]}, step={args[1]}, stream={v.attr})"
    if v.op == "neg":
        return f"-{args[0]}"
    if v.op == "expand":
        return f"torch.full_like(param, {args[0]})" if v.kind == ELEMENT else f"{args[0]}.expand({v.kind!r})"
    if is_partial(v.kind) and is_reduction(v.op):
        gone = tuple(a for a in range(program.axes) if str(a) not in v.kind)
        return f"{args[0]}.{v.op}({gone}, keepdim=True)"
    if v.op == "as_float":
        return f"{args[0]}.to(param.dtype)"
    args = [
        f"torch.tensor({a})" if program.values[i].op == "const" else a
        for a, i in zip(args, v.args, strict=True)
    ]
    return f"torch.{v.op}({', '.join(args)})"
