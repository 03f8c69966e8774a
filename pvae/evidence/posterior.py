"""Weighted draws of latents: what is known of the posterior of each datum. Pure tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pvae.errors import warn
from pvae.evidence.pareto import smooth_tail
from pvae.evidence.verdicts import KHAT_LIMIT
from pvae.evidence.weights import WeightSums

__all__ = ["WeightedDraws", "choose_draws", "warn_of_proposal_draws"]


@dataclass(frozen=True, eq=False, repr=False)
class WeightedDraws:
    """Draws ``z_k ~ q(z)`` of N data and their weights ``w_k = p(x, z_k) / q(z_k)``: a weighted posterior sample.

    ``E[f(z) | x]`` is about ``sum_k w_k f(z_k) / sum_k w_k``. All tensors are on the CPU. Where all data are one datum,
    as with latents outside of the data plate, N is 1.

    Attributes:
        log_weights: ``log p(x, z_k) - log q(z_k)``, nats, float64, shape ``(K, N)``.
        latents: By site, in its own (constrained) space, shape ``(K, N, *plates, *event)``. Those of ``summed_out`` are
            drawn given the others, so that the weights are right for them, too.
        log_likelihood: ``log p(x | z_k)`` by observed site, nats, float64, shape ``(K, N)``; ``(K, M)`` where M data
            are one datum and the site has a plate over them. Where latents are summed out, all observed sites have one
            together, named ``"x_and_y"``.
        plates: Names of the plates behind ``(K, N)``, by site.
        summed_out: The discrete latents that the weights are summed over.
        proposal: Where the draws came from.
        seed: The seed used, also where ``seed=None`` asked for a fresh one.
        num_together: How many data have one log p(data) together, so that N is 1; 0 where each datum has its own.
    """

    log_weights: Tensor
    latents: Mapping[str, Tensor]
    log_likelihood: Mapping[str, Tensor]
    plates: Mapping[str, tuple[str, ...]]
    summed_out: tuple[str, ...]
    proposal: str
    seed: int
    num_together: int = 0

    @property
    def num_samples(self) -> int:
        """``K``, draws for each datum."""
        return len(self.log_weights)

    @property
    def num_data(self) -> int:
        """``N``."""
        return self.log_weights.shape[1]

    @cached_property
    def sums(self) -> WeightSums:
        """The sums over the weights that `log_px`, `ess` and `khat` are made of."""
        return WeightSums.of(self.log_weights)

    @property
    def log_px(self) -> Tensor:
        """``log (1/K) sum_k w_k``, nats, shape ``(N,)``."""
        return self.sums.log_px

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the weights, from 1 to K, shape ``(N,)``."""
        return self.sums.ess

    @property
    def khat(self) -> Tensor:
        """Pareto k-hat of the weights, shape ``(N,)``; as for `EvidenceEstimate`."""
        return self.sums.khat

    @property
    def unreliable(self) -> Tensor:
        """Which data have a k-hat above 0.7, or none at all, so that weights do not make the draws the posterior's."""
        return ~(self.khat <= KHAT_LIMIT)

    def __repr__(self) -> str:
        bad = int(self.unreliable.sum())
        return (
            f"{self.num_samples} weighted draws of {', '.join(self.latents) or 'nothing'} for {self.num_data} data, "
            f"from {self.proposal}; median ESS {self.ess.median().item():.0f}, k-hat above {KHAT_LIMIT} for {bad}"
        )


def choose_draws(log_weights: Tensor, *, resample: bool) -> tuple[Tensor, Tensor]:
    """Makes a sample of the posterior of draws that are weighted: K of K, with replacement, where k-hat allows.

    Draws come with probabilities in proportion to their Pareto-smoothed weights, by evenly spaced quantiles (systematic
    resampling) and in random order: each as often as its weight says, to within one. Others stay as they were drawn.

    Args:
        log_weights: Shape ``(K, N)``.
        resample: Whether to do so at all.

    Returns:
        Which draws, shape ``(K, N)``; and for which data they were chosen by weight, bool, shape ``(N,)``.

    Source: Rubin, 1988, Using the SIR Algorithm to Simulate Posterior Distributions; Kitagawa, 1996, Monte Carlo Filter
    and Smoother for Non-Gaussian Nonlinear State Space Models; Vehtari et al., 2024, Pareto Smoothed Importance
    Sampling.
    """
    count, num_data = log_weights.shape
    as_drawn = torch.arange(count)[:, None].expand(count, num_data)
    is_resampled = (WeightSums.of(log_weights).khat <= KHAT_LIMIT) & resample
    if not is_resampled.any():
        return as_drawn, is_resampled
    shares = smooth_tail(log_weights).softmax(0).nan_to_num().cumsum(0).T.contiguous()
    points = (torch.arange(count) + torch.rand(num_data, 1, dtype=torch.float64)) / count
    chosen = torch.searchsorted(shares / shares[:, -1:], points).clamp(max=count - 1).T
    chosen = chosen.gather(0, torch.rand(count, num_data).argsort(0))
    return torch.where(is_resampled, chosen, as_drawn), is_resampled


def warn_of_proposal_draws(draws: WeightedDraws) -> None:
    """Warns of data whose weights do not make their draws the posterior's."""
    if bad := int(draws.unreliable.sum()):
        warn(
            f"{bad} of {draws.num_data} data have a k-hat above {KHAT_LIMIT}, or none: their latents are draws of the "
            f"proposal '{draws.proposal}', not of the posterior. Try proposal='refined' or more num_samples; or pass "
            "resample=False, if draws of the proposal are what you want."
        )
