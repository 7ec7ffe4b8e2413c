"""The examples, in small: they learn, and fusedopt steps as fastai would."""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastai")
pytest.importorskip("sklearn")
import benchmarks.torchvision_ops  # noqa: F401  (before anything imports torchvision)

pytest.importorskip("torchvision")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

with warnings.catch_warnings():
    # fastai, when imported: scripts two layers, which torch deprecates, and sets an option that pandas has given up.
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*mode.chained_assignment")
    import book_ch05_breeds as breeds
    import book_ch16_optimizers as optimizers
    import fastai.optimizer
    from fastai.callback.progress import ProgressCallback
    from fastai.learner import defaults
    from fastai.torch_core import set_seed

import fusedopt

# The examples' imports give a progress bar to every Learner that will be made, those of other test files as well.
defaults.callbacks = [cb for cb in defaults.callbacks if cb is not ProgressCallback]

pytestmark = [
    # fastai's load_model names a module that numpy has renamed,
    pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning"),
    # and its tensors answer numpy in the old way.
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def assert_falls(losses, to):
    """All losses are finite, and the last is below so much of the first few."""
    start = sum(losses[:4]) / 4
    assert all(map(math.isfinite, losses)) and losses[-1] < to * start, (start, losses[-1])


def furthest(a, b):
    """The largest relative difference between two curves of the same length."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------------------
# Chapter 5


def finder_losses(folder, opt_func):
    """The first losses of the learning rate finder, from the same weights and batches whatever the optimizer."""
    set_seed(0)
    learn = breeds.new_learner(breeds.load_breeds(folder, size=32, bs=16), opt_func)
    with learn.no_bar():
        learn.lr_find(num_it=8, end_lr=1e-3, show_plot=False, suggest_funcs=None)
    return [
        float(loss) for loss in learn.recorder.losses[:7]
    ]  # the eighth is already far apart on some processors


def test_breeds_are_learnt(monkeypatch, capsys):
    monkeypatch.setattr(breeds, "FORMS", {form: breeds.FORMS[form] for form in ("disc", "star")})
    found = breeds.main(images=32, epochs=4, size=32, bs=12, finder_steps=12, lr=6e-4)
    assert found.breeds == ["plain_disc", "plain_star", "ringed_disc", "ringed_star"]
    assert 1e-7 < found.suggested_lr < 1
    assert all(map(math.isfinite, found.finder_losses)) and min(found.finder_losses) < found.finder_losses[0]
    tuned, spread_out, half = found.phases
    assert_falls(tuned.losses, to=0.8)
    assert max(spread_out.losses + half.losses) < 2 * tuned.losses[0]
    assert all(map(math.isfinite, half.losses)) and half.losses[-1] < tuned.losses[0]
    assert min(phase.accuracy for phase in found.phases) > 0.45, [phase.accuracy for phase in found.phases]
    assert found.group_lrs == pytest.approx([1e-6, 1e-5, 1e-4], rel=0.1)
    assert found.half == torch.bfloat16
    assert all(a != b and n >= 2 for a, b, n in found.confused)
    assert sum(n for *_, n in found.confused) <= round((1 - spread_out.accuracy) * 32)
    assert "most confused" in capsys.readouterr().out


def test_breeds_are_trained_with_the_suggested_learning_rate():
    """fine_tune halves it for the layers that it has unfrozen."""
    found = breeds.main(images=4, epochs=1, size=32, bs=4, finder_steps=12)
    assert found.phases[0].peak_lr == pytest.approx(found.suggested_lr / 2, rel=0.1)


def test_a_resnet_learns_as_with_fastais_adam(tmp_path):
    """An average that is a little shorter is outside the bound."""
    breeds.draw_breeds(tmp_path, images=6)
    theirs = finder_losses(tmp_path, fastai.optimizer.Adam)
    assert furthest(finder_losses(tmp_path, fusedopt.Adam), theirs) < 1e-5
    assert furthest(finder_losses(tmp_path, partial(fusedopt.Adam, mom=0.8)), theirs) > 4e-5


# ------------------------------------------------------------------------------------------------------------
# Chapter 16


NAMES = [recipe.name for recipe in optimizers.RECIPES]


@pytest.fixture(scope="module")
def runs():
    """Every recipe with fusedopt, then with fastai."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = optimizers.main(epochs=2)
    torch.set_num_threads(threads)
    return {name: (found[2 * i], found[2 * i + 1]) for i, name in enumerate(NAMES)}


@pytest.mark.parametrize("name", NAMES)
def test_digits_are_learnt_alike_with_either_optimizer(runs, name):
    ours, theirs = runs[name]
    assert (ours.library, theirs.library) == ("fusedopt", "fastai")
    assert furthest(ours.losses, theirs.losses) < 1e-4
    assert ours.lrs == theirs.lrs
    assert abs(ours.accuracy - theirs.accuracy) < 0.01
    assert_falls(ours.losses, to=0.6)
    assert ours.accuracy > 0.8
    assert 0.2 < ours.dead_share < 0.8 and abs(ours.dead_share - theirs.dead_share) < 0.01


def test_the_written_out_sgd_is_the_ready_made_one(runs):
    assert furthest(runs["SGD"][0].losses, runs["baseline SGD"][0].losses) < 1e-4


def test_one_cycle_goes_up_and_down(runs):
    assert len(set(runs["SGD"][0].lrs)) == 1
    lrs = runs["Adam"][0].lrs
    assert max(lrs) == pytest.approx(0.01, rel=0.01) and lrs[0] < max(lrs) / 20 and lrs[-1] < lrs[0]


@pytest.mark.parametrize("recipe", optimizers.RECIPES[1:], ids=NAMES[1:])
def test_a_step_that_is_a_thousandth_too_long_is_noticed(runs, recipe):
    *rest, last = recipe.cbs

    def longer(p, lr, **kwargs):
        return last(p, lr=1.001 * lr, **kwargs)

    longer.defaults = getattr(last, "defaults", {})
    wrong = optimizers.train(replace(recipe, cbs=(*rest, longer)), fusedopt, epochs=1)
    # An epoch of one cycle is another schedule; so is an optimizer that is right.
    right = optimizers.train(recipe, fastai.optimizer, epochs=1)
    assert furthest(wrong.losses, right.losses) > 1e-4


def test_the_model_forgets_its_training_before_validation():
    learn = optimizers.Learner(
        optimizers.digits(),
        optimizers.DigitNet(4),
        loss_func=torch.nn.CrossEntropyLoss(),
        cbs=optimizers.ModelReset(),
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, lr=0.0)
    assert learn.model.seen == 16 * len(learn.dls.valid_ds)


def test_every_run_is_in_the_table(runs):
    lines = optimizers.table(run for pair in runs.values() for run in pair).splitlines()[2:]
    assert [line[:14].strip() for line in lines] == NAMES
    assert all(len(line[14:].split()) == 8 for line in lines)
