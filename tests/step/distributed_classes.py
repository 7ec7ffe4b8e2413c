"""What test_distributed_classes.py runs in two processes: classes that `fusedopt.fuse` has got, of DTensors."""

import contextlib
import copy
import warnings
from functools import partial

import distributed_workers as workers
import pytorch_optimizer
import torch
from distributed_workers import MODES, full, is_sharded, mesh_of, sharded_and_whole, train
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fusedopt
from fusedopt import backends

CHECKS = {}
check = workers.registering(CHECKS)


def main(rank, world, folder):
    workers.main(rank, world, folder, CHECKS)


class Lion(torch.optim.Optimizer):
    """With a count of its own, and what depends on shapes."""

    def __init__(self, params, lr=0.1, betas=(0.9, 0.99), weight_decay=0.1):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))
        self.steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                if p.dim() > 1:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                update = state["exp_avg"] * beta1 + p.grad * (1 - beta1)
                p.sub_(update.sign_(), alpha=group["lr"] / self.steps)
                state["exp_avg"].mul_(beta2).add_(p.grad, alpha=1 - beta2)


class Decayed(torch.optim.Optimizer):
    """Writes to gradients."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(p, alpha=group["weight_decay"])
                    p.sub_(p.grad, alpha=group["lr"])


class Normed(torch.optim.Optimizer):
    """By the norm of each tensor, which also chooses. (``item()`` of a DTensor would be of what is here.)"""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    norm = p.grad.norm()
                    p.sub_(
                        torch.where(norm > group["most"], p.grad / norm, p.grad.abs() - norm),
                        alpha=group["lr"],
                    )


class Together(torch.optim.Optimizer):
    """By sums over all parameters, and how many elements these have."""

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        total = torch.stack([p.grad.norm() for p in params]).norm()
        size = total / sum(p.numel() for p in params) ** 0.5
        for p in params:
            p.sub_(p.grad / (size + 1e-6), alpha=self.param_groups[0]["lr"])


class Rows(torch.optim.Optimizer):
    """By means of rows, of which shards may have a part."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    update = p.grad - p.grad.mean(dim=-1, keepdim=True) if p.dim() > 1 else p.grad
                    p.sub_(update, alpha=group["lr"])


MAKE = {
    "Lion": Lion,
    "Decayed": lambda ps: Decayed(ps, dict(lr=0.1, weight_decay=0.1)),
    "AdamW": partial(torch.optim.AdamW, lr=0.1),
    "Adam amsgrad": partial(torch.optim.Adam, lr=0.1, amsgrad=True, weight_decay=0.1),
    "Adam foreach": partial(torch.optim.Adam, lr=0.1, foreach=True),
    "NAdam": partial(torch.optim.NAdam, lr=0.1),
    "RAdam": partial(torch.optim.RAdam, lr=0.1),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "SGD plain": partial(torch.optim.SGD, lr=0.1),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.1, momentum=0.9, centered=True),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "Adamax": partial(torch.optim.Adamax, lr=0.1),
    "ASGD": partial(torch.optim.ASGD, lr=0.1),
    "Counted": lambda ps: Counted(ps, dict(lr=0.1)),
    "Viewed": lambda ps: Viewed(ps, dict(lr=0.1)),
    "Adan": partial(pytorch_optimizer.Adan, lr=0.1, foreach=False),
    "AdaBelief": partial(pytorch_optimizer.AdaBelief, lr=0.1),
}


class Viewed(torch.optim.Optimizer):
    """By views of another shape."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["avg"] = torch.zeros_like(p)
                    state["avg"].mul_(0.9).add_(p.grad)
                    p.unsqueeze(0).sub_(state["avg"].unsqueeze(0) * 2, alpha=group["lr"])


class Counted(torch.optim.Optimizer):
    """Its count is a DTensor, the same on all processes."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["step"] = p.new_zeros(())
                    state["step"] += 1
                    p.sub_(p.grad / state["step"], alpha=group["lr"])


class Halved(torch.optim.Optimizer):
    """State of other shapes, of which a part is here, too."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["halves"] = torch.zeros_like(p).unsqueeze(0) / 2
                    state["halves"] += p.grad.unsqueeze(0) / 2
                    p.sub_(state["halves"].squeeze(0), alpha=group["lr"])


REDUCING = {
    "Normed": lambda ps: Normed(ps, dict(lr=0.1, most=0.2)),
    "Together": lambda ps: Together(ps, dict(lr=0.1)),
    "LARS": partial(pytorch_optimizer.LARS, lr=0.1, foreach=False),
}


def assert_close(ours, expected):
    """But for rounding: kernels round as the class does, not in its order."""
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)


def assert_same_training(params, twins, opt, twin):
    """Parameters and state are those of the whole, and state is what the class makes: sharded, or plain numbers."""
    for p, q in zip(params, twins, strict=True):
        assert_close(full(p.detach()), q.detach())
        s, t = opt.state[p], twin.state[q]
        assert s.keys() == t.keys()
        for key, expected in t.items():
            if not isinstance(expected, torch.Tensor):
                assert (type(s[key]), s[key]) == (type(expected), expected), key
                continue
            if is_sharded(s[key]) and expected.shape != q.shape:
                assert s[key].placements == (Replicate(),) * s[key].device_mesh.ndim, key
            elif expected.shape == q.shape and is_sharded(p):
                assert (s[key].device_mesh, s[key].placements) == (p.device_mesh, p.placements), key
            else:
                assert not is_sharded(s[key]), key
            assert_close(full(s[key]), expected)


def assert_fused(opt, launches=(1, 2)):
    """Of one program; of two where the class asks for dimensions."""
    explained = opt.explain()
    assert (explained.backend, explained.eager) == ("cpp", ()) and explained.launches in launches, explained


@contextlib.contextmanager
def exchanging_nothing():
    """With a backend whose stages exchange nothing, as those for GPUs."""
    row = backends.ROWS["cpp"]
    backends.register("cpp", workers.Apart, "cpu", tried=True)
    try:
        yield
    finally:
        backends.register("cpp", *row)


def repeated(opt):
    """How many steps took no Python work for each tensor."""
    return int(opt.explain().steps.split()[0])


def both(make, kind="two", **options):
    """A model's fused optimizer, sharded, and its twin that is neither."""
    sharded, whole = sharded_and_whole(kind)
    return sharded, whole, fusedopt.fuse(make(sharded.parameters()), **options), make(whole.parameters())


@check(*((kind, name) for kind in ("two", "hybrid") for name in MAKE))
def a_class_steps_shards_like_the_whole_model(kind_and_name):
    """On one process some of the parameters have no elements."""
    kind, name = kind_and_name
    sharded, whole, opt, twin = both(MAKE[name], kind)
    train(sharded, whole, opt, twin, 1)
    made = {id(v) for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)}
    train(sharded, whole, opt, twin, 5, 1)
    assert_same_training(sharded.parameters(), whole.parameters(), opt, twin)
    assert_fused(opt)
    assert made == {id(v) for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)}
    assert repeated(opt) >= 3, opt.explain().steps


@check("Lion", "AdamW", "NAdam")
def schedules_are_followed_without_tracing_anew(name):
    sharded, whole, opt, twin = both(MAKE[name])
    for t in range(8):
        for each in (opt, twin):
            group = each.param_groups[0]
            group["lr"] = 0.1 / (t + 1)
            group["betas"] = (0.95 - 0.05 * t, 0.99)
        train(sharded, whole, opt, twin, 1, t)
    assert_same_training(sharded.parameters(), whole.parameters(), opt, twin)
    assert_fused(opt)
    assert repeated(opt) >= 6, opt.explain().steps


@check("Lion", "AdamW", "SGD")
def parameters_without_a_gradient_rest(name):
    sharded, whole, opt, twin = both(MAKE[name])
    params, twins = list(sharded.parameters()), list(whole.parameters())
    for t in range(10):
        sharded(torch.randn(6, 4)).square().mean().backward()
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            q.grad = full(p.grad).clone()
            if t and (t + i) % 3 == 0:
                p.grad = q.grad = None
        opt.step(), twin.step()
        opt.zero_grad(), twin.zero_grad()
    assert_same_training(params, twins, opt, twin)
    assert_fused(opt)


PLACED = {
    "columns": (Shard(1),),
    "rows": (Shard(0),),
    "replicated": (Replicate(),),
}


@check(*(f"{placed} {name}" for placed in PLACED for name in ("Lion", "AdamW")))
def any_placement_is_stepped_and_repeated(what):
    """Beside a parameter that is not distributed, in another group."""
    placed, name = what.split()
    mesh = mesh_of("two")
    whole = [torch.randn(3, 5), torch.randn(4, 4), torch.randn(1, 3)]
    for t in whole:
        torch.distributed.broadcast(t, 0)
    ps = [nn.Parameter(distribute_tensor(t.clone(), mesh, PLACED[placed])) for t in whole]
    qs = [nn.Parameter(t.clone()) for t in whole]
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = fusedopt.fuse(MAKE[name]([{"params": ps}, {"params": [p]}]))
    twin = MAKE[name]([{"params": qs}, {"params": [q]}])
    for t in range(6):
        for one, other in zip([*ps, p], [*qs, q], strict=True):
            other.grad = torch.full_like(other, 0.3 - t) * other.detach()
            one.grad = (
                distribute_tensor(other.grad, mesh, PLACED[placed]) if one is not p else other.grad.clone()
            )
        opt.step(), twin.step()
    assert_same_training([*ps, p], [*qs, q], opt, twin)
    assert opt.explain().eager == ()
    assert repeated(opt) >= 3, opt.explain().steps


@check("Lion", "AdamW", "Normed")
def tensor_parallel_layers_under_fully_shard_step_like_the_whole_model(name):
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        whole = workers.model(width=6)
        sharded = copy.deepcopy(whole)
        parallelize_module(sharded, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(sharded, mesh=mesh["data"])
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        make = (MAKE | REDUCING)[name]
        opt, twin = fusedopt.fuse(make(sharded.parameters())), make(whole.parameters())
        train(sharded, whole, opt, twin, 6)
        assert_same_training(sharded.parameters(), whole.parameters(), opt, twin)
        assert opt.explain().eager == ()


@check()
def one_group_may_have_parameters_of_both_kinds():
    """Of one shape each, with norms: those that are spread are other kinds of parameters."""
    mesh = mesh_of("two")
    p, q = (nn.Parameter(torch.arange(6.0).view(3, 2)) for _ in range(2))
    spread = nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)]))
    plain, twin = nn.Parameter(p.detach().clone()), nn.Parameter(p.detach().clone())
    make = REDUCING["Normed"]
    opt, other = fusedopt.fuse(make([spread, plain])), make([q, twin])
    for t in range(5):
        q.grad, twin.grad = torch.full((3, 2), 0.3 * t + 0.1), torch.full((3, 2), 0.05 * t + 0.01)
        spread.grad, plain.grad = distribute_tensor(q.grad, mesh, [Shard(0)]), twin.grad.clone()
        opt.step(), other.step()
    assert_same_training([spread, plain], [q, twin], opt, other)
    assert opt.explain().eager == ()


@check(torch.float64, torch.bfloat16)
def other_dtypes_step_like_the_whole_model(dtype):
    sharded, whole = sharded_and_whole("two", dtype)
    opt, twin = fusedopt.fuse(MAKE["AdamW"](sharded.parameters())), MAKE["AdamW"](whole.parameters())
    train(sharded, whole, opt, twin, 5)
    close = {torch.float64: (1e-12, 1e-12), torch.bfloat16: (0.02, 0.01)}[dtype]
    for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(full(p.detach()), q.detach(), rtol=close[0], atol=close[1])
    assert_fused(opt)


@check()
def a_shard_may_have_many_chunks():
    torch.set_num_threads(2)
    mesh, values = mesh_of("two"), [torch.ones(300_001), torch.ones(3)]
    params = workers.placed(values, mesh, [Shard(0)])
    twins = [nn.Parameter(v.clone()) for v in values]
    opt, twin = fusedopt.fuse(REDUCING["Together"](params)), REDUCING["Together"](twins)
    for t in range(4):
        for p, q in zip(params, twins, strict=True):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(t))
            p.grad = distribute_tensor(q.grad, mesh, [Shard(0)])
        opt.step(), twin.step()
    torch.set_num_threads(1)
    assert_same_training(params, twins, opt, twin)
    assert opt.explain().eager == ()


@check(*((kind, apart) for kind in ("two", "hybrid") for apart in ("", "exchanging nothing")))
def gradients_are_clipped_by_the_norm_of_the_whole_model(kind_and_apart):
    kind, apart = kind_and_apart
    with exchanging_nothing() if apart else contextlib.nullcontext():
        clipped(kind)


def clipped(kind):
    sharded, whole, opt, twin = both(MAKE["AdamW"], kind, max_grad_norm=0.05)
    for t in range(5):
        sharded(torch.randn(6, 4, generator=torch.Generator().manual_seed(t))).square().mean().backward()
        for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
            q.grad = full(p.grad).clone()
        nn.utils.clip_grad_norm_(whole.parameters(), 0.05)
        opt.step(), twin.step()
        opt.zero_grad(), twin.zero_grad()
    for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert_close(full(p.detach()), q.detach())
    assert opt.explain().eager == ()


@check()
def every_so_many_steps_are_compared_with_the_class():
    sharded, whole, opt, twin = both(MAKE["AdamW"], check=2)
    train(sharded, whole, opt, twin, 7)
    assert_same_training(sharded.parameters(), whole.parameters(), opt, twin)
    assert_fused(opt)


@check()
def a_class_that_does_not_what_its_trace_does_is_not_fused():
    """It asks what a trace does not see: whether its parameters are spread."""

    class Told(Lion):
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=0.2 if is_sharded(p) else 0.1)

    sharded, _ = sharded_and_whole("two")
    opt = fusedopt.fuse(Told(sharded.parameters()))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(5):
            before = [full(p.detach()).clone() for p in sharded.parameters()]
            sharded(torch.ones(6, 4)).square().mean().backward()
            grads = [full(p.grad).clone() for p in sharded.parameters()]
            opt.step(), opt.zero_grad()
            for p, was, grad in zip(sharded.parameters(), before, grads, strict=True):
                assert_close(full(p.detach()), was - 0.2 * grad)
    assert len(said) == 1 and "what kernels would do differs" in str(said[0].message), said


@check(*((kind, name) for kind in ("two", "hybrid") for name in REDUCING))
def norms_are_of_whole_tensors(kind_and_name):
    kind, name = kind_and_name
    sharded, whole, opt, twin = both(REDUCING[name], kind, check=3)
    train(sharded, whole, opt, twin, 8)
    assert_same_training(sharded.parameters(), whole.parameters(), opt, twin)
    assert opt.explain().eager == () and opt.explain().launches, opt.explain()
    assert repeated(opt) >= 4, opt.explain().steps


UNFUSED = {
    "rows": (lambda ps: Rows(ps, dict(lr=0.1)), "rows or columns of a tensor that is spread over processes"),
    "halves": (lambda ps: Halved(ps, dict(lr=0.1)), "has state that is none of its shape"),
    "exchanges nothing": (
        REDUCING["Normed"],
        "a norm, a sum or a mean of a tensor that is spread over processes",
    ),
}


@check(*UNFUSED)
def what_has_no_parts_is_the_classs_own_which_is_said_once(what):
    make, reason = UNFUSED[what]
    with exchanging_nothing() if what == "exchanges nothing" else contextlib.nullcontext():
        sharded, whole, opt, twin = both(make)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            train(sharded, whole, opt, twin, 6)
        found = [str(w.message) for w in said]
        assert len(found) == 1 and reason in found[0], found
        assert opt.explain().launches == 0
        for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
            assert_close(full(p.detach()), q.detach())
        sharded, whole, opt, twin = both(MAKE["AdamW"])
        train(sharded, whole, opt, twin, 6)
        assert_same_training(sharded.parameters(), whole.parameters(), opt, twin)
        assert_fused(opt)


@check("partial", "gradient on other placements")
def what_kernels_cannot_step_is_the_classs_own(what):
    mesh = mesh_of("two")
    p = nn.Parameter(distribute_tensor(torch.arange(8.0).view(4, 2), mesh, [Shard(0)]))
    if what == "partial":
        p = nn.Parameter(workers.DTensor.from_local(torch.ones(4, 2), mesh, [workers.Partial()]))
    opt = fusedopt.fuse(torch.optim.SGD([p], lr=0.5))
    before = full(p.detach()).clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):
            p.grad = distribute_tensor(torch.ones(4, 2), mesh, [Replicate()])
            if what == "partial":
                p.grad = workers.DTensor.from_local(torch.ones(4, 2) / 2, mesh, [workers.Partial()])
            opt.step()
    reason = (
        "still to be summed"
        if what == "partial"
        else "a gradient that is spread over processes in another way"
    )
    assert opt.explain().launches == 0 and reason in str(opt.explain()), opt.explain()
    assert_close(full(p.detach()), before - 2.0)


@check()
def a_graph_that_saved_the_parameter_notices_the_step():
    sharded, whole, opt, twin = both(MAKE["AdamW"])
    train(sharded, whole, opt, twin, 4)
    p = next(sharded.parameters())
    state = opt.state[p]["exp_avg"]
    versions = p._version, state._version, p.to_local()._version
    train(sharded, whole, opt, twin, 1, 4)
    assert all(
        a > b for a, b in zip((p._version, state._version, p.to_local()._version), versions, strict=True)
    )


@check(*(f"{mode} {name}" for mode in MODES for name in ("Lion", "AdamW", "SGD")))
def a_checkpoint_goes_on_in_a_fresh_optimizer(what):
    mode, name = what.split()
    options = dcp_state.StateDictOptions(**MODES[mode])
    sharded, whole, opt, twin = both(MAKE[name])
    train(sharded, whole, opt, twin, 4)
    saved = copy.deepcopy(dcp_state.get_optimizer_state_dict(sharded, opt, options=options))
    other, _ = sharded_and_whole("two")
    other.load_state_dict(sharded.state_dict())
    fresh = fusedopt.fuse(MAKE[name](other.parameters()))
    dcp_state.set_optimizer_state_dict(other, fresh, saved, options=options)
    if name == "Lion":  # whose count is in no state dict
        fresh.steps = twin.steps
    train(other, whole, fresh, twin, 5, 4)
    assert_same_training(other.parameters(), whole.parameters(), fresh, twin)
    assert_fused(fresh)
