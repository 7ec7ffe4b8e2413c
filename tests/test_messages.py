"""docs/troubleshooting.md quotes what fusedopt says: each message is in the source, so the page cannot go stale."""

import ast
import functools
import re
from pathlib import Path

import pytest
import test_docs

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
PART = "\0"
"""In a text of the source: what is filled in."""


def text_of(node: ast.AST) -> str:
    """A string in the source, or what an f-string is made of."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else PART


@functools.cache
def said() -> tuple[str, ...]:
    """Every text in fusedopt's source but docstrings."""
    found = set()
    for path in (ROOT / "fusedopt").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)) and id(node) not in docs:
                found.add(text_of(node))
    return tuple(found)


def pieces_of(message: str) -> list[str]:
    """What of a message is the same each time. Messages are made of several texts, also around "Remedy: "."""
    parts = re.split(r"…|\. Remedy: ", message.removeprefix("fusedopt: "))
    return [piece for part in parts if re.search(r"\w", piece := part.strip(" .,:;()"))]


def is_said(message: str) -> bool:
    """Whether the source has each of the message's pieces, and something that only this message would have."""
    pieces = pieces_of(message)
    return max(map(len, pieces), default=0) >= 6 and all(any(p in text for text in said()) for p in pieces)


def quoted(document: str) -> list[str]:
    """The messages of the page: fences ``text`` that are no output of an example."""
    rest = test_docs.EXAMPLE.sub("", document)
    return [" ".join(m.split()) for m in re.findall(r"^```text\n(.*?)\n```$", rest, re.M | re.S)]


def unexplained(document: str) -> list[str]:
    """Messages with no text behind them that says why, and what to do."""
    rest = test_docs.EXAMPLE.sub("", document)
    return [
        m["message"]
        for m in re.finditer(
            r"^```text\n(?P<message>.*?)\n```\n(?P<prose>.*?)(?=^```|^#|\Z)", rest, re.M | re.S
        )
        if len(m["prose"].split()) < 8
    ]


MESSAGES = quoted(PAGE.read_text(encoding="utf-8"))


def test_the_page_quotes_many():
    assert len(MESSAGES) > 50


def test_each_says_why_and_what_to_do():
    assert not unexplained(PAGE.read_text(encoding="utf-8"))
    assert unexplained("```text\na message\n```\n\nToo little.\n\n## Next\n") == ["a message"]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:50])
def test_a_quoted_message_is_in_the_source(message):
    assert is_said(message)


@pytest.mark.parametrize(
    "message", ["the callback … walks eagerly", "fusedopt: …", "loaded state dict has no …"]
)
def test_another_message_is_noticed(message):
    assert not is_said(message)
