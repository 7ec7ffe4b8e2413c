"""What an optimizer does in a step, in words and numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..backends import Kernel
from ..callback import name_of
from ..extension import leaf
from ..ir.program import identifier
from ..ir.stages import Stage, scalar_stores, schedule
from ..step.verdicts import Eager
from . import storing

if TYPE_CHECKING:
    from ..step.engine import Engine
    from .apply import Applied
    from .core import Optimizer


def _count(n: int, what: str) -> str:
    """``1 launch``, ``2 launches``."""
    ending = "" if n == 1 else "es" if what.endswith("ch") else "s"
    return f"{n} {what}{ending}"


@dataclass(frozen=True)
class StageInfo:
    """One launch: its kernel, element buffers read and written, and bytes moved per element.

    A launch that moves none is over tensors: it stores what there is one of per tensor, such as a step count.
    ``round``: of sums over all parameters, 0 for what comes after them, None for what joins their parts.
    """

    kernel: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    reduces: int
    bytes_per_element: int
    tensors: int
    round: int | None = 0

    def __str__(self) -> str:
        if not self.bytes_per_element:
            what = f"writes {', '.join(self.writes)}" if self.writes else "joins sums along dimensions"
            return f"{self.kernel}, {_count(self.tensors, 'tensor')}: {what}, once per tensor"
        reduces = f"{_count(self.reduces, 'reduction')} per tensor"
        work = f"writes {', '.join(self.writes)}" if self.writes else reduces
        what = f"reads {', '.join(self.reads)}; {work}; {self.bytes_per_element} bytes per element"
        return f"{self.kernel}, {_count(self.tensors, 'tensor')}: {what}"


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled so far: why it was needed, where its source is, seconds spent, and whether it was cached."""

    name: str
    why: str
    source_path: str
    seconds: float
    cached: bool

    def __str__(self) -> str:
        how = "found in the cache" if self.cached else "compiled"
        return f"{self.name}: {self.why}; {how} in {self.seconds * 1e3:.0f} ms; {self.source_path}"


@dataclass(frozen=True)
class Explanation:
    """``opt.explain()``, as text if it is printed.

    Args:
        optimizer, backend: names.
        callbacks: names of those that were called, in order.
        stages: the launches.
        eager: callbacks that run eagerly, and why.
        compiled: kernels, each with why it was needed.
        source: of all kernels.
        steps: how steps went so far: how many needed Python work for each tensor, and why the last of them did; ""
            before the first.
        extension: why the host's side of a step runs without the C++ extension; "" where it does not.
        calls: torch calls that are made between launches, a line for each bucket.
        applied: explains the last call of each ``opt.apply``.
        lists: where param groups have callbacks of their own, the numbers of the groups that share a list, and that.
        over: what a call of ``opt.apply`` goes over.
        held: with policies of storage, how many bytes there are for each parameter.
    """

    optimizer: str
    backend: str
    callbacks: tuple[str, ...]
    stages: tuple[StageInfo, ...]
    eager: tuple[Eager, ...]
    compiled: tuple[Compiled, ...]
    source: str
    steps: str = ""
    extension: str = ""
    calls: tuple[str, ...] = ()
    applied: tuple[Explanation, ...] = ()
    lists: tuple[tuple[tuple[int, ...], tuple[str, ...]], ...] = ()
    over: str = ""
    held: str = ""

    @property
    def launches(self) -> int:
        """How many kernel launches a step is."""
        return len(self.stages)

    @property
    def bytes_per_element(self) -> int:
        """The most that is read and written for any element in a step, over all stages of its kernels.

        An element has one kernel, or several in turn where a callback runs eagerly between them, and one in each round
        of sums over all parameters.
        """
        rounds: dict[int, dict[str, int]] = {0: {}}
        for stage in self.stages:
            if stage.round is not None:
                per_kernel = rounds.setdefault(stage.round, {})
                per_kernel[stage.kernel] = per_kernel.get(stage.kernel, 0) + stage.bytes_per_element
        main = rounds.pop(0).values()
        sums = sum(max(per_kernel.values()) for per_kernel in rounds.values())
        return sums + (sum(main) if self.eager else max(main, default=0))

    def __str__(self) -> str:
        launches = f"on the {self.backend} backend: {_count(self.launches, 'launch')}"
        moved, callbacks = f"{self.bytes_per_element} bytes per element", ", ".join(self.callbacks)
        if self.over:
            lines = [f"applied {callbacks} {launches}, {moved}, {self.over}"]
        else:
            lines = [f"{self.optimizer} {launches} per step, {moved}"]
            lines += [] if self.lists else [f"callbacks: {callbacks}"]
        for groups, names in self.lists:
            which = f"group{'s' * (len(groups) > 1)} {', '.join(map(str, groups))}"
            lines.append(f"callbacks of {which}: {', '.join(names)}")
        lines += [f"stage {k + 1}: {stage}" for k, stage in enumerate(self.stages)]
        lines += [f"between stages: {call}" for call in self.calls]
        lines += [f"runs eagerly: {e.callback}: {e.reason}" for e in self.eager]
        lines += [f"held: {self.held}"] if self.held else []
        lines += [f"kernel {c}" for c in self.compiled]
        lines += [f"{'calls' if self.over else 'steps'}: {self.steps}"] if self.steps else []
        lines += map(str, self.applied)
        lines += [f"without the C++ extension: {self.extension}"] if self.extension else []
        return "\n".join(lines)

    __repr__ = __str__


def explain(opt: Optimizer) -> Explanation:
    """Explain the last step, or, before the first, the step that would be if every parameter had a gradient."""
    engine = opt.engine if opt.engine.launched else opt.look_at_groups()
    launched = engine.launched or engine.foresee(opt.groups.items(opt._scaling, pretend=True))
    eager = engine.buckets.verdicts.all() if engine.buckets.backend != "reference" else ()
    title, callbacks = opt.title or type(opt).__name__, tuple(map(name_of, engine.buckets.callbacks))
    without = not leaf.native and opt.backend != "reference"
    found = explanation(engine, title, callbacks, launched, eager, without)
    applied = tuple(_explain_applied(each, title) for each in opt.applications)
    source = "\n".join(part for part in (found.source, *(each.source for each in applied)) if part)
    steps = str(opt.gradient_release) if opt.gradient_release is not None else found.steps
    params = [p for group in opt.param_groups for p in group["params"]]
    held = storing.held((p, opt.state.get(p, {})) for p in params) if opt.groups.around else ""
    return replace(
        found, applied=applied, source=source, lists=_lists(engine, callbacks), steps=steps, held=held
    )


def _lists(engine: Engine, callbacks: tuple[str, ...]) -> tuple[tuple[tuple[int, ...], tuple[str, ...]], ...]:
    groups: dict[range, list[int]] = {}
    for g, span in enumerate(engine.buckets.spans):
        groups.setdefault(span, []).append(g)
    return tuple((tuple(found), callbacks[span.start : span.stop]) for span, found in groups.items())


def _explain_applied(applied: Applied, optimizer: str) -> Explanation:
    engine, graded = applied.engine, applied.graded
    eager = engine.buckets.verdicts.all() if engine.buckets.backend != "reference" else ()
    where = f", as {name_of(graded)} reads gradients" if graded is not None else ""
    over = f"over the parameters with a gradient{where}" if where else "over all parameters"
    found = explanation(engine, optimizer, tuple(map(name_of, applied.cbs)), engine.launched, eager, False)
    return replace(found, over=over)


def explanation(
    engine: Engine,
    optimizer: str,
    callbacks: tuple[str, ...],
    launched: list[tuple[Kernel, int]],
    eager: tuple[Eager, ...],
    without: bool,
) -> Explanation:
    """The explanation of an engine's last step, which launched these; ``without`` its C++ extension."""
    names = sorted({k.backend for k, _ in launched}) or ["reference"]
    used = {k: (label, why) for k, label, why in engine.buckets.history.used.values()}
    used |= {k: (k.name, each.why) for each in engine.rounds for k, _ in each.kernels if k not in used}
    rounds = engine.rounds_of()
    foreseen = [k for k, _ in launched if k not in used]  # they join sums
    used |= {k: (k.name, "fusedopt.total") for k in foreseen}
    rounds |= dict.fromkeys(foreseen)
    return Explanation(
        optimizer=optimizer,
        backend=" and ".join(names),
        callbacks=callbacks,
        stages=tuple(
            stage
            for kernel, n in launched
            for stage in _stages(kernel, used[kernel][0], n, rounds.get(kernel, 0))
        ),
        eager=eager,
        compiled=tuple(
            Compiled(label, why, k.source_path, k.seconds, k.cached) for k, (label, why) in used.items()
        ),
        source="\n".join(k.body for k in used),
        steps=str(engine.steps),
        extension=leaf.extension_status()[1] if without else "",
        calls=tuple(call for each in engine.rounds for call in each.called()),
    )


def _named(buffer: str) -> str:
    return buffer.removeprefix("state.") if buffer.startswith("state.") else identifier(buffer)


def _stages(kernel: Kernel, label: str, tensors: int, round_: int | None) -> list[StageInfo]:
    program, between = kernel.program, schedule(kernel.program).between

    def info(stage: Stage) -> StageInfo:
        return StageInfo(
            kernel=label,
            reads=tuple(map(_named, stage.loads(program))),
            writes=tuple(_named(n) for n, _ in (*stage.stores, *stage.numbers)),
            reduces=len(stage.reductions),
            bytes_per_element=stage.bytes_per_element(program),
            tensors=tensors,
            round=round_,
        )

    out = []
    for before, stage in zip(between[:-1], kernel.stages, strict=True):
        out += [*([info(Stage(()))] if before else []), info(stage)]
    last = [s for nest in between[-1].nests for s in nest.stores] + list(scalar_stores(program).stores)
    return [*out, *([info(Stage((), (), tuple(last)))] if last else [])]
