"""New data from posterior and prior: against exact predictive distributions, for pairs of every kind."""

from __future__ import annotations

import pyro
import pytest
import torch
from helpers import process_state
from pairs import ModulePair
from pyro import distributions as dist
from pyro.infer import autoguide as auto

import pvae
from pvae.evidence import posterior_predictive, prior_predictive
from pvae.testing import linear_gaussian, two_modes

PARALLEL = {"enumerate": "parallel"}


def draws(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def assert_moments(values, mean, variance, effective):
    """Means and variances of normal draws; with so many of them independent, some 30 bounds fail one time in 5,000."""
    assert ((values.mean(0) - mean).abs() < 4.5 * (variance / effective).sqrt()).all()
    assert ((values.var(0) / variance - 1).abs() < 4.5 * (2 / effective) ** 0.5).all()


@pytest.mark.parametrize("proposal", ["guide", "refined"])
def test_posterior_predictive_is_the_exact_one(proposal):
    pair = linear_gaussian(2, 5, guide_shift=0.5, guide_scale=1.3)
    x = pair.sample(3)
    drawn = posterior_predictive(pair.model, pair.guide, x, num_samples=6000, proposal=proposal)
    assert drawn.draws["x"].shape == (6000, 3, 5)
    assert drawn.is_resampled.all()
    torch.testing.assert_close(drawn.data["x"], x)
    exact = pair.posterior(x)
    covariance = pair.weight @ exact.covariance_matrix @ pair.weight.T
    variance = covariance.diagonal(dim1=-2, dim2=-1) + pair.noise**2
    effective = drawn.weighted.ess.min() / 2  # weights are resampled, which adds as much again
    assert_moments(drawn.draws["x"], exact.mean @ pair.weight.T + pair.bias, variance, effective)
    assert_moments(drawn.latents["z"], exact.mean, exact.variance, effective)
    again = drawn.weighted.latents["z"][drawn.chosen, torch.arange(3)]
    assert torch.equal(drawn.latents["z"], again)


def test_without_resampling_draws_are_the_guides():
    pair = linear_gaussian(2, 5, guide_shift=2.0, guide_scale=1.3)
    x = pair.sample(3)
    drawn = posterior_predictive(pair.model, pair.guide, x, num_samples=4000, resample=False)
    assert not drawn.is_resampled.any()
    assert torch.equal(drawn.latents["z"], drawn.weighted.latents["z"])
    q = pair.proposal(x)
    assert_moments(drawn.latents["z"], q.mean, q.variance, 4000)


def test_prior_predictive_is_the_exact_one():
    pair = linear_gaussian(2, 5)
    drawn = prior_predictive(pair.model, pair.guide, pair.sample(3), num_samples=4000, chunk_size=2000)
    variance = pair.weight.square().sum(1) + pair.noise**2
    assert_moments(drawn.draws["x"], pair.bias, variance, 4000)
    assert_moments(drawn.latents["z"], torch.zeros(2), torch.ones(2), 4000)
    assert drawn.weighted is drawn.chosen is drawn.is_resampled is None
    assert str(drawn) == "prior predictive draws of x (4000, 3, 5)"


def test_weights_that_will_not_do_are_named():
    pair = linear_gaussian(3, 8, guide_scale=0.2)
    with pytest.warns(UserWarning, match=r"4 of 4 data have a k-hat above 0.7.*Try proposal='refined'"):
        drawn = posterior_predictive(pair.model, pair.guide, pair.sample(4), num_samples=200)
    assert not drawn.is_resampled.any()
    assert "0 of 4 data resampled by weight" in str(drawn)


def test_a_vae_gives_new_data_and_leaves_all_as_it_was():
    vae = pvae.VAE.mlp(6, 2, [8])
    x = draws(5, 6).sign().clamp(min=0)
    before = process_state()
    drawn = posterior_predictive(vae.model, vae.guide, x, num_samples=50, resample=False)
    assert process_state() == before
    assert set(drawn.draws["x"].unique().tolist()) == {0.0, 1.0}
    assert (drawn.draws["x"] != x).any()
    again = posterior_predictive(vae.model, vae.guide, x, num_samples=50, resample=False)
    assert torch.equal(drawn.draws["x"], again.draws["x"])
    assert vae.training


def test_the_posterior_finds_a_mode_and_keeps_a_datums_discrete_latent():
    """A component that is summed out stays the datum's in what is predicted: of two far apart, that of the datum."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.full((len(x),), 0.5)), infer=PARALLEL)
            z = pyro.sample("z", dist.Normal(0.0, 0.5))
            pyro.sample("x", dist.Normal(20 * k + z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 0.5))

    x = torch.tensor([0.2, 20.3, 0.0])
    drawn = posterior_predictive(model, guide, x, num_samples=200)
    assert ((drawn.draws["x"] > 10) == (x > 10)).all()
    prior = prior_predictive(model, guide, x, num_samples=200)
    share = (prior.draws["x"] > 10).double().mean(0)
    assert ((share - 0.5).abs() < 4.5 * 0.5 / 200**0.5).all()
    assert torch.equal(prior.draws["x"] > 10, prior.latents["k"] > 0.5)


@pytest.mark.filterwarnings("ignore:the guide, AutoNormal, was run for the first time", "ignore:.*k-hat above 0.7")
def test_joint_pairs_with_plates_factors_and_deterministic_sites():
    def model(x, scale):
        slope = pyro.sample("slope", dist.Gamma(2.0, 2.0).expand([2]).to_event(1))
        pyro.factor("extra", -slope.sum(-1))
        with pyro.plate("groups", 2, dim=-2):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * mean)
            with pyro.plate("items", len(x), dim=-1):
                pyro.sample("x", dist.Normal(mean, scale), obs=x.T)

    data = draws(6, 2), 0.1 + draws(6).abs()
    guide = auto.AutoNormal(model)
    for predict in (posterior_predictive, prior_predictive):
        drawn = predict(model, guide, data, num_samples=30)
        assert drawn.draws["x"].shape == (30, 6, 2)
        torch.testing.assert_close(drawn.data["x"], data[0])
        assert {name: tuple(value.shape) for name, value in drawn.latents.items()} == {
            "slope": (30, 1, 2),
            "mean": (30, 1, 2),
        }
        assert drawn.plates["x"] == drawn.plates["mean"] == ("groups",)
        assert drawn.data_plate == "items"


def test_a_regression_predicts_what_it_should():
    """Exact posterior as the guide: predictions have mean ``x m`` and variance ``x S x + noise^2``."""
    x = draws(12, 2)
    y = x @ torch.tensor([1.0, -2.0])
    covariance = torch.linalg.inv(torch.eye(2) + x.T @ x / 0.25)
    mean = covariance @ x.T @ y / 0.25

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((w * x).sum(-1), 0.5), obs=y)

    def guide(x, y):
        pyro.sample("w", dist.MultivariateNormal(mean, covariance))

    drawn = posterior_predictive(model, guide, (x, y), num_samples=4000)
    assert_moments(drawn.draws["y"], x @ mean, (x @ covariance * x).sum(-1) + 0.25, 4000)


def test_data_that_broadcast_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), 1.0))

    for predict in (posterior_predictive, prior_predictive):
        with pytest.raises(pvae.ProgramError, match=r"site 'x': its draws are \(4, 1\).*\(4, 3\), which broadcast"):
            predict(model, guide, draws(4, 3), num_samples=30)


def test_other_inputs_are_used_and_not_predicted():
    x, mask = draws(5, 6).sign().clamp(min=0), draws(5, 6) > 0
    vae = pvae.MaskedVAE.mlp(6, 2, [8])
    drawn = prior_predictive(vae.model, vae.guide, (x, mask), num_samples=20)
    assert list(drawn.draws) == ["x"]
    pair = ModulePair()
    shape = (
        posterior_predictive(pair.model, pair.guide, x.reshape(5, 2, 3), num_samples=20, resample=False)
        .draws["obs"]
        .shape
    )
    assert shape == (20, 5, 6)  # as the site observes it


def test_two_modes_are_both_in_the_posterior():
    pair = two_modes()
    x = pair.sample(2)
    drawn = posterior_predictive(pair.model, pair.guide, x, num_samples=20, resample=False)
    assert drawn.draws["x"].shape == (20, 2, 5)
