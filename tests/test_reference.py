"""The API pages: each public name has an entry on one of them, and a line on the page that leads there."""

from __future__ import annotations

import re
from importlib import import_module
from inspect import ismodule
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
INDEX = DOCS / "api.md"

FACES = [
    "pvae",
    "pvae.svi",
    "pvae.svi.objectives",
    "pvae.svi.schedules",
    "pvae.evidence",
    "pvae.evidence.proposals",
    "pvae.diagnostics",
    "pvae.estimator",
    "pvae.explorer",
    "pvae.plots",
    "pvae.priors",
    "pvae.likelihoods",
    "pvae.distributions",
    "pvae.posteriors",
    "pvae.flows",
    "pvae.networks",
    "pvae.datasets",
    "pvae.testing",
]

# In an `__all__` for other modules of the package, and not for users.
INTERNAL = {
    "pvae.evidence.Batch",
    "pvae.evidence.STAGES",
    "pvae.evidence.check_estimate",
    "pvae.evidence.proposals.FIT_INFLATION",
    "pvae.evidence.proposals.WIDE_START",
    "pvae.evidence.proposals.resolve",
    "pvae.likelihoods.NAMED",
    "pvae.likelihoods.Named",
    "pvae.posteriors.NAMED",
    "pvae.posteriors.Named",
    "pvae.priors.NAMED",
    "pvae.svi.objectives.Bound",
}


def public(face):
    """The objects that a module is to show, by their full names."""
    module = import_module(face)
    names = {f"{face}.{name}": getattr(module, name) for name in module.__all__}
    return {name: thing for name, thing in names.items() if not ismodule(thing) and name not in INTERNAL}


def entries(text):
    """The full names that the directives of a page document."""
    module, found = "", []
    for directive, name, options in re.findall(r"^\.\. ([\w:]+):: (\S+)\n((?:   .*\n)*)", text, flags=re.MULTILINE):
        if directive in ("currentmodule", "automodule"):
            module = name
        if directive == "automodule":
            members = re.search(":members:(.*)", options)
            listed = members[1].split(",") if members and members[1] else import_module(name).__all__ if members else []
            found += [f"{name}.{member.strip()}" for member in listed]
        elif directive.startswith(("auto", "py:")):
            found.append(name if name.startswith("pvae.") else f"{module}.{name}")
    return found


@pytest.fixture(scope="module")
def documented():
    """What has an entry: the objects, not their names, as some can be reached by more than one."""
    names = [name for page in sorted(DOCS.glob("api/*.md")) for name in entries(page.read_text())]
    return {name: getattr(import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}


@pytest.mark.parametrize("face", FACES)
def test_each_public_name_has_an_entry(face, documented):
    missing = [name for name, thing in public(face).items() if not any(thing is other for other in documented.values())]
    assert not missing, f"no entry in docs/api/*.md for {missing}"


def test_the_index_has_a_line_for_each_entry(documented):
    lines = re.findall(r"^   (pvae\.[\w.]+)$|^`(pvae\.[\w.]+)` says", INDEX.read_text(), flags=re.MULTILINE)
    lines = [table or sentence for table, sentence in lines]
    assert sorted(lines) == sorted(documented)


def test_each_page_is_in_the_index():
    pages = {f"api/{page.stem}" for page in DOCS.glob("api/*.md")}
    assert pages == set(re.findall(r"^(api/\w+)$", INDEX.read_text(), flags=re.MULTILINE))
