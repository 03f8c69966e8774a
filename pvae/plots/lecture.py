"""Why the guide beats the prior, as it is drawn on a blackboard: one latent, one observed number."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pvae.errors import ArgumentError, DataError
from pvae.plots.canvas import COLORS, WIDTH, as_array, as_tensor, get_ink, show_number, subplots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["prior_against_guide"]

_FINE = 301  # points along an axis: a pixel or two each


def prior_against_guide(
    log_prior: Callable[[Tensor], Tensor],
    log_likelihood: Callable[[Tensor, Tensor], Tensor],
    log_guide: Callable[[Tensor], Tensor],
    x: float,
    *,
    prior_draws: Tensor,
    guide_draws: Tensor,
    x_range: tuple[float, float],
    z_range: tuple[float, float] = (-3.5, 3.5),
    log_px: float | None = None,
    axes: Any = None,
) -> np.ndarray:
    r"""Draws why a guide's draws say more of p(x) than the prior's, for one latent z and one observed number x.

    Above, the joint density p(x, z), in which draws of z are slices: the prior's are spread over all that z may be, the
    guide's lie where the observed x comes from. Beside it p(z) and q(z|x). Below, what each slice says: p(x|z) for each
    draw, and how likely the observed x is under it. ``log p(x)`` is the log of the mean of
    :math:`w = p(x|z) p(z) / q(z|x)` over guide's draws, and of p(x|z) over the prior's.

    Args:
        log_prior: log p(z) of z, elementwise.
        log_likelihood: log p(x|z) of x and z of one shape, elementwise, such as
            ``lambda x, z: torch.distributions.Normal(z, 0.5).log_prob(x)``.
        log_guide: log q(z|x) of z at the observed x, elementwise.
        x: What was observed.
        prior_draws: A few draws of z from the prior, shape ``(K,)``; three are easily told apart.
        guide_draws: A few from the guide.
        x_range: What to show of x.
        z_range: What to show of z.
        log_px: log p(x), if known; it stands in the title.
        axes: Four to draw on; a new figure if left out.

    Returns:
        Four Axes: the joint density, the densities of z beside it, the prior's slices and the guide's.

    Raises:
        ArgumentError: Axes are given, but not four.
        DataError: Draws are no vector, a density has another shape than what it is of, or x is out of ``x_range``.
    """
    draws = {
        "prior": as_array("prior_draws", prior_draws, "(K,)"),
        "guide": as_array("guide_draws", guide_draws, "(K,)"),
    }
    if axes is not None and np.size(axes) != 4:
        raise ArgumentError(f"axes must be four, got {np.size(axes)}.")
    if not x_range[0] < x < x_range[1]:
        raise DataError(f"x must be within x_range {x_range}, got {x}.")
    xs = torch.linspace(*x_range, _FINE, dtype=torch.float64)
    zs = torch.linspace(*z_range, _FINE, dtype=torch.float64)
    log_densities = {"prior": log_prior, "guide": log_guide}
    joint = _evaluate("log_likelihood", log_likelihood, xs.expand(_FINE, -1), zs[:, None].expand(-1, _FINE))
    joint += _evaluate("log_prior", log_prior, zs)[:, None]
    joint_ax, beside, *below = _four_axes() if axes is None else np.ravel(axes)
    _draw_joint(joint_ax, np.exp(joint), (*x_range, *z_range), x, draws)
    joint_ax.set_title("p(x, z)" if log_px is None else f"p(x, z), where log p(x) = {show_number(log_px, '.2f')}")
    for name, log_density in log_densities.items():
        _draw_beside(beside, name, zs.numpy(), np.exp(_evaluate(f"log_{name}", log_density, zs)))
    for ax, (name, z) in zip(below, draws.items(), strict=True):
        at = torch.from_numpy(z)
        slices = _evaluate("log_likelihood", log_likelihood, xs.expand(len(z), -1), at[:, None].expand(-1, _FINE))
        heights = _evaluate("log_likelihood", log_likelihood, torch.full_like(at, x), at)
        log_w = heights + _evaluate("log_prior", log_prior, at) - _evaluate(f"log_{name}", log_densities[name], at)
        _draw_slices(ax, name, xs.numpy(), np.exp(slices), x, np.exp(heights))
        said = show_number(np.logaddexp.reduce(log_w) - np.log(len(log_w)), ".2f")
        words = f"{len(z)} draws of\nthe {name} say\nlog p(x) =\n{said}"
        place: dict[str, Any] = {"xycoords": "axes fraction", "va": "center", "in_layout": axes is not None}
        ax.annotate(words, (1.04, 0.5), color=COLORS[name], **place)
    tallest = max(ax.get_ylim()[1] for ax in below)
    for ax in below:
        ax.set_ylim(0, tallest)
    below[-1].set_xlabel("x")
    return np.array([joint_ax, beside, *below])


def _four_axes() -> tuple[Any, ...]:
    sizes: dict[str, Any] = {"height_ratios": [2.2, 1, 1], "width_ratios": [3, 1.1]}
    axes = subplots(3, 2, figsize=(WIDTH, 1.35 * WIDTH), sharex="col", **sizes)[1]
    axes[1, 1].remove()
    axes[2, 1].remove()
    axes[0, 1].sharey(axes[0, 0])
    axes[0, 1].tick_params(labelleft=False, labelbottom=True)
    return axes[0, 0], axes[0, 1], axes[1, 0], axes[2, 0]


def _draw_joint(ax: Axes, joint: np.ndarray, extent: tuple[float, ...], x: float, draws: dict[str, np.ndarray]) -> None:
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    ink = get_ink(ax)
    # Nothing where the density is 0, so that the page is seen, be it light or dark.
    shades = LinearSegmentedColormap.from_list("ink", [(*to_rgb(ink), 0.0), (*to_rgb(ink), 1.0)])
    ax.imshow(joint, origin="lower", extent=extent, aspect="auto", cmap=shades, vmin=0)  # pyright: ignore[reportArgumentType]
    for name, z in draws.items():
        ax.hlines(z, extent[0], extent[1], color=COLORS[name], linewidth=1.2)
        ax.plot(np.full(len(z), x), z, "o", color=COLORS[name], markersize=5)
    ax.axvline(x, color=ink, linestyle="--", linewidth=1)
    ax.annotate(
        "observed x", (x, extent[3]), xytext=(3, -3), textcoords="offset points", color=ink, va="top", in_layout=False
    )
    ax.set(xlim=extent[:2], ylim=extent[2:], ylabel="z")


def _draw_beside(ax: Axes, name: str, z: np.ndarray, density: np.ndarray) -> None:
    words = {"prior": "p(z)", "guide": "q(z | x)"}[name]
    ax.fill_betweenx(z, density, color=COLORS[name], alpha=0.3, linewidth=0)
    ax.plot(density, z, color=COLORS[name], label=words)
    # The guide's at its upper end, the prior's at its lower one, where the two are apart.
    seen = np.flatnonzero(density > 0.1 * density.max())
    shown, place = (seen[-1], (3, 5)) if name == "guide" else (seen[0], (3, -5))
    ax.annotate(
        words, (density[shown], z[shown]), xytext=place, textcoords="offset points", color=COLORS[name], va="center"
    )
    ax.set_xlim(0, max(ax.get_xlim()[1], 1.1 * density.max()))
    ax.set_xlabel("density")


def _draw_slices(ax: Axes, name: str, x: np.ndarray, slices: np.ndarray, observed: float, heights: np.ndarray) -> None:
    for values in slices:
        ax.plot(x, values, color=COLORS[name], linewidth=1.2)
        ax.fill_between(x, values, color=COLORS[name], alpha=0.12, linewidth=0)
    ax.plot(np.full(len(heights), observed), heights, "o", color=COLORS[name], markersize=5)
    ax.axvline(observed, color=get_ink(ax), linestyle="--", linewidth=1)
    ax.set_ylim(0, 1.15 * slices.max())
    ax.set(xlim=(x[0], x[-1]), ylabel="p(x | z)")


def _evaluate(name: str, log_density: Callable[..., Tensor], *at: Tensor) -> np.ndarray:
    """The log-density elementwise at points of one shape."""
    values = as_tensor(log_density(*at)).double()
    if values.shape != at[0].shape or values.isnan().any():
        raise DataError(
            f"{name} must give a number for each of its points, shape {tuple(at[0].shape)}; it gave "
            f"{'nan' if values.isnan().any() else tuple(values.shape)}."
        )
    return values.numpy()
