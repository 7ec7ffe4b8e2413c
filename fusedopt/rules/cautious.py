"""Cautious: any rule, without what its step does against the gradient."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..callback import defaults_of, function_of, name_of
from ..callbacks import lookahead
from ..optimizer import Optimizer
from ..optimizer.described import described

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def cautious_step(p: Any, rule: Any, **kwargs: Any) -> Any:
    """Take another callback's step only where it agrees with the gradient.

    Formula: `rule` moves p to ``p - u``; ``φ = 1`` where ``u·g > 0``, else 0; ``p ← p - u·φ / max(mean(φ), 0.001)``,
    with the mean over the tensor.
    Args: `rule` callback that changes the parameter; whatever it takes.
    State: that of `rule`.
    Source: Liang et al., "Cautious Optimizers: Improving Training with One Line of Code", arXiv:2411.16085; the scale
    is that of its authors' code (the paper has ``d / (sum(φ) + 1)`` for d elements).
    Deviations: u is what `rule` has moved p by: a decay within `rule` is masked too, and u has the rounding of a
    difference. g is the gradient as `rule` leaves it.
    """
    before = p.data.clone()
    new = rule(p, **kwargs)
    update = before - p.data
    agrees = (update * p.grad.data > 0).to(update.dtype)
    p.data.copy_(before - update * (agrees / agrees.mean().clamp(min=1e-3)))
    return new


def cautious(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The callback `rule`, made cautious: see `cautious_step`. For lists of callbacks; it may be pickled.

    Args: `rule`, a callback that changes the parameter: ``[weight_decay, cautious(lion_step)]``.
    """
    made = partial(cautious_step, rule=rule)
    made.defaults = defaults_of(rule)
    return made


@described(cautious_step)
def Cautious(opt: Optimizer) -> Optimizer:
    """Make the last callback of `opt`, its step, cautious, and return `opt`: ``Cautious(optim.AdamW(params))``.

    Args: `opt`, any optimizer of fusedopt. Decay in a callback of its own, as most have it, stays as it is.
    Raises: TypeError for an optimizer of another library; ValueError for one that is cautious already, or looks ahead:
    ``Lookahead(Cautious(opt))`` is what is meant then.
    """
    if not isinstance(opt, Optimizer):
        raise TypeError(f"Cautious changes an Optimizer of fusedopt, and this is a {type(opt).__name__}")
    last = opt.cbs[-1]
    if function_of(last) is cautious_step:
        raise ValueError("this optimizer is cautious already")
    if last is lookahead:
        raise ValueError("this optimizer looks ahead; make it cautious first: Lookahead(Cautious(opt))")
    opt.cbs = [*opt.cbs[:-1], cautious(last)]
    opt.title = f"Cautious_{opt.title or (name_of(last) if type(opt) is Optimizer else type(opt).__name__)}"
    return opt
