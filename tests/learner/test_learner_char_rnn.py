"""The character model, in small: it learns, it can be repeated, and its batches go on where the last ones stopped."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import itertools

import char_rnn

SMALL = dict(epochs=2, width=32, bs=8, length=32, train=["textwrap", "random"], valid=["functools"])


pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_learns_alike_each_time(capsys):
    first, again = char_rnn.main(**SMALL), char_rnn.main(**SMALL)
    assert first == again
    assert 6.5 < first.before < 7.5 and first.after < 4.0
    assert first.text.startswith("    def ") and len(first.text) == len("    def ") + 300
    assert f"{first.after:.2f} after" in capsys.readouterr().out
    assert char_rnn.main(**SMALL | {"seed": 1, "epochs": 1}).after != first.after


def test_a_row_goes_on_in_the_next_batch():
    text = torch.arange(1000)
    batches = list(char_rnn.loader(text, bs=4, length=10))
    assert len(batches) == 24
    for (x, y), (following, _) in itertools.pairwise(batches):
        assert torch.equal(y, x + 1) and torch.equal(following, x + 10)


def test_memory_is_used_and_forgotten():
    torch.manual_seed(0)
    model = char_rnn.CharModel(16).eval()
    x = torch.randint(char_rnn.CHARACTERS, (2, 20))
    whole = model(x)[0]
    model.reset()
    halves = torch.cat([model(x[:, :10])[0], model(x[:, 10:])[0]], 1)
    torch.testing.assert_close(halves, whole)
    assert not torch.allclose(model(x)[0], whole)
    assert all(not t.requires_grad for t in model.memory)
