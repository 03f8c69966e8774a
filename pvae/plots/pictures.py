"""Data that are images: as they are, as a model gives them back, and beside their neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pvae.errors import DataError, positive_int
from pvae.plots.canvas import WIDTH, as_labels, as_tensor, get_ink, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["images", "name_columns", "name_rows", "neighbors", "reconstructions", "samples", "tile"]

_WRONG = "#B00020"


def images(x: Tensor, ax: Axes | None = None, *, columns: int = 8) -> Axes:
    """Draws a grid of images, row by row: grey ones dark on light, as ink on paper, and coloured ones as they are.

    Args:
        x: Shape ``(N, H, W)``, ``(N, 1, H, W)`` or, in colours, ``(N, 3, H, W)``, in [0, 1].
        ax: Where to draw; a new figure if left out.
        columns: Images in a row.

    Raises:
        DataError: x has another shape.
    """
    x = _images("x", x)
    columns = min(positive_int("columns", columns), len(x))
    rows, (height, width) = math.ceil(len(x) / columns), x.shape[1:3]
    return tile(x, new_axes(ax, figsize=(WIDTH, WIDTH * rows * height / (columns * width))), columns)


def samples(x: Tensor, ax: Axes | None = None, *, columns: int = 8) -> Axes:
    """Draws samples of a model, as from ``vae.sample``, as `images` does."""
    shown = _images("x", x)
    height, width = shown.shape[1:3]
    in_row = min(positive_int("columns", columns), len(shown))
    tall = WIDTH * math.ceil(len(shown) / in_row) * height / (in_row * width)
    ax = images(x, new_axes(ax, figsize=(WIDTH, 0.4 + tall)), columns=columns)
    ax.set_title("z from the prior, x from p(x | z)")
    return ax


def reconstructions(x: Tensor, reconstructed: Tensor, ax: Axes | None = None) -> Axes:
    """Draws data in the upper row and their reconstructions below, each of a shape that `images` takes."""
    above, below = _images("x", x), _images("reconstructed", reconstructed)
    if above.shape != below.shape:
        raise DataError(
            f"data and reconstructions must go in pairs, got {tuple(x.shape)}, {tuple(reconstructed.shape)}."
        )
    height, width = above.shape[1:3]
    ax = new_axes(ax, figsize=(WIDTH, 0.2 + 1.7 * WIDTH * height / (len(x) * width)))
    tile(torch.cat([above, below]), ax, len(x))
    name_rows(ax, ["x", "E[x | z]"], height)
    return ax


def neighbors(
    queries: Tensor,
    found: Tensor,
    ax: Axes | None = None,
    *,
    labels: Sequence[Any] | Tensor | None = None,
    found_labels: Any = None,
) -> Axes:
    """Draws queries of an image search, one in a row, and what was found for each beside it.

    Args:
        queries: Q images, of a shape that `images` takes.
        found: The k nearest of each, nearest first, shape ``(Q, k, *image)``.
        ax: Where to draw; a new figure if left out.
        labels: Of the queries, shape ``(Q,)``: what is found with another label is crossed out, and rows are named by
            them.
        found_labels: Of what was found, shape ``(Q, k)``.

    Raises:
        DataError: The shapes do not fit, or only one of the labels is given.
    """
    rows = _images("queries", queries)
    if found.dim() != queries.dim() + 1 or found.shape[:1] + found.shape[2:] != queries.shape or not found.shape[1]:
        raise DataError(
            f"found must have shape (Q, k, *image) for queries {tuple(queries.shape)}, got {tuple(found.shape)}."
        )
    if (labels is None) != (found_labels is None):
        raise DataError("labels and found_labels go together: pass both, or neither.")
    count, (height, width) = found.shape[1], rows.shape[1:3]
    beside = _images("found", found.flatten(0, 1)).unflatten(0, (len(rows), count))
    blank = torch.full_like(rows, torch.nan)  # sets the query apart
    every = torch.cat([rows[:, None], blank[:, None], beside], 1)
    ax = new_axes(ax, figsize=(WIDTH, 0.5 + WIDTH * len(rows) * height / ((count + 2) * width)))
    tile(every.flatten(0, 1), ax, count + 2)
    places = [width / 2, 2 * (width + 1) + (count * (width + 1) - 1) / 2]
    name_columns(ax, places, ["query", f"{count} nearest" if count > 1 else "nearest"])
    if labels is not None:
        own, theirs = as_labels(labels), as_labels(found_labels)
        if own.shape != (len(rows),) or theirs.shape != (len(rows), count):
            raise DataError(f"labels must have shape {(len(rows),)}, found_labels {(len(rows), count)}.")
        name_rows(ax, [str(label) for label in own.tolist()], height)
        for row, column in np.argwhere(theirs != own[:, None]):
            left, top = (column + 2) * (width + 1) - 0.5, row * (height + 1) - 0.5
            ax.plot([left, left + width], [top + height, top], color=_WRONG, linewidth=1.5)
    return ax


def tile(x: Tensor, ax: Axes, columns: int) -> Axes:
    """Draws images ``(N, H, W)`` or ``(N, H, W, 3)`` in rows; lines between them, unused places and images of nan are
    left transparent.
    """
    rows, (height, width) = math.ceil(len(x) / columns), x.shape[1:3]
    canvas = torch.full((rows * (height + 1) - 1, columns * (width + 1) - 1, *x.shape[3:]), torch.nan)
    for i, image in enumerate(x):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        canvas[top : top + height, left : left + width] = 1 - image if x.dim() == 3 else image.clamp(0, 1)
    if x.dim() == 4:
        canvas = torch.cat([canvas.nan_to_num(), (~canvas[..., :1].isnan()).float()], -1)
    shown: Any = canvas.numpy() if x.dim() == 4 else np.ma.masked_invalid(canvas.numpy())
    ax.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    return ax


def name_rows(ax: Axes, names: Sequence[str], height: int) -> None:
    """Names the rows of tiles of a height, at their left."""
    _show_ticks_only(ax)
    ax.set_yticks([i * (height + 1) + (height - 1) / 2 for i in range(len(names))], names)


def name_columns(ax: Axes, places: Sequence[float], names: Sequence[str], *, below: bool = False) -> None:
    """Names places on the horizontal axis of tiles, in pixels, above or below them."""
    _show_ticks_only(ax)
    ax.set_xticks(places, names)
    ax.tick_params(axis="x", labelbottom=below, labeltop=not below)


def _show_ticks_only(ax: Axes) -> None:
    """Letters beside tiles, whose Axes have neither frame nor ticks."""
    if not ax.axison:
        ax.set_axis_on()
        ax.set(xticks=[], yticks=[])
        ax.tick_params(length=0, labelcolor=get_ink(ax))
        ax.spines[:].set_visible(False)


def _images(name: str, x: Tensor) -> Tensor:
    """Shape ``(N, H, W)`` if grey, ``(N, H, W, 3)`` if coloured."""
    x = as_tensor(x).float()
    x = x[:, 0] if x.dim() == 4 and x.shape[1] == 1 else x
    x = x.permute(0, 2, 3, 1) if x.dim() == 4 and x.shape[1] == 3 else x
    if not (x.dim() == 3 or (x.dim() == 4 and x.shape[-1] == 3)) or not x.numel():
        raise DataError(
            f"images must have shape (N, H, W), (N, 1, H, W) or (N, 3, H, W); {name} has {tuple(x.shape)}. "
            "Vectors whose entries are pixels can be drawn as x.reshape(N, H, W)."
        )
    return x
