"""`fusedopt.fuse` on classes of our own that multiply and decompose matrices: torch calls, and fused programs around.

Each construct is what the class itself does, or is announced.
"""

import re
from functools import partial

import pytest
import pytorch_optimizer
import torch
from helpers import needs_extension
from test_fuse import Base, compared, rule, run

import fusedopt
from fusedopt.classes import buckets
from fusedopt.trace import cuts

SHAPES = ((5,), (4, 6), (6, 4), (4, 6), (5, 5), (4, 3, 3, 3))


def newton_schulz(x, steps=2):
    for _ in range(steps):
        x = 1.5 * x - 0.5 * (x @ x.mT) @ x
    return x


def momentum(p, g, s):
    m = s.setdefault("m", torch.zeros_like(p))
    return m.lerp_(p.grad, 1 - g["betas"][0])


# ---------------------------------------------------------------- what fuses


def orthogonal(self, p, g, s):
    u = momentum(p, g, s)
    if p.ndim > 1:
        u = u.view(len(u), -1)
        tall = u.size(0) > u.size(1)
        u = u.T if tall else u
        u = newton_schulz(u / u.norm())
        u = (u.T if tall else u).view_as(p)
    p.mul_(1 - g["lr"] * g["weight_decay"]).add_(u, alpha=-g["lr"])


def in_place_and_out(self, p, g, s):
    x = p.grad.clone().view(len(p), -1)
    x = x.T
    x.div_(x.norm().clamp_(min=1e-7))
    a = torch.empty((x.size(0), x.size(0)), dtype=x.dtype, device=x.device)
    b = torch.empty_like(a)
    torch.mm(x, x.mT, out=a)
    torch.addmm(a, a, a, beta=0.5, alpha=g["lr"], out=b)
    a.copy_(b).mul_(2)
    p.sub_((a @ x).sub_(b @ x).t_().reshape(p.shape), alpha=g["lr"])


def factors(self, p, g, s):
    """Kronecker factors, some as large as the parameter, with roots of them now and then."""
    if not s:
        s.update({f"l{d}": torch.eye(n) * 0.1 for d, n in enumerate(p.shape)}, step=0)
        s.update({f"r{d}": torch.eye(n) for d, n in enumerate(p.shape)})
    s["step"] += 1
    u = p.grad
    for d, n in enumerate(p.shape):
        flat = p.grad.movedim(d, 0).reshape(n, -1)
        s[f"l{d}"].addmm_(flat, flat.t(), beta=g["betas"][0])
        if s["step"] % 4 == 0:
            values, vectors = torch.linalg.eigh(s[f"l{d}"])
            s[f"r{d}"].copy_((vectors * values.clamp(min=1e-3).pow(-0.25)) @ vectors.mT)
        u = torch.tensordot(u, s[f"r{d}"], dims=[[0], [0]])
    p.sub_(u, alpha=g["lr"])


def lists(self, p, g, s):
    """State in lists, with empty ones where a dimension has none."""
    if not s:
        s["covariance"] = [torch.eye(n) if n < 6 else [] for n in p.shape]
        s["m"] = torch.zeros_like(p)
    s["m"].lerp_(p.grad, 0.1)
    u = s["m"]
    for c in s["covariance"]:
        u = torch.tensordot(u, c, dims=[[0], [1]]) if len(c) else u.permute(*range(1, u.ndim), 0)
    for d, c in enumerate(s["covariance"]):
        if len(c):
            others = [k for k in range(p.ndim) if k != d]
            c.lerp_(torch.tensordot(p.grad, p.grad, dims=[others, others]), 0.05)
    p.sub_(u, alpha=g["lr"])


def replaces_factors(self, p, g, s):
    flat = p.grad.reshape(len(p), -1)
    s["c"] = flat @ flat.mT + s.get("c", torch.zeros(len(p), len(p)))
    p.sub_((s["c"] @ flat).view_as(p) / (1 + s["c"].trace()), alpha=g["lr"])


def ridge(self, p, g, s):
    """Constants of the class's own making."""
    flat = p.grad.reshape(len(p), -1)
    gram = flat @ flat.T + g["betas"][0] * torch.eye(len(p), dtype=p.dtype, device=p.device)
    p.sub_(torch.linalg.solve(gram, flat).view(p.shape), alpha=g["lr"])


def decided_by_a_norm(self, p, g, s):
    u = p.grad.view(len(p), -1)
    u = (u @ u.T) @ u
    norm = u.norm().item()
    if norm > 40:
        u = u * (40 / norm)
    if u.abs().max() < 8:
        u = u + 1
    p.sub_(u.view_as(p), alpha=g["lr"])


def sorted_rows(self, p, g, s):
    order = p.grad.view(len(p), -1).abs().sum(1).argsort()
    p.sub_(p.grad.index_select(0, order).softmax(0), alpha=g["lr"])


COMPLETE = [
    orthogonal, in_place_and_out, factors, lists, replaces_factors, ridge, decided_by_a_norm, sorted_rows,
]  # fmt: skip


@pytest.mark.parametrize("one", COMPLETE, ids=lambda f: f.__name__)
def test_matrix_calls_are_torchs_between_fused_programs(one):
    opt = compared(rule(one), shapes=SHAPES, missing=one in (orthogonal, lists))
    found = opt.explain()
    assert found.launches > 1 and found.calls and not found.eager, found
    assert "given_0" in opt.kernel_source()


@pytest.mark.parametrize("one", COMPLETE, ids=lambda f: f.__name__)
def test_calls_for_each_take_the_class_s_own_tensors(one, monkeypatch):
    monkeypatch.setattr(cuts, "ALONE", 1)
    opt = compared(rule(one), shapes=SHAPES, missing=one in (orthogonal, lists))
    found = opt.explain()
    assert found.calls and all("for each" in each for each in found.calls) and not found.eager, found


class Counts(dict):
    """How often a step calls each of torch's operators, as its profiler sees it."""

    def __init__(self, opt):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            opt.step()
        super().__init__({each.key.removeprefix("aten::"): each.count for each in found.key_averages()})

    def of(self, *names):
        return sum(self.get(name, 0) for name in names)


PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "mv")
DECOMPOSED = (
    "linalg_qr",
    "linalg_eigh",
    "_linalg_eigh",
    "linalg_svd",
    "_linalg_svd",
    "argsort",
    "index_select",
)


@pytest.mark.parametrize(
    ("kind", "rebound"),
    [
        (pytorch_optimizer.SOAP, 0),
        (
            partial(pytorch_optimizer.SOAP, precondition_frequency=1),
            3,
        ),  # its bases, and the moments in their order
        (partial(pytorch_optimizer.SOAP, precondition_frequency=2), 3),
        (
            pytorch_optimizer.Shampoo,
            4,
        ),  # its statistics, which it updates in place: as an input, and as state
        (rule(orthogonal), 1),
        (rule(factors), 4),
    ],
    ids=["SOAP", "SOAP1", "SOAP2", "Shampoo", "orthogonal", "factors"],
)
@pytest.mark.parametrize("shape", [(192, 192), (160, 224)], ids=str)
def test_large_matrices_are_multiplied_and_copied_no_more_often_than_by_the_class(kind, rebound, shape):
    steps = []
    for fuse in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
        opt = kind(params, lr=1e-3)
        opt = fusedopt.fuse(opt) if fuse else opt
        counts = []
        for t in range(9):
            for p in params:
                p.grad = torch.randn(shape)
            if t < 5:
                opt.step()
            else:
                counts.append(Counts(opt))
        steps.append(counts)
    assert opt.explain().calls and not opt.explain().eager
    for theirs, ours in zip(*steps, strict=True):
        assert ours.of(*PRODUCTS) == theirs.of(*PRODUCTS) > 0
        for name in DECOMPOSED:
            assert ours.of(name) == theirs.of(name)
        assert ours.of("copy_") <= theirs.of("copy_") + len(params) * rebound
        assert ours.of("lerp", "lerp_") <= theirs.of("lerp", "lerp_")
        assert ours.of("bmm", "stack", "cat") == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_calls_are_in_the_class_s_dtype(dtype):
    kind = rule(orthogonal)
    (theirs, _), (ours, opt) = (
        run(kind, steps=4, fuse=f, shapes=SHAPES[1:4], dtype=dtype) for f in (False, True)
    )
    assert opt.explain().calls and not opt.explain().eager
    for a, b in zip(theirs, ours, strict=True):
        assert torch.allclose(a, b, atol=1e-12 if dtype == torch.float64 else 0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_calls_take_constants_of_narrow_dtypes(dtype):
    def shifted(self, p, g, s):
        u = (p.grad / p.grad.norm()).to(dtype)
        a = torch.addmm(torch.ones(len(p), len(p), dtype=dtype), u, u.mT) + torch.eye(len(p), dtype=dtype)
        p.sub_((a @ u).to(p.dtype), alpha=g["lr"])

    kind = rule(shifted)
    (theirs, _), (ours, opt) = (run(kind, steps=4, fuse=f, shapes=SHAPES[1:4]) for f in (False, True))
    assert opt.explain().calls and not opt.explain().eager, opt.explain()
    assert all(torch.allclose(a, b, atol=1e-2) for a, b in zip(theirs, ours, strict=True))


@needs_extension
def test_repeated_steps_take_no_python_for_each_tensor():
    _, opt = run(rule(lists), steps=8, shapes=SHAPES)
    assert str(opt.explain().steps).startswith("6 of 7 without")


def test_matrices_of_one_shape_are_multiplied_at_once():
    _, opt = run(rule(orthogonal), shapes=[(4, 6)] * 30)
    assert {each.partition(": ")[0] for each in opt.explain().calls} == {"30 tensors of 4×6, for 30 at once"}


def test_large_matrices_are_taken_one_by_one():
    _, opt = run(rule(orthogonal), steps=3, shapes=[(200, 200)] * 2)
    assert {each.partition(": ")[0] for each in opt.explain().calls} == {"2 tensors of 200×200, for each"}


def test_products_of_narrow_floats_are_stacked_up_to_larger_sizes():
    def narrow(self, p, g, s):
        u = newton_schulz((p.grad / p.grad.norm()).bfloat16())
        p.sub_(u.float(), alpha=g["lr"])

    how = {}
    for shape in ((256, 320), (1024, 520)):
        _, opt = run(rule(narrow), steps=2, shapes=[shape] * 2)
        (how[shape],) = {each.partition(": ")[0].partition(", ")[2] for each in opt.explain().calls}
    assert how == {(256, 320): "for 2 at once", (1024, 520): "for each"}


def test_sums_of_one_term_are_elementwise():
    def factored(self, p, g, s):
        row, column = p.grad.square().mean(-1, keepdim=True), p.grad.square().mean(-2, keepdim=True)
        p.sub_(p.grad / (row @ column).sqrt().add(0.1), alpha=g["lr"])

    opt = compared(rule(factored), shapes=((4, 6), (5, 5)))
    assert opt.explain().launches and not opt.explain().calls and not opt.explain().eager


SCALE = 1.0


class Projector:
    """Keeps what it projects to, and for how long it does."""

    def __init__(self, rank):
        self.rank, self.left, self.basis = rank, 0, None

    @property
    def scale(self):
        return SCALE

    def __call__(self, x):
        if not self.left:
            self.left, self.basis = 3, torch.linalg.svd(x, full_matrices=False)[0][:, : self.rank].clone()
        self.left -= 1
        return self.scale * (self.basis @ (self.basis.mT @ x))


def projects(self, p, g, s):
    """An object in the state, with a tensor of another shape, and numbers that index and count."""
    if not s:
        s["projector"] = Projector(2)
    p.sub_(s["projector"](p.grad), alpha=g["lr"])


def asks_an_object(self, p, g, s):
    if self.calls == 1:
        self.object = Projector(1)
    p.sub_(p.grad, alpha=g["lr"] * self.object.scale)


@pytest.mark.parametrize("one", [projects, asks_an_object], ids=lambda f: f.__name__)
@pytest.mark.parametrize("changes", [False, True], ids=["", "changes"])
def test_objects_of_other_classes_in_state_and_attributes(one, changes, monkeypatch):
    """What their code reads around it may change, too."""
    results = []
    for fuse in (False, True):
        monkeypatch.setitem(globals(), "SCALE", 1.0)
        poke = (lambda opt: globals().update(SCALE=0.5)) if changes else None
        results.append(run(rule(one), steps=9, fuse=fuse, shapes=((4, 6), (4, 6), (6, 4)), poke=poke))
    (theirs, eager), (ours, opt) = results
    assert not opt.explain().eager and opt.explain().launches
    for a, b in zip(theirs, ours, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
        mine, own = (vars(o.state[p].get("projector", Projector(0))) for o, p in ((opt, b), (eager, a)))
        assert mine.keys() == own.keys() and (mine["left"], mine["rank"]) == (own["left"], own["rank"])
        assert one is asks_an_object or torch.allclose(mine["basis"], own["basis"], atol=1e-5)


def test_an_object_of_another_type_is_noticed():
    class Other(Projector):
        def __call__(self, x):
            return 0.5 * super().__call__(x)

    def replaced(opt):
        for s in opt.state.values():
            other = Other(2)
            vars(other).update(vars(s["projector"]))
            s["projector"] = other

    shapes = ((4, 6), (4, 6))
    (theirs, _), (ours, opt) = (
        run(rule(projects), steps=9, fuse=f, shapes=shapes, poke=replaced) for f in (False, True)
    )
    assert not opt.explain().eager and opt.explain().launches
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(theirs, ours, strict=True))


@pytest.mark.filterwarnings("ignore:fusedopt")
def test_steps_that_have_no_trace_now_and_then_are_tried_ever_less_often(monkeypatch):
    def now_and_then(self, p, g, s):
        m = p.grad @ p.grad.mT
        p.sub_(m @ p.grad, alpha=1e-2 * g["lr"])
        if g["step"] % 4 == 0:
            p.copy_(p.flip(0).t().contiguous().t().apply_(lambda x: x) * 0.5)

    traced = []
    monkeypatch.setattr(
        "fusedopt.classes.buckets.trace_step", lambda *a, f=buckets.trace_step: traced.append(1) or f(*a)
    )
    theirs, _ = run(rule(now_and_then), steps=80, fuse=False, shapes=((4, 6), (4, 6)))
    ours, _ = run(rule(now_and_then), steps=80, shapes=((4, 6), (4, 6)))
    assert len(traced) < 10
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(theirs, ours, strict=True))


class Stacking(Base):
    """Makes one stack of all matrices with so many elements, as classes do for products of all at once."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            stacks = {}
            for p in group["params"]:
                if p.grad is not None:
                    turned = p.size(0) > p.size(1)
                    stacks.setdefault(p.numel(), []).append((p, turned, p.grad.mT if turned else p.grad))
            for found in stacks.values():
                matrices = [m for _, _, m in found]
                x = matrices[0] if len(found) == 1 else torch.stack(matrices)
                x = x.to(torch.float64, copy=True) if x.dtype == torch.bfloat16 else x.clone()
                x.div_(x.norm(dim=(-2, -1), keepdim=True).clamp_min_(1e-7))
                multiply, add = (torch.mm, torch.addmm) if x.ndim == 2 else (torch.bmm, torch.baddbmm)
                a = torch.empty((*x.shape[:-1], x.size(-2)), dtype=x.dtype)
                b, c = torch.empty_like(a), torch.empty_like(x)
                for _ in range(2):
                    multiply(x, x.mT, out=a)
                    add(a, a, a, beta=-0.5, alpha=0.1, out=b)
                    add(x, b, x, beta=1.5, out=c)
                    x, c = c, x
                for (p, turned, _), u in zip(found, [x] if len(found) == 1 else x.unbind(), strict=True):
                    p.sub_(u.mT if turned else u, alpha=group["lr"])


@pytest.mark.parametrize("shapes", [((4, 6), (6, 4), (4, 6)), ((4, 6), (5, 5)), ((3, 3),) * 5], ids=str)
def test_stacks_of_several_parameters(shapes):
    opt = compared(Stacking, shapes=shapes, missing=True)
    assert opt.explain().launches and opt.explain().calls and not opt.explain().eager, opt.explain()


def test_clipping_scales_what_calls_are_given():
    torch.manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (5, 5))]
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    opts = [rule(factors)(params) for params in (theirs, ours)]
    for i in range(6):
        for params in (theirs, ours):
            for k, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * i + k))
        if i == 2:
            fusedopt.fuse(opts[1], max_grad_norm=0.5)
        if i >= 2:
            torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        for opt in opts:
            opt.step()
    assert opts[1].explain().calls and not opts[1].explain().eager
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(theirs, ours, strict=True))


def test_a_call_that_fails_leaves_the_step_to_the_class():
    """Which may know what to do then."""

    def falls_back(self, p, g, s):
        c = p.grad @ p.grad.mT + (5 - g["step"]) * torch.eye(len(p))
        try:
            c = torch.linalg.cholesky(c)
        except RuntimeError:
            self.failures = self.failures + 1
        p.sub_(c @ p.grad, alpha=1e-2 * g["lr"])

    kind = rule(
        falls_back,
        failures=0,
        __init__=lambda self, params: (Base.__init__(self, params), vars(self).update(failures=0))[0],
    )
    with pytest.warns(RuntimeWarning, match="falls_back.step runs as it was written"):
        opt = compared(kind, steps=12, shapes=((4, 6), (4, 6)))
    assert opt.failures


# ---------------------------------------------------------------- what does not, and is right


def draws(self, p, g, s):
    m = p.grad.mT
    p.sub_((m + 0.01 * torch.rand_like(m)).mT, alpha=g["lr"])


def writes_under_a_view(self, p, g, s):
    m = p.mT
    p.mul_(0.5)
    p.sub_(m.mT.clone(), alpha=g["lr"])


def writes_through_a_view(self, p, g, s):
    m = p.mT
    m.mul_(0.5)
    p.sub_(p.grad, alpha=g["lr"])


def writes_through_what_may_be_a_view(self, p, g, s):
    m = p.mT.mT.reshape(p.shape)
    m.mul_(0.5)
    p.sub_(p.grad, alpha=g["lr"])


def keeps_a_view(self, p, g, s):
    s["view"] = p.mT
    p.sub_(p.grad @ s["view"] @ p.grad, alpha=g["lr"])


def keeps_one_twice(self, p, g, s):
    if s:
        s["a"].mul_(0.9)
    product = p.grad @ p.grad.mT
    p.sub_((s["b"] if s else product) @ p.grad, alpha=g["lr"])
    s["a"] = s["b"] = product


def decides_about_factors(self, p, g, s):
    c = s.setdefault("c", torch.zeros(len(p), len(p)))
    if p.grad.norm() > 4.5:
        c.addmm_(p.grad, p.grad.mT)
    p.sub_(c @ p.grad, alpha=g["lr"])


def used_by_its_old_shape(self, p, g, s):
    m = p.grad @ p.grad.mT @ p.grad
    n = m.t_()
    p.sub_(m.mT + n.mT, alpha=g["lr"])


def whole_numbers(self, p, g, s):
    s["seen"] = s.get("seen", torch.zeros(3, dtype=torch.int64)) + 1
    p.sub_(p.grad * s["seen"].sum(), alpha=g["lr"])


def in_float64(self, p, g, s):
    p.sub_(p.grad.double().exp().float(), alpha=g["lr"])


def mixes(self, p, g, s):
    p.sub_(p.grad @ g["params"][0].mT @ p.grad, alpha=g["lr"])


def both_sums_and_products(self, p, g, s):
    total = sum(q.grad.sum() for q in g["params"] if q.grad is not None)
    p.sub_(p.grad @ p.grad.mT @ p.grad * total, alpha=1e-3 * g["lr"])


def shares_a_factor(self, p, g, s):
    s["c"] = self.common = getattr(self, "common", torch.zeros(5, 5))
    s["c"].add_(p.grad.sum())
    p.sub_(p.grad * s["c"].trace(), alpha=1e-2 * g["lr"])


def two_of_one_value(self, p, g, s):
    """A factor and what it is copied to are the same numbers, and stay apart."""
    row = p.grad.sum(1)
    s["a"], s["b"] = s.get("a", torch.zeros(len(p), 1)), s.get("b", torch.zeros(len(p), 1))
    s["a"] = s["b"] = row[:, None] @ row[None, :1]
    p.sub_(p.grad + s["a"], alpha=g["lr"])


EAGER = [
    draws, writes_under_a_view, writes_through_a_view, writes_through_what_may_be_a_view, keeps_a_view, keeps_one_twice,
    decides_about_factors, used_by_its_old_shape, whole_numbers, in_float64, mixes, both_sums_and_products,
    shares_a_factor, two_of_one_value,
]  # fmt: skip


@pytest.mark.parametrize("one", EAGER, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:fusedopt")
def test_what_calls_cannot_be_recorded_for_is_the_class_s_own_step(one):
    opt = compared(rule(one), shapes=((4, 6), (4, 6), (5, 3)) if one is not mixes else ((4, 6), (4, 6)))
    (eager,) = opt.explain().eager
    assert re.match(r"test_(matrices|fuse)\.py:\d+: ", eager.reason) and "Remedy: " in eager.reason
    assert not opt.explain().launches
    differs = "what kernels would do differs"
    assert differs not in eager.reason, "found by the comparison only"
