"""Priors, likelihoods and posteriors: one table of constructors drives one set of checks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pvae import likelihoods, networks, posteriors, priors
from pvae.errors import ArgumentError, ProgramError

LIKELIHOODS = {
    "bernoulli": lambda: likelihoods.Bernoulli(networks.mlp(3, [4], 5)),
    "bernoulli-shaped": lambda: likelihoods.Bernoulli(networks.mlp(3, [4], 6), event_shape=(2, 3)),
    "gaussian-fixed": lambda: likelihoods.Gaussian(networks.mlp(3, [4], 5), scale=0.3),
    "gaussian-learned": lambda: likelihoods.Gaussian(networks.mlp(3, [4], 5)),
    "gaussian-network": lambda: likelihoods.Gaussian(networks.mlp(3, [4], 10), scale="network"),
    "gaussian-network-shaped": lambda: likelihoods.Gaussian(
        networks.mlp(3, [4], (2, 2, 3)), scale="network", event_shape=(2, 3)
    ),
    "gaussian-network-images": lambda: likelihoods.Gaussian(networks.conv_decoder(3, (2, 4, 4)), scale="network"),
    "continuous-bernoulli": lambda: likelihoods.ContinuousBernoulli(networks.mlp(3, [4], 5)),
    "laplace": lambda: likelihoods.Laplace(networks.mlp(3, [4], 5)),
    "laplace-network-shaped": lambda: likelihoods.Laplace(
        networks.mlp(3, [4], (2, 2, 3)), scale="network", event_shape=(2, 3)
    ),
    "student-t": lambda: likelihoods.StudentT(networks.mlp(3, [4], 5), df=10.0),
    "discretized-logistic": lambda: likelihoods.DiscretizedLogistic(networks.mlp(3, [4], 5)),
    "discretized-logistic-images": lambda: likelihoods.DiscretizedLogistic(
        networks.conv_decoder(3, (2, 4, 4)), scale="network", num_levels=17
    ),
    "poisson": lambda: likelihoods.Poisson(networks.mlp(3, [4], 5)),
    "negative-binomial": lambda: likelihoods.NegativeBinomial(networks.mlp(3, [4], 5)),
    "negative-binomial-network": lambda: likelihoods.NegativeBinomial(
        networks.mlp(3, [4], (2, 5)), total_count="network", event_shape=(5,)
    ),
    "categorical": lambda: likelihoods.Categorical(networks.mlp(3, [4], (3, 2)), num_classes=3),
}


@pytest.fixture(params=LIKELIHOODS)
def likelihood(request):
    return LIKELIHOODS[request.param]()


@pytest.mark.parametrize("leading", [(), (2,), (6, 2)])
def test_likelihood_shapes(likelihood, leading):
    px = likelihood(torch.randn(*leading, 3))
    assert px.batch_shape == leading
    assert px.log_prob(px.sample()).shape == leading


def test_likelihood_samples_follow_its_density(likelihood):
    """The mean of (x - E[x]) / sd[x] over 4,000 draws is N(0, 1/sqrt(4000)) by entry; 6 sigma fails once in 1e8."""
    px = likelihood(torch.randn(3))
    if isinstance(likelihood, likelihoods.Categorical):
        assert px.mean.shape == px.event_shape  # classes have no moments
        return
    x = px.sample((4000,))
    z = (x - px.mean) / px.stddev
    assert z.mean(0).abs().max() < 6 / math.sqrt(4000)


def test_bernoulli_takes_the_network_for_its_logits():
    net = networks.mlp(3, [], 5)
    z = torch.randn(4, 3)
    torch.testing.assert_close(likelihoods.Bernoulli(net)(z).mean, net(z).sigmoid())


def test_bernoulli_is_a_probability_over_all_bit_patterns():
    px = LIKELIHOODS["bernoulli"]()(torch.randn(3))
    patterns = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 5)
    assert px.log_prob(patterns).logsumexp(0).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("scale", [0.1, 2.5])
def test_fixed_gaussian_owns_every_constant(scale):
    net = networks.mlp(3, [], 2)
    z, x = torch.randn(3), torch.randn(2)
    residual = ((x - net(z)) / scale).square().sum()
    exact = -residual / 2 - 2 * math.log(scale) - math.log(2 * math.pi)
    assert likelihoods.Gaussian(net, scale=scale)(z).log_prob(x).item() == pytest.approx(exact.item(), rel=1e-5)


def test_fixed_scale_is_exact_in_float64():
    px = likelihoods.Gaussian(networks.mlp(3, [], 2), scale=0.1).double()(torch.zeros(3, dtype=torch.float64))
    assert px.stddev.tolist() == [0.1, 0.1]


def test_learned_scale_is_one_parameter_that_gets_a_gradient():
    gaussian = likelihoods.Gaussian(networks.mlp(3, [], 2))
    gaussian(torch.zeros(3)).log_prob(torch.full((2,), 3.0)).backward()
    assert gaussian.log_scale.shape == ()
    assert gaussian.log_scale.grad > 0  # residuals of 3 want a scale above 1


@pytest.mark.parametrize("raw", [-1e6, 1e6])
def test_no_network_output_makes_a_scale_zero_or_infinite(raw):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.full((*x.shape[:-1], 4), raw)

    for made in (
        likelihoods.Gaussian(Constant(), scale="network")(torch.zeros(1, 3)),
        posteriors.DiagonalNormal(Constant())(torch.zeros(1, 3)),
    ):
        assert made.stddev.isfinite().all()
        assert (made.stddev > 0).all()


@pytest.mark.parametrize("scale", [0, -1.0, math.inf, math.nan, "per pixel", True, None])
def test_impossible_scales_are_refused(scale):
    with pytest.raises(ArgumentError, match="scale"):
        likelihoods.Gaussian(networks.mlp(3, [], 2), scale=scale)


def test_network_of_the_wrong_size_is_named():
    with pytest.raises(ProgramError, match=r"\(5,\).*\(2, 3\)"):
        likelihoods.Bernoulli(networks.mlp(3, [], 5), event_shape=(2, 3))(torch.zeros(1, 3))


def test_standard_normal():
    pz = priors.StandardNormal(3)()
    z = torch.randn(4, 3)
    assert (pz.batch_shape, pz.event_shape) == ((), (3,))
    exact = -z.square().sum(-1) / 2 - 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(pz.log_prob(z), exact)


def test_standard_normal_follows_its_model():
    assert priors.StandardNormal(3).double()().sample().dtype == torch.float64
    assert not priors.StandardNormal(3).state_dict()


def test_diagonal_normal_splits_the_network_in_mean_and_log_scale():
    net = nn.Linear(3, 4)
    x = torch.randn(5, 3)
    qz = posteriors.DiagonalNormal(net)(x)
    loc, log_scale = net(x).chunk(2, -1)
    assert (qz.batch_shape, qz.event_shape) == ((5,), (2,))
    torch.testing.assert_close(qz.mean, loc)
    torch.testing.assert_close(qz.stddev.log(), networks.soft_clip(log_scale, 7.0))


def test_diagonal_normal_needs_an_even_network():
    with pytest.raises(ProgramError, match=r"2 \* D outputs.*gives 5"):
        posteriors.DiagonalNormal(nn.Linear(3, 5))(torch.zeros(1, 3))
