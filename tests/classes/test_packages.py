"""Classes as packages ship them (torch.optim, pytorch_optimizer, torch_optimizer, prodigyopt), fused: they do the same.

First the steps of each class beside the same steps unfused; then, with one class, everybody that holds an optimizer
or looks into it: pickle, GradScaler, schedulers, hooks, accelerate, Lightning, fastai.
"""

import copy
import itertools
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import benchmarks.torchvision_ops  # noqa: F401  Lightning imports torchvision if it is there

# isort: split
import accelerate
import lightning
import numpy as np
import prodigyopt
import prodigyopt.prodigy_reference
import pytest
import pytorch_optimizer
import torch
import torch_optimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from factories import assert_equal, flat, give_gradients, parameters
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

import fusedopt

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # as in test_fastai_contract.py
    from fastai.callback.all import ProgressCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner, defaults
    from fastai.optimizer import OptimWrapper

defaults.callbacks = [cb for cb in defaults.callbacks if cb is not ProgressCallback]

# torch_optimizer calls the in-place operations in a way that torch has deprecated; Lightning advises on data loaders.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:This overload of:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]

STEPS = 10
MATRICES = ((3, 5), (4, 4))
PACKAGES = {
    "torch": torch.optim,
    "po": pytorch_optimizer,
    "to": torch_optimizer,
    "prodigyopt": prodigyopt,
    "prodigyopt.prodigy_reference": prodigyopt.prodigy_reference,
}
Lion = pytorch_optimizer.Lion


def case(package: str, name: str, marks: Any = (), **arguments: Any) -> Any:
    """A class and what it is made with."""
    cls = getattr(PACKAGES[package], name)
    return pytest.param(partial(cls, **arguments), id=f"{package}.{name}", marks=marks)


# --
# What is compared


def differences(ours: Any, theirs: Any, tolerance: float, path: str = "") -> Iterator[str]:
    """Where two structures differ: in types, keys, shapes, dtypes; in values by more than the tolerance.

    It is relative to a tensor's largest element: where terms cancel, the rounding of what cancelled remains.
    """
    if type(ours) is not type(theirs):
        yield f"{path}: {type(ours)} for {type(theirs)}"
    elif isinstance(theirs, torch.Tensor):
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            yield f"{path}: {ours.dtype} {tuple(ours.shape)} for {theirs.dtype} {tuple(theirs.shape)}"
        elif theirs.numel() and not torch.equal(ours, theirs):
            far = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
            if not far <= tolerance:
                yield f"{path}: {far:.2g} apart"
    elif isinstance(theirs, dict):
        if list(ours) != list(theirs):
            yield f"{path}: {list(ours)} for {list(theirs)}"
        for key in ours.keys() & theirs.keys():
            yield from differences(ours[key], theirs[key], tolerance, f"{path}.{key}")
    elif isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            yield f"{path}: {len(ours)} entries for {len(theirs)}"
        for k, pair in enumerate(zip(ours, theirs, strict=False)):
            yield from differences(*pair, tolerance, f"{path}[{k}]")
    elif isinstance(theirs, float):
        if ours != pytest.approx(theirs, rel=tolerance, nan_ok=True):
            yield f"{path}: {ours} for {theirs}"
    elif ours != theirs:
        yield f"{path}: {ours} for {theirs}"


def result(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """Parameters, and all that the optimizer keeps: state and groups."""
    return {"params": [p.detach() for g in opt.param_groups for p in g["params"]], **opt.state_dict()}


def assert_agree(ours: Any, theirs: Any, tolerance: float = 2e-5) -> None:
    assert not list(differences(result(ours), result(theirs), tolerance))


def train(opt: Any) -> Any:
    """The schedule-free ones want to be told."""
    if hasattr(opt, "train"):
        opt.train()
    return opt


def steps(
    opt: Any, params: list[nn.Parameter], times: range = range(STEPS), missing: tuple[int, ...] = ()
) -> None:
    """Steps with another rate each; the second parameter has no gradient in some."""
    rates = [g["lr"] for g in opt.param_groups]
    for t in times:
        give_gradients(params, t)
        if t in missing:
            params[1].grad = None
        for group, rate in zip(opt.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + 0.1 * t)
        opt.step()
    for group, rate in zip(opt.param_groups, rates, strict=True):
        group["lr"] = rate


def assert_fused(opt: Any, launches: int | None = None) -> None:
    explanation = opt.explain()
    assert not explanation.eager and explanation.launches > 0
    assert launches is None or explanation.launches == launches


# --
# The classes

FUSED = [
    case("torch", "SGD", lr=0.01, momentum=0.9, nesterov=True),
    case("torch", "Adam", weight_decay=0.1),
    case("torch", "AdamW", amsgrad=True),
    case("torch", "NAdam"),
    case("torch", "RAdam", lr=0.01),
    case("torch", "Adagrad", lr_decay=0.1),
    case("torch", "Adadelta"),
    case("torch", "Adamax"),
    case("torch", "RMSprop", centered=True, momentum=0.9),
    case("torch", "Rprop"),
    case("torch", "ASGD"),
    case("po", "Lion", weight_decay=0.1),
    case("po", "AdaBelief"),
    case("po", "Adan", weight_decay=0.1),
    case("po", "StableAdamW"),
    case("po", "ScheduleFreeAdamW"),
    case("po", "ScheduleFreeSGD"),
    case("po", "ADOPT"),
    case("po", "MADGRAD"),
    case("po", "Lamb"),
    case("po", "LaProp"),
    case("po", "AdEMAMix"),
    case("po", "Yogi"),
    case("po", "QHAdam"),
    case("po", "NovoGrad"),
    case("po", "Tiger"),
    case("po", "Amos"),
    case("po", "Prodigy", weight_decay=0.1),
    case("po", "DAdaptAdam"),
    case("po", "DAdaptSGD"),
    case("po", "DAdaptLion"),
    case("po", "AdaGC"),
    case("po", "Adai"),
    case("po", "AdamS"),
    case("po", "AvaGrad"),
    case("po", "Lamb", pre_norm=True),
    case("po", "Adan", max_grad_norm=1.0),
    case("to", "Yogi"),
    case("to", "QHAdam"),
    case("to", "NovoGrad"),
    case("to", "DiffGrad"),
    case("to", "AccSGD"),
    case("to", "RangerVA"),
    case("torch", "Adafactor"),
    case("prodigyopt", "Prodigy", weight_decay=0.1),
    case("prodigyopt", "Prodigy", use_bias_correction=True, safeguard_warmup=True, betas=(0.9, 0.99)),
    case("prodigyopt.prodigy_reference", "ProdigyReference"),
]


@pytest.mark.parametrize("make", FUSED)
def test_ten_fused_steps_are_ten_steps(make):
    """Also the step after them is compared: what is kept serves the class as its own."""
    pair = parameters(), parameters()
    ours, theirs = fusedopt.fuse(train(make(pair[0]))), train(make(pair[1]))
    assert type(ours) is type(theirs)
    for t in range(STEPS):
        for opt, params in zip((ours, theirs), pair, strict=True):
            steps(opt, params, range(t, t + 1), missing=(3, 4, 7))
        assert_agree(ours, theirs)
    assert_fused(ours)
    fusedopt.unfuse(ours)
    for opt, params in zip((ours, theirs), pair, strict=True):
        steps(opt, params, range(STEPS, STEPS + 1))
    assert_agree(ours, theirs)


def split(cls: Callable[..., Any]) -> Callable[..., Any]:
    """What makes one of those that have a group for matrices."""
    return lambda params: cls(
        [dict(params=[p for p in params if (p.ndim > 1) == wide], use_muon=wide) for wide in (True, False)]
    )


MULTIPLYING = [
    pytest.param(torch.optim.Muon, 2e-2, id="torch.Muon"),  # in bfloat16, where an ulp may be a percent
    pytest.param(split(pytorch_optimizer.Muon), 2e-2, id="po.Muon"),
    pytest.param(partial(pytorch_optimizer.SOAP, precondition_frequency=4), 1e-3, id="po.SOAP"),
    pytest.param(pytorch_optimizer.Shampoo, 1e-3, id="po.Shampoo"),
    pytest.param(partial(torch_optimizer.Shampoo, update_freq=3), 1e-3, id="to.Shampoo"),
]


@pytest.mark.parametrize(("make", "tolerance"), MULTIPLYING)
def test_steps_that_multiply_matrices(make, tolerance):
    """Torch's products and decompositions between fused programs, of several parameters at once."""
    shapes = ((4, 6), (6, 4), (4, 6), (5, 5), *([(5,)] if make is not torch.optim.Muon else []))
    pair = parameters(shapes), parameters(shapes)
    ours, theirs = fusedopt.fuse(make(pair[0])), make(pair[1])
    for t in range(STEPS):
        for opt, params in zip((ours, theirs), pair, strict=True):
            steps(opt, params, range(t, t + 1), missing=(6,))
        assert_agree(ours, theirs, tolerance)
    assert_fused(ours)
    assert ours.explain().calls


def test_a_comparison_can_fail():
    """By the kind of thing that is kept, by a dtype, by one rate."""
    opts = [Lion(parameters()) for _ in range(2)]
    for opt in opts:
        steps(opt, opt.param_groups[0]["params"])
    assert_agree(*opts)
    kept = next(iter(opts[0].state.values()))
    right = kept["exp_avg"]
    for wrong in (right.double(), right * 1.001, right.tolist(), right[:2]):
        kept["exp_avg"] = wrong
        assert len(list(differences(result(opts[0]), result(opts[1]), 2e-5))) == 1
    kept["exp_avg"] = right
    opts[0].param_groups[0]["lr"] *= 1.001
    with pytest.raises(AssertionError, match="lr"):
        assert_agree(*opts)


def seed() -> None:
    """Some draw numbers, of torch or of numpy."""
    torch.manual_seed(0)
    np.random.seed(0)


UNFUSED = [
    case("po", "Kron"),
    case("to", "SWATS", lr=0.01),
]


@pytest.mark.parametrize("make", UNFUSED)
def test_what_has_no_fused_form_runs_as_it_was_written(make):
    pair = parameters(MATRICES), parameters(MATRICES)
    seed()
    ours = fusedopt.fuse(train(make(pair[0])))
    with pytest.warns(RuntimeWarning, match=rf"fusedopt: {type(ours).__name__}\.step runs as it was written"):
        steps(ours, pair[0])
    seed()
    theirs = train(make(pair[1]))
    steps(theirs, pair[1])
    assert not list(differences(result(ours), result(theirs), 0.0))
    explanation = ours.explain()
    (eager,) = explanation.eager
    assert explanation.launches == 0 and eager.callback == f"{type(ours).__name__}.step"
    assert re.match(r"\w+\.py:\d+: \S.* Remedy: ", eager.reason)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(partial(torch.optim.LBFGS, lr=0.1), id="torch.LBFGS"),
        pytest.param(partial(pytorch_optimizer.SAM, base_optimizer=torch.optim.AdamW, lr=0.01), id="po.SAM"),
    ],
)
def test_a_step_that_calls_its_closure_in_between_runs_as_it_was_written(make):
    results = []
    for finish in (fusedopt.fuse, lambda opt: opt):
        params = parameters(MATRICES)
        opt = finish(make(params))

        def closure(opt=opt, params=params):
            opt.zero_grad()
            loss = sum(((p - 1) ** 2).sum() for p in params)
            loss.backward()
            return loss

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fusedopt: .* runs as it was written")
            for _ in range(4):
                closure()
                opt.step(closure)
        results.append(opt)
    ours, theirs = results
    assert not list(differences(result(ours), result(theirs), 0.0))
    (eager,) = ours.explain().eager
    assert re.match(r"\w+\.py:\d+: \S", eager.reason)


def test_gradients_that_are_missing_early_are_no_reason_to_give_up():
    """Amos takes a path of its own in its first step; then gradients go once and come back once."""
    ours, theirs = pair_of(pytorch_optimizer.Amos)
    for opt in (ours, theirs):
        steps(opt, params_of(opt), missing=(2, 3))
    assert_agree(ours, theirs)
    assert_fused(ours)


def test_the_warning_is_about_the_line_that_steps():
    opt = fusedopt.fuse(torch_optimizer.SWATS(parameters(MATRICES)))
    with pytest.warns(RuntimeWarning, match="runs as it was written") as found:
        walk(opt)
    assert {warning.filename for warning in found} == {__file__}


@pytest.mark.filterwarnings("ignore:fusedopt. .* runs as it was written")
def test_the_place_of_a_reason_is_in_the_class_s_own_file():
    opt = fusedopt.fuse(torch_optimizer.SWATS(parameters()))
    walk(opt)
    (eager,) = opt.explain().eager
    assert re.match(r"swats\.py:\d+: ", eager.reason), eager.reason


# --
# Who holds an optimizer, and who looks into it: Lion


def pair_of(make: Callable[..., Any] = Lion, **arguments: Any) -> tuple[Any, Any]:
    """A fused one and one that is not, over equal parameters."""
    return fusedopt.fuse(make(parameters(), **arguments)), make(parameters(), **arguments)


def params_of(opt: Any) -> list[nn.Parameter]:
    return [p for g in opt.param_groups for p in g["params"]]


def walk(*opts: Any, times: range = range(STEPS)) -> None:
    for opt in opts:
        steps(opt, params_of(opt), times)


def test_it_is_the_same_object_of_the_same_class():
    opt = Lion(parameters())
    assert fusedopt.fuse(opt) is opt and type(opt) is Lion and isinstance(opt, torch.optim.Optimizer)
    assert str(opt) == "Lion"
    with pytest.raises(TypeError, match="fused already"):
        fusedopt.fuse(opt)


def test_unfuse_gives_the_step_back():
    ours, theirs = pair_of()
    walk(ours, theirs, times=range(3))
    assert fusedopt.unfuse(ours) is ours
    assert vars(ours).keys() == vars(theirs).keys() and not hasattr(ours, "explain")
    walk(ours, theirs, times=range(3, 6))
    fusedopt.fuse(ours)
    walk(ours, theirs, times=range(6, 9))
    assert_agree(ours, theirs)
    assert_fused(ours, 1)


def pickled(opt: Any) -> Any:
    return pickle.loads(pickle.dumps(opt))


# torch's Optimizer leaves its attributes out of a copy: that of pytorch_optimizer's Lion does not step, fused or not.
COPIED = [torch_optimizer.Yogi, torch.optim.AdamW]


@pytest.mark.parametrize("taken", [0, 3])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=lambda f: f.__name__)
@pytest.mark.parametrize("make", COPIED, ids=lambda c: c.__name__)
def test_a_copy_steps_its_own_parameters(make, copied, taken):
    ours, theirs = pair_of(make)
    walk(ours, theirs, times=range(taken))
    other = copied(ours)
    before = flat(params_of(other))
    assert type(other) is make and torch.equal(before, flat(params_of(ours)))
    walk(ours, theirs, times=range(taken, 6))
    assert torch.equal(before, flat(params_of(other)))
    walk(other, times=range(taken, 6))
    assert_agree(ours, theirs)
    assert_agree(other, theirs)
    assert_fused(ours)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=lambda f: f.__name__)
def test_a_copy_can_be_fused_and_unfused(copied):
    ours, theirs = pair_of(torch.optim.AdamW)
    walk(ours, theirs, times=range(3))
    other = copied(ours)
    if not hasattr(other, "explain"):
        fusedopt.fuse(other)
    walk(other, theirs, times=range(3, 6))
    assert_agree(other, theirs)
    assert_fused(other)
    fusedopt.unfuse(other)
    assert_fused(ours)


def test_grad_scaler_steps_and_skips():
    opts = pair_of()
    for opt in opts:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        found = []
        for t in range(6):
            scaler.scale(torch.zeros(()))
            give_gradients(params_of(opt), t, scale=scaler.get_scale())
            if t == 3:
                params_of(opt)[0].grad[0] = float("inf")
            before = flat(params_of(opt))
            scaler.step(opt)
            scaler.update()
            found.append(torch.equal(before, flat(params_of(opt))))
        assert found == [t == 3 for t in range(6)]
    assert_agree(*opts)
    assert_fused(opts[0], 1)


@pytest.mark.parametrize("first", ["schedule", "fuse"])
def test_a_scheduler_sees_the_steps(first):
    """Warnings are errors here: it would say that it steps before the optimizer."""
    opts = [Lion(parameters(), lr=0.01) for _ in range(2)]
    schedules = []
    for k, opt in enumerate(opts):
        if first == "fuse" and k == 0:
            fusedopt.fuse(opt)
        schedules.append(LambdaLR(opt, lambda t: 1 / (1 + t)))
        if first == "schedule" and k == 0:
            fusedopt.fuse(opt)
    for t in range(6):
        for opt, schedule in zip(opts, schedules, strict=True):
            give_gradients(params_of(opt), t)
            opt.step()
            schedule.step()
    assert opts[0].param_groups[0]["lr"] == pytest.approx(0.01 / 7)
    assert_agree(*opts)
    assert_fused(opts[0], 1)


@pytest.mark.parametrize("first", ["schedule", "fuse"])
def test_a_scheduler_that_steps_first_still_warns(first):
    opt = Lion(parameters())
    if first == "fuse":
        fusedopt.fuse(opt)
    schedule = StepLR(opt, 1)
    if first == "schedule":
        fusedopt.fuse(opt)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        schedule.step()


def test_a_group_added_midway():
    opts = pair_of()
    walk(*opts, times=range(4))
    for opt in opts:
        opt.add_param_group({"params": parameters(MATRICES, seed=1), "lr": 0.01, "weight_decay": 0.1})
    walk(*opts, times=range(4, STEPS))
    assert_agree(*opts)
    assert_fused(opts[0])


@pytest.mark.parametrize("make", [Lion, pytorch_optimizer.Adan, torch.optim.AdamW], ids=lambda c: c.__name__)
@pytest.mark.parametrize("taken", [0, 2], ids=["before its first step", "after some"])
@pytest.mark.parametrize("source", ["fused", "unfused"])
def test_a_checkpoint_goes_into_a_new_one(make, taken, source, tmp_path):
    ours, theirs = pair_of(make)
    walk(ours, theirs, times=range(4))
    torch.save((ours if source == "fused" else theirs).state_dict(), tmp_path / "opt.pt")
    new = fusedopt.fuse(make([nn.Parameter(p.detach().clone()) for p in params_of(theirs)], lr=0.5))
    with torch.no_grad():
        walk(new, times=range(taken))
        for p, q in zip(params_of(new), params_of(theirs), strict=True):
            p.copy_(q)
    new.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    walk(new, theirs, times=range(4, STEPS))
    assert_agree(new, theirs)
    assert_fused(new)


def test_hooks_are_called_around_a_step():
    opts = pair_of()
    logs: list[list[Any]] = [[], []]
    for opt, log in zip(opts, logs, strict=True):
        opt.register_step_pre_hook(
            lambda o, args, kwargs, log=log: log.append(("before", type(o), len(args)))
        )
        opt.register_step_post_hook(
            lambda o, args, kwargs, log=log: log.append(("after", params_of(o)[0][0].item()))
        )
    walk(*opts, times=range(3))
    assert [name for name, *_ in logs[0]] == ["before", "after"] * 3
    assert not list(differences(logs[0], logs[1], 2e-5))
    assert_agree(*opts)
    assert_fused(opts[0], 1)


def test_a_hook_that_scales_gradients_counts():
    opts = pair_of(torch.optim.AdamW, lr=0.01)

    def halve(opt, args, kwargs):
        for p in params_of(opt)[:2]:
            p.grad.mul_(0.5)

    walk(*opts, times=range(3))
    handles = [opt.register_step_pre_hook(halve) for opt in opts]
    walk(*opts, times=range(3, 6))
    for handle in handles:
        handle.remove()
    walk(*opts, times=range(6, 9))
    assert_agree(*opts)


def test_a_hook_on_the_state_dict():
    ours, _ = pair_of()
    ours.register_state_dict_post_hook(lambda opt, saved: {**saved, "class": type(opt).__name__})
    walk(ours, times=range(2))
    saved = ours.state_dict()
    assert saved["class"] == "Lion" and saved.keys() == {"state", "param_groups", "class"}
    assert all(list(kept) == ["exp_avg"] for kept in saved["state"].values())


def test_a_closure_is_called_once():
    opts = pair_of()
    for opt in opts:
        calls = itertools.count()

        def closure(opt=opt, calls=calls):
            give_gradients(params_of(opt), t := next(calls))
            return torch.tensor(float(t))

        assert [float(opt.step(closure)) for _ in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert_agree(*opts)
    assert_fused(opts[0], 1)


def test_clear_gradients_and_defaults_are_the_class_s_own():
    ours, theirs = pair_of(weight_decay=0.1)
    walk(ours, theirs, times=range(1))
    ours.zero_grad()
    assert all(p.grad is None for p in params_of(ours))
    assert ours.defaults == theirs.defaults and repr(ours) == repr(theirs)


@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)], ids=["AdamW", "SGD"]
)
def test_a_schedule_of_rates_and_momenta(make):
    opts = pair_of(make, lr=0.01)
    schedules = [OneCycleLR(opt, 0.05, total_steps=STEPS) for opt in opts]
    for t in range(STEPS):
        for opt, schedule in zip(opts, schedules, strict=True):
            give_gradients(params_of(opt), t)
            opt.step()
            if t < STEPS - 1:
                schedule.step()
    assert_agree(*opts)
    assert_fused(opts[0])


def test_what_is_replaced_under_it_is_seen():
    """Parameters' data, state, gradients of another layout."""
    opts = pair_of(lr=0.01)
    walk(*opts, times=range(3))
    for opt in opts:
        a, b, _ = params_of(opt)
        a.data = torch.ones(4)
        opt.state[a]["exp_avg"] = torch.full((4,), 0.5)
        opt.state[b]["exp_avg"].zero_()
    walk(*opts, times=range(3, 6))
    for opt in opts:
        b = params_of(opt)[1]
        give_gradients(params_of(opt), 6)
        b.grad = torch.arange(15.0).reshape(5, 3).t() - 7
        opt.step()
    walk(*opts, times=range(7, 10))
    assert_agree(*opts)
    assert_fused(opts[0], 1)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("make", [Lion, torch.optim.AdamW], ids=lambda c: c.__name__)
def test_betas_that_are_replaced_are_seen(make, groups):
    opts = []
    for finish in (fusedopt.fuse, lambda opt: opt):
        a, b, c = parameters()
        opts.append(finish(make([{"params": [a, b]}, {"params": [c]}] if groups == 2 else [a, b, c])))
    walk(*opts, times=range(4))
    for opt in opts:
        opt.param_groups[-1]["betas"] = (0.8, 0.9)
    walk(*opts, times=range(4, 7))
    assert_agree(*opts)


def test_a_parameter_that_is_frozen_stays():
    opts = pair_of(lr=0.01, weight_decay=0.1)
    for opt in opts:
        params_of(opt)[1].requires_grad_(False)
        for t in range(5):
            give_gradients([params_of(opt)[0], params_of(opt)[2]], t)
            opt.step()
    assert torch.equal(params_of(opts[0])[1], parameters()[1])
    assert_agree(*opts)
    assert_fused(opts[0], 1)


@pytest.mark.parametrize(
    ("make", "taken"),
    [
        pytest.param(torch.optim.AdamW, 0, id="AdamW, from its first step"),
        pytest.param(torch.optim.AdamW, 2, id="AdamW, with state"),
        pytest.param(torch_optimizer.Shampoo, 2, id="Shampoo, with torch calls"),
        pytest.param(torch_optimizer.SWATS, 0, id="SWATS, unfused"),
    ],
)
@pytest.mark.filterwarnings("ignore:fusedopt. .* runs as it was written")
def test_max_grad_norm_clips_as_torch_does(make, taken):
    ours, theirs = make(parameters(MATRICES), lr=0.01), make(parameters(MATRICES), lr=0.01)
    walk(ours, theirs, times=range(taken))
    fusedopt.fuse(ours, max_grad_norm=0.7)
    for t in range(6):
        give_gradients(params_of(ours), t), give_gradients(params_of(theirs), t)
        nn.utils.clip_grad_norm_(params_of(theirs), 0.7)
        ours.step(), theirs.step()
    assert_agree(ours, theirs)


def test_a_profile_names_the_step():
    ours, _ = pair_of()
    walk(ours, times=range(3))
    with torch.autograd.profiler.profile() as profile:
        walk(ours, times=range(3, 4))
    assert any(event.key == "Optimizer.step#Lion.step" for event in profile.key_averages())


def test_hooks_for_all_optimizers_are_called():
    log = []
    handle = register_optimizer_step_post_hook(lambda opt, args, kwargs: log.append(type(opt)))
    try:
        walk(*pair_of(), times=range(2))
    finally:
        handle.remove()
    assert log == [Lion] * 4


@pytest.mark.filterwarnings("ignore:fusedopt. .* runs as it was written")
def test_a_class_of_ones_own_on_top_of_theirs():
    """Its step does more before theirs."""

    class Decayed(Lion):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(1 - group["lr"])
            return super().step(closure)

    opts = pair_of(Decayed, lr=0.01)
    walk(*opts)
    assert_agree(*opts)
    assert_fused(opts[0], 1)


def test_a_step_function_that_was_taken_before_a_checkpoint_still_steps():
    ours, theirs = pair_of()
    step = ours.step
    walk(ours, theirs, times=range(3))
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    give_gradients(params_of(ours), 3), give_gradients(params_of(theirs), 3)
    step(), theirs.step()
    assert_agree(ours, theirs)


# --
# Packages


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def data() -> DataLoader:
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(24, 4, generator=gen)
    return DataLoader(TensorDataset(x, x[:, :2] * x[:, 2:]), batch_size=4)


def fit_plainly(opt_func: Callable[..., Any] = Lion) -> tuple[nn.Module, Any]:
    model = model_of()
    opt = opt_func(model.parameters(), lr=0.01)
    for x, y in data():
        opt.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        opt.step()
    return model, opt


def assert_trained(model: nn.Module, expected: nn.Module) -> None:
    for p, q, start in zip(model.parameters(), expected.parameters(), model_of().parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        assert (p - start).abs().max() > 1e-3


def test_a_class_that_is_taken_as_an_argument():
    """As by trainers that get a class and its arguments, and look at the class's name and signature."""
    made = fusedopt.fuse(Lion)
    assert made.__name__ == "Lion"
    model, opt = fit_plainly(made)
    assert type(opt) is Lion
    assert_trained(model, fit_plainly()[0])
    assert_fused(opt, 1)


def test_a_function_that_makes_one():
    def make(params, lr):
        return Lion(params, lr=lr)

    model, opt = fit_plainly(fusedopt.fuse(make))
    assert_trained(model, fit_plainly()[0])
    assert_fused(opt, 1)


@pytest.fixture
def accelerator():
    """accelerate keeps what it has found out about the machine in singletons and in the environment."""
    before = dict(os.environ)
    singletons = AcceleratorState, PartialState, GradientState
    for state in singletons:
        state._reset_state()
    yield accelerate.Accelerator(cpu=True)
    for state in singletons:
        state._reset_state()
    os.environ.clear()
    os.environ.update(before)


def test_accelerate_prepares_it(accelerator):
    inner = model_of()
    model, opt, batches = accelerator.prepare(inner, fusedopt.fuse(Lion(inner.parameters(), lr=0.01)), data())
    for x, y in batches:
        opt.zero_grad()
        accelerator.backward(nn.functional.mse_loss(model(x), y))
        opt.step()
    assert_trained(inner, fit_plainly()[0])
    assert type(opt.optimizer) is Lion
    assert_fused(opt.optimizer, 1)


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = model_of()

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y)

    def configure_optimizers(self):
        return fusedopt.fuse(Lion)(self.parameters(), lr=0.01)


def test_lightning_configures_it(tmp_path):
    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data())
    (opt,) = trainer.optimizers
    assert type(opt) is Lion
    assert_trained(module.model, fit_plainly()[0])
    assert_fused(opt, 1)


@pytest.mark.parametrize("built", [False, True], ids=["the class", "an optimizer"])
def test_fastai_wraps_it(built, tmp_path):
    models = model_of(), model_of()
    opts = []
    for model, finish in zip(models, (fusedopt.fuse, lambda x: x), strict=True):
        dls = DataLoaders(data(), data())
        if built:
            wrapped = OptimWrapper(opt=finish(Lion(model.parameters(), lr=0.01)))
            opt_func: Any = lambda params, wrapped=wrapped, **kwargs: wrapped  # noqa: E731
        else:
            opt_func = partial(OptimWrapper, opt=finish(Lion))
        learn = Learner(dls, model, nn.functional.mse_loss, opt_func=opt_func, path=tmp_path)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, lr=0.01)
        opts.append(learn.opt.opt)
    assert_trained(*models)
    assert type(opts[0]) is Lion
    assert_fused(opts[0], 1)


def test_optimizers_of_one_class_share_nothing():
    """Two over parameters of their own, stepped in turns."""
    ours, theirs = zip(*(pair_of(lr=lr) for lr in (0.01, 0.002)), strict=True)
    for t in range(4):
        walk(*ours, *theirs, times=range(t, t + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert_agree(a, b)
    assert not torch.equal(flat(params_of(ours[0])), flat(params_of(ours[1])))


def test_a_step_without_any_gradient_changes_nothing():
    ours, theirs = pair_of()
    ours.step(), theirs.step()
    assert_equal(params_of(ours), parameters())
    assert not ours.state
    walk(ours, theirs, times=range(4))
    assert_agree(ours, theirs)
    assert_fused(ours, 1)
