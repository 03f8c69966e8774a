"""Where codes and draws of z fall, and what each latent dimension holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pvae.errors import DataError, real_number
from pvae.plots.canvas import (
    COLORS,
    WIDTH,
    as_array,
    as_labels,
    as_tensor,
    count_label,
    get_ink,
    name_sets,
    new_axes,
    pick_color,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["kl_per_dimension", "latent_map", "latent_plane"]

# For classes, which are named on the map itself: Petroff, 2021, Accessible Color Sequences for Data Visualization.
_CLASSES = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip


def latent_plane(
    samples: Mapping[str, Tensor],
    ax: Axes | None = None,
    *,
    names: tuple[str, str] = ("latent dimension $i$", "latent dimension $j$"),
) -> Axes:
    """Draws where samples of z fall in a plane of the latent space.

    Args:
        samples: Name (``"prior"``, ``"guide"``) to points, shape ``(K, 2)``.
        ax: Where to draw; a new figure if left out.
        names: Of the two dimensions.
    """
    points = {name: as_array(f"samples of {name}", z, "(K, 2)") for name, z in samples.items()}
    ax = new_axes(ax)
    for name, z in points.items():
        color = pick_color(name, list(points))
        style: dict[str, Any] = {"s": 6, "alpha": 0.5, "linewidths": 0, "color": color, "rasterized": True}
        ax.scatter(z[:, 0], z[:, 1], label=count_label(name, len(z)), **style)
    ax.set(xlabel=names[0], ylabel=names[1], title="Where samples of z fall")
    ax.set_aspect("equal", "datalim")
    name_sets(ax, "upper right")
    return ax


def latent_map(
    codes: Tensor, labels: Any = None, ax: Axes | None = None, *, names: tuple[str, str] = ("$z_0$", "$z_1$")
) -> Axes:
    """Draws codes of data in two latent dimensions, coloured by label; each label stands at the median of its codes.

    Args:
        codes: Such as E[z|x], ``vae.encode(x).mean``, shape ``(N, 2)``.
        labels: Whole numbers or words, shape ``(N,)``; all points in one colour if left out.
        ax: Where to draw; a new figure if left out.
        names: Of the two dimensions.

    Raises:
        DataError: Codes are of other than two dimensions, or labels not as many.
    """
    points = as_tensor(codes).double()
    if points.dim() != 2 or points.shape[1] != 2 or not len(points):
        raise DataError(
            f"a map takes codes of shape (N, 2), got {tuple(points.shape)}. Of more latents choose two, as "
            "codes[:, [i, j]], or project them, as sklearn.decomposition.PCA(2).fit_transform(codes) does."
        )
    given = None if labels is None else as_labels(labels)
    if given is not None and given.shape != (len(points),):
        raise DataError(
            f"labels must have shape ({len(points)},), one for each code; got {given.shape}. Of one-hot rows pass "
            "labels.argmax(1)."
        )
    ax = new_axes(ax, figsize=(WIDTH, WIDTH))
    style: dict[str, Any] = {
        "s": float(np.clip(3e4 / len(points), 3, 20)),
        "linewidths": 0,
        "alpha": 0.7,
        "rasterized": True,
    }
    if given is None:
        ax.scatter(*points.T.numpy(), color=COLORS["data"], **style)
        groups = {}
    else:
        groups = {str(label): points[torch.from_numpy(given == label)] for label in np.unique(given).tolist()}
    colors = {label: _CLASSES[i % len(_CLASSES)] for i, label in enumerate(groups)}
    for label, own in groups.items():
        ax.scatter(*own.T.numpy(), color=colors[label], label=label, **style)
    medians = np.array([own.quantile(0.5, 0).numpy() for own in groups.values()]).reshape(-1, 2)
    extent = max((points.max(0).values - points.min(0).values).max().item(), 1e-9)
    for (label, color), (left, up) in zip(colors.items(), _move_apart(medians, 0.08 * extent), strict=True):
        box = {"boxstyle": "round,pad=0.25", "facecolor": color, "edgecolor": "white"}
        ax.annotate(label, (left, up), ha="center", va="center", color=_over(color), weight="bold", bbox=box)
    ax.set(xlabel=names[0], ylabel=names[1], title=f"Codes of {len(points):,} data")
    ax.set_aspect("equal", "datalim")
    return ax


def kl_per_dimension(kl: Tensor | Any, ax: Axes | None = None, *, threshold: float = 0.01) -> Axes:
    """Draws what each latent dimension adds to KL(q(z|x) || p(z)), the largest first.

    Args:
        kl: Nats per datum, shape ``(D,)``, or ``(N, D)``, of which the mean over the data is drawn; or what has one as
            its ``kl``, as `pvae.diagnostics.latent_usage` gives.
        ax: Where to draw; a new figure if left out.
        threshold: Nats per datum, drawn as a line: the title counts the dimensions above it.

    Raises:
        ArgumentError: ``threshold`` is no number.
        DataError: It has another shape.
    """
    threshold = real_number("threshold", threshold)
    values = as_tensor(getattr(kl, "kl", kl)).double()
    values = as_array("kl", values.mean(0) if values.dim() == 2 and len(values) else values, "(D,)")
    order = np.argsort(-values, kind="stable")
    ax = new_axes(ax)
    ax.bar(np.arange(len(values)), values[order], color=COLORS["guide"], width=0.8)
    ax.axhline(threshold, color=get_ink(ax), linestyle=":", linewidth=1)
    step = max(1, round(len(values) / 12))
    shown = np.arange(0, len(values), step)
    ax.set_xticks(shown, [str(order[i]) for i in shown])
    active, unknown = int((values > threshold).sum()), int(np.isnan(values).sum())
    rest = f", {unknown} unknown" * bool(unknown)
    ax.set(xlabel="latent dimension, by its KL", ylabel="KL, nats per datum")
    ax.set_title(
        f"{active} of {len(values)} dimensions above {threshold:g} nats\n{np.nansum(values):.1f} nats in all{rest}"
    )
    return ax


def _over(color: str) -> str:
    """Black or white, whichever is read on a colour: by its luma, as of ITU-R BT.601, also where a dark page
    makes figures lighter.
    """
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 100 else "white"


def _move_apart(places: np.ndarray, distance: float) -> np.ndarray:
    """Places of names, those nearer to each other than a distance pushed away from each other."""
    places = places + 1e-6 * distance * np.arange(places.size).reshape(places.shape)  # none on top of another
    for _ in range(50):
        between = places[:, None] - places
        lengths = np.linalg.norm(between, axis=-1) + np.eye(len(places))
        short = np.clip(distance - lengths, 0, None) * (1 - np.eye(len(places)))
        places = places + (between / lengths[..., None] * short[..., None]).sum(1) / 2
    return places
