"""Pyro pairs that several test files train or evaluate."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn
from torch.distributions import constraints

import pvae
from pvae import likelihoods, networks, posteriors, priors


class ModulePair(nn.Module):
    """A VAE as people write it by hand: ``pyro.module`` and a reshape to a flat image."""

    def __init__(self, event: int = 6, latent: int = 2) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(nn.Linear(event, 8), nn.Softplus(), nn.Linear(8, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 8), nn.Softplus(), nn.Linear(8, event))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(x.shape[0], self.latent), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x.reshape(len(x), -1))

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, raw = self.encoder(x.reshape(len(x), -1)).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, raw.exp()).to_event(1))


class ParamPair:
    """A mean-field pair for the mean of data, with a constrained ``pyro.param``: nothing lives in a module.

    ``beta`` weighs all of its sites, and ``wide`` is another prior.
    """

    def model(self, x, beta=1.0, *, wide=False):
        noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=beta):
            z = pyro.sample("z", dist.Normal(0.0, 2.0 if wide else 1.0))
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    def guide(self, x, beta=1.0, *, wide=False):
        slope = pyro.param("slope", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=beta):
            pyro.sample("z", dist.Normal(slope * x, scale))


class RealPair(nn.Module):
    """Two networks by hand under one name, as many programs have them; the scale of the data is fixed."""

    def __init__(self, event: int = 6, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.decoder, self.encoder = nn.Linear(2, event), nn.Linear(event, 2)

    def model(self, x):
        pyro.module("hand", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("hand", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


def compose_vae(decoder: nn.Module | None = None, encoder: nn.Module | None = None) -> pvae.VAE:
    """A VAE of bits whose networks, from 2 to 6 and from 6 to 4 numbers, can be given."""
    return pvae.VAE(
        priors.StandardNormal(2),
        likelihoods.Bernoulli(decoder or networks.mlp(2, [5], 6)),
        posteriors.DiagonalNormal(encoder or networks.mlp(6, [5], 4)),
    )


class Untouched(ModulePair):
    """A pair that must not run."""

    def model(self, *batch):
        pytest.fail("the model ran")

    def guide(self, *batch):
        pytest.fail("the guide ran")


class Conditional(ModulePair):
    """Bits given a label, which is passed on beside them."""

    def model(self, x, y):
        super().model(x)

    def guide(self, x, y):
        super().guide((x + y[:, None]) / 2)


class Bare:
    """Parameters made by ``pyro.param``, one of them constrained."""

    def model(self, x):
        noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None].expand(-1, 6), noise).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.0)) * x.sum(-1), 1.0))


def bernoulli(logits):
    return dist.Bernoulli(logits=logits)


def bernoulli_pair(
    prior=lambda x: dist.Normal(torch.zeros(2), 1.0), logits=lambda z, x: z @ torch.ones(2, 6), **options
):
    """A pair whose parts may or may not depend on the data, beyond observing them."""

    class Made:
        @staticmethod
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", prior(x).to_event(1))
                fn = options.get("family", bernoulli)(logits(z, x))
                fn = fn.mask(options["mask"]) if "mask" in options else fn
                pyro.sample("x", fn.to_event(1), obs=x)

        @staticmethod
        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    return Made


def shared_mean(x):
    """Data that share a latent, their mean: all have one posterior together."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def shared_mean_guide(x):
    pyro.sample("loc", dist.Normal(0.0, 1.0))


class RowGaussian(nn.Module):
    """A linear-Gaussian pair of latents ``a`` and ``b`` whose guide, ``q(a|x) q(b|a, x)``, can be the exact posterior.

    Each row of the data has parameters of its own, so that one backward pass on equal rows gives independent draws of
    the gradient. ``phi`` are the guide's: mean and scale of a, mean of b, its slope on a, and scale. ``theta`` is the
    model's bias.
    """

    def __init__(self, num_rows: int, offset: float = 0.0) -> None:
        super().__init__()
        self.oracle = pvae.testing.linear_gaussian(latent_dim=2, event_dim=10, noise=1.0, seed=1)
        self.row = self.oracle.sample(1, seed=2)
        exact = self.oracle.posterior(self.row)
        (s1, _), (low, s2) = exact.scale_tril.reshape(2, 2).tolist()
        m1, m2 = exact.loc[0].tolist()
        phi = torch.tensor([m1, s1, m2, low / s1, s2], dtype=torch.float64) + offset
        self.phi = nn.Parameter(phi.repeat(num_rows, 1))
        self.theta = nn.Parameter(self.oracle.bias.repeat(num_rows, 1))
        self.x = self.row.repeat(num_rows, 1)

    def model(self, x):
        pyro.module("theta", self)
        with pyro.plate("data", len(x)):
            zero = x.new_zeros(len(x))
            a, b = pyro.sample("a", dist.Normal(zero, 1.0)), pyro.sample("b", dist.Normal(zero, 1.0))
            mean = torch.stack([a, b], -1) @ self.oracle.weight.T + self.theta
            pyro.sample("x", dist.Normal(mean, self.oracle.noise).to_event(1), obs=x)

    def guide(self, x):
        m1, s1, m2, slope, s2 = self.phi.unbind(-1)
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(m1, s1))
            pyro.sample("b", dist.Normal(m2 + slope * (a - m1), s2))

    def elbo(self, phi, theta, beta=1.0):
        """The ELBO of one row, with a weight on the KL divergence from the prior, in closed form."""
        m1, s1, m2, slope, s2 = phi
        low = torch.stack([torch.stack([s1, torch.zeros_like(s1)]), torch.stack([slope * s1, s2])])
        q = dist.MultivariateNormal(torch.stack([m1, m2]), scale_tril=low)
        prior = dist.MultivariateNormal(torch.zeros_like(q.loc), torch.eye(2).to(q.loc))
        weight, error = self.oracle.weight, self.row[0] - theta - self.oracle.weight @ q.loc
        spread = (weight @ q.covariance_matrix @ weight.T).diagonal()
        likelihood = dist.Normal(torch.zeros_like(error), self.oracle.noise).log_prob(error) - spread / (
            2 * self.oracle.noise**2
        )
        return likelihood.sum() - beta * torch.distributions.kl_divergence(q, prior)
