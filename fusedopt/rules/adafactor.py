"""Adafactor: Adam whose second moments of a matrix are one number for each row and column."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import callbacks
from ..optimizer.described import described
from ..optimizer.names import Place
from ..optimizer.torch_face import TorchFace, check_betas, check_numbers
from .factored import inverse_root_factored, rms

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from ..optimizer import AllOptions


def adafactor_step(
    p: Any, lr: Any, mom: Any, eps1: Any, eps2: Any, clip_threshold: Any, decay_rate: Any, wd: Any, step: Any,
    scale_parameter: bool = True, relative_step: bool = True, warmup_init: bool = False, do_wd: bool = True,
    sqr_row: Any = None, sqr_col: Any = None, sqr_avg: Any = None, grad_avg: Any = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """Adafactor: a step over the root of a factored second moment, clipped by its size and relative to the parameter.

    Formula: ``η = lr·min(1e-2, 1/√t)`` if `relative_step`, with ``1e-6·t`` for 1e-2 if `warmup_init`, else ``η = lr``;
    ``η ← η·max(eps2, rms(p))`` if `scale_parameter`; ``β = 1 - t^decay_rate``; ``v ← β·v + (1 - β)·(g² + eps1)``, of a
    parameter with two or more dimensions by rows and columns (`factored.inverse_root_factored`); ``u = g / √v``;
    ``u ← η·u / max(1, rms(u) / clip_threshold)``; unless `mom` is None, ``m ← mom·m + (1 - mom)·u; u ← m``;
    ``p ← p·(1 - η·wd) - u``.
    Args: `lr` number, a factor of 1 if `relative_step`; `mom` number or None; `eps1` (gradient units squared), `eps2`
    (parameter units), `clip_threshold`, `decay_rate` (below 0), `wd` numbers; `step` int; `scale_parameter`,
    `relative_step`, `warmup_init` flags; `do_wd` per-parameter flag; `sqr_row`, `sqr_col` tensors without the last and
    without the next to last dimension, `sqr_avg`, `grad_avg` tensors.
    State: ``sqr_row`` and ``sqr_col``, or ``sqr_avg`` for vectors (v); ``grad_avg`` (m, in parameter units); reads
    ``step`` and the flag ``do_wd``.
    Source: Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv:1804.04235,
    algorithms 4 and 5, in the form of fairseq and transformers.
    Deviations: from these: a schedule multiplies the relative step too.
    """
    grad, new = p.grad.data, {}
    if relative_step:
        lr = lr * min(1e-6 * step if warmup_init else 1e-2, step**-0.5)
    if scale_parameter:
        lr = lr * rms(p.data).clamp(min=eps2)
    sqr, weight = grad**2 + eps1, step**decay_rate
    if grad.dim() >= 2:
        scale, new["sqr_row"], new["sqr_col"] = inverse_root_factored(sqr, weight, sqr_row, sqr_col)
    else:
        new["sqr_avg"] = torch.zeros_like(grad) if sqr_avg is None else sqr_avg
        scale = new["sqr_avg"].mul_(1 - weight).add_(sqr, alpha=weight).rsqrt()
    update = grad * scale
    update = update * (lr / (rms(update) / clip_threshold).clamp(min=1))
    if mom is not None:
        new["grad_avg"] = torch.zeros_like(grad) if grad_avg is None else grad_avg
        update = new["grad_avg"].mul_(mom).add_(update, alpha=1 - mom)
    if do_wd and wd != 0:
        p.data.mul_(1 - lr * wd)
    p.data.sub_(update)
    return new


adafactor_step.defaults = dict(mom=None, eps1=1e-30, eps2=1e-3, clip_threshold=1.0, decay_rate=-0.8, wd=0.0)


@described(adafactor_step)
class Adafactor(TorchFace):
    """Adafactor: see `adafactor_step`. The interface is that of transformers, and its defaults.

    Args: `lr` has to be None with `relative_step`; the groups' ``lr`` is then 1, a factor for schedulers. `eps`: what
    is added to squared gradients, and the least size that a parameter is taken to have. `clip_threshold`: the root mean
    square above which an update is scaled down; `decay_rate`: of the second moment's weight over the steps, at most 0;
    `beta1`: of momentum in [0, 1), None: none; `scale_parameter`: steps in proportion to the parameter's size;
    `relative_step`: of ``1/√t``; `warmup_init`: these begin at 1e-6.
    State: ``step``, ``exp_avg_sq_row`` and ``exp_avg_sq_col``, for vectors ``exp_avg_sq``; with `beta1` ``exp_avg``.
    Raises: ValueError for a combination that transformers refuses.
    """

    state_names: ClassVar[dict[str, str]] = {
        "sqr_row": "exp_avg_sq_row",
        "sqr_col": "exp_avg_sq_col",
        "sqr_avg": "exp_avg_sq",
        "grad_avg": "exp_avg",
    }
    hyper_names: ClassVar[dict[str, Place]] = {"mom": "beta1", "eps1": ("eps", 0), "eps2": ("eps", 1)}
    _not_negative = ("clip_threshold",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[AllOptions],
    ) -> None:
        if lr is not None:
            check_numbers(lr=lr)
        if lr is not None and relative_step:
            raise ValueError("Cannot combine manual `lr` and `relative_step=True` options")
        if warmup_init and not relative_step:
            raise ValueError("`warmup_init=True` requires `relative_step=True`")
        if lr is None:
            if not relative_step:
                raise ValueError("lr must be a number with `relative_step=False`")
            lr = 1.0
        check_pair(eps)
        if beta1 is not None:
            check_betas((beta1,), 1)
        if not decay_rate <= 0.0:
            raise ValueError(f"Invalid decay_rate value: {decay_rate}; it must be 0 or less")
        self._start([callbacks.maximize_grad, callbacks.step_stat, adafactor_step], locals())


def check_pair(eps: tuple[float, float]) -> None:
    """Raise ValueError unless an optimizer's `eps` is two numbers of at least zero."""
    if not isinstance(eps, (tuple, list)) or len(eps) != 2:
        raise ValueError(f"Invalid epsilon value: {eps!r}; it must be two numbers")
    check_numbers(eps=eps)
