"""Adam-mini: Adam with one second moment for each output row of a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..callbacks import debias
from ..optimizer.described import described
from ..optimizer.torch_face import TorchFace
from .parts import dampened

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def adam_mini_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, eps: Any, step: Any, grad_avg: Any, row_sqr_avg: Any = None,
    **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """Adam's step with the mean square of a row in the place of each element's own.

    Formula: ``v ← sqr_mom·v + (1 - sqr_mom)·mean(g²)`` over all dimensions but the first, of a parameter with less than
    two dimensions over all of it; ``p ← p - lr·m̂ / (√v̂ + eps)``, hats as in Adam.
    Args: `lr`, `mom`, `sqr_mom`, `eps` (gradient units) numbers; `step` int; `grad_avg` (dampened) tensor;
    `row_sqr_avg` one number per row (length 1 along all dimensions but the first), or per vector.
    State: ``row_sqr_avg`` (v); reads ``grad_avg``, ``step``.
    Source: Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More", arXiv:2406.16793, with the blocks that its
    authors' code has for embeddings, values, projections and MLPs, and for norms.
    Deviations: queries' and keys' blocks are rows too; there they are heads, which names and sizes of a model tell, but
    no parameter.
    """
    sqr = p.grad.data**2
    sqr = sqr.mean(dim=tuple(range(1, sqr.dim())), keepdim=True) if sqr.dim() >= 2 else sqr.mean()
    if row_sqr_avg is None:
        row_sqr_avg = torch.zeros_like(sqr)
    row_sqr_avg = row_sqr_avg * sqr_mom + sqr * (1 - sqr_mom)
    denom = (row_sqr_avg / debias(sqr_mom, 1 - sqr_mom, step)).sqrt() + eps
    p.data.sub_(grad_avg * (lr / debias(mom, 1 - mom, step) / denom))
    return {"row_sqr_avg": row_sqr_avg}


adam_mini_step.defaults = dict(eps=1e-8, sqr_mom=0.999)


_CBS = [callbacks.maximize_grad, callbacks.weight_decay, dampened, callbacks.step_stat, adam_mini_step]


@described(callbacks.weight_decay, dampened, adam_mini_step)
class AdamMini(TorchFace):
    """Adam-mini by rows, with decoupled weight decay: see `adam_mini_step`.

    State: ``step``, ``exp_avg``, ``v_mean``.
    """

    state_names: ClassVar[dict[str, str]] = {"grad_avg": "exp_avg", "row_sqr_avg": "v_mean"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        self._start(_CBS, locals())
