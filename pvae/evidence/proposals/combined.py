"""Proposals made of others, and all of them by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pvae.errors import ArgumentError, ProgramError, one_of, positive_int, real_number
from pvae.evidence.densities import Batch, Densities
from pvae.evidence.latents import Latents
from pvae.evidence.proposals.annealing import Annealed
from pvae.evidence.proposals.base import (
    Density,
    Gaussian,
    GaussianDensity,
    Guide,
    GuideDensity,
    Prior,
    Proposal,
    Sampler,
)
from pvae.evidence.proposals.gaussians import Elliptical, SobolNormals
from pvae.evidence.proposals.local import Laplace, Refined

__all__ = ["FIT_INFLATION", "WIDE_START", "Defensive", "Inflated", "Sobol", "StudentT", "resolve"]

FIT_INFLATION = 1.05  # a Gaussian with the highest ELBO is too narrow


class _MadeOf(Proposal):
    """A proposal made of another, its ``base``: a `Proposal`, of a narrower kind where a subclass says so."""

    base: Any

    @property
    def prepares(self) -> bool:  # type: ignore[override]
        """As the base does."""
        return self.base.prepares

    @property
    def replicates(self) -> int | None:  # type: ignore[override]
        """As the base has."""
        return self.base.replicates

    def count_evaluations(self, num_samples: int) -> int:
        """As often as the base."""
        return self.base.count_evaluations(num_samples)


class _Around(_MadeOf, Gaussian):  # type: ignore[misc]
    """A Gaussian proposal made of another."""

    base: Gaussian

    def __post_init__(self) -> None:
        Gaussian.check("base", self.base)


@dataclass(frozen=True)
class Inflated(_Around):
    """A Gaussian proposal made wider, so that its weights have lighter tails.

    Args:
        base: What to widen; a guide is seen through its mean and covariance.
        scale: By what factor, in standard deviations.
    """

    base: Gaussian = field(default_factory=Guide)
    scale: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        real_number("scale", self.scale, above=0)

    @property
    def name(self) -> str:
        """What to call it in results."""
        return f"{self.base.name}, {self.scale:g} times as wide"

    @property
    def words(self) -> str:
        """The same for a reader."""
        return f"{self.base.words}, made {self.scale:g} times as wide"

    def gaussian(self, pair: Densities, batch: Batch) -> Elliptical:
        """The base's density, widened."""
        inner = self.base.gaussian(pair, batch)
        return replace(inner, factor=self.scale * inner.factor)


# Where a posterior has modes, a fit that begins narrow may stay in a lower one; one that begins wide sees further.
WIDE_START = Inflated(Guide(), 3.0)


@dataclass(frozen=True)
class StudentT(_Around):
    """A Gaussian proposal's mean and scale in a multivariate Student-t, whose tails are heavier than a posterior's.

    Args:
        base: A guide is seen through its mean and covariance.
        df: Degrees of freedom.
    """

    base: Gaussian = field(default_factory=Guide)
    df: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        real_number("df", self.df, above=0)

    @property
    def name(self) -> str:
        """What to call it in results."""
        return f"{self.base.name}, Student-t {self.df:g}"

    @property
    def words(self) -> str:
        """The same for a reader."""
        return f"{self.base.words}, with the tails of a Student-t of {self.df:g} degrees of freedom"

    def gaussian(self, pair: Densities, batch: Batch) -> Elliptical:
        """The base's density with heavier tails."""
        return replace(self.base.gaussian(pair, batch), df=float(self.df))


@dataclass(frozen=True)
class Sobol(_Around):
    """A Gaussian proposal with scrambled Sobol points in place of independent draws (RQMC).

    The draws come in independent replicates, from whose scatter the standard error is taken; ESS and k-hat look at the
    weights as before. Of a Student-t only the directions are evenly spread, not the radii.

    Args:
        base: A guide is seen through its mean and covariance.
        replicates: How many; ``num_samples`` must be a multiple, and is best a power of 2 times it.
    """

    base: Gaussian = field(default_factory=Guide)
    replicates: int = 10  # type: ignore[override]

    def __post_init__(self) -> None:
        super().__post_init__()
        if positive_int("replicates", self.replicates) < 2:
            raise ArgumentError("replicates must be at least 2: the error is taken from their scatter.")

    @property
    def name(self) -> str:
        """What to call it in results."""
        return f"{self.base.name}, Sobol"

    @property
    def words(self) -> str:
        """The same for a reader."""
        return f"{self.base.words}, by Sobol points in {self.replicates} replicates"

    def gaussian(self, pair: Densities, batch: Batch) -> Elliptical:
        """The base's density, with Sobol points below it."""
        return replace(self.base.gaussian(pair, batch), sobol=SobolNormals())


@dataclass(frozen=True)
class Defensive(_MadeOf):
    """A mixture of any proposal with a share of the prior: weights stay below ``p(x|z) / share``.

    Weights use the mixture's density (the balance heuristic), so that one component covers where the other is blind.

    Args:
        base: The proposal to defend. Of a guide that makes its latents of other variables, as Pyro's automatic guides
            do, the Gaussian with its mean and covariance.
        share: The share of draws from the prior, between 0 and 1.

    Source: Hesterberg, 1995, Weighted Average Importance Sampling and Defensive Mixture Distributions; Owen and Zhou,
    2000, Safe and Effective Importance Sampling.
    """

    base: Proposal = field(default_factory=Guide)
    share: float = 0.1

    def __post_init__(self) -> None:
        real_number("share", self.share, above=0, below=1)
        if not isinstance(self.base, Proposal):
            raise ArgumentError(f"base must be a proposal with a density, got {self.base!r}.")

    @property
    def name(self) -> str:
        """What to call it in results."""
        return f"{self.base.name} and {self.share:.0%} prior"

    @property
    def words(self) -> str:
        """The same for a reader."""
        return f"a mixture: {1 - self.share:.3g} of them from {self.base.words}, {self.share:.3g} from the prior"

    def on(self, pair: Densities, batch: Batch) -> Sampler:
        """The mixture for the data of one batch."""
        pair.check_prior()
        base = self.base.on(pair, batch)
        if isinstance(base, GuideDensity) and not base.pair.scores_guide and isinstance(self.base, Gaussian):
            if refusal := pair.space.refusal:
                raise ProgramError(
                    f"the guide makes {sorted(base.pair.runner.made)} of other variables, so that its density at draws "
                    f"from the prior is not known, and no Gaussian can stand in its place: {refusal}. Use "
                    "proposal='guide' or 'prior'."
                )
            base = GaussianDensity(pair, batch, self.base.gaussian(pair, batch))  # like the guide, with a density
        if not isinstance(base, Density):
            raise ArgumentError(f"base must be a proposal with a density, got {self.base!r}.")
        return _Mixture(pair, batch, base, self.share, float(torch.rand(())), diagnostics=base.diagnostics)


@dataclass(eq=False)
class _Mixture(Density):
    """Draws from a base and, at regular places in the row of draws, from the prior."""

    base: Density
    share: float
    place: float  # uniform at first, so that each draw is one of the mixture
    from_prior: int = 0  # of the last draws, how many came from the prior: they come last

    @property
    def shares(self) -> tuple[float, ...]:
        return 1 - self.share, self.share

    def strata(self, num_samples: int) -> tuple[Tensor, ...]:
        log_weights = self.log_weights(num_samples)
        return log_weights.split([num_samples - self.from_prior, self.from_prior])

    def draw(self, num_samples: int) -> tuple[Latents, Tensor]:
        self.place += self.share * num_samples
        self.from_prior = from_prior = math.floor(self.place)
        self.place -= from_prior
        parts, log_base = [], []
        if num_samples > from_prior:
            latents, log_q = self.base.draw(num_samples - from_prior)
            parts.append(latents)
            log_base.append(log_q)
        if from_prior:
            latents = self.pair.draw_prior(self.batch, from_prior)
            parts.append(latents)
            log_base.append(self.base.log_prob(latents))
        values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
        together = Latents(values, num_samples)
        return together, self._mix(torch.cat(log_base), together)

    def log_prob(self, latents: Latents) -> Tensor:
        return self._mix(self.base.log_prob(latents), latents)

    def restart(self) -> None:
        self.base.restart()

    def _mix(self, log_base: Tensor, latents: Latents) -> Tensor:
        log_pz, _ = self.pair.densities(self.batch, latents)
        return torch.logaddexp(math.log1p(-self.share) + log_base, math.log(self.share) + log_pz)


_NAMED: dict[str, Callable[[], Proposal]] = {
    "auto": Guide,  # with which it begins
    "guide": Guide,
    "prior": Prior,
    "refined": Refined,
    "laplace": Laplace,
    "student-t": StudentT,
    "defensive": Defensive,
    "ais": Annealed,
}


def resolve(proposal: object) -> Proposal:
    """The proposal itself, the one with that name, or a Pyro guide as one."""
    if isinstance(proposal, str):
        return _NAMED[one_of("proposal", proposal, _NAMED)]()
    if isinstance(proposal, Proposal):
        return proposal
    if isinstance(proposal, type):
        raise ArgumentError(f"proposal must be an object, got the class {proposal.__name__}: make one of it.")
    if callable(proposal):
        return Guide(proposal)
    raise ArgumentError(
        f"proposal must be one of {', '.join(map(repr, _NAMED))}, a pvae.evidence.proposals.Proposal or a Pyro guide; "
        f"got {proposal!r}."
    )
