"""Shampoo: Adagrad with a matrix for each dimension of a weight, in the place of a number for each element."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..optimizer.described import described
from ..optimizer.names import MOMENTUM, Place
from ..optimizer.torch_face import TorchFace, check_whole
from .sides import gram_of, squares_along, turned

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def shampoo_step(
    p: Any, lr: Any, mom: Any, eps: Any, frequency: Any, most: Any, step: Any, grad_avg: Any = None,
    gram_0: Any = None, gram_1: Any = None, gram_2: Any = None, gram_3: Any = None, gram_4: Any = None,
    root_0: Any = None, root_1: Any = None, root_2: Any = None, root_3: Any = None, root_4: Any = None,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """Shampoo: the gradient, multiplied along each dimension by the inverse root of what it was there so far.

    Formula: for each of k sides i ``Lᵢ ← Lᵢ + G·Gᵀ`` from zero, G the gradient as a matrix of that side and all others;
    in the first and then every `frequency` steps ``Rᵢ ← (Lᵢ + eps·I)^(-1/2k)``; ``u`` is the gradient, multiplied by
    all Rᵢ along their sides; with `mom` ``m ← mom·m + u; u ← m``; ``p ← p - lr·u``. Of sides longer than `most` Lᵢ is
    its diagonal, and Rᵢ always that of this step.
    Args: `lr`, `mom`, `eps` (gradient units squared) numbers; `frequency` int; `most` the longest side that has a
    matrix; `step` int; `grad_avg` tensor; `gram_0`, `gram_1`, `gram_2`, `gram_3`, `gram_4` and `root_0`, `root_1`,
    `root_2`, `root_3`, `root_4` square matrices, or of a long side tensors of length 1 along all others.
    State: ``gram_i`` (Lᵢ, gradient units squared), ``root_i`` (Rᵢ); ``grad_avg`` (m) with `mom`; reads ``step``.
    Source: Gupta, Koren and Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", arXiv:1802.09568,
    algorithm 2; the diagonal is of their code.
    Deviations: dimensions after the fifth have no matrix.
    """
    grad, new, made = p.grad.data, {}, []
    update, power = grad, -0.5 / max(grad.dim(), 1)
    grams, roots = (gram_0, gram_1, gram_2, gram_3, gram_4), (root_0, root_1, root_2, root_3, root_4)
    for i in range(min(grad.dim(), len(grams))):
        whole = grad.shape[i] <= most
        gram = gram_of(grad, i) if whole else squares_along(grad, i)
        if grams[i] is not None:
            gram = grams[i] + gram
        root = roots[i] if whole else None
        if not whole:
            update = update * (gram + eps) ** power
        elif root is None or frequency == 1 or (step - 1) % frequency == 0:
            values, vectors = torch.linalg.eigh(gram)
            root = new[f"root_{i}"] = (vectors * (values.clamp(min=0) + eps) ** power) @ vectors.mT
        new[f"gram_{i}"] = gram
        made.append(root)
    update = turned(update, made)
    if mom != 0:
        new["grad_avg"] = torch.zeros_like(grad) if grad_avg is None else grad_avg
        update = new["grad_avg"].mul_(mom).add_(update)
    p.data.sub_(update, alpha=lr)
    return new


shampoo_step.defaults = dict(mom=0.0, eps=1e-6, frequency=1, most=768)


@described(callbacks.l2_reg, shampoo_step)
class Shampoo(TorchFace):
    """Shampoo: see `shampoo_step`. Weight decay is L2. The interface is pytorch-optimizer's, with `max_matrix_size` of
    the authors' code.

    Args: `preconditioning_compute_steps`: inverse roots are made anew in every so many steps; `matrix_eps`: added to a
    matrix's eigenvalues, in gradient units squared; `max_matrix_size`: the longest side that has a matrix.
    State: ``step``, ``gram_0``, ``root_0``, ``gram_1``, ``root_1``, ...; with `momentum` ``momentum_buffer``.
    """

    state_names: ClassVar[dict[str, str]] = MOMENTUM
    hyper_names: ClassVar[dict[str, Place]] = {
        "mom": "momentum",
        "eps": "matrix_eps",
        "frequency": "preconditioning_compute_steps",
        "most": "max_matrix_size",
    }
    _not_negative = ("matrix_eps", "max_matrix_size")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        preconditioning_compute_steps: int = 1,
        matrix_eps: float = 1e-6,
        max_matrix_size: int = 768,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        check_whole(preconditioning_compute_steps=preconditioning_compute_steps)
        self._start([callbacks.maximize_grad, callbacks.l2_reg, callbacks.step_stat, shampoo_step], locals())
