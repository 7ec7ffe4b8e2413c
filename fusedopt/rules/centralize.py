"""Gradient centralization: any rule, on gradients whose rows have a mean of zero."""

from __future__ import annotations

from typing import Any

from ..optimizer import Optimizer
from ..optimizer.described import described


def centralize(p: Any, **kwargs: Any) -> None:
    """Subtract from the gradient of each output row its mean.

    Formula: ``g ← g - mean(g)`` over all dimensions but the first; vectors stay as they are.
    Args: none besides `p`.
    State: none.
    Source: Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural Networks",
    arXiv:2004.01461, equation 1.
    Deviations: the user's ``p.grad`` stays as it was; the callbacks behind this one see the other. An L2 penalty that a
    later callback adds is not centralized, in the authors' SGD it is.
    """
    grad = p.grad.data
    if grad.dim() >= 2:
        grad.sub_(grad.mean(dim=tuple(range(1, grad.dim())), keepdim=True))


@described(centralize)
def Centralize(opt: Optimizer) -> Optimizer:
    """Centralize the gradients before all callbacks of `opt`, and return `opt`: ``Centralize(optim.SGD(params, 0.1))``.

    Args: `opt`, any optimizer of fusedopt. See `centralize`.
    Raises: TypeError for an optimizer of another library; ValueError for one that does it already.
    """
    if not isinstance(opt, Optimizer):
        raise TypeError(f"Centralize changes an Optimizer of fusedopt, and this is a {type(opt).__name__}")
    if centralize in opt.cbs:
        raise ValueError("this optimizer centralizes gradients already")
    opt.cbs = [centralize, *opt.cbs]
    opt.title = f"Centralize_{opt.title or type(opt).__name__}"
    return opt
