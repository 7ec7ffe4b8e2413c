"""docs/coming_from.md lists what fastai's Learner has and ours has not: the list is compared with fastai itself."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusedopt import learner as fl

TEXT = (Path(__file__).parents[2] / "docs" / "coming_from.md").read_text()
SECTION = re.search(r"^### Learner against Learner$(.*?)^##+ ", TEXT, re.M | re.S)[1]

# In a process of its own: whatever else is imported may add methods to fastai's Learner.
ASKING = """
import inspect, json, warnings
warnings.simplefilter("ignore")
import fastai.basics, fastai.callback.all, fastai.distributed, fastai.metrics
from fastai.callback.core import Callback
from fastai.learner import Learner
def public(names): return sorted(n for n in names if not n.startswith("_"))
def subclasses(cls): return [s for c in cls.__subclasses__() for s in (c, *subclasses(c))]
dl = fastai.data.load.DataLoader([0, 1], bs=2, num_workers=0)
learn = Learner(fastai.data.core.DataLoaders(dl, dl), fastai.torch_core.nn.Linear(1, 1), print, default_cbs=False)
names = public({*dir(Learner), *vars(learn)})
methods = [n for n in names if callable(getattr(Learner, n, None))] + ["__init__"]
print(json.dumps(dict(
    names=names,
    arguments={n: list(inspect.signature(getattr(Learner, n)).parameters) for n in methods},
    callbacks=sorted({c.__name__ for c in subclasses(Callback)}),
    metrics=public(fastai.metrics.__all__),
)))
"""


@pytest.fixture(scope="module")
def fastai():
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASKING], check=True, capture_output=True, text=True
    )
    return json.loads(out.stdout.splitlines()[-1])


def listed(part):
    """The names in backticks behind a part's title, up to the next title."""
    found = re.search(rf"^\*\*{part}\*\*(.*?)(?=^\*\*|\Z)", SECTION, re.M | re.S)
    return set(re.findall(r"`([\w.]+)`", found[1]))


def ours():
    learn = fl.Learner(([(0, 0)], [(0, 0)]), print, print, default_cbs=False)
    return {*object.__dir__(learn)}


def test_methods_and_attributes_that_are_absent_are_listed(fastai):
    assert listed("Methods and attributes that are not here.") == set(fastai["names"]) - ours()


def test_arguments_that_are_absent_are_listed(fastai):
    absent = set()
    for name in set(fastai["arguments"]) & {*dir(fl.Learner)}:
        parameters = inspect.signature(getattr(fl.Learner, name)).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        their = [] if takes_any else fastai["arguments"][name]
        absent |= {f"{'Learner' if name == '__init__' else name}.{a}" for a in their if a not in parameters}
    assert listed("Arguments that are not here.") == absent


def test_callbacks_that_are_absent_are_listed(fastai):
    here = {name for name in fl.__all__ if isinstance(getattr(fl, name), type)}
    absent = {name for name in fastai["callbacks"] if not {name, name.removesuffix("Callback")} & here}
    renamed = {"MixUp": "Mixup"}
    assert set(renamed.values()) <= here
    assert listed("Callbacks that are not here.") == absent - renamed.keys()


def test_metrics_that_are_here_are_few(fastai):
    assert listed("Metrics that are here.") == {name for name in fl.__all__ if name in fastai["metrics"]}
