"""Draws from a proposal for one block of data after another: in chunks that are summed, or kept, as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
from torch import Tensor
from tqdm import tqdm

from pvae.capture import ChangedInPlace, CheaperArithmetic
from pvae.data import InMemory
from pvae.evidence.densities import Batch
from pvae.evidence.evaluation import Evaluation, name_batch
from pvae.evidence.planning import Settings, chunk_shape, draws_name
from pvae.evidence.proposals.base import Guide, Prior, Sampler
from pvae.evidence.verdicts import ERROR_MARGIN, KHAT_LIMIT
from pvae.evidence.weights import Chunk, WeightSums

__all__ = ["DrawSums", "Draws"]


@dataclass(frozen=True, eq=False)
class DrawSums:
    """What is known of the draws for N data.

    Attributes:
        weights: The sums over their weights.
        diagnostics: What the proposal found out on the way, by name, shape ``(N,)`` each.
        shared_draws: Whether data shared draws.
        precision: Machine epsilon of the numbers that densities were computed in.
        num_together: How many data have one log p together; 0 where each has its own.
        is_exact: Whether there was nothing to draw, so that log p(x) is known.
        product_rounding: What products in fewer digits were found to change log-weights by, nats.
    """

    weights: WeightSums
    diagnostics: dict[str, Tensor]
    shared_draws: bool
    precision: float
    num_together: int = 0
    is_exact: bool = False
    product_rounding: float = 0.0

    @classmethod
    def cat(cls, parts: Sequence[DrawSums]) -> DrawSums:
        """Those of several sets of data, one after the other."""
        first = parts[0]
        # What only some proposals find out is not a number for the others.
        names = {name: None for part in parts for name in part.diagnostics}
        diagnostics = {name: torch.cat([part._diagnostic(name) for part in parts]) for name in names}
        weights = WeightSums.cat(part.weights for part in parts)
        return replace(first, weights=weights, diagnostics=diagnostics)

    def _diagnostic(self, name: str) -> Tensor:
        return self.diagnostics.get(name, torch.full_like(self.weights.log_sum, torch.nan))

    def __getitem__(self, rows: Tensor) -> DrawSums:
        """Those of some of the data, by their indices."""
        diagnostics = {name: values[rows] for name, values in self.diagnostics.items()}
        return replace(self, weights=self.weights[rows], diagnostics=diagnostics)


class Draws:
    """Draws from a proposal, batch by batch and chunk by chunk.

    Args:
        evaluation: What draws are weighed by.
        settings: What is asked for.
        bar: Counts the draws.
    """

    def __init__(self, evaluation: Evaluation, settings: Settings, bar: tqdm) -> None:
        self.densities, self.settings, self.bar = evaluation.densities, settings, bar
        # Where there is nothing to draw, there is nothing to prepare.
        self.proposal = settings.proposal if self.densities.has_latents else Guide()
        self.replicates = self.proposal.replicates or 1
        self.densities.programs.capture = settings.is_to_be_captured(evaluation)
        self.chunk_size = settings.find_chunk_size(self.densities)
        self.is_cheaper = self.densities.placed.device.type == "cpu"

    def sum_block(self, block: InMemory) -> DrawSums:
        """The sums over the draws for each datum of a block: K, or as many as the target for the error takes."""
        settings = self.settings
        if settings.target_std_error is None:
            return self._sum(block, torch.arange(block.num_data), settings.num_samples)
        # Fresh draws: an estimate that stopped where its error looked small would be biased.
        needed = self._find_needed(block, settings.target_std_error)
        groups = [(needed == k).nonzero()[:, 0] for k in needed.unique()]
        parts = [self._sum(block, rows, int(needed[rows[0]])) for rows in groups]
        return DrawSums.cat(parts)[torch.cat(groups).argsort()]

    def keep_block(self, block: InMemory) -> Tensor:
        """The log-weights of K draws for each datum of a block, ``(K, N)``."""
        num_samples, kept = self.settings.num_samples, []
        size, draws = self._find_chunk_shape(block.num_data, num_samples)
        for rows in torch.arange(block.num_data).split(size):
            with name_batch(block, rows):
                kept.append(self._keep_batch(block.take(rows), num_samples, draws))
        return torch.cat(kept, dim=1)

    def sum_rows(self, draw_on: Callable[[Tensor], Sampler], rows: Tensor, num_samples: int, width: int) -> DrawSums:
        """The sums over at least so many draws for some data.

        Captured draws come in chunks of one shape, so that one graph serves them all: few data come as copies, among
        which their draws are dealt out.

        Args:
            draw_on: Gives the proposal on some rows.
            rows: Which data.
            num_samples: ``K``.
            width: Data at once.
        """
        parts = [self._sum_width(draw_on, part, num_samples, width) for part in rows.split(width)]
        return DrawSums.cat(parts)

    def sum_prior(self, batch: Batch, num_samples: int) -> WeightSums:
        """The sums over draws from the prior; those where densities are no numbers, far from the data, count as 0."""
        sampler = Prior().on(self.densities, batch)
        size = max(1, (2**21 if self.densities.shares_prior else self.chunk_size) // len(batch[0]))
        spans = (min(size, num_samples - done) for done in range(0, num_samples, size))
        drawn = (sampler.log_weights(span).nan_to_num(-torch.inf, -torch.inf, -torch.inf) for span in spans)
        return reduce(WeightSums.merge, (WeightSums.of(weights, num_samples) for weights in drawn)).cpu()

    def _sum_width(self, draw_on: Callable[[Tensor], Sampler], rows: Tensor, num_samples: int, width: int) -> DrawSums:
        """The sums for at most ``width`` data."""
        sampler, copies, size = draw_on(rows), 1, max(1, self.chunk_size // len(rows))
        if self.densities.programs.capture and sampler.tensors is not None:
            size = max(1, self.chunk_size // width)
            copies = 1 if self.densities.is_joint else max(1, min(width // len(rows), num_samples // size))
            padded = torch.cat([rows.repeat(copies), rows[:1].expand(width - copies * len(rows))])
            sampler, num_samples = draw_on(padded), -(-num_samples // (copies * size)) * size
        sums = self._sum_replicate(sampler, num_samples, size)
        columns = torch.arange(copies * len(rows)).split(len(rows))
        weights = reduce(WeightSums.merge, [sums[part] for part in columns])
        return self._draw_sums(weights, sampler.diagnostics, shared_draws=False)

    def _find_needed(self, block: InMemory, target: float) -> Tensor:
        """How many draws each datum needs for a standard error of ``target`` and a good k-hat, found by doubling."""
        rows, limit = torch.arange(block.num_data), self.settings.limit
        sums = self._sum(block, rows, self.settings.num_samples).weights
        while True:
            enough = (sums.khat[rows] <= KHAT_LIMIT) & (sums.std_error[rows] <= ERROR_MARGIN * target)
            rows = rows[~enough]
            done = int(sums.num_samples.max())
            if not len(rows) or done == limit:
                return sums.num_samples
            more = min(done, limit - done) // self.replicates * self.replicates
            sums = sums.put(rows, sums[rows].combine(self._sum(block, rows, more).weights))

    def _sum(self, block: InMemory, rows: Tensor, num_samples: int) -> DrawSums:
        """The sums over so many draws for some data of a block."""
        parts = []
        size, draws = self._find_chunk_shape(len(rows), num_samples)
        for part in rows.split(size):
            with name_batch(block, part):
                parts.append(self._sum_batch(block.take(part), num_samples, draws))
        return DrawSums.cat(parts)

    def _find_chunk_shape(self, num_data: int, num_samples: int) -> tuple[int, int]:
        """How many data and how many draws to take at once of those that come."""
        self.bar.total += num_samples * num_data
        return chunk_shape(num_data, num_samples, self.densities, self.proposal, self.chunk_size)

    def _sum_batch(self, batch: Batch, num_samples: int, size: int) -> DrawSums:
        sampler = self.proposal.on(self.densities, batch)
        replicates = [self._sum_replicate(sampler, num_samples, size) for _ in range(self.replicates)]
        sums = WeightSums.of_replicates(replicates) if self.proposal.replicates else replicates[0]
        return self._draw_sums(sums, sampler.diagnostics, shared_draws=self.proposal.shares_draws(self.densities))

    def _draw_sums(self, weights: WeightSums, diagnostics: dict[str, Tensor], *, shared_draws: bool) -> DrawSums:
        together, exact = self.densities.num_together, not self.densities.has_latents
        if exact:  # not even rounding
            weights = replace(weights, log_variance=torch.full_like(weights.log_variance, -torch.inf))
        diagnostics = {name: value.cpu() for name, value in diagnostics.items()}
        rounding = self.densities.product_rounding
        return DrawSums(weights.cpu(), diagnostics, shared_draws, self.densities.precision, together, exact, rounding)

    def _sum_replicate(self, sampler: Sampler, num_samples: int, size: int) -> WeightSums:
        strata: dict[int, WeightSums] = {}
        for stratum, chunk in self._draw_replicate(sampler, num_samples, size):
            sums = strata.get(stratum)
            strata[stratum] = WeightSums.of(chunk, self.settings.limit) if sums is None else sums.add(chunk)
        return WeightSums.of_strata([strata[stratum] for stratum in sorted(strata)], sampler.shares)

    def _keep_batch(self, batch: Batch, num_samples: int, size: int) -> Tensor:
        sampler = self.proposal.on(self.densities, batch)
        # One block from the start: small ones, made between large ones that go, would keep the heap from shrinking.
        kept, done = torch.empty(num_samples, len(batch[0]), dtype=torch.float64), 0
        for _ in range(self.replicates):
            for _, chunk in self._draw_replicate(sampler, num_samples, size):
                kept[done : done + len(chunk.log_weights)] = chunk.log_weights
                done += len(chunk.log_weights)
        return kept

    def _draw_replicate(self, sampler: Sampler, num_samples: int, size: int) -> Iterator[tuple[int, Chunk]]:
        """A replicate's share of K draws, chunk by chunk, with their sums, and the numbers of their strata."""
        sampler.restart()
        each = num_samples // self.replicates
        for done in range(0, each, size):
            for stratum, chunk in self._draw_strata(sampler, min(size, each - done)):
                yield stratum, chunk
                self.bar.update(chunk.log_weights.numel())

    def _draw_strata(self, sampler: Sampler, num_samples: int) -> Iterator[tuple[int, Chunk]]:
        tensors = sampler.tensors
        if tensors is None:
            yield from ((i, Chunk.of(part)) for i, part in enumerate(sampler.strata(num_samples)) if len(part))
        elif not self.densities.programs.capture:
            yield 0, self._draw_cheaply(sampler, num_samples)
        else:
            yield 0, self._draw_captured(sampler, tensors, num_samples)

    def _draw_cheaply(self, sampler: Sampler, num_samples: int) -> Chunk:
        """A chunk by programs as they are, with cheaper arithmetic unless they change what that has put off."""
        before = self._rng_states()
        if self.is_cheaper:
            try:
                with CheaperArithmetic():
                    return Chunk.of(sampler.log_weights(num_samples))
            except ChangedInPlace:
                self.is_cheaper = False
                self._set_rng_states(before)
        return Chunk.of(sampler.log_weights(num_samples))

    def _rng_states(self) -> tuple[Tensor, Tensor | None]:
        device = self.densities.placed.device
        return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def _set_rng_states(self, states: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], self.densities.placed.device)

    def _draw_captured(self, sampler: Sampler, tensors: tuple[Tensor, ...], num_samples: int) -> Chunk:
        """A chunk by the graph for so many draws."""
        programs = self.densities.programs
        key = draws_name(self.proposal, num_samples)
        shared = self.proposal.shares_draws(self.densities)
        draw = programs.get(
            (*key, sampler.signature, shared), partial(_draw_chunk, sampler, num_samples), self.proposal
        )
        before = self._rng_states()
        chunk = Chunk(*draw(*sampler.batch, *tensors))
        if chunk.top.isnan().any():
            # Rare draws need more than tensor operations: the same draws once more, as they come.
            self._set_rng_states(before)
            chunk = Chunk.of(sampler.log_weights(num_samples))
        return chunk


def _draw_chunk(sampler: Sampler, num_samples: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """A chunk of draws as a function of a batch and of all that the sampler knows of it."""
    split = len(sampler.batch)
    return tuple(Chunk.of(sampler.with_tensors(tensors[:split], tensors[split:]).log_weights(num_samples)))
