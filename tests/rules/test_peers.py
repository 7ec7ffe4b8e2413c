"""Rules against the packages that have them with the same meaning: pytorch-optimizer, torch-optimizer, torch.optim.

In float64, so that what differs is meaning and not rounding; some of them keep a number in float32, or add 1e-15 under
a root. What they mean otherwise is said where it is left out.
"""

import importlib

import pytest
import torch
from test_papers import flip_sign, problem, shift_lr

from fusedopt import rules, table

STEPS = 25
PO, TO = "pytorch_optimizer", "torch_optimizer"
TOLERANCES = {"DAdaptAdam": 1e-3, "Prodigy": 1e-4, "SOAP": 1e-4}
"""Relative ones, where peers keep sums in float32 of which an exponential growth is made, or decompose in float32."""
MATRICES = (2, 5)
"""Numbers of the problem's parameters with more than one dimension."""


def later(step):
    """The authors count from the second step on; the peer from the first."""
    return (step - 1) ** 0.25


# our name and arguments; the peer and its arguments; which parameters
CASES = [
    ("AdaBelief", dict(rectify=False), f"{PO}.AdaBelief", dict()),
    (
        "AdaBelief",
        dict(lr=0.01, weight_decay=0.1),
        f"{PO}.AdaBelief",
        dict(lr=0.01, weight_decay=0.1, rectify=True),
    ),
    (
        "AdaBelief",
        dict(rectify=False),
        f"{TO}.AdaBelief",
        dict(eps=1e-16, rectify=False, weight_decouple=True),
    ),
    ("AdaBound", dict(), f"{PO}.AdaBound", dict()),
    ("AdaBound", dict(weight_decay=0.1), f"{TO}.AdaBound", dict(weight_decay=0.1)),
    ("AdaMod", dict(), f"{TO}.AdaMod", dict()),
    (
        "AdaMod",
        dict(lr=0.01, beta3=0.9, weight_decay=0.1),
        f"{TO}.AdaMod",
        dict(lr=0.01, beta3=0.9, weight_decay=0.1),
    ),
    (
        "Adafactor",
        dict(),
        f"{PO}.AdaFactor",
        dict(betas=(None, 1.0 - 1e-9)),
    ),  # whose second moment's rate is capped
    (
        "Adafactor",
        dict(lr=0.01, relative_step=False, scale_parameter=False, beta1=0.9, weight_decay=0.1),
        f"{PO}.AdaFactor",
        dict(
            lr=0.01,
            relative_step=False,
            scale_parameter=False,
            betas=(0.9, 1.0 - 1e-9),
            momentum_dtype=torch.float64,
            weight_decay=0.1,
        ),
    ),
    (
        "Adafactor",
        dict(warmup_init=True, clip_threshold=0.5),
        f"{PO}.AdaFactor",
        dict(warmup_init=True, betas=(None, 1.0 - 1e-9), clip_threshold=0.5),
    ),
    # eps is added before v's bias is divided away in pytorch-optimizer
    ("AdamP", dict(), f"{TO}.AdamP", dict()),
    (
        "AdamP",
        dict(lr=0.01, weight_decay=0.1, delta=1.0, wd_ratio=0.3, nesterov=True),
        f"{TO}.AdamP",
        dict(lr=0.01, weight_decay=0.1, delta=1.0, wd_ratio=0.3, nesterov=True),
    ),
    ("AdamP", dict(eps=0.0, delta=1.0), f"{PO}.AdamP", dict(eps=0.0, delta=1.0), MATRICES),
    ("CAME", dict(), f"{PO}.CAME", dict()),
    (
        "CAME",
        dict(lr=0.01, betas=(0.8, 0.95, 0.99), weight_decay=0.1),
        f"{PO}.CAME",
        dict(lr=0.01, betas=(0.8, 0.95, 0.99), weight_decay=0.1),
    ),
    ("DAdaptAdam", dict(), f"{PO}.DAdaptAdam", dict()),
    (
        "DAdaptAdam",
        dict(d0=1e-2, decouple=True, weight_decay=0.1),
        f"{PO}.DAdaptAdam",
        dict(d0=1e-2, weight_decouple=True, weight_decay=0.1),
    ),
    ("Prodigy", dict(d0=1e-3), f"{PO}.Prodigy", dict(d0=1e-3)),
    (
        "Prodigy",
        dict(d0=1e-3, d_coef=0.5, weight_decay=0.1, safeguard_warmup=True, betas=(0.8, 0.95), beta3=0.9),
        f"{PO}.Prodigy",
        dict(d0=1e-3, d_coef=0.5, weight_decay=0.1, safeguard_warmup=True, betas=(0.8, 0.95), beta3=0.9),
    ),
    ("SM3", dict(), f"{PO}.SM3", dict()),
    ("SM3", dict(momentum=0.9, beta=0.9), f"{PO}.SM3", dict(momentum=0.9, beta=0.9)),
    ("AdamWScheduleFree", dict(), f"{PO}.ScheduleFreeAdamW", dict()),
    (
        "AdamWScheduleFree",
        dict(warmup_steps=5, r=1.0, weight_decay=0.1),
        f"{PO}.ScheduleFreeAdamW",
        dict(warmup_steps=5, r=1.0, weight_decay=0.1),
    ),
    ("SGDScheduleFree", dict(lr=0.1), f"{PO}.ScheduleFreeSGD", dict(lr=0.1)),
    (
        "SGDScheduleFree",
        dict(lr=0.1, momentum=0.8, weight_decay=0.1, warmup_steps=7),
        f"{PO}.ScheduleFreeSGD",
        dict(lr=0.1, momentum=0.8, weight_decay=0.1, warmup_steps=7),
    ),
    (
        "Adan",
        dict(no_prox=True, weight_decay=0.1),
        f"{PO}.Adan",
        dict(weight_decouple=True, weight_decay=0.1),
    ),
    (
        "AdEMAMix",
        dict(alpha=5.0, weight_decay=0.1),
        f"{PO}.AdEMAMix",
        dict(alpha=5.0, weight_decay=0.1, weight_decouple=True),
    ),
    # decoupled decay is in the first step there, in which the authors' code does nothing
    ("ADOPT", dict(), f"{PO}.ADOPT", dict(clip_lambda=later)),
    (
        "ADOPT",
        dict(weight_decay=0.1),
        f"{PO}.ADOPT",
        dict(clip_lambda=later, weight_decay=0.1, weight_decouple=False),
    ),
    ("LaProp", dict(weight_decay=0.0), f"{PO}.LaProp", dict()),  # which decays after the step
    (
        "LARS",
        dict(lr=1.0),
        f"{PO}.LARS",
        dict(lr=1.0, weight_decay=5e-4),
        MATRICES,
    ),  # vectors have no ratio there
    (
        "LARS",
        dict(momentum=0.0),
        f"{TO}.LARS",
        dict(lr=0.1, weight_decay=5e-4, trust_coefficient=1e-3, eps=0.0),
        MATRICES,
    ),
    ("Lion", dict(), f"{PO}.Lion", dict()),
    ("Lion", dict(lr=0.01, weight_decay=0.1), f"{PO}.Lion", dict(lr=0.01, weight_decay=0.1)),
    (
        "MARS",
        dict(eps=0.0),
        f"{PO}.MARS",
        dict(eps=0.0),
    ),  # eps is added before v's bias is divided away there
    (
        "MARS",
        dict(lr=0.01, weight_decay=0.1, lr_1d=0.002, gamma=0.1, eps=0.0),
        f"{PO}.MARS",
        dict(lr=0.01, weight_decay=0.1, lr_1d=0.002, gamma=0.1, eps=0.0),
    ),
    ("Muon", dict(), "torch.optim.Muon", dict(), (2,)),  # which takes two dimensions alone
    (
        "Muon",
        dict(lr=0.01, momentum=0.8, nesterov=False, weight_decay=0.5, adjust_lr_fn="match_rms_adamw"),
        "torch.optim.Muon",
        dict(lr=0.01, momentum=0.8, nesterov=False, weight_decay=0.5, adjust_lr_fn="match_rms_adamw"),
        (2,),
    ),
    ("NovoGrad", dict(), f"{PO}.NovoGrad", dict(lr=1e-2)),
    (
        "NovoGrad",
        dict(weight_decay=0.1, grad_averaging=True),
        f"{TO}.NovoGrad",
        dict(lr=1e-2, betas=(0.95, 0.98), weight_decay=0.1, grad_averaging=True),
    ),
    ("QHM", dict(), f"{PO}.QHM", dict(lr=1e-2, momentum=0.999, nu=0.7)),
    ("QHM", dict(weight_decay=0.1), f"{TO}.QHM", dict(lr=1e-2, momentum=0.999, weight_decay=0.1)),
    ("SGDP", dict(), f"{TO}.SGDP", dict(lr=0.1)),
    (
        "SGDP",
        dict(momentum=0.9, delta=1.0, weight_decay=0.1, nesterov=True),
        f"{TO}.SGDP",
        dict(lr=0.1, momentum=0.9, delta=1.0, weight_decay=0.1, nesterov=True),
    ),  # which projects the momentum too without nesterov
    (
        "SGDP",
        dict(lr=0.01, momentum=0.9, dampening=0.5, weight_decay=0.1, delta=1.0, wd_ratio=0.3),
        f"{PO}.SGDP",
        dict(lr=0.01, momentum=0.9, dampening=0.5, weight_decay=0.1, delta=1.0, wd_ratio=0.3),
    ),
    ("Shampoo", dict(), f"{PO}.Shampoo", dict()),
    (
        "Shampoo",
        dict(lr=0.01, matrix_eps=1e-3, weight_decay=0.1),
        f"{PO}.Shampoo",
        dict(lr=0.01, matrix_eps=1e-3, weight_decay=0.1),
    ),
    ("Signum", dict(), f"{PO}.Tiger", dict(lr=1e-2, beta=0.9, weight_decay=0.0)),
    ("SOAP", dict(), f"{PO}.SOAP", dict()),
    (
        "SOAP",
        dict(
            betas=(0.8, 0.9), shampoo_beta=0.95, weight_decay=0.1, precondition_frequency=3, max_precond_dim=4
        ),
        f"{PO}.SOAP",
        dict(
            betas=(0.8, 0.9),
            shampoo_beta=0.95,
            weight_decay=0.1,
            precondition_frequency=3,
            max_precondition_dim=4,
        ),
    ),
    (
        "SOAP",
        dict(precondition_1d=True, correct_bias=False, eps=1e-3),
        f"{PO}.SOAP",
        dict(precondition_1d=True, correct_bias=False, eps=1e-3),
        (0, 2, 5),  # a longer vector's first basis is of a matrix of rank 1, and so of rounding
    ),
    ("StableAdamW", dict(), f"{PO}.StableAdamW", dict(eps=1e-6)),
    ("Tiger", dict(), f"{PO}.Tiger", dict()),
    (
        "Yogi",
        dict(initial_accumulator_value=0.0),
        f"{TO}.Yogi",
        dict(initial_accumulator=0.0),
    ),  # of both moments there
    (
        "GrokFast",
        dict(betas=(0.9, 0.99), lr=1e-4, weight_decay=0.0),
        f"{PO}.GrokFastAdamW",
        dict(normalize_lr=False),
    ),
    ("GrokFast", dict(lamb=0.0), "torch.optim.AdamW", dict()),
]


def of(which):
    """The problem's parameters of these numbers, and their gradients, step by step."""
    start, grads = problem()
    chosen = which or range(len(start))
    return [start[i] for i in chosen], [[g[i] for i in chosen] for g in grads[:STEPS]]


def trajectory(make, which=None, mutate=None):
    start, grads = of(which)
    params = [torch.nn.Parameter(p.double()) for p in start]
    opt = make(params)
    if mutate is not None:
        mutate(opt)
    seen = []
    for given in grads:
        for p, g in zip(params, given, strict=True):
            p.grad = g.double()
        opt.step()
        seen.append(torch.cat([p.detach().flatten() for p in params]))
    return torch.stack(seen)


def assert_as_peer(case, mutate=None):
    name, kwargs, peer, theirs, *which = case
    module, cls = peer.rsplit(".", 1)
    make = getattr(importlib.import_module(module), cls)
    expected = trajectory(lambda params: make(params, **theirs), *which)
    ours = trajectory(
        lambda params: table.row("rules", name).factory(params, **kwargs), *which, mutate=mutate
    )
    torch.testing.assert_close(ours, expected, rtol=TOLERANCES.get(name, 1e-6), atol=1e-8)


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case[0]}-{case[2]}-{'-'.join(case[1]) or 'defaults'}"
)
def test_a_rule_is_its_peers(case):
    assert_as_peer(case)


@pytest.mark.parametrize("mutate", [flip_sign, shift_lr])
@pytest.mark.parametrize("name", sorted({case[0] for case in CASES}))
def test_mutation_is_noticed(name, mutate):
    case = next(case for case in CASES if case[0] == name)
    with pytest.raises(AssertionError, match="not close"):
        assert_as_peer(case, mutate)


def test_every_peer_of_the_table_is_compared():
    compared = {(case[0], case[2]) for case in CASES}
    assert {(row.name, row.peer) for row in table.RULES if row.peer} <= compared


def test_averaged_weights_are_the_peers():
    """What eval() makes of the parameters, and train() of those."""
    peer = importlib.import_module(PO).ScheduleFreeAdamW
    found = []
    for make in (rules.AdamWScheduleFree, peer):
        params = [torch.nn.Parameter(p.double()) for p in problem()[0]]
        opt = make(params, lr=0.01)
        for given in problem()[1][:5]:
            for p, g in zip(params, given, strict=True):
                p.grad = g.double()
            opt.step()
        for swap in (opt.eval, opt.eval, opt.train, opt.train):
            swap()
            found.append(torch.cat([p.detach().flatten() for p in params]))
    for ours, theirs in zip(found[:4], found[4:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
