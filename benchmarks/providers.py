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
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

import fusedopt
import fusedopt.optim
import fusedopt.rules

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
    ``bare``: the bare loop has it. ``near``: state is kept in fewer bits, by each provider in its own way, or matrices
    are multiplied in fewer, so that what they do is alike and not the same.
    """

    name: str
    ours: Callable[..., fusedopt.Optimizer]
    hypers: dict[str, Any] = field(default_factory=dict)
    torch: type[torch.optim.Optimizer] | None = None
    momentum_key: str | None = None
    callback_momentum_key: str = "mom"
    fused: bool = False
    bare: bool = False
    near: bool = False

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
_ADAFACTOR = dict(lr=1e-3, scale_parameter=False, relative_step=False)
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
            near=True,
        )
        for name in ("bfloat16_sr", "int8")
    ),
    Rule("Muon", fusedopt.rules.Muon, dict(lr=1e-3), torch.optim.Muon, near=True),
    Rule(
        "AdaBelief",
        partial(fusedopt.Optimizer, cbs=adabelief),
        _ADABELIEF,
        momentum_key="beta1",
        callback_momentum_key="beta1",
    ),
    Rule("Adafactor", fusedopt.rules.Adafactor, _ADAFACTOR),
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
    near: bool = False
    """Whether it does only nearly what the others do."""
    package: str = ""
    """The package that it is of, with its version, if that is neither torch nor this one."""

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
    return _runner(name, opt, rule.momentum_key, rates)


def _one_group(
    rule: Rule, params: Sequence[Tensor], rates: Sequence[float], *, backend: str | None = None
) -> Runner:
    name = f"fusedopt {backend} one group" if backend else "fusedopt one group"
    opt = _ours(rule, params, [rule.lr], backend)
    return _runner(name, opt, rule.momentum_key, [rule.lr], comparable=len(rates) == 1)


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
    return _runner(name, opt, rule.momentum_key, rates)


def _compiled(rule: Rule, params: Sequence[Tensor], rates: Sequence[float]) -> Runner:
    """``torch.compile(opt.step)``. The rate is a tensor and momentum stays: a new float would compile again.

    ``capturable``: with ``foreach``, torch takes a tensor for the rate only then.
    """
    flags = dict(capturable=True) if rule.momentum_key == "betas" else {}
    runner = _torch(rule, params, rates, name="torch compiled", foreach=True, **flags)
    runner.step = torch.compile(runner.optimizer.step)
    for group in runner.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    runner.set = partial(_fill_rates, runner.optimizer, rates)
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


@dataclass(frozen=True)
class Peer:
    """Another package's class for a rule: its name, its arguments, and the key of its groups for the momentum.

    None where the class has its step compiled by torch, which would be done again for another momentum.
    ``near``: it does something that is alike, and as much work.
    """

    kind: str
    options: dict[str, Any]
    momentum_key: str | None = "betas"
    near: bool = False


_BETAS = dict(betas=(0.9, 0.999), eps=1e-8)
_PEER_ADAMW = dict(lr=1e-3, weight_decay=0.01, **_BETAS)
_PEER_LION = dict(lr=1e-4, weight_decay=0.01, betas=(0.9, 0.99))
_PEER_RADAM = dict(lr=1e-3, **_BETAS)
_OPTIMI = dict(kahan_sum=False)
_HEAVYBALL = dict(consume_grad=False)  # else it takes the gradients away, which the others need
PEERS: dict[str, tuple[str, dict[str, Peer]]] = {
    "optimi": (
        "optimi",
        {
            "AdamW": Peer("AdamW", _PEER_ADAMW | _OPTIMI, "beta1"),
            "SGD-momentum": Peer("SGD", dict(lr=1e-2, momentum=0.9) | _OPTIMI, "momentum"),
            "RAdam": Peer("RAdam", _PEER_RADAM | _OPTIMI, "beta1"),
            "Lion": Peer("Lion", _PEER_LION | _OPTIMI, "beta1"),
        },
    ),
    "heavyball": (
        "heavyball",
        {
            "AdamW": Peer("AdamW", _PEER_ADAMW | _HEAVYBALL, near=True),  # divides by no less than eps
            "SGD-momentum": Peer("SGD", dict(lr=1e-2, beta=0.9) | _HEAVYBALL, "beta"),
        },
    ),
    "pytorch-optimizer": (
        "pytorch_optimizer",
        {
            "Lion": Peer("Lion", _PEER_LION),
            "AdaBelief": Peer("AdaBelief", _PEER_ADAMW | dict(weight_decouple=True, rectify=False)),
        },
    ),
    "timm": (
        "timm.optim",
        {
            "AdamW": Peer("AdamWLegacy", _PEER_ADAMW),
            "SGD-momentum": Peer("SGDW", dict(lr=1e-2, momentum=0.9, weight_decay=0.0), "momentum"),
            "RAdam": Peer("RAdamLegacy", _PEER_RADAM),
            "Lion": Peer("Lion", _PEER_LION),
            "AdaBelief": Peer("AdaBelief", _PEER_ADAMW | dict(decoupled_decay=True, rectify=False)),
        },
    ),
    "transformers": ("transformers.optimization", {"Adafactor": Peer("Adafactor", _ADAFACTOR, None)}),
    "bitsandbytes": (
        "bitsandbytes.optim",
        {
            "AdamW": Peer("AdamW32bit", _PEER_ADAMW),
            "SGD-momentum": Peer("SGD32bit", dict(lr=1e-2, momentum=0.9)),
            "Lion": Peer("Lion32bit", _PEER_LION),
            "AdamW-int8": Peer("AdamW8bit", _PEER_ADAMW),
        },
    ),
    "torchao": (
        "torchao.optim",
        {"AdamW": Peer("_AdamW", _PEER_ADAMW, None), "AdamW-int8": Peer("AdamW8bit", _PEER_ADAMW, None)},
    ),
    "apex": ("apex.optimizers", {"AdamW": Peer("FusedAdam", _PEER_ADAMW | dict(adam_w_mode=True))}),
}
"""Packages that have rules of ours, by the names of providers: the module, and the class for each rule."""


def _peer(rule: Rule, params: Sequence[Tensor], rates: Sequence[float], *, name: str) -> Runner:
    module, kinds = PEERS[name]
    if rule.name not in kinds:
        raise Unavailable(f"{name} is not taken for {rule.name}")
    if (package := installed(module)) is None:
        raise Unavailable(f"{name} is not installed")
    if name == "timm":
        from . import torchvision_ops  # noqa: F401  which it imports
    peer = kinds[rule.name]
    options = peer.options | (dict(triton=params[0].device.type == "cuda") if name == "optimi" else {})
    opt = getattr(importlib.import_module(module), peer.kind)(_groups(params, rates), **options)
    runner = _runner(name, opt, peer.momentum_key, rates)
    runner.package, runner.near = package, peer.near
    if name == "torchao":
        runner.set = partial(_fill_rates, opt, rates)
    return runner


def installed(module: str) -> str | None:
    """Name and version of the package that a module is of; None if it is not here."""
    top = module.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        return None
    name = metadata.packages_distributions().get(top, [top])[0]
    return f"{name} {metadata.version(name)}"


def _fill_rates(opt: Any, rates: Sequence[float], factor: float, momentum: float | None) -> None:
    """Write a step's learning rates into groups where they are tensors; momentum stays."""
    for group, rate in zip(opt.param_groups, rates, strict=True):
        group["lr"].fill_(rate * factor)


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
    **{name: partial(_peer, name=name) for name in PEERS},
    **{f"fusedopt {b}": partial(_fusedopt, backend=b) for b in BACKENDS},
    **{f"fusedopt {b} one group": partial(_one_group, backend=b) for b in BACKENDS},
}
SLOW_TO_START = ("torch compiled", "torchao")
"""Providers that are used only when asked for."""
OPTIONAL = ("torch compiled", "deepspeed", *PEERS)
"""Providers whose failure is theirs: they are left out."""


def make(name: str, rule: str, params: Sequence[Tensor], rates: Sequence[float] = (1.0,)) -> Runner:
    """A provider of a rule on these parameters. ``rates``: per group, in multiples of the rule's.

    Raises Unavailable.
    """
    chosen = RULES[rule]
    runner = PROVIDERS[name](chosen, params, [chosen.lr * rate for rate in rates])
    runner.near |= chosen.near
    return runner
