"""The host's half of a class's step: the numbers it reads, the flags it relies on, and the numbers it leaves.

Made once for each trace, as one generated function: a step asks it whether all is as it was, at a few microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..step.items import Item
from ..trace.number import Number, ScalarProgram
from ..trace.replay import Replay
from ..trace.signals import Untraceable
from ..trace.signature import PLAIN, Signature, structure_of
from ..trace.snapshot import is_constant
from ..trace.tracer import Trace
from .shadow import Container, Path, Shadow, is_own, shown

_NO_SIGNATURE = Signature(torch.device("cpu"), torch.float32, torch.float32)
FILL = object()
"""In place of a key: the tensor at the path itself gets the number."""


class Host:
    """What a trace took for granted on the host, and what its step writes there.

    ``numbers`` holds what `look` found, by name, as kernels' scalars are made of it.
    """

    def __init__(
        self, shadow: Shadow, names: dict[Path, str], tensors: set[Path], around: Callable[[], str | None]
    ) -> None:
        self.numbers: dict[str, Any] = {"params": []}
        self.around, self.returns_loss = around, False
        self.returned: Any = None
        self._writes: list[tuple[Callable[[Any], Any], Any, Any]] = []
        self._fills: list[tuple[Callable[[Any], torch.Tensor], Any]] = []
        self._function: Callable[..., Any] | None = None
        self._left: dict[Any, Any] = {}
        self._met: dict[Any, dict[int, torch.Tensor]] = {}
        """The parameters that were met, by their bucket: of each some have a gradient."""
        self._look = _looking(shadow, names, tensors, self.numbers)

    def writes(
        self,
        changes: list[tuple[Path, Any, Any]],
        scalars: ScalarProgram,
        own: Callable[[int], int],
        ours: ScalarProgram,
    ) -> None:
        """Take over what the shadow's step left in containers: numbers, flags, and tuples, lists and dicts of such."""
        entries: dict[int, Number] = {}

        def template(value: Any, where: str) -> Any:
            if type(value) is Number and value.program is scalars:
                at = own(value.index)
                entries[at] = Number(ours, at, value.value)
                return lambda left: left[at]
            if isinstance(value, PLAIN):
                return lambda left: value
            if type(value) in (tuple, list):
                parts = [template(v, where) for v in value]
                kind = type(value)
                return lambda left: kind(part(left) for part in parts)
            raise Untraceable(f"{where} gets a {type(value).__name__} that is no number or flag of the host")

        for path, key, value in changes:
            if key is FILL:
                self._fills.append((_reader(path), template(value, shown(path))))
                continue
            made = template(value, shown((*path, ("item", key))) if path else f"self.{key}")
            self._writes.append((_reader(path), key, made))
        self._numbers, self._scalars = entries, ours

    def finish(self) -> None:
        """Make what computes the numbers that are left; all guards are known now."""
        if self.leaves_something:
            numbers: dict[Any, Any] = dict(self._numbers)
            program = Trace(_NO_SIGNATURE, None, self._scalars, (), numbers, {}, {})  # type: ignore[arg-type]
            replay = Replay(program)
            self._inputs, self._keys = [name for _, name, *_ in replay.leaves], replay.number_keys
            self._function = replay.function

    def meets(self, buckets: Sequence[tuple[list[Item], Signature]]) -> None:
        """Note the parameters of a step that is of these buckets."""
        for items, signature in buckets:
            met = self._met.setdefault((items[0].where[0], structure_of(signature)), {})
            met.update((id(item.owner), item.owner) for item in items)

    @property
    def leaves_something(self) -> bool:
        return bool(self._writes or self._fills)

    def look(self, root: dict[str, Any]) -> str | None:
        """Read the numbers; or why this is another step than the one that was traced."""
        why = self._look(root) or self.around()
        if why is None and self._function is not None:
            try:
                _, left, guards = self._function(*[self.numbers[name] for name in self._inputs])
            except (ArithmeticError, ValueError) as error:
                return f"what the step computes on the host has no result: {error}"
            if not all(guards):
                return "a branch that numbers decide goes another way now"
            self._left = dict(zip(self._keys, left, strict=True))
        if (
            why is None
            and self._writes
            and not all(any(p.grad is not None for p in ps.values()) for ps in self._met.values())
        ):
            return "other parameters have gradients"
        return why

    def differs(self, root: dict[str, Any], other: dict[str, Any]) -> str | None:
        """What the step would leave here otherwise than another has been left."""
        if why := self.look(root):
            return why
        for read, key, made in self._writes:
            ours, theirs = made(self._left), read(other)[key]
            if repr(ours) != repr(theirs) and not (
                isinstance(ours, float) and abs(ours - theirs) <= 1e-9 * abs(theirs)
            ):
                return f"{key} becomes {ours!r}, not {theirs!r}"
        for read, made in self._fills:
            tensor = read(other)
            if not torch.equal(tensor, torch.full_like(tensor, made(self._left))):
                return f"a tensor becomes {made(self._left)!r}, not {tensor.item()!r}"
        return None

    def write(self, root: dict[str, Any]) -> None:
        """Leave what the step leaves."""
        for read, key, made in self._writes:
            read(root)[key] = made(self._left)
        for read, made in self._fills:
            read(root).fill_(made(self._left))


def _steps(path: Path) -> str:
    return "".join(
        ".__dict__" if kind == "dict" else f".__dict__[{key!r}]" if kind == "attr" else f"[{key!r}]"
        for kind, key in path
    )


def _reader(path: Path) -> Callable[[Any], Any]:
    _check(path)
    return eval(f"lambda root: root{_steps(path)}")


def _check(path: Path) -> None:
    for _, key in path:
        if not isinstance(key, (str, int, type(None))):
            raise Untraceable(f"{shown(path[:1])} has keys of type {type(key).__name__}")


def _looking(
    shadow: Shadow, names: dict[Path, str], tensors: set[Path], numbers: dict[str, Any]
) -> Callable[[dict[str, Any]], str | None]:
    """The function that reads numbers into the dict, and returns why something is not as it was."""
    space: dict[str, Any] = {"numbers": numbers}
    lines = ["def look(root):", "  try:"]
    known: dict[Path, str] = {(): "root"}

    def constant(x: Any) -> str:
        space[f"k{len(space)}"] = x
        return f"k{len(space) - 1}"

    def variable(path: Path) -> str:
        if path not in known:
            before = variable(path[:-1])
            known[path] = f"c{len(known)}"
            lines.append(f"    {known[path]} = {before}{_steps(path[-1:])}")
        return known[path]

    def demand(condition: str, path: Path, what: str) -> None:
        lines.append(f"    if not ({condition}): return {f'{shown(path)} {what}'!r}")

    for c in shadow.containers:
        if c.store:
            continue
        if any(not isinstance(k, (str, int, type(None))) for _, k in c.path):
            raise Untraceable(f"{shown(c.path[:1])} has keys of type {type(c.path[-1][1]).__name__}")
        _guard(c, variable(c.path), constant, lines)
    for path, value in shadow.flags:
        x = f"{variable(path[:-1])}{_steps(path[-1:])}"
        if is_constant(value) or isinstance(value, (type(None), bool)):
            short = "is" if value is None or isinstance(value, bool) else "=="
            demand(f"{x} {short} {constant(value)}", path, "is another one now")
        else:
            demand(f"{x} == {constant(value)}", path, "is another one now")
    for path, value in shadow.aliases:
        if all(isinstance(key, (str, int, type(None))) for _, key in path):
            x = f"{variable(path[:-1])}{_steps(path[-1:])}"
            demand(f"{x} is {constant(value)}", path, "is another object now")
    for path, value in shadow.numbers.items():
        _check(path)
        x = f"{variable(path[:-1])}{_steps(path[-1:])}"
        lines.append(f"    n = {x}")
        demand(f"type(n) is {constant(type(value))}", path, "is of another type now")
        if path in names:
            lines.append(
                f"    numbers[{names[path]!r}] = {'float(n)' if type(value) not in (int, float) else 'n'}"
            )
    for path in tensors:
        _check(path)
        lines.append(f"    t = {variable(path[:-1])}{_steps(path[-1:])}")
        demand(f"type(t) is {constant(torch.Tensor)} and t.numel() == 1", path, "is of another kind now")
        lines.append(f"    numbers[{names[path]!r}] = t.item()")
    lines += ["  except (KeyError, IndexError, AttributeError, TypeError) as e:", "    return f'{e} is gone'"]
    exec(compile("\n".join(lines), "<what a step relies on>", "exec"), space)
    return space["look"]


def _guard(c: Container, x: str, constant: Callable[[Any], str], lines: list[str]) -> None:
    """What a container has to be: of its type, with its keys."""
    own = isinstance(c.real, dict) and (not c.path or c.path[-1][0] == "dict")
    if own:
        count = sum(not is_own(k) for k in c.real)
        hidden = constant(is_own)
        known = constant({k for k in c.real if not is_own(k)})
        lines.append(
            f"    if len({x}) != {len(c.real)} and sum(not {hidden}(k) for k in {x}) != {count}: "
            f"return 'attributes were added or removed'"
        )
        lines.append(f"    if not {known} <= {x}.keys(): return 'attributes were added or removed'")
        for name, value in c.real.items():
            if (
                not is_own(name)
                and not isinstance(value, PLAIN)
                and not isinstance(value, (list, dict, tuple, set, torch.Tensor))
                and not hasattr(value, "__float__")
            ):
                lines.append(
                    f"    if {x}[{name!r}] is not {constant(value)}: return 'the attribute {name} is another one now'"
                )
        return
    if c.path[-1] == ("item", "params"):
        return  # which parameters there are is checked in C++
    lines.append(
        f"    if type({x}) is not {constant(type(c.real))} or len({x}) != {len(c.real)}: "
        f"return {f'{shown(c.path)} is another container, or of another length'!r}"
    )
