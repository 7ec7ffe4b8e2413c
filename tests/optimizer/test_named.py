"""Every named optimizer against its peer: fastai.optimizer's or torch.optim's, over 100 steps.

Tolerance by competition: the peer runs in float64 (the truth) and in float32. Ours may be off from the truth
by at most twice the peer's own float32 error, or 2 ulp. `test_mutation_is_noticed` shows that the comparison
can fail.
"""

import importlib
import inspect
import math
import warnings
from contextlib import contextmanager
from functools import cache, partial

import pytest
import torch

import fusedopt
from fusedopt import callbacks, optim, table
from fusedopt.optimizer import named

with warnings.catch_warnings():
    # fastai scripts a function at import; torch deprecates that, and fastai is not ours to change
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=DeprecationWarning)
    import fastai.optimizer as fastai_optimizer

BACKENDS = ["reference", "cpp"]
STEPS, SNAPSHOTS = 100, (1, 10, 30, 100)
SHAPES = [(1,), (7,), (3, 5), (130,), (4,)]
LAGGING, ZERO = 1, 4  # a parameter that misses some gradients, and one that starts at zero (no norm)

CASES = [pytest.param(r, v, id=f"{r.face}-{r.name}-{v.id}") for r in table.TABLE for v in r.variants]
FIRST_CASES = [pytest.param(r, r.variants[0], id=f"{r.face}-{r.name}") for r in table.TABLE]
ROWS = [pytest.param(r, id=f"{r.face}-{r.name}") for r in table.TABLE]
OURS = {
    n
    for n in optim.__all__
    if isinstance(kind := vars(optim).get(n), type) and issubclass(kind, fusedopt.Optimizer)
}
OTHERS = [n for n in optim.__all__ if isinstance(kind := getattr(torch.optim, n), type) and n not in OURS]
TORCH_ROWS = [pytest.param(r, id=r.name) for r in table.rows("torch")]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """The named optimizers have their peers' signatures, so the backend comes from the environment."""
    monkeypatch.setenv("FUSEDOPT_BACKEND", request.param)
    return request.param


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.setenv("FUSEDOPT_BACKEND", "reference")


# ------------------------------------------------------------------------------------------------------------
# The comparison


@cache
def problem():
    """Start values and gradients of every step, exact in float32."""
    gen = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=gen) for s in SHAPES]
    start[ZERO].zero_()
    return start, [[torch.randn(s, generator=gen) * 0.5 + 0.2 for s in SHAPES] for _ in range(STEPS)]


def trajectory(make, dtype, lag=True, steps=STEPS, before_step=None):
    """Run an optimizer over the problem. Returns it, its parameters, and their snapshots, in double."""
    start, grads = problem()
    params = [p.to(dtype, copy=True).requires_grad_() for p in start]
    opt, seen = make(params), []
    for t in range(1, steps + 1):
        for i, (p, g) in enumerate(zip(params, grads[t - 1], strict=True)):
            missing = lag and i == LAGGING and (t <= 5 or t % 7 == 0)
            p.grad = None if missing else g.to(dtype, copy=True)  # fastai's l2_reg writes to it
        if before_step is not None:
            before_step(opt, t)
        opt.step()
        if t in SNAPSHOTS:
            seen.append(torch.cat([p.detach().double().flatten() for p in params]))
    return opt, params, torch.stack(seen)


def make_peer(row, kwargs):
    """A function from parameters to the peer's optimizer."""
    module, name = row.peer.rsplit(".", 1)
    if row.name == "Lookahead":
        wrap = {k: kwargs[k] for k in ("k", "alpha") if k in kwargs}
        inner = {k: v for k, v in kwargs.items() if k not in wrap}
        return lambda params: fastai_optimizer.Lookahead(fastai_optimizer.SGD(params, **inner), **wrap)
    single = dict(foreach=False) if row.face == "torch" else {}
    return lambda params: getattr(importlib.import_module(module), name)(params, **kwargs, **single)


def lags(row):
    """May a gradient be missing? fastai's Lookahead counts steps of the optimizer, ours of the parameter."""
    return row.name not in ("Lookahead", "ranger")


@contextmanager
def default_dtype(dtype):
    """torch keeps NAdam's momentum product in the default dtype; the truth must not be rounded by it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def one_cycle(opt, t):
    """A schedule of learning rate and momentum, as any of the optimizers can take it."""
    lr, mom = 0.01 * (1 + math.sin(t / 10)), 0.9 - 0.1 * math.sin(t / 10)
    if hasattr(opt, "set_hyper"):
        opt.set_hyper("lr", lr)
        opt.set_hyper("mom", mom)
        return
    for group in opt.param_groups:
        group["lr"] = lr
        if "betas" in group:
            group["betas"] = (mom, group["betas"][1])
        elif "momentum" in group:
            group["momentum"] = mom


@cache
def peer_runs(face, name, index, schedule=None):
    """The peer's snapshots in float64 and in float32."""
    row = table.row(face, name)
    make = make_peer(row, row.variants[index].kwargs)
    with default_dtype(torch.float64):
        truth = trajectory(make, torch.float64, lags(row), before_step=schedule)[2]
    return truth, trajectory(make, torch.float32, lags(row), before_step=schedule)[2]


def assert_competes(ours, truth, peer32, dtype):
    """Ours is as near to the truth as rounding allows: 2 x the peer's own error, or 2 ulp."""
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    error, peer_error = (ours - truth).abs().amax(1), (peer32 - truth).abs().amax(1)
    bound = torch.maximum(2 * peer_error * (eps / eps32), 2 * eps * truth.abs().amax(1))
    assert torch.isfinite(truth).all()
    assert (error <= bound).all(), f"error {error.tolist()} above {bound.tolist()}"


def check(row, variant, dtype, mutate=None, steps=STEPS):
    truth, peer32 = peer_runs(row.face, row.name, row.variants.index(variant))
    seen = sum(t <= steps for t in SNAPSHOTS)

    def make(params):
        opt = row.factory(params, **variant.kwargs)
        if mutate is not None:
            mutate(opt)
        return opt

    opt, params, ours = trajectory(make, dtype, lags(row), steps)
    assert_competes(ours, truth[:seen], peer32[:seen], dtype)
    return opt, params


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("row", "variant"), CASES)
def test_reference_follows_its_peer(row, variant, dtype, reference):
    """Over 30 steps, since each takes long; over 100 below, with a schedule."""
    check(row, variant, dtype, steps=30)


@pytest.mark.parametrize(("row", "variant"), CASES)
def test_cpp_follows_the_peer_and_the_table(row, variant, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_BACKEND", "cpp")
    opt, params = check(row, variant, torch.float32)
    buffers = {
        k
        for k, v in opt.state[params[0]].items()
        if isinstance(v, torch.Tensor) and v.shape == params[0].shape
    }
    buffers.discard("local_lr")  # 0-d, but the first parameter is 1-element
    assert buffers == set(variant.state)
    report = opt.explain()
    assert report.backend == "cpp" and not report.eager
    assert report.launches == row.launches
    assert report.bytes_per_element == variant.bytes  # step 100 is an ordinary one for every k in the table


def follow_schedule(row, schedule):
    """Ours under `schedule` against the peer under `one_cycle`. Returns the kernel count after 20 steps and 100."""
    truth, peer32 = peer_runs(row.face, row.name, 0, one_cycle)
    counts = []

    def before_step(opt, t):
        schedule(opt, t)
        if t == 20:  # every structure there is has been seen
            counts.append(len(opt.explain().compiled))

    make = partial(row.factory, **row.variants[0].kwargs)
    opt, _, ours = trajectory(make, torch.float32, lags(row), before_step=before_step)
    assert_competes(ours, truth, peer32, torch.float32)
    return [*counts, len(opt.explain().compiled)]


@pytest.mark.parametrize("row", ROWS)
def test_schedule_follows_the_peer_and_compiles_nothing(row, backend):
    early, late = follow_schedule(row, one_cycle)
    assert early == late and (late > 0) == (backend == "cpp")


@pytest.mark.parametrize("row", ROWS)
def test_ignored_schedule_is_noticed(row, reference):
    with pytest.raises(AssertionError, match=r"error .* above"):
        follow_schedule(row, lambda opt, t: None)


@pytest.mark.parametrize(("row", "variant"), FIRST_CASES)
def test_cpp_follows_its_peer_in_float64(row, variant, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_BACKEND", "cpp")
    check(row, variant, torch.float64)


# ------------------------------------------------------------------------------------------------------------
# Mutations: each comparison above must be able to fail


def flip_gradient(p, **kwargs):
    p.grad.data.neg_()


def flip_sign(opt):
    opt.cbs = [flip_gradient, *opt.cbs]


def drop_decay(opt):
    decays = (callbacks.weight_decay, callbacks.l2_reg, callbacks.flagged_weight_decay)
    opt.cbs = [cb for cb in opt.cbs if cb not in decays]


def drop_lookahead(opt):
    opt.cbs = [cb for cb in opt.cbs if cb is not callbacks.lookahead]


def shift_lr(opt):
    for group in opt.param_groups:
        group["lr"] *= 1 + 1e-4


def mutations():
    for row in table.TABLE:
        variant = row.variants[0]
        yield row, variant, flip_sign
        yield row, variant, shift_lr
        decayed = next((v for v in row.variants if v.kwargs.get("wd") or v.kwargs.get("weight_decay")), None)
        if decayed is not None:
            yield row, decayed, drop_decay
        if "slow" in variant.state:
            yield row, variant, drop_lookahead


@pytest.mark.parametrize(
    ("row", "variant", "mutate"),
    [pytest.param(*m, id=f"{m[0].face}-{m[0].name}-{m[2].__name__}") for m in mutations()],
)
def test_mutation_is_noticed(row, variant, mutate, reference):
    with pytest.raises(AssertionError, match=r"error .* above"):
        check(row, variant, torch.float32, mutate, steps=10)


# ------------------------------------------------------------------------------------------------------------
# Signatures, defaults, groups, state


def arguments(func):
    """Name, kind and default of every parameter (annotations are ours, and so are ``options``)."""
    found = inspect.signature(func).parameters.values()
    return [(p.name, p.kind, p.default) for p in found if p.name != "options"]


@pytest.mark.parametrize("name", named.__all__)
def test_fastai_signature(name):
    assert arguments(getattr(named, name)) == arguments(getattr(fastai_optimizer, name))
    assert getattr(fusedopt, name) is getattr(named, name)


@pytest.mark.parametrize("row", TORCH_ROWS)
def test_torch_signature(row):
    assert arguments(row.factory) == arguments(getattr(torch.optim, row.name))


def one_param(value=1.0, grad=0.5):
    p = torch.full((3,), value).requires_grad_()
    p.grad = torch.full((3,), grad)
    return p


@pytest.mark.parametrize("row", TORCH_ROWS)
def test_torch_groups_and_state_keys(row, backend):
    for variant in row.variants:
        ours, theirs = one_param(), one_param()
        opt, peer = (
            row.factory([ours], **variant.kwargs),
            getattr(torch.optim, row.name)([theirs], **variant.kwargs),
        )
        assert {k: v for k, v in opt.param_groups[0].items() if k != "params"} == {
            k: v for k, v in peer.param_groups[0].items() if k != "params"
        }
        assert opt.defaults == peer.defaults
        opt.step(), peer.step()
        assert set(opt.state[ours]) == set(peer.state[theirs])


@pytest.mark.parametrize("row", TORCH_ROWS)
def test_torch_flags_hold_per_group(row, reference):
    a, b = one_param(), one_param()
    row.factory([dict(params=[a]), dict(params=[b], maximize=True)], lr=0.1).step()
    assert (a < 1).all() and (b > 1).all()


@pytest.mark.parametrize(("row", "variant"), CASES)
def test_gradients_stay_the_users(row, variant, reference):
    p = one_param()
    row.factory([p], **variant.kwargs).step()
    assert torch.equal(p.grad, torch.full((3,), 0.5))


@pytest.mark.parametrize("decoupled", [True, False])
def test_parameters_flagged_do_wd_false_never_decay(decoupled, backend):
    makers = [
        lambda p: named.Adam([p], lr=0.1, wd=0.5, decouple_wd=decoupled),
        lambda p: optim.Adam([p], lr=0.1, weight_decay=0.5, decoupled_weight_decay=decoupled),
        lambda p: (named.SGD if decoupled else optim.SGD)(
            [p], 0.1, 0.9, **{"wd" if decoupled else "weight_decay": 0.5}
        ),
    ]
    for make in makers:
        decayed, spared = one_param(10.0), one_param(10.0)
        for p, flag in ((decayed, True), (spared, False)):
            opt = make(p)
            opt.state[p]["do_wd"] = flag
            opt.step(), opt.step()
        reference = make(bare := one_param(10.0))
        reference.set_hyper("wd", 0.0)
        reference.step(), reference.step()
        assert torch.equal(spared, bare) and not torch.equal(decayed, spared)


def test_table_is_complete():
    assert {r.name for r in table.rows("fastai")} == set(named.__all__)
    assert {r.name for r in table.rows("torch")} == OURS
    assert all(r.buffers == len(r.variants[0].state) and r.bytes >= 12 for r in table.TABLE)
    assert table.row("torch", "AdamW").bytes == 28 and table.row("fastai", "Lamb").bytes == 44
    with pytest.raises(KeyError, match="no torch optimizer named 'Lamb'"):
        table.row("torch", "Lamb")


# ------------------------------------------------------------------------------------------------------------
# torch.optim's face: what falls through, what is refused


def test_other_names_are_torchs():
    assert optim.LBFGS is torch.optim.LBFGS and optim.lr_scheduler is torch.optim.lr_scheduler
    assert optim.Optimizer is torch.optim.Optimizer and issubclass(optim.AdamW, optim.Adam)
    assert {"LBFGS", "SGD", "lr_scheduler"} <= set(dir(optim))
    with pytest.raises(AttributeError, match=r"neither has torch\.optim"):
        optim.NoSuchThing  # noqa: B018


@pytest.mark.parametrize("name", sorted({*OTHERS} - {"Optimizer", "LBFGS", "SparseAdam"}))
def test_torchs_other_classes_are_fused_as_they_are(name):
    """Only the import changes, so nothing may be left slow beside the classes that are ours."""
    torch.manual_seed(0)
    values = torch.randn(6, 2, 8, 5)
    params = [[torch.nn.Parameter(x.clone()) for x in values[0]] for _ in range(2)]
    ours, theirs = (getattr(m, name)(ps, lr=0.01) for m, ps in zip((optim, torch.optim), params, strict=True))
    for grads in values[1:]:
        for ps in params:
            for p, grad in zip(ps, grads, strict=True):
                p.grad = grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(*params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert isinstance(ours, type(theirs)) and getattr(optim, name) is getattr(optim, name)
    assert "steps: 3 of 4 without Python work" in str(ours.explain())  # the first is the class's own


BAD = [
    *[
        (r.name, {k: v})
        for r in table.rows("torch")
        for k in ("lr", "weight_decay")
        for v in (-0.1, math.nan)
    ],
    *[(r.name, dict(eps=v)) for r in table.rows("torch") if r.name != "SGD" for v in (-1e-8, math.nan)],
    *[
        (n, dict(betas=b))
        for n in ("Adam", "AdamW", "Adamax", "NAdam", "RAdam")
        for b in ((1.0, 0.9), (0.9, -0.1), (math.nan, 0.9))
    ],
    *[("SGD", dict(momentum=v)) for v in (-0.1, math.nan)],
    *[("RMSprop", {k: v}) for k in ("momentum", "alpha") for v in (-0.1, math.nan)],
    *[("Adagrad", {k: v}) for k in ("lr_decay", "initial_accumulator_value") for v in (-0.1, math.nan)],
    *[("Adadelta", dict(rho=v)) for v in (-0.1, 1.1, math.nan)],
    *[("NAdam", dict(momentum_decay=v)) for v in (-0.1, math.nan)],
    ("SGD", dict(dampening=math.nan)),
    ("SGD", dict(nesterov=True)),
    ("SGD", dict(nesterov=True, momentum=0.9, dampening=0.1)),
    ("Adam", dict(lr=torch.ones(2))),
]


@pytest.mark.parametrize(("name", "kwargs"), BAD, ids=[f"{n}-{k}" for n, k in BAD])
def test_bad_numbers_get_torchs_error(name, kwargs):
    try:
        getattr(torch.optim, name)([one_param()], **kwargs)
        message = "Invalid"  # torch lets some NaNs pass
    except ValueError as error:
        message = str(error)
    with pytest.raises(ValueError) as ours:
        getattr(optim, name)([one_param()], **kwargs)
    assert str(ours.value).startswith(message)


@pytest.mark.parametrize("row", TORCH_ROWS)
def test_a_mode_that_means_nothing_here_is_refused(row):
    with pytest.raises(
        ValueError, match=rf"{row.name}\(differentiable=True\).*use torch\.optim\.{row.name}\("
    ):
        row.factory([one_param()], differentiable=True)
    with pytest.raises(ValueError, match="differentiable"):
        row.factory([{"params": [one_param()], "differentiable": True}])


@pytest.mark.parametrize("row", [pytest.param(r, id=r.name) for r in table.rows("torch") if r.torch_fused])
def test_fused_and_foreach_are_hints(row, reference):
    for hints in (dict(fused=True), dict(foreach=True), dict(fused=False, foreach=False)):
        p = one_param()
        opt = row.factory([p], **hints)
        opt.step()
        assert (p < 1).all() and all(opt.param_groups[0][k] is v for k, v in hints.items())
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        row.factory([one_param()], fused=True, foreach=True)


@pytest.mark.parametrize("row", TORCH_ROWS)
def test_tensor_lr(row, backend):
    a, b, lr = one_param(), one_param(), torch.tensor(0.125)
    ours, plain = row.factory([a], lr=lr), row.factory([b], lr=0.125)
    for value in (0.125, 0.125, 0.5, 0.25):
        lr.fill_(value)  # as torch's schedulers do
        plain.param_groups[0]["lr"] = value
        ours.step(), plain.step()
        assert torch.equal(a, b)
    assert ours.param_groups[0]["lr"] is lr


def test_lr_of_fastais_learner_reaches_torchs_face():
    for lr in (slice(1e-5, 1e-3), [1e-5, 1e-3]):
        opt = optim.AdamW([[one_param()], [one_param()]], lr=lr)
        assert [g["lr"] for g in opt.param_groups] == pytest.approx([1e-5, 1e-3])
    with pytest.raises(ValueError, match=r"Invalid learning rate: -0\.1"):
        optim.AdamW([[one_param()], [one_param()]], lr=[0.1, -0.1])


def test_adagrad_says_why_it_cannot_share_memory():
    with pytest.raises(NotImplementedError, match=r"use torch\.optim\.Adagrad"):
        optim.Adagrad([one_param()]).share_memory()


def test_adamw_stays_decoupled_after_loading_adams_state(reference):
    p = one_param()
    donor, opt = optim.Adam([one_param()]), optim.AdamW([p])
    donor.step()
    opt.load_state_dict(donor.state_dict())
    assert opt.param_groups[0]["decoupled_weight_decay"] is True


# ------------------------------------------------------------------------------------------------------------
# fastai's face: momentum that is there or not, Lookahead, mom = 1


def test_momentum_can_be_switched_on_later_only_in_torchs_face(backend):
    def run(opt, p):
        for mom in (0.0, 0.9, 0.9):
            opt.set_hyper("mom", mom)
            opt.step()
        return {k for k, v in opt.state[p].items() if isinstance(v, torch.Tensor)}

    p = one_param()
    assert run(named.SGD([p], lr=0.1), p) == set()
    assert torch.allclose(p, torch.tensor(1 - 3 * 0.1 * 0.5))
    assert run(optim.SGD([p], lr=0.1), p) == {"momentum_buffer"}


def test_rmsprop_heeds_eps(reference):
    a, b = one_param(), one_param()
    named.RMSProp([a], lr=0.1).step(), named.RMSProp([b], lr=0.1, eps=1.0).step()
    assert (a < b).all()


def test_lookahead_changes_and_returns_the_optimizer(backend):
    p = one_param()
    inner = named.SGD([p], lr=0.1)
    opt = named.Lookahead(inner, k=2, alpha=0.25)
    assert opt is inner
    assert {k: opt.param_groups[0][k] for k in ("lookahead_k", "lookahead_alpha")} == dict(
        lookahead_k=2, lookahead_alpha=0.25
    )
    opt.step(), opt.step()
    assert torch.allclose(p, torch.tensor(1 - 0.25 * 2 * 0.1 * 0.5))
    assert torch.equal(opt.state[p]["slow"], p.detach())
    opt.add_param_group(dict(params=[one_param()]))
    assert opt.param_groups[1]["lookahead_k"] == 2


def test_lookahead_works_on_torchs_face(backend):
    a, b = one_param(), one_param()
    opt, plain = named.Lookahead(optim.AdamW([a], lr=0.1), k=3), optim.AdamW([b], lr=0.1)
    for _ in range(3):
        opt.step(), plain.step()
    assert torch.allclose(a, 1 + 0.5 * (b - 1))


def test_lookahead_can_start_later(backend):
    p = one_param()
    opt = named.SGD([p], lr=0.1)
    opt.step()
    named.Lookahead(opt, k=2, alpha=0.0)
    opt.step(), opt.step()
    assert torch.allclose(p, torch.tensor(1 - 0.1 * 0.5))  # alpha = 0: back to where it started looking ahead


def test_lookahead_refuses_what_it_cannot_do():
    with pytest.raises(TypeError, match=r"fastai\.optimizer\.Lookahead"):
        named.Lookahead(fastai_optimizer.SGD([one_param()], lr=0.1))
    with pytest.raises(TypeError, match="SGD"):
        named.Lookahead(torch.optim.SGD([one_param()]))
    for kwargs in (
        dict(k=0),
        dict(k=2.5),
        dict(k=True),
        dict(alpha=-0.1),
        dict(alpha=1.5),
        dict(alpha=math.nan),
    ):
        with pytest.raises(ValueError, match="Lookahead needs"):
            named.Lookahead(named.SGD([one_param()], lr=0.1), **kwargs)
    with pytest.raises(ValueError, match="already"):
        named.Lookahead(named.ranger([one_param()], lr=0.1))


@pytest.mark.parametrize("name", ["Adam", "RAdam", "QHAdam", "Lamb"])
def test_mom_of_one_is_finite(name, backend):
    p = one_param()
    opt = getattr(named, name)([p], lr=0.1, wd=0.0)
    opt.step()
    opt.set_hyper("mom", 1.0)
    for _ in range(8):
        opt.step()
    assert torch.isfinite(p).all() and (p < 1).all()


@pytest.mark.parametrize("name", ["Adam", "RAdam", "QHAdam", "Lamb"])
def test_both_moments_of_one_from_the_start(name, backend):
    p = one_param()
    opt = getattr(named, name)([p], lr=0.1, mom=1.0, sqr_mom=1.0, wd=0.0)
    for _ in range(8):
        opt.step()
    assert torch.isfinite(p).all()
