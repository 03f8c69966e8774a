"""Annealed importance sampling and its reverse, against exact answers.

Seeds are fixed; bounds of 5 standard errors fail with 6e-7 for each number compared under another seed.
"""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import distributions as dist

import pvae
from pvae.evidence import bidirectional_monte_carlo
from pvae.evidence.proposals import Annealed, Guide, Laplace, Prior
from pvae.evidence.proposals.annealing import ladder
from pvae.evidence.traces import Densities
from pvae.testing import linear_gaussian, two_modes


def chains_of(oracle, x, proposal):
    return proposal.on(Densities.of(oracle.model, oracle.guide, (x,), torch.device("cpu")), (x,))


@pytest.mark.parametrize("temperatures", [1, 2, 7, 100])
def test_the_ladder_goes_from_0_to_1(temperatures):
    betas = ladder(temperatures)
    assert betas[0] == 0
    assert betas[-1] == 1
    assert (betas.diff() > 0).all()
    assert len(betas) == temperatures + 1


@pytest.mark.parametrize("start", [Guide(), Prior()], ids=["guide", "prior"])
def test_the_mean_weight_is_p_even_where_chains_hardly_mix(start):
    """E[w] = p(x) for any kernel: 10,000 chains of 4 temperatures with one leapfrog step, 5 sigma of their mean."""
    oracle = linear_gaussian(2, 3, noise=1.0, guide_shift=0.5, guide_scale=1.3)
    x = oracle.sample(1)
    with torch.no_grad():
        w = chains_of(oracle, x, Annealed(start, temperatures=4, leapfrog_steps=1)).log_weights(10_000)
    ratio = (w[:, 0] - oracle.log_px(x)).exp()
    assert ratio.mean().item() == pytest.approx(1, abs=5 * ratio.std().item() / 100)
    assert ratio.std() > 0.05


@pytest.mark.parametrize("start", [Guide(), Prior()], ids=["guide", "prior"])
def test_the_mean_reverse_weight_is_one_over_p(start):
    """E[1/w] = 1/p(x) for chains back from exact posterior draws, here 10,000 data that are all the same; 5 sigma."""
    oracle = linear_gaussian(2, 3, noise=1.0, guide_shift=0.3, guide_scale=1.2)
    x = oracle.sample(1).expand(10_000, 3)
    pair = Densities.of(oracle.model, linear_gaussian(2, 3, noise=1.0).guide, (x,), torch.device("cpu"))
    with torch.no_grad():
        latents, _ = pair.draw_guide((x,), 1)
        chains = chains_of(oracle, x, Annealed(start, temperatures=40, leapfrog_steps=3, pilots=1))
        w = chains.reverse_log_weights(latents, 1)[0]
    ratio = (oracle.log_px(x) - w).exp()
    assert ratio.mean().item() == pytest.approx(1, abs=5 * ratio.std().item() / 100)
    assert ratio.std() > 0.01


def test_one_temperature_is_plain_importance_sampling():
    """From b = 0 straight to 1 there are no moves: the same estimate as the guide's, to 5 sigma of both."""
    oracle = linear_gaussian(3, 5, guide_shift=0.3, guide_scale=1.2)
    x = oracle.sample(30)
    one, plain = (
        pvae.log_evidence(oracle.model, oracle.guide, x, num_samples=2000, proposal=p)
        for p in (Annealed(temperatures=1), Guide())
    )
    error = (one.std_error.square() + plain.std_error.square()).sqrt()
    assert ((one.log_px - plain.log_px).abs() < 5 * error).all()
    torch.testing.assert_close(one.std_error.mean(), plain.std_error.mean(), rtol=0.1, atol=0)
    assert not one.diagnostics


def test_moves_leave_their_density_invariant():
    """Chains that begin in the posterior stay in it: mean and covariance after 20 moves at b = 1, to 5 sigma."""
    oracle = linear_gaussian(2, 4)
    x = oracle.sample(1)
    with torch.no_grad():
        chains = chains_of(oracle, x, Annealed(Prior(), temperatures=50))
        posterior = oracle.posterior(x)
        state = chains._at(posterior.sample((20_000,)))
        for _ in range(20):
            state, accepted = chains._move(state, 1.0, chains.step_sizes[-1])
    assert 0.3 < accepted.mean() < 0.95  # neither stuck nor perfect, so that a wrong rule would show
    e = torch.linalg.solve_triangular(posterior.scale_tril[0], (state.v[:, 0] - posterior.loc).T, upper=False)
    assert e.mean(1).abs().max() < 5 / 20_000**0.5
    assert (e.cov() - torch.eye(2)).abs().max() < 5 * (2 / 20_000) ** 0.5


def test_acceptance_is_near_its_target_and_step_sizes_are_frozen():
    oracle = linear_gaussian(10, 15, guide_shift=0.5, guide_scale=1.5)
    x = oracle.sample(20)
    for target in (0.5, 0.8):
        estimate = pvae.log_evidence(
            oracle.model, oracle.guide, x, num_samples=50, proposal=Annealed(temperatures=60, acceptance=target)
        )
        assert estimate.diagnostics["acceptance"].shape == (20,)
        assert estimate.diagnostics["acceptance"].mean().item() == pytest.approx(target, abs=0.1)
    with torch.no_grad():
        chains = chains_of(oracle, x, Annealed(temperatures=10))
        before = chains.step_sizes.clone()
        chains.log_weights(5)
    assert torch.equal(chains.step_sizes, before)
    assert before.shape == (9, 20)


def test_the_encoder_needs_fewer_temperatures_than_the_prior():
    """Of the same length, chains from the guide have the smaller error, and 10 beat the prior's 80."""
    oracle = linear_gaussian(10, 20, guide_shift=0.3, guide_scale=1.3)
    x = oracle.sample(40)
    errors = {}
    for start, temperatures in ((Guide(), 10), (Prior(), 10), (Prior(), 80)):
        estimate = pvae.log_evidence(
            oracle.model, oracle.guide, x, num_samples=100, proposal=Annealed(start, temperatures=temperatures)
        )
        errors[start.name, temperatures] = (estimate.log_px - oracle.log_px(x)).square().mean().sqrt().item()
    assert errors["guide", 10] < errors["prior", 80] < errors["prior", 10]


def test_more_temperatures_are_better():
    oracle = linear_gaussian(5, 10, guide_shift=1.0, guide_scale=1.5)
    x = oracle.sample(40)
    spread = [
        pvae.log_evidence(oracle.model, oracle.guide, x, num_samples=50, proposal=Annealed(temperatures=t)).std_error
        for t in (2, 10, 60)
    ]
    assert spread[0].mean() > spread[1].mean() > spread[2].mean()


# --- both ways ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [Guide(), Prior(), Laplace()], ids=["guide", "prior", "laplace"])
def test_bounds_hold_and_close(start):
    """Over 200 simulated data the exact mean lies between the bounds, to 5 sigma, and the gap closes."""
    oracle = linear_gaussian(4, 8, guide_shift=0.5, guide_scale=1.3)
    gaps = []
    for temperatures in (5, 100):
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


def test_a_missed_mode_opens_the_gap():
    """The guide's one mode leaves the lower bound log 2 low and the reverse chains of the other mode high."""
    oracle = two_modes(2, 6, noise=0.25)
    x = oracle.sample(100)
    one, both = (
        bidirectional_monte_carlo(oracle.model, oracle.guide, x, proposal=Annealed(start, temperatures=150))
        for start in (Guide(), Prior())
    )
    assert one.gap > 0.5
    assert both.gap < 0.2


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
