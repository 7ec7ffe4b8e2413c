"""Optimizers that find their learning rate by sums over all parameters, as callbacks and as plain loops in torch.

The callbacks keep what is one number for the whole model (``d``) in each parameter's state: a 0-d tensor, the same for
all of them.
"""

import math

import torch

import fusedopt


def prodigy(
    p, lr=1.0, mom=0.9, sqr_mom=0.999, eps=1e-8, wd=0.0, d0=1e-6, d_coef=1.0, growth_rate=math.inf,
    start=None, s=None, grad_avg=None, sqr_avg=None, d=None, d_max=None, d_numerator=0.0, **kwargs
):  # fmt: skip
    """Mishchenko and Defazio, Prodigy, 2023, with their package's defaults."""
    g, beta3 = p.grad.data, sqr_mom**0.5
    if start is None:
        start, d, d_max = p.data.clone(), d0, d0
        s, grad_avg, sqr_avg = (torch.zeros_like(p.data) for _ in range(3))
    dlr, scale = d * lr, d / d0
    gain = fusedopt.total((g * (start - p.data)).sum() * (scale * dlr))
    grad_avg.mul_(mom).add_(g * (d * (1 - mom)))
    sqr_avg.mul_(sqr_mom).add_(g * g * (d * d * (1 - sqr_mom)))
    s.mul_(beta3).add_(g * (scale * dlr))
    denominator = fusedopt.total(s.abs())
    d_numerator = beta3 * d_numerator + gain
    d_hat = d_coef * d_numerator / denominator
    grown = torch.where(d_hat > d, d_hat, d) if d == d0 else d
    top = torch.where(d_hat > d_max, d_hat, d_max)
    new = torch.where(top < grown * growth_rate, top, grown * growth_rate)
    moved = denominator > 0
    new, top = torch.where(moved, new, d), torch.where(moved, top, d_max)
    step = (wd * dlr) * p.data + dlr * grad_avg / (sqr_avg.sqrt() + new * eps)
    p.data.sub_(torch.where(moved, step, 0.0))
    return {
        "start": start, "s": s, "grad_avg": grad_avg, "sqr_avg": sqr_avg, "d": new, "d_max": top,
        "d_numerator": d_numerator,
    }  # fmt: skip


def dadapt_adam(
    p, lr=1.0, mom=0.9, sqr_mom=0.999, eps=1e-8, d0=1e-6, growth_rate=math.inf,
    s=None, grad_avg=None, sqr_avg=None, d=None, numerator=0.0, **kwargs
):  # fmt: skip
    """Defazio and Mishchenko, Learning-Rate-Free Learning by D-Adaptation, 2023: Adam, with their defaults."""
    g, beta3 = p.grad.data, sqr_mom**0.5
    if s is None:
        s, grad_avg, sqr_avg, d = *(torch.zeros_like(p.data) for _ in range(3)), d0
    dlr = d * lr
    gain = fusedopt.total((g * s / (sqr_avg.sqrt() + eps)).sum() * dlr)
    grad_avg.mul_(mom).add_(g * (dlr * (1 - mom)))
    sqr_avg.mul_(sqr_mom).add_(g * g * (1 - sqr_mom))
    s.mul_(beta3).add_(g * (dlr * (1 - beta3)))
    size = fusedopt.total(s.abs())
    moved = size > 0
    numerator = torch.where(moved, beta3 * numerator + (1 - beta3) * gain, numerator)
    d_hat = numerator / ((1 - beta3) * size)
    most = torch.where(d_hat < d * growth_rate, d_hat, d * growth_rate)
    new = torch.where(moved & (most > d), most, d)
    p.data.sub_(torch.where(moved, grad_avg / (sqr_avg.sqrt() + eps), 0.0))
    return {"s": s, "grad_avg": grad_avg, "sqr_avg": sqr_avg, "d": new, "numerator": numerator}


def dog(p, lr=1.0, reps_rel=1e-6, eps=1e-8, start=None, farthest=None, squares=0.0, **kwargs):
    """Ivgi, Hinder and Carmon, DoG is SGD's Best Friend, 2023."""
    size = fusedopt.total(p.data**2).sqrt()
    if start is None:
        start, farthest = p.data.clone(), reps_rel * (1 + size)
    far = fusedopt.total((p.data - start) ** 2).sqrt()
    farthest = torch.where(far > farthest, far, farthest)
    squares = squares + fusedopt.total(p.grad.data**2)
    p.data.sub_(p.grad.data * (lr * farthest / (squares + eps).sqrt()))
    return {"start": start, "farthest": farthest, "squares": squares}


class Plain:
    """A plain loop over parameters, with what the model has one of in attributes."""

    def __init__(self, params, **numbers):
        self.params, self.state = list(params), {}
        self.__dict__ |= numbers

    def live(self):
        return [p for p in self.params if p.grad is not None]

    def of(self, p, **made):
        return self.state.setdefault(p, {k: make(p).detach().clone() for k, make in made.items()})


class Prodigy(Plain):
    def __init__(self, params, lr=1.0, beta1=0.9, beta2=0.999, eps=1e-8, wd=0.0, d0=1e-6):
        super().__init__(params, lr=lr, beta1=beta1, beta2=beta2, eps=eps, wd=wd, d0=d0)
        self.d, self.d_max, self.numerator = d0, d0, 0.0

    @torch.no_grad()
    def step(self):
        beta3, d, zeros = math.sqrt(self.beta2), self.d, torch.zeros_like
        dlr, denominator = d * self.lr, 0.0
        self.numerator *= beta3
        for p in self.live():
            state, g = self.of(p, start=lambda p: p, s=zeros, m=zeros, v=zeros), p.grad
            self.numerator += (
                (d / self.d0) * dlr * torch.dot(g.flatten(), (state["start"] - p).flatten()).item()
            )
            state["m"].mul_(self.beta1).add_(g, alpha=d * (1 - self.beta1))
            state["v"].mul_(self.beta2).addcmul_(g, g, value=d * d * (1 - self.beta2))
            state["s"].mul_(beta3).add_(g, alpha=(d / self.d0) * dlr)
            denominator += state["s"].abs().sum().item()
        if denominator == 0:
            return
        d_hat = self.numerator / denominator
        d = max(d, d_hat) if d == self.d0 else d
        self.d_max = max(self.d_max, d_hat)
        self.d = min(self.d_max, math.inf)
        for p in self.live():
            state = self.state[p]
            if self.wd:
                p.add_(p, alpha=-self.wd * dlr)
            p.addcdiv_(state["m"], state["v"].sqrt().add_(self.d * self.eps), value=-dlr)


class DAdaptAdam(Plain):
    def __init__(self, params, lr=1.0, beta1=0.9, beta2=0.999, eps=1e-8, d0=1e-6):
        super().__init__(params, lr=lr, beta1=beta1, beta2=beta2, eps=eps, d=d0, numerator=0.0)

    @torch.no_grad()
    def step(self):
        beta3, zeros = math.sqrt(self.beta2), torch.zeros_like
        dlr, gain, size = self.d * self.lr, 0.0, 0.0
        for p in self.live():
            state, g = self.of(p, s=zeros, m=zeros, v=zeros), p.grad
            denominator = state["v"].sqrt().add_(self.eps)
            gain += dlr * torch.dot(g.flatten(), (state["s"] / denominator).flatten()).item()
            state["m"].mul_(self.beta1).add_(g, alpha=dlr * (1 - self.beta1))
            state["v"].mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            state["s"].mul_(beta3).add_(g, alpha=dlr * (1 - beta3))
            size += state["s"].abs().sum().item()
        if size == 0:
            return
        self.numerator = beta3 * self.numerator + (1 - beta3) * gain
        self.d = max(self.d, self.numerator / ((1 - beta3) * size))
        for p in self.live():
            state = self.state[p]
            p.addcdiv_(state["m"], state["v"].sqrt().add_(self.eps), value=-1)


class DoG(Plain):
    def __init__(self, params, lr=1.0, reps_rel=1e-6, eps=1e-8):
        super().__init__(params, lr=lr, reps_rel=reps_rel, eps=eps, farthest=None, squares=0.0)

    @torch.no_grad()
    def step(self):
        size = math.sqrt(sum((p**2).sum().item() for p in self.live()))
        if self.farthest is None:
            self.farthest = self.reps_rel * (1 + size)
        starts = [self.of(p, start=lambda p: p)["start"] for p in self.live()]
        far = math.sqrt(sum(((p - x) ** 2).sum().item() for p, x in zip(self.live(), starts, strict=True)))
        self.farthest = max(self.farthest, far)
        self.squares += sum((p.grad**2).sum().item() for p in self.live())
        for p in self.live():
            p.sub_(p.grad, alpha=self.lr * self.farthest / math.sqrt(self.squares + self.eps))


ALL = {"prodigy": (prodigy, Prodigy), "dadapt_adam": (dadapt_adam, DAdaptAdam), "dog": (dog, DoG)}
"""Each as a callback and as a plain loop."""
