"""What an earlier version wrote is still read: saved VAEs have the same densities, and runs go on to the same end.

`tests/data/make_files.py` wrote them, and says how.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from data import make_files
from safetensors.torch import load_file

import pvae
from pvae.capture.graph import Graph
from pvae.svi import load_checkpoint

FOLDERS = sorted(path for path in (Path(__file__).parent / "data").glob("version_*"))
NUMBERS = {folder: json.loads((folder / "numbers.json").read_text()) for folder in FOLDERS}

# One operation in another order gives another last bit, 1e-7 of a number; a few dozen steps of Adam make it up to 1e-5.
AT_ONCE, TRAINED = {"rel": 1e-5, "abs": 1e-5}, {"rel": 1e-3, "abs": 1e-4}


def cases(kind):
    return pytest.mark.parametrize(
        "folder, name",
        [pytest.param(f, name, id=f"{f.name}-{name}") for f in FOLDERS for name in NUMBERS[f][kind]],
    )


def assert_close(ours, theirs, **tolerance):
    """Of numbers in nested dicts and lists."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert_close(ours[name], theirs[name], **tolerance)
    elif isinstance(theirs, list) and not all(isinstance(value, float) for value in theirs):
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other, **tolerance)
    else:
        assert ours == (theirs if isinstance(theirs, str) else pytest.approx(theirs, **tolerance))


def test_there_are_such_files():
    assert FOLDERS


@cases("vaes")
def test_a_saved_vae_has_the_same_densities(folder, name):
    vae = pvae.VAE.load(folder / f"vae-{name}")
    assert_close(make_files.densities(vae), NUMBERS[folder]["vaes"][name], **AT_ONCE)


@cases("vaes")
def test_a_saved_vae_is_saved_again_as_it_was(folder, name, tmp_path):
    """Descriptions are the same, so what is saved now can be read by the version before."""
    pvae.VAE.load(folder / f"vae-{name}").save(tmp_path / "again")
    before, now = (
        json.loads((path / "config.json").read_text()) for path in (folder / f"vae-{name}", tmp_path / "again")
    )
    assert {**now, "versions": None} == {**before, "versions": None}


@cases("checkpoints")
def test_a_checkpoint_is_loaded(folder, name):
    run, expected = folder / f"run-{name}", dict(NUMBERS[folder]["checkpoints"][name])
    make, data, settings = make_files.RUNS[name]
    pair = make()
    result = load_checkpoint(run, pair.model, pair.guide, data, transform=settings.get("transform"), device="cpu")
    assert result.checkpoint == run / expected.pop("name")
    assert_close(make_files.outcome(pair, result), {**expected, "stopped": "loaded"}, **AT_ONCE)
    weights = load_file(result.checkpoint / "weights.safetensors")
    if isinstance(pair, pvae.VAE):
        assert all(torch.equal(tensor, weights[key]) for key, tensor in pair.state_dict().items())


def test_the_best_checkpoint_is_loaded():
    for folder in FOLDERS:
        vae = make_files.SAVED["bernoulli"]()
        result = load_checkpoint(
            folder / "run-bernoulli", vae.model, vae.guide, make_files.bits(80), which="best", device="cpu"
        )
        assert result.checkpoint.name == "epoch-000002"


@cases("runs")
def test_a_run_goes_on_to_where_it_would_have_come(folder, name, tmp_path, monkeypatch):
    monkeypatch.setattr(Graph, "compile", lambda graph, inputs: graph)  # the same within rounding, in less time
    shutil.copytree(folder / f"run-{name}", tmp_path / "run")
    pair = make_files.RUNS[name][0]()
    with warnings.catch_warnings():
        # Another machine, or other versions: then numbers are the same within rounding alone.
        warnings.filterwarnings("ignore", "going on from .*, but not bit for bit")
        result = make_files.train(name, pair, checkpoint=tmp_path / "run", resume="auto")
    assert_close(make_files.outcome(pair, result), NUMBERS[folder]["runs"][name], **TRAINED)
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == len(result.history["seconds"])
