"""The documents as a site: it builds without a warning, has every public name, and works in a browser, without a net.

It is skipped where the packages of the ``docs`` extra, or Chromium, are missing.
"""

import functools
import http.server
import importlib.util
import subprocess
import sys
import threading
import types
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import browser
import pytest
import test_docstrings

ROOT = Path(__file__).parents[1]
NEEDED = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python", "websockets")
MISSING = [name for name in NEEDED if not importlib.util.find_spec(name.partition(".")[0])]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"pip install '.[dev]': there is no {', '.join(MISSING)}"
)
IN_BROWSER = pytest.mark.skipif(browser.path() is None, reason="no chromium is installed")


class Page(HTMLParser):
    """What a page links to, what can be linked to in it, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {
            value for name in ("id", "name") if (value := found.get(name)) and (name == "id" or tag == "a")
        }
        if tag == "a" and (href := found.get("href")):
            self.links.append(href)
        elif tag in ("script", "img", "iframe", "source") and (src := found.get("src")):
            self.loads.append(src)
        elif tag == "link" and found.get("rel") not in ("canonical", "next", "prev") and found.get("href"):
            self.loads.append(found["href"])


BUILD = ("-m", "mkdocs", "build")
"""As in the Makefile: with --quiet, MkDocs would not notice its own warnings."""


def build(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *BUILD, "--site-dir", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built as ``make docs`` does."""
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[str, Page]:
    return {
        path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
        if path.name != "404.html"
    }


def test_make_builds_it_so():
    assert f"python {' '.join(BUILD)}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("link", ["nowhere.md", "#nowhere", "other.md#nowhere", "/index.md", "folder/"])
def test_a_dead_link_stops_the_build(tmp_path, link):
    """In a site of two pages with the same settings."""
    (tmp_path / "docs").mkdir()
    for name in ("index", "other"):
        (tmp_path / "docs" / f"{name}.md").write_text(f"# {name}\n\n[here](index.md#index)\n")
    own = "docs_dir: docs\nhooks: []\nplugins: []\nnav: [index.md, other.md]\n"
    settings = tmp_path / "mkdocs.yml"
    settings.write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\n{own}")
    assert build(tmp_path / "site", "--config-file", str(settings)).returncode == 0
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write(f"[there]({link})\n")
    done = build(tmp_path / "site", "--config-file", str(settings))
    assert done.returncode == 1 and link in done.stderr


def test_it_has_every_document(pages):
    documents = [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/api/*.md"), ROOT / "benchmarks" / "README.md"]
    expected = {
        path.relative_to(ROOT).as_posix().replace("README.md", "index.html").replace(".md", ".html")
        for path in documents
    }
    assert expected | {"index.html"} <= pages.keys()


def test_every_public_name_has_an_entry(pages):
    entries = {anchor for page in pages.values() for anchor in page.ids}
    public = [
        (f"{m.__name__}.{n}", getattr(m, n)) for m, names in test_docstrings.PUBLIC.items() for n in names
    ]
    for name, thing in public:
        if isinstance(thing, types.ModuleType):
            continue
        own = f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"
        assert entries & {own, *(other for other, it in public if it is thing)}, f"docs/api has no {name}"


def test_links_lead_somewhere(site, pages):
    dead = []
    for name, page in pages.items():
        for link in page.links:
            place, anchor = urldefrag(urljoin(name, link))
            if urlsplit(link).scheme in ("http", "https", "mailto"):
                continue
            target = unquote(place)
            if target not in pages and not (site / target).is_file():
                dead.append(f"{name}: {link}")
            elif anchor and target in pages and unquote(anchor) not in pages[target].ids:
                dead.append(f"{name}: {link}, of which there is the page, but not the place in it")
    assert not dead


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for name, page in pages.items():
        for src in page.loads:
            assert not urlsplit(src).netloc, f"{name} loads {src}"
            if not src.startswith("data:"):
                assert (site / unquote(urldefrag(urljoin(name, src))[0])).is_file(), f"{name}: {src}"


# --
# In a browser

SHOWN = (
    "index.html",
    "docs/writing_rules.html",
    "docs/troubleshooting.html",
    "docs/classes_table.html",
    "docs/api/optimizer.html",
    "docs/api/rules.html",
    "docs/coming_from.html",
    "benchmarks/index.html",
)
WINDOWS = {
    "light": dict(width=1400, height=1000),
    "dark": dict(width=1400, height=1000, dark=True),
    "phone": dict(width=390, height=844, phone=True),
}


@pytest.fixture(scope="module")
def chromium():
    with browser.started() as found:
        yield found


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))
    ) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def heard(chromium, url):
    """What the browser complains of on a page, and what it loads for it."""
    chromium.complaints.clear(), chromium.requests.clear()
    chromium.open(url)
    chromium.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
    return list(chromium.complaints), list(chromium.requests)


@IN_BROWSER
@pytest.mark.parametrize("window", WINDOWS)
def test_pages_open_without_complaints_and_fit(chromium, address, pages, window, request):
    """All but those of source files on a phone, some in other windows. ``--pictures FOLDER`` keeps what is seen."""
    chromium.size(**WINDOWS[window])
    folder = request.config.getoption("--pictures")
    documents = [name for name in pages if name.startswith("docs/")]
    for name in dict.fromkeys([*SHOWN, *(documents if window == "phone" else ())]):
        complaints, requests = heard(chromium, address + name)
        assert not complaints, name
        assert requests and all(url.startswith((address, "data:")) for url in requests), requests
        dark = "slate" if window == "dark" else "default"
        assert chromium.run("document.body.dataset.mdColorScheme") == dark
        assert chromium.run("document.documentElement.scrollWidth <= window.innerWidth"), (
            f"{name} is too wide"
        )
        if folder and name in SHOWN:
            chromium.picture(Path(folder) / f"{window}-{name.replace('/', '-').removesuffix('.html')}.png")


@IN_BROWSER
@pytest.mark.parametrize("opened", ["served", "as files"])
def test_the_search_finds(chromium, site, address, opened):
    chromium.size(**WINDOWS["light"])
    root = address if opened == "served" else f"{site.as_uri()}/"
    heard(chromium, f"{root}index.html")
    found = chromium.run(
        """(async () => {
            const wait = ms => new Promise(done => setTimeout(done, ms));
            document.querySelector("[data-md-toggle=search]").click();
            const input = document.querySelector("[data-md-component=search-query]");
            input.focus();
            for (let i = 0; i < 300; i++) {
                input.value = "release_gradients";
                input.dispatchEvent(new Event("input", {bubbles: true}));
                input.dispatchEvent(new Event("keyup", {bubbles: true}));
                await wait(100);
                const links = [...document.querySelectorAll(".md-search-result__link")].map(a => a.href);
                if (links.length) return links;
            }
            return [];
        })()"""
    )
    assert any("docs/memory.html" in link for link in found), found
    assert not chromium.complaints
    assert all(url.startswith((root, "data:", "blob:")) for url in chromium.requests), chromium.requests


@IN_BROWSER
def test_a_page_with_a_fault_is_noticed(chromium, tmp_path):
    page = tmp_path / "wrong.html"
    page.write_text("<script src='missing.js'></script><script>console.error('one'); nothing.at.all</script>")
    complaints, requests = heard(chromium, page.as_uri())
    assert any("one" in c for c in complaints) and any("nothing is not defined" in c for c in complaints)
    assert any("missing.js" in c for c in complaints) and any("missing.js" in r for r in requests)
