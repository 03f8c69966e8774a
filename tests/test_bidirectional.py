"""Annealed importance sampling both ways, on simulated data, between exact answers.

Seeds are fixed; bounds of 5 standard errors fail with 6e-7 for each number compared under another seed.
"""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from helpers import Items, make_loader
from pyro import distributions as dist

import pvae
from pvae.evidence import bidirectional_monte_carlo
from pvae.evidence.proposals import Annealed, Guide, Laplace, Prior
from pvae.testing import linear_gaussian, two_modes


@pytest.mark.parametrize("start", [Guide(), Prior(), Laplace()], ids=["guide", "prior", "laplace"])
def test_bounds_hold_and_close(start):
    """Over 200 simulated data the exact mean lies between the bounds, to 5 sigma, and the gap closes."""
    oracle = linear_gaussian(4, 8, guide_shift=0.5, guide_scale=1.3)
    gaps = []
    for temperatures in (5, 60):
        bracket = bidirectional_monte_carlo(
            oracle.model, oracle.guide, oracle.sample(200), proposal=Annealed(start, temperatures=temperatures)
        )
        exact = oracle.log_px(*bracket.data)
        for differences in (exact - bracket.lower, bracket.upper - exact):
            assert differences.mean() > -5 * differences.std() / 200**0.5 - 1e-9
        gaps.append(bracket.gap)
        assert bracket.gap == pytest.approx((bracket.upper - bracket.lower).mean().item())
    if start.name == "laplace":  # the posterior itself
        assert gaps == pytest.approx([0, 0], abs=1e-9)
    else:
        assert gaps[1] < 0.3 * gaps[0]
        assert gaps[1] < 0.3


@pytest.mark.slow
def test_a_missed_mode_opens_the_gap():
    """The guide's one mode leaves the lower bound log 2 low and the reverse chains of the other mode high."""
    oracle = two_modes(2, 6, noise=0.25)
    x = oracle.sample(100)
    one, both = (
        bidirectional_monte_carlo(oracle.model, oracle.guide, x, proposal=Annealed(start, temperatures=60))
        for start in (Guide(), Prior())
    )
    assert one.gap > 0.5
    assert both.gap < 0.2 + 4 * both.gap_std_error


def test_simulated_data_come_from_the_model():
    """Mean and covariance of 5,000 simulated data, to 5 sigma; other tensors of a tuple stay."""
    oracle = linear_gaussian(2, 3)

    def model(x, y):
        oracle.model(x)

    x, y = torch.zeros(5000, 3, dtype=torch.float64), torch.arange(5000)
    bracket = bidirectional_monte_carlo(
        model, lambda x, y: oracle.guide(x), (x, y), num_samples=1, proposal=Annealed(temperatures=1)
    )
    simulated, kept = bracket.data
    assert torch.equal(kept, y)
    covariance = oracle.weight @ oracle.weight.T + oracle.noise**2 * torch.eye(3, dtype=torch.float64)
    error = (simulated.T.cov() - covariance).abs() / covariance.diagonal().max()
    assert error.max() < 5 * (2 / 5000) ** 0.5
    assert ((simulated.mean(0) - oracle.bias).abs() < 5 * (covariance.diagonal() / 5000).sqrt()).all()
    assert "100 data" not in str(bracket)
    assert "gap" in str(bracket)


def test_data_that_the_model_transforms_cannot_be_simulated(bits):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0] / 2)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(
        pvae.ProgramError, match=r"site 'x', of shape \(300,\), observes none of the data tensors as it is"
    ):
        bidirectional_monte_carlo(model, guide, bits)


def test_a_vae_is_bracketed(small_vae, bits):
    bracket = bidirectional_monte_carlo(
        small_vae.model, small_vae.guide, bits[:60], num_samples=8, proposal=Annealed(Prior(), temperatures=40)
    )
    assert set(bracket.data[0].unique().tolist()) == {0.0, 1.0}
    estimate = pvae.log_evidence(small_vae.model, small_vae.guide, bracket.data, num_samples=2000)
    # Bounds hold in the mean over the simulated data.
    for differences in (estimate.log_px - bracket.lower, bracket.upper - estimate.log_px):
        assert differences.mean() > -5 * differences.std() / 60**0.5
    assert math.isfinite(bracket.gap_std_error)
    with pytest.raises(pvae.ArgumentError, match=r"proposal must be a pvae.evidence.proposals.Annealed, got 'ais'"):
        bidirectional_monte_carlo(small_vae.model, small_vae.guide, bits, proposal="ais")


def test_data_that_are_read_are_simulated_like_those_in_memory():
    """One block to the bit; in several, other draws: the exact mean lies between the bounds, to 5 sigma."""
    oracle = linear_gaussian(2, 3, guide_shift=0.5, guide_scale=1.3)

    def run(data):
        return bidirectional_monte_carlo(
            lambda x, y: oracle.model(x), lambda x, y: oracle.guide(x), data, proposal=Annealed(temperatures=10)
        )

    x, y = oracle.sample(60), torch.arange(60)
    rows = list(zip(x, y, strict=True))
    memory, dataset, loader = run((x, y)), run(Items(rows)), run(make_loader(rows, batch_size=25))
    for name in ("lower", "upper", "acceptance"):
        assert torch.equal(getattr(dataset, name), getattr(memory, name))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(dataset.data, memory.data, strict=True))
    assert torch.equal(loader.data[1], y)
    exact = oracle.log_px(loader.data[0])
    for differences in (exact - loader.lower, loader.upper - exact):
        assert differences.shape == (60,)
        assert differences.mean() > -5 * differences.std() / 60**0.5
