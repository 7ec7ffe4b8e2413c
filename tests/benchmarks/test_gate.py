"""Steps are as fast as usual beside others that are timed with them; and a step that is slower is found out.

The shortest of many times counts, in turns with torch's and the bare loop's, so this may run beside other work.
"""

import subprocess
import sys
import time

import pytest

import fusedopt
from benchmarks import gate
from fusedopt.extension import leaf

pytestmark = pytest.mark.skipif(leaf.native is None, reason="times are usual with the extension")
every_gate = pytest.mark.parametrize("one", gate.GATES, ids=lambda one: one.name)


@every_gate
def test_a_step_is_as_fast_as_usual_and_one_that_is_slower_is_found_out(one, monkeypatch):
    usual = gate.judge(one)
    print(usual)
    assert usual.open, str(usual)
    factor = (
        2 * gate.MARGIN / min(1, *usual.slower.values())
    )  # twice what is too much, as noise made that longer, too
    plant(monkeypatch, factor, gate.processor if "compiling" in one.name else time.perf_counter)
    slow = gate.judge(one, attempts=2)
    print(slow)
    assert not slow.open, f"{factor:.1f} times slower, and let through: {slow}"


def plant(monkeypatch, factor, clock):
    """Make every step of fusedopt's take so many times what it takes by that clock."""
    real = fusedopt.Optimizer.step

    def step(self, closure=None):
        start = clock()
        out = real(self, closure)
        end = start + factor * (clock() - start)
        while clock() < end:
            pass
        return out

    step.hooked = True  # else torch wraps it
    monkeypatch.setattr(fusedopt.Optimizer, "step", step)


BUSY = """
import array
block = array.array("d", [1.0]) * (1 << 20)
print("begun", flush=True)
while True:
    copy = block[:]
    sum(range(100000))
"""


@pytest.fixture
def load():
    """More processes than cores, which compute and move memory."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) for _ in range(4)]
    for other in others:
        assert other.stdout.readline() == b"begun\n"
    yield
    for other in others:
        other.kill()
        other.wait()
        other.stdout.close()


@pytest.mark.parametrize("one", gate.GATES[:-1], ids=lambda one: one.name)
def test_other_processes_close_no_gate(one, load):
    """Not the last one, which takes seconds then: of a compiler that is timed by what processors do for it."""
    verdict = gate.judge(one, attempts=6)  # beside a second worker of the tests, as well
    print(verdict)
    assert verdict.open, str(verdict)


def test_what_one_comparison_lets_through_is_open():
    """Another torch, say, may be much faster than the usual one; the bare loop beside it is not."""
    assert gate.Verdict("", {"torch fused": 9.0, "bare loop": 1.1}).open
    assert not gate.Verdict("", {"torch fused": 9.0, "bare loop": 1.05 * gate.MARGIN}).open
    assert (
        str(gate.Verdict("it", {"bare loop": 9.0}))
        == f"it: 9.00 of the usual beside bare loop: above {gate.MARGIN}"
    )


@pytest.mark.parametrize(("slower", "status"), [(1.0, 0), (3.0, 1)])
def test_the_command_prints_verdicts_and_fails_with_them(slower, status, monkeypatch, capsys):
    def verdict(one):
        return gate.Verdict(one.name, {"somebody": 1.0 if one is gate.GATES[0] else slower})

    monkeypatch.setattr(gate, "judge", verdict)
    assert gate.main() == status
    assert len(capsys.readouterr().out.splitlines()) == len(gate.GATES)
