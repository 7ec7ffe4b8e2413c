"""Each rule once more, as its paper has it: a loop over the steps of one parameter, in plain torch.

``paper(p, grads, **arguments)`` steps ``p`` in place and yields after each step. Arguments and defaults are those of
the authors' code, written down here a second time. ``schedule(t)`` is what the learning rate is multiplied by in step
t. Nothing of fusedopt is used. Where sums go over all parameters (``JOINT``), ``p`` is a list of these, and ``grads``
has lists.
"""

import math
from collections.abc import Callable, Iterator

import parameter_free
import torch
from torch import Tensor

Schedule = Callable[[int], float]
Steps = Iterator[None]


def constant(t: int) -> float:
    return 1.0


def adabelief(
    p, grads, lr=1e-3, betas=(0.9, 0.999), eps=1e-16, weight_decay=0.0, rectify=True, schedule=constant
) -> Steps:
    """arXiv:2010.07468, algorithm 2; rectified as in the authors' package 0.2.0."""
    b1, b2 = betas
    m, s = torch.zeros_like(p), torch.zeros_like(p)
    longest = 2 / (1 - b2) - 1
    for t, g in enumerate(grads, 1):
        rate = lr * schedule(t)
        p.mul_(1 - rate * weight_decay)
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) ** 2 + eps
        if not rectify:
            m_hat, s_hat = m / (1 - b1**t), s / (1 - b2**t)
            p.sub_(rate * m_hat / (s_hat.sqrt() + eps))
        else:
            length = longest - 2 * t * b2**t / (1 - b2**t)
            if length >= 5:
                factor = (
                    (1 - b2**t)
                    * (length - 4)
                    / (longest - 4)
                    * (length - 2)
                    / length
                    * longest
                    / (longest - 2)
                )
                p.sub_(rate * math.sqrt(factor) / (1 - b1**t) * m / (s.sqrt() + eps))
            else:
                p.sub_(rate / (1 - b1**t) * m)
        yield


def adabound(
    p,
    grads,
    lr=1e-3,
    betas=(0.9, 0.999),
    final_lr=0.1,
    gamma=1e-3,
    eps=1e-8,
    weight_decay=0.0,
    schedule=constant,
) -> Steps:
    """arXiv:1902.09843, algorithm 2, in the form of the authors' code."""
    b1, b2 = betas
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        g = g + weight_decay * p
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        final = final_lr * schedule(t)
        rates = lr * schedule(t) * math.sqrt(1 - b2**t) / (1 - b1**t) / (v.sqrt() + eps)
        rates = torch.clamp(rates, final * (1 - 1 / (gamma * t + 1)), final * (1 + 1 / (gamma * t)))
        p.sub_(rates * m)
        yield


def factored(sqr, weight, row, col):
    """Row and column averages, and of these the inverse root of what they stand for: arXiv:1804.04235, algorithm 4."""
    row = (1 - weight) * row + weight * sqr.mean(-1)
    col = (1 - weight) * col + weight * sqr.mean(-2)
    whole = row[..., :, None] * col[..., None, :] / row.mean(-1)[..., None, None]
    return row, col, 1 / whole.sqrt()


def size(x) -> float:
    """The root of the mean square."""
    return x.square().mean().sqrt().item()


def adafactor(
    p,
    grads,
    lr=None,
    eps=(1e-30, 1e-3),
    clip_threshold=1.0,
    decay_rate=-0.8,
    beta1=None,
    weight_decay=0.0,
    scale_parameter=True,
    relative_step=True,
    warmup_init=False,
    schedule=constant,
) -> Steps:
    """arXiv:1804.04235, algorithms 4 and 5, as in transformers."""
    row = torch.zeros_like(p[..., 0]) if p.ndim > 1 else None
    col = torch.zeros_like(p[..., 0, :]) if p.ndim > 1 else None
    v, m = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        rate = lr
        if relative_step:
            rate = min(1e-6 * t if warmup_init else 1e-2, 1 / math.sqrt(t))
        rate *= schedule(t)
        if scale_parameter:
            rate *= max(eps[1], size(p))
        weight = t**decay_rate
        sqr = g * g + eps[0]
        if p.ndim > 1:
            row, col, scale = factored(sqr, weight, row, col)
        else:
            v = (1 - weight) * v + weight * sqr
            scale = 1 / v.sqrt()
        u = g * scale
        u = u / max(1.0, size(u) / clip_threshold) * rate
        if beta1 is not None:
            m = beta1 * m + (1 - beta1) * u
            u = m
        p.copy_(p - weight_decay * rate * p - u)
        yield


def adam_mini(p, grads, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, schedule=constant) -> Steps:
    """arXiv:2406.16793, algorithm 1, with a block for each row; all of a vector is one."""
    b1, b2 = betas
    blocks = p.shape[0] if p.ndim > 1 else 1
    m, v = torch.zeros_like(p).reshape(blocks, -1), torch.zeros(blocks, 1, dtype=p.dtype)
    for t, g in enumerate(grads, 1):
        rate, g = lr * schedule(t), g.reshape(blocks, -1)
        p.mul_(1 - rate * weight_decay)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g.square().mean(1, keepdim=True)
        u = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps)
        p.sub_(rate * u.reshape(p.shape))
        yield


def without_radial(u, g, p, delta, wd_ratio, eps):
    """arXiv:2006.08217, equations 5 and 12: the projection for rows, or else for all, and the factor of the decay."""
    if p.ndim > 1:
        for rows in (len(p), 1):
            each = list(zip(p.reshape(rows, -1), g.reshape(rows, -1), u.reshape(rows, -1), strict=True))
            cosines = [abs(w.dot(d)) / (w.norm() + eps) / (d.norm() + eps) for w, d, _ in each]
            if max(cosines) < delta / math.sqrt(p.numel() / rows):
                units = [w / (w.norm() + eps) for w, _, _ in each]
                left = [x - n * n.dot(x) for n, (_, _, x) in zip(units, each, strict=True)]
                return torch.stack(left).reshape(p.shape), wd_ratio
    return u, 1.0


def adamp(
    p,
    grads,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    delta=0.1,
    wd_ratio=0.1,
    nesterov=False,
    schedule=constant,
) -> Steps:
    """arXiv:2006.08217, algorithm 2, as in the authors' code."""
    b1, b2 = betas
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        rate = lr * schedule(t)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        u = (b1 * m + (1 - b1) * g if nesterov else m) / (v.sqrt() / math.sqrt(1 - b2**t) + eps)
        u, ratio = without_radial(u, g, p, delta, wd_ratio, eps)
        p.mul_(1 - rate * weight_decay * ratio)
        p.sub_(rate / (1 - b1**t) * u)
        yield


def sgdp(
    p,
    grads,
    lr=1e-1,
    momentum=0.0,
    dampening=0.0,
    eps=1e-8,
    weight_decay=0.0,
    delta=0.1,
    wd_ratio=0.1,
    nesterov=False,
    schedule=constant,
) -> Steps:
    """arXiv:2006.08217, algorithm 1, as in the authors' code."""
    m = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        rate = lr * schedule(t)
        m = momentum * m + (1 - dampening) * g
        u, ratio = without_radial(g + momentum * m if nesterov else m, g, p, delta, wd_ratio, eps)
        p.mul_(1 - rate * weight_decay * ratio / (1 - momentum))
        p.sub_(rate * u)
        yield


def came(
    p,
    grads,
    lr=2e-4,
    eps=(1e-30, 1e-16),
    clip_threshold=1.0,
    betas=(0.9, 0.999, 0.9999),
    weight_decay=0.0,
    schedule=constant,
) -> Steps:
    """arXiv:2307.02047, algorithm 2, as in the authors' code."""
    b1, b2, b3 = betas
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    if p.ndim > 1:
        row, col = torch.zeros_like(p[..., 0]), torch.zeros_like(p[..., 0, :])
        res_row, res_col = torch.zeros_like(row), torch.zeros_like(col)
    for t, g in enumerate(grads, 1):
        rate, sqr = lr * schedule(t), g * g + eps[0]
        if p.ndim > 1:
            row, col, scale = factored(sqr, 1 - b2, row, col)
        else:
            v = b2 * v + (1 - b2) * sqr
            scale = 1 / v.sqrt()
        u = g * scale
        u = u / max(1.0, size(u) / clip_threshold)
        m = b1 * m + (1 - b1) * u
        step = m
        if p.ndim > 1:
            res_row, res_col, scale = factored((u - m) ** 2 + eps[1], 1 - b3, res_row, res_col)
            step = m * scale
        p.copy_(p - weight_decay * rate * p - rate * step)
        yield


def adamw(p, grads, lr, betas, eps, weight_decay, schedule, changed) -> Steps:
    """AdamW, arXiv:1711.05101, algorithm 2, on gradients that were changed before."""
    b1, b2 = betas
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(map(changed, grads), 1):
        rate = lr * schedule(t)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        p.mul_(1 - rate * weight_decay)
        p.sub_(rate * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps))
        yield


def centralized_adamw(
    p, grads, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, schedule=constant
) -> Steps:
    """arXiv:2004.01461, equation 1, before AdamW."""

    def centralized(g: Tensor) -> Tensor:
        rows = g.reshape(len(g), -1)
        return (rows - rows.mean(1)[:, None]).reshape(g.shape) if g.ndim > 1 else g

    yield from adamw(p, grads, lr, betas, eps, weight_decay, schedule, centralized)


def ldog(p, grads, lr=1.0, reps_rel=1e-6, weight_decay=0.0, eps=1e-8, schedule=constant) -> Steps:
    """arXiv:2302.12022, section 4.3."""
    start, farthest, squares = p.clone(), reps_rel * (1 + p.norm().item()), 0.0
    for t, g in enumerate(grads, 1):
        g = g + weight_decay * p
        farthest = max(farthest, (p - start).norm().item())
        squares += g.square().sum().item()
        p.sub_(lr * schedule(t) * farthest / math.sqrt(squares + eps) * g)
        yield


def sm3(p, grads, lr=0.1, momentum=0.0, beta=0.0, eps=1e-30, schedule=constant) -> Steps:
    """arXiv:1901.11150, SM3-II, with the averages of PyTorch-SM3."""
    bounds, m = [torch.zeros(n, dtype=p.dtype) for n in p.shape], torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        along = [b.reshape([-1 if i == d else 1 for d in range(p.ndim)]) for i, b in enumerate(bounds)]
        least = torch.stack([b.expand(p.shape) for b in along]).amin(0)
        v = least + g * g if beta == 0 else beta * least + (1 - beta) * g * g
        highest = [v.movedim(i, 0).reshape(len(b), -1).amax(1) for i, b in enumerate(bounds)]
        bounds = [torch.maximum(b, h) if beta else h for b, h in zip(bounds, highest, strict=True)]
        u = g / (v + eps).sqrt()
        if momentum:
            m = momentum * m + (1 - momentum) * u
            u = m
        p.sub_(lr * schedule(t) * u)
        yield


def adamod(
    p, grads, lr=1e-3, betas=(0.9, 0.999), beta3=0.999, eps=1e-8, weight_decay=0.0, schedule=constant
) -> Steps:
    """arXiv:1910.12249, algorithm 1, in the form of the authors' code."""
    b1, b2 = betas
    m, v, s = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        rate = lr * schedule(t)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        p.sub_(weight_decay * rate * p)
        rates = rate * math.sqrt(1 - b2**t) / (1 - b1**t) / (v.sqrt() + eps)
        s = beta3 * s + (1 - beta3) * rates
        p.sub_(torch.minimum(rates, s) * m)
        yield


def adan(
    p, grads, lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0, no_prox=False, schedule=constant
) -> Steps:
    """arXiv:2208.06677, algorithm 1, with the authors' code's corrections of biases."""
    b1, b2, b3 = betas
    m, v, n, last = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p), None
    for t, g in enumerate(grads, 1):
        rate = lr * schedule(t)
        d = torch.zeros_like(g) if last is None else g - last
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * d
        n = b3 * n + (1 - b3) * (g + b2 * d) ** 2
        denom = (n / (1 - b3**t)).sqrt() + eps
        u = (m / (1 - b1**t) + b2 * v / (1 - b2**t)) / denom
        if no_prox:
            p.copy_(p * (1 - rate * weight_decay) - rate * u)
        else:
            p.copy_((p - rate * u) / (1 + rate * weight_decay))
        last = g
        yield


def ademamix(
    p,
    grads,
    lr=1e-3,
    betas=(0.9, 0.999, 0.9999),
    alpha=2.0,
    beta3_warmup=None,
    alpha_warmup=None,
    eps=1e-8,
    weight_decay=0.0,
    schedule=constant,
) -> Steps:
    """arXiv:2409.03137, algorithm 1; schedules as in the authors' code."""
    b1, b2, b3 = betas
    m, slow, v = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)

    def half_life(beta: float) -> float:
        return math.log(0.5) / math.log(beta + 1e-8) - 1

    for t, g in enumerate(grads, 1):
        rate, a, b = lr * schedule(t), alpha, b3
        if alpha_warmup is not None and t < alpha_warmup:
            a = alpha * t / alpha_warmup
        if beta3_warmup is not None and t < beta3_warmup:
            x = t / beta3_warmup
            b = 0.5 ** (1 / ((1 - x) * half_life(b1) + x * half_life(b3) + 1))
        m = b1 * m + (1 - b1) * g
        slow = b * slow + (1 - b) * g
        v = b2 * v + (1 - b2) * g * g
        u = (m / (1 - b1**t) + a * slow) / ((v / (1 - b2**t)).sqrt() + eps)
        p.sub_(rate * (u + weight_decay * p))
        yield


def adopt(
    p,
    grads,
    lr=1e-3,
    betas=(0.9, 0.9999),
    eps=1e-6,
    clip_exp=0.25,
    weight_decay=0.0,
    decouple=False,
    schedule=constant,
) -> Steps:
    """arXiv:2411.02853, algorithm 2, with the clipping of the authors' code: its first update is bounded by 1."""
    b1, b2 = betas
    m, v = torch.zeros_like(p), None
    for t, g in enumerate(grads):
        rate = lr * schedule(t + 1)
        if not decouple:
            g = g + weight_decay * p
        if v is None:
            v = g * g
            yield
            continue
        if decouple:
            p.mul_(1 - rate * weight_decay)
        bound = t**clip_exp
        m = b1 * m + (1 - b1) * torch.clamp(g / torch.clamp(v.sqrt(), min=eps), -bound, bound)
        p.sub_(rate * m)
        v = b2 * v + (1 - b2) * g * g
        yield


def cautious_adamw(
    p, grads, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, schedule=constant
) -> Steps:
    """arXiv:2411.16085, algorithm 2 (C-AdamW), with the scale of the authors' code."""
    b1, b2 = betas
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        rate = lr * schedule(t)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        mask = (m * g > 0).to(g.dtype)
        mask = mask / max(mask.mean().item(), 1e-3)
        u = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps)
        p.copy_(p * (1 - rate * weight_decay) - rate * u * mask)
        yield


def grokfast_adamw(
    p,
    grads,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=1e-2,
    alpha=0.98,
    lamb=2.0,
    schedule=constant,
) -> Steps:
    """arXiv:2405.20233, algorithm 2, before AdamW."""
    a = None

    def amplified(g: Tensor) -> Tensor:
        nonlocal a
        a = g if a is None else alpha * a + (1 - alpha) * g
        return g + lamb * a

    yield from adamw(p, grads, lr, betas, eps, weight_decay, schedule, amplified)


def laprop(p, grads, lr=4e-4, betas=(0.9, 0.999), eps=1e-15, weight_decay=0.0, schedule=constant) -> Steps:
    """arXiv:2002.04839, algorithm 1."""
    b1, b2 = betas
    m, n = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        rate = lr * schedule(t)
        p.mul_(1 - rate * weight_decay)
        n = b2 * n + (1 - b2) * g * g
        m = b1 * m + (1 - b1) * g / ((n / (1 - b2**t)).sqrt() + eps)
        p.sub_(rate * m / (1 - b1**t))
        yield


def lars(
    p, grads, lr=0.1, momentum=0.9, weight_decay=5e-4, trust_coefficient=1e-3, eps=0.0, schedule=constant
) -> Steps:
    """arXiv:1708.03888, algorithm 1."""
    v = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        w_norm, g_norm = p.norm().item(), g.norm().item()
        local = 1.0
        if w_norm > 0 and g_norm > 0:
            local = trust_coefficient * w_norm / (g_norm + weight_decay * w_norm + eps)
        v = momentum * v + lr * schedule(t) * local * (g + weight_decay * p)
        p.sub_(v)
        yield


def lion(p, grads, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, schedule=constant) -> Steps:
    """arXiv:2302.06675, algorithm 2."""
    b1, b2 = betas
    m = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        c = b1 * m + (1 - b1) * g
        p.sub_(lr * schedule(t) * (c.sign() + weight_decay * p))
        m = b2 * m + (1 - b2) * g
        yield


def mars(
    p,
    grads,
    lr=3e-3,
    betas=(0.95, 0.99),
    eps=1e-8,
    weight_decay=0.0,
    gamma=0.025,
    optimize_1d=False,
    lr_1d=3e-3,
    betas_1d=(0.9, 0.95),
    weight_decay_1d=0.1,
    schedule=constant,
) -> Steps:
    """arXiv:2411.10438, algorithm 2 (MARS-AdamW, approximate); AdamW for vectors, as in the authors' code."""
    vector = p.ndim < 2 and not optimize_1d
    b1, b2 = betas_1d if vector else betas
    start, decay = (lr_1d, weight_decay_1d) if vector else (lr, weight_decay)
    m, v, last = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        rate, c = start * schedule(t), g
        if not vector:
            c = g + gamma * b1 / (1 - b1) * (g - last)
            if c.norm() > 1:
                c = c / c.norm()
        m = b1 * m + (1 - b1) * c
        v = b2 * v + (1 - b2) * c * c
        u = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps)
        p.sub_(rate * (u + decay * p))
        last = g
        yield


def newton_schulz(x, steps, coefficients, eps):
    """Jordan et al. 2024: the matrix whose singular values are nearly one."""
    a, b, c = coefficients
    x = x / max(x.norm().item(), eps)
    for _ in range(steps):
        # x·xᵀ and xᵀ·x have the same polynomial around them
        gram = x @ x.T
        x = a * x + b * (gram @ x) + c * (gram @ (gram @ x))
    return x


def muon(
    p,
    grads,
    lr=1e-3,
    weight_decay=0.1,
    momentum=0.95,
    nesterov=True,
    ns_coefficients=(3.4445, -4.7750, 2.0315),
    eps=1e-7,
    ns_steps=5,
    adjust_lr_fn=None,
    ns_dtype=torch.bfloat16,
    schedule=constant,
) -> Steps:
    """Jordan et al. 2024; ``adjust_lr_fn`` "match_rms_adamw" is of arXiv:2502.16982, equation 4."""
    m, rows = torch.zeros_like(p), len(p)
    columns = p.numel() // rows
    ratio = max(1.0, rows / columns) ** 0.5 if adjust_lr_fn is None else 0.2 * max(rows, columns) ** 0.5
    for t, g in enumerate(grads, 1):
        rate = lr * schedule(t)
        m = momentum * m + (1 - momentum) * g
        u = momentum * m + (1 - momentum) * g if nesterov else m
        u = newton_schulz(u.reshape(rows, columns).to(ns_dtype), ns_steps, ns_coefficients, eps)
        p.mul_(1 - rate * weight_decay)
        p.sub_(rate * ratio * u.reshape(p.shape).to(p.dtype))
        yield


def novograd(
    p, grads, lr=1e-2, betas=(0.95, 0.98), eps=1e-8, weight_decay=0.0, grad_averaging=False, schedule=constant
) -> Steps:
    """arXiv:1905.11286, algorithm 1; ``grad_averaging`` as in the authors' code."""
    b1, b2 = betas
    m, v = torch.zeros_like(p), None
    for t, g in enumerate(grads, 1):
        square = (g * g).sum()
        v = square if v is None else b2 * v + (1 - b2) * square
        u = g / (v.sqrt() + eps) + weight_decay * p
        m = b1 * m + (1 - b1 if grad_averaging else 1) * u
        p.sub_(lr * schedule(t) * m)
        yield


def qhm(p, grads, lr=1e-2, momentum=0.999, nu=0.7, weight_decay=0.0, schedule=constant) -> Steps:
    """arXiv:1810.06801, equations 3 and 4."""
    buffer = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        g = g + weight_decay * p
        buffer = momentum * buffer + (1 - momentum) * g
        p.sub_(lr * schedule(t) * ((1 - nu) * g + nu * buffer))
        yield


def schedule_free(
    p, grads, lr, momentum, weight_decay, warmup_steps, r, weight_lr_power, direction, schedule
) -> Steps:
    """arXiv:2405.15682, in terms of x, y and z, of which the parameter is y; ``direction(g, t)`` is what is stepped."""
    x, z = p.clone(), p.clone()
    total = highest = 0.0
    for t, g in enumerate(grads, 1):
        rate = lr * schedule(t) * (min(1.0, t / warmup_steps) if warmup_steps else 1.0)
        highest = max(highest, rate)
        weight = t**r * highest**weight_lr_power
        total += weight
        u = direction(g, t) + weight_decay * p
        z = z - rate * u
        x = (1 - weight / total) * x + weight / total * z
        p.copy_((1 - momentum) * z + momentum * x)
        yield


def sgd_schedule_free(
    p,
    grads,
    lr=1.0,
    momentum=0.9,
    weight_decay=0.0,
    warmup_steps=0,
    r=0.0,
    weight_lr_power=2.0,
    schedule=constant,
) -> Steps:
    yield from schedule_free(
        p, grads, lr, momentum, weight_decay, warmup_steps, r, weight_lr_power, lambda g, t: g, schedule
    )


def adamw_schedule_free(
    p,
    grads,
    lr=2.5e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    warmup_steps=0,
    r=0.0,
    weight_lr_power=2.0,
    schedule=constant,
) -> Steps:
    b1, b2 = betas
    v = torch.zeros_like(p)

    def direction(g: Tensor, t: int) -> Tensor:
        v.copy_(b2 * v + (1 - b2) * g * g)
        return g / ((v / (1 - b2**t)).sqrt() + eps)

    yield from schedule_free(
        p, grads, lr, b1, weight_decay, warmup_steps, r, weight_lr_power, direction, schedule
    )


def signum(p, grads, lr=1e-2, momentum=0.9, weight_decay=0.0, schedule=constant) -> Steps:
    """arXiv:1802.04434, algorithm 2."""
    m = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = momentum * m + (1 - momentum) * g
        p.sub_(lr * schedule(t) * (m.sign() + weight_decay * p))
        yield


def tiger(p, grads, lr=1e-3, beta=0.965, weight_decay=0.01, schedule=constant) -> Steps:
    """github.com/bojone/tiger."""
    yield from signum(p, grads, lr, beta, weight_decay, schedule)


def shampoo(
    p,
    grads,
    lr=1e-3,
    momentum=0.0,
    weight_decay=0.0,
    preconditioning_compute_steps=1,
    matrix_eps=1e-6,
    max_matrix_size=768,
    schedule=constant,
) -> Steps:
    """arXiv:1802.09568, algorithm 2; with diagonals for long dimensions, and momentum over what is preconditioned."""
    sums = [matrix_eps * torch.eye(n, dtype=p.dtype) for n in p.shape]
    roots, m = list(sums), torch.zeros_like(p)
    for t, g in enumerate(grads):
        g = g + weight_decay * p
        u = g
        for i, n in enumerate(p.shape):
            others = [d for d in range(p.ndim) if d != i]
            sums[i] = sums[i] + torch.tensordot(g, g, dims=[others, others])
            if n > max_matrix_size:
                roots[i] = sums[i].diagonal().pow(-1 / (2 * p.ndim)).diag()
            elif t % preconditioning_compute_steps == 0:
                left, values, _ = torch.linalg.svd(sums[i])
                roots[i] = left @ values.pow(-1 / (2 * p.ndim)).diag() @ left.T
            u = torch.tensordot(u, roots[i], dims=[[i], [0]]).movedim(-1, i)
        m = momentum * m + u
        p.sub_(lr * schedule(t + 1) * m)
        yield


def soap(
    p,
    grads,
    lr=3e-3,
    betas=(0.95, 0.95),
    shampoo_beta=-1,
    eps=1e-8,
    weight_decay=0.01,
    precondition_frequency=10,
    max_precond_dim=10000,
    precondition_1d=False,
    normalize_grads=False,
    correct_bias=True,
    schedule=constant,
) -> Steps:
    """arXiv:2409.11321, algorithm 3, as in the authors' code: its first step makes the bases alone."""
    b1, b2 = betas
    beta = b2 if shampoo_beta < 0 else shampoo_beta
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    sides = [i for i, n in enumerate(p.shape) if n <= max_precond_dim and (p.ndim > 1 or precondition_1d)]
    outer = {i: torch.zeros(p.shape[i], p.shape[i], dtype=p.dtype) for i in sides}
    bases: dict[int, Tensor] = {}

    def along_bases(x, back):
        for i, q in bases.items():
            x = torch.tensordot(x, q if not back else q.T, dims=[[i], [0]]).movedim(-1, i)
        return x

    for t, g in enumerate(grads):
        if t > 0:
            rate = lr * schedule(t + 1)
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * along_bases(g, False) ** 2
            u = along_bases(along_bases(m, False) / (v.sqrt() + eps), True)
            if normalize_grads:
                u = u / (1e-30 + size(u))
            eta = rate * math.sqrt(1 - b2**t) / (1 - b1**t) if correct_bias else rate
            p.sub_(eta * u)
            p.mul_(1 - rate * weight_decay)
        for i in sides:
            others = [d for d in range(p.ndim) if d != i]
            outer[i] = beta * outer[i] + (1 - beta) * torch.tensordot(g, g, dims=[others, others])
            if t == 0:
                bases[i] = torch.linalg.eigh(outer[i]).eigenvectors.flip(1)
            elif t % precondition_frequency == 0:
                ahead = outer[i] @ bases[i]
                order = torch.einsum("ab,ab->b", bases[i], ahead).sort(descending=True).indices
                v = v.movedim(i, 0)[order].movedim(0, i)
                bases[i], _ = torch.linalg.qr(ahead[:, order])
        yield


def sophia(
    p,
    grads,
    lr=1e-4,
    betas=(0.965, 0.99),
    rho=0.04,
    weight_decay=0.1,
    bs=5120,
    hessians=None,
    schedule=constant,
) -> Steps:
    """arXiv:2305.14342, algorithm 3, as in the authors' code. ``hessians``: step → gradient that enters h before it."""
    b1, b2 = betas
    m, h = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        if hessians and t in hessians:
            h = b2 * h + (1 - b2) * hessians[t] ** 2
        rate = lr * schedule(t)
        m = b1 * m + (1 - b1) * g
        p.mul_(1 - rate * weight_decay)
        p.sub_(rate * m.sign() * torch.clamp(m.abs() / (rho * bs * h + 1e-15), max=1.0))
        yield


def stable_adamw(
    p, grads, lr=1e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=1e-2, schedule=constant
) -> Steps:
    """arXiv:2304.13013, algorithm 2."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in betas)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        rms = (g * g / torch.clamp(v, min=eps * eps)).mean().sqrt().item()
        eta = lr * schedule(t) / max(1.0, rms)
        p.copy_(p - eta * weight_decay * p - eta * m / (v.sqrt() + eps))
        yield


def yogi(
    p,
    grads,
    lr=1e-2,
    betas=(0.9, 0.999),
    eps=1e-3,
    initial_accumulator_value=1e-6,
    weight_decay=0.0,
    schedule=constant,
) -> Steps:
    """Zaheer et al., NeurIPS 2018, algorithm 2, with Adam's corrections of biases."""
    b1, b2 = betas
    m, v = torch.zeros_like(p), torch.full_like(p, initial_accumulator_value)
    for t, g in enumerate(grads, 1):
        g = g + weight_decay * p
        m = b1 * m + (1 - b1) * g
        v = v - (1 - b2) * torch.sign(v - g * g) * g * g
        p.sub_(lr * schedule(t) * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps))
        yield


PAPERS = {
    "AdaBelief": adabelief,
    "AdaBound": adabound,
    "Adafactor": adafactor,
    "AdaMod": adamod,
    "AdamMini": adam_mini,
    "AdamP": adamp,
    "AdamWScheduleFree": adamw_schedule_free,
    "Adan": adan,
    "AdEMAMix": ademamix,
    "ADOPT": adopt,
    "CAME": came,
    "Cautious": cautious_adamw,
    "Centralize": centralized_adamw,
    "DAdaptAdam": parameter_free.steps_of(parameter_free.DAdaptAdam),
    "DoG": parameter_free.steps_of(parameter_free.DoG),
    "GrokFast": grokfast_adamw,
    "LaProp": laprop,
    "LARS": lars,
    "LDoG": ldog,
    "Lion": lion,
    "MARS": mars,
    "Muon": muon,
    "NovoGrad": novograd,
    "Prodigy": parameter_free.steps_of(parameter_free.Prodigy),
    "QHM": qhm,
    "SGDScheduleFree": sgd_schedule_free,
    "SGDP": sgdp,
    "Shampoo": shampoo,
    "Signum": signum,
    "SM3": sm3,
    "SOAP": soap,
    "SophiaG": sophia,
    "StableAdamW": stable_adamw,
    "Tiger": tiger,
    "Yogi": yogi,
}
"""By the names of rows in the table."""

JOINT = ("DAdaptAdam", "DoG", "Prodigy")
"""Those whose sums go over all parameters."""
