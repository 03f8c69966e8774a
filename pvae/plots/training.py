"""How training went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pvae.errors import DataError
from pvae.plots.canvas import COLORS, check_result, get_ink, name_lines, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pvae.svi import FitResult

__all__ = ["learning_curve"]

_LABELS = {"elbo": "training (while learning)", "objective": "training objective", "validation_elbo": "validation"}


def learning_curve(history: Mapping[str, Any] | FitResult, ax: Axes | None = None) -> Axes:
    """Draws the ELBO of each epoch, in nats per datum.

    Args:
        history: What `pvae.fit` returns, or its ``history``: of ``"elbo"``, ``"objective"`` and ``"validation_elbo"``
            those that are there, shape ``(epochs,)`` each.
            With ``"distortion"`` and ``"rate"``, nats per datum, ``-distortion`` is drawn above the ELBO, and the rate
            as the band between the two: ``ELBO = -distortion - rate``.
        ax: Where to draw; a new figure if left out.

    Raises:
        ArgumentError: It is neither.
        DataError: The history has none of these, or no epoch.
    """
    if not isinstance(history, Mapping):
        check_result("history", history, ["history"], "pvae.fit")
    curves: Mapping[str, Any] = history if isinstance(history, Mapping) else history.history
    drawn = {name: np.asarray(curves[name], float) for name in _LABELS if len(curves.get(name, ()))}
    has_rate = bool(len(curves.get("rate", ())) and len(curves.get("distortion", ())))
    if not drawn and not has_rate:
        raise DataError(f"history must have an epoch of one of {', '.join(_LABELS)}; it has {sorted(curves)}.")
    ax = new_axes(ax)
    ink, names = get_ink(ax), []
    if has_rate:
        names += _draw_rate(ax, np.asarray(curves["rate"], float), np.asarray(curves["distortion"], float))
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
