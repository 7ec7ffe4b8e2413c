"""The optimizer's share of a training step: who trains does the same, and what is written is of one commit."""

import importlib.util
import itertools

import pytest
import torch
from torch import nn

from benchmarks import plot, training

pytestmark = pytest.mark.usefixtures("one_thread")


def batches():
    gen = torch.Generator().manual_seed(0)
    return ((torch.randn(4, 6, generator=gen), torch.tensor([0, 1, 2, 0])) for _ in itertools.count())


SMALL = training.Model(
    "small", lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)), batches
)


def test_a_share_is_the_steps_part_of_passes_and_step():
    row = training.Row(
        "it", 4, 1_500_000, passes=30.0, steps={"torch": 10.0, "torch fused": 1.0, "fusedopt": 0.3}
    )
    assert (row.share("torch"), row.share("fusedopt")) == (25.0, pytest.approx(0.99, abs=0.001))
    text = training.table([row], {"another": "there is no timm"}, "Here.")
    assert "| it | 4 | 1.50 M | 30 | 10 | 1 | 0.3 | 25.0 % | 3.2 % | 1.0 % |" in text
    assert text.endswith("\nLeft out: another, because there is no timm.\nHere.\n")


def test_everybody_trains_alike():
    runs = training.measure(SMALL, seconds=0, least=5)
    assert {len(run.steps) for run in runs.values()} == {len(run.passes) for run in runs.values()} == {10}
    row = training.Row.of(SMALL, runs)
    assert (row.tensors, row.numel) == (4, 6 * 5 + 5 + 5 * 3 + 3) and min(row.passes, *row.steps.values()) > 0


def test_an_optimizer_that_does_something_else_is_found_out(monkeypatch):
    def wrong(params, **options):
        return torch.optim.AdamW(params, **{**options, "lr": 0.1})

    monkeypatch.setitem(training.OPTIMIZERS, "fusedopt", wrong)
    with pytest.raises(AssertionError, match="fusedopt trains to"):
        training.measure(SMALL, seconds=0, least=1)


@pytest.mark.parametrize("model", training.MODELS, ids=lambda model: model.name.partition(" ")[0])
def test_every_model_gives_classes_for_its_batches(model):
    for name in model.needs:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"there is no {name}")
    x, y = next(model.batches())
    scores = model.make()(x).flatten(0, -2)
    assert len(scores) == len(y) and y.max() < scores.shape[1]


def test_the_command(tmp_path, monkeypatch, capsys):
    unlikely = training.Model("unlikely", SMALL.make, batches, needs=("nobody_has_this",))
    monkeypatch.setattr(training, "MODELS", (SMALL, unlikely))
    out = tmp_path / "table.md"
    assert training.main(["--seconds", "0", "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "| small | 4 | 0.00 M |" in text and "unlikely, because there is no nobody_has_this" in text
    assert "small: passes" in capsys.readouterr().out
    monkeypatch.setattr(training, "facts", lambda: plot.facts() | {"commit": "unknown"})
    monkeypatch.setattr(training, "TABLE", training.ROOT / "docs" / "no_such_table.md")
    assert training.main(["--seconds", "0", "--out", str(training.TABLE)]) == 1
    assert "is of one commit" in capsys.readouterr().err and not training.TABLE.exists()
