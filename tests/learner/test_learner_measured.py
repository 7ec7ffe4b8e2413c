"""What is recorded where batches are cut short, and what is minimized where callbacks change the loss."""

import functools
import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusedopt
from fusedopt import learner as fl
from fusedopt.learner import Callback, CancelBatchException, Learner
from fusedopt.learner.callbacks import mixed_precision

with warnings.catch_warnings():
    # At import, fastai scripts a function (deprecated by torch) and sets an option that pandas has deprecated.
    warnings.simplefilter("ignore")
    import fastai.callback.all as fa
    import fastai.learner as theirs
    from fastai.data.core import DataLoaders

theirs.defaults.callbacks = [cb for cb in theirs.defaults.callbacks if cb is not fa.ProgressCallback]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning"),
]

BATCHES, SIZE = 4, 3


def data(seed, n=BATCHES * SIZE - 1):
    """The last batch has an item less."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, 3 * x.sum(1, keepdim=True) + torch.arange(float(n))[:, None])


def loaders():
    return DataLoader(data(1), SIZE), DataLoader(data(2), SIZE)


def make(cbs=None, lr=0.0, dls=None, **kwargs):
    torch.manual_seed(0)
    kwargs.setdefault("loss_func", nn.MSELoss())
    learn = Learner(dls or loaders(), kwargs.pop("model", None) or nn.Linear(2, 1), cbs=cbs, lr=lr, **kwargs)
    learn.logger = lambda *_: None
    return learn


def distance(pred, y):
    return (pred - y).abs().mean()


# --
# Batches that are cut short


class Cuts(Callback):
    """Cancels some batches of one part at an event."""

    def __init__(self, event_name, batches, training, order=0):
        self.event_name, self.batches, self.of_training, self.order = event_name, batches, training, order

    def __call__(self, event_name):
        mine = self.learn.training == self.of_training and self.learn.iter in self.batches
        if event_name == self.event_name and mine:
            raise CancelBatchException


def means(learn, part, batches):
    """Loss and metric over the items of these batches; the weights are those that stay."""
    items = [i for b in batches for i in range(b * SIZE, min((b + 1) * SIZE, len(learn.dls[part].dataset)))]
    x, y = learn.dls[part].dataset[items]
    with torch.no_grad():
        pred = learn.model(x)
    return [float(nn.functional.mse_loss(pred, y)), float(distance(pred, y))]


EARLY, LATE = (
    ["before_batch", "after_pred"],
    ["after_loss", "before_backward", "after_backward", "before_step"],
)


@pytest.mark.parametrize("event_name", [*EARLY, "after_loss"])
@pytest.mark.parametrize("cut", [[0], [BATCHES - 1], [1, 2], [0, 1, 3]])
@pytest.mark.parametrize("order", [0, 100])
def test_validation_is_of_the_batches_that_ran(event_name, cut, order):
    learn = make(Cuts(event_name, cut, training=False, order=order), metrics=distance)
    learn.fit(2)
    ran = range(BATCHES) if event_name in LATE else [b for b in range(BATCHES) if b not in cut]
    for row in (*(row[1:] for row in learn.recorder.values), learn.validate()):
        assert row == pytest.approx(means(learn, 1, ran))


@pytest.mark.parametrize("event_name", [*EARLY, *LATE])
@pytest.mark.parametrize("cut", [[0], [BATCHES - 1], [1, 2], [0, 1, 3]])
def test_training_is_of_the_batches_that_ran(event_name, cut):
    cbs = [Cuts(event_name, cut, training=True), fl.Recorder(train_metrics=True)]
    learn = make(cbs, default_cbs=False, metrics=distance)
    learn.add_cb(fl.TrainEval)
    learn.fit(2)
    ran = list(range(BATCHES)) if event_name in LATE else [b for b in range(BATCHES) if b not in cut]
    recorder = learn.recorder
    assert recorder.metric_names[1:3] == ["train_loss", "train_distance"]
    assert [row[1] for row in recorder.values] == pytest.approx([means(learn, 0, ran)[1]] * 2)
    smooth, n = 0.0, 0
    for b in ran * 2:
        smooth, n = 0.98 * smooth + 0.02 * means(learn, 0, [b])[0], n + 1
        assert float(recorder.losses[n - 1]) == pytest.approx(smooth / (1 - 0.98**n), rel=1e-5)
    assert len(recorder.losses) == len(recorder.lrs) == n and recorder.iters == [n // 2, n]
    assert learn.train_iter == 2 * BATCHES  # schedules go on


@pytest.mark.parametrize("training", [True, False])
def test_where_no_batch_ran_there_is_nan(training):
    learn = make(Cuts("before_batch", range(BATCHES), training), metrics=[distance, Strict])
    learn.fit(1)
    row, cut = learn.recorder.values[0], [0] if training else [1, 2, 3]
    assert [i for i, value in enumerate(row) if math.isnan(value)] == cut
    if not training:
        assert all(map(math.isnan, learn.validate()))


class Strict(fl.Metric):
    """Cannot be asked before there was a batch."""

    name = "strict"

    def reset(self):
        self.seen = []

    def accumulate(self, learn):
        self.seen.append(len(learn.xb[0]))

    @property
    def value(self):
        return sum(self.seen) / len(self.seen)


def test_a_metric_that_fails_says_so():
    class Broken(Strict):
        @property
        def value(self):
            return 1 / 0

    with pytest.raises(ZeroDivisionError):
        make(metrics=Broken).fit(1)


def test_a_metric_that_is_an_object_is_told_of_batches_that_ran():
    strict = Strict()
    make(Cuts("before_batch", [0], training=False), metrics=strict).fit(1)
    assert strict.seen == [SIZE, SIZE, SIZE - 1]


def test_a_callback_may_run_a_batch_itself():
    """It cancels what the loop would have done, with a loss that it has found."""

    class Own(Callback):
        def before_batch(self):
            self.learn.loss = torch.tensor(float(self.iter))
            raise CancelBatchException

    learn = make(Own)
    learn.fit(1)
    assert learn.recorder.values[0][1] == pytest.approx((0 + 3 * 1 + 3 * 2 + 2 * 3) / 11 + 0 * 3)


def test_accumulated_batches_count_as_in_fastai():
    found = []
    for module, base in ((fl, Callback), (fa, fa.Callback)):

        class Late(base):
            cancel = module.CancelBatchException

            def after_backward(self):
                if self.iter == 1:
                    raise self.cancel

        torch.manual_seed(0)
        dls, cbs = loaders(), [module.GradientAccumulation(2 * SIZE), Late()]
        options = dict(loss_func=nn.MSELoss(), opt_func=fusedopt.Adam, lr=0.01, metrics=distance, cbs=cbs)
        if module is fa:
            learn = theirs.Learner(DataLoaders(*dls, device="cpu"), nn.Linear(2, 1), **options)
        else:
            learn = Learner(dls, nn.Linear(2, 1), **options)
        with learn.no_logging():
            learn.fit(2)
        found.append(([list(row) for row in learn.recorder.values], list(learn.recorder.lrs)))
    assert found[0][0] == [pytest.approx(row, rel=1e-6) for row in found[1][0]]
    assert found[0][1] == found[1][1] and len(found[0][1]) == 2 * BATCHES


@pytest.mark.parametrize("cut", [[0], [0, 1, 2], range(BATCHES)])
def test_a_search_goes_on_without_the_batches_that_did_not_run(cut):
    learn = make(Cuts("before_batch", cut, training=True), lr=0.01)
    learn.lr_find(num_it=40, show_plot=False, suggest_funcs=None, stop_div=False)
    assert len(learn.recorder.losses) == len(learn.recorder.lrs) == 10 * (BATCHES - len(cut))


# --
# Losses that callbacks change


class Penalty(Callback):
    """As the first edition's regularizers: it knows no ``loss_grad``."""

    order = 1

    def __init__(self, factor=1.0, how="rebound", event_name="after_loss"):
        self.factor, self.how = factor, how
        setattr(self, event_name, self.add)

    def add(self):
        if not self.learn.training:
            return
        more = self.factor * sum(p.square().sum() for p in self.learn.model.parameters())
        if self.how == "rebound":
            self.learn.loss = self.learn.loss + more
        else:
            self.learn.loss += more


def penalized(pred, y, model, factor=1.0):
    return nn.functional.mse_loss(pred, y) + factor * sum(p.square().sum() for p in model.parameters())


def trained(cbs, factor=0.0, loss_func=None, **kwargs):
    """Weights and recorded losses of two epochs; with ``factor`` the penalty is in the loss function."""
    learn = make(cbs, lr=0.05, **kwargs)
    model = learn.model

    def loss(pred, y):
        return penalized(pred, y, model, factor if learn.training else 0.0)

    learn.loss_func = loss_func or loss
    learn.fit(2)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), learn.recorder.values


def assert_alike(a, b):
    torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-6)
    assert [x for row in a[1] for x in row] == pytest.approx([x for row in b[1] for x in row], rel=1e-4)


@pytest.mark.parametrize("how", ["rebound", "in place"])
@pytest.mark.parametrize("event_name", ["after_loss", "before_backward"])
def test_what_is_added_to_the_loss_is_minimized_and_recorded(how, event_name):
    found = trained([Penalty(1.0, how, event_name)])
    assert_alike(found, trained(None, 1.0))
    assert not torch.allclose(found[0], trained(None)[0], atol=1e-3)


@pytest.mark.parametrize("how", ["rebound", "in place"])
def test_two_may_add_and_a_third_may_scale(how):
    class Thirds(Callback):
        order = 2

        def after_loss(self):
            if self.training:
                self.learn.loss = self.learn.loss / 3

    def third(pred, y):
        return penalized(pred, y, learn.model, 3.0) / 3 if learn.training else nn.functional.mse_loss(pred, y)

    learn = make(lr=0.05)
    learn.loss_func = third
    learn.fit(2)
    expected = torch.cat([p.detach().flatten() for p in learn.model.parameters()]), learn.recorder.values
    second = type("Second", (Penalty,), {})
    assert_alike(trained([Penalty(1.0, how), second(2.0, how), Thirds]), expected)


@pytest.mark.parametrize("how", ["rebound", "in place"])
@pytest.mark.parametrize("order", [0, 20])
def test_it_goes_with_accumulation_before_and_after(how, order):
    """What is added before losses are divided is divided too, as it is if ``loss_grad`` is set."""

    class Today(Penalty):
        def add(self):
            before = self.learn.loss
            super().add()
            self.learn.loss_grad = self.learn.loss_grad + (self.learn.loss - before)

    of_old, of_today = Penalty(1.0, how), Today(1.0)
    of_old.order = of_today.order = order
    a = trained([of_old, fl.GradientAccumulation(2 * SIZE)])
    b = trained([of_today, fl.GradientAccumulation(2 * SIZE)])
    assert_alike(a, b)


def test_it_is_scaled_with_the_rest_in_mixed_precision(monkeypatch):
    monkeypatch.setattr(mixed_precision, "SLOW", set())
    found = trained([Penalty(100.0), fl.MixedPrecision(init_scale=1024.0)])
    torch.testing.assert_close(found[0], trained(None, 100.0)[0], rtol=0.05, atol=0.02)
    assert not torch.allclose(found[0], trained(None)[0], atol=0.05)


@pytest.mark.parametrize("first", ["loss", "loss_grad"])
def test_one_that_sets_both_is_taken_at_its_word(first):
    class Both(Callback):
        def after_loss(self):
            if not self.training:
                return
            grad = 2 * self.learn.loss_grad
            if first == "loss":
                self.learn.loss = grad * 10
            self.learn.loss_grad = grad
            if first == "loss_grad":
                self.learn.loss = grad * 10

    gradients, learn = [], None

    class Look(Callback):
        def after_backward(self):
            gradients.append(self.model.weight.grad.clone())

    for cbs in ([Look], [Look, Both]):
        learn = make(cbs)
        learn.fit(1)
    plain, both = gradients[:BATCHES], gradients[BATCHES:]
    assert all(torch.allclose(2 * a, b) for a, b in zip(plain, both, strict=True))
    assert float(learn.recorder.losses[0]) == pytest.approx(20 * means(learn, 0, [0])[0])


def test_after_one_that_sets_both_another_may_add():
    class Doubled(Callback):
        def after_loss(self):
            self.learn.loss_grad = self.learn.loss_grad * 2
            self.learn.loss = self.learn.loss_grad.clone()

    def doubled(pred, y):
        extra = penalized(pred, y, learn.model) - nn.functional.mse_loss(pred, y)
        return 2 * nn.functional.mse_loss(pred, y) + (extra if learn.training else 0)

    learn = make(lr=0.05)
    learn.loss_func = doubled
    learn.fit(2)
    expected = torch.cat([p.detach().flatten() for p in learn.model.parameters()]), learn.recorder.values
    assert_alike(trained([Doubled, Penalty()]), expected)


@pytest.mark.parametrize("shown", [lambda loss: loss.detach() * 2, lambda loss: torch.tensor(7.0)])
def test_a_loss_without_a_way_back_is_shown_only(shown):
    class Shows(Callback):
        def after_loss(self):
            self.learn.loss = shown(self.learn.loss)

    assert torch.equal(trained([Shows])[0], trained(None)[0])
    assert trained([Shows])[1] != trained(None)[1]


def test_another_loss_in_its_place_leaves_nothing_of_the_first():
    """Not even where the first cannot be differentiated."""

    class Instead(Callback):
        def after_loss(self):
            self.learn.loss = nn.functional.mse_loss(self.pred, self.y)

    def impossible(pred, y):
        return (pred - pred).sum().sqrt()  # 0 with an infinite derivative

    assert_alike(trained([Instead], loss_func=impossible), trained(None))


def test_a_loss_per_item_is_still_refused():
    class PerItem(Callback):
        def after_loss(self):
            self.learn.loss = (self.pred - self.y).square()

    with pytest.raises(ValueError, match="one number to train with"):
        make(PerItem).fit(1)


def test_regularized_recurrent_models_are_as_before():
    """`RNNRegularizer` adds to ``loss_grad`` alone: the loss that is recorded stays without."""

    class Three(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            return out, out[:, None].expand(-1, 2, -1), out[:, None]

    torch.manual_seed(0)
    make_cbs = functools.partial(fl.rnn_cbs, 2.0, 1.0)
    weights = []
    for cbs in (make_cbs()[1:], make_cbs()[1:2]):
        torch.manual_seed(0)
        learn = make(cbs, lr=0.05, model=Three(2, 1))
        learn.fit(1)
        weights.append(learn.model.weight.detach().clone())
        loss = learn.recorder.losses[0]
    assert not torch.equal(*weights) and math.isfinite(float(loss))


def test_writing_to_the_callback_itself_is_said():
    class Shadows(Callback):
        def after_loss(self):
            self.loss = self.loss * 2

    with pytest.warns(UserWarning, match=r"Shadows writes self\.loss.*self\.learn\.loss"):
        make(Shadows).fit(1)
