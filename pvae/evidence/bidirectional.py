"""Bidirectional Monte Carlo: log p(x) of simulated data between a lower and an upper bound, both stochastic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.data import Data
from pvae.errors import ArgumentError, positive_int
from pvae.evidence.densities import Batch, Densities
from pvae.evidence.evaluation import name_batch, open_evaluation, place_evaluation
from pvae.evidence.planning import default_chunk_size
from pvae.evidence.proposals.annealing import Annealed
from pvae.evidence.weights import WeightSums
from pvae.runtime import Program, in_turn, resolve_seed

__all__ = ["Bracket", "bidirectional_monte_carlo"]


@dataclass(frozen=True, eq=False, repr=False)
class Bracket:
    """log p(x) of N simulated data from below and from above. All tensors are float64, on the CPU.

    Attributes:
        lower: ``log (1/K) sum_k w_k`` of the forward chains, nats per datum, shape ``(N,)``: at most log p(x) in the
            mean.
        upper: ``-log (1/K) sum_k 1 / w_k`` of the reverse chains, likewise at least log p(x) in the mean.
        data: The simulated data, as they would be passed to `pvae.log_evidence`.
        acceptance: Of the forward chains' moves, shape ``(N,)``.
        num_samples: ``K``, chains in each direction.
        seed: The seed used.
    """

    lower: Tensor
    upper: Tensor
    data: tuple[Tensor, ...]
    acceptance: Tensor
    num_samples: int
    seed: int

    @property
    def gap(self) -> float:
        """Mean of ``upper - lower``, nats per datum; in the mean at least the error of either bound."""
        return (self.upper - self.lower).mean().item()

    @property
    def gap_std_error(self) -> float:
        """Standard error of `gap` over the simulated data; nan for N = 1."""
        gaps = self.upper - self.lower
        return gaps.std().item() / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")

    def __repr__(self) -> str:
        return (
            f"log p(x) of {len(self.lower)} simulated data, {self.num_samples} chains each way\n"
            f"  lower       {self.lower.mean().item():10.3f} nats per datum\n"
            f"  upper       {self.upper.mean().item():10.3f}\n"
            f"  gap         {self.gap:10.3f} +- {self.gap_std_error:.3f}\n"
            f"  acceptance  {self.acceptance.mean().item():10.2f}"
        )


@in_turn
def bidirectional_monte_carlo(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int = 16,
    proposal: Annealed | None = None,
    seed: int | None = 0,
    device: str | torch.device = "auto",
) -> Bracket:
    """Brackets log p(x) of data simulated from the model, and so measures how good annealing is on it.

    For each datum a pair ``z, x ~ p(z) p(x|z)`` is drawn. Then z is an exact draw of ``p(z|x)``, from which chains can
    run back from the posterior to the start: their ``1 / w`` has mean ``1 / p(x)``. In the mean log p(x) lies between
    the two, so where the gap is small, annealing with these settings is right for data like these; whether real data
    are like these is for you to judge.

    Args:
        model: The generative program.
        guide: The recognition program.
        data: As for `pvae.log_evidence`: how many, and of what shape; observed values are replaced by simulated ones,
            all other tensors of a tuple are kept.
        num_samples: ``K``, chains each way.
        proposal: Start, temperatures and kernel; ``Annealed()`` if left out.
        seed: Same seed, same result on the same machine; ``None`` for a fresh one.
        device: As for `pvae.log_evidence`.

    Returns:
        A `Bracket`.

    Raises:
        ProgramError: The model does not observe a data tensor as it is; or as by `pvae.log_evidence`.

    Source: Grosse, Ghahramani and Adams, 2015, Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo;
    Wu, Burda, Salakhutdinov and Grosse, 2017, On the Quantitative Analysis of Decoder-Based Generative Models.
    """
    num_samples, seed = positive_int("num_samples", num_samples), resolve_seed(seed)
    annealed = Annealed() if proposal is None else proposal
    if not isinstance(annealed, Annealed):
        raise ArgumentError(f"proposal must be a pvae.evidence.proposals.Annealed, got {proposal!r}.")
    pair, batches = place_evaluation(model, guide, data, annealed, seed=seed, device=device)
    with open_evaluation(pair, batches, seed) as evaluation:
        densities, parts = evaluation.densities, []
        size = max(1, default_chunk_size(densities, annealed) // max(num_samples, annealed.pilots))
        for _, block in evaluation.blocks():
            for rows in torch.arange(block.num_data).split(size):
                with name_batch(block, rows):
                    parts.append(_run_both_ways(densities, block.take(rows), annealed, num_samples))
    lower, upper, acceptance, *simulated = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if densities.is_joint:
        simulated = [tensor[0] for tensor in simulated]  # all data are one datum here, and come back as they are
    return Bracket(lower, upper, tuple(simulated), acceptance, num_samples, seed)


def _run_both_ways(densities: Densities, batch: Batch, annealed: Annealed, num_samples: int) -> tuple[Tensor, ...]:
    """Simulates data and runs chains forward and back: the lower bound, the upper one, acceptance, and the data."""
    simulated, latents = densities.simulate(batch)
    chains = annealed.on(densities, simulated)
    forward = WeightSums.of(chains.log_weights(num_samples)).log_px
    reverse = WeightSums.of(-chains.reverse_log_weights(latents, num_samples)).log_px
    acceptance = chains.diagnostics.get("acceptance", torch.full_like(forward, torch.nan))
    return tuple(t.cpu() for t in (forward, -reverse, acceptance, *simulated))
