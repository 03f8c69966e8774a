"""Examples in docstrings are run, and print what they say."""

from __future__ import annotations

import doctest
from importlib import import_module
from pkgutil import walk_packages

import pytest

import pvae

MODULES = [module.name for module in walk_packages(pvae.__path__, "pvae.")]


def examples(module):
    """The docstrings of a module that hold examples."""
    return [test for test in doctest.DocTestFinder().find(import_module(module)) if test.examples]


TESTS = {test.name: test for module in MODULES for test in examples(module)}


@pytest.mark.parametrize("name", TESTS)
def test_an_example_prints_what_it_says(name):
    said = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(TESTS[name], out=said.append)
    assert not runner.failures, "".join(said)


def test_names_that_most_users_call_have_examples():
    most = {
        "pvae.vae.VAE.mlp",
        "pvae.svi.fitting.fit",
        "pvae.evidence.importance.log_evidence",
        "pvae.io_arviz.to_arviz",
    }
    functions = [name for name in pvae.diagnostics.__all__ if name[0].islower()]
    reports = {f"{vars(pvae.diagnostics)[name].__module__}.{name}" for name in functions if name != "side_by_side"}
    assert most | reports <= TESTS.keys()
