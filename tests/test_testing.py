"""The oracle itself, checked by numerical integration and by its own definitions."""

from __future__ import annotations

import pytest
import torch
from pyro import poutine

from pvae.errors import ArgumentError
from pvae.testing import linear_gaussian, two_modes


def test_log_px_is_the_integral_of_the_joint():
    oracle = linear_gaussian(1, 3)
    x = oracle.sample(5)
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    pz = torch.distributions.Normal(0.0, 1.0).log_prob(grid)
    px = torch.distributions.Normal(grid @ oracle.weight.T + oracle.bias, oracle.noise)
    joint = torch.stack([pz[:, 0] + px.log_prob(row).sum(-1) for row in x], 1)
    integral = joint.logsumexp(0) + torch.log(grid[1] - grid[0])
    torch.testing.assert_close(oracle.log_px(x), integral, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("latent_dim", [1, 3, 10])
def test_joint_over_posterior_is_the_evidence_at_every_latent(latent_dim):
    """Bayes' rule: log p(x, z) - log p(z|x) = log p(x), for any z."""
    oracle = linear_gaussian(latent_dim, 4)
    x = oracle.sample(6)
    guide = poutine.trace(oracle.guide).get_trace(x)
    model = poutine.trace(poutine.replay(oracle.model, trace=guide)).get_trace(x)
    model.compute_log_prob()
    guide.compute_log_prob()
    joint = model.nodes["z"]["log_prob"] + model.nodes["x"]["log_prob"]
    torch.testing.assert_close(joint - guide.nodes["z"]["log_prob"], oracle.log_px(x))


def test_the_knobs_make_the_guide_wrong_by_a_known_amount():
    x = linear_gaussian(3).sample(6)
    exact, wrong = linear_gaussian(3), linear_gaussian(3, guide_shift=0.5, guide_scale=1.5)
    torch.testing.assert_close(exact.elbo(x), exact.log_px(x))
    # KL of independent normals in posterior units: D (s^2 + d^2 - 1 - 2 log s) / 2
    kl = 3 * (1.5**2 + 0.5**2 - 1 - 2 * torch.tensor(1.5, dtype=torch.float64).log()) / 2
    torch.testing.assert_close(wrong.log_px(x) - wrong.elbo(x), kl.expand(6))


def test_samples_are_seeded_and_have_the_models_covariance():
    """20,000 draws: the sd of a covariance entry is below 0.04 (largest variance 2.9); 6 sigma."""
    oracle = linear_gaussian(2, 4)
    x = oracle.sample(20_000, seed=1)
    assert torch.equal(x, oracle.sample(20_000, seed=1))
    covariance = oracle.weight @ oracle.weight.T + oracle.noise**2 * torch.eye(4, dtype=torch.float64)
    error = x.T.cov() - covariance
    assert error.abs().max() < 6 * (2 / 20_000) ** 0.5 * covariance.diagonal().max()


def test_impossible_arguments():
    for options in ({"latent_dim": 0}, {"noise": 0.0}, {"guide_scale": -1.0}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            linear_gaussian(**options)


def test_two_modes_have_the_evidence_of_one_and_both_of_its_modes():
    """log p(x) by a grid, and Bayes' rule at any latent for the posterior of two modes."""
    oracle = two_modes(1, 3, noise=0.5)
    x = oracle.sample(5)
    with torch.no_grad():
        grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
        pz = torch.distributions.Normal(0.0, 1.0).log_prob(grid)[:, 0]
        mean = grid @ oracle.half.weight.T
        likelihood = torch.stack(
            [torch.distributions.Normal(s * mean[:, None], 0.5).log_prob(x).sum(-1) for s in (1, -1)]
        )
        joint = pz[:, None] + likelihood.logsumexp(0) - torch.log(torch.tensor(2.0))
    torch.testing.assert_close(oracle.log_px(x), joint.logsumexp(0) + torch.log(grid[1] - grid[0]))
    posterior = oracle.posterior(x).log_prob(grid[:, None].expand(-1, 5, 1))
    inside = slice(8000, 12_000)
    torch.testing.assert_close(
        joint[inside] - posterior[inside], oracle.log_px(x).expand(4000, 5), rtol=1e-6, atol=1e-6
    )


def test_the_guide_of_two_modes_knows_one():
    oracle = two_modes(2, 5, noise=0.1)
    x = oracle.sample(200)
    guide = poutine.trace(oracle.guide).get_trace(x)
    model = poutine.trace(poutine.replay(oracle.model, trace=guide)).get_trace(x)
    model.compute_log_prob()
    guide.compute_log_prob()
    log_w = model.nodes["z"]["log_prob"] + model.nodes["x"]["log_prob"] - guide.nodes["z"]["log_prob"]
    missed = oracle.log_px(x) - log_w
    torch.testing.assert_close(missed.median(), torch.tensor(2.0, dtype=torch.float64).log())
    assert (missed > -1e-9).all()
