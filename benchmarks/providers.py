"""Who steps: the update rules, and for each of them fusedopt and those it is compared with.

All providers of a rule get the same parameters and gradients and do the same arithmetic; `measure.agree` checks that.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fusedopt
import fusedopt.optim

from .baseline import BareLoop
from .eager import EagerOptimizer

# --
# Rules


def lion(p, lr, wd, beta1, beta2, exp_avg=None, **kwargs):
    """Lion (Chen et al., arXiv:2302.06675), as a user writes it: torch has none, and neither has fusedopt."""
    grad = p.grad.data
    if exp_avg is None:
        exp_avg = torch.zeros_like(grad)
    p.data.mul_(1 - lr * wd).sub_(torch.sign(exp_avg * beta1 + grad * (1 - beta1)) * lr)
    exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)
    return {"exp_avg": exp_avg}


def adabelief(p, lr, wd, beta1, beta2, eps, step=0, exp_avg=None, exp_avg_var=None, **kwargs):
    """AdaBelief (Zhuang et al., arXiv:2010.07468), as a user writes it: neither torch nor fusedopt has it."""
    grad, step = p.grad.data, step + 1
    if exp_avg is None:
        exp_avg, exp_avg_var = torch.zeros_like(grad), torch.zeros_like(grad)
    exp_avg.mul_(beta1).add_(grad * (1 - beta1))
    surprise = grad - exp_avg
    exp_avg_var.mul_(beta2).add_(surprise * surprise * (1 - beta2) + eps)
    spread = (exp_avg_var / (1 - beta2**step)).sqrt() + eps
    p.data.mul_(1 - lr * wd).sub_(exp_avg / spread * (lr / (1 - beta1**step)))
    return {"step": step, "exp_avg": exp_avg, "exp_avg_var": exp_avg_var}


class Lion(torch.optim.Optimizer):
    """The same as people publish it: a class, with a loop over groups and parameters."""

    def __init__(self, params, lr: float, wd: float, beta1: float, beta2: float) -> None:
        super().__init__(params, dict(lr=lr, wd=wd, beta1=beta1, beta2=beta2))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                exp_avg, beta1, beta2 = state["exp_avg"], group["beta1"], group["beta2"]
                p.mul_(1 - group["lr"] * group["wd"])
                p.sub_(torch.sign(exp_avg * beta1 + p.grad * (1 - beta1)) * group["lr"])
                exp_avg.mul_(beta2).add_(p.grad, alpha=1 - beta2)


@dataclass(frozen=True)
class Rule:
    """An update rule: what makes fusedopt's optimizer, and torch's class where torch has the rule.

    ``hypers`` fit both. ``momentum_key`` is the param-group key that a one-cycle schedule changes besides ``lr``,
    ``callback_momentum_key`` the same by the callbacks' names. ``fused``: torch has a fused kernel of it for CPUs.
    ``bare``: the bare loop has it.
    """

    name: str
    ours: Callable[..., fusedopt.Optimizer]
    hypers: dict[str, Any] = field(default_factory=dict)
    torch: type[torch.optim.Optimizer] | None = None
    momentum_key: str | None = None
    callback_momentum_key: str = "mom"
    fused: bool = False
    bare: bool = False
    comparable: bool = True
    """Whether all who do it come to the same numbers. False where matrices or state are rounded."""

    @property
    def lr(self) -> float:
        return self.hypers["lr"]


def _in_torch(name: str, momentum_key: str | None = None, **options: Any) -> Rule:
    """A rule that torch.optim has, and fusedopt.optim under the same name."""
    flags = {k: options.pop(k) for k in ("fused", "bare") if k in options}
    label = "SGD-momentum" if name == "SGD" else name
    return Rule(
        label,
        getattr(fusedopt.optim, name),
        options,
        getattr(torch.optim, name),
        momentum_key=momentum_key,
        **flags,
    )


_LAMB = dict(lr=1e-3, mom=0.9, sqr_mom=0.99, eps=1e-6, wd=0.01)
_ADAMW = dict(lr=1e-3, weight_decay=0.01)
_LION = dict(lr=1e-4, wd=0.01, beta1=0.9, beta2=0.99)
_ADABELIEF = dict(lr=1e-3, wd=0.01, beta1=0.9, beta2=0.999, eps=1e-8)
_RULES = (
    _in_torch("AdamW", "betas", lr=1e-3, weight_decay=0.01, fused=True, bare=True),
    _in_torch("SGD", "momentum", lr=1e-2, momentum=0.9, fused=True, bare=True),
    _in_torch("RMSprop", lr=1e-3),
    _in_torch("Adagrad", lr=1e-2, eps=1e-10, fused=True, bare=True),
    _in_torch("RAdam", "betas", lr=1e-3),
    _in_torch("NAdam", "betas", lr=1e-3),
    Rule("LAMB", fusedopt.Lamb, _LAMB, momentum_key="betas"),
    Rule(
        "Lion",
        partial(fusedopt.Optimizer, cbs=lion),
        _LION,
        momentum_key="beta1",
        callback_momentum_key="beta1",
    ),
    Rule(
        "Lion-class",
        lambda params, **hypers: fusedopt.fuse(Lion(params, **hypers)),
        _LION,
        Lion,
        "beta1",
        "beta1",
    ),
    *(
        Rule(
            f"AdamW-{name}",
            partial(fusedopt.optim.AdamW, storage=name),
            _ADAMW,
            momentum_key="betas",
            comparable=False,
        )
        for name in ("bfloat16_sr", "int8")
    ),
    Rule("Adafactor", fusedopt.rules.Adafactor, dict(lr=1e-2, relative_step=False)),
    Rule("Muon", fusedopt.rules.Muon, dict(lr=1e-3), torch.optim.Muon, comparable=False),
    Rule(
        "AdaBelief",
        partial(fusedopt.Optimizer, cbs=adabelief),
        _ADABELIEF,
        momentum_key="beta1",
        callback_momentum_key="beta1",
    ),
)
RULES = {rule.name: rule for rule in _RULES}

# --
# Providers


@dataclass
class Runner:
    """A provider at work: ``step`` is what is timed; ``set`` and ``prepare`` come before it, off the clock."""

    name: str
    optimizer: Any
    step: Callable[[], Any]
    set: Callable[[float, float | None], None]
    prepare: Callable[[], None] = lambda: None
    comparable: bool = True
    """Whether it does what the others do. False for the same rule with other learning rates."""

    def __call__(self, factor: float, momentum: float | None = None) -> None:
        """A whole step at ``factor`` times the learning rate, with that momentum where the rule has one."""
        self.set(factor, momentum)
        self.prepare()
        self.step()


class Unavailable(Exception):
    """The provider is not there, or has no such rule. Says why."""


def _set(opt: Any, key: str | None, rates: Sequence[float], factor: float, momentum: float | None) -> None:
    """Write a step's learning rates and momentum into the param groups."""
    for group, rate in zip(opt.param_groups, rates, strict=True):
        group["lr"] = rate * factor
        if momentum is not None and key is not None:
            group[key] = (momentum, group[key][1]) if key == "betas" else momentum


def _runner(name: str, opt: Any, key: str | None, rates: Sequence[float], comparable: bool = True) -> Runner:
    return Runner(name, opt, opt.step, partial(_set, opt, key, rates), comparable=comparable)


def _groups(params: Sequence[Tensor], rates: Sequence[float]) -> list[dict[str, Any]]:
    """One group with all parameters, or one per parameter."""
    if len(rates) == 1:
        return [{"params": list(params), "lr": rates[0]}]
    return [{"params": [p], "lr": rate} for p, rate in zip(params, rates, strict=True)]


def _fusedopt(
    rule: Rule, params: Sequence[Tensor], rates: Sequence[float], *, backend: str | None = None
) -> Runner:
    name = f"fusedopt {backend}" if backend else "fusedopt"
    opt = _ours(rule, params, rates, backend)
    return _runner(name, opt, rule.momentum_key, rates, comparable=rule.comparable)


def _one_group(
    rule: Rule, params: Sequence[Tensor], rates: Sequence[float], *, backend: str | None = None
) -> Runner:
    name = f"fusedopt {backend} one group" if backend else "fusedopt one group"
    opt = _ours(rule, params, [rule.lr], backend)
    return _runner(name, opt, rule.momentum_key, [rule.lr], comparable=rule.comparable and len(rates) == 1)


@contextlib.contextmanager
def compiled_by(backend: str | None) -> Iterator[None]:
    """Optimizers made in the block have this backend: the variable reaches every factory; None leaves it as it is."""
    before = os.environ.get("FUSEDOPT_BACKEND")
    if backend is not None:
        os.environ["FUSEDOPT_BACKEND"] = backend
    try:
        yield
    finally:
        if backend is not None:
            os.environ.pop("FUSEDOPT_BACKEND")
            os.environ.update({} if before is None else {"FUSEDOPT_BACKEND": before})


def _ours(
    rule: Rule, params: Sequence[Tensor], rates: Sequence[float], backend: str | None
) -> fusedopt.Optimizer:
    if backend and BACKENDS[backend] != params[0].device.type:
        raise Unavailable(f"backend {backend!r} runs on {BACKENDS[backend]}")
    with compiled_by(backend):
        return rule.ours(_groups(params, rates), **rule.hypers)


def _eager(rule: Rule, params: Sequence[Tensor], rates: Sequence[float]) -> Runner:
    ours = rule.ours(_groups(params, rates), **rule.hypers)
    if not isinstance(ours, fusedopt.Optimizer):
        raise Unavailable(f"{rule.name} has no callbacks")
    opt = EagerOptimizer.like(ours)
    return _runner("eager", opt, rule.momentum_key and rule.callback_momentum_key, rates)


def _torch(
    rule: Rule, params: Sequence[Tensor], rates: Sequence[float], *, name: str, **flags: Any
) -> Runner:
    if rule.torch is None:
        raise Unavailable(f"torch.optim has no {rule.name}")
    if flags.get("fused") and not rule.fused:
        raise Unavailable(f"torch.optim has no fused {rule.name}")
    if not rule.fused:
        flags.pop("fused", None)
    if unknown := flags.keys() - inspect.signature(rule.torch).parameters.keys():
        raise Unavailable(f"{rule.name} has no {', '.join(unknown)}")
    opt = rule.torch(_groups(params, rates), **rule.hypers, **flags)
    return _runner(name, opt, rule.momentum_key, rates, comparable=rule.comparable)


def _compiled(rule: Rule, params: Sequence[Tensor], rates: Sequence[float]) -> Runner:
    """``torch.compile(opt.step)``. The rate is a tensor and momentum stays: a new float would compile again.

    ``capturable``: with ``foreach``, torch takes a tensor for the rate only then.
    """
    flags = dict(capturable=True) if rule.momentum_key == "betas" else {}
    runner = _torch(rule, params, rates, name="torch compiled", foreach=True, **flags)
    runner.step = torch.compile(runner.optimizer.step)
    for group in runner.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])

    def set_rates(factor: float, momentum: float | None) -> None:
        for group, rate in zip(runner.optimizer.param_groups, rates, strict=True):
            group["lr"].fill_(rate * factor)

    runner.set = set_rates
    return runner


def _deepspeed(rule: Rule, params: Sequence[Tensor], rates: Sequence[float]) -> Runner:
    if rule.name != "AdamW" or len(rates) > 1:
        raise Unavailable(f"no DeepSpeedCPUAdam for {rule.name}")
    if importlib.util.find_spec("deepspeed") is None:
        raise Unavailable("deepspeed is not installed")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    opt = DeepSpeedCPUAdam(_groups(params, rates), adamw_mode=True, **rule.hypers)
    return _runner("deepspeed", opt, rule.momentum_key, rates)


def _bare(rule: Rule, params: Sequence[Tensor], rates: Sequence[float]) -> Runner:
    if not rule.bare or len(rates) > 1:
        raise Unavailable(f"no bare loop for {rule.name}")
    betas = dict(betas=(0.9, 0.999)) if rule.momentum_key == "betas" else {}
    loop = BareLoop(params, **{**rule.hypers, **betas})

    def set_(factor: float, momentum: float | None) -> None:
        loop.lr = rates[0] * factor
        loop.mom = loop.mom if momentum is None or loop.mom is None else momentum

    return Runner("bare loop", loop, loop.step, set_, loop.prepare)


def _peer_adamw(
    rule: Rule,
    params: Sequence[Tensor],
    rates: Sequence[float],
    *,
    name: str,
    module: str,
    kind: str,
    **flags: Any,
) -> Runner:
    """Another package's AdamW for GPUs."""
    if rule.name != "AdamW" or params[0].device.type != "cuda":
        raise Unavailable(f"{name} is taken for AdamW on GPUs")
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise Unavailable(f"{name} is not installed")
    make = getattr(importlib.import_module(module), kind)
    opt = make(_groups(params, rates), **rule.hypers, betas=(0.9, 0.999), eps=1e-8, **flags)
    return _runner(name, opt, rule.momentum_key, rates)


BACKENDS = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}
"""The device of each compiled backend, for providers that name one."""
PROVIDERS: dict[str, Callable[..., Runner]] = {
    "eager": _eager,
    "torch loop": partial(_torch, name="torch loop", foreach=False, fused=False),
    "torch default": partial(_torch, name="torch default"),
    "torch foreach": partial(_torch, name="torch foreach", foreach=True),
    "torch fused": partial(_torch, name="torch fused", fused=True),
    "torch compiled": _compiled,
    "deepspeed": _deepspeed,
    "bare loop": _bare,
    "fusedopt": _fusedopt,
    "fusedopt one group": _one_group,
    "optimi": partial(
        _peer_adamw, name="optimi", module="optimi", kind="AdamW", triton=True, kahan_sum=False
    ),
    "apex": partial(_peer_adamw, name="apex", module="apex.optimizers", kind="FusedAdam", adam_w_mode=True),
    **{f"fusedopt {b}": partial(_fusedopt, backend=b) for b in BACKENDS},
    **{f"fusedopt {b} one group": partial(_one_group, backend=b) for b in BACKENDS},
}
SLOW_TO_START = ("torch compiled",)
"""Providers that are used only when asked for."""
OPTIONAL = ("torch compiled", "deepspeed", "optimi", "apex")
"""Providers whose failure is theirs: they are left out."""


def make(name: str, rule: str, params: Sequence[Tensor], rates: Sequence[float] = (1.0,)) -> Runner:
    """A provider of a rule on these parameters. ``rates``: per group, in multiples of the rule's.

    Raises Unavailable.
    """
    chosen = RULES[rule]
    return PROVIDERS[name](chosen, params, [chosen.lr * rate for rate in rates])
