"""docs/storage_table.md and docs/storage_curves.md are what is measured, as far as that needs no clock."""

import matplotlib.image
import pytest
import torch

from benchmarks import storage as written
from benchmarks import storage_curves as curves
from fusedopt.storage import Policy
from fusedopt.storage.policy import POLICIES

SHAPES = ((1 << 13,),) * 2


@pytest.fixture(scope="module")
def measured():
    return written.measure(written.CHOICES, SHAPES, 2)


def test_the_document_has_the_errors_of_all_policies():
    assert written.TABLE.read_text(encoding="utf-8").startswith(written.policies()), (
        "python -m benchmarks.storage"
    )


def test_the_document_has_the_bytes_of_all_rows(measured):
    said = written.TABLE.read_text(encoding="utf-8")
    for found in measured:
        # Blocks of small tensors are as large as those of large ones: the bytes for each element are the same.
        assert written.row(found.choice, found.cost) in said, "python -m benchmarks.storage"


def test_every_policy_is_stepped():
    chosen = {name for c in written.CHOICES for name in (c.param, c.state) if name}
    left = {n for n in POLICIES if n not in chosen}
    assert left == {"float16_master", "uint8", "uint8_256"}  # of float16; chosen by int8


def test_a_row_has_times_and_ratios(measured):
    by = {found.choice: found for found in measured}
    assert {c.plain for c in by} <= by.keys()
    for found in measured:
        assert len(found.ms) == len(found.ratio) == len(written.THREADS) and min(found.ms) > 0
        if found.choice.plain == found.choice:
            assert found.ratio == (1.0,) * len(found.ratio)
    said = written.document(measured, SHAPES, 2)
    assert all(written.row(found.choice, found.cost) in said for found in measured)


def test_a_policy_that_loses_more_is_noticed(monkeypatch):
    class Fourth(Policy):
        code = torch.bfloat16

        def encode(self, x, noise):
            return x * 0.25

        def decode(self, code, *rest):
            return code * 3.0

    monkeypatch.setitem(POLICIES, "fourth", Fourth())
    found = written.error("fourth")
    assert found.stored == "2" and found.largest == pytest.approx(0.25, rel=0.02) and found.rms > 0.24
    assert written.error("bfloat16").largest <= 2**-8


def test_what_runs_eagerly_is_no_row(recwarn):
    def reads(p, lr, **kwargs):
        p.data.sub_(p.grad, alpha=lr * p.grad.mean().item())

    params = written.parameters(torch.float32, SHAPES)
    opt = written.Optimizer(params, reads, lr=0.1)
    opt.step()
    with pytest.raises(RuntimeError, match="reads runs eagerly"):
        written.cost(opt)


# --
# Training


def test_the_curves_document_is_what_was_measured():
    points, where = curves.read()
    assert curves.TABLE.read_text(encoding="utf-8") == curves.table(points, where), (
        "python -m benchmarks.storage_curves --draw"
    )


def test_every_choice_was_trained_from_every_seed():
    points, _ = curves.read()
    for name, task in curves.TASKS.items():
        for choice in curves.CHOICES:
            seeds = task.seeds if choice in curves.REPEATED else task.few
            assert set(curves.last(points, name, choice)) == {*range(seeds)}, (name, choice)
            assert max(p.step for p in points if (p.task, p.choice) == (name, choice)) == task.steps


@pytest.mark.parametrize("choice", curves.CHOICES)
def test_every_choice_trains(choice):
    found = [*curves.train("digits", choice, 0, 2)]
    assert [p.step for p in found] == [2] and 1 < found[0].loss < 4


def test_a_training_can_be_repeated():
    choice = "bf16+16, state int8"
    one, two = ([*curves.train("digits", choice, 0, 3)] for _ in range(2))
    assert one == two


def test_choices_of_one_seed_begin_alike():
    """The GPT's loss behind one small step is the same but for rounding, and another seed's is another."""
    plain, low, other = (
        next(curves.train("gpt", choice, seed, 1)).loss
        for choice, seed in [(curves.PLAIN, 0), ("bf16+16, state int8", 0), (curves.PLAIN, 1)]
    )
    assert low == pytest.approx(plain, rel=2e-3) and abs(other - plain) > 4 * abs(low - plain)


def test_beside_float32_is_by_seed():
    def point(choice, seed, loss):
        return curves.Point("gpt", choice, seed, 5, loss)

    points = [point(curves.PLAIN, 0, 1.0), point(curves.PLAIN, 1, 3.0), point("kahan", 1, 3.5)]
    apart, error = curves.beside(points, "gpt", "kahan")
    assert apart == 0.5 and error != error
    points.append(point("kahan", 0, 1.25))
    assert curves.beside(points, "gpt", "kahan") == (0.375, 0.125)


def test_the_picture_is_drawn(tmp_path):
    points, _ = curves.read()
    curves.draw(points, tmp_path / "curves.png")
    image = matplotlib.image.imread(tmp_path / "curves.png")
    assert image.shape[0] > 600 and image[..., :3].std() > 0.05
