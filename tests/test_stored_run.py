"""The stored run of the page about convolutions is of the networks that its script makes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="the documentation is not part of a wheel")


@pytest.fixture(scope="module")
def made():
    """The script that made it."""
    spec = importlib.util.spec_from_file_location("convolutional", DOCS / "convolutional.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report():
    return json.loads((DOCS / "results" / "convolutional.json").read_text())


def test_the_networks_are_those_of_the_script(made, report):
    assert list(report["networks"]) == list(made.MAKE)
    for name, make in made.MAKE.items():
        vae, told = make(), report["networks"][name]
        assert told["parameters"] == {"encoder": made.count(vae.encoder), "decoder": made.count(vae.decoder)}
        assert len(told["history"]["elbo"]) == report["epochs"]
        assert told["elbo"] == told["history"]["validation_elbo"][-1]


def test_the_pictures_are_there():
    for name in ("samples", "reconstructions"):
        with Image.open(DOCS / "images" / f"convolutional_{name}.png") as picture:
            assert picture.width > 900


def test_the_script_draws_what_it_keeps(made, monkeypatch, tmp_path):
    monkeypatch.setattr(made, "DOCS", tmp_path)
    (tmp_path / "images").mkdir()
    made.draw({name: make() for name, make in made.MAKE.items()}, made.torch.zeros(12, 28, 28))
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == [
        "convolutional_reconstructions.png",
        "convolutional_samples.png",
    ]
