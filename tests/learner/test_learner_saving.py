"""Validation, predictions, and Learners on disk."""

import copy
import inspect
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusedopt
from fusedopt import learner

with warnings.catch_warnings():
    # At import, fastai scripts a function (deprecated by torch) and sets an option that pandas has deprecated.
    warnings.simplefilter("ignore")
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader as FastaiLoader
    from fastai.learner import Learner as FastaiLearner
    from fastai.losses import CrossEntropyLossFlat

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning"),
]


def data(n, seed=1):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())


def loaders(**kwargs):
    train, valid = (torch.utils.data.DataLoader(data(n, n), batch_size=4, **kwargs) for n in (22, 10))
    return train, valid


def net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))


def accuracy(pred, y):
    return (pred.argmax(-1) == y).float().mean()


def new(path=".", dls=None, **kwargs):
    kwargs = {"loss_func": nn.CrossEntropyLoss(), "lr": 0.02, "metrics": accuracy} | kwargs
    return learner.Learner(dls or loaders(), net(), path=path, **kwargs)


def fit(learn, epochs, seed=3):
    torch.manual_seed(seed)
    with learn.no_logging():
        learn.fit(epochs)
    return learn


def weights(learn):
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


class Events(learner.Callback):
    def __init__(self):
        self.events, self.grad = [], set()

    def __call__(self, event):
        self.events.append(event)
        self.grad.add(torch.is_grad_enabled()) if event == "after_pred" else None


# --
# Validation and predictions


def fastai_twin(learn):
    """fastai's Learner with the same model and validation data."""
    dls = DataLoaders(*(FastaiLoader(dl.dataset, bs=4) for dl in learn.dls), device="cpu")
    return FastaiLearner(dls, learn.model, CrossEntropyLossFlat(), opt_func=fusedopt.Adam, metrics=accuracy)


def test_validates_and_predicts_as_fastai(capsys):
    learn = fit(new(), 2)
    theirs = fastai_twin(learn)
    assert learn.validate() == pytest.approx(list(theirs.validate()))
    learn.loss_func = CrossEntropyLossFlat()  # which has an activation
    capsys.readouterr()
    ours = learn.get_preds(with_input=True, with_loss=True)
    expected = theirs.get_preds(with_input=True, with_loss=True)
    assert len(ours) == len(expected) == 4
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.allclose(ours[1].sum(1), torch.ones(10))
    assert capsys.readouterr().out == ""


def test_an_inference_is_an_epoch_of_validation_without_gradients():
    events = Events()
    new(cbs=events).validate()
    one = ["before_batch", "after_pred", "after_loss", "after_batch"]
    assert events.events == [
        *("after_create", "before_fit", "before_epoch", "before_validate"),
        *3 * one,
        *("after_validate", "after_epoch", "after_fit"),
    ]
    assert events.grad == {False}


@pytest.mark.parametrize("call", ["validate", "get_preds"])
def test_the_model_is_left_in_its_mode_even_by_an_error(call):
    class Fails(learner.Callback):
        def after_batch(self):
            raise RuntimeError("broken")

        def clean_up(self):
            self.cleaned = True

    learn = new()
    learn.model.train()
    learn.model[1].eval()
    before = [m.training for m in learn.model.modules()]
    getattr(learn, call)()
    assert [m.training for m in learn.model.modules()] == before
    fails = Fails()
    with pytest.raises(RuntimeError, match="broken"):
        getattr(learn, call)(cbs=fails)
    assert [m.training for m in learn.model.modules()] == before
    assert fails.cleaned and fails not in learn.cbs and not learn.inferring and learn.pred is None


def test_an_inference_changes_nothing_of_a_training():
    a, b = fit(new(), 1), fit(new(), 1)
    a.validate()
    a.get_preds(0, with_loss=True)
    a.predict(torch.ones(3))
    fit(a, 1), fit(b, 1)
    assert torch.equal(weights(a), weights(b))
    assert len(a.recorder.losses) == 6


def test_training_data_is_predicted_in_its_order_and_to_its_end():
    learn = new(dls=loaders(shuffle=True, drop_last=True))
    x, preds, y = learn.get_preds(0, with_input=True)
    assert torch.equal(x, data(22, 22).tensors[0]) and torch.equal(y, data(22, 22).tensors[1])
    learn.model.eval()
    torch.testing.assert_close(preds, learn.model(x).detach())


def test_a_loader_without_targets_gives_none():
    learn = new()
    x = data(10, 10).tensors[0]
    preds, y = learn.get_preds(dl=[x[:5], x[5:]], act=lambda p: p.argmax(1))
    assert y is None and torch.equal(preds, learn.get_preds()[0].argmax(1))
    with pytest.raises(ValueError, match="no losses without targets"):
        learn.get_preds(dl=[x], with_loss=True)
    with pytest.raises(ValueError, match="no batches"):
        learn.get_preds(dl=[])


@pytest.mark.parametrize(
    "loss_func", [nn.CrossEntropyLoss(), F.cross_entropy, nn.CrossEntropyLoss(reduction="sum")]
)
def test_losses_are_of_items_and_the_loss_function_is_as_before(loss_func):
    learn = new(loss_func=loss_func)
    before = getattr(loss_func, "reduction", None)
    preds, y, losses = learn.get_preds(with_loss=True)
    torch.testing.assert_close(losses, F.cross_entropy(preds, y, reduction="none"))
    assert learn.loss_func is loss_func and getattr(loss_func, "reduction", None) == before


def test_losses_of_items_with_several_targets_are_averaged():
    x, y = torch.ones(4, 3), torch.arange(8.0).reshape(4, 2)
    learn = learner.Learner([[(x, y)]] * 2, nn.Linear(3, 2), nn.MSELoss())
    preds, _, losses = learn.get_preds(with_loss=True)
    torch.testing.assert_close(losses, ((preds - y) ** 2).mean(1))


class Pair(list):
    """Loaders that know what classes are called."""

    vocab = ("minus", "plus")


def test_one_item_is_predicted():
    learn = fit(new(dls=Pair(loaders())), 5)
    item = torch.tensor([5.0, 5.0, 5.0])
    label, decoded, pred = learn.predict(item)
    assert (label, int(decoded)) == ("plus", 1)
    learn.model.eval()
    torch.testing.assert_close(pred, learn.model(item[None])[0].detach())
    assert learn.predict(-item)[0] == "minus"
    learn.loss_func = CrossEntropyLossFlat()
    torch.testing.assert_close(learn.predict(item)[2], pred.softmax(0))


def test_one_item_of_several_inputs_is_predicted():
    class Times(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(3.0))

        def forward(self, a, b):
            return self.w * a * b

    class TwoInputs(list):
        n_inp = 2

    batch = torch.ones(4), torch.ones(4), torch.ones(4)
    learn = learner.Learner(TwoInputs([[batch], [batch]]), Times(), nn.MSELoss())
    assert [float(x) for x in learn.predict((2.0, 5.0))] == [30.0] * 3


# --
# Weights


def test_a_training_that_is_resumed_is_the_one_that_was_not_interrupted(tmp_path):
    whole = fit(fit(new(), 2), 2, seed=4)
    first = fit(new(tmp_path), 2)
    assert first.save("half") == tmp_path / "half.pth"
    resumed = new(tmp_path)
    nn.init.zeros_(resumed.model[0].weight)
    assert resumed.load("half") is resumed
    fit(resumed, 2, seed=4)
    assert torch.equal(weights(resumed), weights(whole))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)
    without = fit(new(tmp_path).load("half.pth", with_opt=False), 2, seed=4)
    assert not torch.equal(weights(without), weights(whole))


def test_a_file_is_safe_to_read(tmp_path):
    learn = fit(new(tmp_path), 1)
    state = torch.load(learn.save("both"), weights_only=True)
    assert state.keys() == {"model", "opt"}
    assert torch.load(learn.save("alone", with_opt=False), weights_only=True).keys() == state["model"].keys()
    assert torch.load(new(tmp_path).save("fresh"), weights_only=True).keys() == state["model"].keys()

    class Harm:
        def __reduce__(self):
            return pytest.fail, ("a file's code was run",)

    torch.save({"model": Harm()}, tmp_path / "harm.pth")
    with pytest.raises(ValueError, match=r"harm\.pth cannot be read"):
        learn.load("harm")


def flags_of(learn):
    states = [learn.opt.state[p] for p in learn.model.parameters()]
    return [(s.get("do_wd"), s.get("force_train")) for s in states]


def test_flags_of_parameters_are_saved(tmp_path):
    learn = fit(new(tmp_path), 1)
    again = new(tmp_path, wd_bn_bias=True, train_bn=False).load(learn.save("flags"))
    flags = flags_of(again)
    assert flags == flags_of(learn)
    assert (False, True) in flags and (None, None) in flags


def test_files_go_to_and_fro_with_fastai(tmp_path):
    ours = fit(new(tmp_path), 1)
    theirs = fastai_twin(new())
    theirs.path, theirs.model_dir = tmp_path, "."
    ours.save("ours")
    theirs.create_opt()
    theirs.load("ours")
    assert torch.equal(weights(theirs), weights(ours))
    theirs.opt.step()
    theirs.save("theirs", with_opt=False)
    back = new(tmp_path).load("theirs")
    assert torch.equal(weights(back), weights(theirs))


def test_what_cannot_be_loaded_is_named_with_a_remedy(tmp_path):
    learn = fit(new(tmp_path), 1)
    learn.save("there")
    learn.save("weights", with_opt=False)
    with pytest.raises(FileNotFoundError, match=r"gone\.pth does not exist.*there\.pth, weights\.pth"):
        learn.load("gone")
    with pytest.raises(ValueError, match=r"weights\.pth has no optimizer's state.*with_opt=False"):
        learn.load("weights", with_opt=True)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "there.pth").read_bytes()[:200])
    (tmp_path / "empty.pth").touch()
    for name in ("cut", "empty"):
        with pytest.raises(ValueError, match=rf"{name}\.pth cannot be read"):
            learn.load(name)
    other = learner.Learner(loaders(), nn.Linear(3, 2), nn.CrossEntropyLoss(), path=tmp_path)
    with pytest.raises(ValueError, match=r"there\.pth is of another model.*strict=False"):
        other.load("there")
    other.load("weights", strict=False)
    grouped = new(tmp_path, splitter=lambda m: [list(m[0].parameters()), list(m[1:].parameters())])
    with pytest.raises(ValueError, match=r"there\.pth is of another optimizer.*with_opt=False"):
        grouped.load("there")


def test_a_file_stays_as_it_was_when_writing_fails(tmp_path):
    learn = fit(new(tmp_path), 1)
    before = learn.save("kept").read_bytes()
    learn.model.state_dict = lambda: {"x": (i for i in ())}  # which no pickle takes
    with pytest.raises(TypeError):
        learn.save("kept")
    assert (tmp_path / "kept.pth").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["kept.pth"]


# --
# Learners


def test_an_exported_learner_predicts_alike_and_has_no_data(tmp_path):
    learn = fit(
        new(tmp_path, dls=Pair(loaders()), cbs=[learner.DeviceCallback("cpu"), learner.GradientClip()]), 1
    )
    opt, dls, x = learn.opt, learn.dls, torch.ones(3)
    path = learn.export()
    assert learn.opt is opt and learn.dls is dls
    again = learner.load_learner(path)
    assert [type(cb) for cb in again.cbs] == [type(cb) for cb in learn.cbs]
    assert all(cb.learn is again for cb in again.cbs)
    assert again.opt is None
    assert again.predict(x)[0] == learn.predict(x)[0]
    torch.testing.assert_close(again.predict(x)[2], learn.predict(x)[2])
    with pytest.raises(ValueError, match=r"learn\.dls = \(train, valid\)"):
        fit(again, 1)
    again.dls = learn.dls
    fit(again, 1)
    assert not torch.equal(weights(again), weights(learn))


def test_data_and_optimizer_are_not_in_the_file(tmp_path):
    big = torch.utils.data.TensorDataset(torch.randn(50_000, 3), torch.zeros(50_000, dtype=torch.long))
    loader = torch.utils.data.DataLoader(big, batch_size=50_000)
    learn = fit(new(tmp_path, dls=(loader, loader)), 1)
    assert learn.export("small.pkl").stat().st_size < 100_000


def test_hooks_of_callbacks_are_not_in_the_file(tmp_path):
    class Hooked(learner.Callback):
        def hook(self):
            self.handle = self.learn.model.register_forward_hook(lambda *_: None)

        def clean_up(self):
            self.__dict__.pop("handle").remove()

    hooked = Hooked()
    learn = new(tmp_path)
    learn.add_cb(hooked)
    hooked.hook()
    learn.cbs.remove(hooked), delattr(learn, "hooked")
    with pytest.raises(ValueError, match="cannot be written"):
        learn.export()
    learn.add_cb(hooked)
    with pytest.raises(ValueError, match="Hooked"):  # a class that is no module's
        learn.export()
    assert not learn.model._forward_hooks
    learn.cbs.remove(hooked), delattr(learn, "hooked")
    learn.export()


def test_what_cannot_be_pickled_is_said_and_leaves_no_file(tmp_path):
    learn = new(tmp_path, loss_func=lambda p, y: F.cross_entropy(p, y))
    dls = learn.dls
    with pytest.raises(ValueError, match=r"export\.pkl cannot be written: .*lambda.*no lambdas"):
        learn.export()
    assert learn.dls is dls and not list(tmp_path.iterdir())


class Recurrent(nn.Module):
    """Gives what recurrent models give."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        out = self.layer(x)
        return out, [out[:, None].expand(-1, 2, -1)], [out[:, None]]

    def reset(self):
        pass


def seen(cb):
    """A function of a callback's."""


MADE = {
    "BatchTransform": lambda: learner.BatchTransform(torch.neg),
    "Callback": lambda: learner.Callback(after_batch=seen),
    "DeviceCallback": lambda: learner.DeviceCallback("cpu"),
    "MixedPrecision": lambda: learner.MixedPrecision("bf16"),
    "ParamScheduler": lambda: learner.ParamScheduler(
        {"lr": learner.combine_scheds([0.3, 0.7], [learner.sched_lin(0, 1e-2), learner.sched_cos(1e-2, 0)])}
    ),
    "RNNRegularizer": lambda: learner.rnn_cbs(1.0, 1.0),
    "RNNCallback": lambda: learner.rnn_cbs(),
}
"""Those that need an argument, or company; the others are made without."""
SHIPPED = [
    name
    for name, x in vars(learner).items()
    if isinstance(x, type) and issubclass(x, learner.Callback) and not inspect.isabstract(x)
]
COPIED = {
    "export": lambda learn: learner.load_learner(learn.export()),
    "pickle": lambda learn: pickle.loads(pickle.dumps(learn)),
    "deepcopy": copy.deepcopy,
}


def with_shipped(name, path):
    cbs = MADE.get(name, getattr(learner, name))()
    model = Recurrent() if name.startswith(("RNN", "ModelResetter")) else net()
    if name == "ModelResetter":
        cbs = [cbs, learner.RNNCallback()]
    default = {"default_cbs": False} if name in ("Recorder", "TrainEval") else {}
    cbs = [learner.TrainEval(), learner.Recorder()] if default else cbs
    return learner.Learner(
        loaders(), model, nn.CrossEntropyLoss(), cbs=cbs, metrics=accuracy, path=path, lr=0.01, **default
    )


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("fitted", [0, 1])
@pytest.mark.parametrize("how", COPIED)
def test_learners_with_every_shipped_callback_are_copied(name, fitted, how, tmp_path, capsys):
    learn = with_shipped(name, tmp_path)
    if fitted:
        fit(learn, 1)
    again = COPIED[how](learn)
    assert [type(cb) for cb in again.cbs] == [type(cb) for cb in learn.cbs] and len(learn.cbs) >= 2
    assert all(cb.learn is again for cb in again.cbs) and all(cb.learn is learn for cb in learn.cbs)
    torch.testing.assert_close(again.get_preds(dl=learn.dls[1])[0], learn.get_preds()[0])
    again.dls = learn.dls
    for each in (learn, again):
        if how == "export":
            each.opt = None  # which is not in the file
        fit(each, 1)
    assert torch.equal(weights(again), weights(learn))
    pickle.loads(pickle.dumps(learn.cbs))


class Exports(learner.Callback):
    order = 200

    def after_batch(self):
        if self.training and self.iter == 1:
            self.learn.export(f"{self.epoch}.pkl")


@pytest.mark.parametrize("name", SHIPPED)
def test_an_export_in_a_fit_changes_nothing_of_it_or_is_refused(name, tmp_path):
    plain, learn = fit(with_shipped(name, tmp_path), 2), with_shipped(name, tmp_path)
    learn.add_cb(Exports)
    if cleaning := [cb for cb in learn.cbs if type(cb).clean_up is not learner.Callback.clean_up]:
        with pytest.raises(ValueError, match=f"export in a fit would end what .* do in it: {cleaning[0]!r}"):
            fit(learn, 2)
        assert not list(tmp_path.glob("*.pkl"))
        learn.remove_cb(Exports)
        fit(learn, 1).export()
        return
    fit(learn, 2)
    assert torch.equal(weights(learn), weights(plain)) and learn.recorder.values == plain.recorder.values
    assert learner.load_learner(tmp_path / "1.pkl").predict(torch.ones(3))


@pytest.mark.parametrize("name", ["ParamScheduler", "LRFinder"])
def test_predicting_is_no_training_to_schedules(name, tmp_path):
    learn = fit(with_shipped(name, tmp_path), 1)
    before = {key: list(values) for key, values in learn.recorder.hps.items()}
    learn.get_preds()
    learn.validate()
    assert learn.recorder.hps == before and len(before["lr"]) == 6


def test_most_of_the_names_are_callbacks():
    """Or the test above would look at none."""
    assert len(SHIPPED) > 20 and {"EMA", "Progress", "LRFinder", "ActivationStats"} < set(SHIPPED)


def test_a_silent_learner_is_copied(tmp_path):
    learn = with_shipped("Recorder", tmp_path)
    with learn.no_logging():
        assert type(pickle.loads(pickle.dumps(learn))) is learner.Learner


HELPERS = {
    "lin": learner.sched_lin(0.1, 0.2),
    "cos": learner.SchedCos(0.1, 0.2),
    "no": learner.sched_no(0.1, 0.2),
    "exp": learner.SchedExp(0.1, 0.2),
    "poly": learner.sched_poly(0.1, 0.2, 3),
    "combined": learner.combine_scheds([0.25, 0.75], [learner.sched_no(1, 2), learner.sched_lin(2, 3)]),
    "combined of combined": learner.combine_scheds([0.5, 0.5], [learner.combined_cos(0.3, 1, 2, 0)] * 2),
    "per group": learner.combined_cos(0.25, *(np.array([i, 2.0 * i]) for i in (1, 5, 0))),
}


@pytest.mark.parametrize("name", HELPERS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_schedules_are_copied(name, copied):
    schedule = HELPERS[name]
    for pos in (0.0, 0.1, 0.25, 0.5, 0.99, 1.0):
        assert np.array_equal(copied(schedule)(pos), schedule(pos))


@pytest.mark.parametrize(
    "metric",
    [
        learner.AvgMetric(accuracy),
        learner.AvgLoss(),
        learner.AvgSmoothLoss(),
        learner.ValueMetric(sum, "total"),
    ],
    ids=lambda m: m.name,
)
def test_metrics_are_copied(metric):
    for again in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert type(again) is type(metric) and again.name == metric.name


def test_only_a_learner_is_loaded_as_one(tmp_path):
    learn = fit(new(tmp_path), 1)
    with pytest.raises(ValueError, match=r"w\.pth has no Learner but a .*learn\.load"):
        learner.load_learner(learn.save("w"))
    with pytest.raises(FileNotFoundError, match=r"none\.pkl does not exist"):
        learner.load_learner(tmp_path / "none.pkl")


def test_a_learner_is_loaded_by_another_process(tmp_path):
    learn = new(tmp_path, loss_func=F.cross_entropy, metrics=None)
    path = learn.export()
    code = f"from fusedopt.learner import load_learner; print(load_learner({str(path)!r}).predict([1.0, 2.0, 3.0]))"
    code = code.replace("[1.0, 2.0, 3.0]", "__import__('torch').ones(3)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(learn.predict(torch.ones(3)))
