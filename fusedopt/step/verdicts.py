"""Which callbacks run eagerly, why, and in what order; and what is said of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from .. import env
from ..callback import (
    arguments_of,
    branches,
    forgets,
    is_temporary,
    may_take,
    name_of,
    place_of,
    uses_parameter,
)
from ..ir.program import Buffer
from ..trace.purity import ACTS, READS, VARIES, examine
from ..trace.signals import Changes, Starts, Untraceable
from ..trace.signature import STARTED, Foreign, Opaque, Signature, is_plain, structure_of
from ..trace.snapshot import is_data

FUSES = "arithmetic on whole tensors and reductions fuse (docs/compiler.md has the list)"
ARGUMENTS_ALONE = (
    "nothing is wrong, but it is slow; what depends on the arguments alone fuses: pass numbers as hyperparameters, and "
    "keep what lasts in the state that it returns"
)


class Eager(NamedTuple):
    """A callback that runs eagerly, and why: where in its code, what it does there, and what could be done about it."""

    callback: str
    reason: str


class ActsAfterAll(BaseException):
    """A callback that was traced turns out to act; what it changed is as it was. The step begins again without it."""


class Verdicts:
    """What is thought of each callback of a list.

    ``unfused`` are those with no fused form for parameters of some structure, by number and structure; ``acts`` those
    that are never traced (see ``trace.purity``), by number, ``unseen`` why, of those whose code shows it; ``lasting``
    says of each whether its trace may be replayed. ``said`` is what was already warned of; ``beside``: see `Buckets`.
    """

    def __init__(
        self,
        callbacks: Sequence[Callable[..., Any]],
        said: set[Any] | None = None,
        beside: Sequence[Callable[..., Any]] | None = None,
    ) -> None:
        self.callbacks, self.beside = callbacks, beside
        self.lists: list[range] = []
        """The lists that they are of, if these are several."""
        found = [examine(cb) for cb in callbacks]
        self.lasting = [verdict.level <= READS for verdict in found]
        self._reads = [verdict.level in (READS, VARIES) for verdict in found]
        self.unfused: dict[tuple[int, Any], Eager] = {}
        self.acts: dict[int, Eager] = {}
        self.unseen = {i: verdict.reason for i, verdict in enumerate(found) if verdict.level == ACTS}
        for i, verdict in enumerate(found):
            if verdict.level == ACTS:
                self._act(i, verdict.reason, verdict.remedy)
        self._starting: set[Eager] = set()  # which is as it should be
        self.said: set[Any] = set() if said is None else said
        self._moved: set[int] | None = set()

    def saved(self) -> tuple[dict[Any, Any], dict[Any, Any]]:
        """For `restore`, if a step raises: what raised may fuse once it no longer does."""
        return dict(self.unfused), dict(self.acts)

    def restore(self, saved: tuple[dict[Any, Any], dict[Any, Any]]) -> None:
        self.unfused, self.acts = saved

    # -- which, and in what order --
    def span(self, first: int = 0) -> range:
        """The callbacks that run as in a plain loop: for one parameter one after another, then for the next.

        These are, in the list that callback ``first`` is of, the ones that act, all between them, and those that read
        what others may change.
        """
        own = next((each for each in self.lists if first in each), range(len(self.callbacks)))
        inside = [i for i in own if self._reads[i] or i in self.acts] if self.acts else []
        return range(inside[0], inside[-1] + 1) if inside else range(own.stop, own.stop)

    def first_eager(self, first: int, stop: int, signature: Signature) -> int | None:
        """The first of these callbacks that is known to run eagerly, for parameters with this signature."""
        structure, span = structure_of(signature), self.span(first)
        return next((i for i in range(first, stop) if i in span or (i, structure) in self.unfused), None)

    def handed(self, signature: Signature, hyper: dict[str, Any], callbacks: range) -> dict[str, Any]:
        """Containers among state and hyperparameters, which callbacks may change. With other objects none is traced."""
        found = {k: v.value for k, v in signature.state if isinstance(v, Opaque)}
        found |= {k: v for k, v in hyper.items() if not is_plain([v])}
        for name, value in found.items():
            for i in callbacks if not is_data(value) else ():
                if may_take(name, self.callbacks[i]):
                    self._act(i, f"its argument {name} is an object of type {type(value).__name__}")
        if self.acts.keys() & callbacks:
            raise ActsAfterAll
        return found

    def _open(self, callbacks: range, handed: Iterable[str]) -> list[int]:
        """Those that hold something that may change, so that it matters how often and when they are called."""
        return [i for i in callbacks if self._reads[i] or any(may_take(k, self.callbacks[i]) for k in handed)]

    def untraceable(self, i: int, error: BaseException, signature: Signature, handed: Iterable[str]) -> None:
        """Note that a callback has no fused form; raises ActsAfterAll if it matters when it is called."""
        where = getattr(error, "where", "") or place_of(self.callbacks[i])
        reason = str(error) if isinstance(error, Untraceable) else f"{type(error).__name__}: {error}"
        remedy = getattr(error, "remedy", "") or FUSES
        eager = Eager(name_of(self.callbacks[i]), f"{where}: {reason}. Remedy: {remedy}")
        if isinstance(error, Changes) or self._open(range(i, i + 1), handed):
            self.acts[i] = eager
            raise ActsAfterAll
        self.unfused[i, structure_of(signature)] = eager
        if isinstance(error, Starts) and not any(
            isinstance(v, (Buffer, Foreign)) for _, v in signature.state
        ):
            self._starting.add(eager)

    def parted(self, totalling: Iterable[int]) -> None:
        """Note that these, which call ``fusedopt.total``, run eagerly, because some callback of the list does."""
        for i in totalling:
            why = (
                f"{place_of(self.callbacks[i])}: it calls fusedopt.total, and for some parameters a callback of the "
                "list has no fused form, so sums are taken between callbacks. Remedy: make all callbacks fuse"
            )
            self.unfused.setdefault((i, None), Eager(name_of(self.callbacks[i]), why))

    def changed(self, callbacks: range, handed: Iterable[str]) -> None:
        """Note that a trace of these has changed something around them. Raises ActsAfterAll."""
        for i in self._open(callbacks, handed) or callbacks:
            self._act(i, "it changes a list, dict, set or tensor from outside its arguments")
        raise ActsAfterAll

    def _act(self, i: int, reason: str, remedy: str = "") -> None:
        where = "" if re.match(r"\S.*:\d+: ", reason) else f"{place_of(self.callbacks[i])}: "
        self.acts[i] = Eager(
            name_of(self.callbacks[i]), f"{where}{reason}. Remedy: {remedy or ARGUMENTS_ALONE}"
        )

    # -- what is said --
    def all(self) -> tuple[Eager, ...]:
        """Every verdict with its reason."""
        acts = [self.acts[i] for i in sorted(self.acts)]
        found = [eager for eager in self.unfused.values() if eager not in self._starting]
        return tuple(dict.fromkeys([*acts, *found]))

    def say(self) -> None:
        """Warn, once each, of callbacks that run eagerly."""
        unfused = [
            (i, eager) for (i, _), eager in reversed(self.unfused.items()) if eager not in self._starting
        ]
        found = dict(unfused) | self.acts
        for i, (name, reason) in sorted(found.items()):
            self.warn(i, f"the callback {name} runs eagerly, parameter by parameter: {reason}")

    @property
    def watching(self) -> bool:
        """Whether it matters which callbacks do something."""
        return self._moved is not None

    def moved(self, callbacks: Iterable[int]) -> None:
        """These did something."""
        if self._moved is not None:
            self._moved |= {*callbacks}

    def say_idle(self, new: Iterable[str], ran: Iterable[int], kept: set[str], hypers: set[str]) -> None:
        """Warn, after the first step, of callbacks that ``ran`` and did nothing, of ``new`` state nobody takes, and of
        arguments that are none of what is ``kept``, nor ``hypers``, and look like state that was meant to be."""
        moved, self._moved = self._moved, None
        if moved is None:
            return
        for i in sorted(ran):
            callback = self.callbacks[i]
            excused = bool(moved) or self.beside is not None
            if i not in moved and uses_parameter(callback) and not (excused and branches(callback)):
                self.warn(
                    ("idle", i),
                    f"the callback {name_of(callback)} ({place_of(callback)}) changed nothing. A callback changes its "
                    "arguments in place or returns state: p.data.sub_(lr * p.grad), not p = p - lr * p.grad",
                )
        strange = [key for key in new if not is_temporary(key) and not self._is_taken(key, hypers)]
        for i in sorted(ran) if not strange else ():
            callback = self.callbacks[i]
            for name in sorted(forgets(callback) - kept - hypers):
                self.warn(
                    ("forgotten", i, name),
                    f"the callback {name_of(callback)} ({place_of(callback)}) changes its argument {name!r} and does "
                    f"not return it, so it begins anew in every step. Remedy: return {{{name!r}: {name}}}, which keeps "
                    "it",
                )

    def _is_taken(self, key: str, hypers: set[str]) -> bool:
        """Whether what is kept in the state under this name is handed to a callback. If not, warn of it."""
        known = {name: i for cb in self.callbacks for i, name in enumerate(arguments_of(cb))}
        if key in hypers or known.get(key) == 0:
            whose = "the parameter" if key not in hypers else "the hyperparameter"
            self.warn(
                ("state", key),
                f"the state {key!r} is kept, but {whose} is what callbacks get under this name: return it "
                "under another",
            )
            return False
        taken = any(may_take(key, cb, True) for cb in (*self.callbacks, *(self.beside or ())))
        if key.startswith(STARTED) or taken:
            return True
        near = difflib.get_close_matches(key, known, 1)
        hint = f" (is it {near[0]!r}?)" if near else ""
        text = (
            f"the state {key!r} is kept, but no callback takes it: name it among the arguments of one{hint}"
        )
        self.warn(("state", key), text)
        return False

    def warn(self, once: Any, text: str) -> None:
        """Warn, if this was not said before."""
        env.warn_once(self.said, once, text)
