"""Products of matrices against the families' own densities."""

from __future__ import annotations

import dataclasses
from functools import partial

import helpers
import pyro
import pytest
import torch
from pairs import bernoulli, bernoulli_pair
from pyro import distributions as dist

import pvae
from pvae import distributions
from pvae.evidence import proposals
from pvae.evidence.densities import Densities
from pvae.evidence.exponential_families import FAMILIES, is_family, parameters_of, product
from pvae.evidence.proposals import Prior
from pvae.runtime import place_pair

evidence = partial(helpers.evidence, num_samples=1000)

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
        "Categorical, ours": distributions.Categorical(logits=torch.randn(k, E, 4).double()),
        "ContinuousBernoulli": distributions.ContinuousBernoulli(real),
        "ContinuousBernoulli, near and far": distributions.ContinuousBernoulli(real * 10.0 ** torch.arange(-3, 2)),
        "Exponential": dist.Exponential(positive(k, E)),
        "Gamma": dist.Gamma(positive(k, E), positive(k, E)),
        "NegativeBinomial": dist.NegativeBinomial(torch.tensor(1.5).double(), logits=real),
        "NegativeBinomial, ours": distributions.NegativeBinomial(torch.tensor(2.0).double(), logits=real),
        "Normal": dist.Normal(real, positive(k, E)),
        "Normal, far": dist.Normal(100 + real, 0.01 * positive(k, E)),
        "Poisson": dist.Poisson(positive(k, E)),
        "Poisson, ours": distributions.Poisson(positive(k, E)),
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


def pair_of(family):
    """A model whose likelihood is of a family and depends on the latent, and a guide."""
    weights = torch.randn(2, E, generator=torch.Generator().manual_seed(0))

    def likelihood(z):
        y = z @ weights
        classes = torch.stack([y, -y, y / 2], -1)
        return {
            dist.Bernoulli: lambda: dist.Bernoulli(logits=y),
            dist.Categorical: lambda: dist.Categorical(logits=classes),
            distributions.Categorical: lambda: distributions.Categorical(logits=classes),
            distributions.ContinuousBernoulli: lambda: distributions.ContinuousBernoulli(y),
            dist.Exponential: lambda: dist.Exponential(y.exp()),
            dist.Gamma: lambda: dist.Gamma(y.exp(), 1.0 + 0 * y),
            dist.NegativeBinomial: lambda: dist.NegativeBinomial(torch.tensor(1.5), logits=y),
            distributions.NegativeBinomial: lambda: distributions.NegativeBinomial(torch.tensor(1.5), logits=y),
            dist.Normal: lambda: dist.Normal(y, 0.8 + 0 * y),
            dist.Poisson: lambda: dist.Poisson(y.exp()),
            distributions.Poisson: lambda: distributions.Poisson(y.exp()),
        }[family]()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", likelihood(z).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    return model, guide, likelihood(torch.randn(20, 2) / 2).sample()


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_are_shared_for_every_family(family):
    """The prior's shared draws and draws of each datum's own estimate the same, to 5 sigma of both."""
    model, guide, x = pair_of(family)
    shared, own = (pvae.log_evidence(model, guide, x, num_samples=4000, proposal=p) for p in (Prior(), "guide"))
    assert shared.shared_draws
    error = (shared.std_error.square() + own.std_error.square()).sqrt()
    assert ((shared.log_px - own.log_px).abs() < 5 * error)[~shared.unreliable & ~own.unreliable].all()
    assert (~shared.unreliable).any()


def test_a_negative_binomial_is_of_a_family_where_its_total_count_is_one_number():
    logits = torch.randn(3, E)
    assert is_family(dist.NegativeBinomial(torch.tensor(2.0), logits=logits).expand([4, 3, E]))
    assert not is_family(dist.NegativeBinomial(torch.rand(3, 1), logits=logits))
    assert not is_family(dist.NegativeBinomial(torch.rand(E), logits=logits))


# --- the prior's shared draws -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: pvae.VAE.mlp((2, 3), 2, [8]), lambda: pvae.VAE.conv((1, 2, 4), 2, (4,), 8)])
def test_shared_draws_are_weighed_as_the_model_weighs_them(make):
    vae = make()
    x = torch.bernoulli(torch.full((9, *vae.event_shape), 0.5))
    with torch.no_grad():
        pair = Densities.of(place_pair(vae.model, vae.guide, device="cpu"), (x,))
        assert pair.shares_prior
        torch.manual_seed(0)
        shared = pair.draw_shared_prior((x,), 20)
        torch.manual_seed(0)
        z = vae.prior().sample((20, 1))
        exact = torch.stack([vae.decode(z[:, 0]).log_prob(row) for row in x], 1)
    torch.testing.assert_close(shared, exact, rtol=1e-5, atol=1e-5)


def test_shared_and_separate_draws_estimate_the_same(small_vae, bits):
    class Separate(proposals.Prior):
        def shares_draws(self, pair):
            return False

        def on(self, pair, batch):
            separate = dataclasses.replace(pair)
            vars(separate)["shares_prior"] = False
            return super().on(separate, batch)

    shared = evidence(small_vae, bits[:50], num_samples=2000, proposal="prior")
    separate = evidence(small_vae, bits[:50], num_samples=2000, proposal=Separate())
    assert shared.shared_draws
    assert not separate.shared_draws
    error = (shared.std_error.square() + separate.std_error.square()).sqrt()
    assert ((shared.log_px - separate.log_px).abs() < 5 * error).all()
    assert shared.mean_std_error == pytest.approx(shared.std_error.mean().item())
    assert shared.mean_std_error > separate.mean_std_error


class HalfBernoulli(dist.Bernoulli):
    """A family of its own, that only descends from Bernoulli."""

    def log_prob(self, value):
        return super().log_prob(value) / 2


def mixture(loc):
    components = dist.Normal(torch.stack([loc, loc + 1], -1), torch.tensor([0.5, 1.0]))
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components)


@pytest.mark.parametrize(
    "pair",
    [
        bernoulli_pair(prior=lambda x: dist.Normal(x[:, :2], 1.0)),
        bernoulli_pair(logits=lambda z, x: z @ torch.ones(2, 6) + x.mean(1, keepdim=True)),
        bernoulli_pair(logits=lambda z, x: z @ torch.ones(2, 6) + z.new_zeros(len(x), 1)),
        bernoulli_pair(mask=torch.arange(6) % 2 == 0),
        bernoulli_pair(prior=lambda x: mixture(x[:, :2])),
        bernoulli_pair(family=lambda logits: HalfBernoulli(logits=logits)),
    ],
    ids=["prior", "likelihood", "copies", "masked", "mixture", "subclass"],
)
def test_draws_are_shared_only_where_that_is_sound(pair, bits):
    prior, guide = (evidence(pair, bits[:20], num_samples=4000, proposal=p) for p in ("prior", "guide"))
    assert not prior.shared_draws
    error = (prior.std_error.square() + guide.std_error.square()).sqrt()
    assert ((prior.log_px - guide.log_px).abs() < 5 * error + 1e-3)[~prior.unreliable & ~guide.unreliable].all()


@pytest.mark.parametrize("family", [bernoulli, lambda logits: dist.Bernoulli(logits.sigmoid())])
def test_draws_are_shared_for_logits_and_for_probabilities(family, bits):
    pair = bernoulli_pair(family=family)
    shared, guide = (evidence(pair, bits[:20], num_samples=4000, proposal=p) for p in ("prior", "guide"))
    assert shared.shared_draws
    error = (shared.std_error.square() + guide.std_error.square()).sqrt()
    assert ((shared.log_px - guide.log_px).abs() < 5 * error).all()


def test_a_conditional_prior_is_drawn_from_for_each_datum():
    """z | c ~ N(c, 1), x | z ~ Bernoulli: draws of one datum's prior would be wrong for another's; 5 sigma."""
    c = torch.tensor([-3.0, 3.0]).repeat(10)
    pair = bernoulli_pair(
        prior=lambda x: dist.Normal((6 * x[:, :1] - 3).expand(-1, 2), 1.0), logits=lambda z, x: z @ torch.ones(2, 1)
    )
    x = (c > 0).float()[:, None]
    estimate = evidence(pair, x, num_samples=4000, proposal="prior")
    draws = torch.randn(1_000_000) * 2**0.5 + 6
    exact = torch.sigmoid(draws).mean().log()  # by symmetry the same for both kinds of data
    assert ((estimate.log_px - exact).abs() < 5 * estimate.std_error + 1e-3).all()
