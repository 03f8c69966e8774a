"""Oracles: Pyro pairs whose log p(x) and posterior are known exactly.

Estimators are judged by it: those of pvae in its tests, and yours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from pvae.errors import positive_int, real_number

__all__ = ["LinearGaussian", "TwoModes", "linear_gaussian", "two_modes"]


@dataclass(frozen=True)
class LinearGaussian:
    """``z ~ Normal(0, I)``, ``x ~ Normal(W z + b, noise^2 I)``: probabilistic PCA, with everything in closed form.

    Attributes:
        weight: ``W``, shape ``(E, D)``.
        bias: ``b``, shape ``(E,)``.
        noise: Standard deviation of x around its mean.
        guide_shift: How far the guide's mean lies from the posterior's, in the posterior's standard deviations along
            each of its axes.
        guide_scale: How much wider than the posterior the guide is, in standard deviations.

    Source: Tipping and Bishop, 1999, Probabilistic Principal Component Analysis.
    """

    weight: Tensor
    bias: Tensor
    noise: float
    guide_shift: float = 0.0
    guide_scale: float = 1.0

    def model(self, x: Tensor) -> None:
        """The generative program, for ``x`` of shape ``(N, E)``: plate ``"data"``, sites ``"z"`` and ``"x"``."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.weight.new_zeros(self.weight.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T + self.bias, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The exact posterior, moved by `guide_shift` and widened by `guide_scale`."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.proposal(x))

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """Returns p(z|x), batch shape ``(N,)`` and event shape ``(D,)``."""
        precision = torch.eye(self.weight.shape[1]).to(self.weight) + self.weight.T @ self.weight / self.noise**2
        factor = torch.linalg.cholesky(torch.linalg.inv(precision))
        mean = (x - self.bias) @ self.weight @ (factor @ factor.T) / self.noise**2
        return dist.MultivariateNormal(mean, scale_tril=factor)

    def proposal(self, x: Tensor) -> dist.MultivariateNormal:
        """Returns the guide's q(z|x), batch shape ``(N,)`` and event shape ``(D,)``."""
        exact = self.posterior(x)
        factor = exact.scale_tril
        return dist.MultivariateNormal(
            exact.loc + self.guide_shift * factor.sum(-1), scale_tril=self.guide_scale * factor
        )

    def log_px(self, x: Tensor) -> Tensor:
        """Returns log p(x), nats per datum, shape ``(N,)``."""
        return self._marginal().log_prob(x)

    def elbo(self, x: Tensor) -> Tensor:
        """Returns the guide's exact ELBO, ``log p(x) - KL(q(z|x) || p(z|x))``, nats per datum, shape ``(N,)``."""
        return self.log_px(x) - torch.distributions.kl_divergence(self.proposal(x), self.posterior(x))

    def sample(self, num_samples: int, *, seed: int = 0) -> Tensor:
        """Draws data from p(x), shape ``(num_samples, E)``."""
        noise = torch.randn(
            num_samples, len(self.bias), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        return self.bias + noise.to(self.weight) @ self._marginal().scale_tril.T

    def _marginal(self) -> dist.MultivariateNormal:
        covariance = self.weight @ self.weight.T + self.noise**2 * torch.eye(len(self.bias)).to(self.weight)
        return dist.MultivariateNormal(self.bias, covariance)


def linear_gaussian(
    latent_dim: int = 2,
    event_dim: int = 5,
    *,
    noise: float = 0.5,
    guide_shift: float = 0.0,
    guide_scale: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> LinearGaussian:
    """Makes a `LinearGaussian` pair with random weights of size ``1 / sqrt(D)`` and a random bias.

    Args:
        latent_dim: ``D``.
        event_dim: ``E``, the width of x.
        noise: Standard deviation of x around its mean.
        guide_shift: 0 for the exact posterior mean; see `LinearGaussian`.
        guide_scale: 1 for the exact posterior scale; see `LinearGaussian`.
        seed: Of the weights.
        dtype: Of everything.

    Example:
        >>> import pvae
        >>> pair = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5)
        >>> x = pair.sample(3, seed=0)
        >>> x.shape, pair.log_px(x).shape
        (torch.Size([3, 5]), torch.Size([3]))
    """
    latent_dim, event_dim = positive_int("latent_dim", latent_dim), positive_int("event_dim", event_dim)
    for name, value in (("noise", noise), ("guide_scale", guide_scale)):
        real_number(name, value, above=0)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(event_dim, latent_dim, generator=generator, dtype=torch.float64) / latent_dim**0.5
    bias = torch.randn(event_dim, generator=generator, dtype=torch.float64)
    return LinearGaussian(weight.to(dtype), bias.to(dtype), noise, guide_shift, guide_scale)


@dataclass(frozen=True)
class TwoModes:
    """``z ~ Normal(0, I)``, ``x ~ Normal(s W z, noise^2 I)`` with a sign s that is -1 or 1, with probability 1/2.

    The sign is summed out in the model, so that z and -z explain x equally well: the posterior has two modes, as far
    from each other as the data are from 0. The guide knows one of them. Its weights look perfect there, and miss
    ``log 2`` of log p(x).

    Attributes:
        half: The pair without the sign, which has the same p(x), and whose posterior is one of the two modes.
    """

    half: LinearGaussian

    def model(self, x: Tensor) -> None:
        """The generative program, for ``x`` of shape ``(N, E)``: plate ``"data"``, sites ``"z"`` and ``"x"``."""
        weight = self.half.weight
        signs = torch.tensor([1.0, -1.0]).to(weight)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(weight.new_zeros(weight.shape[1]), 1.0).to_event(1))
            means = (z @ weight.T)[..., None, :] * signs[:, None]
            components = dist.Normal(means, self.half.noise).to_event(1)
            pyro.sample(
                "x", dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros_like(signs)), components), obs=x
            )

    def guide(self, x: Tensor) -> None:
        """One of the posterior's two modes, exactly."""
        self.half.guide(x)

    def posterior(self, x: Tensor) -> dist.MixtureSameFamily:
        """Returns p(z|x), batch shape ``(N,)`` and event shape ``(D,)``."""
        one = self.half.posterior(x)
        loc = torch.stack([one.loc, -one.loc], -2)
        both = dist.MultivariateNormal(loc, scale_tril=one.scale_tril[..., None, :, :])
        return dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(loc.shape[:-1]).to(loc)), both)

    def log_px(self, x: Tensor) -> Tensor:
        """Returns log p(x), nats per datum, shape ``(N,)``."""
        return self.half.log_px(x)

    def sample(self, num_samples: int, *, seed: int = 0) -> Tensor:
        """Draws data from p(x), shape ``(num_samples, E)``."""
        return self.half.sample(num_samples, seed=seed)


def two_modes(
    latent_dim: int = 2,
    event_dim: int = 5,
    *,
    noise: float = 0.3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> TwoModes:
    """Makes a `TwoModes` pair with random weights, as `linear_gaussian` does, and no bias.

    Args:
        latent_dim: ``D``.
        event_dim: ``E``, the width of x.
        noise: Standard deviation of x around its mean; the smaller, the farther apart are the modes.
        seed: Of the weights.
        dtype: Of everything.
    """
    half = linear_gaussian(latent_dim, event_dim, noise=noise, seed=seed, dtype=dtype)
    return TwoModes(replace(half, bias=torch.zeros_like(half.bias)))
