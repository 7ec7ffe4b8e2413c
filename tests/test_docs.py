"""The code in README.md, CONTRIBUTING.md and docs/ runs, and prints what the documents show.

``python tests/test_docs.py`` updates that.

A fence ``python`` is run, all of a document in one namespace. The fence ``text`` or ``cpp`` right behind it is what it
prints, with fusedopt's warnings among it; ``...`` stands for anything. Other fences are left alone.
"""

from __future__ import annotations

import contextlib
import difflib
import doctest
import io
import linecache
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fusedopt import backends
from fusedopt.ir.ops import OPS
from fusedopt.storage.policy import POLICIES
from fusedopt.trace.tensor import METHODS

ROOT = Path(__file__).parents[1]
WRITTEN = {"classes_table.md", "rules_table.md", "storage_table.md", "storage_curves.md", "training_table.md"}
"""By a command, and without examples."""
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in WRITTEN),
]
PLAIN = [ROOT / name for name in ("CHANGELOG.md", "SECURITY.md")]
"""Without examples."""
EXAMPLE = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\s*?^```(?:text|cpp)\n(?P<shown>.*?)^```$)?", re.M | re.S
)
TABLES = (OPS, METHODS, backends.ROWS, POLICIES)
"""What a document's examples may add to; it is restored behind them."""


@dataclass
class Example:
    """A piece of code, what the document shows of its output (None: nothing), and where that stands in the text."""

    code: str
    shown: str | None
    span: tuple[int, int]

    def run(self, namespace: dict) -> str:
        """What it prints."""
        with io.StringIO() as out, contextlib.redirect_stdout(out), _printed_warnings():
            linecache.cache["example.py"] = len(self.code), None, self.code.splitlines(True), "example.py"
            exec(compile(self.code, "example.py", "exec"), namespace)
            return "\n".join(line.rstrip() for line in out.getvalue().rstrip().split("\n"))

    def fits(self, printed: str) -> bool:
        """Whether the document shows this output."""
        return doctest.OutputChecker().check_output(
            self.shown or "", f"{printed}\n" if printed else "", doctest.ELLIPSIS
        )


@contextlib.contextmanager
def _printed_warnings() -> Iterator[None]:
    """fusedopt's warnings as a line of output; those of others as everywhere in the tests."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="fusedopt")
        warnings.showwarning = lambda message, category, *_, **__: print(f"{category.__name__}: {message}")
        yield


@contextlib.contextmanager
def _restored_tables() -> Iterator[None]:
    copies = [dict(table) for table in TABLES]
    try:
        yield
    finally:
        for table, copy in zip(TABLES, copies, strict=True):
            table.clear()
            table.update(copy)


def examples(text: str) -> list[Example]:
    """The examples of a document, in order."""
    return [Example(m["code"], m["shown"], m.span("shown")) for m in EXAMPLE.finditer(text)]


def wrong(text: str) -> Iterator[tuple[Example, str]]:
    """The examples that print something else than shown, with what they print."""
    namespace: dict = {"__name__": "example"}
    with _restored_tables():
        for example in examples(text):
            printed = example.run(namespace)
            if not example.fits(printed):
                yield example, printed


def report(example: Example, printed: str) -> str:
    """Code, and the difference between what is shown and what is printed."""
    shown = (example.shown or "").splitlines()
    difference = difflib.unified_diff(shown, printed.splitlines(), "shown", "printed", lineterm="")
    return "\n".join([example.code, *difference])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_examples_print_what_is_shown(document):
    text = document.read_text(encoding="utf-8")
    assert len(examples(text)) > 2
    assert not "\n\n".join(report(*found) for found in wrong(text))


@pytest.mark.parametrize(
    "text",
    [
        "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n",
        "```python\nprint(1 + 1)\n```\n",
        "```python\npass\n```\n```text\n2\n```\n",
        "```python\nimport warnings; warnings.warn('fusedopt: unfused')\n```\n",
    ],
    ids=["another output", "output not shown", "no output", "warning not shown"],
)
def test_a_wrong_document_is_noticed(text):
    assert list(wrong(text))


def test_right_documents_pass():
    shown = "```python\nx = 1\n```\n```python\nprint(x, 0.123)\n```\n\n```text\n1 0...\n```\n"
    warned = "```python\nimport warnings; warnings.warn('fusedopt: x')\n```\n```text\nUserWarning: fusedopt: x\n```\n"
    assert not list(wrong(shown + warned))


def test_links_lead_to_files():
    for document in DOCUMENTS + PLAIN:
        prose = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", prose):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def update(document: Path) -> int:
    """Put what the examples print where something else is shown; returns how many were wrong."""
    text = document.read_text(encoding="utf-8")
    found = list(wrong(text))
    for example, printed in reversed(found):
        if example.shown is None:
            raise SystemExit(f"{document.name}: this prints, and nothing is shown:\n{example.code}{printed}")
        begin, end = example.span
        text = f"{text[:begin]}{printed}\n{text[end:]}"
    document.write_text(text, encoding="utf-8")
    return len(found)


if __name__ == "__main__":
    for path in DOCUMENTS:
        print(f"{path.name}: {update(path)} outputs updated")
