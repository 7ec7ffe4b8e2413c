"""DoG: SGD whose learning rate is the distance from the start over the root of the squared gradients' sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..optimizer.described import described
from ..optimizer.torch_face import TorchFace
from ..trace.totals import total

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def dog_step(
    p: Any, lr: Any, eps: Any, reps_rel: Any, start: Any = None, farthest: Any = None, sqr_sum: Any = 0.0,
    **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """DoG: one learning rate for all, from the farthest that the parameters have been from their start.

    Formula: ``r ← max(r, √Σ(p - p₀)²)`` from ``reps_rel·(1 + √Σp₀²)``; ``G ← G + Σg²`` from zero;
    ``p ← p - lr·r / √(G + eps)·g``. Sums go over all parameters of the step.
    Args: `lr` number, 1 in the paper; `eps` (gradient units squared), `reps_rel` numbers; `start` tensor; `farthest`,
    `sqr_sum` 0-d tensors.
    State: ``start`` (p₀); ``farthest`` (r, in parameter units), ``sqr_sum`` (G), the same for all parameters.
    Source: Ivgi, Hinder & Carmon, "DoG is SGD's Best Friend: A Parameter-Free Dynamic Step Size Schedule",
    arXiv:2302.12022, and its authors' code.
    Deviations: sums go over all groups; in the code, each group has its own. ``init_eta`` and the averaging of weights
    are left out. A parameter without a gradient keeps its r and G, and goes on from there.
    """
    size = total(p.data**2).sqrt()
    if start is None:
        start, farthest = p.data.clone(), reps_rel * (1 + size)
    distance = total((p.data - start) ** 2).sqrt()
    farthest = torch.where(distance > farthest, distance, farthest)
    sqr_sum = sqr_sum + total(p.grad.data**2)
    p.data.sub_(p.grad.data * (lr * farthest / (sqr_sum + eps).sqrt()))
    return {"start": start, "farthest": farthest, "sqr_sum": sqr_sum}


dog_step.defaults = dict(eps=1e-8, reps_rel=1e-6)


@described(callbacks.l2_reg, dog_step)
class DoG(TorchFace):
    """DoG: see `dog_step`; leave `lr` at 1, and average the weights, e.g. by ``torch.optim.swa_utils``. Decay is L2.

    Args: `lr`: a factor; `reps_rel`: the first distance, in parts of 1 and the parameters' norm, is better 1e-4 for a
    model with batch normalization; `eps`: in gradient units squared.
    State: ``init_buffer``; ``rbar`` and ``G``.
    """

    state_names: ClassVar[dict[str, str]] = {"start": "init_buffer", "farthest": "rbar", "sqr_sum": "G"}
    _not_negative = ("reps_rel",)
    _rule = staticmethod(dog_step)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        reps_rel: float = 1e-6,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        self._start([callbacks.maximize_grad, callbacks.l2_reg, self._rule], locals())
