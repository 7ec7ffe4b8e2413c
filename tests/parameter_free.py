"""Optimizers that find their learning rate by sums over all parameters, as plain loops in torch.

They are written from the papers, with the arguments and defaults of their authors' code.
"""

import inspect
import math

import torch

from fusedopt import rules


class Plain:
    """A plain loop over parameters, with what the model has one of in attributes."""

    def __init__(self, params, arguments):
        self.params, self.state, self.steps = list(params), {}, 0
        self.__dict__ |= {k: v for k, v in arguments.items() if k not in ("self", "params", "__class__")}

    def live(self):
        return [p for p in self.params if p.grad is not None]

    def of(self, p, **made):
        return self.state.setdefault(p, {k: make(p).detach().clone() for k, make in made.items()})

    def debiased(self):
        """Adam's corrections of both averages, as a factor of the learning rate."""
        b1, b2 = self.betas
        return math.sqrt(1 - b2**self.steps) / (1 - b1**self.steps) if self.use_bias_correction else 1.0

    def gradient(self, p):
        return p.grad if self.decouple else p.grad + self.weight_decay * p


def dot(a, b):
    return torch.dot(a.flatten(), b.flatten()).item()


class Prodigy(Plain):
    """arXiv:2306.06101, algorithm 4, in the form of prodigyopt."""

    def __init__(
        self,
        params,
        lr=1.0,
        betas=(0.9, 0.999),
        beta3=None,
        eps=1e-8,
        weight_decay=0.0,
        decouple=True,
        use_bias_correction=False,
        safeguard_warmup=False,
        d0=1e-6,
        d_coef=1.0,
        growth_rate=math.inf,
    ):
        super().__init__(params, locals())
        self.d, self.d_max, self.numerator = d0, d0, 0.0

    @torch.no_grad()
    def step(self):
        self.steps += 1
        b1, b2 = self.betas
        b3 = math.sqrt(b2) if self.beta3 is None else self.beta3
        d, zeros = self.d, torch.zeros_like
        rate, denominator = d * self.lr * self.debiased(), 0.0
        self.numerator *= b3
        for p in self.live():
            state, g = self.of(p, start=lambda p: p, s=zeros, m=zeros, v=zeros), self.gradient(p)
            self.numerator += (d / self.d0) * rate * dot(g, state["start"] - p)
            state["m"].mul_(b1).add_(g, alpha=d * (1 - b1))
            state["v"].mul_(b2).addcmul_(g, g, value=d * d * (1 - b2))
            state["s"].mul_(b3).add_(g, alpha=(d / self.d0) * (d if self.safeguard_warmup else rate))
            denominator += state["s"].abs().sum().item()
        if denominator == 0:
            return
        d_hat = self.d_coef * self.numerator / denominator
        d = max(d, d_hat) if d == self.d0 else d
        self.d_max = max(self.d_max, d_hat)
        self.d = min(self.d_max, d * self.growth_rate)
        for p in self.live():
            state = self.state[p]
            if self.decouple:
                p.mul_(1 - self.weight_decay * rate)
            p.addcdiv_(state["m"], state["v"].sqrt().add_(self.d * self.eps), value=-rate)


class DAdaptAdam(Plain):
    """arXiv:2301.07733, algorithm 5, in the form of dadaptation."""

    def __init__(
        self,
        params,
        lr=1.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        decouple=False,
        use_bias_correction=False,
        d0=1e-6,
        growth_rate=math.inf,
    ):
        super().__init__(params, locals())
        self.d, self.numerator = d0, 0.0

    @torch.no_grad()
    def step(self):
        self.steps += 1
        b1, b2 = self.betas
        b3, zeros = math.sqrt(b2), torch.zeros_like
        rate, gain, size = self.d * self.lr * self.debiased(), 0.0, 0.0
        for p in self.live():
            state, g = self.of(p, s=zeros, m=zeros, v=zeros), self.gradient(p)
            gain += rate * dot(g, state["s"] / state["v"].sqrt().add_(self.eps))
            state["m"].mul_(b1).add_(g, alpha=rate * (1 - b1))
            state["v"].mul_(b2).addcmul_(g, g, value=1 - b2)
            state["s"].mul_(b3).add_(g, alpha=rate * (1 - b3))
            size += state["s"].abs().sum().item()
        if size == 0:
            return
        self.numerator = b3 * self.numerator + (1 - b3) * gain
        d_hat = self.numerator / ((1 - b3) * size)
        self.d = max(self.d, min(d_hat, self.d * self.growth_rate))
        for p in self.live():
            state = self.state[p]
            if self.decouple:
                p.mul_(1 - self.weight_decay * rate)
            p.addcdiv_(state["m"], state["v"].sqrt().add_(self.eps), value=-1)


class DoG(Plain):
    """arXiv:2302.12022, algorithm 1, with decay as its authors' code has it."""

    def __init__(self, params, lr=1.0, reps_rel=1e-6, weight_decay=0.0, eps=1e-8):
        super().__init__(params, locals())
        self.farthest, self.squares = None, 0.0

    @torch.no_grad()
    def step(self):
        params = self.live()
        if self.farthest is None:
            size = math.sqrt(sum((p**2).sum().item() for p in params))
            self.farthest = self.reps_rel * (1 + size)
        starts = [self.of(p, start=lambda p: p)["start"] for p in params]
        far = math.sqrt(sum(((p - x) ** 2).sum().item() for p, x in zip(params, starts, strict=True)))
        self.farthest = max(self.farthest, far)
        grads = [p.grad + self.weight_decay * p for p in params]
        self.squares += sum((g**2).sum().item() for g in grads)
        for p, g in zip(params, grads, strict=True):
            p.sub_(g, alpha=self.lr * self.farthest / math.sqrt(self.squares + self.eps))


ALL = {
    "prodigy": (rules.Prodigy, Prodigy),
    "dadapt_adam": (rules.DAdaptAdam, DAdaptAdam),
    "dog": (rules.DoG, DoG),
}
"""Each as fusedopt has it, and as a plain loop."""


def steps_of(plain):
    """A plain loop in the form of tests/rules/papers.py, but over all parameters at once."""

    def paper(params, grads, *, schedule=lambda t: 1.0, **arguments):
        opt = plain(params, **arguments)
        lr = opt.lr
        for t, given in enumerate(grads, 1):
            for p, g in zip(params, given, strict=True):
                p.grad = g
            opt.lr = lr * schedule(t)
            opt.step()
            yield

    paper.__signature__ = inspect.signature(plain)
    return paper
