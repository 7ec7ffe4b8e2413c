"""Which folder may import which: one way only, also for the sake of types. And tests mirror the folders."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "fusedopt"
STOREYS = [
    "ir",
    "trace",
    "storage",
    "compile",
    "extension",
    "backends",
    "step",
    "optimizer",
    "rules",
    "classes",
    "learner",
]
"""Folders from the ground up: each may import those before it."""
GROUND = {"env", "callback", "kernels", "callbacks"}
"""Modules beside the folders that import none of them, and are for all."""


def imported(path: Path) -> set[str]:
    """The parts of fusedopt that a file imports anywhere: names of folders, or of modules beside them."""
    package = ("fusedopt", *path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package[: len(package) - node.level + 1] if node.level else ()
        module = (*base, *(node.module.split(".") if node.module else ()))
        if module[:1] == ("fusedopt",):
            found |= {module[1]} if len(module) > 1 else {alias.name for alias in node.names}
    return found


def folders(path: Path) -> set[str]:
    own = path.relative_to(ROOT).parts[0]
    return {name for name in imported(path) if name != own and name not in GROUND}


@pytest.mark.parametrize("storey", STOREYS)
def test_folders_import_what_lies_below_them(storey):
    below = set(STOREYS[: STOREYS.index(storey)])
    for path in (ROOT / storey).rglob("*.py"):
        above = folders(path) - below
        if storey == "learner":
            above -= {"optim"}
        assert not above, f"{path.relative_to(ROOT)} imports {above}"


def test_the_ground_imports_no_folder():
    for name in GROUND - {"kernels"}:
        assert folders(ROOT / f"{name}.py") <= {name}, name


def test_every_folder_has_its_storey_and_its_line_in_the_document():
    found = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} - {"kernels"}
    assert found == set(STOREYS)
    document = (ROOT.parent / "docs" / "compiler.md").read_text(encoding="utf-8")
    assert all(f"| `fusedopt/{name}/` |" in document for name in STOREYS)


def test_tests_mirror_the_folders():
    tests = Path(__file__).parent
    found = {path.parent.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")}
    assert found == {".", "benchmarks", *STOREYS}


TORCHS = {"_step_supports_amp_scaling", "_optimizer_state_dict_post_hooks"}


def test_no_test_needs_what_an_optimizer_keeps_to_itself():
    """What tests look at is public on the optimizer, its engine, and its bound steps."""
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr not in TORCHS and not node.attr.startswith("__"):
                owner = ast.unparse(node.value).rsplit(".", 1)[-1]
                private = node.attr.startswith("_") and owner in (
                    "opt",
                    "engine",
                    "bound",
                    "buckets",
                    "groups",
                )
                assert not private, f"{path.name}:{node.lineno}: {ast.unparse(node)}"
