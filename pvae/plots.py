"""Results to matplotlib Axes. Nothing here trains or samples; every function draws what it is given and returns it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pvae.errors import ArgumentError, DataError, PVAEError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["images", "latent_plane", "learning_curve", "reconstructions", "running_estimate", "weight_histogram"]

# Two colours that stay apart for colour-blind readers and in grey print: Wong, 2011, Points of View: Color blindness.
COLORS = {"guide": "#0072B2", "prior": "#D55E00"}
_GREY = "0.35"


def learning_curve(history: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Draws the ELBO of each epoch, as in ``FitResult.history``, in nats per datum."""
    ax = _axes(ax)
    labels = {"elbo": "training (while learning)", "objective": "training objective", "validation_elbo": "validation"}
    styles = {"validation_elbo": {"color": COLORS["guide"], "marker": "o", "markersize": 4}}
    for name, label in labels.items():
        if name in history:
            epochs = np.arange(1, len(history[name]) + 1)
            ax.plot(epochs, history[name], label=label, **styles.get(name, {"color": _GREY, "linestyle": "--"}))
    ax.set(xlabel="epoch", ylabel="ELBO, nats per datum", title="Learning curve")
    ax.locator_params(axis="x", integer=True)
    ax.legend(frameon=False)
    return ax


def images(x: Tensor, ax: Axes | None = None, *, columns: int = 8) -> Axes:
    """Draws a grid of grey images, row by row.

    Args:
        x: Shape ``(N, H, W)`` or ``(N, 1, H, W)``, in [0, 1].
        ax: Where to draw; a new figure if left out.
        columns: Images in a row.
    """
    ax = _axes(ax)
    x = _grey(x)
    columns = min(columns, len(x))
    rows, (height, width) = math.ceil(len(x) / columns), x.shape[1:]
    # One blank line between images; unused places stay blank.
    canvas = torch.ones(rows * (height + 1) - 1, columns * (width + 1) - 1)
    for i, image in enumerate(x):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        canvas[top : top + height, left : left + width] = 1 - image
    ax.imshow(canvas.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    return ax


def reconstructions(x: Tensor, reconstructed: Tensor, ax: Axes | None = None) -> Axes:
    """Draws data in the upper row and their reconstructions below, each of shape ``(N, H, W)`` or ``(N, 1, H, W)``."""
    above, below = _grey(x), _grey(reconstructed)
    if above.shape != below.shape:
        raise DataError(
            f"data and reconstructions must go in pairs, got {tuple(x.shape)}, {tuple(reconstructed.shape)}."
        )
    ax = images(torch.cat([above, below]), ax, columns=len(x))
    ax.set_title("Above: test images. Below: E[x | z] at the guide's mean")
    return ax


def latent_plane(samples: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """Draws where samples of z fall in a plane of the latent space.

    Args:
        samples: Name (``"prior"``, ``"guide"``) to points, shape ``(K, 2)``.
        ax: Where to draw; a new figure if left out.
    """
    ax = _axes(ax)
    for name, z in samples.items():
        z = z.detach().cpu()
        style: dict[str, Any] = {"s": 6, "alpha": 0.5, "linewidths": 0, "color": COLORS.get(name), "rasterized": True}
        ax.scatter(z[:, 0], z[:, 1], label=_label(name, len(z)), **style)
    ax.set(xlabel="latent dimension $i$", ylabel="latent dimension $j$", title="Where samples of z fall")
    ax.set_aspect("equal", "datalim")
    ax.legend(markerscale=2, loc="upper right", framealpha=0.8, edgecolor="none")  # points may be below it
    return ax


def weight_histogram(log_weights: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """Draws how the log-weights of one datum are distributed under each proposal.

    Args:
        log_weights: Name (``"prior"``, ``"guide"``) to log-weights, nats, shape ``(K,)``. Those of ``-inf``, of draws
            that cannot explain x at all, are in no bar, but are samples of which the bars are shares.
        ax: Where to draw; a new figure if left out.
    """
    ax = _axes(ax)
    values = {name: w.detach().cpu().double().numpy() for name, w in log_weights.items()}
    finite = {name: v[np.isfinite(v)] for name, v in values.items()}
    drawn = np.concatenate([np.empty(0), *finite.values()])
    bins = np.linspace(drawn.min(), drawn.max(), 80) if len(drawn) else np.arange(2.0)
    for name, value in finite.items():
        every = len(values[name])
        style: dict[str, Any] = {"alpha": 0.7, "color": COLORS.get(name), "label": _label(name, every)}
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
    ax = _axes(ax)
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
        ax.plot([1, longest], [elbo] * 2, color=_GREY, linestyle=":", label=f"ELBO: {elbo:.1f}")
    ax.set_xscale("log")
    ax.set(xlabel="samples K", ylabel="estimate of log p(x), nats", title="What they say log p(x) is")
    ax.legend(frameon=False, loc="lower right")
    return ax


def _label(name: str, count: int) -> str:
    return f"{name}: {count:,} samples"


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except Exception as error:  # a broken installation fails in many ways
        raise PVAEError(f"to draw takes matplotlib, which cannot be imported: {error}.") from error
    return plt.subplots(layout="constrained")[1]


def _grey(x: Tensor) -> Tensor:
    x = x.detach().cpu().float()
    x = x[:, 0] if x.dim() == 4 and x.shape[1] == 1 else x
    if x.dim() != 3 or not len(x):
        raise DataError(f"images must have shape (N, H, W) or (N, 1, H, W), got {tuple(x.shape)}.")
    return x
