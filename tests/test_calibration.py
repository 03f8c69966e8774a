"""Simulation-based calibration: uniform for the exact guide, and not for one that is too narrow, too wide or off."""

from __future__ import annotations

import pyro
import pytest
import torch
from pairs import shared_mean, shared_mean_guide
from pyro import distributions as dist
from torch.utils.data import DataLoader, TensorDataset

import pvae
from pvae.diagnostics import Calibration, simulation_based_calibration
from pvae.testing import linear_gaussian


def calibrate(oracle, **options):
    options = {"num_simulations": 400, "num_samples": 250, **options}
    return simulation_based_calibration(oracle.model, oracle.guide, oracle.sample(10), **options)


def test_the_exact_guide_is_calibrated(caller_state):
    """At a level of 0.001 for each of two tests, one run in 500 would fail."""
    oracle, before = linear_gaussian(3, 5), caller_state()
    found = calibrate(oracle)
    before.assert_unchanged()
    assert (found.ranks.shape, found.num_draws, found.num_simulations) == ((400, 3), 63, 400)
    assert (found.ranks.min(), found.ranks.max()) == (0, 63)
    assert found.is_uniform(0.001)
    assert found.weighted.is_uniform(0.001)
    assert (found.num_bins, found.counts.shape) == (16, (3, 16))
    assert (found.counts.sum(1) == 400).all()
    assert (found.weighted.ess > 249.9).all()  # equal weights
    assert found.names == ("z[0]", "z[1]", "z[2]")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"guide_scale": 0.7}, "narrow (overconfident)"), ({"guide_scale": 1.5}, "wide"), ({"guide_shift": 0.5}, "high")],
)
def test_others_are_rejected(options, words):
    """Among 400 ranks a guide 30% too narrow has 2.4 times the count expected in its outer bins: p is below 1e-10."""
    found = calibrate(linear_gaussian(2, 5, **options))
    assert found.p_value < 1e-6
    assert f"z[0] too {words}" in found.verdict
    assert "not calibrated" in repr(found)


def test_weights_repair_a_guide_that_covers_the_posterior():
    """1.3 times as wide, and uniform again by its weights, at a level of 0.001."""
    found = calibrate(linear_gaussian(2, 5, guide_scale=1.3), num_samples=500)
    assert found.p_value < 1e-3
    assert found.weighted.is_uniform(0.001)
    assert found.weighted.is_weighted
    assert (found.weighted.ess < 499).all()
    lines = repr(found).splitlines()
    assert lines[0] == "ranks of 400 simulated codes among 63 draws of the guide, 2 latent numbers"
    assert "the guide, re-weighted, is calibrated" in lines[2]
    assert lines[3].startswith("  median ESS of its weights")
    assert "raise num_samples" not in lines[3]
    with pytest.raises(pvae.ArgumentError, match="level"):
        found.is_uniform(5)


def test_many_dimensions_do_not_reject_by_luck():
    """Of 20 exact tests one is below 0.05 in the mean; times 20 none is below 0.001 but for one run in 1000."""
    found = calibrate(linear_gaussian(20, 30), num_simulations=200, num_samples=64)
    assert found.p_values.shape == (20,)
    assert found.p_value == min(1.0, 20 * found.p_values.min().item())
    assert found.is_uniform(0.001)


def test_discrete_latents_are_ranked_with_ties_broken_by_chance():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            odds = dist.Normal(1.0, 2**0.5).log_prob(x) - dist.Normal(0.0, 2**0.5).log_prob(x)
            c = pyro.sample("c", dist.Bernoulli(logits=odds))
            pyro.sample("z", dist.Normal((x + c) / 2, 0.5**0.5))

    found = simulation_based_calibration(model, guide, torch.zeros(5), num_simulations=300, num_samples=63)
    assert found.names == ("c", "z")
    assert found.is_uniform(0.001)


def test_labels_are_kept_and_a_stream_is_simulated_once(bits):
    vae = pvae.ConditionalVAE.mlp(6, 2, [8], num_classes=3)
    labels = torch.arange(300) % 3
    both = simulation_based_calibration(vae.model, vae.guide, (bits, labels), num_simulations=20, num_samples=63)
    assert both.num_simulations == 20
    small, data = pvae.VAE.mlp(6, 2, [8]), DataLoader(TensorDataset(bits), batch_size=100)
    found = simulation_based_calibration(small.model, small.guide, data, num_simulations=None, num_samples=63)
    assert found.num_simulations == 300
    with pytest.raises(pvae.ArgumentError, match="num_simulations must be None for a DataLoader"):
        simulation_based_calibration(small.model, small.guide, data)


def test_ranks_in_equal_bins():
    ranks = torch.arange(64).repeat(10)[:, None]
    found = Calibration(ranks, 63, ("z",), torch.ones(640))
    assert found.counts.tolist() == [[40] * 16]
    assert found.p_value == pytest.approx(1.0)
    assert "too narrow" in Calibration((ranks > 31) * 63, 63, ("z",), torch.ones(640)).verdict


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_draws": 100}, "num_draws=100. Use 63, 99 or 127"),
        ({"num_simulations": 5}, "num_simulations must be at least 10"),
        ({"num_samples": 20}, "num_samples must be at least num_draws, 63, got 20"),
        ({"num_draws": 0}, "num_draws must be a whole number"),
    ],
)
def test_bad_numbers_are_named(options, words, small_vae, bits):
    with pytest.raises(pvae.ArgumentError, match=words.replace("(", r"\(")):
        simulation_based_calibration(small_vae.model, small_vae.guide, bits, **options)


def test_a_guide_of_all_data_is_refused():
    with pytest.raises(pvae.ProgramError, match="does not answer to simulated ones"):
        simulation_based_calibration(shared_mean, shared_mean_guide, torch.zeros(4))


def uniform(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Uniform(z - 1, z + 1, validate_args=False), obs=x)


@pytest.mark.parametrize("loc", [500.0, torch.nan])
def test_draws_that_explain_nothing_count_as_none_and_nan_is_an_error(loc):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.full_like(x, loc), 0.01, validate_args=False))

    options = {"num_simulations": 20, "num_samples": 63}
    if loc != loc:
        with pytest.raises(pvae.NumericalError, match=r"begins with datum 0: .* log-weights are nan"):
            simulation_based_calibration(uniform, guide, torch.zeros(5), **options)
        return
    found = simulation_based_calibration(uniform, guide, torch.zeros(5), **options)
    assert not found.weighted.ess.any()
    assert "median ESS of its weights 0.0, few" in repr(found)


def test_a_factor_cannot_be_simulated():
    oracle = linear_gaussian(1, 2)

    def model(x):
        oracle.model(x)
        with pyro.plate("more", len(x)):
            pyro.factor("f", -x[..., 0].square())

    with pytest.raises(pvae.ProgramError, match=r"site 'f' is a pyro.factor, a number that is added"):
        simulation_based_calibration(model, oracle.guide, oracle.sample(5), num_simulations=20, num_samples=63)
