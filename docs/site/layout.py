"""Which pages the site has: a hook of MkDocs, named in mkdocs.yml.

The site is laid out as the repository is, so a link between documents leads to the same place on both. Source files
that documents link to are pages too: there is no other place that they could be read at, offline least of all.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md",
    "docs/*.md", "docs/api/*.md", "benchmarks/**/*.md", "examples/README.md",
)  # fmt: skip
BESIDE = ("docs/images/*.png", "benchmarks/results/*.png", "docs/site/*.css", "docs/site/*.js")
CODE = re.compile(r"^```.*?^```|(?<!`)`[^`\n]+`(?!`)", re.M | re.S)
LINK = re.compile(r"(\]\()(?!https?://|#)([^)#\s]+)")
LANGUAGES = {".py": "python", ".txt": "text", ".cpp": "cpp"}


def _target(source: str, link: str) -> str:
    """Where a link leads, as a path in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _page(path: str) -> str | None:
    """The page that shows a file or folder which is no document; None: it is none of those."""
    place = ROOT / path
    if place.is_dir():
        return f"{path}/README.md" if (place / "README.md").exists() else f"{path}/index.md"
    return f"{path}.md" if place.suffix in LANGUAGES and place.exists() else None


def _text(path: str) -> str:
    """What the page of a file or folder says."""
    place = ROOT / path
    if place.is_dir():
        names = sorted(each.name for each in place.glob("*.py") if each.name != "__init__.py")
        return "\n".join([f"# `{path}/`\n", *(f"- [{name}]({name}.md)" for name in names), ""])
    return f"# `{path}`\n\n```{LANGUAGES[place.suffix]}\n{place.read_text(encoding='utf-8')}```\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages, in place of all that is in docs/, and what the theme brings along."""
    themes = [file for file in files if file.src_dir != config.docs_dir]
    found = [
        File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)
        for pattern in (*PAGES, *BESIDE)
        for path in sorted(ROOT.glob(pattern))
    ]
    known = {file.src_uri for file in found}
    linked = [
        _target(file.src_uri, link)
        for file in found
        if file.is_documentation_page()
        for _, link in LINK.findall(CODE.sub("", file.content_string))
    ]
    for path in linked:
        page = _page(path)
        if page is None or page in known:
            continue
        known.add(page)
        found.append(File.generated(config, page, content=_text(path)))
        if (ROOT / path).is_dir():
            linked += [f"{path}/{name}" for name in re.findall(r"\]\((.+)\.md\)", _text(path))]
    for file in found:
        # Every document has to be named in mkdocs.yml, but for results, of which there may be one for each machine.
        if file.generated_by or file.src_uri.startswith("benchmarks/results/"):
            file.inclusion = file.inclusion.NOT_IN_NAV
    return Files([*themes, *found])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files and folders lead to their pages."""

    here = page.file.src_uri

    def replaced(found: re.Match[str]) -> str:
        shown = _page(_target(here, found[2]))
        return found[1] + (posixpath.relpath(shown, posixpath.dirname(here)) if shown else found[2])

    prose = CODE.split(markdown)
    if not here.startswith("docs/api/"):  # GitHub knows no links to docstrings: x[a][b] is nothing but text
        prose = [text.replace("][", r"]\[") for text in prose]
    parts = [LINK.sub(replaced, text) for text in prose]
    return "".join(text + code for text, code in zip(parts, [*CODE.findall(markdown), ""], strict=True))
