"""Policies of storage: any rule, stored in fewer bytes, is stepped by kernels as the reference steps it."""

import itertools

import pytest
import torch
from devices import DEVICE
from helpers import assert_same_bits
from torch import nn

import fusedopt
from fusedopt import optim
from fusedopt.storage import PRESETS, functions, policy
from fusedopt.storage.callbacks import dtypes, encoded
from fusedopt.storage.policy import POLICIES

FLOATS = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.1754944e-38, 1e-42, -1e-45, 65504.0, 3.4028235e38, 1e-8])


def everything(n=40_000):
    """Floats of all sizes, with numbers halfway between two of bfloat16, and special ones."""
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (n,), dtype=torch.int64).to(torch.int32)
    halves = (torch.randint(0, 2**16, (n // 4,), dtype=torch.int64) << 16 | 0x8000).to(torch.int32)
    return torch.cat([bits.view(torch.float32), halves.view(torch.float32), FLOATS])


def finite(x):
    return x[x.isfinite()]


def stored(name, x, noise=None):
    """What is stored of x, in the dtypes of storage, as numbers."""
    found = POLICIES[name]
    parts = encoded(found, x.clone(), noise)
    return [part.to(dtype).to(torch.float32) for part, dtype in zip(parts, dtypes(found), strict=True)]


def there_and_back(name, x, noise=None):
    return POLICIES[name].decode(*stored(name, x, noise))


# ---------------------------------------------------------------- what policies make of numbers


@pytest.mark.parametrize("name", ["float32", "bf16+16", "master"])
def test_some_lose_nothing(name):
    x = finite(everything())
    assert_same_bits(there_and_back(name, x), x)


@pytest.mark.parametrize(
    ("name", "bits"), [("bfloat16", 8), ("bfloat16_sr", 8), ("float16", 11), ("kahan", 15), ("bf16+8", 15)]
)
def test_the_error_of_others_is_half_of_the_last_bit(name, bits):
    x = finite(everything())
    x = x[(x.abs() > 1e-4) & (x.abs() < 6e4)]
    error = (there_and_back(name, x).double() - x.double()).abs() / x.double().abs()
    assert error.max() <= 2.0**-bits * (1 + 1e-6)
    assert error.max() > 2.0**-bits / 4


@pytest.mark.parametrize("name", [n for n in POLICIES if POLICIES[n].code == torch.bfloat16])
def test_every_number_of_bfloat16_is_stored_as_it_is(name):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    noise = torch.full_like(every, 1.75) if POLICIES[name].noisy else None
    out = there_and_back(name, every, noise)
    assert ((out == every) | (out.isnan() & every.isnan())).all()


def unsigned(name):
    return name.startswith("uint8")


@pytest.mark.parametrize("name", POLICIES)
def test_what_was_decoded_is_encoded_to_the_same(name):
    x = finite(everything()) if POLICIES[name].block else everything()
    once = there_and_back(name, x.abs() if unsigned(name) else x)
    again = there_and_back(name, once)
    there = once != 0  # of zeros Kahan's sum has lost the sign
    assert_same_bits(again[there], once[there])
    assert (again[~there] == 0).all()


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_no_number_stays_that_and_zero_zero(name):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    noise = torch.full_like(x, 1.75) if POLICIES[name].noisy else None
    out = there_and_back(name, x, noise)
    if POLICIES[name].block:
        assert not out[:3].isfinite().any() and out[3] == 0
        return
    assert out[0].isnan() and out[3] == 0
    assert (out[1:3] == x[1:3]).all()


def test_what_a_parameter_is_split_into_is_the_nearest_bfloat16_and_the_rest():
    x = finite(everything())
    high, low = functions.split(x)
    assert_same_bits(high.to(torch.bfloat16).float(), high)
    near = x.to(torch.bfloat16).float()
    tie = low == -(2**15)
    assert (high == near)[~tie].all() and low.min() >= -(2**15) and low.max() < 2**15
    assert_same_bits(functions.joined(high, low), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_at_random_is_between_the_neighbours_and_right_on_average(dtype):
    """False alarm: a normal variable beyond 5 standard deviations, 6e-7 for each of 60 numbers."""
    n, spread = 1 << 14, 5
    for x in [*torch.randn(40), *torch.tensor([1.0, 3e-5, 1e-7, 65000.0, -0.3]), *(torch.randn(15) * 1e-5)]:
        exact = x.expand(n).clone()
        noise = 1 + (torch.randperm(n) * 4 % 2**16 + torch.randint(0, 4, (n,))) * 2.0**-16
        out = functions.rounded(exact, dtype, noise).double()
        assert_same_bits(out.to(dtype).double(), out)
        low, high = out.min(), out.max()
        assert low <= x.double() <= high
        gap = high - low
        assert gap == 0 or torch.nextafter(low.to(dtype), high.to(dtype)) == high.to(dtype)
        assert abs(out.mean() - x.double()) <= spread * gap / 2 / n**0.5


BLOCKS = [name for name in POLICIES if POLICIES[name].block]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("seed", range(6))
def test_the_error_in_blocks_is_half_a_step_of_the_root(name, seed):
    """Of sizes that differ by orders of magnitude within blocks, of one outlier, of subnormal ones, of zeros."""
    torch.manual_seed(seed)
    x = torch.randn(64 * 40 + 37) * 10.0 ** torch.randint(-seed, 1, (64 * 40 + 37,))
    x[100] = 1e6
    x[256:512] *= 1e-30
    x[512:768] = 0
    x[768:1024] = 1e-42
    x = x.abs() if unsigned(name) else x
    out = there_and_back(name, x)
    count, top = POLICIES[name].block, 255 if unsigned(name) else 127
    assert ((out > 0) == (x > 0))[:256].all() or not unsigned(name)
    for block, was in zip(out.split(count), x.split(count), strict=True):
        largest = was.abs().max().double()
        # Half a step of the root, of which the square is within a factor of what a parabola would have.
        root = was.abs().double().sqrt()
        step = largest.sqrt() / top
        limit = 2 * (2 * root * step * 0.75 + (step * 1.5) ** 2) + 1e-34
        assert ((block.double() - was.double()).abs() <= limit).all()
        assert (block.sign() * was.sign() >= 0).all()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -1.0, -100.0])
def test_what_does_not_fit_is_seen_and_harms_its_block_alone(name, bad):
    x = torch.rand(1000) + 0.1
    x[300] = bad
    out = there_and_back(name, x)
    count = POLICIES[name].block
    block = slice(300 // count * count, 300 // count * count + count)
    if -1000 < bad < 0 and not unsigned(name):
        assert out.isfinite().all()
        return
    assert not out[300].isfinite()
    rest = torch.ones(1000, dtype=torch.bool)
    rest[block] = False
    assert out[rest].isfinite().all() and (out[rest] > 0).all()
    assert (out[block].isfinite()).sum() == count - 1


# ---------------------------------------------------------------- steps


SHAPES = [(300, 17), (4097,), (5,), ()]


def parameters(dtype=torch.float32, device="cpu"):
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in SHAPES]


def give(params, t):
    torch.manual_seed(100 + t)
    for p in params:
        p.grad = torch.randn(p.shape).to(p)


def user_rule(p, lr, mean=None, **kwargs):
    mean = torch.zeros_like(p) if mean is None else mean
    mean = mean + (p.grad - mean) * 0.1
    p.data.sub_(mean.sign() * mean.abs().sqrt(), alpha=lr)
    return {"mean": mean}


RULES = {
    "AdamW": lambda ps, **k: optim.AdamW(ps, lr=0.01, **k),
    "Lamb": lambda ps, **k: fusedopt.Lamb(ps, lr=0.01, **k),
    "RAdam": lambda ps, **k: fusedopt.RAdam(ps, lr=0.01, **k),
    "Lion": lambda ps, **k: fusedopt.rules.Lion(ps, lr=0.01, **k),
    "Adafactor": lambda ps, **k: fusedopt.rules.Adafactor(ps, beta1=0.9, **k),
    "user": lambda ps, **k: fusedopt.Optimizer(ps, [user_rule], lr=0.01, **k),
}
CHOICES = {
    "state": {"*": None},
    "param": {"param": None, "*": "float32"},
}


def run(make, storage, dtype, backend, steps=4, device="cpu", **options):
    params = parameters(dtype, device)
    opt = make(params, storage=storage, backend=backend, **options)
    for t in range(steps):
        give(params, t)
        opt.step()
    return params, opt


def tensors(opt, params):
    return [
        {k: v for k, v in opt.state[p].items() if isinstance(v, torch.Tensor)}
        for p in params
        if p in opt.state
    ]


CASES = [
    (rule, name, where)
    for rule, name, where in itertools.product(RULES, POLICIES, CHOICES)
    if (POLICIES[name].params if where == "param" else POLICIES[name].state)
    and (rule == "AdamW" or name in ("bf16+16", "bfloat16_sr", "int8"))
    and not name.startswith("uint8")
]
"""Every policy with one rule, and every rule with those that need most."""


@pytest.mark.filterwarnings("ignore:fusedopt. the callback adafactor_step")
@pytest.mark.parametrize(("rule", "name", "where"), CASES)
def test_kernels_do_what_the_reference_does(rule, name, where, compiled):
    dtype = POLICIES[name].code if where == "param" else torch.float32
    storage = {k: name if v is None else v for k, v in CHOICES[where].items()}
    ours, opt = run(RULES[rule], storage, dtype, compiled, device=DEVICE)
    theirs, reference = run(RULES[rule], storage, dtype, "reference")
    if rule == "Adafactor" and POLICIES[name].block:
        assert "whose last dimension is not in whole blocks" in str(opt.explain())
    else:
        assert "runs eagerly" not in str(opt.explain())
        assert opt.engine.bound or compiled == "triton"
    for a, b in zip(tensors(opt, ours), tensors(reference, theirs), strict=True):
        assert {k: v.dtype for k, v in a.items()} == {k: v.dtype for k, v in b.items()}
    for a, b in zip(ours, theirs, strict=True):
        eps = 2.0**-7 if dtype != torch.float32 or name.endswith("16") or "sr" in name else 1e-4
        torch.testing.assert_close(a.cpu(), b, rtol=eps, atol=eps * 0.02)


def test_the_parameter_with_16_bits_beside_it_is_float32s():
    """To the bit, so that no master copy is needed."""
    low, _ = run(RULES["AdamW"], {"param": "bf16+16", "*": "float32"}, torch.bfloat16, "cpp", 6)
    master, opt = run(RULES["AdamW"], {"param": "master", "*": "float32"}, torch.bfloat16, "cpp", 6)
    for p, q in zip(low[:3], master[:3], strict=True):
        exact = opt.state[q]["param:master"]
        near = exact.to(torch.bfloat16)
        assert ((p == near) | ((p.float() - exact).abs() == (near.float() - exact).abs())).all()


def test_a_slow_average_moves_only_if_it_is_rounded_at_random():
    """With β = 0.999 each step adds a thousandth, less than half of the last bit of a bfloat16."""

    def average(p, mean=None, **kwargs):
        mean = torch.zeros_like(p) if mean is None else mean
        return {"mean": mean * 0.999 + p.grad * 0.001}

    found = {}
    for name in ("bfloat16", "bfloat16_sr", "kahan", "float32"):
        p = nn.Parameter(torch.zeros(4096))
        opt = fusedopt.Optimizer([p], [average], storage=name)
        p.grad = torch.ones_like(p)
        for _ in range(1000):
            opt.step()
        mean = opt.state[p]["mean"].float()
        found[name] = (mean + opt.state[p].get("mean:kahan", 0)).mean().item()
    expected = 1 - 0.999**1000
    assert found["float32"] == pytest.approx(expected, rel=1e-4)
    assert found["bfloat16_sr"] == pytest.approx(expected, rel=2e-3)
    assert found["kahan"] == pytest.approx(expected, rel=2e-3)
    assert found["bfloat16"] < 0.6 * expected


def test_steps_repeat_and_another_seed_is_another_run():
    a, _ = run(RULES["AdamW"], "bfloat16_sr", torch.float32, "cpp")
    b, _ = run(RULES["AdamW"], "bfloat16_sr", torch.float32, "cpp")
    for p, q in zip(a, b, strict=True):
        assert_same_bits(p, q)
    params = parameters()
    opt = optim.AdamW(params, lr=0.01, storage="bfloat16_sr")
    for group in opt.param_groups:
        group["storage_seed"] = 1
    for t in range(4):
        give(params, t)
        opt.step()
    assert not torch.equal(params[0], a[0])


@pytest.mark.parametrize("storage", ["bfloat16_sr", "int8"])
def test_what_is_stored_does_not_depend_on_threads(storage):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        p = nn.Parameter(torch.randn(200_000))
        opt = optim.AdamW([p], lr=0.01, storage=storage)
        for _ in range(2):
            p.grad = torch.randn(200_000)
            opt.step()
        found.append([p.detach(), *(v for v in opt.state[p].values() if isinstance(v, torch.Tensor))])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_parameter_that_somebody_has_set_is_taken_as_it_is():
    p = nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    opt = optim.SGD([p], lr=0.0, momentum=0.9, storage={"param": "master"})
    p.grad = torch.ones_like(p)
    opt.step()
    p.data.fill_(3.0)
    opt.step()
    assert (p == 3).all() and (opt.state[p]["param:master"] == 3).all()


def test_parameters_of_another_dtype_are_stepped_as_they_are():
    params = [nn.Parameter(torch.ones(10, dtype=d)) for d in (torch.bfloat16, torch.float32)]
    opt = optim.AdamW(params, lr=0.1, storage={"param": "bf16+16"})
    give(params, 0)
    opt.step()
    assert "param:bf16+16" in opt.state[params[0]] and "param:bf16+16" not in opt.state[params[1]]


def test_groups_may_have_their_own():
    a, b = nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(64))
    opt = optim.AdamW(
        [{"params": [a]}, {"params": [b], "storage": {"exp_avg_sq": "bf16+8"}}],
        storage={"exp_avg": "bfloat16"},
    )
    give([a, b], 0)
    opt.step()
    kept = [{k: v.dtype for k, v in opt.state[p].items() if isinstance(v, torch.Tensor)} for p in (a, b)]
    assert kept[0] == {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.float32}
    assert kept[1] == {
        "exp_avg": torch.float32,
        "exp_avg_sq": torch.bfloat16,
        "exp_avg_sq:bf16+8": torch.int8,
    }


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_presets_are_choices_of_fewer_bytes_and_fuse(name, dtype):
    def held(found, opt):
        kept = [*found, *(t for state in tensors(opt, found) for t in state.values())]
        return sum(t.numel() * t.element_size() for t in kept)

    plain = {"param": "master", "*": "float32"} if dtype == torch.bfloat16 else None
    assert PRESETS[name].keys() == {"param", "*"}
    ours, opt = run(RULES["AdamW"], name, dtype, "cpp")
    assert (
        opt.param_groups[0]["storage"]
        == run(RULES["AdamW"], PRESETS[name], dtype, "cpp")[1].param_groups[0]["storage"]
    )
    assert opt.engine.bound and "runs eagerly" not in str(opt.explain())
    assert held(ours, opt) < 0.75 * held(*run(RULES["AdamW"], plain, dtype, "cpp"))


def test_less_memory_is_less_than_a_balance():
    def bytes_of(policy):
        found = POLICIES[policy]
        return sum(d.itemsize for d in (found.code, *found.rest)) + (4 / found.block if found.block else 0)

    memory, balanced = ({k: bytes_of(v) for k, v in PRESETS[name].items()} for name in ("memory", "balanced"))
    assert all(memory[k] <= balanced[k] for k in memory) and memory != balanced


def test_blocks_of_two_sizes_are_told_what_to_do():
    params = parameters()
    opt = optim.AdamW(params, storage={"exp_avg": "int8", "exp_avg_sq": "uint8_256"})
    give(params, 0)
    with pytest.warns(
        RuntimeWarning, match="blocks of 256 and of 64 .* one size for all state of a parameter"
    ):
        opt.step()


# ---------------------------------------------------------------- where decoding and encoding are two programs


def momentum(p, lr, m=None, **kwargs):
    m = torch.zeros_like(p) if m is None else m
    m.lerp_(p.grad, 0.3)
    p.data.sub_(m, alpha=lr)
    return {"m": m}


def looks(p, **kwargs):
    p.data.flatten().tolist()


def steps_down(p, lr, **kwargs):
    if p.data.flatten().tolist() and p.grad is not None:
        p.data.sub_(p.grad, alpha=lr)


def trained(cbs, storage, backend, like=None, param=torch.float32, transposed=False, steps=3, between=None):
    """An optimizer after some steps; ``like``: it goes on from this one's checkpoint."""
    torch.manual_seed(0)
    x = torch.randn(70, 80).to(param)
    p = nn.Parameter((x.t() if transposed else x).to(DEVICE))
    opt = fusedopt.Optimizer([p], cbs, lr=0.1, storage=storage, backend=backend)
    if like is not None:
        p.data.copy_(like.param_groups[0]["params"][0].data)
        opt.load_state_dict(like.state_dict())
    for _ in range(steps):
        p.grad = torch.randn(p.shape).to(p)
        opt.step()
        if between is not None:
            opt.apply(between)
    return opt


def assert_alike(a, b):
    """Parameters, and what is decoded of state, whose dtypes are the same: most to rounding, few to one code."""
    (p,), (q,) = ([*o.param_groups[0]["params"]] for o in (a, b))
    assert a.state[p].keys() == b.state[q].keys()
    for key, value in a.state[p].items():
        assert getattr(value, "dtype", value) == getattr(b.state[q][key], "dtype", b.state[q][key])
    ours, theirs = ({"param": x, **o.state_dict()["state"][0]} for o, x in ((a, p), (b, q)))
    for key, x in ours.items():
        if isinstance(x, torch.Tensor):
            off, size = (x.double().cpu() - theirs[key].double()).abs(), x.abs().max().item()
            assert off.max() <= 0.02 * size and off.mean() <= 1e-4 * size, key


EAGER = [[looks, momentum], [momentum, looks], [momentum, steps_down], [steps_down, momentum]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("storage", ["int8", "int8_256", "bfloat16", "bf16+8", "kahan"])
@pytest.mark.parametrize("cbs", EAGER, ids=lambda cbs: " ".join(cb.__name__ for cb in cbs))
def test_beside_eager_callbacks_state_is_what_the_reference_keeps(cbs, storage, transposed):
    """New, kept, and from a checkpoint, where decoding is a program of its own; in whatever memory order."""
    made = {}
    for backend in (None, "reference"):
        first = trained(cbs, storage, backend, transposed=transposed)
        made[backend] = first, trained(cbs, storage, backend, like=first, transposed=transposed)
    for ours, theirs in zip(*made.values(), strict=True):
        assert_alike(ours, theirs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("state", ["float32", "int8", "bfloat16"])
def test_so_it_is_of_bfloat16_parameters_that_are_rounded_at_random(state, transposed):
    storage = {"param": "bfloat16_sr", "*": state}
    a, b = (
        trained([momentum, looks], storage, backend, param=torch.bfloat16, transposed=transposed)
        for backend in (None, "reference")
    )
    assert_alike(a, b)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("storage", ["int8", "bfloat16", "bf16+8"])
@pytest.mark.parametrize(
    "between", [looks, momentum, lambda p, **kw: p.data.div_(p.data.norm(dim=-1, keepdim=True))]
)
def test_what_is_applied_between_steps_finds_numbers(storage, between):
    a, b = (trained([momentum], storage, backend, between=between) for backend in (None, "reference"))
    assert_alike(a, b)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "storage", [{"*": "int8", "exp_avg": "int8_256"}, {"*": "int8_256", "exp_avg": "int8"}]
)
def test_blocks_of_two_sizes_are_slow_and_right(storage):
    made = []
    for backend in (None, "reference"):
        params = parameters()
        opt = optim.AdamW(params, lr=0.1, storage=storage, backend=backend)
        for t in range(3):
            give(params, t)
            opt.step()
        made.append(params)
    for p, q in zip(*made, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("storage", ["int8", "memory", {"*": "int8"}])
def test_a_group_that_gets_storage_later_is_told_that_the_optimizer_has_none(storage):
    params = parameters()
    opt = optim.AdamW(params, lr=0.1)
    opt.param_groups[0]["storage"] = storage
    give(params, 0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="the optimizer has none"):
        opt.step()
    assert all(map(torch.equal, params, before)) and not opt.state[params[0]]


def test_a_group_that_gets_other_storage_later_is_understood_as_the_constructor_would():
    params = parameters()
    opt = optim.AdamW(params, lr=0.1, storage="int8")
    give(params, 0)
    opt.step()
    opt.param_groups[0]["storage"] = "bfloat16"
    with pytest.raises(RuntimeError, match=r"stored in the policy 'int8', .* storage has 'bfloat16'"):
        opt.step()
    opt.param_groups[0]["storage"] = "itn8"
    with pytest.raises(ValueError, match="itn8"):
        opt.step()


# ---------------------------------------------------------------- a policy of one's own


class Halved(policy.Policy):
    """Two numbers of float16."""

    code, rest = torch.float16, (torch.float16,)

    def encode(self, x, noise):
        high = functions.rounded(x, torch.float16)
        return high, x - high

    def decode(self, code, *rest):
        return code + rest[0]


def test_a_users_policy_is_a_kernel(monkeypatch):
    monkeypatch.setattr(policy, "POLICIES", POLICIES)
    policy.register("halved", Halved())
    try:
        ours, opt = run(RULES["user"], {"mean": "halved"}, torch.float32, "cpp")
        theirs, _ = run(RULES["user"], {"mean": "halved"}, torch.float32, "reference")
        assert opt.state[ours[0]]["mean:halved"].dtype == torch.float16
        assert "runs eagerly" not in str(opt.explain())
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
        with pytest.raises(ValueError, match="there is a policy 'halved' already"):
            policy.register("halved", Halved())
    finally:
        del POLICIES["halved"]


class Guarded(Halved):
    nothing = 0.0

    def encode(self, x, noise):
        high = functions.rounded(x, torch.float16)
        return high, torch.where(x == x, x - high, self.nothing)


def test_numbers_of_our_own_policies_are_constants_and_those_of_others_scalars(monkeypatch):
    """Others' may be settings, which may change."""
    monkeypatch.setattr(policy, "POLICIES", POLICIES)
    policy.register("guarded", Guarded())
    try:
        slots = {}
        for name in ("float32", "int8", "uint8_256", "kahan", "guarded"):
            _, opt = run(RULES["user"], {"mean": name}, torch.float32, "cpp")
            slots[name] = max(kernel.program.slots for kernel, _ in opt.engine.launched)
    finally:
        del POLICIES["guarded"]
    assert slots.pop("guarded") == slots["float32"] + 1
    assert len(set(slots.values())) == 1


class Printing(policy.Policy):
    def encode(self, x, noise):
        print(x)
        return x

    def decode(self, code):
        return code


def test_a_code_alone_that_means_other_numbers_is_refused(monkeypatch):
    """It would be handed to rules as it is: nothing beside it says that it is encoded."""
    monkeypatch.setattr(policy, "POLICIES", dict(POLICIES))

    class Scaled(policy.Policy):
        code = torch.float16

        def encode(self, x, noise):
            return x * 1024.0

        def decode(self, code, *rest):
            return code / 1024.0

    with pytest.raises(
        ValueError, match=r"its code alone must decode it as it is\. Remedy: .*`rest`.*`block`"
    ):
        policy.register("scaled", Scaled())


class Scaled(Halved):
    unit = 1.0

    def __init__(self, unit):
        self.unit = unit


def test_a_policy_stays_as_it_was_registered(monkeypatch):
    monkeypatch.setattr(policy, "POLICIES", {})
    one, other = Scaled(2.0), Scaled(2.0)
    one.unit = 4.0
    policy.register("scaled", one)
    with pytest.raises(
        AttributeError, match=r"'unit' of a policy that is registered cannot change.*register another"
    ):
        one.unit = 8.0
    with pytest.raises(AttributeError, match="cannot change"):
        del one.unit
    other.unit = 8.0
    assert (one.unit, other.unit) == (4.0, 8.0)


def test_a_policy_that_does_more_than_compute_is_refused():
    with pytest.raises(ValueError, match=r"a policy may only compute: .*print"):
        policy.register("printing", Printing())


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("storage", "error", "words"),
    [
        ("bflot16", ValueError, "did you mean 'bfloat16'"),
        (
            {"exp_agv": "bfloat16"},
            ValueError,
            "'exp_agv', and no callback keeps such; did you mean 'exp_avg'",
        ),
        ({"param": "bfloat16"}, ValueError, "is not for parameters; these are: bfloat16_sr"),
        ({"exp_avg": "master"}, ValueError, "is not for state"),
        ({"exp_avg": 8}, TypeError, "names of state and of policies"),
        (8, TypeError, "the name of a policy, or a dict"),
    ],
)
def test_what_is_no_choice_is_told_at_once(storage, error, words):
    with pytest.raises(error, match=words):
        optim.AdamW(parameters(), storage=storage)


def test_state_dtype_beside_it_and_groups_without_it_are_refused():
    with pytest.raises(TypeError, match="state_dtype is a simple case of storage"):
        optim.AdamW(parameters(), storage="bfloat16", state_dtype=torch.bfloat16)
    opt = optim.AdamW(parameters())
    with pytest.raises(ValueError, match="a param group has 'storage'"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(3))], "storage": "bfloat16"})


@pytest.mark.parametrize("name", ["step", "size"])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_policy_for_one_number_per_tensor_is_refused_before_anything_is_stepped(name, backend):
    def sized(p, lr, step=0, **kwargs):
        p.data.sub_(p.grad, alpha=lr)
        return {"size": p.grad.norm(), "step": step + 1}

    params = parameters()
    opt = fusedopt.Optimizer(params, [sized], lr=0.1, storage={name: "int8"}, backend=backend)
    give(params, 0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(
        ValueError, match=f"storage names the state '{name}', which is not one number for each"
    ):
        opt.step()
    for p, old in zip(params, before, strict=True):
        assert_same_bits(p.detach(), old)


def test_a_policy_without_both_halves_is_none():
    class Half(policy.Policy):
        def encode(self, x, noise):
            return x

    with pytest.raises(TypeError, match="abstract"):
        Half()


# ---------------------------------------------------------------- beside steps


def test_what_is_applied_sees_numbers_and_leaves_what_is_stored():
    def double(p, grad_avg=None, **kwargs):
        return {"grad_avg": grad_avg * 4}

    params, opt = run(RULES["AdamW"], "int8", torch.float32, "cpp")
    before = opt.state_dict()["state"][0]["exp_avg"].clone()
    opt.apply(double)
    state = opt.state[params[0]]
    assert state["exp_avg"].dtype == torch.int8
    assert_same_bits(opt.state_dict()["state"][0]["exp_avg"], 4 * before)
    assert "runs eagerly" not in str(opt.explain())


def test_explain_says_what_is_held():
    params, opt = run(RULES["AdamW"], "int8", torch.float32, "cpp")
    big = sum(p.numel() for p in params if p.numel() >= 4096)
    count = sum(p.numel() for p in params)
    code = (big + 4 * sum(-(-p.numel() // 64) for p in params if p.numel() >= 4096) + 4 * 5) / count
    assert opt.explain().held == (
        f"param 4.00, exp_avg {code:.2f} (int8), exp_avg_sq {code:.2f} (uint8): "
        f"{4 * (count - 1) / count + 2 * code:.2f} bytes per parameter, {12 * (count - 1) / count:.2f} as float32"
    )
    assert "held: " not in str(optim.AdamW(parameters()).explain())


@pytest.mark.parametrize("name", ["bfloat16_sr", "int8"])
def test_counts_on_the_device_and_clipping_change_nothing_of_it(name):
    ours, opt = run(RULES["AdamW"], name, torch.float32, "cpp", capturable=True, max_grad_norm=10.0)
    theirs, _ = run(RULES["AdamW"], name, torch.float32, "cpp", max_grad_norm=10.0)
    assert opt.engine.bound and isinstance(opt.state[ours[0]]["step"], torch.Tensor)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wrapped", [fusedopt.Lookahead, fusedopt.rules.Cautious, fusedopt.rules.GrokFast])
def test_wrappers_of_rules_store_theirs_too(wrapped):
    def make(params, **options):
        return wrapped(optim.AdamW(params, lr=0.01, **options))

    ours, opt = run(make, {"*": "bf16+8"}, torch.float32, "cpp", steps=8)
    theirs, _ = run(make, {"*": "bf16+8"}, torch.float32, "reference", steps=8)
    assert "runs eagerly" not in str(opt.explain())
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_a_parameter_in_another_order_of_memory_has_its_blocks_in_the_order_of_dimensions():
    torch.manual_seed(0)
    values = torch.randn(8, 16, 8, 8)
    p = nn.Parameter(values.clone().to(memory_format=torch.channels_last))
    q = nn.Parameter(values.clone())
    opts = [optim.AdamW([x], lr=0.1, storage="int8") for x in (p, q)]
    for t in range(3):
        torch.manual_seed(t)
        for x, opt in zip((p, q), opts, strict=True):
            torch.manual_seed(t)
            x.grad = torch.randn(values.shape)
            opt.step()
    assert_same_bits(p.detach().contiguous(), q.detach())


def test_another_policy_for_what_is_stored_is_refused():
    params, opt = run(RULES["AdamW"], "int8", torch.float32, "cpp")
    before = [p.detach().clone() for p in params]
    opt.param_groups[0]["storage"] = "*=bfloat16"
    give(params, 9)
    with pytest.raises(
        RuntimeError, match="is stored in the policy 'int8', and the param group's storage has 'bfl"
    ):
        opt.step()
    for p, old in zip(params, before, strict=True):
        assert_same_bits(p.detach(), old)


PARTED = [
    name
    for name, found in POLICIES.items()
    if found.params and found.rest and found.code == torch.bfloat16 and not found.noisy
]


@pytest.mark.filterwarnings("ignore:group 0 of the checkpoint was stored as")
@pytest.mark.parametrize("old", PARTED)
@pytest.mark.parametrize("new", PARTED)
def test_a_checkpoint_of_another_policy_is_of_the_parameter_as_it_is(old, new):
    half = torch.tensor([1 + k / 256 for k in range(256)])  # each is, or is halfway between, two of bfloat16
    value = torch.cat([half, -half, torch.zeros(4)])
    p = nn.Parameter(value.bfloat16())
    opt = optim.SGD([p], lr=1.0, storage={"param": old})
    p.grad = (p - value).bfloat16()
    opt.step()
    value, rounded = opt.state_dict()["state"][0]["param:master"].clone(), p.detach().clone()
    assert ((value - p).abs() * 256 >= 1 / 2).sum() > 200  # half of the distance, but for what 8 bits lack
    q = nn.Parameter(rounded.clone())
    other = optim.SGD([q], lr=1.0, storage={"param": new})
    other.load_state_dict(opt.state_dict())
    assert_same_bits(q.detach(), rounded)
    q.grad = torch.zeros_like(q)
    for _ in range(2):
        other.step()
    now = other.state_dict()["state"][0]["param:master"]
    torch.testing.assert_close(now, value, rtol=2.0**-15, atol=0)
    if old == new:
        assert_same_bits(now, value)


def cast(p, dtype):
    """The parameter in another dtype, with a gradient of ones."""
    p.grad = None
    p.data = p.data.to(dtype)
    p.grad = torch.ones_like(p)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["bf16+16", "bf16+8", "kahan", "master"])
def test_a_parameter_of_another_dtype_takes_in_what_was_beside_it_once(name, dtype, backend):
    p = nn.Parameter(torch.linspace(-1, 1, 5000).bfloat16())
    opt = optim.SGD([p], lr=1e-4, storage={"param": name, "*": "float32"}, backend=backend)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        opt.step()
    value = opt.state_dict()["state"][0]["param:master"]
    assert not torch.equal(value, p.float())
    cast(p, dtype)
    opt.param_groups[0]["lr"] = 0.0
    for _ in range(3):
        opt.step()
    assert_same_bits(p.detach(), value.to(dtype))
    assert not any(key.startswith("param:") for key in opt.state[p])
    cast(p, torch.bfloat16)
    opt.step()
    assert_same_bits(p.detach(), value.to(dtype).bfloat16())
    assert any(key.startswith("param:") for key in opt.state[p])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("what", ["parameter", "gradient", "state", "extra"])
@pytest.mark.parametrize("name", ["int8", "bf16+8", "kahan"])
def test_where_something_is_float64_state_is_stored_as_numbers(name, what, backend):
    def step(opt, p, wide):
        other = torch.float64 if wide else torch.float32
        if what == "parameter":
            cast(p, other)
        p.grad_dtype = None
        p.grad = torch.ones_like(p, dtype=other if what == "gradient" else p.dtype)
        if what == "state":
            opt.state[p]["double"] = torch.zeros_like(p, dtype=other)
        opt.step(**({"extra": {"more": [torch.zeros_like(p, dtype=other)]}} if what == "extra" else {}))

    def momentum(p, lr, mean=None, double=None, more=None, **kwargs):
        mean = (0.0 if mean is None else mean * 0.9) + p.grad.to(torch.float32)
        p.data.sub_(mean, alpha=lr)
        return {"mean": mean.to(torch.float32)}

    p, q = (nn.Parameter(torch.zeros(5000)) for _ in range(2))
    opt = fusedopt.Optimizer([p], momentum, lr=0.1, storage={"mean": name}, backend=backend)
    theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9)
    for t in range(9):
        step(opt, p, wide := t in (3, 4, 7))
        q.grad = torch.ones_like(q)
        theirs.step()
        assert (f"mean:{name}" in opt.state[p]) is not wide
        assert opt.state[p]["mean"].dtype == (torch.float32 if wide else POLICIES[name].code)
    torch.testing.assert_close(p.detach().float(), q.detach(), rtol=1e-4, atol=0)


def test_state_of_small_tensors_is_float32_whatever_their_parameter_is():
    params, opt = run(RULES["AdamW"], {"param": "bf16+16", "*": "int8"}, torch.bfloat16, "cpp")
    for p in params:
        dtype = torch.int8 if p.numel() >= 4096 else torch.float32 if p.dim() else torch.bfloat16
        assert opt.state[p]["exp_avg"].dtype == dtype
    others, other = run(
        RULES["AdamW"], {"param": "bf16+16", "*": "int8"}, torch.bfloat16, "reference", steps=1
    )
    other.load_state_dict(opt.state_dict())
    assert [other.state[p]["exp_avg"].dtype for p in others] == [
        opt.state[p]["exp_avg"].dtype for p in params
    ]


def averaging(p, lr, mean=None, **kwargs):
    mean = (0.0 if mean is None else mean * 0.9) + p.grad.to(torch.float32)
    p.data.sub_(mean, alpha=lr)
    return {"mean": mean.to(torch.float32)}


@pytest.mark.parametrize("policy", ["int8", "bf16+8"])
def test_explaining_stores_nothing_anew(policy):
    """Of a step to come it does not know the gradients, for which state may be in numbers."""
    p = nn.Parameter(torch.zeros(5000))
    p.grad_dtype = None
    opt = fusedopt.Optimizer([p], averaging, lr=0.1, storage={"mean": policy}, backend="cpp")
    p.grad = torch.randn(5000, dtype=torch.float64)
    opt.step()
    before = {k: v.clone() for k, v in opt.state[p].items() if isinstance(v, torch.Tensor)}
    opt.cbs.append(fusedopt.callbacks.weight_decay)
    opt.explain()
    assert (
        all(torch.equal(opt.state[p][k], v) for k, v in before.items())
        and before.keys() <= opt.state[p].keys()
    )
