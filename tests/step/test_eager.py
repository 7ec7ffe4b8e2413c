"""Callbacks with no fused form run eagerly between fused programs: same results, said once, nothing lost."""

import warnings
from functools import partial

import pytest
import torch
from factories import parameters_with_gradients
from torch import nn

import fusedopt
from fusedopt import adam_step, average_grad, average_sqr_grad, l2_reg, momentum_step, step_stat, weight_decay
from fusedopt.step import reference

HYPERS = dict(lr=0.1, wd=0.02, mom=0.8, sqr_mom=0.9, eps=1e-3)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


parameters = partial(parameters_with_gradients, ((4, 5), (5, 4), (3, 3)))


def run(cbs, params, backend="cpp", steps=3, **options):
    """Step, with other gradients each time. Gradients must come out as they went in."""
    opt = fusedopt.Optimizer(params, cbs, backend=backend, **HYPERS | options)
    for _ in range(steps):
        grads = [p.grad.clone() for p in params]
        opt.step()
        for p, g in zip(params, grads, strict=True):
            assert torch.equal(p.grad, g), "a step must not change gradients"
            p.grad = p.grad * -0.9
    return opt


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return run(*args, **kwargs)


def assert_same(a, b, ulps=2):
    """Parameters and state of two optimizers: same keys, dtypes, shapes and strides; values to a few ulp."""
    for p, q in zip(*([p for g in o.param_groups for p in g["params"]] for o in (a, b)), strict=True):
        s, t = a.state[p], b.state[q]
        assert s.keys() == t.keys()
        for what, x, y in [("parameter", p, q), *((k, s[k], t[k]) for k in s)]:
            if isinstance(x, torch.Tensor) and not x.numel():
                assert (x.dtype, x.shape) == (y.dtype, y.shape), what
            elif isinstance(x, torch.Tensor):
                assert (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride()), what
                bound = ulps * torch.finfo(x.dtype).eps * x.abs().max().item()
                assert (x.double() - y.double()).abs().max().item() <= bound, what
            else:
                assert x == y and type(x) is type(y), what


# --
# What cannot be fused. Each keeps to work that eager torch does the same wherever it runs.


def masked(p, lr, **kwargs):
    p.data[p.grad.data > 0] -= lr


def item(p, lr, **kwargs):
    p.data.sub_(p.grad.data * (lr * p.grad.data.abs().mean().item()))


def to_numpy(p, lr, **kwargs):
    p.data.sub_(p.grad.data * (lr * float(p.grad.data.numpy().max())))


def branch_on_an_element(p, lr, **kwargs):
    if p.grad.data[0, 0] > 0:
        p.data.sub_(p.grad.data, alpha=lr)


def branch_on_a_mask(p, lr, **kwargs):
    if p.grad.data > 100:
        p.data.zero_()


def random_numbers(p, lr, **kwargs):
    torch.manual_seed(p.shape[0])
    p.data.add_(torch.randn_like(p.data), alpha=lr)


SHIFT = torch.arange(3.0).reshape(3, 1, 1)


def closed_over_tensor(p, lr, **kwargs):
    p.data.sub_(p.grad.data * SHIFT[1].to(p.dtype), alpha=lr)


def heaped(p, lr, **kwargs):
    p.data.sub_(p.grad.data.logcumsumexp(0) * lr)


def sort(p, lr, **kwargs):
    p.data.sub_(p.grad.data.flatten().msort().reshape(p.shape) * lr)


CANNOT = {
    masked: "some elements are taken, by a mask",
    item: "read on the host",
    to_numpy: "read on the host",
    branch_on_an_element: "read on the host",
    branch_on_a_mask: r"element values; use torch\.where",
    random_numbers: r"torch\.manual_seed, which may do more",
    closed_over_tensor: "outside the callback's arguments",
    heaped: "logcumsumexp",
    sort: "msort",
}
CASES = [pytest.param(*c, id=c[0].__name__) for c in CANNOT.items() if c[0] is not branch_on_a_mask]


@pytest.mark.parametrize(("cb", "reason"), CASES)
def test_what_cannot_be_fused_runs_eagerly_between_fused_programs(cb, reason):
    cbs = [weight_decay, average_grad, cb, average_sqr_grad, step_stat, adam_step]
    with pytest.warns(RuntimeWarning) as caught:
        fused = run(cbs, parameters())
    assert len(caught) == 1
    text = str(caught[0].message)
    assert f"the callback {cb.__name__} runs eagerly, parameter by parameter: " in text
    assert_same(run(cbs, parameters(), "reference"), fused)
    report = fused.explain()
    ((name, why),) = report.eager
    assert name == cb.__name__
    assert pytest.importorskip("re").search(reason, why), why
    assert why in text
    assert report.launches == 2, "a program before and one after, for all parameters"
    assert [s.tensors for s in report.stages] == [3, 3]


def test_a_branch_on_a_mask_is_an_error_of_torchs_own():
    params = parameters()
    before = [p.detach().clone() for p in params]
    opt = fusedopt.Optimizer(params, branch_on_a_mask, backend="cpp", **HYPERS)
    with pytest.raises(RuntimeError, match="ambiguous"):
        opt.step()
    assert all(map(torch.equal, params, before))


def test_the_warning_points_at_the_users_step():
    with pytest.warns(RuntimeWarning) as caught:
        run([item], parameters(), steps=1)
    assert caught[0].filename == __file__


def test_each_eager_callback_is_named_once_whatever_the_shapes_and_dtypes():
    params = parameters() + parameters(torch.bfloat16)
    with pytest.warns(RuntimeWarning) as caught:
        opt = run([item, average_grad, heaped, momentum_step, sort], params)
    said = [str(w.message) for w in caught]
    names = [s.split("the callback ")[1].split()[0] for s in said]
    assert names == ["item", "heaped", "sort"], said
    assert [e.callback for e in opt.explain().eager] == ["item", "heaped", "sort"]


def test_mutation_a_flipped_sign_in_the_eager_callback_is_noticed():
    def flipped(p, lr, **kwargs):
        item(p, -lr)

    a = quietly([average_grad, item, momentum_step], parameters(), "reference")
    with pytest.raises(AssertionError, match="parameter"):
        assert_same(a, quietly([average_grad, flipped, momentum_step], parameters()))


# --
# Low precision


def add_tiny(p, **kwargs):
    p.data.add_(torch.full_like(p.data, 2.0**-10))


def host(p, **kwargs):
    assert p.dtype == p.grad.dtype == torch.float32
    p.data.add_(0.0 * p.data.sum().item())


def take_one(p, **kwargs):
    p.data.sub_(torch.ones_like(p.data))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_low_precision_is_rounded_once_at_the_end(backend):
    """1 + 2⁻¹⁰ is no bfloat16: rounded between the segments, nothing of it would be left."""
    p = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    p.grad = torch.zeros_like(p)
    quietly([add_tiny, host, take_one], [p], backend, steps=1)
    assert torch.equal(p.detach(), torch.full((8,), 2.0**-10, dtype=torch.bfloat16))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_new_state_is_not_rounded_before_the_step_is_over(backend):
    def remember(p, kept=None, **kwargs):
        return {"kept": torch.zeros_like(p.data) + (1 + 2.0**-10)}

    def use(p, kept, **kwargs):
        p.data.copy_(kept - 1)

    p = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    p.grad = torch.zeros_like(p)
    opt = quietly([remember, host, use], [p], backend, steps=1)
    assert torch.equal(p.detach(), torch.full((8,), 2.0**-10, dtype=torch.bfloat16))
    assert opt.state[p]["kept"].dtype == torch.bfloat16
    assert (opt.state[p]["kept"] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", [None, torch.float32])
def test_every_dtype_agrees_with_the_reference(dtype, state_dtype):
    cbs = [l2_reg, average_grad, item, average_sqr_grad, step_stat, adam_step]
    a = quietly(cbs, parameters(dtype), "reference", state_dtype=state_dtype)
    b = quietly(cbs, parameters(dtype), "cpp", state_dtype=state_dtype)
    assert_same(a, b)
    for opt in (a, b):
        for state in opt.state.values():
            assert state["grad_avg"].dtype == state["sqr_avg"].dtype == (state_dtype or dtype)


# --
# State


def row_state(p, sqr_mom, rows=None, **kwargs):
    if rows is None:
        rows = torch.zeros_like(p.grad.data[:, 0])
    rows.mul_(sqr_mom).add_(p.grad.data.pow(2).mean(1), alpha=1 - sqr_mom)
    return {"rows": rows}


def row_step(p, lr, rows, eps, **kwargs):
    p.data.sub_(p.grad.data / (rows[:, None].sqrt() + eps), alpha=lr)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_of_another_shape_than_the_parameter(dtype):
    cbs = [weight_decay, row_state, average_grad, row_step, momentum_step]
    a = run(cbs, parameters(dtype), "reference")
    with pytest.warns(RuntimeWarning) as caught:
        b = run(cbs, parameters(dtype))
    assert_same(a, b)
    assert [tuple(s["rows"].shape) for s in b.state.values()] == [(4,), (5,), (3,)]
    names = [str(w.message).split("the callback ")[1].split()[0] for w in caught]
    assert names == ["row_state"], "once each, whatever the shapes; what follows takes what it leaves"


def test_state_of_another_shape_survives_a_state_dict():
    cbs = [row_state, average_grad, row_step]
    a, params = quietly(cbs, parameters()), parameters()
    b = fusedopt.Optimizer(params, cbs, backend="cpp", **HYPERS)
    b.load_state_dict(a.state_dict())
    for p, s in zip(params, a.state.values(), strict=True):
        assert torch.equal(b.state[p]["rows"], s["rows"])


def test_integer_and_mask_state():
    def count_signs(p, flips=None, negative=None, **kwargs):
        now = p.grad.data < 0
        if flips is None:
            return {"flips": torch.zeros_like(p.grad.data, dtype=torch.int64), "negative": now}
        return {"flips": flips + (now != negative), "negative": now}

    cbs = [average_grad, count_signs, momentum_step]
    a, b = quietly(cbs, parameters(), "reference"), quietly(cbs, parameters(), "cpp")
    assert_same_kinds(a, b)
    state = next(iter(b.state.values()))
    assert state["flips"].dtype == torch.int64 and state["negative"].dtype == torch.bool
    assert (state["flips"] == 2).all(), "run() flips every gradient on every step"


def assert_same_kinds(a, b):
    for s, t in zip(a.state.values(), b.state.values(), strict=True):
        assert s.keys() == t.keys()
        for k in s:
            assert torch.equal(s[k].double(), t[k].double()) and s[k].dtype == t[k].dtype


# --
# Gradients changed on the way


def double_gradient(p, **kwargs):
    p.grad.data.mul_(2)


def rebind_gradient(p, **kwargs):
    p.grad = p.grad.data * (1 + 0 * p.data.sum().item()) * 2


def rebind_gradient_data(p, **kwargs):
    p.grad.data = p.grad.data * (1 + 0 * p.data.sum().item()) * 2


def host_gradient(p, **kwargs):
    p.grad.data.mul_(1 + 0 * p.data.sum().item()).mul_(2)


def as_transposed(p):
    p.grad = p.grad.t().contiguous().t()


def as_expanded(p):
    p.grad = p.grad[:, :1].expand(p.shape)


@pytest.mark.parametrize(
    "layout", [lambda p: None, as_transposed, as_expanded], ids=["same", "transposed", "expanded"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [host_gradient, rebind_gradient, rebind_gradient_data])
def test_a_changed_gradient_is_seen_by_what_follows_and_by_nobody_else(change, dtype, layout):
    """Fused callbacks hand it to eager ones and the other way round, whatever its strides."""
    cbs = [double_gradient, item, change, average_grad, l2_reg, heaped, momentum_step]
    both = []
    for backend in ("reference", "cpp"):
        params = parameters(dtype)
        for p in params:
            layout(p)
        both.append(quietly(cbs, params, backend, steps=2))
    assert_same(*both, ulps=4)


def test_mutation_a_gradient_change_that_is_lost_is_noticed():
    a = quietly([double_gradient, item, average_grad, momentum_step], parameters(), "reference")
    b = quietly([item, average_grad, momentum_step], parameters())
    with pytest.raises(AssertionError, match="parameter"):
        assert_same(a, b)


# --
# Some parameters only


def test_parameters_that_fuse_are_launched_together_while_others_run_eagerly():
    def only_matrices(p, lr, **kwargs):
        if p.ndim == 2:
            p.data.sub_(p.grad.data.msort(), alpha=lr)
        else:
            p.data.sub_(p.grad.data, alpha=lr)

    shapes = ((4, 5), (7,), (2, 3, 4), (3, 3), ())
    a = run([average_grad, only_matrices], parameters_with_gradients(shapes), "reference")
    with pytest.warns(RuntimeWarning, match="only_matrices runs eagerly"):
        b = run([average_grad, only_matrices], parameters_with_gradients(shapes))
    assert_same(a, b)
    assert {s.tensors for s in b.explain().stages} >= {3}


def test_layouts_and_holes_on_the_eager_path():
    def make(backend):
        gen = torch.Generator().manual_seed(0)
        base = torch.randn(6, 10, generator=gen)
        params = [
            nn.Parameter(base[:, ::2]),
            nn.Parameter(torch.randn(5, 6, generator=gen).t()),
            nn.Parameter(torch.randn(0, 4, generator=gen)),
            nn.Parameter(torch.randn(1, 1, generator=gen)),
            nn.Parameter(torch.randn(4, 4, generator=gen)),
        ]
        for p in params[:-1]:
            p.grad = torch.randn(p.shape, generator=gen)
        opt = fusedopt.Optimizer(
            params, [average_grad, heaped, step_stat, momentum_step], backend=backend, **HYPERS
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for _ in range(3):
                opt.step()
        return opt, params, base

    (a, _, base_a), (b, params, base_b) = make("reference"), make("cpp")
    assert_same(a, b)
    assert torch.equal(base_a[:, 1::2], base_b[:, 1::2]), "the elements between the slice's are another's"
    assert params[2] in b.state and b.state[params[2]]["step"] == 3
    assert not b.state.get(params[4]), "no gradient, no state"


def test_a_skipped_step_with_eager_parts_is_not_taken_for_a_whole_one():
    """What was launched in it is not all that a step does."""

    def by_shape(p, lr, **kwargs):
        p.data.sub_(p.grad.msort() if p.ndim > 1 else p.grad, alpha=lr)

    params = [nn.Parameter(torch.ones(shape)) for shape in ((3,), (2, 2))]
    opt = fusedopt.Optimizer(params, by_shape, lr=0.1, backend="cpp", amp_fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    moved = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for value in (torch.inf, torch.inf, 2.0, 2.0):
            before = [p.detach().clone() for p in params]
            for p in params:
                p.grad = torch.full_like(p, value)
            scaler.step(opt)
            scaler.update()
            moved.append([not torch.equal(p, b) for p, b in zip(params, before, strict=True)])
    assert moved == [[False, False]] * 2 + [[True, True]] * 2


def sorts(p, lr, **kwargs):
    p.data.sub_(torch.msort(p.grad), alpha=lr)


def names_a_dtype(p, lr, **kwargs):
    p.data.sub_(torch.msort(torch.zeros_like(p, dtype=torch.bfloat16) + p.grad), alpha=lr)


def calls_one_that_does(p, lr, **kwargs):
    names_a_dtype(p, lr)


@pytest.mark.parametrize(
    ("callback", "dtype", "converted"),
    [
        (sorts, torch.float32, False),
        (sorts, torch.float64, False),
        (sorts, torch.bfloat16, True),
        (names_a_dtype, torch.float32, True),
        (calls_one_that_does, torch.float32, True),
    ],
)
def test_dtypes_are_watched_only_where_something_is_converted(callback, dtype, converted, monkeypatch):
    """After the first step, which also looks for callbacks that do nothing."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 5, dtype=dtype))
    opt = fusedopt.Optimizer([p], callback, lr=0.1)
    made = []

    class Counted(reference.AskedDtypes):
        def __init__(self, compute):
            super().__init__(compute)
            made.append(compute)

    monkeypatch.setattr(reference, "AskedDtypes", Counted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            p.grad = torch.ones_like(p)
            opt.step()
    assert len(made) == (3 if converted else 1)
