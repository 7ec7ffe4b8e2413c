"""Looking inside a model: hooks, activation statistics, lesson 10's layers, the summary, and what is mistaken."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections import OrderedDict, namedtuple
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

plt = pytest.importorskip("matplotlib.pyplot")

import fusedopt  # noqa: E402
from fusedopt.learner import (  # noqa: E402
    ActivationStats,
    Callback,
    CancelFitException,
    GeneralRelu,
    Hook,
    Hooks,
    Interpretation,
    Learner,
    RunningBatchNorm,
    hook_output,
    hook_outputs,
)
from fusedopt.learner.batches import mapped  # noqa: E402

with warnings.catch_warnings():
    # At import, fastai scripts a function (deprecated by torch) and sets an option that pandas has deprecated.
    warnings.simplefilter("ignore")
    from fastai.callback.hook import ActivationStats as FastaiStats
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner as FastaiLearner

pytestmark = pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def pairs(n=24, bs=8):
    """Loaders of points on a plane, and which side of a line they are on."""
    x = torch.randn(n, 2)
    data = TensorDataset(x, (x[:, 0] > x[:, 1]).long())
    return DataLoader(data, bs, shuffle=True), DataLoader(data, bs)


def net():
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))


def learner(cbs=None, model=None, **kwargs):
    learn = Learner(pairs(), model or net(), nn.CrossEntropyLoss(), lr=0.1, cbs=cbs, **kwargs)
    learn.logger = lambda *_: None
    return learn


def hooked(model):
    """How many hooks a model's modules have."""
    return sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())


class Stop(Callback):
    """Raises in the second batch."""

    def __init__(self, error):
        self.error = error

    def after_pred(self):
        if self.iter == 1:
            raise self.error


# ------------------------------------------------------------------------------------------------------------
# Hooks


def test_a_hook_keeps_what_its_function_returns():
    layer, x = nn.Linear(3, 2), torch.randn(5, 3)
    with Hook(layer, lambda module, given, out: (module, given[0], out)) as hook:
        y = layer(x)
    module, given, out = hook.stored
    assert module is layer and torch.equal(given, x) and torch.equal(out, y)
    assert y.requires_grad and not out.requires_grad


def test_hooks_leave_when_the_block_does_however_it_is_left():
    model = net()
    with pytest.raises(ZeroDivisionError), Hooks(model, lambda *_: 1 / 0) as hooks:
        assert hooked(model) == len(hooks) == 3
        model(torch.randn(1, 2))
    assert hooked(model) == 0
    with pytest.raises(AttributeError):
        Hooks([*model, "no module"], lambda *_: None)
    assert hooked(model) == 0


def test_outputs_and_gradients_are_kept():
    model, x = net(), torch.randn(3, 2)
    with hook_outputs(model) as outputs, hook_output(model[2], grad=True) as gradient:
        y = model(x)
        y.square().sum().backward()
    assert torch.equal(outputs.stored[1], model[0](x).relu()) and torch.equal(outputs[2].stored, y)
    assert torch.allclose(gradient.stored[0], 2 * y)
    assert [hook.stored.requires_grad for hook in outputs] == [False] * 3


def test_structures_of_tensors_are_detached():
    lstm = nn.LSTM(2, 3)
    with hook_output(lstm) as kept, hook_output(lstm, detach=False) as attached:
        lstm(torch.randn(4, 1, 2))
    out, (h, _) = kept.stored
    assert not out.requires_grad and not h.requires_grad and attached.stored[1][0].requires_grad


Named = namedtuple("Named", "out state")


class Gives(nn.Module):
    """Gives its input in some structure."""

    def __init__(self, structure):
        super().__init__()
        self.structure = structure
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, *rest):
        return self.structure(x * self.weight)


STRUCTURES = {
    "a tensor": lambda x: x,
    "a tuple": lambda x: (x, x + 1),
    "a list": lambda x: [x, (x, [x])],
    "a dict": lambda x: {"a": x, "b": (x, None, 3)},
    "an ordered dict": lambda x: OrderedDict(a=x),
    "a named tuple": lambda x: Named(x, (x, x)),
    "what torch.max gives": lambda x: x.max(1),
    "a packed sequence": lambda x: nn.utils.rnn.pack_sequence([x[0], x[1]]),
    "None": lambda x: None,
}


def tensors_of(x):
    found = []
    mapped(x, lambda t: (found.append(t), t)[1])
    return found


def kinds(x):
    """The types of a structure's parts."""
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else ()
    return type(x), [kinds(part) for part in parts]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("options", [{}, {"cpu": True}, {"detach": False}])
def test_hooks_get_what_torchs_give(structure, options):
    model, x, seen = Gives(STRUCTURES[structure]), torch.randn(2, 3), []
    handle = model.register_forward_hook(lambda module, given, out: seen.append(kinds((given, out))))
    with Hook(model, lambda module, given, out: (kinds((given, out)), out), **options) as hook:
        model(x, (x, [x]))
    handle.remove()
    found, out = hook.stored
    assert [found] == seen
    assert all(t.requires_grad == ("detach" in options) for t in tensors_of(out) if t.is_floating_point())


def test_hooks_get_gradients_as_torchs_give_them():
    layer, seen = nn.Linear(3, 2), []
    handle = layer.register_full_backward_hook(lambda module, given, out: seen.append(kinds((given, out))))
    with Hook(layer, lambda module, given, out: kinds((given, out)), is_forward=False) as hook:
        layer(torch.randn(5, 3, requires_grad=True)).sum().backward()
    handle.remove()
    assert [hook.stored] == seen


# ------------------------------------------------------------------------------------------------------------
# Activation statistics


class Fixed(nn.Module):
    """Gives what it is given, with a parameter that does nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + 0 * self.weight


def fixed_learner(rows, **kwargs):
    dl = DataLoader(TensorDataset(torch.tensor(rows), torch.zeros(len(rows))), 1)
    stats = ActivationStats(**kwargs)
    learn = Learner((dl, dl), Fixed(), lambda pred, _: pred.sum(), cbs=stats)
    learn.logger = lambda *_: None
    return learn, stats


def test_statistics_of_known_activations():
    learn, stats = fixed_learner([[-2.0, 0.04, 0.06, 9.9], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 20.0]])
    learn.fit(1)
    means, stds, near_zero = stats.layer_stats(0)
    assert means == pytest.approx([2.0, 1.0, 5.0])
    assert stds == pytest.approx([math.sqrt((16 + 1.96**2 + 1.94**2 + 7.9**2) / 3), 0.0, 10.0])
    assert near_zero == pytest.approx([0.5, 0.0, 0.75])  # negative values are dead, too
    hist = stats.hist(0).expm1().round()
    assert hist.shape == (40, 3)  # neither validation nor other batches
    assert {i: int(n) for i, n in enumerate(hist[:, 0]) if n} == {0: 2, 8: 1, 39: 1}
    assert hist.sum(0).tolist() == [4, 4, 3]  # 20 is outside


@pytest.mark.filterwarnings(
    "ignore:(?s).*You are shadowing an attribute"
)  # which is fastai's callback itself
@pytest.mark.parametrize("every", [1, 2])
def test_statistics_are_fastais(every):
    """Of the same model on the same batches: means, unbiased deviations, shares up to 0.05 with all negatives."""
    x = torch.randn(14, 2, generator=torch.Generator().manual_seed(0))
    dl = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 4)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 2))
    stats, theirs = ActivationStats(every=every), FastaiStats(every=every)
    learn = Learner((dl, dl), copy.deepcopy(model), nn.CrossEntropyLoss(), cbs=stats, lr=0.1)
    fastais = FastaiLearner(
        DataLoaders(dl, dl, device="cpu"), model, F.cross_entropy, fusedopt.Adam, cbs=theirs, lr=0.1
    )
    for each in (learn, fastais):
        with each.no_logging():
            each.fit(2)
    assert len(stats.stats) == len(theirs.stats[0]) == 3
    for i in range(3):
        ours = stats.layer_stats(i)
        assert len(ours[0]) == 8 // every
        assert ours == [pytest.approx(list(each), rel=1e-5, abs=1e-6) for each in theirs.layer_stats(i)]


def test_the_deviation_of_one_value_is_none():
    learn, stats = fixed_learner([[1.0], [2.0]])
    learn.fit(1)
    assert all(map(math.isnan, stats.layer_stats(0)[1])) and stats.layer_stats(0)[0] == [1.0, 2.0]


@pytest.mark.parametrize(
    "structure", ["a tuple", "a list", "a dict", "a named tuple", "what torch.max gives"]
)
def test_statistics_of_a_layer_that_gives_several(structure):
    dl = DataLoader(TensorDataset(torch.tensor([[3.0, 5.0]]), torch.zeros(1)), 1)
    stats = ActivationStats()
    learn = Learner(
        (dl, dl), Gives(STRUCTURES[structure]), lambda pred, _: tensors_of(pred)[0].sum(), cbs=stats
    )
    learn.logger = lambda *_: None
    learn.fit(1)
    assert stats.layer_stats(0)[0] == [5.0 if "max" in structure else 4.0]


def test_each_second_batch_of_the_last_fit():
    learn, stats = fixed_learner([[1.0], [2.0], [3.0]], every=2)
    learn.fit(1)
    learn.fit(2)
    assert stats.layer_stats(0)[0] == [1.0, 3.0, 2.0]


@pytest.mark.parametrize(
    "error", [None, CancelFitException(), ValueError("no"), KeyboardInterrupt()], ids=repr
)
def test_statistics_leave_no_hooks_behind(error):
    stats = ActivationStats()
    learn = learner([stats, Stop(error)] if error else stats)
    with (
        pytest.raises(type(error))
        if isinstance(error, (ValueError, KeyboardInterrupt))
        else contextlib.nullcontext()
    ):
        learn.fit(1)
    assert len(stats.layer_stats(0)[0]) == (2 if error else 3)
    assert hooked(learn.model) == 0


def test_statistics_outlive_a_validation():
    stats = ActivationStats()
    learn = learner(stats)
    learn.fit(1)
    learn.validate()
    assert len(stats.layer_stats(0)[0]) == 3 and hooked(learn.model) == 0


def test_layers_are_chosen():
    model = net()
    chosen = {
        ("0 Linear", "2 Linear"): {},
        ("1 ReLU",): {"mod_filter": lambda m: isinstance(m, nn.ReLU)},
        ("2 Linear", "0 Linear"): {"modules": [model[2], model[0]]},
    }
    for names, kwargs in chosen.items():
        stats = ActivationStats(**kwargs)
        with learner(model=model).added_cbs(stats) as learn:
            learn.fit(1)
        assert tuple(stats.names) == names
        assert len(stats.layer_stats(len(names) - 1)[0]) == 3


def test_statistics_say_what_is_missing():
    with pytest.raises(ValueError, match="every=0"):
        ActivationStats(every=0)
    with pytest.raises(ValueError, match="no layer"):
        learner(ActivationStats(mod_filter=lambda m: False)).fit(1)
    with pytest.raises(RuntimeError, match="fit with it first"):
        ActivationStats().color_dim()


def test_the_three_pictures():
    stats = ActivationStats(mod_filter=lambda m: not isinstance(m, nn.Sequential))
    learner().fit(2, cbs=stats)
    mean, std = stats.plot_stats()
    assert [list(line.get_ydata()) for line in mean.lines] == [stats.layer_stats(i)[0] for i in range(3)]
    assert [list(line.get_ydata()) for line in std.lines] == [stats.layer_stats(i)[1] for i in range(3)]
    assert [text.get_text() for text in std.get_legend().texts] == stats.names
    colors, dead = stats.color_dim(), stats.dead_chart()
    assert [ax.get_title() for ax in colors] == [ax.get_title() for ax in dead] == stats.names
    assert all(
        torch.equal(torch.tensor(ax.images[0].get_array()), stats.hist(i)) for i, ax in enumerate(colors)
    )
    assert list(dead[1].lines[0].get_ydata()) == stats.layer_stats(1)[2]
    assert max(stats.layer_stats(1)[2]) > 0.2  # a relu's


def test_a_layer_that_never_runs_has_an_empty_picture():
    model = Tied()
    stats = ActivationStats([model.idle, model.twice])
    learner(stats, model).fit(1)
    assert stats.layer_stats(0) == [[], [], []]
    idle, twice = stats.color_dim()
    assert idle.images[0].get_array().max() == 0 < twice.images[0].get_array().max()
    assert [len(ax.lines[0].get_ydata()) for ax in stats.dead_chart()] == [0, 6]  # it runs twice in a batch


# ------------------------------------------------------------------------------------------------------------
# Layers


def test_general_relu():
    x = torch.tensor([-10.0, 0.0, 1.0, 10.0])
    assert torch.equal(GeneralRelu()(x), x.relu())
    assert GeneralRelu(leak=0.1, sub=0.5, maxv=6.0)(x).tolist() == [-1.5, -0.5, 0.5, 6.0]
    assert x.tolist() == [-10.0, 0.0, 1.0, 10.0]


def test_the_first_batch_is_normalized_by_itself():
    x = 3 + 2 * torch.randn(32, 4, 5, 5)
    ours, theirs = RunningBatchNorm(4), nn.BatchNorm2d(4)
    assert torch.equal(ours.eval()(x), x / math.sqrt(1 + 1e-5))
    assert torch.allclose(ours.train()(x), theirs(x), atol=1e-5)


def test_averages_are_of_sums_weighted_by_size_and_debiased():
    """Written out as the lesson has it: averages from zero, and all divided by the weight that is in them."""
    layer = RunningBatchNorm(2, mom=0.2)
    batches = [torch.randn(n, 2, 3, 3).double() * n + n for n in (2, 16, 5)]
    sums = sqrs = count = total = 0.0
    for x in batches:
        w = 1 - 0.8 / math.sqrt(len(x) - 1)
        sums, sqrs, count, total = (
            (1 - w) * old + w * new
            for old, new in (
                (sums, x.sum((0, 2, 3))),
                (sqrs, x.square().sum((0, 2, 3))),
                (count, 9 * len(x)),
                (total, 1),
            )
        )
        y = layer(x.float())
    assert torch.allclose(layer.sums.double(), sums / total, rtol=1e-5)
    assert torch.allclose(layer.sqrs.double(), sqrs / total, rtol=1e-5)
    assert float(layer.count) == pytest.approx(count / total) and float(layer.items) == 23
    mean = (sums / count).view(2, 1, 1)
    var = (sqrs / count).view(2, 1, 1) - mean**2
    assert torch.allclose(y.double(), (batches[-1] - mean) / (var + layer.eps).sqrt(), atol=1e-4)
    assert torch.equal(layer.eval()(batches[-1].float()), y)


def test_variance_has_a_floor_for_the_first_items_only():
    layer, x = RunningBatchNorm(1), torch.tensor([[[[1.0]]], [[[1.001]]]])
    assert layer(x).abs().max() < 0.01
    for _ in range(9):
        y = layer(x)
    assert int(layer.items) == 20 and y.abs().max() > 0.1


def test_gradients_flow_through_the_batch_at_hand():
    layer, x = RunningBatchNorm(3), torch.randn(2, 3, 2, 2, requires_grad=True)
    layer(x.detach() + 1)
    layer.double()

    def run(x):
        return copy.deepcopy(layer)(x)

    assert torch.autograd.gradcheck(run, (x.detach().double().requires_grad_(),))
    layer(x.double()).sum().backward()
    layer(x.double()).sum().backward()  # no earlier graph is needed
    assert not any(buffer.requires_grad for buffer in layer.buffers())


def test_running_batch_norm_is_a_normalization_layer_with_a_state():
    model = nn.Sequential(nn.Linear(2, 4), RunningBatchNorm(4), nn.Linear(4, 2))
    learn = learner(model=model)
    learn.fit(1)
    assert (
        learn.opt.state[model[1].weight]["do_wd"] is False and learn.opt.state[model[1].weight]["force_train"]
    )
    again = nn.Sequential(nn.Linear(2, 4), RunningBatchNorm(4), nn.Linear(4, 2))
    again.load_state_dict(model.state_dict())
    x = torch.randn(3, 2)
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_normalized_in_the_buffers_precision(dtype):
    x = (300 + torch.randn(4, 2, 8, 8)).to(dtype)  # the squares' sum is beyond float16
    y = RunningBatchNorm(2)(x)
    assert y.dtype == dtype and torch.allclose(y.float(), RunningBatchNorm(2)(x.float()), atol=0.02)


# ------------------------------------------------------------------------------------------------------------
# Summary


class Tied(nn.Module):
    """A parameter of its own, one layer twice, one that never runs, and two that share a weight."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2))
        self.twice, self.tied, self.idle = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 7)
        self.tied.weight = self.twice.weight
        self.noise = nn.Dropout()

    def forward(self, x):
        return self.tied(self.noise(self.twice(self.twice(x)))) + self.shift


def test_the_summary_counts_every_parameter_once():
    learn = learner(model=Tied(), opt_func=partial(fusedopt.SGD, mom=0.9))
    learn.model.noise.eval()
    learn.model.tied.bias.requires_grad_(False)
    random = torch.get_rng_state()
    rows = [tuple(line.split()) for line in learn.summary().splitlines()]
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in learn.model.modules()] == [True, True, True, True, False]
    assert rows[2:9] == [
        ("twice", "(Linear)", "8", "x", "2", "6", "yes"),
        ("twice", "(Linear)", "8", "x", "2"),
        ("noise", "(Dropout)", "8", "x", "2"),
        ("tied", "(Linear)", "8", "x", "2", "2", "no"),
        ("(Tied)", "8", "x", "2", "2", "yes"),
        ("(in", "no", "layer", "above)", "21", "yes"),
        ("-" * len(learn.summary().splitlines()[1]),),
    ]
    text = repr(learn.summary())
    assert "Total params: 31\nTotal trainable params: 29\nTotal non-trainable params: 2\n" in text
    assert "Optimizer: SGD\nLoss function: CrossEntropyLoss()\nCallbacks: TrainEval, Recorder" in text
    assert hooked(learn.model) == 0 and "Frozen" not in text


def test_the_summary_says_what_is_frozen():
    learn = learner(splitter=lambda m: [list(m[0].parameters()), list(m[2].parameters())])
    learn.freeze()
    lines = learn.summary().splitlines()
    assert lines[2].endswith("12  no") and lines[4].endswith("10  yes")
    assert "Frozen up to parameter group 1" in lines


def test_a_model_that_fails_is_left_as_it_was():
    learn = learner(model=nn.Sequential(nn.Linear(2, 4), nn.Linear(3, 2)))
    with pytest.raises(RuntimeError):
        learn.summary()
    assert hooked(learn.model) == 0 and learn.model.training


# ------------------------------------------------------------------------------------------------------------
# Interpretation

SCORES = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 3, 0], [0, 0, 1], [5, 0, 0], [0, 2, 0]])
TARGETS = torch.tensor([0, 1, 0, 2, 2, 0])


@pytest.fixture
def found():
    return Interpretation(SCORES, TARGETS, F.cross_entropy(SCORES, TARGETS, reduction="none"), "abc")


def test_confusion(found):
    assert found.confusion_matrix().tolist() == [[1, 2, 0], [0, 1, 0], [1, 0, 1]]
    assert found.most_confused() == [("a", "b", 2), ("c", "a", 1)]
    assert found.most_confused(min_val=2) == [("a", "b", 2)]
    assert len(found.most_confused(min_val=0)) == 2


def test_ignored_targets_are_in_no_class():
    ignored = Interpretation(SCORES, torch.tensor([0, 1, -100, 2, 2, 3]), torch.zeros(6))
    assert ignored.confusion_matrix().tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]


def test_top_losses(found):
    losses, items = found.top_losses(2)
    assert items.tolist() == [4, 2] and losses[0] > losses[1] > 3
    assert found.top_losses(1, largest=False)[1].tolist() == [0]
    assert len(found.top_losses()[0]) == len(found.top_losses(99)[0]) == 6


def test_the_picture_of_confusion(found):
    ax = found.plot_confusion_matrix()
    assert [text.get_text() for text in ax.texts] == ["1", "2", "1", "1", "1"], "and no zeros"
    assert [text.get_position() for text in ax.texts] == [(0, 0), (1, 0), (1, 1), (0, 2), (2, 2)]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b", "c"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Predicted", "Actual")
    shares = found.plot_confusion_matrix(normalize=True, norm_dec=1)
    assert [text.get_text() for text in shares.texts] == ["0.3", "0.7", "1.0", "0.5", "0.5"]
    assert not found.plot_confusion_matrix(plot_txt=False).texts


@pytest.mark.parametrize("loss_func", [nn.CrossEntropyLoss(), F.cross_entropy], ids=["module", "function"])
def test_predictions_come_from_the_learner(loss_func):
    class Flip(Callback):
        """A change to the batch, as a callback may make one."""

        def before_batch(self):
            self.learn.xb = (-self.xb[0],)

    learn = learner(Flip())
    learn.loss_func = loss_func
    learn.model[1].eval()
    found = Interpretation.from_learner(learn)
    x, y = learn.dls[1].dataset.tensors
    preds = learn.model(-x)
    assert torch.allclose(found.preds, preds, atol=1e-6) and torch.equal(found.targs, y)
    assert torch.allclose(found.losses, F.cross_entropy(preds, y, reduction="none"), atol=1e-6)
    assert not found.preds.requires_grad and learn.pred is None
    assert [m.training for m in learn.model.modules()] == [True, True, False, True]
    assert getattr(loss_func, "reduction", "mean") == "mean"
    assert len(learn.cbs) == 3  # nothing of it stays


def test_another_loader_and_its_names():
    learn = learner()
    x, y = learn.dls[1].dataset.tensors
    found = Interpretation.from_learner(
        learn, dl=DataLoader(TensorDataset(x[:5], y[:5]), 2), vocab=["no", "yes"]
    )
    assert len(found.preds) == 5 and found.vocab == ["no", "yes"]
    assert len(Interpretation.from_learner(learn, ds_idx=0).preds) == 24


def test_interpretation_says_what_is_wrong():
    with pytest.raises(ValueError, match="2 names"):
        Interpretation(SCORES, TARGETS, torch.zeros(6), vocab=["a", "b"])
    with pytest.raises(ValueError, match="classes"):
        Interpretation(SCORES[:, 0], TARGETS, torch.zeros(6))
    learn = learner()
    learn.loss_func = lambda pred, targ, reduction="mean": F.cross_entropy(pred, targ)
    with pytest.raises(ValueError, match=r"24 predictions.*reduction"):
        Interpretation.from_learner(learn)
