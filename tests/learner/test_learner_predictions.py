"""Predictions and interpretations of any loader: of torch or fastai, shuffled or not, with tensors, dicts and text."""

import functools
import warnings
from collections import UserDict, defaultdict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import fusedopt
from fusedopt import learner as fl

with warnings.catch_warnings():
    # At import, fastai scripts a function (deprecated by torch) and sets an option that pandas has deprecated.
    warnings.simplefilter("ignore")
    import fastai.learner as theirs
    from fastai.callback.data import PartialDL, WeightedDL
    from fastai.data.core import DataLoaders, Datasets, TfmdDL
    from fastai.data.load import DataLoader as FastaiLoader
    from fastai.data.transforms import Categorize
    from fastai.interpret import ClassificationInterpretation
    from fastai.losses import CrossEntropyLossFlat
    from fastai.text.data import SortedDL, TensorText, pad_input
    from fastai.torch_core import TensorCategory, TensorImage

# fastai gives a progress bar to every Learner that will be made, those of other test files as well.
theirs.defaults.callbacks = [cb for cb in theirs.defaults.callbacks if cb.__name__ != "ProgressCallback"]

N = 22


pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(n=N):
    """Two inputs per item, and the item's number as target."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, torch.arange(float(n))[:, None])


def make(dls=None, model=None, loss_func=None, **kwargs):
    torch.manual_seed(0)
    dls = dls or (DataLoader(numbers(), 4), DataLoader(numbers(), 4))
    learn = fl.Learner(dls, model or nn.Linear(2, 1), loss_func or nn.MSELoss(), **kwargs)
    learn.logger = lambda *_: None
    return learn


def numbers_of(targets):
    return [int(y) for y in targets.flatten()]


# --
# The order of predictions

WHOLE = list(range(N))
TORCHS = {
    "in order": (lambda ds: DataLoader(ds, 4), WHOLE),
    "shuffled": (lambda ds: DataLoader(ds, 4, shuffle=True), WHOLE),
    "shuffled, without its end": (lambda ds: DataLoader(ds, 4, shuffle=True, drop_last=True), WHOLE),
    "without its end": (lambda ds: DataLoader(ds, 4, drop_last=True), WHOLE),
    "a subset": (
        lambda ds: DataLoader(ds, 4, sampler=SubsetRandomSampler([9, 3, 17, 4, 8])),
        [3, 4, 8, 9, 17],
    ),
    "numbers of torch's": (
        lambda ds: DataLoader(ds, 4, sampler=torch.tensor([5, 2, 7, 0, 1])),
        [0, 1, 2, 5, 7],
    ),
    "numbers of numpy's": (lambda ds: DataLoader(ds, 4, sampler=np.array([5, 2, 7, 0, 1])), [0, 1, 2, 5, 7]),
    "a list as sampler": (lambda ds: DataLoader(ds, 4, sampler=[5, 2, 2, 7, 0, 1]), [0, 1, 2, 2, 5, 7]),
    "batches of its own": (
        lambda ds: DataLoader(ds, batch_sampler=[[4, 1], [0], [3, 2, 5]]),
        [0, 1, 2, 3, 4, 5],
    ),
    "random batches": (
        lambda ds: DataLoader(ds, batch_sampler=BatchSampler(RandomSampler(ds), 5, drop_last=False)),
        WHOLE,
    ),
    "shuffled, in workers": (lambda ds: DataLoader(ds, 4, shuffle=True, num_workers=1), WHOLE),
}


@pytest.mark.parametrize("kind", TORCHS)
def test_torchs_loaders_are_predicted_in_the_order_of_the_dataset(kind):
    loader, expected = TORCHS[kind]
    learn, data = make(), numbers()
    x, preds, y, losses = learn.get_preds(dl=loader(data), with_input=True, with_loss=True)
    assert numbers_of(y) == expected
    assert torch.equal(x, data.tensors[0][expected])
    assert torch.allclose(preds, learn.model(x), atol=1e-6)
    assert torch.allclose(losses, (preds - y).square().flatten())


@pytest.mark.parametrize("sampler", [RandomSampler, WeightedRandomSampler])
def test_what_is_drawn_more_than_once_is_predicted_as_often(sampler):
    data = numbers()
    draws = (
        RandomSampler(data, replacement=True, num_samples=9)
        if sampler is RandomSampler
        else WeightedRandomSampler([1.0] * 3 + [0.0] * (N - 3), 9)
    )
    seen = numbers_of(make().get_preds(dl=DataLoader(data, 4, sampler=draws))[1])
    assert len(seen) == 9 and seen == sorted(seen)
    learn = make((DataLoader(data, 4, sampler=draws), DataLoader(data, 4)))
    assert numbers_of(learn.get_preds(0)[1]) == WHOLE, "by its number it is the training data, whole"


def test_the_order_of_the_loader_on_request():
    loader = DataLoader(numbers(), 4, shuffle=True, generator=torch.Generator().manual_seed(1))
    expected = [int(y) for _, ys in loader for y in ys]
    loader.generator.manual_seed(1)
    assert numbers_of(make().get_preds(dl=loader, reorder=False)[1]) == expected != WHOLE


def test_a_dataset_of_batches_comes_in_its_order():
    class Batches(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, i):
            return torch.ones(3, 2), torch.full((3, 1), float(i))

    loader = DataLoader(Batches(), batch_size=None, shuffle=True)
    assert numbers_of(make().get_preds(dl=loader)[1]) == [i for i in range(5) for _ in range(3)]


def test_a_loaders_class_and_settings_stay():
    class Loud(DataLoader):
        def __iter__(self):
            return iter([(x + 1, y) for x, y in super().__iter__()])

    data = numbers()
    loader = Loud(data, 4, shuffle=True, drop_last=True)
    for given in (dict(dl=loader), dict(ds_idx=0)):
        learn = make((loader, loader))
        assert torch.equal(learn.get_preds(with_input=True, **given)[0], data.tensors[0] + 1)
    assert loader.drop_last and isinstance(loader.sampler, RandomSampler), "the loader itself is as before"


def test_a_batch_that_is_cancelled_is_left_out_and_the_others_keep_their_order():
    class Skips(fl.Callback):
        def after_pred(self):
            if self.iter == 1:
                raise fl.CancelBatchException

    loader = DataLoader(numbers(), 4, batch_sampler=None, sampler=list(reversed(range(12))))
    assert numbers_of(make().get_preds(dl=loader, cbs=Skips)[1]) == [0, 1, 2, 3, 8, 9, 10, 11]


def test_an_order_that_is_not_known_is_said():
    def collate(items):
        return torch.utils.data.default_collate(items[:2])

    loader = DataLoader(numbers(), 4, shuffle=True, collate_fn=collate)
    with pytest.raises(ValueError, match=r"to give 22 items, and there are predictions of 12.*reorder=False"):
        make().get_preds(dl=loader)
    assert len(make().get_preds(dl=loader, reorder=False)[1]) == 12


FASTAIS = {
    "in order": lambda ds: TfmdDL(ds, bs=4, num_workers=0),
    "shuffled": lambda ds: TfmdDL(ds, bs=4, shuffle=True, num_workers=0),
    "shuffled, without its end": lambda ds: TfmdDL(ds, bs=4, shuffle=True, drop_last=True, num_workers=0),
    "plain": lambda ds: FastaiLoader(ds, bs=4, shuffle=True, num_workers=0),
    "of its own order": lambda ds: FastaiLoader(
        ds, bs=4, num_workers=0, get_idxs=lambda: list(reversed(range(N)))
    ),
}


@pytest.mark.parametrize("reorder", [True, False])
@pytest.mark.parametrize("kind", FASTAIS)
def test_fastais_loaders_are_predicted_as_by_fastai(kind, reorder):
    data, dl = numbers(), FASTAIS[kind](numbers())
    learn = make()
    dls = DataLoaders(dl, FASTAIS["in order"](data), device="cpu")
    their = theirs.Learner(dls, learn.model, nn.MSELoss(), opt_func=fusedopt.Adam)
    options = dict(with_input=True, with_loss=True, with_decoded=True)
    if reorder or not dl.shuffle:  # without, each goes its own random way
        ours, expected = (x.get_preds(dl=dl, reorder=reorder, **options) for x in (learn, their))
        assert len(ours) == len(expected) == 5
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, torch.as_tensor(b).view_as(a))
    ours = make((dl, dl)).get_preds(0)[1]
    assert torch.equal(ours, torch.as_tensor(their.get_preds(0)[1]))


@pytest.mark.parametrize("kind", [WeightedDL, PartialDL])
def test_fastais_loaders_that_draw(kind):
    own = dict(wgts=np.arange(N)) if kind is WeightedDL else dict(partial_n=10)
    dl = kind(numbers(), bs=4, shuffle=True, num_workers=0, **own)
    seen = numbers_of(make().get_preds(dl=dl)[1])
    assert seen == sorted(seen) and len(seen) == (N if kind is WeightedDL else 10)
    assert numbers_of(make((dl, dl)).get_preds(0)[1]) == WHOLE


def test_texts_sorted_by_length_are_predicted_as_by_fastai():
    """Their batches are padded each to a length of its own."""
    g = torch.Generator().manual_seed(0)
    texts = [
        TensorText(torch.randint(2, 9, (int(n),), generator=g))
        for n in torch.randint(3, 20, (N,), generator=g)
    ]
    items = [(text, torch.tensor(float(i))) for i, text in enumerate(texts)]
    dl = SortedDL(
        items,
        bs=4,
        shuffle=True,
        sort_func=lambda item: len(item[0]),
        before_batch=functools.partial(pad_input, pad_idx=1),
        num_workers=0,
    )

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * (x.float() * (x != 1)).sum(1)

    learn = make((dl, dl), Mean())
    their = theirs.Learner(
        DataLoaders(dl, dl, device="cpu"), learn.model, nn.MSELoss(), opt_func=fusedopt.Adam
    )
    for learner, given in ((learn, dict(ds_idx=0)), (learn, dict(dl=dl)), (their, dict(ds_idx=0))):
        x, preds, y = learner.get_preds(with_input=True, **given)
        assert numbers_of(torch.tensor([float(value) for value in y])) == WHOLE
        assert [float(p) for p in preds] == [float(text.sum()) for text in texts]
        assert [a[a != 1].tolist() for a in x] == [text.tolist() for text in texts]


# --
# Tensors of classes of their own


def categories(shuffle=False):
    """fastai's data: points as images, and which side of a line they are on, by name."""
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
    names = ["left" if a < b else "right" for a, b in x.tolist()]
    to_x, to_y = (lambda i: TensorImage(x[i])), (lambda i: names[i])
    dsets = Datasets(range(N), [[to_x], [to_y, Categorize()]], splits=[range(12), range(8, N)])
    return dsets.dataloaders(bs=4, num_workers=0, shuffle=shuffle, device=torch.device("cpu"))


@pytest.mark.parametrize(
    "loss_func", [CrossEntropyLossFlat(), nn.CrossEntropyLoss()], ids=["fastai's", "torch's"]
)
def test_fastais_data_is_trained_on_and_interpreted_as_by_fastai(loss_func):
    dls = categories()
    learn = make(dls, nn.Linear(2, 2), loss_func, lr=0.1, metrics=[fl.accuracy, fl.error_rate])
    learn.fit(2)
    assert learn.final_record[2] + learn.final_record[3] == pytest.approx(1)
    their = theirs.Learner(dls, learn.model, CrossEntropyLossFlat(), opt_func=fusedopt.Adam)
    ours, expected = fl.Interpretation.from_learner(learn), ClassificationInterpretation.from_learner(their)
    assert ours.confusion_matrix().tolist() == expected.confusion_matrix().tolist()
    assert ours.vocab == list(expected.vocab) == ["left", "right"]
    assert [row[:2] for row in ours.most_confused()] == [row[:2] for row in expected.most_confused()]
    for a, b in zip(ours.top_losses(5), expected.top_losses(5), strict=True):
        torch.testing.assert_close(a, torch.as_tensor(b))
    assert (
        fl.Interpretation.from_learner(their).confusion_matrix().tolist() == ours.confusion_matrix().tolist()
    )


def test_the_loss_comes_from_fastais_data():
    dls = categories()
    dls.train_ds.loss_func = CrossEntropyLossFlat()
    assert fl.Learner(dls, nn.Linear(2, 2)).loss_func is dls.train_ds.loss_func


def test_items_are_numbered_as_in_the_dataset_where_a_loader_shuffles():
    data = numbers()
    data = TensorDataset(data.tensors[0], (data.tensors[0][:, 0] > 0).long())
    shuffled, in_order = DataLoader(data, 4, shuffle=True), DataLoader(data, 4)
    learn = make((shuffled, in_order), nn.Linear(2, 2), nn.CrossEntropyLoss())
    expected = fl.Interpretation.from_learner(learn).top_losses()
    for given in (dict(ds_idx=0), dict(dl=shuffled)):
        found = fl.Interpretation.from_learner(learn, **given).top_losses()
        assert torch.allclose(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_tensors_given_by_hand_may_be_of_fastais_classes():
    preds, targets = TensorImage(torch.eye(3)), TensorCategory(torch.tensor([0, 1, 1]))
    found = fl.Interpretation(preds, targets, torch.zeros(3))
    assert found.confusion_matrix().tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert fl.accuracy(preds, targets) == 1 - fl.error_rate(preds, targets) == pytest.approx(2 / 3)


def test_names_of_classes_are_the_last_of_several():
    class Text(list):
        vocab = (["xxpad", "the"], ["no", "yes"])

    data = TensorDataset(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))
    learn = make(Text([DataLoader(data, 2)] * 2), nn.Linear(2, 2), nn.CrossEntropyLoss())
    assert fl.Interpretation.from_learner(learn).vocab == ["no", "yes"]
    assert learn.predict(data[0][0])[0] in ("no", "yes")


def test_a_loss_that_is_flat_is_of_items_again():
    """A class for each of three places of an item: fastai's loss is flat over both."""
    data = TensorDataset(torch.randn(5, 3, 2), torch.randint(2, (5, 3)))
    learn = make((DataLoader(data, 2),) * 2, nn.Linear(2, 2), CrossEntropyLossFlat())
    _, y, losses = learn.get_preds(with_loss=True, act=lambda pred: pred)
    preds = learn.model(data.tensors[0])
    expected = (
        nn.functional.cross_entropy(preds.flatten(0, 1), y.flatten(), reduction="none").view(5, 3).mean(1)
    )
    assert torch.allclose(losses, expected, atol=1e-6)


# --
# Decoded predictions


class Signs:
    """A loss function that says what predictions mean."""

    reduction = "mean"

    def __call__(self, pred, y):
        return (pred - y).square().mean()

    def activation(self, pred):
        return pred.tanh()

    def decodes(self, pred):
        return pred.sign()


def test_decoded_predictions_stand_behind_the_targets():
    learn = make(loss_func=Signs())
    preds, y, decoded = learn.get_preds(with_decoded=True)
    assert torch.equal(decoded, preds.sign()) and numbers_of(y) == WHOLE and preds.abs().max() <= 1
    data = TensorDataset(torch.randn(6, 2), torch.randint(2, (6,)))
    learn = make((DataLoader(data, 4),) * 2, nn.Linear(2, 2), nn.CrossEntropyLoss())
    x, preds, y, decoded, losses = learn.get_preds(with_input=True, with_decoded=True, with_loss=True)
    assert torch.equal(decoded, preds.argmax(1)) and len(losses) == 6 and torch.equal(x, data.tensors[0])
    preds, y, decoded = make().get_preds(with_decoded=True)
    assert torch.equal(decoded, preds), "nothing says what a number means but the number"


# --
# Dicts, and what is no tensor


class Dicts(Dataset):
    """Items under names, in whatever order."""

    def __init__(self, names, kind=dict):
        self.names, self.kind, self.data = names, kind, numbers()

    def __len__(self):
        return N

    def __getitem__(self, i):
        x, y = self.data[i]
        known = {"a": x[:1], "b": 10 * x[1:], "x": x, "labels": y, "y": y, "z": y}
        return {name: known[name] for name in self.names}


class TwoNamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 1)

    def forward(self, a, b):
        return self.lin(torch.cat([a, b / 10], 1))


class OneDict(TwoNamed):
    def forward(self, batch):
        return super().forward(batch["a"], batch["b"])


DICTS = {
    "one input": (["x", "y"], lambda: nn.Linear(2, 1)),
    "the last is the target": (["x", "z"], lambda: nn.Linear(2, 1)),
    "the target first, by its name": (["labels", "x"], lambda: nn.Linear(2, 1)),
    "two inputs": (["a", "b", "y"], TwoNamed),
    "two inputs in another order": (["b", "labels", "a"], TwoNamed),
    "two for a model with one argument": (["b", "a", "y"], OneDict),
}


@pytest.mark.parametrize("kind", DICTS)
def test_batches_that_are_dicts(kind):
    """They train and predict as the tuples that they could be."""
    names, model = DICTS[kind]
    found = []
    for dl in (DataLoader(Dicts(names), 4), DataLoader(numbers(), 4)):
        torch.manual_seed(0)
        learn = make((dl, dl), model() if isinstance(dl.dataset, Dicts) else nn.Linear(2, 1), lr=0.1)
        learn.fit(2)
        found.append((learn.recorder.values, *learn.get_preds(with_loss=True)))
    (values, *ours), (expected_values, *expected) = found
    np.testing.assert_allclose(values, expected_values, rtol=1e-5)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert "Linear" in learn.summary()


@pytest.mark.parametrize("kind", [dict, UserDict, functools.partial(defaultdict, list)])
def test_dicts_within_batches_are_inputs_and_come_in_order(kind):
    def collate(items):
        x, y = torch.utils.data.default_collate(items)
        return kind(a=x[:, :1], b=10 * x[:, 1:], text=[str(int(i)) for i in y]), y

    dl = DataLoader(numbers(), 4, shuffle=True, collate_fn=collate)
    learn = make((dl, dl), OneDict())
    learn.fit(1)
    x, preds, y = learn.get_preds(dl=dl, with_input=True, cbs=fl.DeviceCallback("cpu"))
    assert numbers_of(y) == WHOLE == [int(text) for text in x["text"]]
    assert torch.equal(x["a"], numbers().tensors[0][:, :1])
    assert torch.allclose(preds, learn.model(x), atol=1e-6)


def test_n_inp_says_how_many_of_a_dicts_values_are_inputs():
    class Two(list):
        n_inp = 2

    dl = DataLoader(Dicts(["b", "a", "y"]), 4)
    learn = make(Two([dl, dl]), TwoNamed())
    learn.fit(1)
    assert numbers_of(learn.get_preds()[1]) == WHOLE


def test_items_of_different_shapes_come_as_a_list():
    def collate(items):
        return torch.stack([torch.ones(len(items)) * i for i, _ in items]), torch.stack([y for _, y in items])

    data = [(i, torch.tensor(float(i))) for i in range(5)]
    learn = make(model=nn.Identity(), loss_func=lambda pred, y: pred.mean())
    preds, y = learn.get_preds(dl=DataLoader(data, 3, shuffle=True, collate_fn=collate))
    assert [p.tolist() for p in preds] == [[float(i)] * len(p) for i, p in enumerate(preds)]
    assert numbers_of(y) == [0, 1, 2, 3, 4]


def test_a_metric_that_could_not_mean_anything_is_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 3\) are for 4 targets, and there are 12"):
        fl.accuracy(torch.zeros(4, 3), torch.zeros(4, 3))
    column = torch.tensor([[0], [1], [1]])
    assert fl.accuracy(torch.eye(3), column) == pytest.approx(2 / 3), "a column of targets is no table"
    assert fl.error_rate(torch.eye(3).T[None], torch.tensor([[0, 1, 2]]), axis=1) == 0
