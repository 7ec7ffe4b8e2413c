"""Random callback compositions: the kernel is the interpreter bit for bit, and eager torch but for rounding.

Callbacks are written out as source, so that a failing example shows the code that fails.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import assert_close_to_float64, assert_same_bits, compile_kernel, copies, run_kernel, signature
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

import fusedopt
from fusedopt import callbacks
from fusedopt.ir.program import Buffer, interpret
from fusedopt.trace.signature import FACTOR, FOUND_INF, Modes
from fusedopt.trace.tracer import trace

# Every new structure is compiled (0.2 s), so there are few examples, the same on every run.
# Shrinking a failure would compile hundreds; add Phase.shrink to hunt one down.
SETTINGS = dict(
    derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = st.sampled_from([(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (BF16, F32), (F32, F16)])
HYPER = dict(lr=0.1, k=0.7, wd=0.01, mom=0.9, sqr_mom=0.95, eps=1e-3, trust_coeff=0.3, nu_1=0.6, nu_2=0.8)


def grown(leaves, *templates, max_leaves=7):
    """Expressions as text, from templates with one, two and three places, given as "...; ..."."""

    def grow(inner):
        options = [(n, t.strip()) for n, ts in enumerate(templates, 1) for t in ts.split(";")]
        return st.one_of(st.builds(t.format, *[inner] * n) for n, t in options)

    return st.recursive(st.sampled_from(leaves), grow, max_leaves=max_leaves)


def takes_all(p, lr, k, wd, mom, sqr_mom, eps, trust_coeff, nu_1, nu_2, **kwargs):
    """So that every list may be given every hyperparameter."""


def callback(*lines):
    """``def callback(p, lr, k, m=None, **kwargs)`` with these lines; ``show`` shows them."""
    source = "\n    ".join(["def callback(p, lr, k, m=None, **kwargs):", *lines])
    namespace = {"torch": torch}
    exec(source, namespace)
    namespace["callback"].source = source
    return namespace["callback"]


def show(cbs):
    """The callbacks' code, in the report of a failure."""
    for cb in cbs:
        note(getattr(cb, "source", repr(cb)))


# ---------------------------------------------------------------- bit for bit

TENSORS = ["p.data", "p.grad", "m"]
EXACT = grown(
    TENSORS,
    "(-{0}); ({0}).abs(); ({0}).abs().sqrt(); ({0}).sign(); ({0}) ** 2; ({0}).round(); ({0}) * k; (lr - {0});"
    "({0}).clamp(-k, k); 1 / ({0}); ({0}).floor(); ({0}) ** -0.5; torch.full_like({0}, k)",
    "({0} + {1}); ({0} - {1}); ({0} * {1}); ({0} / {1}); torch.maximum({0}, {1}); torch.minimum({0}, {1});"
    "({0} > {1}).float(); torch.lerp({0}, {1}, k); ({0}).add({1}, alpha=lr)",
    "torch.where({0} < {1}, {2}, k); ({0}).addcmul({1}, {2}, value=lr); ({0}).addcdiv({1}, {2}, value=-lr)",
)


@st.composite
def exact_callbacks(draw):
    lines = [
        f"{draw(st.sampled_from(['p.data', 'p.grad', 'm']))}.copy_({draw(EXACT)})"
        for _ in range(draw(st.integers(1, 3)))
    ]
    return callback(*lines, f"return {{'m': {draw(EXACT)}}}" if draw(st.booleans()) else "return {'m': m}")


def special(size, dtype, generator):
    """Random numbers of many sizes, with zeros, infinities and NaN among them."""
    x = torch.randn(size, generator=generator) * 2.0 ** torch.randint(-12, 12, (size,), generator=generator)
    for value in (0.0, -0.0, 1.0, math.inf, -math.inf, math.nan):
        x[torch.randint(size, (1,), generator=generator)] = value
    return x.to(dtype)


@settings(max_examples=40, **SETTINGS)
@given(
    exact_callbacks(),
    DTYPES,
    st.sampled_from([F32, BF16, F64]),
    st.sampled_from([1, 7, 16, 33, 1000]),
    st.sampled_from([None, 0.0, 1.0]),
)
def test_kernels_are_the_interpreter_bit_for_bit(cb, dtypes, state_dtype, size, found_inf):
    """On + - * / and square roots, comparisons and selections, whatever the values; skipped steps are among them."""
    show([cb])
    generator = torch.Generator().manual_seed(size)
    seen = signature(*dtypes, m=Buffer(state_dtype, "F"))
    if found_inf is not None:
        seen = replace(seen, modes=Modes(on_device=True, scaled=True, skips=True))
    t = trace([cb], seen, HYPER)
    tensors = {
        "param": special(size, dtypes[0], generator),
        "grad": special(size, dtypes[1], generator),
        "state.m": special(size, state_dtype, generator),
    }
    if found_inf is not None:
        tensors |= {FACTOR: torch.tensor(0.7), FOUND_INF: torch.tensor(found_inf)}
    expected = interpret(t.program, tensors, t.slot_values())
    run_kernel(compile_kernel(t.program), ran := copies(tensors), t.slot_values())
    for name, before in tensors.items():
        assert_same_bits(ran[name], expected.get(name, before))


def test_the_comparison_bit_for_bit_can_fail():
    """(p + g) - g, computed as p: one rounding is missing."""
    kernel = compile_kernel(
        trace([callback("p.data.copy_(p.data + p.grad - m)")], signature(m=Buffer(F32, "F")), HYPER).program
    )
    p, g = torch.randn(2, 1000)
    run_kernel(kernel, tensors := {"param": p.clone(), "grad": g, "state.m": g.clone()})
    torch.testing.assert_close(tensors["param"], p)
    with pytest.raises(AssertionError, match="index, ours, expected"):
        assert_same_bits(tensors["param"], p)


# ---------------------------------------------------------------- by competition

STEPS = 3
SHAPES = [(5, 33), (131,), (2, 3, 50)]  # large enough that no competitor is exact by luck
SMOOTH = grown(
    [*TENSORS, "p.data", "p.grad"],
    "(-{0}); torch.tanh({0}); (({0}).abs() + 1).sqrt(); (-({0}).abs()).exp(); ({0}) * k; (k - {0});"
    "({0}) / (({0}).norm() + 1); ({0} - ({0}).mean()); ({0}) * ({0}).square().mean().sqrt()",
    "({0} + {1}); ({0} - {1}); ({0} * {1}); ({0} / (({1}).abs() + 1)); ({0}).add({1}, alpha=lr);"
    "torch.lerp({0}, {1}, k)",
    "({0}).addcmul({1}, {2}, value=lr)",
    max_leaves=6,
)


@st.composite
def smooth_lists(draw):
    """One or two callbacks: state that starts as zeros or as something else, a branch, a step along an expression."""
    out = []
    for _ in range(draw(st.integers(1, 2))):
        start = draw(st.sampled_from(["torch.zeros_like(p)", "p.data.clone()", "p.grad * k"]))
        optional = [
            f"p.grad.copy_({draw(SMOOTH)})",
            f"if p.grad.norm() > {draw(st.sampled_from([1, 8, 64]))}: p.grad.mul_(k)",
        ]
        lines = [
            f"m = {start} if m is None else m",
            *(line for line in optional if draw(st.booleans())),
            f"m.mul_(k).add_({draw(SMOOTH)}, alpha=lr)",
            f"p.data.sub_({draw(SMOOTH)}, alpha=lr)",
            "return {'m': m}",
        ]
        out.append(callback(*lines))
    return out


@st.composite
def our_lists(draw):
    """Lists of the library's own callbacks, in an order that provides each with the state it reads."""
    averages = [partial(callbacks.average_grad, dampening=draw(st.booleans())), callbacks.average_sqr_grad]
    decay = draw(
        st.sampled_from(
            [[], [callbacks.weight_decay], [callbacks.l2_reg], [callbacks.weight_decay, callbacks.l2_reg]]
        )
    )
    steps = [
        callbacks.sgd_step,
        callbacks.momentum_step,
        callbacks.rms_prop_step,
        callbacks.adam_step,
        callbacks.qhadam_step,
    ]
    steps += [callbacks.lamb_step, callbacks.radam_step]
    chosen = draw(st.lists(st.sampled_from(steps), min_size=1, max_size=2))
    larc = draw(st.sampled_from([[], [callbacks.larc_layer_lr, callbacks.larc_step]]))
    return [*decay, *draw(st.permutations(averages)), callbacks.step_stat, *larc, *chosen]


def steps(cbs, backend, dtypes, seed):
    """Parameters after all steps. In float64 (``dtypes`` None) the same start and gradients, rounded as they were."""
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(STEPS + 1, *shape, generator=generator) for shape in SHAPES]
    rounded = [(x[0].to(dtypes[0]), x[1:].to(dtypes[1])) for x in numbers]
    if backend == "float64":
        rounded = [(p.double(), g.double()) for p, g in rounded]
    params = [p.clone().requires_grad_() for p, _ in rounded]
    opt = fusedopt.Optimizer(
        params, [takes_all, *cbs], backend="reference" if backend == "float64" else backend, **HYPER
    )
    for t in range(STEPS):
        for p, (_, g) in zip(params, rounded, strict=True):
            p.grad = None
            p.grad = g[t].clone() if g.dtype == p.dtype else with_grad(p, g[t])
        opt.step()
    if backend == "cpp":
        assert opt.explain().eager == ()
    return [p.detach() for p in params]


def with_grad(p, grad):
    """A gradient of another dtype than its parameter's: torch wants to be told that it may be."""
    p.grad_dtype = None
    return grad.clone()


def check(cbs, dtypes, seed, mutate=lambda cbs: cbs):
    truth = steps(cbs, "float64", dtypes, seed)
    eager = steps(cbs, "reference", dtypes, seed)
    # In float64 the truth is rounded as the competitor is, which so has no error: 2 ulp for each step.
    ulp = 2.0 * STEPS if F64 in dtypes else 2.0
    assert_close_to_float64(steps(mutate(cbs), "cpp", dtypes, seed), eager, truth, ulp)


@settings(max_examples=20, **SETTINGS)
@given(smooth_lists(), DTYPES, st.integers(0, 3))
def test_random_callbacks_are_as_close_to_float64_as_eager_torch(cbs, dtypes, seed):
    show(cbs)
    check(cbs, dtypes, seed)


@settings(max_examples=20, **SETTINGS)
@given(our_lists(), DTYPES, st.integers(0, 3))
def test_random_lists_of_our_callbacks_are_as_close_to_float64_as_eager_torch(cbs, dtypes, seed):
    check(cbs, dtypes, seed)


ADAM = [
    callbacks.weight_decay,
    callbacks.average_grad,
    callbacks.average_sqr_grad,
    callbacks.step_stat,
    callbacks.adam_step,
]
MUTATIONS = {
    "weight decay dropped": lambda cbs: cbs[1:],
    "a sign flipped": lambda cbs: [callback("p.grad.neg_()"), *cbs],
    "a step 0.01% too long": lambda cbs: [*cbs, callback("p.data.mul_(1 + 1e-4 * k)")],
    "an average forgotten": lambda cbs: [
        cbs[0],
        callback("return {'grad_avg': p.grad * (1 - 0.9)}"),
        *cbs[2:],
    ],
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_competition_can_be_lost(name):
    check(ADAM, (F32, F32), 0)
    with pytest.raises(AssertionError, match="above"):
        check(ADAM, (F32, F32), 0, MUTATIONS[name])
