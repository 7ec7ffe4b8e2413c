"""Docstrings as the site shows them: an extension of Griffe, named in mkdocs.yml.

The headings of fusedopt's template (Formula, Args, State, ...), each of which begins a line in a docstring that is read
as it is, begin paragraphs; what stands in single backquotes is a link where that name has an entry. Griffe reads the
source; where a decorator completes a docstring, it is the complete one that ``help()`` shows, too.
"""

import importlib
import inspect
import re
from typing import Any

import griffe

HEADINGS = ("Formula", "Args", "State", "Returns", "Raises", "Source", "Deviations")
HEADING = re.compile(rf"^({'|'.join(HEADINGS)}): (?=\S)", re.M)
BLOCK = re.compile(r"^([A-Z]\w+)([^\n]*(?:\n\S[^\n]*)*):\n((?: {4}[^\n]*\n?)+)", re.M)
TOGETHER = re.compile(r"^ {4}(\w+(?:, \w+)+): ([^\n]*(?:\n {8}[^\n]*)*)", re.M)
NAME = re.compile(r"(?<![`\w])`([A-Za-z_][\w.]*)`(?!`)")


def _listed(found: re.Match[str]) -> str:
    """A block of `described` as a list."""
    lines = re.sub(r"\n {8}", " ", found[3].rstrip()).split("\n")
    return "\n".join([f"**{found[1]}**{found[2]}:\n", *(f"- {line.strip()}" for line in lines), "", ""])


def _apart(found: re.Match[str]) -> str:
    """Arguments that are described together, each by itself."""
    return "\n".join(f"    {name}: {found[2]}" for name in found[1].split(", "))


class Template(griffe.Extension):
    """Applies to every docstring of the package."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Once the object is loaded, before its docstring is parsed."""
        if obj.docstring is None:
            return

        def linked(found: re.Match[str]) -> str:
            try:
                path = obj.resolve(found[1])
            except griffe.NameResolutionError:
                return found[0]
            return f'<autoref optional identifier="{path}"><code>{found[1]}</code></autoref>'

        text = obj.docstring.value
        if any(str(decorator.value).startswith("described(") for decorator in getattr(obj, "decorators", ())):
            complete = getattr(importlib.import_module(obj.module.path), obj.name).__doc__
            text = BLOCK.sub(_listed, inspect.cleandoc(complete))
        text = TOGETHER.sub(_apart, text)
        obj.docstring.value = HEADING.sub(r"\n**\1.** ", NAME.sub(linked, text))
