"""What a fit records, prints, writes and draws; schedules; and looking for a learning rate."""

import copy
import functools
import random
import re
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

import fusedopt
from benchmarks import learner as benchmark
from fusedopt import learner as fl
from fusedopt.learner import Callback, Learner
from fusedopt.learner.callbacks import recorder
from fusedopt.optimizer import named

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def agg():
    """Pictures without a display."""
    before = plt.get_backend()
    plt.switch_backend("agg")
    yield
    plt.close("all")
    plt.switch_backend(before)


def loaders(shuffle=True, **kwargs):
    x = torch.randn(44, 3, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
    return [
        torch.utils.data.DataLoader(data, 8, shuffle=shuffle, **kwargs),
        torch.utils.data.DataLoader(data, 8),
    ]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def by_block(model):
    return [list(model[:2].parameters()), list(model[4].parameters())]


def make_learner(cbs=None, quiet=True, **kwargs):
    kwargs = dict(dls=loaders(), model=make_model(), lr=0.01, metrics=fl.accuracy) | kwargs
    learn = Learner(loss_func=nn.functional.cross_entropy, cbs=cbs, **kwargs)
    if quiet:
        learn.logger = lambda *_: None
    return learn


# --
# Recorder


def test_a_line_for_each_epoch(capsys):
    learn = make_learner(quiet=False)
    learn.fit(2)
    head, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["epoch", "train_loss", "valid_loss", "accuracy", "time"]
    for i, (line, row) in enumerate(zip(lines, learn.recorder.values, strict=True)):
        assert line[:-1] == [str(i), *(f"{x:.6f}" for x in row)] and line[-1].startswith("00:")
    with learn.no_logging():
        learn.fit(1)
    assert capsys.readouterr().out == ""


def test_the_losses_are_a_debiased_moving_average():
    losses = []

    class Keeps(Callback):
        def after_loss(self):
            losses.extend([self.loss.item()] if self.training else [])

    learn = make_learner(Keeps)
    learn.fit(2)
    mean, expected = 0.0, []
    for i, loss in enumerate(losses):
        mean = 0.98 * mean + 0.02 * loss
        expected.append(mean / (1 - 0.98 ** (i + 1)))
    np.testing.assert_allclose([float(x) for x in learn.recorder.losses], expected, rtol=1e-5)
    assert learn.smooth_loss is learn.recorder.losses[-1]
    assert learn.recorder.iters == [6, 12]


def test_validation_is_averaged_over_items_and_not_over_batches():
    """44 items in batches of 8: the last has four."""
    learn = make_learner()
    learn.fit(1)
    learn.model.eval()
    x, y = learn.dls[1].dataset.tensors
    with torch.no_grad():
        pred = learn.model(x)
    expected = [nn.functional.cross_entropy(pred, y).item(), fl.accuracy(pred, y).item()]
    np.testing.assert_allclose(learn.final_record[1:], expected, rtol=1e-5)


def test_hyperparameters_of_each_batch():
    learn = make_learner(splitter=by_block)
    learn.fit_one_cycle(2, slice(1e-4, 1e-2))
    rec = learn.recorder
    assert len(rec.lrs) == len(rec.moms) == len(rec.losses) == 12
    assert rec.hps == {"lr": rec.lrs, "mom": rec.moms}
    cycle = fl.combined_cos(0.25, 1e-2 / 25, 1e-2, 1e-2 / 1e5)
    np.testing.assert_allclose(rec.lrs, [cycle(i / 12) for i in range(12)], rtol=1e-5)
    np.testing.assert_allclose(rec.moms[:4], [0.95, 0.925, 0.875, 0.85], rtol=1e-6)


def test_metrics_that_are_objects():
    class Largest:
        """No base class, and a name of its own."""

        name = "largest"

        def reset(self):
            self.value = 0

        def accumulate(self, learn):
            self.value = max(self.value, len(learn.yb[0]))

    learn = make_learner(metrics=[fl.accuracy, Largest(), fl.ValueMetric(lambda: 7, "seven")])
    learn.fit(1)
    assert learn.recorder.metric_names == [
        *("epoch", "train_loss", "valid_loss", "accuracy", "largest", "seven", "time")
    ]
    assert learn.final_record[3:] == [8, 7]


def test_metrics_of_training_batches():
    learn = make_learner(default_cbs=False, cbs=[fl.TrainEval, fl.Recorder(False, train_metrics=True)])
    learn.fit(1)
    assert learn.recorder.metric_names == [
        *("epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy")
    ]
    assert len(learn.final_record) == 4 and 0 < learn.final_record[1] <= 1


def test_what_was_cancelled_leaves_no_hole_in_the_table():
    class Skips(Callback):
        def before_validate(self):
            if self.epoch == 0:
                raise fl.CancelValidException

        def before_batch(self):
            if self.epoch == 1 and self.training:
                raise fl.CancelTrainException if self.iter else fl.CancelBatchException
            if self.epoch == 2 and self.training:
                raise fl.CancelEpochException

    learn = make_learner(Skips)
    learn.fit(3)
    known = [[x is not None for x in row] for row in learn.recorder.values]
    assert known == [[True, False, False], [False, True, True], [False, False, False]]


def test_validation_leaves_the_history_alone():
    learn = make_learner()
    learn.fit(2)
    before = copy.deepcopy((learn.recorder.values, learn.recorder.lrs, learn.recorder.iters))
    for name in ("before_fit", "before_epoch"):
        learn(name)
    learn._validate()
    for name in ("after_epoch", "after_fit"):
        learn(name)
    assert len(learn.final_record) == 2, "a loss and a metric"
    assert (learn.recorder.values, learn.recorder.lrs, learn.recorder.iters) == before


def test_times():
    assert [recorder.format_time(s) for s in (0.2, 5, 65, 3723)] == ["00:00", "00:05", "01:05", "1:02:03"]


# --
# Pictures


def test_pictures(agg):
    learn = make_learner()
    learn.fit_one_cycle(3)
    ax = learn.recorder.plot_loss(skip_start=2)
    train, valid = ax.lines
    assert train.get_ydata().tolist() == [float(x) for x in learn.recorder.losses[2:]]
    assert valid.get_xdata().tolist() == learn.recorder.iters
    assert valid.get_ydata().tolist() == [row[1] for row in learn.recorder.values]
    again = learn.recorder.plot_loss(with_valid=False, log=True, show_epochs=True, ax=ax)
    assert again is ax and (ax.get_xscale(), ax.get_yscale()) == ("log", "log") and len(ax.lines) == 6
    lr, mom = learn.recorder.plot_sched()
    assert [ax.get_ylabel() for ax in (lr, mom)] == ["lr", "mom"]
    assert [ax.get_title() for ax in (lr, mom)] == [
        "learning rate",
        "momentum",
    ] and lr.get_xlabel() == "batch"
    assert lr.lines[0].get_ydata().tolist() == learn.recorder.lrs
    assert [ax.get_ylabel() for ax in learn.recorder.plot_sched("mom")] == ["mom"]


def test_the_picture_of_a_finder_says_the_rate(agg):
    learn = make_learner()
    marks = [(0.012345, 1.0), (3e-6, 2.0)]
    ax = learn.recorder.plot_lr_find(suggestions=marks, nms=["valley", "steep"])
    assert [text.get_text() for text in ax.texts] == ["0.012", "3e-06"] and [t.xy for t in ax.texts] == marks
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["valley", "steep"]


def test_three_schedules_leave_no_empty_axes(agg):
    learn = make_learner()
    learn.fit(1, cbs=fl.ParamScheduler({"eps": fl.sched_exp(1e-8, 1e-2)}))
    axes = learn.recorder.plot_sched(["lr", "mom", "eps"])
    assert axes[0].figure.axes == axes


def test_a_picture_before_there_is_anything_to_see(agg):
    assert len(make_learner().recorder.plot_loss().lines[0].get_xdata()) == 0
    with pytest.raises(ValueError, match="fit first"):
        make_learner().recorder.plot_sched()


def test_what_is_scheduled_besides_can_be_drawn(agg):
    learn = make_learner()
    learn.fit(1, cbs=fl.ParamScheduler({"eps": fl.sched_exp(1e-8, 1e-2)}))
    *_, eps = learn.recorder.plot_sched()
    assert eps.get_ylabel() == "eps" and eps.lines[0].get_ydata()[0] == 1e-8


# --
# Schedules


def test_schedules_that_do_not_fill_the_way_are_refused():
    for pcts in ([0.5, 0.4], [1.5, -0.5], [1.0]):
        with pytest.raises(ValueError, match="takes a share per schedule"):
            fl.combine_scheds(pcts, [fl.sched_no(1, 1)] * 2)


def test_restarts_of_cycles_of_one_length():
    learn = make_learner()
    learn.fit_sgdr(3, 1, lr_max=1.0, cycle_mult=1)
    assert [learn.recorder.lrs[i] for i in (0, 6, 12)] == [1.0] * 3


# --
# Progress and the file


def test_progress_shows_bars_lines_and_the_optimizers_share(capsys):
    learn = make_learner(fl.Progress, quiet=False)
    learn.fit(2)
    out, err = capsys.readouterr()
    share = re.search(r"optimizer: (\d+\.\d)% of the time of training steps", out)
    assert share and 0 < float(share[1]) < 100
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["epoch", "0", "1"]
    assert all(f"{name}:" in err for name in ("epochs", "train", "valid"))
    assert learn.logger is recorder.print_line and "step" not in vars(learn.opt)


def test_the_optimizers_share_is_that_of_its_step(capsys, monkeypatch):
    """A step that takes nearly all the time has nearly all of it, also where a callback takes its place."""
    clock = [0.0]
    monkeypatch.setattr("fusedopt.learner.callbacks.progress.time.perf_counter", lambda: clock[0])

    class Slow(Callback):
        run_valid = False

        def before_fit(self):
            step = self.opt.step
            self.opt.step = lambda: (clock.__setitem__(0, clock[0] + 3), step())

        def after_pred(self):
            clock[0] += 1

        def before_step(self):
            self.opt.step()
            raise fl.CancelStepException

        def clean_up(self):
            self.opt.__dict__.pop("step", None)

    learn = make_learner([Slow, fl.Progress], quiet=False)
    learn.fit(1)
    assert "optimizer: 75.0% of" in capsys.readouterr().out


def test_progress_is_silent_where_the_learner_is(capsys):
    learn = make_learner(fl.Progress, quiet=False)
    with learn.no_logging():
        learn.fit(1)
    assert capsys.readouterr().out == ""


def test_progress_draws_nothing_for_predictions(capsys):
    learn = make_learner(fl.Progress)
    learn.fit(1)
    assert "valid" in capsys.readouterr().err
    learn.get_preds()
    learn.validate()
    assert capsys.readouterr().err == ""
    learn.fit(1)
    assert "valid" in capsys.readouterr().err


def test_progress_goes_when_a_fit_breaks(capsys):
    class Breaks(Callback):
        def before_step(self):
            raise RuntimeError("broken")

    learn = make_learner(fl.Progress, quiet=False)
    with pytest.raises(RuntimeError, match="broken"):
        learn.fit(1, cbs=Breaks)
    assert learn.logger is recorder.print_line and "step" not in vars(learn.opt)
    assert learn.progress.epochs is None and learn.progress.batches is None


def test_epochs_in_a_file(tmp_path):
    learn = make_learner(fl.CSVLogger, path=tmp_path / "new")
    learn.fit(2)
    rows = learn.csv_logger.read_log()
    assert list(rows[0]) == learn.recorder.metric_names
    values = [[float(x) for x in row.values() if ":" not in x] for row in rows]
    assert values == [[i, *row] for i, row in enumerate(learn.recorder.values)]
    learn.lr_find(show_plot=False)
    assert learn.csv_logger.read_log() == rows, "looking for a rate is no training"
    learn.fit(1)
    assert len(learn.csv_logger.read_log()) == 1
    learn.csv_logger.append = True
    learn.fit(2)
    assert [row["epoch"] for row in learn.csv_logger.read_log()] == ["0", "0", "1"]
    assert learn.csv_logger.file is None


# --
# Looking for a learning rate


class Odd(nn.Module):
    """A buffer that is replaced and not saved, a counter, and a random number in every batch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sums", torch.zeros(2), persistent=False)
        self.batches = 0

    def forward(self, x):
        if self.training:
            self.sums = self.sums + x.detach().mean(0)
            self.batches += 1
            self.last = x.detach()
            np.random.rand(), random.random()
        return x


def everything(learn):
    """What a search for a rate must not change."""
    opt = learn.opt
    return dict(
        model={k: v.clone() for k, v in learn.model.state_dict().items()},
        buffers={k: v.clone() for k, v in learn.model.named_buffers()},
        grads=[None if p.grad is None else p.grad.clone() for p in learn.model.parameters()],
        wants=[p.requires_grad for p in learn.model.parameters()],
        modes=[m.training for m in learn.model.modules()],
        own={k: v for k, v in vars(learn.model[-1]).items() if k in ("batches", "last")},
        state=[copy.deepcopy(dict(opt.state.get(p, {}))) for p in learn.model.parameters()] if opt else None,
        hypers=[dict(h) for h in opt.hypers] if opt else None,
        frozen=opt.frozen_idx if opt else None,
        random=(torch.get_rng_state(), np.random.get_state(), random.getstate()),
        loaders=learn.dls[0].generator.get_state(),
        training=learn.training,
        callbacks=list(learn.cbs),
    )


def assert_equal(found, expected, where=""):
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected) and found.dtype == expected.dtype, where
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected, err_msg=where)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for k in expected:
            assert_equal(found[k], expected[k], f"{where}/{k}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_equal(a, b, f"{where}/{i}")
    else:
        assert found == expected, where


def odd_learner(**kwargs):
    model = nn.Sequential(*make_model(), Odd())
    dls = loaders(generator=torch.Generator().manual_seed(3))
    return make_learner(model=model, dls=dls, splitter=by_block, **kwargs)


def fresh(learn):
    learn.model.eval()


def trained(learn):
    learn.fit_one_cycle(1, 0.05)


def frozen(learn):
    learn.fit(1, slice(1e-4, 1e-2), wd=0.3)
    learn.freeze()
    learn.fit(1)
    learn.model.train()


def with_gradients(learn):
    learn.fit(1)
    x, y = next(iter(learn.dls[0]))
    learn.loss_func(learn.model(x), y).backward()


class Breaks(Callback):
    def __init__(self, error):
        self.error = error

    def after_step(self):
        if self.train_iter == 20:
            raise self.error("broken")


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [fresh, trained, frozen, with_gradients])
def test_a_search_changes_nothing(before, error):
    learn = odd_learner()
    before(learn)
    held = dict(learn.model.named_parameters()) | {"opt": learn.opt}
    expected = everything(learn)
    if error is None:
        learn.lr_find(show_plot=False)
    else:
        with learn.added_cbs(Breaks(error)), pytest.raises(error, match="broken"):
            learn.lr_find(show_plot=False)
    assert learn.recorder.lrs[10] > learn.recorder.lrs[0], "it has searched"
    assert_equal(everything(learn), expected)
    assert all(held[k] is v for k, v in {**dict(learn.model.named_parameters()), "opt": learn.opt}.items())


@pytest.mark.parametrize("opt_func", [*named.__all__, "optim.AdamW", "optim.SGD", "optim.RMSprop"])
def test_a_search_changes_no_optimizer(opt_func):
    maker = functools.reduce(getattr, opt_func.split("."), fusedopt)
    if opt_func == "Lookahead":
        maker = lambda params, lr: fusedopt.Lookahead(fusedopt.SGD(params, lr, mom=0.9))  # noqa: E731
    learn = odd_learner(opt_func=maker)
    learn.fit_one_cycle(2, slice(1e-4, 1e-2))
    expected = everything(learn)
    learn.lr_find(end_lr=1e-2, show_plot=False)
    assert_equal(everything(learn), expected)
    learn.fit(1)


def test_training_goes_on_as_without_a_search():
    searched, other = odd_learner(), odd_learner()
    for learn in (searched, other):
        torch.manual_seed(1)
        learn.fit(1)
        if learn is searched:
            learn.lr_find(show_plot=False)
        learn.fit_one_cycle(2)
    assert searched.recorder.values == other.recorder.values
    assert searched.recorder.lrs == other.recorder.lrs


def test_the_callback_alone_puts_everything_back_too():
    learn = odd_learner()
    learn.fit(1, 0.01)
    expected = everything(learn)
    learn.fit(20, 0.01, cbs=fl.LRFinder(num_it=30))
    assert len(learn.recorder.lrs) == 30
    assert_equal(everything(learn), expected)


def test_rates_grow_exponentially_until_the_loss_diverges():
    learn = make_learner()
    learn.lr_find(1e-6, 1, num_it=50, stop_div=False, show_plot=False)
    np.testing.assert_allclose(learn.recorder.lrs, np.geomspace(1e-6, 1, 51)[:-1], rtol=1e-6)
    diverging = make_learner(opt_func=fusedopt.SGD)
    diverging.lr_find(1e-3, 1e6, show_plot=False)
    losses = [float(x) for x in diverging.recorder.losses]
    assert len(losses) < 100 and losses[-1] > 4 * min(losses) >= losses[-2]


def test_a_rate_for_each_group():
    learn = make_learner(splitter=by_block)
    learn.lr_find([1e-6, 1e-5], [1, 10], num_it=20, stop_div=False, show_plot=False, suggest_funcs=None)
    np.testing.assert_allclose(learn.recorder.lrs, np.geomspace(1e-5, 10, 21)[:-1], rtol=1e-6)


def test_suggestions_are_drawn_with_marks(agg):
    learn = make_learner()
    names = ("minimum", "steep", "valley", "slide")
    found = learn.lr_find(suggest_funcs=[getattr(fl, n) for n in names])
    (ax,) = plt.gcf().axes
    curve, *marks = ax.lines
    assert len(curve.get_xdata()) == len(learn.recorder.lrs) - 5 and ax.get_xscale() == "log"
    assert [m.get_label() for m in marks] == list(names) == list(found._fields)
    assert [m.get_xdata()[0] for m in marks[1:]] == list(found[1:])
    assert marks[0].get_xdata()[0] == pytest.approx(found.minimum * 10)


def test_no_suggestions(agg):
    learn = make_learner()
    assert learn.lr_find(suggest_funcs=None) is None
    assert len(plt.gcf().axes[0].lines) == 1


def test_too_little_to_suggest_anything_from():
    learn = make_learner()
    with pytest.raises(ValueError, match=r"6 batches left 1 losses .* take a larger num_it"):
        learn.lr_find(num_it=6, show_plot=False)
    learn.loss_func = lambda pred, target: nn.functional.cross_entropy(pred, target) * float("nan")
    with pytest.raises(ValueError, match=r"100 batches left 0 losses"):
        learn.lr_find(show_plot=False)


# --
# What the loop costs


def calls_per_batch(make):
    """How many Python functions are called for a batch more, once everything is compiled and warm."""
    counts = []
    for n in (10, 30):
        epoch, calls = make(benchmark.batches(n)), []
        epoch(), epoch()
        sys.setprofile(lambda frame, event, arg, calls=calls: event == "call" and calls.append(frame.f_code))
        try:
            epoch()
        finally:
            sys.setprofile(None)
        counts.append(len(calls))
    return (counts[1] - counts[0]) / 20


def test_the_loop_adds_few_calls():
    """33 and 61 when this was written. benchmarks/README.md has what they take."""
    by_hand = calls_per_batch(benchmark.by_hand)
    assert calls_per_batch(lambda data: benchmark.learner(data, default_cbs=False)) <= by_hand + 40
    assert calls_per_batch(lambda data: benchmark.learner(data, default_cbs=True)) <= by_hand + 70


def test_what_the_loop_takes_is_measured_beside_a_loop_by_hand():
    assert list(benchmark.added(n=2, rounds=1)) == ["by hand", "bare loop", "TrainEval and Recorder"]
