"""What a proposal is, and the two that every pair has: its guide and its prior."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, field, replace

from torch import Tensor

from pvae.errors import ArgumentError
from pvae.evidence.densities import Batch, Densities
from pvae.evidence.latents import Latents
from pvae.evidence.proposals.gaussians import Elliptical
from pvae.runtime import Program

__all__ = ["Density", "Gaussian", "GaussianDensity", "GivenGaussian", "Guide", "Prior", "Proposal", "Sampler"]


@dataclass(eq=False)
class Sampler(ABC):
    """A proposal on one batch of data.

    Attributes:
        pair: The model and the guide.
        batch: The data.
        diagnostics: What it found out on the way, by name, shape ``(N,)`` each.
        exact: Whether draws that need more than tensor operations get it; otherwise their weights are nan.
    """

    pair: Densities
    batch: Batch
    diagnostics: dict[str, Tensor] = field(default_factory=dict, kw_only=True)
    exact: bool = field(default=True, kw_only=True)

    @abstractmethod
    def log_weights(self, num_samples: int) -> Tensor:
        """Returns ``log w`` of fresh draws, with ``E[w] = p(x)``, nats, shape ``(K, N)``."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the draws, the share of each stratum: a part whose number of draws is not left to chance."""
        return (1.0,)

    def strata(self, num_samples: int) -> tuple[Tensor, ...]:
        """Returns `log_weights` cut into the strata, ``(K_j, N)`` each."""
        return (self.log_weights(num_samples),)

    def restart(self) -> None:  # noqa: B027 (only replicates have something to begin anew)
        """Begins the next replicate."""

    @property
    def signature(self) -> tuple[Hashable, ...]:
        """What draws are a function of beside batch, `tensors` and noise."""
        return (type(self).__name__,)

    @property
    def tensors(self) -> tuple[Tensor, ...] | None:
        """All that it knows of this batch; none if draws are more than a function of batch, these and noise."""
        return None

    def with_tensors(self, batch: Batch, tensors: tuple[Tensor, ...]) -> Sampler:
        """The sampler that has these tensors for another batch, and works by tensor operations alone."""
        return replace(self, batch=batch, exact=False)


class Density(Sampler):
    """A proposal whose density is known: ``w = p(x, z) / q(z)``."""

    @abstractmethod
    def draw(self, num_samples: int) -> tuple[Latents, Tensor]:
        """Returns fresh draws and their log q, shape ``(K, N)``."""

    @abstractmethod
    def log_prob(self, latents: Latents) -> Tensor:
        """Returns log q of any latents, shape ``(K, N)``."""

    def log_weights(self, num_samples: int) -> Tensor:
        """Returns ``log p(x, z) - log q(z)`` of fresh draws, nats, shape ``(K, N)``."""
        latents, log_q = self.draw(num_samples)
        return self.pair.log_pxz(self.batch, latents) - log_q


class Proposal(ABC):
    """Where draws come from, for any batch."""

    prepares = False
    """Whether `on` does work of its own for each datum, so that batches should hold many data."""

    replicates: int | None = None
    """In how many replicates draws must come for their error to be known; none where they are independent."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What to call it in results."""

    @property
    def words(self) -> str:
        """The same for a reader, to go after "samples from"."""
        return f"the proposal '{self.name}'"

    def shares_draws(self, pair: Densities) -> bool:
        """Whether all data of a batch get the same draws, so that a large batch costs little more than a small one."""
        return False

    def count_evaluations(self, num_samples: int) -> int:
        """About how often the model is evaluated for each datum and so many draws; a gradient counts as two more."""
        return num_samples

    @abstractmethod
    def on(self, pair: Densities, batch: Batch) -> Sampler:
        """The proposal for the data of one batch, prepared to draw."""


class Gaussian(Proposal):
    """A proposal that is, or can be seen as, a Gaussian in the latents' unconstrained space."""

    @abstractmethod
    def gaussian(self, pair: Densities, batch: Batch) -> Elliptical:
        """Its density for each datum of a batch."""

    @staticmethod
    def check(argument: str, proposal: object) -> None:
        """Raises an `ArgumentError` that names the argument where what was given as it is no Gaussian proposal."""
        if not isinstance(proposal, Gaussian):
            raise ArgumentError(
                f"{argument} must be a Gaussian proposal, such as Guide(), Refined() or Laplace(); got {proposal!r}."
            )

    def on(self, pair: Densities, batch: Batch) -> Sampler:
        """The proposal for the data of one batch, prepared to draw."""
        return GaussianDensity(pair, batch, self.gaussian(pair, batch))


@dataclass(eq=False)
class GaussianDensity(Density):
    """Draws from a Gaussian or Student-t."""

    elliptical: Elliptical

    def draw(self, num_samples: int) -> tuple[Latents, Tensor]:
        """Returns fresh draws and their log q, shape ``(K, N)``."""
        return self.elliptical.draw(num_samples)

    def log_prob(self, latents: Latents) -> Tensor:
        """Returns log q of any latents, shape ``(K, N)``."""
        return self.elliptical.log_prob(latents)

    def restart(self) -> None:
        """Begins the next replicate."""
        if self.elliptical.sobol is not None:
            self.elliptical.sobol.restart()

    @property
    def signature(self) -> tuple[Hashable, ...]:
        """With its degrees of freedom."""
        return (*super().signature, self.elliptical.df)

    @property
    def tensors(self) -> tuple[Tensor, ...] | None:
        """Location and factor for each datum; none with Sobol points, which have a state of their own."""
        return None if self.elliptical.sobol is not None else (self.elliptical.loc, self.elliptical.factor)

    def with_tensors(self, batch: Batch, tensors: tuple[Tensor, ...]) -> Sampler:
        """The sampler with another location and factor for each datum."""
        loc, factor = tensors
        elliptical = replace(self.elliptical, loc=loc, factor=factor)
        return replace(self, batch=batch, elliptical=elliptical, exact=False)


@dataclass(frozen=True)
class GivenGaussian(Gaussian):
    """A Gaussian that is there already, for the data of one batch: what `Gaussian.gaussian` gave for them.

    ``Annealed(GivenGaussian(fitted[rows])).on(pair, rows of the batch)`` anneals some of the data from it.

    Args:
        elliptical: Of N data; no other batch can have it.
    """

    elliptical: Elliptical

    @property
    def name(self) -> str:
        """What to call it in results."""
        return "given"

    @property
    def words(self) -> str:
        """The same for a reader."""
        return "a given Gaussian"

    def gaussian(self, pair: Densities, batch: Batch) -> Elliptical:
        """What was given."""
        if len(batch[0]) != len(self.elliptical.loc):
            raise ArgumentError(
                f"elliptical is of {len(self.elliptical.loc)} data, and the batch has {len(batch[0])}: take its rows "
                "that are of these data."
            )
        return self.elliptical


@dataclass(frozen=True)
class Guide(Gaussian):
    """Draws from the guide, ``z ~ q(z|x)``: few draws are wasted where the guide is near the posterior.

    Args:
        program: Another Pyro guide with the model's latent sites; the pair's own if left out.
    """

    program: Program | None = None

    @property
    def name(self) -> str:
        """What to call it in results."""
        return "guide" if self.program is None else getattr(self.program, "__name__", type(self.program).__name__)

    @property
    def words(self) -> str:
        """The same for a reader."""
        return "the guide" if self.program is None else f"the guide '{self.name}'"

    def on(self, pair: Densities, batch: Batch) -> Sampler:
        """The guide as it is."""
        return GuideDensity(pair if self.program is None else pair.with_guide(self.program), batch)

    def gaussian(self, pair: Densities, batch: Batch) -> Elliptical:
        """The Gaussian with the guide's mean and covariance, which is the guide itself where that is normal."""
        pair = pair if self.program is None else pair.with_guide(self.program)
        return Elliptical(pair.space, *pair.guide_moments(batch))


class GuideDensity(Density):
    """Draws from a guide."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """None are needed: the guide takes the batch."""
        return ()

    def draw(self, num_samples: int) -> tuple[Latents, Tensor]:
        """Returns fresh draws and their log q, shape ``(K, N)``."""
        return self.pair.draw_guide(self.batch, num_samples)

    def log_prob(self, latents: Latents) -> Tensor:
        """Returns log q of any latents, shape ``(K, N)``."""
        return self.pair.log_qz(self.batch, latents)


@dataclass(frozen=True)
class Prior(Proposal):
    """Draws from the prior, ``z ~ p(z)``, so that the weight is p(x|z): almost all draws explain x badly."""

    @property
    def name(self) -> str:
        """What to call it in results."""
        return "prior"

    @property
    def words(self) -> str:
        """The same for a reader."""
        return "the prior"

    def shares_draws(self, pair: Densities) -> bool:
        """Yes where p(x|z) is of a known exponential family and depends on the latents alone: one decoding for all."""
        return pair.shares_prior

    def on(self, pair: Densities, batch: Batch) -> Sampler:
        """The prior, shared by the batch's data where that is sound."""
        pair.check_prior()
        return PriorDensity(pair, batch)


class PriorDensity(Density):
    """Draws from a prior."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """None are needed: the model takes the batch."""
        return ()

    def draw(self, num_samples: int) -> tuple[Latents, Tensor]:
        """Returns fresh draws and their log p(z), shape ``(K, N)``."""
        latents = self.pair.draw_prior(self.batch, num_samples)
        return latents, self.pair.densities(self.batch, latents)[0]

    def log_prob(self, latents: Latents) -> Tensor:
        """Returns log p(z) of any latents, shape ``(K, N)``."""
        return self.pair.densities(self.batch, latents)[0]

    def log_weights(self, num_samples: int) -> Tensor:
        """Returns log p(x|z) of fresh draws, nats, shape ``(K, N)``."""
        if self.pair.shares_prior:
            return self.pair.draw_shared_prior(self.batch, num_samples, exact=self.exact)
        latents = self.pair.draw_prior(self.batch, num_samples)
        return self.pair.densities(self.batch, latents)[1]
