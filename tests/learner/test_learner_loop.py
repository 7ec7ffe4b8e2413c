"""The loop and its callbacks: who is told what in which order, and what happens when something is wrong."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedopt
from fusedopt import learner as fl
from fusedopt.learner import Callback, Learner, event
from fusedopt.learner.events import EVENTS

pytestmark = pytest.mark.usefixtures("one_thread")


def batches(n=3):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, generator=generator), torch.arange(4) % 2) for _ in range(n)]


def make_learner(cbs=None, model=None, loss_func=nn.functional.cross_entropy, dls=None, **kwargs):
    torch.manual_seed(0)
    model = nn.Linear(3, 2) if model is None else model
    learn = Learner(dls or [batches(), batches(2)], model, loss_func, cbs=cbs, **kwargs)
    learn.logger = lambda *_: None
    return learn


class Seeing(Callback):
    """Lesson 10's way to see everything."""

    order = 100

    def __init__(self):
        self.seen = []

    def __call__(self, event_name):
        self.seen.append(event_name)


# --
# Events


def test_events_complete_to_the_list():
    assert [name for name in dir(event) if not name.startswith("_")] == sorted(EVENTS)
    assert event.before_fit == "before_fit"


def test_every_event_is_seen_by_who_overrides_call():
    learn = make_learner(Seeing)
    learn.fit(1)
    train = (
        "before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch"
    )
    valid = "before_batch after_pred after_loss after_batch"
    assert learn.seeing.seen == [
        "after_create",
        *["before_fit", "before_epoch", "before_train"],
        *train.split() * 3,
        *["after_train", "before_validate"],
        *valid.split() * 2,
        *["after_validate", "after_epoch", "after_fit"],
    ]


def test_first_edition_names_are_called():
    called = []
    old = ["begin_fit", "begin_epoch", "begin_batch", "begin_validate", "after_loss"]
    methods = {name: (lambda self, name=name: called.append(name)) for name in old}
    make_learner(type("Old", (Callback,), methods)).fit(1)
    once = ["begin_fit", "begin_epoch", *["begin_batch", "after_loss"] * 3]
    assert called == [*once, "begin_validate", *["begin_batch", "after_loss"] * 2]


def test_reads_fall_through_to_the_learner_and_writes_do_not():
    class Writes(Callback):
        def before_fit(self):
            assert self.n_epoch == 1 and self.model is self.learn.model
            self.n_epoch = 7

    learn = make_learner(Writes)
    learn.fit(1)
    assert (learn.n_epoch, learn.writes.n_epoch) == (1, 7)
    with pytest.raises(AttributeError, match="no_such_thing"):
        learn.writes.no_such_thing  # noqa: B018


@pytest.mark.parametrize(
    ("train", "valid", "expected"), [(True, False, 3), (False, True, 2), (True, True, 5)]
)
def test_callbacks_for_training_or_validation_only(train, valid, expected):
    class Counts(Callback):
        run_train, run_valid, n = train, valid, 0

        def after_batch(self):
            self.n += 1

    learn = make_learner(Counts)
    learn.fit(1)
    assert learn.counts.n == expected


def test_a_silenced_callback_is_back_in_the_next_fit():
    class Once(Callback):
        n = 0

        def before_fit(self):
            self.n += 1

        def before_batch(self):
            self.run = False
            self.n += 1

    class Fails(Callback):
        def after_loss(self):
            raise RuntimeError("no")

    learn = make_learner(Once)
    learn.fit(1)
    with pytest.raises(RuntimeError):
        learn.fit(1, cbs=Fails)
    learn.fit(1)
    assert learn.once.n == 6


def test_a_method_that_comes_later_is_called():
    """As in a notebook: the Learner is there, and then its callback's class grows."""
    called = []
    growing = type("Growing", (Callback,), {})
    learn = make_learner(growing)
    learn.fit(1)
    growing.before_fit = lambda self: called.append(1)
    learn.fit(1)
    assert called == [1]


# --
# Order


def told(name, **attributes):
    return type(name, (Callback,), {"before_fit": lambda self: self.learn.told.append(name), **attributes})


def order_of(*classes):
    learn = make_learner(default_cbs=False)
    learn.told = []
    learn.add_cbs(list(classes))
    learn("before_fit")
    return learn.told


def test_order():
    first, second, third = told("First", order=-1), told("Second"), told("Third", order=1)
    assert order_of(third, second, first) == ["First", "Second", "Third"]
    assert order_of(second, told("Fourth")) == ["Second", "Fourth"], "as they were added"


def test_run_before_and_run_after_overrule_order():
    late = told("Late", order=99)
    assert order_of(told("Later", run_after=late), late) == ["Late", "Later"]
    assert order_of(told("A"), told("Early", order=99, run_before=["A"])) == ["Early", "A"]
    assert order_of(told("Later", run_after="Late"), late) == ["Late", "Later"], "by its name"


def test_a_cycle_is_refused_and_changes_nothing():
    one, other = told("One", run_after=["Other"]), told("Other", run_after=["One"])
    learn = make_learner(default_cbs=False).add_cb(one)
    with pytest.raises(ValueError, match=r"form a cycle: One, Other; drop one"):
        learn.add_cb(other)
    assert [type(cb) for cb in learn.cbs] == [one] and not hasattr(learn, "other")


def test_callbacks_for_one_fit_leave_with_it():
    learn = make_learner()
    before = list(learn.cbs)
    with learn.added_cbs([Seeing, Callback()]):
        assert learn.seeing in learn.cbs and len(learn.cbs) == len(before) + 2
    assert learn.cbs == before and not hasattr(learn, "seeing")
    with pytest.raises(TypeError, match="is no callback"):
        learn.fit(1, cbs=[Seeing, "progress"])
    assert learn.cbs == before


# --
# A callback that raises


class Breaks(Callback):
    """Raises at the n-th time that an event happens; or Python's way to say that the user has had enough."""

    def __init__(self, event_name, n=2, error=RuntimeError):
        self.event_name, self.left, self.error, self.cleaned = event_name, n, error, 0

    def __call__(self, event_name):
        if event_name == self.event_name:
            self.left -= 1
            if self.left == 0:
                raise self.error("broken")

    def clean_up(self):
        self.cleaned += 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "event_name", ["before_batch", "after_pred", "after_loss", "after_backward", "before_step", "after_step"]
)
def test_a_callback_that_raises_leaves_everything_usable(event_name, error):
    """A fit after it goes as one in a Learner that had the same steps without being interrupted."""

    class Stops(Callback):
        def __init__(self):
            self.left = 2

        def __call__(self, name):
            if name == event_name:
                self.left -= 1
                if self.left == 0:
                    raise fl.CancelFitException

    broken, stopped = make_learner(metrics=fl.accuracy), make_learner(metrics=fl.accuracy)
    breaks = Breaks(event_name, error=error)
    with pytest.raises(error, match="broken") as caught:
        broken.fit(1, cbs=breaks)
    stopped.fit(1, cbs=Stops)
    stopped.opt.zero_grad()
    if error is RuntimeError:
        assert caught.value.__notes__ == [f"in the callback Breaks, at the event {event_name}"]
    assert breaks.cleaned == 1 and breaks not in broken.cbs and breaks.learn is None
    assert all(p.grad is None for p in broken.model.parameters())
    assert (broken.xb, broken.pred, broken.loss_grad) == ((None,), None, None)
    for learn in (broken, stopped):
        learn.fit(2)
    assert broken.recorder.values == stopped.recorder.values
    for p, q in zip(broken.model.parameters(), stopped.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_before_notes_an_error_says_it_in_its_message():
    class Old(Exception):
        """As all were before Python 3.11."""

        @property
        def add_note(self):
            raise AttributeError

    learn = make_learner()
    with pytest.raises(Old, match=r"broken\nin the callback Breaks, at the event after_pred"):
        learn.fit(1, cbs=Breaks("after_pred", error=Old))


def test_everybody_cleans_up_even_if_somebody_cannot():
    class Stubborn(Callback):
        def clean_up(self):
            raise OSError("cannot")

    one, other = Breaks("never"), Breaks("never")
    learn = make_learner([one, Stubborn, other])
    with pytest.raises(OSError, match="cannot"):
        learn.fit(1)
    assert (one.cleaned, other.cleaned) == (1, 1) and learn.dl is None


def test_hooks_of_a_callback_are_removed_when_another_raises():
    class Hooked(Callback):
        def before_fit(self):
            self.hook = self.model.register_forward_hook(lambda *_: None)

        def clean_up(self):
            self.hook.remove()

    learn = make_learner([Hooked, Breaks("after_loss")])
    with pytest.raises(RuntimeError, match="broken"):
        learn.fit(1)
    assert not learn.model._forward_hooks


# --
# Bad input


def frozen():
    model = nn.Linear(3, 2)
    model.requires_grad_(False)
    return model


BAD = {
    "no pair": (dict(dls=[batches()]), TypeError, "two loaders, for training and validation"),
    "no loaders": (dict(dls=3), TypeError, "two loaders, for training and validation, not 3"),
    "nothing to train on": (dict(dls=[[], batches()]), ValueError, "training loader has no batches"),
    "nothing to validate": (dict(dls=[batches(), []]), ValueError, "validation loader has no batches"),
    "no length": (dict(dls=[batches(), iter([])]), TypeError, "validation loader has no length"),
    "a loss per item": (
        dict(loss_func=functools.partial(nn.functional.cross_entropy, reduction="none")),
        ValueError,
        r"one number to train with; loss_func gave the shape \(4,\): average it",
    ),
    "a float as loss": (
        dict(loss_func=lambda pred, target: nn.functional.cross_entropy(pred, target).item()),
        TypeError,
        r"must be a tensor that leads back to the model; loss_func gave .*: drop .item\(\)",
    ),
    "no parameters": (dict(model=nn.Flatten()), ValueError, "no parameters to train"),
    "frozen": (dict(model=frozen()), ValueError, "no parameters to train: all are frozen"),
    "frozen, all listed": (
        dict(model=frozen(), splitter=lambda m: [list(m.parameters())]),
        ValueError,
        "all are frozen",
    ),
    "a metric's name": (dict(metrics="accuracy"), TypeError, "'accuracy' is no metric: give a function of"),
    "a number as metric": (dict(metrics=[fl.accuracy, 3]), TypeError, "3 is no metric"),
    "half a metric": (dict(metrics=nn.Flatten), TypeError, "is no metric"),
    "no callback": (dict(cbs=["progress"]), TypeError, "'progress' is no callback: inherit"),
    "a name that is taken": (
        dict(cbs=type("Model", (Callback,), {})),
        ValueError,
        "own 'model' would be lost",
    ),
    "torch's optimizer": (dict(opt_func=torch.optim.AdamW), TypeError, "take fusedopt.optim.AdamW"),
    "a cycle": (
        dict(cbs=[told("Chicken", run_after=["Egg"]), told("Egg", run_after=["Chicken"])]),
        ValueError,
        "form a cycle: Chicken, Egg",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    kwargs, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make_learner(**kwargs).fit(1)


def test_a_loss_per_item_can_be_validated():
    """Predictions are asked for with a loss for each."""
    learn = make_learner()
    learn.loss_func = functools.partial(nn.functional.cross_entropy, reduction="none")
    for name in ("before_fit", "before_epoch"):
        learn(name)
    learn._validate()
    learn("after_epoch")
    assert len(learn.final_record) == 1


def test_all_of_fusedopts_optimizers_train():
    for opt_func in (fusedopt.SGD, fusedopt.ranger, fusedopt.optim.AdamW, fusedopt.optim.RMSprop):
        learn = make_learner(opt_func=opt_func)
        learn.fit_one_cycle(1, 1e-2)
        assert len(learn.recorder.losses) == 3, opt_func


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        ("fusedopt", {"fusedopt.learner", "matplotlib"}),
        ("fusedopt.learner", {"fastai", "fastcore", "matplotlib"}),
    ],
)
def test_what_an_import_does_not_bring(imported, absent):
    code = f"import sys, {imported}; sys.exit(', '.join({absent} & sys.modules.keys()) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_loop_and_the_base_of_callbacks_stay_short():
    lines = sum(len(Path(module.__file__).read_text().splitlines()) for module in (fl.callback, fl.loop))
    assert lines < 200
