"""torch built for CUDA and no driver, which is what `pip install torch` gives on a laptop: no step asks for CUDA."""

import copy
import subprocess
import sys

import pytest
import torch

import fusedopt
from fusedopt import optim
from fusedopt.learner import Learner

ASKING = (
    "current_device",
    "current_stream",
    "device_count",
    "get_device_capability",
    "get_rng_state_all",
    "init",
    "is_available",
    "is_current_stream_capturing",
    "synchronize",
    "_lazy_init",
)


@pytest.fixture
def no_driver(monkeypatch):
    """Every question that needs a driver raises, as torch does without one."""

    def raises(*_, **__):
        raise RuntimeError("Found no NVIDIA driver on your system")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    for name in ASKING:
        monkeypatch.setattr(torch.cuda, name, raises)


def parameters():
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4, 2))]
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    return params


OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "AdamW": lambda p: optim.AdamW(p, lr=0.1, max_grad_norm=0.1),
    "capturable": lambda p: optim.AdamW(p, lr=0.1, capturable=True),
    "amp_fused": lambda p: optim.Adam(p, lr=0.1, amp_fused=True),
    "two groups": lambda p: optim.AdamW([{"params": p[:1]}, {"params": p[1:], "lr": 0.2}], lr=0.1),
    "fastai's Lamb": lambda p: fusedopt.Lamb(p, lr=0.1),
    "reference": lambda p: optim.Adam(p, lr=0.1, backend="reference"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_on_the_cpu_never_ask_for_cuda(name, no_driver):
    params = parameters()
    opt = OPTIMIZERS[name](params)
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        opt.step()
        opt.step(lambda: 1.0)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.step()
    opt.zero_grad()
    assert opt.explain().backend in ("cpp", "reference")
    assert all((a != b).all() for a, b in zip(before, params, strict=True))
    assert not torch.cuda.is_initialized()


def test_a_learner_on_the_cpu_never_asks_for_cuda(no_driver):
    data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randn(8, 1))
    loaders = [torch.utils.data.DataLoader(data, batch_size=4)] * 2
    learn = Learner(loaders, torch.nn.Linear(3, 1), torch.nn.MSELoss(), opt_func=fusedopt.Adam)
    with learn.no_logging():
        learn.fit(1, lr=1e-3)
        learn.lr_find(num_it=2, show_plot=False, suggest_funcs=())


def test_a_capture_is_noticed_once_cuda_is_in_use(monkeypatch):
    """The other side of it: with CUDA initialised, the question is asked in every step."""
    opt = optim.SGD(parameters(), lr=0.1)
    opt.step()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="capturable=True"):
        opt.step()


def test_importing_and_stepping_leave_cuda_uninitialised():
    """In a process of its own, where forking after a step must stay possible."""
    code = (
        "import torch, fusedopt.optim as optim; p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3);"
        "opt = optim.AdamW([p], lr=0.1); opt.step(); opt.step(); print(torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("AdamW", "; it is fusedopt.optim.AdamW"),
        ("Lion", "; it is fusedopt.rules.Lion"),
        ("learner", "; import fusedopt.learner first"),
        ("lion", ""),
        ("Nothing", ""),
    ],
)
def test_what_is_elsewhere_is_said_to_be_there(name, said):
    with pytest.raises(AttributeError) as caught:
        fusedopt.__getattr__(name)
    assert str(caught.value) == f"module 'fusedopt' has no attribute {name!r}{said}"
    assert (caught.value.name, caught.value.obj) == (name, fusedopt)  # for Python's own "Did you mean"


@pytest.mark.parametrize(("name", "said"), [("Lion", "; it is fusedopt.rules.Lion"), ("Adamw", "")])
def test_a_rule_that_torch_has_not_is_said_to_be_in_rules(name, said):
    with pytest.raises(AttributeError) as caught:
        getattr(optim, name)
    assert str(caught.value).endswith(f"has no attribute {name!r}, and neither has torch.optim{said}")
    assert caught.value.name == name


def test_a_name_that_is_nowhere_stays_an_import_error():
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        from fusedopt import Nothing  # noqa: F401
