"""Data that are images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pvae.errors import DataError
from pvae.plots.canvas import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["images", "reconstructions"]


def images(x: Tensor, ax: Axes | None = None, *, columns: int = 8) -> Axes:
    """Draws a grid of grey images, row by row.

    Args:
        x: Shape ``(N, H, W)`` or ``(N, 1, H, W)``, in [0, 1].
        ax: Where to draw; a new figure if left out.
        columns: Images in a row.
    """
    ax = new_axes(ax)
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


def _grey(x: Tensor) -> Tensor:
    x = x.detach().cpu().float()
    x = x[:, 0] if x.dim() == 4 and x.shape[1] == 1 else x
    if x.dim() != 3 or not len(x):
        raise DataError(f"images must have shape (N, H, W) or (N, 1, H, W), got {tuple(x.shape)}.")
    return x
