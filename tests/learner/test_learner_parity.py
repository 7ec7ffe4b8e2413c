"""Our Learner beside fastai's, with the same data, seed and optimizer: the same events and losses, to the last bit."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fusedopt
from fusedopt import learner as ours

with warnings.catch_warnings():
    # At import, fastai scripts a function (deprecated by torch) and sets an option that pandas has deprecated.
    warnings.simplefilter("ignore")
    import fastai.callback.all as fa
    import fastai.learner as theirs
    from fastai.callback import core as fa_core
    from fastai.callback import schedule as fa_schedule
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.optimizer import Adam as FastaiAdam

# fastai.callback.all gives a progress bar to every Learner that will be made, those of other test files as well.
theirs.defaults.callbacks = [cb for cb in theirs.defaults.callbacks if cb is not fa.ProgressCallback]

# What fastai does in its search for a rate: it names numpy.core, and hands tensors to numpy.
pytestmark = [
    pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]

BATCHES = 5
OPTIMIZERS = {"fusedopt": fusedopt.Adam, "fastai": FastaiAdam}


class Tracing:
    """Every event; the loss where there is a new one; each group's rate and momentum where they are used."""

    order = 1000

    def __init__(self):
        self.seen = []

    def __call__(self, event_name):
        learn, note = self.learn, None
        if event_name == "after_loss":
            note = (learn.training, learn.loss.item())
        if event_name == "before_step":
            note = [(h["lr"], h["mom"]) for h in learn.opt.hypers]
        if event_name == "after_batch":
            note = (learn.epoch, learn.iter, learn.n_iter, learn.train_iter, learn.pct_train)
        self.seen.append((event_name, note))


class Accumulating:
    """Steps on every second batch only."""

    def after_loss(self):
        if self.learn.training:
            self.learn.loss_grad = self.learn.loss_grad / 2

    def before_step(self):
        if self.learn.iter % 2 == 0:
            raise ours.CancelBatchException if isinstance(self, ours.Callback) else fa.CancelBatchException


class Cancelling:
    """Raises at the n-th time that an event happens."""

    order = 10

    def __init__(self, part, event_name, n):
        module = ours if isinstance(self, ours.Callback) else fa_core
        self.error = getattr(module, f"Cancel{part}Exception")
        self.event_name, self.left = event_name, n

    def __call__(self, event_name):
        if event_name == self.event_name:
            self.left -= 1
            if self.left == 0:
                raise self.error


def both(mixin, *args):
    """A callback of ours and one of fastai's."""
    return tuple(type(mixin.__name__, (mixin, base), {})(*args) for base in (ours.Callback, fa.Callback))


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(27, 6), nn.ReLU()),
        nn.Linear(6, 3),
    )


def by_block(model):
    return [list(block.parameters()) for block in model]


def accuracy(pred, target):
    return (pred.argmax(-1) == target).float().mean()


def make_pair(opt_func, cbs=((), ()), **kwargs):
    x = torch.randn(8 * BATCHES - 3, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(x, x.flatten(1)[:, :3].argmax(1))
    kwargs = dict(opt_func=opt_func, splitter=by_block, lr=0.01, metrics=accuracy) | kwargs
    trace, their_trace = both(Tracing)
    loaders = [torch.utils.data.DataLoader(data, 8) for _ in range(2)]
    our = ours.Learner(loaders, make_model(), nn.functional.cross_entropy, cbs=[trace, *cbs[0]], **kwargs)
    dls = DataLoaders(*[DataLoader(data, bs=8, num_workers=0) for _ in range(2)])
    their = theirs.Learner(
        dls, make_model(), nn.functional.cross_entropy, cbs=[their_trace, *cbs[1]], **kwargs
    )
    their.logger = our.logger = lambda *_: None
    return our, their


def assert_same(our, their):
    assert [name for name, _ in our.tracing.seen] == [name for name, _ in their.tracing.seen]
    assert our.tracing.seen == their.tracing.seen
    for (name, p), q in zip(our.model.state_dict().items(), their.model.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    frozen = [[p.requires_grad for p in learn.model.parameters()] for learn in (our, their)]
    assert frozen[0] == frozen[1]


def assert_same_record(our, their):
    assert our.recorder.metric_names == list(their.recorder.metric_names)
    assert our.recorder.values == [list(row) for row in their.recorder.values]
    assert our.recorder.lrs == list(their.recorder.lrs)
    assert our.recorder.iters == list(their.recorder.iters)
    assert [x.item() for x in our.recorder.losses] == [x.item() for x in their.recorder.losses]
    assert our.final_record == list(their.final_record)
    assert our.smooth_loss == their.smooth_loss


def freezing(learn):
    learn.freeze()
    learn.fit(1, 0.02)
    learn.freeze_to(1)
    learn.fit_one_cycle(1, slice(1e-3, 1e-2))
    learn.unfreeze()
    learn.fit(1, [1e-4, 1e-3, 1e-2], wd=0.3)


WAYS = {
    "fit": lambda learn: learn.fit(2),
    "fit twice": lambda learn: (learn.fit(1, 0.02, wd=0.3), learn.fit(1, reset_opt=True)),
    "one cycle": lambda learn: learn.fit_one_cycle(3, 0.02),
    "one cycle, rates per group": lambda learn: learn.fit_one_cycle(
        3, slice(1e-4, 1e-2), div=10, pct_start=0.4
    ),
    "one cycle, own momentum": lambda learn: learn.fit_one_cycle(2, moms=(0.9, 0.5, 0.8), div_final=100),
    "flat, then cosine": lambda learn: learn.fit_flat_cos(2, slice(1e-3, 1e-2)),
    "warm restarts": lambda learn: learn.fit_sgdr(3, 1, 0.02),
    "fine tune": lambda learn: learn.fine_tune(2),
    "fine tune, longer": lambda learn: learn.fine_tune(2, 1e-2, freeze_epochs=2, lr_mult=10, pct_start=0.2),
    "freezing": freezing,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", WAYS)
def test_events_losses_and_rates_are_fastais(way, optimizer):
    our, their = make_pair(OPTIMIZERS[optimizer])
    for learn in (our, their):
        WAYS[way](learn)
    assert len([note for name, note in our.tracing.seen if name == "after_loss"]) >= 2 * BATCHES
    assert_same(our, their)
    assert_same_record(our, their)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(wd=0.3),
        dict(wd=0.3, wd_bn_bias=True),
        dict(train_bn=False),
        dict(moms=(0.8, 0.7, 0.9)),
        dict(lr=slice(1e-4, 1e-2)),
    ],
    ids=str,
)
def test_the_constructors_options_mean_the_same(kwargs):
    our, their = make_pair(fusedopt.Adam, **kwargs)
    for learn in (our, their):
        learn.fine_tune(1)
        learn.fit_one_cycle(1)
    assert_same(our, their)


def test_another_rate_would_be_noticed():
    our, their = make_pair(fusedopt.Adam)
    our.fit_one_cycle(1, 0.01)
    their.fit_one_cycle(1, 0.0100001)
    with pytest.raises(AssertionError):
        assert_same(our, their)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_accumulated_gradients_train_the_same(optimizer):
    our, their = make_pair(OPTIMIZERS[optimizer], cbs=[[cb] for cb in both(Accumulating)])
    for learn in (our, their):
        learn.fit_one_cycle(2, 0.01)
    steps = [name for name, _ in our.tracing.seen].count("after_step")
    assert steps == 2 * (BATCHES // 2)
    assert_same(our, their)


@pytest.mark.parametrize(
    ("part", "event_name", "n"),
    [
        ("Backward", "before_backward", 2),
        ("Step", "before_step", 2),
        ("Batch", "before_batch", 2),
        ("Batch", "after_pred", 1),
        ("Batch", "after_loss", 3),
        ("Batch", "after_backward", 2),
        ("Batch", "after_step", 1),
        ("Batch", "after_loss", BATCHES + 2),  # in validation
        ("Train", "before_train", 1),
        ("Train", "after_batch", 2),
        ("Train", "before_step", 3),
        ("Valid", "before_validate", 1),
        ("Valid", "after_batch", BATCHES + 2),
        ("Epoch", "before_epoch", 2),
        ("Epoch", "after_batch", 3),
        ("Epoch", "before_validate", 1),
        ("Fit", "before_fit", 1),
        ("Fit", "before_epoch", 2),
        ("Fit", "after_loss", 3),
        ("Fit", "before_validate", 2),
        ("Fit", "after_epoch", 1),
    ],
)
def test_what_is_cancelled_goes_where_fastai_goes(part, event_name, n):
    cancelling = both(Cancelling, part, event_name, n)
    our, their = make_pair(fusedopt.Adam, cbs=[[cb] for cb in cancelling])
    for learn in (our, their):
        learn.fit_one_cycle(3, 0.01)
    assert [cb.left for cb in cancelling] == [cancelling[0].left] * 2 and cancelling[0].left <= 0
    cancelled = f"after_cancel_{'validate' if part == 'Valid' else part.lower()}"
    names = [name for name, _ in our.tracing.seen]
    after = names[names.index(cancelled) + 1]
    assert after == cancelled.replace("cancel_", "")
    assert_same(our, their)


# --
# Parts, with the same numbers put in

FASTAI_SCHEDULES = [
    ("sched_lin", fa_schedule.SchedLin),
    ("sched_cos", fa_schedule.SchedCos),
    ("sched_exp", fa_schedule.SchedExp),
    ("sched_no", fa_schedule.SchedNo),
]


@pytest.mark.parametrize(("name", "fastais"), FASTAI_SCHEDULES)
def test_schedules_are_fastais(name, fastais):
    sched = getattr(ours, name)
    for start, end in ((1e-3, 2.0), (np.array([1.0, 3.0]), np.array([0.5, 2.0]))):
        for pos in np.linspace(0, 1, 11).tolist():
            np.testing.assert_array_equal(sched(start, end)(pos), fastais(start, end)(pos))
            np.testing.assert_array_equal(sched(start, end, pos), fastais(start, end)(pos))


def test_the_power_schedule_is_fastais():
    for pos in np.linspace(0, 1, 11).tolist():
        assert ours.sched_poly(0.5, 3.0, 2.5)(pos) == fa_schedule.SchedPoly(0.5, 3.0, 2.5)(pos)


@pytest.mark.parametrize("pcts", [[1.0], [0.3, 0.7], [0.25, 0.5, 0.25], [0.1, 0.2, 0.3, 0.4]])
def test_schedules_are_combined_as_fastais_are(pcts):
    """At every edge, too, and at running sums that miss it by their rounding."""
    scheds = [ours.sched_cos(i + 1.0, i / 2) for i in range(len(pcts))]
    combined, fastais = ours.combine_scheds(pcts, scheds), fa_schedule.combine_scheds(pcts, scheds)
    sums = np.cumsum([0.0, *pcts]).tolist()
    for pos in [*np.linspace(0, 1, 41).tolist(), *sums, *np.cumsum([0.01] * 100).clip(0, 1).tolist()]:
        assert combined(pos) == fastais(pos), pos


def curves():
    """Rates and losses as a search for a rate gives them: falling, with a minimum, diverging, noisy."""
    lrs = torch.logspace(-7, 1, 90)
    x = torch.linspace(-3, 3, 90)
    noise = 0.05 * torch.randn(90, generator=torch.Generator().manual_seed(1))
    return {
        "valley": (lrs, 2 - torch.exp(-((x - 0.5) ** 2)) + torch.exp(4 * (x - 2))),
        "noisy": (lrs, 2 - torch.sigmoid(2 * x) + torch.exp(5 * (x - 2.3)) + noise),
        "falling": (lrs, -x),
        "rising": (lrs, x + 4),
        "steep end": (lrs, 2.0 - 0.3 * torch.relu(x) + 100 * torch.relu(x - 2.5)),
        "short": (lrs[:30], (x[:30] + 1.5) ** 2),
    }


@pytest.mark.parametrize("curve", curves())
@pytest.mark.parametrize("name", ["minimum", "steep", "valley", "slide"])
def test_suggestions_are_fastais(name, curve):
    lrs, losses = curves()[curve]
    ours_lr, our_point = getattr(ours, name)(lrs, losses, 100)
    their_lr, their_point = getattr(fa_schedule, name)(lrs, losses, 100)
    assert ours_lr == their_lr
    assert our_point == (float(their_point[0]), float(their_point[1]))


def test_a_search_for_a_rate_finds_what_fastai_finds(tmp_path):
    our, their = make_pair(fusedopt.Adam, path=tmp_path)
    names = ("minimum", "steep", "valley", "slide")
    found = our.lr_find(suggest_funcs=[getattr(ours, n) for n in names], show_plot=False)
    expected = their.lr_find(suggest_funcs=[getattr(fa_schedule, n) for n in names], show_plot=False)
    assert found._asdict() == expected._asdict()
    assert our.recorder.lrs == list(their.recorder.lrs) and len(our.recorder.lrs) > 50
    assert our.tracing.seen == their.tracing.seen
