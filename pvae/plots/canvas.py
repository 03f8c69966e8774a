"""Where plots are drawn, in which colours, and how lines are named at their ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from pvae.errors import ArgumentError, DataError, PVAEError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLORS",
    "as_array",
    "as_labels",
    "as_tensor",
    "check_result",
    "count_label",
    "get_ink",
    "name_lines",
    "name_sets",
    "new_axes",
    "pick_color",
    "show_number",
    "subplots",
]

#: What each colour means, in every plot. They stay apart for colour-blind readers, after Wong, 2011, Points of View:
#: Color blindness, and each has a contrast of at least 3:1 to a white page and to a dark one. The truth, and all that
#: is neither, is drawn in the colour of the Axes' own letters.
COLORS = {"guide": "#0072B2", "prior": "#C95800", "refined": "#2E8B3D", "data": "#B3589A"}
# A grey of 4.5:1 to white and of 4:1 to the dark pages of documentation; no grey has 4.5:1 to both.
INK = "#767676"
WIDTH = 4.8  # inches: its letters stay large when a phone makes it as narrow as itself


def subplots(
    rows: int = 1, columns: int = 1, *, figsize: tuple[float, float] | None = None, **options: Any
) -> tuple[Figure, Any]:
    """A figure for light and dark pages: its ground is transparent, and its letters and lines are of a middle grey.

    All plots are drawn on such ones where no Axes are given. Axes that are given keep the looks that they have.

    Args:
        rows: Of Axes.
        columns: Of Axes.
        figsize: Width and height, inches; as narrow as a phone if left out.
        options: As for ``matplotlib.pyplot.subplots``.

    Returns:
        The figure, and one Axes or an array of them, as from ``matplotlib.pyplot.subplots``.
    """
    try:
        import matplotlib.pyplot as plt
    except Exception as error:  # a broken installation fails in many ways
        raise PVAEError(f"to draw takes matplotlib, which cannot be imported: {error}.") from error
    size, options = (
        figsize or (WIDTH * columns**0.5, 0.75 * WIDTH * rows / columns**0.5),
        {"layout": "constrained"} | options,
    )
    figure, axes = plt.subplots(rows, columns, figsize=size, **options)
    figure.set_facecolor("none")
    for ax in np.ravel(axes):
        ax.set_facecolor("none")
        ax.spines[["top", "right"]].set_visible(False)
        for part in (*ax.spines.values(), ax.title, ax.xaxis.label, ax.yaxis.label):
            part.set_color(INK)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_tick_params(which="both", colors=INK)
            axis.get_offset_text().set_color(INK)
    return figure, axes


def new_axes(ax: Axes | None, *, figsize: tuple[float, float] | None = None) -> Axes:
    """``ax``, or those of a new figure where there are none."""
    return subplots(figsize=figsize)[1] if ax is None else ax


def get_ink(ax: Axes) -> Any:
    """The colour of the Axes' letters: what is neither prior nor guide is drawn in it."""
    return ax.xaxis.label.get_color()


def pick_color(name: str, names: Sequence[str]) -> str:
    """What a name is drawn in: by its meaning, or else the next colour that none of ``names`` has by its own."""
    free = [color for known, color in COLORS.items() if known not in names] or list(COLORS.values())
    others = [other for other in names if other not in COLORS]
    return COLORS.get(name) or free[others.index(name) % len(free)]


def count_label(name: str, count: int) -> str:
    """How so many draws are named."""
    return f"{name}: {count:,} samples"


def show_number(value: float, spec: str = "g") -> str:
    """A number with a minus sign that is as long as those on axes."""
    return format(value, spec).replace("-", "\N{MINUS SIGN}")


def name_sets(ax: Axes, location: Literal["upper left", "upper right"]) -> None:
    """A legend without a frame, whose words have the full colours of what is drawn."""
    handles = ax.get_legend_handles_labels()[0]
    legend = ax.legend(frameon=False, loc=location, markerscale=2)
    for handle, drawn, word in zip(handles, legend.legend_handles, legend.get_texts(), strict=True):
        first: Any = handle[0] if isinstance(handle, tuple) else handle
        word.set_color(tuple(np.ravel(first.get_facecolor())[:3]))
        if drawn is not None:
            drawn.set_alpha(1)


def as_array(name: str, values: Any, shape: str) -> np.ndarray:
    """Numbers to draw, of as many dimensions as ``shape``, such as ``"(N, 2)"``, has letters; those that are numerals
    are asked for.
    """
    array = torch.as_tensor(values).detach().cpu().double().numpy()
    sizes = shape.strip("(),").replace(" ", "").split(",")
    fits = array.ndim == len(sizes) and all(
        not size.isdigit() or int(size) == n for size, n in zip(sizes, array.shape, strict=True)
    )
    if not fits or not array.size:
        raise DataError(f"{name} must have shape {shape}, none of them 0; got {tuple(array.shape)}.")
    return array


def name_lines(ax: Axes, names: Iterable[tuple[str, float, Any]], *, gap: float = 0.13) -> None:
    """Names lines at their right ends, in their colours, so that no legend is needed.

    Call it when the limits are final: what ends too close to another is moved apart.

    Args:
        ax: Where they were drawn.
        names: Of each line its words, where it ends on the vertical axis, and its colour.
        gap: The least distance of two, as a share of the Axes' height.
    """
    lower, upper = ax.get_ylim()
    to_share = ax.transData + ax.transAxes.inverted()
    kept = [(to_share.transform((1, y))[1], words, color) for words, y, color in names if np.isfinite(y)]
    places: list[float] = []
    top = 1 - gap / 2  # the highest name, of two lines, ends where the Axes do, below their title
    for share, _, _ in sorted(kept, key=lambda entry: entry[0]):
        places.append(max(min(share, top), places[-1] + gap if places else 0.0))
    over = max(places, default=0.0) - top
    for place, (_, words, color) in zip(places, sorted(kept, key=lambda entry: entry[0]), strict=True):
        style: dict[str, Any] = {"ha": "left", "va": "center", "color": color, "fontsize": "medium"}
        ax.annotate(words, (1.02, place - max(over, 0.0)), xycoords="axes fraction", annotation_clip=False, **style)
    ax.set_ylim(lower, upper)


def as_labels(values: Any) -> np.ndarray:
    """Labels of any kind: whole numbers, words."""
    return np.asarray(as_tensor(values) if isinstance(values, Tensor) else values)


def check_result(name: str, result: Any, attributes: Iterable[str], maker: str) -> None:
    """Raises `ArgumentError` if a result lacks what is drawn of it: it is another function's."""
    missing = [attribute for attribute in attributes if not hasattr(result, attribute)]
    if missing:
        raise ArgumentError(
            f"{name} must be what {maker} returns, got {type(result).__name__}, which has no {', '.join(missing)}."
        )


def as_tensor(values: Any) -> Tensor:
    """Values on the CPU, without gradients."""
    return torch.as_tensor(values).detach().cpu()
