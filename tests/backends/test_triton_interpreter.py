"""What Triton kernels compute is in triton_interpreted.py and triton_interpreted_blocks.py, on which this starts pytest
in processes of their own: Triton reads TRITON_INTERPRET when it is imported.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute where nobody else is at work
@pytest.mark.parametrize("name", ["triton_interpreted.py", "triton_interpreted_blocks.py"])
def test_in_tritons_interpreter(name, compile_cache):
    """A file of tests, in a process that is started for it."""
    file = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "FUSEDOPT_TESTS_CACHE": str(compile_cache)},
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout, done.stdout[-2000:]
