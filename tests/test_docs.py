"""Links of the pages lead somewhere: to a file that exists and, where they name one, to a place in it."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHOWN_AS_THEY_ARE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]  # by the repository's site, which knows no targets
PAGES = SHOWN_AS_THEY_ARE + sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)

pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the documentation is not part of a wheel")

_CODE = re.compile(r"^(`{3,}|~{3,}).*?^\1[`~]*[ \t]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!\\)\]\(<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\)")
_HEADING = re.compile(r"^#{1,6} +(.+?)(?: +#+)?$", re.MULTILINE)
_TARGET = re.compile(r"^\(([^)\s]+)\)=$", re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return _CODE.sub("", page.read_text())


def links(page: Path) -> list[tuple[str, str]]:
    """Of a page: the path, empty for the page itself, and the anchor, empty for the page's top."""
    text = re.sub(r"`[^`\n]+`", "", prose(page))
    relative = (link for link in _LINK.findall(text) if not re.match(r"[a-z]+:", link))
    return [(link.partition("#")[0], link.partition("#")[2]) for link in relative]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings as GitHub and MyST make them."""
    found: set[str] = set()
    for heading in _HEADING.findall(prose(page)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).translate(str.maketrans("", "", "`*$"))
        slug = base = re.sub(r"[^\w\- ]", "", plain.lower().replace(" ", "-"))
        again = 0
        while slug in found:
            again += 1
            slug = f"{base}-{again}"
        found.add(slug)
    return found


def sphinx_anchors(page: Path) -> set[str]:
    """What a link on the site may name beside these: targets, and headings as docutils makes ids of them."""
    plain = (unicodedata.normalize("NFKD", h).encode("ascii", "ignore").decode() for h in _HEADING.findall(prose(page)))
    ids = {re.sub(r"[^a-z0-9]+", "-", heading.lower()).lstrip("-0123456789").rstrip("-") for heading in plain}
    return ids | set(_TARGET.findall(prose(page)))


def broken(page: Path) -> list[str]:
    """Links of a page that lead nowhere."""
    bad = []
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        places = anchors(target) if target.suffix == ".md" and target.is_file() else set()
        if places and page not in SHOWN_AS_THEY_ARE:
            places |= sphinx_anchors(target)
        if not target.exists() or (anchor and anchor not in places):
            bad.append(f"{path}#{anchor}" if anchor else path)
    return bad


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_pages_and_places_that_exist(page):
    assert broken(page) == []


def test_every_page_is_in_one_table_of_contents():
    docs, listed = ROOT / "docs", []
    pages = [page for page in PAGES if docs in page.parents]
    for page in pages:
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            lines = [line.strip() for line in tree.splitlines()]
            listed += [page.parent / f"{line}.md" for line in lines if line and line[0] != ":"]
    assert sorted(listed) == [page for page in pages if page.name != "index.md"]


def test_a_target_is_named_once():
    targets = [target for page in PAGES for target in _TARGET.findall(prose(page))]
    assert [target for target in targets if targets.count(target) > 1] == []


@pytest.mark.parametrize(
    "heading, anchor",
    [
        ("From Bayes' rule to the bound, in five lines", "from-bayes-rule-to-the-bound-in-five-lines"),
        ("Why log p(x) is out of reach", "why-log-px-is-out-of-reach"),
        ("4. `exp(log_var)` as a standard deviation", "4-explog_var-as-a-standard-deviation"),
        ("What [pvae](design.md) asks", "what-pvae-asks"),
    ],
)
def test_anchors_are_made_as_by_the_site(tmp_path, heading, anchor):
    page = tmp_path / "page.md"
    page.write_text(f"# {heading}\n")
    assert anchors(page) == {anchor}


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "(there)=\n# One\n\n## Two\n\n## Two\n\n```python\n# Code\n[a](b.md)\n```\n"
        "[a](#one) [a](#two-1) [a](#there) [a](other.md) [a](#code) [a](other.md#one) `[a](c.md)` [a](https://b.org/c)\n"
        "![picture](missing.png) [a](page.md#two)\n"
    )
    (tmp_path / "other.md").write_text("# Other\n")
    assert broken(page) == ["#code", "other.md#one", "missing.png"]
