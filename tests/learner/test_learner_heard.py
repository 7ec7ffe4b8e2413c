"""What callbacks are made of, what they read, and who is heard, or refused by name."""

import copy
import functools
import pickle
import warnings
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusedopt
from fusedopt import learner as fl
from fusedopt.learner import Callback, Learner
from fusedopt.learner.events import FIRST_EDITION, OF_2019

with warnings.catch_warnings():
    # At import, fastai scripts a function (deprecated by torch) and sets an option that pandas has deprecated.
    warnings.simplefilter("ignore")
    import fastai.callback.all as fa
    import fastai.learner as theirs
    from fastai.data.core import DataLoaders
    from fastcore.foundation import L

theirs.defaults.callbacks = [cb for cb in theirs.defaults.callbacks if cb is not fa.ProgressCallback]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning"),
]


def loaders(inputs=1, targets=1):
    """Three batches of four to train with, two to validate."""
    parts = [torch.randn(20, 2) for _ in range(inputs)] + [torch.randn(20, 1) for _ in range(targets)]
    dls = [DataLoader(TensorDataset(*(p[:n] for p in parts)), 4) for n in (12, 8)]
    dls[0].n_inp = inputs
    return dls


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, *xs):
        return self.layer(sum(xs))


def loss(pred, *ys):
    return sum((pred - y).square().mean() for y in ys) if ys else pred.mean()


def make(cbs=None, dls=None, **kwargs):
    torch.manual_seed(0)
    learn = Learner(dls or loaders(), Sum(), loss, cbs=cbs, **kwargs)
    learn.logger = lambda *_: None
    return learn


# --
# What callbacks read


class Pair(list):
    def __init__(self, dls, n_inp):
        super().__init__(dls)
        self.n_inp = n_inp


@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("targets", [0, 1, 2])
def test_input_and_target_by_themselves(inputs, targets):
    seen = []

    class Look(Callback):
        def before_batch(self):
            assert self.x is (self.xb[0] if inputs == 1 else self.xb)
            assert self.y is (None if targets == 0 else self.yb[0] if targets == 1 else self.yb)
            seen.append(self.training)

    learn = make(Look, Pair(loaders(inputs, targets), inputs))
    learn.fit(1)
    assert seen == [True] * 3 + [False] * 2
    assert learn.x is None and learn.y is None


CHAPTER_16 = {
    "before_fit": "learn model data dls loss_func opt opt_func cbs n_epoch epoch train_iter pct_train",
    "before_batch": "dl x xb y yb n_iter iter training",
    "after_pred": "pred",
    "after_loss": "loss loss_grad",
    "after_batch": "smooth_loss",
}


class Reads:
    """Reads what the chapter lists, at the first time that it is there."""

    order = 60

    def __init__(self):
        self.read = {}

    def __call__(self, event_name):
        for name in CHAPTER_16.get(event_name, "").split():
            if name not in self.read and (
                name != "data" or isinstance(self, Callback)
            ):  # fastai has it no longer
                self.read[name] = getattr(self, name)


def plain(value):
    if isinstance(value, (tuple, list)):
        return [plain(x) for x in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def test_all_that_chapter_16_lists_is_there_and_as_fastais():
    torch.manual_seed(0)
    dls, ours, their = (
        loaders(),
        type("Reads", (Reads, Callback), {})(),
        type("Reads", (Reads, fa.Callback), {})(),
    )
    learn = make(ours, dls, lr=0.01)
    learn.fit(1)
    assert ours.read.keys() == set(" ".join(CHAPTER_16.values()).split())
    for name in ("learn", "model", "dls", "loss_func", "opt", "opt_func", "cbs"):
        assert ours.read[name] is (learn if name == "learn" else getattr(learn, name))
    assert ours.read["data"] is learn.dls and ours.read["dl"] is dls[0]
    torch.manual_seed(0)
    options = dict(cbs=their, lr=0.01, opt_func=fusedopt.Adam)
    fastais = theirs.Learner(DataLoaders(*dls, device="cpu"), Sum(), loss, **options)
    with fastais.no_logging():
        fastais.fit(1)
    numbers = [
        "n_epoch",
        "epoch",
        "train_iter",
        "pct_train",
        "n_iter",
        "iter",
        "training",
        "loss",
        "loss_grad",
    ]
    for name in [*numbers, "x", "xb", "y", "yb", "pred"]:
        assert plain(ours.read[name]) == plain(their.read[name]), name
    assert float(ours.read["smooth_loss"]) == float(their.read["smooth_loss"])


def test_a_callback_cannot_take_the_names():
    for name in ("X", "Y", "Data"):
        with pytest.raises(ValueError, match="would be lost"):
            make(type(name, (Callback,), {}))


# --
# Functions for events

CALLS = []


def counted(cb=None):
    CALLS.append(cb)


def told(cb):
    CALLS.append(cb)


class Counter:
    def count(self):
        CALLS.append(self)


FUNCTIONS = {
    "without argument": (lambda: CALLS.append(None), False),
    "with a default": (counted, False),
    "with the callback": (told, True),
    "a partial": (functools.partial(CALLS.append, None), False),
    "a partial that is short of one": (functools.partial(told), True),
    "a bound method": (Counter().count, False),
    "any arguments": (lambda *args: CALLS.append(*args or [None]), False),
    "a mock": (Mock(side_effect=lambda: CALLS.append(None)), False),
}


@pytest.mark.parametrize("way", ["assigned", "constructed", "assigned later", "assigned in a fit"])
@pytest.mark.parametrize("what", FUNCTIONS)
@pytest.mark.parametrize("event_name", ["after_batch", "after_loss", "before_epoch", "begin_batch"])
def test_functions_are_called(way, what, event_name):
    function, with_callback = FUNCTIONS[what]
    CALLS.clear()
    cb = Callback(**{event_name: function}) if way == "constructed" else Callback()
    if way == "assigned":
        setattr(cb, event_name, function)
    learn = make(cb)
    if way == "assigned later":
        learn.fit(1)
        setattr(cb, event_name, function)
    if way == "assigned in a fit":
        cb.before_fit = lambda: setattr(cb, event_name, function)
    learn.fit(2)
    assert len(CALLS) == (2 if event_name == "before_epoch" else 10)
    assert not with_callback or all(called is cb for called in CALLS)


def test_a_function_that_comes_in_the_middle_of_a_fit_is_called():
    calls = []

    class Late(Callback):
        def after_batch(self):
            if self.training and self.iter == 1 and self.epoch == 1:
                self.after_pred = lambda: calls.append((self.epoch, self.iter))

    make(Late).fit(2)
    assert calls == [(1, 2), (1, 0), (1, 1)]


def test_a_function_goes_before_the_classs_and_none_silences_it():
    class Counts(Callback):
        n = 0

        def after_batch(self):
            self.n += 1

    learn = make(Counts)
    learn.fit(1)
    learn.counts.after_batch = lambda: CALLS.append(None)
    CALLS.clear()
    learn.fit(1)
    assert (learn.counts.n, len(CALLS)) == (5, 5)
    learn.counts.after_batch = None
    learn.validate()
    assert (learn.counts.n, len(CALLS)) == (5, 5)
    del learn.counts.after_batch
    learn.validate()
    assert (learn.counts.n, len(CALLS)) == (7, 5)


@pytest.mark.parametrize("kind", [staticmethod, classmethod, functools.partial])
def test_functions_of_a_class_need_not_be_methods(kind):
    CALLS.clear()
    make(type("Odd", (Callback,), {"after_fit": kind(counted)})).fit(1)
    assert len(CALLS) == 1


def test_functions_are_for_training_or_validation_as_methods_are():
    calls = []
    cb = Callback(after_batch=lambda: calls.append(1))
    cb.run_valid = False
    make(cb).fit(1)
    assert len(calls) == 3


def test_functions_cancel_and_their_errors_name_the_event():
    def stop():
        raise fl.CancelFitException

    learn = make(Callback(after_batch=stop))
    learn.fit(3)
    assert learn.train_iter == 1
    with pytest.raises(ZeroDivisionError) as raised:
        make(Callback(after_pred=lambda: 1 / 0)).fit(1)
    assert "in the callback Callback, at the event after_pred" in str(
        getattr(raised.value, "__notes__", raised.value)
    )


def test_the_constructor_of_fastai_takes_the_same():
    calls = []
    fa.Callback(after_fit=lambda self: calls.append(type(self)))("after_fit")
    cb = Callback(after_fit=lambda self: calls.append(type(self)))
    cb("after_fit")
    assert calls == [fa.Callback, Callback]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cb: pickle.loads(pickle.dumps(cb))])
def test_callbacks_of_functions_are_copied(copied):
    CALLS.clear()
    cb = copied(Callback(after_batch=told, after_fit=functools.partial(told, 3)))
    make(cb).fit(1)
    assert CALLS[:5] == [cb] * 5 and CALLS[5:] == [3]


def test_what_is_no_event_or_no_function_is_refused():
    with pytest.raises(
        TypeError, match=r"Callback got 'after_bacth', which is no event; 'after_batch' is one"
    ):
        Callback(after_bacth=counted)
    with pytest.raises(TypeError, match="got 'run_valid', which is no event"):
        Callback(run_valid=False)
    with pytest.raises(TypeError, match="'after_batch' of Callback must be a function, not 3"):
        Callback(after_batch=3)
    cb = Callback()
    with pytest.raises(TypeError, match="must be a function"):
        cb.before_fit = "print"
    assert "before_fit" not in vars(cb)


# --
# Older callbacks


@pytest.mark.parametrize("old", OF_2019)
def test_callbacks_of_another_time_are_refused_by_name(old):
    before = make()
    for cb in (type("Old", (Callback,), {old: told}), Callback()):
        if isinstance(cb, Callback):
            setattr(cb, old, told)
        with pytest.raises(TypeError, match=rf"has '{old}', .* say {OF_2019[old].split(',')[0]}"):
            before.add_cb(cb)
    assert len(before.cbs) == 2 and not hasattr(before, "old")


@pytest.mark.parametrize("name", FIRST_EDITION)
def test_every_name_of_the_first_edition_is_heard_as_todays(name):
    heard = [0, 0]
    for i, called in enumerate((name, FIRST_EDITION[name])):

        def count(self, i=i):
            heard[i] += 1

        make(type("Of", (Callback,), {called: count})).fit(2)
    assert heard[0] == heard[1] > 0


def test_an_event_under_both_names_is_refused():
    class Schedule(fl.ParamScheduler):
        def begin_batch(self):
            pass

    with pytest.raises(TypeError, match="has both 'before_batch' and 'begin_batch'"):
        make(Schedule({"lr": fl.sched_lin(0.1, 0.0)}))
    for names in (("before_fit", "begin_fit"), ("begin_fit", "before_fit")):
        with pytest.raises(TypeError, match="both 'before_fit' and 'begin_fit'"):
            Callback(**dict.fromkeys(names, told))
    schedule = fl.ParamScheduler({"lr": fl.sched_lin(0.1, 0.0)})
    make(schedule)
    with pytest.raises(TypeError, match="both 'before_batch' and 'begin_batch'"):
        schedule.begin_batch = told
    schedule.begin_batch = None  # which nobody would miss


def test_a_callback_may_be_something_else_besides():
    class Both(Callback, nn.Module):
        def after_create(self):
            self.layer = nn.Linear(1, 1)

    assert len(list(make(Both).both.parameters())) == 2


def test_a_callback_of_the_first_edition_acts_in_whole():
    """As in the course: it sets rates, adds to the loss, and ends the training."""

    class Old(Callback):
        def begin_fit(self):
            self.lrs = []

        def begin_batch(self):
            if self.training:
                self.opt.set_hyper("lr", 0.1 / (1 + self.iter))

        def after_loss(self):
            if self.training:
                self.learn.loss += 10 * self.model.layer.weight.square().sum()

        def after_backward(self):
            self.lrs.append(self.opt.hypers[-1]["lr"])

        def begin_validate(self):
            raise fl.CancelFitException

    torch.manual_seed(1)
    dls = loaders()
    learn, plain = make(Old, dls), make(Callback(begin_batch=Old.begin_batch), dls)
    plain.loss_func = lambda pred, y: loss(pred, y) + 10 * plain.model.layer.weight.square().sum()
    for each in (learn, plain):
        each.fit(1)
    assert learn.old.lrs == pytest.approx([0.1, 0.05, 0.1 / 3]) and learn.recorder.values == []
    torch.testing.assert_close(learn.model.layer.weight, plain.model.layer.weight)


# --
# Lists

LISTS = {
    "a list of fastcore's": L,
    "a tuple": lambda *items: items,
    "a set": lambda *items: set(items),
    "a generator": lambda *items: (item for item in items),
    "values of a dict": lambda *items: dict(enumerate(items)).values(),
    "an iterator": lambda *items: iter(items),
}


@pytest.mark.parametrize("kind", LISTS)
def test_several_come_in_whatever_is_iterable(kind):
    listed = LISTS[kind]
    clip, stop = fl.GradientClip(), fl.TerminateOnNaN
    learn = make(listed(clip, stop), metrics=listed(loss, fl.AvgLoss))
    assert {type(cb) for cb in learn.cbs} == {fl.TrainEval, fl.Recorder, fl.GradientClip, fl.TerminateOnNaN}
    assert sorted(m.name for m in learn.metrics) == ["loss", "loss"]
    learn.remove_cbs(listed(clip, stop))
    assert len(learn.cbs) == 2
    learn.add_cbs(listed(clip))
    with learn.added_cbs(listed(fl.TerminateOnNaN())):
        assert len(learn.cbs) == 4
    learn.fit(1, cbs=listed(fl.TerminateOnNaN(), fl.GradientAccumulation(4)))
    learn.fit_one_cycle(1, cbs=listed(fl.TerminateOnNaN()))
    learn.get_preds(cbs=listed(fl.TerminateOnNaN()))
    assert [type(cb) for cb in learn.cbs] == [fl.TrainEval, fl.Recorder, fl.GradientClip]


@pytest.mark.parametrize("none", [None, L(), [], ()])
def test_nothing_is_none(none):
    learn = make(none, metrics=none)
    learn.fit(1, cbs=none)
    assert len(learn.cbs) == 2 and learn.metrics == []


def test_one_is_one():
    learn = make(fl.TerminateOnNaN(), metrics=functools.partial(loss))
    assert len(learn.cbs) == 3 and len(learn.metrics) == 1
    for wrong in ("progress", {"a": fl.TerminateOnNaN()}, L(3)):
        with pytest.raises(TypeError, match="is no callback"):
            make(wrong)


# --
# Freezing


def blocks(model):
    return [list(layer.parameters()) for layer in model if list(layer.parameters())]


def frozen_learner(first=None, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(first or nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    learn = Learner(loaders(), model, loss, **kwargs)
    learn.logger = lambda *_: None
    return learn


def test_a_freeze_of_one_group_says_that_it_freezes_nothing():
    learn = frozen_learner()
    with pytest.warns(
        UserWarning, match="freezes nothing: there is one group of parameters: .*splitter"
    ) as said:
        learn.freeze()
    assert said[0].filename == __file__
    assert all(p.requires_grad for p in learn.model.parameters())
    with pytest.warns(UserWarning, match="freezes nothing"):
        learn.fine_tune(1)


@pytest.mark.parametrize("n", [-2, -3])
def test_a_freeze_before_the_first_group_says_so(n):
    learn = frozen_learner(splitter=blocks)
    with pytest.warns(UserWarning, match=rf"freeze_to\({n}\) freezes nothing: there are 2 groups"):
        learn.freeze_to(n)


def test_a_freeze_of_layers_that_go_on_training_says_so():
    with pytest.warns(UserWarning, match="first 1 of 2 groups hold nothing but layers that train_bn keeps"):
        frozen_learner(nn.BatchNorm1d(2), splitter=blocks).freeze()
    frozen_learner(nn.BatchNorm1d(2), splitter=blocks, train_bn=False).freeze()


def test_a_freeze_that_freezes_is_silent():
    learn = frozen_learner(splitter=blocks)
    learn.freeze()
    assert [p.requires_grad for p in learn.model.parameters()] == [False, False, True, True]
    learn.freeze_to(1)
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())
    learn.fine_tune(1)
    frozen_learner().unfreeze()
