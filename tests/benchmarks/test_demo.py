"""The demo, in small: its table, its picture, and that its comparison can fail."""

from __future__ import annotations

import dataclasses
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("pytorch_optimizer")
image = pytest.importorskip("matplotlib.image")
sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks is no installed package

import fusedopt  # noqa: E402
from benchmarks import demo  # noqa: E402
from benchmarks.eager import EagerOptimizer  # noqa: E402

SMALL = demo.Settings(widths=(4, 8), steps=6)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(SMALL.threads)
    torch.manual_seed(0)
    model = demo.resnet(SMALL.widths)
    yield [demo.train(rule, model, demo.Digits.load(), SMALL) for rule in demo.RULES]
    torch.set_num_threads(threads)


def test_same_rule_same_curve(results):
    for result in results:
        for other in ("eager", "torch"):
            assert result.gap("fusedopt", other, 3) < 1e-5, (result.rule.name, other)
        assert result.first_step < 1e-6


def test_another_rule_is_noticed():
    wrong = dataclasses.replace(demo.RULES[0], torch=partial(torch.optim.SGD, lr=0.05), has_torch_fused=False)
    result = demo.train(wrong, demo.resnet((4, 8)), demo.Digits.load(), SMALL)
    assert result.gap("fusedopt", "torch", 3) > 1e-4


def test_everybody_is_in_the_table(results):
    groups, head, *lines = demo.table(results).splitlines()
    assert [line.split()[0] for line in lines] == ["SGD", "momentum", "RMSProp", "Adam", "AdamW"]
    assert all(len(line.split()) == 12 for line in lines)
    assert [line.count(" -") for line in lines] == [0, 0, 3, 0, 0]
    assert "speed-up" in groups and "torch fused" in head
    assert all(math.isfinite(result.ms["fusedopt"]) for result in results)


@pytest.mark.parametrize("name", demo.CLASSES)
def test_a_class_of_others_steps_in_kernels_and_learns_the_same(name):
    result = demo.train_class(name, demo.resnet(SMALL.widths), demo.Digits.load(), SMALL)
    explained = result.optimizer.explain()
    assert explained.launches == 1 and not explained.eager, explained
    assert result.gap() < 1e-5
    _, head, line = demo.classes([result]).splitlines()
    assert len(head) == len(line) and line.split()[0] == name and len(line.split()) == 9


def test_the_picture_is_not_blank(results, tmp_path):
    demo.draw(results, tmp_path / "curves.png")
    pixels = torch.tensor(image.imread(tmp_path / "curves.png"))[..., :3]
    assert pixels.shape[1] > 1000
    panels = [part for row in pixels.chunk(2) for part in row.chunk(3, dim=1)]
    assert all((panel < 0.5).any() and panel.std() > 0.05 for panel in panels)


def test_the_command_prints_everything(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "RULES", demo.RULES[3:4])
    out = tmp_path / "new"
    assert demo.main(["--steps", "2", "--out", str(out)]) == 0
    printed, bars = capsys.readouterr()
    assert (out / "loss_curves.png").stat().st_size > 10_000
    for text in (
        "speed-up of fusedopt",
        "Largest of all",
        "run by fusedopt.fuse",
        "Kernels: 1",
        "1 launch",
        "store(param",
        "loss_curves.png",
    ):
        assert text in printed, text
    assert "Adam" in bars and "2/2" in bars


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--steps", "-1"], ["--steps", "x"]])
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_a_demo_does_not_write_to_the_documents():
    assert demo.Settings().out == Path("demo_output")


def test_the_eager_loop_is_the_reference():
    params = [[torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2)] for _ in range(2)]
    ours = fusedopt.RAdam(params[0], lr=0.1, wd=0.1)
    reference = fusedopt.Optimizer(params[1], ours.cbs, backend="reference", **ours.hypers[0])
    optimizers = EagerOptimizer.like(ours), reference
    for step in range(8):
        for own, opt in zip(params, optimizers, strict=True):
            own[0].grad = torch.linspace(-1, 2, 7) * (step + 1)
            opt.step()
            opt.zero_grad()
    assert torch.equal(params[0][0], params[1][0])
    assert torch.equal(params[0][1], params[1][1])
