"""The cases as pytest-benchmark cases, to look closely at one of them or to compare two commits.

    pytest benchmarks/test_bench.py --benchmark-group-by=param:pair
    pytest benchmarks/test_bench.py -k "small-500/AdamW and fusedopt" --benchmark-autosave --benchmark-compare

pytest-benchmark measures one provider after the other; for comparing providers ``python -m benchmarks`` is fairer,
which lets them take turns.
"""

from __future__ import annotations

from itertools import count

import pytest

from . import providers
from .cases import CASES, PAIRS, Training
from .measure import one_cycle

BY_ID = {pair.id: pair for pair in PAIRS}
GRID = [
    pytest.param(pair.id, provider, id=f"{pair.id}-{provider}")
    for pair in PAIRS
    for provider in pair.providers
    if provider not in providers.SLOW_TO_START
]


@pytest.mark.parametrize(("pair", "provider"), GRID)
def test_step(benchmark, pair: str, provider: str) -> None:
    """One step; what a scheduler or a training pass does before it is off the clock."""
    what = BY_ID[pair]
    case = CASES[what.case]
    training = Training() if what.mode == "training" else None
    params = training.tensors() if training else case.tensors()
    try:
        runner = providers.make(provider, what.rule, params, case.learning_rates())
    except providers.Unavailable as why:
        pytest.skip(str(why))
    numbers = count()

    def before() -> None:
        if training:
            training.run()
        runner.set(*one_cycle(next(numbers)))
        runner.prepare()

    benchmark.pedantic(runner.step, setup=before, rounds=20, warmup_rounds=3)
