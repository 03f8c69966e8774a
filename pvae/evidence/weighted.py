"""Draws that are kept with their densities, and other work on batches for which sums of weights do not suffice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from pvae.data import Batches, Data
from pvae.errors import ArgumentError
from pvae.evidence.densities import Batch, Densities
from pvae.evidence.evaluation import name_batch, open_evaluation, place_evaluation
from pvae.evidence.planning import Settings, chunk_shape, halve_chunks_until_they_fit
from pvae.evidence.proposals.base import Density, Guide, Proposal
from pvae.runtime import Pair, Program, in_turn, resolve_seed

__all__ = ["WeightedDraws", "map_batches", "weighted_draws"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False, repr=False)
class WeightedDraws:
    """K draws of every latent of N data, with their densities. All tensors are on the CPU, densities in float64.

    Attributes:
        latents: By site, each of shape ``(K, N, *plates, *event)``.
        log_pz: log p(z), nats, shape ``(K, N)``.
        log_px_given_z: log p(x|z), nats, shape ``(K, N)``.
        log_q: Of the proposal, log q(z|x), nats, shape ``(K, N)``.
        proposal: Where the draws came from.
        seed: The seed used.
        num_together: How many data have one log p(data) together, so that N is 1; 0 where each datum has its own.
    """

    latents: Mapping[str, Tensor]
    log_pz: Tensor
    log_px_given_z: Tensor
    log_q: Tensor
    proposal: str
    seed: int
    num_together: int = 0

    @property
    def log_weights(self) -> Tensor:
        """``log p(x, z) - log q(z|x)``, nats, shape ``(K, N)``."""
        return self.log_pz + self.log_px_given_z - self.log_q

    @property
    def num_samples(self) -> int:
        """``K``, draws for each datum."""
        return self.log_q.shape[0]

    @property
    def num_data(self) -> int:
        """How many data, ``N``."""
        return self.log_q.shape[1]

    @property
    def is_joint(self) -> bool:
        """Whether all data are one datum here."""
        return self.num_together > 0

    def __repr__(self) -> str:
        sites = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.latents.items())
        return (
            f"{self.num_samples} draws from {self.proposal} for each of {self.num_data} data: {sites or 'no latents'}"
        )


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
    """Draws latents and keeps them, with log p(z), log p(x|z) and log q(z|x) of each.

    Takes what `pvae.log_weights` does; for the same arguments these are the same draws. Latents take
    ``K N D`` numbers of memory.

    Args:
        model: The generative program.
        guide: The recognition program.
        data: As for `pvae.log_evidence`.
        num_samples: ``K``, draws for each datum.
        proposal: As for `pvae.log_evidence`; one whose draws have a density, so that ``"auto"`` and ``"ais"`` are none.
        seed: As for `pvae.log_evidence`.
        device: As for `pvae.log_evidence`.
        chunk_size: As for `pvae.log_evidence`.

    Returns:
        `WeightedDraws`.

    Raises:
        ArgumentError: The proposal has no density.
        PVAEError: As by `pvae.log_evidence`.
    """
    if isinstance(proposal, str) and proposal == "auto":
        raise ArgumentError("proposal='auto' has no draws of one proposal to keep; name one, such as 'guide'.")
    seed = resolve_seed(seed)
    settings = _settings(proposal, num_samples, seed, chunk_size)
    chosen = settings.proposal

    def draw(densities: Densities, batch: Batch, spans: list[int]) -> WeightedDraws:
        # Where there is nothing to draw, there is nothing to prepare.
        sampler = (chosen if densities.has_latents else Guide()).on(densities, batch)
        if not isinstance(sampler, Density):
            raise ArgumentError(
                f"proposal '{chosen.name}' has weights, and no density of single draws to keep. Use 'guide', 'refined' "
                "or another one that draws independently."
            )
        chunks = []
        for _ in range(chosen.replicates or 1):
            sampler.restart()
            for span in spans:
                latents, log_q = sampler.draw(span)
                numbers = (*densities.densities(batch, latents), log_q)
                chunks.append((latents.values, *(t.double().cpu() for t in numbers)))
        values, *numbers = zip(*chunks, strict=True)
        kept = {name: torch.cat([one[name].cpu() for one in values]) for name in values[0]}
        log_pz, log_px_given_z, log_q = map(torch.cat, numbers)
        return WeightedDraws(kept, log_pz, log_px_given_z, log_q, chosen.name, seed, densities.num_together)

    parts = _map(draw, model, guide, data, settings, device)
    latents = {name: torch.cat([part.latents[name] for part in parts], 1) for name in parts[0].latents}
    densities = {name: torch.cat([getattr(part, name) for part in parts], 1) for name in _DENSITIES}
    return replace(parts[0], latents=latents, **densities)


_DENSITIES = ("log_pz", "log_px_given_z", "log_q")


def map_batches(
    measure: Callable[[Densities, Batch, list[int]], T],
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int,
    seed: int | None = 0,
    device: str | torch.device = "auto",
    chunk_size: int | None = None,
) -> list[T]:
    """Measures something on one batch of data after another, with a pair placed, looked at and isolated.

    Args:
        measure: Called with the pair's densities, a batch, and the numbers of draws into which to cut K; begun anew
            from the first batch, with fewer pairs of a draw and a datum at once, where memory is short.
        model: The generative program.
        guide: The recognition program.
        data: As for `pvae.log_evidence`.
        num_samples: ``K``, draws for each datum.
        seed: As for `pvae.log_evidence`.
        device: As for `pvae.log_evidence`.
        chunk_size: As for `pvae.log_evidence`.

    Returns:
        What was measured of each batch, in the order of the data.

    Raises:
        PVAEError: As by `pvae.log_evidence`.
    """
    settings = _settings("guide", num_samples, resolve_seed(seed), chunk_size)
    return _map(measure, model, guide, data, settings, device)


def _settings(proposal: str | Proposal | Program, num_samples: int, seed: int, chunk_size: int | None) -> Settings:
    return Settings.of(
        proposal=proposal,
        num_samples=num_samples,
        seed=seed,
        chunk_size=chunk_size,
        compile=False,
        progress=False,
        precision="float32",
    )


@in_turn
def _map(
    measure: Callable[[Densities, Batch, list[int]], T],
    model: Program,
    guide: Program,
    data: Data,
    settings: Settings,
    device: str | torch.device,
) -> list[T]:
    pair, batches = place_evaluation(model, guide, data, settings.proposal, seed=settings.seed, device=device)

    @halve_chunks_until_they_fit
    def run(pair: Pair, batches: Batches, settings: Settings) -> list[T]:
        found = []
        with open_evaluation(pair, batches, settings.seed) as evaluation:
            densities = evaluation.densities
            chunk, proposal = settings.find_chunk_size(densities), settings.proposal
            each = settings.num_samples // (proposal.replicates or 1)
            for _, block in evaluation.blocks():
                rows, size = chunk_shape(block.num_data, settings.num_samples, densities, proposal, chunk)
                spans = [min(size, each - done) for done in range(0, each, size)]
                for part in torch.arange(block.num_data).split(rows):
                    with name_batch(block, part):
                        found.append(measure(densities, block.take(part), spans))
        return found

    return run(pair, batches, settings)
