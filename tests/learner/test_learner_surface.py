"""What a Learner is asked besides training: messages, with blocks, single batches, the model's attributes, its repr."""

import contextlib
import copy
import functools
import math
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import fusedopt
from fusedopt import learner as fl
from fusedopt.learner import Callback

with warnings.catch_warnings():
    # At import, fastai scripts a function (deprecated by torch) and sets an option that pandas has deprecated.
    warnings.simplefilter("ignore")
    import fastai.callback.schedule  # noqa: F401  (adds fit_one_cycle and its kin to fastai's Learner)
    import fastai.learner as theirs
    from fastai import metrics as fastai_metrics
    from fastai.data.core import DataLoaders, Datasets
    from fastai.data.load import DataLoader as FastaiLoader
    from fastai.losses import CrossEntropyLossFlat
    from fastai.optimizer import OptimWrapper

# fastai gives a progress bar to every Learner that will be made, those of other test files as well.
theirs.defaults.callbacks = [cb for cb in theirs.defaults.callbacks if cb.__name__ != "ProgressCallback"]


pytestmark = pytest.mark.usefixtures("one_thread")


def points(n=20):
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x[:, 0] > x[:, 1]).long())


def loaders():
    return DataLoader(points(), 4), DataLoader(points(), 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.classes = nn.Linear(2, 4), nn.Linear(4, 2), 2

    def forward(self, x):
        return self.head(self.body(x).relu())


def make(quiet=True, **kwargs):
    torch.manual_seed(0)
    kwargs = dict(dls=loaders(), model=Net(), loss_func=nn.CrossEntropyLoss(), lr=0.1) | kwargs
    learn = fl.Learner(**kwargs)
    if quiet:
        learn.logger = lambda *_: None
    return learn


# --
# What is refused, and how


class NoLoader:
    """A dataset that inherits from nothing."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.ones(2), i % 2


class Stream(IterableDataset):
    def __iter__(self):
        return iter(points())


def adam():
    return fusedopt.Adam(nn.Linear(2, 2).parameters(), lr=0.1)


TO_WRAP = r"loader is data, a {}, and would give single items: .*torch.utils.data.DataLoader\(dataset"
REFUSED = {
    "a loss class": (
        dict(loss_func=nn.CrossEntropyLoss),
        r"the class CrossEntropyLoss.*give CrossEntropyLoss\(\)",
    ),
    "fastai's": (dict(loss_func=CrossEntropyLossFlat), r"give CrossEntropyLossFlat\(\)"),
    "part of one": (dict(loss_func=functools.partial(nn.NLLLoss, reduction="sum")), r"give NLLLoss\(\)"),
    "a loss's name": (dict(loss_func="mse"), "must be a function of predictions and targets.*not 'mse'"),
    "no loss": (dict(loss_func=None), "must be a function of predictions and targets.*not None"),
    "an optimizer": (
        dict(opt_func=adam()),
        r"is an optimizer \(Optimizer\).*lambda params, lr: opt, or set learn.opt",
    ),
    "torch's": (dict(opt_func=torch.optim.SGD(Net().parameters(), lr=0.1)), r"is an optimizer \(SGD\)"),
    "fastai's optimizer": (
        dict(opt_func=OptimWrapper(Net().parameters(), torch.optim.SGD, lr=0.1)),
        r"is an optimizer \(OptimWrapper\)",
    ),
    "an optimizer's name": (dict(opt_func="adam"), "must be what makes an optimizer.*not 'adam'"),
    "a model class": (dict(model=Net), r"the model is the class Net: give an instance, Net\(...\)"),
    "a model's name": (dict(model="net"), "must be a torch.nn.Module, not 'net'"),
    "a dataset": (dict(dls=(points(), loaders()[1])), "training " + TO_WRAP.format("TensorDataset")),
    "to validate": (dict(dls=(loaders()[0], points())), "validation " + TO_WRAP.format("TensorDataset")),
    "a part of one": (dict(dls=(Subset(points(), [0, 1]),) * 2), TO_WRAP.format("Subset")),
    "one of nobody's": (dict(dls=(NoLoader(),) * 2), TO_WRAP.format("NoLoader")),
    "one of fastai's": (dict(dls=(Datasets([1, 2], [[lambda i: i]]),) * 2), TO_WRAP.format("Datasets")),
    "a stream": (dict(dls=(Stream(),) * 2), "training loader has no length"),
    "tensors": (dict(dls=points().tensors), TO_WRAP.format("Tensor")),
    "a dataset for both": (dict(dls=points()), "dls must be two loaders, for training and validation"),
    "a tensor for both": (
        dict(dls=torch.zeros(4, 2)),
        "dls must be two loaders, for training and validation",
    ),
    "one loader": (dict(dls=loaders()[0]), "dls must be two loaders, for training and validation"),
    "none to validate": (
        dict(dls=(loaders()[0], None)),
        "validation loader is None: give one.*training loader once more.*CancelValidException",
    ),
    "none to train": (dict(dls=(None, loaders()[0])), "training loader is None"),
    "a loader class": (dict(dls=(DataLoader, DataLoader)), "the class DataLoader: give an instance"),
    "none by name": (dict(dls=SimpleNamespace(train=loaders()[0], valid=None)), "validation loader is None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused_at_once_with_a_remedy(case):
    kwargs, message = REFUSED[case]
    with pytest.raises(TypeError, match=message):
        make(**kwargs)


def test_a_dataset_is_refused_wherever_a_loader_is_asked_for():
    learn = make()
    calls = [learn.get_preds, learn.validate, functools.partial(fl.Interpretation.from_learner, learn)]
    for call in calls:
        with pytest.raises(TypeError, match="given " + TO_WRAP.format("TensorDataset")):
            call(dl=points())
        with pytest.raises(TypeError, match="given loader has no length"):
            call(dl=(batch for batch in loaders()[0]))
        with pytest.raises(ValueError, match="given loader has no batches"):
            call(dl=[])


def test_what_is_assigned_later_is_refused_by_the_fit():
    learn = make()
    learn.loss_func = nn.CrossEntropyLoss
    with pytest.raises(TypeError, match=r"give CrossEntropyLoss\(\)"):
        learn.fit(1)
    learn.loss_func, learn.opt_func = nn.CrossEntropyLoss(), adam()
    with pytest.raises(TypeError, match="is an optimizer"):
        learn.fit(1)
    assert learn.opt is None
    learn.opt_func = lambda params, lr: fusedopt.SGD(params, lr)
    learn.fit(1)


# --
# Misspelt events


def with_method(name, base=Callback):
    return type("Odd", (base,), {name: lambda self: None})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("after_bacth", "after_batch"),
        ("before_bach", "before_batch"),
        ("befor_fit", "before_fit"),
        ("afterbatch", "after_batch"),
        ("afterEpoch", "after_epoch"),
        ("After_Loss", "after_loss"),
        ("begin_bacth", "before_batch"),
        ("after_validation", "after_validate"),
        ("after_predictions", "after_pred"),
        ("after_cancel_valid", "after_cancel_validate"),
    ],
)
def test_a_misspelt_event_is_told_with_the_one_that_is_close(name, meant):
    with pytest.warns(RuntimeWarning, match=rf"no event calls Odd\.{name}: is it {meant}\?"):
        make(cbs=with_method(name))


def test_a_name_like_an_events_that_is_like_none_gets_the_list():
    with pytest.warns(
        RuntimeWarning, match=r"no event calls Odd.before_world_war: events are after_create, before_fit"
    ):
        make().fit(1, cbs=with_method("before_world_war")())


def test_functions_of_an_instance_and_of_a_base_are_looked_at_too():
    cb = Callback()
    cb.after_bacth = lambda: None
    with pytest.warns(RuntimeWarning, match="Callback.after_bacth"):
        make(cbs=cb)
    child = type("Child", (with_method("before_bacth"),), {})
    with pytest.warns(RuntimeWarning, match="Child.before_bacth"):
        make(cbs=child)


@pytest.mark.parametrize(
    "name", ["plot", "_after_bacth", "batch", "step", "after_batch", "begin_batch", "clean_up"]
)
def test_what_is_no_events_name_is_left_alone(name):
    make(cbs=with_method(name))


def test_who_hears_every_event_may_have_names_of_its_own():
    make(
        cbs=type("Own", (Callback,), {"__call__": lambda self, name: None, "after_bacth": lambda self: None})
    )


def test_shipped_callbacks_are_spelt_right():
    for name in fl.__all__:
        cls = getattr(fl, name)
        if isinstance(cls, type) and issubclass(cls, Callback):
            fl.checks.tell_misspelt(cls.__new__(cls))


def test_an_event_that_there_is_not_cannot_be_told():
    learn = make()
    with pytest.raises(ValueError, match="no event 'after_bacth': is it after_batch"):
        learn("after_bacth")
    with pytest.raises(ValueError, match="no event 'lunch': events are"):
        learn(["before_fit", "lunch"])


# --
# NaN


def nan_from(batch, epoch=0, training=True, value=math.nan):
    class Breaks(Callback):
        def after_loss(self):
            if self.training is training and self.epoch == epoch and self.iter >= batch:
                self.learn.loss = self.learn.loss.detach() * value  # weights stay what they are

    return Breaks


@pytest.mark.parametrize(
    ("cb", "message"),
    [
        (nan_from(0), "training loss is nan from batch 0 of epoch 0 on"),
        (nan_from(3), "training loss is nan from batch 3 of epoch 0 on"),
        (nan_from(2, epoch=1), "training loss is nan from batch 2 of epoch 1 on"),
        (nan_from(1, value=math.inf), "training loss is inf from batch 1 of epoch 0 on"),
        (nan_from(4, epoch=2, training=False), "validation loss is nan in epoch 2"),
    ],
)
def test_a_loss_that_is_nan_is_told_once_a_fit(cb, message):
    learn = make(cbs=cb)
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=message + r".*TerminateOnNaN") as told:
            learn.fit(3)
        assert len(told) == 1


def test_the_epoch_is_right_where_training_goes_on_or_is_cut_short():
    with pytest.warns(RuntimeWarning, match="batch 1 of epoch 3 on"):
        make(cbs=nan_from(1, epoch=3)).fit(4, start_epoch=2)

    def stop(error, at):
        class Stop(Callback):
            def after_batch(self):
                if self.training and self.epoch == 1 and self.iter == at:
                    raise error

        return Stop

    for error in (fl.CancelFitException, fl.CancelEpochException, fl.CancelTrainException):
        with pytest.warns(RuntimeWarning, match="batch 1 of epoch 1 on"):
            make(cbs=[nan_from(1, epoch=1), stop(error, at=3)]).fit(2)


def test_nothing_is_told_where_nan_is_no_surprise():
    make(cbs=[nan_from(1), fl.TerminateOnNaN]).fit(2)
    learn = make(cbs=nan_from(30, epoch=0))
    learn.lr_find(num_it=20, show_plot=False)
    make(cbs=nan_from(0, training=False)).validate()
    make(cbs=nan_from(1), default_cbs=False).fit(1)


# --
# Going on with a training


WAYS = {
    "fit": lambda learn, **kwargs: learn.fit(3, **kwargs),
    "one cycle": lambda learn, **kwargs: learn.fit_one_cycle(3, 0.05, **kwargs),
    "warm restarts": lambda learn, **kwargs: learn.fit_sgdr(2, 1, 0.05, **kwargs),
    "fine tune": lambda learn, **kwargs: learn.fine_tune(3, 0.05, freeze_epochs=2, **kwargs),
}


@pytest.mark.parametrize("start", [0, 1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_later_start_trains_as_fastais_does(way, start):
    our = make(splitter=lambda m: [list(m.body.parameters()), list(m.head.parameters())])
    dls = DataLoaders(*(FastaiLoader(points(), bs=4, num_workers=0) for _ in range(2)), device="cpu")
    torch.manual_seed(0)
    their = theirs.Learner(
        dls, Net(), nn.CrossEntropyLoss(), opt_func=fusedopt.Adam, lr=0.1, splitter=our.splitter
    )
    their.logger = our.logger
    for learn in (our, their):
        WAYS[way](learn, start_epoch=start)
    assert our.recorder.lrs == list(their.recorder.lrs)
    assert [float(x) for x in our.recorder.losses] == [float(x) for x in their.recorder.losses]
    assert our.recorder.values == [list(row) for row in their.recorder.values if len(row)]
    for a, b in zip(our.model.parameters(), their.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_flat_schedule_goes_on_where_it_was():
    """(fastai takes its start_epoch and forgets it.)"""
    whole, later = make(), make()
    whole.fit_flat_cos(3, 0.05)
    later.fit_flat_cos(3, 0.05, start_epoch=2)
    assert later.recorder.lrs == pytest.approx(whole.recorder.lrs[10:])


def test_epochs_that_count_as_done_are_silent():
    lines = []
    learn = make(cbs=fl.Tracker("valid_loss"))
    learn.logger = lines.append
    learn.fit(3, start_epoch=1)
    assert [line[0] for line in lines] == ["epoch", 1, 2] and len(learn.recorder.values) == 2
    learn.fit(1)
    assert len(learn.recorder.values) == 1, "the next fit begins at the beginning"
    with pytest.raises(ValueError, match=r"start_epoch is the number of the first epoch to train.*not -1"):
        learn.fit(1, start_epoch=-1)


def test_a_resumed_training_is_the_one_that_was_not_interrupted(tmp_path):
    whole, parts = make(path=tmp_path), make(path=tmp_path)
    whole.fit_one_cycle(4, 0.05)

    class Stop(Callback):
        def before_epoch(self):
            if self.epoch == 2:
                raise fl.CancelFitException

    parts.fit_one_cycle(4, 0.05, cbs=Stop)
    parts.save("half")
    again = make(path=tmp_path).load("half")
    again.fit_one_cycle(4, 0.05, start_epoch=2)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


# --
# With blocks


@pytest.mark.parametrize(
    ("given", "gone"),
    [
        (lambda learn: learn.second, ["second"]),
        (lambda learn: [learn.second, fl.TerminateOnNaN], ["second", "terminate_on_na_n"]),
        (lambda learn: (fl.Recorder,), ["recorder"]),
        (lambda learn: Callback, ["train_eval", "recorder", "second", "callback", "terminate_on_na_n"]),
        (lambda learn: [], []),
        (lambda learn: None, []),
        (lambda learn: fl.EMA(), []),  # which it has not
    ],
)
@pytest.mark.parametrize("error", [None, RuntimeError])
def test_callbacks_are_away_for_a_while_and_come_back_to_their_places(given, gone, error):
    learn = make(cbs=[type("Second", (Callback,), {})(), Callback(), fl.TerminateOnNaN])
    before, away = list(learn.cbs), [getattr(learn, name) for name in gone]
    with pytest.raises(error) if error else contextlib.nullcontext(), learn.removed_cbs(given(learn)) as same:
        assert same is learn and learn.cbs == [cb for cb in before if cb not in away]
        assert all(cb.learn is None for cb in away) and not any(hasattr(learn, name) for name in gone)
        if error:
            raise error
    assert learn.cbs == before and all(cb.learn is learn for cb in before)
    assert [getattr(learn, name) for name in gone] == away


def test_what_is_away_is_not_called():
    calls = []
    counts = type("Counts", (Callback,), {"after_batch": lambda self: calls.append(1)})()
    learn = make(cbs=counts)
    with learn.removed_cbs(counts):
        learn.fit(1)
    assert calls == []
    learn.fit(1)
    assert len(calls) == 10


def test_a_call_with_callbacks_adds_them_for_a_while():
    learn = make()
    for given in ([fl.TerminateOnNaN()], fl.TerminateOnNaN, [Callback(), fl.EMA()]):
        with learn(given) as same:
            assert same is learn and len(learn.cbs) == (
                4 if isinstance(given, list) and len(given) == 2 else 3
            )
        assert len(learn.cbs) == 2


def test_a_call_with_events_tells_them_in_order():
    heard = []
    learn = make(cbs=type("Hears", (Callback,), {"__call__": lambda self, name: heard.append(name)}))
    assert learn(["before_fit", "before_epoch"]) is None and learn("after_epoch") is None
    assert heard == ["after_create", "before_fit", "before_epoch", "after_epoch"]


def test_no_bar(capsys):
    learn = make(quiet=False, cbs=fl.Progress)
    progress = learn.progress
    with learn.no_bar() as same:
        assert same is learn and not hasattr(learn, "progress")
        learn.fit(1)
    out, err = capsys.readouterr()
    assert err == "" and len(out.splitlines()) == 2
    learn.fit(1)
    assert learn.progress is progress and "train" in capsys.readouterr().err
    with make().no_bar():
        pass


# --
# One batch


def events_of(call, learn):
    heard = []

    class Hears(Callback):
        def __call__(self, name):
            heard.append(name)

    with learn.added_cbs(Hears):
        call()
    return " ".join(heard)


EVALUATED = "before_batch after_pred after_loss after_batch"
TRAINED = (
    "before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch"
)


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_alone(training):
    learn, batch = make(), next(iter(loaders()[0]))
    learn.training = training
    before = [p.clone() for p in learn.model.parameters()]
    heard = events_of(lambda: learn.one_batch(7, batch), learn)
    assert heard == f"before_fit before_epoch {TRAINED if training else EVALUATED} after_epoch after_fit"
    assert learn.iter == 7 and torch.equal(learn.xb[0], batch[0]) and torch.equal(learn.yb[0], batch[1])
    assert learn.loss.item() == pytest.approx(nn.functional.cross_entropy(learn.pred, batch[1]).item())
    moved = [not torch.equal(a, b) for a, b in zip(before, learn.model.parameters(), strict=True)]
    assert all(moved) if training else not any(moved)
    learn.training = False
    learn.fit(1)
    assert len(learn.recorder.losses) == 5


def test_batches_within_the_events_of_a_fit():
    learn, batches = make(), list(loaders()[0])
    learn.training = True

    def run():
        with learn as same:
            assert same is learn
            for i, batch in enumerate(batches[:2]):
                learn.one_batch(i, batch)

    assert events_of(run, learn) == f"before_fit before_epoch {TRAINED} {TRAINED} after_epoch after_fit"


SHIPPED = [
    *(
        fl.Progress,
        fl.CSVLogger,
        fl.EMA,
        fl.SaveModel,
        fl.EarlyStopping,
        fl.ReduceLROnPlateau,
        fl.TerminateOnNaN,
    ),
    *(fl.GradientClip, fl.Mixup, fl.DeviceCallback, fl.ActivationStats, lambda: fl.MixedPrecision("bf16")),
    *(lambda: fl.GradientAccumulation(8), lambda: fl.ParamScheduler({"lr": fl.sched_lin(0.1, 0)})),
]


@pytest.mark.parametrize("callback", SHIPPED)
def test_shipped_callbacks_bear_a_batch_alone(callback, tmp_path):
    learn, batch = make(cbs=callback(), path=tmp_path), next(iter(loaders()[0]))
    for fitted in (False, True):
        for learn.training in (True, False):
            learn.one_batch(0, batch)
            with learn:
                learn.one_batch(1, batch)
        assert not learn.inferring and all(cb.run for cb in learn.cbs)
        if not fitted:
            learn.fit(2)
            rows = list(learn.recorder.values)
    assert learn.recorder.values == rows and len(rows) == 2


def test_the_loop_goes_by_batches_that_can_be_taken_over():
    class Twice(fl.Learner):
        def one_batch(self, i, batch):
            super().one_batch(i, batch)
            super().one_batch(i, batch)

    torch.manual_seed(0)
    learn = Twice(loaders(), Net(), nn.CrossEntropyLoss())
    with learn.no_logging():
        learn.fit(1)
    assert len(learn.recorder.losses) == 10


def test_a_batch_that_fails_leaves_no_hooks_behind():
    class Cleans(Callback):
        cleaned = 0

        def clean_up(self):
            self.cleaned += 1

    learn = make(cbs=Cleans)
    with pytest.raises(RuntimeError):
        learn.one_batch(0, (torch.zeros(4, 3), torch.zeros(4).long()))
    assert learn.cleans.cleaned == 1
    learn.fit(1)


# --
# The model's attributes


def test_the_models_attributes_are_the_learners():
    learn = make()
    assert learn.head is learn.model.head and learn.classes == 2
    assert next(iter(learn.parameters())) is learn.model.body.weight
    assert {"head", "fit", "parameters"} <= set(dir(learn))
    learn.model = nn.Flatten()
    assert not hasattr(learn, "head")


def test_the_learners_own_come_first():
    model = Net()
    model.lr, model.fit, model.recorder, model.metrics = 7, 7, nn.Linear(1, 1), 7
    learn = make(model=model)
    assert learn.lr == 0.1 and callable(learn.fit) and isinstance(learn.recorder, fl.Recorder)
    assert learn.metrics == [] and learn.remove_cb(fl.Recorder).recorder is model.recorder
    learn.fit(1)


@pytest.mark.parametrize(
    "name", ["nothing", "_modules", "_parameters", "__array__", "__setstate__x", "_repr_html_"]
)
def test_neither_has_it(name):
    learn = make()
    assert not hasattr(learn, name)
    with pytest.raises(AttributeError, match=f"the Learner has no attribute '{name}', and its model, a Net"):
        getattr(learn, name)


def test_a_callback_may_be_called_as_a_part_of_the_model():
    class Head(Callback):
        pass

    learn = make(cbs=Head)
    assert isinstance(learn.head, Head)
    with learn.removed_cbs(Head):
        assert learn.head is learn.model.head


def test_copies_and_pickles_have_attributes_of_their_own_model():
    learn = make(loss_func=nn.functional.cross_entropy)
    learn.logger = print
    learn.fit(1)
    for other in (copy.deepcopy(learn), pickle.loads(pickle.dumps(learn)), copy.copy(learn)):
        assert other.head is other.model.head and torch.equal(other.head.weight, learn.head.weight)
        assert repr(other) == repr(learn)
    empty = fl.Learner.__new__(fl.Learner)
    with pytest.raises(AttributeError, match=r"the Learner has no attribute 'model'$"):
        empty.model  # noqa: B018


# --
# Loaders, the line that describes it


def test_loaders_in_one_object():
    train, valid = loaders()
    dls = fl.DataLoaders(train, valid, path="somewhere", vocab=["no", "yes"])
    assert (dls.train, dls.valid, dls[0], dls[1], len(dls)) == (train, valid, train, valid, 2)
    assert dls.train_ds is train.dataset and dls.valid_ds is valid.dataset
    assert repr(dls) == "DataLoaders(5 batches, 5 batches)" and not hasattr(dls, "n_inp")
    learn = make(dls=dls)
    learn.fit(1)
    assert str(learn.path) == "somewhere" and fl.Interpretation.from_learner(learn).vocab == ["no", "yes"]
    assert str(make(dls=dls, path="else").path) == "else"
    assert (
        len(make(dls=fl.DataLoaders(train, valid, n_inp=2, path=".")).get_preds(dl=[(torch.ones(1, 2),)]))
        == 2
    )


def test_loaders_of_datasets():
    dls = fl.DataLoaders.from_dsets(points(22), points(10), bs=4, num_workers=0)
    assert [len(dl) for dl in dls] == [5, 3] and [dl.drop_last for dl in dls] == [True, False]
    x = torch.cat([x for x, _ in dls.train])
    assert not torch.equal(x, points(22).tensors[0][:20]), "it shuffles"
    make(dls=dls).fit(1)


def test_whatever_has_loaders_by_name():
    train, valid = loaders()
    learn = make(dls=SimpleNamespace(train=train, valid=valid, vocab=["a", "b"]))
    learn.fit(1)
    assert learn.dls.train is train and learn.dls[1] is valid and learn.dls.vocab == ["a", "b"]


def test_a_learner_says_what_it_is():
    learn = make(metrics=[fl.accuracy, fl.error_rate], cbs=fl.TerminateOnNaN)
    assert repr(learn) == (
        "Learner(Net, CrossEntropyLoss(), Adam, lr=0.1, metrics: accuracy, error_rate, "
        "cbs: TrainEval, Recorder, TerminateOnNaN)"
    )
    other = make(
        loss_func=nn.functional.cross_entropy,
        opt_func=functools.partial(fusedopt.SGD, mom=0.9),
        default_cbs=False,
        model=lambda x: x,
    )
    assert repr(other) == "Learner(function, cross_entropy, SGD, lr=0.1, cbs: none)"
    assert "FlattenedLoss of CrossEntropyLoss()" in repr(make(loss_func=CrossEntropyLossFlat()))


def test_metrics_of_fastais_can_be_handed_over():
    given = [fastai_metrics.error_rate, fastai_metrics.F1Score(), fastai_metrics.Perplexity()]
    learn = make(metrics=[*given, theirs.AvgMetric(fastai_metrics.accuracy)])
    learn.fit(1)
    measured = learn.final_record[1:]
    preds, y = learn.get_preds()
    wrong, (both, found, true) = (
        (preds.argmax(1) != y),
        (
            (preds.argmax(1) * y).sum(),
            preds.argmax(1).sum(),
            y.sum(),
        ),
    )
    loss = nn.functional.cross_entropy(preds, y)
    expected = [loss, wrong.float().mean(), 2 * both / (found + true), loss.exp(), (~wrong).float().mean()]
    assert measured == pytest.approx([float(x) for x in expected], rel=1e-5)
