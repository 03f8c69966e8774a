"""What docstrings and pages cite is in the bibliography, in its order."""

from __future__ import annotations

import re
import tomllib
import unicodedata
from pathlib import Path

import pytest

import pvae

PACKAGE = Path(pvae.__file__).parent
DOCS = PACKAGE.parent / "docs"
ENTRY = re.compile(r"^- (?P<authors>.+?), (?P<year>\d{4}), \*(?P<title>.+?)\*", re.MULTILINE)
SOURCE = re.compile(r"Sources?: (.*?)(?=\n\s*\n|\"\"\")", re.DOTALL)

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="the documentation is not part of a wheel")


def plain(text: str) -> str:
    """Letters and digits alone, without accents and case, as a title may be written in more than one way."""
    folded = unicodedata.normalize("NFKD", text.replace("ø", "o")).lower()
    return re.sub(r"[^a-z0-9]+", " ", folded).strip()


def entries() -> list[tuple[str, str, str]]:
    found = ENTRY.findall((DOCS / "bibliography.md").read_text())
    return [(re.split(r", | and ", authors)[0], year, plain(title)) for authors, year, title in found]


def sources() -> list[tuple[str, str]]:
    """Where docstrings name sources, and what they say there, on one line."""
    return [
        (path.name, " ".join(text.split()))
        for path in sorted(PACKAGE.rglob("*.py"))
        for text in SOURCE.findall(path.read_text())
    ]


def missing(text: str, known: list[tuple[str, str, str]]) -> list[str]:
    """The years in a docstring's sources before which no entry of that year has its first author."""
    lacking, start = [], 0
    for year in re.finditer(r", (?:19|20)\d\d\b", text):
        cited = plain(text[start : year.start()])
        if not any(year[0][2:] == one and plain(author) in cited for author, one, _ in known):
            lacking.append(text[start : year.end()])
        start = year.end()
    return lacking


def test_docstrings_cite_what_the_bibliography_has():
    known, found = entries(), sources()
    assert len(found) > 50
    assert [(name, lacking) for name, text in found for lacking in missing(text, known)] == []


def test_a_citation_that_is_not_there_is_found():
    known = entries()
    assert missing("Kingma and Welling, 2014, Auto-Encoding Variational Bayes; Nobody, 2014, Nothing.", known)
    assert missing("Kingma and Welling, 1914, Auto-Encoding Variational Bayes.", known)


def test_pages_cite_what_the_bibliography_has():
    titles = {(year, title) for _, year, title in entries()}
    cited = [
        (page.name, year, plain(title))
        for page in sorted(DOCS.rglob("*.md"))
        if page.name != "bibliography.md" and "_build" not in page.parts
        for line in re.findall(r"^- [A-Z]\. .*$", page.read_text(), re.MULTILINE)
        for year, title in re.findall(r"(\d{4}), \*(.+?)\*", line)
    ]
    assert len(cited) > 20
    lacking = [c for c in cited if not any(c[1] == year and title.startswith(c[2]) for year, title in titles)]
    assert lacking == []


def test_entries_are_in_order_and_only_once():
    known = entries()
    assert len(known) == len(set(known))
    keys = [(re.sub("[^a-z]", "", plain(author)), year, title) for author, year, title in known]
    assert keys == sorted(keys)


def test_the_citation_file_names_this_version():
    lines = (DOCS.parent / "CITATION.cff").read_text().splitlines()
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]
    assert f"version: {project['version']}" in lines
    assert f"license: {project['license']}" in lines
