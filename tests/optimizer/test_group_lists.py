"""Param groups with callbacks of their own: several rules in one optimizer, stepped together."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from helpers import assert_same_bits, needs_extension
from torch import nn

import fusedopt
from fusedopt import callbacks, optim

BACKENDS = ["cpp", "reference"]
MATRICES, REST = [(3, 5), (4, 4)], [(5,), (), (2, 3, 4), (0,)]


def lion_step(p, lr, mom, sqr_mom, grad_avg=None, **kwargs):
    if grad_avg is None:
        grad_avg = torch.zeros_like(p)
    p.data.sub_(torch.sign(mom * grad_avg + (1 - mom) * p.grad), alpha=lr)
    grad_avg.mul_(sqr_mom).add_(p.grad, alpha=1 - sqr_mom)
    return {"grad_avg": grad_avg}


lion_step.defaults = dict(mom=0.95, sqr_mom=0.98)


def heavy_step(p, lr, rho, slow=None, **kwargs):
    if slow is None:
        slow = torch.zeros_like(p)
    slow.mul_(rho).add_(p.grad)
    p.data.sub_(slow, alpha=lr)
    return {"slow": slow}


heavy_step.defaults = dict(rho=0.5)


def orthogonal_step(p, lr, **kwargs):
    u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
    p.data.sub_(u @ v, alpha=lr)


ADAMW = list(fusedopt.Adam([nn.Parameter(torch.ones(1))], lr=1).cbs)
NAMES = dict(state_names={"grad_avg": "exp_avg", "sqr_avg": "exp_avg_sq"})


def parameters(dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [
        [nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in shapes] for shapes in (MATRICES, REST)
    ]


def gradients(params, seed=1):
    gen = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)


def both(matrices, rest, own=lion_step, **options):
    """Lion for the matrices, AdamW for the rest."""
    groups = [{"params": matrices, "cbs": own, "lr": 0.01}, {"params": rest}]
    hypers = dict(lr=0.1, mom=0.9, sqr_mom=0.999, eps=1e-8, wd=0.01)
    return fusedopt.Optimizer(groups, ADAMW, **NAMES, **{**hypers, **options})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_norm", [None, 0.7])
def test_each_group_is_stepped_by_its_rule_and_clipped_by_the_norm_of_all(backend, max_norm):
    """In float64, against torch's AdamW and plain torch."""
    matrices, rest = parameters(torch.float64)
    opt = both(matrices, rest, backend=backend, max_grad_norm=max_norm)
    theirs, adamw = parameters(torch.float64)
    twin = torch.optim.AdamW(adamw, lr=0.1)
    means = [torch.zeros_like(p) for p in theirs]
    for t in range(5):
        gradients([*matrices, *rest], t)
        gradients([*theirs, *adamw], t)
        opt.step()
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_([*theirs, *adamw], max_norm)
            torch.testing.assert_close(opt.grad_norm.double(), norm, rtol=1e-6, atol=0)
        twin.step()
        for p, m in zip(theirs, means, strict=True):
            p.data -= 0.01 * torch.sign(0.9 * m + 0.1 * p.grad)
            m.mul_(0.999).add_(p.grad, alpha=0.001)
    for p, q in zip([*matrices, *rest], [*theirs, *adamw], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    for p, m in zip(matrices, means, strict=True):
        assert opt.state[p].keys() == {"exp_avg"}
        torch.testing.assert_close(opt.state[p]["exp_avg"], m, rtol=1e-6, atol=1e-8)
    assert all(opt.state[p]["step"] == 5 for p in rest)


@needs_extension
def test_one_step_launches_both_and_stays_bound():
    matrices, rest = parameters()
    opt = both(matrices, rest, max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, [lambda t: 0.9**t, lambda t: 0.8**t])
    for t in range(8):
        gradients([*matrices, *rest], t)
        if t % 3 == 2:
            rest[0].grad = None
        opt.step()
        schedule.step()
    assert (opt.engine.steps.repeated, opt.engine.steps.anew) == (6, 2)
    explained = opt.explain()
    stepped = [stage.kernel for stage in explained.stages if stage.writes and "param" in stage.writes]
    assert [name.split(" ")[0] for name in stepped] == ["lion_step", "adam_step"]
    assert "callbacks of group 0: lion_step\ncallbacks of group 1: " in str(explained)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**8)


def test_it_is_two_optimizers_to_the_bit():
    matrices, rest = parameters()
    opt = both(matrices, rest)
    theirs, adamw = parameters()
    hypers = dict(mom=0.9, sqr_mom=0.999, eps=1e-8, wd=0.01)
    twins = [
        fusedopt.Optimizer(theirs, lion_step, **NAMES, lr=0.01, **hypers),
        fusedopt.Optimizer(adamw, ADAMW, **NAMES, lr=0.1, **hypers),
    ]
    for t in range(5):
        gradients([*matrices, *rest], t)
        gradients([*theirs, *adamw], t)
        opt.step()
        for twin in twins:
            twin.step()
    for p, q in zip([*matrices, *rest], [*theirs, *adamw], strict=True):
        assert_same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("how", ["state_dict", "file", "pickle", "deepcopy"])
def test_checkpoints_go_on(how):
    def go_on(opt, params, start):
        for t in range(start, start + 3):
            gradients(params, t)
            opt.step()

    matrices, rest = parameters()
    opt = both(matrices, rest)
    go_on(opt, [*matrices, *rest], 0)
    if how in ("state_dict", "file"):
        params = copy.deepcopy([*matrices, *rest])
        other = both(params[:2], params[2:])
        saved = opt.state_dict()
        assert [group.get("cbs") for group in saved["param_groups"]] == [["lion_step"], None]
        if how == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        other.load_state_dict(saved)
    else:
        other = copy.deepcopy(opt) if how == "deepcopy" else pickle.loads(pickle.dumps(opt))
        params = [p for group in other.param_groups for p in group["params"]]
    assert other.param_groups[0]["cbs"] == [lion_step]
    assert "cbs" not in other.param_groups[1]
    go_on(opt, [*matrices, *rest], 3)
    go_on(other, params, 3)
    for p, q in zip([*matrices, *rest], params, strict=True):
        assert_same_bits(p.detach(), q.detach())
    assert other.state_dict()["param_groups"] == opt.state_dict()["param_groups"]


def test_loading_keeps_partials_and_bound_steps_know_of_it():
    from functools import partial

    matrices, rest = parameters()
    lion = partial(lion_step, sqr_mom=0.5)
    opt = both(matrices, rest, lion)
    for t in range(3):
        gradients([*matrices, *rest], t)
        opt.step()
        engine = opt.engine
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.param_groups[0]["cbs"][0] is lion and opt.engine is engine


def test_incomplete_state_is_refused_by_the_groups_own_rule():
    matrices, rest = parameters()
    opt = both(matrices, rest)
    gradients([*matrices, *rest])
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    assert saved["state"][0].keys() == {"exp_avg"}  # AdamW would miss two
    opt.load_state_dict(saved)
    del saved["state"][3]["exp_avg_sq"]
    with pytest.raises(ValueError, match="'exp_avg_sq' of parameter 1 of group 1 is missing"):
        opt.load_state_dict(saved)


def test_groups_are_added_and_lists_are_changed_between_steps():
    matrices, rest = parameters()
    opt = both(matrices[:1], rest)
    truth = {id(p): p.detach().clone() for p in [*matrices, *rest]}

    def step(t, expected):
        """One step, after which only the parameters that heavy_step is for are checked."""
        gradients([*matrices, *rest], t)
        opt.step()
        for p, rate in expected:
            truth[id(p)] = truth[id(p)] - rate * p.grad
            torch.testing.assert_close(p.detach(), truth[id(p)])

    step(0, [])
    step(1, [])
    opt.add_param_group({"params": matrices[1:], "cbs": [heavy_step], "rho": 0.0, "lr": 0.5})
    for t in range(2, 5):
        step(t, [(matrices[1], 0.5)])
    assert opt.explain().lists[2] == ((2,), ("heavy_step",))
    opt.param_groups[1]["cbs"] = heavy_step
    opt.param_groups[1]["rho"] = 0.0
    for p in rest:
        truth[id(p)] = p.detach().clone()
    for t in range(5, 8):
        step(t, [(p, 0.1) for p in rest] + [(matrices[1], 0.5)])
    assert opt.explain().lists[1] == ((1, 2), ("heavy_step",))
    opt.param_groups[2]["cbs"][0] = fusedopt.sgd_step  # in place
    for t in range(8, 11):
        step(t, [(matrices[1], 0.5)])
    assert opt.explain().lists[2] == ((2,), ("sgd_step",))
    opt.param_groups[2]["cbs"] = None
    step(11, [])
    assert opt.state[matrices[1]]["step"] == 1


def test_numbers_of_a_group_are_its_own_the_optimizers_or_its_callbacks():
    matrices, rest = parameters()
    groups = [{"params": matrices, "cbs": lion_step}, {"params": rest, "mom": 0.5}]
    opt = fusedopt.Optimizer(groups, ADAMW, **NAMES, lr=0.1, sqr_mom=0.75)
    assert [g["betas"] for g in opt.param_groups] == [(0.95, 0.75), (0.5, 0.75)]
    assert [h["mom"] for h in opt.hypers] == [0.95, 0.5]
    opt.set_hyper("mom", 0.25)
    assert [h["mom"] for h in opt.hypers] == [0.25, 0.25]
    opt = fusedopt.Optimizer(
        [{"params": matrices, "cbs": lion_step}, {"params": rest, "cbs": heavy_step, "rho": 0.125}],
        [],
        lr=0.1,
    )
    assert opt.hypers[0]["sqr_mom"] == 0.98 and opt.hypers[1]["rho"] == 0.125
    assert "rho" not in opt.hypers[0]
    gradients([*matrices, *rest])
    opt.step()
    assert "slow" in opt.state[rest[0]] and "grad_avg" in opt.state[matrices[0]]


@pytest.mark.parametrize(
    ("cbs", "error", "message"),
    [
        ([3], TypeError, "callbacks must be callable; 3 is not"),
        ("lion", TypeError, "callbacks must be callable"),
        ([], ValueError, "the 'cbs' of a param group is empty. Remedy: name callbacks"),
    ],
)
def test_what_is_no_list_of_callbacks_is_refused(cbs, error, message):
    matrices, rest = parameters()
    with pytest.raises(error, match=message):
        both(matrices, rest, cbs)
    opt = both(matrices, rest)
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "cbs": cbs})
    assert len(opt.param_groups) == 2


def test_a_misspelt_hyperparameter_is_refused_and_one_of_any_list_is_taken():
    matrices, rest = parameters()
    both(matrices, rest, heavy_step, rho=0.25)
    with pytest.raises(TypeError, match="no callback takes the hyperparameter 'rhoo'; did you mean 'rho'"):
        both(matrices, rest, heavy_step, rhoo=0.25)


def test_an_error_in_one_list_leaves_both_as_they_were():
    def fails(p, lr, limit=0, **kwargs):
        p.data.sub_(p.grad, alpha=lr)
        if limit > 1:
            raise ValueError("here")

    matrices, rest = parameters()
    opt = both(matrices, rest, fails)
    gradients([*matrices, *rest])
    opt.step()
    before = [p.detach().clone() for p in [*matrices, *rest]]
    opt.param_groups[0]["limit"] = 2
    with pytest.raises(ValueError, match="here"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step()
    assert all(torch.equal(p, x) for p, x in zip([*matrices, *rest], before, strict=True))
    assert all(opt.state[p]["step"] == 1 for p in rest)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_list_may_have_torch_calls_beside_a_fused_one(backend):
    matrices, rest = parameters()
    opt = both(matrices, rest, orthogonal_step, backend=backend, max_grad_norm=0.5)
    theirs, adamw = parameters()
    twin = torch.optim.AdamW(adamw, lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(4):
            gradients([*matrices, *rest], t)
            gradients([*theirs, *adamw], t)
            opt.step()
            torch.nn.utils.clip_grad_norm_([*theirs, *adamw], 0.5)
            twin.step()
            for p in theirs:
                u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
                p.data -= 0.01 * (u @ v)
    for p, q in zip([*matrices, *rest], [*theirs, *adamw], strict=True):
        torch.testing.assert_close(p, q)
    assert not caught, [str(w.message) for w in caught]
    if backend == "cpp":
        assert opt.explain().calls and not opt.explain().eager
        assert any(stage.kernel.startswith("adam_step") for stage in opt.explain().stages)


def test_what_acts_is_called_for_its_own_group_in_a_plain_loops_order():
    seen = []

    def acts(p, **kwargs):
        seen.append(tuple(p.shape))

    matrices, rest = parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = both(matrices, rest, [heavy_step, acts, fusedopt.sgd_step])
        for t in range(3):
            gradients([*matrices, *rest], t)
            opt.step()
    assert seen == MATRICES * 3
    assert {e.callback for e in opt.explain().eager} == {"acts"}
    assert any("adam_step" in stage.kernel for stage in opt.explain().stages)


def test_a_list_whose_parameters_rest_is_not_called_idle():
    matrices, rest = parameters()
    opt = both(matrices, rest)
    gradients(rest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
        gradients(matrices)
        opt.step()
    assert "exp_avg" in opt.state[matrices[0]]


def test_freezing_lookahead_and_gradient_scaling_are_of_all_lists():
    matrices, rest = parameters()
    opt = fusedopt.Lookahead(both(matrices, rest, heavy_step, amp_fused=True), k=2)
    assert opt.param_groups[0]["cbs"] == [callbacks.lookahead_slow, heavy_step, callbacks.lookahead]
    opt.freeze()
    assert not any(p.requires_grad for p in matrices) and all(p.requires_grad for p in rest)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for t in range(4):
        opt.zero_grad()
        scaler.scale(sum((p * (t + 1)).sum() for p in rest)).backward()
        scaler.step(opt)
        scaler.update()
    assert not opt.state[matrices[0]] and "slow" in opt.state[rest[0]]


def test_named_optimizers_take_groups_with_callbacks_too():
    matrices, rest = parameters()
    opt = optim.AdamW(
        [{"params": matrices, "cbs": heavy_step, "weight_decay": 0.5}, {"params": rest}], lr=0.1
    )
    twin = torch.optim.AdamW(copy.deepcopy(rest), lr=0.1)
    for t in range(4):
        gradients([*matrices, *rest], t)
        gradients([*matrices, *twin.param_groups[0]["params"]], t)
        opt.step()
        twin.step()
    for p, q in zip(rest, twin.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q)
    assert opt.state[matrices[0]].keys() == {"slow"}
    assert opt.state_dict()["param_groups"][1].keys() == twin.state_dict()["param_groups"][0].keys()


def test_flags_of_a_group_reach_its_callbacks_whatever_the_optimizer_was_given():
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    cbs = [fusedopt.average_grad, callbacks.momentum_step]
    opt = optim.AdamW(
        [{"params": [p], "cbs": cbs, "dampening": True}, {"params": [q]}], lr=1.0, betas=(0.5, 0.9)
    )
    p.grad = torch.ones(3)
    opt.step()
    assert p[0].item() == -0.5


def test_what_is_applied_is_applied_to_all_groups():
    def shrink(p, lr, **kwargs):
        p.data.mul_(1 - lr)

    matrices, rest = parameters()
    before = [p.detach().clone() for p in [*matrices, *rest]]
    opt = both(matrices, rest)
    for _ in range(3):
        opt.apply(shrink)
    rates = [0.01] * 2 + [0.1] * 4
    for p, old, lr in zip([*matrices, *rest], before, rates, strict=True):
        torch.testing.assert_close(p.detach(), old * (1 - lr) ** 3)
    assert next(iter(opt.applications)).engine.steps.anew == 1


def test_a_fake_step_takes_each_groups_list():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matrices, rest = parameters()
        opt = both(matrices, rest, heavy_step)
        for p in [*matrices, *rest]:
            p.grad = torch.ones_like(p)
        opt.step()
    assert opt.state[matrices[0]].keys() == {"slow"} and "step" in opt.state[rest[0]]
