"""What is true of all rules besides their formulas: documents, arguments, groups, dtypes, checkpoints; and wrappers."""

import copy
import dis
import inspect
import math
import pickle
import types
from functools import partial

import pytest
import torch
from factories import SHAPES, assert_equal, give_gradients, parameters
from torch.optim import lr_scheduler

import fusedopt
from fusedopt import callbacks, optim, rules, table
from fusedopt.callback import arguments_of, function_of

ROWS = [pytest.param(r, id=r.name) for r in table.RULES]
VARIANTS = [pytest.param(r, v, id=f"{r.name}-{v.id}") for r in table.RULES for v in r.variants]
CALLBACKS = sorted(
    name
    for name in rules.__all__
    if name[0].islower() and name not in ("first_step", "half_life_of", "cautious")
)
CLASSES = sorted(name for name in rules.__all__ if isinstance(getattr(rules, name), type))


def train(opt, steps=4, start=0):
    params = [p for group in opt.param_groups for p in group["params"]]
    for t in range(start, start + steps):
        give_gradients(params, t)
        opt.step()
    return params


def parameters_of(row, shapes=SHAPES, **options):
    return parameters(row.shapes(shapes), **options)


def stepped(make, steps=4, **options):
    params = parameters(**options)
    train(make(params), steps)
    return params


# --
# What their code and documents promise


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callbacks_docstring_follows_the_template(name):
    doc = getattr(rules, name).__doc__
    places = [doc.find(f"\n    {h}") for h in ("Formula:", "Args:", "State:", "Source:", "Deviations:")]
    assert -1 not in places and places == sorted(places)
    taken = [a for a in arguments_of(getattr(rules, name)) if a not in ("p", "kwargs")]
    assert not [a for a in taken if f"`{a}`" not in doc], "an argument that the docstring does not name"


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_brings_defaults_for_what_it_takes(name):
    """Besides lr, step and what the averages before it bring along."""
    func = getattr(rules, name)
    required = {k for k, v in arguments_of(func).items() if v is inspect.Parameter.empty}
    before = {"p", "lr", "step", "kwargs", "grad_avg", "sqr_avg", "mom", "sqr_mom", "rule", "base_lr"}
    assert required - before <= set(getattr(func, "defaults", {}))


PURE = {
    "total",
    "inverse_root_factored",
    "rms",
    "zero_bounds",
    "highest_along",
    "enumerate",
    "len",
    "range",
    "tuple",
    "torch",
    "debias",
    "first_step",
    "half_life_of",
    "math",
    "newton_schulz",
    "projected",
    "turned",
    "squares_along",
    "gram_of",
    "sides_of",
    "adam_step",
    "radam_step",
    "min",
    "max",
    "RuntimeError",
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_reads_nothing_but_arguments_and_pure_functions(name):
    func = getattr(rules, name)
    read = {
        i.argval for i in dis.get_instructions(func) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF")
    }
    assert read <= PURE and func.__closure__ is None
    assert not any(isinstance(c, types.CodeType) for c in func.__code__.co_consts)


def test_every_rule_is_public_documented_and_in_a_file_of_its_name():
    for name in rules.__all__:
        assert inspect.getdoc(getattr(rules, name)), name
    files = {name: getattr(rules, name).__module__.rsplit(".", 1)[1] for name in CLASSES}
    assert all(file in name.lower() for name, file in files.items())
    assert fusedopt.rules is rules


@pytest.mark.parametrize("name", CLASSES)
def test_constructors_are_torchs_in_shape(name):
    """params, lr, more; flags by keyword; the options that every optimizer has."""
    found = list(inspect.signature(getattr(rules, name)).parameters.values())
    assert [p.name for p in found[:2]] == ["params", "lr"]
    assert found[-2].name == "maximize" and found[-2].kind is inspect.Parameter.KEYWORD_ONLY
    assert found[-1].kind is inspect.Parameter.VAR_KEYWORD
    assert all(p.default is not p.empty for p in found[1:-1])


# --
# Arguments


NUMBERS = (
    "lr",
    "eps",
    "weight_decay",
    "momentum",
    "rho",
    "gamma",
    "nu",
    "final_lr",
    "trust_coefficient",
    "lr_1d",
    "clip_threshold",
    "reps_rel",
    "d0",
    "d_coef",
    "growth_rate",
    "delta",
    "wd_ratio",
)
BAD = [
    (name, {key: value})
    for name in CLASSES
    for key in inspect.signature(getattr(rules, name)).parameters
    for value in (-0.1, math.nan)
    if key in NUMBERS
] + [
    (name, dict(betas=betas))
    for name in CLASSES
    if "betas" in inspect.signature(getattr(rules, name)).parameters
    for betas in ((1.0, 0.9, 0.9), (0.9, -0.1, 0.9), (math.nan, 0.9, 0.9), (0.9,))
]
BAD += [
    ("AdEMAMix", dict(betas=(0.9, 0.999))),
    ("MARS", dict(betas_1d=(0.9, 1.0))),
    ("AdaMod", dict(beta3=1.0)),
    ("Tiger", dict(beta=1.0)),
    ("ADOPT", dict(clip_exp=0.0)),
    ("AdaBound", dict(gamma=1.0)),
    ("AdaBound", dict(lr=0.0)),
    ("SGDScheduleFree", dict(momentum=0.0)),
    ("AdamWScheduleFree", dict(betas=(1.0, 0.9))),
    ("Adafactor", dict(beta1=1.0)),
    ("Adafactor", dict(decay_rate=0.1)),
    ("Adafactor", dict(eps=(1e-30,))),
    ("Adafactor", dict(eps=(1e-30, -1.0))),
    ("Adafactor", dict(relative_step=False)),
    ("CAME", dict(eps=(math.nan, 1e-16))),
    ("SM3", dict(beta=1.0)),
    ("Prodigy", dict(d0=0.0)),
    ("Prodigy", dict(beta3=1.0)),
    ("DAdaptAdam", dict(d0=math.nan)),
    ("SOAP", dict(shampoo_beta=1.0)),
    ("SOAP", dict(precondition_frequency=0)),
    ("SOAP", dict(max_precond_dim=-1)),
    ("Shampoo", dict(preconditioning_compute_steps=0)),
    ("Shampoo", dict(matrix_eps=-1.0)),
    ("Shampoo", dict(max_matrix_size=math.nan)),
]


@pytest.mark.parametrize(("name", "kwargs"), BAD, ids=[f"{n}-{k}" for n, k in BAD])
def test_bad_numbers_are_refused(name, kwargs):
    with pytest.raises(ValueError, match=r"Invalid|must be"):
        getattr(rules, name)(parameters(), **kwargs)


@pytest.mark.parametrize("name", CLASSES)
def test_a_misspelt_argument_is_refused(name):
    with pytest.raises(TypeError, match="no callback takes the hyperparameter"):
        getattr(rules, name)(parameters(), weight_decai=0.1)


@pytest.mark.parametrize("name", CLASSES)
def test_one_parameter_without_a_list_is_refused(name):
    with pytest.raises(TypeError, match="an iterable of Tensors"):
        getattr(rules, name)(torch.zeros(3, requires_grad=True))


# --
# Steps


@pytest.mark.parametrize(
    ("row", "variant", "dtype"),
    [
        pytest.param(*v.values, dtype, id=f"{v.id}-{str(dtype)[6:]}")
        for v in VARIANTS
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        if v.values[1] is v.values[0].variants[0] or dtype == torch.bfloat16
    ],
)
def test_it_fuses_without_a_word_in_every_dtype(row, variant, dtype):
    """Warnings are errors. One kernel serves the first step and the later ones, but where the table says otherwise."""
    params = parameters_of(row, dtype=dtype)
    opt = row.factory(params, **variant.kwargs, backend="cpp")
    train(opt, 3)
    said = opt.explain()
    assert not said.eager and said.backend == "cpp"
    if not row.matrix_launches:
        passes = 1 + variant.first_step_kernel
        assert len({c.name for c in said.compiled}) == passes * (1 + row.totals) + row.totals
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize(("row", "variant"), VARIANTS)
def test_a_step_costs_what_the_table_says(row, variant):
    params = parameters([(4, 3), (4, 3) if row.calls else (2, 3)])
    opt = row.factory(params, **variant.kwargs, backend="cpp")
    train(opt, 8)
    said = opt.explain()
    assert (said.launches, said.bytes_per_element) == (row.launches, variant.bytes)
    kept = opt.state[params[0]].items()
    assert {k for k, v in kept if isinstance(v, torch.Tensor) and v.shape == (4, 3)} == set(variant.state)


@pytest.mark.parametrize("row", ROWS)
def test_groups_and_schedulers_change_what_is_theirs(row):
    first, second = parameters_of(row), parameters_of(row)
    groups = [{"params": first}, {"params": second, "lr": 0.0}]
    lr = {} if row.name == "Adafactor" else {"lr": 0.01}  # whose step is relative, and refuses one
    opt = row.factory(groups, **{**lr, **row.variants[0].kwargs}, backend="cpp")
    if row.name == "AdaBound":
        opt.param_groups[1]["base_lr"] = 1.0
    schedule = lr_scheduler.MultiplicativeLR(opt, lambda t: 0.0)
    rate = opt.param_groups[0]["lr"]
    start = [p.detach().clone() for p in first]
    train(opt, 2)
    assert any(not torch.equal(p, s) for p, s in zip(first, start, strict=True))
    assert_equal(second, start)
    schedule.step()
    assert [g["lr"] for g in opt.param_groups] == [0.0, 0.0] and rate > 0


@pytest.mark.parametrize("row", ROWS)
def test_a_checkpoint_goes_on_where_it_was(row):
    params, twins = parameters_of(row), parameters_of(row)
    opt, other = (row.factory(p, **row.variants[-1].kwargs, backend="cpp") for p in (params, twins))
    train(opt, 7)
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p.data)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, 3, start=7), train(other, 3, start=7)
    assert_equal(params, twins)


@pytest.mark.parametrize("row", ROWS)
def test_it_can_be_pickled(row):
    opt = row.factory(parameters_of(row), **row.variants[-1].kwargs, backend="cpp")
    train(opt, 2)
    other = pickle.loads(pickle.dumps(opt))
    assert_equal(train(opt, 2, start=2), train(other, 2, start=2))


@pytest.mark.parametrize(
    "row", [r for r in ROWS if r.values[0].name not in ("Cautious", "Centralize", "GrokFast")]
)
def test_maximize_is_descent_on_the_other_sign(row):
    kwargs = {k: v for k, v in row.variants[-1].kwargs.items() if k != "maximize"}
    up, down = parameters_of(row), parameters_of(row)
    opt, other = row.factory(up, **kwargs, maximize=True), row.factory(down, **kwargs)
    for t in range(3):
        give_gradients(up, t), give_gradients(down, t)
        for p in down:
            p.grad.neg_()
        opt.step(), other.step()
    assert_equal(up, down)


@pytest.mark.parametrize(
    "row", [r for r in ROWS if any(v.kwargs.get("weight_decay") for v in r.values[0].variants)]
)
def test_parameters_flagged_do_wd_false_never_decay(row):
    """As fastai's Learner flags biases and norms."""
    variant = next(v for v in row.variants if v.kwargs.get("weight_decay"))
    none = {"weight_decay_1d": 0.0} if row.name == "MARS" else {}
    decayed, spared, bare = (parameters_of(row) for _ in range(3))
    makers = [variant.kwargs, variant.kwargs, {**variant.kwargs, **none, "weight_decay": 0.0}]
    for params, kwargs, flagged in zip((decayed, spared, bare), makers, (False, True, False), strict=True):
        opt = row.factory(params, **kwargs, backend="cpp")
        for p in params if flagged else ():
            opt.state[p]["do_wd"] = False
        train(opt)
    assert_equal(spared, bare)
    assert not torch.equal(decayed[0], bare[0])


# --
# Wrappers


def test_cautious_moves_nothing_against_the_gradient():
    params = parameters()
    opt = rules.Cautious(optim.AdamW(params, weight_decay=0.0, backend="cpp"))
    for t in range(6):
        give_gradients(params, t)
        before = [p.detach().clone() for p in params]
        opt.step()
        for p, old in zip(params, before, strict=True):
            assert ((p - old) * p.grad <= 0).all()
    still = sum(int((p == old).sum()) for p, old in zip(params, before, strict=True))
    assert still > 0, "nothing was masked, so nothing was tested"


@pytest.mark.parametrize(
    "make",
    [
        rules.Lion,
        rules.StableAdamW,
        rules.LARS,
        partial(fusedopt.Lamb, lr=0.1),
        partial(fusedopt.Larc, lr=0.1),
    ],
    ids=["Lion", "StableAdamW", "LARS", "Lamb", "Larc"],
)
def test_wrappers_fuse_with_any_rule(make):
    params = parameters()
    opt = rules.GrokFast(rules.Centralize(rules.Cautious(make(params, backend="cpp"))))
    train(opt)
    assert not opt.explain().eager and all(p.isfinite().all() for p in params)
    wrapped = stepped(lambda p: rules.GrokFast(rules.Centralize(rules.Cautious(make(p, backend="cpp")))))
    assert_equal(params, wrapped)


def test_cautious_is_a_callback_for_lists_with_the_defaults_of_its_rule():
    moments = [
        partial(callbacks.average_grad, dampening=True),
        callbacks.average_sqr_grad,
        callbacks.step_stat,
    ]
    cbs = [callbacks.weight_decay, *moments, rules.cautious(callbacks.adam_step)]
    ours = stepped(lambda p: fusedopt.Optimizer(p, cbs, lr=0.1, backend="cpp"))
    theirs = stepped(
        lambda p: rules.Cautious(fusedopt.Adam(p, lr=0.1, mom=0.9, sqr_mom=0.99, wd=0.0, backend="cpp"))
    )
    assert_equal(ours, theirs)


def test_wrappers_are_on_the_optimizer_itself():
    opt = optim.AdamW(parameters())
    assert rules.GrokFast(rules.Cautious(opt), alpha=0.9, lamb=1.0) is opt
    assert opt.title == "GrokFast_Cautious_AdamW" and opt.param_groups[0]["grok_alpha"] == 0.9
    assert function_of(opt.cbs[-1]) is rules.cautious_step and opt.cbs[0] is rules.grokfast_filter


@pytest.mark.parametrize(
    ("wrap", "error", "match"),
    [
        (lambda: rules.Cautious(torch.optim.SGD(parameters())), TypeError, "fusedopt"),
        (lambda: rules.GrokFast(torch.optim.SGD(parameters())), TypeError, "fusedopt"),
        (lambda: rules.Centralize(torch.optim.SGD(parameters())), TypeError, "fusedopt"),
        (lambda: rules.Centralize(rules.Centralize(rules.Lion(parameters()))), ValueError, "already"),
        (lambda: rules.Cautious(rules.Cautious(rules.Lion(parameters()))), ValueError, "already"),
        (lambda: rules.GrokFast(rules.GrokFast(rules.Lion(parameters()))), ValueError, "already"),
        (lambda: rules.Cautious(fusedopt.Lookahead(rules.Lion(parameters()))), ValueError, "first"),
        (lambda: rules.GrokFast(rules.Lion(parameters()), alpha=1.1), ValueError, "alpha"),
        (lambda: rules.GrokFast(rules.Lion(parameters()), lamb=math.nan), ValueError, "lamb"),
    ],
)
def test_wrappers_refuse_what_they_cannot_do(wrap, error, match):
    with pytest.raises(error, match=match):
        wrap()


# --
# Shapes, and what is found by sums over all parameters


SHAPED = [(), (1,), (7,), (3, 5), (1, 6), (6, 1), (1, 1), (5, 1, 3), (4, 3, 3, 3), (8, 1, 1, 1)]


@pytest.mark.parametrize("row", [r for r in ROWS if r.values[0].matrix_launches or r.values[0].totals])
def test_every_shape_fuses_with_gradients_missing_now_and_then(row):
    found = []
    for backend in ("cpp", "reference"):
        params = parameters_of(row, SHAPED, dtype=torch.float64)
        opt = row.factory(params, **row.variants[-1].kwargs, backend=backend)
        for t in range(5):
            give_gradients(params, t)
            for k in {1: (3, 8), 2: (2, 4, 9), 4: (3,)}.get(t, ()):
                params[k % len(params)].grad = None
            opt.step()
        assert not opt.explain().eager
        found.append(params)
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def descend(opt, steps=20):
    """On the sum of squares: the estimate grows where gradients agree from step to step."""
    for _ in range(steps):
        for p in opt.param_groups[0]["params"]:
            p.grad = p.detach().clone()
        opt.step()
    return opt


@pytest.mark.parametrize("make", [rules.Prodigy, rules.DAdaptAdam])
def test_d_is_one_tensor_for_all_parameters(make):
    params = parameters()
    opt = make(params, d0=1e-3, backend="cpp")
    assert opt.d == 1e-3
    descend(opt)
    assert isinstance(opt.d, torch.Tensor) and opt.d.shape == () and opt.d > 1e-3
    assert {opt.state[p]["d"].item() for p in params} == {opt.d.item()}


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("make", [rules.Prodigy, rules.DAdaptAdam])
def test_d_is_that_of_parameters_with_elements(make, backend):
    params = parameters()
    empty = [torch.nn.Parameter(torch.zeros(0, 4)) for _ in range(2)]
    alone = descend(make(parameters(), d0=1e-3, backend=backend)).d
    assert descend(make([empty[0], *params, empty[1]], d0=1e-3, backend=backend)).d == alone > 1e-3
    assert descend(make(empty, d0=1e-3, backend=backend)).d == 1e-3


def test_prodigy_in_half_precision_finds_what_it_does_in_single_if_its_state_is_single():
    def found(dtype):
        opt = rules.Prodigy(parameters(dtype=dtype), d0=1e-2, state_dtype=torch.float32, backend="cpp")
        return descend(opt).d.item()

    single = found(torch.float32)
    assert single > 0.02 and found(torch.float16) == pytest.approx(single, rel=0.1)


# --
# Schedule-Free's two values, Sophia's Hessian


@pytest.mark.parametrize("make", [partial(rules.SGDScheduleFree, lr=0.1), rules.AdamWScheduleFree])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_weights_to_use_are_the_average_of_the_iterates(make, dtype):
    """With one learning rate and r = 0 all iterates weigh alike: the average is plain."""
    params = parameters(dtype=dtype)
    opt, iterates = make(params), []
    for t in range(6):
        give_gradients(params, t)
        opt.step()
        iterates.append([opt.state[p]["z"].clone() for p in params])
    y = [p.detach().clone() for p in params]
    opt.eval()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for k, p in enumerate(params):
        average = torch.stack([z[k] for z in iterates]).mean(0)
        torch.testing.assert_close(p.detach(), average, rtol=tolerance, atol=tolerance)
    opt.train()
    for p, old in zip(params, y, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=tolerance, atol=tolerance)


def test_a_step_on_averaged_weights_is_refused_and_changes_nothing():
    params = parameters()
    opt = rules.SGDScheduleFree(params, lr=0.1, backend="cpp")
    train(opt)
    opt.eval()
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"call the optimizer's train\(\)"):
        opt.step()
    assert_equal(params, before)
    assert {opt.state[p]["step"] for p in params} == {4}
    opt.train()
    train(opt)
    assert {opt.state[p]["step"] for p in params} == {8}


def test_a_checkpoint_of_averaged_weights_knows_that_it_is_one():
    params, twins = parameters(), parameters()
    opt, other = (rules.AdamWScheduleFree(p, lr=0.01, backend="cpp") for p in (params, twins))
    train(opt)
    opt.eval()
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p.data)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.param_groups[0]["train_mode"] is False
    opt.train(), other.train()
    assert_equal(train(opt, start=4), train(other, start=4))


def test_eval_before_the_first_step_changes_nothing():
    params, before = parameters(), parameters()
    opt = rules.AdamWScheduleFree(params)
    opt.eval(), opt.train()
    assert_equal(params, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sophia_takes_the_hessian_that_it_is_given(dtype):
    """Against the paper's loop, with estimates before the first, the third and the sixth step."""
    from papers import sophia

    at = {1: 100, 3: 102, 6: 105}
    params, expected = parameters(dtype=dtype), [p.detach().double() for p in parameters(dtype=dtype)]
    opt = rules.SophiaG(params, lr=0.01, bs=20, backend="cpp")
    grads, estimates = [], {}
    for t in range(1, 9):
        if t in at:
            give_gradients(params, at[t])
            estimates[t] = [p.grad.double() for p in params]
            opt.update_hessian()
        give_gradients(params, t)
        grads.append([p.grad.double() for p in params])
        opt.step()
    for k, p in enumerate(expected):
        for _ in sophia(
            p, (g[k] for g in grads), lr=0.01, bs=20, hessians={t: e[k] for t, e in estimates.items()}
        ):
            pass
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), q, rtol=tolerance, atol=tolerance)
    unhelped = stepped(lambda p: rules.SophiaG(p, lr=0.01, bs=20), 8, dtype=dtype)
    assert not torch.allclose(unhelped[0], params[0])
    assert not opt.explain().eager


@pytest.mark.parametrize(
    "modes", [dict(capturable=True), dict(amp_fused=True)], ids=["capturable", "amp_fused"]
)
@pytest.mark.parametrize("make", [rules.Muon, rules.Shampoo, partial(rules.SOAP, precondition_frequency=1)])
def test_rules_with_torch_calls_fuse_with_counts_on_the_device(make, modes):
    params, plain = parameters(SQUARES), parameters(SQUARES)
    opt = make(params, amp_fused=True, backend="cpp")
    train(opt, 5), train(make(plain, backend="cpp"), 5)
    torch.testing.assert_close(params, plain, rtol=1e-6, atol=1e-7)
    assert not opt.explain().eager


SQUARES = [(4, 4), (2, 3, 2)]


def test_what_is_made_every_few_steps_by_torch_runs_eagerly_with_counts_on_the_device():
    params, plain = parameters(SQUARES), parameters(SQUARES)
    opt = rules.SOAP(params, precondition_frequency=2, capturable=True, backend="cpp")
    with pytest.warns(RuntimeWarning, match="leave counts of steps on the host"):
        train(opt, 5)
    train(rules.SOAP(plain, precondition_frequency=2, backend="cpp"), 5)
    torch.testing.assert_close(params, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
@pytest.mark.parametrize("rule", [rules.AdamP, rules.SGDP])
def test_matrices_without_elements_have_no_rows_to_divide_by(rule, shape):
    params = [torch.nn.Parameter(torch.zeros(shape)), torch.nn.Parameter(torch.ones(4, 5))]
    opt = rule(params, lr=0.1)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    assert not opt.explain().eager


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("make", [rules.SOAP, rules.Shampoo])
def test_square_matrices_of_dimensions_without_elements_have_none(make, backend):
    """Such a parameter's state is made from a stand-in."""
    params = parameters([(3, 0), (0, 2), (0,), (4, 3)])
    opt = make(params, backend=backend)
    train(opt, 3)
    shapes = [{opt.state[p][k].shape for k in ("gram_0", "gram_1") if k in opt.state[p]} for p in params]
    assert shapes[:2] == [{(3, 3), (0, 0)}, {(0, 0), (2, 2)}] and shapes[3] == {(4, 4), (3, 3)}
    assert shapes[2] == (set() if make is rules.SOAP else {(0, 0)})


# --
# SOAP's bases


def sides(opt, p):
    return {int(k[-1]) for k in opt.state[p] if k.startswith("basis_")}


def test_soap_has_bases_for_matrices_and_sides_up_to_a_length():
    params = parameters([(6,), (4, 6), (2, 2, 2, 2, 2, 2), ()])
    for options, expected in (
        (dict(), [set(), {0, 1}, {0, 1, 2, 3, 4}, set()]),
        (dict(max_precond_dim=5), [set(), {0}, {0, 1, 2, 3, 4}, set()]),
        (dict(precondition_1d=True), [{0}, {0, 1}, {0, 1, 2, 3, 4}, set()]),
    ):
        opt = train_soap(params, 1, **options)
        assert [sides(opt, p) for p in params] == expected


def test_shampoo_has_matrices_for_sides_up_to_a_length_and_diagonals_for_others():
    params = parameters([(4, 6), (7,), (3, 2, 2)])
    opt = rules.Shampoo(params, max_matrix_size=5, backend="cpp")
    train(opt, 3)
    shapes = [{k: (*v.shape,) for k, v in opt.state[p].items() if k != "step"} for p in params]
    assert shapes == [
        {"gram_0": (4, 4), "root_0": (4, 4), "gram_1": (1, 6)},
        {"gram_0": (7,)},
        {f"{name}_{i}": (n, n) for i, n in enumerate((3, 2, 2)) for name in ("gram", "root")},
    ]


def test_shampoos_roots_are_those_of_its_averages():
    p = parameters([(4, 3)], torch.float64)
    opt = rules.Shampoo(p, preconditioning_compute_steps=3, matrix_eps=1e-3, backend="cpp")
    train(opt, 4)
    kept = opt.state[p[0]]
    for i, n in enumerate((4, 3)):
        again = torch.linalg.matrix_power(kept[f"root_{i}"], -4) - 1e-3 * torch.eye(n, dtype=torch.float64)
        torch.testing.assert_close(again, kept[f"gram_{i}"], rtol=1e-8, atol=1e-10)


def train_soap(params, steps=4, **options):
    opt = rules.SOAP(params, backend="cpp", **options)
    train(opt, steps)
    return opt


def test_soaps_first_step_makes_state_alone():
    params, before = parameters(), parameters()
    opt = train_soap(params, 1)
    assert_equal(params, before)
    assert sides(opt, params[1]) == {0, 1} and not opt.state[params[1]]["exp_avg"].any()
    train(opt, 1, start=1)
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_soaps_bases_stay_orthogonal_and_follow_the_averages():
    p = parameters([(4, 4)], torch.float64)
    opt = train_soap(p, 1, precondition_frequency=3)

    def off_diagonal():
        turned = opt.state[p[0]]["basis_0"].mT @ opt.state[p[0]]["gram_0"] @ opt.state[p[0]]["basis_0"]
        return ((turned - turned.diagonal().diag()).norm() / turned.norm()).item()

    assert off_diagonal() < 1e-12
    train(opt, 2, start=1)
    stale = off_diagonal()
    for _ in range(90):  # the same gradient over and over: the averages come to rest, and iterations converge
        give_gradients(p, 7)
        opt.step()
    basis = opt.state[p[0]]["basis_0"]
    torch.testing.assert_close(basis @ basis.mT, torch.eye(4, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert off_diagonal() < 1e-2 * stale
