"""The tail of importance weights: how heavy it is, and what a smooth one in its place adds up to. Pure tensors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MIN_SAMPLES_FOR_KHAT", "Tail", "fit_tail", "pareto_khat", "smooth_tail", "tail_length"]

MIN_SAMPLES_FOR_KHAT = 25
"""With fewer draws the tail has fewer than 5 weights, and nothing can be said about it."""


def tail_length(num_samples: int) -> int:
    """Number of largest weights that `pareto_khat` looks at: ``ceil(min(K / 5, 3 sqrt(K)))``.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry, 2024, Pareto Smoothed Importance Sampling.
    """
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


class Tail(NamedTuple):
    """A generalized Pareto distribution fitted to the largest weights of each datum.

    Attributes:
        khat: Its shape, shape ``(N,)``; see `pareto_khat` for what is not a number.
        log_sum: Log of the sum of the M largest weights as drawn, shape ``(N,)``.
        log_smoothed_sum: The same with each weight replaced by the fit's quantile for its rank, ``(N,)``; nan where
            there is no fit.
    """

    khat: Tensor
    log_sum: Tensor
    log_smoothed_sum: Tensor


def pareto_khat(largest: Tensor, num_samples: int) -> Tensor:
    """The shape of a generalized Pareto distribution fitted to the largest of K weights, for each datum.

    Below 0.5 the weights have a finite variance; up to 0.7 the estimate is still usable; above it neither the estimate
    nor its standard error can be trusted, at any K one could afford.

    Args:
        largest: Log-weights in descending order, shape ``(M, N)``; best ``min(K, tail_length(K) + 1)`` of them.
        num_samples: ``K``, the number of draws they are the largest of.

    Returns:
        One k-hat for each datum, shape ``(N,)``. It is ``-inf`` where the tail's weights differ by less than 0.1% (as
        with an exact posterior, where one draw is enough and what differs is rounding), ``inf`` where fewer than 5
        weights stand out of all others (one weight that outweighs the rest by hundreds of nats leaves no tail to fit)
        or all weights are zero, and nan for ``K < 25``.

    Source: Zhang and Stephens, 2009, A New and Efficient Estimation Method for the Generalized Pareto Distribution;
    prior on k and length of the tail from Vehtari et al., 2024, Pareto Smoothed Importance Sampling.
    """
    return fit_tail(largest, num_samples).khat


def fit_tail(largest: Tensor, num_samples: int) -> Tail:
    """Fits the tail; arguments and source as for `pareto_khat`."""
    if num_samples < MIN_SAMPLES_FOR_KHAT:
        unknown = torch.full_like(largest[0], torch.nan)
        return Tail(unknown, largest.logsumexp(0), unknown)
    khat, smoothed = _fit_tail(largest, num_samples)
    return Tail(khat, largest[: len(smoothed)].logsumexp(0), smoothed.logsumexp(0))


def smooth_tail(log_weights: Tensor) -> Tensor:
    """Log-weights with the largest ones of each datum replaced by the quantiles of the tail that was fitted to them.

    Each keeps its rank. Where there is no fit (see `pareto_khat`), weights stay as they are.

    Args:
        log_weights: Shape ``(K, N)``; of all K draws, in any order.

    Returns:
        Shape ``(K, N)``, float64.

    Source: as for `pareto_khat`.
    """
    log_weights = log_weights.double()
    num_samples = len(log_weights)
    if num_samples < MIN_SAMPLES_FOR_KHAT:
        return log_weights
    largest, draws = log_weights.topk(min(num_samples, tail_length(num_samples) + 1), 0)
    smoothed = _fit_tail(largest, num_samples)[1]
    smoothed = torch.where(smoothed.isnan(), largest[: len(smoothed)], smoothed)
    return log_weights.scatter(0, draws[: len(smoothed)], smoothed)


def _fit_tail(largest: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """k-hat, and the smoothed log-weights of the tail, largest first, ``(M, N)``; nan where there is no fit."""
    m = min(tail_length(num_samples), len(largest) - 1)  # fewer are known after a merge
    # Weights relative to the largest; below the smallest positive float64 they are zero in effect.
    top = largest[0].nan_to_num(neginf=0.0)
    tail, threshold = (largest[:m] - top).exp(), (largest[m] - top).exp()
    excess = (tail - threshold).flip(0).T.contiguous()  # (N, M), ascending
    equal = excess[:, -1] < 1e-3
    too_few = ((excess > 0).sum(1) < 5) & ~equal | largest[0].isneginf()
    theta, fitted = _fit(excess)
    shrunk = (m * fitted + 5) / (m + 10)  # ten pseudo-observations at k = 1/2
    khat = torch.where(too_few, torch.inf, torch.where(equal, -torch.inf, shrunk))

    scale = -fitted / theta
    processes = (torch.arange(m, dtype=excess.dtype, device=excess.device) + 0.5) / m
    flat = shrunk.abs() < 1e-12
    k = torch.where(flat, 1.0, shrunk)[:, None]
    minus_log = -torch.log1p(-processes)
    quantiles = torch.where(flat[:, None], minus_log, torch.expm1(k * minus_log) / k) * scale[:, None]
    smooth = (quantiles + threshold[:, None]).clamp(max=1.0)  # never above the largest weight that was drawn
    return khat, torch.where(khat.isfinite(), smooth.log().T.flip(0) + top, torch.nan)


def _fit(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Zhang and Stephens' estimates of ``theta = -k / sigma`` and k, for ascending excesses ``(N, M)``."""
    m = excess.shape[1]
    # A grid over theta, weighted by its profile likelihood (their section 4).
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
    return best[:, 0], torch.log1p(-best * excess).mean(-1)
