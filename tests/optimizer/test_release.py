"""Gradients that are freed as they are used: what comes out is what an ordinary step makes of them."""

import copy
import gc
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
def test_loss_scaling_is_refused(amp_fused, batch_bytes):
    m = net()
    opt = optim.SGD(m.parameters(), lr=1e-6, amp_fused=amp_fused)
    opt.release_gradients(batch_bytes)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(m, 0)).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler looks at all gradients.*bfloat16"):
        scaler.step(opt)
    opt.gradient_release.abandon()
    opt.zero_grad()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(loss_of(m, 0)).backward()
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
