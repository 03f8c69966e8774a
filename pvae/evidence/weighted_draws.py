"""`weighted_draws`: latents drawn and weighed, and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pvae.data import Data
from pvae.errors import ArgumentError
from pvae.evidence.batchwise import map_batches
from pvae.evidence.posterior import WeightedDraws
from pvae.evidence.proposals import Density, Guide, Proposal, resolve
from pvae.evidence.site_values import Batch, Densities, SiteValues
from pvae.evidence.weights import WeightSums
from pvae.runtime import Program, resolve_seed

__all__ = ["Drawer", "Part", "cat_parts", "to_cpu", "weighted_draws"]

Part = dict[str, Tensor]


def weighted_draws(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int = 1000,
    proposal: str | Proposal | Program = "guide",
    seed: int | None = 0,
    device: str | torch.device = "auto",
    chunk_size: int | None = None,
) -> WeightedDraws:
    """Draws latents from a proposal, ``z_k ~ q(z)``, and keeps them with their weights ``p(x, z_k) / q(z_k)``.

    The pair can be any Pyro programs, as for `pvae.log_evidence`: with several sites, latents outside of the data
    plate, or Pyro's automatic guides. Latents come in their own space, as the model sees them. Discrete ones that are
    marked for enumeration are summed out of the weights, and drawn from ``p(d | z, x)``. Nothing is trained, and the
    caller's state is left as it was.

    Args:
        model: The generative program.
        guide: The recognition program.
        data: As for `pvae.log_evidence`.
        num_samples: ``K``, draws for each datum. All are kept in memory.
        proposal: As for `pvae.log_evidence`; one that has a density: neither ``"auto"`` nor ``"ais"``.
        seed: Same seed, same machine, same versions, same chunk size: same bits. ``None`` for a fresh one. From the
            guide, these are the draws of `pvae.log_weights`.
        device: As for `pvae.log_evidence`.
        chunk_size: As for `pvae.log_evidence`.

    Returns:
        `WeightedDraws`.

    Raises:
        PVAEError: As by `pvae.log_evidence`; and an `ArgumentError` where the proposal keeps no draws with a density.

    Example:
        >>> import pvae
        >>> pair = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5, guide_scale=1.2)
        >>> x = pair.sample(20, seed=0)
        >>> draws = pvae.evidence.weighted_draws(pair.model, pair.guide, x, num_samples=500)
        >>> draws.latents["z"].shape
        torch.Size([500, 20, 2])
    """
    drawer = Drawer(resolve(proposal), seed=resolve_seed(seed))

    def draw(densities: Densities, batch: Batch, spans: list[int]) -> tuple[Part, ...]:
        return drawer.draw(drawer.look_at(densities), batch, spans)

    options = {"num_samples": num_samples, "proposal": proposal, "device": device, "chunk_size": chunk_size}
    parts = map_batches(draw, model, guide, data, seed=drawer.seed, **options)
    return drawer.gather(cat_parts(parts, 1))


@dataclass(eq=False)
class Drawer:
    """Weighted draws from a proposal, for one batch of `map_batches` after another.

    Attributes:
        proposal: Where draws come from.
        seed: Of all of them.
    """

    proposal: Proposal
    seed: int
    _sites: SiteValues | None = field(default=None, repr=False)

    def look_at(self, densities: Densities) -> SiteValues:
        """A pair's sites, which are the same for all batches."""
        if self._sites is None or self._sites.densities is not densities:
            self._sites = SiteValues(densities)
        return self._sites

    @property
    def sites(self) -> SiteValues:
        """Those that were looked at last."""
        if self._sites is None:
            raise RuntimeError("no batch has been drawn for")
        return self._sites

    def draw(self, sites: SiteValues, batch: Batch, spans: Sequence[int]) -> tuple[Part, Part, Part]:
        """K weighted draws for a batch, as `SiteValues.draw` gives them, on the CPU; log-weights by the name ``""``.

        Raises:
            ArgumentError: The proposal has no density.
            NumericalError: A log-weight is nan or ``+inf``.
        """
        proposal = self.proposal if sites.densities.has_latents else Guide()
        sampler = proposal.on(sites.densities, batch)
        if not isinstance(sampler, Density):
            raise ArgumentError(
                f"proposal={proposal.name!r} keeps no draws that have a density: name one that does, such as 'guide', "
                "'refined' or 'defensive'."
            )
        replicates, parts = proposal.replicates or 1, []
        each = sum(spans) // replicates
        for _ in range(replicates):
            sampler.restart()
            for done in range(0, each, spans[0]):
                log_weights, latents, log_likelihood = sites.draw(sampler, min(spans[0], each - done))
                parts.append(to_cpu({"": log_weights}, latents, log_likelihood))
        weights, latents, likelihoods = cat_parts(parts, 0)
        WeightSums.of(weights[""])  # raises where one is no number
        return weights, latents, likelihoods

    def gather(self, parts: Sequence[Part]) -> WeightedDraws:
        """The result, of what `draw` gave for all data."""
        weights, latents, likelihoods = parts
        return WeightedDraws(
            weights[""],
            self.sites.trim(latents),
            likelihoods,
            {name: self.sites.plates[name] for name in latents},
            self.sites.summed,
            self.proposal.name,
            self.seed,
            self.sites.densities.num_together,
        )


def to_cpu(*parts: Mapping[str, Tensor]) -> tuple[Part, ...]:
    """Copies there."""
    return tuple({name: value.detach().cpu() for name, value in part.items()} for part in parts)


def cat_parts(parts: Sequence[tuple[Part, ...]], dim: int) -> tuple[Part, ...]:
    """Dictionaries of tensors, joined along a dimension."""
    whole = zip(*parts, strict=True)
    return tuple({name: torch.cat([one[name] for one in same], dim) for name in same[0]} for same in whole)
