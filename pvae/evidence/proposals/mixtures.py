"""Mixtures of Gaussian proposals: where one component is blind, another sees."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pvae.errors import ArgumentError
from pvae.evidence.densities import Batch, Densities
from pvae.evidence.latents import Latents
from pvae.evidence.proposals.base import Density, Gaussian, Proposal, Sampler
from pvae.evidence.proposals.gaussians import Elliptical

__all__ = ["Mixture", "MixtureDensity"]


@dataclass(frozen=True)
class Mixture(Proposal):
    """A mixture of Gaussian proposals for each datum, ``q(z) = sum_j share_j q_j(z)``.

    Weights use the density of the whole mixture (the balance heuristic), so that none is above a component's own weight
    over its share: whatever one component covers, the mixture covers.

    Args:
        components: Gaussian proposals; a guide is seen through its mean and covariance.
        shares: Of the draws, positive, with sum 1.

    Source: Veach and Guibas, 1995, Optimally Combining Sampling Techniques for Monte Carlo Rendering; Owen and Zhou,
    2000, Safe and Effective Importance Sampling.
    """

    components: tuple[Gaussian, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.components) != len(self.shares) or not self.components:
            raise ArgumentError(f"shares: {len(self.components)} components need as many, got {self.shares!r}.")
        for component in self.components:
            Gaussian.check("components", component)
        if min(self.shares) <= 0 or not math.isclose(sum(self.shares), 1.0, abs_tol=1e-6):
            raise ArgumentError(f"shares must be positive and sum to 1, got {self.shares!r}.")

    @property
    def prepares(self) -> bool:  # type: ignore[override]
        """Where a component does."""
        return any(component.prepares for component in self.components)

    @property
    def name(self) -> str:
        """What to call it in results."""
        return ", ".join(f"{s:.0%} {c.name}" for s, c in zip(self.shares, self.components, strict=True))

    @property
    def words(self) -> str:
        """The same for a reader."""
        return "a mixture: " + ", ".join(
            f"{s:.3g} of them from {c.words}" for s, c in zip(self.shares, self.components, strict=True)
        )

    def on(self, pair: Densities, batch: Batch) -> Sampler:
        """The mixture for the data of one batch."""
        gaussians = [replace(one.gaussian(pair, batch), sobol=None) for one in self.components]
        inverses = tuple(_invert(one.factor) for one in gaussians)
        return MixtureDensity(pair, batch, tuple(gaussians), inverses, self.shares)


@dataclass(eq=False)
class MixtureDensity(Density):
    """Draws from a mixture, each from a component by chance.

    Attributes:
        components: Gaussian or Student-t densities.
        inverses: Of their factors, shape ``(N, D, D)`` each.
        weights: Their shares.
    """

    components: tuple[Elliptical, ...]
    inverses: tuple[Tensor, ...]
    weights: tuple[float, ...]

    def draw(self, num_samples: int) -> tuple[Latents, Tensor]:
        """Returns fresh draws and their log q, shape ``(K, N)``."""
        first, *others = self.components
        # Only one component's place of each draw is taken, so that all may place the same normal numbers.
        normal = torch.randn(num_samples, *first.loc.shape, dtype=first.loc.dtype, device=first.loc.device)
        u = first.place(first.spread(normal))
        # Uniform numbers in [0, 1): above the first share the second component draws, and so on.
        chosen, share = torch.rand(u.shape[:2], dtype=u.dtype, device=u.device)[..., None], 0.0
        for one, weight in zip(others, self.weights, strict=False):
            share += weight
            u = torch.where(chosen < share, u, one.place(one.spread(normal)))
        latents, log_det = self.pair.space.unflatten(u)
        return latents, self._log_density(u) - log_det

    def log_prob(self, latents: Latents) -> Tensor:
        """Returns log q of any latents, shape ``(K, N)``."""
        u, log_det = self.pair.space.flatten(latents)
        return self._log_density(u) - log_det

    def _log_density(self, u: Tensor) -> Tensor:
        parts = [
            math.log(weight) + one.log_standard(torch.einsum("nij,knj->kni", inverse, u - one.loc)) - one.log_scale
            for one, inverse, weight in zip(self.components, self.inverses, self.weights, strict=True)
        ]
        return torch.stack(parts).logsumexp(0)

    @property
    def signature(self) -> tuple[Hashable, ...]:
        """What its program depends on beside tensors."""
        return (*super().signature, self.weights, *(one.df for one in self.components))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Location, factor and its inverse for each datum and component."""
        return tuple(
            t for one, inv in zip(self.components, self.inverses, strict=True) for t in (one.loc, one.factor, inv)
        )

    def with_tensors(self, batch: Batch, tensors: tuple[Tensor, ...]) -> Sampler:
        """The sampler with other components for each datum."""
        locs, factors, inverses = tensors[::3], tensors[1::3], tensors[2::3]
        components = tuple(
            replace(one, loc=loc, factor=factor)
            for one, loc, factor in zip(self.components, locs, factors, strict=True)
        )
        return replace(self, batch=batch, components=components, inverses=inverses, exact=False)


def _invert(factor: Tensor) -> Tensor:
    """The inverse of lower triangular matrices."""
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
