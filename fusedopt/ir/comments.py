"""Text of other people in generated source: it stays in the comment that it is put into."""

from __future__ import annotations

import re

LONGEST = 1000
"""Characters of a comment."""
_OPEN = re.compile(r"[^ -~]|\\|\?(?=\?)")


def one_line(text: object) -> str:
    """The text as it may stand in a line comment, whatever the language: printable ASCII, and not too much of it.

    Names and titles are any text. What could end the line, as some language or editor sees it, is spelled as a number;
    a backslash too, for C++ joins a line that ends in one to the next, and so are two question marks, for they may
    stand for one.
    """
    text = str(text)[: LONGEST + 1]
    safe = _OPEN.sub(lambda found: _spelled(ord(found[0])), text)
    return safe if len(safe) <= LONGEST else f"{safe[: LONGEST - 3]}..."


def _spelled(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
