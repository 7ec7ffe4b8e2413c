"""examples/integrations: each script trains by a package's own loop as it does with torch's or the package's optimizer.

The scripts compare, and end in an error where the two differ. Those whose packages are not here are skipped.
"""

import importlib.metadata
import importlib.util
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import fusedopt

FOLDER = Path(__file__).parents[1] / "examples" / "integrations"
PACKAGES = {
    "accelerate_loop": ("accelerate",),
    "fsdp2_reshard": (),
    "lightning_module": ("lightning",),
    "peft_lora": ("peft", "transformers"),
    "ray_train": ("ray",),
    "skorch_net": ("skorch", "sklearn"),
    "timm_vit": ("timm",),
    "transformers_trainer": ("transformers", "accelerate"),
    "trl_sft": ("trl", "transformers", "datasets"),
}
"""What each script needs besides torch and fusedopt."""
sys.path.insert(0, str(FOLDER))
import comparing  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_training_is_the_same_with_fusedopt(name):
    missing = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    paths = [str(Path(__file__).parent), str(FOLDER), os.environ["PYTHONPATH"]]
    offline = dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(paths))
    program = f"import benchmarks.torchvision_ops, {name}; print('found', sorted({name}.main().values()))"
    run = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **offline}, capture_output=True, text=True
    )
    versions = [f"{package} {version(package)}" for package in PACKAGES[name]]
    assert run.returncode == 0, f"{versions}\n{run.stdout}\n{run.stderr[-6000:]}"
    assert run.stdout.splitlines()[-1].startswith("found [") and "per step" in run.stdout


def version(package):
    """By the name that it is imported by."""
    names = importlib.metadata.packages_distributions().get(package, [package])
    return importlib.metadata.version(names[0])


def test_every_script_is_run_and_listed():
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"comparing"}
    listed = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert scripts == PACKAGES.keys()
    assert all(f"| `integrations/{name}.py` |" in listed for name in scripts)


# --
# What they compare with


def plain_loop(make, clip=0.5):
    model = comparing.small_net()
    opt, losses = make(model.parameters(), lr=1e-2), []
    x, y = comparing.regression()
    for _ in range(6):
        loss = torch.nn.functional.mse_loss(model(x), y)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        losses.append(loss.item())
    return comparing.Trained(losses, comparing.weights(model.parameters()), opt)


ADAMW = torch.optim.AdamW


def test_equal_trainings_are_found_equal(capsys):
    found = comparing.compare(plain_loop, {"AdamW": (ADAMW, fusedopt.optim.AdamW)}, tolerance=1e-9)
    assert found.keys() == {"AdamW"} and found["AdamW"] < 1e-12
    assert "1 launch per step" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [dict(betas=(0.9, 0.998)), dict(eps=2e-8), dict(weight_decay=0.011), dict(max_grad_norm=0.4)],
    ids=lambda options: next(iter(options)),
)
def test_a_small_difference_is_found(options):
    pairs = {"AdamW": (ADAMW, partial(fusedopt.optim.AdamW, **options))}
    with pytest.raises(AssertionError, match="apart, 1e-09 is allowed"):
        comparing.compare(plain_loop, pairs, tolerance=1e-9)


def test_a_step_that_is_not_fused_is_found():
    def peculiar(p, lr, **kwargs):
        p.data.sub_(p.grad * random.random(), alpha=lr)

    def eagerly(params, lr):
        return fusedopt.Optimizer(params, peculiar, lr=lr)

    with pytest.raises((AssertionError, RuntimeWarning), match=r"unfused|eager"):
        comparing.compare(plain_loop, {"it": (eagerly, eagerly)}, tolerance=1e-9)
