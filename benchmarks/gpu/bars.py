"""What fusedopt must reach on a GPU: ratios within one run, judged for each backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..cases import CASES
from ..plot import Missing, Results
from .host import SMALL
from .kernels import BOUND_BY_MEMORY, MANY, MODELS

Verdict = tuple[str, bool]
MEMORY_BOUND_RULES = ("RAdam", "NAdam", "Lion", "Lion-class", "AdaBelief")


@dataclass(frozen=True)
class Bar:
    """``judge(results, backend)`` gives what was measured, in words, and whether that is enough."""

    name: str
    required: str
    judge: Callable[[Results, str], Verdict]


def _p50(
    results: Results, case: str, what: str, provider: str, rule: str = "AdamW", mode: str = "gpu"
) -> float:
    return results.p50(case, rule, mode, provider, what)


def _ours(backend: str) -> str:
    return f"fusedopt {backend}"


def fraction(results: Results, backend: str, rule: str) -> float:
    """The bytes of a step over its time, in parts of what copying reaches. Raises Missing."""
    provider = _ours(backend)
    ms = _p50(results, BOUND_BY_MEMORY, "device", provider, rule)
    moved = _p50(results, BOUND_BY_MEMORY, "bytes", provider, rule) * CASES[BOUND_BY_MEMORY].numel
    return moved / ms / 1e6 / results.p50("copy", "copy", "gpu", "torch", "bandwidth")


def _bandwidth(results: Results, backend: str) -> Verdict:
    found = fraction(results, backend, "AdamW")
    moved = _p50(results, BOUND_BY_MEMORY, "bytes", _ours(backend))
    return f"{found:.3f} ({moved:.0f} bytes)", found >= 0.92 and moved == 28


def _near_adamw(results: Results, backend: str, rule: str) -> Verdict:
    points = 100 * (fraction(results, backend, rule) - fraction(results, backend, "AdamW"))
    return f"{points:+.1f} points", abs(points) <= 3


def _of(results: Results, backend: str, case: str, what: str, other: str, most: float) -> Verdict:
    """Our time in parts of another's."""
    ratio = _p50(results, case, what, _ours(backend)) / _p50(results, case, what, other)
    return f"{ratio:.3f}×", ratio <= most


def _host_per_tensor(results: Results, backend: str, case: str) -> Verdict:
    us = _p50(results, case, "host", _ours(backend)) * 1e3 / len(CASES[case].shapes)
    return f"{us:.3f} µs", us <= 0.3


def _groups(results: Results, backend: str) -> Verdict:
    own, one = (_p50(results, "groups-465", "device", _ours(backend) + w) for w in ("", " one group"))
    return f"{own / one:.2f}×", own / one <= 1.2


def _lamb(results: Results, backend: str) -> Verdict:
    moved, launches = (
        _p50(results, BOUND_BY_MEMORY, what, _ours(backend), "LAMB") for what in ("bytes", "launches")
    )
    return f"{moved:.0f} bytes, {launches:.0f} launches", moved <= 44 and launches == 2


COMPILE = {"cuda": 0.3, "triton": 2.0}


def _compile(results: Results, backend: str) -> Verdict:
    seconds = max(
        line["p80"] / 1e3
        for line in results.lines
        if line["what"] == "compile" and line["provider"] == _ours(backend)
    )
    return f"{seconds:.2f} s", seconds <= COMPILE.get(backend, 2.0)


BARS = (
    Bar("AdamW fp32, 134 M parameters: part of copy bandwidth", "≥ 0.92, 28 bytes", _bandwidth),
    *(
        Bar(f"AdamW, {case}: device time of {other}'s", f"≤ {most}×",
            partial(_of, case=case, what="device", other=other, most=most))
        for case in MODELS for other, most in (("torch fused", 0.85), ("torch foreach", 0.5))
    ),
    *(
        Bar(f"AdamW, {case}: device time of torch fused's", "≤ 1/20",
            partial(_of, case=case, what="device", other="torch fused", most=1 / 20))
        for case in MANY
    ),
    *(Bar(f"AdamW, {case}: host time per tensor", "≤ 0.3 µs", partial(_host_per_tensor, case=case)) for case in MANY),
    Bar("AdamW, 465 groups: device time of one group's", "≤ 1.2×", _groups),
    Bar("AdamW, 500 tensors: host time of torch fused's", "≤ 1/8",
        partial(_of, case=SMALL, what="host", other="torch fused", most=1 / 8)),
    Bar("LAMB: bytes per parameter, launches", "≤ 44, 2", _lamb),
    *(
        Bar(f"{rule}: part of copy bandwidth, from AdamW's", "± 3 points", partial(_near_adamw, rule=rule))
        for rule in MEMORY_BOUND_RULES
    ),
    Bar("compiling a kernel", "≤ 0.3 s NVRTC, ≤ 2 s Triton", _compile),
)  # fmt: skip


def judge(bar: Bar, results: Results, backend: str) -> tuple[str, bool | None]:
    """What was measured, and whether the bar is reached; None where it was not measured."""
    try:
        return bar.judge(results, backend)
    except (Missing, ValueError):  # max() of nothing
        return "not measured", None
