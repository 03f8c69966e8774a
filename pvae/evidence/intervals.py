"""Confidence intervals for log p(x) that allow for the part of the weights' tail that was not drawn. Pure tensors.

Large weights are rare. Where few of them have come, the mean weight and its error are low together, so that an
interval made of them misses on one side: log p(x) is above it. Two things help. The k-hats of many data say together
what one is too noisy to say alone, and so which of them are low by luck. And the tail that was fitted says what the
weights above a threshold add up to on average, and how much more that may be.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pvae.evidence.pareto import MIN_SAMPLES_FOR_KHAT, tail_length
from pvae.evidence.weights import WeightSums

__all__ = ["interval", "mean_upper", "pooled_khat", "quantile"]

_HEAVIEST = 0.95  # a k-hat from which a mean is still computed; at 1 it is infinite
_ITERATIONS = 20


def quantile(level: float, degrees_of_freedom: Tensor) -> Tensor:
    """Half the width of an interval in standard errors, of a Student-t or, with infinite degrees, of a normal."""
    from scipy.special import stdtrit

    return torch.as_tensor(stdtrit(degrees_of_freedom.numpy(), (1 + level) / 2))


def pooled_khat(sums: WeightSums, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each datum's k-hat, drawn towards the mean of all as far as their scatter is no more than that of the fit.

    ``mean + b (k-hat - mean)`` with ``b = t / (t + v)``: v is the variance of a k-hat from M weights, ``(1 + k)^2 / M``
    less the pull of its prior, and t what the k-hats scatter beyond it. One datum alone keeps its own.

    Args:
        sums: Of the weights.
        groups: A number for each datum, such as of the proposal that its draws came from; only data with the same one
            are pooled.

    Returns:
        The pooled k-hats, and their standard errors, each of shape ``(N,)``. Those without a fit stay as they are.

    Source: Efron and Morris, 1975, Data Analysis Using Stein's Estimator and its Generalizations.
    """
    if groups is not None:
        both = torch.full((2, len(sums.khat)), torch.nan, dtype=torch.float64)
        for group in groups.unique():
            both[:, groups == group] = torch.stack(pooled_khat(sums[(groups == group).nonzero()[:, 0]]))
        return both[0], both[1]
    known = sums.khat.isfinite() | sums.khat.isposinf()
    khat = sums.khat.clamp(min=-1.0, max=2.0)[known]
    tail = torch.tensor([float(tail_length(k)) for k in sums.num_samples[known].tolist()]).double()
    relative = tail.sqrt() / (tail + 10)  # of ten pseudo-observations
    pooled, error = sums.khat.clone(), torch.full_like(sums.khat, torch.nan)
    n = len(khat)
    if n < 2:
        pooled[known], error[known] = khat, (1 + khat.clamp(min=0.0)) * relative
        return pooled, error
    mean = khat.mean()
    noise = ((1 + mean.clamp(min=0.0)) * relative).square()
    beyond = (khat.var() - noise.mean()).clamp(min=0.0)
    beyond = beyond + 2 * (noise + beyond) / n  # as far as n data can tell
    b = beyond / (beyond + noise)
    pooled[known] = mean + b * (khat - mean)
    error[known] = (b * noise + (1 - b).square() * (noise + beyond) / n).sqrt()
    return pooled, error


def interval(sums: WeightSums, level: float, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """An interval for log p(x) of each datum, whether it can be trusted or not.

    The lower end is ``log_px - bias - z std_error``; the upper one its mirror image, or where it is higher that from
    the fitted tail: ``log (m(k) + sqrt((t sd)^2 + (m(k + z error) - m(k))^2))``. Here ``m(k)`` is the mean weight with
    the M largest weights replaced by a tail of shape k, the pooled k-hat, and sd its sampling error.

    Args:
        sums: Of the weights.
        level: Coverage aimed at, between 0 and 1.
        groups: As for `pooled_khat`.

    Returns:
        Lower and upper ends, nats per datum, each of shape ``(N,)``.
    """
    centre, half = sums.log_px - sums.bias, quantile(level, sums.degrees_of_freedom) * sums.std_error
    return centre - half, torch.fmax(centre + half, _from_tail(sums, level, groups)[0])


def mean_upper(sums: WeightSums, level: float, half: float, groups: Tensor | None = None) -> float:
    """The upper end of an interval for the mean over data whose half width, from chance alone, is ``half``.

    ``mean (log_px - bias) + half``, or where it is higher ``a + sqrt(half^2 + (b - a)^2)``, with the means a of
    ``log m(k)`` and b of ``log m(k + z error)``, as in `interval`. A tail that was fitted too light is likely to be so
    for all data: that does not average out.
    """
    centre = sums.log_px - sums.bias
    _, mean, heavier = _from_tail(sums, level, groups)
    a, b = (torch.where(values.isfinite(), values, centre).mean().item() for values in (mean, heavier))
    return max(centre.mean().item() + half, a + math.hypot(half, b - a))


def _from_tail(sums: WeightSums, level: float, groups: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Each datum's upper end, ``log m(k)`` and ``log m(k + z error)``; -inf where no tail was fitted."""
    khat, error = pooled_khat(sums, groups)
    ends = torch.full((3, len(khat)), -torch.inf, dtype=torch.float64)
    for k in sums.num_samples.unique().tolist():
        rows = ((sums.num_samples == k) & khat.isfinite() & sums.log_sum.isfinite()).nonzero()[:, 0]
        if k >= MIN_SAMPLES_FOR_KHAT and len(rows):
            ends[:, rows] = torch.stack(_ends(sums[rows], k, khat[rows], error[rows], level))
    return ends[0], ends[1], ends[2]


def _ends(sums: WeightSums, num_samples: int, khat: Tensor, error: Tensor, level: float) -> tuple[Tensor, ...]:
    """As `_from_tail`, for data with the same number of draws."""
    count = min(tail_length(num_samples), len(sums.largest) - 1)
    top = sums.largest[0]
    largest = (sums.largest[: count + 1] - top).exp()
    threshold, excess = largest[-1], largest[:-1] - largest[-1]
    body = (sums.log_sum - top).exp() - excess.sum(0)  # each weight up to the threshold

    shape = khat.clamp(0.0, _HEAVIEST)
    heavier = (khat + quantile(level, torch.full_like(khat, torch.inf)) * error).clamp(0.0, _HEAVIEST)
    scale = _scale(excess, shape, excess.mean(0))
    mean = scale / (1 - shape)
    more = count * (_scale(excess, heavier, scale) / (1 - heavier) - mean)

    variance = (sums.log_variance - 2 * top).exp()
    # What independent draws would have on average, with the fitted tail in the place of the one that came.
    squares = (sums.log_sum_squares - 2 * top).exp() - largest[:-1].square().sum(0) + count * threshold.square()
    below = (squares - body.square() / num_samples).clamp(min=0.0)
    together = 2 * count * mean * (threshold - body / num_samples).clamp(min=0.0)
    expected = below + together + count * mean.square() * (2 + 2 * shape)
    variance = torch.where(sums.degrees_of_freedom.isinf(), torch.maximum(variance, expected), variance)

    few = quantile(level, sums.degrees_of_freedom.clamp(max=count - 1.0))
    half = (few.square() * variance + more.square()).sqrt()
    log_scale = top - sums.num_samples.double().log()
    return tuple((body + count * mean + further).log() + log_scale for further in (half, torch.zeros_like(half), more))


def _scale(excess: Tensor, shape: Tensor, start: Tensor) -> Tensor:
    """The most likely scale of a generalized Pareto distribution of known shape >= 0, for excesses ``(M, N)``."""
    scale = start.clamp(min=1e-300)
    for _ in range(_ITERATIONS):
        scale = scale * ((1 + shape) * excess / (scale + shape * excess)).mean(0)
    return scale
