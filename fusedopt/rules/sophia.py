"""Sophia: a step that is clipped, element by element, by an estimate of the curvature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..optimizer.described import described
from ..optimizer.torch_face import TorchFace
from .parts import dampened

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def sophia_step(
    p: Any, lr: Any, rho: Any, bs: Any, grad_avg: Any, hessian: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """Sophia: momentum over the diagonal of the Hessian, clipped to 1.

    Formula: ``p ← p - lr·sign(m)·min(|m| / (rho·bs·h + 1e-15), 1)``; h starts at zero, where every step is clipped.
    Args: `lr`, `rho` numbers; `bs` number of samples (tokens) that a batch's mean loss is of; `grad_avg` (dampened),
    `hessian` tensors.
    State: ``hessian`` (h, gradient units squared; `SophiaG.update_hessian` writes it); reads ``grad_avg``.
    Source: Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training",
    arXiv:2305.14342, algorithm 3, in the form of its authors' code.
    Deviations: `bs` is a hyperparameter; the code takes it with each step.
    """
    if hessian is None:
        hessian = torch.zeros_like(p.grad.data)
    ratio = (grad_avg.abs() / (hessian * (rho * bs)).add_(1e-15)).clamp_(max=1)
    p.data.sub_(grad_avg.sign() * ratio, alpha=lr)
    return {"hessian": hessian}


sophia_step.defaults = dict(rho=0.04, bs=5120)


@described(callbacks.weight_decay, dampened, sophia_step)
class SophiaG(TorchFace):
    """Sophia with the Gauss-Newton-Bartlett estimate: see `sophia_step`. Decay is decoupled.

    Every tenth step or so, call `update_hessian` with the gradients of a loss whose labels were drawn from the model.

    Args: `rho`: the larger, the fewer elements are clipped; `bs`: how many samples (tokens) a batch's mean loss is of.
    State: ``exp_avg``, ``hessian``.
    """

    state_names: ClassVar[dict[str, str]] = {"grad_avg": "exp_avg"}
    _not_negative = ("rho", "bs")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 1e-1,
        *,
        bs: int = 5120,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        self._start([callbacks.maximize_grad, callbacks.weight_decay, dampened, sophia_step], locals())

    @torch.no_grad()
    def update_hessian(self) -> None:
        """Take the gradients that the parameters have now into the estimate of the Hessian.

        Formula: ``h ← β₂·h + (1 - β₂)·g²``; the factor `bs` of the paper's estimate is in the step.
        Zero the gradients afterwards. This is a few operations of torch for each list of parameters, no kernel.
        """
        for group in self.param_groups:
            found = [p for p in group["params"] if p.grad is not None]
            for p in found:
                if "hessian" not in self.state[p]:
                    self.state[p]["hessian"] = torch.zeros_like(p, dtype=self.state_dtype)
            hessians = [self.state[p]["hessian"] for p in found]
            if found:
                grads: list[Tensor] = [p.grad.to(h.dtype) for p, h in zip(found, hessians, strict=True)]
                torch._foreach_mul_(hessians, group["betas"][1])
                torch._foreach_addcmul_(hessians, grads, grads, value=1 - group["betas"][1])
