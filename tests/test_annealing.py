"""Annealed importance sampling and its reverse, against exact answers.

Seeds are fixed; bounds of 5 standard errors fail with 6e-7 for each number compared under another seed.
"""

from __future__ import annotations

import pyro
import pytest
import torch

import pvae
from pvae.errors import ArgumentError
from pvae.evidence.densities import Densities
from pvae.evidence.proposals import Annealed, GivenGaussian, Guide, Prior
from pvae.evidence.proposals.annealing import Chains, ladder
from pvae.runtime import place_pair
from pvae.testing import linear_gaussian


def chains_of(oracle, x, proposal):
    return proposal.on(Densities.of(place_pair(oracle.model, oracle.guide, device="cpu"), (x,)), (x,))


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
    pair = Densities.of(place_pair(oracle.model, linear_gaussian(2, 3, noise=1.0).guide, device="cpu"), (x,))
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
            oracle.model, oracle.guide, x, num_samples=50, proposal=Annealed(temperatures=30, acceptance=target)
        )
        assert estimate.diagnostics["acceptance"].shape == (20,)
        assert estimate.diagnostics["acceptance"].mean().item() == pytest.approx(target, abs=0.1)
    with torch.no_grad():
        chains = chains_of(oracle, x, Annealed(temperatures=10))
        before = chains.step_sizes.clone()
        chains.log_weights(5)
    assert torch.equal(chains.step_sizes, before)
    assert before.shape == (9, 20)


@pytest.mark.slow
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
        for t in (2, 8, 30)
    ]
    assert spread[0].mean() > spread[1].mean() > spread[2].mean()


def test_step_sizes_over_other_temperatures_lie_between_those_that_were_tuned():
    oracle = linear_gaussian(3, 5, guide_scale=1.5)
    x = oracle.sample(4)
    with torch.no_grad():
        tuned = chains_of(oracle, x, Annealed(temperatures=10))
    sizes = tuned.step_sizes
    torch.testing.assert_close(tuned.over(tuned.betas).step_sizes, sizes)
    other = tuned.over(ladder(33)).step_sizes
    assert other.shape == (32, 4)
    assert ((sizes.amin(0) <= other * 1.001) & (other <= sizes.amax(0) * 1.001)).all()
    with torch.no_grad():
        one = chains_of(oracle, x, Annealed(temperatures=2))
    assert (one.over(ladder(5)).step_sizes == one.step_sizes).all()


def test_some_of_the_data_go_on_from_a_gaussian_that_is_there():
    """From the exact posteriors of two of four data: each weight is p(x), to rounding, at each temperature."""
    oracle = linear_gaussian(3, 5, guide_scale=1.5)
    x, exact = oracle.sample(4), linear_gaussian(3, 5)
    pair = Densities.of(place_pair(exact.model, exact.guide, device="cpu"), (x,))
    rows = torch.tensor([1, 3])
    with torch.no_grad():
        given = GivenGaussian(Guide().gaussian(pair, (x,))[rows])
        w = Annealed(given, temperatures=3).on(pair, (x[rows],)).log_weights(5)
        torch.testing.assert_close(w, exact.log_px(x)[rows].double().expand(5, 2), rtol=0, atol=1e-3)
        with pytest.raises(ArgumentError, match="2 data, and the batch has 4"):
            given.gaussian(pair, (x,))


@pytest.mark.parametrize("start", [Guide(), Prior()], ids=["guide", "prior"])
def test_captured_chains_are_those_of_the_programs(start, monkeypatch):
    """The same noise, in tiles that are filled up: three moves of 11 chains for 301 data, to rounding."""
    monkeypatch.setattr("pvae.capture.captured._no_compiler", [True])  # which would take seconds
    oracle = linear_gaussian(3, 5, noise=1.0, guide_shift=0.3, guide_scale=1.3)
    x = oracle.sample(301)
    weights = []
    for capture in (False, True):
        pair = Densities.of(place_pair(oracle.model, oracle.guide, device="cpu"), (x,))
        pair.programs.capture = capture
        gaussian = None if isinstance(start, Prior) else start.gaussian(pair, (x,))
        chains = Chains(pair, (x,), gaussian, ladder(4), leapfrog_steps=2)
        with torch.no_grad(), pyro.validation_enabled(False):
            chains.step_sizes = torch.full((3, 301), 0.4, dtype=torch.float64)
            torch.manual_seed(5)
            weights.append(chains.log_weights(11))
        assert bool(pair.programs._captured) == capture
    assert ((weights[0] - weights[1]).abs() < 1e-3).double().mean() > 0.999  # a draw on the edge may be accepted once
