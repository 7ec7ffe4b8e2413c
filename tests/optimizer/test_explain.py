"""``opt.explain()`` and ``opt.kernel_source()``: what a step does, before the first one and after."""

import dataclasses
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from factories import parameters_with_gradients

import fusedopt
from fusedopt import (
    adam_step,
    average_grad,
    average_sqr_grad,
    momentum_step,
    sgd_step,
    step_stat,
    weight_decay,
)

ADAM = [weight_decay, partial(average_grad, dampening=True), average_sqr_grad, step_stat, adam_step]
ADAM_NAMES = ("weight_decay", "average_grad", "average_sqr_grad", "step_stat", "adam_step")


def parameters(dtype=torch.float32, n=3, seed=0):
    return parameters_with_gradients([(4, 5)] * n, dtype, seed)


def adam(params, **options):
    return fusedopt.Optimizer(params, ADAM, lr=0.1, mom=0.9, sqr_mom=0.99, wd=0.01, **options)


def host(p, **kwargs):
    p.data.mul_(1 + 0 * p.data.sum().item())


# --
# Before the first step


def test_before_the_first_step_it_says_what_the_step_will_be():
    params = parameters()
    opt = adam(params, backend="cpp")
    for p in params:
        p.grad = None  # not even gradients are there yet
    before = [p.detach().clone() for p in params]
    report = opt.explain()
    assert (report.launches, report.bytes_per_element, report.backend) == (1, 28, "cpp")
    assert report.callbacks == ADAM_NAMES and report.eager == ()
    (stage,) = report.stages
    assert set(stage.reads) == {"param", "grad", "grad_avg", "sqr_avg"}
    assert set(stage.writes) == {"param", "grad_avg", "sqr_avg"}
    assert (stage.reduces, stage.tensors, stage.bytes_per_element) == (0, 3, 28)
    assert opt.kernel_source() == report.source != ""
    assert dict(opt.state) == {} and all(p.grad is None for p in params), "looking changes nothing"
    assert all(map(torch.equal, params, before))


def test_the_first_step_needs_no_kernel_beyond_the_foreseen_one():
    opt = adam(parameters(), backend="cpp")
    foreseen = opt.explain()
    for _ in range(3):
        opt.step()
    assert opt.explain().compiled == foreseen.compiled
    assert opt.explain().stages == foreseen.stages
    assert [s["step"] for s in opt.state.values()] == [3, 3, 3]


def test_before_the_first_step_it_names_the_callback_that_will_run_eagerly_without_a_warning():
    opt = fusedopt.Optimizer(parameters(), [weight_decay, host, sgd_step], lr=0.1, backend="cpp")
    ((name, reason),) = opt.explain().eager
    assert name == "host" and "read on the host" in reason
    with pytest.warns(RuntimeWarning, match="host runs eagerly"):
        opt.step()


# --
# After it


def test_a_rule_with_norms_takes_two_launches():
    opt = fusedopt.Lamb(parameters(), lr=0.1)
    for report in (opt.explain(), (opt.step(), opt.explain())[1]):
        first, second = report.stages
        assert report.launches == 2 and report.bytes_per_element == 44
        assert first.writes == () and first.reduces == 2 and first.bytes_per_element == 16
        assert set(second.writes) == {"param", "grad_avg", "sqr_avg"} and second.reduces == 0
        assert second.bytes_per_element == 28
        assert first.kernel == second.kernel


def test_low_precision_halves_the_bytes():
    opt = adam(parameters(torch.bfloat16), backend="cpp")
    assert opt.explain().bytes_per_element == 14
    opt = adam(parameters(torch.bfloat16), backend="cpp", state_dtype=torch.float32)
    assert opt.explain().bytes_per_element == 6 + 16


def test_launches_count_programs_and_not_tensors_or_groups():
    params = parameters(n=40)
    opt = adam([params[:1], params[1:5], params[5:]], backend="cpp")
    opt.step()
    assert opt.explain().launches == 1 and opt.explain().stages[0].tensors == 40
    opt.add_param_group(dict(params=parameters(torch.float64, n=7)))
    opt.step()
    report = opt.explain()
    assert report.launches == 2 and sorted(s.tensors for s in report.stages) == [7, 40]
    assert report.bytes_per_element == 56, "of the widest"


def test_a_step_of_few_parameters_is_what_is_explained():
    params = parameters()
    opt = adam(params, backend="cpp")
    opt.step()
    params[0].grad = None
    opt.step()
    assert opt.explain().stages[0].tensors == 2


def test_compiled_says_what_was_compiled_and_why():
    opt = adam(parameters(), backend="cpp", title="counted")
    opt.step()
    (first,) = opt.explain().compiled
    assert first.why == "first step" and first.name == "counted #1"
    assert first.seconds > 0 and isinstance(first.cached, bool)
    source = Path(first.source_path)
    assert source.is_file() and opt.kernel_source().strip() in source.read_text()

    opt.add_param_group(dict(params=parameters(torch.float64)))
    opt.step()
    second = opt.explain().compiled[1]
    assert second.why == "first step of parameters with float64 parameter, float64 gradient, no state"
    assert second.name == "counted #2"

    for p in opt.param_groups[0]["params"]:
        p.data, p.grad = p.data.half(), None
        p.grad = torch.ones_like(p)
    opt.step()
    third = opt.explain().compiled[2]
    assert "now float16 parameter with float16 gradient" in third.why


def test_compiled_says_which_branch_on_a_number_turned():
    opt = fusedopt.RAdam(parameters(), lr=0.01)
    for _ in range(7):
        opt.step()
    early, late = opt.explain().compiled
    assert early.why == "first step"
    assert late.why.endswith("<= 5) is now False") and "sqr_mom" in late.why and "step" in late.why


def test_compiled_says_which_flag_or_state_was_new():
    params = parameters()
    opt = fusedopt.optim.SGD(params, lr=0.1, weight_decay=0.1)
    opt.step()
    opt.param_groups[0]["momentum"] = 0.9
    opt.step()
    opt.step()
    assert [c.why for c in opt.explain().compiled][1:] == ["(mom == 0) is now False"]
    for p in params:
        opt.state[p]["do_wd"] = False
    opt.step()
    assert opt.explain().compiled[-1].why == "state do_wd is there now"


def test_a_kernel_of_another_optimizer_counts_as_this_ones():
    one, two = adam(parameters(), backend="cpp"), adam(parameters(seed=1), backend="cpp")
    one.step(), two.step()
    assert len(one.explain().compiled) == len(two.explain().compiled) == 1
    assert one.kernel_source() == two.kernel_source()


def test_eager_callbacks_are_listed_with_their_reasons():
    opt = fusedopt.Optimizer(
        parameters(),
        [weight_decay, average_grad, host, momentum_step],
        lr=0.1,
        wd=0.1,
        mom=0.9,
        backend="cpp",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        opt.step()
    report = opt.explain()
    assert [e.callback for e in report.eager] == ["host"]
    assert "read on the host" in report.eager[0].reason
    assert f"runs eagerly: host: {report.eager[0].reason}" in str(report)
    assert report.backend == "cpp" and report.launches == 2
    assert len(report.compiled) == 2


def test_the_reference_backend_launches_nothing():
    opt = adam(parameters(), backend="reference")
    for report in (opt.explain(), (opt.step(), opt.explain())[1]):
        assert (report.backend, report.launches, report.bytes_per_element) == ("reference", 0, 0)
        assert report.stages == report.compiled == report.eager == ()
        assert report.callbacks == ADAM_NAMES
    assert opt.kernel_source() == ""


# --
# What it looks like


def test_the_source_names_callbacks_hyperparameters_and_state():
    source = adam(parameters(), backend="cpp").kernel_source()
    for name in ("weight_decay", "average_grad", "average_sqr_grad", "adam_step"):
        assert f"// {name}" in source, "the line of the callback that it came from"
    for text in ("lr", "sqr_mom", "eps", "step"):
        assert text in source
    for buffer in ("param", "grad", "grad_avg", "sqr_avg"):
        assert f"{buffer} = row.buffer<" in source
    assert "28 bytes per element" in source


def test_it_prints_well():
    opt = fusedopt.Lamb(parameters(n=1), lr=0.1)
    opt.step()
    report = opt.explain()
    text = str(report)
    assert repr(report) == text
    lines = text.splitlines()
    assert len(lines) == 3 + len(report.stages) + len(report.compiled)
    assert lines[-1].startswith("steps: 0 of 1 without Python work for each tensor; 1 with it")
    assert lines[0].endswith("on the cpp backend: 2 launches per step, 44 bytes per element")
    assert lines[1] == "callbacks: weight_decay, average_grad, average_sqr_grad, step_stat, lamb_step"
    assert lines[2].startswith("stage 1: ") and "2 reductions per tensor" in lines[2]
    assert lines[3].startswith("stage 2: ") and "writes param, grad_avg, sqr_avg" in lines[3]
    assert lines[4].startswith("kernel ") and report.compiled[0].source_path in lines[4]
    assert "1 tensor:" in lines[2], "in the singular"
    assert all(len(line.split("; /")[0]) < 160 for line in lines)
    assert "1 launch per step" in str(adam(parameters(), backend="cpp").explain())


def test_an_explanation_is_a_record_of_its_moment():
    opt = adam(parameters(), backend="cpp")
    report = opt.explain()
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.backend = "another"
    opt.add_param_group(dict(params=parameters(torch.float64)))
    opt.step()
    assert report.launches == 1 and opt.explain().launches == 2
