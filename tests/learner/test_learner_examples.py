"""The examples with fusedopt's own Learner, in small: they learn, and their pictures show what they say."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")
plt = pytest.importorskip("matplotlib.pyplot")
pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import digits_cnn  # noqa: E402
import learner_ch16_runs as runs  # noqa: E402
import momentum_pictures as momentum  # noqa: E402
import small_batches  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread_and_no_figures():
    """Nets this small gain nothing from a second thread, and stall where it is busy. conftest puts it back."""
    torch.set_num_threads(1)
    yield
    plt.close("all")


def shades(path):
    """How many different colours a picture has."""
    red, green, blue = (255 * torch.tensor(plt.imread(path)[..., :3])).round().int().unbind(-1)
    return len((65536 * red + 256 * green + blue).unique())


def test_a_small_net_reads_digits(tmp_path, capsys):
    found = digits_cnn.main(epochs=3, width=16, out=tmp_path / "new")
    assert 0.8 < found.accuracy == found.confusion.diag().sum() / 360
    assert found.confusion.sum() == 360
    assert sum(n for *_, n in found.most_confused) == 360 - found.confusion.diag().sum()
    assert all(found.confusion[actual, predicted] == n for actual, predicted, n in found.most_confused)
    assert len(found.pictures) == 7 and all(shades(path) > 5 for path in found.pictures)
    printed = capsys.readouterr().out
    for text in ("Total params: ", "optimizer: ", f"accuracy {100 * found.accuracy:.2f} %", "most confused"):
        assert text in printed, text


def test_the_same_seed_gives_the_same_training():
    first, again, other = (digits_cnn.main(epochs=1, width=2, seed=seed).losses for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.slow
def test_the_net_reads_985_of_1000_digits_after_440_batches():
    found = digits_cnn.main()
    assert found.accuracy >= 0.985 and len(found.losses) == 440


def test_every_image_is_shifted_by_up_to_a_pixel():
    x = torch.rand(200, 1, 8, 8)
    shift = digits_cnn.Shift()
    shift.learn = SimpleNamespace(xb=(x,))
    shift.before_batch()
    (shifted,) = shift.learn.xb
    assert shifted.shape == x.shape
    padded = F.pad(x, (1, 1, 1, 1))
    windows = torch.stack([padded[..., i : i + 8, j : j + 8] for i in range(3) for j in range(3)])
    same = (windows == shifted).flatten(2).all(2)
    assert (same.sum(0) == 1).all() and same.any(1).all()


@pytest.mark.parametrize("kind", [kind for kind, _ in momentum.ROWS])
@pytest.mark.parametrize("beta", momentum.BETAS)
def test_the_optimizer_averages_as_written(beta, kind):
    _, values = momentum.noisy_values(20)
    m, expected = 0.0, []
    for n, value in enumerate(values.tolist(), 1):
        m = beta * m + (1 if kind == "sum" else 1 - beta) * value
        expected.append(m / (1 - beta**n) if kind == "debiased" else m)
    assert momentum.moving_averages(values, beta, kind).tolist() == pytest.approx(
        expected, rel=1e-4, abs=1e-5
    )


def test_the_averages_are_in_the_picture(tmp_path):
    _, values = momentum.noisy_values()
    axes = momentum.draw().axes
    assert [ax.get_title() for ax in axes[:4]] == [f"β = {beta}" for beta in momentum.BETAS]
    drawn = torch.tensor(axes[4 + 2].lines[0].get_ydata())
    assert torch.equal(drawn, momentum.moving_averages(values, 0.9, "average"))
    assert shades(momentum.main(tmp_path / "new")) > 5


def test_the_four_runs(tmp_path):
    found = {run.name: run for run in runs.main(epochs=2, width=4, out=tmp_path)}
    assert list(found) == ["SGD", "momentum", "RMSProp", "Adam"]
    assert len({round(run.losses[0], 4) for run in found.values()}) == 1  # the same weights and batch
    for recipe in runs.RECIPES:
        run = found[recipe.name]
        assert run.losses[-1] < 0.8 * run.losses[0] and run.accuracies[-1] > 0.6, run.name
        assert max(run.lrs) == pytest.approx(recipe.lr, rel=0.01)
        assert (len(set(run.lrs)) > 1) == recipe.one_cycle
    assert len({run.losses[-1] for run in found.values()}) == 4
    assert shades(tmp_path / "ch16_runs.png") > 5


def test_running_batch_norm_trains_on_two_images(capsys):
    theirs, ours = small_batches.main(seeds=1, convs=(3,))
    assert (theirs.layer, ours.layer) == ("BatchNorm2d", "RunningBatchNorm")
    assert ours.losses[0] < theirs.losses[0] - 0.3 and ours.accuracies[0] > theirs.accuracies[0] + 0.1
    assert len(capsys.readouterr().out.splitlines()) == 5
