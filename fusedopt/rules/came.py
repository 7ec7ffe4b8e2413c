"""CAME: Adafactor with momentum, that steps less where its update differs from the momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..optimizer.described import described
from ..optimizer.names import Place
from ..optimizer.torch_face import TorchFace
from .adafactor import check_pair
from .factored import inverse_root_factored, rms

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def came_step(
    p: Any, lr: Any, mom: Any, sqr_mom: Any, res_mom: Any, eps1: Any, eps2: Any, clip_threshold: Any, wd: Any,
    do_wd: bool = True, grad_avg: Any = None, sqr_row: Any = None, sqr_col: Any = None, sqr_avg: Any = None,
    res_row: Any = None, res_col: Any = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """CAME: momentum of clipped updates, over the root of their factored squared distance from it.

    Formula: ``v ← sqr_mom·v + (1 - sqr_mom)·(g² + eps1)``, of a parameter with two or more dimensions by rows and
    columns (`factored.inverse_root_factored`); ``u = g / √v``; ``u ← u / max(1, rms(u) / clip_threshold)``;
    ``m ← mom·m + (1 - mom)·u``; ``s ← res_mom·s + (1 - res_mom)·((u - m)² + eps2)``, by rows and columns;
    ``p ← p·(1 - lr·wd) - lr·m / √s``; vectors have no s, and move by ``lr·m``.
    Args: `lr`, `mom`, `sqr_mom`, `res_mom` (β₃), `eps1` (gradient units squared), `eps2`, `clip_threshold`, `wd`
    numbers; `do_wd` per-parameter flag; `grad_avg`, `sqr_avg` tensors, `sqr_row`, `sqr_col`, `res_row`, `res_col`
    tensors without the last and without the next to last dimension.
    State: ``grad_avg`` (m), ``sqr_row``, ``sqr_col``, or ``sqr_avg`` for vectors (v), ``res_row``, ``res_col`` (s);
    reads the flag ``do_wd``.
    Source: Luo et al., "CAME: Confidence-guided Adaptive Memory Efficient Optimization", arXiv:2307.02047, algorithm 2,
    in the form of its authors' code.
    Deviations: none from the code.
    """
    grad, new = p.grad.data, {}
    sqr, factored = grad**2 + eps1, grad.dim() >= 2
    if factored:
        scale, new["sqr_row"], new["sqr_col"] = inverse_root_factored(sqr, 1 - sqr_mom, sqr_row, sqr_col)
    else:
        new["sqr_avg"] = torch.zeros_like(grad) if sqr_avg is None else sqr_avg
        scale = new["sqr_avg"].mul_(sqr_mom).add_(sqr, alpha=1 - sqr_mom).rsqrt()
    update = grad * scale
    update = update / (rms(update) / clip_threshold).clamp(min=1)
    new["grad_avg"] = torch.zeros_like(grad) if grad_avg is None else grad_avg
    new["grad_avg"].mul_(mom).add_(update, alpha=1 - mom)
    if do_wd and wd != 0:
        p.data.mul_(1 - lr * wd)
    if factored:
        res = (update - new["grad_avg"]) ** 2 + eps2
        scale, new["res_row"], new["res_col"] = inverse_root_factored(res, 1 - res_mom, res_row, res_col)
        p.data.sub_(new["grad_avg"] * scale, alpha=lr)
    else:
        p.data.sub_(new["grad_avg"], alpha=lr)
    return new


came_step.defaults = dict(
    mom=0.9, sqr_mom=0.999, res_mom=0.9999, eps1=1e-30, eps2=1e-16, clip_threshold=1.0, wd=0.0
)


@described(came_step)
class CAME(TorchFace):
    """CAME: see `came_step`.

    Args: the authors' code has no default for `lr`; the paper's runs have up to 2e-4. `eps`: what is added to squared
    gradients, and to squared distances of updates; `clip_threshold`: the root mean square above which an update is
    scaled down; `betas`: of updates, of squared gradients, of squared distances, each in [0, 1).
    State: ``exp_avg``, ``exp_avg_sq_row``, ``exp_avg_sq_col``, ``exp_avg_res_row``, ``exp_avg_res_col``; for vectors
    ``exp_avg`` and ``exp_avg_sq``.
    """

    state_names: ClassVar[dict[str, str]] = {
        "grad_avg": "exp_avg",
        "sqr_row": "exp_avg_sq_row",
        "sqr_col": "exp_avg_sq_col",
        "sqr_avg": "exp_avg_sq",
        "res_row": "exp_avg_res_row",
        "res_col": "exp_avg_res_col",
    }
    hyper_names: ClassVar[dict[str, Place]] = {
        "mom": ("betas", 0),
        "sqr_mom": ("betas", 1),
        "res_mom": ("betas", 2),
        "eps1": ("eps", 0),
        "eps2": ("eps", 1),
    }
    _betas = 3
    _not_negative = ("clip_threshold",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-4,
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        check_pair(eps)
        self._start([callbacks.maximize_grad, came_step], locals())
