"""Products of matrices against the families' own densities."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist

import pvae
from pvae.evidence.exponential_families import FAMILIES, parameters_of, product
from pvae.evidence.proposals import Prior

E = 5  # entries of a datum


def positive(*shape):
    return torch.rand(*shape).double() + 0.2


def families(k):
    """One distribution of each family over K draws, ``(K, E)``, and how to draw data for it."""
    real = torch.randn(k, E).double()
    return {
        "Bernoulli": dist.Bernoulli(logits=real),
        "Bernoulli, probabilities": dist.Bernoulli(real.sigmoid()),
        "Categorical": dist.Categorical(logits=torch.randn(k, E, 4).double()),
        "Categorical, probabilities": dist.Categorical(torch.rand(k, E, 4).double()),
        "Exponential": dist.Exponential(positive(k, E)),
        "Gamma": dist.Gamma(positive(k, E), positive(k, E)),
        "Normal": dist.Normal(real, positive(k, E)),
        "Normal, far": dist.Normal(100 + real, 0.01 * positive(k, E)),
        "Poisson": dist.Poisson(positive(k, E)),
    }


def test_every_family_is_tested():
    assert {type(d) for d in families(1).values()} == set(FAMILIES)


@pytest.mark.parametrize("name", families(1))
def test_products_are_the_densities(name):
    """For 7 draws and 6 data of two dimensions, each datum drawn at one of the draws."""
    d = families(7)[name]
    x = d.sample()[:6]
    exact = torch.stack([d.log_prob(row).sum(-1) for row in x], 1)
    torch.testing.assert_close(product(type(d), parameters_of(d), x), exact)


def pair_of(name):
    """A model whose likelihood is of a family and depends on the latent, and a guide."""
    weights = torch.randn(2, E, generator=torch.Generator().manual_seed(0))

    def likelihood(z):
        y = z @ weights
        return {
            "Bernoulli": lambda: dist.Bernoulli(logits=y),
            "Categorical": lambda: dist.Categorical(logits=torch.stack([y, -y, y / 2], -1)),
            "Exponential": lambda: dist.Exponential(y.exp()),
            "Gamma": lambda: dist.Gamma(y.exp(), 1.0 + 0 * y),
            "Normal": lambda: dist.Normal(y, 0.8 + 0 * y),
            "Poisson": lambda: dist.Poisson(y.exp()),
        }[name]()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", likelihood(z).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    return model, guide, likelihood(torch.randn(20, 2) / 2).sample()


@pytest.mark.parametrize("name", [family.__name__ for family in FAMILIES])
def test_draws_are_shared_for_every_family(name):
    """The prior's shared draws and draws of each datum's own estimate the same, to 5 sigma of both."""
    model, guide, x = pair_of(name)
    shared, own = (pvae.log_evidence(model, guide, x, num_samples=4000, proposal=p) for p in (Prior(), "guide"))
    assert shared.shared_draws
    error = (shared.std_error.square() + own.std_error.square()).sqrt()
    assert ((shared.log_px - own.log_px).abs() < 5 * error)[~shared.unreliable & ~own.unreliable].all()
    assert (~shared.unreliable).any()
