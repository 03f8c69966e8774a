"""Gaussian and Student-t densities of the latents of each datum, from independent or from Sobol draws."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from pvae.errors import ArgumentError
from pvae.evidence.latents import Latents, LatentSpace

__all__ = ["Elliptical", "SobolNormals"]

_BITS = 30  # of torch's Sobol points


@dataclass(eq=False)
class SobolNormals:
    """Standard normal draws from scrambled Sobol points: they fill space evenly, and each one alone is normal.

    Every replicate has a scrambling of its own, and in it every datum a digital shift of its own, so that data and
    replicates are independent.

    Attributes:
        state: Sobol points of the current replicate, and the data's shifts, ``(N, D)``; none before the first draw.

    Source: Owen, 1995, Randomly Permuted (t, m, s)-Nets and (t, s)-Sequences; L'Ecuyer and Lemieux, 2002, Recent
    Advances in Randomized Quasi-Monte Carlo Methods.
    """

    state: tuple[SobolEngine, Tensor] | None = None

    def restart(self) -> None:
        """Begins a new replicate."""
        self.state = None

    def draw(self, num_samples: int, like: Tensor) -> Tensor:
        """The replicate's next ``(K, N, D)``, for ``like`` of shape ``(N, D)``; randomness is torch's global."""
        if self.state is None:
            if like.shape[1] > SobolEngine.MAXDIM:
                raise ArgumentError(f"Sobol points have up to {SobolEngine.MAXDIM} dimensions, z has {like.shape[1]}.")
            engine = SobolEngine(like.shape[1], scramble=True, seed=int(torch.randint(2**31, ())))
            self.state = engine, torch.randint(2**_BITS, like.shape)
        engine, shifts = self.state
        points = (engine.draw(num_samples, dtype=torch.float64) * 2**_BITS).long()
        shifted = (points[:, None] ^ shifts).to(like.device)
        return torch.special.ndtri((shifted.double() + 0.5) / 2**_BITS).to(like)


@dataclass(eq=False)
class Elliptical:
    """``u = loc + factor e``, with e standard normal or multivariate Student-t, for the latents u of each datum.

    Attributes:
        space: What u are the coordinates of.
        loc: Shape ``(N, D)``.
        factor: Lower triangular, shape ``(N, D, D)``.
        df: Degrees of freedom of the Student-t; ``inf`` for a normal.
        sobol: Where the normal draws come from, if they are not independent.
    """

    space: LatentSpace
    loc: Tensor
    factor: Tensor
    df: float = math.inf
    sobol: SobolNormals | None = None

    def __getitem__(self, rows: Tensor) -> Elliptical:
        """Those of some of the data, by their indices or a mask."""
        return replace(self, loc=self.loc[rows], factor=self.factor[rows])

    def where(self, mask: Tensor, other: Elliptical) -> Elliptical:
        """Those of the data in a mask, and another's of the others."""
        mask = mask.to(self.loc.device)
        loc = torch.where(mask[:, None], self.loc, other.loc)
        return replace(self, loc=loc, factor=torch.where(mask[:, None, None], self.factor, other.factor))

    def draw(self, num_samples: int) -> tuple[Latents, Tensor]:
        """Returns K draws for each datum and the log density of them as latents, shape ``(K, N)``."""
        e = self.draw_standard(num_samples)
        latents, log_det = self.space.unflatten(self.place(e))
        return latents, self.log_standard(e) - self.log_scale - log_det

    def draw_standard(self, num_samples: int) -> Tensor:
        """Returns K draws of e for each datum, shape ``(K, N, D)``."""
        if self.sobol is None:
            normal = torch.randn(num_samples, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device)
        else:
            normal = self.sobol.draw(num_samples, self.loc)
        return self.spread(normal)

    def spread(self, normal: Tensor) -> Tensor:
        """Makes e of standard normal draws, ``(K, N, D)``: the same, or over the root of a chi-squared variable."""
        e, shape = normal, normal.shape
        if math.isfinite(self.df):
            chi2 = torch.distributions.Chi2(torch.tensor(self.df, dtype=torch.float64)).sample(shape[:2])
            e = e / (chi2 / self.df).sqrt().to(e)[..., None]
        return e

    def log_prob(self, latents: Latents) -> Tensor:
        """Returns the log density of latents, shape ``(K, N)``."""
        u, log_det = self.space.flatten(latents)
        return self.log_standard(self.standardize(u)) - self.log_scale - log_det

    def place(self, e: Tensor) -> Tensor:
        """``u = loc + factor e`` for e of shape ``(K, N, D)``."""
        return self.loc + torch.einsum("nij,knj->kni", self.factor, e)

    def pull_back(self, slope: Tensor) -> Tensor:
        """Gradients in u, ``(K, N, D)``, as gradients in e."""
        return torch.einsum("nji,knj->kni", self.factor, slope)

    def standardize(self, u: Tensor) -> Tensor:
        """The inverse of `place`."""
        return torch.linalg.solve_triangular(self.factor, (u - self.loc).permute(1, 2, 0), upper=False).permute(2, 0, 1)

    @property
    def log_scale(self) -> Tensor:
        """``log |factor|``, shape ``(N,)``."""
        return self.factor.diagonal(dim1=-2, dim2=-1).double().log().sum(-1)

    def log_standard(self, e: Tensor) -> Tensor:
        """The log density of e itself, shape ``(K, N)``."""
        d, squares = e.shape[-1], e.square().sum(-1).double()
        if math.isinf(self.df):
            return -squares / 2 - d / 2 * math.log(2 * math.pi)
        constant = math.lgamma((self.df + d) / 2) - math.lgamma(self.df / 2) - d / 2 * math.log(self.df * math.pi)
        return constant - (self.df + d) / 2 * torch.log1p(squares / self.df)

    def standard_slope(self, e: Tensor) -> Tensor:
        """The gradient of `log_standard`, ``(K, N, D)``."""
        if math.isinf(self.df):
            return -e
        return -e * (self.df + e.shape[-1]) / (self.df + e.square().sum(-1, keepdim=True))
