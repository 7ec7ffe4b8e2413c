"""What ``help()`` says of a named optimizer besides its own docstring, each written in one place.

Formulas, sources and deviations stand with the callbacks that an optimizer is made of, and what arguments mean that
many optimizers have stands here. An editor that reads the source without running it shows an optimizer's own docstring,
its signature, and of ``**options`` what `fusedopt.optimizer.Options` says.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from typing import Any, TypeVar

from .. import callbacks
from ..callback import function_of, name_of
from .names import HyperNames

_T = TypeVar("_T", bound=Callable[..., Any])

HEADINGS = ("Formula", "Args", "State", "Returns", "Raises", "Source", "Deviations")
_HEADING = re.compile(rf"^({'|'.join(HEADINGS)}): ", re.M)

SHARED = {
    "params": 'tensors, or groups of them: dicts with "params" and with hyperparameters of their own',
    "lr": "parameter units per unit of update; a number, a 0-d tensor, or a slice or list with one for each group",
    "betas": "weights of the old averages in the new ones, each in [0, 1)",
    "momentum": "weight of the old average, or sum, in the new one",
    "mom": "weight of the old average of gradients in the new one, in [0, 1]",
    "sqr_mom": "the same for squared gradients",
    "eps": "added where a quotient's denominator may be zero; in gradient units, unless the formula says otherwise",
    "weight_decay": "in 1/lr where it shrinks the parameter; gradient units per parameter unit where it is L2",
    "wd": "weight decay: in 1/lr, or in gradient units per parameter unit without `decouple_wd`",
    "decouple_wd": "whether the parameter itself shrinks (AdamW), or its L2 penalty is part of the gradient",
    "maximize": "ascend instead of descend",
    "foreach": "kept, and chooses nothing: each step is a fused kernel",
    "fused": "kept, and chooses nothing",
    "differentiable": "refused if True: a kernel leaves no graph",
    "capturable": "keep counts of steps on the device, for CUDA graphs; see `Optimizer.upload_hypers`",
    "options": "``backend``, ``state_dtype``, ``storage``, ``amp_fused``, ``max_grad_norm`` and ``capturable``, as of "
    "`fusedopt.Optimizer`",
}
"""What arguments mean that optimizers share, by name; one that means something else by it says so itself."""

RAISES = (
    "TypeError: parameters that are no tensors, or an argument that there is not.",
    "ValueError: no parameters, or one twice; a number that is NaN, negative, or outside of its range.",
)


@cache
def sections(doc: str) -> dict[str, str]:
    """What a docstring has under each of the template's headings, each as one line."""
    parts = _HEADING.split(inspect.cleandoc(doc))
    return {
        h: " ".join(text.split("\n\n")[0].split()) for h, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def described(*cbs: Callable[..., Any]) -> Callable[[_T], _T]:
    """A decorator: the docstring of an optimizer that is made of these callbacks, completed."""

    def complete(named: _T) -> _T:
        if named.__doc__:  # there is none under python -OO
            named.__doc__ = "\n\n".join([inspect.cleandoc(named.__doc__), *_rest(named, cbs)])
        return named

    return complete


def _rest(named: Any, cbs: Iterable[Callable[..., Any]]) -> Iterator[str]:
    own, arguments = named.__doc__, inspect.signature(named).parameters
    found = [(cb, sections(function_of(cb).__doc__ or "")) for cb in cbs]

    def of_each(heading: str) -> list[str]:
        return [f"{name_of(cb)}: {parts[heading]}" for cb, parts in found if heading in parts]

    symbols = "; ".join(
        ["p: parameter, g: gradient, m, v: its averages, t: step, from 1", *_renamed(named, arguments)]
    )
    # fusedopt.callbacks say how they differ from fastai's, which is not what torch's optimizers are compared with.
    deviations = [
        f"{name_of(cb)}: {parts['Deviations']}"
        for cb, parts in found
        if not parts["Deviations"].startswith(("none.", "no fastai peer"))
        and not (isinstance(named, type) and function_of(cb).__module__ == callbacks.__name__)
    ]
    yield _block(
        f"Formula, in this order ({symbols}):", [f"{_called(cb)}: {parts['Formula']}" for cb, parts in found]
    )
    if shared := [f"{n}: {SHARED[n]}." for n in arguments if n in SHARED and f"`{n}`" not in own]:
        yield _block("Arguments that others have too:", shared)
        yield _block("Raises:", RAISES)
    yield _block("Source:", of_each("Source"))
    if deviations:
        yield _block("Deviations:", deviations)


def _called(cb: Callable[..., Any]) -> str:
    """A callback's name, with what a partial sets."""
    set_here = ", ".join(f"{k}={v}" for k, v in cb.keywords.items()) if isinstance(cb, partial) else ""
    return f"{name_of(cb)}({set_here})" if set_here else name_of(cb)


def _renamed(named: Any, arguments: Mapping[str, Any]) -> Iterator[str]:
    """What callbacks call the optimizer's arguments, where it is something else."""
    for name, place in HyperNames(arguments, getattr(named, "hyper_names", None)).place.items():
        key, at = place if isinstance(place, tuple) else (place, None)
        if key in arguments and name not in arguments:
            yield f"{name}: {key}" if at is None else f"{name}: {key}[{at}]"


def _block(title: str, lines: Iterable[str]) -> str:
    return "\n".join([_filled(title, "", ""), *(_filled(line, " " * 4, " " * 8) for line in lines)])


@cache  # which, like that of `sections`, saves 6 of the 15 ms that all docstrings would take on import
def _filled(text: str, first: str, others: str) -> str:
    return textwrap.fill(
        text,
        112,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )
