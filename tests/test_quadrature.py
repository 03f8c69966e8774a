"""Quadrature against closed forms and against grids."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from helpers import Items, make_loader
from pyro import distributions as dist

import pvae
from pvae.evidence import gauss_hermite
from pvae.testing import linear_gaussian, two_modes


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
@pytest.mark.parametrize("num_nodes", [4, 32])
def test_gaussian_posteriors_are_exact(latent_dim, num_nodes):
    oracle = linear_gaussian(latent_dim, 5, guide_shift=0.7, guide_scale=2.0)
    x = oracle.sample(20)
    result = gauss_hermite(oracle.model, oracle.guide, x, num_nodes=num_nodes)
    torch.testing.assert_close(result.log_px, oracle.log_px(x), rtol=0, atol=1e-9)
    assert (result.error < 1e-9).all()
    assert result.mean == pytest.approx(oracle.log_px(x).mean().item())


def test_a_skewed_posterior_on_a_grid():
    """Gamma-Poisson, whose evidence is negative binomial: the posterior of log z is skewed."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.tensor(2.0, dtype=torch.float64), 0.5))
            pyro.sample("x", dist.Poisson(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(2 + x, 1.5))

    x = torch.arange(10, dtype=torch.float64)
    exact = dist.GammaPoisson(torch.tensor(2.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)).log_prob(
        x
    )
    result = gauss_hermite(model, guide, x, num_nodes=64)
    assert ((result.log_px - exact).abs() < 1e-8).all()
    coarse = gauss_hermite(model, guide, x, num_nodes=8)
    wrong = (coarse.log_px - exact).abs()
    assert (coarse.error > wrong).all(), "the error covers what is missing"
    assert wrong.max() > 1e-6


def test_a_small_vae_agrees_with_a_grid_and_with_sampling(small_vae, bits):
    result = gauss_hermite(small_vae.model, small_vae.guide, bits[:20])
    axis = torch.linspace(-8, 8, 321, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis).float()
    with torch.no_grad():
        px = small_vae.decode(z[:, None]).log_prob(bits[:20]).double()
    grid = (px + small_vae.prior().log_prob(z)[:, None]).logsumexp(0) + 2 * (axis[1] - axis[0]).log()
    torch.testing.assert_close(result.log_px, grid, rtol=0, atol=5e-3)  # ReLU's kinks
    estimate = pvae.log_evidence(small_vae.model, small_vae.guide, bits[:20], num_samples=2000)
    assert ((estimate.log_px - result.log_px).abs() < 5 * estimate.std_error + 5e-3).all()


def test_a_second_mode_shows_in_the_error_or_is_log_2_away():
    oracle = two_modes(1, 3, noise=0.5)
    x = oracle.sample(50)
    result = gauss_hermite(oracle.model, oracle.guide, x, num_nodes=64)
    wrong = (result.log_px - oracle.log_px(x)).abs()
    assert (wrong < math.log(2) + 1e-3).all()
    near = oracle.half.posterior(x).loc[:, 0].abs() < 1.5 * oracle.half.posterior(x).scale_tril[0, 0, 0]
    assert near.any()
    assert (wrong[near] < 0.01).all()


@pytest.mark.parametrize("read", [Items, lambda x: make_loader(x, batch_size=8)], ids=["dataset", "loader"])
def test_data_that_are_read_have_the_values_of_those_in_memory(read):
    oracle = two_modes(1, 3, noise=0.5)
    x = oracle.sample(20)
    ours, theirs = (gauss_hermite(oracle.model, oracle.guide, data, num_nodes=8) for data in (read(x), x))
    torch.testing.assert_close(ours.log_px, theirs.log_px, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.error, theirs.error, rtol=0, atol=1e-9)


def test_what_quadrature_refuses(small_vae, bits):
    oracle = linear_gaussian(4)
    with pytest.raises(pvae.ProgramError, match=r"up to 3 dimensions, these have 4.*32\^4.*pvae.log_evidence"):
        gauss_hermite(oracle.model, oracle.guide, oracle.sample(3))
    with pytest.raises(pvae.ArgumentError, match=r"num_nodes must be even.*got 7"):
        gauss_hermite(small_vae.model, small_vae.guide, bits, num_nodes=7)
    assert str(gauss_hermite(small_vae.model, small_vae.guide, bits[:3])).startswith("log p(x) of 3 data by quadrature")
