"""Where plots are drawn, and in which colours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pvae.errors import PVAEError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLORS", "GREY", "label", "new_axes"]

# Two colours that stay apart for colour-blind readers and in grey print: Wong, 2011, Points of View: Color blindness.
COLORS = {"guide": "#0072B2", "prior": "#D55E00"}
GREY = "0.35"


def label(name: str, count: int) -> str:
    """How a legend names so many draws."""
    return f"{name}: {count:,} samples"


def new_axes(ax: Axes | None) -> Axes:
    """``ax``, or those of a new figure where there are none."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except Exception as error:  # a broken installation fails in many ways
        raise PVAEError(f"to draw takes matplotlib, which cannot be imported: {error}.") from error
    return plt.subplots(layout="constrained")[1]
