"""Packages that wrap optimizers drive it as they drive torch's: accelerate, Lightning, DDP, ZeRO, steps in backward.

Each trains with the wrapper around fusedopt, and compares with torch.optim (most of them without any wrapper). All is
in float64, where agreement to 1e-9 means the same rule on the same gradients.
"""

import cProfile
import math
import os
import pstats
import warnings
from functools import partial

import benchmarks.torchvision_ops  # noqa: F401  Lightning imports torchvision if it is there

# isort: split
import accelerate
import lightning
import pytest
import torch
import torch.multiprocessing
import wrapper_workers as workers
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward, _get_in_backward_optimizers
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

import fusedopt

assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
FACES = [pytest.param(torch.optim, id="torch"), pytest.param(fusedopt.optim, id="fusedopt")]


pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2)
    return nn.Sequential(*layers).double()


def data():
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(24, 4, generator=gen, dtype=torch.float64)
    return DataLoader(TensorDataset(x, x[:, :2] * x[:, 2:]), batch_size=4)  # 6 batches


def loss_of(model, x, y):
    return nn.functional.mse_loss(model(x), y)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_moved_and_close(ours, expected, start):
    assert_close(ours, expected)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(ours, start, strict=True))


# --
# accelerate

CLIP, ACCUMULATE, EPOCHS = 0.05, 2, 2
UPDATES = 3  # per epoch


@pytest.fixture
def accelerators(tmp_path):
    """accelerate keeps what it has found out about the machine in singletons and in the environment."""
    before = dict(os.environ)

    def make():
        forget()
        return accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=ACCUMULATE, project_dir=tmp_path / "project"
        )

    def forget():
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()

    yield make
    forget()
    os.environ.clear()
    os.environ.update(before)


def plainly():
    """The training that accelerate is to reproduce: torch's optimizer in a loop of our own."""
    model = model_of()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = OneCycleLR(opt, 0.05, total_steps=EPOCHS * UPDATES)
    for _ in range(EPOCHS):
        for i, (x, y) in enumerate(data()):
            (loss_of(model, x, y) / ACCUMULATE).backward()
            if i % ACCUMULATE == ACCUMULATE - 1:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                opt.step()
                schedule.step()
                opt.zero_grad()
    return model, opt


class Accelerated:
    """A training prepared by accelerate."""

    def __init__(self, accelerator, flagged=()):
        self.accelerator, self.inner = accelerator, model_of()
        opt = fusedopt.optim.AdamW(self.inner.parameters(), lr=0.01)
        for name in flagged:
            opt.state[self.inner.get_parameter(name)]["do_wd"] = False
        schedule = OneCycleLR(opt, 0.05, total_steps=EPOCHS * UPDATES)
        self.model, self.opt, self.data, self.schedule = accelerator.prepare(
            self.inner, opt, data(), schedule
        )

    def epoch(self):
        for x, y in self.data:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss_of(self.model, x, y))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
                self.opt.step()
                self.schedule.step()
                self.opt.zero_grad()


def test_accelerate_trains_as_a_plain_loop_does(accelerators):
    ours = Accelerated(accelerators())
    for _ in range(EPOCHS):
        ours.epoch()
    model, opt = plainly()
    assert_moved_and_close(weights(ours.inner), weights(model), weights(model_of()))
    for key in ("lr", "betas"):
        assert ours.opt.param_groups[0][key] == pytest.approx(opt.param_groups[0][key], rel=1e-12)
    assert ours.opt.optimizer.state[ours.inner[0].weight]["step"] == EPOCHS * UPDATES


def test_accelerate_resumes_from_a_saved_state(accelerators, tmp_path):
    first = Accelerated(accelerators())
    first.epoch()
    first.accelerator.save_state(str(tmp_path / "state"))
    second = Accelerated(accelerators())
    with torch.no_grad():
        for p in second.inner.parameters():
            p.zero_()  # what is loaded counts
    second.accelerator.load_state(str(tmp_path / "state"))
    second.epoch()
    model, _ = plainly()
    assert_moved_and_close(weights(second.inner), weights(model), weights(model_of()))


def test_flags_survive_what_accelerate_does_to_a_state_dict(accelerators):
    """It loads the optimizer's own state dict at once; parameters flagged before are still not decayed."""
    flagged = ["0.bias", "1.weight"]
    accelerated = Accelerated(accelerators(), flagged)
    ours, opt = accelerated.inner, accelerated.opt.optimizer
    model = model_of()
    params = dict(model.named_parameters())
    decayed = {"params": [p for n, p in params.items() if n not in flagged], "weight_decay": 0.5}
    peer = torch.optim.AdamW([decayed, {"params": [params[n] for n in flagged], "weight_decay": 0.0}])
    opt.set_hypers(wd=0.5, lr=0.01, mom=0.9)
    for group in peer.param_groups:
        group["lr"] = 0.01
    train(ours, opt, 6), train(model, peer, 6)
    assert_moved_and_close(weights(ours), weights(model), weights(model_of()))


def train(model, opt, steps):
    for x, y in [*data()][:steps]:
        model.zero_grad()
        loss_of(model, x, y).backward()
        opt.step()


def replace_parameters(model, opt):
    """What accelerate does around fully_shard: the optimizer holds one-element stand-ins while there are new ones."""
    new = {p.data_ptr(): nn.Parameter(p.detach().clone()) for p in model.parameters()}
    for group in opt.param_groups:
        for i, p in enumerate(group["params"]):
            group["params"][i] = torch.empty(1, dtype=p.dtype)
            group["params"][i].data_ptr = p.data_ptr()
    for layer in model:
        for name, p in [*layer.named_parameters()]:
            setattr(layer, name, new[p.data_ptr()])
    if not opt.state:
        opt.load_state_dict(opt.state_dict())  # as AcceleratedOptimizer does
    fsdp2_switch_optimizer_parameters(opt, new)
    assert {*opt.param_groups[0]["params"]} == {*model.parameters()}


@pytest.mark.parametrize("steps_before", [0, 3])
def test_parameters_replaced_by_stand_ins_and_then_by_others(steps_before):
    """The new ones start without state, as in torch."""
    results = []
    for face in (torch.optim, fusedopt.optim):
        model = model_of()
        opt = face.AdamW(model.parameters(), lr=0.01)
        train(model, opt, steps_before)
        replace_parameters(model, opt)
        train(model, opt, 4)
        results.append(weights(model))
    assert_moved_and_close(results[1], results[0], weights(model_of()))


# --
# Lightning


@pytest.fixture
def quiet():
    """Without Lightning's advice on data loaders, and what torch deprecates about Lightning's use of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated", category=FutureWarning)
        yield


class Module(lightning.LightningModule):
    """The small model; ``seen`` are learning rates and momenta as the module's own hooks see them."""

    def __init__(self, face):
        super().__init__()
        self.face, self.model, self.seen = face, model_of(), []

    def training_step(self, batch, _):
        group = self.optimizers().param_groups[0]
        self.seen.append((group["lr"], *group["betas"]))
        return loss_of(self.model, *batch)

    def configure_optimizers(self):
        opt = self.face.AdamW(self.parameters(), lr=0.01)
        schedule = OneCycleLR(opt, 0.05, total_steps=12)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(face, folder, epochs=2, ckpt_path=None):
    module = Module(face)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        gradient_clip_val=CLIP,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
        precision="64-true",
    )
    trainer.fit(module, data(), ckpt_path=ckpt_path)
    return module, trainer


def test_lightning_fits_with_a_schedule_and_clipping(tmp_path, quiet):
    module, trainer = fit(fusedopt.optim, tmp_path)
    expected, _ = fit(torch.optim, tmp_path)
    assert isinstance(trainer.optimizers[0], fusedopt.optim.AdamW)
    assert trainer.optimizers[0].explain().launches == 1
    assert_moved_and_close(weights(module.model), weights(expected.model), weights(model_of()))
    assert len(module.seen) == 12 and len(set(module.seen)) == 12
    assert module.seen == expected.seen


@pytest.mark.parametrize("first", FACES)
def test_lightning_resumes_from_a_checkpoint(first, tmp_path, quiet):
    """Also from one that was written while training with torch's optimizer."""
    _, trainer = fit(first, tmp_path, epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    module, _ = fit(fusedopt.optim, tmp_path, ckpt_path=tmp_path / "one.ckpt")
    expected, _ = fit(torch.optim, tmp_path)
    assert module.seen == expected.seen[6:]
    assert_moved_and_close(weights(module.model), weights(expected.model), weights(model_of()))


def test_lightnings_wrapper_takes_its_class():
    """It makes a class of both and becomes an instance of it, without calling our constructor."""
    model = model_of()
    opt = fusedopt.optim.AdamW(model.parameters(), lr=0.01)
    wrapper = LightningOptimizer(opt)
    assert type(wrapper).__name__ == "LightningAdamW" and isinstance(wrapper, fusedopt.Optimizer)
    assert wrapper.optimizer is opt and wrapper.param_groups is opt.param_groups
    wrapper.param_groups[0]["lr"] = 0.5
    assert opt.hypers[0]["lr"] == 0.5
    assert dict(wrapper.hypers[0]) == dict(opt.hypers[0])
    assert wrapper.state is opt.state and len(wrapper.param_lists[0]) == 6


def test_fabric_sets_it_up(quiet):
    """Lightning without a Trainer: another wrapper that takes the class."""
    models = model_of(), model_of()
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    ours, opt = fabric.setup(models[0], fusedopt.optim.AdamW(models[0].parameters(), lr=0.01))
    peer = torch.optim.AdamW(models[1].parameters(), lr=0.01)
    for x, y in data():
        opt.zero_grad()
        fabric.backward(loss_of(ours, x, y))
        fabric.clip_gradients(ours, opt, max_norm=CLIP)
        opt.step()
        peer.zero_grad()
        loss_of(models[1], x, y).backward()
        nn.utils.clip_grad_norm_(models[1].parameters(), CLIP)
        peer.step()
    assert_moved_and_close(weights(models[0]), weights(models[1]), weights(model_of()))


# --
# Layer-wise learning rates


def layered(face, no_decay):
    """60 layers, four tensors each: a group per tensor, with rates that fall towards the input."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)) for _ in range(60)]
    model = nn.Sequential(*layers).double()
    groups = [
        {"params": [p], "lr": 0.01 * 0.97 ** (60 - i), "weight_decay": no_decay if p.dim() == 1 else 0.1}
        for i, layer in enumerate(layers)
        for p in layer.parameters()
    ]
    return model, face.AdamW(groups)


@pytest.mark.parametrize(("no_decay", "launches"), [(0.05, 1), (0.0, 2)])
def test_a_group_per_tensor_with_rates_by_layer_is_one_launch(no_decay, launches):
    """240 groups. Those without decay run a program of their own, since there is less to do."""
    results = []
    for face in (torch.optim, fusedopt.optim):
        model, opt = layered(face, no_decay)
        schedule = LambdaLR(opt, lambda t: (t + 1) / 2 if t < 2 else 0.5 + 0.5 * math.cos(t))
        for t in range(4):
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
            model(x).square().mean().backward()
            opt.step()
            schedule.step()
            opt.zero_grad()
        results.append(weights(model))
    assert_close(results[1], results[0])
    explanation = opt.explain()
    assert explanation.launches == launches and sum(s.tensors for s in explanation.stages) == 240
    assert len(explanation.compiled) == launches


# --
# A step per parameter, in backward


def backward_of(model, t=0):
    x, y = [*data()][t]
    loss_of(model, x, y).backward()


def by_torchs_helper(model, cls, **kwargs):
    _apply_optimizer_in_backward(cls, model.parameters(), kwargs)
    return _get_in_backward_optimizers(model)


def by_hooks(model, cls, **kwargs):
    opts = {p: cls([p], **kwargs) for p in model.parameters()}

    def hook(p):
        opts[p].step()
        opts[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    return list(opts.values())


@pytest.mark.parametrize("attach", [by_torchs_helper, by_hooks], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad"])
def test_steps_in_backward_are_steps(attach, name):
    ours, peer = model_of(), model_of()
    kwargs = dict(lr=0.05, weight_decay=0.1)
    opts = attach(ours, getattr(fusedopt.optim, name), **kwargs)
    assert len(opts) == 6
    opt = getattr(torch.optim, name)(peer.parameters(), **kwargs)
    for t in range(5):
        backward_of(ours, t)
        assert all(p.grad is None for p in ours.parameters())
        opt.zero_grad()
        backward_of(peer, t)
        opt.step()
    assert_close(weights(ours), weights(peer))
    assert len({c.source_path for o in opts for c in o.explain().compiled}) <= 2, "kernels are shared"


def test_an_optimizer_of_one_parameter_is_cheap():
    """Of a thousand of them only the first looks into the code of callbacks, and traces and compiles."""
    params = [nn.Parameter(torch.zeros(3)) for _ in range(51)]
    for p in params:
        p.grad = torch.ones(3)
    fusedopt.optim.AdamW(params[:1]).step()
    with cProfile.Profile() as profile:
        for p in params[1:]:
            fusedopt.optim.AdamW([p]).step()
    stats = pstats.Stats(profile)
    assert stats.total_calls / 50 < 3300, "function calls to make one and for its first step"
    files = {os.path.basename(file) for file, _, _ in stats.stats}
    assert "engine.py" in files and not files & {
        "dis.py",
        "inspect.py",
        "run.py",
        "tracer.py",
        "toolchain.py",
    }


def test_names_that_a_wrapper_copies_into_groups_do_not_hide_torchs():
    """ZeroRedundancyOptimizer puts a group's keys, as the user wrote them, beside those they were translated to."""
    models = model_of(), model_of()
    ours = fusedopt.optim.AdamW([{"params": models[0].parameters(), "wd": 0.2, "mom": 0.8}])
    ours.param_groups[0].update(wd=0.2, mom=0.8)
    peer = torch.optim.AdamW(models[1].parameters(), weight_decay=0.2, betas=(0.8, 0.999))
    for t in range(5):
        for opt, model in zip((ours, peer), models, strict=True):
            opt.param_groups[0].update(weight_decay=0.2 + t, betas=(0.8 - 0.1 * t, 0.99))
            train(model, opt, 1)
    assert (ours.hypers[0]["wd"], ours.hypers[0]["mom"]) == (4.2, peer.param_groups[0]["betas"][0])
    assert_close(weights(models[0]), weights(models[1]))


# --
# Two processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The results of both ranks. One spawn for all tests, since each costs an import of torch."""
    folder = tmp_path_factory.mktemp("two_processes")
    torch.multiprocessing.spawn(workers.run, (str(folder),), nprocs=workers.WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(workers.WORLD)]


@pytest.mark.parametrize("gradients", ["copied gradients", "gradients in buckets"])
def test_processes_that_average_gradients_train_as_one(gradients, two_processes):
    """In buckets, a gradient is a view at any offset of a flat tensor."""
    expected = workers.data_parallel(torch.optim)
    for results in two_processes:
        assert_moved_and_close(results[gradients], expected, workers.values(workers.small_model()))


@pytest.mark.parametrize("name", workers.RULES)
def test_processes_that_share_the_state_train_as_one(name, two_processes):
    """ZeroRedundancyOptimizer: a rank steps its own parameters, of some groups none, and copies groups around."""
    expected = workers.sharded(torch.optim, name)
    rtol = 1e-7 if name == "NAdam" else 1e-9  # torch's product of momenta is a float32
    for results in two_processes:
        ours = results["sharded"][name]
        torch.testing.assert_close(ours["weights"], expected["weights"], rtol=rtol, atol=1e-12)
        assert 0 in ours["sizes"] and sum(ours["sizes"]) < workers.GROUPS == len(ours["sizes"])
        state, other = ours["saved"]["state"], expected["saved"]["state"]
        assert state.keys() == other.keys()
        assert [s.keys() for s in state.values()] == [s.keys() for s in other.values()]
        for s, o in zip(state.values(), other.values(), strict=True):
            for key in s:
                torch.testing.assert_close(s[key], o[key], rtol=rtol, atol=1e-12, check_dtype=False)


# --
# accelerate and steps that GradScaler skips


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("amp_fused", [False, True])
def test_accelerate_sees_skipped_steps(accelerators, amp_fused, scheduled):
    accelerators()
    p = nn.Parameter(torch.ones(3))
    opt = fusedopt.optim.SGD([p], lr=0.5, amp_fused=amp_fused)
    if scheduled:  # torch's schedulers put a step of their own in the place of the optimizer's
        torch.optim.lr_scheduler.ConstantLR(opt, 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(opt, scaler=scaler)
    found = []
    for grad in (1.0, float("inf"), 1.0):
        scaler.scale(torch.zeros(()))
        p.grad = torch.full((3,), grad * scaler.get_scale())
        wrapped.step()
        found.append((wrapped.step_was_skipped, p[0].item()))
    assert found == [(False, 0.5), (True, 0.5), (False, 0.0)]
    assert getattr(opt, "_step_supports_amp_scaling", False) == amp_fused  # outside of accelerate's calls


@pytest.mark.parametrize("amp_fused", [False, True])
def test_accelerate_takes_a_released_step_for_one_that_was_done(accelerators, amp_fused):
    accelerators()
    p = nn.Parameter(torch.ones(3))
    opt = fusedopt.optim.SGD([p], lr=0.5, amp_fused=amp_fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(opt, scaler=scaler)
    opt.release_gradients(0, scaler=scaler, skip="batches")
    found = []
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale((p * factor).sum()).backward()
        wrapped.step()
        wrapped.zero_grad()
        found.append((wrapped.step_was_skipped, p[0].item(), scaler.get_scale()))
    assert found == [(False, 0.5, 8.0), (False, 0.5, 4.0), (False, 0.0, 4.0)]
