"""What is lost to the ELBO, whether a guide is calibrated, and how models compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from pvae.errors import DataError, positive_int, real_number
from pvae.plots.canvas import COLORS, WIDTH, as_array, check_result, get_ink, new_axes, show_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["comparison", "gap_decomposition", "ranks"]


class _Gaps(Protocol):
    """What is drawn of `pvae.diagnostics.Gaps`."""

    evidence: Any
    refined: Any
    guide: Any

    @property
    def amortization(self) -> Tensor: ...
    @property
    def amortization_std_error(self) -> Tensor: ...
    @property
    def approximation(self) -> Tensor: ...
    @property
    def approximation_std_error(self) -> Tensor: ...


def gap_decomposition(gaps: _Gaps | Mapping[str, _Gaps], ax: Axes | None = None) -> Axes:
    """Draws what the ELBO loses against log p(x), in the mean over data, from the guide's ELBO up: the amortization gap
    to the best Gaussian of each datum, and from there the approximation gap to log p(x).

    Args:
        gaps: From `pvae.diagnostics.gaps`; or several, by the names of their models.
        ax: Where to draw; a new figure if left out. Errors are two Monte Carlo standard errors to each side.

    Raises:
        ArgumentError: They are another function's results.
        DataError: There are none.
    """
    models = gaps if isinstance(gaps, Mapping) else {"": gaps}
    if not models:
        raise DataError("gaps must name a model at least, got an empty mapping.")
    for one in models.values():
        check_result("gaps", one, ("evidence", "refined", "guide", "amortization"), "pvae.diagnostics.gaps")
    ax = new_axes(ax, figsize=(WIDTH, 1.0 + 1.6 * len(models)))
    rows: list[str] = []
    for name, one in models.items():
        _draw_gaps(ax, one, len(rows))
        bound = "\N{GREATER-THAN OR EQUAL TO} " if one.evidence.unreliable.any() else ""
        rows += [f"{name} ELBO".strip(), "amortization gap", f"approximation gap {bound}".strip(), "log p(x)"]
    ax.set_yticks(range(len(rows)), rows)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.margins(x=0.4)
    ax.locator_params(axis="x", nbins=5)
    ax.set(xlabel="nats per datum, mean over data", title="log p(x) \N{MINUS SIGN} ELBO")
    return ax


def _draw_gaps(ax: Axes, gaps: _Gaps, row: int) -> None:
    ink = get_ink(ax)
    levels = [values.mean().item() for values in (gaps.guide.elbo, gaps.refined.elbo, gaps.evidence.corrected)]
    ends = [
        (row, levels[0], gaps.guide.elbo_std_error, COLORS["guide"]),
        (row + 3, levels[2], gaps.evidence.std_error, ink),
    ]
    parts = [
        (row + 1, levels[0], gaps.amortization, gaps.amortization_std_error, COLORS["guide"]),
        (row + 2, levels[1], gaps.approximation, gaps.approximation_std_error, COLORS["refined"]),
    ]
    for place, left, gap, errors, color in parts:
        width, error = gap.mean().item(), 2 * errors.norm().item() / len(errors)
        ax.barh(place, width, left=left, height=0.55, color=color, alpha=0.5, xerr=error, ecolor=ink, capsize=3)
        words = f"{show_number(width, '.2f')} \N{PLUS-MINUS SIGN} {error:.2f}"
        # Beside the bar, where the next one is not: the first one's at the right, the second's at the left.
        right = place == row + 1
        beside = left + max(width, 0) + error if right else left + min(width, 0)
        style: dict[str, Any] = {"xytext": (5 if right else -5, 0), "ha": "left" if right else "right"}
        ax.annotate(words, (beside, place), textcoords="offset points", color=color, va="center", **style)
    for place, level, errors, color in ends:
        error = 2 * errors.norm().item() / len(errors)
        ax.errorbar(level, place, xerr=error, fmt="o", color=color, capsize=3)
        sign = 1 if place == row else -1  # the lowest at its right, the highest at its left
        reach = level + sign * (0.0 if np.isnan(error) else error)
        side: dict[str, Any] = {"xytext": (8 * sign, 0), "ha": "left" if sign > 0 else "right"}
        words = show_number(level, ".2f")
        ax.annotate(words, (reach, place), textcoords="offset points", color=color, va="center", **side)
    for place, level in zip((row + 0.5, row + 1.5, row + 2.5), levels, strict=True):
        ax.plot([level] * 2, [place - 0.5, place + 0.5], color=ink, linewidth=0.8, linestyle=":")


class _Calibration(Protocol):
    """What is drawn of `pvae.diagnostics.Calibration`."""

    @property
    def ranks(self) -> Tensor: ...
    @property
    def num_draws(self) -> int: ...
    @property
    def names(self) -> tuple[str, ...]: ...


def ranks(calibration: _Calibration, ax: Axes | None = None, *, level: float = 0.95) -> Axes:
    r"""Draws whether ranks of simulation-based calibration are uniform: their distribution function minus the uniform.

    Of a calibrated guide a line stays in the band, with probability ``level`` at least for each latent number. A line
    that rises above it at the left and falls below it at the right is of a guide too narrow; the other way round, too
    wide; all to one side, of one that is shifted. The band is of half-width
    :math:`\sqrt{\log(2 / (1 - \mathrm{level})) / (2 S)}` for S simulations.

    Args:
        calibration: From `pvae.diagnostics.simulation_based_calibration`: its ``ranks``, shape ``(S, D)``, from 0 to
            ``num_draws``, with ``names``. Others in it that are ``weighted`` by importance are drawn, too.
        ax: Where to draw; a new figure if left out.
        level: Coverage of the band, between 0 and 1.

    Raises:
        ArgumentError: ``level`` is no such number, or the calibration another function's result.
        DataError: Ranks have another shape, or lie outside of 0 to ``num_draws``.

    Source: Talts, Betancourt, Simpson, Vehtari and Gelman, 2018, Validating Bayesian Inference Algorithms with
    Simulation-Based Calibration; for the band Massart, 1990, The Tight Constant in the Dvoretzky-Kiefer-Wolfowitz
    Inequality.
    """
    level = real_number("level", level, above=0, below=1)
    maker = "pvae.diagnostics.simulation_based_calibration"
    check_result("calibration", calibration, ("ranks", "num_draws", "names"), maker)
    weighted: _Calibration | None = getattr(calibration, "weighted", None)
    curves = [_deviations(one) for one in (calibration, *([] if weighted is None else [weighted]))]
    ax = new_axes(ax)
    ink, num_dims = get_ink(ax), len(calibration.names)
    half = float(np.sqrt(np.log(2 / (1 - level)) / (2 * len(calibration.ranks))))
    ax.fill_between([0, 1], -half, half, color=ink, alpha=0.2, linewidth=0)
    limit, found = 1.1 * half, []
    styles = [("guide", COLORS["guide"]), ("re-weighted", ink)]
    for (words, color), (shares, lines) in list(zip(styles, curves, strict=False))[::-1]:
        worst = np.abs(lines).max(0)
        limit = max(limit, 1.25 * worst.max())
        for name, line, most in zip(calibration.names, lines.T, worst, strict=True):
            alpha = 1.0 if most > half or num_dims == 1 else 0.5
            ax.plot(shares, line, color=color, linewidth=1.2, alpha=alpha, label=f"{words}: {name}")
        found.append((words, color, int((worst > half).sum())))
        if words == "guide":
            _name_worst(ax, calibration.names, shares, lines, worst > half)
    for i, (words, color, count) in enumerate(found[::-1]):
        place: dict[str, Any] = {"xycoords": "axes fraction", "ha": "right", "va": "top", "color": color}
        ax.annotate(f"{words}: {count} of {num_dims} outside", (0.98, 0.98 - 0.08 * i), **place)
    ax.set(xlim=(0, 1), ylim=(-limit, limit + 0.3 * limit), xlabel="rank of z among the guide's draws, as a share")
    ax.set_ylabel("share of ranks below,\nminus that of uniform ranks")
    ax.set_title(f"Calibration, with a {level:.0%} band")
    return ax


def _deviations(calibration: _Calibration) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the ranks' range, and by how much the ranks' distribution functions, shape ``(L + 2, D)``, differ."""
    values, most = as_array("ranks", calibration.ranks, "(S, D)"), positive_int("num_draws", calibration.num_draws)
    if not ((values >= 0) & (values <= most)).all():
        raise DataError(f"ranks must lie from 0 to num_draws = {most}, got {values.min():g} to {values.max():g}.")
    if values.shape[1] != len(calibration.names):
        raise DataError(f"names must be of {values.shape[1]} latent numbers, got {len(calibration.names)}.")
    shares = np.arange(most + 2) / (most + 1)
    below = [np.bincount(column.astype(int), minlength=most + 1).cumsum() / len(column) for column in values.T]
    return shares, np.insert(np.stack(below, 1), 0, 0.0, axis=0) - shares[:, None]


def _name_worst(
    ax: Axes, names: tuple[str, ...], shares: np.ndarray, lines: np.ndarray, is_outside: np.ndarray
) -> None:
    """Names the lines that leave the band where they do so most, five at most."""
    worst = np.abs(lines).max(0)
    for i in [i for i in np.argsort(-worst) if is_outside[i]][:5]:
        at = int(np.abs(lines[:, i]).argmax())
        side: dict[str, Any] = {"ha": "center", "va": "bottom" if lines[at, i] > 0 else "top"}
        ax.annotate(names[i], (shares[at], lines[at, i]), color=COLORS["guide"], **side)


class _Table(Protocol):
    """What is drawn of `pvae.diagnostics.ModelTable`: lists with a number for each model, the best first."""

    @property
    def names(self) -> list[str]: ...
    @property
    def is_joint(self) -> bool: ...
    @property
    def num_data(self) -> int: ...
    @property
    def mean(self) -> list[float]: ...
    @property
    def mean_std_error(self) -> list[float]: ...
    @property
    def data_std_error(self) -> list[float]: ...
    @property
    def difference(self) -> list[float]: ...
    @property
    def difference_std_error(self) -> list[float]: ...
    @property
    def difference_data_std_error(self) -> list[float]: ...


def comparison(table: _Table, ax: Axes | None = None) -> Axes:
    """Draws models by their log p(x), the best above: each mean with its error, and below it that of its difference to
    the best one, which is an error of pairs and mostly far smaller.

    Thick bars are Monte Carlo errors, thin ones those over the choice of data; both are two standard errors to each
    side.

    Args:
        table: From `pvae.diagnostics.compare_models`.
        ax: Where to draw; a new figure if left out.

    Raises:
        ArgumentError: The table is another function's result.

    Source: in the manner of ``arviz.plot_compare``, after McElreath, 2020, Statistical Rethinking.
    """
    check_result("table", table, ("names", "mean", "difference_data_std_error"), "pvae.diagnostics.compare_models")
    ax = new_axes(ax, figsize=(WIDTH, 1.2 + 0.75 * len(table.names)))
    ink, color = get_ink(ax), COLORS["data"]
    _draw_errors(ax, table.mean, table.mean_std_error, table.data_std_error, "o", ink, -0.13)
    if len(table.names) > 1:
        errors = table.difference_std_error, table.difference_data_std_error
        _draw_errors(ax, table.mean, *errors, "^", color, 0.17)
        gaps = [
            f"{show_number(gap, '.2f')} \N{PLUS-MINUS SIGN} {2 * _total(*e):.2f}"
            for gap, *e in zip(table.difference, *errors, strict=True)
        ]
        for row, words in enumerate(["difference", *gaps[1:]]):
            ax.annotate(words, (1.02, row), xycoords=("axes fraction", "data"), color=color, va="center")
    ax.axvline(table.mean[0], color=ink, linestyle=":", linewidth=1)
    ax.set_yticks(range(len(table.names)), table.names)
    ax.set_ylim(len(table.names) - 0.4, -0.6)
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel("nats, of all data" if table.is_joint else "nats per datum, mean over data")
    ax.set_title(f"{'log p(data)' if table.is_joint else 'log p(x)'} of {table.num_data:,} data")
    return ax


def _total(draws: float, data: float) -> float:
    """The error of both: that over the choice of data has the draws' in it, where there is one."""
    return draws if np.isnan(data) else max(draws, data)


def _draw_errors(
    ax: Axes, at: Sequence[float], draws: Sequence[float], data: Sequence[float], marker: str, color: Any, below: float
) -> None:
    """Marks with two bars each: thick for Monte Carlo errors, thin for all."""
    for row, (level, thick, thin) in enumerate(zip(at, draws, data, strict=True)):
        if marker == "o" or row:  # the best one differs from itself by nothing
            place: dict[str, Any] = {"y": row + below, "color": color}
            ax.errorbar(level, xerr=2 * _total(thick, thin), fmt=marker, markersize=5, elinewidth=1, **place)
            ax.errorbar(level, xerr=2 * thick, fmt="none", elinewidth=3.5, **place)
