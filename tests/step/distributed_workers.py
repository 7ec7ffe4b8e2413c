"""What test_distributed.py runs in two processes: checks, each of which runs in both at once."""

import contextlib
import copy
import datetime
import json
import math
import pathlib
import tempfile
import traceback
import warnings
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fusedopt
import fusedopt.optim
from fusedopt import backends
from fusedopt.backends.cpp.backend import Cpp

CHECKS = {}
CPU = torch.device("cpu")


def registering(checks):
    """What registers a check, once for each argument if there are any."""

    def check(*args):
        def register(function):
            for arg in args or [None]:
                name = function.__name__ if arg is None else f"{function.__name__}[{arg}]"
                checks[name] = function if arg is None else partial(function, arg)
            return function

        return register

    return check


check = registering(CHECKS)


def main(rank, world, folder, checks=CHECKS):
    """Run all checks, and write what went wrong in each until the processes fall out of step."""
    folder, found = pathlib.Path(folder), {}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'init'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(minutes=1),
    )
    with contextlib.suppress(RuntimeError):
        for name, function in checks.items():
            torch.manual_seed(0)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    function()
                found[name] = ""
            except Exception:
                found[name] = traceback.format_exc()
            dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


class Apart(Cpp):
    """As backends for GPUs are: processes exchange nothing between its stages."""

    runs_parts = False


@check()
def a_backend_that_exchanges_nothing_fuses_what_needs_no_exchange():
    """Elements alone: clipped by torch's norm, with a group beside it that is not sharded. Norms run unfused."""
    row = backends.ROWS["cpp"]
    backends.register("cpp", Apart, "cpu", tried=True)
    try:
        for options in ({}, {"max_grad_norm": 0.1}, {"amsgrad": True}):
            sharded, whole = sharded_and_whole("two")
            beside = [nn.Parameter(torch.ones(3)) for _ in range(2)]
            opt, twin = (
                fusedopt.optim.AdamW(
                    [{"params": list(m.parameters())}, {"params": [p], "lr": 0.05}], lr=0.1, **options
                )
                for m, p in zip((sharded, whole), beside, strict=True)
            )
            for t in range(5):
                for p in beside:
                    p.grad = torch.full((3,), 0.3 - t)
                train(sharded, whole, opt, twin, 1, t)
                if options.get("max_grad_norm"):
                    torch.testing.assert_close(full(opt.grad_norm), twin.grad_norm)
            for p, q in zip(
                [*sharded.parameters(), beside[0]], [*whole.parameters(), beside[1]], strict=True
            ):
                torch.testing.assert_close(full(p), q, rtol=1e-5, atol=1e-6)
            assert "unfused" not in str(opt.explain()) and opt.explain().launches >= 1
            assert all(is_sharded(opt.state[p]["exp_avg"]) for p in sharded.parameters())
        sharded, whole = sharded_and_whole("two")
        opt, twin = (fusedopt.Lamb(m.parameters(), lr=0.1) for m in (sharded, whole))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            train(sharded, whole, opt, twin)
        assert any("stepped unfused" in str(w.message) for w in said), [str(w.message) for w in said]
        for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(full(p), q, rtol=1e-5, atol=1e-6)
    finally:
        backends.register("cpp", *row)


# --
# Models and optimizers


def mesh_of(kind):
    """one: a mesh of this process alone; two: both; hybrid: replicated over both, sharded over one."""
    if kind == "two":
        return init_device_mesh("cpu", (2,))
    both = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    return both["shard"] if kind == "one" else both


def model(width=5):
    """Of 5 × 4, 5, 1 × 5 and 1 elements: over two processes 3 + 2 rows, and 1 + 0."""
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))


def sharded_and_whole(kind, dtype=None):
    whole = model().to(dtype)
    sharded = copy.deepcopy(whole)
    return fully_shard(sharded, mesh=mesh_of(kind)), whole


def is_sharded(p):
    return isinstance(p, DTensor)


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def train(sharded, whole, opt, twin, steps=3, start=0):
    """Train the sharded model, and step the whole one with the same gradients."""
    for t in range(start, start + steps):
        gen = torch.Generator().manual_seed(t)
        x = torch.randn(6, 4, generator=gen).to(next(whole.parameters()).dtype)
        sharded(x).square().mean().backward()
        for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
            q.grad = full(p.grad).clone()
        opt.step(), twin.step()
        opt.zero_grad(), twin.zero_grad()


def assert_same(ours, expected, exact=True):
    assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape), (ours, expected)
    if exact:
        assert torch.equal(ours, expected), (ours, expected)
    else:
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7, equal_nan=True)


def assert_same_training(params, twins, opt, twin, exact=True):
    """Parameters and state are equal; state is sharded as its parameter is, and numbers are numbers."""
    for p, q in zip(params, twins, strict=True):
        assert_same(full(p.detach()), q.detach(), exact)
        s, t = opt.state[p], twin.state[q]
        assert s.keys() == t.keys()
        for key, expected in t.items():
            if not isinstance(expected, torch.Tensor):
                assert (type(s[key]), s[key]) == (type(expected), expected), key
                continue
            if expected.shape == q.shape and is_sharded(p):
                assert (s[key].device_mesh, s[key].placements) == (p.device_mesh, p.placements), key
            else:
                assert not is_sharded(s[key]), key
            assert_same(full(s[key]), expected, exact)


RULES = {
    "AdamW": partial(fusedopt.optim.AdamW, lr=0.1),
    "SGD": partial(fusedopt.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": partial(fusedopt.Adam, lr=0.1),
    "Lamb": partial(fusedopt.Lamb, lr=0.1),
    "Larc": partial(fusedopt.Larc, lr=0.1),
}
REDUCING = ("Lamb", "Larc")


def equals_unsharded(kind, rule):
    sharded, whole = sharded_and_whole(kind)
    opt, twin = RULES[rule](sharded.parameters()), RULES[rule](whole.parameters())
    train(sharded, whole, opt, twin)
    assert_same_training(sharded.parameters(), whole.parameters(), opt, twin, exact=rule not in REDUCING)
    explained = opt.explain()
    assert (explained.backend, explained.eager) == ("cpp", ())
    assert explained.launches == {"Lamb": 2, "Larc": 3}.get(rule, 1)  # Larc keeps a number per tensor


@check(*RULES)
def one_process_with_fully_shard_steps_like_the_unsharded_model(rule):
    equals_unsharded("one", rule)


@check(*RULES)
def two_processes_with_fully_shard_step_like_the_unsharded_model(rule):
    equals_unsharded("two", rule)


@check(*RULES)
def replicated_shards_step_like_the_unsharded_model(rule):
    equals_unsharded("hybrid", rule)


@check("one", "two", "hybrid")
def clipping_is_by_the_norm_of_the_whole_model(kind):
    sharded, whole = sharded_and_whole(kind)
    opt, twin = (
        fusedopt.optim.SGD(m.parameters(), lr=0.1, max_grad_norm=0.05, capturable=True)
        for m in (sharded, whole)
    )
    for t in range(3):
        train(sharded, whole, opt, twin, steps=1, start=t)
        torch.testing.assert_close(opt.grad_norm, twin.grad_norm, rtol=1e-6, atol=0)
        assert opt.grad_norm > 0.05
    assert_same_training(sharded.parameters(), whole.parameters(), opt, twin, exact=False)
    assert opt.explain().eager == ()


@check("two AdamW", "two Lamb", "hybrid AdamW", "hybrid Lamb")
def gradients_are_released_as_fully_shard_has_reduced_them(kind_and_rule):
    kind, rule = kind_and_rule.split()
    first, _ = sharded_and_whole(kind)
    second, _ = sharded_and_whole(kind)
    second.load_state_dict(first.state_dict())
    opt, released = (RULES[rule](m.parameters()) for m in (first, second))
    release = released.release_gradients(0)
    for t in range(6):
        for m, o in ((first, opt), (second, released)):
            torch.manual_seed(t)
            m.set_requires_gradient_sync(bool(t % 2))
            with release.accumulate(t % 2 == 0):
                m(torch.randn(6, 4)).square().mean().backward()
            if t % 2:
                assert all((p.grad is None) == (o is released) for p in m.parameters())
                o.step()
                o.zero_grad()
    for p, q in zip(second.parameters(), first.parameters(), strict=True):
        assert_same(full(p.detach()), full(q.detach()))
        state, expected = released.state[p], opt.state[q]
        assert all(
            torch.equal(full(state[k]), full(v)) if torch.is_tensor(v) else state[k] == v
            for k, v in expected.items()
        )


@check("two", "hybrid")
def released_gradients_are_measured_over_the_whole_model(kind):
    m, _ = sharded_and_whole(kind)
    x = torch.randn(6, 4)
    m(x).square().mean().backward()
    expected = torch.nn.utils.get_total_norm([full(p.grad) for p in m.parameters()])
    opt = fusedopt.optim.SGD(m.parameters(), lr=0.1, max_grad_norm=0.05)
    opt.zero_grad()
    with opt.release_gradients(0, clip="measured") as release:
        with release.measure():
            m(x).square().mean().backward()
        torch.testing.assert_close(opt.grad_norm, expected, rtol=1e-6, atol=0)
        before = [full(p.detach()).clone() for p in m.parameters()]
        m(x).square().mean().backward()
        opt.step()
    moved = [full(p.detach()) - q for p, q in zip(m.parameters(), before, strict=True)]
    torch.testing.assert_close(torch.nn.utils.get_total_norm(moved), torch.tensor(0.005), rtol=1e-4, atol=0)


@check("two step", "two batches", "hybrid step", "hybrid batches")
def released_gradients_are_scaled_and_skipped_in_all_processes(kind_and_skip):
    """Infinities are in the first row of a weight: in one process's shard, where there are two."""
    kind, skip = kind_and_skip.split()
    models = [sharded_and_whole(kind)[0] for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [fusedopt.optim.AdamW(m.parameters(), lr=0.1) for m in models]
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) for _ in models]
    size = 0 if skip == "step" else 1 << 30  # where all is one batch
    release = opts[1].release_gradients(size, scaler=scalers[1], skip=skip)
    row = torch.ones(5)
    for m in models:
        m[0].register_forward_hook(lambda _, args, out: out.register_hook(lambda grad: grad * row) and None)
    for t in range(8):
        row[0] = torch.inf if t in (0, 4) else 1.0
        for m, opt, scaler in zip(models, opts, scalers, strict=True):

            def scaled_backward(m=m, scaler=scaler, t=t):
                loss = m(torch.randn(6, 4, generator=torch.Generator().manual_seed(t))).square().mean()
                scaler.scale(loss).backward()

            if opt is opts[1] and skip == "step":
                with release.measure():
                    scaled_backward()
            scaled_backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        assert scalers[0].get_scale() == scalers[1].get_scale() == [32, 32, 64, 64, 32, 32, 64, 64][t]
        for p, q in zip(*(m.parameters() for m in models), strict=True):
            assert_same(full(p.detach()), full(q.detach()))


@check()
def gradients_that_processes_average_afterwards_are_not_released():
    with raises(RuntimeError, "several processes train"):
        fusedopt.optim.SGD(model().parameters(), lr=0.1).release_gradients()


def clip_and_descend(p, lr, **kwargs):
    norm = fusedopt.total(p.grad**2).sqrt()
    scale = (0.05 / (norm + 1e-6)).clamp(max=1)
    p.data.sub_(p.grad * (scale * lr))
    return {"gain": fusedopt.total((p.data * p.grad).abs().mean() * scale)}


def sorted_clip_and_descend(p, lr, **kwargs):
    p.grad.copy_(p.grad.abs().msort())
    return clip_and_descend(p, lr, **kwargs)


@check(*((kind, limit) for kind in ("one", "two", "hybrid") for limit in (None, 0.5)))
def totals_are_over_the_whole_model(kind_and_limit):
    kind, limit = kind_and_limit
    sharded, whole = sharded_and_whole(kind)
    opt, twin = (
        fusedopt.Optimizer(m.parameters(), clip_and_descend, lr=0.1, max_grad_norm=limit)
        for m in (sharded, whole)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fusedopt: the state 'gain'")
        for t in range(4):
            train(sharded, whole, opt, twin, steps=1, start=t)
    gains = [opt.state[p]["gain"] for p in sharded.parameters()]
    assert len({float(gain) for gain in gains}) == 1 and gains[0].dtype == torch.float64
    for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(opt.state[p]["gain"], twin.state[q]["gain"], rtol=1e-5, atol=0)
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6)
    found = [torch.empty_like(gains[0]) for _ in range(2)]
    dist.all_gather(found, gains[0])
    assert torch.equal(*found)
    assert opt.explain().eager == () and opt.engine.steps.repeated >= 2


@check()
def totals_of_callbacks_that_run_eagerly_are_over_the_whole_model():
    sharded, whole = sharded_and_whole("one")
    opt, twin = (
        fusedopt.Optimizer(m.parameters(), sorted_clip_and_descend, lr=0.1) for m in (sharded, whole)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fusedopt: ")
        train(sharded, whole, opt, twin, steps=2)
    for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6)


@check()
def an_eager_callback_that_fails_leaves_the_parameter_as_it_was():
    def failing(p, lr, **kwargs):
        p.data.sub_(p.grad.abs().msort() * lr)
        raise ValueError("failed")

    sharded, _ = sharded_and_whole("one")
    opt = fusedopt.Optimizer(sharded.parameters(), failing, lr=0.1)
    before = [full(p).clone() for p in sharded.parameters()]
    locals_ = [p._local_tensor for p in sharded.parameters()]
    sharded(torch.ones(6, 4)).square().mean().backward()
    with contextlib.suppress(ValueError), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fusedopt: ")
        opt.step()
    for p, was, local in zip(sharded.parameters(), before, locals_, strict=True):
        assert torch.equal(full(p), was) and p._local_tensor is local


@check()
def callbacks_that_run_eagerly_are_clipped_by_it_too():
    def eager(p, lr, **kwargs):
        p.data.sub_(p.grad.data.abs().msort() * lr)

    sharded, whole = sharded_and_whole("one")
    opt, twin = (
        fusedopt.Optimizer(m.parameters(), eager, lr=0.1, max_grad_norm=0.05) for m in (sharded, whole)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fusedopt: .* (eagerly|unfused)")
        train(sharded, whole, opt, twin, steps=1)
    torch.testing.assert_close(opt.grad_norm, twin.grad_norm, rtol=1e-6, atol=0)
    for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert_same(full(p.detach()), q.detach(), exact=False)


@check()
def only_this_process_may_explain():
    """What a step would launch is told without a collective, before the first step and after."""
    sharded, whole = sharded_and_whole("two")
    opt, twin = RULES["Lamb"](sharded.parameters()), RULES["Lamb"](whole.parameters())
    for _ in range(2):
        if dist.get_rank() == 1:
            assert opt.explain().launches == 2
        train(sharded, whole, opt, twin, steps=1)
    dist.barrier()


# --
# Placements of all kinds, set by hand

PLACEMENTS = {
    "rows and columns": [Shard(0), Shard(1)],
    "columns": [Shard(1), Replicate()],
    "replicated": [Replicate(), Replicate()],
    "replicated rows": [Replicate(), Shard(0)],
    "rows twice": [Shard(0), Shard(0)],
}
SHAPES = ((3, 5), (1, 4), (2, 1), (0, 2))


def odd_step(p, lr, peak=None, least=None, **kwargs):
    """Uses what whole tensors alone have: extremes, a mean, an element count; keeps numbers per tensor."""
    grad = p.grad.data
    peak, least = grad.abs().amax(), grad.amin()
    p.data.sub_(grad / peak + p.data.var() + grad.mean() + least, alpha=lr)
    return {"peak": peak, "least": least}


BY_HAND = {
    "lamb": lambda ps: fusedopt.Lamb(ps, lr=0.1),
    "odd_step": lambda ps: fusedopt.Optimizer(ps, odd_step, lr=0.1),
}


def placed(tensors, mesh, placements):
    return [nn.Parameter(distribute_tensor(t, mesh, placements)) for t in tensors]


def by_hand(
    mesh, placements, make, grads=lambda p, g: distribute_tensor(g, p.device_mesh, p.placements), steps=3
):
    values = [torch.randn(shape) for shape in SHAPES]
    params, twins = placed(values, mesh, placements), [nn.Parameter(v.clone()) for v in values]
    # a plain parameter beside the others
    params.append(nn.Parameter(torch.ones(3)))
    twins.append(nn.Parameter(torch.ones(3)))
    opt, twin = make(params), make(twins)
    for _ in range(steps):
        for p, q in zip(params, twins, strict=True):
            q.grad = torch.randn(q.shape)
            p.grad = grads(p, q.grad) if is_sharded(p) else q.grad.clone()
        opt.step(), twin.step()
        opt.step(), twin.step()  # with the same gradients again
    return params, twins, opt, twin


@check(*PLACEMENTS)
def any_placement_steps_like_the_whole_tensor(name):
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape)
        for make in BY_HAND.values():
            assert_same_training(*by_hand(mesh, PLACEMENTS[name], make), exact=False)


@check("int8", "int8_256", "bf16+8", "bfloat16_sr")
def policies_store_what_is_here_of_a_tensor(name):
    """Blocks do not reach over to other processes. Here they end where shards do, so all is as in one tensor."""
    mesh = mesh_of("two")
    torch.manual_seed(1)
    values, grads = torch.randn(64, 128), [torch.randn(64, 128) for _ in range(4)]
    p = nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))
    q = nn.Parameter(values.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # random numbers of shards are drawn eagerly
        opt, twin = (fusedopt.optim.AdamW([x], lr=0.1, storage=name) for x in (p, q))
        for t, g in enumerate(grads):
            p.grad, q.grad = distribute_tensor(g, mesh, [Shard(0)]), g.clone()
            opt.step(), twin.step()
            if t == 1:
                saved = copy.deepcopy(opt.state_dict())
                opt = fusedopt.optim.AdamW([p], lr=0.1, storage=name)
                opt.load_state_dict(saved)
    assert_same(full(p.detach()), q.detach(), exact=name != "bfloat16_sr")
    assert_same(full(opt.state[p]["exp_avg"]), twin.state[q]["exp_avg"])
    whole, shards = twin.state_dict()["state"][0], opt.state_dict()["state"][0]
    assert_same(full(shards["exp_avg_sq"]), whole["exp_avg_sq"])
    if name != "bfloat16_sr":
        assert opt.explain().eager == ()


def noise(p, lr, seed=3, step=0, **kwargs):
    p.data.add_(fusedopt.normal(p, seed=seed, step=step)).sub_(p.grad * lr)
    return {"step": step + 1}


@check(*PLACEMENTS)
def random_numbers_are_those_of_the_whole_tensor(name):
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it runs eagerly
            assert_same_training(
                *by_hand(mesh, PLACEMENTS[name], lambda ps: fusedopt.Optimizer(ps, noise, lr=0.1)),
                exact=False,
            )


@check()
def a_shard_may_have_many_chunks():
    torch.set_num_threads(2)
    mesh, values = mesh_of("two"), [torch.randn(300_001), torch.randn(3)]
    params, twins = placed(values, mesh, [Shard(0)]), [nn.Parameter(v) for v in values]
    opt, twin = BY_HAND["odd_step"](params), BY_HAND["odd_step"](twins)
    for p, q in zip(params, twins, strict=True):
        q.grad = torch.randn(q.shape)
        p.grad = distribute_tensor(q.grad, mesh, [Shard(0)])
    opt.step(), twin.step()
    torch.set_num_threads(1)
    assert_same_training(params, twins, opt, twin, exact=False)


@check("AdamW", "Lamb")
def tensor_parallel_layers_under_fully_shard_step_like_the_whole_model(rule):
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        whole = model(width=6)
        sharded = copy.deepcopy(whole)
        parallelize_module(sharded, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(sharded, mesh=mesh["data"])
        # torch's own, about what its tensor parallel layer returns
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        opt, twin = RULES[rule](sharded.parameters()), RULES[rule](whole.parameters())
        train(sharded, whole, opt, twin)
        assert_same_training(sharded.parameters(), whole.parameters(), opt, twin, exact=rule not in REDUCING)


def half_each(p, g):
    """A gradient that is still to be summed."""
    mine = g if dist.get_rank() == 0 else torch.zeros_like(g)
    return DTensor.from_local(mine, p.device_mesh, [Partial()])


GRADIENTS = {
    "partial": half_each,
    "replicated": lambda p, g: distribute_tensor(g, p.device_mesh, [Replicate()]),
    "columns": lambda p, g: distribute_tensor(g, p.device_mesh, [Shard(1)]),
}


@check(*GRADIENTS)
def a_gradient_with_other_placements_is_redistributed(name):
    for placements in ([Shard(0)], [Replicate()]):
        found = by_hand(mesh_of("two"), placements, BY_HAND["lamb"], GRADIENTS[name])
        assert_same_training(*found, exact=False)


@check()
def nan_and_infinity_of_one_shard_reach_all():
    mesh = mesh_of("two")
    for bad in (float("nan"), float("inf")):
        for row in range(4):
            grad = torch.ones(4)
            grad[row] = bad
            p, q = (
                nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)])),
                nn.Parameter(torch.ones(4)),
            )
            p.grad, q.grad = distribute_tensor(grad, mesh, [Shard(0)]), grad
            opt, twin = (fusedopt.Optimizer([x], odd_step, lr=0.1) for x in (p, q))
            opt.step(), twin.step()
            for ours, expected in (
                (full(p), q),
                *((opt.state[p][k], twin.state[q][k]) for k in ("peak", "least")),
            ):
                assert_same(ours.detach(), expected.detach(), exact=False)


@check()
def memory_order_of_shards_does_not_matter():
    """A shard that is transposed in memory, or that is a part of a larger block."""
    mesh, block = mesh_of("two"), torch.randn(4, 6)
    for whole, local in (
        (block.T.clone(), lambda r: block[2 * r : 2 * r + 2].clone().T),
        (block[:, ::2].clone(), lambda r: block.clone()[2 * r : 2 * r + 2, ::2]),
    ):
        placement = [Shard(1 if whole.shape == (6, 4) else 0)]
        p = nn.Parameter(
            DTensor.from_local(
                local(dist.get_rank()), mesh, placement, shape=whole.shape, stride=whole.stride()
            )
        )
        q = nn.Parameter(whole)
        opt, twin = RULES["Adam"]([p]), RULES["Adam"]([q])
        for _ in range(3):
            q.grad = torch.randn(q.shape)
            p.grad = distribute_tensor(q.grad, mesh, placement)
            opt.step(), twin.step()
        assert_same_training([p], [q], opt, twin)


@check()
def a_graph_that_saved_the_parameter_notices_the_step():
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh_of("two"), [Shard(0)]))
    loss = (p * p).sum()
    p.grad = distribute_tensor(torch.ones(4), p.device_mesh, [Shard(0)])
    RULES["AdamW"]([p]).step()
    with raises(RuntimeError, "modified by an inplace operation"):
        loss.backward()


# --
# What is refused


@contextlib.contextmanager
def raises(kind, text):
    try:
        yield
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}: {text}")


@check("partial parameter", "plain gradient", "gradient on another mesh", "sharded gradient", "sharded state")
def what_cannot_be_stepped_is_refused_and_nothing_changes(what):
    mesh = mesh_of("two")
    good, whole = nn.Parameter(torch.ones(4)), torch.ones(4)
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    partly = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    p, grad, text = {
        "partial parameter": (partly, distribute_tensor(whole, mesh, [Replicate()]), "still to be summed"),
        "plain gradient": (sharded, torch.ones(4), "its gradient is not"),
        "gradient on another mesh": (
            sharded,
            distribute_tensor(whole, mesh_of("one"), [Shard(0)]),
            "on different meshes",
        ),
        "sharded gradient": (whole, sharded.clone(), "is no DTensor, but its gradient or state is"),
        "sharded state": (whole, whole.clone(), "is no DTensor, but its gradient or state is"),
    }[what]
    p = nn.Parameter(p)
    opt = RULES["Adam"]([good, p])
    for x in (good, p):
        x.grad = torch.ones_like(x)
    if not is_sharded(p):  # so that it comes after a step that was repeated from a recording
        opt.step(), opt.step(), opt.step()
    if what == "sharded state":
        opt.state[p]["exp_avg"] = sharded.clone()
    p.grad = grad
    before = good.detach().clone(), full(p).detach().clone()
    with raises(RuntimeError, text):
        opt.step()
    assert_same(good.detach(), before[0])
    assert_same(full(p).detach(), before[1])
    assert bool(opt.state) == (not is_sharded(p))


@check()
def what_torch_takes_for_another_dtype_is_refused():
    """That of a DTensor's elements stays what it was when its data is set."""
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh_of("two"), [Shard(0)]))
    opt = RULES["Adam"]([p])
    p.data = p.data.to(torch.float64)
    p.grad_dtype = None
    p.grad = torch.ones_like(p)
    with raises(RuntimeError, "of another dtype than its elements are"):
        opt.step()
    assert (p._local_tensor == 1).all() and not opt.state


# --
# Eagerly


def centralize(p, **kwargs):
    p.grad = p.grad.data - p.grad.data.mean(dim=0, keepdim=True)


@check("auto", "reference")
def callbacks_that_do_not_fuse_run_on_whole_tensors(backend):
    """A mean over rows of which each process has some, and LAMB's norms after it."""
    cbs = [centralize, *(cb for cb in RULES["Lamb"]([nn.Parameter(torch.ones(1))]).cbs)]
    names = dict(state_names={"grad_avg": "exp_avg", "sqr_avg": "exp_avg_sq"})
    sharded, whole = sharded_and_whole("two")
    opt, twin = (
        fusedopt.Optimizer(m.parameters(), cbs, lr=0.1, backend=b, **names)
        for m, b in ((sharded, backend), (whole, "reference"))
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(sharded, whole, opt, twin)
    said = [str(w.message) for w in said if "fusedopt" in str(w.message)]
    assert_same_training(sharded.parameters(), whole.parameters(), opt, twin, exact=False)
    assert sum("tensors of type DTensor are stepped unfused" in s for s in said) == (backend == "auto"), said
    assert not any("centralize runs eagerly" in s for s in said), said


def averaged(p, decay=0.5, avg=None, **kwargs):
    if avg is None:
        return {"avg": p.data.clone()}
    return {"avg": avg.mul_(decay).add_(p.data, alpha=1 - decay)}


def nudged(p, lr, **kwargs):
    p.data.sub_(p.grad, alpha=lr)


def normalized(p, **kwargs):
    p.data.div_(p.data.square().mean().sqrt() + 1)


@check("auto", "reference")
def what_is_applied_is_applied_to_the_whole(backend):
    for kind in ("one", "two", "hybrid"):
        sharded, whole = sharded_and_whole(kind)
        opt, twin = (fusedopt.optim.AdamW(m.parameters(), lr=0.1, backend=backend) for m in (sharded, whole))
        for t in range(4):
            for each in (opt, twin):
                each.apply(averaged)
                each.apply([normalized, averaged])
            train(sharded, whole, opt, twin, steps=1, start=t)
        for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
            p.grad, q.grad = p.detach().clone(), q.detach().clone()
        for each in (opt, twin):
            each.apply(nudged)
        assert_same_training(sharded.parameters(), whole.parameters(), opt, twin, exact=False)
        repeated = [each.engine.steps.repeated for each in opt.applications]
        assert repeated == ([2, 2, 0] if backend == "auto" else [0, 0, 0]), repeated


def sophia(p, lr, hess=None, slow=None, **kwargs):
    if slow is None:
        slow = torch.zeros_like(p)
    if hess is not None:
        slow.mul_(0.5).add_(hess.abs(), alpha=0.5)
    p.data.sub_(p.grad / (slow + 1), alpha=lr)
    return {"slow": slow}


def two_rules(params):
    params = list(params)
    matrices = {"params": [p for p in params if p.dim() == 2], "cbs": [sophia], "lr": 0.01}
    return fusedopt.optim.AdamW([matrices, {"params": [p for p in params if p.dim() != 2]}], lr=0.1)


@check("default", "flattened", "full")
def groups_with_callbacks_of_their_own_are_saved_and_loaded(mode):
    options = dcp_state.StateDictOptions(**MODES[mode])
    sharded, whole = sharded_and_whole("two")
    opt, twin = two_rules(sharded.parameters()), two_rules(whole.parameters())
    train(sharded, whole, opt, twin)
    saved = copy.deepcopy(dcp_state.get_optimizer_state_dict(sharded, opt, options=options))
    other, _ = sharded_and_whole("two")
    other.load_state_dict(sharded.state_dict())
    fresh = two_rules(other.parameters())
    dcp_state.set_optimizer_state_dict(other, fresh, saved, options=options)
    train(other, whole, fresh, twin, start=3)
    assert_same_training(other.parameters(), whole.parameters(), fresh, twin)
    assert fresh.param_groups[0]["cbs"] == [sophia] and "cbs" not in fresh.param_groups[1]


@check("auto", "reference")
def extra_tensors_are_spread_as_their_parameters(backend):
    sharded, whole = sharded_and_whole("two")
    opt, twin = (
        fusedopt.Optimizer(m.parameters(), sophia, lr=0.1, backend=backend) for m in (sharded, whole)
    )
    for t in range(5):
        gen = torch.Generator().manual_seed(t)
        for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
            q.grad = torch.randn(q.shape, generator=gen)
            p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
        plain = [torch.randn(q.shape, generator=gen) for q in whole.parameters()]
        spread = [
            distribute_tensor(h, p.device_mesh, p.placements)
            for h, p in zip(plain, sharded.parameters(), strict=True)
        ]
        opt.step(extra={"hess": spread if t != 3 else plain})
        twin.step(extra={"hess": plain})
    assert_same_training(sharded.parameters(), whole.parameters(), opt, twin)
    assert opt.engine.steps.repeated == (2 if backend == "auto" else 0), opt.engine.steps


# --
# Checkpoints

MODES = {
    "default": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
}


def trained(make, dtype=None):
    sharded, whole = sharded_and_whole("two", dtype)
    opt, twin = make(sharded.parameters()), make(whole.parameters())
    train(sharded, whole, opt, twin)
    return sharded, whole, opt, twin


def flagged(opt):
    for p in opt.param_groups[0]["params"][1:3]:
        opt.state[p]["do_wd"] = False
        opt.state[p]["force_train"] = True
    return opt


def checkpoint_goes_on(mode, rule, dtype=None):
    """Out of one optimizer, into a fresh one, and both train on like an unsharded one that was never saved."""
    options = dcp_state.StateDictOptions(**MODES[mode])
    make = {
        "AdamW": lambda ps: flagged(RULES["AdamW"](ps)),
        "Lamb": lambda ps: flagged(RULES["Lamb"](ps)),
        "stored": lambda ps: fusedopt.optim.AdamW(ps, lr=0.1, storage="bf16+8"),
        "bf16": lambda ps: fusedopt.Optimizer(
            ps,
            [
                partial(fusedopt.average_grad, dampening=True),
                fusedopt.average_sqr_grad,
                fusedopt.step_stat,
                fusedopt.adam_step,
            ],
            lr=0.1,
            state_dtype=torch.float32,
        ),
    }[rule]
    sharded, whole, opt, twin = trained(make, dtype)
    saved = dcp_state.get_optimizer_state_dict(sharded, opt, options=options)
    saved = copy.deepcopy(saved)
    if mode == "full":
        assert not any(is_sharded(v) for s in saved["state"].values() for v in s.values())

    other, _ = sharded_and_whole("two", dtype)
    other.load_state_dict(sharded.state_dict())
    fresh = make(other.parameters())
    fresh.param_groups[0]["lr"] = 0.7
    before = [full(p.detach()).clone() for p in other.parameters()]
    dcp_state.set_optimizer_state_dict(other, fresh, saved, options=options)
    for p, old in zip(other.parameters(), before, strict=True):
        assert_same(full(p.detach()), old)
    assert fresh.param_groups[0]["lr"] == 0.1
    exact = rule not in REDUCING
    assert_same_training(other.parameters(), whole.parameters(), fresh, twin, exact)
    train(other, whole, fresh, twin, start=3)
    assert_same_training(other.parameters(), whole.parameters(), fresh, twin, exact)
    if dtype:
        assert {full(v).dtype for s in fresh.state.values() for v in s.values() if is_sharded(v)} == {
            torch.float32
        }


@check(*MODES)
def a_checkpoint_goes_on_in_a_fresh_optimizer_with_flags(mode):
    for rule in ("AdamW", "Lamb"):
        checkpoint_goes_on(mode, rule)


@check(*MODES)
def a_checkpoint_of_what_policies_store_goes_on(mode):
    checkpoint_goes_on(mode, "stored")


@check(*MODES)
def a_checkpoint_keeps_the_state_dtype_of_bfloat16_parameters(mode):
    checkpoint_goes_on(mode, "bf16", torch.bfloat16)


@check(*MODES)
def saving_a_fresh_optimizer_makes_its_state_and_changes_nothing_else(mode):
    sharded, _ = sharded_and_whole("two")
    for rule, make in RULES.items():
        opt = flagged(make(sharded.parameters()))
        before = [full(p.detach()).clone() for p in sharded.parameters()]
        options = dcp_state.StateDictOptions(**MODES[mode])
        dcp_state.get_optimizer_state_dict(sharded, opt, options=options)
        for p, old in zip(sharded.parameters(), before, strict=True):
            assert_same(full(p.detach()), old)
            assert p.grad is None
            tensors = [v for v in opt.state[p].values() if isinstance(v, torch.Tensor) and v.dim()]
            assert tensors and all(map(is_sharded, tensors)), rule
        assert opt.param_groups[0]["lr"] == 0.1


@check()
def a_full_checkpoint_loads_unsharded_and_an_unsharded_one_loads_sharded():
    sharded, whole, opt, twin = trained(RULES["AdamW"])
    options = dcp_state.StateDictOptions(full_state_dict=True)
    saved = dcp_state.get_optimizer_state_dict(sharded, opt, options=options)
    plain = RULES["AdamW"](whole.parameters())
    dcp_state.set_optimizer_state_dict(whole, plain, saved, options=options)
    opt.load_state_dict(twin.state_dict())  # whole tensors, taken apart in the next step
    train(sharded, whole, opt, plain, start=3)
    assert_same_training(sharded.parameters(), whole.parameters(), opt, plain)


@check()
def files_of_two_processes_load_in_one():
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    folder = pathlib.Path(folder[0])
    sharded, whole, opt, twin = trained(RULES["AdamW"])
    dcp.save({"opt": dcp_state.get_optimizer_state_dict(sharded, opt)}, checkpoint_id=folder / "files")
    alone, _ = sharded_and_whole("one")
    for p, q in zip(alone.parameters(), whole.parameters(), strict=True):
        p.to_local().data.copy_(q.data)
    fresh = RULES["AdamW"](alone.parameters())
    loaded = {"opt": dcp_state.get_optimizer_state_dict(alone, fresh)}
    dcp.load(loaded, checkpoint_id=folder / "files")
    dcp_state.set_optimizer_state_dict(alone, fresh, loaded["opt"])
    train(alone, whole, fresh, twin, start=3)
    assert_same_training(alone.parameters(), whole.parameters(), fresh, twin)


@check("SM3", "Adafactor", "CAME", "AdamMini", "AdamP", "SGDP")
def a_rule_by_rows_refuses_a_tensor_with_fewer_than_processes(name):
    """All processes do, where one that has nothing would fail and the other wait for it."""
    mesh = init_device_mesh("cpu", (2,))
    params = [
        nn.Parameter(distribute_tensor(torch.ones(rows, 5), mesh, [placement]))
        for rows, placement in ((4, Shard(0)), (1, Replicate()), (1, Shard(0)))
    ]
    opt = getattr(fusedopt.rules, name)(params)
    for p in params:
        p.grad = distribute_tensor(torch.ones(p.shape), mesh, p.placements)
    with raises(ValueError, "parameter 2 of group 0 has length 1 along dimension 0"):
        opt.step()
    assert all((p.to_local() == 1).all() for p in params)


def mean_square(p, lr, size=None, **kwargs):
    """A mean that is kept for each tensor."""
    size = torch.zeros((), dtype=p.dtype, device=p.device) if size is None else size
    size = size * 0.5 + p.grad.square().mean() * 0.5
    p.data.sub_(p.grad / (size.sqrt() + 1.0), alpha=lr)
    return {"size": size}


NUMBERS = {
    "NovoGrad": lambda ps, **o: fusedopt.rules.NovoGrad(ps, lr=0.1, **o),
    "capturable": lambda ps, **o: fusedopt.optim.NAdam(ps, lr=0.1, capturable=True, **o),
    "amp_fused": lambda ps, **o: fusedopt.optim.AdamW(ps, lr=0.1, amp_fused=True, **o),
    "a mean": lambda ps, **o: fusedopt.Optimizer(ps, mean_square, lr=0.1, **o),
}


@check(*NUMBERS)
def a_process_without_elements_keeps_the_numbers_of_the_whole_tensor(name):
    """It may be the one that writes them into a checkpoint."""
    mesh = init_device_mesh("cpu", (2,))
    whole = [nn.Parameter(torch.ones(rows, 5)) for rows in (4, 1)]
    shards = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in whole]
    opt, twin = NUMBERS[name](shards), NUMBERS[name](whole, backend="reference")
    for t in range(5):
        for p, q in zip(shards, whole, strict=True):
            q.grad = torch.arange(q.numel()).reshape(q.shape) * 0.1 + t
            p.grad = distribute_tensor(q.grad, mesh, [Shard(0)])
        opt.step()
        twin.step()
    for p, q in zip(shards, whole, strict=True):
        numbers = {k: v for k, v in twin.state[q].items() if not isinstance(v, torch.Tensor) or v.dim() == 0}
        assert numbers
        for key, number in numbers.items():
            assert math.isclose(float(opt.state[p][key]), float(number), rel_tol=1e-5), (
                key,
                float(opt.state[p][key]),
            )
        torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-4, atol=1e-5)


def eager_descent(p, lr, **kwargs):
    if float(p.grad.abs().max()) > 0:
        p.data.sub_(p.grad, alpha=lr)


@check("kahan", "bf16+16", "master")
def callbacks_that_run_eagerly_find_what_is_stored_beside_a_parameter(policy):
    """Steps that are less than a bfloat16 can tell come to something."""
    mesh, whole = mesh_of("two"), torch.ones(64, 8, dtype=torch.bfloat16)
    p, q = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])), nn.Parameter(whole.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that it runs eagerly
        for backend in ("cpp", "reference"):
            opts = [
                fusedopt.Optimizer([x], eager_descent, lr=1e-3, storage={"param": policy}, backend=backend)
                for x in (p, q)
            ]
            for _ in range(20):
                for x, opt in zip((p, q), opts, strict=True):
                    x.grad = torch.ones_like(x)
                    opt.step()
    assert float(q.detach().float().mean()) < 0.98
    assert torch.equal(p.full_tensor(), q)
