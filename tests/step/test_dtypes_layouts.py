"""Every dtype, size and memory layout: compiled steps against the reference, the reference against float64.

The truth is a loop over the callbacks in float64, written out in ``plain`` and sharing nothing with fusedopt.
The tolerance is the competitor's error (``helpers.assert_close_to_float64``): for the reference that of the
same loop in the parameters' own dtype, for compiled steps that of the reference.
Compiled steps are taken where --device says, all else on the CPU: on a GPU eager torch rounds differently.
"""

from functools import cache, partial

import pytest
import torch
from devices import COMPILED, DEVICE
from helpers import assert_close_to_float64
from torch import nn

import fusedopt
from fusedopt import (
    adam_step,
    average_grad,
    average_sqr_grad,
    l2_reg,
    lamb_step,
    larc_layer_lr,
    larc_step,
    momentum_step,
    radam_step,
    step_stat,
    weight_decay,
)

MOMENTS = [partial(average_grad, dampening=True), average_sqr_grad, step_stat]
OPTIMIZERS = dict(
    Adam=[weight_decay, *MOMENTS, adam_step],
    Lamb=[weight_decay, *MOMENTS, lamb_step],
    Larc=[l2_reg, average_grad, partial(larc_layer_lr, trust_coeff=0.5), larc_step],
    SGD=[l2_reg, average_grad, momentum_step],
    RAdam=[weight_decay, *MOMENTS, radam_step],
)
HYPERS = dict(lr=0.1, wd=0.5, mom=0.8, sqr_mom=0.9, eps=1e-3)
STEPS = 8  # RAdam changes its kernel at the sixth
BACKENDS = ["reference", *COMPILED]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


# --
# Parameters and gradients in every layout. A case is a function from a generator of numbers to (parameter, gradient).


def nchw(t):
    return t.contiguous(memory_format=torch.channels_last)


def at_odd_offset(t, offset=1):
    """The same numbers as a view that starts in the middle of nowhere, as in a flat gradient buffer."""
    flat = t.new_zeros(t.numel() + offset + 3)
    view = flat[offset : offset + t.numel()].view(t.shape)
    return view.copy_(t)


LAYOUTS = {
    "empty": lambda r: (r(0), r(0)),
    "empty matrix": lambda r: (r(2, 0), r(2, 0)),
    "0-d": lambda r: (r(), r()),
    "one": lambda r: (r(1), r(1)),
    "three": lambda r: (r(3), r(3)),
    "seventeen": lambda r: (r(17), r(17)),
    "ones everywhere": lambda r: (r(1, 9, 1, 1), r(9, 1, 1, 1).transpose(0, 1)),
    "channels_last": lambda r: (nchw(r(2, 3, 4, 5)), nchw(r(2, 3, 4, 5))),
    "channels_last, gradient not": lambda r: (nchw(r(2, 3, 4, 5)), r(2, 3, 4, 5)),
    "gradient channels_last": lambda r: (r(2, 3, 4, 5), nchw(r(2, 3, 4, 5))),
    "channels_last_3d": lambda r: (
        r(2, 3, 2, 2, 2).contiguous(memory_format=torch.channels_last_3d),
        r(2, 3, 2, 2, 2),
    ),
    "transposed": lambda r: (r(6, 5).t(), r(6, 5).t()),
    "transposed, gradient not": lambda r: (r(6, 5).t(), r(5, 6)),
    "permuted, gradient otherwise": lambda r: (r(3, 4, 5).permute(2, 0, 1), r(5, 4, 3).permute(0, 2, 1)),
    "slice of columns": lambda r: (r(4, 10)[:, ::2], r(4, 5)),
    "slice of a vector": lambda r: (r(30)[1::3], r(20)[::2]),
    "transposed slice": lambda r: (r(9, 8)[::3, :4].t(), r(4, 3)),
    "gradient expanded": lambda r: (r(4, 5), r(4, 1).expand(4, 5)),
    "gradient expanded from one": lambda r: (r(7), r(1).expand(7)),
    "gradient unaligned": lambda r: (r(33), at_odd_offset(r(33))),
    "parameter unaligned": lambda r: (at_odd_offset(r(33), 3), r(33)),
    "both unaligned, transposed": lambda r: (at_odd_offset(r(5, 7)).t(), at_odd_offset(r(5, 7), 5).t()),
}


def numbers(dtype, seed=0, device="cpu"):
    """A generator of numbers that are exact in ``dtype``, whatever dtype they are asked for later."""
    gen = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=gen, dtype=torch.float64).to(device, dtype)


SIZES = dict(chunks=(140_003, 65_536, 65_537), million=(1_000_003,))
"""Several chunks with a tail, and what is about one chunk long; and a large one."""


def problem(dtype, which=None, device="cpu"):
    """Pairs of parameter and gradient: in every layout, or of the sizes called ``which``."""
    r = numbers(dtype, device=device)
    pairs = [(r(n), r(n)) for n in SIZES[which]] if which else [make(r) for make in LAYOUTS.values()]
    assert all(t.dtype == dtype for pair in pairs for t in pair)
    return pairs


def scaled(grad, t):
    """The gradient of step ``t``, exact in every dtype: other strides, same bits."""
    return (0.5 if t % 3 else -2.0) * grad if t else grad


# --
# Three ways to run it


def plain(cbs, pairs, dtype, hypers, steps):
    """The truth: fastai's contract in ten lines, in one dtype, by eager torch."""
    out = []
    for p, g in pairs:
        q, state = p.detach().to(dtype, copy=True), {}
        for t in range(steps):
            q.grad = scaled(g, t).to(dtype, copy=True).contiguous()
            for cb in cbs:
                new = cb(q, **{**state, **hypers})
                if isinstance(new, dict):
                    state |= {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in new.items()}
        out.append((q, state))
    return out


def steps_of(cbs, pairs, steps=STEPS, grad_dtype=None, hypers=HYPERS, **options):
    """Run fusedopt over the problem. Returns the optimizer and its parameters."""
    params = []
    for p, _ in pairs:
        params.append(nn.Parameter(p.new_empty(0)))
        params[-1].data = p  # keeps the layout, and what lies between a slice's elements
        assert params[-1].stride() == p.stride()
        if grad_dtype is not None:
            params[-1].grad_dtype = grad_dtype
    opt = fusedopt.Optimizer(params, cbs, **hypers, **options)
    for t in range(steps):
        for p, (_, g) in zip(params, pairs, strict=True):
            p.grad = (g if t == 0 else scaled(g, t)).to(grad_dtype or g.dtype)
        before = [(p.grad.clone(), p.grad._version) for p in params]
        opt.step()
        for p, (g, version) in zip(params, before, strict=True):
            assert torch.equal(p.grad, g) and p.grad._version == version, "a step never changes gradients"
    return opt, params


def is_dense(t):
    return torch.ops.aten.is_non_overlapping_and_dense(t)


def tensors(params, states):
    """Parameters and their state tensors, in order; those without elements have nothing to compare.

    One number per tensor is looked at in the parameter's dtype: it follows from a parameter rounded to that.
    """
    out = []
    for p, state in zip(params, states, strict=True):
        if p.numel():
            found = [state[k] for k in sorted(state) if isinstance(state[k], torch.Tensor)]
            out += [p.detach(), *(v if v.shape == p.shape else v.to(p.dtype) for v in found)]
    return out


@cache
def truth(name, dtype, which, steps):
    return plain(OPTIMIZERS[name], problem(dtype, which), torch.float64, HYPERS, steps)


@cache
def reference(name, dtype, which, steps, options=()):
    return steps_of(OPTIMIZERS[name], problem(dtype, which), steps, backend="reference", **dict(options))


def check_reference(name, dtype, cbs=None, steps=STEPS):
    """The reference's parameters are as near to float64 as eager torch in the same dtype."""
    _, params = (
        reference(name, dtype, None, steps)
        if cbs is None
        else steps_of(cbs, problem(dtype), steps, backend="reference")
    )
    eager = plain(OPTIMIZERS[name], problem(dtype), dtype, HYPERS, steps)
    true = truth(name, dtype, None, steps)
    keep = [i for i, p in enumerate(params) if p.numel()]
    assert_close_to_float64(
        [params[i].detach() for i in keep], [eager[i][0] for i in keep], [true[i][0] for i in keep]
    )


def check_compiled(backend, name, dtype, cbs=None, which=None, steps=STEPS, **options):
    """Parameters and state are as near to float64 as the reference's; same keys, dtypes and strides."""
    a, pa = reference(name, dtype, which, steps, tuple(options.items()))
    pairs = problem(dtype, which, DEVICE)
    b, pb = steps_of(cbs or OPTIMIZERS[name], pairs, steps, backend=backend, **options)
    for p, q in zip(pa, pb, strict=True):
        assert p.stride() == q.stride()
        s, t = a.state[p], b.state[q]
        assert s.keys() == t.keys()
        for k in s:
            if isinstance(s[k], torch.Tensor):
                assert (s[k].dtype, s[k].shape) == (t[k].dtype, t[k].shape), k
                assert s[k].stride() == t[k].stride() or not is_dense(p), k
            else:
                assert s[k] == t[k], k
    ours, eager = (tensors(params, [opt.state[p] for p in params]) for opt, params in ((b, pb), (a, pa)))
    ours = [t.cpu() for t in ours]
    true = tensors(*zip(*truth(name, dtype, which, steps), strict=True))
    # In float64 eager torch is itself the truth, but one that rounds, too: about an ulp on every step.
    assert_close_to_float64(ours, eager, true, ulp=8 if dtype == torch.float64 else 2)
    return a, b, pb


@pytest.mark.cpu_only("nothing is compiled")
@every_dtype
@every_optimizer
def test_the_reference_follows_float64_in_every_layout(name, dtype):
    check_reference(name, dtype)


@every_dtype
@every_optimizer
def test_compiled_steps_follow_the_reference_in_every_layout(name, dtype, compiled):
    _, opt, params = check_compiled(compiled, name, dtype)
    assert not opt.explain().eager
    assert opt.explain().backend == compiled
    for p in params:
        for value in opt.state[p].values():
            if isinstance(value, torch.Tensor) and value.shape == p.shape and p.dim():
                assert value.dtype == dtype


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in OPTIMIZERS]
    + [(name, dtype) for name in ("Adam", "Larc") for dtype in DTYPES if dtype != torch.float32],
    ids=str,
)
def test_compiled_steps_follow_the_reference_over_several_chunks(name, dtype, compiled):
    check_compiled(compiled, name, dtype, which="chunks", steps=2)


@pytest.mark.parametrize("name", ["Adam", "Lamb"])
def test_compiled_steps_follow_the_reference_over_a_million_elements(name, compiled):
    check_compiled(compiled, name, torch.float32, which="million", steps=1)


@every_optimizer
def test_low_precision_parameters_with_float32_state(name, compiled):
    _, opt, params = check_compiled(compiled, name, torch.bfloat16, state_dtype=torch.float32)
    states = [v for p in params for v in opt.state[p].values() if isinstance(v, torch.Tensor)]
    assert states and {v.dtype for v in states} == {torch.float32}


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")
@every_optimizer
def test_low_precision_parameters_with_float32_gradients(name, compiled):
    check_compiled(compiled, name, torch.bfloat16, grad_dtype=torch.float32)


def flip_gradient(p, **kwargs):
    p.grad.data.neg_()


def without_decay(cbs):
    return [cb for cb in cbs if cb not in (weight_decay, l2_reg)]


MUTATIONS = dict(flip=lambda cbs: [flip_gradient, *cbs], decay=without_decay)


@pytest.mark.parametrize("mutation", MUTATIONS)
@every_dtype
def test_mutation_the_comparisons_notice(dtype, mutation, compiled):
    for name in ("Adam", "Lamb"):
        cbs = MUTATIONS[mutation](OPTIMIZERS[name])
        with pytest.raises(AssertionError, match=r"error .* above"):
            check_reference(name, dtype, cbs)
        with pytest.raises(AssertionError, match=r"error .* above"):
            check_compiled(compiled, name, dtype, cbs)
    if dtype == torch.float32:
        with pytest.raises(AssertionError, match=r"error .* above"):
            check_compiled(
                compiled, "SGD", dtype, MUTATIONS[mutation](OPTIMIZERS["SGD"]), which="chunks", steps=2
            )


@pytest.mark.parametrize("case", [c for c in LAYOUTS if "empty" not in c])
def test_mutation_one_wrong_element_is_noticed_in_every_layout(case, monkeypatch, compiled):
    reference("SGD", torch.float32, None, STEPS, ())  # as they should be
    truth("SGD", torch.float32, None, STEPS)
    make = LAYOUTS[case]

    def spoilt(r):
        p, g = make(r)
        g = g.clone()
        g[(0,) * g.dim()] += 1.0
        return p, g

    monkeypatch.setitem(LAYOUTS, case, spoilt)
    with pytest.raises(AssertionError, match=r"error .* above"):
        check_compiled(compiled, "SGD", torch.float32)


# --
# Bits


@pytest.mark.cpu_only("it is about the host's threads")
@every_dtype
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    def run(threads):
        torch.set_num_threads(threads)
        opt, params = steps_of(OPTIMIZERS["Lamb"], problem(dtype, "chunks"), 2, backend="cpp")
        return tensors(params, [opt.state[p] for p in params])

    one = run(1)
    for threads in (2, 3, 8):
        assert all(map(torch.equal, one, run(threads)))


def test_results_do_not_depend_on_the_other_parameters(compiled):
    together = steps_of(OPTIMIZERS["Lamb"], problem(torch.float32, device=DEVICE), backend=compiled)
    for i, pair in enumerate(problem(torch.float32, device=DEVICE)):
        alone = steps_of(OPTIMIZERS["Lamb"], [pair], backend=compiled)
        assert torch.equal(alone[1][0], together[1][i])


def test_an_elementwise_optimizer_does_not_depend_on_the_layout(compiled):
    """The same numbers in another order of memory: the same bits."""
    _, params = steps_of(OPTIMIZERS["Adam"], problem(torch.float32, device=DEVICE), backend=compiled)
    straight = [(p.contiguous(), g.contiguous()) for p, g in problem(torch.float32, device=DEVICE)]
    _, expected = steps_of(OPTIMIZERS["Adam"], straight, backend=compiled)
    for p, e in zip(params, expected, strict=True):
        assert torch.equal(p, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_between_a_slices_elements_is_left_alone(backend):
    base = torch.arange(40.0, device=DEVICE).reshape(4, 10)
    before, p = base.clone(), nn.Parameter(base.new_empty(0))
    p.data = base[:, ::2]
    p.grad = torch.ones(4, 5, device=DEVICE)
    opt = fusedopt.Optimizer([p], OPTIMIZERS["Adam"], backend=backend, **HYPERS)
    for _ in range(3):
        opt.step()
    assert torch.equal(base[:, 1::2], before[:, 1::2])
    assert (base[:, ::2] != before[:, ::2]).all()
    assert torch.equal(p.detach(), base[:, ::2]), "the parameter still is the slice"


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_notices_a_stale_use(backend):
    def host(p, **kwargs):
        p.data.mul_(1 + 0 * p.data.sum().item())

    base = torch.ones(6, 4, device=DEVICE)
    for cbs, eager in ((OPTIMIZERS["Adam"], False), ([*OPTIMIZERS["Adam"], host], backend != "reference")):
        for make in (
            lambda: torch.ones(3, 4, device=DEVICE),
            lambda: torch.ones(4, 3, device=DEVICE).t(),
            lambda: base[::2],
        ):
            p = nn.Parameter(base.new_empty(0))
            p.data = make()
            opt = fusedopt.Optimizer([p], cbs, backend=backend, **HYPERS)
            for t in range(3):
                loss = (p * p).sum()
                p.grad = torch.ones(3, 4, device=DEVICE)
                version = p._version
                if eager and t == 0:
                    with pytest.warns(RuntimeWarning, match="host runs eagerly"):
                        opt.step()
                else:
                    opt.step()
                assert p._version > version
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()


# --
# Changes between steps


def model_steps(change, name="Adam", backend=COMPILED[0], dtype=torch.float32, before=2, after=3):
    """Some steps of a small convolutional model, a change of the model, and more steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to(DEVICE, dtype)
    opt = fusedopt.Optimizer(model.parameters(), OPTIMIZERS[name], backend=backend, **HYPERS)
    gen = torch.Generator().manual_seed(1)

    def steps(n):
        for _ in range(n):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=gen).to(p)
            opt.step()

    steps(before)
    change(model)
    steps(after)
    return opt, list(model.parameters())


def to_channels_last(model):
    model.to(memory_format=torch.channels_last)


def nothing(model):
    pass


@pytest.mark.parametrize("name", ["Adam", "Lamb"])
def test_a_model_that_turns_channels_last_keeps_its_trajectory(name):
    for backend in BACKENDS:
        changed, params = model_steps(to_channels_last, name, backend)
        _, expected = model_steps(nothing, name, backend)
        assert params[0].is_contiguous(memory_format=torch.channels_last)
        for p, e in zip(params, expected, strict=True):
            torch.testing.assert_close(p, e, rtol=1e-6, atol=1e-7)
            if name == "Adam" and backend != "reference":
                assert torch.equal(p, e)
        if backend != "reference":
            assert changed.state[params[0]]["grad_avg"].stride() == params[0].stride()
            assert len(changed.explain().compiled) == 1, "another layout is no other kernel"


@pytest.mark.parametrize(
    ("change", "dtype"), [("double", torch.float64), ("half", torch.float16), ("bfloat16", torch.bfloat16)]
)
def test_a_model_that_changes_dtype_keeps_its_state(change, dtype, compiled):
    """Parameter and gradient in the new dtype, state in its own; computed as for any such mixture."""
    a, pa = model_steps(lambda m: getattr(m, change)(), backend="reference")
    b, pb = model_steps(lambda m: getattr(m, change)(), backend=compiled)
    eps = max(torch.finfo(torch.float32).eps, torch.finfo(dtype).eps)
    for p, q in zip(pa, pb, strict=True):
        assert q.dtype == dtype
        torch.testing.assert_close(p, q, rtol=0, atol=2 * eps * p.abs().max().item())
        for k in ("grad_avg", "sqr_avg"):
            assert b.state[q][k].dtype == a.state[p][k].dtype == torch.float32
            torch.testing.assert_close(a.state[p][k], b.state[q][k], rtol=1e-6, atol=1e-7)
        assert b.state[q]["step"] == 5
    assert (
        "now" in b.explain().compiled[1].why
        and str(dtype).removeprefix("torch.") in b.explain().compiled[1].why
    )


def test_mutation_state_read_in_the_old_layout_is_noticed():
    def to_channels_last_wrongly(model):
        p = model[0].weight
        p.data = p.data.flatten().as_strided(
            p.shape, torch.empty_like(p.data, memory_format=torch.channels_last).stride()
        )

    _, params = model_steps(to_channels_last_wrongly)
    _, expected = model_steps(nothing)
    assert not torch.allclose(params[0], expected[0], rtol=1e-6, atol=1e-7)


# --
# Who is stepped, and with what


def lagging(cbs, backend, steps=12, flags=True):
    """Two groups; a parameter that misses gradients, one that never has any, one that does not decay."""
    r = numbers(torch.float32, device=DEVICE)
    params = [nn.Parameter(r(4, 3)), nn.Parameter(r(5)), nn.Parameter(r(3)), nn.Parameter(r(2, 2))]
    groups = [dict(params=params[:2]), dict(params=params[2:], lr=0.03, mom=0.5, wd=0.3)]
    opt = fusedopt.Optimizer(groups, cbs, backend=backend, **HYPERS)
    if flags:
        opt.state[params[0]]["do_wd"] = False
    log = []
    for t in range(steps):
        grads = [r(p.numel()).reshape(p.shape) for p in params]
        missing = (1,) if t < 4 or t == 7 else ()
        for i, p in enumerate(params):
            p.grad = None if i == 3 or i in missing else grads[i]
        if flags and t == 8:
            opt.state[params[0]]["do_wd"], opt.state[params[1]]["do_wd"] = True, False
        opt.step()
        log.append([g.cpu() if p.grad is not None else None for p, g in zip(params, grads, strict=True)])
    return opt, params, log


def lagging_truth(cbs, log, dtype):
    r = numbers(torch.float32)
    start = [r(4, 3), r(5), r(3), r(2, 2)]
    out = []
    for i, p in enumerate(start):
        q, state = p.to(dtype), {}
        hypers = HYPERS | (dict(lr=0.03, mom=0.5, wd=0.3) if i >= 2 else {})
        for t, grads in enumerate(log):
            if grads[i] is None:
                continue
            q.grad = grads[i].to(dtype, copy=True)
            do_wd = not (i == 0 and t < 8) and not (i == 1 and t >= 8)
            for cb in cbs:
                new = cb(q, **{**state, "do_wd": do_wd, **hypers})
                state |= new if isinstance(new, dict) else {}
        out.append((q, state))
    return out


def check_lagging(name, backend, cbs=None, flags=True):
    opt, params, log = lagging(cbs or OPTIMIZERS[name], backend, flags=flags)
    true, eager = (lagging_truth(OPTIMIZERS[name], log, d) for d in (torch.float64, torch.float32))
    assert_close_to_float64([p.detach().cpu() for p in params], [q for q, _ in eager], [q for q, _ in true])
    return opt, params


@pytest.mark.parametrize("backend", BACKENDS)
@every_optimizer
def test_groups_flags_and_missing_gradients(name, backend):
    """Each group has its numbers; a parameter without gradient stands still and its step count lags."""
    opt, params = check_lagging(name, backend)
    assert params[3] not in opt.state
    if name in ("Adam", "Lamb", "RAdam"):
        assert [opt.state[p]["step"] for p in params[:3]] == [12, 7, 12]


@pytest.mark.parametrize("backend", BACKENDS)
def test_mutation_flags_and_groups_count(backend):
    with pytest.raises(AssertionError, match=r"error .* above"):
        check_lagging("Adam", backend, flags=False)
    with pytest.raises(AssertionError, match=r"error .* above"):
        check_lagging("Adam", backend, without_decay(OPTIMIZERS["Adam"]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_parameter_stands_still_and_its_bias_correction_lags(backend):
    """With a constant gradient and bias correction, Adam's step is lr·g/(|g| + eps) from the first on."""
    p, q = (nn.Parameter(torch.zeros(3, device=DEVICE)) for _ in range(2))
    opt = fusedopt.Optimizer(
        [[p], [q]], OPTIMIZERS["Adam"], backend=backend, **HYPERS | dict(wd=0.0, eps=0.0)
    )
    opt.freeze_to(1)
    for _ in range(5):
        q.grad = torch.full_like(q, 2.0)
        opt.step()
    assert (p == 0).all() and p not in opt.state
    opt.unfreeze()
    p.grad = torch.full_like(p, -3.0)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, 0.1))
    torch.testing.assert_close(q.detach(), torch.full_like(q, -0.6))
    assert (opt.state[p]["step"], opt.state[q]["step"]) == (1, 6)


def test_a_parameter_without_elements_only_counts():
    for backend in BACKENDS:
        p = nn.Parameter(torch.zeros(0, 3, device=DEVICE))
        p.grad = torch.zeros_like(p)
        opt = fusedopt.Optimizer([p], OPTIMIZERS["Larc"] + [step_stat], backend=backend, **HYPERS)
        for _ in range(3):
            opt.step()
        state = opt.state[p]
        assert state["step"] == 3
        assert (state["grad_avg"].shape, state["local_lr"].shape) == ((0, 3), ())


def test_a_gradient_whose_memory_holds_its_negative_is_read_as_what_it_is():
    """torch makes such real tensors: the imaginary part of a conjugate, say."""
    for backend in BACKENDS:
        p = nn.Parameter(torch.zeros(4, device=DEVICE))
        opt = fusedopt.Optimizer([p], OPTIMIZERS["SGD"], backend=backend, **HYPERS)
        for _ in range(3):
            p.grad = torch._neg_view(torch.arange(1.0, 5.0, device=DEVICE))
            assert p.grad.is_neg()
            opt.step()
        assert (p > 0).all()


# --
# Views of other memory, and memory in common


def imaginary(values):
    """What stands in memory as its negative."""
    return torch.complex(torch.zeros_like(values), -values).conj().imag


VIEWS = {
    "negative": imaginary,
    "negative and dense": lambda x: torch._neg_view(-x),
    "every second column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("grad", VIEWS)
@pytest.mark.parametrize("param", [v for v in VIEWS if v != "expanded"])
def test_views_are_stepped_as_by_torch(param, grad, backend):
    values = torch.randn(4, device=DEVICE)
    p, q = nn.Parameter(VIEWS[param](values)), nn.Parameter(values.clone())
    ours = fusedopt.optim.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.1, backend=backend)
    theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(4):
        p.grad = VIEWS[grad](torch.randn(4, device=DEVICE))
        q.grad = p.grad.resolve_neg().clone()
        ours.step(), theirs.step()
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("offset", [0, 1, -1, 3])
@pytest.mark.parametrize("size", [5, 100_000])
def test_a_gradient_in_the_parameters_own_memory_is_read_before_it_is_written(size, offset, compiled):
    memory = torch.randn(size + 16, device=DEVICE)
    p = nn.Parameter(memory[8 : 8 + size])
    q = nn.Parameter(p.detach().clone())
    ours = fusedopt.optim.AdamW([p], lr=0.1, backend=compiled)
    theirs = torch.optim.AdamW([q], lr=0.1)
    for t in range(6):  # warm when the gradient moves in
        p.grad = torch.randn(size, device=DEVICE) if t < 3 else memory[8 + offset : 8 + offset + size]
        q.grad = p.grad.detach().clone()
        ours.step(), theirs.step()
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_scalar_parameter_steps_as_a_vector_of_one(state_dtype, capturable, backend):
    found = []
    for shape in ((), (1,)):
        p = nn.Parameter(torch.ones(shape, device=DEVICE))
        opt = fusedopt.optim.AdamW(
            [p], lr=0.1, state_dtype=state_dtype, capturable=capturable, backend=backend
        )
        for _ in range(4):
            p.grad = torch.full_like(p, 0.7)
            opt.step()
        found.append(p.item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("backend", COMPILED)
def test_memory_in_another_order_than_that_of_state_along_some_dimensions(backend):
    """Its kernel needs memory in the order of dimensions, in every step: what is bound walks the parameter's own."""

    def lines(p, lr, mean=None, **kwargs):
        mean = torch.zeros_like(p.grad.sum(3)) if mean is None else mean
        mean = mean * 0.5 + p.grad.sum(3)
        p.data.sub_((p.grad - mean.unsqueeze(3)) * lr)
        return {"mean": mean}

    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(2, 3, 4, 5, generator=generator).to(DEVICE) for _ in range(5))
    found = []
    for name in (backend, "reference"):
        p = start.clone(memory_format=torch.channels_last).requires_grad_()
        opt = fusedopt.Optimizer([p], [lines], lr=0.1, backend=name)
        for grad in grads:
            p.grad = grad
            opt.step()
        found.append(p.detach())
    torch.testing.assert_close(*found)
