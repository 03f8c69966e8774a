"""Draws with their weights, of one batch after another, joined for all data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pvae.errors import ArgumentError
from pvae.evidence.densities import Batch, Densities
from pvae.evidence.posterior import WeightedDraws
from pvae.evidence.proposals import Density, Guide, Proposal
from pvae.evidence.site_values import SiteValues
from pvae.evidence.weights import WeightSums

__all__ = ["Drawer", "Part", "cat_parts", "to_cpu"]

Part = dict[str, Tensor]


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
