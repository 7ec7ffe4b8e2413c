"""SM3: Adagrad whose sums of squares are bounded by one number for each index along each dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..optimizer.described import described
from ..optimizer.names import Place
from ..optimizer.torch_face import TorchFace, check_betas

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def sm3_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, eps: Any, grad_avg: Any = None, max_0: Any = None,
    max_1: Any = None, max_2: Any = None, max_3: Any = None, max_4: Any = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """SM3-II: a step over the root of the least of the bounds that an element has, one along each dimension.

    Formula: ``v = minᵢ aᵢ + g²``, or with `sqr_mom` ``v = sqr_mom·minᵢ aᵢ + (1 - sqr_mom)·g²``; ``aᵢ ← max(v)`` over
    all dimensions but the i-th, with `sqr_mom` ``aᵢ ← max(aᵢ, max(v))``; ``u = g / √(v + eps)``; with `mom`
    ``m ← mom·m + (1 - mom)·u; u ← m``; ``p ← p - lr·u``.
    Args: `lr`, `mom`, `sqr_mom` (β), `eps` (gradient units squared) numbers; `grad_avg` tensor; `max_0`, `max_1`,
    `max_2`, `max_3`, `max_4` tensors of length 1 along all dimensions but one.
    State: ``max_0``, ``max_1``, ... (aᵢ, as many as there are dimensions); ``grad_avg`` (m) with `mom`.
    Source: Anil et al., "Memory-Efficient Adaptive Optimization", arXiv:1901.11150, SM3-II.
    Deviations: `sqr_mom` is of Enealor's PyTorch-SM3; in the paper it is 0. There are bounds along the first five
    dimensions only.
    """
    grad = p.grad.data
    sqr, new = grad**2, {}
    bounds = zero_bounds(grad) if max_0 is None else [max_0, max_1, max_2, max_3, max_4][: max(grad.dim(), 1)]
    least = bounds[0]
    for bound in bounds[1:]:
        least = torch.minimum(least, bound)
    sqr = sqr + least if sqr_mom == 0 else sqr_mom * least + (1 - sqr_mom) * sqr
    for i, bound in enumerate(bounds):
        highest = highest_along(sqr, i)
        new[f"max_{i}"] = bound.copy_(highest if sqr_mom == 0 else torch.maximum(bound, highest))
    update = grad / (sqr + eps).sqrt()
    if mom != 0:
        new["grad_avg"] = torch.zeros_like(grad) if grad_avg is None else grad_avg
        update = new["grad_avg"].mul_(mom).add_(update, alpha=1 - mom)
    p.data.sub_(update, alpha=lr)
    return new


def highest_along(x: Any, i: Any) -> Any:
    """The maxima over all dimensions but the i-th, which stay, with length 1."""
    others = tuple(d for d in range(x.dim()) if d != i)
    return x.amax(dim=others, keepdim=True) if others else x


def zero_bounds(x: Any) -> Any:
    """What the bounds are before the first step."""
    return [torch.zeros_like(highest_along(x, i)) for i in range(min(max(x.dim(), 1), 5))]


sm3_step.defaults = dict(mom=0.0, sqr_mom=0.0, eps=1e-30)


@described(sm3_step)
class SM3(TorchFace):
    """SM3: see `sm3_step`.

    Args: `beta`: weight of the old bounds in the new ones, in [0, 1); 0: the paper's, which only grow.
    State: ``accumulator_0``, ``accumulator_1``, ...; with `momentum` ``momentum_buffer``.
    """

    state_names: ClassVar[dict[str, str]] = {
        "grad_avg": "momentum_buffer",
        **{f"max_{i}": f"accumulator_{i}" for i in range(5)},
    }
    hyper_names: ClassVar[dict[str, Place]] = {"mom": "momentum", "sqr_mom": "beta"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float = 0.0,
        beta: float = 0.0,
        eps: float = 1e-30,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        check_betas((beta,), 1)
        self._start([callbacks.maximize_grad, sm3_step], locals())
