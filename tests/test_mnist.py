"""What the README promises of the real MNIST. Run where PVAE_DATA names a folder that holds it."""

from __future__ import annotations

import json
import os

import pytest
from test_examples import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("PVAE_DATA"), reason="PVAE_DATA does not name a folder with MNIST"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist")
    done = run("mnist_svi.py", "--dataset", "mnist", "--output-dir", folder, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text())


def test_ten_epochs_reach_the_promised_elbo(report):
    assert report["epochs"] == 10
    assert report["binarization"] == "dynamic"
    assert report["num_test"] == 10_000
    assert report["elbo"] > -106


def test_the_guide_finds_more_than_the_elbo(report):
    assert 1 < report["log_px"]["guide"]["mean"] - report["elbo_of_evaluated"] < 8
    assert 1 < report["log_px"]["guide"]["mean"] - report["elbo"] < 8


def test_a_refined_guide_finds_more_and_can_be_trusted(report):
    guide, refined = report["log_px"]["guide"], report["log_px"]["refined"]
    assert 0.5 < refined["mean"] - guide["mean"] < 4
    assert refined["khat_median"] < 0.7 < guide["khat_median"]
    assert refined["khat_above_0.7"] < 0.3


def test_the_prior_is_far_below_and_flagged(report):
    guide, prior = report["log_px"]["guide"], report["log_px"]["prior"]
    assert guide["num_samples"] == prior["num_samples"]
    assert guide["mean"] - prior["mean"] > 30
    assert prior["ess_median"] < 1.5
    assert prior["khat_median"] > 0.7
    assert prior["khat_above_0.7"] > 0.99
