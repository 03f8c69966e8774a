"""Weights of importance sampling, the estimates that they make, and which of these to believe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pvae.errors import DataError, real_number
from pvae.evidence import KHAT_LIMIT, MIN_ESS, EvidenceEstimate
from pvae.plots.canvas import (
    COLORS,
    check_result,
    count_label,
    get_ink,
    name_lines,
    name_sets,
    new_axes,
    pick_color,
    show_number,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["reliability", "running_estimate", "weight_histogram"]

_LEAST_ESS = 0.7  # is drawn, on an axis of logarithms: of weights that are not all 0 it is at least 1


def weight_histogram(log_weights: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """Draws how the log-weights of one datum are distributed under each proposal.

    Args:
        log_weights: Name (``"prior"``, ``"guide"``) to log-weights, nats, shape ``(K,)``. Those of ``-inf``, of draws
            that cannot explain x at all, are in no bar, but are samples of which the bars are shares.
        ax: Where to draw; a new figure if left out.
    """
    values = {name: w.detach().cpu().double().numpy().ravel() for name, w in log_weights.items()}
    if not all(len(value) for value in values.values()) or not values:
        raise DataError("log_weights must name a proposal or more, each with a log-weight at least.")
    ax = new_axes(ax)
    finite = {name: v[np.isfinite(v)] for name, v in values.items()}
    drawn = np.concatenate(list(finite.values()))
    bins = np.linspace(drawn.min(), drawn.max(), 80) if len(drawn) else np.arange(2.0)
    for name, value in finite.items():
        every, color = len(values[name]), pick_color(name, list(values))
        style: dict[str, Any] = {"alpha": 0.7, "color": color, "label": count_label(name, every)}
        ax.hist(value, bins=bins.tolist(), weights=np.full(len(value), 1 / every), **style)
    ax.set(xlabel="log w, nats", ylabel="share of samples", title="How well they explain x")
    if len(drawn):
        ax.set_yscale("log")
        lower, upper = ax.get_ylim()
        ax.set_ylim(lower, upper * (upper / lower) ** (0.1 * len(values)))  # room for names
        ax.set_yticks([tick for tick in ax.get_yticks() if lower <= tick <= 1])
        ax.set_yticks([], minor=True)
    name_sets(ax, "upper left")
    return ax


def running_estimate(
    log_weights: Mapping[str, Tensor],
    ax: Axes | None = None,
    *,
    elbo: float | None = None,
    truth: float | None = None,
    share: float = 0.8,
) -> Axes:
    """Draws the estimate of log p(x) of one datum from its first K log-weights, ``log(1/K sum_k w_k)``, for growing K.

    One run of draws says little of a next one: an estimate climbs where a rare draw happens to come. Of several
    repetitions the median is drawn, in a band that holds the middle ``share`` of them.

    Args:
        log_weights: Name (``"prior"``, ``"guide"``) to log-weights in the order they were drawn, nats, shape ``(K,)``,
            or ``(K, R)`` for R repetitions.
        ax: Where to draw; a new figure if left out.
        elbo: Drawn as a level line, if given.
        truth: log p(x), from a pair in closed form or a better estimate; drawn as a level line, if given.
        share: Of the repetitions, in (0, 1].

    Raises:
        ArgumentError: ``share`` is no such number.
    """
    share = real_number("share", share, above=0, most=1)
    if not log_weights or not all(map(len, log_weights.values())):
        raise DataError("log_weights must name a proposal or more, each with a log-weight at least.")
    ax = new_axes(ax)
    longest, ends = max(map(len, log_weights.values())), []
    for name, w in log_weights.items():
        runs, color = w.detach().cpu().double().reshape(len(w), -1), pick_color(name, list(log_weights))
        counts = np.arange(1, len(runs) + 1)
        estimates = runs.logcumsumexp(0).numpy() - np.log(counts)[:, None]
        # Of values that occur: between -inf, of draws that cannot explain x, and a number there is nothing.
        levels = [(1 - share) / 2, 0.5, (1 + share) / 2]
        low, middle, high = np.quantile(estimates, levels, axis=1, method="nearest")
        if runs.shape[1] > 1:
            ax.fill_between(counts, low, high, color=color, alpha=0.25, linewidth=0)
        ax.plot(counts, middle, color=color, label=f"{name}: {middle[-1]:.1f} at K = {len(runs):,}")
        ends.append((f"{name}\n{show_number(middle[-1], '.1f')}", middle[-1], color))
    for name, level, style in (("ELBO", elbo, ":"), ("truth", truth, "--")):
        if level is not None:
            ax.plot([1, longest], [level] * 2, color=get_ink(ax), linestyle=style, label=f"{name}: {level:.1f}")
            ends.append((f"{name}\n{show_number(level, '.1f')}", level, get_ink(ax)))
    ax.set_xscale("log")
    ax.set(xlabel="samples K", ylabel="estimate of log p(x), nats", title="What they say log p(x) is")
    name_lines(ax, ends, gap=0.15)
    return ax


def reliability(estimate: EvidenceEstimate, ax: Axes | None = None) -> Axes:
    """Draws Pareto k-hat and effective sample size of each datum: those to the right of the line, or below the other,
    have no answer to be believed, nor have those of which `EvidenceEstimate.withheld` says why.

    Args:
        estimate: Of any number of data, from `pvae.log_evidence`. A k-hat of inf, -inf or nan is drawn at the margin,
            and so are data that no draw explains, which have 0 effective samples.
        ax: Where to draw; a new figure if left out.

    Raises:
        ArgumentError: It is another function's result.
    """
    check_result("estimate", estimate, ("khat", "ess", "withheld", "proposal"), "pvae.log_evidence")
    ax = new_axes(ax)
    khat, ess = estimate.khat.double().numpy(), estimate.ess.double().clamp(min=_LEAST_ESS).numpy()
    finite = khat[np.isfinite(khat)]
    left, right = min([-0.2, *finite]) - 0.15, max([1.2, *finite]) + 0.15
    places = np.clip(np.nan_to_num(khat, nan=right, posinf=right, neginf=left), left, right)
    bad = np.array([bool(reason) for reason in estimate.withheld])
    color, ink = COLORS.get(estimate.proposal, COLORS["guide"]), get_ink(ax)
    style: dict[str, Any] = {"s": float(np.clip(4000 / len(khat), 8, 40)), "rasterized": True}
    ax.scatter(places[~bad], ess[~bad], color=color, linewidths=0, alpha=0.7, label="to be believed", **style)
    ax.scatter(places[bad], ess[bad], color=color, marker="x", linewidths=1, label="not to be believed", **style)
    ax.axvline(KHAT_LIMIT, color=ink, linestyle="--", linewidth=1)
    ax.axhline(MIN_ESS, color=ink, linestyle="--", linewidth=1)
    ax.set_yscale("log")
    ax.set_ylim(0.9 * _LEAST_ESS, 1.5 * max(estimate.num_samples, 2 * MIN_ESS))
    ax.set_xlim(left - 0.1, right + 0.1)
    ax.set(
        xlabel=f"Pareto k-hat (above {KHAT_LIMIT}: heavy tails)",
        ylabel=f"effective samples of {estimate.num_samples:,}",
    )
    ax.set_title(
        f"{estimate.proposal}: {int(bad.sum()):,} of {len(khat):,} data (\N{MULTIPLICATION SIGN}) not to be believed"
    )
    return ax
