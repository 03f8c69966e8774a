"""Importance weights, summed as they stream by: pure tensors, nothing of Pyro.

For each datum ``n``, K draws from a proposal give log-weights ``log w_k = log p(x, z_k) - log q(z_k)``. All that is
wanted of them are a few running sums and the largest few weights; so memory does not grow with K, chunks may have any
size, and sums of several chunks can be merged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.errors import NumericalError

__all__ = ["MIN_SAMPLES_FOR_KHAT", "WeightSums", "pareto_khat", "tail_length"]

MIN_SAMPLES_FOR_KHAT = 25
"""With fewer draws the tail has fewer than 5 weights, and nothing can be said about it."""


def tail_length(num_samples: int) -> int:
    """Number of largest weights that `pareto_khat` looks at: ``ceil(min(K / 5, 3 sqrt(K)))``.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry, 2024, Pareto Smoothed Importance Sampling.
    """
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


@dataclass(frozen=True)
class WeightSums:
    """Running sums over the log-weights of N data, in float64.

    Make one by `of` and join them by `merge`; the order and the sizes of the chunks do not matter beyond
    float64 rounding.

    Attributes:
        num_samples: ``K``, how many draws each datum has had.
        log_sum: ``log sum_k w_k``, shape ``(N,)``.
        log_sum_squares: ``log sum_k w_k^2``, shape ``(N,)``.
        mean_log: ``mean_k log w_k``, shape ``(N,)``.
        squares_log: ``sum_k (log w_k - mean_log)^2``, shape ``(N,)``.
        largest: The largest log-weights in descending order, shape ``(min(K, capacity), N)``.
        capacity: How many of the largest are kept.
    """

    num_samples: int
    log_sum: Tensor
    log_sum_squares: Tensor
    mean_log: Tensor
    squares_log: Tensor
    largest: Tensor
    capacity: int

    @classmethod
    def of(cls, log_weights: Tensor, max_samples: int | None = None) -> WeightSums:
        """The sums of one chunk.

        Args:
            log_weights: Shape ``(K, N)``, any floating dtype. ``-inf`` is a weight of zero.
            max_samples: The number of draws in all chunks together; this chunk's by default.

        Raises:
            NumericalError: A log-weight is nan or ``+inf``.
        """
        num_samples = len(log_weights)
        w = log_weights.detach().double()
        bad = w.isnan() | w.isposinf()
        if bad.any():
            datum = int(bad.any(0).nonzero()[0])
            raise NumericalError(
                f"{int(bad.sum())} of {w.numel()} log-weights are nan or +inf, the first for datum {datum} of its "
                "batch. A density of the model or the guide is not finite there: look at its scales."
            )
        capacity = tail_length(max_samples or num_samples) + 1
        mean = w.mean(0)
        # A weight of zero makes mean and spread of the logs -inf and nan; the ELBO is -inf then.
        squares = torch.where(mean.isfinite(), (w - mean).square().sum(0), torch.inf)
        largest = w.topk(min(capacity, num_samples), dim=0).values
        return cls(num_samples, w.logsumexp(0), (2 * w).logsumexp(0), mean, squares, largest, capacity)

    def merge(self, other: WeightSums) -> WeightSums:
        """The sums over the draws of both, for the same data."""
        k, m = self.num_samples, other.num_samples
        capacity = max(self.capacity, other.capacity)
        largest = torch.cat([self.largest, other.largest])
        mean = (k * self.mean_log + m * other.mean_log) / (k + m)
        between = (self.mean_log - other.mean_log).square() * (k * m / (k + m))
        squares = torch.where(mean.isfinite(), self.squares_log + other.squares_log + between, torch.inf)
        return WeightSums(
            k + m,
            torch.logaddexp(self.log_sum, other.log_sum),
            torch.logaddexp(self.log_sum_squares, other.log_sum_squares),
            mean,
            squares,
            largest.topk(min(capacity, len(largest)), dim=0).values,
            capacity,
        )

    @property
    def log_px(self) -> Tensor:
        """``log (1/K) sum_k w_k``, nats per datum, shape ``(N,)``: consistent, and low in the mean (Jensen)."""
        return self.log_sum - math.log(self.num_samples)

    @property
    def ess(self) -> Tensor:
        """Effective sample size ``(sum_k w_k)^2 / sum_k w_k^2``, from 1 to K, shape ``(N,)``. Source: Kong, 1992."""
        return (2 * self.log_sum - self.log_sum_squares).exp().clamp(max=float(self.num_samples))

    @property
    def std_error(self) -> Tensor:
        """Delta-method standard error of `log_px`, ``sd(w) / (sqrt(K) mean(w))``, nats, shape ``(N,)``; nan for K = 1.

        Low where the weights' tail is heavy: see `khat`.
        """
        if self.num_samples < 2:
            return torch.full_like(self.log_sum, torch.nan)
        return ((self.num_samples / self.ess - 1) / (self.num_samples - 1)).sqrt()

    @property
    def elbo(self) -> Tensor:
        """``mean_k log w_k``, nats per datum, shape ``(N,)``: estimates ``E_q[log p(x, z) - log q(z)] <= log p(x)``."""
        return self.mean_log

    @property
    def elbo_std_error(self) -> Tensor:
        """Standard error of `elbo`, nats, shape ``(N,)``; nan for K = 1."""
        if self.num_samples < 2:
            return torch.full_like(self.mean_log, torch.nan)
        return (self.squares_log / (self.num_samples - 1) / self.num_samples).sqrt()

    @property
    def khat(self) -> Tensor:
        """Pareto k-hat of the weights' tail, shape ``(N,)``; see `pareto_khat`."""
        return pareto_khat(self.largest, self.num_samples)


def pareto_khat(largest: Tensor, num_samples: int) -> Tensor:
    """The shape of a generalized Pareto distribution fitted to the largest of K weights, for each datum.

    Below 0.5 the weights have a finite variance; up to 0.7 the estimate is still usable; above it neither the estimate
    nor its standard error can be trusted, at any K one could afford.

    Args:
        largest: Log-weights in descending order, at least ``min(K, tail_length(K) + 1)`` of them, shape ``(M, N)``.
        num_samples: ``K``, the number of draws they are the largest of.

    Returns:
        One k-hat for each datum, shape ``(N,)``. It is ``-inf`` where the tail's weights differ by less than 0.1% (as
        with an exact posterior, where one draw is enough and what differs is rounding), ``inf`` where fewer than 5
        weights stand out of all others (one weight that outweighs the rest by hundreds of nats leaves no tail to fit),
        and nan for ``K < 25``.

    Source: Zhang and Stephens, 2009, A New and Efficient Estimation Method for the Generalized Pareto Distribution;
    prior on k and length of the tail from Vehtari et al., 2024, Pareto Smoothed Importance Sampling.
    """
    if num_samples < MIN_SAMPLES_FOR_KHAT:
        return torch.full_like(largest[0], torch.nan)
    m = tail_length(num_samples)
    # Weights relative to the largest; below the smallest positive float64 they are zero in effect.
    tail, threshold = (largest[:m] - largest[0]).exp(), (largest[m] - largest[0]).exp()
    excess = (tail - threshold).flip(0).T.contiguous()  # (N, M), ascending
    equal = excess[:, -1] < 1e-3
    too_few = (excess > 0).sum(1) < 5

    # A grid over theta = -k / sigma, weighted by its profile likelihood (Zhang and Stephens, section 4).
    size = 30 + int(math.sqrt(m))
    steps = 1 - (size / (torch.arange(1, size + 1, dtype=excess.dtype, device=excess.device) - 0.5)).sqrt()
    quartile = excess[:, int(m / 4 + 0.5) - 1]
    # Ties with the threshold leave no distance at the quartile; the smallest distance there is stands in.
    nearest = torch.where(excess > 0, excess, torch.inf).amin(1)
    quartile = torch.where(quartile > 0, quartile, nearest).clamp(min=1e-300)
    theta = 1 / excess[:, -1:] + steps / (3 * quartile[:, None])  # (N, size)
    # One grid point at a time, so that memory is that of the tail.
    k = torch.stack([torch.log1p(-t[:, None] * excess).mean(-1) for t in theta.T], 1)
    log_likelihood = m * ((-theta / k).log() - k - 1)
    # At theta = 0, the exponential distribution, the expression is 0/0: that point is left out.
    best = (theta * log_likelihood.nan_to_num(-torch.inf).softmax(-1)).sum(-1, keepdim=True)
    fitted = torch.log1p(-best * excess).mean(-1)
    shrunk = (m * fitted + 5) / (m + 10)  # ten pseudo-observations at k = 1/2
    return torch.where(equal, -torch.inf, torch.where(too_few, torch.inf, shrunk))
