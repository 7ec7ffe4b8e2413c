"""One table of all named optimizers and rules. It drives the tests, the documentation and the benchmarks.

Nothing in the package imports this module, so the table costs nothing to those who do not ask for it.

Bytes are the least an fp32 element costs in a steady step: every buffer that a stage needs is read once, and
the last stage writes the parameter and the state. A plain step is 12 (read p and g, write p); each state
buffer adds 8; a stage that only reduces adds 4 for each buffer it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import optim, rules
from .optimizer import named


@dataclass(frozen=True)
class Variant:
    """One set of keyword arguments, with what it costs."""

    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments besides ``params`` (for fastai's face, ``lr`` is always among them)."""
    state: tuple[str, ...] = ()
    """Keys in ``opt.state[p]`` of the buffers with the parameter's shape, after a step."""
    bytes: int = 12
    """Bytes moved per fp32 element in a steady step; where matrices have a kernel of their own, of a matrix."""
    first_step_kernel: bool = False
    """State starts as something other than zeros, so the first step runs a kernel of its own."""
    exact: bool = True
    """A plain loop's results differ from its own in the last digits alone. Not so where numbers are rounded to another
    type on the way, or where a matrix without full rank has eigenvectors or is inverted."""

    @property
    def buffers(self) -> int:
        """State buffers per parameter."""
        return len(self.state)

    @property
    def id(self) -> str:
        """A short name for test and benchmark ids."""
        return "-".join(f"{k}={v}" for k, v in self.kwargs.items()) or "defaults"


@dataclass(frozen=True)
class Row:
    """One named optimizer. The first variant is the one to benchmark and to document."""

    name: str
    face: str
    """'fastai' or 'torch': whose signature, defaults and results; 'rules': one of `fusedopt.rules`."""
    factory: Callable[..., Any]
    peer: str | None
    """Dotted name of the optimizer it must agree with, None if there is none. A rule's has other arguments."""
    variants: tuple[Variant, ...]
    reductions: bool = False
    """Needs a number per tensor (a norm): two stages instead of one."""
    keeps_numbers: bool = False
    """Stores a number per tensor that its last stage reads as it was, or no stage: a launch more, over tensors."""
    matrix_launches: int = 0
    """Kernel launches for matrices, where these have a kernel of their own; what else is said is of vectors."""
    calls: bool = False
    """Makes torch calls for matrices, between launches; those of one shape share their launches."""
    matrices: bool = False
    """Takes parameters of two or more dimensions alone."""
    totals: bool = False
    """Needs sums over all parameters: a pass before the step, with its launch over tensors, and two that join sums."""
    changes_structure: bool = False
    """Some steps run another kernel: RAdam's first steps, Lookahead's every k-th."""
    rests_first: bool = False
    """The first step changes the state alone, and no parameter."""
    swaps: bool = False
    """It has ``train()`` and ``eval()``, as its parameters are not the weights to use; accelerate calls them."""
    torch_fused: bool = False
    """torch.optim has a fused version of it."""

    @property
    def kwargs(self) -> list[dict[str, Any]]:
        """The keyword arguments of all variants."""
        return [v.kwargs for v in self.variants]

    @property
    def bytes(self) -> int:
        """Bytes per fp32 element of the first variant."""
        return self.variants[0].bytes

    @property
    def buffers(self) -> int:
        """State buffers per parameter of the first variant."""
        return self.variants[0].buffers

    @property
    def stages(self) -> int:
        """Launches over elements."""
        return 2 if self.reductions else 1

    @property
    def launches(self) -> int:
        """Kernel launches per step for parameters of one dtype on one device, and of matrices where these differ; of
        one shape, if there are torch calls."""
        return self.matrix_launches or self.stages + self.keeps_numbers + 4 * self.totals

    def shapes(self, shapes: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Those of these shapes that its parameters may have."""
        return [s for s in shapes if len(s) > 1 or not self.matrices]

    @property
    def exact(self) -> tuple[Variant, ...]:
        """The variants that a plain loop can be compared with, digit by digit."""
        return tuple(v for v in self.variants if v.exact)

    @property
    def first_step_kernel(self) -> bool:
        """True if any variant's first step runs a kernel of its own."""
        return any(v.first_step_kernel for v in self.variants)


def _lookahead_of_sgd(params: Any, lr: float, k: int = 6, alpha: float = 0.5, **kwargs: Any) -> Any:
    return named.Lookahead(named.SGD(params, lr, **kwargs), k=k, alpha=alpha)


def _variants(
    state: tuple[str, ...], bytes: int, *kwargs: dict[str, Any], first: bool = False, exact: bool = True
) -> tuple[Variant, ...]:
    """Variants that keep the same state and cost the same."""
    return tuple(Variant(k, state, bytes, first, exact) for k in kwargs)


_MOMENTUM, _EXP = ("momentum_buffer",), ("exp_avg", "exp_avg_sq")

_FASTAI = (
    Row(
        "SGD",
        "fastai",
        named.SGD,
        "fastai.optimizer.SGD",
        _variants((), 12, dict(lr=0.1, wd=0.01), dict(lr=0.1, wd=0.01, decouple_wd=False))
        + _variants(
            _MOMENTUM, 20, dict(lr=0.03, mom=0.9), dict(lr=0.03, mom=0.9, wd=0.01, decouple_wd=False)
        ),
    ),
    Row(
        "RMSProp",
        "fastai",
        named.RMSProp,
        "fastai.optimizer.RMSProp",
        _variants(("square_avg",), 20, dict(lr=0.01, wd=0.01))
        + _variants(
            ("square_avg", "grad_avg"), 28, dict(lr=0.003, mom=0.9, sqr_mom=0.95, wd=0.01, decouple_wd=False)
        ),
    ),
    Row(
        "Adam",
        "fastai",
        named.Adam,
        "fastai.optimizer.Adam",
        _variants(
            _EXP,
            28,
            dict(lr=0.01),
            dict(lr=0.01, mom=0.8, sqr_mom=0.95, eps=1e-3, wd=0.1, decouple_wd=False),
        ),
    ),
    Row(
        "RAdam",
        "fastai",
        named.RAdam,
        "fastai.optimizer.RAdam",
        _variants(
            _EXP,
            28,
            dict(lr=0.01, wd=0.01),
            dict(lr=0.01, eps=1e-3, wd=0.1, decouple_wd=False),
            dict(lr=0.01, wd=0.01, beta=50.0),
        ),
        changes_structure=True,
    ),
    Row(
        "QHAdam",
        "fastai",
        named.QHAdam,
        "fastai.optimizer.QHAdam",
        _variants(
            _EXP, 28, dict(lr=0.01, wd=0.01), dict(lr=0.01, nu_1=0.5, nu_2=0.8, wd=0.1, decouple_wd=False)
        ),
    ),
    Row(
        "Larc",
        "fastai",
        named.Larc,
        "fastai.optimizer.Larc",
        _variants(
            _MOMENTUM, 28, dict(lr=0.03, wd=0.01), dict(lr=0.03, clip=False, wd=0.01, decouple_wd=False)
        )
        + _variants((), 20, dict(lr=0.1, mom=0.0, trust_coeff=0.5, wd=0.01)),
        reductions=True,
        keeps_numbers=True,
    ),
    Row(
        "Lamb",
        "fastai",
        named.Lamb,
        "fastai.optimizer.Lamb",
        _variants(_EXP, 44, dict(lr=0.01, wd=0.01), dict(lr=0.01, eps=1e-3, wd=0.1, decouple_wd=False)),
        reductions=True,
    ),
    Row(
        "Lookahead",
        "fastai",
        _lookahead_of_sgd,
        "fastai.optimizer.Lookahead",
        _variants(("slow",), 12, dict(lr=0.1, wd=0.01), first=True)
        + _variants((*_MOMENTUM, "slow"), 20, dict(lr=0.03, mom=0.9, k=3, alpha=0.8), first=True),
        changes_structure=True,
    ),
    Row(
        "ranger",
        "fastai",
        named.ranger,
        "fastai.optimizer.ranger",
        _variants((*_EXP, "slow"), 28, dict(lr=0.01), dict(lr=0.01, k=3, alpha=0.3, beta=50.0), first=True),
        changes_structure=True,
    ),
)

_TORCH = (
    Row(
        "SGD",
        "torch",
        optim.SGD,
        "torch.optim.SGD",
        _variants(_MOMENTUM, 20, dict(lr=0.03, momentum=0.9, weight_decay=0.01))
        + _variants((), 12, dict(lr=0.1), dict(lr=0.1, weight_decay=0.01, maximize=True))
        + _variants(_MOMENTUM, 20, dict(lr=0.03, momentum=0.9, nesterov=True, weight_decay=0.01))
        + _variants(_MOMENTUM, 20, dict(lr=0.03, momentum=0.8, dampening=0.3), first=True),
        torch_fused=True,
    ),
    Row(
        "RMSprop",
        "torch",
        optim.RMSprop,
        "torch.optim.RMSprop",
        _variants(("square_avg",), 20, dict(), dict(alpha=0.95, eps=1e-3, weight_decay=0.01, maximize=True))
        + _variants(("square_avg", "momentum_buffer"), 28, dict(lr=0.003, momentum=0.9))
        + _variants(
            ("square_avg", "grad_avg"), 28, dict(centered=True, alpha=0.95, eps=1e-2, weight_decay=0.01)
        )
        + _variants(
            ("square_avg", "grad_avg", "momentum_buffer"),
            36,
            dict(lr=0.003, eps=1e-2, centered=True, momentum=0.9),
        ),
    ),
    Row(
        "Adam",
        "torch",
        optim.Adam,
        "torch.optim.Adam",
        _variants(
            _EXP,
            28,
            dict(lr=0.01),
            dict(lr=0.01, weight_decay=0.01, maximize=True),
            dict(lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, decoupled_weight_decay=True),
        )
        + _variants((*_EXP, "max_exp_avg_sq"), 36, dict(lr=0.01, betas=(0.9, 0.9), amsgrad=True)),
        torch_fused=True,
    ),
    Row(
        "AdamW",
        "torch",
        optim.AdamW,
        "torch.optim.AdamW",
        _variants(_EXP, 28, dict(lr=0.01), dict(lr=0.01, betas=(0.0, 0.95), maximize=True))
        + _variants(
            (*_EXP, "max_exp_avg_sq"), 36, dict(lr=0.01, betas=(0.9, 0.9), weight_decay=0.1, amsgrad=True)
        ),
        torch_fused=True,
    ),
    Row(
        "Adagrad",
        "torch",
        optim.Adagrad,
        "torch.optim.Adagrad",
        _variants(("sum",), 20, dict(), dict(lr=0.1, lr_decay=0.1, weight_decay=0.01, maximize=True))
        + _variants(("sum",), 20, dict(lr=0.1, initial_accumulator_value=0.5), first=True),
        torch_fused=True,
    ),
    Row(
        "Adamax",
        "torch",
        optim.Adamax,
        "torch.optim.Adamax",
        _variants(
            ("exp_avg", "exp_inf"),
            28,
            dict(),
            dict(lr=0.01, betas=(0.8, 0.9), weight_decay=0.01, maximize=True),
        ),
    ),
    Row(
        "NAdam",
        "torch",
        optim.NAdam,
        "torch.optim.NAdam",
        _variants(
            _EXP,
            28,
            dict(),
            dict(lr=0.01, momentum_decay=0.1, weight_decay=0.01, maximize=True),
            dict(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, decoupled_weight_decay=True),
        ),
    ),
    Row(
        "RAdam",
        "torch",
        optim.RAdam,
        "torch.optim.RAdam",
        _variants(
            _EXP,
            28,
            dict(lr=0.01),
            dict(lr=0.01, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.01, maximize=True),
            dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
        ),
        changes_structure=True,
    ),
    Row(
        "Adadelta",
        "torch",
        optim.Adadelta,
        "torch.optim.Adadelta",
        _variants(
            ("square_avg", "acc_delta"),
            28,
            dict(),
            dict(lr=0.5, rho=0.95, eps=1e-3, weight_decay=0.01, maximize=True),
        ),
    ),
)


def _cautious_adamw(params: Any, **kwargs: Any) -> Any:
    return rules.Cautious(optim.AdamW(params, **kwargs))


def _centralized_adamw(params: Any, **kwargs: Any) -> Any:
    return rules.Centralize(optim.AdamW(params, **kwargs))


def _grokfast_adamw(params: Any, alpha: float = 0.98, lamb: float = 2.0, **kwargs: Any) -> Any:
    return rules.GrokFast(optim.AdamW(params, **kwargs), alpha, lamb)


_DECAY = dict(lr=0.01, weight_decay=0.1)

_RULES = (
    Row(
        "AdaBelief",
        "rules",
        rules.AdaBelief,
        "pytorch_optimizer.AdaBelief",
        _variants(
            ("exp_avg", "exp_avg_var"),
            28,
            dict(),
            dict(**_DECAY, rectify=False),
            dict(lr=0.01, betas=(0.8, 0.95), eps=1e-8, rectify=False, maximize=True),
        ),
        changes_structure=True,
    ),
    Row(
        "AdaBound",
        "rules",
        rules.AdaBound,
        "pytorch_optimizer.AdaBound",
        _variants(_EXP, 28, dict(), dict(**_DECAY, betas=(0.8, 0.95), final_lr=0.3, gamma=0.1, eps=1e-3)),
    ),
    Row(
        "Adafactor",
        "rules",
        rules.Adafactor,
        "pytorch_optimizer.AdaFactor",
        _variants((), 24, dict(), dict(warmup_init=True, weight_decay=0.1))
        + _variants(
            ("exp_avg",),
            28,
            dict(**_DECAY, beta1=0.9, relative_step=False, scale_parameter=False, maximize=True),
        ),
        reductions=True,
        matrix_launches=5,
    ),
    Row(
        "AdaMod",
        "rules",
        rules.AdaMod,
        "torch_optimizer.AdaMod",
        _variants((*_EXP, "exp_avg_lr"), 36, dict(), dict(**_DECAY, betas=(0.8, 0.95), beta3=0.9, eps=1e-3)),
    ),
    Row(
        "AdamP",
        "rules",
        rules.AdamP,
        "torch_optimizer.AdamP",
        _variants(
            _EXP,
            44,
            dict(),
            dict(
                **_DECAY,
                betas=(0.8, 0.95),
                eps=1e-3,
                delta=1.0,
                wd_ratio=0.3,
                nesterov=True,
                maximize=True,
            ),
        ),
        matrix_launches=3,
    ),
    Row(
        "AdamMini",
        "rules",
        rules.AdamMini,
        None,
        _variants(("exp_avg",), 20, dict(), dict(**_DECAY, betas=(0.8, 0.95), eps=1e-3, maximize=True)),
        reductions=True,
        keeps_numbers=True,
        matrix_launches=1,
    ),
    Row(
        "AdamWScheduleFree",
        "rules",
        rules.AdamWScheduleFree,
        "pytorch_optimizer.ScheduleFreeAdamW",
        _variants(
            ("exp_avg_sq", "z"),
            28,
            dict(),
            dict(**_DECAY, betas=(0.95, 0.9), warmup_steps=5, r=1.0, weight_lr_power=1.0),
        ),
        swaps=True,
    ),
    Row(
        "Adan",
        "rules",
        rules.Adan,
        "pytorch_optimizer.Adan",
        _variants(
            (*_EXP, "exp_avg_diff", "previous_grad"),
            44,
            dict(),
            dict(**_DECAY, betas=(0.9, 0.8, 0.95)),
            dict(**_DECAY, eps=1e-3, no_prox=True, maximize=True),
        ),
    ),
    Row(
        "AdEMAMix",
        "rules",
        rules.AdEMAMix,
        "pytorch_optimizer.AdEMAMix",
        _variants(
            (*_EXP, "exp_avg_slow"),
            36,
            dict(),
            dict(**_DECAY, betas=(0.8, 0.95, 0.99), alpha=5.0, eps=1e-3),
            dict(lr=0.01, betas=(0.9, 0.99, 0.999), beta3_warmup=20, alpha_warmup=30),
        ),
    ),
    Row(
        "ADOPT",
        "rules",
        rules.ADOPT,
        "pytorch_optimizer.ADOPT",
        _variants(
            _EXP,
            28,
            dict(),
            dict(**_DECAY, betas=(0.8, 0.95), eps=1e-3),
            dict(**_DECAY, decouple=True, clip_exp=0.5, maximize=True),
        ),
        rests_first=True,
    ),
    Row(
        "CAME",
        "rules",
        rules.CAME,
        "pytorch_optimizer.CAME",
        _variants(("exp_avg",), 36, dict(), dict(**_DECAY, betas=(0.8, 0.95, 0.99), clip_threshold=0.5)),
        reductions=True,
        matrix_launches=7,
    ),
    Row(
        "Cautious",
        "rules",
        _cautious_adamw,
        None,
        _variants(_EXP, 44, dict(), dict(**_DECAY, betas=(0.7, 0.95), maximize=True)),
        reductions=True,
    ),
    Row(
        "Centralize",
        "rules",
        _centralized_adamw,
        None,
        _variants(_EXP, 28, dict(), dict(**_DECAY, betas=(0.7, 0.95), maximize=True)),
        matrix_launches=1,
    ),
    Row(
        "DAdaptAdam",
        "rules",
        rules.DAdaptAdam,
        "pytorch_optimizer.DAdaptAdam",
        _variants(
            (*_EXP, "s"),
            52,
            dict(),
            dict(d0=1e-2, weight_decay=0.1, betas=(0.8, 0.95), growth_rate=1.2, use_bias_correction=True),
            first=True,
        )
        + _variants(
            (*_EXP, "s"),
            48,
            dict(lr=0.5, d0=1e-2, weight_decay=0.1, growth_rate=1.05, decouple=True, maximize=True),
            first=True,
        ),
        keeps_numbers=True,
        totals=True,
    ),
    Row(
        "DoG",
        "rules",
        rules.DoG,
        None,
        _variants(
            ("init_buffer",), 24, dict(), dict(lr=0.5, reps_rel=1e-2, weight_decay=0.1, eps=1e-3), first=True
        ),
        keeps_numbers=True,
        totals=True,
    ),
    Row(
        "GrokFast",
        "rules",
        _grokfast_adamw,
        None,
        _variants((*_EXP, "grok_avg"), 36, dict(), dict(**_DECAY, alpha=0.9, lamb=3.0)),
    ),
    Row(
        "LaProp",
        "rules",
        rules.LaProp,
        "pytorch_optimizer.LaProp",
        _variants(_EXP, 28, dict(), dict(**_DECAY, betas=(0.8, 0.95), eps=1e-3)),
    ),
    Row(
        "LARS",
        "rules",
        rules.LARS,
        "pytorch_optimizer.LARS",
        _variants(
            _MOMENTUM,
            28,
            dict(),
            dict(lr=1.0, momentum=0.8, weight_decay=0.1, trust_coefficient=0.02, eps=1e-3, maximize=True),
        ),
        reductions=True,
    ),
    Row(
        "LDoG",
        "rules",
        rules.LDoG,
        None,
        _variants(
            ("init_buffer",), 24, dict(), dict(lr=0.5, reps_rel=1e-2, weight_decay=0.1, eps=1e-3), first=True
        ),
        reductions=True,
        keeps_numbers=True,
    ),
    Row(
        "Lion",
        "rules",
        rules.Lion,
        "pytorch_optimizer.Lion",
        _variants(("exp_avg",), 20, dict(), dict(**_DECAY, betas=(0.8, 0.95), maximize=True)),
    ),
    Row(
        "MARS",
        "rules",
        rules.MARS,
        "pytorch_optimizer.MARS",
        _variants(
            (*_EXP, "last_grad"),
            44,
            dict(optimize_1d=True),
            dict(**_DECAY, betas=(0.9, 0.95), gamma=0.1, eps=1e-3, optimize_1d=True),
        ),
        reductions=True,
    ),
    Row(
        "Muon",
        "rules",
        rules.Muon,
        "torch.optim.Muon",
        _variants(_MOMENTUM, 32, dict(), exact=False)
        + _variants(
            _MOMENTUM,
            40,
            dict(
                **_DECAY,
                momentum=0.8,
                nesterov=False,
                ns_steps=3,
                adjust_lr_fn="match_rms_adamw",
                ns_dtype=torch.float64,
                maximize=True,
            ),
        ),
        matrix_launches=2,
        calls=True,
        matrices=True,
    ),
    Row(
        "NovoGrad",
        "rules",
        rules.NovoGrad,
        "torch_optimizer.NovoGrad",
        _variants(
            ("exp_avg",),
            24,
            dict(),
            dict(lr=0.003, betas=(0.9, 0.8), weight_decay=0.1, grad_averaging=True, maximize=True),
        ),
        reductions=True,
    ),
    Row(
        "Prodigy",
        "rules",
        rules.Prodigy,
        "pytorch_optimizer.Prodigy",
        _variants(
            (*_EXP, "s", "p0"),
            52,
            dict(),
            dict(d0=1e-2, weight_decay=0.1, betas=(0.8, 0.95), d_coef=0.8, growth_rate=1.2, maximize=True),
            dict(
                lr=0.5,
                d0=1e-3,
                weight_decay=0.1,
                beta3=0.9,
                decouple=False,
                use_bias_correction=True,
                safeguard_warmup=True,
            ),
            first=True,
        ),
        keeps_numbers=True,
        totals=True,
    ),
    Row(
        "QHM",
        "rules",
        rules.QHM,
        "torch_optimizer.QHM",
        _variants(_MOMENTUM, 20, dict(), dict(**_DECAY, momentum=0.9, nu=0.5)),
    ),
    Row(
        "SGDScheduleFree",
        "rules",
        rules.SGDScheduleFree,
        "pytorch_optimizer.ScheduleFreeSGD",
        _variants(
            ("z",), 20, dict(lr=0.1), dict(lr=0.1, weight_decay=0.1, momentum=0.8, warmup_steps=5, r=1.0)
        ),
        swaps=True,
    ),
    Row(
        "SGDP",
        "rules",
        rules.SGDP,
        "torch_optimizer.SGDP",
        _variants(
            _MOMENTUM,
            32,
            dict(),
            dict(
                **_DECAY,
                momentum=0.9,
                dampening=0.5,
                delta=1.0,
                wd_ratio=0.3,
                nesterov=True,
                maximize=True,
            ),
        ),
        matrix_launches=3,
    ),
    Row(
        "Shampoo",
        "rules",
        rules.Shampoo,
        "pytorch_optimizer.Shampoo",
        _variants((), 20, dict(), exact=False)
        + _variants(
            _MOMENTUM,
            32,
            dict(
                **_DECAY,
                momentum=0.9,
                preconditioning_compute_steps=4,
                matrix_eps=0.5,
                max_matrix_size=32,
                maximize=True,
            ),
        ),
        matrix_launches=2,
        calls=True,
    ),
    Row(
        "Signum",
        "rules",
        rules.Signum,
        "pytorch_optimizer.Tiger",
        _variants(_MOMENTUM, 20, dict(), dict(**_DECAY, momentum=0.0)),
    ),
    Row(
        "SM3",
        "rules",
        rules.SM3,
        "pytorch_optimizer.SM3",
        _variants((), 16, dict())
        + _variants(("momentum_buffer",), 24, dict(lr=0.01, momentum=0.9, beta=0.9, eps=1e-8, maximize=True)),
        matrix_launches=4,
    ),
    Row(
        "SOAP",
        "rules",
        rules.SOAP,
        "pytorch_optimizer.SOAP",
        _variants(_EXP, 68, dict(), exact=False)
        + _variants(
            _EXP,
            68,
            dict(
                **_DECAY,
                betas=(0.8, 0.9),
                shampoo_beta=0.95,
                precondition_frequency=3,
                max_precond_dim=4,
                normalize_grads=True,
                maximize=True,
            ),
        ),
        matrix_launches=3,
        calls=True,
        rests_first=True,
    ),
    Row(
        "SophiaG", "rules", rules.SophiaG, None, _variants(("exp_avg", "hessian"), 24, dict(), dict(rho=0.1))
    ),
    Row(
        "StableAdamW",
        "rules",
        rules.StableAdamW,
        "pytorch_optimizer.StableAdamW",
        _variants(_EXP, 36, dict(), dict(**_DECAY, betas=(0.8, 0.95), eps=1e-3)),
        reductions=True,
    ),
    Row(
        "Tiger",
        "rules",
        rules.Tiger,
        "pytorch_optimizer.Tiger",
        _variants(("exp_avg",), 20, dict(), dict(**_DECAY, beta=0.8)),
    ),
    Row(
        "Yogi",
        "rules",
        rules.Yogi,
        "torch_optimizer.Yogi",
        _variants(
            _EXP, 28, dict(), dict(**_DECAY, betas=(0.8, 0.95), eps=1e-2, initial_accumulator_value=0.1)
        ),
    ),
)

TABLE: tuple[Row, ...] = _FASTAI + _TORCH
"""Every named optimizer that is another library's too, fastai's face first."""

RULES: tuple[Row, ...] = _RULES
"""Every rule of `fusedopt.rules`."""


def rows(face: str | None = None, calls: bool = True) -> tuple[Row, ...]:
    """The rows of one face ('fastai', 'torch' or 'rules'), or those of all that take parameters of any shape.

    calls: also those with torch calls, whose steps are more than one program
    """
    found = (r for r in TABLE + RULES if face in (None, r.face) and (calls or not r.calls))
    return tuple(r for r in found if face or not r.matrices)


def row(face: str, name: str) -> Row:
    """The row of one optimizer. Raises KeyError if there is none."""
    found = [r for r in rows(face) if r.name == name]
    if not found:
        raise KeyError(f"no {face} optimizer named {name!r}")
    return found[0]
