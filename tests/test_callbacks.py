"""Each callback alone: one call against fastai's of that name, and what its docstring and code promise."""

import dis
import inspect
import types
import warnings
from functools import partial

import pytest
import torch

import fusedopt
from fusedopt import callbacks

with warnings.catch_warnings():
    # fastai scripts a function at import; torch deprecates that, and fastai is not ours to change
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=DeprecationWarning)
    import fastai.optimizer as fastai_optimizer

HYPERS = dict(lr=0.1, wd=0.02, mom=0.8, sqr_mom=0.9, eps=1e-3, step=7)
MOMENTS = ("grad_avg", "sqr_avg")

# name, state tensors handed in, further keyword arguments
CALLS = [
    ("sgd_step", (), {}),
    ("weight_decay", (), {}),
    ("weight_decay", (), dict(do_wd=False)),
    ("weight_decay", (), dict(wd=0.0)),
    ("l2_reg", (), {}),
    ("l2_reg", (), dict(do_wd=False)),
    ("average_grad", (), {}),
    ("average_grad", ("grad_avg",), {}),
    ("average_grad", ("grad_avg",), dict(dampening=True)),
    ("average_sqr_grad", (), {}),
    ("average_sqr_grad", ("sqr_avg",), dict(dampening=False)),
    ("momentum_step", ("grad_avg",), {}),
    ("rms_prop_step", ("sqr_avg",), {}),
    ("rms_prop_step", MOMENTS, {}),
    ("step_stat", (), {}),
    ("adam_step", MOMENTS, {}),
    ("radam_step", MOMENTS, dict(beta=0.0)),
    ("radam_step", MOMENTS, dict(beta=3.0)),
    ("radam_step", MOMENTS, dict(beta=0.0, eps=0.0)),
    ("radam_step", MOMENTS, dict(beta=0.0, step=2)),
    ("qhadam_step", MOMENTS, dict(nu_1=0.7, nu_2=0.6)),
    ("larc_layer_lr", (), dict(trust_coeff=0.02)),
    ("larc_layer_lr", (), dict(trust_coeff=50.0)),
    ("larc_layer_lr", (), dict(trust_coeff=50.0, clip=False)),
    ("larc_step", (), dict(local_lr=0.3)),
    ("larc_step", ("grad_avg",), dict(local_lr=torch.tensor(0.3, dtype=torch.float64))),
    ("lamb_step", MOMENTS, {}),
    ("lamb_step", MOMENTS, dict(lr=1e-4, wd=0.0)),
]
IDS = [f"{n}-{'-'.join([*s, *map(str, k)]) or 'plain'}-{i}" for i, (n, s, k) in enumerate(CALLS)]


def call(func, state_names, kwargs, zero=False, seed=0):
    """Parameter, gradient and returned state after one call on random values, in float64."""
    gen = torch.Generator().manual_seed(seed)
    p = (torch.randn(4, 5, generator=gen, dtype=torch.float64) * (not zero)).requires_grad_()
    p.grad = torch.randn(4, 5, generator=gen, dtype=torch.float64)
    state = {k: torch.rand(4, 5, generator=gen, dtype=torch.float64) + 0.1 for k in state_names}
    returned = func(p, **{**HYPERS, **state, **kwargs})
    # a callback may change a state tensor in place and return it, so what was handed in counts as well
    state |= returned if isinstance(returned, dict) else {}
    return p.detach(), p.grad, state


def assert_same(ours, theirs):
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    assert ours[2].keys() == theirs[2].keys()
    for key, a in ours[2].items():
        a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, theirs[2][key]))
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(("name", "state", "kwargs"), CALLS, ids=IDS)
def test_same_as_fastai(name, state, kwargs):
    ours, theirs = getattr(callbacks, name), getattr(fastai_optimizer, name)
    assert_same(call(ours, state, kwargs), call(theirs, state, kwargs))


@pytest.mark.parametrize("name", ["larc_layer_lr", "lamb_step"])
def test_same_as_fastai_for_a_tensor_without_a_norm(name):
    state, kwargs = (MOMENTS, {}) if name == "lamb_step" else ((), dict(trust_coeff=0.02))
    ours, theirs = getattr(callbacks, name), getattr(fastai_optimizer, name)
    assert_same(call(ours, state, kwargs, zero=True), call(theirs, state, kwargs, zero=True))


@pytest.mark.parametrize(
    "changed", [dict(lr=0.1 * (1 + 1e-9)), dict(mom=0.8 + 1e-9), dict(eps=1e-3 + 1e-9), dict(step=8)]
)
def test_mutation_is_noticed(changed):
    ours, theirs = callbacks.adam_step, fastai_optimizer.adam_step
    with pytest.raises(AssertionError):
        assert_same(call(ours, MOMENTS, changed), call(theirs, MOMENTS, {}))


def test_mutated_state_is_noticed():
    ours, theirs = callbacks.average_grad, fastai_optimizer.average_grad
    with pytest.raises(AssertionError, match="grad_avg"):
        assert_same(call(ours, ("grad_avg",), dict(mom=0.8 + 1e-9)), call(theirs, ("grad_avg",), {}))


# ------------------------------------------------------------------------------------------------------------
# Defaults (fastai sets `_defaults`, which nothing reads, on four of them)


FASTAI_NAMES = [n for n in callbacks.__all__ if hasattr(fastai_optimizer, n)]


@pytest.mark.parametrize("name", FASTAI_NAMES)
def test_defaults_include_fastais(name):
    theirs = getattr(fastai_optimizer, name)
    meant = getattr(theirs, "defaults", None) or getattr(theirs, "_defaults", {})
    assert meant.items() <= getattr(getattr(callbacks, name), "defaults", {}).items()


def test_defaults_make_a_bare_list_work():
    """fastai raises TypeError here: no eps, and no mom from the partial."""
    moments = [
        partial(callbacks.average_grad, dampening=True),
        callbacks.average_sqr_grad,
        callbacks.step_stat,
    ]
    for step in (callbacks.adam_step, callbacks.radam_step, callbacks.qhadam_step, callbacks.lamb_step):
        p = torch.ones(3).requires_grad_()
        p.grad = torch.ones(3)
        opt = fusedopt.Optimizer([p], [*moments, step], lr=0.1, backend="reference")
        opt.step()
        assert (p < 1).all()
        assert opt.hypers[0]["mom"] == 0.9 and opt.hypers[0]["eps"] == step.defaults["eps"]


STATE = {"p", "lr", "step", "grad_avg", "sqr_avg", "slow", "local_lr", "mom", "sqr_mom"}


@pytest.mark.parametrize("name", sorted(set(callbacks.__all__) - {"debias"}))
def test_defaults_cover_what_the_caller_need_not_know(name):
    """Besides lr, the moments (brought along by the averages) and state, every argument has a default."""
    func = getattr(callbacks, name)
    code = func.__code__
    required = set(code.co_varnames[: code.co_argcount - len(func.__defaults__ or ())])
    assert required - STATE <= set(getattr(func, "defaults", {}))


# ------------------------------------------------------------------------------------------------------------
# What lets them be traced and replayed


PURE = {"torch", "debias", "softplus"}


@pytest.mark.parametrize("name", callbacks.__all__)
def test_reads_nothing_but_arguments_and_pure_functions(name):
    func = getattr(callbacks, name)
    read = {
        i.argval for i in dis.get_instructions(func) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF")
    }
    assert read <= PURE
    assert func.__closure__ is None
    assert not any(isinstance(c, types.CodeType) for c in func.__code__.co_consts)


@pytest.mark.parametrize("name", callbacks.__all__)
def test_docstring_follows_the_template(name):
    doc = inspect.getdoc(getattr(callbacks, name))  # Python 3.13 keeps no indentation
    headings = ["Formula:", "Args:", "State:", "Source:", "Deviations:"]
    if name == "debias":
        headings.remove("State:")
    places = [doc.find(f"\n{h}") for h in headings]
    assert -1 not in places and places == sorted(places)


def test_radam_waits_then_adapts():
    """The structure flips where r passes 5: at step 6 for sqr_mom = 0.99 and 0.999."""
    for sqr_mom in (0.99, 0.999):
        plain = [
            torch.equal(
                call(callbacks.radam_step, MOMENTS, dict(sqr_mom=sqr_mom, step=t, sqr_avg=s))[0],
                call(callbacks.radam_step, MOMENTS, dict(sqr_mom=sqr_mom, step=t, sqr_avg=2 * s))[0],
            )
            for t in range(1, 9)
            for s in [torch.ones(4, 5, dtype=torch.float64)]
        ]
        assert plain == [True] * 5 + [False] * 3


# ------------------------------------------------------------------------------------------------------------
# debias at mom = 1


def test_debias():
    for mom in (0.0, 0.5, 0.999):
        for step in (1, 2, 50):
            for damp in (1.0, 1 - mom):
                assert callbacks.debias(mom, damp, step) == fastai_optimizer.debias(mom, damp, step)


def test_debias_at_one_is_finite():
    assert callbacks.debias(1.0, 1.0, 7) == 7
    assert callbacks.debias(1.0, 0.0, 7) == 1
    with pytest.raises(ZeroDivisionError):
        fastai_optimizer.debias(1.0, 1.0, 7)


# ------------------------------------------------------------------------------------------------------------
# Rules without a fastai peer (their results over 100 steps are in test_named.py)


def test_maximize_and_flagged_decay():
    _, grad, _ = call(callbacks.maximize_grad, (), dict(maximize=True))
    _, kept, _ = call(callbacks.maximize_grad, (), dict(maximize=False))
    assert torch.equal(grad, -kept)
    for flag, same_as in ((True, callbacks.weight_decay), (False, callbacks.l2_reg)):
        ours = call(callbacks.flagged_weight_decay, (), dict(decoupled_weight_decay=flag))
        assert_same(ours, call(same_as, (), {}))


def test_sgd_starts_undampened_like_torch():
    kwargs = dict(dampening=0.5)
    _, grad, state = call(callbacks.sgd_momentum_step, (), kwargs)
    assert torch.equal(state["grad_avg"], grad)
    _, grad, state = call(callbacks.average_grad, (), dict(dampening=True))
    assert torch.allclose(state["grad_avg"], 0.2 * grad)


def test_sgd_momentum_can_be_off():
    p, grad, state = call(callbacks.sgd_momentum_step, (), dict(mom=0.0))
    assert_same((p, grad, state), call(callbacks.sgd_step, (), {}))


def test_amsgrad_remembers_the_largest():
    big = torch.full((4, 5), 9.0, dtype=torch.float64)
    _, _, state = call(callbacks.adam_step, MOMENTS, dict(amsgrad=True, max_sqr_avg=big.clone()))
    assert torch.equal(state["max_sqr_avg"], big)
    _, _, state = call(callbacks.adam_step, MOMENTS, dict(amsgrad=True))
    assert torch.equal(state["max_sqr_avg"], state["sqr_avg"])


def test_lookahead_is_quiet_between_synchronisations():
    kwargs = dict(lookahead_k=3, lookahead_alpha=0.5)
    for count, moves in ((0, False), (1, False), (2, True), (5, True)):
        p, _, state = call(callbacks.lookahead, ("slow",), {**kwargs, "lookahead_count": count})
        assert state["lookahead_count"] == count + 1
        assert torch.equal(p, state["slow"]) == moves
    assert callbacks.lookahead_slow(None, slow=p) is None


def test_partials_keep_working():
    ours = call(partial(callbacks.average_grad, dampening=True), ("grad_avg",), {})
    assert_same(ours, call(callbacks.average_grad, ("grad_avg",), dict(dampening=True)))
