"""The learner's training callbacks do what they say and, where fastai has one of that name, the same batch by batch."""

import copy
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusedopt
from fusedopt import learner
from fusedopt.learner import (
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
)
from fusedopt.learner.callbacks import mixed_precision

with warnings.catch_warnings():
    # At import, fastai scripts a function (deprecated by torch) and sets an option that pandas has deprecated.
    warnings.simplefilter("ignore")
    import fastai.callback.all as fa
    from fastai.callback import fp16
    from fastai.callback.core import Callback as FastaiCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner as FastaiLearner
    from fastai.learner import defaults
    from fastai.losses import CrossEntropyLossFlat

# fastai.callback.all gives a progress bar to every Learner that will be made, those of other test files as well.
defaults.callbacks = [cb for cb in defaults.callbacks if cb is not fa.ProgressCallback]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning"),
]


# --
# The same training twice


def loaders(classes=True, n=22, bs=4):
    """Twenty-two items and ten for validation; the last batch of each is a half."""
    gen = torch.Generator().manual_seed(1)

    def loader(n):
        x = torch.randn(n, 3, generator=gen)
        y = (x.sum(1) > 0).long() if classes else x.sum(1, keepdim=True)
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=bs)

    return loader(n), loader(10)


def net(out=2):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, out))


class Seen:
    """What both libraries' callbacks of this kind note of a training."""

    order, run_valid = 1000, True

    def __init__(self):
        self.losses, self.minimized, self.lrs, self.events = [], [], [], []

    def __call__(self, event):
        self.events.append(event)
        return super().__call__(event)

    def after_loss(self):
        self.losses.append(self.learn.loss.item())
        self.minimized.append(self.learn.loss_grad.item())

    def before_epoch(self):
        self.lrs.append([h["lr"] for h in self.learn.opt.hypers])


class OurSeen(Seen, learner.Callback):
    pass


class TheirSeen(Seen, FastaiCallback):
    pass


def ours(cbs=(), model=None, dls=None, epochs=3, seed=5, **kwargs):
    seen = OurSeen()
    kwargs = {"loss_func": nn.CrossEntropyLoss(), "lr": 0.02} | kwargs
    learn = learner.Learner(dls or loaders(), model or net(), cbs=[seen, *cbs], **kwargs)
    torch.manual_seed(seed)
    with learn.no_logging():
        learn.fit(epochs)
    return learn, seen


def theirs(cbs=(), model=None, dls=None, epochs=3, seed=5, **kwargs):
    seen = TheirSeen()
    kwargs = {"loss_func": CrossEntropyLossFlat(), "opt_func": fusedopt.Adam, "lr": 0.02} | kwargs
    dls = DataLoaders(*(dls or loaders()), device="cpu")
    learn = FastaiLearner(dls, model or net(), cbs=[seen, *cbs], **kwargs)
    torch.manual_seed(seed)
    with learn.no_logging():
        learn.fit(epochs)
    return learn, seen


def assert_same(a, b):
    """Of two trainings: losses and what was minimized of every batch, rates of every epoch, weights."""
    assert len(a[1].losses) > 0
    assert a[1].losses == pytest.approx(b[1].losses, rel=1e-6, nan_ok=True)
    assert a[1].minimized == pytest.approx(b[1].minimized, rel=1e-6, nan_ok=True)
    assert a[1].lrs == b[1].lrs
    assert_same_weights(a[0].model, b[0].model)


def assert_same_weights(a, b):
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, equal_nan=True)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --
# Against fastai's


class Reseeding:
    """The same random numbers in each batch, however many were drawn before it."""

    order = -8

    def before_batch(self):
        torch.manual_seed(self.learn.iter + 100 * self.learn.epoch)


class OurReseeding(Reseeding, learner.Callback):
    pass


class TheirReseeding(Reseeding, FastaiCallback):
    pass


PAIRS = {
    "nothing": (lambda: [], lambda: []),
    "accumulation": (lambda: [learner.GradientAccumulation(7)], lambda: [fa.GradientAccumulation(7)]),
    "clip": (lambda: [learner.GradientClip(0.1)], lambda: [fa.GradientClip(0.1)]),
    "clip the largest": (
        lambda: [learner.GradientClip(0.05, math.inf)],
        lambda: [fa.GradientClip(0.05, math.inf)],
    ),
    "accumulation and clip": (
        lambda: [learner.GradientClip(0.1), learner.GradientAccumulation(8)],
        lambda: [fa.GradientClip(0.1), fa.GradientAccumulation(8)],
    ),
    "mixup": (
        lambda: [learner.Mixup(0.3), OurReseeding()],
        lambda: [fa.MixUp(0.3), TheirReseeding()],
    ),
    "plateau": (
        lambda: [learner.ReduceLROnPlateau(min_delta=1.0, factor=3, min_lr=0.004)],
        lambda: [fa.ReduceLROnPlateau(min_delta=1.0, factor=3, min_lr=0.004)],
    ),
    "patient plateau": (
        lambda: [learner.ReduceLROnPlateau(min_delta=1.0, patience=2)],
        lambda: [fa.ReduceLROnPlateau(min_delta=1.0, patience=2)],
    ),
    "early stopping": (
        lambda: [learner.EarlyStopping(min_delta=1.0, patience=2)],
        lambda: [fa.EarlyStoppingCallback(min_delta=1.0, patience=2)],
    ),
    "nan": (lambda: [learner.TerminateOnNaN()], lambda: [fa.TerminateOnNaNCallback()]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_trains_as_with_fastais(name, capsys):
    cbs, their_cbs = PAIRS[name]
    a, said = ours(cbs(), epochs=5), capsys.readouterr().out
    b, they_said = theirs(their_cbs(), epochs=5), capsys.readouterr().out
    assert_same(a, b)
    assert said == they_said
    plain = ours(epochs=5)
    assert (name in ("nothing", "nan")) == (a[1].minimized == plain[1].minimized)


def test_targets_that_are_numbers_are_mixed_as_fastai_does():
    dls, mse = loaders(classes=False), nn.MSELoss()
    a = ours([learner.Mixup(0.3), OurReseeding()], net(1), dls, loss_func=mse)
    b = theirs([fa.MixUp(0.3), TheirReseeding()], net(1), dls, loss_func=mse)
    assert_same(a, b)


def test_training_ends_where_fastais_does_when_a_loss_is_nan():
    def broken(pred, y, **kwargs):
        return F.cross_entropy(pred, y) * (math.nan if len(y) < 4 else 1)

    a = ours([learner.TerminateOnNaN()], loss_func=broken)
    b = theirs([fa.TerminateOnNaNCallback()], loss_func=broken)
    assert_same(a, b)
    assert len(a[1].losses) == 6 and math.isnan(a[1].losses[-1])
    with pytest.warns(RuntimeWarning, match="training loss is nan from batch 5 of epoch 0 on"):
        assert len(ours(loss_func=broken)[1].losses) == 3 * 9


def test_an_infinite_loss_does_not_cut_predictions_short():
    learn, _ = ours([learner.TerminateOnNaN()], loss_func=lambda pred, y: F.cross_entropy(pred, y) * math.inf)
    assert len(learn.get_preds()[0]) == 10


# --
# Mixed precision


@pytest.fixture
def fastai_on_cpu(monkeypatch):
    """fastai asks for CUDA's autocast and scaler, which do nothing here."""
    monkeypatch.setattr(fp16, "autocast", lambda device, dtype: torch.autocast("cpu", dtype=dtype))
    monkeypatch.setattr(fp16, "GradScaler", lambda device, **kwargs: torch.amp.GradScaler("cpu", **kwargs))


@pytest.fixture
def fp16_on_cpu(monkeypatch):
    """It is tested where it is slow, and for that reason does nothing otherwise."""
    monkeypatch.setattr(mixed_precision, "SLOW", set())


class DtypeSeen(learner.Callback):
    order = learner.MixedPrecision.order - 1

    def after_pred(self):
        self.dtype = self.pred.dtype


@pytest.mark.parametrize("mode", ["fp16", "bf16"])
@pytest.mark.parametrize("others", ["alone", "with accumulation and clip"])
def test_mixed_precision_trains_as_fastais(mode, others, fastai_on_cpu, fp16_on_cpu):
    both = others != "alone"
    kwargs = {"init_scale": 2.0**20, "growth_interval": 3} if mode == "fp16" else {}
    mixed, dtype = learner.MixedPrecision(mode, **kwargs), DtypeSeen()
    a = ours([mixed, dtype, *([learner.GradientAccumulation(7), learner.GradientClip(0.1)] if both else [])])
    scales = []

    class ScaleLog(FastaiCallback):
        order = 2000

        def before_step(self):
            scales.append(self.learn.scaler.get_scale())

    mixed_too = fa.MixedPrecision(mode, **kwargs)
    b = theirs([mixed_too, ScaleLog(), *([fa.GradientAccumulation(7), fa.GradientClip(0.1)] if both else [])])
    assert_same(a, b)
    assert a[1].events == b[1].events
    assert mixed.scales == scales
    assert dtype.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[mode]
    assert ("after_cancel_step" in a[1].events) == (mode == "fp16"), (
        "nothing has overflowed: raise init_scale"
    )
    assert a[1].losses != ours()[1].losses


@pytest.mark.parametrize("others", ["alone", "with clip", "with accumulation and clip"])
def test_an_optimizer_that_scales_in_its_kernel_trains_alike(others, fp16_on_cpu):
    """It gets the scale and what was found from the scaler itself, not from a step that it did not make."""

    def cbs():
        clip = [learner.GradientClip(0.1)] if "clip" in others else []
        accumulation = [learner.GradientAccumulation(7)] if "accumulation" in others else []
        return [learner.MixedPrecision(init_scale=2.0**20, growth_interval=3), *clip, *accumulation]

    plain, fused = cbs(), cbs()
    a = ours(fused, opt_func=partial(fusedopt.Adam, amp_fused=True))
    b = ours(plain)
    assert_same(a, b)
    assert "after_cancel_step" in b[1].events and "after_cancel_step" not in a[1].events
    steps = {float(s["step"]) for s in a[0].opt.state.values()}
    assert steps == {float(s["step"]) for s in b[0].opt.state.values()} == {len(plain[0].scales)}
    assert "_step" not in vars(a[0]) and not hasattr(a[0], "scaler")


class CancelOnce(learner.Callback):
    def __init__(self, event, exception, order):
        self.event, self.exception, self.order = event, exception, order

    def __call__(self, event):
        if event == self.event and self.learn.training and self.learn.iter == 0:
            raise self.exception


@pytest.mark.parametrize("amp_fused", [False, True])
@pytest.mark.parametrize("order", [0, 30])
def test_a_step_that_is_cancelled_leaves_the_scaler_alone(order, amp_fused, fp16_on_cpu):
    opt_func = partial(fusedopt.Adam, amp_fused=amp_fused)
    cancel = CancelOnce("before_step", CancelStepException, order)
    learn, seen = ours([learner.MixedPrecision(init_scale=8.0), cancel], opt_func=opt_func, epochs=1)
    assert seen.events.count("after_cancel_step") == 1
    assert {float(s["step"]) for s in learn.opt.state.values()} == {5.0}


def test_a_backward_pass_that_is_cancelled_leaves_nothing_to_step(fp16_on_cpu):
    cancel = CancelOnce("before_backward", CancelBackwardException, 0)
    learn, seen = ours([learner.MixedPrecision(init_scale=8.0), cancel], epochs=1)
    assert seen.events.count("after_cancel_step") == seen.events.count("after_cancel_backward") == 1
    assert {float(s["step"]) for s in learn.opt.state.values()} == {5.0}


@pytest.mark.parametrize("exception", [CancelFitException, KeyboardInterrupt, learner.CancelBatchException])
def test_autocast_ends_with_the_batch_however_it_ends(exception):
    cancel = CancelOnce("after_pred", exception, 0)
    mixed = learner.MixedPrecision("bf16")
    if exception is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            ours([mixed, cancel])
    else:
        ours([mixed, cancel])
    assert not torch.is_autocast_enabled("cpu")
    assert mixed.autocast is None


def test_precision_is_chosen_by_method():
    learn = learner.Learner(loaders(), net(), nn.CrossEntropyLoss())
    assert learn.to_fp16(init_scale=4.0) is learn and learn.mixed_precision.kwargs == {"init_scale": 4.0}
    assert learn.to_bf16().mixed_precision.amp_mode == "bf16"
    assert sum(isinstance(cb, learner.MixedPrecision) for cb in learn.cbs) == 1
    assert not hasattr(learn.to_fp32(), "mixed_precision")
    for wrong in ("fp8", torch.float16, None):
        with pytest.raises(ValueError, match="fp16, bf16"):
            learner.MixedPrecision(wrong)


@pytest.mark.parametrize("mode", ["FP16", "BF16"])
def test_modes_are_words_and_members_of_ours_and_fastais(mode):
    ours, theirs = learner.AMPMode[mode], fp16.AMPMode[mode]
    for given in (ours, theirs, mode.lower()):
        assert learner.MixedPrecision(given).amp_mode is ours
    assert ours == theirs.value and fp16.AMPMode(ours) is theirs
    assert {x.name: x.value for x in learner.AMPMode} == {x.name: x.value for x in fp16.AMPMode}


WAYS_TO_FP16 = {
    "to_fp16": lambda learn: learn.to_fp16(),
    "to_fp16 with a scale": lambda learn: learn.to_fp16(init_scale=8.0),
    "a callback": lambda learn: learn.add_cb(learner.MixedPrecision),
    "fused": lambda learn: learn.to_fp16(),
    "with clip": lambda learn: learn.add_cb(learner.GradientClip(0.1)).to_fp16(),
    "with accumulation": lambda learn: learn.add_cb(learner.GradientAccumulation(8)).to_fp16(),
}


@pytest.mark.parametrize("way", WAYS_TO_FP16)
def test_float16_on_a_cpu_changes_nothing_and_says_so_once(way):
    """As in fastai, whose autocast is CUDA's."""
    found, seen = [], DtypeSeen()
    for make_half in (lambda learn: learn, WAYS_TO_FP16[way]):
        others = {
            "with clip": [learner.GradientClip(0.1)],
            "with accumulation": [learner.GradientAccumulation(8)],
        }
        opt_func = partial(fusedopt.Adam, amp_fused=way == "fused")
        learn = learner.Learner(loaders(), net(), nn.CrossEntropyLoss(), opt_func, cbs=seen)
        if not found:
            learn.add_cbs(others.get(way, []))
        make_half(learn)
        with learn.no_logging(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            learn.fit(2, 0.02)
            learn.get_preds()
            learn.fit(1, 0.02)
        found.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    assert torch.equal(*found)
    assert seen.dtype is torch.float32 and not hasattr(learn, "scaler")
    assert len(said) == 1 and "does nothing in float16 on a CPU" in str(said[0].message)
    assert "to_bf16" in str(said[0].message)


def test_bfloat16_on_a_cpu_is_what_it_says():
    seen = DtypeSeen()
    ours([learner.MixedPrecision("bf16"), seen], epochs=1)
    assert seen.dtype is torch.bfloat16


# --
# Accumulation and clipping


def test_accumulated_batches_step_as_one_large_batch():
    model = nn.Linear(3, 2)
    accumulated = ours([learner.GradientAccumulation(8)], copy.deepcopy(model), loaders(n=24, bs=4), epochs=2)
    large = ours([], copy.deepcopy(model), loaders(n=24, bs=8), epochs=2)
    assert_same_weights(accumulated[0].model, large[0].model)
    assert {float(s["step"]) for s in accumulated[0].opt.state.values()} == {6.0}


def test_what_is_left_of_a_fit_is_not_added_to_the_next():
    learn, _ = ours([learner.GradientAccumulation(8)], nn.Linear(3, 2), epochs=1)
    left = [p.grad for p in learn.model.parameters()]
    assert all(g is not None for g in left), "the fit must end in the middle of an accumulation"
    learn.gradient_accumulation.before_fit()
    assert all(p.grad is None for p in learn.model.parameters())


class Norms(learner.Callback):
    order = 30

    def __init__(self):
        self.norms = []

    def before_step(self):
        self.norms.append(float(torch.cat([p.grad.flatten() for p in self.model.parameters()]).norm()))


def test_gradients_are_no_longer_than_the_clip():
    free, clipped = Norms(), Norms()
    ours([free])
    ours([clipped, learner.GradientClip(0.1)])
    assert max(free.norms) > 0.2
    assert max(clipped.norms) <= 0.1


# --
# Devices and transforms


class Devices(learner.Callback):
    def after_pred(self):
        self.seen = self.xb[0].device.type, self.yb[0].device.type, self.pred.device.type


def test_model_loss_and_batches_go_to_the_device():
    """torch's "meta" is a device without numbers, which every machine has."""
    loss = nn.CrossEntropyLoss(weight=torch.ones(2))
    devices = Devices()
    cbs = [learner.DeviceCallback("meta"), devices]
    learn = learner.Learner(loaders(), net(), loss, cbs=cbs, default_cbs=False)
    assert {p.device.type for p in learn.model.parameters()} == {"meta"} == {loss.weight.device.type}
    learn.validate()
    assert devices.seen == ("meta", "meta", "meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_goes_on_on_another_device():
    """With what the optimizer has: as a training that stayed, to rounding."""
    moved, _ = ours(epochs=1)
    stayed, _ = ours(epochs=1)
    moved.add_cb(learner.DeviceCallback())
    for learn in (moved, stayed):
        with learn.no_logging():
            learn.fit(2)
    assert {p.device.type for p in moved.model.parameters()} == {"cuda"}
    torch.testing.assert_close(weights(moved.model).cpu(), weights(stayed.model), rtol=1e-3, atol=1e-4)
    assert {float(s["step"]) for s in moved.opt.state.values()} == {18.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp_fused", [False, True])
@pytest.mark.parametrize("mode", ["fp16", "bf16"])
def test_mixed_precision_learns_on_a_gpu(mode, amp_fused):
    dtype = DtypeSeen()
    cbs = [learner.DeviceCallback(), learner.MixedPrecision(mode), learner.GradientClip(), dtype]
    learn, _ = ours(
        cbs, epochs=15, opt_func=partial(fusedopt.Adam, amp_fused=amp_fused), metrics=learner.accuracy
    )
    assert dtype.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[mode]
    assert learn.recorder.values[-1][-1] >= 0.8


def test_the_best_device_is_taken_without_a_name():
    best = torch.accelerator.current_accelerator(check_available=True)
    assert learner.DeviceCallback().device == (best or torch.device("cpu"))


@pytest.mark.parametrize("on_train", [True, False])
@pytest.mark.parametrize("on_valid", [True, False])
def test_batches_are_transformed_where_asked(on_train, on_valid):
    class Inputs(learner.Callback):
        def __init__(self):
            self.seen = set()

        def after_pred(self):
            self.seen.add((self.training, bool((self.xb[0] == 7).all())))

    inputs = Inputs()
    ours([inputs, learner.BatchTransform(lambda x: torch.full_like(x, 7), on_train, on_valid)], epochs=1)
    assert inputs.seen == {(True, on_train), (False, on_valid)}


def test_a_transform_of_several_inputs_gives_several():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, a, b):
            return self.layer(a * b)

    batch = torch.ones(4, 3), torch.ones(4, 3), torch.zeros(4, dtype=torch.long)
    learn = learner.Learner([[batch], [batch]], Two(), nn.CrossEntropyLoss())
    learn.add_cb(learner.BatchTransform(lambda a, b: (a + 1, b * 0)))
    inputs, preds, _ = learn.get_preds(with_input=True)
    assert torch.equal(inputs[0], batch[0] + 1) and torch.equal(inputs[1], batch[1] * 0)
    assert torch.equal(preds, learn.model.layer.bias.detach().expand(4, 2))


# --
# Trackers


class Scripted(learner.Callback):
    """Validation losses as a test wants them."""

    order = 51

    def __init__(self, values):
        self.script = values

    def after_epoch(self):
        self.learn.recorder.values[-1][1] = self.script[self.epoch]


def stopped_at(script, **kwargs):
    learn, _ = ours([Scripted(script), learner.EarlyStopping(**kwargs)], epochs=len(script))
    return learn.epoch


def test_stops_after_as_many_epochs_as_its_patience(capsys):
    assert stopped_at([3.0, 2.0, 2.5, 2.4, 1.0], patience=2) == 3
    assert "No improvement since epoch 1" in capsys.readouterr().out
    assert stopped_at([3.0, 2.0, 2.5, 1.0, 1.0], patience=2) == 4
    assert stopped_at([3.0, 2.9, 2.8, 0.0], min_delta=0.5) == 1
    assert stopped_at([3.0, math.nan, 0.0]) == 1
    assert stopped_at([3.0, 4.0, 5.0, 1.0], comp=np.greater) == 3


def test_a_row_that_was_cut_short_is_no_improvement():
    assert stopped_at([None, None, 1.0], patience=2) == 1


def test_a_monitor_that_nobody_records_is_refused():
    with pytest.raises(
        ValueError, match=r"'valid_lost' is not recorded; monitor one of train_loss, valid_loss"
    ):
        ours([learner.EarlyStopping("valid_lost")])


def test_rates_fall_on_a_plateau_and_no_further_than_asked(capsys):
    cbs = [Scripted([1.0, 1.0, 1.0, 1.0]), learner.ReduceLROnPlateau(factor=4, min_lr=0.003)]
    _, seen = ours(cbs, epochs=4)
    assert [lrs[-1] for lrs in seen.lrs] == pytest.approx([0.02, 0.02, 0.005, 0.003])
    assert capsys.readouterr().out.count("reducing lr") == 2


def test_validating_and_predicting_are_no_epochs_to_trackers():
    stop = learner.EarlyStopping(patience=9)
    learn, _ = ours([stop])
    stop.best = -1.0  # which no loss reaches
    learn.validate()
    learn.get_preds()
    assert stop.best == -1.0 and stop.run


def test_looking_for_a_rate_is_no_training_to_trackers_and_averages(tmp_path):
    stop, save, ema = learner.EarlyStopping(patience=9), learner.SaveModel(), learner.EMA(0.9)
    learn, _ = ours([stop, save, ema], path=tmp_path)
    best, file, before = stop.best, save.last_saved_path.read_bytes(), weights(learn.model).clone()
    with learn.no_logging():
        learn.lr_find(num_it=10, show_plot=False)
    assert (stop.best, save.last_saved_path.read_bytes()) == (best, file)
    assert torch.equal(weights(learn.model), before)


def test_the_best_model_is_loaded_at_the_end(tmp_path, capsys):
    states = []

    class States(learner.Callback):
        order = 52

        def after_epoch(self):
            states.append(copy.deepcopy(self.model.state_dict()))

    cbs = [Scripted([3.0, 1.0, 2.0]), States(), learner.SaveModel(fname="best")]
    learn, _ = ours(cbs, path=tmp_path)
    last = cbs[-1].last_saved_path
    assert last == tmp_path / "best.pth" and last.is_file()
    for name, value in learn.model.state_dict().items():
        assert torch.equal(value, states[1][name])
    assert not torch.equal(learn.model[0].weight, states[2]["0.weight"])
    assert "Better model found at epoch 1 with valid_loss value: 1.0." in capsys.readouterr().out


@pytest.mark.parametrize(
    "kwargs, files",
    [
        ({"every_epoch": True}, {"model_0.pth", "model_1.pth", "model_2.pth"}),
        ({"every_epoch": 2}, {"model_0.pth", "model_2.pth"}),
        ({"at_end": True}, {"model.pth"}),
    ],
)
def test_what_is_saved_besides_the_best(kwargs, files, tmp_path):
    learn, _ = ours([Scripted([1.0, 2.0, 3.0]), learner.SaveModel(**kwargs)], path=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == files
    final = weights(learn.model)
    learn.load("model" if "at_end" in kwargs else "model_2", with_opt=False)
    assert torch.equal(weights(learn.model), final)


@pytest.mark.parametrize("with_opt", [True, False])
def test_the_optimizer_is_saved_with_the_model_where_asked(with_opt, tmp_path):
    learn, _ = ours([Scripted([1.0, 2.0, 3.0]), learner.SaveModel(with_opt=with_opt)], path=tmp_path)
    assert {float(s["step"]) for s in learn.opt.state.values()} == ({6.0} if with_opt else {18.0})


def test_nothing_is_loaded_where_nothing_was_better(tmp_path):
    learn, _ = ours([Scripted([math.nan] * 3), learner.SaveModel()], path=tmp_path)
    assert not list(tmp_path.iterdir())
    assert_same_weights(learn.model, ours()[0].model)
    with pytest.raises(ValueError, match="give one of them"):
        learner.SaveModel(every_epoch=True, at_end=True)


# --
# Recurrent models


class Recurrent(nn.Module):
    """Keeps its hidden state from batch to batch, and counts its resets."""

    def __init__(self, extra=True):
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.cell, self.head = nn.Embedding(5, 6), nn.RNN(6, 6, batch_first=True), nn.Linear(6, 5)
        self.extra, self.hidden, self.resets = extra, None, 0

    def reset(self):
        self.hidden, self.resets = None, self.resets + 1

    def forward(self, x):
        if self.hidden is not None and self.hidden.shape[1] != len(x):
            self.hidden = None
        raw, hidden = self.cell(self.embed(x), self.hidden)
        self.hidden = hidden.detach()
        pred = self.head(raw * 0.9)
        return (pred, [raw * 0, raw], [raw * 0, raw * 0.9]) if self.extra else pred


def sequences():
    gen = torch.Generator().manual_seed(4)
    x = torch.randint(5, (8, 6), generator=gen)
    data = torch.utils.data.TensorDataset(x, (x + 1) % 5)
    return torch.utils.data.DataLoader(data, batch_size=4), torch.utils.data.DataLoader(data, batch_size=4)


def sequence_loss(pred, y):
    return F.cross_entropy(pred.flatten(0, 1), y.flatten())


@pytest.mark.parametrize("alpha, beta", [(0.0, 0.0), (2.0, 0.0), (0.0, 3.0), (2.0, 3.0)])
def test_recurrent_models_are_regularized_as_fastai_does(alpha, beta):
    a = ours(learner.rnn_cbs(alpha, beta), Recurrent(), sequences(), loss_func=sequence_loss)
    b = theirs(fa.rnn_cbs(alpha, beta), Recurrent(), sequences(), loss_func=sequence_loss)
    assert_same(a, b)
    assert a[0].model.resets == b[0].model.resets
    training = [i % 4 < 2 for i in range(12)]
    differs = [x != y for x, y in zip(a[1].losses, a[1].minimized, strict=True)]
    assert differs == [t and bool(alpha or beta) for t in training]
    assert not hasattr(a[0].rnn, "raw_out")


def test_resetting_matters_between_epochs():
    """Without it, only the beginning of a fit resets a model, and epochs start from where validation ended."""
    with_reset = ours([learner.ModelResetter()], Recurrent(False), sequences(), loss_func=sequence_loss)
    without = ours([], Recurrent(False), sequences(), loss_func=sequence_loss)
    assert (with_reset[0].model.resets, without[0].model.resets) == (1 + 3 + 3 + 1, 1)
    assert with_reset[1].losses[:2] == without[1].losses[:2]
    assert with_reset[1].losses[2] != without[1].losses[2]


def test_a_single_point_in_time_has_no_change_to_regularize():
    x = torch.randint(5, (4, 1))
    _, seen = ours(learner.rnn_cbs(1.0, 1.0), Recurrent(), [[(x, x)]] * 2, loss_func=sequence_loss)
    assert all(map(math.isfinite, seen.minimized))


def test_a_regularizer_without_activations_is_refused():
    with pytest.raises(ValueError, match="use rnn_cbs"):
        ours([learner.RNNRegularizer(1.0)])


# --
# Averages of weights


class Steps(learner.Callback):
    """torch's own average, of the weights after each step; and losses under it."""

    order = 56

    def __init__(self, decay):
        self.decay = decay

    def before_fit(self):
        ema = torch.optim.swa_utils.get_ema_multi_avg_fn(self.decay)
        self.average = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=ema)
        self.average.update_parameters(self.model)
        self.equal = []

    def after_step(self):
        self.average.update_parameters(self.model)

    def after_epoch(self):
        self.equal.append(torch.equal(weights(self.model), weights(self.average.module)))


def test_validation_and_what_follows_see_the_average():
    ema, steps = learner.EMA(0.9), Steps(0.9)
    learn, seen = ours([ema, steps])
    assert steps.equal == [True] * 3
    assert_same_weights(learn.model, steps.average.module)
    plain, plain_seen = ours()
    assert not torch.equal(weights(learn.model), weights(plain.model))
    training = [i % 9 < 6 for i in range(27)]
    for i, is_training in enumerate(training):
        assert (seen.losses[i] == plain_seen.losses[i]) == is_training, i


def test_averages_do_not_touch_the_training_and_predictions_keep_them():
    learn, _ = ours([learner.EMA(0.9)])
    final = weights(learn.model).clone()
    learn.validate()
    learn.get_preds()
    assert torch.equal(weights(learn.model), final)
    assert learn.ema.average == [] and learn.ema.stored is None


def test_the_average_is_what_is_saved_as_best(tmp_path):
    learn, _ = ours([learner.EMA(0.9), Scripted([3.0, 2.0, 1.0]), learner.SaveModel()], path=tmp_path)
    averaged, _ = ours([learner.EMA(0.9)])
    assert torch.equal(weights(learn.model), weights(averaged.model))


def test_the_best_is_loaded_over_the_average_of_a_fit_that_was_stopped(tmp_path):
    class Stops(learner.Callback):
        def after_batch(self):
            if self.training and self.train_iter == 8:
                raise CancelFitException

    learn, _ = ours([learner.EMA(0.9), Stops(), learner.SaveModel()], path=tmp_path)
    saved = torch.load(learn.save_model.last_saved_path, weights_only=True)
    assert torch.equal(learn.model[0].weight, saved["0.weight"])


@pytest.mark.parametrize("event", ["after_pred", "before_step"])
def test_an_average_is_gone_after_an_error(event):
    """In the second epoch's validation or training: the model has its own weights, and can be trained on."""

    class Fails(learner.Callback):
        def __call__(self, name):
            if name == event and self.learn.epoch == 1 and self.learn.training == (event == "before_step"):
                self.at = self.learn.train_iter
                raise RuntimeError("broken")

    plain = []

    class Weights(learner.Callback):
        def after_step(self):
            plain.append(weights(self.model).clone())

    ours([Weights()])
    fails = Fails()
    model = net()
    with pytest.raises(RuntimeError, match="broken"):
        ours([learner.EMA(0.9), fails], model)
    assert torch.equal(weights(model), plain[fails.at - 1])


def test_an_average_that_forgets_nothing_is_refused():
    with pytest.raises(ValueError, match="less than 1"):
        learner.EMA(1.0)


# --
# Gradients that are released


def releasing(make=fusedopt.Adam, batch_bytes=0, **kwargs):
    """What makes an optimizer that steps parameters during the backward pass."""

    def opt_func(params, **hypers):
        opt = make(params, **hypers)
        opt.release_gradients(batch_bytes, **kwargs)
        return opt

    return opt_func


def assert_same_bits(a, b):
    """Of two trainings: losses, events, weights and state."""
    assert a[1].losses == b[1].losses and a[1].events == b[1].events
    assert torch.equal(weights(a[0].model), weights(b[0].model))
    for p, q in zip(a[0].model.parameters(), b[0].model.parameters(), strict=True):
        one, other = a[0].opt.state.get(p, {}), b[0].opt.state.get(q, {})
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


class Kept(learner.Callback):
    """Whether there are gradients after each backward pass."""

    def __init__(self):
        self.kept = []

    def after_backward(self):
        self.kept.append(any(p.grad is not None for p in self.model.parameters()))


@pytest.mark.parametrize("n_acc", [1, 7, 8, 1000])
def test_accumulation_keeps_gradients_that_would_be_released(n_acc):
    kept = Kept()
    a = ours([learner.GradientAccumulation(n_acc), kept], opt_func=releasing())
    b = ours([learner.GradientAccumulation(n_acc), Kept()], opt_func=fusedopt.Adam)
    assert_same_bits(a, b)
    assert set(kept.kept) == {1: {False}, 1000: {True}}.get(n_acc, {False, True})


@pytest.mark.parametrize("event", ["before_backward", "after_backward"])
@pytest.mark.parametrize("exception", [CancelBatchException, CancelEpochException])
def test_accumulation_that_is_cut_short_ends_with_its_batch(event, exception):
    """A batch without a step: what it has left is added to."""

    def cbs():
        return [learner.GradientAccumulation(8), CancelOnce(event, exception, 30)]

    a, b = (ours(cbs(), opt_func=opt_func) for opt_func in (releasing(), fusedopt.Adam))
    assert_same_bits(a, b)


def test_a_step_that_was_released_cannot_be_cancelled():
    cancel = CancelOnce("before_step", CancelStepException, 30)
    with pytest.raises(RuntimeError, match=r"was stepped in this pass.*call abandon\(\)"):
        ours([cancel], opt_func=releasing())


def test_a_fit_that_fails_is_followed_by_another():
    learn = learner.Learner(loaders(), net(), nn.CrossEntropyLoss(), releasing(), lr=0.02)
    last = next(learn.model.parameters())
    handle = last.register_hook(lambda g: 1 / 0)
    with learn.no_logging():
        with pytest.raises(ZeroDivisionError):
            learn.fit(1, cbs=learner.GradientAccumulation(1))
        handle.remove()
        learn.fit(1)
        assert all(p.grad is None for p in learn.model.parameters())


@pytest.mark.parametrize("amp_fused", [False, True])
@pytest.mark.parametrize("mode", ["fp16", "bf16"])
@pytest.mark.parametrize("n_acc", [1, 7])
def test_released_gradients_in_mixed_precision(n_acc, mode, amp_fused, fp16_on_cpu):
    make = partial(fusedopt.Adam, amp_fused=amp_fused)
    skip = {"skip": "batches"} if mode == "fp16" else {}

    def cbs():
        options = dict(init_scale=256.0, growth_interval=2) if mode == "fp16" else {}
        return [learner.MixedPrecision(mode, **options), learner.GradientAccumulation(n_acc)]

    a, b = (ours(cbs(), opt_func=opt_func) for opt_func in (releasing(make, **skip), make))
    assert_same_bits(a, b)
    assert a[0].opt.gradient_release.scaler is None


def test_infinities_are_found_in_released_gradients(fp16_on_cpu):
    """One parameter a batch; the scale goes down until none of its gradients is infinite."""
    learn, seen = ours(
        [learner.MixedPrecision(init_scale=2.0**24)], opt_func=releasing(skip="batches"), epochs=4
    )
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert {s["step"] for s in learn.opt.state.values()} != {4 * 9}
    assert seen.losses[-1] < seen.losses[0]


def test_clipping_of_released_gradients_is_refused():
    with pytest.raises(RuntimeError, match=r"GradientClip scales gradients.*max_grad_norm.*clip"):
        ours([learner.GradientClip(0.1)], opt_func=releasing())
    opt_func = releasing(partial(fusedopt.Adam, max_grad_norm=0.1), clip="last")
    learn, _ = ours(opt_func=opt_func)
    assert learn.opt.grad_norm.item() > 0
