"""Work of others on batches of data: the pair is placed, looked at and isolated, and memory is asked for in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from pvae.data import Batches, Data
from pvae.evidence.densities import Batch, Densities
from pvae.evidence.evaluation import name_batch, open_evaluation, place_evaluation
from pvae.evidence.planning import Settings, chunk_shape, halve_chunks_until_they_fit
from pvae.evidence.proposals import Proposal
from pvae.runtime import Pair, Program, in_turn, resolve_seed

__all__ = ["map_batches"]

T = TypeVar("T")


@in_turn
def map_batches(
    measure: Callable[[Densities, Batch, list[int]], T],
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int,
    proposal: str | Proposal | Program = "guide",
    seed: int | None = 0,
    device: str | torch.device = "auto",
    chunk_size: int | None = None,
) -> list[T]:
    """Measures something on one batch of data after another, by a pair's densities; for reports of your own.

    As in `pvae.log_evidence`, the pair can be any Pyro programs, gradients are off, modules are in eval mode, and the
    caller's random numbers, param store and modes are left as they were.

    Args:
        measure: Called with the pair's `pvae.evidence.densities.Densities`, a batch, and the numbers of draws into
            which to cut K; begun anew from the first batch, with fewer pairs of a draw and a datum at once, where
            memory is short.
        model: The generative program.
        guide: The recognition program.
        data: As for `pvae.log_evidence`.
        num_samples: ``K``, draws for each datum.
        proposal: Where they will come from, which says how much is done at once; modules in it are placed, too.
        seed: As for `pvae.log_evidence`; by the same draws from the guide, in the same order, weights are the same.
        device: As for `pvae.log_evidence`.
        chunk_size: As for `pvae.log_evidence`.

    Returns:
        What was measured of each batch, in the order of the data.

    Raises:
        PVAEError: As by `pvae.log_evidence`.
    """
    settings = Settings.of(
        proposal=proposal,
        num_samples=num_samples,
        seed=resolve_seed(seed),
        chunk_size=chunk_size,
        compile=False,
        progress=False,
        precision="float32",
    )
    settings.check_one_proposal()
    pair, batches = place_evaluation(model, guide, data, settings.proposal, seed=settings.seed, device=device)

    @halve_chunks_until_they_fit
    def run(pair: Pair, batches: Batches, settings: Settings) -> list[T]:
        found = []
        with open_evaluation(pair, batches, settings.seed) as evaluation:
            densities = evaluation.densities
            chunk, k = settings.find_chunk_size(densities), settings.num_samples
            for _, block in evaluation.blocks():
                rows, size = chunk_shape(block.num_data, k, densities, settings.proposal, chunk)
                spans = [min(size, k - done) for done in range(0, k, size)]
                for part in torch.arange(block.num_data).split(rows):
                    with name_batch(block, part):
                        found.append(measure(densities, block.take(part), spans))
        return found

    return run(pair, batches, settings)
