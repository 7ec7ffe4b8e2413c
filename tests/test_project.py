"""What is written about the project in several files agrees, and the forms for issues are forms."""

import re
from pathlib import Path

import pytest

import fusedopt
from fusedopt import env

yaml = pytest.importorskip("yaml")
tomllib = pytest.importorskip("tomllib")  # of Python 3.11
ROOT = Path(__file__).parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def loaded(name: str):
    return yaml.safe_load(text(name))


PROJECT = tomllib.loads(text("pyproject.toml"))


def test_the_version_is_told_once():
    assert "version" not in PROJECT["project"] and PROJECT["project"]["dynamic"] == ["version", "readme"]
    assert loaded("CITATION.cff")["version"] == fusedopt.__version__
    assert loaded("CITATION.cff")["license"] == PROJECT["project"]["license"]
    changes = text("CHANGELOG.md")
    assert re.findall(r"^## \[(.*?)\]", changes, re.M)[0] == "Unreleased" and fusedopt.__version__ in changes


def test_pythons_are_the_same_everywhere():
    """Those that the metadata names are tested in public CI, and have wheels."""
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"
    assert loaded(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == named
    wheels = PROJECT["tool"]["cibuildwheel"]["build"]
    assert wheels == [f"cp{version.replace('.', '')}-*" for version in named]


def test_the_oldest_torch_is_in_public_ci():
    (torch,) = (name for name in PROJECT["project"]["dependencies"] if name.startswith("torch"))
    runs = loaded(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert torch.removeprefix("torch>=") + ".*" in [run["torch"] for run in runs]


@pytest.mark.parametrize("name", ["wrong", "slow", "wish"])
def test_forms_for_issues(name):
    form = loaded(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form["name"] and form["description"] and form["labels"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 1
    assert {field["type"] for field in fields} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert all(field["attributes"]["label"] for field in fields)


def test_hooks_are_what_make_check_runs():
    (repo,) = loaded(".pre-commit-config.yaml")["repos"]
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", text("Makefile"), re.M)[1]
    for hook in repo["hooks"]:
        assert hook["entry"].startswith("python -m ") and f"$(BIN)/{hook['name']}" in recipe


def test_every_variable_is_documented():
    read = re.findall(r'_text\("(\w+)"\)', text("fusedopt/env.py"))
    assert len(read) == 4 and all(
        f"`{name}`" in text("README.md") and f"`{name}`" in env.__doc__ for name in read
    )
    (of_the_build,) = set(re.findall(r"FUSEDOPT_(?!TORCH)\w+", text("setup.py")))
    assert f"`{of_the_build}`" in text("CONTRIBUTING.md")
