"""Muon: momentum whose steps are made orthogonal, by a few matrix products."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..optimizer.described import described
from ..optimizer.names import MOMENTUM
from ..optimizer.torch_face import TorchFace

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions

COEFFICIENTS = 3.4445, -4.7750, 2.0315


def newton_schulz(x: Tensor, steps: int, coefficients: tuple[float, float, float], eps: float) -> Tensor:
    """A matrix with about the singular vectors of x, and singular values near 1 (from 0.7 to 1.2).

    Formula: ``X ← X / max(‖X‖, eps)``; ``steps`` times ``A = X·Xᵀ``, ``X ← a·X + (b·A + c·A²)·X``.
    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    if tall:  # the shorter side is that of A
        x = x.mT
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon_step(
    p: Any, lr: Any, mom: Any, wd: Any, eps: Any, ns_steps: Any, ns_coefficients: Any, nesterov: bool = True,
    adjust_lr_fn: Any = None, ns_dtype: Any = torch.bfloat16, do_wd: bool = True, grad_avg: Any = None,
    **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """Muon: momentum, made orthogonal by Newton-Schulz iterations.

    Formula: ``m ← mom·m + (1 - mom)·g`` from zero; ``u = mom·m + (1 - mom)·g`` with nesterov, else m;
    ``O`` is u made orthogonal (`newton_schulz`); ``p ← (1 - lr·wd)·p - lr·r·O``, where r is ``√max(1, rows/columns)``,
    or with `adjust_lr_fn` "match_rms_adamw" ``0.2·√max(rows, columns)``.
    Args: `lr`, `mom`, `wd`, `eps` numbers; `ns_steps` how many iterations; `ns_coefficients` three numbers; `nesterov`,
    `do_wd` flags; `ns_dtype` the type of the matrix products; `grad_avg` tensor.
    State: ``grad_avg`` (m, gradient units).
    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the other r is
    of Liu et al., "Muon is Scalable for LLM Training", arXiv:2502.16982. As in ``torch.optim.Muon``.
    Deviations: a parameter of more than two dimensions is a matrix of its first dimension and all others. Where the
    parameter has `ns_dtype` itself, matrix products are in the type that callbacks compute in, float32.
    """
    grad = p.grad.data
    if grad_avg is None:
        grad_avg = torch.zeros_like(grad)
    grad_avg.lerp_(grad, 1 - mom)
    update = grad.lerp(grad_avg, mom) if nesterov else grad_avg
    rows, columns = p.shape[0], math.prod(p.shape[1:])
    matrix = update.reshape(rows, columns).to(ns_dtype)
    orthogonal = newton_schulz(matrix, ns_steps, ns_coefficients, eps).reshape(p.shape)
    ratio = 1.0
    if adjust_lr_fn is None or adjust_lr_fn == "original":
        ratio = math.sqrt(max(1, rows / columns))
    elif adjust_lr_fn == "match_rms_adamw":
        ratio = 0.2 * math.sqrt(max(rows, columns))
    if do_wd:
        p.data.mul_(1 - lr * wd)
    p.data.add_(orthogonal, alpha=-lr * ratio)
    return {"grad_avg": grad_avg}


muon_step.defaults = dict(mom=0.95, wd=0.1, eps=1e-7, ns_steps=5, ns_coefficients=COEFFICIENTS)


@described(muon_step)
class Muon(TorchFace):
    """Muon for the matrices of hidden layers: see `muon_step`. All else is better put into another optimizer.

    Args: as of ``torch.optim.Muon``: `nesterov`: whether to look ahead along the momentum; `ns_coefficients`: a, b and
    c of `ns_steps` Newton-Schulz iterations; `adjust_lr_fn`: "original" (None) or "match_rms_adamw", how the step's
    size goes by the matrix's. `ns_dtype` is the type of the matrix products.
    State: ``momentum_buffer``.
    Raises: ValueError: a parameter that is no matrix, another `adjust_lr_fn`.
    """

    state_names: ClassVar[dict[str, str]] = MOMENTUM
    _not_negative = ("ns_steps",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: torch.dtype = torch.bfloat16,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
            raise ValueError(f"Adjust learning rate function {adjust_lr_fn} is not supported")
        self._start([callbacks.maximize_grad, muon_step], locals())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `Optimizer.add_param_group`. Raises ValueError if a parameter of ``param_group`` is no matrix."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.ndim < 2:
                raise ValueError(
                    f"Muon only supports parameters of two or more dimensions, and one has the shape {tuple(p.shape)}: "
                    "put it into another optimizer, e.g. fusedopt.optim.AdamW"
                )
