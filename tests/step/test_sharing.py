"""Parameters, gradients and state that have memory in common: stepped as a plain loop over parameters steps them."""

import time

import pytest
import torch

import fusedopt
from fusedopt import optim, rules
from fusedopt.extension import leaf
from fusedopt.step import sharing

RULES = {
    "SGD": lambda params, **kw: optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1, **kw),
    "AdamW": lambda params, **kw: optim.AdamW(params, lr=0.01, **kw),
    "Lamb": lambda params, **kw: fusedopt.Lamb(params, lr=0.01, **kw),
    "Lion": lambda params, **kw: rules.Lion(params, lr=0.001, **kw),
    "Adafactor": lambda params, **kw: rules.Adafactor(params, **kw),
}


def tied(n=8, dtype=torch.float64):
    """Three parameters of which the last lies where the first does."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n, n, dtype=dtype)) for _ in range(3)]
    params[2].data = params[0].data
    return params


def stepped(opt, params, steps=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        opt.step()
    return [p.detach().clone() for p in params]


def one_by_one(make, params, steps=5):
    """The same with an optimizer for each parameter, one after the other: nothing is stepped beside anything else."""
    opts = [make([p], backend="reference") for p in params]
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for opt in opts:
            opt.step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("name", RULES)
def test_parameters_in_the_same_memory_are_stepped_one_after_the_other(name, backend):
    params = tied()
    found = stepped(RULES[name](params, backend=backend), params)
    torch.testing.assert_close(found, one_by_one(RULES[name], tied()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_that_is_what_torch_does(name):
    params, theirs = tied(), tied()
    kwargs = dict(lr=0.1, momentum=0.9) if name == "SGD" else dict(lr=0.01)
    found = stepped(getattr(optim, name)(params, **kwargs), params)
    expected = stepped(getattr(torch.optim, name)(theirs, **kwargs, foreach=False), theirs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_threads_do_not_meet():
    """Large enough to be cut into chunks for several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        params = tied(1000, torch.float32)
        found = stepped(RULES["SGD"](params), params)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, one_by_one(RULES["SGD"], tied(1000, torch.float32)))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_gradient_in_another_parameter_is_read_before_or_after_that_is_stepped(backend):
    """As a plain loop does: what is listed later sees what was written."""

    def make(params, backend):
        return optim.SGD(params, lr=0.5, backend=backend)

    a, b, c = (torch.nn.Parameter(torch.full((4,), x)) for x in (1.0, 2.0, 4.0))
    a.grad, b.grad, c.grad = b.detach(), torch.ones(4), b.detach()
    make([a, b, c], backend).step()
    assert [p[0].item() for p in (a, b, c)] == [0.0, 1.5, 3.25]


def test_memory_that_comes_to_be_shared_is_noticed():
    params = [torch.nn.Parameter(torch.full((300,), float(i + 1))) for i in range(3)]
    opt = optim.SGD(params, lr=0.5)
    for step in range(9):
        for p in params:
            p.grad = torch.ones_like(p)
        if step == 5:
            params[2].data = params[0].data
        opt.step()
    assert [p[0].item() for p in params] == [
        1 - 5 * 0.5 - 4 * 2 * 0.5,
        2 - 9 * 0.5,
        1 - 5 * 0.5 - 4 * 2 * 0.5,
    ]
    assert "parameter 2 of group 0 has memory in common with parameter 0 of group 0" in str(opt.explain())
    params[2].data = params[2].data.clone()
    for _ in range(3):
        opt.step()
    assert params[0][0].item() == 1 - 5 * 0.5 - 4 * 2 * 0.5 - 3 * 0.5
    if leaf.native is not None:
        assert "the last of these was step 9" in opt.explain().steps


def test_steps_that_stay_slow_for_it_say_so():
    params = tied()
    opt = optim.SGD(params, lr=0.1)
    with pytest.warns(
        RuntimeWarning, match="parameter 2 of group 0 has memory in common with parameter 0 of group 0"
    ):
        stepped(opt, params, 40)


@pytest.mark.parametrize(
    "make", [lambda p: optim.SGD(p, lr=0.1, max_grad_norm=1.0), lambda p: rules.Prodigy(p)]
)
def test_sums_over_all_parameters_are_refused(make):
    params = tied()
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = make(params)
    with pytest.raises(RuntimeError, match=r"memory in common.*Remedy: .*memory of its own"):
        opt.step()
    assert all(map(torch.equal, before, params)) and not opt.state


def test_released_gradients_too():
    params = tied()
    opt = optim.SGD(params, lr=0.5)
    opt.release_gradients()
    before = params[0].detach().clone()
    sum(p.sum() for p in params).backward()
    opt.step()
    torch.testing.assert_close(params[0].detach(), before - 1.0)


def test_many_columns_take_no_time():
    """Each pair of them would have to be looked at, were elements not counted."""
    whole = torch.zeros(64, 1000)
    columns = [*whole.unbind(1)]
    began = time.perf_counter()
    assert sharing.disjoint(columns, [])
    assert time.perf_counter() - began < 0.5  # 499,500 pairs take seconds
    assert not sharing.disjoint([*columns, whole[:, 500]], [])


def test_parts_of_a_large_matrix_have_nothing_in_common():
    """Too many elements to look at each: steps say it."""
    whole = torch.zeros(2100, 3 * 2100)
    assert sharing.disjoint([*whole.chunk(3, 1)], [])
    assert not sharing.disjoint([whole[:, :2101], whole[:, 2100:]], [])


@pytest.mark.parametrize("shape", [(4, 3), (3,)])
def test_columns_of_one_matrix_have_nothing_in_common(shape):
    matrix = torch.zeros(*shape[:-1], 5, shape[-1]) if len(shape) > 1 else torch.zeros(3, 5)
    columns = [matrix.select(1, i) for i in range(5)]
    assert sharing.disjoint(columns, []) and not sharing.disjoint([*columns, matrix], [])
    params = [torch.nn.Parameter(c) for c in columns]
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, float(i))
    opt = optim.SGD(params, lr=1.0, max_grad_norm=1e9)
    opt.step()
    assert [p.flatten()[0].item() for p in params] == [0.0, -1.0, -2.0, -3.0, -4.0]


def test_the_extension_finds_what_python_finds(monkeypatch):
    """Any views of one storage: where the extension is sure, so is Python; where it is not, gaps are the reason."""
    if leaf.native is None:
        pytest.skip("needs the extension")
    native, generator = leaf.native, torch.Generator().manual_seed(0)
    memory, places, seen = torch.zeros(64), torch.arange(64), set()

    def view():
        n, m, start, gap, wide = (int(torch.randint(0, k, (), generator=generator)) for k in (4, 4, 20, 3, 8))
        return memory.as_strided((n, m), (wide, gap + 1), start)

    for _ in range(3000):
        written, read = [view() for _ in range(2)], [view() for _ in range(1)]
        sure = native.apart(written[:1], read, [{0: written[1], 1: None}])
        with monkeypatch.context() as without:
            without.setattr(leaf, "native", None)
            exact = sharing.disjoint(written, read)
        assert sharing.disjoint(written, read) == exact and (exact or not sure)
        dense = all(t.is_contiguous() or t.numel() < 2 for t in (*written, *read))
        assert sure == exact or not dense
        elements = [
            set(places[t.storage_offset() :].as_strided(t.shape, t.stride()).flatten().tolist())
            for t in (*written, *read)
        ]
        assert exact == (not (elements[0] & elements[1] or (elements[0] | elements[1]) & elements[2]))
        seen.add((sure, exact))
    assert seen == {(True, True), (False, False), (False, True)}
