"""An estimate of log p(x) as a labelled table: one row for each datum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pvae.errors import ArgumentError

if TYPE_CHECKING:
    import xarray

    from pvae.evidence.estimates import EvidenceEstimate

__all__ = ["as_dataset"]

# By name: what it is, and its unit, if it has one.
_COLUMNS = {
    "log_px": ("log (1/K) sum_k w_k", "nats"),
    "std_error": ("Monte Carlo standard error of log_px", "nats"),
    "corrected": ("log_px without its second-order bias", "nats"),
    "log_px_psis": ("log_px from Pareto-smoothed weights", "nats"),
    "elbo": ("mean of the log-weights", "nats"),
    "elbo_std_error": ("Monte Carlo standard error of elbo", "nats"),
    "ess": ("effective sample size of the weights", ""),
    "khat": ("Pareto k-hat of the weights", ""),
    "samples": ("draws", ""),
    "rounding": ("how finely log-weights can be told apart", "nats"),
    "reach": ("how far chains came; 1 for other proposals", ""),
    "unreliable": ("whether k-hat, rounding or reach say not to trust log_px and its error", ""),
    "unresolved": ("whether it is unreliable, misses the error asked for, or has no interval", ""),
}


def as_dataset(
    estimate: EvidenceEstimate, coords: Mapping[str, Any] | None = None, *, level: float = 0.95
) -> xarray.Dataset:
    """The numbers and verdicts of each datum; see `EvidenceEstimate.to_dataset`."""
    import xarray

    lower, upper = estimate.interval(level)
    values = dict(estimate.diagnostics) | {name: getattr(estimate, name) for name in _COLUMNS}
    values |= {"lower": lower, "upper": upper, "stage": estimate.stage, "withheld": estimate.withheld}
    texts = {name: {"long_name": words} | ({"units": unit} if unit else {}) for name, (words, unit) in _COLUMNS.items()}
    for end in ("lower", "upper"):
        texts[end] = {"long_name": f"{end} end of the {level:.4g} confidence interval for log p(x)", "units": "nats"}
    texts["stage"] = {"long_name": "what answered"}
    texts["withheld"] = {"long_name": "why there is no interval; empty where there is one"}
    columns = {name: ("datum", _as_array(value), texts.get(name, {})) for name, value in values.items()}
    rows = {name: ("datum", _check_rows(name, value, estimate.num_data)) for name, value in (coords or {}).items()}
    rows = {"datum": ("datum", np.arange(estimate.num_data))} | rows
    for name in rows.keys() & columns.keys():
        raise ArgumentError(f"coords: '{name}' is the name of a column; call the coordinate otherwise.")
    return xarray.Dataset(columns, rows, _attributes(estimate, level))


def _attributes(estimate: EvidenceEstimate, level: float) -> dict[str, Any]:
    """Of the whole, in types that netCDF knows."""
    attributes = {
        "units": "nats",
        "num_samples": estimate.num_samples,
        "proposal": estimate.proposal,
        "seed": estimate.seed,
        "seconds": estimate.seconds,
        "shared_draws": int(estimate.shared_draws),
        "num_together": estimate.num_together,
        "product_precision": estimate.product_precision,
        "product_rounding": estimate.product_rounding,
        "mean": estimate.mean,
        "mean_std_error": estimate.mean_std_error,
        "data_std_error": estimate.data_std_error,
        "mean_withheld": estimate.mean_withheld,
        "level": level,
    }
    if estimate.target_std_error is not None:
        attributes["target_std_error"] = float(estimate.target_std_error)
    if estimate.merged_seeds:
        attributes["merged_seeds"] = list(estimate.merged_seeds)
    return attributes


def _as_array(value: Tensor | Sequence[str]) -> np.ndarray:
    return value.numpy() if isinstance(value, Tensor) else np.array(value, dtype=str)


def _check_rows(name: str, value: Any, num_data: int) -> np.ndarray:
    """A coordinate over the data.

    Raises:
        ArgumentError: It has not one entry for each datum.
    """
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.shape != (num_data,):
        raise ArgumentError(
            f"coords: '{name}' must have one entry for each of the {num_data} data, got shape {array.shape}."
        )
    return array
