"""Where codes and draws of z fall."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pvae.plots.canvas import COLORS, label, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["latent_plane"]


def latent_plane(samples: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """Draws where samples of z fall in a plane of the latent space.

    Args:
        samples: Name (``"prior"``, ``"guide"``) to points, shape ``(K, 2)``.
        ax: Where to draw; a new figure if left out.
    """
    ax = new_axes(ax)
    for name, z in samples.items():
        z = z.detach().cpu()
        style: dict[str, Any] = {"s": 6, "alpha": 0.5, "linewidths": 0, "color": COLORS.get(name), "rasterized": True}
        ax.scatter(z[:, 0], z[:, 1], label=label(name, len(z)), **style)
    ax.set(xlabel="latent dimension $i$", ylabel="latent dimension $j$", title="Where samples of z fall")
    ax.set_aspect("equal", "datalim")
    ax.legend(markerscale=2, loc="upper right", framealpha=0.8, edgecolor="none")  # points may be below it
    return ax
