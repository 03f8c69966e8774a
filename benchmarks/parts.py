"""Where the time of an epoch goes: matrix products, elementwise work, the optimizer, data, and Python around all."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from side_by_side import Way
from torch.profiler import ProfilerActivity, profile

from pvae.plots import COLORS, subplots
from pvae.plots.canvas import INK

PARTS = {
    "matrix products": COLORS["guide"],
    "elementwise": COLORS["refined"],
    "optimizer": COLORS["prior"],
    "data": COLORS["data"],
    "Python": "#9A9A9A",
}
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "pvae::addmm", "mkldnn::_linear_pointwise"}
_DATA = {"aten::index_select", "aten::index", "aten::randperm"}


def parts_of(work: Way) -> dict[str, float]:
    """Shares of the time of some work on the CPU, by PyTorch's profiler.

    Python is what lies between operations, the handlers of Pyro with it. The profiler adds about a microsecond to each
    operation, so that shares of many small ones are a little too large.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        work()
        whole = 1e6 * (time.perf_counter() - start)
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in profiler.events() or ():
        seconds[_part(event)] += event.self_cpu_time_total
    seconds["Python"] += max(0.0, whole - sum(seconds.values()))
    total = sum(seconds.values())
    return {part: value / total for part, value in seconds.items()}


def _part(event) -> str:
    """Everything in a step of an optimizer is the optimizer's, its Python included."""
    inside, parent = False, event.cpu_parent
    while parent is not None:
        inside = inside or parent.name.startswith("Optimizer.")
        parent = parent.cpu_parent
    if event.name.startswith("Optimizer.") or inside or event.name == "aten::_fused_adam_":
        return "optimizer"
    if event.name in _PRODUCTS:
        return "matrix products"
    return "data" if event.name in _DATA else "elementwise"


def draw(seconds: Mapping[str, float], shares: Mapping[str, Mapping[str, float]], floor: float, path: Path) -> None:
    """A bar for each way, its parts stacked, beside a line where the products alone end.

    Args:
        seconds: Of an epoch, by way.
        shares: Of the parts, for those ways that could be taken apart; others get a bar in one colour.
        floor: Seconds of the products alone.
        path: Where to write the figure.
    """
    mpl.use("Agg")
    figure, ax = subplots(figsize=(7.5, 0.42 * len(seconds) + 1.4))
    for place, (way, whole) in enumerate(seconds.items()):
        left = 0.0
        for part, color in PARTS.items():
            width = whole * shares[way][part] if way in shares else 0.0
            ax.barh(place, width, left=left, color=color, height=0.7, label=part if place == 0 else None)
            left += width
        if way not in shares:
            ax.barh(place, whole, color="none", edgecolor=INK, height=0.7)
        ax.text(whole, place, f" {whole:.2f}", va="center", color=INK)
    ax.vlines(floor, -0.6, len(seconds) - 0.4, color=INK, linewidth=1, linestyle="--")
    ax.text(floor, -0.7, "products alone", ha="center", va="bottom", color=INK)
    ax.set_yticks(range(len(seconds)), list(seconds))
    ax.set_ylim(len(seconds) - 0.4, -1.2)
    ax.set_xlabel("seconds an epoch")
    ax.set_xlim(0, 1.1 * max(seconds.values()))
    figure.legend(loc="outside upper center", ncols=len(PARTS), frameon=False, labelcolor=INK, handlelength=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
