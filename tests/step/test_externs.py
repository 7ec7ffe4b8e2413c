"""Torch calls that have no fused form, between fused programs."""

import warnings

import pytest
import torch
from devices import COMPILED, DEVICE

import fusedopt
from fusedopt.extension import leaf
from fusedopt.rules.muon import newton_schulz
from fusedopt.step import buckets
from fusedopt.trace import cuts

SHAPES = [(4, 6), (4, 6), (6, 4), (5, 5), (4, 6), (1, 3), (40, 30)]
needs_extension = pytest.mark.skipif(leaf.native is None, reason="steps are bound by the extension")


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(DEVICE, dtype).requires_grad_() for s in shapes]


def give(params, seed, without=()):
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(DEVICE, p.dtype)
        p.grad = None if i in without else grad


def fused(params, callbacks, backend, **hypers):
    """An optimizer in whose steps nothing runs eagerly."""
    return fusedopt.Optimizer(params, callbacks, backend=backend, **({"lr": 0.1} | hypers))


def trained(callbacks, backend, dtype=torch.float32, shapes=SHAPES, steps=5, without=(), **hypers):
    params = parameters(dtype, shapes)
    opt = fused(params, callbacks, backend, **hypers)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for t in range(steps):
            give(params, t, without)
            opt.step()
    return params, opt


def assert_near(ours, theirs, tolerance=3e-6):
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p.double(), q.double(), rtol=tolerance, atol=tolerance), (
            p.shape,
            (p - q).abs().max(),
        )


def assert_states_near(a, b, tolerance=3e-6):
    pairs = zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True)
    for p, q in ((p, q) for p, q in pairs if p in a.state or q in b.state):
        mine = {k: v for k, v in a.state[p].items() if not k.startswith("started:")}
        assert mine.keys() == b.state[q].keys()
        for key, value in mine.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == b.state[q][key].dtype
                assert_near([value], [b.state[q][key]], tolerance)
            else:
                assert value == b.state[q][key]


# --
# What may be called


def average(p, mom=0.9, avg=None, **_):
    avg = torch.zeros_like(p.grad) if avg is None else avg
    return {"avg": avg.mul_(mom).add_(p.grad)}


def operator_product(p, lr, avg, **_):
    p.data.sub_(avg @ (avg.T @ avg), alpha=lr * 0.01)


def functions(p, lr, avg, **_):
    gram = torch.matmul(p.grad, avg.mT)
    p.data.sub_(torch.mm(gram, p.data) * lr * 0.01)


def methods(p, lr, avg, **_):
    p.data.sub_(avg.mm(avg.t()).mm(avg) * lr * 0.01 + 0.1 * avg.transpose(0, 1).transpose(-1, -2))


def addmm(p, lr, avg, **_):
    gram = avg @ avg.T
    p.data.add_(torch.addmm(avg, gram, avg, beta=lr, alpha=-0.01 * lr))


def batched(p, lr, avg, **_):
    x = avg.unsqueeze(0)
    x = torch.bmm(x.mT, x)
    p.data.sub_((avg @ torch.baddbmm(x, x, x, beta=2.0, alpha=lr)[0]) * (lr * 1e-3))


def ordered(p, lr, avg, **_):
    p.data.sub_(avg.sort(dim=-1).values + avg.flatten().sort(descending=True).values.view(p.shape), alpha=lr)


def rolled(p, lr, avg, **_):
    p.data.sub_(avg.roll(1, 0) + avg.flip(1) + avg.cumsum(-1), alpha=lr)


def indexed(p, lr, avg, **_):
    largest, where = avg.topk(1, dim=1)
    p.data.sub_(torch.zeros_like(avg @ avg.T @ avg).scatter(1, where, largest), alpha=lr)


def reordered(p, lr, avg, **_):
    order = (avg @ avg.T).diagonal().argsort()
    p.data.sub_(avg.index_select(0, order) + torch.take_along_dim(avg, avg.argsort(1), 1), alpha=lr)
    p.data.sub_(p.grad.gather(0, p.grad.argsort(0)), alpha=lr)


def in_place(p, lr, avg, **_):
    x = avg.T @ avg
    x.div_(x.norm() + 1)
    x += 1
    x.mul_(lr)
    p.data.sub_(avg @ x)


def qr(p, lr, avg, **_):
    q, r = torch.linalg.qr(avg)
    p.data.sub_(q @ r + q @ q.mT @ avg, alpha=lr)


def svd(p, lr, avg, **_):
    u, s, v = torch.linalg.svd(avg, full_matrices=False)
    p.data.sub_((u * s.sqrt()) @ v, alpha=lr)


def whitened(p, lr, avg, eps=1e-2, **_):
    values, vectors = torch.linalg.eigh(avg @ avg.T + torch.eye(p.shape[0], dtype=avg.dtype, device=p.device))
    p.data.sub_(vectors @ (vectors.T @ avg / (values[:, None] + eps)), alpha=lr)


def solved(p, lr, avg, **_):
    gram = avg @ avg.T + 2 * torch.eye(p.shape[0], dtype=avg.dtype, device=p.device)
    p.data.sub_(torch.linalg.solve(gram, avg) + torch.linalg.inv(gram) @ p.grad, alpha=lr)


def per_row(p, lr, avg, **_):
    """What comes back has one number per row, and one per tensor."""
    diagonal = (avg @ avg.T).diagonal()
    p.data.sub_(avg / (diagonal[:, None] + torch.trace(avg @ avg.T) + 1), alpha=lr)


def twice(p, lr, avg, **_):
    """Fused arithmetic between two functions."""
    x = avg @ avg.T @ avg
    y = (x * p.grad).tanh() + p.data * 0.1
    p.data.sub_(y @ (y.T @ y) * 1e-3 + x * 1e-3, alpha=lr)


def branching(p, lr, avg, **_):
    x = avg @ avg.T
    if x.norm() > 20:
        x = x / x.norm()
    p.data.sub_(x @ avg, alpha=lr * 0.01)


def flattened(p, lr, avg, **_):
    x = avg.reshape(p.shape[0], -1)
    p.data.sub_((x @ x.T @ x).view_as(p), alpha=lr * 0.01)


def einsum(p, lr, avg, **_):
    p.data.sub_(torch.einsum("ij,kj,kl->il", avg, avg, avg), alpha=lr * 0.01)


ALL = [
    operator_product,
    functions,
    methods,
    addmm,
    batched,
    ordered,
    rolled,
    indexed,
    reordered,
    in_place,
    qr,
    svd,
    whitened,
    solved,
    per_row,
    twice,
    branching,
    flattened,
    einsum,
]


@pytest.mark.parametrize("callback", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_calls_between_programs_are_those_of_a_plain_loop(callback, dtype):
    shapes = SHAPES if callback is not flattened else [*SHAPES, (3, 2, 4), (3, 2, 4)]
    tolerance = 3e-5 if dtype == torch.float32 else 1e-9
    for backend in COMPILED:
        ours, opt = trained([average, callback], backend, dtype, shapes)
        plain, other = trained([average, callback], "reference", dtype, shapes)
        assert_near(ours, plain, tolerance)
        assert_states_near(opt, other, tolerance)
        assert opt.explain().eager == () and opt.explain().calls
    exact, _ = trained([average, callback], "reference", torch.float64, shapes)
    assert_near(ours, plain if dtype == torch.float32 and callback in (ordered, indexed) else exact, 1e-3)


@needs_extension
@pytest.mark.parametrize("callback", [operator_product, twice, qr])
def test_steps_are_repeated(callback, compiled):
    params, opt = trained([average, callback], compiled, steps=6)
    assert opt.explain().steps.startswith("4 of 6 without Python work")
    for group in opt.param_groups:
        group["lr"] = 0.01
    give(params, 6)
    opt.step()
    assert opt.explain().steps.startswith("5 of 7")


def test_numbers_of_calls_follow_a_schedule(compiled):
    runs = []
    for backend in (compiled, "reference"):
        params = parameters()
        opt = fused(params, [average, addmm], backend)
        for t in range(5):
            opt.param_groups[0]["lr"] = 0.1 / (t + 1)
            give(params, t)
            opt.step()
        runs.append(params)
    assert_near(*runs, 3e-5)


@needs_extension
def test_a_number_that_changes_with_each_step_is_no_reason_to_trace_anew(compiled):
    def divided(p, lr, avg, step, **_):
        x = avg @ avg.T
        p.data.sub_((lr / (x.norm() + step)) * (x @ avg) * step)

    ours, opt = trained([average, fusedopt.step_stat, divided], compiled, steps=6)
    plain, _ = trained([average, fusedopt.step_stat, divided], "reference", steps=6)
    assert_near(ours, plain, 3e-5)
    assert opt.explain().steps.startswith("4 of 6")


def test_groups_have_numbers_of_their_own(compiled):
    runs = []
    for backend in (compiled, "reference"):
        a, b = parameters(), parameters(seed=1)
        opt = fused([{"params": a}, {"params": b, "lr": 0.02}], [average, addmm], backend)
        for t in range(4):
            give([*a, *b], t)
            opt.step()
        runs.append([*a, *b])
    assert_near(*runs, 3e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, compiled):
    ours, opt = trained([average, operator_product], compiled, dtype)
    plain, other = trained([average, operator_product], "reference", dtype)
    assert_near(ours, plain, torch.finfo(dtype).eps)
    assert_states_near(opt, other, torch.finfo(dtype).eps)


def halved(p, lr, avg, **_):
    x = avg.bfloat16()
    p.data.sub_(x @ x.T @ x, alpha=lr * 0.01)


def doubled(p, lr, avg, **_):
    x = avg.double()
    p.data.sub_(x @ x.T @ x, alpha=lr * 0.01)


@pytest.mark.parametrize(("callback", "tolerance"), [(halved, 2e-2), (doubled, 3e-6)])
def test_casts(callback, tolerance, compiled):
    ours, _ = trained([average, callback], compiled)
    plain, _ = trained([average, callback], "reference")
    assert_near(ours, plain, tolerance)


def test_missing_gradients_and_parameters_without_elements(compiled):
    shapes = [*SHAPES, (0, 4), (3, 0)]
    runs = []
    for backend in (compiled, "reference"):
        params = parameters(shapes=shapes)
        opt = fused(params, [average, fusedopt.step_stat, operator_product], backend)
        for t in range(8):
            give(params, t, without=(1, 3) if t in (2, 3, 6) else ())
            opt.step()
        runs.append((params, opt))
    (ours, opt), (plain, other) = runs
    assert_near(ours, plain, 3e-5)
    assert_states_near(opt, other, 3e-5)


def test_other_layouts(compiled):
    runs = []
    for backend in (compiled, "reference"):
        base = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
        params = [
            base[:, ::2].detach(),
            base.t().clone(memory_format=torch.preserve_format),
            base.clone().t(),
        ]
        params = [p.to(DEVICE).requires_grad_() for p in params]
        opt = fused(params, [average, operator_product], backend)
        for t in range(3):
            give(params, t)
            opt.step()
        runs.append(params)
    assert_near(*runs, 3e-5)


def test_large_matrices_are_called_one_by_one_and_small_ones_at_once(compiled):
    shapes = [(8, 8)] * 5 + [(1040, 1030)] * 2
    ours, opt = trained([average, operator_product], compiled, shapes=shapes, steps=3, lr=1e-3)
    plain, _ = trained([average, operator_product], "reference", shapes=shapes, steps=3, lr=1e-3)
    assert_near(ours, plain, 1e-3)
    small, large = opt.explain().calls
    assert small.startswith("5 tensors of 8×8, for 5 at once: torch's ") and "matmul" in small
    assert large.startswith("2 tensors of 1040×1030, for each: torch's ")


@pytest.fixture
def alone(monkeypatch):
    """Matrices of any size are large: calls on a CPU are made for each, of the tensors themselves."""
    monkeypatch.setattr(cuts, "ALONE", 1)
    buckets.known_traces.cache_clear()
    yield
    buckets.known_traces.cache_clear()


@pytest.mark.cpu_only("calls are made for each tensor there")
@pytest.mark.parametrize("callback", ALL)
@pytest.mark.parametrize("momentum", [average, None], ids=["average", "gradient"])
def test_calls_for_each_are_those_of_a_plain_loop(callback, momentum, alone):
    def gradient(p, **_):
        return {"avg": p.grad.clone()}

    shapes = SHAPES if callback is not flattened else [*SHAPES, (3, 2, 4), (3, 2, 4)]
    callbacks = [momentum or gradient, callback]
    ours, opt = trained(callbacks, "cpp", torch.float64, shapes)
    plain, other = trained(callbacks, "reference", torch.float64, shapes)
    assert_near(ours, plain, 1e-9)
    assert_states_near(opt, other, 1e-9)
    assert opt.explain().eager == () and all("for each" in each for each in opt.explain().calls)


def swapped(p, lr, avg, left=None, right=None, **_):
    """State that becomes what calls give of other state, and what a program makes in the same step."""
    if left is None:
        left, right = torch.zeros_like(p), torch.zeros_like(p)
    product = avg @ avg.T @ right
    p.data.sub_(product @ (left.T @ avg), alpha=lr * 1e-3)
    return {"left": right.T.T + avg @ avg.T @ avg * 0.1, "right": left @ (avg.T @ avg)}


def updated(p, lr, avg, gram=None, **_):
    if gram is None:
        gram = torch.eye(p.shape[0], dtype=avg.dtype, device=p.device)
    p.data.sub_(gram @ avg, alpha=lr * 0.1)
    return {"gram": gram + avg @ avg.T}


def turned(p, lr, avg, gram=None, **_):
    """An update by a view of what the program changes: it is made at once."""
    if gram is None:
        gram = torch.eye(p.shape[0], dtype=avg.dtype, device=p.device)
    p.data.sub_(gram @ avg, alpha=lr * 0.1)
    return {"gram": gram + p.grad.T} if p.shape[0] == p.shape[1] else {"gram": gram}


@pytest.mark.cpu_only("calls are made for each tensor there")
@pytest.mark.parametrize("callback", [swapped, updated, turned])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_state_of_large_matrices_is_written_as_a_plain_loop_does(callback, layout, alone):
    runs = []
    for backend in ("cpp", "reference"):
        params = parameters(torch.float64, [(6, 6), (4, 4), (6, 6)])
        opt = fused(params, [average, callback], backend)
        for t in range(6):
            give(params, t)
            for p in params if layout == "columns" else ():
                p.grad = p.grad.T.contiguous().T
            opt.step()
        runs.append((params, opt))
    (ours, opt), (plain, other) = runs
    assert_near(ours, plain, 1e-9)
    assert_states_near(opt, other, 1e-9)
    assert opt.explain().eager == () and opt.explain().calls


@pytest.mark.cpu_only("calls are made for each tensor there")
def test_large_matrices_without_a_gradient_now_and_then(alone):
    runs = []
    for backend in ("cpp", "reference"):
        params = parameters(torch.float64)
        opt = fused(params, [average, updated], backend)
        for t in range(8):
            give(params, t, without={0, 3} if t in (2, 5) else ())
            opt.step()
        runs.append(params)
    assert_near(*runs, 1e-9)


@pytest.mark.cpu_only("calls are made for each tensor there")
@pytest.mark.parametrize("steps", [1, 4])
def test_a_call_that_fails_leaves_state_of_large_matrices_alone(steps, alone):
    def fails(p, lr, avg, gram=None, **_):
        gram = torch.eye(p.shape[0], dtype=avg.dtype) if gram is None else gram
        root = torch.linalg.cholesky(gram + p.grad @ p.grad.T + torch.eye(p.shape[0], dtype=avg.dtype))
        p.data.sub_(root @ avg, alpha=lr)
        return {"gram": gram + avg @ avg.T}

    params, opt = trained([average, fails], "cpp", torch.float64, steps=steps)
    before = [
        [p.detach().clone(), *(v.clone() for v in opt.state[p].values() if torch.is_tensor(v))]
        for p in params
    ]
    give(params, 9)
    params[-1].grad.fill_(float("nan"))
    with pytest.raises(RuntimeError):
        opt.step()
    for p, then in zip(params, before, strict=True):
        now = [p, *(v for v in opt.state[p].values() if torch.is_tensor(v))]
        assert all(torch.equal(a, b) for a, b in zip(now, then, strict=True))


# --
# State of other shapes


def preconditioned(p, lr, left=None, right=None, root=None, count=0, **_):
    """Shampoo, whose root is made anew in some steps only."""
    if left is None:
        left, right = (torch.zeros(n, n, dtype=torch.float32, device=p.device) for n in p.shape)
        root = torch.eye(p.shape[0], device=p.device)
    left = left + p.grad @ p.grad.T
    right.mul_(0.9).add_(p.grad.T @ p.grad)
    if count % 2 == 0:
        values, vectors = torch.linalg.eigh(left)
        root = vectors @ torch.diag((values + 1).pow(-0.25)) @ vectors.T
    p.data.sub_(
        root @ p.grad @ torch.linalg.inv(right + 10 * torch.eye(p.shape[1], device=p.device)), alpha=lr
    )
    return {"left": left, "right": right, "root": root, "count": count + 1}


def test_state_of_other_shapes_is_handed_to_calls_and_written_by_them(compiled):
    ours, opt = trained(preconditioned, compiled, steps=7)
    plain, other = trained(preconditioned, "reference", steps=7)
    assert_near(ours, plain, 1e-4)
    assert_states_near(opt, other, 1e-4)
    assert opt.explain().eager == () and opt.explain().calls


def viewed_again(p, lr, gram=None, **_):
    """A view of what a program left is used once more after the next one: that of a square matrix's sum."""
    turned = p.grad.mT
    gram = torch.zeros(p.shape[0], p.shape[0], device=p.device) if gram is None else gram
    gram = 0.9 * gram + p.grad @ turned
    p.data.sub_((turned @ torch.linalg.inv(gram + 10 * torch.eye(p.shape[0], device=p.device))).mT, alpha=lr)
    return {"gram": gram}


def test_memory_is_not_used_again_while_a_view_of_it_is_needed(compiled):
    ours, opt = trained(viewed_again, compiled, shapes=[(5, 5), (5, 5), (4, 6)])
    plain, other = trained(viewed_again, "reference", shapes=[(5, 5), (5, 5), (4, 6)])
    assert_near(ours, plain, 1e-4)
    assert_states_near(opt, other, 1e-4)


def test_state_of_other_shapes_survives_a_checkpoint(compiled):
    runs = []
    for backend in (compiled, "reference"):
        params, opt = trained(preconditioned, backend, steps=3)
        again = [p.detach().clone().requires_grad_() for p in params]
        other = fused(again, preconditioned, backend)
        other.load_state_dict(opt.state_dict())
        for t in range(3, 6):
            give(again, t)
            other.step()
        runs.append(again)
    assert_near(*runs, 1e-4)


# --
# Errors, and what is skipped


def fragile(p, lr, avg, **_):
    """Fails where the gradient is no number."""
    p.data.sub_(
        torch.linalg.cholesky(avg @ avg.T + torch.eye(p.shape[0], device=p.device)) @ avg, alpha=lr * 0.1
    )


@pytest.mark.cpu_only("on a GPU this call finds no fault with NaN")
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_an_error_in_a_call_changes_nothing(steps, compiled):
    params, opt = trained([average, fragile], compiled, steps=steps)
    before = [p.detach().clone() for p in params]
    states = [{k: v.clone() for k, v in opt.state[p].items()} if p in opt.state else {} for p in params]
    give(params, 10)
    params[1].grad.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="cholesky"):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    for p, state in zip(params, states, strict=True):
        found = opt.state.get(p, {})
        assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)
    give(params, 11)
    opt.step()
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def accumulated(p, lr, left=None, **_):
    left = torch.zeros(p.shape[0], p.shape[0], device=p.device) if left is None else left
    left = left.lerp(p.grad @ p.grad.T, 0.1)
    p.data.sub_(torch.linalg.solve(left + torch.eye(p.shape[0], device=p.device), p.grad), alpha=lr)
    return {"left": left}


@pytest.mark.parametrize("callbacks", [[average, fragile], accumulated], ids=["fragile", "state"])
def test_skipped_steps_call_nothing(callbacks, compiled):
    runs = []
    for backend in (compiled, "reference"):
        params = parameters()
        opt = fused(params, callbacks, backend, amp_fused=True)
        for t in range(7):
            give(params, t)
            skipped = t in (0, 3)
            for p in params:
                p.grad.mul_(4.0).add_(torch.inf if skipped else 0.0)
            opt.grad_scale = torch.tensor(4.0)
            opt.found_inf = torch.tensor(float(skipped))
            opt.step()
            del opt.grad_scale, opt.found_inf
        runs.append((params, opt))
    (ours, opt), (plain, other) = runs
    assert_near(ours, plain, 1e-4)
    assert_states_near(opt, other, 1e-4)


def test_clipping_and_totals_go_together_with_calls(compiled):
    def clipped(p, lr, avg, **_):
        norm = fusedopt.total((avg @ avg.T) ** 2).sqrt()
        p.data.sub_(avg @ (avg.T @ avg) / norm, alpha=lr)

    ours, _ = trained([average, clipped], compiled, max_grad_norm=1.0)
    plain, _ = trained([average, clipped], "reference", max_grad_norm=1.0)
    assert_near(ours, plain, 3e-5)


def test_writing_to_what_may_be_seen_elsewhere_runs_eagerly(compiled):
    def views(p, lr, **_):
        x = p.grad @ p.grad.T
        y = x.T
        y.mul_(torch.arange(float(p.shape[0]), device=p.device))
        p.data.sub_(x @ p.grad, alpha=lr)

    def through(p, lr, **_):
        p.grad.T.mul_(2)
        p.data.sub_(p.grad, alpha=lr)

    for callback in (views, through):
        plain, _ = trained(callback, "reference")
        params = parameters()
        opt = fused(params, callback, compiled)
        with pytest.warns(RuntimeWarning, match="in place while another tensor may be a view"):
            for t in range(5):
                give(params, t)
                opt.step()
        assert_near(params, plain, 3e-5)


def test_no_memory_is_kept_by_a_step_that_is_not_repeated(compiled):
    _, opt = trained([average, operator_product], compiled, steps=1)
    assert all(not calling.memory for each in opt.engine.rounds for _, _, calling in each.calls)


def test_a_flipped_sign_is_noticed(compiled):
    def flipped(p, lr, avg, **_):
        operator_product(p, -lr, avg)

    ours, _ = trained([average, flipped], compiled)
    plain, _ = trained([average, operator_product], "reference")
    with pytest.raises(AssertionError):
        assert_near(ours, plain, 1e-3)


# --
# Muon


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs(adjust, nesterov, compiled):
    options = dict(lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust)
    ours, theirs = parameters(), parameters()
    opt, other = fusedopt.rules.Muon(ours, backend=compiled, **options), torch.optim.Muon(theirs, **options)
    largest = 0.02 * (1 if adjust is None else 0.2 * 40**0.5)
    for t in range(6):
        give(ours, t)
        give(theirs, t)
        opt.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).abs().max() < 0.1 * largest and (p - q).abs().mean() < 0.01 * largest
        buffers = opt.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"]
        assert torch.allclose(*buffers, rtol=1e-5, atol=1e-6)
    assert opt.explain().eager == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_muon_in_full_precision_is_the_formula(dtype, compiled):
    ours, plain = parameters(), parameters(torch.float64)
    opt = fusedopt.rules.Muon(ours, lr=0.02, ns_dtype=dtype, backend=compiled)
    momenta = [torch.zeros_like(p) for p in plain]
    for t in range(6):
        give(ours, t)
        opt.step()
        for p, q, m in zip(ours, plain, momenta, strict=True):
            g = p.grad.double()
            m.lerp_(g, 0.05)
            update = newton_schulz(g.lerp(m, 0.95), 5, (3.4445, -4.7750, 2.0315), 1e-7)
            q.data.mul_(1 - 0.02 * 0.1).sub_(update, alpha=0.02 * max(1, p.shape[0] / p.shape[1]) ** 0.5)
    assert_near(ours, plain, 1e-4)


def test_muon_takes_matrices_and_what_can_be_seen_as_one(compiled):
    with pytest.raises(ValueError, match="two or more dimensions"):
        fusedopt.rules.Muon(parameters(shapes=[(3,)]))
    with pytest.raises(ValueError, match="not supported"):
        fusedopt.rules.Muon(parameters(), adjust_lr_fn="other")
    ours, plain = parameters(shapes=[(6, 2, 3, 3)]), parameters(shapes=[(6, 2, 3, 3)])
    a = fusedopt.rules.Muon(ours, backend=compiled, ns_dtype=torch.float32)
    b = fusedopt.rules.Muon(plain, backend="reference", ns_dtype=torch.float32)
    for t in range(3):
        give(ours, t)
        give(plain, t)
        a.step()
        b.step()
    assert_near(ours, plain, 3e-5)
