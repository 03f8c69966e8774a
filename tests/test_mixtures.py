"""Mixtures as priors, whose log p(x) is a mixture too, and known: every proposal is held against it.

Seeds are fixed. Scores of the data called reliable stay below 5, which fails with 6e-7 for each of at most 20 numbers.
"""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import distributions as dist

import pvae
from pvae.evidence import bidirectional_monte_carlo, gauss_hermite
from pvae.evidence.proposals import Annealed

# Close enough for posteriors of one mode: of more, "refined" and "laplace" see only one.
LOC = torch.tensor([[-0.6, 0.2], [0.4, 0.4], [0.2, -0.4]], dtype=torch.float64)
SCALE = torch.tensor([[0.5, 0.7], [0.8, 0.6], [0.6, 1.0]], dtype=torch.float64)
LOGITS = torch.tensor([0.2, -0.3, 0.0], dtype=torch.float64)
NOISE = 0.8
PROPOSALS = ("guide", "prior", "refined", "laplace", "student-t", "defensive", Annealed(temperatures=25))


def mixture(loc, scale):
    return dist.MixtureSameFamily(dist.Categorical(logits=LOGITS), dist.Normal(loc, scale).to_event(1))


def masked(widen):
    """The first entry of z is of one normal distribution, the second of another."""
    one, other = (dist.Normal(m, (s**2 + widen**2) ** 0.5) for m, s in ((LOC[0], 1.0), (LOC[1], 2.0)))
    return dist.MaskedMixture(torch.tensor([True, False]), one, other).to_event(1)


def masked_vectors(widen):
    one, other = (dist.Normal(m, (s**2 + widen**2) ** 0.5).to_event(1) for m, s in ((LOC[0], 1.0), (LOC[1], 2.0)))
    return dist.MaskedMixture(torch.tensor(True), one, other)


# A prior, given how much to widen it: without noise z's, with noise that of x.
PRIORS = {
    "same family": lambda widen: mixture(LOC, (SCALE**2 + widen**2).sqrt()),
    "diagonal normals": lambda widen: dist.MixtureOfDiagNormals(LOC, (SCALE**2 + widen**2).sqrt(), LOGITS),
    "masked": masked,
    "masked vectors": masked_vectors,
}


def pair_of(prior):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.6 * x, 0.8).to_event(1))

    return model, guide


def check(estimate, exact):
    """Also of data with a heavy tail of weights, which a Gaussian leaves of a mixture, the median is near."""
    reliable = ~estimate.unreliable
    # Rounding, where a Laplace approximation is exact.
    error = (estimate.log_px - exact).abs() - 1e-10
    assert (error < 5 * estimate.std_error)[reliable].all()
    assert error.median() < 0.06
    return reliable.double().mean()


@pytest.mark.parametrize("proposal", PROPOSALS, ids=lambda p: getattr(p, "name", p))
@pytest.mark.parametrize("name", PRIORS)
def test_mixtures_of_normals_are_moved_and_the_estimates_are_right(name, proposal):
    x = 1.5 * torch.randn(20, 2, dtype=torch.float64)
    pair = pair_of(lambda: PRIORS[name](0.0))
    estimate = pvae.log_evidence(
        *pair, x, proposal=proposal, num_samples=64 if isinstance(proposal, Annealed) else 2000, compile=False
    )
    assert check(estimate, PRIORS[name](NOISE).log_prob(x)) > (0.2 if proposal == "refined" else 0.7)


def test_quadrature_and_bidirectional_chains_take_mixtures():
    x = 1.5 * torch.randn(20, 2, dtype=torch.float64)
    pair = pair_of(lambda: PRIORS["same family"](0.0))
    exact = PRIORS["same family"](NOISE).log_prob
    torch.testing.assert_close(gauss_hermite(*pair, x, num_nodes=40).log_px, exact(x), rtol=0, atol=1e-8)
    bracket = bidirectional_monte_carlo(*pair, x, num_samples=32, proposal=Annealed(temperatures=20))
    truth = exact(bracket.data[0])
    # Of each bound the mean error over 20 data of about 0.05 nats each; 5 sigma.
    assert (bracket.lower - truth).mean().abs() < 0.06
    assert (bracket.upper - truth).mean().abs() < 0.06


@pytest.mark.parametrize("proposal", PROPOSALS, ids=lambda p: getattr(p, "name", p))
def test_mixtures_of_positive_latents_are_moved(proposal):
    """A mixture of gamma distributions of a rate: counts are a mixture of negative binomials."""
    shape, rate = torch.tensor([3.0, 5.0], dtype=torch.float64), torch.tensor([2.0, 3.0], dtype=torch.float64)
    weights = torch.tensor([0.4, 0.6], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(weights), dist.Gamma(shape, rate)))
            pyro.sample("x", dist.Poisson(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(2.0 + x, 2.0))

    x = torch.arange(8, dtype=torch.float64)
    counts = dist.NegativeBinomial(shape, logits=-rate.log())
    exact = (counts.log_prob(x[:, None]) + weights.log()).logsumexp(-1)
    number = 64 if isinstance(proposal, Annealed) else 2000
    estimate = pvae.log_evidence(model, guide, x, proposal=proposal, num_samples=number, compile=False)
    assert check(estimate, exact) > 0.7 or proposal == "refined"


def test_components_with_other_supports_and_densities_without_plates_are_refused_by_name():
    x = torch.rand(4, 2)

    def halves():
        return dist.MaskedMixture(torch.tensor([True, False]), dist.Gamma(2.0, 2.0), dist.Normal(0.0, 1.0)).to_event(1)

    with pytest.raises(pvae.ProgramError, match=r"support of site 'z'.*not known to be that of some real numbers"):
        pvae.log_evidence(*pair_of(halves), x, proposal="refined")
    scales = torch.ones(2)
    with pytest.raises(
        pvae.ProgramError, match=r"site 'z' \(GaussianScaleMixture\) gives no density inside of a plate"
    ):
        pvae.log_evidence(*pair_of(lambda: dist.GaussianScaleMixture(scales, scales, scales)), x)


class Silent(dist.Normal):
    """A density of real numbers that does not say what its support is."""

    @property
    def support(self):
        raise NotImplementedError


def test_a_distribution_without_a_support_is_drawn_from_and_not_moved():
    x = torch.randn(4, 2)
    pair = pair_of(lambda: Silent(torch.zeros(2), 1.0, validate_args=False).to_event(1))
    exact = dist.Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(x).sum(-1)
    assert check(pvae.log_evidence(*pair, x), exact) > 0.7
    with pytest.raises(pvae.ProgramError, match="site 'z' does not say what its support is"):
        pvae.log_evidence(*pair, x, proposal="laplace")


@pytest.mark.parametrize("shape, width", [((3,), 1), ((1,), 3)])
def test_data_that_broadcast_against_their_site_are_not_simulated(shape, width):
    """`log_evidence` takes them, as Pyro does; a draw of such a site has another shape than the data."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * torch.ones(width), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True) / 2, 0.7).to_event(1))

    x = torch.randn(5, *shape)
    assert pvae.log_evidence(model, guide, x).log_px.isfinite().all()
    with pytest.raises(pvae.ProgramError, match=rf"a draw of site 'x' has shape \(5, {width}\).*expanding a parameter"):
        bidirectional_monte_carlo(model, guide, x)
