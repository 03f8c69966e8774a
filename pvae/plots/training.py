"""How training went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pvae.plots.canvas import COLORS, GREY, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["learning_curve"]


def learning_curve(history: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Draws the ELBO of each epoch, as in ``FitResult.history``, in nats per datum."""
    ax = new_axes(ax)
    labels = {"elbo": "training (while learning)", "objective": "training objective", "validation_elbo": "validation"}
    styles = {"validation_elbo": {"color": COLORS["guide"], "marker": "o", "markersize": 4}}
    for name, label in labels.items():
        if name in history:
            epochs = np.arange(1, len(history[name]) + 1)
            ax.plot(epochs, history[name], label=label, **styles.get(name, {"color": GREY, "linestyle": "--"}))
    ax.set(xlabel="epoch", ylabel="ELBO, nats per datum", title="Learning curve")
    ax.locator_params(axis="x", integer=True)
    ax.legend(frameon=False)
    return ax
