"""The documentation site: it is built without a warning, and every link in it leads somewhere."""

import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

OUTSIDE = ("http", "https", "mailto", "data")


@pytest.fixture(scope="module")
def site(repository, tmp_path_factory) -> Path:
    """The site; a warning is an error, and so is a page that is in no table of contents."""
    folder = tmp_path_factory.mktemp("site")
    words = ("-m", "sphinx", "-c", "docs", "-n", "-W", "--keep-going", "-q", "-d", folder / "trees")
    done = subprocess.run(
        [sys.executable, *words, ".", folder / "html"],
        cwd=repository,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "html"


class Page(HTMLParser):
    """The links of a page, and the names of its places."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            if name in ("id", "name") and value:
                self.places.add(value)


def test_every_link_leads_to_a_page_and_a_place_on_it(site):
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    lost = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in OUTSIDE:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = pages[target].places if target in pages else {""}
            if not target.is_file() or unquote(parts.fragment) not in there:
                lost.append(f"{path.relative_to(site)}: {link}")
    assert lost == []


def test_every_page_is_named_in_the_text_of_the_first_page(repository):
    """The table of contents of the site is hidden; a code host shows only the text."""
    text, _ = (repository / "docs" / "index.md").read_text(encoding="utf-8").split("```", 1)
    named = {Path(name).name for name in re.findall(r"\]\((?:\.\./)*([^)#]+\.md)\)", text)}
    pages = {path.name for path in (repository / "docs").glob("*.md")} - {"index.md"}
    assert pages - named == set()


def test_no_page_is_in_the_table_of_contents_twice(repository):
    text = (repository / "docs" / "index.md").read_text(encoding="utf-8")
    lists = re.findall(r"```{toctree}\n(.*?)```", text, re.DOTALL)
    entries = re.findall(r"^(?!:)(?:.*<)?([\w./]+)>?$", "\n".join(lists), re.MULTILINE)
    assert len(entries) > 20
    assert [name for name, count in Counter(entries).items() if count > 1] == []


def test_the_reference_pages_have_every_command_and_every_function(site):
    options = (site / "docs" / "options.html").read_text(encoding="utf-8")
    for name in ("evaluate", "export", "--attack-option", "--no-sanity-checks"):
        assert name in options
    python = Page(site / "docs" / "python.html").places
    for name in ("evaluate", "load", "read_results"):
        assert f"robsparse.{name}" in python
    assert "robsparse.training.stages.Stage.after_step" in python
