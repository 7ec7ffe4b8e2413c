"""Gradients that are freed as they are used: what comes out is what an ordinary step makes of them."""

import contextlib
import copy
import gc
import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, needs_extension
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import fusedopt
import fusedopt.optim as optim
from fusedopt.extension import leaf

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Layers of several kinds and dimensions, one used twice, one not at all; some parameters in another dtype."""

    def __init__(self, dtype=torch.float32, norms=None):
        super().__init__()
        self.words = nn.Embedding(11, 8, dtype=dtype)
        self.layers = nn.ModuleList(nn.Linear(8, 8, dtype=dtype) for _ in range(4))
        self.norm = nn.LayerNorm(8, dtype=norms or dtype)
        self.unused = nn.Linear(3, 3, dtype=dtype)
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=dtype))

    def forward(self, x):
        hidden = self.words(x)
        for layer in [*self.layers, self.layers[0]]:
            hidden = hidden + F.gelu(layer(hidden))
        hidden = self.norm(hidden.to(self.norm.weight.dtype)).to(self.scale.dtype)
        return F.linear(hidden * self.scale, self.words.weight)  # tied


def net(*args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return Net(*args, **kwargs)


def loss_of(model, t, factor=1.0):
    x = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(t))
    return F.cross_entropy(model(x[:, :-1]).flatten(0, 1).float(), x[:, 1:].flatten()) * factor


def train(model, opt, steps=6, begin=0, each=lambda t: None):
    for t in range(begin, begin + steps):
        loss_of(model, t).backward()
        opt.step()
        opt.zero_grad()
        each(t)


def assert_same(one, other):
    """The same models and optimizers' states, to the bit."""
    (model, opt), (model_too, opt_too) = one, other
    for p, q in zip(model.parameters(), model_too.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach())
        state, state_too = dict(opt.state.get(p, {})), dict(opt_too.state.get(q, {}))
        assert state.keys() == state_too.keys()
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert_same_bits(value, state_too[key])
            else:
                assert value == state_too[key], key


def both(make, batch_bytes=None, model=net, steps=6):
    """Trained in an ordinary way, and released."""
    out = []
    for released in (False, True):
        m = model()
        opt = make(m)
        release = opt.release_gradients(batch_bytes) if released else None
        train(m, opt, steps)
        out.append((m, opt))
    return *out, release


def groups(m, **second):
    """Two groups, of which the second is in the order of neither layers nor backward."""
    picked = {id(p) for k, p in enumerate(m.parameters()) if k % 3 == 1}
    first, other = ([p for p in m.parameters() if (id(p) in picked) == yes] for yes in (False, True))
    return [{"params": first}, {"params": other, **second}]


def nesterov(p, lr, mom, avg=None, **kwargs):
    avg = torch.zeros_like(p) if avg is None else avg
    avg.mul_(mom).add_(p.grad)
    p.data.sub_(p.grad + mom * avg, alpha=lr)
    return {"avg": avg}


def noisy(p, lr, step=0, **kwargs):
    p.data.sub_(p.grad + 0.1 * fusedopt.normal(p, seed=3, step=step), alpha=lr)
    return {"step": step + 1}


def larger_first(p, lr, **kwargs):
    """Reads a number on the host: it runs eagerly."""
    if p.grad.abs().max().item() > 0.01:
        p.data.sub_(p.grad.sign(), alpha=lr)


RULES = {
    "AdamW": lambda m: optim.AdamW(m.parameters(), lr=1e-2),
    "SGD": lambda m: optim.SGD(groups(m, lr=0.01, weight_decay=0.1), lr=0.1, momentum=0.9),
    "RAdam": lambda m: fusedopt.RAdam(groups(m, wd=0.1), lr=1e-2),
    "Lamb": lambda m: fusedopt.Lamb(m.parameters(), lr=1e-2),
    "ranger": lambda m: fusedopt.ranger(m.parameters(), lr=1e-2, k=2),
    "Adafactor": lambda m: fusedopt.rules.Adafactor(m.parameters()),
    "Muon": lambda m: fusedopt.rules.Muon([p for p in m.parameters() if p.ndim == 2], lr=1e-2),
    "reference": lambda m: fusedopt.Adam(m.parameters(), lr=1e-2, backend="reference"),
    "lists": lambda m: fusedopt.Optimizer(groups(m, cbs=[nesterov]), [fusedopt.sgd_step], lr=1e-2, mom=0.9),
    "draws": lambda m: fusedopt.Optimizer(groups(m), noisy, lr=1e-2),
    "amp_fused": lambda m: optim.AdamW(m.parameters(), lr=1e-2, amp_fused=True),
    "capturable": lambda m: optim.AdamW(groups(m, capturable=False), lr=1e-2, capturable=True),
    "bfloat16 state": lambda m: optim.AdamW(m.parameters(), lr=1e-2, state_dtype=torch.bfloat16),
}


@pytest.mark.parametrize("batch_bytes", [0, 500, 1 << 30])
@pytest.mark.parametrize("rule", RULES)
def test_results_are_those_of_ordinary_steps_to_the_bit(rule, batch_bytes):
    one, other, release = both(RULES[rule], batch_bytes)
    assert_same(one, other)
    batches = {0: 5 if rule == "Muon" else 12, 1 << 30: 1}.get(batch_bytes, 3)
    assert f"in {batches} batches" in str(release)


@pytest.mark.parametrize("norms", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype, norms):
    one, other, _ = both(RULES["AdamW"], 300, lambda: net(dtype, norms))
    assert_same(one, other)


def test_what_runs_eagerly():
    def make(m):
        return fusedopt.Optimizer(m.parameters(), [larger_first, nesterov], lr=1e-2, mom=0.9)

    with pytest.warns(RuntimeWarning, match="larger_first runs eagerly"):
        one, other, _ = both(make, 500)
    assert_same(one, other)


@pytest.mark.parametrize("rule", ["AdamW", "Lamb"])
def test_without_the_extension(rule, monkeypatch):
    monkeypatch.setattr(leaf, "native", None)
    for name in ("write_pointers", "run_cpu", "bump_versions"):
        monkeypatch.setattr(leaf, name, getattr(leaf.python, name))
    one, other, _ = both(RULES[rule], 500)
    assert_same(one, other)
    clipped(True, clip="last")


@needs_extension
def test_batches_are_bound_and_repeated():
    m = net()
    opt = RULES["AdamW"](m)
    release = opt.release_gradients(500)
    train(m, opt, 2)  # the first makes state, the second binds
    before = [engine.steps.anew for engine in release.engines]
    train(m, opt, 5)
    assert [engine.steps.anew for engine in release.engines] == before and len(before) > 2
    assert {engine.steps.repeated for engine in release.engines} == {5}
    steps = f"{5 * len(before)} of {7 * len(before)} batches without Python work"
    assert steps in opt.explain().steps and steps in str(opt.explain())
    assert "AdamW #1" in str(opt.explain())


class Experts(nn.Module):
    """Layers of which others are used each time, in another order."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))

    def forward(self, t):
        gen = torch.Generator().manual_seed(t)
        x = torch.randn(3, 8, generator=gen)
        for k in torch.randperm(8, generator=gen)[:6].tolist():
            x = x + torch.tanh(self.layers[k](x))
        return x.square().mean()


@needs_extension
@pytest.mark.parametrize("accumulates", [False, True])
def test_gradients_in_another_order_each_time_are_stepped_by_what_was_bound(accumulates):
    results = []
    for released in (False, True):
        torch.manual_seed(0)
        m = Experts()
        opt = RULES["AdamW"](m)
        release = opt.release_gradients(600) if released else None
        for t in range(20):
            if accumulates and release is None:
                m(100 + t).backward()
            elif accumulates:
                with release.accumulate():
                    m(100 + t).backward()
            m(t).backward()
            opt.step()
            opt.zero_grad()
            if released and t == 9:
                before = [engine.steps.anew for engine in release.engines]
        results.append((m, opt))
    assert_same(*results)
    assert [engine.steps.anew for engine in release.engines] == before and len(before) > 2


# -- memory


def test_the_gradients_of_the_model_never_exist_at_once():
    m = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(12)))
    one = m[0].weight.nbytes
    live, freed = [], []

    def count(p):  # hooked first, so before gradients are used
        live.append(sum(q.grad.nbytes for q in m.parameters() if q.grad is not None))
        freed.append(StorageWeakRef(p.grad.untyped_storage()))

    for p in m.parameters():
        p.register_post_accumulate_grad_hook(count)
    opt = optim.AdamW(m.parameters(), lr=1e-3)
    opt.release_gradients(3 * one)
    for _ in range(4):
        live.clear(), freed.clear()
        m(torch.randn(2, 64)).square().mean().backward()
        assert live == [one, 2 * one, 3 * one] * 4
        assert all(storage.expired() for storage in freed)
        opt.step()


def test_the_size_of_batches_follows_the_model():
    def size(*shape):
        p = nn.Parameter(torch.empty(shape, device="meta"))
        return fusedopt.SGD([p], lr=0.1).release_gradients().batch_bytes

    assert size(10) == 1 << 20
    assert size(1 << 24) == 1 << 22
    assert size(1 << 20, 1 << 12) == 1 << 26


def test_what_is_left_is_stepped_and_freed_by_step():
    m = net()
    opt = RULES["AdamW"](m)
    opt.release_gradients(1 << 30)
    before = [p.detach().clone() for p in m.parameters()]
    loss_of(m, 0).backward()
    for p, old in zip(m.parameters(), before, strict=True):
        assert_same_bits(p.detach(), old)
    opt.step()
    assert all(p.grad is None for p in m.parameters())
    assert opt.state[m.scale]["step"] == 1 and not opt.state.get(m.unused.weight)
    opt.step()  # of nothing
    assert opt.state[m.scale]["step"] == 1


def test_nothing_keeps_optimizers_alive():
    m = net()
    opt = RULES["AdamW"](m)
    release = opt.release_gradients(0)
    train(m, opt, 3)
    ref = weakref.ref(opt)
    del opt
    gc.collect()
    assert ref() is None
    loss_of(m, 3).backward()
    assert m.scale.grad is not None
    loss_of(m, 4).backward()  # which is no second pass for anybody
    del release


# -- the training loop


@pytest.mark.parametrize("batch_bytes", [0, 500])
def test_accumulation(batch_bytes):
    results = []
    for released in (False, True):
        m = net()
        opt = RULES["AdamW"](m)
        release = opt.release_gradients(batch_bytes) if released else None
        for t in range(12):
            if release is None:
                loss_of(m, t, 0.25).backward()
            else:
                with release.accumulate(t % 4 != 3):
                    loss_of(m, t, 0.25).backward()
                assert (m.scale.grad is None) == (t % 4 == 3)  # which is early in backward
            if t % 4 == 3:
                opt.step()
                opt.zero_grad()
        results.append((m, opt))
    assert_same(*results)


def test_a_pass_without_a_last_one_is_stepped_by_step():
    """A parameter that only an earlier backward pass has used, and passes that all accumulate."""
    results = []
    for released in (False, True):
        m = net()
        opt = RULES["AdamW"](m)
        release = opt.release_gradients(0) if released else None
        for t in range(3):
            if release is None:
                (loss_of(m, t) + m.unused.weight.square().sum()).backward()
            else:
                with release.accumulate(), release.accumulate(False):
                    m.unused.weight.square().sum().backward()
                    if t:
                        loss_of(m, t).backward()
                if not t:
                    loss_of(m, t).backward()
                    assert m.unused.weight.grad is not None and m.scale.grad is None
            opt.step()
            opt.zero_grad()
        results.append((m, opt))
    assert_same(*results)


def test_two_passes_for_one_step_are_refused():
    m = net()
    opt = RULES["AdamW"](m)
    release = opt.release_gradients(0)
    loss_of(m, 0).backward()
    with pytest.raises(
        RuntimeError, match=r"parameter \d+ of group 0 was stepped in this pass.*accumulate.*abandon"
    ):
        loss_of(m, 1).backward()
    release.abandon()
    opt.zero_grad()
    loss_of(m, 2).backward()
    opt.step()
    assert opt.state[m.norm.bias]["step"] == 2


def test_losses_of_disjoint_parameters_may_have_a_pass_each():
    def run(released):
        m = net()
        opt = RULES["AdamW"](m)
        if released:
            opt.release_gradients(0)
        for t in range(3):
            loss_of(m, t).backward()
            m.unused(torch.ones(3)).square().sum().backward()
            opt.step()
            opt.zero_grad()
        return m, opt

    assert_same(run(False), run(True))


def test_a_backward_pass_that_fails():
    m = net()
    opt = RULES["AdamW"](m)
    release = opt.release_gradients(0)
    handle = m.layers[1].weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(m, 0).backward()
    handle.remove()
    assert opt.state[m.norm.bias]["step"] == 1 and not opt.state.get(m.layers[1].weight)
    opt.zero_grad()
    release.abandon()
    train(m, opt, 2)
    assert opt.state[m.norm.bias]["step"] == 3 and opt.state[m.layers[1].weight]["step"] == 2


@pytest.mark.parametrize("batch_bytes", [0, 500])
def test_a_step_that_fails_leaves_its_batch_as_it_was(batch_bytes):
    fails = []

    def fragile(p, lr, **kwargs):
        if fails and p.shape == (8, 8):
            raise ValueError("not today")
        p.data.sub_(p.grad, alpha=lr)

    m = net()
    opt = fusedopt.Optimizer(m.parameters(), fragile, lr=0.1)
    release = opt.release_gradients(batch_bytes)
    train(m, opt, 2)
    fails.append(True)
    before = {p: p.detach().clone() for p in m.parameters()}
    with pytest.raises(ValueError, match="not today"):
        loss_of(m, 2).backward()
    left = [p for p in m.parameters() if p.grad is not None]
    assert left
    for p in left:
        assert_same_bits(p.detach(), before[p])
    fails.clear()
    opt.step()  # steps them
    for p in left:
        assert p.grad is None and not torch.equal(p.detach(), before[p])
    release.abandon()
    train(m, opt, 2)


def test_schedules_closures_and_hooks():
    def run(released):
        m = net()
        opt = optim.AdamW(m.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=8)
        calls = []
        opt.register_step_pre_hook(lambda *_: calls.append("before"))
        opt.register_step_post_hook(lambda *_: calls.append("after"))
        if released:
            opt.release_gradients(500)
        for t in range(6):

            def closure(t=t):
                opt.zero_grad()
                loss = loss_of(m, t)
                loss.backward()
                return loss

            assert opt.step(closure).item() > 0
            schedule.step()
        assert calls == ["before", "after"] * 6
        return m, opt

    assert_same(run(False), run(True))


def test_checkpoints():
    m, other = net(), net(seed=1)
    opt, other_opt = RULES["RAdam"](m), RULES["RAdam"](other)
    opt.release_gradients(500)
    train(m, opt, 4)
    other.load_state_dict(m.state_dict())
    other_opt.release_gradients(300)
    train(other, other_opt, 3, begin=50)  # whose bound steps are of state that is replaced
    other.load_state_dict(m.state_dict())
    other_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(m, opt, 4, begin=4)
    train(other, other_opt, 4, begin=4)
    assert_same((m, opt), (other, other_opt))
    copied = copy.deepcopy(opt)
    assert copied.gradient_release is None and opt.gradient_release is not None


def test_freezing_and_new_groups():
    def run(released):
        m = net()
        for layer in (m.words, m.layers[2]):
            layer.requires_grad_(False)
        opt = optim.AdamW([p for p in m.parameters() if p is not m.scale], lr=1e-2)
        if released:
            opt.release_gradients(0)
        train(m, opt, 2)
        m.words.requires_grad_(True)
        m.norm.requires_grad_(False)
        train(m, opt, 2)
        opt.add_param_group({"params": [m.scale], "lr": 1e-3})
        train(m, opt, 2)
        if released:  # from the second step on these are stepped in backward, too
            loss_of(m, 0).backward()
            assert m.words.weight.grad is None and m.scale.grad is None
            opt.gradient_release.abandon()
        else:
            loss_of(m, 0).backward()
            opt.step()
        return m, opt

    assert_same(run(False), run(True))


@pytest.mark.parametrize("batch_bytes", [0, 500])
def test_parameters_that_leave_the_groups_keep_their_gradients(batch_bytes):
    m = net()
    opt = RULES["AdamW"](m)
    opt.release_gradients(batch_bytes)
    train(m, opt, 3)
    opt.param_lists = [[p for p in m.parameters() if p is not m.scale]]
    for t in (3, 4):
        before, moves = m.scale.detach().clone(), m.norm.bias.detach().clone()
        loss_of(m, t).backward()
        opt.step()
        assert m.scale.grad is not None and m.norm.bias.grad is None
        assert_same_bits(m.scale.detach(), before)
        assert not torch.equal(m.norm.bias.detach(), moves)


def test_callbacks_that_are_changed_between_passes():
    def run(released):
        m = net()
        opt = fusedopt.Optimizer(m.parameters(), [fusedopt.sgd_step], lr=1e-2, mom=0.9)
        if released:
            opt.release_gradients(500)
        train(m, opt, 3)
        opt.cbs = [nesterov]
        train(m, opt, 3)
        return m, opt

    assert_same(run(False), run(True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.blocks = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = x + checkpoint(lambda x, block=block: torch.tanh(block(x)), x, use_reentrant=reentrant)
            return x

    def run(released):
        torch.manual_seed(0)
        m = Blocks()
        opt = RULES["AdamW"](m)
        if released:
            opt.release_gradients(0)
        for _ in range(3):
            m(torch.ones(2, 8)).square().sum().backward()
            opt.step()
            opt.zero_grad()
        return m, opt

    assert_same(run(False), run(True))


def test_removal():
    m, other = net(), net()
    opt, other_opt = RULES["AdamW"](m), RULES["AdamW"](other)
    with opt.release_gradients(0) as release:
        train(m, opt, 2)
        with pytest.raises(RuntimeError, match=r"released already\. Remedy: remove"):
            opt.release_gradients()
    assert opt.gradient_release is None
    train(m, opt, 2, begin=2)
    with opt.release_gradients(1 << 30) as again:
        release.remove()  # which is over
        assert opt.gradient_release is again
        loss_of(m, 4).backward()
    opt.step()  # all of it
    train(other, other_opt, 5)
    opt.zero_grad()
    assert_same((m, opt), (other, other_opt))
    loss_of(m, 5).backward()
    assert m.scale.grad is not None


# -- clipping


def adamw(m, **kwargs):
    return optim.AdamW(groups(m, lr=1e-3), lr=1e-2, max_grad_norm=0.05, **kwargs)


def clipped(released, steps=4, make=adamw, **kwargs):
    m = net()
    opt = make(m)
    release = opt.release_gradients(500, **kwargs) if released else None
    norms = []
    for t in range(steps):
        if release is not None and release.clip == "measured":
            with release.measure():
                loss_of(m, t).backward()
            assert all(p.grad is None for p in m.parameters())
        loss_of(m, t).backward()
        opt.step()
        opt.zero_grad()
        norms.append(opt.grad_norm.item())
    return m, norms, opt


CLIPPED = {
    "fused": adamw,
    "amp_fused": lambda m: adamw(m, amp_fused=True),
    "capturable": lambda m: adamw(m, capturable=True),
    "reference": lambda m: adamw(m, backend="reference"),
    "eager": lambda m: fusedopt.Optimizer(
        m.parameters(), [larger_first, nesterov], lr=0.1, mom=0.9, max_grad_norm=0.05
    ),
    "sums": lambda m: fusedopt.Lamb(m.parameters(), lr=1e-2, max_grad_norm=0.05),
}


@pytest.mark.filterwarnings("ignore:fusedopt. the callback larger_first runs eagerly:RuntimeWarning")
@pytest.mark.parametrize("make", CLIPPED)
def test_clipping_by_a_norm_that_was_measured(make):
    m, norms, _ = clipped(False, make=CLIPPED[make])
    m_too, norms_too, opt = clipped(True, make=CLIPPED[make], clip="measured")
    assert norms_too == pytest.approx(norms, rel=1e-6) and min(norms) > 0.05
    for p, q in zip(m.parameters(), m_too.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    with pytest.raises(RuntimeError, match="norm of this pass, which was not measured"):
        loss_of(m_too, 9).backward()
    assert opt.gradient_release.clip == "measured"  # it has to live for that


@pytest.mark.filterwarnings("ignore:fusedopt. the callback larger_first runs eagerly:RuntimeWarning")
@pytest.mark.parametrize("make", CLIPPED)
def test_clipping_by_the_norm_of_the_pass_before(make):
    """Against gradients that are scaled by hand."""
    m, norms, _ = clipped(True, make=CLIPPED[make], clip="last")
    other = net()
    by_hand, last, expected = CLIPPED[make](other), None, []
    by_hand.max_grad_norm = None
    for t in range(4):
        loss_of(other, t).backward()
        grads = [p.grad for p in other.parameters() if p.grad is not None]
        expected.append(torch.nn.utils.get_total_norm(grads).item())
        for g in grads if last else ():
            g.mul_(min(0.05 / (last + 1e-6), 1.0))
        last = expected[-1]
        by_hand.step()
        by_hand.zero_grad()
    assert norms == pytest.approx(expected, rel=1e-5)
    for p, q in zip(m.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_measured_norm_begins_clipping_by_the_last_one():
    m = net()
    opt = optim.SGD(m.parameters(), lr=1.0, max_grad_norm=1e-3)
    release = opt.release_gradients(0, clip="last")
    before = [p.detach().clone() for p in m.parameters()]
    loss = loss_of(m, 0)
    with release.measure():
        loss.backward(retain_graph=True)
    loss.backward()
    opt.step()
    moved = torch.cat([(p - q).flatten() for p, q in zip(m.parameters(), before, strict=True)]).norm()
    assert moved.item() == pytest.approx(1e-3, rel=1e-2)
    opt.max_grad_norm = None
    train(m, opt, 2)


def test_the_norm_is_of_all_gradients_whenever_their_parameters_came():
    m = net()
    m.words.requires_grad_(False)
    opt = optim.SGD([p for p in m.parameters() if p is not m.scale], lr=1.0, max_grad_norm=1e-3)
    release = opt.release_gradients(0, clip="measured")
    m.words.requires_grad_(True)
    opt.add_param_group({"params": [m.scale]})
    before = [p.detach().clone() for p in m.parameters()]
    with release.measure():
        loss_of(m, 0).backward()
    assert all(p.grad is None for p in m.parameters())
    loss_of(m, 0).backward()
    assert all(p.grad is None for p in m.parameters())
    opt.step()
    moved = torch.cat([(p - q).flatten() for p, q in zip(m.parameters(), before, strict=True)]).norm()
    assert moved.item() == pytest.approx(1e-3, rel=1e-2)


def test_measuring_is_for_gradients_of_one_pass():
    m = net()
    opt = optim.SGD(m.parameters(), lr=1.0, max_grad_norm=1e-3)
    release = opt.release_gradients(0, clip="measured")
    with release.accumulate():
        loss_of(m, 0).backward()
    with pytest.raises(
        RuntimeError, match=r"measure\(\) frees gradients, and parameter 0 of group 0 has one already"
    ):
        release.measure().__enter__()
    opt.zero_grad()
    with release.measure():
        loss_of(m, 0).backward()
        with pytest.raises(RuntimeError, match="within measure"):
            opt.step()
        with pytest.raises(RuntimeError, match=r"parameter \d+ of group 0 was measured in this pass"):
            loss_of(m, 1).backward()


# -- loss scaling


SCALED = {
    "AdamW": lambda m, **kwargs: optim.AdamW(groups(m, lr=1e-3), lr=1e-2, **kwargs),
    "RAdam": lambda m, **kwargs: fusedopt.RAdam(m.parameters(), lr=1e-2, **kwargs),
    "Lamb": lambda m, **kwargs: fusedopt.Lamb(m.parameters(), lr=1e-2, **kwargs),
    "reference": lambda m, **kwargs: fusedopt.Adam(m.parameters(), lr=1e-2, backend="reference", **kwargs),
    "eager": lambda m, **kwargs: fusedopt.Optimizer(
        m.parameters(), [larger_first, nesterov], lr=0.1, mom=0.9, **kwargs
    ),
}
without_warning = pytest.mark.filterwarnings("ignore:fusedopt. the callback larger_first runs:RuntimeWarning")


def scaler_of(scale=64.0, **kwargs):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2, **kwargs)


def scaled(make, batch_bytes=None, bad=(), steps=8, scaler=None, **release):
    """Trained with loss scaling; released where a size of batches is given.

    In ``bad`` steps one gradient is infinite. The model, its optimizer and the scale after each step.
    """
    m, scales, now = net(), [], []
    m.layers[1].weight.register_hook(lambda g: g * torch.inf if now and now[0] in bad else g)
    opt, scaler = make(m), scaler or scaler_of()
    released = None if batch_bytes is None else opt.release_gradients(batch_bytes, scaler=scaler, **release)
    measures = released is not None and (released.skip == "step" or released.clip == "measured")
    for t in range(steps):
        now[:] = [t]
        if measures:
            with released.measure():
                scaler.scale(loss_of(m, t)).backward()
        scaler.scale(loss_of(m, t)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        scales.append(scaler.get_scale())
    return m, opt, scales


@without_warning
@pytest.mark.parametrize("batch_bytes", [0, 500, 1 << 30])
@pytest.mark.parametrize("amp_fused", [False, True])
@pytest.mark.parametrize("rule", SCALED)
def test_scaled_training_is_the_same_to_the_bit(rule, amp_fused, batch_bytes):
    def make(m):
        return SCALED[rule](m, amp_fused=amp_fused)

    *one, scales = scaled(make)
    for skip in ("step", "batches"):
        *other, scales_too = scaled(make, batch_bytes, skip=skip)
        assert_same(one, other)
        assert scales == scales_too == [64, 128, 128, 256, 256, 512, 512, 1024]


@without_warning
@pytest.mark.parametrize("batch_bytes", [0, 500, 1 << 30])
@pytest.mark.parametrize("amp_fused", [False, True])
@pytest.mark.parametrize("rule", SCALED)
def test_a_step_that_is_measured_is_skipped_as_a_whole(rule, amp_fused, batch_bytes):
    """The first, which makes state, and later ones that were bound."""

    def make(m):
        return SCALED[rule](m, amp_fused=amp_fused)

    bad = (0, 1, 5)
    *one, scales = scaled(make, bad=bad)
    *other, scales_too = scaled(make, batch_bytes, bad)
    assert_same(one, other)
    assert scales == scales_too == [32, 16, 16, 32, 32, 16, 16, 32]
    if batch_bytes == 1 << 30:  # where all are one batch
        *other, scales_too = scaled(make, batch_bytes, bad, skip="batches")
        assert_same(one, other)
        assert scales == scales_too


@without_warning
@pytest.mark.parametrize("amp_fused", [False, True])
@pytest.mark.parametrize("rule", SCALED)
def test_batches_with_infinities_are_left_out(rule, amp_fused):
    """Against a training that leaves out those gradients itself."""

    def make(m):
        return SCALED[rule](m, amp_fused=amp_fused)

    bad = (0, 1, 5)
    *one, scales = scaled(make, 0, bad, skip="batches")
    m = net()
    opt = make(m)
    for t in range(8):
        loss_of(m, t).backward()
        if t in bad:
            m.layers[1].weight.grad = None
        opt.step()
        opt.zero_grad()
    assert_same(one, (m, opt))
    assert scales == [32, 16, 16, 32, 32, 16, 16, 32]


def test_a_batch_is_left_out_with_all_its_parameters():
    m, opt, _ = scaled(SCALED["AdamW"], 500, (1,), skip="batches", steps=2)
    steps = {name: opt.state[p]["step"] for name, p in m.named_parameters() if p in opt.state}
    assert {steps[f"layers.1.{name}"] for name in ("weight", "bias")} == {1}
    assert set(steps.values()) == {1, 2}


@needs_extension
@pytest.mark.parametrize("amp_fused", [False, True])
def test_scaled_batches_are_bound_and_repeated(amp_fused):
    def make(m):
        return optim.AdamW(m.parameters(), lr=1e-2, amp_fused=amp_fused)

    _, opt, _ = scaled(make, 500, skip="batches", steps=7)
    assert {engine.steps.repeated for engine in opt.gradient_release.engines} == {5}


class Half(nn.Module):
    """A network that overflows by itself where its loss is scaled by much."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("amp_fused", [False, True])
@pytest.mark.parametrize("skip", ["step", "batches"])
def test_a_scale_is_found_in_float16(skip, amp_fused):
    def run(released):
        torch.manual_seed(0)
        m = Half()
        opt = optim.AdamW(m.parameters(), lr=1e-2, amp_fused=amp_fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=4)
        x = torch.randn(4, 16)
        release = opt.release_gradients(0, scaler=scaler, skip=skip) if released else None
        losses, scales = [], []
        for _ in range(16):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = (m(x).float() - x).square().mean()
            if released and skip == "step":
                with release.measure():
                    scaler.scale(loss).backward(retain_graph=True)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            losses.append(loss.item())
            scales.append(scaler.get_scale())
        return m, opt, losses, scales

    *one, losses, scales = run(False)
    *other, losses_too, scales_too = run(True)
    assert scales[0] < 2.0**22 and len(set(scales)) > 3  # it has overflowed
    if skip == "step":
        assert_same(one, other)
        assert losses == losses_too and scales == scales_too
    else:
        assert losses_too[-1] < losses_too[0] and all(p.isfinite().all() for p in other[0].parameters())
        counts = {float(opt_state["step"]) for opt_state in other[1].state.values()}
        assert min(counts) < max(counts), "the last layers have gradients where the first have infinities"


def test_autocast_in_bfloat16_needs_no_scaler():
    def run(released, scaler=None):
        m = net()
        opt = RULES["AdamW"](m)
        if released:
            opt.release_gradients(500, scaler=scaler)
        for t in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(m, t)
            if scaler is None:
                loss.backward()
                opt.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(opt)
                scaler.update()
        return m, opt

    def plainly():
        m = net()
        opt = RULES["AdamW"](m)
        for t in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(m, t)
            opt.zero_grad()
            loss.backward()
            opt.step()
        return m, opt

    assert_same(plainly(), run(True))
    assert_same(plainly(), run(True, torch.amp.GradScaler("cpu", enabled=False)))


@without_warning
@pytest.mark.parametrize("amp_fused", [False, True])
@pytest.mark.parametrize("rule", SCALED)
def test_clipping_of_scaled_gradients_by_a_norm_that_was_measured(rule, amp_fused):
    def make(m):
        return SCALED[rule](m, amp_fused=amp_fused, max_grad_norm=0.05)

    bad = (0, 3)
    m, opt, scales = scaled(make, bad=bad)
    m_too, opt_too, scales_too = scaled(make, 500, bad, clip="measured")
    assert scales == scales_too
    assert opt_too.grad_norm.item() == pytest.approx(opt.grad_norm.item(), rel=1e-6)
    assert opt.grad_norm.item() > 0.05
    for p, q in zip(m.parameters(), m_too.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@without_warning
@pytest.mark.parametrize("amp_fused", [False, True])
@pytest.mark.parametrize("rule", SCALED)
def test_clipping_of_scaled_gradients_by_the_last_norm_that_was_a_number(rule, amp_fused):
    """Against gradients that are scaled, and left out, by hand."""
    norms = []

    def make(m, **kwargs):
        return SCALED[rule](m, amp_fused=amp_fused, **kwargs)

    def limited(m):
        opt = make(m, max_grad_norm=0.05)
        opt.register_step_post_hook(lambda *_: norms.append(opt.grad_norm.item()))
        return opt

    bad = (0, 4)
    m, _, _ = scaled(limited, 0, bad, skip="batches", clip="last")
    other, expected, last = net(), [], None
    opt = make(other)
    for t in range(8):
        loss_of(other, t).backward()
        grads = [p.grad for p in other.parameters() if p.grad is not None]
        expected.append(torch.nn.utils.get_total_norm(grads).item())
        for g in grads if last else ():
            g.mul_(min(0.05 / (last + 1e-6), 1.0))
        if t in bad:
            other.layers[1].weight.grad, expected[-1] = None, math.inf
        else:
            last = expected[-1]
        opt.step()
        opt.zero_grad()
    assert [t for t, norm in enumerate(norms) if not math.isfinite(norm)] == [*bad]
    for norm, right in zip(norms, expected, strict=True):
        assert right == math.inf or norm == pytest.approx(right, rel=1e-5)
    for p, q in zip(m.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amp_fused", [False, True])
@pytest.mark.parametrize("clip", ["last", "measured"])
def test_the_scale_may_change_between_the_measuring_pass_and_the_other(clip, amp_fused):
    m, other = net(), net()
    opt, plain = (optim.SGD(each.parameters(), lr=1.0, max_grad_norm=0.05) for each in (m, other))
    scaler = scaler_of()
    release = opt.release_gradients(500, clip=clip, scaler=scaler)
    for t, scale in enumerate((2.0, 1024.0, 16.0)):
        with release.measure():
            scaler.scale(loss_of(m, t)).backward()
        measured = opt.grad_norm.item()
        scaler.update(scale)
        scaler.scale(loss_of(m, t)).backward()
        scaler.step(opt)
        scaler.update()
        loss_of(other, t).backward()
        plain.step()
        plain.zero_grad()
        assert [measured, opt.grad_norm.item()] == pytest.approx([plain.grad_norm.item()] * 2, rel=1e-5)
    for p, q in zip(m.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amp_fused", [False, True])
def test_an_infinity_that_the_measuring_pass_did_not_have_leaves_out_its_batch(amp_fused):
    m, calls = net(), []
    opt = optim.SGD(m.parameters(), lr=0.1, amp_fused=amp_fused)
    scaler = scaler_of()
    release = opt.release_gradients(0, scaler=scaler)
    before = {p: p.detach().clone() for p in m.parameters()}

    def second(grad):
        calls.append(grad)
        return grad * torch.inf if len(calls) == 2 else grad

    m.layers[1].weight.register_hook(second)
    with release.measure():
        scaler.scale(loss_of(m, 0)).backward()
    scaler.scale(loss_of(m, 0)).backward()
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 32
    stay = {id(m.layers[1].weight), *map(id, m.unused.parameters())}
    assert {id(p) for p, old in before.items() if torch.equal(p.detach(), old)} == stay


@pytest.mark.parametrize("amp_fused", [False, True])
@pytest.mark.parametrize("batch_bytes", [0, 500])
def test_scaled_gradients_add_up(batch_bytes, amp_fused):
    def run(released):
        m = net()
        opt = optim.AdamW(m.parameters(), lr=1e-2, amp_fused=amp_fused)
        scaler, scales = scaler_of(), []
        if released:
            release = opt.release_gradients(batch_bytes, scaler=scaler, skip="batches")
        for t in range(16):
            with release.accumulate(t % 4 != 3) if released else contextlib.nullcontext():
                scaler.scale(loss_of(m, t, 0.25)).backward()
            if t % 4 == 3:
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()
                scales.append(scaler.get_scale())
        assert scales == [64, 128, 128, 256]
        return m, opt

    assert_same(run(False), run(True))


def test_a_scaler_of_two_optimizers():
    def run(released):
        models = net(), net(seed=1)
        opts = [optim.AdamW(m.parameters(), lr=1e-2) for m in models]
        scaler, scales = scaler_of(), []
        models[1].layers[1].weight.register_hook(lambda g: g * torch.inf if t == 1 else g)
        releases = [opt.release_gradients(0, scaler=scaler) for opt in opts] if released else []
        for t in range(6):
            for m, opt, release in itertools.zip_longest(models, opts, releases):
                if release is not None:
                    with release.measure():
                        scaler.scale(loss_of(m, t)).backward()
                scaler.scale(loss_of(m, t)).backward()
                scaler.step(opt)
            scaler.update()
            for opt in opts:
                opt.zero_grad()
            scales.append(scaler.get_scale())
        assert scales == [64, 32, 32, 64, 64, 128]
        return list(zip(models, opts, strict=True))

    for one, other in zip(run(False), run(True), strict=True):
        assert_same(one, other)


def test_a_scaled_training_goes_on_from_a_checkpoint():
    def make(m):
        return optim.AdamW(m.parameters(), lr=1e-2)

    m, opt, _ = scaled(make, 500, (1,), steps=5)
    other = net(seed=1)
    other_opt = make(other)
    other.load_state_dict(m.state_dict())
    other_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    scaler = scaler_of()
    scaler.load_state_dict(opt.gradient_release.scaler.state_dict())
    release = other_opt.release_gradients(0, scaler=scaler, skip="batches")
    release.remove()
    with other_opt.release_gradients(0, scaler=scaler, skip="batches"):
        for t in range(5, 8):
            scaler.scale(loss_of(other, t)).backward()
            scaler.step(other_opt)
            scaler.update()
    m, opt, scales = scaled(make, bad=(1,))
    assert_same((m, opt), (other, other_opt))
    assert scaler.get_scale() == scales[-1]


@pytest.mark.parametrize("amp_fused", [False, True])
def test_what_gradients_are_multiplied_by_ends_with_what_said_so(amp_fused):
    """With the scaler, and with the limit of the norm."""

    def run(released):
        m = net()
        opt = optim.AdamW(m.parameters(), lr=1e-2, amp_fused=amp_fused)
        scaler, t = scaler_of(2.0**10), itertools.count()

        def scaled_pass():
            loss = loss_of(m, next(t))
            if released and opt.gradient_release is not None:
                with opt.gradient_release.measure():
                    scaler.scale(loss).backward(retain_graph=True)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()

        def plain_pass():
            loss_of(m, next(t)).backward()
            opt.step()
            opt.zero_grad()

        scaled_pass(), scaled_pass()
        release = opt.release_gradients(500) if released else None
        plain_pass(), plain_pass()
        if released:
            release.scaler = scaler
        scaled_pass(), scaled_pass()
        if released:
            release.scaler = None
        plain_pass(), plain_pass()
        return m, opt

    assert_same(run(False), run(True))


@pytest.mark.parametrize("own", ["nothing", "sign", "average"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_group_that_is_added_later_is_measured_by_its_own_callbacks(own, scaled):
    def descent(p, lr, **kwargs):
        p.data.sub_(p.grad, alpha=lr)

    def sign(p, lr, **kwargs):
        p.data.sub_(p.grad.sign(), alpha=lr)

    def average(p, lr, mean=None, **kwargs):
        mean = p.grad if mean is None else mean.lerp(p.grad, 0.5)
        p.data.sub_(mean, alpha=lr)
        return {"mean": mean}

    def run(released):
        a, b, c = (nn.Parameter(torch.linspace(-1, k, 4)) for k in range(3))
        groups = [{"params": [a]}, {"params": [b], "cbs": [sign]}]
        opt = fusedopt.Optimizer(groups, descent, lr=0.1, max_grad_norm=1.0)
        scaler = scaler_of() if scaled else None
        release = opt.release_gradients(clip="measured", scaler=scaler) if released else None

        def once(params):
            loss = sum((p * p).sum() for p in params)
            loss = loss if scaler is None else scaler.scale(loss)
            if release is not None:
                with release.measure():
                    loss.backward(retain_graph=True)
            loss.backward()
            if scaler is None:
                opt.step()
            else:
                if not released:
                    scaler.unscale_(opt)
                scaler.step(opt)
                scaler.update()
            opt.zero_grad()

        once([a, b])
        theirs = {"sign": {"cbs": [sign]}, "average": {"cbs": [average]}}
        opt.add_param_group({"params": [c], **theirs.get(own, {})})
        once([a, b, c])
        once([a, b, c])
        return [a, b, c], opt.grad_norm.item()

    (ours, norm), (plain, expected) = run(True), run(False)
    assert norm == pytest.approx(expected, rel=1e-5)
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p, q)


def test_what_is_no_longer_clipped_is_stepped_as_it_is():
    def run(released):
        m = net()
        opt = optim.SGD(m.parameters(), lr=1.0, max_grad_norm=1e-3)
        release = opt.release_gradients(500, clip="measured")
        for t in range(3):
            with release.measure():
                loss_of(m, t).backward()
            loss_of(m, t).backward()
            opt.step()
        opt.max_grad_norm = None
        if not released:
            release.remove()
        train(m, opt, 3)
        return m, opt

    assert_same(run(False), run(True))


# -- what is refused


def with_total(p, lr, **kwargs):
    p.data.sub_(p.grad / fusedopt.total(p.grad.square().sum()).sqrt(), alpha=lr)


def test_what_needs_the_whole_step_is_refused():
    m = net()
    with pytest.raises(RuntimeError, match=r"with_total calls fusedopt.total.*Remedy"):
        fusedopt.Optimizer(m.parameters(), with_total, lr=0.1).release_gradients()
    with pytest.raises(RuntimeError, match=r'max_grad_norm is over all.*clip="last".*clip="measured"'):
        optim.SGD(m.parameters(), lr=0.1, max_grad_norm=1.0).release_gradients()
    p = m.scale
    with pytest.warns(UserWarning, match="duplicate"):
        twice = optim.SGD([p, p], lr=0.1)
    with pytest.raises(RuntimeError, match="listed twice"):
        twice.release_gradients()
    for wrong, message in (
        (dict(batch_bytes=-1), "batch_bytes must not be negative"),
        (dict(clip="no"), "clip must be"),
    ):
        opt = optim.SGD(m.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=message):
            opt.release_gradients(**wrong)
        assert opt.gradient_release is None


def test_what_comes_to_need_the_whole_step_is_refused_in_backward():
    m = net()
    opt = fusedopt.Optimizer(m.parameters(), fusedopt.sgd_step, lr=0.1)
    opt.release_gradients(0)
    train(m, opt, 2)
    opt.max_grad_norm = 1.0
    with pytest.raises(RuntimeError, match="max_grad_norm is over all gradients"):
        loss_of(m, 0).backward()
    opt.max_grad_norm, opt.cbs = None, [with_total]
    opt.zero_grad()
    with pytest.raises(RuntimeError, match=r"with_total calls fusedopt.total"):
        loss_of(m, 0).backward()


@pytest.mark.parametrize("amp_fused", [False, True])
@pytest.mark.parametrize("batch_bytes", [0, 1 << 30])
def test_loss_scaling_that_nobody_spoke_of_is_refused(amp_fused, batch_bytes):
    m = net()
    opt = optim.SGD(m.parameters(), lr=1e-6, amp_fused=amp_fused)
    opt.release_gradients(batch_bytes)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(m, 0)).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler looks at all gradients.*scaler=scaler.*bfloat16"):
        scaler.step(opt)
    opt.gradient_release.abandon()
    opt.zero_grad()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(loss_of(m, 0)).backward()
    scaler.step(opt)


@pytest.mark.parametrize("amp_fused", [False, True])
@pytest.mark.parametrize("batch_bytes", [0, 1 << 30])
def test_loss_scaling_in_another_way_is_refused(amp_fused, batch_bytes):
    m = net()
    opt = optim.SGD(m.parameters(), lr=0.1, amp_fused=amp_fused)
    for wrong, kind, message in (
        (dict(skip="parts"), ValueError, 'skip must be "step" or "batches"'),
        (dict(scaler=1024.0), TypeError, r"scaler must be a torch\.amp\.GradScaler, not float"),
    ):
        with pytest.raises(kind, match=message):
            opt.release_gradients(**wrong)
    scaler = scaler_of()
    release = opt.release_gradients(batch_bytes, scaler=scaler)
    before = [p.detach().clone() for p in m.parameters()]
    with pytest.raises(RuntimeError, match=r'twice, first within measure.*skip="batches"'):
        scaler.scale(loss_of(m, 0)).backward()
        scaler.step(opt)
    for p, old in zip(m.parameters(), before, strict=True):
        assert_same_bits(p.detach(), old)
    opt.zero_grad()
    release.skip = "batches"
    scaler.scale(loss_of(m, 0)).backward()
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"GradScaler\.unscale_ was called.*leave it out.*max_grad_norm"):
        scaler.step(opt)
    assert not hasattr(opt, "grad_scale") and not hasattr(opt, "found_inf")
    release.abandon()
    opt.zero_grad()
    scaler.update()
    scaler.scale(loss_of(m, 0)).backward()
    scaler.step(opt)
    scaler.update()
    scaler.scale(loss_of(m, 0)).backward()
    scaler.step(opt)
    with pytest.raises(RuntimeError, match="already been called since the last update"):  # torch's
        scaler.step(opt)


def reads_gradients(p, **kwargs):
    return {"seen": p.grad.clone()}


def counts(p, seen=0, **kwargs):
    return {"seen": seen + 1}


def test_extra_tensors_and_applied_callbacks():
    m = net()
    opt = fusedopt.Optimizer(m.parameters(), sophia, lr=0.1)
    opt.release_gradients(0)
    train(m, opt, 2)
    with pytest.raises(RuntimeError, match="extra tensors are for a whole step"):
        opt.step(extra={"hess": [torch.ones_like(p) for p in m.parameters()]})
    with pytest.raises(RuntimeError, match=r"reads_gradients reads gradients, and release_gradients"):
        opt.apply(reads_gradients)
    opt.apply(counts)
    assert opt.state[m.scale]["seen"] == 1


def sophia(p, lr, hess=None, **kwargs):
    p.data.sub_(p.grad if hess is None else p.grad / hess, alpha=lr)


def begins_later(p, lr, decay, slow=None, fast=None, **_):
    out = {"slow": p.data.clone() if slow is None else slow}
    if decay:
        out["fast"] = p.grad.data.clone() if fast is None else fast.mul_(0.5).add_(p.grad.data)
    p.data.sub_(p.grad.data, alpha=lr)
    return out


def test_a_pass_may_be_measured_before_a_step_that_begins_more_state():
    def run(backend):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        options = dict(lr=0.1, decay=0.0, amp_fused=True, backend=backend)
        opt, scaler = fusedopt.Optimizer(model.parameters(), begins_later, **options), scaler_of()
        release = opt.release_gradients(0, scaler=scaler)
        for t in range(5):
            opt.param_groups[0]["decay"] = float(t > 2)
            x = torch.randn(5, 4)
            with release.measure():
                scaler.scale(model(x).square().mean()).backward()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(opt)
            scaler.update()
        return [*model.parameters(), *(opt.state[p]["fast"] for p in model.parameters())]

    torch.testing.assert_close(run("cpp"), run("reference"))
