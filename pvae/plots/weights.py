"""Weights of importance sampling, and the estimates that they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pvae.errors import ArgumentError
from pvae.plots.canvas import COLORS, GREY, label, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["running_estimate", "weight_histogram"]


def weight_histogram(log_weights: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """Draws how the log-weights of one datum are distributed under each proposal.

    Args:
        log_weights: Name (``"prior"``, ``"guide"``) to log-weights, nats, shape ``(K,)``. Those of ``-inf``, of draws
            that cannot explain x at all, are in no bar, but are samples of which the bars are shares.
        ax: Where to draw; a new figure if left out.
    """
    ax = new_axes(ax)
    values = {name: w.detach().cpu().double().numpy() for name, w in log_weights.items()}
    finite = {name: v[np.isfinite(v)] for name, v in values.items()}
    drawn = np.concatenate([np.empty(0), *finite.values()])
    bins = np.linspace(drawn.min(), drawn.max(), 80) if len(drawn) else np.arange(2.0)
    for name, value in finite.items():
        every = len(values[name])
        style: dict[str, Any] = {"alpha": 0.7, "color": COLORS.get(name), "label": label(name, every)}
        ax.hist(value, bins=bins.tolist(), weights=np.full(len(value), 1 / every), **style)
    ax.set(xlabel="log w, nats", ylabel="share of samples", title="How well they explain x")
    if len(drawn):
        ax.set_yscale("log")
    ax.legend(frameon=False, loc="upper left")
    return ax


def running_estimate(
    log_weights: Mapping[str, Tensor], ax: Axes | None = None, *, elbo: float | None = None, share: float = 0.8
) -> Axes:
    """Draws the estimate of log p(x) of one datum from its first K log-weights, ``log(1/K sum_k w_k)``, for growing K.

    One run of draws says little of a next one: an estimate climbs where a rare draw happens to come. Of several
    repetitions the median is drawn, in a band that holds the middle ``share`` of them.

    Args:
        log_weights: Name (``"prior"``, ``"guide"``) to log-weights in the order they were drawn, nats, shape ``(K,)``,
            or ``(K, R)`` for R repetitions.
        ax: Where to draw; a new figure if left out.
        elbo: Drawn as a level line, if given.
        share: Of the repetitions, in (0, 1].

    Raises:
        ArgumentError: ``share`` is no such number.
    """
    if not 0 < share <= 1:
        raise ArgumentError(f"share must be above 0 and at most 1, got {share!r}.")
    ax = new_axes(ax)
    for name, w in log_weights.items():
        runs = w.detach().cpu().double().reshape(len(w), -1)
        counts = np.arange(1, len(runs) + 1)
        estimates = runs.logcumsumexp(0).numpy() - np.log(counts)[:, None]
        # Of values that occur: between -inf, of draws that cannot explain x, and a number there is nothing.
        levels = [(1 - share) / 2, 0.5, (1 + share) / 2]
        low, middle, high = np.quantile(estimates, levels, axis=1, method="nearest")
        if runs.shape[1] > 1:
            ax.fill_between(counts, low, high, color=COLORS.get(name), alpha=0.25, linewidth=0)
        ax.plot(counts, middle, color=COLORS.get(name), label=f"{name}: {middle[-1]:.1f} at K = {len(runs):,}")
    if elbo is not None:
        longest = max(map(len, log_weights.values()))
        ax.plot([1, longest], [elbo] * 2, color=GREY, linestyle=":", label=f"ELBO: {elbo:.1f}")
    ax.set_xscale("log")
    ax.set(xlabel="samples K", ylabel="estimate of log p(x), nats", title="What they say log p(x) is")
    ax.legend(frameon=False, loc="lower right")
    return ax
