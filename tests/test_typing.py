"""What type checkers know of fusedopt: as of an installed package, in a program of a user's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "typing" / "user_program.py"
NAMES = f"from fusedopt.optim import {', '.join(torch.optim.__all__)}\n"
WRONG = """
import torch, fusedopt, fusedopt.optim as optim
params = torch.nn.Linear(1, 1).parameters()
optim.SGD(params, lr="0.1")  # wrong
optim.AdamW(params, storage=8)  # wrong
optim.AdaWM(params)  # wrong
optim.LBFGS(params, learning_rate=0.1)  # wrong
fusedopt.Optimizer(params, lr=0.1)  # wrong
fusedopt.Adam(params, lr=0.1).explain().launchs  # wrong
fusedopt.fuse(torch.optim.SGD(params)).explain()  # wrong
fusedopt.rules.Lion(params, beta=(0.9, 0.99))  # wrong
fusedopt.debias(0.9, step=1)  # wrong
"""
EXPECTED = {number for number, line in enumerate(WRONG.splitlines(), 1) if line.endswith("# wrong")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder, with their program, all names of torch.optim, and a file full of mistakes."""
    folder = tmp_path_factory.mktemp("typing")
    for name, text in ("user_program", PROGRAM.read_text()), ("names", NAMES), ("mistakes", WRONG):
        (folder / f"{name}.py").write_text(text)
    return folder


def run(folder: Path, *command: str) -> str:
    """What is on the path, a checker takes for installed: only what is typed by its py.typed counts."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr  # 0: no mistakes were found, 2: it did not run
    return done.stdout


@pytest.fixture(scope="module")
def mypy(folder):
    """The errors of each file."""
    pytest.importorskip("mypy")
    printed = run(folder, "mypy", "--strict", "--no-error-summary", "--cache-dir", str(folder / "cache"), ".")
    found = re.findall(r"^(\w+)\.py:(\d+): error: (.*)$", printed, re.M)
    assert found, printed
    return [(name, int(line), text) for name, line, text in found]


@pytest.fixture(scope="module")
def pyright(folder):
    """The same. The package has a Node of its own in its wheels, so nothing is fetched."""
    pytest.importorskip("basedpyright")
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    report = json.loads(run(folder, "basedpyright", "--outputjson", "--pythonpath", sys.executable))
    return [
        (Path(found["file"]).stem, found["range"]["start"]["line"] + 1, found["message"])
        for found in report["generalDiagnostics"]
        if found["severity"] == "error"
    ]


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_users_program_is_clean(checker, request):
    found = request.getfixturevalue(checker)
    assert [error for error in found if error[0] != "mistakes"] == []


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_mistakes_are_found(checker, request):
    """So nothing above is clean only because all of fusedopt is Any."""
    found = request.getfixturevalue(checker)
    assert {line for name, line, _ in found if name == "mistakes"} == EXPECTED


def test_the_program_runs(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 13 and "AdamW cpp: 1 launches" in done.stdout
