"""What a user's own code looks like to type checkers, and that it runs: see tests/test_typing.py.

The checkers are asked with all they have, as fusedopt says that it is typed. ``assert_type`` holds what they know.
"""

from __future__ import annotations

import functools
import io
from typing import Any

import torch
from typing_extensions import assert_type

import fusedopt
import fusedopt.optim as optim
from fusedopt import rules, storage
from fusedopt.learner import Callback, Learner, accuracy
from fusedopt.optim import AdamW
from fusedopt.storage import functions

# -- A rule of one's own, and a policy of storage


def lion(
    p: Any, lr: float, mom: float, grad_avg: torch.Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    if grad_avg is None:
        grad_avg = torch.zeros_like(p)
    p.data.sub_(torch.sign(mom * grad_avg + (1 - mom) * p.grad), alpha=lr)
    grad_avg.mul_(mom).add_(p.grad, alpha=1 - mom)
    return {"grad_avg": grad_avg}


def dog(p: Any, lr: float, **kwargs: Any) -> None:
    p.data.sub_(p.grad / fusedopt.total(p.grad.square()).sqrt(), alpha=lr)


def clipped_adam(p: Any, max_size: float = 1.0, **kwargs: Any) -> Any:
    p.grad.data.clamp_(-max_size, max_size)
    return fusedopt.adam_step(p, **kwargs)


def slow_lion(p: Any, lr: float, **kwargs: Any) -> Any:
    return rules.lion_step(p, lr / 2, **kwargs)


class Halves(storage.Policy):
    code, rest = torch.bfloat16, (torch.bfloat16,)

    def encode(self, x: Any, noise: Any) -> Any:
        high = functions.rounded(x, torch.bfloat16)
        return high, x - high

    def decode(self, code: Any, *rest: Any) -> Any:
        return code + rest[0]


# -- Optimizers: ours, torch's by its names, of papers, and a class that there was


class Plain(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"])


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    moments = [
        functools.partial(fusedopt.average_grad, dampening=True),
        fusedopt.average_sqr_grad,
        fusedopt.step_stat,
    ]
    own = fusedopt.Optimizer(model.parameters(), [fusedopt.weight_decay, lion], lr=1e-4, mom=0.9, wd=0.1)
    adamw = AdamW(
        [{"params": list(model.parameters()), "lr": 1e-3}],
        betas=(0.9, 0.95),
        storage={"exp_avg": "halves"},
        backend="cpp",
    )
    lamb = fusedopt.Lamb(model.parameters(), lr=1e-3)
    plain = fusedopt.fuse(Plain(model.parameters()))
    made = fusedopt.fuse(Plain)
    assert_type(own, fusedopt.Optimizer)
    assert_type(adamw, AdamW)
    assert_type(lamb, fusedopt.Optimizer)
    assert_type(plain, Plain)
    return [
        own,
        adamw,
        lamb,
        plain,
        made(model.parameters(), lr=0.01),
        fusedopt.Optimizer(
            model.parameters(), [*moments, clipped_adam], lr=1e-3, mom=0.9, sqr_mom=0.99, eps=1e-5
        ),
        fusedopt.Optimizer(model.parameters(), dog, lr=1e-3),
        optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, max_grad_norm=1.0),
        fusedopt.Optimizer(model.parameters(), slow_lion, lr=1e-4, mom=0.9, sqr_mom=0.99),
        rules.Lion(model.parameters(), lr=1e-4),
        rules.Cautious(rules.Muon(model.parameters())),
        fusedopt.Lookahead(fusedopt.RAdam(model.parameters(), lr=1e-3)),
    ]


# -- Every other name is torch's own


def torchs(model: torch.nn.Module) -> None:
    lbfgs = optim.LBFGS(model.parameters(), lr=0.1)
    assert_type(lbfgs, torch.optim.LBFGS)
    base: type[torch.optim.Optimizer] = optim.Optimizer
    assert isinstance(lbfgs, base) and optim.lr_scheduler is torch.optim.lr_scheduler
    opt = optim.Adam(model.parameters())
    schedule = optim.lr_scheduler.CosineAnnealingLR(opt, T_max=10)
    assert_type(schedule, torch.optim.lr_scheduler.CosineAnnealingLR)
    averaged = optim.swa_utils.AveragedModel(model)
    assert_type(averaged, torch.optim.swa_utils.AveragedModel)


# -- Training, looking at it, and checkpoints


def train(model: torch.nn.Module, opt: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> float:
    loss = torch.nn.functional.cross_entropy(model(x), y)
    opt.zero_grad()
    torch.autograd.backward(loss)
    opt.step()
    return loss.item()


def look(opt: fusedopt.Optimizer) -> str:
    explained = opt.explain()
    assert_type(explained.launches, int)
    assert_type(opt.kernel_source(), str)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    opt.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    return f"{explained.backend}: {explained.launches} launches"


class Count(Callback):
    seen = 0

    def after_batch(self) -> None:
        self.seen += 1


def learn(model: torch.nn.Module, data: torch.utils.data.Dataset[tuple[torch.Tensor, ...]]) -> int:
    loaders = [torch.utils.data.DataLoader(data, batch_size=8)] * 2
    count = Count()
    learner = Learner(
        loaders, model, torch.nn.CrossEntropyLoss(), opt_func=fusedopt.Adam, metrics=accuracy, cbs=[count]
    )
    with learner.no_logging():
        learner.fit_one_cycle(1, lr_max=1e-3)
    return count.seen


def main() -> None:
    torch.manual_seed(0)
    storage.register("halves", Halves())
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    for index in range(12):
        model = torch.nn.Linear(4, 3, bias=False)
        opt = optimizers(model)[index]
        losses = [train(model, opt, x, y) for _ in range(5)]
        assert losses[-1] < losses[0], (opt, losses)
        print(type(opt).__name__, look(opt) if isinstance(opt, fusedopt.Optimizer) else "torch's class")
    torchs(torch.nn.Linear(4, 3))
    print(learn(torch.nn.Linear(4, 3), torch.utils.data.TensorDataset(x, y)), "batches")


if __name__ == "__main__":
    main()
