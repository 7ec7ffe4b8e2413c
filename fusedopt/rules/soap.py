"""SOAP: Adam in the eigenbases of Shampoo's preconditioners, which change slowly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..callbacks import debias
from ..optimizer.described import described
from ..optimizer.names import MOMENTS, Place
from ..optimizer.torch_face import TorchFace, check_betas, check_whole
from .sides import gram_of, sides_of, turned

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def soap_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, gram_mom: Any, eps: Any, wd: Any, frequency: Any, most: Any,
    step: Any, precondition_1d: bool = False, normalize_grads: bool = False, correct_bias: bool = True,
    do_wd: bool = True, grad_avg: Any = None, sqr_avg: Any = None, gram_0: Any = None, gram_1: Any = None,
    gram_2: Any = None, gram_3: Any = None, gram_4: Any = None, basis_0: Any = None, basis_1: Any = None,
    basis_2: Any = None, basis_3: Any = None, basis_4: Any = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """SOAP: Adam's step, made where the averages of the gradient's products with itself are about diagonal.

    Formula: for each side i ``Lᵢ ← β·Lᵢ + (1 - β)·G·Gᵀ``, G the gradient as a matrix of that side and all others, from
    zero. The first step makes ``Qᵢ``, the eigenvectors of Lᵢ, and does nothing else. Later ones, t counted from the
    second, turn by all Qᵢ: ``g' = turn(g)``; ``m ← mom·m + (1 - mom)·g``; ``v ← sqr_mom·v + (1 - sqr_mom)·g'²``;
    ``u = turn⁻¹(turn(m) / (√v + eps))``, with `normalize_grads` ``u ← u / (1e-30 + √mean(u²))``;
    ``p ← (p - η·u)·(1 - lr·wd)``, ``η = lr·√(1 - sqr_mom^t) / (1 - mom^t)`` with `correct_bias`, else lr. Then, if
    `frequency` divides t, ``Qᵢ ← QR(Lᵢ·Qᵢ)``, whose columns are first put in the order of ``diag(Qᵢᵀ·Lᵢ·Qᵢ)``,
    the largest first, as is v along that side.
    Args: `lr`, `mom`, `sqr_mom`, `gram_mom` (β; sqr_mom if below zero), `eps` (gradient units), `wd` numbers;
    `frequency` int; `most` the longest side that has a basis; `step` int; `precondition_1d` whether vectors have one,
    `normalize_grads`, `correct_bias` flags; `do_wd` per-parameter flag; `grad_avg`, `sqr_avg` tensors; `gram_0`,
    `gram_1`, `gram_2`, `gram_3`, `gram_4` and `basis_0`, `basis_1`, `basis_2`, `basis_3`, `basis_4` square matrices.
    State: ``grad_avg`` (m, gradient units), ``sqr_avg`` (v, by the bases); for each side of at most `most` ``gram_i``
    (Lᵢ, gradient units squared) and ``basis_i`` (Qᵢ); reads ``step`` and the flag ``do_wd``.
    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv:2409.11321, algorithm 3, as in its
    authors' code, of which is that nothing but the state changes in the first step.
    Deviations: from the code: dimensions are not merged, those after the fifth have no basis, and QR is in the type
    that callbacks compute in: float64 for float64.
    """
    grad = p.grad.data
    beta = sqr_mom if gram_mom < 0 else gram_mom
    if grad_avg is None:
        new = {"grad_avg": torch.zeros_like(grad), "sqr_avg": torch.zeros_like(grad)}
        for i in sides_of(grad, most, precondition_1d):
            gram = (1 - beta) * gram_of(grad, i)
            new |= {f"gram_{i}": gram, f"basis_{i}": torch.linalg.eigh(gram)[1].flip(1)}
        return new
    t = step - 1
    grams, bases = (gram_0, gram_1, gram_2, gram_3, gram_4), (basis_0, basis_1, basis_2, basis_3, basis_4)
    grad_avg.lerp_(grad, 1 - mom)
    here = turned(grad, bases)
    sqr_avg.mul_(sqr_mom).addcmul_(here, here, value=1 - sqr_mom)
    update = turned(turned(grad_avg, bases) / (sqr_avg.sqrt() + eps), bases, back=True)
    if normalize_grads:
        update = update / ((update**2).mean().sqrt() + 1e-30)
    size = debias(sqr_mom, 1 - sqr_mom, t) ** 0.5 / debias(mom, 1 - mom, t) if correct_bias else 1.0
    p.data.sub_(update, alpha=lr * size)
    if do_wd and wd != 0:
        p.data.mul_(1 - lr * wd)
    new = {"grad_avg": grad_avg}
    for i, basis in enumerate(bases):
        if basis is None:
            continue
        gram = grams[i].lerp(gram_of(grad, i), 1 - beta)
        new[f"gram_{i}"] = gram
        if frequency == 1 or t % frequency == 0:
            ahead = gram @ basis
            order = (basis * ahead).sum(0).argsort(descending=True)
            new[f"basis_{i}"] = torch.linalg.qr(ahead.index_select(1, order))[0]
            sqr_avg = sqr_avg.index_select(i, order)
    return new | {"sqr_avg": sqr_avg}


soap_step.defaults = dict(mom=0.95, sqr_mom=0.95, gram_mom=-1.0, eps=1e-8, wd=1e-2, frequency=10, most=10000)


@described(soap_step)
class SOAP(TorchFace):
    """SOAP: see `soap_step`. Vectors, unless `precondition_1d`, and sides above `max_precond_dim` have AdamW's step.

    Args: `shampoo_beta`: weight of the old products in the new averages, in [0, 1); -1: ``betas[1]``;
    `precondition_frequency`: bases are turned in every so many steps; `normalize_grads`: scale updates to a root mean
    square of 1; `correct_bias`: Adam's.
    State: ``step``, ``exp_avg``, ``exp_avg_sq``; ``gram_0``, ``basis_0``, ``gram_1``, ``basis_1``, ...
    """

    state_names: ClassVar[dict[str, str]] = MOMENTS
    hyper_names: ClassVar[dict[str, Place]] = {
        "gram_mom": "shampoo_beta",
        "frequency": "precondition_frequency",
        "most": "max_precond_dim",
    }
    _not_negative = ("max_precond_dim",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float = -1,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
        correct_bias: bool = True,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        if shampoo_beta != -1:
            check_betas((shampoo_beta,), 1, "shampoo_beta")
        check_whole(precondition_frequency=precondition_frequency)
        self._start([callbacks.maximize_grad, callbacks.step_stat, soap_step], locals())
