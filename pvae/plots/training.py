"""How training went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pvae.errors import DataError
from pvae.plots.canvas import COLORS, get_ink, name_lines, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["learning_curve"]

_LABELS = {"elbo": "training (while learning)", "objective": "training objective", "validation_elbo": "validation"}


def learning_curve(history: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Draws the ELBO of each epoch, as in ``FitResult.history``, in nats per datum.

    Args:
        history: ``"elbo"``, ``"objective"``, ``"validation_elbo"``, those that are there, shape ``(epochs,)`` each.
            With ``"distortion"`` and ``"rate"``, nats per datum, ``-distortion`` is drawn above the ELBO, and the rate
            as the band between the two: ``ELBO = -distortion - rate``.
        ax: Where to draw; a new figure if left out.

    Raises:
        DataError: The history has none of these, or no epoch.
    """
    drawn = {name: np.asarray(history[name], float) for name in _LABELS if len(history.get(name, ()))}
    if not drawn and not len(history.get("rate", ())):
        raise DataError(f"history must have an epoch of one of {', '.join(_LABELS)}; it has {sorted(history)}.")
    ax = new_axes(ax)
    ink, names = get_ink(ax), []
    if len(history.get("rate", ())) and len(history.get("distortion", ())):
        names += _draw_rate(ax, np.asarray(history["rate"], float), np.asarray(history["distortion"], float))
    for name, values in drawn.items():
        style: dict[str, Any] = {"color": ink, "linestyle": "--"}
        if name == "validation_elbo":
            style = {"color": COLORS["guide"], "marker": "o", "markersize": 3}
        ax.plot(np.arange(1, len(values) + 1), values, label=_LABELS[name], **style)
        names.append((_LABELS[name].partition(" ")[0], values[-1], style["color"]))
    ax.set(xlabel="epoch", ylabel="ELBO, nats per datum", title="Learning curve")
    ax.locator_params(axis="x", integer=True)
    name_lines(ax, names)
    return ax


def _draw_rate(ax: Axes, rate: np.ndarray, distortion: np.ndarray) -> list[tuple[str, float, Any]]:
    epochs = np.arange(1, len(rate) + 1)
    ax.plot(epochs, -distortion, color=COLORS["data"], label="-distortion")
    ax.fill_between(
        epochs, -distortion - rate, -distortion, color=COLORS["guide"], alpha=0.2, linewidth=0, label="rate"
    )
    middle = -distortion[-1] - rate[-1] / 2
    return [("\N{MINUS SIGN}distortion", -distortion[-1], COLORS["data"]), ("rate", middle, COLORS["guide"])]
