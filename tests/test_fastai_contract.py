"""fastai's real Learner at work with our optimizer: it trains as with fastai's own, batch by batch.

Everything but mixed precision is in float64, so that two ways of rounding stay about 1e-15 apart, and TOLERANCE can be
so small that a thousandth in one hyperparameter is noticed. Where there is a difference on purpose, a test says which.
"""

import copy
import pickle
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import fusedopt
from fusedopt.optimizer import named

with warnings.catch_warnings():
    # At import, fastai scripts a function (deprecated by torch) and sets an option that pandas has deprecated.
    warnings.simplefilter("ignore")
    import fastai.callback.all as fa
    import fastai.distributed  # noqa: F401  gives the Learner to_parallel
    import fastai.optimizer as fastai_optimizer
    from fastai.callback import fp16
    from fastai.callback.core import Callback, noop
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner, defaults, load_learner
    from fastai.optimizer import OptimWrapper
    from fastai.torch_core import trainable_params
    from fastcore.foundation import L

# fastai.callback.all gives a progress bar to every Learner that will be made, those of other test files as well.
defaults.callbacks = [cb for cb in defaults.callbacks if cb is not fa.ProgressCallback]

# fastai's load names numpy.core, which numpy has renamed. Its warning of a state that it could not load stays an error.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning"),
]

TOLERANCE = 1e-10
BATCHES = 4


# --
# A Learner on tiny data, and what is compared


class Data(torch.utils.data.TensorDataset):
    def new_empty(self):
        """For ``Learner.export``."""
        return Data(*(t[:0] for t in self.tensors))


class LossLog(Callback):
    """Every training batch's loss, learning rate and momentum. (fastai's recorder keeps a moving average.)"""

    order = 1000

    def __init__(self):
        self.batch_losses, self.batch_hypers = [], []

    def after_loss(self):
        if self.training:
            self.batch_losses.append(
                nn.functional.cross_entropy(self.learn.pred.double(), *self.learn.yb).item()
            )
            self.batch_hypers.append([h.get(k, 0.0) for h in self.opt.hypers for k in ("lr", "mom", "wd")])


def loss_func(pred, target):
    """In float32, because fastai's recorder averages in float32 and takes nothing else."""
    return nn.functional.cross_entropy(pred, target).float()


def make_model(dtype=torch.float64):
    """No bias before the norm: its gradient would be nothing but rounding."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(27, 6), nn.ReLU()),
        nn.Linear(6, 3),
    ).to(dtype)


def three_groups(model):
    """A splitter as fastai's are: one group per block."""
    return L(model[0], model[1], model[2]).map(lambda m: list(m.parameters()))


def make_learner(opt_func, path, dtype=torch.float64, **kwargs):
    x = torch.randn(8 * BATCHES, 1, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    data = Data(x, x.flatten(1)[:, :3].argmax(1))
    dls = DataLoaders(*[DataLoader(data, bs=8, num_workers=0) for _ in ("train", "valid")])
    kwargs = dict(splitter=three_groups, lr=0.01, wd=0.1) | kwargs
    path.mkdir(exist_ok=True)
    learn = Learner(dls, make_model(dtype), loss_func=loss_func, opt_func=opt_func, path=path, **kwargs)
    learn.logger, learn.create_mbar = noop, False
    return learn.add_cb(LossLog())


def params_of(learn):
    return dict(learn.model.named_parameters())


def flags_of(learn):
    """fastai's flags by parameter name, wherever there are any."""
    names, state = {p: n for n, p in params_of(learn).items()}, learn.opt.state
    flags = {
        n: {k: state[p][k] for k in ("do_wd", "force_train") if k in state.get(p, {})}
        for p, n in names.items()
    }
    return {n: f for n, f in flags.items() if f}


def assert_same_training(ours, theirs, tolerance=TOLERANCE):
    """Losses and hyperparameters of every batch, weights and what is frozen are the same."""
    assert len(ours.loss_log.batch_losses) == len(theirs.loss_log.batch_losses) > 0
    np.testing.assert_allclose(
        ours.loss_log.batch_losses, theirs.loss_log.batch_losses, rtol=tolerance, err_msg="losses"
    )
    np.testing.assert_allclose(
        ours.loss_log.batch_hypers, theirs.loss_log.batch_hypers, rtol=1e-12, err_msg="hypers"
    )
    for (name, p), q in zip(params_of(ours).items(), params_of(theirs).values(), strict=True):
        torch.testing.assert_close(
            p.detach(), q.detach(), rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert p.requires_grad == q.requires_grad, name


def train_both(
    scenario, path, ours=fusedopt.Adam, theirs=fastai_optimizer.Adam, tolerance=TOLERANCE, **kwargs
):
    """The two Learners after the scenario, which must have trained both alike; and it must have trained."""
    learners = []
    for side, opt_func in (("ours", ours), ("theirs", theirs)):
        learn = make_learner(opt_func, path / side, **kwargs)
        scenario(learn)
        learners.append(learn)
    assert_same_training(*learners, tolerance)
    start = make_model(learn.model[2].weight.dtype)[2].weight
    assert (learn.model[2].weight - start).abs().max() > 1e-4, "nothing was learnt, so nothing is shown"
    return learners


def sgd_looking_ahead(module):
    return lambda params, lr: module.Lookahead(module.SGD(params, lr, mom=0.9), k=3)


def maker(module, name):
    return sgd_looking_ahead(module) if name == "Lookahead" else getattr(module, name)


# --
# Every optimizer by name


@pytest.mark.parametrize("wd_bn_bias", [False, True])
@pytest.mark.parametrize("name", named.__all__)
def test_one_cycle_trains_as_with_fastais_own(name, wd_bn_bias, tmp_path):
    """With decay (on biases and norms, too, or not), momentum in a cycle, and three groups at their own rates."""
    ours, theirs = (maker(module, name) for module in (fusedopt, fastai_optimizer))
    kwargs = dict(wd_bn_bias=wd_bn_bias, wd=0.3)
    train_both(lambda learn: learn.fit_one_cycle(3, slice(1e-3, 1e-2)), tmp_path, ours, theirs, **kwargs)


@pytest.mark.parametrize(
    "mutant",
    [
        dict(eps=1.001e-5),
        dict(sqr_mom=0.9901),
        dict(decouple_wd=False),
    ],
    ids=str,
)
def test_a_slightly_different_optimizer_would_be_noticed(mutant, tmp_path):
    with pytest.raises(AssertionError, match="losses"):
        train_both(lambda learn: learn.fit(1), tmp_path, partial(fusedopt.Adam, **mutant))


def test_flags_that_do_nothing_would_be_noticed(tmp_path):
    def without_flags(learn):
        learn.create_opt()
        if isinstance(learn.opt, fusedopt.Optimizer):
            learn.opt.state.clear()
        learn.fit(1)

    with pytest.raises(AssertionError, match="losses"):
        train_both(without_flags, tmp_path)


# --
# Every way to train, with Adam


def freezing(learn):
    learn.freeze()
    learn.fit_one_cycle(1, 0.02)
    learn.freeze_to(1)
    learn.fit_one_cycle(1, slice(1e-3, 1e-2))
    learn.unfreeze()
    learn.fit(1, lr=[1e-4, 1e-3, 1e-2])


def everything_scheduled(learn):
    names = dict(lr=(1e-3, 1e-2), mom=(0.95, 0.8), sqr_mom=(0.9, 0.999), eps=(1e-8, 1e-3), wd=(0.5, 0.0))
    learn.fit(2, cbs=fa.ParamScheduler({k: fa.SchedLin(*v) for k, v in names.items()}))


def fit_twice(learn):
    learn.fit(1)
    learn.fit(1, 0.02, wd=0.3)


def fit_and_start_again(learn):
    learn.fit(1, 0.02)
    learn.fit(1, reset_opt=True)


def save_and_load(learn, with_opt=True):
    learn.fit_one_cycle(1)
    learn.save("saved", with_opt=with_opt)
    learn.fit(1, 0.05)
    learn.load("saved", with_opt=with_opt)
    learn.fit(1, 0.005)


def load_into_a_fresh_learner(learn):
    """The Learner has no optimizer yet when it loads one's state."""
    learn.fit_one_cycle(1)
    learn.save("saved")
    learn.opt = None
    learn.load("saved")
    learn.fit(1, 0.005)


def find_and_fit(learn):
    learn.fit(1)
    learn.lr_find(num_it=10, end_lr=1.0, show_plot=False)
    learn.lr_find(num_it=10, end_lr=1.0, show_plot=False)
    learn.fit(1)


def export_and_go_on(learn):
    learn.fit_one_cycle(1)
    learn.export()
    learn.fit(1, 0.005)


def accumulation(learn):
    learn.fit(2, cbs=fa.GradientAccumulation(n_acc=16))


def clipping(learn):
    learn.fit(2, cbs=fa.GradientClip(0.05))


def plateau(learn):
    learn.fit(4, 0.3, cbs=fa.ReduceLROnPlateau(monitor="valid_loss", patience=1, min_delta=10.0))
    assert [h["lr"] for h in learn.opt.hypers] == pytest.approx([0.3 / 1000] * 3)


def keep_the_best(learn):
    """The first epoch counts as the best, and its optimizer's state comes back."""
    learn.fit(3, 0.1, cbs=fa.SaveModelCallback(with_opt=True, min_delta=10.0))
    learn.fit(1, 0.005)


def stop_early(learn):
    learn.fit(6, 0.05, cbs=fa.EarlyStoppingCallback(min_delta=10.0, patience=2))
    assert len(learn.loss_log.batch_losses) < 6 * BATCHES


def several_callbacks(learn):
    learn.fit_one_cycle(
        2, cbs=[fa.GradientAccumulation(n_acc=16), fa.GradientClip(0.05), fa.ShortEpochCallback(0.6)]
    )


def go_on_from_an_epoch(learn):
    learn.fit_one_cycle(3, start_epoch=1)


def frozen_norms(learn):
    learn.freeze()
    learn.fit(1, cbs=fa.BnFreeze())


def turn_channels_last_on_the_way(learn):
    """The optimizer holds state in the other memory layout by then."""
    learn.fit(1)
    learn.to_channelslast(use_amp=False)
    learn.fit(1)
    weight = learn.model[0][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    learn.to_contiguous()
    learn.fit(1)


def in_parallel(learn):
    learn.fit(1)
    learn.to_parallel()
    learn.fit(1)
    learn.detach_parallel()
    learn.fit(1)


WAYS = [
    lambda learn: learn.fit(2),
    lambda learn: learn.fit(2, slice(1e-2), wd=0.0),
    lambda learn: learn.fit(2, np.array([1e-4, 1e-3, 1e-2])),
    lambda learn: learn.fit_one_cycle(2, moms=(0.9, 0.5, 0.99), div=5.0, pct_start=0.5, wd=0.5),
    lambda learn: learn.fit_flat_cos(2, slice(1e-3, 1e-2)),
    lambda learn: learn.fit_sgdr(2, 1, lr_max=slice(1e-3, 1e-2)),
    lambda learn: learn.fine_tune(2, 1e-2, freeze_epochs=1),
    partial(save_and_load, with_opt=False),
    freezing,
    everything_scheduled,
    fit_twice,
    fit_and_start_again,
    save_and_load,
    load_into_a_fresh_learner,
    find_and_fit,
    export_and_go_on,
    accumulation,
    clipping,
    plateau,
    keep_the_best,
    stop_early,
    several_callbacks,
    go_on_from_an_epoch,
    frozen_norms,
    turn_channels_last_on_the_way,
    in_parallel,
]
NAMES = ["fit", "rate_of_last", "array", "one_cycle", "flat_cos", "sgdr", "fine_tune", "load_without_opt"]
NAMES += [way.__name__ for way in WAYS[len(NAMES) :]]


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_every_way_to_train_gives_fastais_losses_and_flags(way, tmp_path):
    """Flags that make biases and norms decay or train differently survive it all: saves, loads, searches, freezing."""
    ours, theirs = train_both(way, tmp_path)
    assert flags_of(ours) == flags_of(theirs) != {}
    assert ours.opt.frozen_idx == theirs.opt.frozen_idx


def a_long_day(learn):
    """All in one, and a flag that is changed on the way."""
    learn.freeze()
    learn.fit_one_cycle(1, 0.02)
    learn.lr_find(num_it=8, show_plot=False)
    learn.unfreeze()
    learn.fit(1, slice(1e-3, 1e-2), wd=0.2)
    learn.save("saved")
    learn.fit(1)
    learn.load("saved")
    learn.fit(1, cbs=[fa.GradientAccumulation(n_acc=16), fa.GradientClip(0.1)])
    learn.export()
    weight = learn.model[2].weight
    for decays in (False, True):
        learn.opt.state[weight]["do_wd"] = decays
        learn.fit_flat_cos(1)


@pytest.mark.parametrize("name", named.__all__)
def test_every_optimizer_comes_through_a_long_day_as_fastais_own(name, tmp_path):
    train_both(a_long_day, tmp_path, *(maker(module, name) for module in (fusedopt, fastai_optimizer)))


@pytest.mark.parametrize("name", named.__all__)
def test_the_reference_comes_through_a_long_day_too(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_BACKEND", "reference")
    ours, _ = train_both(
        a_long_day, tmp_path, *(maker(module, name) for module in (fusedopt, fastai_optimizer))
    )
    assert ours.opt.explain().backend == "reference"


def freeze_and_thaw(learn):
    learn.freeze()
    learn.fit_one_cycle(1)
    learn.unfreeze()
    learn.fit_one_cycle(1)


CONSTRUCTIONS = {
    "one group": dict(splitter=trainable_params),
    "one group, norms at rest": dict(splitter=trainable_params, train_bn=False),
    "frozen norms stay frozen": dict(train_bn=False),
    "biases and norms decay": dict(wd_bn_bias=True),
    "rates from a slice": dict(lr=slice(1e-4, 1e-2)),
    "rates from half a slice": dict(lr=slice(1e-2)),
    "rates from a list": dict(lr=[1e-4, 1e-3, 1e-2]),
    "rates from a tuple": dict(lr=(1e-4, 1e-3, 1e-2)),
    "the optimizer's own decay": dict(wd=None),
    "generators of parameters": dict(splitter=lambda m: [list(b.parameters()) for b in m]),
    "tuples of parameters": dict(splitter=lambda m: tuple(L(b.parameters()) for b in m)),
    "a group without parameters": dict(
        splitter=lambda m: L(list(m[0].parameters()), [], list(m[1:].parameters()))
    ),
}


@pytest.mark.parametrize("kwargs", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
def test_every_way_to_make_a_learner_trains_alike(kwargs, tmp_path):
    scenario = freeze_and_thaw if "splitter" not in kwargs else lambda learn: learn.fit(2)
    ours, theirs = train_both(scenario, tmp_path, **kwargs)
    assert flags_of(ours) == flags_of(theirs)
    assert [len(g) for g in ours.opt.param_lists] == [len(g) for g in theirs.opt.param_lists]


def test_arguments_bound_in_advance_reach_the_optimizer(tmp_path):
    """fastai takes the learning rate out of a functools.partial."""
    bound = dict(lr=7e-3, mom=0.8, sqr_mom=0.95, wd=0.1, eps=1e-7, decouple_wd=False)
    makers = (partial(module.Adam, **bound) for module in (fusedopt, fastai_optimizer))
    ours, theirs = train_both(lambda learn: learn.fit(2), tmp_path, *makers, wd=None)
    assert ours.lr == theirs.lr == 7e-3
    assert dict(ours.opt.hypers[-1]) == theirs.opt.hypers[-1]


def test_what_fastai_hands_to_an_optimizer_is_taken_as_it_is(tmp_path):
    """The splitter's L of lists in first place, and the learning rate, a slice, by name."""
    seen = []

    def spy(*args, **kwargs):
        seen.append((type(args[0]), kwargs))
        return fusedopt.Adam(*args, **kwargs)

    learn = make_learner(spy, tmp_path, lr=slice(1e-5, 1e-3))
    learn.create_opt()
    assert seen == [(L, dict(lr=slice(1e-5, 1e-3)))]
    assert [h["lr"] for h in learn.opt.hypers] == pytest.approx([1e-5, 1e-4, 1e-3])


def test_one_optimizer_serves_every_fit(tmp_path):
    """fastai makes another one if the present one is false."""
    learn = make_learner(fusedopt.Adam, tmp_path)
    learn.create_opt()
    made = learn.opt
    learn.fit(1), learn.fit_one_cycle(1)
    assert learn.opt is made and made.state[params_of(learn)["2.weight"]]["step"] == 2 * BATCHES
    learn.fit(1, reset_opt=True)
    assert learn.opt is not made


def test_an_optimizer_made_before_is_taken_through_a_function(tmp_path):
    learn = make_learner(None, tmp_path)
    opt = fusedopt.Adam(three_groups(learn.model), lr=1.0)
    learn.opt_func = lambda params, lr: opt
    learn.fit(1)
    assert learn.opt is opt and flags_of(learn)
    assert [h["lr"] for h in learn.opt.hypers] == [learn.lr] * 3, "fit sets the Learner's learning rate"


def test_an_assigned_optimizer_trains_without_flags(tmp_path):
    """fastai sets flags where it makes the optimizer, so here everything decays."""
    learn = make_learner(None, tmp_path / "ours")
    learn.opt = fusedopt.Adam(three_groups(learn.model), lr=1.0)
    other = make_learner(fastai_optimizer.Adam, tmp_path / "theirs", wd_bn_bias=True)
    for one in (learn, other):
        one.fit(2)
    assert_same_training(learn, other)
    assert flags_of(learn) == {}


# --
# Wrappers of fastai's around our optimizer


def looking_ahead(inner):
    return lambda params, lr: fastai_optimizer.Lookahead(inner(params, lr=lr), k=3)


@pytest.mark.parametrize("way", [find_and_fit, freezing, save_and_load, plateau])
def test_fastais_lookahead_takes_our_optimizer(way, tmp_path):
    train_both(way, tmp_path, looking_ahead(fusedopt.Adam), looking_ahead(fastai_optimizer.Adam))


@pytest.mark.parametrize("way", [find_and_fit, freezing, save_and_load, plateau, export_and_go_on])
def test_our_lookahead_is_fastais(way, tmp_path):
    """Slow weights are forgotten, saved and loaded where fastai's are."""
    train_both(way, tmp_path, sgd_looking_ahead(fusedopt), sgd_looking_ahead(fastai_optimizer))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (fusedopt.optim.AdamW, torch.optim.AdamW),
        (partial(fusedopt.optim.SGD, momentum=0.9), partial(torch.optim.SGD, momentum=0.9)),
        (partial(fusedopt.optim.RMSprop, momentum=0.9), partial(torch.optim.RMSprop, momentum=0.9)),
    ],
    ids=["AdamW", "SGD", "RMSprop"],
)
def test_a_wrapped_class_trains_as_torchs(ours, theirs, tmp_path):
    def scenario(learn):
        freezing(learn)
        learn.opt.clear_state()
        learn.fit(1)

    train_both(scenario, tmp_path, partial(OptimWrapper, opt=ours), partial(OptimWrapper, opt=theirs))


def test_a_wrapped_factory_trains_as_fastais_own_without_flags(tmp_path):
    """OptimWrapper keeps fastai's flags to itself, whatever it wraps: biases and norms decay."""
    wrapped = partial(OptimWrapper, opt=fusedopt.Adam)
    make = {"ours": wrapped, "theirs": fastai_optimizer.Adam, "flagged": fastai_optimizer.Adam}
    ours, theirs, flagged = (
        make_learner(opt_func, tmp_path / side, wd_bn_bias=side == "theirs")
        for side, opt_func in make.items()
    )
    for learn in (ours, theirs, flagged):
        learn.fit_one_cycle(2)
    assert_same_training(ours, theirs)
    with pytest.raises(AssertionError, match="losses"):
        assert_same_training(ours, flagged)


def test_a_wrapped_instance_is_cleared_and_trains(tmp_path):
    """fastai clears what it is handed before it trains."""
    learners = []
    for side, cls in (("ours", fusedopt.optim.AdamW), ("theirs", torch.optim.AdamW)):
        learn = make_learner(None, tmp_path / side)
        opt = cls([dict(params=g) for g in three_groups(learn.model)], lr=0.1)
        for p in learn.model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        assert len(opt.state) > 0
        opt.zero_grad()
        learn.opt_func = OptimWrapper(opt=opt)
        learn.create_opt()
        assert len(opt.state) == 0 and learn.opt.opt is opt
        learn.fit_one_cycle(2)
        learners.append(learn)
    assert_same_training(*learners)


# --
# What is different on purpose


def test_frozen_layers_do_not_move(tmp_path):
    """fastai's zero_grad leaves zeros, with which layers frozen after a fit go on decaying; ours leaves nothing."""
    moved = {}
    for side, opt_func in (("ours", fusedopt.Adam), ("theirs", fastai_optimizer.Adam)):
        learn = make_learner(opt_func, tmp_path / side)
        learn.fit(1)
        learn.freeze()
        frozen = [(p, p.detach().clone()) for p in learn.model.parameters() if not p.requires_grad]
        assert frozen
        learn.fit(1, wd=0.1)
        moved[side] = max((p.detach() - before).abs().max().item() for p, before in frozen)
    assert moved["ours"] == 0.0 < moved["theirs"]


def test_hypers_an_optimizer_has_no_use_for_are_kept_and_read_back(tmp_path):
    """A cycle sets ``mom`` on any optimizer; fastai's wrapper of a torch optimizer without momentum raises KeyError."""
    train_both(
        lambda learn: learn.fit_one_cycle(1, moms=(0.5, 0.4, 0.5)),
        tmp_path,
        lambda params, lr: fusedopt.Optimizer(params, [fusedopt.weight_decay, fusedopt.sgd_step], lr=lr),
        lambda params, lr: fastai_optimizer.Optimizer(
            params, [fastai_optimizer.weight_decay, fastai_optimizer.sgd_step], lr=lr
        ),
    )
    learn = make_learner(lambda params, lr: fusedopt.optim.Adagrad(params, lr=lr), tmp_path)
    learn.fit_one_cycle(1, moms=(0.5, 0.4, 0.5))
    assert learn.opt.hypers[-1]["mom"] == learn.recorder.hps["mom"][-1] > 0.4
    wrapped = make_learner(partial(OptimWrapper, opt=torch.optim.Adagrad), tmp_path)
    with pytest.raises(KeyError, match="mom"):
        wrapped.fit_one_cycle(1)


KINDS = {
    "tuple": lambda: (0.1, 0.2, 0.3),
    "tuple of one": lambda: (0.5,),
    "range": lambda: range(1, 4),
    "generator": lambda: (x / 10 for x in range(1, 4)),
    "map": lambda: map(float, "123"),
    "dict's values": lambda: dict(a=0.1, b=0.2, c=0.3).values(),
    "set of one": lambda: {0.5},
    "numpy's float32": lambda: np.array([0.25, 0.5, 1.0], dtype=np.float32),
    "list of numpy's": lambda: [np.float64(0.1), np.float64(0.2), 0.3],
    "tensor": lambda: torch.tensor([0.25, 0.5, 1.0]),
    "list of tensors": lambda: [torch.tensor(0.5)] * 3,
    "slice of integers": lambda: slice(1, 100),
    "slice from zero": lambda: slice(0, 0.1),
    "integer": lambda: 1,
    "too many": lambda: (x for x in range(4)),
    "too few": lambda: torch.tensor([0.25, 0.5]),
    "none": lambda: [],
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_of_value_reaches_the_groups_as_in_fastai(kind, tmp_path):
    """Also what can be gone through only once."""
    read, refused = [], []
    for module in (fusedopt, fastai_optimizer):
        opt = module.Adam(three_groups(make_model()), lr=0.1)
        try:
            opt.set_hyper("lr", kind())
        except AssertionError as error:
            refused.append(str(error))
        read.append([float(h["lr"]) for h in opt.hypers])
    assert read[0] == pytest.approx(read[1], rel=1e-12)
    assert len(refused) in (0, 2) and len(set(refused)) < 2


def test_torchs_face_obeys_fastais_flags_and_schedules(tmp_path):
    """Behind OptimWrapper, torch's own sees neither the flags nor that ReduceLROnPlateau writes to its hypers."""
    learn = make_learner(
        lambda params, lr: fusedopt.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), eps=1e-5), tmp_path / "ours"
    )
    other = make_learner(fastai_optimizer.Adam, tmp_path / "theirs")
    wrapped = make_learner(
        partial(OptimWrapper, opt=torch.optim.AdamW, betas=(0.9, 0.99), eps=1e-5), tmp_path / "wrapped"
    )
    for one in (learn, other, wrapped):
        one.fit_one_cycle(2)
        one.fit(3, 0.01, cbs=fa.ReduceLROnPlateau(patience=1, min_delta=10.0))
    assert_same_training(learn, other)
    assert learn.opt.param_groups[0]["lr"] == pytest.approx(1e-4)
    assert wrapped.opt.hypers[0]["lr"] == 0.01


def test_a_learning_rate_in_a_tensor_is_recorded_as_numbers(tmp_path):
    rate = torch.tensor(0.0)

    def opt_func(params, lr):
        return fusedopt.optim.AdamW(params, lr=rate)

    learn = make_learner(opt_func, tmp_path, splitter=trainable_params)
    learn.fit_one_cycle(2, 0.01)
    assert all(type(lr) is float for lr in learn.recorder.lrs) and len(set(learn.recorder.lrs)) > BATCHES
    assert learn.opt.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(learn.recorder.lrs[-1])


def test_groups_hold_plain_numbers_after_a_cycle(tmp_path):
    """fastai sets numpy's, which no safe checkpoint may hold."""
    learn = make_learner(fusedopt.Adam, tmp_path)
    learn.fit_one_cycle(1, slice(1e-3, 1e-2))
    kinds = {type(v) for h in learn.opt.hypers for v in h.values()}
    kinds |= {type(beta) for group in learn.opt.param_groups for beta in group["betas"]}
    assert kinds == {float}
    torch.save(learn.opt.state_dict(), tmp_path / "opt.pth", pickle_protocol=2)
    assert torch.load(tmp_path / "opt.pth", weights_only=True)["param_groups"][0]["betas"][1] == 0.99


# --
# Flags, and what is saved


@pytest.fixture
def trained(tmp_path):
    learn = make_learner(fusedopt.Adam, tmp_path)
    learn.fit(1)
    return learn


def snapshot(learn):
    """The optimizer's numbers and tensors, by parameter name."""
    names = {p: n for n, p in params_of(learn).items()}
    state = {
        (names[p], k): v.clone() if isinstance(v, torch.Tensor) else v
        for p, s in learn.opt.state.items()
        for k, v in s.items()
    }
    return state, [dict(h) for h in learn.opt.hypers]


def assert_same_snapshot(a, b):
    assert a[1] == b[1] and a[0].keys() == b[0].keys()
    for key, value in a[0].items():
        assert torch.equal(value, b[0][key]) if isinstance(value, torch.Tensor) else value == b[0][key], key


def test_flags_say_which_parameters_decay_and_train(trained):
    expected = {n: {"do_wd": False} for n in params_of(trained) if n.endswith("bias")}
    expected |= {n: {"do_wd": False, "force_train": True} for n in ("0.1.weight", "0.1.bias")}
    assert flags_of(trained) == expected
    trained.opt.clear_state()
    assert flags_of(trained) == expected
    assert {k for state in trained.opt.state.values() for k in state} == {"do_wd", "force_train"}


def test_a_search_leaves_the_optimizer_as_it_was(trained):
    """Also where it has not stepped, so that there is no state to come back; and it finds the same again."""
    before = snapshot(trained)
    curves = []
    for _ in range(2):
        trained.lr_find(num_it=10, end_lr=1.0, show_plot=False)
        curves.append(list(trained.recorder.losses))
        assert_same_snapshot(snapshot(trained), before)
    assert curves[0] == curves[1]
    trained.create_opt()
    before = snapshot(trained)
    trained.lr_find(num_it=10, show_plot=False)
    after = snapshot(trained)
    assert {k for _, k in after[0]} == {"do_wd", "force_train"}
    assert after[0] == before[0]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda learn: pickle.loads(pickle.dumps(learn))])
def test_a_copied_learner_goes_on_alike_with_its_own_parameters(duplicate, trained):
    trained.freeze_to(1)
    trained.fit(1)
    twin = duplicate(trained)
    own = {id(p) for p in twin.model.parameters()}
    assert {id(p) for p in twin.opt.state} == own == {id(p) for group in twin.opt.param_lists for p in group}
    assert not own & {id(p) for p in trained.model.parameters()}
    assert flags_of(twin) == flags_of(trained) != {} and twin.opt.frozen_idx == 1
    for learn in (trained, twin):
        learn.fit_one_cycle(1)
    assert_same_training(twin, trained)


def test_an_exported_learner_trains_on_where_there_is_no_triton(trained, monkeypatch):
    """Exports carry no optimizer, but the function that makes it: a new one of ours is made after loading."""
    before = snapshot(trained)
    trained.export("export.pkl")
    assert_same_snapshot(snapshot(trained), before)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(UserWarning, match="insecure pickle"):  # so does fastai's load_learner on every call
        loaded = load_learner(trained.path / "export.pkl")
    assert loaded.opt is None and loaded.opt_func is fusedopt.Adam
    loaded.dls = trained.dls
    trained.create_opt()
    for learn in (loaded, trained):
        learn.fit(1)
    assert_same_training(loaded, trained)
    assert flags_of(loaded) == flags_of(trained)


def test_a_state_dict_can_be_loaded_twice_and_stays_as_it_was(trained):
    saved = trained.opt.state_dict()
    before = copy.deepcopy(saved)
    for _ in range(2):
        trained.create_opt()
        trained.opt.load_state_dict(saved)
        trained.fit(1)
    assert saved.keys() == before.keys() and saved["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(value, saved["state"][key][name]) for name, value in state.items())


def test_a_state_that_does_not_fit_is_announced_and_changes_nothing(trained):
    """fastai turns whatever the optimizer raises into a warning, and trains on."""
    other = make_learner(fusedopt.Adam, trained.path, splitter=trainable_params)
    other.fit(1)
    other.save("of one group")
    before = snapshot(trained)
    with pytest.warns(UserWarning, match="Could not load the optimizer state"):
        trained.load("of one group")
    assert_same_snapshot(snapshot(trained), before)
    trained.fit(1)


def test_a_copy_of_hypers_is_a_snapshot(trained):
    """As with fastai's own, which are dicts; a view would go on changing."""
    before = [h.copy() for h in trained.opt.hypers]
    trained.fit_one_cycle(1)
    assert [h["lr"] for h in before] == [trained.lr] * 3
    assert all(h["lr"] < trained.lr for h in trained.opt.hypers)


def test_norms_that_the_optimizer_never_got_are_flagged_and_saved_around(tmp_path):
    """The default splitter leaves out what is frozen, but fastai flags it in the optimizer's state all the same."""

    made = []

    def scenario(learn):
        learn.model[0].requires_grad_(False)
        learn.fit(1)
        made.append(flags_of(learn))
        learn.save("saved")
        learn.load("saved")
        learn.lr_find(num_it=6, show_plot=False)
        learn.fit(1)

    ours, theirs = train_both(scenario, tmp_path, splitter=trainable_params)
    assert made[0] == made[1] == flags_of(ours) and "0.1.weight" in made[0]
    assert len(ours.opt.param_lists[0]) == 4 and "0.1.weight" not in flags_of(theirs), (
        "fastai's load drops them"
    )


def test_summary_says_what_is_frozen_and_trains(trained):
    """fastai reads ``frozen_idx`` and ``requires_grad`` for it."""
    other = make_learner(fastai_optimizer.Adam, trained.path)
    other.fit(1)
    texts = []
    for learn in (trained, other):
        learn.freeze_to(1)
        texts.append([line for line in learn.summary().splitlines() if not line.startswith("Optimizer used")])
    assert texts[0] == texts[1] and "Model frozen up to parameter group #1" in texts[0]


# --
# Mixed precision


@pytest.fixture
def on_cpu(monkeypatch):
    """fastai's MixedPrecision asks for CUDA; the same on the CPU, in bfloat16, with a gradient scaler all the same."""
    monkeypatch.setattr(fp16, "autocast", lambda device, dtype: torch.autocast("cpu", torch.bfloat16))
    monkeypatch.setattr(fp16, "GradScaler", partial(make_scaler, init_scale=1024.0))


def make_scaler(device, **kwargs):
    return torch.amp.GradScaler("cpu", **kwargs)


class BadBatch(Callback):
    """One batch's gradients are infinite; checks that its step is left out."""

    order = fp16.MixedPrecision.order - 1

    def before_step(self):
        self.bad = self.train_iter == 2
        if self.bad:
            self.learn.model[2].weight.grad.fill_(float("inf"))
            self.before = [p.detach().clone() for p in self.learn.model.parameters()]

    def after_cancel_step(self):
        assert self.bad
        self.skipped = all(
            torch.equal(p, b) for p, b in zip(self.learn.model.parameters(), self.before, strict=True)
        )


def half_precision(learn):
    learn.to_fp16()
    learn.fit_one_cycle(1, cbs=[bad := BadBatch(), fa.GradientClip(1.0)])
    assert bad.skipped
    learn.to_fp32()
    learn.fit(1)


def test_mixed_precision_trains_alike_and_leaves_out_bad_batches(on_cpu, tmp_path):
    """The model runs in bfloat16, so rounding in float32 may be seen at bfloat16's size."""
    ours, theirs = train_both(half_precision, tmp_path, dtype=torch.float32, tolerance=1e-3)
    step = {side.opt.state[p]["step"] for side in (ours, theirs) for p in side.model.parameters()}
    assert step == {2 * BATCHES - 1}, "one was left out"


def test_bfloat16_trains_alike(on_cpu, tmp_path):
    train_both(lambda learn: learn.to_bf16().fit(2), tmp_path, dtype=torch.float32, tolerance=1e-3)


class SeemsToBeOnAGPU(Callback):
    """fastai's older mixed precision refuses anything else. Batches stay where the model is."""

    order = fp16.NonNativeMixedPrecision.order - 1

    def before_fit(self):
        self.dls._device = torch.device("cuda")

    def after_fit(self):
        self.dls._device = torch.device("cpu")


def test_parameters_swapped_for_master_copies_train_alike_and_come_back(tmp_path):
    """fastai's older mixed precision puts float32 copies of half-precision parameters into the optimizer for a fit.

    Not with ``flat_master=True``: that needs gradients that are zeroed, and ours (as torch's) are gone after a step.
    """

    def scenario(learn):
        learn.fit(1)
        before = [[id(p) for p in group] for group in learn.opt.param_lists]
        learn.to_non_native_fp16(dynamic=False, clip=0.5)
        learn.fit(1, 0.005, cbs=[SeemsToBeOnAGPU(), fa.SaveModelCallback(every_epoch=True, with_opt=True)])
        learn.to_non_native_fp32()
        assert [[id(p) for p in group] for group in learn.opt.param_lists] == before
        learn.fit(1, 0.005)

    train_both(scenario, tmp_path, dtype=torch.float32, tolerance=1e-3)


def test_all_params_is_the_list_that_fastais_code_expects():
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    opt = fusedopt.Adam([params[:1], params[1:]], lr=(1e-3, 1e-2))
    found = opt.all_params().itemgot(0)
    assert len(found) == 3 and all(a is b for a, b in zip(found, params, strict=True))
    assert [h["lr"] for h in opt.hypers] == [1e-3, 1e-2]
