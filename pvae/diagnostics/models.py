"""Several models of the same data, by their log p(x): a table with the errors of all differences.

It is here and not beside `pvae.compare`, of which it is made: a comparison is an estimate with an error, a table a
report of many for a reader.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from pvae.errors import ArgumentError
from pvae.evidence import Comparison, EvidenceEstimate, check_estimate, compare

if TYPE_CHECKING:
    import pandas

__all__ = ["ModelTable", "compare_models"]

_EM_STEPS = 1000
_SURE = 2  # standard errors


@dataclass(frozen=True, eq=False, repr=False)
class ModelTable:
    """M models of the same data, the best first. Lists have one number for each, in nats per datum.

    Where estimates are of all data together (`is_joint`), numbers are in nats of all, differences are log Bayes
    factors against the best, and there are no errors over the choice of data.

    Attributes:
        estimates: By name, the best first.
    """

    estimates: Mapping[str, EvidenceEstimate]

    @property
    def names(self) -> list[str]:
        """The models, the best first."""
        return list(self.estimates)

    @property
    def is_joint(self) -> bool:
        """Whether it is of log p(data) of all data together."""
        return self._all[0].is_joint

    @property
    def num_data(self) -> int:
        """How many data."""
        return self._all[0].num_together or self._all[0].num_data

    @property
    def mean(self) -> list[float]:
        """Of log p(x) over the data, its bias taken out."""
        return [one.corrected.mean().item() for one in self._all]

    @property
    def mean_std_error(self) -> list[float]:
        """Monte Carlo standard errors of `mean`."""
        return [one.mean_std_error for one in self._all]

    @property
    def data_std_error(self) -> list[float]:
        """Standard errors of `mean` over the choice of data; nan for one number."""
        return [one.data_std_error for one in self._all]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Each model against the best, as by `pvae.compare`."""
        return [compare(one, self._all[0]) for one in self._all]

    @property
    def difference(self) -> list[float]:
        """``mean`` minus the best one, of the same data: 0 and below."""
        return [one.difference for one in self.comparisons]

    @property
    def difference_std_error(self) -> list[float]:
        """Monte Carlo standard errors of `difference`; 0 for the best."""
        return [0.0, *(one.std_error for one in self.comparisons[1:])]

    @property
    def difference_data_std_error(self) -> list[float]:
        """Standard errors of `difference` over the choice of data, from the differences of each datum; 0 for the best.

        What the draws scatter by is a part of them.
        """
        return [0.0, *(one.data_std_error for one in self.comparisons[1:])]

    @property
    def unresolved(self) -> list[int]:
        """How many data of each estimate are unresolved: its log p(x) may be too low."""
        return [int(one.unresolved.sum()) for one in self._all]

    @cached_property
    def weights(self) -> list[float]:
        """Of each model in the mixture ``sum_m w_m p_m(x)`` that gives these data the highest log p(x) (stacking).

        Where estimates are of all data together, the posterior probabilities of the models, if all are as likely a
        priori.

        Source: Yao, Vehtari, Simpson and Gelman, 2018, Using Stacking to Average Bayesian Predictive Distributions.
        """
        log_p = torch.stack([one.corrected for one in self._all])
        if self.is_joint:
            return log_p[:, 0].softmax(0).tolist()
        log_w = log_p.new_zeros(len(log_p), 1)
        for _ in range(_EM_STEPS):  # of a mixture whose components are known
            shares = (log_w + log_p).softmax(0).nan_to_num(1 / len(log_p))
            log_w = shares.mean(1, keepdim=True).log()
        return log_w[:, 0].exp().tolist()

    @property
    def close(self) -> list[str]:
        """The models within two standard errors of the best, that one among them; errors of draws and of data.

        Also those whose errors are not known: of one draw, or where no draw explains a datum.
        """
        errors = zip(self.difference_std_error, self.difference_data_std_error, strict=True)
        # The error over data has the scatter of the draws in it; of all data together there is no other.
        total = [draws if self.is_joint or data != data else max(draws, data) for draws, data in errors]
        return [n for n, d, e in zip(self.names, self.difference, total, strict=True) if not d < -_SURE * e]

    def to_dataframe(self) -> pandas.DataFrame:
        """A table as ``arviz.compare`` makes it, for ``arviz.plot_compare`` of either version, in nats of all data.

        Columns ``rank``, ``elpd``, ``elpd_diff`` (below 0 for worse models, as in ArviZ 1.x), ``dse``, ``se``,
        ``weight`` and ``scale``; ``mcse`` and ``dmcse``, the Monte Carlo parts of both errors; ``unresolved``. As
        ArviZ 0.x asks for that name, ``elpd_loo`` is ``elpd`` again: it is held-out log p(x), and nothing was left out
        to get it.
        """
        import pandas

        draws = self.mean_std_error, self.difference_std_error
        se, dse = draws if self.is_joint else (self.data_std_error, self.difference_data_std_error)
        sums = {"elpd": self.mean, "elpd_loo": self.mean, "elpd_diff": self.difference, "se": se, "dse": dse}
        sums |= {"mcse": draws[0], "dmcse": draws[1]}
        scale = 1 if self.is_joint else self.num_data
        columns = {
            "rank": range(len(self.names)),
            **{name: [scale * value for value in values] for name, values in sums.items()},
            "weight": self.weights,
            "unresolved": self.unresolved,
            "warning": [bool(value) for value in self.unresolved],
            "scale": "log",
        }
        return pandas.DataFrame(columns, index=self.names)

    @property
    def _all(self) -> list[EvidenceEstimate]:
        return list(self.estimates.values())

    def __repr__(self) -> str:
        what, unit = "log p(x)", f"mean over {self.num_data} data, nats per datum"
        if self.is_joint:
            what, unit = "log p(data)", f"of {self.num_data} data together, nats"
        width = max(8, *map(len, self.names))
        lines = [
            f"{what}, {unit}; +- from the samples" + " / from the choice of data" * (not self.is_joint),
            f"  {'model':<{width}}{what:>12}{'':>17}{'difference':>11}{'':>17}{'weight':>8}{'unresolved':>11}",
        ]
        values = (self.mean, self.mean_std_error, self.data_std_error, self.difference, self.difference_std_error)
        rows = zip(self.names, *values, self.difference_data_std_error, self.weights, self.unresolved, strict=True)
        for name, mean, error, data, difference, d_error, d_data, weight, bad in rows:
            both = [f"+- {e:.3f}" + f" / {d:.3f}" * (not self.is_joint) for e, d in ((error, data), (d_error, d_data))]
            lines.append(
                f"  {name:<{width}}{mean:12.3f} {both[0]:<16}{difference:11.3f} {both[1]:<16}{weight:8.2f}{bad:11d}"
            )
        others = self.close[1:]
        if others:
            unknown = ", or these are not known" * any(map(math.isnan, self.difference_std_error))
            lines.append(
                f"  {self.names[0]} is not surely better than {', '.join(others)}: within {_SURE} errors{unknown}"
            )
        elif len(self.names) > 1:
            lines.append(f"  {self.names[0]} is better than all others by more than {_SURE} errors")
        return "\n".join(lines)


def compare_models(estimates: Mapping[str, EvidenceEstimate]) -> ModelTable:
    """Orders models by log p of the same data, held-out ones, and gives all differences to the best their errors.

    Each difference is `pvae.compare`'s: of the same data, whose choice is thus in part without effect, with the error
    of the draws apart. Of many models the best looks better than it is: it was chosen for it.

    Args:
        estimates: By the models' names, from `pvae.log_evidence` with the same data in the same order, and draws of
            its own for each: another ``seed`` if models share a prior's draws.

    Returns:
        `ModelTable`, which prints as a table.

    Raises:
        ArgumentError: There are none, or they are not of the same data, by their number; the message has the names.

    Source: Vehtari, Gelman and Gabry, 2017, Practical Bayesian Model Evaluation Using Leave-One-Out Cross-Validation
    and WAIC, for paired errors; Kass and Raftery, 1995, Bayes Factors.

    Example:
        >>> import pvae
        >>> pair = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5, guide_scale=1.2)
        >>> x = pair.sample(20, seed=0)
        >>> estimate = pvae.log_evidence(pair.model, pair.guide, x)
        >>> other = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5, seed=1)
        >>> table = pvae.diagnostics.compare_models(
        ...     {"other": pvae.log_evidence(other.model, other.guide, x), "true": estimate}
        ... )
        >>> table.names
        ['true', 'other']
    """
    if not isinstance(estimates, Mapping) or not estimates:
        raise ArgumentError(f"estimates must be a dictionary of estimates by their models' names, got {estimates!r}.")
    first = next(iter(estimates))
    for name, one in estimates.items():
        check_estimate(f"estimates[{name!r}]", one)
        try:
            compare(one, estimates[first])
        except ArgumentError as error:
            raise ArgumentError(f"estimates[{name!r}] (a) and estimates[{first!r}] (b): {error}") from None
    ordered = sorted(estimates, key=lambda name: -estimates[name].corrected.mean().item())
    return ModelTable({name: estimates[name] for name in ordered})
