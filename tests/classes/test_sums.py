"""`fusedopt.fuse` on small classes whose steps sum over parameters: each construct is what the class itself does."""

import copy
import math
import warnings

import pytest
import torch
from test_fuse import Base, alike, leaves, reset, run

import fusedopt

SHAPES = ((5,), (3, 4), (5,), (2, 3), (5,))


def whole(body, **attributes):
    """A class whose step is this function of itself and what has a gradient of each group."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        self.calls += 1
        body(self, [[p for p in group["params"] if p.grad is not None] for group in self.param_groups])
        return loss

    return type(body.__name__, (Base,), {"step": step, **attributes})


def compared(kind, **how):
    """The fused optimizer, after it was found to have done what the class does, which sums in float32."""
    results = []
    for fuse in (False, True):
        reset()
        params, opt = run(kind, fuse=fuse, **how)
        results.append(as_tensors(leaves(opt, params)))
    assert alike(*results), results
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in params)
    return opt


def as_tensors(x):
    if isinstance(x, (list, tuple)):
        return type(x)(map(as_tensors, x))
    if isinstance(x, dict):
        return {k: as_tensors(v) for k, v in x.items()}
    return torch.tensor(x, dtype=torch.float64) if type(x) is float else x


def flat(groups):
    return [p for group in groups for p in group]


def descend(self, groups, scale=1.0):
    for group, params in zip(self.param_groups, groups, strict=True):
        for p in params:
            p.sub_(p.grad * scale, alpha=group["lr"])


# ---------------------------------------------------------------- sums that are used in the same step


def stacked(self, groups):
    norm = torch.stack([p.grad.norm() for p in flat(groups)]).norm()
    descend(self, groups, (1.0 / (norm + 1e-6)).clamp(max=1.0))


def torchs_own(self, groups):
    torch.nn.utils.clip_grad_norm_(flat(groups), 1.0)
    descend(self, groups)


def foreach(self, groups):
    norms = torch._foreach_norm([p.grad for p in flat(groups)])
    norm = torch.linalg.vector_norm(torch.stack(norms))
    grads = torch._foreach_div([p.grad for p in flat(groups)], norm + 1)
    torch._foreach_sub_(flat(groups), grads)


def of_python(self, groups):
    norm = sum(p.grad.pow(2).sum() for p in flat(groups)).sqrt()
    descend(self, groups, 1 / (1 + norm))


def read_numbers(self, groups):
    total = 0.0
    for p in flat(groups):
        total += p.grad.norm().item() ** 2
    descend(self, groups, min(1.0, 1 / (math.sqrt(total) + 1e-6)))


def accumulated(self, groups):
    total = torch.zeros(())
    for p in flat(groups):
        total.add_(p.grad.abs().sum(), alpha=0.5)
    for p in flat(groups):
        total += (p * p.grad).sum()
        total -= p.abs().sum()
    descend(self, groups, torch.sigmoid(total))


def of_one_element(self, groups):
    total = torch.tensor([0.0])
    view = total.detach()
    for p in flat(groups):
        torch._foreach_add_([total], [p.grad.abs().sum()])
    descend(self, groups, 1 / (1 + view.squeeze(0)))


def mean_of_all(self, groups):
    count, total = 0, 0.0
    for p in flat(groups):
        count += p.numel()
        total = total + p.grad.square().sum()
    if count == 0:
        raise ValueError("no elements")
    descend(self, groups, (total / count + 1e-8).rsqrt())


def counted_at_once(self, groups):
    params = flat(groups)
    rms = math.sqrt(sum(p.grad.square().sum().item() for p in params) / sum(p.numel() for p in params))
    descend(self, groups, 1 / (rms + 1e-8))


def one_of_another(self, groups):
    norm = torch.stack([p.grad.norm() for p in flat(groups)]).norm()
    for p in flat(groups):
        p.grad.div_(norm + 0.1)
    apart = sum((p - p.grad).square().sum() for p in flat(groups))
    descend(self, groups, 1 / (1 + apart))


def of_each_group(self, groups):
    for group, params in zip(self.param_groups, groups, strict=True):
        norm = sum(p.grad.norm() for p in params)
        for p in params:
            p.sub_(p.grad / (norm + 1), alpha=group["lr"])


def beside_scratch(self, groups):
    norm = sum(p.grad.norm() for p in flat(groups))
    for p in flat(groups):
        own = torch.zeros(())
        own.add_(p.norm())
        p.sub_(p.grad / (norm + own + 1))


def into_state(self, groups):
    norm = sum(p.grad.norm() for p in flat(groups))
    for p in flat(groups):
        state = self.state[p]
        if not state:
            state["seen"] = torch.zeros(())
        state["seen"].lerp_(norm, 0.1)
        p.sub_(p.grad * state["seen"], alpha=0.01)


def once_more(self, groups):
    total = sum(p.grad.abs().sum() for p in flat(groups))
    for p in flat(groups):
        total = total + p.abs().sum()
    numbers = 0.0
    for p in flat(groups):
        numbers += p.sum().item()
        numbers -= p.grad.sum().item() * 0.5
    descend(self, groups, 1 / (1 + total + abs(numbers)))


def branches(self, groups):
    norm = torch.stack([p.grad.norm() for p in flat(groups)]).norm()
    descend(self, groups, 1 / norm if norm > 3.3 else 2.0)


COMPLETE = [
    stacked, torchs_own, foreach, of_python, read_numbers, accumulated, of_one_element, mean_of_all, counted_at_once,
    one_of_another, of_each_group, beside_scratch, into_state, branches, once_more,
]  # fmt: skip


def two_groups(kind):
    return lambda params: kind([dict(params=params[:2]), dict(params=params[2:], lr=0.05)])


@pytest.mark.parametrize("body", COMPLETE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("missing", [False, True], ids=["", "missing"])
@pytest.mark.parametrize("groups", [1, 2])
def test_sums_fuse_and_are_what_the_class_makes(body, missing, groups):
    kind = whole(body)
    opt = compared(kind if groups == 1 else two_groups(kind), shapes=SHAPES, steps=12, missing=missing)
    explained = opt.explain()
    assert explained.launches and not explained.eager, explained


@pytest.mark.parametrize("body", [stacked, mean_of_all, of_each_group], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes(body, dtype):
    ours, opt = run(whole(body), shapes=SHAPES, dtype=dtype)
    theirs, _ = run(whole(body), shapes=SHAPES, dtype=dtype, fuse=False)
    assert not opt.explain().eager
    close = 1e-12 if dtype == torch.float64 else 0.03
    assert all(torch.allclose(a, b, rtol=close, atol=close) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shapes", [((4,),), ((), (3,)), ((1,), (1, 1), (2,))], ids=str)
@pytest.mark.parametrize(
    "body", [stacked, read_numbers, of_one_element, mean_of_all], ids=lambda f: f.__name__
)
def test_few_and_small_parameters(body, shapes):
    assert not compared(whole(body), shapes=shapes).explain().eager


def test_what_a_parameter_adds_up_for_itself_is_no_sum_over_others():
    def scratch(self, groups):
        for p in flat(groups):
            own = torch.zeros(())
            own.add_(p.grad.norm())
            both = sum([p.norm(), own])
            p.sub_(p.grad / (1 + both), alpha=0.1 * p.shape[0])

    opt = compared(whole(scratch), shapes=((5,), (3, 4), (2, 3)))
    assert "sum_0" not in opt.kernel_source() and not opt.explain().eager


# ---------------------------------------------------------------- what the optimizer keeps of them


def keeps_a_number(self, groups):
    norm = sum(p.grad.norm().item() for p in flat(groups))
    group = self.param_groups[0]
    group["seen"] = max(group.get("seen", 0.0), norm)
    self.largest = max(self.largest, norm) * 0.99
    descend(self, groups, 1 / (1 + group["seen"]))


def keeps_a_tensor(self, groups):
    self.tensor.mul_(0.9)
    for p in flat(groups):
        self.tensor.add_((p * p.grad).sum(), alpha=0.1)
    descend(self, groups, torch.tanh(self.tensor))


def makes_tensors(self, groups):
    total = torch.zeros(1)
    for p in flat(groups):
        total.add_(p.grad.norm())
    for group in self.param_groups:
        group["last"] = total
        group["pair"] = (total.item(), 1.0)
    descend(self, groups, 1 / (1 + total))


def goes_back(self, groups):
    """Nothing is done where the sum is small."""
    total = sum(p.grad.sum() for p in flat(groups))
    self.steps_seen += 1
    if total < 0:
        return
    d = self.d
    found = (total / 10).item()
    if d < 0.2:
        d = max(d, found)
    self.d = min(d * 1.1, d + found)
    self.steps_done += 1
    descend(self, groups, d)


def prodigy(self, groups):
    group = self.param_groups[0]
    if "numerator" not in group:
        group["numerator"] = torch.tensor([0.0])
    numerator, denominator, d = group["numerator"], torch.tensor([0.0]), group["d"]
    numerator.mul_(0.9)
    for p in flat(groups):
        state = self.state[p]
        if not state:
            state.update(start=p.clone(), s=torch.zeros_like(p))
        numerator.add_(torch.dot(p.grad.flatten(), (state["start"] - p).flatten()), alpha=d)
        state["s"].mul_(0.9).add_(p.grad, alpha=d)
        denominator.add_(state["s"].abs().sum())
    if denominator == 0:
        return
    found = (numerator / denominator).item()
    if d == group["d0"]:
        d = max(d, found)
    largest = max(group["largest"], found)
    d = min(largest, d * 1.5)
    for group, params in zip(self.param_groups, groups, strict=True):
        group.update(numerator=numerator, denominator=denominator, d=d, largest=largest, found=found)
        for p in params:
            p.sub_(p.grad.sign(), alpha=d)


def counts_what_is_done(self, groups):
    """As D-Adaptation: a step that goes back before its end is counted in no state."""
    total = sum(p.grad.sum().item() for p in flat(groups))
    for p in flat(groups):
        state = self.state[p]
        if not state:
            state.update(step=0, share=1.0, last=torch.zeros_like(p))
        state["last"].mul_(0.5).add_(p.grad)
    if total < 0:
        return
    for p in flat(groups):
        state = self.state[p]
        state["step"] += 1
        state["share"] = state["share"] * 0.5 if total > 2 else 0.25
        p.sub_(state["last"], alpha=state["share"] / (1 + state["step"]))


def flattened(self, groups):
    """As Prodigy: some of the state has a parameter's elements in one row."""
    total = 0.0
    for p in flat(groups):
        state = self.state[p]
        if not state:
            state.update(s=torch.zeros_like(p.flatten()), start=p.flatten()[:: self.stride].clone())
        grad = p.grad.flatten()[:: self.stride]
        total += torch.dot(grad, state["start"] - p.data.flatten()[:: self.stride]).item()
        state["s"].mul_(0.9).add_(p.grad.flatten(), alpha=0.1)
        p.sub_(state["s"].view_as(p))
    self.largest = max(self.largest, total)
    descend(self, groups, 1 / (1 + self.largest))


def started(self, params):
    Base.__init__(self, params, d=1e-3, d0=1e-3, largest=1e-3)
    self.largest, self.tensor, self.d, self.steps_seen, self.steps_done = 0.0, torch.tensor(1.0), 0.01, 0, 0
    self.stride = 1


KEPT = [keeps_a_number, keeps_a_tensor, makes_tensors, goes_back, prodigy, counts_what_is_done, flattened]


@pytest.mark.parametrize("body", KEPT, ids=lambda f: f.__name__)
@pytest.mark.parametrize("missing", [False, True], ids=["", "missing"])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_is_kept_of_a_sum_is_what_the_class_keeps(body, missing, groups):
    kind = whole(body, __init__=started)
    opt = compared(kind if groups == 1 else two_groups(kind), shapes=SHAPES, steps=14, missing=missing)
    explained = opt.explain()
    assert explained.launches and not explained.eager, explained


def test_counts_are_of_parameters_that_stepped():
    """Of each its own: some have no gradient now and then, and some steps go back."""
    found = []
    for fuse in (False, True):
        params, opt = run(whole(counts_what_is_done), shapes=SHAPES, steps=30, missing=True, fuse=fuse)
        found.append([(opt.state[p]["step"], opt.state[p]["share"]) for p in params])
    assert found[0] == found[1]
    assert len({step for step, *_ in found[0]}) > 1 and all(0 < step < 20 for step, *_ in found[0])
    assert not opt.explain().eager and opt.explain().steps.startswith("27 of 28"), opt.explain().steps


def test_counts_of_state_from_a_checkpoint_that_differ():
    found = []
    for fuse in (lambda opt: opt, fusedopt.fuse):
        params, opt = run(whole(counts_what_is_done), shapes=SHAPES, fuse=False)
        for k, p in enumerate(params):
            opt.state[p]["step"] = 10 * k
        fuse(opt)
        for i in range(5):
            for p in params:
                p.grad = torch.full_like(p, 0.1 + i)
            opt.step()
        found.append([opt.state[p]["step"] for p in params])
    assert found[0] == found[1] == [5, 15, 25, 35, 45]
    assert opt.explain().launches and not opt.explain().eager


@pytest.mark.filterwarnings("ignore:fusedopt")
def test_a_flattened_tensor_is_the_one_that_was_there():
    """It keeps its shape and identity; memory in another order, and every other element, are the class's own step."""
    kind = whole(flattened, __init__=started)
    params, opt = run(kind, shapes=((4, 3), (2, 3, 2)))
    before = [opt.state[p]["s"] for p in params]
    opt.step()
    for p, s in zip(params, before, strict=True):
        assert opt.state[p]["s"] is s and s.shape == (p.numel(),)
    assert opt.explain().launches and opt.explain().steps.startswith("7 of 8")

    def turn(opt):
        for p in opt.param_groups[0]["params"]:
            p.data = p.data.to(memory_format=torch.channels_last)

    def skipping(self, params):
        started(self, params)
        self.stride = 2

    assert compared(kind, shapes=((2, 3, 2, 2),) * 2, poke=turn, steps=12).explain().eager
    assert compared(whole(flattened, __init__=skipping)).explain().eager


def test_a_tensor_that_groups_share_is_shared():
    _, opt = run(two_groups(whole(makes_tensors, __init__=started)), shapes=SHAPES)
    first, second = (group["last"] for group in opt.param_groups)
    assert first is second and opt.explain().launches
    opt.step()
    assert opt.param_groups[0]["last"] is opt.param_groups[1]["last"] is not first


@pytest.mark.parametrize("body", [keeps_a_number, prodigy], ids=lambda f: f.__name__)
def test_a_checkpoint_goes_on(body):
    kind = whole(body, __init__=started)
    ends = []
    for fuse in (fusedopt.fuse, lambda opt: opt):
        params, opt = run(kind, shapes=SHAPES, steps=6, fuse=False)
        other = fuse(kind([torch.nn.Parameter(p.detach().clone()) for p in params]))
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        mine = other.param_groups[0]["params"]
        for i in range(6):
            for k, p in enumerate(mine):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * i + k))
            other.step()
        ends.append((mine, other.state_dict()["param_groups"]))
    (ours, kept), (theirs, keeps) = ends
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))
    assert all(
        math.isclose(float(kept[0][k]), float(v), rel_tol=1e-5)
        for k, v in keeps[0].items()
        if k in ("d", "seen")
    )


def test_more_parameters_than_were_traced():
    """A parameter whose kind had one member is joined by another."""

    def grown(fuse):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(4)) for _ in range(3)]
        opt = whole(keeps_a_number, __init__=started)(params)
        if fuse:
            fusedopt.fuse(opt)
        for i in range(9):
            for k, p in enumerate(params):
                p.grad = torch.full((4,), i + k + 1.0) if k <= i // 3 else None
            opt.step()
        return params, opt

    (theirs, eager), (ours, opt) = grown(False), grown(True)
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))
    assert math.isclose(opt.largest, eager.largest, rel_tol=1e-6) and not opt.explain().eager


def test_gradients_are_clipped_before_they_are_summed():
    ours, opt = run(whole(stacked), shapes=SHAPES, max_grad_norm=0.5)
    torch.manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    eager = whole(stacked)(theirs)
    for i in range(8):
        for k, p in enumerate(theirs):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * i + k))
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        eager.step()
        eager.param_groups[0]["lr"] *= 0.9
    assert opt.explain().launches
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_samples_of_steps_are_of_all_parameters():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, opt = run(whole(stacked), shapes=SHAPES, steps=12, check=3)
    assert opt.explain().launches


def test_steps_are_bound():
    _, opt = run(whole(prodigy, __init__=started), shapes=SHAPES, steps=20)
    assert opt.explain().steps.startswith("18 of 19"), opt.explain().steps


# ---------------------------------------------------------------- what has no fused form


def as_it_grows(self, groups):
    total = 0.0
    for p in flat(groups):
        total = total + p.grad.norm()
        p.sub_(p.grad / total)


def largest_of_all(self, groups):
    largest = max(p.grad.abs().max() for p in flat(groups))
    descend(self, groups, 1 / largest)


def largest_of_stacked(self, groups):
    largest = torch.stack([p.grad.abs().max() for p in flat(groups)]).max()
    descend(self, groups, 1 / largest)


def first_alone(self, groups):
    total = flat(groups)[0].grad.norm() + 0
    descend(self, groups, total)


def how_many(self, groups):
    descend(self, groups, 1 / len(flat(groups)))


def decided_by_each(self, groups):
    total = 0.0
    for p in flat(groups):
        norm = p.grad.norm().item()
        total += norm if norm > 2 else 0.0
    descend(self, groups, 1 / (1 + total))


def mean_of_norms(self, groups):
    descend(self, groups, torch.stack([p.grad.norm() for p in flat(groups)]).mean())


def decided_by_each_before(self, groups):
    """Whether it comes to the branch on the sum at all depends on the parameter."""
    norm = sum(p.grad.norm() for p in flat(groups)).item()
    for p in flat(groups):
        if p.norm() > 1.5:
            p.sub_(p.grad, alpha=0.1)
        elif norm > 7:
            p.sub_(p.grad / norm)


def of_the_first_two(self, groups):
    norm = sum(p.grad.norm() for p in flat(groups)[:2])
    descend(self, groups, 1 / (1 + norm))


EAGER = [
    decided_by_each_before,
    of_the_first_two,
    as_it_grows,
    largest_of_all,
    largest_of_stacked,
    first_alone,
    how_many,
    decided_by_each,
    mean_of_norms,
]


@pytest.mark.parametrize("body", EAGER, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:fusedopt")
def test_what_is_no_sum_is_the_classs_own_step(body):
    assert compared(whole(body), shapes=SHAPES, steps=8).explain().eager
