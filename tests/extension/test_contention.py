"""Small steps while other work keeps all cores busy: threads that wait for one another would wait for time slices."""

import os
import subprocess
import sys

import pytest
from helpers import needs_extension

pytestmark = [needs_extension, pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")]
STEPS = """
import os, subprocess, sys, time, torch, fusedopt.optim
torch.set_num_threads(2)
params = [torch.nn.Parameter(torch.randn(256)) for _ in range(400)]
for p in params:
    p.grad = torch.randn_like(p)
opt = fusedopt.optim.AdamW(params)
for _ in range(10):
    opt.step()
busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3 * os.cpu_count())]
try:
    time.sleep(0.5)
    start = time.perf_counter()
    for _ in range(400):
        opt.step()
    print((time.perf_counter() - start) / 400)
finally:
    for process in busy:
        process.kill()
"""


def test_small_steps_take_no_time_slices():
    """As a user has OpenMP: its threads spin while they wait."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", STEPS], capture_output=True, text=True, env=environment, check=True
    )
    assert float(done.stdout) < 6e-3
